"""Train MobileNetV2 (x1.3) on CIFAR-100 to a sparse network, in three stages; with no option, every stage that is missing.

    python training/main.py                    dense pretraining, reweighted L1, mask and masked retraining
    python training/main.py --rew              one stage (--pretrain, --rew, --masked-retrain)
    torchrun --nproc-per-node 2 training/main.py ...

What METHOD.md explains is computed in reweighted_l1.py; the loop of all stages is in loop.py. A run folder holds
  STAGE.options.json    the resolved options                 STAGE.jsonl    a line an epoch
  STAGE.state/          what a resume needs, while it runs   STAGE.pt       the weights, once it is finished
The same command again goes on where it was.
"""
import argparse
import dataclasses
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of the repository's top level

import cifar100  # noqa: E402
import machine  # noqa: E402
from files import run_script, save_record, save_tensors, some_path, try_to_write  # noqa: E402
from mobilenet_v2 import BadInput, MobileNetV2, load_checkpoint  # noqa: E402
from training import loop, magnitude, plan, reweighted_l1, teachers  # noqa: E402

STAGES = ("pretrain", "rew", "masked")
# what differs between the stages; everything else is a default of loop.Settings
EPOCHS = {"pretrain": 300, "rew": 120, "masked": 200}
PEAK_LR = {"sgd": {"pretrain": 0.4, "rew": 0.1, "masked": 0.2}, "adam": dict.fromkeys(STAGES, 1e-3)}


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Two defects of the original are mended: its weights were 1 / (w + eps) with signed w, singular near -eps "
               "(here |w|), and its reweighted stage never stepped the cosine schedule (here every stage does).")
    flag = argparse.BooleanOptionalAction

    stage = parser.add_argument_group("stages (default: all that the run folder lacks)")
    stage.add_argument("--pretrain", action="store_true", help="dense training")
    stage.add_argument("--rew", action="store_true", help="reweighted L1, from the dense weights")
    stage.add_argument("--masked-retrain", action="store_true", help="mask, then retrain with the zeros frozen")
    # two names each: torchrun before Python 3.12 takes the short ones for ambiguous abbreviations of its own options
    stage.add_argument("--run-folder", "--run", dest="run", type=some_path, default=Path("runs/default"), metavar="DIR",
                       help="(%(default)s)")
    stage.add_argument("--start-from", "--start", dest="start", type=some_path, metavar="F",
                       help="checkpoint that the first stage starts from (default: the stage before); a folder STAGE.state: the "
                            "weights of that running stage as they are")
    stage.add_argument("--start-epoch", type=float, default=0, metavar="E",
                       help="take the stage up at this epoch, from the weights of --start, with fresh momentum, where its state is lost")
    stage.add_argument("--resume", action=flag, default=True, help="go on from the state in the run folder (default)")
    stage.add_argument("--max-minutes", type=float, metavar="M",
                       help="wall-clock budget: stop cleanly after it, state written; the same command goes on")
    stage.add_argument("--show-seconds", type=float, default=60, metavar="S", help="print a line this often where there is no "
                       "terminal (%(default)s)")
    stage.add_argument("--save-seconds", type=float, default=60, metavar="S", help="write the state this often (%(default)s)")
    stage.add_argument("--eval-every", type=int, default=1, metavar="E", help="epochs between accuracies (the last always)")

    data = parser.add_argument_group("data")
    data.add_argument("--data", type=some_path, metavar="DIR", help="folder with CIFAR-100 (default: $CIFAR100_DIR, else a download)")
    data.add_argument("--holdout", action="store_true", help="train on 45,000 of the train images, test on the other 5,000")
    data.add_argument("--made-up", type=int, metavar="N", help="N made-up images instead of CIFAR-100, to see it turn")

    method = parser.add_argument_group("sparsity")
    method.add_argument("--sparsity-type", choices=(*reweighted_l1.GROUPS, "threshold"),
                        help="what the penalty and the mask act on. Given, it selects the submission's method: the penalty "
                             "in the loss with lambda 1e-6; masks from --threshold (threshold) or the ratios of "
                             "--config-file (the others). Default: irregular, by --target-sparsity")
    method.add_argument("--config-file", metavar="NAME", help="prune ratios of the layers: a TOML file, or its name in training/profile/")
    method.add_argument("--target-sparsity", type=float, metavar="S",
                        help="wanted share of zeros in the pruned layers, in place of a lambda (default 0.8)")
    method.add_argument("--lambda", dest="lam", type=float, metavar="L", help="strength of the penalty, in place of a target")
    method.add_argument("--eps", type=float, default=1e-3, help="of alpha = 1 / (|w| + eps) (%(default)s)")
    method.add_argument("--penalty", choices=("loss", "proximal", "magnitude"),
                        help="loss: added to it; proximal: a soft threshold after every step (default, see METHOD.md); "
                             "magnitude: no penalty, but gradual magnitude pruning to --target-sparsity, to compare with")
    method.add_argument("--updates", type=int, metavar="K",
                        help="updates of alpha (or of the zeros, for magnitude) at equal distances (default: 5; 100 for magnitude)")
    method.add_argument("--threshold", type=float, default=1e-4, help="of --sparsity-type threshold (%(default)s)")
    method.add_argument("--teacher", nargs="+", type=some_path, default=[], metavar="F", help="checkpoints whose logits are distilled on the same images: "
                        "ours, or KAIST AI's (see teachers.py), such as " + next(iter(teachers.KAIST)))
    method.add_argument("--teaching", choices=("turns", "mean"), default="turns",
                        help="several teachers: one at each step in turn, or the mean of their probabilities (%(default)s)")
    method.add_argument("--distill", type=float, default=0.9, help="the teachers' weight in the loss (%(default)s)")
    method.add_argument("--temperature", type=float, default=4.0, help="of the distillation (%(default)s)")

    train = parser.add_argument_group("training")
    train.add_argument("--epochs", "--epoch", type=int, help=f"epochs of a stage (default: {EPOCHS})")
    train.add_argument("--batch-size", type=int, default=512, help="of all processes together (%(default)s)")
    train.add_argument("--optmzr", choices=("sgd", "adam"), default="sgd", help="Nesterov SGD, or AdamW (%(default)s)")
    train.add_argument("--lr", type=float, help=f"peak learning rate (default: {PEAK_LR['sgd']} for sgd, 1e-3 for adam)")
    train.add_argument("--lr-scheduler", choices=("cosine", "default", "constant"),
                       help="cosine to zero; default: x0.1 at 1/2 and 3/4; constant, and --cooldown (default: cosine)")
    train.add_argument("--cooldown", type=float, default=0, metavar="K", help="with constant: K epochs at the end in which it falls "
                       "linearly to zero. While it is constant, a resume may change --epochs, --cooldown and --sizes")
    train.add_argument("--sizes", default="32", metavar="S", help="image sizes by share of the stage: 24:0.6,32 scales 60%% of its "
                       "batches down to 24x24 (%(default)s)")
    train.add_argument("--weight-decay", type=float, default=5e-4, help="(%(default)s)")
    train.add_argument("--warmup", action=flag, default=True, help="linear warm-up of the learning rate")
    train.add_argument("--warmup-epochs", type=float, default=5, help="(%(default)s)")
    train.add_argument("--augment", choices=("trivial", "plain", "none"), default="trivial",
                       help="TrivialAugment with crop and flip; crop and flip; nothing (%(default)s)")
    train.add_argument("--mixup", action=flag, help="mixup alone (default: mixup or CutMix, a draw for every image)")
    train.add_argument("--mixing", choices=("both", "mixup", "cutmix", "none"), help="the same with every choice")
    train.add_argument("--alpha", type=float, default=0.3, help="of mixup's Beta distribution (%(default)s)")
    train.add_argument("--smooth", action=flag, default=True, help="label smoothing")
    train.add_argument("--smooth-eps", type=float, help="(default: 0.1; none beside a teacher)")
    train.add_argument("--no-tricks", action="store_true", help="no mixing, smoothing, warm-up or cosine schedule, whatever "
                       "else is given (as in the submission)")
    train.add_argument("--ema", type=float, metavar="D", help="decay of the weight average a step; 0: no average (default: "
                       "a memory of 3%% of the steps made, 1 - 1 / (0.03 * steps))")
    train.add_argument("--refresh", type=int, default=10_000, metavar="N",
                       help="train images that renew the BatchNorm statistics at a stage's end (%(default)s)")
    train.add_argument("--seed", type=int, default=0, help="(%(default)s)")

    hardware = parser.add_argument_group("machine")
    hardware.add_argument("--no-cuda", action="store_true", help="use the CPU even if there is a CUDA device")
    hardware.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
                         help="of the forward pass; auto: bfloat16 on CUDA and on CPUs that multiply it (%(default)s)")
    hardware.add_argument("--compile", action=flag, help="torch.compile the network (default: on CUDA)")
    hardware.add_argument("--workers", type=int, metavar="W", help="threads of a process on a CPU, each with a share of its batch "
                         "(default: the cores there are)")
    network = parser.add_argument_group("network (accepted for the submission's commands; there is one)")
    network.add_argument("--arch", choices=("mobilenetv2",), default="mobilenetv2")
    network.add_argument("--depth", type=int, choices=(17,), default=17, help="blocks (%(default)s)")
    args = parser.parse_args(argv)

    if args.pretrain + args.rew + args.masked_retrain > 1:
        parser.error("--pretrain, --rew and --masked-retrain are one stage each; give one of them, or none for all")
    if args.lam is not None and args.target_sparsity is not None:
        parser.error("--lambda and --target-sparsity exclude each other")
    if args.sparsity_type == "threshold" and args.rew:
        parser.error("--sparsity-type threshold makes masks; the penalty knows " + ", ".join(reweighted_l1.GROUPS))
    if args.mixing and args.mixup is not None:
        parser.error("--mixup and --mixing exclude each other")
    for name, low, high in (("epochs", 1, 10**6), ("batch_size", 1, 10**6), ("lr", 0, 100), ("weight_decay", 0, 1),
                            ("ema", 0, 1), ("smooth_eps", 0, 1), ("target_sparsity", 0.001, 0.999), ("lam", 0, 10**6), ("eps", 1e-9, 1),
                            ("distill", 0, 1), ("temperature", 0.01, 1000), ("save_seconds", 0, 10**9), ("seed", 0, 2**62),
                            ("made_up", 2, 10**6), ("eval_every", 1, 10**6), ("updates", 1, 10**6), ("warmup_epochs", 0, 10**6),
                            ("refresh", 0, 10**6), ("max_minutes", 0, 10**9), ("threshold", 0, 1), ("alpha", 0.01, 1000), ("cooldown", 0, 10**6),
                            ("start_epoch", 0, 10**6), ("show_seconds", 0, 10**9), ("workers", 1, 1024)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} {value}: expected {low} to {high}")
    if args.penalty == "magnitude" and (args.lam is not None or args.sparsity_type is not None):
        parser.error("--penalty magnitude prunes single weights towards --target-sparsity: it has no --lambda and no --sparsity-type")
    args.updates = args.updates or (100 if args.penalty == "magnitude" else 5)
    args.mixing = args.mixing or {None: "both", True: "mixup", False: "none"}[args.mixup]
    args.schedule = args.lr_scheduler or "cosine"
    args.warmup_epochs = args.warmup_epochs if args.warmup else 0
    if args.smooth_eps is None:
        args.smooth_eps = 0.0 if args.teacher else 0.1
    args.smooth_eps = args.smooth_eps if args.smooth else 0.0
    plan.image_sizes(args.sizes)
    if args.cooldown and args.schedule != "constant":
        parser.error("--cooldown belongs to --lr-scheduler constant")
    if args.no_tricks:
        args.mixing, args.smooth_eps, args.warmup_epochs, args.schedule = "none", 0.0, 0, "constant"
    return args


def settings_for(stage: str, args, device: torch.device) -> loop.Settings:
    precision = args.precision
    if precision == "auto":
        fast = device.type == "cuda" or torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        precision = "bfloat16" if fast else "float32"
    epochs = args.epochs or EPOCHS[stage]
    if args.cooldown > epochs:
        raise BadInput(f"--cooldown {args.cooldown:g}: the {stage} stage has {epochs} epochs")
    workers = 1 if device.type == "cuda" else args.workers or machine.cores()
    return loop.Settings(
        epochs=epochs, batch_size=args.batch_size, optimizer=args.optmzr,
        lr=PEAK_LR[args.optmzr][stage] if args.lr is None else args.lr, schedule=args.schedule, cooldown=args.cooldown,
        warmup_epochs=min(args.warmup_epochs, epochs / 4), weight_decay=args.weight_decay, smoothing=args.smooth_eps,
        augment=args.augment, mixing=args.mixing, alpha=args.alpha, average=args.ema, refresh=args.refresh,
        sizes=args.sizes, distill=args.distill, temperature=args.temperature, teaching=args.teaching, precision=precision, workers=workers,
        compile=device.type == "cuda" if args.compile is None else args.compile, seed=args.seed)


def pruned_layers(args, model) -> list[str]:
    if args.config_file:
        layers = list(reweighted_l1.prune_ratios(args.config_file, model))
        if not layers:
            raise BadInput(f"{args.config_file}: no layer has a ratio above 0")
        return layers
    return reweighted_l1.default_layers(model)


def make_penalty(args, model) -> reweighted_l1.ReweightedL1 | magnitude.GradualMagnitude:
    """The submission's (in the loss, lambda 1e-6) where --sparsity-type is given; else proximal, towards a target."""
    lam, target = args.lam, args.target_sparsity
    if args.penalty == "magnitude":
        return magnitude.GradualMagnitude(model, pruned_layers(args, model), target or 0.8)
    if lam is None and target is None:
        lam, target = (1e-6, None) if args.sparsity_type else (None, 0.8)
    form = args.penalty or ("loss" if args.sparsity_type else "proximal")
    return reweighted_l1.ReweightedL1(model, pruned_layers(args, model), args.sparsity_type or "irregular", form,
                                      lam=lam, target=target, eps=args.eps)


def make_masks(args, model) -> reweighted_l1.Masks:
    layers = pruned_layers(args, model)
    if args.target_sparsity is not None or args.sparsity_type is None:
        kind = args.sparsity_type if args.sparsity_type in reweighted_l1.GROUPS else "irregular"
        masks = reweighted_l1.target_masks(model, layers, args.target_sparsity or 0.8, kind)
    elif args.sparsity_type == "threshold":
        masks = reweighted_l1.threshold_masks(model, layers, args.threshold)
    elif args.config_file:
        ratios = reweighted_l1.prune_ratios(args.config_file, model)
        masks = reweighted_l1.ratio_masks(model, ratios, args.sparsity_type)
    else:
        raise BadInput(f"--masked-retrain --sparsity-type {args.sparsity_type} needs the prune ratios of a --config-file, "
                       "or a --target-sparsity")
    return reweighted_l1.Masks(model, masks)


def starting_point(stage: str, args) -> MobileNetV2:
    """The model that a stage starts from: --start, else the stage before, else (for --rew, with a warning) random weights."""
    if args.start and args.start.is_dir():
        model = MobileNetV2()
        try:
            model.load_state_dict(loop.State(args.start, None).read("weights"))
        except RuntimeError as error:
            raise BadInput(f"{args.start}: the state of another network") from error
        return model
    if args.start:
        return load_checkpoint(args.start)
    before = {"rew": "pretrain", "masked": "rew"}.get(stage)
    if before:
        path = args.run / f"{before}.pt"
        if path.is_file():
            return load_checkpoint(path)
        if stage == "masked":
            raise BadInput(f"{path} is missing: there is nothing to mask. Run --rew first, or give --start CHECKPOINT")
        print(f"warning: {path} is missing, the reweighted stage starts from random weights "
              "(run --pretrain first, or give --start CHECKPOINT)", file=sys.stderr)
    torch.manual_seed(args.seed)
    return MobileNetV2()


def describe_machine(device: torch.device, processes: loop.Processes) -> str:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {machine.cores()} core(s)"
    return f"{processes.count} process(es), {where}, torch {torch.__version__}, Python {platform.python_version()}"


def run_stage(stage: str, args, data, test, device, processes, deadline: float) -> bool:
    """Train one stage and write its weights. False if that was all for now: the time ran out, or SIGTERM came."""
    settings = settings_for(stage, args, device)
    model = starting_point(stage, args).to(device, memory_format=torch.channels_last)
    penalty = make_penalty(args, model) if stage == "rew" else None
    masks = make_masks(args, model) if stage == "masked" else None
    taught_by = [teachers.load(path).to(device, memory_format=torch.channels_last) for path in args.teacher]

    def began():
        if processes.first:
            options = json.loads(json.dumps(vars(args), default=str))  # paths as text
            save_record({"stage": stage, "machine": describe_machine(device, processes), "train_images": len(data.labels),
                         "settings": dataclasses.asdict(settings), "options": options}, args.run / f"{stage}.options.json")

    with loop.sigterm_noted() as asked:  # in its last step, a stage finishes all the same
        finished = loop.train(
            stage, model, data, test, settings, args.run, penalty=penalty, penalty_updates=args.updates, masks=masks,
            teachers=taught_by, resume=args.resume, start_epoch=args.start_epoch, eval_every=args.eval_every,
            save_seconds=args.save_seconds, show_seconds=args.show_seconds,
            max_seconds=deadline - time.monotonic(), processes=processes, began=began)
    if finished is None:
        return False
    if processes.first:
        weights = {key: value.detach().cpu().contiguous() for key, value in finished.state_dict().items()}
        save_tensors(weights, args.run / f"{stage}.pt")
        loop.State(args.run / f"{stage}.state", settings).remove()
        (args.run / f"{stage}.average.pt").unlink(missing_ok=True)
        print(f"{stage}: wrote {args.run / f'{stage}.pt'}", flush=True)
    if processes.count > 1:
        dist.barrier()  # the next stage reads what the first process wrote
    return not processes.agree(bool(asked), device)


def main(argv=None) -> int:
    machine.prepare()
    args = parse(argv)
    deadline = time.monotonic() + (math.inf if args.max_minutes is None else 60 * args.max_minutes)
    processes = loop.Processes(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    device = torch.device("cpu")
    if torch.cuda.is_available() and not args.no_cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if processes.count > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        if args.made_up:
            data = cifar100.made_up(args.made_up, seed=0, device=device)
            test = cifar100.made_up(max(100, args.made_up // 5), seed=1, device=device)
        else:
            data = cifar100.load(args.data, "fit" if args.holdout else "train", device)
            test = cifar100.load(args.data, "holdout" if args.holdout else "test", device)
        try_to_write(args.run / "options.json")
        chosen = [stage for stage, wanted in zip(STAGES, (args.pretrain, args.rew, args.masked_retrain)) if wanted]
        if chosen and not args.resume and processes.first:
            (args.run / f"{chosen[0]}.pt").unlink(missing_ok=True)
        if processes.count > 1:
            dist.barrier()  # all processes find the same files
        for stage in chosen or STAGES:
            if (args.run / f"{stage}.pt").is_file():
                if processes.first:
                    print(f"{stage}: {args.run / f'{stage}.pt'} is there"
                          + ("; --no-resume trains it again" if chosen else ""), flush=True)
            elif not run_stage(stage, args, data, test, device, processes, deadline):
                break
            args.start, args.start_epoch = None, 0  # --start is where the first stage began
        return 0
    finally:
        if processes.count > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
