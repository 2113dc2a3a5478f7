"""Fine-tuning on the grids: train the weights behind them, and their steps.

Steps are trained by the gradient of Esser et al., "Learned Step Size Quantization" (ICLR 2020), as powers of two of a
trained exponent (Jain et al., "Trained Quantization Thresholds", 2019). Every step is rounded in the forward pass to
what the stored format allows, from the first training step on: exponents of activations and of the linear layer to
whole numbers, steps of channels to where their product with the BatchNorm's scale has few significant bits. So the
steps that were trained are the steps that are stored.

A fine-tuning leaves `quantized.pt` and `quantized.options.json` in its folder; the same command takes them up, on
another machine too.
"""
import dataclasses
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressed import grids, threads
from compressed.cifar100 import Images
from compressed.errors import BadInput
from compressed.exact_network import Quantizer, folded, quantize_activations
from compressed.files import git_commit, load_record, save_record, save_tensors, sha256
from compressed.formats import code_range
from compressed.graph import prepare, read, weight_layers
from compressed.networks import load_state
from training import loop, reweighted_l1, teachers


# ---- Layers with trained steps -------------------------------------------------------------------

class Rounded(torch.autograd.Function):
    """(x, step, low, high) -> x on its grid. step broadcasts against x.

    The gradient of x passes where x lies within half a step of the range; that of the step is the rounding error of the
    values inside the range, and the clipped code of those outside, in units of the step.
    """

    @staticmethod
    def forward(ctx, x, step, low, high):
        scaled = x / step
        code = scaled.round().clamp_(low, high)
        ctx.save_for_backward(scaled, code, step)
        ctx.range = low - 0.5, high + 0.5
        return code * step

    @staticmethod
    def backward(ctx, gradient):
        scaled, code, step = ctx.saved_tensors
        inside = (scaled >= ctx.range[0]) & (scaled <= ctx.range[1])
        of_step = None
        if ctx.needs_input_grad[1]:
            of_step = (gradient * (code - scaled * inside)).sum_to_size(step.shape)
        return gradient * inside, of_step, None, None


def straight_through(value: Tensor, latent: Tensor) -> Tensor:
    """Return `value` with the gradient of `latent`, which it is a rounding of."""
    return latent + (value - latent).detach()


class LearnedQuantizer(Quantizer):
    """An activation's Quantizer whose step is a trained power of two."""

    def __init__(self, quantizer: Quantizer):
        super().__init__(quantizer.bits, quantizer.signed, quantizer.step, quantizer.most)
        self.log_step = nn.Parameter(torch.tensor(math.log2(quantizer.step)))

    def forward(self, x):
        step = straight_through(self.log_step.round(), self.log_step).exp2()
        return Rounded.apply(x.float(), step, *self.range())

    def plain(self) -> Quantizer:
        return Quantizer(self.bits, self.signed, 2.0 ** round(float(self.log_step)), self.most)


class LearnedConv2d(grids.QuantizedConv2d):
    """A convolution that rounds its weights to trained steps.

    norm: a list of the BatchNorm behind it, where the product of its scale with the step has to be short; else empty.
    whole: whether the step is a power of two: the scheme's, or because no BatchNorm absorbs another one.
    """
    whole = False

    def forward(self, x):
        step = self.log_step
        step = (straight_through(step.round(), step) if self.whole else step).exp2()
        if self.norm:
            scale = folded(self.norm[0])[0].view_as(step)
            short = grids.short_step(step, scale).to(step)
            step = straight_through(short, step)
        return self._conv_forward(x, Rounded.apply(self.weight, step, *code_range(self.bits)), self.bias)


class LearnedLinear(grids.QuantizedLinear):
    """A linear layer that rounds its weights to a trained power of two."""

    def forward(self, x):
        step = straight_through(self.log_step.round(), self.log_step).exp2()
        return F.linear(x, Rounded.apply(self.weight, step, *code_range(self.bits)), self.bias)


def learn_steps(model: nn.Module, scheme: str) -> None:
    """Make the steps of a network on its grids trained parameters, in place: "NAME.log_step" in its state dict.

    The image's step stays: its pixels stand on their grid exactly.
    """
    graph = read(model)
    norms = {branch.name: branch.norm for branch in graph.layers}
    for name, layer in weight_layers(model):
        layer.log_step = nn.Parameter(layer.step.detach().log2())
        if isinstance(layer, nn.Linear):
            layer.__class__ = LearnedLinear
        else:
            # in a list, which hides the module from named_modules: it is registered where it belongs
            norm = norms[name]
            layer.norm = [model.get_submodule(norm)] if norm and scheme == "channel" else []
            layer.whole = norm is None or scheme == "power-of-two"
            layer.__class__ = LearnedConv2d
    for name in graph.activation_points:
        if name not in graph.images:
            model.set_submodule(name, LearnedQuantizer(model.get_submodule(name)))


@torch.no_grad()
def fix_steps(model: nn.Module, scheme: str) -> None:
    """Make trained steps plain values again, in place, each where the forward pass had rounded it to."""
    graph = read(model)
    for _, layer in weight_layers(model):
        exact = scheme == "power-of-two" or getattr(layer, "whole", True)
        layer.step = (layer.log_step.round() if exact else layer.log_step).detach().exp2()
        layer.__class__ = grids.QuantizedLinear if isinstance(layer, nn.Linear) else grids.QuantizedConv2d
        del layer.log_step
        layer.norm = []
    for name in graph.activation_points:
        if isinstance(quantizer := model.get_submodule(name), LearnedQuantizer):
            model.set_submodule(name, quantizer.plain())
    if scheme == "channel":
        grids.shorten_scales(model)


# ---- The stage -----------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Tuning:
    """How a network is fine-tuned.

    frozen: share of the epochs, at the end, in which the BatchNorm statistics stay as they are. teachers: checkpoints,
    as of training/main.py. source: the checkpoint behind the grids; its folder is where the files are left. network:
    the specification of it. others: what else decides the result, in plain values.
    """
    settings: loop.Settings
    frozen: float
    teachers: tuple[str, ...]
    source: Path
    resume: bool = True
    network: str | None = None
    others: dict = dataclasses.field(default_factory=dict)

    @property
    def file(self) -> Path:
        return self.source.parent / "quantized.pt"

    def options(self, chosen: grids.Options) -> dict:
        """Return what decides the result, in plain values."""
        machine = dict.fromkeys(("precision", "compile", "workers"))
        return json.loads(json.dumps({"grids": dataclasses.asdict(chosen), "frozen": self.frozen,
                                      "settings": dataclasses.asdict(self.settings) | machine,
                                      "teachers": [Path(path).name for path in self.teachers]} | self.others))


def fine_tune(model: nn.Module, train_data: Images, test_data: Images, tuning: Tuning, chosen: grids.Options,
              steps_before=()) -> nn.Module:
    """Train a network on its grids, in place: weights, BatchNorms and steps; zeros stay zero. Return it.

    Leaves tuning.file, and what it was made of in quantized.options.json, with `steps_before`, the accuracies found
    before it. Raises BadInput if it was stopped: the same call resumes it.
    """
    settings, file, device = tuning.settings, tuning.file, train_data.labels.device

    def prepare(network, epoch):
        frozen = epoch >= round((1 - tuning.frozen) * settings.epochs)
        for module in network.modules():
            if frozen and isinstance(module, nn.BatchNorm2d):
                module.eval()

    def began():
        file.unlink(missing_ok=True)  # of other options
        save_record({"stage": "quantized", "machine": threads.describe_machine(device),
                     "train_images": len(train_data), "commit": git_commit(),
                     "settings": dataclasses.asdict(settings), "options": tuning.options(chosen),
                     "source_sha256": sha256(tuning.source), "accuracy_by_step": list(steps_before)},
                    file.with_suffix(".options.json"))

    masks = reweighted_l1.Masks(model, reweighted_l1.zero_masks(model, [name for name, _ in weight_layers(model)]))
    learn_steps(model, chosen.scheme)
    moved(model, device)
    taught_by = [moved(teachers.load(path, tuning.network, train_data.data_set), device) for path in tuning.teachers]
    finished = loop.train("quantized", model, train_data, test_data, settings, file.parent, masks=masks,
                          teachers=taught_by, prepare=prepare, resume=tuning.resume, eval_every=0, began=began,
                          context=tuning.options(chosen))
    if finished is None:
        raise BadInput("fine-tuning was stopped; the same command resumes it")
    fix_steps(finished, chosen.scheme)
    save_tensors(with_steps(finished), file)
    loop.State(file.with_suffix(".state"), settings).remove()
    return finished


def moved(network: nn.Module, device) -> nn.Module:
    """Move a network, in place, with the steps of its weights."""
    for module in network.modules():
        if isinstance(getattr(module, "step", None), Tensor):
            module.step = module.step.to(device)
    return network.to(device, memory_format=torch.channels_last)


def with_steps(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a network on its grids, with the steps of weights and activations: "NAME.step"."""
    modules = dict(weight_layers(model)) | {n: m for n, m in model.named_modules() if isinstance(m, Quantizer)}
    content = model.state_dict() | {f"{name}.step": torch.as_tensor(module.step) for name, module in modules.items()}
    return {name: value.cpu().contiguous() for name, value in content.items()}


def take_up(model: nn.Module, tuning: Tuning, chosen: grids.Options) -> tuple[nn.Module, list[dict]] | None:
    """Return the network that an earlier fine-tuning of the same options left, and the accuracies found before it.

    model: a plain network of its kind, which is filled. None if there is none, or if it is to be made again. Raises
    BadInput if the file is of another checkpoint or of other options.
    """
    if not tuning.resume or not tuning.file.is_file():
        return None
    record = load_record(tuning.file.with_suffix(".options.json"), "--no-resume fine-tunes again")
    if record.get("source_sha256") != sha256(tuning.source) or record.get("options") != tuning.options(chosen):
        raise BadInput(f"{tuning.file} was fine-tuned from another checkpoint or with other options; --no-resume "
                       "fine-tunes again")
    model = prepare(model)
    content, points = load_state(tuning.file), read(model).activation_points
    try:
        steps = {name: content.pop(f"{name}.step") for name in (*dict(weight_layers(model)), *points)}
        model.load_state_dict(content)
    except (KeyError, RuntimeError) as error:
        raise BadInput(f"{tuning.file}: not what a fine-tuning writes; --no-resume starts it again") from error
    grids.quantize_weights(model, chosen.table, chosen.scheme)
    for name, module in weight_layers(model):
        module.step = steps[name]
    quantize_activations(model, [{"name": name, "bits": chosen.activation_bits, "signed": signed,
                                  "step": float(steps[name])} for name, signed in points.items()])
    return model.eval().to(memory_format=torch.channels_last), record["accuracy_by_step"]
