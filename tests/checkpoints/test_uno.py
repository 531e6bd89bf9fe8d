"""`opdlm export --to uno` and `opdlm import`: the adapter that SGLang and a proposal for vLLM draft with.

The engines' loop on plain transformers and PEFT (`uno_loop`) must decode what transformers' own greedy
generation does, with the accepted lengths of our lossless decoding.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_sampling import chi_square_p_value
from peft import PeftModel
from safetensors.torch import load_file
from tiny_checkpoints import NUM_TOKENS, tiny_overrides, write_checkpoint, write_data
from transformers import AutoModelForCausalLM
from uno_loop import our_loop, uno_cycle, uno_loop

import opdlm
from opdlm.cli.main import main
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.generate import generate
from opdlm.decoding.unmasking import uniform_ids

UNO = ("format.noise=uniform", "format.draft_attention=causal", "loss.objective=draft")
WIDTH, LENGTH = 4, 24
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [20], [11, 3, 30, 12]]


def convert(root: Path, name: str, teacher: Path, *overrides: str) -> Path:
    settings = [
        setting
        for setting in tiny_overrides(teacher, root, root / name)[1:]
        if not setting.startswith(("states.", "format.mask_init", "loss."))
    ]
    changes = (*UNO, "train.num_steps=6", "optimizer.learning_rate=3e-2", *overrides)
    assert main(["convert", str(teacher), *settings, *changes]) == 0
    return root / name / "model"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Students that the engines can run (one with rsLoRA), and their export in FAMILY-uno."""
    root = tmp_path_factory.mktemp("uno")
    write_data(root)
    for family, extra in (("llama", ()), ("qwen3", ("lora.use_rslora=true",)), ("qwen2", ())):
        teacher = write_checkpoint(root / family, family, vocab_size=NUM_TOKENS)
        model = AutoModelForCausalLM.from_pretrained(teacher)
        with torch.no_grad():
            model.lm_head.weight[6:] *= 0.3  # it writes few different tokens, so that drafts are accepted
        model.save_pretrained(teacher)
        folder = convert(root, f"{family}-run", teacher, *extra)
        assert main(["export", str(folder), str(root / f"{family}-uno"), "--to", "uno"]) == 0
    return root


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2"])
@torch.no_grad()
def test_the_engines_loop_decodes_what_the_base_does_and_accepts_what_we_do(family: str, runs: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(runs / family)
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(runs / family), str(runs / f"{family}-uno")
    ).eval()
    every = list[int]()
    for seed, prompt in enumerate(PROMPTS):

        def noise_at(first: int, seed: int = seed) -> list[int]:
            places = torch.arange(first, first + WIDTH - 1)
            return uniform_ids(torch.full_like(places, seed), places, NUM_TOKENS).tolist()

        text, accepted = uno_loop(adapted, prompt, noise_at, LENGTH)
        ids = torch.tensor([prompt])
        expected = base.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=LENGTH,
            do_sample=False,
            eos_token_id=None,
        )
        assert text[:LENGTH] == expected[0, len(prompt) :].tolist()
        assert (text, accepted) == our_loop(runs / f"{family}-run" / "model", prompt, seed, LENGTH)
        every += accepted
    assert 0 in every and max(every) > 0  # some drafts are accepted, and some are not


@torch.no_grad()
def test_samples_of_the_engines_loop_and_of_ours_follow_the_base_model(runs: Path) -> None:
    """Three tokens after a prompt, 3,000 times each, against their exact probabilities."""
    base, temperature = AutoModelForCausalLM.from_pretrained(runs / "llama"), 0.1
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        prefixes = list(expected)
        ids = torch.tensor([[*PROMPTS[0], *prefix] for prefix in prefixes])
        probs_NV = base(input_ids=ids).logits[:, -1].double().div(temperature).softmax(-1).tolist()
        expected = {
            (*prefix, token): expected[prefix] * share
            for prefix, probs in zip(prefixes, probs_NV, strict=True)
            for token, share in enumerate(probs)
        }
    assert sum(sorted(expected.values())[-50:]) > 0.5
    adapted = PeftModel.from_pretrained(base, str(runs / "llama-uno")).eval()
    rng, texts = torch.Generator().manual_seed(3), [list[int]() for _ in range(3000)]
    num_cycles = 0
    while short := [text for text in texts if len(text) < 3]:
        short = [text for text in short if len(text) == len(short[0])]
        ids = torch.tensor([[*PROMPTS[0], *text] for text in short])
        noise = torch.randint(NUM_TOKENS, (len(short), WIDTH - 1), generator=rng)
        for text, tokens in zip(short, uno_cycle(adapted, ids, noise, temperature, rng), strict=True):
            text += tokens
        num_cycles += len(short)
    assert num_cycles < 1.9 * len(texts)  # some drafts were accepted, or each text would take two cycles
    assert chi_square_p_value([tuple(text[:3]) for text in texts], expected) > 1e-3
    model, _ = opdlm.load(runs / "llama-run" / "model")
    model.spec = replace(model.spec, stop_token_ids=())
    for sampling in ("shared_noise", "rejection"):
        config = DecodeConfig(
            mode="lossless",
            max_new_tokens=3,
            temperature=temperature,
            draft_sampling=sampling,
            forward_overhead=1e6,
        )
        found = generate(model, [PROMPTS[0]] * 3000, config, torch.Generator().manual_seed(5))
        assert chi_square_p_value([rollout.text_ids for rollout in found], expected) > 1e-3, sampling


def test_stock_peft_loads_the_folder_in_a_clean_process(runs: Path, tmp_path: Path) -> None:
    script = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({str(runs / "qwen3")!r})
model = PeftModel.from_pretrained(base, {str(runs / "qwen3-uno")!r}).eval()
torch.save(model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.detach(), {str(tmp_path / "logits.pt")!r})
assert not any(name.split(".")[0] == "opdlm" for name in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0 and "adapter_config" not in done.stderr, done.stderr
    assert {file.name for file in (runs / "qwen3-uno").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "manifest.json")
    }
    model, _ = opdlm.load(runs / "qwen3-run" / "model")
    with torch.no_grad():
        expected = model.student(input_ids=torch.tensor([[5, 6, 7, 8]])).logits  # the gate is not set
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("own_module_cache")
def test_the_folder_needs_no_mask_embedding_and_its_remote_code_drafts_as_we_do(runs: Path) -> None:
    folder = runs / "llama-run" / "model"
    assert not (folder / "mask_embedding.safetensors").exists()
    remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model, _ = opdlm.load(folder)
    for prompt in PROMPTS:
        ids_1L = torch.tensor([prompt])
        found = remote.generate(ids_1L, mode="lossless", max_new_tokens=LENGTH, forward_overhead=1e6)
        config = DecodeConfig(mode="lossless", max_new_tokens=LENGTH, prompt_lookup_num_tokens=0)
        (expected,) = opdlm.generate(model, [prompt], config)
        assert found[0, len(prompt) :].tolist() == list(expected.text_ids)
    with pytest.raises(ValueError, match="computes whole drafts only"):
        remote.generate(ids_1L)


def test_the_command_lines_name_the_flags_of_the_engines(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs / "llama-run" / "model"
    assert main(["export", str(folder), str(tmp_path / "out"), "--to", "uno"]) == 0
    sglang, vllm = capsys.readouterr().out.splitlines()[1:]
    flags = f"--speculative-algorithm UNO --uno-lora-path {tmp_path / 'out'} --speculative-num-draft-tokens 4"
    assert f"--model-path {folder}" in sglang and flags in sglang
    speculative = json.loads(vllm.split("--speculative-config ")[1].strip("'"))
    assert speculative["num_speculative_tokens"] == 4 and speculative["uno_mask_token_id"] == NUM_TOKENS
    assert "--max-lora-rank 8 " in vllm  # the smallest that vLLM has for r=4


def test_an_exported_adapter_comes_back_as_the_folder_that_it_was(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for family in ("llama", "qwen3"):
        out, adapter = tmp_path / family, runs / f"{family}-uno"
        command = ["import", str(runs / family), str(adapter), str(out), "--block-size", str(WIDTH)]
        assert main(command) == 0
        assert f"converted checkpoint: {out}" in capsys.readouterr().out
        original = runs / f"{family}-run" / "model"
        ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (out, original))
        assert ours == theirs
        config = DecodeConfig(mode="lossless", max_new_tokens=LENGTH, forward_overhead=1e6)
        assert opdlm.load_config(out / "opdlm_config.yaml").format.block_size == WIDTH
        rollouts = [
            [
                (rollout.text_ids, rollout.num_forwards)
                for rollout in opdlm.generate(opdlm.load(folder)[0], PROMPTS, config)
            ]
            for folder in (out, original)
        ]
        assert rollouts[0] == rollouts[1]
        again = tmp_path / f"{family}-again"
        assert main(["export", str(out), str(again), "--to", "uno"]) == 0
        weights = (load_file(folder / "adapter_model.safetensors") for folder in (again, adapter))
        first, second = weights
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    tasks = str(runs / "prompts.jsonl")
    changes = (f"eval.path={tasks}", "eval.timed_prompts=0", "eval.decode.max_new_tokens=8")
    assert main(["eval", str(out), *changes]) == 0
    flags = ("--prompts", tasks, "--limit", "2", "--max-new-tokens", "8", "--batch-sizes", "1")
    assert main(["bench", str(out), *flags]) == 0
    printed = capsys.readouterr().out
    assert "lossless" in printed and "threshold" not in printed  # all that such a student has


REFUSED: dict[str, tuple[str, tuple[str, ...], str]] = {
    "mask": ("llama", ("format.noise=mask",), "format.noise is mask, and they feed drafts uniformly"),
    "bidirectional": ("llama", ("format.draft_attention=bidirectional",), "format.draft_attention is bidir"),
    "window": ("mistral", (), "the attention of its layers is sliding_attention"),
    "mixed": ("gemma3_text", (), "full_attention, sliding_attention, and they keep one cache"),
    "head": ("llama", ("format.draft_head=8",), "format.draft_head is used, and they have no such head"),
    "copy": ("llama", ("lora.enabled=false",), "lora.enabled is False"),
    "dora": ("llama", ("lora.use_dora=true",), "lora.use_dora (true) rescales"),
    "names": ("gpt2", (), "which they do not know"),
    "some": ("llama", (r"lora.target_modules=.*layers\.0\..*_proj",), "in some layers only"),
    "query": ("llama", ("lora.target_modules=[q_proj]",), "one of q_proj and v_proj"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_engines_would_draft_otherwise_is_refused_with_the_reason(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family, overrides, sentence = REFUSED[name]
    write_data(tmp_path)
    teacher = write_checkpoint(tmp_path / family, family)
    folder = convert(tmp_path, "run", teacher, "train.num_steps=1", *overrides)
    capsys.readouterr()
    assert main(["export", str(folder), str(tmp_path / "out"), "--to", "uno"]) == 2
    printed = capsys.readouterr().err
    assert sentence in printed and not (tmp_path / "out").exists(), printed


def test_an_sdar_folder_and_decode_flags_are_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny_overrides(runs / "llama", runs, tmp_path / "sdar")[1:]
    assert main(["convert", str(runs / "llama"), *settings, "format.name=sdar", "lora.merge=false"]) == 0
    for folder, flags, sentence in (
        (tmp_path / "sdar" / "model", [], "format.name is sdar"),
        (runs / "llama-run" / "model", ["--temperature", "1"], "--temperature has no effect with --to uno"),
    ):
        assert main(["export", str(folder), str(tmp_path / "out"), "--to", "uno", *flags]) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"peft_type": "OFT"}, "peft_type (OFT) must be LORA"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is not supported"),
        ({"r": 2}, "does not fit"),
        ({"target_modules": ["q_proj", "v_proj"]}, "is in one of the two only"),
        ({"lora_alpha": 0}, "lora.alpha (0)"),
    ],
)
def test_an_adapter_that_is_more_than_lora_or_of_another_model_is_refused(
    changes: dict[str, Any], sentence: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    values = json.loads((runs / "llama-uno" / "adapter_config.json").read_text()) | changes
    (adapter / "adapter_config.json").write_text(json.dumps(values))
    command = ["import", str(runs / "llama"), str(adapter), str(tmp_path / "out")]
    assert main(command) == 2
    assert "give the folder of an adapter" in capsys.readouterr().err
    (adapter / "adapter_model.safetensors").hardlink_to(runs / "llama-uno" / "adapter_model.safetensors")
    assert main(command) == 2
    printed = capsys.readouterr().err
    assert sentence in printed and not (tmp_path / "out").exists(), printed


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("cut-off weights", "adapter_model.safetensors is damaged or cut off"),
        ("cut-off settings", "adapter_config.json is damaged or cut off"),
        ("a list", "adapter_config.json: r (None) must be a number"),
        ("no alpha", "adapter_config.json: lora_alpha (None) must be a number"),
    ],
)
def test_a_damaged_adapter_is_told(
    damage: str, sentence: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = Path(shutil.copytree(runs / "llama-uno", tmp_path / "adapter"))
    settings, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    values = json.loads(settings.read_text())
    match damage:
        case "cut-off weights":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "cut-off settings":
            settings.write_text(settings.read_text()[:-20])
        case "a list":
            settings.write_text("[]")
        case _:
            settings.write_text(json.dumps({key: values[key] for key in values if key != "lora_alpha"}))
    assert main(["import", str(runs / "llama"), str(adapter), str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert sentence in printed and not (tmp_path / "out").exists(), printed


def test_a_rank_that_vllm_does_not_serve_is_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(runs / "llama-run" / "model", tmp_path / "model"))
    (folder / "manifest.json").unlink()
    settings = folder / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"r": 513}))
    assert main(["export", str(folder), str(tmp_path / "out"), "--to", "uno"]) == 2
    printed = capsys.readouterr().err
    assert "lora.r (513) exceeds 512" in printed and not (tmp_path / "out").exists(), printed
