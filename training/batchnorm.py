"""Training BatchNorm with the ReLU behind it in one function on a CPU, forward and backward, compiled from kernels.c.

PyTorch's pair takes 13 passes over memory where 8 are enough, and a third of a bfloat16 step is such passes.
"""
import torch
import torch.nn.functional as F
from torch import nn

from training import kernels

MOST = 4096  # channels


def size(x: torch.Tensor) -> tuple[int, int]:
    """(rows, channels)"""
    return x.numel() // x.shape[1], x.shape[1]


class Normalise(torch.autograd.Function):
    """(x, weight, bias, mean near which x lies, eps, whether there is a ReLU) -> (y, mean, biased variance)."""

    @staticmethod
    def forward(ctx, x, weight, bias, origin, eps, relu):
        x = x.contiguous(memory_format=torch.channels_last)
        y, mean, var = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
        kernels.call("statistics", x, *size(x), origin, mean, var)
        inverse = (var + eps).rsqrt()
        a = weight * inverse
        b = bias - mean * a
        kernels.call("forward", x, y, *size(x), a, b, int(relu))
        ctx.save_for_backward(x, a, b, mean, inverse)
        ctx.relu = relu
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx, dy, *_):
        x, a, b, mean, inverse = ctx.saved_tensors
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        dx, dbias, product = torch.empty_like(x), torch.empty_like(a), torch.empty_like(a)
        kernels.call("gradient_sums", x, dy, *size(x), a, b, mean, int(ctx.relu), dbias, product)
        rows = x.numel() // x.shape[1]
        # dx = a (dz - mean dz - (x - mean) inverse^2 mean(dz (x - mean))), of what arrives, dz
        k = -a * inverse * inverse * product / rows
        kernels.call("gradient", x, dy, dx, *size(x), a, b, k, -a * dbias / rows - k * mean, int(ctx.relu))
        return dx, product * inverse, dbias, None, None, None


class BatchNorm(nn.BatchNorm2d):
    """A BatchNorm2d of maps on a CPU, with the ReLU behind it where `relu` is set."""
    relu = False

    def forward(self, x):
        x = x.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else x
        if not self.training or self.num_features > MOST or kernels.library(x.dtype) is None:
            y = super().forward(x)
            return F.relu(y, inplace=True) if self.relu else y
        y, mean, var = Normalise.apply(x, self.weight, self.bias, self.running_mean.clone(), self.eps, self.relu)
        rows = x.numel() // x.shape[1]
        with torch.no_grad():
            self.num_batches_tracked += 1
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(var * (rows / max(1, rows - 1)), momentum)
        return y
