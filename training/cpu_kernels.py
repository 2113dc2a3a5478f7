"""Train faster on a CPU with functions compiled from kernels.c: BatchNorm with activation, and depthwise convolution.

PyTorch's BatchNorm with a ReLU takes 13 passes over memory where 8 are enough, and such passes are a third of a
bfloat16 step. In fine-tuning, the same 8 include the rounding of activations to trained steps. oneDNN has no fast
bfloat16 kernel for the gradients of a depthwise convolution, least of all with a stride
(benchmarks/depthwise_shapes.py): three of the network's 57 convolutions took two fifths of a step (the profile
was not kept). Without a C compiler, PyTorch's own functions are used.
"""
import contextlib
import math

import torch
import torch.nn.functional as F
from torch import nn

from compressed import kernels
from compressed.formats import code_range
from compressed.graph import sole_readers
from training.learned_steps import LearnedConv2d, LearnedQuantizer, power_of_two

# {function: the modules after a BatchNorm that it includes}, in the order of kernels.c
FUNCTIONS = {"none": (), "relu": (nn.ReLU,), "hardswish": (nn.Hardswish,), "rounded": (LearnedQuantizer,),
             "rounded_hardswish": (LearnedQuantizer, nn.Hardswish, LearnedQuantizer)}
ACTIVATIONS = "none", "relu", "hardswish"
MOST_CHANNELS = 4096  # of a BatchNorm, whose sums are kept on the stack
LEAST_CHANNELS = 16  # of a depthwise convolution, which computes that many at a time
LARGEST_MAP = 64  # height and width of a depthwise convolution's input, which is kept on the stack for some channels


# ---- BatchNorm with what follows it --------------------------------------------------------------

class Normalise(torch.autograd.Function):
    """Normalise a batch and apply the function after it.

    (x, weight, bias, step, step2, mean, var, options) -> (y, mean, biased variance). step, step2: the quantization
    steps that the function applies, tensors; None where it has fewer. options: eps, index in FUNCTIONS, (smallest,
    largest code) of both grids, frozen. If frozen, mean and var normalise x; otherwise the batch's own statistics do,
    and `mean` is only the value that the sums are taken relative to, so that no digits cancel.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, step, step2, mean, var, options):
        eps, function, ranges, frozen = options
        x = x.contiguous(memory_format=torch.channels_last)
        y, own = torch.empty_like(x), (mean.clone(), var.clone(), *(torch.empty_like(weight) for _ in range(2)))
        grids = torch.tensor([[1.0 if s is None else float(s), *codes] for s, codes in zip((step, step2), ranges)])
        kernels.call("batchnorm", x, x.numel() // x.shape[1], x.shape[1], weight, bias, mean, eps, function, grids,
                     frozen, y, *own)
        ctx.save_for_backward(x, grids, *own)
        ctx.options = options
        ctx.mark_non_differentiable(*own[:2])
        return y, *own[:2]

    @staticmethod
    def backward(ctx, dy, *_):
        (x, grids, *constants), (eps, function, _, frozen) = ctx.saved_tensors, ctx.options
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        dx, dsteps, *others = torch.empty_like(x), torch.empty(2), *(torch.empty_like(constants[0]) for _ in range(2))
        kernels.call("batchnorm_gradients", x, x.numel() // x.shape[1], x.shape[1], *constants, eps, function, grids,
                     frozen, dy, dx, *others, dsteps)
        steps = (step if wanted else None for step, wanted in zip(dsteps, ctx.needs_input_grad[3:5]))
        return dx, *others, *steps, None, None, None


def normalise(x, weight, bias, mean, var, eps: float, frozen: bool, function: str, rounding=()) -> tuple:
    """Return Normalise's result. function: one of FUNCTIONS. rounding: the LearnedQuantizers that it includes."""
    steps = [power_of_two(module.log_step) for module in rounding] + [None, None]
    ranges = [code_range(module.bits, module.signed) for module in rounding] + [(0, 0), (0, 0)]
    options = eps, list(FUNCTIONS).index(function), ranges[:2], frozen
    return Normalise.apply(x, weight, bias, *steps[:2], mean, var, options)


class BatchNorm(nn.BatchNorm2d):
    """Compute BatchNorm2d and the function after it, on a CPU.

    activation: one of FUNCTIONS. behind: the modules that it includes, as [(module, the class it had)].
    """
    activation, behind = "none", ()

    @staticmethod
    def fits(norm: nn.BatchNorm2d) -> bool:
        """Return True if a kernel can compute this BatchNorm, whatever its number of channels."""
        values = norm.weight, norm.bias, norm.running_mean, norm.running_var
        return norm.track_running_stats and all(value is not None and value.dtype == torch.float32 for value in values)

    def marked(self, y):
        """Return y, marked for the modules after this one as what they would have computed (see Included)."""
        y.included_by = type(self)  # a class of its own (see `included`), which copies of the network share
        return y

    def by_pytorch(self, x):
        """Return the same, computed by PyTorch."""
        y = super().forward(x)
        if self.activation in ("relu", "hardswish"):
            return self.marked(getattr(F, self.activation)(y, inplace=True))
        for module, own in self.behind:
            y = own.forward(module, y)
        return self.marked(y)

    def forward(self, x):
        if channels_first(x) or kernels.library(x.dtype) is None:
            return self.by_pytorch(x)
        rounding = [module for module, own in self.behind if own is LearnedQuantizer]
        y, mean, var = normalise(x, self.weight, self.bias, self.running_mean, self.running_var, self.eps,
                                 not self.training, self.activation, rounding)
        rows = x.numel() // x.shape[1]
        if self.training:
            with torch.no_grad():
                self.num_batches_tracked += 1
                momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(var * (rows / max(1, rows - 1)), momentum)
        return self.marked(y)


class Included(nn.Module):
    """A module whose function the BatchNorm before it has applied already; to any other value it applies its own.

    norm: the class of that BatchNorm. own: the class that the module had.
    """
    norm, own = None, nn.Identity

    def forward(self, x):
        return x if getattr(x, "included_by", None) is self.norm else self.own.forward(self, x)


def channels_first(x) -> bool:
    """Return True for a map [N, C, H, W] in C order: PyTorch's result keeps that order, which a later view may need."""
    return x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last)


class Rounding(LearnedQuantizer):
    """Round the values of a map to a trained step, on a CPU: the BatchNorm kernel with scale 1, shift 0."""

    def forward(self, x):
        if x.dim() != 4 or x.shape[1] > MOST_CHANNELS or kernels.library(x.dtype) is None:
            return super().forward(x)
        ones, zeros = torch.ones(x.shape[1]), torch.zeros(x.shape[1])
        return normalise(x, ones, zeros, zeros, ones, 0.0, True, "rounded", [self])[0]


# ---- Depthwise convolution -----------------------------------------------------------------------

class Convolve(torch.autograd.Function):
    """Convolve x [N, C, H, W] depthwise with weight [C, 1, 3, 3] (float32), with a zero border of one pixel.

    (x, weight, stride) -> [N, C, ceil(H / stride), ceil(W / stride)].
    """

    @staticmethod
    def forward(ctx, x, weight, stride):
        x = x.contiguous(memory_format=torch.channels_last)
        (images, channels, *size), taps = x.shape, weight.flatten(1).t().contiguous()
        y = torch.empty(images, channels, *((side - 1) // stride + 1 for side in size), dtype=x.dtype,
                        memory_format=torch.channels_last)
        kernels.call("depthwise", x, images, *size, channels, taps, stride, y)
        ctx.save_for_backward(x, taps)
        ctx.stride = stride
        return y

    @staticmethod
    def backward(ctx, dy):
        x, taps = ctx.saved_tensors
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        (images, channels, *size), dx, dtaps = x.shape, torch.empty_like(x), torch.zeros_like(taps)
        kernels.call("depthwise_gradients", x, images, *size, channels, taps, ctx.stride, dy, dx, dtaps)
        return dx, dtaps.t().reshape(channels, 1, 3, 3), None


class Depthwise(nn.Conv2d):
    """Compute a depthwise Conv2d on a CPU with kernels.c; where that does not fit, with PyTorch.

    PyTorch computes convolutions with a stride in float32 then, because it is slow in bfloat16.
    """

    @staticmethod
    def fits(conv: nn.Conv2d) -> bool:
        """Return True if kernels.c can compute this convolution."""
        return (conv.groups == conv.in_channels == conv.out_channels >= LEAST_CHANNELS and conv.kernel_size == (3, 3)
                and conv.stride in ((1, 1), (2, 2)) and conv.padding == (1, 1) and conv.dilation == (1, 1)
                and conv.padding_mode == "zeros" and conv.bias is None and conv.weight.dtype == torch.float32)

    def _conv_forward(self, x, weight, bias):
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
        if (self.fits(self) and max(x.shape[2:]) <= LARGEST_MAP and not channels_first(x)
                and kernels.library(dtype)):
            return Convolve.apply(x.to(dtype), weight, self.stride[0])
        if not autocast or max(self.stride) == 1 or weight.dtype != torch.float32:
            return super()._conv_forward(x, weight, bias)
        with torch.autocast("cpu", enabled=False):
            return super()._conv_forward(x.float(), weight, bias).to(dtype)


# ---- Their use -----------------------------------------------------------------------------------

def kind_of(module: nn.Module) -> type | None:
    """Return the class of a module; None for a LearnedQuantizer with a clip of its own, which kernels.c lacks."""
    return None if isinstance(module, LearnedQuantizer) and module.most < math.inf else type(module)


def chains(model: nn.Module, functions=tuple(FUNCTIONS)) -> dict[nn.Module, tuple[str, list[nn.Module]]]:
    """Return {BatchNorm2d: (the function that includes most modules after it, these modules)} of a model.

    By the network's graph, nothing else reads the values between the modules.
    """
    found, readers = {}, sole_readers(model, training=True) or {}  # if the graph cannot be read, they stay separate
    for name, norm in model.named_modules():
        if type(norm) is nn.BatchNorm2d:
            behind = []
            while name in readers and len(behind) < 3:
                name = readers[name]
                behind.append(model.get_submodule(name))
            kinds = tuple(map(kind_of, behind))
            function = max((each for each in functions if kinds[:len(FUNCTIONS[each])] == FUNCTIONS[each]),
                           key=lambda each: len(FUNCTIONS[each]))
            found[norm] = function, behind[:len(FUNCTIONS[function])]
    return found


@contextlib.contextmanager
def exchanged(classes: dict[nn.Module, type]):
    """Give modules these classes within the block. Their weights and state-dict keys stay the same."""
    before = {module: type(module) for module in classes}
    for module, other in classes.items():
        module.__class__ = other
    try:
        yield
    finally:
        for module, own in before.items():
            module.__class__ = own


def included(norms: dict, kind: type[BatchNorm], **attributes) -> dict[nn.Module, type]:
    """Return {module: new class}: norms (see `chains`) become `kind`; what they include, Included."""
    classes = {}
    for norm, (function, behind) in norms.items():
        classes[norm] = type(kind.__name__, (kind,), {
            "activation": function, "behind": [(each, type(each)) for each in behind], **attributes})
        classes |= {each: type("Included", (Included,), {"norm": classes[norm], "own": type(each)}) for each in behind}
    return classes


def fast_on_a_cpu(model: nn.Module):
    """Use the functions of this file within the block, by changing the classes of the model's modules for its duration.

    Grouped convolutions become Depthwise (which leaves those that are not depthwise to PyTorch), and a BatchNorm2d
    becomes a BatchNorm, which includes the ReLU or hard swish that follows, or its rounding to trained steps; other
    such roundings become Rounding. Results differ by rounding only.
    """
    classes = {module: type("Depthwise", (Depthwise, type(module)), {}) for module in model.modules()
               if type(module) in (nn.Conv2d, LearnedConv2d) and module.groups > 1}
    classes |= {module: Rounding for module in model.modules() if kind_of(module) is LearnedQuantizer}
    norms = {norm: what for norm, what in chains(model).items()
             if BatchNorm.fits(norm) and norm.num_features <= MOST_CHANNELS}
    return exchanged(classes | included(norms, BatchNorm))
