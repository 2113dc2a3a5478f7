"""Fine-tuning on the grids, by quantize.py's command line."""
import copy
import json
import math
import signal
from pathlib import Path

import pytest
import torch

import quantize
from compressed import cifar100, grids, networks, normalisation
from compressed import exact_network as exact_module
from compressed.errors import BadInput
from compressed.files import load_json, save_tensors, sha256
from compressed.graph import weight_layers
from compressed.grids import SCHEMES, calibrate
from compressed.networks import load_checkpoint
from small import FEW_BITS, SPEC, few
from test_quantize import ladder, options, short_and_whole
from training import fine_tune, learned_steps, loop

TUNE = ("--epochs", "1", "--batch-size", "50", "--augment", "none", "--mixing", "none", "--no-cuda")


def test_fine_tuning_keeps_the_zeros(small_checkpoint, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    checkpoint = folder / "masked.pt"
    checkpoint.write_bytes(small_checkpoint.read_bytes())
    plain, tuned = tmp_path / "plain.pt", tmp_path / "tuned.pt"
    assert quantize.main(options(checkpoint, plain, "channel")) == 0
    assert quantize.main(options(checkpoint, tuned, "channel", *TUNE)) == 0
    claim, untouched = load_json(tuned.with_suffix(".json")), load_json(plain.with_suffix(".json"))
    assert [step["step"] for step in claim["accuracy_by_step"]] == [
        *ladder("channel")[:4], "fine-tuned for 1 epochs", *ladder("channel")[4:],
        claim["accuracy_by_step"][-1]["step"]]
    assert short_and_whole(tuned)
    assert claim["accuracy_by_step"][:4] == untouched["accuracy_by_step"][:4]
    masked, before, after = (load_checkpoint(path, SPEC) for path in (checkpoint, plain, tuned))
    changed = 0
    for (name, zeros), (_, old), (_, new) in zip(*map(weight_layers, (masked, before, after))):
        assert (new.weight[zeros.weight == 0] == 0).all()
        changed += int((old.weight != new.weight).sum())
    assert changed > 1000 and not torch.equal(before.linear.bias, after.linear.bias)
    made = tmp_path / "tuned.run"
    log = [json.loads(line) for line in (made / "quantized.jsonl").read_text().splitlines()]
    assert len(log) == 1 and log[0]["stage"] == "quantized" and 0 <= log[0]["oscillating_depthwise"] <= 1
    assert not (made / "quantized.state").exists() and sha256(checkpoint) == claim["made_by"]["source_sha256"]
    assert list(folder.iterdir()) == [checkpoint]


def test_every_fine_tuning_has_a_folder_of_its_own():
    """A sweep over bit tables fine-tunes one checkpoint: the next one neither stops nor replaces the one before."""
    folders = [quantize.parse(["--out", out]).tuning_folder for out in ("b4.pt", "b5.pt")]
    assert list(map(str, folders)) == ["b4.run", "b5.run"]


@pytest.mark.parametrize("words, said", (
    (["--cooldown", "1"], "--cooldown belongs to --schedule constant"),
    (["--schedule", "constant", "--cooldown", "2"], "--cooldown 2: the stage has 1 epochs"),
    (["--teacher", "nowhere.pt"], "nowhere.pt: no such checkpoint"), (["--sizes", "24"], "image sizes '24'"),
    (["--batch-size", "1", "--sizes", "8:0.5,32"], "give a larger --batch-size")))
def test_a_fine_tuning_that_cannot_begin_is_refused_before_the_grids(small_checkpoint, tmp_path, monkeypatch, capsys,
                                                                     words, said):
    monkeypatch.setattr(quantize, "on_grids", None)
    with pytest.raises((BadInput, SystemExit)) as error:
        quantize.main(options(small_checkpoint, tmp_path / "out.pt", "channel", *TUNE, *words))
    assert said in f"{error.value} {capsys.readouterr().err}" and not list(tmp_path.glob("*.pt"))


def test_a_size_at_which_the_network_does_not_run_is_refused_before_the_grids(tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "on_grids", None)
    Path("mine.py").write_text("""
from torch import nn

class Flat(nn.Sequential):
    def __init__(self, num_classes=10):
        super().__init__(nn.Conv2d(3, 4, 3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, num_classes))
""")
    save_tensors(networks.make("mine.py:Flat", 10).state_dict(), Path("flat.pt"))
    words = [*TUNE, "--network", "mine.py:Flat", "--sizes", "24:0.5,32", "--made-up", "100"]
    with pytest.raises(BadInput, match=r"mine.py:Flat: its forward pass fails for images .1, 3, 24, 24. .*--sizes 32"):
        quantize.main(["--checkpoint", "flat.pt", "--out", "out.pt", *words])
    assert not list(tmp_path.glob("out*.pt"))


def test_a_finished_fine_tuning_is_taken_up(small_checkpoint, tmp_path, monkeypatch):
    """The same command, on another machine perhaps, ships what quantized.pt holds; with other options it is refused."""
    checkpoint = tmp_path / "masked.pt"
    checkpoint.write_bytes(small_checkpoint.read_bytes())
    tune = (*TUNE, "--tuning-folder", str(tmp_path), "--optimizer", "muon", "--turn", "0.001", "--teacher",
            str(small_checkpoint), str(checkpoint))
    first, second = tmp_path / "first.pt", tmp_path / "second.pt"
    assert quantize.main(options(checkpoint, first, "channel", *tune)) == 0
    monkeypatch.setattr(quantize, "on_grids", None)
    monkeypatch.setattr(fine_tune, "fine_tune", None)
    assert quantize.main(options(checkpoint, second, "channel", *tune)) == 0
    assert first.read_bytes() == second.read_bytes()
    one, other = (load_json(path.with_suffix(".json")) for path in (first, second))
    assert one["accuracy_by_step"] == other["accuracy_by_step"] and one["activations"] == other["activations"]
    assert [stage["stage"] for stage in other["made_by"]["training"]] == ["quantized"]
    with pytest.raises(BadInput, match="quantized.pt was fine-tuned from another checkpoint or with other options"):
        quantize.main(options(checkpoint, second, "channel", *tune, "--lr", "0.5"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    teacher = elsewhere / small_checkpoint.name
    moved = [str(teacher) if word == str(small_checkpoint) else word for word in tune]
    assert quantize.main(options(checkpoint, second, "channel", *moved)) == 0  # without the file that was the teacher
    with pytest.raises(BadInput, match="fine-tuned from another checkpoint or with other options"):  # another argument
        quantize.main(options(checkpoint, second, "channel", *tune, "--network", f"{SPEC}?num_classes=100"))
    teacher.write_bytes(b"of the same name")
    with pytest.raises(BadInput, match="or with other options, teachers or code"):
        quantize.main(options(checkpoint, second, "channel", *moved))
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "quantized.pt")
    with pytest.raises(BadInput, match="not what a fine-tuning writes .*; --no-resume"):
        quantize.main(options(checkpoint, second, "channel", *tune))
    monkeypatch.undo()

    def killed(*_):
        raise KeyboardInterrupt
    (tmp_path / "quantized.start.pt").write_bytes(b"of other options")
    monkeypatch.setattr(fine_tune, "save_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize.main(options(checkpoint, second, "channel", *tune, "--lr", "0.5", "--no-resume"))
    assert not (tmp_path / "quantized.start.pt").exists()  # else it would be taken up with these options
    monkeypatch.undo()
    monkeypatch.setattr(fine_tune.loop.Stage, "step", killed)  # another one begins in the same folder, and does not end
    with pytest.raises(KeyboardInterrupt):
        quantize.main(options(checkpoint, second, "channel", *tune, "--lr", "0.5", "--no-resume"))
    assert not (tmp_path / "quantized.pt").exists()
    monkeypatch.undo()
    monkeypatch.setattr(quantize, "on_grids", None)  # the same command finds the network on its grids
    assert quantize.main(options(checkpoint, second, "channel", *tune, "--lr", "0.5")) == 0
    again = load_json(second.with_suffix(".json"))["accuracy_by_step"]
    assert again[:4] == one["accuracy_by_step"][:4] and len(again) == len(one["accuracy_by_step"])
    assert not list(tmp_path.glob("quantized.st*"))


def test_a_signal_in_the_last_step_keeps_the_result(small_checkpoint, tmp_path, monkeypatch):
    arrived, step = [], loop.Stage.step

    def last(self, *args):
        step(self, *args)
        if self.progress["step"] == self.plan.steps:
            signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(loop.Stage, "step", last)
    before = signal.signal(signal.SIGTERM, lambda *_: arrived.append(True))
    try:
        assert quantize.main(options(small_checkpoint, tmp_path / "out.pt", "layer", *TUNE)) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert arrived == [True] and (tmp_path / "out.run/quantized.pt").is_file()
    assert not list(tmp_path.glob("out.run/quantized.st*"))


def test_a_change_of_the_networks_file_is_noticed(small_checkpoint, tmp_path, monkeypatch):
    words = options(small_checkpoint, tmp_path / "out.pt", "layer", *TUNE)
    monkeypatch.setattr(fine_tune, "code_of", lambda stage, options: {"network": "old"})
    assert quantize.main(words) == 0
    monkeypatch.setattr(fine_tune, "code_of", lambda stage, options: {"network": "new"})
    with pytest.raises(BadInput, match="other options, teachers or code of the network; --no-resume fine-tunes again"):
        quantize.main(words)


def test_two_fine_tunings_in_one_folder_are_refused(small_checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    words, refused, tune = options(small_checkpoint, tmp_path / "out.pt", "channel", *TUNE), [], fine_tune.fine_tune

    def tune_meanwhile(*args):
        for resume in ([], ["--no-resume"], []):  # none of them takes the lock away
            with pytest.raises(BadInput, match="out.run/quantized.lock: another process is at work there"):
                quantize.main(words + resume)
            refused.append(True)
        return tune(*args)
    monkeypatch.setattr(fine_tune, "fine_tune", tune_meanwhile)
    assert quantize.main([*words, "--no-resume"]) == 0 and len(refused) == 3
    assert not list(tmp_path.glob("out.run/*.lock"))


def test_a_teacher_trained_elsewhere_has_its_normalisation(small_checkpoint, tmp_path, monkeypatch):
    """A network that teaches itself: on its grids or not, its logits are nearly those of its teacher."""
    taught, normalise = [], ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    monkeypatch.setattr(fine_tune.loop, "train", lambda *_, teachers, **__: taught.extend(teachers))
    monkeypatch.setattr(quantize.normalisation, "fold", lambda model, *_: model)  # its border has no exact fold
    shown = "/".join(",".join(map(str, values)) for values in normalise)
    with pytest.raises(BadInput, match="was stopped"):
        quantize.main(options(small_checkpoint, tmp_path / "out.pt", "channel", *TUNE, "--normalise", shown,
                              "--teacher", str(small_checkpoint)))
    x = cifar100.normalise(cifar100.made_up(4, 0).images)
    wanted = normalisation.Renormalised(load_checkpoint(small_checkpoint, SPEC), *normalise)
    with torch.no_grad():
        assert torch.allclose(taught[0](x), wanted(x), rtol=1e-3, atol=1e-3)


def test_the_learning_rate_of_adam_is_another():
    rates = [quantize.tuning_options(quantize.parse(["--epochs", "1", *words]), cifar100.CIFAR100,
                                     torch.device("cpu"), "").settings.lr
             for words in ([], ["--optimizer", "adam"], ["--optimizer", "adam", "--lr", "0.5"])]
    assert rates == [0.01, 0.001, 0.5]


def test_what_has_no_effect_on_the_fine_tuning_is_named(small_checkpoint, tmp_path, capsys):
    words = options(small_checkpoint, tmp_path / "out.pt", "layer", *TUNE, "--distill", "0.5", "--turn", "0.1",
                    "--clean", "0.4", "--lr", "0.001")
    assert quantize.main(words) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "has no effect" in line]
    assert said == ["--turn has no effect without --optimizer muon", "--distill has no effect without --teacher",
                    "--clean has no effect without mixing"]


def test_labels_are_smoothed_where_no_teacher_is():
    found = [quantize.tuning_options(quantize.parse(["--epochs", "1", *words]), cifar100.CIFAR100,
                                     torch.device("cpu"), "").settings.smoothing
             for words in ([], ["--teacher", "t.pt"])]
    assert found == [0.1, 0.0]


@pytest.mark.parametrize("frozen, moving", ((0.0, [True, True]), (0.5, [True, False]), (1.0, [False, False])))
def test_statistics_are_frozen_for_the_last_part(small_checkpoint, tmp_path, monkeypatch, frozen, moving):
    seen, step = [], loop.Stage.step

    def noted(self, *args):
        before = next(value.clone() for name, value in self.model.named_buffers() if name.endswith("running_mean"))
        done = step(self, *args)
        after = next(value for name, value in self.model.named_buffers() if name.endswith("running_mean"))
        seen.append(not torch.equal(before, after))
        return done
    monkeypatch.setattr(loop.Stage, "step", noted)
    assert quantize.main(options(small_checkpoint, tmp_path / "out.pt", "layer", *TUNE, "--epochs", "2", "--batch-size",
                                 "100", "--frozen", str(frozen))) == 0
    assert seen == moving


def test_the_gradients_of_roundings():
    """Of a power of two, d 2^x / dx at the rounded exponent; of a value that is rounded, the gradient of the value."""
    x = torch.tensor([-2.3, 0.6, 1.0], requires_grad=True)
    y = learned_steps.power_of_two(x)
    assert y.tolist() == [0.25, 2.0, 2.0]
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach() * math.log(2))
    latent = torch.tensor([0.3, 0.9], requires_grad=True)
    rounded = learned_steps.straight_through(torch.tensor([0.0, 1.0]), latent)
    (rounded * torch.tensor([2.0, 3.0])).sum().backward()
    assert rounded.tolist() == [0.0, 1.0] and latent.grad.tolist() == [2.0, 3.0]


def test_fine_tuning_trains_everything_but_zeros_and_statistics(small_checkpoint, tmp_path):
    """A gradient reaches every weight and every step through every rounding."""
    model = load_checkpoint(small_checkpoint, SPEC)
    args = quantize.parse(["--checkpoint", str(small_checkpoint), "--lr", "0.001", "--teacher", str(small_checkpoint),
                           "--scheme", "layer", "--step-rate", "0.01", "--network", SPEC, "--tuning-folder",
                           str(tmp_path), *TUNE])
    chosen = quantize.grid_options(args, model)
    tuning = quantize.tuning_options(args, cifar100.CIFAR100, torch.device("cpu"), "")
    grids.quantize_weights(model, chosen.table, "layer")
    exact_module.quantize_activations(model, calibrate(model, cifar100.made_up(10, 0).images, 8, "max"))
    before, steps = copy.deepcopy(model.state_dict()), fine_tune.with_steps(model)
    data = cifar100.made_up(20, 0)
    tuned = fine_tune.fine_tune(model, data, data, tuning, chosen)
    for name, value in tuned.state_dict().items():
        if "running" in name or "batches" in name:
            assert torch.equal(value, before[name])  # BatchNorm statistics are frozen
    moved = [name for name, value in tuned.named_parameters() if not torch.equal(value, before[name])]
    assert len(moved) == len(list(tuned.named_parameters()))
    for name, module in weight_layers(tuned):
        zero = before[f"{name}.weight"] == 0
        assert zero.any() and not module.weight[zero].any()
        if name != "linear":  # a power of two, as of activations: one step of training moves none of them
            assert module.step != steps[f"{name}.step"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_trained_steps_are_those_that_the_forward_pass_used(small_checkpoint, scheme):
    """Making the steps trained parameters, moving them, and fixing them again changes no logit."""
    model = load_checkpoint(small_checkpoint, SPEC)
    images, generator = cifar100.made_up(10, 0).images, torch.Generator().manual_seed(0)
    grids.quantize_weights(model, grids.bit_table("4", model), scheme)
    if scheme == "channel":
        grids.shorten_scales(model)
    exact_module.quantize_activations(model, calibrate(model, images, 8, "mse"))
    x = cifar100.normalise(images)
    with torch.no_grad():
        first = model(x)
        learned_steps.learn_steps(model, scheme)
        # a float32 logarithm moves a step by some 2^-24, and with it a value that lies on a half
        assert (model(x) - first).abs().max() < 0.2 * first.std()
        for name, parameter in model.named_parameters():
            if name.endswith("log_step"):
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        moved = model(x)
        assert (moved - first).abs().max() > first.std()
        learned_steps.fix_steps(model, scheme)
        assert torch.allclose(model(x), moved, rtol=1e-4, atol=1e-4)
    assert not any("log_step" in name for name in model.state_dict())


def test_oscillating_weights_are_counted():
    """One weight of eight goes up and down, one goes up and stays, and one moves below the grid's resolution."""
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1, bias=False), torch.nn.Conv2d(2, 2, 1, groups=2, bias=False),
                                torch.nn.Linear(2, 1, bias=False))
    for layer, kind in zip(model, (learned_steps.LearnedConv2d, learned_steps.LearnedConv2d,
                                   learned_steps.LearnedLinear)):
        torch.nn.init.ones_(layer.weight)
        layer.__class__, layer.bits, layer.log_step = kind, 4, torch.nn.Parameter(torch.tensor(-1.0))
    watch = learned_steps.Oscillation(model)
    model[0].weight.data[0, 0] = 0  # it does not count, and leaves seven

    def look(first: float, second: float, third: float) -> None:
        for parameter, value in ((model[1].weight, first), (model[2].weight, second), (model[0].weight, third)):
            parameter.data.view(-1)[-1] = value
        for _ in range(watch.every):
            watch.step()

    look(1.0, 1.0, 1.0)
    look(1.5, 1.5, 1.1)
    assert watch.record() == {"oscillating": 0, "oscillating_depthwise": 0}
    look(1.5, 1.5, 1.0)
    look(1.0, 1.5, 1.1)  # back, although not at once
    resumed = learned_steps.Oscillation(model)
    resumed.load_state_dict(copy.deepcopy(watch.state_dict()))
    for each in watch, resumed:
        assert each.record() == {"oscillating": round(1 / 7, 6), "oscillating_depthwise": 0.5}
    look(1.0, 2.0, 1.0)
    assert watch.record() == {"oscillating": 0, "oscillating_depthwise": 0}


def test_a_trained_quantizer_clips_as_its_plain_one():
    plain, x = exact_module.Quantizer(8, False, 2.0**-4, 6.0), torch.tensor([-1.0, 3.3, 5.99, 6.5, 20.0])
    assert torch.equal(learned_steps.LearnedQuantizer(plain)(x), plain(x)) and plain(x).max() == 6


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_gradient_reaches_every_step(scheme):
    torch.manual_seed(0)
    model, images = few(), cifar100.made_up(8, 0).images
    grids.quantize_weights(model, FEW_BITS, scheme)
    exact_module.quantize_activations(model, calibrate(model, images, 8, "mse"))
    learned_steps.learn_steps(model, scheme)
    model(cifar100.normalise(images)).square().sum().backward()
    gradients = [value.grad for name, value in model.named_parameters() if name.endswith("log_step")]
    assert len(gradients) == 26 + 24 and all(each is not None and each.any() for each in gradients)


def test_the_width_of_the_scales_is_that_of_the_trained_steps(tmp_path, monkeypatch):
    seen, data = [], cifar100.made_up(20, 0)
    for name in ("learn_steps", "fix_steps"):
        monkeypatch.setattr(fine_tune, name, lambda *args, name=name: seen.append((name, *args[1:])))
    monkeypatch.setattr(fine_tune.loop, "train", lambda name, model, *args, **kwargs: model)
    monkeypatch.setattr(fine_tune, "Oscillation", lambda model: None)
    monkeypatch.setattr(fine_tune, "with_steps", lambda model: {})
    args = quantize.parse(["--epochs", "1", "--scale-bits", "8", "--network", SPEC, "--tuning-folder", str(tmp_path)])
    tuning = quantize.tuning_options(args, data.data_set, torch.device("cpu"), "")
    fine_tune.fine_tune(model := few(), data, data, tuning, quantize.grid_options(args, model))
    assert seen == [("learn_steps", "channel", 8), ("fix_steps", "channel", 8)]
