import io
import os
import pickle
import tarfile
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from compressed import cifar100
from compressed.errors import BadInput


# A set in the published layout: 200 train images (2 of each class) and 100 test images

def content(n, seed):
    rng = np.random.default_rng(seed)
    return {"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8), "fine_labels": [i % 100 for i in range(n)]}


def write(path, value, protocol=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, protocol))


SIZES = {"train": 200, "test": 100}


def write_set(folder):
    for seed, (split, n) in enumerate(SIZES.items()):
        write(folder / split, content(n, seed), protocol=4)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with a small set that the module takes for the real one."""
    folder = tmp_path / "some" / cifar100.SET
    write_set(folder)
    for split, n in SIZES.items():
        found = cifar100.fingerprint(cifar100.digests(*cifar100.read(folder / split)))
        monkeypatch.setitem(cifar100.FINGERPRINT, split, found)
        monkeypatch.setitem(cifar100.COUNT, split, n)
    return folder


# ------------------------------------------------------------------------------------------------------------- find

def test_find_takes_the_folder_or_its_parent(small, monkeypatch):
    assert cifar100.find(small) == cifar100.find(small.parent) == cifar100.find(str(small)) == small
    monkeypatch.setenv("CIFAR100_DIR", str(small.parent))
    assert cifar100.find() == small
    monkeypatch.setenv("CIFAR100_DIR", "")
    small.parent.rename("data.cifar100")
    assert cifar100.find() == Path("data.cifar100", cifar100.SET)


def test_a_named_folder_without_a_set_is_named_and_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: pytest.fail("downloads"))
    with pytest.raises(BadInput, match=r"/nowhere \(--data\) holds no CIFAR-100"):
        cifar100.find("/nowhere")
    write(tmp_path / "train", content(3, 0))  # without test
    monkeypatch.setenv("CIFAR100_DIR", str(tmp_path))
    with pytest.raises(BadInput, match="CIFAR100_DIR"):
        cifar100.load(split="test")


# --------------------------------------------------------------------------------------------------------- download

def serve(monkeypatch, payload):
    class Response(io.BytesIO):
        headers = {"Content-Length": str(len(payload))}

    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Response(payload))


def archive(**extra):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        members = {f"{cifar100.SET}/{name}": name.encode() for name in ("train", "test", "meta")} | extra
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_without_a_network_one_line_says_what_to_do(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(BadInput, match="cannot download .*no route to host.*--data FOLDER or CIFAR100_DIR=") as caught:
        cifar100.find()
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_another_archive_is_refused_and_leaves_nothing(monkeypatch, tmp_path):
    serve(monkeypatch, archive())
    with pytest.raises(BadInput, match="MD5 differs"):
        cifar100.find()
    assert not list(tmp_path.iterdir())


def test_download_unpacks_the_three_files_and_nothing_else(monkeypatch, tmp_path):
    payload = archive(**{"../outside": b"x", f"{cifar100.SET}/more": b"x"})
    serve(monkeypatch, payload)
    (tmp_path / "copy").write_bytes(payload)
    monkeypatch.setattr(cifar100, "ARCHIVE_MD5", cifar100.file_md5(tmp_path / "copy"))
    (tmp_path / "copy").unlink()
    folder = cifar100.find()
    assert folder == Path("data.cifar100", cifar100.SET)
    assert {file.name: file.read_text() for file in folder.iterdir()} == {n: n for n in ("train", "test", "meta")}
    assert [path.name for path in tmp_path.iterdir()] == ["data.cifar100"]
    assert not (tmp_path.parent / "outside").exists()
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: pytest.fail("downloads again"))
    assert cifar100.find() == folder


def test_a_download_follows_a_link(monkeypatch, tmp_path):
    """The temporary folder lies on the disk of the data: files are moved from it."""
    serve(monkeypatch, archive())
    monkeypatch.setattr(cifar100, "file_md5", lambda path: cifar100.ARCHIVE_MD5)
    (tmp_path / "disk/images").mkdir(parents=True)
    Path("data.cifar100").symlink_to("disk/images")
    real, where = tempfile.TemporaryDirectory, []
    monkeypatch.setattr(tempfile, "TemporaryDirectory",
                        lambda **options: where.append(options["dir"]) or real(**options))
    assert cifar100.find() == Path("data.cifar100", cifar100.SET) and where == [(tmp_path / "disk").resolve()]
    assert Path("data.cifar100").is_symlink() and len(list((tmp_path / "disk/images" / cifar100.SET).iterdir())) == 3


# ---------------------------------------------------------------------------------------------------- read and check

class Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


@pytest.mark.parametrize("value", [Attack(), {"data": Attack(), "fine_labels": []}])
def test_a_pickle_that_runs_something_is_refused_and_not_run(tmp_path, value):
    write(tmp_path / "train", value)
    with pytest.raises(BadInput, match=r"train: cannot be read .*refers to posix\.system"):
        cifar100.read(tmp_path / "train")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("change, message", [
    (lambda raw: raw[: len(raw) // 2], "cannot be read as a file of CIFAR-100"),
    (lambda raw: b"", "cannot be read as a file of CIFAR-100"),
    (lambda raw: pickle.dumps([1, 2]), "cannot be read as a file of CIFAR-100"),
    (lambda raw: pickle.dumps({"data": [0], "fine_labels": [0]}), "cannot be read as a file of CIFAR-100"),
    (lambda raw: pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "fine_labels": {0}}), "cannot be read as"),
    (lambda raw: pickle.dumps(content(5, 0) | {"fine_labels": [0, 1]}, 4), r"\[5, 3072\] for 2 labels"),
    (lambda raw: pickle.dumps({"data": np.zeros((2, 3072)), "fine_labels": [0, 1]}, 4), "float64 pixels"),
    (lambda raw: pickle.dumps(content(2, 0) | {"fine_labels": [0, 100]}, 4), "labels that are not integers"),
    (lambda raw: pickle.dumps(content(2, 0) | {"fine_labels": [0, "1"]}, 4), "labels that are not integers"),
    (lambda raw: pickle.dumps(content(200, 7), 4), "200 images are not CIFAR-100's 200 train images"),
    (lambda raw: raw.replace(raw[5000:5002], bytes([raw[5000] ^ 1, raw[5001]])), "are not CIFAR-100's"),
])
def test_a_damaged_or_foreign_file_is_refused(small, change, message):
    write(small / "train", change((small / "train").read_bytes()))
    with pytest.raises(BadInput, match=message) as caught:
        cifar100.load(small, "train")
    assert str(small / "train") in str(caught.value) and "\n" not in str(caught.value)
    assert len(cifar100.load(small, "test")) == 100
    small.parent.rename("data.cifar100")  # where downloads go
    with pytest.raises(BadInput, match=f"; remove data.cifar100/{cifar100.SET}, and it is downloaded again$"):
        cifar100.load(split="train")


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_both_names_of_numpys_module_are_read(tmp_path, module):
    value = content(4, 0)
    raw = pickle.dumps(value, 3)  # a protocol without frame lengths, so that names can be exchanged
    name = next(name for name in (b"numpy.core.multiarray", b"numpy._core.multiarray") if b"c" + name + b"\n" in raw)
    write(tmp_path / "train", raw.replace(b"c" + name + b"\n", b"c" + module + b"\n"))
    images, labels = cifar100.read(tmp_path / "train")
    assert (images.reshape(4, -1) == value["data"]).all() and labels.tolist() == [0, 1, 2, 3]


def test_any_order_of_the_files_gives_the_same_tensors(small, tmp_path):
    one = {split: cifar100.load(small, split) for split in ("train", "test")}
    for seed, (split, n) in enumerate(SIZES.items()):
        value, shuffle = content(n, seed), np.random.default_rng(9).permutation(n)
        write(tmp_path / "other" / split, {"data": value["data"][shuffle],
                                           "fine_labels": [value["fine_labels"][i] for i in shuffle]}, 4)
    for split, first in one.items():
        second = cifar100.load(tmp_path / "other", split)
        assert (first.images == second.images).all() and (first.labels == second.labels).all()
        assert first.images.dtype == torch.uint8 and first.images.shape == (len(first), 3, 32, 32)
        assert first.labels.dtype == torch.int64 and len(first) == SIZES[split]
    raw, train = content(200, 0), one["train"]
    label_of = {row.tobytes(): label for row, label in zip(raw["data"], raw["fine_labels"])}
    assert [label_of[image.numpy().tobytes()] for image in train.images] == train.labels.tolist()


def test_near_duplicates_are_known_in_the_published_order_alone(small, tmp_path, monkeypatch):
    """The list is by the published file's order; it is never applied to a copy in another one."""
    assert cifar100.near_duplicates(small) is None  # another MD5
    monkeypatch.setitem(cifar100.MD5, "test", cifar100.file_md5(small / "test"))
    (tmp_path / "list.csv").write_text("# source\ntest_index,train_index,judgment\n7,0,0\n42,1,2\n")
    monkeypatch.setattr(cifar100, "NEAR_DUPLICATES", tmp_path / "list.csv")
    marked, test = cifar100.near_duplicates(small), cifar100.load(small, "test")
    raw = content(100, 1)["data"]
    assert {image.numpy().tobytes() for image in test.images[marked]} == {raw[7].tobytes(), raw[42].tobytes()}
    assert marked.dtype == torch.bool and marked.shape == (100,)


def test_the_list_of_near_duplicates():
    lines = cifar100.NEAR_DUPLICATES.read_text().splitlines()
    rows = [[int(x) for x in line.split(",")] for line in lines[3:]]
    assert lines[2] == "test_index,train_index,judgment" and len({row[0] for row in rows}) == len(rows) == 891
    assert [sum(row[2] == kind for row in rows) for kind in range(3)] == [39, 582, 270]
    assert all(0 <= test < 10_000 and 0 <= train < 50_000 for test, train, _ in rows)


def test_holdout_is_apart_and_has_as_many_of_each_class(small, monkeypatch):
    monkeypatch.setattr(cifar100, "HOLDOUT", 2)
    fit, held, train = (cifar100.load(small, split) for split in ("fit", "holdout", "train"))
    assert held.labels.bincount().tolist() == fit.labels.bincount().tolist() == [1] * 100
    rows = {image.numpy().tobytes() for image in fit.images}, {image.numpy().tobytes() for image in held.images}
    assert not rows[0] & rows[1] and rows[0] | rows[1] == {image.numpy().tobytes() for image in train.images}


def test_the_real_set(cifar100_dir, capsys):
    held = cifar100.load(cifar100_dir, "holdout")
    assert len(held) == 5_000 and held.labels.bincount().tolist() == [50] * 100
    assert cifar100.main(["--data", str(cifar100_dir)]) == 0
    out = capsys.readouterr().out
    assert "50,000 images" in out and "10,000 images" in out and str(cifar100_dir) in out


def test_made_up_sets_share_patterns_and_differ_in_noise():
    one, again, other = cifar100.made_up(300, 1), cifar100.made_up(300, 1), cifar100.made_up(300, 2)
    assert (one.images == again.images).all() and (one.labels == again.labels).all()
    assert one.labels.bincount().tolist() == [3] * 100 and (one.images != other.images).any()
    train, test = cifar100.made_up(400, 1, classes=10), cifar100.made_up(100, 2, classes=10)
    means = torch.stack([train.images[train.labels == c].float().mean(0).flatten() for c in range(10)])
    nearest = torch.cdist(test.images.float().flatten(1), means).argmin(1)
    assert (nearest == test.labels).float().mean() > 0.95


# -------------------------------------------------------------------------------------------------------- normalise

def test_every_normalised_pixel_is_an_int8_code_times_2_to_the_minus_6():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    codes = cifar100.normalise(pixels) * 64
    assert codes.dtype == torch.float32 and (codes.flatten() == torch.arange(-128, 128)).all()
