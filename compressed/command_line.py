"""What every script needs: a command line whose mistakes are named, and an end in one clear line."""
import argparse
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
