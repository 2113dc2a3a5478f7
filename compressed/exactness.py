"""Bound the sums of a quantized network: whether float32 and 32-bit accumulators hold them exactly."""
import functools
import math
import sys

import torch
from torch import nn

from compressed.exact_network import is_wide, largest_products
from compressed.formats import Activation, Formats, Grid, exponent, lowest_bits
from compressed.graph import read_graph


def largest_sum(terms: list[tuple], low: float = 2.0**-149, high: float = 2.0**127) -> int:
    """Return how large a sum can become, counted in the smallest step of its terms.

    terms: (step, largest magnitude of a code) of each, numbers or float64 [C]. It is sys.maxsize if the smallest step
    or the sum is not from `low` to `high`, by default what float32 can hold.
    """
    steps = [torch.as_tensor(step, dtype=torch.float64) for step, _ in terms]
    smallest = functools.reduce(torch.minimum, steps)
    largest = sum(step * codes for step, (_, codes) in zip(steps, terms))
    return int((largest / smallest).max()) if smallest.min() >= low and largest.max() <= high else sys.maxsize


def layer_terms(layer: nn.Module, grid: Grid, source: Activation, step: float, biased: bool) -> list[tuple]:
    """Return the terms of a layer's sums as `largest_sum` takes them. step: of the codes of `source`, its input."""
    bounds = largest_products(layer, grid, source)
    terms = [(step * torch.tensor(grid.steps, dtype=torch.float64), torch.tensor(bounds, dtype=torch.float64))]
    if biased and layer.bias is not None and layer.bias.any():
        bias = layer.bias.detach().double()
        smallest = 2.0**int(lowest_bits(bias[bias != 0]).min())
        terms.append((smallest, bias.abs() / smallest))
    return terms


def float32_bound(model, formats: Formats, steps: dict[str, float]) -> int:
    """Return how large a sum in float32 can become, counted in the smallest step of its terms: it is exact up to 2^24.

    Summed in float32 are convolutions, means, and the terms of an activation point. Terms that are computed in float64
    are left out: BatchNorms, convolutions with a bias or with larger sums, linear layers. It is sys.maxsize if a
    weight's step is no power of two, because even products are then rounded, or if one of these sums may exceed 2^53,
    up to which float64 is exact.
    """
    sums = [0]
    for point in read_graph(model).points:
        value = []  # what is added up to it in float32
        for branch in point.branches:
            if branch.kind in ("pixels", "function", "norm"):
                continue
            sources = [formats.activations[name] for name in branch.sources]
            step = math.prod(steps[name] for name in branch.sources)
            if branch.kind != "layer":
                count = branch.terms if branch.kind == "mean" else 1
                codes = count * math.prod(max(-source.low, source.high) for source in sources)
                value.append((step / count, codes))
                continue
            layer, grid = model.get_submodule(branch.name), formats.tensors[f"{branch.name}.weight"]
            if not grid.steps or None in map(exponent, grid.steps):
                return sys.maxsize
            linear = isinstance(layer, nn.Linear)
            wide = linear or is_wide(layer, sources[0])
            terms = layer_terms(layer, grid, sources[0], step, biased=wide or branch.norm)
            if not wide:
                sums.append(largest_sum(terms))
            elif largest_sum(terms, 0, math.inf) > 2**53:
                return sys.maxsize
            if not wide and not branch.norm and layer.bias is None:
                value += terms
        if value:
            sums.append(largest_sum(value))
    return max(sums)


def too_wide(model, formats: Formats) -> str | None:
    """Return the name of a layer whose sums of products of codes may not fit 32 bits; None if there is none."""
    for branch in (each for each in read_graph(model).layers if each.kind == "layer"):
        layer, grid = model.get_submodule(branch.name), formats.tensors[f"{branch.name}.weight"]
        if grid.steps and max(largest_products(layer, grid, formats.activations[branch.source])) >= 2**31:
            return branch.name
    return None
