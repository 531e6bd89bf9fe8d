"""`opdlm train` from start to end: check everything, train on text, write the folder, measure held-out loss.

The result folder is a Hugging Face checkpoint. If masked tokens predict their own position, it is also a
block-diffusion model (`generate`, `eval`, `export`). With next_position it is an autoregressive model for
`convert` and `generate --mode ar`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opdlm.checkpoints.convert import add_mask_token, initial_mask_embedding, make_spec, probe
from opdlm.checkpoints.export import write_model
from opdlm.checkpoints.load import (
    AR_CLASS,
    assemble,
    check_ids,
    context_length,
    copy_of,
    load_causal_lm,
    load_tokenizer,
    new_causal_lm,
    set_embedding_row,
    vocabulary_rows,
    with_known_dtype,
)
from opdlm.checkpoints.lora import merge_adapter
from opdlm.config.text import TEXT_CONFIG_COPY, TextConfig
from opdlm.data.documents import PackedDataset, RowBatch, TextRow, keep_tokens, load_documents
from opdlm.errors import ConfigError, DataError, require_package
from opdlm.evaluation.retention import MODEL_FOLDER, RESULTS_FILE, run_results
from opdlm.files import atomic_folder
from opdlm.modeling.attention import unsupported_reason
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.objectives.mask_theory import alpha_rule, ngram_signal_weights, optimal_t
from opdlm.objectives.masking import auto_window, needs_optimal_t, resolve_auto
from opdlm.reporting.card import text_card
from opdlm.reporting.plots import plot_metrics, plot_signal
from opdlm.text.likelihood import block_bound, causal_nll, md_bound
from opdlm.text.trainer import TextRun, in_order, train
from opdlm.training.checkpoint import load_average, load_weights, trainable_weights
from opdlm.training.devices import check_trackers, is_sharded, join_ranks
from opdlm.training.dropout import add_output_dropout
from opdlm.training.loop import result_checkpoint
from opdlm.training.metrics import MetricsLog, read_metrics
from opdlm.training.run_folder import owned, prepare_output, start_date


@dataclass(frozen=True, slots=True)
class TextInputs:
    """Everything a run reads, loaded and checked."""

    model: DiffusionLM
    tokenizer: PreTrainedTokenizerBase
    rows: PackedDataset
    held_out: list[TextRow]
    config: TextConfig
    """With every `auto` and `data.epochs` resolved."""
    notes: tuple[str, ...]
    """What was resolved, and from what."""
    signal_weights: tuple[float, ...] = ()
    """Of the n-grams of the text; empty unless `masking.windows=auto`."""


def train_text(config: TextConfig, console: Console) -> Path:
    """Run or continue a training on text; returns the folder of the model."""
    started, config = time.monotonic(), with_known_dtype(config)
    ranks = join_ranks(config)
    with owned(Path(config.output_dir), writes=ranks.is_main_process):
        return run_training(config, ranks, console, started)


def run_training(config: TextConfig, ranks: PartialState, console: Console, started: float) -> Path:
    """`train_text` in a run folder of its own. `started` is a time of `time.monotonic`."""
    config = replace(config, data=replace(config.data, date=start_date(config.data.date, config.output_dir)))
    inputs = load_text_inputs(config)
    config = inputs.config
    output_dir = prepare_output(config, writes=ranks.is_main_process)
    if ranks.is_main_process:
        describe(inputs, console)
        if inputs.signal_weights:
            window = auto_window(optimal_t(inputs.signal_weights), config.masking.auto_width)
            plot_signal(inputs.signal_weights, window, output_dir / "mask_window.png")
    eval_callback = held_out_loss(inputs) if config.eval.every else None
    with MetricsLog(output_dir, console, "train", started) as log:
        run = train(inputs.model, inputs.rows, config, log, eval_callback)
    folder = output_dir / MODEL_FOLDER
    if ranks.is_main_process:
        model = trained_model(run, config).eval()
        losses = held_out_loss(inputs)(model) if inputs.held_out else {}
        with atomic_folder(folder) as partial:
            write_result(partial, model, inputs.tokenizer, config)
            write_record(partial, output_dir, config, losses)
        for name, value in losses.items():
            if name != "score":
                console.out(f"{name} {value:.4f} nats per token")
    return folder


def load_text_inputs(config: TextConfig) -> TextInputs:
    """Load and check model and text; raises before anything is written."""
    if not config.model.path:
        raise ConfigError(
            "model.path is empty: give a checkpoint, or model.path=bundled:byte model.from_scratch=true."
        )
    check_trackers(config)
    if config.model.load_in_4bit:
        require_package("bitsandbytes", "quant", "model.load_in_4bit (true)")
    if config.optimizer.name == "adamw8bit":
        require_package("bitsandbytes", "quant", "optimizer.name (adamw8bit)")
    model, tokenizer = load_text_model(config)
    context = context_length(model.student.config)
    is_block = config.objective.name == "block_diffusion"  # its forward completes the last block
    if config.data.sequence_length > context - is_block * config.format.block_size:
        block = f" less a block ({config.format.block_size})" if is_block else ""
        raise ConfigError(
            f"data.sequence_length ({config.data.sequence_length}) exceeds the model's context ({context})"
            f"{block}: use shorter rows."
        )
    documents = load_documents(config.data, tokenizer, model.spec.mask_token_id)
    check_ids(model, (document.ids for document in documents))
    if config.data.unique_tokens is not None:
        documents = keep_tokens(documents, config.data.unique_tokens, config.train.seed)
    if is_block and not config.data.document_mask and any(document.num_prompt for document in documents):
        raise ConfigError(
            "data.document_mask (false) makes a row one text, and objective.name=block_diffusion must know "
            "where each response starts: set data.document_mask=true."
        )
    rows = PackedDataset(documents, config.data, config.train.seed)
    held_out = []
    if config.eval.path:
        section = replace(config.data, path=config.eval.path)
        held_out_documents = load_documents(section, tokenizer, model.spec.mask_token_id, "eval.path")
        check_ids(model, (document.ids for document in held_out_documents))
        held_out_rows = PackedDataset(held_out_documents, section, 0, "eval.path")
        held_out = held_out_rows.evenly(config.eval.limit)
    weights: tuple[float, ...] = ()
    if needs_optimal_t(config.masking):
        weights = ngram_signal_weights([document.ids for document in documents])
    config, notes = resolve(config, rows, weights)
    return TextInputs(model, tokenizer, rows, held_out, config, notes, weights)


def load_text_model(config: TextConfig) -> tuple[DiffusionLM, PreTrainedTokenizerBase]:
    """The model at step 0, with its teacher if there is one, and the tokenizer with [MASK].

    The seed of the run decides all new weights, whatever was drawn before.
    """
    with torch.random.fork_rng(devices=[]):  # PEFT and new embedding rows draw from the global generator
        torch.manual_seed(config.train.seed)
        return build_text_model(config)


def build_text_model(config: TextConfig) -> tuple[DiffusionLM, PreTrainedTokenizerBase]:
    section, trust = config.model, config.model.trust_remote_code
    tokenizer = load_tokenizer(section.path, trust, needs_weights=not section.from_scratch)
    if section.from_scratch:
        model = new_causal_lm(section.path, section.dtype, section.shape, config.train.seed)
    else:
        model = load_causal_lm(section.path, section.dtype, trust, load_in_4bit=section.load_in_4bit)
    reason = unsupported_reason(section.attention, model.device, model.config)
    if reason:
        raise ConfigError(f"model.attention ({section.attention}) cannot run: {reason}.")
    had_mask = config.format.mask_token in tokenizer.get_vocab()
    num_rows = vocabulary_rows(model)
    mask_token_id = add_mask_token(model, tokenizer, config.format)
    spec = make_spec(model, tokenizer, config, mask_token_id, num_rows)
    probe(model, spec, tokenizer)
    teacher = load_teacher(config, model)
    if config.objective.dropout:
        add_output_dropout(model, config.objective.dropout)
    mask_embedding = None
    reads_mask = config.objective.name != "autoregressive" or config.objective.input_masking is not None
    if reads_mask and not had_mask and not section.from_scratch:
        mask_embedding = initial_mask_embedding(model, spec, config.format.mask_init, config.train.seed)
        if not config.lora.enabled:
            set_embedding_row(model, spec.mask_token_id, mask_embedding)
            mask_embedding = None
    model.requires_grad_(not config.lora.enabled)
    lora = config.lora if config.lora.enabled else None
    student = assemble(model, spec, lora=lora, teacher=teacher, mask_embedding=mask_embedding)
    student.attention = section.attention
    return student, tokenizer


def load_teacher(config: TextConfig, model: PreTrainedModel) -> PreTrainedModel | None:
    """The frozen teacher; None without distillation, or if the base of the adapter is the teacher."""
    if not config.objective.distill_weight:
        return None
    if not config.objective.teacher:
        return None if config.lora.enabled else copy_of(model)
    if config.lora.enabled:
        raise ConfigError(
            f"objective.teacher ({config.objective.teacher}) beside lora.enabled=true: the model without its "
            "adapter is the teacher then. Leave objective.teacher out, or set lora.enabled=false."
        )
    teacher = load_causal_lm(config.objective.teacher, config.model.dtype).requires_grad_(False)
    rows = vocabulary_rows(model)
    if vocabulary_rows(teacher) > rows or vocabulary_rows(teacher) < rows - 1:
        raise DataError(
            f"objective.teacher ({config.objective.teacher}) has {vocabulary_rows(teacher)} tokens and the "
            f"model {rows}: they must share a tokenizer."
        )
    if vocabulary_rows(teacher) < rows:  # the model gained [MASK]
        teacher.resize_token_embeddings(rows, mean_resizing=False)
    return teacher


def resolve(
    config: TextConfig, rows: PackedDataset, signal_weights: tuple[float, ...]
) -> tuple[TextConfig, tuple[str, ...]]:
    """Replace what depends on the data by numbers: epochs, the share of autoregressive rows, mask windows."""
    notes = []
    if config.data.epochs is not None:
        steps = max(1, math.ceil(config.data.epochs * rows.per_epoch / config.train.rows_per_update))
        train, data = replace(config.train, num_steps=steps), replace(config.data, epochs=None)
        config = replace(config, train=train, data=data)
    repeats = config.train.num_steps * config.train.rows_per_update / rows.per_epoch
    if config.objective.name == "dual":
        share = config.objective.ar_share
        if share == "auto":
            share = alpha_rule(repeats)
            config = replace(config, objective=replace(config.objective, ar_share=share))
            notes.append(f"objective.ar_share auto: {share:.4g}")
        notes.append(f"autoregressive rows see the data {share * repeats:.1f} times (share x epochs)")
    if signal_weights:
        best = optimal_t(signal_weights)
        config = replace(config, masking=resolve_auto(config.masking, best))
        windows = [list(window) for window in config.masking.windows]
        notes.append(f"masking.windows auto: t* = {best:.3f} from the n-grams of the text, so {windows}")
    return config, (f"{repeats:.2f} epochs of {rows.num_tokens} tokens", *notes)


def describe(inputs: TextInputs, console: Console) -> None:
    config, model = inputs.config, inputs.model
    total = sum(p.numel() for name, p in model.student.named_parameters() if "lora_" not in name)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    origin = "random weights" if config.model.from_scratch else "checkpoint"
    size = f"{config.train.rows_per_update} rows of {config.data.sequence_length} tokens"
    console.out(
        f"{config.model.path} ({origin}): {total / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained; "
        f"objective {config.objective.name}, {config.train.num_steps} steps of "
        f"{size}; {'; '.join(inputs.notes)}"
    )


def held_out_loss(inputs: TextInputs) -> Callable[[DiffusionLM], dict[str, float]]:
    """A function that measures the losses of the objective on held-out rows, in nats per token.

    Its `score` is minus the mean of the losses, weighted as in training.
    """
    config, section = inputs.config, inputs.config.objective

    def measure(model: DiffusionLM) -> dict[str, float]:
        found, num_rates = {}, config.eval.num_rates
        row_batch = in_order(RowBatch.of(inputs.held_out), section, config.train.seed)
        if section.name in ("autoregressive", "dual"):
            found["heldout_ar_nll"] = causal_nll(model, row_batch).per_token
        if section.name in ("masked_diffusion", "dual"):
            found["heldout_md_bound"] = md_bound(model, row_batch, section.prediction, num_rates).per_token
        if section.name == "block_diffusion":
            found["heldout_md_bound"] = block_bound(model, inputs.held_out, num_rates).per_token
        share = float(section.ar_share) if section.name == "dual" else 0.0
        weight = section.ar_weight * share / (section.ar_weight * share + 1 - share)
        losses = list(found.values())
        return {"score": -(weight * losses[0] + (1 - weight) * losses[-1])} | found

    return measure


def trained_model(run: TextRun, config: TextConfig) -> DiffusionLM:
    """The trained model in one piece; after a sharded run it is rebuilt from a checkpoint."""
    if not is_sharded(run.model):
        return run.model
    whole, _ = load_text_model(config)
    result = result_checkpoint(run)
    load_weights(result, whole)
    if config.train.ema_decay is not None:
        load_average(result, trainable_weights(whole))
    return whole


def write_result(
    folder: Path, model: DiffusionLM, tokenizer: PreTrainedTokenizerBase, config: TextConfig
) -> None:
    """A diffusion folder if masked tokens predict their own position, else a plain checkpoint."""
    section = config.objective
    if section.name != "autoregressive" and section.prediction == "same_position":
        write_model(folder, model, tokenizer, config.model.path)
        return
    peft_model = vars(model).get("peft_model")
    base = model.student if peft_model is None else merge_adapter(peft_model)
    if model.mask_embedding is not None:
        set_embedding_row(base, model.spec.mask_token_id, model.mask_embedding)
    for name in ("block_diffusion", AR_CLASS):  # of the diffusion folder that the run started from
        vars(base.config).pop(name, None)
    base.generation_config.suppress_tokens = [model.spec.mask_token_id]  # its logit was never trained
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_record(folder: Path, output_dir: Path, config: TextConfig, losses: dict[str, float]) -> None:
    """Write settings, versions, losses and curves of the run beside the weights."""
    (folder / TEXT_CONFIG_COPY).write_text(config.to_yaml())
    results = run_results(output_dir) | losses
    (folder / RESULTS_FILE).write_text(json.dumps(results, indent=2))
    (folder / "README.md").write_text(text_card(config, results))
    plot_metrics({"": read_metrics(output_dir / "metrics.jsonl")}, folder / "training.png")
