"""Networks that were not made for this repository go through the whole chain, to the same logits to the last bit."""
import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import check_model_operations
import testers
import user_networks
from compressed import cifar100, checkpoints, claims, counting, dead_weight, grids, mnet, networks
from compressed.errors import BadInput
from compressed.evaluation import logits
from compressed.exact_network import FUNCTIONS, Quantizer, exact_network, quantize_activations, table
from compressed.files import save_record, save_tensors, sha256
from compressed.formats import Activation
from compressed.graph import UNSIGNED, prepare, read, weight_layers
from compressed.mnet import stated_formats
from mobilenet_v2 import MobileNetV2, SmallMobileNetV2, Table
from tools.integer import IntegerNetwork
from training import teachers

FILE = Path(user_networks.__file__)
SPECS = {f"{FILE}:{spec}": classes for spec, classes in {
    "ResNet?option='A'": 10, "ResNet?option='B'&width=4": 7, "Mobile": 10, "Mobile?six=True": 10, "Excited": 10,
    "VGG": 10, "Dense": 10, "Shuffled": 10}.items()}


@torch.no_grad()
def shipped(spec: str, classes: int) -> tuple[nn.Module, nn.Module, dict]:
    """(the plain network, the same as it is shipped: sparse, 4-bit weights; its claim)"""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = networks.make(spec, classes)
        for module in plain.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
                module.weight.uniform_(0.5, 1.5).mul_(torch.rand(len(module.weight)).sub_(0.1).sign())
                module.bias.normal_(0, 0.3)
        plain.train()(cifar100.normalise(cifar100.made_up(32, 1).images))
        for _, layer in weight_layers(plain):
            layer.weight.mul_(torch.rand(layer.weight.shape) < 0.5)
    model = prepare(plain.eval())
    network = copy.deepcopy(model)
    grids.quantize_weights(model, grids.bit_table("4", model), "channel")
    grids.shorten_scales(model)
    activations = grids.calibrate(model, cifar100.made_up(20, 0).images, 8, "mse")
    quantize_activations(model, activations)
    network, tensors = grids.shipped(model, network)
    grids.round_shifts(network, tensors, activations)
    before = logits(exact_network(network, activations), cifar100.made_up(4, 2).images)
    dead_weight.remove(network, activations)
    assert torch.equal(logits(exact_network(network, activations), cifar100.made_up(4, 2).images), before)
    claim = {"tensors": tensors, "activations": activations, "network": claims.network(spec, network)}
    return plain, network, claim


@pytest.mark.parametrize("spec, classes", SPECS.items(), ids=[spec.split(":")[1] for spec in SPECS])
def test_a_network_of_somebody_else(spec, classes, tmp_path):
    plain, network, claim = shipped(spec, classes)
    images = cifar100.made_up(16, 3).images
    x = cifar100.normalise(images[:2])
    assert list(network.state_dict()) == list(plain.state_dict()) and torch.equal(prepare(plain)(x), plain(x))

    wanted = logits(exact_network(network, claim["activations"]), images)
    assert wanted.std() > 0.01 and len(wanted.unique()) > 20
    integer = IntegerNetwork(network, claim)
    found = integer(images)
    assert not found.is_floating_point()
    assert torch.equal((found.double() * 2.0**integer.logit_exponent).float(), wanted)

    formats = stated_formats(network, claim)
    costs = counting.summary(network, formats)["operations"]
    assert costs["tree"]["bits"] < costs["32-bit"]["bits"] and costs["fixed"]["bits"] < costs["32-bit"]["bits"]
    with FlopCounterMode(display=False) as counter:
        plain(x[:1])
    assert counter.get_total_flops() == 2 * counting.macs(read(network).operations)

    path = tmp_path / "packed.mnet"
    mnet.pack(network, claim, path)
    assert not mnet.differences(network, claim, *mnet.unpack(path, spec))
    with pytest.raises(BadInput, match="to run that code, say --network"):
        mnet.unpack(path)
    with pytest.raises(BadInput, match="and not of mobilenet_v2:SmallMobileNetV2"):
        mnet.unpack(path, "mobilenet_v2:SmallMobileNetV2")


def test_a_claim_says_which_network_it_is_of(tmp_path):
    spec, path = f"{FILE}:Excited", tmp_path / "network.pt"
    _, network, claim = shipped(spec, 10)
    save_tensors(network.state_dict(), path)
    save_record(claim | {"sha256": sha256(path)}, path.with_suffix(".json"))
    read_back = checkpoints.read(path, spec)
    assert not read_back.problems and read(read_back.model).points == read(network).points
    with pytest.raises(BadInput, match="network.json: it is of the network .*Excited: to run that code, say --network"):
        checkpoints.read(path)
    with pytest.raises(BadInput, match="network.json: it is of the network .*Excited, and not of .*Mobile"):
        checkpoints.read(path, f"{FILE}:Mobile")
    wrong = claim["network"] | {"graph": "0" * 64}
    save_record(claim | {"sha256": sha256(path), "network": wrong}, path.with_suffix(".json"))
    (problem,) = checkpoints.read(path, spec).problems
    assert "another network than" in problem and "graph 0000" in problem

    steps = {entry["name"]: entry["step"] for entry in claim["activations"]}
    formats = stated_formats(network, claim)
    assert 2**8 < testers.sums_without_layers(network, formats, steps) < 2**24
    product = next(branch for point in read(network).points for branch in point.branches if branch.kind == "product")
    steps[product.other] *= 2.0**-30  # finer than what is added to it by more than a float32 holds
    assert testers.sums_without_layers(network, formats, steps) > 2**24


@pytest.mark.parametrize("spec, classes", SPECS.items(), ids=[spec.split(":")[1] for spec in SPECS])
def test_onnxruntime_computes_the_same(spec, classes):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from tools import export_onnx
    _, network, claim = shipped(spec, classes)
    images = cifar100.made_up(16, 3).images
    graph = export_onnx.Codes(network, claim)
    engine = export_onnx.session(graph.finished({}).SerializeToString(), threads=1)
    found = torch.from_numpy(engine.run(None, {"image": images.numpy()})[0])
    assert torch.equal(found, logits(exact_network(network, claim["activations"]), images)) and graph.rounded == 0


def test_the_family_of_the_small_network(monkeypatch):
    """Its parts in a few blocks: hard swish behind every BatchNorm, another table, another width, ten classes."""
    few = Table(stages=((3, 8, 2, 1), (3, 12, 1, 2), (2, 12, 1, 2)), stem=8, head=None, activation=nn.Hardswish,
                multiple=4)
    monkeypatch.setattr(SmallMobileNetV2, "__init__", lambda self, num_classes=100, width=1.0: MobileNetV2.__init__(
        self, num_classes, width, few))
    _, network, claim = shipped("mobilenet_v2:SmallMobileNetV2?width=0.5", 10)
    images = cifar100.made_up(16, 3).images
    integer = IntegerNetwork(network, claim)
    wanted = logits(exact_network(network, claim["activations"]), images)
    assert wanted.shape == (16, 10)
    assert torch.equal((integer(images).double() * 2.0**integer.logit_exponent).float(), wanted)
    points = read(network).activation_points
    assert all(f"points.layers_0_{name}" in points for name in ("bn1", "relu1", "bn2", "relu2"))


# ---- Pointwise functions -------------------------------------------------------------------------

@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_is_a_table_of_codes(function):
    """Every code through the exact network's float64 and through the table, for steps far apart."""
    for step, target_step in ((2.0**-5, 2.0**-6), (2.0, 2.0**-3), (2.0**-9, 2.0**-8)):
        source, target = Activation(8), Activation(8, signed=function not in UNSIGNED)
        entries = table(function, source, step, target, target_step)
        assert len(entries) == 256 and target.low <= entries.min() and entries.max() <= target.high
        x = torch.arange(-128, 128).float() * step
        found = Quantizer(8, target.signed, target_step)(FUNCTIONS[function](x.double()))
        assert torch.equal(found, entries * target_step)
        theirs = getattr(torch.nn.functional, function)(x.double())
        assert (entries * target_step - theirs).abs()[(entries < target.high)].max() <= target_step * (0.5 + 1e-9)


# ---- What is not known is refused by its name ----------------------------------------------------

class Lone(nn.Module):
    """Its parts are taken from keyword arguments, and its forward pass is `run`."""

    def __init__(self, run, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.run, self.linear = run, nn.Linear(4, 10)

    def forward(self, x):
        return self.linear(self.run(self, x).mean((2, 3)))


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def conv(**options):
    return nn.Conv2d(3, 4, 3, **options)


@pytest.mark.parametrize("network, said", (
    (Lone(lambda s, x: s.c(x), c=conv(padding="same")), "c: padding 'same'"),
    (Lone(lambda s, x: s.c(x), c=conv(padding=1, padding_mode="reflect")), "c: padding .* in mode 'reflect'"),
    (Lone(lambda s, x: s.c(x), c=conv()), "averages 900 values: expected a power of two"),
    (Lone(lambda s, x: s.d(s.d(s.c(x))), c=conv(padding=1), d=nn.Conv2d(4, 4, 1)), "d is used 2 times"),
    (Lone(lambda s, x: s.c(x), c=nn.ConvTranspose2d(3, 4, 2, 2)), "c .ConvTranspose2d"),
    (Lone(lambda s, x: s.c(x), c=Standardised(3, 4, 1)), "c: Standardised has a forward pass of its own"),
    (Lone(lambda s, x: torch.dropout(s.c(x), 0.5, False), c=conv(padding=1)), "dropout"),
    (Lone(lambda s, x: nn.functional.dropout(s.c(x), 0.5), c=conv(padding=1)), "switched on in eval mode"),
    (Lone(lambda s, x: nn.functional.max_pool2d(s.c(x), 3, 2, ceil_mode=True), c=conv(padding=1)), "ceil_mode"),
    (Lone(lambda s, x: s.c(x) if x.sum() > 0 else x, c=conv(padding=1)), "cannot be followed"),
    (Lone(lambda s, x: s.c(x).transpose(0, 1), c=conv(padding=1)), "does not take an image|between images"),
    (Lone(lambda s, x: s.b(s.c(x)), c=conv(padding=1), b=nn.BatchNorm2d(4, affine=False)), "b: a BatchNorm without"),
    (Lone(lambda s, x: s.c(x) - s.c.weight.sum(), c=conv(padding=1)), "no counting rule for operation"),
), ids=range(13))
def test_what_is_not_known_is_named(network, said):
    with pytest.raises(BadInput, match=said):
        prepare(network)


@pytest.mark.parametrize("name", ("mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"))
def test_torchvisions_networks_are_followed_or_refused_in_one_line(name):
    import torchvision
    plain = getattr(torchvision.models, name)(num_classes=10).eval()
    try:
        network = prepare(plain)
    except BadInput as error:
        assert name == "shufflenet_v2_x0_5" and "chunk" in str(error) and "\n" not in str(error)
        return
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(network(x), plain(x)) and list(network.state_dict()) == list(plain.state_dict())
    with FlopCounterMode(display=False) as counter:
        plain(x)
    assert counter.get_total_flops() == 2 * counting.macs(read(network).operations)


# ---- A board entry that somebody else counted ----------------------------------------------------

def test_kaists_published_score(capsys):
    try:
        file = teachers.find() / "micronet_v2_pr_60.t7" if teachers.os.environ.get("TEACHERS_DIR") else None
    except BadInput:
        file = None
    if file is None:
        pytest.skip("TEACHERS_DIR does not name KAIST AI's files")
    assert check_model_operations.main(["--summary", "--checkpoint", str(file)]) == 0
    out = capsys.readouterr().out
    assert "score 0.00562; they publish 0.00562" in out and "twice as many, as it should be" in out
