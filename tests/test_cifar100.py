import io
import os
import pickle
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from compressed import cifar100
from compressed.cifar100 import OPS, Draws, draw
from compressed.errors import BadInput


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No set is found by accident, and nothing is downloaded into the repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CIFAR100_DIR", raising=False)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The batches here are tiny: on a busy machine a second thread makes them wait many times longer than they run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


REAL = os.environ.get("CIFAR100_DIR")


@pytest.fixture(scope="module")
def real():
    if not REAL:
        pytest.skip("CIFAR100_DIR does not name the real set")
    return Path(REAL).absolute()


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


@pytest.mark.parametrize("error", [urllib.error.URLError("no route to host"), TimeoutError("timed out")])
def test_without_a_network_one_line_says_what_to_do(monkeypatch, tmp_path, error):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(BadInput) as caught:
        cifar100.find()
    assert "--data FOLDER or CIFAR100_DIR=FOLDER" in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


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


# ---------------------------------------------------------------------------------------------------- read and check

class Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


@pytest.mark.parametrize("value", [Attack(), {"data": Attack(), "fine_labels": []}])
def test_a_pickle_that_runs_something_is_refused_and_not_run(tmp_path, value):
    write(tmp_path / "train", value)
    with pytest.raises(BadInput, match=r"train: .*refers to posix\.system"):
        cifar100.read(tmp_path / "train")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("change, message", [
    (lambda raw: raw[: len(raw) // 2], "damaged"),
    (lambda raw: b"", "damaged"),
    (lambda raw: b"PK\3\4 a zip file", "damaged"),
    (lambda raw: pickle.dumps([1, 2]), "no `data` array"),
    (lambda raw: pickle.dumps({"data": [0], "fine_labels": [0]}), "no `data` array"),
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


def test_the_published_md5_alone_is_enough(small, monkeypatch):
    monkeypatch.setitem(cifar100.FINGERPRINT, "train", "another")
    with pytest.raises(BadInput):
        cifar100.load(small, "train")
    monkeypatch.setitem(cifar100.MD5, "train", cifar100.file_md5(small / "train"))
    assert len(cifar100.load(small, "train")) == 200


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
    monkeypatch.setattr(cifar100, "HOLDOUT_PER_CLASS", 1)
    fit, held, train = (cifar100.load(small, split) for split in ("fit", "holdout", "train"))
    assert held.labels.bincount().tolist() == fit.labels.bincount().tolist() == [1] * 100
    rows = {image.numpy().tobytes() for image in fit.images}, {image.numpy().tobytes() for image in held.images}
    assert not rows[0] & rows[1] and rows[0] | rows[1] == {image.numpy().tobytes() for image in train.images}


def test_unknown_split(small):
    with pytest.raises(BadInput, match="'val' is none of train, test, fit, holdout"):
        cifar100.load(small, "val")


def test_the_real_set(real, capsys):
    fit, held = cifar100.load(real, "fit"), cifar100.load(real, "holdout")
    assert (len(fit), len(held)) == (45_000, 5_000)
    assert held.labels.bincount().tolist() == [50] * 100 and fit.labels.bincount().tolist() == [450] * 100
    pixels = torch.cat((fit.images, held.images)).float()
    assert torch.allclose(pixels.mean((0, 2, 3)), torch.tensor([129.3, 124.1, 112.4]), atol=0.05)
    assert torch.allclose(pixels.std((0, 2, 3)), torch.tensor([68.2, 65.4, 70.4]), atol=0.05)
    assert cifar100.main(["--data", str(real)]) == 0
    out = capsys.readouterr().out
    assert "50,000 images" in out and "10,000 images" in out and str(real) in out


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


# ------------------------------------------------------------------------------------------------------------ draws

EVERYTHING = dict(trivial=True, mixing="both", mix_probability=0.8)
TENSORS = ("top", "left", "flip", "op", "magnitude", "lam", "weight", "box")


@pytest.mark.parametrize("options", [{}, EVERYTHING, dict(crop=False, mixing="mixup"), dict(mixing="cutmix")])
def test_draws_are_reproducible_and_a_slice_does_what_the_whole_does(options):
    batch = cifar100.made_up(37, 0)
    draws, again = (draw(37, generator(5), **options) for _ in range(2))
    whole = cifar100.augment(batch.images, batch.labels, draws)
    for a, b in zip(whole, cifar100.augment(batch.images, batch.labels, again)):
        assert torch.equal(a, b)
    thirds = slice(0, 12), slice(12, 24), slice(24, 37)
    parts = [cifar100.augment(batch.images[third], batch.labels[third], draws[third]) for third in thirds]
    for a, b in zip(whole, zip(*parts)):
        assert torch.equal(a, torch.cat(b))
    assert len(draws[24:99]) == 13 and whole[0].dtype == whole[3].dtype == torch.float32


def test_each_image_has_its_own_draw():
    draws = draw(512, generator(), **EVERYTHING)
    values = {"top": 9, "left": 9, "flip": 2, "op": 14}
    for name, count in values.items():
        assert getattr(draws, name).unique().tolist() == list(range(count))
    assert draws.magnitude.unique().numel() > 100 and draws.lam.unique().numel() > 100
    assert (draws.magnitude < 0).any() and (draws.magnitude[draws.op >= cifar100.POSTERIZE] >= 0).all()
    assert 0.1 < (draws.lam == 1).float().mean() < 0.35
    other = draw(512, generator(1), **EVERYTHING)
    assert not any(torch.equal(getattr(draws, name), getattr(other, name)) for name in TENSORS)


def test_the_images_are_left_as_they_were():
    batch = cifar100.made_up(64, 0)
    before = batch.images.clone()
    cifar100.augment(batch.images, batch.labels, draw(64, generator(), **EVERYTHING))
    assert torch.equal(batch.images, before)


def test_a_slice_that_parts_a_pair_is_refused():
    draws = draw(8, generator(), mixing="mixup")
    for part in (slice(1, 4), slice(0, 3), slice(0, 8, 2)):
        with pytest.raises(ValueError, match="partner"):
            draws[part]
    assert len(draw(8, generator())[1:4]) == 3  # without mixing there are no pairs
    with pytest.raises(ValueError, match="8 draws for 3 images"):
        cifar100.augment(torch.zeros(3, 3, 32, 32, dtype=torch.uint8), torch.zeros(3).long(), draws)


@pytest.mark.parametrize("options, message", [
    (dict(mixing="cutout"), "'cutout' is none of none, mixup, cutmix, both"),
    (dict(mixup_alpha=0.0), "alpha 0.0"), (dict(cutmix_alpha=-1.0), "alpha -1.0"),
    (dict(mixup_alpha=float("nan")), "alpha nan"), (dict(mix_probability=1.5), "1.5 is not between 0 and 1"),
])
def test_options_that_do_not_exist(options, message):
    with pytest.raises(BadInput, match=message):
        draw(4, generator(), **options)


def test_epoch_order_is_a_permutation():
    order = cifar100.epoch_order(1000, generator())
    assert torch.equal(order.sort().values, torch.arange(1000)) and not torch.equal(order, torch.arange(1000))
    assert torch.equal(order, cifar100.epoch_order(1000, generator()))


# ---------------------------------------------------------------------------------------------------- crop and flip

def test_crop_and_flip_are_those_of_a_slow_reference():
    images = cifar100.made_up(200, 0).images
    draws = draw(200, generator())
    expected = torch.zeros_like(images)
    for n in range(200):
        padded = torch.zeros(3, 40, 40, dtype=torch.uint8)
        padded[:, 4:36, 4:36] = images[n]
        top, left = draws.top[n], draws.left[n]
        cropped = padded[:, top:top + 32, left:left + 32]
        expected[n] = cropped.flip(2) if draws.flip[n] else cropped
    assert torch.equal(cifar100.crop_flip(images, draws), expected)


# -------------------------------------------------------------------------------------------------- TrivialAugment

@pytest.fixture(scope="module")
def pictures():
    """Smooth, noisy, dark, low-contrast, flat, black and two-level images: every branch of every operation."""
    images = cifar100.made_up(12, 0).images
    images[4] //= 8
    images[5] = images[5] // 16 + 100
    images[6], images[7] = 77, 0
    images[8] = (images[8] > 128) * 255
    images[9, 0], images[10, :, 4:] = 3, 200
    return images


def torchvisions(name, images, magnitude):
    """What torchvision makes of a batch with one operation (v2 where it has uint8 kernels of its own)."""
    from torchvision.transforms import InterpolationMode, autoaugment
    from torchvision.transforms.v2 import functional as v2

    kernel = {"Brightness": v2.adjust_brightness, "Color": v2.adjust_saturation, "Contrast": v2.adjust_contrast,
              "Sharpness": v2.adjust_sharpness}.get(name)
    if kernel:
        return kernel(images, 1 + magnitude)
    if name in ("AutoContrast", "Equalize"):
        return {"AutoContrast": v2.autocontrast, "Equalize": v2.equalize}[name](images)
    return autoaugment._apply_op(images, name, magnitude, InterpolationMode.NEAREST, [0.0] * 3)


def test_the_magnitudes_are_torchvisions():
    from torchvision.transforms.autoaugment import TrivialAugmentWide

    space = TrivialAugmentWide()._augmentation_space(cifar100.BINS)
    assert tuple(space) == OPS
    for op, (magnitudes, signed) in enumerate(space.values()):
        assert torch.equal(cifar100.MAGNITUDES[op], magnitudes.float().expand(cifar100.BINS))
        assert signed == (op not in (0, *range(cifar100.POSTERIZE, len(OPS))))


@pytest.mark.parametrize("name", OPS)
def test_each_operation_at_each_magnitude_is_torchvisions(name, pictures):
    op = OPS.index(name)
    n, off = len(pictures), 0
    values = set(cifar100.MAGNITUDES[op].tolist())
    if op < cifar100.POSTERIZE:
        values |= {-value for value in values}
    for magnitude in values:
        draws = Draws(n, op=torch.full((n,), op), magnitude=torch.full((n,), magnitude))
        made, expected = cifar100.trivial_augment(pictures, draws), torchvisions(name, pictures, magnitude)
        difference = (made.int() - expected.int()).abs()
        if name in ("Brightness", "Color", "Contrast", "Sharpness"):  # sums in another order, then cut to whole levels
            assert difference.max() <= 1
            off += difference.count_nonzero().item()
        elif name == "Rotate":  # at 45 and 135 degrees a diagonal stands exactly between two pixels
            off += difference.count_nonzero().item()
            assert abs(magnitude) % 90 == 45 or not difference.any()
        else:
            assert not difference.any(), magnitude
    assert off <= 0.01 * pictures.numel() * len(values)


def test_a_batch_of_all_operations_is_each_image_on_its_own(pictures):
    images = pictures.repeat(20, 1, 1, 1)
    draws = draw(len(images), generator(3), crop=False, trivial=True)
    together = cifar100.trivial_augment(images, draws)
    alone = torch.cat([cifar100.trivial_augment(images[n:n + 1], draws[n:n + 1]) for n in range(len(images))])
    assert torch.equal(together, alone)
    identity = draws.op == cifar100.IDENTITY
    assert identity.any() and torch.equal(together[identity], images[identity])


# ----------------------------------------------------------------------------------------------------------- mixing

def hand_made(lam, weight, box):
    return Draws(len(lam), lam=torch.tensor(lam), weight=torch.tensor(weight), box=torch.tensor(box))


def test_mixing_by_hand():
    x = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 32, 32)
    labels = torch.arange(10, 15)
    none = [0, 0, 0, 0]
    draws = hand_made([0.75, 1.0, 0.9375, 0.25, 0.5], [0.75, 1.0, 1.0, 0.25, 0.5],
                      [none, none, [0, 4, 8, 24], none, none])
    mixed, own, others, lam = cifar100.mix(x, labels, draws)
    assert own.tolist() == labels.tolist() and others.tolist() == [11, 10, 13, 12, 14]
    assert (mixed[0] == 0.25).all() and (mixed[1] == 1).all()  # 0.75 * 0 + 0.25 * 1; not mixed
    assert (mixed[2, :, :4, 8:24] == 3).all() and (mixed[2] == 3).sum() == 3 * 64 and (mixed[2] == 2).sum() == 3 * 960
    assert (mixed[3] == 0.25 * 3 + 0.75 * 2).all() and (mixed[4] == 4).all()
    assert lam.tolist() == [0.75, 1.0, 0.9375, 0.25, 0.5]


def test_without_mixing_the_batch_is_only_normalised():
    batch = cifar100.made_up(6, 0)
    x, labels, others, lam = cifar100.augment(batch.images, batch.labels, draw(6, generator(), crop=False))
    assert torch.equal(x, cifar100.normalise(batch.images)) and (lam == 1).all()
    assert torch.equal(labels, batch.labels) and torch.equal(others, batch.labels)


def test_cutmix_labels_follow_the_box_as_it_is_cut_off_at_the_border():
    draws = draw(2000, generator(), mixing="cutmix")
    x = torch.tensor([0.0, 1.0]).repeat(1000).view(-1, 1, 1, 1).expand(-1, 1, 32, 32)
    mixed = cifar100.mix(x, torch.zeros(2000).long(), draws)[0]
    assert torch.equal((mixed == x).float().mean((1, 2, 3)), draws.lam) and (draws.weight == 1).all()
    assert (draws.box >= 0).all() and (draws.box <= 32).all()
    height, width = draws.box[:, 1] - draws.box[:, 0], draws.box[:, 3] - draws.box[:, 2]
    assert (height != width).any() and (height == width).any()  # squares, some cut off


def test_mixup_has_no_box_and_its_share_is_the_labels():
    draws = draw(500, generator(), mixing="mixup", mixup_alpha=0.3)
    assert torch.equal(draws.lam, draws.weight)
    assert torch.equal(draws.box[:, 0], draws.box[:, 1]) and torch.equal(draws.box[:, 2], draws.box[:, 3])


@pytest.mark.parametrize("alpha", [0.01, 0.3, 1.0, 20.0])
def test_shares_follow_beta(alpha):
    lam = draw(20_000, generator(), mixing="mixup", mixup_alpha=alpha).lam
    assert torch.isfinite(lam).all() and lam.min() >= 0 and lam.max() <= 1
    assert abs(lam.mean() - 0.5) < 0.02  # mean and variance of Beta(alpha, alpha)
    assert lam.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


def test_both_mixes_each_image_one_way_or_the_other():
    draws = draw(4000, generator(), mixing="both", mixup_alpha=1.0, mix_probability=0.5)
    mixup, cutmix = draws.weight < 1, (draws.lam < 1) & (draws.weight == 1)
    assert 0.2 < mixup.float().mean() < 0.3 and 0.2 < cutmix.float().mean() < 0.3
    assert (draw(50, generator(), mixing="both", mix_probability=0.0).lam == 1).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_cpu_gives():
    batch = cifar100.made_up(256, 0)
    draws = draw(256, generator(), **EVERYTHING)
    here = cifar100.augment(batch.images, batch.labels, draws)
    there = cifar100.augment(batch.images.cuda(), batch.labels.cuda(), draws)
    assert all(tensor.is_cuda for tensor in there)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here[1:], there[1:]))
    # Sums in another order: the last bit, seldom a level, and very seldom the other of two equally near pixels.
    assert ((here[0] - there[0].cpu()).abs() > 1e-5).float().mean() < 0.01
    assert draw(8, torch.Generator("cuda").manual_seed(0), **EVERYTHING).op.is_cuda
