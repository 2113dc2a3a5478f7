"""Shares of a batch, replicas, and what is avoided on a CPU. Several processes are tested in test_loop.py."""
import threading

import pytest
import torch
from torch import nn

from compressed import threads
from training.cpu_kernels import fast_on_a_cpu
from training.replicas import Processes, Replicas, shares


@pytest.mark.parametrize("count", (1, 2, 3, 4, 5, 7, 16, 26, 50, 51))
@pytest.mark.parametrize("parts", (1, 2, 3, 8))
def test_shares(count, parts):
    found = shares(count, parts)
    sizes = [part.stop - part.start for part in found]
    assert [i for part in found for i in range(count)[part]] == list(range(count))
    assert len(found) == max(1, min(parts, count // 2))
    assert all(size % 2 == 0 for size in sizes[:-1]) and max(sizes) - min(sizes) <= 3 and min(sizes) >= min(2, count)


def test_threads_keep_the_order_and_compute_at_the_same_time():
    meeting = threading.Barrier(3, timeout=20)  # passes only if all three are there
    assert threads.in_threads(lambda k: (meeting.wait(), k)[1], range(3)) == [0, 1, 2]
    names = threads.in_threads(lambda k: threading.current_thread().name, range(2))
    assert names[0] == threading.current_thread().name != names[1]
    assert threads.in_threads(lambda k: torch.get_num_threads(), range(3))[1:] == [1, 1]
    assert threads.in_threads(str, [5]) == ["5"]


@pytest.mark.parametrize("failing", (0, 1, 2))
def test_an_error_in_a_thread_is_raised_once_all_are_done(failing):
    done = []

    def work(k):
        if k == failing:
            raise ValueError(k)
        done.append(k)
    with pytest.raises(ValueError, match=str(failing)):
        threads.in_threads(work, range(3))
    assert sorted(done) == [k for k in range(3) if k != failing]


@pytest.mark.parametrize("cores", (1, 2, 3, 8))
def test_tensors_are_dealt_to_the_cores(monkeypatch, cores):
    monkeypatch.setattr(threads, "cores", lambda: cores)
    ours, theirs = ([torch.full((2,), float(k), requires_grad=True) for k in range(5)] for _ in range(2))
    seen = []

    def add(some, others):
        seen.append(len(some))
        torch._foreach_add_(some, others)  # of leaves that require gradients: without gradients in every thread
    threads.for_each(add, ours, theirs)
    assert [int(each[0]) for each in ours] == [0, 2, 4, 6, 8]
    assert sum(seen) == 5 and len(seen) == min(cores, 5) and max(seen) - min(seen) <= 1
    threads.for_each(add, [], [])
    assert sum(seen) == 5


def test_replicas_share_weights_and_nothing_else():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout())
    replicas = Replicas(model, 3)
    model[2].eval()
    model[1].running_mean.fill_(7)
    replicas.follow()
    for k, each in enumerate(replicas.models):
        assert each[0].weight.data_ptr() == model[0].weight.data_ptr() and not each[2].training and each[1].training
        assert (each[1].running_mean == 7).all()
        each[0].weight.grad, each[0].bias.grad = torch.full_like(each[0].weight, 10.0**k), torch.zeros(4)
        each[1].weight.grad, each[1].bias.grad = torch.zeros(4), torch.zeros(4)
        each[1].running_mean.fill_(3 * k)
    replicas.gather(Processes())
    assert (model[0].weight.grad == 111).all()
    assert all((each[1].running_mean == 3).all() for each in replicas.models)


def test_a_block_that_a_share_leaves_out():
    """Stochastic depth: gradients are summed by parameter, and other buffers follow, such as numbers of batches."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2, momentum=None))
    replicas = Replicas(model, 2)
    model[3].num_batches_tracked.fill_(5)
    for each, left_out in zip(replicas.models, (0, 1)):
        for k, layer in enumerate(each[:2]):
            for parameter in layer.parameters():
                parameter.grad = None if k == left_out else torch.full_like(parameter, k + 1.0)
    replicas.gather(Processes())
    assert [float(layer.weight.grad.unique()) for layer in model[:2]] == [1, 2] and model[2].weight.grad is None
    assert replicas.models[1][3].num_batches_tracked == 5


def test_what_is_avoided_on_a_cpu():
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, 2, 1, groups=6),
                          nn.Conv2d(6, 6, 3, 1, 1, groups=6), nn.ReLU())
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = model(x)
    with fast_on_a_cpu(model):
        assert torch.equal(model(x), plain)  # no autocast, as in an evaluation: nothing changes
        with torch.autocast("cpu", torch.bfloat16):
            first = model[0](x)
            strided, other = model[1](first), model[2](first)
            assert torch.equal(model[3](first), first.relu())  # without a BatchNorm before it: as it was
            model[1](first.detach()).float().square().sum().backward()  # the way of a training step
    assert first.dtype == strided.dtype == other.dtype == torch.bfloat16
    wanted = model[1](first.float())
    assert torch.equal(strided, wanted.bfloat16()) and wanted.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(model[1](first), strided)  # bfloat16 weights round
    taught = model[1].weight.grad.clone()
    model[1].zero_grad()
    model[1](first.detach().float()).square().sum().backward()
    assert torch.allclose(taught, model[1].weight.grad, rtol=0.02, atol=0.02 * taught.abs().max().item())
    assert [type(layer) for layer in model] == [nn.Conv2d] * 3 + [nn.ReLU] and not model[3].inplace
