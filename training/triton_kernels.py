"""Triton kernels for training on a GPU: BatchNorm with its activation, and 3x3 depthwise convolution, with gradients.

All maps are channels-last (NHWC) in bfloat16, float16 or float32; sums, statistics and weights are float32. Nothing
waits for the device and nothing is random: each program writes its part of a sum, and the parts are added in a fixed
order. The functions are PyTorch operators, so torch.compile takes them as they are and CUDA graphs record them.
training/gpu_kernels.py decides where they are used. With TRITON_INTERPRET=1, set before the import, they run on a CPU.

In the kernels a tile is [positions, channels]. `channels = groups * ALIGN` tells the compiler which power of two
divides the number of channels, so that it can load vectors. Masked loads return zero, which is also the border of a
convolution. Offsets are 32-bit integers: see gpu_kernels.LARGEST. There is one tiling, and shapes are not compile-time
constants: 13 variants are compiled for all layers of the default network.
"""
import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 1056  # at most, that share a sum: eight per multiprocessor of an H100
CHANNELS, ROWS, PIXELS = 32, 64, 32  # channels of a tile, and its positions in BatchNorm and in convolutions


# ---- Kernels -------------------------------------------------------------------------------------

# by default Triton recompiles a kernel for integers that are 1 or multiples of 16
kernel = triton.jit(do_not_specialize=["rows", "images", "height", "width", "y_height", "y_width", "groups", "eps",
                                       "correction"])


@triton.jit
def channels_here(groups, ALIGN: tl.constexpr, CHANNELS: tl.constexpr):
    """Return (number of channels, this program's channels, whether they exist)."""
    channels = groups * ALIGN
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    return channels, channel, channel < channels


@triton.jit
def load(pointer, at, valid, channel, inside, channels):
    """Return the float32 values of the pixels `at`, zero where they are not `valid` or the channel is not `inside`."""
    mask = valid[:, None] & inside[None, :]
    return tl.load(pointer + at[:, None] * channels + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(pointer, at, valid, channel, inside, channels, value):
    tl.store(pointer + at[:, None] * channels + channel[None, :], value.to(pointer.dtype.element_ty),
             mask=valid[:, None] & inside[None, :])


@triton.jit
def vector(pointer, channel, inside):
    """Return one float32 value for each channel of a tile, [1, channels]."""
    return tl.load(pointer + channel, mask=inside, other=0.0)[None, :]


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """Return the activation: 0 none, 1 ReLU, 2 hard swish. A NaN stays NaN, unlike with tl.maximum alone."""
    if ACTIVATION == 1:
        z = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == 2:
        z = z * tl.minimum(tl.maximum(z + 3, 0.0), 6.0) * (1 / 6)
    return z


@triton.jit
def through_activation(dy, z, ACTIVATION: tl.constexpr):
    """Return the gradient of z, given that of the activation's output."""
    if ACTIVATION == 1:
        dy = tl.where(z <= 0, 0.0, dy)
    elif ACTIVATION == 2:
        dy = tl.where(z <= -3, 0.0, tl.where(z < 3, dy * (z * (1 / 3) + 0.5), dy))
    return dy


@kernel
def sum_parts(x, dy, statistics, weight, bias, parts, rows, groups, FORWARD: tl.constexpr, ACTIVATION: tl.constexpr,
              ALIGN: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write to parts [2, programs, channels] two sums over the rows of x [rows, channels].

    FORWARD: of x - origin and of its square; the origin is the first row of `statistics`, and dy, weight and bias are
    None. Else the gradients of bias and weight.
    """
    channels, channel, inside = channels_here(groups, ALIGN, CHANNELS)
    mean = vector(statistics, channel, inside)
    if not FORWARD:
        inverse = vector(statistics + 2 * channels, channel, inside)
        scale, shift = vector(weight, channel, inside), vector(bias, channel, inside)
    total = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    products = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    for first in range(tl.program_id(0) * POSITIONS, rows, tl.num_programs(0) * POSITIONS):
        row = first + tl.arange(0, POSITIONS)
        valid = row < rows
        unit = load(x, row, valid, channel, inside, channels) - mean
        if FORWARD:
            unit = tl.where(valid[:, None], unit, 0.0)
            value = unit
        else:
            unit *= inverse
            value = through_activation(load(dy, row, valid, channel, inside, channels), unit * scale + shift,
                                       ACTIVATION)
        total += value
        products += value * unit
    at = parts + tl.program_id(0) * channels + channel
    tl.store(at, tl.sum(total, 0), mask=inside)
    tl.store(at + tl.num_programs(0) * channels, tl.sum(products, 0), mask=inside)


@kernel
def normalised(x, sums, origin, weight, bias, y, statistics, rows, groups, eps, correction, ACTIVATION: tl.constexpr,
               ALIGN: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write y and, to statistics [3, channels], mean, unbiased variance and 1 / standard deviation."""
    channels, channel, inside = channels_here(groups, ALIGN, CHANNELS)
    distance = vector(sums, channel, inside) / rows
    mean = vector(origin, channel, inside) + distance
    variance = vector(sums + channels, channel, inside) / rows - distance * distance
    variance = tl.where(variance < 0, 0.0, variance)  # by rounding
    inverse = 1 / tl.sqrt(variance + eps)
    scale, shift = inverse * vector(weight, channel, inside), vector(bias, channel, inside)
    first_program = inside[None, :] & (tl.program_id(0) == 0)
    at = statistics + channel[None, :]
    tl.store(at, mean, mask=first_program)
    tl.store(at + channels, variance * correction, mask=first_program)
    tl.store(at + 2 * channels, inverse, mask=first_program)
    row = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    valid = row < rows
    z = (load(x, row, valid, channel, inside, channels) - mean) * scale + shift
    store(y, row, valid, channel, inside, channels, activated(z, ACTIVATION))


@kernel
def normalised_gradient(x, dy, sums, statistics, weight, bias, dx, rows, groups, ACTIVATION: tl.constexpr,
                        ALIGN: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write the gradient dx. sums [2, channels]: the gradients of bias and weight."""
    channels, channel, inside = channels_here(groups, ALIGN, CHANNELS)
    mean, inverse = vector(statistics, channel, inside), vector(statistics + 2 * channels, channel, inside)
    scale, shift = vector(weight, channel, inside), vector(bias, channel, inside)
    mean_dz, mean_product = vector(sums, channel, inside) / rows, vector(sums + channels, channel, inside) / rows
    row = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    valid = row < rows
    unit = (load(x, row, valid, channel, inside, channels) - mean) * inverse
    dz = through_activation(load(dy, row, valid, channel, inside, channels), unit * scale + shift, ACTIVATION)
    store(dx, row, valid, channel, inside, channels, (dz - mean_dz - unit * mean_product) * (inverse * scale))


@triton.jit
def neighbour(x, position, valid, channel, inside, channels, height, width, y_height, y_width, TAP: tl.constexpr,
              STRIDE: tl.constexpr, SPREAD: tl.constexpr):
    """Return the pixels of x [images, height, width, channels] that a tap, 0 to 8, meets at `position`s of y.

    STRIDE: of the positions. SPREAD: spacing of the pixels of x, with zeros between.
    """
    row = position // y_width % y_height * STRIDE + TAP // 3 - 1
    column = position % y_width * STRIDE + TAP % 3 - 1
    image = position // (y_width * y_height)
    valid = valid & (row >= 0) & (row < height * SPREAD) & (column >= 0) & (column < width * SPREAD)
    if SPREAD > 1:
        valid = valid & (row % SPREAD == 0) & (column % SPREAD == 0)
    at = (image * height + row // SPREAD) * width + column // SPREAD
    return load(x, at, valid, channel, inside, channels)


@kernel
def convolved(x, taps, y, images, height, width, y_height, y_width, groups, STRIDE: tl.constexpr, SPREAD: tl.constexpr,
              FLIPPED: tl.constexpr, ALIGN: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write the depthwise convolution y of x, with SPREAD - 1 zeros between its pixels, with taps [channels, 9].

    FLIPPED: with the taps turned by 180 degrees, which together with a spread of the stride gives the input's gradient.
    """
    channels, channel, inside = channels_here(groups, ALIGN, CHANNELS)
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    valid = position < images * y_height * y_width
    total = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    for tap in tl.static_range(9):
        total += vector(taps, channel * 9 + (8 - tap if FLIPPED else tap), inside) * neighbour(
            x, position, valid, channel, inside, channels, height, width, y_height, y_width, tap, STRIDE, SPREAD)
    store(y, position, valid, channel, inside, channels, total)


@kernel
def tap_parts(x, dy, parts, images, height, width, y_height, y_width, groups, STRIDE: tl.constexpr,
              ALIGN: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write to parts [programs, 9, channels] the parts of the gradient of the taps."""
    channels, channel, inside = channels_here(groups, ALIGN, CHANNELS)
    sums = (tl.zeros([POSITIONS, CHANNELS], tl.float32),) * 9
    for first in range(tl.program_id(0) * POSITIONS, images * y_height * y_width, tl.num_programs(0) * POSITIONS):
        position = first + tl.arange(0, POSITIONS)
        valid = position < images * y_height * y_width
        d = load(dy, position, valid, channel, inside, channels)
        new = ()
        for tap in tl.static_range(9):
            new += (sums[tap] + d * neighbour(x, position, valid, channel, inside, channels, height, width, y_height,
                                              y_width, tap, STRIDE, 1),)
        sums = new
    for tap in tl.static_range(9):
        tl.store(parts + (tl.program_id(0) * 9 + tap) * channels + channel, tl.sum(sums[tap], 0), mask=inside)


# ---- Operators -----------------------------------------------------------------------------------

def launch(kernel, channels: int, programs: int, tile: int, *args, **others) -> None:
    """Launch `programs` of a kernel for each block of channels, with tiles of `tile` positions."""
    align = min(8, channels & -channels)  # a thread loads at most 8 values of 16 bits at once
    kernel[programs, triton.cdiv(channels, CHANNELS)](*args, **others, groups=channels // align, ALIGN=align,
                                                      POSITIONS=tile, CHANNELS=CHANNELS, num_warps=4)


def sharing(channels: int, positions: int, tile: int) -> int:
    """Return how many programs share a sum over these positions."""
    return max(1, min(triton.cdiv(positions, tile), PROGRAMS // triton.cdiv(channels, CHANNELS)))


def dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def operator(function):
    """Register a function as torch.ops.training.NAME. It runs on the device of its first argument."""
    @functools.wraps(function)
    def on_its_device(x, *args):
        with torch.cuda.device_of(x):
            return function(x, *args)
    return torch.library.custom_op(f"training::{function.__name__}", on_its_device, mutates_args=())


def summed(x: Tensor, dy: Tensor | None, statistics: Tensor, weight, bias, activation: int) -> Tensor:
    """Return the sums [2, channels] of sum_parts; `dy` is None for those of the forward pass."""
    rows = x.numel() // x.shape[1]
    parts = x.new_empty(2, sharing(x.shape[1], rows, ROWS), x.shape[1], dtype=torch.float32)
    launch(sum_parts, x.shape[1], parts.shape[1], ROWS, x, dy, statistics, weight, bias, parts, rows,
           FORWARD=dy is None, ACTIVATION=activation)
    return parts.sum(1)


@operator
def normalise(x: Tensor, weight: Tensor, bias: Tensor, origin: Tensor, eps: float,
              activation: int) -> tuple[Tensor, Tensor]:
    """Normalise a batch and apply the activation (see `activated`).

    origin: values near the means, such as the running means; sums are taken relative to them to lose no digits.
    Returns (y, statistics [3, channels]: mean, unbiased variance, 1 / standard deviation).
    """
    x, rows = dense(x), x.numel() // x.shape[1]
    y, statistics = torch.empty_like(x), x.new_empty(3, x.shape[1], dtype=torch.float32)
    launch(normalised, x.shape[1], triton.cdiv(rows, ROWS), ROWS, x, summed(x, None, origin, None, None, 0), origin,
           weight, bias, y, statistics, rows, eps=eps, correction=rows / max(1, rows - 1), ACTIVATION=activation)
    return y, statistics


@operator
def normalise_gradients(x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor,
                        activation: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of normalise's x and of its bias and weight, [2, channels]."""
    x, dy, rows = dense(x), dense(dy.to(x.dtype)), x.numel() // x.shape[1]
    sums, dx = summed(x, dy, statistics, weight, bias, activation), torch.empty_like(x)
    launch(normalised_gradient, x.shape[1], triton.cdiv(rows, ROWS), ROWS, x, dy, sums, statistics, weight, bias, dx,
           rows, ACTIVATION=activation)
    return dx, sums


def outputs(x: Tensor, stride: int) -> Tensor:
    """Return an empty tensor for the convolution of x, channels-last."""
    return torch.empty(*x.shape[:2], *((side - 1) // stride + 1 for side in x.shape[2:]), dtype=x.dtype,
                       device=x.device, memory_format=torch.channels_last)


def convolve(x: Tensor, weight: Tensor, y: Tensor, stride: int, spread: int, flipped: bool) -> Tensor:
    """Fill y with what the kernel `convolved` computes, and return it."""
    images, channels, *size = y.shape
    launch(convolved, channels, triton.cdiv(images * math.prod(size), PIXELS), PIXELS, dense(x), weight.contiguous(), y,
           images, *x.shape[2:], *size, STRIDE=stride, SPREAD=spread, FLIPPED=flipped)
    return y


@operator
def depthwise(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Convolve x [N, C, H, W] depthwise with weight [C, 1, 3, 3] (float32) with a border of one zero, stride 1 or 2."""
    return convolve(x, weight, outputs(x, stride), stride, 1, False)


@operator
def depthwise_gradients(x: Tensor, dy: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of depthwise's x and weight."""
    dy, (images, channels, *size) = dense(dy.to(x.dtype)), dy.shape
    positions = images * math.prod(size)
    parts = x.new_empty(sharing(channels, positions, PIXELS), 9, channels, dtype=torch.float32)
    launch(tap_parts, channels, len(parts), PIXELS, dense(x), dy, parts, images, *x.shape[2:], *size, STRIDE=stride)
    return convolve(dy, weight, outputs(x, 1), 1, stride, True), parts.sum(0).t().contiguous().view(weight.shape)


# ---- Shapes and gradients, for autograd and torch.compile ----------------------------------------

@normalise.register_fake
def _(x, weight, bias, origin, eps, activation):
    return outputs(x, 1), x.new_empty(3, x.shape[1], dtype=torch.float32)


@normalise_gradients.register_fake
def _(x, dy, weight, bias, statistics, activation):
    return outputs(x, 1), x.new_empty(2, x.shape[1], dtype=torch.float32)


@depthwise.register_fake
def _(x, weight, stride):
    return outputs(x, stride)


@depthwise_gradients.register_fake
def _(x, dy, weight, stride):
    return outputs(x, 1), x.new_empty(x.shape[1], 1, 3, 3, dtype=torch.float32)


def keep_for_normalise(ctx, inputs, output):
    x, weight, bias, _, _, ctx.activation = inputs
    ctx.save_for_backward(x, weight, bias, output[1])
    ctx.set_materialize_grads(False)  # else a tensor of zeros is made for the statistics' gradient


def normalise_backward(ctx, dy, _):
    x, weight, bias, statistics = ctx.saved_tensors
    dx, (dbias, dweight) = normalise_gradients(x, dy, weight, bias, statistics, ctx.activation)
    return dx, dweight, dbias, None, None, None


def keep_for_depthwise(ctx, inputs, output):
    x, weight, ctx.stride = inputs
    ctx.save_for_backward(x, weight)


def depthwise_backward(ctx, dy):
    x, weight = ctx.saved_tensors
    return *depthwise_gradients(x, dy, weight, ctx.stride), None


normalise.register_autograd(normalise_backward, setup_context=keep_for_normalise)
depthwise.register_autograd(depthwise_backward, setup_context=keep_for_depthwise)
