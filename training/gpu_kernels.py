"""Train faster on a GPU: BatchNorm with activation, depthwise convolution (triton_kernels.py), 1x1 convolution.

Before a stage starts, the largest layer of each kind is timed with these kernels and with PyTorch's functions, forward
and backward, for the stage's batch and image sizes, and the results are compared. If the kernels are faster, all layers
of the kind use them. Without Triton, or where a kernel fails or computes something else, PyTorch's functions are used.
Every variant of a kernel that the compiler makes is tried in this way.
"""
import contextlib
import copy
import dataclasses
import functools
import importlib
import math
import time
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import nn

from compressed.cifar100 import IMAGE_SIZE
from compressed.command_line import say_once
from compressed.errors import one_line
from compressed.graph import sole_readers
from training import cpu_kernels
from training.cpu_kernels import ACTIVATIONS, chains, exchanged, included
from training.cuda_graphs import Graphs

KINDS = "depthwise", "1x1", "BatchNorm"  # of layers that may use the kernels
AGREEMENT = 2.0**-5  # largest distance from PyTorch's results, relative to their norm; bfloat16 rounds to 2^-9
LARGEST = 2**31 - 2**24  # values of a map: the kernels' offsets, also of masked positions, are 32-bit integers
MOST_CHANNELS = 2**14  # of a sum that several programs share: triton_kernels.arrivals has room for twice as many
DTYPES = torch.bfloat16, torch.float16, torch.float32


# ---- Layers --------------------------------------------------------------------------------------

def takes(x: torch.Tensor, layer: nn.Module) -> bool:
    """Return True if the kernels compute this input: (height, width) is one of the layer's `sizes`, or these are None.

    Its type must be the layer's dtype, with which the kernels were tried; None: any that is supported.
    """
    return ((layer.sizes is None or tuple(x.shape[2:]) in layer.sizes) and layer.dtype in (None, x.dtype)
            and x.dtype in DTYPES and 0 < x.numel() <= LARGEST)


class BatchNorm(cpu_kernels.BatchNorm):
    """Compute BatchNorm2d and the following `activation` with Triton for inputs of `sizes`, else with PyTorch.

    seen: list to which forward() appends (BatchNorm, batch statistics), for `update_statistics` after the network's
    forward pass; None: forward() updates the running statistics itself.
    """
    sizes, dtype, seen = (), None, None

    @staticmethod
    def fits(norm: nn.BatchNorm2d) -> bool:
        """Return True if the kernels can compute this BatchNorm."""
        return norm.momentum is not None and cpu_kernels.BatchNorm.fits(norm) and norm.num_features <= MOST_CHANNELS

    def forward(self, x):
        # renew_statistics sets the momentum of a copy to None for a plain mean
        if not self.training or self.momentum is None or not takes(x, self) or x.numel() == self.num_features:
            return self.by_pytorch(x)
        activation, (norm, statistics) = ACTIVATIONS.index(self.activation), getattr(x, "statistics", (None, None))
        if norm is self:
            y = torch.ops.training.normalise_by(x, statistics, self.weight, self.bias, activation)
        else:
            y, statistics = torch.ops.training.normalise(x, self.weight, self.bias, self.running_mean, self.eps,
                                                         activation)
        seen = [] if self.seen is None else self.seen
        if any(norm is self for norm, _ in seen):  # it runs twice in a forward pass: in turn, not at once
            update_statistics(seen)
        seen.append((self, statistics.detach()))
        if self.seen is None:
            update_statistics(seen)
        return self.marked(y)


def update_statistics(seen: list) -> None:
    """Move the running statistics of BatchNorms towards those of their batches; clear the list.

    All BatchNorms with the same momentum are updated at once, by a few launches in place of several for each of them.

    seen: [(BatchNorm, statistics as the operator `normalise` returns them)].
    """
    for momentum in {norm.momentum for norm, _ in seen}:
        some = [pair for pair in seen if pair[0].momentum == momentum]
        running = [buffer for norm, _ in some for buffer in (norm.running_mean, norm.running_var)]
        with torch.no_grad():
            torch._foreach_lerp_(running, [row for _, statistics in some for row in statistics[:2].unbind()], momentum)
            torch._foreach_add_([norm.num_batches_tracked for norm, _ in some], 1)
    seen.clear()


def dense(x: torch.Tensor) -> torch.Tensor:
    """Return x [N, C, H, W] in dense channels-last memory, as the kernels read it."""
    return x.contiguous(memory_format=torch.channels_last)


class Depthwise(nn.Conv2d):
    """Compute a depthwise Conv2d with Triton for inputs of `sizes`, else with PyTorch.

    norm: the BatchNorm that reads the result, or None. The result has its statistics with it: (norm, statistics).
    """
    sizes, dtype, norm = (), None, None

    @staticmethod
    def fits(conv: nn.Conv2d) -> bool:
        """Return True if the kernels can compute this convolution."""
        return cpu_kernels.Depthwise.fits(conv) and conv.out_channels <= MOST_CHANNELS

    def forward(self, x):
        x = x.to(torch.get_autocast_dtype("cuda")) if torch.is_autocast_enabled("cuda") else x
        if not takes(x, self):
            return super().forward(x)
        if self.norm is None or not self.norm.training:
            return torch.ops.training.depthwise(x, self.weight, self.stride[0])
        y, statistics = torch.ops.training.depthwise_with_statistics(x, self.weight, self.stride[0],
                                                                     self.norm.running_mean, self.norm.eps)
        y.statistics = self.norm, statistics
        return y


class Product(torch.autograd.Function):
    """Multiply maps x [..., channels] by a matrix [outputs, channels], which is rounded to the type of x.

    The matrix's gradient leaves the product in float32, without the rounding of autocast and its kernel.
    """

    @staticmethod
    def forward(ctx, x, matrix):
        matrix = matrix.to(x.dtype)
        ctx.save_for_backward(x, matrix)
        return F.linear(x, matrix)

    @staticmethod
    def backward(ctx, dy):
        x, matrix = ctx.saved_tensors
        dy, rows = dy.to(x.dtype).flatten(0, -2), x.flatten(0, -2)
        dmatrix = torch.mm(dy.t(), rows, out_dtype=torch.float32) if x.is_cuda and x.dtype != torch.float32 else \
            (dy.t() @ rows).float()
        return (dy @ matrix).view_as(x), dmatrix


class Pointwise(nn.Conv2d):
    """Compute a 1x1 Conv2d as a matrix product (cuBLAS) for inputs of `sizes`, else as PyTorch does (cuDNN)."""
    sizes, dtype = (), None

    @staticmethod
    def fits(conv: nn.Conv2d) -> bool:
        """Return True if this convolution is a matrix product."""
        return (conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1)

    def forward(self, x):
        x = x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x
        if not takes(x, self):
            return super().forward(x)
        pixels, matrix = dense(x).permute(0, 2, 3, 1), self.weight.flatten(1)
        y = Product.apply(pixels, matrix) if self.bias is None else F.linear(pixels, matrix, self.bias)
        return y.permute(0, 3, 1, 2)


CONVOLUTIONS = {"depthwise": Depthwise, "1x1": Pointwise}


def with_kernels(kind: str, layer: list[nn.Module], activation: str, **attributes) -> dict[nn.Module, type]:
    """Return {module: class to give it}, so that a layer (see Layer.example) uses the kernels for inputs of `sizes`.

    attributes: those of the class: sizes, and what else BatchNorm and Depthwise have.
    """
    first, *behind = layer
    if kind == "BatchNorm":
        return included({first: (activation, behind)}, BatchNorm, **attributes)
    own = CONVOLUTIONS[kind]
    return {first: type(own.__name__, (own,), attributes)}


# ---- Timing --------------------------------------------------------------------------------------

def alignment(channels: int) -> int:
    """Return the power of two, at most 8, that divides a number of channels: kernels are compiled for each."""
    return min(8, channels & -channels)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer and its input, as far as its time depends on them. captured: True if steps run as CUDA graphs.

    channels, outputs: numbers of input and of output channels. bias: True if a convolution has one.
    example: modules of this kind, [convolution] or [BatchNorm2d, activation].
    """
    kind: str
    channels: int
    outputs: int
    bias: bool
    height: int
    width: int
    stride: int
    activation: str
    batch: int
    dtype: torch.dtype
    device: torch.device
    captured: bool
    example: list[nn.Module] = dataclasses.field(compare=False, repr=False)

    @property
    def title(self) -> str:
        """The layers of one title use the kernels, or none does."""
        words = ["" if self.stride == 1 else f"stride {self.stride}", self.activation.replace("none", ""),
                 "with bias" * self.bias]
        return " ".join(filter(None, [self.kind, *words]))

    def modules(self) -> tuple[nn.Module, nn.Module]:
        """Return copies of the layer: (PyTorch's, ours), in training mode."""
        theirs, ours = (nn.Sequential(*copy.deepcopy(self.example)).to(self.device).train().requires_grad_()
                        for _ in range(2))
        sizes = (self.height, self.width),
        for module, kind in with_kernels(self.kind, list(ours), self.activation, sizes=sizes).items():
            module.__class__ = kind
        return theirs, ours

    def values(self) -> int:
        """Return the number of input and output values of one image, as if the stride were 1: layers are ranked by it.
        """
        return (self.channels + self.outputs) * self.height * self.width

    def maps(self, channels: int, height: int, width: int, seed: int) -> torch.Tensor:
        """Return random feature maps [batch, channels, height, width], channels-last, in the layer's type."""
        generator = torch.Generator(self.device).manual_seed(seed)
        x = torch.randn(self.batch, channels, height, width, device=self.device, generator=generator)
        return x.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def work(self, module: nn.Module):
        """Return a function that runs the layer forward and backward and returns [output, gradients]."""
        x = self.maps(self.channels, self.height, self.width, 0).requires_grad_()
        dy = self.maps(self.outputs, (self.height - 1) // self.stride + 1, (self.width - 1) // self.stride + 1, 1)

        def work():
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                y = module(x)
            return [y, *torch.autograd.grad(y, [x, *module.parameters()], dy)]
        return work


def seconds(work, captured: bool, device: torch.device) -> float:
    """Return the time that the device takes for work(), in a CUDA graph as training's steps are, if `captured`."""
    repeats = 4

    def several(*_):
        for _ in range(repeats):
            work()
    graphs, times = Graphs(several, device, timing_stream(device)), []
    run = (lambda: graphs.step("layer", ())) if captured else several
    for _ in range(8):  # compiles kernels and allocates memory; records; replays
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000 / repeats)
    return min(times[3:])


@functools.cache
def timing_stream(device: torch.device) -> torch.cuda.Stream:
    # one for all timings: PyTorch has 32 streams of a priority, and then hands out the first ones again
    return torch.cuda.Stream(device)


def distance(found: list, wanted: list) -> float:
    """Return the largest distance of a tensor from the wanted one, relative to that one's norm; NaN counts as inf."""
    errors = [((one.float() - two.float()).norm() / two.float().norm().clamp(min=1e-20)).item()
              for one, two in zip(found, wanted, strict=True)]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


@functools.cache
def measured(layer: Layer) -> dict:
    """Return {"pytorch": seconds, "ours": seconds, "distance": of the results}; "error": why ours failed, if it did."""
    theirs, ours = (layer.work(module) for module in layer.modules())
    found = {"pytorch": seconds(theirs, layer.captured, layer.device), "ours": math.inf}
    try:
        found["distance"] = distance(ours(), theirs())
        if not found["distance"] <= AGREEMENT:
            raise ArithmeticError(f"its results are {found['distance']:.2g} from PyTorch's")
        found["ours"] = seconds(ours, layer.captured, layer.device)
    except Exception as error:  # the compiler, the driver or the device can fail in any way
        found["error"] = one_line(error)
        say_once(f"without our {layer.kind} kernels of {layer.channels} x {layer.height} x {layer.width}: "
                 f"{found['error']}")
    return found


@functools.cache
def statistics_gain(layer: Layer) -> float:
    """Return how many times as fast a depthwise layer and its normalisation are if its kernel computes the statistics.

    0.0 if that fails or gives something else.
    """
    x, operators = layer.maps(layer.channels, layer.height, layer.width, 0), torch.ops.training
    weight, zeros = layer.example[0].weight.detach().to(layer.device), torch.zeros(layer.outputs, device=layer.device)
    ones = torch.ones_like(zeros)

    def apart():
        return list(operators.normalise(operators.depthwise(x, weight, layer.stride), ones, zeros, zeros, 1e-5, 0))

    def together():
        y, statistics = operators.depthwise_with_statistics(x, weight, layer.stride, zeros, 1e-5)
        return [operators.normalise_by(y, statistics, ones, zeros, 0), statistics]
    try:
        if not distance(together(), apart()) <= AGREEMENT:
            raise ArithmeticError("they are not those of the result")
        before, now = (seconds(work, layer.captured, layer.device) for work in (apart, together))
        return before / now
    except Exception as error:
        say_once(f"without the statistics of depthwise convolutions: {one_line(error)}")
        return 0.0


# ---- Their use -----------------------------------------------------------------------------------

def input_sizes(model: nn.Module, modules, sizes, device) -> dict[nn.Module, set[tuple[int, int]]]:
    """Return {module: {(height, width) of its inputs}} for images of these sizes."""
    found, modes = {module: set() for module in modules}, {module: module.training for module in model.modules()}

    def note(module, args):
        if module in found:
            found[module].add(tuple(args[0].shape[2:]))
    hook = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        with torch.no_grad():
            model.eval()
            for size in sizes:
                model(torch.zeros(2, 3, size, size, device=device).contiguous(memory_format=torch.channels_last))
    finally:
        hook.remove()
        for module, training in modes.items():
            module.training = training
    return found


def layers_of(model: nn.Module, sizes, **options) -> dict[nn.Module, list[Layer]]:
    """Return {module: its Layers, one for each input size} of all layers that may use the kernels.

    options: the fields batch, dtype, device and captured of a Layer.
    """
    kinds = {}
    for kind, own in CONVOLUTIONS.items():
        kinds |= {conv: (kind, conv.in_channels, conv.out_channels, conv.bias is not None, conv.stride[0], "none",
                         [conv]) for conv in model.modules() if type(conv) is nn.Conv2d and own.fits(conv)}
    kinds |= {norm: ("BatchNorm", norm.num_features, norm.num_features, False, 1, activation, [norm, *behind])
              for norm, (activation, behind) in chains(model, ACTIVATIONS).items()
              if BatchNorm.fits(norm) and norm.training}
    inputs = input_sizes(model, kinds, sizes, options["device"])
    return {module: [Layer(*counts, *size, stride, activation, example=example, **options)
                     for size in sorted(inputs[module])]
            for module, (*counts, stride, activation, example) in kinds.items()}


def variants(layers: list[Layer]) -> list[Layer]:
    """Return the largest layer of each alignment, for which a kernel is compiled anew; the largest of all is last."""
    largest = {alignment(layer.channels): layer for layer in sorted(layers, key=Layer.values)}
    return sorted(largest.values(), key=Layer.values)


def speedup(tried: list[Layer]) -> float:
    """Return PyTorch's time / ours of the last layer; 0.0 if ours fails for one of them."""
    times = [measured(layer) for layer in tried]
    return 0.0 if any(each["ours"] == math.inf for each in times) else times[-1]["pytorch"] / times[-1]["ours"]


def faster(model: nn.Module, sizes, seen: list, kinds=KINDS, **options) -> dict[nn.Module, type]:
    """Return {module: class to give it} where the kernels are faster, and print how much. See fast_on_a_gpu.

    seen: the list to which all BatchNorms append their statistics (see BatchNorm).
    """
    if not kinds:
        return {}
    importlib.import_module("training.triton_kernels")  # registers the operators; to import Triton takes seconds
    began, classes, ratios, titles = time.monotonic(), {}, {}, defaultdict(list)
    for several in layers_of(model, sizes, **options).values():
        if several and several[0].kind in kinds:  # the module runs
            titles[several[0].title].append(several)
    chosen, gains = {}, {}  # {module: (its layer, attributes)}; {"statistics of TITLE": gain}
    for title, layers in titles.items():
        tried = variants(sum(layers, []))
        ratios[title] = speedup(tried)
        if ratios[title] <= 1:
            continue
        if tried[-1].kind == "depthwise":
            gains[f"statistics of {title}"] = statistics_gain(tried[-1]) if all(map(statistics_gain, tried)) else 0.0
        for layer, *others in layers:
            inputs = tuple((each.height, each.width) for each in (layer, *others))
            chosen[layer.example[0]] = layer, {"sizes": inputs, "dtype": layer.dtype}
    followed = {model.get_submodule(name): model.get_submodule(reader)
                for name, reader in (sole_readers(model, training=True) or {}).items()}
    for module, (layer, attributes) in chosen.items():
        if layer.kind == "BatchNorm":
            attributes["seen"] = seen
        elif gains.get(f"statistics of {layer.title}", 0) > 1 and (
                type(norm := followed.get(module)) is nn.BatchNorm2d and norm in chosen):
            attributes["norm"] = norm
        classes |= with_kernels(layer.kind, layer.example, layer.activation, **attributes)
    shown = ", ".join(f"{title} {ratio:.2f}" for title, ratio in (ratios | gains).items())
    print(f"PyTorch's time / our kernels', used above 1: {shown or 'no layers'} "
          f"(timed in {time.monotonic() - began:.0f} s)", flush=True)
    return classes


def fast_teacher(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a network in eval mode that computes the same under autocast to `dtype`, with less to do.

    Its weights are rounded once instead of at every step. Its 1x1 convolutions are matrix products, which include the
    bias that a BatchNorm left: cuDNN's convolutions add it in a slow kernel of its own. If the copy does not compute
    the same, the network itself is returned.
    """
    fast = copy.deepcopy(model)
    for module in fast.modules():
        if type(module) in (nn.Conv2d, nn.Linear):
            module.to(dtype)
        if type(module) is nn.Conv2d and Pointwise.fits(module):
            module.__class__ = type("Pointwise", (Pointwise,), {"sizes": None})
    device = next(model.parameters()).device
    x = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            same = distance([fast(x)], [model(x)]) <= 4 * AGREEMENT  # it adds up over the layers
    except RuntimeError:  # a part of it runs without autocast
        same = False
    return fast if same else model


@contextlib.contextmanager
def fast_on_a_gpu(model: nn.Module, sizes, **options):
    """Use the kernels within the block where they are faster, by changing the classes of the model's modules.

    sizes: of the square images. options: batch, dtype, device and captured as in a Layer; kinds: of layers that may
    use the kernels (default: all). Weights and state-dict keys stay the same, and results differ by rounding only.
    """
    classes, seen = {}, []
    try:
        classes = faster(model, sizes, seen=seen, **options)
    except Exception as error:
        if not (isinstance(error, ModuleNotFoundError) and error.name == "triton"):  # not on every system
            say_once(f"without the project's GPU kernels: {one_line(error)}")
    torch.cuda.empty_cache()  # does nothing where CUDA is not in use
    hook = model.register_forward_hook(lambda *_: update_statistics(seen))
    try:
        with exchanged(classes):
            yield
    finally:
        hook.remove()
