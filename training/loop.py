"""Train a network: the one loop of all stages, with schedule, weight average (EMA), evaluation, saving and resuming.

The stages (dense, reweighted, masked, quantized) differ in the arguments that they pass to `train`, not in the loop.
All random numbers of a step follow from (seed, stage, step), and its learning rate from the step alone. So the state of
a run is its tensors and the number of steps made: a run that is killed at any moment resumes from its last saved state,
and on a CPU the result is the same to the last bit.
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
from compressed.evaluation import evaluate
from compressed.files import load_lines, save_text, to_json
from compressed.graph import weight_layers
from compressed.networks import half_state, save_state
from training import augmentation
from training.batchnorm import renew_statistics
from training.cpu_kernels import fast_on_a_cpu
from training.cuda_graphs import Graphs
from training.gpu_kernels import fast_on_a_gpu
from training.muon import Muon
from training.plan import Plan, Settings, constant_so_far
from training.progress import Progress, describe
from training.replicas import Processes, Replicas
from training.state import State, brief, fingerprint, stop_noted


def save_half(model: nn.Module, path) -> None:
    """Write the model's state dict in float16 where that is exact enough for another stage to start from."""
    save_state(half_state(model.state_dict()), path)


def train(name: str, model: nn.Module, train_data: cifar100.Images, test_data: cifar100.Images | None,
          settings: Settings, folder, *, penalty=None, penalty_updates: int = 5, masks=None, teachers=(),
          prepare=lambda model, epoch: None, context: dict | None = None, resume: bool = True, start_epoch: float = 0,
          eval_every: int = 1, save_seconds: float = 60.0, show_seconds: float = 60.0, max_seconds: float = math.inf,
          later: float = 0, processes: Processes = Processes(), began=lambda: None,
          watch=None) -> nn.Module | None:
    """Train `model` in place; return the result (the weight average if there is one), or None if it was stopped.

    name:     name of the stage. Its files: FOLDER/NAME.jsonl (one line per epoch), FOLDER/NAME.state/ (while it runs)
              and, after a stop, FOLDER/NAME.average.pt (float16: the result as if the stage had ended there).
    penalty:  a Penalty (penalties.py) on `model`, updated `penalty_updates` times at equal distances.
    masks:    Masks on `model`, applied after every step and checked before anything is written.
    teachers: models in eval mode. Their logits for the same mixed images, always at 32x32, are distilled.
    prepare:  function of (model, epoch from 0), called before each epoch's first step; it may set train or eval modes.
    context:  further plain values that decide the result. A state is resumed only if they are equal.
    start_epoch: epoch at which to begin if there is no saved state, with the given weights and zero momentum.
    later:    work (see Plan.work) of the stages that follow in this run; it is needed to show the time left.
    began:    function called when everything is checked, before the first step.
    watch:    an object of which step() is called after every step, and record() gives more figures of an epoch's log.
    """
    stage = Stage(name, model, train_data, settings, Path(folder), penalty, penalty_updates, masks, teachers, context,
                  processes, watch)
    stage.resume(resume, start_epoch)
    began()
    plan, saved = stage.plan, time.monotonic()
    with contextlib.ExitStack() as at_end:
        asked = at_end.enter_context(stop_noted())  # on a signal, the step is finished and the state saved first
        at_end.enter_context(stage.fast_kernels())
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
                late = stage.seconds_here() + stage.closing(test_data) > max_seconds
                pause = processes.agree(bool(asked) or late, stage.device)
                if i + 1 == plan.epoch_steps:
                    shown.close()
                    hurry = signal.SIGINT in asked and stage.progress["step"] < plan.steps
                    stage.end(epoch, None if hurry else test_data, eval_every)
                due = pause or processes.agree(time.monotonic() - saved >= save_seconds, stage.device)
                if due and stage.result is None:
                    stage.save()
                    saved = time.monotonic()
                    if pause:
                        stage.leave(average=signal.SIGINT not in asked)
                        return None
    return stage.result


class Stage:
    """Hold a running stage: the model, its optimizer, average, penalty, masks and teachers, and its progress."""

    def __init__(self, name, model, data, settings, folder, penalty, penalty_updates, masks, teachers, context,
                 processes, watch=None):
        self.name, self.model, self.data, self.settings, self.folder = name, model, data, settings, folder
        self.penalty, self.masks, self.teachers = penalty, masks, list(teachers)
        self.processes, self.watch = processes, watch
        self.penalty_in_loss = penalty is not None and penalty.in_loss
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
            data=fingerprint([data.images, data.labels]),  # the same number of other images is another run
            data_set=str(data.data_set),
            penalty=None if penalty is None else penalty.options() | {"updates": penalty_updates},
            masks=None if masks is None else fingerprint(masks.factors),
            teacher=teachers and fingerprint(v for each in self.teachers for v in each.state_dict().values()) or None)
        # dynamic=False: a stage has few image sizes, and kernels compiled for one size are faster
        self.stepped = [torch.compile(model, dynamic=False) if settings.compile else model, *self.replicas.models[1:]]
        # a CUDA graph can only record work on the device: no other process, and the learning rate in a tensor
        recordable = (self.device.type == "cuda" and processes.count == 1 and not self.penalty_in_loss
                      and settings.optimizer != "adam")
        self.graphs = Graphs(self.learn_on_one, self.device) if recordable else None
        self.rates = {}  # {factor: tensor on the device that holds the learning rate times this factor}
        self.result = None  # the finished model
        self.so_far = None  # (step, the model that the stage would return if it ended there)
        self.pace = math.inf  # seconds that the fastest step took, for each pixel of this process
        self.measured = 0.0  # seconds that the last evaluation took, the BatchNorm statistics included
        self.first_steps = 0  # steps made by this process since it started

    @contextlib.contextmanager
    def fast_kernels(self):
        """Use the project's own kernels for this device within the block, see cpu_kernels and gpu_kernels."""
        with contextlib.ExitStack() as at_end:
            if self.device.type == "cpu":
                for replica in self.replicas.models:
                    at_end.enter_context(fast_on_a_cpu(replica))
            if self.device.type == "cuda":
                plan, sizes = self.plan, set(self.plan.sizes[self.progress["step"]:])
                at_end.enter_context(fast_on_a_gpu(
                    self.model, sorted(sizes), batch=len(range(plan.batch_size)[plan.mine]), device=self.device,
                    dtype=getattr(torch, self.settings.precision), compiled=self.settings.compile,
                    captured=self.graphs is not None))
            yield

    # -- resume, save, stop

    def resume(self, wanted: bool, start_epoch: float) -> None:
        """Resume the state in the folder; if there is none, begin at `start_epoch`. Raises BadInput if it does not fit.
        """
        steps, log_path = self.plan.epoch_steps, self.folder / f"{self.name}.jsonl"
        self.progress = {"step": round(start_epoch * steps), "loss": 0.0, "correct": 0.0, "seconds": 0.0, "log": []}
        self.way_on = "the same command" + " without --no-resume" * (not wanted)
        if not wanted and self.processes.first:
            self.state.remove()
        found = self.state.load(self.device, functools.partial(constant_so_far, epoch_steps=steps)) if wanted else None
        if found:
            self.progress, contents = found
            try:
                for key, part in self.parts.items():
                    part.load_state_dict(contents[key])
            except (KeyError, RuntimeError, ValueError) as error:
                raise BadInput(f"{self.state.folder} holds the state of another network ({brief(error)}); --no-resume "
                               "starts the stage again") from error
        elif self.progress["step"] and log_path.is_file():
            self.progress["log"] = [line for line in load_lines(log_path) if line["step"] <= self.progress["step"]]
        step, epochs = self.progress["step"], self.settings.epochs
        if not found:
            self.plan.updates.add(step)  # a stage that begins in its middle needs the penalty's weights at once
        if step >= self.plan.steps:
            raise BadInput(f"{self.name}: cannot resume at epoch {step / steps:g}: the stage has {epochs}")
        if step and self.processes.first:
            print(f"{self.name}: resumes at epoch {step // steps + 1} of {epochs}", flush=True)
        # Sums of loss and accuracy over the epoch's steps stay on the device, because reading them waits for it.
        # The saved ones are sums over all processes, so each process resumes with its share.
        sums = [self.progress["loss"], self.progress["correct"]]
        self.totals = torch.tensor(sums, dtype=torch.float64, device=self.device) / self.processes.count
        self.before, self.started = self.progress["seconds"], time.monotonic()
        self.model.train()

    def seconds_here(self) -> float:
        return time.monotonic() - self.started

    def closing(self, test_data) -> float:
        """Return about how many seconds it takes to re-estimate BatchNorm statistics and to evaluate.

        As long as it took the last time; before that, an image is taken to need half of its time in the fastest
        training step so far, which has a backward pass, too.
        """
        images = self.settings.refresh + (0 if test_data is None else len(test_data))
        return self.measured or images * cifar100.IMAGE_SIZE**2 * self.pace / 2

    def read_totals(self) -> list[float]:
        """Return the epoch's sums of loss and accuracy over all processes. Raises BadInput if the loss is not finite.
        """
        totals = self.totals.clone()
        self.processes.add([totals])
        loss, correct = totals.tolist()
        if not math.isfinite(loss):
            epoch = self.progress["step"] // self.plan.epoch_steps + 1
            raise BadInput(f"{self.name}: the loss is not finite in epoch {epoch}; lower --lr (the last state is kept)")
        return [loss, correct]

    def save(self) -> None:
        """Write the state, after a check of the masks."""
        self.progress["loss"], self.progress["correct"] = self.read_totals()
        self.progress["seconds"] = self.before + self.seconds_here()
        self.check_masks(self.model, self.average)
        if self.processes.first:
            self.state.save(self.progress, {key: part.state_dict() for key, part in self.parts.items()})

    def check_masks(self, *models) -> None:
        """Raise AssertionError if a masked weight of one of the models is not zero."""
        for model in models:
            if self.masks is not None and model is not None:
                self.masks.check(model)

    def leave(self, average: bool) -> None:
        """Print where the stage was stopped, after its state was saved; with `average`, write NAME.average.pt first."""
        if self.processes.first:
            if average:
                save_half(self.result_so_far(), self.folder / f"{self.name}.average.pt")
            print(f"{self.name}: stopped at epoch {self.progress['step'] / self.plan.epoch_steps:.2f} of "
                  f"{self.settings.epochs}, state written to {self.state.folder}; {self.way_on} resumes it", flush=True)

    # -- the method

    def begin(self, epoch: int) -> None:
        """Prepare an epoch: bring the replicas up to date and draw the order of the images."""
        self.replicas.follow()
        order = augmentation.epoch_order(len(self.data), generator_for(self.settings.seed, self.name, "order", epoch))
        self.order = order.to(self.device)

    def step(self, epoch: int, i: int) -> None:
        """Make step i of an epoch: gradients of all shares, optimizer, penalty, masks, weight average."""
        plan, settings, step, began = self.plan, self.settings, epoch * self.plan.epoch_steps + i, time.monotonic()
        lr = plan.lrs[step]
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(lr, group.get("factor", 1.0))
        if self.penalty is not None and step in plan.updates:
            self.penalty.update(sum(plan.lrs[step:]))
        index = self.order[i * plan.batch_size:(i + 1) * plan.batch_size][plan.mine]
        draws = augmentation.draw(plan.batch_size, generator_for(settings.seed, self.name, "step", step),
                              crop=settings.augment != "none", trivial=settings.augment == "trivial",
                              mixing=plan.mixing(epoch), mixup_alpha=settings.alpha)[plan.mine]
        kind = self.teacher_of(step), plan.sizes[step]
        if self.graphs is None:
            self.learn(lambda k: self.batch(index[plan.shares[k]], draws[plan.shares[k]]), kind)
        else:
            self.graphs.step(kind, self.batch(index, draws))
        if self.penalty is not None:
            self.penalty.after_step(lr)
        if self.masks is not None:
            self.masks.apply()
        if self.average is not None:
            update_average(*self.averaged, average_decay(settings, step))
        if self.watch is not None:
            self.watch.step()
        self.progress["step"] = step + 1
        self.pace = min(self.pace, (time.monotonic() - began) / plan.work_of(step) * self.processes.count)

    def rate(self, lr: float, factor: float):
        """Return lr * factor: a number, or with CUDA graphs always the same tensor, because a graph reads its address.
        """
        if self.graphs is None:
            return lr * factor
        if factor not in self.rates:
            self.rates[factor] = torch.zeros((), device=self.device)
        return self.rates[factor].fill_(lr * factor)

    def batch(self, index, draws) -> tuple:
        """Return (mixed images, labels, labels of the mixing partners, lam); see augmentation.augment."""
        x, *others = augmentation.augment(self.data.images[index], self.data.labels[index], draws)
        return x.contiguous(memory_format=torch.channels_last), *others

    def learn(self, batch, kind) -> None:
        """Compute the gradients of every share k from batch(k), then make the optimizer's step.

        kind: (index of the teacher or None, image size), see `gradients`.
        """
        for replica in self.replicas.models:
            replica.zero_grad(set_to_none=True)
        self.totals += sum(threads.in_threads(lambda k: self.gradients(k, *batch(k), *kind), range(len(self.stepped))))
        self.replicas.gather(self.processes)
        if self.penalty_in_loss:
            self.penalty.loss().backward()
        self.optimizer.step()

    def learn_on_one(self, inputs, kind) -> None:
        self.learn(lambda k: inputs, kind)

    def gradients(self, k: int, x, labels, others, lam, teacher: int | None, size: int):
        """Run forward and backward of share k in its replica; return its part of the batch's mean [loss, accuracy].

        teacher: index of the one to distil from; None: all of them.
        """
        settings, weight = self.settings, len(x) / self.plan.batch_size
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            with torch.no_grad():
                taught = [each(x).float() for each in (self.teachers if teacher is None else [self.teachers[teacher]])]
            logits = self.stepped[k](resized(x, size)).float()
        loss = objective = mixed_cross_entropy(logits, labels, others, lam, settings.smoothing)
        if taught:
            apart = distillation(logits, taught, settings.temperature)
            objective = (1 - settings.distill) * loss + settings.distill * apart
        (weight * objective).backward()
        with torch.no_grad():
            target = torch.where(lam >= 0.5, labels, others)
            return weight * torch.stack([loss.detach().double(), (logits.argmax(1) == target).double().mean()])

    def teacher_of(self, step: int) -> int | None:
        """Return the index of the teacher of a step; None if all of them teach, or there is none."""
        return step % len(self.teachers) if self.teachers and self.settings.teaching == "turns" else None

    def end(self, epoch: int, test_data, eval_every: int) -> None:
        """Write and print an epoch's log line, with the test accuracy if it is due; after the last, set `result`."""
        plan, step = self.plan, self.progress["step"]
        loss, correct = self.read_totals()
        record = {"stage": self.name, "epoch": epoch + 1, "step": step, "lr": plan.lrs[step - 1],
                  "size": plan.sizes[step - 1],
                  "loss": round(loss / plan.epoch_steps, 6), "accuracy": round(correct / plan.epoch_steps, 6),
                  "zeros": count_zeros(self.model),
                  "weights": sum(module.weight.numel() for _, module in weight_layers(self.model))}
        self.totals.zero_()
        last, began = step == plan.steps, time.monotonic()
        if last:
            self.result = self.finish(self.model if self.average is None else self.average)
            self.check_masks(self.result)
        if test_data is not None and (last or eval_every and (epoch + 1) % eval_every == 0):
            with contextlib.suppress(KeyboardInterrupt):  # stop_noted keeps it; the line is written without accuracy
                try:
                    test_loss, right = evaluate(self.result or self.result_so_far(), test_data)
                except BadInput as error:  # the average's loss is not finite, though the epoch's was
                    raise BadInput(f"{self.name}: {error}; lower --lr (the last state is kept)") from error
                record |= {"test_loss": test_loss, "test_accuracy": right / len(test_data)}
                self.measured = time.monotonic() - began
        for figures in (self.penalty, self.watch):
            record |= figures.record() if figures is not None else {}
        where = f"{self.processes.count} x {len(plan.shares)} {self.device.type}, {self.settings.precision}"
        record |= {"where": where, "seconds": round(self.before + self.seconds_here(), 1)}
        self.progress["log"].append(record)
        if self.processes.first:
            save_text("".join(to_json(line) + "\n" for line in self.progress["log"]),
                      self.folder / f"{self.name}.jsonl")
            print(describe(record, self.settings), flush=True)

    def result_so_far(self) -> nn.Module:
        """Return a copy of the model that the stage would return if it ended now; do not change it."""
        step = self.progress["step"]
        if self.so_far is None or self.so_far[0] != step:
            self.so_far = step, self.finish(copy.deepcopy(self.model if self.average is None else self.average))
        return self.so_far[1]

    @torch.no_grad()
    def finish(self, result: nn.Module) -> nn.Module:
        """Turn the weight average (or the model itself) into the stage's result, in place; return it in eval mode.

        It gets the model's zeros, and BatchNorm statistics re-estimated for its weights.
        """
        if result is not self.model:  # a weight that became zero is only nearly zero in the average
            for (_, ours), (_, theirs) in zip(weight_layers(result), weight_layers(self.model)):
                ours.weight.mul_(theirs.weight != 0)
        if self.settings.refresh:
            renew_statistics(result, self.data, self.settings.refresh, self.settings.augment,
                             generator_for(self.settings.seed, self.name, "refresh"))
        return result.eval()


def make_optimizer(settings: Settings, model: nn.Module, masks=None):
    """Return the optimizer of a model's weights. If quantization steps are trained too, Adam is added for those.

    Weight decay acts on the weights of convolutions and the linear layer, not on BatchNorm, biases and steps.
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
    """Combine several optimizers behind the interface of one."""

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
    """Return the optimizer that the settings name, for these parameters."""
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
    """Return a CPU generator seeded by a hash of the seed and the names, such as (stage, "step", 7)."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def averaged(model: nn.Module) -> list:
    """Return the tensors of a model that the weight average covers: parameters and BatchNorm statistics."""
    return [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]


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


def resized(x, size: int):
    """Return a batch of normalised images scaled to size x size, with antialiasing."""
    if size == x.shape[-1]:
        return x
    x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
    return x.contiguous(memory_format=torch.channels_last)


def mixed_cross_entropy(logits, labels, others, lam, smoothing):
    """Return the batch's mean of lam CE(label) + (1 - lam) CE(partner's label); every image has its own lam."""
    first = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    second = F.cross_entropy(logits, others, reduction="none", label_smoothing=smoothing)
    return (lam * first + (1 - lam) * second).mean()


def distillation(logits, taught: list, temperature: float):
    """Return T^2 KL(mean of the teachers || student), all softened by the temperature T (Hinton et al. 2015)."""
    target = sum((each / temperature).softmax(1) for each in taught) / len(taught)
    return F.kl_div(F.log_softmax(logits / temperature, 1), target, reduction="batchmean") * temperature**2


def count_zeros(model: nn.Module) -> int:
    """Return the number of zeros among the weights of all convolutions and the linear layer."""
    return sum(int((module.weight == 0).sum()) for _, module in weight_layers(model))
