"""The check of a GPU runs at toy size on a CPU, and its estimate of memory is the dry run's."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from opdlm.config.rules import load_config
from opdlm.distill.plan import make_plan

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules["gpu_check"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_section_runs_at_toy_size_and_a_failure_stops_no_other(
    gpu_check: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """FlexAttention has no backward on a CPU: its section fails and is recorded."""
    gpu_check.main(["--toy", "--out", str(tmp_path / "out.json")])
    sections = json.loads((tmp_path / "out.json").read_text())["sections"]
    assert list(sections) == ["attention", "flex", "flash", "decoding", "decoding_compiled"]
    assert [name for name in sections if "error" in sections[name]] == ["flex"]
    attention = {(row["backend"], row["dtype"]): row for row in sections["attention"]["rows"]}
    assert attention["flash", "float32"]["gradient_error"] < 1e-5
    assert "does not support backward on CPU" in attention["flex", "float32"]["error"]
    assert [row["step"] for row in sections["flash"]["rows"]] == [0, 1]
    for name in ("decoding", "decoding_compiled"):
        rows = sections[name]["rows"]
        assert [(row["mode"], row["batch"]) for row in rows] == [
            (mode, batch) for batch in (1, 3) for mode in ("ar", "lossless")
        ]
        assert all(row["identical"] == 1 and row["tokens_per_second"] > 0 for row in rows)
    assert "failed: RuntimeError: FlexAttention does not work here" in capsys.readouterr().out


def test_a_section_that_ends_its_process_is_recorded(
    gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here at its limit; without a GPU it would fail later."""
    monkeypatch.setitem(gpu_check.SECTIONS, "flash", (0.2, gpu_check.SECTIONS["flash"][1]))
    gpu_check.run_apart("flash", tmp_path / "flash.json")
    assert json.loads((tmp_path / "flash.json").read_text())["error"] == "stopped after 0 s"


def test_the_sections_take_at_most_ten_minutes(gpu_check: Any) -> None:
    assert sum(limit for limit, _ in gpu_check.SECTIONS.values()) <= 580


def test_the_estimate_is_that_of_the_dry_run_for_the_same_step(gpu_check: Any, tmp_path: Path) -> None:
    size = gpu_check.FULL
    size.config().save_pretrained(tmp_path)
    config = load_config(
        None,
        [
            *(f"model.path={tmp_path}", "model.dtype=float32", "train.mixed_precision=bf16"),
            *("format.name=sdar", f"format.block_size={gpu_check.BLOCK}", "lora.enabled=false"),
            *(f"data.max_prompt_tokens={size.prompt}", f"rollout.decode.max_new_tokens={size.response}"),
            *(f"train.micro_batch_rows={size.rows}", f"train.rows_per_update={size.rows}"),
            *(f"rollout.prompts_per_step={size.rows}", "train.num_steps=1"),
            *("states.selection=one_per_block", "train.gradient_checkpointing=false"),
        ],
    )
    memory = make_plan(config).memory
    planned = sum(part for name, part in memory.items() if not name.startswith("rollout:"))
    assert size.estimated_gib == pytest.approx(planned / 2**30, rel=0.01)
