"""Errors that a user can act on; command lines print them in one line, and any other error with its traceback."""

from collections.abc import Callable
from typing import ClassVar, TypeVar

E = TypeVar("E", bound=Exception)


class UserError(ValueError):
    """Something outside of the program is wrong; the message names it, the place and the fix.

    Attributes:
        status: The exit status of a command line that ends with it.
    """

    status: ClassVar[int] = 1


class ConfigError(UserError):
    """A config that cannot run; the message names the field, the value and the fix."""


def shown_as(builtin: type[Exception]) -> Callable[[type[E]], type[E]]:
    """Gives a class the name of a built-in error in tracebacks: programs read these, and have read that name."""

    def named(error: type[E]) -> type[E]:
        error.__module__, error.__qualname__ = builtin.__module__, builtin.__qualname__
        return error

    return named


class NotCertifiedError(UserError):
    """A policy that is not certified: nothing is wrong with the run, which ends all the same, with status 3."""

    status = 3


@shown_as(ValueError)
class DataError(UserError):
    """Data, a template or a tokenizer that cannot be used; the message names the file and the place in it."""


@shown_as(ValueError)
class ModelError(UserError):
    """A model folder that cannot be used; the message names the folder, the field or tensor, and the fix."""


@shown_as(FileNotFoundError)
class MissingModelError(ModelError, FileNotFoundError):
    """A missing model folder, or a missing file in one; the message says what is there instead."""


@shown_as(OSError)
class FileError(UserError, OSError):
    """A file of a run that cannot be read or written; the message names it and the reason."""


@shown_as(FloatingPointError)
class NonFiniteError(UserError, FloatingPointError):
    """A non-finite number in a run; the message names it, the step and the last good checkpoint."""
