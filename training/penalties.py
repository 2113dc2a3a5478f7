"""Penalties, which make weights zero during training: what the training loop asks of one, and those that are built in.

    minimise  f(w) + lambda * sum_g alpha_g |w_g|,    alpha_g <- 1 / (|w_g| + eps) every T epochs

is reweighted L1 (Candes, Wakin and Boyd, "Enhancing Sparsity by Reweighted L1 Minimization", 2008). |w_g| is the
magnitude of a weight or the 2-norm of a group, see masks.GROUPS. METHOD.md derives the formulas. Your own penalty is a
subclass of Penalty, by `--penalty FILE.py:NAME`.
"""
import inspect

import torch
from torch import Tensor, nn

from compressed import counting, networks
from compressed.errors import BadInput
from compressed.graph import weight_layers
from training.feedback import FIRST, Feedback, quantile
from training.masks import GROUPS, Masks, group_norms, target_masks


class Penalty:
    """Base class of all penalties; by itself it does nothing.

    A subclass defines one or both of
      shrink(strength)      change self.weights in place after an optimizer step, zeros included. strength: the step's
                            learning rate times lambda, a float or, with a target, a 0-dim tensor
      loss()                return lambda times the penalty, a scalar with a gradient, to be added to the training loss
    and may define
      reweight()            prepare for the next steps; called before the first step and `--updates` times in all, at
                            equal distances. Tensors that it keeps between calls must be named in `saved`
      sizes(), first_lambda(q, rate)
                            return in which order groups become zero, and the lambda to begin with, if there is a target
    The loop calls update, loss, after_step and, once an epoch, record; for its states, options, state_dict and
    load_state_dict. It calls everything but loss without gradients.

    weights: list of the weight tensors to make zero. kind: the groups that become zero together (masks.GROUPS).
    lam, target: strength of the penalty, or the wanted share of zeros in `weights`; one of them is given. With a target
    lambda is adjusted by feedback (feedback.py), which needs `shrink`, and the convolutions keep their norms: a
    BatchNorm follows each of them, so the loss does not depend on the norm and would not stop the penalty from making
    it ever smaller.
    """
    form = "none"  # name in logs and states
    updates: int | None = None  # default of --updates; None: 5 with a lambda, 20 with a target
    saved: tuple[str, ...] = ()  # names of attributes that belong to a state

    def __init__(self, model: nn.Module, layers, kind="irregular", lam=None, target=None):
        if kind not in GROUPS:
            raise BadInput(f"unknown sparsity type {kind!r}; known: {', '.join(GROUPS)}")
        if (lam is None) == (target is None):
            raise BadInput("the penalty needs a lambda or a target sparsity, and not both")
        if (lam is not None and lam < 0) or (target is not None and not 0 < target < 1):
            raise BadInput(f"impossible penalty: lambda {lam}, target sparsity {target}")
        if target is not None and type(self).shrink is Penalty.shrink:
            raise BadInput("a penalty in the loss makes no exact zeros, so it cannot be led to a target sparsity: give "
                           "it a --lambda, or take --penalty proximal")
        modules = dict(weight_layers(model))
        self.weights = [modules[name].weight for name in layers]
        self.kind, self.given, self.target = kind, lam, target
        self.feedback = None if target is None else Feedback(target, kind == "irregular")
        self.norms: Tensor | None = None  # norms of the convolutions' weights when the feedback began

    # -- what a subclass defines

    def reweight(self) -> None:
        """Prepare for the next steps; by default there is nothing to prepare."""

    def shrink(self, strength: float | Tensor) -> None:
        """Change the weights after a step; by default they stay."""

    def loss(self) -> Tensor:
        """Return the term of the training loss; by default 0. It is called only if a subclass defines it."""
        return torch.zeros(())

    def sizes(self) -> list[Tensor]:
        """Return numbers that say, for each weight tensor, in which order its groups become zero; by default the norms.

        They are shaped to broadcast against the weights.
        """
        return [group_norms(weight, self.kind) for weight in self.weights]

    def first_lambda(self, q: float, rate: float) -> float:
        """Return a lambda at which weights of the size q become zero in steps whose learning rates sum to `rate`.

        It holds if the loss has no gradient on them, and must not be 0: feedback multiplies it. The default is that of
        plain L1, whose every step takes `strength` from a weight's magnitude.
        """
        return max(q, 1e-3) / rate

    # -- what the loop uses

    @property
    def lam(self) -> float | Tensor:
        """Return lambda: the given number or, with a target, the current one, a 0-dim tensor on the weights' device."""
        return self.given if self.feedback is None else self.feedback.lam

    @property
    def in_loss(self) -> bool:
        """Return True if `loss()` is to be added to the training loss."""
        return type(self).loss is not Penalty.loss

    @torch.no_grad()
    def update(self, lr_to_come: float) -> None:
        """Reweight. lr_to_come: sum of the learning rates of the steps that are left; the feedback begins with it."""
        self.reweight()
        if self.feedback is None or lr_to_come <= 0:
            return
        if self.feedback.begun:
            self.feedback.total = self.feedback.spent + lr_to_come
            return
        wanted = self.feedback.begin(self.share().item(), lr_to_come)
        every = torch.cat([size.expand_as(weight).flatten() for size, weight in zip(self.sizes(), self.weights)])
        self.feedback.set(self.first_lambda(quantile(every, wanted), FIRST * lr_to_come), every.device)
        self.norms = self.convolution_norms()

    @torch.no_grad()
    def after_step(self, lr: float) -> None:
        """Shrink the weights, and with a target adjust lambda whenever a control step is due. lr: the learning rate."""
        if lr == 0 or self.given == 0:
            return
        self.shrink(lr * self.lam)
        if self.feedback is not None and self.feedback.begun and self.feedback.due(lr):
            self.hold_norms()
            self.feedback.control(self.share())

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

    @torch.no_grad()
    def record(self) -> dict:
        """Return the penalty's fields of an epoch's log line.

        lambda; the share of zeros, measured (zeros_share) and wanted (zeros_path); the number of groups, and of groups
        of zeros.
        """
        fields = {"lambda": float(self.lam), "zeros_share": self.share().item()}
        if self.feedback is not None:
            fields["zeros_path"] = self.feedback.path
        if self.kind != "irregular":
            norms = [group_norms(weight, self.kind) for weight in self.weights]
            fields |= {"zero_groups": sum(int((norm == 0).sum()) for norm in norms),
                       "groups": sum(norm.numel() for norm in norms), "kind": self.kind}
        return fields

    def options(self) -> dict:
        """Return what decides the penalty's effect as plain values: a state is resumed only if they are equal."""
        return {"kind": self.kind, "form": self.form, "lambda": self.given, "target": self.target,
                "weights": sum(weight.numel() for weight in self.weights)}

    def state_dict(self) -> dict:
        led = {} if self.feedback is None else {"norms": self.norms, "feedback": self.feedback.state_dict()}
        return {name: getattr(self, name) for name in self.saved} | led

    def load_state_dict(self, state: dict) -> None:
        for name in self.saved:
            setattr(self, name, state[name])
        if self.feedback is not None:
            self.norms = state["norms"]
            self.feedback.load_state_dict(state["feedback"])


class Reweighted(Penalty):
    """Hold what the two forms of reweighted L1 share: alpha, one tensor for each weight.

    cost_power: alpha is multiplied by the layer's price (counting.prices, relative to their mean over all penalised
    weights) to this power. With 0 a weight is a weight; with 1 the penalty approximates the score of the challenge.
    """
    saved = ("alphas",)

    def __init__(self, model: nn.Module, layers, kind="irregular", lam=None, target=None, eps=1e-3, cost_power=0.0):
        super().__init__(model, layers, kind, lam, target)
        if eps <= 0:
            raise BadInput(f"impossible penalty: eps {eps}")
        self.eps, self.cost_power = eps, cost_power
        self.alphas: list[Tensor] = []
        self.factors = [1.0] * len(self.weights)
        if cost_power:
            prices = counting.prices(model)
            all_in_all = sum(prices[name] * weight.numel() for name, weight in zip(layers, self.weights))
            mean = all_in_all / sum(weight.numel() for weight in self.weights)
            self.factors = [(prices[name] / mean) ** cost_power for name in layers]

    def reweight(self) -> None:
        """Set alpha <- price / (|w| + eps).

        It is |w| and not w, because the submission's 1 / (w + eps) is singular at w = -eps.
        """
        self.alphas = [factor / (group_norms(weight, self.kind) + self.eps)
                       for factor, weight in zip(self.factors, self.weights)]

    def sizes(self) -> list[Tensor]:
        """Return the norms, by the square root of the layer's price: a weight goes at |w| (|w| + eps) < price R."""
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
        for alpha, weight in zip(self.alphas, self.weights):
            if self.kind == "irregular":
                # sign(w) max(|w| - t, 0) = w - clamp(w, -t, t), which needs only two passes over memory
                threshold = alpha * strength
                weight.sub_(torch.minimum(torch.maximum(weight, -threshold), threshold))
            else:
                norm = group_norms(weight, self.kind)
                weight.mul_((1 - strength * alpha / norm.clamp_min(1e-30)).clamp_min_(0))

    def first_lambda(self, q: float, rate: float) -> float:
        q = max(q, self.eps)
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

    Zhu and Gupta, "To prune, or not to prune", 2017: the smallest weights are set to zero, and their share grows to the
    target as 1 - (1 - t)^3, fast at first. Here t is not time but the sum of the learning rates so far, as a share of
    the stage's sum: under a cosine schedule the last zeros are made while the other weights can still adapt. Weights
    are ranked over all layers, as for the mask of the next stage. `update` chooses the zeros, and every step restores
    them. A zero stays zero, because it is among the smallest at the next update.
    """
    form = "magnitude"
    updates = 100

    def __init__(self, model: nn.Module, layers, target: float):
        if not 0 < target < 1:
            raise BadInput(f"impossible target sparsity {target}")
        super().__init__(model, layers, lam=0.0)
        self.model, self.layers, self.target = model, list(layers), target
        self.all_lr, self.masks, self.path = None, None, 0.0

    def update(self, lr_to_come: float) -> None:
        """Choose the zeros by the schedule. lr_to_come: sum of the learning rates of the steps that are left."""
        if self.all_lr is None:
            self.all_lr = lr_to_come
        to_go = lr_to_come / self.all_lr if self.all_lr else 0.0
        self.path = self.target * (1 - to_go**3)
        wanted = target_masks(self.model, self.layers, self.path) if self.path > 0 else None
        self.masks = wanted and Masks(self.model, wanted)

    def after_step(self, lr: float) -> None:
        """Set the chosen weights to zero; `lr` has no effect."""
        if self.masks is not None:
            self.masks.apply()

    def record(self) -> dict:
        return super().record() | {"zeros_path": self.path}

    def options(self) -> dict:
        return {"form": self.form, "target": self.target, "layers": self.layers}

    def state_dict(self) -> dict:
        return {"all_lr": self.all_lr, "share": self.path,
                "masks": self.masks and dict(zip(self.masks.names, self.masks.factors))}

    def load_state_dict(self, state: dict) -> None:
        self.all_lr, self.path, factors = state["all_lr"], state["share"], state["masks"]
        self.masks = factors and Masks(self.model, {name: factor != 0 for name, factor in factors.items()})


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
    """Return True if a penalty's constructor has an argument of this name."""
    parameters = inspect.signature(find(spec)[0]).parameters
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def make(spec: str, model: nn.Module, layers, **options) -> Penalty:
    """Return the penalty of a specification (see `find`) on some layers of a model.

    options: kind, lam, target, eps, where they are given. Raises BadInput for arguments that the class refuses.
    """
    kind, arguments = find(spec)
    try:
        penalty = kind(model, layers, **options, **arguments)
    except (TypeError, ValueError) as error:
        raise BadInput(f"--penalty {spec}: {kind.__name__} refuses its arguments ({error})") from error
    if spec not in BUILT_IN:
        penalty.form = spec  # its arguments decide the result, too
    return penalty
