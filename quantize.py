"""Quantize a masked checkpoint: round every value that inference needs to a code times a step, of a stated bit width.

    python quantize.py --checkpoint runs/default/masked.pt --out runs/default/net.pt       writes net.pt and net.json

What is stored                                               width
  weights                 code * step, step a power of two   6 or 8 bits per layer (by default the submission's)
  BatchNorm scale         a float16: an 11-bit multiplier and a 5-bit shift; or fixed-point (--scale-bits)    16 bits
  BatchNorm shift, bias   code * step, step a power of two                                                    16 bits
  activations             code * step, step a power of two   8 bits: unsigned where no value can be below zero
BatchNorm is stored folded: mean 0, variance 1 - eps, so that scale and shift are all it has. A free scale of a layer,
or of an output channel, costs no storage: the BatchNorm after the convolution absorbs it. With w = s q (s: step,
q: codes) and the BatchNorm's scale a and shift b, a (s q * x) + b = (a s) (q * x) + b. The linear layer has none after
it, so its step is always a power of two.
Where every channel has its own step (scheme "channel") it is chosen such that a s has only 5 significant bits, and the
shift is a whole number of the accumulator's units. So an 8-bit engine that computes in float32 after its accumulators
can give the same logits: for both shipped networks it does, on all test images (see tools/export_onnx.py).

Powers of two make the evaluation exact: see compressed/exact_network.py, the network that computes on these grids.
"""
import argparse
import dataclasses
import shlex
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    import compressed.interrupt  # noqa: F401

import torch
from torch import nn

from compressed import cifar100, claims, datasets, dead_weight, grids, networks, normalisation, threads
from compressed.checkpoints import CHECKPOINT
from compressed.command_line import command_line, number, option_name, run_script, some_file, some_path, some_text
from compressed.errors import BadInput
from compressed.evaluation import evaluate, logits, without_duplicates
from compressed.exact_network import Quantizer, exact_network, quantize_activations
from compressed.files import check_outputs, find_toml, git_commit, load_json, lock_file, replacing, sha256
from compressed.formats import listed, stored_exponent
from compressed.graph import prepare, read_graph
from compressed.step_search import choose_steps
from training import fine_tune, plan, recipes, teachers, trial
from training.batchnorm import renew_means, renew_statistics
from training.replicas import Processes
from training.runs import (record_next_to, stage_of, stage_records, training_record, warn_of_a_held_out_run,
                           warn_of_another_network, warn_of_seen_images)

TABLES = Path(__file__).resolve().parent / "training" / "bits"
TUNING = ("lr", "optimizer", "turn", "batch_size", "mixing", "seed", "schedule", "cooldown", "clean", "sizes",
          "distill", "temperature", "teaching", "step_rate")  # settings of the fine-tuning
TUNING_LR = 0.01  # but of adam
OF_TUNING = {*TUNING, "teacher", "frozen", "precision", "graphs"} - {"seed"}  # of no effect without one


def make_parser() -> argparse.ArgumentParser:
    parser = command_line(__doc__)
    add, bits = parser.add_argument, number(int, 4, 16)
    add("--recipe", type=some_text, metavar="NAME",
        help="options from the table [quantized] of a recipe (see training/main.py); "
        "the command line overrides it (default: recipe.toml in the checkpoint's folder, else none)")
    add("--checkpoint", type=some_file, default=Path("runs/default/masked.pt"), metavar="F",
        help="sparse float checkpoint (%(default)s)")
    add("--out", type=some_file, default=Path(CHECKPOINT), metavar="F",
        help="output checkpoint, a .pt; its claim has the same name with the suffix .json (%(default)s; an existing "
        "file is replaced only if --out is given)")
    add("--table", type=some_text, metavar="T",
        help="bits of the layers, 2 to 8: a number for all, or a TOML file, or its name in training/bits/, with "
        "`default = 8` and a table [bits] of names, as tools.layers shows, or kinds: "
        f"{', '.join(grids.LAYER_KINDS)} (default: the "
        f"submission's, 6 bits at {', '.join(map(str, grids.SIX_BITS))} and 8 elsewhere; for another network 8 bits)")
    add("--scheme", choices=grids.SCHEMES, default="channel", help="step size of the weights. power-of-two: a "
        "power of two per layer, as in the submission; layer: any value per layer; channel: any value per output "
        "channel (%(default)s)")
    add("--activation-bits", type=some_text, default="8", metavar="T",
        help="bits of the activation points, 2 to 8: a number for all but "
        "the image, which has 8, or a TOML file like --table's; kinds: " + ", ".join(grids.POINT_KINDS)
        + " (%(default)s)")
    add("--scale-bits", type=bits, default=grids.FLOAT_BITS, metavar="B",
        help="bits of a BatchNorm's scale: 16, a float16; or 4 to 15, a fixed-point number (%(default)s)")
    add("--shift-bits", type=bits, default=grids.SHIFT_BITS, metavar="B", help="bits of a BatchNorm's shift, a "
        "fixed-point number of 4 to 16; with fewer than 16, 8-bit engines round it to whole units of the accumulator "
        "(%(default)s)")
    add("--ranges", choices=grids.RANGES, default="logits", help="activation steps: by largest value as in the "
        "submission, by least squared error, or from there by effect on the logits (%(default)s)")
    add("--calibration", type=number(int, 2, 10**6), default=1000, metavar="N",
        help="train images that set the ranges (%(default)s)")
    add("--renew", type=number(int, 0, 10**6), default=4000, metavar="N", help="train images from which BatchNorm "
        "statistics are re-estimated once the weights are quantized, and then the means: after steps were moved for "
        "short scales, and with --ranges mse or max again after activations are quantized; 0: keep them (%(default)s)")
    networks.add_option(parser, "the checkpoint's last training stage, or the recipe,")
    normalisation.add_option(parser)
    datasets.add_options(parser)
    tune = parser.add_argument_group("quantization-aware fine-tuning, with the zeros kept", "It writes quantized.pt, "
                                     "quantized.jsonl and quantized.options.json, and while it runs quantized.start.pt "
                                     "and quantized.state/.")
    tune.add_argument("--epochs", type=number(int, 0, 10**6), default=0, metavar="E",
                      help="epochs of fine-tuning; 0: none (%(default)s)")
    plan.add_option(tune, "--lr", "lr", text=f"peak learning rate ({TUNING_LR}; of adam {plan.ADAM_LR})")
    plan.add_options(tune, [name for name in TUNING if name != "lr"], mixing="both", seed=0)
    tune.add_argument("--teacher", nargs="*", type=some_path, default=[], metavar="F",
                      help="checkpoints to distil from, as in training/main.py; --normalise is for them, too")
    tune.add_argument("--frozen", type=number(float, 0, 1), default=1.0, metavar="S",
                      help="share of the epochs, at the end, with frozen BatchNorm statistics (%(default)s)")
    tune.add_argument("--tuning-folder", type=some_path, metavar="DIR", help="where fine-tuning writes (default: --out "
                      f"with the suffix .run, such as {Path(CHECKPOINT).with_suffix('.run')})")
    plan.add_machine(tune)
    tune.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True,
                      help="resume the fine-tuning (default)")
    add("--no-cuda", action="store_true", help="use the CPU even if there is a CUDA device")
    plan.add_option(parser, "--augment", "augment", text="of the train images, for --renew and for fine-tuning "
                    "(default: the recipe's, else as the checkpoint was trained, by its run folder, else plain)")
    return parser


def parse(argv=None) -> argparse.Namespace:
    """Return the options: those of the command line, else of the recipe, else the defaults.

    --network comes from the command line, else the checkpoint's last training stage, else the recipe; --augment from
    the command line, else the recipe, else the last stage. If the run's own recipe names the same teachers for all
    stages, the teachers are those that the last stage was trained with, and args.as_trained is True.
    """
    parser = make_parser()
    given = recipes.given(parser, argv)
    checkpoint = given.get("checkpoint", parser.get_default("checkpoint"))
    path = recipes.path_of(given.get("recipe"), checkpoint.parent)
    recipe = path and recipes.read(path)
    args = recipes.merged(parser, given, recipe, "quantized")
    args.recipe, args.trained = path, training_record(args.checkpoint)  # now: its training may go on
    last = args.trained[-1] if args.trained else {"options": {}, "settings": {}}
    if "network" not in given:
        args.network = last["options"].get("network") or args.network or networks.DEFAULT
    args.as_trained = bool(recipe and args.trained and "teacher" in recipe["common"] and not given.keys() & {
        "recipe", "teacher"} and not any("teacher" in recipe[stage] for stage in recipes.STAGES))
    if args.as_trained:
        args.teacher = [Path(teacher) for teacher in last["options"].get("teacher", ())]
    args.augment = args.augment or last["settings"].get("augment", "plain")
    if args.table and not args.table.isdecimal():
        args.table = str(find_toml(args.table, TABLES, "number of bits, or bit table,"))
    args.replace, args.given = "out" in given, given.keys()
    args.tuning_folder = args.tuning_folder or args.out.with_suffix(".run")
    if not args.epochs and (idle := given.keys() & OF_TUNING):
        parser.error(f"{option_name(min(idle))} belongs to the fine-tuning: give --epochs, too")
    return args


class Accuracies:
    """Evaluate a network on `data` after each step of its quantization: print the accuracy, and keep it in `steps`.

    right: which images were classified correctly at last, bool [N].
    """

    def __init__(self, data: cifar100.Images):
        self.data, self.steps, self.right = data, [], None

    def after(self, step: str, network: nn.Module) -> None:
        """Evaluate the network as it is after a step, which is described by a few words."""
        with grids.weights_rounded_once(network):
            loss, self.right = evaluate(network.eval(), self.data)
        correct, images = int(self.right.sum()), len(self.data)
        lost = f", {(correct - self.steps[-1]['correct']) / images:+.2%}" if self.steps else ""
        print(f"{step:<52} {correct}/{images} ({correct / images:.2%}{lost}), loss {loss:.4f}", flush=True)
        self.steps.append({"step": step, "correct": correct, "loss": loss})


def on_grids(model: nn.Module, train_data: cifar100.Images, chosen: grids.Options, accuracies: Accuracies) -> None:
    """Put the weights and activations of a float network on grids chosen for it, in place."""
    def renewing():
        return model, train_data, chosen.renew, chosen.augment, torch.Generator().manual_seed(chosen.seed)

    accuracies.after("float", model)
    # in canonical order the classes are mixed at random: the first images are a fair sample
    images = train_data.images[:chosen.calibration]
    reference = logits(model, images)
    grids.quantize_weights(model, chosen.table, chosen.scheme)
    accuracies.after(f"weights at {listed(chosen.table)} bits, {chosen.scheme}", model)
    if chosen.renew:
        renew_statistics(*renewing())
        accuracies.after("BatchNorm statistics re-estimated", model)
    if chosen.scheme == "channel":
        grids.shorten_scales(model, chosen.scale_bits)
        short = f"{grids.SIGNIFICANT_BITS} significant" if chosen.scale_bits == grids.FLOAT_BITS else chosen.scale_bits
        accuracies.after(f"steps moved for scales of {short} bits", model)
        if chosen.renew:  # now: the activation steps are chosen for these means
            renew_means(*renewing())
            accuracies.after("BatchNorm means re-estimated, variances kept", model)
    start = "mse" if chosen.ranges == "logits" else chosen.ranges
    widths = dict(zip(read_graph(model).activation_points, chosen.activation_bits, strict=True))
    quantize_activations(model, grids.calibrate(model, images, widths, start))
    accuracies.after(f"activations at {listed(chosen.activation_bits)} bits, {start}", model)
    if chosen.ranges == "logits":
        choose_steps(model, images, reference)
        accuracies.after("activation steps chosen by their effect on the logits", model)
    elif chosen.renew:
        renew_means(*renewing())
        accuracies.after("BatchNorm means re-estimated for rounded activations", model)


def quantize(model: nn.Module, train_data: cifar100.Images, chosen: grids.Options, tuning: fine_tune.Tuning | None,
             accuracies: Accuracies) -> nn.Module:
    """Return the model with weights and activations on their grids; its BatchNorms are still its own."""
    if tuning is None:
        on_grids(model, train_data, chosen, accuracies)
        return model
    classes = train_data.data_set.classes
    with lock_file(tuning.folder / "quantized.lock"):
        found = fine_tune.resumed(networks.make(tuning.network, classes), tuning, chosen)
        if found is None:
            # what it cannot begin with is refused before the long work
            steps = plan.Plan(tuning.settings, len(train_data), Processes())
            # in training mode a BatchNorm of single values needs two images; it is frozen where `frozen` is 1
            trial.try_network(lambda: prepare(networks.make(tuning.network, classes)), tuning.network, classes, steps,
                              train_data.labels.device, least=2 if tuning.frozen == 1 else None)
            teachers.load_all(tuning.teachers, tuning.network, train_data.data_set, tuning.normalise)
            on_grids(model, train_data, chosen, accuracies)
            found = model, accuracies.steps, False
        model, accuracies.steps, finished = found
        model.to(train_data.labels.device, memory_format=torch.channels_last)
        if not finished:
            model = fine_tune.fine_tune(model, train_data, accuracies.data, tuning, chosen, accuracies.steps)
    accuracies.after(f"fine-tuned for {tuning.settings.epochs} epochs", model)
    return model


def ship(model: nn.Module, network: nn.Module, chosen: grids.Options, accuracies: Accuracies) -> tuple[nn.Module, dict]:
    """Return a network all of whose values are on their grids; and "tensors", "activations" and more of its claim.

    network: a plain one of the model's kind, which is filled and returned.
    """
    network, tensors = grids.shipped(model, network, chosen.scale_bits, chosen.shift_bits)
    activations = [{"name": name, "bits": module.bits, "signed": module.signed, "step": module.step}
                   for name, module in model.named_modules() if isinstance(module, Quantizer)]
    grids.drop_negligible(network, tensors, activations)
    widths = listed((chosen.scale_bits, chosen.shift_bits, grids.SHIFT_BITS))
    accuracies.after(f"BatchNorm folded, scales, shifts, biases at {widths} bits", exact_network(network, activations))
    if chosen.scheme == "channel" and chosen.shift_bits == grids.SHIFT_BITS:  # fewer bits cannot hold whole units
        grids.round_shifts(network, tensors, activations)
        accuracies.after("shifts rounded to whole accumulator units", exact_network(network, activations))
    removed = dead_weight.remove(network, activations)
    accuracies.after(f"dead weight removed: {removed['weights']:,} weights", exact_network(network, activations))
    for entry in tensors + activations:  # before anything is written that no script would read
        stored_exponent(entry.get("step", 1), entry["name"])
    return network, {"tensors": tensors, "activations": activations, "dead_weight_removed": removed}


def grid_options(args, model: nn.Module) -> grids.Options:
    """Return the options of the grids."""
    activation_bits = tuple(grids.activation_table(args.activation_bits, model).values())
    return grids.Options(args.scheme, tuple(grids.bit_table(args.table, model)), args.ranges, activation_bits,
                         args.calibration, args.renew, args.augment, args.seed, args.scale_bits, args.shift_bits)


def tuning_options(args, data_set: cifar100.DataSet, device: torch.device, source: str) -> fine_tune.Tuning | None:
    """Return the options of the fine-tuning; None without one. source: SHA-256 of the checkpoint that was read."""
    if not args.epochs:
        return None
    settings = plan.on_device(plan.Settings(**{
        "lr": plan.ADAM_LR if args.optimizer == "adam" else TUNING_LR} | plan.given(args) | {
        "weight_decay": 0.0, "warmup_epochs": min(1, args.epochs / 4),
        "smoothing": 0.0 if args.teacher else 0.1, "refresh": 0}), args, device)
    # what decides the result besides settings and grids, in plain values, if not the default
    others = {"data_set": ([data_set.classes, data_set.digest], [cifar100.CLASSES, cifar100.CIFAR100.digest]),
              "made_up": (args.made_up, None), "holdout": (args.holdout, False), "normalise": (args.normalise, None)}
    others = {key: value for key, (value, default) in others.items() if value != default}
    return fine_tune.Tuning(settings, args.frozen, tuple(map(str, args.teacher)), source, args.tuning_folder,
                            args.resume, args.network, others, args.normalise)


def check_places(args) -> None:
    """Raise BadInput if something that must not be replaced is where a file will be written."""
    claim_file = claims.claim_path(args.out)
    for file in (args.out, claim_file) if not args.replace else ():  # the default is the name of the shipped network
        if file.exists():
            raise BadInput(f"{file} exists: give --out {args.out} to replace it, or another name")
    weights = [f"{stage_of(args.out)}.pt", f"{stage_of(args.out)}.average.pt"]
    if args.out != args.checkpoint and args.out.name in weights and record_next_to(args.out):
        raise BadInput(f"{args.out} is the name of a stage's weights in that run folder: give --out another name")
    tuned = [args.tuning_folder / f"quantized.{kind}" for kind in ("pt", "options.json", "jsonl") if args.epochs]
    check_outputs([args.out, claim_file, *tuned],
                  [args.checkpoint, *args.teacher, *filter(None, (args.table, args.activation_bits))], suffix=".pt")
    if claim_file.is_file() and "digest" not in load_json(claim_file):
        raise BadInput(f"{claim_file}, which would be replaced, is no claim: give another --out")


def say_tuning(tuning: fine_tune.Tuning, given) -> None:
    """Print how the network will be fine-tuned, and which of the options that were given have no effect on that."""
    settings = tuning.settings
    for name, need in plan.without_effect(settings, tuning.teachers).items():
        if name in given:
            print(f"{option_name(name)} has no effect without {need}")
    print(f"to fine-tune: {settings.epochs} epochs in batches of {settings.batch_size}, {settings.optimizer}, lr "
          f"{settings.lr:g}{f', turn {settings.turn:g}' if settings.optimizer == 'muon' else ''}, mixing "
          f"{settings.mixing}, {len(tuning.teachers)} teachers", flush=True)


def accuracy_of(accuracies: Accuracies, data_name: str, data_folder) -> dict:
    """Return a claim's entry "accuracy" of the network that was evaluated last."""
    last = accuracies.steps[-1]
    found = {"data": data_name, "correct": last["correct"], "images": len(accuracies.data), "loss": last["loss"]}
    part = without_duplicates(accuracies.right, data_folder) if data_name == "test" else None
    return found | ({"without_duplicates": part} if part else {})


def main(argv=None) -> int:
    threads.prepare()
    args, commit = parse(argv), git_commit()  # now: what this writes may itself be tracked
    check_places(args)
    warn_of_another_network(args.checkpoint, args.network)
    if args.holdout:
        warn_of_seen_images(args.trained, args.checkpoint)
    elif not args.made_up:
        warn_of_a_held_out_run(args.trained)
    device = threads.use_device(args.no_cuda)
    model, source = prepare(networks.load_checkpoint(args.checkpoint, args.network)), sha256(args.checkpoint)
    record = record_next_to(args.checkpoint)
    if args.normalise and record:
        print(f"{args.checkpoint} was trained here: --normalise has no effect on it, but on teachers from elsewhere")
    elif args.normalise:
        model = normalisation.fold(model, *args.normalise)
    grids.check_quantizable(model)
    model.to(device, memory_format=torch.channels_last)
    chosen = grid_options(args, model)
    if args.epochs and args.as_trained:
        print("teachers as in the last stage: " + (", ".join(map(str, args.teacher)) or "none"))
    print(f"{args.checkpoint}: the data are read; then the test accuracy is printed after every step of quantization",
          flush=True)
    (train_data, _), (test_data, data_name) = (datasets.chosen(args, split, device, model)
                                               for split in ("train", "test"))
    if record:
        datasets.check_same(train_data.data_set, record.get("data_set"), args.checkpoint)
    tuning = tuning_options(args, train_data.data_set, device, source)
    if tuning:
        say_tuning(tuning, args.given)
    accuracies = Accuracies(test_data)
    model = quantize(model, train_data, chosen, tuning, accuracies).to("cpu", memory_format=torch.channels_last)
    # what is shipped is exact, and verified, on a CPU
    accuracies.data = dataclasses.replace(test_data, images=test_data.images.cpu(), labels=test_data.labels.cpu())
    plain = prepare(networks.make(args.network, train_data.data_set.classes))
    network, formats = ship(model, plain, chosen, accuracies)
    tuned = stage_records([tuning.folder / "quantized.jsonl"]) if tuning else []
    claim = formats | {
        "data_set": dataclasses.asdict(test_data.data_set),
        "accuracy": accuracy_of(accuracies, data_name, args.data),
        "accuracy_by_step": accuracies.steps,
        "made_by": {"command": shlex.join(["python", "quantize.py", *(sys.argv[1:] if argv is None else argv)]),
                    "commit": commit,
                    "options": {name: value for name, value in dataclasses.asdict(chosen).items()
                                if name not in ("table", "activation_bits")},  # these are those of tensors, activations
                    "machine": threads.describe_machine(device),
                    "source_sha256": source,
                    "training": args.trained + tuned}}
    with tempfile.TemporaryDirectory() as folder:  # no weights are replaced before there is a claim about them
        new = Path(folder, args.out.name)
        networks.save_state(network.state_dict(), new)
        claims.write(claim, new, args.network)
        for target in (args.out, claims.claim_path(args.out)):
            with replacing(target) as file:
                file.write(new.with_name(target.name).read_bytes())
    print(f"wrote {args.out} and {claims.claim_path(args.out)}")
    return 0


if __name__ == "__main__":
    run_script(main)
