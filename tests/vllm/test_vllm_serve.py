"""`opdlm export`, and vLLM alone on the exported folder, on a CPU through Triton's interpreter."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from interpreted_vllm import interpreter as interpreter
from interpreted_vllm import running
from tiny_checkpoints import tiny_overrides, write_checkpoint, write_data

from opdlm.checkpoints.load import load, read_spec
from opdlm.cli.main import main
from opdlm.data.chat_template import encode_prompt
from opdlm.data.messages import Conversation
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.generate import generate
from opdlm.decoding.rollout import Rollout
from opdlm.modeling.slots import GridKind

QUESTIONS = ["", "a", "ab", "add 3 4", "copy xyz", "what is 7 + 12?", "the longest of these prompts: " * 2]
NEW_TOKENS = 18


def export(folder: Path, grid: GridKind, *flags: str) -> Path:
    """The export of a tiny `sdar` student with a LoRA adapter beside its weights.

    Its second stop token, ">", is one of the last tokens of every prompt.
    """
    write_checkpoint(
        folder / "model", "qwen3", head_dim=32, max_position_embeddings=256, eos_token_id=[1, 44]
    )
    write_data(folder)
    settings = ["format.name=sdar", f"format.grid={grid}", "lora.merge=false", "optimizer.learning_rate=0.05"]
    overrides = tiny_overrides(folder / "model", folder, folder / "run")[1:]
    assert main(["convert", str(folder / "model"), *overrides, *settings]) == 0
    out = folder / "vllm"
    assert main(["export", str(folder / "run" / "model"), str(out), *flags]) == 0
    return out


def own_rollouts(
    folder: Path, config: DecodeConfig, questions: list[str], seeds: list[int] | None = None
) -> tuple[list[Rollout], Any]:
    model, tokenizer = load(folder)
    prompts = [encode_prompt(tokenizer, Conversation(prompt=text)) for text in questions]
    return generate(model, prompts, config, seeds), tokenizer


@pytest.fixture(scope="module", params=["absolute", "response"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield export(tmp_path_factory.mktemp(request.param), request.param, "--threshold", "0.2")


def test_the_exported_folder_says_all_that_vllm_reads(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["OpdlmQwen3"] and config["canvas_length"] == 4
    assert config["opdlm_decode"]["confidence_threshold"] == 0.2
    generation = json.loads((folder / "generation_config.json").read_text())
    assert sorted(generation["eos_token_id"]) == [1, 44] and not generation.keys() & {"temperature", "top_p"}
    assert (folder / "chat_template.jinja").is_file() and not (folder / "adapter").exists()
    rollouts = {
        path: own_rollouts(path, DecodeConfig(max_new_tokens=12), QUESTIONS)[0]
        for path in (folder, folder.parent / "run" / "model")
    }
    assert [r.text_ids for r in rollouts[folder]] == [
        r.text_ids for r in rollouts[folder.parent / "run" / "model"]
    ]


@pytest.mark.vllm
def test_plain_requests_get_our_responses(folder: Path, interpreter: None) -> None:
    """Texts without the stop token, ids and finish reasons of chats; no sampling parameter but the length.

    The last request runs into the end of the context, inside a block: that block stays masked.
    """
    from vllm import SamplingParams

    config = DecodeConfig(confidence_threshold=0.2, max_new_tokens=NEW_TOKENS)
    ours, tokenizer = own_rollouts(folder, config, QUESTIONS)
    end, (longest,) = 101, own_rollouts(folder, replace(config, max_new_tokens=40), QUESTIONS[-1:])[0]
    limits = [NEW_TOKENS] * len(QUESTIONS) + [end - len(longest.prompt_ids)]
    with running(folder, max_model_len=end) as llm:
        chats = [[{"role": "user", "content": text}] for text in [*QUESTIONS, QUESTIONS[-1]]]
        params = [SamplingParams(max_tokens=limit) for limit in limits]
        *outputs, cut_off = llm.chat(chats, params, use_tqdm=False)
    for output, rollout in zip(outputs, ours, strict=True):
        completion = output.outputs[0]
        assert tuple(output.prompt_token_ids) == rollout.prompt_ids
        assert tuple(completion.token_ids) == rollout.text_ids
        assert completion.finish_reason == rollout.finish_reason
        kept = rollout.text_ids[:-1] if rollout.finish_reason == "stop" else rollout.text_ids
        assert completion.text == tokenizer.decode(kept, skip_special_tokens=True)
    assert {rollout.finish_reason for rollout in ours} == {"stop", "length"}

    spec, num_prompt = read_spec(folder), len(longest.prompt_ids)
    num_whole = int(spec.block_grid.block_start(end, num_prompt)) - num_prompt
    masks = (spec.mask_token_id,) * (end - num_prompt - num_whole)
    assert longest.finish_reason == "length" and masks
    assert tuple(cut_off.outputs[0].token_ids) == longest.text_ids[:num_whole] + masks
    assert cut_off.outputs[0].text == tokenizer.decode(longest.text_ids[:num_whole], skip_special_tokens=True)
    assert cut_off.outputs[0].finish_reason == "length"


SITE = """
import triton.backends
from interpreted_vllm import InterpretedDriver
triton.backends.backends = {"cpu": triton.backends.Backend(compiler=None, driver=InterpretedDriver)}
"""


@contextmanager
def served(folder: Path, site: Path) -> Iterator[str]:
    """The address of vLLM's HTTP server, each process of which finds the interpreter at its start."""
    (site / "sitecustomize.py").write_text(SITE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(site), str(Path(__file__).parents[1] / "support"), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "1"}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # threads bound to busy cores wait for each other
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    options = ["--dtype", "float32", "--kv-cache-memory-bytes", str(2**24), "--host", "127.0.0.1"]
    with open(site / "log", "w") as log:
        process = subprocess.Popen(
            [*command, *options, "--port", str(port)],
            env=os.environ | environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    address, tries = f"http://127.0.0.1:{port}", iter(range(600))
    try:
        while True:
            assert process.poll() is None and next(tries) is not None, (site / "log").read_text()[-3000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health"):
                break
            time.sleep(1)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


@pytest.mark.vllm
@pytest.mark.parametrize("folder", ["absolute"], indirect=True)
def test_the_http_server_answers_plain_requests(folder: Path, tmp_path: Path) -> None:
    config = DecodeConfig(confidence_threshold=0.2, max_new_tokens=NEW_TOKENS)
    ours, tokenizer = own_rollouts(folder, config, QUESTIONS)
    with served(folder, tmp_path) as address:
        for text, rollout in zip(QUESTIONS, ours, strict=True):
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": NEW_TOKENS}
            request = urllib.request.Request(
                f"{address}/v1/chat/completions",
                json.dumps({"model": str(folder)} | body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=300) as response:
                (choice,) = json.load(response)["choices"]
            kept = rollout.text_ids[:-1] if rollout.finish_reason == "stop" else rollout.text_ids
            assert choice["message"]["content"] == tokenizer.decode(kept, skip_special_tokens=True)
            assert choice["finish_reason"] == rollout.finish_reason


@pytest.mark.vllm
def test_a_preempted_request_ends_the_same(
    folder: Path, interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four pages of 128 tokens, one of which vLLM keeps empty, for two requests that grow beyond one page."""
    from vllm import SamplingParams
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted, preempt = [], Scheduler._preempt_request

    def preempt_and_count(scheduler: Scheduler, request: Any, *rest: Any, **options: Any) -> Any:
        preempted.append(request.num_output_tokens)
        return preempt(scheduler, request, *rest, **options)

    monkeypatch.setattr(Scheduler, "_preempt_request", preempt_and_count)
    questions = ["0123456789 " * 11, "zyxwvutsrq " * 11]
    ours, _ = own_rollouts(folder, DecodeConfig(confidence_threshold=0.2, max_new_tokens=30), questions)
    with running(folder, kv_cache_memory_bytes=2**19) as llm:
        chats = [[{"role": "user", "content": text}] for text in questions]
        outputs = llm.chat(chats, SamplingParams(max_tokens=30), use_tqdm=False)
    assert max(preempted) > 0  # it had generated tokens
    assert [tuple(output.outputs[0].token_ids) for output in outputs] == [r.text_ids for r in ours]


@pytest.mark.vllm
def test_draws_differ_between_requests_and_follow_a_seed(
    tmp_path: Path, interpreter: None, capsys: pytest.CaptureFixture[str]
) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    flags = ("--mode", "static", "--temperature", "1", "--top-p", "0.9", "--denoising-steps", "2")
    folder = export(tmp_path, "response", *flags)
    config = DecodeConfig(mode="static", temperature=1, top_p=0.9, denoising_steps=2, max_new_tokens=12)
    ours, _ = own_rollouts(folder, config, ["add 3 4"] * 2, seeds=[5, 6])
    with running(folder) as llm:
        chats = [[{"role": "user", "content": "add 3 4"}]] * 2
        seeded = [SamplingParams(max_tokens=12, extra_args={"opdlm_seed": seed}) for seed in (5, 6)]
        outputs = llm.chat(chats, seeded, use_tqdm=False)
        (free,) = llm.chat(chats[:1], SamplingParams(max_tokens=12, n=3), use_tqdm=False)
        with pytest.raises(VLLMValidationError, match="temperature"):
            llm.chat(chats[:1], SamplingParams(temperature=0.5), use_tqdm=False)
    assert [tuple(output.outputs[0].token_ids) for output in outputs] == [r.text_ids for r in ours]
    assert len({tuple(completion.token_ids) for completion in free.outputs}) == 3
