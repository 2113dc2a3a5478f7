"""The operations of a network's own forward pass, traced by torch.fx and brought to one spelling.

The same operation may be written as a module, a function, a method or in place (nn.ReLU, F.relu, x.relu_()). Here, and
nowhere else, it gets one name, its kind. Whatever is unknown is refused by its name, for everybody who reads the list.
"""
import copy
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from compressed.cifar100 import IMAGE_SIZE
from compressed.errors import BadInput

FUNCTIONS = "hardswish", "hardsigmoid", "sigmoid"  # pointwise functions, other than the two that clip: relu and relu6
CLIPS = "relu", "relu6"
MODULES = {nn.Conv2d: "conv", nn.Linear: "linear", nn.BatchNorm2d: "batchnorm", nn.ReLU: "relu", nn.ReLU6: "relu6",
           nn.Hardswish: "hardswish", nn.Hardsigmoid: "hardsigmoid", nn.Sigmoid: "sigmoid", nn.Identity: "point",
           nn.MaxPool2d: "max", nn.AvgPool2d: "mean", nn.AdaptiveAvgPool2d: "mean", nn.Flatten: "moved",
           nn.Dropout: "nothing", nn.Dropout2d: "nothing"}
CALLS = {"relu": (F.relu, F.relu_, torch.relu, "relu", "relu_"), "relu6": (F.relu6,), "hardswish": (F.hardswish,),
         "hardsigmoid": (F.hardsigmoid,), "sigmoid": (F.sigmoid, torch.sigmoid, "sigmoid", "sigmoid_"),
         "add": (operator.add, operator.iadd, torch.add, "add", "add_"),
         "product": (operator.mul, operator.imul, torch.mul, "mul", "mul_"), "concatenation": (torch.cat, torch.concat),
         "mean": (torch.mean, "mean", F.avg_pool2d, F.adaptive_avg_pool2d), "max": (F.max_pool2d, torch.max_pool2d),
         "moved": (torch.flatten, torch.reshape, F.pad, operator.getitem, "flatten", "view", "reshape", "permute",
                   "transpose", "squeeze", "unsqueeze", torch.transpose, torch.permute, torch.squeeze, torch.unsqueeze),
         "nothing": (F.dropout, F.dropout2d, "contiguous")}
KINDS = {call: kind for kind, calls in CALLS.items() for call in calls}
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

    name: unique; the module's, or made of the module that holds it and the kind, as in "layers.0.add". key: of its node
    in the traced graph. kind: a key of counting.RULES. inputs: the keys of the operations whose outputs it reads.
    fan_in: terms of a dense dot product, or the values that a mean averages or a maximum is taken of. outputs: elements
    that it makes. channels: of the output. module: the module itself (its weights are looked at when counting), or
    None. shape: of the output, without the batch. window: of a convolution or a pooling. index: where elements are only
    moved, for each input, the number of the element (from 1, in row-major order) that stands at each place of the
    output; 0 for a zero, and for an element of another input.
    """
    key: str
    name: str
    kind: str
    inputs: tuple[str, ...]
    fan_in: int
    outputs: int
    channels: int
    module: nn.Module | None = field(default=None, repr=False)
    shape: tuple[int, ...] = ()
    window: Window | None = None
    index: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)


# ---- Tracing -------------------------------------------------------------------------------------

def is_point(module: nn.Module) -> bool:
    """Whether values are rounded after this module: an activation, an Identity, or quantize.py's Quantizer for it."""
    return isinstance(module, (nn.ReLU, nn.ReLU6, nn.Identity)) or hasattr(module, "signed")


class Tracer(fx.Tracer):
    """Follows the forward pass down to the modules of torch.nn; a module of the user's own is followed, too."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        known = any(base.__module__.startswith("torch.nn.") and base not in (nn.Module, *CONTAINERS)
                    for base in type(module).__mro__)
        return hasattr(module, "signed") or known and not isinstance(module, CONTAINERS)


def traced(model: nn.Module) -> fx.Graph:
    """Return the graph of a network's forward pass; of one that graph.prepare rewrote, the graph it was made from.

    Raises BadInput if the forward pass cannot be followed, because it depends on values.
    """
    if hasattr(type(model), "prepared_graph"):
        return type(model).prepared_graph
    try:
        return Tracer().trace(model)
    except BadInput:
        raise
    except Exception as error:  # whatever the user's own forward pass raises on a torch.fx.Proxy
        raise BadInput(f"the forward pass of {type(model).__name__} cannot be followed: "
                       f"{' '.join(str(error).split())[:200]}") from error


class _Results(fx.Interpreter):
    """Runs a traced graph and keeps what every node gives."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.found = {}

    def run_node(self, node):
        self.found[node] = result = super().run_node(node)
        return result


# ---- One spelling --------------------------------------------------------------------------------

def _arguments(node: fx.Node, module: nn.Module | None, results: dict, **defaults) -> dict:
    """The parameters of a pooling, by name, in the order in which its function takes them."""
    if module is not None:
        return {name: getattr(module, name, default) for name, default in defaults.items()}
    args, kwargs = fx.node.map_arg((node.args[1:], dict(node.kwargs)), results.__getitem__)  # sizes of maps
    return defaults | dict(zip(defaults, args)) | {k: v for k, v in kwargs.items() if k in defaults}


def _pair(value) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values


def _mean_window(node, module, size: tuple[int, int], results: dict) -> Window | None:
    """The window of a mean over positions of a map of this size; None for a mean of another kind."""
    if node.target is F.adaptive_avg_pool2d or isinstance(module, nn.AdaptiveAvgPool2d):
        out = _pair(_arguments(node, module, results, output_size=None)["output_size"] or (0, 0))
        if not all(isinstance(part, int) and part and whole % part == 0 for whole, part in zip(size, out)):
            return None
        kernel = tuple(whole // part for whole, part in zip(size, out))
        return Window(kernel, kernel)
    if node.target is F.avg_pool2d or isinstance(module, nn.AvgPool2d):
        given = _arguments(node, module, results, kernel_size=None, stride=None, padding=0, ceil_mode=False,
                           count_include_pad=True, divisor_override=None)
        if any(_pair(given["padding"])) or given["ceil_mode"] or given["divisor_override"]:
            return None
        return Window(_pair(given["kernel_size"]), _pair(given["stride"] or given["kernel_size"]))
    given = _arguments(node, module, results, dim=None, keepdim=False)
    dims = given["dim"] if isinstance(given["dim"], (tuple, list)) else ()
    return Window(size, size) if sorted(dim % 4 for dim in dims) == [2, 3] else None


def _window(node, module, kind: str, inputs: list[Tensor], results: dict) -> Window | None:
    """The window of a convolution or a pooling. Raises BadInput, naming it, for one that nobody here can follow."""
    if kind == "conv":
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            raise BadInput(f"{node.target}: padding {module.padding!r} in mode {module.padding_mode!r}; expected "
                           "numbers, and zeros")
        return Window(module.kernel_size, module.stride, module.padding, module.dilation)
    size = tuple(inputs[0].shape[2:])
    if kind == "mean":
        window = _mean_window(node, module, size, results) if len(size) == 2 else None
        if window is None:
            raise BadInput(f"no counting rule for operation {node.name} ({node.target} with {node.args[1:]}): a mean "
                           "is over both dimensions of a map, or over windows without padding")
        return window
    given = _arguments(node, module, results, kernel_size=None, stride=None, padding=0, dilation=1)
    window = Window(_pair(given["kernel_size"]), _pair(given["stride"] or given["kernel_size"]),
                    _pair(given["padding"]), _pair(given["dilation"]))
    floor = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in
                  zip(size, window.kernel, window.stride, window.padding, window.dilation))
    if tuple(results[node].shape[2:]) != floor:
        raise BadInput(f"{node.name}: max pooling with ceil_mode reads beyond the map's edge, which has no rule")
    return window


def _index(node, module, read: list[fx.Node], results: dict) -> tuple[Tensor, ...]:
    """Operation.index: the operation itself is run on the numbers of the elements."""
    found = []
    for position in range(len(read)):
        numbers = {node: torch.zeros(results[node].shape, dtype=torch.int64) for node in read}
        source = results[read[position]]
        numbers[read[position]] = torch.arange(1, source.numel() + 1).view(source.shape)
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: numbers.get(n, results[n]))
        if module is not None:
            moved = module(*args)
        elif node.op == "call_method":
            moved = getattr(args[0], node.target)(*args[1:], **kwargs)
        else:
            moved = node.target(*args, **kwargs)
        if moved.shape[0] != 1:
            raise BadInput(f"{node.name} ({node.target}) moves elements between images")
        found.append(moved[0].contiguous())
    return tuple(found)


def _kind(node: fx.Node, module: nn.Module | None, results: dict) -> str:
    """The kind of a node of the traced graph. Raises BadInput, naming it, if it has none."""
    if node.op in ("placeholder", "get_attr"):
        return {"placeholder": "input", "get_attr": "constant"}[node.op]
    if not isinstance(results[node], Tensor):
        if isinstance(results[node], (tuple, list)) and any(isinstance(part, Tensor) for part in results[node]):
            raise BadInput(f"no counting rule for operation {node.name} ({node.op} {node.target}): it gives several")
        return "size"  # x.size(0), x.shape
    if module is not None:
        kind = next((kind for layer, kind in MODULES.items() if isinstance(module, layer)), None)
        if kind is None and not is_point(module):
            raise BadInput(f"no counting rule for layer {node.target} ({type(module).__name__})")
        return "point" if kind is None else kind
    kind = KINDS.get(node.target)
    if node.target in (F.dropout, F.dropout2d) and _arguments(node, None, results, p=0.5, training=True)["training"]:
        raise BadInput(f"{node.name}: a dropout that is switched on in eval mode, too; pass training=self.training")
    if kind is None:
        raise BadInput(f"no counting rule for operation {node.name} ({node.op} {node.target} with {node.args[1:]})")
    return kind


def _check_module(node: fx.Node, module: nn.Module, kind: str) -> None:
    """Raise BadInput for a layer that computes something other than what its class says."""
    if kind not in ("conv", "linear", "batchnorm"):
        return
    layer = next(layer for layer in MODULES if isinstance(module, layer))
    if type(module).forward is not layer.forward and not hasattr(module, "step"):  # ours round their weights
        raise BadInput(f"{node.target}: {type(module).__name__} has a forward pass of its own, which has no rule")
    if kind == "batchnorm" and (module.weight is None or module.running_mean is None):
        raise BadInput(f"{node.target}: a BatchNorm without scale and shift, or without statistics, has no rule")


def _check_shapes(node: fx.Node, kind: str, inputs: list[Tensor], values: int) -> None:
    """Raise BadInput for sums and products of other than two values, and of other than these shapes."""
    if kind not in ("add", "product"):
        return
    shapes = sorted((tuple(each.shape) for each in inputs), key=lambda shape: -sum(shape))
    fits = len(shapes) == 2 == values and "alpha" not in node.kwargs
    if not fits or shapes[0] != shapes[1] and (kind == "add" or shapes[1] != (*shapes[0][:2], 1, 1)):
        raise BadInput(f"no counting rule for operation {node.name} ({node.op} {node.target} with {node.args[1:]})")


# ---- The list ------------------------------------------------------------------------------------

def _normalisation(kind: str, kinds: list[str]) -> bool:
    """Whether an operation scales or shifts the network's input by constants: preprocessing."""
    return (kind in ("add", "product") and kinds[0] in ("input", "normalisation")
            and all(each == "constant" for each in kinds[1:]))


def _nodes(graph: fx.Graph, results: dict) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """(node, the nodes of the values that it reads; x + x reads x twice) of every node that gives a value."""
    for node in graph.nodes:
        read = []
        fx.node.map_arg((node.args, node.kwargs), read.append)
        yield node, [each for each in read if isinstance(results[each], Tensor)]


def _names(nodes, kinds: dict) -> dict[fx.Node, str]:
    """A unique name for every node: the module's, or the holding module's and the kind."""
    names, used = {}, Counter()
    for node in nodes:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        holder = f"{stack[-1][0]}." if stack and stack[-1][0] else ""
        name = {"call_module": node.target, "placeholder": node.name}.get(node.op, f"{holder}{kinds[node]}")
        names[node] = f"{name}_{used[name]}" if used[name] else name
        used[name] += 1
    return names


def trace(model: nn.Module, shape: tuple[int, int, int] = (3, IMAGE_SIZE, IMAGE_SIZE)) -> list[Operation]:
    """Return every operation of the model for one image of `shape` (channels, height, width), in the order of running.

    The graph is that of the model's own `forward` in eval mode, followed on tensors without data. Raises BadInput,
    naming it, for anything that has no rule here. The model is left as it was.
    """
    copied = copy.deepcopy(model).to("meta").eval()
    graph = traced(copied)
    run = _Results(fx.GraphModule(copied, graph))
    try:
        run.run(torch.empty(1, *shape, device="meta"))
    except (RuntimeError, TypeError, ValueError) as error:
        raise BadInput(f"{type(model).__name__} does not take an image of {'x'.join(map(str, shape))} "
                       f"({' '.join(str(error).split())[:200]})") from error
    results, kinds, read = run.found, {}, {}
    for node, inputs in _nodes(graph, results):
        if node.op == "output":
            if len(inputs) != 1 or not isinstance(results[node], Tensor):
                raise BadInput("the network returns more than its logits")
            continue
        module = model.get_submodule(node.target) if node.op == "call_module" else None
        kind = _kind(node, module, results)
        if _normalisation(kind, [kinds[each] for each in inputs]):
            kind = "normalisation"
        kinds[node], read[node] = kind, inputs
    uses = Counter(node.target for node in kinds if node.op == "call_module")
    names = _names(kinds, kinds)
    return [_operation(node, kind, names[node], read[node], results, uses,
                       model.get_submodule(node.target) if node.op == "call_module" else None)
            for node, kind in kinds.items() if kind not in ("size", "constant")]


def _operation(node, kind: str, name: str, read: list[fx.Node], results, uses: Counter, module) -> Operation:
    """The Operation of a node."""
    out, inputs, window, index = results[node], [results[each] for each in read], None, ()
    if module is not None:
        _check_module(node, module, kind)
        if uses[node.target] > 1 and next(module.parameters(), None) is not None:
            raise BadInput(f"{node.target} is used {uses[node.target]} times: each layer may run once")
    if kind != "normalisation":
        _check_shapes(node, kind, inputs, len(read))
    if kind in ("conv", "mean", "max"):
        window = _window(node, module, kind, inputs, results)
    if kind in ("moved", "concatenation"):
        index = _index(node, module, read, results)
        same = kind == "moved" and torch.equal(index[0].flatten(), torch.arange(1, inputs[0].numel() + 1))
        if same and inputs[0].shape[1] == out.shape[1]:
            kind = "nothing"  # [N, C, 1, 1] to [N, C], or back
    if kind == "linear" and inputs[0].dim() != 2:
        raise BadInput(f"{name} reads {inputs[0].dim() - 1} dimensions of an image, expected one: flatten it before")
    if kind == "product" and inputs[0].shape[2:].numel() < inputs[1].shape[2:].numel():
        read = read[::-1]
    if kind in ("conv", "linear"):
        fan_in = module.weight[0].numel()
    else:
        fan_in = window.kernel[0] * window.kernel[1] if window else 0
    channels = out.shape[-1] if kind == "linear" else out.shape[1]
    return Operation(node.name, name, kind, tuple(each.name for each in read if each.op != "get_attr"), fan_in,
                     out.numel(), channels, module, tuple(out.shape[1:]), window, index)
