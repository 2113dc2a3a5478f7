"""Compare the training speed of training/loop.py with that of an ordinary PyTorch loop ("plain"), in one run.

    python -m benchmarks.training_speed [--images N] [--batch-size B] [--rounds 3] [--workers W] [--alone] [--json F]

The plain loop has a DataLoader with --workers processes, torchvision's crop, flip and normalisation, NCHW float32, SGD.
Ours is training/loop.py as `training/main.py` runs it: uint8 images on the device, whole batches augmented there,
channels-last, bfloat16 where the processor has it, torch.compile on CUDA, and on a CPU one thread per core, among which
the batch is divided. Both train the same network with the same augmentation and batch size on the same images.

Ours is also measured with images of 24x24, with one of KAIST's networks as a teacher, on a CPU without the compiled
functions (kernels.c), and on a GPU without the Triton kernels or without one kind of them. On a CPU both loops are
also measured while another process keeps two threads busy. Every measurement runs in a new process, because the loops
configure the memory allocator differently. Rounds alternate, and the result is the median of the rounds' ratios,
because other load on the machine slows all loops alike. Only the ratios are meaningful.

Last come the parts of a step, with the full augmentation (crop, flip, TrivialAugment, mixing), without torch.compile,
and on a CPU in one thread.
"""
import contextlib
import dataclasses
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
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from compressed import cifar100, kaist, kernels, threads
from compressed.command_line import command_line, number, run_script, some_path
from compressed.files import save_json, try_to_write
from mobilenet_v2 import MobileNetV2
from training import augmentation, cpu_kernels, gpu_kernels, loop, teachers
from training import main as training_main

PYTORCHS = "ours, 24x24, PyTorch's functions"
ON_A_GPU = {"ours, PyTorch's functions": (), "ours, depthwise kernels": ("depthwise",),
            "ours, BatchNorm kernels": ("BatchNorm",)}  # {loop: kinds of layers with Triton kernels}
RATIOS = {  # name: (speed, divided by which)
    "training / the plain loop": ("ours", "plain"), "training at 24x24 / at 32x32": ("ours, 24x24", "ours"),
    "training without a teacher / with one": ("ours", "ours, with a teacher"),
    "the same at 24x24": ("ours, 24x24", "ours, 24x24, with a teacher"),
    "the compiled functions / PyTorch's, at 24x24": ("ours, 24x24", PYTORCHS),
    "the Triton kernels / PyTorch's functions": ("ours", "ours, PyTorch's functions"),
    "those of depthwise convolutions alone": ("ours, depthwise kernels", "ours, PyTorch's functions"),
    "those of BatchNorm alone": ("ours, BatchNorm kernels", "ours, PyTorch's functions"),
    "the plain loop alone / next to a busy process": ("plain", "plain, next to a busy process"),
    "training alone / next to a busy process": ("ours", "ours, next to a busy process")}


class PilImages(Dataset):
    """What torchvision.datasets.CIFAR100 does with an image: uint8 array -> PIL -> transforms."""

    def __init__(self, data: cifar100.Images):
        self.images, self.labels = data.images.cpu().permute(0, 2, 3, 1).numpy(), data.labels.tolist()
        self.to_pil = transforms.ToPILImage()
        self.transform = transforms.Compose([
            transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(self.to_pil(self.images[i])), self.labels[i]


def plain_epoch(data: cifar100.Images, batch_size: int, device: torch.device, workers: int = 2) -> float:
    """Seconds of an epoch of the plain loop, from the first batch's arrival on: starting the workers is not counted."""
    torch.manual_seed(0)
    model = MobileNetV2().to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    loader = DataLoader(PilImages(data), batch_size, shuffle=True, num_workers=workers, drop_last=True,
                        pin_memory=device.type == "cuda")
    batches, steps = iter(loader), len(loader)
    batch, started = next(batches), None
    for step in range(steps):
        if step == 1:  # the first step warms up
            synchronize(device)
            started = time.perf_counter()
        x, y = batch[0].to(device, non_blocking=True), batch[1].to(device, non_blocking=True)
        loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        batch = next(batches, None)
    synchronize(device)
    return (time.perf_counter() - started) / (steps - 1) * steps


def our_epoch(data: cifar100.Images, settings: loop.Settings, device: torch.device, taught: bool = False,
              compiled: bool = True, kinds=gpu_kernels.KINDS) -> float:
    """Seconds of an epoch of training/loop.py, logging and weight average included; compilation and set-up are not.

    compiled: use the functions of kernels.c on a CPU. kinds: of layers that may use Triton kernels on a GPU.
    """
    threads.prepare()
    gpu_kernels.KINDS = kinds
    if not compiled:
        kernels.library = lambda dtype: None
    torch.manual_seed(0)
    model = MobileNetV2().to(device, memory_format=torch.channels_last)
    teacher = teachers.fold_batchnorm(kaist.Micronet().eval()).to(device, memory_format=torch.channels_last)
    marks = []

    def mark(*_):
        synchronize(device)
        marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        loop.train("speed", model, data, None, settings, folder, teachers=[teacher] * taught, prepare=mark,
                   save_seconds=1e9)
    synchronize(device)
    return time.perf_counter() - marks[-1]  # the last epoch: the first one warms up


def in_a_process(function, images: int, *args) -> float:
    """function(made-up images, *args), in a process of its own."""
    # may start a DataLoader's workers
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, function, images, args).result()


def _measured(function, images: int, args: tuple) -> float:
    device = next(arg for arg in args if isinstance(arg, torch.device))
    # the speed does not depend on what they show
    return function(cifar100.made_up(images, seed=0, device=device), *args)


@contextlib.contextmanager
def busy_neighbour():
    """Another process that multiplies matrices with two OpenMP threads, as most programs that use torch do."""
    program = ("import torch; torch.set_num_threads(2); x = torch.randn(512, 512); print('busy', flush=True)\n"
               "while True: torch.relu(x @ x)")
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()  # it has torch loaded
        yield
    finally:
        process.kill()
        process.wait()


def step_parts(data: cifar100.Images, settings: loop.Settings, device: torch.device,
               steps: int = 8) -> dict[str, float]:
    """Median seconds of a step's parts, with the full augmentation, and of a whole step without waiting in between."""
    model = MobileNetV2().to(device, memory_format=torch.channels_last).train()
    optimizer = loop.make_optimizer(settings, model)
    size = min(settings.batch_size, len(data))
    times = {"augment": [], "forward": [], "backward": [], "optimizer": []}

    def one_step(step: int, wait: bool) -> list[float]:
        marks = [time.perf_counter()]

        def mark():
            if wait:
                synchronize(device)
                marks.append(time.perf_counter())

        draws = augmentation.draw(size, loop.generator_for(0, step), trivial=True, mixing="both")
        x, labels, others, lam = augmentation.augment(data.images[:size], data.labels[:size], draws)
        x = x.contiguous(memory_format=torch.channels_last)
        mark()
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            logits = model(x)
        loss = loop.mixed_cross_entropy(logits.float(), labels, others, lam, 0.1)
        mark()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        mark()
        optimizer.step()
        mark()
        return marks

    with cpu_kernels.fast_on_a_cpu(model) if device.type == "cpu" else contextlib.nullcontext():
        for step in range(1 + steps):
            marks = one_step(step, wait=True)
            if step:  # the first one warms up
                for part, start, end in zip(times, marks, marks[1:]):
                    times[part].append(end - start)
        synchronize(device)
        start = time.perf_counter()
        for step in range(steps):
            one_step(step, wait=False)
        synchronize(device)
    whole = (time.perf_counter() - start) / steps
    return {part: statistics.median(values) for part, values in times.items()} | {"whole": whole}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def parse(argv=None):
    parser = command_line(__doc__)
    parser.add_argument("--images", type=number(int, 1, 10**6),
                        help="of a measured epoch (default: 50,000 on CUDA, else 1,280)")
    parser.add_argument("--batch-size", type=number(int, 1, 10**6), help="(default: 512 on CUDA, else 128)")
    parser.add_argument("--rounds", type=number(int, 1, 10**6), default=3, help="(%(default)s)")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
                        help="of ours (default: bfloat16 where the processor has it)")
    parser.add_argument("--workers", type=number(int, 1, 1024), default=2,
                        help="processes of the plain loop's DataLoader (%(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="ours without torch.compile, which CUDA has")
    parser.add_argument("--alone", action="store_true", help="leave out what runs next to a busy process")
    parser.add_argument("--no-cuda", action="store_true")
    parser.add_argument("--json", type=some_path, metavar="F", help="write the figures to F as well")
    args = parser.parse_args(argv)
    args.cuda = torch.cuda.is_available() and not args.no_cuda
    args.images = args.images or (50_000 if args.cuda else 1280)
    args.batch_size = args.batch_size or (512 if args.cuda else 128)
    if args.images < 2 * args.batch_size:
        parser.error(f"--images {args.images}: expected at least two batches of {args.batch_size}")
    args.images -= args.images % args.batch_size  # what does not fill a batch is not trained on
    return args


def compare(settings: loop.Settings, device: torch.device, images: int, rounds: int,
            alone: bool = False, workers: int = 2) -> dict[str, list[float]]:
    """{loop: images a second in each round}; on a CPU both loops next to a busy process, too, unless `alone`."""
    small = dataclasses.replace(settings, sizes="24:0.999999,32")
    kinds = {"plain": (plain_epoch, settings.batch_size, device, workers), "ours": (our_epoch, settings, device),
             "ours, 24x24": (our_epoch, small, device), "ours, with a teacher": (our_epoch, settings, device, True),
             "ours, 24x24, with a teacher": (our_epoch, small, device, True)}
    if device.type == "cpu":
        kinds[PYTORCHS] = our_epoch, small, device, False, False
        kinds |= {f"{name}, next to a busy process": kinds[name] for name in ("plain", "ours") if not alone}
    if device.type == "cuda":
        kinds |= {name: (our_epoch, settings, device, False, True, used) for name, used in ON_A_GPU.items()}
    speeds = {name: [] for name in kinds}
    for turn in range(rounds):
        for name, kind in kinds.items():
            with busy_neighbour() if "busy" in name else contextlib.nullcontext():
                speeds[name].append(images / in_a_process(kind[0], images, *kind[1:]))
        print(f"round {turn + 1}: " + ", ".join(f"{name} {found[-1]:,.1f} images/s" for name, found in speeds.items()),
              flush=True)
    return speeds


def main(argv=None) -> int:
    args = parse(argv)
    if args.json:
        try_to_write(args.json)
    device = torch.device("cuda" if args.cuda else "cpu")
    options = training_main.parse(["--epochs", "2", "--batch-size", str(args.batch_size), "--augment", "plain",
                                   "--mixing", "none", "--refresh", "0", "--precision", args.precision,
                                   *["--no-compile"] * args.no_compile])
    settings = training_main.settings_for("pretrain", options, device)
    where = threads.describe_machine(device)
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(f"{args.images} images, batch {args.batch_size}, {settings.precision}, compile {settings.compile}")
    speeds, ratios = compare(settings, device, args.images, args.rounds, args.alone, args.workers), {}
    for name, (above, below) in RATIOS.items():
        if {above, below} <= speeds.keys():
            ratios[name] = statistics.median(a / b for a, b in zip(speeds[above], speeds[below]))
            print(f"{name}: {ratios[name]:.2f}")

    threads.prepare()
    data = cifar100.made_up(args.images, seed=0, device=device)
    parts = step_parts(data, settings, device)
    shown = {part: seconds for part, seconds in parts.items() if part != "whole"}
    print(f"step: {1000 * parts['whole']:.2f} ms; by part " + ", ".join(
        f"{part} {1000 * seconds:.2f} ms ({seconds / sum(shown.values()):.2%})" for part, seconds in shown.items()))
    if args.json:
        save_json({"machine": where, "images": args.images, "batch_size": args.batch_size,
                   "precision": settings.precision, "images_per_second": speeds, "ratios": ratios, "step": parts},
                  args.json)
    return 0


if __name__ == "__main__":
    run_script(main)
