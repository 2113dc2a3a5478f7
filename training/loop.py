"""One training loop for every stage: step, schedule, weight average, evaluation, state, resume.

The stages (dense, reweighted, masked, quantized) differ in what they pass in, not in the loop. All randomness of a
step follows from (seed, stage, step), and the learning rate from the step alone, so the state of a run is its tensors
and one number: a run that was killed at any moment goes on from its last state, on a CPU bit for bit.
"""
import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import cifar100
import machine
from evaluation import evaluate, renew_statistics
from files import load_lines, save_tensors, save_text
from mobilenet_v2 import IMAGE_SIZE, BadInput, weight_layers
from training.parallel import Processes, Replicas, shares, fast_on_a_cpu
from training.state import State, brief, fingerprint, sigterm_noted


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the result of a stage. A state is only resumed under equal settings (but see training/state.py)."""
    epochs: int
    batch_size: int = 512         # of all processes together
    optimizer: str = "sgd"        # Nesterov momentum 0.9; or adam
    lr: float = 0.4
    schedule: str = "cosine"      # to zero; or default (x0.1 at 1/2 and 3/4); or constant
    warmup_epochs: float = 5
    cooldown: float = 0           # epochs at the end in which the learning rate falls linearly to zero (constant alone)
    weight_decay: float = 5e-4    # none on BatchNorm and biases
    smoothing: float = 0.1
    augment: str = "trivial"      # TrivialAugment, crop and flip; or plain (crop and flip); or none
    mixing: str = "both"          # CutMix or mixup, a draw for every image; or mixup, cutmix, none
    alpha: float = 0.3            # of mixup
    clean: float = 0.05           # share of the epochs, at the end, without mixing
    sizes: str = "32"             # of the images, by share of the steps: see image_sizes
    average: float | None = None  # decay of the weight average a step; None: a memory of 3% of the steps made; 0: no average
    refresh: int = 10_000         # train images that renew the BatchNorm statistics before an evaluation; 0 is none
    distill: float = 0.9          # weight of the teachers in the loss, where there are any
    temperature: float = 4.0
    teaching: str = "turns"       # several teachers: one at each step in turn; or mean, of their probabilities
    precision: str = "float32"    # of the forward pass: float32 or bfloat16
    compile: bool = False
    workers: int = 1              # threads of a process, each with a share of its batch
    seed: int = 0


def image_sizes(text: str) -> list[tuple[int, float]]:
    """[(size, until what share of the stage)] of a schedule such as "24:0.6,32": 60% of the steps at 24x24, the others at 32x32.

    Sizes are multiples of the network's stride, 8; each but the last has a share, and the last is the images' own size, 32.
    Raises BadInput for anything else.
    """
    try:
        *parts, last = text.split(",")
        parts = [(int(size), float(share)) for size, share in (part.split(":") for part in parts)]
        ends = itertools.accumulate(share for _, share in parts)
        sizes = [(size, end) for (size, _), end in zip(parts, ends)] + [(int(last), 1.0)]
        good = all(size % 8 == 0 and 8 <= size <= IMAGE_SIZE for size, _ in sizes) and sizes[-1][0] == IMAGE_SIZE
        good = good and all(share > 0 for _, share in parts) and sum(share for _, share in parts) < 1
    except ValueError:
        good = False
    if not good:
        raise BadInput(f"image sizes {text!r}: expected multiples of 8 up to {IMAGE_SIZE} with their shares of the stage, and "
                       f"{IMAGE_SIZE} at the end, such as 24:0.6,{IMAGE_SIZE}")
    return sizes


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
        cooldown = round(settings.cooldown * epoch_steps)
        return settings.lr * min(1, (steps - step) / (cooldown + 1))
    raise BadInput(f"unknown schedule {settings.schedule!r}; known: cosine, default, constant")


def constant_so_far(settings: dict, step: int, epoch_steps: int) -> bool:
    """Whether the rate has been constant, but for the warm-up, before this step, under the settings that a state holds."""
    epochs, cooldown = settings.get("epochs"), settings.get("cooldown", 0)
    if settings.get("schedule") != "constant" or type(epochs) is not int or type(cooldown) not in (int, float):
        return False
    return step <= (epochs - cooldown) * epoch_steps


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


def train(stage: str, model: nn.Module, train_data: cifar100.Images, test_data: cifar100.Images | None,
          settings: Settings, folder, *, penalty=None, penalty_updates: int = 5, masks=None, teachers=(),
          prepare=None, context: dict | None = None, resume: bool = True, start_epoch: float = 0, eval_every: int = 1,
          save_seconds: float = 60.0, show_seconds: float = 60.0, max_seconds: float = math.inf,
          processes: Processes = Processes(), began=lambda: None) -> nn.Module | None:
    """Train `model` in place; return the finished model (its average where one is kept), or None if time ran out.

    stage:    names the files: FOLDER/STAGE.jsonl (a line an epoch), FOLDER/STAGE.state/ while it runs, and
              FOLDER/STAGE.average.pt, what the stage would give as it is (float16), wherever it was stopped.
    penalty:  a ReweightedL1 or GradualMagnitude on `model`, updated `penalty_updates` times at equal distances.
    masks:    Masks on `model`, applied after every step and checked whenever something is written.
    teachers: models in eval mode whose logits are distilled on the same mixed images, at 32x32 whatever the student sees.
    prepare:  called with the model before every epoch's first step, to set modes.
    context:  what else decides the result (plain values): a state is only resumed under the same.
    start_epoch: where the stage is taken up if there is no state: by weights alone, with fresh momentum.
    began:    called once nothing stands against the stage any more, before its first step.
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
    parts_of_share = shares(share, settings.workers)
    epoch_steps = images // batch_size  # what does not fill a batch waits for another epoch's order
    steps = settings.epochs * epoch_steps
    lrs = [learning_rate(settings, step, steps, epoch_steps) for step in range(steps)]
    by_share = image_sizes(settings.sizes)
    sizes = [next(size for size, end in by_share if step < end * steps) for step in range(steps)]
    pixels_to_come = list(itertools.accumulate(size**2 for size in reversed(sizes)))[::-1] + [0]
    update_at = {round(i * steps / penalty_updates) for i in range(penalty_updates)}
    clean_from = settings.epochs - round(settings.clean * settings.epochs)

    average = copy.deepcopy(model) if settings.average != 0 else None
    replicas = Replicas(model, len(parts_of_share))
    optimizer = make_optimizer(settings, model)
    parts = {"weights": model, "optimizer": optimizer, "average": average, "penalty": penalty}
    parts = {name: part for name, part in parts.items() if part is not None}
    state = State(folder / f"{stage}.state", settings, images=images, context=context,
                  penalty=None if penalty is None else penalty.options() | {"updates": penalty_updates},
                  masks=None if masks is None else fingerprint(masks.factors),
                  teacher=fingerprint(value for teacher in teachers for value in teacher.state_dict().values()) if teachers else None)
    progress = {"step": round(start_epoch * epoch_steps), "loss": 0.0, "correct": 0.0, "seconds": 0.0, "log": []}
    if not resume and processes.first:
        state.remove()
    found = state.load(device, functools.partial(constant_so_far, epoch_steps=epoch_steps)) if resume else None
    if found:
        progress, contents = found
        try:
            for name, part in parts.items():
                part.load_state_dict(contents[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise BadInput(f"{state.folder} is of another network ({brief(error)}); --no-resume starts the stage again") from error
    if progress["step"] >= steps:
        raise BadInput(f"{stage}: cannot go on at epoch {progress['step'] / epoch_steps:g}: the stage has {settings.epochs}")
    if processes.first and progress["step"]:
        print(f"{stage}: goes on at epoch {progress['step'] // epoch_steps + 1} of {settings.epochs}", flush=True)
    log_path = folder / f"{stage}.jsonl"
    if not found and progress["step"] and log_path.is_file():
        progress["log"] = [line for line in load_lines(log_path) if line["step"] <= progress["step"]]
    began()

    compiled = torch.compile(model) if settings.compile else model
    stepped = [compiled, *replicas.models[1:]]
    where = f"{processes.count} x {len(parts_of_share)} {device.type}, {settings.precision}"

    def share_step(k):
        """Forward and backward of the k-th share of this process: (loss, correct), as shares of the batch's mean."""
        part = parts_of_share[k]
        x, labels, others, lam = cifar100.augment(train_data.images[index[part]], train_data.labels[index[part]], draws[part])
        weight = (part.stop - part.start) / batch_size
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            with torch.no_grad():
                taught = [teacher(x).float() for teacher in teaching]
            logits = stepped[k](resized(x, size)).float()
        loss = mixed_cross_entropy(logits, labels, others, lam, settings.smoothing)
        objective = loss
        if taught:
            objective = (1 - settings.distill) * loss + settings.distill * distillation(logits, taught, settings.temperature)
        (weight * objective).backward()
        with torch.no_grad():
            target = torch.where(lam >= 0.5, labels, others)
            return weight * torch.stack([loss.detach().double(), (logits.argmax(1) == target).double().mean()])

    def reduced(values):
        """Their sum over the processes, as numbers."""
        values = values.clone()
        processes.add([values])
        return values.tolist()

    def due():
        return processes.agree(time.monotonic() - saved >= save_seconds, device)

    def result_so_far():
        """A copy of what the stage would give if it ended here."""
        return finish(copy.deepcopy(model if average is None else average), model, train_data, settings, stage)

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
            halves = {key: value.half() if value.is_floating_point() else value for key, value in result_so_far().state_dict().items()}
            save_tensors({key: value.cpu().contiguous() for key, value in halves.items()}, folder / f"{stage}.average.pt")
            print(f"{stage}: stopped at epoch {progress['step'] / epoch_steps:.2f} of {settings.epochs}, state written to "
                  f"{state.folder}; the same command goes on", flush=True)

    started = saved = time.monotonic()
    before = progress["seconds"]
    # sums over the epoch's steps of loss and accuracy, kept on the device: reading them would wait for it
    totals = torch.tensor([progress["loss"], progress["correct"]], dtype=torch.float64, device=device)
    if processes.rank:
        totals.zero_()  # the first process goes on with the sum of all
    model.train()
    with contextlib.ExitStack() as at_end:
        asked = at_end.enter_context(sigterm_noted())  # the step is finished and the state written
        if device.type == "cpu":
            for replica in replicas.models:
                at_end.enter_context(fast_on_a_cpu(replica))
        while progress["step"] < steps:
            epoch, first = divmod(progress["step"], epoch_steps)
            if prepare is not None:
                prepare(model)
            replicas.follow()
            order = cifar100.epoch_order(images, generator_for(settings.seed, stage, "order", epoch)).to(device)
            shown = Progress(stage, epoch, settings.epochs, first, epoch_steps, batch_size, show_seconds, processes.first)
            at_end.callback(shown.close)
            for i in range(first, epoch_steps):
                step = epoch * epoch_steps + i
                lr, size = lrs[step], sizes[step]
                for group in optimizer.param_groups:
                    group["lr"] = lr
                if penalty is not None and step in update_at:
                    penalty.update(sum(lrs[step:]))

                index = order[i * batch_size:(i + 1) * batch_size][mine]
                mixing = "none" if epoch >= clean_from else settings.mixing
                draws = cifar100.draw(batch_size, generator_for(settings.seed, stage, "step", step),
                                      crop=settings.augment != "none", trivial=settings.augment == "trivial",
                                      mixing=mixing, mixup_alpha=settings.alpha)[mine]
                teaching = [teachers[step % len(teachers)]] if teachers and settings.teaching == "turns" else teachers
                for replica in replicas.models:
                    replica.zero_grad(set_to_none=True)
                totals += sum(machine.in_threads(share_step, range(len(stepped))))
                replicas.gather(processes)
                if penalty is not None and penalty.form == "loss":
                    penalty.loss().backward()
                optimizer.step()
                if penalty is not None and penalty.form != "loss":
                    penalty.shrink(lr)
                if masks is not None:
                    masks.apply()
                if average is not None:
                    update_average(average, model, average_decay(settings, step))

                progress["step"] = step + 1
                shown.step(i + 1, totals * processes.count, pixels_to_come[step + 1] / size**2, lr, size)
                pause = processes.agree(bool(asked) or time.monotonic() - started > max_seconds, device)
                if i + 1 < epoch_steps and (pause or due()):
                    save()
                    if pause:
                        return stopped()
            shown.close()
            loss_sum, correct_sum = reduced(totals)
            check_finite(stage, loss_sum, epoch)
            record = {"stage": stage, "epoch": epoch + 1, "step": progress["step"], "lr": lrs[progress["step"] - 1],
                      "size": sizes[progress["step"] - 1], "loss": round(loss_sum / epoch_steps, 6),
                      "accuracy": round(correct_sum / epoch_steps, 6), "zeros": count_zeros(model)}
            totals.zero_()
            last = progress["step"] == steps
            result = None
            if last:
                result = finish(model if average is None else average, model, train_data, settings, stage)
                if masks is not None:
                    masks.check(result)
            if test_data is not None and (last or (epoch + 1) % eval_every == 0):
                test_loss, correct = evaluate(result or result_so_far(), test_data)
                record |= {"test_loss": test_loss, "test_accuracy": correct / len(test_data.labels)}
            if penalty is not None:
                record["lambda"] = penalty.lam
            record |= {"where": where, "seconds": round(before + time.monotonic() - started, 1)}
            progress["log"].append(record)
            if processes.first:
                save_text("".join(json.dumps(line) + "\n" for line in progress["log"]), log_path)
                print(describe(record, settings), flush=True)
            if not last and (pause or due()):
                save()
            if not last and pause:
                return stopped()
    return result


def average_decay(settings: Settings, step: int) -> float:
    """Of the weight average at a step: its memory is 3% of the steps made so far, or what the settings say, but short at first."""
    if settings.average is None:
        return 1 - 1 / max(1, 0.03 * (step + 1))
    return min(settings.average, (1 + step) / (10 + step))


def resized(x, size: int):
    """A finished batch at another size, antialiased."""
    if size == x.shape[-1]:
        return x
    x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
    return x.contiguous(memory_format=torch.channels_last)


def distillation(logits, taught: list, temperature: float):
    """Hinton, Vinyals and Dean 2015: T^2 KL(teachers || student), both softened by T; several teachers: of the mean of theirs."""
    target = sum((each / temperature).softmax(1) for each in taught) / len(taught)
    return F.kl_div(F.log_softmax(logits / temperature, 1), target, reduction="batchmean") * temperature**2


def mixed_cross_entropy(logits, labels, others, lam, smoothing):
    """Mean over the batch of lam CE(label) + (1 - lam) CE(partner's label), a lam for every image."""
    first = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    second = F.cross_entropy(logits, others, reduction="none", label_smoothing=smoothing)
    return (lam * first + (1 - lam) * second).mean()


@torch.no_grad()
def finish(result: nn.Module, model: nn.Module, train_data, settings: Settings, stage: str) -> nn.Module:
    """Make `result`, the average (or the model itself), a stage's result: with the model's zeros, and statistics of its own."""
    if result is not model:  # a weight that became zero is only nearly zero in the average
        for (_, ours), (_, theirs) in zip(weight_layers(result), weight_layers(model)):
            ours.weight.mul_(theirs.weight != 0)
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


class Progress:
    """An epoch's progress: a bar on a terminal, elsewhere a line every `seconds`."""

    def __init__(self, stage: str, epoch: int, epochs: int, first: int, total: int, batch_size: int, seconds: float, wanted: bool):
        self.name, self.epochs, self.epoch, self.total, self.batch_size = stage, epochs, epoch, total, batch_size
        self.seconds, self.bar = seconds if wanted else math.inf, None
        if wanted and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            from tqdm import tqdm
            self.bar = tqdm(total=total, initial=first, desc=f"{stage} {epoch + 1}/{epochs}", leave=False)
            self.seconds = 0.5
        self.last, self.at = first, time.monotonic()

    def step(self, done: int, totals, to_come: float, lr: float, size: int) -> None:
        """`done` of the epoch's steps are made, with these sums of loss and accuracy; `to_come`: as many steps of this size."""
        now = time.monotonic()
        if now - self.at < self.seconds:  # reading the totals waits for the device: seldom
            return
        rate = (done - self.last) / (now - self.at)
        loss, correct = (totals / done).tolist()
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{correct:.1%}", refresh=False)
            self.bar.update(done - self.last)
        else:
            print(f"{self.name} epoch {self.epoch + done / self.total:.2f}/{self.epochs}: {rate * self.batch_size:,.0f} images/s at "
                  f"{size}x{size}, lr {lr:.4g}, loss {loss:.4f}, train {correct:.2%}, "
                  f"{(self.epoch + done / self.total) / self.epochs:.1%} done, {to_come / rate / 60:,.0f} min left", flush=True)
        self.last, self.at = done, now

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
