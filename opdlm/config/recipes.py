"""Where recipes lie, and what a TARGET of the command line means."""

from __future__ import annotations

import difflib
from pathlib import Path

from opdlm.errors import ConfigError


def recipe_folder() -> Path:
    """In a wheel the recipes lie in the package, in a checkout beside it."""
    package = Path(__file__).parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def bundled_recipes(folder: str = "") -> dict[str, Path]:
    """Of conversion, of text training (`train`), or of studies (`studies`)."""
    return {path.stem: path for path in sorted((recipe_folder() / folder).glob("*.yaml"))}


def nearest_recipes(name: str, folder: str = "") -> str:
    near = difflib.get_close_matches(name, bundled_recipes(folder), n=3, cutoff=0.5)
    return (f" Did you mean {' or '.join(near)}?" if near else "") + " `opdlm recipes` lists them."


def resolve_target(target: str, folder: str = "") -> tuple[Path | None, list[str]]:
    """A recipe file, a bundled recipe's name, or a model: recipe and overrides to load settings from."""
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
    return None, [f"model.path={target}"]
