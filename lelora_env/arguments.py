"""Checks of what ``reset``, ``set_state`` and the constructors are given."""

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from lelora_env.errors import DataError, LeLoRAError, UnknownNameError
from lelora_env.tasks.base import SPLIT_NAMES, Splits


def check_vocabulary(splits: Splits, config: Any) -> None:
    """See that every token id has an embedding.

    Raises:
        DataError: It has not: tokenizer and model do not belong together.
    """
    size = getattr(config, "vocab_size", None)
    for name in SPLIT_NAMES:
        ids = splits[name].get("input_ids")
        if isinstance(size, int) and ids is not None and ids.numel() and int(ids.max()) >= size:
            raise DataError(f"the tokenizer gives token {int(ids.max())}, but the model has {size} embeddings: they do "
                            "not belong together. Give the model's own tokenizer as tokenizer= .")


def checked_mode(mode: AutoresetMode | str) -> AutoresetMode:
    """The autoreset mode, from itself or its name.

    Raises:
        UnknownNameError: There is none of that name.
    """
    known = [m.value for m in AutoresetMode]
    value = mode.value if isinstance(mode, AutoresetMode) else str(mode)
    if value not in known:
        raise UnknownNameError("autoreset_mode", value, known)
    return AutoresetMode(value)


def checked_seed(seed: Any) -> int:
    """A seed as a plain integer.

    Raises:
        LeLoRAError: Not an integer from 0 to 2**63 - 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**63:
        raise LeLoRAError(f"seed must be an integer from 0 to 2**63 - 1 (got {seed!r})")
    return int(seed)


def lane_seeds(seed: int | list[int | None] | None, lanes: int, shared: bool) -> list[int | None]:
    """One seed per lane from what ``reset`` was given; `shared` gives all lanes the same.

    Raises:
        LeLoRAError: Not an integer from 0 to 2**63 - 1, or a list that does not fit.
    """
    if seed is None:
        return [None] * lanes
    if not isinstance(seed, list | tuple | np.ndarray):
        first = checked_seed(seed)
        return [checked_seed(first + (0 if shared else lane)) for lane in range(lanes)]
    if shared:
        raise LeLoRAError("with common_random_numbers=True all lanes share one seed: give reset() one integer.")
    if len(seed) != lanes:
        raise LeLoRAError(f"seed must be one integer or {lanes} of them, one a lane (got {len(seed)})")
    return [None if one is None else checked_seed(one) for one in seed]


def reset_mask(options: dict[str, Any] | None, lanes: int) -> np.ndarray:
    """Which lanes ``reset`` is to start, (L,) bool, from its options.

    Raises:
        LeLoRAError: An unknown option, or a mask that does not fit.
    """
    for name in options or {}:
        if name != "reset_mask":
            raise UnknownNameError("reset option", name, ["reset_mask"])
    mask = (options or {}).get("reset_mask")
    if mask is None:
        return np.ones(lanes, dtype=bool)
    fits = isinstance(mask, np.ndarray) and mask.shape == (lanes,) and mask.dtype == np.bool_
    if not fits or not mask.any():
        raise LeLoRAError(f"options['reset_mask'] must be a bool array of shape ({lanes},) with at least "
                          f"one True (got {mask!r})")
    return np.array(mask, dtype=bool)


def lane_list(lanes: int | list[int] | None, count: int) -> list[int]:
    """Lane numbers from one, several or ``None`` = all.

    Raises:
        LeLoRAError: There is no such lane.
    """
    if lanes is None:
        return list(range(count))
    found = sorted({int(lane) for lane in np.atleast_1d(lanes)})
    for lane in found:
        if not 0 <= lane < count:
            raise LeLoRAError(f"there is no lane {lane}; lanes count from 0 to {count - 1}.")
    return found
