"""Inner products of all components of all lanes, in a few passes: norms, changes and current singular values follow.

With a bank B = leftᵀ·right, every quantity that is reported needs products of a component with another one of the same
matrix only, never the matrix itself. Two batched products for each buffer of the bank give all of them, whatever
L and M are: of the current factors, their change in this env step, and their change since the start of the run.

Shapes: L lanes · M matrices · K components · N rows · D numbers a row · G matrices of one shape.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lelora_env.bank import Bank
from lelora_env.spectrum import ShapeGroup, factors

NOW, STEP, RUN = range(3)
"""A component as it is; its change in the env step; its change since the start of the run."""


@dataclass(frozen=True)
class Side:
    """Inner products of the left or of the right factors of G matrices.

    Attributes:
        with_now: (L, G, 3, K, K): `NOW`, `STEP` and `RUN` with the factors as they are.
        own: (L, G, 2, K, K): `STEP` with itself and `RUN` with itself.
    """

    with_now: Tensor
    own: Tensor

    def now(self) -> Tensor:
        """(L, G, K, K): the factors as they are, with themselves."""
        return self.with_now[:, :, NOW]

    def moved(self, variant: int) -> Tensor:
        """A change with itself, for `STEP` or `RUN`."""
        return self.own[:, :, variant - 1]

    def across(self, variant: int) -> Tensor:
        """A change (rows) with the factors as they are (columns)."""
        return self.with_now[:, :, variant]


@dataclass(frozen=True)
class Products:
    """Inner products of the components of every shape group.

    Attributes:
        groups: The shape groups.
        sides: Left and right side of each.
        rows: Per buffer, the current factors (L, N, D) in fp32.
    """

    groups: tuple[ShapeGroup, ...]
    sides: list[tuple[Side, Side]]
    rows: dict[str, Tensor]

    def _by_matrix(self, values: list[Tensor]) -> Tensor:
        """One (L, G) result of each group, put together as (L, M)."""
        count = sum(len(group.matrices) for group in self.groups)
        result = values[0].new_empty(len(values[0]), count)
        for group, value in zip(self.groups, values, strict=True):
            result[:, group.index] = value
        return result

    def squares(self) -> Tensor:
        """‖B‖² of every bank, (L, M)."""
        return self._by_matrix([(left.now() * right.now()).sum((-1, -2)) for left, right in self.sides])

    def change(self, variant: int) -> Tensor:
        """‖B - B_before‖ of every bank, (L, M), for `STEP` or `RUN`.

        ΔB = δleftᵀ·right + left₀ᵀ·δright, written in differences so that small changes keep their precision.
        """
        found = []
        for left, right in self.sides:
            moved, across = left.moved(variant), left.across(variant)  # δleft·δleftᵀ, δleft·leftᵀ
            start = left.now() - across - across.transpose(-1, -2) + moved  # left₀·left₀ᵀ
            square = (
                moved * right.now()
                + 2 * (across - moved) * right.across(variant).transpose(-1, -2)
                + start * right.moved(variant)
            )
            found.append(square.sum((-1, -2)).clamp_min(0).sqrt())
        return self._by_matrix(found)

    def values(self) -> list[Tensor]:
        """‖left_k‖·‖right_k‖ of every component, (L, G, K) of each group."""
        return [(left.now().diagonal(dim1=-2, dim2=-1) * right.now().diagonal(dim1=-2, dim2=-1)).sqrt()
                for left, right in self.sides]

    def seen_from_start(self) -> list[Tensor]:
        """left₀ₖ·B·right₀ₖᵀ, the current bank between each pair of pretrained factors: (L, G, K) of each group."""
        return [((left.now() - left.across(RUN)) * (right.now() - right.across(RUN))).sum(-1)
                for left, right in self.sides]


class Grams:
    """Computes `Products` of a bank; remembers its factors as they were before an env step."""

    def __init__(self, bank: Bank) -> None:
        """Allocate; see `begin` and `__call__`."""
        self.bank = bank
        self.groups = bank.spectrum.layout.groups
        self.start = _pretrained(bank)
        self.before = {name: torch.zeros_like(bank.rows[name], requires_grad=False) for name in self.start}
        self._stretches = [stretch for name in self.start for stretch in _stretches(name, self.groups)]

    @torch.no_grad()
    def begin(self) -> None:
        """Remember the factors as they are before an env step."""
        for name, rows in self.bank.exact_factors().items():
            self.before[name].copy_(rows)

    def __call__(self) -> Products:
        """The products of the bank as it is now."""
        rows = self.bank.exact_factors()
        changes = {name: (now, now - self.before[name], now - self.start[name]) for name, now in rows.items()}
        found = [_products([variant[:, start:stop].unflatten(1, (-1, size)) for variant in changes[name]])
                 for name, start, stop, size in self._stretches]
        sides = [(self._part(found, str(group.out_features), group.left, len(group.matrices)),
                  self._part(found, str(group.in_features), group.right, len(group.matrices))) for group in self.groups]
        return Products(self.groups, sides, rows)

    def _part(self, found: list[Side], buffer: str, row: int, count: int) -> Side:
        """The products of `count` matrices, the first of which begins at a row of a buffer."""
        for (name, start, stop, size), side in zip(self._stretches, found, strict=True):
            if name == buffer and start <= row < stop:
                part = slice((row - start) // size, (row - start) // size + count)
                return Side(side.with_now[:, part], side.own[:, part])
        raise AssertionError(f"no row {row} in buffer {buffer}")


def _stretches(name: str, groups: tuple[ShapeGroup, ...]) -> list[tuple[str, int, int, int]]:
    """Stretches of a buffer whose matrices have equally many components: buffer, first row, end, components of each."""
    found = [(g.left, g.left + g.rows, len(g.components)) for g in groups if str(g.out_features) == name]
    found += [(g.right, g.right + g.rows, len(g.components)) for g in groups if str(g.in_features) == name]
    merged: list[tuple[str, int, int, int]] = []
    for start, stop, size in sorted(found):
        if merged and merged[-1][3] == size:
            merged[-1] = (name, merged[-1][1], stop, size)
        else:
            merged.append((name, start, stop, size))
    return merged


def _products(variants: list[Tensor]) -> Side:
    """Inner products within each matrix of `NOW`, `STEP` and `RUN`, each (L, G, K, D)."""
    vectors = torch.stack(variants, dim=2)  # (L, G, 3, K, D)
    with_now = vectors.flatten(2, 3) @ variants[NOW].transpose(-1, -2)
    changes = vectors[:, :, STEP:]
    return Side(with_now.unflatten(2, (3, -1)), changes @ changes.transpose(-1, -2))


def _pretrained(bank: Bank) -> dict[str, Tensor]:
    """The factors of the pretrained components, (N, D) fp32."""
    spectrum = bank.spectrum
    found = {name: rows.clone() for name, rows in spectrum.reference.items() if name in bank.factors}
    for group in spectrum.layout.groups:
        left, _ = factors(spectrum.reference, group, spectrum.scale)
        found[str(group.out_features)][group.left_rows] = left.flatten(0, 1)
    return found
