"""Read and check environment variables; nothing else in the project reads one.

    CIFAR100_DIR, TEACHERS_DIR      folders of data, in place of an option
    CC                              the C compiler and its options, as for make
    RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT
                                    of one process among several: torchrun sets all of them
    TERM                            "dumb": no progress bars
    MPLBACKEND                      replaced: figures are drawn into files

An empty variable counts as one that is not set. Whatever a variable cannot be raises BadInput with its name.
"""
import os
import shlex
from pathlib import Path

from compressed.errors import BadInput

TORCHRUN = "torchrun sets it; unset it to train in one process"


def text(name: str) -> str | None:
    """Return the value of a variable; None if it is empty or not set."""
    return os.environ.get(name, "").strip() or None


def whole(name: str, low: int, high: int = 2**31 - 1) -> int | None:
    """Return the whole number from `low` to `high` in a variable; None if it is not set."""
    value = text(name)
    if value is None:
        return None
    if not (value.isascii() and value.isdecimal() and len(value) <= 10 and low <= int(value) <= high):
        raise BadInput(f"the environment variable {name} is {value[:30]!r}, expected a whole number from {low} to "
                       f"{high}; {TORCHRUN}")
    return int(value)


def folder(name: str) -> Path | None:
    """Return the absolute path in a variable; None if it is not set."""
    value = text(name)
    return None if value is None else Path(os.path.expanduser(value)).absolute()  # Path's own may raise


def compiler() -> list[str]:
    """Return the words of the C compiler's command: those of CC, or cc."""
    value = text("CC") or "cc"
    try:
        return shlex.split(value)
    except ValueError as error:
        raise BadInput(f"the environment variable CC is {value[:200]!r}, which is no command ({error})") from error


def processes() -> tuple[int, int, int]:
    """Return (rank, number of processes, rank on this machine); (0, 1, 0) for a process that torchrun did not start.

    Raises BadInput if some of torchrun's variables are missing, or contradict each other.
    """
    rank, count, local = whole("RANK", 0), whole("WORLD_SIZE", 1), whole("LOCAL_RANK", 0)
    if rank is None and count in (None, 1):
        return 0, 1, 0
    needed = {"RANK": rank, "WORLD_SIZE": count}
    if (count or 1) > 1:
        needed |= {"LOCAL_RANK": local, "MASTER_ADDR": text("MASTER_ADDR"),
                   "MASTER_PORT": whole("MASTER_PORT", 1, 65535)}
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        there = next(name for name in ("RANK", "WORLD_SIZE") if needed[name] is not None)
        raise BadInput(f"the environment variable {there} is set, but not {', '.join(missing)}: torchrun sets them "
                       f"all; start several processes with it, or unset {there} to train in one")
    if rank >= count:
        raise BadInput(f"the environment variable RANK is {rank}, but there are {count} processes (WORLD_SIZE); "
                       + TORCHRUN)
    return rank, count, local or 0


def processes_here() -> int:
    """Return the number of torchrun's processes on this machine."""
    return whole("LOCAL_WORLD_SIZE", 1) or 1


def is_dumb_terminal() -> bool:
    return text("TERM") == "dumb"


def draw_into_files() -> None:
    """Make matplotlib, when it is imported, draw into files, whatever a notebook has set: that may not exist here."""
    os.environ["MPLBACKEND"] = "Agg"
