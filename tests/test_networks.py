"""Networks from specifications, and their checkpoint files."""
import os
import pickle
from pathlib import Path

import pytest
import torch

import mobilenet_v2
import user_networks
from compressed import networks
from compressed.errors import BadInput
from compressed.graph import weight_layers
from compressed.networks import half_state, load_checkpoint, load_state, save_state
from small import random_network as network


def test_the_default_is_the_submissions_network():
    model = networks.make()
    assert type(model) is mobilenet_v2.MobileNetV2


def test_arguments_are_python_literals_and_classes_are_passed():
    model = networks.make("mobilenet_v2:MobileNetV2?width=0.25", 7)
    assert model.conv1.out_channels == 8 and model.linear.out_features == 7
    assert networks.make("mobilenet_v2:MobileNetV2?width=0.25&num_classes=3", 7).linear.out_features == 3


def test_the_small_table():
    """Its weights and its last map's channels, as the training record has them."""
    model = networks.make("mobilenet_v2:SmallMobileNetV2")
    assert sum(layer.weight.numel() for _, layer in weight_layers(model)) == 593_424
    assert model.linear.in_features == 120 and not hasattr(model, "conv2")
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 100)
    assert sum(isinstance(module, torch.nn.Hardswish) for module in model.modules()) == 33
    assert not any(isinstance(module, torch.nn.ReLU) for module in model.modules())


def test_a_file_of_ones_own(tmp_path):
    (tmp_path / "parts.py").write_text("from torch import nn\nLayer = nn.Linear\n")
    (tmp_path / "graph.py").write_text("raise SystemExit('ours is compressed.graph')\n")
    (tmp_path / "net.py").write_text(
        "import parts\nfrom torch import nn\n\ndef make(depth=1, name='x'):\n"
        "    return nn.Sequential(*(parts.Layer(3, 3) for _ in range(depth)))\n")
    assert len(networks.make(f"{tmp_path}/net.py:make?depth=4&name=any")) == 4


@pytest.mark.parametrize("name", ("blocks_of_mine", "json"))
def test_a_file_is_one_module_for_all_who_name_it(tmp_path, name):
    """A penalty finds the blocks of a network by their class. json: a name that another module has."""
    path = tmp_path / f"{name}.py"
    path.write_text("from torch import nn\nclass Block(nn.Linear):\n    pass\n"
                    "def make():\n    return nn.Sequential(Block(3, 3))\n")
    model = networks.make(f"{path}:make")
    assert isinstance(model[0], networks.find(f"{path}:Block")[0])
    if name != "json":
        (tmp_path / "reader.py").write_text(f"import {name} as one\ndef kind():\n    return one.Block\n")
        assert isinstance(model[0], networks.find(f"{tmp_path}/reader.py:kind")[0]())
    before = networks.source_digest(f"{path}:make")
    path.write_text("changed")
    assert networks.source_digest(f"{path}:make") == before  # that is the code that runs


@pytest.mark.parametrize("spec, named", (
    ("", "expected FILE.py:NAME"), ("mobilenet_v2:", "expected FILE.py:NAME"),
    ("mobilenet_v2:Nothing", "no class or function Nothing"), ("mobilenet_v2:SMALL", "no class or function SMALL"),
    ("mobilenet_v2:MobileNetV2?width", "'width' is no argument"),
    (f"mobilenet_v2:MobileNetV2?width={'-' * 20_000}1", "cannot be made"), (f"a:b?width=1{'0' * 400}", "imported"),
    ("mobilenet_v2:MobileNetV2?depth=3", "unexpected keyword argument 'depth'"),
    ("mobilenet_v2:MobileNetV2?width=0", "width multiplier 0 is not between 0 and 8"),
    ("mobilenet_v2:MobileNetV2?table=5", "cannot be made (AttributeError: "),
    ("mobilenet_v2:MobileNetV2?num_classes=-5", "cannot be made (RuntimeError: "),
    ("missing.py:Net", "there is no file missing.py"),
    ("no_such_module:Net", "cannot be imported (ModuleNotFoundError"),
    ("mobilenet_v2:Table?stages=()&stem=1&head=None", "returns Table, expected an nn.Module")))
def test_what_cannot_be_is_named(spec, named):
    with pytest.raises(BadInput) as raised:
        networks.make(spec)
    assert named in str(raised.value) and len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("text, named", (
    ("import torch\nraise KeyError('here')\n", "broken.py cannot be imported .KeyError: 'here'."),
    ("raise SystemExit(0)\n", "broken.py cannot be imported .SystemExit: 0."),
    ("def Net():\n    raise SystemExit(0)\n", "broken.py:Net cannot be made .SystemExit: 0.")))
def test_a_file_that_fails_is_named(tmp_path, text, named):
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(BadInput, match=named):
        networks.make(f"{tmp_path}/broken.py:Net")


@pytest.fixture(scope="module")
def state():
    return network(width=0.25, num_classes=7).state_dict()


@pytest.fixture
def small(tmp_path, state):
    """A function that writes a changed state dict of a thin network; load_checkpoint's options for it."""
    def write(change=lambda state: None):
        changed = dict(state)
        value = change(changed)
        torch.save(changed if value is None else value, tmp_path / "a.pt")
        return tmp_path / "a.pt"
    write.state, write.load = state, lambda path: load_checkpoint(path, "mobilenet_v2:MobileNetV2?width=0.25", 7)
    return write


# ------------------------------------------------------------------------------------------------- load_checkpoint

def test_a_checkpoint_comes_back(small):
    model = small.load(small())
    assert all(torch.equal(value, small.state[key]) for key, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())


def test_a_network_that_has_a_wrappers_name(tmp_path):
    """As many prefixes go as its own keys do not have."""
    spec = f"{user_networks.__file__}:Wrapped"
    state = networks.make(spec, 10).state_dict()
    for wrap in ("", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."):
        torch.save({f"{wrap}{key}": value for key, value in state.items()}, tmp_path / "f.pt")
        found = networks.load_checkpoint(tmp_path / "f.pt", spec, 10).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in found.items()), wrap


def test_a_network_in_another_type_becomes_float32(tmp_path):
    (tmp_path / "halves.py").write_text("from torch import nn\n\ndef net():\n    return nn.Linear(3, 4).double()\n")
    assert networks.make(f"{tmp_path / 'halves.py'}:net").weight.dtype == torch.float32


def test_float16_becomes_float32(small):
    path = small(lambda state: {key: value.half() if value.is_floating_point() else value
                                for key, value in state.items()})
    for key, value in small.load(path).state_dict().items():
        assert value.dtype == small.state[key].dtype
        assert torch.equal(value, small.state[key].half().float() if value.is_floating_point() else small.state[key])


def test_the_batch_counters_may_be_missing(small):
    path = small(lambda state: {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")})
    assert torch.equal(small.load(path).conv1.weight, small.state["conv1.weight"])


def test_three_bad_keys_are_named_and_the_others_counted(small):
    def change(state):
        del state["bn1.running_var"], state["layers.3.conv2.weight"]
        state["extra.weight"] = torch.zeros(3)
        state["conv1.bias"] = torch.zeros(8)
        state["conv2.weight"] = torch.zeros(2, 3)

    with pytest.raises(BadInput) as raised:
        small.load(small(change))
    message = str(raised.value)
    for part in ("a.pt does not fit mobilenet_v2:MobileNetV2?width=0.25 (7 classes)", "unknown extra.weight",
                 "unknown conv1.bias", "missing bn1.running_var", "(and 2 more)"):
        assert part in message
    assert message.count(";") == 2 and "\n" not in message


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("key, change, problem", (
    ("conv2.weight", lambda value: torch.zeros(2, 3), "conv2.weight is [2, 3], expected [1280, 80, 1, 1]"),
    ("linear.bias", lambda value: value * torch.nan, "linear.bias holds values that are not finite"),
    ("layers.0.bn1.weight", lambda value: value / 0, "layers.0.bn1.weight holds values that are not finite"),
    ("conv1.weight", lambda value: value.double() + 1e300, "conv1.weight holds values that are not finite in float32"),
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
    lambda state: {f"module.{key}": value for key, value in state.items()},
    lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
    lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
    lambda state: {key.replace("layers.", "layers._orig_mod."): value for key, value in state.items()},
    lambda state: {"n_averaged": torch.tensor(3)} | {f"module.{key}": value for key, value in state.items()},
    lambda state: state | {"total_ops": torch.zeros(1), "layers.0.conv1.total_params": torch.zeros(1)},
])
def test_known_wrappers_prefixes_and_counters_are_dropped(small, wrap):
    found = load_state(small(wrap))
    assert set(found) == set(small.state) and all(torch.equal(found[key], small.state[key]) for key in found)


@pytest.mark.parametrize("value", (-1e-30, -torch.inf))
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
def test_nothing_in_a_file_is_executed(small, zipped):
    torch.save({"conv1.weight": Evil()}, "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(BadInput, match="a.pt: not a checkpoint that torch can read as plain tensors") as raised:
        small.load("a.pt")
    Path("b.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(BadInput, match="b.pt: not a checkpoint"):
        small.load("b.pt")
    assert "\n" not in str(raised.value) and "weights_only" not in str(raised.value) and not Path("executed").exists()
    pickle.loads(Path("b.pt").read_bytes())
    assert Path("executed").exists()  # the test can fail


def test_no_file_or_an_empty_one(small, tmp_path):
    for path in (tmp_path / "b.pt", tmp_path):
        with pytest.raises(BadInput, match=f"{path}: no such checkpoint file; .*`python training/main.py`"):
            small.load(path)
    for content in ("", "hello"):
        (tmp_path / "b.pt").write_text(content)
        with pytest.raises(BadInput, match="b.pt: not a checkpoint that torch can read as plain tensors"):
            small.load(tmp_path / "b.pt")
