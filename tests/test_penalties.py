"""Penalties: cases computed by hand, and properties on random weights (resuming: test_loop.py)."""
import pytest
import torch
from torch import nn

from compressed import counting
from compressed.errors import BadInput
from compressed.graph import weight_layers
from training import penalties, trial
from training.feedback import FIRST
from training.masks import GROUPS, group_norms
from training.penalties import GradualMagnitude, LossReweightedL1, Penalty, ReweightedL1

KINDS = tuple(GROUPS)


def randomised(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for _, module in weight_layers(model):
        module.weight.data = torch.randn(module.weight.shape, generator=generator)
    return model


class Net(nn.Module):
    """A convolution, a depthwise one and a linear layer, with random weights; never run."""

    def __init__(self, seed=0):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6, bias=False)
        self.linear = nn.Linear(6, 5)
        randomised(self, seed)


LAYERS = ["conv", "depthwise", "linear"]


def one(*values, shape=None) -> nn.Module:
    """A model of one layer `conv` (or the 1x1 case by default) with these weights in float64, for sums by hand."""
    shape = shape or (1, len(values), 1, 1)
    model = nn.Module()
    model.conv = nn.Conv2d(shape[1], shape[0], shape[2:], bias=False)
    model.conv.weight = nn.Parameter(torch.tensor(values, dtype=torch.float64).view(shape))
    return model


# [out 2, in 2, 1, 2]: kernels (3, -4), (0, 0), (-4, 3), (0, -12). Every norm is whole:
#   columns (3, -4), (-4, 3), (0, 0), (0, -12): 5, 5, 0, 12;  kernels: 5, 0, 5, 12;  filters: 5 and 13
HAND = (3, -4, 0, 0, -4, 3, 0, -12)
NORMS = {"irregular": [3, 4, 0, 0, 4, 3, 0, 12], "column": [5, 5, 0, 12] * 2,
         "kernel": [5, 5, 0, 0, 5, 5, 12, 12], "filter": [5] * 4 + [13] * 4}  # of the group of each weight
LOSS = {"irregular": 2 * (3 / 4 + 4 / 5) + 12 / 13, "column": 2 * 5 / 6 + 12 / 13,
        "kernel": 2 * 5 / 6 + 12 / 13, "filter": 5 / 6 + 13 / 14}  # sum alpha |w|, eps = 1


def hand(kind, penalty=ReweightedL1, **kwargs) -> tuple[torch.Tensor, Penalty]:
    model = one(*HAND, shape=(2, 2, 1, 2))
    return model.conv.weight, penalty(model, ["conv"], kind, eps=1.0, **kwargs)


# --------------------------------------------------------------------------------------------------------- penalty

def pyramid() -> nn.Module:
    """Two equal convolutions, the first with 16 times as many positions as the second."""
    return randomised(nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=4, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)), 0)


def test_weights_that_cost_more_become_zero_earlier():
    layers = ["3", "6"]
    prices = counting.prices(pyramid())
    for power in (0.0, 0.5):
        penalty = ReweightedL1(pyramid(), layers, target=0.5, cost_power=power)
        penalty.update(1.0)
        ratio = (prices["3"] / prices["6"]) ** power
        assert (penalty.factors[0] / penalty.factors[1]) == pytest.approx(ratio) and (ratio > 2) == (power > 0)
        assert torch.equal(penalty.alphas[0], penalty.factors[0] / (penalty.weights[0].abs() + penalty.eps))
        # without a loss: q is the quantile of |w| / sqrt(factor), so the first lambda makes as many zeros with prices
        with torch.no_grad():
            for _ in range(1000):
                penalty.shrink(penalty.lam * FIRST / 1000)
        first, second = ((weight == 0).double().mean().item() for weight in penalty.weights)
        assert penalty.zeros_share().item() == pytest.approx(0.5 - 0.5 * (1 - FIRST / 0.75) ** 3, abs=0.01)
        assert (first > 1.5 * second) == (power > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_by_hand(kind):
    weight = one(*HAND, shape=(2, 2, 1, 2)).conv.weight
    assert group_norms(weight, kind).expand_as(weight).flatten().tolist() == NORMS[kind]


def test_a_linear_weight_counts_as_a_1x1_convolution():
    weight = torch.randn(5, 7)
    for kind in KINDS:
        assert torch.equal(group_norms(weight, kind), group_norms(weight[:, :, None, None], kind)[:, :, 0, 0])


def test_alpha_is_of_the_magnitude():
    eps = 1e-3
    model = one(0.5, -0.5, -eps, 0.0, 1.0)  # at w = -eps the submission divided by zero
    penalty = ReweightedL1(model, ["conv"], lam=1e-6, eps=eps)
    penalty.update(1.0)
    wanted = [1 / 0.501, 1 / 0.501, 500, 1000, 1 / 1.001]
    assert penalty.alphas[0].flatten().tolist() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_by_hand(kind):
    weight, penalty = hand(kind, LossReweightedL1, lam=0.5)
    penalty.update(1.0)
    loss = penalty.loss()
    assert loss.item() == pytest.approx(0.5 * LOSS[kind], rel=1e-12)
    loss.backward()
    # the derivative of alpha |w_g| is alpha w / |w_g|, and 0 for a group of zeros
    expected = [0.5 / (norm + 1) * w / norm if norm else 0.0 for w, norm in zip(HAND, NORMS[kind])]
    assert weight.grad.flatten().tolist() == pytest.approx(expected, rel=1e-12)


def test_alpha_stays_until_the_next_update():
    weight, penalty = hand("irregular", LossReweightedL1, lam=0.5)
    penalty.update(1.0)
    before = penalty.loss().item()
    weight.data *= 2
    assert penalty.loss().item() == pytest.approx(2 * before, rel=1e-12)
    penalty.update(1.0)
    assert penalty.loss().item() == pytest.approx(0.5 * (2 * (6 / 7 + 8 / 9) + 24 / 25), rel=1e-12)


def test_shrink_by_hand():
    weight, penalty = hand("irregular", lam=4.0)
    penalty.update(1.0)
    penalty.after_step(0.5)  # takes 2 / (|w| + 1) away
    assert weight.flatten().tolist() == pytest.approx([2.5, -3.6, 0, 0, -3.6, 2.5, 0, -12 + 2 / 13], rel=1e-12)
    weight.data = torch.tensor(HAND, dtype=torch.float64).view(2, 2, 1, 2)
    penalty.after_step(4.0)  # takes 16 / (|w| + 1) away: 4, 3.2, 16 / 13
    assert weight.flatten().tolist() == pytest.approx([0, -0.8, 0, 0, -0.8, 0, 0, -12 + 16 / 13], rel=1e-12)


def test_shrink_takes_a_tensor_and_hides_no_nan():
    """With a target the strength is a float64 tensor; a weight that is not a number must stop the training."""
    number, tensor = Net(), Net()
    for model, strength in ((number, 0.3), (tensor, torch.tensor(0.3, dtype=torch.float64))):
        model.conv.weight.data[0, 0, 0, 0] = torch.nan
        penalty = ReweightedL1(model, LAYERS, lam=1.0)
        penalty.update(1.0)
        penalty.weights[0].requires_grad_(False)[0, 1, 0, 0] = torch.nan
        with torch.no_grad():
            penalty.shrink(strength)
    for name in LAYERS:  # the biases are random
        ours, theirs = (model.get_submodule(name).weight.nan_to_num(7) for model in (number, tensor))
        assert torch.equal(ours, theirs)
    assert number.conv.weight[0, :2, 0, 0].isnan().all() and number.conv.weight.isnan().sum() == 2
    assert (number.linear.weight == 0).any()


@pytest.mark.parametrize("kind", ("column", "kernel", "filter"))
def test_group_shrink_by_hand(kind):
    for strength in (6, 31, 200):  # a group of norm 5 and alpha 1/6 shrinks to 0.8 of itself, or goes
        weight, penalty = hand(kind, lam=strength)
        penalty.update(1.0)
        penalty.after_step(1.0)
        expected = [w * max(0, 1 - strength / (norm + 1) / norm) if norm else 0 for w, norm in zip(HAND, NORMS[kind])]
        assert weight.flatten().tolist() == pytest.approx(expected, rel=1e-12)
        assert [w == 0 for w in weight.flatten().tolist()] == [w == 0 for w in expected]  # exact zeros, not small ones
        if strength == 6:
            assert expected[0] == pytest.approx(2.4)


@pytest.mark.parametrize("kind", KINDS)
def test_shrink_never_flips_a_sign_and_never_grows_a_weight(kind):
    seed = KINDS.index(kind)
    model = Net(seed)
    model.conv.weight.data[1] = 0
    model.conv.weight.data[2, 1] = 1e-20
    penalty = ReweightedL1(model, LAYERS, kind, lam=10.0 ** (seed - 3))
    penalty.update(1.0)
    before = [weight.detach().clone() for weight in penalty.weights]
    for _ in range(3):
        penalty.after_step(0.1)
        for old, new in zip(before, penalty.weights):
            assert (old * new >= 0).all() and (new.abs() <= old.abs()).all() and new.isfinite().all()
    assert any((old != new).any() for old, new in zip(before, penalty.weights))


@pytest.mark.parametrize("kind", KINDS)
def test_shrink_is_the_proximal_step(kind):
    """No point nearby has a lower 1/2 |v - w|^2 + strength * sum alpha_g |v_g|."""
    model = Net(3).double()
    model.conv.weight.data[0] *= 0.02  # a filter, and parts of columns, that will go
    model.conv.weight.data[:, 1] *= 0.02
    penalty = ReweightedL1(model, LAYERS, kind, lam=0.7, eps=0.1)
    penalty.update(1.0)
    before = [weight.detach().clone() for weight in penalty.weights]
    penalty.after_step(0.3)
    zeros = [weight == 0 for weight in penalty.weights]
    assert any(zero.any() for zero in zeros) and not all(zero.all() for zero in zeros)

    def objective(points):
        return sum(0.5 * (v - w).square().sum() + 0.3 * 0.7 * (alpha * group_norms(v, kind)).sum()
                   for v, w, alpha in zip(points, before, penalty.alphas)).item()

    generator = torch.Generator().manual_seed(0)
    best = objective([weight.detach() for weight in penalty.weights])
    for scale in (1e-1, 1e-2, 1e-3, 1e-4):
        for _ in range(10):
            near = [w.detach() + scale * torch.randn(w.shape, generator=generator, dtype=w.dtype)
                    for w in penalty.weights]
            assert objective(near) > best


# ---------------------------------------------------------------------------------------------- lambda from a target

def test_the_first_lambda_by_hand():
    """For the zeros that the path wants a twentieth of the stage later: 0.6 - 0.6 (14 / 15)^3 = 11% of five weights."""
    model = one(0.5, -0.1, 0.3, -0.2, 0.4)
    penalty = ReweightedL1(model, ["conv"], target=0.6, eps=0.1)
    penalty.update(2.0)
    assert penalty.lam.item() == pytest.approx(0.1 * (0.1 + 0.1) / (0.05 * 2.0))  # q is the smallest of five
    penalty.update(1.0)
    assert penalty.lam.item() == pytest.approx(0.2)  # from then on the feedback moves it, and nothing else
    model.conv.weight.data.zero_()
    penalty = ReweightedL1(model, ["conv"], target=0.6, eps=0.1)
    penalty.update(2.0)
    assert penalty.lam.item() == pytest.approx(0.001 * 0.101 / 0.1)  # q = 0.001 where the zeros are there: never zero
    model = one(0.5, -0.1, 0.3, -0.2, 0.4)
    plain = ReweightedL1(model, ["conv"], target=0.6, eps=1000.0)
    plain.update(2.0)
    assert (plain.lam * plain.alphas[0]).flatten().tolist() == pytest.approx([0.1 / 0.1] * 5, rel=1e-3)  # plain L1's


@pytest.mark.parametrize("kind", KINDS)
def test_unopposed_weights_go_as_the_formula_says(kind):
    """Under |w| (|w| + eps) < S lambda an unopposed group is driven to exactly zero, above it is not."""
    model = Net(1).double()
    lrs = [0.1 * (1 - i / 50) for i in range(50)]
    norms = [group_norms(layer.weight.detach(), kind) for _, layer in weight_layers(model)]
    q = torch.cat([norm.flatten() for norm in norms]).median().item()
    penalty = ReweightedL1(model, LAYERS, kind, lam=1.01 * q * (q + 0.05) / sum(lrs), eps=0.05)
    penalty.update(sum(lrs))
    for lr in lrs:
        penalty.after_step(lr)
    zeros = 0
    for norm, weight in zip(norms, penalty.weights):
        assert torch.equal(group_norms(weight, kind) == 0, norm * (norm + penalty.eps) < sum(lrs) * penalty.lam)
        zeros += (weight == 0).sum().item()
    assert 0 < zeros < sum(weight.numel() for weight in penalty.weights)


def test_with_a_target_the_convolutions_keep_their_norms():
    """Their weights become zero, the others grow for it; the linear layer has no BatchNorm behind it and shrinks."""
    model = Net(2)
    layers = dict(weight_layers(model))
    model.depthwise.weight.data.zero_()
    before = {name: layer.weight.norm().item() for name, layer in layers.items()}
    penalty = ReweightedL1(model, LAYERS, target=0.5)
    penalty.update(1.0)
    for _ in range(100):
        penalty.after_step(0.01)
    assert penalty.feedback.spent == pytest.approx(1) and penalty.zeros_share() > 0.3
    assert layers["conv"].weight.norm().item() == pytest.approx(before["conv"], rel=1e-3)
    assert layers["linear"].weight.norm() < 0.99 * before["linear"] and not layers["depthwise"].weight.any()


@torch.no_grad()
def test_a_dead_layer_and_its_bias_stay_as_they_are():
    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)), 0)
    penalty = ReweightedL1(model, ["0", "2"], target=0.5)
    penalty.update(1.0)
    model[0].weight.zero_()
    bias = model[0].bias.clone()
    for _ in range(200):
        penalty.hold_norms()
    assert not model[0].weight.any() and torch.equal(model[0].bias, bias)


def test_a_convolution_without_a_normalisation_keeps_no_norm():
    """Its norm matters, so the loss holds it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3))
    penalty = ReweightedL1(randomised(model, 0), ["0", "3"], target=0.5)
    assert [weight is model[0].weight for weight in penalty.convolutions] == [True]


@pytest.mark.parametrize("wrong", ({}, dict(lam=1.0, target=0.5)))
def test_a_lambda_or_a_target_and_not_both(wrong):
    with pytest.raises(BadInput, match="and not both"):
        ReweightedL1(Net(), LAYERS, **wrong)


@pytest.mark.parametrize("strength", (dict(target=0.5), dict(lam=0.1)))
def test_state_goes_into_another_penalty(strength):
    ours, theirs = Net(0), Net(1)
    first, second = ReweightedL1(ours, LAYERS, **strength), ReweightedL1(theirs, LAYERS, **strength)
    second.load_state_dict(first.state_dict())  # before any update
    first.update(1.0)
    for _ in range(20):
        first.after_step(0.01)
    second.load_state_dict(first.state_dict())
    theirs.load_state_dict(ours.state_dict())
    for penalty in (first, second):
        penalty.update(0.8)
        for _ in range(20):
            penalty.after_step(0.01)
    assert second.lam == first.lam > 0 and all(map(torch.equal, first.weights, second.weights))
    assert first.record() == second.record()


# -------------------------------------------------------------------------------------------------- gradual magnitude

class Counted(nn.Module):
    """200 weights in two layers: 1, 2, ..., 100 and 101, ..., 200."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(10, 10, 1, bias=False)
        self.linear = nn.Linear(10, 10)
        for i, (_, layer) in enumerate(weight_layers(self)):
            layer.weight.data = torch.arange(1.0, 101).view(layer.weight.shape).add(100 * i).neg_()

    def zeros(self) -> list[int]:
        return [int((layer.weight == 0).sum()) for _, layer in weight_layers(self)]


def test_the_schedule_of_magnitudes_by_hand():
    model = Counted()
    pruning = GradualMagnitude(model, ["conv", "linear"], 0.8)
    expected = {8.0: [0, 0], 6.0: [93, 0], 4.0: [100, 40], 0.0: [100, 60]}  # 160 (1 - 0.75^3), 160 (1 - 0.5^3), 160
    for (lr_to_come, zeros), lr in zip(expected.items(), (2.0, 2.0, 4.0, 0.0)):
        pruning.update(lr_to_come)
        pruning.after_step(lr)
        assert model.zeros() == zeros  # one ranking for both layers, the smallest first
    model.conv.weight.data += 7  # what the optimizer does to them
    model.linear.weight.data += 7
    pruning.after_step(0.1)
    assert model.zeros() == [100, 60]
    assert model.linear.weight.flatten()[60:].tolist() == [-i + 7.0 for i in range(161, 201)]


def test_the_schedule_of_magnitudes_starts_from_the_zeros_that_are_there():
    model = Counted()
    model.conv.weight.data.view(-1)[:80] = 0
    pruning = GradualMagnitude(model, ["conv", "linear"], 0.8)
    for lr_to_come, zeros in ((8.0, [80, 0]), (4.0, [100, 50]), (0.0, [100, 60])):  # 160 - 80 (1 - t)^3
        pruning.update(lr_to_come)
        pruning.after_step(4.0)
        assert model.zeros() == zeros
    other = GradualMagnitude(Counted(), ["conv", "linear"], 0.8)
    other.load_state_dict(pruning.state_dict())
    assert other.start == pruning.start == 0.4


def test_weights_that_cannot_be_pruned():
    for change, said in (
            (lambda net: nn.utils.parametrizations.weight_norm(net.conv), "the weight of conv is computed"),
            (lambda net: setattr(net.depthwise, "weight", net.conv.weight), "conv and depthwise share their weight"),
            (lambda net: net.linear.weight.requires_grad_(False), "linear is not trained")):
        net = Net()
        change(net)
        with pytest.raises(BadInput, match=said):
            ReweightedL1(net, LAYERS, lam=1e-3)
        ReweightedL1(net, LAYERS[:1] if "linear" in said else LAYERS[2:], lam=1e-3)  # others can


def test_in_a_stage_made_longer_the_magnitudes_wait():
    model = Counted()
    pruning = GradualMagnitude(model, ["conv", "linear"], 0.8)
    shares = []
    for lr_to_come in (8.0, 4.0, 12.0, 4.0, 0.0):  # half of 8 are spent, then 12 are to come instead of 4
        pruning.update(lr_to_come)
        pruning.after_step(4.0)
        shares.append(pruning.record()["zeros_path"])
    assert shares == pytest.approx([0, 0.7, 0.7, 0.8 * (1 - 0.25**3), 0.8])


def test_state_of_magnitudes_of_another_process():
    ours, theirs = Counted(), Counted()
    first, second = GradualMagnitude(ours, ["conv", "linear"], 0.8), GradualMagnitude(theirs, ["conv", "linear"], 0.8)
    second.load_state_dict(first.state_dict())  # before any update
    first.update(8.0)
    first.after_step(2.0)
    first.update(6.0)
    first.after_step(2.0)
    kept = second.kept()
    second.load_state_dict(first.state_dict())
    assert second.spent == 4.0
    second.after_step(0)
    assert theirs.zeros() == ours.zeros() == [93, 0]
    second.update(4.0)
    assert theirs.zeros() == [100, 40]
    # an optimizer has these tensors
    assert [int((mask == 0).sum()) for mask in kept.values()] == [100, 40] and list(kept) == second.weights
    assert first.options() == second.options() != GradualMagnitude(ours, ["conv"], 0.8).options()


# ----------------------------------------------------------------------------------------------- a penalty of one's own

OWN = """
from training.penalties import Penalty

class Soft(Penalty):
    def __init__(self, *args, power=1, **options):
        super().__init__(*args, **options)
        self.power = power
    def shrink(self, strength):
        for weight in self.weights:
            weight.sub_(weight.clamp(-strength, strength))

class Rule(Penalty):
    def update(self, lr_to_come):
        pass
    def after_step(self, lr):
        for weight in self.weights:
            weight.mul_(weight.abs() >= weight.abs().flatten().quantile(self.target))

class Early(Penalty):
    def update(self, lr_to_come):
        self.weights[0].zero_()

class Idle(Penalty):
    pass

class Fails(Soft):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.more = self.other

class Array(Soft):
    saved = ("array",)
    def reweight(self):
        self.array = self.weights[0].detach().numpy()

class Forgetful(Soft):
    saved = ("other",)

class Recordless(Soft):
    def record(self):
        return {"other": self.other}

class Movement(Soft):
    def after_step(self, lr):
        self.score = sum((weight * weight.grad).sum() for weight in self.weights)

class Tensors(Soft):
    def record(self):
        return super().record() | {"first": self.weights[0].sum()}

class Endless(Soft):
    def first_lambda(self, q, rate):
        return float("nan")

class Ridge(Penalty):
    def __init__(self, model, layers, lam):
        super().__init__(model, layers, lam=lam)
    def loss(self):
        return self.lam * sum(weight.square().sum() for weight in self.weights)

def function(): pass
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)


def test_a_penalty_from_a_file(own):
    penalty = penalties.make("own.py:Soft?power=2", Net(), LAYERS, target=0.5)
    assert (penalty.power, penalty.form, penalty.in_loss) == (2, "own.py:Soft?power=2", False)
    assert penalty.options()["form"] != penalties.make("own.py:Soft", Net(), LAYERS, target=0.5).options()["form"]
    ridge = penalties.make("own.py:Ridge", Net(), LAYERS, lam=0.5)
    assert ridge.in_loss and ridge.loss().item() == pytest.approx(
        0.5 * sum(weight.square().sum().item() for weight in ridge.weights))
    assert penalties.takes("own.py:Soft", "kind") and not penalties.takes("own.py:Ridge", "kind")
    assert not penalties.takes("own.py:Soft", "cost_power")  # what it passes on, its base class refuses
    assert [penalties.takes("magnitude", name) for name in ("target", "lam", "kind")] == [True, False, False]


def test_a_rule_of_ones_own_reaches_its_target_by_itself(own):
    penalties.make("own.py:Early", Net(), LAYERS, lam=0.5)
    rule = penalties.make("own.py:Rule", Net(), LAYERS, target=0.5)
    with torch.no_grad():  # as the loop calls it
        rule.update(1.0)
        rule.after_step(0.1)
    assert rule.feedback is None and 0.45 < rule.zeros_share() < 0.55 and rule.record()["lambda"] == 0


def test_the_first_lambda_of_a_penalty_of_ones_own(own):
    """That of plain L1, q / rate, for the zeros that are wanted a twentieth of the stage later (see above)."""
    penalty = penalties.make("own.py:Soft", Net(3), LAYERS, target=0.6)
    penalty.update(40.0)
    every = torch.cat([weight.detach().flatten().abs() for weight in penalty.weights])
    wanted = 0.6 - 0.6 * (14 / 15) ** 3
    assert penalty.lam.item() == pytest.approx(every.sort().values[int(wanted * len(every))].item() / (0.05 * 40))


@pytest.mark.parametrize("name, said", (("Array", "its state cannot be saved and read again .UnpicklingError: Weights"),
                                        ("Forgetful", "its state cannot be saved and read again .AttributeError: "),
                                        ("Recordless", "a first step with it fails .AttributeError: "),
                                        ("Tensors", "a first step with it fails .TypeError: .*not JSON"),
                                        ("Endless", "a first step with it fails .ValueError: its first lambda is nan")))
def test_what_would_fail_hours_later_is_tried_at_the_start(own, name, said):
    for good in ("Soft", "Movement"):
        trial.try_penalty(penalties.make(f"own.py:{good}", Net(), LAYERS, target=0.5))
    with pytest.raises(BadInput, match=said):
        trial.try_penalty(penalties.make(f"own.py:{name}", Net(), LAYERS, target=0.5))


@pytest.mark.parametrize("spec, options, said", (
    ("nothing", {}, "known are loss, proximal, magnitude"), ("own.py:Other", {}, "no class or function Other"),
    ("own.py:function", {}, "expected a subclass of Penalty"), ("none.py:Soft", {}, "there is no file none.py"),
    ("own.py:Soft?speed=1", {"lam": 1.0}, "own.py:Soft.speed=1 cannot be made .TypeError: .*'speed'"),
    ("own.py:Soft?9", {}, "expected NAME=VALUE"), ("own.py:Ridge", {"target": 0.5}, "cannot be made .TypeError"),
    ("own.py:Soft?power=None", {"lam": 1.0, "kind": 5}, "unknown sparsity type 5"),
    ("own.py:Fails", {"lam": 1.0}, "cannot be made .AttributeError: 'Fails' object has no attribute 'other'.$"),
    ("own.py:Idle", {"target": 0.5}, "Idle does nothing: it defines neither"),
    ("loss", {"target": 0.5}, "cannot be led to a target")))
def test_a_penalty_that_cannot_be_is_refused_in_a_line(own, spec, options, said):
    with pytest.raises(BadInput, match=said) as error:
        penalties.make(spec, Net(), LAYERS, **options)
    assert "\n" not in str(error.value)


def test_prices_are_relative_to_their_mean():
    """So that a lambda means the same with every --cost-power."""
    penalty = ReweightedL1(pyramid(), ["3", "6", "11"], lam=1.0, cost_power=1.0)
    sizes = [weight.numel() for weight in penalty.weights]
    assert sum(factor * size for factor, size in zip(penalty.factors, sizes)) == pytest.approx(sum(sizes))


def test_a_stage_made_longer_stretches_the_path():
    penalty = ReweightedL1(Net(), LAYERS, target=0.5)
    penalty.update(1.0)
    for _ in range(5):
        penalty.after_step(0.1)
    penalty.update(1.5)
    assert penalty.feedback.total == pytest.approx(2.0)


@torch.no_grad()
def test_a_norm_is_doubled_at_most():
    penalty = ReweightedL1(model := Net(), LAYERS, target=0.5)
    penalty.convolutions = [model.conv.weight]
    penalty.update(1.0)
    before = model.conv.weight.norm().item()
    model.conv.weight.mul_(0.1)
    penalty.hold_norms()
    assert model.conv.weight.norm().item() == pytest.approx(0.2 * before)
