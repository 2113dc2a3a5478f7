"""The operations of a network's own forward pass, traced by torch.fx and named uniformly.

The same operation may be written as a module, a function, a method or in place (nn.ReLU, F.relu, x.relu_()). Here, and
nowhere else, it gets one name, its kind. Unknown operations are refused by name, for all users of the list.
"""
import copy
import inspect
import math
import operator
import weakref
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from compressed.cifar100 import IMAGE_SIZE
from compressed.errors import BadInput, refused

CLIPS = "relu", "relu6"
FUNCTIONS = "hardswish", "hardsigmoid", "sigmoid", "silu", "gelu"  # other pointwise functions; lookup tables, on codes
MOVES = "moved", "concatenation"  # the output's elements are those of the inputs, at other places
SPELLINGS = {  # kind: the modules, functions and methods that compute it; graph.prepare inserts the first
    "conv": (nn.Conv2d,), "linear": (nn.Linear,), "batchnorm": (nn.BatchNorm2d,), "point": (nn.Identity,),
    "relu": (nn.ReLU, F.relu, F.relu_, torch.relu, "relu", "relu_"), "relu6": (nn.ReLU6, F.relu6),
    "hardswish": (nn.Hardswish, F.hardswish), "hardsigmoid": (nn.Hardsigmoid, F.hardsigmoid),
    "sigmoid": (nn.Sigmoid, F.sigmoid, torch.sigmoid, "sigmoid", "sigmoid_"), "silu": (nn.SiLU, F.silu),
    "gelu": (nn.GELU, F.gelu), "add": (operator.add, operator.iadd, torch.add, "add", "add_"),
    "product": (operator.mul, operator.imul, torch.mul, "mul", "mul_"), "concatenation": (torch.cat, torch.concat),
    "mean": (nn.AvgPool2d, nn.AdaptiveAvgPool2d, F.avg_pool2d, F.adaptive_avg_pool2d, torch.mean, "mean"),
    "max": (nn.MaxPool2d, F.max_pool2d, torch.max_pool2d),
    "moved": (nn.Flatten, operator.getitem, F.pad, torch.flatten, torch.reshape, torch.transpose, torch.permute,
              torch.squeeze, torch.unsqueeze, "flatten", "reshape", "transpose", "permute", "squeeze", "unsqueeze",
              "view", "expand", "expand_as"),
    "split": (torch.chunk, torch.split, "chunk", "split"),
    "nothing": (nn.Dropout, nn.Dropout2d, F.dropout, F.dropout2d, "contiguous")}
# torchvision's function, which torch.fx does not follow; by name, because nothing else here needs torchvision
STOCHASTIC_DEPTH = "torchvision.ops.stochastic_depth.stochastic_depth"
KINDS = {spelling: kind for kind, spellings in SPELLINGS.items() for spelling in spellings}
# {what graph.prepare replaces: by what}: a rounded value, in float32, does not hold a sum; and maps are channels-last,
# so that some views of them are impossible
REWRITTEN = {operator.iadd: operator.add, operator.imul: operator.mul, "add_": "add", "mul_": "mul",
             "view": "reshape"}
NORMALISATIONS = {"product": "scale", "add": "shift"}  # of the image, by constants
NOT_LISTED = "size", "constant", "split"  # no operations: numbers, stored tensors, and tuples, whose parts are some
PREPARED = weakref.WeakKeyDictionary()  # class of a network that graph.prepare made: the graph of its forward pass
CONTAINERS = nn.Sequential, nn.ModuleList, nn.ModuleDict


@dataclass(frozen=True)
class Window:
    """The positions of a map that a convolution or a pooling reads for one output: (vertical, horizontal) each."""
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Operation:
    """An operation for one image.

    key: the name of its node in the traced graph. name: unique; the module's, or that of the module whose forward pass
    it is in and the kind, as in "layers.0.add". kind: a key of SPELLINGS, "input", or "scale" or "shift" of the input
    by constants, at most one for each channel. inputs: keys of the operations that it reads.
    fan_in: terms of a dense dot product, or the number of values that a mean or a maximum is taken of. shape: of its
    result, without the batch. module: the module that is called, or None. window: of a convolution or a pooling. index:
    of an operation in MOVES, for each input: at every place of the result the number of the input's element there,
    counted from 1 in row-major order; 0 where there is a zero or an element of another input.
    """
    key: str
    name: str
    kind: str
    inputs: tuple[str, ...]
    fan_in: int
    shape: tuple[int, ...]
    module: nn.Module | None = field(default=None, repr=False)
    window: Window | None = None
    index: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)

    @property
    def outputs(self) -> int:
        """The number of values that it computes for one image."""
        return math.prod(self.shape)

    @property
    def channels(self) -> int:
        return self.shape[0]


# ---- Tracing -------------------------------------------------------------------------------------

class RoundsValues(nn.Module):
    """Base of the modules that round values, in the place of a clip or an Identity. signed: whether codes have a sign.
    """
    signed: bool


class RoundsWeightsAlone:
    """Mixin of layers whose own forward pass rounds the weights, and is that of torch.nn otherwise."""


def has_hooks(module: nn.Module) -> bool:
    """Return True if a module has forward hooks, which torch.fx sees of neither the network nor a module of torch.nn.
    """
    return bool(module._forward_hooks or module._forward_pre_hooks)


class _Proxy(fx.Proxy):
    """A Proxy for which `x += y` and `x *= y` are operations of their own; torch.fx takes them for x + y and x * y."""

    def __iadd__(self, other):
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __imul__(self, other):
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})


class Tracer(fx.Tracer):
    """Follow a forward pass down to the modules of torch.nn; a module of the user's own is followed, too."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        """Only the image is followed: what else forward() takes has its default, on which a branch may depend."""
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        parameters = inspect.signature(root_fn).parameters
        for i, arg in enumerate(args):  # the module, the image, and the rest: not in the order of the signature
            default = parameters[arg.node.target].default if isinstance(arg, fx.Proxy) and i > 1 and (
                arg.node.target in parameters) else inspect.Parameter.empty  # *more is not the name of a parameter
            if default is not inspect.Parameter.empty:
                self.graph.erase_node(arg.node)
                args[i] = default
        return function, args

    def followed(self, model: nn.Module) -> fx.Graph:
        """Return the graph of a model's forward pass without unused *args and **kwargs."""
        graph = self.trace(model)
        for node in list(graph.nodes):
            if node.op == "placeholder" and node.target.startswith("*"):
                if node.users:
                    raise BadInput(f"the forward pass of {type(model).__name__} reads {node.target}: expected an image")
                graph.erase_node(node)
        return graph

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        known = any(base.__module__.startswith("torch.nn.") and base not in (nn.Module, *CONTAINERS)
                    for base in type(module).__mro__)
        return isinstance(module, RoundsValues) or known and not isinstance(module, CONTAINERS)


def copied(model: nn.Module) -> nn.Module:
    """Return a copy, which can be run without a change of the model's buffers and attributes."""
    with refused(f"{type(model).__name__} cannot be copied, so it has no rule"):  # computed weights, as of weight_norm
        return copy.deepcopy(model)


def traced(model: nn.Module, training: bool = False) -> fx.Graph:
    """Return the torch.fx graph of a network's forward pass in eval mode; of a prepared one (graph.prepare) its own.

    training: in the modes that its modules have instead; what a pass leaves out at random is then left out here, too.
    Raises BadInput if the forward pass cannot be followed, because it depends on values, or is not that of the class.
    """
    name = type(model).__name__
    own_call = type(model).__call__ is not nn.Module.__call__ and not isinstance(model, fx.GraphModule)
    if "forward" in vars(model) or own_call:  # torch.fx follows the class's
        raise BadInput(f"{name} is called by a function that is not its class's forward(): make that its forward pass")
    if type(model) in PREPARED:
        return PREPARED[type(model)]
    twin = copied(model) if training else copied(model).eval()
    with refused(f"the forward pass of {name} cannot be followed"):  # whatever it raises on a torch.fx.Proxy
        return Tracer().followed(twin)


class _Run(fx.Interpreter):
    """Runs a traced graph and keeps in `env` what every node gives."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module, garbage_collect_values=False)

    def gives(self, node: fx.Node, values: dict[fx.Node, Tensor]):
        """Return the result of a node if the nodes in `values` had these values, and all others those of the run.

        A tuple is computed anew from what it is made of.
        """
        def value(other):
            if other in values:
                return values[other]
            return self.gives(other, values) if self.is_tuple(other) else self.env[other]

        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value)
        return getattr(self, node.op)(node.target, args, kwargs)

    def is_tuple(self, node: fx.Node) -> bool:
        value = self.env[node]
        return isinstance(value, (tuple, list)) and any(isinstance(part, Tensor) for part in value)

    def memory(self, node: fx.Node) -> set[int]:
        """Return the storages of a node's tensors, by which views are known; tensors without data have them, too."""
        value = self.env[node]
        parts = value if isinstance(value, (tuple, list)) else (value,)
        return {part.untyped_storage()._cdata for part in parts if isinstance(part, Tensor)}

    def read(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes of the tensors that a node reads; x + x reads x twice. A tuple counts as its elements."""
        nodes, found = [], []
        fx.node.map_arg((node.args, node.kwargs), nodes.append)
        for each in nodes:
            found += self.read(each) if self.is_tuple(each) else [each] * isinstance(self.env[each], Tensor)
        return found


# ---- One node: its kind, and what it computes ----------------------------------------------------

def _pair(value) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values


def _padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    """Return the zeros (above, to the left) that a convolution adds; None if they differ from those on the other side.
    """
    if not isinstance(conv.padding, str):
        return conv.padding
    added = [d * (k - 1) * (conv.padding == "same") for d, k in zip(conv.dilation, conv.kernel_size)]
    return None if any(each % 2 for each in added) else tuple(each // 2 for each in added)


class _Node:
    """A node of a traced graph.

    module: that it calls, or None. spelling: see SPELLINGS. read: the nodes whose tensors, the `inputs`, it reads.
    """

    def __init__(self, node: fx.Node, run: _Run, model: nn.Module):
        self.node, self.run, self.result = node, run, run.env[node]
        self.module = model.get_submodule(node.target) if node.op == "call_module" else None
        self.spelling = node.target if self.module is None else next(
            (each for each in KINDS if isinstance(each, type) and isinstance(self.module, each)), None)
        self.read = run.read(node)
        self.inputs = [run.env[each] for each in self.read]
        self.kind = self.found_kind()

    def refused(self, why: str) -> BadInput:
        node = self.node
        return BadInput(f"{node.target}: {why}" if self.module is not None else
                        f"{node.name} ({node.op} {node.target} with {node.args[1:]}): {why}")

    def found_kind(self) -> str:
        """Return the kind. Raises BadInput, naming the node, if it has none."""
        node, kind = self.node, KINDS.get(self.spelling)
        if kind is None and self.is_stochastic_depth():
            kind = "nothing"
        if node.op in ("placeholder", "get_attr"):
            return {"placeholder": "input", "get_attr": "constant"}[node.op]
        several = self.run.is_tuple(node)
        if not isinstance(self.result, Tensor) and not several:
            return "size"  # x.size(0), x.shape
        if several and kind != "split":
            raise self.refused("it gives several tensors")
        if isinstance(self.module, RoundsValues):
            return "point"
        if kind is None:
            what = "this operation" if self.module is None else type(self.module).__name__
            raise self.refused(f"no counting rule for {what}")
        if node.target is operator.getitem and not node.users and self.run.is_tuple(node.args[0]):
            return "size"  # a part of a split that nobody reads
        return kind

    def is_stochastic_depth(self) -> bool:
        function = self.node.target
        return callable(function) and f"{function.__module__}.{function.__qualname__}" == STOCHASTIC_DEPTH

    def arguments(self, **defaults) -> dict:
        """Return the parameters by name, in the order in which the function takes them."""
        if self.module is not None:
            return {name: getattr(self.module, name, default) for name, default in defaults.items()}
        args, kwargs = fx.node.map_arg((self.node.args[1:], dict(self.node.kwargs)), self.run.env.__getitem__)
        return defaults | dict(zip(defaults, args)) | {k: v for k, v in kwargs.items() if k in defaults}

    def faults(self, own: set[str]) -> Iterator[str]:
        """Yield why this differs from the operation that it looks like. own: names of all parameters and statistics."""
        node, module, kind = self.node, self.module, self.kind
        ours = type(module).__module__.startswith(("compressed.", "training."))
        if module is not None and not (ours and isinstance(module, (RoundsValues, RoundsWeightsAlone))):
            for part in ("weight", "bias", "running_mean", "running_var"):
                if vars(module).get(part) is not None or hasattr(type(module), part):
                    yield f"its {part} is computed; expected a parameter or buffer of its own"
            steps = "forward", "_conv_forward", "__call__", "_call_impl", "__getattr__", "__getattribute__"
            if vars(module).keys() & set(steps) or any(getattr(type(module), step, None) is not getattr(
                    self.spelling, step, None) for step in steps):
                yield f"{type(module).__name__} has a forward pass of its own, which has no rule"
        if module is not None and has_hooks(module):
            yield "it has a forward hook, which could change what it computes: remove it"
        if kind == "batchnorm" and (module.weight is None or module.running_mean is None):
            yield "a BatchNorm without scale and shift, or without statistics, has no rule"
        if kind in ("conv", "linear", "batchnorm"):
            for part in ("weight", "bias", "running_mean", "running_var"):
                if getattr(module, part, None) is not None and f"{node.target}.{part}" not in own:
                    yield f"its {part} is shared with another layer; expected one of its own"
            if sum(each.op == "call_module" and each.target == node.target for each in node.graph.nodes) > 1:
                yield "it is used several times: each layer may run once"
        if kind == "linear" and self.inputs[0].dim() != 2:
            yield f"it reads {self.inputs[0].dim() - 1} dimensions of an image, expected one: flatten it before"
        if kind == "conv" and (module.padding_mode != "zeros" or _padding(module) is None):
            yield (f"padding {module.padding!r} in mode {module.padding_mode!r}; expected zeros, as many on "
                   "both sides")
        if kind not in NORMALISATIONS.values() and any(each.op == "get_attr" for each in self.read):
            yield "it reads a constant: only the image can, a buffer with at most one value for each channel"
        if kind in ("add", "product"):
            shapes = sorted((tuple(each.shape) for each in self.inputs), key=lambda shape: -sum(shape))
            gate = len(shapes) == 2 and kind == "product" and shapes[1] == (*shapes[0][:2], 1, 1)
            plain = all(isinstance(each, fx.Node) for each in (*node.args, *node.kwargs.values()))  # without alpha
            if not plain:
                yield f"no counting rule for {kind} with a number (sum([a, b]) begins with 0 + a: write a + b)"
            elif not (gate or len(shapes) == 2 and shapes[0] == shapes[1]):
                yield f"no counting rule for {kind} of {shapes}"
        if kind == "gelu" and self.arguments(approximate="none")["approximate"] != "none":
            yield "the tanh approximation of GELU has no rule; expected approximate='none'"
        if self.spelling in (F.dropout, F.dropout2d) and self.arguments(p=0.5, training=True)["training"]:
            yield "a dropout that is switched on in eval mode, too; pass training=self.training"
        if self.is_stochastic_depth() and self.arguments(p=0.5, mode="row", training=True)["training"]:
            yield "it leaves out blocks in eval mode, too; pass training=self.training"
        if node.target is operator.getitem and kind == "moved" and any(
                not isinstance(each, (int, slice, type(None), type(...))) for each in (
                    node.args[1] if isinstance(node.args[1], tuple) else node.args[1:])):
            yield "a list of indices would have to be stored, and has no counting rule: use slices, chunk or transpose"
        if node.kwargs.get("out") is not None:
            yield "it writes its result over another tensor: leave out=... away"
        if self.in_place():
            order, changed = list(node.graph.nodes), self.run.memory(node.all_input_nodes[0])
            place = order.index(node)
            for other in order[:place]:
                late = [user for user in order[place + 1:] if user in other.users]
                if late and changed & self.run.memory(other):
                    yield f"it changes {other.name} in place, which {late[0].name} reads afterwards: change a copy"

    def normalises(self, parameters: set[str]) -> bool:
        """Return True if this combines what it reads with numbers, or buffers of at most one value for each channel."""
        (value,) = [each for each, node in zip(self.inputs, self.read) if node.op != "get_attr"]
        channels = value.shape[1]
        return self.result.shape == value.shape and all(
            node.target not in parameters
            and (constant.numel() == 1 or constant.numel() == channels == constant.shape[-3:].numel()
                 and constant.shape[-2:] == (1, 1))
            for constant, node in zip(self.inputs, self.read) if node.op == "get_attr")

    def in_place(self) -> bool:
        """Return True if the node writes its result over the tensor that it reads first."""
        node = self.node
        method = node.op == "call_method" and node.target.endswith("_")
        return bool(method or node.target in (operator.iadd, operator.imul, F.relu_)
                    or self.kind in (*CLIPS, *FUNCTIONS) and self.arguments(inplace=False)["inplace"] is True)

    def window(self) -> Window | None:
        """Return the window of a convolution or a pooling, otherwise None. Raises BadInput for one that has no rule."""
        if self.kind == "conv":
            return Window(self.module.kernel_size, self.module.stride, _padding(self.module), self.module.dilation)
        if self.kind not in ("mean", "max"):
            return None
        size, out = tuple(self.inputs[0].shape[2:]), tuple(self.result.shape[2:])
        window = self.pooled(size) if len(size) == 2 else None
        if window is None:
            raise self.refused("a mean is over both dimensions of a map, or over equal windows without padding; the "
                               f"map is {'x'.join(map(str, size))}")
        floor = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in
                      zip(size, window.kernel, window.stride, window.padding, window.dilation))
        if out not in (floor, ()):
            raise self.refused("pooling with ceil_mode reads beyond the map's edge, which has no rule")
        return window

    def pooled(self, size: tuple[int, int]) -> Window | None:
        """Return the window of a mean or maximum over positions of a map of this size; None for another kind of mean.
        """
        if self.spelling in (torch.mean, "mean"):
            dims = self.arguments(dim=None)["dim"]
            dims = dims if isinstance(dims, (tuple, list)) else ()
            return Window(size, size) if sorted(dim % 4 for dim in dims) == [2, 3] else None
        if self.spelling in (nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d):
            out = tuple(self.result.shape[2:])
            kernel = tuple(whole // max(part, 1) for whole, part in zip(size, out))
            return Window(kernel, kernel) if size == tuple(k * part for k, part in zip(kernel, out)) else None
        more = {"dilation": 1} if self.kind == "max" else {
            "ceil_mode": False, "count_include_pad": True, "divisor_override": None}
        given = self.arguments(kernel_size=None, stride=None, padding=0, **more)
        kernel, padding = _pair(given["kernel_size"]), _pair(given["padding"])
        if self.kind == "mean" and (any(padding) or given["divisor_override"]):
            return None
        return Window(kernel, _pair(given["stride"] or kernel), padding, _pair(given.get("dilation", 1)))

    def index(self) -> tuple[tuple[Tensor, ...], list[fx.Node]]:
        """Return (Operation.index, the nodes that it indexes): the operation is run on the numbers of their elements.

        A tensor that is read twice has one index, and one whose shape alone is read has none. float64, which holds
        the numbers exactly, also holds any number with which a tensor is padded.
        """
        nothing = {each: torch.zeros(self.run.env[each].shape, dtype=torch.float64) for each in self.read}
        empty = self.run.gives(self.node, nothing)
        if empty.any():
            raise self.refused("it adds elements that are not zero")
        if empty.shape[0] != 1:
            raise self.refused("it moves elements between images, or drops their dimension: flatten(1) keeps it")
        counted = {each: nothing | {each: torch.arange(1.0, zeros.numel() + 1, dtype=torch.float64).view(zeros.shape)}
                   for each, zeros in nothing.items()}
        found = {each: self.run.gives(self.node, values) for each, values in counted.items()}
        moved = {each: numbers[0].long().contiguous() for each, numbers in found.items() if numbers.any()}
        if not moved:
            raise self.refused("it takes no element of what it reads")
        return tuple(moved.values()), list(moved)

    def operation(self, name: str) -> Operation:
        """Return the Operation of this node."""
        out, kind, read, index = self.result, self.kind, self.read, ()
        if kind in MOVES:
            index, read = self.index()
            same = kind == "moved" and torch.equal(index[0].flatten(), torch.arange(1, self.inputs[0].numel() + 1))
            (_, channels, *before), (_, left, *after) = self.inputs[0].shape, out.shape
            if same and channels == left and (before == after or math.prod(before) == math.prod(after) == 1):
                kind = "nothing"  # also [N, C, 1, 1] to [N, C], or back
        if kind == "product" and self.inputs[0].shape[2:].numel() < self.inputs[1].shape[2:].numel():
            read = read[::-1]
        window = self.window()
        fan_in = window.kernel[0] * window.kernel[1] if window else 0
        if kind in ("conv", "linear"):
            fan_in = self.module.weight[0].numel()
        return Operation(self.node.name, name, kind, tuple(each.name for each in read if each.op != "get_attr"),
                         fan_in, tuple(out.shape[1:]), self.module, window, index)


# ---- The list ------------------------------------------------------------------------------------

def _named(nodes: Collection[_Node]) -> Iterator[tuple[_Node, str]]:
    """Yield the nodes with unique names: the module's, or that of the module whose forward pass it is in, and the kind.

    If several would have the same name, all but the first are numbered. No other node gets a module's name.
    """
    owners = {}
    for each in nodes:
        if each.module is not None:
            owners.setdefault(each.node.target, each)
    for each in nodes:
        base = {"call_module": each.node.target, "placeholder": each.node.name}.get(each.node.op)
        if base is None:
            stack = list(each.node.meta.get("nn_module_stack", {}).values())
            base = ".".join(filter(None, (stack[-1][0] if stack else "", each.kind)))
        name, number = base, 0
        while owners.setdefault(name, each) is not each:
            number += 1
            name = f"{base}_{number}"
        yield each, name


def trace(model: nn.Module, shape: tuple[int, int, int] = (3, IMAGE_SIZE, IMAGE_SIZE)) -> list[Operation]:
    """Return every operation of a model for one image of `shape` (channels, height, width), in execution order.

    The graph is that of the model's own `forward` in eval mode, followed on tensors without data; the model is left as
    it was. Every result is read by another operation, but for the one that is returned. Raises BadInput, naming it, for
    anything that has no rule here.

    >>> [op.kind for op in trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))]
    ['input', 'conv', 'batchnorm', 'relu']
    """
    if has_hooks(model):
        raise BadInput(f"{type(model).__name__} has a forward hook, which could change its input or its logits: remove "
                       "it")
    twin = copied(model)
    with refused(f"{type(model).__name__} cannot be followed without its data"):
        twin.to("meta").eval()
    graph = traced(twin)
    for node in graph.nodes:  # torch.fx keeps a tensor that the forward pass makes in the module that it follows
        if node.op == "get_attr" and node.target.startswith("_tensor_constant") and not hasattr(twin, node.target):
            raise BadInput(f"the forward pass of {type(model).__name__} makes a tensor of constants: use a number, or "
                           "make it a buffer")
    run = _Run(fx.GraphModule(twin, graph))
    with refused(f"{type(model).__name__} does not take an image of {'x'.join(map(str, shape))}"), torch.no_grad():
        run.run(torch.empty(1, *shape, device="meta"))
    nodes, operations, parameters = {}, [], {name for name, _ in model.named_parameters()}
    *computed, output = graph.nodes
    for node in computed:
        nodes[node] = found = _Node(node, run, model)
        values = [nodes[each].kind for each in found.read if each.op != "get_attr"]
        if (found.kind in NORMALISATIONS and len(values) == 1 and values[0] in ("input", *NORMALISATIONS.values())
                and found.normalises(parameters)):
            found.kind = NORMALISATIONS[found.kind]
    if len(run.read(output)) != 1 or not isinstance(run.env[output], Tensor):
        raise BadInput(f"the network returns {type(run.env[output]).__name__}, expected one tensor, the logits")
    own = parameters | {name for name, _ in model.named_buffers() if name.endswith((".running_mean", ".running_var"))}
    for each, name in _named(nodes.values()):
        if each.kind not in NOT_LISTED:
            for why in each.faults(own):
                raise each.refused(why)
            operations.append(each.operation(name))
    (returned,), read = output.all_input_nodes, {key for op in operations for key in op.inputs}
    for op in operations:
        if op.key == returned.name and op.key in read:
            raise BadInput(f"{op.name} is returned as the logits, but read by another operation, too: return what is "
                           "computed last")
        if op.key != returned.name and op.key not in read:
            raise BadInput(f"{op.name} is computed, but read by nothing")
    return operations
