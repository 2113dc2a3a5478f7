"""Penalties, which drive weights to zero during training: the base class and the built-in ones.

    minimise  f(w) + lambda * sum_g alpha_g |w_g|,    alpha_g <- 1 / (|w_g| + eps) every T epochs

is reweighted L1 (Candes, Wakin and Boyd, "Enhancing Sparsity by Reweighted L1 Minimization", 2008). |w_g| is the
magnitude of a weight or the 2-norm of a group, see masks.GROUPS. METHOD.md explains the formulas. Your own penalty is a
subclass of Penalty: `--penalty FILE.py:NAME`.
"""
import inspect
import math

import torch
from torch import Tensor, nn

from compressed import counting, networks
from compressed.errors import BadInput, refused
from compressed.graph import scale_free_weights
from training.feedback import FIRST, Feedback
from training.masks import GROUPS, group_norms, plain_weights, quantile, target_masks


class Penalty:
    """Base class of all penalties; by itself it does nothing.

    A subclass usually defines `shrink` or `loss`, and may define `reweight`, `sizes`, `first_lambda` and `kept`. A rule
    that is no penalty overrides `update` and `after_step` instead, as GradualMagnitude does, and has to reach a target
    without the feedback.
    Everything but `loss` is called without gradients; in `after_step` the weights have their own, as `weight.grad`.

    weights: list of the weight tensors to make zero. kind: the groups that become zero together (masks.GROUPS).
    lam, target: strength of the penalty, or the wanted share of zeros in `weights`; one of them is given. With a target
    lambda is adjusted by feedback (feedback.py), which needs `shrink`, and convolutions that a normalisation follows
    keep their norms: the loss does not depend on those and would not stop the penalty from making them ever smaller.
    """
    form = "none"  # name in logs and states
    updates: int | None = None  # default of --updates; None: 5 with a lambda, 20 with a target
    saved: tuple[str, ...] = ()  # names of attributes that belong to a state: tensors, numbers, text, lists, dicts

    def __init__(self, model: nn.Module, layers, kind="irregular", lam=None, target=None):
        if kind not in GROUPS:
            raise BadInput(f"unknown sparsity type {kind!r}; known: {', '.join(GROUPS)}")
        if (lam is None) == (target is None):
            raise BadInput("the penalty needs a lambda or a target sparsity, and not both")
        shrinks, *rules = (getattr(type(self), name) is not getattr(Penalty, name)
                           for name in ("shrink", "after_step", "update", "reweight"))
        if not (shrinks or self.in_loss or any(rules)):
            raise BadInput(f"{type(self).__name__} does nothing: it defines neither `shrink` nor `loss`")
        if target is not None and self.in_loss and not shrinks:
            raise BadInput("a penalty in the loss makes no exact zeros, so it cannot be led to a target sparsity: give "
                           "it a --lambda, or take --penalty proximal")
        self._layers, self.weights = list(layers), plain_weights(model, layers)  # a subclass may have layers of its own
        if frozen := [name for name, weight in zip(layers, self.weights) if not weight.requires_grad]:
            raise BadInput(f"{frozen[0]} is not trained (requires_grad is False): select layers by --config-file")
        scale_free = set(scale_free_weights(model))
        self.convolutions = [weight for weight in self.weights if weight in scale_free]
        led = target is not None and shrinks  # without `shrink` there is no lambda, and a target is reached otherwise
        self.kind, self.given, self.target = kind, lam if led or target is None else 0.0, target
        self.feedback = Feedback(target, kind == "irregular") if led else None
        self.norms: Tensor | None = None  # of `convolutions` when the feedback began

    # -- what a subclass defines

    def shrink(self, strength: float | Tensor) -> None:
        """Shrink the weights in place after an optimizer step, some to zero.

        strength: the step's learning rate times lambda, a float or, with a target, a 0-dim tensor.
        """

    def loss(self) -> Tensor:
        """Return lambda times the penalty, a scalar with a gradient, to be added to the training loss."""

    def reweight(self) -> None:
        """Prepare for the next steps; called before the first step and `--updates` times in all, at equal intervals.

        Tensors that it keeps between calls must be named in `saved`.
        """

    def sizes(self) -> list[Tensor]:
        """Return, for each weight tensor, numbers in whose order its groups become zero; by default the norms.

        They are shaped to broadcast against the weights.
        """
        return [group_norms(weight, self.kind) for weight in self.weights]

    def first_lambda(self, q: float, rate: float) -> float:
        """Return a lambda at which weights of the size q become zero in steps whose learning rates sum to `rate`.

        It holds if the loss has no gradient on them, and must not be 0: feedback multiplies it. The default is that of
        plain L1, whose every step takes `strength` from a weight's magnitude.
        """
        return max(q, 1e-3) / rate

    def kept(self) -> dict[Tensor, Tensor]:
        """Return {weight: mask, 0 where it stays zero for good, else 1}, for the optimizer; changed in place later.

        By default it is empty: the zeros of a soft threshold may become non-zero again.
        """
        return {}

    # -- what the loop uses

    @property
    def lam(self) -> float | Tensor:
        """Lambda: the given number or, with a target, the current one, a 0-dim tensor on the weights' device."""
        return self.given if self.feedback is None else self.feedback.lam

    @property
    def in_loss(self) -> bool:
        """True if `loss()` is to be added to the training loss."""
        return type(self).loss is not Penalty.loss

    @torch.no_grad()
    def update(self, lr_to_come: float) -> None:
        """Reweight. lr_to_come: sum of the learning rates of the steps that are left; the feedback begins with it."""
        self.reweight()
        feedback = self.feedback
        if feedback is None or lr_to_come <= 0:
            return
        if feedback.begun:
            feedback.total = feedback.spent + lr_to_come
            return
        wanted = feedback.begin(self.zeros_share().item(), lr_to_come)
        sizes = torch.cat([size.expand_as(weight).flatten() for size, weight in zip(self.sizes(), self.weights)])
        first = self.first_lambda(quantile(sizes, wanted).item(), FIRST * lr_to_come)
        if not 0 <= first < math.inf:
            raise ValueError(f"its first lambda is {first}, expected a number from 0 on")
        feedback.set(first, sizes.device)
        self.norms = self.convolution_norms()

    @torch.no_grad()
    def after_step(self, lr: float) -> None:
        """Shrink the weights, and with a target adjust lambda whenever a control step is due. lr: the learning rate."""
        if lr == 0 or self.given == 0:
            return
        self.shrink(lr * self.lam)
        if self.feedback is not None and self.feedback.begun and self.feedback.due(lr):
            self.hold_norms()
            self.feedback.control(self.zeros_share())

    def zeros_share(self) -> Tensor:
        """Return the share of zeros in the penalised weights, a 0-dim float64 tensor on their device."""
        kept = sum(weight.count_nonzero() for weight in self.weights)
        return 1 - kept.double() / sum(weight.numel() for weight in self.weights)

    def convolution_norms(self) -> Tensor:
        """Return the 2-norms of the convolutions' weights, [number of convolutions]."""
        return torch.stack(torch._foreach_norm(self.convolutions)) if self.convolutions else torch.zeros(0)

    def hold_norms(self) -> None:
        """Scale the convolutions' weights back to their first norms, by a factor of 2 at most. Zeros stay zero."""
        factors = (self.norms / self.convolution_norms().clamp_min(1e-20)).clamp(max=2)
        for weight, factor in zip(self.convolutions, factors.where(self.norms > 0, 1)):
            weight.mul_(factor)

    @torch.no_grad()
    def record(self) -> dict:
        """Return the penalty's fields of an epoch's log line; zeros_path is the wanted share of zeros."""
        fields = {"lambda": float(self.lam), "zeros_share": self.zeros_share().item()}
        if self.feedback is not None:
            fields["zeros_path"] = self.feedback.path
        if self.kind != "irregular":
            norms = torch.cat([group_norms(weight, self.kind).flatten() for weight in self.weights])
            fields |= {"zero_groups": int((norms == 0).sum()), "groups": len(norms), "kind": self.kind}
        return fields

    def options(self) -> dict:
        """Return what decides the penalty's effect as plain values: a state is resumed only if they are equal."""
        return {"kind": self.kind, "form": self.form, "lambda": self.given, "target": self.target,
                "layers": self._layers}

    def state_dict(self) -> dict:
        led = {} if self.feedback is None else {"norms": self.norms, "feedback": dict(vars(self.feedback))}
        return {name: getattr(self, name) for name in self.saved} | led

    def load_state_dict(self, state: dict) -> None:
        for name in self.saved:
            setattr(self, name, state[name])
        if self.feedback is not None:
            self.norms = state["norms"]
            vars(self.feedback).update(state["feedback"])


class Reweighted(Penalty):
    """Hold what the two forms of reweighted L1 share: alpha, one tensor for each weight.

    cost_power: alpha is multiplied by the layer's price (counting.prices, relative to their mean over all penalised
    weights) to this power. With 0 all weights are alike; with 1 the penalty approximates the challenge's score.
    """
    saved = ("alphas",)

    def __init__(self, model: nn.Module, layers, kind="irregular", lam=None, target=None, eps=1e-3, cost_power=0.0):
        super().__init__(model, layers, kind, lam, target)
        self.eps, self.cost_power = eps, cost_power
        self.alphas: list[Tensor] = []
        prices = counting.prices(model) if cost_power else dict.fromkeys(layers, 1.0)
        if idle := [name for name in layers if name not in prices]:
            raise BadInput(f"{idle[0]} never runs, so it has no price for --cost-power: select layers by --config-file")
        total = sum(prices[name] * weight.numel() for name, weight in zip(layers, self.weights))
        mean = total / sum(weight.numel() for weight in self.weights)
        self.factors = [(prices[name] / mean) ** cost_power for name in layers]

    def reweight(self) -> None:
        """Set alpha <- price / (|w| + eps); the submission's 1 / (w + eps) is singular at w = -eps."""
        self.alphas = [factor / (group_norms(weight, self.kind) + self.eps)
                       for factor, weight in zip(self.factors, self.weights)]

    def sizes(self) -> list[Tensor]:
        """Return the norms divided by the root of their layer's factor.

        Without a loss gradient a weight becomes 0 if |w| (|w| + eps) < factor * R * lambda, where R is the sum of the
        learning rates (METHOD.md). For |w| >> eps weights become 0 in the order of |w| / sqrt(factor).
        """
        return [norm / factor ** 0.5 for norm, factor in zip(super().sizes(), self.factors)]

    def options(self) -> dict:
        return super().options() | {"eps": self.eps, "cost_power": self.cost_power}


class ReweightedL1(Reweighted):
    """Soft-threshold the weights by lr * lambda * alpha after every optimizer step ("decoupled" or proximal form).

    Zeros are exact, and the strength does not depend on how the optimizer scales gradients.
    """
    form = "proximal"

    def shrink(self, strength: float | Tensor) -> None:
        """Make the proximal step in place: w_g <- w_g max(1 - strength alpha_g / |w_g|, 0)."""
        if self.kind != "irregular":
            for alpha, weight in zip(self.alphas, self.weights):
                norm = group_norms(weight, self.kind)
                weight.mul_((1 - strength * alpha / norm.clamp_min(1e-30)).clamp_min_(0))
            return
        if isinstance(strength, Tensor):
            strength = strength.to(self.weights[0].dtype)
        # all layers at once are few launches on a GPU; one after the other they stay in a CPU's cache
        count = len(self.weights) if self.weights[0].is_cuda else 1
        for k in range(0, len(self.weights), count):
            weights, thresholds = self.weights[k:k + count], torch._foreach_mul(self.alphas[k:k + count], strength)
            clamped = torch._foreach_maximum(weights, torch._foreach_neg(thresholds))
            torch._foreach_minimum_(clamped, thresholds)
            torch._foreach_sub_(weights, clamped)  # w - clamp(w, -t, t)

    def first_lambda(self, q: float, rate: float) -> float:
        q = max(q, min(self.eps, 1e-3))
        return q * (q + self.eps) / rate


class LossReweightedL1(Reweighted):
    """Add the penalty to the training loss, the submission's form.

    Weights become small but never zero; a threshold turns the small ones into zeros afterwards.
    """
    form = "loss"

    def loss(self) -> Tensor:
        return self.lam * sum((alpha * group_norms(weight, self.kind)).sum()
                              for alpha, weight in zip(self.alphas, self.weights))


class GradualMagnitude(Penalty):
    """Prune single weights gradually by magnitude: the baseline for penalties, at equal epochs and equal sparsity.

    Zhu and Gupta, "To prune, or not to prune", 2017: the smallest weights are set to zero, and their share grows from
    that at the start to the target as 1 - (1 - t)^3. Here t is not time but the sum of the learning rates so far, as a
    share of the stage's sum: under a cosine schedule the last zeros are made while the other weights can still adapt.
    Weights are ranked over all layers, as for the mask of the next stage. A zero stays zero: it is among the smallest
    at the next update.
    """
    form, updates, saved = "magnitude", 100, ("spent", "start", "share", "masks")

    def __init__(self, model: nn.Module, layers, target: float):
        super().__init__(model, layers, target=target)
        self.model = model
        self.spent = 0.0  # sum of the learning rates of the steps made
        self.start: float | None = None  # share of zeros at the first update
        self.share = 0.0  # wanted share of zeros
        self.masks = {name: torch.ones_like(w) for name, w in zip(self._layers, self.weights)}  # 0 where it is pruned

    def kept(self) -> dict[Tensor, Tensor]:
        return dict(zip(self.weights, self.masks.values()))

    @torch.no_grad()
    def update(self, lr_to_come: float) -> None:
        """Choose the zeros by the schedule; every step restores them. If the stage was made longer, the share waits."""
        if self.start is None:
            self.start = min(float(self.zeros_share()), self.target)
        total = self.spent + lr_to_come
        to_go = lr_to_come / total if total else 0.0
        self.share = max(self.share, self.target - (self.target - self.start) * to_go**3)
        if self.share > 0:
            for name, mask in target_masks(self.model, self._layers, self.share).items():
                self.masks[name].copy_(mask)
            self.after_step(0)

    @torch.no_grad()
    def after_step(self, lr: float) -> None:
        """Set the chosen weights to zero."""
        self.spent += lr
        torch._foreach_mul_(self.weights, list(self.masks.values()))

    def load_state_dict(self, state: dict) -> None:
        self.spent, self.start, self.share = state["spent"], state["start"], state["share"]
        for name, mask in state["masks"].items():
            self.masks[name].copy_(mask)  # the optimizer has these tensors

    def record(self) -> dict:
        return super().record() | {"zeros_path": self.share}

    def options(self) -> dict:
        return {"form": self.form, "target": self.target, "layers": self._layers}


# ---- By name ---------------------------------------------------------------------------------------------------------

BUILT_IN = {penalty.form: penalty for penalty in (LossReweightedL1, ReweightedL1, GradualMagnitude)}


def find(spec: str) -> tuple[type[Penalty], dict]:
    """Return (class, its own arguments) of a penalty: a name of BUILT_IN, or FILE.py:NAME?ARGUMENT=VALUE.

    Raises BadInput if there is none.
    """
    if spec in BUILT_IN:
        return BUILT_IN[spec], {}
    if ":" not in spec:
        raise BadInput(f"--penalty {spec}: known are {', '.join(BUILT_IN)}, and FILE.py:NAME for your own")
    found, arguments = networks.find(spec, "--penalty")
    if not (isinstance(found, type) and issubclass(found, Penalty)):
        raise BadInput(f"--penalty {spec}: expected a subclass of Penalty (training/penalties.py)")
    return found, arguments


def takes(spec: str, name: str) -> bool:
    """Return True if a penalty's constructor has an argument of this name, or passes it on to one that has."""
    for kind in find(spec)[0].__mro__:
        if "__init__" in vars(kind):
            parameters = inspect.signature(kind.__init__).parameters
            if name in parameters:
                return True
            if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
                break
    return False


def make(spec: str, model: nn.Module, layers, **options) -> Penalty:
    """Return the penalty of a specification (see `find`) on some layers of a model.

    options: arguments of the constructor. Raises BadInput for arguments that the class refuses.
    """
    kind, arguments = find(spec)
    with refused(f"--penalty {spec} cannot be made"):  # whatever its constructor raises
        penalty = kind(model, layers, **options, **arguments)
    if spec not in BUILT_IN:
        penalty.form = spec  # with its arguments, which decide the result too
    return penalty
