"""What a network gets right, the BatchNorm statistics that it needs for it, and a network to try the parts of."""
import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from compressed import cifar100, threads
from compressed.errors import BadInput
from compressed.graph import Tracer


def answers(engine, images: Tensor, size: int) -> Tensor:
    """engine(batch) for `images` (uint8 [N, 3, 32, 32]) in batches of `size`, on every core of a CPU: [N, ...]."""
    def some(batches):
        found = []
        with torch.inference_mode():
            for batch in batches:
                threads.go_on()
                found.append(engine(batch))
        return torch.cat(found)
    return torch.cat(threads.in_threads(some, divided(images.split(size), images.device.type == "cpu")))


def batch_size(images: Tensor) -> int:
    """16 on a CPU: their maps stay in its cache, and from 16 on torch leaves 1x1 convolutions to oneDNN; else 1,000."""
    return 16 if images.device.type == "cpu" else 1000


def logits(network: nn.Module, images: Tensor) -> Tensor:
    """Of a network in eval mode for uint8 images [N, 3, 32, 32]: [N, classes]."""
    def engine(batch):
        return network(cifar100.normalise(batch).contiguous(memory_format=torch.channels_last))
    return answers(engine, images, batch_size(images))


def evaluate(network: nn.Module, data: cifar100.Images) -> tuple[float, int]:
    """Return (mean cross-entropy, number of correct predictions) of a network in eval mode, in float32.

    Raises BadInput if the loss is not finite: some values of the network are too large, or contradict each other.
    """
    found, size = logits(network, data.images), batch_size(data.images)
    # summed batch by batch in the order of the images: the same whatever the number of threads
    loss = sum(float(F.cross_entropy(some, labels, reduction="sum"))
               for some, labels in zip(found.split(size), data.labels.split(size)))
    if not math.isfinite(loss):
        raise BadInput(f"the loss is {loss}: the network's values cannot be those of a trained one")
    return loss / len(data), int((found.argmax(1) == data.labels).sum())


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
                threads.go_on()
                x, *_ = cifar100.augment(data.images[index], data.labels[index], draws)
                yield x.contiguous(memory_format=torch.channels_last)
        update_bn(images(), models[k])

    threads.in_threads(some, range(len(parts)))
    with torch.no_grad():  # a mean over all batches, of the means over each thread's
        weights = [len(part) / len(batches) for part in parts]
        for mine, *others in zip(*(each.buffers() for each in models)):
            if others and mine.is_floating_point():
                mine.copy_(sum(weight * each for weight, each in zip(weights, (mine.clone(), *others))))
    model.eval()


def renew_means(model: nn.Module, data: cifar100.Images, count: int, augment: str, generator: torch.Generator) -> None:
    """As renew_statistics, but the variances stay, and with them the folded scales: quantize.py has shortened those."""
    norms = [(module, module.running_var.clone()) for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    renew_statistics(model, data, count, augment, generator)
    for norm, variance in norms:
        norm.running_var.copy_(variance)


class Paused:
    """A network in eval mode, halted before one of its modules for some images: from there it can go on many times.

    images: uint8 [N, 3, 32, 32]. What its modules hold may change, from the one it stands at onwards.
    """

    def __init__(self, network: nn.Module, images: Tensor, size: int = 50):
        self.graph = torch.fx.GraphModule(network, Tracer().trace(network))
        start, *self.nodes = self.graph.graph.nodes
        self.values = [{start: cifar100.normalise(batch).contiguous(memory_format=torch.channels_last)}
                       for batch in images.split(size)]  # of each batch, by node: those that are still read
        self.cpu = images.device.type == "cpu"

    def _run(self, nodes) -> list[dict]:
        def some(part):
            interpreter, found = torch.fx.Interpreter(self.graph), []
            for values in part:
                threads.go_on()
                interpreter.env = dict(values)
                for node in nodes:
                    with torch.inference_mode():
                        interpreter.env[node] = interpreter.run_node(node)
                    for read in interpreter.user_to_last_uses.get(node, ()):
                        del interpreter.env[read]
                found.append(interpreter.env)
            return found
        return sum(threads.in_threads(some, divided(self.values, self.cpu)), [])

    def reach(self, name: str) -> None:
        """Go on to right before the module of this name, which lies ahead."""
        at = next(i for i, node in enumerate(self.nodes) if node.target == name)
        self.values, self.nodes = self._run(self.nodes[:at]), self.nodes[at:]

    def finish(self) -> Tensor:
        """The logits [N, classes]; the network stays where it is."""
        return torch.cat([values[self.nodes[-1]] for values in self._run(self.nodes)])


def divided(batches, cpu: bool) -> list:
    """The batches in order, in as many parts as there are threads to work on them: the cores of a CPU, else one."""
    size = -(-len(batches) // (threads.cores() if cpu else 1))
    return [batches[start:start + size] for start in range(0, len(batches), size)]
