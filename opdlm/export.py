"""The result folder: one directory that is the AR model, the diffusion model, and the record of the run.

`AutoModelForCausalLM.from_pretrained(folder)` is the base architecture with the base weights (`preserve`: the
teacher, bit for bit). With `trust_remote_code=True` it is the diffusion model: the remote code is a copy of
this package's own decoding rooms, so there is one implementation.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from peft import PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from opdlm.diffusion import DiffusionLM
from opdlm.models import ADAPTER_FOLDER, MASK_EMBEDDING_FILE, STUDENT_FOLDER, set_embedding_row

REMOTE_ROOMS = (
    *("modeling_opdlm", "generate", "lossless", "denoise", "rows", "diffusion", "attention", "cache"),
    *("unmasking", "blocks", "records"),
)
AUTO_MAP = {"AutoModelForCausalLM": "modeling_opdlm.OpdlmForCausalLM"}


def write_model(folder: Path, model: DiffusionLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write weights, adapter, tokenizer, config and remote code. Takes the LoRA layers off `model`: load it
    again.
    """
    spec, peft_model = model.spec, vars(model).get("peft_model")
    if isinstance(peft_model, PeftModel):
        peft_model.save_pretrained(str(folder / ADAPTER_FOLDER))
        (folder / ADAPTER_FOLDER / "README.md").unlink(missing_ok=True)
        base = peft_model.merge_and_unload() if spec.format == "sdar" else peft_model.unload()
    elif spec.format == "preserve":
        model.student.save_pretrained(folder / STUDENT_FOLDER)
        assert model.teacher is not None
        base = model.teacher
    else:
        base = model.student
    if model.mask_embedding is not None:
        if spec.format == "sdar":
            set_embedding_row(base, spec.mask_token_id, model.mask_embedding)
        else:
            save_file(
                {"mask_embedding": model.mask_embedding.detach().contiguous()}, folder / MASK_EMBEDDING_FILE
            )
    base.config.block_diffusion = spec.to_dict()
    base.config.auto_map = AUTO_MAP
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    package = Path(__file__).parent
    for room in REMOTE_ROOMS:
        shutil.copyfile(package / f"{room}.py", folder / f"{room}.py")
