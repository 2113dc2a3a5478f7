"""Execute a shipped network in exact integer arithmetic: no float from the uint8 image to the integer logits.

    python -m tools.integer                   the shipped checkpoint: accuracy, comparison with exact_network,
                                              accumulators
    python -m tools.integer --checkpoint F    another checkpoint: a .pt with its claim, or an .mnet

Every stored number is an integer times a power of two (see quantize.py), and so is every value that is computed from
stored numbers. The powers are known before the first image, so integers and shifts are enough. For each activation
point:

  acc   = sum of weight code x activation code                int32; positions of the padding have the code 0
  value = sum over branches of acc x multiplier + addend      int32, or int64 if scales with many bits need it
  code  = value >> shift, rounded half to even and clipped    8 bits; a lower clip at 0 is the ReLU

The branches of a point are the terms that are added there: a layer with its BatchNorm, and for a residual sum the
block's input. What a network stores for this:

  weight codes                signed, at most 8 bits
  multiplier of a channel     11 bits and a sign, shifted to the left: the float16 scale of a folded BatchNorm
  addend of a channel         16 bits, signed, shifted to the left: a BatchNorm's shift, or a linear layer's bias
  steps                       one power of two for each tensor and activation point; all shifts follow from them

The mean of 16 values is their sum with 4 more in the shift. A pointwise function of codes, such as hard swish, is a
table of at most 256 codes. A product, as in squeeze-excitation, is a product of codes. The logits are values that are
not rounded, all with the same power of two.

No order of summation can overflow: the range of every sum follows from the stored codes, and is checked when the
network is built. exact_network computes the same integers in floats that are wide enough to hold them. This script
compares the logits of both, which must be the same to the last bit.
"""
import functools
import sys
import threading
import time
from collections.abc import Callable
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressed import checkpoints, cifar100, claims, counting, datasets, graph, threads
from compressed.command_line import run_script
from compressed.errors import BadInput
from compressed.evaluation import answers, logits
from compressed.exact_network import RELU6, exact_network, table
from compressed.files import to_json
from compressed.formats import is_folded, signed_bits
from compressed.graph import Window
from compressed.mnet import stated_formats, stored_exponent
from tools.agreement import agreement, describe, option_parser

BATCH = 8  # images: their feature maps fit into a CPU's cache


# ---- Accumulators: functions of codes ------------------------------------------------------------
# Codes are uint8 (unsigned) or int8 (signed), [N, H, W, channels] or [N, channels]; accumulators are int32.

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
        acc = rows.int() @ weight.int()
    elif codes.dtype == torch.uint8:
        acc = torch._int_mm((rows ^ 128).view(torch.int8), weight).add_(weight.sum(0, dtype=torch.int32) * 128)
    else:
        acc = torch._int_mm(rows, weight)
    return acc.unflatten(0, codes.shape[:-1])


def windows(codes: Tensor, window: Window, fill: int = 0) -> list[Tensor]:
    """Return the codes at each position of a window, row by row, each [N, H', W', C]; `fill` outside the map."""
    codes = F.pad(codes, (0, 0, *[window.padding[1]] * 2, *[window.padding[0]] * 2), value=fill or None)
    rows, columns = ([slice(k * d, k * d + n - d * (kernel - 1), s) for k in range(kernel)]
                     for n, kernel, s, d in zip(codes.shape[1:3], window.kernel, window.stride, window.dilation))
    return [codes[:, y, x] for y in rows for x in columns]


def convolution(codes: Tensor, weight: Tensor, window: Window) -> Tensor:
    """Return the sums of a convolution. weight: int8 [groups, positions x inputs of a group, outputs of a group]."""
    parts = windows(codes, window)
    size = codes.shape[-1] // len(weight)
    return torch.cat([products(torch.cat([part[..., g * size:(g + 1) * size] for part in parts], -1), one)
                      for g, one in enumerate(weight)], -1)


def depthwise(codes: Tensor, weight: Tensor, window: Window) -> Tensor:
    """Return the sums of a depthwise convolution. weight: int32 [positions, C]."""
    parts = windows(codes.int(), window)
    acc = parts[0] * weight[0]
    for part, row in zip(parts[1:], weight[1:]):
        acc.addcmul_(part, row)
    return acc


def layer_sums(layer: nn.Module, weight: Tensor, window: Window | None) -> Callable[[Tensor], Tensor]:
    """Return the function from a layer's input codes to its sums. weight: its codes, int64, in the layer's shape."""
    if window in (None, Window((1, 1))) and getattr(layer, "groups", 1) == 1:
        return functools.partial(products, weight=weight.flatten(1).to(torch.int8).T)
    if layer.groups == layer.in_channels == layer.out_channels:
        return functools.partial(depthwise, weight=weight.flatten(1).T.int().contiguous(), window=window)
    rows = weight.permute(0, 2, 3, 1).flatten(1)  # [outputs, positions x inputs of a group]
    rows = rows.view(layer.groups, -1, rows.shape[1]).transpose(1, 2)
    return functools.partial(convolution, weight=rows.to(torch.int8), window=window)


# ---- Values and codes of a point -----------------------------------------------------------------

def lowest_bit(x: Fraction) -> int:
    """Return e of the lowest bit 2^e that is set in x, which is an integer times a power of two and not 0."""
    return (x.numerator & -x.numerator).bit_length() - x.denominator.bit_length()


class Branch:
    """One term of a point's value (see graph.Branch): sums(codes of its sources) x multiplier + addend, by channel.

    reach: (lowest, highest) accumulator of each channel. scale, shift: the exact real numbers of each channel for which
    multiplier and addend stand; `align` sets those to scale / 2^e and shift / 2^e. Raises BadInput if the accumulator
    could overflow 32 bits.
    """

    def __init__(self, of: graph.Branch, sums: Callable[..., Tensor], reach: list[tuple[int, int]],
                 scale: list[Fraction], shift: list[Fraction]):
        self.name, self.kind, self.source, self.sources = of.name, of.kind, of.source, of.sources
        self.sums, self.reach, self.scale, self.shift = sums, reach, scale, shift
        worst = max(max(-low, high) for low, high in reach)
        if worst >= 2**31:
            raise BadInput(f"{of.name}: sums of products up to {worst:,} may overflow the 32-bit accumulator")

    def align(self, exponents: list[int]) -> list[int]:
        """Set multiplier and addend (int64 [C]) for these exponents e of the channels; return each channel's largest
        magnitude, before or after the addition."""
        unit = [Fraction(2) ** -e for e in exponents]
        multiplier = [int(a * u) for a, u in zip(self.scale, unit)]
        addend = [int(b * u) for b, u in zip(self.shift, unit)]
        largest = [max(max(-low, high, 1) * abs(a) + abs(b), abs(b))
                   for (low, high), a, b in zip(self.reach, multiplier, addend)]
        if max(largest) < 2**63:
            self.multiplier, self.addend = torch.tensor(multiplier), torch.tensor(addend)
        return largest

    def value(self, codes: dict[str, Tensor], watch=None) -> Tensor:
        acc = self.sums(*(codes[source] for source in self.sources))
        if watch is not None:
            watch(self.name, acc)
        return acc.to(self.multiplier.dtype).mul_(self.multiplier).add_(self.addend)


class Point:
    """An activation point: the sum of its branches, rounded to codes; without a step it is the logits, not rounded.

    The value of each channel has a power of two of its own, 2^exponent: the lowest bit of all that is added in it.
    Raises BadInput if the value could overflow 64 bits.
    """

    def __init__(self, of: graph.Point, branches: list[Branch], step: Fraction | None = None, low: int = 0,
                 high: int = 0):
        self.name, self.branches, self.low, self.high = of.name, branches, low, high
        self.layout = (*of.shape[1:], of.shape[0])  # channels last
        self.dtype = torch.int8 if low < 0 else torch.uint8
        halves = [step / 2 if step else Fraction(0)] * len(branches[0].scale)
        parts = zip(halves, *(part for branch in branches for part in (branch.scale, branch.shift)))
        self.exponents = [min((lowest_bit(x) for x in channel if x), default=0) for channel in parts]
        if step is None:
            self.exponents = [min(self.exponents)] * len(halves)  # logits are compared with each other
        halves = [int(half * Fraction(2) ** -e) for half, e in zip(halves, self.exponents)]
        largest = max(map(sum, zip(halves, *(branch.align(self.exponents) for branch in branches))))
        self.bits = largest.bit_length() + 1
        if self.bits > 64:
            raise BadInput(f"{of.name}: its aligned sums may need {self.bits} bits, more than 64")
        wide = torch.int32 if self.bits <= 32 else torch.int64
        for branch in branches:
            branch.multiplier, branch.addend = branch.multiplier.to(wide), branch.addend.to(wide)
        self.half = torch.tensor(halves, dtype=wide)
        self.shift = torch.tensor([half.bit_length() for half in halves], dtype=wide)

    def value(self, codes: dict[str, Tensor], watch=None) -> Tensor:
        """Return the value, int32 or int64, in units of 2^exponent of each channel."""
        first, *others = (branch.value(codes, watch).reshape(-1, *self.layout) for branch in self.branches)
        for other in others:
            first += other
        return first

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

    The stored values of a shipped model are read as integers, by the formats in its claim. points: the activation
    points in the order of computation. logits: a Point that is not rounded. Raises BadInput if model and claim do not
    fit each other, if a step is no power of two, if a weight or activation has more than 8 bits, or a scale, shift or
    bias more than 16.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, claim: dict):
        self.model, self.formats, read = model, stated_formats(model, claim), graph.read(model)
        self._check_widths()
        self.steps = {entry["name"]: Fraction(2) ** stored_exponent(entry.get("step"), f"activation {entry['name']}")
                      for entry in claim["activations"]}
        self.shapes = {point.name: point.shape for point in read.points}
        *self.points, self.logits = [self._point(point) for point in read.points]
        self.logit_exponent = self.logits.exponents[0]

    def _check_widths(self) -> None:
        vectors = {name for name, parameter in self.model.named_parameters() if parameter.dim() == 1}
        widths = {name: grid.bits for name, grid in self.formats.tensors.items()}
        widths |= {f"activation {name}": activation.bits for name, activation in self.formats.activations.items()}
        wide = [f"{name} has {bits} bits" for name, bits in widths.items() if bits > (16 if name in vectors else 8)]
        if wide:
            raise BadInput(f"{wide[0]}: expected at most 8, and 16 for scales, shifts and biases")

    def _point(self, of: graph.Point) -> Point:
        branches = [self._layer(branch) if branch.kind == "layer" else self._term(branch, of) for branch in of.branches]
        if of.name not in self.steps:
            return Point(of, branches)
        step, activation = self.steps[of.name], self.formats.activations[of.name]
        high = min(activation.high, round(Fraction(RELU6) / step)) if of.activation == "relu6" else activation.high
        return Point(of, branches, step, activation.low, high)

    def _layer(self, of: graph.Branch) -> Branch:
        """Return the branch of a convolution or linear layer, with the BatchNorm that is folded into it."""
        module, grid = self.model.get_submodule(of.name), self.formats.tensors[f"{of.name}.weight"]
        if len(grid.steps) != 1:
            raise BadInput(f"{of.name}.weight has {len(grid.steps)} steps, expected one")
        unit = Fraction(2) ** stored_exponent(grid.steps[0], f"{of.name}.weight") * self.steps[of.source]
        if of.norm and module.bias is not None and module.bias.any():
            raise BadInput(f"{of.name}: its bias is not folded into the shift of {of.norm}")
        scale, shift = [Fraction(1)] * len(module.weight), [Fraction(0)] * len(module.weight)
        if of.norm:
            scale, shift = self._folded(of.norm)
        elif module.bias is not None:
            shift = list(map(Fraction, module.bias.tolist()))
        codes = grid.codes(module.weight)
        return Branch(of, layer_sums(module, codes, of.window),
                      counting.reach(codes, self.formats.activations[of.source]), [unit * a for a in scale], shift)

    def _folded(self, norm: str) -> tuple[list[Fraction], list[Fraction]]:
        """Return the scale and the shift of each channel of a folded BatchNorm."""
        bn = self.model.get_submodule(norm)
        if not is_folded(bn):
            raise BadInput(f"{norm}: its statistics are not folded into scale and shift")
        return list(map(Fraction, bn.weight.tolist())), list(map(Fraction, bn.bias.tolist()))

    def _term(self, of: graph.Branch, point: graph.Point) -> Branch:
        """Return a branch that is no layer. sums: of codes; low, high: their range; scale, shift: for all channels."""
        if of.kind == "pixels":
            unit = Fraction(1, cifar100.STD)
            return Branch(of, lambda codes: codes, [(0, 255)] * 3, [unit] * 3, [-cifar100.MEAN * unit] * 3)
        activation, scale, channels = self.formats.activations[of.source], self.steps[of.source], point.shape[0]
        low, high, sums = activation.low, activation.high, lambda codes: codes  # of "unchanged"
        if of.kind == "norm":
            scales, shifts = self._folded(of.norm)
            return Branch(of, sums, [(low, high)] * channels, [scale * a for a in scales], shifts)
        if of.kind == "mean":
            def sums(codes):
                return functools.reduce(torch.add, windows(codes.int(), of.window))
            low, high, scale = of.terms * low, of.terms * high, scale / of.terms
        elif of.kind == "max":
            def sums(codes, least=low):
                return functools.reduce(torch.maximum, windows(codes, of.window, least))
        elif of.kind == "product":
            def sums(codes, factor):  # of one factor for each element, or one for each channel
                return codes.int() * (factor[:, None, None] if factor.dim() < codes.dim() else factor)
            other = self.formats.activations[of.other]
            ends = [a * b for a in (low, high) for b in (other.low, other.high)]
            low, high, scale = min(ends), max(ends), scale * self.steps[of.other]
        elif of.kind == "moved":
            places = self._places(of)

            def sums(codes):
                return F.pad(codes.flatten(1), (1, 0))[:, places]
        elif of.kind == "function":
            entries = table(of.function, activation, float(scale), self.formats.activations[point.name],
                            float(self.steps[point.name]))

            def sums(codes, least=low):
                return entries[codes.int() - least]
            low, high, scale = int(entries.min()), int(entries.max()), self.steps[point.name]
        return Branch(of, sums, [(low, high)] * channels, [scale] * channels, [Fraction(0)] * channels)

    def _places(self, of: graph.Branch) -> Tensor:
        """Return the positions [H, W, C] in the source of a "moved" branch's elements, both channels last.

        They are counted from 1; 0 stands for a zero that is inserted.
        """
        shape = self.shapes[of.source]
        numbers = torch.arange(1, of.elements + 1).view(*shape[1:], shape[0]).movedim(-1, 0).flatten()
        return F.pad(numbers, (1, 0))[of.index].movedim(0, -1)

    @torch.inference_mode()
    def __call__(self, images: Tensor, watch: Callable[[str, Tensor], None] | None = None) -> Tensor:
        """Return the logits of images. watch(name, accumulators) is called for every branch."""
        return self.logits.value(self.codes(images, watch), watch)

    @torch.inference_mode()
    def codes(self, images: Tensor, watch=None) -> dict[str, Tensor]:
        """Return the pixels and the codes at every activation point, {name: uint8 or int8 [N, H, W, C] or [N, C]}."""
        codes = {"pixels": images.permute(0, 2, 3, 1).contiguous()}
        for point in self.points:
            codes[point.name] = point.round(point.value(codes, watch))
        return codes

    def layers(self) -> dict[Branch, Point]:
        """Return what sums products or values (convolutions, linear layers, means) in order, with the point of each."""
        return {branch: point for point in (*self.points, self.logits) for branch in point.branches
                if branch.kind in ("layer", "mean")}


# ---- Comparison with the exact network -----------------------------------------------------------

def compare(network: IntegerNetwork, floats: nn.Module, data: cifar100.Images) -> dict:
    """Run both networks on all images, on every core.

    Returns what tools.agreement counts, and {"seconds", "float_seconds", "seen": {branch: (lowest, highest)
    accumulator}}.
    """
    seen, lock = {}, threading.Lock()

    def watch(name, acc):
        low, high = (int(x) for x in acc.aminmax())
        with lock:
            before = seen.get(name, (low, high))
            seen[name] = min(low, before[0]), max(high, before[1])

    begin = time.perf_counter()
    ours = answers(lambda images: network(images, watch), data.images, BATCH)
    middle = time.perf_counter()
    theirs = logits(floats, data.images)
    end = time.perf_counter()
    # the exact network's logits are float32: exact values that are rounded once, at the very end
    return agreement((ours.double() * 2.0**network.logit_exponent).float(), theirs, data.labels) | {
        "seconds": middle - begin, "float_seconds": end - middle, "seen": seen}


def accumulator_rows(network: IntegerNetwork, seen: dict[str, tuple[int, int]]) -> list[dict]:
    """Return {"layer", "bound", "bits", "seen", "seen_bits", "value_bits"} of each layer and mean.

    bound, seen: the lowest and the highest accumulator that the stored codes allow, and that occurred. bits: of these
    in two's complement. value_bits: of the aligned sum to which the accumulator contributes.
    """
    rows = []
    for layer, point in network.layers().items():
        bound = min(low for low, _ in layer.reach), max(high for _, high in layer.reach)
        rows.append({"layer": layer.name, "bound": bound, "bits": signed_bits(*bound), "seen": seen[layer.name],
                     "seen_bits": signed_bits(*seen[layer.name]), "value_bits": point.bits})
    return rows


def text(report: dict) -> str:
    n = report["images"]
    lines = [*describe("integers", report), "",
             f"Speed: {n / report['seconds']:.1f} images/s in integers, {n / report['float_seconds']:.1f} in "
             f"exact_network ({threads.cores()} threads)", "",
             "Accumulators: range that the stored codes allow; range on these images; bits of the aligned sum",
             f"{'layer':<20}{'lowest':>13}{'highest':>13}{'bits':>6}{'lowest seen':>13}{'highest seen':>14}{'bits':>6}"
             f"{'sum bits':>10}"]
    for row in report["accumulators"]:
        (low, high), (lowest, highest) = row["bound"], row["seen"]
        lines.append(f"{row['layer']:<20}{low:>13,}{high:>13,}{row['bits']:>6}{lowest:>13,}{highest:>14,}"
                     f"{row['seen_bits']:>6}{row['value_bits']:>10}")
    return "\n".join(lines)


def main(argv=None) -> int:
    """Print the report; return 2 if the logits of any image differ."""
    threads.prepare()
    parser = option_parser(__doc__)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    args = parser.parse_args(argv)
    if args.record:
        claims.recordable(args.checkpoint)  # before anything is computed
    model, claim = checkpoints.load(args.checkpoint, args.network)
    network = IntegerNetwork(model, claim)
    data, name = datasets.chosen(args, "test", network=model)
    report = compare(network, exact_network(model, claim["activations"]), data)
    report["accumulators"] = accumulator_rows(network, report.pop("seen"))
    if args.record:  # before printing: the reader of a pipe may have exited
        kept = {key: value for key, value in report.items() if not key.endswith("seconds")}
        claims.record(args.checkpoint, "integer", {"data": name} | kept)
    report = {"checkpoint": str(args.checkpoint)} | report
    print(to_json(report, indent=1) if args.json else text(report), flush=True)
    if report["identical"] < report["images"]:
        print(f"integer.py: exact_network has other logits for {report['images'] - report['identical']} of "
              f"{report['images']} images", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_script(main)
