import contextlib
import copy
import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantize
from compressed import cifar100, claims, evaluation, kernels, threads
from compressed import exact_network as exact_module
from compressed.errors import BadInput
from compressed.files import load_json, save_record, sha256
from compressed.formats import code_range, codes, fake_quantize, power_of_two_step
from compressed.graph import activation_points, neighbours, weight_layers
from compressed.networks import load_checkpoint
from mobilenet_v2 import MobileNetV2
from quantize import SCHEMES, bit_table, calibrate, free_step
from tools.integer import IntegerNetwork


def ladder(scheme):
    """The steps that are reported before the dead weight's, without renewed statistics."""
    short = scheme == "channel"
    return ["float", f"weights at 6/8 bits, {scheme}", *["steps moved for scales of 5 significant bits"] * short,
            "activations at 8 bits, mse", "BatchNorm folded, scales, shifts, biases at 16 bits",
            *["shifts rounded to whole accumulator units"] * short]


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


def test_halves_go_to_even():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, -0.51, 0.49, -1.0])
    assert codes(x, 1.0, -8, 7).tolist() == [-2, -2, 0, 0, 2, 2, -1, 0, -1]
    assert codes(x / 4, 0.25, -8, 7).tolist() == [-2, -2, 0, 0, 2, 2, -1, 0, -1]
    assert codes(torch.tensor([-99.0, 99.0, 7.4, 7.5]), 1.0, -8, 7).tolist() == [-8, 7, 7, 7]


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


def test_the_gradient_is_one_inside_and_zero_outside():
    for low, high in (code_range(4), code_range(4, signed=False)):
        # in range is what is rounded to a code; what is clipped to one is outside
        x = torch.tensor([low - 0.75, low - 0.25, low + 0.3, 0.1, 3.4, high + 0.25,
                          high + 0.75]).mul_(0.25).requires_grad_()
        fake_quantize(x, 0.25, low, high).backward(torch.arange(1.0, 8.0))
        assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 0]


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

        candidates = [float(top * share / high) for share in torch.linspace(0.4, 1.0, 40).tolist()]
        errors = [error(candidate) for candidate in candidates]
        assert any(math.isclose(float(step), candidate, rel_tol=1e-6) for candidate in candidates)
        assert error(float(step)) <= min(errors) * (1 + 1e-4)
        assert min(errors) < max(errors) or not rows.any()
    assert torch.isfinite(fake_quantize(weight, found, low, high)).all()


# --------------------------------------------------------------------------------------------------------- bit table

def test_the_submissions_bits():
    table = bit_table(None)
    assert [i for i, bits in enumerate(table) if bits == 6] == [3, 5, 8, 10, 11, 14, 16, 19, 55]
    assert len(table) == 58 and set(table) == {6, 8}


def test_other_bit_tables(tmp_path):
    assert bit_table("4") == [4] * 58
    path = tmp_path / "t.toml"
    path.write_text('default = 7\n[bits]\n"layers.0.conv3" = 5\n57 = 6\nconv1 = 8\n"layers.16.shortcut.0" = 2\n')
    table = bit_table(str(path))
    assert (table[3], table[57], table[0], table[55]) == (5, 6, 8, 2) and table.count(7) == 54
    path.write_text("[bits]\n9 = 3\n")
    assert bit_table(str(path)) == [8] * 9 + [3] + [8] * 48
    path.write_text("")
    assert bit_table(str(path)) == [8] * 58


@pytest.mark.parametrize("content, message", [
    ("[bits]\nconv9 = 6", "has no layer 'conv9'"), ("[bits]\n58 = 6", "has no layer '58'"),
    ("[bits]\n-1 = 6", "has no layer '-1'"), ("[bits]\nlayers.0.conv1 = 6",
                                              "no layer 'layers' .names with dots need quotes"),
    ("[bits]\nconv1 = 9", "9 bits for conv1: expected 2 to 8"), ("default = 1", "1 bits for conv1"),
    ("[bits]\nconv1 = 6.0", "6.0 bits"), ("[bits]\nconv1 = '6'", "'6' bits"), ("default = true", "True bits"),
    ("conv1 = 6", "nothing but"), ("bits = 6", "nothing but"), ("[bit]\nconv1 = 6", "nothing but"),
    ("[bits", "not a TOML file"), ("[bits]\nconv1 = 6\nconv1 = 7", "not a TOML file"),
])
def test_bit_tables_that_are_wrong(tmp_path, content, message):
    path = tmp_path / "t.toml"
    path.write_text(content)
    with pytest.raises(BadInput, match=message):
        bit_table(str(path))


@pytest.mark.parametrize("option, message", [
    ("1", "1 bits for conv1: expected 2 to 8"), ("9", "9 bits"), ("-3", "no bit table '-3'"), ("", "no bit table ''"),
    ("nowhere.toml", "no bit table 'nowhere.toml': give a number of bits or a TOML file"), (".", "no bit table"),
])
def test_bit_tables_that_are_not_there(option, message):
    with pytest.raises(BadInput, match=message):
        bit_table(option)


# ------------------------------------------------------------------------------------------------------- activations

def test_the_55_activation_points():
    points = activation_points(MobileNetV2())
    signs = dict(points)
    assert len(points) == len(signs) == 55
    signed = {"image", *(f"layers.{i}.out" for i in range(17))}
    unsigned = {"relu1", "relu2", "features", *(f"layers.{i}.relu{j}" for i in range(17) for j in (1, 2))}
    assert {name for name, sign in signs.items() if sign} == signed
    assert {name for name, sign in signs.items() if not sign} == unsigned


@torch.no_grad()
def seen(model, images):
    """{name: all values at the activation point}, looked at with hooks of our own."""
    values = {}
    hooks = [model.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: values.__setitem__(name, out))
             for name in activation_points(model)]
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
def values(sparse_checkpoint, images):
    return seen(load_checkpoint(sparse_checkpoint), images)


@pytest.mark.parametrize("bits, ranges", [(8, "mse"), (4, "max"), (4, "mse")])
def test_calibrated_ranges(sparse_checkpoint, images, values, bits, ranges):
    model = load_checkpoint(sparse_checkpoint)
    chosen = calibrate(model, images, bits, ranges)
    points, finer = activation_points(model), 0
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
    model = MobileNetV2().eval()
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


def test_steps_that_the_logits_prefer():
    """Beside a slow search of the same kind, on a network of which one step is far too coarse."""
    torch.manual_seed(0)
    model = MobileNetV2(7, 0.25).eval()
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
    quantize.choose_steps(model, images, reference)
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
    assert chosen == steps() and chosen["image"] == before["image"] == 2**-6 * 4
    assert chosen["relu1"] == before["relu1"] / 2
    assert least < worst and sum(chosen[name] != before[name] for name in before) > 2


def claimed_activations(**changes):
    return [{"name": name, "bits": 8, "signed": signed, "step": 0.125} | changes.get(name, {})
            for name, signed in activation_points(MobileNetV2()).items()]


@pytest.mark.parametrize("entry, message", [
    ({"step": 0.3}, "expected 1 to 16 and a power of two"), ({"step": 0}, "with step 0"),
    ({"step": -0.5}, "with step -0.5"),
    ({"step": None}, "with step None"), ({"step": "0.5"}, "with step 0.5"), ({"step": math.inf}, "with step inf"),
    ({"step": math.nan}, "with step nan"), ({"step": 10**400}, "with step 1000"),
    ({"bits": 0}, "0 bits"), ({"bits": 17}, "17 bits"),
    ({"bits": None}, "None bits"),
    ({"signed": True}, "signed is True, expected False"), ({"signed": None}, "signed is None"),
    ({"signed": 0}, "signed is 0"),
    ({"name": "relu3"}, r"missing \['relu1'\], unknown \['relu3'\]"),
    ({"name": None}, r"missing \['relu1'\], unknown \['None'\]"),
    ({"name": "relu2"}, r"not the network's 55: missing \['relu1'\]"),
])
def test_activations_that_are_refused(entry, message):
    model = MobileNetV2()
    with pytest.raises(BadInput, match=message):
        exact_module.quantize_activations(model, claimed_activations(relu1=entry))


def test_missing_activations_are_refused():
    with pytest.raises(BadInput, match=r"missing \['layers.16.out', 'relu2'\], unknown \[\]"):
        exact_module.quantize_activations(MobileNetV2(), [entry for entry in claimed_activations()
                                                      if entry["name"] not in ("relu2", "layers.16.out")])


def test_a_quantizer_stands_at_every_point():
    model = MobileNetV2().eval()
    exact_module.quantize_activations(model, claimed_activations(relu2={"step": 0.5, "bits": 4}))
    values = seen(model, cifar100.made_up(2, 0).images)
    assert len(values) == 55 and isinstance(model.relu2, exact_module.Quantizer) and model.relu2.bits == 4
    for name, signed in activation_points(model).items():
        low, high, step = (0, 15, 0.5) if name == "relu2" else (*code_range(8, signed), 0.125)
        scaled = values[name] / step
        assert torch.equal(scaled, scaled.round()) and scaled.min() >= low and scaled.max() <= high
    assert list(model.state_dict()) == list(MobileNetV2().state_dict())
    x = random(1000) * 20
    for signed in (True, False):
        quantizer = exact_module.Quantizer(8, signed, 0.125)
        expected = [slow_code(value, 0.125, *code_range(8, signed)) * 0.125 for value in x.tolist()]
        assert quantizer(x).tolist() == expected == quantizer(x.clone().requires_grad_()).tolist()


# ----------------------------------------------------------------------------------------------------------- shipped

@pytest.fixture(scope="module")
def fake(sparse_checkpoint):
    """{scheme: the sparse network with weights that are rounded on the way}"""
    models = {}
    for scheme in SCHEMES:
        models[scheme] = load_checkpoint(sparse_checkpoint)
        quantize.quantize_weights(models[scheme], bit_table(None), scheme)
    return models


def test_unknown_scheme():
    with pytest.raises(BadInput, match="unknown scheme 'log'; known: power-of-two, layer, channel"):
        quantize.quantize_weights(MobileNetV2(), bit_table(None), "log")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_steps_of_the_schemes(sparse_checkpoint, fake, scheme):
    latent = load_checkpoint(sparse_checkpoint)
    for (name, module), (_, before), bits in zip(weight_layers(fake[scheme]), weight_layers(latent), bit_table(None)):
        assert module.bits == bits and torch.equal(module.weight, before.weight)
        largest = before.weight.detach().abs().max().item()
        if scheme == "power-of-two" or name == "linear":
            assert float(module.step) == 2.0 ** (math.ceil(math.log2(largest)) - bits + 1)
        else:
            assert module.step.shape == (len(before.weight) if scheme == "channel" else 1, 1, 1, 1)
            assert torch.equal(module.step, free_step(before.weight, bits, scheme == "channel"))
    assert list(fake[scheme].state_dict()) == list(latent.state_dict())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_shipped_value_stands_on_its_grid_and_zeros_stay(sparse_checkpoint, fake, scheme):
    masked = load_checkpoint(sparse_checkpoint)
    network, tensors = quantize.shipped(fake[scheme])
    MobileNetV2().load_state_dict(network.state_dict(), strict=True)
    assert type(network) is MobileNetV2
    assert all(type(module) in (nn.Conv2d, nn.Linear) for _, module in weight_layers(network))
    parameters = dict(network.named_parameters())
    assert [entry["name"] for entry in tensors] == [key for key in network.state_dict() if key in parameters]
    bits = dict(zip((f"{name}.weight" for name, _ in weight_layers(network)), bit_table(None)))
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
    monkeypatch.setattr(quantize, "store_fixed", lambda tensor, name: {"name": name})
    network, _ = quantize.shipped(fake[scheme])
    x = cifar100.normalise(cifar100.made_up(4, 5).images)
    logits = fake[scheme](x)
    assert torch.allclose(network(x), logits, atol=1e-4 * logits.abs().max().item(), rtol=0)
    assert not torch.allclose(network(x[[1, 0, 2, 3]]), logits, atol=1e-2 * logits.abs().max().item(), rtol=0)
    network.layers[8].bn2.weight[10] *= 1.05  # the comparison can fail
    assert not torch.allclose(network(x), logits, atol=1e-4 * logits.abs().max().item(), rtol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_each_shipped_layer_differs_by_the_16_bit_roundings_alone(fake, scheme):
    network, tensors = quantize.shipped(fake[scheme])
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
    network, tensors = quantize.shipped(fake["channel"])
    activations = calibrate(network, cifar100.made_up(5, 0).images, 8, "max")
    logits = exact_module.probe_logits(exact_module.exact_network(network, activations))
    assert network.layers[3].bn1.weight[5] == 0
    network.layers[3].bn1.weight[5] = 3.0
    assert exact_module.probe_logits(exact_module.exact_network(network, activations)) == logits
    network.layers[3].bn1.bias[5] += 3.0  # its shift does
    assert exact_module.probe_logits(exact_module.exact_network(network, activations)) != logits


@torch.no_grad()
def test_neighbours_are_those_of_the_forward_pass():
    """What a layer reads and what scales it, found by running the network."""
    model = MobileNetV2().eval()
    table, made, seen = neighbours(model), {}, {}
    points, norms = activation_points(model), {norm for norm, _ in table.values()}

    def see(name):
        def hook(module, inputs, out):
            source = made.get(inputs[0].data_ptr())
            if name in norms:
                seen[source] = name, seen[source]
            elif name in table:
                seen[name] = source
            made[out.data_ptr()] = name
            kept.append(out)  # no address is used twice
        return hook

    kept = [torch.randn(1, 3, 32, 32)]
    for name, module in model.named_modules():
        if name in points or name in norms or name in table:
            module.register_forward_hook(see(name))
    model(kept[0])
    assert seen == table and len(table) == 57


@torch.no_grad()
def test_short_scales(fake):
    model = copy.deepcopy(fake["channel"])
    model.layers[3].bn2.weight[4] = 0
    before = {name: module.step for name, module in weight_layers(model)[:-1]}
    quantize.shorten_scales(model)
    moved = 0
    for name, (norm, _) in neighbours(model).items():
        step, old = model.get_submodule(name).step.flatten(), before[name].flatten()
        ratio = step / old
        assert ratio.min() > 1 - 1 / 32 and ratio.max() < 1 + 1 / 32
        moved += int((ratio != 1).sum())
        if name == "layers.3.conv2":
            assert step[4] == old[4]
    assert moved > 20_000
    network, tensors = quantize.shipped(model)
    steps = {entry["name"]: entry.get("step") for entry in tensors}
    for name, (norm, _) in neighbours(model).items():
        scale = network.get_submodule(norm).weight
        significand = torch.frexp(scale)[0] * 32
        assert torch.equal(significand, significand.round())  # although it is a float16
        ours = exact_module.folded(model.get_submodule(norm))[0] * model.get_submodule(name).step.flatten()
        alive = scale != 0
        assert torch.allclose(scale.double()[alive] * steps[f"{name}.weight"], ours[alive], rtol=1e-6, atol=0)


@torch.no_grad()
def test_shifts_of_whole_units(fake):
    model = copy.deepcopy(fake["channel"])
    quantize.shorten_scales(model)
    activations = calibrate(model, cifar100.made_up(20, 0).images, 8, "mse")
    before, tensors = quantize.shipped(model)
    network = copy.deepcopy(before)
    assert quantize.round_shifts(network, tensors, activations) is None
    steps = {entry["name"]: entry["step"] for entry in tensors + activations if "step" in entry}
    changed = 0
    for name, (norm, source) in neighbours(network).items():
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
    assert changed > 10_000
    state = network.state_dict()
    quantize.round_shifts(network, tensors, activations)
    assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())


def test_a_scale_that_16_bits_do_not_hold_is_named(fake):
    model = copy.deepcopy(fake["layer"])
    model.layers[2].bn3.weight.data[7] = 1e9
    with pytest.raises(BadInput, match="layers.2.bn3: its folded scale .* does not fit 16 bits"):
        quantize.shipped(model)


def test_folded_by_hand():
    bn = nn.BatchNorm2d(2, eps=0.25)
    for tensor, values in ((bn.weight, [3.0, -1.0]), (bn.bias, [1.0, 0.5]), (bn.running_mean, [4.0, 2.0]),
                           (bn.running_var, [2.0, 0.0])):
        tensor.data.copy_(torch.tensor(values))
    scale, shift = exact_module.folded(bn)
    assert scale.tolist() == [2.0, -2.0] and shift.tolist() == [-7.0, 4.5] and scale.dtype == torch.float64


def test_store_fixed_by_hand():
    x = torch.tensor([0.75, -1.0, 1.5 * 2**-15, -(2.0**-16), 1e-9])
    assert quantize.store_fixed(x, "b") == {"name": "b", "bits": 16, "step": 2**-15}
    assert x.tolist() == [0.75, -1.0, 2**-14, 0.0, 0.0]
    zeros = torch.zeros(3)
    assert quantize.store_fixed(zeros, "z")["step"] == 1 and not zeros.any()


# ----------------------------------------------------------------------------------------------------- exact network

@pytest.fixture(scope="module")
def exact(fake):
    """{scheme: (shipped network, its tensors, its activations, the exact network)}"""
    made = {}
    for scheme, ranges in zip(SCHEMES, ("max", "mse", "mse")):
        network, tensors = quantize.shipped(fake[scheme])
        activations = calibrate(fake[scheme], cifar100.made_up(20, 0).images, 8, ranges)
        made[scheme] = network, tensors, activations, exact_module.exact_network(network, activations)
    return made


@pytest.fixture(scope="module")
def pictures():
    return torch.cat([cifar100.made_up(6, 7).images,
                      torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 32, 32),
                      torch.randint(0, 256, (3, 3, 32, 32),
                                    generator=torch.Generator().manual_seed(0)).to(torch.uint8)])


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_the_exact_network_computes_what_integers_do(exact, scheme, pictures):
    """And test_integer.py holds those against fractions."""
    network, tensors, activations, floats = exact[scheme]
    integers = IntegerNetwork.from_checkpoint(network, {"tensors": tensors, "activations": activations})
    logits = floats(cifar100.normalise(pictures).contiguous(memory_format=torch.channels_last))
    assert torch.equal(logits, (integers(pictures).double() * 2.0**integers.logit_exponent).float())
    assert (logits.std(0) > 1e-3).all()
    assert not torch.equal(network(cifar100.normalise(pictures)), logits)  # in float32 it is another network


@torch.no_grad()
def test_the_exact_network_does_not_depend_on_how_it_runs(exact, pictures):
    *_, network = exact["channel"]
    x = cifar100.normalise(pictures)
    logits = network(x.contiguous(memory_format=torch.channels_last))
    assert torch.equal(network(x), logits)
    assert torch.equal(torch.cat([network(image) for image in x.split(1)]), logits)
    assert torch.equal(torch.cat([network(image) for image in x.split(4)]), logits)
    assert torch.equal(network(x.flip(0)).flip(0), logits)
    plain = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    assert torch.equal(plain(x), logits)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(network(x), logits)
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(network(x), logits)
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_the_linear_layers_sums_are_exact_beyond_float32():
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(1664, 100)
    weight, bias = (torch.randint(low, high, shape, generator=generator)
                    for low, high, shape in ((1, 128, (100, 1664)), (-2**15, 2**15, (100,))))
    x = torch.randint(100, 256, (8, 1664), generator=generator)
    linear.weight.copy_(weight * 2.0**-7)
    linear.bias.copy_(bias * 2.0**-17)
    linear.__class__ = exact_module.ExactLinear
    sums = (x @ weight.T) * 16 + bias  # int64, in units of 2^-17
    assert sums.min() > 2**26 and torch.equal(linear(x * 2.0**-6), (sums.double() * 2.0**-17).float())
    assert linear(x * 2.0**-6).dtype == torch.float32


def test_the_exact_network_is_a_copy(exact):
    network, _, activations, fast = exact["layer"]
    assert isinstance(network.bn1, nn.BatchNorm2d) and isinstance(network.relu1, nn.ReLU)
    assert network.conv1.weight.requires_grad
    norm = fast.relu1.norm
    assert isinstance(norm, exact_module.ScaleShift) and not fast.training and not fast.conv1.weight.requires_grad
    assert torch.equal(norm.scale.flatten(), network.bn1.weight)
    assert torch.equal(norm.shift.flatten(), network.bn1.bias)


@pytest.mark.skipif(kernels.library(torch.float32) is None, reason="there is no C compiler")
@pytest.mark.parametrize("layout", (torch.channels_last, torch.contiguous_format))
@pytest.mark.parametrize("signed", (True, False))
def test_compiled_rounding_is_pytorchs_to_the_last_bit(monkeypatch, layout, signed):
    """Codes beyond both ends, halves that go to even, sums that only a float64 tells from halves."""
    generator, step = torch.Generator().manual_seed(0), 2.0**-3
    x = torch.randint(-2**24, 2**24, (2, 5, 6, 7), generator=generator).float().contiguous(memory_format=layout)
    x[0, 0, 0, :4] = torch.tensor([0.0, 8.0, -8.0, 24.0])
    bn = nn.BatchNorm2d(5)
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([2.0**-7, 1027 * 2.0**-31, -1.5 * 2.0**-22, 0.0, 2.0**-3]))
        bn.bias.copy_(torch.tensor([0.0, 2.0**-4, 5 * 2.0**-4, 2.0**-3, -1.0]))
    bn.running_var.fill_(1 - bn.eps)
    quantizer = exact_module.Quantizer(8, signed, step)
    rescale = exact_module.Rescale(exact_module.ScaleShift(bn), quantizer)
    with torch.no_grad():
        ours = rescale(x), quantizer(x * 2.0**-18), quantizer((x * 2.0**-18)[:, :, 0, 0])
        monkeypatch.setattr(kernels, "library", lambda dtype: None)
        theirs = rescale(x), quantizer(x * 2.0**-18), quantizer((x * 2.0**-18)[:, :, 0, 0])
    low, high = code_range(8, signed)
    assert all(map(torch.equal, ours, theirs))
    assert all(len(found.unique()) > 3 and found.max() == high * step for found in ours[:2])
    assert ours[0][0, 0, 0, :4].tolist() == [0, 0, 0, 2 * step]  # 0.5 and -0.5 to 0, 1.5 to 2
    for found in ours[:2]:
        assert found.min() == low * step


# ------------------------------------------------------------------------------------------------------------ claims

def test_the_probe_is_fixed():
    images = exact_module.probe_images()
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.uint8
    assert images.flatten()[:6].tolist() == [(i * 2654435761 // 2**13) % 256 for i in range(6)]
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    assert digest == "b4a262216347db103b2bdcb249b9e3f086211fb020051f6bdc83970869fa0983"


def test_evaluate_by_hand():
    class Brightest(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    images = torch.zeros(70, 3, 4, 4, dtype=torch.uint8)
    labels = torch.arange(70) % 3
    images[torch.arange(70), labels] = 192  # (192 - 128) / 64 = 1 for the label, -2 for the others
    labels[:5] = (labels[:5] + 1) % 3
    loss, correct = quantize.evaluate(Brightest(), cifar100.Images(images, labels))
    right = math.log(1 + 2 * math.exp(-3))
    assert correct == 65 and loss == pytest.approx(right + 3 * 5 / 70, rel=1e-6)


def test_renewed_statistics_do_not_depend_on_the_threads(monkeypatch):
    """Three batches for two threads: their means count as many images as they are of."""
    data, found = cifar100.made_up(750, 0), []
    for cores in (1, 2):
        monkeypatch.setattr(threads, "cores", lambda: cores)
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
        with torch.no_grad():
            model[0].weight.copy_(torch.linspace(-1, 1, 12).view(4, 3, 1, 1))
            model[0].bias.zero_()
        evaluation.renew_statistics(model, data, 750, "plain", torch.Generator().manual_seed(0))
        found.append(model[1])
    assert not found[0].training and found[0].running_mean.abs().max() > 1e-3
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(found[0], name), getattr(found[1], name), rtol=1e-5, atol=1e-7)


def test_renewed_means_leave_the_variances():
    data, found = cifar100.made_up(500, 0), []
    for renew in (evaluation.renew_statistics, evaluation.renew_means):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
        renew(model, data, 500, "plain", torch.Generator().manual_seed(0))
        found.append(model[1])
    assert not found[1].training and found[0].running_mean.abs().max() > 1e-3
    assert torch.equal(found[0].running_mean, found[1].running_mean)
    assert torch.equal(found[1].running_var, torch.ones(4)) and not torch.equal(found[0].running_var, torch.ones(4))


def test_the_training_record(tmp_path):
    assert quantize.training_record(tmp_path / "masked.pt") == []
    save_record({"machine": "m", "train_images": 9, "settings": {"lr": 1}, "more": 0}, tmp_path / "rew.options.json")
    assert quantize.training_record(tmp_path / "masked.pt") == []
    (tmp_path / "rew.jsonl").write_text('{"step": 1}\n{"step": 2, "loss": 0.5}\n')
    assert quantize.training_record(tmp_path / "masked.pt") == [
        {"stage": "rew", "machine": "m", "train_images": 9, "settings": {"lr": 1},
         "last_epoch": {"step": 2, "loss": 0.5}}]
    for stage in ("masked", "masked-10", "masked-9", "masked-x", "quantized"):
        for kind in ("options.json", "jsonl"):
            shutil.copy(tmp_path / f"rew.{kind}", tmp_path / f"{stage}.{kind}")
    assert [stage["stage"] for stage in quantize.training_record(tmp_path / "masked.pt")] == [
        "rew", "masked-9", "masked-10", "masked"]
    assert quantize.training_record(tmp_path / "masked.pt", tuned=True)[-1]["stage"] == "quantized"
    for wrong in ("", "{}\n", "garbage\n"):
        (tmp_path / "rew.jsonl").write_text(wrong)
        with pytest.raises(BadInput, match="rew"):
            quantize.training_record(tmp_path / "masked.pt")


# -------------------------------------------------------------------------------------------------------- the script

def options(checkpoint, out, scheme, *more):
    return ["--checkpoint", str(checkpoint), "--out", str(out), "--made-up", "100", "--calibration", "20", "--renew",
            "0", "--ranges", "mse", "--scheme", scheme, *more]


def short_and_whole(path) -> bool:
    """Whether all scales have 5 significant bits and all shifts are whole units of their accumulators."""
    model, claim = load_checkpoint(path), load_json(path.with_suffix(".json"))
    steps = {entry["name"]: entry["step"] for entry in claim["tensors"] + claim["activations"] if "step" in entry}
    good = []
    for name, (norm, source) in neighbours(model).items():
        scale, shift = (p.detach().double() for p in model.get_submodule(norm).parameters())
        significand = torch.frexp(scale)[0] * 32
        units = shift[scale != 0] / (scale[scale != 0] * steps[f"{name}.weight"] * steps[source])
        good.append(torch.equal(significand, significand.round()) and torch.equal(units, units.round()))
    return all(good)


@pytest.fixture(scope="module")
def runs(sparse_checkpoint, tmp_path_factory):
    """{scheme: (the file written, the command line, the lines printed)}"""
    made = {}
    for scheme in SCHEMES:
        out = tmp_path_factory.mktemp(scheme) / "new" / "out.pt"
        argv = options(sparse_checkpoint, out, scheme)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert quantize.main(argv) == 0
        made[scheme] = out, argv, printed.getvalue().splitlines()
    return made


@pytest.mark.parametrize("scheme", SCHEMES)
def test_from_a_masked_checkpoint_to_a_shipped_one(sparse_checkpoint, runs, scheme):
    out, argv, printed = runs[scheme]
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.json", "out.pt"]
    claim = load_json(out.with_suffix(".json"))
    assert claim["sha256"] == sha256(out) == hashlib.sha256(out.read_bytes()).hexdigest()
    assert claim["checkpoint"] == "out.pt"
    assert printed[-1] == f"wrote {out} and {out.with_suffix('.json')}"

    steps = claim["accuracy_by_step"]
    assert [step["step"] for step in steps[:-1]] == ladder(scheme)
    assert re.fullmatch(r"dead weight removed: [\d,]{3,} weights", steps[-1]["step"])
    assert steps[-1] | {"step": steps[-2]["step"]} == steps[-2]  # it changes nothing
    before = None
    for step, line in zip(steps, printed, strict=False):
        lost = "" if before is None else f", {step['correct'] - before:+}.00%"
        shown = re.escape(f"{step['correct']}/100 ({step['correct']}.00%{lost}), loss {step['loss']:.4f}")
        assert re.fullmatch(re.escape(step["step"]) + " +" + shown, line)
        before = step["correct"]
    data = cifar100.made_up(100, 1)
    with torch.no_grad():
        logits = load_checkpoint(sparse_checkpoint)(cifar100.normalise(data.images))
    assert steps[0]["correct"] == (logits.argmax(1) == data.labels).sum()
    assert short_and_whole(out) == (scheme == "channel")
    assert steps[0]["loss"] == pytest.approx(F.cross_entropy(logits, data.labels).item(), rel=1e-4)

    model = load_checkpoint(out)
    network = exact_module.exact_network(model, claim["activations"])
    loss, correct = quantize.evaluate(network, data)
    assert claim["accuracy"] == {"data": "made up", "correct": correct, "images": 100, "loss": pytest.approx(loss)}
    assert correct == steps[-1]["correct"] and 3 < correct < steps[0]["correct"]
    assert len({step["loss"] for step in steps}) == len(steps) - 1
    assert claim["probe_logits"] == exact_module.probe_logits(network) and np.shape(claim["probe_logits"]) == (4, 100)
    bits = {entry["name"]: entry["bits"] for entry in claim["tensors"]}
    assert [bits[f"{name}.weight"] for name, _ in weight_layers(model)] == bit_table(None)
    assert {entry["bits"] for entry in claim["activations"]} == {8} and len(claim["activations"]) == 55
    conv = [module.weight for _, module in weight_layers(model)][:-1]
    zeros = sum(int((weight == 0).sum()) for weight in conv)
    assert claim["counts"]["weights"]["conv"]["zeros"] == zeros >= 0.74 * 3_777_632
    assert claim["made_by"]["command"] == "python quantize.py " + " ".join(argv)
    assert claim["made_by"]["source_sha256"] == sha256(sparse_checkpoint) and claim["made_by"]["training"] == []


def test_other_options(sparse_checkpoint, tmp_path):
    out = tmp_path / "out.pt"
    assert quantize.main(options(sparse_checkpoint, out, "power-of-two", "--table", "5", "--activation-bits", "6",
                                 "--ranges", "max")) == 0
    claim = load_json(out.with_suffix(".json"))
    steps = [step["step"] for step in claim["accuracy_by_step"]]
    assert steps[1:3] == ["weights at 5 bits, power-of-two", "activations at 6 bits, max"]
    assert {entry["bits"] for entry in claim["tensors"]} == {5, 16}
    assert {entry["bits"] for entry in claim["activations"]} == {6}
    assert all(entry["step"] == 2.0 ** round(math.log2(entry["step"])) for entry in claim["activations"])


def test_a_disk_that_is_full_after_the_weights_is_noticed(sparse_checkpoint, runs, tmp_path, monkeypatch, capsys):
    import testers

    out, replace = tmp_path / "out.pt", os.replace
    old = runs["layer"][0].with_suffix(".json").read_bytes()
    out.with_suffix(".json").write_bytes(old)

    def full(source, target):
        if str(target).endswith(".json"):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        quantize.main(options(sparse_checkpoint, out, "power-of-two"))
    assert out.with_suffix(".json").read_bytes() == old and len(list(tmp_path.iterdir())) == 2
    assert testers.main(["--checkpoint", str(out), "--made-up", "100"]) == 2
    assert "is about another file" in capsys.readouterr().err


@pytest.mark.parametrize("words, said", [
    (["--out", "same.pt"], "same.pt would be written over same.pt, which is read"),
    (["--out", "link.pt"], "link.pt would be written over same.pt, which is read"),
    (["--out", "new.pt", "--teacher", "new.pt"], "new.pt would be written over new.pt, which is read"),
    (["--out", "t.pt", "--table", "t.json"], "t.json would be written over t.json, which is read"),
    (["--out", "b.json"], "b.json: expected a name that ends in .pt"), (["--out", "c.mnet"], "ends in .pt"),
    (["--out", "model.v1"], "ends in .pt"), (["--out", "/dev/null"], "ends in .pt"),
    (["--out", "folder.pt"], "folder.pt: cannot be written .it is a folder"),
    (["--out", "quantized.pt", "--epochs", "1"], "quantized.pt would be written twice"),
    (["--out", "new.pt", "--epochs", "1", "--teacher", "quantized.pt"],
     "quantized.pt would be written over quantized.pt, which is read"),
])
def test_outputs_that_are_inputs_or_cannot_be_read(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    for name in ("same.pt", "t.json", "quantized.pt"):
        Path(name).write_text(name)
    Path("folder.pt").mkdir()
    Path("link.pt").symlink_to("same.pt")
    with pytest.raises(BadInput, match=said):
        quantize.main(["--checkpoint", "same.pt", *words])
    for name in ("same.pt", "t.json", "quantized.pt"):
        assert Path(name).read_text() == name
    assert len(list(tmp_path.iterdir())) == 5


def test_bad_input(sparse_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="runs/default/masked.pt: no such checkpoint"):
        quantize.main([])
    with pytest.raises(BadInput, match="no bit table 'nowhere'"):
        quantize.main(["--table", "nowhere", "--checkpoint", str(sparse_checkpoint)])
    with pytest.raises(BadInput, match="nowhere .*holds no CIFAR-100"):
        quantize.main(["--data", "nowhere", "--checkpoint", str(sparse_checkpoint)])
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- fine-tuning

TUNE = ("--epochs", "1", "--batch-size", "50", "--augment", "none", "--mixing", "none", "--no-cuda")


def test_fine_tuning_keeps_the_zeros(sparse_checkpoint, runs, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    checkpoint = folder / "masked.pt"
    checkpoint.write_bytes(sparse_checkpoint.read_bytes())
    plain, tuned = runs["channel"][0], tmp_path / "tuned.pt"
    assert quantize.main(options(checkpoint, tuned, "channel", *TUNE)) == 0
    claim, untouched = load_json(tuned.with_suffix(".json")), load_json(plain.with_suffix(".json"))
    assert [step["step"] for step in claim["accuracy_by_step"]] == [
        *ladder("channel")[:4], "fine-tuned for 1 epochs", "steps moved again: the scales were trained",
        *ladder("channel")[4:],
        claim["accuracy_by_step"][-1]["step"]]
    assert short_and_whole(tuned)
    assert claim["activations"] == untouched["activations"]  # the steps stay
    assert claim["accuracy_by_step"][:4] == untouched["accuracy_by_step"][:4]
    masked, before, after = load_checkpoint(checkpoint), load_checkpoint(plain), load_checkpoint(tuned)
    changed = 0
    for (name, zeros), (_, old), (_, new) in zip(*map(weight_layers, (masked, before, after))):
        assert (new.weight[zeros.weight == 0] == 0).all()
        changed += int((old.weight != new.weight).sum())
    assert changed > 1000 and not torch.equal(before.linear.bias, after.linear.bias)
    log = [json.loads(line) for line in (folder / "quantized.jsonl").read_text().splitlines()]
    assert len(log) == 1 and log[0]["stage"] == "quantized"
    assert not (folder / "quantized.state").exists() and sha256(checkpoint) == claim["made_by"]["source_sha256"]


def test_a_finished_fine_tuning_is_taken_up(sparse_checkpoint, tmp_path, monkeypatch):
    """The same command, on another machine perhaps, ships what quantized.pt holds; with other options it is refused."""
    checkpoint = tmp_path / "masked.pt"
    checkpoint.write_bytes(sparse_checkpoint.read_bytes())
    tune = (*TUNE, "--optimizer", "muon", "--turn", "0.001", "--teacher", str(sparse_checkpoint), str(checkpoint))
    first, second = tmp_path / "first.pt", tmp_path / "second.pt"
    assert quantize.main(options(checkpoint, first, "channel", *tune)) == 0
    monkeypatch.setattr(quantize, "on_grids", None)
    monkeypatch.setattr(quantize, "fine_tune", None)
    assert quantize.main(options(checkpoint, second, "channel", *tune)) == 0
    assert first.read_bytes() == second.read_bytes()
    one, other = (load_json(path.with_suffix(".json")) for path in (first, second))
    assert one["accuracy_by_step"] == other["accuracy_by_step"] and one["activations"] == other["activations"]
    assert [stage["stage"] for stage in other["made_by"]["training"]] == ["quantized"]
    with pytest.raises(BadInput, match="quantized.pt was fine-tuned from another checkpoint or with other options"):
        quantize.main(options(checkpoint, second, "channel", *tune, "--lr", "0.5"))
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "quantized.pt")
    with pytest.raises(BadInput, match="not what a fine-tuning writes; --no-resume"):
        quantize.main(options(checkpoint, second, "channel", *tune))
    monkeypatch.undo()

    def killed(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(quantize.loop.Stage, "step", killed)  # another one begins in the same folder, and does not end
    with pytest.raises(KeyboardInterrupt):
        quantize.main(options(checkpoint, second, "channel", *tune, "--lr", "0.5", "--no-resume"))
    assert not (tmp_path / "quantized.pt").exists()


def test_fine_tuning_trains_weights_alone(sparse_checkpoint, tmp_path):
    model = load_checkpoint(sparse_checkpoint)
    quantize.quantize_weights(model, bit_table(None), "layer")
    exact_module.quantize_activations(model, calibrate(model, cifar100.made_up(10, 0).images, 8, "max"))
    before = copy.deepcopy(model.state_dict())
    steps = [module.step.clone() for _, module in weight_layers(model)]
    data = cifar100.made_up(20, 0)
    checkpoint = tmp_path / "masked.pt"
    checkpoint.write_bytes(sparse_checkpoint.read_bytes())
    args = quantize.parse(["--checkpoint", str(checkpoint), "--lr", "0.001", "--teacher",
                           str(sparse_checkpoint), *TUNE])
    tuned = quantize.fine_tune(model, data, data, args)
    for name, value in tuned.state_dict().items():
        if "running" in name or "batches" in name:
            assert torch.equal(value, before[name])  # BatchNorm statistics stay
    assert all(torch.equal(module.step, step) for (_, module), step in zip(weight_layers(tuned), steps))
    moved = [name for name, value in tuned.named_parameters() if not torch.equal(value, before[name])]
    assert len(moved) == len(list(tuned.named_parameters()))  # a gradient reaches every tensor through every rounding
    for name, module in weight_layers(tuned):
        zero = before[f"{name}.weight"] == 0
        assert zero.any() and not module.weight[zero].any()


def test_a_claim_that_contradicts_its_file_is_not_made(exact, tmp_path):
    network, tensors, activations, _ = exact["layer"]
    path = tmp_path / "a.pt"
    torch.save(network.state_dict(), path)
    assert quantize.made_claim(path, {"tensors": tensors, "activations": activations})["sha256"] == sha256(path)
    wrong = [dict(entry, bits=5) if entry["name"] == "conv2.weight" else entry for entry in tensors]
    with pytest.raises(AssertionError, match="conv2.weight: the values need 8 bits"):
        quantize.made_claim(path, {"tensors": wrong, "activations": activations})
    assert claims.claim_path(path) == tmp_path / "a.json"
