"""Errors that a user can act on; command lines print them in one line, and any other with its traceback."""


class UserError(ValueError):
    """Something outside of the program is not as it has to be; the message says what, where, and the fix."""


class ConfigError(UserError):
    """A config that cannot run; the message names the field, the value and the fix."""


class DataError(UserError):
    """Data, a template or a tokenizer that cannot be used; the message names the file and the place in it."""


class ModelError(UserError):
    """A model folder that cannot be used; the message names the folder, the field or tensor, and the fix."""


class MissingModelError(ModelError, FileNotFoundError):
    """A model folder, or a file of one, that is not there; the message says what is there instead."""


class FileError(UserError, OSError):
    """A file of a run that cannot be read or written; the message names it and says why."""


class NonFiniteError(UserError, FloatingPointError):
    """A number of a run is no longer finite; the message names it, the step and the last good checkpoint."""
