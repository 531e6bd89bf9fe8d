"""The machine and the packages: what `opdlm env` prints for bug reports, and how libraries are kept quiet."""

from __future__ import annotations

import logging
import os
import platform
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from opdlm import __version__

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors")
EXTRAS = ("vllm", "flash-attn", "bitsandbytes", "deepspeed")


def describe_environment() -> dict[str, str]:
    """Versions and hardware by name, in the order in which they are printed; extras only where installed."""
    found = {"opdlm": __version__, "python": platform.python_version(), "os": platform.platform()}
    found |= {name: version_of(name) or "not installed" for name in PACKAGES}
    found |= {name: installed for name in EXTRAS if (installed := version_of(name))}
    return found | describe_hardware()


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe_hardware() -> dict[str, str]:
    """CPU, its cores, memory, oneDNN, our kernel, GPUs and CUDA; imports torch."""
    import torch

    from opdlm.modeling.cpu_linear import LOW_PRECISIONS, ONEDNN, cpu_multiplies
    from opdlm.modeling.skinny_gemm import why_not

    found = {"cpu": cpu_name(), "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}
    if memory := total_memory():
        found["memory"] = f"{memory / 2**30:.1f} GiB"
    fast = [dtype for dtype in LOW_PRECISIONS if cpu_multiplies(dtype)]
    found["cpu precisions"] = ", ".join(["float32", *fast])
    found["onednn"] = "on" if ONEDNN else "off (OPDLM_ONEDNN=1 turns it on)"
    found["skinny gemm"] = (
        f"off ({reason})" if (reason := why_not()) else "on (OPDLM_SKINNY_GEMM=0 turns it off)"
    )
    if not torch.cuda.is_available():
        return found | {"gpu": "none", "cuda": torch.version.cuda or "not in this build of torch"}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found[f"gpu {index}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB"
    return found | {"cuda": str(torch.version.cuda)}


def free_memory(device: torch.device) -> float:
    """Bytes that the device can still give; imports torch."""
    import psutil
    import torch

    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available)


def cpu_name() -> str:
    file = Path("/proc/cpuinfo")  # Linux; elsewhere Python knows the name
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def total_memory() -> int | None:
    """Bytes of main memory; None where the system does not say (Windows)."""
    if os.name == "nt":
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def quiet_libraries() -> None:
    """No progress bars and notices of the libraries between our own lines. Imports none of them."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module=r"(peft|transformers|torch|accelerate)\.")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if "transformers" in sys.modules:  # it has read the variables already
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
