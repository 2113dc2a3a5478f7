"""Define the settings of a stage, and compute from them the batches, learning rate and image size of every step."""
import dataclasses
import itertools
import math

import torch

from compressed.cifar100 import IMAGE_SIZE
from compressed.command_line import number
from compressed.errors import BadInput
from training.replicas import Processes, shares


STRIDE = 8  # total stride of the network: an 8x8 image ends in feature maps of 1x1


def setting(default, values, text: str):
    """Return a field of Settings. values: its argparse type, or a tuple of its choices; text: its help."""
    return dataclasses.field(default=default, metadata={"values": values, "help": text})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Hold all settings that decide the result of a stage; training/state.py says which of them a resume may change."""
    epochs: int = setting(dataclasses.MISSING, number(int, 1, 10**6), "epochs of a stage")
    batch_size: int = setting(512, number(int, 1, 10**6), "images per step, over all processes")
    optimizer: str = setting("sgd", ("sgd", "adam", "muon"),
                             "Nesterov SGD, momentum 0.9; AdamW; or Muon for convolutions and SGD for the rest")
    turn: float = setting(0.01, number(float, 0, 1),
                          "with muon: angle in radians by which a step turns a convolution's weights, at the peak rate")
    lr: float = setting(0.4, number(float, 0, 100), "peak learning rate")
    schedule: str = setting("cosine", ("cosine", "default", "constant"),
                            "cosine: to zero; default: x0.1 at 1/2 and 3/4; constant: see --cooldown")
    warmup_epochs: float = setting(5, number(float, 0, 10**6), "epochs of linear warm-up, at most a quarter of all")
    cooldown: float = setting(0, number(float, 0, 10**6),
                              "with --schedule constant: last epochs, in which the rate falls linearly to zero")
    weight_decay: float = setting(5e-4, number(float, 0, 1), "weight decay; BatchNorm and biases have none")
    smoothing: float = setting(0.1, number(float, 0, 1), "label smoothing; default with --teacher: 0")
    augment: str = setting("trivial", ("trivial", "plain", "none"),
                           "trivial: TrivialAugment, crop and flip; plain: crop and flip")
    mixing: str = setting("both", ("both", "mixup", "cutmix", "none"), "both: mixup or CutMix, drawn for every image")
    alpha: float = setting(0.3, number(float, 0.01, 1000), "parameter of mixup's Beta distribution")
    clean: float = setting(0.05, number(float, 0, 1), "share of the epochs, at the end, that train without mixing")
    sizes: str = setting("32", str, "image sizes: 24:0.6,32 scales the first 60%% of a stage's batches to 24x24")
    average: float | None = setting(None, number(float, 0, 1),
                                    "decay of the weight average, EMA (default: over 3%% of the steps); 0: no average")
    refresh: int = setting(10_000, number(int, 0, 10**6),
                           "train images to re-estimate BatchNorm statistics from before evaluation; 0: keep them")
    distill: float = setting(0.9, number(float, 0, 1), "weight D of the distillation loss; that of the labels is 1 - D")
    temperature: float = setting(4.0, number(float, 0.01, 1000), "temperature of the distillation")
    teaching: str = setting("turns", ("turns", "mean"),
                            "several teachers: one per step in turn, or the mean of their probabilities")
    seed: int = setting(0, number(int, 0, 2**62), "seed of all random numbers")
    step_rate: float = setting(1e-3, number(float, 0, 1),
                               "Adam's learning rate for trained quantization steps, in octaves, at the peak rate")
    precision: str = "float32"  # of the forward pass: float32 or bfloat16
    compile: bool = False
    workers: int = 1  # threads of a process; each computes a share of the process's batch


def add_precision(parser) -> None:
    """Add --precision to a parser."""
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
                        help="precision of the forward pass; auto: bfloat16 on CUDA and on CPUs that support it")


def precision(option: str, cuda: bool) -> str:
    """Return the precision that --precision names."""
    fast = cuda or torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return option if option != "auto" else "bfloat16" if fast else "float32"


def add_options(parser, names, **defaults) -> None:
    """Add an option for each of these settings. One that is not given is None, or its value in `defaults`."""
    for field in dataclasses.fields(Settings):
        if field.name in names:
            add_option(parser, "--" + field.name.replace("_", "-"), field.name, defaults.get(field.name))


def add_option(parser, option: str, name: str, default=None, text: str | None = None) -> None:
    """Add the option for the setting `name`. text: its help, instead of the setting's own help and default."""
    field = next(field for field in dataclasses.fields(Settings) if field.name == name)
    values = field.metadata["values"]
    shown = field.default if default is None else default
    known = "" if shown in (None, dataclasses.MISSING) else f" ({shown})"
    kind = {"choices": values} if isinstance(values, tuple) else {"type": values, "metavar": name[0].upper()}
    parser.add_argument(option, dest=name, default=default, help=text or field.metadata["help"] + known, **kind)


def given(args) -> dict:
    """Return {setting: value} of all settings whose options were given."""
    names = (field.name for field in dataclasses.fields(Settings))
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def image_sizes(text: str) -> list[tuple[int, float]]:
    """Return [(size, share of the stage at which it ends)] of a schedule of image sizes.

    "24:0.6,32" means 60% of the steps at 24x24, then 32x32. Sizes are multiples of the network's stride, 8. Each but
    the last has a share, and the last is the images' own size, 32. Raises BadInput for anything else.
    """
    try:
        *parts, last = text.split(",")
        parts = [(int(size), float(share)) for size, share in (part.split(":") for part in parts)]
        ends = itertools.accumulate(share for _, share in parts)
        sizes = [(size, end) for (size, _), end in zip(parts, ends)] + [(int(last), 1.0)]
        good = all(size in range(STRIDE, IMAGE_SIZE + 1, STRIDE) for size, _ in sizes) and sizes[-1][0] == IMAGE_SIZE
        good = good and all(share > 0 for _, share in parts) and sum(share for _, share in parts) < 1
    except ValueError:
        good = False
    if not good:
        raise BadInput(f"image sizes {text!r}: expected multiples of 8 up to {IMAGE_SIZE} with their shares of the "
                       f"stage, and {IMAGE_SIZE} at the end, such as 24:0.6,{IMAGE_SIZE}")
    return sizes


def learning_rate(settings: Settings, step: int, steps: int, epoch_steps: int) -> float:
    """Return the learning rate of a step (0 to steps - 1): linear warm-up, then the schedule over the other steps."""
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
    """Return True if, after warm-up, the learning rate was constant up to `step` under these settings of a state."""
    epochs, cooldown = settings.get("epochs"), settings.get("cooldown", 0)
    if settings.get("schedule") != "constant" or type(epochs) is not int or type(cooldown) not in (int, float):
        return False
    return step <= (epochs - cooldown) * epoch_steps


class Plan:
    """Compute batches, learning rates and image sizes of all steps of a stage.

    mine:        slice of a batch that this process trains on; shares: slices of `mine`, one for each worker.
    epoch_steps, steps: number of steps of an epoch and of the stage. Images that do not fill a batch are left out; each
                 epoch has another order.
    lrs, sizes:  learning rate and image size of every step.
    updates:     set of the steps at which the penalty is updated.

    Raises BadInput for batches that cannot be divided or trained on.
    """

    def __init__(self, settings: Settings, images: int, processes: Processes, updates: int):
        self.settings = settings
        self.batch_size = min(settings.batch_size, images)
        if self.batch_size % processes.count or settings.epochs < 1 or self.batch_size < 1:
            raise BadInput(f"batch size {self.batch_size} and {settings.epochs} epochs: expected at least one epoch "
                           f"and a batch that {processes.count} process(es) can share equally")
        share = self.batch_size // processes.count
        if processes.count > 1 and settings.mixing != "none" and share % 2:
            raise BadInput(f"each process gets {share} images of a batch: mixing pairs neighbours, so it must be even")
        self.mine = slice(processes.rank * share, (processes.rank + 1) * share)
        self.shares = shares(share, settings.workers)
        smallest = min(size for size, _ in image_sizes(settings.sizes))
        if share == 1 and smallest < 2 * STRIDE:
            raise BadInput(f"a batch of one image at {smallest}x{smallest}: the last maps have one value a channel, "
                           "and BatchNorm no variance; give a larger --batch-size or other --sizes")
        self.epoch_steps = images // self.batch_size
        self.steps = settings.epochs * self.epoch_steps
        self.lrs = [learning_rate(settings, step, self.steps, self.epoch_steps) for step in range(self.steps)]
        by_share = image_sizes(settings.sizes)
        self.sizes = [next(size for size, end in by_share if step < end * self.steps) for step in range(self.steps)]
        self.updates = {round(i * self.steps / updates) for i in range(updates)}

    def mixing(self, epoch: int) -> str:
        """Return how images are mixed in an epoch: as the settings say, or "none" in the last ones (see `clean`)."""
        last = round(self.settings.clean * self.settings.epochs)
        return "none" if epoch >= self.settings.epochs - last else self.settings.mixing

    def work(self, step: int = 0) -> int:
        """Return the number of pixels in all steps from this one on. The time of a step is proportional to its pixels.
        """
        return self.batch_size * sum(size**2 for size in self.sizes[step:])

    def work_of(self, step: int) -> int:
        """Return the number of pixels in one step."""
        return self.batch_size * self.sizes[step] ** 2
