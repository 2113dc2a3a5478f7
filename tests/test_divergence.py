"""The measure to choose checkpoints by: zero from oneself, and the divergence by hand from others."""
import re

import pytest
import torch

from compressed import cifar100, mnet, networks
from compressed.errors import BadInput
from mobilenet_v2 import MobileNetV2
from small import NARROW
from tools import divergence
from training.batchnorm import renew_statistics


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, paths = tmp_path_factory.mktemp("checkpoints"), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        paths.append(folder / f"{seed}.pt")
        model = MobileNetV2()
        renew_statistics(model, cifar100.made_up(40, 0), 40, "none", torch.Generator())
        model.linear.weight.data *= 10  # untrained, it hardly prefers a class
        torch.save(model.state_dict(), paths[-1])
    return paths


def test_it_is_zero_from_oneself_and_that_of_a_plain_computation_from_another(files, capsys):
    few = "--made-up 40 --images 10 --teacher".split()
    assert divergence.main([*few, str(files[0]), "--", *map(str, files)]) == 0
    found = {path: (float(apart), share) for apart, share, path in
             re.findall(r"^([\d.-]+) \+- .* for ([\d.]+%): (.*)$", capsys.readouterr().out, re.M)}
    assert found[str(files[0])] == (0, "100.00%")
    images = divergence.mixed_images(cifar100.made_up(40, 0), 10, torch.Generator().manual_seed(12345))
    assert images.shape == (10, 3, 32, 32)
    with torch.no_grad():
        ours, theirs = (networks.load_checkpoint(path)(images).double().softmax(1) for path in files)
    expected = float((ours * (ours / theirs).log()).sum(1).mean())
    assert expected > 0.01 and found[str(files[1])][0] == pytest.approx(expected, abs=2e-4)


def test_a_packed_file_alone(narrow, tmp_path, capsys):
    path, model, claim = narrow
    mnet.pack(model, claim, tmp_path / "alone.mnet")
    words = ["--made-up", "40", "--images", "4", "--network", NARROW, "--teacher", str(path), "--"]
    assert divergence.main([*words, str(path), str(tmp_path / "alone.mnet")]) == 0
    first, second = re.findall(r"^([\d.]+) \+-", capsys.readouterr().out, re.M)
    assert first == second


def test_a_checkpoint_with_other_classes_than_the_teachers(files, tmp_path):
    torch.save(networks.make(NARROW, 10).state_dict(), tmp_path / "ten.pt")
    with pytest.raises(BadInput, match="ten.pt has 10 classes, and the teachers 100"):
        divergence.main([*"--made-up 40 --images 10 --teacher".split(), str(files[0]), "--network", NARROW, "--",
                         str(tmp_path / "ten.pt")])


def test_a_network_that_cannot_be_counted_has_a_divergence(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("""
from torch import nn

class Tanh(nn.Sequential):
    def __init__(self, num_classes=100):
        super().__init__(nn.Conv2d(3, 4, 3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(256, num_classes))
""")
    spec = f"{tmp_path / 'mine.py'}:Tanh"
    path = tmp_path / "tanh.pt"
    torch.save(networks.make(spec).state_dict(), path)
    words = ["--made-up", "40", "--images", "10", "--teacher", str(path), "--network", spec, "--", str(path)]
    assert divergence.main(words) == 0 and "0.0000 +- 0.0000" in capsys.readouterr().out


def test_the_images_are_mixed():
    """Images of one colour each: with its border of another, an image that is not mixed has two."""
    flat = (6 * torch.arange(40)).to(torch.uint8)[:, None, None, None].expand(40, 3, 32, 32)
    data = cifar100.Images(flat, torch.arange(40))
    mixed = divergence.mixed_images(data, 40, torch.Generator().manual_seed(0))
    assert sum(len(image.unique()) > 2 for image in mixed) > 20


def test_other_draws_give_other_images():
    data = cifar100.made_up(40, 0)
    one, two, other = (divergence.mixed_images(data, 10, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)
