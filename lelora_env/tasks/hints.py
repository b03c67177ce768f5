"""How messages name a task's options: in a form that can be copied."""

import json
import shlex
from collections.abc import Mapping
from typing import Any


def set_option(option: str, value: Any, task: str | None = None) -> str:
    """How to set an option of a task, in Python and on the command line.

    Args:
        option: The option's name, such as ``"eval_rows"``.
        value: A plain value to suggest.
        task: The task's name; ``None`` where it is not known.
    """
    name = "..." if task is None else json.dumps(task)
    text = value if isinstance(value, str) else json.dumps(value)
    written = repr(value) if not isinstance(value, str) else json.dumps(value)
    shell = shlex.quote(f"{option}={text}")
    return f'task={{"name": {name}, "data": ..., "{option}": {written}}} (command line: --task-set {shell})'


_REASONS = {
    "blank_text": "blank texts", "no_label": "without a label", "no_answer": "without an answer",
    "answer_cut_off": "with the answer cut off at max_length tokens",
}


def describe(left_out: Mapping[str, int]) -> str:
    """Counts of rows that are left out, such as ``"3 blank texts and 2 without a label"``."""
    return " and ".join(f"{count} {_REASONS.get(reason, reason)}" for reason, count in left_out.items() if count)
