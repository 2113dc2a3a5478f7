"""Triton kernels for training on a GPU: BatchNorm with its activation, and 3x3 depthwise convolution, with gradients.

All maps are channels-last (NHWC) in bfloat16, float16 or float32; sums, statistics and weights are float32. Nothing
waits for the device and nothing is random: each program writes its part of a sum, and the parts are added in a fixed
order. The functions are PyTorch operators, and CUDA graphs record them.
training/gpu_kernels.py decides where they are used. With TRITON_INTERPRET=1, set before the import, they run on a CPU.

In the kernels a tile is [positions, channels]. `channels = groups * ALIGN` tells the compiler which power of two
divides the number of channels, so that it can load vectors. Masked loads return zero, which is also the border of a
convolution. Offsets are 32-bit integers: see gpu_kernels.LARGEST. There is one tiling, and shapes are not compile-time
constants: a dozen variants are compiled for all layers of the default network.
"""
import functools

import torch
import torch._dynamo  # noqa: F401 - else the first operator imports it, and keeps its own autograd graph in a cycle
import triton
import triton.language as tl
from torch import Tensor

from training.gpu_kernels import alignment, dense

# Largest number of programs that share a sum: on an H100 (132 multiprocessors) eight convolution programs of 2 warps on
# each; BatchNorm takes half as many, of 4 warps.
PROGRAMS = 1056
CHANNELS, ROWS, COLUMNS = 32, 64, 8  # channels of a tile, and its positions in BatchNorm and in a convolution
PARTS = tl.constexpr(64)  # number of partial sums that the last program loads at a time, to hide memory latency


# ---- Kernels -------------------------------------------------------------------------------------

# by default Triton recompiles a kernel for integers that are 1 or multiples of 16
kernel = triton.jit(do_not_specialize=["rows", "images", "height", "width", "y_height", "y_width", "groups", "eps",
                                       "correction", "count"])


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
    """Store a tile [rows, channels] of `value` at rows `at`, where `valid` (rows) and `inside` (channels) are true."""
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


@triton.jit
def block_sum(parts, count, channel, inside, channels, CHANNELS: tl.constexpr):
    """Return the sum of `count` rows of parts [count, channels], in a fixed order.

    Other programs wrote them, so the loads bypass the L1 cache.
    """
    total = tl.zeros([PARTS, CHANNELS], tl.float32)
    for first in range(0, count, PARTS):
        row = first + tl.arange(0, PARTS)
        total += tl.load(parts + row[:, None] * channels + channel[None, :], cache_modifier=".cg", other=0.0,
                         mask=(row < count)[:, None] & inside[None, :])
    return tl.sum(total, 0)


@triton.jit
def is_last(arrived):
    """Return True in the last of the programs that share a sum, when all have stored their parts.

    arrived: int32, one for each block of channels, 0 before and afterwards.
    """
    tl.debug_barrier()  # all threads have stored
    last = tl.atomic_add(arrived + tl.program_id(1), 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(arrived + tl.program_id(1), 0)
    return last


@triton.jit
def write_statistics(total, squares, origin, parts, arrived, statistics, rows, eps, correction, channel, inside,
                     channels, CHANNELS: tl.constexpr):
    """Store this program's sums of x - origin and its square; the last program writes the statistics of the sums."""
    programs = tl.num_programs(0)
    at = parts + tl.program_id(0) * channels + channel
    tl.store(at, tl.sum(total, 0), mask=inside)
    tl.store(at + programs * channels, tl.sum(squares, 0), mask=inside)
    if is_last(arrived):
        distance = block_sum(parts, programs, channel, inside, channels, CHANNELS) / rows
        square = block_sum(parts + programs * channels, programs, channel, inside, channels, CHANNELS) / rows
        variance = square - distance * distance
        variance = tl.where(variance < 0, 0.0, variance)  # by rounding
        tl.store(statistics + channel, tl.load(origin + channel, mask=inside, other=0.0) + distance, mask=inside)
        tl.store(statistics + channels + channel, variance * correction, mask=inside)
        tl.store(statistics + 2 * channels + channel, 1 / tl.sqrt(variance + eps), mask=inside)


@kernel
def batch_statistics(x, origin, parts, arrived, statistics, rows, groups, eps, correction, ALIGN: tl.constexpr,
                     POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write to statistics [3, channels] mean, unbiased variance and 1 / standard deviation of x [rows, channels].

    Sums are of x - origin and its square. parts [2, programs, channels] is scratch memory.
    """
    channels, channel, inside = channels_here(groups, ALIGN, CHANNELS)
    start = vector(origin, channel, inside)
    total = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    squares = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    for first in tl.range(tl.program_id(0) * POSITIONS, rows, tl.num_programs(0) * POSITIONS, loop_unroll_factor=2):
        row = first + tl.arange(0, POSITIONS)
        value = tl.where((row < rows)[:, None], load(x, row, row < rows, channel, inside, channels) - start, 0.0)
        total += value
        squares += value * value
    write_statistics(total, squares, origin, parts, arrived, statistics, rows, eps, correction, channel, inside,
                     channels, CHANNELS)


@kernel
def normalised(x, statistics, weight, bias, y, rows, groups, ACTIVATION: tl.constexpr, ALIGN: tl.constexpr,
               POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write y: x [rows, channels] normalised by `statistics`, and the activation of it."""
    channels, channel, inside = channels_here(groups, ALIGN, CHANNELS)
    mean, inverse = vector(statistics, channel, inside), vector(statistics + 2 * channels, channel, inside)
    scale, shift = inverse * vector(weight, channel, inside), vector(bias, channel, inside)
    row = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    z = (load(x, row, row < rows, channel, inside, channels) - mean) * scale + shift
    store(y, row, row < rows, channel, inside, channels, activated(z, ACTIVATION))


@kernel
def affine_gradients(x, dy, statistics, weight, bias, parts, arrived, dweight, dbias, rows, groups,
                     ACTIVATION: tl.constexpr, ALIGN: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write the gradients of weight and bias. parts [2, programs, channels] is scratch memory."""
    channels, channel, inside = channels_here(groups, ALIGN, CHANNELS)
    mean, inverse = vector(statistics, channel, inside), vector(statistics + 2 * channels, channel, inside)
    scale, shift = vector(weight, channel, inside), vector(bias, channel, inside)
    total = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    products = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    for first in tl.range(tl.program_id(0) * POSITIONS, rows, tl.num_programs(0) * POSITIONS, loop_unroll_factor=2):
        row = first + tl.arange(0, POSITIONS)
        unit = (load(x, row, row < rows, channel, inside, channels) - mean) * inverse
        dz = through_activation(load(dy, row, row < rows, channel, inside, channels), unit * scale + shift, ACTIVATION)
        total += dz
        products += dz * unit
    programs = tl.num_programs(0)
    at = parts + tl.program_id(0) * channels + channel
    tl.store(at, tl.sum(total, 0), mask=inside)
    tl.store(at + programs * channels, tl.sum(products, 0), mask=inside)
    if is_last(arrived):
        tl.store(dbias + channel, block_sum(parts, programs, channel, inside, channels, CHANNELS), mask=inside)
        tl.store(dweight + channel, block_sum(parts + programs * channels, programs, channel, inside, channels,
                                              CHANNELS), mask=inside)


@kernel
def normalised_gradient(x, dy, dweight, dbias, statistics, weight, bias, dx, rows, groups, ACTIVATION: tl.constexpr,
                        ALIGN: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write the gradient dx, given those of weight and bias."""
    channels, channel, inside = channels_here(groups, ALIGN, CHANNELS)
    mean, inverse = vector(statistics, channel, inside), vector(statistics + 2 * channels, channel, inside)
    scale, shift = vector(weight, channel, inside), vector(bias, channel, inside)
    mean_dz, mean_product = vector(dbias, channel, inside) / rows, vector(dweight, channel, inside) / rows
    row = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    unit = (load(x, row, row < rows, channel, inside, channels) - mean) * inverse
    dz = through_activation(load(dy, row, row < rows, channel, inside, channels), unit * scale + shift, ACTIVATION)
    store(dx, row, row < rows, channel, inside, channels, (dz - mean_dz - unit * mean_product) * (inverse * scale))


@triton.jit
def plus_product(start, weights, ROW: tl.constexpr, left, here, right):
    """Return start and the product of a row of pixels, at three columns, with a row of the taps."""
    return start + weights[3 * ROW] * left + weights[3 * ROW + 1] * here + weights[3 * ROW + 2] * right


@triton.jit
def three_columns(x, at, column, width, valid, channel, inside, channels):
    """Return the pixels of x left of `at`, at it, and right of it, zero outside of the image."""
    return (load(x, at - 1, valid & (column >= 1), channel, inside, channels),
            load(x, at, valid & (column < width), channel, inside, channels),
            load(x, at + 1, valid & (column + 1 < width), channel, inside, channels))


@kernel
def convolution(x, taps, y, origin, parts, arrived, statistics, images, height, width, y_height, y_width, groups, eps,
                correction, STATISTICS: tl.constexpr, STRIDE: tl.constexpr, ALIGN: tl.constexpr,
                POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write y, the depthwise convolution of x with taps [channels, 9]; with STATISTICS, see batch_statistics, of y too.

    x [images, height, width, channels]. A tile is some columns of images of y; the program goes down the rows, and
    loads the pixels of the next one (`ahead`) before it computes a row.
    """
    channels, channel, inside = channels_here(groups, ALIGN, CHANNELS)
    weights = ()
    if STATISTICS:
        start = vector(origin, channel, inside)
    for tap in tl.static_range(9):
        weights += (vector(taps, channel * 9 + tap, inside),)
    zero = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    total, squares = zero, zero
    for first in range(tl.program_id(0) * POSITIONS, images * y_width, tl.num_programs(0) * POSITIONS):
        position = first + tl.arange(0, POSITIONS)
        image, y_column = position // y_width, position % y_width
        valid, column = position < images * y_width, y_column * STRIDE
        at, y_at = image * height * width + column, image * y_height * y_width + y_column
        left, here, right = three_columns(x, at, column, width, valid, channel, inside, channels)
        # with stride 1 the sums of this row and of the next so far
        mine = plus_product(zero, weights, 1, left, here, right)
        rest = plus_product(zero, weights, 0, left, here, right)
        ahead = three_columns(x, at + width, column, width, valid & (1 < height), channel, inside, channels)
        for row in range(y_height):
            left, here, right = ahead
            below = (row + 1) * STRIDE  # the row of x at the middle of the next row's taps
            if STRIDE == 2:
                middle = three_columns(x, at + 2 * width, column, width, valid & (below < height), channel, inside,
                                       channels)
            ahead = three_columns(x, at + (STRIDE + 1) * width, column, width, valid & (below + 1 < height), channel,
                                  inside, channels)
            value = plus_product(mine, weights, 2, left, here, right)
            if STRIDE == 1:
                mine = plus_product(rest, weights, 1, left, here, right)
                rest = plus_product(zero, weights, 0, left, here, right)
            else:
                mine = plus_product(zero, weights, 0, left, here, right)
                left, here, right = middle
                mine = plus_product(mine, weights, 1, left, here, right)
            store(y, y_at, valid, channel, inside, channels, value)
            if STATISTICS:  # of the values as they were stored
                value = tl.where(valid[:, None], value.to(y.dtype.element_ty).to(tl.float32) - start, 0.0)
                total += value
                squares += value * value
            at += STRIDE * width
            y_at += y_width
    if STATISTICS:
        write_statistics(total, squares, origin, parts, arrived, statistics, images * y_height * y_width, eps,
                         correction, channel, inside, channels, CHANNELS)


@triton.jit
def with_products(sums, ROW: tl.constexpr, pixel, left, here, right):
    """Return the sums of the taps' gradient with the products of one row of the taps added."""
    new = ()
    for tap in tl.static_range(9):
        if tap // 3 == ROW:
            new += (sums[tap] + pixel * (right if tap % 3 == 0 else (here if tap % 3 == 1 else left)),)
        else:
            new += (sums[tap],)
    return new


@kernel
def convolution_gradients(x, dy, taps, dx, parts, images, height, width, y_height, y_width, groups,
                          STRIDE: tl.constexpr, ALIGN: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write both gradients of y, the depthwise convolution of x with taps [channels, 9].

    x and dx [images, height, width, channels]; parts [9, programs, channels]: the parts of the taps' gradient.

    A tile is some columns of images. The program goes down the rows of y, and a row of y meets three of x: the row
    above, whose gradient it completes, its own, and the one below.
    """
    channels, channel, inside = channels_here(groups, ALIGN, CHANNELS)
    sums, weights = (tl.zeros([POSITIONS, CHANNELS], tl.float32),) * 9, ()
    for tap in tl.static_range(9):
        weights += (vector(taps, channel * 9 + tap, inside),)
    for first in range(tl.program_id(0) * POSITIONS, images * width, tl.num_programs(0) * POSITIONS):
        position = first + tl.arange(0, POSITIONS)
        image, column = position // width, position % width
        valid = position < images * width
        # the columns of y that meet this column of x by a tap's right, middle and left
        before, after = (column - 1) // STRIDE, (column + 1) // STRIDE
        has_here, has_before = valid, valid & (column >= 1)
        has_after = valid & (after < y_width)
        if STRIDE == 2:
            has_here, has_before, has_after = valid & (column % 2 == 0), has_before & (column % 2 == 1), \
                has_after & (column % 2 == 1)
        at, y_at = image * height * width + column, image * y_height * y_width
        # of x above, here and below; of dx so far, above (rest) and here (mine)
        zero = tl.zeros([POSITIONS, CHANNELS], tl.float32)
        above, pixel, rest, mine = zero, zero, zero, zero
        if STRIDE == 1:
            pixel = load(x, at, valid, channel, inside, channels)
        for row in range(y_height):
            left = load(dy, y_at + before, has_before, channel, inside, channels)
            here = load(dy, y_at + column // STRIDE, has_here, channel, inside, channels)
            right = load(dy, y_at + after, has_after, channel, inside, channels)
            if STRIDE == 2:
                pixel = load(x, at, valid, channel, inside, channels)
            below = load(x, at + width, valid & (row * STRIDE + 1 < height), channel, inside, channels)
            sums = with_products(sums, 0, above, left, here, right)
            sums = with_products(sums, 1, pixel, left, here, right)
            sums = with_products(sums, 2, below, left, here, right)
            store(dx, at - width, valid & (row > 0), channel, inside, channels,
                  plus_product(rest, weights, 0, right, here, left))
            mine = plus_product(mine, weights, 1, right, here, left)
            rest = plus_product(zero, weights, 2, right, here, left)
            if STRIDE == 1:
                above, pixel = pixel, below
                mine, rest = rest, mine
            else:
                store(dx, at, valid, channel, inside, channels, mine)
                above, mine = below, zero
            at += STRIDE * width
            y_at += y_width
        # the last row, which no row of y is below
        store(dx, at - width, valid & (y_height * STRIDE - 1 < height), channel, inside, channels, rest)
    for tap in tl.static_range(9):
        tl.store(parts + (tap * tl.num_programs(0) + tl.program_id(0)) * channels + channel, tl.sum(sums[tap], 0),
                 mask=inside)


@kernel
def taps_gradient(parts, dtaps, count, groups, ALIGN: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write to dtaps [channels, 9] the sums over `count` of parts [9, count, channels]; program 0 to 8 is the tap."""
    channels, channel, inside = channels_here(groups, ALIGN, CHANNELS)
    tap = tl.program_id(0)
    tl.store(dtaps + channel * 9 + tap, block_sum(parts + tap * count * channels, count, channel, inside, channels,
                                                  CHANNELS), mask=inside)


# ---- Operators -----------------------------------------------------------------------------------

def launch(kernel, channels: int, programs: int, tile: int, *args, warps: int = 4, **others) -> None:
    """Launch `programs` of a kernel for each block of channels, with tiles of `tile` positions."""
    align = alignment(channels)  # a thread loads at most 8 values of 16 bits at once
    kernel[programs, triton.cdiv(channels, CHANNELS)](*args, **others, groups=channels // align, ALIGN=align,
                                                      POSITIONS=tile, CHANNELS=CHANNELS, num_warps=warps)


def sharing(channels: int, positions: int, tile: int, most: int) -> int:
    """Return how many programs, of `most` for all channels, share a sum over these positions."""
    return max(1, min(triton.cdiv(positions, tile), most // triton.cdiv(channels, CHANNELS)))


@functools.cache
def arrivals(device: torch.device) -> Tensor:
    """Return the counters of is_last, which all kernels of a device share: they run on one stream at a time."""
    return torch.zeros(1024, dtype=torch.int32, device=device)


def operator(function):
    """Register a function as torch.ops.training.NAME. It runs on the device of its first argument."""
    @functools.wraps(function)
    def on_its_device(x, *args):
        with torch.cuda.device_of(x):
            return function(x, *args)
    return torch.library.custom_op(f"training::{function.__name__}", on_its_device, mutates_args=())


def scratch(x: Tensor, programs: int, sums: int) -> Tensor:
    """Return memory for `sums` partial sums of each channel by each program, float32 [sums, programs, C]."""
    return x.new_empty(sums, programs, x.shape[1], dtype=torch.float32)


def unbiased(rows: int) -> float:
    """Return the factor from the variance of so many values to its unbiased estimate."""
    return rows / max(1, rows - 1)


def normalised_by(x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor, activation: int) -> Tensor:
    """Return activation(BatchNorm(x)) in x's shape and type. statistics: [3, C], of `batch_statistics`."""
    y, rows = torch.empty_like(x), x.numel() // x.shape[1]
    launch(normalised, x.shape[1], triton.cdiv(rows, ROWS), ROWS, x, statistics, weight, bias, y, rows,
           ACTIVATION=activation)
    return y


@operator
def normalise(x: Tensor, weight: Tensor, bias: Tensor, origin: Tensor, eps: float,
              activation: int) -> tuple[Tensor, Tensor]:
    """Normalise a batch and apply the activation (see `activated`).

    origin: values near the means, such as the running means; sums are taken relative to them to lose no digits.
    Returns (y, statistics [3, channels]: mean, unbiased variance, 1 / standard deviation).
    """
    x, channels, rows = dense(x), x.shape[1], x.numel() // x.shape[1]
    statistics, programs = scratch(x, 3, 1)[0], sharing(channels, rows, ROWS, PROGRAMS // 2)
    launch(batch_statistics, channels, programs, ROWS, x, origin, scratch(x, programs, 2), arrivals(x.device),
           statistics, rows, eps=eps, correction=unbiased(rows))
    return normalised_by(x, statistics, weight, bias, activation), statistics


@operator
def normalise_by(x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor, activation: int) -> Tensor:
    """Return y of `normalise`, given the statistics of x; the gradient of x includes the path through them."""
    return normalised_by(dense(x), statistics, weight, bias, activation)


@operator
def normalise_gradients(x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor,
                        activation: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of normalise's x, weight and bias."""
    x, dy, channels, rows = dense(x), dense(dy.to(x.dtype)), x.shape[1], x.numel() // x.shape[1]
    dx, dweight, dbias = map(torch.empty_like, (x, weight, bias))
    programs = sharing(channels, rows, ROWS, PROGRAMS // 2)
    launch(affine_gradients, channels, programs, ROWS, x, dy, statistics, weight, bias, scratch(x, programs, 2),
           arrivals(x.device), dweight, dbias, rows, ACTIVATION=activation)
    launch(normalised_gradient, channels, triton.cdiv(rows, ROWS), ROWS, x, dy, dweight, dbias, statistics, weight,
           bias, dx, rows, ACTIVATION=activation)
    return dx, dweight, dbias


def convolve(x: Tensor, weight: Tensor, stride: int, origin: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
    """Return (the depthwise convolution, its statistics; None without an origin)."""
    x, taps = dense(x), weight.contiguous()
    y = torch.empty(*x.shape[:2], *((side - 1) // stride + 1 for side in x.shape[2:]), dtype=x.dtype, device=x.device,
                    memory_format=torch.channels_last)
    (images, channels, *size), rows = y.shape, y.numel() // y.shape[1]
    programs, wanted = sharing(channels, images * size[1], COLUMNS, PROGRAMS), origin is not None
    statistics, parts = (scratch(x, 3, 1)[0], scratch(x, programs, 2)) if wanted else (None, None)
    launch(convolution, channels, programs, COLUMNS, x, taps, y, origin, parts, arrivals(x.device), statistics, images,
           *x.shape[2:], *size, eps=eps, correction=unbiased(rows), STATISTICS=wanted, STRIDE=stride, warps=2)
    return y, statistics


@operator
def depthwise(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Convolve x [N, C, H, W] depthwise with weight [C, 1, 3, 3] (float32) with a border of one zero, stride 1 or 2."""
    return convolve(x, weight, stride, None, 0.0)[0]


@operator
def depthwise_with_statistics(x: Tensor, weight: Tensor, stride: int, origin: Tensor,
                              eps: float) -> tuple[Tensor, Tensor]:
    """Return `depthwise` and its statistics, as `normalise` returns them. They have no gradient: see normalise_by."""
    return convolve(x, weight, stride, origin, eps)


@operator
def depthwise_gradients(x: Tensor, dy: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of depthwise's x and weight."""
    x, dy, (images, channels, *size) = dense(x), dense(dy.to(x.dtype)), x.shape
    programs = sharing(channels, images * size[1], COLUMNS, PROGRAMS)
    dx, dweight, parts = torch.empty_like(x), torch.empty_like(weight), scratch(x, programs, 9)
    launch(convolution_gradients, channels, programs, COLUMNS, x, dy, weight.contiguous(), dx, parts, images, *size,
           *dy.shape[2:], STRIDE=stride, warps=2)
    launch(taps_gradient, channels, 9, ROWS, parts, dweight, programs)
    return dx, dweight


# ---- Gradients, for autograd ---------------------------------------------------------------------

def keep_for_normalise(ctx, inputs, output):
    x, weight, bias, _, _, ctx.activation = inputs
    ctx.save_for_backward(x, weight, bias, output[1])
    ctx.set_materialize_grads(False)  # else a tensor of zeros is made for the statistics' gradient


def normalise_backward(ctx, dy, _):
    x, weight, bias, statistics = ctx.saved_tensors
    return *normalise_gradients(x, dy, weight, bias, statistics, ctx.activation), None, None, None


def keep_for_normalise_by(ctx, inputs, output):
    x, statistics, weight, bias, ctx.activation = inputs
    ctx.save_for_backward(x, weight, bias, statistics)


def normalise_by_backward(ctx, dy):
    x, weight, bias, statistics = ctx.saved_tensors
    dx, *others = normalise_gradients(x, dy, weight, bias, statistics, ctx.activation)
    return dx, None, *others, None


def keep_for_depthwise(ctx, inputs, output):
    x, weight, ctx.stride, *ctx.others = inputs
    ctx.save_for_backward(x, weight)
    ctx.set_materialize_grads(False)


def depthwise_backward(ctx, dy, *_):
    x, weight = ctx.saved_tensors
    return *depthwise_gradients(x, dy, weight, ctx.stride), None, *(None for _ in ctx.others)


normalise.register_autograd(normalise_backward, setup_context=keep_for_normalise)
normalise_by.register_autograd(normalise_by_backward, setup_context=keep_for_normalise_by)
for each in (depthwise, depthwise_with_statistics):
    each.register_autograd(depthwise_backward, setup_context=keep_for_depthwise)
