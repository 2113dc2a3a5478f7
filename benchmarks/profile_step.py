"""Profile training steps: a table of the kernels of a GPU, or of a CPU's operators, by time.

    python -m benchmarks.profile_step [--network N] [--batch-size B] [--size S] [--teacher] [--json F]

A step is that of training/loop.py with Muon on made-up images; on CUDA it runs as a CUDA graph, and the table has the
kernels on the device. The first steps, which compile and record, are not counted.
"""
import contextlib
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import add_options, begin, synchronize
from compressed import cifar100, kaist, networks
from compressed.command_line import command_line, number, run_script
from compressed.files import save_json
from training import arguments, gpu_kernels, loop, plan, teachers

WARM_UP = 4  # steps: compile, record, replay
LONGEST = 40  # operations in the table


@contextlib.contextmanager
def stage_on_made_up_images(network: str, batch_size: int, size: int, steps: int, device: torch.device, *options: str,
                            taught: bool = False, kernels=gpu_kernels.KINDS):
    """Yield a stage that can make this many steps, with its kernels in use. options: of training/main.py."""
    words = ["--epochs", "1", "--batch-size", str(batch_size), "--optimizer", "muon", "--average", "0.999"]
    words += ["--sizes", "32" if size == 32 else f"{size}:0.999999,32"]
    settings = arguments.settings_for("pretrain", arguments.parse([*words, *options]), device)
    torch.manual_seed(0)
    model = networks.make(network).to(device, memory_format=torch.channels_last)
    teacher = teachers.fold_batchnorm(kaist.Micronet().eval()).to(device, memory_format=torch.channels_last)
    data = cifar100.made_up(batch_size * (steps + 1), seed=0, device=device)  # the last step may have another size
    with tempfile.TemporaryDirectory() as folder:
        stage = loop.Stage("profile", model, data, settings, Path(folder), teachers=[teacher] * taught,
                           kernels=kernels)
        stage.resume(False, 0)
        with stage.fast_kernels():
            stage.begin(0)
            yield stage


def kernel_table(stage: loop.Stage, steps: int, device: torch.device) -> list[dict]:
    """Return [{"name", "calls", "seconds"}] per step of the device's kernels or the CPU's operators, longest first."""
    cuda = device.type == "cuda"
    for i in range(WARM_UP):
        stage.step(0, i)
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][:1 + cuda]) as profiler:
        for i in range(steps):
            stage.step(0, WARM_UP + i)
        synchronize(device)
    rows = []
    for event in profiler.key_averages():
        if (event.device_type == torch.autograd.DeviceType.CUDA) == cuda:
            micros = event.self_device_time_total if cuda else event.self_cpu_time_total
            rows.append({"name": event.key, "calls": event.count / steps, "seconds": micros / 1e6 / steps})
    return sorted((row for row in rows if row["seconds"] > 0), key=lambda row: -row["seconds"])


def as_text(rows: list[dict]) -> str:
    """Return the table of the longest, and the sum of all."""
    def added(rows: list[dict], name: str) -> dict:
        return {"name": name, **{key: sum(row[key] for row in rows) for key in ("seconds", "calls")}}

    total, rest = added(rows, "in a step"), rows[LONGEST:]
    lines = [*rows[:LONGEST], *([added(rest, f"{len(rest)} others")] if rest else []), total]
    return f"{'ms':>9}{'share':>8}{'calls':>8}  name\n" + "".join(
        f"{1000 * row['seconds']:>9.3f}{row['seconds'] / total['seconds']:>8.1%}{row['calls']:>8.1f}  "
        f"{row['name'][:90]}\n" for row in lines)


def main(argv=None) -> int:
    parser = command_line(__doc__)
    networks.add_option(parser)
    add_options(parser, "256 on CUDA, else 32", rounds=None)
    parser.add_argument("--size", type=int, choices=(8, 16, 24, 32), default=32, help="of the images (%(default)s)")
    parser.add_argument("--steps", type=number(int, 1, 10**4), default=5, help="profiled steps (%(default)s)")
    parser.add_argument("--teacher", action="store_true", help="distil from a teacher")
    plan.add_precision(parser)
    parser.add_argument("--no-kernels", action="store_true", help="without training/gpu_kernels.py")
    args = parser.parse_args(argv)
    device, machine = begin(args)
    batch = args.batch_size or (256 if device.type == "cuda" else 32)
    options = ["--precision", args.precision]
    with stage_on_made_up_images(args.network, batch, args.size, WARM_UP + args.steps, device, *options,
                                 taught=args.teacher, kernels=() if args.no_kernels else gpu_kernels.KINDS) as stage:
        rows = kernel_table(stage, args.steps, device)
    print(f"{args.network}, batch {batch}, {args.size}x{args.size}\n{as_text(rows)}", end="")
    if args.json:
        save_json({"machine": machine, "network": args.network, "batch_size": batch, "size": args.size,
                   "kernels": rows}, args.json)
    return 0


if __name__ == "__main__":
    run_script(main)
