"""Check a GPU in a few minutes: kernels against PyTorch's, whole steps as CUDA graphs, and the tests that need a GPU.

    python -m benchmarks.gpu_check [--batch-size 256] [--seconds 300] [--json F]

1. The tests marked `cuda`, and those that compare the kernels with float64 at odd sizes.
2. Every layer of MobileNetV2 and SmallMobileNetV2 that training/gpu_kernels.py can compute: time forward and backward
   as a CUDA graph, against PyTorch's, and the distance between their results.
3. Whole training steps of both networks as CUDA graphs, with and without these kernels: images/s.

The file is written after every part, so that it holds what was found even if a later part fails. Once --seconds have
passed, no layer or network is begun; tests that are left are stopped after a second each. The layers stop earlier, to
leave time for the steps.
"""
import importlib
import math
import subprocess
import sys
import time
from collections import Counter

import torch

from benchmarks.common import add_options, begin, seconds
from benchmarks.profile_step import WARM_UP, stage_on_made_up_images
from compressed import networks
from compressed.command_line import command_line, number, run_script
from compressed.errors import BadInput
from compressed.files import save_json
from training import gpu_kernels

NETWORKS = "mobilenet_v2:MobileNetV2", "mobilenet_v2:SmallMobileNetV2"
STEPS = 30
USED = {"PyTorch": (), "ours": gpu_kernels.KINDS} | {f"ours, {kind} alone": (kind,) for kind in gpu_kernels.KINDS}


def layers(network: str, size: int, batch: int, device: torch.device) -> Counter[gpu_kernels.Layer]:
    """Return {layer: how often it occurs} of a network at this image size."""
    importlib.import_module("training.triton_kernels")  # registers the operators
    model = networks.make(network).to(device, memory_format=torch.channels_last)
    found = gpu_kernels.layers_of(model, [size], batch=batch, dtype=torch.bfloat16, device=device, captured=True)
    return Counter(layer for several in found.values() for layer in several)


def check_layers(network: str, size: int, batch: int, device: torch.device, until: float) -> list[dict]:
    """Print and return a row for every layer of a network that is timed before `until`, and print their sums."""
    rows = []
    print(f"{network}, {size}x{size}, batch {batch}; microseconds forward + backward, all layers of a shape\n"
          f"{'layer':>30}{'PyTorch':>10}{'ours':>10}{'ratio':>7}{'distance':>10}")
    for layer, count in layers(network, size, batch, device).items():
        if time.monotonic() > until:
            print("out of time")
            break
        found = gpu_kernels.measured(layer)
        name = f"{count} {layer.kind} {layer.channels}x{layer.height} {layer.activation}/{layer.stride}"
        rows.append({"kind": layer.kind, "channels": layer.channels, "side": layer.height, "stride": layer.stride,
                     "activation": layer.activation, "count": count,
                     **{key: value for key, value in found.items() if value != math.inf}})
        print(f"{name:>30}{1e6 * count * found['pytorch']:>10.0f}{1e6 * count * found['ours']:>10.0f}"
              f"{found['pytorch'] / found['ours']:>7.2f}{found.get('distance', math.nan):>10.1e}", flush=True)
    for kind in gpu_kernels.KINDS:
        chosen = [row for row in rows if row["kind"] == kind]
        theirs = sum(row["count"] * row["pytorch"] for row in chosen)
        best = sum(row["count"] * min(row["pytorch"], row.get("ours", math.inf)) for row in chosen)
        print(f"{kind}: PyTorch {1000 * theirs:.2f} ms a step, the faster of both {1000 * best:.2f} ms")
    return rows


def step_speed(network: str, batch: int, device: torch.device, kinds) -> dict:
    """Return what whole steps take with these kinds of kernels, in seconds, and their mean loss.

    {"seconds" of a step, "launched": until the CPU has launched it, "set_up": before the first, "loss", ...}. If the
    first two are nearly the same, the GPU waits for the CPU.
    """
    began = time.monotonic()
    with stage_on_made_up_images(network, batch, 32, WARM_UP + STEPS, device, kernels=kinds) as stage:
        for i in range(WARM_UP):
            stage.step(0, i)
        torch.cuda.synchronize()
        set_up = time.monotonic() - began
        launched = []

        def steps():
            began = time.perf_counter()
            for i in range(STEPS):
                stage.step(0, WARM_UP + i)
            launched.append((time.perf_counter() - began) / STEPS)

        took = seconds(steps, device) / STEPS
        loss = stage.totals[0].item() / (WARM_UP + STEPS)
        if not math.isfinite(loss):
            raise ArithmeticError(f"the mean loss is {loss}")
        return {"seconds": took, "launched": launched[0], "images_per_second": batch / took, "set_up": set_up,
                "loss": loss, "recorded": len(stage.graphs.graphs)}


def check_steps(network: str, batch: int, device: torch.device) -> dict:
    """Print and return the speed of whole steps, with and without the kernels."""
    found = {}
    for name, kinds in USED.items():
        try:
            found[name] = step_speed(network, batch, device, kinds)
            times = (1000 * found[name][key] for key in ("seconds", "launched"))
            print("{}, {}: {images_per_second:,.0f} images/s, {:.2f} ms a step, launched in {:.2f} ms, "
                  "loss {loss:.3f}, set-up {set_up:.1f} s".format(network, name, *times, **found[name]), flush=True)
        except Exception as error:  # what fails on new hardware is what this script is to find
            found[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
            print(f"{network}, {name}: {found[name]['error']}", flush=True)
    return found


TESTS = (["-m", "cuda", "tests/test_triton_kernels.py", "tests/test_cuda_graphs.py", "tests/test_augmentation.py"],
         ["-k", "triton", "tests/test_kernels.py"],
         [f"tests/test_triton_kernels.py::test_{name}" for name in (
             "results_do_not_depend_on_the_tiling", "other_memory_formats",
             "a_batchnorm_that_runs_twice_moves_its_statistics_twice")])


def run_tests(words: list[str], limit: float) -> str:
    """Return the last lines of some tests, run in a process of their own for `limit` seconds at most."""
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", *words]
    try:
        out, end = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit).stdout, ""
    except subprocess.TimeoutExpired as late:
        out, end = late.stdout or b"", f"\nnot finished after {limit:.0f} s"
    return "\n".join(out.decode(errors="replace").splitlines()[-40:]) + end


def main(argv=None) -> int:
    parser = command_line(__doc__)
    add_options(parser, "256", rounds=None)
    parser.add_argument("--seconds", type=number(float, 1, 10**6), default=300, help="(%(default)s)")
    args = parser.parse_args(argv)
    start, batch = time.monotonic(), args.batch_size or 256
    device, machine = begin(args)
    if device.type != "cuda":
        raise BadInput("there is no CUDA device; on a CPU run pytest tests/test_kernels.py")
    found = {"machine": machine, "batch_size": batch, "layers": {}, "steps": {}}

    def left() -> float:
        return args.seconds - (time.monotonic() - start)

    def keep() -> None:
        found["seconds"] = time.monotonic() - start
        if args.json:
            save_json(found, args.json)

    found["tests"] = []
    for words in TESTS:
        found["tests"].append(run_tests(words, 0.15 * args.seconds))
        print(found["tests"][-1], flush=True)
        keep()
    for network, size in ((NETWORKS[0], 32), (NETWORKS[1], 32), (NETWORKS[0], 24)):
        if left() > 0.4 * args.seconds:  # the steps need the rest
            found["layers"][f"{network}, {size}"] = check_layers(network, size, batch, device,
                                                                 start + 0.6 * args.seconds)
            keep()
    for network in NETWORKS:
        if left() > 5:
            found["steps"][network] = check_steps(network, batch, device)
            keep()
    print(f"{found['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    run_script(main)
