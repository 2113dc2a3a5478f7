"""Divide a batch among workers and processes (data parallelism), and combine their gradients and BatchNorm statistics.

Every worker, a thread of a process, computes one share of the batch in its replica of the model. A share is normalised
by its own statistics ("ghost batch normalization", Hoffer et al. 2017), and the running statistics are the mean over
all shares. So P processes with W workers compute the same as one process with P * W workers, up to rounding.
"""
import copy
import dataclasses

import torch
import torch.distributed as dist
from torch import nn

from compressed import threads


@dataclasses.dataclass(frozen=True)
class Processes:
    """Identify this process among those of `torchrun`; by default there is only one."""
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agree(self, flag: bool, device) -> bool:
        """Return True in all processes if `flag` is true in any of them."""
        if self.count == 1:
            return flag
        value = torch.tensor(float(flag), device=device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value)

    def add(self, tensors: list[torch.Tensor]) -> None:
        """Replace every tensor by its sum over all processes, in place."""
        if self.count > 1:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(flat)
            parts = flat.split([tensor.numel() for tensor in tensors])
            torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors)])


def shares(count: int, parts: int) -> list[slice]:
    """Return slices that divide `count` images into `parts` shares, as equal as possible, and fewer for few images.

    All shares but the last have an even number of images, at least two, because mixing pairs neighbours.
    """
    pairs, parts = -(-count // 2), max(1, min(parts, count // 2))
    ends = [2 * (pairs * k // parts) for k in range(parts)] + [count]
    return [slice(start, end) for start, end in zip(ends, ends[1:])]


class Replicas:
    """Hold a model and copies of it that share its weights; each has its own gradients and BatchNorm statistics."""

    def __init__(self, model: nn.Module, count: int):
        self.models = [model]
        for _ in range(count - 1):
            replica = copy.deepcopy(model)
            for theirs, ours in zip(replica.parameters(), model.parameters()):
                theirs.data = ours.data
            self.models.append(replica)
        self.statistics = [[b for b in each.buffers() if b.is_floating_point()] for each in self.models]

    def follow(self) -> None:
        """Copy the model's BatchNorm statistics and train or eval modes to the replicas."""
        for replica, statistics in zip(self.models[1:], self.statistics[1:]):
            for theirs, ours in zip(statistics, self.statistics[0]):
                theirs.copy_(ours)
            for theirs, ours in zip(replica.modules(), self.models[0].modules()):
                theirs.training = ours.training

    @torch.no_grad()
    def gather(self, processes: Processes) -> None:
        """After all backward passes, sum the gradients into the model and average the BatchNorm statistics of all."""
        gradients, *others = ([p.grad for p in each.parameters() if p.grad is not None] for each in self.models)
        statistics = self.statistics[0]
        for grads, theirs in zip(others, self.statistics[1:]):
            threads.for_each(torch._foreach_add_, gradients, grads)
            threads.for_each(torch._foreach_add_, statistics, theirs)
        processes.add(gradients + statistics)
        count = len(self.models) * processes.count
        if count > 1:
            for each in statistics:
                each.mul_(1 / count)
            self.follow()
