"""Prune a model gradually by magnitude: the baseline for reweighted L1, at equal epochs and equal sparsity.

Zhu and Gupta, "To prune, or not to prune", 2017: the smallest weights are set to zero, and their share grows to the
target as 1 - (1 - t)^3, fast at first. Here t is not time but the sum of the learning rates so far, as a share of the
stage's sum: under a cosine schedule the last zeros are made while the other weights can still adapt. Weights are ranked
over all layers, as for the mask of the next stage.
"""
from torch import nn

from compressed.errors import BadInput
from compressed.graph import weight_layers
from training.reweighted_l1 import Masks, target_masks


class GradualMagnitude:
    """Prune gradually, with the interface of ReweightedL1: `update` chooses the zeros, `shrink` applies them each step.

    A weight that is zero stays zero, because it is among the smallest at the next update.
    """
    form = "magnitude"
    lam = 0.0  # there is no penalty

    def __init__(self, model: nn.Module, layers, target: float):
        if not 0 < target < 1:
            raise BadInput(f"impossible target sparsity {target}")
        self.model, self.layers, self.target = model, list(layers), target
        self.all_lr, self.masks, self.share = None, None, 0.0

    def update(self, lr_to_come: float) -> None:
        """Choose the zeros by the schedule. lr_to_come: sum of the learning rates of the steps that are left."""
        if self.all_lr is None:
            self.all_lr = lr_to_come
        to_go = lr_to_come / self.all_lr if self.all_lr else 0.0
        self.share = self.target * (1 - to_go**3)
        wanted = target_masks(self.model, self.layers, self.share) if self.share > 0 else None
        self.masks = wanted and Masks(self.model, wanted)

    def shrink(self, lr: float) -> None:
        """Set the chosen weights to zero; `lr` has no effect."""
        if self.masks is not None:
            self.masks.apply()

    def record(self) -> dict:
        """Return fields of an epoch's log line: the share of zeros in the pruned layers, measured and by the schedule.
        """
        modules = dict(weight_layers(self.model))
        weights = [modules[name].weight for name in self.layers]
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        return {"lambda": self.lam, "zeros_share": zeros / sum(weight.numel() for weight in weights),
                "zeros_path": self.share}

    def options(self) -> dict:
        """Return the arguments of the constructor as plain values."""
        return {"form": self.form, "target": self.target, "layers": self.layers}

    def state_dict(self) -> dict:
        return {"all_lr": self.all_lr, "share": self.share,
                "masks": self.masks and dict(zip(self.masks.names, self.masks.factors))}

    def load_state_dict(self, state: dict) -> None:
        self.all_lr, self.share, factors = state["all_lr"], state["share"], state["masks"]
        self.masks = factors and Masks(self.model, {name: factor != 0 for name, factor in factors.items()})
