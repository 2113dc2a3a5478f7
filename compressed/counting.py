"""The rules of the MicroNet Challenge (NeurIPS 2019, CIFAR-100), one function per rule, in exact integers.

    score = parameter storage / 36.5M + operations / 10.49B

Storage: a b-bit value counts b/32; a sparse tensor is its non-zeros and one mask bit for every position.
Operations, for one image: a multiplication or addition counts the larger width of its two inputs/32; the inputs of an
addition have the width of the accumulator. Multiplications by zeros do not count if the tensor is stored with a
mask; without one, its zeros count like other values (see `layout`). Source: the challenge's rules and the organisers'
counter (google-research/micronet_challenge). Here all counts are in bits, as exact `int`; only `score`, `prices` and
what is printed divide by 32.

The operations are those that `torch.fx` finds in the network itself; what has no rule raises, because a skipped layer
flatters the score. Where the rules leave a choice, the costlier reading is usually taken (not for the storage of a
tensor, see `layout`, nor for the shift of a residual input, the upper clip of a ReLU's codes, or the width of what a
hard swish reads); reasons are in ACCOUNT.md and at `rule`. A pointwise function counts as its formula does (KAIST AI's
entry counted hard swish like this), although it may be looked up in a table, which is not stored: its entries follow
from the function and the steps. The length of an accumulator is counted by one of three conventions (the challenge's
table has a column for each):

- "32-bit": every addition has 32 bits.
- "fixed": per layer, the shortest length in which no sum of the stored codes can overflow, whatever the input and
  whatever the order of the additions (see `sum_bounds`). The layer's worst channel decides for all of its channels.
- "tree": a balanced binary tree whose first additions count the width of a product, the next one bit more, and so on up
  to 32 (see `tree_additions`). This is the submission's convention.
"""
import copy
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from compressed.cifar100 import IMAGE_SIZE
from compressed.command_line import say_broken
from compressed.errors import BadInput
from compressed.formats import WORD, Activation, Formats, Grid, exponent, float_formats, signed_bits, what_if
from compressed.graph import UNSIGNED, Operation, layer_kind, prepare, read_graph, weight_layers
from compressed.operations import CLIPS, FUNCTIONS, NORMALISATIONS

STORAGE_BASE, OPERATIONS_BASE = 36_500_000, 10_490_000_000  # WideResNet-28-10, in the same units
SUBMISSION_HEAD = 1280  # inputs of the linear layer in the submission's total of weights: those of width 1.0
CONVENTIONS = ("32-bit", "fixed", "tree")
NO_THOP = "thop's count: it is not installed, or does not work here (pip install -r requirements.txt)"


def macs(operations: list[Operation]) -> int:
    """Return the multiply-accumulates for one image of convolutions and linear layers, as if no weight were zero."""
    return sum(op.fan_in * op.outputs for op in operations if op.kind in ("conv", "linear"))


# ---- Accumulators --------------------------------------------------------------------------------

def tree_additions(terms: int, leaf_bits: int) -> Counter:
    """Return {bits: additions} of a balanced binary tree that adds `terms` numbers of `leaf_bits` bits.

    m numbers become ceil(m/2) by floor(m/2) additions; an odd one waits. By the rules an addition counts the larger
    width of its *inputs*: the first level `leaf_bits`, each further level one bit more, up to 32.

    >>> tree_additions(7, 16)
    Counter({16: 3, 17: 2, 18: 1})
    """
    additions, bits = Counter(), min(leaf_bits, WORD)
    while terms > 1:
        additions[bits] += terms // 2
        terms, bits = (terms + 1) // 2, min(bits + 1, WORD)
    return additions


def sum_bits(terms: int, leaf_bits: int) -> int:
    """Return the width of a sum of `terms` numbers of `leaf_bits` bits: a bit more for each level of the tree; 32 at
    most."""
    return min(WORD, leaf_bits + max(terms - 1, 0).bit_length())


def sum_bounds(codes: Tensor, activation: Activation) -> list[tuple[int, int]]:
    """Return the (lowest, highest) integer that the accumulator of each output channel can ever hold.

    codes: the weights', int64 [out, ...]. activation: the format of the layer's input. Partial sums stay within these
    bounds in any order, because the bounds add up the extreme of each product or 0. An input of extreme codes reaches
    them: no shorter accumulator is safe.

    >>> sum_bounds(torch.tensor([[3, -2, 1]]), Activation(8, signed=False))
    [(-510, 1020)]
    """
    low, high, rows = activation.low, activation.high, codes.flatten(1)
    positive, negative = rows.clamp(min=0).sum(1).tolist(), rows.clamp(max=0).sum(1).tolist()
    return [(p * low + n * high, p * high + n * low) for p, n in zip(positive, negative)]


def fixed_bits(weight: Tensor, grid: Grid, activation: Activation, terms: int | None = None) -> int:
    """Return the length of a layer's accumulator under "fixed": of its worst channel; 32 at most, and for any float.

    terms: of a what-if, whose codes are unknown: that many weights per channel, all of the most negative code.
    """
    if "float" in grid.kind or activation.bits >= WORD:
        return WORD
    if terms is None:
        bounds = sum_bounds(grid.codes(weight), activation)
    else:
        bound = terms * 2 ** (grid.bits - 1) * max(activation.high, -activation.low)
        bounds = [(-bound, bound)]
    return min(WORD, max(signed_bits(*each) for each in bounds))


# ---- The rules: what an operation multiplies and adds --------------------------------------------

@dataclass(frozen=True)
class Layout:
    """How a weight tensor is stored and used: with a mask, its non-zeros alone; without one, all of its values.

    terms: how many products each output channel adds up; in total, the number of stored values. bias: whether a bias is
    added. what_if: whether the terms are not those of the weights.
    """
    masked: bool
    terms: list[int]
    bias: bool = False
    what_if: bool = False


def layout(op: Operation, activation: Activation, formats: Formats, density: Fraction | None) -> Layout:
    """Return the cheaper of two layouts by the score: masked, with its zeros skipped; or dense, with its zeros counted.

    A network is stored once, so that its layout cannot depend on the accumulators: additions count 32 bits here.
    """
    weight, bits, positions = op.module.weight, formats.tensors[f"{op.name}.weight"].bits, op.outputs // op.channels
    bias = op.module.bias is not None and (density is not None or bool(op.module.bias.any()))
    layouts = [Layout(masked, terms_per_channel(weight, density if masked else Fraction(1)), bias,
                      density is not None)
               for masked in (False, True)]

    def cost(each: Layout) -> int:  # the score in units of 1 / (32 x STORAGE_BASE x OPERATIONS_BASE)
        stored = sum(each.terms) * bits + each.masked * weight.numel()
        operations = positions * sum(n * max(bits, activation.bits) + max(n - 1, 0) * WORD for n in each.terms)
        return stored * OPERATIONS_BASE + operations * STORAGE_BASE
    return min(layouts, key=cost)


def terms_per_channel(weight: Tensor, density: Fraction | None) -> list[int]:
    """Return the terms of the dot product of each output channel: its non-zeros, or a what-if density of all weights.

    A density is rounded up in each channel: with a layer's mean density, as in the organisers' counter, channels with
    few weights would have negative additions.
    """
    if density is None:
        return weight.detach().flatten(1).count_nonzero(1).tolist()
    return [math.ceil(density * weight[0].numel())] * len(weight)


def dot_products(op: Operation, activation: Activation, formats: Formats, convention: str, stored: Layout,
                 normed: bool):
    """Return {bits: multiplications}, {bits: additions} and the result's format of a convolution or linear layer.

    A dot product of n stored terms has n multiplications at max(weight bits, activation bits) and n - 1 additions at
    the accumulator's width (none if n is 0). A bias is one more addition, at 32 bits, because its step is not that of
    the products; a bias of zeros, as after folding into the next BatchNorm, adds nothing. If channels have different
    steps, or one that is no power of two, and no BatchNorm follows (normed) whose scales could absorb them, every
    output is multiplied by its step, at 32 bits.
    """
    weight, grid = op.module.weight, formats.tensors[f"{op.name}.weight"]
    product_bits, positions = min(WORD, grid.bits + activation.bits), op.outputs // op.channels
    if "float" in grid.kind:
        product_bits = WORD
    most = max(stored.terms)
    length = {"32-bit": WORD, "tree": sum_bits(most, product_bits)}.get(convention)
    if convention == "fixed":
        length = fixed_bits(weight, grid, activation, most if stored.what_if or not grid.steps else None)
    multiplications = Counter({max(grid.bits, activation.bits): sum(stored.terms) * positions})
    additions = Counter()
    for n, channels in Counter(stored.terms).items():
        sums = tree_additions(n, product_bits) if convention == "tree" else {length: max(n - 1, 0)}
        for bits, count in sums.items():
            additions[bits] += count * channels * positions
    if stored.bias:
        additions[WORD] += op.outputs
        length = WORD
        if None in map(exponent, formats.tensors[f"{op.name}.bias"].steps):  # a step that is no shift
            multiplications[WORD] += op.outputs
    if not normed and (len(set(grid.steps)) > 1 or None in map(exponent, grid.steps)):
        multiplications[WORD] += op.outputs
        length = WORD
    return multiplications, additions, Activation(length)


def rule(op: Operation, inputs: list[Activation], formats: Formats, convention: str, stored: Layout | None = None,
         normed: bool = False):
    """Return {bits: multiplications}, {bits: additions}, and the format of the result of an operation.

    inputs: the formats of what it reads. stored: its weights' Layout. normed: a BatchNorm, and nothing else, reads it.
    The result is as wide as it can become until the next activation point rounds it: a product of a- and b-bit numbers
    has a + b bits, a sum one more than the wider of its inputs, and nothing more than 32.
    """
    if op.kind in ("conv", "linear"):
        return dot_products(op, inputs[0], formats, convention, stored, normed)
    x = max((value.bits for value in inputs), default=WORD)
    plus, wide = min(WORD, x + 1), min(WORD, 2 * x + 1)  # widths of x + 3, and of (x + 3) times x
    added = WORD if convention == "32-bit" else x  # the width of an addition outside an accumulator
    multiplications, additions, bits = [], [], x  # widths of those per output element; width of the result
    match op.kind:
        case "batchnorm":  # a float16 scale counts its 16 bits, although its significand, which multiplies, has 11
            scale, shift = (formats.tensors[f"{op.name}.{part}"].bits for part in ("weight", "bias"))
            bits = WORD if convention == "32-bit" else min(WORD, max(x + scale, shift))
            multiplications, additions = [max(x, scale)], [bits]
            steps = [formats.tensors[f"{op.name}.{part}"].steps for part in ("weight", "bias")]
            if any(None in map(exponent, each) for each in steps):
                multiplications, bits = [*multiplications, WORD], WORD
        case "relu" | "sigmoid":  # at full width, before rounding; a transcendental function is one operation
            multiplications = [x]
        case "relu6":  # a lower and an upper clip
            multiplications = [x, x]
        case "hardsigmoid":  # min(max(x + 3, 0), 6) / 6: two clips, and the factor 1/6
            multiplications, additions, bits = [plus] * 3, [added], plus
        case "hardswish":  # the two clips, times x; the factor 1/6
            multiplications, additions, bits = [plus] * 3 + [wide], [added], wide
        case "silu":  # the sigmoid, times x
            multiplications, bits = [x, x], min(WORD, 2 * x)
        case "gelu":  # x (1 + erf(x / sqrt 2)) / 2: 1 / sqrt 2 and erf, times x; 1/2
            multiplications, additions, bits = [x, x, plus, wide], [added], wide
        case "product":
            multiplications, bits = [x], min(WORD, sum(value.bits for value in inputs))
        case "add":
            bits = WORD if convention == "32-bit" else plus
            additions = [bits]
        case "max":  # n - 1 comparisons
            multiplications = {x: op.fan_in - 1}
        case "mean":  # a multiplication by 1/n, although that may be a shift
            bits, additions = mean_additions(inputs[0], op.fan_in, convention)
            multiplications = [bits]
        case "scale":  # of the image, by constants
            multiplications = [x]
        case "shift":
            additions = [x]
        case "point" | "input" | "moved" | "concatenation" | "nothing":
            pass  # free; so is rounding to a grid whose values float32 holds exactly
        case _:
            raise BadInput(f"no counting rule for {op.name} ({op.kind})")
    signed = op.kind in ("input", "batchnorm", "add", *FUNCTIONS) or any(value.signed for value in inputs)
    result = Activation(bits, signed and op.kind not in (*CLIPS, *UNSIGNED))
    if op.kind in (*CLIPS, "point"):
        result = formats.activation(op.name, result.signed)
    return *(Counter({width: n * op.outputs for width, n in Counter(each).items()})
             for each in (multiplications, additions)), result


def mean_additions(value: Activation, n: int, convention: str) -> tuple[int, dict[int, int]]:
    """Return the width of the sum of n values, as wide as they need, and {bits: additions} that lead to it."""
    if convention == "tree":
        return sum_bits(n, value.bits), tree_additions(n, value.bits)
    length = min(WORD, signed_bits(n * value.low, n * value.high)) if convention == "fixed" else WORD
    return length, {length: n - 1}


# ---- Totals --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Row:
    """What one operation costs: {bits: count} of its multiplications and its additions, for one image.

    stored: the Layout of its weights, if it has any.
    """
    name: str
    kind: str
    outputs: int
    stored: Layout | None
    multiplications: Counter
    additions: Counter

    @property
    def bits(self) -> int:
        """Bits x count over all multiplications and additions; /32 are the challenge's operations."""
        return total_bits(self.multiplications) + total_bits(self.additions)


def total_bits(counts: dict[int, int]) -> int:
    return sum(bits * count for bits, count in counts.items())


def costs(operations: list[Operation], formats: Formats, convention: str, density: Fraction | None) -> Iterator[Row]:
    """Yield a row for every operation. The parameters are those of `count`."""
    values, reads = {}, Counter(key for op in operations for key in op.inputs)
    normed = {op.inputs[0] for op in operations if op.kind == "batchnorm" and reads[op.inputs[0]] == 1}
    for op in operations:
        inputs = [values[key] for key in op.inputs]
        stored = layout(op, inputs[0], formats, density) if op.kind in ("conv", "linear") else None
        multiplications, additions, values[op.key] = rule(op, inputs, formats, convention, stored, op.key in normed)
        yield Row(op.name, op.kind, op.outputs, stored, multiplications, additions)


def layouts(operations: list[Operation], formats: Formats, density: Fraction | None = None) -> dict[str, Layout]:
    """Return {name: Layout} of every convolution and linear layer among the operations (of `graph.read_graph`)."""
    return {row.name: row.stored for row in costs(operations, formats, "32-bit", density) if row.stored}


def count(operations: list[Operation], formats: Formats, convention: str, density: Fraction | None = None) -> list[Row]:
    """Return a row for every operation (of `graph.read_graph`) that multiplies or adds.

    density: None counts the weights' own non-zeros, and the zeros of a tensor without a mask (see `layout`); 1 counts
    as if no weight were zero; another fraction, a what-if, that share of every layer's weights, rounded up in each
    channel. Raises BadInput for an unknown convention, a density that is not in [0, 1], or, naming it, an operation
    without a rule.
    """
    if convention not in CONVENTIONS:
        raise BadInput(f"accumulator convention {convention!r} is none of {', '.join(CONVENTIONS)}")
    if density is not None and not 0 <= density <= 1:
        raise BadInput(f"density {density} is not between 0 and 1")
    return [row for row in costs(operations, formats, convention, density) if row.multiplications or row.additions]


def totals(rows: list[Row]) -> dict[str, int]:
    """Return the sums over rows: how many multiplications and additions, and their bits (/32: the operations)."""
    multiplications, additions = (sum((getattr(row, kind) for row in rows), Counter())
                                  for kind in ("multiplications", "additions"))
    found = {"multiplication_bits": total_bits(multiplications), "addition_bits": total_bits(additions)}
    return {"multiplications": multiplications.total(), "additions": additions.total(), **found,
            "bits": sum(found.values())}


def storage(model: nn.Module, operations: list[Operation], formats: Formats,
            density: Fraction | None = None) -> dict[str, int]:
    """Return the bits of every value that inference needs, by kind, and their "total". Layers that never run do not
    count.

    A weight tensor is stored dense (n b) or sparse (its non-zeros at b bits and one mask bit for each of its n
    positions), as `layout` says. A BatchNorm is a scale and shift per channel at their widths; with it counts what
    scales or shifts the image, 32 bits per channel. Every step (of a tensor, of a channel where channels have their
    own, of an activation point) counts 32 bits, although the exponent of a power of two would fit in 8. operations: of
    `graph.read_graph`. density: as in `count`.
    """
    stored, used = layouts(operations, formats, density), {op.name for op in operations}
    bits = dict.fromkeys(("weights", "masks", "batchnorm", "biases", "steps"), 0)
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        if layer not in used:
            continue
        n, grid = parameter.numel(), formats.tensors[name]
        bits["steps"] += WORD * (1 if grid.kind == "what if" else len(grid.steps))
        if kind == "weight" and layer in stored:
            bits["weights"] += sum(stored[layer].terms) * grid.bits
            bits["masks"] += n * stored[layer].masked
        else:
            norm = isinstance(model.get_submodule(layer), nn.BatchNorm2d)
            bits["batchnorm" if norm else "biases"] += n * grid.bits
    bits["batchnorm"] += WORD * sum(op.channels for op in operations if op.kind in NORMALISATIONS.values())
    places = [op.name for op in operations if op.module is not None and op.kind in (*CLIPS, "point")]
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
    except Exception as error:  # with other versions of torch or numpy, or a warning as an error
        say_broken("thop", error)
        return None


def score(storage_bits: int, operation_bits: int) -> dict[str, float]:
    """Return the challenge's score and its two terms.

    They are {"storage": 32-bit parameters / 36.5M, "operations": 32-bit operations / 10.49B, "score": their sum}.
    storage_bits: the "total" of `storage`; operation_bits: the "bits" of `totals`.
    """
    terms = {"storage": storage_bits / WORD / STORAGE_BASE, "operations": operation_bits / WORD / OPERATIONS_BASE}
    return terms | {"score": sum(terms.values())}


def prices(model: nn.Module) -> dict[str, float]:
    """Return {layer: score that one non-zero weight of it costs}, of a dense network with 32-bit accumulators.

    A weight costs its storage, and a multiplication and an addition for every position of the layer's output. Weights
    and activations have 8 bits.
    """
    model = prepare(copy.deepcopy(model))
    layers = dict(weight_layers(model))
    formats = what_if(float_formats(model), model, 8, 8)
    rows = count(read_graph(model).operations, formats, "32-bit", Fraction(1))
    return {row.name: score(8, row.bits / layers[row.name].weight.numel())["score"]
            for row in rows if row.name in layers}


def summary(model: nn.Module, formats: Formats, density: Fraction | None = None) -> dict:
    """Return the counts in a claim: {"weights": `weight_summary` without its tensors, "storage": bits by kind,
    "operations": {convention: `totals`}, "score": {convention: `score`}}.

    model: prepared (graph.prepare), as checkpoints.read returns it. formats: of its values, such as
    claims.stated_formats(model, claim), or the `formats` of checkpoints.read. density: as in `count`.
    """
    operations = read_graph(model).operations
    stored = storage(model, operations, formats, density)
    by = {convention: totals(count(operations, formats, convention, density)) for convention in CONVENTIONS}
    weights = {key: part for key, part in weight_summary(model).items() if key != "tensors"}
    return {"weights": weights, "storage": stored, "operations": by,
            "score": {convention: score(stored["total"], by[convention]["bits"]) for convention in CONVENTIONS}}


# ---- The values of the tensors --------------------------------------------------------------------

def _zeros(name: str, values: Tensor) -> dict:
    total, nonzeros = values.numel(), int(values.detach().count_nonzero())
    return {"name": name, "shape": list(values.shape), "total": total, "zeros": total - nonzeros, "nonzeros": nonzeros}


def tensor_rows(model: nn.Module, formats: Formats) -> list[dict]:
    """Return {"index", "name", "shape", "total", "zeros", "nonzeros", "bits", "kind"} of every parameter.

    index: in the bit table; None for BatchNorms and biases. bits, kind: those of its Grid in `formats`.
    """
    index = {f"{name}.weight": i for i, (name, _) in enumerate(weight_layers(model))}
    return [{"index": index.get(name)} | _zeros(name, parameter)
            | {"bits": formats.tensors[name].bits, "kind": formats.tensors[name].kind}
            for name, parameter in model.named_parameters()]


# ---- By the submission's convention --------------------------------------------------------------

def has_submissions_layers(model: nn.Module) -> bool:
    """Return True if a network has the 58 layers of the submission's, at any width."""
    names = [name for name, _ in weight_layers(model)]
    return len(names) == 58 and names[3] == "layers.0.conv3" and names[55:] == [
        "layers.16.shortcut.0", "conv2", "linear"]


def submission_operations(operations: list[Operation], sparsity=0) -> dict[str, int]:
    """Return the operations as the submission counted them, with the keys of `totals`.

    It reported 77.84M multiplications and 153.41M additions of a dense network. By the organisers' counter: every
    convolution, shortcuts included, has a bias (its folded BatchNorm: an addition, but no multiplication) and a ReLU,
    and the linear layer has a bias; neither residual additions nor the average count. A mean density takes
    the place of non-zeros; multiplications have 16 bits, additions 32. A total that is not whole is rounded up.
    """
    products = (1 - Fraction(sparsity)) * macs(operations)  # n terms: n - 1 additions, and that of the bias
    multiplications = math.ceil(products + sum(op.outputs for op in operations if op.kind == "conv"))
    additions = math.ceil(products)
    return {"multiplications": multiplications, "additions": additions, "multiplication_bits": multiplications * 16,
            "addition_bits": additions * WORD, "bits": multiplications * 16 + additions * WORD}


def weight_summary(model: nn.Module) -> dict:
    """Return the zeros of every weight tensor, and totals by our way of counting and by the submission's.

    {"tensors": [{"index", "name", "shape", "kind": conv|depthwise|linear, "total", "zeros", "nonzeros"}],
     "conv", "linear", "all": {"total", "zeros", "nonzeros", "sparsity", "compression" (None if all are zero)},
     "submission": the same, with a linear layer of 1280 x classes weights and zeros counted in convolutions alone; None
     for a network without the submission's layers}
    """
    def sums(rows: list[dict], more: int = 0) -> dict:
        total, zeros = more + sum(row["total"] for row in rows), sum(row["zeros"] for row in rows)
        left = total - zeros
        return {"total": total, "zeros": zeros, "nonzeros": left, "sparsity": zeros / total if total else 0.0,
                "compression": total / left if left else None}

    tensors = [{"index": index, "kind": layer_kind(layer)} | _zeros(f"{name}.weight", layer.weight)
               for index, (name, layer) in enumerate(weight_layers(model))]
    convolutions = [row for row in tensors if row["kind"] != "linear"]
    linear = [row for row in tensors if row["kind"] == "linear"]
    submission = None
    if has_submissions_layers(model):
        submission = sums(convolutions, SUBMISSION_HEAD * tensors[-1]["shape"][0])
    return {"tensors": tensors, "conv": sums(convolutions), "linear": sums(linear), "all": sums(tensors),
            "submission": submission}


def compression_text(part: dict) -> str:
    """Return the compression in a part of a `weight_summary` with 4 decimals; if all weights are zero it has none."""
    return f"{part['compression']:.4f}" if part["nonzeros"] else "no bound"
