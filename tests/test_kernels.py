"""The compiled functions (kernels.c) and the Triton kernels, compared with PyTorch's functions in float64.

Without a GPU the Triton kernels are interpreted.
"""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compressed import kernels
from training import cpu_kernels, gpu_kernels

try:
    from training import triton_kernels
    TRITON = "cuda" if torch.cuda.is_available() else "cpu"
    USABLE = TRITON == "cuda" or type(triton_kernels.normalised).__name__ == "InterpretedFunction"
except ImportError:
    TRITON, USABLE = "cpu", False
DTYPES = torch.float32, torch.bfloat16
LAST_PLACE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}  # Triton's interpreter cuts, a GPU rounds
PYTORCHS = {"none": lambda z: z, "relu": F.relu, "hardswish": F.hardswish}


def implementations(compiled, triton) -> pytest.MarkDecorator:
    """Parametrize a test by `kind`, "compiled" or "triton", and by `shape`, with these shapes for each."""
    absent = {"compiled": pytest.mark.skipif(kernels.library(torch.float32) is None, reason="there is no C compiler"),
              "triton": pytest.mark.skipif(not USABLE, reason="no Triton, or imported without TRITON_INTERPRET=1")}
    return pytest.mark.parametrize("kind, shape", [
        pytest.param(kind, shape, marks=absent[kind])
        for kind, shapes in (("compiled", compiled), ("triton", triton)) for shape in shapes])


def device(kind: str) -> str:
    return TRITON if kind == "triton" else "cpu"


def maps(kind: str, *shape, dtype=torch.float32):
    x = torch.randn(shape) * (0.2 + torch.rand(shape[1]))[:, None, None] + torch.randn(shape[1])[:, None, None]
    return x.to(device(kind), dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


def pair(kind: str, channels: int, activation: str, size) -> tuple[nn.BatchNorm2d, nn.BatchNorm2d]:
    """(PyTorch's BatchNorm in float64, ours)."""
    torch.manual_seed(channels)
    norm = nn.BatchNorm2d(channels).to(device(kind))
    for values in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(values)
    ours = copy.deepcopy(norm)
    ours.__class__ = {"compiled": cpu_kernels.BatchNorm, "triton": gpu_kernels.BatchNorm}[kind]
    ours.activation, ours.sizes = activation, (tuple(size),)
    return norm.double(), ours


def agree(found: list, wanted: list, tolerances: list) -> None:
    for k, (mine, theirs, tolerance) in enumerate(zip(found, wanted, tolerances, strict=True)):
        error = (mine - theirs).abs().max().item()
        assert error <= tolerance * theirs.abs().max().item() + 1e-6, (k, error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", PYTORCHS)
@implementations(compiled=((2, 3, 5, 7), (2, 37, 9, 9), (3, 40, 12, 12), (2, 1248, 3, 3), (1, 1, 1, 130)),
                 triton=((2, 3, 5, 7), (2, 70, 9, 9), (3, 40, 4, 4), (1, 1, 1, 130), (9, 36, 1, 1)))
def test_batchnorm_with_an_activation(kind, shape, activation, dtype):
    (norm, ours), x = pair(kind, shape[1], activation, shape[2:]), maps(kind, *shape, dtype=dtype)
    double = x.detach().double().requires_grad_()
    z = norm(double)
    wanted, clear = PYTORCHS[activation](z), torch.ones_like(x, dtype=torch.bool)
    for jump in {"none": (), "relu": (0,), "hardswish": (-3, 3)}[activation]:
        clear &= (z.detach() - jump).abs() > 0.001  # elsewhere rounding decides on which side of a jump z is
    found, gradient = ours(x), torch.randn(shape).to(x) * clear
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    wanted.backward(gradient.double())
    found.backward(gradient)
    agree([found, x.grad, ours.weight.grad, ours.bias.grad, ours.running_mean, ours.running_var],
          [wanted, double.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var],
          2 * [max(LAST_PLACE[dtype], 5e-5)] + 4 * [5e-5])
    assert ours.num_batches_tracked == norm.num_batches_tracked == 1


@pytest.mark.parametrize("activation", ("relu", "hardswish"))
@implementations(compiled=[(2, 9, 3, 5)], triton=[(2, 9, 3, 5)])
def test_at_and_next_to_the_jumps_of_the_derivative(kind, shape, activation):
    """With a weight of 0, z is the bias to the last bit; there PyTorch's derivative is taken."""
    at = torch.tensor([-3.0, 0.0, 3.0])
    z = torch.cat([at, *(torch.nextafter(at, at + direction) for direction in (-1, 1))])
    norm, ours = pair(kind, len(z), activation, shape[2:])
    for each in (norm.float(), ours):
        nn.init.zeros_(each.weight)
        each.bias.data.copy_(z)
    x = maps(kind, *shape)
    gradient, same = torch.randn_like(x), x.detach().clone().requires_grad_()
    found, wanted = ours(x), PYTORCHS[activation](norm(same))
    found.backward(gradient)
    wanted.backward(gradient)
    assert not x.grad.any() and not same.grad.any()
    agree([found, ours.bias.grad, ours.weight.grad], [wanted, norm.bias.grad, norm.weight.grad], [1e-5, 1e-5, 1e-4])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", PYTORCHS)
@implementations(compiled=[(2, 8, 4, 4)], triton=[(2, 8, 4, 4)])
def test_a_nan_stays_one(kind, shape, activation, dtype):
    x, ours = maps(kind, *shape, dtype=dtype), pair(kind, shape[1], activation, shape[2:])[1]
    with torch.no_grad():
        x[0, 3, 0, 0] = torch.nan
    y = ours(x)
    assert y[:, 3].isnan().all() and y[:, :3].isfinite().all() and ours.running_var[3].isnan()
    y.sum().backward()
    assert x.grad[:, 3].isnan().all() and x.grad[:, :3].isfinite().all()


def convolve(kind: str, x, weight, stride: int):
    return cpu_kernels.Convolve.apply(x, weight, stride) if kind == "compiled" else \
        triton_kernels.depthwise(x, weight, stride)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", (1, 2))
@implementations(
    compiled=((2, 16, 1, 1), (3, 40, 24, 24), (1, 17, 5, 8), (2, 23, 6, 3), (1, 31, cpu_kernels.LARGEST_MAP, 2)),
    triton=((2, 12, 7, 5), (1, 40, 1, 1), (3, 8, 6, 3), (1, 1, 4, 9), (1, 33, 9, 2)))
def test_depthwise_convolution(kind, shape, stride, dtype):
    """Channels that fill their blocks and that do not, odd and even sides, and the strides' last positions."""
    torch.manual_seed(0)
    x, weight = maps(kind, *shape, dtype=dtype), torch.randn(shape[1], 1, 3, 3, device=device(kind), requires_grad=True)
    double, wide = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    wanted, found = F.conv2d(double, wide, None, stride, 1, 1, shape[1]), convolve(kind, x, weight, stride)
    assert found.shape == wanted.shape and found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    gradient = torch.randn(wanted.shape).to(x)
    wanted.backward(gradient.double())
    found.backward(gradient)
    assert x.grad.dtype == dtype and weight.grad.dtype == torch.float32
    agree([found, x.grad, weight.grad], [wanted, double.grad, wide.grad], [LAST_PLACE[dtype], LAST_PLACE[dtype], 1e-5])


@pytest.mark.parametrize("dtype", DTYPES)
@implementations(compiled=[(1, 16, 4, 4)], triton=[(1, 8, 4, 4)])
def test_what_is_not_finite_stays_so_in_a_convolution(kind, shape, dtype):
    x, weight = torch.ones(shape, dtype=dtype, device=device(kind)), torch.ones(shape[1], 1, 3, 3, device=device(kind))
    x[0, 3, 0, 0], x[0, 5, 3, 3] = torch.nan, torch.inf
    y = convolve(kind, x, weight, 1)
    assert y[0, 3, :2, :2].isnan().all() and (y[0, 5, 2:, 2:] == torch.inf).all()
    assert int((~y.isfinite()).sum()) == 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", (False, True))
def test_a_1x1_convolution_as_a_matrix_product(bias, dtype):
    """In any memory format, and under autocast."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(6, 9, 1, bias=bias).to(memory_format=torch.channels_last)
    ours = copy.deepcopy(conv)
    ours.__class__, ours.sizes = gpu_kernels.Pointwise, ((4, 5),)
    for x in (maps("compiled", 3, 6, 4, 5), maps("compiled", 3, 6, 5, 4).detach().transpose(2, 3).requires_grad_()):
        double, gradient = x.detach().double().requires_grad_(), torch.randn(3, 9, 4, 5).to(dtype)
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            found = ours(x)
        wanted = conv.double()(double)
        assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
        mine = torch.autograd.grad(found, [x, *ours.parameters()], gradient)
        theirs = torch.autograd.grad(wanted, [double, *conv.parameters()], gradient.double())
        assert all(each.dtype == torch.float32 for each in mine)
        agree([found, *mine], [wanted, *theirs], [4 * max(LAST_PLACE[dtype], 1e-6)] * (3 + bias))
