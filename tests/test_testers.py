import contextlib
import io
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import check_model_operations
import quantize
import testers
from compressed import checkpoints, cifar100, claims, exactness, grids, mnet, networks
from compressed.checkpoints import SHIPPED
from compressed.command_line import run_script
from compressed.errors import BadInput
from compressed.evaluation import logits
from compressed.exact_network import exact_network
from compressed.files import load_json, save_json, save_record, save_tensors, sha256
from compressed.formats import NOT_FOLDED, WORD, Activation, Formats, Grid, folded, found_grid
from compressed.graph import prepare, read_graph, weight_layers
from compressed.networks import load_checkpoint
from small import NARROW, layer_neighbours
from tools import report, shipping

SCRIPT = Path(testers.__file__)
MADE_UP = ("--made-up", "100")


@pytest.fixture(scope="module")
def original(narrow_checkpoint, tmp_path_factory):
    """A checkpoint and its claim, made by quantize.py."""
    out = tmp_path_factory.mktemp("shipped") / "network.pt"
    with contextlib.redirect_stdout(io.StringIO()):
        quantize.main(["--checkpoint", str(narrow_checkpoint), "--out", str(out), "--calibration", "20",
                       "--ranges", "max", "--renew", "0", "--network", NARROW, *MADE_UP])
    return out


@pytest.fixture
def shipped(original, tmp_path):
    """A copy of it to do harm to."""
    for file in (original, original.with_suffix(".json")):
        shutil.copy(file, tmp_path)
    return tmp_path / original.name


@pytest.fixture
def run(capsys, monkeypatch):
    """The command line, in this process: (status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])

    def run(*argv):
        with pytest.raises(SystemExit) as exit:
            run_script(lambda: testers.main([str(word) for word in argv]))
        return exit.value.code, *capsys.readouterr()
    return run


def entry(claim, name, key="tensors"):
    return next(entry for entry in claim[key] if entry["name"] == name)


# ------------------------------------------------------------------------------------------------- as it should be

def test_a_true_claim_is_verified(original, run):
    claim = load_json(original.with_suffix(".json"))
    status, out, err = run("--checkpoint", original, *MADE_UP)
    assert (status, err) == (0, "")
    correct = claim["accuracy"]["correct"]
    assert re.findall("^Accuracy: .*", out, re.M) == [f"Accuracy: {correct}/100 ({correct}.00%)"]
    assert f"Loss: {claim['accuracy']['loss']:.4f} (made up set)" in out
    assert "logits of the fixed made-up batch: as recorded, to the last bit" in out
    assert f"SHA-256 {sha256(original)}" in out

    # counted once more, value by value
    state, network = load_checkpoint(original, NARROW).state_dict(), networks.make(NARROW)
    layers = [name for name, _ in weight_layers(network)]
    rows = [line.split() for line in out.splitlines() if re.match(r" +\d+  \S", line)]
    assert [row[0] for row in rows] == [str(i) for i in range(58)]
    assert [row[1] for row in rows] == [f"{name}.weight" for name in layers]
    bits, zeros, total = grids.bit_table(None, network), {}, {}
    for index, row in enumerate(rows):
        weight = state[row[1]]
        zeros[row[1]], total[row[1]] = sum(value == 0 for value in weight.flatten().tolist()), weight.numel()
        assert row[2] == "x".join(map(str, weight.shape))
        assert [int(figure.replace(",", "")) for figure in row[3:6]] == \
            [weight.numel(), zeros[row[1]], weight.numel() - zeros[row[1]]]
        assert row[6] == f"{zeros[row[1]] / weight.numel():.4f}" and 2 <= int(row[7]) <= bits[index]
        assert row[8] == "(power"
    others = re.findall(r"^ {7}(\S+\.(?:weight|bias)) .*", out, re.M)
    assert len(others) == len(set(others)) == 115 and not set(others) & set(zeros)
    linear, linear_zeros = total.pop("linear.weight"), zeros.pop("linear.weight")
    conv, conv_zeros = sum(total.values()), sum(zeros.values())
    for label, n, z in (("convolutions and linear, exact", conv + linear, conv_zeros + linear_zeros),
                        ("convolutions alone, exact", conv, conv_zeros), ("linear alone, exact", linear, linear_zeros),
                        ("the submission's convention (ACCOUNT.md)", conv + 1280 * 100, conv_zeros)):
        figures = out.split(f"  {label} ")[1].splitlines()[0].split()
        assert figures == [f"{n:,}", f"{z:,}", f"{n - z:,}", f"{z / n:.4f}", f"{n / (n - z):.4f}"]
    storage = claim["counts"]["storage"]["total"]
    assert f"storage by the challenge's rules: {storage:,} bits = {storage / 32e6:.4f}M" in out
    assert f"score term {storage / 32 / 36.5e6:.5f}" in out


def test_json_holds_the_same(original, run):
    claim = load_json(original.with_suffix(".json"))
    status, out, err = run("--checkpoint", original, "--json", *MADE_UP)
    report = json.loads(out)
    assert (status, err) == (0, "") and report["problems"] == []
    assert report["sha256"] == sha256(original) and report["checkpoint"] == str(original)
    assert {key: report[key] for key in claim["accuracy"]} == pytest.approx(claim["accuracy"])
    assert report["counts"] == claim["counts"] and len(report["tensors"]) == 173
    row = next(row for row in report["tensors"] if row["name"] == "layers.1.conv3.weight")
    weight = load_checkpoint(original, NARROW).layers[1].conv3.weight
    assert (row["index"], row["shape"], row["total"]) == (7, [16, 48, 1, 1], 768)
    assert row["zeros"] == int((weight == 0).sum())


def test_the_summary_leaves_out_the_tensors(original, run):
    status, out, err = run("--checkpoint", original, "--summary", *MADE_UP)
    assert (status, err) == (0, "") and "Accuracy: " in out and "Score" not in out and "Weights  " in out
    assert "layers.3.conv1.weight" not in out and len(out.splitlines()) < 20


@pytest.mark.parametrize("value, said", [(1e38, "the loss is"), (-1.0, "holds a variance below zero")])
def test_values_that_cannot_be(narrow_checkpoint, tmp_path, run, value, said):
    """A float network that answers nothing is not verified, in JSON either."""
    state = torch.load(narrow_checkpoint)
    state["linear.bias" if value > 0 else "bn1.running_var"][0] = value
    if value > 0:
        state["linear.weight"].mul_(1e38)
    save_tensors(state, tmp_path / "a.pt")
    for words in ((), ("--json",)):
        status, out, err = run("--checkpoint", tmp_path / "a.pt", "--network", NARROW, "--made-up", "10", *words)
        assert status == 2 and said in err and "Loss:" not in out
        if words and out:
            assert "loss" not in json.loads(out, parse_constant=pytest.fail)


def test_a_layer_of_zeros_alone_has_no_compression(narrow_checkpoint, tmp_path, run):
    state = torch.load(narrow_checkpoint)
    state["linear.weight"].zero_()
    save_tensors(state, tmp_path / "a.pt")
    status, out, err = run("--checkpoint", tmp_path / "a.pt", "--network", NARROW, "--made-up", "10", "--summary")
    assert status == 0 and "no bound" in out
    status, out, err = run("--checkpoint", tmp_path / "a.pt", "--network", NARROW, "--made-up", "10", "--json")
    assert json.loads(out)["counts"]["weights"]["linear"]["compression"] is None


def test_without_a_claim_it_is_a_float_network(narrow_checkpoint, run):
    status, out, err = run("--checkpoint", narrow_checkpoint, "--network", NARROW, *MADE_UP)
    data = cifar100.made_up(100, 1)
    with torch.no_grad():
        logits = load_checkpoint(narrow_checkpoint, NARROW)(cifar100.normalise(data.images))
    correct = int((logits.argmax(1) == data.labels).sum())
    assert (status, err) == (0, "") and f"Accuracy: {correct}/100 ({correct}.00%)" in out
    assert "no claim: evaluated in float32" in out and "logits of the fixed" not in out
    assert "32 (float32)" in out


def test_weights_that_never_run_are_said(shipped, run):
    Path("spare.py").write_text("""from mobilenet_v2 import MobileNetV2, nn

def make(num_classes):
    model = MobileNetV2(num_classes, 0.25)
    model.spare = nn.Linear(7, 5)
    return model
""")
    model = networks.make("spare.py:make")
    save_tensors(model.state_dict(), "spare.pt")
    status, out, _ = run("--checkpoint", "spare.pt", "--network", "spare.py:make", "--made-up", "100", "--summary")
    assert status == 0 and "\n35 weights are in layers that never run" in out
    assert "never run" not in "".join(run("--checkpoint", shipped, *MADE_UP, "--summary")[1:])


@pytest.mark.parametrize("images, correct", [(100, 7), (10_000, 8192)])
def test_the_accuracys_line(shipped, run, monkeypatch, images, correct):
    """`Accuracy: N/10000 (xx.xx%)`, whatever the data."""
    monkeypatch.setattr(cifar100, "load", lambda folder, split,
                        device: cifar100.Images(torch.zeros(images, 1), torch.zeros(images)))
    monkeypatch.setattr(testers, "evaluate", lambda network, data: (1.5, torch.arange(images) < correct))
    monkeypatch.setattr(cifar100, "near_duplicates", lambda folder: None)
    shipped.with_suffix(".json").unlink()
    status, out, _ = run("--checkpoint", shipped, "--network", NARROW)
    assert status == 0
    assert f"\nLoss: 1.5000 (test set)\nAccuracy: {correct}/{images} ({100 * correct / images:.2f}%)\n" in out
    assert "without a near-duplicate in the train set: not known" in out


def test_the_images_without_a_near_duplicate(shipped, run, monkeypatch):
    """Counted where the published order is known, held against the claim, and never made up elsewhere."""
    claim, data = load_json(shipped.with_suffix(".json")), cifar100.made_up(100, 1)
    marked = torch.arange(100) % 3 == 0
    monkeypatch.setattr(cifar100, "load", lambda folder, split, device: data)
    monkeypatch.setattr(cifar100, "near_duplicates", lambda folder: marked)
    network = exact_network(load_checkpoint(shipped, NARROW), claim["activations"])
    right = logits(network, data.images).argmax(1) == data.labels
    part = {"correct": int(right[~marked].sum()), "images": 66}
    claim["accuracy"]["data"] = "test"
    for stated, wrong in ((None, False), (part, False), (part | {"correct": part["correct"] + 1}, True)):
        claim["accuracy"] |= {} if stated is None else {"without_duplicates": stated}
        save_record(claim, shipped.with_suffix(".json"))
        status, out, err = run("--checkpoint", shipped)
        assert status == 2 * wrong and ("without near-duplicates" in err) == wrong
        assert f"a near-duplicate in the train set: {part['correct']}/66 (" in out
    monkeypatch.setattr(cifar100, "near_duplicates", lambda folder: None)
    status, out, err = run("--checkpoint", shipped, "--json")
    assert status == 2 and "found not known" in err and json.loads(out)["without_duplicates"] is None


# ------------------------------------------------------------------------------------------------------ without data

def test_without_data_everything_else_is_checked(original, run, tmp_path, monkeypatch):
    status, out, err = run("--checkpoint", original, "--data", tmp_path)
    assert status == 2 and "Accuracy: NOT VERIFIED" in out and "Loss" not in out
    assert err.startswith("testers.py: the accuracy was not verified: ") and err.count("\n") == 1
    assert str(tmp_path) in err
    complete = run("--checkpoint", original, *MADE_UP)[1]
    assert out.split("\n\n")[1:] == complete.split("\n\n")[1:] and "as recorded, to the last bit" in out
    monkeypatch.setenv("CIFAR100_DIR", str(tmp_path / "nowhere"))
    status, out, err = run("--checkpoint", original, "--json")
    report = json.loads(out)
    assert status == 2 and "correct" not in report and len(report["problems"]) == 1 and "NOT" not in out


def test_a_packed_file_alone_is_said_to_record_nothing(original, run, tmp_path):
    """Its accuracy cannot be compared with any, and nothing is said to differ."""
    mnet.pack(*checkpoints.load(original), tmp_path / "alone.mnet")
    status, out, err = run("--checkpoint", tmp_path / "alone.mnet", "--network", NARROW, *MADE_UP)
    assert status == 2 and "quantized as claimed by alone.mnet" in out and "made-up batch: not recorded" in out
    assert err == f"testers.py: the accuracy was not verified: {tmp_path / 'alone.mnet'} claims none\n"
    assert run("--checkpoint", original, *MADE_UP)[1].split("\n\n")[1:] == out.split("\n\n")[1:]


def test_a_claim_writes_no_line_into_the_report(shipped, run):
    claim = load_json(shipped.with_suffix(".json"))
    claim["accuracy"] |= {"a\n\x1b[1mAccuracy: 100/100": 1}
    save_record(claim | {"b\nAccuracy: 99/100": 1, "probe_logits": []}, shipped.with_suffix(".json"))
    status, out, err = run("--checkpoint", shipped, *MADE_UP)
    assert status == 2 and len(re.findall("^.*Accuracy:", out, re.M)) == 2 and "\x1b" not in out
    assert "the logits of the fixed made-up batch are not those recorded" in err


@pytest.mark.parametrize("key", ("probe_logits", "counts", "accuracy"))
def test_what_is_taken_out_of_a_claim_is_missed(shipped, run, key):
    claim = load_json(shipped.with_suffix(".json"))
    del claim[key]
    save_record(claim, shipped.with_suffix(".json"))
    status, _, err = run("--checkpoint", shipped, *MADE_UP)
    assert status == 2 and err.count("\n") == 1


def test_a_json_of_somebody_else_is_no_altered_claim(shipped, run):
    save_json({"lr": 0.1}, shipped.with_suffix(".json"))
    status, _, err = run("--checkpoint", shipped, *MADE_UP)
    assert status == 2 and "network.json: not written by a script of this repository" in err and "altered" not in err


def test_other_data_than_the_claims_do_not_verify_it(original, run):
    status, out, err = run("--checkpoint", original, "--made-up", "600")
    assert status == 2 and "the accuracy was not verified: tested on 120 made up images, the claim has {'data'" in err
    assert re.search(r"Accuracy: \d+/120", out)


def test_a_data_set_is_known_by_its_images_and_not_by_the_name_of_its_file(narrow_checkpoint, tmp_path, run):
    generator, arrays = np.random.default_rng(0), {}
    for part, count in ("train", 300), ("test", 100):
        arrays |= {f"{part}_images": generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
                   f"{part}_labels": np.arange(count) % 100}
    np.savez(tmp_path / "mine.npz", **arrays)
    out = tmp_path / "network.pt"
    quantize.main(["--checkpoint", str(narrow_checkpoint), "--out", str(out), "--calibration", "20", "--ranges", "max",
                   "--renew", "0", "--network", NARROW, "--data", str(tmp_path / "mine.npz")])
    shutil.move(tmp_path / "mine.npz", tmp_path / "renamed.npz")
    assert run("--checkpoint", out, "--data", tmp_path / "renamed.npz")[0] == 0
    np.savez(tmp_path / "mine.npz", **arrays | {"test_labels": arrays["test_labels"][::-1]})
    status, _, err = run("--checkpoint", out, "--data", tmp_path / "mine.npz")
    assert status == 2 and "the accuracy was not verified: tested on mine.npz (100 classes" in err


# ------------------------------------------------------------------------------------------------- a tampered claim

def test_whatever_is_altered_by_hand_is_refused(shipped, run):
    """Also what nobody can see in the values: the claim carries a digest of itself."""
    beside = shipped.with_suffix(".json")
    save_json(load_json(beside) | {"made_by": {}}, beside)
    status, out, err = run("--checkpoint", shipped, *MADE_UP)
    assert (status, out) == (2, "") and "altered since it was written" in err and err.count("\n") == 1


def test_what_is_not_checked_here_is_named(original, run):
    """Every key of a claim is compared with something or named, whoever wrote it."""
    line = "not checked here (in brackets, the command that computes it again): checkpoint (cannot be checked), dead_w"
    assert line in run("--checkpoint", original, *MADE_UP)[1]
    claim = load_json(original.with_suffix(".json"))
    assert all(key in claims.CHECKED or key in claims.RECORDED for key in claim)
    assert not any("unknown" in part for part in claims.unchecked(claim))
    claim["accuracy"]["top5"], claim["score"], claim["tensors"][3]["zeros"] = 1.0, 0.001, 9
    assert [part for part in claims.unchecked(claim) if "unknown" in part] == [
        "score (unknown)", "accuracy.top5 (unknown)", "tensors.zeros (unknown)"]


def last_bit(claim):
    value = claim["probe_logits"][3][99]
    claim["probe_logits"][3][99] = torch.tensor(value).nextafter(torch.tensor(9e9)).item()


TAMPERED = {  # what else the claim may get wrong: test_check_model_operations.py
    "bits too low": (lambda claim: entry(claim, "layers.4.conv1.weight").update(bits=7),
                     ["layers.4.conv1.weight: the values are no [67]-bit multiples of the claimed step"]),
    "correct count": (lambda claim: claim["accuracy"].update(correct=claim["accuracy"]["correct"] + 1),
                      [r"the claim has \d+ correct images, but \d+ were found"]),
    "loss": (lambda claim: claim["accuracy"].update(loss=claim["accuracy"]["loss"] - 1e-4),
             ["the claim has the loss 4."]),
    "no loss": (lambda claim: claim["accuracy"].update(loss=None), ["the claim has the loss None, but "]),
    "another set": (lambda claim: claim["accuracy"].update(data="test"),
                    ["the accuracy was not verified: tested on 100 made up"]),
    "accuracy is a number": (lambda claim: claim.update(accuracy=0.9), ["the accuracy was not verified"]),
    "counts": (lambda claim: claim["counts"]["weights"]["all"].update(zeros=1),
               ["the counts in the claim are not those of the file"]),
    "last bit of a logit": (last_bit, ["the logits of the fixed made-up batch are not those recorded"]),
    "another file": (lambda claim: claim.update(sha256="0" * 64), ["about another file, with SHA-256 0000"]),
    "activation's bits": (lambda claim: entry(claim, "layers.16.out", "activations").update(bits=2),
                          ["the logits of the fixed", "the counts in the claim are not those of the file"]),
    "activation's sign": (lambda claim: entry(claim, "layers.16.out", "activations").update(signed=False),
                          ["activation layers.16.out: signed is False, expected True"]),
    "inexact sums": (lambda claim: entry(claim, "features", "activations").update(step=2.0**-100),
                     [r"sums of products may exceed 2\^24"]),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_tampered_claim(shipped, run, what):
    change, messages = TAMPERED[what]
    claim = load_json(shipped.with_suffix(".json"))
    change(claim)
    save_record(claim, shipped.with_suffix(".json"))
    status, out, err = run("--checkpoint", shipped, *MADE_UP)
    assert status == 2
    for message in messages:
        assert re.search(f"^testers.py: .*{message}", err, re.M), err
    if len(messages) == 1 and what != "inexact sums":
        assert err.count("\n") == 1  # it names this and nothing else


# --------------------------------------------------------------------------------------------- a tampered checkpoint

def tamper(path, change):
    state = load_checkpoint(path, NARROW).state_dict()
    change(state)
    save_tensors(state, path)


def largest_turned(state):
    weight = state["layers.7.conv3.weight"].view(-1)
    weight[int(weight.abs().argmax())] *= -1  # the grid is kept, and all of the counts


def one_zero_more(state):
    weight = state["layers.3.conv1.weight"].view(-1)
    weight[int(weight.nonzero()[0])] = 0


def off_its_grid(state):
    state["layers.3.conv1.weight"].view(-1)[0] += 1e-3


def not_folded(state):
    state["layers.5.bn2.running_mean"].add_(0.5)


@pytest.mark.parametrize("change, message", (
    (largest_turned, "the logits of the fixed made-up batch are not those recorded"),
    (one_zero_more, "the counts in the claim are not those of the file"),
    (off_its_grid, r"layers.3.conv1.weight: the values are no \d-bit multiples of the claimed step"),
    (not_folded, "layers.5.bn2.weight: the values need 32 bits")))
def test_a_tampered_checkpoint(shipped, run, change, message):
    tamper(shipped, change)
    status, out, err = run("--checkpoint", shipped, *MADE_UP)
    assert status == 2 and "is about another file" in err and re.search(f"^testers.py: {message}", err, re.M)
    assert "NOT as recorded" in out or change is not largest_turned


def test_scales_and_shifts_hidden_in_the_statistics(shipped):
    """Weight and bias need a bit or two then, and the statistics, which nobody counts, hold scale and shift."""
    model, claim = checkpoints.load(shipped)
    scale, shift = folded(norm := model.layers[5].bn2)
    used = scale != 0
    with torch.no_grad():
        norm.weight.copy_(scale.sign())
        norm.running_var.copy_(torch.where(used, scale.abs() ** -2 - norm.eps, 1))
        norm.running_mean.copy_(torch.where(used, -shift / scale, 0))
        norm.bias.copy_(torch.where(used, 0, shift))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(folded(norm), (scale, shift)))
    for entry in claim["tensors"]:
        if entry["name"] in ("layers.5.bn2.weight", "layers.5.bn2.bias"):
            entry.pop("kind", None)
            entry |= {"bits": WORD if entry["name"].endswith("bias") else 2, "step": 1.0}
    formats, problems = claims.check(claim, shipped, model)
    assert problems == ["layers.5.bn2.weight: the values need 32 bits (float32, statistics not folded in), claimed 2",
                        "layers.5.bn2.bias: it has no step or kind of its own: the statistics of the BatchNorm are not "
                        "folded in"]
    assert all(formats.tensors[f"layers.5.bn2.{name}"] == Grid(WORD, kind=NOT_FOLDED) for name in ("weight", "bias"))


def test_values_of_a_vector_have_no_steps_of_their_own():
    """Else each would be a code of one bit, and its step the number itself."""
    values = torch.tensor([0.25, -0.5, 1.0])
    entry = {"name": "bn.weight", "bits": 2, "step": [0.25, 0.5, 1.0]}
    with pytest.raises(BadInput, match="neither a number from .* nor one for each channel"):
        claims.claimed_grid(entry, values, found_grid(values))


def test_what_the_forward_pass_does_not_use_is_no_part_of_a_claim(shipped):
    model, claim = checkpoints.load(shipped)
    model.spare = torch.nn.Linear(3, 3, bias=False)
    torch.nn.init.zeros_(model.spare.weight)
    claim["tensors"].append({"name": "spare.weight", "bits": 1, "step": 1.0})
    assert claims.check(claim, shipped, model)[1] == [
        "spare.weight: the forward pass does not use it; take it out of the network and of the checkpoint"]


def test_no_accuracy_without_near_duplicates_is_claimed_of_other_images(shipped, run):
    path = shipped.with_suffix(".json")
    claim = load_json(path)
    claim["accuracy"]["without_duplicates"] = {"correct": 90, "images": 91}
    save_record(claim, path)
    status, _, err = run("--checkpoint", shipped, *MADE_UP)
    assert status == 2 and "that is known of CIFAR-100's test set alone" in err


def test_other_images_are_not_cifar_100():
    own = cifar100.DataSet("mine.npz", 100, "0" * 16)
    assert testers.same_images({"name": "yours.npz", "classes": 100, "digest": own.digest}, own)
    assert not testers.same_images({"name": "CIFAR-100", "classes": 100, "digest": own.digest}, own)


def test_claimed_steps_that_are_no_powers_of_two_allow_one_rounding():
    steps = torch.tensor([0.3, 0.1, 0.7, 0.013])[:, None]
    values = torch.arange(-8, 4).view(4, 3) * steps
    entry = {"name": "w", "bits": 4, "step": steps.flatten().tolist()}
    assert claims.claimed_grid(entry, values, found_grid(values)).bits == 4
    values[2, 1] += 1e-5
    with pytest.raises(BadInput, match="no 4-bit multiples of the claimed step"):
        claims.claimed_grid(entry, values, found_grid(values))


def test_nobody_works_with_an_altered_checkpoint(shipped, capsys):
    """Signs of the linear layer turned: formats and counts are as claimed, but it is another network. Nothing is
    recorded."""
    from tools import export_onnx, integer, pack

    pack.main(["--checkpoint", str(shipped)])
    with pytest.raises(BadInput, match="holds no integer, onnx"):  # it is true, but not all is measured
        report.main(["--checkpoint", str(shipped)])
    tamper(shipped, lambda state: state["linear.weight"].view(-1)[:3000].neg_())
    before = {path: path.read_bytes() for path in shipped.parent.iterdir()}
    capsys.readouterr()
    for script, *options in ((pack,), (integer, "--record", *MADE_UP), (export_onnx, "--record", *MADE_UP),
                             (export_onnx,), (report,),
                             (check_model_operations, "--summary")):
        with pytest.raises(SystemExit) as stopped:
            run_script(lambda: script.main(["--checkpoint", str(shipped), *options]))
        assert stopped.value.code == 2 and "is about another file" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in shipped.parent.iterdir()} == before


# -------------------------------------------------------------------------------------------------------- exactness

def test_the_largest_sum(original):
    model = load_checkpoint(original, NARROW)
    claim = load_json(original.with_suffix(".json"))
    grids = {e["name"]: Grid(e["bits"], (e["step"],) if "step" in e else (), "claimed") for e in claim["tensors"]}
    activations = {e["name"]: Activation(e["bits"], e["signed"]) for e in claim["activations"]}
    steps = {e["name"]: e["step"] for e in claim["activations"]}

    def largest(formats):
        found = []
        for name, (_, source) in layer_neighbours(model).items():
            codes = (model.get_submodule(name).weight.double() / entry(claim, f"{name}.weight")["step"]).flatten(1)
            extremes = [formats.activations[source].low * codes, formats.activations[source].high * codes]
            found += [torch.maximum(*extremes).sum(1).max(), -torch.minimum(*extremes).sum(1).min()]
        return int(max(found))

    for width in (8, 9):
        formats = Formats(grids, activations | {"relu2": Activation(width, False), "relu1": Activation(width, False)})
        assert exactness.float32_bound(model, formats, steps) == largest(formats) < 2**24
    formats = Formats(grids, dict.fromkeys(activations, Activation(16, False)))
    assert exactness.float32_bound(model, formats, steps) <= 2**24 < largest(formats)  # the largest are not in float32
    for grid in (Grid(8, (0.3,), "even"), Grid(16, kind="float16")):
        for name in ("conv2.weight", "linear.weight"):
            assert exactness.float32_bound(model, Formats(grids | {name: grid}, activations), steps) == sys.maxsize


def test_sums_that_floats_cannot_hold():
    assert exactness.largest_sum([(2.0**-140, 100)]) == 100 and exactness.largest_sum([(2.0**-150, 100)]) == sys.maxsize
    assert exactness.largest_sum([(2.0**120, 100)]) == 100 and exactness.largest_sum([(2.0**121, 100)]) == sys.maxsize
    assert exactness.largest_sum([(2.0**-150, 100)], 0, math.inf) == 100


def test_more_than_32_bits_are_not_counted():
    model = prepare(nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Flatten(),
                                  nn.Linear(2048, 4)))
    for parameter in model.parameters():
        parameter.data.fill_(127.0)
    grids = {name: Grid(8, (1.0,)) for name, _ in model.named_parameters()}
    for bits, wide in ((8, None), (16, "5")):
        activations = {name: Activation(bits, signed) for name, signed in read_graph(model).activation_points.items()}
        assert exactness.too_wide(model, Formats(grids, activations)) == wide


def test_more_than_32_bits_are_reported(narrow, monkeypatch):
    monkeypatch.setattr(testers, "too_wide", lambda model, formats: "conv2")
    testers.claimed_network(found := checkpoints.read(narrow[0]))
    assert "conv2: its sums may need more than the 32 bits that are counted for them" in found.problems


class Sum(nn.Module):
    """A sum of two convolutions, of which the second has a bias and a BatchNorm, if wanted."""

    def __init__(self, normalised: bool = False):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(3, 4, 1, bias=normalised)
        self.norm, self.linear = nn.BatchNorm2d(4) if normalised else nn.Sequential(), nn.Linear(4, 5)

    def forward(self, x):
        return self.linear(torch.relu(self.first(x) + self.norm(self.second(x))).mean((2, 3)))


@pytest.mark.parametrize("normalised, changes, bits, bound", (
    (False, {}, 8, 255 * 1024), (False, {"linear.bias": 2.0**-30}, 8, 255 * 1024), (False, {}, 15, 1024 * (2**15 - 1)),
    (False, {"first.weight": 2.0**-20, "second.weight": 1.0}, 8, 128 * 3 * (2**20 + 1)),
    (True, {"first.weight": 2.0**-20, "second.weight": 1.0}, 8, 255 * 1024),
    (True, {"second.bias": 2.0**-24}, 8, 128 * 3 * 2**18 + 1),
    (False, {"linear.weight": 0.3}, 8, sys.maxsize), (False, {"linear.bias": 2.0**-60}, 8, sys.maxsize)))
@torch.no_grad()
def test_every_sum_is_bounded(normalised, changes, bits, bound):
    """Where no layer is followed by a BatchNorm, and in the linear layer. All weights are one step, 2^-6 or another."""
    model = Sum(normalised)
    for name, parameter in model.named_parameters():
        parameter.fill_(changes.get(name, 2.0**-6))
    model = prepare(model)
    activations = {name: Activation(bits, signed) for name, signed in read_graph(model).activation_points.items()}
    tensors = {name: Grid(2, (parameter.flatten()[0].item(),)) for name, parameter in model.named_parameters()}
    formats = Formats(tensors, activations)
    assert exactness.float32_bound(model, formats, dict.fromkeys(activations, 1.0)) == bound


# ----------------------------------------------------------------------------------------- what the repository ships

@pytest.mark.parametrize("checkpoint", [SHIPPED, *shipping.in_folders(shipping.ROOT)],
                         ids=lambda path: path.parent.name)
def test_a_shipped_checkpoint_is_as_claimed(cifar100_dir, capsys, checkpoint):
    claim, threads = load_json(checkpoint.with_suffix(".json")), torch.get_num_threads()
    try:
        torch.set_num_threads(os.cpu_count())  # 10,000 images; the result does not depend on it
        assert testers.main(["--data", str(cifar100_dir), "--checkpoint", str(checkpoint)]) == 0
    finally:
        torch.set_num_threads(threads)
    out, err = capsys.readouterr()
    correct = claim["accuracy"]["correct"]
    assert claim["accuracy"]["images"] == 10_000 and claim["accuracy"]["data"] == "test" and err == ""
    assert f"\nAccuracy: {correct}/10000 ({correct / 100:.2f}%)\n" in out
    check_model_operations.main(["--summary", "--checkpoint", str(checkpoint)])
    scores = [claim["counts"]["score"][c]["score"] for c in ("32-bit", "fixed", "tree")]
    assert re.search(r"  score +" + " +".join(f"{score:.5f}" for score in scores), capsys.readouterr().out)
