"""Exact simulation of a quantized network: every value is an integer times a step, so the logits are exact.

Steps of activations, and of what is shipped, are powers of two: products and sums of codes are whole numbers times a
power of two. While they stay below 2^24 (testers.py checks the bound) float32 holds them exactly, in any order of
summation, on any machine (convolution algorithms that do not sum products are switched off). Scales and shifts, linear
layers, and convolutions whose sums may be larger, are computed in float64, which holds those exactly. A pointwise
function, such as hard swish, is a table: for every code the function's value, computed in float64 and rounded to the
grid of the next point. So a claim is verified to the image, the recorded logits to the last bit, and tools/integer.py
computes the same logits without a float.
"""
import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressed import kernels
from compressed.cifar100 import IMAGE_SIZE
from compressed.errors import BadInput
from compressed.counting import sum_bounds
from compressed.evaluation import logits
from compressed.formats import Activation, Grid, code_range, codes, exponent, folded, found_grid
from compressed.graph import Graph, read_graph
from compressed.operations import RoundsValues

# ---- The network on its grids --------------------------------------------------------------------

# On a grid whose step is a power of two, x clip(x + 3, 0, 6) is exact in float64, and its sixth is rounded once. The
# last bits of the others depend on the machine. Rounded to float32 they decide no code (tested for 8 bits); without,
# SiLU and GELU of a large x, which differ from x by some 2^-53, could lie on either side of a half of a step.
FORMULAS = {"hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6, "hardsigmoid": lambda x: (x + 3).clamp(0, 6) / 6,
            "sigmoid": lambda x: torch.sigmoid(x).float(), "silu": lambda x: F.silu(x).float(),
            "gelu": lambda x: F.gelu(x).float()}
RELU6 = 6.0


class Quantizer(RoundsValues):
    """Round an activation to its grid. Without a sign the lower clip at 0 is the ReLU. Has no keys in the state dict.

    It has no gradient: training replaces it by a LearnedQuantizer (training/learned_steps.py), except at the image.
    most: an upper clip in units of the values, such as 6 for a ReLU6.
    """

    def __init__(self, bits: int, signed: bool, step: float, most: float = math.inf):
        super().__init__()
        self.bits, self.signed, self.step, self.most = bits, signed, step, most

    def range(self) -> tuple[int, int]:
        """Return the smallest and the largest code."""
        low, high = code_range(self.bits, self.signed)
        return low, round(min(high, self.most / self.step))

    def forward(self, x):
        low, high = self.range()
        if compiled(x):
            y = torch.empty_like(x)  # laid out as x is
            kernels.call("quantize", x, x.numel(), self.step, float(low), float(high), y)
            return y
        # float64 comes from sums that nothing else reads: overwrite them; codes fit float32
        x = x.mul_(1 / self.step) if x.dtype == torch.float64 else x * (1 / self.step)
        return x.round_().float().clamp_(low, high).mul_(self.step)


class ScaleShift(nn.Module):
    """Scale and shift exact sums as a folded BatchNorm does, in float64.

    It holds the product of a sum below 2^24 with a float16 scale (11 significant bits), plus the shift, exactly.
    """

    def __init__(self, bn: nn.BatchNorm2d):
        super().__init__()
        scale, shift = folded(bn)
        self.register_buffer("scale", scale.float().double()[:, None, None], persistent=False)
        self.register_buffer("shift", shift.float().double()[:, None, None], persistent=False)

    def forward(self, x):
        return x.double().mul_(self.scale).add_(self.shift)


def table(function: str, source: Activation, step: float, target: Activation, target_step: float) -> Tensor:
    """Return a function as a table of codes: for each code of the source, from the lowest on, that of the target.

    function: a key of FORMULAS. step, target_step: of the codes. The entries are int32.
    """
    values = FORMULAS[function](torch.arange(source.low, source.high + 1).double() * step)
    return codes(values, target_step, target.low, target.high).int()


class Lookup(Quantizer):
    """Look up a pointwise function of the codes of `source`, rounded to the grid of the Quantizer after it."""

    def __init__(self, function: str, source: Quantizer, behind: Quantizer):
        super().__init__(behind.bits, behind.signed, behind.step, behind.most)
        entries = table(function, Activation(source.bits, source.signed), source.step,
                        Activation(self.bits, self.signed), self.step)
        self.register_buffer("values", entries.float() * self.step, persistent=False)
        self.source_step, self.lowest = source.step, source.range()[0]

    def forward(self, x):
        if compiled(x):
            y = torch.empty_like(x)
            kernels.call("look_up", x, x.numel(), self.source_step, self.lowest, self.values, len(self.values), y)
            return y
        places = (x * (1 / self.source_step) - self.lowest).nan_to_num_().long()
        return self.values.take(places).where(x == x, x)


class Rescale(Quantizer):
    """Scale, shift and round: a ScaleShift and the next Quantizer, with kernels.c where possible."""

    def __init__(self, norm: ScaleShift, behind: Quantizer):
        super().__init__(behind.bits, behind.signed, behind.step, behind.most)
        self.norm = norm

    def forward(self, x):
        if not compiled(x):
            return super().forward(self.norm(x))
        x, channels = x.contiguous(memory_format=torch.channels_last), x.shape[1]
        y, (low, high) = torch.empty_like(x), self.range()
        kernels.call("rescale", x, x.numel() // channels, channels, self.norm.scale, self.norm.shift, self.step,
                     float(low), float(high), y)
        return y


def compiled(x: Tensor) -> bool:
    """Return True if kernels.c can compute with this tensor: float32 on a CPU, dense, and there is a compiler."""
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return x.is_cpu and x.dtype == torch.float32 and dense and kernels.library(x.dtype) is not None


class ExactLinear(nn.Linear):
    """Compute a linear layer in float64, where its sums, by far the longest of a network, are exact up to 2^53."""

    def forward(self, x):
        return F.linear(x.double(), self.weight.double(), None if self.bias is None else self.bias.double())


class ExactConv2d(nn.Conv2d):
    """Compute a convolution in float32, where its sums are exact, and add its bias in float64."""

    def forward(self, x):
        return self._conv_forward(x, self.weight, None).double().add_(self.bias.double()[:, None, None])


class WideConv2d(nn.Conv2d):
    """Compute a convolution in float64, for the few whose sums may exceed what float32 holds exactly."""

    def forward(self, x):
        return self._conv_forward(x.double(), self.weight.double(), None if self.bias is None else self.bias.double())


def largest_products(layer: nn.Module, grid: Grid, source: Activation) -> list[int]:
    """Return how large each output channel's sum of products of codes can become; the grid must have steps."""
    return [max(-low, high) for low, high in sum_bounds(grid.codes(layer.weight), source)]


def is_wide(layer: nn.Conv2d, source: Activation) -> bool:
    """Return True if a convolution of codes may have sums beyond 2^24 steps; its weights are multiples of a step."""
    grid = found_grid(layer.weight)
    return bool(grid.steps) and max(largest_products(layer, grid, source)) > 2**24


def check_integer_form(graph: Graph) -> None:
    """Raise BadInput for a network that can be counted, but not computed in integers here.

    It scales or shifts its input itself, or divides a sum by a number that is no power of two.
    """
    if graph.normalised:
        raise BadInput("the network scales or shifts its input itself, which has no integer form here: take that out "
                       "of the forward pass, and train with (pixel - 128) / 64")
    for branch in (branch for point in graph.points for branch in point.branches):
        if branch.kind == "mean" and branch.terms & (branch.terms - 1):
            raise BadInput(f"{branch.name} averages {branch.terms} values, which has no integer form here: expected a "
                           "power of two, whose division is a shift")


def quantize_activations(model: nn.Module, activations: list[dict]) -> None:
    """Put a Quantizer in the place of the ReLU or Identity at every activation point, in place.

    activations: {"name", "bits", "signed", "step"} of each point, as in a claim. Raises BadInput if the names are not
    exactly the network's points, or a format is bad.
    """
    graph = read_graph(model)
    check_integer_form(graph)
    points = {point.name: point for point in graph.points[:-1]}
    named = [str(a.get("name")) for a in activations]
    if sorted(named) != sorted(points):
        raise BadInput(f"the activations listed are not the network's {len(points)}: missing "
                       f"{sorted(points.keys() - set(named))}, unknown {sorted(set(named) - points.keys())}")
    for name, a in zip(named, activations):
        step, bits, point = a.get("step"), a.get("bits"), points[name]
        if exponent(step) is None or step < 2.0**-126 or bits not in range(1, 17):
            raise BadInput(f"activation {name}: {bits} bits with step {step}; expected 1 to 16 and a power of two, "
                           "2^-126 to 2^127, whose reciprocal is a float32")
        if a.get("signed") is not point.signed:
            raise BadInput(f"activation {name}: signed is {a.get('signed')}, expected {point.signed}")
        most = RELU6 if point.activation == "relu6" else math.inf
        model.set_submodule(name, Quantizer(bits, point.signed, float(step), most))


def exact_network(model: nn.Module, activations: list[dict]) -> nn.Module:
    """Return a copy of a shipped model that computes on its grids, with the same logits to the last bit on any machine.

    activations: as in `quantize_activations`. The copy maps normalised images, float [N, 3, 32, 32] as
    cifar100.normalise returns them, to float32 logits [N, classes].
    """
    # without oneDNN, PyTorch would leave 3x3 convolutions of 16 images or more to NNPACK, which does not sum products
    torch.backends.nnpack.set_flags(False)
    network, graph = copy.deepcopy(model).eval(), read_graph(model)
    quantize_activations(network, activations)
    sources = {entry["name"]: Activation(entry["bits"], entry["signed"]) for entry in activations}
    for branch in graph.layers:
        layer = network.get_submodule(branch.name)
        if branch.norm:
            network.set_submodule(branch.norm, ScaleShift(network.get_submodule(branch.norm)))
        if isinstance(layer, nn.Linear):
            layer.__class__ = ExactLinear
        elif branch.kind == "layer" and is_wide(layer, sources[branch.source]):
            layer.__class__ = WideConv2d
        elif branch.kind == "layer" and layer.bias is not None and not branch.norm:
            layer.__class__ = ExactConv2d
    for point in graph.points:
        first = point.branches[0]
        if first.kind == "function":
            source, behind = (network.get_submodule(name) for name in (first.source, point.name))
            network.set_submodule(first.name, nn.Identity())
            network.set_submodule(point.name, Lookup(first.function, source, behind))
        elif len(point.branches) == 1 and first.norm and point.name != "logits" and len(point.shape) == 3:
            both = Rescale(network.get_submodule(first.norm), network.get_submodule(point.name))
            network.set_submodule(first.norm, nn.Identity())
            network.set_submodule(point.name, both)
    network.register_forward_pre_hook(refuse_codes)
    network.register_forward_hook(lambda module, inputs, out: out.float())
    return network.requires_grad_(False).to(memory_format=torch.channels_last)


def refuse_codes(module: nn.Module, inputs: tuple) -> None:
    """Raise BadInput for images that are not normalised yet."""
    if not inputs[0].is_floating_point():
        raise BadInput(f"images of {inputs[0].dtype}: expected normalised ones, cifar100.normalise(images)")


def probe_images() -> Tensor:
    """Return a fixed batch of made-up images, uint8 [4, 3, 32, 32], the same on every machine."""
    position = torch.arange(4 * 3 * IMAGE_SIZE * IMAGE_SIZE)
    return (position * 2654435761 >> 13).remainder(256).to(torch.uint8).view(4, 3, IMAGE_SIZE, IMAGE_SIZE)


def probe_logits(network: nn.Module) -> list[list[float]]:
    """Return the logits of the `probe_images`, by which a claim can be checked without data."""
    return logits(network, probe_images()).tolist()
