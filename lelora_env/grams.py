"""Inner products of all components of all lanes, in one pass: norms, changes and current singular values follow.

With a bank B = leftᵀ·right, every quantity that is reported needs products of a component with another one of the same
matrix only, never the matrix itself. One batched product for each buffer of the bank gives all of them, whatever
L and M are: of the current factors, their change in this env step, and their change since the start of the run.

Shapes: L lanes · M matrices · K components · V = 3 variants · N rows · D numbers a row · S sides (two a matrix).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lelora_env.bank import Bank
from lelora_env.spectrum import ShapeGroup, factors

NOW, STEP, RUN = range(3)
"""Variants of a component: as it is, its change in the env step, its change since the start of the run."""


@dataclass(frozen=True)
class Products:
    """Inner products of the components of each matrix.

    Attributes:
        left: (L, M, K, V, K, V) products of left factors, zero where a matrix has fewer than K components.
        right: The same of right factors.
        rows: Per buffer, the current factors (L, N, D) in fp32.
    """

    left: Tensor
    right: Tensor
    rows: dict[str, Tensor]

    def squares(self) -> Tensor:
        """‖B‖² of every bank, (L, M)."""
        return (self.left[..., NOW, :, NOW] * self.right[..., NOW, :, NOW]).sum((-1, -2))

    def change(self, variant: int) -> Tensor:
        """‖B - B_before‖ of every bank, (L, M), for `STEP` or `RUN`.

        ΔB = δleftᵀ·right + left₀ᵀ·δright, written in differences so that small changes keep their precision.
        """
        left, right = self.left, self.right
        moved = left[..., variant, :, variant]  # δleft·δleftᵀ, (L, M, K, K)
        across = left[..., variant, :, NOW]  # δleft·leftᵀ
        start = left[..., NOW, :, NOW] - across - across.transpose(-1, -2) + moved  # left₀·left₀ᵀ
        square = (
            moved * right[..., NOW, :, NOW]
            + 2 * (across - moved) * right[..., NOW, :, variant]
            + start * right[..., variant, :, variant]
        )
        return square.sum((-1, -2)).clamp_min(0).sqrt()

    def values(self) -> Tensor:
        """‖left_k‖·‖right_k‖ of every component, (L, M, K)."""
        squares = [side[..., NOW, :, NOW].diagonal(dim1=-2, dim2=-1) for side in (self.left, self.right)]
        return (squares[0] * squares[1]).sqrt()

    def seen_from_start(self) -> Tensor:
        """left₀ₖ·B·right₀ₖᵀ, the current bank between each pair of pretrained factors: (L, M, K)."""
        sides = [side[..., NOW, :, NOW] - side[..., RUN, :, NOW] for side in (self.left, self.right)]
        return (sides[0] * sides[1]).sum(-1)


class Grams:
    """Computes `Products` of a bank; remembers its factors as they were before an env step."""

    def __init__(self, bank: Bank) -> None:
        """Allocate; see `begin` and `__call__`."""
        self.bank = bank
        self.start = _pretrained(bank)
        self.before = {name: torch.zeros_like(bank.rows[name], requires_grad=False) for name in self.start}
        groups = bank.spectrum.layout.groups
        self._segments: list[tuple[str, int, int, int]] = []
        sides = {(m, side): 0 for g in groups for m in g.matrices for side in ("left", "right")}
        count = 0
        for name in self.start:
            for start, members, size, side in _sides(name, groups):
                sides.update({(m, side): count + i for i, m in enumerate(members)})
                count += len(members)
                last = self._segments[-1] if self._segments else ("", 0, 0, 0)
                if last[0] == name and last[3] == size:
                    self._segments[-1] = (name, last[1], last[2] + len(members), size)
                else:
                    self._segments.append((name, start, len(members), size))
        matrices = sum(len(group.matrices) for group in groups)
        device = bank.spectrum.scale.device
        self._left, self._right = (
            torch.tensor([sides[m, side] for m in range(matrices)], device=device) for side in ("left", "right")
        )
        self.size = max(len(group.components) for group in groups)

    @torch.no_grad()
    def begin(self) -> None:
        """Remember the factors as they are before an env step."""
        for name, rows in self.bank.exact_factors().items():
            self.before[name].copy_(rows)

    def __call__(self) -> Products:
        """The products of the bank as it is now."""
        rows = self.bank.exact_factors()
        stacked = {
            name: torch.stack([now, now - self.before[name], now - self.start[name]], dim=2)
            for name, now in rows.items()
        }  # (L, N, V, D)
        products = torch.cat([self._products(stacked[s[0]], *s[1:]) for s in self._segments], dim=1)
        return Products(products[:, self._left], products[:, self._right], rows)

    def _products(self, stacked: Tensor, start: int, members: int, size: int) -> Tensor:
        """Of one stretch of rows, (L, members, K, V, K, V)."""
        lanes, _, variants, numbers = stacked.shape
        vectors = stacked[:, start : start + members * size].reshape(lanes * members, size * variants, numbers)
        found = (vectors @ vectors.transpose(1, 2)).view(lanes, members, size, variants, size, variants)
        short = self.size - size
        return pad(found, (0, 0, 0, short, 0, 0, 0, short)) if short else found


def _sides(name: str, groups: tuple[ShapeGroup, ...]) -> list[tuple[int, tuple[int, ...], int, str]]:
    """The stretches of a buffer, in order: first row, matrices, components of each, and which side they are."""
    found = [(g.left, g.matrices, len(g.components), "left") for g in groups if str(g.out_features) == name]
    found += [(g.right, g.matrices, len(g.components), "right") for g in groups if str(g.in_features) == name]
    return sorted(found)


def _pretrained(bank: Bank) -> dict[str, Tensor]:
    """The factors of the pretrained components, (N, D) fp32."""
    spectrum = bank.spectrum
    found = {name: rows.clone() for name, rows in spectrum.reference.items() if name in bank.factors}
    for group in spectrum.layout.groups:
        left, _ = factors(spectrum.reference, group, spectrum.scale)
        found[str(group.out_features)][group.left_rows] = left.flatten(0, 1)
    return found
