"""Give a network from elsewhere the input normalisation that it was trained with, as --normalise states it.

All code here gives a network (pixel - 128) / 64 (cifar100.normalise). A network that was trained with another
normalisation takes (pixel / 255 - mean) / deviation, which is scale * ours + shift for each colour.
"""
import argparse

import torch
from torch import Tensor, nn

from compressed import cifar100
from compressed.errors import BadInput
from compressed.graph import read_graph


def add_option(parser) -> None:
    """Add --normalise to a parser: (means, deviations), each a tuple for red, green and blue, or None."""
    parser.add_argument("--normalise", type=_statistics, metavar="R,G,B/R,G,B",
                        help="means and standard deviations of pixel / 255 with which a float checkpoint was trained "
                             "elsewhere, such as 0.5071,0.4865,0.4409/0.2673,0.2564,0.2762 (default: our own, "
                             "(pixel - 128) / 64)")


def _statistics(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    try:
        means, deviations = (tuple(map(float, part.split(","))) for part in text.split("/"))
        good = all(abs(mean) <= 255 for mean in means) and all(1e-3 <= each <= 255 for each in deviations)
    except ValueError:
        good = False
    if not good or not len(means) == len(deviations) == 3:
        raise argparse.ArgumentTypeError(f"{text!r}: expected three means, a slash, and three deviations of "
                                         "pixel / 255, such as 0.5,0.5,0.5/0.25,0.25,0.25")
    return means, deviations


def scale_and_shift(means, deviations) -> tuple[Tensor, Tensor]:
    """Return float64 [3] each, such that scale * (pixel - 128) / 64 + shift is (pixel / 255 - mean) / deviation."""
    means, deviations = (torch.tensor(values, dtype=torch.float64) for values in (means, deviations))
    return cifar100.STD / 255 / deviations, (cifar100.MEAN / 255 - means) / deviations


class Renormalised(nn.Module):
    """A network that takes our input, and hands `network` the normalisation that it was trained with."""

    def __init__(self, network: nn.Module, means, deviations):
        super().__init__()
        self.network = network
        for name, values in zip(("scale", "shift"), scale_and_shift(means, deviations)):
            self.register_buffer(name, values.float()[:, None, None], persistent=False)

    def forward(self, x):
        return self.network(x * self.scale + self.shift)


@torch.no_grad()
def fold(model: nn.Module, means, deviations) -> nn.Module:
    """Fold another input normalisation into the layers of a prepared network that read the image, in place; return it.

    Equal but for one rounding of every changed value to float32: scales multiply the weights, and shifts go into the
    BatchNorm's mean or the bias. Raises BadInput where the network cannot be folded exactly.
    """
    graph, (scale, shift) = read_graph(model), scale_and_shift(means, deviations)
    first = {branch for point in graph.points for branch in point.branches if graph.images & set(branch.sources)}
    if clipped := [point.name for point in graph.points if point.name in graph.images and point.activation != "none"]:
        raise BadInput(f"--normalise cannot be folded exactly: {clipped[0]} clips the image before any layer")
    for branch in first:
        layer = model.get_submodule(branch.name) if branch.kind == "layer" else None
        plain = isinstance(layer, nn.Conv2d) and layer.groups == 1
        if not plain or shift.any() and (branch.window.padding != (0, 0) or branch.norm is None and layer.bias is None):
            raise BadInput(f"--normalise cannot be folded exactly: {branch.name} reads the image, and is no convolution"
                           " that has one group, a BatchNorm or a bias, and no padding (zeros at the border would be "
                           "another colour); train it further with (pixel - 128) / 64: training/main.py --network SPEC "
                           "--start F, with --pretrain (dense), --rew or --masked-retrain (both make zeros)")
        weight = layer.weight.double()
        added = (weight * shift.to(weight)[:, None, None]).sum((1, 2, 3))  # to every sum of the convolution
        layer.weight.copy_(weight * scale.to(weight)[:, None, None])
        if branch.norm is not None:
            model.get_submodule(branch.norm).running_mean.sub_(added)
        elif layer.bias is not None:
            layer.bias.add_(added)
    return model
