"""Load CIFAR-100 as uint8 tensors on the device, and augment whole batches there, every image with its own parameters.

    python -m compressed.cifar100 [--data FOLDER]      finds (or downloads) the data set, checks it, prints a summary

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. The data set is searched in --data, then in
the environment variable CIFAR100_DIR, then in ./data.cifar100. If the first two are not given, it is downloaded to the
last.

A training step first draws random parameters for the whole batch (`draw`) and then applies them to the images
(`augment`). One of several processes draws for the whole batch and applies its slice, so that all processes together
compute what a single one would.
"""
import contextlib
import csv
import dataclasses
import hashlib
import http.client
import math
import os
import pickle
import shutil
import tarfile
import tempfile
import urllib.request
from pathlib import Path

if __name__ == "__main__":
    import compressed.interrupt  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F

from compressed import environment
from compressed.command_line import command_line, number, progress_bar, run_script, some_path
from compressed.errors import BadInput

CLASSES = 100
IMAGE_SIZE = 32
HOLDOUT_PER_CLASS = 50
FOLDER = Path("data.cifar100")
NEAR_DUPLICATES = Path(__file__).with_name("near_duplicates.csv")
SET = "cifar-100-python"  # the name of the folder inside the published archive
HOW_TO_POINT = "point at a local copy with --data FOLDER or CIFAR100_DIR=FOLDER"

# Address and MD5 sums: torchvision.datasets.CIFAR100. Fingerprints: see `digests`; they hold for any order.
URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
ARCHIVE_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
COUNT = {"train": 50_000, "test": 10_000}
MD5 = {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}
FINGERPRINT = {"train": "6d2a03c47c105e4c34d3a2ff16c2803e8df0e5d6fa0c631e46663a327aeac573",
               "test": "381b7d98ce1e9b98232a8df0db0a22992654c39ff2433270656ab8ace5a45e65"}


@dataclasses.dataclass(frozen=True)
class Images:
    """Hold `images`, uint8 [N, 3, 32, 32] (RGB, 0 to 255), and their `labels`, int64 [N], on one device."""
    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self):
        return len(self.labels)


# ---------------------------------------------------------------------------------------------- find and download

def find(folder=None) -> Path:
    """Return the folder that holds the files `train` and `test`: `folder`, else CIFAR100_DIR, else ./data.cifar100.

    Each may also name the parent of that folder. Downloads only if neither of the first two is given and
    ./data.cifar100 lacks the files. Raises BadInput if a given folder lacks them, or if the download fails.
    """
    given = folder or environment.folder("CIFAR100_DIR")
    start = Path(given or FOLDER)
    for candidate in (start / SET, start):
        if all(os.path.isfile(candidate / split) for split in COUNT):
            return candidate
    if given:
        origin = "--data" if folder else "CIFAR100_DIR"
        raise BadInput(f"{start} ({origin}) holds no CIFAR-100: no files train and test in it or in its {SET}/")
    return download(start)


def download(folder: Path) -> Path:
    """Download the published archive, check its MD5, and unpack train, test and meta to `folder`/cifar-100-python.

    Works in a temporary folder next to `folder`, which is removed even after an error, so no partial file is left.
    Returns the folder of the files. Raises BadInput without a network or if the archive is not the published one.
    """
    try:
        with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=folder.name + ".",
                                         suffix=".tmp") as scratch:
            return download_through(Path(scratch), folder)
    except OSError as error:  # a folder that cannot be written, a disk that is full
        raise BadInput(f"cannot put CIFAR-100 into {folder.absolute()} ({error.strerror or error}); "
                       f"{HOW_TO_POINT}") from error


def download_through(scratch: Path, folder: Path) -> Path:
    """Do the work of `download`, with `scratch` as the temporary folder."""
    archive = scratch / "archive"
    try:
        fetch(URL, archive, "CIFAR-100")
    except (OSError, http.client.HTTPException) as error:  # URLError, HTTPError and time-outs are OSErrors
        raise BadInput(f"cannot download CIFAR-100 from {URL} ({error}); {HOW_TO_POINT}") from error
    if file_md5(archive) != ARCHIVE_MD5:
        raise BadInput(f"the archive from {URL} is cut short or another one (its MD5 differs); {HOW_TO_POINT}")
    (folder / SET).mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        for name in ("meta", "test", "train"):
            # Members are read by known names and written to known paths: the archive cannot choose where files go.
            with tar.extractfile(f"{SET}/{name}") as source, open(scratch / name, "wb") as target:
                shutil.copyfileobj(source, target)
            os.replace(scratch / name, folder / SET / name)
    return folder / SET


def fetch(url: str, path: Path, name: str) -> None:
    """Download `url` to `path`; on a terminal, show a progress bar labelled `name`."""
    with urllib.request.urlopen(url, timeout=60) as response, open(path, "wb") as file:
        size = int(response.headers.get("Content-Length") or 0) or None
        bar = progress_bar(total=size, unit="B", unit_scale=True, desc=name)
        with contextlib.nullcontext() if bar is None else bar:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                if bar is not None:
                    bar.update(len(chunk))


def file_md5(path) -> str:
    """Return the MD5 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


# -------------------------------------------------------------------------------------------------- read and check

class ArraysOnly(pickle.Unpickler):
    """Unpickle only containers, numbers, strings and numpy arrays; raise for any other name, so that no code runs."""

    reconstruct = np.empty(0).__reduce__()[0]
    ALLOWED = {("numpy.core.multiarray", "_reconstruct"): reconstruct,  # numpy 1, which wrote the published files
               ("numpy._core.multiarray", "_reconstruct"): reconstruct,  # numpy 2
               ("numpy", "ndarray"): np.ndarray,
               ("numpy", "dtype"): np.dtype}

    def find_class(self, module, name):
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise BadInput(f"it refers to {module}.{name}, which the published files do not") from None


def read(path) -> tuple[np.ndarray, np.ndarray]:
    """Return (images uint8 [N, 3, 32, 32], labels int64 [N]) of a file `train` or `test`, in the file's order.

    Does not check that they are those of CIFAR-100 (`load` does), and executes no code in the file. Raises BadInput if
    the file is damaged or is another kind of file.
    """
    try:
        with open(path, "rb") as file:
            content = ArraysOnly(file, encoding="latin1").load()  # latin1: Python 2 wrote the published files
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged pickle can raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__  # one line
        raise BadInput(f"{path}: not a CIFAR-100 file, or damaged ({reason})") from error
    content = content if isinstance(content, dict) else {}
    data, labels = content.get("data"), content.get("fine_labels")
    if not isinstance(data, np.ndarray) or not isinstance(labels, list):
        raise BadInput(f"{path}: not a CIFAR-100 file (no `data` array with a list of `fine_labels`)")
    if data.dtype != np.uint8 or data.shape != (len(labels), 3 * IMAGE_SIZE**2):
        raise BadInput(f"{path}: {data.dtype} pixels {list(data.shape)} for {len(labels)} labels, expected "
                       f"uint8 [{len(labels)}, {3 * IMAGE_SIZE**2}]")
    if not all(type(label) is int and 0 <= label < CLASSES for label in labels):
        raise BadInput(f"{path}: labels that are not integers from 0 to {CLASSES - 1}")
    return data.reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE), np.array(labels, np.int64)


def digests(images: np.ndarray, labels: np.ndarray) -> list[bytes]:
    """Return the SHA-256 of (label byte, 3072 CHW pixel bytes) of every image."""
    return [hashlib.sha256(bytes([label]) + image.tobytes()).digest() for image, label in zip(images, labels.tolist())]


def fingerprint(digests: list[bytes]) -> str:
    """Return a hash of a set of images that does not depend on their order."""
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def load(folder=None, split: str = "train", device="cpu") -> Images:
    """Return the images of a split, in canonical order, on the device.

    "train" has 50,000 images and "test" 10,000; "fit" and "holdout" divide the train set into 45,000 and 5,000 images,
    with 50 images of each class in the holdout. Canonical order is the order of the images' digests. Copies of the data
    set in another order so give the same tensors, and the same training for a seed; the order is as good as random.
    Raises BadInput if no data set is found (see `find`), or if it is not CIFAR-100 to the last pixel.
    """
    if split not in ("train", "test", "fit", "holdout"):
        raise BadInput(f"split {split!r} is none of train, test, fit, holdout")
    file = "test" if split == "test" else "train"
    path = find(folder) / file
    images, labels = read(path)
    keys = digests(images, labels)
    # The fingerprint is cheap once the digests are there, and MD5 is needed only if it differs.
    if fingerprint(keys) != FINGERPRINT[file] and file_md5(path) != MD5[file]:
        raise BadInput(f"{path}: its {len(labels):,} images are not CIFAR-100's {COUNT[file]:,} {file} images "
                       "(neither the published MD5 nor the same content in another order)")
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__))
    if split in ("fit", "holdout"):
        held = np.concatenate([np.flatnonzero(labels[order] == c)[:HOLDOUT_PER_CLASS] for c in range(CLASSES)])
        held = np.isin(np.arange(len(order)), held)
        order = order[held if split == "holdout" else ~held]
    return Images(torch.from_numpy(images[order]).to(device), torch.from_numpy(labels[order]).to(device))


def near_duplicates(folder=None) -> torch.Tensor | None:
    """Return which test images, bool [N] in canonical order, have a near-duplicate in the train set; None if unknown.

    There are 891 of them, judged by people: Barz and Denzler, "Do We Train on Test Data? Purging CIFAR of
    Near-Duplicates", J. Imaging 2020 (ciFAIR). Their list has indices into the published file, so it cannot be used
    with a copy in another order, which has another MD5.
    """
    path = find(folder) / "test"
    if file_md5(path) != MD5["test"]:
        return None
    keys = digests(*read(path))
    rows = [line for line in NEAR_DUPLICATES.read_text().splitlines() if not line.startswith("#")]
    listed = {int(row["test_index"]) for row in csv.DictReader(rows)}
    return torch.tensor([i in listed for i in sorted(range(len(keys)), key=keys.__getitem__)])


def made_up(n: int, seed: int, classes: int = CLASSES, device="cpu") -> Images:
    """Return n synthetic images that a small network can learn, for tests and quick runs.

    They are a smooth pattern for each class plus noise from `seed`. The patterns are the same for every seed, so two
    seeds give a train set and a test set.
    """
    patterns = torch.randn(classes, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    patterns = F.interpolate(patterns, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n)[torch.randperm(n, generator=generator)] % classes  # classes as equal in size as possible
    noise = torch.randn(n, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    images = (128 + 50 * patterns[labels] + 25 * noise).clamp(0, 255).to(torch.uint8)
    return Images(images.to(device), labels.to(device))


# --------------------------------------------------------------------------------------- the data of a command line

def add_options(parser, made_up: bool = True) -> None:
    """Add --data and, with `made_up`, --holdout and --made-up, which select other images (see `chosen`)."""
    parser.add_argument("--data", type=some_path, metavar="DIR",
                        help="folder with CIFAR-100 (default: $CIFAR100_DIR, else a download to ./data.cifar100)")
    if made_up:
        parser.add_argument("--holdout", action="store_true",
                            help="train on 45,000 of the train images and test on the other 5,000")
        parser.add_argument("--made-up", type=number(int, 2, 10**6), metavar="N",
                            help="train on N synthetic images and test on a fifth as many (at least 100)")


def option_words(args) -> list[str]:
    """Return the options of `add_options` as words of another script's command line."""
    return [*(["--data", str(args.data)] if args.data else []), *["--holdout"] * args.holdout,
            *(["--made-up", str(args.made_up)] if args.made_up else [])]


FIRST_IMAGES = ("use only N of the test images: the first in the order of their SHA-256, which is the same for every "
                "copy of the data set, and mixes the classes")


def chosen(args, split: str, device="cpu") -> tuple[Images, str]:
    """Return (images, their name) of the split "train" or "test", as the options say.

    If args.images is set, only so many: the first in canonical order (see `load`).
    """
    if args.made_up:
        count, seed = (args.made_up, 0) if split == "train" else (max(100, args.made_up // 5), 1)
        data, name = made_up(count, seed, device=device), "made up"
    elif args.holdout:
        data, name = load(args.data, {"train": "fit", "test": "holdout"}[split], device), "hold-out"
    else:
        data, name = load(args.data, split, device), split
    few = getattr(args, "images", None)
    return Images(data.images[:few], data.labels[:few]), name


# ------------------------------------------------------------------------------------------------------ normalise

# Close to the data set's statistics (means 129.3 124.1 112.4, standard deviations 68.2 65.4 70.4; the BatchNorm after
# the stem absorbs the difference). Every normalised pixel is exactly a signed 8-bit code times 2^-6, so quantizing the
# network's input loses nothing.
MEAN, STD = 128, 64


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Return (pixel - 128) / 64 of uint8 [N, 3, 32, 32], as float32: multiples of 1/64 from -2 to 127/64."""
    return images.float().sub_(MEAN).mul_(1 / STD)


# ----------------------------------------------------------------------------------------------------------- draws

PAD = 4
OPS = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
       "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize")
(IDENTITY, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE, BRIGHTNESS, COLOR, CONTRAST,
 SHARPNESS, POSTERIZE, SOLARIZE, AUTO_CONTRAST, EQUALIZE) = range(len(OPS))
BINS = 31


def magnitude_table() -> torch.Tensor:
    """Return the 31 strengths of each operation, from none to full: float32 [14, 31] (TrivialAugment, wide).

    Units: shears in pixels per pixel, translations in pixels, rotation in degrees, Brightness to Sharpness as a change
    of the blending factor 1, Posterize in bits that are kept, Solarize as a threshold.
    """
    table = torch.zeros(len(OPS), BINS)
    table[[SHEAR_X, SHEAR_Y, BRIGHTNESS, COLOR, CONTRAST, SHARPNESS]] = torch.linspace(0, 0.99, BINS)
    table[[TRANSLATE_X, TRANSLATE_Y]] = torch.linspace(0, 32, BINS)
    table[ROTATE] = torch.linspace(0, 135, BINS)
    table[POSTERIZE] = 8 - (torch.arange(BINS) / ((BINS - 1) / 6)).round()
    table[SOLARIZE] = torch.linspace(255, 0, BINS)
    return table


MAGNITUDES = magnitude_table()
MIXINGS = ("none", "mixup", "cutmix", "both")


@dataclasses.dataclass(frozen=True)
class Draws:
    """Hold the random parameters with which `augment` changes each of `count` images.

    Each field is a tensor with one row per image, or None if that step is off. `draws[a:b]` are the parameters of the
    images a to b - 1 of the batch.
    """
    count: int
    top: torch.Tensor | None = None  # int64 [N], 0 to 8: the crop's corner in the image padded by 4
    left: torch.Tensor | None = None
    flip: torch.Tensor | None = None  # bool [N]
    op: torch.Tensor | None = None  # int64 [N]: an index in OPS
    magnitude: torch.Tensor | None = None  # float32 [N], signed
    lam: torch.Tensor | None = None  # float32 [N]: weight of the image's own label; the partner's has 1 - lam
    weight: torch.Tensor | None = None  # float32 [N]: weight of the image's own pixels outside the box
    box: torch.Tensor | None = None  # int64 [N, 4]: top, bottom, left, right of the box with the partner's pixels

    def __len__(self):
        return self.count

    def __getitem__(self, part: slice) -> "Draws":
        start, stop, step = part.indices(self.count)
        if step != 1 or self.lam is not None and (start % 2 or stop % 2 and stop != self.count):
            raise ValueError(f"draws[{start}:{stop}:{step}] would separate an image from its mixing partner")
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "count"}
        return Draws(max(0, stop - start), **{k: None if v is None else v[start:stop] for k, v in tensors.items()})


def draw(n: int, generator: torch.Generator, crop: bool = True, trivial: bool = False, mixing: str = "none",
         mixup_alpha: float = 0.3, cutmix_alpha: float = 1.0, mix_probability: float = 1.0) -> Draws:
    """Draw independent augmentation parameters for each of n images, on the generator's device.

    crop: random crop and flip. trivial: TrivialAugment. mixing: none, mixup, cutmix, or both (either with probability
    1/2 for each image). An image is mixed with `mix_probability`, with a share drawn from Beta(alpha, alpha). Raises
    BadInput for an unknown mixing and an impossible alpha or probability.

    Prefer a generator on the CPU, even for CUDA training: the draws are then the same on both, and `trivial_augment`
    can assign images to operations without waiting for the GPU.
    """
    if mixing not in MIXINGS:
        raise BadInput(f"mixing {mixing!r} is none of {', '.join(MIXINGS)}")
    if not (0.01 <= mixup_alpha < math.inf and 0.01 <= cutmix_alpha < math.inf):  # below, even float64 underflows
        raise BadInput(f"mixup alpha {mixup_alpha} and CutMix alpha {cutmix_alpha} must be 0.01 or more")
    if not 0 <= mix_probability <= 1:
        raise BadInput(f"mixing probability {mix_probability} is not between 0 and 1")
    device, drawn = generator.device, {}

    def integers(below, *shape):
        return torch.randint(below, (n, *shape), generator=generator, device=device)

    def beta(alpha):
        # torch.distributions.Beta calls this too, but takes no generator. float64: small alphas give values near 0, 1.
        shape = torch.full((n, 2), alpha, dtype=torch.float64, device=device)
        return torch._sample_dirichlet(shape, generator)[:, 0]

    if crop:
        drawn |= {"top": integers(2 * PAD + 1), "left": integers(2 * PAD + 1), "flip": integers(2).bool()}
    if trivial:
        op = integers(len(OPS))
        sign = torch.where(op < POSTERIZE, 1 - 2 * integers(2), 1)  # operations from Posterize on have no direction
        drawn |= {"op": op, "magnitude": MAGNITUDES.to(device)[op, integers(BINS)] * sign}
    if mixing != "none":
        cut = integers(2).bool() if mixing == "both" else torch.full((n,), mixing == "cutmix", device=device)
        mixed = torch.rand(n, generator=generator, device=device) < mix_probability
        lam = torch.where(cut, beta(cutmix_alpha), beta(mixup_alpha)).where(mixed, 1.0)
        # CutMix (Yun et al. 2019): a box with the share 1 - lam of the area around a random pixel, clipped at the
        # border; lam is then recomputed from the clipped box. Without CutMix the box is empty.
        half = torch.where(cut, 0.5 * (1 - lam).sqrt() * IMAGE_SIZE, 0.0).long()[:, None]
        centre = integers(IMAGE_SIZE, 2)
        low, high = (centre - half).clamp(min=0), (centre + half).clamp(max=IMAGE_SIZE)
        kept = 1 - (high - low).prod(1) / IMAGE_SIZE**2
        drawn |= {"lam": torch.where(cut, kept, lam).float(), "weight": torch.where(cut, 1.0, lam).float(),
                  "box": torch.stack((low[:, 0], high[:, 0], low[:, 1], high[:, 1]), 1)}
    return Draws(n, **drawn)


def epoch_order(n: int, generator: torch.Generator) -> torch.Tensor:
    """Return a random permutation of n images, int64 [n], on the generator's device."""
    return torch.randperm(n, generator=generator, device=generator.device)


# --------------------------------------------------------------------------------------------------------- augment

def augment(images: torch.Tensor, labels: torch.Tensor, draws: Draws):
    """Return a training batch: images cropped, flipped, TrivialAugmented, normalised and mixed by the given draws.

    images uint8 [N, 3, 32, 32], labels int64 [N] -> (x float32 [N, 3, 32, 32], labels [N], labels of the mixing
    partners [N], lam float32 [N]), all on the images' device. The loss of an image is
    lam * loss(label) + (1 - lam) * loss(partner's label).
    """
    if len(draws) != len(images):
        raise ValueError(f"{len(draws)} draws for {len(images)} images")
    images = trivial_augment(crop_flip(images, draws), draws)
    return mix(normalise(images), labels, draws)


def crop_flip(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Crop 32x32 pixels of each image padded with 4 black pixels, and flip some: uint8 [N, 3, 32, 32] -> the same."""
    if draws.top is None:
        return images
    top, left, flip = (t.to(images.device, non_blocking=True) for t in (draws.top, draws.left, draws.flip))
    pixel = torch.arange(IMAGE_SIZE, device=images.device)
    rows = top[:, None] + pixel
    columns = left[:, None] + torch.where(flip[:, None], pixel.flip(0), pixel)
    return pick(F.pad(images, [PAD] * 4), rows[:, :, None], columns[:, None, :])


def pick(images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Gather pixels, [N, C, H, W] -> [N, C, 32, 32]: pixel (y, x) of image n is that at rows, columns[n, y, x]."""
    index = (rows * images.shape[3] + columns).flatten(1)[:, None]
    picked = images.flatten(2).gather(2, index.expand(-1, images.shape[1], -1))
    return picked.unflatten(2, (IMAGE_SIZE, IMAGE_SIZE))


def trivial_augment(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Apply one operation with its own strength to each image: uint8 [N, 3, 32, 32] -> the same.

    Müller and Hutter, "TrivialAugment", ICCV 2021. Operations and ranges are those of torchvision's TrivialAugmentWide
    (31 strengths, nearest pixel, black outside). The operations but Identity form three families, and each family
    processes its images at once. The lists of images are made on the draws' device: if that is the CPU, nothing waits
    for the GPU.
    """
    if draws.op is None:
        return images
    out = images.clone()
    families = (warp, SHEAR_X, ROTATE), (blend, BRIGHTNESS, SHARPNESS), (relevel, POSTERIZE, EQUALIZE)
    for family, first, last in families:
        mine = ((draws.op >= first) & (draws.op <= last)).nonzero().squeeze(1)
        if len(mine):
            mine, op, magnitude = (t.to(images.device, non_blocking=True)
                                   for t in (mine, draws.op[mine], draws.magnitude[mine]))
            out[mine] = family(images[mine], op[:, None, None], magnitude[:, None, None])
    return out


# The families take images uint8 [N, 3, 32, 32], op and magnitude [N, 1, 1], and return the changed images.


def warp(images, op, magnitude):
    """Apply ShearX, ShearY, TranslateX, TranslateY or Rotate, as one affine map of pixel positions per image."""
    def only(wanted, value):
        return torch.where(op == wanted, value, 0.0)

    centre = (IMAGE_SIZE - 1) / 2
    x = torch.arange(IMAGE_SIZE, device=images.device) - centre  # relative to the centre of rotation
    y = x[:, None]
    angle = only(ROTATE, magnitude.deg2rad())
    shear_x, shear_y = only(SHEAR_X, magnitude), only(SHEAR_Y, magnitude)
    # Shears keep the image's top or left edge in place, 16 pixels from the centre. Translations are whole pixels.
    source_x = angle.cos() * x - angle.sin() * y + shear_x * (y + IMAGE_SIZE / 2) - only(TRANSLATE_X, magnitude.trunc())
    source_y = angle.sin() * x + angle.cos() * y + shear_y * (x + IMAGE_SIZE / 2) - only(TRANSLATE_Y, magnitude.trunc())
    columns, rows = (source_x + centre).round().long(), (source_y + centre).round().long()
    outside = (columns < 0) | (columns >= IMAGE_SIZE) | (rows < 0) | (rows >= IMAGE_SIZE)
    picked = pick(images, rows.clamp(0, IMAGE_SIZE - 1), columns.clamp(0, IMAGE_SIZE - 1))
    return picked.masked_fill_(outside[:, None], 0)


def blend(images, op, magnitude):
    """Apply Brightness, Color, Contrast or Sharpness: move away from (or towards) black, grey, mean grey or a blur."""
    op, magnitude = op[:, None], magnitude[:, None]  # [N, 1, 1, 1]
    x = images.float()
    grey = (0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]).floor_()
    # The blur weights a pixel's eight neighbours by 1/13 and the pixel itself by 5/13; border pixels stay unchanged.
    # It uses shifts instead of a convolution, because sums of whole numbers are exact under autocast too.
    rows = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
    square = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    blurred = x.clone()
    blurred[..., 1:-1, 1:-1] = ((square + 4 * x[..., 1:-1, 1:-1]) / 13).round_()
    plain = torch.where(op == COLOR, grey, 0.0)  # 0: Brightness
    plain = torch.where(op == CONTRAST, grey.mean((1, 2, 3), keepdim=True), plain)
    plain = torch.where(op == SHARPNESS, blurred, plain)
    return (x + magnitude * (x - plain)).clamp_(0, 255).to(torch.uint8)


def relevel(images, op, magnitude):
    """Apply Posterize, Solarize, AutoContrast or Equalize, by a table of 256 new levels per channel of each image."""
    pixels = images.flatten(2).long()
    level = torch.arange(256, device=images.device)
    low, high = pixels.amin(2, keepdim=True), pixels.amax(2, keepdim=True)
    flat = low == high

    posterized = level & -(2 ** (8 - magnitude.clamp(2, 8)).long())  # clamp: of other operations
    solarized = torch.where(level >= magnitude, 255 - level, level)
    stretched = ((level - low) / ((high - low).float() * (1 / 255)).masked_fill(flat, 1)).clamp(0, 255).long()
    stretched = torch.where(flat, level, stretched)

    # Equalize as in Pillow: a level's new value is the number of darker pixels divided by a 255th of the number of all
    # pixels that are not the brightest.
    count = torch.zeros(*pixels.shape[:2], 256, dtype=torch.long, device=images.device)
    count.scatter_add_(2, pixels, torch.ones_like(pixels))
    darker = count.cumsum(2) - count
    step = darker.gather(2, high) // 255
    equalized = ((darker + step // 2) // step.clamp(min=1)).clamp(0, 255)
    equalized = torch.where(step == 0, level, equalized)

    table = torch.where(op == POSTERIZE, posterized, solarized)
    table = torch.where(op == AUTO_CONTRAST, stretched, table)
    table = torch.where(op == EQUALIZE, equalized, table)
    return table.to(torch.uint8).gather(2, pixels).view_as(images)


def mix(x: torch.Tensor, labels: torch.Tensor, draws: Draws):
    """Mix each image with its neighbour (0 with 1, 2 with 3, ...) by mixup (Zhang et al. 2018) or CutMix.

    x float32 [N, C, 32, 32] and labels int64 [N] -> (mixed x, labels, labels of the partners, lam float32 [N]). The
    last image of an odd batch is its own partner. Batches are in random order, so a neighbour is as good as a random
    partner, and it is always in the same process.
    """
    if draws.lam is None:
        return x, labels, labels, torch.ones(len(x), device=x.device)
    lam, weight, box = (t.to(x.device, non_blocking=True) for t in (draws.lam, draws.weight, draws.box))
    partner = torch.arange(len(x), device=x.device) ^ 1
    partner.clamp_(max=len(x) - 1)
    pixel = torch.arange(IMAGE_SIZE, device=x.device)
    rows = (pixel >= box[:, 0:1]) & (pixel < box[:, 1:2])
    columns = (pixel >= box[:, 2:3]) & (pixel < box[:, 3:4])
    share = weight[:, None, None].masked_fill(rows[:, :, None] & columns[:, None, :], 0)
    return torch.lerp(x[partner], x, share[:, None]), labels, labels[partner], lam  # lerp is exact at both ends


def main(argv=None) -> int:
    parser = command_line(__doc__)
    add_options(parser, made_up=False)
    folder = find(parser.parse_args(argv).data)
    print(f"CIFAR-100 in {folder}")
    for split in COUNT:
        data = load(folder, split)
        check = "the published file" if file_md5(folder / split) == MD5[split] else "the published images, reordered"
        print(f"{split:<5} {len(data):,} images, {check}, fingerprint {FINGERPRINT[split]}")
    return 0


if __name__ == "__main__":
    run_script(main)
