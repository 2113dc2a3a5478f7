"""Evaluation, by hand."""
import math
import time

import pytest
import torch
from torch import nn

from compressed import cifar100, evaluation, threads


class Brightest(nn.Module):
    """Predicts the brightest of three colours."""

    def forward(self, x):
        return x.mean((2, 3))


def pictures(wrong: int) -> cifar100.Images:
    """Seventy images whose label is their colour, but for the first `wrong` ones."""
    images = torch.zeros(70, 3, 4, 4, dtype=torch.uint8)
    labels = torch.arange(70) % 3
    images[torch.arange(70), labels] = 192  # (192 - 128) / 64 = 1 for the label, -2 for the others
    labels[:wrong] = (labels[:wrong] + 1) % 3
    return cifar100.Images(images, labels)


def test_evaluate_by_hand():
    loss, right = evaluation.evaluate(Brightest(), pictures(5))
    least = math.log(1 + 2 * math.exp(-3))
    assert not right[:5].any() and right[5:].all() and loss == pytest.approx(least + 3 * 5 / 70, rel=1e-6)


def test_near_duplicates_are_left_out(monkeypatch):
    duplicates, right = torch.zeros(80, dtype=torch.bool), torch.arange(70) >= 5  # of a longer set
    monkeypatch.setattr(cifar100, "near_duplicates", lambda folder: duplicates)
    assert evaluation.without_duplicates(right) == {"correct": 65, "images": 70}
    duplicates[[0, 1, 10, 11, 12, 75]] = True  # two wrong ones, three right ones, and one beyond the images
    assert evaluation.without_duplicates(right) == {"correct": 62, "images": 65}


class Keeping(nn.Module):
    """It keeps an intermediate value for a later use."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 10)

    def forward(self, x):
        self.kept = self.first(x)
        time.sleep(0.001)
        return self.second(self.kept.relu().mean((2, 3)))


@pytest.mark.filterwarnings("ignore")
def test_a_network_that_cannot_be_copied_is_evaluated(monkeypatch):
    monkeypatch.setattr(threads, "cores", lambda: 3)
    network = nn.Sequential(nn.Flatten(), nn.utils.weight_norm(nn.Linear(3072, 10))).eval()
    images = cifar100.made_up(100, 0).images
    network(cifar100.normalise(images[:2]))  # its weight is computed now
    assert evaluation.logits(network, images).shape == (100, 10)


def test_every_thread_has_a_network_of_its_own(monkeypatch):
    monkeypatch.setattr(threads, "cores", lambda: 3)
    network, images = Keeping().eval(), cifar100.made_up(300, 0).images
    with torch.no_grad():
        wanted = network(cifar100.normalise(images))
    torch.testing.assert_close(evaluation.logits(network, images), wanted)
