"""Products of few rows with a large weight on CPUs, by a small C++ kernel that is compiled at first use.

Decoding multiplies 1 to 16 rows with every weight. Reading the weight is the floor of that; MKL reads it
about three times for 8 rows (docs/lab/cpu.md). The kernel reads it once, and a row's result does not depend
on the other rows. A bfloat16 weight is read as it is and multiplied in float32, on any processor.

The compiler is `CXX` or c++; the library is kept in the user's cache. Without a compiler, outside Linux, or
with `OPDLM_SKINNY_GEMM=0` in the environment, torch multiplies.

Shape suffixes: I in, O out, N rows.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

MOST_ROWS = 16
SMALLEST_WEIGHT = 100_000
"""Numbers in a weight from which calling the kernel pays."""
SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-c")
DTYPES = (torch.float32, torch.bfloat16)


def is_skinny(inputs: Tensor, weight_OI: Tensor) -> bool:
    """Whether the kernel should multiply these plain CPU tensors of one dtype."""
    return (
        0 < inputs.numel() <= MOST_ROWS * inputs.shape[-1]
        and weight_OI.numel() >= SMALLEST_WEIGHT
        and weight_OI.dtype in DTYPES
        and weight_OI.is_contiguous()
        and kernel() is not None
    )


def skinny_product(inputs: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """inputs @ weight^T + bias, without a gradient: sums in float32, the result in the dtype of `inputs`."""
    library = kernel()
    assert library is not None
    num_out, num_in = weight_OI.shape
    inputs_NI = inputs.detach().reshape(-1, num_in).to(torch.float32).contiguous()
    output_NO = inputs_NI.new_empty(len(inputs_NI), num_out)
    multiply = library.product_float32 if weight_OI.dtype == torch.float32 else library.product_bfloat16
    multiply(
        *(tensor.data_ptr() for tensor in (inputs_NI, weight_OI, output_NO)),
        *(len(inputs_NI), num_in, num_out, torch.get_num_threads()),
    )
    if bias_O is not None:
        output_NO += bias_O.detach()
    return output_NO.to(inputs.dtype).view(*inputs.shape[:-1], num_out)


def kernel() -> ctypes.CDLL | None:
    """The library; None if it is off or impossible."""
    return loaded()[0]


def why_not() -> str:
    """Why there is no kernel; empty if there is."""
    return loaded()[1]


@cache
def loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library, compiled if this machine has not compiled it yet, or why there is none."""
    if os.environ.get("OPDLM_SKINNY_GEMM") == "0":
        return None, "OPDLM_SKINNY_GEMM=0"
    try:
        library = ctypes.CDLL(str(compiled()))
    except subprocess.CalledProcessError as error:
        said = [line.strip() for line in error.stderr.splitlines() if line.strip()]
        return None, f"{error.cmd[0]} failed: {said[-1] if said else error.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    pointer, size = ctypes.c_void_p, ctypes.c_long
    for multiply in (library.product_float32, library.product_bfloat16):
        multiply.argtypes = [pointer, pointer, pointer, size, size, size, ctypes.c_int]
        multiply.restype = None
    return library, ""


def compiled() -> Path:
    """The compiled library in the user's cache. Its name holds what its code depends on. OSError without a
    compiler, SubprocessError if it fails.
    """
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if not shutil.which(compiler[0]):
        raise FileNotFoundError("no C++ compiler (CXX or c++)")
    runtime = openmp()
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = (SOURCE.read_text(encoding="utf-8"), " ".join(FLAGS), version, processor(), str(runtime))
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]
    cached = cache_folder() / f"skinny_gemm-{name}.so"
    if not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
            unlinked, library = Path(folder, "kernel.o"), Path(folder, "kernel.so")
            run_compiler([*compiler, *FLAGS, str(SOURCE), "-o", str(unlinked)])
            # Not linked with an OpenMP library: it finds torch's.
            run_compiler([*compiler, "-shared", str(unlinked), "-o", str(library)])
            library.replace(cached)
    return cached


def run_compiler(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)


def openmp() -> Path:
    """The OpenMP library that torch has loaded, whose threads the kernel shares: a second one would have a
    second set of threads. Its names become visible to the kernel. OSError where there is none.
    """
    if sys.platform.startswith("linux"):
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            path = Path(line.split(maxsplit=5)[-1])
            if path.name.startswith(("libgomp", "libiomp5")):
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
                return path
    raise OSError("this torch has no OpenMP library that the kernel could share")


def processor() -> str:
    """What `-march=native` depends on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opdlm"
