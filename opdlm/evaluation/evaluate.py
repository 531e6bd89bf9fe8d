"""The retention report: the teacher, and the student in every decoding mode, on the same prompts.

Per skill: accuracy, share of responses identical to the teacher's, tokens per forward (all forwards count,
the prefill included). If a prompt has no answer, the teacher's greedy response is the reference. Retention is
the student's accuracy, averaged over skills, divided by the teacher's. Every score has its 95 % interval
(`intervals`). The report holds no times, so that repeated evaluations give equal reports.

In `preserve` the AR model may replace tokens of the student (`ar_accept_threshold`), which hides what the
student cannot do. Each such decoding has a second row in which nothing is replaced: the student alone.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from opdlm.config.sections import EvalSection
from opdlm.data.prompts import Task
from opdlm.decoding.decode_config import READ_BY, DecodeConfig, Mode
from opdlm.decoding.decode_state import DecodeStats
from opdlm.decoding.generate import generate
from opdlm.decoding.rollout import Rollout, num_first_unknown
from opdlm.errors import ConfigError, DataError
from opdlm.evaluation.generation_log import BATCHES_PER_PIECE, Generation, GenerationLog
from opdlm.evaluation.intervals import Interval, PairedComparison, compare_paired, mean_of_shares, wilson
from opdlm.evaluation.scoring import is_right, is_right_flexibly
from opdlm.files import write_atomic
from opdlm.modeling.diffusion_lm import DiffusionLM, DiffusionSpec
from opdlm.modeling.slots import Format
from opdlm.training.metrics import Doing, PhaseProgress

NGRAM_LENGTH = 4
"""Length of the n-grams that measure repetition."""
NUM_EXAMPLES = 3
"""Responses per mode that the report shows."""

ALONE = ", alone"
"""Ends the name of a decoding in which the AR model replaces no token."""
DENOISING_MODES = READ_BY["ar_accept_threshold"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeReport:
    """Metrics of one model in one decoding mode. Shares are between 0 and 1, intervals 95 %."""

    name: str
    accuracy: float
    """Mean over skills of the share of right answers (`eval.scoring`)."""
    accuracy_interval: Interval
    accuracy_seen: float | None
    accuracy_seen_interval: Interval | None
    accuracy_held_out: float | None
    accuracy_held_out_interval: Interval | None
    accuracy_flexible: float | None
    """Share of responses whose last number is correct; only with eval.scoring=gsm8k."""
    by_skill: dict[str, float]
    by_skill_interval: dict[str, Interval]
    against_teacher: dict[str, PairedComparison]
    """Paired by prompt: all skills, and seen and held-out skills if there are both."""
    identical_to_teacher: float
    """Share of responses equal to the teacher's, token for token."""
    identical_to_teacher_interval: Interval
    common_prefix: float
    """Share of the teacher's tokens before the first difference, averaged over responses."""
    replaced: float | None
    """Share of response tokens that the AR model put in place of the student's; None where it cannot."""
    from_ar: float | None = None
    """Share of response tokens that the AR model wrote: these, and those that were the first unknown token
    when they were revealed. None but for denoising modes of `preserve`.
    """
    tokens_per_forward: float
    tokens_per_forward_seen: float
    tokens_per_forward_held_out: float
    tokens_per_step: float
    stop_rate: float
    """Share of responses that end with a stop token."""
    mean_response_tokens: float
    repetition: float
    """Share of 4-grams that occurred earlier in the same response, averaged over responses."""
    num_prompts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionReport:
    """The teacher's metrics, and the student's in every mode."""

    teacher: ModeReport
    student: list[ModeReport]
    held_out_skills: list[str]
    num_answered: int
    """Prompts with an answer; for the others the teacher's response is the reference."""

    def retention(self, mode: ModeReport) -> float:
        """The student's accuracy divided by the teacher's; 0 if the teacher's is 0."""
        return mode.accuracy / self.teacher.accuracy if self.teacher.accuracy else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The entries of `retention.json`, with tuples instead of lists."""
        return asdict(self) | {"student": [self.with_retention(mode) for mode in self.student]}

    def with_retention(self, mode: ModeReport) -> dict[str, Any]:
        """The metrics of a mode and its retention."""
        return asdict(mode) | {"retention": self.retention(mode)}


@dataclass(frozen=True, slots=True)
class Outputs:
    """Responses of one model in one mode and their keys in the log, in the order of the tasks."""

    generations: list[Generation]
    keys: list[str]

    @property
    def rollouts(self) -> list[Rollout]:
        return [generation.rollout for generation in self.generations]

    @property
    def tokens_per_second(self) -> float:
        num_tokens = sum(generation.rollout.num_response for generation in self.generations)
        return num_tokens / sum(generation.seconds for generation in self.generations)


def decode_tasks(
    model: DiffusionLM,
    tasks: Sequence[Task],
    mode: Mode,
    section: EvalSection,
    log: GenerationLog | None = None,
    name: str = "",
    seed: int = 0,
    console: Console | None = None,
    doing: Doing | None = None,
) -> Outputs:
    """Responses to all tasks, in pieces of prompts of similar length; those in the log are decoded once.

    `name`, and `seed` at a temperature above 0, are part of a response's key in the log. `console` shows the
    progress, or `doing` is told of it.
    """
    is_alone = mode in DENOISING_MODES and not section.decode.ar_accept_threshold
    label = name or (f"{mode}{ALONE}" if is_alone else mode)
    config = replace(section.decode, mode=mode).repeatable()
    keys = [decoding_key(log, name or mode, config, task, seed) for task in tasks]
    done = dict(log.finished) if log else {}
    order = sorted(range(len(tasks)), key=lambda i: (tasks[i].held_out, len(tasks[i].prompt.ids)))
    missing = [i for i in order if keys[i] not in done]
    size = BATCHES_PER_PIECE * config.batch_size
    with PhaseProgress(f"evaluate {label}", len(tasks), console, doing) as progress:
        progress.skip(len(tasks) - len(missing))
        for first in range(0, len(order), size):
            chosen = [i for i in order[first : first + size] if keys[i] not in done]
            prompts = [tasks[i].prompt.ids for i in chosen]
            started = time.perf_counter()
            piece = generate(
                model, prompts, config, [prompt_seed(seed, ids) for ids in prompts], progress.on_step
            )
            seconds = (time.perf_counter() - started) / max(1, len(chosen))
            fresh = {keys[i]: Generation(r, seconds) for i, r in zip(chosen, piece, strict=True)}
            if log and fresh:
                log.add(fresh)
            done |= fresh
            progress.advance(len(chosen))
    return Outputs([done[key] for key in keys], keys)


def decoding_key(
    log: GenerationLog | None, name: str, config: DecodeConfig, task: Task, seed: int = 0
) -> str:
    """Key of a response in the log; without a log, the index of the task."""
    if log is None:
        return str(task.prompt.index)
    used = {k: v for k, v in asdict(config).items() if config.mode in READ_BY.get(k, (config.mode,))}
    del used["batch_size"]
    sampling = {"seed": seed} if config.temperature else {}
    return log.key(used | {"name": name} | sampling, task.prompt.ids)


def prompt_seed(seed: int, prompt_ids: Sequence[int]) -> int:
    """Seed of a prompt's draws, which therefore do not depend on its batch."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, list(prompt_ids)]).encode()).digest()[:7])


def evaluate(
    model: DiffusionLM,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    section: EvalSection,
    log: GenerationLog | None = None,
    seed: int = 0,
    teacher: Outputs | None = None,
    console: Console | None = None,
    doing: Doing | None = None,
) -> tuple[RetentionReport, dict[str, Outputs]]:
    """The retention report, and the outputs by mode. `teacher`: its outputs in mode `ar`, if decoded already.

    ConfigError or DataError if checkpoint, tasks and settings do not fit together.
    """
    check_modes(model.spec, tasks, section)
    if teacher is None:
        teacher = decode_tasks(
            model.teacher_decoder(), tasks, "ar", section, log, "teacher", seed, console, doing
        )
    outputs = {"teacher": teacher}
    replacing = set()
    for mode in section.modes or default_modes(model):
        if mode == "ar" and model.spec.format == "preserve":
            outputs[mode] = teacher
            continue
        outputs[mode] = decode_tasks(
            model, tasks, mode, section, log, seed=seed, console=console, doing=doing
        )
        if can_replace(model.spec, mode, section):
            replacing.add(mode)
            outputs[mode + ALONE] = decode_tasks(
                model, tasks, mode, student_alone(section), log, seed=seed, console=console, doing=doing
            )
    run_tests(outputs.values(), tasks, tokenizer, console, doing)
    reports = {
        name: report_mode(
            name, output, teacher, tasks, tokenizer, is_replacing=name in replacing, fmt=model.spec.format
        )
        for name, output in outputs.items()
    }
    report = RetentionReport(
        teacher=reports.pop("teacher"),
        student=list(reports.values()),
        held_out_skills=sorted({t.skill for t in tasks if t.held_out}),
        num_answered=sum(bool(task.answers) for task in tasks),
    )
    return report, outputs


def run_tests(
    outputs: Collection[Outputs],
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    console: Console | None,
    doing: Doing | None,
) -> None:
    """Where responses are programs, run them all, which may take minutes; the scores are found again."""
    if not any(task.scoring == "code" for task in tasks):
        return
    with PhaseProgress("run tests", len(outputs) * len(tasks), console, doing) as progress:
        for output in outputs:
            for task, rollout in zip(tasks, output.rollouts, strict=True):
                score_responses([task], [response_text(rollout, tokenizer)], [""])
                progress.advance(1)


def can_replace(spec: DiffusionSpec, mode: Mode, section: EvalSection) -> bool:
    """Whether the AR model replaces tokens of the student that it finds unlikely."""
    return spec.format == "preserve" and mode in DENOISING_MODES and section.decode.ar_accept_threshold > 0


def student_alone(section: EvalSection) -> EvalSection:
    """The same settings, with which the AR model replaces no token of the student."""
    return replace(section, decode=replace(section.decode, ar_accept_threshold=0.0))


def score_of(report: RetentionReport) -> float:
    """What a student is worth, higher is better: tokens per forward × retention of lossless decoding. Where
    that is not measured, of the worst decoding in which the AR model replaces nothing.
    """
    modes = [mode for mode in report.student if mode.name == "lossless"]
    alone = modes or [mode for mode in report.student if mode.replaced is None]
    return min(mode.tokens_per_forward * report.retention(mode) for mode in alone)


def check_modes(spec: DiffusionSpec, tasks: Sequence[Task], section: EvalSection) -> None:
    """ConfigError or DataError if checkpoint or prompts do not support the settings of `eval`."""
    if spec.format == "sdar" and "lossless" in section.modes:
        raise ConfigError(
            "mode lossless needs format preserve; this checkpoint is sdar. Drop it from eval.modes."
        )
    if section.decode.temperature and not all(task.answers for task in tasks):
        raise DataError(
            f"{section.path} has prompts without `answer`, whose reference is the teacher's greedy response; "
            f"at eval.decode.temperature ({section.decode.temperature:g}) there is none. Give answers or "
            "use temperature 0."
        )


def default_modes(model: DiffusionLM) -> tuple[Mode, ...]:
    """Modes that are evaluated if `eval.modes` is empty."""
    if not model.spec.can_denoise:
        return ("lossless",)
    return ("static", "threshold", "lossless") if model.spec.format == "preserve" else ("static", "threshold")


def response_text(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a response, stripped, without special tokens."""
    return str(tokenizer.decode(list(rollout.text_ids), skip_special_tokens=True)).strip()


def report_mode(
    name: str,
    output: Outputs,
    teacher: Outputs,
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    *,
    is_replacing: bool = False,
    fmt: Format = "sdar",
) -> ModeReport:
    """Metrics of the outputs of one mode; `teacher`: the reference outputs of the same tasks; `is_replacing`:
    whether the AR model could replace tokens; `fmt`: the student's format.
    """
    texts = [response_text(rollout, tokenizer) for rollout in output.rollouts]
    references = [response_text(rollout, tokenizer) for rollout in teacher.rollouts]
    right = score_responses(tasks, texts, references)
    reference = score_responses(tasks, references, references)
    pairs: dict[str, list[tuple[bool, bool]]] = {}
    for task, pair in sorted(zip(tasks, zip(reference, right, strict=True), strict=True), key=skill_of):
        pairs.setdefault(task.skill, []).append(pair)
    held_out = {task.skill for task in tasks if task.held_out}
    groups = {
        "all": pairs,
        "seen": {skill: p for skill, p in pairs.items() if skill not in held_out},
        "held_out": {skill: p for skill, p in pairs.items() if skill in held_out},
    }
    scores = {group: mean_over_skills(of_group) for group, of_group in groups.items() if of_group}
    overall = scores["all"]
    both = list(zip(output.rollouts, teacher.rollouts, strict=True))
    same = sum(ours.text_ids == theirs.text_ids for ours, theirs in both)
    stats = {
        "all": DecodeStats.of(output.rollouts),
        "seen": DecodeStats.of([r for r, t in zip(output.rollouts, tasks, strict=True) if not t.held_out]),
        "held_out": DecodeStats.of([r for r, t in zip(output.rollouts, tasks, strict=True) if t.held_out]),
    }
    return ModeReport(
        name=name,
        accuracy=overall[0],
        accuracy_interval=overall[1],
        accuracy_seen=scores["seen"][0] if "seen" in scores else None,
        accuracy_seen_interval=scores["seen"][1] if "seen" in scores else None,
        accuracy_held_out=scores["held_out"][0] if "held_out" in scores else None,
        accuracy_held_out_interval=scores["held_out"][1] if "held_out" in scores else None,
        accuracy_flexible=flexible_accuracy(texts, tasks),
        by_skill={skill: accuracy_of(p) for skill, p in pairs.items()},
        by_skill_interval={skill: wilson(sum(r for _, r in p), len(p)) for skill, p in pairs.items()},
        against_teacher={group: compare_paired(groups[group]) for group in scores},
        identical_to_teacher=same / len(tasks),
        identical_to_teacher_interval=wilson(same, len(tasks)),
        common_prefix=sum(common_prefix(ours, theirs) for ours, theirs in both) / len(tasks),
        replaced=share_replaced(output.rollouts) if is_replacing else None,
        from_ar=share_first_unknown(output.rollouts)
        if fmt == "preserve" and name.removesuffix(ALONE) in DENOISING_MODES
        else None,
        tokens_per_forward=stats["all"].tokens_per_forward,
        tokens_per_forward_seen=stats["seen"].tokens_per_forward,
        tokens_per_forward_held_out=stats["held_out"].tokens_per_forward,
        tokens_per_step=stats["all"].tokens_per_step,
        stop_rate=sum(r.finish_reason == "stop" for r in output.rollouts) / len(tasks),
        mean_response_tokens=stats["all"].num_tokens / len(tasks),
        repetition=sum(map(repetition, output.rollouts)) / len(tasks),
        num_prompts=len(tasks),
    )


def score_responses(tasks: Sequence[Task], texts: Sequence[str], references: Sequence[str]) -> list[bool]:
    """Whether each response is correct; the reference is the answer of a task without one."""
    return [
        any(is_right(text, answer, task.scoring) for answer in task.answers or (reference,))
        for task, text, reference in zip(tasks, texts, references, strict=True)
    ]


def skill_of(item: tuple[Task, Any]) -> str:
    return item[0].skill


def accuracy_of(pairs: Sequence[tuple[bool, bool]]) -> float:
    return sum(right for _, right in pairs) / len(pairs)


def mean_over_skills(pairs: dict[str, list[tuple[bool, bool]]]) -> tuple[float, Interval]:
    """Accuracy averaged over skills, and its interval, from (reference, response) correctness."""
    counts = [(sum(right for _, right in p), len(p)) for p in pairs.values()]
    return sum(map(accuracy_of, pairs.values())) / len(pairs), mean_of_shares(counts)


def flexible_accuracy(texts: Sequence[str], tasks: Sequence[Task]) -> float | None:
    """Share of responses whose last number is correct; None without GSM8K tasks."""
    return mean(
        [
            float(any(is_right_flexibly(text, answer) for answer in task.answers))
            for text, task in zip(texts, tasks, strict=True)
            if task.answers and task.scoring == "gsm8k"
        ]
    )


def common_prefix(ours: Rollout, theirs: Rollout) -> float:
    """Share of `theirs` before the first token in which `ours` differs."""
    pairs = zip(ours.text_ids, theirs.text_ids, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) / theirs.num_response


def share_replaced(rollouts: Sequence[Rollout]) -> float:
    """Share of the response tokens that the AR model put in place of the student's."""
    return sum(r.num_replaced for r in rollouts) / sum(r.num_response for r in rollouts)


def share_first_unknown(rollouts: Sequence[Rollout]) -> float:
    """Share of the response tokens that were the first unknown one when they were revealed. In `preserve` the
    AR model wrote these, those that it replaced among them.
    """
    num_first = sum(num_first_unknown(r.unmask_step[: r.num_response]) for r in rollouts)
    return num_first / sum(r.num_response for r in rollouts)


def repetition(rollout: Rollout) -> float:
    """Share of n-grams that occurred earlier in the response."""
    ids = rollout.text_ids
    ngrams = [ids[i : i + NGRAM_LENGTH] for i in range(len(ids) - NGRAM_LENGTH + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def differing_examples(
    tasks: Sequence[Task],
    outputs: dict[str, Outputs],
    tokenizer: PreTrainedTokenizerBase,
    per_mode: int = NUM_EXAMPLES,
) -> list[dict[str, Any]]:
    """Up to `per_mode` differing responses per mode; first those of which exactly one is correct."""
    texts = {name: [response_text(r, tokenizer) for r in out.rollouts] for name, out in outputs.items()}
    references = texts.pop("teacher")
    teacher_right = score_responses(tasks, references, references)
    examples = []
    for name, responses in texts.items():
        right = score_responses(tasks, responses, references)
        differing = [i for i, response in enumerate(responses) if response != references[i]]
        examples += [
            {
                "mode": name,
                "skill": tasks[i].skill,
                "prompt": tasks[i].text,
                "answer": tasks[i].answer,
                "teacher": references[i],
                "student": responses[i],
                "teacher_is_right": teacher_right[i],
                "student_is_right": right[i],
            }
            for i in sorted(differing, key=lambda i: right[i] == teacher_right[i])[:per_mode]
        ]
    return examples


def write_outputs(
    path: Path, tasks: Sequence[Task], outputs: dict[str, Outputs], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write every response as a JSON line, in place of the log, which can read these lines."""
    lines = []
    for name, output in outputs.items():
        for task, generation, key in zip(tasks, output.generations, output.keys, strict=True):
            record = {
                "mode": name,
                "skill": task.skill,
                "prompt": task.text,
                "answer": task.answer,
                "response": response_text(generation.rollout, tokenizer),
                "key": key,
            }
            lines.append(json.dumps(record | generation.to_record(), ensure_ascii=False) + "\n")
    write_atomic(path, "".join(lines))
