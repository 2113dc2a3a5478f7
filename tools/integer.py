"""The shipped network in exact integer arithmetic: no float anywhere between the uint8 image and the integer logits.

    python -m tools.integer                   the shipped checkpoint: accuracy, agreement with its float twin, sums
    python -m tools.integer --checkpoint F    another one, .pt with its claim beside it or .mnet

Every number that is stored is an integer times a power of two (see quantize.py), so every value in between is one too.
Where each value's power is known before the first image, integers and shifts are all that is left:

  acc   = sum of weight code x activation code                int32   a convolution, the linear layer; padding is code 0
  value = sum over branches of acc x multiplier + addend      int32   a branch is a convolution or a block's own input;
                                                              int64   where scales with many bits need it
  code  = clip(value >> shift, rounded, halves to even)       8 bits  a lower clip at 0 is the ReLU

What is stored for it            width
  weight codes                   6 or 8 bits (at most 8)      signed
  multiplier, a channel's        11 bits and a sign, and a shift to the left: the float16 scale of a folded BatchNorm
  addend, a channel's            16 bits signed, and a shift to the left: the BatchNorm's shift, the linear layer's bias
  steps                          a power of two for every tensor and activation point: all shifts follow from them
The average is the sum of its values: dividing by 16 is 4 more in a shift. A pointwise function of codes, such as hard
swish, is a table of at most 256 codes. A product, as in squeeze-excitation, is one of codes. Logits are values, all
with one power of two.

No order of summation can overflow: the reach of every sum follows from the stored codes, and is checked when the
network is built. exact_network, which testers.py runs, computes the same whole numbers in floats that are wide
enough to hold them: both networks must have the same logits to the last bit, and this script compares them.
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

from compressed import checkpoints, cifar100, claims, counting, graph, networks, threads
from compressed.command_line import command_line, number, run_script
from compressed.errors import BadInput
from compressed.evaluation import answers, logits
from compressed.exact_network import RELU6, exact_network, table
from compressed.files import to_json
from compressed.formats import Formats, is_folded, signed_bits
from compressed.graph import Window
from compressed.mnet import stated_formats, stored_exponent

BATCH = 8  # images: their maps stay in the cache


# ------------------------------------------------------------------------------------------------- sums of products
# Codes are uint8 (unsigned) or int8 (signed), [N, H, W, channels] or [N, channels]; accumulators int32 of that layout.

@functools.cache
def fast_products() -> bool:
    """Whether torch has a product of int8 matrices for the CPU, and whether it is exact on this one.

    x86 CPUs without VNNI add products in pairs in 16 bits, which saturate: extreme codes show it.
    """
    extreme = torch.tensor([-128, 127, -128, -128], dtype=torch.int8).repeat(64, 16)
    try:
        return torch.equal(torch._int_mm(extreme, extreme.T), extreme.int() @ extreme.int().T)
    except (AttributeError, RuntimeError):
        return False


def products(codes: Tensor, weight: Tensor) -> Tensor:
    """codes [..., K] times weight codes (int8 [K, out]) -> int32 [..., out].

    The fast product takes signed codes alone: unsigned ones lose 128 first, which the weights' sums give back.
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
    """The codes at each place of a window, row by row, each [N, H', W', C]; outside the map they are `fill`."""
    codes = F.pad(codes, (0, 0, *[window.padding[1]] * 2, *[window.padding[0]] * 2), value=fill or None)
    rows, columns = ([slice(k * d, k * d + n - d * (kernel - 1), s) for k in range(kernel)]
                     for n, kernel, s, d in zip(codes.shape[1:3], window.kernel, window.stride, window.dilation))
    return [codes[:, y, x] for y in rows for x in columns]


def full(codes: Tensor, weight: Tensor, window: Window) -> Tensor:
    """A convolution. weight int8 [groups, places x in of a group, out of a group]."""
    parts = windows(codes, window)
    size = codes.shape[-1] // len(weight)
    return torch.cat([products(torch.cat([part[..., g * size:(g + 1) * size] for part in parts], -1), one)
                      for g, one in enumerate(weight)], -1)


def depthwise(codes: Tensor, weight: Tensor, window: Window) -> Tensor:
    """weight int32 [places, C]."""
    parts = windows(codes.int(), window)
    acc = parts[0] * weight[0]
    for part, row in zip(parts[1:], weight[1:]):
        acc.addcmul_(part, row)
    return acc


def sum_of_window(codes: Tensor, window: Window) -> Tensor:
    """[N, H', W', C]; of a whole map faster than part by part."""
    if window.kernel == tuple(codes.shape[1:3]):
        return codes.sum((1, 2), dtype=torch.int32)[:, None, None]
    return sum(part.int() for part in windows(codes, window))


def largest_of_window(codes: Tensor, window: Window, lowest: int) -> Tensor:
    return functools.reduce(torch.maximum, windows(codes, window, lowest))


def product(codes: Tensor, factor: Tensor) -> Tensor:
    """factor: of the shape of the codes [N, H, W, C], or one for each channel."""
    return codes.int() * (factor[:, None, None] if factor.dim() < codes.dim() else factor)


def looked_up(codes: Tensor, entries: Tensor, low: int) -> Tensor:
    """entries: int32, of each code from `low` on."""
    return entries[codes.int() - low]


def moved(codes: Tensor, places: Tensor) -> Tensor:
    """The codes at these places [H, W, C] of an image, counted from 1 in that order; 0 is a zero."""
    return F.pad(codes.flatten(1), (1, 0))[:, places]


def layer_sums(layer: nn.Module, weight: Tensor, window: Window | None) -> Callable[[Tensor], Tensor]:
    """The function from a layer's input codes to its accumulators. weight: its codes, int64, in the layer's shape."""
    if window in (None, Window((1, 1))) and getattr(layer, "groups", 1) == 1:
        return functools.partial(products, weight=weight.flatten(1).to(torch.int8).T)
    if layer.groups == layer.in_channels == layer.out_channels:
        return functools.partial(depthwise, weight=weight.flatten(1).T.int().contiguous(), window=window)
    rows = weight.permute(0, 2, 3, 1).flatten(1)  # [out, places x in of a group]
    rows = rows.view(layer.groups, -1, rows.shape[1]).transpose(1, 2)
    return functools.partial(full, weight=rows.to(torch.int8), window=window)


# ------------------------------------------------------------------------------------------------ the integer network

def lowest_bit(x: Fraction) -> int:
    """e of the lowest bit 2^e in x, an integer times a power of two and not 0."""
    return (x.numerator & -x.numerator).bit_length() - x.denominator.bit_length()


class Branch:
    """One term of a value: sums(codes of its sources) x multiplier + addend, a channel at a time.

    kind: see graph.Branch.

    reach: (lowest, highest) accumulator of each channel. scale, shift: the real numbers for which multiplier and addend
    stand; `align` makes those, the integers scale / 2^e and shift / 2^e.
    """

    def __init__(self, of: graph.Branch, sums: Callable[..., Tensor], reach: list[tuple[int, int]],
                 scale: list[Fraction], shift: list[Fraction]):
        self.name, self.kind, self.source, self.sources = of.name, of.kind, of.source, of.sources
        self.sums, self.reach, self.scale, self.shift = sums, reach, scale, shift
        name = self.name
        worst = max(max(-low, high) for low, high in reach)
        if worst >= 2**31:
            raise BadInput(f"{name}: sums of products up to {worst:,} may overflow the 32-bit accumulator")

    def align(self, exponents: list[int]) -> list[int]:
        """Sets multiplier and addend (int64 [C]); returns the largest magnitude, before or after adding, a channel."""
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
    """An activation point: the value that its branches add up to, rounded to its codes; without a step, the logits.

    Each channel has its own power of two for its value, 2^exponent, the finest bit of anything that is added in it.
    Raises BadInput if the value could overflow 64 bits.
    """

    def __init__(self, of: graph.Point, branches: list[Branch], step: Fraction | None = None, low: int = 0,
                 high: int = 0):
        self.name, self.branches, self.low, self.high = of.name, branches, low, high
        self.layout, name = (*of.shape[1:], of.shape[0]), of.name  # channels last
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
            raise BadInput(f"{name}: its aligned sums may need {self.bits} bits, more than 64")
        wide = torch.int32 if self.bits <= 32 else torch.int64
        for branch in branches:
            branch.multiplier, branch.addend = branch.multiplier.to(wide), branch.addend.to(wide)
        self.half = torch.tensor(halves, dtype=wide)
        self.shift = torch.tensor([half.bit_length() for half in halves], dtype=wide)

    def value(self, codes: dict[str, Tensor], watch=None) -> Tensor:
        """int32 or int64, times 2^exponent of the channel."""
        first, *others = (branch.value(codes, watch).reshape(-1, *self.layout) for branch in self.branches)
        for other in others:
            first += other
        return first

    def round(self, value: Tensor) -> Tensor:
        """The codes, uint8 or int8. Writes over the value.

        An odd quotient gets a half, an even one a half less the lowest bit: halves alone tell the difference.
        """
        odd = (value >> self.shift).bitwise_and_(1)
        value = value.add_(odd).add_(self.half - 1).bitwise_right_shift_(self.shift)
        return value.clamp_(self.low, self.high).to(self.dtype)


class Builder:
    """Makes the branches of an integer network from a model's stored values; steps, shapes: of all points, by name."""

    def __init__(self, model: nn.Module, formats: Formats, steps: dict[str, Fraction], shapes: dict[str, tuple]):
        self.model, self.formats, self.steps, self.shapes = model, formats, steps, shapes

    def branch(self, of: graph.Branch, point: graph.Point) -> Branch:
        if of.kind == "layer":
            return self.layer(of)
        if of.kind == "pixels":
            unit = Fraction(1, cifar100.STD)
            return Branch(of, lambda codes: codes, [(0, 255)] * 3, [unit] * 3, [-cifar100.MEAN * unit] * 3)
        activation, step, channels = self.formats.activations[of.source], self.steps[of.source], point.shape[0]
        low, high, shift = activation.low, activation.high, [Fraction(0)] * channels
        if of.kind == "norm":
            scale, shift = self.scales(of.norm)
            return Branch(of, lambda codes: codes, [(low, high)] * channels, [step * a for a in scale], shift)
        sums = {"mean": functools.partial(sum_of_window, window=of.window),
                "max": functools.partial(largest_of_window, window=of.window, lowest=low),
                "product": product}.get(of.kind, lambda codes: codes)
        if of.kind == "mean":
            low, high, step = of.terms * low, of.terms * high, step / of.terms
        elif of.kind == "product":
            other = self.formats.activations[of.other]
            ends = [a * b for a in (low, high) for b in (other.low, other.high)]
            low, high, step = min(ends), max(ends), step * self.steps[of.other]
        elif of.kind == "moved":
            sums = functools.partial(moved, places=self.places(of))
        elif of.kind == "function":
            entries = table(of.function, activation, float(step), self.formats.activations[point.name],
                            float(self.steps[point.name]))
            sums, step = functools.partial(looked_up, entries=entries, low=low), self.steps[point.name]
            low, high = int(entries.min()), int(entries.max())
        return Branch(of, sums, [(low, high)] * channels, [step] * channels, shift)

    def layer(self, of: graph.Branch) -> Branch:
        module, grid = self.model.get_submodule(of.name), self.formats.tensors[f"{of.name}.weight"]
        if len(grid.steps) != 1:
            raise BadInput(f"{of.name}.weight has {len(grid.steps)} steps, expected one")
        unit = Fraction(2) ** stored_exponent(grid.steps[0], f"{of.name}.weight") * self.steps[of.source]
        scale, shift = [Fraction(1)] * len(module.weight), [Fraction(0)] * len(module.weight)
        if module.bias is not None:
            shift = list(map(Fraction, module.bias.tolist()))
        if of.norm:
            if any(shift):
                raise BadInput(f"{of.name}: its bias is not folded into the shift of {of.norm}")
            scale, shift = self.scales(of.norm)
        weight = grid.codes(module.weight)
        reach = counting.reach(weight, self.formats.activations[of.source])
        return Branch(of, layer_sums(module, weight, of.window), reach, [unit * a for a in scale], shift)

    def scales(self, norm: str) -> tuple[list[Fraction], list[Fraction]]:
        """Scale and shift of each channel of a folded BatchNorm."""
        bn = self.model.get_submodule(norm)
        if not is_folded(bn):
            raise BadInput(f"{norm}: its statistics are not folded into scale and shift")
        return list(map(Fraction, bn.weight.tolist())), list(map(Fraction, bn.bias.tolist()))

    def places(self, of: graph.Branch) -> Tensor:
        """Where the elements of a "moved" branch come from, channels last on both sides: as `moved` counts them."""
        shape = self.shapes[of.source]
        numbers = torch.arange(1, of.elements + 1).view(*shape[1:], shape[0]).movedim(-1, 0).flatten()
        return F.pad(numbers, (1, 0))[of.index].movedim(0, -1)


class IntegerNetwork:
    """Called with images (uint8 [N, 3, 32, 32]) it returns logits (integers [N, classes], times 2^logit_exponent).

    points: the 55 activation points in the order in which they are computed; logits: a Point that is not rounded.
    """

    def __init__(self, points: list[Point], logits: Point):
        self.points, self.logits, self.logit_exponent = points, logits, logits.exponents[0]

    @classmethod
    @torch.no_grad()
    def from_checkpoint(cls, model: nn.Module, claim: dict) -> "IntegerNetwork":
        """Reads the stored values of a shipped model as integers, by the formats in its claim.

        Raises BadInput if they do not fit each other, or are not what 8-bit codes with steps that are powers of two and
        accumulators of 32 bits can hold.
        """
        formats, points, read = stated_formats(model, claim), [], graph.read(model)
        widths = {name: grid.bits for name, grid in formats.tensors.items()}
        widths |= {f"activation {name}": activation.bits for name, activation in formats.activations.items()}
        vectors = {name for name, parameter in model.named_parameters() if parameter.dim() == 1}
        wide = [f"{name} has {bits} bits" for name, bits in widths.items() if bits > (16 if name in vectors else 8)]
        if wide:
            raise BadInput(f"{wide[0]}: expected at most 8, and 16 for scales, shifts and biases")
        step = {entry["name"]: Fraction(2) ** stored_exponent(entry.get("step"), f"activation {entry['name']}")
                for entry in claim["activations"]}
        build = Builder(model, formats, step, {point.name: point.shape for point in read.points})
        for point in read.points[:-1]:
            activation, high = formats.activations[point.name], None
            if point.activation == "relu6":
                high = round(Fraction(RELU6) / step[point.name])
            points.append(Point(point, [build.branch(each, point) for each in point.branches], step[point.name],
                                activation.low, activation.high if high is None else min(activation.high, high)))
        last = read.points[-1]
        return cls(points, Point(last, [build.branch(each, last) for each in last.branches]))

    @torch.inference_mode()
    def __call__(self, images: Tensor, watch: Callable[[str, Tensor], None] | None = None) -> Tensor:
        """watch(name, accumulators) is called for every branch."""
        return self.logits.value(self.codes(images, watch), watch)

    @torch.inference_mode()
    def codes(self, images: Tensor, watch=None) -> dict[str, Tensor]:
        """The codes at every activation point and the pixels: {name: uint8 or int8 [N, H, W, C] or [N, C]}."""
        codes = {"pixels": images.permute(0, 2, 3, 1).contiguous()}
        for point in self.points:
            codes[point.name] = point.round(point.value(codes, watch))
        return codes

    def layers(self) -> list[Branch]:
        """What sums products or values: convolutions, linear layers, means, in the order in which they run."""
        branches = [branch for point in (*self.points, self.logits) for branch in point.branches]
        return [branch for branch in branches if branch.kind in ("layer", "mean")]


# ---------------------------------------------------------------------------------------- beside the float network

def compare(network: IntegerNetwork, floats: nn.Module, data: cifar100.Images) -> dict:
    """Runs both networks on all images, on every core.

    {"images", "correct", "float_correct", "agree": images with the same prediction, "identical": images whose logits
     are the same to the last bit, "seconds", "float_seconds", "seen": {layer: (lowest, highest) accumulator}}
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
    found, wanted = ours.argmax(1), theirs.argmax(1)
    # the float network's logits are float32: exact values, rounded once at the very end
    same = ((ours.double() * 2.0**network.logit_exponent).float() == theirs).all(1)
    return {"images": len(data), "correct": int((found == data.labels).sum()),
            "float_correct": int((wanted == data.labels).sum()), "agree": int((found == wanted).sum()),
            "identical": int(same.sum()), "seconds": middle - begin, "float_seconds": end - middle, "seen": seen}


def accumulator_rows(network: IntegerNetwork, seen: dict[str, tuple[int, int]]) -> list[dict]:
    """{"layer", "bound", "bits", "seen", "seen_bits", "value_bits"}: bits in two's complement, as in `counting`."""
    values = {branch.name: point.bits for point in (*network.points, network.logits) for branch in point.branches}
    rows = []
    for layer in network.layers():
        bound = min(low for low, _ in layer.reach), max(high for _, high in layer.reach)
        rows.append({"layer": layer.name, "bound": bound, "bits": signed_bits(*bound), "seen": seen[layer.name],
                     "seen_bits": signed_bits(*seen[layer.name]), "value_bits": values[layer.name]})
    return rows


# ---------------------------------------------------------------------------------------------------------- the script

def text(report: dict) -> str:
    n = report["images"]
    lines = [f"Accuracy: {report['correct']}/{n} ({report['correct'] / n:.2%})",
             f"The float network of testers.py: {report['float_correct']}/{n} ({report['float_correct'] / n:.2%}); "
             f"predictions agree on {report['agree']}/{n} ({report['agree'] / n:.2%}), logits to the last bit on "
             f"{report['identical']}/{n}"]
    lines += ["", f"Speed: {n / report['seconds']:.1f} images/s in integers, {n / report['float_seconds']:.1f} in "
              f"floats ({threads.cores()} threads)", "",
              "Accumulators: what the stored codes can reach, what these images reach, and the aligned sum behind it",
              f"{'layer':<20}{'lowest':>13}{'highest':>13}{'bits':>6}{'lowest seen':>13}{'highest seen':>14}{'bits':>6}"
              f"{'sum bits':>10}"]
    for row in report["accumulators"]:
        (low, high), (lowest, highest) = row["bound"], row["seen"]
        lines.append(f"{row['layer']:<20}{low:>13,}{high:>13,}{row['bits']:>6}{lowest:>13,}{highest:>14,}"
                     f"{row['seen_bits']:>6}{row['value_bits']:>10}")
    return "\n".join(lines)


def main(argv=None) -> int:
    """Prints the report. Returns 2 if the networks' logits differ for any image."""
    threads.prepare()
    parser = command_line(__doc__)
    checkpoints.add_option(parser)
    networks.add_option(parser, claimed=True)
    cifar100.add_options(parser)
    parser.add_argument("--images", type=number(int, 1, 10**6), metavar="N", help=cifar100.FIRST_IMAGES)
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    parser.add_argument("--record", action="store_true", help="write the result into the claim beside the checkpoint")
    args = parser.parse_args(argv)
    if args.record:
        claims.recordable(args.checkpoint)  # before anything is done
    model, claim = checkpoints.load(args.checkpoint, args.network)
    network = IntegerNetwork.from_checkpoint(model, claim)
    data, name = cifar100.chosen(args, "test")
    floats = exact_network(model, claim["activations"])
    report = {"checkpoint": str(args.checkpoint)} | compare(network, floats, data)
    report["accumulators"] = accumulator_rows(network, report.pop("seen"))
    if args.record:  # before printing: the reader of a pipe may have gone
        kept = {key: value for key, value in report.items() if key not in ("checkpoint", "seconds", "float_seconds")}
        claims.record(args.checkpoint, "integer", {"data": name} | kept)
    print(to_json(report, indent=1) if args.json else text(report), flush=True)
    if report["identical"] < report["images"]:
        print(f"integer.py: the float network has other logits for {report['images'] - report['identical']} of "
              f"{report['images']} images", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_script(main)
