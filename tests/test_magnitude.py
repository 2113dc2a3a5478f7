"""Gradual magnitude pruning: its schedule by hand, its zeros, and that training resumes with it (see test_loop.py)."""
import pytest
import torch
from torch import nn

from compressed.errors import BadInput
from compressed.graph import weight_layers
from training.magnitude import GradualMagnitude


class Net(nn.Module):
    """200 weights in two layers: 1, 2, ..., 100 and 101, ..., 200."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(10, 10, 1, bias=False)
        self.linear = nn.Linear(10, 10)
        for i, (_, layer) in enumerate(weight_layers(self)):
            layer.weight.data = torch.arange(1.0, 101).view(layer.weight.shape).add(100 * i).neg_()

    def zeros(self) -> list[int]:
        return [int((layer.weight == 0).sum()) for _, layer in weight_layers(self)]


def test_the_schedule_by_hand():
    model = Net()
    pruning = GradualMagnitude(model, ["conv", "linear"], 0.8)
    expected = {8.0: [0, 0], 6.0: [93, 0], 4.0: [100, 40], 0.0: [100, 60]}  # 160 (1 - 0.75^3), 160 (1 - 0.5^3), 160
    for lr_to_come, zeros in expected.items():
        pruning.update(lr_to_come)
        pruning.shrink(0.1)
        assert model.zeros() == zeros  # one ranking for both layers, the smallest first
    model.conv.weight.data += 7  # what the optimizer does to them
    model.linear.weight.data += 7
    pruning.shrink(0.1)
    assert model.zeros() == [100, 60]
    assert model.linear.weight.flatten()[60:].tolist() == [-i + 7.0 for i in range(161, 201)]


def test_only_the_named_layers_are_pruned():
    model = Net()
    pruning = GradualMagnitude(model, ["linear"], 0.5)
    pruning.update(1.0)
    pruning.update(0.0)
    assert model.zeros() == [0, 50]


def test_state_of_another_process():
    ours, theirs = Net(), Net()
    first, second = GradualMagnitude(ours, ["conv", "linear"], 0.8), GradualMagnitude(theirs, ["conv", "linear"], 0.8)
    second.load_state_dict(first.state_dict())  # before any update
    first.update(8.0)
    first.update(6.0)
    second.load_state_dict(first.state_dict())
    second.shrink(0.1)
    assert theirs.zeros() == ours.zeros() == [93, 0]
    second.update(4.0)
    assert theirs.zeros() == [100, 40]
    assert first.options() == second.options() != GradualMagnitude(ours, ["conv"], 0.8).options()


@pytest.mark.parametrize("target", (0, 1, -0.1))
def test_an_impossible_target(target):
    with pytest.raises(BadInput, match="impossible target"):
        GradualMagnitude(Net(), ["conv"], target)
