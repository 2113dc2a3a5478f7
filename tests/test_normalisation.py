"""Networks that were trained with another input normalisation."""
import argparse
import contextlib
import io

import pytest
import torch
from torch import nn

import quantize
import testers
from compressed import cifar100, normalisation
from compressed.errors import BadInput
from compressed.files import load_json, save_tensors
from compressed.graph import prepare

TEXT = "0.5071,0.4865,0.4409/0.2673,0.2564,0.2762"
MEANS, DEVIATIONS = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
PIXELS = cifar100.made_up(100, 1, 7)
THEIRS = (PIXELS.images / 255 - torch.tensor(MEANS)[:, None, None]) / torch.tensor(DEVIATIONS)[:, None, None]
SOURCE = """
from torch import nn


def make(num_classes=100, padding=0, bias=False, norm=True):
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=padding, bias=bias),
                         nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=4),
                         nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(16, num_classes))
"""


def network(**options) -> nn.Module:
    scope = {}
    exec(SOURCE, scope)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = scope["make"](7, **options)
        for module in model:
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        model.train()(THEIRS)  # statistics of its own normalisation
    return model.eval()


def test_what_the_option_takes():
    parser = argparse.ArgumentParser()
    normalisation.add_option(parser)
    assert parser.parse_args(["--normalise", TEXT]).normalise == (MEANS, DEVIATIONS)
    assert parser.parse_args([]).normalise is None


@pytest.mark.parametrize("text", ("", "x", "0.5/0.5", "0.5,0.5,0.5", "0,0,0/1,1,0", "0,0,nan/1,1,1", "0,0,0/1,1,1/2",
                                  "0,0,0/1,1,-1", "0,0,inf/1,1,1"))
def test_what_it_does_not_take(text, capsys):
    with pytest.raises(SystemExit) as stopped:
        testers.main([f"--normalise={text}"])
    assert stopped.value.code == 2 and "expected three means, a slash, and three deviations" in capsys.readouterr().err


@pytest.mark.parametrize("options", ({}, {"bias": True}, {"bias": True, "norm": False}))
@torch.no_grad()
def test_it_is_applied_and_folded(options):
    model = network(**options)
    wanted, ours = model(THEIRS), cifar100.normalise(PIXELS.images)
    assert not torch.allclose(model(ours), wanted, atol=0.1)
    torch.testing.assert_close(normalisation.Renormalised(model, MEANS, DEVIATIONS)(ours), wanted, rtol=1e-4, atol=1e-4)
    folded = normalisation.fold(prepare(model), MEANS, DEVIATIONS)
    torch.testing.assert_close(folded(ours), wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_scales_alone_are_folded_into_padded_convolutions_too():
    model, mean = network(padding=1), 128 / 255
    wanted = model((PIXELS.images / 255 - mean) / 0.3)
    folded = normalisation.fold(prepare(model), (mean,) * 3, (0.3,) * 3)
    torch.testing.assert_close(folded(cifar100.normalise(PIXELS.images)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", (
    network(padding=1), network(norm=False),
    nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(3, 7, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()))
def test_what_cannot_be_folded_exactly_is_refused(model):
    model = prepare(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(BadInput, match="cannot be folded exactly: .* reads the image, and is no convolution that has"):
        normalisation.fold(model, MEANS, DEVIATIONS)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_checkpoint_from_elsewhere_by_the_command_line(tmp_path, capsys):
    """Evaluated with its own normalisation, quantized to one that takes ours and whose claim says so."""
    (tmp_path / "net.py").write_text(SOURCE)
    model = network()
    features = model[:-1](THEIRS)
    with torch.no_grad():  # fitted to the images that it is tested on
        model[8].weight.copy_(torch.linalg.lstsq(features - features.mean(0), nn.functional.one_hot(PIXELS.labels, 7)
                                                 .float()).solution.T)
        model[8].bias.copy_(-model[8].weight @ features.mean(0))
    correct = int((model(THEIRS).argmax(1) == PIXELS.labels).sum())
    save_tensors(model.state_dict(), "theirs.pt")
    line = ["--network", "net.py:make", "--made-up", "100", "--checkpoint"]
    assert testers.main([*line, "theirs.pt", "--summary", "--normalise", TEXT]) == 0
    assert f"Accuracy: {correct}/100" in capsys.readouterr().out and correct > 40
    assert testers.main([*line, "theirs.pt", "--summary"]) == 0
    assert f"Accuracy: {correct}/100" not in capsys.readouterr().out

    options = ["--out", "ours.pt", "--renew", "0", "--calibration", "50", "--ranges", "mse", "--no-cuda"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert quantize.main([*line, "theirs.pt", *options, "--normalise", TEXT]) == 0
    claim = load_json("ours.json")
    assert claim["accuracy_by_step"][0]["correct"] == correct
    assert (claim["network"]["mean"], claim["network"]["std"]) == (128, 64) and f"--normalise {TEXT}" in \
        claim["made_by"]["command"]
    assert testers.main([*line, "ours.pt", "--summary"]) == 0
    with pytest.raises(BadInput, match="--normalise is for a checkpoint without a claim"):
        testers.main([*line, "ours.pt", "--normalise", TEXT])
