"""opdlm: turn a pretrained autoregressive language model into a diffusion language model, and prove what it
kept.

    import opdlm
    model, tokenizer = opdlm.load("runs/tiny/model")

Names are imported on first use, so that `opdlm --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "checkpoints.load",
    "DecodeConfig": "decoding.generate",
    "DiffusionLM": "modeling.diffusion_lm",
    "load_config": "config.rules",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"opdlm.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'opdlm' has no attribute {name!r}")
