"""Compare the training speed of training/loop.py with that of an ordinary PyTorch loop ("plain"), in one run.

    python -m benchmarks.training_speed [--images N] [--batch-size B] [--rounds 3] [--workers W] [--alone] [--json F]
    python -m benchmarks.training_speed --fine-tuning      compares fine-tuning on the grids with masked training

The plain loop has a DataLoader with --workers processes, torchvision's crop, flip and normalisation, NCHW float32, SGD;
where the processor has bfloat16, it is measured under autocast, too.
Ours is training/loop.py as `training/main.py` runs it: uint8 images on the device, whole batches augmented there,
channels-last, bfloat16 where the processor has it, whole steps as CUDA graphs on a GPU, and on a CPU one thread per
core, among which the batch is divided. Both train the same network with the same augmentation and batch size on the
same images.

Ours is also measured with images of 24x24, with one of KAIST's networks as a teacher, on a CPU without the compiled
functions (kernels.c), and on a GPU without the project's kernels or with one kind of them. On a CPU both loops are
also measured while another process keeps two threads busy. Every measurement runs in a new process, because the loops
configure the memory allocator differently. The result is the median of the rounds' ratios, because other load on the
machine slows all loops alike.

Then come the parts of a step, with the full augmentation (crop, flip, TrivialAugment, mixing), and on a CPU in one
thread.

With --fine-tuning a sparse network is trained with Muon: masked, and with its weights rounded to 4 bits and its
activations to 8 as well, with trained steps. Fine-tuning is measured with BatchNorm statistics of each batch, with
frozen ones, and on a CPU without the compiled functions.
"""
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms

from benchmarks.common import add_options, begin, in_turn, ratios_of, seconds, synchronize
from compressed import cifar100, grids, kaist, kernels, networks, threads
from compressed.command_line import command_line, number, run_script
from compressed.exact_network import quantize_activations
from compressed.files import save_json
from compressed.graph import prepare, weight_layers
from training import arguments, augmentation, cpu_kernels, gpu_kernels, learned_steps, loop, masks, plan, teachers
from training.batchnorm import freeze
from training.optimizers import make_optimizer

STEPS = 8  # whose parts are timed
PYTORCHS = "ours, 24x24, PyTorch's functions"
ON_A_GPU = {"ours, PyTorch's functions": ()} | {  # {loop: kinds of layers that may use gpu_kernels.py}
    f"ours, {kind} kernels": (kind,) for kind in gpu_kernels.KINDS}
FINE_TUNING = {"masked training": {}, "fine-tuning": {"on_grids": True},
               "fine-tuning, frozen": {"on_grids": True, "frozen": True},
               "fine-tuning, PyTorch's functions": {"on_grids": True, "compiled": False}}
RATIOS = {  # name: (speed, divided by which)
    "training / the plain loop": ("ours", "plain"),
    "training / the plain loop in bfloat16": ("ours", "plain, bfloat16"),
    "training at 24x24 / at 32x32": ("ours, 24x24", "ours"),
    "training without a teacher / with one": ("ours", "ours, with a teacher"),
    "the same at 24x24": ("ours, 24x24", "ours, 24x24, with a teacher"),
    "the compiled functions / PyTorch's, at 24x24": ("ours, 24x24", PYTORCHS),
    "the GPU kernels / PyTorch's functions": ("ours", "ours, PyTorch's functions"),
    **{f"those of {kind} alone": (f"ours, {kind} kernels", "ours, PyTorch's functions") for kind in gpu_kernels.KINDS},
    "the plain loop alone / next to a busy process": ("plain", "plain, next to a busy process"),
    "training alone / next to a busy process": ("ours", "ours, next to a busy process"),
    **{f"{name} / masked training": (name, "masked training") for name in list(FINE_TUNING)[1:]}}


# ---- The loops -----------------------------------------------------------------------------------

PLAIN = transforms.Compose([transforms.ToPILImage(), transforms.RandomCrop(32, padding=4),
                            transforms.RandomHorizontalFlip(), transforms.ToTensor(),
                            transforms.Normalize((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))])


def plain_batch(examples: list) -> list[torch.Tensor]:
    """Return [images, labels], augmented one by one, as with torchvision.datasets.CIFAR100."""
    return default_collate([(PLAIN(image), label) for image, label in examples])


def plain_epoch(data: cifar100.Images, network: str, batch_size: int, workers: int = 2, half: bool = False) -> float:
    """Return the seconds of an epoch of the plain loop, but for the start of the DataLoader's workers.

    half: compute it under autocast to bfloat16.
    """
    torch.manual_seed(0)
    device = data.labels.device
    model = networks.make(network).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    examples = list(zip(data.images.cpu().permute(0, 2, 3, 1).numpy(), data.labels.tolist()))
    loader = DataLoader(examples, batch_size, shuffle=True, num_workers=workers, drop_last=True,
                        collate_fn=plain_batch, pin_memory=device.type == "cuda")
    batches, steps = iter(loader), len(loader)
    batch, started = next(batches), None
    for step in range(steps):
        if step == 1:  # the first step warms up
            synchronize(device)
            started = time.perf_counter()
        x, y = batch[0].to(device, non_blocking=True), batch[1].to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        batch = next(batches, None)
    synchronize(device)
    return (time.perf_counter() - started) / (steps - 1) * steps


def second_epoch(model: nn.Module, data: cifar100.Images, settings: plan.Settings, compiled: bool,
               begun=lambda model: None, **options) -> float:
    """Return the seconds of the second epoch of training/loop.py, logging and weight average included.

    The epoch before it warms up. compiled: use the functions of kernels.c on a CPU. begun: function that is called
    before each epoch.
    """
    if not compiled:
        kernels.library = lambda dtype: None
    marks = []

    def mark(network, epoch):
        begun(network)
        synchronize(data.labels.device)
        marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        loop.train("speed", model, data, None, settings, folder, prepare=mark, save_seconds=1e9, **options)
    mark(model, None)
    return marks[3] - marks[2]  # the first mark is before the kernels are chosen


def our_epoch(data: cifar100.Images, network: str, settings: plan.Settings, taught: bool = False,
              compiled: bool = True, kinds=gpu_kernels.KINDS) -> float:
    """Return the seconds of an epoch of training/loop.py. kinds: of layers that may use gpu_kernels.py."""
    threads.prepare()
    torch.manual_seed(0)
    model, teacher = (each.to(data.labels.device, memory_format=torch.channels_last) for each in (
        networks.make(network), teachers.fold_batchnorm(kaist.Micronet().eval())))
    return second_epoch(model, data, settings, compiled, teachers=[teacher] * taught, kernels=kinds)


def fine_tuning_epoch(data: cifar100.Images, network: str, settings: plan.Settings, on_grids: bool = False,
                      frozen: bool = False, compiled: bool = True) -> float:
    """Return the seconds of an epoch of masked training; `on_grids`, with 4-bit weights and 8-bit activations.

    A third of the weights are left. frozen: with frozen BatchNorm statistics.
    """
    threads.prepare()
    torch.manual_seed(0)
    model = prepare(networks.make(network))
    for _, layer in weight_layers(model):
        layer.weight.data.mul_(torch.rand(layer.weight.shape) < 0.35)
    if on_grids:
        grids.quantize_weights(model, grids.bit_table("4", model), "channel")
        quantize_activations(model, grids.calibrate(model, data.images[:50].cpu(), 8, "max"))
        learned_steps.learn_steps(model, "channel")
    model = model.to(data.labels.device, memory_format=torch.channels_last)
    zeros = masks.Masks(model, masks.zero_masks(model))

    return second_epoch(model, data, settings, compiled, freeze if frozen else lambda model: None, masks=zeros)


# ---- Their comparison ----------------------------------------------------------------------------

def in_a_process(epoch, images: int, device: torch.device) -> float:
    """Return epoch(made-up images), in a process of its own."""
    # may start a DataLoader's workers
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(on_made_up_images, epoch, images, device).result()


def on_made_up_images(epoch, images: int, device: torch.device) -> float:
    return epoch(cifar100.made_up(images, seed=0, device=device))  # the speed does not depend on what they show


@contextlib.contextmanager
def busy_neighbour():
    """Run another process that multiplies matrices with two OpenMP threads, as most programs that use torch do."""
    program = ("import torch; torch.set_num_threads(2); x = torch.randn(512, 512); print('busy', flush=True)\n"
               "while True: torch.relu(x @ x)")
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()  # it has torch loaded
        yield
    finally:
        process.kill()
        process.wait()


def loops(args, settings: plan.Settings, device: torch.device) -> dict:
    """Return {loop: function that measures the images/s of one epoch}."""
    ours = functools.partial(our_epoch, network=args.network, settings=settings)
    # the third epoch, which is not measured, ends at 32x32
    small = functools.partial(ours, settings=dataclasses.replace(settings, epochs=3, sizes="24:0.67,32"))
    plain = functools.partial(plain_epoch, network=args.network, batch_size=settings.batch_size, workers=args.workers)
    epochs = {"plain": plain, "ours": ours, "ours, 24x24": small,
              "ours, with a teacher": functools.partial(ours, taught=True),
              "ours, 24x24, with a teacher": functools.partial(small, taught=True)}
    if settings.precision == "bfloat16":
        epochs["plain, bfloat16"] = functools.partial(plain, half=True)
    if args.fine_tuning:
        epochs = {name: functools.partial(fine_tuning_epoch, network=args.network, settings=settings, **how)
                  for name, how in FINE_TUNING.items() if device.type == "cpu" or how.get("compiled", True)}
    elif device.type == "cpu":
        epochs[PYTORCHS] = functools.partial(small, compiled=False)
        epochs |= {f"{name}, next to a busy process": epochs[name] for name in ("plain", "ours") if not args.alone}
    else:
        epochs |= {name: functools.partial(ours, kinds=used) for name, used in ON_A_GPU.items()}

    def speed(name):
        with busy_neighbour() if "busy" in name else contextlib.nullcontext():
            return args.images / in_a_process(epochs[name], args.images, device)
    return {name: functools.partial(speed, name) for name in epochs}


def step_parts(network: str, data: cifar100.Images, settings: plan.Settings) -> dict[str, float]:
    """Return the median seconds of a step's parts, and of a whole step without waiting for the device in between."""
    device, size = data.labels.device, min(settings.batch_size, len(data))
    model = networks.make(network).to(device, memory_format=torch.channels_last).train()
    optimizer = make_optimizer(settings, model)
    made = {}  # what the parts of a step hand on

    def augment():
        made["step"] = made.get("step", 0) + 1
        draws = augmentation.draw(size, loop.generator_for(0, made["step"]), "trivial", mixing="both")
        made["x"], *made["labels"] = augmentation.augment(data.images[:size], data.labels[:size], draws)

    def forward():
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            logits = model(made["x"])
        made["loss"] = loop.mixed_cross_entropy(logits.float(), *made["labels"], 0.1)

    def backward():
        optimizer.zero_grad(set_to_none=True)
        made["loss"].backward()

    def whole():
        for _ in range(STEPS):
            for part in parts.values():
                part()

    parts = {"augment": augment, "forward": forward, "backward": backward, "optimizer": optimizer.step}
    with cpu_kernels.fast_on_a_cpu(model) if device.type == "cpu" else contextlib.nullcontext():
        rows = [[seconds(part, device) for part in parts.values()] for _ in range(1 + STEPS)]
        medians = map(statistics.median, zip(*rows[1:]))  # the first step warms up
        return dict(zip(parts, medians)) | {"whole": seconds(whole, device) / STEPS}


def parse(argv=None):
    parser = command_line(__doc__)
    networks.add_option(parser)
    parser.add_argument("--images", type=number(int, 1, 10**6), metavar="N",
                        help="of a measured epoch (default: 50,000 on CUDA, else 1,280)")
    add_options(parser, "512 on CUDA, else 128")
    plan.add_precision(parser)
    parser.add_argument("--workers", type=number(int, 1, 1024), default=2, metavar="W",
                        help="processes of the plain loop's DataLoader (%(default)s)")
    parser.add_argument("--alone", action="store_true", help="leave out what runs next to a busy process")
    parser.add_argument("--fine-tuning", action="store_true", help="compare it with masked training")
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available() and not args.no_cuda
    args.images = args.images or (50_000 if cuda else 1280)
    args.batch_size = args.batch_size or (512 if cuda else 128)
    if args.images < 2 * args.batch_size:
        parser.error(f"--images {args.images}: expected at least two batches of {args.batch_size}")
    args.images -= args.images % args.batch_size  # what does not fill a batch is not trained on
    return args


def main(argv=None) -> int:
    args = parse(argv)
    device, machine = begin(args)
    how = ["--optimizer", "muon"] if args.fine_tuning else ["--mixing", "none"]
    settings = arguments.settings_for("pretrain", arguments.parse(
        ["--epochs", "2", "--batch-size", str(args.batch_size), "--augment", "plain", "--refresh", "0", "--precision",
         args.precision, *how]), device)
    print(f"{args.images} images, batch {args.batch_size}, {settings.precision}")
    speeds = in_turn(loops(args, settings, device), args.rounds)
    figures = {"machine": machine, "images": args.images, "batch_size": args.batch_size,
               "precision": settings.precision, "images_per_second": speeds, "ratios": ratios_of(speeds, RATIOS)}
    if not args.fine_tuning:
        parts = step_parts(args.network, cifar100.made_up(args.images, seed=0, device=device), settings)
        figures["step"] = parts
        whole, total = parts["whole"], sum(parts.values()) - parts["whole"]
        print(f"step: {1000 * whole:.2f} ms; by part " + ", ".join(
            f"{part} {1000 * each:.2f} ms ({each / total:.2%})" for part, each in parts.items() if part != "whole"))
    if args.json:
        save_json(figures, args.json)
    return 0


if __name__ == "__main__":
    run_script(main)
