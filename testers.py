"""Verify a checkpoint: accuracy on the test set as claimed, then what every tensor holds, and what it costs to store.

    python testers.py                   the shipped checkpoint; its claim is the .json of the same name
    python testers.py --checkpoint F    another one, a state dict or a packed .mnet; a state dict without a claim is
                                        evaluated as a float network

Weights and activations are quantized as claimed, in arithmetic that is exact on every machine (see
compressed/exact_network.py), so the claimed number of correct images must be reached exactly. Exit status 0: everything
was verified. 2: something contradicts the claim, or could not be verified, such as the accuracy without the data; every
such thing is named.
"""
import dataclasses
import sys
from pathlib import Path

if __name__ == "__main__":
    import compressed.interrupt  # noqa: F401

import torch
from torch import nn

from compressed import checkpoints, claims, counting, datasets, networks, normalisation, threads
from compressed.cifar100 import CIFAR100, DataSet
from compressed.command_line import command_line, run_script
from compressed.errors import BadInput
from compressed.evaluation import evaluate, without_duplicates
from compressed.exact_network import exact_network, probe_logits
from compressed.exactness import float32_bound, too_wide
from compressed.files import to_json
from compressed.formats import found_formats
from compressed.graph import read_graph, weight_layers

REORDERED = "not known, the images of this copy are not in the published order"


def tensor_lines(rows: list[dict]) -> list[str]:
    """Return the table of all tensors: shape, values, zeros, bits found."""
    wide = max(29, *(len(row["name"]) + 1 for row in rows))
    lines = [f"{'index':>5}  {'tensor':<{wide}}{'shape':<17}{'values':>10}{'zeros':>10}{'non-zeros':>10}"
             f"{'sparsity':>9}  bits found"]
    for row in sorted(rows, key=lambda row: row["index"] is None):  # the layers' weights first
        index, shape = "" if row["index"] is None else row["index"], "x".join(map(str, row["shape"]))
        lines.append(f"{index:>5}  {row['name']:<{wide}}{shape:<17}{row['total']:>10,}{row['zeros']:>10,}"
                     f"{row['nonzeros']:>10,}{row['zeros'] / row['total']:>9.4f}  {row['bits']:>2} ({row['kind']})")
    return lines


def total_lines(summary: dict) -> list[str]:
    """Return the table of zeros and the storage of the whole network."""
    storage = summary["storage"]
    lines = [f"{'Weights':<44}{'all':>12}{'zeros':>12}{'non-zeros':>12}{'sparsity':>10}{'compression':>13}"]
    for key, label in (("all", "convolutions and linear, exact"), ("conv", "convolutions alone, exact"),
                       ("linear", "linear alone, exact"), ("submission", "the submission's convention (ACCOUNT.md)")):
        if part := summary["weights"][key]:
            lines.append(f"  {label:<42}{part['total']:>12,}{part['zeros']:>12,}{part['nonzeros']:>12,}"
                         f"{part['sparsity']:>10.4f}{counting.compression_text(part):>13}")
    words = storage["total"] / 32
    return [*lines, "", f"Parameter storage by the challenge's rules: {storage['total']:,} bits = {words / 1e6:.4f}M "
            f"32-bit parameters = {storage['total'] / 8e6:.3f} MB (score term {words / counting.STORAGE_BASE:.5f})",
            "  " + ", ".join(f"{kind} {bits:,}" for kind, bits in storage.items() if kind != "total") + " bits"]


def float_network(checkpoint: checkpoints.Checkpoint, normalise) -> tuple[nn.Module, list[str]]:
    """Return (a network without a claim, in float32; lines to print about it). normalise: as in --normalise."""
    network, lines = checkpoint.model, ["no claim: evaluated in float32, widths as found in the values"]
    if normalise is not None:
        network = normalisation.Renormalised(network, *normalise)
        lines.append("input as given: (pixel / 255 - {}) / {}".format(*normalise))
    else:
        lines.append("input (pixel - 128) / 64; if it was trained elsewhere with another one, give --normalise")
    run = {branch.name for branch in read_graph(checkpoint.model).layers}
    if unused := sum(layer.weight.numel() for name, layer in weight_layers(checkpoint.model) if name not in run):
        lines.append(f"{unused:,} weights are in layers that never run: they are in the totals of weights and zeros, "
                     "but not in the storage")
    return network.to(memory_format=torch.channels_last), lines


def claimed_network(checkpoint: checkpoints.Checkpoint) -> tuple[nn.Module, list[str]]:
    """Return (the network, quantized as the claim says, and lines to print about it).

    Adds what the claim gets wrong to checkpoint.problems.
    """
    claim, problems = checkpoint.claim, checkpoint.problems
    network = exact_network(checkpoint.model, claim["activations"])
    steps = {entry["name"]: float(entry["step"]) for entry in claim["activations"]}
    bound = float32_bound(checkpoint.model, checkpoint.formats, steps)
    if wide := too_wide(checkpoint.model, checkpoint.formats):
        problems.append(f"{wide}: its sums may need more than the 32 bits that are counted for them")
    if bound > 2**24:
        problems.append("sums of products may exceed 2^24: the accuracy may differ by an image or two between machines")
    packed = checkpoint.claim_file == checkpoint.path  # alone: it records no logits
    same = probe_logits(network) == claim.get("probe_logits")
    if not same and not packed:
        problems.append("the logits of the fixed made-up batch are not those recorded in the claim")
    said = "as recorded, to the last bit" if same else "not recorded" if packed else "NOT as recorded"
    lines = [f"weights and activations quantized as claimed by {checkpoint.claim_file.name}; the largest "
             f"sum that float32 may have to hold is {bound:,} steps, and it is exact to {2**24:,}",
             f"logits of the fixed made-up batch: {said}"]
    if unchecked := claims.unchecked(claim):
        lines.append("not checked here (in brackets, the command that computes it again): " + ", ".join(unchecked))
    return network, lines


def same_loss(claimed, found: float) -> bool:
    """Return True if a claimed loss is the one found, up to the digits that are printed: its last bits may differ."""
    return isinstance(claimed, float) and abs(claimed - found) <= 0.5e-4


def same_images(claimed: dict, data_set: DataSet) -> bool:
    """Return True if a claimed data set has these images and classes, whatever its name."""
    return (data_set.digest is not None and claimed.get("name") != CIFAR100.name
            and claimed | {"name": data_set.name} == dataclasses.asdict(data_set))


def contradiction(claim: dict, file: Path, found: dict, tested: DataSet) -> str | None:
    """Return what a claim gets wrong about the accuracy that was `found` on the images of `tested`, or None."""
    claimed, data_set, name = claim.get("accuracy"), claim.get("data_set"), found["data"]
    if data_set is None and tested.digest:  # a claim without one is about CIFAR-100
        data_set = dataclasses.asdict(CIFAR100)
    if isinstance(data_set, dict) and same_images(data_set, tested):  # in a file that was renamed, perhaps
        name, data_set = name.replace(tested.name, str(data_set.get("name")), 1), None
    if claimed is None:
        return f"the accuracy was not verified: {file} claims none"
    if not isinstance(claimed, dict) or (claimed.get("data"), claimed.get("images")) != (name, found["images"]):
        return f"the accuracy was not verified: tested on {found['images']} {name} images, the claim has {claimed}"
    if data_set not in (None, dataclasses.asdict(tested)):
        return f"the accuracy was not verified: tested on {tested}, the claim is about {data_set}"
    if claimed.get("correct") != found["correct"]:
        return f"the claim has {claimed.get('correct')} correct images, but {found['correct']} were found"
    if not same_loss(claimed.get("loss", found["loss"]), found["loss"]):
        return f"the claim has the loss {claimed['loss']}, but {found['loss']:.4f} was found"
    part, stated = found.get("without_duplicates"), claimed.get("without_duplicates")
    if "without_duplicates" not in found:
        return "without near-duplicates: that is known of CIFAR-100's test set alone" if stated is not None else None
    if "without_duplicates" in claimed and stated != part:
        return f"without near-duplicates in the train set, claimed is {stated}, found {part or REORDERED}"


def measured(network: nn.Module, args, checkpoint: checkpoints.Checkpoint) -> dict:
    """Evaluate a network on the test images; return {"data", "loss", "correct", "images"}, or {} if that fails.

    For CIFAR-100's test set it has "without_duplicates" too: {"correct", "images"} of the images without a
    near-duplicate in the train set, or None if these are not known. Adds what the claim gets wrong to
    checkpoint.problems.
    """
    try:
        data, name = datasets.chosen(args, "test", network=checkpoint.model)
        loss, right = evaluate(network, data)
    except (BadInput, OSError) as error:
        checkpoint.problems.append(f"the accuracy was not verified: {error}")
        return {}
    found = {"data": name, "loss": loss, "correct": int(right.sum()), "images": len(data)}
    if name == "test":
        found["without_duplicates"] = without_duplicates(right, args.data)
    if checkpoint.claim is not None and (
            problem := contradiction(checkpoint.claim, checkpoint.claim_file, found, data.data_set)):
        checkpoint.problems.append(problem)
    return found


def accuracy_lines(found: dict) -> list[str]:
    """Return the lines of what `measured` found."""
    if not found:
        return ["Accuracy: NOT VERIFIED"]

    def share(part: dict) -> str:
        return f"{part['correct']}/{part['images']} ({part['correct'] / part['images']:.2%})"

    lines = [f"Loss: {found['loss']:.4f} ({found['data']} set)", f"Accuracy: {share(found)}"]
    if "without_duplicates" in found:
        part = found["without_duplicates"]
        lines.append(f"  of images without a near-duplicate in the train set: {share(part) if part else REORDERED}")
    return lines


def main(argv=None) -> int:
    """Print the report; return 0, or 2 if something contradicts the claim or could not be verified."""
    threads.prepare()
    parser = command_line(__doc__)
    checkpoints.add_option(parser)
    networks.add_option(parser, networks.CLAIM)
    normalisation.add_option(parser)
    datasets.add_options(parser)
    parser.add_argument("--summary", action="store_true", help="leave out the row for every tensor")
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    args = parser.parse_args(argv)
    checkpoint = checkpoints.read(args.checkpoint, args.network)
    claim, problems = checkpoint.claim, checkpoint.problems
    if claim is not None and args.normalise is not None:
        raise BadInput(f"--normalise is for a checkpoint without a claim: the input of {checkpoint.path} is as claimed")
    network, lines = float_network(checkpoint, args.normalise) if claim is None else claimed_network(checkpoint)
    if not args.json:  # at once: the images take a while
        print("\n".join([f"{checkpoint.path}, SHA-256 {checkpoint.sha256}", *lines]), flush=True)
    found = measured(network, args, checkpoint)
    tensors = counting.tensor_rows(checkpoint.model, found_formats(checkpoint.model))
    summary = counting.summary(checkpoint.model, checkpoint.formats)
    packed = checkpoint.claim_file == checkpoint.path  # alone: it records no counts
    if claim is not None and claim.get("counts", summary if packed else None) != summary:
        problems.append("the counts in the claim are not those of the file")
    if args.json:
        print(to_json({"checkpoint": str(checkpoint.path), "sha256": checkpoint.sha256} | found
                      | {"tensors": tensors, "counts": summary, "problems": problems}, indent=1))
    else:
        rows = [] if args.summary else ["", *tensor_lines(tensors)]
        print("\n".join([*accuracy_lines(found), *rows, "", *total_lines(summary)]), flush=True)
    for problem in problems:
        print(f"testers.py: {problem}", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    run_script(main)
