"""Time the network's 17 depthwise convolutions, forward and backward: bfloat16, float32 and, on a CPU, kernels.c.

    python -m benchmarks.depthwise_shapes [--batch-size B] [--rounds 10] [--json F]

All are channels-last. The fastest variant depends on shape, stride and direction: oneDNN, for example, has no fast
bfloat16 kernel for the input's gradient of a convolution with a stride.
"""
import statistics

import torch
import torch.nn.functional as F

from benchmarks.common import add_options, begin, seconds
from compressed import kernels
from compressed.cifar100 import IMAGE_SIZE
from compressed.command_line import command_line, run_script
from compressed.files import save_json
from mobilenet_v2 import MobileNetV2
from training.cpu_kernels import Convolve

COMPILED = "bfloat16 compiled"
VARIANTS = {"bfloat16": torch.bfloat16, "float32": torch.float32, COMPILED: torch.bfloat16}
PARTS = "forward", "backward"


def shapes() -> list[tuple[int, int, int]]:
    """Return (channels, height and width of the input, stride) of every block's depthwise convolution."""
    found, side = [], IMAGE_SIZE
    for block in MobileNetV2().layers:
        conv = block.conv2
        found.append((conv.out_channels, side, conv.stride[0]))
        side //= conv.stride[0]
    return found


def measure(name: str, channels: int, side: int, stride: int, batch: int, device, rounds: int) -> dict[str, float]:
    """Return the median seconds of a variant, {"forward", "backward"}, after two calls that are not counted."""
    dtype = VARIANTS[name]
    x = torch.randn(batch, channels, side, side, device=device, dtype=dtype)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(channels, 1, 3, 3, device=device, dtype=None if name == COMPILED else dtype).requires_grad_()

    def forward():
        return (Convolve.apply(x, weight, stride) if name == COMPILED
                else F.conv2d(x, weight, None, stride, 1, 1, channels))

    out = forward()
    gradient = torch.ones_like(out)

    def backward():
        torch.autograd.grad(out, (x, weight), gradient, retain_graph=True)

    return {part: statistics.median([seconds(work, device) for _ in range(rounds + 2)][2:])
            for part, work in zip(PARTS, (forward, backward))}


def main(argv=None) -> int:
    parser = command_line(__doc__)
    add_options(parser, "512 on CUDA, else 64", rounds=10)
    args = parser.parse_args(argv)
    device, machine = begin(args)  # on a CPU one thread, as a worker of training has
    batch = args.batch_size or (512 if device.type == "cuda" else 64)
    here = [name for name in VARIANTS
            if name != COMPILED or device.type == "cpu" and kernels.library(torch.bfloat16) is not None]
    print(f"batch {batch}; forward + backward in ms\n{'channels, side, stride':<22}"
          + "".join(f"{name:>20}" for name in here))

    def show(what: str, rows: list[dict]) -> None:
        sums = [[1000 * sum(row[name][part] for row in rows) for part in PARTS] for name in here]
        print(f"{what:<22}" + "".join(f"{forward:>11.2f} +{backward:>7.2f}" for forward, backward in sums), flush=True)

    rows = []
    for shape in shapes():
        rows.append(dict(zip(("channels", "side", "stride"), shape))
                    | {name: measure(name, *shape, batch, device, args.rounds) for name in here})
        show("{:>8}{:>6}{:>8}".format(*shape), rows[-1:])
    show("all", rows)
    show("with a stride", [row for row in rows if row["stride"] > 1])
    if args.json:
        save_json({"machine": machine, "batch_size": batch, "shapes": rows}, args.json)
    return 0


if __name__ == "__main__":
    run_script(main)
