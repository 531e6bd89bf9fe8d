"""Where recipes are stored, and what a TARGET on the command line means."""

from __future__ import annotations

import difflib
from itertools import product
from pathlib import Path

from opdlm.errors import ConfigError

QWEN3 = {f"qwen3_{size.lower()}": f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B")}
FORMER_RECIPES = {
    **{f"{old}_lora_24gb": f"preserve_lora model.path={path}" for old, path in QWEN3.items()},
    **{
        f"{old}_{data}": f"sdar_full model.path={path}"
        for (old, path), data in product(QWEN3.items(), ("math", "math_thinking", "general"))
    },
    "llama3.2_1b": "preserve_lora model.path=meta-llama/Llama-3.2-1B-Instruct",
    "smollm3_3b": "preserve_lora model.path=HuggingFaceTB/SmolLM3-3B",
    "gemma3_1b": "preserve_lora model.path=google/gemma-3-1b-it",
    "qwen3_0.6b_dual": "dual",
    "qwen3_0.6b_block_sft": "block_sft",
}
"""Names of recipes that held one model each: what to type now."""


def shipped_folder(name: str) -> Path:
    """`recipes` and `examples` lie inside the package in a wheel, and beside it in a checkout."""
    package = Path(__file__).parent.parent
    return package / name if (package / name).is_dir() else package.parent / name


def bundled_recipes(folder: str = "") -> dict[str, Path]:
    """Recipes by name: of conversion, of text training (`train`) or of studies (`studies`)."""
    return {path.stem: path for path in sorted((shipped_folder("recipes") / folder).glob("*.yaml"))}


def nearest_recipes(name: str, folder: str = "") -> str:
    """The end of an error message about a name that no recipe has."""
    similar = difflib.get_close_matches(name, bundled_recipes(folder), n=3, cutoff=0.5)
    near = [FORMER_RECIPES[name]] if name in FORMER_RECIPES else similar
    return (f" Did you mean {' or '.join(near)}?" if near else "") + " `opdlm recipes` lists them."


def resolve_target(target: str, folder: str = "") -> tuple[Path | None, list[str]]:
    """The recipe file and the overrides that a TARGET stands for.

    TARGET is a recipe file, the name of a bundled recipe, or a model (then the recipe is None). Raises
    ConfigError where it is none of these.
    """
    if target.endswith((".yaml", ".yml")):
        return Path(target), []
    recipes = bundled_recipes(folder)
    if target in recipes:
        return recipes[target], []
    if "=" in target:
        raise ConfigError(f"TARGET ({target}) looks like an override: put the recipe or model before it.")
    looks_like_name = not Path(target).exists() and "/" not in target and ":" not in target
    if looks_like_name:
        raise ConfigError(
            f"TARGET ({target}) is neither a bundled recipe, nor a recipe file, nor a checkpoint folder or "
            f"hub id.{nearest_recipes(target, folder)}"
        )
    from opdlm.config.loader import override_of  # pydantic, which help and `opdlm recipes` do without

    return None, [override_of("model.path", target)]
