"""Masks and prune-ratio files: cases computed by hand, and properties on random weights."""
import argparse
import math
import tomllib

import pytest
import torch
from torch import nn

from compressed.errors import BadInput
from compressed.graph import weight_layers
from mobilenet_v2 import MobileNetV2
from test_penalties import HAND, KINDS, LAYERS, Net, one
from training.masks import (
    PROFILES,
    Masks,
    group_norms,
    prune_ratios,
    ratio_masks,
    target_masks,
    threshold_masks,
    zero_masks,
)
from training.sparsity import pruned_layers


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
@pytest.mark.parametrize("ratio", (0.0, 0.3, 0.99))
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


@pytest.mark.parametrize("target", (0.01, 0.25, 0.5, 0.7695, 0.95))
def test_target_masks_prune_exactly_the_target(target):
    model = Net(1)
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
    mask = zero_masks(model)["conv"]
    assert not mask[0, 1:3].any() and mask.sum() == mask.numel() - 18


def test_masks_refuse_what_does_not_fit():
    model = Net()
    good = {name: torch.ones_like(module.weight, dtype=torch.bool) for name, module in weight_layers(model)}
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


def test_all_layers_but_the_stem_are_pruned(mobilenet):
    layers = pruned_layers(argparse.Namespace(config_file=None, sparsity_type=None), mobilenet)
    assert len(layers) == 57 and "conv1" not in layers and {"conv2", "linear", "layers.16.shortcut.0"} < set(layers)


@pytest.mark.parametrize("content, named", (
    ("[prune_ratios]\nconv9 = 0.5", "conv9"), ("[prune_ratios]\nconv = 1", "conv is 1"),
    ("[prune_ratios]\nconv = -0.1", "-0.1"), ("[prune_ratios]\nconv = '0.5'", "'0.5'"),
    ("[prune_ratios]\nconv = nan", "nan"), ("[prune_ratios]\nconv = 0", "no layer has a ratio above 0"),
    ("[ratios]\nconv = 0.5", "prune_ratios"), ("[prune_ratios\nconv = 0.5", "ratios.toml"),
    ("prune_ratios = 0.5", "prune_ratios")))
def test_bad_ratio_files_are_refused(tmp_path, content, named):
    path = tmp_path / "ratios.toml"
    path.write_text(content)
    with pytest.raises(BadInput) as error:
        prune_ratios(path, Net())
    assert named in str(error.value) and "\n" not in str(error.value)


def test_a_missing_ratio_file_names_those_that_exist():
    with pytest.raises(BadInput, match="config_mobile_v2_0.7"):
        prune_ratios("config_mobile_v9", Net())
