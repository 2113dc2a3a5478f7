"""Load teachers for distillation: our own checkpoints, or KAIST AI's (ver2, 3rd in the challenge).

    python -m training.teachers [--data FOLDER]     finds or downloads KAIST's four networks, prints their accuracy

KAIST's networks are from the repository Kthyeon/micronet_neurips_challenge, MIT licence (Copyright (c) 2019 Kthyeon).
They were trained on CIFAR-100's train set alone, so a network that is distilled from them has seen no other images. But
their authors chose the epoch by test accuracy, and a result that is distilled from them has to say so. The files are
taken from --folder, else from the environment variable TEACHERS_DIR, else ./data.teachers. If the first two are not
given, they are downloaded to the last.

A teacher takes the same images as the student, always of 32x32 pixels, in the normalisation that it was trained with:
ours (cifar100.normalise), KAIST's, or for one from elsewhere what quantize.py --normalise says.
"""
import os
import tempfile
from pathlib import Path

if __name__ == "__main__":
    import compressed.interrupt  # noqa: F401

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from compressed import cifar100, environment, networks, threads
from compressed.cifar100 import CIFAR100, DataSet
from compressed.claims import claim_path
from compressed.command_line import command_line, run_script, say_once, some_path
from compressed.datasets import check_same
from compressed.errors import BadInput, refused
from compressed.evaluation import logits
from compressed.files import sha256
from compressed.graph import normalised_convolutions, prepare_if_possible
from compressed.kaist import load_micronet
from compressed.normalisation import Renormalised
from training.runs import record_next_to, warn_of_another_network

FOLDER = Path("data.teachers")
COMMIT = "fb41bbb"
URL = f"https://raw.githubusercontent.com/Kthyeon/micronet_neurips_challenge/{COMMIT}/Checkpoint_ver2/"
# file: SHA-256, and how many of the 10,000 test images are right in float32
KAIST = {
    "micronet_v2_pr_15.t7": ("94e62f31454e878f30cd1452e1b5c289712d0e03d44159ae63fe914f28c192b8", 8091),
    "micronet_v2_pr_30.t7": ("8fd49c2eb657f59ca5a6beae81492108269f55eb65f1bf5c70fe5204f6ca855e", 8108),
    "micronet_v2_pr_45.t7": ("11e8aa8aec8f30da327f5690fe63ef0878ea428ad0c284159fbfa6d470e18577", 8080),
    "micronet_v2_pr_60.t7": ("c578f599a064319ea704d592e926947276bd46c71083136afb71d36d3424114c", 8004)}
MEAN_OF_ALL = 8188  # correct predictions of the mean of all four networks' softmax


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """Fold BatchNorms into the convolutions that they follow, in place; return the model. Only for evaluation.

    If the forward pass cannot be followed, nothing is folded.
    """
    for conv_name, norm_name in (normalised_convolutions(model) or {}).items():
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.running_var is not None:
            model.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
            model.set_submodule(norm_name, nn.Identity())
    return model


def load(path, network: str | None = None, data_set: DataSet = CIFAR100, normalise=None) -> nn.Module:
    """Return the teacher in a checkpoint file, in eval mode, with its BatchNorms folded.

    A file with the suffix .t7 is one of KAIST's networks; if it does not exist and its name is in KAIST, it is taken
    from the folder of `find`. Any other file is read as the network of this specification or, if it does not fit, as
    the default network. normalise: the (means, deviations) of its input, as in normalisation.add_option; used only if
    neither a claim nor the options of a stage of its name are next to the file, which was then trained elsewhere.
    Raises BadInput if the teacher was not trained for the classes of the data set.
    """
    path = Path(path)
    theirs = path.suffix == ".t7"
    if theirs and data_set != CIFAR100 and data_set.digest:  # made-up images are labelled by chance anyway
        raise BadInput(f"--teacher {path}: KAIST's networks know the classes of CIFAR-100, not those of {data_set}; "
                       "give a checkpoint that was trained on the same data, or --teacher without a value for none")
    path = located(path)
    teacher, spec = (load_micronet(path), "") if theirs else ours(path, network or networks.DEFAULT, data_set.classes)
    teacher = fold_batchnorm(teacher)
    record = None if theirs else record_next_to(path)
    if record:
        check_same(data_set, record.get("data_set"), f"--teacher {path}")
        warn_of_another_network(path, spec)
    elif not theirs and not claim_path(path).is_file():
        how = "as --normalise says" if normalise else "as (pixel - 128) / 64, whatever it was trained with"
        say_once(f"{path}: no record of its training here, so this teacher takes images {how}")
        teacher = Renormalised(teacher, *normalise).eval() if normalise else teacher
    return teacher.requires_grad_(False)


def load_all(paths, network: str, data_set: DataSet, normalise=None, device="cpu") -> list[nn.Module]:
    """Return the teachers in several checkpoint files, on a device, channels-last; the other arguments: see `load`."""
    return [load(path, network, data_set, normalise).to(device, memory_format=torch.channels_last) for path in paths]


def ours(path, network: str, classes: int) -> tuple[nn.Module, str]:
    """Return the network of a checkpoint, and its specification: that given or, if keys or shapes do not fit, the
    default.
    """
    try:
        return prepare_if_possible(networks.load_checkpoint(path, network, classes, hint=False)), network
    except BadInput as error:
        if network == networks.DEFAULT or "classes, expected" in str(error) or not Path(path).is_file():
            raise BadInput(f"--teacher {error}") from error
    try:
        return ours(path, networks.DEFAULT, classes)
    except BadInput as error:
        raise BadInput(f"{error}; it is no network of {network} either") from error


# ---------------------------------------------------------------------------------------------- find and download

def located(path: Path) -> Path:
    """Return the path of a teacher's file; a name of KAIST's that is not there is looked for in `find`'s folder."""
    if path.name not in KAIST:
        return path
    return checked(path) if path.is_file() else find() / path.name


def checked(path: Path) -> Path:
    """Return the path of one of KAIST's files. Raises BadInput if it is not the published one."""
    if sha256(path) != KAIST[path.name][0]:
        again = "remove it, and it is downloaded again" if path.parent == FOLDER else "replace it"
        raise BadInput(f"{path}: its SHA-256 is not the published file's: damaged, or another network; {again}")
    return path


def file_digests(paths) -> list[str | None]:
    """Return the SHA-256 of each teacher's file: of KAIST's the published one; None where there is no file."""
    return [KAIST[path.name][0] if path.name in KAIST else sha256(path) if path.is_file() else None
            for path in map(Path, paths)]


def find(folder=None) -> Path:
    """Return the folder of KAIST's four files: `folder`, else TEACHERS_DIR, else ./data.teachers.

    Files that ./data.teachers lacks are downloaded. Raises BadInput if one of the first two is given and lacks a file,
    if a download fails, or if a file is not the published one.
    """
    given = folder or environment.folder("TEACHERS_DIR")
    start = Path(given or FOLDER)
    for name in KAIST:
        if not (start / name).is_file():
            if given:
                raise BadInput(f"{start} ({'--folder' if folder else 'TEACHERS_DIR'}) holds no {name}")
            remedy = "; point at a local folder with TEACHERS_DIR"
            with refused(f"cannot put KAIST AI's networks into {start}", remedy, OSError):
                start.mkdir(exist_ok=True)
                scratch = tempfile.TemporaryDirectory(dir=start)  # another process may download, too
            with scratch, refused(f"cannot download {URL + name}", remedy):
                cifar100.fetch(URL + name, Path(scratch.name, name), name)
                if sha256(Path(scratch.name, name)) != KAIST[name][0]:
                    raise ValueError("what arrived is cut short or another file, its SHA-256 differs")
                os.replace(Path(scratch.name, name), start / name)
        checked(start / name)
    return start


def main(argv=None) -> int:
    """Print the accuracies; return 0. Raises BadInput if one of them differs from the expected one."""
    parser = command_line(__doc__)
    parser.add_argument("--folder", type=some_path, metavar="DIR",
                        help="folder with the four files (default: $TEACHERS_DIR, else a download)")
    cifar100.add_option(parser)
    args = parser.parse_args(argv)
    threads.prepare()
    folder = find(args.folder)
    test = cifar100.load(args.data, "test")
    total, wrong = 0, []
    for name, (_, published) in KAIST.items():
        probabilities = logits(load(folder / name).to(memory_format=torch.channels_last), test.images).softmax(1)
        correct = int((probabilities.argmax(1) == test.labels).sum())
        total = total + probabilities
        print(f"{name}: {correct:,} of {len(test):,} (expected {published:,})", flush=True)
        wrong += [name] * (abs(correct - published) > 5)
    correct = int((total.argmax(1) == test.labels).sum())
    print(f"mean of all four: {correct:,} of {len(test):,} (expected {MEAN_OF_ALL:,})")
    wrong += ["the mean"] * (abs(correct - MEAN_OF_ALL) > 5)
    if wrong:
        raise BadInput(f"{', '.join(wrong)}: the accuracy differs from the expected one")
    return 0


if __name__ == "__main__":
    run_script(main)
