"""The graph of a network, found in its own forward pass: what is computed from what, and where values are stored.

`read_graph` lists the operations, which are counted, and the activation points: the values that are rounded to codes
and stored, each with the branches whose sum it is. Quantizer, dead weight, integer network, packed file and ONNX model
are built on them. `prepare` inserts a module wherever a forward pass stores a value without one.

A value is an activation point if it is
  the output of a ReLU or ReLU6;
  read by a convolution, a linear layer, a mean, a maximum, a product, a pointwise function, or a move of elements
    (concatenation, view, slice, padding, ...), which all read codes;
  read by a BatchNorm that cannot be folded, because it does not directly follow a convolution or linear layer, or is
    not its only reader;
  the output of a pointwise function other than these two;
  or read by more than one operation.
The image is the first point of most networks. If a value is passed through an nn.Identity, the Identity is its point.
So is the Identity after a pointwise function, if nothing else reads the function's output. Several moves in a row are
combined into one, from the point before to the point after. To be added does not make a value a point: it is added
unrounded unless another rule makes it one.
"""
import copy
import functools
import hashlib
import math
from collections import Counter
from dataclasses import dataclass, field, replace

import torch.nn.functional as F
from torch import Tensor, fx, nn

from compressed.errors import BadInput
from compressed.operations import (CLIPS, FUNCTIONS, MOVES, NORMALISATIONS, PREPARED, REWRITTEN, SPELLINGS, Operation,
                                   RoundsValues, Window, copied, has_hooks, trace, traced)

READ_CODES = "conv", "linear", "mean", "max", "product", *MOVES, *FUNCTIONS  # kinds that read rounded values alone
KNOWN = "torch.nn.", "compressed.", "training."  # where the classes of a prepared network's modules are from
UNSIGNED = "hardsigmoid", "sigmoid"  # functions that are never below zero
# names of what no module rounds: the image's branch, and the last point; the exporter calls the image "image"
RESERVED = "pixels", "logits"


def weight_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (name, module) of every convolution and linear layer in state-dict order.

    A layer's position in this list is its index in a bit table; in the submission's network 0 is the stem, 56 the last
    convolution and 57 the linear layer.
    """
    return [(name, module) for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


def layer_kind(layer: nn.Module) -> str:
    """Return "linear", "depthwise" (any convolution with groups > 1) or "conv"."""
    return "linear" if isinstance(layer, nn.Linear) else "depthwise" if layer.groups > 1 else "conv"


# ---- The values that are stored, and what is added up to them ------------------------------------

@dataclass(frozen=True)
class Branch:
    """One of the terms that are added up to the value of a Point; it is computed from the codes of other points alone.

    kind: what it computes from the codes of `source`:
      "pixels"      the normalised image, the network's input
      "layer"       a convolution or linear layer, and the BatchNorm `norm` after it, if there is one
      "norm"        the BatchNorm `norm`
      "unchanged"   the value itself
      "mean", "max" of the `terms` values in every position of the `window`
      "function"    the pointwise `function`
      "product"     its product with the value of the point `other`
      "moved"       its elements, `elements` in number, at other places: `index`, as in Operation
    name: the layer's, or one made after the module in whose forward pass it is computed; unique.
    """
    kind: str
    name: str
    source: str
    norm: str | None = None
    terms: int = 0
    other: str | None = None
    function: str | None = None
    window: Window | None = field(default=None, compare=False)
    index: Tensor | None = field(default=None, compare=False, repr=False)
    elements: int = field(default=0, compare=False)

    @property
    def sources(self) -> tuple[str, ...]:
        """Return the names of the points that it reads."""
        return (self.source,) if self.other is None else (self.source, self.other)


@dataclass(frozen=True)
class Point:
    """An activation point: a value that is rounded to codes and stored. The last one, "logits", is not rounded.

    name: that of the module that rounds it. branches: what is added up to it. activation: "relu", "relu6"
    or "none", applied to the sum. signed: it can be below zero. shape: of one image's value, channels first.
    """
    name: str
    branches: tuple[Branch, ...]
    activation: str
    signed: bool
    shape: tuple[int, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Graph:
    """What a network computes: its operations and its points, in execution order; the last point is the logits.
    """
    operations: tuple[Operation, ...]
    points: tuple[Point, ...]

    @property
    def activation_points(self) -> dict[str, bool]:
        """Return {name: True if it is signed} of all points but the logits, in order."""
        return {point.name: point.signed for point in self.points[:-1]}

    @property
    def layers(self) -> list[Branch]:
        """All branches that have parameters: convolutions, linear layers, and BatchNorms that are folded into none."""
        return [branch for point in self.points for branch in point.branches if branch.kind in ("layer", "norm")]

    @property
    def images(self) -> set[str]:
        """The points that hold the image itself."""
        return {point.name for point in self.points if point.branches[0].kind == "pixels"}

    @property
    def normalised(self) -> bool:
        """True if the network scales or shifts its input itself: it can be counted, but has no integer form here."""
        return any(op.kind in NORMALISATIONS.values() for op in self.operations)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of what the operations compute, but for the parameters' values: kinds, names, inputs, shapes, ..."""
        names = {op.key: op.name for op in self.operations}
        lines = [repr((op.kind, op.name, [names[key] for key in op.inputs], op.shape, op.window, op.fan_in,
                       getattr(op.module, "groups", 1), getattr(op.module, "bias", None) is not None,
                       [index.tolist() for index in op.index])) for op in self.operations]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _Walk:
    """Finds the points of a list of operations.

    values: {key of an operation: a Point, or the branches of a value that is not rounded}. found: {name: Point}.
    lacking: [(operation, name of a point)] where there is no module after an operation to round its value.
    """

    def __init__(self, operations: list[Operation]):
        self.operations = operations
        self.readers = {op.key: [] for op in operations}
        for op in operations:
            for key in op.inputs:
                self.readers[key].append(op)
        self.uses = Counter(op.module for op in operations)
        self.names = {op.name for op in operations}  # and of the branches that are no operation's result
        self.found, self.lacking, self.values = {}, [], {}
        for op in operations:
            self.values[op.key] = self.value(op, [self.values[key] for key in op.inputs])

    def value(self, op: Operation, inputs: list) -> Point | tuple[Branch, ...]:
        """Return the value of an operation. inputs: the values that it reads."""
        value = self.branches(op, inputs)
        if isinstance(value, Point):
            return value
        own = self.alone(op) and op.kind in ("point", *CLIPS)  # its module can round
        if op.kind in CLIPS or self.stored(op, value) or own and isinstance(op.module, RoundsValues):
            return self.point(op, value, own)
        return value

    def branches(self, op: Operation, inputs: list) -> Point | tuple[Branch, ...]:
        """Return the value of an operation before it is rounded; where it passes a point on, the point."""
        if op.kind in NORMALISATIONS.values():
            return (replace(inputs[0][0], name=op.name),)
        if op.kind == "input":
            return (Branch("pixels", "pixels", "pixels"),)
        if op.kind in ("conv", "linear"):
            return (Branch("layer", op.name, inputs[0].name, window=op.window),)
        if op.kind in ("mean", "max"):
            return (Branch(op.kind, op.name, inputs[0].name, terms=op.fan_in, window=op.window),)
        if op.kind in FUNCTIONS:
            return (Branch("function", op.name, inputs[0].name, function=op.kind),)
        if op.kind == "product":
            return (Branch("product", op.name, inputs[0].name, other=inputs[1].name),)
        if op.kind in MOVES:
            moved = [branch for each, index in zip(inputs, op.index) for branch in moved_branches(each, index)]
            return tuple(replace(branch, name=self.new(f"{op.name}.{i}")) for i, branch in enumerate(moved))
        if op.kind == "batchnorm":
            if folds(inputs[0]):
                return (replace(inputs[0][0], norm=op.name),)
            return (Branch("norm", op.name, inputs[0].name, norm=op.name),)
        if op.kind == "add":
            shortcut = ".".join([*op.name.split(".")[:-1], "shortcut" + op.name.split("add")[-1]])
            return sum(((Branch("unchanged", self.new(shortcut), each.name),) if isinstance(each, Point) else each
                        for each in inputs), ())
        if isinstance(inputs[0], Point) and (op.kind in CLIPS or isinstance(op.module, RoundsValues)):
            return (Branch("unchanged", op.name, inputs[0].name),)
        return inputs[0]

    def new(self, name: str) -> str:
        """Return a name for a branch that is no operation's result: as given, with ".1" added while it is taken."""
        while name in self.names:
            name += ".1"
        self.names.add(name)
        return name

    def alone(self, op: Operation) -> bool:
        """Return True if the operation is a module that runs once: then it can round this value and no other."""
        return op.module is not None and self.uses[op.module] == 1

    def stored(self, op: Operation, value: tuple[Branch, ...]) -> bool:
        """Return True if the value of an operation is an activation point, by the rules at the head of this file."""
        readers = [each for each in self.readers[op.key] if not moves_again(each, value)]
        if value[0].kind == "function" and op.kind in FUNCTIONS:
            return not (len(readers) == 1 and readers[0].kind == "point")  # the table's entries are codes
        several, rounded = len(self.readers[op.key]) > 1, len(readers) == 1 and readers[0].kind == "point"
        return several or op.kind == "point" and value[0].kind == "function" and not rounded or any(
            each.kind in READ_CODES or each.kind == "batchnorm" and not folds(value) for each in readers)

    def point(self, op: Operation, branches: tuple[Branch, ...], own: bool) -> Point:
        """Return a new point after an operation; own: its module can round, otherwise one has to be inserted."""
        what = "image" if branches[0].kind == "pixels" else op.name.replace(".", "_")
        name = op.name if own else unused(f"points.{what}", self.found)
        activation = op.kind if op.kind in CLIPS else "none"
        signed = op.kind not in CLIPS and not all(self.unsigned(branch) for branch in branches)
        if name in RESERVED or name == "image" and branches[0].kind != "pixels":
            raise BadInput(f"{name} rounds a value, and this is the name of another one: call the module otherwise")
        if not own:
            self.lacking.append((op, name))
        elif isinstance(op.module, RoundsValues):
            signed = op.module.signed
        if len(op.shape) > 3:
            raise BadInput(f"{op.name} gives a value of {len(op.shape)} dimensions that has to be stored: expected at "
                           "most channels, height and width")
        self.found[name] = Point(name, branches, activation, signed, op.shape)
        return self.found[name]

    def unsigned(self, branch: Branch) -> bool:
        """Return True if a branch cannot be below zero."""
        if branch.kind == "function":
            return branch.function in UNSIGNED
        return branch.kind not in ("layer", "norm", "pixels") and not any(self.found[s].signed for s in branch.sources)


def unused(name: str, taken) -> str:
    """Return a name that is not taken: as given, or with "_1" appended as often as needed."""
    while name in taken:
        name += "_1"
    return name


def moves_again(op: Operation, value) -> bool:
    """Return True if an operation moves elements that were moved before: both moves together are one."""
    return op.kind in MOVES and isinstance(value, tuple) and all(branch.kind == "moved" for branch in value)


def moved_branches(value: Point | tuple[Branch, ...], index: Tensor) -> list[Branch]:
    """Return the branches of a point's elements, or of elements that were moved before, at the places of `index`."""
    if isinstance(value, Point):
        return [Branch("moved", "", value.name, index=index, elements=math.prod(value.shape))]
    return [replace(branch, index=F.pad(branch.index.flatten(), (1, 0))[index]) for branch in value]


def folds(value) -> bool:
    """Return True if a BatchNorm that reads this value is folded into it: a layer without one."""
    return isinstance(value, tuple) and len(value) == 1 and value[0].kind == "layer" and value[0].norm is None


# ---- Reading a network, and preparing one --------------------------------------------------------

KEPT = "_graph_read"  # the attribute that caches a network's graph, and the structure it is for


def _structure(model: nn.Module) -> list:
    """Return what decides a network's graph: its modules, and their plain attributes."""
    plain = (int, float, str, tuple, type(None))
    return [(name, module, type(module), {key: value for key, value in vars(module).items()
                                          if isinstance(value, plain) and key not in ("training", KEPT)})
            for name, module in model.named_modules()]


def read_graph(model: nn.Module) -> Graph:
    """Return the graph of a network. It is traced once; the network keeps it until one of its modules is changed.

    Raises BadInput, naming it, for an operation without a rule, and where a stored value is no module's output.

    >>> net = prepare(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(7200, 10)))
    >>> [(point.name, point.branches[0].kind) for point in read_graph(net).points]
    [('points.image', 'pixels'), ('1', 'layer'), ('points.2', 'moved'), ('logits', 'layer')]
    """
    kept = vars(model).get(KEPT)
    return kept[1] if kept and kept[0] == _structure(model) else _keep(model, _Walk(trace(model)))


def _keep(model: nn.Module, walk: _Walk) -> Graph:
    """Return the graph that a walk found, and keep it with the network."""
    if walk.lacking:
        raise BadInput(f"{walk.lacking[0][0].name} gives a value that has to be rounded, and is read unrounded: "
                       "graph.prepare inserts the activation points of a network")
    (end,) = [op for op in walk.operations if not walk.readers[op.key]]  # what the network returns
    last = walk.values[end.key]
    if isinstance(last, Point) or last[0].kind in ("function", "pixels"):
        raise BadInput("the network ends in an activation point: expected a layer whose sums are the logits")
    if len(end.shape) != 1:
        raise BadInput(f"the network returns {'x'.join(map(str, end.shape))} values for an image: expected one "
                       "dimension, as flatten(1) gives")
    operations = tuple(replace(op, kind="nothing") if op.kind == "point" and op.name not in walk.found else op
                       for op in walk.operations)  # an Identity that passes on what is rounded already, or never is
    graph = Graph(operations, (*walk.found.values(), Point("logits", last, "none", True, end.shape)))
    vars(model)[KEPT] = _structure(model), graph
    return graph


def prepare(model: nn.Module) -> nn.Module:
    """Return a network in eval mode in which every value that is stored is a module's output.

    It is a copy with the same state dict whose forward pass is made from the model's graph, and whose modules are those
    of torch.nn, and of this repository, alone: what runs is what is counted. There, where a value has to be rounded is
    an nn.Identity, or the activation, called points.NAME, and pointwise functions are modules called functions.NAME.
    NAME is that of the operation with "_" for ".": layers.0.bn1 becomes points.layers_0_bn1. A prepared network is
    returned as it is, if no value lacks a module again. Raises BadInput as `read_graph` does.
    """
    walk = _Walk(trace(model.eval()))
    loose = [op for op in walk.operations if op.kind in FUNCTIONS and not walk.alone(op)]
    graph, modules = copy.deepcopy(traced(copied(model).to("meta"))), {}
    rewritten = [node for node in graph.nodes if node.op in ("call_function", "call_method")
                 and node.target in REWRITTEN]
    if type(model) in PREPARED and not walk.lacking and not loose and not rewritten:
        _keep(model, walk)
        return model
    for taken in ("points", "functions"):
        if hasattr(model, taken) and (walk.lacking or loose):
            raise BadInput(f"the network has a part called {taken}, the name of what is inserted: call it otherwise")
    nodes = {node.name: node for node in graph.nodes}

    def becomes_a_module(op: Operation, name: str) -> None:
        node, modules[name] = nodes[op.key], SPELLINGS[op.kind][0]()
        node.op, node.target, node.args, node.kwargs = "call_module", name, node.args[:1], {}

    for op, name in walk.lacking:
        if op.kind in CLIPS:
            becomes_a_module(op, name)
            continue
        node, modules[name] = nodes[op.key], nn.Identity()
        with graph.inserting_after(node):
            inserted = graph.create_node("call_module", name, (node,))
        node.replace_all_uses_with(inserted, lambda user, inserted=inserted: user is not inserted)
    for op in loose:
        becomes_a_module(op, unused("functions." + op.name.replace(".", "_"), modules))
    for node in rewritten:
        node.target = REWRITTEN[node.target]
    # a network's own code could do what its graph does not show, such as run layers from a list, which no quantizer
    # replaces
    network = copy.deepcopy(model)
    for module in network.modules():
        module.__class__ = next(base for base in type(module).__mro__ if base.__module__.startswith(KNOWN))
    for name, module in modules.items():
        holder, _, own = name.partition(".")
        if not hasattr(network, holder):
            network.add_module(holder, nn.Module())
        network.get_submodule(holder).add_module(own, module)
    graph.lint()
    forward = type(fx.GraphModule(network, graph)).forward
    network.__class__ = type(type(model).__name__, (type(network),), {"forward": forward})
    PREPARED[type(network)] = graph
    read_graph(network)
    return network


def prepare_if_possible(model: nn.Module) -> nn.Module:
    """Return `prepare` of a network or, if that cannot be followed or has an operation without a rule, itself."""
    try:
        return prepare(model)
    except BadInput:
        return model


def sole_readers(model: nn.Module, training: bool = False) -> dict[str, str] | None:
    """Return {module: the only module that reads its output} of any network; both run once, and without hooks.

    It is so in eval mode and, with `training`, in the modules' own modes as well, in which a pass may leave out some at
    random. Return None if the forward pass cannot be followed.
    """
    found = []
    for mode in (False, True)[:1 + training]:
        try:
            nodes = list(traced(model, mode).nodes)
        except BadInput:
            return None
        times = Counter(node.target for node in nodes if node.op == "call_module"
                        and not has_hooks(model.get_submodule(node.target)))
        found.append({node.target: reader.target for node in nodes for reader in list(node.users)[:1]
                      if node.op == reader.op == "call_module" and len(node.users) == 1
                      and times[node.target] == times[reader.target] == 1})
    return {name: reader for name, reader in found[0].items() if found[-1].get(name) == reader}


def normalised_convolutions(model: nn.Module, norms=(nn.BatchNorm2d,)) -> dict[str, str] | None:
    """Return {convolution: the normalisation that alone reads its output} of any network; None as `sole_readers` does.

    norms: the classes of normalisations.
    """
    readers = sole_readers(model)
    return None if readers is None else {
        name: reader for name, reader in readers.items() if isinstance(model.get_submodule(name), nn.Conv2d)
        and isinstance(model.get_submodule(reader), norms)}


def layers_as_run(model: nn.Module) -> list[str]:
    """Return the names of the convolutions and linear layers in the order in which they run.

    If the forward pass cannot be followed, or runs none of them, it is that in which they are registered.
    """
    names = [name for name, _ in weight_layers(model)]
    try:
        nodes = traced(model).nodes
    except BadInput:
        return names
    return [node.target for node in nodes if node.op == "call_module" and node.target in names] or names


def scale_free_weights(model: nn.Module) -> list[Tensor]:
    """Return the weights of any network that can be scaled without a change of its output in training.

    They are those of the convolutions whose output only a normalisation reads. If the forward pass cannot be followed,
    they are all convolutions of a network that has normalisations, and else none. A bias before a GroupNorm would have
    to be scaled, too; being trained, it adapts.
    """
    norms = nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d
    names = normalised_convolutions(model, norms)
    if names is None:
        has_norms = any(isinstance(module, norms) for module in model.modules())
        names = [name for name, layer in weight_layers(model) if isinstance(layer, nn.Conv2d) and has_norms]
    return [model.get_submodule(name).weight for name in names]
