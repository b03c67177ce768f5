"""Tasks by name: data, loss and score.

``make_task("sst2")`` reads from the Hugging Face hub; ``make_task("sst2:path/to/folder")`` reads local
files. The part behind the colon is always a path or a hub name, so that a task is one string (or one
plain dictionary) and an environment's spec stays JSON-serialisable.
"""

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from lelora_env.errors import DataError, UnknownNameError
from lelora_env.tasks.base import Rows, Splits, Task

__all__ = ["TASKS", "Rows", "Splits", "Task", "make_task"]

_CHOICE = ("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc-e", "arc-c", "obqa", "commonsense170k")
_MATH = ("gsm8k", "math", "metamathqa")
_TEXT = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "mnli-mm", "qnli", "rte", "wnli", "ag_news")

_BUILDERS: dict[str, tuple[str, str]] = {
    "planted": ("planted", "PlantedTask"),
    "docstrings": ("docstrings", "docstrings_task"),
    "text": ("classification", "TextClassification"),
    "instruction": ("instruction", "instruction_task"),
    "chat": ("chat", "chat_task"),
    "choice": ("choice", "choice_task"),
    "ultrafeedback": ("chat", "ultrafeedback_task"),
    **dict.fromkeys(_TEXT, ("glue", "glue_task")),
    **dict.fromkeys(_CHOICE, ("choice", "choice_task")),
    **dict.fromkeys(_MATH, ("maths", "math_task")),
}
"""Name → module of this package and the function or class in it."""

_NEED_DATA = ("text", "instruction", "chat", "choice")
_TAKE_NAME = (*_TEXT, *_CHOICE, *_MATH)
_NO_DATA = ("planted", "docstrings")

TASKS: tuple[str, ...] = tuple(_BUILDERS)
"""All task names; those in ``text``, ``instruction``, ``chat`` and ``choice`` are for data of your own."""


def make_task(spec: "str | Mapping[str, Any] | Task | None" = None, **options: Any) -> Task:
    """Make a task.

    Args:
        spec: One of

            * ``None``: the built-in planted task;
            * a task, which is given back as it is;
            * a name from `TASKS`, such as ``"sst2"`` (data from the hub);
            * ``"name:data"`` with a local file, folder or hub name, such as ``"sst2:data/sst2"``,
              ``"text:reviews.csv"``, ``"instruction:answers.jsonl"`` or ``"chat:talks/"``;
            * a mapping ``{"name": ..., **options}``.
        options: Options of that task, such as ``max_length``, ``train_rows``, ``eval_rows`` or
            ``data``; they win over those of a mapping.

    Raises:
        UnknownNameError: An unknown task or option.
        DataError: Options for a finished task, or missing data.
    """
    if isinstance(spec, Mapping):
        options = {**spec, **options}
        spec = str(options.pop("name", "planted"))
    if spec is not None and not isinstance(spec, str):
        if not all(callable(getattr(spec, method, None)) for method in ("splits", "loss", "predict", "score")):
            raise DataError(f"task must be a name, a mapping or an object with the methods of Task (got "
                            f"{type(spec).__name__}); a dataset of your own goes into DatasetTask")
        if options:
            raise DataError(f"the options {', '.join(sorted(options))} cannot be applied to a task that is already "
                            "made; give them where the task is made")
        return spec
    name, _, data = (spec or "planted").partition(":")
    if data and "data" in options:
        raise DataError(f"data are given twice: {data!r} in the name and data={options['data']!r}; keep one of them")
    if data:
        options["data"] = data
    return _build(name.strip().lower(), options)


def _build(name: str, options: dict[str, Any]) -> Task:
    if name not in _BUILDERS:
        raise UnknownNameError("task", name, TASKS, "Data of your own: 'text:<path>', 'instruction:<path>', "
                               "'chat:<path>' or 'choice:<path>'.")
    if name in _NEED_DATA and not options.get("data"):
        raise DataError(f"task {name!r} needs data; write '{name}:<file, folder or hub name>'")
    if name in _NO_DATA and "data" in options:
        raise DataError(f"task {name!r} makes its own data and takes no path (got {options['data']!r})")
    module, attribute = _BUILDERS[name]
    builder: Callable[..., Task] = getattr(import_module(f"lelora_env.tasks.{module}"), attribute)
    if name in _TAKE_NAME:
        options = {"name": name, **options}
    known = _options(builder, module)
    for option in options:
        if known and option not in known:
            raise UnknownNameError(f"option of task {name!r}", option, known - {"name"})
    return builder(**options)


def _options(builder: Callable[..., Task], module: str) -> set[str]:
    """Names of all options of a builder, also of those that it passes on."""
    parameters = inspect.signature(builder).parameters.values()
    known = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        passed_on, target = _PASSED_ON.get(module, ("instruction", "CausalTask"))
        known |= set(inspect.signature(getattr(import_module(f"lelora_env.tasks.{passed_on}"), target)).parameters)
    return known - _INTERNAL


_PASSED_ON = {
    "glue": ("classification", "TextClassification"),
    "docstrings": ("classification", "TextClassification"),
    "choice": ("choice", "ChoiceTask"),
}
"""Module → the class that its functions pass further options on to."""

_INTERNAL = {"formatter", "options", "column_candidates"}
"""Parameters that are not for users."""
