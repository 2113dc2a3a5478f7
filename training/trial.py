"""Try a network and a penalty on random values: what cannot be trained is refused before the first stage."""
import contextlib
import copy
import io
import itertools
from collections.abc import Callable

import torch
from torch import nn

from compressed.cifar100 import IMAGE_SIZE
from compressed.errors import BadInput, refused
from compressed.files import to_json
from compressed.networks import fault
from training.cpu_kernels import fast_on_a_cpu
from training.penalties import Penalty
from training.plan import Plan


def some_images(count: int, size: int) -> torch.Tensor:
    """Return random values in the shape of images, float32 [count, 3, size, size], channels-last as everywhere."""
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    return images.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def check_forward(model: nn.Module, spec: str, classes: int, sizes=(IMAGE_SIZE,), least: int = 2) -> None:
    """Raise BadInput if a network does not have one output for each of the data's classes, in evaluation or training.

    Raises it, too, if the network's state can never be saved.
    sizes: of the square images. least: the fewest that one worker trains on. The BatchNorm statistics change.
    """
    if faults := [f"{name} {why}" for name, value in model.state_dict().items() if (why := fault(name, value))]:
        raise BadInput(f"--network {spec}: its state cannot be saved: {faults[0]}; a constant can be a buffer with "
                       "persistent=False")
    for size, training in itertools.product(sorted(sizes, reverse=True), (False, True)):
        wanted = [least if training else 1, 3, size, size]
        with refused(f"--network {spec}: its forward pass {'in training ' * training}fails for images {wanted}",
                     "" if size == IMAGE_SIZE else f"; give --sizes {IMAGE_SIZE}"):
            shape = list(model.train(training)(some_images(wanted[0], size)).shape)
        if shape != [wanted[0], classes]:
            raise BadInput(f"--network {spec}: its outputs for images {wanted} are {shape}, and the data have "
                           f"{classes} classes: let the network take an argument num_classes, or state "
                           f"?num_classes={classes}, or give other --data")


def try_network(make: Callable[[], nn.Module], spec: str, classes: int, plan: Plan, device,
                least: int | None = None) -> None:
    """Raise BadInput if a network cannot be trained by a plan: its passes fail, or it cannot be copied.

    Forward and backward pass are as in training: channels-last, in its precision, with the functions of cpu_kernels.
    make: returns the network, anew for each trial, because a pass may leave its results in it. spec: its specification,
    for the messages. least: the fewest images with which a pass must succeed (default: those of the smallest share, 2
    at most).
    """
    least = least or plan.least

    def copied(network):
        with refused(f"--network {spec} cannot be copied", "; torch.nn.utils.parametrizations.weight_norm can"):
            return copy.deepcopy(network)

    check_forward(make(), spec, classes, set(plan.sizes), least)
    model = make()
    for size in sorted(set(plan.sizes)):
        tried = copied(model).to(device, memory_format=torch.channels_last).train()
        images = some_images(least, size).to(device)
        with refused(f"--network {spec}: a training step fails for {least} images of {size}x{size} in "
                     f"{plan.settings.precision}"), contextlib.ExitStack() as at_end:
            if images.device.type == "cpu":
                at_end.enter_context(fast_on_a_cpu(tried))
            before = dict(tried.named_buffers())
            with torch.autocast(images.device.type, torch.bfloat16, enabled=plan.settings.precision == "bfloat16"):
                logits = tried(images).float()
            logits.logsumexp(1).sum().backward()
            after = dict(tried.named_buffers())
            if others := [name for name in before | after if after.get(name) is not before.get(name)]:
                raise BadInput(f"--network {spec}: its forward pass makes or replaces the buffer {others[0]}: make it "
                               "in __init__, and change it in place (copy_, lerp_): states and averages hold that one")
        if plan.settings.average == 0:  # then the trained weights themselves are copied for an evaluation
            copied(tried)


def try_penalty(penalty: Penalty) -> None:
    """Make a step with a penalty on a model that is not needed. Raises BadInput if it fails."""
    with refused(f"--penalty {penalty.form}: a first step with it fails"):
        with torch.no_grad():
            penalty.update(1.0)
        if penalty.in_loss:
            penalty.loss().backward()
        with torch.no_grad():
            for weight in penalty.weights:
                weight.grad = torch.zeros_like(weight)
            penalty.after_step(1e-6)
            to_json(penalty.record())
    with refused(f"--penalty {penalty.form}: its state cannot be saved and read again"):
        content = io.BytesIO()
        torch.save(penalty.state_dict(), content)
        content.seek(0)
        penalty.load_state_dict(torch.load(content, weights_only=True))
