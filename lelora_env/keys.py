"""Randomness has an address: every draw is a pure function of (seed, purpose, where it is used).

Nothing here touches a global generator, and no draw depends on what another lane has drawn.
"""

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a random draw is for; part of its key, so that purposes never share numbers."""

    DATA = 1
    HEAD = 2
    DROPOUT = 3
    SCHEDULE = 4
    MODEL = 5
    TASK = 6


def generator(seed: int, purpose: Purpose, *where: int) -> np.random.Generator:
    """A fresh NumPy generator for one address, such as ``generator(seed, Purpose.DATA, episode)``.

    Args:
        seed: Non-negative seed of the lane (or of the task, for what lanes share).
        purpose: What the numbers are for.
        where: Further non-negative coordinates, such as episode and epoch.
    """
    return np.random.default_rng(np.random.SeedSequence([seed, int(purpose), *where]))


def torch_generator(seed: int, purpose: Purpose, *where: int) -> torch.Generator:
    """A fresh CPU torch generator for one address; see `generator`."""
    state = np.random.SeedSequence([seed, int(purpose), *where]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


_MASK = 0x7FFFFFFF


def hashed_uniform(key: Tensor, counter: Tensor) -> Tensor:
    """Uniform numbers as a pure tensor function of key and counter: no generator, no hidden state.

    The counter is mixed with the key by two rounds of a multiply-xorshift hash on 31-bit integers
    kept in int64, which gives the same numbers on every device.

    Args:
        key: (L,) int64 keys, one a lane.
        counter: (C,) int64 addresses of the numbers.

    Returns:
        (L, C) float32 in [0, 1).
    """
    x = _mixed((key.unsqueeze(1) & _MASK) ^ ((counter * 0x9E3779B1) & _MASK))  # (L, C)
    return (x >> 7).to(torch.float32) / float(1 << 24)


def hashed_key(*parts: Tensor) -> Tensor:
    """One key of 31 bits from several parts, such as seed, episode and env step; a key for `hashed_uniform`.

    Args:
        parts: (L,) int64, not negative; their order counts.

    Returns:
        (L,) int64.
    """
    key = torch.zeros_like(parts[0])
    for part in parts:
        for half in (part & _MASK, part >> 31):
            key = _mixed(((key ^ half) + 0x2545F491) & _MASK)
    return key


def _mixed(x: Tensor) -> Tensor:
    """Two rounds of a multiply-xorshift hash on 31-bit integers."""
    for multiplier in (0x7FEB352D, 0x846CA68B):
        x = ((x ^ (x >> 16)) * multiplier) & _MASK
        x = x ^ (x >> 15)
    return x
