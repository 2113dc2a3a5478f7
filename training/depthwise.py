"""3x3 depthwise convolution on a CPU, forward and backward, compiled from kernels.c.

oneDNN has no fast bfloat16 kernel for the gradients, least of all with a stride (benchmarks/depthwise_shapes.py):
three of the network's 57 convolutions took two fifths of a step.
"""
import torch
from torch import nn

from compressed import kernels

LEAST, MOST = 16, 64  # channels; height and width: both planes of a block of channels are on the stack


class Convolve(torch.autograd.Function):
    """(x [N, C, H, W], weight [C, 1, 3, 3] in float32, stride) -> [N, C, ceil(H / stride), ceil(W / stride)]."""

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
    """A depthwise Conv2d of maps on a CPU. Where kernels.c does not fit, PyTorch's, in float32 if it has a stride."""

    @staticmethod
    def fits(conv: nn.Conv2d) -> bool:
        """Whether it is one that kernels.c computes, in float32 weights."""
        return (conv.groups == conv.in_channels == conv.out_channels >= LEAST and conv.kernel_size == (3, 3)
                and conv.stride in ((1, 1), (2, 2)) and conv.padding == (1, 1) and conv.dilation == (1, 1)
                and conv.padding_mode == "zeros" and conv.bias is None and conv.weight.dtype == torch.float32)

    def forward(self, x):
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
        if self.fits(self) and max(x.shape[2:]) <= MOST and kernels.library(dtype):
            return Convolve.apply(x.to(dtype), self.weight, self.stride[0])
        if not autocast or max(self.stride) == 1:
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(dtype)
