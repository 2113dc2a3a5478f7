"""Apply the reweighted L1 penalty to a model, and make the masks that freeze its zeros. METHOD.md derives the formulas.

    minimise  f(w) + lambda * sum_g alpha_g |w_g|,    alpha_g <- 1 / (|w_g| + eps) every T epochs

Candes, Wakin and Boyd, "Enhancing Sparsity by Reweighted L1 Minimization", 2008. |w_g| is the magnitude of a weight
(irregular) or the 2-norm of a group: a column of the layer's [out, in * kh * kw] matrix, a kernel, or a filter.
"""
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from compressed.errors import BadInput
from compressed.files import load_toml
from compressed.graph import weight_layers
from training.feedback import Feedback, first_lambda, quantile

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


class ReweightedL1:
    """Apply the penalty to the weights of some layers of a model, in one of two forms.

    form "loss":      `loss()` is added to the training loss, and the optimizer takes its gradient. Weights become small
                      but never zero; a threshold turns the small ones into zeros afterwards.
    form "proximal":  `shrink(lr)`, called after every optimizer step, soft-thresholds the weights by lr * lambda *
                      alpha. Zeros are exact, and the strength does not depend on how the optimizer scales gradients.

    Give either `lam` or, for the proximal form, `target`, the wanted share of zeros in these weights. With a target,
    lambda is adjusted by feedback (feedback.py), and the convolutions keep their norms: a BatchNorm follows each of
    them, so the loss does not depend on the norm and would not stop the penalty from making it ever smaller.
    """

    def __init__(self, model: nn.Module, layers, kind="irregular", form="proximal", lam=None, target=None, eps=1e-3):
        if kind not in GROUPS:
            raise BadInput(f"unknown sparsity type {kind!r}; known: {', '.join(GROUPS)}")
        if form not in ("loss", "proximal"):
            raise BadInput(f"unknown form of the penalty {form!r}; known: loss, proximal")
        if (lam is None) == (target is None):
            raise BadInput("the penalty needs a lambda or a target sparsity, and not both")
        if form == "loss" and target is not None:
            raise BadInput("the penalty in the loss makes no exact zeros, so it cannot be led to a target sparsity: "
                           "give it a --lambda, or take --penalty proximal")
        if eps <= 0 or (lam is not None and lam < 0) or (target is not None and not 0 < target < 1):
            raise BadInput(f"impossible penalty: lambda {lam}, target sparsity {target}, eps {eps}")
        modules = dict(weight_layers(model))
        self.weights = [modules[name].weight for name in layers]
        self.kind, self.form, self.target, self.eps = kind, form, target, eps
        self.given, self.feedback = lam, None if target is None else Feedback(target, kind == "irregular")
        self.alphas: list[Tensor] = []
        self.norms: Tensor | None = None  # norms of the convolutions' weights at the start of a stage with a target

    @property
    def lam(self) -> float | Tensor:
        """Return lambda: the given number or, with a target, the current one, a 0-dim tensor on the weights' device."""
        return self.given if self.feedback is None else self.feedback.lam

    @torch.no_grad()
    def update(self, lr_to_come: float) -> None:
        """Set alpha <- 1 / (|w| + eps). lr_to_come: sum of the learning rates of the steps that are left.

        It is |w| and not w, because the submission's 1 / (w + eps) is singular at w = -eps.
        """
        norms = [group_norms(weight, self.kind) for weight in self.weights]
        self.alphas = [1 / (norm + self.eps) for norm in norms]
        if self.feedback is not None and lr_to_come > 0:
            if self.feedback.begun:
                self.feedback.total = self.feedback.spent + lr_to_come
                return
            wanted = self.feedback.begin(self.share().item(), lr_to_come)
            every = torch.cat([norm.expand_as(weight).flatten() for norm, weight in zip(norms, self.weights)])
            self.feedback.set(first_lambda(quantile(every, wanted), self.eps, lr_to_come), every.device)
            self.norms = self.convolution_norms()

    def share(self) -> Tensor:
        """Return the share of zeros in the penalised weights, a 0-dim float64 tensor on their device."""
        kept = torch.stack([weight.bool().sum() for weight in self.weights]).sum()
        return 1 - kept.double() / sum(weight.numel() for weight in self.weights)

    def convolutions(self) -> list[Tensor]:
        """Return the penalised weights of convolutions."""
        return [weight for weight in self.weights if weight.dim() == 4]

    def convolution_norms(self) -> Tensor:
        """Return the 2-norms of the convolutions' weights, [number of convolutions]."""
        return torch.stack(torch._foreach_norm(self.convolutions())) if self.convolutions() else torch.zeros(0)

    def hold_norms(self) -> None:
        """Scale the convolutions' weights back to their norms at the start, by a factor of 2 at most. Zeros stay zero.
        """
        factors = (self.norms / self.convolution_norms().clamp_min(1e-20)).clamp(max=2)
        factors = torch.where(self.norms > 0, factors, 1)
        for weight, factor in zip(self.convolutions(), factors.unbind()):
            weight.mul_(factor)

    def loss(self) -> Tensor:
        """Return lambda * sum alpha |w|, a scalar with a gradient."""
        return self.lam * sum((alpha * group_norms(weight, self.kind)).sum()
                              for alpha, weight in zip(self.alphas, self.weights))

    @torch.no_grad()
    def shrink(self, lr: float) -> None:
        """Make the proximal step in place: w_g <- w_g max(1 - lr lambda alpha_g / |w_g|, 0).

        With a target, also adjust lambda whenever a control step is due.
        """
        if lr == 0 or self.given == 0:
            return
        strength = lr * self.lam
        for alpha, weight in zip(self.alphas, self.weights):
            if self.kind == "irregular":
                # sign(w) max(|w| - t, 0) = w - clamp(w, -t, t), which needs only two passes over memory
                threshold = alpha * strength
                weight.sub_(torch.minimum(torch.maximum(weight, -threshold), threshold))
            else:
                norm = group_norms(weight, self.kind)
                weight.mul_((1 - strength * alpha / norm.clamp_min(1e-30)).clamp_min_(0))
        if self.feedback is not None and self.feedback.begun and self.feedback.due(lr):
            self.hold_norms()
            self.feedback.control(self.share())

    @torch.no_grad()
    def record(self) -> dict:
        """Return the penalty's fields of an epoch's log line.

        lambda; the share of zeros, measured (zeros_share) and wanted (zeros_path); the number of groups, and of groups
        of zeros.
        """
        said = {"lambda": float(self.lam), "zeros_share": self.share().item()}
        if self.feedback is not None:
            said["zeros_path"] = self.feedback.path
        if self.kind != "irregular":
            norms = [group_norms(weight, self.kind) for weight in self.weights]
            said |= {"zero_groups": sum(int((norm == 0).sum()) for norm in norms),
                     "groups": sum(norm.numel() for norm in norms), "kind": self.kind}
        return said

    def options(self) -> dict:
        """Return the arguments of the constructor as plain values."""
        return {"kind": self.kind, "form": self.form, "lambda": self.given, "target": self.target, "eps": self.eps,
                "weights": sum(weight.numel() for weight in self.weights)}

    def state_dict(self) -> dict:
        led = {} if self.feedback is None else {"norms": self.norms, "feedback": self.feedback.state_dict()}
        return {"alphas": self.alphas, **led}

    def load_state_dict(self, state: dict) -> None:
        self.alphas = [alpha.to(weight.device) for alpha, weight in zip(state["alphas"], self.weights)]
        if self.feedback is not None:
            self.norms = state["norms"]
            self.feedback.load_state_dict(state["feedback"])


# ---------------------------------------------------------------- masks: {layer name: bool tensor, True where kept}

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
