"""Use the cores of a CPU with one Python thread each, and keep freed memory in the process.

torch splits every operation over its OpenMP threads, and each of them busy-waits until the slowest is done. If another
job takes a core, all threads wait for the one that lost it: next to a job of two threads, a plain training loop on two
cores keeps about a third of its speed (benchmarks/README.md).
Here every worker is a Python thread that computes its own images, with single-threaded operations, so it shares a core
with other processes as usual. torch releases the interpreter's lock while it computes, so the workers run in parallel.
"""
import contextlib
import ctypes
import math
import os
import platform
import signal
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import torch

from compressed import environment
from compressed.command_line import ENDING, end_in_order
from compressed.errors import BadInput, refused

_pool = ThreadPoolExecutor(1024, initializer=torch.set_num_threads, initargs=(1,))  # threads start when needed
_stopped = threading.Event()


QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: "200000 100000" are two cores


def cores() -> int:
    """Return the number of cores that this process may use; under torchrun, its share of the machine's cores."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        count = os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # "max": no quota
        quota, period = map(int, QUOTA.read_text().split())
        count = min(count, math.ceil(quota / period))
    return max(1, count // (environment.integer("LOCAL_WORLD_SIZE", 1) or 1))


def use_device(no_cuda: bool, local: int = 0) -> torch.device:
    """Return the CUDA device of this index, the current one from now on; the CPU without CUDA or with `no_cuda`.

    Raises BadInput if there is no device of this index, or if it does not work (a driver of another version, all of
    its memory in use).
    """
    if no_cuda or not torch.cuda.is_available():
        return torch.device("cpu")
    if local >= torch.cuda.device_count():
        raise BadInput(f"LOCAL_RANK is {local}, but there are {torch.cuda.device_count()} CUDA devices: start no more "
                       "processes than that, or give --no-cuda")
    device = torch.device("cuda", local)
    with refused("the CUDA device does not work", "; give --no-cuda to use the CPU"):
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    return device


def describe_machine(device, processes: int = 1) -> dict:
    """Return a description of the machine, to be recorded with results.

    {"device": "CPU" or the GPU's name, "cores": of each process, "processes", "torch", "python": versions}.
    """
    gpu = torch.device(device).type == "cuda"
    return {"device": torch.cuda.get_device_name(device) if gpu else "CPU", "cores": cores(), "processes": processes,
            "torch": torch.__version__, "python": platform.python_version()}


def prepare() -> None:
    """Set up memory and threads as described above; scripts call it before they make the first large tensor.

    By default glibc maps memory anew for every large tensor, and the kernel clears each page every time: a third of a
    training step was page faults. Here it keeps freed memory until the process ends. Other C libraries are left alone.
    """
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # convolutions in float32 use full precision on CUDA too
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_ARENA_MAX, 1)  # one heap: those of other threads hold 64 MB at most, and are unmapped if empty


def in_threads(function, parts) -> list:
    """Return [function(part) for part in parts], computed in parallel: one thread for each part, this one included.

    Autocast, inference mode and the like are set per thread, so `function` must enter them itself. The first error is
    raised when all threads have ended. Long work calls `go_on` between batches, to end soon after Ctrl-C, or an
    error in this thread (one in another thread is raised when this thread's part is done).
    """
    first, *others = parts
    waiting = [_pool.submit(function, part) for part in others]
    try:
        return [function(first)] + [each.result() for each in waiting]
    except BaseException:
        stop()
        raise
    finally:
        wait(waiting)  # after an error, too, no thread may still change the caller's data
        resume()


def stop() -> None:
    """Make every thread of `in_threads` end at its next call of `go_on`."""
    _stopped.set()


def resume() -> None:
    """Take `stop` back, for work that comes after what was stopped."""
    _stopped.clear()


def go_on() -> None:
    """Raise KeyboardInterrupt if `stop` was called. Only the main thread gets Ctrl-C directly."""
    if _stopped.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def stop_noted():
    """Yield a list to which SIGTERM, SIGHUP and Ctrl-C append their signal numbers, instead of ending the process.

    The first Ctrl-C cuts evaluations in `in_threads` short, and the second raises KeyboardInterrupt. At the end
    of the block the previous handlers are restored and called for the signals that arrived: after Ctrl-C, the outermost
    block ends with KeyboardInterrupt. After the others it does not end the script, which has saved what it wants to
    save, and decides. Signals that are ignored stay so. Only the main thread can install handlers; in others the list
    stays empty.
    """
    arrived, before = [], {}

    def note(number, _):
        if number == signal.SIGINT:
            if number in arrived:
                raise KeyboardInterrupt
            stop()
        arrived.append(number)

    with contextlib.suppress(ValueError):
        for number in (*ENDING, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, note)
    try:
        yield arrived
    finally:
        if signal.SIGINT in arrived:
            resume()
        for number, handler in before.items():
            signal.signal(number, handler)
        for number, handler in before.items():
            if number in arrived and callable(handler) and handler is not end_in_order:
                handler(number, None)


def for_each(function, *lists) -> None:
    """Call function(*lists) in parallel on the n cores of a CPU, with every n-th element of each list.

    lists: lists of tensors, all of the same length. The function changes those of the first in place.
    """
    if lists[0]:
        count = min(cores(), len(lists[0])) if lists[0][0].is_cpu else 1
        some = torch.no_grad()(function)
        in_threads(lambda k: some(*(each[k::count] for each in lists)), range(count))
