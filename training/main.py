"""Train a sparse network in three stages: dense, reweighted L1, masked. Finished stages are not repeated.

    python training/main.py                    all stages that the run folder lacks
    python training/main.py --rew              one stage (--pretrain, --rew, --masked-retrain)
    python training/main.py --recipe NAME      with the options of training/recipes/NAME.toml
    torchrun --nproc-per-node 2 training/main.py ...

METHOD.md explains the method. reweighted_l1.py computes it, and loop.py is the training loop. A run folder holds
  STAGE.options.json    the resolved options                   STAGE.jsonl    a log, one line per epoch
  STAGE.state/          what a resume needs, until it is done  STAGE.pt       the weights of the finished stage
If a run was stopped, the same command resumes it.
"""
import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of the repository's top level

from compressed import datasets, environment, networks, threads  # noqa: E402
from compressed.cifar100 import DataSet  # noqa: E402
from compressed.command_line import command_line, number, run_script, some_path  # noqa: E402
from compressed.errors import BadInput  # noqa: E402
from compressed.files import git_commit, held, load_record, save_record, save_text, try_to_write  # noqa: E402
from compressed.networks import load_checkpoint, save_state  # noqa: E402
from training import loop, magnitude, plan, recipes, reweighted_l1, teachers  # noqa: E402
from training.state import MACHINE  # noqa: E402

STAGES = ("pretrain", "rew", "masked")
# defaults that differ between the stages; all others are in plan.Settings
EPOCHS = {"pretrain": 300, "rew": 120, "masked": 200}
PEAK_LR = {"sgd": {"pretrain": 0.4, "rew": 0.1, "masked": 0.2}, "adam": dict.fromkeys(STAGES, 1e-3)}
PEAK_LR["muon"] = PEAK_LR["sgd"]  # for the parameters that Muon leaves to SGD
# {option of the submission: the same setting here}
NAMES = {"--epoch": "epochs", "--optmzr": "optimizer", "--lr-scheduler": "schedule", "--smooth-eps": "smoothing"}
TEACHING = ("distill", "temperature", "teaching")
SPARSITY = ("target_sparsity", "sparsity_type", "config_file")  # the masked stage takes these from the stage before
DEFAULT_TARGET = 0.8
FLAG = argparse.BooleanOptionalAction


def stage_options(group) -> None:
    group.add_argument("--pretrain", action="store_true", help="dense training")
    group.add_argument("--rew", action="store_true", help="reweighted L1, from the dense weights")
    group.add_argument("--masked-retrain", action="store_true", help="mask, then retrain with the zeros frozen")
    # two names each: torchrun before Python 3.12 takes the short ones for ambiguous abbreviations of its own options
    group.add_argument("--recipe", metavar="NAME", help="TOML file with options of all stages, or its name in "
                       "training/recipes; the command line overrides it (default: the run folder's, else none)")
    group.add_argument("--run-folder", "--run", dest="run", type=some_path, default=Path("runs/default"), metavar="DIR",
                       help="run folder (%(default)s)")
    group.add_argument("--start-from", "--start", dest="start", type=some_path, metavar="F",
                       help="checkpoint that the first stage starts from (default: the stage before); a folder "
                            "STAGE.state means the latest saved weights of that unfinished stage")
    group.add_argument("--start-epoch", type=number(float, 0, 10**6), default=0, metavar="E",
                       help="begin at this epoch with the weights of --start, for a stage whose state is lost")
    group.add_argument("--resume", action=FLAG, default=True, help="resume the state in the run folder (default)")
    group.add_argument("--max-minutes", type=number(float, 0, 10**9), metavar="M",
                       help="save the state and stop after that time; the same command resumes the run")
    group.add_argument("--show-seconds", type=number(float, 0, 10**9), default=60, metavar="S",
                       help="seconds between lines of progress, if stderr is no terminal (%(default)s)")
    group.add_argument("--save-seconds", type=number(float, 0, 10**9), default=60, metavar="S",
                       help="seconds between saves of the state (%(default)s)")
    group.add_argument("--eval-every", type=number(int, 0, 10**6), default=1, metavar="E",
                       help="epochs between evaluations; 0: only after the last epoch (%(default)s)")


def sparsity_options(group) -> None:
    group.add_argument("--target-sparsity", type=number(float, 0.001, 0.999), metavar="S",
                       help="wanted share of zeros in the pruned layers; lambda is adjusted to reach it (0.8)")
    group.add_argument("--lambda", dest="lam", type=number(float, 0, 10**6), metavar="L",
                       help="fixed strength of the penalty, instead of --target-sparsity")
    group.add_argument("--eps", type=number(float, 1e-9, 1), default=1e-3,
                       help="eps in the penalty's weights alpha = 1 / (|w| + eps) (%(default)s)")
    group.add_argument("--penalty", choices=("loss", "proximal", "magnitude"),
                       help="loss: penalty added to the loss; proximal: soft threshold after every step (default, see "
                            "METHOD.md); magnitude: no penalty, gradual magnitude pruning to --target-sparsity, as a "
                            "baseline")
    group.add_argument("--updates", type=number(int, 1, 10**6), metavar="K",
                       help="number of updates of alpha, or with magnitude of the zeros, at equal distances (with a "
                            "lambda 5, with a target 20, with magnitude 100)")
    group.add_argument("--sparsity-type", choices=(*reweighted_l1.GROUPS, "threshold"),
                       help="groups of weights that become zero together (irregular: single weights). Given without a "
                            "target, it selects the submission's method: the penalty in the loss, lambda 1e-6, and "
                            "masks from --threshold or, for groups, from the ratios of --config-file. A filter of "
                            "zeros is counted as zeros, but not removed from the network")
    group.add_argument("--config-file", metavar="NAME",
                       help="TOML file with the layers' prune ratios, or its name in training/profile/")
    group.add_argument("--threshold", type=number(float, 0, 1), default=1e-4,
                       help="with --sparsity-type threshold: smaller weights are pruned (%(default)s)")


def machine_options(group) -> None:
    group.add_argument("--no-cuda", action="store_true", help="use the CPU even if there is a CUDA device")
    group.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
                       help="precision of the forward pass; auto: bfloat16 on CUDA and on CPUs that support it")
    group.add_argument("--compile", action=FLAG, help="compile the network with torch.compile (default: on CUDA)")
    group.add_argument("--workers", type=number(int, 1, 1024), metavar="W",
                       help="threads of a process on a CPU, among which its batch is divided (default: one per core)")


def submission_options(group) -> None:
    for option, name in NAMES.items():
        plan.add_option(group, option, name, text="--" + name)
    group.add_argument("--warmup", action=FLAG, default=True, help="use the warm-up, or none")
    group.add_argument("--mixup", action=FLAG, help="--mixing mixup, or --mixing none")
    group.add_argument("--smooth", action=FLAG, default=True, help="use label smoothing, or none")
    group.add_argument("--no-tricks", action="store_true",
                       help="no mixing, label smoothing, warm-up or schedule, whatever other options say")
    group.add_argument("--arch", choices=("mobilenetv2",), help="has no effect: there is one architecture")
    group.add_argument("--depth", type=int, choices=(17,), help="has no effect: the network has 17 blocks")


def make_parser() -> argparse.ArgumentParser:
    parser = command_line(__doc__)
    parser.usage = "python training/main.py [--pretrain | --rew | --masked-retrain] [options]"
    parser.epilog = ("Two defects of the submission are fixed: it computed alpha = 1 / (w + eps) with signed w,\n"
                     "singular near -eps (here |w|), and its reweighted stage never stepped the cosine schedule.")
    stage_options(parser.add_argument_group("stages (default: all that the run folder lacks)"))
    networks.add_option(parser)
    datasets.add_options(parser.add_argument_group("data"))
    sparsity_options(parser.add_argument_group("sparsity"))
    group = parser.add_argument_group("distillation")
    group.add_argument("--teacher", nargs="+", type=some_path, default=[], metavar="F",
                       help="checkpoints to distil from: ours, or KAIST AI's (see teachers.py), such as "
                            + next(iter(teachers.KAIST)))
    plan.add_options(group, TEACHING)
    group = parser.add_argument_group("training; epochs and lr by stage: " + ", ".join(
        f"{stage} {EPOCHS[stage]}, {PEAK_LR['sgd'][stage]}" for stage in STAGES) + "; lr of adam 0.001")
    names = [field.name for field in dataclasses.fields(loop.Settings) if field.metadata and field.name not in TEACHING]
    plan.add_options(group, names, seed=loop.Settings.seed)
    machine_options(parser.add_argument_group("machine"))
    submission_options(parser.add_argument_group("the submission's names, for its commands"))
    return parser


def parse(argv=None, *before: str) -> argparse.Namespace:
    """Return the options of a command line. before: words that it overrides, such as those of a recipe."""
    parser = make_parser()
    args = parser.parse_args([*before, *(sys.argv[1:] if argv is None else argv)])
    if args.pretrain + args.rew + args.masked_retrain > 1:
        parser.error("--pretrain, --rew and --masked-retrain are one stage each; give one of them, or none for all")
    if args.lam is not None and args.target_sparsity is not None:
        parser.error("--lambda and --target-sparsity exclude each other")
    if args.sparsity_type == "threshold" and not (args.pretrain or args.masked_retrain):
        parser.error("--sparsity-type threshold makes masks; the penalty knows " + ", ".join(reweighted_l1.GROUPS))
    if args.mixing and args.mixup is not None:
        parser.error("--mixup and --mixing exclude each other")
    if args.penalty == "magnitude" and (args.lam is not None or args.sparsity_type is not None):
        parser.error("--penalty magnitude prunes single weights towards --target-sparsity: it has no --lambda and no "
                     "--sparsity-type")
    if args.cooldown and args.schedule != "constant":
        parser.error("--cooldown belongs to --schedule constant")
    if args.sizes is not None:
        plan.image_sizes(args.sizes)
    form, lam, _ = strength(args)
    args.updates = args.updates or (100 if form == "magnitude" else 20 if lam is None else 5)
    return args


def parse_stages(argv=None) -> tuple[argparse.Namespace, dict[str, argparse.Namespace]]:
    """Return the options of the whole run and of each stage: those of the recipe, overridden by the command line.

    The recipe is that of --recipe, or the one with which the run folder was begun; args.recipe is its path or None.
    """
    args = parse(argv)
    kept = args.run / "recipe.toml"
    path = recipes.find(args.recipe) if args.recipe else kept if kept.is_file() else None
    if path is None:
        return args, {stage: copy.copy(args) for stage in STAGES}
    recipe, parser = recipes.read(path), make_parser()
    by_stage = {stage: parse(argv, *recipes.words(recipe, stage, parser)) for stage in STAGES}
    for each in (args, *by_stage.values()):
        each.recipe = path
    return args, by_stage


def settings_for(stage: str, args, device: torch.device) -> loop.Settings:
    """Return the settings of a stage on a device: the given options, then the stage's defaults; --no-tricks overrides.
    """
    chosen = plan.given(args)
    epochs = chosen.setdefault("epochs", EPOCHS[stage])
    chosen.setdefault("lr", PEAK_LR[args.optimizer or "sgd"][stage])
    chosen["warmup_epochs"] = min(chosen.get("warmup_epochs", loop.Settings.warmup_epochs),
                                  epochs / 4) if args.warmup else 0
    if args.mixup is not None:
        chosen["mixing"] = "mixup" if args.mixup else "none"
    if args.teacher:
        chosen.setdefault("smoothing", 0.0)
    if not args.smooth:
        chosen["smoothing"] = 0.0
    if args.no_tricks:
        chosen |= {"mixing": "none", "smoothing": 0.0, "warmup_epochs": 0, "schedule": "constant"}
    if (args.cooldown or 0) > epochs:
        raise BadInput(f"--cooldown {args.cooldown:g}: the {stage} stage has {epochs} epochs")
    cuda = device.type == "cuda"
    if args.precision == "auto":
        fast = cuda or torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        chosen["precision"] = "bfloat16" if fast else "float32"
    chosen["workers"] = 1 if cuda else args.workers or threads.cores()
    chosen["compile"] = cuda if args.compile is None else args.compile
    return loop.Settings(**chosen)


def pruned_layers(args, model) -> list[str]:
    """Return the names of the layers to prune: those with a ratio in --config-file, or all but the stem."""
    if args.config_file:
        layers = list(reweighted_l1.prune_ratios(args.config_file, model))
        if not layers:
            raise BadInput(f"{args.config_file}: no layer has a ratio above 0")
        return layers
    return reweighted_l1.default_layers(model)


def strength(args) -> tuple[str, float | None, float | None]:
    """Return (form, lambda, target) of the penalty; lambda or target is None.

    Without a target, --sparsity-type and --penalty loss select the submission's penalty: in the loss, lambda 1e-6.
    """
    lam, target = args.lam, args.target_sparsity
    if args.penalty == "magnitude":
        return "magnitude", None, target or DEFAULT_TARGET
    form = args.penalty or ("loss" if args.sparsity_type and target is None else "proximal")
    if lam is None and target is None:
        lam, target = (1e-6, None) if args.sparsity_type or form == "loss" else (None, DEFAULT_TARGET)
    return form, lam, target


def make_penalty(args, model) -> reweighted_l1.ReweightedL1 | magnitude.GradualMagnitude:
    """Return the penalty that the options select, on the model."""
    form, lam, target = strength(args)
    if form == "magnitude":
        return magnitude.GradualMagnitude(model, pruned_layers(args, model), target)
    return reweighted_l1.ReweightedL1(model, pruned_layers(args, model), args.sparsity_type or "irregular", form,
                                      lam=lam, target=target, eps=args.eps)


def sparsity_of_run(args, say=lambda line: None) -> argparse.Namespace:
    """Return the masked stage's options, with those of SPARSITY that are not given taken from the reweighted stage.

    say: function that gets one line on what was taken from where, and one for every given option that differs. Nothing
    is taken if the options select the submission's rule: without a target, --sparsity-type threshold, or any type with
    --config-file.
    """
    path = args.run / "rew.options.json"
    theirs = dict.fromkeys(SPARSITY)
    if path.is_file():
        options = parse([])
        vars(options).update(load_record(path, "give another --run folder")["options"])
        theirs = {name: getattr(options, name) for name in SPARSITY} | {"target_sparsity": strength(options)[2]}
    given = {name: getattr(args, name) for name in SPARSITY if getattr(args, name) is not None}
    for name, value in given.items():
        before = theirs[name] or ("irregular" if name == "sparsity_type" and path.is_file() else None)
        if before not in (None, value):
            say(f"masked: --{name.replace('_', '-')} {value} as given, though {path} has {before}")
    if args.target_sparsity is None and (args.sparsity_type == "threshold" or args.sparsity_type and args.config_file):
        return args
    args = argparse.Namespace(**vars(args) | theirs | given)
    if args.target_sparsity is None and args.config_file is None and "sparsity_type" not in given:
        args.target_sparsity = DEFAULT_TARGET  # theirs was a lambda
    if len(given) < len(SPARSITY):
        target = args.target_sparsity or (None if args.sparsity_type else DEFAULT_TARGET)
        source = f"as {path} has it" if path.is_file() else f"by default: there is no {path}"
        say(f"masked: {f'target {target}' if target else 'ratios'}, {args.sparsity_type or 'irregular'}, "
            f"{f'layers of {args.config_file}' if args.config_file else 'all layers but the stem'}; "
            f"what was not given is {source}")
    return args


def make_masks(args, model, say=lambda line: None) -> reweighted_l1.Masks:
    """Return the masks that the options select, on the model. say(line) gets how many of their zeros existed before."""
    layers = pruned_layers(args, model)
    if args.target_sparsity is not None or args.sparsity_type is None:
        kind = args.sparsity_type if args.sparsity_type in reweighted_l1.GROUPS else "irregular"
        masks = reweighted_l1.target_masks(model, layers, args.target_sparsity or DEFAULT_TARGET, kind)
    elif args.sparsity_type == "threshold":
        masks = reweighted_l1.threshold_masks(model, layers, args.threshold)
    elif args.config_file:
        ratios = reweighted_l1.prune_ratios(args.config_file, model)
        masks = reweighted_l1.ratio_masks(model, ratios, args.sparsity_type)
    else:
        raise BadInput(f"--masked-retrain --sparsity-type {args.sparsity_type} needs the prune ratios of a "
                       "--config-file, or a --target-sparsity")
    total, pruned, already = reweighted_l1.already_zero(model, masks)
    say(f"masked: {pruned:,} of {total:,} weights are frozen at zero ({pruned / total:.2%}); "
        f"{already / max(1, pruned):.2%} of them were zero already")
    return reweighted_l1.Masks(model, masks)


def refuse_early(stages: list[str], by_stage: dict[str, argparse.Namespace], data_set: DataSet, device) -> None:
    """Raise BadInput before the first stage is trained for hours, if a later one cannot use its options or the data."""
    for stage in stages:
        args = by_stage[stage]
        model = networks.make(args.network, data_set.classes)
        networks.check_outputs(model, args.network, data_set.classes)
        settings_for(stage, args, device)
        for path in args.teacher:
            teachers.load(path, args.network, data_set)
        if stage == "rew":
            make_penalty(args, model)
        elif stage == "masked":
            make_masks(args if "rew" in stages else sparsity_of_run(args), model)


def refuse_other_data(args, stages: list[str], data_set: DataSet) -> None:
    """Raise BadInput if one of the finished stages in the run folder was trained on another data set."""
    for stage in stages:
        path = args.run / f"{stage}.options.json"
        record = load_record(path, "remove it, or give --no-resume") if path.is_file() else {}
        theirs = record.get("data_set")
        if isinstance(theirs, dict) and (theirs.get("classes"), theirs.get("digest")) != (data_set.classes,
                                                                                           data_set.digest):
            raise BadInput(f"{path} is of a run on {theirs.get('name')} (digest {theirs.get('digest')}), and the data "
                           f"are {data_set}: give the same --data to go on, or another --run folder")


def starting_point(stage: str, args, classes: int) -> nn.Module:
    """Return the model from which a stage starts: --start, the stage before, or random weights.

    Without a dense stage, --rew prints a warning, and --masked-retrain raises BadInput.
    """
    if args.start and args.start.is_dir():
        model = networks.make(args.network, classes)
        try:
            model.load_state_dict(loop.State(args.start, None).read("weights"))
        except RuntimeError as error:
            raise BadInput(f"{args.start}: holds the state of another network") from error
        return model
    if args.start:
        return load_checkpoint(args.start, args.network, classes)
    before = {"rew": "pretrain", "masked": "rew"}.get(stage)
    if before:
        path = args.run / f"{before}.pt"
        if path.is_file():
            return load_checkpoint(path, args.network, classes)
        if stage == "masked":
            raise BadInput(f"{path} is missing: there is nothing to mask. Run --rew first, or give --start CHECKPOINT")
        print(f"warning: {path} is missing, the reweighted stage starts from random weights "
              "(run --pretrain first, or give --start CHECKPOINT)", file=sys.stderr)
    torch.manual_seed(args.seed)
    return networks.make(args.network, classes)


def head_lines(stages: list[str], by_stage, data, device, processes) -> list[str]:
    """Return lines that say what will be trained: device, network, images, run folder, and the steps of each stage."""
    parts, args = [], by_stage[stages[0]]
    for stage in stages:
        settings = settings_for(stage, by_stage[stage], device)
        work = plan.Plan(settings, len(data), processes, 1)
        parts.append(f"{stage} {work.steps:,} steps ({settings.epochs} epochs in batches of {work.batch_size}, "
                     f"{settings.optimizer}, images {settings.sizes}, {len(by_stage[stage].teacher)} teachers)")
    recipe = f"; recipe {args.recipe}" if args.recipe else ""
    machine = threads.describe_machine(device, processes.count)
    return [f"{args.network} on {machine['processes']} x {machine['device']} ({machine['cores']} cores, torch "
            f"{machine['torch']}); {len(data):,} train images ({data.data_set.name}); "
            f"run folder {args.run}{recipe}", "to train: " + ", ".join(parts)]


def run_stage(stage: str, args, data, test, device, processes, deadline: float, later: float = 0,
              head: list[str] | None = None) -> bool:
    """Train one stage and write its weights. Return False if the run must end: the time is up, or SIGTERM arrived.

    deadline: time.monotonic() at which to stop. later: work (see Plan.work) of the stages that follow. head: lines to
    print, and to remove, once the first stage begins.
    """
    settings = settings_for(stage, args, device)
    model = starting_point(stage, args, data.data_set.classes).to(device, memory_format=torch.channels_last)
    if head:
        print("\n".join(head), flush=True)
        head.clear()  # once a run
    penalty = make_penalty(args, model) if stage == "rew" else None
    masks = None
    if stage == "masked":
        say = functools.partial(print, flush=True) if processes.first else lambda line: None
        args = sparsity_of_run(args, say)
        masks = make_masks(args, model, say)
    taught_by = [teachers.load(path, args.network, data.data_set).to(device, memory_format=torch.channels_last)
                 for path in args.teacher]

    def began():
        if processes.first:
            options = json.loads(json.dumps(vars(args), default=str))  # paths as text
            save_record({"stage": stage, "machine": threads.describe_machine(device, processes.count),
                         "train_images": len(data.labels), "commit": git_commit(),
                         "data_set": dataclasses.asdict(data.data_set),
                         "settings": dataclasses.asdict(settings), "options": options},
                        args.run / f"{stage}.options.json")

    with loop.stop_noted() as asked:  # a stage that gets a signal during its last step still finishes
        finished = loop.train(
            stage, model, data, test, settings, args.run, penalty=penalty, penalty_updates=args.updates, masks=masks,
            teachers=taught_by, context={"network": args.network}, resume=args.resume, start_epoch=args.start_epoch,
            eval_every=args.eval_every, save_seconds=args.save_seconds, show_seconds=args.show_seconds,
            max_seconds=deadline - time.monotonic(), later=later, processes=processes, began=began)
    if finished is None:
        return False
    if processes.first:
        weights = {key: value.detach().cpu().contiguous() for key, value in finished.state_dict().items()}
        save_state(weights, args.run / f"{stage}.pt")
        loop.State(args.run / f"{stage}.state", settings).remove()
        loop.save_half(finished, args.run / f"{stage}.average.pt")
        print(f"{stage}: wrote {args.run / f'{stage}.pt'}", flush=True)
    if processes.count > 1:
        dist.barrier()  # the next stage reads what the first process wrote
    return not processes.agree(bool(asked), device)


# {option that is no setting but decides a result: the stages whose result it decides}
DECISIVE = {"network": STAGES, "made_up": STAGES, "holdout": STAGES, "teacher": STAGES,
            **dict.fromkeys(("penalty", "lam", "eps", "updates"), ("rew",)),
            **dict.fromkeys(("sparsity_type", "config_file", "target_sparsity"), ("rew", "masked")),
            "threshold": ("masked",)}


def changed_options(stage: str, args, device: torch.device) -> str:
    """Return as text how the options of a finished stage differ from the present ones; "" if they are equal."""
    path = args.run / f"{stage}.options.json"
    if not path.is_file():
        return ""
    record = load_record(path, "remove it, or give --no-resume")
    theirs, before = record.get("settings"), record.get("options")
    if not isinstance(theirs, dict) or not isinstance(before, dict):
        raise BadInput(f"{path}: not what a stage writes; remove it, or give --no-resume")
    now = dataclasses.asdict(settings_for(stage, args, device))
    pairs = {key: (theirs.get(key, value), value) for key, value in now.items() if key not in MACHINE}
    asked = sparsity_of_run(args, lambda line: None) if stage == "masked" else args
    options = json.loads(json.dumps(vars(asked), default=str))
    pairs |= {key: (before.get(key, options[key]), options[key]) for key, stages in DECISIVE.items() if stage in stages}
    return ", ".join(f"{key} {old} -> {new}" for key, (old, new) in pairs.items() if old != new)


def run_stages(args, by_stage, data, test, device, processes, deadline: float) -> None:
    """Train the chosen stages, by default all that the run folder lacks, one after the other."""
    chosen = [stage for stage, wanted in zip(STAGES, (args.pretrain, args.rew, args.masked_retrain)) if wanted]
    again = [] if args.resume else chosen
    there = [stage for stage in STAGES if (args.run / f"{stage}.pt").is_file() and stage not in again]
    missing = [stage for stage in chosen or STAGES if stage not in there]
    refuse_other_data(args, there, data.data_set)
    others = {stage: changes for stage in there if (changes := changed_options(stage, by_stage[stage], device))}
    for stage in chosen:
        if stage in others:
            raise BadInput(f"{args.run / f'{stage}.pt'} was trained with other options ({others[stage]}): give "
                           "--no-resume to train it again, or another --run folder")
    refuse_early(missing, by_stage, data.data_set, device)
    head = head_lines(missing, by_stage, data, device, processes) if missing and processes.first else []
    work = {stage: plan.Plan(settings_for(stage, by_stage[stage], device), len(data), processes, 1).work()
            for stage in missing}
    if processes.count > 1:
        dist.barrier()  # all processes have found the same files
    if processes.first and args.recipe:
        save_text(args.recipe.read_text(encoding="utf-8-sig"), args.run / "recipe.toml")
    for stage in again if processes.first else ():
        (args.run / f"{stage}.pt").unlink(missing_ok=True)
    start, start_epoch = args.start, args.start_epoch
    for stage in chosen or STAGES:
        if stage in there:
            if processes.first:
                print(f"{stage}: {args.run / f'{stage}.pt'} exists"
                      + (f", trained with other options ({others[stage]})" if stage in others else "")
                      + ("; --no-resume trains it again" if chosen else ""), flush=True)
            start, start_epoch = None, 0
            continue
        options = by_stage[stage]
        options.start, options.start_epoch = start, start_epoch
        later = sum(work[other] for other in missing[missing.index(stage) + 1:])
        if not run_stage(stage, options, data, test, device, processes, deadline, later, head):
            break
        start, start_epoch = None, 0  # --start is for the first stage only


def join_processes(args) -> tuple[loop.Processes, torch.device]:
    """Connect to the other processes of torchrun, if there are any; return (Processes, the device of this one)."""
    rank, count, local = environment.processes()
    device = torch.device("cpu")
    if torch.cuda.is_available() and not args.no_cuda:
        if local >= torch.cuda.device_count():
            raise BadInput(f"LOCAL_RANK is {local}, but there are {torch.cuda.device_count()} CUDA devices: start no "
                           "more processes than that, or give --no-cuda")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if count > 1 and not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise BadInput(f"the {count} processes do not find each other ({reason}); start them with torchrun"
                           ) from error
    return loop.Processes(rank, count), device


def main(argv=None) -> int:
    threads.prepare()
    args, by_stage = parse_stages(argv)
    deadline = time.monotonic() + (math.inf if args.max_minutes is None else 60 * args.max_minutes)
    processes, device = join_processes(args)
    try:
        data, test = (datasets.chosen(args, split, device)[0] for split in ("train", "test"))
        try_to_write(args.run / "options.json")
        with held(args.run) if processes.first else contextlib.nullcontext():
            run_stages(args, by_stage, data, test, device, processes, deadline)
        return 0
    finally:
        if processes.count > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
