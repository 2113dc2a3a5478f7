"""KAIST's network by its facts, its files where they are there, and what happens where they are not."""
import copy
import dataclasses
import os
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import user_networks
from compressed import cifar100, kaist, networks
from compressed.cifar100 import CIFAR100
from compressed.errors import BadInput
from compressed.files import save_record, save_tensors, sha256
from compressed.graph import prepare, read_graph
from compressed.networks import fill, load_checkpoint, make
from compressed.normalisation import Renormalised
from mobilenet_v2 import KaistMobileNetV2
from small import NARROW
from tools import kaist_checkpoint
from training import teachers

THERE, REAL = (os.environ.get(name) and str(Path(os.environ[name]).absolute())
               for name in ("TEACHERS_DIR", "CIFAR100_DIR"))
NAMES = list(teachers.KAIST)


@torch.no_grad()
def random_micronet() -> kaist.Micronet:
    torch.manual_seed(0)
    model = kaist.Micronet().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.3, 0.3),
                                     (module.running_mean, -0.3, 0.3), (module.running_var, 0.5, 1.5)):
                nn.init.uniform_(value, low, high)
    model.layers[3].conv3.weight[2] = 0
    return model


def test_a_teacher_of_which_there_is_a_record_takes_images_as_here(narrow_checkpoint, tmp_path):
    path, normalise = Path(shutil.copy(narrow_checkpoint, tmp_path / "masked.pt")), ((0.5,) * 3, (0.2,) * 3)
    assert isinstance(teachers.load(path, NARROW, normalise=normalise), Renormalised)
    for name in ("masked.options.json", "masked.json"):
        save_record({"settings": {}, "options": {}}, tmp_path / name)
        assert not isinstance(teachers.load(path, NARROW, normalise=normalise), Renormalised)
        (tmp_path / name).unlink()


def test_a_teacher_of_another_data_set_is_refused(narrow_checkpoint, tmp_path):
    """Also if it has as many classes."""
    path = Path(shutil.copy(narrow_checkpoint, tmp_path / "masked.pt"))
    theirs = dataclasses.asdict(dataclasses.replace(CIFAR100, name="other", digest="0" * 16))
    save_record({"settings": {}, "options": {}, "data_set": theirs}, tmp_path / "masked.options.json")
    with pytest.raises(BadInput, match="--teacher .*masked.pt was made with .*other.* give its --data"):
        teachers.load(path, NARROW)


@pytest.mark.parametrize("spec", (NARROW, f"{NARROW}&num_classes=100"))
def test_a_teacher_that_is_read_as_another_network_is_named(narrow_checkpoint, tmp_path, capsys, spec):
    path = Path(shutil.copy(narrow_checkpoint, tmp_path / "masked.pt"))
    save_record({"settings": {}, "options": {"network": spec}}, tmp_path / "masked.options.json")
    teachers.load(path, NARROW)
    said = f"warning: {path} was trained as {spec}, and is read as {NARROW}"
    assert (said in capsys.readouterr().err) == (spec != NARROW)


@pytest.mark.parametrize("network", (networks.DEFAULT, NARROW))
def test_a_teacher_that_is_not_there_is_named(network):
    with pytest.raises(BadInput, match="^--teacher nowhere.pt: no such checkpoint file[^;]*; [^;]*$"):
        teachers.load("nowhere.pt", network)


@torch.no_grad()
def test_the_authors_way_of_counting():
    """From the operations that torch executes: with n terms and a bias a sum has n additions."""
    class Executed(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if (name := function.overloadpacket.__name__.rstrip("_")) in ("hardswish", "sigmoid", "mean"):
                found[name].append((args[0].numel(), out.numel()))
            return out

    torch.manual_seed(0)
    model, found = prepare(kaist.Micronet().eval()), defaultdict(list)
    with FlopCounterMode(display=False) as flops, Executed():
        model(torch.zeros(1, 3, 32, 32))
    macs = flops.get_total_flops() / 2
    (_, swishes), (_, sigmoids), (averaged, means) = (
        map(sum, zip(*found[name])) for name in ("hardswish", "sigmoid", "mean"))
    counted = kaist.authors_count(model)
    assert counted["operations"] == (macs + 4 * swishes + sigmoids + means) / 2 + macs + swishes + averaged - means
    weights = sum(value.numel() for value in model.parameters() if value.dim() > 1)  # those that never run, too
    biases = sum(len(value) for name, value in model.named_parameters() if name.endswith("bias"))
    assert counted["parameters"] == weights * (1 / 2 + 1 / 32) + biases / 2
    assert counted["score"] == counted["parameters"] / 36.5e6 + counted["operations"] / 10.49e9


def random_state() -> dict:
    """A state dict as the files hold it: pruned layers have a mask beside the weight."""
    state = random_micronet().state_dict()
    for name in ("layers.3.conv1", "linear"):
        state[f"{name}.mask"] = (torch.rand_like(state[f"{name}.weight"]) < 0.7).float()
    return state


real_files = pytest.mark.skipif(not THERE or not REAL,
                                reason="TEACHERS_DIR and CIFAR100_DIR do not name real files")


@real_files
def test_the_script_finds_all_four_and_their_mean(capsys, monkeypatch):
    """On the first 400 test images; on all it is `python -m training.teachers`."""
    test = cifar100.load(REAL, "test")
    some = cifar100.Images(test.images[:400], test.labels[:400])
    monkeypatch.setattr(cifar100, "load", lambda folder, split: some)
    wanted = [328, 327, 325, 314, 332]
    known = {name: (digest, count) for (name, (digest, _)), count in zip(teachers.KAIST.items(), wanted)}
    monkeypatch.setattr(teachers, "KAIST", known)
    monkeypatch.setattr(teachers, "MEAN_OF_ALL", wanted[-1])
    assert teachers.main(["--folder", THERE]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split(": ")[1].split(" of ")[0]) for line in lines] == pytest.approx(wanted, abs=2)
    monkeypatch.setattr(teachers, "KAIST", {name: (digest, count - 9) for name, (digest, count) in known.items()})
    with pytest.raises(BadInput, match="pr_60.t7: the accuracy differs"):
        teachers.main(["--folder", THERE])
    monkeypatch.setattr(teachers, "KAIST", known)
    monkeypatch.setattr(teachers, "MEAN_OF_ALL", 0)
    with pytest.raises(BadInput, match="^the mean: the accuracy differs"):
        teachers.main(["--folder", THERE])


def test_the_network_is_the_published_one():
    model = kaist.Micronet()
    assert sum(p.numel() for p in model.parameters()) == 485_330
    assert len(model.layers) == 16 and model.linear.in_features == 114
    assert [block.conv2.stride[0] for block in model.layers] == [1, 1, 2, 1, 1, 1, 1, 2, 1, 1, 1, 1, 2, 1, 1, 1]
    assert [i for i, block in enumerate(model.layers) if len(block.shortcut)] == [0, 4, 13, 15]
    assert model.layers[1].conv1.weight.shape[0] == 50 and model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


def test_its_normalisation():
    assert not {"scale", "shift"} & kaist.Micronet().state_dict().keys()  # a run's state fingerprints what is in it
    pixels = torch.tensor([0, 77, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    seen = []
    model = kaist.Micronet().eval()
    model.conv1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(cifar100.normalise(pixels))
    wanted = [(value / 255 - mean) / std for value, mean, std in zip((0, 77, 255), kaist.MEAN, kaist.STD)]
    assert torch.allclose(seen[0][0, :, 5, 5], torch.tensor(wanted), atol=1e-5)


def test_a_file_is_read_with_its_masks_and_folded_without_a_change():
    state = random_state()
    save_tensors(state, Path("some.t7"))
    plain = kaist.load_micronet("some.t7")
    assert torch.equal(plain.linear.weight, state["linear.weight"] * state["linear.mask"])
    folded = teachers.load("some.t7")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters()) and not folded.training
    x = cifar100.normalise(cifar100.made_up(4, 0).images)
    with torch.no_grad():
        assert torch.allclose(plain(x), folded(x), rtol=1e-3, atol=1e-4)
    save_tensors({f"module.{key}": value for key, value in state.items()}, Path("parallel.t7"))
    assert torch.equal(kaist.load_micronet("parallel.t7").linear.weight, plain.linear.weight)


class Own(nn.Module):
    """BatchNorms behind a ReLU, behind a convolution, and without statistics, none next to its convolution in order."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 4, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.bn3 = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x):
        x = self.bn1(self.conv1(x).relu())
        return self.bn3(self.conv3(self.bn2(self.conv2(x)))).mean((2, 3))


def test_a_batchnorm_is_folded_where_it_alone_reads_a_convolution():
    torch.manual_seed(0)
    model, x = Own(), torch.randn(16, 3, 9, 9)
    with torch.no_grad():
        for _ in range(20):
            model(x * 3 + 1)  # statistics of no round numbers
        wanted = model.eval()(x)
        folded = teachers.fold_batchnorm(copy.deepcopy(model))
        assert torch.allclose(folded(x), wanted, rtol=1e-3, atol=1e-5)
    assert type(folded.bn2) is nn.Identity and type(folded.bn1) is type(folded.bn3) is nn.BatchNorm2d


def test_a_convolution_with_a_forward_pass_of_its_own_is_not_folded():
    """Its normalised weight would lose the folded scale."""
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight / self.weight.norm(), None)
    model = nn.Sequential(Standardised(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
    model[1].weight.data.fill_(2)
    x = torch.randn(2, 3, 8, 8)
    wanted = model(x)
    assert torch.equal(teachers.fold_batchnorm(model)(x), wanted) and type(model[1]) is nn.BatchNorm2d


def test_ours_is_a_teacher_too(narrow_checkpoint):
    x = cifar100.normalise(cifar100.made_up(2, 0).images)
    with torch.no_grad():
        assert torch.allclose(teachers.load(narrow_checkpoint, NARROW)(x),
                              load_checkpoint(narrow_checkpoint, NARROW)(x), rtol=1e-3, atol=1e-3)


def test_a_teacher_takes_maps_that_are_channels_last(tmp_path):
    """Of its own network, too, whose forward pass has views of maps."""
    spec, path = f"{user_networks.__file__}:Viewed", tmp_path / "viewed.pt"
    torch.manual_seed(0)
    model = make(spec, 100).eval()
    save_tensors(model.state_dict(), path)
    x = torch.randn(2, 3, 32, 32)
    teacher = teachers.load(path, spec)
    assert torch.allclose(teacher(x.contiguous(memory_format=torch.channels_last)), model(x), atol=1e-5)


@pytest.mark.parametrize("change, said", (
    (lambda state: state.pop("linear.bias"), "none of KAIST's"),
    (lambda state: state.update({"x.mask": torch.ones(2)}), "x.mask"),
    (lambda state: state.update({"linear.mask": torch.ones(2)}), "linear.mask"),
    (lambda state: state.update({"linear.bias": torch.ones(7)}), "none of KAIST's")))
def test_another_network_is_named(change, said):
    state = random_state()
    change(state)
    save_tensors(state, Path("other.t7"))
    with pytest.raises(BadInput, match=said) as error:
        teachers.load("other.t7")
    assert "\n" not in str(error.value) and "other.t7" in str(error.value)


def test_files_are_looked_for_and_checked(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="--folder.*holds no " + NAMES[0]):
        teachers.find(tmp_path)
    monkeypatch.setenv("TEACHERS_DIR", str(tmp_path))
    with pytest.raises(BadInput, match="TEACHERS_DIR"):
        teachers.load(NAMES[0])  # a bare name is looked for where the files are
    (tmp_path / NAMES[0]).write_bytes(b"something else")
    with pytest.raises(BadInput, match="SHA-256"):
        teachers.find()


def test_a_download_is_checked_and_leaves_nothing_half_done(tmp_path, monkeypatch):
    served = tmp_path / "served"
    served.mkdir()
    monkeypatch.setattr(teachers, "URL", f"file://{served}/")
    with pytest.raises(BadInput, match="cannot download.*TEACHERS_DIR"):
        teachers.find()
    assert not list(Path().rglob("*.t7*"))
    for name in NAMES:
        (served / name).write_bytes(name.encode())
    monkeypatch.setattr(teachers, "KAIST", {name: (sha256(served / name), 0) for name in NAMES})
    folder = teachers.find()
    assert folder == teachers.FOLDER and sorted(path.name for path in folder.iterdir()) == sorted(NAMES)
    (folder / NAMES[1]).write_bytes(b"damaged")
    with pytest.raises(BadInput, match="damaged"):
        teachers.find()


def test_a_download_of_another_file_is_not_kept(monkeypatch):
    """Of a page of a provider, say, or a file that is cut short; the next call downloads again."""
    asked = []
    monkeypatch.setattr(cifar100, "fetch", lambda url, path, name: asked.append(url) or path.write_bytes(b"<html>"))
    for _ in range(2):
        with pytest.raises(BadInput, match="cannot download .*its SHA-256 differs.*TEACHERS_DIR"):
            teachers.find()
    assert len(asked) == 2 and list(Path(teachers.FOLDER).iterdir()) == []
    Path(teachers.FOLDER, next(iter(teachers.KAIST))).write_bytes(b"damaged")
    with pytest.raises(BadInput, match="remove it, and it is downloaded again"):
        teachers.find()


def test_two_processes_may_download_at_once(tmp_path, monkeypatch):
    """As under torchrun: the second one gets all files while the first one has received one and not named it yet."""
    fetch, folders = cifar100.fetch, []

    def fetched(*args):
        fetch(*args)
        if not folders:
            folders.append("the first")
            folders.append(teachers.find())

    for name in NAMES:
        (tmp_path / name).write_bytes(name.encode())
    monkeypatch.setattr(teachers, "URL", f"file://{tmp_path}/")
    monkeypatch.setattr(teachers, "KAIST", {name: (sha256(tmp_path / name), 0) for name in NAMES})
    monkeypatch.setattr(cifar100, "fetch", fetched)
    monkeypatch.setattr(teachers, "FOLDER", Path("downloads"))
    assert teachers.find() == folders[1] == teachers.FOLDER
    assert sorted(path.name for path in teachers.FOLDER.iterdir()) == sorted(NAMES)


# ---- KAIST's network as a checkpoint --------------------------------------------------------------

@torch.no_grad()
def test_the_normalisation_is_folded():
    model, x = random_micronet(), cifar100.normalise(cifar100.made_up(8, 0).images)
    for layer in (model.layers[1].fc1, model.layers[1].fc2):
        layer.weight *= 5
    network = fill(KaistMobileNetV2(), kaist.folded(model), "does not fit").eval()
    assert not hasattr(network.layers[2], "fc1") and not network.layers[3].conv3.weight[2].any()
    stem = network.bn1(network.conv1(x)), model.bn1(model.conv1(x * model.scale + model.shift))
    ours, theirs = (out[:, :, 1:-1, 1:-1] for out in stem)
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    model.shift.zero_()  # with it, the image's border differs
    network = fill(KaistMobileNetV2(), kaist.folded(model), "does not fit").eval()
    assert torch.allclose(network(x), model(x), rtol=1e-4, atol=1e-4)


def test_the_command_writes_what_quantize_reads(capsys):
    torch.save(random_micronet().state_dict(), "some.t7")
    assert kaist_checkpoint.main(["some.t7", "--out", "float.pt"]) == 0
    assert "read it with --network mobilenet_v2:KaistMobileNetV2" in capsys.readouterr().out
    network = load_checkpoint("float.pt", kaist_checkpoint.NETWORK)
    assert len(read_graph(prepare(network)).points) > 50
    with pytest.raises(BadInput, match="some.t7, which is read|ends in .pt"):
        kaist_checkpoint.main(["some.t7", "--out", "some.t7"])
