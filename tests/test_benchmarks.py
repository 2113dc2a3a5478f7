"""The benchmarks turn and write what report.py reads. What they measure is not tested: machines are shared."""
import math
import os
import re
import signal
import types

import pytest
import torch

from benchmarks import depthwise_shapes, gpu_check, profile_step, sparsity_methods, training_speed
from compressed import cifar100, kernels
from compressed.errors import BadInput
from compressed.files import load_json, load_record, save_record
from tiny import tiny
from tools import tables
from training import loop


SMALL = ["--network", "mobilenet_v2:SmallMobileNetV2?width=0.2", "--no-cuda"]


@pytest.fixture
def one_round(monkeypatch):
    """Run training_speed for one round of two batches, in this process."""
    library = kernels.library

    def here(*args):
        monkeypatch.setattr(kernels, "library", library)  # some loops take it away, in a process of their own
        return training_speed.on_made_up_images(*args)
    monkeypatch.setattr(training_speed, "in_a_process", here)
    return lambda *options: training_speed.main(["--images", "8", "--batch-size", "4", "--rounds", "1", *SMALL,
                                                 *options])


def test_training_speed(one_round, tmp_path, capsys):
    file = tmp_path / "speed.json"
    assert one_round("--json", str(file)) == 0
    figures = load_json(file)
    assert figures["images"] == 8
    parts = figures["step"]
    assert list(parts) == ["augment", "forward", "backward", "optimizer", "whole"] and min(parts.values()) > 0
    speeds = {name: found[0] for name, found in figures["images_per_second"].items()}
    count = 8 + (figures["precision"] == "bfloat16")
    assert len(speeds) == count and min(speeds.values()) > 0 and len(figures["ratios"]) == count - 1
    assert figures["ratios"]["training / the plain loop"] == pytest.approx(speeds["ours"] / speeds["plain"])
    assert "step: " in capsys.readouterr().out
    rows = tables.training_table(figures).splitlines()[2:]
    assert rows[count] == f"| training / the plain loop | **{speeds['ours'] / speeds['plain']:.2f}** |"
    assert len(rows) == 2 * count - 1 + 4
    shares = [float(re.search(r"([\d.]+)%", row)[1]) for row in rows[-4:]]
    assert sum(shares) == pytest.approx(100, abs=0.03) and rows[-4].startswith("| share of a step: augment |")


def test_the_second_epoch_is_measured(monkeypatch):
    """A clock that runs ever faster shows which of the two it was, each of three steps."""
    made, step = [], loop.Stage.step
    monkeypatch.setattr(loop.Stage, "step", lambda *args: made.append(args) or step(*args))
    monkeypatch.setattr(training_speed, "time", types.SimpleNamespace(perf_counter=lambda: len(made) ** 2))
    data = cifar100.made_up(12, 0, classes=10)
    settings = loop.Settings(epochs=2, batch_size=4, lr=0.01, refresh=0)
    assert training_speed.second_epoch(tiny(), data, settings, compiled=True) == 6**2 - 3**2


def test_fine_tuning_speed(one_round, tmp_path, capsys):
    assert one_round("--fine-tuning", "--json", str(tmp_path / "speed.json")) == 0
    assert len(tables.training_table(load_json(tmp_path / "speed.json")).splitlines()) == 2 + 4 + 3
    _, _, first, *others = capsys.readouterr().out.splitlines()
    assert all(name in first for name in training_speed.FINE_TUNING) and first.count("images/s") == 4
    ratios = [float(line.split(" / masked training: ")[1]) for line in others]
    assert len(ratios) == 3 and all(ratio > 0 for ratio in ratios)


def test_training_speed_alone_in_float32(one_round, monkeypatch):
    asked = []
    monkeypatch.setattr(training_speed, "in_a_process", lambda epoch, *_: asked.append(epoch.keywords) or 2.0)
    monkeypatch.setattr(training_speed, "step_parts", lambda *_: {"forward": 1.0, "whole": 1.0})
    assert one_round("--alone", "--precision", "float32") == 0
    assert len(asked) == 6 and [each["settings"].precision for each in asked if "settings" in each] == ["float32"] * 5


def test_a_measurement_has_a_process_of_its_own():
    """What the allocator is told there is forgotten with it."""
    assert training_speed.in_a_process(process_id, 2, torch.device("cpu")) != os.getpid()


def process_id(data):
    assert len(data) == 2
    return os.getpid()


def test_an_epoch_has_two_batches(capsys):
    with pytest.raises(SystemExit) as stopped:
        training_speed.main(["--no-cuda", "--images", "39", "--batch-size", "20"])
    assert stopped.value.code == 2 and "expected " in capsys.readouterr().err


def test_depthwise_shapes(tmp_path, capsys):
    file = tmp_path / "shapes.json"
    assert depthwise_shapes.main(["--batch-size", "2", "--rounds", "1", "--no-cuda", "--json", str(file)]) == 0
    rows = load_json(file)["shapes"]
    found = [(row["channels"], row["side"], row["stride"]) for row in rows]
    assert len(rows) == 17 and (found[0], found[-1]) == ((40, 32, 1), (1248, 4, 1))
    assert sum(stride == 2 for *_, stride in found) == 3
    variants = [name for name in depthwise_shapes.VARIANTS if name in rows[0]]
    assert len(variants) == (2 if kernels.library(torch.bfloat16) is None else 3)
    assert all(figure > 0 for row in rows for name in variants for figure in row[name].values())
    last = capsys.readouterr().out.splitlines()[-1]
    strided = [row["bfloat16"] for row in rows if row["stride"] == 2]
    assert f"{1000 * sum(each['forward'] for each in strided):.2f} +" in last


def test_sparsity_methods(tmp_path, capsys, monkeypatch):
    """A stopped run is resumed; rows of equal images; the table of means; other options are refused."""
    file = tmp_path / "methods.json"
    options = ["--made-up", "60", "--batch-size", "15", "--epochs", "1", "1", "1", *SMALL,
               "--sizes", "8:0.5,32", "--seeds", "1", "--targets", "0.5", "--runs", str(tmp_path / "runs"),
               "--json", str(file), "--methods", "one-shot", "magnitude", "loss", "dense",
               "--lambda", "1e-5", "1e-3"]
    with pytest.raises(BadInput, match="stopped; the same command resumes it"):
        sparsity_methods.main([*options, "--max-minutes", "0"])
    assert sparsity_methods.main(options) == 0
    rows = {row["method"]: row for row in load_json(file)["rows"]}
    losses = ["loss-1e-05", "loss-0.001"]
    assert list(rows) == ["one-shot", "magnitude", *losses, "dense"]
    assert len({row["accuracy_dense"] for row in rows.values()}) == 1
    assert rows["dense"]["accuracy_made"] == rows["one-shot"]["accuracy_made"]
    assert all(rows[name]["zeros_made"] == 0 for name in ("one-shot", "dense", *losses))
    dense = rows.pop("dense")
    assert (dense["target"], dense["zeros"], dense["fewest_kept"]) == (0, 0, 1)
    assert len({row["zeros"] for row in rows.values()}) == 1 and rows["magnitude"]["zeros_made"] > 0
    assert rows["one-shot"]["near_zero"] < 0.1 and rows["magnitude"]["near_zero"] == pytest.approx(0.5, abs=0.01)
    assert all(0 < row["fewest_kept"] < 0.5 for row in rows.values())
    out = capsys.readouterr().out
    assert "0% zeros, dense: " in out and "50% zeros, loss-0.001: " in out and "the same 100 images" in out
    above = 100 * (rows["magnitude"]["accuracy"] - rows["one-shot"]["accuracy"])
    assert f"(1); minus one-shot, by seed: {above:+.2f} points" in out
    seeds = tmp_path / "runs" / "seed-0"
    records = [load_json(path) for path in seeds.rglob("*.options.json")]
    assert len(records) == 10 and len({record["data"] for record in records}) == 1
    assert {record["settings"]["workers"] for record in records} == {2}
    assert {record["options"]["updates"] for record in records if record["options"]["penalty"] == "loss"} == {20}
    before = file.read_bytes()
    assert sparsity_methods.main(options) == 0 and file.read_bytes() == before
    file.unlink()  # as if it had been stopped before it was written
    assert sparsity_methods.main(options) == 0 and file.read_bytes() == before
    with pytest.raises(BadInput, match="holds results of other options"):
        sparsity_methods.main([*options, "--sizes", "32"])
    with monkeypatch.context() as changed:
        changed.setattr(sparsity_methods, "UPDATES", "5")
        with pytest.raises(BadInput, match="loss-1e-05/rew.pt was trained with other options .updates 20 -> 5"):
            sparsity_methods.main([*options, "--json", str(tmp_path / "other.json")])
    record = load_record(seeds / "pretrain.options.json", "")
    save_record(record | {"settings": record["settings"] | {"workers": 1}}, seeds / "pretrain.options.json")
    with pytest.raises(BadInput, match="pretrain.pt was trained by 1 workers, and not by 2"):
        sparsity_methods.main([*options, "--json", str(tmp_path / "third.json")])


def test_only_the_first_seed_tries_every_lambda(tmp_path, monkeypatch):
    """The others train the best one for each target."""
    found = {("loss-1e-05", 0.5): 0.3, ("loss-0.001", 0.5): 0.2, ("loss-1e-05", 0.7): 0.1, ("loss-0.001", 0.7): 0.2}
    monkeypatch.setattr(sparsity_methods.Runs, "measure", lambda self, method, target, seed: {
        "method": method, "target": target, "seed": seed, "accuracy": found.get((method, target), 0.4) - 0.04 * seed})
    file = tmp_path / "methods.json"
    assert sparsity_methods.main(["--made-up", "60", "--seeds", "3", "--targets", "0.5", "0.7", "--json", str(file),
                                  "--methods", "loss", "one-shot", "--lambda", "1e-5", "1e-3"]) == 0
    rows = [(row["seed"], row["target"], row["method"]) for row in load_json(file)["rows"]]
    assert len(rows) == 2 * 3 + 2 * 2 * 2
    assert rows[6:] == [(seed, target, method) for seed in (1, 2) for target, best in ((0.5, "1e-05"), (0.7, "0.001"))
                        for method in (f"loss-{best}", "one-shot")]


def test_a_signal_in_a_last_step_ends_the_comparison(tmp_path, monkeypatch):
    """The stage is finished, and no other one is begun."""
    def train(words):
        os.kill(os.getpid(), signal.SIGTERM)
        (tmp_path / "rew.pt").touch()
    monkeypatch.setattr(sparsity_methods.training, "main", train)
    runs = sparsity_methods.Runs(sparsity_methods.parse(["--json", "x.json"]))
    with pytest.raises(BadInput, match="stopped"):
        runs.train("rew", tmp_path, 1)


def test_means_and_differences_of_seeds():
    """Differences are of seeds that both have."""
    rows = [{"method": method, "target": 0.8, "seed": seed, "accuracy": accuracy} for method, seed, accuracy in (
        ("one-shot", 2, 0.4), ("one-shot", 0, 0.5), ("loss-0.0001", 1, 0.7), ("loss-0.0001", 0, 0.5),
        ("loss-1e-05", 0, 0.6), ("loss-1e-05", 2, 0.3875))]
    found = tables.by_seed(rows)[0.8]
    assert list(found) == ["loss-1e-05", "loss-0.0001", "one-shot"] and found["one-shot"] == {0: 0.5, 2: 0.4}
    assert tables.mean_of(found["loss-0.0001"]) == "60.00% ± 14.14% (2)" and tables.mean_of({1: 0.7}) == "70.00% (1)"
    assert tables.differences(found["loss-1e-05"], found["one-shot"]) == "+10.00, -1.25"
    assert tables.differences(found["loss-0.0001"], found["one-shot"]) == "+0.00"


def test_profile_step(capsys):
    assert profile_step.main([*SMALL, "--batch-size", "4", "--size", "8", "--steps", "2", "--teacher", "--json",
                              "profile.json"]) == 0
    printed = capsys.readouterr().out
    assert "SmallMobileNetV2" in printed.splitlines()[1] and printed.rstrip().endswith("in a step")
    rows = load_json("profile.json")["kernels"]
    assert [row["seconds"] for row in rows] == sorted((row["seconds"] for row in rows), reverse=True)
    assert any("convolution" in row["name"] and row["calls"] >= 1 for row in rows)


def test_gpu_check_needs_a_gpu():
    with pytest.raises(BadInput, match="there is no CUDA device"):
        gpu_check.main(["--no-cuda"])


def test_gpu_check_times_each_layer(monkeypatch, capsys):
    """The rows of both networks, with made-up times: 17 depthwise convolutions and every BatchNorm are counted."""
    monkeypatch.setattr(gpu_check.gpu_kernels, "measured", lambda layer: (
        {"pytorch": 2e-4, "ours": 1e-4, "distance": 1e-3} if layer.kind == "depthwise" else
        {"pytorch": 2e-4, "ours": math.inf, "error": "RuntimeError: no"}))
    for network, depthwise, norms in zip(gpu_check.NETWORKS, (17, 16), (57, 50)):
        rows = gpu_check.check_layers(network, 16, 4, torch.device("cpu"), math.inf)
        assert sum(row["count"] for row in rows if row["kind"] == "depthwise") == depthwise
        assert sum(row["count"] for row in rows if row["kind"] == "BatchNorm") == norms
        assert f"depthwise: PyTorch {depthwise * 0.2:.2f} ms a step, the faster of both {depthwise * 0.1:.2f} ms" in (
            capsys.readouterr().out)
    assert gpu_check.check_layers(network, 16, 4, torch.device("cpu"), 0.0) == []
