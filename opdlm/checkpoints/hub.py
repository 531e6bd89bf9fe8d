"""Result folders on the Hugging Face Hub: publish one as a model repository, and fetch one.

A repository holds the files of the folder and no others, with the manifest by which loading finds damage.
`huggingface_hub` transfers them; it finds token and address in $HF_TOKEN, $HF_HOME and $HF_ENDPOINT.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, get_token, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from opdlm import __version__
from opdlm.checkpoints.folders import check_intact, check_is_checkpoint, looks_like_path
from opdlm.errors import ConfigError, DataError
from opdlm.files import write_atomic, write_manifest

LICENSE_KEYS = ("license", "license_name", "license_link")
UNKNOWN = "unknown"
"""The Hub's word for a licence that nobody stated."""
OWN_NAME = re.compile(r'^(FOLDER = "|opdlm (?:chat|serve) )[^"\s]+', re.MULTILINE)
"""Where a card names the folder or the repository that it describes."""
LOG_IN = "log in with `hf auth login` or set $HF_TOKEN to a token from https://huggingface.co/settings/tokens"
REASONS = {
    401: f"it does not know the token: {LOG_IN}",
    403: "the token may not do this: use one that may write there, or another owner",
    404: "there is no such repository, or it is private and the token may not read it",
}


def check_can_push(name: str) -> None:
    """ConfigError for a name that no repository can have, or without a token."""
    if "/" not in name or not is_repository_name(name):
        raise ConfigError(
            f"the repository ({name}) must be USER/NAME, as in ada/smollm2-diffusion: letters, digits, `-`, "
            "`_` and `.`."
        )
    if get_token() is None:
        raise ConfigError(f"{name} cannot be written without a token of the Hub: {LOG_IN}.")


def is_repository_name(name: str) -> bool:
    """Whether it is in the Hub's characters: USER/NAME, or NAME alone as of some old repositories."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def push_folder(folder: Path, name: str, *, private: bool) -> str:
    """Make the repository `name` a copy of a result folder; its address.

    The card in the folder learns the name, and the licence of the base where the Hub knows it.
    """
    check_can_push(name)
    check_is_checkpoint(str(folder), setting="")
    check_intact(folder)
    with hub_errors(f"{name} cannot be written"):
        repository = HfApi().create_repo(name, private=private or None, exist_ok=True)
        if private and not HfApi().model_info(name).private:
            raise ConfigError(
                f"{name} exists and is public, and --private (private=True) does not change that: make it "
                "private in its settings on the Hub, or choose another name."
            )
        complete_card(folder / "README.md", name)
        write_manifest(folder)
        HfApi().upload_folder(
            repo_id=name, folder_path=folder, delete_patterns="*", commit_message=f"opdlm {__version__}"
        )
    return str(repository)


def complete_card(file: Path, name: str) -> None:
    """Write the name of the repository into a card, and the licence of its base if that was unknown."""
    if not file.is_file():
        return
    card = ModelCard.load(file)
    values = card.data.to_dict()
    if values.get("license") == UNKNOWN and "base_model" in values:
        with suppress(HTTPError, OSError):  # a base without a card, or one that may not be read
            for key, value in card_license(hf_hub_download(values["base_model"], "README.md")).items():
                card.data[key] = value
    named = OWN_NAME.sub(lambda match: match[1] + name, str(card))
    write_atomic(file, f"{named.rstrip()}\n")


def card_license(file: str | Path) -> dict[str, str]:
    """The licence entries of a card; unknown where it has none, or is not there."""
    known = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict() if Path(file).is_file() else {}
    return {key: known[key] for key in LICENSE_KEYS if known.get(key)} or {"license": UNKNOWN}


def local_folder(name: str) -> str:
    """A converted model on the Hub as a folder of the Hub's cache; any other id, and any path, as it is.

    DataError for an id that the Hub does not have, or where it cannot be reached.
    """
    if looks_like_path(name) or not is_repository_name(name):
        return name
    with hub_errors(f"{name} is no folder here and cannot be fetched"):
        file = Path(hf_hub_download(name, "config.json"))
        is_converted = b'"block_diffusion"' in file.read_bytes()
        return snapshot_download(name) if is_converted else name


@contextmanager
def hub_errors(problem: str) -> Iterator[None]:
    """DataError in one sentence for what the Hub refuses or where it cannot be reached."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            reason = REASONS.get(status, " ".join(str(cause.server_message or cause).split())[:200])
            raise DataError(f"{problem}: the Hub answers {status}, {reason}.") from error
        raise DataError(
            f"{problem}: the Hub cannot be reached ({' '.join(str(cause).split())[:200]}). Try again where "
            "there is a network; $HF_ENDPOINT names another server."
        ) from error
