"""Qwen3's settings under the name that SGLang and LMDeploy know; travels inside folders exported for them.

SGLang reads `rope_theta` from the configuration itself, where transformers 5 keeps it in `rope_parameters`
only: without this SGLang would rotate by 10000, whatever the model was trained with.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen3Config


class SDARConfig(Qwen3Config):
    model_type = "sdar"

    def __init__(self, rope_theta: float = 10000.0, **values: Any) -> None:
        super().__init__(**(values | {"rope_theta": rope_theta}))
        self.rope_theta = rope_theta
