"""Choose which weights of a model are pruned, by magnitude or by the 2-norm of their groups, and keep them at zero.

Masks are {layer name: bool tensor, True where the weight is kept}. Groups of weights become zero together: single
weights (irregular), columns of the layer's [out, in * kh * kw] matrix, kernels, or filters.
"""
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from compressed.errors import BadInput
from compressed.files import find_toml, load_toml
from compressed.graph import weight_layers

# the dimensions of a [out, in, kh, kw] weight that one group spans
GROUPS = {"irregular": (), "column": (0,), "kernel": (2, 3), "filter": (1, 2, 3)}
PROFILES = Path(__file__).resolve().parent / "profile"


def group_norms(weight: Tensor, kind: str) -> Tensor:
    """Return the norms of a weight's groups, shaped to broadcast against it. A linear layer is a 1x1 convolution here.
    """
    if kind == "irregular":
        return weight.abs()
    four = weight if weight.dim() == 4 else weight[:, :, None, None]
    norms = torch.linalg.vector_norm(four, dim=GROUPS[kind], keepdim=True)
    return norms if weight.dim() == 4 else norms[:, :, 0, 0]


def quantile(values: Tensor, share: float) -> Tensor:
    """Return the value that this share of `values` [n] does not exceed, a 0-dim tensor."""
    return values.kthvalue(max(1, math.ceil(share * len(values)))).values


def weights_of(model: nn.Module, layers) -> dict[str, Tensor]:
    """Return {layer name: its weight, without gradient}."""
    modules = dict(weight_layers(model))
    return {name: modules[name].weight.detach() for name in layers}


def plain_weights(model: nn.Module, layers) -> list[Tensor]:
    """Return the weights of layers, to be changed in place. Raises BadInput if one is computed, or two are the same."""
    modules = dict(weight_layers(model))
    weights = [modules[name].weight for name in layers]
    owners = {}
    for name, weight in zip(layers, weights):
        if not isinstance(weight, nn.Parameter):
            raise BadInput(f"the weight of {name} is computed, as by weight_norm, and cannot be pruned")
        if (other := owners.setdefault(weight, name)) != name:
            raise BadInput(f"{other} and {name} share their weight, which cannot be pruned")
    return weights


# ---- Which layers, and how much of them ------------------------------------------------------------------------------

def prune_ratios(config_file, model: nn.Module) -> dict[str, float]:
    """Return {layer name: share of its weights to prune} from a TOML file, without the layers whose ratio is 0.

    config_file: a path, or the name of a file in training/profile/ (see files.find_toml). Raises BadInput for a
    missing or damaged file, a layer that the model lacks, a ratio outside [0, 1), and if no ratio is above 0.
    """
    path = find_toml(config_file, PROFILES, "prune-ratio file")
    ratios, layers = load_toml(path).get("prune_ratios"), dict(weight_layers(model))
    if not isinstance(ratios, dict):
        raise BadInput(f"{path}: has no table [prune_ratios]")
    for name, ratio in ratios.items():
        if name not in layers:
            raise BadInput(f"{path}: the network has no layer {name!r}")
        if not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
            raise BadInput(f"{path}: the ratio of {name} is {ratio!r}, expected a number from 0 to below 1")
    if not any(ratios.values()):
        raise BadInput(f"{path}: no layer has a ratio above 0")
    return {name: float(ratio) for name, ratio in ratios.items() if ratio > 0}


# ---- Masks -----------------------------------------------------------------------------------------------------------

def zero_masks(model: nn.Module) -> dict[str, Tensor]:
    """Return masks of all layers that prune the weights that are zero now."""
    return {name: layer.weight.detach() != 0 for name, layer in weight_layers(model)}


def threshold_masks(model: nn.Module, layers, threshold: float) -> dict[str, Tensor]:
    """Return masks that prune all weights smaller than the threshold, the submission's rule (it used 1e-4)."""
    return {name: weight.abs() >= threshold for name, weight in weights_of(model, layers).items()}


def ratio_masks(model: nn.Module, ratios: dict[str, float], kind: str) -> dict[str, Tensor]:
    """Return masks that prune, in every layer, the given share of its groups: those with the smallest norms."""
    masks = {}
    for name, weight in weights_of(model, ratios).items():
        norms = group_norms(weight, kind)
        ranks = norms.flatten().argsort().argsort()  # by position: ties do not change the count
        masks[name] = (ranks >= int(ratios[name] * len(ranks))).view(norms.shape).expand(weight.shape).clone()
    return masks


def target_masks(model: nn.Module, layers, target: float, kind: str = "irregular") -> dict[str, Tensor]:
    """Return masks by one threshold for all layers, chosen so that at least the target share of weights is pruned.

    Groups are ranked by the root mean square of their weights, so that large groups do not win by size.
    """
    scores = {}
    for name, weight in weights_of(model, layers).items():
        norms = group_norms(weight, kind)
        scores[name] = (norms / (weight.numel() / norms.numel()) ** 0.5).expand_as(weight)
    threshold = quantile(torch.cat([score.flatten() for score in scores.values()]), target)
    return {name: score > threshold for name, score in scores.items()}


def already_zero(model: nn.Module, masks: dict[str, Tensor]) -> tuple[int, int, int]:
    """Return three counts of the masked layers' weights: (all, pruned by the masks, pruned and zero already)."""
    pruned = torch.cat([~mask.flatten() for mask in masks.values()])
    zero = torch.cat([weight.flatten() == 0 for weight in weights_of(model, masks).values()])
    return len(pruned), int(pruned.sum()), int((pruned & zero).sum())


class Masks:
    """Keep the pruned weights of a model at zero: `apply()` sets them to zero after an optimizer step moved them.

    Mask bugs are silent, so the masks are checked when they are made, and the training loop calls `check()`, which
    looks at the weights themselves, before it writes weights.
    """

    def __init__(self, model: nn.Module, masks: dict[str, Tensor]):
        layers = dict(weight_layers(model))
        for name, mask in masks.items():
            if name not in layers or mask.shape != layers[name].weight.shape or mask.dtype != torch.bool:
                raise BadInput(f"the mask of {name}, {list(mask.shape)} {mask.dtype}, fits no weight of the network")
        self.names, self.weights = list(masks), plain_weights(model, masks)
        # in the weight's type and memory format, so that applying it is one multiplication a tensor
        self.factors = [torch.empty_like(weight, requires_grad=False).copy_(mask)
                        for weight, mask in zip(self.weights, masks.values())]
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Set all pruned weights of the model to zero, in place."""
        torch._foreach_mul_(self.weights, self.factors)

    def state_dict(self) -> dict[str, Tensor]:
        """Return {layer: mask, bool, False where a weight is pruned}."""
        return {name: factor.bool() for name, factor in zip(self.names, self.factors)}

    def check(self, model: nn.Module) -> None:
        """Raise AssertionError if a pruned weight of `model` (the masked model or its average) is not exactly zero."""
        for factor, (name, weight) in zip(self.factors, weights_of(model, self.names).items()):
            if (weight * (1 - factor)).count_nonzero():
                raise AssertionError(f"pruned weights of {name} are no longer zero")
