"""Steps, widths, and what is stored on them."""
import copy
import math
import re
from collections import OrderedDict
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from compressed import cifar100, claims, counting, grids, mnet, step_search
from compressed import exact_network as exact_module
from compressed.errors import BadInput
from compressed.evaluation import logits
from compressed.formats import code_range, codes, fake_quantize, power_of_two_step
from compressed.graph import prepare, read_graph, weight_layers
from compressed.grids import SCHEMES, activation_table, bit_table, calibrate, free_step
from compressed.networks import load_checkpoint
from mobilenet_v2 import MobileNetV2, SmallMobileNetV2
from small import FEW_BITS, SPEC, few, integer_logits, layer_neighbours, points
from test_any_network import FILE, shipped


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------------------- the grids

def test_the_submissions_step_by_hand():
    # step = 2^-(b - 1 - ceil(log2 max|w|))
    assert power_of_two_step(0.9, 8) == 2**-7 and power_of_two_step(0.5, 8) == 2**-8
    assert power_of_two_step(0.51, 8) == 2**-7
    assert power_of_two_step(1.0, 8) == 2**-7  # a power of two itself: 1.0 has the code 128 and is clipped to 127
    assert codes(torch.tensor([1.0, -1.0]), 2**-7, *code_range(8)).tolist() == [127, -128]
    assert power_of_two_step(1 + 2**-23, 8) == 2**-6 and power_of_two_step(1 - 2**-24, 8) == 2**-7
    assert power_of_two_step(3.0, 6) == 2**-3 and power_of_two_step(4.0, 6) == 2**-3
    assert power_of_two_step(4.1, 6) == 2**-2
    assert power_of_two_step(0.9, 8, signed=False) == 2**-8 and power_of_two_step(6.0, 4, signed=False) == 2**-1
    assert power_of_two_step(0.0, 8) == power_of_two_step(0.0, 8, signed=False) == 1
    for exponent in range(-60, 60):  # log2 must not be off by a hair
        assert power_of_two_step(2.0**exponent, 8) == 2.0 ** (exponent - 7)


def test_code_ranges():
    assert [code_range(b) for b in (2, 6, 8, 16)] == [(-2, 1), (-32, 31), (-128, 127), (-32768, 32767)]
    assert [code_range(b, signed=False) for b in (2, 6, 8)] == [(0, 3), (0, 63), (0, 255)]


def slow_code(value, step, low, high):
    quotient = Fraction(float(np.float32(value / step)))  # float32 division, then exact
    return min(max(round(quotient), low), high)


@pytest.mark.parametrize("bits, signed, step", [(8, True, 2**-6), (6, True, 2**-3), (8, False, 2**-5), (2, True, 0.5),
                                                (8, True, 0.0137), (5, True, 0.3)])
def test_codes_are_those_of_a_slow_reference(bits, signed, step):
    low, high = code_range(bits, signed)
    x = torch.cat([random(2000), (torch.arange(-600, 600) / 2) * step])  # the second: all codes and all halves
    step = torch.tensor(step)
    expected = [slow_code(value, step.item(), low, high) for value in x.tolist()]
    assert codes(x, step, low, high).tolist() == expected
    assert len(set(expected)) == high - low + 1 or bits > 6
    on_grid = torch.tensor(expected, dtype=torch.float32) * step
    assert torch.equal(fake_quantize(x, step, low, high), on_grid)
    assert torch.equal(fake_quantize(x.clone().requires_grad_(), step, low, high), on_grid)


def test_the_gradients_by_hand():
    """Of a step: rounding errors inside the range, the clipped code outside (Esser et al. 2020, equation 3)."""
    # inside is what is rounded to a code, up to half a step beyond the range; what is clipped to one is outside
    x = torch.tensor([0.3, 0.7, 0.9, -9.0, 9.0, -1.2, 0.26], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    y = fake_quantize(x, step, -2, 1)
    assert y.tolist() == [0.5, 0.5, 0.5, -1.0, 0.5, -1.0, 0.5]
    y.backward(torch.tensor([1.0, 5.0, 10.0, 100.0, 1000.0, 2.0, 10000.0]))
    assert x.grad.tolist() == [1, 5, 0, 0, 0, 2, 10000]
    assert step.grad.item() == pytest.approx(
        (1 - 0.6) + 5 * (1 - 1.4) + 10 + 100 * -2 + 1000 + 2 * (-2 + 2.4) + 10000 * (1 - 0.52))
    channels = torch.tensor([[0.5], [2.0]], requires_grad=True)
    fake_quantize(torch.tensor([[0.3, 0.4], [1.5, 2.0]]), channels, -8, 7).sum().backward()
    assert channels.grad.flatten().tolist() == pytest.approx([0.4 + 0.2, 0.25 + 0.0])
    x = torch.tensor([-0.3, -0.1, 7.6], requires_grad=True)
    fake_quantize(x, 0.5, 0, 15).sum().backward()  # unsigned, by a step that is no tensor
    assert x.grad.tolist() == [0, 1, 1]


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_free_step_is_near_the_best_of_all_for_normally_distributed_weights(bits):
    weight, (low, high) = random(100_000)[:, None], code_range(bits)

    def error(step):
        return float(((weight / step).round().clamp(low, high) * step - weight).square().mean())

    best = min(error(step) for step in torch.linspace(0.05, 2, 200).tolist())
    assert error(free_step(weight, bits, channel=False)) < 1.01 * best


@pytest.mark.parametrize("bits", [2, 6, 8])
@pytest.mark.parametrize("channel", [False, True])
def test_free_step_has_the_least_squared_error_of_its_candidates(bits, channel):
    weight = random(5, 4, 3, 3) * torch.tensor([0.1, 1, 3, 1e-3, 0])[:, None, None, None]
    weight[1, 0, 0, 0] = 9.0  # an outlier
    low, high = code_range(bits)
    found = free_step(weight, bits, channel)
    assert found.shape == ((5, 1, 1, 1) if channel else (1, 1, 1, 1)) and (found > 0).all()
    for rows, step in zip(weight if channel else weight[None], found.flatten()):
        top = rows.abs().max().clamp_min(1e-12)

        def error(step):
            return float(((rows.double() / step).round().clamp(low, high) * step - rows.double()).square().sum())

        shares = torch.linspace(0.4 if bits > 2 else 0.1, 1.0, 40)
        candidates = [float(top * share / high) for share in shares.tolist()]
        errors = [error(candidate) for candidate in candidates]
        assert any(math.isclose(float(step), candidate, rel_tol=1e-6) for candidate in candidates)
        assert error(float(step)) <= min(errors) * (1 + 1e-4)
        assert min(errors) < max(errors) or not rows.any()
    assert torch.isfinite(fake_quantize(weight, found, low, high)).all()


# --------------------------------------------------------------------------------------------------------- bit table

@pytest.fixture(scope="module")
def submission():
    return MobileNetV2()


def test_the_submissions_bits(submission):
    table = bit_table(None, submission)
    assert [i for i, bits in enumerate(table) if bits == 6] == [3, 5, 8, 10, 11, 14, 16, 19, 55]
    assert len(table) == 58 and set(table) == {6, 8}


def test_other_bit_tables(submission, tmp_path):
    assert bit_table("4", submission) == [4] * 58
    path = tmp_path / "t.toml"
    path.write_text('default = 7\n[bits]\n"layers.0.conv3" = 5\n57 = 6\nconv1 = 8\n"layers.16.shortcut.0" = 2\n')
    table = bit_table(str(path), submission)
    assert (table[3], table[57], table[0], table[55]) == (5, 6, 8, 2) and table.count(7) == 54
    for content, bits in ((b"[bits]\n9 = 3\n", [8] * 9 + [3] + [8] * 48), (b"", [8] * 58),
                          (b'\xef\xbb\xbf# \xc3\xbc\r\ndefault = 5\r\n', [5] * 58)):  # as Windows' editors write it
        path.write_bytes(content)
        assert bit_table(str(path), submission) == bits


def test_bit_tables_of_another_network(tmp_path):
    """By name or kind, and never by the submission's places."""
    model = SmallMobileNetV2()
    names = [name for name, _ in weight_layers(model)]
    assert bit_table(None, model) == [8] * len(names)
    path = tmp_path / "t.toml"
    path.write_text('default = 7\n[bits]\ndepthwise = 5\nlinear = 3\n"layers.0.conv2" = 2\n')
    found = dict(zip(names, bit_table(str(path), model)))
    assert (found["layers.0.conv2"], found["layers.1.conv2"], found["linear"], found["conv1"]) == (2, 5, 3, 7)
    path.write_text("[bits]\n3 = 6\n")
    with pytest.raises(BadInput, match="has no layer '3'"):
        bit_table(str(path), model)


def test_bits_of_activations(tmp_path):
    model = prepare(SmallMobileNetV2())
    points = read_graph(model).activation_points
    six = activation_table("6", model)
    assert list(six) == list(points) and six.pop("image") == 8 and set(six.values()) == {6}
    path = tmp_path / "t.toml"
    path.write_text('default = 7\n[bits]\nimage = 5\nsum = 6\nfunction = 5\nlinear = 3\n"layers.3.out" = 4\n')
    with pytest.raises(BadInput, match="the network has no activation point 'linear'"):
        activation_table(str(path), model)
    path.write_text(path.read_text().replace("linear", "mean"))
    found = activation_table(str(path), model)
    assert (found["image"], found["features"], found["layers.3.out"], found["layers.1.out"]) == (5, 3, 4, 6)
    assert (found["points.relu1"], found["points.bn1"], found["layers.2.out"]) == (5, 7, 7)
    assert set(found.values()) == {3, 4, 5, 6, 7}
    with pytest.raises(BadInput, match="9 bits for points.bn1: expected 2 to 8"):
        activation_table("9", model)


def test_activations_of_different_widths_are_the_same_in_all_executions(tmp_path):
    pytest.importorskip("onnxruntime")
    from tools import export_onnx
    table, images = tmp_path / "t.toml", cifar100.made_up(16, 3).images
    table.write_text("default = 6\n[bits]\nimage = 8\nsum = 5\nfunction = 7\nmean = 4\n")
    _, network, claim = shipped(f"{FILE}:Excited", 10, str(table))
    assert {entry["bits"] for entry in claim["activations"]} == {4, 5, 6, 7, 8}
    wanted = logits(exact_module.exact_network(network, claim["activations"]), images)
    assert torch.equal(integer_logits(network, claim, images), wanted)
    engine = export_onnx.session(export_onnx.Exporter(network, claim).finished({}).SerializeToString(), threads=1)
    assert torch.equal(export_onnx.run(engine, images), wanted)
    mnet.pack(network, claim, tmp_path / "packed.mnet")
    assert mnet.unpack(tmp_path / "packed.mnet", f"{FILE}:Excited")[1]["activations"] == claim["activations"]
    wide = [entry | {"bits": 8} for entry in claim["activations"]]
    narrow, wide = (counting.summary(network, claims.stated_formats(network, claim | {"activations": entries}))
                    for entries in (claim["activations"], wide))
    assert all(narrow["operations"][rule]["bits"] < wide["operations"][rule]["bits"] for rule in narrow["operations"])


@pytest.mark.parametrize("scales, factor", [
    ([], 1), ([0, 0], 1), ([1, -2], 1), ([2**-14, 60000], 1), ([2**-15, 1], 2), ([-1.9 * 2**-15, 1], 2),
    ([0, 1.5e-8, 1e-3], 2**12), ([1e-9, 1e-3], 2**16), ([2**-20, 2.0**14.5], 1), ([2**-20, 2**13], 2),
    ([1e-30, 1e-25], 2**86)])
def test_scales_are_lifted_into_float16s_normal_numbers(scales, factor):
    scale = torch.tensor(scales, dtype=torch.float64)
    assert grids.normal_factor(scale) == factor
    lifted = scale * float(factor)
    assert factor == 1 or lifted.abs().max() < 2**15
    if factor > 1 and len(scale) and scale.abs().max() < 1:  # there was room: 11 bits are left of each
        assert ((lifted.half().double() - lifted).abs() <= lifted.abs() * 2**-11).all()


def test_small_scales_lose_nothing_in_a_shipped_network(fake):
    """A layer has scales 2^-20 of what they were: its weights become that much smaller, and products are exact."""
    model, same = copy.deepcopy(fake["layer"]), copy.deepcopy(fake["layer"])
    model.layers[2].bn3.weight.data.mul_(2**-20)
    network, tensors = grids.shipped(model, few())
    expected, stated = grids.shipped(same, few())
    ours, theirs = network.layers[2], expected.layers[2]
    product = ours.bn3.weight.double()[:, None, None, None] * ours.conv3.weight.double() * 2**20
    assert torch.equal(product, theirs.bn3.weight.double()[:, None, None, None] * theirs.conv3.weight.double())
    step, before = (next(entry["step"] for entry in each if entry["name"] == "layers.2.conv3.weight")
                    for each in (tensors, stated))
    assert step < before and ours.bn3.weight.abs().max() > 2**-14


@pytest.mark.parametrize("content, message", [
    ("[bits]\nconv9 = 6", "has no layer 'conv9'"), ("[bits]\n58 = 6", "has no layer '58'"),
    ("[bits]\n-1 = 6", "has no layer '-1'"), ("[bits]\nlayers.0.conv1 = 6",
                                              "no layer 'layers' .names with dots need quotes"),
    ("[bits]\nconv1 = 9", "9 bits for conv1: expected 2 to 8"), ("default = 1", "1 bits for conv1"),
    ("[bits]\nconv1 = 6.0", "6.0 bits"), ("[bits]\nconv = 9", "9 bits for"), ("[bits]\nconv1 = '6'", "'6' bits"),
    ("default = true", "True bits"),
    ("conv1 = 6", "nothing but"), ("bits = 6", "nothing but"), ("[bit]\nconv1 = 6", "nothing but"),
    ("[bits", "not readable as TOML"), ("[bits]\n0 = 4\nconv1 = 8", "conv1 is there twice"),
])
def test_bit_tables_that_are_wrong(submission, tmp_path, content, message):
    path = tmp_path / "t.toml"
    path.write_text(content)
    with pytest.raises(BadInput, match=message):
        bit_table(str(path), submission)


def test_a_name_that_is_a_kind_of_others(tmp_path):
    path = tmp_path / "t.toml"
    path.write_text("[bits]\nlinear = 4")
    model = prepare(nn.Sequential(OrderedDict(flat=nn.Flatten(), first=nn.Linear(3072, 8), linear=nn.Linear(8, 10))))
    with pytest.raises(BadInput, match="'linear' is the name of one layer and the kind of others, such as first"):
        bit_table(str(path), model)
    alone = prepare(nn.Sequential(OrderedDict(flat=nn.Flatten(), linear=nn.Linear(3072, 10))))
    assert bit_table(str(path), alone) == [4]


@pytest.mark.parametrize("option, message", [
    ("1", "1 bits for conv1: expected 2 to 8"), ("9", "9 bits"), ("-3", "no bit table '-3'"), ("", "no bit table ''"),
    ("nowhere.toml", "no bit table 'nowhere.toml': give a number of bits or a TOML file"), (".", "no bit table"),
])
def test_bit_tables_that_are_not_there(submission, option, message):
    with pytest.raises(BadInput, match=message):
        bit_table(option, submission)


# ------------------------------------------------------------------------------------------------------- activations

def test_the_55_activation_points(submission):
    points = read_graph(submission).activation_points
    signed = {"image", *(f"layers.{i}.out" for i in range(17))}
    unsigned = {"relu1", "relu2", "features", *(f"layers.{i}.relu{j}" for i in range(17) for j in (1, 2))}
    assert points == dict.fromkeys(signed, True) | dict.fromkeys(unsigned, False) and len(points) == 55


@torch.no_grad()
def seen(model, images):
    """{name: all values at the activation point}, looked at with hooks of our own."""
    values = {}
    hooks = [model.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: values.__setitem__(name, out))
             for name in read_graph(model).activation_points]
    model.eval()((images.float() - 128) / 64)
    for hook in hooks:
        hook.remove()
    return values


@pytest.fixture(scope="module")
def images():
    """51 made-up images, one more than a calibration batch. The first is the extreme one."""
    images = cifar100.made_up(51, 3).images
    images[0] = (images[0] > 128) * 255
    return images


@pytest.fixture(scope="module")
def values(small_checkpoint, images):
    return seen(load_checkpoint(small_checkpoint, SPEC), images)


@pytest.mark.parametrize("bits, ranges", [(8, "mse"), (4, "max"), (4, "mse")])
def test_calibrated_ranges(small_checkpoint, images, values, bits, ranges):
    model = load_checkpoint(small_checkpoint, SPEC)
    chosen = calibrate(model, images, bits, ranges)
    points, finer = read_graph(model).activation_points, 0
    assert [entry["name"] for entry in chosen] == list(points)
    assert not any(module._forward_hooks for module in model.modules())
    for entry, (name, signed) in zip(chosen, points.items()):
        step = 2.0 ** (math.ceil(math.log2(values[name].abs().max())) - bits + signed)
        assert entry == {"name": name, "bits": bits, "signed": signed, "step": entry["step"]}
        if ranges == "max" or (name == "image" and bits == 8):
            assert entry["step"] == step
            continue

        def error(step):
            return float((fake_quantize(values[name], step, *code_range(bits, signed)) - values[name]).square().sum())

        errors = {step / 2**i: error(step / 2**i) for i in range(4)}
        assert errors[entry["step"]] <= min(errors.values()) * (1 + 1e-4)
        finer += entry["step"] < step
    assert ranges == "max" or finer > 3  # outliers are clipped


def test_calibration_by_hand():
    """A network of zeros: every activation is known."""
    model = few()
    for name, parameter in model.named_parameters():
        parameter.data.zero_()
    model.bn1.bias.data.fill_(3.0)  # relu1 is 3; its block adds nothing; the shortcut's BatchNorm makes 0.75
    model.layers[0].shortcut[1].bias.data.fill_(-0.75)
    model.bn2.bias.data.fill_(0.11)
    model.bn2.bias.data[3] = 0.26
    gray = torch.full((2, 3, 32, 32), 128 + 64, dtype=torch.uint8)
    steps = {entry["name"]: entry["step"] for entry in calibrate(model, gray, 8, "max")}
    assert steps["image"] == 2**-6 and steps["relu1"] == 4 / 256 and steps["layers.0.out"] == 1 / 128
    assert steps["relu2"] == steps["features"] == 0.5 / 256 and steps["layers.5.relu1"] == 1
    four = {entry["name"]: entry["step"] for entry in calibrate(model, gray, 4, "max")}
    assert four["image"] == 1 / 8 and four["relu1"] == 4 / 16 and four["layers.0.out"] == 1 / 8
    mse = {entry["name"]: entry["step"] for entry in calibrate(model, gray, 4, "mse")}
    assert mse["relu1"] == 4 / 16 and mse["layers.0.out"] == 1 / 8  # 3 and -0.75 are on the grid: the coarsest is kept
    # 0.11 is 3.52 steps of 1/32 but 7.04 of 1/64; the one 0.26 is clipped there, and would be clipped too much at 1/128
    assert four["relu2"] == 0.5 / 16 and mse["relu2"] == 0.5 / 16 / 2


@pytest.mark.parametrize("first", (50, 8))
def test_steps_that_the_logits_prefer(first, monkeypatch):
    """Beside a slow search of the same kind, on a network of which one step is far too coarse."""
    monkeypatch.setattr(step_search, "FIRST", first)
    torch.manual_seed(0)
    model = few(7)
    images = cifar100.made_up(20, 0).images

    @torch.no_grad()
    def probabilities():
        return model(cifar100.normalise(images)).double().softmax(1)

    with torch.no_grad():
        target, reference = probabilities(), model(cifar100.normalise(images))
    activations = calibrate(model, images, 6, "mse")
    exact_module.quantize_activations(model, activations)
    before = {entry["name"]: entry["step"] for entry in activations}
    before["relu1"] *= 8
    model.get_submodule("relu1").step = before["relu1"]

    def divergence():
        return float((target * (target / probabilities()).log()).sum(1).mean())

    def steps():
        return {name: model.get_submodule(name).step for name in before}

    worst = divergence()
    step_search.choose_steps(model, images, reference)
    chosen, least = steps(), divergence()
    for name, step in before.items():
        model.get_submodule(name).step = step
    for name in list(before)[1:]:
        module, step = model.get_submodule(name), before[name]
        for module.step in (2 * step, step / 2):
            tried = divergence()
            module.step, trial = step, module.step
            if tried < divergence():
                module.step = trial
                break
    assert sum(chosen[name] != value for name, value in steps().items()) <= (0 if first == 50 else 2)
    assert chosen["image"] == before["image"] == 2**-6 * 4
    assert chosen["relu1"] == before["relu1"] / 2
    assert least < worst and sum(chosen[name] != before[name] for name in before) > 2


def test_weights_are_rounded_once_and_come_back(fake):
    model, x = fake["channel"], cifar100.normalise(cifar100.made_up(2, 0).images)
    weights, kinds = list(model.parameters()), [type(module) for module in model.modules()]
    with torch.no_grad():
        before = model(x)
        with pytest.raises(KeyError), grids.weights_rounded_once(model):
            assert torch.equal(model(x), before) and type(model.conv1) is nn.Conv2d
            assert not torch.equal(model.conv1.weight, weights[0])
            raise KeyError
    assert all(now is then for now, then in zip(model.parameters(), weights, strict=True))
    assert kinds == [type(module) for module in model.modules()]


UNCHANGED = few()


def claimed_activations(**changes):
    return [{"name": name, "bits": 8, "signed": signed, "step": 0.125} | changes.get(name, {})
            for name, signed in read_graph(UNCHANGED).activation_points.items()]


@pytest.mark.parametrize("entry, message", [
    ({"step": 0.3}, "expected 1 to 16 and a power of two"), ({"step": 0}, "with step 0"),
    ({"step": -0.5}, "with step -0.5"),
    ({"step": None}, "with step None"), ({"step": "0.5"}, "with step 0.5"), ({"step": math.inf}, "with step inf"),
    ({"step": math.nan}, "with step nan"), ({"step": 10**400}, "with step 1000"),
    ({"step": 2.0**-129}, "with step 1.469"), ({"step": 2.0**128}, "2.-126 to 2.127"),
    ({"step": 2.0**-127}, "2.-126 to 2.127"),
    ({"bits": 0}, "0 bits"), ({"bits": 17}, "17 bits"),
    ({"bits": None}, "None bits"),
    ({"signed": True}, "signed is True, expected False"), ({"signed": None}, "signed is None"),
    ({"signed": 0}, "signed is 0"),
    ({"name": "relu3"}, r"missing \['relu1'\], unknown \['relu3'\]"),
    ({"name": None}, r"missing \['relu1'\], unknown \['None'\]"),
    ({"name": "relu2"}, r"not the network's 25: missing \['relu1'\]"),
])
def test_activations_that_are_refused(entry, message):
    with pytest.raises(BadInput, match=message):
        exact_module.quantize_activations(UNCHANGED, claimed_activations(relu1=entry))


def test_a_quantizer_stands_at_every_point():
    model = few()
    exact_module.quantize_activations(model, claimed_activations(relu2={"step": 0.5, "bits": 4}))
    values = seen(model, cifar100.made_up(2, 0).images)
    assert len(values) == 25 and isinstance(model.relu2, exact_module.Quantizer) and model.relu2.bits == 4
    for name, signed in read_graph(model).activation_points.items():
        low, high, step = (0, 15, 0.5) if name == "relu2" else (*code_range(8, signed), 0.125)
        scaled = values[name] / step
        assert torch.equal(scaled, scaled.round()) and scaled.min() >= low and scaled.max() <= high
    assert list(model.state_dict()) == list(few().state_dict())
    x = random(1000) * 20
    for signed in (True, False):
        quantizer = exact_module.Quantizer(8, signed, 0.125)
        expected = [slow_code(value, 0.125, *code_range(8, signed)) * 0.125 for value in x.tolist()]
        assert quantizer(x).tolist() == expected


# ----------------------------------------------------------------------------------------------------------- shipped

def test_unknown_scheme():
    with pytest.raises(BadInput, match="unknown scheme 'log'; known: power-of-two, layer, channel"):
        grids.quantize_weights(few(), FEW_BITS, "log")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_steps_of_the_schemes(small_checkpoint, fake, scheme):
    latent = load_checkpoint(small_checkpoint, SPEC)
    for (name, module), (_, before), bits in zip(weight_layers(fake[scheme]), weight_layers(latent), FEW_BITS):
        assert module.bits == bits and torch.equal(module.weight, before.weight)
        largest = before.weight.detach().abs().max().item()
        if scheme == "power-of-two" or name == "linear":
            assert float(module.step) == 2.0 ** (math.ceil(math.log2(largest)) - bits + 1)
        else:
            assert module.step.shape == (len(before.weight) if scheme == "channel" else 1, 1, 1, 1)
            assert torch.equal(module.step, free_step(before.weight, bits, scheme == "channel"))
    assert list(fake[scheme].state_dict()) == list(latent.state_dict())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_shipped_value_stands_on_its_grid_and_zeros_stay(small_checkpoint, fake, scheme):
    masked = load_checkpoint(small_checkpoint, SPEC)
    network, tensors = grids.shipped(fake[scheme], few())
    assert all(type(module) in (nn.Conv2d, nn.Linear) for _, module in weight_layers(network))
    parameters = dict(network.named_parameters())
    assert [entry["name"] for entry in tensors] == [key for key in network.state_dict() if key in parameters]
    bits = dict(zip((f"{name}.weight" for name, _ in weight_layers(network)), FEW_BITS))
    for entry in tensors:
        value = parameters[entry["name"]].detach()
        if entry.get("kind") == "float16":
            assert entry["bits"] == 16 and torch.equal(value.half().float(), value)
            assert re.fullmatch(r"(.*\.)?(bn\d|shortcut\.1)\.weight", entry["name"])
            continue
        assert entry["bits"] == bits.get(entry["name"], 16) and math.frexp(entry["step"])[0] == 0.5
        code = value.double() / entry["step"]
        assert torch.equal(code, code.round())
        assert code.min() >= -2 ** (entry["bits"] - 1) and code.max() <= 2 ** (entry["bits"] - 1) - 1
        if entry["name"] in bits:
            before = masked.get_parameter(entry["name"])
            assert before[value != 0].all() and (before == 0).any()  # the mask is kept
            if scheme != "power-of-two" and "linear" not in entry["name"]:
                assert entry["step"] == 2.0 ** (1 - entry["bits"])
    assert not any((value.signbit() & (value == 0)).any() for value in network.state_dict().values())  # no -0.0
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert not module.running_mean.any()
            assert torch.equal(module.running_var, torch.full_like(module.running_var, 1 - 1e-5))


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_absorbing_a_scale_changes_nothing(fake, scheme, monkeypatch):
    """Without the rounding to 16 bits, what is shipped computes what the fake-quantized network computes."""
    monkeypatch.setattr(torch.Tensor, "half", lambda self: self)
    monkeypatch.setattr(grids, "store_fixed", lambda tensor, bits=16: {})
    network, _ = grids.shipped(fake[scheme], few())
    x = cifar100.normalise(cifar100.made_up(4, 5).images)
    logits = fake[scheme](x)
    assert torch.allclose(network(x), logits, atol=1e-4 * logits.abs().max().item(), rtol=0)
    assert not torch.allclose(network(x[[1, 0, 2, 3]]), logits, atol=1e-2 * logits.abs().max().item(), rtol=0)
    network.layers[4].bn2.weight[10] *= 1.05  # the comparison can fail
    assert not torch.allclose(network(x), logits, atol=1e-4 * logits.abs().max().item(), rtol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_each_shipped_layer_differs_by_the_16_bit_roundings_alone(fake, scheme):
    network, tensors = grids.shipped(fake[scheme], few())
    steps = {entry["name"]: entry.get("step") for entry in tensors}
    pairs = {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3", "0": "1"}
    for (name, theirs), (_, ours) in zip(weight_layers(fake[scheme])[:-1], weight_layers(network)):
        head, _, tail = name.rpartition(".")
        norm = ".".join(filter(None, (head, pairs[tail])))
        x = random(2, ours.in_channels, 6, 6, seed=len(name))
        before, after = fake[scheme].get_submodule(norm)(theirs(x)), network.get_submodule(norm)(ours(x))
        bn = fake[scheme].get_submodule(norm)
        shift = (bn.bias - bn.running_mean * bn.weight / (bn.running_var + bn.eps).sqrt())[:, None, None]
        bound = 2.0**-11 * (before - shift).abs() + steps[f"{norm}.bias"] / 2 + 1e-5 * (before.abs() + shift.abs())
        assert ((after - before).abs() <= bound).all()
        dead = ~fake_quantize(theirs.weight, theirs.step, *code_range(theirs.bits)).flatten(1).any(1)
        scale = network.get_submodule(norm).weight
        assert (scale[dead] == 0).all() and (scale[~dead] != 0).all()
        if name == "layers.3.conv1":
            assert dead[5]
    linear, exact = network.linear, fake[scheme].linear
    assert torch.equal(linear.weight, fake_quantize(exact.weight, exact.step, *code_range(8)))
    assert (linear.bias - exact.bias).abs().max() <= steps["linear.bias"] / 2


@torch.no_grad()
def test_a_dead_channels_scale_makes_no_difference(fake):
    network, tensors = grids.shipped(fake["channel"], few())
    network.layers[3].conv2.weight[5], network.layers[3].bn2.weight[5] = 0.5, 1.0  # so that what it adds goes on
    activations = calibrate(network, cifar100.made_up(5, 0).images, 8, "max")
    logits = exact_module.probe_logits(exact_module.exact_network(network, activations))
    assert network.layers[3].bn1.weight[5] == 0
    network.layers[3].bn1.weight[5] = 3.0
    assert exact_module.probe_logits(exact_module.exact_network(network, activations)) == logits
    network.layers[3].bn1.bias[5] += 3.0  # its shift does
    assert exact_module.probe_logits(exact_module.exact_network(network, activations)) != logits


@torch.no_grad()
def test_short_scales(fake):
    model = copy.deepcopy(fake["channel"])
    model.layers[3].bn2.weight[4] = 0
    before = {name: module.step for name, module in weight_layers(model)[:-1]}
    grids.shorten_scales(model)
    moved = 0
    for name, (norm, _) in layer_neighbours(model).items():
        step, old = model.get_submodule(name).step.flatten(), before[name].flatten()
        ratio = step / old
        assert ratio.min() > 1 - 1 / 32 and ratio.max() < 1 + 1 / 32
        moved += int((ratio != 1).sum())
        if name == "layers.3.conv2":
            assert step[4] == old[4]
    assert moved > 1000
    network, tensors = grids.shipped(model, few())
    steps = {entry["name"]: entry.get("step") for entry in tensors}
    for name, (norm, _) in layer_neighbours(model).items():
        scale = network.get_submodule(norm).weight
        significand = torch.frexp(scale)[0] * 32
        assert torch.equal(significand, significand.round())  # although it is a float16
        ours = exact_module.folded(model.get_submodule(norm))[0] * model.get_submodule(name).step.flatten()
        alive = scale != 0
        assert torch.allclose(scale.double()[alive] * steps[f"{name}.weight"], ours[alive], rtol=1e-6, atol=0)


@torch.no_grad()
def test_shifts_of_whole_units(fake):
    model = copy.deepcopy(fake["channel"])
    grids.shorten_scales(model)
    activations = calibrate(model, cifar100.made_up(20, 0).images, 8, "mse")
    before, tensors = grids.shipped(model, few())
    network = copy.deepcopy(before)
    assert grids.round_shifts(network, tensors, activations) is None
    steps = {entry["name"]: entry["step"] for entry in tensors + activations if "step" in entry}
    changed = 0
    for name, (norm, source) in layer_neighbours(network).items():
        scale, shift = (p.double() for p in network.get_submodule(norm).parameters())
        old = before.get_submodule(norm).bias.double()
        code, unit = shift / steps[f"{norm}.bias"], scale * steps[f"{name}.weight"] * steps[source]
        assert torch.equal(code, code.round()) and code.abs().max() <= 32767
        alive = scale != 0
        count = (shift / unit)[alive]
        assert torch.equal(count, count.round()) and torch.equal(shift[~alive], old[~alive])
        # the nearest: within half a unit where a unit is coarse, within half of 31 codes where it is fine
        bound = torch.maximum(unit.abs() / 2, torch.tensor(31 * steps[f"{norm}.bias"] / 2))
        assert ((shift - old).abs() <= bound)[old.abs() < 32000 * steps[f"{norm}.bias"]].all()
        changed += int((shift != old).sum())
    assert changed > 1000
    state = network.state_dict()
    grids.round_shifts(network, tensors, activations)
    assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())


def test_a_scale_that_16_bits_do_not_hold_is_named(fake):
    model = copy.deepcopy(fake["layer"])
    model.layers[2].bn3.weight.data[7] = 1e9
    with pytest.raises(BadInput, match="layers.2.bn3: its folded scale .* does not fit 16 bits"):
        grids.shipped(model, few())


def test_folded_by_hand():
    bn = nn.BatchNorm2d(2, eps=0.25)
    for tensor, values in ((bn.weight, [3.0, -1.0]), (bn.bias, [1.0, 0.5]), (bn.running_mean, [4.0, 2.0]),
                           (bn.running_var, [2.0, 0.0])):
        tensor.data.copy_(torch.tensor(values))
    scale, shift = exact_module.folded(bn)
    assert scale.tolist() == [2.0, -2.0] and shift.tolist() == [-7.0, 4.5] and scale.dtype == torch.float64


def test_store_fixed_by_hand():
    x = torch.tensor([0.75, -1.0, 1.5 * 2**-15, -(2.0**-16), 1e-9])
    assert grids.store_fixed(x) == {"bits": 16, "step": 2**-15}
    assert x.tolist() == [0.75, -1.0, 2**-14, 0.0, 0.0]
    zeros = torch.zeros(3)
    assert grids.store_fixed(zeros)["step"] == 1 and not zeros.any()


def test_a_shortened_step_is_at_most_three_percent_smaller():
    """Otherwise the largest weights would be clipped."""
    scale = torch.tensor([0.4, 1.4, 2.4, 3.45, -1.3, 100.0, 127.0])
    for bits in (4, 8, 15):
        assert (grids.short_step(torch.ones(7), scale, bits) >= 0.969).all()


def test_no_fixed_point_scale_is_clipped():
    for most, unit in ((127.0, 1), (127.4, 1), (127.6, 2), (64.0, 1), (63.5, 0.5)):
        assert float(grids.scale_unit(torch.tensor([1.0, most]), 8)) == unit


@torch.no_grad()
def test_a_rounded_shift_stays_within_its_bits():
    model = prepare(nn.Sequential(nn.Conv2d(3, 1, 32, bias=False), nn.BatchNorm2d(1), nn.ReLU(), nn.Flatten(),
                                  nn.Linear(1, 2)).eval())
    model[1].weight.fill_(29 * 2.0**-20)
    model[1].bias.fill_(32767.0)
    tensors = [{"name": "0.weight", "bits": 2, "step": 1.0}, {"name": "1.weight", "bits": 16, "kind": "float16"},
               {"name": "1.bias", "bits": 16, "step": 1.0}, {"name": "4.weight", "bits": 2, "step": 1.0},
               {"name": "4.bias", "bits": 16, "step": 1.0}]
    grids.round_shifts(model, tensors, points(model, step=1.0))
    assert model[1].bias.item() == 32767 // 29 * 29
