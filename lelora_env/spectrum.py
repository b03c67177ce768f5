"""A model decomposed: which components of which matrix there are, what they are at the start, and what is left over.

All vectors of one length lie in one table, (row, number), whichever matrix they belong to; `lelora_env.bank` has such a
table for every lane.

Shapes: M matrices · K components of a matrix · N rows · O/I out/in dim · G matrices of one shape.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lelora_env.allocation import ChoiceTable
from lelora_env.cache import decompose_once
from lelora_env.config import AdapterConfig
from lelora_env.matrices import MatrixInfo, linear_weight
from lelora_env.spectra import Decomposition

PROBE_TOLERANCE = 0.05
"""How far two weights' projections may lie apart (1 = typical size) and still count as one weight."""

SIGMA = "sigma"


@dataclass(frozen=True, eq=False)
class ShapeGroup:
    """Matrices of one shape; their rows lie side by side in the buffers.

    Attributes:
        matrices: Indices of the G matrices, ascending.
        components: (K,) spectrum indices that the bank of each of them holds.
        out_features: O.
        in_features: I.
        left: First row of their left vectors in ``rows[str(O)]``.
        right: First row of their right vectors in ``rows[str(I)]``.
        sigma: First row in ``rows["sigma"]``.
        index: (G,) int64 on the model's device: `matrices` for use in tensor code.
        bank: (K,) int64 on the model's device: `components` for use in tensor code.
    """

    matrices: tuple[int, ...]
    components: tuple[int, ...]
    out_features: int
    in_features: int
    left: int
    right: int
    sigma: int
    index: Tensor
    bank: Tensor

    @property
    def rows(self) -> int:
        """G·K, the rows that the group has on each side."""
        return len(self.matrices) * len(self.components)

    @property
    def left_rows(self) -> slice:
        """Its left vectors in ``rows[str(O)]``, matrix by matrix."""
        return slice(self.left, self.left + self.rows)

    @property
    def right_rows(self) -> slice:
        """Its right vectors in ``rows[str(I)]``."""
        return slice(self.right, self.right + self.rows)

    @property
    def sigma_rows(self) -> slice:
        """Its singular values in ``rows["sigma"]``."""
        return slice(self.sigma, self.sigma + self.rows)


@dataclass(frozen=True)
class Layout:
    """Where everything lies: the map between matrices and flat rows.

    Attributes:
        groups: The shape groups, in order of first appearance.
        row_counts: Rows per buffer.
        slots: (M, K) of a component mask.
        row_slot: Per buffer, (N,) int64 index into the flattened component mask.
        row_matrix: Per buffer, (N,) int64 matrix index.
    """

    groups: tuple[ShapeGroup, ...]
    row_counts: dict[str, int]
    slots: tuple[int, int]
    row_slot: dict[str, Tensor]
    row_matrix: dict[str, Tensor]


def build_layout(
    matrices: list[MatrixInfo], table: ChoiceTable, config: AdapterConfig, device: torch.device
) -> Layout:
    """Assign rows to the components of all matrices; index tensors lie on `device`."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for index, matrix in enumerate(matrices):
        shapes.setdefault((matrix.out_features, matrix.in_features), []).append(index)
    slots = table.components.shape[1]
    rows: dict[str, list[int]] = {}
    owner: dict[str, list[int]] = {}
    groups = []

    def claim(buffer: str, members: list[int], count: int) -> int:
        start = len(rows.setdefault(buffer, []))
        rows[buffer] += [m * slots + k for m in members for k in range(count)]
        owner.setdefault(buffer, []).extend(m for m in members for _ in range(count))
        return start

    for (out, into), members in shapes.items():
        components = tuple(int(c) for c in table.components[members[0]] if c >= 0)
        left = claim(str(out), members, len(components))
        right = claim(str(into), members, len(components))
        sigma = claim(SIGMA, members, len(components)) if config.parametrisation == "usv" else 0
        index_of = torch.tensor(members, device=device)
        bank_of = torch.tensor(components, device=device)
        groups.append(ShapeGroup(tuple(members), components, out, into, left, right, sigma, index_of, bank_of))
    return Layout(
        groups=tuple(groups),
        row_counts={name: len(r) for name, r in rows.items()},
        slots=(len(matrices), slots),
        row_slot={name: torch.tensor(r, device=device) for name, r in rows.items()},
        row_matrix={name: torch.tensor(r, device=device) for name, r in owner.items()},
    )


@dataclass
class Spectrum:
    """What decomposing the model once gives; shared by all lanes and environments on it.

    Attributes:
        layout: Where rows lie.
        reference: Per buffer, (N, D) fp32: the pretrained components θ0.
        singular_values: (M, m_max) fp32, descending, zero-padded.
        dimensions: (M,) number of singular values of each matrix.
        scale: (M,) fp32: the constant c of ``unit``; ones otherwise.
        parametrisation: ``"usv"``, ``"sqrt"`` or ``"unit"``.
        residual: Per shape group, (G, O, I): the frozen rest W - bank.
        residual_norm2: (M,) fp64: ‖residual‖², as it is stored.
        structure: Hash of matrix names, bank components and parametrisation.
        probe: (M, 2) fp64: a fixed projection of each pretrained weight, normalised, and ln c; tells
            whether trained rows belong to this model.
    """

    layout: Layout
    reference: dict[str, Tensor]
    singular_values: Tensor
    dimensions: Tensor
    scale: Tensor
    parametrisation: str
    residual_norm2: Tensor
    probe: Tensor
    structure: int
    residual: list[Tensor] = field(default_factory=list)

    def same_as(self, structure: int, probe: Tensor) -> bool:
        """Whether rows trained on a spectrum with this `structure` and `probe` fit this one.

        Weights that differ by rounding alone (bf16 against fp32) count as the same.
        """
        same = structure == self.structure and probe.shape == self.probe.shape
        return same and bool((probe.to(self.probe) - self.probe).abs().max() < PROBE_TOLERANCE)


def build_spectrum(
    weights: "WeightSource", matrices: list[MatrixInfo], layout: Layout, config: AdapterConfig
) -> Spectrum:
    """Decompose every matrix and split it into bank and residual.

    Args:
        weights: Gives the stacked fp weights of a shape group.
        matrices: The M matrices.
        layout: Their rows.
        config: Parametrisation and scale.

    Raises:
        ModelError: A weight that is not finite; the message names the matrix.
    """
    reference = {
        name: torch.zeros(count, 1 if name == SIGMA else int(name), device=weights.device)
        for name, count in layout.row_counts.items()
    }
    largest = max(min(m.out_features, m.in_features) for m in matrices)
    singular = torch.zeros(len(matrices), largest, device=weights.device)
    spectrum = Spectrum(
        layout=layout,
        reference=reference,
        singular_values=singular,
        dimensions=torch.tensor([min(m.out_features, m.in_features) for m in matrices], device=weights.device),
        scale=torch.ones(len(matrices), device=weights.device),
        parametrisation=config.parametrisation,
        residual_norm2=torch.zeros(len(matrices), dtype=torch.float64, device=weights.device),
        probe=torch.zeros(len(matrices), 2, dtype=torch.float64, device=weights.device),
        structure=_structure(matrices, layout, config),
    )
    with tqdm(total=len(matrices), desc="decomposing", unit="matrix", delay=2.0, leave=False, disable=None) as bar:
        decomposing = partial(decompose_once, on_done=bar.update, used=set())
        for group in layout.groups:
            names = [matrices[m].name for m in group.matrices]
            _split_group(spectrum, group, weights, config, partial(decomposing, names=names))
    return spectrum


def _split_group(
    spectrum: Spectrum, group: ShapeGroup, weights: "WeightSource", config: AdapterConfig,
    decomposing: Callable[[Tensor, tuple[int, ...]], Decomposition],
) -> None:
    stacked = weights.take(group)  # (G, O, I)
    parts = decomposing(stacked, group.components)
    members = group.index
    spectrum.singular_values[members, : parts.singular_values.shape[1]] = parts.singular_values.float()
    values = parts.singular_values[:, list(group.components)]  # (G, K)
    left, right = parts.U.double(), parts.V.double()  # (G, K, O), (G, K, I)
    if config.parametrisation == "unit":
        fallback = values.mean(1).clamp_min(torch.finfo(torch.float32).tiny)
        constant = fallback if config.unit_scale is None else torch.full_like(fallback, config.unit_scale)
        spectrum.scale[members] = constant.float()
    elif config.parametrisation == "sqrt":
        left, right = left * values.sqrt().unsqueeze(-1), right * values.sqrt().unsqueeze(-1)
    else:
        rows = spectrum.reference[SIGMA]
        rows[group.sigma_rows] = values.reshape(-1, 1).float()
    a, b = spectrum.reference[str(group.out_features)], spectrum.reference[str(group.in_features)]
    a[group.left_rows] = left.flatten(0, 1).float()
    b[group.right_rows] = right.flatten(0, 1).float()
    spectrum.probe[members] = torch.stack([_project(stacked), spectrum.scale[members].double().log()], dim=1)
    scaled, plain = factors(spectrum.reference, group, spectrum.scale)
    for i, matrix in enumerate(group.matrices):  # one fp64 matrix at a time: memory of one, not of G
        rest = stacked[i].double() - scaled[i].double().T @ plain[i].double()
        stacked[i] = rest.to(stacked.dtype)
        spectrum.residual_norm2[matrix] = stacked[i].double().square().sum()
    spectrum.residual.append(stacked)


def _structure(matrices: list[MatrixInfo], layout: Layout, config: AdapterConfig) -> int:
    told = [[m.name for m in matrices], [list(g.components) for g in layout.groups], config.parametrisation]
    return int.from_bytes(hashlib.sha256(json.dumps(told).encode()).digest()[:7], "big")


def _project(weights: Tensor) -> Tensor:
    """aᵀWb of each weight (G, O, I) for fixed a and b, over its typical size: (G,) fp64."""
    out, into = (torch.arange(n, dtype=torch.float64, device=weights.device) for n in weights.shape[1:])
    a, b = torch.cos(1.7 * out + 0.3), torch.cos(2.3 * into + 0.9)
    value = torch.stack([a @ (w.double() @ b) for w in weights])
    norm = torch.stack([w.double().norm() for w in weights]).clamp_min(1e-300)
    typical: Tensor = norm * a.norm() * b.norm() / math.sqrt(len(a) * len(b))
    return value / typical


def factors(rows: dict[str, Tensor], group: ShapeGroup, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The two factors of a group's bank, B = leftᵀ·right, with all scaling in the left one.

    Args:
        rows: Buffers with or without a lane dimension in front, (..., N, D).
        group: The shape group.
        scale: (M,) constants of the parametrisation.

    Returns:
        left (..., G, K, O) and right (..., G, K, I).
    """
    size = (len(group.matrices), len(group.components))
    left = rows[str(group.out_features)].narrow(-2, group.left, group.rows).unflatten(-2, size)
    right = rows[str(group.in_features)].narrow(-2, group.right, group.rows).unflatten(-2, size)
    if SIGMA in rows:
        left = left * rows[SIGMA].narrow(-2, group.sigma, group.rows).unflatten(-2, size)
    else:
        left = left * scale[group.index].view(-1, 1, 1)
    return left, right


class WeightSource:
    """Where the weights of a shape group come from; what is left of them lies in ``Spectrum.residual``.

    These two are the seam for residuals that live elsewhere (quantised, sharded): fp weights are
    asked for once, group by group, and nothing else reads the pretrained model's matrices.
    """

    def __init__(self, modules: list[nn.Module], consume: list[bool]) -> None:
        """Take the M linear modules; where `consume` is true, a module's own weight is freed."""
        self.modules = modules
        self.consume = consume
        self.device = linear_weight(modules[0]).device

    def take(self, group: ShapeGroup) -> Tensor:
        """A (G, O, I) buffer with the group's weights; the caller turns it into the residual."""
        first = linear_weight(self.modules[group.matrices[0]])
        stacked = first.new_empty(len(group.matrices), group.out_features, group.in_features)
        for i, matrix in enumerate(group.matrices):
            module = self.modules[matrix]
            stacked[i] = linear_weight(module).detach()
            if self.consume[matrix]:
                module.weight.data = stacked.new_empty(0)
        return stacked
