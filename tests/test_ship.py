"""Shipping: what is made, in which order files are replaced, and that a failure anywhere replaces none."""
import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from compressed import cifar100, claims, datasets, networks
from compressed.checkpoints import CHECKPOINT
from compressed.command_line import run_python
from compressed.errors import BadInput
from compressed.files import load_json, load_record, save_record, save_text, sha256
from compressed.networks import save_state
from tools import baseline, quick, ship, shipping, train, verify

ROOT = Path(__file__).resolve().parent.parent
CLAIM = shipping.CLAIM
COMMANDS = ("quantize.py", "tools.pack", "tools.integer", "tools.export_onnx", "tools.verify", "tools.report")


def write(folder: Path, **contents: str) -> None:
    """Write {name: text}; in names "__" stands for "/" and "_" for "."."""
    for name, text in contents.items():
        save_text(text, folder / name.replace("__", "/").replace("_", "."))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Commands:
    """In place of run_python: notes every command, writes what it would write; `fails` names one with status 2."""

    def __init__(self):
        self.lines, self.fails, self.tuned = [], None, False
        self.network = networks.DEFAULT
        self.accuracy = {"data": "test", "correct": 9, "images": 10}
        self.does = {}  # {name: what else happens}

    def __call__(self, *words, stdout=None):
        words = list(map(str, words))
        name = words.pop(0) if words[0] != "-m" else words.pop(1)
        words = [word for word in words if word != "-m"]
        name = Path(name).name
        self.lines.append(shlex.join([name, *words]))
        if name == self.fails:
            return 2
        options = dict(zip(words, words[1:]))
        if name == "quantize.py":
            self.quantize(Path(options["--checkpoint"]), Path(options["--out"]))
        elif name == "tools.pack":
            Path(options["--checkpoint"]).with_suffix(".mnet").write_text("new")
        elif name == "tools.report" and "--to" in options:
            write(Path(options["--to"]), README_md="new tables", figures__board_png="new")
        elif name == "testers.py" and stdout:
            stdout.write(b'{"checkpoint": "elsewhere", "correct": 8}')
        self.does.get(name, lambda: None)()
        return 0

    def quantize(self, source: Path, out: Path) -> None:
        out.write_text("new")
        stages = [{"stage": "masked"}, *[{"stage": "quantized"}] * self.tuned]
        save_record({"checkpoint": out.name, "sha256": sha256(out), "accuracy": self.accuracy,
                     "network": {"spec": self.network},
                     "made_by": {"command": f"--out {out}", "source_sha256": sha256(source), "training": stages}},
                    claims.claim_path(out))

    @property
    def names(self):
        return [line.split()[0] for line in self.lines]


@pytest.fixture
def commands(monkeypatch):
    found = Commands()
    for module in (shipping, train, quick, verify):
        monkeypatch.setattr(module, "run_python", found)
    return found


DENSE = {"settings": {}, "options": {"holdout": False}, "data_set": dataclasses.asdict(cifar100.CIFAR100)}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository with a shipped network, and a run folder in it, which is the current folder."""
    for module in (ship, train, baseline):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    for name in (CHECKPOINT, Path(CHECKPOINT).with_suffix(".mnet")):
        (tmp_path / name).write_text("old")
    save_record({"accuracy": {"data": "test", "correct": 8, "images": 10}}, tmp_path / CLAIM)
    write(tmp_path, README_md="old", record__masked_pt="old", record__masked_jsonl="old", record__dense_pt="dense",
          record__dense_tested_json="{}", record__dense_options_json="{}",
          record__README_md="page",
          run__masked_average_pt="weights", run__masked_jsonl="log",
          run__quantized_jsonl="another attempt", run__quantized_options_json="{}",
          run__pretrain_average_pt="dense", run__pretrain_jsonl="log")
    save_record({"settings": {}, "options": {}}, tmp_path / "run/masked.options.json")
    save_record(DENSE, tmp_path / "run/pretrain.options.json")
    (tmp_path / "record/masked-1.jsonl").write_text("of the network before")
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------- ship

@pytest.mark.parametrize("tuned", (False, True))
def test_everything_is_made_and_then_replaced(commands, root, capsys, tuned):
    commands.tuned = tuned
    before = tree(root)
    assert ship.main(["run", "--table", "4"]) == 0
    after = tree(root)
    assert tuple(commands.names) == COMMANDS
    assert commands.lines[0].startswith("quantize.py --checkpoint run/masked.average.pt --table 4 --out ")
    assert all(f"--network {networks.DEFAULT}" in line for line in commands.lines[1:5])
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    fine_tuning = {"record/quantized.jsonl", "record/quantized.options.json"} if tuned else set()
    assert changed == {CHECKPOINT, CLAIM, CHECKPOINT.replace(".pt", ".mnet"), "README.md", "figures/board.png",
                       "record/masked.pt", "record/masked.jsonl", "record/masked.options.json", "record/masked-1.jsonl",
                       "record/pretrain.jsonl", "record/pretrain.options.json"} | fine_tuning
    assert "record/masked-1.jsonl" not in after and after["record/masked.pt"] == b"weights"
    assert claims.read(root / CLAIM)["made_by"]["command"] == (
        "python quantize.py --checkpoint run/masked.average.pt --table 4")
    assert capsys.readouterr().out == f"ship.py: shipped {root / CHECKPOINT}\n"


@pytest.mark.parametrize("words, kept", (([], b"# of the run"), (["--recipe", "small"], None)))
def test_the_recipe_is_in_the_record(commands, root, words, kept):
    """The one that quantize.py took."""
    write(root, run__recipe_toml="# of the run")
    assert ship.main(["run", *words]) == 0
    expected = kept or (ship.recipes.FOLDER / "small.toml").read_bytes()
    assert (root / "record/recipe.toml").read_bytes() == expected


@pytest.mark.parametrize("start, stays", ((None, True), ("masked.pt", False), ("runs/dense/pretrain.state", True),
                                          ("record/dense.pt", True)))
def test_a_dense_baseline_that_was_the_shipped_network_goes_with_it(commands, root, start, stays):
    """One from scratch stays, and is in the folder that the tables are made from."""
    save_record({"settings": {}, "options": {"start": start}}, root / "record/dense.options.json")
    write(root, record__dense_jsonl="log")
    known = []
    commands.does["tools.report"] = lambda: known.extend(path.name for path in root.glob("new.*/new/record/dense.*"))
    assert ship.main(["run"]) == 0
    left = {path.name for path in (root / "record").glob("dense.*")}
    assert left == set(known) == (set(shipping.BASELINE) if stays else set())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_fails_replaces_nothing(commands, root, name):
    commands.fails = name
    before = tree(root)
    with pytest.raises(BadInput, match=f"{name} ended with status 2, see above; nothing was replaced"):
        ship.main(["run"])
    assert commands.names[-1] == name
    after = tree(root)
    kept = {path: after.pop(path) for path in list(after) if path.startswith("run/candidate/")}
    assert after == before and bool(kept) == (name != "quantize.py")  # twelve minutes of work are not lost


@pytest.mark.parametrize("error", (OSError(28, "No space left on device"), KeyboardInterrupt()))
@pytest.mark.parametrize("call", (0, 5, 10))
def test_a_move_that_fails_is_undone(commands, root, monkeypatch, error, call):
    before, real, calls = tree(root), os.replace, []

    def replace(source, target):
        if "/new/" in str(source) and "/new/" not in str(target):  # moves into place alone
            calls.append(target)
            if len(calls) == call + 1:
                raise error
        real(source, target)

    commands.does["tools.report"] = lambda: monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else BadInput):
        ship.main(["run"])
    assert len(calls) == call + 1
    after = tree(root)
    kept = {path: after.pop(path) for path in list(after) if path.startswith("run/candidate/")}
    assert after == before
    assert len(kept) == (0 if isinstance(error, KeyboardInterrupt) else 13)


def test_a_signal_waits_for_the_moves(tmp_path, monkeypatch):
    new, real = tmp_path / "x/new", os.replace
    for name in ("a.txt", "b.txt"):
        save_text("new", new / name)

    def replace(source, target):
        real(source, target)
        signal.raise_signal(signal.SIGTERM if source == new / "a.txt" else signal.SIGINT)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        shipping.install(new, tmp_path / "target")
    assert sorted(path.name for path in (tmp_path / "target").iterdir()) == ["a.txt", "b.txt"]


def test_an_obsolete_file_that_cannot_be_removed_undoes_the_move(commands, root, monkeypatch):
    before, real = tree(root), Path.unlink

    def unlink(path, **options):
        if path == root / "record/masked-1.jsonl":
            raise PermissionError(13, "Permission denied")
        real(path, **options)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(BadInput, match="Permission denied"):
        ship.main(["run"])
    after = tree(root)
    assert {path: text for path, text in after.items() if not path.startswith("run/candidate/")} == before


def test_the_checkpoint_moves_first_and_its_claim_last(tmp_path, monkeypatch):
    """A kill in between leaves a checkpoint that its claim does not fit, at every moment."""
    new, target, moved, real = tmp_path / "x/new", tmp_path / "target", [], os.replace
    for name in ("README.md", CHECKPOINT, CLAIM, "a.txt", "record/z.txt"):
        save_text("new", new / name)
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b).name), real(a, b)))
    shipping.install(new, target)
    assert moved[0] == CHECKPOINT and moved[-1] == CLAIM and len(moved) == 5


def test_a_link_stays_a_link(tmp_path):
    save_text("old", tmp_path / "elsewhere.txt")
    save_text("new", tmp_path / "x/new/a.txt")
    (tmp_path / "target").mkdir()
    (tmp_path / "target/a.txt").symlink_to(tmp_path / "elsewhere.txt")
    shipping.install(tmp_path / "x/new", tmp_path / "target")
    assert (tmp_path / "target/a.txt").is_symlink() and (tmp_path / "elsewhere.txt").read_text() == "new"


def test_a_folder_of_its_own(commands, root, capsys):
    """The same files; no pages, which tell of the network at the root. What was shipped there before is replaced."""
    before = tree(root)
    for _ in range(2):
        commands.lines.clear(), capsys.readouterr()
        assert ship.main(["run", "--into", "small", "--data", "images", "--seed", "1"]) == 0
        assert tuple(commands.names) == COMMANDS[:-1]
        (root / "run/masked.jsonl").rename(root / "run/masked-1.jsonl")  # the second time
        save_text("log", root / "run/masked.jsonl")
    assert commands.lines[0].startswith("quantize.py --checkpoint run/masked.average.pt --seed 1 --data images --out ")
    assert all(line.endswith("--data images") for line in commands.lines[2:])
    after = tree(root)
    assert {name for name in after if name.startswith("small/")} == {
        f"small/{name}" for name in (CHECKPOINT, CLAIM, CHECKPOINT.replace(".pt", ".mnet"), "record/masked.pt",
                                     "record/masked.jsonl", "record/masked.options.json", "record/masked-1.jsonl",
                                     "record/pretrain.jsonl", "record/pretrain.options.json")}
    assert {name: after[name] for name in before} == before
    command = claims.read(root / "small" / CLAIM)["made_by"]["command"]
    assert command.endswith(f" --data images --out small/{CHECKPOINT}")
    assert capsys.readouterr().out.splitlines()[-1] == (
        "ship.py: python -m tools.report adds it to the tables and the board")
    assert shipping.in_folders(root) == [root / "small" / CHECKPOINT]


@pytest.mark.parametrize("accuracy, shipped, why", (
    (("test", 9, 10), ("test", 8, 10), None),
    (("test", 9, 10), None, None),
    (("test", 8, 10), ("test", 8, 10), "8 of 10 test images are classified correctly, by the shipped network 8"),
    (("test", 9, 10), ("test", 8, 20), "measured on other images"),
    (("made up", 9, 10), None, "measured on made up images and not on the test set"),
    (("hold-out", 9, 10), ("hold-out", 8, 10), "measured on hold-out images"),
    (("mine.npz test", 9, 10), ("mine.npz test", 8, 10), None),
    (("mine.npz test", 9, 10), ("test", 8, 10), "measured on other images"),
    (("a.npz test", 9, 10, "1a"), ("b.npz test", 8, 10, "1a"), None),
    (("a.npz test", 9, 10, "1a"), ("a.npz test", 8, 10, "2b"), "measured on other images"),
))
def test_what_is_better(accuracy, shipped, why):
    made, there = (None if each is None else dict(zip(("data", "correct", "images", "digest"), each))
                   for each in (accuracy, shipped))
    found = shipping.objection(made, there)
    assert found is None if why is None else why in found


def test_what_is_not_better_is_kept(commands, root, capsys):
    commands.accuracy = {"data": "test", "correct": 8, "images": 10}
    for _ in range(2):  # the second takes the first one's place
        before = {name: text for name, text in tree(root).items() if not name.startswith("run/candidate")}
        assert ship.main(["run", "--if-better"]) == 0
        assert "tools.report" not in commands.names
        after = tree(root)
        assert before == {name: text for name, text in after.items() if not name.startswith("run/candidate")}
        assert f"run/candidate/{CHECKPOINT}" in after and "run/candidate/record/masked.pt" in after
        assert not any("run/candidate/new" in name for name in after)
        out = capsys.readouterr().out
        assert out.startswith("ship.py: not shipped, 8 of 10") and "bash run.sh ship run ships it" in out
    commands.accuracy["correct"] = 9
    assert ship.main(["run", "--if-better"]) == 0 and (root / CHECKPOINT).read_text() == "new"


def test_weights_that_a_training_replaces_meanwhile(commands, root):
    commands.does["tools.export_onnx"] = lambda: save_text("later", root / "run/masked.average.pt")
    with pytest.raises(BadInput, match="replaced while it was quantized; ship it again"):
        ship.main(["run"])
    assert (root / CHECKPOINT).read_text() == "old"


def test_nothing_to_ship(commands, root):
    with pytest.raises(BadInput, match="nowhere/masked.average.pt is not there.*train"):
        ship.main(["nowhere"])
    with pytest.raises(BadInput, match="runs/default/masked.average.pt is not there"):
        ship.main([])
    assert not commands.lines


def test_the_pages_at_the_root_are_about_the_default_network(commands, root):
    commands.network = "my.py:Net?depth=9"
    with pytest.raises(BadInput, match=r"my.py:Net\?depth=9 is not this repository's own code.*; what was made is in"):
        ship.main(["run"])
    commands.network, spec = "mobilenet_v2:SmallMobileNetV2", commands.network
    with pytest.raises(BadInput, match="are about .*: give --into FOLDER for mobilenet_v2:SmallMobileNetV2; what"):
        ship.main(["run"])
    commands.network = spec
    commands.lines[1:] = []
    assert commands.names == ["quantize.py"] and (root / CHECKPOINT).read_text() == "old"
    with pytest.raises(BadInput, match="not this repository's own code: give --into .*, such as shipped/mine; what"):
        ship.main(["run", "--into", "mine"])  # bash run.sh could not verify it without --network
    commands.lines.clear()
    assert ship.main(["run", "--into", "shipped/mine"]) == 0
    assert all("--network 'my.py:Net?depth=9'" in line for line in commands.lines[2:6])
    save_record({"settings": {}, "options": {"network": commands.network}}, root / "run/masked.options.json")
    commands.lines.clear()
    for words in [], ["--into", "mine"]:
        with pytest.raises(BadInput, match="my.py:Net.*give --into"):
            ship.main(["run", *words])
    assert not commands.lines  # refused before anything is made


@pytest.mark.parametrize("into", ([], ["--into", "small"]))
def test_the_board_is_about_the_test_set(commands, root, into):
    for words in ["--made-up", "50"], ["--holdout"]:
        with pytest.raises(BadInput, match="not that on CIFAR-100's test set: give --into a folder outside"):
            ship.main(["run", *into, *words])
    save_record({"settings": {}, "options": {}, "data_set": {"name": "CIFAR-10", "classes": 10, "digest": "0"}},
                root / "run/masked.options.json")
    with pytest.raises(BadInput, match="not that on CIFAR-100's test set"):
        ship.main(["run", *into])
    assert not commands.lines
    assert ship.main(["run", "--into", "shipped/small", "--made-up", "50"]) == 0
    commands.accuracy["data"] = "hold-out"  # as the recipe's last table says, or the --data
    (root / "run/masked.options.json").unlink()
    with pytest.raises(BadInput, match="not that on CIFAR-100's test set.*; what was made is in"):
        ship.main(["run", *into])
    assert commands.names[-1] == "quantize.py"
    assert ship.main(["run", *into, "--if-better"]) == 0  # it says why not, and keeps it
    assert commands.names[-1] == "tools.verify"


def test_two_at_once_are_refused(commands, root):
    pytest.importorskip("fcntl")
    commands.does["quantize.py"] = lambda: ship.main(["run"])
    with pytest.raises(BadInput, match="another process is at work there"):
        ship.main(["run"])
    assert commands.names == ["quantize.py"]


@pytest.mark.parametrize("words", ("--checkpoint x.pt", "--out x.pt", "--ou=x.pt", "--made 5", "--if", "--rec small",
                                   "--into run/candidate", "--into run/candidate/deeper"))
def test_options_that_would_lead_elsewhere(commands, root, words, capsys):
    with pytest.raises(SystemExit):
        ship.main(["run", *words.split()])
    assert not commands.lines and "ship.py" not in capsys.readouterr().out


def test_a_network_from_weights_to_shipped_files(tmp_path):
    """The commands as they are, in processes of their own, on made-up images; a narrow network."""
    run, into, network = tmp_path / "run", tmp_path / "own", "mobilenet_v2:MobileNetV2?width=0.25"
    run.mkdir()
    save_state(networks.make(network).state_dict(), run / "masked.average.pt")
    done = subprocess.run([sys.executable, "-m", "tools.ship", run, "--into", into, "--made-up", "100",
                           "--calibration", "20", "--renew", "0", "--ranges", "max", "--network", network],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    claim = claims.read(into / CLAIM)
    assert {path.name for path in into.iterdir()} == {
        CHECKPOINT, CLAIM, claim["packed"]["file"], CHECKPOINT.replace(".pt", ".onnx"), "record"}
    assert claim["sha256"] == sha256(into / CHECKPOINT) and claim["packed"]["sha256"] == sha256(
        into / claim["packed"]["file"])
    assert claim["made_by"]["source_sha256"] == sha256(into / "record" / "masked.pt")
    assert claim["integer"]["identical"] == claim["onnx"]["images"] == 100
    assert f"verify.py: verified {into}" in done.stdout


# --------------------------------------------------------------------------------------------------------------- train

def test_training_ships_what_is_better(commands, root, capsys):
    commands.does["main.py"] = lambda: save_text("", root / "runs/x/masked.pt")
    assert train.main(["--epochs", "3", "--run", "runs/x", "--teacher", "a", "b", "--no-resume", "--no-cuda"]) == 0
    assert commands.lines == [
        "main.py --run-folder runs/x --epochs 3 --teacher a b --no-cuda --recipe default --no-resume",
        "tools.ship runs/x --no-cuda --if-better"]
    said = capsys.readouterr().out
    assert said.startswith("train.py: after training this replaces, if more than 8 of 10 test images are right: ")
    assert all(name in said for name in (CHECKPOINT, CLAIM, ".mnet", "record/", "figures/", "README.md"))


def test_training_ships_in_any_case_if_asked_to(commands, root, capsys):
    commands.does["main.py"] = lambda: save_text("", root / "runs/default/masked.pt")
    assert train.main(["--ship", "--no-cuda"]) == 0
    assert commands.lines[1] == "tools.ship runs/default --no-cuda"
    assert "whatever its accuracy" in capsys.readouterr().out
    (root / CLAIM).unlink()
    assert train.main([]) == 0 and "as there is none yet" in capsys.readouterr().out


def test_training_on_cifar_100_in_a_folder_ships(commands, root):
    write(root, runs__default__masked_pt="", images__train="", images__test="")
    assert train.main(["--data", "images"]) == 0
    assert commands.lines[-1] == "tools.ship runs/default --data images --if-better"


def test_training_on_other_images_ships_nothing(commands, root, capsys):
    write(root, runs__default__masked_pt="", runs__default__masked_average_pt="")
    for data in ("--made-up 100", "--data five.npz", "--holdout"):
        assert train.main(data.split()) == 0 and commands.names[-1] == "main.py"
        said = capsys.readouterr().out
        assert "nothing shipped is going to be replaced: the accuracy is not of CIFAR-100's test set" in said
        command = re.search("trained; to ship it: bash run.sh ship (.*) --into FOLDER (.*)\n", said)
        assert ship.parse([command[1], "--into", "shipped/mine", *command[2].split()])[0].run == Path("runs/default")
        with pytest.raises(SystemExit):
            train.main(["--ship", *data.split()])


@pytest.mark.parametrize("text, words", (("holdout = true\n", "--holdout"), ("made-up = 100\n", "--made-up 100"),
                                         ('data = "mine.npz"\nholdout = true\n', "--data mine.npz --holdout")))
def test_the_images_of_a_recipe_are_those_of_all_commands(commands, root, capsys, text, words):
    write(root, runs__default__masked_pt="", runs__default__masked_average_pt="weights")
    save_text(text, root / "mine.toml")
    assert train.main(["--recipe", "mine.toml"]) == 0
    said = capsys.readouterr().out
    assert "nothing shipped is going to be replaced" in said and f"--into FOLDER {words}\n" in said
    with pytest.raises(SystemExit):
        train.main(["--recipe", "mine.toml", "--ship"])
    args, _ = ship.parse(["runs/default", "--recipe", "mine.toml", "--into", "shipped/mine"])
    assert datasets.option_words(args) == words.split()
    args = train.parse(["--recipe", "mine.toml", "--made-up", "40"])[0]
    assert datasets.option_words(args) == ["--made-up", "40"]


def test_training_another_network_ships_nothing(commands, root, capsys):
    commands.does["main.py"] = lambda: save_text("", root / "runs/x y/masked.pt")
    save_text('network = "my.py:Net"\n', root / "mine.toml")
    for words in (["--network", "my.py:Net"], ["--recipe", "mine.toml"]):
        assert train.main(["--run", "runs/x y", *words]) == 0 and commands.names[-1] == "main.py"
        said = capsys.readouterr().out
        assert "nothing shipped is going to be replaced" in said and "finished" not in said
        assert said.endswith("trained; to ship it: bash run.sh ship 'runs/x y' --into FOLDER\n")
        with pytest.raises(SystemExit):
            train.main(["--ship", *words])
    assert "--network my.py:Net" in commands.lines[0] and len(commands.lines) == 2


def test_training_that_was_stopped_says_how_to_go_on(commands, root, capsys):
    words = ["--run=runs/a b", "--max-minutes", "1", "--ship", "--no-resume", "--no-cuda"]
    assert train.main(words) == 0 and commands.names == ["main.py"]
    line = capsys.readouterr().out.splitlines()[-1]
    go_on = re.fullmatch("train.py: not finished yet; to go on: bash run.sh train (.*)", line)[1]
    assert train.parse(shlex.split(go_on))[0] == train.argparse.Namespace(
        **vars(train.parse(words)[0]) | {"no_resume": False})
    assert "--no-resume" not in go_on and "--max-minutes 1" in go_on

    def interrupt():
        raise KeyboardInterrupt

    commands.does["main.py"] = interrupt
    assert train.main(words) == 130
    assert capsys.readouterr().out.splitlines()[-1] == line
    commands.fails = "main.py"
    assert train.main(words) == 2 and "to go on" not in capsys.readouterr().out


def test_a_new_run_has_the_default_recipe(commands, root, monkeypatch):
    monkeypatch.setattr(train.recipes, "FOLDER", root)
    assert train.parse([])[0].recipe is None  # there is none
    save_text("", root / "default.toml")
    assert train.parse([])[0].recipe == "default"
    save_text("", root / "small.toml")
    assert train.parse(["--recipe", "small"])[0].recipe == "small"
    for name in ("recipe.toml", "pretrain.options.json"):
        save_text("", root / "runs/default" / name)
        assert train.parse([])[0].recipe is None  # training/main.py takes what is there
        assert train.main([]) == 0 and "--recipe" not in commands.lines[-1]
        (root / "runs/default" / name).unlink()


# ----------------------------------------------------------------------------------------------------- baseline, quick

def test_the_baseline_is_a_runs_dense_network(commands, root):
    write(root, run__pretrain_average_pt="another", run__pretrain_pt="its end", record__dense_jsonl="old")
    assert baseline.main(["run"]) == 0
    assert commands.names == ["testers.py", "tools.report"]
    record = tree(root / "record")
    assert record["dense.pt"] == b"another" and record["dense.jsonl"] == b"log"
    assert load_record(root / "record/dense.options.json", "")["options"] == {"holdout": False}
    assert load_json(root / "record/dense.tested.json") == {"checkpoint": "record/dense.pt", "correct": 8}
    assert record["masked.pt"] == b"old" and record["README.md"] == b"page"
    assert (root / "README.md").read_text() == "new tables"


@pytest.mark.parametrize("change", ({"options": {"holdout": True}}, {"data_set": {"name": "made up"}}))
def test_a_baseline_of_other_images_is_none(commands, root, change):
    (root / "run/pretrain.pt").write_text("its end")
    save_record(DENSE | change, root / "run/pretrain.options.json")
    before = tree(root)
    with pytest.raises(BadInput, match="run was not trained on all train images of CIFAR-100"):
        baseline.main(["run"])
    assert tree(root) == before


@pytest.mark.parametrize("name", ("testers.py", "tools.report"))
def test_a_baseline_that_fails_replaces_nothing(commands, root, name):
    with pytest.raises(BadInput, match="run/pretrain.pt is not there"):  # a stage that was stopped has an average
        baseline.main(["run"])
    (root / "run/pretrain.pt").write_text("its end")
    commands.fails, before = name, tree(root)
    with pytest.raises(BadInput, match=f"{name} ended with status 2"):
        baseline.main(["run"])
    (root / "run/pretrain.jsonl").unlink()
    with pytest.raises(BadInput, match="run/pretrain.jsonl is not there"):
        baseline.main(["run"])
    save_text("log", root / "run/pretrain.jsonl")
    assert tree(root) == before


def test_quick_ends_with_a_table(commands, root, capsys):
    left = iter(zip(quick.STAGES, (0, 25, 50), (0.2, 0.25, 0.3)))

    def train_a_stage():
        stage, zeros, accuracy = next(left)
        save_text(f'{{"step": 2, "epoch": 1, "zeros": {zeros}, "test_accuracy": {accuracy}}}\n',
                  quick.RUN / f"{stage}.jsonl")

    def ship_it():
        save_record({"accuracy": {"correct": 31, "images": 100}, "packed": {"bytes": 12345}, "counts": {
            "weights": {"all": {"total": 100, "sparsity": 0.51}}}}, quick.RUN / "shipped" / CLAIM)

    commands.does |= {"main.py": train_a_stage, "tools.ship": ship_it}
    save_text("of another time", quick.RUN / "old.txt")
    assert quick.main([]) == 0
    assert commands.names == ["main.py"] * 3 + ["tools.ship"] and not (quick.RUN / "old.txt").exists()
    assert [line.split() for line in capsys.readouterr().out.splitlines()[-4:]] == [
        ["pretrain", "0.00%", "20.00%", "0"], ["rew", "25.00%", "25.00%", "0"], ["masked", "50.00%", "30.00%", "0"],
        ["shipped", "51.00%", "31.00%", "0", "12,345"]]
    commands.fails = "main.py"
    assert quick.main([]) == 2 and commands.names[-2:] == ["tools.ship", "main.py"]


def test_quick_twice_at_once_is_refused(commands, root):
    pytest.importorskip("fcntl")
    refused = []

    def meanwhile():
        save_text("of the first", quick.RUN / "mine.txt")
        with pytest.raises(BadInput, match="runs/quick.lock: another process is at work there"):
            quick.main([])
        refused.append((quick.RUN / "mine.txt").exists())

    commands.fails, commands.does["main.py"] = "tools.ship", meanwhile
    assert quick.main([]) == 2 and refused == [True] * 3 and not Path("runs/quick.lock").exists()


# -------------------------------------------------------------------------------------------------- verify, run_python

@pytest.mark.parametrize("statuses, status", (((0, 0), 0), ((2, 0), 2), ((0, 2), 2), ((2, 2), 2), ((137,), 137)))
def test_verification_ends_as_its_checks_do(monkeypatch, capsys, statuses, status):
    Path("x.json").write_text("a claim")
    left, ran = list(statuses), []
    monkeypatch.setattr(verify, "run_python", lambda *words: (ran.append(words), left.pop(0))[1])
    assert verify.main(["--checkpoint", "x.pt", "--made-up", "9", "--network", "n.py:N"]) == status
    both = "--checkpoint", Path("x.pt"), "--network", "n.py:N"
    assert not left and ran[0] == (ROOT / "testers.py", *both, "--made-up", "9")
    assert ran[1:] in ([], [(ROOT / "check_model_operations.py", *both)])
    out, err = capsys.readouterr()
    assert ("x.pt is NOT verified" in err) == (status != 0) and ("verify.py: verified x.pt" in out) == (status == 0)


def test_every_shipped_network_is_verified(commands, root, monkeypatch, capsys):
    """That at the root, and those in folders of their own; one that contradicts its claim decides the exit status."""
    assert verify.SHIPPED == CHECKPOINT
    monkeypatch.setattr(verify, "ROOT", root)
    write(root / "small", README_md="")
    for name in (CHECKPOINT, CLAIM):
        (root / "small" / name).write_text("another")
    found = [root / CHECKPOINT, *shipping.in_folders(root)]
    assert found[1:] == [root / "small" / CHECKPOINT]
    assert verify.main(["--made-up", "9"]) == 0
    assert commands.lines == [line for path in found for line in (
        f"testers.py --checkpoint {path} --made-up 9", f"check_model_operations.py --checkpoint {path}")]
    assert capsys.readouterr().out.split("verify.py: verified ")[1:] == [f"{found[0]}\n\n", f"{found[1]}\n"]
    monkeypatch.setattr(verify, "run_python", lambda script, _, path, *words: 2 * (path == found[0]))
    assert verify.main([]) == 2
    out, err = capsys.readouterr()
    assert err == f"verify.py: {found[0]} is NOT verified in full, see above\n" and f"verified {found[1]}" in out
    (root / "small" / CLAIM).unlink()  # nothing contradicts a claim that is not there
    monkeypatch.setattr(verify, "run_python", lambda *words: 0)
    assert verify.main([]) == 2 and f"{found[1]} has no claim" in capsys.readouterr().err
    for name, status in (("alone.pth", 2), ("alone", 2), ("alone.mnet", 0)):  # a packed file holds its own
        assert verify.main(["--checkpoint", str(root / name)]) == status


def test_a_process_of_its_own(tmp_path, capfd):
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint(sys.argv[1:])\nsys.exit(7)\n")
    with open(tmp_path / "out", "wb") as file:
        assert run_python(script, "a b", 1, stdout=file) == 7
    assert (tmp_path / "out").read_text() == "['a b', '1']\n"
    assert capfd.readouterr().err == "$ python script.py 'a b' 1\n"


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_reaches_the_process_as_sigterm_and_its_end_is_awaited(tmp_path, number):
    """A terminal's Ctrl-C reaches both processes: the one that works ignores it, and gets SIGTERM once."""
    (tmp_path / "works.py").write_text(
        "import signal, sys, time\nfrom pathlib import Path\narrived = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: arrived.append(1))\nprint('ready', flush=True)\n"
        "while not arrived: time.sleep(0.01)\ntime.sleep(0.3)\n"
        "Path(sys.argv[1]).write_text(f'{len(arrived)} saved')\n")
    (tmp_path / "runs.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom compressed.command_line import run_python, run_script\n"
        f"run_script(lambda: run_python({str(tmp_path / 'works.py')!r}, {str(tmp_path / 'state')!r}))\n")
    process = subprocess.Popen([sys.executable, tmp_path / "runs.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.splitlines()[1:] == ["runs.py: interrupted"]
    assert (tmp_path / "state").read_text() == "1 saved"
