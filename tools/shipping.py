"""Find the files of a shipped network, decide whether another network is better, and replace them all at once.

The checkpoint is in float32. Its weights and scales would fit float16, but that saves only 13% in git, and whoever
loads it would get tensors of two types. Only record/*.pt is in float16.
"""
import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from compressed import claims
from compressed.checkpoints import CHECKPOINT, SHIPPED
from compressed.command_line import run_python
from compressed.errors import BadInput, refused
from compressed.files import load_json, lock_folder
from compressed.threads import stop_noted
from training.runs import stage_of

ROOT = SHIPPED.parent
CLAIM = claims.claim_path(CHECKPOINT).name
# the files of record/ that come from the run folder of the shipped network; the others stay when it is replaced
OF_A_RUN = re.compile(r"(pretrain|rew|masked|quantized)(-\d+)?\.(jsonl|options\.json)|masked\.pt|recipe\.toml")
BASELINE = ("dense.pt", "dense.jsonl", "dense.options.json", "dense.tested.json")  # of record/, see tools.baseline


def in_folders(root: Path) -> list[Path]:
    """Return the checkpoints that are shipped into folders directly under `root`, such as kaist/."""
    return sorted(root.glob(f"*/{CHECKPOINT}"))


def freed(record: Path) -> bool:
    """Return True if the dense baseline in a record/ folder is the shipped network, trained further without its mask.

    It is then of no use for the next network that is shipped; a dense network from scratch is, whose --start, if it had
    one, was a dense stage.
    """
    options = record / "dense.options.json"
    start = load_json(options).get("options", {}).get("start") if options.is_file() else None
    return start is not None and stage_of(start) not in ("pretrain", "dense")


def of_a_run(record: Path) -> list[Path]:
    """Return the files of a record/ folder that belong to the shipped network's run; none if there is no folder."""
    baseline = BASELINE if freed(record) else ()
    return sorted(path for path in record.glob("*") if path.is_file() and (
        OF_A_RUN.fullmatch(path.name) or path.name in baseline))


def shipped_accuracy(folder: Path) -> dict | None:
    """Return {"data", "correct", "images", ...} of the network that is shipped in a folder, or None if there is none.

    "digest" is that of the data set, if known.
    """
    if not (folder / CLAIM).is_file():
        return None
    claim = claims.read(folder / CLAIM)
    return claim["accuracy"] | {"digest": claim.get("data_set", {}).get("digest")} if "accuracy" in claim else None


def objection(accuracy: dict, shipped: dict | None) -> str | None:
    """Return why a network should not replace the shipped one, in words; None if it is better on the same test set."""
    if accuracy["data"].split()[-1] != "test":
        return f"its accuracy was measured on {accuracy['data']} images and not on the test set"
    key = "digest" if shipped and accuracy.get("digest") and shipped.get("digest") else "data"  # files are renamed
    if shipped and [shipped.get(name) for name in (key, "images")] != [accuracy[name] for name in (key, "images")]:
        return "the accuracy of the shipped network was measured on other images"
    if shipped and accuracy["correct"] <= shipped["correct"]:
        return (f"{accuracy['correct']} of {accuracy['images']} test images are classified correctly, by the shipped "
                f"network {shipped['correct']}")
    return None


def run(*words, stdout=None) -> None:
    """Run a script or a module, as `run_python` does. Raises BadInput if it fails."""
    if status := run_python(*words, stdout=stdout):
        name = Path(words[words[0] == "-m"]).name
        raise BadInput(f"{name} ended with status {status}, see above; nothing was replaced")


@contextlib.contextmanager
def staging(target: Path):
    """Yield a new empty folder inside `target`, on its file system; it is removed at the end of the block.

    The folder is locked: another process cannot ship into it meanwhile. Raises BadInput if it cannot be written.
    """
    with refused(f"{target}: cannot be written", "; give another folder", OSError):
        target.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=target, prefix="new.", suffix=".tmp")
    with temporary as folder, lock_folder(target):
        new = Path(folder, "new")
        new.mkdir()
        yield new


def install(new: Path, target: Path) -> None:
    """Move every file under `new` to its place under `target`, and remove other files of a run there: all or nothing.

    After an error, the old files are restored. Signals do not stop it; Ctrl-C ends the script afterwards. The
    checkpoint moves first and its claim last, so that testers.py detects a half-finished update by a process that was
    killed.
    """
    old, order = new.parent / "old", {CHECKPOINT: -1, CLAIM: 1}
    files = {path.relative_to(new) for path in new.rglob("*") if path.is_file()}
    obsolete = {path.relative_to(target) for path in of_a_run(target / "record")}
    changes = sorted(files | obsolete, key=lambda path: (order.get(str(path), 0), path))
    for path in changes:
        if (target / path).exists():
            (old / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(target / path, old / path)
    with stop_noted():
        try:
            for path in changes:
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                if (new / path).exists():
                    os.replace(new / path, os.path.realpath(target / path))  # a link stays one
                else:
                    (target / path).unlink(missing_ok=True)
        except BaseException:
            for path in changes:
                if path in files and not (new / path).exists():
                    os.replace(os.path.realpath(target / path), new / path)
                if (old / path).exists():
                    os.replace(old / path, os.path.realpath(target / path))
            raise
