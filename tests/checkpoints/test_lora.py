"""Adapters: gated bit for bit, one copy of the weights, PEFT's files, merging, a 4-bit base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tiny_checkpoints import tiny_model, tiny_overrides, tiny_tokenizer, write_checkpoint, write_data
from tiny_models import CPU, MASK, make_lm, qwen3
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import opdlm
from opdlm.checkpoints.convert import make_student
from opdlm.checkpoints.load import assemble, computing_dtype, load_causal_lm
from opdlm.checkpoints.lora import adapted_layers, add_lora
from opdlm.cli.main import main
from opdlm.config.rules import load_config
from opdlm.config.sections import LoraSection
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.generate import generate
from opdlm.errors import ConfigError
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.modeling.kv_cache import DecodeCache, SlotCache
from opdlm.modeling.slots import Slots, clean_slots, join_slots, make_slots
from opdlm.training.dropout import training_dropout

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True},
    "orthogonal": {"init": "orthogonal"},
    "gaussian": {"init": "gaussian"},
    "attention": {"target_modules": ("q_proj", "v_proj")},
    "dropout": {"dropout": 0.5},
}
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is optional")


def adapted(kind: str, base: PreTrainedModel | None = None) -> DiffusionLM:
    """A preserve student whose adapter differs from its start in every part."""
    section = LoraSection(r=4, alpha=8, **KINDS[kind])
    rng = torch.Generator().manual_seed(1)
    mask_H = torch.randn(32, generator=rng) * 0.25
    model = assemble(base or qwen3(), make_lm("lora").spec, lora=section, mask_embedding=mask_H)
    with torch.no_grad():
        for name, parameter in model.student.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
    return model.eval()


def mixed_slots(model: DiffusionLM) -> Slots:
    """Nine clean tokens and the block after them, all masked."""
    ids_BL = torch.tensor([[5, 6, 7, 3, 2, 9, 8, 1, 4], [1, 2, 3, 4, 5, 6, 7, 8, 9]])
    lengths_B = torch.tensor([9, 9])
    clean = clean_slots(ids_BL, lengths_B, lengths_B, model.spec.block_grid, model.spec.format)
    positions_BS = torch.tensor([[9, 10, 11]] * 2)
    noised = make_slots(
        torch.full((2, 3), MASK),
        positions_BS,
        torch.full((2, 3), 8),
        torch.ones(2, 3, dtype=torch.long),
        torch.ones(2, 3, dtype=torch.bool),
    )
    return join_slots(clean, noised)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gated_adapter_leaves_clean_slots_the_base_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    base, untouched = qwen3().to(dtype), qwen3().to(dtype)
    model = adapted(kind, base)
    slots = mixed_slots(model)
    with torch.no_grad():
        both_BSH, num_forwards = model.decode_hidden(slots, DecodeCache(2, 32, CPU))
        alone_BSH, _ = DiffusionLM(untouched, model.spec).decode_hidden(slots, DecodeCache(2, 32, CPU))
        open_BSH = model.student_hidden(slots, SlotCache(2, 16))
    assert num_forwards == 1
    assert torch.equal(both_BSH[:, :9], alone_BSH[:, :9])
    assert (both_BSH - alone_BSH)[:, 9:].abs().max() > 1e-2
    assert (open_BSH - alone_BSH)[:, :9].abs().max() > 1e-2  # it is the gate that keeps them apart


@pytest.mark.parametrize("kind", KINDS)
def test_the_ar_logits_with_the_adapter_loaded_are_the_base_s_bit_for_bit(kind: str) -> None:
    model, ids_BL = adapted(kind), torch.tensor([[5, 6, 7, 3, 2, 9]])
    with torch.no_grad():
        expected_BLV = qwen3()(ids_BL).logits
        with model.teacher_weights() as teacher:
            assert torch.equal(teacher(ids_BL).logits, expected_BLV)
        assert not torch.equal(model.student(ids_BL).logits, expected_BLV)
    prompts = [(5, 6, 7), (9, 8, 7, 6)]
    decoding = DecodeConfig(mode="ar", max_new_tokens=12)
    plain = DiffusionLM(qwen3(), model.spec)
    ours, theirs = (generate(m, prompts, decoding) for m in (model, plain))
    assert [r.response_ids for r in ours] == [r.response_ids for r in theirs]


def test_a_gate_on_lora_b_alone_would_let_dora_change_clean_slots() -> None:
    """Why the gate of DoRA is elsewhere: the rescaled base passes beside `lora_B`."""
    model = adapted("dora")
    slots = mixed_slots(model)
    with torch.no_grad():
        right_BSH, _ = model.decode_hidden(slots, DecodeCache(2, 32, CPU))
        for module in model.student.modules():
            if isinstance(module, LoraLayer):
                module.lora_magnitude_vector["default"]._forward_hooks.clear()
                module.lora_B["default"].weight.zero_()  # the strongest gate that B can have
        wrong_BSH = model.student_hidden(slots, SlotCache(2, 16))
    assert (wrong_BSH - right_BSH)[:, :9].abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_noised_slots_reach_every_part_of_the_adapter(kind: str) -> None:
    model = adapted(kind)
    slots = mixed_slots(model)
    model.student_hidden(slots)[:, 9:].square().sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name == "mask_embedding" for name in trained)
    assert all(p.dtype == torch.float32 and p.grad.abs().max() > 0 for p in trained.values())


def storage_bytes(model: nn.Module) -> int:
    """Bytes of all weights, each storage counted once."""
    sizes = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(sizes.values())


def test_teacher_and_student_are_one_copy_in_memory() -> None:
    base_bytes = storage_bytes(qwen3())
    model = adapted("lora")
    adapter_bytes = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.teacher is None
    assert storage_bytes(model) == base_bytes + adapter_bytes
    assert adapter_bytes < base_bytes / 2
    assert storage_bytes(make_lm("copy")) > 2 * base_bytes


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    for kind, scale in (("lora", 8 / 4), ("rslora", 8 / 4**0.5)):
        model = adapted(kind)
        layers = [m for m in model.student.modules() if isinstance(m, LoraLayer)]
        assert {layer.scaling["default"] for layer in layers} == {scale}


def test_every_adapted_layer_has_a_gate() -> None:
    for kind in KINDS:
        peft_model = add_lora(qwen3(), LoraSection(r=4, **KINDS[kind]))
        layers = [m for m in peft_model.modules() if isinstance(m, LoraLayer)]
        assert len(adapted_layers(peft_model)) == len(layers) > 0


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_what_teacher_and_student_share_is_refused(target: str) -> None:
    with pytest.raises(ConfigError, match="embedding or the LM head"):
        add_lora(qwen3(), LoraSection(target_modules=("q_proj", target)))


@pytest.mark.parametrize("kind", ["dropout", "dora"])
def test_dropout_acts_inside_an_update_only_and_repeats_for_a_seed(kind: str) -> None:
    section = LoraSection(r=4, alpha=8, **(KINDS[kind] | {"dropout": 0.5}))
    model = assemble(qwen3(), make_lm("lora").spec, lora=section, mask_embedding=torch.ones(32))
    with torch.no_grad():
        for output in (p for name, p in model.named_parameters() if "lora_B" in name):
            output += 0.2
    slots, before = mixed_slots(model.eval()), torch.random.get_rng_state()

    def hidden(seed: int) -> Tensor:
        with torch.no_grad(), training_dropout(model, seed):
            return model.student_hidden(slots)

    first, again, other = hidden(1), hidden(1), hidden(2)
    with torch.no_grad():
        outside = model.student_hidden(slots)
        assert torch.equal(outside, model.student_hidden(slots))
    assert torch.equal(first, again)
    assert not torch.equal(first, other) and not torch.equal(first, outside)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(m.training for m in model.student.modules())


# Folders


VARIANTS = {
    "preserve": (),
    "preserve-rslora": ("lora.use_rslora=true",),
    "preserve-dora": ("lora.use_dora=true",),
    "sdar-merged": ("format.name=sdar",),
    "sdar-apart": ("format.name=sdar", "lora.merge=false"),
}
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4]]
IDS_BL = torch.tensor([[5, 6, 7, 30, 31, 32, 20, 9]])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`NAME/model` of every variant, each over a qwen2 with biases and made by the command."""
    root = tmp_path_factory.mktemp("lora")
    write_data(root)
    write_checkpoint(root / "teacher", "qwen2")
    for name, overrides in VARIANTS.items():
        settings = tiny_overrides(root / "teacher", root, root / name)[1:]
        assert main(["convert", str(root / "teacher"), *settings, *overrides]) == 0
    return root


def decode(model: DiffusionLM, mode: Any) -> list[tuple[int, ...]]:
    return [r.text_ids for r in generate(model, PROMPTS, DecodeConfig(mode=mode, max_new_tokens=12))]


@torch.no_grad()
def noised_logits(model: DiffusionLM) -> Tensor:
    """The student's logits `[B, S, V]` at a masked block after clean text, the banned ids left out."""
    slots = mixed_slots(model)
    slots = slots if model.spec.format == "preserve" else mixed_sdar(model)
    ids_BS = torch.where(slots.is_noised_BS, model.spec.mask_token_id, slots.ids_BS)
    slots = make_slots(
        ids_BS, slots.positions_BS, slots.visible_until_BS, slots.group_BS, slots.group_BS >= 0
    )
    hidden_BSH, _ = model.decode_hidden(slots, DecodeCache(2, 32, CPU))
    logits_BSV = model.logits(hidden_BSH)[slots.is_noised_BS]
    return logits_BSV[..., logits_BSV.isfinite().all(0)]


def mixed_sdar(model: DiffusionLM) -> Slots:
    """The same tokens with whole blocks clean."""
    slots = mixed_slots(model)
    return slots.only((slots.positions_BS < 8) | slots.is_noised_BS)


@pytest.mark.parametrize("name", ["preserve", "preserve-rslora", "preserve-dora", "sdar-apart"])
def test_peft_loads_the_adapter_folder_and_computes_what_we_do(name: str, runs: Path) -> None:
    folder = runs / name / "model"
    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), folder / "adapter")
    ours, _ = opdlm.load(folder)
    with torch.no_grad():
        assert torch.equal(peft_model(IDS_BL).logits, ours.student(IDS_BL).logits)
        with peft_model.disable_adapter():
            expected_BLV = AutoModelForCausalLM.from_pretrained(runs / "teacher")(IDS_BL).logits
            assert torch.equal(peft_model(IDS_BL).logits[..., : expected_BLV.shape[-1]], expected_BLV)
        assert not torch.equal(peft_model(IDS_BL).logits[..., : expected_BLV.shape[-1]], expected_BLV)


@pytest.mark.usefixtures("own_module_cache")
@pytest.mark.parametrize("name", VARIANTS)
def test_the_remote_code_reads_every_kind_of_adapter(name: str, runs: Path) -> None:
    folder = runs / name / "model"
    remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model, _ = opdlm.load(folder)
    torch.testing.assert_close(noised_logits(remote.diffusion), noised_logits(model), atol=1e-5, rtol=1e-5)
    for mode in ("ar", "static"):
        assert decode(remote.diffusion, mode) == decode(model, mode)


@pytest.mark.usefixtures("own_module_cache")
def test_in_bfloat16_the_remote_code_rounds_as_the_package_does(runs: Path) -> None:
    folder = runs / "preserve" / "model"
    remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    model, _ = opdlm.load(folder, "bfloat16")
    assert torch.equal(noised_logits(remote.diffusion), noised_logits(model))
    assert decode(remote.diffusion, "static") == decode(model, "static")


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_merge_adds_an_sdar_adapter_to_the_weights(runs: Path, tmp_path: Path) -> None:
    """The merged folder is what the run itself would have written, needs no adapter and computes the same."""
    apart, out = runs / "sdar-apart" / "model", tmp_path / "out"
    assert main(["merge", str(apart), str(out)]) == 0
    assert files(out) == files(apart) - {"adapter", "mask_embedding.safetensors"}
    (before, _), (after, _) = opdlm.load(apart), opdlm.load(out)
    assert not any("lora_" in name for name, _ in after.named_parameters())
    torch.testing.assert_close(noised_logits(after), noised_logits(before), atol=1e-5, rtol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(out)
    direct = AutoModelForCausalLM.from_pretrained(runs / "sdar-merged" / "model")
    for (name, left), right in zip(plain.named_parameters(), direct.parameters(), strict=True):
        torch.testing.assert_close(left, right, msg=name)
    assert (out / "opdlm_config.yaml").read_bytes() == (apart / "opdlm_config.yaml").read_bytes()


@pytest.mark.parametrize("name", ["preserve", "preserve-rslora", "preserve-dora"])
def test_a_full_copy_keeps_the_ar_weights_beside_a_merged_student(
    name: str, runs: Path, tmp_path: Path
) -> None:
    folder, out = runs / name / "model", tmp_path / "out"
    assert main(["merge", str(folder), str(out), "--full-copy"]) == 0
    (before, _), (after, _) = opdlm.load(folder), opdlm.load(out)
    assert after.teacher is not None and not (out / "adapter").exists()
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    torch.testing.assert_close(noised_logits(after), noised_logits(before), atol=1e-5, rtol=1e-5)
    for mode in ("ar", "static", "lossless"):
        assert decode(after, mode) == decode(before, mode)


@pytest.mark.usefixtures("own_module_cache")
def test_a_full_copy_has_the_dtype_of_its_base_whichever_transformers_wrote_it(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 4 wrote `torch_dtype`. A student in another dtype is loaded in that of the base."""
    monkeypatch.setattr("opdlm.checkpoints.load.cpu_multiplies", lambda dtype: True)
    computing_dtype.cache_clear()
    folder, out = tmp_path / "old", tmp_path / "out"
    shutil.copytree(runs / "preserve" / "model", folder)
    (folder / "manifest.json").unlink()
    weights = {name: value.bfloat16() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    del values["dtype"]
    (folder / "config.json").write_text(json.dumps(values | {"torch_dtype": "bfloat16"}))
    assert main(["merge", str(folder), str(out), "--full-copy"]) == 0
    student = out / "student" / "model.safetensors"
    assert {value.dtype for value in load_file(student).values()} == {torch.bfloat16}
    wide = {name: value.float() for name, value in load_file(student).items()}
    save_file(wide, student, {"format": "pt"})
    config = student.with_name("config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}))
    (out / "manifest.json").unlink(missing_ok=True)
    model, _ = opdlm.load(out)
    remote = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    for found in (model, remote.diffusion):
        assert found.teacher is not None
        assert found.teacher.dtype == found.student.dtype == torch.bfloat16
    assert decode(model, "static")
    assert remote.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4).shape == (1, 7)
    computing_dtype.cache_clear()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["merge", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_merge_refuses_what_cannot_be_and_says_what_can(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = runs / "preserve" / "model", tmp_path / "out"
    message = refused(capsys, folder, out)
    assert "noised slots only" in message and "--full-copy" in message and "Keep the folder" in message
    assert "holds no adapter" in refused(capsys, runs / "sdar-merged" / "model", out)
    assert "exists already" in refused(capsys, folder, tmp_path, "--full-copy")
    assert "not a folder written by opdlm" in refused(capsys, runs / "teacher", out)
    assert not out.exists()


def test_eval_of_an_unmerged_sdar_folder_needs_no_other_teacher(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs / "sdar-apart" / "model"
    arguments = [str(folder), f"eval.path={runs / 'eval.jsonl'}", "eval.modes=static"]
    assert main(["eval", *arguments, "eval.decode.max_new_tokens=10", "--teacher", "/no/such"]) == 0
    assert "| teacher | " in capsys.readouterr().out


# Four bits


@pytest.fixture
def in_4bit(tmp_path: Path) -> Callable[..., list[str]]:
    write_data(tmp_path)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_key_value_heads": 4}
    write_checkpoint(tmp_path / "teacher", **sizes)  # the CPU kernel needs multiples of 64

    def command(name: str, *overrides: str) -> list[str]:
        settings = tiny_overrides(tmp_path / "teacher", tmp_path, tmp_path / name)[1:]
        return ["convert", str(tmp_path / "teacher"), *settings, "model.load_in_4bit=true", *overrides]

    return command


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is here")
@pytest.mark.parametrize("setting", ["model.load_in_4bit=true", "optimizer.name=adamw8bit"])
def test_without_bitsandbytes_the_extra_is_named(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "tiny", f"output_dir={tmp_path / 'run'}", setting]) == 2
    assert "pip install 'opdlm[quant]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@needs_bitsandbytes
def test_qlora_trains_on_four_bits_and_the_folder_is_its_teacher_bit_for_bit(
    in_4bit: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert main(in_4bit("run", f"eval.path={tmp_path / 'eval.jsonl'}")) == 0
    folder = tmp_path / "run" / "model"
    quantized = load_causal_lm(str(tmp_path / "teacher"), "float32", load_in_4bit=True)
    plain = load_causal_lm(str(folder), "float32")  # AutoModel on a CPU with AVX512-bf16 rounds to it
    assert plain.is_loaded_in_4bit
    with torch.no_grad():
        assert torch.equal(plain(IDS_BL).logits[..., :64], quantized(IDS_BL).logits[..., :64])
    model, _ = opdlm.load(folder)
    assert (noised_logits(model) - noised_logits(unadapted(model))).abs().max() > 1e-3
    report = json.loads((folder / "retention.json").read_text())
    assert report["student"][-1]["identical_to_teacher"] == 1.0
    slots = mixed_slots(model)
    with torch.no_grad():
        both_BSH, _ = model.decode_hidden(slots, DecodeCache(2, 32, CPU))
        alone_BSH, _ = DiffusionLM(quantized, model.spec).decode_hidden(slots, DecodeCache(2, 32, CPU))
    assert torch.equal(both_BSH[:, :9], alone_BSH[:, :9])


def unadapted(model: DiffusionLM) -> DiffusionLM:
    """The same weights and mask embedding without what the adapter adds."""
    assert model.mask_embedding is not None
    base = load_causal_lm(str(model.student.config._name_or_path), "float32")
    return DiffusionLM(base, model.spec, mask_embedding=model.mask_embedding.data)


@needs_bitsandbytes
def test_merging_into_four_bits_unpacks_them_first(in_4bit: Callable[..., list[str]], tmp_path: Path) -> None:
    assert main(in_4bit("run", "format.name=sdar", "lora.merge=false")) == 0
    folder, out = tmp_path / "run" / "model", tmp_path / "out"
    assert main(["merge", str(folder), str(out)]) == 0
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    (before, _), (after, _) = opdlm.load(folder), opdlm.load(out)
    torch.testing.assert_close(noised_logits(after), noised_logits(before), atol=1e-4, rtol=1e-4)


def test_settings_that_exclude_each_other_are_explained() -> None:
    for settings, reason in {
        ("lora.init=pissa",): "rewrite the base weights, which are the teacher",
        ("lora.init=orthogonal", "lora.r=5"): "needs an even lora.r",
        ("model.load_in_4bit=true", "lora.enabled=false"): "set lora.enabled=true",
        ("model.load_in_4bit=true", "lora.use_dora=true"): "set one of the two to false",
    }.items():
        with pytest.raises(ConfigError, match=reason):
            load_config(None, settings)


def test_the_adapter_starts_as_the_teacher() -> None:
    """Whatever the initialisation, the student of step 0 differs from the teacher in [MASK] alone."""
    for kind in ("default", "gaussian", "orthogonal"):
        config = load_config(None, [f"lora.init={kind}", "lora.r=4"])
        model = make_student(tiny_model("llama"), tiny_tokenizer(), config)
        with torch.no_grad():
            base_BLV = tiny_model("llama")(IDS_BL).logits
            torch.testing.assert_close(model.student(IDS_BL).logits, base_BLV, atol=1e-5, rtol=1e-4)
