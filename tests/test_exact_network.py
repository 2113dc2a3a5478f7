"""The network that computes on its grids: exact, however it is run."""
import copy
import hashlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compressed import cifar100, kernels
from compressed import exact_network as exact_module
from compressed.errors import BadInput
from compressed.formats import code_range, is_folded
from compressed.graph import prepare, read_graph
from compressed.grids import SCHEMES
from compressed.integer_network import IntegerNetwork
from small import integer_logits, points


@pytest.fixture(scope="module")
def pictures():
    return torch.cat([cifar100.made_up(2, 7).images,
                      torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 32, 32),
                      torch.randint(0, 256, (1, 3, 32, 32),
                                    generator=torch.Generator().manual_seed(0)).to(torch.uint8)])


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_the_exact_network_computes_what_integers_do(exact, scheme, pictures):
    """And test_integer.py holds those against fractions."""
    network, tensors, activations, floats = exact[scheme]
    claim = {"tensors": tensors, "activations": activations}
    logits = floats(cifar100.normalise(pictures).contiguous(memory_format=torch.channels_last))
    assert torch.equal(logits, integer_logits(network, claim, pictures))
    assert (logits.std(0) > 1e-3).all()
    assert not torch.equal(network(cifar100.normalise(pictures)), logits)  # in float32 it is another network


@pytest.mark.parametrize("eps", (0.0, 1e-5, 1e-3, 0.3))
@torch.no_grad()
def test_a_folded_batchnorm_computes_by_its_weight_and_bias(eps):
    """And one whose statistics are off by a unit in the last place is not folded."""
    norm = nn.BatchNorm2d(2**15, eps=eps)
    norm.weight.copy_(torch.arange(2**15, dtype=torch.int16).view(torch.float16).nan_to_num(0))
    norm.bias.normal_()
    norm.running_var.fill_(1 - eps)
    assert is_folded(norm) and torch.equal(exact_module.ScaleShift(norm).scale.flatten(), norm.weight.double())
    for statistics, off in ((norm.running_var, 2.0**-23), (norm.running_mean, 2.0**-20)):
        before = statistics.clone()
        statistics[2**14] += off
        assert not is_folded(norm)
        statistics.copy_(before)


@torch.no_grad()
def test_the_exact_network_does_not_depend_on_how_it_runs(exact, pictures):
    *_, network = exact["channel"]
    x = cifar100.normalise(pictures)
    logits = network(x.contiguous(memory_format=torch.channels_last))
    assert torch.equal(network(x), logits)
    assert torch.equal(torch.cat([network(image) for image in x.split(1)]), logits)
    assert torch.equal(torch.cat([network(image) for image in x.split(4)]), logits)
    assert torch.equal(network(x.flip(0)).flip(0), logits)
    plain = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    assert torch.equal(plain(x), logits)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(network(x), logits)
        many = x.repeat(-(-16 // len(x)), 1, 1, 1)  # from 16 images on, PyTorch knows another algorithm
        assert torch.equal(network(many)[:len(x)], logits)
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(network(x), logits)
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_the_linear_layers_sums_are_exact_beyond_float32():
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(1664, 100)
    weight, bias = (torch.randint(low, high, shape, generator=generator)
                    for low, high, shape in ((1, 128, (100, 1664)), (-2**15, 2**15, (100,))))
    x = torch.randint(100, 256, (8, 1664), generator=generator)
    linear.weight.copy_(weight * 2.0**-7)
    linear.bias.copy_(bias * 2.0**-17)
    linear.__class__ = exact_module.ExactLinear
    sums = (x @ weight.T) * 16 + bias  # int64, in units of 2^-17
    assert sums.min() > 2**26 and torch.equal(linear(x * 2.0**-6), sums.double() * 2.0**-17)


@torch.no_grad()
def test_a_convolutions_sums_are_exact_beyond_float32():
    """9 x 64 products of 8-bit codes stay below 2^24; 9 x 1024 do not, and the result is that of integers."""
    generator = torch.Generator().manual_seed(0)
    for channels, wide in ((64, False), (1024, True)):
        model = prepare(nn.Sequential(nn.Conv2d(3, channels, 1), nn.ReLU(), nn.Conv2d(channels, 4, 3, bias=False),
                                      nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 900, 10)))
        codes = torch.randint(100, 128, (4, channels, 3, 3), generator=generator)
        model[0].weight.fill_(1.0), model[0].bias.fill_(64.0), model[2].weight.copy_(codes * 2.0**-7)
        activations = [{"name": name, "bits": 8, "signed": signed, "step": 2.0**-6 if name == "points.image" else 1.0}
                       for name, signed in read_graph(model).activation_points.items()]
        network = exact_module.exact_network(model, activations)
        assert (type(network[2]) is exact_module.WideConv2d) == wide
        hidden = torch.randint(200, 256, (2, channels, 5, 5), generator=generator)
        sums = F.conv2d(hidden.double(), codes.double())  # below 2^53
        assert torch.equal(network[2](hidden.float()).double() * 2.0**7, sums) and (sums.max() > 2**24) == wide


def test_a_network_that_scales_its_input_itself_is_refused():
    """It can be counted, but its codes would be those of other pixels."""
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 8, stride=8), nn.Flatten(), nn.Linear(64, 5))
            self.register_buffer("scale", torch.full((3, 1, 1), 2.0))

        def forward(self, x):
            return self.layers(x * self.scale)

    model = prepare(Scaled())
    assert read_graph(model).normalised and not read_graph(prepare(Scaled().layers)).normalised
    points = [{"name": name, "bits": 8, "signed": signed, "step": 0.5}
              for name, signed in read_graph(model).activation_points.items()]
    with pytest.raises(BadInput, match="scales or shifts its input itself"):
        exact_module.exact_network(model, points)


def test_images_of_the_other_kind_are_refused(exact):
    network, tensors, activations, computed = exact["layer"]
    images = cifar100.made_up(2, 0).images
    with pytest.raises(BadInput, match="images of torch.uint8: expected normalised ones"):
        computed(images)
    integers = IntegerNetwork(network, {"tensors": tensors, "activations": activations})
    with pytest.raises(BadInput, match="images of torch.float32: expected uint8"):
        integers(cifar100.normalise(images))


def test_the_exact_network_is_a_copy(exact):
    network, _, activations, fast = exact["layer"]
    assert isinstance(network.bn1, nn.BatchNorm2d) and isinstance(network.relu1, nn.ReLU)
    assert network.conv1.weight.requires_grad
    norm = fast.relu1.norm
    assert isinstance(norm, exact_module.ScaleShift) and not fast.training and not fast.conv1.weight.requires_grad
    assert torch.equal(norm.scale.flatten(), network.bn1.weight)
    assert torch.equal(norm.shift.flatten(), network.bn1.bias)


@pytest.mark.skipif(kernels.library(torch.float32) is None, reason="there is no C compiler")
@pytest.mark.parametrize("layout", (torch.channels_last, torch.contiguous_format))
@pytest.mark.parametrize("signed", (True, False))
def test_compiled_rounding_is_pytorchs_to_the_last_bit(monkeypatch, layout, signed):
    """Codes beyond both ends, halves that go to even, sums that only a float64 tells from halves."""
    generator, step = torch.Generator().manual_seed(0), 2.0**-3
    x = torch.randint(-2**24, 2**24, (2, 5, 6, 7), generator=generator).float().contiguous(memory_format=layout)
    x[0, 0, 0, :4] = torch.tensor([0.0, 8.0, -8.0, 24.0])
    bn = nn.BatchNorm2d(5)
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([2.0**-7, 1027 * 2.0**-31, -1.5 * 2.0**-22, 0.0, 2.0**-3]))
        bn.bias.copy_(torch.tensor([0.0, 2.0**-4, 5 * 2.0**-4, 2.0**-3, -1.0]))
    bn.running_var.fill_(1 - bn.eps)
    quantizer = exact_module.Quantizer(8, signed, step)
    rescale = exact_module.Rescale(exact_module.ScaleShift(bn), quantizer)
    with torch.no_grad():
        ours = rescale(x), quantizer(x * 2.0**-18), quantizer((x * 2.0**-18)[:, :, 0, 0])
        monkeypatch.setattr(kernels, "library", lambda dtype: None)
        theirs = rescale(x), quantizer(x * 2.0**-18), quantizer((x * 2.0**-18)[:, :, 0, 0])
    low, high = code_range(8, signed)
    assert all(map(torch.equal, ours, theirs))
    assert all(len(found.unique()) > 3 and found.max() == high * step for found in ours[:2])
    assert ours[0][0, 0, 0, :4].tolist() == [0, 0, 0, 2 * step]  # 0.5 and -0.5 to 0, 1.5 to 2
    for found in ours[:2]:
        assert found.min() == low * step


@pytest.mark.parametrize("compiled", (True, False))
@pytest.mark.parametrize("layout", (torch.channels_last, torch.contiguous_format))
@pytest.mark.parametrize("signed", (True, False))
def test_a_function_is_looked_up(monkeypatch, compiled, layout, signed):
    """Every code of both signs, and what is not a number, beside the function in float64."""
    if not compiled:
        monkeypatch.setattr(kernels, "library", lambda dtype: None)
    elif kernels.library(torch.float32) is None:
        pytest.skip("there is no C compiler")
    source, behind = exact_module.Quantizer(8, signed, 2.0**-4), exact_module.Quantizer(6, True, 2.0**-2)
    low, high = source.range()
    x = torch.arange(low, high + 1).float().mul(source.step).view(2, 4, 4, 8).contiguous(memory_format=layout)
    with torch.no_grad():
        found = exact_module.Lookup("hardswish", source, behind)(x)
        wanted = behind(nn.functional.hardswish(x.double()))
        assert torch.equal(found, wanted) and len(found.unique()) > 20 and found.max() == 31 * behind.step
        x[1, 2, 3, 4] = torch.nan
        found = exact_module.Lookup("hardswish", source, behind)(x)
    assert found[1, 2, 3, 4].isnan() and int(found.isnan().sum()) == 1


def test_the_probe_is_fixed():
    images = exact_module.probe_images()
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.uint8
    assert images.flatten()[:6].tolist() == [(i * 2654435761 // 2**13) % 256 for i in range(6)]
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    assert digest == "b4a262216347db103b2bdcb249b9e3f086211fb020051f6bdc83970869fa0983"


def test_a_relu6_is_clipped_at_six():
    model = prepare(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Flatten(), nn.Linear(4096, 10)).eval())
    exact_module.quantize_activations(model, points(model))
    x = torch.tensor([-1.0, 5.5, 6.0, 7.0])
    assert torch.equal(model.get_submodule("1")(x), F.relu6(x))
