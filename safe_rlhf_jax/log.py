"""Messages of a run: modules use `logging`; command lines show plain lines.

A program that imports the package decides what happens to the messages, as with any library: `show()`, or its own
handlers on the logger `safe_rlhf_jax`.
"""

import logging

LOGGER = logging.getLogger("safe_rlhf_jax")  # receives all messages of the package


class Lines(logging.Handler):
    """Prints messages unchanged on the current standard output."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one message."""
        print(self.format(record), flush=True)


def show() -> None:
    """Prints the package's messages on standard output."""
    LOGGER.handlers = [Lines()]
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # libraries add their own handlers to the root


def speaks() -> bool:
    """Says whether this process shows the messages of a run."""
    return LOGGER.level < logging.CRITICAL


def hush() -> None:
    """Silences this process: the first process of a run prints its messages."""
    LOGGER.setLevel(logging.CRITICAL)
