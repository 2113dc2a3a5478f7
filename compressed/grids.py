"""Grids: choose steps and widths for a network's weights and activations, and store every value on them.

`quantize_weights` and `quantize_activations` make a network that computes on its grids, `shipped` one whose stored
values all stand on them. Source of the rounding: the submission's linear, symmetric quantizer (power_of_two_step).
"""
import dataclasses
import tomllib
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressed import cifar100, threads
from compressed.command_line import with_progress
from compressed.errors import BadInput
from compressed.evaluation import divided
from compressed.exact_network import folded
from compressed.formats import code_range, codes, fake_quantize, power_of_two_step
from compressed.graph import read, weight_layers
from compressed.operations import traced

# the submission's QBNs, by their places among its 58 layers; every other layer has 8 bits
SIX_BITS = {3: "layers.0.conv3", 5: "layers.1.conv1", 8: "layers.1.shortcut.0", 10: "layers.2.conv2",
            11: "layers.2.conv3", 14: "layers.3.conv3", 16: "layers.4.conv2", 19: "layers.5.conv2",
            55: "layers.16.shortcut.0"}
LAYERS = 58
SCHEMES = ("power-of-two", "layer", "channel")
RANGES = ("max", "mse", "logits")
SHIFT_BITS = 16
SIGNIFICANT_BITS = 5  # of a short scale; what is stored is a float16, which has 11


@dataclasses.dataclass(frozen=True)
class Options:
    """What decides the grids of a network: the options of quantize.py of the same names.

    table: the bits of each layer, see `bit_table`. calibration, renew: numbers of train images.
    """
    scheme: str
    table: tuple[int, ...]
    ranges: str
    activation_bits: int
    calibration: int
    renew: int
    augment: str
    seed: int


# ---- Steps of weights ----------------------------------------------------------------------------

def free_step(weight: Tensor, bits: int, channel: bool) -> Tensor:
    """The step, [1, 1, ...] or [out, 1, ...], with the least squared error among 40 clipping points of max|w|."""
    dims = tuple(range(1, weight.dim())) if channel else tuple(range(weight.dim()))
    low, high = code_range(bits)
    largest = weight.abs().amax(dims, keepdim=True).clamp_min(1e-12)
    best, least = None, None
    for share in torch.linspace(0.4, 1.0, 40).tolist():
        step = largest * share / high
        error = (codes(weight, step, low, high) * step - weight).square().sum(dims, keepdim=True)
        best = step if best is None else torch.where(error < least, step, best)
        least = error if least is None else torch.minimum(error, least)
    return best


def has_the_submissions_layers(names: list[str]) -> bool:
    """Return whether a network's layers stand where the submission's bit table looks for them."""
    return len(names) == LAYERS and all(names[place] == name for place, name in SIX_BITS.items())


def layer_kind(layer: nn.Module) -> str:
    """Return "linear", "depthwise" or "conv"."""
    return "linear" if isinstance(layer, nn.Linear) else "depthwise" if layer.groups > 1 else "conv"


def bit_table(option: str | None, model: nn.Module) -> list[int]:
    """Return the bits of a network's layers, in the order of weight_layers.

    option: None: the submission's table for a network with its layers, else 8 bits for all; a number: that many for
    all; else a TOML file with `default = 8` and a table [bits]: layer names (in quotes), or kinds of layers (conv,
    depthwise, linear; a name stands above its kind), to bits; in a network with the submission's layers their places,
    too. Raises BadInput for anything else in it, for an unknown layer, and for widths outside 2 to 8 (activations have
    at most 8, and wider weights would not be summed exactly).
    """
    layers = dict(weight_layers(model))
    names = list(layers)
    submissions = has_the_submissions_layers(names)
    if option is None:
        return [6 if submissions and name in SIX_BITS.values() else 8 for name in names]
    content = {"default": int(option)} if option.isdecimal() and len(option) < 9 else read_table(option)
    bits = content.get("bits", {})
    chosen = {name: bits.get(layer_kind(layer), content.get("default", 8)) for name, layer in layers.items()}
    for key, width in bits.items():
        if key in layers:
            chosen[key] = width
        elif submissions and key.isdecimal() and int(key) < len(names):
            chosen[names[int(key)]] = width
        elif key not in ("conv", "depthwise", "linear"):
            raise BadInput(f"{option}: the network has no layer {key!r} (names with dots need quotes)")
    for name, width in chosen.items():
        if type(width) is not int or not 2 <= width <= 8:
            raise BadInput(f"{width!r} bits for {name}: expected 2 to 8")
    return list(chosen.values())


def read_table(path) -> dict:
    """Return the content of a bit table's file. Raises BadInput for what is none."""
    try:
        content = tomllib.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise BadInput(f"no bit table {path!r}: give a number of bits or a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"{path}: not a TOML file ({error})") from error
    if content.keys() - {"default", "bits"} or not isinstance(content.get("bits", {}), dict):
        raise BadInput(f"{path}: expected nothing but `default = 8` and a table [bits]")
    return content


# ---- A network that computes on its grids ---------------------------------------------------------

class QuantizedConv2d(nn.Conv2d):
    """A convolution that rounds its weights on the way: what it stores is what is trained."""
    step, bits = None, None

    def forward(self, x):
        weight = fake_quantize(self.weight, self.step.to(self.weight), *code_range(self.bits))
        return self._conv_forward(x, weight, self.bias)


class QuantizedLinear(nn.Linear):
    step, bits = None, None

    def forward(self, x):
        return F.linear(x, fake_quantize(self.weight, self.step.to(self.weight), *code_range(self.bits)), self.bias)


def quantize_weights(model: nn.Module, table: list[int], scheme: str) -> None:
    """Make every convolution and linear layer round its weights, with steps from the weights as they are now.

    A free step is absorbed by the BatchNorm behind: a layer without one has a power of two, whatever the scheme.
    """
    if scheme not in SCHEMES:
        raise BadInput(f"unknown scheme {scheme!r}; known: {', '.join(SCHEMES)}")
    free = {branch.name for branch in read(model).layers if branch.norm and scheme != "power-of-two"}
    for (name, module), bits in zip(weight_layers(model), table, strict=True):
        weight = module.weight.detach()
        if name not in free:
            step = torch.tensor(power_of_two_step(float(weight.abs().max()), bits), device=weight.device)
        else:
            step = free_step(weight, bits, channel=scheme == "channel")
        # same keys, same tensors
        module.__class__ = QuantizedLinear if isinstance(module, nn.Linear) else QuantizedConv2d
        module.step, module.bits = step, bits


# ---- Steps of activations -------------------------------------------------------------------------

@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor, bits: int, ranges: str) -> list[dict]:
    """A step for every activation point, from the activations of `images` (uint8 [N, 3, 32, 32], of the train set).

    ranges "max": the submission's step for the largest value seen. "mse": of that step and the three below it, the
    one with the least squared error over all values: a clipped outlier costs less than a coarse grid. The image needs
    no calibration: its pixels are exactly code * 2^-6.
    """
    graph = read(model)
    points = graph.activation_points
    largest = dict.fromkeys(points, 0.0)
    errors = {name: torch.zeros(4, dtype=torch.float64) for name in points}

    def watch(see):
        hooks = [model.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: see(name, out))
                 for name in points]
        for batch in images.split(50):
            model(cifar100.normalise(batch).contiguous(memory_format=torch.channels_last))
        for hook in hooks:
            hook.remove()

    def see_largest(name, out):
        largest[name] = max(largest[name], float(out.abs().max()))

    def see_errors(name, out):
        for i in range(4):
            step = power_of_two_step(largest[name], bits, points[name]) / 2 ** i
            error = codes(out, step, *code_range(bits, points[name])).mul_(step).sub_(out)
            errors[name][i] += float(error.square_().sum())

    model.eval()
    watch(see_largest)
    if ranges == "mse":
        watch(see_errors)
    result = []
    for name, signed in points.items():
        step = power_of_two_step(largest[name], bits, signed)
        if ranges == "mse":
            step /= 2 ** int(errors[name].argmin())
        if name in graph.images and bits == 8:
            step = 1 / cifar100.STD
        result.append({"name": name, "bits": bits, "signed": signed, "step": step})
    return result


class Paused:
    """A network in eval mode, halted before one of its modules for some images: from there it can go on many times.

    images: uint8 [N, 3, 32, 32]. What its modules hold may change, from the one it stands at onwards.
    """

    def __init__(self, network: nn.Module, images: Tensor, size: int = 50):
        self.graph = torch.fx.GraphModule(network, traced(network))
        start, *self.nodes = self.graph.graph.nodes
        self.values = [{start: cifar100.normalise(batch).contiguous(memory_format=torch.channels_last)}
                       for batch in images.split(size)]  # of each batch, by node: those that are still read
        self.cpu = images.device.type == "cpu"

    def _run(self, nodes) -> list[dict]:
        def some(part):
            interpreter, found = torch.fx.Interpreter(self.graph), []
            for values in part:
                threads.go_on()
                interpreter.env = dict(values)
                for node in nodes:
                    with torch.inference_mode():
                        interpreter.env[node] = interpreter.run_node(node)
                    for last in interpreter.user_to_last_uses.get(node, ()):
                        del interpreter.env[last]
                found.append(interpreter.env)
            return found
        return sum(threads.in_threads(some, divided(self.values, self.cpu)), [])

    def reach(self, name: str) -> None:
        """Go on to right before the module of this name, which lies ahead."""
        at = next(i for i, node in enumerate(self.nodes) if node.target == name)
        self.values, self.nodes = self._run(self.nodes[:at]), self.nodes[at:]

    def finish(self) -> Tensor:
        """The logits [N, classes]; the network stays where it is."""
        return torch.cat([values[self.nodes[-1]] for values in self._run(self.nodes)])


def choose_steps(model: nn.Module, images: Tensor, reference: Tensor) -> None:
    """One pass over the activation steps, the image's aside: twice and half of each is kept where the logits gain.

    What gains has the lower KL divergence of the model's softmax from that of the float network, whose logits for
    these images are the `reference` [N, classes]. A squared error tells what a point loses, and this what it is worth.
    """
    expected, graph, network = reference.double().log_softmax(1), read(model), Paused(model, images)

    def divergence() -> float:
        found = network.finish().double().log_softmax(1)
        return float(F.kl_div(found, expected, reduction="batchmean", log_target=True))

    least = divergence()
    points = [name for name in graph.activation_points if name not in graph.images]
    for name in with_progress(points, "activation steps chosen"):
        network.reach(name)
        quantizer = model.get_submodule(name)
        before = quantizer.step
        for step in (2 * before, before / 2):
            quantizer.step = step
            if (found := divergence()) < least:
                least = found
                break
        else:
            quantizer.step = before


# ---- What is stored -------------------------------------------------------------------------------

@torch.no_grad()
def shipped(model: nn.Module, network: nn.Module) -> tuple[nn.Module, list[dict]]:
    """Put the values of a network on its grids into a plain one of the same kind; return it, and each tensor's claim.

    network: a plain one, whose values are replaced.
    """
    network.load_state_dict(model.state_dict())
    network.eval()
    ours = []
    for branch in read(network).layers:
        layer = network.get_submodule(branch.name)
        scale = torch.ones(len(layer.weight), dtype=torch.float64)
        if branch.kind == "layer":
            source = model.get_submodule(branch.name)
            code = codes(source.weight.detach().float(), source.step, *code_range(source.bits))
            # a free step goes into the BatchNorm behind; what is stored has the step 2^-(b-1), or the scheme's own
            step = float(source.step) if source.step.dim() == 0 else 2.0 ** (1 - source.bits)
            layer.weight.copy_(code * step + 0.0)  # a small negative value is -0.0: there is one code 0
            ours.append({"name": f"{branch.name}.weight", "bits": source.bits, "step": step})
            scale *= (source.step / step).double().flatten()
            scale[code.flatten(1).count_nonzero(1) == 0] = 0  # nothing arrives: any scale would do, and zero says so
            if branch.norm:  # a power of two, moved between scale and weights: nothing else changes
                factor = normal_factor(folded(network.get_submodule(branch.norm))[0] * scale)
                layer.weight.div_(factor)
                ours[-1]["step"], scale = step / factor, scale * factor
            if layer.bias is not None and branch.norm is None:
                ours.append(store_fixed(layer.bias, f"{branch.name}.bias"))
        if branch.norm:
            ours += fold(network.get_submodule(branch.norm), branch.norm, scale, getattr(layer, "bias", None)
                         if branch.kind == "layer" else None)
            if branch.kind == "layer" and layer.bias is not None:
                layer.bias.zero_()  # it went into the shift
                ours.append({"name": f"{branch.name}.bias", "bits": 1, "step": 1.0})
    order = {name: i for i, name in enumerate(network.state_dict())}
    unused = {name for name, _ in network.named_parameters()} - {claim["name"] for claim in ours}
    if unused:
        raise BadInput(f"{min(unused)} is not used by the forward pass: take it out of the network")
    return network, sorted(ours, key=lambda claim: order[claim["name"]])


def normal_factor(scale: Tensor) -> float:
    """Return the least power of two, 1 for nearly all networks, that lifts scales into float16's normal numbers.

    Below 2^-14 float16 has fewer significant bits the smaller a number is. The largest scale stays below 2^15: where
    scales are further apart than float16's range, the smallest lose bits all the same.
    """
    scale = scale.abs()[scale != 0]
    if not len(scale) or scale.min() >= 2.0**-14:
        return 1.0
    needed, room = (int(torch.frexp(value)[1]) for value in (scale.min(), scale.max()))
    return 2.0 ** max(0, min(-13 - needed, 15 - room))


def fold(bn: nn.BatchNorm2d, name: str, step: Tensor, bias: Tensor | None) -> list[dict]:
    """Fold a BatchNorm in place, with the steps that it absorbs and the bias before it; return its tensors' claims."""
    scale, shift = folded(bn)
    shift = shift if bias is None else shift + scale * bias.double()
    scale = torch.where(step == 0, 0.0, scale * step)
    largest = float(scale.abs().max())
    if largest > torch.finfo(torch.float16).max:
        raise BadInput(f"{name}: its folded scale {largest:.3g} does not fit 16 bits")
    bn.weight.copy_(scale.half())
    bn.bias.copy_(shift)
    bn.running_mean.zero_()
    bn.running_var.fill_(1 - bn.eps)
    bn.num_batches_tracked.zero_()
    return [{"name": f"{name}.weight", "bits": 16, "kind": "float16"}, store_fixed(bn.bias, f"{name}.bias")]


@torch.no_grad()
def short_step(step: Tensor, scale: Tensor) -> Tensor:
    """Return steps, moved by 3% at most, whose products with the scales have SIGNIFICANT_BITS bits; float64.

    Codes times such scales need few bits, so that float32 holds them exactly. Where a scale is 0 the step stays.
    """
    step, scale = step.double(), scale.double()
    significand, exponent = torch.frexp(scale * step)
    short = torch.ldexp((significand * 2**SIGNIFICANT_BITS).round(), exponent - SIGNIFICANT_BITS)
    return torch.where(scale == 0, step, short / scale)


@torch.no_grad()
def shorten_scales(model: nn.Module) -> None:
    """Move every channel's step to where its product with the BatchNorm's scale is short, in place.

    The weights are rounded to the step that is used, so nothing is lost but the freedom of the step.
    """
    for branch in read(model).layers:
        if branch.kind == "layer" and branch.norm:
            conv, (scale, _) = model.get_submodule(branch.name), folded(model.get_submodule(branch.norm))
            conv.step = short_step(conv.step, scale.view_as(conv.step)).float()


@torch.no_grad()
def round_shifts(network: nn.Module, tensors: list[dict], activations: list[dict]) -> None:
    """Round the shifts of a shipped network, in place, to whole units of their accumulators: those of its BatchNorms,
    and the biases of layers without one, but for the logits'.

    A unit is scale x weight step x input step. A shift stays a 16-bit code, so it becomes a multiple of the odd part of
    the unit and of both powers of two. Engines add a bias to the accumulator: as a whole number.
    """
    steps = {entry["name"]: Fraction(entry["step"]) for entry in tensors + activations if "step" in entry}
    graph = read(network)
    for branch in graph.layers:
        owner = network.get_submodule(branch.norm or branch.name)
        if owner.bias is None or not branch.norm and branch in graph.points[-1].branches:
            continue
        step = steps[f"{branch.norm or branch.name}.bias"]
        largest = step * code_range(SHIFT_BITS)[1]
        unit = steps[branch.source] * (steps[f"{branch.name}.weight"] if branch.kind == "layer" else 1)
        scales = owner.weight.tolist() if branch.norm else [1] * len(owner.bias)
        for channel, (scale, shift) in enumerate(zip(scales, owner.bias.tolist())):
            if scale == 0:
                continue  # nothing is accumulated
            grain = shift_grain(abs(Fraction(scale)) * unit, step)
            limit = largest // grain
            owner.bias[channel] = float(max(-limit, min(limit, round(Fraction(shift) / grain))) * grain)


def shift_grain(unit: Fraction, step: Fraction) -> Fraction:
    """The smallest number that is a whole number of an accumulator's units and of a stored shift's steps."""
    odd = unit.numerator // (unit.numerator & -unit.numerator)
    return odd * max(unit / odd, step)


def store_fixed(tensor: Tensor, name: str) -> dict:
    """Round a vector in place to 16-bit codes times one power of two: what is added needs absolute precision."""
    step = power_of_two_step(float(tensor.abs().max()), SHIFT_BITS)
    tensor.copy_(codes(tensor.double(), step, *code_range(SHIFT_BITS)) * step + 0.0)
    return {"name": name, "bits": SHIFT_BITS, "step": step}
