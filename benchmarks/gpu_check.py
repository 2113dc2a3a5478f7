"""Check a GPU in a minute: kernels against PyTorch's, whole steps as CUDA graphs, and the tests that need a GPU.

    python -m benchmarks.gpu_check [--batch-size 256] [--seconds 80] [--compile] [--out gpu_check.json]

1. Every layer of MobileNetV2 and SmallMobileNetV2 that training/triton_kernels.py can compute: time forward and
   backward as a CUDA graph, against PyTorch's, and the distance between their results.
2. Whole training steps of both networks as CUDA graphs, with and without these kernels: images/s.
3. The tests marked `cuda`.

The file is written after every part, so that it holds what was found even if a later part fails. No part begins after
--seconds. --compile adds steps with torch.compile, which takes a minute more.
"""
import contextlib
import importlib
import importlib.util
import math
import subprocess
import sys
import time

import torch

from benchmarks.profile_step import WARM_UP, stage_on_made_up_images
from compressed import networks, threads
from compressed.command_line import command_line, number, run_script, some_path
from compressed.errors import BadInput
from compressed.files import save_json, try_to_write
from training import gpu_kernels
from training.cpu_kernels import normalisations

NETWORKS = "mobilenet_v2:MobileNetV2", "mobilenet_v2:SmallMobileNetV2"
STEPS = 30
# Passes over the map of a layer that forward and backward make at least, in maps of the input's or the output's size:
# to read x and write y; to read dy and write dx; and to read x and dy once more for the weights' gradients
PASSES = {"depthwise": (3, 3), "BatchNorm": (4, 4)}


def layers(network: str, sizes, batch: int, device: torch.device, captured: bool) -> dict[gpu_kernels.Layer, int]:
    """Return {layer: how often it occurs} of a network at these image sizes."""
    importlib.import_module("training.triton_kernels")  # registers the operators
    model, counts = networks.make(network).to(device, memory_format=torch.channels_last), {}
    found = gpu_kernels.layers_of(model, normalisations(model), sizes, batch=batch, dtype=torch.bfloat16, device=device,
                                  captured=captured)
    for layer in (layer for several in found.values() for layer in several):
        counts[layer] = counts.get(layer, 0) + 1
    return counts


def check_layers(network: str, size: int, batch: int, device: torch.device, until: float) -> list[dict]:
    """Print and return a row for every layer of a network that is timed before `until`, and their sums."""
    rows = []
    print(f"{network}, {size}x{size}, batch {batch}; forward + backward, all layers of a shape\n"
          f"{'layer':>30}{'PyTorch':>10}{'Triton':>10}{'ratio':>7}{'GB/s':>7}{'distance':>10}")
    for layer, count in layers(network, [size], batch, device, captured=True).items():
        if time.monotonic() > until:
            print("out of time")
            break
        found = gpu_kernels.measured(layer)
        side_in, side_out = layer.height * layer.width, math.prod((s - 1) // layer.stride + 1
                                                                  for s in (layer.height, layer.width))
        values = batch * layer.channels * sum(n * side for n, side in zip(PASSES[layer.kind], (side_in, side_out)))
        name = f"{count} {layer.kind} {layer.channels}x{layer.height} {layer.activation}/{layer.stride}"
        rows.append({"kind": layer.kind, "channels": layer.channels, "side": layer.height, "stride": layer.stride,
                     "activation": layer.activation, "count": count, "tilings": tilings(layer),
                     **{key: value for key, value in found.items() if value != math.inf}})
        print(f"{name:>30}{1e6 * count * found['pytorch']:>10.0f}{1e6 * count * found['ours']:>10.0f}"
              f"{found['pytorch'] / found['ours']:>7.2f}{2 * values / found['ours'] / 1e9:>7.0f}"
              f"{found.get('distance', math.nan):>10.1e} us", flush=True)
    for kind in PASSES:
        theirs, best = (sum(row["count"] * choice(row["pytorch"], row.get("ours", math.inf)) for row in rows
                            if row["kind"] == kind) for choice in (lambda a, b: a, min))
        print(f"{kind}: PyTorch {1000 * theirs:.2f} ms a step, the faster of both {1000 * best:.2f} ms")
    return rows


def tilings(layer: gpu_kernels.Layer) -> dict:
    """Return {operator: the tiling chosen for it} of a layer."""
    triton_kernels = importlib.import_module("training.triton_kernels")
    shape = layer.channels, layer.height, layer.width, layer.stride
    return {operator: tiling for (operator, *key), tiling in triton_kernels.chosen.items() if tuple(key) == shape}


def step_speed(network: str, size: int, batch: int, device: torch.device, kinds, *options: str) -> dict:
    """Return {"seconds" of a step, "loss": mean of all steps, "set_up": seconds before} with these kinds of kernels."""
    began, before = time.monotonic(), gpu_kernels.KINDS
    gpu_kernels.KINDS = kinds
    try:
        with stage_on_made_up_images(network, batch, size, WARM_UP + STEPS, device, *options) as stage:
            for i in range(WARM_UP):
                stage.step(0, i)
            torch.cuda.synchronize()
            set_up, started = time.monotonic() - began, time.monotonic()
            for i in range(STEPS):
                stage.step(0, WARM_UP + i)
            torch.cuda.synchronize()
            seconds = (time.monotonic() - started) / STEPS
            return {"seconds": seconds, "images_per_second": batch / seconds, "set_up": set_up,
                    "loss": stage.totals[0].item() / (WARM_UP + STEPS), "recorded": len(stage.graphs.graphs)}
    finally:
        gpu_kernels.KINDS = before


def check_steps(network: str, batch: int, device: torch.device, compiled: bool) -> dict:
    """Print and return the speed of whole steps, with and without the kernels."""
    found = {}
    for name, kinds, options in (("PyTorch", (), ["--no-compile"]), ("Triton", gpu_kernels.KINDS, ["--no-compile"]),
                                 ("Triton depthwise", ("depthwise",), ["--no-compile"]),
                                 *[("compiled, PyTorch", (), []), ("compiled, Triton", gpu_kernels.KINDS, []),
                                   ("compiled, Triton depthwise", ("depthwise",), [])] * compiled):
        try:
            found[name] = step_speed(network, 32, batch, device, kinds, *options)
            print("{}, {}: {images_per_second:,.0f} images/s, loss {loss:.3f}, set-up {set_up:.1f} s".format(
                network, name, **found[name]), flush=True)
        except Exception as error:  # what fails on new hardware is what this script is to find
            found[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
            print(f"{network}, {name}: {found[name]['error']}", flush=True)
    return found


def run_tests(seconds: float) -> str:
    """Return the last lines of the tests that need a GPU, run in a process of their own."""
    if importlib.util.find_spec("pytest") is None:
        return "pytest is not installed"
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider",
               "tests/test_triton_kernels.py", "tests/test_cuda_graphs.py"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        return "\n".join((done.stdout + done.stderr).splitlines()[-40:])
    return f"not finished after {seconds:.0f} s"


def main(argv=None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--batch-size", type=number(int, 2, 10**6), default=256, help="(%(default)s)")
    parser.add_argument("--seconds", type=number(float, 1, 10**6), default=80, help="(%(default)s)")
    parser.add_argument("--compile", action="store_true", help="steps with torch.compile, too")
    parser.add_argument("--out", type=some_path, metavar="F", help="write the figures to F")
    args = parser.parse_args(argv)
    if args.out:
        try_to_write(args.out)
    if not torch.cuda.is_available():
        raise BadInput("there is no CUDA device; on a CPU run pytest tests/test_triton_kernels.py")
    began, device = time.monotonic(), torch.device("cuda", torch.cuda.current_device())  # as tensors name it
    threads.prepare()
    found = {"machine": threads.describe_machine(device), "batch_size": args.batch_size, "layers": {}, "steps": {}}
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items()), flush=True)

    def left() -> float:
        return args.seconds - (time.monotonic() - began)

    def keep() -> None:
        found["seconds"] = time.monotonic() - began
        if args.out:
            save_json(found, args.out)

    for network, size in ((NETWORKS[0], 32), (NETWORKS[1], 32), (NETWORKS[0], 24)):
        if left() > 0.4 * args.seconds:  # the steps need the rest
            found["layers"][f"{network}, {size}"] = check_layers(network, size, args.batch_size, device,
                                                                 began + 0.6 * args.seconds)
            keep()
    for network in NETWORKS:
        if left() > 5:
            found["steps"][network] = check_steps(network, args.batch_size, device, args.compile)
            keep()
    if left() > 10:
        found["tests"] = run_tests(left())
        print(found["tests"])
    keep()
    print(f"{found['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    run_script(main)
