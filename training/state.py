"""Save and load the state of a stage in a folder, so that a run that was killed at any moment can be resumed."""
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

# Settings of where and how a stage is computed. A resume may change them: the result differs by rounding only.
MACHINE = ("precision", "compile", "workers")
# Settings of a stage's length. A resume may change them as long as the learning rate is still constant.
LENGTH = ("epochs", "cooldown", "sizes")
AGAIN = "--no-resume starts the stage again"


class State:
    """Keep a state as one file per part (weights, average, optimizer, penalty) and state.json.

    state.json names the files that belong together, with their SHA-256, and holds a digest of itself. It is renamed
    into place after they are written. A file that it does not name is left over from a killed process, and the next
    save removes it.
    """

    def __init__(self, folder: Path, settings, **others):
        """Take all that decides the result, `settings` (a dataclass) and `others`: a resume needs equal values.

        Those in MACHINE are exempt.
        """
        self.folder = folder
        everything = (dataclasses.asdict(settings) if settings else {}) | others
        self.settings = json.loads(json.dumps({key: value for key, value in everything.items() if key not in MACHINE}))

    def load(self, device, constant=None) -> tuple[dict, dict] | None:
        """Return (progress, {part: contents}), or None if there is no state.

        constant: function (settings, step) -> True if the learning rate is constant up to this step. Where it is, under
        the saved settings and the new ones, those in LENGTH may differ. Raises BadInput for any other difference.
        """
        if not (self.folder / "state.json").is_file():
            return None
        record = self.record()
        theirs = record["settings"]
        changed = [key for key, value in self.settings.items() if theirs.get(key, value) != value]
        step = record["progress"]["step"]
        free = constant and set(changed) <= set(LENGTH) and constant(theirs, step) and constant(self.settings, step)
        if changed and not free:
            pairs = ", ".join(f"{key} {theirs[key]} -> {self.settings[key]}" for key in changed)
            raise BadInput(f"{self.folder} holds a run with other settings ({pairs}): give the same options to resume "
                           "it, or --no-resume to start it again, or another --run folder"
                           + "; its length may change only while the learning rate is constant"
                           * (set(changed) <= set(LENGTH)))
        return record["progress"], {part: self.read(part, device) for part in record["files"]}

    def read(self, part: str, device="cpu") -> dict:
        """Return the contents of one part, such as "weights" or "average". Raises BadInput if missing or damaged."""
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
            raise BadInput(f"{path}: not part of a stage's state ({type(error).__name__}); {AGAIN}") from error

    def record(self) -> dict:
        """Return the checked state.json: {"progress", "files": {part: name}, "sums": {part: SHA-256}, "settings"}."""
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
            raise BadInput(f"{path}: not the state.json of a stage; {AGAIN}")
        return record

    def save(self, progress: dict, parts: dict) -> None:
        """Write progress (plain values) and parts ({part: state dict}); then remove the files of the state before."""
        files = {part: f"{part}-{progress['step']}.pt" for part in parts}
        sums = {part: save_tensors(value, self.folder / files[part]) for part, value in parts.items()}
        save_record({"progress": progress, "files": files, "sums": sums, "settings": self.settings},
                    self.folder / "state.json")
        for path in self.folder.iterdir():
            if path.name not in (*files.values(), "state.json"):
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the state and its folder."""
        if self.folder.is_dir():
            (self.folder / "state.json").unlink(missing_ok=True)  # first: it must not name what is gone
            for path in self.folder.iterdir():
                path.unlink(missing_ok=True)
            self.folder.rmdir()


def brief(error: Exception) -> str:
    """Return an error's message on one line, cut to 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def fingerprint(tensors) -> str:
    """Return a digest of the values of tensors, by which a state recognises its data, masks and teachers."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def stop_noted():
    """Yield a list to which SIGTERM and Ctrl-C append their signal numbers, instead of ending the process.

    The first Ctrl-C cuts evaluations in `threads.in_threads` short, and the second raises KeyboardInterrupt. At the end
    of the block the previous handlers are restored and called for the signals that arrived: after Ctrl-C the outermost
    block so ends with KeyboardInterrupt. Only the main thread can install handlers; in others the list stays empty.
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
