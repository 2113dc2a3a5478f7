"""Triton kernels for training on a GPU: BatchNorm with its activation, and 3x3 depthwise convolution, with gradients.

All maps are channels-last (NHWC) in bfloat16, float16 or float32; sums, statistics and weights are float32. Nothing
waits for the device and nothing is random: each program writes its part of a sum, and the parts are added in a fixed
order. The functions are PyTorch operators, so torch.compile takes them as they are and CUDA graphs record them.
training/gpu_kernels.py decides where they are used. With TRITON_INTERPRET=1, set before the import, they run on a CPU.

In the kernels a tile is [positions, channels]. `channels = groups * ALIGN` tells the compiler which power of two
divides the number of channels, so that it can load vectors. Masked loads return zero, which is also the border of a
convolution. Offsets are 32-bit integers: see gpu_kernels.LARGEST.
"""
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 1056  # that share a sum, at most: eight for each multiprocessor of an H100

# Tilings to choose from: {operator: [(positions, channels, warps, rows of the map for each program)]}, default first.
# Each thread has 8 or 16 values of a tile.
TILINGS = {"normalise": [(32, 64, 4, 0), (64, 32, 4, 0), (16, 64, 4, 0)],
           "normalise_gradients": [(32, 64, 4, 0), (64, 32, 4, 0), (16, 64, 4, 0)],
           "depthwise": [(32, 32, 4, 32), (16, 64, 4, 8), (32, 64, 4, 16)],
           "depthwise_input_gradient": [(32, 32, 4, 32), (16, 64, 4, 8), (32, 64, 4, 16)],
           "depthwise_weight_gradient": [(32, 32, 4, 0), (16, 64, 4, 0), (16, 32, 2, 0)]}
chosen = {}  # {(operator, channels, height, width, stride): tiling}, where gpu_kernels.py has timed them


# ---- Kernels -------------------------------------------------------------------------------------

# by default Triton compiles a kernel anew for integers that are 1 or multiples of 16
kernel = triton.jit(do_not_specialize=["rows", "images", "height", "width", "groups", "share", "eps", "correction"])


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
    """Return the activation: 0 none, 1 ReLU, 2 hard swish. A NaN stays one, which tl.maximum would not grant."""
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
def moment_parts(x, origin, parts, rows, groups, ALIGN: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write to parts [2, programs, channels] sums of x - origin and of its square. x: [rows, channels]."""
    channels = groups * ALIGN
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    near = vector(origin, channel, inside)
    total = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    squares = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    for first in range(tl.program_id(0) * POSITIONS, rows, tl.num_programs(0) * POSITIONS):
        row = first + tl.arange(0, POSITIONS)
        valid = row < rows
        value = tl.where(valid[:, None], load(x, row, valid, channel, inside, channels) - near, 0.0)
        total += value
        squares += value * value
    at = parts + tl.program_id(0) * channels + channel
    tl.store(at, tl.sum(total, 0), mask=inside)
    tl.store(at + tl.num_programs(0) * channels, tl.sum(squares, 0), mask=inside)


@kernel
def normalised(x, sums, origin, weight, bias, y, statistics, rows, groups, eps, correction, ACTIVATION: tl.constexpr,
               ALIGN: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write y and, to statistics [3, channels], mean, unbiased variance and 1 / standard deviation."""
    channels = groups * ALIGN
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
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
def gradient_parts(x, dy, statistics, weight, bias, parts, rows, groups, ACTIVATION: tl.constexpr, ALIGN: tl.constexpr,
                   POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write to parts [2, programs, channels] the sums that are the gradients of bias and weight."""
    channels = groups * ALIGN
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    mean, inverse = vector(statistics, channel, inside), vector(statistics + 2 * channels, channel, inside)
    scale, shift = vector(weight, channel, inside), vector(bias, channel, inside)
    dbias = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    dweight = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    for first in range(tl.program_id(0) * POSITIONS, rows, tl.num_programs(0) * POSITIONS):
        row = first + tl.arange(0, POSITIONS)
        valid = row < rows
        unit = (load(x, row, valid, channel, inside, channels) - mean) * inverse
        dz = through_activation(load(dy, row, valid, channel, inside, channels), unit * scale + shift, ACTIVATION)
        dbias += dz
        dweight += dz * unit
    at = parts + tl.program_id(0) * channels + channel
    tl.store(at, tl.sum(dbias, 0), mask=inside)
    tl.store(at + tl.num_programs(0) * channels, tl.sum(dweight, 0), mask=inside)


@kernel
def normalised_gradient(x, dy, sums, statistics, weight, bias, dx, rows, groups, ACTIVATION: tl.constexpr,
                        ALIGN: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write the gradient dx. sums [2, channels]: the gradients of bias and weight."""
    channels = groups * ALIGN
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    mean, inverse = vector(statistics, channel, inside), vector(statistics + 2 * channels, channel, inside)
    scale, shift = vector(weight, channel, inside), vector(bias, channel, inside)
    mean_dz, mean_product = vector(sums, channel, inside) / rows, vector(sums + channels, channel, inside) / rows
    row = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    valid = row < rows
    unit = (load(x, row, valid, channel, inside, channels) - mean) * inverse
    dz = through_activation(load(dy, row, valid, channel, inside, channels), unit * scale + shift, ACTIVATION)
    store(dx, row, valid, channel, inside, channels, (dz - mean_dz - unit * mean_product) * (inverse * scale))


@triton.jit
def row_of_taps(taps, ROW: tl.constexpr, FLIPPED: tl.constexpr, channel, inside):
    """Return the three taps of a row of the filters, [1, channels] each; FLIPPED: of the filters turned by 180 degrees.
    """
    START: tl.constexpr = 8 - 3 * ROW if FLIPPED else 3 * ROW
    STEP: tl.constexpr = -1 if FLIPPED else 1
    at = taps + START
    return (vector(at, channel * 9, inside), vector(at + STEP, channel * 9, inside),
            vector(at + 2 * STEP, channel * 9, inside))


@triton.jit
def neighbours(x, at, valid, left, right, channel, inside, channels):
    """Return the tiles of the pixels one column to the left of `at`, at `at`, and one column to the right."""
    return (load(x, at - 1, valid & left, channel, inside, channels), load(x, at, valid, channel, inside, channels),
            load(x, at + 1, valid & right, channel, inside, channels))


@kernel
def convolved(x, taps, y, images, height, width, groups, share, STRIDE: tl.constexpr, FLIPPED: tl.constexpr,
              ALIGN: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write the depthwise convolution y of x with taps [channels, 9]; FLIPPED: turned by 180 degrees.

    A program has columns of maps, of any image each, and goes down `share` rows of y. It loads each row of x once, and
    carries what that row adds to the next rows of y.
    """
    channels, y_height, y_width = groups * ALIGN, (height - 1) // STRIDE + 1, (width - 1) // STRIDE + 1
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    valid, image, column = position < images * y_width, position // y_width, position % y_width
    left, right = column > 0, column * STRIDE + 1 < width
    x_top, y_top = image * height * width + column * STRIDE, image * y_height * y_width + column
    w00, w01, w02 = row_of_taps(taps, 0, FLIPPED, channel, inside)
    w10, w11, w12 = row_of_taps(taps, 1, FLIPPED, channel, inside)
    w20, w21, w22 = row_of_taps(taps, 2, FLIPPED, channel, inside)
    first = tl.program_id(2) * share
    end = tl.minimum(first + share, y_height)
    if STRIDE == 1:
        above = tl.zeros([POSITIONS, CHANNELS], tl.float32)  # what rows r - 2 and r - 1 of x add to row r - 1 of y
        here = tl.zeros([POSITIONS, CHANNELS], tl.float32)  # what row r - 1 of x adds to row r of y
        for r in range(first - 1, end + 1):
            a, b, c = neighbours(x, x_top + r * width, valid & (r >= 0) & (r < height), left, right, channel, inside,
                                 channels)
            store(y, y_top + (r - 1) * y_width, valid & (r > first), channel, inside, channels,
                  above + w20 * a + w21 * b + w22 * c)
            above = here + w10 * a + w11 * b + w12 * c
            here = w00 * a + w01 * b + w02 * c
    else:
        a, b, c = neighbours(x, x_top + (2 * first - 1) * width, valid & (first > 0), left, right, channel, inside,
                             channels)
        above = w00 * a + w01 * b + w02 * c
        for r in range(first, end):
            a, b, c = neighbours(x, x_top + 2 * r * width, valid, left, right, channel, inside, channels)
            total = above + w10 * a + w11 * b + w12 * c
            a, b, c = neighbours(x, x_top + (2 * r + 1) * width, valid & (2 * r + 1 < height), left, right, channel,
                                 inside, channels)
            store(y, y_top + r * y_width, valid, channel, inside, channels, total + w20 * a + w21 * b + w22 * c)
            above = w00 * a + w01 * b + w02 * c


@kernel
def spread(dy, taps, dx, images, height, width, groups, share, ALIGN: tl.constexpr, POSITIONS: tl.constexpr,
           CHANNELS: tl.constexpr):
    """Write the gradient dx [images, height, width, channels] of the input of a convolution with stride 2.

    A program has columns of dy and goes down `share` of its rows; each value of dy gives a 2x2 square of dx.
    """
    channels, y_height, y_width = groups * ALIGN, (height - 1) // 2 + 1, (width - 1) // 2 + 1
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    valid, image, column = position < images * y_width, position // y_width, position % y_width
    next_valid, odd_valid = valid & (column + 1 < y_width), valid & (2 * column + 1 < width)
    x_top, y_top = image * height * width + 2 * column, image * y_height * y_width + column
    w00, w01, w02 = row_of_taps(taps, 0, False, channel, inside)
    w10, w11, w12 = row_of_taps(taps, 1, False, channel, inside)
    w20, w21, w22 = row_of_taps(taps, 2, False, channel, inside)
    first = tl.program_id(2) * share
    at = y_top + first * y_width
    a, b = load(dy, at, valid, channel, inside, channels), load(dy, at + 1, next_valid, channel, inside, channels)
    for r in range(first, tl.minimum(first + share, y_height)):
        at = y_top + (r + 1) * y_width
        more = r + 1 < y_height
        c = load(dy, at, valid & more, channel, inside, channels)
        d = load(dy, at + 1, next_valid & more, channel, inside, channels)
        even = x_top + 2 * r * width
        odd, there = even + width, 2 * r + 1 < height
        store(dx, even, valid, channel, inside, channels, w11 * a)
        store(dx, even + 1, odd_valid, channel, inside, channels, w12 * a + w10 * b)
        store(dx, odd, valid & there, channel, inside, channels, w21 * a + w01 * c)
        store(dx, odd + 1, odd_valid & there, channel, inside, channels, w22 * a + w20 * b + w02 * c + w00 * d)
        a, b = c, d


@kernel
def weight_parts(x, dy, parts, images, height, width, groups, STRIDE: tl.constexpr, ALIGN: tl.constexpr,
                 POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write to parts [programs, channels, 9] the parts of the gradient of the taps."""
    channels, y_height, y_width = groups * ALIGN, (height - 1) // STRIDE + 1, (width - 1) // STRIDE + 1
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    zero = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    w00, w01, w02, w10, w11, w12, w20, w21, w22 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    for start in range(tl.program_id(0) * POSITIONS, images * y_width, tl.num_programs(0) * POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        valid, image, column = position < images * y_width, position // y_width, position % y_width
        left, right = column > 0, column * STRIDE + 1 < width
        x_top, y_top = image * height * width + column * STRIDE, image * y_height * y_width + column
        if STRIDE == 1:
            above, here = zero, load(dy, y_top, valid, channel, inside, channels)  # rows r - 1 and r of dy
            for r in range(0, height):
                below = load(dy, y_top + (r + 1) * width, valid & (r + 1 < height), channel, inside, channels)
                a, b, c = neighbours(x, x_top + r * width, valid, left, right, channel, inside, channels)
                w00, w01, w02 = w00 + a * below, w01 + b * below, w02 + c * below
                w10, w11, w12 = w10 + a * here, w11 + b * here, w12 + c * here
                w20, w21, w22 = w20 + a * above, w21 + b * above, w22 + c * above
                above, here = here, below
        else:
            a, b, c = zero, zero, zero  # row 2 r - 1 of x
            for r in range(0, y_height):
                here = load(dy, y_top + r * y_width, valid, channel, inside, channels)
                w00, w01, w02 = w00 + a * here, w01 + b * here, w02 + c * here
                a, b, c = neighbours(x, x_top + 2 * r * width, valid, left, right, channel, inside, channels)
                w10, w11, w12 = w10 + a * here, w11 + b * here, w12 + c * here
                a, b, c = neighbours(x, x_top + (2 * r + 1) * width, valid & (2 * r + 1 < height), left, right,
                                     channel, inside, channels)
                w20, w21, w22 = w20 + a * here, w21 + b * here, w22 + c * here
    at = parts + (tl.program_id(0) * channels + channel) * 9
    tl.store(at, tl.sum(w00, 0), mask=inside)
    tl.store(at + 1, tl.sum(w01, 0), mask=inside)
    tl.store(at + 2, tl.sum(w02, 0), mask=inside)
    tl.store(at + 3, tl.sum(w10, 0), mask=inside)
    tl.store(at + 4, tl.sum(w11, 0), mask=inside)
    tl.store(at + 5, tl.sum(w12, 0), mask=inside)
    tl.store(at + 6, tl.sum(w20, 0), mask=inside)
    tl.store(at + 7, tl.sum(w21, 0), mask=inside)
    tl.store(at + 8, tl.sum(w22, 0), mask=inside)


# ---- Operators -----------------------------------------------------------------------------------

class Launch:
    """Launch kernels of an operator on maps of the shape [images, channels, height, width], with their tiling.

    positions: what the tiles of one block of channels cover. parts: number of programs that share a sum over them.
    """

    def __init__(self, operator: str, shape, positions: int, stride: int = 1):
        images, channels, height, width = shape
        key = operator, channels, height, width, stride
        tile, block, warps, self.share = chosen.get(key, TILINGS[operator][0])
        align = min(8, channels & -channels)  # a thread loads at most 8 values of 16 bits at once
        self.size = images, height, width, channels // align
        self.tiles, self.blocks = triton.cdiv(positions, tile), triton.cdiv(channels, block)
        self.parts = max(1, min(self.tiles, PROGRAMS // self.blocks))
        self.options = {"ALIGN": align, "POSITIONS": tile, "CHANNELS": block, "num_warps": warps}

    def __call__(self, kernel, programs: int, *args, shares: int = 1, **constants) -> None:
        kernel[programs, self.blocks, shares](*args, **constants, **self.options)


def dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def operator(function):
    """Register a function as torch.ops.training.NAME. It runs on the device of its first argument."""
    @functools.wraps(function)
    def on_its_device(x, *args):
        with torch.cuda.device_of(x):
            return function(x, *args)
    return torch.library.custom_op(f"training::{function.__name__}", on_its_device, mutates_args=())


@operator
def normalise(x: Tensor, weight: Tensor, bias: Tensor, origin: Tensor, eps: float,
              activation: int) -> tuple[Tensor, Tensor]:
    """Normalise a batch and apply the activation (see `activated`).

    origin: values near the means, such as the running means; sums are taken relative to them to lose no digits.
    Returns (y, statistics [3, channels]: mean, unbiased variance, 1 / standard deviation).
    """
    x, rows = dense(x), x.numel() // x.shape[1]
    launch = Launch("normalise", x.shape, rows)
    parts = x.new_empty(2, launch.parts, x.shape[1], dtype=torch.float32)
    launch(moment_parts, launch.parts, x, origin, parts, rows, launch.size[-1])
    y, statistics = torch.empty_like(x), x.new_empty(3, x.shape[1], dtype=torch.float32)
    launch(normalised, launch.tiles, x, parts.sum(1), origin, weight, bias, y, statistics, rows, launch.size[-1], eps,
           rows / max(1, rows - 1), ACTIVATION=activation)
    return y, statistics


@operator
def normalise_gradients(x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor,
                        activation: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of normalise's x and of its bias and weight, [2, channels]."""
    x, dy, rows = dense(x), dense(dy.to(x.dtype)), x.numel() // x.shape[1]
    launch, dx = Launch("normalise_gradients", x.shape, rows), torch.empty_like(x)
    parts = x.new_empty(2, launch.parts, x.shape[1], dtype=torch.float32)
    launch(gradient_parts, launch.parts, x, dy, statistics, weight, bias, parts, rows, launch.size[-1],
           ACTIVATION=activation)
    sums = parts.sum(1)
    launch(normalised_gradient, launch.tiles, x, dy, sums, statistics, weight, bias, dx, rows, launch.size[-1],
           ACTIVATION=activation)
    return dx, sums


def output_side(side: int, stride: int) -> int:
    return (side - 1) // stride + 1


def maps(like: Tensor, height: int, width: int) -> Tensor:
    """Return an empty channels-last tensor with the images, channels and type of another."""
    return torch.empty(*like.shape[:2], height, width, dtype=like.dtype, device=like.device,
                       memory_format=torch.channels_last)


def convolve(operator: str, x: Tensor, weight: Tensor, stride: int, flipped: bool) -> Tensor:
    """Convolve x depthwise with weight, or with weight turned by 180 degrees."""
    y = maps(x, *(output_side(side, stride) for side in x.shape[2:]))
    launch = Launch(operator, x.shape, y.shape[0] * y.shape[3], stride)
    launch(convolved, launch.tiles, dense(x), weight.contiguous(), y, *launch.size, launch.share,
           shares=triton.cdiv(y.shape[2], launch.share), STRIDE=stride, FLIPPED=flipped)
    return y


@operator
def depthwise(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Convolve x [N, C, H, W] depthwise with weight [C, 1, 3, 3] (float32) with a border of one zero, stride 1 or 2."""
    return convolve("depthwise", x, weight, stride, False)


@operator
def depthwise_input_gradient(dy: Tensor, weight: Tensor, height: int, width: int, stride: int) -> Tensor:
    """Return the gradient of the input [N, C, height, width] of `depthwise`."""
    name = "depthwise_input_gradient"
    if stride == 1:
        return convolve(name, dy, weight, 1, True)
    dx = maps(dy, height, width)
    launch = Launch(name, dx.shape, dy.shape[0] * dy.shape[3], stride)
    launch(spread, launch.tiles, dense(dy), weight.contiguous(), dx, *launch.size, launch.share,
           shares=triton.cdiv(dy.shape[2], launch.share))
    return dx


@operator
def depthwise_weight_gradient(x: Tensor, dy: Tensor, stride: int) -> Tensor:
    """Return the gradient [C, 1, 3, 3] of the weight of `depthwise`."""
    launch = Launch("depthwise_weight_gradient", x.shape, dy.shape[0] * dy.shape[3], stride)
    parts = x.new_empty(launch.parts, x.shape[1], 9, dtype=torch.float32)
    launch(weight_parts, launch.parts, dense(x), dense(dy), parts, *launch.size, STRIDE=stride)
    return parts.sum(0).view(-1, 1, 3, 3)


# ---- Shapes and gradients, for autograd and torch.compile ----------------------------------------

@normalise.register_fake
def _(x, weight, bias, origin, eps, activation):
    return maps(x, *x.shape[2:]), x.new_empty(3, x.shape[1], dtype=torch.float32)


@normalise_gradients.register_fake
def _(x, dy, weight, bias, statistics, activation):
    return maps(x, *x.shape[2:]), x.new_empty(2, x.shape[1], dtype=torch.float32)


@depthwise.register_fake
def _(x, weight, stride):
    return maps(x, *(output_side(side, stride) for side in x.shape[2:]))


@depthwise_input_gradient.register_fake
def _(dy, weight, height, width, stride):
    return maps(dy, height, width)


@depthwise_weight_gradient.register_fake
def _(x, dy, stride):
    return x.new_empty(x.shape[1], 1, 3, 3, dtype=torch.float32)


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
    (x, weight), dy = ctx.saved_tensors, dense(dy)
    dx = depthwise_input_gradient(dy, weight, *x.shape[2:], ctx.stride)
    return dx, depthwise_weight_gradient(x, dy, ctx.stride), None


normalise.register_autograd(normalise_backward, setup_context=keep_for_normalise)
depthwise.register_autograd(depthwise_backward, setup_context=keep_for_depthwise)
