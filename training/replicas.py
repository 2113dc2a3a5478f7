"""A batch in shares: one for every worker thread of every process, each with gradients and BatchNorm statistics of its
own.

Every share is normalised by its own statistics (Hoffer et al. 2017, "ghost batch normalization"); the running
statistics are the mean of all. So P processes of W workers compute what one process of P W workers does, but for
rounding.
"""
import copy
import dataclasses

import torch
import torch.distributed as dist
from torch import nn

from compressed import threads


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those of `torchrun`; alone by default."""
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agree(self, flag: bool, device) -> bool:
        """True everywhere if it is true anywhere."""
        if self.count == 1:
            return flag
        value = torch.tensor(float(flag), device=device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value)

    def add(self, tensors: list[torch.Tensor]) -> None:
        """The sum over all processes, in place."""
        if self.count > 1:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(flat)
            torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in
                                           zip(flat.split([tensor.numel() for tensor in tensors]), tensors)])


def shares(count: int, parts: int) -> list[slice]:
    """`count` images in `parts` shares, as equal as can be with an even number in each: mixing pairs neighbours.

    Fewer parts where there are not two images for each.
    """
    pairs, parts = -(-count // 2), max(1, min(parts, count // 2))
    ends = [2 * (pairs * k // parts) for k in range(parts)] + [count]
    return [slice(start, end) for start, end in zip(ends, ends[1:])]


class Replicas:
    """A model and copies that share its weights: each has gradients and BatchNorm statistics of its own."""

    def __init__(self, model: nn.Module, count: int):
        self.models = [model]
        for _ in range(count - 1):
            replica = copy.deepcopy(model)
            for theirs, ours in zip(replica.parameters(), model.parameters()):
                theirs.data = ours.data
            self.models.append(replica)
        self.weights = [[p for p in each.parameters() if p.requires_grad] for each in self.models]
        self.statistics = [[b for b in each.buffers() if b.is_floating_point()] for each in self.models]

    def follow(self) -> None:
        """Give the copies the model's statistics and modes."""
        self.spread()
        for replica in self.models[1:]:
            for theirs, ours in zip(replica.modules(), self.models[0].modules()):
                theirs.training = ours.training

    def spread(self) -> None:
        for statistics in self.statistics[1:]:
            torch._foreach_copy_(statistics, self.statistics[0])

    @torch.no_grad()
    def gather(self, processes: Processes) -> None:
        """After each has gone backward: the model gets the sum of the gradients, and all get the mean statistics."""
        gradients = [p.grad for p in self.weights[0] if p.grad is not None]
        statistics = self.statistics[0]
        for weights, theirs in zip(self.weights[1:], self.statistics[1:]):
            threads.for_each(torch._foreach_add_, gradients, [p.grad for p in weights if p.grad is not None])
            torch._foreach_add_(statistics, theirs)
        processes.add(gradients + statistics)
        count = len(self.models) * processes.count
        if count > 1:
            torch._foreach_mul_(statistics, 1 / count)
            self.spread()
