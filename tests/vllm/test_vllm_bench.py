"""`opdlm bench` with vLLM beside `transformers.generate`; `make test-vllm` runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_checkpoints import tiny_overrides, write_checkpoint, write_data

from opdlm.cli.main import main

LLAMA = {"head_dim": 32, "max_position_embeddings": 256}  # vLLM has no attention kernel for smaller heads


@pytest.mark.vllm
def test_bench_measures_the_ar_model_in_vllm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "model", **LLAMA)
    prompts, _ = write_data(tmp_path)
    overrides = tiny_overrides(tmp_path / "model", tmp_path, tmp_path / "run")
    assert main(["convert", str(tmp_path / "model"), *overrides[1:]]) == 0
    command = ["bench", str(tmp_path / "run" / "model"), "--prompts", str(prompts), "--repeats", "1"]
    flags = ["--batch-sizes", "1", "4", "--modes", "ar", "--max-new-tokens", "20"]
    for choice in ("auto", "always", "never"):
        out = tmp_path / choice
        assert main([*command, *flags, "--vllm", choice, "--out", str(out)]) == 0
        record = json.loads((out / "bench.json").read_text())
        rows = {(row["name"], row["batch_size"]): row for row in record["rows"]}
        names = ["transformers.generate", *([] if choice == "never" else ["vllm"]), "ar"]
        assert list(rows) == [(name, size) for size in (1, 4) for name in names]
        assert ("vllm" in record["settings"]) == (choice != "never")
        assert (out / "bench.png").stat().st_size > 1000
        for row in rows.values():  # random weights: a tie may end one of ten prompts differently
            assert row["identical"] >= 0.9 and row["tokens_per_forward"] == 1.0
            assert row["tokens_per_second"] > 0 and len(row["seconds"]) == 1
