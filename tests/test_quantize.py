"""From a masked checkpoint to a shipped one, by the command line."""
import contextlib
import errno
import hashlib
import io
import math
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import quantize
from compressed import cifar100, claims, grids
from compressed import exact_network as exact_module
from compressed.errors import BadInput
from compressed.evaluation import logits
from compressed.files import load_json, save_json, save_record, sha256
from compressed.graph import weight_layers
from compressed.grids import SCHEMES
from compressed.networks import load_checkpoint
from small import FEW_BITS, SPEC, few, integer_logits, layer_neighbours, save_stage
from training.runs import stage_records, training_record


def ladder(scheme):
    """The steps that are reported before the dead weight's, without renewed statistics."""
    short = scheme == "channel"
    return ["float", f"weights at 8 bits, {scheme}", *["steps moved for scales of 5 significant bits"] * short,
            "activations at 8 bits, mse", "BatchNorm folded, scales, shifts, biases at 16 bits",
            *["shifts rounded to whole accumulator units"] * short]


def options(checkpoint, out, scheme, *more):
    return ["--checkpoint", str(checkpoint), "--out", str(out), "--made-up", "100", "--calibration", "20", "--renew",
            "0", "--ranges", "mse", "--scheme", scheme, "--network", SPEC, *more]


def short_and_whole(path) -> bool:
    """Whether all scales have 5 significant bits and all shifts are whole units of their accumulators."""
    model, claim = load_checkpoint(path, SPEC), load_json(path.with_suffix(".json"))
    steps = {entry["name"]: entry["step"] for entry in claim["tensors"] + claim["activations"] if "step" in entry}
    good = []
    for name, (norm, source) in layer_neighbours(model).items():
        scale, shift = (p.detach().double() for p in model.get_submodule(norm).parameters())
        significand = torch.frexp(scale)[0] * 32
        units = shift[scale != 0] / (scale[scale != 0] * steps[f"{name}.weight"] * steps[source])
        good.append(torch.equal(significand, significand.round()) and torch.equal(units, units.round()))
    return all(good)


@pytest.fixture(scope="module")
def runs(small_checkpoint, tmp_path_factory):
    """{scheme: (the file written, the command line, the lines printed)}"""
    made = {}
    for scheme in SCHEMES:
        out = tmp_path_factory.mktemp(scheme) / "new" / "out.pt"
        argv = options(small_checkpoint, out, scheme)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert quantize.main(argv) == 0
        made[scheme] = out, argv, printed.getvalue().splitlines()
    return made


@pytest.mark.parametrize("scheme", SCHEMES)
def test_from_a_masked_checkpoint_to_a_shipped_one(small_checkpoint, runs, scheme):
    out, argv, printed = runs[scheme]
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.json", "out.pt"]
    claim = load_json(out.with_suffix(".json"))
    assert claim["sha256"] == sha256(out) == hashlib.sha256(out.read_bytes()).hexdigest()
    assert claim["checkpoint"] == "out.pt"
    assert printed[-1] == f"wrote {out} and {out.with_suffix('.json')}"

    steps = claim["accuracy_by_step"]
    assert [step["step"] for step in steps[:-1]] == ladder(scheme)
    assert re.fullmatch(r"dead weight removed: [\d,]{3,} weights", steps[-1]["step"])
    assert steps[-1] | {"step": steps[-2]["step"]} == steps[-2]  # it changes nothing
    before = None
    assert "the data are read" in printed[0]
    for step, line in zip(steps, printed[1:], strict=False):
        lost = "" if before is None else f", {step['correct'] - before:+}.00%"
        shown = re.escape(f"{step['correct']}/100 ({step['correct']}.00%{lost}), loss {step['loss']:.4f}")
        assert re.fullmatch(re.escape(step["step"]) + " +" + shown, line)
        before = step["correct"]
    data = cifar100.made_up(100, 1)
    with torch.no_grad():
        logits = load_checkpoint(small_checkpoint, SPEC)(cifar100.normalise(data.images))
    assert steps[0]["correct"] == (logits.argmax(1) == data.labels).sum()
    assert short_and_whole(out) == (scheme == "channel")
    assert steps[0]["loss"] == pytest.approx(F.cross_entropy(logits, data.labels).item(), rel=1e-4)

    model = load_checkpoint(out, SPEC)
    network = exact_module.exact_network(model, claim["activations"])
    loss, right = quantize.evaluate(network, data)
    correct = int(right.sum())
    assert claim["accuracy"] == {"data": "made up", "correct": correct, "images": 100, "loss": pytest.approx(loss)}
    assert correct == steps[-1]["correct"] and 3 < correct < steps[0]["correct"]
    assert len({step["loss"] for step in steps}) == len(steps) - 1
    assert claim["probe_logits"] == exact_module.probe_logits(network) and np.shape(claim["probe_logits"]) == (4, 100)
    bits = {entry["name"]: entry["bits"] for entry in claim["tensors"]}
    assert [bits[f"{name}.weight"] for name, _ in weight_layers(model)] == [8] * 26
    assert {entry["bits"] for entry in claim["activations"]} == {8} and len(claim["activations"]) == 25
    conv = [module.weight for _, module in weight_layers(model)][:-1]
    zeros = sum(int((weight == 0).sum()) for weight in conv)
    assert claim["counts"]["weights"]["conv"]["zeros"] == zeros >= 0.74 * sum(weight.numel() for weight in conv)
    assert claim["made_by"]["command"] == shlex.join(["python", "quantize.py", *argv])
    assert {"scheme", "ranges", "calibration", "renew", "seed"} < claim["made_by"]["options"].keys()
    assert claim["made_by"]["source_sha256"] == sha256(small_checkpoint) and claim["made_by"]["training"] == []


def test_other_options(small_checkpoint, tmp_path):
    out, table = tmp_path / "out.pt", tmp_path / "table.toml"
    table.write_text("default = 5\n[bits]\ndepthwise = 7\n")
    assert quantize.main(options(small_checkpoint, out, "power-of-two", "--table", str(table), "--activation-bits", "6",
                                 "--ranges", "max")) == 0
    claim = load_json(out.with_suffix(".json"))
    steps = [step["step"] for step in claim["accuracy_by_step"]]
    assert steps[1:3] == ["weights at 5/7 bits, power-of-two", "activations at 6/8 bits, max"]
    assert {entry["bits"] for entry in claim["tensors"]} == {5, 7, 16}
    assert [entry["name"] for entry in claim["activations"] if entry["bits"] != 6] == ["image"]
    assert all(entry["step"] == 2.0 ** round(math.log2(entry["step"])) for entry in claim["activations"])


def test_the_accuracy_of_a_claim(monkeypatch):
    """That of the last step; without near-duplicates only where these are known, and of test images alone."""
    marked, images = torch.arange(10) < 4, cifar100.made_up(10, 5)
    monkeypatch.setattr(cifar100, "near_duplicates", lambda folder: marked if folder == "published" else None)
    accuracies = quantize.Accuracies(images)
    accuracies.steps += [{"step": "float", "correct": 9, "loss": 0.5}, {"step": "bits", "correct": 7, "loss": 0.75}]
    accuracies.right = torch.tensor([1, 0, 1, 0, 1, 1, 1, 0, 1, 1]).bool()
    found = {"data": "test", "correct": 7, "images": 10, "loss": 0.75}
    assert quantize.accuracy_of(accuracies, "test", "reordered") == found
    assert quantize.accuracy_of(accuracies, "hold-out", "published") == found | {"data": "hold-out"}
    assert quantize.accuracy_of(accuracies, "test", "published") == found | {
        "without_duplicates": {"correct": 5, "images": 6}}


def test_narrow_scales_and_shifts(small_checkpoint, runs, tmp_path):
    out, images = tmp_path / "out.pt", cifar100.made_up(4, 5).images
    argv = options(small_checkpoint, out, "channel", "--scale-bits", "8", "--shift-bits", "10")
    assert quantize.main(argv) == 0
    claim, wide = load_json(out.with_suffix(".json")), load_json(runs["channel"][0].with_suffix(".json"))
    model, correct = load_checkpoint(out, SPEC), [each["accuracy"]["correct"] for each in (claim, wide)]
    tensors = {entry["name"]: entry for entry in claim["tensors"]}
    for name, (norm, _) in layer_neighbours(model).items():
        for kind, bits in (("weight", 8), ("bias", 10)):
            entry, values = tensors[f"{norm}.{kind}"], model.get_submodule(norm).get_parameter(kind).detach().double()
            found = values / entry["step"]
            assert entry["bits"] == bits and torch.equal(found, found.round()) and found.abs().max() < 2 ** (bits - 1)
        used = model.get_submodule(name).weight.flatten(1).any(1)
        assert model.get_submodule(norm).weight[used].all()
    stored, operations = ([each["counts"][key] for each in (claim, wide)] for key in ("storage", "operations"))
    assert stored[0]["batchnorm"] * 32 == stored[1]["batchnorm"] * 18
    assert operations[0]["fixed"]["bits"] < operations[1]["fixed"]["bits"]
    assert correct[0] >= correct[1] - 10 and correct[0] > 10
    wanted = logits(exact_module.exact_network(model, claim["activations"]), images)
    assert torch.equal(integer_logits(model, claim, images), wanted)


def test_a_disk_that_is_full_after_the_weights_is_noticed(small_checkpoint, runs, tmp_path, monkeypatch, capsys):
    import testers

    out, replace = tmp_path / "out.pt", os.replace
    old = runs["layer"][0].with_suffix(".json").read_bytes()
    out.with_suffix(".json").write_bytes(old)

    def full(source, target):
        if Path(target) == out.with_suffix(".json"):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        quantize.main(options(small_checkpoint, out, "power-of-two"))
    assert out.with_suffix(".json").read_bytes() == old and len(list(tmp_path.iterdir())) == 2
    assert testers.main(["--checkpoint", str(out), "--made-up", "100", "--network", SPEC]) == 2
    assert "is about another file" in capsys.readouterr().err


def test_without_a_claim_there_are_no_weights(small_checkpoint, tmp_path, monkeypatch):
    def unknown(*_):
        raise BadInput("no counting rule")

    monkeypatch.setattr(claims.counting, "summary", unknown)
    with pytest.raises(BadInput, match="no counting rule"):
        quantize.main(options(small_checkpoint, tmp_path / "out.pt", "power-of-two"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words, said", [
    (["--out", "same.pt"], "same.pt would be written over same.pt, which is read"),
    (["--out", "new.pt", "--epochs", "1", "--teacher", "new.pt"], "new.pt would be written over new.pt, which is read"),
    (["--out", "t.pt", "--table", "t.json"], "t.json would be written over t.json, which is read"),
    (["--out", "b.json"], "b.json: expected a name that ends in .pt"),
    (["--out", "folder.pt"], "folder.pt: cannot be written .it is a folder"),
    (["--out", "quantized.pt", "--epochs", "1", "--tuning-folder", "."], "quantized.pt would be written twice"),
    (["--out", "new.pt", "--epochs", "1", "--tuning-folder", ".", "--teacher", "quantized.pt"],
     "quantized.pt would be written over quantized.pt, which is read"),
])
def test_outputs_that_are_inputs_or_cannot_be_read(tmp_path, words, said):
    for name in ("same.pt", "t.json", "quantized.pt"):
        Path(name).write_text(name)
    Path("folder.pt").mkdir()
    with pytest.raises(BadInput, match=said):
        quantize.main(["--checkpoint", "same.pt", *words])
    for name in ("same.pt", "t.json", "quantized.pt"):
        assert Path(name).read_text() == name
    assert len(list(tmp_path.iterdir())) == 4


def test_what_exists_is_replaced_only_if_it_is_named():
    """The default is the name of the shipped network."""
    for words, said in (([], "masked.pt: no such"), (["--out", "cifar100_mobilenetv2.pt"], "masked.pt: no such")):
        with pytest.raises(BadInput, match=said):
            quantize.main(words)
    Path("cifar100_mobilenetv2.pt").write_text("shipped")
    for words, said in (([], "2.pt exists: give --out"), (["--out", "cifar100_mobilenetv2.pt"], "masked.pt: no such")):
        with pytest.raises(BadInput, match=said):
            quantize.main(words)


def test_options_of_a_fine_tuning_need_one(tmp_path, capsys):
    """Whoever gives them without --epochs would take the network for a fine-tuned one."""
    for words in (["--lr", "0.1"], ["--teacher", "t.pt"], ["--epochs", "0", "--frozen", "0.5"]):
        with pytest.raises(SystemExit) as end:
            quantize.parse(words)
        assert end.value.code == 2 and f"{words[-2]} belongs to the fine-tuning" in capsys.readouterr().err
    (tmp_path / "recipe.toml").write_text("[quantized]\nepochs = 6\nlr = 0.1\n")
    recipe = ["--recipe", str(tmp_path / "recipe.toml")]
    assert quantize.parse([*recipe, "--lr", "0.2"]).lr == 0.2
    assert quantize.parse([*recipe, "--epochs", "0", "--seed", "1"]).epochs == 0


def test_the_network_is_that_of_the_checkpoints_last_stage(tmp_path):
    """A run needs no recipe to be shipped; what its stages were trained with counts more than a recipe."""
    command = ["--checkpoint", str(tmp_path / "masked.average.pt")]
    assert quantize.parse(command).network == quantize.networks.DEFAULT
    (tmp_path / "recipe.toml").write_text('network = "recipe:Net"\n')
    assert quantize.parse(command).network == "recipe:Net"
    for stage, options in (("rew", {"network": "first:Net"}), ("masked", {"network": SPEC})):
        save_stage(tmp_path, stage, options)
    assert quantize.parse(command).network == SPEC
    assert quantize.parse([*command, "--network", "my:Net"]).network == "my:Net"


@pytest.mark.parametrize("trained_with", ([], ["mine.pt"]))
def test_the_teachers_are_those_of_the_training(tmp_path, trained_with):
    """A recipe's teachers of all stages may have been replaced on the command line; those of [quantized] were not."""
    command = ["--checkpoint", str(tmp_path / "masked.pt")]
    save_stage(tmp_path, "masked", {"teacher": trained_with})
    recipe = 'teacher = ["recipe.pt"]\n[quantized]\nepochs = 1\n'
    path = tmp_path / "recipe.toml"
    for text, words, expected in ((recipe, [], trained_with), (recipe, ["--teacher", "other.pt"], ["other.pt"]),
                                  (recipe, ["--teacher"], []), (recipe, ["--recipe", str(path)], ["recipe.pt"]),
                                  (recipe + 'teacher = "own.pt"', [], ["own.pt"]),
                                  (recipe + '[rew]\nteacher = "own.pt"', [], ["recipe.pt"])):
        path.write_text(text)
        assert list(map(str, quantize.parse([*command, *words]).teacher)) == expected


def test_a_json_that_is_no_claim_is_not_replaced(small_checkpoint, tmp_path):
    save_json({"lr": 0.1}, tmp_path / "out.json")
    with pytest.raises(BadInput, match="out.json, which would be replaced, is no claim: give another --out"):
        quantize.main(options(small_checkpoint, tmp_path / "out.pt", "channel"))
    (tmp_path / "cifar100_mobilenetv2.json").touch()
    with pytest.raises(BadInput, match="cifar100_mobilenetv2.json exists: give --out cifar100_mobilenetv2.pt to"):
        quantize.main(["--checkpoint", str(small_checkpoint)])


def test_a_network_that_was_trained_here_keeps_its_input(small_checkpoint, tmp_path, capsys):
    """--normalise is for its teachers then; --distill and others are said to be without effect where they are."""
    checkpoint = shutil.copy(small_checkpoint, tmp_path / "masked.pt")
    save_stage(tmp_path, "masked", {"network": SPEC}, settings={"augment": "none"})
    plain, other = (tmp_path / f"{name}.pt" for name in ("plain", "other"))
    words = options(checkpoint, plain, "layer")
    assert [quantize.parse(["--checkpoint", str(path)]).augment for path in (checkpoint, small_checkpoint)] == [
        "none", "plain"]
    assert quantize.main(words) == 0
    assert quantize.main(options(checkpoint, other, "layer", "--normalise", "0.5,0.5,0.5/0.2,0.2,0.2")) == 0
    assert "--normalise has no effect on it" in capsys.readouterr().out and sha256(plain) == sha256(other)


@pytest.mark.parametrize("trained", (False, True))
def test_a_hold_out_that_was_trained_on_is_no_hold_out(tmp_path, capsys, trained):
    save_stage(tmp_path, "masked", {"network": SPEC, "holdout": trained})
    for words in ([], ["--holdout"]):
        with pytest.raises(BadInput, match="no such checkpoint file"):
            quantize.main(["--checkpoint", str(tmp_path / "masked.pt"), "--out", str(tmp_path / "out.pt"), *words])
        said = capsys.readouterr().err
        assert ("the network has seen these images" in said) == (bool(words) and not trained)
        assert ("--holdout leaves that unused" in said) == (trained and not words)


def test_no_stage_of_a_run_is_overwritten_and_no_other_images_are_taken(small_checkpoint, tmp_path):
    shutil.copy(small_checkpoint, tmp_path / "rew.pt")
    other = {"name": "mine", "classes": 100, "digest": "0" * 16}
    save_stage(tmp_path, "rew", {"network": SPEC}, data_set=other)
    save_stage(tmp_path, "masked", {"network": SPEC}, lines=(), data_set=other)
    with pytest.raises(BadInput, match="masked.pt is the name of a stage's weights in that run folder"):
        quantize.main(options(tmp_path / "rew.pt", tmp_path / "masked.pt", "layer"))
    assert not (tmp_path / "masked.pt").exists()
    assert quantize.main(options(tmp_path / "rew.pt", tmp_path / "masked.8bit.pt", "layer")) == 0
    images = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), np.uint8)
    labels = np.arange(200) % 100
    np.savez(tmp_path / "set.npz", train_images=images, train_labels=labels, test_images=images[:100],
             test_labels=labels[:100])
    with pytest.raises(BadInput, match="rew.pt was made with mine .100 classes.*, and these images are of set"):
        quantize.main(["--checkpoint", str(tmp_path / "rew.pt"), "--out", str(tmp_path / "out.pt"), "--data",
                       str(tmp_path / "set.npz"), "--no-cuda"])


def test_the_training_record(tmp_path):
    assert training_record(tmp_path / "masked.pt") == []
    said = {"machine": "m", "train_images": 9, "settings": {"batch_size": 1}, "options": {"lam": 2}}
    save_record(said | {"more": 0}, tmp_path / "rew.options.json")
    assert training_record(tmp_path / "masked.pt") == []
    (tmp_path / "rew.jsonl").write_text('{"step": 1, "epoch": 1}\n{"step": 2, "epoch": 2, "loss": 0.5}\n')
    assert training_record(tmp_path / "pretrain.pt") == training_record(tmp_path / "masked.pt") == [
        {"stage": "rew"} | said | {"last_epoch": {"step": 2, "epoch": 2, "loss": 0.5}}]
    for stage in ("masked", "masked-10", "masked-9", "masked-x", "quantized"):
        for kind in ("options.json", "jsonl"):
            shutil.copy(tmp_path / f"rew.{kind}", tmp_path / f"{stage}.{kind}")
    for name, stages in (("masked", 4), ("masked-10", 3), ("rew.average", 1), ("other", 4)):  # what came before it
        assert [stage["stage"] for stage in training_record(tmp_path / f"{name}.pt")] == [
            "rew", "masked-9", "masked-10", "masked"][:stages]
    assert stage_records([tmp_path / "quantized.jsonl"])[0]["stage"] == "quantized"
    for wrong in ("{}\n", "garbage\n"):
        (tmp_path / "rew.jsonl").write_text(wrong)
        with pytest.raises(BadInput, match="rew"):
            training_record(tmp_path / "masked.pt")


@torch.no_grad()
def test_by_default_steps_are_chosen_by_the_logits_of_renewed_means(small_checkpoint, monkeypatch):
    """Each of these makes the network more like the float one on the images by which it was done."""
    data = cifar100.made_up(200, 0)
    args = quantize.parse(["--checkpoint", str(small_checkpoint), "--network", SPEC, "--calibration", "200", "--renew",
                           "200", "--table", "4"])
    found, means = {}, {}
    reference = logits(load_checkpoint(small_checkpoint, SPEC), data.images)
    for what in ("all", "no choice", "no means"):
        with monkeypatch.context() as without:
            if what == "no choice":
                without.setattr(quantize, "choose_steps", lambda *args: None)
            if what == "no means":
                without.setattr(quantize, "renew_means", lambda *args: None)
            model = load_checkpoint(small_checkpoint, SPEC)
            accuracies = quantize.Accuracies(data)
            quantize.on_grids(model, data, quantize.grid_options(args, model), accuracies)
            found[what] = F.kl_div(logits(model, data.images).log_softmax(1), reference.log_softmax(1),
                                   reduction="batchmean", log_target=True)
            means[what] = model.layers[3].bn2.running_mean.clone()
            steps = [step["step"] for step in accuracies.steps]
    assert steps[2:] == ["BatchNorm statistics re-estimated", "steps moved for scales of 5 significant bits",
                         "BatchNorm means re-estimated, variances kept", "activations at 8 bits, mse",
                         "activation steps chosen by their effect on the logits"]
    assert found["all"] < found["no choice"]
    assert torch.equal(means["all"], means["no choice"]) and not torch.equal(means["all"], means["no means"])


def test_a_claim_that_contradicts_its_file_is_not_made(exact, tmp_path):
    network, tensors, activations, _ = exact["layer"]
    path = tmp_path / "a.pt"
    torch.save(network.state_dict(), path)
    wrong = [dict(entry, bits=5) if entry["name"] == "conv2.weight" else entry for entry in tensors]
    with pytest.raises(BadInput, match="conv2.weight: the values are no 5-bit multiples of the claimed step"):
        claims.write({"tensors": wrong, "activations": activations}, path, SPEC)
    assert not (tmp_path / "a.json").exists()
    claims.write({"tensors": tensors, "activations": activations}, path, SPEC)
    assert claims.read(tmp_path / "a.json")["sha256"] == sha256(path)


@torch.no_grad()
def test_the_steps_follow_the_float_network(monkeypatch):
    """Its statistics are renewed on images that are augmented as in training, before its logits are taken."""
    seen = []
    for name in ("renew_statistics", "renew_means"):
        monkeypatch.setattr(quantize, name, lambda model, data, *args: seen.append(args[:2]))
    monkeypatch.setattr(quantize, "choose_steps", lambda model, images, reference: seen.append(reference))
    model, data = few().train(), cifar100.made_up(40, 0)
    model(cifar100.normalise(data.images))
    wanted = logits(model.eval(), data.images[:20])
    chosen = grids.Options("channel", tuple(FEW_BITS), "logits", (8,) * 25, 20, 30, "trivial", 0)
    quantize.on_grids(model, data, chosen, quantize.Accuracies(data))
    assert seen[:2] == [(30, "trivial")] * 2 and torch.equal(seen[2], wanted)


def test_fine_tuning_has_no_weight_decay():
    args = quantize.parse(["--epochs", "8"])
    settings = quantize.tuning_options(args, cifar100.CIFAR100, torch.device("cpu"), "").settings
    assert (settings.weight_decay, settings.refresh, settings.warmup_epochs) == (0, 0, 1)
