"""What every script needs: a command line whose mistakes are named, and an end in one clear line."""
import argparse
import contextlib
import functools
import io
import os
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
