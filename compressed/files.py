"""Write files atomically, and check them when they are read."""
import contextlib
import errno
import hashlib
import io
import json
import os
import secrets
import subprocess
import tomllib
from collections import Counter
from pathlib import Path

import torch

from compressed.errors import BadInput, refused


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary file, open for writing bytes, and rename it to `path` if the block ends without an error.

    A reader sees the old file or the new one, never a part. A full disk or a killed process leaves the old one
    unchanged. The file gets the permissions of the umask. If `path` is a symbolic link, its target is replaced.
    An OSError names `path`, whichever call raised it.
    """
    path, temporary = Path(path), None
    try:
        handle, temporary, place = create_next_to(path)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, place)
    except BaseException as error:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError):
            kept = "; what was there before is kept" if path.exists() else ""
            raise OSError(error.errno, f"not written: {error.strerror}{kept}", str(path)) from error
        raise


def create_next_to(path) -> tuple[int, Path, Path]:
    """Create an empty file with a new name in the folder of `path`, and the folder if it is missing.

    Returns (its open descriptor, its path, `path` with all links resolved). Raises OSError if it cannot be created.
    tempfile.mkstemp does not fit: only the owner can read its files, and not every file system allows a chmod.
    """
    place = Path(os.path.realpath(path))
    if place.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.parent / f"{place.name[:50]}.{secrets.token_hex(8)}.tmp"  # cut: a name may have 255 bytes
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    return handle, temporary, place


def try_to_write(*paths) -> None:
    """Raise BadInput if a file could not be written to one of the paths. Creates folders; call it before long work."""
    for path in map(Path, paths):
        with refused(f"{path}: cannot be written", "; give another place", OSError):
            if path.exists() and not path.is_file():
                raise OSError(0, "it is a folder" if path.is_dir() else "it is no regular file")
            handle, temporary, _ = create_next_to(path)
            os.close(handle)
            os.unlink(temporary)


def check_outputs(outputs, inputs=(), suffix: str | None = None) -> None:
    """Raise BadInput if an output could not be written or would overwrite an input or another output.

    Call it before long work. outputs: paths of files to be written; the first is the one that the user named, and it
    must end in `suffix` if that is given. inputs: paths that are read. Links are followed to compare paths.
    """
    outputs, inputs = list(map(Path, outputs)), list(map(Path, inputs))
    if suffix and outputs[0].suffix != suffix:
        raise BadInput(f"{outputs[0]}: expected a name that ends in {suffix}")
    for i, path in enumerate(outputs):
        for other in inputs + outputs[:i]:
            same = os.path.realpath(path) == os.path.realpath(other)
            if same or os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other):  # a hard link
                how = f"over {other}, which is read" if other in inputs else f"twice, as {other} too"
                raise BadInput(f"{path} would be written {how}; give another place")
    try_to_write(*outputs)


@contextlib.contextmanager
def lock_folder(folder):
    """Lock a folder, or a file, against other processes while the block runs; the lock also ends with the process.

    Raises BadInput if another process holds the lock. Does nothing where folders cannot be locked (Windows, some
    network disks).
    """
    with contextlib.ExitStack() as at_end:
        try:
            import fcntl
            handle = os.open(folder, os.O_RDONLY)
            at_end.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadInput(f"{folder}: another process is at work there; await its end, or give another folder"
                           ) from error
        except FileNotFoundError:
            raise
        except (ImportError, OSError):
            pass
        yield


@contextlib.contextmanager
def lock_file(file: Path):
    """Keep other processes out of the block, by a lock on a file that exists meanwhile.

    For a folder that other scripts must be able to hold within the block. Raises BadInput if another process is in it,
    or if the file cannot be made.
    """
    with refused(f"{file}: cannot be made", errors=OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    with lock_folder(file):
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def save_tensors(value, path) -> str:
    """Write `value`, a state dict or nested plain containers, by torch.save, atomically; return the file's SHA-256."""
    buffer = io.BytesIO()  # torch.save to a file would report a full disk as another error
    torch.save(value, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


def save_text(text: str, path) -> None:
    """Write text as UTF-8, atomically."""
    with replacing(path) as file:
        file.write(text.encode())


def to_json(value, **options) -> str:
    """Return `json.dumps(value, ...)`. Raises BadInput for NaN and infinity, which are not JSON."""
    with refused("a figure is not finite, which JSON cannot hold: is the network a trained one?", errors=ValueError):
        return json.dumps(value, allow_nan=False, **options)


def from_json(text: str | bytes):
    """Return what a JSON text holds.

    Raises ValueError for NaN, Infinity and duplicate keys, too, which Python's reader would accept.
    """
    def no_number(name):
        raise ValueError(f"{name} is no number of JSON")

    def without_duplicates(pairs):
        record = dict(pairs)
        if len(record) < len(pairs):
            raise ValueError(f"the key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} occurs twice")
        return record
    return json.loads(text, parse_constant=no_number, object_pairs_hook=without_duplicates)


def save_json(value, path) -> None:
    """Write `value` as JSON, atomically."""
    save_text(to_json(value, indent=1) + "\n", path)


def parsed(path, language: str, parse) -> dict:
    """Return parse(text), a dict, of a UTF-8 file, with or without a byte-order mark. Raises BadInput otherwise."""
    with refused(f"{path}: not readable as {language}"):
        value = parse(Path(path).read_bytes().decode("utf-8-sig"))
    if not isinstance(value, dict):
        raise BadInput(f"{path}: holds {type(value).__name__}, expected a {language} object")
    return value


def load_toml(path) -> dict:
    """Return the contents of a TOML file. Raises BadInput if it is missing or not TOML."""
    return parsed(path, "TOML", tomllib.loads)


def find_toml(name, folder: Path, what: str) -> Path:
    """Return the path of a TOML file: `name`, or that of this name in `folder`, with or without the suffix.

    Raises BadInput, which calls it a `what`, if there is none.
    """
    for path in (Path(name), folder / f"{name}.toml", folder / name):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in folder.glob("*.toml")))
    raise BadInput(f"there is no {what} {name}; give a TOML file, or one of those in {folder}: {known}")


def load_json(path) -> dict:
    """Return the object in a JSON file. Raises BadInput if it is missing, damaged, or not an object."""
    return parsed(path, "JSON", from_json)


def digest(record: dict) -> str:
    """Return the SHA-256 of a record's JSON (sorted keys, no spaces), without its field "digest"."""
    content = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(to_json(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def save_record(record: dict, path) -> None:
    """Write a record as JSON, with its digest added as a field."""
    save_json(record | {"digest": digest(record)}, path)


def load_record(path, remedy: str) -> dict:
    """Return what `save_record` wrote. Raises BadInput, with `remedy` at its end, if the file was altered since."""
    record = load_json(path)
    if "digest" not in record:
        raise BadInput(f"{path}: not written by a script of this repository, as it has no digest; rename it, or "
                       + remedy)
    if record["digest"] != digest(record):
        raise BadInput(f"{path}: altered since it was written (its digest is {record['digest']}, that of its "
                       f"content {digest(record)}); {remedy}")
    return record


def sha256(path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_commit() -> str | None:
    """Return the git commit of this code, marked -dirty if files differ from it; None without a repository of its own.

    The repository is named, because git would also use an enclosing one, or the one in the variable GIT_DIR.
    """
    words = ["git", "--git-dir=.git", "--work-tree=.", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(words, cwd=Path(__file__).resolve().parent.parent, capture_output=True, check=True,
                              encoding="utf-8", errors="replace").stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
