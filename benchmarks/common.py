"""Choose and describe the device of a benchmark, and time its alternatives in turn."""
import statistics
import time

import torch

from compressed import threads
from compressed.command_line import number, some_path
from compressed.files import try_to_write


def add_options(parser, batch_size: str, rounds: int | None = 3) -> None:
    """Add --batch-size, --rounds (unless that is None), --no-cuda and --json. batch_size: text on its default."""
    parser.add_argument("--batch-size", type=number(int, 2, 10**6), metavar="B",
                        help=f"images per step (default: {batch_size})")
    if rounds:
        parser.add_argument("--rounds", type=number(int, 1, 10**6), default=rounds, metavar="R",
                            help="times that each alternative is measured (%(default)s)")
    parser.add_argument("--no-cuda", action="store_true", help="use the CPU even if there is a CUDA device")
    parser.add_argument("--json", type=some_path, metavar="F", help="also write the results to F")


def begin(args) -> tuple[torch.device, dict]:
    """Return (device, description of the machine), which is printed. Raises BadInput if --json cannot be written."""
    if args.json:
        try_to_write(args.json)
    device = threads.use_device(args.no_cuda)
    machine = threads.describe_machine(device)
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    threads.prepare()
    return device, machine


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work, device: torch.device) -> float:
    """Return how long work() takes, until the device has finished it."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def in_turn(loops: dict, rounds: int) -> dict[str, list[float]]:
    """Return {name: images/s in each round} of {name: function that measures it}; prints every round."""
    speeds = {name: [] for name in loops}
    for turn in range(rounds):
        for name, measure in loops.items():
            speeds[name].append(measure())
        print(f"round {turn + 1}: " + ", ".join(f"{name} {found[-1]:,.1f} images/s" for name, found in speeds.items()),
              flush=True)
    return speeds


def ratios_of(speeds: dict[str, list[float]], wanted: dict[str, tuple[str, str]]) -> dict[str, float]:
    """Print and return {name: median of the rounds' ratios}. wanted: {name: (speed, divided by which)}."""
    found = {name: statistics.median(a / b for a, b in zip(speeds[above], speeds[below]))
             for name, (above, below) in wanted.items() if {above, below} <= speeds.keys()}
    for name, ratio in found.items():
        print(f"{name}: {ratio:.2f}")
    return found
