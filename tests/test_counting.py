import copy
import itertools
import json
import math
import random
from collections import Counter
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import check_model_operations
import testers
from compressed import counting
from compressed.counting import (
    CONVENTIONS,
    count,
    fixed_bits,
    layouts,
    score,
    storage,
    sum_bits,
    sum_bounds,
    terms_per_channel,
    totals,
    tree_additions,
)
from compressed.errors import BadInput
from compressed.formats import (
    NOT_FOLDED,
    Activation,
    Formats,
    Grid,
    float_formats,
    found_formats,
    found_grid,
    signed_bits,
)
from compressed.graph import Operation, prepare, read_graph, trace, weight_layers
from compressed.networks import save_state
from mobilenet_v2 import MobileNetV2, SmallMobileNetV2


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return MobileNetV2().eval()


@pytest.fixture(scope="module")
def operations(network):
    return trace(network)


def folded(model: nn.Module) -> nn.Module:
    """The model with BatchNorms whose normalisation is the identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.zero_()
            module.running_var.fill_(1 - module.eps)
    return model.eval()


# ---- The figures of the submission, to the digit -------------------------------------------------

@pytest.mark.parametrize("sparsity, multiplications, additions, text", (
    (0, 155_691_776, 153_407_488, "77.846 + 153.407 = 231.253"),
    (0.5, 78_988_032, 76_703_744, "39.494 + 76.704 = 116.198")))
def test_the_submissions_operations(operations, sparsity, multiplications, additions, text):
    found = counting.submission_operations(operations, sparsity)
    assert (found["multiplications"], found["additions"]) == (multiplications, additions)
    bits = multiplications * 16, additions * 32
    assert (found["multiplication_bits"], found["addition_bits"], found["bits"]) == (*bits, sum(bits))
    assert "{:.3f} + {:.3f} = {:.3f}".format(*(n / 32e6 for n in (*bits, sum(bits)))) == text


def test_network_figures(network, operations):
    assert counting.macs(operations) == 153_407_488
    kinds = Counter(op.kind for op in operations)
    assert kinds == {"conv": 57, "batchnorm": 57, "relu": 36, "add": 14, "mean": 1, "linear": 1, "point": 19,
                     "input": 1}
    assert sum(op.outputs for op in operations if op.kind == "batchnorm") == 2_284_288
    assert len(read_graph(network).activation_points) == 55
    names = [name for name, _ in weight_layers(network)]
    assert [op.name for op in operations if op.kind in ("conv", "linear")] == names
    assert {"layers.0.add", "mean", "layers.16.shortcut.0"} <= {op.name for op in operations}


def test_weight_summary(network):
    model = copy.deepcopy(network)
    with torch.no_grad():
        model.conv1.weight[:3] = 0  # 3 x 27 zeros
        model.linear.weight[0] = 0  # 1664 zeros
    summary = counting.weight_summary(model)
    assert len(summary["tensors"]) == 58 and summary["tensors"][57]["name"] == "linear.weight"
    assert summary["tensors"][0] == {"index": 0, "name": "conv1.weight", "shape": [40, 3, 3, 3], "kind": "conv",
                                     "total": 1080, "zeros": 81, "nonzeros": 999}
    zeros = [row["zeros"] for row in summary["tensors"]]
    rest = sum(zeros[1:57])  # random weights can be zero by chance, far too seldom to matter here
    assert summary["conv"]["total"] == 3_777_632 and summary["conv"]["zeros"] == 81 + rest
    assert summary["all"]["total"] == 3_944_032 and summary["all"]["zeros"] == 81 + rest + zeros[57]
    assert summary["submission"]["total"] == 3_905_632 and summary["submission"]["zeros"] == 81 + rest
    formats = float_formats(model)
    rows = counting.tensor_rows(model, formats)
    assert [row["index"] for row in rows if row["index"] is not None] == list(range(58)) and len(rows) == 173
    assert rows[0] == {"index": 0, "name": "conv1.weight", "shape": [40, 3, 3, 3], "total": 1080, "zeros": 81,
                       "nonzeros": 999, "bits": 32, "kind": "float32"}
    assert rows[1]["name"] == "bn1.weight" and rows[1]["index"] is None
    whole, operations = counting.summary(model, formats), read_graph(model).operations
    assert json.loads(json.dumps(whole)) == whole and whole["storage"] == storage(model, operations, formats)
    assert whole["weights"]["all"] == summary["all"] and "tensors" not in whole["weights"]
    for c in CONVENTIONS:
        assert whole["score"][c]["score"] == sum(whole["score"][c][term] for term in ("storage", "operations"))


def test_submission_sparsity(network):
    model, left = copy.deepcopy(network), 3_005_523
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
        for _, layer in weight_layers(model)[:57]:
            layer.weight.view(-1)[:left] = 0
            left -= min(left, layer.weight.numel())
    summary = counting.weight_summary(model)
    theirs = summary["submission"]
    assert (theirs["total"], theirs["zeros"], theirs["nonzeros"]) == (3_905_632, 3_005_523, 900_109)
    assert f"{theirs['sparsity']:.4f}" == "0.7695" and f"{theirs['compression']:.4f}" == "4.3391"
    assert summary["all"]["total"] == 3_944_032 and summary["all"]["nonzeros"] == 3_944_032 - 3_005_523


def test_the_submissions_convention_is_of_its_network_alone(tmp_path, capsys):
    """Its total replaces the linear layer by that of one network, so no other network has one."""
    model = SmallMobileNetV2()
    summary = counting.weight_summary(model)
    assert summary["submission"] is None and summary["all"]["total"] == 592_776 + 648
    save_state(model.state_dict(), tmp_path / "f.pt")
    line = ["--checkpoint", str(tmp_path / "f.pt"), "--network", "mobilenet_v2:SmallMobileNetV2"]
    assert testers.main([*line, "--made-up", "2"]) == check_model_operations.main([*line, "--summary"]) == 0
    said = capsys.readouterr().out
    assert "linear alone, exact" in said and "(ACCOUNT.md)" not in said and "compression 4" not in said


def test_trace_leaves_the_model_alone(network):
    model = copy.deepcopy(network).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trace(model)
    assert model.training and all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


# ---- Accumulators --------------------------------------------------------------------------------

@pytest.mark.parametrize("terms, expected", [
    (0, {}), (1, {}), (2, {16: 1}), (3, {16: 1, 17: 1}), (7, {16: 3, 17: 2, 18: 1}), (8, {16: 4, 17: 2, 18: 1}),
    (9, {16: 4, 17: 2, 18: 1, 19: 1})])
def test_tree_by_hand(terms, expected):
    assert tree_additions(terms, 16) == expected


def test_tree_properties():
    for terms in range(1, 300):
        tree, width = tree_additions(terms, 14), sum_bits(terms, 14)
        assert sum(tree.values()) == terms - 1
        assert width == 14 + math.ceil(math.log2(terms)) and max(tree, default=13) == width - 1
    assert max(tree_additions(5000, 28)) == 32 and sum_bits(5000, 28) == 32 and set(tree_additions(9, 40)) == {32}


@pytest.mark.parametrize("low, high, bits", [(0, 0, 1), (-1, 0, 1), (0, 1, 2), (-2, 1, 2), (-3, 0, 3), (-128, 127, 8),
                                             (-128, 128, 9), (-129, 0, 9), (0, 255, 9), (5, 7, 4),
                                             (-1, -1, 1), (-8, -3, 4)])
def test_signed_bits(low, high, bits):
    assert signed_bits(low, high) == bits


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("codes", [[[3, -2, 1]], [[0, 0, 0]], [[-4, -4, -4]], [[1, 1, 0], [-3, 2, 3]], [[3, 3, 3]]])
def test_fixed_accumulator_by_brute_force(codes, signed):
    activation, step = Activation(2, signed), 0.25
    weight = torch.tensor(codes).float()[:, :, None, None] * step
    seen = {0}
    for row in codes:
        for inputs in itertools.product(range(activation.low, activation.high + 1), repeat=3):
            for order in itertools.permutations(range(3)):
                seen |= set(itertools.accumulate(row[i] * inputs[i] for i in order))
    grid = Grid(3, (step,), "power of two")
    bounds = sum_bounds(grid.codes(weight), activation)
    assert len(bounds) == len(codes)
    # reached, never left
    assert (min(low for low, _ in bounds), max(high for _, high in bounds)) == (min(seen), max(seen))
    bits = fixed_bits(weight, grid, activation)
    assert all(-2 ** (bits - 1) <= value < 2 ** (bits - 1) for value in seen)
    assert bits == 1 or not all(-2 ** (bits - 2) <= value < 2 ** (bits - 2) for value in seen)  # a bit less overflows


def test_a_what_if_does_not_know_the_codes():
    """As if no weight were zero, the accumulators are as long as they may have to be then."""
    model = nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 3, bias=False))
    model[1].weight.data.zero_().view(-1)[:4] = torch.tensor([1.0, -8, 3, 2])
    formats = Formats({"1.weight": Grid(4, (1.0,), "even")}, activation_bits=8)
    own, dense = (count(trace(model, (3, 8, 8)), formats, "fixed", density)[0] for density in (None, Fraction(1)))
    assert set(own.additions) == {signed_bits(-14 * 128, 14 * 128)}
    assert set(dense.additions) == {signed_bits(-27 * 8 * 128, 27 * 8 * 128)}


def test_fixed_without_codes():
    weight = torch.ones(2, 4, 1, 1)
    assert fixed_bits(weight, Grid(32), Activation(8), 4) == 32
    assert fixed_bits(weight, Grid(16, kind="float16"), Activation(8), 4) == 32
    assert fixed_bits(weight, Grid(8, (1.0,), "even"), Activation(32), 4) == 32
    extreme = 4 * 128 * 255
    assert fixed_bits(weight, Grid(8, kind="what if"), Activation(8, False), 4) == signed_bits(-extreme, extreme)
    assert fixed_bits(weight, Grid(16, kind="what if"), Activation(16, False), 4) == 32


def test_sums_of_floats_are_floats():
    """A product of a float16 is no code of 16 + 8 bits: it is added at full width under every convention."""
    model = nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 3, bias=False))
    formats = Formats({"1.weight": Grid(16, kind="float16")}, activation_bits=8)
    assert all(set(count(trace(model, (3, 8, 8)), formats, convention)[0].additions) == {32}
               for convention in counting.CONVENTIONS)


# ---- Widths found in the values ------------------------------------------------------------------

@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8, 12, 16])
@pytest.mark.parametrize("extreme", [True, False])
def test_power_of_two_grids(bits, extreme):
    generator = torch.Generator().manual_seed(bits)
    low, high = -2 ** (bits - 1), 2 ** (bits - 1) - 1
    for exponent in (-12, 0, 3):
        codes = torch.randint(low, high + 1, (7, 5, 3, 3), generator=generator)
        codes[0, 0, 0, 0] = 1  # an odd code: the step cannot be coarser
        if extreme:
            codes[1, 0, 0, 0] = low
        else:
            codes.clamp_(low + 1, max(high - 1, 1))
        values = codes.float() * 2.0**exponent
        grid = found_grid(values)
        assert grid.kind == "power of two" and torch.equal(grid.codes(values).double() * grid.steps[0], values.double())
        assert grid.bits == signed_bits(int(codes.min()), int(codes.max())) and grid.steps == (2.0**exponent,)


def test_even_and_per_channel_grids():
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-100, 90, (6, 40), generator=generator)  # avoids the extreme codes of 8 bits
    codes[0, 0], codes[1, 0], codes[2, 0] = 1, -100, 99
    values = codes.float() * torch.tensor(0.0371)
    grid = found_grid(values)
    assert (grid.bits, grid.kind) == (8, "even") and math.isclose(grid.steps[0], 0.0371, rel_tol=1e-6)
    assert torch.equal(grid.codes(values), codes)

    codes = torch.randint(-8, 8, (6, 40), generator=generator)
    codes[:, 0], codes[:, 1], codes[5] = -8, 1, 0
    values = codes.float() * torch.rand(6, 1, generator=generator)
    grid = found_grid(values)
    assert (grid.bits, grid.kind, len(grid.steps)) == (4, "per channel", 6) and torch.equal(grid.codes(values), codes)
    assert found_grid(values * values.abs().max()).bits == 4


def test_other_formats():
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(40, 30, generator=generator)
    assert found_grid(values) == Grid(32) and found_grid(values[0]) == Grid(32)
    values = torch.cat([values, values * 1e-4])
    assert found_grid(values.half().float()) == Grid(16, kind="float16")
    assert found_grid((values * 1e6).bfloat16().float()) == Grid(16, kind="bfloat16")
    assert found_grid(torch.zeros(3, 4)) == Grid(1, (1.0,), "zero")
    assert found_grid(torch.full((9,), -0.3)).bits == 1 and found_grid(torch.tensor([0.3, -0.3])).bits == 2
    assert found_grid(torch.tensor([2.0**-149, -2.0**-148])) == Grid(2, (2.0**-149,), "power of two")
    assert found_grid(torch.tensor([1.0, 1 + 2.0**-18])).bits == 32  # a grid, but finer than any that we call integers
    with pytest.raises(BadInput):
        found_grid(torch.tensor([1.0, math.nan]))


def test_one_value_off_the_grid_is_seen():
    codes = torch.arange(-8, 8).repeat(5000)
    for step, error in ((1 / 16, 2.0**-20), (0.3, 0.01)):
        values = codes.float() * step
        assert found_grid(values).bits == 4
        values[54_321] += error
        assert found_grid(values).bits == 32


def test_formats_of_batchnorm():
    model = folded(nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2)))
    assert found_formats(model).tensors["1.weight"].bits == 2  # all ones
    model[1].running_mean[1] = 1e-3  # folding it would make float32 values, whatever the weight is
    loose = Grid(32, kind=NOT_FOLDED)
    assert found_formats(model).tensors["1.weight"] == loose == found_formats(model).tensors["1.bias"]
    model[1].running_mean.zero_()
    model[1].running_var.fill_(1.0)
    assert found_formats(model).tensors["1.weight"] == loose
    model[0].weight.data[0] = math.inf
    with pytest.raises(BadInput, match="0.weight"):
        found_formats(model)


# ---- The rules on layers small enough for the hand -----------------------------------------------

def test_convolution_by_hand():
    layer = nn.Conv2d(2, 3, 2, bias=False)  # 8 terms a dot product; a 3x3 map makes 2x2 positions
    weight = torch.zeros(3, 2, 2, 2)
    weight[0].view(-1)[:5] = torch.tensor([3.0, -1, 2, 1, -4])  # 5 terms; channel 1 has none
    weight[2].view(-1)[7] = 1.0  # a single term: no addition
    layer.weight.data = weight / 8
    model = nn.Sequential(nn.Identity(), layer, nn.Identity())
    formats = Formats(found_formats(model).tensors, {"0": Activation(4, signed=False)})
    assert formats.tensors["1.weight"] == Grid(3, (0.125,), "power of two")
    ops = trace(model, (2, 3, 3))
    mults = {4: (5 + 0 + 1) * 4}
    # fixed: the worst channel reaches 15 (3 + 2 + 1) = 90 and -15 (1 + 4) = -75, so 8 bits; tree: products of 7 bits
    for convention, adds in (("32-bit", {32: 16}), ("fixed", {8: 16}), ("tree", {7: 2 * 4, 8: 4, 9: 4})):
        (row,) = count(ops, formats, convention)
        assert row.multiplications == mults and +row.additions == adds
        assert row.bits == 4 * 24 + sum(bits * n for bits, n in adds.items())
    wide = Formats({"1.weight": Grid(9, (0.125,), "claimed")}, formats.activations)
    assert count(ops, wide, "32-bit")[0].multiplications == {9: 6 * 4}  # the wider of the two inputs
    (row,) = count(ops, formats, "32-bit", Fraction(1))
    assert row.multiplications == {4: 8 * 3 * 4} and row.additions == {32: 7 * 3 * 4}
    (row,) = count(ops, formats, "32-bit", Fraction("0.3"))  # 2.4 of 8 terms, rounded up to 3
    assert row.multiplications == {4: 3 * 3 * 4} and row.additions == {32: 2 * 3 * 4}


def test_the_widest_sum_of_a_tree_meets_the_batchnorm():
    model = folded(nn.Sequential(nn.Identity(), nn.Conv2d(5, 2, 1, bias=False), nn.BatchNorm2d(2)))
    model[1].weight.data[0] = 1.0
    model[1].weight.data[1] = torch.tensor([1.0, 0, 0, 0, 0])[:, None, None]
    grids = {"1.weight": Grid(4, (1.0,), "even"), "2.weight": Grid(6, (1.0,)), "2.bias": Grid(6, (1.0,))}
    rows = count(trace(model, (5, 2, 2)), Formats(grids, activation_bits=4), "tree")
    assert rows[0].additions == {8: 2 * 4, 9: 4, 10: 4} and rows[1].multiplications == {11: 8}  # 5 products: 11 bits
    assert rows[1].additions == {17: 8}


def test_a_step_that_is_no_shift_costs_a_multiplication():
    """One of a BatchNorm's scale or shift, after which a ReLU is at 32 bits, or of a layer's bias."""
    normed = folded(nn.Sequential(nn.Identity(), nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU()))
    biased = nn.Sequential(nn.Identity(), nn.Conv2d(2, 3, 1))

    def found(model, **steps):
        grids = {f"{layer[1:]}.{part}": Grid(6, (step,), "even") for layer, part, step in
                 ((*key.split("_"), step) for key, step in steps.items())}
        rows = count(trace(model, (2, 4, 4)), Formats(grids, activation_bits=4), "tree")
        return [row.multiplications for row in rows]

    layer, norm, relu = found(normed, l1_weight=1.0, l2_weight=0.25, l2_bias=1.0)
    for scale, shift in ((0.3, 1.0), (0.25, 0.3), (0.3, 0.3)):
        assert found(normed, l1_weight=1.0, l2_weight=scale, l2_bias=shift) == [
            layer, norm | {32: 3 * 16}, {32: 3 * 16}] != [layer, norm, relu]
    (shifted,), (multiplied,) = (found(biased, l1_weight=1.0, l1_bias=step) for step in (0.25, 0.3))
    assert 32 not in norm | relu | shifted and multiplied == shifted | {32: 3 * 16}


def test_steps_of_channels_cost_a_multiplication_unless_a_batchnorm_holds_them():
    model = folded(nn.Sequential(nn.Identity(), nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3)))
    weight = torch.full((3, 2, 1, 1), 3.0)
    model[1].weight.data = weight
    other = {"2.weight": Grid(6, (1.0,)), "2.bias": Grid(6, (1.0,))}

    def first(network, *steps):
        formats = Formats({"1.weight": Grid(4, steps, "per channel")} | other, activation_bits=4)
        return count(trace(network, (2, 4, 4)), formats, "tree")[0].multiplications

    alone, products = nn.Sequential(*model[:2]), {4: 6 * 16}
    assert first(model, 1.0, 0.5, 0.25) == first(alone, 0.5) == first(alone, 0.5, 0.5, 0.5) == products
    assert first(alone, 1.0, 0.5, 0.25) == first(alone, 0.3) == products | {32: 3 * 16}  # 0.3: no shift
    assert first(model, 0.3) == products

    class Shared(nn.Sequential):  # what the BatchNorm reads has to be rounded before, for the other reader
        def forward(self, x):
            y = self[1](self[0](x))
            return self[2](y) + y
    assert first(Shared(*model), 1.0, 0.5, 0.25) == products | {32: 3 * 16}


def test_an_input_that_the_network_scales_itself_is_counted():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(3, 1, 1))
            self.register_buffer("shift", torch.tensor(0.5))
            self.layer = nn.Conv2d(3, 4, 32, bias=False)

        def forward(self, x):
            x = x * self.scale + self.shift
            x *= 2
            return self.layer(x).flatten(1)

    class Turned(Scaled):
        def forward(self, x):
            return self.layer(2 * (self.shift + self.scale * x)).flatten(1)

    for network in Scaled(), Turned():
        model = prepare(network.eval())
        assert storage(model, read_graph(model).operations, float_formats(model))["batchnorm"] == 3 * 3 * 32
        rows = count(read_graph(model).operations, float_formats(model), "tree")
        assert [(row.kind, row.multiplications, row.additions) for row in rows[:3]] == [
            ("scale", {32: 3072}, {}), ("shift", {}, {32: 3072}), ("scale", {32: 3072}, {})]


def test_other_rules_by_hand():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.relu = nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1), nn.ReLU()
            self.image, self.out, self.features = nn.Identity(), nn.Identity(), nn.Identity()
            self.linear = nn.Linear(1, 2)

        def forward(self, x):
            x = self.image(x)
            x = self.out(self.relu(self.bn(self.conv(x))) + x)
            return self.linear(self.features(x.mean((2, 3))))

    model = folded(Net())
    eight = {"image": Activation(8), "relu": Activation(8, False), "out": Activation(8),
             "features": Activation(8, False)}
    grids = {"conv.weight": Grid(4, (1.0,), "claimed"), "bn.weight": Grid(10, (1.0,)), "bn.bias": Grid(10, (1.0,)),
             "linear.weight": Grid(4, (1.0,), "claimed"), "linear.bias": Grid(16, (1.0,))}
    model.conv.weight.data.fill_(-8.0)
    model.linear.weight.data = torch.tensor([[7.0], [0.0]])
    rows = {row.name: row for row in count(trace(model, (1, 4, 4)), Formats(grids, eight), "fixed")}
    assert list(rows) == ["conv", "bn", "relu", "add", "mean", "linear"]
    assert rows["conv"].multiplications == {8: 16} and not +rows["conv"].additions  # one term
    # -8 x [-128, 127] reaches 1024: 12 bits; times a scale of 10 bits: 22 bits
    assert rows["bn"].multiplications == {12: 16} and rows["bn"].additions == {22: 16}
    assert rows["relu"].multiplications == {22: 16} and not rows["relu"].additions
    assert rows["add"].additions == {9: 16} and not rows["add"].multiplications  # two 8-bit maps
    # 16 values of [-128, 127]: 12 bits
    assert rows["mean"].additions == {12: 15} and rows["mean"].multiplications == {12: 1}
    assert rows["linear"].multiplications == {8: 1} and +rows["linear"].additions == {32: 2}  # the biases
    rows = {row.name: row for row in count(trace(model, (1, 4, 4)), Formats(grids, eight), "tree")}
    assert rows["mean"].additions == {8: 8, 9: 4, 10: 2, 11: 1} and rows["mean"].multiplications == {12: 1}
    rows = {row.name: row for row in count(trace(model, (1, 4, 4)), Formats(grids, eight), "32-bit")}
    assert all(set(row.additions) <= {32} for row in rows.values())


def test_what_follows_a_sum_is_as_wide_as_that():
    """A BatchNorm that reads 8-bit codes, and the ReLU behind it; a ReLU behind a bias, which is added at 32 bits."""
    model = folded(nn.Sequential(nn.Identity(), nn.BatchNorm2d(1), nn.ReLU(), nn.Conv2d(1, 1, 1), nn.ReLU()))
    model[3].weight.data.fill_(1.0), model[3].bias.data.fill_(0.5)
    eight = {"0": Activation(8), "2": Activation(8, False), "4": Activation(8, False)}
    grids = {"1.weight": Grid(10, (1.0,)), "1.bias": Grid(10, (1.0,)), "3.weight": Grid(4, (1.0,)),
             "3.bias": Grid(16, (0.5,))}
    for convention in CONVENTIONS:
        norm, first, layer, last = count(trace(model, (1, 4, 4)), Formats(grids, eight), convention)
        wide = 32 if convention == "32-bit" else 18
        assert norm.multiplications == {10: 16} and norm.additions == {wide: 16}
        assert first.multiplications == {wide: 16} and +layer.additions == {32: 16}
        assert last.multiplications == {32: 16}


def test_unknown_operations_raise_and_are_named():
    class Run(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, x):
            return self.function(x)

    for model, name in ((nn.Sequential(nn.Conv2d(1, 1, 1), nn.Tanh()), "1: .* Tanh"),
                        (nn.Sequential(nn.ELU()), "0: .* ELU"), (Run(lambda x: torch.tanh(x)), "tanh"),
                        (Run(lambda x: x ** 2), "pow"), (Run(lambda x: x.relu() * 2), "mul"),
                        (Run(lambda x: x.relu() + 1), "add"), (Run(lambda x: x.mean(2)), "mean")):
        with pytest.raises(BadInput, match=name):
            trace(model, (1, 4, 4))
    with pytest.raises(BadInput, match="median"):
        count([], Formats({}), "median")
    with pytest.raises(BadInput, match="density"):
        count([], Formats({}), "tree", Fraction(3, 2))


def test_pointwise_functions_products_and_maxima_by_hand():
    class Net(nn.Module):
        def forward(self, x):
            scale = F.hardsigmoid(F.hardswish(x)) * torch.sigmoid(x.mean((2, 3), keepdim=True))
            return torch.cat([F.max_pool2d(scale, 3, 2, 1), F.relu6(x)[:, :, ::2, ::2]], 1)

    def costs(convention):
        return {row.name: (+row.multiplications, +row.additions)
                for row in count(trace(Net(), (2, 4, 4)), Formats({}, activation_bits=8), convention)}

    # without points every value has 32 bits; with 8-bit inputs, from here on, the widths by hand
    assert costs("32-bit")["hardswish"] == ({32: 4 * 32}, {32: 32})
    assert list(costs("fixed")) == ["hardswish", "hardsigmoid", "mean", "sigmoid", "product", "max", "relu6"]

    def one(kind, *bits, fan_in=0):
        op = Operation("key", "name", kind, ("a",) * len(bits), fan_in, (2, 5))
        inputs = [Activation(each) for each in bits]
        multiplications, additions, out = counting.rule(op, inputs, Formats({}, activation_bits=8), "tree")
        return multiplications, additions, out.bits

    assert one("hardswish", 8) == ({9: 30, 17: 10}, {8: 10}, 17)  # 8 + 1 bits of x + 3; times x: 17
    assert one("hardsigmoid", 8) == ({9: 30}, {8: 10}, 9)
    assert one("sigmoid", 8) == ({8: 10}, {}, 8)
    assert one("silu", 8) == ({8: 20}, {}, 16)  # the sigmoid, and its product with x
    assert one("gelu", 8) == ({8: 20, 9: 10, 17: 10}, {8: 10}, 17)  # x / sqrt 2 and erf, times x, times 1/2; 1 + erf
    assert one("relu6", 22) == ({22: 20}, {}, 8)
    assert one("product", 8, 6) == ({8: 10}, {}, 14)
    assert one("max", 8, fan_in=9) == ({8: 80}, {}, 8)
    assert one("add", 8, 6) == ({}, {9: 10}, 9)
    for kind in ("moved", "nothing", "concatenation"):
        assert one(kind, 8, 4) == ({}, {}, 8)
    with pytest.raises(BadInput, match="no counting rule for name .new"):
        one("new", 8)


# ---- A slow reference: the network executed number by number -------------------------------------

class Tiny(nn.Module):
    """Every kind of operation: strided and padded convolutions, depthwise, grouped, residual, mean, linear."""

    def __init__(self):
        super().__init__()
        self.image, self.out, self.features = nn.Identity(), nn.Identity(), nn.Identity()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu1 = nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 4, 1, groups=2, bias=False), nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(self.image(x))))
        x = self.out(self.bn3(self.conv3(self.bn2(self.conv2(x)))) + x)
        return self.linear(self.features(x.mean((2, 3))))


class Meter:
    """Arithmetic that counts itself."""

    def __init__(self):
        self.mults = self.adds = 0

    def mul(self, a, b):
        self.mults += 1
        return a * b

    def sum(self, numbers):
        total = None
        for number in numbers:
            self.adds += total is not None
            total = number if total is None else total + number
        return total


def slow_run(model: Tiny, image: torch.Tensor) -> tuple[Meter, list[float]]:
    """(what was multiplied and added, logits) of one image [3, H, W], by loops over single numbers."""
    meter = Meter()

    def conv(layer, x):
        kernel, stride, pad = layer.kernel_size[0], layer.stride[0], layer.padding[0]
        size = (len(x[0]) + 2 * pad - kernel) // stride + 1

        def at(c, i, j):
            return x[c][i][j] if 0 <= i < len(x[0]) and 0 <= j < len(x[0]) else 0.0

        inputs = layer.in_channels // layer.groups
        weight, out = layer.weight.tolist(), []
        for o in range(layer.out_channels):
            first = o // (layer.out_channels // layer.groups) * inputs
            taps = itertools.product(range(inputs), range(kernel), range(kernel))
            terms = [(weight[o][c][i][j], first + c, i - pad, j - pad) for c, i, j in taps if weight[o][c][i][j]]
            out.append([[meter.sum(meter.mul(w, at(c, y * stride + i, z * stride + j)) for w, c, i, j in terms) or 0.0
                         for z in range(size)] for y in range(size)])
        return out

    def each(function, *maps):
        return [[[function(c, *values) for values in zip(*rows)] for rows in zip(*planes)]
                for c, planes in enumerate(zip(*maps))]

    def norm(layer, x):
        return each(lambda c, v: meter.sum([meter.mul(layer.weight[c].item(), v), layer.bias[c].item()]), x)

    x = norm(model.bn1, conv(model.conv1, image.tolist()))
    x = each(lambda c, v: meter.mul(float(v > 0), v), x)
    y = norm(model.bn3, conv(model.conv3, norm(model.bn2, conv(model.conv2, x))))
    x = each(lambda c, a, b: meter.sum([a, b]), y, x)
    features = [meter.mul(meter.sum(itertools.chain(*plane)), 1 / (len(plane) ** 2)) for plane in x]
    weight, bias = model.linear.weight.tolist(), model.linear.bias.tolist()
    logits = []
    for o in range(3):
        products = [meter.mul(weight[o][c], features[c]) for c in range(4) if weight[o][c]]
        logits.append(meter.sum([*([meter.sum(products)] if products else [0.0]), bias[o]]))
    return meter, logits


@pytest.mark.parametrize("seed", range(4))
def test_against_the_slow_reference(seed):
    torch.manual_seed(seed)
    model = folded(Tiny())
    with torch.no_grad():
        for _, layer in weight_layers(model):
            layer.weight *= torch.rand_like(layer.weight) < 0.4
        model.conv1.weight[seed] = 0
        model.conv2.weight[1] = 0
        for norm in (model.bn1, model.bn2, model.bn3):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-1, 1)
    image = torch.randn(3, 6, 6)
    meter, logits = slow_run(model, image)
    with torch.no_grad():
        assert torch.allclose(torch.tensor(logits), model(image[None])[0], atol=1e-5)  # it ran the same network
    ops = trace(model, (3, 6, 6))
    for convention in CONVENTIONS:
        found = totals(count(ops, found_formats(model), convention))
        assert (found["multiplications"], found["additions"]) == (meter.mults, meter.adds)
        assert found["bits"] == 32 * (meter.mults + meter.adds)  # float32
    with torch.no_grad():
        for _, layer in weight_layers(model):
            layer.weight.fill_(0.25)
    meter, _ = slow_run(model, image)
    dense = totals(count(ops, found_formats(model), "32-bit", Fraction(1)))
    assert (dense["multiplications"], dense["additions"]) == (meter.mults, meter.adds)


# ---- Properties ----------------------------------------------------------------------------------

def test_order_of_conventions_and_sparsity():
    model = folded(MobileNetV2(width=0.25))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, layer in weight_layers(model):
            codes = torch.randint(-32, 32, layer.weight.shape, generator=generator)
            layer.weight.copy_(codes * (torch.rand(layer.weight.shape, generator=generator) < 0.2) / 64)
    formats, ops = Formats(found_formats(model).tensors, activation_bits=8), trace(model)
    by = {convention: count(ops, formats, convention) for convention in CONVENTIONS}
    for convention in CONVENTIONS:
        for row, whole, wide in zip(by[convention], count(ops, formats, convention, Fraction(1)), by["32-bit"]):
            counts = [*row.multiplications.values(), *row.additions.values()]
            assert all(type(n) is int and n >= 0 for n in counts) and row.bits <= whole.bits and row.bits <= wide.bits
            assert max(row.additions, default=0) <= 32 and max(row.multiplications, default=0) <= 32
            assert row.additions.total() == wide.additions.total()


def test_density_rounds_up_in_each_channel():
    random.seed(0)
    for _ in range(200):
        fan_in, share = random.randint(1, 60), Fraction(random.randint(0, 100), 100)
        (n,) = set(terms_per_channel(torch.ones(3, fan_in), share))
        assert n - 1 < share * fan_in <= n


# ---- Storage and score ---------------------------------------------------------------------------

def test_storage_by_hand():
    model = folded(nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
                                 nn.Conv2d(4, 2, 1, bias=True)))
    model[1].weight.data.zero_()
    model[1].weight.data.view(-1)[:5] = torch.tensor([1.0, -8, 3, 2, 7])  # 5 of 108 non-zero
    grids = {"1.weight": Grid(4, (1.0,)), "2.weight": Grid(16, (1.0,)), "2.bias": Grid(16, (1.0,)),
             "4.weight": Grid(6, (1.0, 2.0)), "4.bias": Grid(16, (1.0,))}
    operations = trace(model, (3, 8, 8))

    def stored(formats, density=None):
        return storage(model, operations, formats, density)
    assert stored(Formats(grids, activation_bits=8)) == {
        "weights": 5 * 4 + 8 * 6,  # the second convolution has no zeros: dense, without a mask
        "masks": 108, "batchnorm": 2 * 4 * 16, "biases": 2 * 16,
        "steps": 32 * (6 + 2),  # six for the parameters, one of them for each channel, and two activation points
        "total": 68 + 108 + 128 + 32 + 256}
    assert stored(Formats(grids, activation_bits=8), Fraction(1))["weights"] == 108 * 4 + 48
    assert stored(Formats(grids))["steps"] == 32 * 6
    floats = stored(float_formats(model), Fraction(1))
    assert floats["total"] == 32 * (108 + 8 + 8 + 2) and floats["steps"] == floats["masks"] == 0


@pytest.mark.parametrize("side, positions", ((8, 1), (9, 4), (11, 16), (16, 81)))
def test_zeros_are_stored_with_a_mask_or_counted_as_values(side, positions):
    """The cheaper by the score: 8 bits a multiplication, 32 an addition; storage and operations follow one choice."""
    model = nn.Sequential(nn.Identity(), nn.Conv2d(1, 1, 8, bias=False))
    formats, chosen = Formats({"1.weight": Grid(4)}, activation_bits=8), []
    for nonzeros in range(1, 65):
        model[1].weight.data.zero_()
        model[1].weight.data.view(-1)[:nonzeros] = 1
        operations = trace(model, (1, side, side))
        (row,), bits = count(operations, formats, "32-bit"), storage(model, operations, formats)
        bits["total"] -= bits["steps"]
        masked = nonzeros * 4 + 64, positions * (nonzeros * 8 + (nonzeros - 1) * 32)
        dense = 64 * 4, positions * (64 * 8 + 63 * 32)
        costs = [Fraction(stored, 36_500_000) + Fraction(done, 10_490_000_000) for stored, done in (masked, dense)]
        assert (bits["total"], row.bits) == (masked if costs[0] < costs[1] else dense)
        assert layouts(operations, formats)["1"].masked == (bits["masks"] > 0) == (costs[0] < costs[1])
        chosen.append(costs[0] < costs[1])
    assert chosen[0] and not chosen[-1] and sum(chosen) >= 48  # the shorter form alone would mask 47
    for convention in CONVENTIONS:  # the same choice under each
        (row,) = count(operations, formats, convention)
        assert sum(row.multiplications.values()) == 64 * positions


def test_storage_of_the_network(network, operations):
    floats = float_formats(network)
    assert storage(network, operations, floats, Fraction(1))["total"] == 32 * 3_989_668
    spare = copy.deepcopy(network)
    spare.spare = nn.Linear(3, 3)  # never runs
    assert storage(spare, operations, float_formats(spare), Fraction(1)) == storage(
        network, operations, floats, Fraction(1))
    half = storage(network, operations, floats, Fraction(1, 2))
    assert half["masks"] == 3_944_032 and half["batchnorm"] == 32 * 45_536 and half["biases"] == 32 * 100


def test_score():
    assert score(32 * 36_500_000, 32 * 10_490_000_000) == {"storage": 1.0, "operations": 1.0, "score": 2.0}
    assert f"{score(32 * 351_000, 32 * 231_253_376)['score']:.4f}" == "0.0317"  # FACTS: with the sister's storage


def test_prices_by_hand():
    """A weight of a layer with 16 positions costs 16 products of 8 by 8 bits and nearly 16 additions of 32 bits."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1, stride=8, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
                          nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(4, 5))
    before = copy.deepcopy(model.state_dict())
    prices = counting.prices(model.train())
    stored = 8 / 32 / 36.5e6
    positions = {"0": (16, 2 / 3), "3": (16, 8 / 9), "6": (1, 1)}  # fan_in - 1 additions; a bias adds one more
    assert prices == {name: pytest.approx(stored + n * (8 + 32 * additions) / 32 / 10.49e9, rel=1e-12)
                      for name, (n, additions) in positions.items()}
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_bias_of_zeros_adds_nothing():
    model, found = nn.Sequential(nn.Identity(), nn.Conv2d(2, 3, 1)), []
    formats = Formats({"1.weight": Grid(4, (1.0,)), "1.bias": Grid(1, (1.0,))}, activation_bits=8)
    for factor in (1, 0):
        model[1].bias.data *= factor
        found.append(count(trace(model, (2, 4, 4)), formats, "tree")[0].additions.total())
    assert found == [2 * 3 * 16, 3 * 16]


def test_a_shift_wider_than_the_product():
    model = folded(nn.Sequential(nn.Identity(), nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1)))
    grids = {"1.weight": Grid(2, (1.0,), "even"), "2.weight": Grid(3, (1.0,)), "2.bias": Grid(16, (1.0,))}
    for convention in ("fixed", "tree"):
        assert count(trace(model, (1, 2, 2)), Formats(grids, activation_bits=2), convention)[1].additions == {16: 4}


def test_without_a_claim_a_relus_codes_have_no_sign():
    model = nn.Sequential(nn.Identity(), nn.ReLU(), nn.Conv2d(3, 1, 1, bias=False))
    formats = Formats({"2.weight": Grid(4, kind="what if")}, activation_bits=8)
    *_, row = count(trace(model, (3, 2, 2)), formats, "fixed", Fraction(1))
    assert set(row.additions) == {signed_bits(-3 * 8 * 255, 3 * 8 * 255)}


def test_what_was_multiplied_by_its_step_is_wide():
    model = nn.Sequential(nn.Identity(), nn.Conv2d(2, 3, 1, bias=False), nn.ReLU())
    model[1].weight.data.fill_(3.0)
    formats = Formats({"1.weight": Grid(4, (1.0, 0.5, 0.25), "per channel")}, activation_bits=4)
    assert count(trace(model, (2, 4, 4)), formats, "tree")[1].multiplications == {32: 3 * 16}


def test_channels_are_as_wide_as_the_widest():
    codes = torch.tensor([[-2, 1, 1, 0], [-100, 1, 7, 3]])
    grid = found_grid(codes * torch.tensor([[0.3], [0.7]]))
    assert (grid.bits, grid.kind) == (8, "per channel")
