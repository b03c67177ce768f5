"""What a policy sees of each matrix, and exact norms of the adapted weights.

Shapes: L lanes · M matrices · F features · K bank slots a matrix · G matrices of one shape ·
S spectrum points · O/I out/in dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lelora_env.config import EnvConfig
from lelora_env.grams import Products
from lelora_env.matrices import MATRIX_TYPES, MatrixInfo
from lelora_env.spectrum import Spectrum

RAW_HIGH = 1e6
"""Upper bound of raw norms and singular values in the observation; larger ones are clipped."""

LOG_RANGE = 8.0
"""Scaled norms and singular values are natural logarithms, clipped to ± this, over 4."""


@dataclass(frozen=True)
class Feature:
    """One column of the observation: its name and bounds."""

    name: str
    low: float
    high: float


def feature_table(matrices: list[MatrixInfo], config: EnvConfig, spectrum_points: int) -> list[Feature]:
    """The columns of the observation, in order, with their bounds."""
    span = LOG_RANGE / 4
    low, high = (0.0, RAW_HIGH) if config.raw_observation else (-span, span)
    extras = {
        "relative_depth": (0.0, 1.0),
        "grad_norm": (low, high),
        "update_norm": (low, high),
    }
    return [
        Feature("layer", 0.0, float(max(1, *(m.layer for m in matrices)))),
        Feature("type", 0.0, float(len(MATRIX_TYPES) - 1)),
        Feature("norm", low, high),
        *(Feature(f"sv_{i}", low, high) for i in range(spectrum_points)),
        Feature("progress", 0.0, 1.0),
        *(Feature(name, *extras[name]) for name in config.extra_features),
    ]


def spectrum_points(matrices: list[MatrixInfo], config: EnvConfig) -> int:
    """S: how many singular values a row of the observation has."""
    if config.spectrum == "full":
        return max(min(m.out_features, m.in_features) for m in matrices)
    return config.spectrum


def weight_norms(products: Products, spectrum: Spectrum) -> Tensor:
    """The Frobenius norm of every current weight, exact: (L, M) fp32.

    ‖W‖² = ‖residual‖² + 2·⟨residual, B⟩ + ‖B‖² with the bank B = leftᵀ·right kept in factors. The only
    large operand, the residual, is read once for all lanes. Relative error: 1e-6, also where the residual is bf16.
    """
    square = spectrum.residual_norm2 + products.squares().double()
    lanes = len(square)
    for group, residual in zip(spectrum.layout.groups, spectrum.residual, strict=True):
        size = (len(group.matrices), len(group.components))
        left = products.rows[str(group.out_features)][:, group.left_rows].unflatten(1, size)  # (L, G, K, O)
        right = products.rows[str(group.in_features)][:, group.right_rows].unflatten(1, size)
        seen = _through(right.transpose(0, 1).flatten(1, 2), residual)  # (G, L·K, O)
        square[:, group.index] += 2 * (seen.unflatten(1, (lanes, -1)).transpose(0, 1) * left).sum((-1, -2))
    return square.clamp_min(0).sqrt().float()


def _through(rows: Tensor, residual: Tensor) -> Tensor:
    """rows·residualᵀ in fp32 for rows (G, R, I) in fp32 and a residual (G, O, I) of any type."""
    if residual.dtype == torch.float32:
        return rows @ residual.transpose(-1, -2)
    if not residual.is_cuda:
        return rows @ residual.float().transpose(-1, -2)
    coarse = rows.to(residual.dtype)
    both = torch.cat([coarse, (rows - coarse).to(residual.dtype)], dim=1)  # what rounding took away comes second
    seen = torch.bmm(both, residual.transpose(-1, -2), out_dtype=torch.float32)
    return seen[:, : rows.shape[1]] + seen[:, rows.shape[1] :]


class Observer:
    """Turns the state of all lanes into observations."""

    def __init__(self, spectrum: Spectrum, matrices: list[MatrixInfo], config: EnvConfig) -> None:
        """Prepare the constant columns and the resampling grid."""
        self.spectrum = spectrum
        self.config = config
        self.rest = [  # what of σ lies in the residual in `unit`, (G, K) of each group
            spectrum.singular_values[group.index][:, group.bank] - spectrum.scale[group.index].unsqueeze(-1)
            for group in spectrum.layout.groups
        ]
        points = spectrum_points(matrices, config)
        self.table = feature_table(matrices, config, points)
        device = spectrum.scale.device
        layers = torch.tensor([m.layer for m in matrices], dtype=torch.float32, device=device)
        kinds = torch.tensor([MATRIX_TYPES.index(m.type) for m in matrices], dtype=torch.float32, device=device)
        self.constant = torch.stack([layers, kinds], dim=1)  # (M, 2)
        self.depth = layers / layers.max().clamp_min(1)
        size = spectrum.dimensions.unsqueeze(1).double() - 1  # (M, 1)
        if config.spectrum == "full":
            place = torch.arange(points, device=device).double().expand(len(matrices), -1)
            self.padding = place > size
        else:
            place = torch.linspace(0, 1, points, device=device, dtype=torch.float64) * size  # (M, S)
            self.padding = torch.zeros_like(place, dtype=torch.bool)
        self.below = place.floor().minimum(size).long()
        self.above = (self.below + 1).minimum(size.long())
        self.part = (place - self.below).clamp(0, 1).float()
        self.low = torch.tensor([f.low for f in self.table], device=device)
        self.high = torch.tensor([f.high for f in self.table], device=device)

    def current_spectrum(self, products: Products) -> Tensor:
        """All singular values with the bank's current ones in place: (L, M, m_max).

        Of a component: |σ|·‖u‖·‖v‖ in ``usv`` and ``sqrt``; in ``unit`` |u₀ᵀ W v₀|, the share of the current
        weight along the pretrained component.
        """
        spectrum = self.spectrum
        lanes = len(next(iter(products.rows.values())))
        values = spectrum.singular_values.expand(lanes, -1, -1).clone()
        unit = spectrum.parametrisation == "unit"
        found = products.seen_from_start() if unit else products.values()
        for group, rest, value in zip(spectrum.layout.groups, self.rest, found, strict=True):
            current = (rest + value / spectrum.scale[group.index].unsqueeze(-1)).abs() if unit else value
            values[:, group.index.unsqueeze(1), group.bank.unsqueeze(0)] = current
        return values

    def observe(self, products: Products, progress: Tensor, extras: dict[str, Tensor]) -> Tensor:
        """The observation of every lane, (L, M, F) fp32, finite and inside the declared bounds.

        Args:
            products: Inner products of the bank as it is now.
            progress: (L,) share of the budget spent, in [0, 1].
            extras: (L, M) raw values of the optional columns ``grad_norm`` and ``update_norm``.
        """
        norm = weight_norms(products, self.spectrum)  # (L, M)
        lanes = norm.shape[0]
        values = self.current_spectrum(products)
        below = values.gather(2, self.below.expand(lanes, -1, -1))  # (L, M, S)
        above = values.gather(2, self.above.expand(lanes, -1, -1))
        if self.config.raw_observation:
            sampled = torch.lerp(below, above, self.part)
            shown = norm
        else:
            rms = (norm / self.spectrum.dimensions.float().sqrt()).clamp_min(1e-30).unsqueeze(-1)
            sampled = torch.lerp(self._scaled(below / rms), self._scaled(above / rms), self.part)
            shown = self._scaled(rms.squeeze(-1))
        sampled = sampled.masked_fill(self.padding, float(self.table[3].low))
        columns = [
            self.constant.expand(lanes, -1, -1),
            shown.unsqueeze(-1),
            sampled,
            progress.view(-1, 1, 1).expand(-1, norm.shape[1], 1),
            *(self._extra(name, norm, extras).unsqueeze(-1) for name in self.config.extra_features),
        ]
        table = torch.cat(columns, dim=-1)
        return torch.nan_to_num(table, nan=0.0, posinf=RAW_HIGH, neginf=-RAW_HIGH).clamp(self.low, self.high)

    @staticmethod
    def _scaled(x: Tensor) -> Tensor:
        return x.clamp_min(1e-30).log().clamp(-LOG_RANGE, LOG_RANGE) / 4

    def _extra(self, name: str, norm: Tensor, extras: dict[str, Tensor]) -> Tensor:
        if name == "relative_depth":
            return self.depth.expand(norm.shape[0], -1)
        if self.config.raw_observation:
            return extras[name]
        relative = extras[name] / norm if name == "update_norm" else extras[name]
        return self._scaled(relative)
