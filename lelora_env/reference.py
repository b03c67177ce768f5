"""Objects that Gymnasium's specs must never copy, kept by reference."""

import copy
import enum
from pathlib import Path
from typing import Any

import torch


class ByReference:
    """Holds an object that must never be deep-copied, such as a model inside an ``EnvSpec``."""

    def __init__(self, value: Any) -> None:
        """Hold `value`."""
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> "ByReference":
        """A deep copy of the holder is the holder: both point at the same object."""
        return self

    def __repr__(self) -> str:
        """Short, whatever the size of the object."""
        return f"<{type(self.value).__name__} by reference>"


def by_reference_spec() -> property:
    """A ``spec`` attribute that never lets Gymnasium deep-copy a model, a task or a tokenizer.

    Gymnasium keeps the arguments of ``make`` in the spec, and every wrapper that is asked for its
    spec deep-copies them. Whatever is not plain data is therefore kept behind a `ByReference`.
    """

    def get(env: Any) -> Any:
        return env.__dict__.get("_spec")

    def put(env: Any, spec: Any) -> None:
        if spec is not None:
            spec = copy.copy(spec)
            spec.kwargs = {k: _keepable(v) for k, v in spec.kwargs.items()}
        env.__dict__["_spec"] = spec

    return property(get, put)


def _keepable(value: Any) -> Any:
    """Plain data as it is, enums and devices by their names, everything else by reference."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, torch.device):
        return str(value)
    return value if _is_plain(value) else ByReference(value)


def plain_options(options: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments with whatever a spec kept by reference taken out of its holder."""
    return {k: v.value if isinstance(v, ByReference) else v for k, v in options.items()}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(v) for v in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, str | int | float | bool | Path | ByReference)
