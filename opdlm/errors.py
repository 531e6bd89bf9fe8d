"""Errors of users: a bad setting (`ConfigError`) or a bad input (`DataError`).

Every message names the key or place, the value, the rule and the fix. The command line prints it as one line
and exits with the error's code. Errors of our own are assertions.
"""

from importlib.util import find_spec


class OpdlmError(Exception):
    """Base class of errors whose message tells the user what to change."""

    exit_code = 2


class ConfigError(OpdlmError):
    """A setting that cannot work: unknown key, wrong type, impossible combination."""


class DataError(OpdlmError):
    """An input that cannot be used: a missing file, a broken line, a wrong checkpoint."""


class TimeLimitReached(OpdlmError):
    """A training stopped in time for `train.time_limit`, with a checkpoint from which it continues."""

    exit_code = 124  # as the command `timeout`


def require_package(package: str, extra: str, setting: str) -> None:
    """ConfigError if a setting needs an optional package that is not installed. Nothing is imported."""
    if find_spec(package) is None:
        raise ConfigError(f"{setting} needs {package}, which is not installed: pip install 'opdlm[{extra}]'.")
