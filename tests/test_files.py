import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys

import pytest
import torch

from compressed import claims
from compressed import command_line as scripts
from compressed import files
from compressed.errors import BadInput
from training.runs import load_lines


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
    value = {"steps": [0.1, 2.0**-40, 1e300, *torch.rand(100).tolist()], "none": None, "name": "ü"}
    files.save_json(value, tmp_path / "a.json")
    assert files.load_json(tmp_path / "a.json") == value and (tmp_path / "a.json").read_text().endswith("}\n")
    files.save_tensors({"x": torch.arange(5.0)}, tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt", weights_only=True)["x"].tolist() == [0, 1, 2, 3, 4]
    assert files.sha256(tmp_path / "a.pt") == hashlib.sha256((tmp_path / "a.pt").read_bytes()).hexdigest()


# -------------------------------------------------------------------------------------------------------- load_json

@pytest.mark.parametrize("content, message", [
    (b"", "not readable as JSON"), (b'{"a": 1', "not readable as JSON"), (b"\xff\xfe{}", "not readable as JSON"),
    (b"[1, 2]", "holds list, expected a JSON object"), (b"null", "holds NoneType"), (b'"text"', "holds str"),
    (b'{"a": NaN}', "NaN is no number of JSON"), (b'{"a": [-Infinity]}', "-Infinity is no number"),
    (b'{"b": [{"a": 1, "c": 2, "a": 1}]}', "the key 'a' occurs twice"),
    (b"[" * 100_000, "not readable as JSON"), (b'{"step": ' + b"9" * 5000 + b"}", "not readable as JSON"),
])
def test_json_that_is_no_object(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message) as raised:
        files.load_json(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_no_json_at_all(tmp_path):
    for path, reason in ((tmp_path / "b.json", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(BadInput, match=f"{path}: not readable as JSON .{reason}"):
            files.load_json(path)


# ------------------------------------------------------------------------------------------------------- run_script

def raising(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize("error, status, line", [
    (SystemExit(3), 3, ""),
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


def test_a_bug_keeps_its_traceback():
    before = [signal.getsignal(number) for number in scripts.ENDING]
    with pytest.raises(ValueError, match="^a bug$"):
        scripts.run_script(raising(ValueError("a bug")))
    assert [signal.getsignal(number) for number in scripts.ENDING] == before


# ------------------------------------------------------------------------------------------------- where it is written

@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_is_kept_without_a_chmod(tmp_path, monkeypatch, mask, mode):
    def refused(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    for name in ("chmod", "fchmod"):  # not every file system has it
        monkeypatch.setattr(os, name, refused)
    before = os.umask(mask)
    try:
        files.save_text("x", tmp_path / "a.txt")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == mode


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a.txt").symlink_to("elsewhere/b.txt")
    for text in ("new", "newer"):  # of a link that leads nowhere yet, and of one that leads to a file
        files.check_outputs([tmp_path / "a.txt"])
        files.save_text(text, tmp_path / "a.txt")
        assert (tmp_path / "a.txt").is_symlink() and (tmp_path / "elsewhere" / "b.txt").read_text() == text
    assert names(tmp_path) == ["a.txt", "elsewhere"] and names(tmp_path / "elsewhere") == ["b.txt"]


def test_the_longest_names_can_be_written(tmp_path):
    for name in ("x" * 252 + ".pt", "ü" * 126 + ".pt"):
        files.check_outputs([tmp_path / name])
        files.save_text("x", tmp_path / name)
        assert (tmp_path / name).read_text() == "x"
    with pytest.raises(BadInput, match="cannot be written"):
        files.check_outputs([tmp_path / ("x" * 300)])


@pytest.fixture
def places(tmp_path):
    """A folder, the current one, with paths of every kind."""
    (tmp_path / "source.pt").write_text("source")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "link.pt").symlink_to("source.pt")
    os.link("source.pt", "hard.pt")
    (tmp_path / "circle.pt").symlink_to("circle.pt")
    (tmp_path / "up").symlink_to(".")
    os.mkfifo("pipe.pt")
    return names(tmp_path)


@pytest.mark.parametrize("outputs, said", [
    (["source.pt"], "over source.pt, which is read"), (["link.pt"], "over source.pt, which is read"),
    (["hard.pt"], "over source.pt, which is read"), (["up/source.pt"], "over source.pt, which is read"),
    (["folder.pt/../source.pt"], "over source.pt, which is read"), (["up/coming.pt"], "over coming.pt, which is read"),
    (["new.pt", "./new.pt"], "written twice"), (["new.pt", "up/new.pt"], "written twice"),
    (["new.json"], "ends in .pt"), (["new"], "ends in .pt"), (["new.v1"], "ends in .pt"), (["new.PT"], "ends in .pt"),
    (["folder.pt"], "it is a folder"), (["pipe.pt"], "it is no regular file"), (["circle.pt"], "cannot be written"),
    (["source.pt/new.pt"], "cannot be written"), (["/proc/new.pt"], "cannot be written"),
])
def test_outputs_that_would_destroy_something_or_cannot_be(places, tmp_path, outputs, said):
    with pytest.raises(BadInput, match=said) as raised:
        files.check_outputs(outputs, ["source.pt", "coming.pt", "circle"], suffix=".pt")
    assert "\n" not in str(raised.value)
    assert names(tmp_path) == places and (tmp_path / "source.pt").read_text() == "source"


def test_outputs_that_are_not_special(places):
    files.check_outputs(["new.v1.pt", "new.v1.json", "up/other.json"], ["source.pt", "new.v1"], suffix=".pt")
    with pytest.raises(BadInput, match="/dev/null: cannot be written .it is no regular file"):
        files.check_outputs(["/dev/null"])


# ---------------------------------------------------------------------------------------------------- what is written

def test_json_has_no_such_numbers(tmp_path):
    (tmp_path / "a.json").write_text("old")
    for save in (files.save_json, files.save_record):
        for value in (float("nan"), float("inf")):
            with pytest.raises(BadInput, match="a figure is not finite"):
                save({"deep": [{"x": value}]}, tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == "old" and names(tmp_path) == ["a.json"]


def test_a_byte_order_mark_is_no_content(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xbc"}')
    (tmp_path / "a.toml").write_bytes(b'\xef\xbb\xbfa = "\xc3\xbc"\r\n')
    assert files.load_json(tmp_path / "a.json") == files.load_toml(tmp_path / "a.toml") == {"a": "ü"}


@pytest.mark.parametrize("content", [b"\xff\xfea", b"a = \xfc", b"a", b"a = 1\na = 2", b"a = " + b"[" * 10_000])
def test_toml_that_is_none(tmp_path, content):
    (tmp_path / "a.toml").write_bytes(content)
    with pytest.raises(BadInput, match="a.toml: not readable as TOML") as raised:
        files.load_toml(tmp_path / "a.toml")
    assert "\n" not in str(raised.value)


# --------------------------------------------------------------------------------------------------------- the commit

@pytest.fixture
def copy_of_the_code(tmp_path, monkeypatch):
    """A folder in which compressed/files.py believes itself to stand."""
    (tmp_path / "outer" / "copy" / "compressed").mkdir(parents=True)
    monkeypatch.setattr(files, "__file__", str(tmp_path / "outer" / "copy" / "compressed" / "files.py"))
    return tmp_path / "outer" / "copy"


def commit(folder, message):
    for words in (["init", "-q"], ["add", "."],
                  ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", message, "--allow-empty"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True,
                          text=True).stdout[:12]


def test_an_outer_repositorys_commit_is_not_ours(copy_of_the_code, monkeypatch):
    assert files.git_commit() is None
    outer = commit(copy_of_the_code.parent, "outer")
    assert files.git_commit() is None
    monkeypatch.setenv("GIT_DIR", str(copy_of_the_code.parent / ".git"))
    assert files.git_commit() is None
    monkeypatch.delenv("GIT_DIR")
    ours = commit(copy_of_the_code, "ours")
    assert files.git_commit() == ours != outer
    monkeypatch.setenv("GIT_DIR", str(copy_of_the_code.parent / ".git"))
    assert files.git_commit() == ours
    (copy_of_the_code / "compressed" / "new.py").write_text("")
    subprocess.run(["git", "add", "."], cwd=copy_of_the_code, check=True,
                   env={name: value for name, value in os.environ.items() if name != "GIT_DIR"})
    assert files.git_commit() == f"{ours}-dirty"


def test_an_altered_record_is_refused(tmp_path):
    path = tmp_path / "record.json"
    files.save_record({"lr": 0.1, "names": ["a"]}, path)
    record = files.load_record(path, "take it back")
    assert {key: record[key] for key in ("lr", "names")} == {"lr": 0.1, "names": ["a"]}
    for change in ({"lr": 0.2}, {"names": ["b"]}, {"digest": "0" * 64}, {"digest": None}, {"more": 1}):
        files.save_json(record | change, path)
        with pytest.raises(BadInput, match="record.json: altered since it was written .*; take it back"):
            files.load_record(path, "take it back")


@pytest.mark.parametrize("line", ('{"step": 1}', '{"step": "1", "epoch": 1}', '{"step": 1, "epoch": 0}',
                                  '{"step": 1, "epoch": "1"}'))
def test_a_line_of_a_log_has_a_step_and_an_epoch(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"step": 1, "epoch": 0.5}\n' + line)
    with pytest.raises(BadInput, match="line 2 is no line of a log"):
        load_lines(tmp_path / "a.jsonl")


def test_results_of_a_checkpoint_that_was_replaced_are_not_recorded(tmp_path):
    """Of the one before it, that is: they would stand in the new one's claim, with a valid digest."""
    checkpoint = tmp_path / "net.pt"
    begun = {"sha256": "a", "kept": 1}
    files.save_record(begun, tmp_path / "net.json")
    claims.record(checkpoint, "integer", {"images": 2}, begun)
    assert claims.read(tmp_path / "net.json")["integer"] == {"images": 2}
    files.save_record({"sha256": "b"}, tmp_path / "net.json")
    with pytest.raises(BadInput, match="was replaced meanwhile, and nothing was recorded"):
        claims.record(checkpoint, "integer", {"images": 3}, begun)
    assert "integer" not in claims.read(tmp_path / "net.json")
