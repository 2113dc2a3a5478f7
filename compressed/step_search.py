"""Choose the step sizes of activations by their effect on the logits.

The result of every change is computed from the changed module onwards: `Paused` keeps the values before it.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressed import cifar100, grids
from compressed.command_line import with_progress
from compressed.evaluation import on_every_core
from compressed.graph import read_graph
from compressed.operations import traced

FIRST = 50  # minimum number of images of a first trial
BATCH = 50  # images


class Paused:
    """A network in eval mode, paused before one of its modules for some images; it can resume there repeatedly.

    images: uint8 [N, 3, 32, 32]. The modules from that one onwards may be changed. Modules that work in place no longer
    do: they would overwrite the values that are kept.
    """

    def __init__(self, network: nn.Module, images: Tensor):
        for module in network.modules():
            if hasattr(module, "inplace"):
                module.inplace = False
        self.graph = torch.fx.GraphModule(network, traced(network))
        start, *self.nodes = self.graph.graph.nodes
        self.values = [{start: cifar100.normalise(batch).contiguous(memory_format=torch.channels_last)}
                       for batch in images.split(BATCH)]  # of each batch, by node: those that are still read
        self.cpu = images.device.type == "cpu"

    def _run(self, nodes) -> list[dict]:
        def resumed(values):
            interpreter = torch.fx.Interpreter(self.graph)
            interpreter.env = dict(values)
            for node in nodes:
                interpreter.env[node] = interpreter.run_node(node)
                for last in interpreter.user_to_last_uses.get(node, ()):
                    del interpreter.env[last]
            return interpreter.env
        return on_every_core(resumed, self.values, self.cpu)

    def advance_to(self, name: str) -> None:
        """Continue to just before the module of this name, still ahead."""
        at = next(i for i, node in enumerate(self.nodes) if node.target == name)
        self.values, self.nodes = self._run(self.nodes[:at]), self.nodes[at:]

    def finish(self) -> Tensor:
        """Return the logits [N, classes]; the network stays paused before the same module."""
        return torch.cat([values[self.nodes[-1]] for values in self._run(self.nodes)])


def choose_steps(model: nn.Module, images: Tensor, reference: Tensor) -> None:
    """Pass once over all activation steps but the image's: double or halve each where this improves the logits.

    Better logits have a lower KL divergence of the model's softmax from that of the float network, whose logits for
    these images are `reference` [N, classes]. Unlike a squared error, it weighs what a point means for the output.
    A step that is clearly worse on the first images is not tried on the others. Prints its progress.
    """
    few = max(FIRST, len(images) // 8)
    parts = [few, len(images) - few] if len(images) > few else [len(images)]
    expected = reference.double().log_softmax(1).split(parts)

    def divergences(k: int) -> Tensor:
        found = networks[k].finish().double().log_softmax(1)
        return F.kl_div(found, expected[k], reduction="none", log_target=True).sum(1)

    def gain() -> list[Tensor] | None:
        """Return the divergences of the model as it is, if their sum is less than the `least`; else None."""
        found = [divergences(0)]
        apart = found[0] - least[0]
        if apart.mean() > 2 * apart.std() / len(apart) ** 0.5:
            return None
        found += [divergences(k) for k in range(1, len(parts))]
        return found if torch.cat(found).sum() < torch.cat(least).sum() else None

    with grids.weights_rounded_once(model):
        networks = [Paused(model, some) for some in images.split(parts)]
        least = [divergences(k) for k in range(len(parts))]
        graph = read_graph(model)
        points = [name for name in graph.activation_points if name not in graph.images]
        for name in with_progress(points, "activation steps chosen"):
            for network in networks:
                network.advance_to(name)
            quantizer = model.get_submodule(name)
            before = quantizer.step
            for step in (2 * before, before / 2):
                quantizer.step = step
                if (found := gain()) is not None:
                    least = found
                    break
            else:
                quantizer.step = before
