"""Re-estimate the BatchNorm statistics of a network from augmented train images."""
import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from compressed import threads
from compressed.cifar100 import Images
from compressed.evaluation import divided
from training import augmentation


def freeze(model: nn.Module) -> None:
    """Keep the statistics of all BatchNorms as they are, in place, until the model is put in training mode again."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def renew_statistics(model: nn.Module, data: Images, count: int, augment: str, generator: torch.Generator) -> None:
    """Re-estimate the BatchNorm statistics from `count` train images, in place; leave the model in eval mode.

    augment: "none", "plain" or "trivial", preferably as in training, although the test images have no augmentation: a
    network trained on crops with black borders had 56% of the train images correct with statistics of clean images, and
    62% with those of crops (the run was not kept). Images are not mixed, and what is random in the network, such as
    dropout, is off, as it is when these statistics are used. Layers that the network's own train() leaves in eval mode
    keep theirs.
    """
    count = max(count, 2)  # the values of one image may have no variance
    chosen = torch.randperm(len(data), generator=generator)[:count].to(data.labels.device)
    equal = chosen.tensor_split(-(-len(chosen) // 250))  # no rest of one image, which would have no variance
    batches = [(index, augmentation.draw(len(index), generator, augment)) for index in equal]
    parts = divided(batches, data.labels.device.type == "cpu")
    names = [name for name, module in model.train().named_modules()
             if isinstance(module, _BatchNorm) and module.training and module.running_mean is not None]
    models = [model.eval(), *(copy.deepcopy(model) for _ in parts[1:])]
    several = [[each.get_submodule(name) for name in names] for each in models]

    @torch.no_grad()
    def update(k):
        norms = several[k]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train().reset_running_stats()
        try:
            for number, (index, draws) in enumerate(parts[k], 1):
                threads.go_on()
                for norm in norms:  # the plain mean over all batches: torch's None, or the same in numbers
                    torchs = type(norm).forward.__module__.startswith(("torch.", "training."))
                    norm.momentum = None if torchs else 1 / number
                models[k](augmentation.augment(data.images[index], data.labels[index], draws)[0])
        finally:
            for norm, momentum in zip(norms, momenta):
                norm.momentum = momentum

    threads.in_threads(update, range(len(parts)))
    weights = [len(part) / len(batches) for part in parts]  # of the threads' statistics
    for norms in zip(*several):
        for name in ("running_mean", "running_var"):
            mean = sum(weight * getattr(norm, name) for weight, norm in zip(weights, norms))
            getattr(norms[0], name).copy_(mean)
    model.eval()


def renew_means(model: nn.Module, data: Images, count: int, augment: str, generator: torch.Generator) -> None:
    """Re-estimate the means as renew_statistics does, and keep the variances.

    quantize.py calls it when the scales of the BatchNorms may already be rounded to few bits (grids.shorten_scales):
    new variances would change them.
    """
    norms = [(module, module.running_var.clone()) for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    renew_statistics(model, data, count, augment, generator)
    for norm, variance in norms:
        norm.running_var.copy_(variance)
