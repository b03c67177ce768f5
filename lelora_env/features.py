"""What a policy sees of each matrix, and exact norms of the adapted weights.

Shapes: L lanes · M matrices · F features · K bank slots a matrix · G matrices of one shape ·
S spectrum points · O/I out/in dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lelora_env.bank import ShapeGroup, Spectrum, factor_pairs
from lelora_env.config import EnvConfig
from lelora_env.matrices import MATRIX_TYPES, MatrixInfo

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


Pairs = list[tuple[Tensor, Tensor]]
"""Left (L, G, K, O) and right (L, G, K, I) factors of every shape group, see `lelora_env.bank.factor_pairs`."""


def _gram(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.transpose(-1, -2)


def _square_norm(left: Tensor, right: Tensor) -> Tensor:
    """‖leftᵀ·right‖² of factors (..., K, O) and (..., K, I)."""
    return (_gram(left, left) * _gram(right, right)).sum((-1, -2))


def weight_norms(pairs: Pairs, spectrum: Spectrum) -> Tensor:
    """The Frobenius norm of every current weight, exact: (L, M) fp32.

    ‖W‖² = ‖residual‖² + 2·⟨residual, B⟩ + ‖B‖² with the bank B = leftᵀ·right kept in factors. The only
    large operand, the residual, is read once for all lanes.
    """
    lanes = pairs[0][0].shape[0]
    result = torch.zeros(lanes, len(spectrum.dimensions), dtype=torch.float64, device=spectrum.scale.device)
    for group, residual, (left, right) in zip(spectrum.layout.groups, spectrum.residual, pairs, strict=True):
        rows = right.transpose(0, 1).to(residual.dtype).flatten(1, 2)  # (G, L·K, I)
        seen = (rows @ residual.transpose(-1, -2)).unflatten(1, (lanes, -1)).transpose(0, 1)  # (L, G, K, O)
        cross = (seen * left).sum((-1, -2))
        own = _square_norm(left, right)
        result[:, group.index] = spectrum.residual_norm2[group.index] + (2 * cross + own).double()
    return result.clamp_min(0).sqrt().float()


def change_norms(pairs: Pairs, before: Pairs, spectrum: Spectrum) -> Tensor:
    """‖W - W_before‖_F of every matrix, (L, M) fp32.

    Written with differences of factors, ΔB = δleftᵀ·right + left₀ᵀ·δright, so that small changes
    keep their precision.

    Args:
        pairs: Current factors.
        before: Factors to compare with, with or without lanes in front.
        spectrum: The shared decomposition.
    """
    lanes = pairs[0][0].shape[0]
    columns = torch.zeros(lanes, len(spectrum.dimensions), device=spectrum.scale.device)
    for group, (left, right), (left0, right0) in zip(spectrum.layout.groups, pairs, before, strict=True):
        both_left = torch.cat([left - left0, left0.expand_as(left)], dim=-2)  # (L, G, 2K, O)
        both_right = torch.cat([right, right - right0], dim=-2)
        columns[:, group.index] = _square_norm(both_left, both_right).clamp_min(0)
    return columns.sqrt()


def component_values(
    pair: tuple[Tensor, Tensor], start: tuple[Tensor, Tensor], spectrum: Spectrum, group: ShapeGroup
) -> Tensor:
    """Current singular values of a group's bank, (L, G, K).

    ``usv`` and ``sqrt``: |σ|·‖u‖·‖v‖ of the trained component. ``unit``: |u₀ᵀ W v₀|, the share of
    the current weight along the pretrained component.

    Args:
        pair: The group's current factors.
        start: Its pretrained factors, (G, K, ·).
        spectrum: The shared decomposition.
        group: The shape group.
    """
    left, right = pair
    if spectrum.parametrisation != "unit":
        norms: Tensor = left.norm(dim=-1) * right.norm(dim=-1)
        return norms
    scale = spectrum.scale[group.index].unsqueeze(-1)
    rest = spectrum.singular_values[group.index][:, group.bank] - scale  # (G, K)
    seen_left = _gram(start[0], left) / scale.unsqueeze(-1)  # u₀ᵀ·left of every two components
    values: Tensor = (rest + (seen_left * _gram(start[1], right)).sum(-1)).abs()
    return values


class Observer:
    """Turns the state of all lanes into observations."""

    def __init__(self, spectrum: Spectrum, matrices: list[MatrixInfo], config: EnvConfig) -> None:
        """Prepare the constant columns and the resampling grid."""
        self.spectrum = spectrum
        self.config = config
        self.start = factor_pairs(spectrum.reference, spectrum)
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

    def current_spectrum(self, pairs: Pairs) -> Tensor:
        """All singular values with the bank's current ones in place: (L, M, m_max)."""
        values = self.spectrum.singular_values.expand(pairs[0][0].shape[0], -1, -1).clone()
        for group, pair, start in zip(self.spectrum.layout.groups, pairs, self.start, strict=True):
            current = component_values(pair, start, self.spectrum, group)
            values[:, group.index.unsqueeze(1), group.bank.unsqueeze(0)] = current
        return values

    def observe(self, pairs: Pairs, progress: Tensor, extras: dict[str, Tensor]) -> Tensor:
        """The observation of every lane, (L, M, F) fp32, finite and inside the declared bounds.

        Args:
            pairs: Current factors of the bank.
            progress: (L,) share of the budget spent, in [0, 1].
            extras: (L, M) raw values of the optional columns ``grad_norm`` and ``update_norm``.
        """
        norm = weight_norms(pairs, self.spectrum)  # (L, M)
        lanes = norm.shape[0]
        values = self.current_spectrum(pairs)
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
