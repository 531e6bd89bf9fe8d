"""Qwen3's configuration under SDAR's name, for SGLang and LMDeploy; copied into folders exported for them.

SGLang reads `rope_theta` from the configuration, but transformers 5 stores it in `rope_parameters` only.
Without this class SGLang would use 10000 for every model.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen3Config


class SDARConfig(Qwen3Config):
    model_type = "sdar"

    def __init__(self, rope_theta: float = 10000.0, **values: Any) -> None:
        super().__init__(**(values | {"rope_theta": rope_theta}))
        self.rope_theta = rope_theta
