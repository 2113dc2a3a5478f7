import os
import re
from pathlib import Path

import pytest
import torch

# Most batches here are tiny, and a second thread makes them wait longer than they run. Subprocesses get the same.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
torch.backends.cudnn.allow_tf32 = False  # as threads.prepare does: results are compared with float64's
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported

from compressed import cifar100, claims, grids, networks
from compressed.exact_network import exact_network, quantize_activations
from compressed.files import save_record, save_tensors, sha256
from compressed.graph import weight_layers
from compressed.networks import load_checkpoint
from small import FEW_BITS, NARROW, SPEC, few


def pytest_runtest_setup(item):
    torch.manual_seed(0)  # the same draws whatever ran before
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


REAL, TEACHERS = os.environ.get("CIFAR100_DIR"), os.environ.get("TEACHERS_DIR")


@pytest.fixture(scope="session")
def cifar100_dir() -> Path:
    """The folder of the real set, where there is one."""
    if not REAL or not Path(REAL).is_dir():
        pytest.skip("CIFAR100_DIR does not name the real set")
    return Path(REAL).absolute()


@pytest.fixture(scope="session")
def teachers_dir() -> Path:
    """The folder of KAIST AI's files, where they are."""
    if not TEACHERS or not Path(TEACHERS).is_dir():
        pytest.skip("TEACHERS_DIR does not name KAIST AI's files")
    return Path(TEACHERS).absolute()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path):
    """Every test runs in an empty folder: it finds no data, run or recipe by accident, and leaves nothing behind.

    The patches are its own, so that a test may undo those of `monkeypatch`.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for name in ("CIFAR100_DIR", "TEACHERS_DIR"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture
def lp() -> str:
    """The penalty of one's own in training/README.md, as text; the file lp.py in the current folder holds it."""
    page = Path(__file__).resolve().parent.parent / "training" / "README.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    text, = (block for block in blocks if "class Lp" in block)
    Path("lp.py").write_text(text)
    return text


@torch.no_grad()
def sparse_network(spec: str):
    """A network with random weights, three quarters of them zero, and BatchNorm statistics of no round numbers.

    Its linear layer is fitted to the 100 made-up images that it is tested on (`--made-up 100`): some 40 are right in
    float and fewer with every rounding, so that an error in the arithmetic costs accuracy.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = networks.make(spec)
        for _, layer in weight_layers(model):
            layer.weight.mul_(torch.rand(layer.weight.shape, generator=generator) < 0.25)
        model.layers[3].conv1.weight[5] = 0  # a dead channel, whatever the draw
        norms = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
        for name, norm in norms.items():
            norm.weight.uniform_(0.5, 1.5).mul_(torch.rand(norm.weight.shape, generator=generator).sub_(0.1).sign())
            norm.weight.mul_(0.3 if name.endswith(".bn3") else 1)  # branches that only stir what the shortcuts carry
            norm.bias.normal_(0, 0.2)
            norm.momentum = 1.0
        data = cifar100.made_up(100, 1)
        x = cifar100.normalise(data.images)
        model(x)
        for norm in norms.values():
            norm.running_mean.mul_(1.01)
            norm.running_var.mul_(torch.rand(norm.weight.shape, generator=generator) * 0.1 + 1)
        features = []
        model.eval().features.register_forward_hook(lambda module, inputs, out: features.append(out))
        model(x)
        hidden = features[0] - features[0].mean(0)
        kernel = hidden @ hidden.T + 0.02 * hidden.square().sum(1).mean() * torch.eye(100)
        weight = torch.linalg.solve(kernel, 10 * torch.eye(100)[data.labels]).T @ hidden
        model.linear.weight.copy_(weight * (weight.abs() > weight.abs().median()))
        model.linear.bias.copy_(-model.linear.weight @ features[0].mean(0))
    return model


def saved(model, folder: Path) -> Path:
    save_tensors(model.state_dict(), folder / "masked.pt")
    return folder / "masked.pt"


@pytest.fixture(scope="session")
def narrow_checkpoint(tmp_path_factory) -> Path:
    """The sparse network small.NARROW: for tests that need the submission's layers, or a network made without code."""
    return saved(sparse_network(NARROW), tmp_path_factory.mktemp("narrow"))


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory) -> Path:
    """The sparse network small.Few: for every other test."""
    return saved(sparse_network(SPEC), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def fake(small_checkpoint):
    """{scheme: the small sparse network with weights that are rounded on the way}"""
    models = {}
    for scheme in grids.SCHEMES:
        models[scheme] = load_checkpoint(small_checkpoint, SPEC)
        grids.quantize_weights(models[scheme], FEW_BITS, scheme)
    return models


@pytest.fixture(scope="session")
def exact(fake):
    """{scheme: (shipped network, its tensors, its activations, the exact network)}"""
    made = {}
    for scheme, ranges in zip(grids.SCHEMES, ("max", "mse", "mse")):
        network, tensors = grids.shipped(fake[scheme], few())
        activations = grids.calibrate(fake[scheme], cifar100.made_up(20, 0).images, 8, ranges)
        made[scheme] = network, tensors, activations, exact_network(network, activations)
    return made


@pytest.fixture(scope="session")
def narrow(narrow_checkpoint, tmp_path_factory):
    """(path, model, claim) of the network small.NARROW, shipped as quantize.py does by default."""
    model = load_checkpoint(narrow_checkpoint, NARROW).to(memory_format=torch.channels_last)
    grids.quantize_weights(model, grids.bit_table(None, model), "channel")
    grids.shorten_scales(model)
    activations = grids.calibrate(model, cifar100.made_up(50, 0).images, 8, "max")
    quantize_activations(model, activations)
    network, tensors = grids.shipped(model, networks.make(NARROW))
    grids.round_shifts(network, tensors, activations)
    path = tmp_path_factory.mktemp("shipped") / "network.pt"
    save_tensors(network.state_dict(), path)
    claim = {"sha256": sha256(path), "network": claims.network(NARROW, network), "tensors": tensors,
             "activations": activations}
    save_record(claim, path.with_suffix(".json"))
    return path, load_checkpoint(path, NARROW), claim
