"""Gradual magnitude pruning: what reweighted L1 is measured against, at equal epochs and equal sparsity.

Zhu and Gupta, "To prune, or not to prune", 2017: the smallest weights are zero, and their share grows to the target as
1 - (1 - t)^3, steeply at first. t is the share of the stage's learning rate that is spent: with the cosine schedule the
last zeros come while the weights can still answer. Weights are ranked over all layers, as for the mask that follows.
"""
from torch import nn

from compressed.errors import BadInput
from compressed.graph import weight_layers
from training.reweighted_l1 import Masks, target_masks


class GradualMagnitude:
    """Takes the place of a ReweightedL1 in training: `update` chooses the zeros, `shrink` makes them after every step.

    What is zero stays zero, being the smallest at the next update.
    """
    form = "magnitude"
    lam = 0.0  # nothing pulls

    def __init__(self, model: nn.Module, layers, target: float):
        if not 0 < target < 1:
            raise BadInput(f"impossible target sparsity {target}")
        self.model, self.layers, self.target = model, list(layers), target
        self.all_lr, self.masks, self.share = None, None, 0.0

    def update(self, lr_to_come: float) -> None:
        if self.all_lr is None:
            self.all_lr = lr_to_come
        to_go = lr_to_come / self.all_lr if self.all_lr else 0.0
        self.share = self.target * (1 - to_go**3)
        wanted = target_masks(self.model, self.layers, self.share) if self.share > 0 else None
        self.masks = wanted and Masks(self.model, wanted)

    def shrink(self, lr: float) -> None:
        if self.masks is not None:
            self.masks.apply()

    def record(self) -> dict:
        """What an epoch's line says: the shares of zeros in the pruned layers, measured, and the schedule's."""
        modules = dict(weight_layers(self.model))
        weights = [modules[name].weight for name in self.layers]
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        return {"lambda": self.lam, "zeros_share": zeros / sum(weight.numel() for weight in weights),
                "zeros_path": self.share}

    def options(self) -> dict:
        return {"form": self.form, "target": self.target, "layers": self.layers}

    def state_dict(self) -> dict:
        return {"all_lr": self.all_lr, "share": self.share,
                "masks": self.masks and dict(zip(self.masks.names, self.masks.factors))}

    def load_state_dict(self, state: dict) -> None:
        self.all_lr, self.share, factors = state["all_lr"], state["share"], state["masks"]
        self.masks = factors and Masks(self.model, {name: factor != 0 for name, factor in factors.items()})
