"""Divide a batch among workers and processes (data parallelism), and combine their gradients and BatchNorm statistics.

Every worker, a thread of a process, computes one share of the batch in its replica of the model. A share is normalised
by its own statistics ("ghost batch normalization", Hoffer et al. 2017), and the running statistics are the mean over
all shares. So P processes with W workers compute the same as one process with P * W workers, up to rounding, if the
batch can be divided into as many shares of one, even size.
"""
import copy
import dataclasses

import torch
import torch.distributed as dist
# Imported before there is a group, because its default arguments keep the one that they find: the group's threads would
# outlive destroy_process_group(), and might abort the process while the interpreter ends.
import torch.distributed.nn  # noqa: F401
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

    def share(self, tensors: list[torch.Tensor]) -> None:
        """Replace every tensor by that of the first process, in place."""
        if self.count > 1:
            for tensor in tensors:  # as bytes: not every backend knows every type, or gaps between the values
                flat = tensor.detach().clone(memory_format=torch.contiguous_format).flatten()
                dist.broadcast(flat.view(torch.uint8), 0)
                tensor.detach().copy_(flat.view_as(tensor))

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


def own_gradient(parameter: nn.Parameter) -> torch.Tensor:
    """Return a parameter's gradient, made of zeros if it has none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def running_statistics(model: nn.Module) -> list[torch.Tensor]:
    """Return the running means and variances of a model. Its other buffers are no means over images."""
    return [buffer for name, buffer in model.named_buffers()
            if name.rpartition(".")[2] in ("running_mean", "running_var")]


class Replicas:
    """Hold a model and copies of it that share its weights; each has its own gradients and BatchNorm statistics."""

    def __init__(self, model: nn.Module, count: int):
        self.models = [model]
        for _ in range(count - 1):
            replica = copy.deepcopy(model)
            for theirs, ours in zip(replica.parameters(), model.parameters()):
                theirs.data = ours.data
            self.models.append(replica)
        self.statistics = [running_statistics(each) for each in self.models]

    def follow(self) -> None:
        """Copy the model's BatchNorm statistics and other buffers, and its train or eval modes, to the replicas."""
        for replica in self.models[1:]:
            for theirs, ours in zip(replica.buffers(), self.models[0].buffers()):
                theirs.copy_(ours)
            for theirs, ours in zip(replica.modules(), self.models[0].modules()):
                theirs.training = ours.training

    @torch.no_grad()
    def gather(self, processes: Processes) -> None:
        """After all backward passes, sum the gradients into the model and average the BatchNorm statistics of all.

        A forward pass may leave out a block at random: its parameters have no gradient where that happened.
        """
        parameters, statistics = list(self.models[0].parameters()), self.statistics[0]
        for replica, theirs in zip(self.models[1:], self.statistics[1:]):
            found = [(ours, other.grad) for ours, other in zip(parameters, replica.parameters())
                     if other.grad is not None]
            gradients = [own_gradient(ours) for ours, _ in found]
            threads.for_each(torch._foreach_add_, gradients, [grad for _, grad in found])
            threads.for_each(torch._foreach_add_, statistics, theirs)
        if processes.count > 1:
            anywhere = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
            processes.add([anywhere])
            gradients = [own_gradient(p) for p, found in zip(parameters, anywhere.tolist()) if found]
            processes.add(gradients + statistics)
        count = len(self.models) * processes.count
        if count > 1:
            for each in statistics:
                each.mul_(1 / count)
            self.follow()
