"""Represent numbers as integer codes times a step size, and find the formats in which a network's values can be stored.
"""
import itertools
import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from compressed.errors import BadInput
from compressed.graph import read_graph, weight_layers

WORD = 32  # bits of a number for which no narrower format is known


# ---- Codes and steps -----------------------------------------------------------------------------

def power_of_two_step(largest: float, bits: int, signed: bool = True) -> float:
    """Return the submission's step, 2^-(b - 1 - ceil(log2 max|x|)); half of it for unsigned values; 1 if all are 0."""
    if largest == 0:
        return 1.0
    return 2.0 ** (math.ceil(math.log2(largest)) - bits + signed)


def listed(widths) -> str:
    """Return the different ones of some widths, as in "6/8"."""
    return "/".join(map(str, sorted(set(widths))))


def code_range(bits: int, signed: bool = True) -> tuple[int, int]:
    """Return the smallest and the largest code: -2^(b-1) and 2^(b-1) - 1, or 0 and 2^b - 1."""
    return (-2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2 ** bits - 1)


def codes(x: Tensor, step, low: int, high: int) -> Tensor:
    """Return the codes of x as floats: x / step, rounded (halves to even, as IEEE 754 and QuantizeLinear) and clipped.

    The submission's floor(x / step + 1/2) rounds halves up; trained float weights hardly ever lie on one.

    >>> codes(torch.tensor([0.25, 0.75, -9.0]), 0.5, -8, 7)
    tensor([ 0.,  2., -8.])
    """
    return (x / step).round_().clamp_(low, high)


class Rounded(torch.autograd.Function):
    """Round x to its grid. step: a number, or a tensor that broadcasts against x.

    The gradient of x passes where x lies within half a step of the range (straight through: Bengio et al. 2013); that
    of the step is the rounding error of the values inside the range, and the clipped code of those outside, in units of
    the step (Esser et al., "Learned Step Size Quantization", ICLR 2020).
    """

    @staticmethod
    def forward(ctx, x, step, low, high):
        scaled = x / step
        code = scaled.round().clamp_(low, high)
        ctx.save_for_backward(scaled, code)
        ctx.range, ctx.shape = (low - 0.5, high + 0.5), getattr(step, "shape", ())
        return code * step

    @staticmethod
    def backward(ctx, gradient):
        scaled, code = ctx.saved_tensors
        inside = (scaled >= ctx.range[0]) & (scaled <= ctx.range[1])
        of_step = None
        if ctx.needs_input_grad[1]:
            of_step = (gradient * (code - scaled * inside)).sum_to_size(ctx.shape)
        return gradient * inside, of_step, None, None


def fake_quantize(x: Tensor, step, low: int, high: int) -> Tensor:
    """Return x quantized, as a float: its code times the step. Rounded says what the gradients are."""
    return Rounded.apply(x, step, low, high)


SMALLEST, LARGEST = 2.0**-128, 2**127  # of all steps: a packed file holds their exponents in a byte


def is_step(step) -> bool:
    """Return True for a number, an int or a float, that can be a step."""
    return type(step) in (int, float) and SMALLEST <= step <= LARGEST


def exponent(step) -> int | None:
    """Return e, from -128 to 127, for a step 2^e; None for any other value of any type."""
    fraction, e = math.frexp(step) if is_step(step) else (0, 0)
    return e - 1 if fraction == 0.5 else None


def stored_exponent(step, name: str) -> int:
    """Return the exponent e of a step 2^e, from -128 to 127. Raises BadInput for any other step."""
    e = exponent(step)
    if e is None:
        raise BadInput(f"{name} has the step {step}, expected a power of two from 2^-128 to 2^127")
    return e


def signed_bits(low: int, high: int) -> int:
    """Return the bits of a two's-complement number that can hold every integer from `low` to `high`; at least 1."""
    return max(max(high, 0).bit_length(), max(~low, 0).bit_length()) + 1  # ~low = -low - 1: one more code below 0


# ---- Formats, found by looking at values ----------------------------------------------------------

INTEGER_BITS = 16  # beyond this, values on a grid with a power-of-two step are floating-point numbers like any other
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
EVEN_BITS = 8  # beyond this, float32 values fit a step that is no power of two by chance
EVEN_TOLERANCE = 2.0**-22  # relative: the rounding errors of two float32 numbers, 2^-24 each, and some margin


# kind of a BatchNorm's weight and bias while its statistics, too, decide scale and shift: its own values then say
# nothing of their bits
NOT_FOLDED = "float32, statistics not folded in"


@dataclass(frozen=True)
class Grid:
    """Describe how a tensor is stored: `bits` per value, as integer codes times a step, or as floating point.

    steps: one for the tensor, one for each output channel (row), or none for floating point and what-ifs.
    kind: "power of two", "even", "per channel", "zero", "float16", "bfloat16", "float32", "claimed", "what if", or
        NOT_FOLDED.
    """
    bits: int
    steps: tuple[float, ...] = ()
    kind: str = "float32"

    def steps_of(self, values: Tensor) -> Tensor:
        """Return the steps, float64, in a shape that broadcasts against the values. The grid must have steps."""
        return torch.tensor(self.steps, dtype=torch.float64).reshape(-1, *[1] * (values.dim() - 1))

    def codes(self, values: Tensor) -> Tensor:
        """Return the integer codes of the values (int64, same shape). The grid must have steps."""
        return (values.detach().double() / self.steps_of(values)).round().long()


def lowest_bits(values: Tensor) -> Tensor:
    """Return e of the lowest bit 2^e that is set in each value (float64, none zero)."""
    fraction, exponent = torch.frexp(values)
    significand = (fraction * 2.0**53).long()  # exact: a float64 has 53 bits
    return exponent - 54 + torch.frexp((significand & -significand).double())[1]


def _power_of_two(values: Tensor) -> Grid | None:
    """Return the coarsest grid with a power-of-two step that holds the values (float64, none zero) exactly, or None."""
    finest = int(lowest_bits(values).min())
    if int(torch.frexp(values)[1].max()) - finest > INTEGER_BITS:
        return None
    codes = values * 2.0**-finest
    bits = signed_bits(int(codes.min()), int(codes.max()))
    return Grid(bits, (2.0**finest,), "power of two") if bits <= INTEGER_BITS else None


def _even(values: Tensor) -> Grid | None:
    """Return the coarsest grid of at most 8 bits, with any step, that holds the values (float64, none zero), or None.

    A tensor need not use its extreme codes, so every code is tried for the largest magnitude.
    """
    def fits(scaled):
        return ((scaled - scaled.round()).abs() <= scaled.abs() * EVEN_TOLERANCE).all(-1)

    top, tops = values.abs().max(), torch.arange(1, 2**(EVEN_BITS - 1) + 1)
    few = values[::len(values) // 64 + 1]  # a few values rule out most wrong steps
    for code in tops[fits(few * (tops / top)[:, None])].tolist():
        scaled = values * (code / top)
        if fits(scaled):
            bits = signed_bits(round(scaled.min().item()), round(scaled.max().item()))
            return Grid(bits, ((top / code).item(),), "even") if bits <= EVEN_BITS else None
    return None


def _one_step(values: Tensor) -> Grid | None:
    """Return the grid with one step that holds all values, or None."""
    values = values[values != 0].double()
    return (_power_of_two(values) or _even(values)) if len(values) else Grid(1, (1.0,), "zero")


def _per_channel(rows: Tensor) -> Grid | None:
    """Return a grid with one step per row, as wide as the widest row needs; None if a row fits no grid."""
    grids = list(itertools.takewhile(bool, map(_one_step, rows)))  # up to the first that fits none
    if len(grids) < len(rows):
        return None
    return Grid(max(grid.bits for grid in grids), tuple(grid.steps[0] for grid in grids), "per channel")


def found_grid(tensor: Tensor) -> Grid:
    """Return the narrowest format in which the tensor's values can be stored, found from the values only.

    Tried in this order: signed integer codes (-2^(b-1) to 2^(b-1) - 1) times one power-of-two step for the tensor,
    exactly, up to 16 bits; times any one step, up to float32 rounding, up to 8 bits; times a step for each row (tensors
    of two or more dimensions); float16; bfloat16; float32. A tensor of zeros alone counts 1 bit. A channel's step is
    stored, so `storage` counts it. Raises BadInput if a value is not finite.
    """
    values = tensor.detach()
    if not values.isfinite().all():
        raise BadInput("a tensor holds values that are not finite")
    grid = _one_step(values.flatten()) or (_per_channel(values.flatten(1)) if tensor.dim() > 1 else None)
    return grid or next((Grid(16, kind=kind) for kind in HALVES if is_half(values, kind)), Grid(WORD))


def is_half(values: Tensor, kind: str) -> bool:
    """Return True if every value is exactly representable in this 16-bit type, "float16" or "bfloat16"."""
    return bool((values.to(HALVES[kind]).to(values.dtype) == values).all())


@dataclass(frozen=True)
class Activation:
    """Describe the integers that pass between two layers: `bits` and sign. 32 bits also means float32."""
    bits: int = WORD
    signed: bool = True

    @property
    def low(self) -> int:
        return code_range(self.bits, self.signed)[0]

    @property
    def high(self) -> int:
        return code_range(self.bits, self.signed)[1]


@dataclass(frozen=True)
class Formats:
    """Hold the formats of a network: a Grid for each parameter, an Activation for each activation point.

    A point that is not in `activations` has `activation_bits` bits; whether it is signed, the caller says.
    """
    tensors: dict[str, Grid]
    activations: dict[str, Activation] = field(default_factory=dict)
    activation_bits: int = WORD

    def activation(self, name: str, signed: bool) -> Activation:
        """Return the format of an activation point; `signed` counts for points that are not listed."""
        return self.activations.get(name, Activation(self.activation_bits, signed))


def folded(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return (scale, shift) of a BatchNorm in eval mode, float64 [C]: gamma / sqrt(var + eps), beta - mean x scale."""
    scale = bn.weight.detach().double() / (bn.running_var.double() + bn.eps).sqrt()
    return scale, bn.bias.detach().double() - bn.running_mean.double() * scale


def is_folded(norm: nn.BatchNorm2d) -> bool:
    """Return True if the BatchNorm's weight and bias are, in float32, the scale and shift by which it computes."""
    return all(torch.equal(found.float(), stored) for found, stored in zip(folded(norm), (norm.weight, norm.bias)))


def found_formats(model: nn.Module) -> Formats:
    """Return the formats found from the values of every parameter.

    A BatchNorm whose statistics are not folded in yet counts as float32, because folding turns its
    weight and bias into float32, whatever they were. Raises BadInput, naming the tensor, if a value is not finite.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        loose = isinstance(module, nn.BatchNorm2d) and not is_folded(module)
        try:
            tensors[name] = Grid(WORD, kind=NOT_FOLDED) if loose else found_grid(parameter)
        except BadInput as error:
            raise BadInput(f"{name}: {error}") from error
    return Formats(tensors)


def what_if(formats: Formats, model: nn.Module, weight_bits: int | None, activation_bits: int | None) -> Formats:
    """Return `formats` with other bit widths for all weights of convolutions and linear layers, or all activations.

    BatchNorm and biases keep theirs, and the image has the 8 bits that hold its pixels exactly. The codes are unknown
    then, so "fixed" accumulators assume the extreme codes.
    """
    if weight_bits is not None:
        weights = {f"{name}.weight": Grid(weight_bits, kind="what if") for name, _ in weight_layers(model)}
        formats = replace(formats, tensors=formats.tensors | weights)
    if activation_bits is not None:
        images = dict.fromkeys(read_graph(model).images, Activation(8))
        formats = replace(formats, activations=images, activation_bits=activation_bits)
    return formats


def float_formats(model: nn.Module) -> Formats:
    """Return formats in which every number is float32: the baseline, and the start of what-ifs without a checkpoint."""
    return Formats({name: Grid(WORD) for name, _ in model.named_parameters()})
