"""`preserve` students in vLLM: `opdlm export`, and vLLM alone on the folder, on a CPU through Triton's
interpreter. What it writes is the text of the AR model, token for token.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exact_sampling import chi_square_p_value
from interpreted_vllm import interpreter as interpreter
from interpreted_vllm import running
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from simple_loop import predict_ar
from tiny_checkpoints import tiny_overrides, write_checkpoint, write_data
from uno_loop import our_loop

import opdlm
from opdlm.checkpoints.load import DRAFT_HEAD_FILE
from opdlm.checkpoints.lora import ADAPTER
from opdlm.cli.main import main
from opdlm.data.chat_template import encode_prompt
from opdlm.data.messages import Conversation
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.generate import generate
from opdlm.vllm.lossless import DRAFTER_FILE, DraftingSampler

QUESTIONS = [
    "copy a",
    "add 3 4",
    "close {({}{})",
    "add 92 34",
    "Nupalund, name the main city",
    "copy abcabcab",
]
LIMITS = [3, 20, 9, 24, 24, 17]
TEMPERATURE, FIRST = 2.0, 25
"""For samples; FIRST is the likeliest token after "add 3 4"."""
DRAFTS = "loss.objective=draft"
STUDENTS = {
    "head": (DRAFTS, "format.draft_head=16", "train.num_steps=30"),
    "uniform": (DRAFTS, "format.noise=uniform", "format.draft_attention=causal", "format.draft_head=0"),
}


def convert(root: Path, *settings: str) -> Path:
    """The bundled teacher after a few updates: some drafts are right, and most are not."""
    sizes = ["format.block_size=4", "train.rows_per_update=16", "rollout.prompts_per_step=16"]
    sizes += ["rollout.decode.max_new_tokens=32", "train.num_steps=10", "eval.held_back=0"]
    paths = ["data.path=bundled:prompts.jsonl", f"output_dir={root / 'run'}"]
    command = ["convert", "bundled:teacher", *paths, *sizes, "optimizer.learning_rate=0.01", *settings]
    assert main(command) == 0
    return root / "run" / "model"


@pytest.fixture(scope="module")
def students(interpreter: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("students")
    found = {name: convert(root / name, *settings) for name, settings in STUDENTS.items()}
    found["mask"] = Path(shutil.copytree(found["head"], root / "mask"))
    (found["mask"] / DRAFT_HEAD_FILE).unlink()
    (found["mask"] / "manifest.json").unlink(missing_ok=True)
    for folder in found.values():
        assert main(["export", str(folder), str(exported(folder))]) == 0
    return found


def exported(student: Path) -> Path:
    return student.with_name("vllm_" + student.name)


def test_the_export_is_the_ar_model_and_beside_it_what_drafts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path)
    teacher = write_checkpoint(tmp_path / "teacher")
    overrides = tiny_overrides(teacher, tmp_path, tmp_path / "run")[1:]
    settings = ["loss.objective=draft", "format.draft_head=8", "lora.use_rslora=true"]
    assert main(["convert", str(teacher), *overrides, *settings]) == 0
    student, out = tmp_path / "run" / "model", tmp_path / "vllm"
    assert main(["export", str(student), str(out)]) == 0
    assert f"serve it: vllm serve {out}" in capsys.readouterr().out
    (weights,) = out.glob("*.safetensors")
    assert weights.read_bytes() == (teacher / weights.name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["OpdlmLlamaLossless"] and not config.keys() & {
        "auto_map",
        "canvas_length",
    }
    assert (out / "chat_template.jinja").is_file()

    model, drafter = opdlm.load(student)[0], load_file(out / DRAFTER_FILE)
    layers = {name: layer for name, layer in model.student.named_modules() if isinstance(layer, LoraLayer)}
    assert len(layers) == 14
    for name, layer in layers.items():
        change_OI = drafter.pop(name + ".up") @ drafter.pop(name + ".down")
        torch.testing.assert_close(change_OI, layer.get_delta_weight(ADAPTER))
    assert torch.equal(drafter.pop("mask_embedding"), model.mask_embedding)
    head = {f"draft_head.{name}": weight for name, weight in model.draft_head.state_dict().items()}
    assert drafter.keys() == head.keys() and all(torch.equal(drafter[name], head[name]) for name in head)


@dataclass
class Record:
    """What every forward gave every request: its draft tokens, whether these are masks, the new tokens."""

    forwards: dict[str, list[tuple[int, bool, int]]] = field(default_factory=dict)

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        call = DraftingSampler.__call__

        def call_and_record(sampler: DraftingSampler, logits: Any, batch: Any) -> Any:
            output = call(sampler, logits, batch)
            drafts = np.diff(batch.cu_num_logits_np) - 1
            masks = sampler.state.is_drafting_B if batch.num_draft_tokens else [False] * batch.num_reqs
            rows = zip(batch.req_ids, drafts.tolist(), masks, output.num_sampled.tolist(), strict=True)
            for request, *row in rows:
                self.forwards.setdefault(request.split("-")[0], []).append(tuple(row))
            return output

        patch.setattr(DraftingSampler, "__call__", call_and_record)


def chats(questions: list[str]) -> list[Any]:
    return [[{"role": "user", "content": text}] for text in questions]


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("name", "overlap"), [("mask", False), ("head", False), ("uniform", False), ("head", True)]
)
def test_greedy_texts_are_those_of_ar_decoding_in_fewer_forwards(
    name: str, overlap: bool, students: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six prompts on four places, each with another length and limit. What is accepted of every draft is what
    our decoder accepts in the same schedule. On a GPU the steps of vLLM overlap.
    """
    from vllm import SamplingParams

    if overlap:
        overlap_steps(monkeypatch)
    record = Record()
    record.watch(monkeypatch)
    source = students[name]
    with running(exported(source), max_model_len=128) as llm:
        assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling == overlap
        params = [SamplingParams(temperature=0, max_tokens=limit) for limit in LIMITS]
        outputs = llm.chat(chats(QUESTIONS), params, use_tqdm=False)
    model, tokenizer = opdlm.load(source, "float32")
    reasons, num_forwards, num_tokens = set(), 0, 0
    for index, (output, text, limit) in enumerate(zip(outputs, QUESTIONS, LIMITS, strict=True)):
        prompt = encode_prompt(tokenizer, Conversation(prompt=text))
        (ours,) = generate(model, [prompt], DecodeConfig(mode="ar", max_new_tokens=limit))
        completion = output.outputs[0]
        assert tuple(completion.token_ids) == ours.text_ids and completion.finish_reason == ours.finish_reason
        reasons.add(ours.finish_reason)
        first, *later = record.forwards[str(index)]
        assert first == (0, False, 1)  # the prompt
        assert [masks for _, masks, _ in later] == [i % 2 == 0 for i in range(len(later))]
        assert all(number == 1 for _, masks, number in later if masks)
        accepted = [number - 1 for drafts, masks, number in later if not masks and drafts == 3]
        _, expected = our_loop(source, (*prompt, ours.text_ids[0]), 0, limit + 8)
        assert len(expected) >= len(accepted) and accepted == expected[: len(accepted)]
        num_forwards += 1 + len(later)
        num_tokens += 1 + sum(number for _, _, number in later)
    assert reasons == {"stop", "length"}
    assert num_forwards < num_tokens


def overlap_steps(patch: pytest.MonkeyPatch) -> None:
    """As on a GPU: vLLM always takes one step after the other on a CPU."""
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config

    def update_and_overlap(vllm_config: Any) -> None:
        update(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    patch.setattr(CpuPlatform, "check_and_update_config", staticmethod(update_and_overlap))


@pytest.mark.vllm
def test_requests_are_served_as_by_the_ar_model_in_vllm(
    students: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling parameters that change the AR model's choices, log-probabilities, prompts in chunks, and one
    whose beginning is in the cache.
    """
    from vllm import SamplingParams

    plain: dict[str, Any] = {"temperature": 0, "max_tokens": 16}
    params = [
        SamplingParams(**plain, repetition_penalty=1.8, logprobs=3),
        SamplingParams(**plain, logit_bias={12: 4.0, 20: 3.0}),
        SamplingParams(**plain, min_tokens=14),
        SamplingParams(**plain),
    ]
    shared = "copy abcdefghij abcdefghij abcdefghij " * 4
    questions = [*QUESTIONS[1:4], shared + "two"]
    record, found = Record(), {}
    record.watch(monkeypatch)
    for architecture in ("OpdlmQwen3Lossless", "Qwen3ForCausalLM"):
        options = {"hf_overrides": {"architectures": [architecture]}, "max_num_batched_tokens": 64}
        with running(exported(students["head"]), **options) as llm:
            llm.chat(chats([shared + "one"]), SamplingParams(**plain), use_tqdm=False)
            outputs = llm.chat(chats(questions), params, use_tqdm=False)
        texts = [tuple(output.outputs[0].token_ids) for output in outputs]
        places = outputs[0].outputs[0].logprobs
        values = torch.tensor([[places[i][token].logprob] for i, token in enumerate(texts[0])])
        found[architecture] = texts, outputs[-1].num_cached_tokens, values
    (texts, cached, values), (ar_texts, ar_cached, ar_values) = found.values()
    assert texts == ar_texts and cached == ar_cached > 99
    torch.testing.assert_close(values, ar_values, atol=1e-3, rtol=1e-3)
    assert any(number > 1 for forwards in record.forwards.values() for _, _, number in forwards)


@pytest.mark.vllm
def test_no_draft_is_accepted_beside_a_grammar(
    students: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter does not run vLLM's kernel for grammars: the forwards only say that one is there."""
    from vllm import SamplingParams

    call, record = DraftingSampler.__call__, Record()

    def with_grammar(sampler: DraftingSampler, logits: Any, batch: Any) -> Any:
        batch.has_structured_output_reqs = True
        return call(sampler, logits, batch)

    monkeypatch.setattr(DraftingSampler, "__call__", with_grammar)
    record.watch(monkeypatch)
    with running(exported(students["head"]), max_model_len=128) as llm:
        (output,) = llm.chat(chats(["add 3 4"]), SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 20
    assert [number for _, _, number in record.forwards["0"]] == [1] * 20


@pytest.mark.vllm
def test_samples_follow_the_ar_model(students: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward over masks gives the second token, and one that verifies their draft the third."""
    from vllm import SamplingParams

    record = Record()
    record.watch(monkeypatch)
    source = students["head"]
    model, tokenizer = opdlm.load(source, "float32")
    prompt = encode_prompt(tokenizer, Conversation(prompt="add 3 4"))
    with running(exported(source), max_num_seqs=64) as llm:
        params = SamplingParams(temperature=TEMPERATURE, max_tokens=4, n=64, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": list(prompt)}] * 4, params, use_tqdm=False)
    samples = [
        tuple(c.token_ids)[1:3] for output in outputs for c in output.outputs if c.token_ids[0] == FIRST
    ]
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(2):
        longer = {}
        for start, share in expected.items():
            logits_V = predict_ar(model, (*prompt, FIRST, *start))
            probs = (logits_V.double() / TEMPERATURE).softmax(-1).tolist()
            longer |= {(*start, token): share * p for token, p in enumerate(probs) if share * p > 0.004}
        expected = longer
    assert chi_square_p_value(samples, expected) > 0.001
    accepted = [number > 1 for forwards in record.forwards.values() for _, masks, number in forwards[2:3]]
    assert 0.02 < sum(accepted) / len(accepted) < 0.98


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 2}, "parallelism"),
        ({"enable_lora": True}, "--enable-lora"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "--speculative-config"),
    ],
)
def test_what_does_not_run_is_refused_by_name(
    options: dict[str, Any], message: str, students: dict[str, Path]
) -> None:
    refusal = f"preserve students of opdlm do not run with .*{message}"
    with pytest.raises(Exception, match=refusal), running(exported(students["head"]), **options):
        pass
