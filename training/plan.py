"""What a stage is to do: its settings, and what follows from them for every step."""
import dataclasses
import itertools
import math

from compressed.cifar100 import IMAGE_SIZE
from compressed.command_line import number
from compressed.errors import BadInput
from training.replicas import Processes, shares


STRIDE = 8  # of the network: an image of 8x8 has a last map of one value


def setting(default, values, text: str):
    """A field of Settings. values: the function that reads it from a command line, or a tuple of all that it may be."""
    return dataclasses.field(default=default, metadata={"values": values, "help": text})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the result of a stage. A state is only resumed under equal settings (but see training/state.py)."""
    epochs: int = setting(dataclasses.MISSING, number(int, 1, 10**6), "of a stage")
    batch_size: int = setting(512, number(int, 1, 10**6), "images a step, of all processes together")
    optimizer: str = setting("sgd", ("sgd", "adam", "muon"),
                             "Nesterov SGD, momentum 0.9; AdamW; or Muon for convolutions and SGD for the rest")
    turn: float = setting(0.01, number(float, 0, 1),
                          "with muon: radians that a step turns a convolution's weights by, at the peak learning rate")
    lr: float = setting(0.4, number(float, 0, 100), "peak learning rate")
    schedule: str = setting("cosine", ("cosine", "default", "constant"),
                            "cosine to zero; default: x0.1 at 1/2 and 3/4; constant, and --cooldown")
    warmup_epochs: float = setting(5, number(float, 0, 10**6), "linear warm-up, a quarter of the stage at most")
    cooldown: float = setting(0, number(float, 0, 10**6),
                              "with constant: epochs at the end in which it falls linearly to zero")
    weight_decay: float = setting(5e-4, number(float, 0, 1), "none on BatchNorm and biases")
    smoothing: float = setting(0.1, number(float, 0, 1), "of the labels; by default none beside a teacher")
    augment: str = setting("trivial", ("trivial", "plain", "none"),
                           "TrivialAugment, crop and flip; crop and flip; nothing")
    mixing: str = setting("both", ("both", "mixup", "cutmix", "none"), "both: a draw for every image")
    alpha: float = setting(0.3, number(float, 0.01, 1000), "of mixup's Beta distribution")
    clean: float = setting(0.05, number(float, 0, 1), "share of the epochs, at the end, without mixing")
    sizes: str = setting("32", str, "image sizes by share of a stage: 24:0.6,32 scales 60%% of the batches to 24x24")
    average: float | None = setting(None, number(float, 0, 1),
                                    "decay of the weight average a step (a memory of 3%% of the steps); 0: none")
    refresh: int = setting(10_000, number(int, 0, 10**6),
                           "train images that renew the BatchNorm statistics of a result; 0: none")
    distill: float = setting(0.9, number(float, 0, 1), "the teachers' weight in the loss")
    temperature: float = setting(4.0, number(float, 0.01, 1000), "of the distillation")
    teaching: str = setting("turns", ("turns", "mean"),
                            "several teachers: one a step in turn, or the mean of their probabilities")
    seed: int = setting(0, number(int, 0, 2**62), "of everything that is drawn")
    step_rate: float = setting(1e-3, number(float, 0, 1),
                               "of trained steps of grids: octaves that Adam moves one at a time, at the peak rate")
    precision: str = "float32"  # of the forward pass: float32 or bfloat16
    compile: bool = False
    workers: int = 1  # threads of a process, each with a share of its batch


def add_options(parser, names, **defaults) -> None:
    """An option for each of these settings, None where it is not given and `defaults` has no other default."""
    for field in dataclasses.fields(Settings):
        if field.name in names:
            add_option(parser, "--" + field.name.replace("_", "-"), field.name, defaults.get(field.name))


def add_option(parser, option: str, name: str, default=None, text: str | None = None) -> None:
    """The option for the setting `name`. text: its help, in place of the setting's own and its default."""
    field = next(field for field in dataclasses.fields(Settings) if field.name == name)
    values = field.metadata["values"]
    shown = field.default if default is None else default
    known = "" if shown in (None, dataclasses.MISSING) else f" ({shown})"
    kind = {"choices": values} if isinstance(values, tuple) else {"type": values, "metavar": name[0].upper()}
    parser.add_argument(option, dest=name, default=default, help=text or field.metadata["help"] + known, **kind)


def given(args) -> dict:
    """{setting: value} of all whose options were given."""
    names = (field.name for field in dataclasses.fields(Settings))
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def image_sizes(text: str) -> list[tuple[int, float]]:
    """[(size, until what share of the stage)] of a schedule such as "24:0.6,32": 60% of the steps at 24x24, then 32x32.

    Sizes are multiples of the network's stride, 8; each but the last has a share, and the last is the images' own size,
    32. Raises BadInput for anything else.
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
    """Whether the rate has been constant, but for the warm-up, before this step, under a state's settings."""
    epochs, cooldown = settings.get("epochs"), settings.get("cooldown", 0)
    if settings.get("schedule") != "constant" or type(epochs) is not int or type(cooldown) not in (int, float):
        return False
    return step <= (epochs - cooldown) * epoch_steps


class Plan:
    """Batches, learning rates and image sizes of a stage, step by step.

    mine: this process's slice of a batch; shares: slices of that, one for each worker. epoch_steps, steps: of an epoch,
    of the stage (what does not fill a batch waits for another epoch's order). lrs, sizes: of every step. updates: the
    steps at which the penalty is updated. Raises BadInput for batches that cannot be.
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
        """How images are mixed in an epoch: not at all in the last ones."""
        last = round(self.settings.clean * self.settings.epochs)
        return "none" if epoch >= self.settings.epochs - last else self.settings.mixing

    def work(self, step: int = 0) -> int:
        """Return the pixels of all images of the steps from this one on: what a step costs is in proportion."""
        return self.batch_size * sum(size**2 for size in self.sizes[step:])

    def work_of(self, step: int) -> int:
        """Return the pixels of one step."""
        return self.batch_size * self.sizes[step] ** 2
