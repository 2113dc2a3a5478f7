"""What every script needs: a command line whose mistakes are named, and an end in one clear line."""
import argparse
import contextlib
import functools
import io
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from compressed.errors import BadInput


def command_line(text: str) -> argparse.ArgumentParser:
    """A parser that shows `text`, a script's head, as it stands, and an option a line where that fits 120 columns."""
    def wide(prog):
        return argparse.RawDescriptionHelpFormatter(prog, max_help_position=44, width=120)
    return argparse.ArgumentParser(description=text, formatter_class=wide)


def number(kind: type, low, high):
    """An argparse type: an int or a float from low to high."""
    def convert(text: str):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = None
        if value is None or not low <= value <= high:  # NaN is not
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r}: expected {what} from {low} to {high}")
        return value
    return convert


def some_path(text: str) -> Path:
    """An argparse type: a path that is not empty, which would mean the current folder."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError("expected the name of a file or folder, and not nothing")
    return Path(text)


@functools.cache
def say_once(line: str) -> None:
    """Print a line to stderr, the first time that it is said."""
    complain(line)


def complain(line: str) -> None:
    """Print a line to stderr, after the script's name, if anybody can read it."""
    with contextlib.suppress(OSError, ValueError):
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)


GONE = 128 + 13  # what a shell reports of a process that SIGPIPE ended: the reader of our output has gone


def run_script(main) -> None:
    """Run `main()` and exit with what it returns.

    Input that the user can mend becomes one line and status 2. Ctrl-C: one line, 130. A reader of stdout that goes away
    (`| head`) ends the script without a word, with status 141 as for any program that SIGPIPE ends, and never with 2,
    which says that something contradicts a claim. Closed streams are written to nobody, and change no status.
    """
    prepare_streams()
    try:
        status = main()
    except SystemExit as ended:  # argparse
        status = ended.code
    except BrokenPipeError:
        status = GONE
    except (BadInput, OSError) as error:
        complain(str(error))
        status = 2
    except KeyboardInterrupt:
        complain("interrupted")
        status = 130
    sys.exit(flushed(status))


def parse_own(parser: argparse.ArgumentParser, argv=None) -> tuple[argparse.Namespace, list[str]]:
    """Return the parser's options of a command line, and the other words, which are another script's.

    Ends with an error for an abbreviation of an own option: the other script might take it for one of its own.
    """
    parser.allow_abbrev = False
    args, others = parser.parse_known_args(argv)
    own = [option for action in parser._actions for option in action.option_strings]
    for word in others:
        name = word.split("=")[0]
        meant = [option for option in own if option.startswith(name) and len(name) > 2]
        if meant:
            parser.error(f"{name}: write it out ({' or '.join(meant)})")
    return args, others


def run_python(*words, stdout=None) -> int:
    """Run a script, or a module after "-m", as a process of its own, and return its exit status.

    Its command line is printed to stderr first. Ctrl-C and SIGTERM reach it as SIGTERM, at which a training writes its
    state; once it has ended, KeyboardInterrupt is raised. To be called from the main thread.
    """
    words, stopped, process = [str(word) for word in words], [], None

    def stop(*_):
        stopped.append(True)
        if process:
            process.terminate()

    shown = [word.removeprefix(f"{Path.cwd()}/") for word in words]
    print(f"$ python {shlex.join(shown)}", file=sys.stderr, flush=True)
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    # the process inherits a blocked SIGINT: a terminal's Ctrl-C reaches it too, and would end it without saving
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        try:
            process = subprocess.Popen([sys.executable, *words], stdout=stdout)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if stopped:
            process.terminate()
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        raise KeyboardInterrupt
    return status


def prepare_streams() -> None:
    """Make stdout and stderr take any text: none is closed, and what their encoding lacks is written as \\xe9 or so."""
    with contextlib.suppress(OSError):
        for number in range(3):
            try:
                os.fstat(number)
            except OSError:  # closed: the next file that is opened would be written to by every print of a C library
                os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        if isinstance(getattr(sys, name), io.TextIOWrapper):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def flushed(status):
    """Return the status of a script once all that it printed has left, or what hindered that."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        status = status or GONE
    except OSError as error:
        complain(f"its output could not be written ({error.strerror})")
        status = status or 2
    except ValueError:  # closed by whoever called us
        pass
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # Python would try again at its end, and fail with a status of its own
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status
