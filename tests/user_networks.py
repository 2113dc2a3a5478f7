"""Networks as other people write them, small: what their forward passes say, and nothing made for this repository."""
import torch
import torch.nn.functional as F
from torch import nn


class ResidualBlock(nn.Module):
    """kuangliu's block, and akamaster's for the shortcut without weights (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int, option: str):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut, self.more = nn.Sequential(), 0
        if stride != 1 and option == "A":
            self.more = (outputs - inputs) // 2
        elif stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.more:
            out += F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more, self.more), "constant", 0)
        else:
            out += self.shortcut(x)
        return F.relu(out)


class ResNet(nn.Module):
    def __init__(self, option: str = "A", num_classes: int = 10, width: int = 8, blocks: int = 1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        inputs, layers = width, []
        for stage in range(3):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                layers.append(ResidualBlock(inputs, width << stage, stride, option))
                inputs = width << stage
        self.layers, self.fc = nn.Sequential(*layers), nn.Linear(inputs, num_classes)

    def forward(self, x):
        out = self.layers(F.relu(self.bn1(self.conv1(x))))
        out = F.avg_pool2d(out, out.size()[3])
        return self.fc(out.view(out.size(0), -1))


class Inverted(nn.Module):
    """kuangliu's block of MobileNetV2, with ReLU6 as in the paper where asked for."""

    def __init__(self, inputs: int, outputs: int, stride: int, act=F.relu):
        super().__init__()
        hidden = 3 * inputs
        self.stride, self.act = stride, act
        self.conv1, self.bn1 = nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3, self.bn3 = nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride == 1 and inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = self.act(self.bn1(self.conv1(x)))
        out = self.act(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out + self.shortcut(x) if self.stride == 1 else out


class Mobile(nn.Module):
    def __init__(self, num_classes: int = 10, six: bool = False):
        super().__init__()
        act = F.relu6 if six else F.relu
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.layers = nn.Sequential(Inverted(8, 12, 1, act), Inverted(12, 12, 1, act), Inverted(12, 16, 2, act))
        self.conv2, self.bn2 = nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.act, self.linear = act, nn.Linear(32, num_classes)

    def forward(self, x):
        out = self.layers(self.act(self.bn1(self.conv1(x))))
        out = self.act(self.bn2(self.conv2(out)))
        out = F.avg_pool2d(out, 4)
        out = out.mean((2, 3), keepdim=True)
        return self.linear(out.view(out.size(0), -1))


class Excited(nn.Module):
    """Squeeze and excitation, hard swish and hard sigmoid; a 5x5 depthwise, a dilated and a grouped convolution."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(inplace=True))
        self.depthwise, self.bn1 = nn.Conv2d(8, 8, 5, 2, 2, groups=8, bias=False), nn.BatchNorm2d(8)
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(inplace=True),
                                     nn.Conv2d(4, 8, 1), nn.Hardsigmoid())
        self.dilated, self.bn2 = nn.Conv2d(8, 16, 3, 1, 2, dilation=2), nn.BatchNorm2d(16)
        self.grouped, self.bn3 = nn.Conv2d(16, 16, 3, 1, 1, groups=4, bias=False), nn.BatchNorm2d(16)
        self.drop, self.act = nn.Dropout(0.2), nn.Hardswish()
        self.head, self.classifier = nn.Linear(16, 24), nn.Linear(24, num_classes, bias=False)

    def forward(self, x):
        x = self.stem(x)
        y = self.bn1(self.depthwise(x))
        x = y * self.squeeze(y) + F.max_pool2d(x, 2)
        x = self.act(self.bn2(self.dilated(x)))
        x = x + torch.sigmoid(self.bn3(self.grouped(x)))
        x = self.act(self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)))
        return self.classifier(self.drop(x))


class VGG(nn.Module):
    """Max pooling, biases without BatchNorm and with it, a hidden linear layer that reads a flattened map."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.classifier = nn.Sequential(nn.Linear(16 * 4 * 4, 24), nn.ReLU(inplace=True), nn.Dropout(),
                                        nn.Linear(24, num_classes))

    def forward(self, x):
        return self.classifier(torch.flatten(self.features(x), 1))


class Dense(nn.Module):
    """kuangliu's DenseNet: BatchNorm and ReLU of what is concatenated, an average of 2x2 between the blocks."""

    def __init__(self, num_classes: int = 10, growth: int = 4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.bn1, self.narrow = nn.BatchNorm2d(8), nn.Conv2d(8, 2 * growth, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)
        self.bn3, self.transition = nn.BatchNorm2d(8 + growth), nn.Conv2d(8 + growth, 8, 1, bias=False)
        self.bn4, self.linear = nn.BatchNorm2d(8), nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.conv1(x)
        out = self.conv2(F.relu(self.bn2(self.narrow(F.relu(self.bn1(x))))))
        out = torch.cat([out, x], 1)
        out = F.avg_pool2d(self.transition(F.relu(self.bn3(out))), 2)
        out = F.avg_pool2d(F.relu(self.bn4(out)), 8)
        return self.linear(out.view(out.size(0), -1))


class Shuffled(nn.Module):
    """A ShuffleNet unit: half of the channels passes by, both halves are shuffled; SiLU and GELU; an excitation that is
    expanded; what is split in three, and one of them not read."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12)
        self.branch = nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6), nn.GELU(),
                                    nn.Conv2d(6, 6, 3, 1, 1, groups=6, bias=False), nn.BatchNorm2d(6), nn.SiLU(True))
        self.excite, self.conv2, self.bn2 = nn.Conv2d(12, 12, 1), nn.Conv2d(16, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, num_classes)

    def forward(self, x):
        x = F.silu(self.bn1(self.conv1(x)))
        x1, x2 = x.chunk(2, dim=1)
        x = torch.cat((x1, self.branch(x2)), 1)
        n, channels, height, width = x.size()
        x = x.view(n, 2, channels // 2, height, width).transpose(1, 2).contiguous().view(n, -1, height, width)
        x = x * torch.sigmoid(self.excite(F.adaptive_avg_pool2d(x, 1))).expand_as(x)
        first, _, last = torch.split(x, [4, 4, 4], 1)
        x = self.bn2(self.conv2(torch.cat([first, first, last, F.gelu(last)], 1)))
        return self.linear(F.silu(x).mean((2, 3)))


class Viewed(nn.Module):
    """A map that is viewed as a vector, and a vector as a map of one pixel; a SiLU in place, whose input is read before
    that; an Identity that runs twice, after functions; arguments that nothing reads."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.branch, self.act, self.drop = nn.Conv2d(8, 8, 1), nn.SiLU(inplace=True), nn.Identity()
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 4, 1, bias=False), nn.BatchNorm2d(8)
        self.squeeze, self.expand = nn.Linear(8, 12), nn.Conv2d(12, 8, 1)
        self.linear = nn.Linear(8 * 4 * 4, num_classes)

    def forward(self, x, *more, **options):
        x = self.bn1(self.conv1(x))
        y = F.relu(self.branch(x))
        x = self.drop(self.act(x)) + y
        x = self.drop(F.silu(self.bn2(self.conv2(x))))
        gate = F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1)))
        x = x * torch.sigmoid(self.expand(gate.view(gate.size(0), -1, 1, 1)))
        return self.linear(x.view(x.size(0), -1))


class Flat(nn.Module):
    """Maps of 1x1 that are flattened between BatchNorm and ReLU; a BatchNorm behind a linear layer; a flat gate."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.hidden, self.bn3, self.gate = nn.Linear(12, 12, bias=False), nn.BatchNorm2d(12), nn.Conv2d(8, 12, 1)
        self.last, self.linear = nn.Linear(12, 12), nn.Linear(12, num_classes)

    def forward(self, x):
        mean = F.adaptive_avg_pool2d(F.relu(self.bn1(self.conv1(x))), 1)
        x = F.relu(self.bn2(self.conv2(mean)).flatten(1))
        x = F.relu(self.bn3(self.hidden(x)[:, :, None, None]).flatten(1))
        return self.linear(F.relu(self.last(x)) * torch.sigmoid(self.gate(mean)).flatten(1))


class Wrapped(nn.Module):
    """A network called `module`, as DataParallel calls it; a buffer that nothing reads; an argument with a default."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.module = Shuffled(num_classes)
        self.register_buffer("history", torch.ones(3))

    def forward(self, x, scale=None):
        if scale is not None:
            x = x * scale
        return self.module(x)
