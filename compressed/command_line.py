"""Parse command lines, run scripts, and report errors in one line with a defined exit status."""
import argparse
import contextlib
import functools
import importlib
import io
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from compressed import environment
from compressed.errors import BadInput, one_line


def command_line(text: str) -> argparse.ArgumentParser:
    """Return a parser whose help shows `text`, a script's docstring, unchanged, in up to 120 columns."""
    def wide(prog):
        return argparse.RawDescriptionHelpFormatter(prog, max_help_position=44, width=120)
    return argparse.ArgumentParser(description=text, formatter_class=wide)


def number(kind: type, low, high):
    """Return an argparse type: an int, a float or a Fraction from low to high."""
    def convert(text: str):
        try:
            if kind is not float and "e" in text.lower():
                raise ValueError("a Fraction of 1e-999999999 would fill the memory")
            value = kind(text)
        except (ValueError, ArithmeticError):
            value = None
        if value is None or not low <= value <= high:  # NaN is not
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r}: expected {what} from {low} to {high}")
        return value
    return convert


def option_name(dest: str) -> str:
    """Return an option as it is written on a command line: "--lr-max" for lr_max; lambda is a keyword of Python."""
    return "--lambda" if dest == "lam" else "--" + dest.replace("_", "-")


def some_text(text: str) -> str:
    """Return the text: an argparse type that refuses an empty one, as from a variable of a shell that is not set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a value, got an empty one")
    return text


def some_path(text: str) -> Path:
    """Return the path: an argparse type that refuses an empty one, which would mean the current folder."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError("expected the name of a file or folder, got an empty one")
    return Path(text)


def some_file(text: str) -> Path:
    """Return the path: an argparse type that refuses what can only be a folder, such as ".", ".." and "/"."""
    path = some_path(text)
    if path.name in ("", ".."):
        raise argparse.ArgumentTypeError(f"{text!r}: expected the name of a file, got that of a folder")
    return path


@functools.cache
def say_once(line: str) -> None:
    """Print a line to stderr, but each line only once per process."""
    complain(line)


def complain(line: str) -> None:
    """Print a line to stderr after the script's name; do nothing if stderr is closed."""
    with contextlib.suppress(OSError, ValueError):
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)


def needed(name: str):
    """Import and return a package only some scripts use. Raises BadInput if it is missing or does not work."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # of another version of numpy, of a broken one, or a warning under python -W error
        found = broken(name, error) or f"{name} is not installed"
        raise BadInput(f"{found}: pip install -r requirements.txt") from error


def broken(name: str, error: Exception) -> str | None:
    """Return the line about a package whose use ended in this error; None if it is not installed at all."""
    missing = isinstance(error, ModuleNotFoundError) and error.name == name
    return None if missing else f"{name} does not work here ({one_line(error)})"


def say_broken(name: str, error: Exception) -> None:
    """Print once that a package is not used because of this error; nothing if it is not installed at all."""
    if line := broken(name, error):
        say_once(line)


def progress_bar(**options):
    """Return a tqdm progress bar on stderr; None if stderr is no suitable terminal, or if tqdm does not work."""
    if not sys.stderr.isatty() or environment.text("TERM") == "dumb":
        return None
    try:
        from tqdm import tqdm
        return tqdm(**options)
    except Exception as error:
        say_broken("tqdm", error)
        return None


def with_progress(items: list, what: str):
    """Yield the items of long work, and print every ten seconds how many of them are done, and the time left."""
    began = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last >= 10:
            last, left = now, (now - began) / done * (len(items) - done)
            print(f"{what}: {done} of {len(items)}, {left:.0f} s left", flush=True)
        yield item


def end_at_once(*_) -> None:
    """Handle SIGINT while nothing can be lost: print one line and end the process, whatever it is doing."""
    complain("interrupted")
    os._exit(130)


# signals that end a script: SIGTERM, and SIGHUP when its terminal is closed (not on Windows)
ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def end_in_order(number: int, _) -> None:
    """Handle SIGTERM and SIGHUP like Ctrl-C: raise SystemExit, so that temporary files are removed on the way out."""
    complain(f"stopped by {signal.Signals(number).name}")
    sys.exit(128 + number)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for an error of numpy, of torch on a CPU, or of CUDA that says that there is not enough memory."""
    said = str(error)
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said


def run_script(main) -> None:
    """Run `main()` and exit with what it returns.

    BadInput, OSError and a lack of memory print one line and exit with status 2; Ctrl-C prints one line and exits with
    130, SIGTERM with 143, SIGHUP with 129. If the reader of stdout exits (`| head`), the script ends silently with
    status 141, like a program killed by SIGPIPE; 2 would mean that something contradicts a claim. Output to closed
    streams is discarded and does not change the status.
    """
    prepare_streams()
    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    ending = [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]
    for number in ending:
        signal.signal(number, end_in_order)
    try:
        status = status_of(main)
    finally:
        for number in ending:
            signal.signal(number, signal.SIG_DFL)
    sys.exit(status)


def status_of(main) -> int | None:
    """Return the exit status of `main()`, as `run_script` says, after all output is flushed."""
    status = None
    try:
        try:
            status = main()
        except SystemExit as ended:  # argparse
            status = ended.code
        sys.stdout.flush()
    except BrokenPipeError:
        status = status or 128 + 13  # as a shell reports SIGPIPE
    except (BadInput, OSError) as error:
        complain(str(error))
        status = 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        complain(f"there is not enough memory ({one_line(error)}): end other programs, or give a smaller --batch-size, "
                 "fewer --workers or images, or --no-cuda")
        status = 2
    except KeyboardInterrupt:
        complain("interrupted")
        status = 130
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # Python would try again at its end, and fail with a status of its own
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status


def prepare_streams() -> None:
    """Make stdout and stderr accept any text: closed ones discard it, and characters they cannot encode are escaped."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed: the next file that is opened takes its number, and what C libraries print
            stream = open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8")
            setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def parse_own(parser: argparse.ArgumentParser, argv=None) -> tuple[argparse.Namespace, list[str]]:
    """Return the parser's options of a command line, and the other words, which are for another script.

    Exits with an error for an abbreviation of one of the parser's options, which the other script might take for its.
    """
    parser.allow_abbrev = False
    args, others = parser.parse_known_args(argv)
    for name in (word.split("=")[0] for word in others):
        if meant := [option for option in parser._option_string_actions if option.startswith(name) and len(name) > 2]:
            parser.error(f"{name}: write it out ({' or '.join(meant)})")
    return args, others


def run_python(*words, stdout=None) -> int:
    """Run a script, or a module after "-m", in a new process, and return its exit status.

    Prints its command line to stderr first. Ctrl-C and SIGTERM are passed on as SIGTERM, at which training saves its
    state; when the process has ended, KeyboardInterrupt is raised. If another signal ended it, that is printed, and the
    status is that of a shell, 128 + its number. Must be called from the main thread.
    """
    words, stopped, process = [str(word) for word in words], [], None

    def stop(*_):
        stopped.append(True)
        if process:
            process.terminate()

    print(f"$ python {shlex.join(word.removeprefix(f'{Path.cwd()}/') for word in words)}", file=sys.stderr, flush=True)
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)
              if signal.getsignal(number) is not signal.SIG_IGN}
    # the process inherits a blocked SIGINT: a terminal's Ctrl-C reaches it too, and would end it without saving
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process = subprocess.Popen([sys.executable, *words], stdout=stdout)
        if stopped:
            process.terminate()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        status = process.wait()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        raise KeyboardInterrupt
    if status < 0:
        complain(f"{Path(words[words[0] == '-m']).name} was ended by {signal.Signals(-status).name}"
                 + " (is there enough memory?)" * (-status == signal.SIGKILL))
        return 128 - status
    return status
