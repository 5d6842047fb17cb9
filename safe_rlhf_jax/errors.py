"""Errors that a user can act on; command lines print them in one line."""


class UserError(ValueError):
    """Something outside of the program is not as it has to be; the message says what, where, and the fix."""


class ConfigError(UserError):
    """A config that cannot run; the message names the field, the value and the fix."""
