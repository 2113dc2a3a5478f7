"""Dead weight goes, and not one bit of a logit changes."""
import copy

import torch
from torch import nn

from compressed import cifar100, dead_weight, graph, grids
from compressed import exact_network as exact
from compressed.graph import weight_layers
from small import FEW_BITS, few, points


def sparse():
    """A shipped network of which 97% of the weights are zero, and its activations."""
    torch.manual_seed(0)
    model = few()
    with torch.no_grad():
        for index, (_, module) in enumerate(weight_layers(model)):
            if index:
                module.weight.mul_(torch.rand_like(module.weight) < 0.03)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 3)
                module.bias.normal_(0, 0.3)
    activations = grids.calibrate(model, cifar100.made_up(8, seed=0).images, 8, "mse")
    grids.quantize_weights(model, FEW_BITS, "channel")
    return grids.shipped(model, few())[0], activations


def logits(model, activations):
    with torch.inference_mode():
        return exact.exact_network(model, activations)(cifar100.normalise(cifar100.made_up(16, seed=1).images))


def test_only_dead_weight_goes():
    """The logits stay the same to the last bit, no other weight is touched, and a second pass finds nothing."""
    model, activations = sparse()
    before, expected = copy.deepcopy(model), logits(model, activations)
    removed = dead_weight.remove(model, activations)
    assert torch.equal(logits(model, activations), expected) and expected.std() > 0
    assert removed["weights"] > 0 and removed["scales and shifts"] > 0
    went = 0
    for old, new in zip(before.parameters(), model.parameters()):
        assert ((new == old) | (new == 0)).all()
        went += int((new != old).sum())
    assert went == sum(removed.values())
    assert dead_weight.remove(model, activations) == {"weights": 0, "scales and shifts": 0}


def dense():
    torch.manual_seed(0)
    model = few()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.bias.data.fill_(0.5)
    return model


ONES = [{"name": name, "step": 0.125} for name in graph.read_graph(few()).activation_points]


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


def test_what_a_scale_of_zero_cuts_off():
    model = dense()
    block = model.layers[3]
    block.bn1.weight.data[7] = 0  # what is left is a constant
    assert dead_weight.remove(model, ONES)["weights"] == block.conv1.in_channels
    assert not block.conv1.weight[7].any() and block.conv2.weight[7].all() and block.bn1.bias[7] == 0.5


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


def test_a_function_of_zero_may_be_no_zero():
    """The channel of zeros still adds sigmoid(0) to what follows."""
    torch.manual_seed(0)
    model = graph.prepare(nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Sigmoid(), nn.Flatten(), nn.Linear(64, 5)).eval())
    model[0].weight.data[1], model[0].bias.data[1] = 0, 0
    assert dead_weight.remove(model, points(model))["weights"] == 0
