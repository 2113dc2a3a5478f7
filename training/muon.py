"""Optimize convolutions that mix channels with Muon, and all other parameters with Nesterov SGD.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks": a weight matrix is updated along the
semi-orthogonal matrix nearest to its momentum, so that directions with small gradients move as far as those with large
ones. Where a BatchNorm follows a convolution, only the direction of its weights matters. A step therefore rotates them
by a given angle (`turn` at the peak learning rate) and keeps their norm, without weight decay.
"""
import contextlib
from collections import defaultdict

import torch
from torch import Tensor, nn

from compressed import threads
from compressed.graph import scale_free_weights
from training.cuda_graphs import Streams

MOMENTUM = 0.95
# Jordan's quintic polynomial. Three iterations instead of his five bring singular values above 0.02 to 0.7 to 1.2, and
# the direction of the step is nearly the same.
ITERATIONS, A, B, C = 3, 3.4445, -4.7750, 2.0315


def orthogonal(matrices: Tensor, dtype=torch.float32) -> Tensor:
    """Return matrices [k, m, n] with the same singular vectors, and singular values near one.

    dtype: of the Newton-Schulz iterations; the result has that of `matrices`.
    """
    x = (matrices / norms(matrices)).to(dtype)
    x = x.mT if x.shape[1] > x.shape[2] else x  # the smaller of the two Gram matrices
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return (x if x.shape == matrices.shape else x.mT).to(matrices.dtype)


def norms(matrices: Tensor) -> Tensor:
    """Return the Frobenius norm of each matrix, [k, 1, 1], never zero."""
    return matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-20)


def turned_weights(model: nn.Module) -> list[Tensor]:
    """Return the weights that Muon updates, [out, in, height, width]: of convolutions that mix channels.

    A normalisation must follow, so that the norm of the weights, which Muon keeps, has no effect on the output. Where
    none follows, as after the linear layer, SGD updates the weights.
    """
    return [weight for weight in scale_free_weights(model) if weight.shape[1] > 1]


def begin_momentum(optimizer: torch.optim.SGD) -> None:
    """Give every weight a momentum of zero, which changes no step.

    torch would begin a momentum with a weight's first gradient, and its fused SGD fails if some weights have theirs
    already: a forward pass that leaves out blocks at random gives theirs a gradient later.
    """
    for group in optimizer.param_groups:
        for weight in group["params"]:
            optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)


class Muon(torch.optim.SGD):
    """Update the weights `turned` (see turned_weights) with Muon, and all others with SGD.

    turn:  tangent of the angle by which a step rotates a weight at the learning rate `lr` (of small angles: the angle
           in radians); proportional at other rates.
    kept:  {weight: mask tensor, 1 where trained and 0 where pruned}; a step changes no pruned value.
    dtype: of the Newton-Schulz iterations; bfloat16 is exact enough.
    """

    def __init__(self, weights: list[nn.Parameter], turned: list[nn.Parameter], lr: float, turn: float,
                 weight_decay: float, kept: dict[Tensor, Tensor], dtype=torch.float32):
        chosen = set(turned)
        self.turned = [p for p in weights if p in chosen]
        others = [p for p in weights if p not in chosen]
        super().__init__([{"params": self.turned, "weight_decay": 0.0},
                          {"params": [p for p in others if p.dim() > 1], "weight_decay": weight_decay},
                          {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0}],
                         lr=lr, momentum=0.9, nesterov=True, fused=True)
        begin_momentum(self)
        self.ratio, self.kept, self.dtype, self.streams = turn / lr if lr else 0.0, kept, dtype, None
        groups = defaultdict(list)  # weights of one shape, which make up one batch of matrices
        for weight in self.turned:
            groups[weight.shape, weight in kept].append(weight)
        # the most expensive first, because each of n threads takes every n-th
        self.groups = sorted(groups.values(), key=lambda group: -len(group) * cost(group[0]))
        self.arrived = [set() for _ in self.groups]  # weights with a gradient since the last step, if made_early

    @contextlib.contextmanager
    def made_early(self):
        """Within the block, update a group of weights as soon as the backward pass has computed all its gradients.

        The updates run on CUDA streams of their own and overlap with the rest of the backward pass: the large matrices
        of the late layers are updated (which needs arithmetic) while the large feature maps of the early layers are
        read and written (which needs memory bandwidth). Requires a GPU, and a loss whose gradients come from one
        backward pass that reads no weight after its gradient is complete.
        """
        self.streams = self.streams or Streams()

        def arrive(k: int, weight: Tensor) -> None:
            self.arrived[k].add(weight)
            if len(self.arrived[k]) == len(self.groups[k]):
                with self.streams.forked(k), torch.no_grad():
                    self.turn(self.groups[k], self.ratio * self.param_groups[0]["lr"])

        hooks = [weight.register_post_accumulate_grad_hook(lambda weight, k=k: arrive(k, weight))
                 for k, group in enumerate(self.groups) for weight in group]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def step(self):
        """Rotate the matrices whose gradients have arrived and were not stepped during the backward pass."""
        length = self.ratio * self.param_groups[0]["lr"]
        groups = [[p for p in group if p.grad is not None] for group, arrived in zip(self.groups, self.arrived)
                  if len(arrived) < len(group)]
        self.arrived = [set() for _ in self.groups]
        groups = [group for group in groups if group]
        if self.turned and self.turned[0].is_cuda:
            self.streams = self.streams or Streams()
            self.streams.for_each(lambda group: self.turn(group, length), groups)
        elif groups:
            count = min(threads.cores(), len(groups))
            threads.in_threads(lambda k: [self.turn(group, length) for group in groups[k::count]], range(count))
        for weight in self.turned:
            weight.grad = None  # SGD skips parameters without a gradient
        super().step()

    @torch.no_grad()
    def turn(self, weights: list[Tensor], length: float) -> None:
        """Rotate weights of one shape by atan(length) towards their orthogonalized momenta; keep their norms."""
        gradients = [weight.grad for weight in weights]
        kept = [self.kept[weight] for weight in weights if weight in self.kept]
        if kept:
            gradients = torch._foreach_mul(gradients, kept)
        momenta = [self.state[weight]["momentum_buffer"] for weight in weights]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        steps = orthogonal(stacked(torch._foreach_lerp(gradients, momenta, MOMENTUM)), self.dtype)
        if kept:
            steps = steps * stacked(kept)
        old = stacked(weights)
        norm = norms(old)
        steps -= old * ((steps * old).sum((1, 2), keepdim=True) / norm**2)  # the part along a weight only scales it
        new = old - steps * (length * norm / norms(steps))
        new *= norm / norms(new)
        torch._foreach_copy_(weights, [each.reshape(weight.shape) for each, weight in zip(new, weights)])


def cost(weight: Tensor) -> int:
    """Return the cost of an iteration of `orthogonal`, up to a factor: m n min(m, n) for a matrix [m, n]."""
    return weight.numel() * min(len(weight), weight[0].numel())


def stacked(weights: list[Tensor]) -> Tensor:
    """Return weights [m, ...] of one shape as a new batch of matrices [k, m, n]."""
    return torch.stack(weights).flatten(2)
