"""A CPU as the scripts use it: memory that is kept instead of returned, and one thread for each core that never spins.

torch splits every operation over its OpenMP threads, and a thread that is done spins until the slowest is. Beside
another job the slowest has no core, and everybody waits for it: two such jobs on two cores run at a fifteenth of their
speed. Here every worker is a Python thread with operations of one thread each, and works on images of its own: it
shares a core as any process does. torch leaves the interpreter's lock while it computes, so the workers run at the same
time.
"""
import contextlib
import ctypes
import os
import platform
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import torch

from compressed import environment

_pool = ThreadPoolExecutor(1024, initializer=torch.set_num_threads, initargs=(1,))  # begins a thread when one is needed
_stopped = threading.Event()


def cores() -> int:
    """The cores that this process may use; of several processes of torchrun on this machine, its share of them."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        count = os.cpu_count() or 1
    return max(1, count // environment.processes_here())


def describe_machine(device, processes: int = 1) -> dict:
    """Return the machine of a result: the device ("CPU", or the GPU's name), the cores of each process, the number
    of processes, and the versions of torch and Python."""
    gpu = torch.device(device).type == "cuda"
    return {"device": torch.cuda.get_device_name(device) if gpu else "CPU", "cores": cores(), "processes": processes,
            "torch": torch.__version__, "python": platform.python_version()}


def prepare() -> None:
    """For scripts, before the first large tensor: keep freed memory, and one thread for each operation."""
    keep_memory()
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32 on CUDA too


def keep_memory() -> None:
    """Tell glibc's allocator to keep what is freed; nothing where there is another C library.

    By default large tensors are mapped anew each time and unmapped when they are freed. The kernel then clears every
    page of every activation of every step: a third of a training step was page faults. The cost is that the process
    holds its largest memory until it ends.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_ARENA_MAX, 1)  # the heaps of other threads hold 64 MB at most, and are unmapped when they are empty


def in_threads(function, parts) -> list:
    """Return [function(part) for part in parts], each in a thread of its own (the first in this one), with one core
    each.

    Autocast, inference mode and the like belong to a thread: `function` enters what it needs. The first error is raised
    once all are done; long work calls `go_on` between two batches, so that an error or Ctrl-C ends it soon.
    """
    first, *others = parts
    waiting = [_pool.submit(function, part) for part in others]
    try:
        return [function(first)] + [each.result() for each in waiting]
    except BaseException:
        stop()
        raise
    finally:
        wait(waiting)  # after an error, too, nobody is still at work on what the caller goes on with
        _stopped.clear()


def stop() -> None:
    """End the work of all threads at their next `go_on`."""
    _stopped.set()


def go_on() -> None:
    """Raise KeyboardInterrupt if the work was stopped: only the main thread learns of Ctrl-C by itself."""
    if _stopped.is_set():
        raise KeyboardInterrupt


def for_each(function, *lists) -> None:
    """function(*lists), which changes the tensors of the first, dealt to the cores of a CPU: to each every n-th."""
    if not lists[0]:
        return
    cpu, some = lists[0][0].device.type == "cpu", torch.no_grad()(function)
    count = min(cores(), len(lists[0])) if cpu else 1
    in_threads(lambda k: some(*(each[k::count] for each in lists)), range(count))
