"""Refuses options of the wrong name or kind before an algorithm trips over them."""

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any

import numpy as np

from lelora_env.errors import LeLoRAError, UnknownNameError

_PLAIN = {int: "an integer", float: "a number", bool: "true or false", str: "text", NoneType: "none"}


def annotations_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Parameters of a function or class, by name, with their annotations; ``*args`` and ``**options`` left out."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.annotation for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def check_options(agent: str, options: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Compare options with the annotations of those that there are.

    Args:
        agent: Name of the agent, for messages.
        options: The options given, by name.
        known: The annotation of every option that the agent has.

    Raises:
        UnknownNameError: An option that the agent does not have.
        LeLoRAError: A value that its annotation rules out.
    """
    for name, value in options.items():
        if name not in known:
            raise UnknownNameError(f"option of agent {agent!r}", name, known)
        if not _fits(value, known[name]):
            raise LeLoRAError(f"{name} of agent {agent!r} must be {_rule(known[name])} (got {value!r})")


def _fits(value: Any, kind: Any) -> bool:
    """Whether `value` may be a `kind`; annotations that say nothing about plain values rule out nothing."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in (Any, inspect.Parameter.empty):
        return True
    if origin in (typing.Union, UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin in (tuple, Sequence) and arguments[1:] in ((), (Ellipsis,)):
        return isinstance(value, list | tuple) and all(_fits(one, arguments[0]) for one in value)
    if origin is tuple:
        return isinstance(value, list | tuple)
    if origin is Callable:
        return callable(value)
    if kind in (int, float):
        number = int | np.integer if kind is int else int | float | np.integer | np.floating
        return isinstance(value, number) and not isinstance(value, bool)
    concrete = origin or kind
    return isinstance(value, concrete) if isinstance(concrete, type) else True


def _rule(kind: Any) -> str:
    """An annotation in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, UnionType):
        return " or ".join(dict.fromkeys(_rule(one) for one in arguments))
    if origin in (tuple, Sequence):
        return f"a list, each {_rule(arguments[0])}" if arguments[1:] in ((), (Ellipsis,)) else "a pair"
    if origin is Callable:
        return "a function"
    return _PLAIN.get(kind) or f"a {getattr(kind, '__name__', kind)}"
