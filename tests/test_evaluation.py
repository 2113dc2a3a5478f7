import math

import pytest
import torch
from torch import nn

from compressed import cifar100, evaluation


def test_evaluate_by_hand():
    class Brightest(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    images = torch.zeros(70, 3, 4, 4, dtype=torch.uint8)
    labels = torch.arange(70) % 3
    images[torch.arange(70), labels] = 192  # (192 - 128) / 64 = 1 for the label, -2 for the others
    labels[:5] = (labels[:5] + 1) % 3
    loss, correct = evaluation.evaluate(Brightest(), cifar100.Images(images, labels))
    right = math.log(1 + 2 * math.exp(-3))
    assert correct == 65 and loss == pytest.approx(right + 3 * 5 / 70, rel=1e-6)
