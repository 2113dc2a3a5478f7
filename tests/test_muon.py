"""Muon's steps: orthogonal, of the length that is asked for, within the masks; and SGD for all that it leaves."""
import copy

import pytest
import torch
from torch import nn

from compressed import grids
from compressed.exact_network import quantize_activations
from compressed.graph import read_graph, weight_layers
from mobilenet_v2 import MobileNetV2
from training.learned_steps import learn_steps
from training.masks import Masks, target_masks
from training.muon import ITERATIONS, MOMENTUM, A, B, C, Muon, orthogonal, turned_weights


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8, bias=False),
                         nn.BatchNorm2d(8), nn.Conv2d(8, 20, 1, bias=False), nn.BatchNorm2d(20), nn.Flatten(),
                         nn.Linear(20 * 4 * 4, 5))


def with_gradients(model: nn.Module, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


@pytest.mark.parametrize("shape", ((30, 30), (12, 50), (50, 12), (1, 7)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("scale", (1e-6, 1.0, 1e6))
def test_singular_values_come_near_one(shape, dtype, scale):
    torch.manual_seed(0)
    matrix = scale * torch.randn(shape)
    found, = orthogonal(matrix[None], dtype)
    assert found.shape == matrix.shape and found.dtype == torch.float32
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    inside = left.t() @ found @ right.t()  # diagonal: the singular vectors stay
    known = values > 0.02 * values.norm()
    assert (0.6 < inside.diag()[known]).all() and (inside.diag() < 1.3).all()
    assert (inside - inside.diag().diag()).abs().max() < (1e-4 if dtype == torch.float32 else 0.1)


def test_a_step_has_its_length_and_keeps_the_norm():
    model = with_gradients(network())
    before = [(p.detach().clone(), p.grad.clone()) for p in turned_weights(model)]
    optimizer = Muon(list(model.parameters()), turned_weights(model), lr=0.2, turn=0.05, weight_decay=0.1, kept={})
    for group in optimizer.param_groups:
        group["lr"] = 0.1  # half the peak
    optimizer.step()
    after = [p.detach() for p in turned_weights(model)]
    assert len(after) == 2
    for (old, gradient), new in zip(before, after):
        assert new.norm().item() == pytest.approx(old.norm().item(), rel=1e-5)
        assert ((new - old).norm() / old.norm()).item() == pytest.approx(0.025, rel=0.01)
        # the first momentum is along the gradient
        direction = orthogonal(gradient.flatten(1)[None]).flatten()
        direction -= old.flatten() * (direction @ old.flatten()) / old.norm() ** 2
        assert torch.cosine_similarity((old - new).flatten(), direction, 0) > 0.99


def test_the_constants():
    assert (MOMENTUM, ITERATIONS, A, B, C) == (0.95, 3, 3.4445, -4.775, 2.0315)


def turned(weight, gradient, momentum, kept, length: float):
    """(weight, momentum) after a step, one matrix at a time and in float64: the formulas of the module's docstring."""
    gradient = gradient * kept
    momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
    x = (MOMENTUM * momentum + (1 - MOMENTUM) * gradient).flatten(1)
    x = x / x.norm()
    x = x.t() if len(x) > x.shape[1] else x
    for _ in range(ITERATIONS):
        gram = x @ x.t()
        x = A * x + (B * gram + C * gram @ gram) @ x
    step = (x if len(x) == len(weight) else x.t()).reshape(weight.shape) * kept
    step = step - weight * (step * weight).sum() / weight.norm()**2
    new = weight - step * length * weight.norm() / step.norm()
    return new * weight.norm() / new.norm(), momentum


def test_weights_of_one_shape_are_turned_as_if_alone():
    """Masked and unmasked ones, tall and wide ones, channels-last ones, and one without a gradient in a step."""
    torch.manual_seed(0)
    shapes = [(8, 6, 1, 1)] * 3 + [(6, 8, 1, 1)] * 2 + [(4, 3, 3, 3)] * 2 + [(5, 5, 1, 1)]
    weights = [nn.Parameter(torch.randn(shape).to(memory_format=torch.channels_last)) for shape in shapes]
    kept = {weight: (torch.rand_like(weight) < 0.5).float() for weight in weights[1:5]}
    for weight, mask in kept.items():
        weight.data *= mask
    optimizer = Muon(weights, weights, 0.1, 0.03, 0.0, kept)
    assert sorted(map(len, optimizer.groups)) == [1, 1, 2, 2, 2]
    known = [(weight.detach().double(), torch.zeros(weight.shape, dtype=torch.float64)) for weight in weights]
    for step in range(3):
        for k, weight in enumerate(weights):
            if (step, k) != (1, 2):
                weight.grad = torch.randn_like(weight)
                known[k] = turned(known[k][0], weight.grad.double(), known[k][1],
                                  kept.get(weight, torch.ones(())).double(), 0.03)
        optimizer.step()
        for weight, (wanted, momentum) in zip(weights, known):
            assert (weight - wanted).norm() < 1e-5 * wanted.norm()
            assert (optimizer.state[weight]["momentum_buffer"] - momentum).norm() <= 1e-5 * momentum.norm()


def test_the_rest_is_nesterov_sgd():
    model = network()
    other = copy.deepcopy(model)
    ours = Muon(list(model.parameters()), turned_weights(model), lr=0.1, turn=0.05, weight_decay=0.01, kept={})
    rest = [p for name, p in other.named_parameters() if name not in ("0.weight", "4.weight")]
    theirs = torch.optim.SGD([{"params": [p for p in rest if p.dim() > 1], "weight_decay": 0.01},
                              {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0}],
                             lr=0.1, momentum=0.9, nesterov=True)
    for seed in range(3):
        with_gradients(model, seed)
        with_gradients(other, seed)
        ours.step()
        theirs.step()
    turned = [name for (name, p), q in zip(model.named_parameters(), other.parameters())
              if not torch.allclose(p, q, rtol=1e-5, atol=1e-7)]
    assert turned == ["0.weight", "4.weight"]


def test_pruned_weights_stay_and_do_not_matter():
    """Neither their gradients nor their momentum change a step, and its length is that of what is kept."""
    found = []
    for disturbance in (0, 100):
        model = network()
        masks = Masks(model, target_masks(model, [name for name, _ in weight_layers(model)], 0.6))
        kept = dict(zip(masks.weights, masks.factors))
        optimizer = Muon(list(model.parameters()), turned_weights(model), 0.1, 0.03, 0, kept)
        for seed in range(3):
            before = copy.deepcopy(model)
            with_gradients(model, seed)
            for weight, factor in zip(masks.weights, masks.factors):
                weight.grad += disturbance * (1 - factor)
            optimizer.step()
            for k in (0, 4):
                assert torch.equal(model[k].weight == 0, before[k].weight == 0)
                length = (model[k].weight - before[k].weight).norm() / before[k].weight.norm()
                assert length.item() == pytest.approx(0.03, rel=0.01)
        found.append(torch.cat([model[k].weight.flatten() for k in (0, 4)]))
    assert torch.equal(*found)


def test_a_gradient_of_zeros_and_none_at_all():
    model = network()
    before = copy.deepcopy(model)
    optimizer = Muon(list(model.parameters()), turned_weights(model), 0.1, 0.03, 0, {})
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    optimizer.step()
    assert all(torch.allclose(p, q, rtol=1e-6) and p.isfinite().all()
               for p, q in zip(model.parameters(), before.parameters()))


def test_what_it_turns_in_the_network():
    """Every convolution but the 17 depthwise ones, also on its grids; the linear layer has no BatchNorm behind it."""
    model = MobileNetV2()
    layers = [layer for _, layer in weight_layers(model)]
    wanted = [id(layer.weight) for layer in layers[:-1] if layer.groups == 1]
    assert len(wanted) == 40 and list(map(id, turned_weights(model))) == wanted
    points = read_graph(model).activation_points
    grids.quantize_weights(model, grids.bit_table("4", model), "channel")
    quantize_activations(model, [{"name": name, "bits": 8, "signed": signed, "step": 0.125}
                                 for name, signed in points.items()])
    learn_steps(model, "channel")
    assert list(map(id, turned_weights(model))) == wanted


class Norms(nn.Module):
    """Convolutions followed by a BatchNorm, a GroupNorm, nothing, and by a BatchNorm and a second reader."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(4))
        self.batch, self.group, self.last = nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.convs[2](self.group(self.convs[1](self.batch(self.convs[0](x))))).relu()
        x = self.convs[3](x)
        return self.last(x) + x


def test_the_scale_of_a_weight_matters_unless_a_normalisation_alone_follows():
    model = Norms()
    assert [weight is conv.weight for weight, conv in zip(turned_weights(model), model.convs)] == [True, True]


def test_a_network_that_cannot_be_followed():
    class Odd(Norms):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)
    assert len(turned_weights(Odd())) == 4
