"""Errors that a user can act on; command lines print them in one line, and any other error with its traceback."""


class UserError(ValueError):
    """Something outside of the program is wrong; the message names it, the place and the fix."""


class ConfigError(UserError):
    """A config that cannot run; the message names the field, the value and the fix."""


class DataError(UserError):
    """Data, a template or a tokenizer that cannot be used; the message names the file and the place in it."""


class ModelError(UserError):
    """A model folder that cannot be used; the message names the folder, the field or tensor, and the fix."""


class MissingModelError(ModelError, FileNotFoundError):
    """A missing model folder, or a missing file in one; the message says what is there instead."""


class FileError(UserError, OSError):
    """A file of a run that cannot be read or written; the message names it and the reason."""


class NonFiniteError(UserError, FloatingPointError):
    """A non-finite number in a run; the message names it, the step and the last good checkpoint."""
