"""Train faster on a CPU with functions compiled from kernels.c: BatchNorm with activation, and depthwise convolution.

PyTorch's BatchNorm with a ReLU takes 13 passes over memory where 8 are enough, and such passes are a third of a
bfloat16 step. oneDNN has no fast bfloat16 kernel for the gradients of a depthwise convolution, least of all with a
stride (benchmarks/depthwise_shapes.py): three of the network's 57 convolutions took two fifths of a step. Without a C
compiler, PyTorch's own functions are used.
"""
import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from compressed import kernels
from compressed.errors import BadInput
from compressed.graph import activated_norms

ACTIVATIONS = "none", "relu", "hardswish"  # in the order of kernels.c
MOST_CHANNELS = 4096  # of a BatchNorm, whose sums are kept on the stack
LEAST_CHANNELS = 16  # of a depthwise convolution, which computes so many channels at a time
LARGEST_MAP = 64  # height and width of a depthwise convolution's input, which is kept on the stack for some channels


# ---- BatchNorm with the activation behind it -----------------------------------------------------

class Normalise(torch.autograd.Function):
    """Normalise a batch and apply the activation.

    (x, weight, bias, origin, eps, index in ACTIVATIONS) -> (y, mean, biased variance). origin: values near the means,
    such as the running means; sums are taken relative to them to lose no digits.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, origin, eps, activation):
        x = x.contiguous(memory_format=torch.channels_last)
        y, (mean, var, a, b) = torch.empty_like(x), (torch.empty_like(weight) for _ in range(4))
        kernels.call("batchnorm", x, x.numel() // x.shape[1], x.shape[1], weight, bias, origin, eps, activation,
                     y, mean, var, a, b)
        ctx.save_for_backward(x, mean, var, a, b)
        ctx.options = eps, activation
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx, dy, *_):
        x, *constants = ctx.saved_tensors
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        dx, dweight, dbias = torch.empty_like(x), *(torch.empty_like(constants[0]) for _ in range(2))
        kernels.call("batchnorm_gradients", x, x.numel() // x.shape[1], x.shape[1], *constants, *ctx.options, dy, dx,
                     dweight, dbias)
        return dx, dweight, dbias, None, None, None


class BatchNorm(nn.BatchNorm2d):
    """Compute BatchNorm2d and the following `activation`, one of ACTIVATIONS, on a CPU."""
    activation = "none"

    def pytorchs(self, x):
        """Return the same, computed by PyTorch."""
        y = super().forward(x)
        return y if self.activation == "none" else getattr(F, self.activation)(y, inplace=True)

    def forward(self, x):
        x = x.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else x
        if not self.training or self.num_features > MOST_CHANNELS or kernels.library(x.dtype) is None:
            return self.pytorchs(x)
        y, mean, var = Normalise.apply(x, self.weight, self.bias, self.running_mean, self.eps,
                                       ACTIVATIONS.index(self.activation))
        rows = x.numel() // x.shape[1]
        with torch.no_grad():
            self.num_batches_tracked += 1
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(var * (rows / max(1, rows - 1)), momentum)
        return y


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

    def forward(self, x):
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
        if self.fits(self) and max(x.shape[2:]) <= LARGEST_MAP and kernels.library(dtype):
            return Convolve.apply(x.to(dtype), self.weight, self.stride[0])
        if not autocast or max(self.stride) == 1:
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(dtype)


# ---- Their use -----------------------------------------------------------------------------------

def normalisations(model: nn.Module) -> dict[nn.Module, tuple[str, nn.Module | None]]:
    """Return {BatchNorm2d: (one of ACTIVATIONS, its module)} of a model, ("none", None) where none follows.

    An activation counts if, by the network's graph, nothing else reads the value between the two.
    """
    norms = {module: ("none", None) for module in model.modules() if type(module) is nn.BatchNorm2d}
    with contextlib.suppress(BadInput):  # if the graph cannot be read, the activations stay separate
        for norm, (activation, kind) in activated_norms(model).items():
            norms[model.get_submodule(norm)] = kind, model.get_submodule(activation)
    return norms


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


def with_activations(norms: dict, kind: type[BatchNorm], **attributes) -> dict[nn.Module, type]:
    """Return {module: new class}: norms (see `normalisations`) become of this kind, their activations nn.Identity."""
    return {norm: type(kind.__name__, (kind,), {"activation": activation, **attributes})
            for norm, (activation, _) in norms.items()} | {
        separate: nn.Identity for _, separate in norms.values() if separate is not None}


def fast_on_a_cpu(model: nn.Module):
    """Use the functions of this file within the block, by changing the classes of the model's modules for its duration.

    Depthwise convolutions become Depthwise, and a BatchNorm2d becomes a BatchNorm, which includes the ReLU or hard
    swish that follows. Results differ by rounding only.
    """
    convolutions = [module for module in model.modules() if type(module) is nn.Conv2d and module.groups > 1]
    return exchanged(dict.fromkeys(convolutions, Depthwise) | with_activations(normalisations(model), BatchNorm))
