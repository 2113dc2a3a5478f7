"""CIFAR-10 and .npz files: what is read, what is refused, and networks of their classes through all scripts."""
import argparse
import dataclasses
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import check_model_operations
import quantize
import testers
import user_networks
from compressed import cifar100, datasets, kernels, networks
from compressed.command_line import run_script
from compressed.errors import BadInput
from compressed.files import load_json
from compressed.graph import prepare
from training import main as training
from training import teachers

TINY = f"{user_networks.__file__}:Mobile"


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda dtype: None)  # compiling takes longer than these small networks do


def arrays(train=60, test=20, classes=5, seed=0):
    """The arrays of an .npz file, with the classes of made-up images."""
    found = {}
    for part, n, offset in (("train", train, 0), ("test", test, 1)):
        data = cifar100.made_up(n, 2 * seed + offset, classes)
        found[f"{part}_images"] = data.images.permute(0, 2, 3, 1).numpy()
        found[f"{part}_labels"] = data.labels.numpy().astype(np.uint8)
    return found


def npz(name="five.npz", **changes):
    np.savez(name, **{key: value for key, value in (arrays() | changes).items() if value is not None})
    return name


def cifar10(folder, label="labels"):
    """A set in CIFAR-10's layout: 5 x 20 train images and 10 test images."""
    folder.mkdir(parents=True)
    for seed, name in enumerate([*datasets.BATCHES["train"], "test_batch"]):
        rng, n = np.random.default_rng(seed), 10 if name == "test_batch" else 20
        content = {"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8), label: [i % 10 for i in range(n)]}
        (folder / name).write_bytes(pickle.dumps(content, 4))
    return folder


def options(**given):
    return argparse.Namespace(**{"data": None, "holdout": False, "made_up": None} | given)


# ---- Reading -------------------------------------------------------------------------------------

def test_images_in_folders_become_an_npz_file():
    """By the code in training/README.md."""
    image = pytest.importorskip("PIL.Image")
    for part, count in (("train", 2), ("test", 1)):
        for label, name in enumerate(("apple", "bear")):
            Path("my_images", part, name).mkdir(parents=True)
            for i in range(count):
                image.new("RGB", (40, 50), (50 * label, 20, i)).save(f"my_images/{part}/{name}/{i}.png")
    page = (Path(training.__file__).parent / "README.md").read_text()
    code, = (block for block in re.findall("```python\n(.*?)```", page, re.DOTALL) if "ImageFolder" in block)
    exec(code)
    data = datasets.load("mine.npz", "train")
    assert data.images.shape == (4, 3, 32, 32)  # in an order of their own
    found = zip(data.labels.tolist(), data.images[:, :, 9, 9].tolist())
    assert sorted(found) == [(0, [0, 20, 0]), (0, [0, 20, 1]), (1, [50, 20, 0]), (1, [50, 20, 1])]


def test_an_npz_file_is_read_in_canonical_order():
    content = arrays()
    train, test = (datasets.load(npz(), split) for split in ("train", "test"))
    assert train.data_set == test.data_set and train.data_set.classes == 5 and train.data_set.name == "five.npz"
    assert train.images.dtype == torch.uint8 and train.images.shape == (60, 3, 32, 32) and len(test) == 20
    rows = {image.tobytes(): label for image, label in zip(content["train_images"], content["train_labels"])}
    assert [rows[image.permute(1, 2, 0).contiguous().numpy().tobytes()] for image in train.images] \
        == train.labels.tolist()
    other = np.random.default_rng(0).permutation(60)
    again = datasets.load(npz("other.npz", train_images=content["train_images"][other],
                              train_labels=content["train_labels"][other].astype(np.int64)), "train")
    assert torch.equal(again.images, train.images) and torch.equal(again.labels, train.labels)
    assert again.data_set.digest == train.data_set.digest
    content["train_images"][3, 0, 0, 0] ^= 1
    assert datasets.load(npz(**content), "test").data_set.digest != train.data_set.digest  # of all images


def test_a_hold_out_is_a_tenth_of_every_class():
    fit, held = (datasets.load(npz(), split) for split in ("fit", "holdout"))
    assert held.labels.bincount().tolist() == [1] * 5 and fit.labels.bincount().tolist() == [11] * 5
    few = arrays(train=30)
    with pytest.raises(BadInput, match="too few train images for a hold-out"):
        datasets.load(npz(**few), "holdout")
    data, name = datasets.chosen(options(data=npz(), holdout=True), "test")
    assert (len(data), name) == (5, "five.npz hold-out")


@pytest.mark.parametrize("folder", ("here", f"parent/{datasets.CIFAR10}"))
def test_cifar_10(tmp_path, folder):
    folder = cifar10(tmp_path / folder)
    data, name = datasets.chosen(options(data=folder.parent if "parent" in str(folder) else folder), "train")
    assert (len(data), name, data.data_set.name, data.data_set.classes) == (100, "CIFAR-10 train", "CIFAR-10", 10)
    assert len(datasets.load(folder, "test")) == 10
    content = {"data": np.zeros((1, 3072), np.uint8), "labels": [10]}
    (folder / "data_batch_4").write_bytes(pickle.dumps(content, 4))
    with pytest.raises(BadInput, match="data_batch_4: cannot be read as a file of CIFAR-10 .*integers from 0 to 9"):
        datasets.load(folder)
    (folder / "data_batch_4").unlink()
    with pytest.raises(BadInput, match=r"\(--data\) holds no CIFAR-100 .* and no CIFAR-10 .* \.npz file"):
        datasets.load(folder)
    with pytest.raises(BadInput, match=r"mine.npz \(--data\): no such file"):
        datasets.load(folder / "mine.npz")


IMAGES = arrays()["train_images"]


NUMBERED = "expected labels from 0 to the number of classes - 1, two classes or more, and images of each class"


@pytest.mark.parametrize("changes, said", (
    ({"test_labels": None}, "test_labels is not a file in the archive; expected the arrays train_images, "),
    ({"train_images": np.array([{}], object)}, "no .npz file with the plain arrays .* .ValueError"),
    ({"train_images": np.uint8(3)}, r"train_images is uint8 \[\], expected"),
    ({"train_images": IMAGES.transpose(0, 3, 1, 2)}, r"expected uint8 \[N, 32, 32, 3\]: .*channels last"),
    ({"train_images": IMAGES.astype(np.float32)}, r"train_images is float32 \[60, 32, 32, 3\], expected uint8"),
    ({"train_images": IMAGES[:, :28, :28]}, r"\[60, 28, 28, 3\], .*scaled to that size"),
    ({"train_images": IMAGES[:0]}, r"\[0, 32, 32, 3\]"),
    ({"train_images": IMAGES[:59]}, r"train_labels is uint8 \[60\], expected 59 integers, one for each image"),
    ({"train_labels": np.zeros(60)}, r"train_labels is float64 \[60\], expected 60 integers"),
    ({"train_labels": np.arange(60) - 1}, NUMBERED), ({"train_labels": np.arange(60, dtype="u8") << 50}, NUMBERED),
    ({"train_labels": np.arange(60) % 5 + 1}, NUMBERED), ({"test_labels": np.full(20, 7)}, NUMBERED),
    ({"train_labels": np.zeros(60, int), "test_labels": np.zeros(20, int)}, NUMBERED)))
def test_an_npz_file_of_anything_else_is_refused(changes, said):
    with pytest.raises(BadInput, match=said) as caught:
        datasets.load(npz(**changes))
    assert str(caught.value).startswith("five.npz: ") and "\n" not in str(caught.value)
    assert "allow_pickle" not in str(caught.value)


@pytest.mark.parametrize("damage", (
    lambda raw: b"", lambda raw: raw[:len(raw) // 2], lambda raw: pickle.dumps({"a": 1}),
    lambda raw: raw[:50_000] + bytes([raw[50_000] ^ 1]) + raw[50_001:]))  # a pixel: the checksum in the file
def test_a_damaged_npz_file_is_refused(tmp_path, damage):
    path = tmp_path / npz()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadInput, match="no .npz file|damaged") as caught:
        datasets.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_network_of_other_classes_needs_no_download(monkeypatch):
    monkeypatch.setattr(cifar100, "load", lambda *args: pytest.fail("CIFAR-100 was looked for"))
    with pytest.raises(BadInput, match="the network has 7 outputs, and the data 100 classes: give the --data that"):
        datasets.chosen(options(), "test", network=prepare(networks.make(TINY, 7)))


def test_a_name_is_no_data_set(monkeypatch):
    """Other images in a file called CIFAR-100 are not CIFAR-100's; its own in a file of any name are."""
    npz("CIFAR-100")
    Path("CIFAR-100.npz").rename("CIFAR-100")
    assert datasets.load("CIFAR-100").data_set.name == "CIFAR-100 (other images)"
    found = datasets.load(npz()).data_set
    monkeypatch.setattr(cifar100, "CIFAR100", dataclasses.replace(found, name="CIFAR-100"))
    assert datasets.load("five.npz").data_set == cifar100.CIFAR100
    assert datasets.chosen(options(data=Path("five.npz")), "test")[1] == "test"
    assert cifar100.near_duplicates("five.npz") is None


def test_made_up_images_have_the_classes_of_the_network():
    network = prepare(networks.make(TINY, 7))
    assert datasets.chosen(options(made_up=20), "test", network=network)[0].data_set.classes == 7
    assert datasets.chosen(options(made_up=20), "test")[0].data_set.classes == 100
    with pytest.raises(BadInput, match="--made-up and --data exclude each other"):
        datasets.chosen(options(made_up=20, data="own.npz"), "train")
    with pytest.raises(BadInput, match="the network has 7 outputs, and the data 5 classes: give the --data that"):
        datasets.chosen(options(data=npz()), "test", network=network)


# ---- From the command line -----------------------------------------------------------------------

def ended(main, line, capsys):
    """(status, stdout, stderr) of a script's command line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: main(str(line).split()))
    return stopped.value.code, *capsys.readouterr()


def test_five_classes_through_all_scripts(tmp_path, capsys):
    """Trained, refused on other data, evaluated, counted, quantized and verified."""
    npz(), npz("other.npz", **arrays(seed=1)), npz("four.npz", **arrays(classes=4))
    train = (f"--network {TINY} --batch-size 30 --epochs 1 --no-cuda --precision float32 --lr 0.01 --workers 1 "
             "--refresh 0 --run run --data ")
    assert ended(training.main, train + "five.npz", capsys)[0] == 0
    model = networks.load_checkpoint("run/masked.pt", TINY)
    assert model.linear.out_features == 5
    assert load_json("run/pretrain.options.json")["data_set"] == vars(datasets.load("five.npz").data_set)

    for other in ("other.npz", "four.npz"):  # as many images in the first
        status, out, err = ended(training.main, train + other, capsys)
        assert status == 2 and err.count("\n") == 1 and "data_set five.npz (5 classes, digest" in err and other in err
    status, out, err = ended(training.main, train.replace("--run run", "--run new --start run/pretrain.pt --rew")
                             + "four.npz", capsys)
    assert status == 2 and "pretrain.pt is of a network with 5 classes, expected 4: give --data" in err
    status, out, err = ended(training.main, train.replace("--run run", "--run new --pretrain --teacher run/pretrain.pt")
                             + "four.npz", capsys)
    assert status == 2 and "--teacher run/pretrain.pt is of a network with 5 classes, expected 4: give --data" in err

    line = f"--network {TINY} --checkpoint run/masked.pt"
    status, out, err = ended(testers.main, f"{line} --data five.npz --summary", capsys)
    assert (status, err) == (0, "") and "(five.npz test set)" in out and "/20 (" in out
    status, out, err = ended(testers.main, f"{line} --data four.npz --summary", capsys)
    assert status == 2 and "not verified: the network has 5 outputs, and the data 4 classes" in err
    assert ended(check_model_operations.main, f"{line} --summary", capsys)[0] == 0

    out = "--calibration 20 --renew 0 --ranges mse --data five.npz --out out.pt"
    status, _, err = ended(quantize.main, f"{line} {out} --no-cuda", capsys)
    assert (status, err) == (0, "")
    claim = load_json("out.json")
    assert claim["network"]["classes"] == 5 and claim["accuracy"]["data"] == "five.npz test"
    assert claim["data_set"] == vars(datasets.load("five.npz").data_set)
    line = f"--network {TINY} --checkpoint out.pt --summary --data"
    assert ended(testers.main, f"{line} five.npz", capsys)[::2] == (0, "")
    (tmp_path / "other").mkdir()
    (tmp_path / "other.npz").rename("other/five.npz")  # as many images under the same name
    status, _, err = ended(testers.main, f"{line} other/five.npz", capsys)
    assert status == 2 and "not verified: tested on five.npz (5 classes, digest" in err


def test_a_hold_out_that_the_start_was_trained_on_is_no_hold_out(capsys):
    npz("many.npz", **arrays(train=200))
    train = (f"--network {TINY} --batch-size 30 --epochs 1 --no-cuda --precision float32 --lr 0.01 --workers 1 "
             "--refresh 0 --data many.npz --run ")
    for words, warned in (("all --pretrain", False), ("part --pretrain --holdout", False),
                          ("all --rew --holdout", True), ("part --rew --holdout", False),
                          ("new --rew --holdout --start all/pretrain.pt", True)):
        status, _, err = ended(training.main, train + words, capsys)
        assert status == 0 and ("the stage pretrain was trained without --holdout" in err) == warned, words


def test_cifar_10_is_trained_with_ten_outputs(tmp_path, capsys):
    line = (f"--pretrain --network {TINY} --batch-size 50 --epochs 1 --no-cuda --precision float32 --refresh 0 "
            f"--workers 1 --run run --data {cifar10(tmp_path / 'set')}")
    assert ended(training.main, line, capsys)[0] == 0
    assert networks.load_checkpoint("run/pretrain.pt", TINY).linear.out_features == 10
    fixed = line.replace(TINY, f"{TINY}?num_classes=100").replace("--run run", "--run other")
    status, _, err = ended(training.main, fixed, capsys)
    assert status == 2 and "its outputs for images [1, 3, 32, 32] are [1, 100], and the data have 10 classes" in err
    status, _, err = ended(training.main, line.replace("--run run", "--run other --teacher a.t7"), capsys)
    assert status == 2 and "a.t7: KAIST's networks know the classes of CIFAR-100, not those of CIFAR-10 (10" in err


def test_a_teacher_of_other_classes_is_refused():
    torch.save(networks.make(TINY, 7).state_dict(), "seven.pt")
    seven = cifar100.DataSet("seven.npz", 7, "digest")
    assert teachers.load("seven.pt", TINY, seven).linear.out_features == 7
    with pytest.raises(BadInput, match="--teacher seven.pt does not fit|--teacher seven.pt is of a network with 7"):
        teachers.load("seven.pt", TINY)


def test_a_hold_out_of_made_up_images_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        training.main(["--pretrain", "--holdout", "--made-up", "40"])
    assert ended.value.code == 2 and "not allowed with argument --holdout" in capsys.readouterr().err
