"""Dead weight: what no non-zero weight reaches or reads. Found and set to zero exactly: the logits stay the same.

A channel is never read if every weight that would read it is zero; then what computes it is dead. A channel is always
zero if nothing but zeros reaches it and its shift rounds to the code 0; then what reads it is dead. Each removal can
make others, so both passes alternate until nothing changes. What is zero need not be stored (see counting.layout).
"""
import torch
from torch import Tensor, nn

from compressed.graph import Point, points


def reads(layer: nn.Module) -> Tensor:
    """Which input channels a depthwise or full convolution, or a linear layer, reads: bool [in]."""
    used = layer.weight != 0
    if getattr(layer, "groups", 1) > 1:
        return used.flatten(1).any(1)
    return used.flatten(2).any(2).any(0) if used.dim() == 4 else used.any(0)


def drop_inputs(layer: nn.Module, dead: Tensor) -> None:
    if getattr(layer, "groups", 1) > 1:
        layer.weight[dead] = 0
    else:
        layer.weight[:, dead] = 0


def drop_outputs(layer: nn.Module, norm: nn.BatchNorm2d, dead: Tensor) -> None:
    for values in (layer.weight, norm.weight, norm.bias):
        values[dead] = 0


def backward(model: nn.Module, order: list[Point]) -> None:
    """Removes what computes a channel that is never read, from the logits to the image."""
    read = {order[-1].name: torch.ones(model.linear.out_features, dtype=torch.bool)}
    for point in reversed(order):
        for branch in point.branches:
            used = read[point.name]
            if branch.kind == "layer":
                layer = model.get_submodule(branch.name)
                if branch.norm:
                    drop_outputs(layer, model.get_submodule(branch.norm), ~used)
                used = reads(layer)
            read[branch.source] = read[branch.source] | used if branch.source in read else used


def forward(model: nn.Module, order: list[Point], steps: dict[str, float]) -> None:
    """Removes what reads a channel that is always zero, from the image to the logits."""
    zero = {}
    for point in order:
        nothing, shift = [], 0.0
        for branch in point.branches:
            if branch.kind == "layer":
                layer = model.get_submodule(branch.name)
                drop_inputs(layer, zero[branch.source])
                nothing.append(~(layer.weight != 0).flatten(1).any(1))
                shift = shift + (model.get_submodule(branch.norm) if branch.norm else layer).bias
            else:
                nothing.append(zero.get(branch.source, torch.zeros(3, dtype=torch.bool)))  # pixels may be anything
        if point is order[-1]:
            return
        code = torch.round(torch.as_tensor(shift) / steps[point.name])
        zero[point.name] = torch.stack(nothing).all(0) & (code <= 0 if point.activation == "relu" else code == 0)
        if point.activation == "relu":
            for branch in point.branches:  # a shift below zero is no different from none
                if branch.norm:
                    drop_outputs(model.get_submodule(branch.name), model.get_submodule(branch.norm), zero[point.name])


@torch.no_grad()
def remove(model: nn.Module, activations: list[dict]) -> dict[str, int]:
    """Set every dead weight, scale and shift of a shipped model to zero, in place.

    activations: the claim's list of activation points, whose steps say what rounds to zero. Returns how many non-zero
    values went, {"weights", "scales and shifts"}.
    """
    def nonzeros():
        return {"weights": sum(int(p.count_nonzero()) for p in model.parameters() if p.dim() > 1),
                "scales and shifts": sum(int(p.count_nonzero()) for p in model.parameters() if p.dim() == 1)}

    steps, order, before = {a["name"]: a["step"] for a in activations}, points(model), nonzeros()
    last = None
    while last != nonzeros():
        last = nonzeros()
        backward(model, order)
        forward(model, order, steps)
    return {kind: before[kind] - last[kind] for kind in before}
