"""The errors that callers are meant to see.

Every message says what was wrong, what was expected and what to do next. All of them are
``ValueError`` kin, so code that knows nothing of this package can still catch them.
"""

import difflib
from collections.abc import Iterable


class LeLoRAError(ValueError):
    """Bad input: the message names the argument, its value, the rule and the way out."""


class UnknownNameError(LeLoRAError):
    """A name that nothing answers to; the message suggests the closest known ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        options = sorted(known)
        close = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
        suggestion = f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
        shown = ", ".join(options[:40]) + (f" and {len(options) - 40} more" if len(options) > 40 else "")
        super().__init__(f"unknown {kind} {name!r}.{suggestion} Known: {shown}.{' ' + hint if hint else ''}")


class ModelError(LeLoRAError):
    """The model cannot be loaded, or cannot be used as asked."""


class DataError(LeLoRAError):
    """The data cannot be read, or do not fit the task or the model."""


class ActionError(LeLoRAError):
    """An action of the wrong shape, type or range; nothing has been changed by it."""


class NotReadyError(LeLoRAError):
    """A method was called out of order, such as ``step`` before ``reset``."""


class MemoryLimitError(LeLoRAError):
    """The device's memory does not suffice; the message says for what, and what would fit."""
