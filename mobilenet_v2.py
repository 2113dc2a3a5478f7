"""MobileNetV2 (width 1.3) for 32x32 images and 100 classes, as one table; and the checkpoints that fit it.

    python mobilenet_v2.py      prints the layer table and what thop counts

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018. Every departure from the paper
is marked DEPARTURE where it happens. State-dict keys are those of kuangliu/pytorch-cifar, so checkpoints move freely
between this file and any implementation of that table. This file imports torch alone.
"""
import copy
import os
import pickle
import re
import zipfile

import torch
from torch import nn

# expansion, base width, number of blocks, stride of the first block
# DEPARTURE: stem and stage 2 have stride 1 (the paper: 2), because the images are 32x32 and not 224x224.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM_WIDTH, HEAD_WIDTH = 32, 1280
IMAGE_SIZE = 32
CHECKPOINT = "cifar100_mobilenetv2.pt"
PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int8, torch.int16,
         torch.int32, torch.int64)


class BadInput(ValueError):
    """Input that the user can mend. Scripts print its one line and exit with status 2 (see scripts.run_script)."""


def scaled(base: int, width: float) -> int:
    """Channels of a layer of `base` channels at a width multiplier: a multiple of 8, at least 8."""
    return max(8, int(width * base + 4) // 8 * 8)


class Block(nn.Module):
    """Inverted residual: 1x1 expansion, 3x3 depthwise, 1x1 linear projection; [N, in, H, W] -> [N, out, H/s, W/s].

    DEPARTURE: ReLU instead of ReLU6 (there is no 8-bit float range to protect: activations are clipped by their own
    quantizer), and a stride-1 block whose width changes adds a 1x1 convolution of its input, where the paper adds
    nothing. The first stage (expansion 1) keeps its 1x1 expansion convolution, as kuangliu's table does.
    """

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int):
        super().__init__()
        hidden = expansion * in_channels
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.relu2 = nn.ReLU()
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
            out = out + self.shortcut(x)
        return self.out(out)


class MobileNetV2(nn.Module):
    """[N, 3, 32, 32] normalised images -> [N, classes] logits. Any input of at least 8x8 works: the map is averaged."""

    def __init__(self, num_classes: int = 100, width: float = 1.3):
        super().__init__()
        if not 0 < width <= 8:
            raise BadInput(f"width multiplier {width} is not between 0 and 8")
        self.image = nn.Identity()  # like Block.out: where quantize.py finds the network's input
        channels = scaled(STEM_WIDTH, width)
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        blocks = []
        for expansion, base, repeats, stride in STAGES:
            for i in range(repeats):
                blocks.append(Block(channels, scaled(base, width), expansion, stride if i == 0 else 1))
                channels = scaled(base, width)
        self.layers = nn.Sequential(*blocks)
        head = max(HEAD_WIDTH, scaled(HEAD_WIDTH, width))  # the paper's rule: only multipliers above 1 widen the head
        self.conv2 = nn.Conv2d(channels, head, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(head)
        self.relu2 = nn.ReLU()
        self.features = nn.Identity()  # the pooled features, the linear layer's input
        self.linear = nn.Linear(head, num_classes)

    def forward(self, x):
        out = self.relu1(self.bn1(self.conv1(self.image(x))))
        out = self.layers(out)
        out = self.relu2(self.bn2(self.conv2(out)))
        return self.linear(self.features(out.mean((2, 3))))  # the map is 4x4: the mean of 16 values


def weight_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of every convolution and the linear layer in state-dict order.

    A layer's position in this list is its index in a bit table: 0 the stem ... 56 the head, 57 the linear layer.
    """
    return [(name, module) for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


def load_state(path) -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint file, on the CPU, without the prefix "module." that DataParallel leaves.

    Nothing in the file is executed (`weights_only=True`). Raises BadInput if the file is missing or damaged or holds
    anything but a plain state dict.
    """
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such checkpoint file; give another one or train one with `python training/main.py`")
    try:
        # torch does not look at its own checksums
        if zipfile.is_zipfile(path) and (part := zipfile.ZipFile(path).testzip()):
            raise BadInput(f"{path}: damaged, {part} in it has another checksum; restore it, or take another one")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except BadInput:
        raise
    except Exception as error:  # a damaged file makes torch's reader stumble anywhere: IndexError, struct.error, ...
        # not in torch's words: they advise to read the file with weights_only=False, which executes what stands in it
        asked = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        reason = f"it asks for {asked[1]}, which tensors do not need" if asked else "damaged, or another kind of file"
        raise BadInput(f"{path}: not a checkpoint that torch can read as plain tensors ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor)
                                              for k, v in state.items()):
        raise BadInput(f"{path}: not a plain state dict of tensors; save `model.state_dict()` and nothing around it")
    plain = {key.removeprefix("module."): value for key, value in state.items()}
    if len(plain) < len(state):
        raise BadInput(f"{path}: holds the same key with and without the prefix 'module.'")
    return plain


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is a dense tensor of real numbers that become float32 as they are: nothing nested or quantized."""
    return not tensor.is_nested and not tensor.is_meta and tensor.layout is torch.strided and tensor.dtype in PLAIN


def load_checkpoint(path, num_classes: int = 100, width: float = 1.3) -> MobileNetV2:
    """The model of a checkpoint file, in eval mode, on the CPU, in float32.

    Strict: raises BadInput, naming every key that is unknown, missing or misshapen, and every tensor that is not
    finite. A float16 checkpoint is loaded as float32. `num_batches_tracked` may be missing (it is not used).
    """
    state = load_state(path)
    model = MobileNetV2(num_classes, width)
    wanted = model.state_dict()
    problems = [f"unknown {key}" for key in state if key not in wanted]
    for key, value in wanted.items():
        if key not in state:
            if not key.endswith("num_batches_tracked"):
                problems.append(f"missing {key}")
        elif not is_plain(state[key]):
            problems.append(f"{key} is no dense tensor of real numbers")
        elif state[key].shape != value.shape:
            problems.append(f"{key} is {list(state[key].shape)}, expected {list(value.shape)}")
        elif not torch.isfinite(state[key].float()).all():
            problems.append(f"{key} holds values that are not finite")
    if problems:
        raise BadInput(f"{path} does not fit MobileNetV2 (width {width}, {num_classes} classes): "
                       + "; ".join(problems))
    model.load_state_dict({key: state.get(key, value) for key, value in wanted.items()})
    return model.eval()


def layer_table(model: MobileNetV2) -> str:
    """A line for every convolution and the linear layer: index, name, kind, shape of the weight, output, weights."""
    outputs = {}
    hooks = [module.register_forward_hook(lambda m, _, out: outputs.__setitem__(m, tuple(out.shape[1:])))
             for _, module in weight_layers(model)]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    for hook in hooks:
        hook.remove()
    lines = [f"{'':>2}  {'layer':<22} {'kind':<10} {'weight':<18} {'stride':>6} {'output':<12} {'weights':>9}"]
    for index, (name, module) in enumerate(weight_layers(model)):
        if isinstance(module, nn.Linear):
            kind, stride = "linear", ""
        else:
            kernel = "x".join(map(str, module.kernel_size))
            kind, stride = (f"{kernel} dw" if module.groups > 1 else kernel), module.stride[0]
        shape = "x".join(map(str, module.weight.shape))
        out = "x".join(map(str, outputs[module]))
        lines.append(f"{index:>2}  {name:<22} {kind:<10} {shape:<18} {stride:>6} {out:<12} {module.weight.numel():>9,}")
    return "\n".join(lines)


def thop_counts(model: nn.Module) -> list[int] | None:
    """What thop counts for one image and for two; None if it is not installed. On copies: thop writes into models."""
    try:
        from thop import profile
    except ImportError:
        return None
    batches = (torch.zeros(images, 3, IMAGE_SIZE, IMAGE_SIZE) for images in (1, 2))
    return [int(profile(copy.deepcopy(model).eval(), inputs=(batch,), verbose=False)[0]) for batch in batches]


def main():
    model = MobileNetV2()
    print(layer_table(model))
    layers = [module for _, module in weight_layers(model)]
    conv = sum(module.weight.numel() for module in layers if isinstance(module, nn.Conv2d))
    norm = sum(p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    print(f"\n{len(layers)} weight tensors: {conv:,} convolution weights, {model.linear.weight.numel():,} linear "
          f"weights (+ {model.linear.bias.numel()} biases), {norm:,} BatchNorm scales and shifts,"
          f" {sum(p.numel() for p in model.parameters()):,} parameters in all")
    thop = thop_counts(model)
    if thop is None:
        print("thop is not installed (pip install -r requirements.txt): its count is left out")
    else:  # the submission's 325.4M was a batch of two
        print(f"thop, batch of 1: {thop[0]:,}\nthop, batch of 2: {thop[1]:,}")


if __name__ == "__main__":
    main()
