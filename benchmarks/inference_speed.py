"""Compare inference speed on the CPU: PyTorch in float32, onnxruntime in float32, and onnxruntime's 8-bit kernels.

    python -m benchmarks.inference_speed [--checkpoint F] [--batches 1 32 128] [--threads 2] [--json F]

Every engine computes logits from uint8 pixels with the same number of threads. Rounds alternate between the engines,
and the result is the median of the rounds' ratios, because other load on the machine slows all engines alike. Then
onnxruntime's profile shows which kernels ran and what each costs (so one sees that 8-bit kernels are used), and what
each kind of layer costs in float and in 8 bits.

  torch        MobileNetV2 in eval mode, eager, channels-last
  torch fused  BatchNorm folded into the convolutions
  onnx float   the same network, as torch.onnx.export writes it
  onnx 8-bit   tools.export_onnx

Variants of the 8-bit graph that were tried on an EPYC with VNNI (onnxruntime 1.32, 2 threads): images/s relative to
the graph of that time, and why the variant was rejected (not kept):
  projections as convolutions, rounded before the residual sum   1.07 to 1.25   not our definition
  expansions as matrix products, too                             0.63 to 0.79   float32 between, exact shifts
  uint8 weights (which "session.x64quantprecision" makes)        0.51 to 0.54   the engine's slower kernels
  int8 activations                                               0.16 to 0.23   most layers are not fused: float kernels
"""
import copy
import functools
import io
import json
import re
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path

import torch
from torch import nn

from compressed import checkpoints, cifar100, claims, networks, threads
from compressed.command_line import command_line, needed, number, run_script, some_path
from compressed.files import check_outputs, save_json
from tools import export_onnx
from training.teachers import fold_batchnorm


class FromPixels(nn.Module):
    """A network that normalises its uint8 images itself."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    @torch.no_grad()
    def forward(self, images):
        return self.network(cifar100.normalise(images).contiguous(memory_format=torch.channels_last))


def engines(model: nn.Module, claim: dict, threads: int) -> tuple[dict, dict[str, bytes]]:
    """Return {name: function from uint8 images [N, 3, 32, 32] to logits}, and the bytes of the two ONNX models."""
    plain = networks.make(claim["network"]["spec"], claim["network"]["classes"])  # `model` is its graph, without blocks
    plain.load_state_dict(model.state_dict())
    network, file = FromPixels(plain.to(memory_format=torch.channels_last)).eval(), io.BytesIO()
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # the newer exporter needs onnxscript
        torch.onnx.export(network, (cifar100.made_up(2, seed=0).images,), file, dynamo=False, input_names=["image"],
                          opset_version=export_onnx.OPSET, dynamic_axes={"image": {0: "N"}})
    found = {"torch": network, "torch fused": FromPixels(fold_batchnorm(copy.deepcopy(model)))}
    models = {"onnx float": file.getvalue(),
              "onnx 8-bit": export_onnx.Exporter(model, claim).finished({}).SerializeToString()}
    for name, content in models.items():
        found[name] = functools.partial(export_onnx.run, export_onnx.session(content, threads))
    return found, models


def speed(run, images: torch.Tensor, seconds: float) -> float:
    """Return images per second, measured over at least `seconds`, after one warm-up call."""
    run(images)
    calls, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        run(images)
        calls += 1
    return calls * len(images) / passed


PARTS = {  # what a node computes, by its name: that of the layer, or of the ReLU which is fused into it
    r"layers\.\d+.(conv1|relu1)": "expansions, 1x1", r"layers\.\d+.(conv2|relu2)": "depthwise convolutions, 3x3",
    r"layers\.\d+.": "projections, shortcuts and residual sums, 1x1", r"(conv1|relu1)": "stem, 3x3",
    r"(conv2|relu2)": "head, 1x1"}


def part_of(node: str) -> str:
    return next((part for pattern, part in PARTS.items() if re.search(pattern, node)), "input, mean and linear layer")


def profile(content: bytes, images: torch.Tensor, threads: int, calls: int) -> tuple[dict[str, dict], dict[str, float]]:
    """By onnxruntime's own clock, for one image: {kernel: {"nodes", "microseconds"}} and {part: microseconds}.

    A part is everything that is computed for it: where 8-bit codes are summed, scaled and rounded by separate kernels,
    all of them.
    """
    times, nodes, parts = defaultdict(float), defaultdict(set), defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        session = export_onnx.session(content, threads, enable_profiling=True,
                                      profile_file_prefix=str(Path(folder, "profile")))
        for _ in range(calls):
            export_onnx.run(session, images)
        events = json.loads(Path(session.end_profiling()).read_text())
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kernel, microseconds = event["args"]["op_name"], event["dur"] / (calls * len(images))
            times[kernel] += microseconds
            nodes[kernel].add(event["name"])
            parts[part_of(event["name"])] += microseconds
    ordered = sorted(times, key=times.get, reverse=True)
    return {kernel: {"nodes": len(nodes[kernel]), "microseconds": times[kernel]} for kernel in ordered}, dict(parts)


def describe_processor() -> str:
    """Return its name, and which instructions for 8-bit products it has."""
    file = Path("/proc/cpuinfo")
    text = file.read_text() if file.is_file() else ""
    name = re.search(r"^model name\s*: (.*)", text, re.MULTILINE)
    products = sorted(set(re.findall(r"\b(avx512_vnni|avx_vnni|avx_vnni_int8|amx_int8|asimddp|i8mm)\b", text)))
    return f"{name[1] if name else 'unknown processor'} ({', '.join(products) or 'no 8-bit products known'})"


def measure(runs: dict, batch: int, rounds: int, seconds: float) -> dict[str, dict]:
    """Print and return {"engine, batch": its speed in each round, and the medians of the ratios}."""
    images = cifar100.made_up(batch, seed=0).images  # the speed does not depend on what they show
    found = defaultdict(list)
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(speed(run, images, seconds))
    figures = {}
    for name, speeds in found.items():
        to_torch, to_float = (statistics.median(a / b for a, b in zip(speeds, found[base]))
                              for base in ("torch", "onnx float"))
        median = statistics.median(speeds)
        figures[f"{name}, {batch}"] = {"images_per_second": speeds, "ratio_to_torch": to_torch,
                                       "ratio_to_onnx_float": to_float}
        print(f"{batch:>5}  {name:<15}{median:>10,.1f}{to_torch:>9.2f}{to_float:>14.2f}{1000 * batch / median:>12.3f}",
              flush=True)
    return figures


def main(argv=None) -> int:
    parser = command_line(__doc__)
    checkpoints.add_option(parser)
    parser.add_argument("--batches", type=number(int, 1, 10**5), nargs="+", default=[1, 32, 128], metavar="N",
                        help="batch sizes (1 32 128)")
    parser.add_argument("--threads", type=number(int, 1, 1024), default=2, help="of every engine (%(default)s)")
    parser.add_argument("--rounds", type=number(int, 1, 10**6), default=7, help="(%(default)s)")
    parser.add_argument("--seconds", type=number(float, 0.001, 3600), default=1.0,
                        help="of each engine in a round (%(default)s)")
    parser.add_argument("--json", type=some_path, metavar="F", help="write the figures to F as well")
    args = parser.parse_args(argv)
    if args.json:
        check_outputs([args.json], [args.checkpoint, claims.claim_path(args.checkpoint)], suffix=".json")
    runtime = needed("onnxruntime")
    threads.prepare()  # keeps freed memory, for torch's eager engines
    torch.set_num_threads(args.threads)
    runs, models = engines(*checkpoints.load(args.checkpoint), args.threads)
    machine = (f"{describe_processor()}, {args.threads} threads, torch {torch.__version__}, "
               f"onnxruntime {runtime.__version__}")
    print(f"{machine}\n{'batch':>5}  {'engine':<15}{'images/s':>10}{'x torch':>9}{'x onnx float':>14}"
          f"{'ms a batch':>12}", flush=True)
    figures, profiles, parts = {}, {}, {}
    for batch in args.batches:
        figures |= measure(runs, batch, args.rounds, args.seconds)
    for batch in sorted({min(args.batches), max(args.batches)}):
        images = cifar100.made_up(batch, seed=0).images
        for name, content in models.items():
            key = f"{name}, {batch}"
            profiles[key], parts[key] = profile(content, images, args.threads, max(5, 100 // batch))
            each = ", ".join(f"{kernel} {row['microseconds']:,.1f} ({row['nodes']})"
                             for kernel, row in profiles[key].items())
            print(f"{name}, batch of {batch}, microseconds an image by kernel (nodes): {each}", flush=True)
        floats, codes = parts[f"onnx float, {batch}"], parts[f"onnx 8-bit, {batch}"]
        for part in floats:
            print(f"{batch:>5}  {part:<52}{floats[part]:>9,.1f} us in float, {codes[part]:>9,.1f} in 8 bits, "
                  f"{floats[part] / codes[part]:.2f} times as fast", flush=True)
    if args.json:
        save_json({"machine": machine, "checkpoint": args.checkpoint.name, "rounds": args.rounds, "speeds": figures,
                   "profiles": profiles, "parts": parts}, args.json)
    return 0


if __name__ == "__main__":
    run_script(main)
