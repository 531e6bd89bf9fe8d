"""What a checkpoint may be: GGUF, quantised, sharded, with code of its own, a wrapper, odd ids and fields.
Each kind converts and loads again, or is refused in one sentence.
"""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    TEMPLATE,
    tiny_model,
    tiny_overrides,
    tiny_tokenizer,
    write_checkpoint,
    write_data,
    write_rows,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2_5_VLConfig, TorchAoConfig

import opdlm
from opdlm.checkpoints.load import computing_dtype, context_length, load_causal_lm, load_tokenizer
from opdlm.cli.main import main

OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""

pytestmark = pytest.mark.usefixtures("own_module_cache")


def convert(model: Path, folder: Path, *overrides: str) -> int:
    write_data(folder)
    return main(["convert", str(model), *tiny_overrides(model, folder, folder / "run")[1:], *overrides])


def edit(folder: Path, **values: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return folder


def next_ids(folder: Path, mode: str = "lossless") -> tuple[int, ...]:
    model, tokenizer = opdlm.load(folder)
    return opdlm.generate(model, ["add 1 2"], tokenizer=tokenizer, mode=mode, max_new_tokens=8)[0].text_ids


def write_gguf(file: Path) -> torch.nn.Module:
    """A tiny Qwen2 with Q8_0 weights and its tokenizer in one file; returns the model before rounding."""
    model = tiny_model("qwen2")
    config, tokens = model.config, [f"<unused{i}>" for i in range(64)]
    for token, number in tiny_tokenizer().get_vocab().items():
        tokens[number] = token.replace(" ", "Ġ").replace("\n", "Ċ")
    tokens[60] = "ab"
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") and len(token) > 1 else 1 for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        key, values = names.get_name(name, try_suffixes=(".weight", ".bias")), weight.numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if values.ndim == 2 and values.shape[1] % 32 == 0 else None
        values = values if kind is None else gguf.quants.quantize(values, kind)
        writer.add_tensor(key, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize("by_folder", [True, False])
def test_a_gguf_file_converts_with_dense_weights(
    by_folder: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "hub" / "tiny-q8_0.gguf"
    file.parent.mkdir()
    before = write_gguf(file).state_dict()
    assert convert(file.parent if by_folder else file, tmp_path) == 0
    assert "gguf weights are dequantised" in caplog.text
    folder = tmp_path / "run" / "model"
    after = load_causal_lm(str(folder)).state_dict()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, atol=0.005, rtol=0)
    assert json.loads((folder / "config.json").read_text()).get("quantization_config") is None
    assert next_ids(folder) == next_ids(file, "ar")


def test_a_folder_of_several_gguf_files_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a-q4_0", "a-q8_0"):
        (tmp_path / f"{name}.gguf").write_bytes(b"")
    assert main(["generate", str(tmp_path), "hi", "--mode", "ar"]) == 2
    assert "2 .gguf files (a-q4_0.gguf, a-q8_0.gguf). Give one" in capsys.readouterr().err


def test_an_fp8_checkpoint_is_dequantised_and_keeps_its_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What transformers makes of it on a machine without a GPU."""
    folder = write_checkpoint(tmp_path / "fp8")
    weights = load_file(folder / "model.safetensors")
    for name, weight in list(weights.items()):
        if "_proj" in name:
            weights[name] = weight.to(torch.float8_e4m3fn)
            weights[name.replace("weight", "weight_scale_inv")] = torch.ones(
                weight.shape[0] // 16, weight.shape[1] // 16
            )
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    section = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    edit(folder, quantization_config=section)
    assert convert(folder, tmp_path) == 0
    assert "its fp8 weights are dequantised" in caplog.text
    result = tmp_path / "run" / "model"
    assert (result / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert next_ids(result) == next_ids(folder, "ar")


def without(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is not None, reason=f"{package} is here")


def quantised(kind: str, folder: Path) -> Path:
    """A checkpoint as a library packs it; its files are what transformers saves."""
    plain = write_checkpoint(folder.with_name("plain"), hidden_size=64, intermediate_size=64, head_dim=16)
    config: Any = BitsAndBytesConfig(load_in_4bit=kind == "4bit", load_in_8bit=kind == "8bit")
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=config).save_pretrained(folder)
    for file in plain.glob("*token*"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "package"), [("4bit", "bitsandbytes"), ("8bit", "bitsandbytes"), ("torchao", "torchao")]
)
def test_a_packed_base_is_adapted_and_keeps_its_weights(
    kind: str, package: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(package)
    folder = quantised(kind, tmp_path / "packed")
    assert convert(folder, tmp_path) == 0
    result = tmp_path / "run" / "model"
    before, after = (load_file(path / "model.safetensors") for path in (folder, result))
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert next_ids(result, "ar") == next_ids(folder, "ar")
    capsys.readouterr()
    status = main(["merge", str(result), str(tmp_path / "merged"), "--full-copy"])
    if kind == "torchao":
        assert status == 2 and "cannot be unpacked by transformers" in capsys.readouterr().err
        assert convert(folder, tmp_path, "format.name=sdar", f"output_dir={tmp_path / 'sdar'}") == 2
        assert "lora.merge=false" in capsys.readouterr().err
        return
    assert status == 0
    assert next_ids(tmp_path / "merged", "threshold") == next_ids(result, "threshold")


def test_compressed_tensors_are_dequantised_and_keep_their_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """8-bit weights, one scale per row. The file would be unpacked by a forward of the whole model only."""
    pytest.importorskip("compressed_tensors")
    folder = write_checkpoint(tmp_path / "packed")
    weights = load_file(folder / "model.safetensors")
    for name, weight in list(weights.items()):
        if "_proj" in name:
            scale = weight.abs().amax(-1, keepdim=True) / 127
            weights[name] = (weight / scale).round().to(torch.int8)
            weights[name.replace("weight", "weight_scale")] = scale
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    of_weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    group = {"targets": ["Linear"], "weights": of_weights, "input_activations": None}
    section = {"config_groups": {"group_0": group}, "ignore": ["lm_head"], "format": "int-quantized"}
    section |= {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
    edit(folder, quantization_config=section)
    assert convert(folder, tmp_path) == 0
    assert "its compressed-tensors weights are dequantised" in caplog.text
    result = tmp_path / "run" / "model"
    assert (result / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert next_ids(result) == next_ids(folder, "ar")
    stock: Any = AutoModelForCausalLM.from_pretrained(result, trust_remote_code=True)
    ids = load_tokenizer(str(result))("add 1 2", return_tensors="pt")["input_ids"]
    found = [stock.generate(ids, max_new_tokens=8, mode=mode).tolist() for mode in ("ar", "lossless")]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        pytest.param({"quant_method": "awq", "bits": 4}, "gptqmodel", marks=without("gptqmodel")),
        pytest.param({"quant_method": "gptq", "bits": 4}, "gptqmodel", marks=without("gptqmodel")),
        pytest.param(
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "bitsandbytes",
            marks=without("bitsandbytes"),
        ),
        ({"quant_method": "fbgemm_fp8"}, "requires a GPU"),
        ({"quant_method": "exl3"}, "quantised by exl3, which transformers cannot read"),
    ],
)
def test_quantised_weights_that_cannot_run_here_are_refused_with_the_reason(
    section: dict[str, Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = edit(write_checkpoint(tmp_path / "packed"), quantization_config=section)
    assert convert(folder, tmp_path) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_sharded_half_precision_checkpoint_keeps_its_files(dtype: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "shards")
    load_causal_lm(str(folder), dtype).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert convert(folder, tmp_path) == 0
    result = tmp_path / "run" / "model"
    for file in folder.glob("model*"):
        assert (result / file.name).read_bytes() == file.read_bytes()
    assert opdlm.load(result)[0].student.dtype == getattr(torch, computing_dtype(dtype))


def write_own_code(folder: Path) -> Path:
    write_checkpoint(folder)
    (folder / "modeling_own.py").write_text(OWN_CODE)
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    return edit(folder, model_type="own", architectures=["OwnForCausalLM"], auto_map=classes)


@pytest.mark.parametrize("name", ["preserve", "sdar"])
def test_a_checkpoint_with_code_converts_and_is_used_with_one_flag(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_own_code(tmp_path / "own")
    assert convert(folder, tmp_path) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert convert(folder, tmp_path, "--trust-remote-code", f"format.name={name}") == 0
    result = str(tmp_path / "run" / "model")
    mode = "lossless" if name == "preserve" else "static"
    assert main(["generate", result, "add 1 2", "--mode", mode]) == 2
    assert (
        main(["generate", result, "add 1 2", "--mode", mode, "--max-new-tokens", "8", "--trust-remote-code"])
        == 0
    )
    assert main(["eval", result, f"eval.path={tmp_path / 'eval.jsonl'}", "--trust-remote-code"]) == 0
    with opdlm.trust_remote_code():
        model, _ = opdlm.load(result)
        assert type(model.student).__name__ == "OwnForCausalLM"
    with pytest.raises(opdlm.DataError):
        opdlm.load(result)


def test_code_that_a_result_folder_would_lose_is_found_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_own_code(tmp_path / "own")
    (folder / "modeling_own.py").rename(folder / "slots.py")  # a name that our own code needs
    (folder / "modeling_own.py").write_text("from .slots import OwnConfig, OwnForCausalLM\n")
    assert convert(folder, tmp_path, "--trust-remote-code") == 2
    assert "brings code that a result folder cannot load" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [("lora.enabled=true",), ("lora.enabled=false", "format.name=sdar")])
def test_the_text_part_of_a_wrapper_converts_and_the_rest_stays(
    changes: tuple[str, ...], tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "wrapper", "gemma3")
    assert convert(folder, tmp_path, *changes) == 0
    result = tmp_path / "run" / "model"
    before, after = load_causal_lm(str(folder)).state_dict(), load_causal_lm(str(result)).state_dict()
    vision = [name for name in before if "vision" in name]
    assert vision and all(torch.equal(before[name], after[name]) for name in vision)
    if changes[0] == "lora.enabled=true":
        adapter = load_file(result / "adapter" / "adapter_model.safetensors")
        assert adapter and all("language_model" in name for name in adapter)
        assert next_ids(result) == next_ids(folder, "ar")


def test_a_checkpoint_without_a_causal_lm_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path / "vision")
    Qwen2_5_VLConfig().save_pretrained(folder)
    assert convert(folder, tmp_path) == 2
    assert "has none of the type qwen2_5_vl" in capsys.readouterr().err


def write_spare_id(folder: Path) -> Path:
    """The tokenizer names one id behind the last row, as Gemma 3's does."""
    write_checkpoint(folder, vocab_size=len(tiny_tokenizer()))
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<soft>"]})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["preserve", "sdar"])
def test_an_id_without_a_row_matters_only_where_data_holds_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_spare_id(tmp_path / "spare")
    assert convert(folder, tmp_path, f"format.name={name}") == 0
    result = tmp_path / "run" / "model"
    model, tokenizer = opdlm.load(result)
    spare = tokenizer.get_vocab()["<soft>"]
    assert model.spec.mask_token_id > spare
    if name == "sdar":  # its row came with the mask's, and was never trained
        assert spare in model.spec.banned_token_ids
        return
    assert next_ids(result) == next_ids(folder, "ar")
    assert main(["generate", str(result), "add <soft>", "--max-new-tokens", "8"]) == 2
    assert f"token id {spare}" in capsys.readouterr().err
    rows = write_rows(tmp_path / "soft.jsonl", [{"prompt": f"add <soft> {i}"} for i in range(9)])
    assert convert(folder, tmp_path / "again", f"data.path={rows}") == 2
    assert f"token id {spare}" in capsys.readouterr().err


def test_the_end_of_a_turn_becomes_a_stop_token(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_checkpoint(tmp_path / "chat")
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<end>\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    assert convert(folder, tmp_path) == 0
    end = tokenizer.get_vocab()["<end>"]
    assert opdlm.load(tmp_path / "run" / "model")[0].spec.stop_token_ids == (1, end)
    assert f"ends a turn with <end> (id {end})" in caplog.text


def test_a_mask_token_that_is_a_stop_token_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(write_checkpoint(tmp_path / "llama"), tmp_path, "format.mask_token=<eos>") == 2
    assert "format.mask_token (<eos>) has the id 1, which ends a response" in capsys.readouterr().err


def test_a_null_field_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = edit(write_checkpoint(tmp_path / "null"), max_position_embeddings=None)
    assert convert(folder, tmp_path) == 2
    error = capsys.readouterr().err
    assert "'max_position_embeddings' expected int, got NoneType" in error and error.count("\n") == 1


def test_a_weight_of_another_shape_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = edit(write_checkpoint(tmp_path / "shape"), intermediate_size=32)
    assert convert(folder, tmp_path) == 2
    error = capsys.readouterr().err
    assert (
        "layers.0.mlp.down_proj.weight has the shape (32, 48) in the files" in error and "(32, 32)" in error
    )


def test_a_converted_folder_starts_anew_or_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path / "llama")
    assert convert(folder, tmp_path) == 0
    assert "starts anew" not in caplog.text
    assert convert(tmp_path / "run" / "model", tmp_path / "second") == 0
    assert "this run starts anew from its AR model" in caplog.text
    assert next_ids(tmp_path / "second" / "run" / "model") == next_ids(folder, "ar")
    assert convert(folder, tmp_path / "third", "format.name=sdar") == 0
    assert convert(tmp_path / "third" / "run" / "model", tmp_path / "fourth") == 2
    assert "is a converted sdar folder" in capsys.readouterr().err


def test_texts_end_before_rotary_tables_switch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    switch = {"rope_parameters": rope, "original_max_position_embeddings": 64}
    folder = write_checkpoint(tmp_path / "phi3", "phi3", **switch)
    assert context_length(load_causal_lm(str(folder)).config) == 64
    assert convert(folder, tmp_path, "rollout.decode.max_new_tokens=60") == 2
    assert "context (64, where its rotary tables switch)" in capsys.readouterr().err
