"""Gymnasium's form of a vector environment's info: arrays with a ``_key`` mask that says for which lanes they hold."""

from typing import Any

import numpy as np

Infos = dict[str, Any]


def add(infos: Infos, key: str, values: np.ndarray, mask: np.ndarray) -> None:
    """Add an info, (L, ...): blank where the mask (L,) is off, absent where it is off everywhere."""
    if mask.all():
        infos[key], infos[f"_{key}"] = np.array(values), mask.copy()
    elif mask.any():
        blank = np.full_like(values, None) if values.dtype == object else np.zeros_like(values)
        here = mask.reshape(-1, *[1] * (values.ndim - 1))
        infos[key], infos[f"_{key}"] = np.where(here, values, blank), mask.copy()


def split(infos: Infos, ended: np.ndarray) -> tuple[Infos, Infos]:
    """Infos of the lanes that go on, and of those that `ended` (L,)."""
    going: Infos = {}
    final: Infos = {}
    for key in [key for key in infos if not key.startswith("_")]:
        add(final, key, infos[key], infos[f"_{key}"] & ended)
        add(going, key, infos[key], infos[f"_{key}"] & ~ended)
    return going, final


def first(infos: Infos) -> Infos:
    """The info of lane 0: plain Python values, and arrays where a lane has more than one."""
    result: Infos = {}
    for key, values in infos.items():
        if not key.startswith("_") and infos[f"_{key}"][0]:
            value = values[0]
            result[key] = value.item() if isinstance(value, np.generic) else value
    return result
