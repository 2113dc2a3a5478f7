"""Load the images that a command line selects: CIFAR-100, CIFAR-10, an .npz file, or made-up images.

--data takes
    a folder with CIFAR-100: the files train and test                                      (see cifar100.py)
    a folder with CIFAR-10: the files data_batch_1 to data_batch_5 and test_batch
    a file F.npz (numpy.savez) with the arrays
        train_images, test_images   uint8 [N, 32, 32, 3], RGB from 0 to 255
        train_labels, test_labels   integers [N], from 0 to the number of classes - 1
A folder may also be the parent of the published folder, cifar-100-python or cifar-10-batches-py; where both are there,
it means CIFAR-100. The number of classes is that of the data. As with CIFAR-100, images stand in the order of their
digests, and a hold-out is a tenth of the train images of every class.
"""
import dataclasses
from pathlib import Path

import numpy as np
from torch import nn

from compressed import cifar100
from compressed.cifar100 import IMAGE_SIZE, DataSet, Images, digests, fingerprint
from compressed.command_line import number, some_path
from compressed.errors import BadInput
from compressed.graph import read

CIFAR10 = "cifar-10-batches-py"  # the name of the folder inside the published archive
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
MOST_CLASSES = 2**16 - 1  # what a claim and a packed file can state
FIRST_IMAGES = ("use only N of the test images: the first in the order of their SHA-256, which is the same for every "
                "copy of the data set, and mixes the classes")


# ---- The options of a command line ---------------------------------------------------------------

def add_options(parser) -> None:
    """Add --data, --holdout and --made-up, which select images (see `chosen`)."""
    parser.add_argument("--data", type=some_path, metavar="PATH",
                        help="folder with CIFAR-100 or CIFAR-10, or F.npz with uint8 train_images and test_images "
                             "[N, 32, 32, 3], train_labels and test_labels [N] (default: CIFAR-100 in $CIFAR100_DIR, "
                             "else a download to ./data.cifar100)")
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument("--holdout", action="store_true",
                       help="train on nine tenths of the train images, and test on the others (CIFAR-100: 5,000)")
    alone.add_argument("--made-up", type=number(int, 2, 10**6), metavar="N",
                       help="train on N synthetic images and test on a fifth as many (at least 100)")


def option_words(args) -> list[str]:
    """Return the options of `add_options` as words of another script's command line."""
    return [*(["--data", str(args.data)] if args.data else []), *["--holdout"] * args.holdout,
            *(["--made-up", str(args.made_up)] if args.made_up else [])]


def chosen(args, split: str, device="cpu", network: nn.Module | None = None) -> tuple[Images, str]:
    """Return (images, their name) of the split "train" or "test", as the options say.

    The name is "test", "train", "hold-out" or "made up"; that of a data set other than CIFAR-100 stands before it.
    network: if there is one already (see graph.prepare), BadInput if it is of another number of classes. If args.images
    is set, only so many images: the first in canonical order.
    """
    classes = None if network is None else read(network).points[-1].shape[0]
    if args.made_up:
        count, seed = (args.made_up, 0) if split == "train" else (max(100, args.made_up // 5), 1)
        data, name = cifar100.made_up(count, seed, classes or cifar100.CLASSES, device), "made up"
    elif args.holdout:
        data, name = load(args.data, {"train": "fit", "test": "holdout"}[split], device), "hold-out"
    else:
        data, name = load(args.data, split, device), split
    if classes not in (None, data.data_set.classes):
        raise BadInput(f"the network has {classes} outputs, and the data {data.data_set.classes} classes: give the "
                       "--data that it was trained on, or a checkpoint that was trained on these")
    if data.data_set.digest and data.data_set != cifar100.CIFAR100:
        name = f"{data.data_set.name} {name}"
    few = getattr(args, "images", None)
    return dataclasses.replace(data, images=data.images[:few], labels=data.labels[:few]), name


# ---- Data sets -----------------------------------------------------------------------------------

def load(path=None, split: str = "train", device="cpu") -> Images:
    """Return the images of a split (train, test, fit, holdout) of the data set in `path`, see this file's head.

    Raises BadInput if there is no data set, or if it is damaged.
    """
    path = None if path is None else Path(path)
    if path is None or path.is_dir() and cifar100.holding(path, cifar100.SET, cifar100.COUNT):
        return cifar100.load(path, split, device)
    if path.is_file():
        name, classes, parts = path.name, None, read_npz(path)
    elif folder := cifar100.holding(path, CIFAR10, sum(BATCHES.values(), [])):
        name, classes, parts = "CIFAR-10", 10, read_cifar10(folder)
    else:
        raise BadInput(f"{path} (--data) holds no CIFAR-100 (files train and test) and no CIFAR-10 (data_batch_1 to "
                       "data_batch_5, test_batch), and is no .npz file")
    keys = {part: digests(*arrays) for part, arrays in parts.items()}
    data_set = DataSet.of(name, classes or int(parts["train"][1].max()) + 1,
                          {part: fingerprint(each) for part, each in keys.items()})
    part = cifar100.file_of(split)
    found = cifar100.select(*parts[part], keys[part], split, data_set, device)
    if not len(found):
        raise BadInput(f"{path}: too few train images for a hold-out, which takes a tenth of every class")
    return found


def read_cifar10(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return {"train" or "test": (images uint8 [N, 3, 32, 32], labels int64 [N])} of the files of CIFAR-10."""
    found = {}
    for part, files in BATCHES.items():
        images, labels = zip(*(cifar100.read(folder / file, "labels", 10) for file in files))
        found[part] = np.concatenate(images), np.concatenate(labels)
    return found


def read_npz(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return {"train" or "test": (images uint8 [N, 3, 32, 32], labels int64 [N])} of an .npz file.

    Executes nothing in the file. Raises BadInput for whatever is not as this file's head says.
    """
    names = [f"{part}_{kind}" for part in ("train", "test") for kind in ("images", "labels")]
    try:
        with np.load(path, allow_pickle=False) as content:
            missing = [name for name in names if name not in content.files]
            arrays = {} if missing else {name: content[name] for name in names}
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror or 'no .npz file, or damaged'})") from error
    except Exception as error:  # numpy's own words advise to allow pickles
        raise BadInput(f"{path}: no .npz file of plain arrays, or damaged ({type(error).__name__})") from error
    if missing:
        raise BadInput(f"{path}: has no array {missing[0]}; expected {', '.join(names)}")
    for name in names:
        if problem := (_image_problem if name.endswith("images") else _label_problem)(arrays[name]):
            raise BadInput(f"{path}: {name} {problem}")
    for part in ("train", "test"):
        images, labels = len(arrays[f"{part}_images"]), len(arrays[f"{part}_labels"])
        if images != labels:
            raise BadInput(f"{path}: {images:,} {part}_images have {labels:,} {part}_labels")
    known = np.unique(arrays["train_labels"])
    lacking = sorted(set(range(int(known[-1]) + 1)) - set(known.tolist()))
    unseen = sorted(set(np.unique(arrays["test_labels"]).tolist()) - set(known.tolist()))
    if lacking or unseen or len(known) < 2:
        raise BadInput(f"{path}: train_labels has no image of class {(lacking + unseen + [1])[0]}; expected classes "
                       "numbered from 0 without gaps, two or more")
    return {part: (np.ascontiguousarray(arrays[f"{part}_images"].transpose(0, 3, 1, 2)),
                   arrays[f"{part}_labels"].astype(np.int64)) for part in ("train", "test")}


def _image_problem(images: np.ndarray) -> str | None:
    size, wanted = IMAGE_SIZE, f"uint8 [N, {IMAGE_SIZE}, {IMAGE_SIZE}, 3]"
    if images.dtype == np.uint8 and images.ndim == 4 and len(images) and images.shape[1:] == (size, size, 3):
        return None
    found = f"is {images.dtype} {list(images.shape)}, expected {wanted}"
    if images.ndim == 4 and images.shape[1] == 3:
        return f"{found}: put the channels last with .transpose(0, 2, 3, 1)"
    if images.ndim == 4 and images.shape[3] == 3 and images.shape[1:3] != (size, size):
        return f"{found}: scale the images to {size}x{size} pixels"
    return found


def _label_problem(labels: np.ndarray) -> str | None:
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or not len(labels):
        return f"is {labels.dtype} {list(labels.shape)}, expected integers [N]"
    if labels.min() < 0 or labels.max() >= MOST_CLASSES:
        return f"holds labels from {labels.min()} to {labels.max()}, expected 0 to the number of classes - 1"
    return None
