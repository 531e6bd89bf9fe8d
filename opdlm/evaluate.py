"""What survived: the teacher and the student in every decoding mode, on the same prompts.

Per skill: exact match, share of outputs identical to the teacher's, tokens per forward with every forward
counted (prefill and commits included). Where prompts carry no answer, the teacher's greedy output is the
reference. Retention is the student's mean over skills divided by the teacher's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from opdlm.config import EvalSection
from opdlm.data import Task
from opdlm.diffusion import DiffusionLM
from opdlm.errors import ConfigError
from opdlm.generate import DecodeConfig, DecodeStats, Mode, generate
from opdlm.records import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeReport:
    """One model in one decoding mode. Shares are between 0 and 1."""

    name: str
    accuracy: float
    """Mean over skills of exact match."""
    accuracy_seen: float | None
    accuracy_held_out: float | None
    by_skill: dict[str, float]
    identical_to_teacher: float
    """Share of responses equal to the teacher's, token for token."""
    tokens_per_forward: float
    tokens_per_forward_seen: float
    tokens_per_forward_held_out: float
    tokens_per_step: float
    tokens_per_second: float
    stop_rate: float
    num_prompts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionReport:
    """Teacher first, then the student's modes."""

    teacher: ModeReport
    student: list[ModeReport]
    held_out_skills: list[str]
    settings: dict[str, Any] = field(default_factory=dict)

    def retention(self, mode: ModeReport) -> float:
        """Student's accuracy as a share of the teacher's."""
        return mode.accuracy / self.teacher.accuracy if self.teacher.accuracy else 0.0

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        for row, mode in zip(values["student"], self.student, strict=True):
            row["retention"] = self.retention(mode)
        return values


@dataclass(frozen=True, slots=True)
class Outputs:
    """Responses of one model in one mode."""

    rollouts: list[Rollout]
    stats_by_held_out: dict[bool, DecodeStats]
    seconds: float

    @property
    def stats(self) -> DecodeStats:
        return self.stats_by_held_out[False] + self.stats_by_held_out[True]


def decode_tasks(
    model: DiffusionLM,
    tasks: Sequence[Task],
    mode: Mode,
    section: EvalSection,
    on_batch: Callable[[int], None] = lambda _: None,
) -> Outputs:
    """Greedy responses for every task."""
    config = DecodeConfig(
        mode=mode,
        max_new_tokens=section.max_new_tokens,
        batch_size=section.batch_size,
        confidence_threshold=section.confidence_threshold,
        veto_below=section.veto_below,
    )
    rollouts: dict[int, Rollout] = {}
    stats = {False: DecodeStats(), True: DecodeStats()}
    started = time.perf_counter()
    for held_out in stats:
        group = [i for i, task in enumerate(tasks) if task.held_out == held_out]
        batch, stats[held_out] = generate(model, [tasks[i].prompt.ids for i in group], config)
        rollouts.update(zip(group, batch, strict=True))
        on_batch(len(group))
    return Outputs([rollouts[i] for i in range(len(tasks))], stats, time.perf_counter() - started)


def evaluate(
    model: DiffusionLM,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    section: EvalSection,
    on_batch: Callable[[int], None] = lambda _: None,
) -> tuple[RetentionReport, dict[str, Outputs]]:
    """The retention report and the raw outputs per mode (`teacher` is the AR reference)."""
    if model.spec.format == "sdar" and "lossless" in section.modes:
        raise ConfigError(
            "mode lossless needs format preserve; this checkpoint is sdar. Drop it from eval.modes."
        )
    teacher = decode_tasks(model.teacher_decoder(), tasks, "ar", section, on_batch)
    outputs = {"teacher": teacher}
    for mode in section.modes or default_modes(model):
        outputs[mode] = (
            teacher
            if mode == "ar" and model.spec.format == "preserve"
            else decode_tasks(model, tasks, mode, section, on_batch)
        )
    reports = {name: report_mode(name, output, teacher, tasks, tokenizer) for name, output in outputs.items()}
    report = RetentionReport(
        teacher=reports.pop("teacher"),
        student=list(reports.values()),
        held_out_skills=sorted({t.skill for t in tasks if t.held_out}),
        settings={"eval": asdict(section), "block_diffusion": model.spec.to_dict()},
    )
    return report, outputs


def default_modes(model: DiffusionLM) -> tuple[Mode, ...]:
    return ("static", "threshold", "lossless") if model.spec.format == "preserve" else ("static", "threshold")


def response_text(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(rollout.text_ids), skip_special_tokens=True)).strip()


def report_mode(
    name: str, output: Outputs, teacher: Outputs, tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase
) -> ModeReport:
    correct: dict[str, list[bool]] = {}
    for task, rollout, reference in zip(tasks, output.rollouts, teacher.rollouts, strict=True):
        expected = task.answer if task.answer is not None else response_text(reference, tokenizer)
        correct.setdefault(task.skill, []).append(response_text(rollout, tokenizer) == expected.strip())
    by_skill = {skill: sum(hits) / len(hits) for skill, hits in sorted(correct.items())}
    held_out = {task.skill for task in tasks if task.held_out}
    same = [a.text_ids == b.text_ids for a, b in zip(output.rollouts, teacher.rollouts, strict=True)]
    return ModeReport(
        name=name,
        accuracy=mean(list(by_skill.values())) or 0.0,
        accuracy_seen=mean([v for k, v in by_skill.items() if k not in held_out]),
        accuracy_held_out=mean([v for k, v in by_skill.items() if k in held_out]),
        by_skill=by_skill,
        identical_to_teacher=sum(same) / len(same),
        tokens_per_forward=output.stats.tokens_per_forward,
        tokens_per_forward_seen=output.stats_by_held_out[False].tokens_per_forward,
        tokens_per_forward_held_out=output.stats_by_held_out[True].tokens_per_forward,
        tokens_per_step=output.stats.tokens_per_step,
        tokens_per_second=output.stats.num_tokens / output.seconds,
        stop_rate=sum(r.finish_reason == "stop" for r in output.rollouts) / len(output.rollouts),
        num_prompts=len(tasks),
    )


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def skill_table(report: RetentionReport) -> str:
    """Exact match per skill; held-out skills are marked."""
    modes = [report.teacher, *report.student]
    rows = ["| skill | " + " | ".join(m.name for m in modes) + " |", "|---|" + "---:|" * len(modes)]
    for skill in sorted(report.teacher.by_skill, key=lambda s: (s in report.held_out_skills, s)):
        label = f"{skill} (held out)" if skill in report.held_out_skills else skill
        rows.append(f"| {label} | " + " | ".join(percent(m.by_skill[skill]) for m in modes) + " |")
    return "\n".join(rows)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def write_outputs(
    path: Path, tasks: Sequence[Task], outputs: dict[str, Outputs], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Every generation as one JSON line."""
    with path.open("w", encoding="utf-8") as file:
        for name, output in outputs.items():
            for task, rollout in zip(tasks, output.rollouts, strict=True):
                record = {
                    "mode": name,
                    "skill": task.skill,
                    "prompt": task.text,
                    "answer": task.answer,
                    "response": response_text(rollout, tokenizer),
                    "finish_reason": rollout.finish_reason,
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
