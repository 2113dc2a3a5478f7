"""Dead weight goes, and not one bit of a logit changes."""
import copy

import pytest
import torch

from compressed import cifar100, dead_weight, graph, grids
from compressed import exact_network as exact
from compressed.graph import weight_layers
from mobilenet_v2 import MobileNetV2


@pytest.fixture(scope="module")
def sparse():
    """A shipped network of which 97% of the weights are zero, and its activations."""
    torch.manual_seed(0)
    model = MobileNetV2().eval()
    with torch.no_grad():
        for index, (_, module) in enumerate(weight_layers(model)):
            if index:
                module.weight.mul_(torch.rand_like(module.weight) < 0.03)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 3)
                module.bias.normal_(0, 0.3)
    images = cifar100.made_up(8, seed=0).images
    grids.quantize_weights(model, grids.bit_table(None, MobileNetV2()), "channel")
    exact.quantize_activations(model, grids.calibrate(model, images, 8, "mse"))
    activations = [{"name": name, "bits": 8, "signed": module.signed, "step": module.step}
                   for name, module in model.named_modules() if isinstance(module, exact.Quantizer)]
    return grids.shipped(model, MobileNetV2())[0], activations


def logits(model, activations):
    with torch.inference_mode():
        return exact.exact_network(model, activations)(cifar100.normalise(cifar100.made_up(16, seed=1).images))


def test_the_logits_stay_the_same_to_the_last_bit(sparse):
    model, activations = copy.deepcopy(sparse[0]), sparse[1]
    before = sum(int(p.count_nonzero()) for p in model.parameters())
    expected = logits(model, activations)
    removed = dead_weight.remove(model, activations)
    assert torch.equal(logits(model, activations), expected) and expected.std() > 0
    assert removed["weights"] > 0 and removed["scales and shifts"] > 0
    assert before - sum(int(p.count_nonzero()) for p in model.parameters()) == sum(removed.values())


def test_a_second_pass_finds_nothing(sparse):
    model = copy.deepcopy(sparse[0])
    dead_weight.remove(model, sparse[1])
    assert dead_weight.remove(model, sparse[1]) == {"weights": 0, "scales and shifts": 0}


def test_no_other_weight_is_touched(sparse):
    model = copy.deepcopy(sparse[0])
    dead_weight.remove(model, sparse[1])
    for before, after in zip(sparse[0].parameters(), model.parameters()):
        assert ((after == before) | (after == 0)).all()


def dense():
    torch.manual_seed(0)
    model = MobileNetV2(width=0.25).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.bias.data.fill_(0.5)
    return model


ONES = [{"name": name, "step": 0.125} for name in graph.read(MobileNetV2(width=0.25)).activation_points]


def test_a_dense_network_has_none():
    assert dead_weight.remove(dense(), ONES) == {"weights": 0, "scales and shifts": 0}


def test_a_channel_that_nothing_reads():
    model = dense()
    block = model.layers[3]
    block.conv3.weight.data[:, 7] = 0
    removed = dead_weight.remove(model, ONES)
    assert removed == {"weights": 9 + block.conv1.in_channels, "scales and shifts": 4}
    assert not block.conv1.weight[7].any() and not block.conv2.weight[7].any() and not block.bn1.bias[7]
    assert not block.bn2.weight[7]


def test_a_channel_that_nothing_reaches():
    model = dense()
    block = model.layers[3]
    block.conv1.weight.data[7] = 0
    block.bn1.bias.data[7] = 0.06  # rounds to the code 0
    block.bn2.bias.data[7] = -1  # so the depthwise convolution of zeros is cut off as well
    removed = dead_weight.remove(model, ONES)
    assert removed == {"weights": 9 + block.conv3.out_channels, "scales and shifts": 4}


def test_a_constant_channel_is_not_dead():
    model = dense()
    model.layers[3].conv1.weight.data[7] = 0
    model.layers[3].bn1.bias.data[7] = 0.07  # rounds to the code 1: a constant that the next layers see
    assert dead_weight.remove(model, ONES) == {"weights": 0, "scales and shifts": 0}


def test_the_channels_of_a_residual_stream():
    """A channel of a stream is dead only if nobody down the stream reads it."""
    model = dense()
    third, fourth = model.layers[4], model.layers[5]  # stage 3: 3 adds 4 adds 5, which stage 4 (layer 6) reads
    third.conv1.weight.data[:, 2] = 0
    assert dead_weight.remove(copy.deepcopy(model), ONES)["weights"] == 0
    fourth.conv1.weight.data[:, 2] = 0
    assert dead_weight.remove(copy.deepcopy(model), ONES)["weights"] == 0
    model.layers[6].conv1.weight.data[:, 2] = 0
    assert dead_weight.remove(model, ONES)["weights"] == sum(model.layers[i].conv3.in_channels for i in (3, 4, 5))


def test_a_sum_is_zero_only_if_all_of_its_branches_are():
    """Channel 2 of the sum is what the block before gives: the layers that read it stay."""
    model = dense()
    third = model.layers[4]
    third.conv3.weight.data[2], third.bn3.bias.data[2] = 0, 0
    assert dead_weight.remove(copy.deepcopy(model), ONES) == {"weights": 0, "scales and shifts": 0}
    third.bn3.bias.data[2] = 0.5  # a constant that is added
    assert dead_weight.remove(model, ONES)["weights"] == 0
