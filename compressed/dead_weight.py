"""Remove dead weight: what cannot change a logit, because nothing reaches it or nothing reads it. It is set to zero.

A channel is never read if every weight that would read it is zero; then what computes it is dead. A channel is always
zero if nothing but zeros reaches it and its shift rounds to the code 0; then what reads it is dead. Each removal can
allow more, so both passes alternate until nothing changes. What is zero need not be stored (see counting.layout), but
tensors keep their shapes: a channel or filter of zeros is not cut out of the network.
"""
import torch
from torch import Tensor, nn

from compressed.exact_network import FORMULAS
from compressed.graph import Branch, Point, read_graph


def in_groups(layer: nn.Module) -> Tensor:
    """Return a view of a layer's weights, [groups, outputs of a group, inputs of a group, taps]."""
    return layer.weight.view(getattr(layer, "groups", 1), -1, layer.weight.shape[1], layer.weight[0, 0].numel())


def drop_outputs(model: nn.Module, branch: Branch, dead: Tensor) -> None:
    """Set to zero what computes the output channels `dead`, bool [out], in a layer and its BatchNorm."""
    for name in {branch.name, branch.norm} - {None}:
        for values in model.get_submodule(name).parameters():
            values[dead] = 0


def origins(branch: Branch, channels: int) -> Tensor:
    """Return the channel, of those of the source, that each element of a "moved" branch comes from; -1 for a zero."""
    return (branch.index - 1) // (branch.elements // channels)


def remove_unread(model: nn.Module, order: tuple[Point, ...]) -> None:
    """Remove what computes a channel that is never read, from the logits to the image."""
    needed = {point.name: torch.zeros(point.shape[0], dtype=torch.bool) for point in order}
    needed[order[-1].name][:] = True
    for point in reversed(order):
        for branch in point.branches:
            used = needed[point.name]
            if branch.kind == "pixels":
                continue
            if branch.kind in ("layer", "norm"):
                drop_outputs(model, branch, ~used)
            if branch.kind == "layer":
                used = (in_groups(model.get_submodule(branch.name)) != 0).any(3).any(1).flatten()
            elif branch.kind == "norm":
                used = used & (model.get_submodule(branch.norm).weight != 0)
            elif branch.kind == "moved":
                found = origins(branch, len(needed[branch.source]))[used]
                used = torch.zeros_like(needed[branch.source])
                used[found[found >= 0]] = True
            for source in branch.sources:
                needed[source] = needed[source] | used


def constant_outputs(model: nn.Module, branch: Branch, zero: dict[str, Tensor]) -> tuple[Tensor, Tensor | float]:
    """Return (bool [C]: output channels of a branch that only zeros reach; the constant that the branch adds to them).

    zero: {activation point: its channels that are always zero}. Weights that read those are set to zero.
    """
    if branch.kind == "layer":
        layer = model.get_submodule(branch.name)
        for rows, dead in zip(in_groups(layer), zero[branch.source].view(getattr(layer, "groups", 1), -1)):
            rows[:, dead] = 0
        if branch.norm:
            layer.weight[model.get_submodule(branch.norm).weight == 0] = 0  # its sums are multiplied by zero
        bias = model.get_submodule(branch.norm).bias if branch.norm else layer.bias
        return ~(layer.weight != 0).flatten(1).any(1), 0.0 if bias is None else bias
    if branch.kind == "norm":
        norm = model.get_submodule(branch.norm)
        norm.weight[zero[branch.source]] = 0
        return norm.weight == 0, norm.bias
    if branch.kind == "pixels":
        return torch.zeros(3, dtype=torch.bool), 0.0  # they may be anything
    if branch.kind == "product":
        return zero[branch.source] | zero[branch.other], 0.0
    if branch.kind == "function":
        return zero[branch.source], float(FORMULAS[branch.function](torch.zeros(1)))
    if branch.kind == "moved":
        empty = torch.cat((zero[branch.source], torch.ones(1, dtype=torch.bool)))  # the last: no channel
        return empty[origins(branch, len(empty) - 1)].view(len(branch.index), -1).all(1), 0.0
    return zero[branch.source], 0.0


def remove_constant(model: nn.Module, order: tuple[Point, ...], steps: dict[str, float]) -> None:
    """Remove what reads a channel that is always zero, from the image to the logits."""
    zero = {}
    for point in order:
        found, shifts = zip(*(constant_outputs(model, branch, zero) for branch in point.branches))
        if point is order[-1]:
            return
        code = torch.round(torch.as_tensor(sum(shifts)) / steps[point.name])
        clipped = point.activation != "none"
        zero[point.name] = torch.stack(found).all(0) & (code <= 0 if clipped else code == 0)
        if clipped:
            for branch in point.branches:  # a shift below zero is no different from none
                if branch.kind in ("layer", "norm"):
                    drop_outputs(model, branch, zero[point.name])


@torch.no_grad()
def remove(model: nn.Module, activations: list[dict]) -> dict[str, int]:
    """Set every dead weight, scale and shift of a shipped model to zero, in place.

    activations: the claim's list of activation points, whose steps say what rounds to zero. Returns the number of
    removed values, {"weights", "scales and shifts"}.
    """
    def nonzeros():
        return {"weights": sum(int(p.count_nonzero()) for p in model.parameters() if p.dim() > 1),
                "scales and shifts": sum(int(p.count_nonzero()) for p in model.parameters() if p.dim() == 1)}

    steps, order, before = {a["name"]: a["step"] for a in activations}, read_graph(model).points, nonzeros()
    last = None
    while last != nonzeros():
        last = nonzeros()
        remove_unread(model, order)
        remove_constant(model, order, steps)
    return {kind: before[kind] - last[kind] for kind in before}
