"""Compile kernels.c and call its functions, for training/cpu_kernels.py and exact_network.py on a CPU.

The C compiler (the command in CC, options included, or cc) runs once per process and takes a second or two. Without
one, PyTorch's functions are used.
"""
import ctypes
import functools
import platform
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch

from compressed import environment
from compressed.command_line import say_once

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = {torch.float32: [], torch.bfloat16: ["-DBFLOAT16"]}


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Return the compiled functions for values of this type; None if they cannot be compiled.

    If there is a compiler and it fails, a line on stderr says so, because everything is slower then.
    """
    if dtype not in FLAGS:
        return None
    # with 256-bit vectors, fewer channels are left over for slow scalar code: the stem has 40
    narrow = ["-mprefer-vector-width=256"] if platform.machine() == "x86_64" else []
    try:
        compiler = shlex.split(environment.text("CC") or "cc")
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder, "kernels.so"))
            subprocess.run([*compiler, "-O3", "-march=native", "-fno-trapping-math", "-fno-math-errno", *narrow,
                            *FLAGS[dtype], "-shared", "-fPIC", str(SOURCE), "-o", file], check=True,
                           capture_output=True, timeout=120)
            functions = ctypes.CDLL(file)  # ctypes releases Python's lock during calls
        getattr(functions, "batchnorm")  # what stands in for a compiler may leave all functions out
        return functions
    except Exception as error:  # whatever stands in for a compiler can fail in any way
        if environment.text("CC") or not (isinstance(error, FileNotFoundError) and error.filename == "cc"):
            said = f"it ended with status {error.returncode}" if isinstance(error, subprocess.CalledProcessError) else \
                re.sub(r"\S*/(?=kernels\.so)", "", " ".join(str(error).split()))[-200:]
            say_once(f"without compiled functions, and slower: the C compiler (CC) does not make them ({said})")
        return None


C_TYPES = {int: ctypes.c_long, bool: ctypes.c_long, float: ctypes.c_float}


def call(name: str, x: torch.Tensor, *args: torch.Tensor | int | float) -> None:
    """Call a function of kernels.c, compiled for x's type. Integers are passed as longs, floats as 32-bit floats."""
    getattr(library(x.dtype), name)(*(ctypes.c_void_p(arg.data_ptr()) if isinstance(arg, torch.Tensor)
                                      else C_TYPES[type(arg)](arg) for arg in (x, *args)))
