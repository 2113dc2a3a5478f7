"""Choose which weights of a model are pruned, by magnitude or by the 2-norm of their groups, and keep them at zero.

Masks are {layer name: bool tensor, True where the weight is kept}. Groups of weights become zero together: single
weights (irregular), columns of the layer's [out, in * kh * kw] matrix, kernels, or filters.
"""
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from compressed.errors import BadInput
from compressed.files import load_toml
from compressed.graph import weight_layers

# the dimensions of a [out, in, kh, kw] weight that one group spans
GROUPS = {"irregular": (), "column": (0,), "kernel": (2, 3), "filter": (1, 2, 3)}
PROFILES = Path(__file__).resolve().parent / "profile"


def group_norms(weight: Tensor, kind: str) -> Tensor:
    """Return the norms of a weight's groups, shaped to broadcast against it. A linear layer is a 1x1 convolution here.
    """
    four = weight if weight.dim() == 4 else weight[:, :, None, None]
    norms = torch.linalg.vector_norm(four, dim=GROUPS[kind], keepdim=True) if GROUPS[kind] else four.abs()
    return norms if weight.dim() == 4 else norms[:, :, 0, 0]


def prune_ratios(config_file, model: nn.Module) -> dict[str, float]:
    """Return {layer name: share of its weights to prune} from a TOML file, without the layers whose ratio is 0.

    `config_file` is a path, or the name of a file in training/profile/, with or without its suffix. Raises BadInput
    for a missing or damaged file, a layer that the model lacks, and a ratio outside [0, 1).
    """
    candidates = [Path(config_file), PROFILES / config_file, PROFILES / f"{config_file}.toml"]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.toml")))
        raise BadInput(f"no prune-ratio file {config_file}; in {PROFILES} there are: {known}")
    try:
        ratios = dict(load_toml(path)["prune_ratios"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path}: not a TOML file with a table [prune_ratios] ({error})") from error
    layers = dict(weight_layers(model))
    for name, ratio in ratios.items():
        if name not in layers:
            raise BadInput(f"{path}: the network has no layer {name!r}")
        if not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
            raise BadInput(f"{path}: the ratio of {name} is {ratio!r}, expected a number from 0 to below 1")
    return {name: float(ratio) for name, ratio in ratios.items() if ratio > 0}


def default_layers(model: nn.Module) -> list[str]:
    """Return the names of all layers but the stem. Its 1,080 weights read the image itself and cost little."""
    return [name for name, _ in weight_layers(model)][1:]


@torch.no_grad()
def threshold_masks(model: nn.Module, layers, threshold: float) -> dict[str, Tensor]:
    """Return masks that prune all weights smaller than the threshold, the submission's rule (it used 1e-4)."""
    modules = dict(weight_layers(model))
    return {name: modules[name].weight.abs() >= threshold for name in layers}


@torch.no_grad()
def ratio_masks(model: nn.Module, ratios: dict[str, float], kind: str) -> dict[str, Tensor]:
    """Return masks that prune, in every layer, the given share of its groups: those with the smallest norms."""
    modules = dict(weight_layers(model))
    masks = {}
    for name, ratio in ratios.items():
        weight = modules[name].weight
        norms = group_norms(weight, kind)
        pruned = int(ratio * norms.numel())
        keep = torch.ones(norms.numel(), dtype=torch.bool, device=weight.device)
        keep[norms.flatten().argsort()[:pruned]] = False  # by position: ties do not change the count
        masks[name] = keep.view(norms.shape).expand(weight.shape).clone()
    return masks


@torch.no_grad()
def target_masks(model: nn.Module, layers, target: float, kind: str = "irregular") -> dict[str, Tensor]:
    """Return masks by one threshold for all layers, chosen so that at least the target share of weights is pruned.

    Groups are ranked by the root mean square of their weights, so that large groups do not win by size.
    """
    modules = dict(weight_layers(model))
    weights = [modules[name].weight for name in layers]
    scores = []
    for weight in weights:
        norms = group_norms(weight, kind)
        scores.append((norms / (weight.numel() / norms.numel()) ** 0.5).expand_as(weight))
    every = torch.cat([score.flatten() for score in scores])
    threshold = every.kthvalue(max(1, math.ceil(target * every.numel()))).values
    return {name: score > threshold for name, score in zip(layers, scores)}


@torch.no_grad()
def already_zero(model: nn.Module, masks: dict[str, Tensor]) -> tuple[int, int, int]:
    """Return three counts of the masked layers' weights: (all, pruned by the masks, pruned and zero already)."""
    modules, pruned = dict(weight_layers(model)), {name: ~mask for name, mask in masks.items()}
    already = sum(int((gone & (modules[name].weight == 0)).sum()) for name, gone in pruned.items())
    return sum(gone.numel() for gone in pruned.values()), sum(int(gone.sum()) for gone in pruned.values()), already


class Masks:
    """Keep the pruned weights of a model at zero: `apply()` sets them to zero after an optimizer step moved them.

    Mask bugs are silent. So the masks are checked when they are made (known layers, right shapes, binary), and the
    training loop calls `check()`, which looks at the weights themselves, before it writes a file.
    """

    def __init__(self, model: nn.Module, masks: dict[str, Tensor]):
        modules = dict(weight_layers(model))
        for name, mask in masks.items():
            if name not in modules:
                raise BadInput(f"mask for a layer that the network lacks: {name}")
            if mask.shape != modules[name].weight.shape or mask.dtype != torch.bool:
                raise BadInput(f"mask of {name}: {list(mask.shape)} {mask.dtype}, expected "
                               f"{list(modules[name].weight.shape)} torch.bool")
        self.names = list(masks)
        # in the weight's type and memory format, so that applying it is one multiplication a tensor
        self.factors = [torch.empty_like(modules[name].weight, requires_grad=False).copy_(masks[name])
                        for name in self.names]
        self.weights = [modules[name].weight for name in self.names]
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Set all pruned weights of the model to zero, in place."""
        torch._foreach_mul_(self.weights, self.factors)

    @torch.no_grad()
    def check(self, model: nn.Module) -> None:
        """Raise AssertionError if a pruned weight of `model` (the masked model or its average) is not exactly zero."""
        modules = dict(weight_layers(model))
        for name, factor in zip(self.names, self.factors):
            if (modules[name].weight * (1 - factor)).count_nonzero():
                raise AssertionError(f"pruned weights of {name} are no longer zero")


def zero_masks(model: nn.Module, layers) -> dict[str, Tensor]:
    """Return masks that prune the weights of these layers that are zero now."""
    modules = dict(weight_layers(model))
    return {name: modules[name].weight.detach() != 0 for name in layers}
