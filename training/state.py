"""Save and load the state of a stage in a folder, so that a run that was killed at any moment can be resumed."""
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
from pathlib import Path

import torch

from compressed.command_line import say_once
from compressed.errors import BadInput, refused
from compressed.files import load_record, save_record, save_tensors
from training.plan import constant_so_far

# Settings of where and how a stage is computed. A resume may change them. The result then differs by rounding, and with
# other `workers` also because each worker's share of a batch is normalised by its own statistics.
MACHINE = ("precision", "workers", "graphs")
# Settings of a stage's length. A resume may change them as long as the learning rate is still constant. The warm-up is
# a quarter of the epochs at most, so it may change with them.
LENGTH = ("epochs", "cooldown", "sizes", "warmup_epochs")
AGAIN = "--no-resume starts the stage again"


class State:
    """A state in a folder: one file per part (weights, average, optimizer, penalty, watch, masks) and state.json.

    state.json names the files that belong together, with their SHA-256, and holds a digest of itself. It is renamed
    into place after they are written. A file that it does not name was left by a killed process, and the next save
    removes it.

    settings (a dataclass) and others: all that decides the result. A state is resumed only if they are equal, except
    for those in MACHINE, and those in LENGTH as `load` says. Reading or removing a state needs no settings.
    """

    def __init__(self, folder: Path, settings=None, **others):
        everything = (dataclasses.asdict(settings) if settings else {}) | others
        self.folder, self.file = folder, folder / "state.json"
        self.settings = json.loads(json.dumps({key: value for key, value in everything.items() if key not in MACHINE}))

    def load(self, device, epoch_steps: int) -> tuple[dict, dict] | None:
        """Return (progress, {part: contents}), or None if there is no state. Raises BadInput for other settings.

        Those in LENGTH may differ if the learning rate was constant so far, by the saved settings and by the new ones.
        """
        if not self.file.is_file():
            return None
        record = self.record()
        theirs, step = record["settings"], record["progress"]["step"]
        changed = [key for key, value in self.settings.items() if theirs.get(key, value) != value]
        longer = set(changed) <= set(LENGTH)
        constant = all(constant_so_far(each, step, epoch_steps) for each in (theirs, self.settings))
        if "warmup_epochs" in changed:  # the learning rate must not fall back
            constant &= step >= epoch_steps * max(each["warmup_epochs"] for each in (theirs, self.settings))
        pairs = ", ".join(f"{key} {theirs[key]} -> {self.settings[key]}" for key in changed)
        if changed and longer and constant:
            say_once(f"{self.folder}: the stage goes on with another length ({pairs})")
        elif changed:
            raise BadInput(f"{self.folder} holds a run with other settings ({pairs}): give the same options to resume "
                           "it, or --no-resume to start it again, or another --run folder"
                           + "; its length may change only while the learning rate is constant" * longer)
        return record["progress"], {part: self.read(part, device) for part in record["files"]}

    def read(self, part: str, device="cpu") -> dict:
        """Return the contents of one part, such as "weights" or "average". Raises BadInput if missing or damaged.

        Another process may train the stage meanwhile: if it saves its next state, that one is read.
        """
        record = self.record()
        if part not in record["files"]:
            raise BadInput(f"{self.folder}: the state has no {part}; {AGAIN}")
        path = self.folder / record["files"][part]
        with refused(f"{path}: not part of a stage's state", f"; {AGAIN}"):
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                if self.record()["files"] == record["files"]:
                    raise
                return self.read(part, device)
            if hashlib.sha256(content).hexdigest() != record["sums"][part]:
                raise ValueError("its SHA-256 is not the one in state.json")
            return torch.load(io.BytesIO(content), map_location=device, weights_only=True)

    def record(self) -> dict:
        """Return the checked state.json: {"progress", "files": {part: name}, "sums": {part: SHA-256}, "settings"}."""
        record = load_record(self.file, AGAIN)
        with refused(f"{self.file}: not the state.json of a stage", f"; {AGAIN}"):
            progress, files = record["progress"], record["files"]
            numbers = [progress[key] for key in ("step", "since", "loss", "correct", "seconds")]
            if not (type(progress["step"]) is int and isinstance(record["settings"], dict)
                    and all(type(value) in (int, float) and 0 <= value < math.inf for value in numbers)
                    and isinstance(progress["log"], list) and all(isinstance(line, dict) for line in progress["log"])
                    and files.keys() == record["sums"].keys()
                    and all(name == Path(name).name for name in files.values())):
                raise ValueError("a value has another type than it must have, or is out of range")
        return record

    def save(self, progress: dict, parts: dict) -> None:
        """Write progress (plain values) and parts ({part: state dict}); then remove the files of the state before.

        A second save at the same step takes other names, so that the first stays whole until it is replaced.
        """
        for number in itertools.count():
            suffix = f"{progress['step']}{f'-{number}' if number else ''}.pt"
            files = {part: f"{part}-{suffix}" for part in parts}
            if not any((self.folder / name).exists() for name in files.values()):
                break
        sums = {part: save_tensors(value, self.folder / files[part]) for part, value in parts.items()}
        save_record({"progress": progress, "files": files, "sums": sums, "settings": self.settings}, self.file)
        for path in self.files():
            if path.name not in (*files.values(), self.file.name):
                path.unlink(missing_ok=True)

    @property
    def exists(self) -> bool:
        return self.file.is_file()

    def remove(self) -> None:
        """Delete the state and its folder."""
        if self.folder.is_dir():
            self.file.unlink(missing_ok=True)  # first: it must not name what is gone
            for path in self.files():
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it is a link, or holds something else
                self.folder.rmdir()

    def files(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if not path.is_dir()]


def tensor_digest(tensors) -> str:
    """Return a digest of the values of tensors, by which a state recognises its data, masks and teachers."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
