"""The command line of training/main.py, and the settings that it gives each stage."""
import argparse
import dataclasses
from pathlib import Path

import torch

from compressed import datasets, networks
from compressed.command_line import command_line, number, option_name, some_path, some_text
from training import plan, recipes, sparsity, teachers
from training.runs import STAGES

# defaults that differ between the stages; all others are in plan.Settings
EPOCHS = {"pretrain": 300, "rew": 120, "masked": 200}
PEAK_LR = {"pretrain": 0.4, "rew": 0.1, "masked": 0.2}  # of SGD, also for what Muon leaves to it
FLAG = argparse.BooleanOptionalAction


def stage_options(group) -> None:
    alone = group.add_mutually_exclusive_group()
    alone.add_argument("--pretrain", action="store_true", help="dense training")
    alone.add_argument("--rew", action="store_true", help="reweighted L1, from the dense weights")
    alone.add_argument("--masked-retrain", action="store_true", help="mask, then retrain with the zeros frozen")
    # two names each: torchrun before Python 3.12 takes the short ones for ambiguous abbreviations of its own options
    group.add_argument("--recipe", type=some_text, metavar="NAME",
                       help="TOML file with options of all stages, or its name in training/recipes; "
                            "the command line overrides it (default: the run folder's, else none)")
    group.add_argument("--run-folder", "--run", dest="run", type=some_path, default=Path("runs/default"), metavar="DIR",
                       help="run folder (%(default)s)")
    group.add_argument("--start-from", "--start", dest="start", type=some_path, metavar="F",
                       help="weights that the first stage of this command starts from (default: those of the stage "
                            "before; for --pretrain, random ones); a folder STAGE.state means the latest saved weights "
                            "of that unfinished stage")
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


def machine_options(group) -> None:
    group.add_argument("--no-cuda", action="store_true", help="use the CPU even if there is a CUDA device")
    plan.add_machine(group)
    group.add_argument("--workers", type=number(int, 1, 1024), metavar="W",
                       help="threads of a process on a CPU, among which its batch is divided (default: one per core, "
                            f"but no more than give each {plan.LEAST_SHARE} images)")


def submission_options(group) -> None:
    for option, name in plan.SUBMISSIONS.items():
        plan.add_option(group, f"--{option}", name, text=f"--{name}")
    group.add_argument("--warmup", action=FLAG, default=True, help="linear warm-up of the learning rate (default)")
    group.add_argument("--mixup", action=FLAG, help="same as --mixing mixup; --no-mixup: as --mixing none")
    group.add_argument("--smooth", action=FLAG, default=True, help="label smoothing (default)")
    group.add_argument("--no-tricks", action="store_true",
                       help="no mixing, label smoothing, warm-up or schedule; overrides the other options")
    group.add_argument("--arch", choices=("mobilenetv2",), help="has no effect; --network selects the network")
    group.add_argument("--depth", type=int, choices=(17,), help="has no effect; the submission's network has 17 blocks")


def make_parser(text: str | None = None) -> argparse.ArgumentParser:
    """Return the parser. text: the head of its --help, the script's docstring."""
    parser = command_line(text)
    parser.usage = "python training/main.py [--pretrain | --rew | --masked-retrain] [options]"
    parser.epilog = ("Two defects of the submission are fixed: it computed alpha = 1 / (w + eps) with signed w,\n"
                     "singular near -eps (here |w|), and its reweighted stage never stepped the cosine schedule.")
    stage_options(parser.add_argument_group("stages (default: all that the run folder lacks)"))
    networks.add_option(parser)
    datasets.add_options(parser.add_argument_group("data"))
    sparsity.add_options(parser.add_argument_group("sparsity"))
    group = parser.add_argument_group("distillation")
    group.add_argument("--teacher", nargs="*", type=some_path, default=[], metavar="F",
                       help="checkpoints to distil from: ours, or KAIST AI's (see teachers.py), such as "
                            + next(iter(teachers.KAIST)) + "; without a value none, whatever the recipe has")
    plan.add_options(group, plan.TEACHING)
    group = parser.add_argument_group("training; defaults: " + "; ".join(
        f"{stage} {EPOCHS[stage]} epochs, lr {PEAK_LR[stage]}" for stage in STAGES) + f"; lr of adam {plan.ADAM_LR}")
    names = [field.name for field in dataclasses.fields(plan.Settings)
             if field.metadata and field.name not in (*plan.TEACHING, "lr", "step_rate")]
    plan.add_options(group, names, seed=plan.Settings.seed)
    plan.add_option(group, "--lr", "lr", text="peak learning rate (default: by stage, see above)")
    machine_options(parser.add_argument_group("machine"))
    submission_options(parser.add_argument_group("option names of the submission, so that its commands still work"))
    return parser


def chosen_stages(args) -> list[str]:
    """Return the stages that the command line names."""
    return [stage for stage, named in zip(STAGES, (args.pretrain, args.rew, args.masked_retrain)) if named]


def parse(argv=None, recipe: dict[str, dict] | None = None, stage: str = "common") -> argparse.Namespace:
    """Return the options of a stage, by default those of the whole run: of a command line, else of a recipe.

    Exits with an error for options that exclude each other. Those of a recipe are checked for the stages to be trained.
    """
    parser = make_parser()
    args = recipes.merged(parser, recipes.given(parser, argv), recipe, stage)
    if args.start_epoch and not args.start:
        parser.error("--start-epoch needs the weights of that epoch: give --start, too")
    for each in chosen_stages(args) or STAGES:
        if stage == each or not recipe:
            if args.mixing and args.mixup is not None:
                parser.error("--mixup and --mixing exclude each other")
            sparsity.check(args, each, parser)
    args.updates = sparsity.updates(args)
    return args


def parse_stages(argv=None, text: str | None = None) -> tuple[argparse.Namespace, dict[str, argparse.Namespace]]:
    """Return the options of the whole run and of each stage: those of the recipe, overridden by the command line.

    The recipe is that of --recipe, or the one with which the run folder was begun; args.recipe is its path or None.
    args.given holds the names of the options on the command line. text: as in make_parser.
    """
    parser = make_parser(text)
    given = recipes.given(parser, argv)
    for option, switch in (("warmup_epochs", "warmup"), ("smoothing", "smooth")):
        if given.get(option) and given.get(switch) is False:
            parser.error(f"{option_name(option)} and --no-{switch} exclude each other")
    path = recipes.path_of(given.get("recipe"), given.get("run", parser.get_default("run")))
    recipe = path and recipes.read(path)
    args, *others = (parse(argv, recipe, stage) for stage in ("common", *STAGES))
    for each in (args, *others):
        each.recipe = path
    args.given = given.keys()
    return args, dict(zip(STAGES, others))


def settings_for(stage: str, args, device: torch.device) -> plan.Settings:
    """Return the settings of a stage on a device: the given options, then the stage's defaults; --no-tricks overrides.
    """
    if args.no_tricks:
        args = argparse.Namespace(**vars(args) | recipes.NO_TRICKS)
    chosen = {"epochs": EPOCHS[stage], "lr": plan.ADAM_LR if args.optimizer == "adam" else PEAK_LR[stage],
              "warmup_epochs": plan.Settings.warmup_epochs,
              "smoothing": 0.0 if args.teacher else plan.Settings.smoothing, **plan.given(args)}
    chosen["warmup_epochs"] = min(chosen["warmup_epochs"], chosen["epochs"] / 4) if args.warmup else 0
    if args.mixup is not None:
        chosen["mixing"] = "mixup" if args.mixup else "none"
    if not args.smooth:
        chosen["smoothing"] = 0.0
    return plan.on_device(plan.Settings(**chosen), args, device)
