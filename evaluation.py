"""What a network gets right, and the BatchNorm statistics that it needs for it."""
import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

import cifar100
import machine


def evaluate(network: nn.Module, data: cifar100.Images, batch_size: int | None = None) -> tuple[float, int]:
    """(mean cross-entropy, number of correct predictions) of a network in eval mode, in float32.

    By default batches of 8 on a CPU, whose maps stay in its cache, and of 1,000 elsewhere.
    """
    cpu = data.images.device.type == "cpu"
    batches = list(zip(*(tensor.split(batch_size or (8 if cpu else 1000)) for tensor in (data.images, data.labels))))

    @torch.inference_mode()
    def some(part):
        found = []
        for images, labels in part:
            logits = network(cifar100.normalise(images).contiguous(memory_format=torch.channels_last))
            found.append((float(F.cross_entropy(logits, labels, reduction="sum")),
                          int((logits.argmax(1) == labels).sum())))
        return found

    found = [each for part in machine.in_threads(some, divided(batches, cpu)) for each in part]
    # summed in the order of the images: the same whatever the number of threads
    return sum(loss for loss, _ in found) / len(data), sum(correct for _, correct in found)


def renew_statistics(model: nn.Module, data: cifar100.Images, count: int, augment: str,
                     generator: torch.Generator) -> None:
    """New BatchNorm statistics from `count` train images, in place; leaves the model in eval mode.

    augment: none, plain or trivial: take what the network was trained with (mixing is left out). Statistics of clean
    images are worse, although the test images are clean: a network trained on crops with black borders, measured on
    train images, had 56% correct with statistics of clean images and 62% with those of crops.
    """
    chosen = cifar100.epoch_order(len(data), generator)[:count].to(data.labels.device)
    batches = [(index, cifar100.draw(len(index), generator, crop=augment != "none", trivial=augment == "trivial"))
               for index in chosen.split(250)]
    parts = divided(batches, data.labels.device.type == "cpu")
    models = [model] + [copy.deepcopy(model) for _ in parts[1:]]

    def some(k):
        def images():
            for index, draws in parts[k]:
                x, *_ = cifar100.augment(data.images[index], data.labels[index], draws)
                yield x.contiguous(memory_format=torch.channels_last)
        update_bn(images(), models[k])

    machine.in_threads(some, range(len(parts)))
    with torch.no_grad():  # a mean over all batches, of the means over each thread's
        weights = [len(part) / len(batches) for part in parts]
        for mine, *others in zip(*(each.buffers() for each in models)):
            if others and mine.is_floating_point():
                mine.copy_(sum(weight * each for weight, each in zip(weights, (mine.clone(), *others))))
    model.eval()


def divided(batches: list, cpu: bool) -> list[list]:
    """The batches in order, in as many parts as there are threads to work on them: the cores of a CPU, else one."""
    size = -(-len(batches) // (machine.cores() if cpu else 1))
    return [batches[start:start + size] for start in range(0, len(batches), size)]
