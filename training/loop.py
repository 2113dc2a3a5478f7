"""One training loop for every stage: step, schedule, weight average, evaluation, state, resume.

The stages (dense, reweighted, masked, quantized) differ in what they pass in, not in the loop. All randomness of a
step follows from (seed, stage, step), and the learning rate from the step alone, so the state of a run is its tensors
and one number: a run that was killed at any moment goes on from its last state, on a CPU bit for bit.
"""
import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import cifar100
from files import load_json, save_json, save_tensors, save_text
from mobilenet_v2 import BadInput, weight_layers
from quantize import evaluate, renew_statistics


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the result of a stage. A state is only resumed under equal settings."""
    epochs: int
    batch_size: int = 512         # of all processes together
    optimizer: str = "sgd"        # Nesterov momentum 0.9; or adam
    lr: float = 0.4
    schedule: str = "cosine"      # to zero; or default (x0.1 at 1/2 and 3/4); or constant
    warmup_epochs: float = 5
    weight_decay: float = 5e-4    # none on BatchNorm and biases
    smoothing: float = 0.1
    augment: str = "trivial"      # TrivialAugment, crop and flip; or plain (crop and flip); or none
    mixing: str = "both"          # CutMix or mixup, a draw for every image; or mixup, cutmix, none
    alpha: float = 0.3            # of mixup
    clean: float = 0.05           # share of the epochs, at the end, without mixing
    average: float | None = None  # decay of the weight average a step; None: a memory of 3% of the steps; 0: no average
    refresh: int = 10_000         # train images that renew the BatchNorm statistics at the end; 0 is none
    distill: float = 0.9          # weight of the teacher in the loss, where there is a teacher
    temperature: float = 4.0
    precision: str = "float32"    # of the forward pass: float32 or bfloat16
    compile: bool = False
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those of `torchrun`; alone by default."""
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agree(self, flag: bool, device) -> bool:
        """True everywhere if it is true anywhere."""
        if self.count == 1:
            return flag
        value = torch.tensor(float(flag), device=device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value)


class _Sum(torch.autograd.Function):
    """Sum over all processes; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx, value):
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batches of all processes, on a CPU too (torch.nn.SyncBatchNorm is for GPUs alone).

    The shares must be equal, which the loop makes sure of. Keys and buffers are those of BatchNorm2d.
    """

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        x32 = x.float()
        count = x.numel() / x.shape[1] * dist.get_world_size()
        mean = _Sum.apply(x32.sum((0, 2, 3))) / count
        centred = x32 - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    @classmethod
    def convert(cls, model: nn.Module, device: torch.device) -> nn.Module:
        if device.type == "cuda":
            return nn.SyncBatchNorm.convert_sync_batchnorm(model)
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = cls  # same attributes, same buffers: only the statistics differ
        return model

    @classmethod
    def revert(cls, model: nn.Module) -> None:
        for module in model.modules():
            if type(module) is cls:
                module.__class__ = nn.BatchNorm2d


def learning_rate(settings: Settings, step: int, steps: int, epoch_steps: int) -> float:
    """Learning rate of a step (from 0 to steps - 1): linear warm-up, then the schedule over what is left."""
    warmup = round(settings.warmup_epochs * epoch_steps)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if settings.schedule == "cosine":
        return settings.lr * (1 + math.cos(math.pi * done)) / 2
    if settings.schedule == "default":
        return settings.lr * 0.1 ** ((done >= 0.5) + (done >= 0.75))
    if settings.schedule == "constant":
        return settings.lr
    raise BadInput(f"unknown schedule {settings.schedule!r}; known: cosine, default, constant")


def make_optimizer(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    """Weight decay on the weights of convolutions and the linear layer; none on BatchNorm and biases."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True)
    if settings.optimizer == "adam":
        return torch.optim.AdamW(groups, lr=settings.lr)
    raise BadInput(f"unknown optimizer {settings.optimizer!r}; known: sgd, adam")


def generator_for(seed: int, *names) -> torch.Generator:
    """The CPU generator that belongs to a seed and a name, such as (stage, "step", 7)."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model, BatchNorm statistics included, in place."""
    pairs = [(a, m) for a, m in zip(average.state_dict().values(), model.state_dict().values()) if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in pairs], [m for _, m in pairs], 1 - decay)


class State:
    """A stage's state in a folder: one file a part (weights, average, optimizer, penalty), and state.json.

    state.json names the files of one moment and is renamed into place after they are written; whatever it does not
    name is left over from a kill and removed at the next save.
    """

    def __init__(self, folder: Path, settings: Settings, **others):
        """`others` decide the result too, and must be equal for a resume as the settings must."""
        self.folder = folder
        self.settings = json.loads(json.dumps(dataclasses.asdict(settings) | others))

    def load(self, device) -> tuple[dict, dict] | None:
        """(progress, {part: contents}), or None if there is nothing to resume."""
        if not (self.folder / "state.json").is_file():
            return None
        record = load_json(self.folder / "state.json")
        if not {"progress", "files", "settings"} <= record.keys():
            raise BadInput(f"{self.folder / 'state.json'}: not the list of a state; --no-resume starts the stage again")
        theirs = record["settings"]
        changed = [f"{key} {theirs[key]} -> {value}" for key, value in self.settings.items() if theirs.get(key, value) != value]
        if changed:
            raise BadInput(f"{self.folder} holds a run with other settings ({', '.join(changed)}): give the same "
                           "options to go on, or --no-resume to start it again, or another --run folder")
        parts = {}
        for part, name in record["files"].items():
            try:
                parts[part] = torch.load(self.folder / name, map_location=device, weights_only=True)
            except Exception as error:
                raise BadInput(f"{self.folder / name}: cannot be read ({brief(error)}); --no-resume starts the stage again") from error
        return record["progress"], parts

    def save(self, progress: dict, parts: dict) -> None:
        files = {}
        for part, value in parts.items():
            files[part] = f"{part}-{progress['step']}.pt"
            save_tensors(value, self.folder / files[part])
        save_json({"progress": progress, "files": files, "settings": self.settings}, self.folder / "state.json")
        for path in self.folder.iterdir():
            if path.name not in (*files.values(), "state.json"):
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        if self.folder.is_dir():
            (self.folder / "state.json").unlink(missing_ok=True)  # first: it must not name what is gone
            for path in self.folder.iterdir():
                path.unlink(missing_ok=True)
            self.folder.rmdir()


def brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def fingerprint(tensors) -> str:
    """A digest of the values of tensors, for a state to know masks and teachers by."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def strided_depthwise_in_float32(model: nn.Module):
    """Under a CPU's autocast, depthwise convolutions with a stride compute in float32, and return bfloat16.

    oneDNN has no fast bfloat16 kernel for their input's gradient (benchmarks/depthwise_shapes.py): without this, three of
    the network's 57 convolutions took two fifths of a step. They read and write few elements, so float32 costs little.
    """
    def wrapped(forward):
        def in_float32(x):
            if not torch.is_autocast_enabled("cpu"):
                return forward(x)
            with torch.autocast("cpu", enabled=False):
                return forward(x.float()).bfloat16()
        return in_float32

    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1 and max(m.stride) > 1]
    for conv in convs:
        conv.forward = wrapped(conv.forward)
    try:
        yield
    finally:
        for conv in convs:
            del conv.forward


@contextlib.contextmanager
def sigterm_noted():
    """A list that SIGTERM fills, instead of ending the process. At the end the handler before learns of it too.

    Only the main thread may install a handler; in another one the list stays empty.
    """
    arrived = []
    try:
        before = signal.signal(signal.SIGTERM, lambda *_: arrived.append(True))
    except ValueError:
        yield arrived
        return
    try:
        yield arrived
    finally:
        signal.signal(signal.SIGTERM, before)
        if arrived and callable(before):
            before(signal.SIGTERM, None)


def train(stage: str, model: nn.Module, train_data: cifar100.Images, test_data: cifar100.Images | None,
          settings: Settings, folder, *, penalty=None, penalty_updates: int = 5, masks=None, teacher=None,
          prepare=None, context: dict | None = None, resume: bool = True, eval_every: int = 1, save_seconds: float = 60.0, max_seconds: float = math.inf,
          processes: Processes = Processes()) -> nn.Module | None:
    """Train `model` in place; return the finished model (its average where one is kept), or None if time ran out.

    stage:    names the files: FOLDER/STAGE.jsonl (a line an epoch) and FOLDER/STAGE.state/ while it runs.
    penalty:  a ReweightedL1 or GradualMagnitude on `model`, updated `penalty_updates` times at equal distances.
    masks:    Masks on `model`, applied after every step and checked whenever something is written.
    teacher:  a model in eval mode whose logits are distilled on the same mixed images.
    prepare:  called with the model before every epoch's first step, to set modes.
    context:  what else decides the result (plain values): a state is only resumed under the same.
    """
    folder, device = Path(folder), train_data.labels.device
    images = len(train_data.labels)
    batch_size = min(settings.batch_size, images)
    if batch_size % processes.count or settings.epochs < 1 or batch_size < 1:
        raise BadInput(f"batch size {batch_size} and {settings.epochs} epochs: expected at least one epoch and a batch "
                       f"that {processes.count} process(es) can share equally")
    share = batch_size // processes.count
    if processes.count > 1 and settings.mixing != "none" and share % 2:
        raise BadInput(f"each process gets {share} images of a batch: mixing pairs neighbours, so this must be even")
    mine = slice(processes.rank * share, (processes.rank + 1) * share)
    epoch_steps = images // batch_size  # what does not fill a batch waits for another epoch's order
    steps = settings.epochs * epoch_steps
    lrs = [learning_rate(settings, step, steps, epoch_steps) for step in range(steps)]
    update_at = {round(i * steps / penalty_updates) for i in range(penalty_updates)}
    decay = 1 - 1 / max(1, 0.03 * steps) if settings.average is None else settings.average
    clean_from = settings.epochs - round(settings.clean * settings.epochs)

    average = copy.deepcopy(model) if decay else None
    if processes.count > 1:
        SyncBatchNorm.convert(model, device)
    optimizer = make_optimizer(settings, model)
    parts = {"weights": model, "optimizer": optimizer, "average": average, "penalty": penalty}
    parts = {name: part for name, part in parts.items() if part is not None}
    state = State(folder / f"{stage}.state", settings, images=images, context=context,
                  penalty=None if penalty is None else penalty.options() | {"updates": penalty_updates},
                  masks=None if masks is None else fingerprint(masks.factors),
                  teacher=None if teacher is None else fingerprint(teacher.state_dict().values()))
    progress = {"step": 0, "loss": 0.0, "correct": 0.0, "seconds": 0.0}
    if not resume and processes.first:
        state.remove()
    found = state.load(device) if resume else None
    if found:
        progress, contents = found
        try:
            for name, part in parts.items():
                part.load_state_dict(contents[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise BadInput(f"{state.folder} is of another network ({brief(error)}); --no-resume starts the stage again") from error
        if processes.first:
            print(f"{stage}: goes on at epoch {progress['step'] // epoch_steps + 1} of {settings.epochs}", flush=True)
    log_path = folder / f"{stage}.jsonl"
    log = []
    if found and log_path.is_file():  # an epoch that was logged after the state was written is trained again
        log = [line for line in log_path.read_text().splitlines() if json.loads(line)["step"] <= progress["step"]]

    stepped = model
    if settings.compile:
        stepped = torch.compile(stepped)
    if processes.count > 1:
        stepped = nn.parallel.DistributedDataParallel(
            stepped, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False)

    def reduced(values):
        """Their mean over the processes, as numbers."""
        values = values.clone()
        if processes.count > 1:
            dist.all_reduce(values)
        return (values / processes.count).tolist()

    def due():
        return processes.agree(time.monotonic() - saved >= save_seconds, device)

    def save():
        nonlocal saved
        progress["loss"], progress["correct"] = reduced(totals)
        progress["seconds"] = before + time.monotonic() - started
        check_finite(stage, progress["loss"], progress["step"] // epoch_steps)
        if masks is not None:
            masks.check(model)
            if average is not None:
                masks.check(average)
        if processes.first:
            state.save(progress, {name: part.state_dict() for name, part in parts.items()})
        saved = time.monotonic()

    def stopped():
        if processes.first:
            print(f"{stage}: stopped at epoch {progress['step'] / epoch_steps:.2f} of {settings.epochs}, state written to "
                  f"{state.folder}; the same command goes on", flush=True)

    started = saved = time.monotonic()
    before = progress["seconds"]
    # sums over the epoch's steps of loss and accuracy, kept on the device: reading them would wait for it
    totals = torch.tensor([progress["loss"], progress["correct"]], dtype=torch.float64, device=device)
    model.train()
    with contextlib.ExitStack() as at_end:
        asked = at_end.enter_context(sigterm_noted())  # the step is finished and the state written
        if device.type == "cpu":
            at_end.enter_context(strided_depthwise_in_float32(model))
        while progress["step"] < steps:
            epoch, first = divmod(progress["step"], epoch_steps)
            if prepare is not None:
                prepare(model)
            order = cifar100.epoch_order(images, generator_for(settings.seed, stage, "order", epoch)).to(device)
            bar = progress_bar(stage, epoch, settings.epochs, epoch_steps, first, processes.first)
            at_end.callback(bar.close)
            for i in range(first, epoch_steps):
                step = epoch * epoch_steps + i
                lr = lrs[step]
                for group in optimizer.param_groups:
                    group["lr"] = lr
                if penalty is not None and step in update_at:
                    penalty.update(sum(lrs[step:]))

                index = order[i * batch_size:(i + 1) * batch_size][mine]
                mixing = "none" if epoch >= clean_from else settings.mixing
                draws = cifar100.draw(batch_size, generator_for(settings.seed, stage, "step", step),
                                      crop=settings.augment != "none", trivial=settings.augment == "trivial",
                                      mixing=mixing, mixup_alpha=settings.alpha)
                x, labels, others, lam = cifar100.augment(train_data.images[index], train_data.labels[index], draws[mine])
                x = x.contiguous(memory_format=torch.channels_last)
                with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
                    logits = stepped(x)
                    if teacher is not None:
                        with torch.no_grad():
                            taught = teacher(x)
                logits = logits.float()
                loss = mixed_cross_entropy(logits, labels, others, lam, settings.smoothing)
                objective = loss
                if teacher is not None:
                    t = settings.temperature
                    divergence = F.kl_div(F.log_softmax(logits / t, 1), F.log_softmax(taught.float() / t, 1),
                                          log_target=True, reduction="batchmean") * t * t
                    objective = (1 - settings.distill) * loss + settings.distill * divergence
                if penalty is not None and penalty.form == "loss":
                    objective = objective + penalty.loss()
                optimizer.zero_grad(set_to_none=True)
                objective.backward()
                optimizer.step()
                if penalty is not None and penalty.form != "loss":
                    penalty.shrink(lr)
                if masks is not None:
                    masks.apply()
                if average is not None:  # a short memory at first, so that the start is soon forgotten
                    update_average(average, model, min(decay, (1 + step) / (10 + step)))

                with torch.no_grad():
                    target = torch.where(lam >= 0.5, labels, others)
                    totals += torch.stack([loss.detach().double(), (logits.argmax(1) == target).double().mean()])
                progress["step"] = step + 1
                if bar.show():
                    seen = totals.tolist()
                    bar.set_postfix(loss=f"{seen[0] / (i + 1):.3f}", accuracy=f"{seen[1] / (i + 1):.1%}", refresh=False)
                bar.update()
                pause = processes.agree(bool(asked) or time.monotonic() - started > max_seconds, device)
                if i + 1 < epoch_steps and (pause or due()):
                    save()
                    if pause:
                        return stopped()
            bar.close()
            loss_sum, correct_sum = reduced(totals)
            check_finite(stage, loss_sum, epoch)
            record = {"stage": stage, "epoch": epoch + 1, "step": progress["step"], "lr": lrs[progress["step"] - 1],
                      "loss": round(loss_sum / epoch_steps, 6), "accuracy": round(correct_sum / epoch_steps, 6),
                      "zeros": count_zeros(model)}
            totals.zero_()
            last = progress["step"] == steps
            if last:
                model = finish(model, average, train_data, settings, stage)
                if masks is not None:
                    masks.check(model)
            if test_data is not None and (last or (epoch + 1) % eval_every == 0):
                shown = model if average is None or last else average
                test_loss, correct = evaluate(shown.eval(), test_data)
                model.train(not last)
                record |= {"test_loss": test_loss, "test_accuracy": correct / len(test_data.labels)}
            if penalty is not None:
                record["lambda"] = penalty.lam
            record["seconds"] = round(before + time.monotonic() - started, 1)
            log.append(json.dumps(record))
            if processes.first:
                save_text("\n".join(log) + "\n", log_path)
                print(describe(record, settings), flush=True)
            if not last and (pause or due()):
                save()
            if not last and pause:
                return stopped()
    return model


def mixed_cross_entropy(logits, labels, others, lam, smoothing):
    """Mean over the batch of lam CE(label) + (1 - lam) CE(partner's label), a lam for every image."""
    first = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    second = F.cross_entropy(logits, others, reduction="none", label_smoothing=smoothing)
    return (lam * first + (1 - lam) * second).mean()


@torch.no_grad()
def finish(model, average, train_data, settings: Settings, stage: str) -> nn.Module:
    """The stage's result: the average, with the zeros of the last step, and BatchNorm statistics of its own."""
    result = model if average is None else average
    if average is not None:  # a weight that became zero is only nearly zero in the average
        for (_, ours), (_, theirs) in zip(weight_layers(result), weight_layers(model)):
            ours.weight.mul_(theirs.weight != 0)
    SyncBatchNorm.revert(result)  # every process sees the same images from here on
    if settings.refresh:
        renew_statistics(result, train_data, settings.refresh, settings.augment, generator_for(settings.seed, stage, "refresh"))
    return result.eval()


def check_finite(stage: str, loss_sum: float, epoch: int) -> None:
    if not math.isfinite(loss_sum):
        raise BadInput(f"{stage}: the loss is not finite in epoch {epoch + 1}; lower --lr (the last good state is kept)")


def count_zeros(model: nn.Module) -> int:
    """Zeros among the weights of all convolutions and the linear layer."""
    return sum(int((module.weight == 0).sum()) for _, module in weight_layers(model))


def describe(record: dict, settings: Settings) -> str:
    line = f"{record['stage']} epoch {record['epoch']}/{settings.epochs}: loss {record['loss']:.4f}"
    line += f", train {record['accuracy']:.2%}"
    if "test_accuracy" in record:
        line += f", test {record['test_accuracy']:.2%}"
    return line + f", zeros {record['zeros']:,}, {record['seconds']:.0f} s"


class _Quiet:
    """The progress bar of a process that shows none."""
    def show(self): return False
    def update(self): pass
    def close(self): pass


def progress_bar(stage: str, epoch: int, epochs: int, total: int, first: int, wanted: bool):
    """Loss, accuracy and time left on a terminal; nothing elsewhere (the epoch's line is printed anyway)."""
    if not wanted or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return _Quiet()
    from tqdm import tqdm

    class Bar(tqdm):
        def show(self):  # reading the loss waits for the device: ten times an epoch at most, or every half second
            now = time.monotonic()
            if now - getattr(self, "shown", 0) < 0.5:
                return False
            self.shown = now
            return True

    return Bar(total=total, initial=first, desc=f"{stage} {epoch + 1}/{epochs}", leave=False)
