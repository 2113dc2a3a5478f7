"""Find or download CIFAR-100, check it to the last pixel, and load it as uint8 tensors, like all other data sets.

    python -m compressed.cifar100 [--data FOLDER]      finds (or downloads) the data set, checks it, prints a summary

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. The data set is taken from --data, else from
the environment variable CIFAR100_DIR, else from ./data.cifar100, to which it is downloaded if the first two are not
given. Other data sets are read by datasets.py.
"""
import contextlib
import csv
import dataclasses
import hashlib
import os
import pickle
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
from compressed.command_line import command_line, progress_bar, run_script, some_path
from compressed.errors import BadInput, refused

CLASSES = 100
IMAGE_SIZE = 32
HOLDOUT = 10  # one in ten train images of each class is held out
FOLDER = Path("data.cifar100")
NEAR_DUPLICATES = Path(__file__).with_name("near_duplicates.csv")
SET = "cifar-100-python"  # the name of the folder inside the published archive
HOW_TO_POINT = "point at a local copy with --data FOLDER or CIFAR100_DIR=FOLDER"

# Address and MD5 sums: torchvision.datasets.CIFAR100. Fingerprints: see `digests`; they hold for any order.
URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
ARCHIVE_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
COUNT = {"train": 50_000, "test": 10_000}
FILE_OF = {"train": "train", "test": "test", "fit": "train", "holdout": "train"}  # the file that a split is part of
MD5 = {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}
FINGERPRINT = {"train": "6d2a03c47c105e4c34d3a2ff16c2803e8df0e5d6fa0c631e46663a327aeac573",
               "test": "381b7d98ce1e9b98232a8df0db0a22992654c39ff2433270656ab8ace5a45e65"}


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Name a data set, its number of classes, and a digest of all its images and labels; None if they are made up."""
    name: str
    classes: int
    digest: str | None

    @classmethod
    def of(cls, name: str, classes: int, fingerprints: dict[str, str]) -> "DataSet":
        """Return the data set whose train and test images have these fingerprints."""
        both = fingerprints["train"] + fingerprints["test"]
        return cls(name, classes, hashlib.sha256(both.encode()).hexdigest()[:16])

    def __str__(self):
        return f"{self.name} ({self.classes} classes{f', digest {self.digest}' if self.digest else ''})"


CIFAR100 = DataSet.of("CIFAR-100", CLASSES, FINGERPRINT)


@dataclasses.dataclass(frozen=True)
class Images:
    """Hold `images`, uint8 [N, 3, 32, 32] (RGB, 0 to 255), and their `labels`, int64 [N], on one device."""
    images: torch.Tensor
    labels: torch.Tensor
    data_set: DataSet = CIFAR100

    def __len__(self):
        return len(self.labels)


def find(folder=None) -> Path:
    """Return the folder that holds the files `train` and `test`: `folder`, else CIFAR100_DIR, else ./data.cifar100.

    Each may also name the parent of that folder. Downloads only if neither of the first two is given and
    ./data.cifar100 lacks the files. Raises BadInput if a given folder lacks them, or if the download fails.
    """
    given = folder or environment.folder("CIFAR100_DIR")
    start = Path(given or FOLDER)
    if found := holding(start, SET, COUNT):
        return found
    if given:
        origin = "--data" if folder else "CIFAR100_DIR"
        raise BadInput(f"{start} ({origin}) holds no CIFAR-100: no files train and test in it or in its {SET}/")
    return download(start)


def holding(folder: Path, inner: str, files) -> Path | None:
    """Return `folder`/`inner`, or else `folder`, if all these files are in it; None if they are in neither."""
    for candidate in (folder / inner, folder):
        if all(os.path.isfile(candidate / file) for file in files):
            return candidate
    return None


def download(folder: Path) -> Path:
    """Download the published archive, check its MD5, and unpack train, test and meta to `folder`/cifar-100-python.

    Works in a temporary folder next to `folder`, which is removed even after an error, so no partial file is left.
    Returns the folder of the files. Raises BadInput without a network or if the archive is not the published one.
    """
    place = Path(os.path.realpath(folder))  # next to where a link leads: files can be moved from there
    with refused(f"cannot put CIFAR-100 into {place}", f"; {HOW_TO_POINT}", OSError), \
            tempfile.TemporaryDirectory(dir=place.parent, prefix=f"{place.name}.", suffix=".tmp") as scratch:
        archive, unpacked = Path(scratch, "archive"), Path(scratch, "unpacked")
        with refused(f"cannot download CIFAR-100 from {URL}", f"; {HOW_TO_POINT}"):
            fetch(URL, archive, "CIFAR-100")
        if file_md5(archive) != ARCHIVE_MD5:
            raise BadInput(f"the archive from {URL} is cut short or another one (its MD5 differs); {HOW_TO_POINT}")
        (folder / SET).mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            for name in ("meta", "test", "train"):  # to known paths: the archive cannot choose where files go
                unpacked.write_bytes(tar.extractfile(f"{SET}/{name}").read())
                os.replace(unpacked, folder / SET / name)
    return folder / SET


def fetch(url: str, path: Path, name: str) -> None:
    """Download `url` to `path`; on a terminal, show a progress bar labelled `name`."""
    with urllib.request.urlopen(url, timeout=60) as response, open(path, "wb") as file:
        size = int(response.headers.get("Content-Length") or 0) or None
        with progress_bar(total=size, unit="B", unit_scale=True, desc=name) or contextlib.nullcontext() as bar:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                if bar is not None:
                    bar.update(len(chunk))


def file_md5(path) -> str:
    """Return the MD5 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


class ArraysOnly(pickle.Unpickler):
    """Unpickle only containers, numbers, strings and numpy arrays; raise for any other name, so that no code runs."""

    reconstruct = np.empty(0).__reduce__()[0]
    ALLOWED = {("numpy.core.multiarray", "_reconstruct"): reconstruct,  # numpy 1, which wrote the published files
               ("numpy._core.multiarray", "_reconstruct"): reconstruct,  # numpy 2
               ("numpy", "ndarray"): np.ndarray,
               ("numpy", "dtype"): np.dtype}

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which the published files do not")
        return self.ALLOWED[module, name]


def read(path, key: str = "fine_labels", classes: int = CLASSES, remedy: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Return (images uint8 [N, 3, 32, 32], labels int64 [N]) of a file of a CIFAR data set, in the file's order.

    key: where the file holds the labels. Does not check that the images are the published ones (`load` does), and
    executes no code in the file. Raises BadInput, with `remedy` at its end, if the file is damaged or is another kind
    of file.
    """
    with refused(f"{path}: cannot be read as a file of CIFAR-{classes}", remedy):  # a pickle can raise almost any error
        with open(path, "rb") as file:
            content = ArraysOnly(file, encoding="latin1").load()  # latin1: Python 2 wrote the published files
        data, labels = content["data"], content[key]
        if data.dtype != np.uint8 or data.shape != (len(labels), 3 * IMAGE_SIZE**2):
            raise ValueError(f"{data.dtype} pixels {list(data.shape)} for {len(labels)} labels, expected uint8 "
                             f"[{len(labels)}, {3 * IMAGE_SIZE**2}]")
        if not all(type(label) is int and 0 <= label < classes for label in labels):
            raise ValueError(f"labels that are not integers from 0 to {classes - 1}")
        return data.reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE), np.array(labels, np.int64)


def digests(images: np.ndarray, labels: np.ndarray) -> list[bytes]:
    """Return the SHA-256 of (label, 3072 CHW pixel bytes) of every image; a label below 256 is one byte, else two."""
    return [hashlib.sha256(label.to_bytes(1 if label < 256 else 2) + image.tobytes()).digest()
            for image, label in zip(images, labels.tolist())]


def fingerprint(digests: list[bytes]) -> str:
    """Return a hash of a set of images that does not depend on their order."""
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def select(images: np.ndarray, labels: np.ndarray, keys: list[bytes], split: str, data_set: DataSet, device) -> Images:
    """Return the images of a split in canonical order, on the device, from all images of its file and their digests.

    Canonical means sorted by digest: the same for every copy, and as good as random.
    """
    order = np.argsort(keys, kind="stable")
    if split in ("fit", "holdout"):
        by_class = (np.flatnonzero(labels[order] == label) for label in range(data_set.classes))
        held = np.concatenate([places[:len(places) // HOLDOUT] for places in by_class])
        held = np.isin(np.arange(len(order)), held)
        order = order[held if split == "holdout" else ~held]
    return Images(torch.from_numpy(images[order]).to(device), torch.from_numpy(labels[order]).to(device), data_set)


def load(folder=None, split: str = "train", device="cpu") -> Images:
    """Return the images of a split, in canonical order, on the device.

    "train" has 50,000 images and "test" 10,000; "fit" and "holdout" divide the train set into 45,000 and 5,000 images,
    with 50 images of each class in the holdout. Copies of the data set in another order give the same tensors. Raises
    BadInput if no data set is found (see `find`), or if it is not CIFAR-100 to the last pixel.
    """
    file = FILE_OF[split]
    path = find(folder) / file
    downloaded = not folder and not environment.folder("CIFAR100_DIR")
    remedy = f"; remove {path.parent}, and it is downloaded again" if downloaded else ""
    images, labels = read(path, remedy=remedy)
    keys = digests(images, labels)
    if fingerprint(keys) != FINGERPRINT[file]:
        raise BadInput(f"{path}: its {len(labels):,} images are not CIFAR-100's {COUNT[file]:,} {file} images{remedy}")
    return select(images, labels, keys, split, CIFAR100, device)


def near_duplicates(folder=None) -> torch.Tensor | None:
    """Return which test images, bool [N] in canonical order, have a near-duplicate in the train set; None if unknown.

    There are 891 of them, judged by people: Barz and Denzler, "Do We Train on Test Data? Purging CIFAR of
    Near-Duplicates", J. Imaging 2020 (ciFAIR). Their list has indices into the published file, so it cannot be used
    with a copy in another order, which has another MD5, or in a file of another kind.
    """
    if folder is not None and Path(folder).is_file():
        return None
    path = find(folder) / "test"
    if file_md5(path) != MD5["test"]:
        return None
    rows = [line for line in NEAR_DUPLICATES.read_text().splitlines() if not line.startswith("#")]
    listed = {int(row["test_index"]) for row in csv.DictReader(rows)}
    return torch.tensor([i in listed for i in np.argsort(digests(*read(path)), kind="stable")])


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
    return Images(images.to(device), labels.to(device), DataSet("made up", classes, None))


# Close to the data set's statistics (means 129.3 124.1 112.4, standard deviations 68.2 65.4 70.4; the BatchNorm after
# the stem absorbs the difference). Every normalised pixel is exactly a signed 8-bit code times 2^-6, so quantizing the
# network's input loses nothing.
MEAN, STD = 128, 64


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Return (pixel - 128) / 64 of uint8 [N, 3, 32, 32], as float32: multiples of 1/64 from -2 to 127/64."""
    return images.float().sub_(MEAN).mul_(1 / STD)


def add_option(parser) -> None:
    """Add --data to the parser of a script that takes CIFAR-100 alone; datasets.add_options is for all others."""
    parser.add_argument("--data", type=some_path, metavar="DIR",
                        help="folder with CIFAR-100 (default: $CIFAR100_DIR, else a download to ./data.cifar100)")


def main(argv=None) -> int:
    parser = command_line(__doc__)
    add_option(parser)
    folder = find(parser.parse_args(argv).data)
    print(f"CIFAR-100 in {folder}")
    for split in COUNT:
        data = load(folder, split)
        check = "the published file" if file_md5(folder / split) == MD5[split] else "the published images, reordered"
        print(f"{split:<5} {len(data):,} images, {check}, fingerprint {FINGERPRINT[split]}")
    return 0


if __name__ == "__main__":
    run_script(main)
