"""opdlm: turn a pretrained autoregressive language model into a diffusion language model, and measure what it
kept.

    import opdlm

    model, tokenizer = opdlm.load("runs/tiny/model")
    (rollout,) = opdlm.generate(model, ["add 47 38"], tokenizer=tokenizer, mode="lossless")
    print(rollout.text)

Names are imported on first use, so that `import opdlm` and `opdlm --help` do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opdlm.api import (
        bench,
        convert,
        evaluate,
        export,
        import_adapter,
        load,
        merge,
        push,
        resume,
        rollout,
        runs,
        serve,
        train,
        verify,
    )
    from opdlm.checkpoints.folders import trust_remote_code
    from opdlm.config.rules import load_config
    from opdlm.config.sections import Config
    from opdlm.config.text import TextConfig, load_text_config
    from opdlm.decoding.decode_config import DecodeConfig
    from opdlm.decoding.rollout import Rollout
    from opdlm.errors import ConfigError, DataError, OpdlmError
    from opdlm.modeling.diffusion_lm import DiffusionLM
    from opdlm.serving.text_generation import generate

__version__ = "0.1.0"

__all__ = [
    "Config",
    "ConfigError",
    "DataError",
    "DecodeConfig",
    "DiffusionLM",
    "OpdlmError",
    "Rollout",
    "TextConfig",
    "__version__",
    "bench",
    "convert",
    "evaluate",
    "export",
    "generate",
    "import_adapter",
    "load",
    "load_config",
    "load_text_config",
    "merge",
    "push",
    "resume",
    "rollout",
    "runs",
    "serve",
    "train",
    "trust_remote_code",
    "verify",
]

_ELSEWHERE = {
    "Config": "config.sections",
    "ConfigError": "errors",
    "DataError": "errors",
    "DecodeConfig": "decoding.decode_config",
    "DiffusionLM": "modeling.diffusion_lm",
    "OpdlmError": "errors",
    "Rollout": "decoding.rollout",
    "TextConfig": "config.text",
    "generate": "serving.text_generation",
    "load_config": "config.rules",
    "load_text_config": "config.text",
    "trust_remote_code": "checkpoints.folders",
}
"""Modules of the names that are not functions of `opdlm.api`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'opdlm' has no attribute {name!r}")
    value = getattr(import_module(f"opdlm.{_ELSEWHERE.get(name, 'api')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
