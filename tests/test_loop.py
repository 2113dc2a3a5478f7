"""The training loop on a network of four layers: schedules, one step by hand, resume to the bit, several processes."""
import copy
import dataclasses
import errno
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from compressed import cifar100
from compressed.errors import BadInput
from compressed.files import digest, save_record, save_tensors
from compressed.graph import weight_layers
from training import augmentation, loop, optimizers, plan, progress, trial
from tiny import tiny
from training.loop import Processes, Settings
from training.plan import learning_rate
from training.masks import Masks, target_masks
from training.penalties import ReweightedL1, make


LAYERS = ["conv1", "conv2", "linear"]
TRAIN, TEST = cifar100.made_up(52, 0, classes=10), cifar100.made_up(30, 1, classes=10)
# 52 images in batches of 16: 3 steps an epoch and 4 images over; 9 steps in all
SETTINGS = Settings(epochs=3, batch_size=16, lr=0.05, warmup_epochs=1, clean=0.34, average=0.9, refresh=40)
VARIANTS = {  # optimizer, form of the penalty, masks, weight average; "taught" by two teachers too
    "taught": ("sgd", "proximal", False, None),
    "sgd": ("sgd", None, False, 0.9), "magnitude": ("sgd", "magnitude", False, 0.9),
    "proximal": ("sgd", "proximal", False, 0.9), "muon+masks": ("muon", None, True, 0.9),
    "loss+masks": ("adam", "loss", True, 0.9), "masks, no average": ("sgd", None, True, 0.0)}


def stage(folder, variant="sgd", test=TEST, model=None, **kwargs):
    """(result, the model that was trained) of a stage that is made anew, as a new process would."""
    optimizer, form, masked, average = VARIANTS[variant]
    model = model or tiny()
    strength = {"lam": 1e-3} if form == "loss" else {"target": 0.5}
    penalty = form and make(form, model, LAYERS[1:], **strength)
    masks = Masks(model, target_masks(model, LAYERS, 0.4)) if masked else None
    settings = kwargs.pop("settings", dataclasses.replace(SETTINGS, optimizer=optimizer, average=average))
    teachers = [tiny(1).eval(), tiny(2).eval()] if variant == "taught" else []
    result = loop.train("stage", model, TRAIN, test, settings, folder, **{
        "penalty": penalty, "penalty_updates": 3, "masks": masks, "teachers": teachers, "save_seconds": 0, **kwargs})
    return result, model


def log(folder) -> list[dict]:
    """The epochs' lines without their seconds."""
    lines = [json.loads(line) for line in (folder / "stage.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same(one: nn.Module, other: nn.Module):
    for (key, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{key} differs by {(a - b).abs().max()}"


def assert_close(one: nn.Module, other: nn.Module):
    """Sums in another order. The scale of a BatchNorm before another one has hardly a gradient, and Adam, which divides
    by its size, makes steps of the rounding error."""
    for (key, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        tolerance = 1e-4 if key.removesuffix(".weight") in LAYERS else 1e-2
        assert torch.allclose(a, b, rtol=1e-3, atol=tolerance), f"{key} differs by {(a - b).abs().max()}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """variant -> (result, trained model, log) of a run without an interruption."""
    done = {}

    def of(variant):
        if variant not in done:
            folder = tmp_path_factory.mktemp("whole")
            done[variant] = *stage(folder, variant), log(folder)
        return done[variant]
    return of


def state_of(folder) -> dict:
    return json.loads((folder / "stage.state" / "state.json").read_text())


def at_draw(monkeypatch, number, action):
    """`action()` in the middle of step `number` (counted from 1)."""
    count, draw = 0, augmentation.draw

    def counted(*args, **kwargs):
        nonlocal count
        count += "mixing" in kwargs  # those that renew statistics are not mixed
        if count == number and "mixing" in kwargs:
            action()
        return draw(*args, **kwargs)
    monkeypatch.setattr(augmentation, "draw", counted)


# ------------------------------------------------------------------------------------- schedules, draws, optimizer

def test_cosine_with_warmup():
    settings = dataclasses.replace(SETTINGS, epochs=10, lr=0.4, warmup_epochs=2)
    lrs = [learning_rate(settings, step, 100, 10) for step in range(100)]
    assert lrs[0] == pytest.approx(0.4 / 20) and lrs[9] == pytest.approx(0.2) and lrs[19] == pytest.approx(0.4)
    assert lrs[20] == pytest.approx(0.4) and lrs[60] == pytest.approx(0.2)  # half of the 80 steps after the warm-up
    assert lrs[40] == pytest.approx(0.2 * (1 + math.cos(math.pi / 4)))
    assert 0 < lrs[99] < 0.001
    assert all(a > b for a, b in zip(lrs[20:], lrs[21:])) and all(a < b for a, b in zip(lrs[:19], lrs[1:20]))


def test_other_schedules():
    default = dataclasses.replace(SETTINGS, lr=1.0, schedule="default", warmup_epochs=0)
    assert [learning_rate(default, step, 8, 4) for step in range(8)] == pytest.approx([1] * 4 + [0.1] * 2 + [0.01] * 2)
    constant = dataclasses.replace(default, schedule="constant", warmup_epochs=0.5)
    assert [learning_rate(constant, step, 8, 4) for step in range(8)] == [0.5] + [1.0] * 7
    cooled = dataclasses.replace(constant, cooldown=0.75)  # three steps, linearly to what would be zero one step later
    assert [learning_rate(cooled, step, 8, 4) for step in range(8)] == [0.5] + [1.0] * 4 + [0.75, 0.5, 0.25]


@pytest.mark.parametrize("wrong, said", ((dict(schedule="linear"), "linear.*cosine, default, constant"),
                                         (dict(optimizer="lion"), "lion"), (dict(mixing="all"), "all")))
def test_settings_that_do_not_exist(wrong, said):
    with pytest.raises(BadInput, match=said):
        dataclasses.replace(SETTINGS, **wrong)


def test_every_name_has_its_own_generator():
    names = [(0, "rew", "step", 1), (0, "rew", "step", 2), (0, "rew", "order", 1), (0, "masked", "step", 1),
             (1, "rew", "step", 1), (0, "rew", "step", 12), (0, "rew", "step", 1, 2)]
    drawn = [tuple(torch.randint(1 << 62, (2,), generator=loop.generator_for(*name)).tolist()) for name in names]
    assert len(set(drawn)) == len(names)
    # the same on any machine, and for ever: a run can be repeated
    assert loop.generator_for(0, "pretrain", "step", 7).initial_seed() == 5791023614352653473


def test_weight_decay_is_for_weights_alone():
    model = tiny()
    for name, kind in (("sgd", torch.optim.SGD), ("adam", torch.optim.AdamW)):
        optimizer = optimizers.make_optimizer(dataclasses.replace(SETTINGS, optimizer=name, weight_decay=0.1), model)
        assert type(optimizer) is kind
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert {name for name, value in decay.items() if value == 0.1} == {f"{layer}.weight" for layer in LAYERS}
        assert {name for name, value in decay.items() if value == 0} == {
            "linear.bias", "bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"}


def test_mixed_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, math.log(3), 0.0], [math.log(2), 0.0, 0.0]])  # softmax 1/5 3/5 1/5 and 1/2 1/4 1/4
    p = [[0.2, 0.6, 0.2], [0.5, 0.25, 0.25]]
    labels, others, lam = torch.tensor([1, 0]), torch.tensor([0, 2]), torch.tensor([0.75, 1.0])
    for smoothing in (0.0, 0.3):
        target = [[0.25, 0.75, 0.0], [1.0, 0.0, 0.0]]
        target = [[(1 - smoothing) * t + smoothing / 3 for t in row] for row in target]
        expected = -sum(t * math.log(q) for row, probabilities in zip(target, p)
                        for t, q in zip(row, probabilities)) / 2
        found = loop.mixed_cross_entropy(logits, labels, others, lam, smoothing).item()
        assert found == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------------------------------------------ one step by hand

@pytest.mark.parametrize("distill", (None, 0.7))
@pytest.mark.parametrize("form", (None, "loss", "proximal"))
def test_one_step_is_what_the_formulas_say(tmp_path, distill, form):
    """All the images in one batch, nothing augmented: objective, gradient, Nesterov step and soft threshold by hand."""
    settings = Settings(epochs=1, batch_size=52, lr=0.1, schedule="constant", warmup_epochs=0, weight_decay=0.01,
                        smoothing=0.1, augment="none", mixing="none", average=0, refresh=0, distill=0.7,
                        temperature=3.0)
    model, teacher = tiny(), tiny(1).eval()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    lam = 0.05
    penalty = form and make(form, model, ["conv1", "linear"], lam=lam, eps=0.1)
    order = torch.randperm(52, generator=loop.generator_for(0, "stage", "order", 0))

    reference = tiny().train()
    log_p = F.log_softmax(reference(cifar100.normalise(TRAIN.images[order])), 1)
    target = 0.9 * F.one_hot(TRAIN.labels[order], 10) + 0.01
    shown = objective = -(target * log_p).sum(1).mean()
    if distill:
        with torch.no_grad():
            q = F.softmax(teacher(cifar100.normalise(TRAIN.images[order])) / 3, 1)
        student = F.log_softmax(log_p / 3, 1)  # of log p or of the logits: the same
        objective = 0.3 * shown + 0.7 * 9 * (q * (q.log() - student)).sum(1).mean()
    if form == "loss":
        for name in ("conv1.weight", "linear.weight"):
            weight = dict(reference.named_parameters())[name]
            objective = objective + lam * (weight.abs() / (start[name].abs() + 0.1)).sum()
    objective.backward()

    result, _ = stage(tmp_path, test=None, model=model, settings=settings, penalty=penalty or None, penalty_updates=1,
                      teachers=[teacher] if distill else [])
    for name, p in reference.named_parameters():
        gradient = p.grad + (0.01 * start[name] if p.dim() > 1 else 0)
        expected = start[name] - 0.1 * 1.9 * gradient  # the first Nesterov step: g + 0.9 g
        if form == "proximal" and name in ("conv1.weight", "linear.weight"):
            threshold = 0.1 * lam / (start[name].abs() + 0.1)
            expected = expected.sign() * (expected.abs() - threshold).clamp(min=0)
        assert torch.allclose(dict(result.named_parameters())[name], expected, rtol=1e-4, atol=1e-6), name
    assert log(tmp_path)[0]["loss"] == pytest.approx(shown.item(), abs=1e-5)
    assert torch.allclose(result.bn1.running_mean, reference.bn1.running_mean, atol=1e-6)


def test_a_mixed_image_is_right_if_its_greater_part_is(tmp_path):
    """The logged accuracy of one step on mixed images, without a learning rate."""
    settings = Settings(epochs=1, batch_size=52, lr=1e-9, schedule="constant", warmup_epochs=0, augment="none",
                        mixing="mixup", alpha=1.0, clean=0, average=0, refresh=0)
    order = torch.randperm(52, generator=loop.generator_for(0, "stage", "order", 0))
    draws = augmentation.draw(52, loop.generator_for(0, "stage", "step", 0), "none", mixing="mixup",
                              mixup_alpha=1.0)
    x, labels, others, lam = augmentation.augment(TRAIN.images[order], TRAIN.labels[order], draws)
    found = tiny().train()(x).argmax(1)
    right = [bool(guess == (own if share >= 0.5 else other))
             for guess, own, other, share in zip(found, labels, others, lam)]
    stage(tmp_path, test=None, settings=settings)
    assert log(tmp_path)[0]["accuracy"] == pytest.approx(sum(right) / 52, abs=1e-6)
    assert sum(right) != int((found == labels).sum())


def test_the_average_by_hand(tmp_path, monkeypatch):
    steps, update = [], loop.update_average
    model = tiny()
    start = model.state_dict()
    names = [next(key for key, value in start.items() if value.data_ptr() == each.data_ptr())
             for each in loop.averaged(model)]
    assert set(names) == {key for key, value in start.items() if value.is_floating_point()}

    def recorded(average, model, decay):
        steps.append(({key: value.clone() for key, value in zip(names, model, strict=True)}, decay))
        update(average, model, decay)
    monkeypatch.setattr(loop, "update_average", recorded)
    settings = dataclasses.replace(SETTINGS, average=0.25, refresh=0)
    result, _ = stage(tmp_path, settings=settings)
    assert [decay for _, decay in steps] == [0.1, 2 / 11, 0.25] + [0.25] * 6  # (1 + t) / (10 + t) at first
    for key in ("conv2.weight", "linear.bias", "bn1.weight", "bn2.running_var"):
        expected = start[key].double()
        for weights, decay in steps:
            expected = decay * expected + (1 - decay) * weights[key].double()
        assert torch.allclose(result.state_dict()[key].double(), expected, rtol=1e-4, atol=1e-6)


def test_the_average_remembers_three_percent_of_the_steps_made_by_default():
    decays = [loop.average_decay(dataclasses.replace(SETTINGS, average=None), step) for step in range(120)]
    assert decays[-1] == pytest.approx(1 - 1 / 3.6) and decays[59] == pytest.approx(1 - 1 / 1.8)
    assert decays[:33] == [0] * 33 and decays == sorted(decays)


def test_the_end_renews_batchnorm(tmp_path):
    # all 52, in one batch
    result, _ = stage(tmp_path, settings=dataclasses.replace(SETTINGS, augment="none", refresh=10_000))
    with torch.no_grad():
        maps = result.conv1((TRAIN.images.float() - 128) / 64)
    assert not result.training
    assert torch.allclose(result.bn1.running_mean, maps.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(result.bn1.running_var, maps.transpose(0, 1).flatten(1).var(1), rtol=1e-4)


# --------------------------------------------------------------------------------------------------- a stage's course

def test_the_course_of_a_stage(tmp_path, monkeypatch):
    """Every epoch sees an image at most once, in a new order, the last one without mixing; alpha is updated at equal
    distances; a line an epoch is written."""
    seen, mixings, updates = [], [], []
    augment, draw, update = augmentation.augment, augmentation.draw, ReweightedL1.update
    numbers = {image.numpy().tobytes(): i for i, image in enumerate(TRAIN.images)}

    def augmented(images, labels, draws):
        seen.append([numbers[image.numpy().tobytes()] for image in images])
        return augment(images, labels, draws)

    def drawn(*args, mixing, **kwargs):
        mixings.append(mixing)
        return draw(*args, mixing=mixing, **kwargs)

    def updated(self, lr_to_come):
        updates.append(lr_to_come)
        update(self, lr_to_come)
    monkeypatch.setattr(augmentation, "augment", augmented)
    monkeypatch.setattr(augmentation, "draw", drawn)
    monkeypatch.setattr(ReweightedL1, "update", updated)
    result, _ = stage(tmp_path, "proximal", settings=dataclasses.replace(SETTINGS, refresh=0), eval_every=2)
    assert [len(batch) for batch in seen] == [16] * 9
    epochs = [sum(seen[i:i + 3], []) for i in (0, 3, 6)]
    assert all(len(set(epoch)) == 48 for epoch in epochs) and len(set(map(tuple, epochs))) == 3
    assert mixings == ["both"] * 6 + ["none"] * 3
    lrs = [learning_rate(SETTINGS, step, 9, 3) for step in range(9)]
    assert updates == pytest.approx([sum(lrs), sum(lrs[3:]), sum(lrs[6:])])
    lines = log(tmp_path)
    assert [(line["stage"], line["epoch"], line["step"]) for line in lines] == [("stage", e, 3 * e) for e in (1, 2, 3)]
    assert [("test_accuracy" in line) for line in lines] == [False, True, True]
    assert all(line["lambda"] > 0 and 0 <= line["accuracy"] <= 1 for line in lines)
    assert lines[0]["lr"] == pytest.approx(0.05) and lines[2]["zeros"] > 0
    with torch.no_grad():
        logits = result(cifar100.normalise(TEST.images))
    assert lines[2]["test_accuracy"] == (logits.argmax(1) == TEST.labels).sum() / len(TEST)
    assert lines[2]["test_loss"] == pytest.approx(float(F.cross_entropy(logits, TEST.labels)), rel=1e-4)


def test_the_proximal_form_reaches_its_target(tmp_path):
    result, _ = stage(tmp_path, "proximal", settings=dataclasses.replace(SETTINGS, epochs=20))
    weights = torch.cat([result.conv2.weight.flatten(), result.linear.weight.flatten()])
    assert (weights == 0).float().mean() > 0.4 and (weights != 0).any() and (result.conv1.weight != 0).all()


def test_bfloat16_and_odd_batches_train(tmp_path):
    dtypes = {}
    for precision in ("bfloat16", "float32"):
        model, found = tiny(), set()
        model.conv1.register_forward_hook(lambda module, inputs, out: found.add(out.dtype) if module.training else None)
        result, _ = stage(tmp_path / precision, model=model, settings=dataclasses.replace(
            SETTINGS, batch_size=13, precision=precision))
        assert all(value.isfinite().all() and value.dtype != torch.bfloat16 for value in result.state_dict().values())
        assert log(tmp_path / precision)[-1]["step"] == 12
        dtypes[precision] = found
    assert dtypes == {"bfloat16": {torch.bfloat16}, "float32": {torch.float32}}


@pytest.mark.parametrize("optimizer", ("sgd", "adam", "muon"))
@pytest.mark.parametrize("average", (0.0, 0.9))
def test_zeros_stay_exactly_zero(tmp_path, optimizer, average):
    """After every step, in the weights and in their average, whatever momentum and weight decay do."""
    model = tiny()
    keep = target_masks(model, LAYERS, 0.5)
    masks = Masks(model, keep)
    applied, apply = 0, masks.apply

    def checked():
        nonlocal applied
        applied += 1
        # the step moved them
        assert any((module.weight[~keep[name]] != 0).any() for name, module in weight_layers(model))
        apply()
        assert all((module.weight[~keep[name]] == 0).all() for name, module in weight_layers(model))
    masks.apply = checked
    settings = dataclasses.replace(SETTINGS, optimizer=optimizer, average=average, weight_decay=0.1)
    result, _ = stage(tmp_path, model=model, settings=settings, masks=masks)
    assert applied == 9
    for name, module in weight_layers(result):
        assert torch.equal(module.weight != 0, keep[name])
    assert [line["zeros"] for line in log(tmp_path)] == [sum(int((~mask).sum()) for mask in keep.values())] * 3


def test_muon_turns_what_gradual_magnitude_pruning_has_left(tmp_path):
    """The angle of a step is that of the kept weights, under masks that grow."""
    class Weights(list):
        def step(self):
            self.append(model.conv1.weight.detach().flatten().clone())

        def record(self):
            return {}

        def state_dict(self):
            return {}

    model, watch = tiny(), Weights()
    settings = dataclasses.replace(SETTINGS, optimizer="muon", turn=0.05, schedule="constant", warmup_epochs=0)
    pruning = make("magnitude", model, ["conv1"], target=0.9)
    stage(tmp_path, model=model, settings=settings, watch=watch, penalty=pruning)
    cosines = [F.cosine_similarity(*pair, dim=0).item() for pair in itertools.pairwise(watch)]
    assert [int((watch[i] == 0).sum()) for i in (5, 8)] == [274, 375]
    assert [math.acos(cosines[i]) for i in (0, 3, 4, 6, 7)] == pytest.approx([math.atan(0.05)] * 5, rel=0.01)


@pytest.mark.parametrize("save_seconds", (0, 1e9))
def test_a_mask_that_is_not_applied_is_caught(tmp_path, save_seconds):
    model = tiny()
    masks = Masks(model, target_masks(model, LAYERS, 0.5))
    masks.apply = lambda: None
    with pytest.raises(AssertionError, match="no longer zero"):
        stage(tmp_path, model=model, masks=masks, save_seconds=save_seconds)
    assert not (tmp_path / "stage.state" / "state.json").exists()


@pytest.mark.parametrize("save_seconds", (0, 1e9))
def test_a_loss_that_is_not_finite_names_the_learning_rate(tmp_path, save_seconds):
    with pytest.raises(BadInput, match="--lr"):
        stage(tmp_path, settings=dataclasses.replace(SETTINGS, lr=1e30, warmup_epochs=0), save_seconds=save_seconds)


@pytest.mark.parametrize("wrong, processes", ((dict(epochs=0), Processes()), (dict(batch_size=0), Processes()),
                                              (dict(batch_size=15), Processes(0, 2)),
                                              (dict(batch_size=18), Processes(0, 2))))
def test_impossible_batches_are_refused(tmp_path, wrong, processes):
    with pytest.raises(BadInput, match="batch"):
        stage(tmp_path, settings=dataclasses.replace(SETTINGS, **wrong), processes=processes)


def test_image_sizes():
    for text, sizes in (("32", [(32, 1.0)]), ("24:0.5,32", [(24, 0.5), (32, 1.0)]),
                        ("16:0.25,24:0.5,32", [(16, 0.25), (24, 0.75), (32, 1.0)])):
        assert plan.image_sizes(text) == sizes
    for text in ("", "24", "24:0.6", "20:0.6,32", "24:0.6,40", "24:1,32", "24:0,32", "24:-1,32", "24:x,32", "24,32",
                 "24:0.5,16:0.5,32", "32:0.5:1,32", "24:nan,32"):
        with pytest.raises(BadInput, match="sizes"):
            plan.image_sizes(text)


def test_a_stage_ends_with_the_last_size():
    """However few steps it has: its BatchNorm statistics and weights are for that size."""
    settings = dataclasses.replace(SETTINGS, sizes="24:0.98,32", epochs=1, batch_size=10)
    assert plan.Plan(settings, 50, Processes()).sizes == [24] * 4 + [32]


def test_sizes_by_share_of_the_steps(tmp_path, monkeypatch):
    """Finished batches are scaled; the teacher sees them at 32x32, and so does whoever evaluates."""
    seen, taught, resized = [], [], loop.resized
    monkeypatch.setattr(loop, "resized", lambda x, size: seen.append(resized(x, size)) or seen[-1])
    teacher = tiny(1).eval()
    teacher.register_forward_pre_hook(lambda module, inputs: taught.append(inputs[0].shape[-1]))
    evaluated, right = [], torch.ones(3)
    monkeypatch.setattr(loop, "evaluate", lambda network, data: evaluated.append(network.training) or (1.0, right))
    stage(tmp_path, settings=dataclasses.replace(SETTINGS, sizes="16:0.34,24:0.33,32"), teachers=[teacher])
    assert [x.shape[-1] for x in seen] == [16] * 4 + [24] * 3 + [32] * 2 and taught == [32] * 9
    assert [line["size"] for line in log(tmp_path)] == [16, 24, 32] and evaluated == [False] * 3


def test_resized_is_antialiased():
    x = torch.zeros(1, 1, 32, 32)
    x[..., ::2] = 1  # stripes finer than the smaller image can show
    small = loop.resized(x, 16)
    assert small.shape[-1] == 16 and torch.allclose(small[..., 2:-2], torch.tensor(0.5), atol=0.02)
    assert loop.resized(x, 32) is x


def test_several_teachers_in_turns_or_their_mean(tmp_path):
    """In turns: step k has teacher k mod n. Their mean: of their softened probabilities."""
    asked = []
    teachers = [tiny(1).eval(), tiny(2).eval(), tiny(3).eval()]
    for k, teacher in enumerate(teachers):
        teacher.register_forward_hook(lambda module, inputs, out, k=k: asked.append(k))
    stage(tmp_path / "turns", teachers=teachers)
    assert asked == [0, 1, 2] * 3
    asked.clear()
    stage(tmp_path / "mean", teachers=teachers, settings=dataclasses.replace(SETTINGS, teaching="mean"))
    assert asked == [0, 1, 2] * 9

    logits, taught = torch.randn(4, 10), [torch.randn(4, 10), torch.randn(4, 10)]
    p = (F.softmax(taught[0] / 2, 1) + F.softmax(taught[1] / 2, 1)) / 2
    expected = 4 * (p * (p.log() - F.log_softmax(logits / 2, 1))).sum(1).mean()
    assert loop.distillation(logits, taught, 2.0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_progress_where_there_is_no_terminal(tmp_path, capsys):
    stage(tmp_path, show_seconds=0)
    lines = [line for line in capsys.readouterr().out.splitlines() if "images/s" in line]
    assert len(lines) == 9
    assert re.fullmatch(r"stage epoch 0\.67/3: [\d,]+ images/s at 32x32, lr 0\.0\d+, loss \d+\.\d+, train [\d.]+%, "
                        r"22\.2% done, \d+ s left",
                        lines[1])
    stage(tmp_path / "quiet")
    assert "images/s" not in capsys.readouterr().out


def test_the_time_left_is_that_of_the_whole_run(tmp_path, capsys, monkeypatch):
    """Once early, after some steps; and with the stages that follow, in proportion to their images' pixels."""
    monkeypatch.setattr(progress, "FIRST", 4)
    clock = itertools.count(0, 0.1)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))  # a tenth of a second between two looks
    stage(tmp_path, later=9 * 32**2 * SETTINGS.batch_size, show_seconds=100)
    line, = (line for line in capsys.readouterr().out.splitlines() if "images/s" in line)
    rate, = re.findall(r"([\d.]+) images/s", line)
    left, = re.findall(r"(\d+) s of the run left", line)
    assert int(left) == pytest.approx((9 - 4 + 9) * SETTINGS.batch_size / float(rate), abs=1)
    assert [progress.duration(seconds) for seconds in (59.6, 1500, 26280)] == ["60 s", "25 min", "7.3 h"]


# ---------------------------------------------------------------------------------------------------------- resume

# Processes that are killed are forked from a server that has torch loaded already.
fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed", "torch.optim.swa_utils", "numpy", "pytest"])


def run_killed(folder, variant, number, after):
    """Run a stage and die by SIGKILL at the `number`th file, before it gets its name or after."""
    torch.set_num_threads(1)
    count, replace = 0, os.replace

    def killing(*paths):
        nonlocal count
        count += 1
        if count == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
    os.replace = killing
    stage(folder, variant)


def start(target, *args):
    process = fork.Process(target=target, args=args)
    process.start()
    return process


def wait(process) -> int:
    process.join(120)
    if process.is_alive():
        process.kill()
        pytest.fail("a process hangs")
    return process.exitcode


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "sgd"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, whole, variant):
    """Killed anywhere: while a part of the state is written, between the parts and their list, around the log."""
    some = 4 + len(variant) % 3, 14, 24 + len(variant) % 3
    numbers = (1, 4, 5, 9, 14, 23, 24, 30) if variant == "proximal" else some
    moments = {str(number): (number, i % 2) for i, number in enumerate(numbers)}
    processes = [start(run_killed, tmp_path / name, variant, *moment) for name, moment in moments.items()]
    assert [wait(process) for process in processes] == [-signal.SIGKILL] * len(moments)
    result, model, lines = whole(variant)
    resumed_at = set()
    for name in moments:
        folder = tmp_path / name
        resumed_at.add(state_of(folder)["progress"]["step"] if (folder / "stage.state/state.json").exists() else 0)
        mine, trained = stage(folder, variant)
        assert_same(mine, result)
        assert_same(trained, model)
        assert log(folder) == lines
    assert len(resumed_at) > 1


@pytest.mark.parametrize("step", (2, 4))
def test_sigterm_ends_the_step_and_the_run_goes_on(tmp_path, monkeypatch, capsys, whole, step):
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        at_draw(patch, step, lambda: signal.raise_signal(signal.SIGTERM))
        result, _ = stage(tmp_path, "proximal", save_seconds=1e9)
    assert result is None and signal.getsignal(signal.SIGTERM) is before
    out = capsys.readouterr().out
    assert f"stopped at epoch {step / 3:.2f} of 3" in out and "the same command resumes it" in out
    assert state_of(tmp_path)["progress"]["step"] == step and len(log(tmp_path) if step > 2 else []) == step // 3
    result, model = stage(tmp_path, "proximal", save_seconds=1e9)
    assert f"resumes at epoch {step // 3 + 1} of 3" in capsys.readouterr().out
    assert_same(result, whole("proximal")[0])
    assert_same(model, whole("proximal")[1])
    assert log(tmp_path) == whole("proximal")[2]


def test_sigterm_in_the_last_step_lets_it_finish(tmp_path, monkeypatch, whole):
    at_draw(monkeypatch, 9, lambda: signal.raise_signal(signal.SIGTERM))
    arrived = []
    before = signal.signal(signal.SIGTERM, lambda *_: arrived.append("here"))
    try:
        assert_same(stage(tmp_path)[0], whole("sgd")[0])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert arrived  # who started the stage learns of it too


@pytest.mark.parametrize("variant", ("sgd", "masks, no average"))
@pytest.mark.parametrize("work", ("renew_statistics", "evaluate"))
def test_ctrl_c_in_the_last_evaluation_repeats_no_step_and_the_last_line_has_an_accuracy(tmp_path, monkeypatch, capsys,
                                                                                         whole, variant, work):
    expected, done, function = whole(variant), [], getattr(loop, work)

    def interrupted(*args):
        done.append(0)
        if len(done) == 3:
            signal.raise_signal(signal.SIGINT)
        return function(*args)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(loop, work, interrupted)
            with pytest.raises(KeyboardInterrupt):
                stage(tmp_path, variant, save_seconds=1e9)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "stopped at epoch 3.00 of 3" in capsys.readouterr().out and len(log(tmp_path)) == 2
    at_draw(monkeypatch, 1, lambda: pytest.fail("a step is made again"))
    result, model = stage(tmp_path, variant)
    assert "resumes at epoch 3 of 3" in capsys.readouterr().out
    assert_same(result, expected[0])
    assert_same(model, expected[1])
    assert log(tmp_path) == expected[2]


def test_kernels_are_chosen_for_the_modes_in_which_a_stage_trains(tmp_path, monkeypatch):
    frozen, chosen = [], loop.fast_on_a_cpu

    def freeze(model, epoch):
        model.bn1.eval()
    monkeypatch.setattr(loop, "fast_on_a_cpu", lambda model: frozen.append(not model.bn1.training) or chosen(model))
    stage(tmp_path, prepare=freeze, max_seconds=0)
    assert frozen and all(frozen)


def test_the_mean_loss_is_over_the_steps_that_were_made(tmp_path, monkeypatch, capsys):
    """Of an epoch that begins in its middle, too, and after a resume; the progress shows the same."""
    found, gradients = [], loop.Stage.gradients
    monkeypatch.setattr(loop.Stage, "gradients", lambda *args: found.append(gradients(*args)) or found[-1])
    assert stage(tmp_path, start_epoch=4 / 3, max_seconds=0, show_seconds=0)[0] is None
    assert f"loss {found[0][0]:.4f}, train {found[0][1]:.2%}" in capsys.readouterr().out
    stage(tmp_path)
    means = [torch.stack(steps).mean(0).tolist() for steps in (found[:2], found[2:])]
    assert [[line["loss"], line["accuracy"]] for line in log(tmp_path)] == [pytest.approx(m, abs=1e-6) for m in means]


def dropped() -> nn.Module:
    model = tiny()
    model.register_forward_hook(lambda module, inputs, out: F.dropout(out, 0.5, module.training))
    return model


def scaled_at_random() -> nn.Module:
    """By the generators of Python and of numpy."""
    model = tiny()
    model.register_forward_hook(lambda module, inputs, out: out * (
        1 + random.random() * float(np.random.rand()) * module.training))
    return model


@pytest.mark.parametrize("dropped", (dropped, scaled_at_random))
def test_a_network_with_dropout_resumes_bit_for_bit(tmp_path, dropped):
    results = []
    for folder, stops in (("whole", 0), ("parts", 4)):
        for _ in range(stops):
            stage(tmp_path / folder, model=dropped(), max_seconds=0)
        torch.rand(7), random.random(), np.random.rand()  # another process draws other numbers
        results.append(stage(tmp_path / folder, model=dropped())[0])
    assert_same(*results)


def test_a_budget_of_nothing_is_a_step_at_a_time(tmp_path, whole):
    runs = 0
    while (result := stage(tmp_path, "loss+masks", max_seconds=0, save_seconds=1e9)[0]) is None:
        runs += 1
        assert state_of(tmp_path)["progress"]["step"] == runs
    assert runs == 8
    assert_same(result, whole("loss+masks")[0])
    assert log(tmp_path) == whole("loss+masks")[2]


def test_the_seconds_add_up(tmp_path):
    stage(tmp_path, max_seconds=0)
    path = tmp_path / "stage.state" / "state.json"
    record = json.loads(path.read_text())
    assert 0 < record["progress"]["seconds"] < 60
    record["progress"]["seconds"] = 1000.0
    save_record(record, path)
    stage(tmp_path)
    assert 1000 <= json.loads((tmp_path / "stage.jsonl").read_text().splitlines()[0])["seconds"] < 1060


def test_without_resume_it_starts_again(tmp_path, whole):
    stage(tmp_path, max_seconds=0)
    (tmp_path / "stage.state" / next(iter(state_of(tmp_path)["files"].values()))).write_bytes(b"damaged")
    result, _ = stage(tmp_path, resume=False)
    assert_same(result, whole("sgd")[0])
    assert log(tmp_path) == whole("sgd")[2]


@pytest.mark.parametrize("change", (dict(lr=0.06), dict(epochs=4)))
def test_other_settings_do_not_resume(tmp_path, change):
    stage(tmp_path, max_seconds=0)
    (name, value), = change.items()
    with pytest.raises(BadInput, match=f"{name} .* -> {value}.*--no-resume"):
        stage(tmp_path, settings=dataclasses.replace(SETTINGS, **change))


@pytest.mark.parametrize("first, then", ((dict(precision="bfloat16", workers=2), {}),
                                         ({}, dict(precision="bfloat16", workers=2))))
def test_a_run_moves_to_another_machine(tmp_path, first, then):
    """Precision and threads are no settings that a state must match; each epoch's line says how it was trained."""
    settings = dataclasses.replace(SETTINGS, epochs=4)
    for _ in range(4):  # a step at a time: into the second epoch
        stage(tmp_path, max_seconds=0, settings=dataclasses.replace(settings, **first))
    result, _ = stage(tmp_path, settings=dataclasses.replace(settings, **then))
    where = {True: "1 x 2 cpu, bfloat16", False: "1 x 1 cpu, float32"}
    assert [line["where"] for line in log(tmp_path)] == [where[bool(first)]] + [where[bool(then)]] * 3
    alone, _ = stage(tmp_path / "alone", settings=settings)
    cosine = F.cosine_similarity(result.conv1.weight.flatten(), alone.conv1.weight.flatten(), dim=0)
    assert cosine > 0.99 and not torch.equal(result.conv1.weight, alone.conv1.weight)


def test_muon_decays_what_it_does_not_turn():
    model = tiny()
    optimizer = optimizers.make_optimizer(dataclasses.replace(SETTINGS, optimizer="muon", weight_decay=0.1), model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] == 0.1
               for p in group["params"]}
    assert decayed == {"conv2.weight", "linear.weight"}


def test_unequal_shares_count_by_their_images(tmp_path):
    """A step of three workers by hand: 52 images are 16, 18 and 18."""
    settings = Settings(epochs=1, batch_size=52, lr=0.1, schedule="constant", warmup_epochs=0, weight_decay=0.0,
                        smoothing=0.0, augment="none", mixing="none", average=0, refresh=0, workers=3)
    parts = torch.randperm(52, generator=loop.generator_for(0, "stage", "order", 0)).split((16, 18, 18))
    models = [tiny().train() for _ in parts]
    for model, index in zip(models, parts):
        loss = F.cross_entropy(model(cifar100.normalise(TRAIN.images[index])), TRAIN.labels[index])
        (len(index) / 52 * loss).backward()
    result, _ = stage(tmp_path, test=None, settings=settings)
    for ours, *theirs in zip(result.parameters(), *(model.parameters() for model in models)):
        # Nesterov's first step is 1 + momentum times the gradient
        expected = theirs[0].detach() - 0.1 * 1.9 * sum(each.grad for each in theirs)
        assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-6)


def test_statistics_are_renewed_on_images_augmented_as_in_training(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "renew_statistics", lambda model, data, *args: seen.append(args[:2]))
    stage(tmp_path, settings=dataclasses.replace(SETTINGS, augment="plain"))
    assert seen == [(40, "plain")] * 3


def test_trained_quantization_steps_move_between_gpu_and_cpu():
    """Adam's `capturable` is that of the machine: with that of a GPU's state a CPU refuses to make a step."""
    def new(capturable):
        weight, step = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
        weight.grad, step.grad = torch.ones(2), torch.ones(2)
        return step, optimizers.Together([torch.optim.SGD([weight], lr=0.1),
                                          torch.optim.Adam([{"params": [step], "factor": 2.0}], capturable=capturable)])
    _, there = new(False)
    there.step()
    state = there.state_dict()
    state["1"]["param_groups"][0]["capturable"] = True
    step, here = new(False)
    here.load_state_dict(state)
    here.step()
    assert (here.param_groups[1]["capturable"], here.param_groups[1]["factor"]) == (False, 2.0)
    assert here.optimizers[1].state[step]["step"] == 2
    _, gpu = new(True)  # no step: it needs a GPU
    gpu.load_state_dict(there.state_dict())
    assert gpu.param_groups[1]["capturable"] and "capturable" not in gpu.param_groups[0]


class Assigning(nn.Module):
    """A normalisation that gives its buffer a new tensor, or makes one, in every forward pass."""

    def __init__(self, makes: bool):
        super().__init__()
        self.tiny, self.makes = tiny(), makes
        if not makes:
            self.register_buffer("mean", torch.zeros(10))

    def forward(self, x):
        x = self.tiny(x)
        if self.makes:
            self.register_buffer("mean", x.mean(0).detach())
        else:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        return x - self.mean


@pytest.mark.parametrize("makes", (False, True))
def test_a_buffer_that_is_replaced_is_refused(makes):
    steps = plan.Plan(SETTINGS, 52, Processes())
    with pytest.raises(BadInput, match="makes or replaces the buffer mean: make it in __init__, and change it in"):
        trial.try_network(lambda: Assigning(makes), "Assigning", 10, steps, torch.device("cpu"))


class Stepping(nn.Module):
    def __init__(self):
        super().__init__()
        self.tiny, self.log_step = tiny(), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.tiny(x) * self.log_step.mean()


def test_steps_are_trained_at_a_rate_of_their_own(tmp_path):
    """Adam's first step is as long as its rate, whatever the gradient; that of the weights does not matter."""
    settings = dataclasses.replace(SETTINGS, epochs=1, batch_size=52, schedule="constant", warmup_epochs=0, average=0.0,
                                   step_rate=0.002)
    result, _ = stage(tmp_path, model=Stepping(), settings=settings)
    torch.testing.assert_close((result.log_step - 1).abs(), torch.full((3,), 0.002), rtol=1e-2, atol=0)


CONSTANT = dataclasses.replace(SETTINGS, schedule="constant", epochs=4, cooldown=1, warmup_epochs=0.5)


def test_the_length_may_change_while_the_rate_is_constant(tmp_path):
    """The longer run is what it would have been with that plan from the start, bit for bit."""
    run, resized, late = (tmp_path / name for name in ("run", "resized", "late"))
    for _ in range(8):  # of 12 steps: the rate falls from the 10th on
        stage(run, max_seconds=0, settings=CONSTANT)
    with pytest.raises(BadInput, match="lr 0.05 -> 0.04.*--run folder$|epochs .*lr .*--run folder$"):
        stage(run, settings=dataclasses.replace(CONSTANT, epochs=6, lr=0.04))
    with pytest.raises(BadInput, match="epochs 4 -> 3.*only while"):  # under the new plan it would have been falling
        stage(run, settings=dataclasses.replace(CONSTANT, epochs=3))
    shutil.copytree(run, resized)
    shutil.copytree(run, late)
    longer = dataclasses.replace(CONSTANT, epochs=6, cooldown=2)
    assert stage(run, max_seconds=0, settings=longer)[0] is None
    result, _ = stage(run, settings=longer)
    assert [line["epoch"] for line in log(run)] == [1, 2, 3, 4, 5, 6]
    assert [line["lr"] for line in log(run)] == pytest.approx([0.05] * 4 + [0.05 * 4 / 7, 0.05 / 7])
    assert_same(stage(tmp_path / "planned", settings=longer)[0], result)
    small, _ = stage(resized, settings=dataclasses.replace(longer, sizes="24:0.5,32"))
    assert not torch.equal(small.conv1.weight, result.conv1.weight)
    for _ in range(2):
        stage(late, max_seconds=0, settings=CONSTANT)
    with pytest.raises(BadInput, match="epochs 4 -> 8.*only while the learning rate is constant"):
        stage(late, settings=dataclasses.replace(CONSTANT, epochs=8))


def test_what_a_stop_leaves_is_what_the_stage_would_give(tmp_path):
    """stage.average.pt: float16, zeros and statistics as at the end; and a stage is taken up from it."""
    model = tiny()
    for _ in range(4):
        stage(tmp_path, "loss+masks", max_seconds=0)
    left = torch.load(tmp_path / "stage.average.pt", weights_only=True)
    state = loop.State(tmp_path / "stage.state", None)
    average = state.read("average")
    assert all(value.dtype == torch.float16 for value in left.values() if value.dim() > 1)  # vectors where it fits
    for name in LAYERS:
        assert torch.equal(left[f"{name}.weight"], average[f"{name}.weight"].half())
    zeros, count = (sum(f(left[f"{name}.weight"]) for name in LAYERS)
                    for f in (lambda w: int((w == 0).sum()), torch.numel))
    assert zeros >= 0.4 * count
    assert not torch.equal(left["bn1.running_mean"], average["bn1.running_mean"].half())  # renewed

    model.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in left.items()})
    for path in (tmp_path / "stage.state").iterdir():
        path.unlink()
    result, _ = stage(tmp_path, model=model, start_epoch=4 / 3)
    assert [line["step"] for line in log(tmp_path)] == [3, 6, 9]  # the first was there before
    assert result is not None
    stage(tmp_path / "late", max_seconds=0)
    with pytest.raises(BadInput, match="cannot resume at epoch 3: the stage has 3"):
        stage(tmp_path / "late", start_epoch=3, resume=False)
    assert state_of(tmp_path / "late")["progress"]["step"] == 1  # it is still there


@pytest.mark.parametrize("limit, step", ((4, 2), (30, 4), (1e9, None)))
def test_a_stage_ends_within_its_time(tmp_path, monkeypatch, limit, step):
    """The time for BatchNorm statistics and evaluation at the end is left: estimated first, and measured later.

    A step of 16 images takes 1 s, so 40 + 30 images at half of its pace 2.2 s; in fact they take 10 + 5 s.
    """
    clock = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])

    def slow(function, seconds):
        def slower(*args, **kwargs):
            clock[0] += seconds
            return function(*args, **kwargs)
        return slower
    for where, name, seconds in ((loop.Stage, "learn", 1), (loop, "renew_statistics", 10), (loop, "evaluate", 5)):
        monkeypatch.setattr(where, name, slow(getattr(where, name), seconds))
    finished = stage(tmp_path, max_seconds=limit)[0] is not None
    assert finished == (step is None) and (finished or state_of(tmp_path)["progress"]["step"] == step)
    assert clock[0] <= limit + (10 if step == 2 else 0)  # what the first estimate does not know


def test_a_stop_at_an_epochs_end_evaluates_once(tmp_path, monkeypatch):
    renewed, renew = [], loop.renew_statistics
    monkeypatch.setattr(loop, "renew_statistics", lambda *args: renewed.append(0) or renew(*args))
    for _ in range(3):  # three steps are an epoch
        assert stage(tmp_path, max_seconds=0)[0] is None
    assert len(renewed) == 3 and len(log(tmp_path)) == 1


def test_another_penalty_or_mask_or_teacher_or_set_does_not_resume(tmp_path):
    """They decide the result too, though they are no Settings."""
    def changed(word, **kwargs):
        with pytest.raises(BadInput, match=f"other settings.*{word}"):
            loop.train("stage", model, kwargs.pop("data", TRAIN), TEST, SETTINGS, tmp_path, **{**same, **kwargs})

    model = tiny()
    same = {"penalty": ReweightedL1(model, LAYERS, target=0.5), "penalty_updates": 3, "teachers": [tiny(1).eval()],
            "masks": Masks(model, target_masks(model, LAYERS, 0.3)), "save_seconds": 0}
    loop.train("stage", model, TRAIN, TEST, SETTINGS, tmp_path, max_seconds=0, **same)
    model = tiny()
    same["masks"] = Masks(model, target_masks(tiny(), LAYERS, 0.3))
    for penalty in (dict(target=0.6), dict(lam=1e-3), dict(target=0.5, eps=0.1),
                    dict(target=0.5, kind="filter")):
        changed("penalty", penalty=ReweightedL1(model, LAYERS, **penalty))
    changed("penalty", penalty=make("loss", model, LAYERS, lam=1e-3))
    changed("penalty", penalty=ReweightedL1(model, LAYERS[:2], target=0.5))
    changed("penalty", penalty=None)
    changed("penalty", penalty=ReweightedL1(model, LAYERS, target=0.5), penalty_updates=4)
    same["penalty"] = ReweightedL1(model, LAYERS, target=0.5)
    changed("teacher", teachers=[tiny(2).eval()])
    changed("teacher", teachers=[])
    changed("images", data=cifar100.made_up(54, 0, classes=10))
    changed("masks", masks=None)
    assert loop.train("stage", model, TRAIN, TEST, SETTINGS, tmp_path, **same) is not None
    changed("masks", masks=Masks(model, target_masks(tiny(), LAYERS, 0.4)))


def test_as_many_other_images_are_another_run(tmp_path, monkeypatch):
    """A hold-out split in place of made-up images, say."""
    assert stage(tmp_path, max_seconds=0)[0] is None
    before = (tmp_path / "stage.state" / "state.json").read_bytes()
    monkeypatch.setitem(globals(), "TRAIN", cifar100.made_up(len(TRAIN), 5, classes=10))
    with pytest.raises(BadInput, match="other settings .data "):
        stage(tmp_path, max_seconds=0)
    assert (tmp_path / "stage.state" / "state.json").read_bytes() == before


def test_a_damaged_state_is_named(tmp_path):
    stage(tmp_path / "whole", max_seconds=0)
    record, weights = state_of(tmp_path / "whole"), (tmp_path / "whole/stage.state/weights-1.pt").read_bytes()
    middle = len(weights) // 2

    def saved(value) -> bytes:
        torch.save(value, buffer := io.BytesIO())
        return buffer.getvalue()

    def signed(content: dict) -> bytes:
        return json.dumps(content | {"digest": digest(content)}).encode()

    changes = (dict(step=10**9), dict(step=-1), dict(step=2.0), dict(step="x"), dict(step=None), dict(loss="1"),
               dict(log=7))
    changed = [record | {"progress": record["progress"] | change} for change in (dict(step=2), *changes)]
    lists = b'{"progress": {', signed({}), json.dumps(changed[0]).encode(), *map(signed, changed[1:])
    parts = (("weights-1.pt", weights[:1000]), ("weights-1.pt", saved({"conv.weight": torch.zeros(1)})),
             ("weights-1.pt", weights[:middle] + bytes([weights[middle] ^ 1]) + weights[middle + 1:]),
             ("average-1.pt", saved(os.system)), ("optimizer-1.pt", None))
    for i, (name, content) in enumerate((*parts, *(("state.json", content) for content in lists))):
        path = shutil.copytree(tmp_path / "whole", tmp_path / str(i)) / "stage.state" / name
        path.write_bytes(content) if content is not None else path.unlink()
        with pytest.raises(BadInput, match="stage.state|the stage has 3") as error:
            stage(tmp_path / str(i))
        assert "\n" not in str(error.value)


def test_what_a_kill_left_over_goes(tmp_path):
    stage(tmp_path, max_seconds=0)
    folder = tmp_path / "stage.state"
    for name in ("weights-999.pt", "optimizer-2.pt.abc.tmp"):
        (folder / name).write_bytes(b"half")
    (folder / "mine").mkdir()
    stage(tmp_path, max_seconds=0)
    assert {path.name for path in folder.iterdir()} == {"mine", "state.json", *state_of(tmp_path)["files"].values()}
    loop.State(folder, SETTINGS).remove()
    assert [path.name for path in folder.iterdir()] == ["mine"]
    (folder / "mine").rmdir()
    loop.State(folder, SETTINGS).remove()
    assert not folder.exists()


def test_the_log_behind_a_start_epoch_is_cut(tmp_path):
    stage(tmp_path)
    stage(tmp_path, start_epoch=1)
    assert [line["step"] for line in log(tmp_path)] == [3, 6, 9]


def test_the_bar_of_a_terminal_counts_the_steps(tmp_path, monkeypatch):
    bars, clock = [], itertools.count()

    class Bar:
        def __init__(self, **options):
            self.options, self.made, self.closed = options, 0, False
            bars.append(self)

        def set_postfix(self, **_):
            pass

        def update(self, steps):
            self.made += steps

        def close(self):
            self.closed = True

    monkeypatch.setattr(progress, "progress_bar", Bar)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    stage(tmp_path)
    assert [(bar.options["total"], bar.options["initial"], bar.made, bar.closed) for bar in bars] == [
        (3, 0, 3, True)] * 3


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, whole):
    stage(tmp_path, max_seconds=0)
    for number in range(1, 5):  # each of the three parts, then their list
        with monkeypatch.context() as patch:
            count, replace = 0, os.replace

            def full(*paths):
                nonlocal count
                count += 1
                if count == number:
                    raise OSError(28, "No space left on device", str(paths[1]))
                replace(*paths)
            patch.setattr(os, "replace", full)
            with pytest.raises(OSError, match="No space"):
                stage(tmp_path)
        assert not list(tmp_path.rglob("*.tmp")) and state_of(tmp_path)["progress"]["step"] == 1
    assert_same(stage(tmp_path)[0], whole("sgd")[0])


def test_a_second_save_at_the_same_step_leaves_the_first_whole(tmp_path):
    """As when the time of an evaluation at the end runs out again, with statistics that it had changed."""
    state = loop.State(tmp_path, SETTINGS)
    progress = {"step": 7, "since": 0, "loss": 0.0, "correct": 0, "seconds": 0.0, "log": []}
    state.save(progress, {"weights": {"w": torch.zeros(1)}, "average": {"w": torch.zeros(1)}})
    with pytest.raises((AttributeError, pickle.PicklingError)):
        state.save(progress, {"weights": {"w": torch.ones(1)}, "average": {"w": lambda: 0}})
    for value in (0, 2, 3):
        if value:
            state.save(progress, {"weights": {"w": torch.full((1,), float(value))}})
        assert float(state.read("weights")["w"]) == value
        assert len(list(tmp_path.glob("weights-*"))) == (1 if value else 2)


def test_a_part_that_is_replaced_while_it_is_read_is_read_anew(tmp_path, monkeypatch):
    """As by `tools.compare` while the stage is trained."""
    state, record = loop.State(tmp_path, SETTINGS), loop.State.record
    progress = {"step": 7, "since": 0, "loss": 0.0, "correct": 0, "seconds": 0.0, "log": []}
    state.save(progress, {"weights": {"w": torch.zeros(1)}})

    def replaced(self):
        monkeypatch.setattr(loop.State, "record", record)
        found = record(self)
        state.save(progress | {"step": 8}, {"weights": {"w": torch.ones(1)}})
        return found

    monkeypatch.setattr(loop.State, "record", replaced)
    assert float(state.read("weights")["w"]) == 1
    (tmp_path / "weights-8.pt").unlink()
    with pytest.raises(BadInput, match="weights-8.pt: not part of a stage's state .No such file"):
        state.read("weights")


class Attention(nn.Module):
    """Tiny with a constant of which no sum of two can be made, and a block that is left out in the first steps."""

    def __init__(self):
        super().__init__()
        self.net, self.block, self.calls = tiny(), nn.Linear(10, 10), 0
        self.mask = nn.Buffer(torch.triu(torch.full((10, 10), torch.finfo(torch.float32).min), 1))
        self.seen = nn.Buffer(torch.zeros(()))  # it moves in training, and is no statistic of BatchNorm

    def forward(self, x):
        x = self.net(x) + self.mask.exp()[0]
        self.calls += self.training
        self.seen += self.training
        return x + self.block(x) if self.calls > 3 or not self.training else x


@pytest.mark.parametrize("optimizer", ("sgd", "muon"))
@pytest.mark.parametrize("workers", (1, 2))
def test_constants_stay_and_a_block_may_get_its_first_gradient_late(tmp_path, optimizer, workers):
    settings, model = dataclasses.replace(SETTINGS, optimizer=optimizer, workers=workers), Attention()
    before = model.block.weight.detach().clone()
    result, _ = stage(tmp_path, model=model, settings=settings)
    assert torch.equal(result.mask, Attention().mask) and result.seen == model.seen == 9
    assert not torch.equal(result.block.weight, before) and result.block.weight.isfinite().all()


@pytest.mark.parametrize("optimizer", ("sgd", "muon", "adam"))
def test_a_weight_with_gaps_in_memory_is_trained_as_any_other(tmp_path, optimizer):
    """Such as one that was cut out of a larger one; torch's fused SGD is wrong for it."""
    settings, models = dataclasses.replace(SETTINGS, optimizer=optimizer), [tiny(), tiny()]
    weight = models[1].linear.weight
    larger = torch.zeros(len(weight), 2 * weight.shape[1])
    models[1].linear.weight = nn.Parameter(larger[:, ::2].copy_(weight.detach()))
    assert not models[1].linear.weight.is_contiguous()
    assert_same(*(stage(tmp_path / str(i), model=model, settings=settings)[0] for i, model in enumerate(models)))


def test_a_number_that_is_no_weight_is_not_averaged(tmp_path):
    model = tiny()
    model.steps = nn.Parameter(torch.tensor([3]), requires_grad=False)
    assert stage(tmp_path, model=model)[0].steps == 3


def test_a_state_with_weights_that_are_not_finite_replaces_none(tmp_path):
    """The loss was still finite in the step that spoilt them."""
    model, watch = tiny(), types.SimpleNamespace(record=dict, state_dict=dict, step=lambda: None)
    with pytest.raises(KeyboardInterrupt):
        watch.step = lambda: signal.raise_signal(signal.SIGINT)
        stage(tmp_path, model=model, watch=watch)
    before = {path.name: path.read_bytes() for path in (tmp_path / "stage.state").iterdir()}
    watch.step, watch.load_state_dict = lambda: model.conv1.weight.data.fill_(math.nan), lambda state: None
    with pytest.raises(BadInput, match="the weights are not finite; give a lower --lr, with --no-resume or in another"):
        stage(tmp_path, model=model, watch=watch)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "stage.state").iterdir()}


def run_on_little_space(folder):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing beyond the limit is an OSError then, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        loop.State(folder / "stage.state", SETTINGS).save({"step": 2}, {"weights": {"weight": torch.zeros(100_000)}})
    except OSError as error:
        sys.exit(10 if error.errno == errno.EFBIG else 11)


def test_a_disk_that_fills_up_in_the_middle_of_a_file_is_an_os_error(tmp_path):
    stage(tmp_path, max_seconds=0)
    before = {path.name: path.read_bytes() for path in (tmp_path / "stage.state").iterdir()}
    code = wait(start(run_on_little_space, tmp_path))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "stage.state").iterdir()}
    assert code == 10  # run_script makes one line and status 2 of it


def test_two_workers_by_hand(tmp_path):
    """One step: the mean of the gradients of two halves, each normalised by itself; running statistics are their
    mean."""
    settings = Settings(epochs=1, batch_size=52, lr=0.1, schedule="constant", warmup_epochs=0, weight_decay=0.0,
                        smoothing=0.0,
                        augment="none", mixing="none", average=0, refresh=0, workers=2)
    order = torch.randperm(52, generator=loop.generator_for(0, "stage", "order", 0))
    reference = tiny().train()
    halves = [copy.deepcopy(reference) for _ in range(2)]
    for half, index in zip(halves, order.split(26)):
        F.cross_entropy(half(cifar100.normalise(TRAIN.images[index])), TRAIN.labels[index]).backward()
    result, _ = stage(tmp_path, test=None, settings=settings)
    for (name, ours), first, second in zip(result.named_parameters(), *(half.parameters() for half in halves)):
        expected = first.detach() - 0.1 * 1.9 * (first.grad + second.grad) / 2
        assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-6), name
    for ours, first, second in zip(result.buffers(), *(half.buffers() for half in halves)):
        assert torch.allclose(ours.double(), (first.double() + second) / 2, atol=1e-6)


# ------------------------------------------------------------------------------------------------ several processes

def shared(rank, folder):
    """Save what a process has after it took over the first one's tensors."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(rank)
    larger = torch.rand(4, 6)
    tensors = {"gaps": larger[:, ::2], "short": torch.tensor([rank, 7], dtype=torch.int16),
               "flag": torch.tensor(not rank), "none": torch.rand(0),
               "maps": torch.rand(2, 3, 2, 2).to(memory_format=torch.channels_last),
               "half": torch.rand(3).bfloat16(), "number": torch.tensor(rank),
               "both": torch.rand(4, 1, 3, 3).to(memory_format=torch.channels_last)}
    Processes(rank, 2).share([*tensors.values()])
    save_tensors({name: value.clone() for name, value in tensors.items()} | {"between": larger[:, 1::2].clone()},
                 folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_all_processes_begin_with_the_weights_of_the_first(tmp_path):
    """Of any type and layout; a network may have drawn its own from numpy, say."""
    assert [wait(process) for process in [start(shared, rank, tmp_path) for rank in (0, 1)]] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert not torch.equal(first.pop("between"), second.pop("between"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def in_two(rank, folder, variant, changes, kwargs):
    """One of two processes on gloo, which meet at a file; the first writes what came out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    optimizer, _, _, average = VARIANTS[variant]
    settings = dataclasses.replace(SETTINGS, **{"optimizer": optimizer, "average": average, **changes})
    result, model = stage(folder, variant, settings=settings, processes=Processes(rank, 2), **kwargs)
    if result is not None:
        save_tensors(result.state_dict(), folder / f"result{rank}.pt")
        save_tensors(model.state_dict(), folder / f"trained{rank}.pt")
    dist.destroy_process_group()


def two(folder, variant, changes={}, **kwargs):
    folder.mkdir(exist_ok=True)
    (folder / "meeting").unlink(missing_ok=True)
    assert [wait(process) for process in [start(in_two, rank, folder, variant, changes, kwargs)
                                          for rank in (0, 1)]] == [0, 0]


def loaded(path) -> nn.Module:
    model = tiny()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def in_shares(folder, variant):
    """One process of two workers: (result, trained model)."""
    optimizer, _, _, average = VARIANTS[variant]
    settings = dataclasses.replace(SETTINGS, optimizer=optimizer, average=average, workers=2)
    return stage(folder, variant, settings=settings)


@pytest.mark.parametrize("variant", ("taught", "muon+masks"))
def test_two_processes_train_what_two_workers_train(tmp_path, variant):
    two(tmp_path / "two", variant)
    result, model = in_shares(tmp_path / "one", variant)
    lines, tmp_path = log(tmp_path / "one"), tmp_path / "two"
    assert_close(loaded(tmp_path / "result0.pt"), result)
    assert_close(loaded(tmp_path / "trained0.pt"), model)
    assert_same(loaded(tmp_path / "result0.pt"), loaded(tmp_path / "result1.pt"))
    assert_same(loaded(tmp_path / "trained0.pt"), loaded(tmp_path / "trained1.pt"))
    for mine, theirs in zip(log(tmp_path), lines, strict=True):  # a line an epoch, written once
        assert (mine.pop("where"), theirs.pop("where")) == ("2 x 1 cpu, float32", "1 x 2 cpu, float32")
        assert mine.pop("stage") == theirs.pop("stage")
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-3)


def test_a_run_of_two_goes_on_in_two_bit_for_bit_and_alone(tmp_path):
    two(tmp_path / "whole", "loss+masks")
    two(tmp_path / "parts", "loss+masks", max_seconds=0)
    assert state_of(tmp_path / "parts")["progress"]["step"] == 1
    shutil.copytree(tmp_path / "parts", tmp_path / "alone")
    two(tmp_path / "parts", "loss+masks")
    assert_same(loaded(tmp_path / "whole/result0.pt"), loaded(tmp_path / "parts/result0.pt"))
    assert log(tmp_path / "whole") == log(tmp_path / "parts")
    assert_close(in_shares(tmp_path / "alone", "loss+masks")[0], loaded(tmp_path / "whole/result0.pt"))
