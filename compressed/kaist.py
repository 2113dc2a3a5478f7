"""KAIST AI's ver2 networks, 3rd place of the challenge on CIFAR-100, and how their authors count them.

Repository Kthyeon/micronet_neurips_challenge, MIT licence (Copyright (c) 2019 Kthyeon).
"""
import dataclasses
import functools

from torch import Tensor, nn

from compressed import counting
from compressed.errors import BadInput
from compressed.graph import trace, weight_layers
from compressed.networks import fill, is_plain, load_state
from compressed.normalisation import scale_and_shift
from mobilenet_v2 import KAIST, GatedBlock, MobileNetV2

MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)  # of RGB / 255, as their authors trained with
# in place: a teacher is evaluated at every training step
TABLE = dataclasses.replace(KAIST, activation=functools.partial(nn.Hardswish, inplace=True))


class StoredBlock(GatedBlock):
    """A block as KAIST's files have it: the gate's layers are there with stride 2 too, where nothing uses them."""
    gates = (1, 2)


class Micronet(MobileNetV2):
    """KAIST's network: [N, 3, 32, 32] images normalised by cifar100.normalise -> [N, 100] logits."""
    block = StoredBlock

    def __init__(self):
        super().__init__(100, 1.0, TABLE)
        for name, values in zip(("scale", "shift"), scale_and_shift(MEAN, STD)):
            self.register_buffer(name, values.float()[:, None, None], persistent=False)

    def forward(self, x):
        return super().forward(x * self.scale + self.shift)


def load_micronet(path) -> Micronet:
    """Return KAIST's network from one of its files, in eval mode; a pruned layer's weight is `weight` times `mask`.

    Raises BadInput if the file is missing, damaged, or of another network.
    """
    state = load_state(path)
    for key in [key for key in state if key.endswith(".mask")]:
        mask, weight = state.pop(key), key.removesuffix("mask") + "weight"
        fits = weight in state and is_plain(mask) and is_plain(state[weight]) and state[weight].shape == mask.shape
        if not fits:
            raise BadInput(f"{path}: {key} belongs to no weight of its shape")
        state[weight] = state[weight] * mask
    return fill(Micronet(), state, f"{path} is none of KAIST's networks")


def folded(model: Micronet) -> dict[str, Tensor]:
    """Return the state dict of mobilenet_v2.KaistMobileNetV2 that computes what a network of KAIST's does.

    The input normalisation goes into the first convolution and its BatchNorm, so its zero padding now means grey
    pixels: exact except at the feature map's border. The layers that nothing uses are left out.
    """
    unused = tuple(f"layers.{i}.fc" for i, block in enumerate(model.layers) if not block.residual)
    state = {key: value.clone() for key, value in model.state_dict().items() if not key.startswith(unused)}
    state["bn1.running_mean"] -= (state["conv1.weight"] * model.shift).sum((1, 2, 3))
    state["conv1.weight"] *= model.scale
    return state


def authors_count(model: Micronet) -> dict[str, float]:
    """Return {"parameters", "operations", "score"} of a published network as its authors count it, in 32-bit units.

    Every stored value has 16 bits, and every weight a mask bit; a BatchNorm is a bias alone. Multiplications have 16
    bits, additions 32. Hard swish is 4 multiplications and an addition, and neither the scaling by squeeze and
    excitation nor a residual addition counts. They publish 0.0056215. This function counts what runs, 0.0056190. The
    published figure results exactly if the squeeze and excitation of strided blocks, which never runs, is counted too,
    and a sigmoid as a hard swish: that is our inference.
    """
    weights = [module.weight for _, module in weight_layers(model)]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    biases = [module.bias for _, module in weight_layers(model) if module.bias is not None] + [n.bias for n in norms]
    parameters = sum(int(w.count_nonzero()) / 2 + w.numel() / 32 for w in weights) + sum(map(len, biases)) / 2
    multiplications = additions = 0
    for op in trace(model):
        if op.kind in ("conv", "linear"):
            terms, positions = op.module.weight.flatten(1).count_nonzero(1), op.outputs // op.channels
            multiplications += int(terms.sum()) * positions
            additions += int((terms - 1).clamp(min=0).sum()) * positions + op.outputs  # and a bias
        elif op.kind in ("hardswish", "sigmoid", "mean"):
            multiplications += (4 if op.kind == "hardswish" else 1) * op.outputs
            additions += {"hardswish": 1, "sigmoid": 0, "mean": op.fan_in - 1}[op.kind] * op.outputs
    operations = multiplications / 2 + additions
    return {"parameters": parameters, "operations": operations,
            "score": parameters / counting.STORAGE_BASE + operations / counting.OPERATIONS_BASE}
