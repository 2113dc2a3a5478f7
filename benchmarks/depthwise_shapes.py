"""Time the network's 17 depthwise convolutions, forward and backward: bfloat16, float32 and, on a CPU, kernels.c.

    python -m benchmarks.depthwise_shapes [--batch-size B] [--rounds 10] [--json F]

All are channels-last. The fastest variant depends on shape, stride and direction: oneDNN, for example, has no fast
bfloat16 kernel for the input's gradient of a convolution with a stride.
"""
import statistics
import time

import torch
import torch.nn.functional as F

from benchmarks.training_speed import synchronize
from compressed import kernels
from compressed.cifar100 import IMAGE_SIZE
from compressed.command_line import command_line, number, run_script, some_path
from compressed.files import save_json, try_to_write
from compressed.threads import describe_machine, prepare
from mobilenet_v2 import MobileNetV2
from training.cpu_kernels import Convolve

COMPILED = "bfloat16 compiled"
VARIANTS = {"bfloat16": torch.bfloat16, "float32": torch.float32, COMPILED: torch.bfloat16}


def shapes() -> list[tuple[int, int, int]]:
    """Return (channels, height and width of the input, stride) of every block's depthwise convolution."""
    found, side = [], IMAGE_SIZE
    for block in MobileNetV2().layers:
        conv = block.conv2
        found.append((conv.out_channels, side, conv.stride[0]))
        side //= conv.stride[0]
    return found


def measure(name: str, channels: int, side: int, stride: int, batch: int, device, rounds: int) -> tuple[float, float]:
    """Return the median seconds (forward, backward) of a variant, after two calls that are not counted."""
    dtype = VARIANTS[name]
    x = torch.randn(batch, channels, side, side, device=device, dtype=dtype)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(channels, 1, 3, 3, device=device, dtype=None if name == COMPILED else dtype).requires_grad_()
    times, gradient = ([], []), None
    for _ in range(rounds + 2):
        marks = []
        for part in range(3):
            synchronize(device)
            marks.append(time.perf_counter())
            if part == 0:
                out = (Convolve.apply(x, weight, stride) if name == COMPILED
                       else F.conv2d(x, weight, None, stride, 1, 1, channels))
                gradient = torch.ones_like(out) if gradient is None else gradient
            elif part == 1:
                torch.autograd.grad(out, (x, weight), gradient)
        for kind, start, end in zip(times, marks, marks[1:]):
            kind.append(end - start)
    return statistics.median(times[0][2:]), statistics.median(times[1][2:])


def main(argv=None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--batch-size", type=number(int, 1, 10**6), help="(default: 512 on CUDA, else 64)")
    parser.add_argument("--rounds", type=number(int, 1, 10**6), default=10, help="(%(default)s)")
    parser.add_argument("--no-cuda", action="store_true")
    parser.add_argument("--json", type=some_path, metavar="F", help="write the figures to F as well")
    args = parser.parse_args(argv)
    if args.json:
        try_to_write(args.json)
    prepare()  # on a CPU one thread, as a worker of training has
    device = torch.device("cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu")
    batch = args.batch_size or (512 if device.type == "cuda" else 64)
    machine = describe_machine(device)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"batch {batch}; forward + backward in ms")
    here = [name for name in VARIANTS
            if name != COMPILED or device.type == "cpu" and kernels.library(torch.bfloat16) is not None]
    print(f"{'channels':>8}{'side':>6}{'stride':>8}" + "".join(f"{name:>20}" for name in here))
    rows = []
    for channels, side, stride in shapes():
        row = {"channels": channels, "side": side, "stride": stride}
        for name in here:
            forward, backward = measure(name, channels, side, stride, batch, device, args.rounds)
            row[name] = {"forward": forward, "backward": backward}
        rows.append(row)
        print(f"{channels:>8}{side:>6}{stride:>8}" + "".join(
            f"{1000 * row[name]['forward']:>11.2f} +{1000 * row[name]['backward']:>7.2f}" for name in here), flush=True)
    for what, chosen in (("all", rows), ("with a stride", [row for row in rows if row["stride"] > 1])):
        print(f"{what:<22}" + "".join(f"{1000 * sum(row[name]['forward'] for row in chosen):>11.2f} +"
                                      f"{1000 * sum(row[name]['backward'] for row in chosen):>7.2f}"
                                      for name in here))
    if args.json:
        save_json({"machine": machine, "batch_size": batch, "shapes": rows}, args.json)
    return 0


if __name__ == "__main__":
    run_script(main)
