import json
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from compressed import cifar100, counting, graph, integer_network
from compressed import exact_network as exact
from compressed.errors import BadInput
from compressed.evaluation import logits
from compressed.files import load_json, save_record
from compressed.formats import code_range, signed_bits
from compressed.graph import prepare, weight_layers
from compressed.integer_network import IntegerNetwork, Term, Value, products
from mobilenet_v2 import MobileNetV2
from small import CLASSES, integer_logits, points, tiny_network
from tools import export_onnx, integer
from tools import pack as packed
from tools.integer import compare, main


@pytest.fixture(scope="module")
def tiny():
    model, claim = tiny_network()
    return model, claim, IntegerNetwork(model, claim)


# ---- A slow reference: the network as it is defined, in fractions --------------------------------

def reference(model: MobileNetV2, claim: dict, image: torch.Tensor) -> tuple[dict[str, list], list[Fraction]]:
    """({activation point: codes [C][H][W], features: [C]}, logits) of a uint8 image [3, 32, 32]."""
    formats = {entry["name"]: entry for entry in claim["activations"]}
    codes, step = {}, {name: Fraction(entry["step"]) for name, entry in formats.items()}

    def put(name, values):
        low, high = code_range(formats[name]["bits"], formats[name]["signed"])

        def code(x):
            if isinstance(x, list):
                return [code(each) for each in x]
            return min(max(round(x / step[name]), low), high)  # of a Fraction: halves to even

        codes[name] = code(values)
        return name

    def convolution(conv, bn, source):
        """Real values: an exact sum over the real inputs, scaled and shifted."""
        size, stride, pad = len(codes[source][0]), conv.stride[0], conv.padding[0]
        out = []
        for channel in range(conv.out_channels):
            taps = [(i if conv.groups == 1 else channel, y - pad, x - pad, int(w * 128))  # codes of 8 bits times 2^-7
                    for i, plane in enumerate(conv.weight[channel].tolist())
                    for y, row in enumerate(plane) for x, w in enumerate(row) if w]
            scale = Fraction(bn.weight[channel].item()) * step[source] / 128
            shift = Fraction(bn.bias[channel].item())
            out.append([[scale * sum(w * codes[source][i][y + dy][x + dx] for i, dy, dx, w in taps
                                     if 0 <= y + dy < size and 0 <= x + dx < size) + shift
                         for x in range(0, size, stride)] for y in range(0, size, stride)])
        return out

    def added(a, b):
        return [added(x, y) for x, y in zip(a, b)] if isinstance(a, list) else a + b

    def real(name):
        return [[[code * step[name] for code in row] for row in plane] for plane in codes[name]]

    last = put("image", [[[Fraction(p - 128, 64) for p in row] for row in plane] for plane in image.tolist()])
    last = put("relu1", convolution(model.conv1, model.bn1, last))
    for i, block in enumerate(model.layers):
        hidden = put(f"layers.{i}.relu1", convolution(block.conv1, block.bn1, last))
        hidden = put(f"layers.{i}.relu2", convolution(block.conv2, block.bn2, hidden))
        out = convolution(block.conv3, block.bn3, hidden)
        if block.residual:
            out = added(out, convolution(*block.shortcut, last) if len(block.shortcut) else real(last))
        last = put(f"layers.{i}.out", out)
    last = put("relu2", convolution(model.conv2, model.bn2, last))
    put("features", [sum(map(sum, plane)) * step[last] / 16 for plane in codes[last]])
    logits = [sum(Fraction(w) * c for w, c in zip(row, codes["features"])) * step["features"] + Fraction(b)
              for row, b in zip(model.linear.weight.tolist(), model.linear.bias.tolist())]
    return codes, logits


def test_equals_the_slow_reference(tiny):
    model, claim, network = tiny
    image = torch.randint(256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    codes, logits = reference(model, claim, image[0])
    ours = network.codes(image)
    assert ours.keys() - {"pixels"} == codes.keys() == {entry["name"] for entry in claim["activations"]}
    for name, wanted in codes.items():
        found = ours[name][0].permute(2, 0, 1) if ours[name].dim() == 4 else ours[name][0]
        assert found.tolist() == wanted, name
        assert name == "image" or len(found.unique()) > 20, name  # a network that says something
    assert [logit * Fraction(2) ** network.logit_exponent for logit in network(image)[0].tolist()] == logits


# ---- Beside the float network --------------------------------------------------------------------

def test_the_float_network_is_the_same_to_the_last_bit(tiny):
    model, claim, network = tiny
    floats, data = exact.exact_network(model, claim["activations"]), cifar100.made_up(300, 5, CLASSES)
    report = compare(network, floats, data)
    assert report["images"] == report["agree"] == report["identical"] == 300
    one_off = torch.eye(CLASSES)[0]  # one wrong logit of an image is enough
    assert compare(network, lambda x: floats(x) + one_off, data)["identical"] == 0


def test_32_bits_are_enough_for_short_scales_and_others_get_64(narrow):
    network = IntegerNetwork(*narrow[1:])
    assert {(value.bits <= 32, value.half.dtype, value.terms[0].multiplier.dtype) for value in network.values} == {
        (True, torch.int32, torch.int32)}
    model, claim = tiny_network()
    bn = model.layers[1].bn3
    with torch.no_grad():
        bn.weight[bn.weight.nonzero()[0]] = 2.0**-24  # beside the shortcut's, far below it
    network = IntegerNetwork(model, claim)
    wide = {value.point.name: value.bits for value in network.values if value.half.dtype == torch.int64}
    assert list(wide) == ["layers.1.out"] and 32 < wide["layers.1.out"] <= 64
    assert compare(network, exact.exact_network(model, claim["activations"]),
                   cifar100.made_up(50, 5, CLASSES))["identical"] == 50


def test_record(narrow, tmp_path):
    """Into the claim of a .pt, as it is at that moment, and nowhere else."""
    path, claim = tmp_path / "network.pt", narrow[0].with_suffix(".json")
    path.write_bytes(narrow[0].read_bytes())
    path.with_suffix(".json").write_bytes(claim.read_bytes())
    argv = ["--checkpoint", str(path), "--made-up", "100", "--images", "9", "--record"]
    assert main(argv) == 0
    after, before = load_json(path.with_suffix(".json")), load_json(claim)
    record = after.pop("integer")
    assert after.pop("digest") != before.pop("digest")
    assert after == before and record["data"] == "made up" and record["images"] == record["identical"] == 9
    assert len(record["accumulators"]) == 59
    packed.main(["--checkpoint", str(path)])
    kept = path.with_suffix(".json").read_bytes()
    for other, line in ((path.with_suffix(".mnet"), "give that one"), (tmp_path / "alone.pt", "no claim next to it")):
        with pytest.raises(BadInput, match=line):
            main(["--checkpoint", str(other), *argv[2:]])
    assert path.with_suffix(".json").read_bytes() == kept and b'"packed"' in kept


@pytest.mark.parametrize("script", (integer, export_onnx))
def test_what_other_images_say_is_not_recorded(narrow, tmp_path, script):
    path = Path(shutil.copy(narrow[0], tmp_path / "network.pt"))
    claim = load_json(narrow[0].with_suffix(".json"))
    save_record(claim | {"data_set": {"name": "mine", "classes": 100, "digest": "0" * 16}}, path.with_suffix(".json"))
    images, labels = np.zeros((100, 32, 32, 3), np.uint8), np.arange(100)
    np.savez(tmp_path / "set.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    before = path.with_suffix(".json").read_bytes()
    with pytest.raises(BadInput, match="network.pt was made with mine .* and these images are of set"):
        script.main(["--checkpoint", str(path), "--data", str(tmp_path / "set.npz"), "--record"])
    assert path.with_suffix(".json").read_bytes() == before


# ---- Integers alone ------------------------------------------------------------------------------

def accumulators(network: IntegerNetwork) -> list[Term]:
    """The terms that sum products or values: layers, and the mean."""
    return [term for value in (*network.values, network.logits) for term in value.terms
            if term.branch.kind in ("layer", "mean")]


class NoFloats(TorchDispatchMode):
    """Refuses every operation that reads or makes a floating-point tensor."""
    operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        flat, _ = torch.utils._pytree.tree_flatten((args, kwargs, out))
        floats = [x for x in flat if isinstance(x, float) or isinstance(x, torch.Tensor) and x.is_floating_point()]
        assert not floats, func
        self.operations += 1
        return out


def test_no_float_from_image_to_logits(tiny):
    _, _, network = tiny
    images = cifar100.made_up(3, 1).images
    with NoFloats() as mode:
        predictions = network(images).argmax(1)
    assert mode.operations > 500 and predictions.dtype == torch.int64
    for value in (*network.values, network.logits):
        held = [value.half, value.shift]
        for term in value.terms:
            held += [term.multiplier, term.addend, getattr(term.sums, "keywords", {}).get("weight", value.half)]
        assert not any(x.is_floating_point() for x in held)


def test_stated_widths(tiny):
    """Multipliers have 11 bits and a sign, addends 16 bits, once the zeros that a shift appends are gone."""
    def bits(x: torch.Tensor) -> int:
        return max((abs(n) // (n & -n)).bit_length() for n in x.tolist() if n)

    for term in accumulators(tiny[2]):
        assert bits(term.multiplier) <= 11 and (not term.addend.any() or bits(term.addend) <= 15)
    codes = tiny[2].codes(cifar100.made_up(2, 1).images)
    assert {name: x.dtype for name, x in codes.items()} == {
        name: torch.int8 if name == "image" or name.endswith(".out") else torch.uint8 for name in codes}


def test_the_plain_products_are_the_fast_ones(tiny, monkeypatch):
    generator, images = torch.Generator().manual_seed(0), cifar100.made_up(2, 1).images
    cases = []
    for shape, out in (((5, 3), 4), ((2, 7, 7, 40), 24), ((16, 1664), 100), ((1, 1), 1)):
        weight = torch.randint(-128, 128, (shape[-1], out), generator=generator, dtype=torch.int8)
        for low, high in ((0, 256), (0, 1), (255, 256)):
            codes = torch.randint(low, high, shape, generator=generator).to(torch.uint8)
            cases += [(codes, weight), ((codes ^ 128).view(torch.int8), weight), (codes, torch.full_like(weight, -128))]
    fast, logits = [products(*case) for case in cases], tiny[2](images)
    monkeypatch.setattr(integer_network, "fast_products", lambda: False)
    for case, found in zip(cases, fast):
        assert found.dtype == torch.int32 and torch.equal(found, products(*case))
        assert torch.equal(found.long(), case[0].long() @ case[1].long())
    assert torch.equal(logits, tiny[2](images))


def test_fast_products_are_tried_before_they_are_used(monkeypatch):
    try:
        monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.int() @ b.int()).clamp(max=2**15 - 1))  # saturates
        integer_network.fast_products.cache_clear()
        assert not integer_network.fast_products()
        monkeypatch.delattr(torch, "_int_mm")
        integer_network.fast_products.cache_clear()
        assert not integer_network.fast_products()
    finally:
        monkeypatch.undo()
        integer_network.fast_products.cache_clear()


# ---- Accumulators --------------------------------------------------------------------------------

def test_bounds_are_reached(tiny):
    """For every layer: an input for which its accumulator is exactly at the bound, so one bit less would overflow."""
    model, claim, network = tiny
    formats = integer_network.stated_formats(model, claim)
    for term in accumulators(network):
        branch = term.branch
        activation = formats.activations[branch.source]
        if branch.name == "mean":
            codes = torch.full((1, 4, 4, 1280), activation.high, dtype=torch.uint8)
            assert term.sums(codes).unique().tolist() == [16 * 255] and term.reach == [(0, 4080)] * 1280
            continue
        module, grid = model.get_submodule(branch.name), formats.tensors[f"{branch.name}.weight"]
        weight = grid.codes(module.weight)
        bound = min(low for low, _ in term.reach), max(high for _, high in term.reach)
        bits = counting.fixed_bits(module.weight, grid, activation)
        assert bits == signed_bits(*bound) and not -2 ** (bits - 2) <= bound[0] <= bound[1] < 2 ** (bits - 2)
        for side in (0, 1):
            channel = [reach[side] for reach in term.reach].index(bound[side])
            best = torch.where((weight[channel] > 0) == (side == 1), activation.high, activation.low)
            dtype = torch.int8 if activation.signed else torch.uint8
            if isinstance(module, nn.Linear):
                acc = term.sums(best[None].to(dtype))[0]
            else:  # the kernel's codes [in, k, k] stand in a larger map, at (1, 1)
                k, stride, channels = *module.kernel_size[:1], module.stride[0], module.in_channels
                codes = torch.zeros(1, 6, 6, channels, dtype=dtype)
                codes[0, 1:1 + k, 1:1 + k] = best.permute(1, 2, 0).expand(k, k, channels)
                at = (1 + k // 2) // stride  # the window that begins there
                acc = term.sums(codes)[0, at, at]
            assert acc[channel] == bound[side], branch.name


def test_what_is_seen_is_within_the_bounds(tiny):
    model, claim, network = tiny
    floats = exact.exact_network(model, claim["activations"])
    rows = compare(network, floats, cifar100.made_up(16, 2, CLASSES))["accumulators"]
    assert [row["layer"] for row in rows[:2]] == ["conv1", "layers.0.conv1"] and rows[-2]["layer"] == "mean"
    assert {row["layer"] for row in rows} == {name for name, _ in weight_layers(model)} | {"mean"}
    for row in rows:
        assert row["bound"][0] <= row["seen"][0] < row["seen"][1] <= row["bound"][1]
        assert row["seen_bits"] <= row["bits"] < row["value_bits"] or row["layer"] == "mean"


def test_overflow_is_refused():
    point, one = graph.Point("wide", (), "none", True, (1,)), torch.ones(1, dtype=torch.float64)
    branch = graph.Branch("layer", "layer", "x")
    with pytest.raises(BadInput, match="32-bit accumulator"):
        Value(point, [Term(branch, None, [(-2**31, 0)], one, one)])
    widest = Term(branch, None, [(1 - 2**31, 2**31 - 1)], one * (2**32 - 1), one * 0)
    assert Value(point, [widest], 2.0).bits == 64
    with pytest.raises(BadInput, match="may need 65 bits"):
        Value(point, [widest, widest], 2.0)
    model, claim = tiny_network()
    next(a for a in claim["activations"] if a["name"] == "layers.1.out")["step"] = 2.0**-60
    with pytest.raises(BadInput, match=r"layers.1.out: its aligned sums may need \d+ bits"):
        IntegerNetwork(model, claim)


@pytest.mark.parametrize("change, line", [
    (lambda model, claim: claim["activations"][4].update(bits=12), "activation layers.0.out has 12 bits"),
    (lambda model, claim: claim["activations"][4].update(step=0.3), "has the step 0.3, expected a power of two"),
    (lambda model, claim: claim["tensors"][0].update(bits=3), "conv1.weight: the values are no 3-bit multiples"),
    (lambda model, claim: claim["tensors"][0].update(step=[2.0**-5] * 8), "conv1.weight has 6 bits and 8 steps"),
])
def test_what_it_does_not_take(change, line):
    model, claim = tiny_network()
    change(model, claim)
    with pytest.raises(BadInput, match=line):
        IntegerNetwork(model, claim)


# ---- The script ----------------------------------------------------------------------------------

def test_script(narrow, capsys):
    path, _, _ = narrow
    assert main(["--checkpoint", str(path), "--made-up", "500", "--images", "20"]) == 0
    out = capsys.readouterr().out
    for text in ("Accuracy in integers: ", "Same prediction: 20/20 (100.00%)", "last bit: 20/20",
                 "layers.16.shortcut.0", "mean", "linear"):
        assert text in out, text
    assert main(["--checkpoint", str(path), "--made-up", "500", "--images", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["accumulators"]) == 59 and report["images"] == 2 and report["identical"] == 2


def test_script_says_what_is_wrong(narrow, capsys, monkeypatch):
    path, _, _ = narrow
    monkeypatch.setattr(integer, "compare", lambda *args: {
        "images": 100, "correct": 1, "float_correct": 1, "agree": 99, "identical": 98, "accumulators": []})
    assert main(["--checkpoint", str(path), "--made-up", "500"]) == 2
    captured = capsys.readouterr()
    assert "prediction: 99/100" in captured.out and "other logits for 2 of 100 images" in captured.err


@torch.no_grad()
def test_the_padding_of_a_maximum_is_below_every_code():
    """Also of signed values, all of them below zero here."""
    model = prepare(nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(1024, 10)).eval())
    for parameter in model.parameters():
        parameter.zero_()
    model[0].bias.fill_(-1.0)
    model[3].weight.fill_(1.0)
    claim = {"activations": points(model),
             "tensors": [{"name": name, "bits": 2, "step": 1.0} for name, _ in model.named_parameters()]}
    images, wanted = cifar100.made_up(2, 0).images, torch.full((2, 10), -1024.0)
    assert torch.equal(integer_logits(model, claim, images), wanted)
    assert torch.equal(logits(exact.exact_network(model, claim["activations"]), images), wanted)
