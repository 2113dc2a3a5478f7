"""Networks that were not made for this repository go through the whole chain, to the same logits to the last bit."""
import copy
import functools
import hashlib
import shutil
import struct
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import check_model_operations
import quantize
import testers
import user_networks
from compressed import cifar100, checkpoints, claims, counting, dead_weight, formats, graph, grids, mnet, networks
from compressed import exactness, normalisation, operations, step_search
from compressed.claims import stated_formats
from compressed.errors import BadInput
from compressed.evaluation import logits
from compressed.exact_network import FORMULAS, Quantizer, exact_network, quantize_activations, table
from compressed.files import save_record, save_tensors, sha256
from compressed.formats import Activation, Formats
from compressed.graph import UNSIGNED, prepare, read_graph, weight_layers
from compressed.operations import FUNCTIONS, Operation, RoundsWeightsAlone
from mobilenet_v2 import MobileNetV2, SmallMobileNetV2, Table
from small import integer_logits
from tools import integer, pack
from training import trial

FILE = Path(user_networks.__file__)
SPECS = {f"{FILE}:{spec}": classes for spec, classes in {
    "ResNet?option='A'": 10, "ResNet?option='B'&width=4": 7, "Mobile": 10, "Mobile?six=True": 10, "Excited": 10,
    "VGG": 10, "Dense": 10, "Shuffled": 10, "Viewed": 10, "Flat": 10}.items()}


@functools.cache
@torch.no_grad()
def shipped(spec: str, classes: int, activation_bits: str = "8") -> tuple[nn.Module, nn.Module, dict]:
    """Return (a plain network, the same as it is shipped: sparse, 4-bit weights; its claim), not to be changed."""
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
    widths = grids.activation_table(activation_bits, model)
    activations = grids.calibrate(model, cifar100.made_up(20, 0).images, widths, "mse")
    quantize_activations(model, activations)
    network, tensors = grids.shipped(model, network)
    grids.round_shifts(network, tensors, activations)
    before = logits(exact_network(network, activations), cifar100.made_up(4, 2).images)
    dead_weight.remove(network, activations)
    assert torch.equal(logits(exact_network(network, activations), cifar100.made_up(4, 2).images), before)
    # the folded and rounded network is the quantized one, but for values that lie close to a half of a step
    rounded = logits(model.eval(), cifar100.made_up(4, 2).images)
    assert (before - rounded).std() < 0.2 * rounded.std()
    claim = {"tensors": tensors, "activations": activations, "network": claims.network(spec, network)}
    return plain, network, claim


def signs(model: nn.Module) -> dict[str, bool]:
    """{activation point: True if any of its values is below zero for some images}"""
    found = {}
    for name in read_graph(model).activation_points:
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, out, name=name: found.__setitem__(name, bool((out < 0).any())))
    model(cifar100.normalise(cifar100.made_up(8, 5).images))
    return found


@pytest.mark.parametrize("spec, classes", SPECS.items(), ids=[spec.split(":")[1] for spec in SPECS])
def test_a_network_of_somebody_else(spec, classes, tmp_path):
    plain, network, claim = shipped(spec, classes)
    images = cifar100.made_up(16, 3).images
    x = cifar100.normalise(images[:2])
    assert list(network.state_dict()) == list(plain.state_dict()) and torch.equal(prepare(plain)(x), plain(x))
    negative = signs(copy.deepcopy(prepare(plain)))
    for point in read_graph(network).points[:-1]:  # a mean of values of both signs may be above zero in all images
        assert point.signed == negative[point.name] or point.signed and point.branches[0].kind == "mean"

    wanted = logits(exact_network(network, claim["activations"]), images)
    assert wanted.std() > 0.01 and len(wanted.unique()) > 20
    assert torch.equal(integer_logits(network, claim, images), wanted)

    costs = counting.summary(network, stated_formats(network, claim))["operations"]
    assert costs["tree"]["bits"] < costs["32-bit"]["bits"] and costs["fixed"]["bits"] < costs["32-bit"]["bits"]
    with FlopCounterMode(display=False) as counter:
        plain(x[:1])
    assert counter.get_total_flops() == 2 * counting.macs(read_graph(network).operations)

    path = tmp_path / "packed.mnet"
    mnet.pack(network, claim, path)
    assert not mnet.differences(network, claim, *mnet.unpack(path, spec))
    with pytest.raises(BadInput, match="to run that code, say --network"):
        mnet.unpack(path)
    with pytest.raises(BadInput, match="and not of mobilenet_v2:SmallMobileNetV2"):
        mnet.unpack(path, "mobilenet_v2:SmallMobileNetV2")
    content = path.read_bytes()[:-32]
    for part, said in ((struct.pack("<ff", 128, 64), "mean 0.0 and not 128"),
                       (bytes.fromhex(read_graph(network).digest), "graph 0000"), (b":", "cannot be printed")):
        changed = content.replace(part, bytes(len(part)), 1)
        with pytest.raises(BadInput, match=said):
            mnet.unpack_bytes(changed + hashlib.sha256(changed).digest(), spec)


def test_a_claim_says_which_network_it_is_of(tmp_path):
    spec, path = f"{FILE}:Excited", tmp_path / "network.pt"
    _, network, claim = shipped(spec, 10)
    save_tensors(network.state_dict(), path)
    save_record(claim | {"sha256": sha256(path)}, path.with_suffix(".json"))
    read_back = checkpoints.read(path, spec)
    assert not read_back.problems and read_graph(read_back.model).points == read_graph(network).points
    with pytest.raises(BadInput, match="network.json: it is of the network .*Excited: to run that code, say --network"):
        checkpoints.read(path)
    with pytest.raises(BadInput, match="network.json: it is of the network .*Excited, and not of .*Mobile"):
        checkpoints.read(path, f"{FILE}:Mobile")
    (tmp_path / "moved").mkdir()
    there = f"{shutil.copy(FILE, tmp_path / 'moved')}:Excited"  # the same file in another folder
    read_back = checkpoints.read(path, there)
    assert not read_back.problems and read_back.claim["network"]["spec"] == there
    mnet.pack(network, read_back.claim, tmp_path / "alone.mnet")
    with pytest.raises(BadInput, match="alone.mnet: it is of the network .*Excited: to run that code, say --network"):
        checkpoints.read(tmp_path / "alone.mnet")
    assert checkpoints.read(tmp_path / "alone.mnet", spec).claim["network"] == claim["network"]
    wrong = claim["network"] | {"graph": "0" * 64}
    save_record(claim | {"sha256": sha256(path), "network": wrong}, path.with_suffix(".json"))
    (problem,) = checkpoints.read(path, spec).problems
    assert "another network than" in problem and "graph 0000" in problem
    for wrong in (None, "x", [], {}, claim["network"] | {"spec": None}, claim["network"] | {"classes": "7"}):
        save_record(claim | {"sha256": sha256(path), "network": wrong}, path.with_suffix(".json"))
        with pytest.raises(BadInput, match='network.json: "network" holds no specification and number of classes'):
            checkpoints.read(path, spec)

    steps = {entry["name"]: entry["step"] for entry in claim["activations"]}
    formats = stated_formats(network, claim)
    assert 2**8 < exactness.float32_bound(network, formats, steps) < 2**24
    branches = (branch for point in read_graph(network).points for branch in point.branches)
    product = next(branch for branch in branches if branch.kind == "product")
    steps[product.other] *= 2.0**-30  # finer than what is added to it by more than a float32 holds
    assert exactness.float32_bound(network, formats, steps) > 2**24


@pytest.mark.parametrize("spec, classes", SPECS.items(), ids=[spec.split(":")[1] for spec in SPECS])
def test_onnxruntime_computes_the_same(spec, classes):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from tools import export_onnx
    _, network, claim = shipped(spec, classes)
    images = cifar100.made_up(16, 3).images
    graph = export_onnx.Exporter(network, claim)
    engine = export_onnx.session(graph.finished({}).SerializeToString(), threads=1)
    wanted = logits(exact_network(network, claim["activations"]), images)
    assert torch.equal(export_onnx.run(engine, images), wanted) and graph.rounded == 0


def test_a_network_of_somebody_else_is_fine_tuned_and_shipped(capsys):
    """By the command lines of every script, with fine-tuning; each of them has the same logits."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from tools import export_onnx
    spec = f"{FILE}:Wrapped"
    plain, *_ = shipped(spec, cifar100.CLASSES)
    networks.save_state(plain.state_dict(), "masked.pt")
    network, data = ["--network", spec], ["--made-up", "40"]
    command = ["--checkpoint", "masked.pt", "--out", "q.pt", "--table", "4", "--calibration", "20", "--renew", "20",
               "--ranges", "mse", "--epochs", "1", "--batch-size", "10", "--lr", "0.05", "--augment", "none",
               "--mixing", "none", "--no-cuda", *network, *data]
    assert quantize.main(command) == 0
    made = sha256("q.pt")
    assert quantize.main(command) == 0 and sha256("q.pt") == made  # from the network that was fine-tuned
    before, after = plain.state_dict(), networks.load_checkpoint("q.pt", spec)
    claim = claims.read("q.json")
    assert "fine-tuned for 1 epochs" in [step["step"] for step in claim["accuracy_by_step"]]
    for name, layer in weight_layers(after):
        assert not layer.weight[before[f"{name}.weight"] == 0].any()
    at = ["--checkpoint", "q.pt", *network]
    assert pack.main(at) == testers.main([*at, *data]) == check_model_operations.main(at) == 0
    assert testers.main(["--checkpoint", "q.mnet", *network, *data]) == 0
    capsys.readouterr()
    for script, options in ((integer, []), (export_onnx, ["--verify"])):
        assert script.main([*at, *data, *options]) == 0
        assert "same logits to the last bit: 100/100" in capsys.readouterr().out


def test_the_family_of_the_small_network(monkeypatch):
    """Its parts in a few blocks: hard swish behind every BatchNorm, another table, another width, ten classes."""
    few = Table(stages=((3, 8, 2, 1), (3, 12, 1, 2), (2, 12, 1, 2)), stem=8, head=None, activation=nn.Hardswish,
                multiple=4)
    monkeypatch.setattr(SmallMobileNetV2, "__init__", lambda self, num_classes=100, width=1.0: MobileNetV2.__init__(
        self, num_classes, width, few))
    _, network, claim = shipped("mobilenet_v2:SmallMobileNetV2?width=0.5", 10)
    images = cifar100.made_up(16, 3).images
    wanted = logits(exact_network(network, claim["activations"]), images)
    assert wanted.shape == (16, 10) and torch.equal(integer_logits(network, claim, images), wanted)
    points = read_graph(network).activation_points
    assert all(f"points.layers_0_{name}" in points for name in ("bn1", "relu1", "bn2", "relu2"))


# ---- Pointwise functions -------------------------------------------------------------------------

def test_every_function_has_a_formula_and_a_rule():
    assert set(FORMULAS) == set(FUNCTIONS) and set(UNSIGNED) <= set(FUNCTIONS)
    for function in FUNCTIONS:
        operation = Operation("f", "f", function, ("x",), 0, (1, 2, 2))
        for convention in counting.CONVENTIONS:
            assert counting.rule(operation, [Activation(8)], Formats({}, {}), convention)[0]


@pytest.mark.parametrize("function", FORMULAS)
def test_a_function_is_a_table_of_codes(function):
    """Every code through the exact network's float64 and through the table, for steps far apart."""
    for step, target_step in ((2.0**-5, 2.0**-6), (2.0, 2.0**-3), (2.0**-9, 2.0**-8)):
        source, target = Activation(8), Activation(8, signed=function not in UNSIGNED)
        entries = table(function, source, step, target, target_step)
        assert len(entries) == 256 and target.low <= entries.min() and entries.max() <= target.high
        x = torch.arange(-128, 128).float() * step
        found = Quantizer(8, target.signed, target_step)(FORMULAS[function](x.double()))
        assert torch.equal(found, entries * target_step)
        theirs = getattr(torch.nn.functional, function)(x.double())
        assert (entries * target_step - theirs).abs()[(entries < target.high)].max() <= target_step * (0.5 + 1e-9)


@pytest.mark.parametrize("function", ("sigmoid", "silu", "gelu"))
def test_no_table_depends_on_the_last_bits_of_a_function(function):
    """Another machine's exp or erf, with errors of some units in the last place, gives the same codes."""
    exactly = getattr(torch.nn.functional, function)
    for step in (2.0**exponent for exponent in range(-12, 4)):
        values = exactly(torch.arange(-128, 128).double() * step)
        error = 2.0**-48 * values.abs().clamp(min=1)
        for target in (2.0**exponent for exponent in range(-14, 2)):
            entries = table(function, Activation(8), step, Activation(8), target)
            for moved in (values - error, values + error):
                assert torch.equal(formats.codes(moved.float(), target, -128, 127).int(), entries)


# ---- What is not known is refused by its name ----------------------------------------------------

class Lone(nn.Module):
    """Its parts are taken from keyword arguments, and its forward pass is `run`."""

    def __init__(self, run, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run, self.linear = run, nn.Linear(4, 10)

    def forward(self, x):
        return self.linear(self.run(self, x).mean((2, 3)))


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Stepped(nn.Conv2d):
    """A quantizing layer of somebody else: `step` is the usual name."""
    step = 0.5

    def forward(self, x):
        return super().forward(x * x)


class Doubled(nn.Conv2d):
    def _call_impl(self, *args, **kwargs):
        return super()._call_impl(*args, **kwargs) * 2


class Getting(nn.Conv2d):
    def __getattr__(self, name):
        return super().__getattr__(name) * 2 if name == "weight" else super().__getattr__(name)


class Got(nn.Conv2d):
    def __getattribute__(self, name):
        return super().__getattribute__(name)


def bound(layer):
    """A layer with a convolution of its own that is not its class's."""
    layer._conv_forward = lambda x, weight, bias: nn.Conv2d._conv_forward(layer, x, weight, bias) * 2
    return layer


class LookedUp(nn.Conv2d):
    """What is registered as its weight is not the weight with which it computes."""

    @property
    def weight(self):
        if "weight" not in self._parameters:
            raise AttributeError
        return self._parameters["weight"] * 2


class Exempted(RoundsWeightsAlone, nn.Conv2d):
    """It inherits what our own quantized layers inherit."""

    def forward(self, x):
        return super().forward(x * 2)


class Signed(nn.Module):
    signed = True

    def forward(self, x):
        return x.softmax(1)


def replaced(layer):
    layer.forward = torch.sigmoid
    return layer


def hooked(layer):
    layer.register_forward_hook(lambda module, inputs, out: out.sigmoid() * 3)
    return layer


class Twice(nn.ReLU):
    def forward(self, x):
        return 2 * super().forward(x)


def conv(**options):
    return nn.Conv2d(3, 4, 3, **options)


def shared(part: str, make=lambda: nn.Conv2d(4, 4, 1)) -> dict[str, nn.Module]:
    """Two layers with one weight, or another part."""
    layers = {"a": make(), "b": make()}
    setattr(layers["b"], part, getattr(layers["a"], part))
    return layers


def in_place(change, view=lambda s, x: x):
    """What a change in place gives, plus a view of the changed tensor that was taken before."""
    def run(s, x):
        x = s.c(x)
        before = view(s, x)
        return change(x) + before
    return Lone(run, c=conv(padding=1), i=nn.Identity(), d=nn.Dropout(inplace=True))


def clipped(x):
    return nn.functional.relu(x, inplace=True)


def doubled(x):
    x += x
    return x


def squared(x):
    x *= x
    return x


class Auxiliary(Lone):
    """A second head reads the logits, and its result is dropped."""

    def forward(self, x):
        logits = super().forward(x)
        self.aux(logits)
        return logits


class Called(Lone):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Several(Lone):
    def forward(self, x, *more):
        return super().forward(x + more[0])


class Returning(Lone):
    def forward(self, x):
        return super().forward(x), 1


def computed(layer):
    """As torch.nn.utils.weight_norm leaves a layer: its weight is no parameter."""
    weight = nn.Parameter(layer.weight.detach())
    del layer.weight
    layer.weight = weight * 2
    layer.weight_v = weight
    return layer


REFUSED = (
    (Lone(lambda s, x: s.c(x), c=computed(conv(padding=1))), "Lone cannot be copied"),
    (Lone(lambda s, x: s.c(x).relu6(), c=conv(padding=1)), "cannot be followed|does not take an image"),
    (Lone(lambda s, x: s.c(x).flatten(1).flatten(3), c=conv(padding=1)), "does not take an image"),
    (Lone(lambda s, x: s.c(x), c=nn.Conv2d(3, 4, (3, 2), padding="same")), "c: padding 'same'"),
    (Lone(lambda s, x: s.c(x), c=conv(padding=1, padding_mode="reflect")), "c: padding .* in mode 'reflect'"),
    (Lone(lambda s, x: s.p(s.c(x)), c=conv(padding=1), p=nn.AvgPool2d(2, divisor_override=3)), "p: a mean is over"),
    (Lone(lambda s, x: s.p(s.c(x)), c=conv(padding=1), p=nn.AvgPool2d(2, padding=1)), "p: a mean is over both"),
    (Lone(lambda s, x: s.d(s.d(s.c(x))), c=conv(padding=1), d=nn.Conv2d(4, 4, 1)), "d: it is used several times"),
    (Lone(lambda s, x: s.c(x), c=nn.ConvTranspose2d(3, 4, 2, 2)), "c: no counting rule for ConvTranspose2d"),
    (Lone(lambda s, x: s.c(x), c=Standardised(3, 4, 1)), "c: Standardised has a forward pass of its own"),
    (Lone(lambda s, x: s.c(x), c=Stepped(3, 4, 1)), "c: Stepped has a forward pass of its own"),
    (Lone(lambda s, x: s.c(x), c=Doubled(3, 4, 1)), "c: Doubled has a forward pass of its own"),
    (Lone(lambda s, x: s.c(x), c=Getting(3, 4, 1)), "c: Getting has a forward pass of its own"),
    (Lone(lambda s, x: s.c(x), c=Got(3, 4, 1)), "c: Got has a forward pass of its own"),
    (Lone(lambda s, x: s.c(x), c=bound(conv())), "c: Conv2d has a forward pass of its own"),
    (Lone(lambda s, x: s.c(x), c=LookedUp(3, 4, 1)), "c: its weight is computed"),
    (Lone(lambda s, x: s.c(x), c=Exempted(3, 4, 1)), "c: Exempted has a forward pass of its own"),
    (Lone(lambda s, x: s.a(s.c(x)), c=conv(padding=1), a=Signed()), "softmax .* no counting rule"),
    (Lone(lambda s, x: s.c(x), c=hooked(conv(padding=1))), "c: it has a forward hook"),
    (hooked(Lone(lambda s, x: s.c(x), c=conv(padding=1))), "Lone has a forward hook"),
    (Lone(lambda s, x: torch.dropout(s.c(x), 0.5, False), c=conv(padding=1)), "dropout"),
    (Lone(lambda s, x: nn.functional.dropout(s.c(x), 0.5), c=conv(padding=1)), "switched on in eval mode"),
    (Lone(lambda s, x: nn.functional.max_pool2d(s.c(x), 3, 2, ceil_mode=True), c=conv(padding=1)), "ceil_mode"),
    (Lone(lambda s, x: s.c(x) if x.sum() > 0 else x, c=conv(padding=1)), "cannot be followed"),
    (Lone(lambda s, x: s.c(x).transpose(0, 1), c=conv(padding=1)), "does not take an image|between images"),
    (Lone(lambda s, x: s.b(s.c(x)), c=conv(padding=1), b=nn.BatchNorm2d(4, affine=False)), "b: a BatchNorm without"),
    (Lone(lambda s, x: s.c(x) - s.c.weight.sum(), c=conv(padding=1)), "sum .* no counting rule for this operation"),
    (Lone(lambda s, x: nn.functional.pad(s.c(x), [1] * 4, value=0.5), c=conv(padding=1)), "pad .* not zero"),
    (Lone(lambda s, x: nn.functional.pad(s.c(x), [1] * 4, value=-torch.inf), c=conv(padding=1)), "pad .* not zero"),
    (Lone(lambda s, x: torch.cat([s.c(x), s.c(x)[:, 4:]], 1), c=conv(padding=1)), "c: it is used several times"),
    (Lone(lambda s, x: s.c(torch.cat([x, x[:, 3:]], 1)), c=conv(padding=1)), "it takes no element of what it reads"),
    (Lone(lambda s, x: s.c(x[:, [2, 0, 1]]), c=conv(padding=1)), "a list of indices would have to be stored"),
    (Lone(lambda s, x: s.c(x[:, (2, 0, 1)]), c=conv(padding=1)), "a list of indices would have to be stored"),
    (Lone(lambda s, x: sum([s.c(x), s.d(x)]), c=conv(padding=1), d=conv(padding=1)), "add .* with a number"),
    (nn.Sequential(conv(padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(3)), "map is 32x32"),
    (Returning(lambda s, x: s.c(x), c=conv(padding=1)), "the network returns tuple, expected one tensor"),
    (Lone(lambda s, x: s.c(x) * s.c.bias.view(1, -1, 1, 1), c=conv(padding=1)), "view .* it reads a constant"),
    (Lone(lambda s, x: s.c(x) * s.scale, c=conv(padding=1), scale=nn.Parameter(torch.ones(1, 4, 1, 1))),
     "mul .* it reads a constant"),
    (Lone(lambda s, x: s.c(x * s.scale), c=conv(padding=1), scale=nn.Parameter(torch.ones(3, 1, 1))),
     "mul .* it reads a constant: only the image can"),
    (Lone(lambda s, x: s.c(x * s.scale), c=conv(padding=1), scale=nn.Buffer(torch.ones(3, 32, 1))),
     "mul .* it reads a constant"),
    (Lone(lambda s, x: s.a(s.c(x)), c=conv(padding=1), a=Twice()), "a: Twice has a forward pass of its own"),
    (Lone(lambda s, x: s.a(s.c(x)), c=conv(padding=1), a=nn.GELU("tanh")), "tanh approximation of GELU"),
    (Lone(lambda s, x: nn.functional.max_pool2d(s.c(x), 2, return_indices=True)[0], c=conv(padding=1)),
     "max_pool2d.* several tensors"),
    (in_place(clipped), "relu .* changes c in place, which add reads afterwards"),
    (in_place(doubled), "iadd .* changes c in place, which add reads afterwards"),
    (in_place(squared), "imul .* changes c in place, which add reads afterwards"),
    (in_place(lambda x: x.add_(x)), "add_ .* changes c in place, which add reads afterwards"),
    (in_place(clipped, lambda s, x: s.i(x)), "changes i in place, which add reads afterwards"),
    (in_place(doubled, lambda s, x: s.d(x)), "changes d in place, which add reads afterwards"),
    (in_place(doubled, lambda s, x: x.flatten(1).view(x.shape)), "changes view in place, which add reads afterwards"),
    (in_place(clipped, lambda s, x: x.chunk(1, 1)[0]), "changes getitem in place, which add reads afterwards"),
    (Lone(lambda s, x: torch.add(s.c(x), 3, s.d(x)), c=conv(), d=conv()), "no counting rule for add"),  # 3 is alpha
    (Lone(lambda s, x: torch.cat([x[:, :2]] * 2, 1, out=s.c(x)), c=conv(padding=1)), "cat .* leave out=... away"),
    (Lone(lambda s, x: s.b(s.a(s.c(x))), c=conv(padding=1), **shared("weight")), "b: its weight is shared"),
    (Lone(lambda s, x: s.b(s.a(s.c(x))), c=conv(padding=1), **shared("bias", lambda: nn.BatchNorm2d(4))),
     "b: its bias is shared"),
    (Lone(lambda s, x: s.b(s.a(s.c(x))), c=conv(padding=1), **shared("running_mean", lambda: nn.BatchNorm2d(4))),
     "b: its running_mean is shared"),
    (Lone(lambda s, x: s.a(s.c(x)), c=conv(padding=1), a=replaced(nn.ReLU())), "a: ReLU has a forward pass of its own"),
    (Lone(lambda s, x: s.c(x), c=nn.utils.parametrizations.weight_norm(conv(padding=1))), "c: its weight is computed"),
    (Lone(lambda s, x: s.c(x).view(-1, 2, 2, 32, 32).relu().flatten(1, 2), c=conv(padding=1)), "4 dimensions"),
    (Lone(lambda s, x: s.c(x * torch.tensor(0.5)), c=conv(padding=1)), "Lone makes a tensor of constants"),
    (replaced(Lone(lambda s, x: s.c(x), c=conv(padding=1))), "Lone is called by a function that is not its class's"),
    (Called(lambda s, x: s.c(x), c=conv(padding=1)), "Called is called by a function that is not its class's"),
    (Several(lambda s, x: s.c(x), c=conv(padding=1)), "the forward pass of Several reads .more: expected an image"),
    (nn.Sequential(conv(padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 10, 1)), "returns 10x1x1 values"),
    (Lone(lambda s, x: s.image(s.c(x)), c=conv(padding=1), image=nn.ReLU()), "image rounds a value, and this is"),
    (Lone(lambda s, x: s.logits(s.c(x)), c=conv(padding=1), logits=nn.ReLU()), "logits rounds a value, and this is"),
    (Auxiliary(lambda s, x: s.c(x), c=conv(padding=1), aux=nn.Linear(10, 2)), "linear is returned as the logits, but"),
    (Lone(lambda s, x: (s.c(x), s.d(x))[0], c=conv(padding=1), d=conv()), "d is computed, but read by nothing"),
)


@pytest.mark.filterwarnings("ignore:This overload of add is deprecated")
@pytest.mark.parametrize("network, said", REFUSED, ids=range(len(REFUSED)))
def test_what_is_not_known_is_named(network, said):
    with pytest.raises(BadInput, match=said) as raised:
        prepare(network)
    assert "\n" not in str(raised.value)


def test_a_mean_of_any_number_is_counted_but_not_quantized():
    model = prepare(Lone(lambda s, x: s.c(x), c=conv()))  # of a map of 30x30
    mean = next(op for op in read_graph(model).operations if op.kind == "mean")
    for convention, width in (("32-bit", 32), ("fixed", 19), ("tree", 18)):  # 900 x 255 needs 18, and a sign
        multiplications, additions, _ = counting.rule(mean, [Activation(8, False)], Formats({}, {}), convention)
        assert multiplications == {width: 4} and sum(additions.values()) == 899 * 4, convention
    with pytest.raises(BadInput, match="averages 900 values, which has no integer form"):
        grids.check_quantizable(model)
    with pytest.raises(BadInput, match="averages 900 values, which has no integer form"):
        exact_network(model, [])


@pytest.mark.parametrize("named, number", ((dict(padding="same"), dict(padding=1)),
                                           (dict(padding="same", dilation=2), dict(padding=2, dilation=2)),
                                           (dict(padding="valid", stride=2), dict(stride=2))))
def test_padding_by_name_is_padding_by_number(named, number):
    """The integer network and the ONNX model take it from the window, and PyTorch's layers from the layer itself."""
    windows = [read_graph(prepare(Lone(lambda s, x: s.c(x), c=conv(**options)))).layers[0].window
               for options in (named, number)]
    assert windows[0] == windows[1]


class Listed(nn.Module):
    """Its layers run from a list, in which no quantizer replaces one; and it looks at how it is run."""

    def __init__(self):
        super().__init__()
        self.image, self.c, self.b, self.r = nn.Identity(), conv(padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.p, self.f, self.i, self.linear = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Identity(), nn.Linear(4, 10)
        self.steps = [self.image, self.c, self.b, self.r, self.p, self.f, self.i, self.linear]

    def forward(self, x):
        if torch.is_inference_mode_enabled():
            x = x + x.flip(3)
        for step in self.steps:
            x = step(x)
        return x


def test_what_runs_is_what_is_counted():
    """Every point is a module already, so nothing has to be inserted; the network's own forward pass is not run."""
    class Written(Listed):
        def forward(self, x):
            x = self.r(self.b(self.c(self.image(x))))
            return self.linear(self.i(self.f(self.p(x))))

    listed, written, images = Listed(), Written(), torch.randn(4, 3, 32, 32)
    written.load_state_dict(listed.state_dict())
    found = []
    for model in map(prepare, (listed, written)):
        points = [{"name": name, "bits": 2, "step": 0.25, "signed": signed}
                  for name, signed in read_graph(model).activation_points.items()]
        exact = model(images)
        quantize_activations(model, points)
        with torch.inference_mode():
            found.append(model(images))
        assert not torch.allclose(found[-1], exact, atol=1e-3)
    assert torch.equal(*found)


def test_what_is_paused_computes_the_same_again():
    """A module that works in place does not overwrite the values at which the network is paused."""
    model = prepare(networks.make(f"{FILE}:Viewed", 10).eval())
    images = cifar100.made_up(60, 0).images
    with torch.no_grad():
        expected, paused = logits(model, images), step_search.Paused(model, images)
        for name in list(read_graph(model).activation_points)[1:]:
            paused.advance_to(name)
            for _ in range(2):
                assert torch.allclose(paused.finish(), expected, atol=1e-5)


def test_a_clip_of_the_image_is_not_taken_for_the_image():
    """The exporter and --normalise know the image alone."""
    model = prepare(Lone(lambda s, x: s.c(x.relu()), c=conv(padding=1)).eval())
    point, *_ = read_graph(model).points
    assert (point.branches[0].kind, point.activation) == ("pixels", "relu")
    with pytest.raises(BadInput, match="points.image clips the image before any layer"):
        normalisation.fold(model, (0, 0, 0), (1, 1, 1))
    pytest.importorskip("onnx")
    from tools import export_onnx
    network = copy.deepcopy(model)
    grids.quantize_weights(model, grids.bit_table("8", model), "channel")
    activations = grids.calibrate(model, cifar100.made_up(20, 0).images, grids.activation_table("8", model), "max")
    quantize_activations(model, activations)
    network, tensors = grids.shipped(model, network)
    with pytest.raises(BadInput, match="points.image clips the image before any layer, which has no ONNX model"):
        export_onnx.Exporter(network, {"tensors": tensors, "activations": activations}).finished({})


def test_a_view_of_a_map_is_refused_in_training():
    """Maps are channels-last there as everywhere; elsewhere graph.prepare makes it a reshape."""
    with pytest.raises(BadInput, match=r"its forward pass fails for images .* Use \.reshape\(\.\.\.\) instead"):
        trial.check_forward(networks.make(f"{FILE}:Viewed", 10), "Viewed", 10)


class Odd(nn.Module):
    """Names that a point, or what is inserted, could have; arguments in an order that is not that of torch.fx."""

    def __init__(self):
        super().__init__()
        self.a, self.a_b, self.view = nn.Module(), nn.Conv2d(4, 4, 3, 2, 1), nn.Buffer(torch.ones(1))
        self.a.b, self.linear = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4, 10)

    def forward(self, image, *more, flag=False):
        x = self.a.b(image * self.view)
        x = self.a_b(x if flag else nn.functional.silu(x))
        return self.linear(nn.functional.silu(x).mean((2, 3)))


def test_what_is_inserted_has_a_name_of_its_own():
    model = Odd().eval()
    names = list(read_graph(prepare(model)).activation_points)
    assert names == ["points.image", "points.a_b", "points.silu", "points.a_b_1", "points.silu_1", "points.mean"]
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(prepare(model)(x), model(x))


def test_a_graph_of_torch_fx_is_a_network():
    plain = nn.Sequential(conv(padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4096, 10))
    model = prepare(torch.fx.symbolic_trace(plain).eval())
    assert list(read_graph(model).activation_points) == ["points.image", "1", "points.2"]
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(copy.deepcopy(model)(x), plain(x))


def test_training_follows_a_network_that_makes_constants():
    """Which cannot be counted: the parts that its normalisation follows are known all the same."""
    net = Lone(lambda s, x: s.d(s.b(s.c(x - torch.tensor(0.5)))), c=conv(padding=1), b=nn.BatchNorm2d(4),
               d=nn.Conv2d(4, 4, 1))
    assert graph.scale_free_weights(net) == [net.c.weight]


def test_every_branch_has_a_name_of_its_own():
    net = prepare(Lone(lambda s, x: (s.shortcut(h := s.c(x).relu()) + h).relu(), c=conv(padding=1),
                       shortcut=nn.Conv2d(4, 4, 1)))
    names = [branch.name for point in read_graph(net).points for branch in point.branches]
    assert sorted(names) == sorted(set(names)) and {"shortcut", "shortcut.1"} <= set(names)


def test_a_parameter_that_nothing_reads_is_refused_at_once():
    net = Lone(lambda s, x: s.c(x), c=conv(padding=1), d=conv())
    with pytest.raises(BadInput, match="d.weight is not used by the forward pass"):
        grids.check_quantizable(prepare(net))


def test_a_prepared_network_changes_nothing_in_place():
    """What is added to a rounded value, in float32, may not fit into it."""
    def run(s, x):
        x = s.i(s.c(s.image(x)))
        x += s.d(x)
        return s.after(x)

    network = Lone(run, c=conv(padding=1), d=nn.Conv2d(4, 4, 1), **{n: nn.Identity() for n in ("image", "i", "after")})
    network, prepared = network.eval(), prepare(network)
    assert list(read_graph(prepared).activation_points) == ["image", "i", "after", "points.mean"]
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(prepared(x), network(x))
    assert not any(node.target in operations.REWRITTEN for node in operations.traced(prepared).nodes)


@pytest.mark.parametrize("name, points", (("mobilenet_v3_small", 101), ("shufflenet_v2_x0_5", 88),
                                          ("efficientnet_b0", 180), ("squeezenet1_1", 38)))
def test_torchvisions_networks_are_counted_and_quantized(name, points):
    plain, network, claim = shipped(f"torchvision.models:{name}?num_classes=10", 10)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(prepare(plain)(x), plain(x)) and list(network.state_dict()) == list(plain.state_dict())
    with FlopCounterMode(display=False) as counter:
        plain(x)
    assert counter.get_total_flops() == 2 * counting.macs(read_graph(network).operations)
    assert len(read_graph(network).activation_points) == points
    assert counting.summary(network, stated_formats(network, claim))["weights"]["all"]["zeros"] > 0  # if none is linear
    images = cifar100.made_up(2, 3).images
    wanted = logits(exact_network(network, claim["activations"]), images)
    assert torch.equal(integer_logits(network, claim, images), wanted) and len(wanted.unique()) > 9


def test_elements_that_are_moved_several_times_are_moved_once():
    """And a tensor that stands twice in a concatenation is no sum of itself."""
    def run(s, x):
        x = torch.relu(s.c(x))
        first, second = x.chunk(2, 1)
        return torch.cat([second, nn.functional.pad(first, (1, 1)).transpose(2, 3)[:, :, 1:33], second], 1)[:, :4]

    network = prepare(Lone(run, c=conv(padding=1)).eval())
    found = {point.name: point for point in read_graph(network).points}
    assert list(found)[:3] == ["points.image", "points.relu", "points.moved_5"]
    moved = found["points.moved_5"].branches
    assert [branch.source for branch in moved] == ["points.relu"] * 2 and not found["points.moved_5"].signed
    x = torch.arange(1, 4 * 32 * 32 + 1).view(1, 4, 32, 32)
    wanted = torch.cat([x[:, 2:], nn.functional.pad(x[:, :2], (1, 1)).transpose(2, 3)[:, :, 1:33]], 1)
    assert torch.equal(sum(branch.index for branch in moved), wanted[0, :, :, :32])


def test_a_map_of_another_shape_is_moved():
    """A 3x3 convolution reads other neighbours then."""
    network = Lone(lambda s, x: s.d(s.c(x).view(-1, 4, 16, 64)), c=conv(padding=1), d=nn.Conv2d(4, 4, 3, padding=1))
    kinds = {op.name: op.kind for op in read_graph(prepare(network.eval())).operations}
    assert kinds["moved"] == "moved"


def test_an_identity_that_runs_twice_rounds_nothing():
    def run(s, x):
        return s.d(s.i(s.c(s.i(x))))
    network = Lone(run, i=nn.Identity(), c=conv(padding=1), d=nn.Conv2d(4, 4, 1)).eval()
    assert list(read_graph(prepare(network)).activation_points) == ["points.image", "points.i_1", "points.d",
                                                                  "points.mean"]
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(prepare(network)(x), network(x))


def test_what_else_a_forward_pass_takes_has_its_default():
    """The first argument is the image, whatever its default."""
    class Optional(nn.Sequential):
        def forward(self, image=None, more=None, *, again=False):
            image = image if more is None else image * more
            return super().forward(super().forward(image) if again else image)
    network = Optional(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 10))
    assert [op.kind for op in operations.trace(network)] == ["input", "conv", "relu", "moved", "linear"]


def test_an_identity_costs_nothing():
    """Neither where it passes on what is rounded already, nor between a BatchNorm and its ReLU."""
    def made(run):
        torch.manual_seed(0)
        parts = {"c": conv(padding=1), "n": nn.BatchNorm2d(4), "d": nn.Conv2d(4, 4, 1)}
        model = prepare(Lone(run, i=nn.Identity(), j=nn.Identity(), **parts).eval())
        return counting.summary(model, formats.what_if(formats.found_formats(model), model, 8, 8))
    plain = made(lambda s, x: s.d(torch.relu(s.n(s.c(x)))))
    assert made(lambda s, x: s.d(s.j(torch.relu(s.i(s.n(s.c(x))))))) == plain
    assert plain["operations"]["fixed"]["bits"] < plain["operations"]["32-bit"]["bits"]


def test_a_channel_that_nothing_reads_is_dead_wherever_it_was_moved():
    _, network, claim = shipped(f"{FILE}:Shuffled", 10)
    network = copy.deepcopy(network)
    with torch.no_grad():
        network.excite.weight.fill_(0.5)
        network.conv2.weight.fill_(0.5)
        network.conv2.weight[:, :8] = 0  # these channels are the first four, twice
    dead_weight.remove(network, claim["activations"])
    assert not network.excite.weight[:4].any() and not network.excite.bias[:4].any()
    assert network.excite.weight[8:].all() and network.conv2.weight[:, 8:].all()


def test_the_digest_is_of_what_is_computed():
    """Any change of it is another digest; other values of the parameters are not."""
    def digest(run=lambda s, x: s.c(x), groups=1, **options):
        network = prepare(Lone(run, a=nn.Conv2d(3, 4, 1), c=nn.Conv2d(4, 4, 3, padding=1, groups=groups, **options),
                               m=nn.ReLU()).eval())
        return read_graph(network).digest

    def swapped(s, x):
        first, second = x.chunk(2, 1)
        return torch.cat([second, first], 1)

    def behind(change):
        return lambda s, x: change(s, s.c(s.a(x)))
    runs = [lambda s, x: x, lambda s, x: s.m(x), lambda s, x: nn.functional.relu6(x), lambda s, x: x + x,
            lambda s, x: nn.functional.max_pool2d(x, 2), lambda s, x: nn.functional.avg_pool2d(x, 2),
            lambda s, x: nn.functional.max_pool2d(x, 3, 2, 1), swapped,
            lambda s, x: torch.cat([x[:, 1:], x[:, :1]], 1)]
    plain = behind(runs[0])
    digests = [digest(behind(run)) for run in runs] + [
        digest(plain, groups=2), digest(plain, bias=False), digest(plain, padding_mode="zeros", stride=2)]
    assert len(set(digests)) == len(digests) and digest(plain) == digests[0]


@pytest.mark.parametrize("module", (counting, graph, operations, formats), ids=lambda module: module.__name__)
def test_the_examples_in_docstrings(module):
    import doctest
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


# ---- A board entry that somebody else counted ----------------------------------------------------

def test_kaists_published_score(teachers_dir, capsys, monkeypatch):
    monkeypatch.setattr(check_model_operations, "thop_counts", lambda model: None)
    file = str(teachers_dir / "micronet_v2_pr_60.t7")
    assert check_model_operations.main(["--summary", "--checkpoint", file]) == 0
    out = capsys.readouterr().out
    assert "score 0.00562; they publish 0.00562 for micronet_v2_pr_60" in out
    assert "twice as many, as it should be" in out
