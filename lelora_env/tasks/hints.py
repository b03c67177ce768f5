"""How messages name a task's options: in a form that can be copied."""

import json
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
    assignment = f"{option}={text}"
    shown = f"'{assignment}'" if set(assignment) & set(" []\"'") else assignment
    written = repr(value) if not isinstance(value, str) else json.dumps(value)
    return f'task={{"name": {name}, "data": ..., "{option}": {written}}} (command line: --task-set {shown})'
