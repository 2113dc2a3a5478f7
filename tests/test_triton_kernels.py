"""What is special to the Triton kernels, and where they are used; test_kernels.py compares them with PyTorch's."""
import copy
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from compressed import cifar100
from small import with_hardswish
from test_kernels import agree, maps, pair
from training import batchnorm, gpu_kernels
from training.cpu_kernels import ACTIVATIONS, chains, exchanged, included
from training.gpu_kernels import BatchNorm, Depthwise, Pointwise, fast_on_a_gpu

pytest.importorskip("triton", reason="there is no Triton")
triton_kernels = pytest.importorskip("training.triton_kernels")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and type(triton_kernels.normalised).__name__ != "InterpretedFunction":
    pytest.skip("Triton was imported without TRITON_INTERPRET=1", allow_module_level=True)
DATA = cifar100.made_up(4, 0, device=DEVICE)
OPTIONS = {"batch": 2, "dtype": torch.bfloat16, "device": torch.device(DEVICE), "captured": False}


# ---- The kernels ---------------------------------------------------------------------------------

def test_results_do_not_depend_on_the_tiling(monkeypatch):
    """One tile or several, of which a program has two or more; several programs share a sum."""
    results = []
    for channels, rows, columns, programs in ((16, 64, 16, 1056), (8, 4, 2, 8)):
        for name, value in (("CHANNELS", channels), ("ROWS", rows), ("COLUMNS", columns), ("PROGRAMS", programs)):
            monkeypatch.setattr(triton_kernels, name, value)
        torch.manual_seed(0)
        ours, x = pair("triton", 12, "relu", (5, 4))[1], maps("triton", 3, 12, 5, 4)
        weight = torch.randn(12, 1, 3, 3, device=DEVICE, requires_grad=True)
        origin = torch.zeros(12, device=DEVICE)  # the mean of a channel that the ReLU left empty
        out = [each for stride in (1, 2) for each in triton_kernels.depthwise_with_statistics(
            ours(x), weight, stride, origin, 1e-5)]
        results.append([*out, *torch.autograd.grad([y.sum() for y in out[::2]], [x, weight, *ours.parameters()])])
    agree(results[1], results[0], [1e-4] * len(results[0]))


def test_other_memory_formats():
    """A gradient that is expanded or transposed, and an input that is not channels-last."""
    x, weight = torch.randn(2, 6, 4, 3, device=DEVICE), torch.randn(6, 1, 3, 3, device=DEVICE)
    layouts = [x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)]
    for gradient in (torch.randn_like(x), torch.randn(2, 6, 1, 1, device=DEVICE).expand(2, 6, 4, 3)):
        found = []
        for each in layouts:
            each, ours = each.detach().clone().requires_grad_(), pair("triton", 6, "relu", (4, 3))[1]
            y = triton_kernels.depthwise(ours(each), weight, 1)
            found.append([y, *torch.autograd.grad(y, [each, ours.weight], gradient)])
        for other in found[1:]:
            agree(other, found[0], [0, 0, 0])


def test_the_operators_are_what_pytorch_expects():
    """No hidden changes of arguments, gradients for autograd."""
    x, weight, vector = maps("triton", 2, 6, 5, 4), torch.randn(6, 1, 3, 3, device=DEVICE), torch.rand(6, device=DEVICE)
    dy = triton_kernels.depthwise(x.detach(), weight, 2)
    statistics = triton_kernels.normalise(x.detach(), vector, vector, vector, 1e-5, 1)[1]
    for operator, args in ((triton_kernels.depthwise, (x, weight.requires_grad_(), 2)),
                           (triton_kernels.depthwise_gradients, (x.detach(), dy, weight.detach(), 2)),
                           (triton_kernels.normalise, (x, vector.clone().requires_grad_(), vector, vector, 1e-5, 1)),
                           (triton_kernels.normalise_gradients, (dy, dy, vector, vector, statistics, 1))):
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_autograd_registration"))


COMPILE = """
import re, triton
from triton.backends.compiler import GPUTarget
from training import triton_kernels
KINDS = dict.fromkeys(("x", "y", "dx", "dy"), "*bf16") | dict.fromkeys(("eps", "correction"), "fp32") | dict.fromkeys(
    ("rows", "images", "height", "width", "y_height", "y_width", "groups", "count"), "i32") | {"arrived": "*i32"}
for name, constants in (("convolution", {"STRIDE": 1, "STATISTICS": True}), ("batch_statistics", {}),
                        ("convolution", {"STRIDE": 2, "STATISTICS": True}), ("affine_gradients", {"ACTIVATION": 2}),
                        ("normalised", {"ACTIVATION": 2}), ("normalised_gradient", {"ACTIVATION": 1}),
                        ("convolution_gradients", {"STRIDE": 1}), ("convolution_gradients", {"STRIDE": 2}),
                        ("taps_gradient", {})):
    rows, columns = triton_kernels.ROWS, triton_kernels.COLUMNS
    tile = {"ALIGN": 8, "POSITIONS": columns if "conv" in name else rows, "CHANNELS": triton_kernels.CHANNELS}
    kernel, constants = getattr(triton_kernels, name), constants | tile
    kinds = {arg: "constexpr" if arg in constants else KINDS.get(arg, "*fp32") for arg in kernel.arg_names}
    source = triton.compiler.ASTSource(
        kernel, kinds, {(kernel.arg_names.index(arg),): value for arg, value in constants.items()},
        {(k,): [["tt.divisibility", 16]] for k, kind in enumerate(kinds.values()) if kind[0] == "*"})
    compiled = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 2 if "conv" in name else 4})
    assert re.search(r"ld\\.global\\S*\\.v[24]", compiled.asm["ptx"]), name + " loads no vectors"
"""


def test_they_compile_for_an_h100(tmp_path):
    """What the interpreter does not show: types, shapes in loops, and loads of 8 or 16 bytes. It needs no GPU."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True,
                          env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr[-3000:]


# ---- Where they are used -------------------------------------------------------------------------

def network(activation=nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return with_hardswish(model).to(DEVICE) if activation is nn.Hardswish else model.to(DEVICE)


def everywhere(model: nn.Module):
    """Use the kernels in all layers that fit, for all sizes, as fast_on_a_gpu does."""
    sizes = [(side, side) for side in range(1, 33)]
    depthwise = type("Depthwise", (Depthwise,), {"sizes": sizes, "norm": model[4]})
    own = {Depthwise: depthwise, Pointwise: type("Pointwise", (Pointwise,), {"sizes": sizes})}
    return exchanged({module: new for kind, new in own.items() for module in model.modules()
                      if type(module) is nn.Conv2d and kind.fits(module)}
                     | included(chains(model, ACTIVATIONS), BatchNorm, sizes=sizes))


def step(model: nn.Module, x, half: bool = True) -> list:
    model.zero_grad()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
        y = model(x)
    y.float().logsumexp(1).mean().backward()
    return [y.detach().float(), *(p.grad for p in model.parameters()), *(b.clone().float() for b in model.buffers())]


@pytest.mark.parametrize("activation", (nn.ReLU, nn.Hardswish))
def test_a_step_of_a_network(activation):
    """In bfloat16 it is as near to float32's as without the kernels."""
    x, found = maps("triton", 4, 3, 8, 8).detach(), []
    for context, half in ((everywhere, True), (nullcontext, True), (nullcontext, False)):
        model = network(activation)
        with context(model):
            found.append(step(model, x, half))
        assert [type(module) for module in model] == [type(module) for module in network(activation)]
    for ours, theirs, exact in zip(*found, strict=True):
        assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + 0.01 * exact.norm()


def test_in_eval_mode_and_for_other_sizes_it_is_pytorchs(monkeypatch):
    def fail(*_):
        raise AssertionError("the kernels are not to be used")
    model, x = network().eval(), maps("triton", 2, 3, 8, 8).detach()
    wanted = model(x)
    with everywhere(model):
        model[3].sizes = ()
        assert torch.allclose(model(x), wanted, atol=1e-6)
        for module in model:
            module.sizes = ((7, 7),)
        monkeypatch.setattr(torch.ops.training, "normalise", fail)
        monkeypatch.setattr(torch.ops.training, "depthwise", fail)
        model.train()(x)
        assert model[1].running_mean.any()
    assert type(model[3]) is nn.Conv2d and type(model[2]) is nn.ReLU


def timed(monkeypatch, *times):
    """Let the timing return these, in turn, after it has called the work."""
    gpu_kernels.measured.cache_clear()
    again = []

    def seconds(work, captured, device):
        work()
        again[:] = again or times
        return again.pop(0)
    monkeypatch.setattr(gpu_kernels, "seconds", seconds)
    gpu_kernels.statistics_gain.cache_clear()


def test_the_faster_of_both_is_used(monkeypatch, capsys):
    """Of each kind the largest layer is timed, PyTorch's first, then ours; a BatchNorm has its activation."""
    timed(monkeypatch, 5.0, 6.0, 5.0, 4.0, 5.0, 2.5, 5.0, 6.0)
    model = network()
    with fast_on_a_gpu(model, [4, 6], **OPTIONS):
        assert [type(model[k]).__name__ for k in (2, 3, 5, 7)] == ["Included", "Conv2d", "Included", "BatchNorm2d"]
        assert isinstance(model[6], Pointwise) and model[6].sizes == ((2, 2), (3, 3))
        assert (model[1].sizes, model[1].activation) == (((4, 4), (6, 6)), "relu") and model[1].training
        assert isinstance(model[4], BatchNorm) and model[4].sizes == ((2, 2), (3, 3))
        assert not model[1].seen and model[1].seen is model[4].seen and model[1].seen is not BatchNorm.seen
        x, plain = maps("triton", 2, 3, 4, 4).detach(), network()
        agree(step(model, x)[-9:], step(plain, x)[-9:], 9 * [0.02])  # the statistics moved after the forward pass
        batchnorm.renew_statistics(copy.deepcopy(model), DATA, 4, "none", torch.Generator())
        assert not model[1].seen
    assert [type(module) for module in model] == [type(module) for module in network()]
    assert "depthwise stride 2 0.83, 1x1 1.25, BatchNorm relu 2.00, BatchNorm 0.83" in capsys.readouterr().out


def test_statistics_come_with_the_convolution(monkeypatch):
    """A depthwise convolution that uses the kernels gives the BatchNorm after it the statistics of its result."""
    timed(monkeypatch, 2.0, 1.0)
    model, x = network(), maps("triton", 4, 3, 6, 6).detach()
    wanted, calls = step(network(), x, half=False), []
    normalise_by = torch.ops.training.normalise_by
    monkeypatch.setattr(torch.ops.training, "normalise_by", lambda *args: calls.append(args) or normalise_by(*args))
    with fast_on_a_gpu(model, [6], **OPTIONS | {"dtype": torch.float32}):
        assert model[3].norm is model[4]
        calls.clear()  # those of the trial
        agree(step(model, x, half=False), wanted, len(wanted) * [1e-4])
        assert len(calls) == 1
        model[4].eval()
        model(x)
        twin = copy.deepcopy(model).train()  # its convolution knows the first model's BatchNorm: not its own
        twin(x)
        assert len(calls) == 1


@pytest.mark.parametrize("fault", ("raises", "is wrong"))
def test_statistics_that_fail_are_not_used(fault, monkeypatch):
    """They are tried before a stage, as the kernels are: the BatchNorm then computes its own."""
    timed(monkeypatch, 2.0, 1.0)
    operator = torch.ops.training.depthwise_with_statistics
    monkeypatch.setattr(torch.ops.training, "depthwise_with_statistics", lambda *args: 1 / 0 if fault == "raises" else (
        operator(*args)[0], 2 * operator(*args)[1]))
    model = network()
    with fast_on_a_gpu(model, [6], **OPTIONS):
        assert isinstance(model[3], Depthwise) and isinstance(model[4], BatchNorm) and model[3].norm is None


def test_statistics_that_take_longer_are_not_used(monkeypatch, capsys):
    timed(monkeypatch, 2.0, 1.0, 3.0, 4.0, *3 * (2.0, 1.0))  # the third and the fourth: apart, together
    model = network()
    with fast_on_a_gpu(model, [6], **OPTIONS):
        assert isinstance(model[3], Depthwise) and isinstance(model[4], BatchNorm) and model[3].norm is None
    assert "statistics of depthwise stride 2 0.75" in capsys.readouterr().out


def test_a_type_that_was_not_tried_is_pytorchs(monkeypatch):
    """As in an evaluation without autocast: the kernels for float32 would be compiled in the middle of a stage."""
    timed(monkeypatch, 2.0, 1.0)
    model, x = network(), maps("triton", 4, 3, 6, 6).detach()
    with fast_on_a_gpu(model, [6], **OPTIONS):
        assert isinstance(model[3], Depthwise)
        for name in ("normalise", "normalise_by", "depthwise", "depthwise_with_statistics"):
            monkeypatch.setattr(torch.ops.training, name, lambda *_: pytest.fail("it is for bfloat16"))
        agree([model(x)], [network()(x)], [1e-4])


def test_a_batchnorm_that_runs_twice_moves_its_statistics_twice():
    ours, theirs = pair("triton", 6, "none", (4, 4))[1], pair("triton", 6, "none", (4, 4))[0]
    ours.seen, (one, two) = [], (maps("triton", 2, 6, 4, 4).detach() + k for k in (0, 1))
    for x in (one, two):
        ours(x), theirs(x.double())
    gpu_kernels.update_statistics(ours.seen)
    agree([ours.running_mean, ours.running_var], [theirs.running_mean, theirs.running_var], [1e-5, 1e-5])
    assert ours.num_batches_tracked == 2 and not ours.seen


def test_a_fast_teacher_computes_the_same():
    """In bfloat16, with matrix products; if a part of the network refuses the rounded weights, it stays as it is."""
    model = network(nn.Hardswish).eval()
    fast, x = gpu_kernels.fast_teacher(model, torch.bfloat16), maps("triton", 4, 3, 32, 32).detach()
    assert isinstance(fast[6], Pointwise) and fast[6].weight.dtype == torch.bfloat16
    assert model[6].weight.dtype == torch.float32 and type(model[6]) is nn.Conv2d
    with torch.autocast(DEVICE, torch.bfloat16):
        agree([fast(x).float()], [model(x).float()], [0.02])

    class Exact(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            with torch.autocast(DEVICE, enabled=False):
                return self.conv(x).mean((2, 3))
    exact = Exact().to(DEVICE).eval()
    assert gpu_kernels.fast_teacher(exact, torch.bfloat16) is exact


def test_frozen_statistics_need_no_timing(monkeypatch):
    """A BatchNorm whose statistics are frozen, as in fine-tuning, never uses the kernels."""
    timed(monkeypatch, 5.0, 4.0, 5.0, 6.0)  # of the convolutions alone
    model = network()
    for module in model:
        module.train(not isinstance(module, nn.BatchNorm2d))
    with fast_on_a_gpu(model, [4], **OPTIONS):
        assert isinstance(model[3], Depthwise) and not any(isinstance(module, BatchNorm) for module in model)


@pytest.mark.parametrize("fault", ("raises", "is wrong"))
def test_a_kernel_that_fails_is_not_used(fault, monkeypatch, capsys):
    timed(monkeypatch, 2.0, 1.0)
    if fault == "raises":
        monkeypatch.setattr(gpu_kernels, "takes", lambda *_: 1 / 0)
    else:
        monkeypatch.setattr(gpu_kernels, "distance", lambda found, wanted: math.nan)
    model = network()
    gpu_kernels.say_once.cache_clear()
    with fast_on_a_gpu(model, [4], **OPTIONS):
        assert not any(isinstance(module, (Depthwise, Pointwise, BatchNorm)) for module in model)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all("without our" in line for line in lines)
    assert ("ZeroDivisionError" in lines[0]) == (fault == "raises")


def test_the_distance_of_results():
    one, two = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])
    assert gpu_kernels.distance([one, two], [one, one]) == pytest.approx(0.2)
    assert gpu_kernels.distance([one * torch.nan, one], [one, one]) == math.inf


@pytest.mark.parametrize("missing, said", (("triton", ""), ("triton.language", "GPU kernels: ModuleNotFoundError: ")))
def test_without_triton_nothing_changes(monkeypatch, capsys, missing, said):
    """It is said if Triton is there and does not work."""
    gpu_kernels.say_once.cache_clear()
    monkeypatch.delitem(sys.modules, "training.triton_kernels")
    monkeypatch.delattr(sys.modules["training"], "triton_kernels")
    monkeypatch.setitem(sys.modules, missing, None)
    model = network()
    with fast_on_a_gpu(model, [8], **OPTIONS):
        assert not any(isinstance(module, (Depthwise, BatchNorm)) for module in model)
    err = capsys.readouterr().err
    assert said in err and bool(said) == bool(err)


def test_a_model_that_does_not_run_is_no_fault_of_the_kernels(capsys):
    """It stays as it was, modes included; training reports what is wrong with it."""
    gpu_kernels.say_once.cache_clear()
    model = network()
    with fast_on_a_gpu(model.append(nn.Linear(3, 3).to(DEVICE)), [8], **OPTIONS):
        assert all(module.training for module in model.modules())
    assert "without the project's GPU kernels" in capsys.readouterr().err


# ---- On a GPU ------------------------------------------------------------------------------------

@pytest.mark.cuda
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_real_shapes_on_a_gpu(dtype):
    torch.manual_seed(0)
    options = {"batch": 128, "dtype": dtype, "device": torch.device("cuda"), "captured": True}
    for channels, side, stride in ((144, 32, 2), (240, 16, 1), (1248, 4, 1), (60, 12, 1)):
        model = nn.Sequential(nn.Conv2d(3, channels, 1, bias=False), nn.Conv2d(
            channels, channels, 3, stride, 1, groups=channels, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        layers = sum(gpu_kernels.layers_of(model.cuda(), [side], **options).values(), [])
        assert [layer.kind for layer in layers] == ["depthwise", "1x1", "BatchNorm"]
        for layer in layers:
            found = gpu_kernels.measured(layer)  # a z that rounds to the other side of 0 has another gradient
            assert "error" not in found and found["distance"] < (2e-3 if dtype == torch.float32 else 0.01), layer


@pytest.mark.cuda
def test_a_graph_of_the_kernels_is_the_plain_step(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # of the layers that are not ours
    x, model = maps("triton", 4, 3, 16, 16).detach(), network()
    with everywhere(model):
        wanted = step(model, x)
        model.load_state_dict(network().state_dict())
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = step(model, x)
        graph.replay()
        torch.cuda.synchronize()
    agree(found, wanted, [0] * len(found))
