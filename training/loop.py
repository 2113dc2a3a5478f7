"""Train a network: the one loop of all stages, from the loss of a step to the state of a stage.

The stages (dense, reweighted, masked, quantized) differ in the arguments that they pass to `train`, not in the loop.
All random numbers of a step follow from (seed, stage, step), and its learning rate from the step alone. So the state of
a run is its tensors and the number of steps made: a run that is killed at any moment resumes from its last saved state,
and on a CPU the result is the same to the last bit. Networks that draw random numbers themselves,
as dropout does, are an exception if several workers train them: these share torch's generator, in any order.
"""
import collections
import contextlib
import copy
import dataclasses
import hashlib
import math
import random
import signal
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from compressed import threads
from compressed.cifar100 import IMAGE_SIZE, Images
from compressed.errors import BadInput, refused
from compressed.evaluation import evaluate
from compressed.files import save_text, to_json
from compressed.graph import weight_layers
from compressed.networks import half_state, save_state
from training import augmentation
from training.batchnorm import renew_statistics
from training.cpu_kernels import fast_on_a_cpu
from training.cuda_graphs import Graphs
from training.gpu_kernels import KINDS, fast_on_a_gpu, fast_teacher
from training.optimizers import Together, make_optimizer
from training.plan import Plan, Settings
from training.progress import Progress, describe
from training.replicas import Processes, Replicas, running_statistics
from training.runs import load_lines
from training.state import AGAIN, State, tensor_digest


# ---- A step: random numbers, loss, weight average -----------------------------------------------------------------

def generator_for(seed: int, *names) -> torch.Generator:
    """Return a CPU generator seeded by a hash of the seed and the names, such as (stage, "step", 7)."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def seed_all(seed: int) -> None:
    """Seed torch, Python's random and numpy: a network may draw from any of them."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def resized(x, size: int):
    """Return a batch of normalised images scaled to size x size, with antialiasing."""
    if size == x.shape[-1]:
        return x
    x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
    return x.contiguous(memory_format=torch.channels_last)


def mixed_cross_entropy(logits, labels, others, lam, smoothing):
    """Return the batch's mean of lam CE(label) + (1 - lam) CE(partner's label); every image has its own lam.

    logits: [N, classes]. labels, others: int64 [N]. lam: float32 [N].
    """
    first = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    second = F.cross_entropy(logits, others, reduction="none", label_smoothing=smoothing)
    return (lam * first + (1 - lam) * second).mean()


def distillation(logits, taught: list, temperature: float):
    """Return T^2 KL(mean of the teachers || student), all softened by the temperature T (Hinton et al. 2015).

    logits, each of `taught`: [N, classes]; the mean is over the N images.
    """
    target = sum((each / temperature).softmax(1) for each in taught) / len(taught)
    return F.kl_div(F.log_softmax(logits / temperature, 1), target, reduction="batchmean") * temperature**2


def averaged(model: nn.Module) -> list:
    """Return the tensors of a model that the weight average covers: parameters and BatchNorm statistics."""
    return [*(p for p in model.parameters() if p.is_floating_point()), *running_statistics(model)]


def update_average(average: list, model: list, decay: float) -> None:
    """Set average <- decay * average + (1 - decay) * model in place. Both are lists as `averaged` returns them."""
    threads.for_each(lambda a, m: torch._foreach_lerp_(a, m, 1 - decay), average, model)


def average_decay(settings: Settings, step: int) -> float:
    """Return the decay of the weight average (EMA) at `step`; by default it averages over the last 3% of the steps.

    A fixed decay from the settings is warmed up: (1 + step) / (10 + step) as long as that is smaller.
    """
    if settings.average is None:
        return 1 - 1 / max(1, 0.03 * (step + 1))
    return min(settings.average, (1 + step) / (10 + step))


LOWER = "give a lower --lr, with --no-resume or in another folder (the last state is kept)"


# ---- A stage ------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(eq=False)
class Stage:
    """A running stage. It writes FOLDER/NAME.jsonl (one line per epoch) and, while it runs, FOLDER/NAME.state/.

    If it is stopped by SIGTERM or a time limit, it also writes FOLDER/NAME.average.pt, in float16: the result as if the
    stage had ended there. After Ctrl-C it does not, because that takes as long as an evaluation.

    penalty:    a Penalty (penalties.py) on `model`, updated `penalty_updates` times at equal intervals
    masks:      Masks on `model`, applied after every step, and checked before weights are written
    teachers:   models in eval mode; their logits for the same mixed images, always at 32x32, are distilled
    context:    further plain values that decide the result; a state is resumed only if they are equal
    watch:      an object whose step() is called after every step, and whose record() is added to an epoch's log line;
                with state_dict and load_state_dict
    test, eval_every: images to evaluate on, and the epochs between evaluations; 0: only after the last epoch
    kernels:    on a GPU, kinds of layers that may use the project's own kernels
    """
    name: str
    model: nn.Module
    data: Images
    settings: Settings
    folder: Path
    penalty: object = None
    penalty_updates: int = 5
    masks: object = None
    teachers: tuple | list = ()
    context: dict | None = None
    processes: Processes = Processes()
    watch: object = None
    test: Images | None = None
    eval_every: int = 1
    kernels: tuple[str, ...] = KINDS

    def __post_init__(self):
        model, settings, penalty = self.model, self.settings, self.penalty
        for weight in model.parameters():  # torch's fused SGD is wrong for tensors with gaps, as parts of others have
            layouts = (torch.contiguous_format, *([torch.channels_last] if weight.dim() == 4 else ()))
            if not any(weight.is_contiguous(memory_format=layout) for layout in layouts):
                weight.data = weight.data.contiguous()
        self.penalty_in_loss = penalty is not None and penalty.in_loss
        self.device = self.data.labels.device
        self.plan = Plan(settings, len(self.data), self.processes)
        self.updates = {round(i * self.plan.steps / self.penalty_updates) for i in range(self.penalty_updates)}
        self.average = copy.deepcopy(model) if settings.average != 0 else None
        self.averaged = averaged(self.average or model), averaged(model)
        self.replicas = Replicas(model, len(self.plan.shares))
        masked = {} if self.masks is None else dict(zip(self.masks.weights, self.masks.factors))
        self.optimizer = make_optimizer(settings, model, masked if penalty is None else masked | penalty.kept())
        parts = {"weights": model, "optimizer": self.optimizer, "average": self.average, "penalty": penalty,
                 "watch": self.watch}
        self.parts = {key: part for key, part in parts.items() if part is not None}
        self.state = State(
            self.folder / f"{self.name}.state", settings, images=len(self.data), context=self.context,
            data=tensor_digest([self.data.images, self.data.labels]),  # the same number of other images is another run
            penalty=None if penalty is None else penalty.options() | {"updates": self.penalty_updates},
            masks=None if self.masks is None else tensor_digest(self.masks.factors),
            teacher=tensor_digest(v for each in self.teachers for v in each.state_dict().values())
            if self.teachers else None)
        # A CUDA graph records work on one device, at fixed addresses. So the learning rate is read from a tensor, and
        # there is no graph with several processes, AdamW (whose step counts are not on the device), or a penalty in the
        # loss (whose alphas are new tensors after an update).
        recordable = (settings.graphs and self.device.type == "cuda" and self.processes.count == 1
                      and not self.penalty_in_loss and settings.optimizer != "adam")
        self.graphs = Graphs(lambda batch, kind: self.learn(lambda k: batch, kind), self.device) if recordable else None
        # on a GPU the teachers compute beside the student, whose kernels alone do not fill the device
        self.teacher_stream, self.batch_stream, faster = None, None, self.teachers
        if self.device.type == "cuda":
            self.teacher_stream, self.batch_stream = (torch.cuda.Stream(self.device) for _ in range(2))
            faster = [fast_teacher(each, getattr(torch, settings.precision)) for each in self.teachers]
        # of each share: a forward pass may leave intermediate values in a teacher
        self.taught_by = [faster] + [copy.deepcopy(faster) for _ in self.plan.shares[1:]]
        self.modes = []  # of all modules, True for train, with which the graphs were recorded
        # {factor: tensor of the learning rate times this factor}; a graph reads its address
        self.rates = collections.defaultdict(lambda: torch.zeros((), device=self.device))
        self.result = None  # the finished model
        self.so_far = None  # (step, the model that the stage would return if it ended there)
        self.pace = math.inf  # seconds that the fastest step took, for each pixel of this process
        self.measured = 0.0  # seconds that the last evaluation took, the BatchNorm statistics included
        self.first_steps = 0  # steps made by this process since it started

    @contextlib.contextmanager
    def fast_kernels(self):
        """Use the project's own kernels for this device within the block, see cpu_kernels and gpu_kernels."""
        with contextlib.ExitStack() as at_end:
            if self.graphs is not None:
                at_end.callback(self.graphs.forget)  # their memory, before another stage records its own
            if self.device.type == "cpu":
                for replica in self.replicas.models:
                    at_end.enter_context(fast_on_a_cpu(replica))
            if self.device.type == "cuda":
                plan, sizes = self.plan, set(self.plan.sizes[self.progress["step"]:])
                at_end.enter_context(fast_on_a_gpu(
                    self.model, sorted(sizes), kinds=self.kernels, batch=len(range(plan.batch_size)[plan.mine]),
                    dtype=getattr(torch, self.settings.precision), device=self.device,
                    captured=self.graphs is not None))
            if self.graphs is not None and self.settings.optimizer == "muon":
                muon = self.optimizer.optimizers[0] if isinstance(self.optimizer, Together) else self.optimizer
                at_end.enter_context(muon.made_early())
            yield

    # -- an epoch's beginning, and its steps

    def begin(self, epoch: int) -> None:
        """Prepare an epoch: bring the replicas up to date and draw the order of the images."""
        self.replicas.follow()
        modes = [module.training for module in self.model.modules()]
        if self.graphs is not None and modes != self.modes:
            self.graphs.forget()
        self.modes = modes
        generator = generator_for(self.settings.seed, self.name, "order", epoch)
        self.order = torch.randperm(len(self.data), generator=generator).to(self.device)
        if self.batch_stream is not None:
            self.batch_stream.wait_stream(torch.cuda.current_stream())

    def step(self, epoch: int, i: int) -> None:
        """Make step i of an epoch: gradients of all shares, optimizer, penalty, masks, weight average."""
        plan, settings, step, began = self.plan, self.settings, epoch * self.plan.epoch_steps + i, time.monotonic()
        lr = plan.lrs[step]
        for group in self.optimizer.param_groups:
            factor = group.get("factor", 1.0)
            group["lr"] = lr * factor if self.graphs is None else self.rates[factor].fill_(lr * factor)
        if self.penalty is not None and step in self.updates:
            with torch.no_grad():
                self.penalty.update(sum(plan.lrs[step:]))
        index = self.order[i * plan.batch_size:(i + 1) * plan.batch_size][plan.mine]
        draws = augmentation.draw(plan.batch_size, generator_for(settings.seed, self.name, "step", step),
                                  settings.augment, mixing=plan.mixing(epoch), mixup_alpha=settings.alpha)[plan.mine]
        seed_all(generator_for(settings.seed, self.name, "network", step, self.processes.rank).initial_seed())
        turns = self.teachers and settings.teaching == "turns"
        kind = step % len(self.teachers) if turns else None, plan.sizes[step]
        if self.graphs is None:
            self.learn(lambda k: self.batch(index[plan.shares[k]], draws[plan.shares[k]]), kind)
        else:
            self.graphs.step(kind, self.next_batch(index, draws))
        if self.penalty is not None:
            with torch.no_grad():
                self.penalty.after_step(lr)
        if self.masks is not None:
            self.masks.apply()
        if self.average is not None:
            update_average(*self.averaged, average_decay(settings, step))
        if self.watch is not None:
            self.watch.step()
        self.progress["step"] = step + 1
        self.first_steps += 1
        self.pace = min(self.pace, (time.monotonic() - began) / plan.pixels[step] * self.processes.count)

    def batch(self, index, draws) -> tuple:
        """Return (mixed images, labels, labels of the mixing partners, lam); see augmentation.augment."""
        return augmentation.augment(self.data.images[index], self.data.labels[index], draws)

    def next_batch(self, index, draws) -> tuple:
        """Return `batch`; on a GPU it is computed on a stream of its own, so that it overlaps with the step before."""
        if self.batch_stream is None:
            return self.batch(index, draws)
        now = torch.cuda.current_stream()
        with torch.cuda.stream(self.batch_stream):
            batch = self.batch(index, draws)
        now.wait_stream(self.batch_stream)
        for each in batch:
            each.record_stream(now)  # else its memory could be used again before this stream has read it
        return batch

    def learn(self, batch, kind) -> None:
        """Compute the gradients of every share k from batch(k), then make the optimizer's step.

        kind: (index of the teacher or None, image size), see `gradients`.
        """
        for replica in self.replicas.models:
            replica.zero_grad(set_to_none=True)
        shares = range(len(self.replicas.models))
        self.totals += sum(threads.in_threads(lambda k: self.gradients(k, *batch(k), *kind), shares))
        self.replicas.gather(self.processes)
        if self.penalty_in_loss:
            self.penalty.loss().backward()
        self.optimizer.step()

    def gradients(self, k: int, x, labels, others, lam, teacher: int | None, size: int):
        """Run forward and backward of share k in its replica; return its part of the batch's mean [loss, accuracy].

        x, labels, others, lam: the share's mixed images, as augmentation.augment returns them. size: of the images that
        the student sees. teacher: index of the one to distil from; None: all of them.
        """
        settings, weight = self.settings, len(x) / self.plan.batch_size
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            chosen = self.taught_by[k] if teacher is None else [self.taught_by[k][teacher]]
            if self.teacher_stream:
                self.teacher_stream.wait_stream(torch.cuda.current_stream())
            with torch.no_grad(), torch.cuda.stream(self.teacher_stream):
                taught = [each(x).float() for each in chosen]
            logits = self.replicas.models[k](resized(x, size)).float()
            if self.teacher_stream:
                torch.cuda.current_stream().wait_stream(self.teacher_stream)
        loss = objective = mixed_cross_entropy(logits, labels, others, lam, settings.smoothing)
        if taught:
            apart = distillation(logits, taught, settings.temperature)
            objective = (1 - settings.distill) * loss + settings.distill * apart
        (weight * objective).backward()
        with torch.no_grad():
            target = torch.where(lam >= 0.5, labels, others)
            return weight * torch.stack([loss.detach().double(), (logits.argmax(1) == target).double().mean()])

    # -- an epoch's end, and the stage's result

    def end(self, epoch: int, hurry: bool = False) -> None:
        """Write and print an epoch's log line, with the test accuracy if it is due; after the last, set `result`.

        hurry: skip the evaluation. After Ctrl-C the line is written without it, but not the last one: then nothing is
        done, and a resume ends the stage.
        """
        plan, step, weights = self.plan, self.progress["step"], [layer.weight for _, layer in weight_layers(self.model)]
        loss, correct = (total / self.summed() for total in self.read_totals())
        record = {"stage": self.name, "epoch": epoch + 1, "step": step, "lr": plan.lrs[step - 1],
                  "size": plan.sizes[step - 1],
                  "loss": round(loss, 6), "accuracy": round(correct, 6),
                  "zeros": sum(int((weight == 0).sum()) for weight in weights),
                  "weights": sum(weight.numel() for weight in weights)}
        last, began = step == plan.steps, time.monotonic()
        due = last or self.eval_every and (epoch + 1) % self.eval_every == 0
        try:
            result = self.finish(self.model if self.average is None else self.average) if last else None
            self.check_masks(result)
            if self.test is not None and due and not hurry:
                test_loss, right = evaluate(result or self.result_so_far(), self.test)
                record |= {"test_loss": test_loss, "test_accuracy": int(right.sum()) / len(self.test)}
                self.measured = time.monotonic() - began
        except BadInput as error:  # the loss of the weight average is not finite, although the training loss was
            raise BadInput(f"{self.name}: {error}; {LOWER}") from error
        except KeyboardInterrupt:  # a second Ctrl-C; stop_noted has recorded it, and train() saves the state and stops
            result = None
        if last and self.processes.agree(result is None, self.device):
            return
        self.result = result
        for figures in (self.penalty, self.watch):
            record |= figures.record() if figures is not None else {}
        where = f"{self.processes.count} x {len(plan.shares)} {self.device.type}, {self.settings.precision}"
        record |= {"where": where, "seconds": round(self.seconds(), 1)}
        self.progress["log"].append(record)
        self.progress["since"] = step
        self.totals.zero_()
        if self.processes.first:
            save_text("".join(to_json(line) + "\n" for line in self.progress["log"]),
                      self.folder / f"{self.name}.jsonl")
            print(describe(record, self.settings.epochs), flush=True)

    def result_so_far(self) -> nn.Module:
        """Return a copy of the model that the stage would return if it ended now; do not change it."""
        step = self.progress["step"]
        if self.so_far is None or self.so_far[0] != step:
            self.so_far = step, self.finish(copy.deepcopy(self.model if self.average is None else self.average))
        return self.so_far[1]

    @torch.no_grad()
    def finish(self, result: nn.Module) -> nn.Module:
        """Turn the weight average (or the model itself) into the stage's result, in place; return it in eval mode.

        Where the model's weights are zero, the average's become zero, and buffers other than BatchNorm statistics are
        copied from the model. The BatchNorm statistics are re-estimated for these weights, unless `refresh` is 0.
        """
        if result is not self.model:  # a weight that became zero is only nearly zero in the average
            for (_, ours), (_, theirs) in zip(weight_layers(result), weight_layers(self.model)):
                ours.weight.mul_(theirs.weight != 0)
            means = {id(statistics) for statistics in running_statistics(result)}
            for ours, theirs in zip(result.buffers(), self.model.buffers()):
                if id(ours) not in means:
                    ours.copy_(theirs)
        if self.settings.refresh:
            renew_statistics(result, self.data, self.settings.refresh, self.settings.augment,
                             generator_for(self.settings.seed, self.name, "refresh"))
        return result.eval()

    def check_masks(self, *models) -> None:
        """Raise AssertionError if a masked weight of one of the models is not zero."""
        for model in models:
            if self.masks is not None and model is not None:
                self.masks.check(model)

    def summed(self) -> int:
        """Return the number of the epoch's steps over which `totals` sums up: fewer than all after --start-epoch."""
        return self.progress["step"] - self.progress["since"]

    def read_totals(self) -> list[float]:
        """Return the epoch's sums of loss and accuracy over all processes. Raises BadInput if the loss is not finite.
        """
        totals = self.totals.clone()
        self.processes.add([totals])
        loss, correct = totals.tolist()
        if not math.isfinite(loss):
            epoch = self.progress["step"] // self.plan.epoch_steps + 1
            raise BadInput(f"{self.name}: the loss is not finite in epoch {epoch}; {LOWER}")
        return [loss, correct]

    # -- the state of the stage: resume, save, stop

    def resume(self, wanted: bool, start_epoch: float) -> None:
        """Resume the state in the folder; if there is none, begin at `start_epoch`. Raises BadInput if it does not fit.
        """
        steps, log = self.plan.epoch_steps, self.folder / f"{self.name}.jsonl"
        first = round(start_epoch * steps)
        self.progress = {"step": first, "since": first, "loss": 0.0, "correct": 0.0, "seconds": 0.0, "log": []}
        self.way_on = "the same command" + " without --no-resume" * (not wanted)
        if found := self.state.load(self.device, steps) if wanted else None:
            self.progress, contents = found
            with refused(f"{self.state.folder} holds the state of another network", f"; {AGAIN}",
                         (KeyError, RuntimeError, ValueError)):
                for key, part in self.parts.items():
                    part.load_state_dict(contents[key])
        else:
            self.updates.add(self.progress["step"])  # a stage that begins at a later epoch needs the alphas, too
            if self.progress["step"] and log.is_file():
                self.progress["log"] = [line for line in load_lines(log) if line["step"] <= self.progress["step"]]
        step, epochs = self.progress["step"], self.settings.epochs
        # all steps may have been made without the last log line: then what is left is to evaluate
        if step > self.plan.steps or step == self.plan.steps and not self.summed():
            raise BadInput(f"{self.name}: cannot resume at epoch {step / steps:g}: the stage has {epochs}")
        if not wanted and self.processes.first:
            self.state.remove()
        if step and self.processes.first:
            print(f"{self.name}: resumes at epoch {min(step // steps + 1, epochs)} of {epochs}", flush=True)
        # Sums of loss and accuracy over the epoch's steps stay on the device, because reading them waits for it.
        # The saved ones are sums over all processes, so each process resumes with its share.
        sums = [self.progress["loss"], self.progress["correct"]]
        self.totals = torch.tensor(sums, dtype=torch.float64, device=self.device) / self.processes.count
        self.before, self.started = self.progress["seconds"], time.monotonic()
        self.model.train()

    def seconds(self) -> float:
        """Return how long the stage has been trained, in the processes before this one, too."""
        return self.before + time.monotonic() - self.started

    def closing(self) -> float:
        """Estimate the seconds that re-estimating the BatchNorm statistics and evaluating take.

        That is the last measured time. Before the first evaluation, an image is assumed to take half of its time in the
        fastest training step, which has a backward pass, too. On a GPU a step is timed only until it is launched, and
        the first evaluation selects kernels, so 10 seconds are added.
        """
        images = self.settings.refresh + (0 if self.test is None else len(self.test))
        allowance = 10 if self.device.type == "cuda" else 0
        return self.measured or images * IMAGE_SIZE**2 * self.pace / 2 + allowance

    def save(self) -> None:
        """Write the state, after a check of the masks. Raises BadInput if a weight in it is not finite."""
        self.progress["loss"], self.progress["correct"] = self.read_totals()
        self.progress["seconds"] = self.seconds()
        if not torch.stack([tensor.isfinite().all() for several in self.averaged for tensor in several]).all():
            raise BadInput(f"{self.name}: the weights are not finite; {LOWER}")
        self.check_masks(self.model, self.average)
        if self.processes.first:
            parts = self.parts | ({} if self.masks is None else {"masks": self.masks})  # main.py reads these
            self.state.save(self.progress, {key: part.state_dict() for key, part in parts.items()})

    def leave(self, average: bool) -> None:
        """Print where the stage was stopped, after its state was saved; with `average`, write NAME.average.pt first."""
        if self.processes.first:
            if average:
                save_state(half_state(self.result_so_far().state_dict()), self.folder / f"{self.name}.average.pt")
            print(f"{self.name}: stopped at epoch {self.progress['step'] / self.plan.epoch_steps:.2f} of "
                  f"{self.settings.epochs}, state written to {self.state.folder}; {self.way_on} resumes it", flush=True)


def train(name: str, model: nn.Module, train_data: Images, test_data: Images | None, settings: Settings, folder, *,
          resume: bool = True, start_epoch: float = 0, prepare=lambda model, epoch: None, began=lambda: None,
          save_seconds: float = 60.0, show_seconds: float = 60.0, max_seconds: float = math.inf, later: float = 0,
          **others) -> nn.Module | None:
    """Train `model` in place; return the result (the weight average if there is one), or None if it was stopped.

    start_epoch: epoch at which to begin if there is no saved state, with the given weights and zero momentum
    prepare:   function of (model, epoch counted from 0) that may set modules to train or eval mode. It is called before
               the kernels are chosen, and before the first step that this process makes in each epoch
    began:     function called when everything is checked, before the first step
    save_seconds, show_seconds: time between saves of the state, and between lines of progress; max_seconds: for all
    later:     number of pixels (see Plan) of the stages that follow in this run, to show the time left
    others:    the other fields of Stage: penalty, masks, teachers, context, eval_every, ...
    """
    stage = Stage(name, model, train_data, settings, Path(folder), test=test_data, **others)
    stage.resume(resume, start_epoch)
    began()
    plan, agree, saved = stage.plan, stage.processes.agree, time.monotonic()
    with contextlib.ExitStack() as at_end:
        asked = at_end.enter_context(threads.stop_noted())  # on a signal, finish the step and save the state first
        prepare(model, stage.progress["step"] // plan.epoch_steps)  # kernels depend on the modes of the modules
        at_end.enter_context(stage.fast_kernels())
        while stage.result is None:
            # a stage that was stopped in its last evaluation has made all its steps
            epoch, first = divmod(min(stage.progress["step"], plan.steps - 1), plan.epoch_steps)
            prepare(model, epoch)
            stage.begin(epoch)
            shown = Progress(stage, epoch, show_seconds, later)
            at_end.callback(shown.close)
            for i in range(first, plan.epoch_steps):
                if stage.progress["step"] < plan.steps:
                    stage.step(epoch, i)
                    shown.step(i + 1)
                late = time.monotonic() - stage.started + stage.closing() > max_seconds
                if i + 1 == plan.epoch_steps:
                    shown.close()
                    stage.end(epoch, hurry=signal.SIGINT in asked and stage.progress["step"] < plan.steps)
                pause = agree(bool(asked) or late, stage.device)
                due = pause or agree(time.monotonic() - saved >= save_seconds, stage.device)
                if due and stage.result is None:
                    stage.save()
                    saved = time.monotonic()
                    if pause:
                        stage.leave(average=signal.SIGINT not in asked)
                        return None
    return stage.result
