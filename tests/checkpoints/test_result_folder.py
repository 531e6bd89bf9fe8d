"""What `opdlm convert` leaves: the AR model bit for bit, the diffusion model, the record of the run."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from tiny_checkpoints import NUM_TOKENS, tiny_overrides, write_checkpoint, write_data
from transformers import AutoModelForCausalLM, AutoTokenizer

import opdlm
from opdlm.checkpoints.load import computing_dtype, input_embedding, with_known_dtype
from opdlm.cli.main import main
from opdlm.config.rules import load_config
from opdlm.decoding.decode_config import DecodeConfig, Mode
from opdlm.decoding.generate import generate

ROOT = Path(__file__).parents[2]
VARIANTS = {
    "preserve-lora": ("llama", ("format.name=preserve",)),
    "preserve-copy": ("qwen3", ("format.name=preserve", "lora.enabled=false")),
    "preserve-sinks": ("gpt_oss", ("format.name=preserve",)),
    "sdar-full": ("gemma3_text", ("format.name=sdar", "lora.enabled=false")),
    "sdar-lora": ("llama", ("format.name=sdar",)),
}
FULL_VOCABULARY = ("qwen3",)
"""Families whose checkpoint has no free row for the mask token."""
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`NAME/model` for every variant, made by the command; `FAMILY` holds the teacher it came from."""
    root = tmp_path_factory.mktemp("runs")
    _, tasks = write_data(root)
    for name, (family, overrides) in VARIANTS.items():
        changes = {"vocab_size": NUM_TOKENS} if family in FULL_VOCABULARY else {}
        teacher = write_checkpoint(root / family, family, **changes)
        settings = [*tiny_overrides(teacher, root, root / name)[1:], f"eval.path={tasks}", *overrides]
        recipe = root / f"{name}.yaml"
        recipe.write_text(load_config(None, [f"model.path={teacher}", *settings]).to_yaml())
        assert main(["convert", str(recipe)]) == 0
    return root


pytestmark = pytest.mark.usefixtures("own_module_cache")


def modes_of(name: str) -> list[Mode]:
    return ["ar", "static", "threshold", "lossless"] if "preserve" in name else ["ar", "static", "threshold"]


@pytest.mark.parametrize("name", ["preserve-lora", "preserve-copy"])
def test_the_folder_without_remote_code_is_the_teacher_bit_for_bit(name: str, runs: Path) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(runs / VARIANTS[name][0])
    plain = AutoModelForCausalLM.from_pretrained(runs / name / "model", trust_remote_code=False)
    assert type(plain) is type(teacher)
    ids_BL = torch.tensor([[5, 6, 7, 30, 31, 32, 2, 9]])
    with torch.no_grad():
        expected_BLV, logits_BLV = teacher(ids_BL).logits, plain(ids_BL).logits
    assert torch.equal(logits_BLV, expected_BLV)


@pytest.mark.parametrize("name", ["preserve-lora", "preserve-copy"])
def test_the_files_of_the_original_are_in_the_folder_byte_for_byte(name: str, runs: Path) -> None:
    """Weights, tokenizer, template and generation config; config.json gains two entries."""
    source, folder = runs / VARIANTS[name][0], runs / name / "model"
    for file in source.iterdir():
        if file.name != "config.json":
            assert (folder / file.name).read_bytes() == file.read_bytes(), file.name
    before = json.loads((source / "config.json").read_text())
    after = json.loads((folder / "config.json").read_text())
    assert {key: after.pop(key) is not None for key in ("block_diffusion", "auto_map")}
    assert after == before


@pytest.mark.skipif(torch.accelerator.is_available(), reason="about CPUs")
@pytest.mark.parametrize("has_instructions", [True, False])
def test_a_bfloat16_checkpoint_is_converted_in_what_the_cpu_multiplies_and_not_rewritten(
    has_instructions: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("opdlm.checkpoints.load.cpu_multiplies", lambda dtype: has_instructions)
    computing_dtype.cache_clear()
    write_data(tmp_path)
    source = write_checkpoint(tmp_path / "source", "llama", vocab_size=NUM_TOKENS)
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    assert main(["convert", str(source), *tiny_overrides(source, tmp_path, tmp_path / "run")[1:]]) == 0
    computing_dtype.cache_clear()
    folder = tmp_path / "run" / "model"
    used = load_config(tmp_path / "run" / "config.yaml").model.dtype
    assert used == ("bfloat16" if has_instructions else "float32")
    assert (folder / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    told = [record for record in caplog.records if "has no instructions for bfloat16" in record.message]
    assert len(told) == (not has_instructions)
    model, _ = opdlm.load(folder)
    assert model.student.dtype == getattr(torch, used)
    assert model.spec.mask_token_id == NUM_TOKENS == model.student.config.vocab_size
    lora = [p for name, p in model.student.named_parameters() if "lora_" in name]
    assert lora and all(p.dtype == torch.float32 for p in lora)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_remote_code_class_generates_what_the_package_generates(name: str, runs: Path) -> None:
    folder = runs / name / "model"
    remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(remote).__module__.startswith("transformers_modules")
    model, _ = opdlm.load(folder)
    for mode in modes_of(name):
        rollouts = generate(model, PROMPTS, DecodeConfig(mode=mode, max_new_tokens=12))
        for prompt, rollout in zip(PROMPTS, rollouts, strict=True):
            ids_BL = remote.generate(torch.tensor([prompt]), mode=mode, max_new_tokens=12)
            assert ids_BL[0].tolist() == prompt + list(rollout.text_ids), mode


def test_the_remote_code_class_refuses_templates(runs: Path) -> None:
    """`generate` of transformers continues a text: filled gaps have no place in what it returns."""
    remote = AutoModelForCausalLM.from_pretrained(runs / "preserve-lora" / "model", trust_remote_code=True)
    mask = remote.diffusion.spec.mask_token_id
    for ids in ([5, mask, 6], [mask, 5]):
        with pytest.raises(ValueError, match=rf"mask token \({mask}\).*infill=True"):
            remote.generate(torch.tensor([ids]), mode="static", ar_accept_threshold=0.0, max_new_tokens=4)


@pytest.mark.parametrize("name", VARIANTS)
def test_training_reached_the_folder(name: str, runs: Path) -> None:
    """What is loaded decodes as the trained student, not as the teacher: [MASK] and weights were kept."""
    model, tokenizer = opdlm.load(runs / name / "model")
    if name.startswith("sdar"):
        assert tokenizer.mask_token_id == model.spec.mask_token_id
    assert tokenizer.chat_template
    before = AutoModelForCausalLM.from_pretrained(runs / VARIANTS[name][0])
    changed = [
        key
        for key, weight in model.student.state_dict().items()
        if key in before.state_dict() and weight.shape == before.state_dict()[key].shape
        if not torch.equal(weight, before.state_dict()[key])
    ]
    assert bool(changed) == (name not in ("preserve-lora", "preserve-sinks"))
    if name.startswith("preserve"):
        assert model.mask_embedding is not None
    else:
        mask_H = input_embedding(model.student).weight[model.spec.mask_token_id]
        assert not torch.equal(mask_H, input_embedding(before).weight[model.spec.mask_token_id])


@pytest.mark.parametrize("name", VARIANTS)
def test_the_folder_holds_the_record_of_the_run(name: str, runs: Path) -> None:
    folder = runs / name / "model"
    names = {path.name for path in folder.iterdir()}
    files = "config.json generation_config.json model.safetensors tokenizer.json retention.json README.md"
    assert names >= {
        *files.split(),
        "opdlm_config.yaml",
        "training.png",
        "retention.png",
        "all_results.json",
    }
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".pth", ".ckpt")]
    wanted, written = load_config(runs / f"{name}.yaml"), load_config(folder / "opdlm_config.yaml")
    assert datetime.date.fromisoformat(written.data.date)  # the day of the start
    assert replace(written, data=replace(written.data, date="")) == with_known_dtype(wanted)
    report = json.loads((folder / "retention.json").read_text())
    replacing = {"static", "threshold"} if "preserve" in name else set()
    names = []
    for mode in modes_of(name)[1:]:
        names += [mode, f"{mode}, alone"] if mode in replacing else [mode]
    assert [row["name"] for row in report["student"]] == names
    if "preserve" in name:
        assert report["student"][-1]["identical_to_teacher"] == 1.0
    card = (folder / "README.md").read_text()
    assert "trust_remote_code=True" in card and "| teacher |" in card
    assert len((folder / "generations.jsonl").read_text().splitlines()) == 3 * (1 + len(report["student"]))


def test_the_settings_in_the_folder_replay_as_a_recipe(runs: Path, tmp_path: Path) -> None:
    recipe = runs / "preserve-lora" / "model" / "opdlm_config.yaml"
    torch.rand(1)  # whatever drew from the global generator before must not matter
    assert main(["convert", str(recipe), f"output_dir={tmp_path / 'again'}"]) == 0
    for name in ("mask_embedding.safetensors", "adapter/adapter_model.safetensors", "model.safetensors"):
        first, second = runs / "preserve-lora" / "model" / name, tmp_path / "again" / "model" / name
        assert first.read_bytes() == second.read_bytes(), name


def test_the_adapter_folder_is_a_peft_adapter_of_the_teacher(runs: Path) -> None:
    folder = runs / "preserve-lora" / "model"
    base = AutoModelForCausalLM.from_pretrained(runs / "llama")
    with pytest.warns(UserWarning, match="acts_on_masked_slots_only_so_load_it_with_opdlm"):
        adapted = PeftModel.from_pretrained(base, folder / "adapter")
    ids_BL = torch.tensor([[5, 6, 7, 30]])
    with torch.no_grad():
        on_BLV = adapted(ids_BL).logits
        with adapted.disable_adapter():
            off_BLV = adapted(ids_BL).logits
    assert not torch.equal(on_BLV, off_BLV)
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert all(".lora_" in name for name in file.keys())  # noqa: SIM118
    assert AutoTokenizer.from_pretrained(folder).mask_token is None


@pytest.mark.parametrize("name", ["preserve-lora", "sdar-full"])
def test_generate_answers_in_every_mode(name: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for mode in modes_of(name):
        arguments = ["generate", str(runs / name / "model"), "add 1 2", "copy", "--mode", mode]
        assert main([*arguments, "--max-new-tokens", "8"]) == 0
        output = capsys.readouterr()
        assert output.out and "per forward" in output.err


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / "cli.py"), *arguments], capture_output=True, text=True)


def test_generate_works_in_a_process_of_its_own(runs: Path) -> None:
    folder = runs / "preserve-lora" / "model"
    generated = run_command("generate", str(folder), "add 1 2", "--max-new-tokens", "8")
    assert generated.returncode == 0 and len(generated.stderr.splitlines()) == 1, generated.stderr


@pytest.mark.slow
def test_eval_works_in_a_process_of_its_own(runs: Path, tmp_path: Path) -> None:
    folder, out = runs / "preserve-lora" / "model", tmp_path / "report"
    evaluated = run_command("eval", str(folder), "eval.modes=lossless", "--out", str(out))
    shown = [line for line in evaluated.stderr.splitlines() if not re.search(r" \d+/\d+( |$)", line)]
    assert evaluated.returncode == 0 and not shown, evaluated.stderr  # nothing but progress
    assert "| lossless |" in evaluated.stdout
    pages = {"report.html", "report.md", "retention.png", "speed.png", "divergence.png"}
    assert {path.name for path in out.iterdir()} == pages | {
        *("retention.json", "timing.json", "generations.jsonl")
    }


def test_eval_of_an_sdar_folder_finds_its_teacher(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(runs / "sdar-full" / "model"), "eval.modes=static"]) == 0
    assert "| teacher | " in capsys.readouterr().out
