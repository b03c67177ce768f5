"""The component bank: every trainable number of every lane, in a few flat buffers.

All vectors of one length lie in one tensor, (lane, row, number), whichever matrix they belong to,
so that the optimiser and a fork are a handful of operations whatever L and M are:

    rows["768"]    (L, N, 768)   left or right vectors of length 768
    rows["3072"]   (L, N, 3072)  ...
    rows["sigma"]  (L, N, 1)     singular values, ``usv`` only
    rows["head"]   (L, 1, H)     the task head, never masked

Shapes: L lanes · M matrices · K components of a matrix · O/I out/in dim · G matrices of one shape.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lelora_env.allocation import ChoiceTable
from lelora_env.cache import decompose_once
from lelora_env.config import AdapterConfig
from lelora_env.matrices import MatrixInfo, linear_weight

PROBE_TOLERANCE = 0.05
"""How far two weights' projections may lie apart (1 = typical size) and still count as one weight."""

SIGMA = "sigma"
HEAD = "head"


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
        residual_norm2: (M,) fp64: ‖W - bank‖².
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
        for group in layout.groups:
            _split_group(spectrum, group, weights, [matrices[m].name for m in group.matrices], config, bar.update)
    return spectrum


def _split_group(
    spectrum: Spectrum, group: ShapeGroup, weights: "WeightSource", names: list[str], config: AdapterConfig,
    on_done: Callable[[int], object],
) -> None:
    stacked = weights.take(group)  # (G, O, I)
    parts = decompose_once(stacked, group.components, names=names, on_done=on_done)
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
        spectrum.residual_norm2[matrix] = rest.square().sum()
        stacked[i] = rest.to(stacked.dtype)
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


def lane_bytes(spectrum: Spectrum) -> int:
    """Device memory of one more lane: rows, gradient, two moments, and the rows before a step in fp32; factors."""
    numbers = sum(reference.numel() for reference in spectrum.reference.values())
    return numbers * (5 * 4 + spectrum.residual[0].element_size())


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


class Bank:
    """The trainable numbers of L lanes, and the factors that the model's layers multiply with.

    A layer's weight is residual + Σ_k left_kᵀ·right_k. Its factors are the rows times a gain: σ or the
    constant c on the left side, 1 on the right. Rows, moments and gradients are fp32; factors have the
    frozen model's type. Layers add their gradients by the factors straight into ``rows[...].grad``, and
    `collect` turns them, in place, into gradients by the rows: a few operations whatever M is.

    Attributes:
        spectrum: The shared decomposition.
        rows: Per buffer, a Parameter (L, N, D) whose ``.grad`` is a preallocated tensor.
        factors: Per buffer without the head, (L, N, D) in the model's type; the rows themselves where
            nothing has to be scaled or rounded.
    """

    def __init__(self, spectrum: Spectrum, lanes: int, head_size: int) -> None:
        """Allocate the buffers of L lanes, each starting at the pretrained components."""
        self.spectrum = spectrum
        self.lanes = lanes
        self.rows: dict[str, torch.nn.Parameter] = {}
        self.reference = dict(spectrum.reference)
        if head_size:
            self.reference[HEAD] = torch.zeros(1, head_size, device=spectrum.scale.device)
        for name, start in self.reference.items():
            parameter = torch.nn.Parameter(start.expand(lanes, -1, -1).clone(memory_format=torch.contiguous_format))
            parameter.grad = torch.zeros_like(parameter)
            self.rows[name] = parameter
        self._gains = self._make_gains()
        dtype = spectrum.residual[0].dtype
        self.factors = {
            name: self.rows[name].detach() if gain is None and dtype == torch.float32
            else torch.empty_like(self.rows[name], dtype=dtype, requires_grad=False)
            for name, gain in self._gains.items()
        }

    def _make_gains(self) -> dict[str, Tensor | None]:
        """Per buffer the factor of each row, (1, N, 1) or one a lane, (L, N, 1); ``None`` = 1."""
        spectrum = self.spectrum
        names = [name for name in spectrum.reference if name != SIGMA]
        if spectrum.parametrisation == "sqrt":
            return dict.fromkeys(names)
        lanes = self.lanes if SIGMA in self.rows else 1
        gains: dict[str, Tensor | None] = {
            name: torch.ones(lanes, len(spectrum.reference[name]), 1, device=spectrum.scale.device) for name in names
        }
        if spectrum.parametrisation == "unit":
            for group in spectrum.layout.groups:
                scale = spectrum.scale[group.index].repeat_interleave(len(group.components))
                gains[str(group.out_features)][:, group.left_rows, 0] = scale  # type: ignore[index]
        return gains

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the factors up to date with the rows; every forward pass begins with it."""
        if SIGMA in self.rows:
            for group in self.spectrum.layout.groups:
                gain = self._gains[str(group.out_features)]
                gain[:, group.left_rows] = self.rows[SIGMA][:, group.sigma_rows]  # type: ignore[index]
        for name, gain in self._gains.items():
            rows, factors = self.rows[name].detach(), self.factors[name]
            if gain is not None:
                torch.mul(rows, gain, out=factors)
            elif factors.data_ptr() != rows.data_ptr():
                factors.copy_(rows)

    @torch.no_grad()
    def exact_factors(self) -> dict[str, Tensor]:
        """The factors in fp32, whatever the model's type, per buffer (L, N, D); not to be written to."""
        self.refresh()
        return {
            name: self.rows[name].detach() if gain is None
            else self.factors[name] if self.factors[name].dtype == torch.float32
            else self.rows[name].detach() * gain
            for name, gain in self._gains.items()
        }

    @torch.no_grad()
    def collect(self) -> None:
        """Turn gradients by the factors into gradients by the rows, after the last backward pass of a step."""
        if SIGMA in self.rows:
            for group in self.spectrum.layout.groups:
                left = self.rows[str(group.out_features)]
                by_factor = left.grad[:, group.left_rows]  # type: ignore[index]
                by_sigma = (by_factor * left[:, group.left_rows]).sum(-1, keepdim=True)
                self.rows[SIGMA].grad[:, group.sigma_rows] = by_sigma  # type: ignore[index]
        for name, gain in self._gains.items():
            if gain is not None:
                self.rows[name].grad.mul_(gain)  # type: ignore[union-attr]

    def share(self, buffer: str, start: int, count: int) -> tuple[Tensor, Tensor]:
        """The factors of some rows and where their gradient goes, both (L, count, D), aliases of the buffers."""
        gradient = self.rows[buffer].grad
        assert gradient is not None
        return self.factors[buffer][:, start : start + count], gradient[:, start : start + count]

    def head_leaf(self, start: int, shape: tuple[int, ...]) -> Tensor:
        """A leaf tensor (L, *shape) that aliases numbers of the head, its gradient included.

        Autograd accumulates straight into the flat gradient buffer through it.
        """
        parameter, count = self.rows[HEAD], math.prod(shape)
        assert parameter.grad is not None
        leaf: Tensor = parameter.detach()[:, 0, start : start + count].unflatten(1, shape).requires_grad_(True)
        leaf.grad = parameter.grad[:, 0, start : start + count].unflatten(1, shape)
        return leaf

    def zero_grad(self) -> None:
        """Clear all gradients in place, so that the aliasing stays."""
        for parameter in self.rows.values():
            assert parameter.grad is not None
            parameter.grad.zero_()

    def row_masks(self, mask: Tensor, active: Tensor) -> dict[str, Tensor]:
        """Spread a component mask over the rows.

        Args:
            mask: (L, M, K) bool: which components each lane trains.
            active: (L,) bool: lanes that take this optimiser step at all.

        Returns:
            Per buffer (L, N, 1) bool; the head's row is on in every active lane.
        """
        slots = self.spectrum.layout.row_slot
        flat = (mask & active.view(-1, 1, 1)).flatten(1)  # (L, M·K)
        masks = {name: flat[:, index].unsqueeze(-1) for name, index in slots.items()}
        if HEAD in self.rows:
            masks[HEAD] = active.view(-1, 1, 1)
        return masks
