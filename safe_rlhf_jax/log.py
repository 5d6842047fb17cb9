"""What a run says. Modules speak through `logging`; command lines show it as plain lines.

A program that imports the package decides what becomes of the messages, as with any library: `show()`, or handlers of
its own on the logger `safe_rlhf_jax`.
"""

import logging

LOGGER = logging.getLogger("safe_rlhf_jax")  # all messages of the package pass it


class Lines(logging.Handler):
    """Prints messages as they are, on what is standard output at that time."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one message."""
        print(self.format(record), flush=True)


def show() -> None:
    """Prints what the package says on standard output."""
    LOGGER.handlers = [Lines()]
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # libraries give handlers of their own to the root


def speaks() -> bool:
    """Says whether this process shows what a run does."""
    return LOGGER.level < logging.CRITICAL


def hush() -> None:
    """Says nothing more in this process: what a run says, its first process says."""
    LOGGER.setLevel(logging.CRITICAL)
