"""Steps recorded as CUDA graphs: what a CPU can show of them, and on a GPU that they compute what plain steps do."""
import contextlib
import dataclasses
import gc
from types import SimpleNamespace

import pytest
import torch

from compressed import cifar100
from compressed.errors import BadInput
from test_loop import LAYERS, SETTINGS, TRAIN
from tiny import tiny
from training import cuda_graphs as captured
from training import gpu_kernels, loop
from training.batchnorm import freeze
from training.loop import Processes, Settings
from training.masks import Masks, target_masks

MUON = Settings(epochs=5, batch_size=16, lr=0.05, optimizer="muon", warmup_epochs=1, clean=0.34, refresh=0)


def new_stage(folder, settings, device="cpu") -> loop.Stage:
    model = tiny().to(device, memory_format=torch.channels_last)
    data = cifar100.Images(TRAIN.images.to(device), TRAIN.labels.to(device))
    masks = Masks(model, target_masks(model, LAYERS, 0.4))
    taught_by = [tiny(seed).eval().to(device) for seed in (1, 2)]
    stage = loop.Stage("stage", model, data, settings, folder, None, 5, masks, taught_by, None, Processes())
    stage.resume(False, 0)
    return stage


def steps(stage: loop.Stage, first=0, last=MUON.epochs, prepare=lambda stage, epoch: None) -> dict:
    for epoch in range(first, last):
        prepare(stage, epoch)
        stage.begin(epoch)
        for i in range(stage.plan.epoch_steps):
            stage.step(epoch, i)
    return stage.model.state_dict() | {f"average {key}": value for key, value in stage.average.state_dict().items()} | {
        "totals": stage.totals}


def assert_close(one: dict, other: dict):
    for (key, mine), theirs in zip(one.items(), other.values(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-7), key


def test_a_step_on_given_inputs_is_the_plain_step(tmp_path):
    """What a graph records: the batch made before it, the learning rate in a tensor, which a state may hold."""
    plain, other, last = (new_stage(tmp_path, MUON) for _ in range(3))
    kinds = []

    def at_once(kind, inputs):
        kinds.append(kind)
        other.learn(lambda k: inputs, kind)
    other.graphs = SimpleNamespace(step=at_once, forget=lambda: None)
    steps(other, last=2)
    other.save()
    last.resume(True, 0)
    expected = steps(plain)
    assert_close(steps(other, first=2), expected)
    assert_close(steps(last, first=2), expected)  # plain steps go on from the state
    assert kinds == [(step % 2, 32) for step in range(15)]  # the teachers in turn
    assert other.optimizer.param_groups[0]["lr"] is other.rates[1.0]


def waits_of(waits: list):
    """A stream without a GPU, which keeps what it waits for."""
    return type("Stream", (), {"wait_stream": lambda self, other: waits.append(other)})()


@pytest.fixture
def waits(monkeypatch) -> list:
    """Streams without a GPU; the list of all waits."""
    waits = []
    stream = waits_of(waits)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    return waits


def test_each_kind_is_run_once_and_then_recorded(monkeypatch, waits):
    done = []
    graphs = captured.Graphs(lambda inputs, kind: done.append((kind, float(inputs[0]))), torch.device("cpu"))
    monkeypatch.setattr(graphs, "record", lambda kind: SimpleNamespace(
        replay=lambda: done.append((f"again {kind}", float(graphs.inputs[0])))))
    for kind, value in (("a", 1.0), ("b", 2.0), ("a", 3.0), ("a", 4.0), ("b", 5.0)):
        graphs.step(kind, (torch.tensor(value),))
    assert done == [("a", 1), ("b", 2), ("again a", 3), ("again a", 4), ("again b", 5)]
    assert len(waits) == 10  # before and after each step


@pytest.mark.parametrize("fails", (False, True))
def test_no_older_graph_is_destroyed_during_a_recording(monkeypatch, waits, fails):
    """Python's garbage collector, which could find one, waits; it goes on even if the recording fails."""
    collecting = []

    def learn(inputs, kind):
        collecting.append(gc.isenabled())
        if fails:
            raise RuntimeError("out of memory")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    graphs = captured.Graphs(learn, torch.device("cpu"))
    with pytest.raises(BadInput, match="memory.*--no-graphs") if fails else contextlib.nullcontext():
        graphs.record("a")
    assert collecting == [False] and gc.isenabled()


def test_a_stage_leaves_no_graphs(tmp_path):
    stage, forgotten = new_stage(tmp_path, SETTINGS), []
    stage.graphs = SimpleNamespace(forget=lambda: forgotten.append(True))
    with stage.fast_kernels():
        assert not forgotten
    assert forgotten == [True]


def frozen_late(stage: loop.Stage, epoch: int) -> None:
    """From the third epoch on the BatchNorm statistics stay as they are, as in fine_tune.py."""
    if epoch >= 2:
        freeze(stage.model)


def test_graphs_are_recorded_anew_in_other_modes(tmp_path, monkeypatch, waits):
    """A graph repeats the step in the modes of its recording; what is trained follows the modes of now."""
    plain, recorded = (new_stage(tmp_path, MUON) for _ in range(2))
    graphs = captured.Graphs(lambda batch, kind: recorded.learn(lambda k: batch, kind), recorded.device)

    def record(kind):
        modes = [module.training for module in recorded.model.modules()]

        def replay():
            for module, mode in zip(recorded.model.modules(), modes):
                module.training = mode
            graphs.learn(graphs.inputs, kind)
        return SimpleNamespace(replay=replay)
    monkeypatch.setattr(graphs, "record", record)
    recorded.graphs = graphs
    assert_close(steps(recorded, prepare=frozen_late), steps(plain, prepare=frozen_late))


def test_muons_steps_beside_the_backward_pass_are_the_same(tmp_path, monkeypatch, waits):
    """Every group is turned once, as soon as its last gradient is there; the next step waits for the streams."""
    stream = waits_of(waits)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: stream)
    plain, early = (new_stage(tmp_path, MUON) for _ in range(2))
    order, muon = [], early.optimizer
    turn, step = muon.turn, muon.step
    monkeypatch.setattr(muon, "turn", lambda group, length: order.append("turn") or turn(group, length))
    monkeypatch.setattr(muon, "step", lambda: order.append("step") or step())
    with muon.made_early():
        found = steps(early, last=2)
    groups = len(muon.groups)
    assert groups and order == 2 * early.plan.epoch_steps * [*groups * ["turn"], "step"]
    assert_close(found, steps(plain, last=2))
    order.clear()
    early.begin(0)
    early.step(0, 0)
    assert order == ["step", *groups * ["turn"]]  # the hooks are gone
    assert muon.streams.busy
    muon.streams.for_each(lambda group: None, [])
    assert not muon.streams.busy and waits[-1] is stream


def test_on_a_cpu_nothing_is_recorded_and_no_triton_kernel_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_kernels, "faster", lambda *args, **options: pytest.fail("there is no GPU"))
    stage = new_stage(tmp_path, SETTINGS)
    with stage.fast_kernels():
        classes = {type(module) for module in stage.model.modules()}
    assert stage.graphs is None and not any(issubclass(each, (gpu_kernels.BatchNorm, gpu_kernels.Depthwise))
                                            for each in classes)


def test_the_kernels_are_chosen_for_the_steps_to_come(tmp_path, monkeypatch):
    """The image sizes of the rest of the stage, the batch of this process, and how steps are run."""
    found = []
    monkeypatch.setattr(gpu_kernels, "faster", lambda model, sizes, **options: found.append((sizes, options)) or {})
    settings = dataclasses.replace(MUON, sizes="16:0.4,32", precision="bfloat16")
    stage = new_stage(tmp_path, settings)
    stage.device = torch.device("cuda")
    for stage.progress["step"] in (0, 10):
        with stage.fast_kernels():
            pass
    options = {"batch": 16, "dtype": torch.bfloat16, "device": stage.device, "captured": False, "seen": [],
               "kinds": gpu_kernels.KINDS}
    assert found == [([16, 32], options), ([32], options)]


@pytest.mark.cuda
def test_graphs_compute_what_plain_steps_do(tmp_path, monkeypatch):
    """The augmentation, the teachers and Muon on streams of their own, too."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # Muon makes much of the last bits
    plain, recorded = new_stage(tmp_path, MUON, "cuda"), new_stage(tmp_path, MUON, "cuda")
    recorded.kernels = ()
    plain.graphs = plain.batch_stream = plain.teacher_stream = None
    expected = steps(plain, prepare=frozen_late)
    with recorded.fast_kernels():
        found = steps(recorded, prepare=frozen_late)
        assert all(recorded.graphs.graphs.values())  # each kind was recorded
    for (key, one), two in zip(expected.items(), found.values(), strict=True):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-5), key
