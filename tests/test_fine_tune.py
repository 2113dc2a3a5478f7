"""Fine-tuning on the grids, by quantize.py's command line."""
import copy
import dataclasses
import json

import pytest
import torch

import quantize
from compressed import cifar100, grids
from compressed import exact_network as exact_module
from compressed.errors import BadInput
from compressed.files import load_json, sha256
from compressed.graph import weight_layers
from compressed.grids import SCHEMES, calibrate
from compressed.networks import load_checkpoint
from test_quantize import ladder, options, short_and_whole
from training import fine_tune

TUNE = ("--epochs", "1", "--batch-size", "50", "--augment", "none", "--mixing", "none", "--no-cuda")


def test_fine_tuning_keeps_the_zeros(sparse_checkpoint, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    checkpoint = folder / "masked.pt"
    checkpoint.write_bytes(sparse_checkpoint.read_bytes())
    plain, tuned = tmp_path / "plain.pt", tmp_path / "tuned.pt"
    assert quantize.main(options(checkpoint, plain, "channel")) == 0
    assert quantize.main(options(checkpoint, tuned, "channel", *TUNE)) == 0
    claim, untouched = load_json(tuned.with_suffix(".json")), load_json(plain.with_suffix(".json"))
    assert [step["step"] for step in claim["accuracy_by_step"]] == [
        *ladder("channel")[:4], "fine-tuned for 1 epochs", *ladder("channel")[4:],
        claim["accuracy_by_step"][-1]["step"]]
    assert short_and_whole(tuned)
    assert claim["accuracy_by_step"][:4] == untouched["accuracy_by_step"][:4]
    masked, before, after = load_checkpoint(checkpoint), load_checkpoint(plain), load_checkpoint(tuned)
    changed = 0
    for (name, zeros), (_, old), (_, new) in zip(*map(weight_layers, (masked, before, after))):
        assert (new.weight[zeros.weight == 0] == 0).all()
        changed += int((old.weight != new.weight).sum())
    assert changed > 1000 and not torch.equal(before.linear.bias, after.linear.bias)
    made = tmp_path / "tuned.run"
    log = [json.loads(line) for line in (made / "quantized.jsonl").read_text().splitlines()]
    assert len(log) == 1 and log[0]["stage"] == "quantized"
    assert not (made / "quantized.state").exists() and sha256(checkpoint) == claim["made_by"]["source_sha256"]
    assert list(folder.iterdir()) == [checkpoint]


def test_a_sweep_over_bit_tables_fine_tunes_one_checkpoint(sparse_checkpoint, tmp_path, monkeypatch):
    """Every fine-tuning belongs to its --out: the next one neither stops nor replaces it."""
    def no_training(name, model, data, test, settings, folder, began, **_):
        began()
        (folder / f"{name}.jsonl").write_text('{"step": 1}\n')
        return model
    monkeypatch.setattr(fine_tune.loop, "train", no_training)
    for table in ("4", "5"):
        assert quantize.main(options(sparse_checkpoint, tmp_path / f"b{table}.pt", "channel", *TUNE,
                                     "--table", table)) == 0
    for table in ("4", "5"):
        record = load_json(tmp_path / f"b{table}.run" / "quantized.options.json")
        assert record["options"]["grids"]["table"][0] == int(table)


def test_a_finished_fine_tuning_is_taken_up(sparse_checkpoint, tmp_path, monkeypatch):
    """The same command, on another machine perhaps, ships what quantized.pt holds; with other options it is refused."""
    checkpoint = tmp_path / "masked.pt"
    checkpoint.write_bytes(sparse_checkpoint.read_bytes())
    tune = (*TUNE, "--tuning-folder", str(tmp_path), "--optimizer", "muon", "--turn", "0.001", "--teacher",
            str(sparse_checkpoint), str(checkpoint))
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
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "quantized.pt")
    with pytest.raises(BadInput, match="not what a fine-tuning writes; --no-resume"):
        quantize.main(options(checkpoint, second, "channel", *tune))
    monkeypatch.undo()

    def killed(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(fine_tune.loop.Stage, "step", killed)  # another one begins in the same folder, and does not end
    with pytest.raises(KeyboardInterrupt):
        quantize.main(options(checkpoint, second, "channel", *tune, "--lr", "0.5", "--no-resume"))
    assert not (tmp_path / "quantized.pt").exists()


def test_fine_tuning_trains_everything_but_zeros_and_statistics(sparse_checkpoint, tmp_path):
    """A gradient reaches every weight and every step through every rounding."""
    model = load_checkpoint(sparse_checkpoint)
    args = quantize.parse(["--checkpoint", str(sparse_checkpoint), "--lr", "0.001", "--teacher", str(sparse_checkpoint),
                           "--scheme", "layer", "--step-rate", "0.01", *TUNE])
    chosen, tuning = quantize.chosen_options(args, model, [])
    tuning = dataclasses.replace(tuning, folder=tmp_path)
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
def test_trained_steps_are_those_that_the_forward_pass_used(sparse_checkpoint, scheme):
    """Making the steps trained parameters, moving them, and fixing them again changes no logit."""
    model = load_checkpoint(sparse_checkpoint)
    images, generator = cifar100.made_up(10, 0).images, torch.Generator().manual_seed(0)
    grids.quantize_weights(model, grids.bit_table("4", model), scheme)
    if scheme == "channel":
        grids.shorten_scales(model)
    exact_module.quantize_activations(model, calibrate(model, images, 8, "mse"))
    x = cifar100.normalise(images)
    with torch.no_grad():
        first = model(x)
        fine_tune.learn_steps(model, scheme)
        # a float32 logarithm moves a step by some 2^-24, and with it a value that lies on a half
        assert (model(x) - first).abs().max() < 0.2 * first.std()
        for name, parameter in model.named_parameters():
            if name.endswith("log_step"):
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        moved = model(x)
        assert (moved - first).abs().max() > first.std()
        fine_tune.fix_steps(model, scheme)
        assert torch.allclose(model(x), moved, rtol=1e-4, atol=1e-4)
    assert not any("log_step" in name for name in model.state_dict())


def test_the_gradient_of_a_step_by_hand():
    """Rounding errors inside the range, the clipped code outside (Esser et al. 2020, equation 3)."""
    x = torch.tensor([0.3, 0.9, -9.0, 9.0, 0.26], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    y = fine_tune.Rounded.apply(x, step, -2, 1)
    assert y.tolist() == [0.5, 0.5, -1.0, 0.5, 0.5]
    y.backward(torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0]))
    assert x.grad.tolist() == [1, 0, 0, 0, 10000]
    assert step.grad.item() == pytest.approx((1 - 0.6) + 10 + 100 * -2 + 1000 + 10000 * (1 - 0.52))
    channels = torch.tensor([[0.5], [2.0]], requires_grad=True)
    fine_tune.Rounded.apply(torch.tensor([[0.3, 0.4], [1.5, 2.0]]), channels, -8, 7).sum().backward()
    assert channels.grad.flatten().tolist() == pytest.approx([0.4 + 0.2, 0.25 + 0.0])
