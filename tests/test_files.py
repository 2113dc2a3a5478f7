import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compressed import command_line as scripts
from compressed import files
from compressed.errors import BadInput


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# -------------------------------------------------------------------------------------------------------- replacing

def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "new" / "folder" / "a.bin"
    with files.replacing(path) as file:
        file.write(b"one")
        assert not path.exists() and len(names(path.parent)) == 1  # written beside it, on the same file system
    assert path.read_bytes() == b"one" and stat.S_IMODE(path.stat().st_mode) == 0o644
    with files.replacing(path) as file:
        file.write(b"two")
        file.flush()
        assert path.read_bytes() == b"one"
    assert path.read_bytes() == b"two" and names(path.parent) == ["a.bin"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(),
                                   ValueError("bug")])
def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)):
        with files.replacing(path) as file:
            file.write(b"half")
            raise error
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_an_error_at_the_end_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.json"
    files.save_json({"old": 1}, path)
    monkeypatch.setattr(os, call, full)
    for save, value in ((files.save_json, {"new": 2}), (files.save_tensors, {"x": torch.ones(3)}),
                        (files.save_text, "new")):
        with pytest.raises(OSError, match="No space"):
            save(value, path)
    assert files.load_json(path) == {"old": 1} and names(tmp_path) == ["a.json"]


def test_what_is_saved_comes_back(tmp_path):
    files.save_text("grün\n", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_bytes() == "grün\n".encode()
    value = {"steps": [0.1, 2.0**-40, 1e300], "none": None, "name": "ü"}
    files.save_json(value, tmp_path / "a.json")
    assert files.load_json(tmp_path / "a.json") == value and (tmp_path / "a.json").read_text().endswith("}\n")
    files.save_tensors({"x": torch.arange(5.0)}, tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt", weights_only=True)["x"].tolist() == [0, 1, 2, 3, 4]
    assert files.sha256(tmp_path / "a.pt") == hashlib.sha256((tmp_path / "a.pt").read_bytes()).hexdigest()


# -------------------------------------------------------------------------------------------------------- load_json

@pytest.mark.parametrize("content, message", [
    (b"", "not readable as JSON"), (b'{"a": 1', "not readable as JSON"), (b"\xff\xfe{}", "not readable as JSON"),
    (b"[1, 2]", "holds list, expected a JSON object"), (b"null", "holds NoneType"), (b'"text"', "holds str"),
    (b"[" * 100_000, "not readable as JSON"), (b'{"step": ' + b"9" * 5000 + b"}", "not readable as JSON"),
])
def test_json_that_is_no_object(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message) as raised:
        files.load_json(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_no_json_at_all(tmp_path):
    with pytest.raises(BadInput, match="b.json: no such file"):
        files.load_json(tmp_path / "b.json")
    with pytest.raises(BadInput, match="not readable"):
        files.load_json(tmp_path)


# ------------------------------------------------------------------------------------------------------- run_script

def raising(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize("error, status, line", [
    (BadInput("the file is damaged"), 2, "script.py: the file is damaged\n"),
    (OSError(errno.ENOSPC, "No space left on device", "a.pt"), 2,
     "script.py: [Errno 28] No space left on device: 'a.pt'\n"),
    (KeyboardInterrupt(), 130, "script.py: interrupted\n"),
])
def test_what_the_user_can_mend_is_one_line(monkeypatch, capsys, error, status, line):
    monkeypatch.setattr(sys, "argv", ["/some/script.py"])
    with pytest.raises(SystemExit) as exit:
        scripts.run_script(raising(error))
    out, err = capsys.readouterr()
    assert (exit.value.code, out, err) == (status, "", line)


@pytest.mark.parametrize("status", [0, 2, None])
def test_the_status_is_what_main_returns(status, capsys):
    with pytest.raises(SystemExit) as exit:
        scripts.run_script(lambda: status)
    assert exit.value.code == status and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [ValueError("x"), AssertionError("x"), KeyError("x"), RuntimeError("x")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        scripts.run_script(raising(error))


def test_the_status_reaches_the_shell():
    code = ("from compressed import command_line, errors\n"
            "def main(): raise errors.BadInput('no such thing')\ncommand_line.run_script(main)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "-c: no such thing\n")


def test_json_floats_are_exact(tmp_path):
    value = {"x": [torch.rand(()).item() for _ in range(100)]}
    files.save_json(value, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == value


def test_the_commit(monkeypatch):
    def head(command, **options):
        assert command[:2] == ["git", "describe"] and options["cwd"] == Path(files.__file__).parent
        assert options["check"]
        return subprocess.CompletedProcess(command, 0, stdout="0123456789ab-dirty\n")

    monkeypatch.setattr(subprocess, "run", head)
    assert files.git_commit() == "0123456789ab-dirty"

    def missing(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert files.git_commit() is None
