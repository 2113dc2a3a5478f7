"""Read and write the claim of a checkpoint (F.json next to F.pt), and check the checkpoint's values against it.

    checkpoint           name of the checkpoint file
    sha256               SHA-256 of the checkpoint file
    network              {"spec", "classes", "mean", "std" of the input, "graph": Graph.digest}; if it is missing, the
                         submission's network. A spec in a FILE.py is code, which is only run if --network names it, too
    data_set             {"name", "classes", "digest"} of the images that it was made from; without it, CIFAR-100
    accuracy             {"data", "correct", "images", "loss"}, and if known "without_duplicates": {"correct", "images"}
                         (see cifar100.near_duplicates)
    accuracy_by_step     the accuracy after each step of quantize.py
    tensors              [{"name", "bits", "step" (or "kind": "float16")}]: the format of every parameter
    activations          [{"name", "bits", "signed", "step"}]: the format of every activation point
    counts               zeros, storage, operations and score (see counting.summary)
    dead_weight_removed  how many non-zero values had no effect on the logits and were set to zero
    probe_logits         logits of a fixed synthetic batch (probe_images), to the last bit
    packed               file, bytes and SHA-256 of the packed file (tools.pack adds it)
    integer              accuracy and accumulators of the integer network (tools.integer --record adds it)
    onnx                 accuracy and agreement of the ONNX model in onnxruntime (tools.export_onnx --record adds it)
    made_by              command, commit, machine, and the training stages behind it
    digest               SHA-256 of all of the above (files.digest), which shows whether the claim was altered

The checkers trust the checkpoint and not its claim: whatever the values show is determined from the values.
"""
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from compressed import counting, networks
from compressed.cifar100 import MEAN, STD
from compressed.errors import BadInput, brief
from compressed.exact_network import exact_network, probe_logits
from compressed.files import load_record, save_record, sha256
from compressed.formats import (HALVES, NOT_FOLDED, WORD, Activation, Formats, Grid, exponent, found_formats, is_half,
                                is_step, signed_bits)
from compressed.graph import prepare, read_graph

# parts that testers.py checks, and their keys if it does not compare the whole part
CHECKED = {**dict.fromkeys(("sha256", "data_set", "counts", "probe_logits", "digest")),
           "network": {"spec", "classes", "mean", "std", "graph"},
           "accuracy": {"data", "correct", "images", "loss", "without_duplicates"},
           "tensors": {"name", "bits", "step", "kind"}, "activations": {"name", "bits", "signed", "step"}}
# parts that it does not check, each with the command that computes it again
RECORDED = {"accuracy_by_step": "python quantize.py", "dead_weight_removed": "python quantize.py",
            "checkpoint": "cannot be checked", "made_by": "cannot be checked",
            "packed": "python -m tools.pack", "integer": "python -m tools.integer",
            "onnx": "python -m tools.export_onnx --verify"}


def claim_path(checkpoint) -> Path:
    """Return the path of a checkpoint's claim: the same name with the suffix .json."""
    return Path(checkpoint).with_suffix(".json")


def read(path) -> dict:
    """Return the claim in a file. Raises BadInput if it is missing, damaged, or altered since it was written."""
    return load_record(path, "restore it, or write it again with quantize.py")


def unchecked(claim: dict) -> list[str]:
    """Return the keys of a claim that testers.py compares with nothing, each with what computes it again."""
    def shown(text: str) -> str:  # a claim writes no line of its own into the report
        return text if text.isprintable() else ascii(text)

    found = [f"{shown(key)} ({RECORDED.get(key, 'unknown')})" for key in claim if key not in CHECKED]
    for key, known in CHECKED.items():
        parts = claim.get(key) if isinstance(claim.get(key), list) else [claim.get(key)]
        inside = {name for part in parts if known and isinstance(part, dict) for name in part if name not in known}
        found += [f"{key}.{shown(name)} (unknown)" for name in sorted(inside)]
    return found


def recordable(checkpoint) -> None:
    """Raise BadInput if the checkpoint has no claim to which `record` could add something."""
    if Path(checkpoint).suffix == ".mnet":
        raise BadInput(f"{checkpoint}: results are recorded in the claim of the .pt next to it; give that one")
    if not claim_path(checkpoint).is_file():
        raise BadInput(f"{checkpoint} has no claim next to it to record anything in; quantize.py writes one")


def write(claim: dict, checkpoint: Path, spec: str) -> None:
    """Write a claim, with what follows from the checkpoint as it was written: digest, counts and logits.

    claim: must hold "tensors" and "activations"; all other keys are kept. spec: specification of the network.
    """
    model = prepare(networks.load_checkpoint(checkpoint, spec))
    formats = stated_formats(model, claim)
    first = {"checkpoint": checkpoint.name, "sha256": sha256(checkpoint), "network": network(spec, model)}
    last = {"counts": counting.summary(model, formats),
            "probe_logits": probe_logits(exact_network(model, claim["activations"]))}
    save_record(first | claim | last, claim_path(checkpoint))


def record(checkpoint, key: str, value: dict, claim: dict) -> None:
    """Set one key of a checkpoint's claim, and keep all other keys as the file has them now.

    claim: the claim that was read before the work began. Raises BadInput if the file's is of another checkpoint now.
    """
    recordable(checkpoint)
    now = read(claim_path(checkpoint))
    if now.get("sha256") != claim.get("sha256"):
        raise BadInput(f"{checkpoint} was replaced meanwhile, and nothing was recorded; repeat the command")
    save_record(now | {key: value}, claim_path(checkpoint))


def network(spec: str, model: nn.Module) -> dict:
    """Return a claim's entry "network": how the network is made, its input and output, the digest of its graph."""
    graph = read_graph(model)
    return {"spec": spec, "classes": graph.points[-1].shape[0], "mean": MEAN, "std": STD, "graph": graph.digest}


def other_network(stated: dict, model: nn.Module) -> str | None:
    """Return a line that says how a network differs from a claim's entry "network"; None if it does not."""
    made = network(stated.get("spec"), model)
    differing = [f"{key} {stated.get(key)} and not {made[key]}" for key in made if stated.get(key) != made[key]]
    return f"it is of another network than {made['spec']} makes here: {', '.join(differing)}" if differing else None


def entries(claim: dict, key: str, path) -> dict[str, dict]:
    """Return the entries of the claim's list `key`, by name.

    Raises BadInput if a name is missing or occurs twice, or if an entry's bits are not 1 to 32.
    """
    found = {}
    if not isinstance(claim.get(key), list):
        raise BadInput(f"{path}: {key!r} is not a list")
    for entry in claim[key]:
        name, bits = (entry.get("name"), entry.get("bits")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or name in found:
            raise BadInput(f"{path}: {key!r} holds {entry!r} without a name of its own")
        if type(bits) is not int or not 1 <= bits <= WORD:
            raise BadInput(f"{path}: {key!r} gives {name} {bits!r} bits, expected 1 to {WORD}")
        found[name] = entry
    return found


def claimed_grid(entry: dict, parameter: torch.Tensor, found: Grid) -> Grid:
    """Return the claimed format of a tensor. Raises BadInput if the values do not fit its bits or its steps.

    A BatchNorm whose statistics are not folded in is float32.
    """
    bits, step, loose = entry["bits"], entry.get("step"), found.kind == NOT_FOLDED
    if found.bits > bits and (loose or step is None):  # with steps, the codes tell
        raise BadInput(f"the values need {found.bits} bits ({found.kind}), claimed {bits}")
    if loose:
        if step is not None or "kind" in entry:
            raise BadInput("it has no step or kind of its own: the statistics of the BatchNorm are not folded in")
        return found
    if "kind" in entry:
        if str(entry["kind"]) not in HALVES or bits != 16 or not is_half(parameter, entry["kind"]):
            raise BadInput(f"the values are no {bits}-bit {entry['kind']}")
        return Grid(16, kind=entry["kind"])
    if step is None:
        return replace(found, bits=bits)
    steps = tuple(step) if isinstance(step, list) else (step,)
    rows = len(parameter) if parameter.dim() > 1 else 1  # the values of a vector have no steps of their own
    if len(steps) not in (1, rows) or not all(map(is_step, steps)):
        raise BadInput(f"claimed step {step!r} is neither a number from 2^-128 to 2^127 nor one for each channel")
    grid = Grid(bits, tuple(map(float, steps)), "claimed")
    codes = grid.codes(parameter)
    on_steps, rounding = codes * grid.steps_of(parameter), 0.0 if None not in map(exponent, grid.steps) else 2.0**-23
    off = (parameter.detach().double() - on_steps).abs() > on_steps.abs() * rounding
    if off.any() or signed_bits(int(codes.min()), int(codes.max())) > bits:
        raise BadInput(f"the values are no {bits}-bit multiples of the claimed step")
    return grid


def check(claim: dict, path, model: nn.Module) -> tuple[Formats, list[str]]:
    """Return the claimed formats, and one line for each contradiction between the claim and the network's values.

    Tensors that the claim lacks or describes wrongly keep the format that was found in their values; activation points
    that it lacks have 32 bits. Raises BadInput if the claim's lists cannot be read.
    """
    problems, tensors, activations = [], found_formats(model).tensors, {}
    listed, points = entries(claim, "tensors", path), entries(claim, "activations", path)
    wanted, used = read_graph(model).activation_points, {operation.name for operation in read_graph(model).operations}
    for name, parameter in model.named_parameters():
        try:
            if name.rpartition(".")[0] not in used:
                raise BadInput("the forward pass does not use it; take it out of the network and of the checkpoint")
            if name not in listed:
                raise BadInput("not in the claim")
            tensors[name] = claimed_grid(listed[name], parameter, tensors[name])
        except BadInput as error:
            problems.append(f"{name}: {error}")
    problems += [f"activation {name}: not in the claim" for name in wanted if name not in points]
    unknown = sorted(listed.keys() - tensors.keys()) + sorted(points.keys() - set(wanted))
    problems += [f"{name}: claimed, but not in the network" for name in unknown]
    for name, entry in points.items():
        if type(entry.get("signed")) is not bool:
            raise BadInput(f"{path}: activation {name} says neither that it is signed nor that it is not")
        if entry["signed"] != wanted.get(name, entry["signed"]):
            problems.append(f"activation {name}: signed is {entry['signed']}, expected {wanted[name]}")
        activations[name] = Activation(entry["bits"], entry["signed"])
    return Formats(tensors, activations), problems


def stated_formats(model: nn.Module, claim: dict) -> Formats:
    """Return the claimed formats. Raises BadInput if one is missing, or if the network's values do not fit it."""
    formats, problems = check(claim, "the claim", model)
    if problems:
        raise BadInput(f"the claim does not fit the network: {brief(problems)}")
    return formats
