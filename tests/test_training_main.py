"""The command line of training, run in the process on a tiny network, and for a few cases as it stands."""
import argparse
import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from compressed import cifar100, files, networks
from compressed.errors import BadInput
from compressed.graph import weight_layers
from compressed.networks import load_checkpoint
from mobilenet_v2 import MobileNetV2
from small import save_stage
from tiny import SPEC as TINY
from training import arguments, augmentation
from training import main as training
from training import runs, sparsity
from training.masks import group_norms, prune_ratios
from training.runs import training_record
from training.state import State

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "training" / "main.py"
NARROW = "mobilenet_v2:MobileNetV2?width=0.25"
CPU = torch.device("cpu")
# FACTS: the submission's command, as its users know it, and its second with other words for these
REW = ("--arch mobilenetv2 --depth 17 --batch-size 64 --no-tricks --rew --sparsity-type irregular --epoch 300 --optmzr "
       "adam --lr 0.001 --lr-scheduler cosine --warmup --warmup-epochs 5 --mixup --alpha 0.3 --smooth --smooth-eps 0.1")
MASKED = REW.replace("--rew --sparsity-type irregular",
                     "--masked-retrain --sparsity-type threshold --config-file config_mobile_v2_0.7")
# two steps a stage
QUICK = "--made-up 32 --batch-size 16 --epochs 1 --no-cuda --precision float32 --lr 0.01 --average 0.9 --workers 1"


@pytest.fixture
def narrow(monkeypatch):
    """All layers of the default network, with all of its shortcuts."""
    monkeypatch.setattr(networks, "DEFAULT", "mobilenet_v2:MobileNetV2?width=0.5")


@pytest.fixture
def small(monkeypatch):
    """Three layers: conv1, conv2 (depthwise) and linear."""
    monkeypatch.setattr(networks, "DEFAULT", TINY)


def run(options, folder="run") -> int:
    return training.main([*options.split(), "--run", str(folder)])


def script(options, **kwargs):
    return subprocess.run([sys.executable, str(SCRIPT), *options.split()], capture_output=True, text=True, timeout=120,
                          **kwargs)


def load(path, network=TINY):
    return load_checkpoint(path, network)


def zeros(model) -> dict[str, int]:
    return {name: int((module.weight == 0).sum()) for name, module in weight_layers(model)}


def save(model, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)


def lines(path) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in Path(path).read_text().splitlines()]


def assert_same(one: Path, other: Path):
    one, other = torch.load(one), torch.load(other)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --------------------------------------------------------------------------------------- the submission's commands

def test_the_documented_commands_stand_in_run_sh():
    text = (ROOT / "training" / "run.sh").read_text()
    assert f"main.py {REW}" in text and f"main.py {MASKED}" in text


def test_the_first_documented_command_means_what_it_meant():
    args = arguments.parse(REW.split())
    settings = arguments.settings_for("rew", args, CPU)
    assert (settings.epochs, settings.batch_size, settings.optimizer, settings.lr) == (300, 64, "adam", 0.001)
    # --no-tricks turns the tricks off that the same command names
    tricks = settings.mixing, settings.smoothing, settings.warmup_epochs, settings.schedule
    assert tricks == ("none", 0.0, 0, "constant")
    model = MobileNetV2(width=0.25)
    penalty = sparsity.make_penalty(args, model)
    assert (penalty.kind, penalty.form, penalty.lam, penalty.target) == ("irregular", "loss", 1e-6, None)
    assert penalty.eps == 1e-3
    assert args.rew and not args.pretrain and not args.masked_retrain
    assert args.updates == 5


def test_a_target_of_the_reweighted_stage_in_a_recipe_is_the_masks_too():
    """Before the reweighted stage has written its options."""
    Path("mine.toml").write_text("[rew]\ntarget-sparsity = 0.5\n")
    assert run(f"{QUICK} --network {TINY} --recipe mine.toml --sparsity-type filter") == 0
    assert lines("run/masked.jsonl")[-1]["zeros"] > 0


def test_the_second_documented_command_means_what_it_meant():
    args = arguments.parse(MASKED.split())
    assert args.masked_retrain and not args.rew and args.epochs == 300
    model = MobileNetV2(width=0.5)
    with torch.no_grad():
        for _, module in weight_layers(model):
            module.weight.view(-1)[0] = 0.99e-4
            module.weight.view(-1)[1] = -1.01e-4
    sparsity.make_masks(args, model)
    for name, module in weight_layers(model):
        pruned = name in prune_ratios("config_mobile_v2_0.7", model)
        assert (module.weight.view(-1)[0] == 0) == pruned == (name not in ("conv1", "linear"))
        assert module.weight.view(-1)[1] == torch.tensor(-1.01e-4)


def test_a_layer_without_any_weight_left_is_named(capsys):
    model = MobileNetV2(width=0.25)
    with torch.no_grad():
        model.linear.weight.mul_(1e-4)
    sparsity.make_masks(arguments.parse(["--masked-retrain", "--target-sparsity", "0.5"]), model, print)
    assert capsys.readouterr().out.endswith("masked: all weights of linear are zero\n")


def test_the_tricks_are_on_without_no_tricks():
    args = arguments.parse(REW.replace("--no-tricks ", "").split())
    settings = arguments.settings_for("rew", args, CPU)
    assert (settings.mixing, settings.alpha, settings.smoothing, settings.warmup_epochs, settings.schedule) == (
        "mixup", 0.3, 0.1, 5, "cosine")
    args = arguments.parse("--no-mixup --no-smooth --no-warmup --lr-scheduler default".split())
    settings = arguments.settings_for("pretrain", args, CPU)
    tricks = settings.mixing, settings.smoothing, settings.warmup_epochs, settings.schedule
    assert tricks == ("none", 0.0, 0, "default")
    args = arguments.parse("--no-tricks --schedule constant --cooldown 5".split())
    assert arguments.settings_for("rew", args, CPU).cooldown == 0


def test_steps_are_recorded_as_graphs_unless_told_otherwise():
    assert [arguments.settings_for("rew", arguments.parse(words), CPU).graphs for words in ([], ["--no-graphs"])] == [
        True, False]


def test_defaults_of_the_stages():
    args = arguments.parse([])
    for stage in training.STAGES:
        settings = arguments.settings_for(stage, args, CPU)
        assert (settings.epochs, settings.lr, settings.smoothing) == {
            "pretrain": (300, 0.4, 0.1), "rew": (120, 0.1, 0.1), "masked": (200, 0.2, 0.1)}[stage]
        taught = arguments.settings_for(stage, arguments.parse(["--teacher", "t.pt"]), CPU)
        assert dataclasses.replace(taught, smoothing=0.1) == settings and taught.smoothing == 0
        assert settings.mixing == "both" and settings.average is None
        muon = arguments.settings_for(stage, arguments.parse(["--optimizer", "muon"]), CPU)
        assert dataclasses.replace(muon, optimizer="sgd") == settings and muon.turn == 0.01
    penalty = sparsity.make_penalty(args, MobileNetV2(width=0.25))
    assert (penalty.kind, penalty.form, penalty.target) == ("irregular", "proximal", 0.8)


def test_magnitude_takes_the_penaltys_place():
    args = arguments.parse(["--rew", "--penalty", "magnitude", "--target-sparsity", "0.7"])
    pruning = sparsity.make_penalty(args, MobileNetV2(width=0.25))
    assert (pruning.form, pruning.target, args.updates) == ("magnitude", 0.7, 100)
    assert "conv1" not in pruning.options()["layers"]
    assert arguments.parse([]).updates == 20 and arguments.parse("--lambda 1".split()).updates == 5
    assert arguments.parse("--penalty magnitude --updates 10".split()).updates == 10
    for wrong in ("--lambda 1", "--sparsity-type filter", "--updates 9"):
        with pytest.raises(SystemExit):
            arguments.parse(["--penalty", "magnitude", *wrong.split()])
    penalty = sparsity.make_penalty(arguments.parse("--rew --penalty proximal --sparsity-type filter".split()),
                                    MobileNetV2(width=0.25))
    assert (penalty.form, penalty.kind, penalty.target) == ("proximal", "filter", 0.8)


def test_a_rule_of_ones_own_is_called_without_gradients(small):
    Path("own.py").write_text("from training.penalties import Penalty\nclass Rule(Penalty):\n"
                              "    def after_step(self, lr):\n"
                              "        for weight in self.weights:\n"
                              "            weight.mul_(weight.abs() >= weight.abs().flatten().quantile(self.target))\n")
    assert run(QUICK + " --rew --penalty own.py:Rule --target-sparsity 0.7 --average 0") == 0
    assert 0.6 < lines("run/rew.jsonl")[-1]["zeros_share"] < 0.75


def test_a_target_is_not_dropped(capsys):
    Path("own.py").write_text("from training.penalties import Penalty\nclass Ridge(Penalty):\n"
                              "    def __init__(self, model, layers, lam=1e-4):\n"
                              "        super().__init__(model, layers, lam=lam)\n"
                              "    def loss(self):\n        return self.lam * self.weights[0].square().sum()\n")
    arguments.parse(["--rew", "--penalty", "own.py:Ridge"])
    with pytest.raises(SystemExit):
        arguments.parse(["--rew", "--penalty", "own.py:Ridge", "--target-sparsity", "0.9"])
    assert "--penalty own.py:Ridge has no --target-sparsity" in capsys.readouterr().err


def test_the_penalty_of_the_page_runs(small, lp):
    """By a command like the one there; test_feedback.py looks at what it reaches."""
    page = (ROOT / "training" / "README.md").read_text(encoding="utf-8")
    command = re.search(r"main.py --recipe default (--rew --penalty \S+)", page)[1].replace('"', "")
    assert run(f"{QUICK} {command} --epochs 9 --sizes 8:0.8,32 --refresh 0 --eval-every 0") == 0
    line = lines("run/rew.jsonl")[-1]
    assert line["zeros_path"] == pytest.approx(0.8) and line["zeros_share"] > 0.3
    with pytest.raises(BadInput, match=r"trained with other options \(penalty lp.py:Lp.p=0.5 -> lp.py:Lp.p=1"):
        run(f"{QUICK} {command.replace('p=0.5', 'p=1')} --epochs 9 --sizes 8:0.8,32 --refresh 0")


def test_a_change_of_the_users_own_file_is_noticed(small, lp, capsys):
    """When a stage is finished, and when it is resumed."""
    command = QUICK + " --rew --penalty lp.py:Lp --refresh 0 --eval-every 0"
    assert run(command + " --max-minutes 0") == 0
    assert "was changed since" not in capsys.readouterr().out

    def rewrite(content):  # as for a new process
        Path("lp.py").write_text(content)
        networks._digests.clear()

    rewrite(lp.replace("p=0.5", "p=0.7"))
    assert run(command) == 0
    assert "rew: the file of --penalty was changed since this stage began" in capsys.readouterr().out
    with pytest.raises(BadInput, match="trained with other options .code .*penalty"):
        run(command)
    rewrite(lp)
    assert run(command) == 0 and "exists; --no-resume trains it again" in capsys.readouterr().out


def test_a_default_that_is_given_is_no_other_option(small, capsys):
    command = QUICK + " --rew --refresh 0 --eval-every 0"
    assert run(command) == 0
    assert "rew: penalty proximal, target 0.8, irregular, " in capsys.readouterr().out
    options = json.loads(Path("run/rew.options.json").read_text())["options"]
    assert (options["penalty"], options["lam"], options["target_sparsity"]) == ("proximal", None, 0.8)
    assert run(command + " --target-sparsity 0.8 --penalty proximal") == 0
    with pytest.raises(BadInput, match="trained with other options .target_sparsity 0.8 -> 0.7"):
        run(command + " --target-sparsity 0.7")


def test_the_documented_commands_run(narrow, capsys):
    """As they stand, with the size of the job alone changed at the end."""
    small = " --epoch 1 --made-up 32 --batch-size 16 --no-cuda --precision float32"
    assert run(REW + small) == 0
    # there is no dense checkpoint yet; the submission's began so too
    assert "random weights" in capsys.readouterr().err
    options = json.loads(Path("run/rew.options.json").read_text())
    assert options["settings"]["optimizer"] == "adam" and options["options"]["sparsity_type"] == "irregular"
    assert lines("run/rew.jsonl")[0]["lambda"] == 1e-6

    state = torch.load("run/rew.pt")  # too few steps to make anything small: do it by hand
    state["layers.3.conv1.weight"][::2] *= 1e-6
    torch.save(state, "run/rew.pt")
    assert run(MASKED + small) == 0
    made = zeros(load("run/masked.pt", networks.DEFAULT))
    for name, count in made.items():
        pruned = name not in ("conv1", "linear")
        assert count == (state[f"{name}.weight"].abs() < 1e-4).sum() * pruned, name
    assert made["layers.3.conv1"] >= state["layers.3.conv1.weight"].numel() // 2


# ---------------------------------------------------------------------------------------------------------- stages

def test_the_whole_job_with_the_real_network(capsys):
    """No option: three stages; the target is reached; the same command again has nothing to do."""
    command = QUICK + " --target-sparsity 0.77 --sizes 8:0.5,32 --refresh 16"
    assert run(command) == 0
    assert {path.name for path in Path("run").iterdir()} == {
        f"{stage}.{kind}" for stage in training.STAGES for kind in ("pt", "average.pt", "jsonl", "options.json")}
    model = load("run/masked.pt", networks.DEFAULT)
    count, sizes = zeros(model), {name: module.weight.numel() for name, module in weight_layers(model)}
    assert count["conv1"] == 0
    assert sum(count.values()) >= 0.77 * sum(size for name, size in sizes.items() if name != "conv1")
    assert sum(count.values()) < 0.95 * sum(sizes.values())  # nothing opposes in two steps, so the penalty overshoots
    assert lines("run/masked.jsonl")[-1]["zeros"] == sum(count.values())
    assert sum(zeros(load("run/pretrain.pt", networks.DEFAULT)).values()) == 0
    assert os.stat("run/masked.pt").st_mode & 0o777 == 0o644

    capsys.readouterr()
    times = {path: path.stat().st_mtime_ns for path in Path("run").iterdir()}
    assert run(command) == 0
    assert capsys.readouterr().out.count(".pt exists") == 3
    assert times == {path: path.stat().st_mtime_ns for path in Path("run").iterdir()}


def test_no_resume_starts_a_stage_again(small, capsys):
    assert run(QUICK + " --pretrain") == 0
    first = Path("run/pretrain.pt").read_bytes()
    assert run(QUICK + " --pretrain") == 0  # it is there
    assert "--no-resume" in capsys.readouterr().out and Path("run/pretrain.pt").read_bytes() == first
    for other in ("--seed 5", f"--network {NARROW}", "--made-up 40"):
        with pytest.raises(BadInput, match=f"trained with other options .{other[2:6]}.*--no-resume"):
            run(QUICK + f" --pretrain {other}")
    assert Path("run/pretrain.pt").read_bytes() == first
    with pytest.raises(BadInput):
        run(QUICK + " --pretrain --no-resume --schedule constant --cooldown 150")
    assert Path("run/pretrain.pt").read_bytes() == first  # what is refused loses nothing
    assert run(QUICK + " --pretrain --seed 5 --no-resume") == 0
    assert Path("run/pretrain.pt").read_bytes() != first and len(lines("run/pretrain.jsonl")) == 1
    assert run(QUICK + " --pretrain --no-resume") == 0
    save(load("run/pretrain.pt"), Path("again.pt"))
    Path("first.pt").write_bytes(first)
    assert_same(Path("again.pt"), Path("first.pt"))


def test_a_stage_that_begins_anew_keeps_nothing_of_the_one_before(small):
    """Nor removes what it starts from."""
    assert run(QUICK) == 0 and run(QUICK + " --no-resume --max-minutes 0") == 0
    left = sorted(path.name for path in Path("run").iterdir())
    assert left == ["pretrain.average.pt", "pretrain.options.json", "pretrain.state"]
    with pytest.raises(BadInput, match="run/pretrain.state would be removed, which is read"):
        run(QUICK + " --pretrain --start run/pretrain.state --no-resume")
    assert sorted(path.name for path in Path("run").iterdir()) == left


@pytest.mark.parametrize("held_out", (True, False))
def test_a_teacher_that_saw_the_hold_out_is_named(tmp_path, capsys, held_out):
    save_stage(tmp_path, "pretrain", {"holdout": held_out})
    teacher = tmp_path / "pretrain.pt"
    teacher.touch()
    options = argparse.Namespace(run=Path("run"), start=None, start_epoch=0, seed=0, teacher=[teacher])
    job = argparse.Namespace(args=argparse.Namespace(holdout=True), keeps_start=lambda stage: False, say=print)
    training.warn_of_images("pretrain", options, job)
    said = f"warning: {teacher}: the stage pretrain was trained without --holdout: the network has seen these images"
    assert (said in capsys.readouterr().err) != held_out


def test_muon_that_turns_nothing_is_said(small, capsys):
    Path("bare.py").write_text("""
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 100))
""")
    for network, said in (("bare.py:net", True), (TINY, False)):
        assert run(f"{QUICK} --pretrain --optimizer muon --network {network} --no-resume") == 0
        assert ("so Muon turns none: SGD trains all weights" in capsys.readouterr().out) == said


def test_a_length_that_changes_is_said(small, capsys):
    constant = " --pretrain --schedule constant --no-warmup"
    assert run(QUICK + constant + " --max-minutes 0") == 0
    assert run(QUICK.replace("--epochs 1", "--epochs 2") + constant) == 0
    assert "run/pretrain.state: the stage goes on with another length (epochs 1 -> 2)" in capsys.readouterr().err


@pytest.mark.parametrize("options", ("--no-warmup --warmup-epochs 0.2", "--no-smooth --smoothing 0.1"))
def test_a_switch_and_its_value_exclude_each_other(small, options, capsys):
    with pytest.raises(SystemExit):
        run(f"{QUICK} {options}")
    assert "exclude each other" in capsys.readouterr().err


def test_a_state_is_never_resumed_from_other_weights(small):
    """Whether the stage before was lost, or all stages are trained again and that is interrupted."""
    assert run(QUICK + " --pretrain") == 0 and run(QUICK + " --rew --max-minutes 0") == 0
    trained, of_it = Path("run/pretrain.pt").rename("kept.pt"), Path("run/pretrain.jsonl").read_text()
    before = {path: path.read_bytes() for path in Path("run").glob("*/*")}
    with pytest.raises(BadInput, match="rew.state was trained from other weights than those of the stage before"):
        run(QUICK)
    assert before == {path: path.read_bytes() for path in Path("run").glob("*/*")}
    assert run(QUICK + " --no-resume --max-minutes 0") == 0
    assert Path("run/pretrain.state").is_dir() and not Path("run/rew.state").exists()
    trained.rename("run/pretrain.pt"), Path("run/pretrain.jsonl").write_text(of_it)
    assert run(QUICK) == 0
    assert run(QUICK + " --rew --no-resume --seed 3") == 0 and Path("run/masked.pt").is_file()  # with other zeros now
    with pytest.raises(BadInput, match="masked.pt was trained with other options .start_sha256 .* -> "):
        run(QUICK)
    with pytest.raises(BadInput, match="the stage masked was trained from other weights than those that are there now"):
        training_record("run/masked.average.pt")
    assert len(training_record("run/rew.average.pt")) == 2
    assert run(QUICK + " --masked-retrain --no-resume --max-minutes 0") == 0
    assert run(QUICK + " --rew --no-resume --seed 4") == 0
    with pytest.raises(BadInput, match="masked.state was trained from other weights than those of the stage before"):
        run(QUICK + " --masked-retrain")
    assert run(QUICK + " --masked-retrain --no-resume") == 0 and len(training_record("run/masked.pt")) == 3


def test_weights_between_those_that_are_there_are_not_trained_again(small):
    """A masked network that is there would no longer come from them."""
    assert run(QUICK) == 0
    Path("run/rew.pt").rename("kept.pt")
    with pytest.raises(BadInput, match="masked.pt is there, and rew.pt, which comes before it, is not: bring that"):
        run(QUICK)
    assert run(QUICK + " --masked-retrain") == 0 and run(QUICK + " --rew") == 0 and run(QUICK) == 0


def test_a_stage_that_is_resumed_keeps_its_start(small):
    """The command that goes on need not name it."""
    assert run(QUICK + " --pretrain") == 0
    save(networks.make(TINY), Path("mine.pt"))
    assert run(QUICK + " --rew --start mine.pt --max-minutes 0") == 0
    assert run(QUICK + " --rew") == 0
    record = json.loads(Path("run/rew.options.json").read_text())
    assert record["options"]["start"] == "mine.pt" and record["start_sha256"] == files.sha256(Path("mine.pt"))
    assert run(QUICK) == 0 and len(training_record("run/masked.pt")) == 3


def test_a_start_epoch_stays_in_the_record(small):
    save(networks.make(TINY), Path("mine.pt"))
    command = QUICK.replace("--epochs 1", "--epochs 4") + " --pretrain"
    assert run(command + " --start mine.pt --start-epoch 2 --max-minutes 0") == 0
    assert run(command) == 0
    options = json.loads(Path("run/pretrain.options.json").read_text())["options"]
    assert (options["start"], options["start_epoch"]) == ("mine.pt", 2) and len(lines("run/pretrain.jsonl")) == 2


def test_a_folder_without_a_state_is_none(small, capsys):
    """A kill during the first save leaves one: the weights are those of --start, and the record says so."""
    save(networks.make(TINY), Path("mine.pt"))
    Path("run/pretrain.state").mkdir(parents=True)
    Path("run/pretrain.state/weights-1.pt").write_bytes(b"half")
    assert run(QUICK + " --pretrain --start mine.pt") == 0
    assert "--start has no effect" not in capsys.readouterr().out
    record = json.loads(Path("run/pretrain.options.json").read_text())
    assert record["options"]["start"] == "mine.pt" and record["start_sha256"] == files.sha256(Path("mine.pt"))


def test_a_short_stage_is_made_longer(small):
    """Its warm-up, a quarter of the epochs, becomes longer with it, unless the learning rate would fall by that."""
    settings = {epochs: arguments.settings_for("pretrain", arguments.parse(
        ["--pretrain", "--schedule", "constant", "--epochs", str(epochs)]), CPU) for epochs in (8, 16)}
    assert [each.warmup_epochs for each in settings.values()] == [2, 4]
    state = State(Path("a.state"), settings[8])
    for step, taken in ((5, False), (7, False), (8, True), (16, True)):  # of two steps an epoch
        state.save({"step": step, "since": 0, "loss": 0.0, "correct": 0, "seconds": 0.0, "log": []}, {})
        with contextlib.nullcontext() if taken else pytest.raises(BadInput, match="while the learning rate is const"):
            assert State(Path("a.state"), settings[16]).load(CPU, 2)[0]["step"] == step


def test_networks_without_layers_to_prune(capsys):
    Path("mine.py").write_text("""
from torch import nn

class Flat(nn.Sequential):
    def __init__(self, num_classes=10):
        super().__init__(nn.AvgPool2d(16), nn.Flatten(1, 2), nn.Conv1d(6, num_classes, 2), nn.Flatten())

class Idle(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.c, self.d, self.auxiliary = nn.Conv2d(3, 4, 8, 8), nn.Conv2d(4, num_classes, 4), nn.Conv2d(4, 4, 1)
    def forward(self, x):
        return self.d(self.c(x)).flatten(1)
""")
    assert run(QUICK + " --pretrain --network mine.py:Flat") == 0
    assert "zeros 0.00%" in capsys.readouterr().out
    with pytest.raises(BadInput, match="no nn.Conv2d or nn.Linear besides the first one"):
        run(QUICK + " --rew --network mine.py:Flat")
    with pytest.raises(BadInput, match="auxiliary never runs, so it has no price"):
        run(QUICK + " --rew --network mine.py:Idle --cost-power 0.5", "other")


def test_a_network_that_fails_in_training_alone():
    Path("mine.py").write_text("""
from torch import nn

class Excited(nn.Sequential):
    def __init__(self, num_classes=10):
        super().__init__(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten(),
                         nn.Linear(4, num_classes))

class Auxiliary(Excited):
    def forward(self, x):
        return (super().forward(x), x) if self.training else super().forward(x)
""")
    for options, said in (("Auxiliary", r"images \[2, 3, 32, 32\].*tuple"),
                          ("Excited --batch-size 1", r"images \[1, 3, 32, 32\].*more than 1 value")):
        with pytest.raises(BadInput, match=f"its forward pass in training fails for {said}"):
            run(f"{QUICK} --pretrain --network mine.py:{options}")
    assert not list(Path("run").glob("*.state"))
    assert run(QUICK + " --pretrain --network mine.py:Excited --epochs 1") == 0


@pytest.mark.parametrize("name, said", (
    ("Viewed", r"a training step fails for 2 images of 32x32 in float32 .*Use .reshape"),
    ("Constant", "its state cannot be saved: mask holds values that are not finite; a constant can be a buffer with"),
    ("Normed", "cannot be copied .*; torch.nn.utils.parametrizations.weight_norm can"),
    ("Lazy", "has lazy modules, whose weights do not exist yet")))
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_network_that_cannot_be_trained_replaces_nothing(small, name, said):
    """What its forward pass alone does not show."""
    Path("mine.py").write_text("""
import torch
from torch import nn

class Constant(nn.Sequential):
    def __init__(self, num_classes=10):
        super().__init__(nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, num_classes))
        self.register_buffer("mask", torch.full((2, 2), -torch.inf))
    def forward(self, x):
        return super().forward(x) + self.mask.exp().sum()

class Viewed(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.c, self.b, self.l = nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.Linear(256, num_classes)
    def forward(self, x):
        x = x.contiguous()  # but the weights are channels-last in training, and so is what is computed with them
        return self.l(self.b(self.c(x)).view(x.size(0), -1))

class Normed(nn.Sequential):
    def __init__(self, num_classes=10):
        conv = nn.utils.weight_norm(nn.Conv2d(3, 4, 3, 4))
        super().__init__(conv, nn.Flatten(), nn.Linear(256, num_classes))

class Lazy(nn.Sequential):
    def __init__(self, num_classes=10):
        super().__init__(nn.Conv2d(3, 4, 3, 4), nn.Flatten(), nn.LazyLinear(num_classes))
""")
    assert run(QUICK + " --pretrain") == 0
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    with pytest.raises(BadInput, match=f"--network mine.py:{name}.*{said}"):
        run(f"{QUICK} --pretrain --no-resume --network mine.py:{name}")
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before


def test_a_network_that_keeps_what_it_computed_is_trained(small):
    """And one that standardises each image."""
    Path("mine.py").write_text("""
from torch import nn

class Kept(nn.Sequential):
    def __init__(self, num_classes=10):
        super().__init__(nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, num_classes))
    def forward(self, x):
        x = (x - x.mean((1, 2, 3), True)) / x.std((1, 2, 3), keepdim=True)
        self.features = self[2](self[1](self[0](x)))
        return self[3](self.features)
""")
    assert run(QUICK.replace("--workers 1", "--workers 2") + " --pretrain --network mine.py:Kept") == 0
    with pytest.raises(BadInput, match="--network mine.py:Kept cannot be copied"):
        run(QUICK + " --pretrain --network mine.py:Kept --average 0", "other")


def test_the_average_is_of_the_finished_weights_wherever_a_stage_is_killed(small, monkeypatch):
    """Not that of a stop before: tools.ship takes it."""
    assert run(QUICK + " --pretrain --max-minutes 0") == 0
    for name in ("pretrain.average.pt", "pretrain.pt"):
        with monkeypatch.context() as patch, pytest.raises(OSError):
            def full(state, path, name=name, save=training.save_state):
                if path.name == name:
                    raise OSError(28, "No space left on device")
                return save(state, path)
            patch.setattr(training, "save_state", full)
            run(QUICK + " --pretrain")
        assert not Path("run/pretrain.pt").exists() and Path("run/pretrain.state").exists()
    assert run(QUICK + " --pretrain") == 0
    ended, average = (networks.load_state(f"run/pretrain{kind}.pt") for kind in ("", ".average"))
    assert all(torch.equal(value, average[key]) for key, value in networks.half_state(ended).items())
    assert not Path("run/pretrain.state").exists()


def test_a_penalty_on_other_layers_is_another_run(small):
    Path("a.toml").write_text("[prune_ratios]\nconv2 = 0.5\n")
    Path("b.toml").write_text("[prune_ratios]\nlinear = 0.5\n")
    rew = QUICK + " --rew --target-sparsity 0.5 --config-file "
    assert run(rew + "a.toml --max-minutes 0") == 0
    with pytest.raises(BadInput, match="other settings .penalty"):
        run(rew + "b.toml")


def test_what_fails_later_is_said_before_anything_is_trained(capsys):
    """Sizes at which the network does not run, a penalty that fails, and a network that other scripts refuse.

    Trained on two workers, also without a BatchNorm.
    """
    Path("mine.py").write_text("""
import torch
from torch import nn
from training.penalties import Penalty

class Flat(nn.Sequential):
    def __init__(self, num_classes=10):
        super().__init__(nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, num_classes))

class Group(nn.Sequential):
    def __init__(self, num_classes=10):
        super().__init__(nn.Conv2d(3, 4, 3, 4), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(256, num_classes))

class Spare(Flat):
    def __init__(self, num_classes=10):
        super().__init__(num_classes)
        self.spare = nn.Conv2d(3, 4, 1)
    def forward(self, x):
        return self[4](self[3](self[2](self[1](self[0](x)))))

class Scaled(Flat):
    def forward(self, x):
        return super().forward(x * 2)

class Half(Penalty):
    def __init__(self, *args, p=0.5, **options):
        super().__init__(*args, **options)
        self.p = p
    def shrink(self, strength):
        self.weights[0].mul_(self.p ** 2)
""")
    quick = QUICK.replace("--workers 1", "--workers 2")
    with pytest.raises(BadInput, match=r"fails for images .1, 3, 24, 24. .*; give --sizes 32"):
        run(quick + " --network mine.py:Flat --sizes 24:0.5,32")
    with pytest.raises(BadInput, match="--penalty mine.py:Half.p=half: a first step with it fails .TypeError"):
        run(quick + " --network mine.py:Flat --rew --penalty mine.py:Half?p=half --lambda 1")
    assert not Path("run/pretrain.options.json").exists() and not Path("run/rew.options.json").exists()
    capsys.readouterr()
    for network, reason in (("Group", "1: no counting rule for GroupNorm"), ("Scaled", "the network scales or shifts"),
                            ("Spare", "spare.weight is not used by the forward pass")):
        assert run(quick + f" --network mine.py:{network} --pretrain --refresh 0 --no-resume") == 0
        assert f"warning: this network can be trained, but not quantized: {reason}" in capsys.readouterr().err


def test_what_is_said_of_sparsity_that_is_not_as_asked_for(capsys):
    """Ratios that have no effect, and a stage too short for its target."""
    Path("ratios.toml").write_text("[prune_ratios]\nconv2 = 0.2\nlinear = 0.3\n")
    quick = QUICK.replace("--lr 0.01", "--lr 5 --schedule constant --no-warmup") + f" --network {TINY} --average 0"
    assert run(quick + " --rew --sparsity-type filter --target-sparsity 0.1 --config-file ratios.toml") == 0
    out = capsys.readouterr().out
    assert "rew: ratios.toml selects the layers; its ratios have no effect" in out
    share = json.loads(Path("run/rew.jsonl").read_text().splitlines()[-1])["zeros_share"]
    assert share > 0.15 and "zeros instead of 10.0%" in out
    assert run(quick + " --masked-retrain") == 0
    assert "masked: ratios.toml selects the layers; its ratios have no effect" in capsys.readouterr().out


@pytest.mark.parametrize("options, said", (
    ("--rew --start typo.pt", "typo.pt: no such checkpoint"), ("--start typo.pt", "typo.pt: no such checkpoint"),
    ("--rew --start start.pt --start-epoch 9", "epoch 9: the stage has 1"), ("--start run/rew.pt", "which is read"),
    ("--masked-retrain --start run/pretrain.pt --teacher run/masked.pt", "which is read"),
    ("--teacher run/masked.pt", "which is read"), ("--rew --penalty loss --target-sparsity 0.5", "target sparsity"),
    ("--rew --penalty magnitude --updates 9", "--updates 10"),
    ("--cooldown 1", "belongs to --schedule constant"), ("--schedule constant --cooldown 2", "the stage has 1")))
def test_finished_stages_survive_what_is_refused(small, options, said, capsys):
    """Before the first stage to be trained begins, everything has been checked."""
    save(networks.make(TINY), Path("start.pt"))
    for stage in training.STAGES:
        save(networks.make(TINY), Path(f"run/{stage}.pt"))
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    Path("mine.toml").write_text("epochs = 1\n")
    with pytest.raises((BadInput, SystemExit)) as error:
        run(f"{QUICK} --no-resume --recipe mine.toml {options}")
    assert said in f"{error.value}{capsys.readouterr().err}"
    assert before == {path: path.read_bytes() for path in Path("run").iterdir()}


def test_a_cooldown_changes_where_other_stages_are_shorter(small):
    """What belongs to a stage that is not trained refuses nothing."""
    Path("mine.toml").write_text('schedule = "constant"\n[rew]\nepochs = 1\n[masked]\nepochs = 4\n')
    quick = QUICK.replace("--epochs 1 ", "") + " --refresh 0 --recipe mine.toml"
    assert run(f"{quick} --rew") == 0
    assert run(f"{quick} --masked-retrain --cooldown 3 --max-minutes 0") == 0
    assert run(f"{quick} --masked-retrain --cooldown 2") == 0
    assert json.loads(Path("run/masked.options.json").read_text())["settings"]["cooldown"] == 2


def test_no_option_is_dropped_without_a_word(small, capsys):
    """What has no effect is named, and a finished run with other options is refused rather than passed by."""
    assert run(QUICK + " --pretrain --lambda 1 --eps 0.1 --mixing none --clean 0.5") == 0
    out = capsys.readouterr().out
    assert all(f"pretrain: --{option} has no effect\n" in out
               for option in ("lambda on this stage", "eps on this stage", "clean without mixing"))
    assert run(QUICK + " --rew --turn 0.1 --threshold 0.5 --teaching mean --mixing cutmix --alpha 2") == 0
    out = capsys.readouterr().out
    for option in ("turn without --optimizer muon", "teaching without --teacher", "alpha without mixup",
                   "threshold on this stage"):
        assert f"rew: --{option} has no effect\n" in out
    assert "--lr" not in out
    assert run(QUICK) == 0
    assert re.search(r"rew: run/rew.pt exists, trained with other options \(.*mixing cutmix -> both",
                     capsys.readouterr().out)
    assert run(QUICK) == 0  # nothing is left to do, and no option says otherwise
    with pytest.raises(BadInput, match="trained with other options .*seed 0 -> 1.*--no-resume"):
        run(QUICK + " --seed 1")
    with pytest.raises(BadInput, match="trained with other options .*made_up 32 -> 34"):
        run(QUICK.replace("32", "34", 1))
    capsys.readouterr()
    assert run(QUICK + " --start run/masked.pt") == 0
    assert "; --start has no effect on it" in capsys.readouterr().out.splitlines()[0]
    assert run(QUICK + " --no-resume --max-minutes 0") == 0
    assert "the same command without --no-resume resumes it" in capsys.readouterr().out
    assert not any(Path(f"run/{stage}.pt").exists() for stage in training.STAGES)
    Path("run/pretrain.average.pt").rename("average.pt")
    assert run(QUICK + " --start average.pt") == 0
    assert "the weights are those of run/pretrain.state, and --start has no effect" in capsys.readouterr().out


def test_sparsity_is_stated_once_for_a_run(small, capsys):
    """What the masked stage is not given is as the run's reweighted stage had it, and a line says so."""
    Path("some.toml").write_text("[prune_ratios]\nconv2 = 0.5\n")
    assert run(QUICK + " --rew --sparsity-type filter --target-sparsity 0.5 --config-file some.toml") == 0
    assert "lambda" in lines("run/rew.jsonl")[0] and "zeros_path" in lines("run/rew.jsonl")[0]  # led to the target
    capsys.readouterr()
    assert run(QUICK + " --masked-retrain") == 0
    out = capsys.readouterr().out
    assert ("masked: target 0.5, filter, layers of some.toml; what was not given is as run/rew.options.json has it"
            in out)
    model = load("run/masked.pt")
    assert torch.equal(model.conv2.weight == 0, (group_norms(model.conv2.weight, "filter") == 0).expand(-1, -1, 3, 3))
    made = zeros(model)
    assert made["conv2"] == sum(made.values()) > 0
    total = model.conv2.weight.numel()
    assert f"masked: {made['conv2']:,} of {total:,} weights are frozen at zero" in out and "were zero already" in out

    assert run(QUICK + " --masked-retrain --no-resume --sparsity-type irregular --target-sparsity 0.25") == 0
    out = capsys.readouterr().out
    assert "--target-sparsity 0.25 as given, though run/rew.options.json has 0.5" in out
    assert "--sparsity-type irregular as given, though run/rew.options.json has filter" in out
    assert "masked: target 0.25, irregular, layers of some.toml" in out
    assert f"zeros {lines('run/masked.jsonl')[0]['zeros'] / lines('run/masked.jsonl')[0]['weights']:.2%}" in out


@pytest.mark.parametrize("rew, masked, said", (
    ("--target-sparsity 0.6", "", "masked: target 0.6, irregular, all layers but the stem; what was not given is as"),
    ("", "", "masked: target 0.8, irregular, all layers but the stem; what was not given is as"),
    ("--penalty magnitude --target-sparsity 0.7", "", "masked: target 0.7, irregular"),
    ("--sparsity-type kernel --target-sparsity 0.5", "--target-sparsity 0.4", "masked: target 0.4, kernel"),
    ("--sparsity-type filter", "", "masked: target 0.8 by default, filter"),  # a lambda has no target to take
    ("--sparsity-type filter", "--target-sparsity 0.3", "masked: target 0.3, filter"),
    ("--target-sparsity 0.6", "--sparsity-type threshold", "weights are frozen"),
    (None, "", "masked: target 0.8, irregular, all layers but the stem; what was not given is by default: there is no"),
    (None, "--target-sparsity 0.3", "masked: target 0.3, irregular")))
def test_what_the_mask_takes_over(small, capsys, rew, masked, said):
    args = arguments.parse((rew or "").split())
    args.run = Path("run")
    if rew is not None:
        save_stage(args.run, "rew", json.loads(json.dumps(vars(args), default=str)), lines=())
    args = arguments.parse(["--masked-retrain", *masked.split()])
    args.run = Path("run")
    model = MobileNetV2(width=0.25)
    sparsity.make_masks(sparsity.masked_options(args, print), model, print)
    out = capsys.readouterr().out
    assert said in out and "; 0.00% of them were zero already" in out
    assert ("as given, though run/rew.options.json has" in out) == (masked not in ("", "--target-sparsity 0.3"))


def test_a_mask_from_the_weights_of_another_run_takes_its_target(small):
    for folder, target in (("theirs", 0.6), ("run", 0.7)):
        save_stage(folder, "rew", {"target_sparsity": target}, lines=())
    for run, start, target in (("new", "theirs/masked.average.pt", 0.6), ("new", "theirs/masked.state", 0.6),
                               ("run", "theirs/masked.pt", 0.7), ("new", "nowhere/masked.pt", 0.8)):
        args = arguments.parse(["--masked-retrain", "--run", run, "--start", start])
        assert sparsity.masked_options(args, print).target_sparsity == target


@pytest.mark.parametrize("kind", ("irregular", "column", "kernel", "filter"))
def test_every_sparsity_type_makes_real_zeros(small, kind):
    """The submission's way: penalty in the loss, then the ratios of a file; and by a target."""
    layers = {"conv2": 0.7, "linear": 0.1}
    Path("ratios.toml").write_text("[prune_ratios]\nconv2 = 0.7\nlinear = 0.1\n")
    config = f" --sparsity-type {kind} --config-file ratios.toml"
    assert run(QUICK + " --rew" + config) == 0
    assert run(QUICK + " --masked-retrain" + config) == 0
    model = load("run/masked.pt")
    for name, module in weight_layers(model):
        norms = group_norms(module.weight.detach(), kind)
        assert (norms == 0).sum() == int(layers.get(name, 0) * norms.numel()), name
        assert (module.weight == 0).sum() == (norms == 0).expand_as(module.weight).sum()  # groups whole, and no others

    assert run(QUICK + f" --masked-retrain --no-resume --sparsity-type {kind} --target-sparsity 0.6") == 0
    model = load("run/masked.pt")
    gone = total = 0
    for name, module in weight_layers(model):
        dead = (group_norms(module.weight.detach(), kind) == 0).expand_as(module.weight)
        assert torch.equal(module.weight == 0, dead)
        gone, total = gone + int(dead.sum()), total + (dead.numel() if name in layers else 0)  # of the rew stage
    assert 0.6 * total <= gone < 0.7 * total


def test_a_proximal_penalty_in_the_submissions_command_makes_zeros_of_its_own(small):
    assert run(QUICK + " --rew --sparsity-type filter --penalty proximal --lambda 100 --updates 2") == 0
    model = load("run/rew.pt")
    dead = {name: (module.weight == 0).flatten(1).all(1) for name, module in weight_layers(model)}
    assert any(d.any() for d in dead.values()) and not dead["conv1"].any()


def test_no_class_loses_its_filter():
    """The filters of the last layer are the classes'; single weights and --config-file are as they are."""
    model = networks.make("mobilenet_v2:MobileNetV2?width=0.25")
    words = "--rew --target-sparsity 0.9 --sparsity-type"
    layers = {kind: sparsity.pruned_layers(arguments.parse([*words.split(), kind]), model)
              for kind in ("irregular", "filter")}
    assert layers["irregular"] == [*layers["filter"], "linear"] and "conv1" not in layers["irregular"]
    args = arguments.parse(["--masked-retrain", "--target-sparsity", "0.9", "--sparsity-type", "filter"])
    sparsity.make_masks(args, model)
    assert model.linear.weight.flatten(1).any(1).all()
    with pytest.raises(BadInput, match="no layer between the first and the last whose filters"):
        sparsity.pruned_layers(args, torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 5, 1)))


def test_what_is_left_of_a_lost_state_is_not_overwritten(small):
    words = QUICK + " --pretrain --epochs 3"
    assert run(words + " --max-minutes 0") == 0
    State(Path("run/pretrain.state")).remove()
    assert run(words + " --max-minutes 0") == 0  # not an epoch had been made
    Path("run/pretrain.jsonl").write_text(json.dumps({"step": 2, "epoch": 1}) + "\n")
    State(Path("run/pretrain.state")).remove()
    with pytest.raises(BadInput, match="pretrain.state is lost, and run/pretrain.average.pt, which is left of that"):
        run(words)
    Path("run/pretrain.average.pt").rename("copy.pt")
    assert run(words + " --start copy.pt --start-epoch 1") == 0


def test_a_mask_of_a_dense_start_takes_no_target_from_the_stage_after_it(small, capsys):
    for words in ("--pretrain", "--rew --target-sparsity 0.5"):
        assert run(f"{QUICK} {words}", "other") == 0
    capsys.readouterr()
    assert run(QUICK + " --masked-retrain --start other/pretrain.pt") == 0
    assert "target 0.8" in capsys.readouterr().out


def test_a_teacher_changes_what_is_learnt(small):
    assert run(QUICK + " --pretrain") == 0
    assert run(QUICK + " --pretrain --teacher run/pretrain.pt", "taught") == 0
    (stage,) = training_record("taught/pretrain.pt")
    assert stage["teachers_sha256"] == [files.sha256("run/pretrain.pt")]
    assert run(QUICK + " --pretrain --teacher run/pretrain.pt --distill 0 --smooth-eps 0.1", "alone") == 0
    assert_same(Path("run/pretrain.pt"), Path("alone/pretrain.pt"))
    alone, taught = (load_checkpoint(f"{folder}/pretrain.pt", TINY) for folder in ("run", "taught"))
    assert not torch.equal(alone.conv2.weight, taught.conv2.weight)


def test_the_reweighted_stage_starts_from_the_dense_one(small, capsys):
    assert run(QUICK + " --pretrain") == 0
    assert run(QUICK + " --rew --penalty proximal --lambda 0 --lr 1e-9 --average 0") == 0
    dense, result = load("run/pretrain.pt"), load("run/rew.pt")
    for (_, before), (_, after) in zip(weight_layers(dense), weight_layers(result)):
        assert torch.allclose(before.weight, after.weight, atol=1e-6)
    record = files.load_json("run/rew.options.json")
    assert record["start_sha256"] == files.sha256("run/pretrain.pt") and "warning" not in capsys.readouterr().err


def test_a_finished_stages_own_command_says_that_it_is_there(small, capsys):
    """Each stage has its own options in the submission's script, which is repeated if it was stopped."""
    for words in ("--pretrain --lr 0.01", "--rew --lr 0.02", "--masked-retrain --lr 0.03 --max-minutes 0"):
        assert run(f"{QUICK} {words}") == 0
    capsys.readouterr()
    for words in ("--pretrain --lr 0.01", "--rew --lr 0.02"):
        assert run(f"{QUICK} {words}") == 0
        assert "exists" in capsys.readouterr().out
    with pytest.raises(BadInput, match="rew.pt was trained with other options .lr 0.02 -> 0.01"):
        run(QUICK + " --rew --lr 0.01")
    assert run(f"{QUICK} --masked-retrain --lr 0.03") == 0


def test_a_stage_that_began_from_random_weights_is_no_other(small):
    assert run(QUICK + " --rew --max-minutes 0") == 0 and run(QUICK + " --pretrain") == 0
    with pytest.raises(BadInput, match="rew.state was trained from other weights than those of the stage before it"):
        run(QUICK + " --rew")
    Path("run/pretrain.pt").rename("kept.pt")
    assert run(QUICK + " --rew") == 0
    Path("kept.pt").rename("run/pretrain.pt")
    with pytest.raises(BadInput, match="rew.pt was trained with other options .start_sha256 random weights -> "):
        run(QUICK)


def test_nothing_begins_before_the_dense_stage_is_finished(small):
    assert run(QUICK + " --pretrain --max-minutes 0") == 0
    with pytest.raises(BadInput, match="pretrain.pt is missing, because the dense stage is not finished: repeat"):
        run(QUICK + " --rew")
    assert run(QUICK + " --rew --start run/pretrain.average.pt --max-minutes 0") == 0
    assert run(QUICK + " --rew") == 0  # it began from a --start, and goes on
    assert run(QUICK + " --pretrain", "other") == 0 and run(QUICK + " --rew --max-minutes 0", "other") == 0
    assert run(QUICK + " --pretrain --no-resume --max-minutes 0", "other") == 0
    with pytest.raises(BadInput, match="pretrain.pt is missing, because the dense stage is not finished: repeat"):
        run(QUICK + " --rew", "other")


@pytest.mark.parametrize("words, other", (
    ("--rew --target-sparsity 0.5", "--target-sparsity 0.6"),
    ("--masked-retrain --target-sparsity 0.5", "--target-sparsity 0.6"),
    ("--masked-retrain --target-sparsity 0.5 --config-file layers.toml", "--config-file others.toml"),
    ("--masked-retrain --sparsity-type threshold --threshold 0.05", "--threshold 0.06")))
def test_a_branch_goes_on_when_its_start_is_gone(small, words, other):
    """Or has moved on; to the same bits."""
    for name in ("layers.toml", "others.toml"):  # not in the network's order
        Path(name).write_text("[prune_ratios]\nlinear = 0.5\nconv2 = 0.5\n")
    trunk = QUICK + " --pretrain --epochs 3 --schedule constant"
    branch = f"{QUICK} {words} --start trunk/pretrain.state"
    assert run(trunk + " --max-minutes 0", "trunk") == 0
    assert run(branch, "whole") == 0 and run(branch + " --max-minutes 0") == 0
    assert run(trunk + " --max-minutes 0", "trunk") == 0
    with pytest.raises(BadInput, match="was .* when the stage began, and its masks are kept|with other settings"):
        run(f"{branch} {other}")
    assert run(trunk, "trunk") == 0 and not Path("trunk/pretrain.state").exists()
    assert run(branch) == 0
    stage = "rew" if "--rew" in words else "masked"
    assert_same(Path(f"run/{stage}.pt"), Path(f"whole/{stage}.pt"))


@pytest.mark.parametrize("words, cores, wanted", (
    ("--batch-size 256", 64, 16), ("--batch-size 256", 2, 2), ("--batch-size 24", 2, 1), ("--batch-size 4", 2, 1),
    ("--batch-size 24 --workers 2", 64, 2)))
def test_each_worker_has_enough_images_by_default(monkeypatch, words, cores, wanted):
    monkeypatch.setattr(training.threads, "cores", lambda: cores)
    args = arguments.parse(words.split())
    assert arguments.settings_for("pretrain", args, CPU).workers == wanted
    assert arguments.settings_for("pretrain", args, torch.device("cuda")).workers == 1
    monkeypatch.setattr(training.plan.environment, "processes", lambda: (0, 4, 0))
    assert arguments.settings_for("pretrain", args, CPU).workers == (2 if "--workers" in words else min(wanted, 4))


@pytest.mark.parametrize("words", ("--recipe", "--network", "--penalty", "--config-file"))
def test_an_empty_text_is_no_value(small, capsys, words):
    with pytest.raises(SystemExit) as ended:
        training.main([*QUICK.split(), words, "", "--run", "run"])
    assert ended.value.code == 2 and "got an empty one" in capsys.readouterr().err and not Path("run").exists()


@pytest.mark.parametrize("start, words, said", (
    ("run/pretrain.pt", "--pretrain", True), ("run/pretrain.average.pt", "--pretrain --max-minutes 0", True),
    ("run/pretrain.pt", "--pretrain --seed 1", False), ("run/pretrain.pt", "--rew", False),
    ("run/pretrain.pt", "--pretrain --epochs 2 --start-epoch 1", False), ("copy.pt", "--pretrain", False)))
def test_a_further_stage_of_the_same_seed_is_said_to_repeat_the_images(small, capsys, start, words, said):
    assert run(QUICK + " --pretrain") == 0
    shutil.copy("run/pretrain.pt", "copy.pt")
    assert run(f"{QUICK} {words} --start {start}", "other") == 0
    assert ("the images come in the same order again" in capsys.readouterr().out) == said
    if "--max-minutes" in words:  # what is resumed has its seed
        assert run(f"{QUICK} {words} --start {start}", "other") == 0
        assert "the images come in the same order again" not in capsys.readouterr().out


@pytest.mark.parametrize("name, words", (
    ("teacher", "--teacher other.pt"), ("lam", "--lambda 0.5"), ("eps", "--eps 0.01"), ("updates", "--updates 3"),
    ("cost_power", "--cost-power 0.5"), ("sparsity_type", "--sparsity-type filter"),
    ("config_file", "--config-file other.toml"), ("target_sparsity", "--target-sparsity 0.6")))
def test_what_decides_the_result_is_no_other_run(small, name, words):
    Path("other.toml").write_text("[prune_ratios]\nlinear = 0.5\n")
    save(networks.make(TINY), Path("other.pt"))
    assert name in runs.DECISIVE and run(QUICK + " --rew") == 0
    with pytest.raises(BadInput, match=f"trained with other options .*{name}.* -> "):
        run(f"{QUICK} --rew {words}")


def test_the_threshold_decides_the_mask(small):
    assert run(QUICK + " --rew") == 0
    masked = QUICK + " --masked-retrain --sparsity-type threshold --threshold"
    assert run(f"{masked} 0.05") == 0
    with pytest.raises(BadInput, match="trained with other options .threshold 0.05 -> 0.06"):
        run(f"{masked} 0.06")


def test_a_cooldown_branches_off_a_running_stage(small):
    """--start takes the weights of its state as they are, or what a stop left of its average; the stage goes on
    unharmed."""
    trunk = QUICK + " --pretrain --epochs 3 --lr-scheduler constant"
    assert run(trunk, "whole") == 0
    assert run(trunk + " --max-minutes 0") == 0
    state = training.loop.State(Path("run/pretrain.state"), None)
    branch = (QUICK + " --pretrain --schedule constant --cooldown 1 --no-warmup --lr 1e-9 --weight-decay 0"
              " --average 0")
    assert run(branch + " --start run/pretrain.state", "branch") == 0
    assert run(branch + " --start run/pretrain.average.pt", "other") == 0
    for folder, wanted in (("branch", state.read("weights")), ("other", torch.load("run/pretrain.average.pt"))):
        assert torch.allclose(torch.load(f"{folder}/pretrain.pt")["conv2.weight"], wanted["conv2.weight"].float(),
                              atol=1e-5)
    assert run(trunk) == 0
    assert_same(Path("whole/pretrain.pt"), Path("run/pretrain.pt"))
    whole, half = (torch.load(f"run/pretrain{kind}.pt") for kind in ("", ".average"))
    assert all(torch.equal(half[name].half(), value.half()) for name, value in whole.items()
               if value.is_floating_point())


def test_a_stage_is_taken_up_from_its_average_alone(small, capsys):
    command = QUICK + " --pretrain --epochs 2 --lr-scheduler constant"
    for _ in range(3):
        run(command + " --max-minutes 0")
    Path("run/pretrain.average.pt").rename("kept.pt")
    log = Path("run/pretrain.jsonl").read_text()
    assert run(command + " --start kept.pt --start-epoch 1.5", "new") == 0
    assert "resumes at epoch 2 of 2" in capsys.readouterr().out
    assert [line["epoch"] for line in lines("new/pretrain.jsonl")] == [2] and log.count("\n") == 1


def test_start_is_where_the_first_stage_began(small):
    """Also when the same command is given again with the first stage done."""
    torch.manual_seed(9)
    save(networks.make(TINY), Path("start.pt"))
    assert run(QUICK + " --start start.pt") == 0
    for stage in ("rew", "masked"):
        for name in (f"{stage}.pt", f"{stage}.jsonl"):
            Path("run", name).rename(f"first-{name}")
    assert run(QUICK + " --start start.pt") == 0
    for stage in ("rew", "masked"):
        assert_same(Path(f"first-{stage}.pt"), Path(f"run/{stage}.pt"))


# ------------------------------------------------------------------------------------------------ stopping, going on

def test_a_budget_stops_cleanly_and_the_same_command_goes_on(small, capsys):
    assert run(QUICK, "whole") == 0
    stops = 0
    while not Path("run/masked.pt").exists():
        assert run(QUICK + " --max-minutes 0") == 0
        stops += capsys.readouterr().out.count("the same command resumes it")
        assert stops < 7
    assert stops == 3  # two steps a stage: one stop in each
    for stage in training.STAGES:
        assert_same(Path(f"whole/{stage}.pt"), Path(f"run/{stage}.pt"))
        assert lines(f"whole/{stage}.jsonl") == lines(f"run/{stage}.jsonl")
        assert not Path(f"run/{stage}.state").exists()


@pytest.mark.parametrize("step", (1, 2))
def test_sigterm_begins_no_new_stage(small, monkeypatch, step):
    """Not even in a stage's last step, which the stage still finishes."""
    count, draw = 0, augmentation.draw

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        if count == step:
            signal.raise_signal(signal.SIGTERM)
        return draw(*args, **kwargs)
    monkeypatch.setattr(augmentation, "draw", counted)
    assert run(QUICK + " --refresh 0") == 0
    assert count == step and Path("run/pretrain.pt").exists() == (step == 2) and not list(Path("run").glob("rew*"))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert run(QUICK + " --refresh 0") == 0 and Path("run/masked.pt").exists()


def test_the_real_command_is_ended_and_goes_on_bit_for_bit():
    """Killed as soon as there is a state, then asked to end, then left alone."""
    options = (f"--pretrain --made-up 96 --batch-size 16 --epochs 1 --no-cuda --precision float32 --lr 0.01 --workers 1"
               f" --save-seconds 0 --network {NARROW}")
    assert run(options, "whole") == 0
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)):
        process = subprocess.Popen([sys.executable, str(SCRIPT), *options.split(), "--run", "run"],
                                   stdout=subprocess.PIPE, text=True)
        state, until = Path("run/pretrain.state/state.json"), time.monotonic() + 60
        before = state.read_bytes() if state.exists() else None
        while not state.exists() or state.read_bytes() == before:
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        out = process.communicate(timeout=60)[0]
        assert process.returncode == code and not Path("run/pretrain.pt").exists()
        assert ("the same command resumes it" in out) == (code == 0)
    assert "resumes at epoch" in (again := script(options + " --run run")).stdout and again.returncode == 0
    assert_same(Path("run/pretrain.pt"), Path("whole/pretrain.pt"))
    assert lines("run/pretrain.jsonl") == lines("whole/pretrain.jsonl")


def test_one_process_a_run_folder_and_what_is_refused_leaves_it(small):
    assert run(QUICK + " --pretrain --max-minutes 0") == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    with files.lock_folder("run"), pytest.raises(BadInput, match="run: another process is at work there"):
        run(QUICK + " --pretrain --no-resume")
    with pytest.raises(BadInput, match="lr 0.01 -> 0.07"):
        run(QUICK + " --pretrain --lr 0.07")
    assert before == {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert run(QUICK + " --pretrain", "other") == run(QUICK + " --pretrain") == 0


def test_a_full_disk_exits_2_and_loses_nothing(small, monkeypatch, capsys):
    assert run(QUICK + " --pretrain", "whole") == 0
    assert run(QUICK + " --pretrain --max-minutes 0") == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    capsys.readouterr()
    for full in ("jsonl", "pretrain.pt", "options.json"):
        with monkeypatch.context() as patch:
            replace = os.replace

            def failing(source, target):
                if str(target).endswith(full):
                    raise OSError(28, "No space left on device", str(target))
                replace(source, target)
            patch.setattr(os, "replace", failing)
            with pytest.raises(SystemExit) as error:
                training.run_script(lambda: run(QUICK + " --pretrain"))
        err = capsys.readouterr().err
        assert error.value.code == 2 and "No space left on device" in err and err.count("\n") == 1 and full in err
        kept = {path: path.read_bytes() for path in Path("run").rglob("*") if path.suffix == ".pt" or path.name
                == "state.json"}
        networks.load_state(Path("run/pretrain.average.pt"))  # of the stop, or of the finished weights already
        del kept[Path("run/pretrain.average.pt")]
        assert kept == {path: content for path, content in before.items() if path in kept} and len(kept) == 4
    assert run(QUICK + " --pretrain") == 0
    assert_same(Path("run/pretrain.pt"), Path("whole/pretrain.pt"))


# ------------------------------------------------------------------------------------------------------ bad options

@pytest.mark.parametrize("options, said", (
    ("--average 2", "--average"), ("--target-sparsity 1", "--target"),
    ("--rew --masked-retrain", "not allowed with argument --rew"), ("--lambda 1 --target-sparsity 0.5", "exclude"),
    ("--mixup --mixing both", "exclude"), ("--rew --sparsity-type threshold", "threshold"),
    ("--sparsity-type threshold", "threshold"), ("--start-epoch 2", "give --start"),
    ("--masked-retrain --sparsity-type threshold --target-sparsity 0.5", "excludes --target-sparsity"),
    ("--rew --penalty magnitude --eps 0.1", "magnitude has no --eps"), ("--distill 1.5", "--distill"),
    ("--nonsense", "--nonsense")))
def test_impossible_options_are_refused_at_once(options, said, capsys):
    with pytest.raises(SystemExit) as error:
        arguments.parse(options.split())
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.value.code == 2 and re.match(r"\S+: error: ", last) and said in last


def empty(_):
    pass


def one_stage(model):
    save(model, Path("run/pretrain.pt"))


def two_stages(model):
    one_stage(model)
    save(model, Path("run/rew.pt"))


def damaged(_):
    Path("run").mkdir()
    Path("run/pretrain.pt").write_bytes(b"PK\x03\x04 nothing")


def no_layer(model):
    one_stage(model)
    Path("zero.toml").write_text('[prune_ratios]\n"conv2" = 0.0\n')


@pytest.mark.parametrize("prepare, options, said", (
    (empty, "--teacher nowhere.pt", "nowhere.pt"), (empty, "--masked-retrain", "Run --rew first"),
    (damaged, "--rew", "pretrain.pt"),
    (two_stages, "--masked-retrain --sparsity-type filter", "--config-file"),
    (two_stages, "--masked-retrain --sparsity-type threshold --config-file nowhere", "nowhere"),
    (one_stage, "--rew --config-file nowhere", "nowhere"), (no_layer, "--rew --config-file zero.toml", "zero.toml"),
    (no_layer, "--masked-retrain --start run/pretrain.pt --config-file zero.toml", "zero.toml"),
    (empty, "--pretrain --lr 100 --weight-decay 1 --no-warmup --epochs 20", "--lr"),
    (empty, "--data nowhere", "nowhere"), (one_stage, "--rew --penalty l1", "known are loss, proximal, magnitude"),
    (one_stage, "--rew --penalty nowhere.py:Mine", "there is no file nowhere.py"),
    # of later stages, before the first one begins
    (empty, "--sparsity-type filter", "--config-file"), (empty, "--config-file nowhere", "nowhere")))
def test_what_cannot_be_is_named(small, prepare, options, said):
    prepare(networks.make(TINY))
    options = f"{QUICK} {options}"
    if "--data" in options:
        options = options.replace("--made-up 32", "")
    with pytest.raises(BadInput) as error:
        run(options)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not list(Path("run").glob("*.tmp")) and not Path("run/masked.pt").exists()
    assert prepare is not empty or not list(Path().glob("run/*.pt"))


def test_the_script_says_one_line_and_exits_2():
    done = script("--made-up 32 --masked-retrain")
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch("main.py: .*--rew first.*\n", done.stderr)


# ------------------------------------------------------------------------------------------------- several processes

def torchrun(options, folder, script=SCRIPT):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script),
         *shlex.split(options),
         "--run-folder", str(folder)], capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_one_process_of_several_warns(small, capsys):
    args, data = arguments.parse(["--rew"]), cifar100.made_up(2, 0)
    for rank in (0, 1):
        job = training.Job(args, {"rew": args}, data, data, CPU, training.Processes(rank, 2), 1e9)
        training.starting_point("rew", args, job)
        assert capsys.readouterr().err.count("warning: ") == 1 - rank


def test_the_threads_of_the_processes_group_end_with_it(small):
    """A thread that is left may abort the process while the interpreter ends."""
    Path("driver.py").write_text(f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from training.main import main

def left():
    found = []
    for each in os.listdir("/proc/self/task"):
        try:
            found.append(open(f"/proc/self/task/{{each}}/comm").read())
        except OSError:  # it has ended
            pass
    return sorted(name for name in found if "gloo" in name)

main(sys.argv[1:])
end = time.monotonic() + 20
while left() and time.monotonic() < end:
    time.sleep(0.1)
os.write(1, f"left: {{left()}}\\n".encode())  # in one piece, whatever the other process writes
""")
    out = torchrun(f"{QUICK} --pretrain --network {TINY}", "two", "driver.py")
    assert out.count("left: []") == 2


def test_torchrun_trains_what_one_process_of_two_workers_trains(small):
    """All three stages, the same global batch."""
    options = f"{QUICK} --target-sparsity 0.7 --network {TINY}"
    out = torchrun(options, "two")
    assert run(options + " --workers 2", "one") == 0
    for stage in training.STAGES:
        assert out.count(f"{stage} epoch 1/1") == 1 and out.count(f"{stage}: wrote") == 1
        (mine,), (theirs,) = lines(f"two/{stage}.jsonl"), lines(f"one/{stage}.jsonl")
        assert mine.keys() == theirs.keys() and mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert mine["zeros"] == pytest.approx(theirs["zeros"], rel=1e-2)
        two, one = torch.load(f"two/{stage}.pt"), torch.load(f"one/{stage}.pt")
        assert all(torch.allclose(two[f"{name}.weight"], one[f"{name}.weight"], rtol=1e-3, atol=1e-4)
                   for name in ("conv1", "conv2", "linear"))
