"""`opdlm eval` of converted folders: load, decode, score, compare, write the report.

One student, or several on the same prompts. Repeated evaluations give equal numbers, except times; an
interrupted one resumes. Not here: metrics (`evaluate`), scoring of a response (`scoring`), pages
(`reporting.pages`).
"""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from opdlm import __version__
from opdlm.checkpoints.load import check_fits, load, load_causal_lm, read_spec, vocabulary_rows
from opdlm.config.loader import apply_override, build_section
from opdlm.config.rules import check_config, load_config
from opdlm.config.sections import CONFIG_COPY, Config, EvalSection, resolve_path
from opdlm.data.prompts import Task, load_tasks
from opdlm.data.rows import evenly_spaced
from opdlm.errors import ConfigError, DataError, require_package
from opdlm.evaluation.evaluate import (
    ModeReport,
    Outputs,
    RetentionReport,
    check_modes,
    decode_tasks,
    differing_examples,
    evaluate,
    report_mode,
    student_alone,
    write_outputs,
)
from opdlm.evaluation.generation_log import GenerationLog, fingerprint
from opdlm.evaluation.likelihood import agreement_report, likelihood_report
from opdlm.evaluation.speed import measure_speed
from opdlm.files import MANIFEST, write_manifest
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.reporting.pages import write_comparison, write_retention
from opdlm.training.metrics import PhaseProgress, read_metrics
from opdlm.training.run_folder import read_changes

MODEL_FOLDER = "model"
HELD_BACK_FILE = "held_back.jsonl"
"""Prompts that the run did not train on, where it had no eval.path."""
RESULTS_FILE = "all_results.json"
SAME_FOR_ALL = ("path", "scoring", "limit", "decode.max_new_tokens", "decode.temperature", "seeds")
"""Settings of `eval` that students must share to be comparable."""
NUM_REPEATS = 2
"""How often the speed of lossless decoding is measured for a report."""
SEED_METRICS = ("accuracy", "accuracy_seen", "accuracy_held_out", "retention", "tokens_per_forward")
"""Metrics whose spread over seeds is reported."""


def versions() -> dict[str, str]:
    """Versions and threads on which numbers may depend."""
    return {
        "opdlm": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }


def run_results(output_dir: Path) -> dict[str, Any]:
    """Time, versions and last metrics of a run, and which settings changed on its way."""
    metrics = read_metrics(output_dir / "metrics.jsonl")
    seconds = sum(row["seconds"] for row in metrics)  # over all parts of a resumed run
    results = {"train_seconds": round(seconds, 1), "versions": versions(), **(metrics[-1] if metrics else {})}
    return results | {"changed_settings": read_changes(output_dir)}


def read_config_of(folder: Path) -> Config:
    """The settings of the run that wrote a converted folder."""
    path = folder / CONFIG_COPY
    if not path.is_file():
        raise DataError(f"{folder} has no {CONFIG_COPY}: it was not written by opdlm convert.")
    return load_config(path)


def recorded_eval(folder: Path) -> Config:
    """The settings of the run that made the folder, with the held-back prompts where `eval.path` was empty.
    Its permission to run code is not taken over: folders come from elsewhere too.
    """
    record = read_config_of(folder)
    path, held_back = record.eval.path, folder / HELD_BACK_FILE
    if not path and held_back.is_file():
        path = str(held_back)
    return replace(record, eval=replace(record.eval, path=path, run_code=False))


def eval_config(folder: Path, overrides: Sequence[str]) -> Config:
    """`recorded_eval` with other `eval.*` keys."""
    record = recorded_eval(folder)
    values = {"eval": record.to_dict()["eval"]}
    for override in overrides:
        if not override.startswith("eval."):
            raise ConfigError(f"{override}: only eval.* keys matter here, for example eval.limit=10.")
        apply_override(values, override)
    config = replace(record, eval=build_section(Config, values).eval)
    check_config(config)
    return config


def load_for_evaluation(folder: Path, teacher_path: str, dtype: str) -> tuple[DiffusionLM, Any]:
    """Load a converted folder, and its teacher from `teacher_path` if the folder lacks it, on this process's
    device.
    """
    model, tokenizer = load(folder, dtype, str(PartialState().device))
    if model.spec.format == "sdar" and not model.spec.adapter:
        teacher = load_causal_lm(teacher_path, dtype)
        rows = vocabulary_rows(model.student)
        if rows != vocabulary_rows(teacher):
            teacher.resize_token_embeddings(rows, mean_resizing=False)
        teacher.to(model.device)  # type: ignore[arg-type]
        model = DiffusionLM(model.student, model.spec, teacher=teacher).eval()
    return model, tokenizer


def load_eval_tasks(model: DiffusionLM, tokenizer: PreTrainedTokenizerBase, config: Config) -> list[Task]:
    """The tasks of `eval.path`; ConfigError or DataError if they do not fit the settings or the model."""
    if config.eval.scoring == "math":
        require_package("math_verify", "eval", "eval.scoring (math)")
    tasks = load_tasks(
        config.eval.path,
        tokenizer,
        model.spec.mask_token_id,
        limit=config.eval.limit,
        enable_thinking=config.data.enable_thinking,
        date=config.data.date,
        scoring=config.eval.scoring,
    )
    unanswered = [task.text for task in tasks if not task.answers]
    if unanswered and config.eval.scoring != "exact":
        raise DataError(
            f"eval.scoring ({config.eval.scoring}) needs an `answer` in every row of eval.path; the prompt "
            f"{unanswered[0]!r:.60} has none. Add it, or set eval.scoring=exact."
        )
    check_modes(model.spec, tasks, config.eval)
    check_fits(
        model,
        [task.prompt.ids for task in tasks],
        config.eval.decode.max_new_tokens,
        "eval.decode.max_new_tokens",
    )
    return tasks


def open_log(out: Path, folder: Path, teacher_path: str, dtype: str) -> GenerationLog:
    """The log of an evaluation in `out`; its keys depend on the weights of student and teacher."""
    weights = [fingerprint(str(folder)), fingerprint(resolve_path(teacher_path)), dtype]
    return GenerationLog(out / "generations.jsonl", json.dumps(weights))


def measure_folder(
    folder: Path,
    config: Config,
    out: Path | None = None,
    teacher_path: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """The report of a converted folder as JSON values, written to `out` if given. `console` shows the
    progress.
    """
    teacher_path = teacher_path or config.model.path
    model, tokenizer = load_for_evaluation(folder, teacher_path, config.model.dtype)
    tasks = load_eval_tasks(model, tokenizer, config)
    log = open_log(out, folder, teacher_path, config.model.dtype) if out else None
    report, outputs = measure_model(model, tokenizer, tasks, config.eval, log, console)
    if model.spec.format == "preserve" and config.eval.timed_prompts:
        report["speed"] = measure_lossless_speed(folder, model, tasks, config, console)
    report["settings"] = {
        "student": str(folder),
        "teacher": teacher_path,
        "seeds": list(range(config.eval.seeds)),
        "versions": versions(),
        "block_diffusion": model.spec.to_dict(),
        "config": config.to_dict(),
    }
    if log is not None:
        write_outputs(log.path, tasks, outputs, tokenizer)
        write_retention(log.path.parent, report, str(folder))
        if (log.path.parent / MANIFEST).is_file():  # the report of a folder in itself
            write_manifest(log.path.parent)
    return report


def measure_lossless_speed(
    folder: Path,
    model: DiffusionLM,
    tasks: Sequence[Task],
    config: Config,
    console: Console | None,
) -> dict[str, Any]:
    """Speed of lossless decoding with the student's drafts beside AR decoding, on `eval.timed_prompts`
    prompts.

    The entries of `bench.json`, measured as `opdlm bench` does, one prompt at a time. Copied drafts, which
    need no student, are left out unless `eval.decode` asks for them.
    """
    ar_model = load_causal_lm(str(folder), config.model.dtype)
    ar_model.to(model.device)  # type: ignore[arg-type]
    prompts = [task.prompt.ids for task in evenly_spaced(tasks, config.eval.timed_prompts)]
    decode = config.eval.decode
    rows = measure_speed(
        model,
        ar_model,
        prompts,
        ("ar", "lossless"),
        (1,),
        config=replace(
            decode, forward_overhead=None, prompt_lookup_num_tokens=decode.prompt_lookup_num_tokens or 0
        ),
        repeats=NUM_REPEATS,
        console=console,
    )
    settings = {"prompts": len(prompts), "file": config.eval.path, "repeats": NUM_REPEATS}
    return {"settings": settings, "rows": [asdict(row) for row in rows]}


def measure_model(
    model: DiffusionLM,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    section: EvalSection,
    log: GenerationLog | None = None,
    console: Console | None = None,
) -> tuple[dict[str, Any], dict[str, Outputs]]:
    """The report as JSON values, and the outputs by name. Tokens per second are under `timing`.

    With several seeds the report is that of seed 0, and `over_seeds` holds the spread of its main metrics.
    """
    results = [
        evaluate(model, tokenizer, tasks, section, log, seed, console=console)
        for seed in range(section.seeds)
    ]
    report, outputs = results[0]
    with PhaseProgress("compare with the teacher", 1, console) as progress:
        values = report.to_dict() | text_metrics(model, outputs, section)
        progress.advance(1)
    values["examples"] = differing_examples(tasks, outputs, tokenizer)
    values["timing"] = {name: output.tokens_per_second for name, output in outputs.items()}
    decodings = dict(outputs)
    for seed, (_, other) in enumerate(results[1:], 1):
        decodings |= {f"{name}, seed {seed}": output for name, output in other.items()}
    if len(results) > 1:
        values["over_seeds"] = spread_over_seeds([report for report, _ in results])
    if section.thresholds:
        points = trade_off(model, tokenizer, tasks, section, outputs["teacher"], log, console)
        values["trade_off"] = [
            {"confidence_threshold": threshold} | report.with_retention(mode)
            for threshold, (mode, _) in points.items()
        ]
        decodings |= {f"threshold {threshold:g}": output for threshold, (_, output) in points.items()}
    return values, decodings


def trade_off(
    model: DiffusionLM,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    section: EvalSection,
    teacher: Outputs,
    log: GenerationLog | None = None,
    console: Console | None = None,
) -> dict[float, tuple[ModeReport, Outputs]]:
    """Accuracy against tokens per forward: threshold decoding at each of `eval.thresholds`, by the student
    alone.
    """
    points = {}
    if model.spec.format == "preserve":
        section = student_alone(section)
    for threshold in section.thresholds:
        at = replace(section, decode=replace(section.decode, confidence_threshold=threshold))
        output = decode_tasks(model, tasks, "threshold", at, log, console=console)
        points[threshold] = (
            report_mode("threshold", output, teacher, tasks, tokenizer, fmt=model.spec.format),
            output,
        )
    return points


def spread_over_seeds(reports: Sequence[RetentionReport]) -> dict[str, dict[str, Any]]:
    """Mean and sample standard deviation per mode and metric; None for missing metrics."""
    measured: dict[str, list[dict[str, Any]]] = {}
    for report in reports:
        for mode in (report.teacher, *report.student):
            measured.setdefault(mode.name, []).append(report.with_retention(mode))
    return {
        name: {key: mean_and_deviation([row[key] for row in rows]) for key in SEED_METRICS}
        for name, rows in measured.items()
    }


def mean_and_deviation(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Over the values that are not None."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"mean": statistics.fmean(known), "standard_deviation": statistics.stdev(known), "by_seed": known}


def text_metrics(model: DiffusionLM, outputs: dict[str, Outputs], section: EvalSection) -> dict[str, Any]:
    """Agreement and likelihood of the responses, if `eval` enables them."""
    metrics: dict[str, Any] = {}
    if section.agreement:
        metrics["agreement"] = {
            name: agreement_report(model, output.rollouts, section.decode.batch_size)
            for name, output in outputs.items()
            if name != "teacher"
        }
    if section.likelihood_samples:
        texts = outputs["teacher"].rollouts
        metrics["likelihood"] = likelihood_report(
            model, texts, section.likelihood_samples, section.decode.batch_size
        )
    return metrics


def compare_folders(
    folders: Sequence[Path],
    configs: Sequence[Config],
    out: Path,
    teacher_path: str | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Evaluate several students, each in a folder of `out`, and write a table of all. ConfigError or
    DataError if they are not comparable.
    """
    check_comparable(folders, configs)
    students = []
    for folder, config, name in zip(folders, configs, student_names(folders), strict=True):
        results = json.loads((folder / RESULTS_FILE).read_text())
        report = measure_folder(folder, config, out / name, teacher_path, console)
        students.append(
            {
                "name": name,
                "folder": str(folder),
                "format": f"{config.format.name} {config.format.block_size}",
                "objective": config.loss.objective,
                "rollout_tokens": results["rollout_tokens"],
                "report": report,
            }
        )
    write_comparison(out, students)
    return students


def check_comparable(folders: Sequence[Path], configs: Sequence[Config]) -> None:
    """ConfigError or DataError if the students are not comparable; called before evaluation."""
    for folder, config in zip(folders, configs, strict=True):
        if len([f for f in folders if f.resolve() == folder.resolve()]) > 1:
            raise ConfigError(f"{folder} is named twice: give every student once.")
        if not (folder / RESULTS_FILE).is_file():
            raise DataError(f"{folder} has no {RESULTS_FILE}: it was not written by opdlm convert.")
        check_modes(read_spec(folder), [], config.eval)
        for key in SAME_FOR_ALL:
            ours, first = config.flat()[f"eval.{key}"], configs[0].flat()[f"eval.{key}"]
            if ours != first:
                raise ConfigError(
                    f"eval.{key} is {first!r} for {folders[0]} and {ours!r} for {folder}, which would not be "
                    f"comparable: give one eval.{key} for all."
                )


def student_names(folders: Sequence[Path]) -> list[str]:
    """Display names: `a` for runs/a/model; equal names are numbered."""
    resolved = [folder.resolve() for folder in folders]
    names = [path.parent.name if path.name == MODEL_FOLDER else path.name for path in resolved]
    return [f"{name}-{i}" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]
