"""MobileNetV2 for 32x32 images: the submission's table (width 1.3), a small one, and KAIST AI's of the same family.

    python -m tools.layers      prints the layer table and what thop counts

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018. Every departure from the paper
is marked DEPARTURE where it happens. State-dict keys are those of kuangliu/pytorch-cifar, so checkpoints move freely
between this file and any implementation of that table. This file imports torch alone.
"""
import dataclasses

from torch import nn


@dataclasses.dataclass(frozen=True)
class Table:
    """The layers of a network of this family.

    stages: (expansion, width, number of blocks, stride of the first block) each. stem: width of the first convolution.
    head: width of a last 1x1 convolution at multipliers up to 1, or None for none. activation: an nn.Module class.
    multiple: widths are rounded to multiples of it.
    """
    stages: tuple[tuple[float, int, int, int], ...]
    stem: int
    head: int | None
    activation: type[nn.Module] = nn.ReLU
    multiple: int = 8

    def scaled(self, base: int, width: float) -> int:
        """Return the number of channels at a width multiplier of a layer that has `base` at multiplier 1."""
        return max(self.multiple, int(width * base + self.multiple / 2) // self.multiple * self.multiple)


# DEPARTURE: stem and stage 2 have stride 1 (the paper: 2), because the images are 32x32 and not 224x224.
# DEPARTURE: ReLU instead of ReLU6. There is no 8-bit float range to protect: activations are clipped by their own grid.
SUBMISSION = Table(stages=((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
                           (6, 320, 1, 1)), stem=32, head=1280)
# Half expansion, a quarter of the multiply-accumulates, no head: masks and BatchNorm of a wide table alone cost as much
# as the whole network of the challenge's winner.
SMALL = Table(stages=((3, 20, 2, 1), (3, 40, 4, 2), (3, 80, 6, 2), (3, 120, 4, 2)), stem=24, head=None,
              activation=nn.Hardswish, multiple=4)

# KAIST AI's entry ver2 to the challenge (tools/kaist_checkpoint.py). Its blocks are gated, see GatedBlock.
KAIST = Table(stages=((2.5, 20, 2, 1), (2.5, 36, 2, 2), (2.5, 56, 3, 1), (2.5, 80, 5, 2), (2.5, 88, 1, 2),
                      (2.5, 96, 2, 1), (2.5, 114, 1, 1)), stem=32, head=None, activation=nn.Hardswish, multiple=2)


class Block(nn.Module):
    """Inverted residual: 1x1 expansion, 3x3 depthwise, 1x1 linear projection; [N, in, H, W] -> [N, out, H/s, W/s].

    The hidden width is expansion x in, rounded down.

    DEPARTURE: a stride-1 block whose width changes adds a 1x1 convolution of its input, where the paper adds nothing.
    The first stage (expansion 1) keeps its 1x1 expansion convolution, as kuangliu's table does.
    """

    def __init__(self, in_channels: int, out_channels: int, expansion: float, stride: int, activation):
        super().__init__()
        hidden = int(expansion * in_channels)
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.relu1 = activation()  # this name for any activation: claims name the activation points by it
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.relu2 = activation()
        self.conv3 = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.residual = stride == 1
        self.shortcut = nn.Sequential()
        if self.residual and in_channels != out_channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False),
                                          nn.BatchNorm2d(out_channels))
        self.out = nn.Identity()  # holds no weights: the place where quantize.py finds the block's output

    def forward(self, x):
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.residual:
            out = self.gated(out) + self.shortcut(x)
        return self.out(out)

    def gated(self, out):
        """Return what is added to the shortcut: here the projection's output, which GatedBlock scales."""
        return out


class GatedBlock(Block):
    """Inverted residual with squeeze and excitation before the shortcut, where the stride is 1."""
    gates = (1,)  # strides of the blocks that have the gate's layers

    def __init__(self, in_channels: int, out_channels: int, expansion: float, stride: int, activation):
        super().__init__(in_channels, out_channels, expansion, stride, activation)
        if stride in self.gates:
            self.fc1 = nn.Conv2d(out_channels, out_channels // 4, 1)
            self.fc2 = nn.Conv2d(out_channels // 4, out_channels, 1)
            self.relu3 = activation()
        self.shortcut = self._modules.pop("shortcut")  # after the gate, as in KAIST's files

    def gated(self, out):
        return out * self.fc2(self.relu3(self.fc1(out.mean((2, 3), keepdim=True)))).sigmoid()


class MobileNetV2(nn.Module):
    """[N, 3, 32, 32] normalised images -> [N, classes] logits. Any input of at least 8x8 works: the map is averaged."""
    block = Block

    def __init__(self, num_classes: int = 100, width: float = 1.3, table: Table = SUBMISSION):
        super().__init__()
        if not 0 < width <= 8:
            raise ValueError(f"width multiplier {width} is not between 0 and 8")
        self.image = nn.Identity()  # like Block.out: where quantize.py finds the network's input
        channels = table.scaled(table.stem, width)
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = table.activation()
        blocks = []
        for expansion, base, repeats, stride in table.stages:
            for i in range(repeats):
                out_channels = table.scaled(base, width)
                blocks.append(self.block(channels, out_channels, expansion, stride if i == 0 else 1, table.activation))
                channels = out_channels
        self.layers = nn.Sequential(*blocks)
        self.head = table.head is not None
        if self.head:
            head = max(table.head, table.scaled(table.head, width))  # the paper: multipliers below 1 leave it
            self.conv2 = nn.Conv2d(channels, head, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(head)
            self.relu2 = table.activation()
            channels = head
        self.features = nn.Identity()  # the pooled features, the linear layer's input
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x):
        out = self.relu1(self.bn1(self.conv1(self.image(x))))
        out = self.layers(out)
        if self.head:
            out = self.relu2(self.bn2(self.conv2(out)))
        return self.linear(self.features(out.mean((2, 3))))  # the map is 4x4: the mean of 16 values


class SmallMobileNetV2(MobileNetV2):
    """The small table: 593k weights, 39M MACs per image."""

    def __init__(self, num_classes: int = 100, width: float = 1.0):
        super().__init__(num_classes, width, SMALL)


class KaistMobileNetV2(MobileNetV2):
    """KAIST AI's network: 463k weights, 39M MACs per image."""
    block = GatedBlock

    def __init__(self, num_classes: int = 100, width: float = 1.0):
        super().__init__(num_classes, width, KAIST)
