"""The Triton kernels compared with PyTorch's functions in float64, and where they are used.

Without a GPU they are interpreted.
"""
import copy
import math
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from small import with_hardswish
from training import gpu_kernels
from training.cpu_kernels import exchanged, normalisations, with_activations
from training.gpu_kernels import BatchNorm, Depthwise, fast_on_a_gpu

pytest.importorskip("triton", reason="there is no Triton")
triton_kernels = pytest.importorskip("training.triton_kernels")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and type(triton_kernels.moment_parts).__name__ != "InterpretedFunction":
    pytest.skip("Triton was imported without TRITON_INTERPRET=1", allow_module_level=True)
cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}  # a last place: the interpreter cuts, a GPU rounds
PYTORCHS = {"none": lambda z: z, "relu": F.relu, "hardswish": F.hardswish}
OPTIONS = {"batch": 2, "dtype": torch.bfloat16, "device": torch.device(DEVICE), "captured": False}


def maps(*shape, dtype=torch.float32):
    x = torch.randn(shape) * (0.2 + torch.rand(shape[1]))[:, None, None] + torch.randn(shape[1])[:, None, None]
    return x.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


def agree(found: list, wanted: list, tolerances: list) -> None:
    for k, (mine, theirs, tolerance) in enumerate(zip(found, wanted, tolerances, strict=True)):
        error = (mine - theirs).abs().max().item()
        assert error <= tolerance * theirs.abs().max().item() + 1e-6, (k, error)


# ---- The kernels ---------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("shape", ((2, 12, 7, 5), (1, 40, 1, 1), (3, 8, 6, 3), (1, 1, 4, 9), (1, 33, 9, 2)))
def test_depthwise_convolution(shape, stride, dtype):
    """Odd sides, maps of one pixel, one channel, and channels that do not fill their block."""
    torch.manual_seed(0)
    x, weight = maps(*shape, dtype=dtype), torch.randn(shape[1], 1, 3, 3, device=DEVICE, requires_grad=True)
    double, wide = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    wanted, found = F.conv2d(double, wide, None, stride, 1, 1, shape[1]), triton_kernels.depthwise(x, weight, stride)
    assert found.shape == wanted.shape and found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    gradient = torch.randn(wanted.shape, device=DEVICE).to(dtype)
    wanted.backward(gradient.double())
    found.backward(gradient)
    assert x.grad.dtype == dtype and weight.grad.dtype == torch.float32
    agree([found, x.grad, weight.grad], [wanted, double.grad, wide.grad], [TOLERANCE[dtype], TOLERANCE[dtype], 1e-5])


def pair(channels: int, activation: str, sizes) -> tuple[nn.BatchNorm2d, BatchNorm]:
    """(PyTorch's BatchNorm in float64, ours)."""
    torch.manual_seed(channels)
    norm = nn.BatchNorm2d(channels).to(DEVICE)
    for values in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(values)
    ours = copy.deepcopy(norm)
    ours.__class__, ours.activation, ours.sizes = BatchNorm, activation, sizes
    return norm.double(), ours


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", PYTORCHS)
@pytest.mark.parametrize("shape", ((2, 3, 5, 7), (2, 70, 9, 9), (3, 40, 4, 4), (1, 1, 1, 130), (9, 36, 1, 1)))
def test_batchnorm_with_an_activation(shape, activation, dtype):
    (norm, ours), x = pair(shape[1], activation, (shape[2:],)), maps(*shape, dtype=dtype)
    double = x.detach().double().requires_grad_()
    z = norm(double)
    wanted, clear = PYTORCHS[activation](z), torch.ones(shape, dtype=torch.bool, device=DEVICE)
    for jump in {"none": (), "relu": (0,), "hardswish": (-3, 3)}[activation]:
        clear &= (z.detach() - jump).abs() > 0.001  # elsewhere rounding decides on which side of a jump z is
    found, gradient = ours(x), torch.randn(shape, device=DEVICE).to(dtype) * clear
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    wanted.backward(gradient.double())
    found.backward(gradient)
    agree([found, x.grad, ours.weight.grad, ours.bias.grad, ours.running_mean, ours.running_var],
          [wanted, double.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var],
          2 * [max(TOLERANCE[dtype], 5e-5)] + 4 * [5e-5])
    assert ours.num_batches_tracked == norm.num_batches_tracked == 1


@pytest.mark.parametrize("activation", ("relu", "hardswish"))
def test_at_the_jumps_of_the_derivative(activation):
    """With a weight of 0, z is the bias to the last bit; there PyTorch's derivative is taken."""
    z = torch.tensor([-4.0, -3.0, -1.5, 0.0, 1.5, 3.0, 4.0], device=DEVICE)
    norm, ours = pair(len(z), activation, ((2, 2),))
    for each in (norm.float(), ours):
        nn.init.zeros_(each.weight)
        each.bias.data.copy_(z)
    x = maps(2, len(z), 2, 2)
    gradient = torch.randn_like(x)
    ours(x).backward(gradient)
    PYTORCHS[activation](norm(x.detach())).backward(gradient)
    agree([ours.bias.grad, ours.weight.grad], [norm.bias.grad, norm.weight.grad], [1e-5, 1e-4])


@pytest.mark.parametrize("activation", PYTORCHS)
def test_what_is_not_finite_stays_so(activation):
    x, ours = maps(2, 8, 4, 4), pair(8, activation, ((4, 4),))[1]
    with torch.no_grad():
        x[0, 3, 0, 0] = torch.nan
    y = ours(x)
    assert y[:, 3].isnan().all() and y[:, :3].isfinite().all() and ours.running_var[3].isnan()
    y.sum().backward()
    assert x.grad[:, 3].isnan().all() and x.grad[:, :3].isfinite().all()
    x = torch.ones(1, 8, 4, 4, device=DEVICE)
    x[0, 3, 0, 0], x[0, 5, 3, 3] = torch.nan, torch.inf
    y = triton_kernels.depthwise(x, torch.ones(8, 1, 3, 3, device=DEVICE), 1)
    assert y[0, 3, :2, :2].isnan().all() and (y[0, 5, 2:, 2:] == torch.inf).all()
    assert int((~y.isfinite()).sum()) == 8


def test_results_do_not_depend_on_the_tiling(monkeypatch):
    """One tile or many, a program for each or one that has them all, whole maps or maps divided among programs."""
    results = []
    for tiling, programs in (((32, 16, 4, 5), 1056), ((8, 8, 4, 2), 1), ((4, 8, 4, 1), 4)):
        for operator in triton_kernels.TILINGS:
            monkeypatch.setitem(triton_kernels.TILINGS, operator, [tiling])
        monkeypatch.setattr(triton_kernels, "PROGRAMS", programs)
        torch.manual_seed(0)
        ours, x, weight = pair(12, "relu", ((5, 4),))[1], maps(1, 12, 5, 4), torch.randn(12, 1, 3, 3, device=DEVICE)
        weight.requires_grad_()
        out = [triton_kernels.depthwise(ours(x), weight, stride) for stride in (1, 2)]
        results.append([*out, *torch.autograd.grad([y.sum() for y in out], [x, weight, *ours.parameters()])])
    for other in results[1:]:
        agree(other, results[0], [1e-4] * len(other))


def test_other_memory_formats():
    """A gradient that is expanded or transposed, and an input that is not channels-last."""
    x, weight = torch.randn(2, 6, 5, 4, device=DEVICE), torch.randn(6, 1, 3, 3, device=DEVICE)
    layouts = [x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)]
    for gradient in (torch.randn(2, 6, 5, 4, device=DEVICE), torch.randn(2, 6, 1, 1, device=DEVICE).expand(2, 6, 5, 4)):
        found = []
        for each in layouts:
            each, ours = each.clone(memory_format=torch.preserve_format).requires_grad_(), pair(6, "relu", ((5, 4),))[1]
            y = triton_kernels.depthwise(ours(each), weight, 1)
            found.append([y, *torch.autograd.grad(y, [each, ours.weight], gradient)])
        for other in found[1:]:
            agree(other, found[0], [0, 0, 0])


def test_the_operators_are_what_pytorch_expects():
    """Shapes for the compiler, no hidden changes of arguments, gradients for autograd."""
    x, weight, vector = maps(2, 6, 5, 4), torch.randn(6, 1, 3, 3, device=DEVICE), torch.rand(6, device=DEVICE)
    dy = triton_kernels.depthwise(x.detach(), weight, 2)
    statistics = triton_kernels.normalise(x.detach(), vector, vector, vector, 1e-5, 1)[1]
    for operator, args in ((triton_kernels.depthwise, (x, weight.requires_grad_(), 2)),
                           (triton_kernels.depthwise_input_gradient, (dy, weight.detach(), 5, 4, 2)),
                           (triton_kernels.depthwise_weight_gradient, (x.detach(), dy, 2)),
                           (triton_kernels.normalise, (x, vector.clone().requires_grad_(), vector, vector, 1e-5, 1)),
                           (triton_kernels.normalise_gradients, (dy, dy, vector, vector, statistics, 1))):
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_autograd_registration",
                                                          "test_faketensor"))


COMPILE = """
import re, triton
from triton.backends.compiler import GPUTarget
from training import triton_kernels
KINDS = dict.fromkeys(("x", "y", "dx", "dy"), "*bf16") | dict.fromkeys(("eps", "correction"), "fp32") | dict.fromkeys(
    ("rows", "images", "height", "width", "groups", "share"), "i32")
tile = {"ALIGN": 8, "POSITIONS": 32, "CHANNELS": 32}
for name, constants in (("moment_parts", {}), ("normalised", {"ACTIVATION": 2}), ("gradient_parts", {"ACTIVATION": 2}),
                        ("normalised_gradient", {"ACTIVATION": 1}), ("convolved", {"STRIDE": 1, "FLIPPED": True}),
                        ("convolved", {"STRIDE": 2, "FLIPPED": False}), ("spread", {}), ("weight_parts", {"STRIDE": 1}),
                        ("weight_parts", {"STRIDE": 2})):
    kernel, constants = getattr(triton_kernels, name), constants | tile
    kinds = {arg: "constexpr" if arg in constants else KINDS.get(arg, "*fp32") for arg in kernel.arg_names}
    source = triton.compiler.ASTSource(
        kernel, kinds, {(kernel.arg_names.index(arg),): value for arg, value in constants.items()},
        {(k,): [["tt.divisibility", 16]] for k, kind in enumerate(kinds.values()) if kind[0] == "*"})
    compiled = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 4})
    assert re.search(r"ld\\.global\\S*\\.v4", compiled.asm["ptx"]), name + " loads no vectors"
"""


def test_they_compile_for_an_h100(tmp_path):
    """What the interpreter does not show: types, shapes in loops, and loads of 16 bytes. It needs no GPU."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True,
                          env=environment | {"TRITON_CACHE_DIR": str(tmp_path)})
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
    """Use the kernels in all layers that fit, for all sizes."""
    sizes = [(side, side) for side in range(1, 33)]
    depthwise = type("Depthwise", (Depthwise,), {"sizes": sizes})
    return exchanged({module: depthwise for module in model.modules() if type(module) is nn.Conv2d
                      and Depthwise.fits(module)} | with_activations(normalisations(model), BatchNorm, sizes=sizes))


def step(model: nn.Module, x, half: bool = True) -> list:
    model.zero_grad()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
        y = model(x)
    y.float().logsumexp(1).mean().backward()
    return [y.float(), *(p.grad for p in model.parameters()), *(b.clone().float() for b in model.buffers())]


@pytest.mark.parametrize("activation", (nn.ReLU, nn.Hardswish))
@pytest.mark.parametrize("compiled", (False, True))
def test_a_step_of_a_network(activation, compiled):
    """In bfloat16 it is as near to float32's as without the kernels; torch.compile takes the operators as they are."""
    x, found = maps(4, 3, 8, 8).detach(), []
    for context, half in ((everywhere, True), (nullcontext, True), (nullcontext, False)):
        model = network(activation)
        with context(model):
            run = torch.compile(model, backend="aot_eager") if compiled and context is everywhere else model
            found.append(step(run, x, half))
        assert [type(module) for module in model] == [type(module) for module in network(activation)]
    for ours, theirs, exact in zip(*found, strict=True):
        assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + 0.01 * exact.norm()


def test_in_eval_mode_and_for_other_sizes_it_is_pytorchs(monkeypatch):
    def fail(*_):
        raise AssertionError("the kernels are not to be used")
    model, x = network().eval(), maps(2, 3, 8, 8).detach()
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
    triton_kernels.chosen.clear()
    again = []

    def seconds(work, captured, device):
        work()
        again[:] = again or times
        return again.pop(0)
    monkeypatch.setattr(gpu_kernels, "seconds", seconds)


def test_the_faster_of_both_is_used(monkeypatch, capsys):
    """Layers are timed at the sizes of their inputs: PyTorch's, then the tilings of the operators, then ours."""
    depthwise, normalised = [5.0, 2, 1, 3, 1, 2, 3, 3, 2, 1, 4.0], [5.0, 1, 2, 3, 3, 2, 1, 6.0]
    timed(monkeypatch, *depthwise, *normalised * 3)
    model = network()
    with fast_on_a_gpu(model, [4], compiled=False, **OPTIONS):
        assert isinstance(model[3], Depthwise) and model[3].sizes == ((4, 4),)
        assert type(model[1]) is nn.BatchNorm2d and type(model[2]) is nn.ReLU and model[1].training
        found = step(model, maps(2, 3, 4, 4).detach())
    assert type(model[3]) is nn.Conv2d and all(value.isfinite().all() for value in found)
    key = 16, 4, 4, 2
    for operator, best in (("depthwise", 1), ("depthwise_input_gradient", 0), ("depthwise_weight_gradient", 2)):
        assert triton_kernels.chosen[operator, *key] == triton_kernels.TILINGS[operator][best]
    assert "Triton: 1 of 1 depthwise layers, 0 of 3 BatchNorm layers" in capsys.readouterr().out


def test_a_fused_activation(monkeypatch):
    timed(monkeypatch, 5.0, *[1.0] * 6, 4.0)
    monkeypatch.setattr(gpu_kernels, "KINDS", ("BatchNorm",))
    model = network()
    with fast_on_a_gpu(model, [2, 4], compiled=False, **OPTIONS):
        assert [type(model[k]) for k in (2, 5)] == [nn.Identity] * 2 and type(model[3]) is nn.Conv2d
        assert [model[k].activation for k in (1, 4, 7)] == ["relu", "relu", "none"]
        assert model[4].sizes == ((1, 1), (2, 2))


@pytest.mark.parametrize("fault", ("raises", "is wrong", "is not a number"))
def test_a_kernel_that_fails_is_not_used(fault, monkeypatch, capsys):
    timed(monkeypatch, *[2.0, 1.0] * 20)
    if fault == "raises":
        def broken(*_):
            raise RuntimeError("out of resource: registers")
        monkeypatch.setattr(gpu_kernels, "choose_tilings", broken)
    else:
        monkeypatch.setattr(gpu_kernels, "AGREEMENT", -1.0 if fault == "is wrong" else math.inf)
        if fault == "is not a number":
            monkeypatch.setattr(gpu_kernels, "distance", lambda found, wanted: math.nan)
    model = network()
    gpu_kernels.say_once.cache_clear()
    with fast_on_a_gpu(model, [4], compiled=False, **OPTIONS):
        assert not any(isinstance(module, (Depthwise, BatchNorm)) for module in model)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all("without Triton's" in line for line in lines)
    assert ("out of resource" in lines[0]) == (fault == "raises")


def test_without_triton_nothing_changes(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "training.triton_kernels", None)
    monkeypatch.delattr(sys.modules["training"], "triton_kernels", raising=False)
    model = network()
    with fast_on_a_gpu(model, [8], compiled=False, **OPTIONS):
        assert not any(isinstance(module, (Depthwise, BatchNorm)) for module in model)
    assert capsys.readouterr() == ("", "")


def test_a_model_that_does_not_run_is_no_fault_of_the_kernels(capsys):
    """It stays as it was, modes included; training reports what is wrong with it."""
    gpu_kernels.say_once.cache_clear()
    model = network()
    with fast_on_a_gpu(model.append(nn.Linear(3, 3).to(DEVICE)), [8], compiled=False, **OPTIONS):
        assert all(module.training for module in model.modules())
    assert "without Triton's kernels" in capsys.readouterr().err


# ---- On a GPU ------------------------------------------------------------------------------------

@cuda
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_real_shapes_on_a_gpu(dtype):
    for kind, channels, side, stride in (("depthwise", 144, 32, 2), ("depthwise", 240, 16, 1), ("depthwise", 60, 12, 1),
                                         ("BatchNorm", 40, 32, 1), ("BatchNorm", 1248, 4, 1), ("BatchNorm", 60, 3, 1)):
        found = gpu_kernels.measured(gpu_kernels.Layer(kind, channels, side, side, stride, "relu", 128, dtype,
                                                       torch.device("cuda"), True))
        assert "error" not in found and found["distance"] < (1e-5 if dtype == torch.float32 else 0.01)


@cuda
def test_a_graph_of_the_kernels_is_the_plain_step():
    x, model = maps(4, 3, 16, 16).detach(), network()
    with everywhere(model):
        wanted = step(model, x)
        model.load_state_dict(network().state_dict())
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = step(model, x)
        graph.replay()
        torch.cuda.synchronize()
    agree(found, wanted, [0] * len(found))
