"""From an action to the mask of components that train. Pure integer work on small tables.

Shapes: L lanes · M matrices · K bank slots a matrix · R ranks · S locations.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lelora_env.config import AdapterConfig
from lelora_env.errors import ActionError, LeLoRAError


def component_range(dimension: int, rank: int, fraction: float) -> range:
    """The components that the choice (rank, location) trains in one matrix.

    Follows Section 3.1 of the paper with the start clipped so that the choice is never cut off:
    start = min(⌊fraction·m⌋, m - r), with r clipped to m. Fraction 1 therefore means the r smallest.

    Args:
        dimension: m = min(out, in), the number of singular values.
        rank: r ≥ 0.
        fraction: Location as a fraction of the spectrum, in [0, 1].
    """
    rank = min(rank, dimension)
    start = min(int(fraction * dimension + 1e-9), dimension - rank)
    return range(start, start + rank)


def bank_components(dimension: int, config: AdapterConfig) -> list[int]:
    """Every component that some choice can reach, ascending: what the bank of a matrix holds."""
    reached: set[int] = set()
    for fraction in config.location_fractions:
        for rank in config.rank_set:
            reached.update(component_range(dimension, rank, fraction))
    return sorted(reached)


@dataclass(frozen=True, eq=False)
class ChoiceTable:
    """All choices of all matrices as one lookup table.

    Attributes:
        mask: (M, R, S, K) bool: the bank slots that each choice trains.
        ranks: (M, R) int64: each choice's rank, clipped to the matrix.
        legal: (M, R) bool: ranks that fit the matrix unclipped (the smallest always counts as legal,
            so that no matrix is left without a choice); feeds ``action_masks()``.
        components: (M, K) int64: spectrum index in each slot, -1 for unused slots.
    """

    mask: Tensor
    ranks: Tensor
    legal: np.ndarray
    components: Tensor

    @property
    def nvec(self) -> np.ndarray:
        """(2M,) sizes of the flat action, rank and location interleaved."""
        m, r, s, _ = self.mask.shape
        return np.tile(np.array([r, s], dtype=np.int64), m)


def build_choice_table(dimensions: list[int], config: AdapterConfig) -> ChoiceTable:
    """Build the table for matrices with the given numbers of singular values.

    Raises:
        LeLoRAError: The largest rank exceeds every matrix.
    """
    largest = max(dimensions)
    if config.max_rank > largest:
        raise LeLoRAError(
            f"the largest rank must fit at least one matrix: rank_set={config.rank_set} goes up to "
            f"{config.max_rank}, the largest of {len(dimensions)} matrices has {largest} singular values. "
            "Lower rank_set."
        )
    banks = {m: bank_components(m, config) for m in set(dimensions)}
    slots = max(len(bank) for bank in banks.values())
    shape = (len(config.rank_set), len(config.locations), slots)
    masks = {m: _choice_mask(m, banks[m], config, shape) for m in banks}
    padded = {m: bank + [-1] * (slots - len(bank)) for m, bank in banks.items()}
    return ChoiceTable(
        mask=torch.from_numpy(np.stack([masks[m] for m in dimensions])),
        ranks=torch.tensor([[min(r, m) for r in config.rank_set] for m in dimensions]),
        legal=np.array([[r <= m or i == 0 for i, r in enumerate(config.rank_set)] for m in dimensions]),
        components=torch.tensor([padded[m] for m in dimensions]),
    )


def _choice_mask(dimension: int, bank: list[int], config: AdapterConfig, shape: tuple[int, int, int]) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)  # (R, S, K)
    slot = {component: k for k, component in enumerate(bank)}
    for i, rank in enumerate(config.rank_set):
        for j, fraction in enumerate(config.location_fractions):
            mask[i, j, [slot[c] for c in component_range(dimension, rank, fraction)]] = True
    return mask


@dataclass(frozen=True, eq=False)
class Allocation:
    """The choice of every matrix, in every lane.

    Attributes:
        rank_index: (L, M) int64, index into ``rank_set``.
        location_index: (L, M) int64, index into ``locations``.
    """

    rank_index: Tensor
    location_index: Tensor


def decode_action(action: np.ndarray, lanes: int, table: ChoiceTable) -> Allocation:
    """Check a batch of flat actions and read them as allocations.

    Args:
        action: (L, 2M) integers: rank index and location index of each matrix, interleaved.
        lanes: L.
        table: The choices on offer.

    Raises:
        ActionError: Wrong shape, type or range. Nothing has happened by then.
    """
    array = np.asarray(action)
    nvec = table.nvec
    if array.shape != (lanes, len(nvec)):
        raise ActionError(
            f"an action must have shape {(lanes, len(nvec))} (lanes, 2 x matrices: rank index and location "
            f"index of each matrix, interleaved); got {array.shape}. Take it from action_space.sample() or "
            "encode_action()."
        )
    if not np.issubdtype(array.dtype, np.integer):
        raise ActionError(f"an action must hold integers; got {array.dtype}. Convert it with .astype(np.int64).")
    wrong = (array < 0) | (array >= nvec)
    if wrong.any():
        lane, at = (int(x) for x in np.argwhere(wrong)[0])
        kind = "rank" if at % 2 == 0 else "location"
        raise ActionError(
            f"action out of range: {kind} index {int(array[lane, at])} for matrix {at // 2} in lane {lane}; "
            f"expected 0 to {int(nvec[at]) - 1}."
        )
    pairs = torch.from_numpy(array.astype(np.int64).reshape(lanes, -1, 2))  # (L, M, 2)
    return Allocation(pairs[..., 0].contiguous(), pairs[..., 1].contiguous())


def encode_action(rank_index: np.ndarray, location_index: np.ndarray) -> np.ndarray:
    """Interleave (..., M) rank and location indices into (..., 2M) flat actions."""
    pairs = np.stack(np.broadcast_arrays(rank_index, location_index), axis=-1).astype(np.int64)
    return pairs.reshape(*pairs.shape[:-2], 2 * pairs.shape[-2])


def component_mask(allocation: Allocation, table: ChoiceTable) -> Tensor:
    """Which bank slots each lane trains: (L, M, K) bool."""
    matrix = torch.arange(table.mask.shape[0], device=table.mask.device)
    return table.mask[matrix, allocation.rank_index, allocation.location_index]


def allocated_ranks(allocation: Allocation, table: ChoiceTable) -> Tensor:
    """The rank that each matrix trains at, (L, M) int64, clipped to the matrix."""
    matrix = torch.arange(table.ranks.shape[0], device=table.ranks.device)
    return table.ranks[matrix, allocation.rank_index]


def action_masks(table: ChoiceTable) -> np.ndarray:
    """Which entries of the flat action are legal, flat bool (M·(R+S),), as MaskablePPO reads it."""
    m, _, s, _ = table.mask.shape
    return np.concatenate([table.legal, np.ones((m, s), dtype=bool)], axis=1).reshape(-1)
