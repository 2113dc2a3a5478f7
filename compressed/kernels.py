"""kernels.c, compiled: what training/cpu_kernels.py and exact_network.py call on a CPU.

The C compiler is called once a process (CC, options and all, or cc; a second or two). Where there is none, everything
stays PyTorch's.
"""
import ctypes
import functools
import platform
import re
import subprocess
import tempfile
from pathlib import Path

import torch

from compressed import environment
from compressed.command_line import say_once

SOURCE = Path(__file__).with_name("kernels.c")
FUNCTIONS = ("batchnorm", "batchnorm_gradients", "depthwise", "depthwise_gradients", "quantize", "rescale")
FLAGS = {torch.float32: [], torch.bfloat16: ["-DBFLOAT16"]}


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Return the compiled functions for values of this type; None without a compiler that makes them.

    A compiler that is there and does not work is mentioned on stderr: without it everything takes longer.
    """
    if dtype not in FLAGS:
        return None
    try:
        with tempfile.TemporaryDirectory() as folder:
            return compiled(Path(folder, "kernels.so"), FLAGS[dtype])
    except Exception as error:  # whatever stands in for a compiler can fail in any way
        if environment.text("CC") or not isinstance(error, FileNotFoundError):
            said = f"it ended with status {error.returncode}" if isinstance(error, subprocess.CalledProcessError) else \
                re.sub(r"\S*/(?=kernels\.so)", "", " ".join(str(error).split()))[-200:]
            say_once(f"without compiled functions, and slower: the C compiler (CC) does not make them ({said})")
        return None


def compiled(file: Path, flags: list[str]) -> ctypes.CDLL:
    """Compile kernels.c to this file and load it."""
    # narrower vectors than the widest leave fewer channels over: the stem has 40
    narrow = ["-mprefer-vector-width=256"] if platform.machine() == "x86_64" else []
    subprocess.run([*environment.compiler(), "-O3", "-march=native", "-fno-trapping-math", "-fno-math-errno", *narrow,
                    *flags, "-shared", "-fPIC", str(SOURCE), "-o", str(file)],
                   check=True, capture_output=True, timeout=120)
    functions = ctypes.CDLL(str(file))  # which leaves Python's lock while it computes
    for name in FUNCTIONS:
        getattr(functions, name)
    return functions


C_TYPES = {int: ctypes.c_long, bool: ctypes.c_long, float: ctypes.c_float}


def call(name: str, x: torch.Tensor, *args: torch.Tensor | int | float) -> None:
    """A function of kernels.c, for x's type. Integers are longs, and floats of 32 bits."""
    getattr(library(x.dtype), name)(*(ctypes.c_void_p(arg.data_ptr()) if isinstance(arg, torch.Tensor)
                                      else C_TYPES[type(arg)](arg) for arg in (x, *args)))
