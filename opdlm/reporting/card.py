"""Model cards: `README.md` of a result folder, with metadata for the Hub.

`huggingface_hub` writes the metadata; the text comes from templates of this package, so no network is needed.
The base model is named if it is a repository on the Hub, with the licence of its card where that card is on
this machine: in the folder of the base or in the cache of the Hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from opdlm.config.sections import BUNDLED, Config, resolve_path
from opdlm.config.text import TextConfig
from opdlm.reporting.tables import measured_text
from opdlm.reporting.verdict import timed_lossless

TEMPLATES = Path(__file__).parents[1] / "templates"
SPEED_METRICS = {
    "tokens_per_forward": "tokens per forward",
    "over_fastest_ar": "speed over the fastest AR decoding",
}
LICENSE_KEYS = ("license", "license_name", "license_link")


def model_card(config: Config, results: dict[str, Any], report: dict[str, Any] | None) -> str:
    """Card of a folder written by `opdlm convert`; `report` as in `retention.json`."""
    preserve = config.format.name == "preserve"
    data = card_data(
        config.model.path,
        "adapter" if config.lora.enabled else "finetune",
        ["opdlm", "diffusion", "block-diffusion"],
        **(measured_data(Path(config.output_dir).name, report) if report else {}),
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
    losses = {name: value for name, value in results.items() if name.startswith("heldout_")}
    return rendered(
        card_data(None if from_scratch else config.model.path, "finetune", ["opdlm"]),
        "train_card.md",
        results,
        name=Path(config.output_dir).name,
        objective=config.objective,
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


def card_data(base: str | None, relation: str, tags: list[str], **measured: Any) -> ModelCardData:
    """Metadata of a model made from `base`: a Hub id or a folder; None for random weights."""
    origin: dict[str, Any] = {} if base is None else base_license(base)
    if base is not None and is_on_hub(base):
        origin |= {"base_model": base, "base_model_relation": relation}
    return ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=tags, **origin, **measured
    )


def is_on_hub(base: str) -> bool:
    return not base.startswith(BUNDLED) and not Path(base).exists()


def base_license(base: str) -> dict[str, str]:
    """The licence entries of the base's card; none where no card is on this machine."""
    cached = try_to_load_from_cache(base, "README.md") if is_on_hub(base) else None
    card = Path(cached if isinstance(cached, str) else Path(resolve_path(base)) / "README.md")
    if not card.is_file():
        return {}
    known = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    return {key: known[key] for key in LICENSE_KEYS if key in known}


def measured_data(name: str, report: dict[str, Any]) -> dict[str, Any]:
    """The model index: the speed of lossless decoding, and accuracy and retention of every mode in which the
    AR model replaced nothing, on the evaluation set of the report.
    """
    dataset = Path(report["settings"]["config"]["eval"]["path"]).name
    timed = timed_lossless(report) or {}
    values = {
        (metric, f"{name} (lossless)"): timed[metric] for metric, name in SPEED_METRICS.items() if timed
    }
    values |= {
        (metric, f"{metric} ({mode['name']})"): mode[metric]
        for mode in report["student"]
        for metric in ("accuracy", "retention")
        if mode.get("replaced") is None
    }
    found = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=metric,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for (metric, name), value in values.items()
    ]
    return {"model_name": name, "metrics": ["accuracy"], "eval_results": found}
