"""What every script needs: a command line whose mistakes are named, and an end in one clear line."""
import argparse
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
