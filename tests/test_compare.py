"""The comparison of one's own runs: rows and means by hand, and runs as training/main.py leaves them."""
import csv
import json
from pathlib import Path

import pytest
import torch

from compressed import networks
from compressed.errors import BadInput
from compressed.files import load_json, save_record, save_tensors
from small import save_stage
from tiny import SPEC
from tools import compare
from training import main as training
from training.runs import read_stages
from training.state import State


def write_stage(run: Path, stage: str, accuracy=None, seed=0, zeros=25, epochs=2, data="digest", images=50_000,
                **settings) -> None:
    """A log of two epochs of 10 steps, in batches of 32; the accuracy is of the second."""
    lines = [{"stage": stage, "epoch": epoch, "step": 10 * epoch, "loss": 2 / epoch, "zeros": zeros, "weights": 100,
              "accuracy": 0.5} for epoch in (1, 2)]
    lines[1] |= {"test_accuracy": accuracy} if accuracy is not None else {}
    options = {"network": "my.py:Net", "run": str(run), "lam": 1.0, "grids": {"seed": seed, "scheme": "channel"}}
    save_stage(run, stage, options, lines, data=data, train_images=images,
               settings={"epochs": epochs, "batch_size": 32, "seed": seed, "compile": bool(seed), **settings})


def write_claim(path: Path, score: float, bits=4, activation_bits=8, seed=0, scheme="channel", data="test",
                digest="d", source="masked", **settings) -> None:
    """As quantize.py leaves it after a fine-tuning with these settings; options may come from a recipe."""
    path.write_bytes(b"weights")
    training = [{"stage": stage, "settings": {"epochs": 2, "seed": seed, **changed}, "options": {"lam": 1.0},
                 "last_epoch": {}, "machine": {}, "train_images": 100}
                for stage, changed in ((source, {}), ("quantized", settings))]
    save_record({"checkpoint": path.name, "accuracy": {"correct": 60, "images": 80, "data": data},
                 "tensors": [{"bits": bits}], "activations": [{"bits": activation_bits}],
                 "data_set": {"digest": digest},
                 "made_by": {"command": "python quantize.py --recipe mine", "options": {"scheme": scheme, "seed": 0},
                             "training": training},
                 "counts": {"weights": {"all": {"sparsity": 0.5}}, "score": {"32-bit": {"score": score}}}},
                path.with_suffix(".json"))


def test_rows_by_hand(capsys):
    write_stage(Path("a"), "pretrain", 0.5)
    write_stage(Path("a"), "masked", epochs=5)
    write_claim(Path("a/small.pt"), 0.01)
    for _ in range(2):  # what it wrote into a run is not read
        assert compare.main(["a", "--csv", "a/t.csv"]) == 0
    Path("a/t.csv").rename("t.csv")
    capsys.readouterr()
    assert compare.main(["a"]) == 0
    rows = list(csv.DictReader(Path("t.csv").open()))
    assert [list(row.values()) for row in rows] == [
        ["a", "pretrain", "my.py:Net", "2", "0", "640", "1.0", "0.5", "test", "0.25", ""],
        ["a", "masked", "my.py:Net", "2 of 5", "0", "640", "1.0", "", "", "0.25", ""],
        ["a", "small.pt", "", "", "0", "", "", "0.75", "test", "0.5", "0.01"]]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == list(compare.COLUMNS)
    assert lines[1].split() == ["a", "pretrain", "my.py:Net", "2", "0", "640", "1.0000", "50.00%", "test",
                                "25.00%", "-"]
    assert lines[3].split() == ["a", "small.pt", "-", "-", "0", "-", "-", "75.00%", "test", "50.00%", "0.01000"]
    assert len(lines) == 4  # one run: nothing to average


def test_mean_and_deviation_over_seeds_alone(tmp_path, capsys):
    """Runs with another setting, in this stage or in one before, are no repetitions."""
    for name, seed, accuracy, lr in (("a", 0, 0.5, 1), ("b", 1, 0.7, 1), ("other", 2, 0.9, 2), ("again", 0, 0.5, 3)):
        write_stage(tmp_path / name, "pretrain", accuracy, seed, lr=lr, graphs=name == "a")
        write_stage(tmp_path / name, "masked", accuracy if name != "b" else None, seed, lr=1)
        write_claim(tmp_path / name / f"{name}.pt", accuracy / 10, seed=seed, lr=lr)
    write_stage(tmp_path / "twice", "pretrain", 0.9, 1, lr=1)  # before b, of the same seed
    runs = [tmp_path / name for name in ("a", "twice", "b", "other", "again")]
    rows = compare.over_seeds([row for run in runs for row in compare.rows_of(run, read_stages(run))])
    assert [(row["stage"], row["runs"]) for row in rows] == [("pretrain", 2), ("masked", 2), ("a.pt", 2)]
    assert rows[0]["accuracy"] == pytest.approx((0.6, 0.02**0.5)) and rows[0]["zeros"] == (0.25, 0)
    assert rows[1]["accuracy"] is None and rows[2]["score"] == pytest.approx((0.06, 0.0002**0.5))
    for other in ({"bits": 8}, {"activation_bits": 6}, {"scheme": "layer"}, {"lr": 2}, {"data": "hold-out"},
                  {"digest": "e"}, {"source": "rew"}):
        write_claim(tmp_path / "b" / "b.pt", 0.07, seed=1, **({"lr": 1} | other))
        assert compare.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
        out = capsys.readouterr().out
        assert "60.00% +- 14.14%" in out and out.count("% +- ") == 3 and "0.0600 +-" not in out  # without b.pt


@pytest.mark.parametrize("other", ({"data": "of others"}, {"workers": 8}))
def test_runs_on_other_images_or_in_other_shares_are_no_seeds(tmp_path, other):
    """The same number of other images; each worker's share of a batch has its own BatchNorm statistics."""
    for seed, change in enumerate(({}, {}, other)):
        write_stage(tmp_path / str(seed), "pretrain", 0.5, seed, **({"workers": 2} | change))
    rows = [row for run in tmp_path.iterdir() for row in compare.rows_of(run, read_stages(run))]
    assert [row["runs"] for row in compare.over_seeds(rows)] == [2]


def test_the_epochs_before_a_start_epoch_are_of_another_log(tmp_path):
    write_stage(tmp_path, "masked")
    record = load_json(tmp_path / "masked.options.json")
    record["options"]["start_epoch"] = 0.5
    save_record(record, tmp_path / "masked.options.json")
    (stage,) = read_stages(tmp_path)
    assert [stage.images(line) for line in stage.lines] == [5 * 32, 15 * 32]


def test_a_batch_has_no_more_images_than_there_are(tmp_path):
    write_stage(tmp_path, "pretrain", images=10)
    assert [stage.images(stage.lines[-1]) for stage in read_stages(tmp_path)] == [20 * 10]


def test_a_fine_tuning_and_the_claim_next_to_it(tmp_path):
    write_stage(tmp_path / "out.run", "quantized", 0.6)
    write_claim(tmp_path / "out.pt", 0.02)
    rows = compare.rows_of(tmp_path / "out.run", read_stages(tmp_path / "out.run"))
    assert [(row["stage"], row.get("score")) for row in rows] == [("quantized", None), ("out.pt", 0.02)]
    write_stage(tmp_path / "other.run", "quantized", 0.6, seed=1)
    write_claim(tmp_path / "other.pt", 0.04, seed=1)
    rows += compare.rows_of(tmp_path / "other.run", read_stages(tmp_path / "other.run"))
    assert [(row["stage"], row["runs"]) for row in compare.over_seeds(rows)] == [("quantized", 2), ("out.pt", 2)]


def test_curves_and_layers_of_stages_one_after_the_other(tmp_path, capsys):
    write_stage(tmp_path, "pretrain", 0.5)
    write_stage(tmp_path, "rew", zeros=75)
    points = compare.curves(read_stages(tmp_path))
    assert [at * 1e6 for at, _ in points["loss"]] == [320, 640, 960, 1280]
    assert points["accuracy"] == [(640 / 1e6, 0.5)]
    assert [share for _, share in points["zeros"]] == [0.25, 0.25, 0.75, 0.75]
    save_tensors({"conv.weight": torch.tensor([[[[0.0, 1.0, 0.0, 0.0]]]]), "bn.weight": torch.zeros(3)},
                 tmp_path / "rew.average.pt")  # of an unfinished stage
    assert compare.main([str(tmp_path), "--layers", "--figure", str(tmp_path / "f.svg")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["conv", "75.00%"]
    state = State(tmp_path / "rew.state")
    state.save({"step": 1, "since": 0, "loss": 0.0, "correct": 0, "seconds": 0.0, "log": []},
               {"weights": {"conv.weight": torch.zeros(1, 1, 1, 1)}})
    assert compare.last_weights(tmp_path, "rew").keys() == {"conv.weight"} and not compare.last_weights(tmp_path, "x")
    log = tmp_path / "rew.jsonl"
    log.write_text("".join(json.dumps(line | {"zeros_path": 0.5, "zeros_share": 0.4}) + "\n"
                           for line in map(json.loads, open(log))))
    points = compare.curves(read_stages(tmp_path))
    assert points["path"] == [(960 / 1e6, 0.5), (1280 / 1e6, 0.5)]
    assert points["zeros"][2:] == [(960 / 1e6, 0.4), (1280 / 1e6, 0.4)]  # of the pruned layers, as the path is
    assert (tmp_path / "f.svg").read_text().startswith("<?xml")


def test_runs_as_training_leaves_them(monkeypatch, capsys):
    monkeypatch.setattr(networks, "DEFAULT", SPEC)
    quick = "--pretrain --made-up 32 --batch-size 16 --epochs 1 --no-cuda --precision float32 --refresh 0".split()
    for seed in "01":
        assert training.main([*quick, "--seed", seed, "--run", f"runs/{seed}"]) == 0
    capsys.readouterr()
    assert compare.main(["runs/0", "runs/1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:6] == ["runs/0", "pretrain", networks.DEFAULT, "1", "0", "32"]
    assert lines[-1].split()[:3] == ["pretrain", networks.DEFAULT, "2"]


def test_runs_of_other_starts_are_no_seeds(tmp_path):
    """Each seed may have its own dense network, but not another kind of start; an option counts where it decides."""
    def record(folder, stage, seed, **options):
        save_stage(folder, stage, options, [{"step": 3, "epoch": 1, "loss": 0.5, "zeros": 0, "weights": 9}], data="d",
                   settings={"epochs": 1, "batch_size": 2, "seed": seed})

    def grouped(*runs):
        rows = [row for run in runs for row in compare.rows_of(tmp_path / run, read_stages(tmp_path / run))]
        return [row["stage"] for row in compare.over_seeds(rows)]

    for seed in (0, 1):
        record(tmp_path / f"dense{seed}", "pretrain", seed, target_sparsity=0.5 + seed)
        record(tmp_path / f"dense{seed}", "rew", seed, target_sparsity=0.5)
        record(tmp_path / f"run{seed}", "masked", seed, start=str(tmp_path / f"dense{seed}/pretrain.pt"))
        record(tmp_path / f"late{seed}", "masked", seed, start=str(tmp_path / f"dense{seed}/rew.pt"))
    assert grouped("run0", "run1") == grouped("late0", "late1") == ["masked"] and grouped("run0", "late1") == []
    assert grouped("dense0", "dense1") == ["pretrain", "rew"]
    record(tmp_path / "mixed", "masked", 0, start=str(tmp_path / "dense1/pretrain.pt"))  # of equal seed, other start
    rows = [row for run in ("run0", "run1", "mixed")
            for row in compare.rows_of(tmp_path / run, read_stages(tmp_path / run))]
    assert [row["runs"] for row in compare.over_seeds(rows)] == [3]
    for seed in (0, 1):  # each seed's own dense network as its teacher, too
        for name, teacher in (("taught", "pretrain.pt"), ("other", "rew.pt")):
            path = tmp_path / f"dense{seed}" / teacher
            record(tmp_path / f"{name}{seed}", "masked", seed, teacher=["a.t7", str(path)])
    assert grouped("taught0", "taught1") == grouped("other0", "other1") == ["masked"]
    assert grouped("taught0", "other1") == []
    for seed in (0, 1):  # a copy of its own average, in its own folder
        record(tmp_path / f"own{seed}", "masked", seed, start=str(tmp_path / f"own{seed}/masked.copy.pt"))
    assert grouped("own0", "own1") == ["masked"]
    for seed in (0, 1):  # continued twice from copies in its own folder
        folder = tmp_path / f"twice{seed}"
        record(folder, "masked-1", seed)
        record(folder, "masked-2", seed, start=str(folder / "masked.first.pt"))
        record(folder, "masked", seed, start=str(folder / "masked.second.pt"))
    assert grouped("twice0", "twice1") == ["masked-1", "masked-2", "masked"]


def test_a_record_of_an_older_version_is_averaged_with_a_new_one(tmp_path):
    """Which resolves the options of the penalty, and has digests of the user's own code."""
    for seed, options, more in ((0, {"penalty": None, "lam": None, "target_sparsity": None}, {}),
                                (1, {"penalty": "proximal", "lam": None, "target_sparsity": 0.8}, {"code": {}})):
        write_stage(tmp_path / str(seed), "rew", 0.5, seed)
        path = tmp_path / f"{seed}/rew.options.json"
        record = load_json(path)
        save_record(record | {"options": record["options"] | options} | more, path)
    rows = [row for run in tmp_path.iterdir() for row in compare.rows_of(run, read_stages(run))]
    assert [row["runs"] for row in compare.over_seeds(rows)] == [2]
    save_record(load_json(path) | {"code": {"penalty": "f" * 16}}, path)
    rows = [row for run in tmp_path.iterdir() for row in compare.rows_of(run, read_stages(run))]
    assert compare.over_seeds(rows) == []


def test_networks_of_elsewhere_are_no_seeds_of_one(tmp_path):
    """Without a record of their training, what they were quantized from tells them apart."""
    def write(name, network, source, seed):
        write_claim(tmp_path / f"{name}.pt", 0.1)
        claim = load_json(tmp_path / f"{name}.json")
        made = {"training": [], "source_sha256": source, "options": {"scheme": "layer", "seed": seed}}
        save_record(claim | {"network": {"spec": network}, "made_by": made}, tmp_path / f"{name}.json")

    def runs():
        return [row["runs"] for row in compare.over_seeds(compare.rows_of(tmp_path, []))]

    write("a", "a.py:Net", "0", 0)
    for network, source, expected in (("b.py:Net", "0", []), ("a.py:Net", "1", []), ("a.py:Net", "0", [2])):
        write("b", network, source, 1)
        assert runs() == expected


@pytest.mark.parametrize("prepare, options, said", (
    (lambda: None, "nowhere", "nowhere: there is no run"),
    (lambda: write_stage(Path("a"), "rew"), "a --figure f.doc", "f.doc: Format 'doc' is not supported"),
    (lambda: write_stage(Path("a"), "rew"), "a --csv a", "cannot be written .it is a folder"),
    (lambda: write_stage(Path("a"), "rew"), "a --csv a/rew.jsonl", "over a/rew.jsonl, which is read"),
    (lambda: (write_stage(Path("a"), "rew"), Path("a/rew.jsonl").write_text("{}\n")), "a", "no line of a log"),
    (lambda: (write_stage(Path("a"), "rew"), save_record({}, "a/rew.options.json")), "a", "not what a stage writes"),
    (lambda: (write_stage(Path("a"), "rew"), Path("a/x.pt").touch(), save_record({"tensors": [8]}, "a/x.json")),
     "a", "not a claim with accuracy")))
def test_what_cannot_be_compared_is_refused(prepare, options, said):
    prepare()
    with pytest.raises(BadInput, match=said):
        compare.main(options.split())
