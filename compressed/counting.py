"""The rules of the MicroNet Challenge (NeurIPS 2019, CIFAR-100), one small function a rule, in exact integers.

    score = parameter storage / 36.5M + operations / 10.49B

Storage: a b-bit value counts b/32; a sparse tensor is its non-zeros and one mask bit for every position.
Operations, for one image: a multiplication or addition counts the larger width of its two inputs/32; the inputs of an
addition have the width of the accumulator. Multiplications by zeros do not count where the tensor has a mask that tells
them; without one its zeros are values like any other (see `layout`). Source: the challenge's rules and the organisers'
counter (google-research/micronet_challenge). Here everything is counted in bits, as `int`: divide by 32 only to print.

The operations are those that `torch.fx` finds in the network itself; whatever this file has no rule for raises, because
a skipped layer flatters the score. Where the rules leave a choice, the dearer one is taken and the reason given:

- A dot product of n stored values is n multiplications and n - 1 additions; padding counts as data.
- BatchNorm is, folded, one scale and one shift a channel: a multiplication and an addition for every output element.
- ReLU is a multiplication of the value *before* it is rounded to the next activation's width, so at full width.
- A residual addition is an addition at full width, too; an average of n values is n - 1 additions and a multiplication,
  although a multiplication by 1/16 is a shift.
- Hard swish is x + 3, two clips, and the multiplications by x and by 1/6: 4 multiplications and an addition an element,
  as KAIST AI's entry counted it. ReLU6 is two multiplications, a lower and an upper clip; hard sigmoid an addition, two
  clips and a multiplication; a sigmoid, a transcendental function, one operation (a multiplication).
- A maximum of n values is n - 1 comparisons, counted as multiplications like a ReLU's. Elements that are moved or
  concatenated cost nothing.
- Rounding to an activation's grid is free: the rules need no tally of conversions to a format whose values float32
  holds exactly.

An accumulator's length is counted by one of three conventions (the challenge's table has a column for each):

- "32-bit": every addition has 32 bits.
- "fixed": one length a layer, the shortest in which no sum of the stored codes can overflow, whatever the input and
  whatever the order of the additions (see `reach`). The layer's worst channel decides for all of its channels.
- "tree": a balanced binary tree whose first additions count the width of a product, the next one bit more, and so on up
  to 32 (see `tree_additions`). This is the submission's convention.
"""
import copy
import math
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from compressed.cifar100 import IMAGE_SIZE
from compressed.command_line import say_broken
from compressed.errors import BadInput
from compressed.formats import WORD, Activation, Formats, Grid, signed_bits
from compressed.graph import Operation, read, weight_layers
from compressed.operations import is_point

STORAGE_BASE, OPERATIONS_BASE = 36_500_000, 10_490_000_000  # WideResNet-28-10, in the same units
SUBMISSION_HEAD = 1280  # inputs of the linear layer in the submission's total of weights: those of width 1.0
CONVENTIONS = ("32-bit", "fixed", "tree")


def macs(operations: list[Operation]) -> int:
    """Multiply-accumulates of the dense convolutions and linear layers for one image."""
    return sum(op.fan_in * op.outputs for op in operations if op.kind in ("conv", "linear"))


# ---- Accumulators --------------------------------------------------------------------------------

def tree_additions(terms: int, leaf_bits: int) -> Counter:
    """{bits: additions} of a balanced binary tree that adds `terms` numbers of `leaf_bits` bits; terms - 1 in all.

    m numbers become ceil(m/2) by floor(m/2) additions; an odd one waits. By the rules an addition counts the larger
    width of its *inputs*: the first level `leaf_bits`, each further level one bit more, up to 32.
    """
    additions, bits = Counter(), min(leaf_bits, WORD)
    while terms > 1:
        additions[bits] += terms // 2
        terms, bits = (terms + 1) // 2, min(bits + 1, WORD)
    return additions


def sum_bits(terms: int, leaf_bits: int) -> int:
    """Width of the sum of `terms` numbers of `leaf_bits` bits, up to 32: a bit more for each level of the tree."""
    return min(WORD, leaf_bits + max(terms - 1, 0).bit_length())


def reach(codes: Tensor, activation: Activation) -> list[tuple[int, int]]:
    """(lowest, highest) integer that the accumulator of each channel can ever hold. codes: a layer's, int64 [out, ...].

    Each product's extreme is taken by itself, so partial sums stay within these bounds in any order. The final extremes
    are reached by an input of extreme codes: no shorter accumulator is safe.
    """
    low, high, rows = activation.low, activation.high, codes.flatten(1)
    positive, negative = rows.clamp(min=0).sum(1).tolist(), rows.clamp(max=0).sum(1).tolist()
    return [(p * low + n * high, p * high + n * low) for p, n in zip(positive, negative)]


def fixed_bits(weight: Tensor, grid: Grid, activation: Activation, terms: int) -> int:
    """Length of a layer's accumulator under "fixed", its worst channel's; 32 if anything is floating point, at most 32.

    Without steps (a what-if), `terms` weights a channel with the most negative code stand for the unknown codes.
    """
    if "float" in grid.kind or activation.bits >= WORD:
        return WORD
    if grid.steps:
        bounds = reach(grid.codes(weight), activation)
    else:
        bound = terms * 2 ** (grid.bits - 1) * max(activation.high, -activation.low)
        bounds = [(-bound, bound)]
    return min(WORD, max(signed_bits(*each) for each in bounds))


# ---- The rules: what an operation multiplies and adds --------------------------------------------
# Each takes (operation, the formats of its inputs, all formats, convention, layout of its weights) and returns
# ({bits: multiplications}, {bits: additions}, the format of its output until the next activation point).

@dataclass(frozen=True)
class Layout:
    """How a weight tensor is stored, and what is multiplied: with a mask, its non-zeros; without, all its values.

    terms: those of the dot product of each output channel; their sum is the number of stored values. bias: whether one
    is added.
    """
    masked: bool
    terms: list[int]
    bias: bool = False


def layout(op: Operation, activation: Activation, formats: Formats, density: Fraction | None) -> Layout:
    """Return the cheaper of two layouts by the score: masked, with its zeros skipped; or dense, with its zeros counted.

    A network is stored once, so that its layout cannot depend on the accumulators: additions count 32 bits here.
    """
    weight, bits, positions = op.module.weight, formats.tensors[f"{op.name}.weight"].bits, op.outputs // op.channels
    bias = op.module.bias is not None and (density is not None or bool(op.module.bias.any()))
    layouts = (Layout(False, terms_per_channel(weight, Fraction(1)), bias),
               Layout(True, terms_per_channel(weight, density), bias))

    def cost(each: Layout) -> int:  # the score in units of 1 / (32 x STORAGE_BASE x OPERATIONS_BASE)
        stored = sum(each.terms) * bits + each.masked * weight.numel()
        operations = positions * sum(n * max(bits, activation.bits) + max(n - 1, 0) * WORD for n in each.terms)
        return stored * OPERATIONS_BASE + operations * STORAGE_BASE
    return min(layouts, key=cost)


def layouts(operations: list[Operation], formats: Formats, density: Fraction | None = None) -> dict[str, Layout]:
    """Return {layer: its layout} of every convolution and linear layer among the operations (from `trace`)."""
    found, values = {}, {}
    for op in operations:
        inputs = [values[key] for key in op.inputs]
        if op.kind in ("conv", "linear"):
            found[op.name] = layout(op, inputs[0], formats, density)
        *_, values[op.key] = RULES[op.kind](op, inputs, formats, "32-bit", found.get(op.name))
    return found


def terms_per_channel(weight: Tensor, density: Fraction | None) -> list[int]:
    """Terms of the dot product of each output channel: its own non-zeros, or a what-if density of all, rounded up.

    Channels are counted one by one: with a layer's mean density, as in the organisers' counter, thin channels would
    have less than no additions.
    """
    if density is None:
        return weight.detach().flatten(1).count_nonzero(1).tolist()
    return [math.ceil(density * weight[0].numel())] * len(weight)


def dot_products(op: Operation, inputs, formats: Formats, convention: str, stored: Layout):
    """n terms: n multiplications at max(weight bits, activation bits) and n - 1 additions at the accumulator's width;
    none for a channel without weights. A bias is one more addition, at 32 bits: its step is not the products'. One of
    zeros alone, which has gone into the shift of the BatchNorm behind it, is none."""
    weight, grid, activation = op.module.weight, formats.tensors[f"{op.name}.weight"], inputs[0]
    product_bits = min(WORD, grid.bits + activation.bits)
    terms = Counter(stored.terms)
    most, positions = max(terms), op.outputs // op.channels
    length = {"32-bit": WORD, "tree": sum_bits(most, product_bits)}.get(convention)
    if convention == "fixed":
        length = fixed_bits(weight, grid, activation, most)
    multiplications, additions = Counter(), Counter()
    for n, channels in terms.items():
        multiplications[max(grid.bits, activation.bits)] += n * channels * positions
        sums = tree_additions(n, product_bits) if convention == "tree" else {length: max(n - 1, 0)}
        for bits, count in sums.items():
            additions[bits] += count * channels * positions
    if stored.bias:
        additions[WORD] += op.outputs
        length = WORD
    return multiplications, additions, Activation(length)


def batchnorm(op: Operation, inputs, formats: Formats, convention: str, stored):
    """Folded: the accumulator times the channel's scale, plus its shift. A product of a- and b-bit numbers has a + b
    bits; the shift is added to it at that width, up to 32 (with 16-bit scales in practice always 32). A float16 scale
    counts its 16 bits, although its significand, which is what multiplies, has 11."""
    scale, shift = formats.tensors[f"{op.name}.weight"].bits, formats.tensors[f"{op.name}.bias"].bits
    wide = min(WORD, max(inputs[0].bits + scale, shift))
    return Counter({max(inputs[0].bits, scale): op.outputs}), Counter({wide: op.outputs}), Activation(wide)


def relu(op: Operation, inputs, formats: Formats, convention: str, stored):
    """One multiplication an element, by the rules, at the width that the value has before it is rounded."""
    return Counter({inputs[0].bits: op.outputs}), Counter(), formats.activation(op.name, signed=False)


def relu6(op: Operation, inputs, formats: Formats, convention: str, stored):
    """Two multiplications an element: a ReLU's, and as much again for the upper clip."""
    return Counter({inputs[0].bits: 2 * op.outputs}), Counter(), formats.activation(op.name, signed=False)


def plus_three(value: Activation, convention: str) -> tuple[int, int]:
    """Return (the width at which x + 3 is counted, the width of the sum).

    The conventions are about the length of an accumulator. The sum is none: it has one bit more than x under each.
    """
    return WORD if convention == "32-bit" else value.bits, min(WORD, value.bits + 1)


def hardswish(op: Operation, inputs, formats: Formats, convention: str, stored):
    """x min(max(x + 3, 0), 6) / 6: an addition; two clips and the product with x at the sum's width; the multiplication
    by 1/6 at the product's."""
    addition, bits = plus_three(inputs[0], convention)
    wide = min(WORD, inputs[0].bits + bits)
    multiplications = Counter({bits: 3 * op.outputs})
    multiplications[wide] += op.outputs
    return multiplications, Counter({addition: op.outputs}), Activation(wide)


def hardsigmoid(op: Operation, inputs, formats: Formats, convention: str, stored):
    """min(max(x + 3, 0), 6) / 6: an addition; two clips and the multiplication by 1/6 at the sum's width."""
    addition, bits = plus_three(inputs[0], convention)
    return Counter({bits: 3 * op.outputs}), Counter({addition: op.outputs}), Activation(bits, False)


def sigmoid(op: Operation, inputs, formats: Formats, convention: str, stored):
    """One operation at the input's width: the rules count a transcendental function as one."""
    return Counter({inputs[0].bits: op.outputs}), Counter(), Activation(inputs[0].bits, False)


def product(op: Operation, inputs, formats: Formats, convention: str, stored):
    """One multiplication an element; a product of a- and b-bit numbers has a + b bits."""
    widths = [value.bits for value in inputs]
    return Counter({max(widths): op.outputs}), Counter(), Activation(min(WORD, sum(widths)), any_signed(inputs))


def maximum(op: Operation, inputs, formats: Formats, convention: str, stored):
    """n values: n - 1 comparisons, each counted as a ReLU is; padding counts as data."""
    return Counter({inputs[0].bits: (op.fan_in - 1) * op.outputs}), Counter(), inputs[0]


def any_signed(values: list[Activation]) -> bool:
    return any(value.signed for value in values)


def free(op: Operation, inputs, formats: Formats, convention: str, stored):
    """Elements that are moved, concatenated, or passed on cost nothing; nor does the input's normalisation."""
    return Counter(), Counter(), Activation(max(value.bits for value in inputs), any_signed(inputs))


def residual(op: Operation, inputs, formats: Formats, convention: str, stored):
    """One addition an element; a sum has one bit more than the wider of its inputs, up to 32."""
    bits = WORD if convention == "32-bit" else min(WORD, max(value.bits for value in inputs) + 1)
    return Counter(), Counter({bits: op.outputs}), Activation(bits)


def mean(op: Operation, inputs, formats: Formats, convention: str, stored):
    """n values: n - 1 additions, and a multiplication of the sum by 1/n. The sum is as wide as its n inputs need."""
    value, n = inputs[0], op.fan_in
    if convention == "tree":
        length, sums = sum_bits(n, value.bits), tree_additions(n, value.bits)
    else:
        length = min(WORD, signed_bits(n * value.low, n * value.high)) if convention == "fixed" else WORD
        sums = {length: n - 1}
    additions = Counter({bits: count * op.outputs for bits, count in sums.items()})
    return Counter({length: op.outputs}), additions, Activation(length, value.signed)


def point(op: Operation, inputs, formats: Formats, convention: str, stored):
    """An activation point costs nothing: float32 holds the grid that it rounds to exactly."""
    return Counter(), Counter(), formats.activation(op.name, inputs[0].signed)


def image(op: Operation, inputs, formats: Formats, convention: str, stored):
    """The network's input, in float32 until a point rounds it. Its normalisation is preprocessing, not counted."""
    return Counter(), Counter(), Activation()


RULES = {"conv": dot_products, "linear": dot_products, "batchnorm": batchnorm, "relu": relu, "relu6": relu6,
         "hardswish": hardswish, "hardsigmoid": hardsigmoid, "sigmoid": sigmoid, "add": residual, "product": product,
         "mean": mean, "max": maximum, "moved": free, "concatenation": free, "nothing": free, "normalisation": free,
         "point": point, "input": image}
FREE = "moved", "concatenation", "nothing", "normalisation", "point", "input"


# ---- Totals --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Row:
    """What one operation costs: {bits: count} of its multiplications and its additions, for one image."""
    name: str
    kind: str
    outputs: int
    multiplications: Counter
    additions: Counter

    @property
    def multiplication_bits(self) -> int:
        return sum(bits * count for bits, count in self.multiplications.items())

    @property
    def addition_bits(self) -> int:
        return sum(bits * count for bits, count in self.additions.items())

    @property
    def bits(self) -> int:
        """Bits x count over all multiplications and additions; /32 are the challenge's operations."""
        return self.multiplication_bits + self.addition_bits


def count(operations: list[Operation], formats: Formats, convention: str, density: Fraction | None = None) -> list[Row]:
    """A row for every operation (from `trace`) that multiplies or adds.

    density: None counts the weights' own non-zeros, and the zeros of a tensor without a mask (see `layout`); 1 counts
    as if no weight were zero; another fraction, a what-if, that share of every layer's weights, rounded up in each
    channel. Raises BadInput for an unknown convention, a density that is not in [0, 1], or, naming it, an operation
    without a rule.
    """
    if convention not in CONVENTIONS:
        raise BadInput(f"accumulator convention {convention!r} is none of {', '.join(CONVENTIONS)}")
    if density is not None and not 0 <= density <= 1:
        raise BadInput(f"density {density} is not between 0 and 1")
    rows, values, stored = [], {}, layouts(operations, formats, density)
    for op in operations:
        inputs = [values[key] for key in op.inputs]
        if op.kind not in RULES:
            raise BadInput(f"no counting rule for {op.name} ({op.kind})")
        multiplications, additions, values[op.key] = RULES[op.kind](op, inputs, formats, convention,
                                                                     stored.get(op.name))
        if op.kind not in FREE:
            rows.append(Row(op.name, op.kind, op.outputs, multiplications, additions))
    return rows


def totals(rows: list[Row]) -> dict[str, int]:
    """Sums over rows: counts of multiplications and additions, and their bits (count x bits; /32 are operations)."""
    return {"multiplications": sum(sum(row.multiplications.values()) for row in rows),
            "additions": sum(sum(row.additions.values()) for row in rows),
            "multiplication_bits": sum(row.multiplication_bits for row in rows),
            "addition_bits": sum(row.addition_bits for row in rows),
            "bits": sum(row.bits for row in rows)}


def storage(model: nn.Module, formats: Formats, density: Fraction | None = None,
            operations: list[Operation] | None = None) -> dict[str, int]:
    """Bits of every value that inference needs, by kind, and "total": layers that never run are left out.

    A weight tensor is stored dense (n b) or sparse (its non-zeros at b bits and one mask bit for each of its n
    positions), as `layout` says. A BatchNorm is a scale and a shift a channel at their widths. Every step (of a
    tensor, of a channel where channels have their own, of an activation point) counts 32 bits, although the exponent
    of a power of two would do with 8. density: as in `count`. operations: of `graph.read`, where they are at hand.
    """
    operations = read(model).operations if operations is None else operations
    stored, used = layouts(operations, formats, density), {op.name for op in operations}
    bits = dict.fromkeys(("weights", "masks", "batchnorm", "biases", "steps"), 0)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in used:
            continue
        n, grid = parameter.numel(), formats.tensors[name]
        bits["steps"] += WORD * len(grid.steps) if grid.kind != "what if" else WORD
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and layer in stored:
            bits["weights"] += sum(stored[layer].terms) * grid.bits
            bits["masks"] += n * stored[layer].masked
        else:
            norm = isinstance(model.get_submodule(layer), nn.BatchNorm2d)
            bits["batchnorm" if norm else "biases"] += n * grid.bits
    places = [op.name for op in operations if op.module is not None and is_point(op.module)]
    bits["steps"] += WORD * sum(formats.activation(name, True).bits < WORD for name in places)
    return bits | {"total": sum(bits.values())}


def thop_counts(model: nn.Module) -> list[int] | None:
    """Return what thop counts for one image and for two; None if it is not there or does not work.

    On copies: thop writes into models.
    """
    batches = (torch.zeros(images, 3, IMAGE_SIZE, IMAGE_SIZE) for images in (1, 2))
    try:
        from thop import profile
        return [int(profile(copy.deepcopy(model).eval(), inputs=(batch,), verbose=False)[0]) for batch in batches]
    except Exception as error:  # of other versions of torch and numpy, or a warning that is an error
        say_broken("thop", error)
        return None


def score(storage_bits: int, operation_bits: int) -> dict[str, float]:
    """The challenge's score and its two terms, {"storage": 32-bit parameters / 36.5M, "operations": 32-bit operations /
    10.49B, "score": their sum}, from bits: of storage, and count x bits of the operations for one image."""
    terms = {"storage": storage_bits / WORD / STORAGE_BASE, "operations": operation_bits / WORD / OPERATIONS_BASE}
    return terms | {"score": sum(terms.values())}


def summary(model: nn.Module, formats: Formats) -> dict:
    """What a claim says of a checkpoint, in plain containers: {"weights": see `weight_summary`, without its tensors;
    "storage": bits by kind; "operations": `totals` by convention; "score": both terms and their sum by convention}."""
    operations = read(model).operations
    stored = storage(model, formats, operations=operations)
    by = {convention: totals(count(operations, formats, convention)) for convention in CONVENTIONS}
    weights = {key: part for key, part in weight_summary(model).items() if key != "tensors"}
    return {"weights": weights, "storage": stored, "operations": by,
            "score": {convention: score(stored["total"], by[convention]["bits"]) for convention in CONVENTIONS}}


# ---- The values of the tensors --------------------------------------------------------------------

def tensor_rows(model: nn.Module, formats: Formats) -> list[dict]:
    """{"index", "name", "shape", "total", "zeros", "nonzeros", "bits", "kind"} of every parameter, as plain values.

    index: in the bit table; None for BatchNorms and biases. bits, kind: those of its Grid in `formats`.
    """
    index = {f"{name}.weight": i for i, (name, _) in enumerate(weight_layers(model))}
    rows = []
    for name, parameter in model.named_parameters():
        total, nonzeros = parameter.numel(), int(parameter.detach().count_nonzero())
        rows.append({"index": index.get(name), "name": name, "shape": list(parameter.shape), "total": total,
                     "zeros": total - nonzeros, "nonzeros": nonzeros,
                     "bits": formats.tensors[name].bits, "kind": formats.tensors[name].kind})
    return rows


# ---- By the submission's convention --------------------------------------------------------------

def submission_operations(operations: list[Operation], sparsity=0, bits: int = 16) -> dict[str, int]:
    """Operations as the submission reported them: 77.84M multiplications, 153.41M additions.

    By the organisers' counter: every convolution with a bias (its folded BatchNorm: an addition, but no multiplication)
    and a ReLU behind it, the shortcuts included; the linear layer with bias; neither residual additions nor the
    average. Mean density instead of non-zeros; multiplications at `bits` of 32, additions at 32. Exact integers (a
    total that is not whole is rounded up); "bits" is their weighted sum. Raises BadInput if the sparsity is not in
    [0, 1].
    """
    density = 1 - Fraction(sparsity)
    if not 0 <= density <= 1:
        raise BadInput(f"sparsity {sparsity} is not between 0 and 1")
    multiplications = additions = Fraction(0)
    for op in operations:
        if op.kind in ("conv", "linear"):
            multiplications += density * op.fan_in * op.outputs
            additions += (density * op.fan_in - 1) * op.outputs  # a dot product of n terms
            additions += op.outputs  # its bias
        if op.kind == "conv":
            multiplications += op.outputs  # its ReLU
    multiplications, additions = math.ceil(multiplications), math.ceil(additions)
    return {"multiplications": multiplications, "additions": additions, "multiplication_bits": multiplications * bits,
            "addition_bits": additions * WORD, "bits": multiplications * bits + additions * WORD}


def weight_summary(model: nn.Module) -> dict:
    """Zeros of every weight tensor, exactly, and the totals beside the submission's way of counting.

    {"tensors": [{"index", "name", "shape", "kind": conv|depthwise|linear, "total", "zeros", "nonzeros"}],
     "conv", "linear", "all": {"total", "zeros", "nonzeros", "sparsity", "compression" (None if all are zero)},
     "submission": the same, with a linear layer of 1280 x classes weights and zeros counted in convolutions alone}
    """
    tensors = []
    for index, (name, module) in enumerate(weight_layers(model)):
        weight = module.weight.detach()
        kind = "linear" if isinstance(module, nn.Linear) else "depthwise" if module.groups > 1 else "conv"
        nonzeros = int(weight.count_nonzero())
        tensors.append({"index": index, "name": f"{name}.weight", "shape": list(weight.shape), "kind": kind,
                        "total": weight.numel(), "zeros": weight.numel() - nonzeros, "nonzeros": nonzeros})

    def ratios(total, zeros):
        return {"total": total, "zeros": zeros, "nonzeros": total - zeros, "sparsity": zeros / total,
                "compression": total / (total - zeros) if zeros < total else None}

    def sums(rows):
        return sum(row["total"] for row in rows), sum(row["zeros"] for row in rows)

    convolutions = [row for row in tensors if row["kind"] != "linear"]
    linear = [row for row in tensors if row["kind"] == "linear"]
    total, zeros = sums(convolutions)
    constant = SUBMISSION_HEAD * len(weight_layers(model)[-1][1].weight)
    return {"tensors": tensors, "conv": ratios(total, zeros), "linear": ratios(*sums(linear)),
            "all": ratios(*sums(tensors)), "submission": ratios(total + constant, zeros)}


def compression_text(part: dict) -> str:
    """Return the compression in a part of a `weight_summary` with 4 decimals; if all weights are zero it has none."""
    return f"{part['compression']:.4f}" if part["nonzeros"] else "no bound"
