"""Evaluate a network on images, on every core of a CPU or on a GPU."""
import copy
import math
import threading

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressed import cifar100, threads
from compressed.errors import BadInput


def on_every_core(function, batches, cpu: bool) -> list:
    """Return [function(batch) for batch in batches], in inference mode, computed on every core if it is on a CPU."""
    def some(part):
        found = []
        with torch.inference_mode():
            for batch in part:
                threads.go_on()
                found.append(function(batch))
        return found
    return sum(threads.in_threads(some, divided(batches, cpu)), [])


def in_batches(engine, images: Tensor, size: int) -> Tensor:
    """Return the concatenated engine(batch) of `images` in batches of `size`."""
    return torch.cat(on_every_core(engine, images.split(size), images.is_cpu))


def batch_size(images: Tensor) -> int:
    """Return the batch size for evaluation: 16 on a CPU, else 1,000.

    The feature maps of 16 images fit into a CPU's cache, and torch uses oneDNN for 1x1 convolutions only from 16 on.
    """
    return 16 if images.is_cpu else 1000


def logits(network: nn.Module, images: Tensor) -> Tensor:
    """Return the logits [N, classes] of a network in eval mode for uint8 images [N, 3, 32, 32].

    Every thread has a copy of its own, if there can be one: a forward pass may leave intermediate values in it.
    """
    size, own = batch_size(images), threading.local()
    parts = divided(images.split(size), images.is_cpu)
    try:
        spare = [copy.deepcopy(network) for _ in parts[1:]] + [network]
    except RuntimeError:  # weights that are computed, as by torch.nn.utils.weight_norm
        spare = [network] * len(parts)

    def engine(batch):
        if not hasattr(own, "network"):
            own.network = spare.pop()
        return own.network(cifar100.normalise(batch).contiguous(memory_format=torch.channels_last))

    return in_batches(engine, images, size)


def evaluate(network: nn.Module, data: cifar100.Images) -> tuple[float, Tensor]:
    """Return (mean cross-entropy, which images are classified correctly, bool [N]) of a network in eval mode.

    Raises BadInput if the loss is not finite: some values of the network are too large or not numbers.
    """
    found, size = logits(network, data.images), batch_size(data.images)
    # summed batch by batch in the order of the images: the same whatever the number of threads
    loss = sum(float(F.cross_entropy(some, labels, reduction="sum"))
               for some, labels in zip(found.split(size), data.labels.split(size)))
    if not math.isfinite(loss):
        raise BadInput(f"the loss is {loss}: the network's values cannot be those of a trained one")
    return loss / len(data), found.argmax(1) == data.labels


def without_duplicates(correct: Tensor, folder=None) -> dict[str, int] | None:
    """Return {"correct", "images"} of the test images that are no near-duplicates; None if these are not known.

    correct: bool [N], of the first N test images of CIFAR-100 in a folder (see cifar100.near_duplicates).
    """
    duplicates = cifar100.near_duplicates(folder)
    if duplicates is None:
        return None
    kept = correct.cpu()[~duplicates[:len(correct)]]
    return {"correct": int(kept.sum()), "images": len(kept)}


def divided(batches, cpu: bool) -> list:
    """Return the batches in order, divided into one part for each core of a CPU; otherwise in one part."""
    size = -(-len(batches) // (threads.cores() if cpu else 1))
    return [batches[start:start + size] for start in range(0, len(batches), size)]
