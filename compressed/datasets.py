"""Load the images that a command line selects: CIFAR-100, CIFAR-10, an .npz file, or made-up images.

--data takes
    a folder with CIFAR-100: the files train and test                                      (see cifar100.py)
    a folder with CIFAR-10: the files data_batch_1 to data_batch_5 and test_batch
    a file F.npz (numpy.savez) with the arrays
        train_images, test_images   uint8 [N, 32, 32, 3], RGB from 0 to 255
        train_labels, test_labels   integers [N], from 0 to the number of classes - 1
A folder may also be the parent of the published folder, cifar-100-python or cifar-10-batches-py; where both are there,
it means CIFAR-100. The number of classes is that of the data. As with CIFAR-100, images are in the order of their
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
from compressed.graph import read_graph

CIFAR10 = "cifar-10-batches-py"  # the name of the folder inside the published archive
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
MOST_CLASSES = 2**16 - 1  # what a claim and a packed file can state


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


def chosen(args, split: str, device="cpu", network: nn.Module | None = None,
           most: int | None = None) -> tuple[Images, str]:
    """Return (images, their name) of the split "train" or "test", as the options say.

    The name is "test", "train", "hold-out" or "made up"; the data set's name goes before it unless that is CIFAR-100.
    network: BadInput if this prepared network (see graph.prepare) has another number of classes. most: the number of
    images, the first in canonical order; None: all.
    """
    classes = None if network is None else read_graph(network).points[-1].shape[0]
    if args.made_up and args.data:
        raise BadInput("--made-up and --data exclude each other: give one of them")
    misfit = "the network has {} outputs, and the data {} classes: give the --data that it was trained on, or a " \
             "checkpoint that was trained on these"
    if classes not in (None, cifar100.CLASSES) and not args.made_up and args.data is None:  # before a download
        raise BadInput(misfit.format(classes, cifar100.CLASSES))
    if args.made_up:
        count, seed = (args.made_up, 0) if split == "train" else (max(100, args.made_up // 5), 1)
        data, name = cifar100.made_up(count, seed, classes or cifar100.CLASSES, device), "made up"
    elif args.holdout:
        data, name = load(args.data, {"train": "fit", "test": "holdout"}[split], device), "hold-out"
    else:
        data, name = load(args.data, split, device), split
    if classes not in (None, data.data_set.classes):
        raise BadInput(misfit.format(classes, data.data_set.classes))
    if data.data_set.digest and data.data_set != cifar100.CIFAR100:
        name = f"{data.data_set.name} {name}"
    return dataclasses.replace(data, images=data.images[:most], labels=data.labels[:most]), name


def check_same(data_set: DataSet, theirs: dict | None, what) -> None:
    """Raise BadInput if `what` was made with another data set than this one. theirs: its fields in a record, or None.

    Made-up images, which have no digest, pass.
    """
    if theirs and data_set.digest and theirs.get("digest") not in (None, data_set.digest):
        raise BadInput(f"{what} was made with {DataSet(**theirs)}, and these images are of {data_set}: give its --data")


# ---- Data sets -----------------------------------------------------------------------------------

def load(path=None, split: str = "train", device="cpu") -> Images:
    """Return the images of a split (train, test, fit, holdout) of the data set in `path` (see this module's docstring).

    Raises BadInput if there is no data set, or if it is damaged; only CIFAR-100 is checked to the last pixel.
    """
    path = None if path is None else Path(path)
    if path is None or path.is_dir() and cifar100.holding(path, cifar100.SET, cifar100.COUNT):
        return cifar100.load(path, split, device)
    if path.is_file():
        name, classes, parts = path.name, None, read_npz(path)
    elif folder := cifar100.holding(path, CIFAR10, sum(BATCHES.values(), [])):
        name, classes, parts = "CIFAR-10", 10, {}
        for part, files in BATCHES.items():
            images, labels = zip(*(cifar100.read(folder / file, "labels", 10) for file in files))
            parts[part] = np.concatenate(images), np.concatenate(labels)
    elif not path.exists():
        raise BadInput(f"{path} (--data): no such file or folder")
    else:
        raise BadInput(f"{path} (--data) holds no CIFAR-100 (files train and test) and no CIFAR-10 (data_batch_1 to "
                       "data_batch_5, test_batch); other images belong into an .npz file (see compressed/datasets.py)")
    keys = {part: digests(*arrays) for part, arrays in parts.items()}
    data_set = DataSet.of(name, classes or int(parts["train"][1].max()) + 1,
                          {part: fingerprint(each) for part, each in keys.items()})
    if data_set == dataclasses.replace(cifar100.CIFAR100, name=name):
        data_set = cifar100.CIFAR100  # its images, in a file of another kind
    elif name == cifar100.CIFAR100.name or name == "CIFAR-10" and path.is_file():
        data_set = dataclasses.replace(data_set, name=f"{name} (other images)")
    part = cifar100.FILE_OF[split]
    found = cifar100.select(*parts[part], keys[part], split, data_set, device)
    if not len(found):
        raise BadInput(f"{path}: too few train images for a hold-out, which takes a tenth of every class")
    return found


def read_npz(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return {"train" or "test": (images uint8 [N, 3, 32, 32], labels int64 [N])} of an .npz file.

    Executes nothing in the file. Raises BadInput if an array is not as this module's docstring says.
    """
    names = [f"{part}_{kind}" for part in BATCHES for kind in ("images", "labels")]
    try:
        with np.load(path, allow_pickle=False) as content:
            train_images, train_labels, test_images, test_labels = (content[name] for name in names)
    except KeyError as error:
        raise BadInput(f"{path}: {str(error).strip(chr(39))}; expected the arrays {', '.join(names)}") from error
    except Exception as error:  # not in numpy's words, which advise to allow pickles
        raise BadInput(f"{path}: no .npz file with the plain arrays {', '.join(names)}, or damaged "
                       f"({type(error).__name__})") from error
    found = {"train": (train_images, train_labels), "test": (test_images, test_labels)}
    for part, (images, labels) in found.items():
        if images.dtype != np.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3) or not images.size:
            raise BadInput(f"{path}: {part}_images is {images.dtype} {list(images.shape)}, expected uint8 [N, "
                           f"{IMAGE_SIZE}, {IMAGE_SIZE}, 3]: pixels of 0 to 255, scaled to that size, three channels, "
                           "channels last")
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            raise BadInput(f"{path}: {part}_labels is {labels.dtype} {list(labels.shape)}, expected {len(images)} "
                           "integers, one for each image")
    classes = set(train_labels.tolist())
    if classes != set(range(len(classes))) or not classes.issuperset(test_labels.tolist()) \
            or not 2 <= len(classes) <= MOST_CLASSES:
        raise BadInput(f"{path}: expected labels from 0 to the number of classes - 1, two classes or more, and images "
                       "of each class in train_images")
    return {part: (np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels.astype(np.int64))
            for part, (images, labels) in found.items()}
