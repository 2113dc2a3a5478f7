"""Verify a checkpoint: accuracy on the test set as claimed, then what every tensor holds, and what it costs to store.

    python testers.py                   the shipped checkpoint; its claim is the .json beside it
    python testers.py --checkpoint F    another one, a state dict or a packed .mnet; its claim is F with the suffix .json,
                                        and without one a state dict is taken as a float network

Weights and activations are quantized as claimed, in arithmetic that is exact on every machine (see quantize.py), so the
claimed number of correct images must come out to the image. Exit status 0: everything was verified. 2: something
contradicts the claim, or could not be verified, such as the accuracy without the data; every such thing is named.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import torch
from torch import nn

import checkpoints
import cifar100
import claims
import counting
import machine
from evaluation import evaluate
from exact import exact_network, probe_logits
from files import number, run_script, some_path
from mobilenet_v2 import CHECKPOINT, BadInput, weight_layers


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=some_path, metavar="F", help=f"a state dict (default: {CHECKPOINT} beside this script)")
    parser.add_argument("--data", type=some_path, metavar="DIR", help="folder with CIFAR-100 (default: $CIFAR100_DIR, else a download)")
    parser.add_argument("--holdout", action="store_true", help="test on the 5,000 held-out train images")
    parser.add_argument("--made-up", type=number(int, 2, 10**6), metavar="N", help="test on the test set of N made-up images (as training/main.py)")
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    return parser.parse_args(argv)


def exactness(model, formats: counting.Formats) -> int:
    """The largest magnitude that any convolution's sum of products of codes can have: exact in float32 up to 2^24.

    sys.maxsize if a step is no power of two: then float32 rounds already the products.
    """
    largest = max(max(a.high, -a.low) for a in formats.activations.values())  # 255 at 8 bits
    worst = 0
    for name, module in weight_layers(model):
        if isinstance(module, nn.Linear):
            continue  # summed in float64
        grid = formats.tensors[f"{name}.weight"]
        if not grid.steps or any(math.frexp(step)[0] != 0.5 for step in grid.steps):
            return sys.maxsize
        worst = max(worst, largest * int(grid.codes(module.weight).abs().flatten(1).sum(1).max()))
    return worst


def tensor_lines(rows: list[dict]) -> list[str]:
    lines = [f"{'index':>5}  {'tensor':<29}{'shape':<18}{'values':>9}{'zeros':>10}{'non-zeros':>10}{'sparsity':>9}  {'bits found':<22}"]
    for row in sorted(rows, key=lambda row: row["index"] is None):  # the 58 weight tensors first
        index = "" if row["index"] is None else row["index"]
        shape = "x".join(map(str, row["shape"]))
        lines.append(f"{index:>5}  {row['name']:<29}{shape:<18}{row['total']:>9,}{row['zeros']:>10,}{row['nonzeros']:>10,}"
                     f"{row['zeros'] / row['total']:>9.4f}  {row['bits']:>2} ({row['kind']})")
    return lines


def total_lines(summary: dict) -> list[str]:
    weights, storage = summary["weights"], summary["storage"]
    lines = [f"{'Weights':<44}{'all':>12}{'zeros':>12}{'non-zeros':>12}{'sparsity':>10}{'compression':>13}"]
    labels = {"all": "convolutions and linear, exact", "conv": "convolutions alone, exact", "linear": "linear alone, exact",
              "submission": "the submission's convention (see README)"}
    for key, label in labels.items():
        part = weights[key]
        lines.append(f"  {label:<42}{part['total']:>12,}{part['zeros']:>12,}{part['nonzeros']:>12,}{part['sparsity']:>10.4f}"
                     f"{part['compression']:>13.4f}")
    words = storage["total"] / 32
    lines += ["", f"Parameter storage by the challenge's rules: {storage['total']:,} bits = {words / 1e6:.4f}M 32-bit parameters = "
              f"{storage['total'] / 8e6:.3f} MB (score term {words / counting.STORAGE_BASE:.5f})",
              "  " + ", ".join(f"{kind} {bits:,}" for kind, bits in storage.items() if kind != "total") + " bits"]
    return lines


def main(argv=None) -> int:
    machine.prepare()
    args = parse(argv)
    checkpoint = args.checkpoint or Path(__file__).with_name(CHECKPOINT)
    read = checkpoints.read(checkpoint)
    model, claim, formats, problems = read.model, read.claim, read.formats, read.problems
    network = model.to(memory_format=torch.channels_last)
    report = {"checkpoint": str(checkpoint), "sha256": read.sha256}
    lines = [f"{checkpoint}, SHA-256 {report['sha256']}"]

    if claim is not None:
        network = exact_network(model, claim.get("activations", []))
        bound = exactness(model, formats)
        lines.append(f"weights and activations quantized as claimed by {claims.claim_path(checkpoint).name}; the largest possible "
                     f"sum of products of codes is {bound:,}, and float32 is exact to {2**24:,}")
        if bound > 2**24:
            problems.append("sums of products may exceed 2^24: the accuracy may differ by an image or two between machines")
        same = probe_logits(network) == claim.get("probe_logits")
        lines.append(f"logits of the fixed made-up batch: {'as recorded, to the last bit' if same else 'NOT as recorded'}")
        if not same:
            problems.append("the logits of the fixed made-up batch are not those recorded in the claim")
        unchecked = [key for key, command in claims.RECORDED.items() if key in claim]
        if unchecked:
            lines.append("not checked here, but as they were written: " + ", ".join(
                f"{key} ({claims.RECORDED[key]})" for key in unchecked))
    else:
        lines.append("no claim beside it: evaluated in float32, widths as found in the values")

    if not args.json:  # at once: the images take a while
        print("\n".join(lines), flush=True)
    lines = []
    split = "made up" if args.made_up else "hold-out" if args.holdout else "test"
    try:
        if args.made_up:
            data = cifar100.made_up(max(100, args.made_up // 5), seed=1)
        else:
            data = cifar100.load(args.data, "holdout" if args.holdout else "test")
    except BadInput as error:
        lines.append("Accuracy: NOT VERIFIED, the data is missing")
        problems.append(f"the accuracy was not verified: {error}")
    else:
        loss, correct = evaluate(network, data)
        report |= {"data": split, "loss": loss, "correct": correct, "images": len(data)}
        lines += [f"Loss: {loss:.4f} ({split} set)", f"Accuracy: {correct}/{len(data)} ({correct / len(data):.2%})"]
        claimed = claim.get("accuracy") if claim is not None else report
        if not isinstance(claimed, dict) or (claimed.get("data"), claimed.get("images")) != (split, len(data)):
            problems.append(f"the accuracy was not verified: tested were {len(data)} {split} images, claimed is {claimed}")
        elif claimed.get("correct") != correct:
            problems.append(f"claimed are {claimed.get('correct')} correct images, found {correct}")

    summary = counting.summary(model, formats)
    report |= {"tensors": counting.tensor_rows(model, counting.found_formats(model)), "counts": summary, "problems": problems}
    if claim is not None and claim.get("counts") != summary:
        problems.append("the counts in the claim are not those of the file")
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        print("\n".join(lines + [""] + tensor_lines(report["tensors"]) + [""] + total_lines(summary)), flush=True)
    for problem in problems:
        print(f"testers.py: {problem}", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    run_script(main)
