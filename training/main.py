"""Train a sparse network in three stages: dense, reweighted L1, masked. Finished stages are not repeated.

    python training/main.py                    all stages that the run folder lacks
    python training/main.py --rew              one stage (--pretrain, --rew, --masked-retrain)
    python training/main.py --recipe NAME      with the options of training/recipes/NAME.toml
    torchrun --nproc-per-node 2 training/main.py ...

METHOD.md explains the method. penalties.py computes it, and loop.py is the training loop. A run folder holds
  STAGE.options.json  the resolved options
  STAGE.jsonl         the log, one line per epoch
  STAGE.state/        the state for resuming; removed when the stage is finished
  STAGE.pt            the weights of the finished stage
  STAGE.average.pt    the same in float16, or the result so far if the stage was stopped by --max-minutes or SIGTERM
  recipe.toml         the recipe, if there is one
If a run was stopped, the same command resumes it.
"""
import argparse
import contextlib
import dataclasses
import functools
import itertools
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

from compressed import datasets, environment, networks, threads
from compressed.cifar100 import DataSet, Images
from compressed.command_line import option_name, run_script
from compressed.errors import BadInput, refused
from compressed.files import check_outputs, lock_folder, save_record, save_text, sha256, try_to_write
from compressed.graph import prepare
from compressed.grids import check_quantizable
from compressed.networks import half_state, load_checkpoint, save_state
from training import loop, plan, recipes, sparsity, teachers, trial
from training.arguments import chosen_stages, parse_stages, settings_for
from training.muon import turned_weights
from training.replicas import Processes
from training.runs import (DECISIVE, STAGES, has_same_order, new_record, other_start, read_record, read_stage,
                           training_record, warn_of_another_network, warn_of_seen_images)
from training.state import MACHINE, State


@dataclasses.dataclass(frozen=True)
class Job:
    """What one call does: the options of the run and of each stage, images, device, processes, and when to stop."""
    args: argparse.Namespace
    by_stage: dict[str, argparse.Namespace]
    data: Images
    test: Images
    device: torch.device
    processes: Processes
    deadline: float  # in time.monotonic()

    def file(self, name: str) -> Path:
        return self.args.run / name

    def state(self, stage: str) -> State:
        """Return the saved state of a stage, which may not exist."""
        return State(self.file(f"{stage}.state"))

    def resumes(self, stage: str) -> bool:
        """Return True if a stage continues from its saved state."""
        return self.args.resume and self.state(stage).exists

    def keeps_start(self, stage: str) -> bool:
        """Return True if a stage with a --start resumes its own state: --start may name other weights by now."""
        return bool(self.by_stage[stage].start) and self.resumes(stage)

    def settings(self, stage: str) -> plan.Settings:
        return settings_for(stage, self.by_stage[stage], self.device)

    def say(self, line: str) -> None:
        """Print a line, in the first process only."""
        if self.processes.first:
            print(line, flush=True)


# ---- Before the first stage -----------------------------------------------------------------------------------------

def make_plans(stages: list[str], job: Job) -> dict[str, plan.Plan]:
    """Return the steps of the stages. Raises BadInput, before anything is trained, for options that cannot be used."""
    plans, data_set = {}, job.data.data_set
    for stage in stages:
        args = job.by_stage[stage]
        try:
            plans[stage] = plan.Plan(job.settings(stage), len(job.data), job.processes)
        except BadInput as error:
            raise BadInput(f"{stage}: {error}" + f" (options of {args.recipe})" * bool(args.recipe)) from error
        make = functools.partial(networks.make, args.network, data_set.classes)
        trial.try_network(make, args.network, data_set.classes, plans[stage], job.device)
        model = make()
        if stage == stages[0] and job.processes.first:
            try:
                check_quantizable(prepare(model))
            except BadInput as error:
                print(f"warning: this network can be trained, but not quantized: {error}", file=sys.stderr)
        if plans[stage].settings.optimizer == "muon" and not turned_weights(model):
            job.say(f"{stage}: no convolution of this network is followed by a normalisation, so Muon turns none: SGD "
                    "trains all weights, and --turn has no effect")
        teachers.load_all(args.teacher, args.network, data_set)
        if stage == "rew":
            trial.try_penalty(sparsity.make_penalty(args, model))
        elif stage == "masked":
            sparsity.make_masks(options_of_masks(args, job, planned=job.by_stage["rew"] if "rew" in stages else None),
                                model)
    return plans


def changed_options(stage: str, job: Job) -> dict[str, tuple]:
    """Return {option: (old, new value)} of what decides a finished stage's result and differs now."""
    args, path = job.by_stage[stage], job.file(f"{stage}.options.json")
    if not path.is_file():
        return {}
    before = read_record(path, "remove it, or give --no-resume")
    options = vars(sparsity.masked_options(args) if stage == "masked" else args)
    now = new_record(stage, job.data, job.settings(stage), options)
    if stage == "rew":
        before, now = (record | {"options": sparsity.resolved(record["options"])} for record in (before, now))
    pairs = ((before["settings"], {key: value for key, value in now["settings"].items() if key not in MACHINE}),
             (before["options"], {key: now["options"][key] for key, stages in DECISIVE.items() if stage in stages}),
             (before, {name: now[name] for name in ("data", "code") if before.get(name) is not None}))
    changed = {key: (old[key], value) for old, new in pairs for key, value in new.items()
               if old.get(key, value) != value}
    ours = job.data.data_set
    theirs = DataSet(**before.get("data_set", now["data_set"]))
    if theirs != dataclasses.replace(ours, name=theirs.name):
        changed["data_set"] = theirs, ours
    if weights := other_start(job.args.run, stage):
        changed["start_sha256"] = weights
    return changed


def compare_with_folder(stages: list[str], job: Job) -> tuple[list[str], list[str], dict[str, str]]:
    """Return (the finished stages, those of `stages` to train, {finished stage: text of the options that differ now}).

    Raises BadInput if the run folder does not go with the options.
    """
    args, by_stage, chosen = job.args, job.by_stage, chosen_stages(job.args)
    again = [] if args.resume else stages
    there = [stage for stage in STAGES if job.file(f"{stage}.pt").is_file() and stage not in again]
    missing = [stage for stage in stages if stage not in there]
    for before, after in itertools.combinations(STAGES, 2):
        if before in missing and after in there and not chosen:
            raise BadInput(f"{job.file(f'{after}.pt')} is there, and {before}.pt, which comes before it, is not: bring "
                           "that back, or name the stage to train, or give --no-resume to train all stages again")
    for i, stage in enumerate(missing):  # the weights of this stage and the later ones are removed before it begins
        start = by_stage[stage].start
        if start and not args.resume and start.resolve() in [job.state(each).folder.resolve() for each in missing[i:]]:
            raise BadInput(f"{start} would be removed, which is read: give another --run folder")
        check_outputs([job.file(f"{each}.{kind}") for each in missing[i:] for kind in ("pt", "average.pt")],
                      filter(None, [*by_stage[stage].teacher, by_stage[stage].start]))
    for stage in filter(job.resumes, missing):
        if stage != missing[0] or other_start(args.run, stage):
            raise BadInput(f"{job.file(f'{stage}.state')} was trained from other weights than those of the stage "
                           "before it, perhaps random ones: bring those back, or give --no-resume")
    for stage in missing if args.resume else ():
        average, state = job.file(f"{stage}.average.pt"), job.state(stage)
        left = read_stage(job.file(f"{stage}.jsonl")) if average.is_file() and not state.exists else None
        if left and left.lines[-1]["epoch"] < left.settings["epochs"] and not by_stage[stage].start:
            raise BadInput(f"{state.folder} is lost, and {average}, which is left of that stage, would be overwritten: "
                           "go on from a copy of it, with its log and options renamed (training/README.md), or give "
                           "--no-resume")
    others = {}
    for stage in there:
        if changed := changed_options(stage, job):
            others[stage] = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changed.items())
            asked = stage in chosen or not (chosen or missing) and args.given & changed.keys()
            if asked or changed.keys() & {"data_set", "start_sha256"}:
                raise BadInput(f"{job.file(f'{stage}.pt')} was trained with other options ({others[stage]}): give the "
                               "same, or --no-resume to train it again, or another --run folder")
    return there, missing, others


def idle_options(stage: str, job: Job, alone: bool) -> list[str]:
    """Return, as text, which options of the command line have no effect on a stage.

    alone: True if a single stage was chosen; then options that affect only other stages are listed, too. What
    --no-tricks overrides is not listed: its help says so.
    """
    args = job.by_stage[stage]
    idle = {name: f"without {need}" for name, need in plan.without_effect(job.settings(stage), args.teacher).items()
            if not (args.no_tricks and name in ("alpha", "clean"))}
    if stage == "masked" and args.sparsity_type != "threshold":
        idle["threshold"] = "without --sparsity-type threshold"
    if alone:
        idle |= {name: "on this stage" for name, stages in DECISIVE.items() if stage not in stages}
    return [f"{option_name(name)} {why}" for name, why in idle.items() if name in job.args.given]


def say_what_is_trained(plans: dict[str, plan.Plan], job: Job) -> None:
    """Print device, network, images, run folder, and the steps of each stage."""
    parts = []
    for stage, steps in plans.items():
        settings = steps.settings
        fewer = job.device.type == "cpu" and settings.workers < threads.cores()
        parts.append(f"{stage} {steps.steps:,} steps ({settings.epochs} epochs in batches of {steps.batch_size}"
                     + f" by {settings.workers} workers" * fewer
                     + f", {settings.optimizer}, images {settings.sizes}, {len(job.by_stage[stage].teacher)} teachers)")
    recipe = f"; recipe {job.args.recipe}" if job.args.recipe else ""
    machine = threads.describe_machine(job.device, job.processes.count)
    job.say(f"{job.by_stage[next(iter(plans))].network} on {machine['processes']} x {machine['device']} "
            f"({machine['cores']} cores, torch {machine['torch']}); {len(job.data):,} train images "
            f"({job.data.data_set.name}); run folder {job.args.run}{recipe}")
    recipe = recipes.read(job.args.recipe) if job.args.recipe and "masked" in plans else {"common": {}, "quantized": {}}
    recipe = recipe["common"] | recipe["quantized"]
    tuning = recipe.get("epochs", recipe.get("epoch", 0))
    job.say("to train: " + ", ".join(parts) + f"; then quantize.py fine-tunes for {tuning} epochs" * bool(tuning))


# ---- The stages -----------------------------------------------------------------------------------------------------

def starting_file(stage: str, args) -> Path | None:
    """Return the path of the weights that a stage starts from, --start or those of the stage before; None: random."""
    return args.start or {"rew": args.run / "pretrain.pt", "masked": args.run / "rew.pt"}.get(stage)


def options_of_masks(args, job: Job, say=lambda line: None, planned=None) -> argparse.Namespace:
    """Return the masked stage's options, with what is not given: see sparsity.masked_options.

    A stage with a --start that is resumed keeps its masks, and so the options that selected them.
    """
    if not job.keeps_start("masked"):
        return sparsity.masked_options(args, say, planned)
    begun = read_record(job.file("masked.options.json"), "give --no-resume")["options"]
    kept = {name: begun.get(name) for name in (*sparsity.OPTIONS, "threshold")}
    for name, value in kept.items():
        if name in job.args.given and getattr(args, name) != value:
            raise BadInput(f"masked: {option_name(name)} was {value} when the stage began, and its masks are kept: "
                           "give the same, or --no-resume, or another --run folder")
    return argparse.Namespace(**vars(args) | kept)


def starting_point(stage: str, args, job: Job) -> nn.Module:
    """Return the model from which a stage starts: --start, the stage before, or random weights.

    Without a dense stage, --rew prints a warning, and --masked-retrain raises BadInput.
    """
    classes, state = job.data.data_set.classes, args.start
    loop.seed_all(args.seed)  # also for what a network draws and keeps outside its state
    if job.keeps_start(stage):
        state = job.state(stage).folder
    if state and state.is_dir():
        weights = State(state).read("weights")
        return networks.fill(networks.make(args.network, classes), weights, f"{state} does not fit {args.network}")
    if path := starting_file(stage, args):
        if args.start or path.is_file():
            if job.processes.first:
                warn_of_another_network(path, args.network)
            return load_checkpoint(path, args.network, classes)
        if stage == "masked":
            raise BadInput(f"{path} is missing: there is nothing to mask. Run --rew first, or give --start CHECKPOINT"
                           + ", as when this stage began" * job.resumes(stage))
        begun, file = job.resumes(stage), job.file(f"{stage}.options.json")
        started = begun and file.is_file() and read_record(file)["options"].get("start")
        if job.state("pretrain").exists and not started:
            raise BadInput(f"{path} is missing, because the dense stage is not finished: repeat its command first, or "
                           "give --start CHECKPOINT")
        if job.processes.first and not begun:
            print(f"warning: {path} is missing, the reweighted stage starts from random weights "
                  "(run --pretrain first, or give --start CHECKPOINT)", file=sys.stderr)
    return networks.make(args.network, classes)


def record_of(stage: str, args, job: Job) -> dict:
    """Return the STAGE.options.json of a stage; if it is resumed, it started from what was given then."""
    before, file, options = starting_file(stage, args), job.file(f"{stage}.options.json"), vars(args)
    start = {"start_sha256": sha256(before) if before and before.is_file() else None}  # None: random, or a state
    if job.resumes(stage) and file.is_file():
        earlier = read_record(file, "give --no-resume")
        start = {key: earlier[key] for key in ("start_sha256",) if key in earlier} | {"code": earlier.get("code")}
        options = options | {key: earlier["options"].get(key) for key in ("start", "start_epoch")}
    taught = {"teachers_sha256": teachers.file_digests(args.teacher)} if args.teacher else {}
    options = sparsity.resolved(options) if stage == "rew" else options
    record = new_record(stage, job.data, job.settings(stage), options, job.processes.count)
    for name, digest in (start.get("code") or {}).items():
        if record["code"].get(name) != digest:
            job.say(f"{stage}: the file of --{name} was changed since this stage began, so its steps so far are of "
                    "other code; --no-resume starts it again")
    return record | start | taught


def begin_run(stages: list[str], job: Job) -> None:
    """Copy the recipe to the run folder, and remove what the stages to be trained had, but for a state to resume."""
    if job.args.recipe:
        save_text(job.args.recipe.read_text(encoding="utf-8-sig"), job.file("recipe.toml"))
    for stage in stages:
        job.file(f"{stage}.pt").unlink(missing_ok=True)
        if not job.args.resume:
            for kind in ("average.pt", "jsonl", *["options.json"] * (stage != stages[0])):
                job.file(f"{stage}.{kind}").unlink(missing_ok=True)
            if stage != stages[0]:
                job.state(stage).remove()


def run_stage(stage: str, args, model: nn.Module, job: Job, plans: dict[str, plan.Plan]) -> bool:
    """Train one stage and write its weights. Return False if the run must end: the time is up, or SIGTERM arrived.

    plans: of all stages that this call trains. The folder is changed when the first of them begins, and not earlier.
    """
    settings, state, stages = job.settings(stage), job.state(stage), list(plans)
    later = sum(sum(plans[other].pixels) for other in stages[stages.index(stage) + 1:])
    model = model.to(job.device, memory_format=torch.channels_last)
    job.processes.share([*model.parameters(), *model.buffers()])
    if job.keeps_start(stage):
        job.say(f"{stage}: the weights are those of {state.folder}, and --start has no effect")
    penalty = sparsity.make_penalty(args, model, job.say) if stage == "rew" else None
    masks = None
    if stage == "masked":
        args = options_of_masks(args, job, job.say)
        masks = sparsity.make_masks(args, model, job.say, job.keeps_start(stage) and state.read("masks", job.device))
    taught_by = teachers.load_all(args.teacher, args.network, job.data.data_set, device=job.device)
    record = record_of(stage, args, job)

    def began():
        if job.processes.first:
            save_record(record, job.file(f"{stage}.options.json"))
            if stage == stages[0]:
                begin_run(stages, job)

    with threads.stop_noted() as asked:  # a stage that gets a signal during its last step still finishes
        finished = loop.train(
            stage, model, job.data, job.test, settings, args.run, penalty=penalty, penalty_updates=args.updates,
            masks=masks, teachers=taught_by, context={"network": args.network}, resume=args.resume,
            start_epoch=args.start_epoch, eval_every=args.eval_every, save_seconds=args.save_seconds,
            show_seconds=args.show_seconds, max_seconds=job.deadline - time.monotonic(), later=later,
            processes=job.processes, began=began)
        if finished is not None and job.processes.first:
            # in this order: what is there after a kill between two of them belongs together
            save_state(half_state(finished.state_dict()), job.file(f"{stage}.average.pt"))
            save_state(finished.state_dict(), job.file(f"{stage}.pt"))
            state.remove()
            job.say(f"{stage}: wrote {job.file(f'{stage}.pt')}")
    if finished is None:
        return False
    if job.processes.first:
        if penalty is not None and penalty.target is not None:
            zeros = float(penalty.zeros_share())
            if abs(zeros - penalty.target) > 0.05:
                job.say(f"{stage}: {zeros:.1%} zeros instead of {penalty.target:.1%}" + (
                    "; with more --epochs lambda (see the log) is adjusted more often" if penalty.feedback else ""))
    if job.processes.count > 1:
        dist.barrier()  # the next stage reads what the first process wrote
    return not job.processes.agree(bool(asked), job.device)


def warn_of_images(stage: str, options, job: Job) -> None:
    """Print a warning if what a stage starts from, or a teacher, was trained on the hold-out; or if images recur."""
    before = starting_file(stage, options)
    for file in (each for each in (before, *options.teacher) if each and each.exists()):
        with contextlib.suppress(BadInput):  # of a folder whose stages do not go together
            if job.args.holdout:
                warn_of_seen_images(training_record(file), file)
            if file == before and not options.start_epoch and not job.keeps_start(stage) \
                    and has_same_order(file, stage, options.seed):
                job.say(f"{stage}: {file} was trained with the same seed, so the images come in the same order again, "
                        "augmented alike; another --seed changes that")


def run_stages(job: Job) -> None:
    """Train the chosen stages, by default all that the run folder lacks, one after the other."""
    by_stage, chosen = job.by_stage, chosen_stages(job.args)
    stages = chosen or list(STAGES)
    for stage in stages[1:]:  # --start is for the first stage only
        by_stage[stage].start, by_stage[stage].start_epoch = None, 0
    there, missing, others = compare_with_folder(stages, job)
    plans = make_plans(missing, job)
    if job.processes.count > 1:
        dist.barrier()  # all processes have found the same files
    for stage in stages:
        options, begins = by_stage[stage], missing[:1] == [stage]
        late = job.processes.agree(time.monotonic() >= job.deadline, job.device)
        if stage in there:
            job.say(f"{stage}: {job.file(f'{stage}.pt')} exists"
                    + (f", trained with other options ({others[stage]})" if stage in others else "")
                    + "; --start has no effect on it" * bool(options.start)
                    + "; --no-resume trains it again" * bool(chosen))
        elif late and not begins:
            job.say(f"{stage}: not begun, because --max-minutes is over; the same command"
                    + " without --no-resume" * (not job.args.resume) + " begins it")
            break
        else:
            model = starting_point(stage, options, job)
            if begins:
                say_what_is_trained(plans, job)
                if job.processes.first:
                    warn_of_images(stage, options, job)
            for line in idle_options(stage, job, alone=bool(chosen)):
                job.say(f"{stage}: {line} has no effect")
            if not run_stage(stage, options, model, job, plans):
                break


def join_processes(args) -> tuple[Processes, torch.device]:
    """Connect to the other processes of torchrun, if there are any; return (Processes, the device of this one)."""
    rank, count, local = environment.processes()
    device = threads.use_device(args.no_cuda, local)
    if count > 1 and not dist.is_initialized():
        with refused(f"the {count} processes do not find each other", "; start them with torchrun"):
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(rank, count), device


def main(argv=None) -> int:
    threads.prepare()
    args, by_stage = parse_stages(argv, __doc__)
    deadline = time.monotonic() + (math.inf if args.max_minutes is None else 60 * args.max_minutes)
    processes, device = join_processes(args)
    try:
        data, test = (datasets.chosen(args, split, device)[0] for split in ("train", "test"))
        try_to_write(args.run / "options.json")
        with lock_folder(args.run) if processes.first else contextlib.nullcontext():
            run_stages(Job(args, by_stage, data, test, device, processes, deadline))
        return 0
    finally:
        if processes.count > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
