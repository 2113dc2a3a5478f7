"""Choose widths and steps for a network's weights and activations, and store every value on its grid.

`quantize_weights` and `quantize_activations` make a network that computes on its grids, `shipped` one whose stored
values are all codes times a step. Source of the rounding: the submission's linear, symmetric quantizer (see
power_of_two_step).
"""
import contextlib
import dataclasses
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressed import cifar100
from compressed.counting import has_submissions_layers
from compressed.errors import BadInput
from compressed.exact_network import check_integer_form
from compressed.files import load_toml
from compressed.formats import code_range, codes, fake_quantize, folded, power_of_two_step
from compressed.graph import layer_kind, read_graph, weight_layers
from compressed.operations import RoundsWeightsAlone

# the submission's 6-bit layers, by index among its 58 layers; every other has 8 bits
SIX_BITS = {3: "layers.0.conv3", 5: "layers.1.conv1", 8: "layers.1.shortcut.0", 10: "layers.2.conv2",
            11: "layers.2.conv3", 14: "layers.3.conv3", 16: "layers.4.conv2", 19: "layers.5.conv2",
            55: "layers.16.shortcut.0"}
LAYER_KINDS = "conv", "depthwise", "linear"
POINT_KINDS = "image", "layer", "sum", "norm", "function", "mean", "max", "product", "moved"
SCHEMES = ("power-of-two", "layer", "channel")
RANGES = ("max", "mse", "logits")
FLOAT_BITS = 16  # a scale of this width is a float16, one of fewer bits a fixed-point number
SHIFT_BITS = 16
SIGNIFICANT_BITS = 5  # of a short float16 scale, which could have 11
MOST_UNITS = 2**31 - 2**27  # of a shift in an accumulator of 32 bits, which must hold sums, too


@dataclasses.dataclass(frozen=True)
class Options:
    """Hold what decides the grids of a network: the options of quantize.py of the same names.

    table: the bits of each layer, see `bit_table`. activation_bits: of each activation point, in network order.
    calibration, renew: numbers of train images. scale_bits, shift_bits: of BatchNorms.
    """
    scheme: str
    table: tuple[int, ...]
    ranges: str
    activation_bits: tuple[int, ...]
    calibration: int
    renew: int
    augment: str
    seed: int
    scale_bits: int = FLOAT_BITS
    shift_bits: int = SHIFT_BITS


# ---- Bit tables ----------------------------------------------------------------------------------

def bit_table(option: str | None, model: nn.Module) -> list[int]:
    """Return the bits of a network's layers, in the order of weight_layers.

    option: None: the submission's table for a network with its layers, else 8 bits for all; otherwise see
    `chosen_bits`. In a network with the submission's layers, a table may also name them by their places.
    """
    kinds = {name: layer_kind(layer) for name, layer in weight_layers(model)}
    names = list(kinds)
    submissions = has_submissions_layers(model)
    if option is None:
        return [6 if submissions and name in SIX_BITS.values() else 8 for name in names]
    return list(chosen_bits(option, "layer", kinds, LAYER_KINDS, names if submissions else ()).values())


def activation_table(option: str, model: nn.Module) -> dict[str, int]:
    """Return {activation point: its bits}. option: see `chosen_bits`.

    The kinds of points say what is stored there: the "image"; a "sum" of branches, as after a residual block; or else
    the output of a "layer", a "function" such as hard swish, a "mean", and so on. The image has 8 bits, which hold
    its pixels exactly, unless a table names it.
    """
    def kind(branches) -> str:
        first = branches[0].kind
        return "image" if first == "pixels" else "sum" if len(branches) > 1 and first != "moved" else first

    kinds = {point.name: kind(point.branches) for point in read_graph(model).points[:-1]}
    return chosen_bits(option, "activation point", kinds, POINT_KINDS, exempt="image")


def chosen_bits(option: str, what: str, kinds: dict[str, str], known: tuple[str, ...], places=(),
                exempt=None) -> dict[str, int]:
    """Return the bits of each name in `kinds`, {name: its kind}.

    option: a number: that many for all; else a TOML file with `default = 8` and a table [bits] of names (in quotes) or
    kinds to bits; a name takes precedence over its kind. known: all existing kinds. places: names that may also
    be given by their index. exempt: a kind that has 8 bits unless it is named. Raises BadInput for anything else in the
    file, for an unknown name, and for widths outside 2 to 8 (wider values would not be summed exactly).
    """
    if option.isdecimal() and len(option) < 9:
        content = {"default": int(option)}
    elif Path(option).is_file():
        content = load_toml(option)
    else:
        raise BadInput(f"no bit table {option!r}: give a number of bits or a TOML file")
    bits = content.get("bits", {})
    if content.keys() - {"default", "bits"} or not isinstance(bits, dict):
        raise BadInput(f"{option}: expected nothing but `default = 8` and a table [bits]")
    named = [places[int(key)] if key.isdecimal() and int(key) < len(places) else key for key in bits]
    if twice := [name for name in named if named.count(name) > 1]:
        raise BadInput(f"{option}: {twice[0]} is there twice, by its name and by its index")
    bits = dict(zip(named, bits.values()))
    for key in bits.keys() & kinds.keys() & set(known):
        if others := [name for name, kind in kinds.items() if kind == key and name != key]:
            raise BadInput(f"{option}: {key!r} is the name of one {what} and the kind of others, such as {others[0]}: "
                           "give these by their names, or rename that one")
    if unknown := [key for key in bits if key not in kinds and key not in known]:
        raise BadInput(f"{option}: the network has no {what} {unknown[0]!r} (names with dots need quotes; kinds: "
                       f"{', '.join(known)})")
    default = content.get("default", 8)
    by_kind = {exempt: 8} | bits
    chosen = {name: bits.get(name, by_kind.get(kind, default)) for name, kind in kinds.items()}
    for name, width in chosen.items():
        if type(width) is not int or not 2 <= width <= 8:
            raise BadInput(f"{width!r} bits for {name}: expected 2 to 8")
    return chosen


# ---- A network that computes on its grids ---------------------------------------------------------

class RoundsWeights(RoundsWeightsAlone):
    """Mixin: a convolution or linear layer rounds its weights in the forward pass; the stored ones are trained.

    It has the attributes `bits` and `step`, a tensor that broadcasts against the weights.
    """

    def rounded_step(self) -> Tensor:
        """Return the step as it is stored, in the shape of `step` and the type of the weights."""
        return self.step.to(self.weight)

    def rounded_weight(self) -> Tensor:
        """Return the weights rounded to their grid; the gradient passes straight through."""
        return fake_quantize(self.weight, self.rounded_step(), *code_range(self.bits))


class QuantizedConv2d(RoundsWeights, nn.Conv2d):
    """A convolution that rounds its weights. plain: the class without rounding."""
    plain = nn.Conv2d

    def forward(self, x):
        return self._conv_forward(x, self.rounded_weight(), self.bias)


class QuantizedLinear(RoundsWeights, nn.Linear):
    """A linear layer of the kind above."""
    plain = nn.Linear

    def forward(self, x):
        return F.linear(x, self.rounded_weight(), self.bias)


def quantized_class(layer: nn.Module) -> type:
    """Return the class of a layer like this one that rounds its weights."""
    return QuantizedLinear if isinstance(layer, nn.Linear) else QuantizedConv2d


@contextlib.contextmanager
def weights_rounded_once(model: nn.Module):
    """Round the weights of a network on its grids once for the block, and not in every forward pass.

    Within the block, weights and their steps must not be changed.
    """
    before = [(layer, type(layer), layer.weight) for layer in model.modules() if isinstance(layer, RoundsWeights)]
    for layer, kind, _ in before:
        layer.weight = nn.Parameter(layer.rounded_weight().detach(), requires_grad=False)
        layer.__class__ = kind.plain
    try:
        yield
    finally:
        for layer, kind, weight in before:
            layer.weight, layer.__class__ = weight, kind


def free_step(weight: Tensor, bits: int, channel: bool) -> Tensor:
    """Return the step with the least squared error among 40 clipping points of max|w|.

    channel: whether each output channel has its own: [out, 1, ...]; else [1, 1, ...].
    """
    dims = tuple(range(1, weight.dim())) if channel else tuple(range(weight.dim()))
    low, high = code_range(bits)
    largest = weight.abs().amax(dims, keepdim=True).clamp_min(1e-12)
    best, least = largest, torch.full_like(largest, torch.inf)
    for share in torch.linspace(0.4 if bits > 2 else 0.1, 1.0, 40).tolist():
        step = largest * share / high
        error = (codes(weight, step, low, high) * step - weight).square().sum(dims, keepdim=True)
        best = torch.where(error < least, step, best)
        least = torch.minimum(error, least)
    return best


def quantize_weights(model: nn.Module, table: list[int], scheme: str) -> None:
    """Make every convolution and linear layer round its weights, with steps chosen for the weights as they are now.

    A step that is no power of two is absorbed by the BatchNorm after the layer; a layer without one has a power of two
    in every scheme.
    """
    if scheme not in SCHEMES:
        raise BadInput(f"unknown scheme {scheme!r}; known: {', '.join(SCHEMES)}")
    free = {branch.name for branch in read_graph(model).layers if branch.norm and scheme != "power-of-two"}
    for (name, module), bits in zip(weight_layers(model), table, strict=True):
        weight = module.weight.detach()
        module.__class__, module.bits = quantized_class(module), bits  # same keys, same tensors
        if name in free:
            module.step = free_step(weight, bits, scheme == "channel")
        else:
            module.step = torch.tensor(power_of_two_step(float(weight.abs().max()), bits), device=weight.device)


# ---- Steps of activations -------------------------------------------------------------------------

@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor, bits: int | dict[str, int], ranges: str) -> list[dict]:
    """Return the format of every activation point, with a step found from the activations of `images`.

    images: uint8 [N, 3, 32, 32], of the train set. bits: of all points, or {point: its bits}. ranges: "max" takes the
    submission's step for the largest value seen; "mse" the one with the least squared error over all values, of that
    step and the three below it: a clipped outlier costs less than a coarse grid. The image needs no calibration at 8
    bits: its pixels are exactly code * 2^-6.
    """
    graph = read_graph(model)
    points = graph.activation_points
    bits = bits if isinstance(bits, dict) else dict.fromkeys(points, bits)
    largest = dict.fromkeys(points, 0.0)
    errors = {name: torch.zeros(4, dtype=torch.float64) for name in points}

    def watch(see):
        hooks = [model.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: see(name, out))
                 for name in points]
        for batch in images.split(50):
            model(cifar100.normalise(batch).contiguous(memory_format=torch.channels_last))
        for hook in hooks:
            hook.remove()

    def see_largest(name, out):
        largest[name] = max(largest[name], float(out.abs().max()))

    def see_errors(name, out):
        for i in range(4):
            step = steps[name] / 2 ** i
            error = codes(out, step, *code_range(bits[name], points[name])).mul_(step).sub_(out)
            errors[name][i] += float(error.square_().sum())

    model.eval()
    watch(see_largest)
    steps = {name: power_of_two_step(largest[name], bits[name], signed) for name, signed in points.items()}
    if ranges == "mse":
        watch(see_errors)
        steps = {name: step / 2 ** int(errors[name].argmin()) for name, step in steps.items()}
    steps |= {name: 1 / cifar100.STD for name in graph.images if bits[name] == 8}
    return [{"name": name, "bits": bits[name], "signed": signed, "step": steps[name]}
            for name, signed in points.items()]


# ---- What is stored -------------------------------------------------------------------------------

def check_quantizable(model: nn.Module) -> None:
    """Raise BadInput if a prepared network's values cannot all be put on grids.

    That is a network without an integer form, or with a parameter that its forward pass does not read: nothing says how
    that is stored.
    """
    graph = read_graph(model)
    check_integer_form(graph)
    used = {name for branch in graph.layers for name in (branch.name, branch.norm)}
    for name, _ in model.named_parameters():
        if name.rpartition(".")[0] not in used:
            raise BadInput(f"{name} is not used by the forward pass: take it out of the network, and its values out of "
                           "a trained checkpoint")


@torch.no_grad()
def shipped(model: nn.Module, network: nn.Module, scale_bits: int = FLOAT_BITS,
            shift_bits: int = SHIFT_BITS) -> tuple[nn.Module, list[dict]]:
    """Fill a plain network with the stored values of one that computes on its grids; return it and its tensors' claims.

    network: of the model's kind; its values are replaced. scale_bits, shift_bits: of its BatchNorms.
    """
    check_quantizable(network)
    network.load_state_dict(model.state_dict())
    network.eval()
    ours = {}
    for branch in read_graph(network).layers:
        layer = network.get_submodule(branch.name)
        norm = network.get_submodule(branch.norm) if branch.norm else None
        bias, scale = None, torch.ones(len(layer.weight), dtype=torch.float64)
        if branch.kind == "layer":
            source, bias = model.get_submodule(branch.name), layer.bias
            steps = source.rounded_step()
            code = codes(source.weight, steps, *code_range(source.bits))
            # a free step goes into the next BatchNorm; what is stored has the step 2^-(b-1), or the scheme's own
            step = 2.0 ** (1 - source.bits) if steps.dim() else float(steps)
            scale *= (steps / step).double().flatten()
            scale[code.flatten(1).count_nonzero(1) == 0] = 0  # nothing arrives: any scale would do, and zero says so
            if norm:  # a power of two, moved between scale and weights: nothing else changes
                factor = normal_factor(folded(norm)[0] * scale)
                step, scale = step / factor, scale * factor
            layer.weight.copy_(code * step + 0.0)  # a small negative value is -0.0: there is one code 0
            ours[f"{branch.name}.weight"] = {"bits": source.bits, "step": step}
        if norm:
            ours |= fold(norm, branch.norm, scale, bias, scale_bits, shift_bits)
        if bias is not None and norm:
            bias.zero_()  # it went into the shift
            ours[f"{branch.name}.bias"] = {"bits": 1, "step": 1.0}
        elif bias is not None:
            ours[f"{branch.name}.bias"] = store_fixed(bias)
    return network, [{"name": name} | ours[name] for name, _ in network.named_parameters()]


def normal_factor(scale: Tensor) -> float:
    """Return the least power of two, 1 for nearly all networks, that lifts scales into float16's normal numbers.

    Below 2^-14 float16 has fewer significant bits the smaller a number is. The largest scale stays below 2^15: where
    scales are further apart than float16's range, the smallest lose bits all the same.
    """
    scale = scale.abs()[scale != 0]
    if not len(scale) or scale.min() >= 2.0**-14:
        return 1.0
    needed, room = (int(torch.frexp(value)[1]) for value in (scale.min(), scale.max()))
    return 2.0 ** max(0, min(-13 - needed, 15 - room))


def fold(bn: nn.BatchNorm2d, name: str, step: Tensor, bias: Tensor | None, scale_bits: int,
         shift_bits: int) -> dict[str, dict]:
    """Fold a BatchNorm in place, with the steps that it absorbs and the bias before it; return {tensor: its format}."""
    scale, shift = folded(bn)
    shift = shift if bias is None else shift + scale * bias.double()
    scale = torch.where(step == 0, 0.0, scale * step)
    if scale_bits == FLOAT_BITS:
        largest = float(scale.abs().max())
        if largest > torch.finfo(torch.float16).max:
            raise BadInput(f"{name}: its folded scale {largest:.3g} does not fit 16 bits")
        bn.weight.copy_(scale.half())
        stored = {"bits": 16, "kind": "float16"}
    else:
        unit = scale_unit(scale, scale_bits)
        bn.weight.copy_(codes(scale, unit, *code_range(scale_bits)) * unit + 0.0)
        stored = {"bits": scale_bits, "step": float(unit)}
    bn.bias.copy_(shift)
    bn.running_mean.zero_()
    bn.running_var.fill_(1 - bn.eps)
    bn.num_batches_tracked.zero_()
    return {f"{name}.weight": stored, f"{name}.bias": store_fixed(bn.bias, shift_bits)}


def scale_unit(scale: Tensor, bits: int) -> Tensor:
    """Return the step, a power of two, on which signed fixed-point scales of this width are stored.

    None is clipped, and scales that are on their grid get the same step again.
    """
    return torch.ldexp(torch.ones_like(scale[0]), torch.frexp(scale.abs().max() / (2 ** (bits - 1) - 0.51))[1])


@torch.no_grad()
def short_step(step: Tensor, scale: Tensor, bits: int = FLOAT_BITS) -> Tensor:
    """Return steps, moved such that their products with the scales are short; float64. Where a scale is 0 they stay.

    A product has SIGNIFICANT_BITS bits, and its step is moved by 3% at most: codes times such scales need few bits, so
    that float32 holds them exactly. At fewer than 16 bits it is also a multiple of the unit of all, and not 0; there a
    step may become much larger, but at most 3% smaller, which would clip weights.
    """
    step, scale = step.double(), scale.double()
    significand, exponent = torch.frexp(scale * step)
    short = torch.ldexp((significand * 2**SIGNIFICANT_BITS).round(), exponent - SIGNIFICANT_BITS)
    if bits < FLOAT_BITS:
        unit = scale_unit((scale * step).flatten(), bits)
        most = 2 ** (bits - 1) - 2 ** max(0, bits - 1 - SIGNIFICANT_BITS)
        short = (0.97 * short.abs() / unit).ceil().maximum((short.abs() / unit).round()).clamp(1, most)
        short = short * unit * scale.sign()
    return torch.where(scale == 0, step, short / scale)


@torch.no_grad()
def shorten_scales(model: nn.Module, bits: int = FLOAT_BITS) -> None:
    """Change every channel's step so that its product with the BatchNorm's scale has few bits, in place.

    Weights are rounded to the changed step, so this adds no rounding error of its own.
    """
    for branch in read_graph(model).layers:
        if branch.kind == "layer" and branch.norm:
            conv, (scale, _) = model.get_submodule(branch.name), folded(model.get_submodule(branch.norm))
            conv.step = short_step(conv.step, scale.view_as(conv.step), bits).float()


@torch.no_grad()
def drop_negligible(network: nn.Module, tensors: list[dict], activations: list[dict]) -> None:
    """Set to zero, in place, the scales of channels whose shift is too large for a 32-bit accumulator.

    An accumulator of 32 bits that begins with the shift, as 8-bit engines have it, must hold shift and sum in units of
    scale x weight step x input step. If it cannot, a sum up to 2^24 is a hundredth of the shift at most. Such channels,
    as strong weight decay leaves them, become constants.
    """
    steps = {entry["name"]: entry["step"] for entry in tensors + activations if "step" in entry}
    for branch in read_graph(network).layers:
        if branch.kind == "layer" and branch.norm:
            norm = network.get_submodule(branch.norm)
            units = norm.weight.double().abs() * steps[f"{branch.name}.weight"] * steps[branch.source]
            norm.weight[norm.bias.double().abs() >= MOST_UNITS * units] = 0


@torch.no_grad()
def round_shifts(network: nn.Module, tensors: list[dict], activations: list[dict]) -> None:
    """Round the shifts of a shipped network to whole units of their accumulators, in place.

    Those are the shifts of its BatchNorms, and the biases of layers without one, except the logits'.

    A unit is scale x weight step x input step. A shift stays a code of its width, so it becomes a multiple of the odd
    part of the unit and of both powers of two. Engines add a bias to the accumulator, as an integer.
    """
    steps = {entry["name"]: Fraction(entry["step"]) for entry in tensors + activations if "step" in entry}
    bits, graph = {entry["name"]: entry["bits"] for entry in tensors}, read_graph(network)
    for branch in graph.layers:
        name = branch.norm or branch.name
        owner = network.get_submodule(name)
        if owner.bias is None or not branch.norm and branch in graph.points[-1].branches:
            continue
        step = steps[f"{name}.bias"]
        largest = step * code_range(bits[f"{name}.bias"])[1]
        unit = steps[branch.source] * (steps[f"{branch.name}.weight"] if branch.kind == "layer" else 1)
        scales = owner.weight.tolist() if branch.norm else [1] * len(owner.bias)
        for channel, (scale, shift) in enumerate(zip(scales, owner.bias.tolist())):
            if scale == 0:
                continue  # nothing is accumulated
            scaled = abs(Fraction(scale)) * unit
            odd = scaled.numerator // (scaled.numerator & -scaled.numerator)
            grain = odd * max(scaled / odd, step)  # the least number that is whole in both
            limit = largest // grain
            owner.bias[channel] = float(max(-limit, min(limit, round(Fraction(shift) / grain))) * grain)


def store_fixed(tensor: Tensor, bits: int = SHIFT_BITS) -> dict:
    """Round a vector in place to codes times one power of two: what is added needs absolute precision."""
    step = power_of_two_step(float(tensor.abs().max()), bits)
    tensor.copy_(codes(tensor.double(), step, *code_range(bits)) * step + 0.0)
    return {"bits": bits, "step": step}
