"""The model card: what the folder is, how to load it, what was measured and by which command."""

from __future__ import annotations

from typing import Any

from opdlm.config import Config

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

{measured_table(report) if report else "Not measured: the run had no `eval.path`."}

Versions: {", ".join(f"{name} {version}" for name, version in results["versions"].items())}.
"""


def measured_table(report: dict[str, Any]) -> str:
    """The retention report (as `retention.json` holds it) as people read it."""
    lines = [
        "| mode | accuracy | seen | held out | retention | = teacher | tok/fwd | seen | held out | tok/s |",
        "|---|" + "---:|" * 9,
    ]
    for row in [report["teacher"] | {"retention": 1.0}, *report["student"]]:
        cells = [percent(row[key]) for key in ("accuracy", "accuracy_seen", "accuracy_held_out")]
        cells += [retention_cell(row), percent(row["identical_to_teacher"])]
        counts = [row[f"tokens_per_forward{group}"] for group in ("", "_seen", "_held_out")]
        cells += [f"{count:.2f}" if count else "–" for count in counts]  # no prompts: no figure
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {row['tokens_per_second']:.0f} |")
    num_prompts = report["teacher"]["num_prompts"]
    lines.append(
        f"\n{num_prompts} prompts, greedy; accuracy is the mean over skills of exact match. Every forward "
        "is counted, prefill and commits included. `teacher` is the original, decoded token by token. In "
        "brackets: 95 % interval (bootstrap over the same prompts)."
    )
    return "\n".join(lines + distance_lines(report) + likelihood_lines(report))


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def retention_cell(row: dict[str, Any]) -> str:
    interval = row.get("against_teacher", {}).get("all", {}).get("retention_interval")
    if interval is None or row["name"] == "teacher":
        return percent(row["retention"])
    return f"{percent(row['retention'])} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def distance_lines(report: dict[str, Any]) -> list[str]:
    rows = [
        f"| {name} | {percent(measured['argmax_agreement'])} | {measured['teacher_kl']:.4f} |"
        for name, measured in report.get("agreement", {}).items()
    ]
    head = ["", "| mode | tokens = AR arg-max | KL(teacher ‖ student), nats |", "|---|---:|---:|"]
    return head + rows if rows else []


def likelihood_lines(report: dict[str, Any]) -> list[str]:
    measured = report.get("likelihood")
    if measured is None:
        return []
    return [
        f"\nNats per token of the teacher's {measured['num_tokens']} response tokens: teacher "
        f"{measured['teacher_nll_per_token']:.4f}, student at most {measured['student_bound_per_token']:.4f} "
        f"± {measured['student_bound_standard_error']:.4f} (standard error of the bound)."
    ]
