"""The graph is the forward pass's."""
import copy

import pytest
import torch
from torch import nn

from compressed import exact_network as exact
from compressed import graph, grids
from compressed.errors import BadInput
from compressed.graph import Branch, Point, prepare, read_graph
from compressed.kaist import Micronet
from mobilenet_v2 import MobileNetV2, SmallMobileNetV2
from tools.layers import layer_table


def test_the_points_of_a_block_of_each_kind():
    found = {point.name: point for point in read_graph(MobileNetV2(width=0.5)).points}
    assert list(found)[:4] == ["image", "relu1", "layers.0.relu1", "layers.0.relu2"]
    assert list(found)[-3:] == ["relu2", "features", "logits"]
    assert found["image"] == Point("image", (Branch("pixels", "pixels", "pixels"),), "none", True)
    assert found["relu1"] == Point("relu1", (Branch("layer", "conv1", "image", "bn1"),), "relu", False)
    last = Branch("layer", "layers.1.conv3", "layers.1.relu2", "layers.1.bn3")
    assert found["layers.1.out"] == Point("layers.1.out", (
        last, Branch("layer", "layers.1.shortcut.0", "layers.0.out", "layers.1.shortcut.1")), "none", True)
    assert found["layers.2.out"].branches[1] == Branch("unchanged", "layers.2.shortcut", "layers.1.out")  # a residual
    assert [branch.name for branch in found["layers.3.out"].branches] == ["layers.3.conv3"]  # a stride
    assert found["features"] == Point("features", (Branch("mean", "mean", "relu2", terms=16),), "none", False)
    assert found["logits"] == Point("logits", (Branch("layer", "linear", "features"),), "none", True)


def test_quantized_modules_have_the_same_graph():
    model = MobileNetV2(width=0.5).eval()
    plain = read_graph(model).points
    grids.quantize_weights(model, grids.bit_table("8", model), "layer")
    exact.quantize_activations(model, [{"name": name, "bits": 8, "signed": signed, "step": 0.5}
                                          for name, signed in graph.read_graph(model).activation_points.items()])
    found = read_graph(model).points
    assert [(p.name, p.branches, p.signed) for p in found] == [(p.name, p.branches, p.signed) for p in plain]


def test_the_points_of_the_small_network():
    """A hard swish reads codes and gives codes: there is a point before it and one behind it."""
    model = SmallMobileNetV2().eval()
    with pytest.raises(BadInput, match="bn1.*graph.prepare"):
        read_graph(model)
    network, x = prepare(model), torch.randn(2, 3, 32, 32)
    assert torch.equal(network(x), model(x)) and list(network.state_dict()) == list(model.state_dict())
    assert type(network).__name__ == "SmallMobileNetV2" and prepare(network) is network
    found = {point.name: point for point in read_graph(network).points}
    assert list(found)[:4] == ["image", "points.bn1", "points.relu1", "points.layers_0_bn1"]
    assert found["points.bn1"] == Point("points.bn1", (Branch("layer", "conv1", "image", "bn1"),), "none", True)
    assert found["points.relu1"] == Point("points.relu1", (
        Branch("function", "relu1", "points.bn1", function="hardswish"),), "none", True)
    assert len(found) == 1 + 2 * (1 + 2 * 16) + 16 + 2  # image; two for each hard swish; blocks; features, logits


class Flipping(nn.Module):
    """A block that does in inference what its graph does not show, and changes its weights in eval mode."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def train(self, mode=True):
        for parameter in self.parameters():
            parameter.data *= 2
        return super().train(mode)

    def forward(self, x):
        return self.block(x + x.flip(3) if torch.is_inference_mode_enabled() else x)


class Frozen(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(False)


def test_a_prepared_network_runs_nothing_but_its_graph():
    """None of the user's classes is left in it, also within a network of ours; a layer may have a train() of its own.
    """
    model = MobileNetV2(width=0.25)
    model.layers[3], model.bn1 = Flipping(model.layers[3]), Frozen(model.bn1.num_features)
    x, model = torch.randn(2, 3, 32, 32), model.eval()
    network, weights = prepare(model), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        wanted = network(x)
        assert torch.equal(model(x), wanted)
    with torch.inference_mode():
        assert torch.equal(network(x), wanted) and not torch.equal(model(x), wanted)
    network.eval()
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
    assert type(network.bn1) is nn.BatchNorm2d and type(network.layers[3]) is nn.Module


def test_a_network_keeps_its_graph_until_it_is_changed():
    model = MobileNetV2(width=0.25)
    found = read_graph(model)
    assert read_graph(model) is found and read_graph(copy.deepcopy(model)).points == found.points
    model.load_state_dict(model.state_dict())
    assert read_graph(model) is found and graph.KEPT not in model.state_dict()
    model.layers[1].residual = False
    assert len(read_graph(model).points[7].branches) < len(found.points[7].branches)


def test_modules_whose_output_one_module_reads():
    model = MobileNetV2(width=0.25)
    readers = graph.sole_readers(model)
    assert readers["bn1"] == "relu1" and readers["layers.0.bn1"] == "layers.0.relu1" and "layers.0.bn3" not in readers
    assert readers["layers.0.relu1"] == "layers.0.conv2" and "layers.1.out" not in readers


def test_a_value_that_two_read_has_no_sole_reader():
    class Shared(Odd):
        def forward(self, x):
            y = self.bn1(self.conv1(x))
            return self.between(y) + y

    assert "bn1" not in graph.sole_readers(Shared(nn.ReLU()))


def test_a_method_is_no_module_of_its_name():
    class Named(Odd):
        def forward(self, x):
            y = self.bn1(self.conv1(x)).relu()
            return self.relu(y + y[:, :, ::1])

    model = Named(nn.ReLU())
    model.relu = nn.ReLU()
    assert graph.sole_readers(model) == {"conv1": "bn1"}


@pytest.mark.parametrize("norm", (nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)))
@torch.no_grad()
def test_what_can_be_scaled(norm):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), norm, nn.Conv2d(4, 2, 1)).train(), torch.randn(2, 3, 8, 8)
    before = model(x)
    assert [weight is model[0].weight for weight in graph.scale_free_weights(model)] == [True]
    model[0].weight.mul_(3)
    assert torch.allclose(model(x), before, atol=1e-3)


class Dropping(nn.Module):
    """A block is left out in training."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.conv2 = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, 1, 1)
        self.bn2, self.linear = nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        x = x if self.training else x + self.bn2(self.conv2(x))
        return self.linear(x.mean((2, 3)))


def test_what_is_left_out_in_training_has_readers_too():
    """What follows from the graph is decided without chance; what is merged into one function must hold in training."""
    model = Dropping()
    assert model.training and graph.sole_readers(model) == {"conv1": "bn1", "conv2": "bn2"}
    assert graph.sole_readers(model, training=True) == {"conv1": "bn1"}
    assert graph.scale_free_weights(model) == [model.conv1.weight, model.conv2.weight] and model.training


def test_a_module_with_a_hook_has_no_sole_reader():
    model = Dropping()
    model.bn2.register_forward_hook(lambda module, inputs, out: out - 1)
    assert graph.sole_readers(model) == {"conv1": "bn1"}


def test_a_module_alone_has_its_name():
    """Whatever operation before it would be called the same."""
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.add, self.mean_1 = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.ReLU()

        def forward(self, x):
            x = self.add(self.conv1(x) + self.conv2(x)).mean((2, 3), keepdim=True)
            return (self.mean_1(x.mean((2, 3), keepdim=True)) + x).mean((2, 3))

    found = {op.name: op.kind for op in graph.trace(Sum())}
    assert list(found) == ["x", "conv1", "conv2", "add_1", "add", "mean", "mean_2", "mean_1", "add_2", "mean_3"]
    assert found["add"] == found["mean_1"] == "relu"


class Late(nn.Module):
    """Its layers are registered in another order than they run."""

    def __init__(self):
        super().__init__()
        self.fc, self.stem = nn.Linear(4, 5), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.fc(self.stem(x).mean((2, 3)))


def test_the_first_layer_is_that_which_runs_first():
    assert graph.layers_as_run(Late())[0] == "stem"
    assert graph.layers_as_run(MobileNetV2(width=0.5))[::57] == ["conv1", "linear"]

    class Odd(Late):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)
    assert graph.layers_as_run(Odd())[0] == "fc"  # it cannot be followed


class Odd(nn.Module):
    """Two convolutions and what may go wrong between them."""

    def __init__(self, between):
        super().__init__()
        self.image, self.conv1 = nn.Identity(), nn.Conv2d(3, 4, 1)
        self.bn1, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.between = between

    def forward(self, x):
        return self.conv2(self.between(self, self.conv1(self.image(x))))


def test_the_table_of_layers_shows_those_that_never_run():
    table = layer_table(Micronet()).splitlines()
    unused = [line.split()[1] for line in table if " unused " in line]
    assert unused == [f"layers.{i}.fc{k}" for i in (2, 7, 12) for k in (1, 2)] and len(table) == 1 + len(
        graph.weight_layers(Micronet()))


def test_a_value_without_a_point_is_named():
    with pytest.raises(BadInput, match="conv1 gives a value that has to be rounded"):
        read_graph(Odd(lambda self, x: x))
