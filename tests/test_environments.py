"""Odd environments, command lines and files: every one ends in one line and a status, and never in a traceback."""
import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

import check_model_operations
import quantize
import testers
import user_networks
from compressed import cifar100, command_line, counting, environment, kernels, networks, threads
from compressed.command_line import run_script
from compressed.errors import BadInput
from compressed.evaluation import in_batches
from compressed.files import save_tensors
from tools import compare, divergence, integer, layers, pack, report
from training import main as training
from training import plan, replicas, teachers
from training.progress import Progress

ROOT = Path(__file__).resolve().parent.parent
AFTER_IMPORTS = signal.getsignal(signal.SIGINT)
PROCESS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """None of the variables that the project reads, and Ctrl-C as on a terminal."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    for name in (*PROCESS, "CC"):
        monkeypatch.delenv(name, raising=False)
    command_line.say_once.cache_clear()
    yield
    signal.signal(signal.SIGINT, handler)


# ---------------------------------------------------------------------------------------------- environment variables

@pytest.mark.parametrize("variables, found", [
    ({}, (0, 1, 0)), ({"WORLD_SIZE": "1"}, (0, 1, 0)), (dict.fromkeys(PROCESS, ""), (0, 1, 0)),
    (dict.fromkeys(PROCESS, "  "), (0, 1, 0)), ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0)),
    ({"RANK": "0", "WORLD_SIZE": " 1 ", "LOCAL_RANK": "0"}, (0, 1, 0)), ({"RANK": "0"}, (0, 1, 0)),
    ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
     (3, 4, 1)),
])
def test_the_processes_of_torchrun(monkeypatch, variables, found):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment.processes() == found


ONE_OF_TWO = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
WRONG_PROCESSES = [
    {"WORLD_SIZE": "2"}, {"RANK": "1"}, {"RANK": "x"}, {"RANK": "-1"}, {"RANK": "1.0"}, {"RANK": "²"},
    {"RANK": "9" * 5000}, {"WORLD_SIZE": "0"}, {"LOCAL_RANK": "-1"}, {"LOCAL_WORLD_SIZE": "0"},
    {"RANK": "1", "WORLD_SIZE": "1"}, ONE_OF_TWO | {"RANK": "2"},
    *(ONE_OF_TWO | {name: ""} for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))]


def ended(main, argv, capsys) -> tuple[int, str, str]:
    """(status, stdout, stderr) of a script in this process, which ends without a traceback."""
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: main(argv))
    return stopped.value.code, *capsys.readouterr()


def assert_one_line(status, err, *named):
    *usage, last = err.splitlines()
    assert status == 2 and all(word in last for word in named) and len(last) < 1000, err
    assert all(line.startswith(("usage: ", "  ")) for line in usage), err


@pytest.mark.parametrize("variables", WRONG_PROCESSES, ids=lambda variables: str(variables)[:50])
def test_variables_that_contradict_each_other_are_named(monkeypatch, capsys, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    status, out, err = ended(training.main, ["--made-up", "100", "--epochs", "1", "--pretrain", "--no-cuda"], capsys)
    assert_one_line(status, err, "environment variable")
    assert any(name in err for name in variables) and not out and not torch.distributed.is_initialized()


def test_processes_that_do_not_find_each_other(monkeypatch, capsys):
    for name, value in ONE_OF_TWO.items():
        monkeypatch.setenv(name, value)

    def late(*_):
        raise torch.distributed.DistNetworkError("timed out\nC++ stack")

    monkeypatch.setattr(torch.distributed, "init_process_group", late)
    status, out, err = ended(training.main, ["--made-up", "100", "--no-cuda"], capsys)
    assert_one_line(status, err, "the 2 processes do not find each other (DistNetworkError: timed out C++ stack)")


@pytest.mark.parametrize("name", ("CIFAR100_DIR", "TEACHERS_DIR"))
@pytest.mark.parametrize("value", ("nowhere", "~/nowhere-at-all", "~no-such-user/x", "a.txt", "/dev/null"))
def test_folders_that_are_none_are_named_by_their_absolute_path(monkeypatch, capsys, tmp_path, name, value):
    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setenv(name, value)
    main = cifar100.main if name == "CIFAR100_DIR" else teachers.main
    status, out, err = ended(main, [], capsys)
    assert_one_line(status, err, name, os.path.abspath(os.path.expanduser(value)))


def test_an_empty_folder_variable_is_not_set(monkeypatch):
    """Then the teachers are looked for here, and downloaded."""
    def fetch(url, path, name):
        raise OSError("no network")

    monkeypatch.setenv("TEACHERS_DIR", "")
    monkeypatch.setattr(cifar100, "fetch", fetch)
    with pytest.raises(BadInput, match="cannot download"):
        teachers.find()


# ---------------------------------------------------------------------------- helpers that are broken, and not absent

def script(path, text) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("make, said", [
    (lambda folder: "gcc '", "No closing quotation"), (lambda folder: "no-such-compiler", "no-such-compiler"),
    (lambda folder: str(folder), "Permission denied"), (lambda folder: "false", "status 1"),
    (lambda folder: script(folder / "cc", "#!/bin/sh\nexit 0\n"), "kernels.so"),
    (lambda folder: script(folder / "cc", "#!/bin/sh\nfor last; do :; done; echo x > $last\n"), "kernels.so"),
    (lambda folder: script(folder / "cc", "#!/bin/sh\nfor last; do :; done\n"
                           "echo 'int x;' | cc -x c - -shared -fPIC -o $last\n"), "batchnorm"),
])
def test_a_compiler_that_does_not_work_is_done_without(monkeypatch, tmp_path, capsys, make, said):
    monkeypatch.setenv("CC", make(tmp_path))
    for _ in range(2):
        assert kernels.library.__wrapped__(torch.float32) is None
    line, = capsys.readouterr().err.splitlines()
    assert said in line and "C compiler (CC)" in line


def test_no_compiler_is_nothing_to_talk_about(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert kernels.library.__wrapped__(torch.float32) is None and capsys.readouterr() == ("", "")


def test_no_temporary_folder_is_not_taken_for_no_compiler(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    assert kernels.library.__wrapped__(torch.float32) is None and "gone" in capsys.readouterr().err


def test_a_gpu_that_does_not_work_is_one_line(monkeypatch):
    def failing(device):
        raise RuntimeError("CUDA error: the driver\nis too old")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", failing)
    assert threads.use_device(no_cuda=True) == torch.device("cpu")
    with pytest.raises(BadInput, match="not work .RuntimeError: CUDA error: the driver is too old.; give --no-cuda"):
        threads.use_device(no_cuda=False)
    with pytest.raises(BadInput, match="LOCAL_RANK is 2, but there are 2 CUDA devices"):
        threads.use_device(no_cuda=False, local=2)


BROKEN = [("raise RuntimeError('broken\\nhere')", "(RuntimeError: broken here)"), ("x = ", "SyntaxError"),
          ("import no_such_part_of_it", "No module named 'no_such_part_of_it'"),
          ("raise DeprecationWarning('old')", "DeprecationWarning: old")]


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Function (name, content): make `import name` find a module with this content, until the test ends."""
    def make(name, content):
        for module in [module for module in sys.modules if module.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        (tmp_path / f"{name}.py").write_text(content)
        monkeypatch.syspath_prepend(str(tmp_path))
        made.append(name)

    made = []
    yield make
    for name in made:
        sys.modules.pop(name, None)


COMFORT = {"thop": lambda: counting.thop_counts(networks.make("mobilenet_v2:MobileNetV2?width=0.25")),
           "tqdm": lambda: command_line.progress_bar(total=1)}


def on_a_terminal(monkeypatch) -> None:
    """To be called in a test: pytest puts another stderr in place after its fixtures."""
    monkeypatch.delenv("TERM", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)


@pytest.mark.parametrize("name, content, said", [
    *((name, *case) for name in COMFORT for case in (*BROKEN, ("", "cannot import name"))),
    ("tqdm", "tqdm = None", "TypeError"), ("thop", "def profile(*a, **k): return {}", "KeyError")])
def test_a_package_that_is_not_necessary_and_does_not_work_is_done_without(stand_in, monkeypatch, capsys, name,
                                                                           content, said):
    on_a_terminal(monkeypatch)
    stand_in(name, content)
    assert COMFORT[name]() is None and COMFORT[name]() is None
    line, = capsys.readouterr().err.splitlines()
    assert f"{name} does not work here" in line and said in line


@pytest.mark.parametrize("absent", (*COMFORT, "matplotlib", "onnx", "onnxruntime"))
def test_a_package_that_is_not_installed_is_done_without_or_named(monkeypatch, capsys, absent):
    on_a_terminal(monkeypatch)
    monkeypatch.setitem(sys.modules, absent, None)  # then its import raises ModuleNotFoundError
    monkeypatch.delitem(sys.modules, "tools.figures", raising=False)
    if absent in COMFORT:
        assert COMFORT[absent]() is None
    else:
        with pytest.raises(BadInput, match=f"{absent}.*pip install -r requirements.txt"):
            command_line.needed("tools.figures" if absent == "matplotlib" else absent)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("content, said", BROKEN)
@pytest.mark.parametrize("name", ("onnx", "matplotlib"))
def test_a_package_that_does_not_work_is_named(stand_in, monkeypatch, capsys, tmp_path, name, content, said):
    """The report with figures needs matplotlib, and says so before it does anything."""
    monkeypatch.delitem(sys.modules, "tools.figures", raising=False)
    stand_in(name, content)
    if name == "onnx":
        with pytest.raises(BadInput) as raised:
            command_line.needed("onnx")
        line = str(raised.value)
    else:
        for main, words in ((compare.main, [str(tmp_path), "--figure", "f.png"]),
                            (report.main, ["--to", str(tmp_path / "to")])):
            status, out, line = ended(main, words, capsys)
            assert (status, out, len(line.splitlines())) == (2, "", 1)
    assert "does not work here" in line and said in line and "pip install" in line
    assert not (tmp_path / "to").exists()


def test_the_backend_of_a_notebook_does_not_matter():
    """matplotlib looks at the variable once in a process: hence a new one."""
    code = "from tools import figures; f = figures.plt.figure(); f.savefig('a.png'); print(figures.plt.get_backend())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | {"MPLBACKEND": "module://nowhere.inline", "PYTHONPATH": str(ROOT)})
    assert done.stdout.lower() == "agg\n" and Path("a.png").stat().st_size > 100, done.stderr


@pytest.mark.filterwarnings("error")
def test_warnings_that_are_errors(monkeypatch, capsys):
    """As under python -W error: nothing of ours warns, and a package that warns is done without."""
    monkeypatch.setattr(kernels, "library", lambda dtype: None)  # no compiler: it would take longer than the rest
    data, network = ["--made-up", "40"], ["--network", f"{user_networks.__file__}:ResNet?width=4"]
    for main, words in (
            (training.main, ["--pretrain", *data, "--batch-size", "20", "--epochs", "1", "--no-cuda"]),
            (quantize.main, ["--checkpoint", "runs/default/pretrain.pt", "--out", "small.pt", "--calibration", "10",
                             "--renew", "20", *data, "--no-cuda"]),
            (testers.main, ["--checkpoint", "small.pt", *data]),
            (check_model_operations.main, ["--checkpoint", "small.pt"])):
        status, out, err = ended(main, [*words, *network], capsys)
        assert status == 0, (words, out, err)


# ------------------------------------------------------------------------------------------------------------- streams

TALK = """
import sys
sys.argv[0] = "talk.py"
from compressed.command_line import run_script
from compressed.errors import BadInput
def main():
    for line in range(5_000):
        print("caf\\u00e9 \\udce9", line)
    {end}
run_script(main)
"""


def talk(end: str, shell: str, **variables) -> subprocess.CompletedProcess:
    """A script of many lines in a shell command, where it is called "$0" "$1"."""
    return subprocess.run(["bash", "-o", "pipefail", "-c", shell, sys.executable, TALK.format(end=end)], cwd=ROOT,
                          capture_output=True, env={**os.environ, **variables}, timeout=60)


@pytest.mark.parametrize("shell, end, status, err", [
    ('"$0" -c "$1" | head -1', "return 0", 141, b""), ('"$0" -c "$1" | true', "return 2", 141, b""),
    ('"$0" -c "$1" >&-', "return 2", 2, b""), ('"$0" -c "$1" >&-', "raise BadInput('x')", 2, b"talk.py: x\n"),
    ('"$0" -c "$1" 2>&- | cat >/dev/null', "raise BadInput('x')", 2, b""),
    ('"$0" -c "$1" <&- >&- 2>&-', "raise BadInput('x')", 2, b""), ('"$0" -c "$1" <&- >&- 2>&-', "return 0", 0, b""),
    ('"$0" -c "$1" >/dev/full', "return 0", 2, b"talk.py: [Errno 28] No space left on device\n"),
    ('"$0" -c "$1" >/dev/full 2>&1', "return 0", 2, b""),
    ('"$0" -c "$1" >/dev/null', "raise BadInput('caf\\u00e9 \\udce9')", 2, b"talk.py: caf\xc3\xa9 \\udce9\n"),
])
def test_streams_that_are_closed_full_or_left(shell, end, status, err):
    found = talk(end, shell)
    assert (found.returncode, found.stderr) == (status, err)


@pytest.mark.parametrize("variables, first", [
    ({"PYTHONIOENCODING": "latin-1"}, b"caf\xe9 \\udce9 0"), ({"PYTHONUTF8": "1"}, b"caf\xc3\xa9 \\udce9 0"),
    ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, b"caf\\xe9 \\udce9 0")])
def test_text_that_a_terminal_cannot_show(variables, first):
    found = talk("return 0", '"$0" -c "$1"', **variables)
    assert (found.returncode, found.stderr, found.stdout.splitlines()[0]) == (0, b"", first)


def test_long_work_shows_how_far_it_is(monkeypatch, capsys):
    clock = iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: 4 * next(clock))
    assert list(command_line.with_progress(["a", "b", "c", "d", "e"], "letters")) == ["a", "b", "c", "d", "e"]
    assert capsys.readouterr().out == "letters: 2 of 5, 18 s left\n"


def test_help_into_a_closed_pipe():
    text = ("from compressed.command_line import command_line, run_script\n"
            "run_script(lambda: command_line(100_000 * 'x').parse_args(['--help']))\n")
    found = subprocess.run(["bash", "-o", "pipefail", "-c", '"$0" -c "$1" | true', sys.executable, text], cwd=ROOT,
                           capture_output=True)
    assert found.returncode in (0, 141) and found.stderr == b""  # argparse keeps what hinders it to itself


# ---------------------------------------------------------------------------------------------------------- interrupts

SLOW_TORCH = """
import time
print("importing", flush=True)
for _ in range(2):
    try:
        time.sleep(30)
    except BaseException:  # as some of torch's files do
        pass
"""


@pytest.mark.parametrize("script", ["testers.py", "training/main.py", "-m tools.report", "-m compressed.cifar100"])
def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path, script):
    (tmp_path / "torch.py").write_text(SLOW_TORCH)
    process = subprocess.Popen([sys.executable, *script.split()], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert process.stdout.readline() == "importing\n"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    name = script.split(".")[-1] + ".py" if script.startswith("-m") else Path(script).name
    assert (process.returncode, out, err) == (130, "", f"{name}: interrupted\n")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("words", (["testers.py"], ["training/main.py"], ["-m", "tools.pack"]))
def test_a_python_without_torch_says_what_to_do(words):
    """-S: without the packages that are installed."""
    found = subprocess.run([sys.executable, "-S", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert found.returncode == 2 and found.stdout == ""
    assert "torch is not installed for this Python" in found.stderr and "source .venv/bin/activate" in found.stderr
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize("error", (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
                                   torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")))
def test_a_lack_of_memory_is_one_line(error, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as ended:
        run_script(main)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "there is not enough memory" in said and said.count("\n") == 1
    error = RuntimeError("another one")
    with pytest.raises(RuntimeError, match="another one"):
        run_script(main)


@pytest.mark.parametrize("name", ("SIGTERM", "SIGHUP"))
def test_a_script_that_is_ended_removes_its_temporary_files(name, tmp_path):
    """A signal that is ignored, as by nohup, stays so."""
    code = f"""
import os, signal, sys, tempfile
sys.path.insert(0, {str(ROOT)!r})
from compressed.command_line import run_script
def main():
    with tempfile.TemporaryDirectory(dir={str(tmp_path)!r}):
        os.kill(os.getpid(), signal.{name})
        print("went on", flush=True)
if "ignored" in sys.argv:
    signal.signal(signal.{name}, signal.SIG_IGN)
run_script(main)
"""
    ended, ignored = (subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
                      for words in ([], ["ignored"]))
    assert (ended.returncode, ended.stdout) == (128 + getattr(signal, name), "")
    assert f"stopped by {name}" in ended.stderr and list(tmp_path.iterdir()) == []
    assert ignored.stdout == "went on\n" and ignored.returncode == 0


def test_a_script_that_was_killed_is_named(capfd):
    status = command_line.run_python("-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert status == 128 + 9 and "was ended by SIGKILL (is there enough memory?)" in capfd.readouterr().err


@pytest.mark.parametrize("text, wanted", (("200000 100000", 2), ("150000 100000", 2), ("max 100000", 64), ("", 64),
                                          ("50000 100000", 1)))
def test_the_quota_of_a_container_limits_the_cores(text, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(threads, "QUOTA", tmp_path / "cpu.max")
    assert threads.cores() == 64
    threads.QUOTA.write_text(text)
    assert threads.cores() == wanted
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert threads.cores() == max(1, wanted // 2)


def test_importing_a_script_changes_no_signal():
    assert AFTER_IMPORTS is not command_line.end_at_once


def interrupt_after(seconds: float) -> None:
    threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGINT)).start()


@pytest.mark.parametrize("cores", (1, 3))
def test_ctrl_c_ends_an_evaluation_at_once(monkeypatch, cores):
    """Of 30 seconds of work in each thread."""
    monkeypatch.setattr(threads, "cores", lambda: cores)
    interrupt_after(0.3)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        in_batches(lambda batch: (time.sleep(0.1), batch)[1], torch.zeros(300 * cores, 1), 1)
    assert time.monotonic() - began < 10
    assert len(in_batches(lambda batch: batch, torch.zeros(7, 1), 1)) == 7  # and it is forgotten


def test_an_error_in_the_main_thread_ends_the_others_soon(monkeypatch):
    done = []

    def engine(batch):
        if batch[0] == 299:
            raise BadInput("this one")
        time.sleep(0.01)
        done.append(batch)
        return batch

    monkeypatch.setattr(threads, "cores", lambda: 3)
    images = torch.arange(300.0)[:, None]
    images[5] = 299  # in the main thread's part
    with pytest.raises(BadInput, match="this one"):
        in_batches(engine, images, 1)
    assert len(done) < 100  # of 205


def test_a_noted_ctrl_c_ends_the_process_only_behind_the_block():
    inside = []
    with pytest.raises(KeyboardInterrupt):
        with threads.stop_noted() as outer:
            with threads.stop_noted() as asked:
                os.kill(os.getpid(), signal.SIGINT)
                inside.append(list(asked))
            inside.append(list(outer))
    assert inside == [[signal.SIGINT], [signal.SIGINT]]
    threads.go_on()  # does not raise: what was stopped has ended


def test_a_second_ctrl_c_ends_it_at_once():
    went_on = False
    with pytest.raises(KeyboardInterrupt):
        with threads.stop_noted():
            os.kill(os.getpid(), signal.SIGINT)
            with contextlib.suppress(ZeroDivisionError):
                os.kill(os.getpid(), signal.SIGINT)
                went_on = True
    assert not went_on


def test_ctrl_c_in_training_writes_the_state_and_the_same_command_goes_on(monkeypatch, capsys):
    """It comes in the last step of the first epoch, whose accuracy is left out."""
    monkeypatch.setattr(networks, "DEFAULT", "mobilenet_v2:MobileNetV2?width=0.25")
    monkeypatch.setattr(kernels, "library", lambda dtype: None)  # no compiler: it would take longer than the training
    words = ["--pretrain", "--made-up", "40", "--batch-size", "20", "--epochs", "3", "--sizes", "16:0.9,32",
             "--mixing", "none", "--augment", "none", "--refresh", "0", "--no-cuda", "--workers", "1"]
    monkeypatch.setattr(Progress, "step", lambda shown, done: done == 2 and os.kill(os.getpid(), signal.SIGINT))
    status, out, err = ended(training.main, words, capsys)
    assert status == 130 and err.endswith(": interrupted\n"), (status, out, err)
    assert "pretrain epoch 1/3" in out and "test" not in out.splitlines()[0]
    assert "stopped at epoch 1.00 of 3, state written to runs/default/pretrain.state" in out
    assert Path("runs/default/pretrain.state/state.json").is_file() and not Path("runs/default/pretrain.pt").exists()
    monkeypatch.setattr(Progress, "step", lambda *_: None)
    status, out, err = ended(training.main, [*words, "--max-minutes", "0"], capsys)
    assert status == 0 and "pretrain: resumes at epoch 2 of 3" in out and "stopped at epoch 1.50" in out


# --------------------------------------------------------------------------------------------------- places and files

def test_a_folder_for_the_data_that_cannot_be_written(monkeypatch, capsys):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "/read-only")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refused)
    status, out, err = ended(cifar100.main, [], capsys)
    assert_one_line(status, err, "cannot put CIFAR-100 into", "Permission denied", "--data FOLDER")


def test_a_checkpoint_whose_name_is_no_text(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.pt")
    save_tensors({"x": torch.ones(2)}, path)
    assert networks.load_state(path)["x"].tolist() == [1, 1]


@pytest.mark.parametrize("batch, workers, sizes, good", [
    (1, 1, "8:0.5,32", False), (1, 4, "8:0.5,32", False), (2, 1, "8:0.5,32", True), (3, 2, "8:0.5,32", True),
    (1, 1, "16:0.5,32", True), (1, 1, "32", True)])
def test_one_value_a_channel_has_no_variance(batch, workers, sizes, good):
    """With a compiler or without: a step of BatchNorm over one value is refused before the first."""
    settings = plan.Settings(epochs=2, batch_size=batch, sizes=sizes, workers=workers)
    with contextlib.nullcontext() if good else pytest.raises(BadInput, match="one image at 8x8"):
        plan.Plan(settings, 10, replicas.Processes())


@pytest.mark.parametrize("option", ("--start", "--teacher"))
@pytest.mark.parametrize("name", ("pretrain.pt", "pretrain.average.pt", "link.pt"))
def test_training_again_does_not_destroy_what_it_reads(capsys, option, name):
    run = Path("run")
    for path in (run / "pretrain.pt", run / "pretrain.average.pt"):
        save_tensors({"x": torch.ones(2)}, path)
    (run / "link.pt").symlink_to("pretrain.pt")
    status, out, err = ended(training.main, ["--pretrain", "--no-resume", "--run", "run", "--made-up", "100",
                                             "--no-cuda", option, str(run / name)], capsys)
    assert_one_line(status, err, "which is read; give another place")
    assert sorted(path.name for path in run.iterdir()) == ["link.pt", "pretrain.average.pt", "pretrain.pt"]


# ------------------------------------------------------------------------------------------------------- command lines

FILES = {"empty.pt": b"", "text.pt": b"hello", "zip.pt": b"PK\x05\x06" + bytes(18), "json.pt": b"{}", "a.mnet": b"MNET",
         "empty.mnet": b"", "bom.toml": b"\xef\xbb\xbfdefault = 99", "latin.toml": b"a = '\xe9'", "x.toml": b"x",
         "deep.toml": b"a = " + b"[" * 10_000,
         "list.pt": torch.ones(2), "odd.pt": {"conv1.weight": torch.ones(2)}, "nothing.pt": {}}
CHECKPOINTS = (*(name for name in FILES if not name.endswith(".toml")), "missing.pt", "folder", "loop.pt",
               "pipe.pt", "/dev/null", "a\nb.pt", "caf\udce9.pt", "x" * 300, "~/x.pt")
ARGUMENTS = [  # script, words in which F is each of the checkpoints
    (testers, ["--checkpoint", "F", "--made-up", "10"]), (check_model_operations, ["--checkpoint", "F"]),
    (quantize, ["--checkpoint", "F", "--out", "out.pt", "--made-up", "10"]), (pack, ["--checkpoint", "F"]),
    (integer, ["--checkpoint", "F", "--made-up", "10"]), (divergence, ["--teacher", "empty.pt", "--", "F"]),
    (training, ["--pretrain", "--start", "F", "--made-up", "100", "--no-cuda", "--run", "run"]),
]
FEW = ("text.pt", "odd.pt", "missing.pt", "folder", "pipe.pt", "a.mnet")  # all scripts read by the same functions
LINES = [(script, [checkpoint if word == "F" else word for word in words])
         for script, words in ARGUMENTS for checkpoint in (CHECKPOINTS if script is testers else FEW)]
LINES += [(training, ["--recipe", name]) for name in ("x.toml", "latin.toml", "missing", "folder", "bom.toml")]
LINES += [(layers, ["--network", spec]) for spec in ("x", "x:", "empty.pt:X", "folder:X", "os:path", "x.toml:X",
                                                     "\0:X")]


@pytest.fixture(scope="module")
def odd_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    for name, content in FILES.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            torch.save(content, folder / name)
    (folder / "folder").mkdir()
    (folder / "loop.pt").symlink_to("loop.pt")
    os.mkfifo(folder / "pipe.pt")
    return folder


@pytest.mark.parametrize("script, words", LINES, ids=lambda part: ascii(" ".join(part)) if isinstance(part, list)
                         else part.__name__)
def test_odd_command_lines(script, words, odd_files, monkeypatch, capsys):
    monkeypatch.chdir(odd_files)
    before = {path: path.read_bytes() for path in odd_files.iterdir() if path.is_file()}
    status, out, err = ended(script.main, words, capsys)
    assert status == 2 and err and "Traceback" not in err and "cannot download" not in err and len(err) < 3000
    assert {path: path.read_bytes() for path in before} == before and not (odd_files / "out.pt").exists()


def test_stdout_without_an_encoding(monkeypatch):
    """Where a notebook or a test has put an object of its own in its place."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: print("é"))
    assert stopped.value.code is None and sys.stdout.getvalue() == "é\n"
