"""What a policy sees of each matrix, and exact norms of the adapted weights.

Shapes: L lanes · M matrices · F features · K bank slots a matrix · G matrices of one shape ·
S spectrum points · O/I out/in dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

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
    large operand, the residual, is read once for all lanes.
    """
    square = spectrum.residual_norm2 + products.squares().double()
    lanes = len(square)
    for group, residual in zip(spectrum.layout.groups, spectrum.residual, strict=True):
        size = (len(group.matrices), len(group.components))
        left = products.rows[str(group.out_features)][:, group.left_rows].unflatten(1, size)  # (L, G, K, O)
        right = products.rows[str(group.in_features)][:, group.right_rows].unflatten(1, size)
        rows = right.transpose(0, 1).to(residual.dtype).flatten(1, 2)  # (G, L·K, I)
        seen = (rows @ residual.transpose(-1, -2)).unflatten(1, (lanes, -1)).transpose(0, 1)  # (L, G, K, O)
        square[:, group.index] += 2 * (seen * left).sum((-1, -2))
    return square.clamp_min(0).sqrt().float()


class Observer:
    """Turns the state of all lanes into observations."""

    def __init__(self, spectrum: Spectrum, matrices: list[MatrixInfo], config: EnvConfig) -> None:
        """Prepare the constant columns and the resampling grid."""
        self.spectrum = spectrum
        self.config = config
        self._place_components()
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

    def _place_components(self) -> None:
        """Where in the spectrum each bank slot belongs, and what of σ lies in the residual in ``unit``."""
        spectrum = self.spectrum
        largest = max(len(group.components) for group in spectrum.layout.groups)
        empty = spectrum.singular_values.shape[1]
        self.slots = torch.full((len(spectrum.dimensions), largest), empty, device=spectrum.scale.device)  # (M, K)
        for group in spectrum.layout.groups:
            self.slots[group.index, : len(group.components)] = group.bank
        self.scale = spectrum.scale.unsqueeze(1)  # (M, 1)
        self.rest = pad(spectrum.singular_values, (0, 1)).gather(1, self.slots) - self.scale

    def current_spectrum(self, products: Products) -> Tensor:
        """All singular values with the bank's current ones in place: (L, M, m_max).

        Of a component: |σ|·‖u‖·‖v‖ in ``usv`` and ``sqrt``; in ``unit`` |u₀ᵀ W v₀|, the share of the current
        weight along the pretrained component.
        """
        spectrum = self.spectrum
        if spectrum.parametrisation == "unit":
            current = (self.rest + products.seen_from_start() / self.scale).abs()
        else:
            current = products.values()
        lanes, largest = len(current), spectrum.singular_values.shape[1]
        values = pad(spectrum.singular_values, (0, 1)).expand(lanes, -1, -1).clone()  # one place for empty slots
        values.scatter_(2, self.slots.expand(lanes, -1, -1), current)
        return values[..., :largest]

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
