import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compressed.errors import BadInput
from compressed.graph import weight_layers
from compressed.networks import half_state, load_checkpoint, load_state, save_state
from mobilenet_v2 import SUBMISSION, MobileNetV2
from tools import layers


def network(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MobileNetV2(**options).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.data.normal_(0.5, 0.3)
                module.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture
def small(tmp_path):
    """A function that writes a changed state dict of a thin network; load_checkpoint's options for it."""
    state = network(width=0.25, num_classes=7).state_dict()

    def write(change=lambda state: None):
        changed = dict(state)
        value = change(changed)
        torch.save(changed if value is None else value, tmp_path / "a.pt")
        return tmp_path / "a.pt"
    write.state, write.load = state, lambda path: load_checkpoint(path, "mobilenet_v2:MobileNetV2?width=0.25", 7)
    return write


# ----------------------------------------------------------------------------------------------- as in shared/FACTS.md

def test_counts_of_facts():
    model = MobileNetV2()
    layers = weight_layers(model)
    assert len(layers) == 58 and sum(isinstance(module, nn.Conv2d) for _, module in layers) == 57
    assert sum(module.weight.numel() for _, module in layers if isinstance(module, nn.Conv2d)) == 3_777_632
    assert model.linear.weight.numel() == 166_400 and model.linear.bias.numel() == 100
    assert sum(p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()) == 45_536
    assert sum(p.numel() for p in model.parameters()) == 3_989_668
    assert all(module.bias is None for _, module in layers[:-1])
    assert not any(isinstance(module, nn.ReLU6) for module in model.modules())


def test_layers_stand_where_the_bit_table_looks_for_them():
    names = [name for name, _ in weight_layers(MobileNetV2())]
    assert names[:9] == ["conv1"] + [f"layers.{i}.{conv}" for i in (0, 1)
                                     for conv in ("conv1", "conv2", "conv3", "shortcut.0")]
    assert names[55:] == ["layers.16.shortcut.0", "conv2", "linear"]
    assert [name for name in names if "shortcut" in name] == [f"layers.{i}.shortcut.0" for i in (0, 1, 10, 16)]
    keys = [key.removesuffix(".weight") for key, value in MobileNetV2().state_dict().items() if value.dim() > 1]
    assert keys == names


def test_scaled_widths_of_facts():
    bases = (32, 16, 24, 32, 64, 96, 160, 320, 1280)
    assert [SUBMISSION.scaled(base, 1.3) for base in bases] == [40, 24, 32, 40, 80, 128, 208, 416, 1664]
    assert [SUBMISSION.scaled(base, 1.0) for base in bases] == list(bases)
    assert [SUBMISSION.scaled(*each) for each in ((16, 0.1), (32, 0.5), (10, 1.0), (12, 1.0))] == [8, 16, 8, 16]


def test_shapes_and_strides():
    """The map halves at stages 3, 4 and 6 and nowhere else; each layer's weight is its table entry's."""
    model, maps = MobileNetV2().eval(), {}
    for name, module in weight_layers(model)[:-1]:
        module.register_forward_hook(lambda m, _, out, name=name: maps.__setitem__(name, out.shape[2]))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 100)
    ends = [maps[f"layers.{i}.conv3"] for i in range(17)]
    assert maps["conv1"] == 32 and ends == [32] * 3 + [16] * 3 + [8] * 7 + [4] * 4 and maps["conv2"] == 4
    widths = [model.layers[i].conv3.out_channels for i in range(17)]
    assert widths == [24] + [32] * 2 + [40] * 3 + [80] * 4 + [128] * 3 + [208] * 3 + [416]
    expansions = [model.layers[i].conv1.out_channels / model.layers[i].conv1.in_channels for i in range(17)]
    assert expansions == [1] + [6] * 16 and model.conv2.out_channels == 1664


def test_width_one_is_the_network_that_everybody_has():
    """kuangliu/pytorch-cifar's MobileNetV2 has 2,296,922 parameters with 10 classes."""
    assert sum(p.numel() for p in MobileNetV2(10, width=1.0).parameters()) == 2_296_922


def test_a_thin_network_keeps_the_head():
    model = MobileNetV2(width=0.5)
    assert model.conv2.out_channels == 1280 and model.conv1.out_channels == 16
    assert MobileNetV2(width=1.4).conv2.out_channels == 1792


@pytest.mark.parametrize("width", [0, -1.0, 8.5, float("nan")])
def test_widths_that_do_not_exist(width):
    with pytest.raises(ValueError, match="width multiplier"):
        MobileNetV2(width=width)


# ------------------------------------------------------------------------------------------- another implementation

class TheirBlock(nn.Module):
    """Written after kuangliu/pytorch-cifar's table, without a look at ours."""

    def __init__(self, in_planes, out_planes, expansion, stride):
        super().__init__()
        self.stride, planes = stride, expansion * in_planes
        self.conv1 = nn.Conv2d(in_planes, planes, kernel_size=1, stride=1, padding=0, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=stride, padding=1, groups=planes, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out_planes, kernel_size=1, stride=1, padding=0, bias=False)
        self.bn3 = nn.BatchNorm2d(out_planes)
        self.shortcut = nn.Sequential()
        if stride == 1 and in_planes != out_planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, out_planes, kernel_size=1, bias=False),
                                          nn.BatchNorm2d(out_planes))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out + self.shortcut(x) if self.stride == 1 else out


class Theirs(nn.Module):
    table = [(1, 24, 1, 1), (6, 32, 2, 1), (6, 40, 3, 2), (6, 80, 4, 2), (6, 128, 3, 1), (6, 208, 3, 2), (6, 416, 1, 1)]

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 40, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(40)
        layers, planes = [], 40
        for expansion, out_planes, blocks, stride in self.table:
            for stride in [stride] + [1] * (blocks - 1):
                layers.append(TheirBlock(planes, out_planes, expansion, stride))
                planes = out_planes
        self.layers = nn.Sequential(*layers)
        self.conv2 = nn.Conv2d(planes, 1664, kernel_size=1, stride=1, padding=0, bias=False)
        self.bn2 = nn.BatchNorm2d(1664)
        self.linear = nn.Linear(1664, 100)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(self.layers(out))))
        return self.linear(F.avg_pool2d(out, 4).flatten(1))


@torch.no_grad()
def test_checkpoints_move_both_ways_and_give_the_same_logits(tmp_path):
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ours, theirs = network(), Theirs().eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    logits = ours(x)
    assert logits.std() > 0.01 and torch.allclose(theirs(x), logits, rtol=1e-4, atol=1e-5 * logits.abs().max().item())
    torch.save(nn.DataParallel(theirs).state_dict(), tmp_path / "theirs.pt")
    back = load_checkpoint(tmp_path / "theirs.pt")
    assert torch.equal(back(x), logits) and not back.training
    other = network(seed=1)
    assert not torch.allclose(other(x), logits, rtol=1e-2)  # the comparison can fail


# ------------------------------------------------------------------------------------------------- load_checkpoint

def test_a_checkpoint_comes_back(small):
    model = small.load(small())
    assert all(torch.equal(value, small.state[key]) for key, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    path = small(lambda state: {f"module.{key}": value for key, value in state.items()})
    assert all(torch.equal(value, small.state[key]) for key, value in small.load(path).state_dict().items())
    assert set(load_state(path)) == set(small.state)


def test_float16_becomes_float32(small):
    path = small(lambda state: {key: value.half() if value.is_floating_point() else value
                                for key, value in state.items()})
    for key, value in small.load(path).state_dict().items():
        assert value.dtype == small.state[key].dtype
        assert torch.equal(value, small.state[key].half().float() if value.is_floating_point() else small.state[key])


def test_the_batch_counters_may_be_missing(small):
    path = small(lambda state: {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")})
    assert torch.equal(small.load(path).conv1.weight, small.state["conv1.weight"])


@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_three_bad_keys_are_named_and_the_others_counted(small):
    def change(state):
        del state["bn1.running_var"], state["layers.3.conv2.weight"]
        state["extra.weight"] = torch.zeros(3)
        state["conv1.bias"] = torch.zeros(8)
        state["conv2.weight"] = torch.zeros(2, 3)
        state["linear.bias"] = state["linear.bias"].clone().fill_(float("nan"))
        state["layers.0.bn1.weight"] = state["layers.0.bn1.weight"] / 0
        state["layers.1.conv1.weight"] = state["layers.1.conv1.weight"].to_sparse()
        state["layers.2.conv1.weight"] = state["layers.2.conv1.weight"].to(torch.complex64)
        state["layers.4.conv1.weight"] = state["layers.4.conv1.weight"].to("meta")

    with pytest.raises(BadInput) as raised:
        small.load(small(change))
    message = str(raised.value)
    for part in ("a.pt does not fit mobilenet_v2:MobileNetV2?width=0.25 (7 classes)", "unknown extra.weight",
                 "unknown conv1.bias", "missing bn1.running_var", "more)"):
        assert part in message
    assert message.count(";") == 2 and "\n" not in message


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("key, change, problem", (
    ("conv2.weight", lambda value: torch.zeros(2, 3), "conv2.weight is [2, 3], expected [1280, 80, 1, 1]"),
    ("linear.bias", lambda value: value * torch.nan, "linear.bias holds values that are not finite"),
    ("layers.0.bn1.weight", lambda value: value / 0, "layers.0.bn1.weight holds values that are not finite"),
    *(("conv1.weight", change, "conv1.weight is no dense tensor of real numbers") for change in (
        torch.Tensor.to_sparse, lambda value: value.to(torch.complex64), lambda value: value.to("meta")))))
def test_a_bad_value_is_named(small, key, change, problem):
    with pytest.raises(BadInput) as raised:
        small.load(small(lambda state: state.__setitem__(key, change(state[key]))))
    assert problem in str(raised.value)


def test_another_width_is_misshapen(small):
    with pytest.raises(BadInput, match=r"conv1.weight is \[8, 3, 3, 3\], expected \[40, 3, 3, 3\]"):
        load_checkpoint(small())


def test_a_key_with_and_without_its_prefix(small):
    with pytest.raises(BadInput, match="with and without the prefix 'module.'"):
        small.load(small(lambda state: state | {"module.linear.bias": state["linear.bias"] + 1}))


@pytest.mark.parametrize("wrap", [
    lambda state: {"net": state, "acc": 71.2, "epoch": 3}, lambda state: {"state_dict": state, "optimizer": {"lr": 1}},
    lambda state: {"model_state_dict": state, "epoch": 3}, lambda state: {"model": state},
    lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
    lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
    lambda state: {key.replace("layers.", "layers._orig_mod."): value for key, value in state.items()},
    lambda state: {"n_averaged": torch.tensor(3)} | {f"module.{key}": value for key, value in state.items()},
    lambda state: state | {"total_ops": torch.zeros(1), "layers.0.conv1.total_params": torch.zeros(1)},
])
def test_known_wrappers_prefixes_and_counters_are_dropped(small, wrap):
    path = small(wrap)
    assert set(load_state(path)) == set(small.state)
    assert all(torch.equal(value, small.state[key]) for key, value in small.load(path).state_dict().items())


@pytest.mark.parametrize("value", (-1e-30, -1.0, -torch.inf))
def test_values_that_cannot_be_are_neither_read_nor_written(small, tmp_path, value):
    def change(state):
        state["layers.3.bn2.running_var"] = state["layers.3.bn2.running_var"].clone()
        state["layers.3.bn2.running_var"][1] = value

    path = small(change)
    with pytest.raises(BadInput, match="layers.3.bn2.running_var holds (a variance below zero|values that are not)"):
        small.load(path)
    kept = tmp_path / "kept.pt"
    kept.write_text("kept")
    with pytest.raises(BadInput, match="kept.pt: not written: layers.3.bn2.running_var holds"):
        save_state(torch.load(path, weights_only=True), kept)
    assert kept.read_text() == "kept"
    zero = small.load(small(lambda state: state.__setitem__("bn1.running_var", torch.zeros(8))))
    assert not zero.bn1.running_var.any()  # a channel that never varied


def test_a_float64_that_float32_does_not_hold(small):
    with pytest.raises(BadInput, match="conv1.weight holds values that are not finite in float32"):
        small.load(small(lambda state: state.__setitem__("conv1.weight", state["conv1.weight"].double() + 1e300)))


@pytest.mark.parametrize("key, values", (
    ("bn1.running_var", [1e5, 1.0]), ("bn1.running_var", [1e-7, 1.0]), ("bn1.weight", [3e-5, 1.0]),
    ("bn1.bias", [-7e4, 1.0]), ("conv1.weight", [1e5, 1.0]), ("conv1.weight", [3e-8, 0.0])))
def test_what_float16_would_damage_stays_in_float32(small, tmp_path, key, values):
    """The first rows of a tensor get these values; every other tensor goes to float16, and all of it comes back."""
    state = {name: value.clone() for name, value in small.state.items()}
    for row, value in zip(state[key], values):
        row.fill_(value)
    save_state(half_state(state), tmp_path / "half.pt")
    written = load_state(tmp_path / "half.pt")
    assert written[key].dtype == torch.float32 and torch.equal(written[key], state[key])
    others = [value for name, value in written.items() if name != key and value.is_floating_point()]
    assert others and all(value.dtype == torch.float16 for value in others)
    assert torch.equal(small.load(tmp_path / "half.pt").state_dict()[key], state[key])


@pytest.mark.parametrize("wrap", [
    lambda state: {"weights": state, "epoch": 3}, lambda state: {"net": list(state.values())},
    lambda state: list(state.values()),
    lambda state: state["linear.bias"],
    lambda state: {3: state["linear.bias"]}, lambda state: state | {"epoch": 3},
])
def test_what_is_no_plain_state_dict(small, wrap):
    with pytest.raises(BadInput, match=r"a.pt: not a plain state dict of tensors; save `model.state_dict\(\)`"):
        small.load(small(wrap))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_executed(small, tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": Evil()}, "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(BadInput, match="a.pt: not a checkpoint that torch can read as plain tensors") as raised:
        small.load("a.pt")
    Path("b.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(BadInput, match="b.pt: not a checkpoint"):
        small.load("b.pt")
    assert "\n" not in str(raised.value) and not Path("executed").exists()
    pickle.loads(Path("b.pt").read_bytes())
    assert Path("executed").exists()  # the test can fail


def test_a_whole_model_is_refused(small, tmp_path):
    torch.save(network(width=0.25), tmp_path / "a.pt")
    with pytest.raises(BadInput, match="not a checkpoint that torch can read as plain tensors"):
        small.load(tmp_path / "a.pt")


def test_no_file_or_an_empty_one(small, tmp_path):
    with pytest.raises(BadInput, match="b.pt: no such checkpoint file; .*`python training/main.py`"):
        small.load(tmp_path / "b.pt")
    with pytest.raises(BadInput, match="no such checkpoint file"):
        small.load(tmp_path)
    (tmp_path / "b.pt").touch()
    with pytest.raises(BadInput, match=r"b.pt: not a checkpoint that torch can read as plain tensors \(.+\)"):
        small.load(tmp_path / "b.pt")
    (tmp_path / "b.pt").write_text("hello")
    with pytest.raises(BadInput, match="b.pt: not a checkpoint"):
        small.load(tmp_path / "b.pt")


# ------------------------------------------------------------------------------------------------------ the script

def test_the_script_without_thop(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "thop", None)
    assert layers.main([]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()[1:59]]
    assert [row[0] for row in rows] == [str(i) for i in range(58)]
    assert [row[1] for row in rows] == [name for name, _ in weight_layers(MobileNetV2())]
    assert sum(int(row[-1].replace(",", "")) for row in rows) == 3_777_632 + 166_400
    assert rows[0][2:] == ["3x3", "40x3x3x3", "1", "40x32x32", "1,080"]
    assert rows[13][2:] == ["3x3", "dw", "192x1x3x3", "2", "192x16x16", "1,728"]
    assert rows[57][2:] == ["linear", "100x1664", "100", "166,400"]
    for figure in ("58 weight tensors: 3,777,632 conv", "166,400 linear weights (+ 100 biases)", "45,536 BatchNorm",
                   "3,989,668 parameters in all", "without thop's count"):
        assert figure in out


def test_what_thop_counts(capsys):
    pytest.importorskip("thop")
    assert layers.main([]) == 0
    out = capsys.readouterr().out
    assert "thop, batch of 1: 162,544,640\n" in out and "thop, batch of 2: 325,089,280\n" in out
