"""Which rows each optimiser step trains on: a pure function of (lane seed, episode, step).

Rows are sorted into a few length buckets. How many batches each bucket gives, and in which order
they come, depends on the task alone (the shared length schedule), so all lanes see batches of the
same shape at the same step; which rows of the bucket a lane draws is its own affair. Every row is
used exactly once an epoch: what is left over in a bucket moves up to the next one, and the last
batch of all is filled up with rows of weight 0.

Shapes: L lanes · B rows per batch and lane · N rows · T tokens.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lelora_env.keys import Purpose, generator
from lelora_env.tasks.base import Rows

ROUND_TO = 8
"""Widths are rounded up to a multiple of this many tokens."""

BUCKET_QUANTILES = (0.3, 0.6, 0.9, 1.0)
"""Shares of the rows that the bucket widths are chosen to hold."""


def row_lengths(rows: Rows) -> np.ndarray:
    """Tokens in each row, (N,); zeros where rows are not sequences."""
    count = len(next(iter(rows.values())))
    if "attention_mask" not in rows:
        return np.zeros(count, dtype=np.int64)
    return rows["attention_mask"].sum(1).cpu().numpy().astype(np.int64)


def is_sequence(name: str, column: Tensor, mask: Tensor) -> bool:
    """Whether a column goes along the tokens; see `lelora_env.tasks.base.Rows`."""
    if column.shape[:2] != mask.shape:
        return False
    whole = not column.is_floating_point()
    return name.endswith(("_ids", "_mask", "_embeds")) or (name == "labels" and whole and column.dim() == 2)


def take_rows(rows: Rows, index: Tensor, width: int) -> Rows:
    """Rows by index, sequence columns cut to `width` tokens (0 = uncut)."""
    mask = rows.get("attention_mask")
    if not width or mask is None:
        return {name: column[index] for name, column in rows.items()}
    return {name: (c[:, :width] if is_sequence(name, c, mask) else c)[index] for name, c in rows.items()}


def rounded(width: int) -> int:
    """`width` rounded up to a multiple of ``ROUND_TO``."""
    return math.ceil(width / ROUND_TO) * ROUND_TO


@dataclass(frozen=True)
class Batch:
    """One batch of all lanes, lane-major.

    Attributes:
        rows: Columns of L·B rows.
        weight: (L·B,) fp32; 0 for rows that only fill up the last batch of an epoch.
    """

    rows: Rows
    weight: Tensor


class _Recent:
    """The most recently used draws, by what they are a function of; lanes with the same key share one."""

    def __init__(self) -> None:
        self.size = 2
        self._draws: OrderedDict[tuple[int, ...], np.ndarray] = OrderedDict()

    def get(self, key: tuple[int, ...], draw: Callable[..., np.ndarray]) -> np.ndarray:
        """``draw(*key)``, remembered until `size` other keys have been asked for."""
        if key not in self._draws:
            self._draws[key] = draw(*key)
        self._draws.move_to_end(key)
        while len(self._draws) > self.size:
            self._draws.popitem(last=False)
        return self._draws[key]


class Batches:
    """The training rows of a task as a stream of batches for every lane."""

    def __init__(self, rows: Rows, batch_size: int, split_seed: int) -> None:
        """Plan the epochs.

        Args:
            rows: Training rows, on the device that trains.
            batch_size: B.
            split_seed: Seed of the shared order of the buckets.
        """
        self.rows = rows
        self.batch_size = batch_size
        self.split_seed = split_seed
        lengths = row_lengths(rows)
        self.full_width = rows["attention_mask"].shape[1] if "attention_mask" in rows else 0
        quantiles = np.quantile(lengths, BUCKET_QUANTILES, method="higher")
        widths = sorted({min(rounded(int(q)), self.full_width) for q in quantiles})
        self.bucket_rows = self._sort_into(widths, lengths)
        self.batch_widths = self._plan(widths)
        self._drawn, self._orders = _Recent(), _Recent()

    @staticmethod
    def _sort_into(widths: list[int], lengths: np.ndarray) -> list[np.ndarray]:
        bucket = np.searchsorted(widths, lengths)
        return [np.flatnonzero(bucket == i) for i in range(len(widths))]

    def _plan(self, widths: list[int]) -> np.ndarray:
        """The width of every batch of an epoch, before shuffling."""
        plan, carry = [], 0
        for width, rows in zip(widths, self.bucket_rows, strict=True):
            full, carry = divmod(carry + len(rows), self.batch_size)
            plan += [width] * full
        return np.array(plan + [widths[-1]] * (carry > 0))

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        return len(self.batch_widths)

    def _order(self, epoch: int) -> np.ndarray:
        return self._orders.get((epoch,), self._draw_order)

    def _draw_order(self, epoch: int) -> np.ndarray:
        order: np.ndarray = generator(self.split_seed, Purpose.SCHEDULE, epoch).permutation(self.per_epoch)
        return order

    def width(self, step: int) -> int:
        """Tokens per row at optimiser step `step` of an episode, the same in every lane."""
        epoch, at = divmod(step, self.per_epoch)
        return int(self.batch_widths[self._order(epoch)[at]])

    def indices(self, lane: int, seed: int, episode: int, step: int) -> np.ndarray:
        """Row indices (B,) of one lane's batch; -1 marks filling.

        Args:
            lane: Only tells how many lanes there are, for the cache; it does not enter the draw.
            seed: The lane's seed.
            episode: The lane's episode.
            step: Optimiser step within the episode.
        """
        epoch, at = divmod(step, self.per_epoch)
        self._drawn.size = self._orders.size = max(self._drawn.size, 2 * (lane + 1))
        drawn: np.ndarray = self._drawn.get((seed, episode, epoch), self._draw_epoch)[at]
        return drawn

    def _draw_epoch(self, seed: int, episode: int, epoch: int) -> np.ndarray:
        rng = generator(seed, Purpose.DATA, episode, epoch)
        batches, carry = [], np.empty(0, dtype=np.int64)
        for rows in self.bucket_rows:
            pool = rng.permutation(np.concatenate([carry, rows]))
            full = len(pool) // self.batch_size * self.batch_size
            batches.append(pool[:full])
            carry = pool[full:]
        if len(carry):
            batches.append(np.concatenate([carry, np.full(self.batch_size - len(carry), -1)]))
        drawn: np.ndarray = np.concatenate(batches).reshape(-1, self.batch_size)[self._order(epoch)]
        return drawn

    def gather(self, indices: Tensor, width: int) -> Batch:
        """Fetch a batch: indices (L, B) of row numbers on the rows' device, -1 for filling."""
        index = indices.reshape(-1)
        return Batch(take_rows(self.rows, index.clamp_min(0), width), (index >= 0).float())
