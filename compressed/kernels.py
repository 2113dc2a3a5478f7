"""kernels.c, compiled: what training/batchnorm.py, training/depthwise.py and exact_network.py call on a CPU.

The C compiler is called once a process (CC, options and all, or cc; a second or two). Where there is none, everything
stays PyTorch's.
"""
import ctypes
import functools
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = {torch.float32: [], torch.bfloat16: ["-DBFLOAT16"]}


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled functions for values of this type; None without a compiler."""
    if dtype not in FLAGS:
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "kernels.so"))
        # narrower vectors than the widest leave fewer channels over: the stem has 40
        narrow = ["-mprefer-vector-width=256"] if platform.machine() == "x86_64" else []
        command = [*shlex.split(os.environ.get("CC", "cc")), "-O3", "-march=native", "-fno-trapping-math",
                   "-fno-math-errno", *narrow, *FLAGS[dtype], "-shared", "-fPIC", str(SOURCE), "-o", file]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            return ctypes.CDLL(file)  # which leaves Python's lock while it computes
        except (OSError, subprocess.SubprocessError):
            return None


C_TYPES = {int: ctypes.c_long, bool: ctypes.c_long, float: ctypes.c_float}


def call(name: str, x: torch.Tensor, *args: torch.Tensor | int | float) -> None:
    """A function of kernels.c, for x's type. Integers are longs, and floats of 32 bits."""
    getattr(library(x.dtype), name)(*(ctypes.c_void_p(arg.data_ptr()) if isinstance(arg, torch.Tensor)
                                      else C_TYPES[type(arg)](arg) for arg in (x, *args)))
