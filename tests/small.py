"""A small network in the shipped format, and a run's records, for tests of everything that reads them."""
import json
from pathlib import Path

import torch
from torch import nn

from compressed import cifar100, claims, grids
from compressed.files import save_record
from compressed.formats import code_range
from compressed.graph import read_graph, weight_layers
from compressed.integer_network import IntegerNetwork
from mobilenet_v2 import MobileNetV2, Table

CLASSES, WIDTH = 7, 0.25
NARROW = "mobilenet_v2:MobileNetV2?width=0.5"  # the narrowest with every layer and shortcut of the submission's
SPEC = f"{Path(__file__).resolve()}:Few"


class Few(MobileNetV2):
    """The first seven blocks of the submission's table, narrow: every kind of layer and shortcut that it has."""

    def __init__(self, num_classes: int = 100):
        stages = ((1, 16, 1, 1), (4, 24, 2, 1), (4, 32, 3, 2), (4, 64, 1, 2))
        super().__init__(num_classes, 1.0, Table(stages, stem=24, head=128))


FEW_BITS = [8, 6, 8] * 8 + [8, 8]  # a bit table


def few(classes: int = 100) -> Few:
    return Few(classes).eval()


def with_hardswish(model: MobileNetV2) -> MobileNetV2:
    """Replace every ReLU of a model by a hard swish, in place."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.ReLU:
            model.set_submodule(name, nn.Hardswish())
    return model


@torch.no_grad()
def tiny_network(classes: int = CLASSES, width: float = WIDTH) -> tuple[MobileNetV2, dict]:
    """A small network as quantize.py ships it, and its claim: 6 and 8 bits, most weights 0, scales of either sign."""
    generator, tensors = torch.Generator().manual_seed(0), []
    model = MobileNetV2(classes, width).eval()
    layers = dict(weight_layers(model))
    for index, (name, layer) in enumerate(layers.items()):
        low, high = code_range(bits := (6, 8)[index % 2])
        codes = torch.randint(low, high + 1, layer.weight.shape, generator=generator)
        codes *= torch.rand(codes.shape, generator=generator) < 0.4
        layer.weight.copy_(codes * 2.0 ** (1 - bits))
        tensors.append({"name": f"{name}.weight", "bits": bits, "step": 2.0 ** (1 - bits)})
    model.layers[3].conv1.weight[5] = 0
    for name, norm in model.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            conv = layers[name.replace("bn", "conv").replace("shortcut.1", "shortcut.0")].weight
            size = torch.rand(len(conv), generator=generator).add(0.5) / (0.13 * conv[0].numel()) ** 0.5
            norm.weight.copy_((size * torch.randn(len(conv), generator=generator).add(1).sign()).half())
            norm.weight[conv.flatten(1).count_nonzero(1) == 0] = 0
            norm.bias.copy_(0.3 * torch.randn(len(conv), generator=generator))
            norm.running_var.fill_(1 - norm.eps)
            tensors.append({"name": f"{name}.weight", "bits": 16, "kind": "float16"})
            tensors.append({"name": f"{name}.bias"} | grids.store_fixed(norm.bias))
    model.linear.bias.copy_(torch.randn(classes, generator=generator))
    tensors.append({"name": "linear.bias"} | grids.store_fixed(model.linear.bias))
    order = [name for name, _ in model.named_parameters()]
    activations = grids.calibrate(model, cifar100.made_up(20, 3).images, 8, "max")
    return model, {"tensors": sorted(tensors, key=lambda t: order.index(t["name"])), "activations": activations,
                   "network": claims.network(f"mobilenet_v2:MobileNetV2?width={width}", model)}


def layer_neighbours(model: nn.Module) -> dict[str, tuple[str, str]]:
    """{convolution: (its BatchNorm, the activation point that it reads)}."""
    return {branch.name: (branch.norm, branch.source) for branch in read_graph(model).layers if branch.norm}


def points(model: nn.Module, bits: int = 8, step: float = 2.0**-5) -> list[dict]:
    """Return the entries of a claim for a prepared network's activation points."""
    return [{"name": name, "bits": bits, "signed": signed, "step": step}
            for name, signed in read_graph(model).activation_points.items()]


def integer_logits(network: nn.Module, claim: dict, images: torch.Tensor) -> torch.Tensor:
    """Return the logits, float32, of a network in integer arithmetic. claim: "tensors" and "activations"."""
    integers = IntegerNetwork(network, claim)
    return (integers(images).double() * 2.0**integers.logit_exponent).float()


def save_stage(folder, stage: str, options=(), lines=({"step": 1, "epoch": 1},), **record) -> None:
    """Write the options of a stage and, if it has lines, its log into a run folder, as training/main.py leaves them."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_record({"settings": {}, "options": dict(options)} | record, Path(folder, f"{stage}.options.json"))
    if lines:
        Path(folder, f"{stage}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def random_network(seed=0, **options):
    """Return a MobileNetV2 in eval mode with random weights and BatchNorms."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MobileNetV2(**options).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.data.normal_(0.5, 0.3)
                module.running_var.uniform_(0.5, 2)
    return model
