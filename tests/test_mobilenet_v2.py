import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compressed.graph import weight_layers
from compressed.networks import load_checkpoint
from mobilenet_v2 import SUBMISSION, MobileNetV2
from small import random_network as network
from tools import layers


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


# ------------------------------------------------------------------------------------------------------ the script

def test_the_script_without_thop(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "thop", None)
    assert layers.main([]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()[1:59]]
    assert [row[0] for row in rows] == [str(i) for i in range(58)]
    assert [row[1] for row in rows] == [name for name, _ in weight_layers(MobileNetV2())]
    assert sum(int(row[-1].replace(",", "")) for row in rows) == 3_777_632 + 166_400
    assert rows[0][2:] == ["conv", "3x3", "40x3x3x3", "1", "40x32x32", "1,080"]
    assert rows[13][2:] == ["depthwise", "3x3", "192x1x3x3", "2", "192x16x16", "1,728"]
    assert rows[57][2:] == ["linear", "100x1664", "100", "166,400"]
    for figure in ("58 weight tensors: 3,777,632 conv", "166,400 linear weights (+ 100 biases)", "45,536 BatchNorm",
                   "3,989,668 parameters in all", "without thop's count"):
        assert figure in out


def test_what_thop_counts(capsys):
    pytest.importorskip("thop")
    assert layers.main([]) == 0
    out = capsys.readouterr().out
    assert "thop, batch of 1: 162,544,640\n" in out and "thop, batch of 2: 325,089,280\n" in out
