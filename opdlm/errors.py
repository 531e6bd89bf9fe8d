"""The two mistakes a user can make: a setting (`ConfigError`) or an input (`DataError`).

Every message names the key or place, the value, the rule and the fix. `cli` prints it as one line and exits
with code 2. Mistakes of our own are `assert`s.
"""


class OpdlmError(Exception):
    """Base of the errors that are explained to the user in one sentence."""


class ConfigError(OpdlmError):
    """A setting that cannot work: unknown key, wrong type, impossible combination."""


class DataError(OpdlmError):
    """An input that cannot be used: a missing file, a broken line, a wrong checkpoint."""
