"""Make the optimizer of a stage: SGD, AdamW or Muon, and Adam for trained quantization steps."""
import torch
from torch import nn

from training.muon import Muon, begin_momentum, turned_weights
from training.plan import Settings


def make_optimizer(settings: Settings, model: nn.Module, kept: dict | None = None):
    """Return the optimizer of a model's weights. If quantization steps are trained too, Adam is added for those.

    Weight decay acts on the weights of convolutions and the linear layer, not on BatchNorm, biases and steps.
    kept: {weight: mask, 0 where it is pruned}. Only Muon uses it: its steps have a given length, in which pruned
    weights must not count.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    weights = [p for name, p in trained if not name.endswith("log_step")]
    steps = [p for name, p in trained if name.endswith("log_step")]
    groups = [{"params": [p for p in weights if p.dim() > 1], "weight_decay": settings.weight_decay},
              {"params": [p for p in weights if p.dim() <= 1], "weight_decay": 0.0}]
    if settings.optimizer == "muon":
        dtype = getattr(torch, settings.precision)
        optimizer = Muon(weights, turned_weights(model), settings.lr, settings.turn, settings.weight_decay, kept or {},
                         dtype)
    elif settings.optimizer == "adam":
        optimizer = torch.optim.AdamW(groups, lr=settings.lr)
    else:
        optimizer = torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True, fused=True)
        begin_momentum(optimizer)
    if not steps:
        return optimizer
    factor = settings.step_rate / settings.lr if settings.lr else 0.0
    adam = torch.optim.Adam([{"params": steps, "factor": factor}], lr=settings.step_rate, capturable=steps[0].is_cuda)
    return Together([optimizer, adam])


class Together:
    """Several optimizers behind the interface of one."""

    def __init__(self, optimizers: list):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return [group for each in self.optimizers for group in each.param_groups]

    def step(self) -> None:
        for each in self.optimizers:
            each.step()

    def state_dict(self) -> dict:
        return {str(k): each.state_dict() for k, each in enumerate(self.optimizers)}

    def load_state_dict(self, state: dict) -> None:
        """Load a state, of another device perhaps: `capturable`, where Adam keeps its steps, stays as it is here."""
        for k, each in enumerate(self.optimizers):
            theirs = state[str(k)]
            groups = [group | {key: own[key] for key in own.keys() & {"capturable"}}
                      for group, own in zip(theirs["param_groups"], each.param_groups, strict=True)]
            each.load_state_dict(theirs | {"param_groups": groups})
