"""The two mistakes a user can make: a setting (`ConfigError`) or an input (`DataError`).

Every message names the key or place, the value, the rule and the fix. `cli` prints it as one line and exits
with code 2. Mistakes of our own are `assert`s.
"""

from importlib.util import find_spec


class OpdlmError(Exception):
    """Base of the errors that are explained to the user in one sentence."""


class ConfigError(OpdlmError):
    """A setting that cannot work: unknown key, wrong type, impossible combination."""


class DataError(OpdlmError):
    """An input that cannot be used: a missing file, a broken line, a wrong checkpoint."""


def require_package(package: str, extra: str, setting: str) -> None:
    """A setting needs an optional package: say which, before anything starts."""
    if find_spec(package) is None:
        raise ConfigError(f"{setting} needs {package}, which is not installed: pip install 'opdlm[{extra}]'.")
