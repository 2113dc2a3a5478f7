"""The settings of a stage, and what they give each of its steps: images, learning rate, image size."""
import argparse
import dataclasses
import itertools
import math

import torch

from compressed import environment, threads
from compressed.cifar100 import IMAGE_SIZE
from compressed.command_line import number, option_name
from compressed.errors import BadInput
from training.replicas import Processes, shares

# {option of the submission: the same setting here}
SUBMISSIONS = {"epoch": "epochs", "optmzr": "optimizer", "lr-scheduler": "schedule", "smooth-eps": "smoothing"}
ADAM_LR = 1e-3  # default of --lr with --optimizer adam
TEACHING = ("distill", "temperature", "teaching")  # settings of distillation
LEAST_SHARE = 16  # images of a batch for a worker, by default
STRIDE = 8  # total stride of the network: the last feature maps of an 8x8 image are 1x1


def sizes_text(text: str) -> str:
    """Return the text of --sizes: an argparse type that refuses what `image_sizes` does."""
    try:
        image_sizes(text)
    except BadInput as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def setting(default, values, text: str):
    """Return a field of Settings with its command-line option. values: a tuple of choices, or the argparse type."""
    return dataclasses.field(default=default, metadata={"values": values, "help": text})


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings that decide the result of a stage. Raises BadInput for a value that is not a valid choice.

    training/state.py says which of them may change when a stage is resumed.
    """
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
    clean: float = setting(0.05, number(float, 0, 1), "share of the epochs, at the end, without mixing")
    sizes: str = setting(str(IMAGE_SIZE), sizes_text,
                         "image sizes: 24:0.6,32 scales the first 60%% of a stage's batches to 24x24")
    average: float | None = setting(None, number(float, 0, 1),
                                    "decay of the weight average (EMA); 0: none (default: over the last 3%% of the "
                                    "steps so far)")
    refresh: int = setting(10_000, number(int, 0, 10**6),
                           "train images to re-estimate BatchNorm statistics from before evaluation; 0: keep them")
    distill: float = setting(0.9, number(float, 0, 1), "weight D of the distillation loss; that of the labels is 1 - D")
    temperature: float = setting(4.0, number(float, 0.01, 1000), "temperature of the distillation")
    teaching: str = setting("turns", ("turns", "mean"),
                            "several teachers: one per step in turn, or the mean of their probabilities")
    seed: int = setting(0, number(int, 0, 2**62), "seed of all random numbers")
    step_rate: float = setting(1e-3, number(float, 0, 1),
                               "peak learning rate of Adam for trained quantization steps: for their base-2 exponents")
    precision: str = "float32"  # of the forward pass: float32 or bfloat16
    workers: int = 1  # threads of a process, each of which computes a share of its batch
    graphs: bool = True  # steps are recorded as CUDA graphs, where that is possible

    def __post_init__(self):
        for name, field in FIELDS.items():
            values, value = field.metadata.get("values"), getattr(self, name)
            if isinstance(values, tuple) and value not in values:
                raise BadInput(f"unknown {name} {value!r}; known: {', '.join(values)}")


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}


def add_precision(parser) -> None:
    """Add --precision to a parser."""
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
                        help="precision of the forward pass; auto: bfloat16 on CUDA and on CPUs that support it")


def add_machine(parser) -> None:
    """Add --precision and --graphs to a parser."""
    add_precision(parser)
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True, help="on CUDA, record the "
                        "steps as CUDA graphs (default); --no-graphs is for networks that wait for the device, or "
                        "decide in Python what a step does")


def without_effect(settings: Settings, teachers) -> dict[str, str]:
    """Return {option: what it needs, in words} of the settings that have no effect with the others."""
    needs = {"turn": ("--optimizer muon", settings.optimizer == "muon"),
             **dict.fromkeys(TEACHING, ("--teacher", teachers)),
             "alpha": ("mixup", settings.mixing in ("both", "mixup")), "clean": ("mixing", settings.mixing != "none")}
    return {name: need for name, (need, there) in needs.items() if not there}


def precision(option: str, cuda: bool) -> str:
    """Return the precision that --precision names."""
    fast = cuda or torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return option if option != "auto" else "bfloat16" if fast else "float32"


def default_workers(batch_size: int) -> int:
    """Return the number of workers of a process on a CPU: one for each core, if each has LEAST_SHARE images of a batch.

    Every share is normalised by its own statistics, which would be poor ones on a machine with many cores.
    """
    return max(1, min(threads.cores(), batch_size // (LEAST_SHARE * environment.processes()[1])))


def on_device(settings: Settings, args, device: torch.device) -> Settings:
    """Return the settings with the precision and the number of workers for a device, as the options say."""
    cuda = device.type == "cuda"
    workers = 1 if cuda else getattr(args, "workers", None) or default_workers(settings.batch_size)
    return dataclasses.replace(settings, precision=precision(args.precision, cuda), workers=workers)


def add_options(parser, names, **defaults) -> None:
    """Add the options of these settings. One that is not given is None, or its value in `defaults`."""
    for name in FIELDS:
        if name in names:
            add_option(parser, option_name(name), name, defaults.get(name))


def add_option(parser, option: str, name: str, default=None, text: str | None = None) -> None:
    """Add an option for the setting `name`. text: its help, instead of that of the setting with its default."""
    values, shown = FIELDS[name].metadata["values"], FIELDS[name].default if default is None else default
    known = "" if shown in (None, dataclasses.MISSING) else f" ({shown})"
    kind = {"choices": values} if isinstance(values, tuple) else {"type": values, "metavar": name[0].upper()}
    parser.add_argument(option, dest=name, default=default, help=text or FIELDS[name].metadata["help"] + known, **kind)


def given(args) -> dict:
    """Return {setting: value} of the settings whose options were given."""
    return {name: getattr(args, name) for name in FIELDS if getattr(args, name, None) is not None}


def image_sizes(text: str) -> list[tuple[int, float]]:
    """Return [(image size, share of the stage's steps at which it ends)] of a value of --sizes.

    "24:0.6,32" means 60% of the steps at 24x24 and the others at 32x32. Sizes are multiples of the network's stride,
    the last one that of the images. Raises BadInput for anything else.
    """
    sizes, end = [], 0.0
    try:
        *parts, last = text.split(",")
        for size, share in (part.split(":") for part in parts):
            end += float(share)
            sizes.append((int(size), end))
        sizes.append((int(last), 1.0))
    except ValueError:
        sizes = [(0, 0.0)]
    ends = [0.0, *(end for _, end in sizes)]
    if (any(size not in range(STRIDE, IMAGE_SIZE + 1, STRIDE) for size, _ in sizes) or sizes[-1][0] != IMAGE_SIZE
            or not all(start < end for start, end in itertools.pairwise(ends))):
        raise BadInput(f"image sizes {text!r}: expected multiples of {STRIDE} up to {IMAGE_SIZE} with their shares of "
                       f"the stage, and {IMAGE_SIZE} at the end, such as 24:0.6,{IMAGE_SIZE}")
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
    cooldown = round(settings.cooldown * epoch_steps)
    return settings.lr * min(1, (steps - step) / (cooldown + 1))


def constant_so_far(settings: dict, step: int, epoch_steps: int) -> bool:
    """Return True if, after warm-up, the learning rate was constant up to `step` under the settings in a state."""
    try:
        constant_epochs = settings["epochs"] - settings.get("cooldown", 0)
        return settings["schedule"] == "constant" and step <= constant_epochs * epoch_steps
    except (KeyError, TypeError):  # a damaged file
        return False


class Plan:
    """The batches, learning rates and image sizes of all steps of a stage.

    mine:        slice of a batch on which this process trains; shares: one slice of `mine` for each worker
    least:       images of the smallest share, 2 at most
    epoch_steps: steps of an epoch; a last partial batch is left out, with other images in each epoch
    steps:       steps of the stage
    lrs, sizes:  learning rate and image size of every step
    pixels:      number of pixels of every step, to which the time that it takes is proportional

    Raises BadInput for batches that cannot be divided or trained on, and for a cooldown that the stage cannot have.
    """

    def __init__(self, settings: Settings, images: int, processes: Processes):
        self.settings, by_share = settings, image_sizes(settings.sizes)
        self.batch_size = min(settings.batch_size, images)
        if self.batch_size % processes.count or settings.epochs < 1 or self.batch_size < 1:
            raise BadInput(f"batch size {self.batch_size} and {settings.epochs} epochs: expected at least one epoch "
                           f"and a batch that {processes.count} process(es) can share equally")
        if settings.cooldown and settings.schedule != "constant":
            raise BadInput("--cooldown belongs to --schedule constant")
        if settings.cooldown > settings.epochs:
            raise BadInput(f"--cooldown {settings.cooldown:g}: the stage has {settings.epochs} epochs")
        share, smallest = self.batch_size // processes.count, min(size for size, _ in by_share)
        if processes.count > 1 and settings.mixing != "none" and share % 2:
            raise BadInput(f"each process gets {share} images of a batch: mixing pairs neighbours, so it must be even")
        if share == 1 and smallest < 2 * STRIDE:
            raise BadInput(f"a batch of one image at {smallest}x{smallest}: the last maps have one value a channel, "
                           "and BatchNorm no variance; give a larger --batch-size or other --sizes")
        self.mine = slice(processes.rank * share, (processes.rank + 1) * share)
        self.shares = shares(share, settings.workers)
        self.least = min(2, *(part.stop - part.start for part in self.shares))
        self.epoch_steps = images // self.batch_size
        self.steps = settings.epochs * self.epoch_steps
        self.lrs = [learning_rate(settings, step, self.steps, self.epoch_steps) for step in range(self.steps)]
        self.sizes = [next(size for size, end in by_share if step < end * self.steps) for step in range(self.steps)]
        self.sizes[-1] = by_share[-1][0]  # however few steps there are
        self.pixels = [self.batch_size * size**2 for size in self.sizes]

    def mixing(self, epoch: int) -> str:
        """Return how images are mixed in an epoch: as the settings say, or "none" in the last ones (see `clean`)."""
        last = round(self.settings.clean * self.settings.epochs)
        return "none" if epoch >= self.settings.epochs - last else self.settings.mixing
