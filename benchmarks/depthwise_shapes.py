"""The 17 depthwise convolutions of the network, forward and backward, in both memory formats.

    python benchmarks/depthwise_shapes.py [--batch-size 512] [--precision bfloat16] [--json F]

Channels-last goes to cuDNN, contiguous (NCHW) to PyTorch's own kernel: which is faster depends on the shape. Beside each
time stands the share of the memory's bandwidth (a large copy's, measured here) that it reaches: forward the input is
read and the output written; backward the output's gradient is read twice, the input once, and its gradient written.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.training_speed import copy_bandwidth, synchronize  # noqa: E402
from files import run_script, save_json  # noqa: E402
from mobilenet_v2 import IMAGE_SIZE, MobileNetV2  # noqa: E402
from training import loop, main as training_main  # noqa: E402

FORMATS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}


def shapes() -> list[tuple[int, int, int]]:
    """(channels, side of the input, stride) of every block's depthwise convolution."""
    found, side = [], IMAGE_SIZE
    for block in MobileNetV2().layers:
        conv = block.conv2
        found.append((conv.out_channels, side, conv.stride[0]))
        side //= conv.stride[0]
    return found


def seconds(call, device: torch.device, rounds: int) -> float:
    """Median, after two calls that are not counted."""
    times = []
    for i in range(rounds + 2):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=512, help="(%(default)s)")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="(%(default)s)")
    parser.add_argument("--no-cuda", action="store_true")
    parser.add_argument("--json", metavar="F", help="write the figures to F as well")
    args = parser.parse_args(argv)
    for name in ("batch_size", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu")
    dtype = getattr(torch, args.precision)
    bandwidth = copy_bandwidth(device, 2048 if device.type == "cuda" else 256)
    machine = training_main.describe_machine(device, loop.Processes())
    print(f"{machine}; batch {args.batch_size}, {args.precision}; a copy moves {bandwidth / 1e9:,.0f} GB/s")
    print(f"{'channels':>8}{'side':>6}{'stride':>8}  " + "".join(f"{name + ', ms':>20}{'share':>8}" for name in FORMATS) + f"{'ratio':>8}")
    rows = []
    for channels, side, stride in shapes():
        row = {"channels": channels, "side": side, "stride": stride}
        inputs, outputs = channels * side**2, channels * (side // stride) ** 2
        for name, memory_format in FORMATS.items():
            x = torch.randn(args.batch_size, channels, side, side, device=device, dtype=dtype)
            x = x.to(memory_format=memory_format).requires_grad_()
            weight = torch.randn(channels, 1, 3, 3, device=device, dtype=dtype).requires_grad_()
            gradient = torch.ones_like(F.conv2d(x, weight, None, stride, 1, 1, channels))

            def step():
                torch.autograd.grad(F.conv2d(x, weight, None, stride, 1, 1, channels), (x, weight), gradient)

            row[name] = seconds(step, device, args.rounds)
            moved = args.batch_size * (3 * inputs + 3 * outputs) * dtype.itemsize
            row[f"{name}, share"] = moved / bandwidth / row[name]
        rows.append(row)
        print(f"{channels:>8}{side:>6}{stride:>8}  " + "".join(f"{1000 * row[name]:>20.3f}{row[f'{name}, share']:>8.1%}" for name in FORMATS)
              + f"{row['contiguous'] / row['channels-last']:>8.2f}", flush=True)
    sums = {name: sum(row[name] for row in rows) for name in FORMATS}
    best = sum(min(row[name] for name in FORMATS) for row in rows)
    print("all: " + ", ".join(f"{name} {1000 * total:.3f} ms" for name, total in sums.items()) + f", the faster of each {1000 * best:.3f} ms")
    if args.json:
        save_json({"machine": machine, "batch_size": args.batch_size, "precision": args.precision,
                   "copy_bytes_per_second": bandwidth, "shapes": rows}, args.json)
    return 0


if __name__ == "__main__":
    run_script(main)
