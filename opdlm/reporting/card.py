"""Model cards: what the folder is, how to load it, what was measured and by which command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opdlm.config.sections import Config
from opdlm.config.text import TextConfig
from opdlm.reporting.tables import measured_text

USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
ar_model = AutoModelForCausalLM.from_pretrained(FOLDER)                          # {ar_meaning}
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)     # the diffusion model
ids = tokenizer.apply_chat_template([{{"role": "user", "content": "..."}}], add_generation_prompt=True,
                                    return_tensors="pt", return_dict=True)["input_ids"]
print(tokenizer.decode(model.generate(ids, mode="{mode}", max_new_tokens=128)[0]))
```"""


def model_card(config: Config, results: dict[str, Any], report: dict[str, Any] | None) -> str:
    preserve = config.format.name == "preserve"
    usage = USAGE.format(
        ar_meaning="the teacher, bit for bit" if preserve else "the student's weights read causally",
        mode="lossless" if preserve else "threshold",
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
base_model: {config.model.path}
tags: [opdlm, diffusion, block-diffusion]
---

# {config.model.path} as a block-diffusion model

Converted by `opdlm convert` (format `{config.format.name}`, block size {config.format.block_size}, objective
`{config.loss.objective}`) on {results.get("rollout_tokens", 0):,.0f} rollout tokens in
{results["train_seconds"] / 60:.1f} minutes. All settings are in `opdlm_config.yaml`, itself a recipe.

{usage}

## What it kept

{measured_text(report) if report else "Not measured: the run had no `eval.path`."}

Versions: {", ".join(f"{name} {version}" for name, version in results["versions"].items())}.
"""


def text_card(config: TextConfig, results: dict[str, Any]) -> str:
    """Of a folder written by `opdlm train`."""
    objective, origin = config.objective, "random weights" if config.model.from_scratch else config.model.path
    losses = {name: value for name, value in results.items() if name.startswith("heldout_")}
    measured = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [opdlm]
---

# {Path(config.output_dir).name}

Trained by `opdlm train` (objective `{objective.name}`, prediction `{objective.prediction}`) from {origin} on
{results.get("tokens", 0):,.0f} tokens in {results["train_seconds"] / 60:.1f} minutes. All settings are in
`opdlm_train.yaml`, itself a recipe.

Held-out text, nats per token: {measured or "not measured (no `eval.path`)"}. `opdlm eval DIR --text FILE`
measures other text, `opdlm convert DIR` makes a diffusion model of what was trained autoregressively.

Versions: {", ".join(f"{name} {version}" for name, version in results["versions"].items())}.
"""
