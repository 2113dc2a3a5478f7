"""Files that are never half written, and scripts that end with one clear line."""
import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

from mobilenet_v2 import BadInput


@contextlib.contextmanager
def replacing(path):
    """A temporary file beside `path`, open for writing bytes; renamed to `path` once the block ends without an error.

    A reader sees the old file or the new one, never a part; a full disk or a kill leaves the old one as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def save_tensors(value, path) -> None:
    """`torch.save` that leaves the old file or the new one. `value` is a state dict or nested plain containers."""
    buffer = io.BytesIO()  # torch.save hides a full disk behind an error of its own
    torch.save(value, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def save_text(text: str, path) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def save_json(value, path) -> None:
    save_text(json.dumps(value, indent=1) + "\n", path)


def load_json(path) -> dict:
    """The object in a JSON file. Raises BadInput if it is missing, damaged, or not an object."""
    try:
        value = json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number too long, nested too deeply
        raise BadInput(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path}: holds {type(value).__name__}, expected a JSON object")
    return value


def sha256(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_script(main) -> None:
    """Run `main()` and exit with what it returns; input that the user can mend becomes one line and status 2."""
    try:
        status = main()
    except (BadInput, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
