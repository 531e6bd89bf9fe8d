"""Export of an `sdar` student to vLLM, which loads it through our plugin (`plugin`)."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoConfig, GenerationConfig

from opdlm.checkpoints.export import check_free, complete_student, write_model
from opdlm.checkpoints.load import read_spec
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.errors import ConfigError
from opdlm.files import atomic_folder
from opdlm.vllm.plugin import vllm_config_values


def export_to_vllm(folder: Path, out: Path, decode: DecodeConfig) -> None:
    """Write an `sdar` folder as `vllm serve OUT` reads it where this package is installed too.

    Complete weights; our architecture's name, block size and decoding in config.json; all stop tokens in
    generation_config.json, and no sampling parameters: vLLM would take them for each request's own, which it
    refuses for diffusion. ConfigError where vLLM cannot run the student.
    """
    spec = read_spec(folder)
    if spec.format != "sdar":
        raise ConfigError(
            f"{folder} is a preserve student, whose adapter acts on noised slots only: it cannot be exported "
            "to vLLM. Use `opdlm generate`, or convert with format.name=sdar."
        )
    values = vllm_config_values(AutoConfig.from_pretrained(folder), spec, decode)
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
