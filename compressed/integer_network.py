"""A shipped network in exact integer arithmetic: no float from the uint8 image to the integer logits.

Every stored number is an integer times a power of two (see quantize.py), and so is every value that is computed from
them. The powers are known before the first image, so integers and shifts are enough. For each activation point:

  sum   = sum of weight code x activation code                int32; positions of the padding have the code 0
  value = sum over its terms of sum x multiplier + addend     int32, or int64 if scales with many bits need it
  code  = value >> shift, rounded half to even and clipped    8 bits; a lower clip at 0 is the ReLU

The terms of a value are the branches of its point: a layer with its BatchNorm, and for a residual sum the block's
input. What a network stores for this:

  weight codes                signed, at most 8 bits
  multiplier of a channel     11 bits and a sign, shifted to the left: the float16 scale of a folded BatchNorm
  addend of a channel         16 bits, signed, shifted to the left: a BatchNorm's shift, or a linear layer's bias
  steps                       one power of two for each tensor and activation point; all shifts follow from them

The mean of 16 values is their sum with 4 more in the shift. A pointwise function of codes, such as hard swish, is a
table of at most 256 codes. A product, as in squeeze-excitation, is a product of codes. The logits are values that are
not rounded, all with the same power of two. No order of summation can overflow: the range of every sum follows from
the stored codes, and is checked when the network is built.

tools/integer.py executes the network, and tools/export_onnx.py writes it as an ONNX model.
"""
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressed import cifar100, graph
from compressed.claims import stated_formats
from compressed.counting import sum_bounds
from compressed.errors import BadInput
from compressed.exact_network import RELU6, table
from compressed.formats import Activation, is_folded, lowest_bits, stored_exponent
from compressed.graph import Window

# ---- Sums of products of codes -------------------------------------------------------------------
# Codes are uint8 (unsigned) or int8 (signed), [N, H, W, channels] or [N, channels]; sums are int32.

@functools.cache
def fast_products() -> bool:
    """Return True if torch has a product of int8 matrices for the CPU, and if it is exact on this one.

    x86 CPUs without VNNI add products in pairs in 16 bits, which saturate with extreme codes.
    """
    extreme = torch.tensor([-128, 127, -128, -128], dtype=torch.int8).repeat(64, 16)
    try:
        return torch.equal(torch._int_mm(extreme, extreme.T), extreme.int() @ extreme.int().T)
    except (AttributeError, RuntimeError):
        return False


def products(codes: Tensor, weight: Tensor) -> Tensor:
    """Return codes [..., K] times weight codes (int8 [K, out]), int32 [..., out].

    The fast product takes signed codes only: 128 is subtracted from unsigned ones, and added back as 128 x the sums of
    the weights.
    """
    rows = codes.flatten(0, -2)
    if not fast_products():
        sums = rows.int() @ weight.int()
    elif codes.dtype == torch.uint8:
        sums = torch._int_mm((rows ^ 128).view(torch.int8), weight).add_(weight.sum(0, dtype=torch.int32) * 128)
    else:
        sums = torch._int_mm(rows, weight)
    return sums.unflatten(0, codes.shape[:-1])


def windows(codes: Tensor, window: Window, fill: int = 0) -> list[Tensor]:
    """Return the codes at each position of a window, row by row, each [N, H', W', C]; `fill` outside the map.

    codes: [N, H, W, C], or [N, C] of a map of 1x1.
    """
    codes = codes[:, None, None] if codes.dim() == 2 else codes
    codes = F.pad(codes, (0, 0, *[window.padding[1]] * 2, *[window.padding[0]] * 2), value=fill or None)
    rows, columns = ([slice(k * d, k * d + n - d * (kernel - 1), s) for k in range(kernel)]
                     for n, kernel, s, d in zip(codes.shape[1:3], window.kernel, window.stride, window.dilation))
    return [codes[:, y, x] for y in rows for x in columns]


def convolution(codes: Tensor, weight: Tensor, window: Window) -> Tensor:
    """Return the sums of a convolution. weight: int8 [groups, positions x inputs of a group, outputs of a group]."""
    parts = [part.chunk(len(weight), -1) for part in windows(codes, window)]
    return torch.cat([products(torch.cat(group, -1), one) for group, one in zip(zip(*parts), weight)], -1)


def depthwise(codes: Tensor, weight: Tensor, window: Window) -> Tensor:
    """Return the sums of a depthwise convolution. weight: int32 [positions, C]."""
    first, *others = windows(codes.int(), window)
    sums = first * weight[0]
    for part, row in zip(others, weight[1:]):
        sums.addcmul_(part, row)
    return sums


def layer_sums(layer: nn.Module, weight: Tensor, window: Window | None) -> Callable[[Tensor], Tensor]:
    """Return the function from a layer's input codes to its sums. weight: its codes, int64, in the layer's shape."""
    if isinstance(layer, nn.Linear):
        return functools.partial(products, weight=weight.to(torch.int8).T)
    if layer.groups == layer.in_channels == layer.out_channels:
        return functools.partial(depthwise, weight=weight.flatten(1).T.int().contiguous(), window=window)
    rows = weight.permute(0, 2, 3, 1).flatten(1)  # [outputs, positions x inputs of a group]
    rows = rows.unflatten(0, (layer.groups, -1)).transpose(1, 2)
    return functools.partial(convolution, weight=rows.to(torch.int8), window=window)


# ---- Values and their codes ----------------------------------------------------------------------

@dataclass(eq=False)
class Term:
    """One term of a value: sums(codes of its branch's sources) x scale + shift, in each channel.

    reach: (lowest, highest) sum of each channel. scale, shift: float64 [C], which holds them exactly. codes: of a
    layer's weight, int64 in its shape. Value sets multiplier and addend, the integers that stand for scale and shift.
    """
    branch: graph.Branch
    sums: Callable[..., Tensor]
    reach: list[tuple[int, int]]
    scale: Tensor
    shift: Tensor
    codes: Tensor | None = None
    multiplier: Tensor | None = None  # set by its Value, as is the addend: whole numbers, in units of that
    addend: Tensor | None = None


class Value:
    """The value of an activation point: the sum of its terms. It is rounded to codes unless it has no step (logits).

    Each channel has a unit of its own, 2^exponent: the lowest bit of all that is added in it. bits: enough for each
    value and its terms. Raises BadInput if a value could overflow 64 bits, or a sum of products 32.
    """

    def __init__(self, point: graph.Point, terms: list[Term], step: float = 0.0, low: int = 0, high: int = 0):
        self.point, self.terms, self.low, self.high = point, terms, low, high
        self.layout = (*point.shape[1:], point.shape[0])  # channels last
        self.dtype = torch.int8 if low < 0 else torch.uint8
        parts = torch.stack([torch.full_like(terms[0].scale, step / 2)]
                            + [part for term in terms for part in (term.scale, term.shift)])
        lowest = lowest_bits(parts.where(parts != 0, 2.0**1000)).amin(0)  # a zero has no bits
        self.exponents = lowest.where(parts.any(0), 0).tolist()
        if not step:
            self.exponents = [min(self.exponents)] * len(self.exponents)  # logits are compared with each other
        units = 2.0**torch.tensor(self.exponents, dtype=torch.float64)
        half, *integers = [list(map(int, part)) for part in (parts / units).tolist()]
        largest, pairs = half, list(zip(integers[::2], integers[1::2]))
        for term, pair in zip(terms, pairs):
            bounds = [max(-low, high, 1) for low, high in term.reach]
            if max(bounds) >= 2**31:
                raise BadInput(f"{term.branch.name}: sums of products up to {max(bounds):,} may overflow the 32-bit "
                               "accumulator")
            largest = [most + bound * abs(a) + abs(b) for most, bound, a, b in zip(largest, bounds, *pair)]
        self.bits = max(largest).bit_length() + 1
        if self.bits > 64:
            raise BadInput(f"{point.name}: its aligned sums may need {self.bits} bits, more than 64")
        wide = torch.int32 if self.bits <= 32 else torch.int64
        for term, pair in zip(terms, pairs):
            term.multiplier, term.addend = torch.tensor(pair, dtype=wide)
        self.half = torch.tensor(half, dtype=wide)
        self.shift = torch.tensor([x.bit_length() for x in half], dtype=wide)

    def total(self, codes: dict[str, Tensor], watch=None) -> Tensor:
        """Return the value, int32 or int64, in units of 2^exponent of each channel."""
        def product(term):
            sums = term.sums(*(codes[source] for source in term.branch.sources))
            if watch is not None:
                watch(term.branch.name, sums)
            return sums.to(self.half.dtype).mul_(term.multiplier).add_(term.addend).reshape(-1, *self.layout)
        return functools.reduce(Tensor.add_, map(product, self.terms))

    def round(self, value: Tensor) -> Tensor:
        """Return the codes of a value, uint8 or int8; the value is overwritten.

        Half a step is added where the quotient is odd, and half a step less the lowest bit where it is even. This makes
        a difference for halves only, which thereby go to the even code.
        """
        odd = (value >> self.shift).bitwise_and_(1)
        value = value.add_(odd).add_(self.half - 1).bitwise_right_shift_(self.shift)
        return value.clamp_(self.low, self.high).to(self.dtype)


# ---- The integer network -------------------------------------------------------------------------

class IntegerNetwork:
    """A network that maps images (uint8 [N, 3, 32, 32]) to logits (integers [N, classes], units of 2^logit_exponent).

    The stored values of a shipped model are read as integers, by the formats in its claim. values: those that are
    rounded, in the order of computation. logits: the last one, which is not. Raises BadInput if model and claim do not
    fit each other, if a step is no power of two, or if a weight or activation has more than 8 bits.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, claim: dict):
        self.model, self.formats = model, stated_formats(model, claim)
        for name, activation in self.formats.activations.items():
            if activation.bits > 8:
                raise BadInput(f"activation {name} has {activation.bits} bits: expected at most 8")
        self.steps = {entry["name"]: 2.0**stored_exponent(entry.get("step"), f"activation {entry['name']}")
                      for entry in claim["activations"]}
        *self.values, self.logits = map(self._value, graph.read_graph(model).points)
        self.logit_exponent = self.logits.exponents[0]

    def _value(self, point: graph.Point) -> Value:
        terms = [self._layer(each) if each.kind == "layer" else self._term(each, point) for each in point.branches]
        if point.name not in self.steps:
            return Value(point, terms)
        step, activation = self.steps[point.name], self.formats.activations[point.name]
        high = min(activation.high, round(RELU6 / step)) if point.activation == "relu6" else activation.high
        return Value(point, terms, step, activation.low, high)

    def _layer(self, branch: graph.Branch) -> Term:
        """Return the term of a convolution or linear layer, with the BatchNorm that is folded into it."""
        module, name = self.model.get_submodule(branch.name), f"{branch.name}.weight"
        grid, source = self.formats.tensors[name], self.formats.activations[branch.source]
        if grid.bits > 8 or len(grid.steps) != 1:
            raise BadInput(f"{name} has {grid.bits} bits and {len(grid.steps)} steps: expected at most 8, and one")
        codes, step = grid.codes(module.weight), 2.0**stored_exponent(grid.steps[0], name) * self.steps[branch.source]
        scale, shift = torch.ones(len(codes), dtype=torch.float64), torch.zeros(len(codes), dtype=torch.float64)
        if branch.norm:
            scale, shift = self._folded(branch.norm)
        if module.bias is not None:
            shift = shift + scale * module.bias
        sums = layer_sums(module, codes, branch.window)
        return Term(branch, sums, sum_bounds(codes, source), scale * step, shift, codes)

    def _folded(self, norm: str) -> tuple[Tensor, Tensor]:
        """Return the scale and the shift of a BatchNorm, float64 [C]."""
        bn = self.model.get_submodule(norm)
        if not is_folded(bn):
            raise BadInput(f"{norm}: its statistics are not folded into scale and shift")
        return bn.weight.double(), bn.bias.double()

    def _term(self, branch: graph.Branch, point: graph.Point) -> Term:
        """Return the term of a branch that is no layer; all its channels have the same range of sums."""
        kind, sums, shift = branch.kind, lambda codes: codes, 0.0  # of "unchanged"
        source, scale = self.formats.activations.get(branch.source), self.steps.get(branch.source)
        if kind == "pixels":
            source, scale, shift = Activation(8, signed=False), 1 / cifar100.STD, -cifar100.MEAN / cifar100.STD
        low, high = source.low, source.high
        if kind == "norm":
            of_codes, shift = self._folded(branch.norm)
            scale = of_codes * scale
        elif kind == "mean":
            def sums(codes):
                return sum(windows(codes.int(), branch.window))
            low, high, scale = branch.terms * low, branch.terms * high, scale / branch.terms
        elif kind == "max":
            def sums(codes):
                return functools.reduce(torch.maximum, windows(codes, branch.window, source.low))
        elif kind == "product":
            def sums(codes, factor):  # of one factor for each element, or one for each channel; maps of 1x1 may be flat
                channels = [1] * (codes.dim() - 2) + [codes.shape[-1]]
                return codes.int() * factor.reshape(len(factor), *(
                    channels if factor[0].numel() == codes.shape[-1] else codes.shape[1:]))
            other = self.formats.activations[branch.other]
            ends = [a * b for a in (low, high) for b in (other.low, other.high)]
            low, high, scale = min(ends), max(ends), scale * self.steps[branch.other]
        elif kind == "moved":
            def sums(codes):  # the index counts channels first
                return F.pad(codes.movedim(-1, 1).flatten(1), (1, 0))[:, branch.index].movedim(1, -1)
        elif kind == "function":
            entries = table(branch.function, source, scale, self.formats.activations[point.name],
                            self.steps[point.name])

            def sums(codes):
                return entries[codes.int() - source.low]
            low, high, scale = int(entries.min()), int(entries.max()), self.steps[point.name]
        scale, shift = (torch.as_tensor(x, dtype=torch.float64).expand(point.shape[0]) for x in (scale, shift))
        return Term(branch, sums, [(low, high)] * point.shape[0], scale, shift)

    @torch.inference_mode()
    def __call__(self, images: Tensor, watch: Callable[[str, Tensor], None] | None = None) -> Tensor:
        """Return the logits of images. watch(name, sums) is called for every branch."""
        return self.logits.total(self.codes(images, watch), watch)

    @torch.inference_mode()
    def codes(self, images: Tensor, watch=None) -> dict[str, Tensor]:
        """Return the pixels and the codes at every activation point, {name: uint8 or int8 [N, H, W, C] or [N, C]}."""
        if images.dtype != torch.uint8:
            raise BadInput(f"images of {images.dtype}: expected uint8, not normalised")
        codes = {"pixels": images.permute(0, 2, 3, 1).contiguous()}
        for value in self.values:
            codes[value.point.name] = value.round(value.total(codes, watch))
        return codes
