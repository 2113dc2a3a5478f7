"""Train a sparse network in three stages: dense, reweighted L1, masked. Finished stages are not repeated.

    python training/main.py                    all stages that the run folder lacks
    python training/main.py --rew              one stage (--pretrain, --rew, --masked-retrain)
    python training/main.py --recipe NAME      with the options of training/recipes/NAME.toml
    torchrun --nproc-per-node 2 training/main.py ...

METHOD.md explains the method. penalties.py computes it, and loop.py is the training loop. A run folder holds
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of the repository's top level
if __name__ == "__main__":
    import compressed.interrupt  # noqa: F401

import torch
import torch.distributed as dist
from torch import nn

from compressed import datasets, environment, networks, threads  # noqa: E402
from compressed.cifar100 import DataSet, Images  # noqa: E402
from compressed.command_line import command_line, number, run_script, some_path  # noqa: E402
from compressed.errors import BadInput, refused  # noqa: E402
from compressed.files import check_outputs, git_commit, held, load_record, save_record, save_text, try_to_write  # noqa
from compressed.networks import load_checkpoint, save_state  # noqa: E402
from training import loop, plan, recipes, sparsity, teachers  # noqa: E402
from training.runs import DECISIVE, STAGES  # noqa: E402
from training.state import MACHINE, fingerprint  # noqa: E402

# defaults that differ between the stages; all others are in plan.Settings
EPOCHS = {"pretrain": 300, "rew": 120, "masked": 200}
PEAK_LR = {"sgd": {"pretrain": 0.4, "rew": 0.1, "masked": 0.2}, "adam": dict.fromkeys(STAGES, 1e-3)}
PEAK_LR["muon"] = PEAK_LR["sgd"]  # for the parameters that Muon leaves to SGD
# {option of the submission: the same setting here}
NAMES = {"--epoch": "epochs", "--optmzr": "optimizer", "--lr-scheduler": "schedule", "--smooth-eps": "smoothing"}
TEACHING = ("distill", "temperature", "teaching")
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


def machine_options(group) -> None:
    group.add_argument("--no-cuda", action="store_true", help="use the CPU even if there is a CUDA device")
    plan.add_precision(group)
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
    sparsity.add_options(parser.add_argument_group("sparsity"))
    group = parser.add_argument_group("distillation")
    group.add_argument("--teacher", nargs="+", type=some_path, default=[], metavar="F",
                       help="checkpoints to distil from: ours, or KAIST AI's (see teachers.py), such as "
                            + next(iter(teachers.KAIST)))
    plan.add_options(group, TEACHING)
    group = parser.add_argument_group("training; epochs and lr by stage: " + ", ".join(
        f"{stage} {EPOCHS[stage]}, {PEAK_LR['sgd'][stage]}" for stage in STAGES) + "; lr of adam 0.001")
    names = [field.name for field in dataclasses.fields(loop.Settings)
             if field.metadata and field.name not in (*TEACHING, "step_rate")]
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
    if args.mixing and args.mixup is not None:
        parser.error("--mixup and --mixing exclude each other")
    if args.cooldown and args.schedule != "constant":
        parser.error("--cooldown belongs to --schedule constant")
    if args.start_epoch and not args.start:
        parser.error("--start-epoch needs the weights of that epoch: give --start, too")
    if args.sizes is not None:
        plan.image_sizes(args.sizes)
    sparsity.check(args, parser)
    return args


def parse_stages(argv=None) -> tuple[argparse.Namespace, dict[str, argparse.Namespace]]:
    """Return the options of the whole run and of each stage: those of the recipe, overridden by the command line.

    The recipe is that of --recipe, or the one with which the run folder was begun; args.recipe is its path or None.
    args.given holds the names of the options on the command line.
    """
    args, parser = parse(argv), make_parser()
    kept = args.run / "recipe.toml"
    path = recipes.find(args.recipe) if args.recipe else kept if kept.is_file() else None
    by_stage = {stage: copy.copy(args) for stage in STAGES}
    if path is not None:
        recipe = recipes.read(path)
        by_stage = {stage: parse(argv, *recipes.words(recipe, stage, parser)) for stage in STAGES}
    for each in (args, *by_stage.values()):
        each.recipe = path
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    args.given = vars(parser.parse_args(argv)).keys()  # on the command line
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
    chosen["precision"] = plan.precision(args.precision, cuda)
    chosen["workers"] = 1 if cuda else args.workers or threads.cores()
    chosen["compile"] = cuda if args.compile is None else args.compile
    return loop.Settings(**chosen)


@dataclasses.dataclass(frozen=True)
class Job:
    """Hold what all stages of a call share: images, device, processes, and the time.monotonic() at which to stop."""
    data: Images
    test: Images
    device: torch.device
    processes: loop.Processes
    deadline: float

    @functools.cached_property
    def digest(self) -> str:
        """Return the digest by which a run recognises its train images."""
        return fingerprint([self.data.images, self.data.labels])

    def say(self, line: str) -> None:
        """Print a line, in the first process only."""
        if self.processes.first:
            print(line, flush=True)


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
            sparsity.make_penalty(args, model)
        elif stage == "masked":
            sparsity.make_masks(args if "rew" in stages else sparsity.of_run(args), model)


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
        weights = loop.State(args.start, None).read("weights")
        return networks.fill(networks.make(args.network, classes), weights, f"{args.start} does not fit {args.network}")
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


def plan_for(stage: str, args, job: Job) -> plan.Plan:
    """Return the steps of a stage."""
    return plan.Plan(settings_for(stage, args, job.device), len(job.data), job.processes, 1)


def say_what_is_trained(stages: list[str], by_stage, job: Job) -> None:
    """Print device, network, images, run folder, and the steps of each stage."""
    parts, args = [], by_stage[stages[0]]
    for stage in stages:
        steps = plan_for(stage, by_stage[stage], job)
        settings = steps.settings
        parts.append(f"{stage} {steps.steps:,} steps ({settings.epochs} epochs in batches of {steps.batch_size}, "
                     f"{settings.optimizer}, images {settings.sizes}, {len(by_stage[stage].teacher)} teachers)")
    recipe = f"; recipe {args.recipe}" if args.recipe else ""
    machine = threads.describe_machine(job.device, job.processes.count)
    job.say(f"{args.network} on {machine['processes']} x {machine['device']} ({machine['cores']} cores, torch "
            f"{machine['torch']}); {len(job.data):,} train images ({job.data.data_set.name}); "
            f"run folder {args.run}{recipe}")
    job.say("to train: " + ", ".join(parts))


def run_stage(stage: str, args, model: nn.Module, job: Job, later: float) -> bool:
    """Train one stage and write its weights. Return False if the run must end: the time is up, or SIGTERM arrived.

    later: work (see Plan.work) of the stages that follow.
    """
    settings, state = settings_for(stage, args, job.device), args.run / f"{stage}.state"
    model = model.to(job.device, memory_format=torch.channels_last)
    if args.start and args.resume and state.is_dir():
        job.say(f"{stage}: the weights are those of {state}, and --start has no effect")
    penalty = sparsity.make_penalty(args, model) if stage == "rew" else None
    masks = None
    if stage == "masked":
        args = sparsity.of_run(args, job.say)
        masks = sparsity.make_masks(args, model, job.say)
    taught_by = [teachers.load(path, args.network, job.data.data_set).to(job.device, memory_format=torch.channels_last)
                 for path in args.teacher]

    def began():
        if job.processes.first:
            options = json.loads(json.dumps(vars(args), default=str))  # paths as text
            save_record({"stage": stage, "machine": threads.describe_machine(job.device, job.processes.count),
                         "train_images": len(job.data), "data": job.digest, "commit": git_commit(),
                         "data_set": dataclasses.asdict(job.data.data_set),
                         "settings": dataclasses.asdict(settings), "options": options},
                        args.run / f"{stage}.options.json")

    with loop.stop_noted() as asked:  # a stage that gets a signal during its last step still finishes
        finished = loop.train(
            stage, model, job.data, job.test, settings, args.run, penalty=penalty, penalty_updates=args.updates,
            masks=masks, teachers=taught_by, context={"network": args.network}, resume=args.resume,
            start_epoch=args.start_epoch, eval_every=args.eval_every, save_seconds=args.save_seconds,
            show_seconds=args.show_seconds, max_seconds=job.deadline - time.monotonic(), later=later,
            processes=job.processes, began=began)
    if finished is None:
        return False
    if job.processes.first:
        weights = {key: value.detach().cpu().contiguous() for key, value in finished.state_dict().items()}
        save_state(weights, args.run / f"{stage}.pt")
        loop.State(state, settings).remove()
        loop.save_half(finished, args.run / f"{stage}.average.pt")
        job.say(f"{stage}: wrote {args.run / f'{stage}.pt'}")
    if job.processes.count > 1:
        dist.barrier()  # the next stage reads what the first process wrote
    return not job.processes.agree(bool(asked), job.device)


# {option: (option or value without which it has no effect, function of options and settings that finds it)}
NEEDS = {"turn": ("--optimizer muon", lambda args, settings: settings.optimizer == "muon"),
         **dict.fromkeys(TEACHING, ("--teacher", lambda args, settings: args.teacher)),
         "alpha": ("mixup", lambda args, settings: settings.mixing in ("both", "mixup")),
         "clean": ("mixing", lambda args, settings: settings.mixing != "none"),
         "threshold": ("--sparsity-type threshold", lambda args, settings: args.sparsity_type == "threshold")}


def idle_options(stage: str, args, given: set[str], device: torch.device, alone: bool) -> list[str]:
    """Return, as text, which of the given options have no effect on a stage.

    alone: True if no other stage is trained, on which they might have one. --no-tricks explains what it overrides.
    """
    settings, needs = settings_for(stage, args, device), NEEDS
    if args.no_tricks:
        needs = {name: need for name, need in NEEDS.items() if name not in ("alpha", "clean")}
    idle = {name: f"without {need}" for name, (need, has) in needs.items()
            if stage in DECISIVE.get(name, STAGES) and not has(args, settings)}
    if alone:
        idle |= {name: "on this stage" for name, stages in DECISIVE.items() if stage not in stages}
    return [f"--{'lambda' if name == 'lam' else name.replace('_', '-')} {why}" for name, why in idle.items()
            if name in given]


def recorded(stage: str, run: Path) -> dict | None:
    """Return what a stage has written to its options.json, or None. Raises BadInput if the file was altered."""
    path = run / f"{stage}.options.json"
    if not path.is_file():
        return None
    record = load_record(path, "remove it, or give --no-resume")
    if not isinstance(record.get("settings"), dict) or not isinstance(record.get("options"), dict):
        raise BadInput(f"{path}: not what a stage writes; remove it, or give --no-resume")
    return record


def refuse_other_images(stage: str, args) -> None:
    """Raise BadInput if a saved state does not name its images (by a digest), and its options chose others.

    The loop itself compares the digests, which states of older versions lack.
    """
    path = args.run / f"{stage}.state" / "state.json"
    if not path.is_file() or "data" in loop.State(path.parent, None).record()["settings"]:
        return
    before = (recorded(stage, args.run) or {"options": {}})["options"]
    if any(before.get(name) != getattr(args, name) for name in ("made_up", "holdout") if name in before):
        raise BadInput(f"{path.parent} holds a run on other images: give the same --made-up or --holdout to resume it, "
                       "or --no-resume to start it again")


def changed_options(stage: str, args, job: Job) -> dict[str, tuple]:
    """Return {option: (old, new value)} of what decides a finished stage's result and differs now."""
    record = recorded(stage, args.run)
    if record is None:
        return {}
    now = dataclasses.asdict(settings_for(stage, args, job.device))
    pairs = {key: (record["settings"].get(key, value), value) for key, value in now.items() if key not in MACHINE}
    options = json.loads(json.dumps(vars(sparsity.of_run(args) if stage == "masked" else args), default=str))
    pairs |= {key: (record["options"].get(key, options[key]), options[key])
              for key, stages in DECISIVE.items() if stage in stages}
    pairs["data"] = record.get("data", job.digest), job.digest
    return {key: (old, new) for key, (old, new) in pairs.items() if old != new}


def run_stages(args, by_stage, job: Job) -> None:
    """Train the chosen stages, by default all that the run folder lacks, one after the other."""
    chosen = [stage for stage, wanted in zip(STAGES, (args.pretrain, args.rew, args.masked_retrain)) if wanted]
    again = [] if args.resume else list(chosen or STAGES)
    there = [stage for stage in STAGES if (args.run / f"{stage}.pt").is_file() and stage not in again]
    missing = [stage for stage in chosen or STAGES if stage not in there]
    refuse_other_data(args, there, job.data.data_set)
    for stage in missing:
        start = [args.start] if args.start and stage == missing[0] else []
        check_outputs([args.run / f"{stage}.pt", args.run / f"{stage}.average.pt"], [*by_stage[stage].teacher, *start])
    changed = {stage: changed_options(stage, by_stage[stage], job) for stage in there}
    others = {stage: ", ".join(f"{key} {old} -> {new}" for key, (old, new) in pairs.items())
              for stage, pairs in changed.items() if pairs}
    for stage in others:
        if stage in chosen or not missing and args.given & changed[stage].keys():
            raise BadInput(f"{args.run / f'{stage}.pt'} was trained with other options ({others[stage]}): give "
                           "--no-resume to train it again, or another --run folder")
    refuse_early(missing, by_stage, job.data.data_set, job.device)
    work = {stage: plan_for(stage, by_stage[stage], job).work() for stage in missing}
    if job.processes.count > 1:
        dist.barrier()  # all processes have found the same files
    if job.processes.first and args.recipe:
        save_text(args.recipe.read_text(encoding="utf-8-sig"), args.run / "recipe.toml")
    for stage in again if job.processes.first else ():
        (args.run / f"{stage}.pt").unlink(missing_ok=True)
    start, start_epoch = args.start, args.start_epoch
    for stage in chosen or STAGES:
        options, first = by_stage[stage], missing[:1] == [stage]
        late = job.processes.agree(time.monotonic() >= job.deadline, job.device)
        if stage in there:
            job.say(f"{stage}: {args.run / f'{stage}.pt'} exists"
                    + (f", trained with other options ({others[stage]})" if stage in others else "")
                    + "; --start has no effect on it" * bool(start) + "; --no-resume trains it again" * bool(chosen))
        elif late and not first:
            job.say(f"{stage}: not begun, the time is up; the same command goes on with it")
            break
        else:
            options.start, options.start_epoch = start, start_epoch
            if args.resume:
                refuse_other_images(stage, options)
            model = starting_point(stage, options, job.data.data_set.classes)
            if first:
                say_what_is_trained(missing, by_stage, job)
            for line in idle_options(stage, options, args.given, job.device, alone=bool(chosen)):
                job.say(f"{stage}: {line} has no effect")
            later = sum(work[other] for other in missing[missing.index(stage) + 1:])
            if not run_stage(stage, options, model, job, later):
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
        with refused(f"the {count} processes do not find each other", "; start them with torchrun"):
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
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
            run_stages(args, by_stage, Job(data, test, device, processes, deadline))
        return 0
    finally:
        if processes.count > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
