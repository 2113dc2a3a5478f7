"""One training loop for every stage: step, schedule, weight average, evaluation, state, resume.

The stages (dense, reweighted, masked, quantized) differ in what they pass in, not in the loop. All randomness of a
step follows from (seed, stage, step), and the learning rate from the step alone, so the state of a run is its tensors
and one number: a run that was killed at any moment goes on from its last state, on a CPU bit for bit.
"""
import contextlib
import copy
import functools
import hashlib
import math
import signal
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from compressed import cifar100, threads
from compressed.errors import BadInput
from compressed.evaluation import evaluate, renew_statistics
from compressed.files import load_lines, save_text, to_json
from compressed.graph import weight_layers
from compressed.networks import half_state, save_state
from training.cpu_kernels import fast_on_a_cpu
from training.cuda_graphs import Graphs
from training.muon import Muon
from training.plan import Plan, Settings, constant_so_far
from training.progress import Progress, describe
from training.replicas import Processes, Replicas
from training.state import State, brief, fingerprint, stop_noted


class NoPenalty:
    """In the place of a penalty: nothing pulls."""
    form = "none"

    def update(self, lr_to_come: float) -> None: pass
    def shrink(self, lr: float) -> None: pass
    def record(self) -> dict: return {}


def save_half(model: nn.Module, path) -> None:
    """Write the model's state dict in float16, where that does no harm: enough for a further stage to start from."""
    save_state(half_state(model.state_dict()), path)


def train(name: str, model: nn.Module, train_data: cifar100.Images, test_data: cifar100.Images | None,
          settings: Settings, folder, *, penalty=None, penalty_updates: int = 5, masks=None, teachers=(),
          prepare=lambda model, epoch: None, context: dict | None = None, resume: bool = True, start_epoch: float = 0,
          eval_every: int = 1, save_seconds: float = 60.0, show_seconds: float = 60.0, max_seconds: float = math.inf,
          later: float = 0, processes: Processes = Processes(), began=lambda: None) -> nn.Module | None:
    """Train `model` in place; return the finished model (its average where one is kept), or None if time ran out.

    name:     of the stage and its files: FOLDER/NAME.jsonl (a line an epoch), FOLDER/NAME.state/ while it runs, and
              FOLDER/NAME.average.pt, what the stage would give as it is (float16), wherever it was stopped.
    penalty:  a ReweightedL1 or GradualMagnitude on `model`, updated `penalty_updates` times at equal distances.
    masks:    Masks on `model`, applied after every step and checked whenever something is written.
    teachers: models in eval mode whose logits are distilled on the same mixed images, always at 32x32.
    prepare:  called with the model and the epoch, from 0, before the epoch's first step: to set modes.
    context:  what else decides the result (plain values): a state is only resumed under the same.
    start_epoch: where the stage is taken up if there is no state: by weights alone, with fresh momentum.
    later:    the work (Plan.work) of the stages that follow, for the time that is left.
    began:    called once nothing stands against the stage any more, before its first step.
    """
    stage = Stage(name, model, train_data, settings, Path(folder), penalty, penalty_updates, masks, teachers, context,
                  processes)
    stage.resume(resume, start_epoch)
    began()
    plan, saved = stage.plan, time.monotonic()
    with contextlib.ExitStack() as at_end:
        asked = at_end.enter_context(stop_noted())  # the step is finished and the state written
        if stage.device.type == "cpu":
            for replica in stage.replicas.models:
                at_end.enter_context(fast_on_a_cpu(replica))
        while stage.progress["step"] < plan.steps:
            epoch, first = divmod(stage.progress["step"], plan.epoch_steps)
            prepare(model, epoch)
            stage.begin(epoch)
            shown = Progress(stage, epoch, show_seconds, later)
            at_end.callback(shown.close)
            for i in range(first, plan.epoch_steps):
                stage.step(epoch, i)
                stage.first_steps += 1
                shown.step(i + 1)
                pause = processes.agree(bool(asked) or stage.seconds_here() > max_seconds, stage.device)
                if i + 1 == plan.epoch_steps:
                    shown.close()
                    hurry = signal.SIGINT in asked and stage.progress["step"] < plan.steps
                    stage.end(epoch, None if hurry else test_data, eval_every)
                due = pause or processes.agree(time.monotonic() - saved >= save_seconds, stage.device)
                if due and stage.result is None:
                    stage.save()
                    saved = time.monotonic()
                    if pause:
                        return stage.leave(average=signal.SIGINT not in asked)
    return stage.result


class Stage:
    """A stage under way: a model with everything that goes with it, and how far it is."""

    def __init__(self, name, model, data, settings, folder, penalty, penalty_updates, masks, teachers, context,
                 processes):
        self.name, self.model, self.data, self.settings, self.folder = name, model, data, settings, folder
        self.penalty, self.masks, self.teachers = penalty or NoPenalty(), masks, list(teachers)
        self.processes = processes
        self.device = data.labels.device
        self.plan = Plan(settings, len(data), processes, penalty_updates)
        self.average = copy.deepcopy(model) if settings.average != 0 else None
        self.averaged = averaged(self.average or model), averaged(model)
        self.replicas = Replicas(model, len(self.plan.shares))
        self.optimizer = make_optimizer(settings, model, masks)
        parts = {"weights": model, "optimizer": self.optimizer, "average": self.average, "penalty": penalty}
        self.parts = {key: part for key, part in parts.items() if part is not None}
        self.state = State(
            folder / f"{name}.state", settings, images=len(data), context=context,
            data=fingerprint([data.images, data.labels]),  # as many other images are another run
            penalty=None if penalty is None else penalty.options() | {"updates": penalty_updates},
            masks=None if masks is None else fingerprint(masks.factors),
            teacher=teachers and fingerprint(v for each in self.teachers for v in each.state_dict().values()) or None)
        # dynamic=False: a schedule of sizes has few, and each is worth kernels of its own
        self.stepped = [torch.compile(model, dynamic=False) if settings.compile else model, *self.replicas.models[1:]]
        # what a graph records is all on this device, the learning rate too
        recordable = (self.device.type == "cuda" and processes.count == 1 and self.penalty.form != "loss"
                      and settings.optimizer != "adam")
        self.graphs = Graphs(self.learn_on_one, self.device) if recordable else None
        self.rates = {}  # {factor: the learning rate times it, on the device}
        self.result = None  # the finished model
        self.first_steps = 0  # made by this process

    # -- from one state to the next

    def resume(self, wanted: bool, start_epoch: float) -> None:
        """Go on from the state in the folder, or begin, at `start_epoch`. Raises BadInput if the state does not fit."""
        steps, log_path = self.plan.epoch_steps, self.folder / f"{self.name}.jsonl"
        self.progress = {"step": round(start_epoch * steps), "loss": 0.0, "correct": 0.0, "seconds": 0.0, "log": []}
        if not wanted and self.processes.first:
            self.state.remove()
        found = self.state.load(self.device, functools.partial(constant_so_far, epoch_steps=steps)) if wanted else None
        if found:
            self.progress, contents = found
            try:
                for key, part in self.parts.items():
                    part.load_state_dict(contents[key])
            except (KeyError, RuntimeError, ValueError) as error:
                raise BadInput(f"{self.state.folder} is of another network ({brief(error)}); --no-resume starts the "
                               "stage again") from error
        elif self.progress["step"] and log_path.is_file():
            self.progress["log"] = [line for line in load_lines(log_path) if line["step"] <= self.progress["step"]]
        step, epochs = self.progress["step"], self.settings.epochs
        if not found:
            self.plan.updates.add(step)  # a stage that is taken up in its middle has a penalty at once
        if step >= self.plan.steps:
            raise BadInput(f"{self.name}: cannot go on at epoch {step / steps:g}: the stage has {epochs}")
        if step and self.processes.first:
            print(f"{self.name}: goes on at epoch {step // steps + 1} of {epochs}", flush=True)
        # sums over the epoch's steps of loss and accuracy, kept on the device: reading them would wait for it
        sums = [self.progress["loss"], self.progress["correct"]]  # of all processes: each goes on with its share
        self.totals = torch.tensor(sums, dtype=torch.float64, device=self.device) / self.processes.count
        self.before, self.started = self.progress["seconds"], time.monotonic()
        self.model.train()

    def seconds_here(self) -> float:
        return time.monotonic() - self.started

    def read_totals(self) -> list[float]:
        """The epoch's sums of loss and accuracy over all processes. Raises BadInput if the loss is not finite."""
        totals = self.totals.clone()
        self.processes.add([totals])
        loss, correct = totals.tolist()
        if not math.isfinite(loss):
            epoch = self.progress["step"] // self.plan.epoch_steps + 1
            raise BadInput(f"{self.name}: the loss is not finite in epoch {epoch}; lower --lr (the last state is kept)")
        return [loss, correct]

    def save(self) -> None:
        self.progress["loss"], self.progress["correct"] = self.read_totals()
        self.progress["seconds"] = self.before + self.seconds_here()
        self.check_masks(self.model, self.average)
        if self.processes.first:
            self.state.save(self.progress, {key: part.state_dict() for key, part in self.parts.items()})

    def check_masks(self, *models) -> None:
        for model in models:
            if self.masks is not None and model is not None:
                self.masks.check(model)

    def leave(self, average: bool) -> None:
        """After a stop, when the state is written: say so, and leave the average, too, if there is time for it."""
        if self.processes.first:
            if average:
                save_half(self.result_so_far(), self.folder / f"{self.name}.average.pt")
            print(f"{self.name}: stopped at epoch {self.progress['step'] / self.plan.epoch_steps:.2f} of "
                  f"{self.settings.epochs}, state written to {self.state.folder}; the same command goes on", flush=True)

    # -- the method

    def begin(self, epoch: int) -> None:
        self.replicas.follow()
        order = cifar100.epoch_order(len(self.data), generator_for(self.settings.seed, self.name, "order", epoch))
        self.order = order.to(self.device)

    def step(self, epoch: int, i: int) -> None:
        """Step i of an epoch: gradients of every share, optimizer, penalty, masks, average."""
        plan, settings, step = self.plan, self.settings, epoch * self.plan.epoch_steps + i
        lr = plan.lrs[step]
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(lr, group.get("factor", 1.0))
        if step in plan.updates:
            self.penalty.update(sum(plan.lrs[step:]))
        index = self.order[i * plan.batch_size:(i + 1) * plan.batch_size][plan.mine]
        draws = cifar100.draw(plan.batch_size, generator_for(settings.seed, self.name, "step", step),
                              crop=settings.augment != "none", trivial=settings.augment == "trivial",
                              mixing=plan.mixing(epoch), mixup_alpha=settings.alpha)[plan.mine]
        kind = self.turn(step), plan.sizes[step]
        if self.graphs is None:
            self.learn(lambda k: self.batch(index[plan.shares[k]], draws[plan.shares[k]]), kind)
        else:
            self.graphs.step(kind, self.batch(index, draws))
        if self.penalty.form != "loss":
            self.penalty.shrink(lr)
        if self.masks is not None:
            self.masks.apply()
        if self.average is not None:
            update_average(*self.averaged, average_decay(settings, step))
        self.progress["step"] = step + 1

    def rate(self, lr: float, factor: float):
        """Return lr times factor: as a number, or for recorded steps in a tensor of the device that is kept."""
        if self.graphs is None:
            return lr * factor
        if factor not in self.rates:
            self.rates[factor] = torch.zeros((), device=self.device)
        return self.rates[factor].fill_(lr * factor)

    def batch(self, index, draws) -> tuple:
        """(mixed images, labels, labels of the partners, lam)."""
        x, *others = cifar100.augment(self.data.images[index], self.data.labels[index], draws)
        return x.contiguous(memory_format=torch.channels_last), *others

    def learn(self, batch, kind) -> None:
        """Gradients of every share, of the images batch(k), then the optimizer's step."""
        for replica in self.replicas.models:
            replica.zero_grad(set_to_none=True)
        self.totals += sum(threads.in_threads(lambda k: self.gradients(k, *batch(k), *kind), range(len(self.stepped))))
        self.replicas.gather(self.processes)
        if self.penalty.form == "loss":
            self.penalty.loss().backward()
        self.optimizer.step()

    def learn_on_one(self, inputs, kind) -> None:
        self.learn(lambda k: inputs, kind)

    def gradients(self, k: int, x, labels, others, lam, turn: int | None, size: int):
        """Forward and backward of a share in its replica; its part of the batch's mean (loss, accuracy)."""
        settings, weight = self.settings, len(x) / self.plan.batch_size
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            with torch.no_grad():
                taught = [each(x).float() for each in (self.teachers if turn is None else [self.teachers[turn]])]
            logits = self.stepped[k](resized(x, size)).float()
        loss = objective = mixed_cross_entropy(logits, labels, others, lam, settings.smoothing)
        if taught:
            apart = distillation(logits, taught, settings.temperature)
            objective = (1 - settings.distill) * loss + settings.distill * apart
        (weight * objective).backward()
        with torch.no_grad():
            target = torch.where(lam >= 0.5, labels, others)
            return weight * torch.stack([loss.detach().double(), (logits.argmax(1) == target).double().mean()])

    def turn(self, step: int) -> int | None:
        """Which of the teachers has its turn at a step; None: all of them teach (or there is none)."""
        return step % len(self.teachers) if self.teachers and self.settings.teaching == "turns" else None

    def end(self, epoch: int, test_data, eval_every: int) -> None:
        """An epoch's line, with the accuracy where it is wanted; after the last epoch, the result."""
        plan, step = self.plan, self.progress["step"]
        loss, correct = self.read_totals()
        record = {"stage": self.name, "epoch": epoch + 1, "step": step, "lr": plan.lrs[step - 1],
                  "size": plan.sizes[step - 1],
                  "loss": round(loss / plan.epoch_steps, 6), "accuracy": round(correct / plan.epoch_steps, 6),
                  "zeros": count_zeros(self.model),
                  "weights": sum(module.weight.numel() for _, module in weight_layers(self.model))}
        self.totals.zero_()
        last = step == plan.steps
        if last:
            self.result = self.finish(self.model if self.average is None else self.average)
            self.check_masks(self.result)
        if test_data is not None and (last or eval_every and (epoch + 1) % eval_every == 0):
            with contextlib.suppress(KeyboardInterrupt):  # noted: the line goes without the accuracy
                test_loss, right = evaluate(self.result or self.result_so_far(), test_data)
                record |= {"test_loss": test_loss, "test_accuracy": right / len(test_data)}
        record |= self.penalty.record()
        where = f"{self.processes.count} x {len(plan.shares)} {self.device.type}, {self.settings.precision}"
        record |= {"where": where, "seconds": round(self.before + self.seconds_here(), 1)}
        self.progress["log"].append(record)
        if self.processes.first:
            save_text("".join(to_json(line) + "\n" for line in self.progress["log"]),
                      self.folder / f"{self.name}.jsonl")
            print(describe(record, self.settings), flush=True)

    def result_so_far(self) -> nn.Module:
        """A copy of what the stage would give if it ended here."""
        return self.finish(copy.deepcopy(self.model if self.average is None else self.average))

    @torch.no_grad()
    def finish(self, result: nn.Module) -> nn.Module:
        """Make the average (or the model itself) a stage's result, with the model's zeros and statistics of its own."""
        if result is not self.model:  # a weight that became zero is only nearly zero in the average
            for (_, ours), (_, theirs) in zip(weight_layers(result), weight_layers(self.model)):
                ours.weight.mul_(theirs.weight != 0)
        if self.settings.refresh:
            renew_statistics(result, self.data, self.settings.refresh, self.settings.augment,
                             generator_for(self.settings.seed, self.name, "refresh"))
        return result.eval()


def make_optimizer(settings: Settings, model: nn.Module, masks=None):
    """Return the optimizer of a model's weights; if its grids have trained steps, together with Adam for those.

    Weight decay on the weights of convolutions and the linear layer; none on BatchNorm, biases and steps.
    """
    weights = [p for name, p in model.named_parameters() if p.requires_grad and not name.endswith("log_step")]
    steps = [p for name, p in model.named_parameters() if p.requires_grad and name.endswith("log_step")]
    optimizer = weight_optimizer(settings, weights, masks)
    if not steps:
        return optimizer
    factor = settings.step_rate / settings.lr if settings.lr else 0.0
    capturable = steps[0].device.type == "cuda"
    adam = torch.optim.Adam([{"params": steps, "factor": factor}], lr=settings.step_rate, capturable=capturable)
    return Together([optimizer, adam])


class Together:
    """Several optimizers as one."""

    def __init__(self, optimizers: list):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return [group for each in self.optimizers for group in each.param_groups]

    def step(self) -> None:
        for each in self.optimizers:
            each.step()

    def state_dict(self) -> dict:
        return {str(k): each.state_dict() for k, each in enumerate(self.optimizers)}

    def load_state_dict(self, state: dict) -> None:
        for k, each in enumerate(self.optimizers):
            each.load_state_dict(state[str(k)])


def weight_optimizer(settings: Settings, weights: list, masks=None) -> torch.optim.Optimizer:
    if settings.optimizer == "muon":
        kept = dict(zip(masks.weights, masks.factors)) if masks else {}
        dtype = getattr(torch, settings.precision)
        return Muon(weights, settings.lr, settings.turn, settings.weight_decay, kept, dtype)
    decayed = [p for p in weights if p.dim() > 1]
    others = [p for p in weights if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True, fused=True)
    if settings.optimizer == "adam":
        return torch.optim.AdamW(groups, lr=settings.lr)
    raise BadInput(f"unknown optimizer {settings.optimizer!r}; known: sgd, adam, muon")


def generator_for(seed: int, *names) -> torch.Generator:
    """The CPU generator that belongs to a seed and a name, such as (stage, "step", 7)."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def averaged(model: nn.Module) -> list:
    """The tensors of a model that a weight average is of: parameters and BatchNorm statistics."""
    return [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]


def update_average(average: list, model: list, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model, in place, of `averaged` tensors."""
    threads.for_each(lambda a, m: torch._foreach_lerp_(a, m, 1 - decay), average, model)


def average_decay(settings: Settings, step: int) -> float:
    """Of the weight average at a step: a memory of 3% of the steps made, or what the settings say, short at first."""
    if settings.average is None:
        return 1 - 1 / max(1, 0.03 * (step + 1))
    return min(settings.average, (1 + step) / (10 + step))


def resized(x, size: int):
    """A finished batch at another size, antialiased."""
    if size == x.shape[-1]:
        return x
    x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
    return x.contiguous(memory_format=torch.channels_last)


def mixed_cross_entropy(logits, labels, others, lam, smoothing):
    """Mean over the batch of lam CE(label) + (1 - lam) CE(partner's label), a lam for every image."""
    first = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    second = F.cross_entropy(logits, others, reduction="none", label_smoothing=smoothing)
    return (lam * first + (1 - lam) * second).mean()


def distillation(logits, taught: list, temperature: float):
    """Hinton, Vinyals and Dean 2015: T^2 KL(the teachers' mean || student), all softened by T."""
    target = sum((each / temperature).softmax(1) for each in taught) / len(taught)
    return F.kl_div(F.log_softmax(logits / temperature, 1), target, reduction="batchmean") * temperature**2


def count_zeros(model: nn.Module) -> int:
    """Zeros among the weights of all convolutions and the linear layer."""
    return sum(int((module.weight == 0).sum()) for _, module in weight_layers(model))
