"""From a masked checkpoint to the shipped one: every value that inference needs gets a grid and a stated width.

    python quantize.py --checkpoint runs/default/masked.pt      writes cifar100_mobilenetv2.pt and its .json

What is stored                                               width
  weights                 code * step, step a power of two   6 or 8 bits a layer (the submission's table, by default)
  BatchNorm scale         a float16: an 11-bit multiplier and a 5-bit shift                                   16 bits
  BatchNorm shift, bias   code * step, step a power of two                                                    16 bits
  activations             code * step, step a power of two   8 bits: unsigned after a ReLU, signed elsewhere
BatchNorm is stored folded: mean 0, variance 1 - eps, so that scale and shift are all it has. A free scale of a layer,
or of an output channel, costs no storage: the BatchNorm after the convolution absorbs it, w = s q and
a (s q * x) + b = (a s) (q * x) + b. The linear layer has none behind it, so its step is always a power of two.
Where every channel has its own step (scheme "channel") it is chosen such that a s has only 5 significant bits, and the
shift is a whole number of the accumulator's units: what is left to differ in an 8-bit engine that computes in float32
behind its accumulators is too rare to be seen (see tools/export_onnx.py).

Powers of two make the evaluation exact: see compressed/exact_network.py, the network that computes on these grids.
"""
import argparse
import dataclasses
import json
import platform
import sys
import tomllib
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressed import cifar100, claims, counting, dead_weight, networks, threads
from compressed.checkpoints import CHECKPOINT
from compressed.command_line import command_line, number, run_script, some_path
from compressed.errors import BadInput
from compressed.evaluation import Paused, evaluate, logits, renew_means, renew_statistics
from compressed.exact_network import Quantizer, exact_network, folded, probe_logits, quantize_activations
from compressed.files import (
    check_outputs,
    git_commit,
    load_lines,
    load_record,
    save_record,
    save_tensors,
    sha256,
    stage_logs,
)
from compressed.formats import code_range, codes, fake_quantize, found_formats, power_of_two_step
from compressed.graph import activation_points, neighbours, weight_layers
from compressed.mnet import stored_exponent
from compressed.networks import load_checkpoint, load_state, save_state
from training import loop, plan, reweighted_l1, teachers

SIX_BITS = (3, 5, 8, 10, 11, 14, 16, 19, -3)  # the submission's QBNs, of 58 layers; every other layer has 8
SCHEMES = ("power-of-two", "layer", "channel")
RANGES = ("max", "mse", "logits")
SHIFT_BITS = 16
GRIDS = ("scheme", "table", "ranges", "renew", "activation_bits", "calibration")  # options that decide the grids
TUNING = ("lr", "optimizer", "turn", "batch_size", "mixing", "seed")  # and settings of the fine-tuning
SIGNIFICANT_BITS = 5  # of a short scale; what is stored is a float16, which has 11


# -------------------------------------------------------------------------------------------------------- the grids

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


def bit_table(option: str | None) -> list[int]:
    """Bits of all layers. None: the submission's table; a number: that many for all; else a TOML file.

    The file has `default = 8` and a table [bits] of layer names (in quotes), or indices, to bits. Raises BadInput for
    anything else in it, for an unknown layer and for widths outside 2 to 8 (activations have at most 8, and wider
    weights would not be summed exactly).
    """
    names = [name for name, _ in weight_layers(networks.make())]
    if option is None:
        table = [6 if i in SIX_BITS or i - len(names) in SIX_BITS else 8 for i in range(len(names))]
    elif option.isdecimal():
        table = [int(option)] * len(names)
    else:
        try:
            content = tomllib.loads(Path(option).read_text())
        except OSError as error:
            raise BadInput(f"no bit table {option!r}: give a number of bits or a TOML file") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BadInput(f"{option}: not a TOML file ({error})") from error
        if content.keys() - {"default", "bits"} or not isinstance(content.get("bits", {}), dict):
            raise BadInput(f"{option}: expected nothing but `default = 8` and a table [bits]")
        table = [content.get("default", 8)] * len(names)
        for key, bits in content.get("bits", {}).items():
            if key in names:
                table[names.index(key)] = bits
            elif key.isdecimal() and int(key) < len(names):
                table[int(key)] = bits
            else:
                raise BadInput(f"{option}: the network has no layer {key!r} (names with dots need quotes)")
    for name, bits in zip(names, table):
        if not isinstance(bits, int) or not 2 <= bits <= 8:
            raise BadInput(f"{bits!r} bits for {name}: expected 2 to 8")
    return table


# ----------------------------------------------------------------------------- a network that computes on its grids

class QuantizedConv2d(nn.Conv2d):
    """A convolution that rounds its weights on the way: what it stores is what is trained."""
    step, bits = None, None

    def forward(self, x):
        weight = fake_quantize(self.weight, self.step.to(self.weight), *code_range(self.bits))
        return self._conv_forward(x, weight, None)


class QuantizedLinear(nn.Linear):
    step, bits = None, None

    def forward(self, x):
        return F.linear(x, fake_quantize(self.weight, self.step.to(self.weight), *code_range(self.bits)), self.bias)


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor, bits: int, ranges: str) -> list[dict]:
    """A step for every activation point, from the activations of `images` (uint8 [N, 3, 32, 32], of the train set).

    ranges "max": the submission's step for the largest value seen. "mse": of that step and the three below it, the
    one with the least squared error over all values: a clipped outlier costs less than a coarse grid. The image needs
    no calibration: its pixels are exactly code * 2^-6.
    """
    points = activation_points(model)
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
        if name == "image" and bits == 8:
            step = 1 / cifar100.STD
        result.append({"name": name, "bits": bits, "signed": signed, "step": step})
    return result


def choose_steps(model: nn.Module, images: Tensor, reference: Tensor) -> None:
    """One pass over the activation steps, the image's aside: twice and half of each is kept where the logits gain.

    What gains has the lower KL divergence of the model's softmax from that of the float network, whose logits for
    these images are the `reference` [N, classes]. A squared error tells what a point loses, and this what it is worth.
    """
    expected, network = reference.double().log_softmax(1), Paused(model, images)

    def divergence() -> float:
        found = network.finish().double().log_softmax(1)
        return float(F.kl_div(found, expected, reduction="batchmean", log_target=True))

    least = divergence()
    for name in activation_points(model):
        if name == "image":
            continue
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


def quantize_weights(model: nn.Module, table: list[int], scheme: str) -> None:
    """Make every convolution and the linear layer round its weights, with steps from the weights as they are now."""
    if scheme not in SCHEMES:
        raise BadInput(f"unknown scheme {scheme!r}; known: {', '.join(SCHEMES)}")
    for (_, module), bits in zip(weight_layers(model), table, strict=True):
        weight = module.weight.detach()
        if scheme == "power-of-two" or isinstance(module, nn.Linear):
            step = torch.tensor(power_of_two_step(float(weight.abs().max()), bits), device=weight.device)
        else:
            step = free_step(weight, bits, channel=scheme == "channel")
        # same keys, same tensors
        module.__class__ = QuantizedLinear if isinstance(module, nn.Linear) else QuantizedConv2d
        module.step, module.bits = step, bits


@torch.no_grad()
def shipped(model: nn.Module) -> tuple[nn.Module, list[dict]]:
    """(a plain MobileNetV2 whose values all stand on their grids, the claim for each of its tensors)."""
    network = networks.make()
    network.load_state_dict(model.state_dict())
    network.eval()
    table, ours = neighbours(network), []
    for (name, source), (_, module) in zip(weight_layers(model), weight_layers(network)):
        low, high = code_range(source.bits)
        code = codes(source.weight.detach().float(), source.step, low, high)
        if isinstance(module, nn.Linear):
            module.weight.copy_(code * source.step + 0.0)
            ours.append({"name": f"{name}.weight", "bits": source.bits, "step": float(source.step)})
            ours.append(store_fixed(module.bias, f"{name}.bias"))
            continue
        # a scheme's free step goes into the BatchNorm behind; what is stored has the step 2^-(b-1), or the scheme's own
        step = float(source.step) if source.step.dim() == 0 else 2.0 ** (1 - source.bits)
        module.weight.copy_(code * step + 0.0)  # a small negative value is -0.0: there is one code 0
        ours.append({"name": f"{name}.weight", "bits": source.bits, "step": step})
        norm_name = table[name][0]
        bn = network.get_submodule(norm_name)
        scale, shift = folded(bn)
        scale = scale * (source.step / step).double().flatten()
        scale[code.flatten(1).count_nonzero(1) == 0] = 0  # nothing arrives: any scale would do, and zero says so
        largest = float(scale.abs().max())
        if largest > torch.finfo(torch.float16).max:
            raise BadInput(f"{norm_name}: its folded scale {largest:.3g} does not fit 16 bits")
        bn.weight.copy_(scale.half())
        bn.bias.copy_(shift)
        bn.running_mean.zero_()
        bn.running_var.fill_(1 - bn.eps)
        bn.num_batches_tracked.zero_()
        ours.append({"name": f"{norm_name}.weight", "bits": 16, "kind": "float16"})
        ours.append(store_fixed(bn.bias, f"{norm_name}.bias"))
    order = {name: i for i, name in enumerate(network.state_dict())}
    return network, sorted(ours, key=lambda claim: order[claim["name"]])


@torch.no_grad()
def shorten_scales(model: nn.Module) -> None:
    """Move every channel's free step, by 3% at most, to where its product with the BatchNorm's scale is short.

    Codes times scales of 5 significant bits need few bits, so that float32 holds them exactly. The weights are rounded
    to the step that is used, so nothing is lost but the freedom of the step.
    """
    for name, (norm, _) in neighbours(model).items():
        conv, (scale, _) = model.get_submodule(name), folded(model.get_submodule(norm))
        step = conv.step.double().flatten()
        significand, exponent = torch.frexp(scale * step)
        short = torch.ldexp((significand * 2**SIGNIFICANT_BITS).round(), exponent - SIGNIFICANT_BITS)
        conv.step = torch.where(scale == 0, step, short / scale).float().view_as(conv.step)


@torch.no_grad()
def round_shifts(network: nn.Module, tensors: list[dict], activations: list[dict]) -> None:
    """Round the BatchNorm shifts of a shipped network, in place, to whole units of their accumulators.

    A unit is scale x weight step x input step. A shift stays a 16-bit code, so it becomes a multiple of the odd part of
    the unit and of both powers of two. Engines add a bias to the accumulator: as a whole number.
    """
    steps = {entry["name"]: Fraction(entry["step"]) for entry in tensors + activations if "step" in entry}
    for name, (norm, source) in neighbours(network).items():
        bn, step = network.get_submodule(norm), steps[f"{norm}.bias"]
        largest = step * code_range(SHIFT_BITS)[1]
        for channel, (scale, shift) in enumerate(zip(bn.weight.tolist(), bn.bias.tolist())):
            if scale == 0:
                continue  # nothing is accumulated
            unit = abs(Fraction(scale)) * steps[f"{name}.weight"] * steps[source]
            odd = unit.numerator // (unit.numerator & -unit.numerator)
            grain = odd * max(unit / odd, step)
            limit = largest // grain
            bn.bias[channel] = float(max(-limit, min(limit, round(Fraction(shift) / grain))) * grain)


def store_fixed(tensor: Tensor, name: str) -> dict:
    """Round a vector in place to 16-bit codes times one power of two: what is added needs absolute precision."""
    step = power_of_two_step(float(tensor.abs().max()), SHIFT_BITS)
    tensor.copy_(codes(tensor.double(), step, *code_range(SHIFT_BITS)) * step + 0.0)
    return {"name": name, "bits": SHIFT_BITS, "step": step}


# ---------------------------------------------------------------------------------------------------------- the claim

def training_record(checkpoint, tuned: bool = False) -> list[dict]:
    """What the run folder of a checkpoint tells of its stages: settings, hardware, last line of the log.

    tuned: of the fine-tuning too, if it has one.
    """
    folder, stages = Path(checkpoint).parent, []
    for log in stage_logs(folder):
        if log.stem == "quantized" and not tuned:
            continue
        options = log.with_suffix(".options.json")
        if options.is_file():
            record = load_record(options, "remove it, or give a checkpoint elsewhere")
            lines = load_lines(log)
            known = {key: record.get(key) for key in ("machine", "train_images", "settings")}
            if not lines or not isinstance(known["settings"], dict) or None in known.values():
                raise BadInput(f"{options} and {log} are not what a stage writes; remove them")
            stages.append({"stage": log.stem} | known | {"last_epoch": lines[-1]})
    return stages


def made_claim(checkpoint: Path, claim: dict) -> dict:
    """The claim (see claims.py) with what follows from the file as it was written: digest, counts and logits."""
    model = load_checkpoint(checkpoint)
    formats, problems = claims.hold(claim, checkpoint, model, found_formats(model))
    if problems:
        raise AssertionError(f"{checkpoint} contradicts its own claim: {problems}")
    return {"checkpoint": checkpoint.name, "sha256": sha256(checkpoint)} | claim | {
        "counts": counting.summary(model, formats),
        "probe_logits": probe_logits(exact_network(model, claim["activations"]))}


def parse(argv=None) -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--checkpoint", type=some_path, default=Path("runs/default/masked.pt"), metavar="F",
                        help="sparse float checkpoint (%(default)s)")
    parser.add_argument("--out", type=some_path, default=Path(CHECKPOINT), metavar="F",
                        help="what is written, a .pt, with its claim F.json beside it (%(default)s)")
    parser.add_argument("--table", metavar="T", help="bits of the layers: a number for all, or a TOML file (default: "
                        "the submission's, 6 bits at " + ", ".join(map(str, SIX_BITS)) + " and 8 elsewhere)")
    parser.add_argument("--scheme", choices=SCHEMES, default="channel", help="step of the weights: the submission's "
                        "power of two a layer, a free scale a layer, or a free scale per channel (%(default)s)")
    parser.add_argument("--activation-bits", type=number(int, 2, 8), default=8, metavar="B", help="(%(default)s)")
    parser.add_argument("--ranges", choices=RANGES, default="logits", help="activation steps: of the largest value as "
                        "in the submission, of the least squared error, or from there what the logits prefer "
                        "(%(default)s)")
    parser.add_argument("--calibration", type=number(int, 1, 10**6), default=1000, metavar="N",
                        help="train images that set the ranges (%(default)s)")
    parser.add_argument("--renew", type=number(int, 0, 10**6), default=4000, metavar="N",
                        help="train images that renew the "
                        "BatchNorm statistics once the weights are quantized, and the means once the activations are; "
                        "0: keep them (%(default)s)")
    cifar100.add_options(parser)
    tune = parser.add_argument_group("quantization-aware fine-tuning, with the zeros kept; in the checkpoint's folder: "
                                     "quantized.jsonl, quantized.pt, and quantized.state/ while it runs")
    tune.add_argument("--epochs", type=number(int, 0, 10**6), default=0, metavar="E", help="(%(default)s: none)")
    plan.add_options(tune, TUNING, lr=0.01, mixing="both", seed=0)
    tune.add_argument("--teacher", nargs="+", type=some_path, default=[], metavar="F",
                      help="checkpoints whose logits are distilled, as of training/main.py")
    tune.add_argument("--no-resume", dest="resume", action="store_false", help="start the fine-tuning again")
    parser.add_argument("--no-cuda", action="store_true", help="use the CPU even if there is a CUDA device")
    plan.add_option(parser, "--augment", "augment", text="of the train images, for --renew and for fine-tuning "
                    "(default: as the checkpoint was trained, by its run folder; else plain)")
    return parser.parse_args(argv)


def fine_tune(model: nn.Module, train_data, test_data, args, steps_before=()) -> nn.Module:
    """Train the latent weights behind the grids: steps and BatchNorm statistics stay, zeros stay zero.

    Leaves quantized.pt in the checkpoint's folder, and what it was made of in quantized.options.json, `steps_before`
    (what `accuracies` found before it) too: `quantize` takes it up.
    """
    def freeze_statistics(network):
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    cpu, folder = train_data.labels.device.type == "cpu", Path(args.checkpoint).parent
    settings = loop.Settings(**plan.given(args) | {
        "weight_decay": 0.0, "warmup_epochs": min(1, args.epochs / 4), "smoothing": 0.0 if args.teacher else 0.1,
        "refresh": 0, "precision": "float32" if cpu else "bfloat16", "workers": threads.cores() if cpu else 1})
    masks = reweighted_l1.Masks(model, reweighted_l1.zero_masks(model, [name for name, _ in weight_layers(model)]))

    def began():
        (folder / "quantized.pt").unlink(missing_ok=True)  # of other options
        where = f"CPU, {threads.cores()} cores" if cpu else torch.cuda.get_device_name()
        save_record({"stage": "quantized", "machine": f"{where}, torch {torch.__version__}",
                     "train_images": len(train_data), "commit": git_commit(),
                     "settings": dataclasses.asdict(settings), "options": options_of(args),
                     "source_sha256": sha256(args.checkpoint), "accuracy_by_step": list(steps_before)},
                    folder / "quantized.options.json")

    taught_by = [moved(teachers.load(path), train_data.labels.device) for path in args.teacher]
    model = loop.train(
        "quantized", model, train_data, test_data, settings, folder, masks=masks, teachers=taught_by,
        prepare=freeze_statistics, resume=args.resume, eval_every=args.epochs, began=began,
        context={name: getattr(args, name) for name in GRIDS} | {
            "steps": loop.fingerprint([m.step for _, m in weight_layers(model)])})
    if model is None:
        raise BadInput("fine-tuning was stopped; the same command goes on")
    save_tensors(with_steps(model), folder / "quantized.pt")
    loop.State(folder / "quantized.state", settings).remove()
    return model


def moved(network: nn.Module, device) -> nn.Module:
    """The network, in place, with the steps of its weights."""
    for module in network.modules():
        if isinstance(getattr(module, "step", None), Tensor):
            module.step = module.step.to(device)
    return network.to(device, memory_format=torch.channels_last)


def options_of(args) -> dict:
    """What decides the result of a fine-tuning, as it stands in quantized.options.json."""
    names = (*GRIDS, "augment", "epochs", "teacher", *TUNING)
    return json.loads(json.dumps({name: getattr(args, name) for name in names}, default=str))  # paths as text


def with_steps(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network on its grids, with the steps of weights and activations: "NAME.step"."""
    modules = dict(weight_layers(model)) | {n: m for n, m in model.named_modules() if isinstance(m, Quantizer)}
    content = model.state_dict() | {f"{name}.step": torch.as_tensor(module.step) for name, module in modules.items()}
    return {name: value.cpu().contiguous() for name, value in content.items()}


def tuned(path, args, table: list[int]) -> nn.Module:
    """The fine-tuned network that `with_steps` wrote."""
    content, model = load_state(path), networks.make()
    try:
        steps = {name: content.pop(f"{name}.step")
                 for name in (*(name for name, _ in weight_layers(model)), *activation_points(model))}
        model.load_state_dict(content)
    except (KeyError, RuntimeError) as error:
        raise BadInput(f"{path}: not what a fine-tuning writes; --no-resume starts it again") from error
    quantize_weights(model, table, args.scheme)
    for name, module in weight_layers(model):
        module.step = steps[name]
    quantize_activations(model, [{"name": name, "bits": args.activation_bits, "signed": signed,
                                  "step": float(steps[name])} for name, signed in activation_points(model).items()])
    return model.eval().to(memory_format=torch.channels_last)


class Accuracies:
    """What each step leaves of the accuracy on `data`: printed, and kept in `steps`."""

    def __init__(self, data: cifar100.Images):
        self.data, self.steps = data, []

    def after(self, step: str, network: nn.Module) -> None:
        loss, correct = evaluate(network.eval(), self.data)
        images = len(self.data)
        lost = f", {(correct - self.steps[-1]['correct']) / images:+.2%}" if self.steps else ""
        print(f"{step:<52} {correct}/{images} ({correct / images:.2%}{lost}), loss {loss:.4f}", flush=True)
        self.steps.append({"step": step, "correct": correct, "loss": loss})


def quantize(model: nn.Module, train_data: cifar100.Images, table: list[int], args,
             accuracies: Accuracies) -> nn.Module:
    """The model with weights and activations on their grids; its BatchNorms are still its own."""
    path = Path(args.checkpoint).parent / "quantized.pt"
    if args.epochs and args.resume and path.is_file():
        record = load_record(path.with_suffix(".options.json"), "--no-resume fine-tunes again")
        if record["source_sha256"] != sha256(args.checkpoint) or record["options"] != options_of(args):
            raise BadInput(f"{path} was fine-tuned from another checkpoint or with other options; --no-resume "
                           "fine-tunes again")
        accuracies.steps = record["accuracy_by_step"]
        model = moved(tuned(path, args, table), train_data.labels.device)
    else:
        on_grids(model, train_data, table, args, accuracies)
        if not args.epochs:
            return model
        model = fine_tune(model, train_data, accuracies.data, args, accuracies.steps)
    accuracies.after(f"fine-tuned for {args.epochs} epochs", model)
    if args.scheme == "channel":
        shorten_scales(model)
        accuracies.after("steps moved again: the scales were trained", model)
    return model


def on_grids(model: nn.Module, train_data: cifar100.Images, table: list[int], args, accuracies: Accuracies) -> None:
    """Put the weights and activations of a float network on grids chosen for it, in place."""
    accuracies.after("float", model)
    # in canonical order the classes are mixed at random: the first images are a fair sample
    images = train_data.images[:args.calibration]
    reference = logits(model, images)
    quantize_weights(model, table, args.scheme)
    accuracies.after(f"weights at {'/'.join(map(str, sorted(set(table))))} bits, {args.scheme}", model)
    if args.renew:
        renew_statistics(model, train_data, args.renew, args.augment, torch.Generator().manual_seed(args.seed))
        accuracies.after("BatchNorm statistics renewed", model)
    if args.scheme == "channel":
        shorten_scales(model)
        accuracies.after(f"steps moved for scales of {SIGNIFICANT_BITS} significant bits", model)
    start = "mse" if args.ranges == "logits" else args.ranges
    quantize_activations(model, calibrate(model, images, args.activation_bits, start))
    accuracies.after(f"activations at {args.activation_bits} bits, {start}", model)
    if args.ranges == "logits":
        choose_steps(model, images, reference)
        accuracies.after("activation steps that the logits prefer", model)
    if args.renew:
        renew_means(model, train_data, args.renew, args.augment, torch.Generator().manual_seed(args.seed))
        accuracies.after("BatchNorm means renewed, variances kept", model)


def ship(model: nn.Module, scheme: str, accuracies: Accuracies) -> tuple[nn.Module, dict]:
    """(the network, all of whose values stand on their grids; "tensors", "activations" and more of its claim)."""
    network, tensors = shipped(model)
    activations = [{"name": name, "bits": module.bits, "signed": module.signed, "step": module.step}
                   for name, module in model.named_modules() if isinstance(module, Quantizer)]
    accuracies.after("BatchNorm folded, scales, shifts, biases at 16 bits", exact_network(network, activations))
    if scheme == "channel":
        round_shifts(network, tensors, activations)
        accuracies.after("shifts rounded to whole accumulator units", exact_network(network, activations))
    removed = dead_weight.remove(network, activations)
    accuracies.after(f"dead weight removed: {removed['weights']:,} weights", exact_network(network, activations))
    return network, {"tensors": tensors, "activations": activations, "dead_weight_removed": removed}


def main(argv=None) -> int:
    threads.prepare()
    args, commit = parse(argv), git_commit()  # now: what this writes may itself be tracked
    tuned_files = [args.checkpoint.with_name(f"quantized.{kind}") for kind in ("pt", "options.json", "jsonl")]
    check_outputs([args.out, claims.claim_path(args.out), *(tuned_files if args.epochs else ())],
                  [args.checkpoint, *args.teacher, *([args.table] if args.table else [])], suffix=".pt")
    table = bit_table(args.table)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu")
    model, source = moved(load_checkpoint(args.checkpoint), device), sha256(args.checkpoint)
    (train_data, _), (test_data, data_name) = (cifar100.chosen(args, split, device) for split in ("train", "test"))
    trained = training_record(args.checkpoint)
    args.augment = args.augment or (trained[-1]["settings"].get("augment", "plain") if trained else "plain")
    accuracies = Accuracies(test_data)
    model = moved(quantize(model, train_data, table, args, accuracies), "cpu")
    accuracies.data = cifar100.chosen(args, "test")[0]  # what is shipped is exact, and verified, on a CPU
    network, formats = ship(model, args.scheme, accuracies)
    for entry in formats["tensors"] + formats["activations"]:  # before anything is written that no script would read
        stored_exponent(entry.get("step", 1), entry["name"])
    save_state(network.state_dict(), args.out)
    last = accuracies.steps[-1]
    claim = formats | {
        "accuracy": {"data": data_name, "correct": last["correct"], "images": len(test_data), "loss": last["loss"]},
        "accuracy_by_step": accuracies.steps,
        "made_by": {"command": "python quantize.py " + " ".join(sys.argv[1:] if argv is None else argv),
                    "commit": commit,
                    "machine": f"{platform.machine()}, {threads.cores()} cores, torch {torch.__version__}",
                    "source_sha256": source,
                    "training": training_record(args.checkpoint, tuned=args.epochs > 0)}}
    save_record(made_claim(args.out, claim), claims.claim_path(args.out))
    print(f"wrote {args.out} and {claims.claim_path(args.out)}")
    return 0


if __name__ == "__main__":
    run_script(main)
