"""The compiled depthwise convolution beside PyTorch's in float64, and what it leaves to PyTorch."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compressed import kernels
from mobilenet_v2 import MobileNetV2
from training.cpu_kernels import LARGEST_MAP, Convolve, Depthwise, fast_on_a_cpu

compiled = pytest.mark.skipif(kernels.library(torch.float32) is None, reason="there is no C compiler")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}


@compiled
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("shape", ((2, 16, 1, 1), (3, 40, 24, 24), (1, 17, 5, 8), (2, 23, 6, 3),
                                   (1, 31, LARGEST_MAP, 2)))
def test_it_is_a_depthwise_convolution(shape, stride, dtype):
    """Channels that fill their blocks and that do not, odd and even sides, and the strides' last positions."""
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype).requires_grad_()
    weight = torch.randn(shape[1], 1, 3, 3, requires_grad=True)
    double, wide = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    wanted = F.conv2d(double, wide, None, stride, 1, 1, shape[1])
    found = Convolve.apply(x, weight, stride)
    assert found.shape == wanted.shape and found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    gradient = torch.randn(wanted.shape).to(dtype)
    wanted.backward(gradient.double())
    found.backward(gradient)
    assert x.grad.dtype == dtype and weight.grad.dtype == torch.float32
    for mine, theirs, tolerance in ((found, wanted, TOLERANCE[dtype]), (x.grad, double.grad, TOLERANCE[dtype]),
                                    (weight.grad, wide.grad, 1e-5)):
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()


@compiled
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_what_is_not_finite_stays_so(dtype):
    x, weight = torch.ones(1, 16, 4, 4, dtype=dtype), torch.ones(16, 1, 3, 3)
    x[0, 3, 0, 0], x[0, 5, 3, 3] = torch.nan, torch.inf
    y = Convolve.apply(x, weight, 1)
    assert y[0, 3, :2, :2].isnan().all() and (y[0, 5, 2:, 2:] == torch.inf).all()
    assert int((~y.isfinite()).sum()) == 8


@compiled
def test_it_takes_what_fits_and_leaves_the_rest(monkeypatch):
    ours = [conv for conv in MobileNetV2().modules() if isinstance(conv, nn.Conv2d) and Depthwise.fits(conv)]
    assert len(ours) == 17
    taken = []
    monkeypatch.setattr(kernels, "call", lambda name, *args: taken.append(name))
    wide = {"groups": 32, "bias": False}
    for conv, side in ((nn.Conv2d(32, 32, 3, 1, 1, groups=32), 8), (nn.Conv2d(32, 64, 3, 1, 1, **wide), 8),
                       (nn.Conv2d(32, 32, 5, 1, 2, **wide), 8), (nn.Conv2d(32, 32, 3, 1, 0, **wide), 8),
                       (nn.Conv2d(32, 32, 3, 3, 1, **wide), 8), (nn.Conv2d(32, 32, 3, 1, 2, 2, **wide), 8),
                       (nn.Conv2d(32, 32, 3, 1, 1, padding_mode="circular", **wide), 8),
                       (nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), 8),
                       (nn.Conv2d(32, 32, 3, 1, 1, **wide).double(), 8),
                       (nn.Conv2d(32, 32, 3, 1, 1, **wide), LARGEST_MAP + 1)):
        x = torch.randn(2, conv.in_channels, side, side, dtype=conv.weight.dtype)
        plain = conv(x)
        with fast_on_a_cpu(conv):
            assert isinstance(conv, Depthwise) and torch.equal(conv(x), plain)
        assert type(conv) is nn.Conv2d and not taken
    conv = nn.Conv2d(32, 32, 3, 1, 1, **wide)
    with fast_on_a_cpu(conv):
        conv(torch.randn(2, 32, LARGEST_MAP, 2))
    assert taken == ["depthwise"]
