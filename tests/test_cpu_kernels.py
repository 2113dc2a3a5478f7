"""What is special to the functions of kernels.c, where they are used, and what happens without a compiler.

test_kernels.py compares them with PyTorch's functions.
"""
import contextlib
import copy
import math
import os

import pytest
import torch
from torch import nn

from compressed import grids, kernels
from compressed.exact_network import Quantizer, quantize_activations
from compressed.graph import prepare, read_graph
from mobilenet_v2 import MobileNetV2, SmallMobileNetV2
from small import with_hardswish
from test_kernels import DTYPES, PYTORCHS, maps, pair
from training import cpu_kernels, gpu_kernels
from training.cpu_kernels import LARGEST_MAP, Depthwise, fast_on_a_cpu
from training.learned_steps import LearnedQuantizer, learn_steps

compiled = pytest.mark.skipif(kernels.library(torch.float32) is None, reason="there is no C compiler")

@compiled
@pytest.mark.parametrize("precision", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("activation", (nn.ReLU, nn.Hardswish))
def test_a_step_of_the_network_is_the_same_without_a_compiler(activation, precision, monkeypatch):
    """Logits, statistics, the last layer's gradient: rounding stirs those of layers further in (see test_loop.py). In
    bfloat16 they are as near to float32's as without it."""
    x, found = maps("compiled", 4, 3, 16, 16).detach(), []
    for there, precision in ((True, precision), (False, precision), (False, torch.float32)):
        with monkeypatch.context() as patch:
            if not there:
                patch.setattr(kernels, "library", lambda dtype: None)
            torch.manual_seed(0)
            model = MobileNetV2(width=0.5).to(memory_format=torch.channels_last).train()
            model = with_hardswish(model) if activation is nn.Hardswish else model
            kinds = [type(module) for module in model.modules()]
            with fast_on_a_cpu(model), torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                assert not any(isinstance(module, activation) for module in model.modules())
                fused = [module.activation for module in model.modules() if isinstance(module, cpu_kernels.BatchNorm)]
                out = model(x)
                out.float().logsumexp(1).mean().backward()
            assert [type(module) for module in model.modules()] == kinds
            assert len(fused) == 57 and fused.count(activation.__name__.lower()) == kinds.count(activation) == 36
            assert fused.count("none") == 57 - 36
            found.append((out.float(), model.linear.weight.grad, model.bn2.running_var, model.bn1.running_mean))
    for ours, theirs, exact in zip(*found):
        assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm() + 1e-3 * exact.norm()


def with_rounding(channels: int, activation: str, signed: bool) -> nn.ModuleList:
    """A BatchNorm with its roundings and its activation; steps so fine that values are clipped at both ends."""
    modules = [pair("compiled", channels, "none", ())[1], LearnedQuantizer(Quantizer(5, signed, 0.125))]
    if activation == "hardswish":
        modules += [nn.Hardswish(), LearnedQuantizer(Quantizer(4, True, 0.125))]
    modules[0].__class__ = nn.BatchNorm2d
    del modules[0].activation
    return nn.ModuleList(modules)


@compiled
@pytest.mark.parametrize("frozen", (False, True))
@pytest.mark.parametrize("activation, signed", (("none", False), ("none", True), ("hardswish", True)))
def test_rounding_with_trained_steps_is_that_of_autograd(activation, signed, frozen):
    """But where float32 rounds z to another side of a half than the reference, so that the code is one off."""
    slow = with_rounding(24, activation, signed).train(not frozen)
    ours = copy.deepcopy(slow)
    ours[0].__class__, ours[0].behind = cpu_kernels.BatchNorm, [(each, type(each)) for each in ours[1:]]
    ours[0].activation = "rounded_hardswish" if activation == "hardswish" else "rounded"
    x = maps("compiled", 3, 24, 9, 9)
    same, y = x.detach().clone().requires_grad_(), ours[0](x)
    wanted = same
    for module in slow:
        wanted = module(wanted)
    off = (y - wanted).abs() > 1e-6
    assert off.float().mean() < 1e-3 and len(y.unique()) > 10
    gradient = torch.randn(x.shape)
    gradient[off.any(1, keepdim=True).expand_as(off)] = 0
    (y * gradient).sum().backward()
    (wanted * gradient).sum().backward()
    theirs = dict(slow.named_parameters())
    for name, mine in ours.named_parameters():
        assert torch.allclose(mine.grad, theirs[name].grad, rtol=1e-3, atol=1e-3), name
        assert mine.grad.any()
    assert torch.allclose(x.grad, same.grad, rtol=1e-3, atol=1e-4) and x.grad.any()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.allclose(getattr(ours[0], name), getattr(slow[0], name), rtol=1e-5, atol=1e-6)


def test_statistics_of_two_momenta_move_at_once():
    norms = [nn.BatchNorm2d(3, momentum=momentum) for momentum in (0.1, 0.5)]
    seen = [(norm, torch.stack([torch.ones(3), torch.full((3,), 3.0)])) for norm in norms]
    gpu_kernels.update_statistics(seen)
    assert [float(norm.running_mean[0]) for norm in norms] == pytest.approx([0.1, 0.5]) and not seen
    assert [float(norm.running_var[0]) for norm in norms] == pytest.approx([1.2, 2.0])
    assert [int(norm.num_batches_tracked) for norm in norms] == [1, 1]


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_alone(dtype):
    slow = LearnedQuantizer(Quantizer(8, True, 2.0**-5))
    ours = copy.deepcopy(slow)
    ours.__class__ = cpu_kernels.Rounding
    x = maps("compiled", 2, 37, 5, 5, dtype=dtype)
    same, gradient = x.detach().clone().requires_grad_(), torch.randn(x.shape).to(dtype)
    y, wanted = ours(x), slow(same)
    assert torch.equal(y.float(), wanted) and y.dtype == dtype
    y.backward(gradient)
    wanted.backward(gradient.float())
    assert torch.equal(x.grad, same.grad)
    assert torch.allclose(ours.log_step.grad, slow.log_step.grad, rtol=1e-3)


class Reused(nn.Module):
    """A ReLU that torch.fx sees once, after a BatchNorm, and that runs again inside another module, or by forward()."""

    def __init__(self, inside: bool):
        super().__init__()
        self.act, self.inside = nn.ReLU(), inside
        self.first, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second = Active(16, 16, 3, padding=1) if inside else nn.Conv2d(16, 16, 3, padding=1)
        if inside:
            self.second.act = self.act

    def forward(self, x):
        x = self.second(self.act(self.bn(self.first(x))))
        return (x if self.inside else self.act.forward(x)).mean((2, 3))


class Active(nn.Conv2d):
    def forward(self, x):
        return self.act(super().forward(x))


@pytest.mark.parametrize("inside", (False, True))
@torch.no_grad()
def test_a_function_that_runs_elsewhere_too(inside):
    model, x = Reused(inside).train(), torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    wanted = copy.deepcopy(model)(x)
    with cpu_kernels.fast_on_a_cpu(model):
        assert type(model.bn).__name__ == "BatchNorm" and type(model.act) is not nn.ReLU
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    assert type(model.act) is nn.ReLU


@torch.no_grad()
def test_a_copy_applies_no_function_twice():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Hardswish()).train()
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    wanted = copy.deepcopy(model)(x)
    with cpu_kernels.fast_on_a_cpu(model):
        torch.testing.assert_close(copy.deepcopy(model)(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", (
    lambda norm: norm.double(), lambda norm: norm.register_parameter("bias", None),
    lambda norm: norm.__init__(16, affine=False), lambda norm: norm.__init__(16, track_running_stats=False),
    lambda norm: setattr(norm, "track_running_stats", False)))
def test_a_batchnorm_of_other_values_is_pytorchs(change):
    norm = nn.BatchNorm2d(16)
    change(norm)
    with cpu_kernels.fast_on_a_cpu(norm):
        assert type(norm) is nn.BatchNorm2d


@pytest.mark.parametrize("layer", (nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False)))
def test_a_map_in_c_order_stays_one(layer):
    x = torch.randn(4, 32, 6, 6)
    wanted = copy.deepcopy(layer)(x)
    with cpu_kernels.fast_on_a_cpu(layer):
        y = layer(x)
    assert y.is_contiguous() and y.view(4, -1).shape == (4, 32 * 36)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)


@compiled
def test_a_map_in_float32_is_normalised_in_float32():
    """As under PyTorch's autocast: a large mean would lose its digits."""
    norm, x = nn.BatchNorm2d(16), (torch.randn(4, 16, 6, 6) + 200).contiguous(memory_format=torch.channels_last)
    norm.running_mean.fill_(200)
    wanted = copy.deepcopy(norm)(x)
    with cpu_kernels.fast_on_a_cpu(norm), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(norm(x), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("there, most", ((True, math.inf), (True, 6.0), (False, math.inf)))
def test_a_network_with_trained_steps_is_changed_and_changed_back(there, most, monkeypatch):
    if not there:
        monkeypatch.setattr(kernels, "library", lambda dtype: None)
    torch.manual_seed(0)
    model = prepare(SmallMobileNetV2(width=0.25))
    grids.quantize_weights(model, grids.bit_table("4", model), "channel")
    x = maps("compiled", 4, 3, 16, 16).detach()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(x)
    model.eval()  # with frozen statistics, a code that is one off does not change those of all others
    quantize_activations(model, [{"name": name, "bits": 8, "signed": signed, "step": 2.0**-5}
                                 for name, signed in read_graph(model).activation_points.items()])
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.most = most  # as of a ReLU6: its upper clip is no function of kernels.c
    learn_steps(model, "channel")
    found = []
    for fast in (False, True):
        each = copy.deepcopy(model)
        kinds = [type(module) for module in each.modules()]
        with fast_on_a_cpu(each) if fast else contextlib.nullcontext():
            changed = [module for module in each.modules() if isinstance(module, cpu_kernels.BatchNorm)]
            together = sum(len(module.behind) for module in changed)
            if fast:
                # two roundings and a hard swish behind 33 of them; one rounding where a block has no shortcut
                assert together == (33 * 3 + 3 if most == math.inf else 0) and len(changed) == 50
            logits = each(x)
            logits.float().logsumexp(1).mean().backward()
            inside = copy.deepcopy(each)(x)  # as an evaluation in the midst of a stage
        assert kinds == [type(module) for module in each.modules()]
        assert inside.shape == logits.shape
        found.append((logits.detach(), each.linear.weight.grad, each.linear.log_step.grad,
                      each.layers[15].conv3.weight.grad, each.layers[14].bn1.weight.grad))
    for ours, theirs in zip(*found):
        assert (ours - theirs).norm() <= 0.1 * theirs.norm()


@compiled
@pytest.mark.parametrize("activation", PYTORCHS)
def test_in_eval_mode_it_is_pytorchs(activation):
    norm, ours = pair("compiled", 8, activation, ())
    x = maps("compiled", 2, 8, 4, 4)
    assert torch.allclose(ours.eval()(x).double(), PYTORCHS[activation](norm.eval()(x.double())), atol=1e-5)


@compiled
def test_the_compiler_may_have_options(monkeypatch):
    monkeypatch.setenv("CC", f"{os.environ.get('CC', 'cc')} -O1 -DUNUSED='a b'")
    assert kernels.library.__wrapped__(torch.float32) is not None


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
        x = x.contiguous(memory_format=torch.channels_last)
        plain = conv(x)
        with fast_on_a_cpu(conv):
            assert isinstance(conv, Depthwise) and torch.equal(conv(x), plain)
        assert type(conv) is nn.Conv2d and not taken
    conv = nn.Conv2d(32, 32, 3, 1, 1, **wide)
    with fast_on_a_cpu(conv):
        conv(torch.randn(2, 32, LARGEST_MAP, 2).contiguous(memory_format=torch.channels_last))
    assert taken == ["depthwise"]
