"""Retention of a student while it trains, on a fixed subset of the evaluation prompts. Not here: when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from opdlm.config.sections import EvalSection
from opdlm.data.prompts import Task
from opdlm.evaluation.evaluate import Outputs, evaluate
from opdlm.modeling.diffusion_lm import DiffusionLM


@dataclass(slots=True)
class Watch:
    """Measures whatever it is called with; the teacher answers once."""

    tokenizer: PreTrainedTokenizerBase
    tasks: Sequence[Task]
    section: EvalSection
    teacher: Outputs | None = None

    def __post_init__(self) -> None:
        num = min(self.section.subset, len(self.tasks))
        self.tasks = [self.tasks[i * len(self.tasks) // num] for i in range(num)]  # evenly spaced

    def __call__(self, model: DiffusionLM) -> dict[str, float]:
        """`retention` is that of the worst mode, and the score."""
        report, outputs = evaluate(model, self.tokenizer, self.tasks, self.section, teacher=self.teacher)
        self.teacher = outputs["teacher"]
        retained = {f"retention_{mode.name}": report.retention(mode) for mode in report.student}
        speeds = {f"tokens_per_forward_{mode.name}": mode.tokens_per_forward for mode in report.student}
        worst = min(retained.values())
        return {"score": worst, "retention": worst} | retained | speeds
