"""Optimize convolutions that mix channels with Muon, and all other parameters with Nesterov SGD.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks": a weight matrix moves along the nearest
semi-orthogonal matrix to its momentum, so that directions with small gradients move as far as those with large ones.
Here a BatchNorm follows every convolution, so only the direction of a convolution's weights matters. A step therefore
rotates the weights by a given angle (`turn`, at the peak learning rate) and keeps their norm; weight decay is not used.
"""
import torch
from torch import Tensor, nn

from compressed import threads
from training.cuda_graphs import Streams

MOMENTUM = 0.95
# Jordan's quintic polynomial. Three iterations instead of his five bring singular values above 0.02 to 0.7 to 1.2, and
# the direction of the step is nearly the same.
ITERATIONS, A, B, C = 3, 3.4445, -4.7750, 2.0315


def orthogonal(matrix: Tensor, dtype=torch.float32) -> Tensor:
    """Return a matrix [m, n] with the same singular vectors, and singular values near one (Newton-Schulz iterations).

    dtype: of the iterations; the result has that of `matrix`.
    """
    x = (matrix / matrix.norm().clamp(min=1e-20)).to(dtype)
    x = x.t() if len(x) > x.shape[1] else x  # the smaller of the two Gram matrices
    for _ in range(ITERATIONS):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return (x if x.shape == matrix.shape else x.t()).to(matrix.dtype)


def mixes_channels(weight: Tensor) -> bool:
    """Return True for the weight [out, in, height, width] of a convolution that is not depthwise.

    The linear layer has no BatchNorm behind it, so its norm matters, and it is left to SGD.
    """
    return weight.dim() == 4 and weight.shape[1] > 1


class Muon(torch.optim.SGD):
    """Update a model's parameters: Muon for weights that mix channels, SGD for the others.

    turn:  angle in radians by which a step rotates a weight at the learning rate `lr`; proportional at other rates.
    kept:  {weight: mask tensor, 1 where trained and 0 where pruned}; a step changes no pruned value.
    dtype: of the Newton-Schulz iterations; bfloat16 is exact enough.
    """

    def __init__(self, weights: list[nn.Parameter], lr: float, turn: float, weight_decay: float,
                 kept: dict[Tensor, Tensor], dtype=torch.float32):
        self.turned = [p for p in weights if mixes_channels(p)]
        others = [p for p in weights if not mixes_channels(p)]
        super().__init__([{"params": self.turned, "weight_decay": 0.0},
                          {"params": [p for p in others if p.dim() > 1], "weight_decay": weight_decay},
                          {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0}],
                         lr=lr, momentum=0.9, nesterov=True, fused=True)
        self.ratio, self.kept, self.dtype, self.streams = turn / lr if lr else 0.0, kept, dtype, None
        # the most expensive first: every thread takes every n-th, and so all have about the same amount of work
        self.turned.sort(key=lambda p: -p.numel() * min(len(p), p[0].numel()))

    @torch.no_grad()
    def step(self):
        length = self.ratio * self.param_groups[0]["lr"]
        moved = [p for p in self.turned if p.grad is not None]
        if moved and moved[0].device.type == "cuda":
            self.streams = self.streams or Streams()
            self.streams.for_each(lambda weight: self.turn(weight, length), moved)
        else:
            threads.for_each(lambda weights: [self.turn(weight, length) for weight in weights], moved)
        for weight in moved:
            weight.grad = None  # SGD skips parameters without a gradient
        super().step()

    def turn(self, weight: Tensor, length: float) -> None:
        """Rotate a weight by `length` radians in the direction of its orthogonalized momentum; keep its norm."""
        gradient, kept = weight.grad, self.kept.get(weight)
        if kept is not None:
            gradient = gradient * kept
        if "momentum_buffer" not in self.state[weight]:
            self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        momentum = self.state[weight]["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(momentum, MOMENTUM)
        step = orthogonal(ahead.flatten(1), self.dtype).reshape(weight.shape)
        if kept is not None:
            step = step * kept
        norm = weight.norm().clamp(min=1e-20)
        step -= weight * ((step * weight).sum() / norm**2)  # without the part that only scales the weight
        weight.sub_(step * (length * norm / step.norm().clamp(min=1e-20)))
        weight.mul_(norm / weight.norm().clamp(min=1e-20))
