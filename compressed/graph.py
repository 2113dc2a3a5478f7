"""The network's graph, found in its own forward pass: the one place that everybody reads who needs to know what follows
what.

`trace` lists the operations, for whoever counts them. `points` lists the values that are stored, each with the branches
that are added up to it: quantizer, dead weight, integer network and ONNX model are built along it. Change the table in
mobilenet_v2.py, or its forward pass, and all of them follow; for an operation that they do not know, they raise.
"""
import copy
import operator
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import nn

from compressed.cifar100 import IMAGE_SIZE
from compressed.errors import BadInput


def weight_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of every convolution and the linear layer in state-dict order.

    A layer's position in this list is its index in a bit table: 0 the stem ... 56 the head, 57 the linear layer.
    """
    return [(name, module) for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


# ---- The operations, as they run -----------------------------------------------------------------

@dataclass(frozen=True)
class Operation:
    """An operation for one image.

    name: the module's name; "layers.0.add" and "mean" for those that are no modules. key: unique, also if shared.
    kind: a key of RULES. inputs: the keys of the operations whose outputs it reads.
    fan_in: terms of a dense dot product, or the values that a mean averages. outputs: elements that it makes.
    channels: of the output. module: the module itself (its weights are looked at when counting), or None.
    """
    key: str
    name: str
    kind: str
    inputs: tuple[str, ...]
    fan_in: int
    outputs: int
    channels: int
    module: nn.Module | None = field(default=None, repr=False)


def is_point(module: nn.Module) -> bool:
    """Whether values are rounded after this module: an activation, an Identity, or quantize.py's Quantizer for it."""
    return isinstance(module, (nn.ReLU, nn.Hardswish, nn.Identity)) or hasattr(module, "signed")


class Tracer(torch.fx.Tracer):
    """Follows the forward pass down to the modules that hold no others, whichever class they are of."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        # an empty one passes on
        return not any(True for _ in module.children()) and not isinstance(module, nn.Sequential)


def _kind(node, model: nn.Module) -> str:
    """The rule that counts a node of the traced graph. Raises BadInput, naming it, if there is none."""
    kinds = {nn.Conv2d: "conv", nn.Linear: "linear", nn.BatchNorm2d: "batchnorm", nn.ReLU: "relu",
             nn.Hardswish: "hardswish", nn.Identity: "point"}
    if node.op == "placeholder":
        return "input"
    if node.op == "call_module":
        module = model.get_submodule(node.target)
        for layer, kind in kinds.items():
            if isinstance(module, layer):
                return kind
        if is_point(module):
            return "point"
        raise BadInput(f"no counting rule for layer {node.target} ({type(module).__name__})")
    two_maps = len(node.args) == 2 and all(isinstance(arg, torch.fx.Node) for arg in node.args)
    if node.target is operator.add and two_maps:
        return "add"
    if (node.op, node.target) == ("call_method", "mean") and node.args[1:] == ((2, 3),) and not node.kwargs:
        return "mean"
    raise BadInput(f"no counting rule for operation {node.name} ({node.op} {node.target} with {node.args[1:]})")


def trace(model: nn.Module, shape: tuple[int, int, int] = (3, IMAGE_SIZE, IMAGE_SIZE)) -> list[Operation]:
    """Every operation of the model for one image of `shape` (channels, height, width), in the order in which they run.

    The graph is that of the model's own `forward`, followed on tensors without data. Raises BadInput, naming it, for
    anything that has no rule here. The model is left as it was.
    """
    from torch.fx.passes.shape_prop import ShapeProp

    copied = copy.deepcopy(model).to("meta").eval()
    graph = torch.fx.GraphModule(copied, Tracer().trace(copied))
    kinds = {node: _kind(node, model) for node in graph.graph.nodes if node.op != "output"}
    ShapeProp(graph).propagate(torch.empty(1, *shape, device="meta"))
    operations, names = [], {}
    for node, kind in kinds.items():
        module = model.get_submodule(node.target) if node.op == "call_module" else None
        inputs, out = node.all_input_nodes, node.meta["tensor_meta"].shape
        if module is not None:
            names[node] = node.target
        else:  # named after the module that holds it, as its first input is
            names[node] = ".".join([*names[inputs[0]].split(".")[:-1], kind]) if inputs else node.name
        if kind in ("conv", "linear"):
            fan_in = module.weight[0].numel()
        else:
            fan_in = inputs[0].meta["tensor_meta"].shape[2:].numel() if kind == "mean" else 0
        channels = out[-1] if kind == "linear" else out[1]
        read = tuple(arg.name for arg in node.args if isinstance(arg, torch.fx.Node))  # x + x reads x twice
        operations.append(Operation(node.name, names[node], kind, read, fan_in, out.numel(), channels, module))
    return operations


# ---- The values that are stored, and what is added up to them ------------------------------------

@dataclass(frozen=True)
class Branch:
    """One term of a value.

    kind: "layer", a convolution with its BatchNorm `norm`, or the linear layer (norm None); "unchanged", a point added
    as it is; "mean", the mean of a point's map of `terms` values; "pixels", the normalised image.
    name: the layer's, or one made after the module that adds. source: the activation point that is read.
    """
    kind: str
    name: str
    source: str
    norm: str | None = None
    terms: int = 0


@dataclass(frozen=True)
class Point:
    """An activation point: a value that is rounded and stored. The last one, "logits", is not rounded.

    activation: "relu", "hardswish", or "none". signed: it can be below zero.
    """
    name: str
    branches: tuple[Branch, ...]
    activation: str
    signed: bool


def points(model: nn.Module, activations: Collection[str] = ("none", "relu")) -> list[Point]:
    """List all points in the order in which they are computed.

    activations: those that the caller can compute. Raises BadInput, naming it, for a point with another one, and for a
    value that is read unrounded.
    """
    found, values = {}, {}  # by name; what each operation gives: a Point, or the branches of one to come
    for op in trace(model):
        read = [values[key] for key in op.inputs]
        if op.kind in ("conv", "linear", "mean") and not isinstance(read[0], Point):
            raise BadInput(f"{op.name} reads a value that is not rounded: an nn.Identity before it makes it an "
                           "activation point")
        if op.kind == "input":
            value = (Branch("pixels", "pixels", "pixels"),)
        elif op.kind in ("conv", "linear"):
            value = (Branch("layer", op.name, read[0].name),)
        elif op.kind == "mean":
            value = (Branch("mean", op.name, read[0].name, terms=op.fan_in),)
        elif op.kind == "batchnorm":
            layer = read[0][-1] if isinstance(read[0], tuple) and len(read[0]) == 1 else None
            if layer is None or layer.kind != "layer" or layer.norm:
                raise BadInput(f"{op.name}: expected right after a convolution")
            value = (Branch("layer", layer.name, layer.source, op.name),)
        elif op.kind == "add":
            shortcut = ".".join([*op.name.split(".")[:-1], "shortcut"])
            value = sum(((Branch("unchanged", shortcut, each.name),) if isinstance(each, Point) else each
                         for each in read), ())
        else:  # an activation, or another activation point
            activation = "none" if op.kind == "point" else op.kind
            if activation not in activations:
                raise BadInput(f"{op.name}: {activation} has no rule here")
            branches = read[0] if isinstance(read[0], tuple) else (Branch("unchanged", op.name, read[0].name),)
            unsigned = all(branch.kind in ("unchanged", "mean") and not found[branch.source].signed
                           for branch in branches)
            signed = getattr(op.module, "signed", op.kind != "relu" and not unsigned)
            value = found[op.name] = Point(op.name, branches, activation, signed)
        values[op.key] = value
    if isinstance(value, Point):
        raise BadInput("the network ends in an activation point: expected a layer whose sums are the logits")
    return [*found.values(), Point("logits", value, "none", True)]


def activation_points(model: nn.Module) -> dict[str, bool]:
    """{name: whether it is signed} of the places where an activation is stored: ReLUs and Identities, in order."""
    return {point.name: point.signed for point in points(model)[:-1]}


def neighbours(model: nn.Module) -> dict[str, tuple[str, str]]:
    """{convolution: (its BatchNorm, the activation point that it reads)}."""
    return {branch.name: (branch.norm, branch.source) for point in points(model) for branch in point.branches
            if branch.norm}
