"""Compare the speed of fine-tuning on the grids with that of masked training, in one run.

    python -m benchmarks.fine_tuning_speed [--network SPEC] [--images N] [--batch-size B] [--rounds 3]

Both train the same sparse network on the same made-up images with training/loop.py, Muon, and bfloat16 where the
processor has it; fine-tuning also rounds weights to 4 bits and activations to 8, with trained steps. It is measured
with BatchNorm statistics of each batch, with frozen ones, and on a CPU without the compiled functions (kernels.c).
Rounds alternate, and the result is the median of the rounds' ratios; only the ratios are meaningful.
"""
import contextlib
import os
import statistics
import tempfile
import time

import torch
from torch import nn

from compressed import cifar100, grids, kernels, networks, threads
from compressed.command_line import command_line, number, run_script
from compressed.exact_network import quantize_activations
from compressed.graph import prepare, weight_layers
from training import learned_steps, loop, masks, plan

KINDS = {  # name: (on its grids, with frozen statistics, with compiled functions)
    "masked training": (False, False, True), "fine-tuning": (True, False, True),
    "fine-tuning, frozen": (True, True, True), "fine-tuning, PyTorch's functions": (True, False, False)}


def sparse_network(spec: str, data: cifar100.Images, on_grids: bool) -> nn.Module:
    """Return a network of which a third of the weights are left, at 4 and 8 bits if it is `on_grids`."""
    torch.manual_seed(0)
    model = prepare(networks.make(spec))
    for _, layer in weight_layers(model):
        layer.weight.data.mul_(torch.rand(layer.weight.shape) < 0.35)
    if on_grids:
        grids.quantize_weights(model, grids.bit_table("4", model), "channel")
        quantize_activations(model, grids.calibrate(model, data.images[:50].cpu(), 8, "max"))
        learned_steps.learn_steps(model, "channel")
    return model.to(data.labels.device, memory_format=torch.channels_last)


def speed(spec: str, data: cifar100.Images, settings: loop.Settings, on_grids: bool, frozen: bool) -> float:
    """Return the images per second of the second epoch; the first one warms up."""
    model, marks = sparse_network(spec, data, on_grids), []
    zeros = masks.Masks(model, masks.zero_masks(model, [name for name, _ in weight_layers(model)]))

    def began(network, epoch):
        for module in network.modules():
            if frozen and isinstance(module, nn.BatchNorm2d):
                module.eval()
        marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        loop.train("speed", model, data, None, settings, folder, masks=zeros, prepare=began, save_seconds=1e9)
    return len(data) / (time.perf_counter() - marks[-1])


def main(argv=None) -> int:
    parser = command_line(__doc__)
    networks.add_option(parser)
    parser.add_argument("--images", type=number(int, 1, 10**6), default=1280, help="of a measured epoch (%(default)s)")
    parser.add_argument("--batch-size", type=number(int, 1, 10**6), default=128, help="(%(default)s)")
    parser.add_argument("--rounds", type=number(int, 1, 10**6), default=3, help="(%(default)s)")
    plan.add_precision(parser)
    parser.add_argument("--no-cuda", action="store_true")
    args = parser.parse_args(argv)
    threads.prepare()
    cuda = torch.cuda.is_available() and not args.no_cuda
    data = cifar100.made_up(args.images, 0, device=torch.device("cuda" if cuda else "cpu"))
    settings = loop.Settings(epochs=2, batch_size=args.batch_size, optimizer="muon", augment="plain", refresh=0,
                             warmup_epochs=0, precision=plan.precision(args.precision, cuda),
                             workers=1 if cuda else threads.cores())
    speeds, library = {name: [] for name in KINDS if not cuda or "PyTorch" not in name}, kernels.library
    for i in range(args.rounds):
        for name, found in speeds.items():
            on_grids, frozen, compiled = KINDS[name]
            kernels.library = library if compiled else lambda dtype: None
            try:
                found.append(speed(args.network, data, settings, on_grids, frozen))
            finally:
                kernels.library = library
        print(f"round {i + 1}: " + ", ".join(f"{name} {found[-1]:,.1f} images/s" for name, found in speeds.items()),
              flush=True)
    plain = speeds.pop("masked training")
    for name, found in speeds.items():
        print(f"{name} / masked training: {statistics.median(a / b for a, b in zip(found, plain)):.2f}")
    return 0


if __name__ == "__main__":
    run_script(main)
