"""The penalty, its updates and the masks: cases computed by hand, and properties on random weights."""
import math
import tomllib

import pytest
import torch
from torch import nn

from compressed.errors import BadInput
from compressed.graph import weight_layers
from mobilenet_v2 import MobileNetV2
from training.reweighted_l1 import (
    GROUPS,
    PROFILES,
    Masks,
    ReweightedL1,
    default_layers,
    group_norms,
    prune_ratios,
    ratio_masks,
    target_masks,
    threshold_masks,
    zero_masks,
)

KINDS = tuple(GROUPS)


class Net(nn.Module):
    """A convolution, a depthwise one and a linear layer, with random weights; never run."""

    def __init__(self, seed=0):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6, bias=False)
        self.linear = nn.Linear(6, 5)
        generator = torch.Generator().manual_seed(seed)
        for _, module in weight_layers(self):
            module.weight.data = torch.randn(module.weight.shape, generator=generator)


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


def hand(kind, **kwargs) -> tuple[torch.Tensor, ReweightedL1]:
    model = one(*HAND, shape=(2, 2, 1, 2))
    return model.conv.weight, ReweightedL1(model, ["conv"], kind, eps=1.0, **kwargs)


# --------------------------------------------------------------------------------------------------------- penalty

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
    weight, penalty = hand(kind, form="loss", lam=0.5)
    penalty.update(1.0)
    loss = penalty.loss()
    assert loss.item() == pytest.approx(0.5 * LOSS[kind], rel=1e-12)
    loss.backward()
    # the derivative of alpha |w_g| is alpha w / |w_g|, and 0 for a group of zeros
    expected = [0.5 / (norm + 1) * w / norm if norm else 0.0 for w, norm in zip(HAND, NORMS[kind])]
    assert weight.grad.flatten().tolist() == pytest.approx(expected, rel=1e-12)


def test_alpha_stays_until_the_next_update():
    weight, penalty = hand("irregular", form="loss", lam=0.5)
    penalty.update(1.0)
    before = penalty.loss().item()
    weight.data *= 2
    assert penalty.loss().item() == pytest.approx(2 * before, rel=1e-12)
    penalty.update(1.0)
    assert penalty.loss().item() == pytest.approx(0.5 * (2 * (6 / 7 + 8 / 9) + 24 / 25), rel=1e-12)


def test_shrink_by_hand():
    weight, penalty = hand("irregular", lam=4.0)
    penalty.update(1.0)
    penalty.shrink(0.5)  # takes 2 / (|w| + 1) away
    assert weight.flatten().tolist() == pytest.approx([2.5, -3.6, 0, 0, -3.6, 2.5, 0, -12 + 2 / 13], rel=1e-12)
    weight.data = torch.tensor(HAND, dtype=torch.float64).view(2, 2, 1, 2)
    penalty.shrink(4.0)  # takes 16 / (|w| + 1) away: 4, 3.2, 16 / 13
    assert weight.flatten().tolist() == pytest.approx([0, -0.8, 0, 0, -0.8, 0, 0, -12 + 16 / 13], rel=1e-12)


@pytest.mark.parametrize("kind", ("column", "kernel", "filter"))
def test_group_shrink_by_hand(kind):
    for strength in (6, 31, 200):  # a group of norm 5 and alpha 1/6 shrinks to 0.8 of itself, or goes
        weight, penalty = hand(kind, lam=strength)
        penalty.update(1.0)
        penalty.shrink(1.0)
        expected = [w * max(0, 1 - strength / (norm + 1) / norm) if norm else 0 for w, norm in zip(HAND, NORMS[kind])]
        assert weight.flatten().tolist() == pytest.approx(expected, rel=1e-12)
        assert [w == 0 for w in weight.flatten().tolist()] == [w == 0 for w in expected]  # exact zeros, not small ones
        if strength == 6:
            assert expected[0] == pytest.approx(2.4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_shrink_never_flips_a_sign_and_never_grows_a_weight(kind, seed):
    model = Net(seed)
    model.conv.weight.data[1] = 0
    model.conv.weight.data[2, 1] = 1e-20
    penalty = ReweightedL1(model, LAYERS, kind, lam=10.0 ** (seed - 3))
    penalty.update(1.0)
    before = [weight.detach().clone() for weight in penalty.weights]
    for _ in range(3):
        penalty.shrink(0.1)
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
    penalty.shrink(0.3)
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


def test_no_strength_changes_nothing():
    model = Net()
    before = model.conv.weight.clone()
    penalty = ReweightedL1(model, LAYERS, lam=0.0)
    penalty.update(1.0)
    penalty.shrink(1.0)
    assert torch.equal(model.conv.weight, before) and penalty.loss().item() == 0


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
    assert penalty.lam.item() == pytest.approx(0.2)  # q = eps where the zeros are there: never zero


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
        penalty.shrink(lr)
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
        penalty.shrink(0.01)
    assert penalty.feedback.spent == pytest.approx(1) and penalty.share() > 0.3
    assert layers["conv"].weight.norm().item() == pytest.approx(before["conv"], rel=1e-3)
    assert layers["linear"].weight.norm() < 0.99 * before["linear"] and not layers["depthwise"].weight.any()


@pytest.mark.parametrize("wrong", (dict(kind="rows", lam=1.0), dict(form="l0", lam=1.0), dict(),
                                   dict(lam=1.0, target=0.5), dict(form="loss", target=0.5),
                                   dict(lam=1.0, eps=0.0), dict(lam=-1.0), dict(target=0.0), dict(target=1.0)))
def test_impossible_penalties_are_refused(wrong):
    with pytest.raises(BadInput):
        ReweightedL1(Net(), LAYERS, **wrong)


@pytest.mark.parametrize("strength", (dict(target=0.5), dict(lam=0.1)))
def test_state_goes_into_another_penalty(strength):
    ours, theirs = Net(0), Net(1)
    first, second = ReweightedL1(ours, LAYERS, **strength), ReweightedL1(theirs, LAYERS, **strength)
    second.load_state_dict(first.state_dict())  # before any update
    first.update(1.0)
    for _ in range(20):
        first.shrink(0.01)
    second.load_state_dict(first.state_dict())
    theirs.load_state_dict(ours.state_dict())
    for penalty in (first, second):
        penalty.update(0.8)
        for _ in range(20):
            penalty.shrink(0.01)
    assert second.lam == first.lam > 0 and all(map(torch.equal, first.weights, second.weights))
    assert first.record() == second.record()


# ----------------------------------------------------------------------------------------------------------- masks

def test_threshold_mask_by_hand():
    model = one(0.0, 1e-4, -1e-4, 0.99e-4, -0.99e-4, -3.0)
    mask = threshold_masks(model, ["conv"], 1e-4)["conv"]
    assert mask.flatten().tolist() == [False, True, True, False, False, True]


def test_ratio_masks_by_hand():
    """Half of the groups go; which of two that tie is not promised, so only the others are looked at."""
    certain = {"irregular": {2: 0, 3: 0, 6: 0, 1: 1, 4: 1, 7: 1}, "column": {2: 0, 6: 0, 3: 1, 7: 1},
               "kernel": {2: 0, 3: 0, 6: 1, 7: 1}, "filter": {0: 0, 1: 0, 2: 0, 3: 0, 4: 1, 5: 1, 6: 1, 7: 1}}
    for kind in KINDS:
        mask = ratio_masks(one(*HAND, shape=(2, 2, 1, 2)), {"conv": 0.5}, kind)["conv"].flatten().tolist()
        assert sum(mask) == 4 and all(mask[i] == kept for i, kept in certain[kind].items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", (0.0, 0.3, 0.5, 0.99))
def test_ratio_masks_count_per_layer(kind, ratio):
    model = Net()
    masks = ratio_masks(model, {"conv": ratio, "linear": 0.5}, kind)
    assert list(masks) == ["conv", "linear"]
    for name, share in (("conv", ratio), ("linear", 0.5)):
        weight, mask = dict(weight_layers(model))[name].weight, masks[name]
        norms = group_norms(weight, kind)
        gone = ~(group_norms(mask.double(), kind) > 0)  # groups with nothing left
        assert gone.sum() == int(share * norms.numel())
        assert torch.equal(mask, ~gone.expand_as(mask))  # groups whole
        if 0 < gone.sum() < gone.numel():
            assert norms[gone].max() <= norms[~gone].min()


def test_all_equal_weights_are_pruned_to_the_count():
    assert (~ratio_masks(one(*[1.0] * 10), {"conv": 0.3}, "irregular")["conv"]).sum() == 3


@pytest.mark.parametrize("target", (0.01, 0.25, 0.5, 0.7695, 0.95))
@pytest.mark.parametrize("seed", range(3))
def test_target_masks_prune_exactly_the_target(target, seed):
    model = Net(seed)
    masks = target_masks(model, LAYERS, target)
    total = sum(mask.numel() for mask in masks.values())
    assert sum((~mask).sum().item() for mask in masks.values()) == math.ceil(target * total)
    weights = {name: module.weight.abs() for name, module in weight_layers(model)}  # one threshold for all layers
    pruned = max(weights[n][~m].max() for n, m in masks.items() if not m.all())
    assert pruned < min(weights[n][m].min() for n, m in masks.items())


@pytest.mark.parametrize("kind", ("column", "kernel", "filter"))
@pytest.mark.parametrize("target", (0.1, 0.5, 0.8))
def test_target_masks_prune_whole_groups_to_at_least_the_target(kind, target):
    model = Net(2)
    masks = target_masks(model, LAYERS, target, kind)
    total = sum(mask.numel() for mask in masks.values())
    pruned, groups = 0, []
    for name, mask in masks.items():
        kept = (group_norms(mask.double(), kind) > 0).expand_as(mask)
        assert torch.equal(mask, kept)
        pruned += (~mask).sum().item()
        groups.append(mask.numel() // group_norms(mask.double(), kind).numel())
    assert target * total <= pruned < target * total + max(groups)


def test_groups_of_different_size_are_ranked_by_root_mean_square():
    model = nn.Module()
    model.small, model.large = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 3, bias=False)
    model.small.weight.data.fill_(0.5)
    model.large.weight.data.fill_(0.4)  # norm 1.2, but every weight is smaller than the other layer's
    masks = target_masks(model, ["small", "large"], 0.5, "filter")
    assert masks["small"].all() and not masks["large"].any()


def test_ties_and_zeros_do_not_fall_short_of_the_target():
    masks = target_masks(one(0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0), ["conv"], 0.25)
    assert (~masks["conv"]).sum() == 3  # every zero that there is
    masks = target_masks(one(0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 2.0), ["conv"], 0.5)
    assert (~masks["conv"]).sum() == 7


def test_zero_masks_keep_what_is_there():
    model = Net()
    model.conv.weight.data[0, 1:3] = 0
    mask = zero_masks(model, ["conv"])["conv"]
    assert not mask[0, 1:3].any() and mask.sum() == mask.numel() - 18


def test_masks_refuse_what_does_not_fit():
    model = Net()
    good = {name: torch.ones_like(module.weight, dtype=torch.bool) for name, module in weight_layers(model)}
    Masks(model, good)
    for wrong in ({"conv9": good["conv"]}, {"conv": good["conv"][:, :1]}, {"conv": good["conv"].float()},
                  {"conv": good["linear"]}, {"bn": torch.ones(6, dtype=torch.bool)}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            Masks(model, wrong)


@pytest.mark.parametrize("channels_last", (False, True))
def test_masks_zero_and_catch_what_revives(channels_last):
    model = Net()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    before = model.conv.weight.detach().clone()
    keep = target_masks(model, LAYERS, 0.5)
    masks = Masks(model, keep)
    for name, module in weight_layers(model):
        assert torch.equal(module.weight != 0, keep[name])
    assert torch.equal(model.conv.weight[keep["conv"]], before[keep["conv"]])
    masks.check(model)

    dead = (~keep["depthwise"]).nonzero()[0]
    with torch.no_grad():
        model.depthwise.weight[tuple(dead)] = 1e-30
    with pytest.raises(AssertionError, match="depthwise"):
        masks.check(model)
    masks.apply()
    masks.check(model)
    with pytest.raises(AssertionError):
        masks.check(Net())  # another model, such as an average, is looked at itself


# -------------------------------------------------------------------------------------------------- prune-ratio files

@pytest.fixture(scope="module")
def mobilenet():
    return MobileNetV2()


def test_the_shipped_profile_lists_every_convolution(mobilenet):
    listed = tomllib.loads((PROFILES / "config_mobile_v2_0.7.toml").read_text())["prune_ratios"]
    convs = [name for name, module in weight_layers(mobilenet) if isinstance(module, nn.Conv2d)]
    assert len(convs) == 57 and list(listed) == convs
    assert listed["conv1"] == 0 and all(ratio == 0.7 for name, ratio in listed.items() if name != "conv1")
    for name in ("config_mobile_v2_0.7", "config_mobile_v2_0.7.toml", PROFILES / "config_mobile_v2_0.7.toml"):
        assert prune_ratios(name, mobilenet) == dict.fromkeys(convs[1:], 0.7)


def test_default_layers_are_all_but_the_stem(mobilenet):
    layers = default_layers(mobilenet)
    assert len(layers) == 57 and "conv1" not in layers and {"conv2", "linear", "layers.16.shortcut.0"} < set(layers)


def test_ratio_files(tmp_path):
    path = tmp_path / "ratios.toml"
    path.write_text('[prune_ratios]\nconv = 0.25\nlinear = 0\n')
    assert prune_ratios(path, Net()) == {"conv": 0.25}


@pytest.mark.parametrize("content, named", (
    ("[prune_ratios]\nconv9 = 0.5", "conv9"), ("[prune_ratios]\nconv = 1", "conv is 1"),
    ("[prune_ratios]\nconv = -0.1", "-0.1"), ("[prune_ratios]\nconv = '0.5'", "'0.5'"),
    ("[prune_ratios]\nconv = nan", "nan"),
    ("[ratios]\nconv = 0.5", "prune_ratios"), ("[prune_ratios\nconv = 0.5", "ratios.toml"),
    ("prune_ratios = 0.5", "prune_ratios"), (b"\xff\xfe", "ratios.toml")))
def test_bad_ratio_files_are_refused(tmp_path, content, named):
    path = tmp_path / "ratios.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput) as error:
        prune_ratios(path, Net())
    assert named in str(error.value) and "\n" not in str(error.value)


def test_a_missing_ratio_file_names_those_that_exist():
    with pytest.raises(BadInput, match="config_mobile_v2_0.7"):
        prune_ratios("config_mobile_v9", Net())
