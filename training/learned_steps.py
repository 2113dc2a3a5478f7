"""Layers whose quantization steps are trained.

Steps are trained by the gradient of Esser et al., "Learned Step Size Quantization" (ICLR 2020), as powers of two of a
trained exponent (Jain et al., "Trained Quantization Thresholds", 2019). Every step is rounded in the forward pass to
what the stored format allows, from the first training step on: exponents of activations and of layers without a
BatchNorm to whole numbers; with scheme "channel", steps of output channels to where their product with the BatchNorm's
scale has few significant bits. So the trained steps are the stored ones; with scheme "layer", however, the product of
step and scale is rounded only when the network is stored.
"""
import math

import torch
from torch import Tensor, nn

from compressed import grids
from compressed.exact_network import Quantizer
from compressed.formats import code_range, codes, fake_quantize, folded
from compressed.graph import layer_kind, read_graph, weight_layers


def straight_through(value: Tensor, latent: Tensor) -> Tensor:
    """Return `value`, a rounding of `latent` of the same shape, with the gradient of `latent` (Bengio et al. 2013)."""
    return latent + (value - latent).detach()


def power_of_two(log_step: Tensor) -> Tensor:
    """Return 2 to the power of the rounded exponents, with the gradient of the exponents themselves."""
    return straight_through(log_step.round(), log_step).exp2()


class LearnedQuantizer(Quantizer):
    """An activation's Quantizer whose step is a trained power of two."""

    def __init__(self, quantizer: Quantizer):
        super().__init__(quantizer.bits, quantizer.signed, quantizer.step, quantizer.most)
        self.log_step = nn.Parameter(torch.tensor(math.log2(quantizer.step)))

    def forward(self, x):
        # the upper clip in units of the values: its code depends on the step
        x = x.float() if self.most == math.inf else x.float().clamp(max=self.most)
        return fake_quantize(x, power_of_two(self.log_step), *code_range(self.bits, self.signed))

    def plain(self) -> Quantizer:
        return Quantizer(self.bits, self.signed, 2.0 ** round(float(self.log_step)), self.most)


class LearnedStep:
    """A layer that rounds its weights to trained steps.

    whole: True if the step must be a power of two, because of the scheme, or because no BatchNorm follows that could
           absorb another value.
    norm:  with scheme "channel", where the product of step and scale must have few bits, [the BatchNorm after the
           layer]; else empty.
    scale_bits: width of that product (see grids.short_step).
    """
    whole, norm = True, ()

    def rounded_step(self) -> Tensor:
        step = power_of_two(self.log_step) if self.whole else self.log_step.exp2()
        if self.norm:
            scale = folded(self.norm[0])[0].view_as(step)
            short = grids.short_step(step, scale, self.scale_bits).to(step)
            step = straight_through(short, step)
        return step


class LearnedConv2d(LearnedStep, grids.QuantizedConv2d):
    """A QuantizedConv2d whose steps are trained."""


class LearnedLinear(LearnedStep, grids.QuantizedLinear):
    """A QuantizedLinear whose step is trained."""


def learn_steps(model: nn.Module, scheme: str, scale_bits: int = grids.FLOAT_BITS) -> None:
    """Make the steps of a network on its grids trained parameters, in place: "NAME.log_step" in its state dict.

    The image's step is fixed: its pixels are exactly on its grid.
    """
    graph = read_graph(model)
    norms = {branch.name: branch.norm for branch in graph.layers}
    for name, layer in weight_layers(model):
        layer.log_step = nn.Parameter(layer.step.detach().log2())
        layer.whole, layer.scale_bits = norms[name] is None or scheme == "power-of-two", scale_bits
        # in a list, which hides the module from named_modules: it is registered where it belongs
        layer.norm = [model.get_submodule(norms[name])] if norms[name] and scheme == "channel" else []
        layer.__class__ = LearnedLinear if isinstance(layer, nn.Linear) else LearnedConv2d
    for name in graph.activation_points:
        if name not in graph.images:
            model.set_submodule(name, LearnedQuantizer(model.get_submodule(name)))


@torch.no_grad()
def fix_steps(model: nn.Module, scheme: str, scale_bits: int = grids.FLOAT_BITS) -> None:
    """Make trained steps plain values again, in place, each where the forward pass had rounded it to."""
    graph = read_graph(model)
    for _, layer in weight_layers(model):
        layer.step = (layer.log_step.round() if layer.whole else layer.log_step).detach().exp2()
        layer.__class__ = grids.quantized_class(layer)
        del layer.log_step
        layer.norm = ()
    for name in graph.activation_points:
        if isinstance(quantizer := model.get_submodule(name), LearnedQuantizer):
            model.set_submodule(name, quantizer.plain())
    if scheme == "channel":
        grids.shorten_scales(model, scale_bits)


# ---- Oscillation ---------------------------------------------------------------------------------

class Oscillation:
    """Watch how many weights oscillate between codes, as those of depthwise convolutions do at few bits.

    Counts the weights whose code moved one way, later the other, checked every 10th step since the last record.
    Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (ICML 2022).
    """
    every = 10

    def __init__(self, model: nn.Module):
        self.layers = [layer for _, layer in weight_layers(model)]
        self.steps, self.before = 0, None
        self.ways = self.turned = [torch.zeros_like(layer.weight, dtype=torch.int8) for layer in self.layers]

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("steps", "before", "ways", "turned")}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)

    @torch.no_grad()
    def step(self) -> None:
        """Check the codes at every 10th call. Call it after every training step."""
        self.steps += 1
        if self.steps % self.every:
            return
        now = [codes(layer.weight, layer.rounded_step(), *code_range(layer.bits)).to(torch.int16)  # for differences
               for layer in self.layers]
        if self.before is not None:
            moved = [(new - old).sign() for new, old in zip(now, self.before)]
            self.turned = [turned | (way * last < 0) for turned, way, last in zip(self.turned, moved, self.ways)]
            self.ways = [torch.where(way != 0, way, last) for way, last in zip(moved, self.ways)]
        self.before = now

    def record(self) -> dict[str, float]:
        """Return the shares of the non-zero weights that oscillated since the last record."""
        shares = {}
        for name, kinds in (("oscillating", grids.LAYER_KINDS), ("oscillating_depthwise", ("depthwise",))):
            chosen = [(layer, turned) for layer, turned in zip(self.layers, self.turned)
                      if layer_kind(layer) in kinds]
            weights = sum(int(layer.weight.count_nonzero()) for layer, _ in chosen)
            shares[name] = round(sum(int(turned.sum()) for _, turned in chosen) / max(1, weights), 6)
        self.turned = [torch.zeros_like(turned) for turned in self.turned]
        return shares
