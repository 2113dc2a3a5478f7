"""Read and check environment variables; nothing else in the project reads one.

    CIFAR100_DIR, TEACHERS_DIR      folders of data, in place of an option
    CC                              the C compiler and its options, as for make
    RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT
                                    of one process among several: torchrun sets all of them
    TERM                            "dumb": no progress bars
    MPLBACKEND                      replaced: figures are drawn into files

An empty variable counts as one that is not set. A value that cannot be raises BadInput with the variable's name.
"""
import os
from pathlib import Path

from compressed.errors import BadInput, refused


def text(name: str) -> str | None:
    """Return the value of a variable; None if it is empty or not set."""
    return os.environ.get(name, "").strip() or None


def integer(name: str, low: int) -> int | None:
    """Return the whole number, `low` or more, in a variable; None if it is not set."""
    if (value := text(name)) is None:
        return None
    with refused(f"the environment variable {name} is {value[:30]!r}, expected a whole number from {low}"):
        if int(value) < low:
            raise ValueError("torchrun sets it; unset it to train in one process")
        return int(value)


def folder(name: str) -> Path | None:
    """Return the absolute path in a variable; None if it is not set."""
    value = text(name)
    return None if value is None else Path(os.path.expanduser(value)).absolute()  # Path's own may raise


def processes() -> tuple[int, int, int]:
    """Return (rank, number of processes, rank on this machine); (0, 1, 0) for a process that torchrun did not start.

    Raises BadInput if torchrun's variables are incomplete, or contradict each other.
    """
    rank, count, local = integer("RANK", 0), integer("WORLD_SIZE", 1), integer("LOCAL_RANK", 0)
    several = count is not None and count > 1
    if several and None in (rank, local) or (rank or 0) >= (count or 1):
        raise BadInput(f"the environment variables RANK={rank}, WORLD_SIZE={count}, LOCAL_RANK={local} contradict each "
                       "other: torchrun sets them; start several processes with it, or unset them to train in one")
    return rank or 0, count or 1, local or 0


def draw_into_files() -> None:
    """Make matplotlib, when it is imported, draw into files, whatever a notebook has set: that may not exist here."""
    os.environ["MPLBACKEND"] = "Agg"
