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
The average is the sum of its values: dividing by 16 is 4 more in a shift. Logits are values, all with one power of two.

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

from compressed import checkpoints, cifar100, claims, counting, graph, threads
from compressed.command_line import command_line, number, run_script
from compressed.errors import BadInput
from compressed.evaluation import answers, logits
from compressed.exact_network import exact_network
from compressed.files import to_json
from compressed.formats import is_folded, signed_bits
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


def windows(codes: Tensor, stride: int) -> list[Tensor]:
    """The nine codes under a 3x3 kernel, row by row, each [N, H/stride, W/stride, C]; outside the map they are 0."""
    height, width = codes.shape[1:3]
    codes = F.pad(codes, (0, 0, 1, 1, 1, 1))
    return [codes[:, y:y + height:stride, x:x + width:stride] for y in range(3) for x in range(3)]


def full_3x3(codes: Tensor, weight: Tensor, stride: int) -> Tensor:
    """weight int8 [9 x in, out]."""
    return products(torch.cat(windows(codes, stride), -1), weight)


def depthwise_3x3(codes: Tensor, weight: Tensor, stride: int) -> Tensor:
    """weight int32 [9, C]."""
    parts = windows(codes.int(), stride)
    acc = parts[0] * weight[0]
    for part, row in zip(parts[1:], weight[1:]):
        acc.addcmul_(part, row)
    return acc


def sum_of_map(codes: Tensor) -> Tensor:
    return codes.sum((1, 2), dtype=torch.int32)


def layer_sums(layer: nn.Module, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The function from a layer's input codes to its accumulators. weight: its codes, int64, in the layer's shape."""
    if isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1):
        return functools.partial(products, weight=weight.flatten(1).to(torch.int8).T)
    rows, stride = weight.permute(2, 3, 1, 0), layer.stride[0]  # [3, 3, in, out]
    if layer.groups == 1:
        return functools.partial(full_3x3, weight=rows.flatten(0, 2).to(torch.int8), stride=stride)
    return functools.partial(depthwise_3x3, weight=rows.flatten(0, 2).int(), stride=stride)


# ------------------------------------------------------------------------------------------------ the integer network

def lowest_bit(x: Fraction) -> int:
    """e of the lowest bit 2^e in x, an integer times a power of two and not 0."""
    return (x.numerator & -x.numerator).bit_length() - x.denominator.bit_length()


class Branch:
    """One term of a value: sums(codes of `source`) x multiplier + addend, a channel at a time.

    reach: (lowest, highest) accumulator of each channel. scale, shift: the real numbers for which multiplier and addend
    stand; `align` makes those, the integers scale / 2^e and shift / 2^e.
    """

    def __init__(self, name: str, source: str, sums: Callable[[Tensor], Tensor], reach: list[tuple[int, int]],
                 scale: list[Fraction], shift: list[Fraction]):
        self.name, self.source, self.sums, self.reach, self.scale, self.shift = name, source, sums, reach, scale, shift
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
        acc = self.sums(codes[self.source])
        if watch is not None:
            watch(self.name, acc)
        return acc.to(self.multiplier.dtype).mul_(self.multiplier).add_(self.addend)


class Point:
    """An activation point: the value that its branches add up to, rounded to its codes; without a step, the logits.

    Each channel has its own power of two for its value, 2^exponent, the finest bit of anything that is added in it.
    Raises BadInput if the value could overflow 64 bits.
    """

    def __init__(self, name: str, branches: list[Branch], step: Fraction | None = None, low: int = 0, high: int = 0):
        self.name, self.branches, self.low, self.high = name, branches, low, high
        self.dtype = torch.int8 if low < 0 else torch.uint8
        halves = [step / 2 if step else Fraction(0)] * len(branches[0].scale)
        parts = zip(halves, *(part for branch in branches for part in (branch.scale, branch.shift)))
        self.exponents = [min(lowest_bit(x) for x in channel if x) for channel in parts]
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
        value = self.branches[0].value(codes, watch)
        for branch in self.branches[1:]:
            value += branch.value(codes, watch)
        return value

    def round(self, value: Tensor) -> Tensor:
        """The codes, uint8 or int8. Writes over the value.

        An odd quotient gets a half, an even one a half less the lowest bit: halves alone tell the difference.
        """
        odd = (value >> self.shift).bitwise_and_(1)
        value = value.add_(odd).add_(self.half - 1).bitwise_right_shift_(self.shift)
        return value.clamp_(self.low, self.high).to(self.dtype)


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
        formats, points = stated_formats(model, claim), []
        widths = {name: grid.bits for name, grid in formats.tensors.items()}
        widths |= {f"activation {name}": activation.bits for name, activation in formats.activations.items()}
        vectors = {name for name, parameter in model.named_parameters() if parameter.dim() == 1}
        wide = [f"{name} has {bits} bits" for name, bits in widths.items() if bits > (16 if name in vectors else 8)]
        if wide:
            raise BadInput(f"{wide[0]}: expected at most 8, and 16 for scales, shifts and biases")
        step = {entry["name"]: Fraction(2) ** stored_exponent(entry.get("step"), f"activation {entry['name']}")
                for entry in claim["activations"]}

        def layer(name: str, norm: str | None, source: str) -> Branch:
            module, grid = model.get_submodule(name), formats.tensors[f"{name}.weight"]
            if len(grid.steps) != 1:
                raise BadInput(f"{name}.weight has {len(grid.steps)} steps, expected one")
            unit = Fraction(2) ** stored_exponent(grid.steps[0], f"{name}.weight") * step[source]
            scale, shift = [unit] * len(module.weight), module.bias
            if norm:
                bn = model.get_submodule(norm)
                if not is_folded(bn):
                    raise BadInput(f"{norm}: its statistics are not folded into scale and shift")
                scale, shift = [unit * Fraction(a) for a in bn.weight.tolist()], bn.bias
            weight = grid.codes(module.weight)
            reach = counting.reach(weight, formats.activations[source])
            return Branch(name, source, layer_sums(module, weight), reach, scale, list(map(Fraction, shift.tolist())))

        def branch(each: graph.Branch, channels: int | None) -> Branch:
            if each.kind == "layer":
                return layer(each.name, each.norm, each.source)
            if each.kind == "pixels":
                unit = Fraction(1, cifar100.STD)
                return Branch(each.name, each.source, lambda codes: codes, [(0, 255)] * 3, [unit] * 3,
                              [-cifar100.MEAN * unit] * 3)
            activation, n = formats.activations[each.source], each.terms or 1
            return Branch(each.name, each.source, sum_of_map if each.kind == "mean" else lambda codes: codes,
                          [(n * activation.low, n * activation.high)] * channels, [step[each.source] / n] * channels,
                          [Fraction(0)] * channels)

        channels = {}
        for point in graph.points(model):
            branches = [branch(each, channels.get(each.source)) for each in point.branches]
            channels[point.name] = len(branches[0].scale)
            if point.name == "logits":
                return cls(points, Point("logits", branches))
            activation = formats.activations[point.name]
            points.append(Point(point.name, branches, step[point.name], activation.low, activation.high))

    @torch.inference_mode()
    def __call__(self, images: Tensor, watch: Callable[[str, Tensor], None] | None = None) -> Tensor:
        """watch(name, accumulators) is called for every branch."""
        return self.logits.value(self.codes(images, watch), watch)

    @torch.inference_mode()
    def codes(self, images: Tensor, watch=None) -> dict[str, Tensor]:
        """The codes at every activation point and the pixels: {name: uint8 or int8 [N, H, W, C] (features: [N, C])}."""
        codes = {"pixels": images.permute(0, 2, 3, 1).contiguous()}
        for point in self.points:
            codes[point.name] = point.round(point.value(codes, watch))
        return codes

    def layers(self) -> list[Branch]:
        """What sums products or values: convolutions, the linear layer, the mean, in the order in which they run."""
        branches = [branch for point in (*self.points, self.logits) for branch in point.branches]
        return [branch for branch in branches if isinstance(branch.sums, functools.partial) or branch.name == "mean"]


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
    cifar100.add_options(parser)
    parser.add_argument("--images", type=number(int, 1, 10**6), metavar="N", help=cifar100.FIRST_IMAGES)
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    parser.add_argument("--record", action="store_true", help="write the result into the claim beside the checkpoint")
    args = parser.parse_args(argv)
    if args.record:
        claims.recordable(args.checkpoint)  # before anything is done
    model, claim = checkpoints.load(args.checkpoint)
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
