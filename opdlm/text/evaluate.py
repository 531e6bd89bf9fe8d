"""`opdlm eval --text`: the likelihood of a file of text, or the ranking of options in a file of questions.

By default a model is measured on what it was trained to predict; a metric that it cannot have is an error if
the user names it. Texts are cut into the rows that the model was trained on. Numbers per token compare only
between models with the same tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from opdlm.data.documents import PackedDataset, load_documents
from opdlm.data.rows import evenly_spaced, read_rows
from opdlm.errors import ConfigError, DataError
from opdlm.evaluation.retention import student_names, versions
from opdlm.files import write_atomic
from opdlm.reporting.tables import NOTHING, Table, percent, with_interval
from opdlm.text.likelihood import RowNats
from opdlm.text.likelihood_models import METRICS, LikelihoodModel, LikelihoodOptions, load_likelihood_model
from opdlm.text.options import rank_options, read_questions

OPTIONS = "options"
"""As a metric: the file must hold questions."""
RESULT_FILE = "text_likelihood.json"
DEFAULT_ROWS = 64
Values = dict[str, Any]


def evaluate_text(
    folders: Sequence[Path],
    path: str,
    metrics: Sequence[str],
    limit: int | None,
    options: LikelihoodOptions,
    out: Path | None = None,
) -> Table:
    """Measure every folder on the file, and write all numbers to `out`.

    metrics: if empty, all that a model was trained for. limit: number of rows (default 64) or of questions
    (default all), evenly spaced.
    """
    check_arguments(metrics, limit, options)
    is_questions = any(OPTIONS in row for _, row in read_rows(path))
    if OPTIONS in metrics and not is_questions:
        raise DataError(f"--metrics options needs rows with `prompt`, `options`, `answer`; {path} has none.")
    named = [name for name in metrics if name != OPTIONS]
    measure = measure_questions if is_questions else measure_rows
    models = []
    for folder, name in zip(folders, student_names(folders), strict=True):
        model = load_likelihood_model(folder, options)
        measured = measure(model, model.choose_metrics(named, folder), path, limit)
        models.append({"name": name, "folder": str(folder), "trained": model.trained, **measured})
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        settings = {"path": path, "limit": limit, **asdict(options)}
        result = {"settings": settings, "versions": versions(), "models": models}
        write_atomic(out / RESULT_FILE, json.dumps(result, indent=2))
    return options_table(models) if is_questions else nats_table(models)


def check_arguments(metrics: Sequence[str], limit: int | None, options: LikelihoodOptions) -> None:
    """Raises ConfigError before any model is loaded."""
    known = (*METRICS, OPTIONS)
    for name in metrics:
        if name not in known:
            raise ConfigError(f"--metrics: {name} is none of {', '.join(known)}.")
    if options.num_rates < 2 or options.num_rates % 2:
        raise ConfigError(
            f"--num-rates ({options.num_rates}) must be even and positive: pairs of rates give the error."
        )
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit ({limit}) must be at least 1.")
    for override in options.overrides:
        if not override.startswith("data."):
            raise ConfigError(
                f"{override}: with --text only data.* keys matter, for example data.sequence_length=128."
            )


def measure_rows(model: LikelihoodModel, metrics: Sequence[str], path: str, limit: int | None) -> Values:
    """Nats of rows of the text, which is cut as in the training of the model. DataError if all of them hold
    parts of prompts only.
    """
    section = replace(model.data, path=path)
    documents = load_documents(section, model.tokenizer, model.diffusion_lm.spec.mask_token_id, "--text")
    rows = PackedDataset(documents, section, 0, "--text").evenly(limit or DEFAULT_ROWS)
    if all(bool(row.is_given_R.all()) for row in rows):
        raise DataError(
            f"--text ({path}): the {len(rows)} rows that are measured hold prompts and no responses. Give a "
            f"larger --limit, or a larger data.sequence_length ({model.data.sequence_length})."
        )
    found = {name: nats_values(model.scores[name](rows, 0)) for name in metrics}
    return {"metrics": found, "num_rows": len(rows), "sequence_length": model.data.sequence_length}


def nats_values(nats: RowNats) -> Values:
    return {
        "per_token": nats.per_token,
        "standard_error": nats.standard_error,
        "total": float(nats.nats_B.sum()),
        "num_tokens": int(nats.tokens_B.sum()),
    }


def measure_questions(model: LikelihoodModel, metrics: Sequence[str], path: str, limit: int | None) -> Values:
    """How well every metric ranks the options."""
    rows = read_rows(path)
    chosen = evenly_spaced(rows, limit or len(rows))
    mask_token_id = model.diffusion_lm.spec.mask_token_id
    questions = read_questions(chosen, model.tokenizer, mask_token_id, model.context_length)
    return {"metrics": {name: asdict(rank_options(model.scores[name], questions)) for name in metrics}}


def nats_table(models: Sequence[Values]) -> Table:
    """A row per model, a column per metric."""
    names = [name for name in METRICS if any(name in model["metrics"] for model in models)]
    rows = []
    for model in models:
        cells = [nats_cell(model["metrics"].get(name)) for name in names]
        num_tokens = max(found["num_tokens"] for found in model["metrics"].values())
        rows.append([model["name"], model["trained"], *cells, str(num_tokens)])
    return Table(
        title="Nats per token",
        head=["model", "trained", *names, "tokens"],
        rows=rows,
        note="md_bound is an upper bound of the negative log-likelihood at t ~ U(0, 1), whatever mask rates "
        "were trained; ± is the standard error from drawing masks.",
    )


def nats_cell(found: Values | None) -> str:
    if found is None:
        return NOTHING
    error = found["standard_error"]
    return f"{found['per_token']:.4f}" + (f" ± {error:.4f}" if error else "")


def options_table(models: Sequence[Values]) -> Table:
    """A row per model and metric."""
    rows = [
        [
            model["name"],
            name,
            with_interval(found["accuracy"], found["accuracy_interval"]),
            percent(found["accuracy_per_token"]),
            f"{found['delta_nll']:.3f}",
            f"{found['delta_nll_per_token']:.3f}",
            f"{found['right_per_token']:.4f}",
            str(found["num_questions"]),
        ]
        for model in models
        for name, found in model["metrics"].items()
    ]
    return Table(
        title="Options ranked",
        head=[
            "model",
            "by",
            "accuracy",
            "per token",
            "ΔNLL",
            "ΔNLL per token",
            "nats per token",
            "questions",
        ],
        rows=rows,
        note="The option with the fewest nats is chosen; `per token` divides by its length. ΔNLL: wrong "
        "minus right, in nats. In brackets: 95 % interval.",
    )
