"""KAIST AI's published networks: the challenge's 2nd and 3rd place on CIFAR-100, and how their authors count them.

Repository Kthyeon/micronet_neurips_challenge, MIT licence (Copyright (c) 2019 Kthyeon).
"""
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressed import cifar100, counting
from compressed.errors import BadInput
from compressed.graph import trace, weight_layers
from compressed.networks import fill, is_plain, load_state
from compressed.normalisation import scale_and_shift

# output width, number of blocks, stride of the first
STAGES = ((20, 2, 1), (36, 1, 2), (36, 1, 1), (56, 3, 1), (80, 1, 2), (80, 4, 1), (88, 1, 2), (96, 2, 1), (114, 1, 1))
STEM_WIDTH, EXPANSION = 32, 2.5
MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)  # of RGB / 255, as their authors trained with


def swish(x: Tensor) -> Tensor:
    """Return hard swish of x, in place if no gradient is needed: a teacher is evaluated at every training step."""
    return F.hardswish(x, inplace=not torch.is_grad_enabled())


class Block(nn.Module):
    """Inverted residual with hard swish and, where the stride is 1, squeeze and excitation and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        hidden = int(EXPANSION * in_channels)
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        # stored with stride 2 too, but used with stride 1 alone
        self.fc1 = nn.Conv2d(out_channels, out_channels // 4, 1)
        self.fc2 = nn.Conv2d(out_channels // 4, out_channels, 1)
        self.residual = stride == 1
        self.shortcut = nn.Sequential()
        if self.residual and in_channels != out_channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False),
                                          nn.BatchNorm2d(out_channels))

    def forward(self, x):
        out = swish(self.bn1(self.conv1(x)))
        out = swish(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if not self.residual:
            return out
        excited = self.fc2(swish(self.fc1(out.mean((2, 3), keepdim=True)))).sigmoid()
        return out * excited + self.shortcut(x)


class Micronet(nn.Module):
    """KAIST's network: [N, 3, 32, 32] images normalised by cifar100.normalise -> [N, 100] logits."""

    def __init__(self, num_classes: int = 100):
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM_WIDTH, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH)
        blocks, channels = [], STEM_WIDTH
        for width, repeats, stride in STAGES:
            for i in range(repeats):
                blocks.append(Block(channels, width, stride if i == 0 else 1))
                channels = width
        self.layers = nn.Sequential(*blocks)
        self.linear = nn.Linear(channels, num_classes)
        for name, values in zip(("scale", "shift"), scale_and_shift(MEAN, STD)):
            self.register_buffer(name, values.float()[:, None, None], persistent=False)

    def forward(self, x):
        out = swish(self.bn1(self.conv1(x * self.scale + self.shift)))
        return self.linear(self.layers(out).mean((2, 3)))


def load_micronet(path) -> Micronet:
    """Return KAIST's network from one of its files, in eval mode; a pruned layer's weight is `weight` times `mask`.

    Raises BadInput if the file is missing, damaged, or of another network.
    """
    state = load_state(path)
    for key in [key for key in state if key.endswith(".mask")]:
        mask, weight = state.pop(key), key.removesuffix("mask") + "weight"
        fits = weight in state and is_plain(mask) and is_plain(state[weight]) and state[weight].shape == mask.shape
        if not fits:
            raise BadInput(f"{path}: {key} belongs to no weight of its shape")
        state[weight] = state[weight] * mask
    return fill(Micronet(), state, f"{path} is none of KAIST's networks")


def without_gates(model: Micronet, images: Tensor) -> dict[str, Tensor]:
    """Return the state dict of mobilenet_v2.KaistMobileNetV2 that approximates a network of KAIST's.

    Every squeeze-and-excitation gate is replaced by its mean over the images (uint8 [N, 3, 32, 32], of the train set),
    which goes into the BatchNorm before it; masks stay as they are. The input normalisation goes into the first
    convolution and its BatchNorm, so that the zeros of its border are grey pixels: exact but for the map's outermost
    positions.
    """
    sums: dict[str, Tensor] = {}

    def see(name):
        return lambda module, _, out: sums.update({name: sums.get(name, 0) + out.sigmoid().sum((0, 2, 3))})

    hooks = [block.fc2.register_forward_hook(see(name)) for name, block in model.named_modules()
             if isinstance(block, Block)]
    with torch.no_grad():
        for batch in images.split(100):
            model(cifar100.normalise(batch))
    for hook in hooks:
        hook.remove()
    state = {key: value.clone() for key, value in model.state_dict().items() if not re.search(r"\.fc[12]\.", key)}
    for name, gates in sums.items():
        for kind in ("weight", "bias"):
            state[f"{name}.bn3.{kind}"] *= gates / len(images)
    state["bn1.running_mean"] -= (state["conv1.weight"] * model.shift).sum((1, 2, 3))
    state["conv1.weight"] *= model.scale
    return state


def authors_count(model: Micronet) -> dict[str, float]:
    """Return {"parameters", "operations", "score"} of a published network as its authors count it, in 32-bit units.

    Every stored value has 16 bits, and every weight a mask bit; a BatchNorm is a bias alone. Multiplications have 16
    bits, additions 32. Hard swish is 4 multiplications and an addition, and neither the scaling by squeeze and
    excitation nor a residual addition counts. They publish 0.0056215. This function counts what runs, 0.0056190. The
    published figure results exactly if the squeeze and excitation of strided blocks, which never runs, is counted too,
    and a sigmoid as a hard swish: that is our inference.
    """
    weights = [module.weight for _, module in weight_layers(model)]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    biases = [module.bias for _, module in weight_layers(model) if module.bias is not None] + [n.bias for n in norms]
    parameters = sum(int(w.count_nonzero()) / 2 + w.numel() / 32 for w in weights) + sum(map(len, biases)) / 2
    multiplications = additions = 0
    for op in trace(model):
        if op.kind in ("conv", "linear"):
            terms, positions = op.module.weight.flatten(1).count_nonzero(1), op.outputs // op.channels
            multiplications += int(terms.sum()) * positions
            additions += int((terms - 1).clamp(min=0).sum()) * positions + op.outputs  # and a bias
        elif op.kind == "hardswish":
            multiplications, additions = multiplications + 4 * op.outputs, additions + op.outputs
        elif op.kind == "sigmoid":
            multiplications += op.outputs
        elif op.kind == "mean":
            multiplications, additions = multiplications + op.outputs, additions + (op.fan_in - 1) * op.outputs
    operations = multiplications / 2 + additions
    return {"parameters": parameters, "operations": operations,
            "score": parameters / counting.STORAGE_BASE + operations / counting.OPERATIONS_BASE}
