"""The rules of the MicroNet Challenge (NeurIPS 2019, CIFAR-100), one small function a rule, in exact integers.

    score = parameter storage / 36.5M + operations / 10.49B

Storage: a b-bit value counts b/32; a sparse tensor is its non-zeros and one mask bit for every position.
Operations, for one image: a multiplication counts max(bits of its two inputs)/32, an addition its accumulator's
bits/32. Multiplications by stored zeros do not count. Source: the challenge's rules and the organisers' counter
(google-research/micronet_challenge). Here everything is counted in bits, as `int`: divide by 32 only to print.

The operations are those that `torch.fx` finds in the network itself; whatever this file has no rule for raises, because
a skipped layer flatters the score. Where the rules leave a choice, the dearer one is taken and the reason given:

- A dot product of n stored non-zeros is n multiplications and n - 1 additions; padding counts as data.
- BatchNorm is, folded, one scale and one shift a channel: a multiplication and an addition for every output element.
- ReLU is a multiplication of the value *before* it is rounded to the next activation's width, so at full width.
- A residual addition is an addition at full width, too; an average of n values is n - 1 additions and a multiplication,
  although a multiplication by 1/16 is a shift.
- Rounding and clipping to an activation's grid neither multiply nor add: with steps that are powers of two they shift.

An accumulator's length is counted by one of three conventions (the challenge's table has a column for each):

- "32-bit": every addition has 32 bits.
- "fixed": one length a layer, the shortest in which no sum of the stored codes can overflow, whatever the input and
  whatever the order of the additions (see `reach`). The layer's worst channel decides for all of its channels.
- "tree": a balanced binary tree whose first additions count the width of a product, the next one bit more, and so on up
  to 32 (see `tree_additions`). This is the submission's convention.
"""
import math
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import nn

from graph import Operation, is_point, trace
from mobilenet_v2 import HEAD_WIDTH, BadInput, MobileNetV2, weight_layers

WORD = 32  # the rules count in 32-bit parameters and 32-bit operations
STORAGE_BASE, OPERATIONS_BASE = 36_500_000, 10_490_000_000  # WideResNet-28-10, in the same units
CONVENTIONS = ("32-bit", "fixed", "tree")


# ---- The widths of stored numbers, found by looking at their values ------------------------------

INTEGER_BITS = 16  # beyond this, values on a grid with a power-of-two step are floating-point numbers like any other
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
EVEN_BITS = 8  # beyond this, float32 cannot tell a step that is no power of two from chance
EVEN_TOLERANCE = 2.0**-22  # of a value: the roundings of two float32 numbers, 2^-24 each, and some slack


@dataclass(frozen=True)
class Grid:
    """How the values of a tensor are stored: `bits` a value, as integer codes times a step.

    steps: one for the tensor, one for each output channel (row), or none: floating point, or a what-if.
    kind: "power of two", "even", "per channel", "zero", "float16", "bfloat16", "float32", "claimed", "what if".
    """
    bits: int
    steps: tuple[float, ...] = ()
    kind: str = "float32"

    def codes(self, values: torch.Tensor) -> torch.Tensor:
        """The integers (int64, shape of `values`) that stand for the values. Needs steps."""
        steps = torch.tensor(self.steps, dtype=torch.float64).reshape(-1, *[1] * (values.dim() - 1))
        return (values.detach().double() / steps).round().long()


def signed_bits(low: int, high: int) -> int:
    """Length of the shortest two's-complement number that holds every integer from `low` to `high`; at least 1."""
    return max(max(high, 0).bit_length(), max(~low, 0).bit_length()) + 1  # ~low = -low - 1: the lowest code is spare


def _power_of_two(values: torch.Tensor) -> Grid | None:
    """The coarsest grid with a power-of-two step on which the values (float64, none zero) stand exactly."""
    fraction, exponent = torch.frexp(values)
    significand = (fraction * 2.0**53).long()  # exact: a float64 has 53 bits
    lowest = torch.frexp((significand & -significand).double())[1] - 1  # position of the lowest bit that is set
    finest = int((exponent - 53 + lowest).min())
    if int(exponent.max()) - finest > INTEGER_BITS:
        return None
    codes = values * 2.0**-finest
    bits = signed_bits(int(codes.min()), int(codes.max()))
    return Grid(bits, (2.0**finest,), "power of two") if bits <= INTEGER_BITS else None


def _even(values: torch.Tensor) -> Grid | None:
    """The coarsest grid with any step, of at most 8 bits, on which the values (float64, none zero) stand.

    The largest magnitude may have any code (a tensor need not use its extreme codes), so each is tried.
    """
    def fits(scaled):
        return ((scaled - scaled.round()).abs() <= scaled.abs() * EVEN_TOLERANCE).all(-1)

    top, tops = values.abs().max(), torch.arange(1, 2**(EVEN_BITS - 1) + 1)
    few = values[::len(values) // 64 + 1]  # most wrong steps show within a few values
    for code in tops[fits(few * (tops / top)[:, None])].tolist():
        scaled = values * (code / top)
        if fits(scaled):
            bits = signed_bits(round(scaled.min().item()), round(scaled.max().item()))
            return Grid(bits, ((top / code).item(),), "even") if bits <= EVEN_BITS else None
    return None


def _one_step(values: torch.Tensor) -> Grid | None:
    """The grid of values with one step for all, or None."""
    values = values[values != 0].double()
    return (_power_of_two(values) or _even(values)) if len(values) else Grid(1, (1.0,), "zero")


def _per_channel(rows: torch.Tensor) -> Grid | None:
    """A grid for each row; its bits are those of the worst row. Stops at the first row that stands on none."""
    grids = []
    for row in rows:
        grids.append(_one_step(row))
        if grids[-1] is None:
            return None
    return Grid(max(grid.bits for grid in grids), tuple(grid.steps[0] for grid in grids), "per channel")


def found_grid(tensor: torch.Tensor) -> Grid:
    """The narrowest format in which the tensor's values can be stored, found in the values alone.

    Tried in this order: signed integer codes (-2^(b-1) to 2^(b-1) - 1) times one power-of-two step for the tensor,
    exactly, up to 16 bits; times any one step, up to float32 rounding, up to 8 bits; times a step for each row (tensors
    of two or more dimensions); float16; bfloat16; float32. A tensor of zeros alone counts 1 bit. A channel's step is
    stored, so `storage` counts it. Raises BadInput if a value is not finite.
    """
    values = tensor.detach()
    if not all(math.isfinite(value) for value in (values.min(), values.max())):  # both are nan if any value is
        raise BadInput("a tensor holds values that are not finite")
    grid = _one_step(values.flatten())
    if grid is None and tensor.dim() > 1:
        grid = _per_channel(values.flatten(1))
    if grid is not None:
        return grid
    return next((Grid(16, kind=kind) for kind in HALVES if is_half(values, kind)), Grid(WORD))


def is_half(values: torch.Tensor, kind: str) -> bool:
    """Whether every value is exactly one of the 16-bit floating-point numbers "float16" or "bfloat16"."""
    return bool((values.to(HALVES[kind]).to(values.dtype) == values).all())


@dataclass(frozen=True)
class Activation:
    """Integers of `bits` that flow between two layers; 32 stands for float32 as well."""
    bits: int = WORD
    signed: bool = True

    @property
    def low(self) -> int:
        return -2 ** (self.bits - 1) if self.signed else 0

    @property
    def high(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1


@dataclass(frozen=True)
class Formats:
    """The format of every number of a network: a Grid a parameter, an Activation an activation point.

    A point that `activations` does not name has `activation_bits` bits, unsigned after a ReLU, otherwise signed.
    """
    tensors: dict[str, Grid]
    activations: dict[str, Activation] = field(default_factory=dict)
    activation_bits: int = WORD

    def activation(self, name: str, signed: bool) -> Activation:
        return self.activations.get(name, Activation(self.activation_bits, signed))


def is_folded(norm: nn.BatchNorm2d) -> bool:
    """Whether the normalisation is the identity (up to a float32 rounding), so that weight and bias say it all."""
    off = (norm.running_var.double() + norm.eps - 1).abs().max().item()
    return not norm.running_mean.any() and off <= 2.0**-23


def found_formats(model: nn.Module, activation_bits: int = WORD) -> Formats:
    """Formats found in the values of every parameter.

    Folding a BatchNorm whose statistics are not folded yet leaves two values a channel as well, but float32 ones,
    whatever grid its weight and bias stand on. Raises BadInput, naming the tensor, if a value is not finite.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        loose = isinstance(module, nn.BatchNorm2d) and not is_folded(module)
        try:
            tensors[name] = Grid(WORD) if loose else found_grid(parameter)
        except BadInput as error:
            raise BadInput(f"{name}: {error}") from error
    return Formats(tensors, activation_bits=activation_bits)


def what_if(formats: Formats, model: nn.Module, weight_bits: int | None, activation_bits: int | None) -> Formats:
    """`formats` with other widths for all weights of convolutions and linear layers, or for all activations.

    BatchNorm and biases stay as they are. Without codes, "fixed" accumulators assume that every code is extreme.
    """
    tensors = dict(formats.tensors)
    if weight_bits is not None:
        tensors |= {f"{name}.weight": Grid(weight_bits, kind="what if") for name, _ in weight_layers(model)}
    if activation_bits is not None:
        return Formats(tensors, {}, activation_bits)
    return Formats(tensors, formats.activations, formats.activation_bits)


def float_formats(model: nn.Module) -> Formats:
    """Every number a float32: the baseline, and the start of a what-if without a checkpoint."""
    return Formats({name: Grid(WORD) for name, _ in model.named_parameters()})


def macs(operations: list[Operation]) -> int:
    """Multiply-accumulates of the dense convolutions and linear layers for one image."""
    return sum(op.fan_in * op.outputs for op in operations if op.kind in ("conv", "linear"))


# ---- Accumulators --------------------------------------------------------------------------------

def tree_additions(terms: int, leaf_bits: int) -> Counter:
    """{bits: additions} of a balanced binary tree that adds `terms` numbers of `leaf_bits` bits; terms - 1 in all.

    m numbers become ceil(m/2) by floor(m/2) additions; an odd one waits. An addition counts the width of its *inputs*:
    the first level `leaf_bits`, each further level one bit more, up to 32. So the submission counted, so the table of
    the challenge does; it is slightly optimistic, because a sum can have one bit more than its inputs.
    """
    additions, bits = Counter(), min(leaf_bits, WORD)
    while terms > 1:
        additions[bits] += terms // 2
        terms, bits = (terms + 1) // 2, min(bits + 1, WORD)
    return additions


def sum_bits(terms: int, leaf_bits: int) -> int:
    """Width of the sum of `terms` numbers of `leaf_bits` bits, up to 32: a bit more for each level of the tree."""
    return min(WORD, leaf_bits + max(terms - 1, 0).bit_length())


def reach(weight: torch.Tensor, grid: Grid, activation: Activation, terms: int) -> tuple[int, int]:
    """(lowest, highest) integer that an accumulator of the layer can ever hold, over all inputs and channels.

    Each product's extreme is taken by itself, so partial sums stay within these bounds in any order. The final extremes
    are reached by an input of extreme codes: no shorter accumulator is safe. Without steps (a what-if), `terms` weights
    a channel with the most negative code stand for the codes that nobody knows.
    """
    if not grid.steps:
        bound = terms * 2 ** (grid.bits - 1) * max(activation.high, -activation.low)
        return -bound, bound
    codes = grid.codes(weight).flatten(1)
    positive = codes.clamp(min=0).sum(1)
    positive, negative = positive.tolist(), (codes.sum(1) - positive).tolist()
    return (min(p * activation.low + n * activation.high for p, n in zip(positive, negative)),
            max(p * activation.high + n * activation.low for p, n in zip(positive, negative)))


def fixed_bits(weight: torch.Tensor, grid: Grid, activation: Activation, terms: int) -> int:
    """Length of a layer's accumulator under "fixed"; 32 if weights or activations are floating point, at most 32."""
    if "float" in grid.kind or activation.bits >= WORD:
        return WORD
    return min(WORD, signed_bits(*reach(weight, grid, activation, terms)))


# ---- The rules: what an operation multiplies and adds --------------------------------------------
# Each takes (operation, the formats of its inputs, all formats, convention, density) and returns
# ({bits: multiplications}, {bits: additions}, the format of its output until the next activation point).

def terms_per_channel(weight: torch.Tensor, density: Fraction | None) -> list[int]:
    """Terms of the dot product of each output channel: its own non-zeros, or a what-if density of all, rounded up.

    Channels are counted one by one: with a layer's mean density, as in the organisers' counter, thin channels would
    have less than no additions.
    """
    if density is None:
        return weight.detach().flatten(1).count_nonzero(1).tolist()
    return [math.ceil(density * weight[0].numel())] * len(weight)


def dot_products(op: Operation, inputs, formats: Formats, convention: str, density):
    """n terms: n multiplications at max(weight bits, activation bits) and n - 1 additions at the accumulator's width;
    none for a channel without weights. A bias is one more addition, at 32 bits: its step is not the products'."""
    weight, grid, activation = op.module.weight, formats.tensors[f"{op.name}.weight"], inputs[0]
    product_bits = min(WORD, grid.bits + activation.bits)
    terms = Counter(terms_per_channel(weight, density))
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
    if op.module.bias is not None:
        additions[WORD] += op.outputs
        length = WORD
    return multiplications, additions, Activation(length)


def batchnorm(op: Operation, inputs, formats: Formats, convention: str, density):
    """Folded: the accumulator times the channel's scale, plus its shift. A product of a- and b-bit numbers has a + b
    bits; the shift is added to it at that width, up to 32 (with 16-bit scales in practice always 32). A float16 scale
    counts its 16 bits, although its significand, which is what multiplies, has 11."""
    scale, shift = formats.tensors[f"{op.name}.weight"].bits, formats.tensors[f"{op.name}.bias"].bits
    wide = min(WORD, max(inputs[0].bits + scale, shift))
    return Counter({max(inputs[0].bits, scale): op.outputs}), Counter({wide: op.outputs}), Activation(wide)


def relu(op: Operation, inputs, formats: Formats, convention: str, density):
    """One multiplication an element, by the rules, at the width that the value has before it is rounded."""
    return Counter({inputs[0].bits: op.outputs}), Counter(), formats.activation(op.name, signed=False)


def residual(op: Operation, inputs, formats: Formats, convention: str, density):
    """One addition an element; a sum has one bit more than the wider of its inputs, up to 32."""
    bits = WORD if convention == "32-bit" else min(WORD, max(value.bits for value in inputs) + 1)
    return Counter(), Counter({bits: op.outputs}), Activation(bits)


def mean(op: Operation, inputs, formats: Formats, convention: str, density):
    """n values: n - 1 additions, and a multiplication of the sum by 1/n. The sum is as wide as its n inputs need."""
    value, n = inputs[0], op.fan_in
    if convention == "tree":
        length, sums = sum_bits(n, value.bits), tree_additions(n, value.bits)
    else:
        length = min(WORD, signed_bits(n * value.low, n * value.high)) if convention == "fixed" else WORD
        sums = {length: n - 1}
    additions = Counter({bits: count * op.outputs for bits, count in sums.items()})
    return Counter({length: op.outputs}), additions, Activation(length, value.signed)


def point(op: Operation, inputs, formats: Formats, convention: str, density):
    """An activation point costs nothing: values are rounded to the grid that the next layers read."""
    return Counter(), Counter(), formats.activation(op.name, inputs[0].signed)


def image(op: Operation, inputs, formats: Formats, convention: str, density):
    """The network's input, in float32 until a point rounds it. Its normalisation is preprocessing, not counted."""
    return Counter(), Counter(), Activation()


RULES = {"conv": dot_products, "linear": dot_products, "batchnorm": batchnorm, "relu": relu, "add": residual,
         "mean": mean, "point": point, "input": image}


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

    density: None counts the weights' own non-zeros; 1 counts as if no weight were zero; another fraction, a what-if,
    that share of every layer's weights, rounded up in each channel. Raises BadInput for an unknown convention or a
    density that is not in [0, 1].
    """
    if convention not in CONVENTIONS:
        raise BadInput(f"accumulator convention {convention!r} is none of {', '.join(CONVENTIONS)}")
    if density is not None and not 0 <= density <= 1:
        raise BadInput(f"density {density} is not between 0 and 1")
    rows, values = [], {}
    for op in operations:
        inputs = [values[key] for key in op.inputs]
        multiplications, additions, values[op.key] = RULES[op.kind](op, inputs, formats, convention, density)
        if op.kind not in ("point", "input"):
            rows.append(Row(op.name, op.kind, op.outputs, multiplications, additions))
    return rows


def totals(rows: list[Row]) -> dict[str, int]:
    """Sums over rows: counts of multiplications and additions, and their bits (count x bits; /32 are operations)."""
    return {"multiplications": sum(sum(row.multiplications.values()) for row in rows),
            "additions": sum(sum(row.additions.values()) for row in rows),
            "multiplication_bits": sum(row.multiplication_bits for row in rows),
            "addition_bits": sum(row.addition_bits for row in rows),
            "bits": sum(row.bits for row in rows)}


def storage(model: nn.Module, formats: Formats, density: Fraction | None = None) -> dict[str, int]:
    """Bits of every value that inference needs, by kind, and "total".

    A weight tensor is stored dense (n b) or sparse (its non-zeros at b bits and one mask bit for each of its n
    positions), whichever is shorter. A BatchNorm is a scale and a shift a channel at their widths. Every step (of a
    tensor, of a channel where channels have their own, of an activation point) counts 32 bits, although the exponent
    of a power of two would do with 8. density: as in `count`.
    """
    weights = {f"{name}.weight" for name, _ in weight_layers(model)}
    bits = dict.fromkeys(("weights", "masks", "batchnorm", "biases", "steps"), 0)
    for name, parameter in model.named_parameters():
        n, grid = parameter.numel(), formats.tensors[name]
        bits["steps"] += WORD * len(grid.steps) if grid.kind != "what if" else WORD
        if name in weights:
            nonzeros = sum(terms_per_channel(parameter, density))
            sparse = nonzeros * grid.bits + n < n * grid.bits
            bits["weights"] += (nonzeros if sparse else n) * grid.bits
            bits["masks"] += n if sparse else 0
        else:
            norm = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.BatchNorm2d)
            bits["batchnorm" if norm else "biases"] += n * grid.bits
    places = [name for name, module in model.named_modules() if is_point(module)]
    bits["steps"] += WORD * sum(formats.activation(name, True).bits < WORD for name in places)
    return bits | {"total": sum(bits.values())}


def score(storage_bits: int, operation_bits: int) -> tuple[float, float]:
    """The two terms whose sum is the challenge's score: 32-bit parameters / 36.5M and 32-bit operations / 10.49B.

    Both arguments are bits: of storage, and count x bits of the operations for one image.
    """
    return storage_bits / WORD / STORAGE_BASE, operation_bits / WORD / OPERATIONS_BASE


def summary(model: MobileNetV2, formats: Formats) -> dict:
    """What a claim says of a checkpoint, in plain containers: {"weights": see `weight_summary`, without its tensors;
    "storage": bits by kind; "operations": `totals` by convention; "score": both terms and their sum by convention}."""
    operations, stored = trace(model), storage(model, formats)
    by = {convention: totals(count(operations, formats, convention)) for convention in CONVENTIONS}
    weights = {key: part for key, part in weight_summary(model).items() if key != "tensors"}
    return {"weights": weights, "storage": stored, "operations": by,
            "score": {convention: scored(stored["total"], by[convention]["bits"]) for convention in CONVENTIONS}}


def scored(storage_bits: int, operation_bits: int) -> dict[str, float]:
    """`score` by name: {"storage", "operations", "score": their sum}."""
    terms = score(storage_bits, operation_bits)
    return {"storage": terms[0], "operations": terms[1], "score": sum(terms)}


# ---- The values of the tensors --------------------------------------------------------------------

def tensor_rows(model: MobileNetV2, formats: Formats) -> list[dict]:
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


def weight_summary(model: MobileNetV2) -> dict:
    """Zeros of every weight tensor, exactly, and the totals beside the submission's way of counting.

    {"tensors": [{"index", "name", "shape", "kind": conv|depthwise|linear, "total", "zeros", "nonzeros"}],
     "conv", "linear", "all": {"total", "zeros", "nonzeros", "sparsity", "compression"},
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
                "compression": total / (total - zeros) if zeros < total else math.inf}

    def sums(rows):
        return sum(row["total"] for row in rows), sum(row["zeros"] for row in rows)

    convolutions = [row for row in tensors if row["kind"] != "linear"]
    linear = [row for row in tensors if row["kind"] == "linear"]
    total, zeros = sums(convolutions)
    constant = HEAD_WIDTH * model.linear.out_features  # the linear layer of width 1.0; ours has 1664 inputs, not 1280
    return {"tensors": tensors, "conv": ratios(total, zeros), "linear": ratios(*sums(linear)),
            "all": ratios(*sums(tensors)), "submission": ratios(total + constant, zeros)}
