"""Make the penalty of the reweighted stage and the masks of the masked one from the options of training/main.py."""
import argparse
from pathlib import Path

from torch import Tensor

from compressed.command_line import number, option_name, some_text
from compressed.errors import BadInput, brief
from compressed.graph import layers_as_run, weight_layers
from training import masks, penalties, runs

OPTIONS = ("target_sparsity", "sparsity_type", "config_file")  # the masked stage takes these from the stage before
ARGUMENTS = {"lam": "lam", "sparsity_type": "kind", "eps": "eps", "cost_power": "cost_power"}  # of penalties
DEFAULT_TARGET, DEFAULT_EPS = 0.8, 1e-3


def add_options(group) -> None:
    group.add_argument("--target-sparsity", type=number(float, 0.001, 0.999), metavar="S",
                       help="wanted share of zeros in the pruned layers; lambda is adjusted to reach it (0.8)")
    group.add_argument("--lambda", dest="lam", type=number(float, 0, 10**6), metavar="L",
                       help="fixed strength of the penalty, instead of --target-sparsity")
    group.add_argument("--eps", type=number(float, 1e-9, 1e6), default=DEFAULT_EPS,
                       help="eps in the penalty's weights alpha = 1 / (|w| + eps); 1000: all nearly equal, so plain L1 "
                            "(%(default)s)")
    group.add_argument("--cost-power", type=number(float, 0, 4), default=0.0, metavar="P",
                       help="multiply a layer's penalty by (what one of its weights costs in the score)^P, to make "
                            "zeros where they save more (%(default)s)")
    group.add_argument("--penalty", type=some_text, metavar="P",
                       help="loss: penalty added to the loss; proximal: soft threshold after every step (default, see "
                            "METHOD.md); magnitude: no penalty, gradual magnitude pruning to --target-sparsity, as a "
                            "baseline; FILE.py:NAME: a class of your own (see training/README.md), with arguments as "
                            "in FILE.py:NAME?p=0.5")
    group.add_argument("--updates", type=number(int, 1, 10**6), metavar="K",
                       help="number of updates of alpha, or with magnitude of the zeros, at equal intervals (5 with "
                            "a lambda, 20 with a target, 100 with magnitude)")
    group.add_argument("--sparsity-type", choices=(*masks.GROUPS, "threshold"),
                       help="groups of weights that become zero together (irregular: single weights). Given without "
                            "--target-sparsity and --penalty, it selects the submission's method: the penalty in the "
                            "loss, lambda 1e-6, and masks from --threshold or, for groups, from the ratios of "
                            "--config-file. A filter of zeros is counted as zeros, but not removed from the network")
    group.add_argument("--config-file", type=some_text, metavar="NAME",
                       help="TOML file with the layers' prune ratios, or its name in training/profile/")
    group.add_argument("--threshold", type=number(float, 0, 1), default=1e-4,
                       help="with --sparsity-type threshold: smaller weights are pruned (%(default)s)")


def not_taken(spec: str) -> list[str]:
    """Return the options for which a penalty's constructor has no argument."""
    return [option for option, name in ARGUMENTS.items() if not penalties.takes(spec, name)]


def check(args, stage: str, parser: argparse.ArgumentParser) -> None:
    """Exit with an error for sparsity options that exclude each other, or that this stage cannot use."""
    if args.lam is not None and args.target_sparsity is not None:
        parser.error("--lambda and --target-sparsity exclude each other")
    if args.sparsity_type == "threshold" and stage == "rew":
        parser.error("--sparsity-type threshold makes masks; the penalty knows " + ", ".join(masks.GROUPS))
    if args.sparsity_type == "threshold" and stage == "masked" and args.target_sparsity is not None:
        parser.error("--sparsity-type threshold prunes by --threshold, and excludes --target-sparsity")
    if args.penalty == "magnitude" and args.updates is not None and args.updates < 10:
        parser.error("--penalty magnitude prunes in steps, the last of them before the end: give --updates 10 or more")
    if stage == "rew" and args.penalty and args.target_sparsity and not penalties.takes(args.penalty, "target"):
        parser.error(f"--penalty {args.penalty} has no --target-sparsity: its constructor takes no argument `target`")
    for option in not_taken(args.penalty) if args.penalty else ():
        if getattr(args, option) != parser.get_default(option):
            parser.error(f"--penalty {args.penalty} has no {option_name(option)}")


def updates(args) -> int:
    """Return how often the penalty is updated: as --updates says, or by default."""
    spec, lam, _ = strength(args)
    return args.updates or penalties.find(spec)[0].updates or (20 if lam is None else 5)


def strength(args) -> tuple[str, float | None, float | None]:
    """Return (specification, lambda, target) of the penalty; lambda or target is None.

    Without a target, --sparsity-type alone and --penalty loss select the submission's: in the loss, lambda 1e-6.
    """
    lam, target = args.lam, args.target_sparsity
    spec = args.penalty or ("loss" if args.sparsity_type and target is None else "proximal")
    if lam is None and target is None:
        lam, target = (1e-6, None) if spec == "loss" else (None, DEFAULT_TARGET)
    return spec, lam, target


def resolved(options: dict) -> dict:
    """Return the options of a reweighted stage with the penalty, lambda and target that they select (`strength`)."""
    names = "penalty", "lam", "target_sparsity"
    chosen = strength(argparse.Namespace(**dict.fromkeys((*names, "sparsity_type")) | options))
    return options | dict(zip(names, chosen))


def pruned_layers(args, model) -> list[str]:
    """Return the names of the layers to prune: those with a ratio in --config-file, or all but the first (the stem).

    For filters the last layer is left out, too: without one of its filters, the logit of a class would be constant.
    """
    if args.config_file:
        return list(masks.prune_ratios(args.config_file, model))
    names = [name for name, _ in weight_layers(model)]
    if len(names) < 2:
        raise BadInput("the network has no nn.Conv2d or nn.Linear besides the first one, which is not pruned: list "
                       "what to prune in a --config-file")
    stem, last = layers_as_run(model)[0], layers_as_run(model)[-1]  # the stem's few weights cost little
    apart = {stem, last} if args.sparsity_type == "filter" else {stem}
    if not (pruned := [name for name in names if name not in apart]):
        raise BadInput("the network has no layer between the first and the last whose filters could be pruned: list "
                       "what to prune in a --config-file")
    return pruned


def say_ratios_are_idle(args, stage: str, say) -> None:
    """Tell say(line), if a --config-file is given, that a stage takes only the layers from it."""
    if args.config_file:
        say(f"{stage}: {args.config_file} selects the layers; its ratios have no effect: only --masked-retrain with "
            "--sparsity-type and without a target uses them")


def make_penalty(args, model, say=lambda line: None) -> penalties.Penalty:
    """Return the penalty that the options select, on the model. say(line) is called for what was selected, and what has
    no effect."""
    spec, lam, target = strength(args)
    say_ratios_are_idle(args, "rew", say)
    options = {"kind": args.sparsity_type, "lam": lam, "target": target,
               "eps": None if args.eps == DEFAULT_EPS else args.eps, "cost_power": args.cost_power or None}
    layers = pruned_layers(args, model)
    say(f"rew: penalty {spec}, {f'target {target}' if lam is None else f'lambda {lam:g}'}, "
        f"{args.sparsity_type or 'irregular'}, {len(layers)} layers")
    return penalties.make(spec, model, layers, **{name: value for name, value in options.items()
                                                  if value is not None and penalties.takes(spec, name)})


def inherited(args, planned=None) -> tuple[Path, dict]:
    """Return (path, options) of the reweighted stage whose OPTIONS the masked stage takes where none are given.

    That is the run's, or else the one in the folder of --start, unless that is a dense stage's file. If there is none,
    every option is None. planned: see `masked_options`.
    """
    path = args.run / "rew.options.json"
    if (args.start and not path.is_file() and (of_start := Path(args.start).parent / path.name).is_file()
            and runs.stage_of(args.start) != "pretrain"):
        path = of_start
    if planned is None and not path.is_file():
        return path, dict.fromkeys(OPTIONS)
    theirs = resolved(vars(planned) if planned else runs.read_record(path, "give another --run folder")["options"])
    return path, {name: theirs.get(name) for name in OPTIONS}


def masked_options(args, say=lambda line: None, planned=None) -> argparse.Namespace:
    """Return the masked stage's options, with those of OPTIONS that are not given taken from the reweighted stage.

    say(line) is called for what was taken, and for every given option that differs. Nothing is taken if the options
    select the submission's rule: without a target, --sparsity-type threshold, or any type with --config-file. planned:
    the options of a reweighted stage that this call trains before, instead of those of the run's.
    """
    path, theirs = inherited(args, planned)
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    for name, value in given.items():
        before = theirs[name] or ("irregular" if name == "sparsity_type" and path.is_file() else None)
        if before not in (None, value):
            say(f"masked: {option_name(name)} {value} as given, though {path} has {before}")
    if args.target_sparsity is None and (args.sparsity_type == "threshold" or args.sparsity_type and args.config_file):
        return args
    args = argparse.Namespace(**vars(args) | theirs | given)
    if args.target_sparsity is None and args.config_file is None and "sparsity_type" not in given:
        args.target_sparsity = DEFAULT_TARGET  # theirs was a lambda
    if len(given) < len(OPTIONS):
        by_default = path.is_file() and not given.get("target_sparsity", theirs["target_sparsity"])
        say(f"masked: {described(args, by_default)}; what was not given is "
            + (f"as {path} has it" if path.is_file() else f"by default: there is no {path}"))
    return args


def described(args, by_default: bool) -> str:
    """Return what the masks are made for, as text: target, groups and layers. by_default: that is why the target."""
    target = args.target_sparsity or (None if args.sparsity_type else DEFAULT_TARGET)
    layers = f"layers of {args.config_file}" if args.config_file else "all layers but the stem"
    last = " and the last" * (not args.config_file and args.sparsity_type == "filter")
    return (f"{f'target {target}' + ' by default' * by_default if target else 'ratios'}, "
            f"{args.sparsity_type or 'irregular'}, {layers}{last}")


def chosen_masks(args, model, say) -> dict[str, Tensor]:
    """Return {layer: mask} that the options select."""
    if args.target_sparsity is not None or args.sparsity_type is None:
        kind = args.sparsity_type if args.sparsity_type in masks.GROUPS else "irregular"
        say_ratios_are_idle(args, "masked", say)
        return masks.target_masks(model, pruned_layers(args, model), args.target_sparsity or DEFAULT_TARGET, kind)
    if args.sparsity_type == "threshold":
        return masks.threshold_masks(model, pruned_layers(args, model), args.threshold)
    if args.config_file:
        return masks.ratio_masks(model, masks.prune_ratios(args.config_file, model), args.sparsity_type)
    raise BadInput(f"--masked-retrain --sparsity-type {args.sparsity_type} needs the prune ratios of a --config-file, "
                   "or a --target-sparsity")


def make_masks(args, model, say=lambda line: None, kept=None) -> masks.Masks:
    """Return the masks that the options select, on the model. say(line) is called with their number of zeros.

    kept: {layer: mask} of a stage that is resumed, instead; None or False: none.
    """
    kept = kept or chosen_masks(args, model, say)
    total, pruned, already = masks.already_zero(model, kept)
    say(f"masked: {pruned:,} of {total:,} weights are frozen at zero ({pruned / total:.2%}); "
        f"{already / max(1, pruned):.2%} of them were zero already")
    if empty := [name for name, mask in kept.items() if not mask.any()]:
        say(f"masked: all weights of {brief(empty)} are zero")
    return masks.Masks(model, kept)
