"""A stage's state in a folder: what a run that was ended at any moment goes on from."""
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import signal
from pathlib import Path

import torch

from compressed import threads
from compressed.errors import BadInput
from compressed.files import load_record, save_record, save_tensors

# Where and how a stage is computed may change on the way: the result is then the same but for rounding.
MACHINE = ("precision", "compile", "workers")
# How long a stage is may change while its learning rate is still constant.
LENGTH = ("epochs", "cooldown", "sizes")
AGAIN = "--no-resume starts the stage again"


class State:
    """One file a part (weights, average, optimizer, penalty), and state.json.

    state.json names the files of one moment with their SHA-256, carries a digest of itself, and is renamed into place
    after they are written; whatever it does not name is left over from a kill and removed at the next save.
    """

    def __init__(self, folder: Path, settings, **others):
        """`settings`, a dataclass, and `others` decide the result: they must be equal for a resume, but for MACHINE."""
        self.folder = folder
        everything = (dataclasses.asdict(settings) if settings else {}) | others
        self.settings = json.loads(json.dumps({key: value for key, value in everything.items() if key not in MACHINE}))

    def load(self, device, constant=None) -> tuple[dict, dict] | None:
        """(progress, {part: contents}), or None if there is nothing to resume.

        constant: (settings, step) -> whether the learning rate is constant up to this step under these settings; under
        the old ones and the new ones, a resume may change LENGTH.
        """
        if not (self.folder / "state.json").is_file():
            return None
        record = self.record()
        theirs = record["settings"]
        changed = [key for key, value in self.settings.items() if theirs.get(key, value) != value]
        step = record["progress"]["step"]
        free = constant and set(changed) <= set(LENGTH) and constant(theirs, step) and constant(self.settings, step)
        if changed and not free:
            told = ", ".join(f"{key} {theirs[key]} -> {self.settings[key]}" for key in changed)
            raise BadInput(f"{self.folder} holds a run with other settings ({told}): give the same options to go on, "
                           "or --no-resume to start it again, or another --run folder"
                           + "; its length may change only while the learning rate is constant"
                           * (set(changed) <= set(LENGTH)))
        return record["progress"], {part: self.read(part, device) for part in record["files"]}

    def read(self, part: str, device="cpu") -> dict:
        """The contents of one part, such as "weights" or "average"."""
        record = self.record()
        if part not in record["files"]:
            raise BadInput(f"{self.folder}: the state has no {part}")
        path = self.folder / record["files"][part]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BadInput(f"{path}: cannot be read ({error.strerror}); {AGAIN}") from error
        if hashlib.sha256(content).hexdigest() != record["sums"][part]:
            raise BadInput(f"{path}: damaged, its SHA-256 is not the one in state.json; {AGAIN}")
        try:
            return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        except Exception as error:
            raise BadInput(f"{path}: not what a stage writes ({type(error).__name__}); {AGAIN}") from error

    def record(self) -> dict:
        """state.json, checked: {"progress", "files": {part: name}, "sums": {part: SHA-256}, "settings"}."""
        path = self.folder / "state.json"
        record = load_record(path, AGAIN)
        progress, files, sums, settings = (record.get(key) for key in ("progress", "files", "sums", "settings"))
        good = all(isinstance(each, dict) for each in (progress, files, sums, settings)) and files.keys() == sums.keys()
        good = good and all(isinstance(name, str) and name == Path(name).name for name in files.values())
        good = good and type(progress.get("step")) is int and progress["step"] >= 0
        good = good and isinstance(progress.get("log"),
                                   list) and all(isinstance(line, dict) for line in progress["log"])
        good = good and all(type(progress.get(key)) in (int, float) and math.isfinite(progress[key])
                            for key in ("loss", "correct", "seconds"))
        if not good:
            raise BadInput(f"{path}: not the list of a state; {AGAIN}")
        return record

    def save(self, progress: dict, parts: dict) -> None:
        files = {part: f"{part}-{progress['step']}.pt" for part in parts}
        sums = {part: save_tensors(value, self.folder / files[part]) for part, value in parts.items()}
        save_record({"progress": progress, "files": files, "sums": sums, "settings": self.settings},
                    self.folder / "state.json")
        for path in self.folder.iterdir():
            if path.name not in (*files.values(), "state.json"):
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        if self.folder.is_dir():
            (self.folder / "state.json").unlink(missing_ok=True)  # first: it must not name what is gone
            for path in self.folder.iterdir():
                path.unlink(missing_ok=True)
            self.folder.rmdir()


def brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def fingerprint(tensors) -> str:
    """A digest of the values of tensors, for a state to know masks and teachers by."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def stop_noted():
    """Yield a list that SIGTERM and Ctrl-C fill with their numbers, instead of ending the process.

    Evaluations in `threads.in_threads` are cut short by the first Ctrl-C, and everything by the second. At the end the
    handlers before learn of it too: after Ctrl-C, in the outermost block, that raises KeyboardInterrupt. Only the main
    thread may install a handler; in another one the list stays empty.
    """
    arrived, before = [], {}

    def note(number, _):
        if number == signal.SIGINT:
            if number in arrived:
                raise KeyboardInterrupt
            threads.stop()
        arrived.append(number)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
    except ValueError:
        yield arrived
        return
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number, handler in before.items():
            if number in arrived and callable(handler):
                handler(number, None)
