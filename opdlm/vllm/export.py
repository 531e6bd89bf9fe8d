"""Export to vLLM, which loads a student through our plugin (`plugin`)."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from transformers import AutoConfig, GenerationConfig

from opdlm.checkpoints.export import check_free, complete_student, copy_checkpoint, dtype_of, write_model
from opdlm.checkpoints.load import load, read_spec
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.errors import ConfigError
from opdlm.files import atomic_folder
from opdlm.modeling.diffusion_lm import DiffusionSpec
from opdlm.vllm.engine import adapter_of, check_adapter
from opdlm.vllm.lossless import DOWN, DRAFTER_FILE, HEAD, MASK_EMBEDDING, UP
from opdlm.vllm.plugin import lossless_config_values, vllm_config_values


def export_to_vllm(folder: Path, out: Path, decode: DecodeConfig | None) -> None:
    """Write a converted folder as `vllm serve OUT` reads it where this package is installed too.

    `sdar`: complete weights; our architecture's name, block size and decoding in config.json; all stop tokens
    in generation_config.json, and no sampling parameters: vLLM would take them for each request's own, which
    it refuses for diffusion. `preserve`: see `export_lossless`. ConfigError where vLLM cannot run the
    student.
    """
    spec = read_spec(folder)
    if spec.format == "preserve":
        if decode is not None:
            raise ConfigError(
                f"{folder} is a preserve student, which vLLM serves losslessly: each request chooses "
                "`temperature`, `top_k` and `top_p` as for the AR model. Leave out the decoding settings."
            )
        export_lossless(folder, out, spec)
        return
    values = vllm_config_values(AutoConfig.from_pretrained(folder), spec, decode or DecodeConfig())
    check_free(out)
    plain, tokenizer = complete_student(folder, spec)
    with atomic_folder(out) as partial:
        write_model(partial, plain, tokenizer, folder)
        values["block_diffusion"] = plain.spec.to_dict()
        config_file = partial / "config.json"
        config_file.write_text(json.dumps(json.loads(config_file.read_text()) | values, indent=2))
        GenerationConfig(
            eos_token_id=list(spec.stop_token_ids), pad_token_id=tokenizer.pad_token_id
        ).save_pretrained(partial)


def export_lossless(folder: Path, out: Path, spec: DiffusionSpec) -> None:
    """Write a `preserve` folder for `lossless`: the files of the AR model, linked where the disk allows it,
    and beside them what drafts: adapter, embedding of [MASK], draft head.
    """
    config = AutoConfig.from_pretrained(folder)
    values = lossless_config_values(config, spec)
    check_free(out)
    model, _ = load(folder, dtype_of(folder))
    check_adapter(model)
    adapter = adapter_of(model)
    tensors = {name + DOWN: down for name, (down, _) in adapter.items()}
    tensors |= {name + UP: up for name, (_, up) in adapter.items()}
    if model.mask_embedding is not None:
        tensors[MASK_EMBEDDING] = model.mask_embedding.detach()
    if model.draft_head is not None:
        tensors |= {HEAD + name: weight for name, weight in model.draft_head.state_dict().items()}
    with atomic_folder(out) as partial:
        copy_checkpoint(folder, partial)
        config_file = partial / "config.json"
        values = json.loads(config_file.read_text()) | values
        values.pop("auto_map", None)
        config_file.write_text(json.dumps(values, indent=2))
        generation_file = partial / "generation_config.json"
        settings = json.loads(generation_file.read_text()) if generation_file.is_file() else {}
        settings["eos_token_id"] = list(spec.stop_token_ids)
        generation_file.write_text(json.dumps(settings, indent=2))
        (partial / DRAFTER_FILE).parent.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / DRAFTER_FILE)
