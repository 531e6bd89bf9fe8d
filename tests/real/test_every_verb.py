"""Every verb on pretrained checkpoints, typed in an empty folder, with a true property of what each gives."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pyarrow.parquet as pq
import pytest
import torch
from hub_stand_in import TOKEN, hub
from transformers import AutoModelForCausalLM, AutoTokenizer

from opdlm.cli.main import build_parser

pytestmark = pytest.mark.real
QUESTION = "What is 3 plus 40? Explain it in one sentence."
ELSEWHERE = {"demo"}
"""Verbs that no checkpoint is given to: tests/cli/test_stranger.py."""


def verbs() -> set[str]:
    (choices,) = (action.choices for action in build_parser()._actions if action.dest == "verb")
    return set(choices)


def test_every_verb_is_tried_here() -> None:
    tried = re.findall(r'opdlm(?:\(\s*|", )"(\w+)"', Path(__file__).read_text())
    assert {*tried, "generate"} == verbs() - ELSEWHERE


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def settings_of() -> tuple[str, ...]:
    return (
        *("data.path=prompts.jsonl", "train.num_steps=1", "rollout.prompts_per_step=4"),
        *("train.rows_per_update=4", "rollout.decode.max_new_tokens=16", "eval.held_back=0"),
    )


def test_a_dry_run_writes_nothing(desk: Any, tmp_path: Path) -> None:
    fresh = replace(desk, folder=tmp_path)
    shutil.copy(desk.folder / "prompts.jsonl", tmp_path)
    shown = fresh.opdlm("convert", desk.source, "data.path=prompts.jsonl", "--dry-run").stdout
    total = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(desk.source).parameters())
    assert f"{total / 1e6:,.1f} M parameters" in shown and "fits: yes" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_convert_trains_and_reports(desk: Any) -> None:
    rows = steps_of(desk.model.parent)
    assert [row["step"] for row in rows][:2] == [1, 2]
    assert all(math.isfinite(row["loss"]) and row["loss_tokens"] > 0 for row in rows)
    report = json.loads((desk.model / "retention.json").read_text())
    assert [mode["name"] for mode in report["student"]]


def test_generate_is_lossless(desk: Any) -> None:
    ar, lossless = (desk.answers(desk.model, "--mode", mode)[0] for mode in ("ar", "lossless"))
    assert ar["token_ids"] == lossless["token_ids"]
    assert lossless["num_forwards"] <= ar["num_forwards"] and ar["response"].strip()
    (remasked,) = desk.answers(desk.model)
    assert 0 < len(remasked["token_ids"]) <= 16 and max(remasked["unmask_step"]) >= 1


def test_a_stream_ends_as_the_whole_answer(desk: Any) -> None:
    common = ("generate", desk.model, QUESTION, "--max-new-tokens", 16, "--mode", "lossless")
    whole, streamed = (desk.opdlm(*common, *more).stdout for more in ((), ("--stream",)))
    assert "".join(whole.split()) in "".join(streamed.split())


def test_infill_keeps_the_text_around_the_gap(desk: Any) -> None:
    text = "The capital of France is <gap:8>, which lies on the Seine."
    (answer,) = desk.answers(desk.model, "--infill", prompt=text)
    assert answer["response"].endswith(", which lies on the Seine.")


def test_a_chat_answers_as_generate(desk: Any) -> None:
    common = ("--mode", "lossless", "--max-new-tokens", 16, "--dtype", "float32")
    shown = desk.opdlm("chat", desk.model, *common, text=f"{QUESTION}\n/new\n{QUESTION}\n").stdout
    if not desk.has_template:
        assert "need a chat template" in shown
        return
    (answer,) = desk.answers(desk.model, "--mode", "lossless")
    assert "".join(shown.split()).count("".join(answer["response"].split())) == 2


@contextmanager
def served(desk: Any, *options: Any) -> Iterator[str]:
    """The address of a started server."""
    command = [sys.executable, "-m", "opdlm", "serve", *map(str, options), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=desk.folder)
    try:
        assert server.stdout is not None
        found = re.search(r"http://\S+/v1", server.stdout.readline())
        assert found is not None
        yield found[0]
    finally:
        server.terminate()
        assert server.wait(60) in (0, 143)


def test_a_server_answers_as_generate(desk: Any) -> None:
    (answer,) = desk.answers(desk.model, "--mode", "lossless")
    path, asked = "completions", {"prompt": QUESTION}
    if desk.has_template:
        path, asked = "chat/completions", {"messages": [{"role": "user", "content": QUESTION}]}
    body = {"model": "m", "max_tokens": 16, **asked}
    options = (desk.model, "--mode", "lossless", "--dtype", "float32", "--name", "m")
    with served(desk, *options) as address:
        texts = []
        for stream in (False, True):
            data = json.dumps(body | {"stream": stream}).encode()
            request = Request(f"{address}/{path}", data, {"Content-Type": "application/json"})
            reply = urlopen(request, timeout=120).read().decode()
            lines = [line[6:] for line in reply.splitlines() if line.startswith("data: {")] or [reply]
            choices = [choice for line in lines for choice in json.loads(line)["choices"]]
            parts = [choice.get("delta") or choice.get("message") or choice for choice in choices]
            texts.append("".join(part.get("content") or part.get("text") or "" for part in parts))
    assert texts == [answer["response"], answer["response"]]


def test_rollouts_are_recorded_and_trained_on(desk: Any) -> None:
    for name, mode in (("ar", "ar"), ("own", "threshold")):
        options = ("--out", f"{name}.parquet", "--limit", 4, "--mode", mode, "--max-new-tokens", 16)
        desk.opdlm("rollout", desk.model, "prompts.jsonl", *options)
        table = pq.read_table(desk.folder / f"{name}.parquet").to_pylist()
        assert len(table) == 4
        for row in table:
            assert len(row["response_ids"]) == len(row["unmask_step"]) >= row["num_response"]
            assert 0 < row["num_response"] <= 16 and row["response"]
    short = [text for text in settings_of() if not text.startswith("rollout.decode")]
    desk.opdlm("convert", desk.source, *short, "rollout.path=ar.parquet", "output_dir=runs/recorded")
    assert steps_of(desk.folder / "runs" / "recorded")[0]["loss_tokens"] > 0


def test_eval_compares_with_the_teacher(desk: Any) -> None:
    modes = ("--modes", "ar", "lossless", "--limit", 2, "--max-new-tokens", 16, "--dtype", "float32")
    shown = desk.opdlm("eval", desk.model, *modes, "--out", "report").stdout
    report = json.loads((desk.folder / "report" / "retention.json").read_text())
    assert "lossless" in shown
    found = {mode["name"]: mode["identical_to_teacher"] for mode in report["student"]}
    assert found == {"ar": 1.0, "lossless": 1.0}


def nats_of_row(folder: Path, texts: list[str], length: int) -> tuple[float, int]:
    """Nats and targets of the first row by stock transformers: each document alone, its end included."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer, total, count = AutoTokenizer.from_pretrained(folder), 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id][:length]])
        length -= ids.shape[1]
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
        if not length:
            break
    return total, count


def test_train_lowers_the_loss_that_eval_measures(desk: Any) -> None:
    settings = ("data.path=texts.jsonl", "train.num_steps=2", "output_dir=runs/text")
    desk.opdlm("train", desk.source, *settings, "objective.name=autoregressive", "train.rows_per_update=1")
    assert [row["step"] for row in steps_of(desk.folder / "runs" / "text")] == [1, 2]
    trained = desk.folder / "runs" / "text" / "model"
    desk.opdlm(
        "eval", desk.source, trained, "--text", "texts.jsonl", "--metrics", "ar_nll", "--out", "likelihood"
    )
    models = json.loads((desk.folder / "likelihood" / "text_likelihood.json").read_text())["models"]
    before, after = (model["metrics"]["ar_nll"] for model in models)
    lines = (desk.folder / "texts.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    total, count = nats_of_row(desk.source, texts, models[0]["sequence_length"] + 1)
    assert before["num_tokens"] == count and before["total"] == pytest.approx(total, rel=0.01)
    assert after["total"] < before["total"]


def test_bench_times_every_mode(desk: Any) -> None:
    options = ("--prompts", "prompts.jsonl", "--batch-sizes", 1, "--limit", 2, "--repeats", 1)
    desk.opdlm("bench", desk.model, *options, "--max-new-tokens", 16, "--out", "speed")
    rows = json.loads((desk.folder / "speed" / "bench.json").read_text())["rows"]
    speed = {row["name"]: row for row in rows}
    assert {"transformers.generate", "ar", "lossless", "static", "threshold"} <= set(speed)
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert speed["ar"]["tokens_per_forward"] == 1.0 <= speed["lossless"]["tokens_per_forward"]


def test_resume_continues_and_runs_and_report_show_it(desk: Any) -> None:
    run = desk.model.parent
    desk.opdlm("resume", "runs/opdlm", "train.num_steps=3")
    assert [row["step"] for row in steps_of(run)] == [1, 2, 3]
    assert re.search(r"runs/opdlm\b.*\b3\b", desk.opdlm("runs").stdout)
    desk.opdlm("report", "runs/opdlm")
    assert "loss" in (run / "report.html").read_text()


def test_verify_finds_a_changed_byte(desk: Any, tmp_path: Path) -> None:
    assert "intact" in desk.opdlm("verify", desk.model).stdout
    damaged = shutil.copytree(desk.model, tmp_path / "damaged")
    file = damaged / "adapter" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "adapter_model.safetensors" in desk.opdlm("verify", damaged, status=2).stdout


def test_a_merged_copy_answers_as_the_adapter(desk: Any) -> None:
    desk.opdlm("merge", desk.model, "merged", "--full-copy")
    before, after = (desk.answers(folder)[0]["token_ids"] for folder in (desk.model, "merged"))
    assert before == after
    assert not (desk.folder / "merged" / "adapter").exists()


def test_an_adapter_is_exported_and_imported(desk: Any) -> None:
    """Uno's layout there and back; models whose layers it does not know are refused."""
    layout = ("format.noise=uniform", "format.draft_attention=causal", "output_dir=runs/uno")
    desk.opdlm("convert", desk.source, *settings_of(), *layout)
    first = desk.folder / "runs" / "uno" / "model"
    if "sliding_attention" in json.loads((desk.source / "config.json").read_text()).get("layer_types", ()):
        refused = desk.opdlm("export", first, "uno", "--to", "uno", status=2)
        assert "one cache for all layers" in refused.stderr
        return
    desk.opdlm("export", first, "uno", "--to", "uno")
    desk.opdlm("import", desk.source, "uno", "imported")
    fixed = ("--mode", "lossless", "--forward-overhead", 32)  # what is drafted depends on no clock
    answers = [desk.answers(folder, *fixed)[0] for folder in (first, "imported")]
    assert answers[0] == answers[1]


def test_sdar_is_exported_for_vllm(desk: Any) -> None:
    desk.opdlm("convert", desk.source, *settings_of(), "format.name=sdar", "output_dir=runs/sdar")
    model = desk.folder / "runs" / "sdar" / "model"
    (answer,) = desk.answers(model)
    assert 0 < len(answer["token_ids"]) <= 16
    assert "qwen3 only" in desk.opdlm("export", model, "sdar", "--to", "sdar", status=2).stderr
    check_export_for_vllm(desk, model, "sdar")


def test_preserve_is_exported_for_vllm(desk: Any) -> None:
    check_export_for_vllm(desk, desk.model, "preserve")


def check_export_for_vllm(desk: Any, model: Path, form: str) -> None:
    out = desk.folder / f"vllm-{form}"
    if json.loads((desk.source / "config.json").read_text())["model_type"] not in ("llama", "qwen3"):
        assert "do not run in vLLM" in desk.opdlm("export", model, out, status=2).stderr
        return
    assert "vllm serve" in desk.opdlm("export", model, out).stdout
    written = json.loads((out / "config.json").read_text())
    assert written["block_diffusion"]["format"] == form
    assert (out / "drafter").exists() == (form == "preserve")


def test_a_pushed_folder_comes_back(desk: Any, tmp_path: Path) -> None:
    with hub() as server:
        environment = {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        remote = replace(desk, environment=environment)
        assert "ada/first" in remote.opdlm("push", desk.model, "ada/first").stdout
        files = server.repositories["ada/first"]
        assert files["model.safetensors"] == (desk.model / "model.safetensors").read_bytes()
        folders = ((remote, "ada/first"), (desk, desk.model))
        there, here = (at.answers(folder, "--mode", "lossless")[0]["token_ids"] for at, folder in folders)
        assert there == here


def test_a_study_of_the_model_is_planned(desk: Any) -> None:
    options = (f"run.model.path={desk.source}", "run.data.path=prompts.jsonl", "--dry-run", "--out", "study")
    assert "7 runs:" in desk.opdlm("study", "profile_real", *options).stdout
    assert not (desk.folder / "study").exists()


def test_recipes_and_env_print(desk: Any) -> None:
    assert "preserve_lora" in desk.opdlm("recipes").stdout
    desk.opdlm("recipes", "preserve_lora", "mine.yaml")
    settings = (f"model.path={desk.source}", "data.path=prompts.jsonl", "data.config=", "data.prompt_column=")
    assert "fits:" in desk.opdlm("convert", "mine.yaml", *settings, "--dry-run").stdout
    assert f"torch: {torch.__version__}" in desk.opdlm("env").stdout
