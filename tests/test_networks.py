"""Networks from specifications. Reading checkpoint files is tested in test_mobilenet_v2.py."""
import pytest
import torch

import mobilenet_v2
from compressed import networks
from compressed.errors import BadInput
from compressed.graph import weight_layers


def test_the_default_is_the_submissions_network():
    model = networks.make()
    assert type(model) is mobilenet_v2.MobileNetV2 and len(weight_layers(model)) == 58
    assert sum(p.numel() for p in model.parameters()) == 3_989_668


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


@pytest.mark.parametrize("spec, named", (
    ("", "expected FILE.py:NAME"), ("mobilenet_v2", "expected FILE.py:NAME"),
    ("mobilenet_v2:", "expected FILE.py:NAME"),
    ("mobilenet_v2:Nothing", "no class or function Nothing"), ("mobilenet_v2:SMALL", "no class or function SMALL"),
    ("mobilenet_v2:MobileNetV2?width", "'width' is no argument"),
    ("mobilenet_v2:MobileNetV2?depth=3", "unexpected keyword argument 'depth'"),
    ("mobilenet_v2:MobileNetV2?width=0", "width multiplier 0 is not between 0 and 8"),
    ("missing.py:Net", "there is no file missing.py"),
    ("no_such_module:Net", "cannot be imported (ModuleNotFoundError"),
    ("mobilenet_v2:Table?stages=()&stem=1&head=None", "returns Table, expected an nn.Module")))
def test_what_cannot_be_is_named(spec, named):
    with pytest.raises(BadInput) as raised:
        networks.make(spec)
    assert named in str(raised.value) and len(str(raised.value).splitlines()) == 1


def test_a_file_that_cannot_be_imported_is_named(tmp_path):
    (tmp_path / "broken.py").write_text("import torch\nraise KeyError('here')\n")
    with pytest.raises(BadInput, match=r"broken.py cannot be imported \(KeyError: 'here'\)"):
        networks.make(f"{tmp_path}/broken.py:Net")


def test_problems_of_a_foreign_checkpoint_are_few(tmp_path):
    path = tmp_path / "other.pt"
    torch.save({f"layer{i}.weight": torch.zeros(1) for i in range(1000)}, path)
    with pytest.raises(BadInput) as raised:
        networks.load_checkpoint(path)
    assert "unknown layer0.weight" in str(raised.value) and "more)" in str(raised.value)
    assert len(str(raised.value)) < 400
