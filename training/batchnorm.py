"""Training BatchNorm with the activation behind it in one function on a CPU, forward and backward, from kernels.c.

With a ReLU, PyTorch's pair takes 13 passes over memory where 8 are enough; a third of a bfloat16 step is such passes.
"""
import torch
import torch.nn.functional as F
from torch import nn

from compressed import kernels

MOST = 4096  # channels
ACTIVATIONS = "none", "relu", "hardswish"  # in the order of kernels.c


class Normalise(torch.autograd.Function):
    """(x, weight, bias, mean near which x lies, eps, index in ACTIVATIONS) -> (y, mean, biased variance)."""

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
    """A BatchNorm2d of maps on a CPU, with the `activation` behind it, one of ACTIVATIONS."""
    activation = "none"

    def forward(self, x):
        x = x.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else x
        if not self.training or self.num_features > MOST or kernels.library(x.dtype) is None:
            y = super().forward(x)
            return y if self.activation == "none" else getattr(F, self.activation)(y, inplace=True)
        y, mean, var = Normalise.apply(x, self.weight, self.bias, self.running_mean, self.eps,
                                       ACTIVATIONS.index(self.activation))
        rows = x.numel() // x.shape[1]
        with torch.no_grad():
            self.num_batches_tracked += 1
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(var * (rows / max(1, rows - 1)), momentum)
        return y
