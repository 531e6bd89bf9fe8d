"""Model cards: `README.md` of a result folder, with metadata for the Hub.

`huggingface_hub` writes the metadata; the text comes from templates of this package, so no network is needed.
Base model and data sets are named if they are on the Hub. The licence is that of the base's card where that
is on this machine, in the folder of the base or in the cache of the Hub; otherwise it is unknown, and
`checkpoints.hub` looks for it when the folder is published.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from opdlm.checkpoints.hub import card_license
from opdlm.config.sections import BUNDLED, Config, SourceSection, resolve_path
from opdlm.config.text import TextConfig
from opdlm.reporting.tables import measured_text
from opdlm.reporting.verdict import timed_lossless

TEMPLATES = Path(__file__).parents[1] / "templates"
SPEED_METRICS = {
    "tokens_per_forward": "tokens per forward",
    "over_fastest_ar": "speed over the fastest AR decoding",
}
FILE_SUFFIXES = (".json", ".jsonl", ".parquet", ".gz", ".zst")


def model_card(config: Config, results: dict[str, Any], report: dict[str, Any] | None) -> str:
    """Card of a folder written by `opdlm convert`; `report` as in `retention.json`."""
    preserve = config.format.name == "preserve"
    name = Path(config.output_dir).name
    data = card_data(
        config,
        config.model.path,
        "adapter" if preserve else "finetune",
        ["opdlm", "diffusion", "block-diffusion"],
        **(model_index(name, evaluation_set(report), measured_values(report)) if report else {}),
    )
    return rendered(
        data,
        "convert_card.md",
        results,
        config=config,
        name=source.name if (source := Path(config.model.path)).is_dir() else config.model.path,
        tokens=f"{results.get('rollout_tokens', 0):,.0f}",
        ar_meaning="the teacher, bit for bit" if preserve else "the student's weights read causally",
        mode="lossless" if preserve else "threshold",
        measured=measured_text(report) if report else "",
    )


def text_card(config: TextConfig, results: dict[str, Any]) -> str:
    """Card of a folder written by `opdlm train`."""
    from_scratch = config.model.from_scratch
    name = Path(config.output_dir).name
    losses = {key: value for key, value in results.items() if key.startswith("heldout_")}
    values = {(key, f"{key} (nats per token)"): value for key, value in losses.items()}
    return rendered(
        card_data(
            config,
            None if from_scratch else config.model.path,
            "finetune",
            ["opdlm"],
            **(model_index(name, Path(config.eval.path).name, values) if losses else {}),
        ),
        "train_card.md",
        results,
        name=name,
        objective=config.objective,
        has_base=not from_scratch,
        origin="random weights" if from_scratch else config.model.path,
        tokens=f"{results.get('tokens', 0):,.0f}",
        measured=", ".join(f"{name} {value:.4f}" for name, value in losses.items()),
    )


def rendered(data: ModelCardData, template: str, results: dict[str, Any], **values: Any) -> str:
    """The card of `template`; `results` as in `all_results.json`."""
    card = ModelCard.from_template(
        data,
        str(TEMPLATES / template),
        minutes=f"{results['train_seconds'] / 60:.1f}",
        versions=", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        **values,
    )
    return f"{card}\n"


def card_data(
    config: Config | TextConfig, base: str | None, relation: str, tags: list[str], **measured: Any
) -> ModelCardData:
    """Metadata of a model made from `base`: a Hub id or a folder; None for random weights."""
    origin: dict[str, Any] = {} if base is None else base_license(base)
    if base is not None and is_on_hub(base):
        origin |= {"base_model": base, "base_model_relation": relation}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        datasets=hub_datasets(config.data.path) or None,
        **origin,
        **measured,
    )


def hub_datasets(paths: str | tuple[str | SourceSection, ...]) -> list[str]:
    """The entries of `data.path` that are data sets on the Hub."""
    entries = [paths] if isinstance(paths, str) else paths
    names = [entry if isinstance(entry, str) else entry.path for entry in entries]
    return [name for name in names if name and is_on_hub(name) and not name.endswith(FILE_SUFFIXES)]


def is_on_hub(base: str) -> bool:
    return not base.startswith(BUNDLED) and not Path(base).exists()


def base_license(base: str) -> dict[str, str]:
    """The licence entries of the base's card, where that is on this machine."""
    cached = try_to_load_from_cache(base, "README.md") if is_on_hub(base) else None
    return card_license(cached if isinstance(cached, str) else Path(resolve_path(base)) / "README.md")


def evaluation_set(report: dict[str, Any]) -> str:
    return Path(report["settings"]["config"]["eval"]["path"]).name


def measured_values(report: dict[str, Any]) -> dict[tuple[str, str], float]:
    """(metric, its name) -> value: the speed of lossless decoding, and accuracy and retention of every mode
    in which the AR model replaced nothing.
    """
    timed = timed_lossless(report) or {}
    values = {
        (metric, f"{name} (lossless)"): timed[metric] for metric, name in SPEED_METRICS.items() if timed
    }
    return values | {
        (metric, f"{metric} ({mode['name']})"): mode[metric]
        for mode in report["student"]
        for metric in ("accuracy", "retention")
        if mode.get("replaced") is None
    }


def model_index(name: str, dataset: str, values: dict[tuple[str, str], float]) -> dict[str, Any]:
    """The entries of a card for what was measured on `dataset`."""
    found = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=metric,
            metric_name=label,
            metric_value=round(value, 4),
        )
        for (metric, label), value in values.items()
    ]
    return {"model_name": name, "metrics": sorted({metric for metric, _ in values}), "eval_results": found}
