"""The graph is the forward pass's: another table goes through the whole chain, and what has no rule is named."""
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import check_model_operations
import mobilenet_v2
import quantize
import testers
from compressed import exact_network as exact
from compressed import graph, grids
from compressed.errors import BadInput
from compressed.graph import Branch, Point, points
from mobilenet_v2 import MobileNetV2
from tools import export_onnx, integer
from tools import pack as packed
from training import main as training


def test_the_points_of_a_block_of_each_kind():
    found = {point.name: point for point in points(MobileNetV2(width=0.5))}
    assert list(found)[:4] == ["image", "relu1", "layers.0.relu1", "layers.0.relu2"]
    assert list(found)[-3:] == ["relu2", "features", "logits"]
    assert found["image"] == Point("image", (Branch("pixels", "pixels", "pixels"),), False, True)
    assert found["relu1"] == Point("relu1", (Branch("layer", "conv1", "image", "bn1"),), True, False)
    last = Branch("layer", "layers.1.conv3", "layers.1.relu2", "layers.1.bn3")
    assert found["layers.1.out"] == Point("layers.1.out", (
        last, Branch("layer", "layers.1.shortcut.0", "layers.0.out", "layers.1.shortcut.1")), False, True)  # a shortcut
    assert found["layers.2.out"].branches[1] == Branch("unchanged", "layers.2.shortcut", "layers.1.out")  # a residual
    assert [branch.name for branch in found["layers.3.out"].branches] == ["layers.3.conv3"]  # a stride
    assert found["features"] == Point("features", (Branch("mean", "mean", "relu2", terms=16),), False, False)
    assert found["logits"] == Point("logits", (Branch("layer", "linear", "features"),), False, True)


def test_quantized_modules_have_the_same_graph():
    model = MobileNetV2(width=0.5).eval()
    plain = points(model)
    grids.quantize_weights(model, grids.bit_table("8", model), "layer")
    exact.quantize_activations(model, [{"name": name, "bits": 8, "signed": signed, "step": 0.5}
                                          for name, signed in graph.activation_points(model).items()])
    assert [(p.name, p.branches, p.signed) for p in points(model)] == [(p.name, p.branches, p.signed) for p in plain]


class Odd(nn.Module):
    """Two convolutions and what may go wrong between them."""

    def __init__(self, between):
        super().__init__()
        self.image, self.conv1 = nn.Identity(), nn.Conv2d(3, 4, 1)
        self.bn1, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.between = between

    def forward(self, x):
        return self.conv2(self.between(self, self.conv1(self.image(x))))


@pytest.mark.parametrize("between, said", (
    (lambda self, x: x, "conv2 reads a value that is not rounded"),
    (lambda self, x: self.bn1(self.bn1(x)), "bn1: expected right after"),
    (lambda self, x: x * 2, "no counting rule for operation mul"), (lambda self, x: torch.sigmoid(x), "sigmoid")))
def test_what_has_no_rule_is_named(between, said):
    with pytest.raises(BadInput, match=said):
        points(Odd(between))


def test_another_table_goes_through_the_whole_chain(tmp_path, monkeypatch, capsys):
    """Fewer blocks, other widths, another stride: from training to ONNX, by the scripts, to the same logits to the
    last bit."""
    monkeypatch.setattr(mobilenet_v2, "STAGES", ((1, 8, 1, 2), (3, 16, 2, 1), (6, 24, 1, 1), (4, 40, 2, 2)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CIFAR100_DIR", raising=False)
    assert training.main("--made-up 40 --batch-size 20 --epochs 1 --no-cuda --lr 0.01 --refresh 40 --eval-every 9 "
                         "--run run".split()) == 0
    options = ["--made-up", "100"]
    assert quantize.main(["--checkpoint", "run/masked.pt", "--out", "small.pt", "--calibration", "20", "--renew", "40",
                          *options]) == 0
    claim = json.loads(Path("small.json").read_text())
    assert len(claim["activations"]) == len(graph.activation_points(MobileNetV2())) < 55
    at = ["--checkpoint", "small.pt"]
    assert packed.main(at) == 0 and testers.main([*at, *options]) == 0
    assert check_model_operations.main([*at, "--summary"]) == 0
    capsys.readouterr()
    assert integer.main([*at, *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["identical"] == report["images"] == 100
    assert export_onnx.main([*at, *options, "--verify"]) == 0
    assert "all logits are the same, to the last bit, on 100" in capsys.readouterr().out
    assert testers.main(["--checkpoint", "small.mnet", *options]) == 0
