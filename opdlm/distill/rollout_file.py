"""Rollouts as a Parquet file: `opdlm rollout` writes it, `rollout.path` trains on it.

One row per prompt, in the order of the prompts; the metadata store the settings. Until the file is complete,
responses are appended to a log beside it, `.NAME.partial`, whose first line holds the settings. Prompts are
decoded in chunks, and an incomplete chunk is decoded again: rounding depends on the other prompts of a batch,
so this makes a resumed file equal, byte for byte, to an uninterrupted one. Not here: decoding (an `Engine`
does it).
"""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from opdlm.checkpoints.load import context_length, vocabulary_rows
from opdlm.config.schedules import block_size_at, selection_at
from opdlm.config.sections import Config
from opdlm.decoding.rollout import NEVER, Prompt, Rollout
from opdlm.errors import ConfigError, DataError
from opdlm.evaluation.generation_log import Generation, GenerationLog
from opdlm.files import write_atomic
from opdlm.modeling.diffusion_lm import DiffusionLM

Engine = Callable[[Sequence[Sequence[int]], Sequence[int]], list[Rollout]]
"""(token ids of each prompt, seed of each prompt) -> rollouts in the same order."""

IDS = pa.list_(pa.int32())
COLUMNS = pa.schema(
    {
        "prompt": pa.string(),
        "prompt_ids": IDS,
        "response": pa.string(),
        "response_ids": IDS,
        "unmask_step": IDS,
        "num_response": pa.int32(),
        "finish_reason": pa.string(),
        "logprobs": pa.list_(pa.float32()),
        "num_forwards": pa.int32(),
        "num_steps": pa.int32(),
        "num_replaced": pa.int32(),
    }
)
COUNTS = ("num_replaced",)
"""Columns that files of earlier versions lack, and that count as 0 there."""
RECORD = b"opdlm"
"""Key of the settings in the metadata."""
TRAJECTORY_MODES = ("static", "threshold", "entropy", "left_to_right")
TRAJECTORY_SELECTIONS = ("one_per_block", "all")


def log_path_of(out: Path) -> Path:
    """The log of an incomplete file."""
    return out.with_name(f".{out.name}.partial")


def recorded_settings(out: Path) -> dict[Path, dict[str, Any]]:
    """The settings of `out` and of its log, of those that exist; empty for the file of another program."""
    if out.suffix != ".parquet" or out.is_dir():
        raise ConfigError(f"--out ({out}) must be the name of a .parquet file.")
    found, log = dict[Path, dict[str, Any]](), log_path_of(out)
    if out.exists():
        found[out] = record_of(read_table(out, "--out").schema) or {}
    if log.exists() and (lines := log.read_bytes().splitlines()):
        found[log] = json.loads(lines[0])["settings"]
    return found


def recorded_date(out: Path) -> str:
    """The day that chat templates print in a file, finished or not; today for a new one."""
    dates = [settings.get("date", "") for settings in recorded_settings(out).values()]
    return next(filter(None, dates), datetime.date.today().isoformat())


def is_finished(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` is complete. ConfigError if it, or its log, was written with other settings."""
    for path, old in recorded_settings(out).items():
        check_same_settings(path, old, settings)
    return out.exists()


def check_same_settings(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = [name for name in new if old.get(name) != new[name]]
    if changed:
        raise ConfigError(
            f"{path} holds rollouts of other settings ({', '.join(changed[:3])}): choose another --out, or "
            "delete it to start over."
        )


def decode_resumably(
    out: Path,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    engine: Engine,
    settings: dict[str, Any],
    *,
    piece_size: int,
    on_piece: Callable[[Sequence[Rollout], float], None],
) -> list[Rollout]:
    """Rollouts of all prompts; complete chunks in the log of `out` are not decoded again.

    `on_piece(rollouts, seconds)` is called after each chunk of `piece_size` prompts; `seconds` is 0 if the
    chunk was in the log.
    """
    path = log_path_of(out)
    log = GenerationLog(path, json.dumps(settings))
    if not path.exists() or not path.stat().st_size:
        write_atomic(path, json.dumps({"settings": settings}) + "\n")
    keys = [log.key({"seed": seed}, prompt.ids) for prompt, seed in zip(prompts, seeds, strict=True)]
    for first in range(0, len(prompts), piece_size):
        piece, seconds = slice(first, first + piece_size), 0.0
        if not all(key in log.finished for key in keys[piece]):
            started = time.perf_counter()
            decoded = engine([prompt.ids for prompt in prompts[piece]], seeds[piece])
            seconds = time.perf_counter() - started
            share = seconds / len(decoded)
            log.add({key: Generation(r, share) for key, r in zip(keys[piece], decoded, strict=True)})
        on_piece([log.finished[key].rollout for key in keys[piece]], seconds)
    return [log.finished[key].rollout for key in keys]


def write_rollouts(
    out: Path,
    texts: Sequence[str],
    rollouts: Sequence[Rollout],
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
) -> None:
    """Write the complete file and delete its log. `texts` are the prompts as the user wrote them."""
    rows = [
        {"prompt": text, "response": decode_response(tokenizer, rollout)} | rollout.to_dict()
        for text, rollout in zip(texts, rollouts, strict=True)
    ]
    schema = COLUMNS.with_metadata({RECORD: json.dumps(settings)})
    partial = out.with_name(f".{out.name}.writing")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), partial)
    os.replace(partial, out)
    log_path_of(out).unlink(missing_ok=True)


def decode_response(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> str:
    """The text of a response without special tokens."""
    return str(tokenizer.decode(list(rollout.text_ids), skip_special_tokens=True))


def read_table(path: Path, key: str) -> pa.Table:
    """Columns and metadata of a rollout file. DataError names `key`, the setting of the path."""
    try:
        file = pq.ParquetFile(path)
        missing = [name for name in COLUMNS.names if name not in file.schema_arrow.names]
        if set(missing) - set(COUNTS):
            raise DataError(
                f"{key} ({path}) has no column {', '.join(missing)}: give a file written by opdlm rollout."
            )
        table = file.read(columns=[name for name in COLUMNS.names if name not in missing])
        for name in missing:
            table = table.append_column(name, pa.repeat(pa.scalar(0, pa.int32()), table.num_rows))
        table = table.select(COLUMNS.names)
        return table.cast(COLUMNS.with_metadata(table.schema.metadata)).combine_chunks()
    except FileNotFoundError as error:
        raise DataError(f"{key} ({path}) does not exist. Write it with opdlm rollout.") from error
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{key} ({path}) cannot be read as a file of rollouts: {reason}") from error


def record_of(schema: pa.Schema) -> dict[str, Any] | None:
    """The settings of a file; None if another program wrote it."""
    metadata = schema.metadata or {}
    return json.loads(metadata[RECORD]) if RECORD in metadata else None


class RolloutFile(Sequence[Rollout]):
    """The rollouts of a file. Rows stay in Arrow and become a `Rollout` when they are indexed."""

    def __init__(self, path: Path) -> None:
        self.path, self.table = path, read_table(path, "rollout.path")
        self.record = record_of(self.table.schema)

    def __len__(self) -> int:
        return self.table.num_rows

    @overload
    def __getitem__(self, index: int) -> Rollout: ...
    @overload
    def __getitem__(self, index: slice) -> list[Rollout]: ...
    def __getitem__(self, index: int | slice) -> Rollout | list[Rollout]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Rollout.from_dict(self.table.slice(index, 1).to_pylist()[0])

    def texts(self) -> Iterator[str]:
        """The texts of the responses."""
        for value in self.table["response"]:
            yield value.as_py()


def load_rollouts(config: Config, model: DiffusionLM, tokenizer: PreTrainedTokenizerBase) -> RolloutFile:
    """The rollouts of `rollout.path`; DataError names the first row that this student cannot use."""
    file = RolloutFile(Path(config.rollout.path))
    if not len(file):
        raise DataError(f"rollout.path ({file.path}) holds no rollouts. Write some with opdlm rollout.")
    check_trajectory(file, config)
    known = set(range(vocabulary_rows(model.student))) - set(model.spec.banned_token_ids)
    for number, (rollout, text) in enumerate(zip(file, file.texts(), strict=True)):
        problem = problem_of(rollout, model, known)
        if problem is None and decode_response(tokenizer, rollout) != text:
            problem = "has ids that the student's tokenizer reads as another text: it is another model's"
        if problem:
            raise DataError(f"rollout.path: {file.path} row {number} {problem}.")
    return file


def check_trajectory(file: RolloutFile, config: Config) -> None:
    """ConfigError if `states.selection` needs trajectories and the file has none, or has other blocks."""
    selections = {step: selection_at(config, step) for step in range(config.train.num_steps)}
    needed = {step: name for step, name in selections.items() if name in TRAJECTORY_SELECTIONS}
    if not needed:
        return
    record, name = file.record or {}, next(iter(needed.values()))
    if record.get("mode") not in TRAJECTORY_MODES:
        how = f"mode {record['mode']}" if "mode" in record else "another program"
        raise ConfigError(
            f"states.selection ({name}) reads the denoising states of a trajectory, and rollout.path "
            f"({file.path}) holds responses of {how}, without trajectories: set "
            "states.selection=random_mask, or loss.objective=off_policy, which need none."
        )
    for step in needed:
        size = block_size_at(config.format, step)
        if (size, config.format.grid) != (record["block_size"], record["grid"]):
            raise ConfigError(
                f"format.block_size ({size}) and format.grid ({config.format.grid}) differ from those of "
                f"rollout.path ({record['block_size']}, {record['grid']}), whose denoising states are used: "
                "set them to these, or states.selection=random_mask."
            )


def problem_of(rollout: Rollout, model: DiffusionLM, known: set[int]) -> str | None:
    """Why this student cannot use a rollout, as the end of a sentence. `known`: its token ids."""
    ids, mask_id = rollout.prompt_ids + rollout.text_ids, model.spec.mask_token_id
    is_whole = 0 < rollout.num_response <= len(rollout.response_ids) == len(rollout.unmask_step)
    if not is_whole or not rollout.prompt_ids:
        return "has no prompt, no response, or columns of different lengths: write the file again"
    if mask_id in ids:
        return f"contains the mask token (id {mask_id}): remove it, or set another format.mask_token"
    foreign = {*rollout.prompt_ids, *rollout.response_ids} - known - {mask_id}
    if foreign:
        return f"has the token id {min(foreign)}, which the student does not use: it is another model's"
    pairs = zip(rollout.response_ids, rollout.unmask_step, strict=True)
    if any((token == mask_id) != (step == NEVER) for token, step in pairs):
        return f"was denoised with another mask token than the student's (id {mask_id}): give its own file"
    context = context_length(model.student.config)
    if len(ids) + model.spec.block_size > context:
        return f"has {len(ids)} tokens, more than the model's context ({context}): remove it"
    return None
