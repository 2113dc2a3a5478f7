"""Dead weight: what no non-zero weight reaches or reads. Found and set to zero exactly: the logits stay the same.

A channel is never read if every weight that would read it is zero; then what computes it is dead. A channel is always
zero if nothing but zeros reaches it and its shift rounds to the code 0; then what reads it is dead. Each removal can
make others, so both passes alternate until nothing changes. What is zero is not stored (see counting.storage).
"""
import torch
from torch import Tensor

from mobilenet_v2 import MobileNetV2


def reads(*convs) -> Tensor:
    """Which input channels these (full) convolutions or linear layers read: bool [in]."""
    return torch.stack([(conv.weight != 0).flatten(2).any(2).any(0) if conv.weight.dim() == 4 else (conv.weight != 0).any(0)
                        for conv in convs]).any(0)


def empty(conv) -> Tensor:
    """Which output channels have no non-zero weight: bool [out]."""
    return (conv.weight == 0).flatten(1).all(1)


def drop_outputs(conv, bn, dead: Tensor) -> None:
    conv.weight[dead] = 0
    bn.weight[dead] = 0
    bn.bias[dead] = 0


def backward(model: MobileNetV2) -> None:
    """Removes what computes a channel that is never read, from the last layer to the first."""
    drop_outputs(model.conv2, model.bn2, ~reads(model.linear))
    read = reads(model.conv2)
    for block in reversed(model.layers):
        drop_outputs(block.conv3, block.bn3, ~read)
        if len(block.shortcut):
            drop_outputs(*block.shortcut, ~read)
        drop_outputs(block.conv2, block.bn2, ~reads(block.conv3))
        drop_outputs(block.conv1, block.bn1, empty(block.conv2))
        if len(block.shortcut):
            read = reads(block.conv1, block.shortcut[0])
        else:
            read = reads(block.conv1) | (read if block.residual else False)
    drop_outputs(model.conv1, model.bn1, ~read)


def forward(model: MobileNetV2, steps: dict[str, float]) -> None:
    """Removes what reads a channel that is always zero, from the first layer to the last."""

    def rectified(conv, bn, point: str) -> Tensor:
        """Channels of a ReLU that are always zero: no weight, and a shift that rounds to 0 or below."""
        zero = empty(conv) & (torch.round(bn.bias / steps[point]) <= 0)
        drop_outputs(conv, bn, zero)
        return zero

    zero = rectified(model.conv1, model.bn1, "relu1")
    for i, block in enumerate(model.layers):
        block.conv1.weight[:, zero] = 0
        hidden = rectified(block.conv1, block.bn1, f"layers.{i}.relu1")
        block.conv2.weight[hidden] = 0
        hidden = rectified(block.conv2, block.bn2, f"layers.{i}.relu2")
        block.conv3.weight[:, hidden] = 0
        shift, nothing = block.bn3.bias.clone(), empty(block.conv3)
        if len(block.shortcut):
            block.shortcut[0].weight[:, zero] = 0
            shift, nothing = shift + block.shortcut[1].bias, nothing & empty(block.shortcut[0])
        elif block.residual:
            nothing &= zero
        zero = nothing & (torch.round(shift / steps[f"layers.{i}.out"]) == 0)
    model.conv2.weight[:, zero] = 0
    model.linear.weight[:, rectified(model.conv2, model.bn2, "relu2")] = 0


@torch.no_grad()
def remove(model: MobileNetV2, activations: list[dict]) -> dict[str, int]:
    """Set every dead weight, scale and shift of a shipped model to zero, in place.

    activations: the claim's list of activation points, whose steps say what rounds to zero. Returns how many non-zero
    values went, {"weights", "scales and shifts"}.
    """
    def nonzeros():
        return {"weights": sum(int(p.count_nonzero()) for p in model.parameters() if p.dim() > 1),
                "scales and shifts": sum(int(p.count_nonzero()) for p in model.parameters() if p.dim() == 1)}

    steps, before = {a["name"]: a["step"] for a in activations}, nonzeros()
    last = None
    while last != nonzeros():
        last = nonzeros()
        backward(model)
        forward(model, steps)
    return {kind: before[kind] - last[kind] for kind in before}
