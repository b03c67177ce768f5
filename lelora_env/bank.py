"""The component bank: every trainable number of every lane, in a few flat buffers.

All vectors of one length lie in one tensor, (lane, row, number), whichever matrix they belong to,
so that the optimiser and a fork are a handful of operations whatever L and M are:

    rows["768"]    (L, N, 768)   left or right vectors of length 768
    rows["3072"]   (L, N, 3072)  ...
    rows["sigma"]  (L, N, 1)     singular values, ``usv`` only
    rows["head"]   (L, 1, H)     the task head, never masked

Shapes: L lanes · M matrices · K components of a matrix · O/I out/in dim · G matrices of one shape.
"""

import math

import torch
from torch import Tensor

from lelora_env.spectrum import SIGMA, Spectrum

HEAD = "head"


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


def lane_bytes(spectrum: Spectrum) -> int:
    """Device memory of one more lane, its forward and backward passes not counted.

    Rows, gradient, two moments and the rows before a step in fp32, factors in the model's type; and while it is
    measured three variants of the rows and five inner products of every two components of a matrix.
    """
    numbers = sum(reference.numel() for reference in spectrum.reference.values())
    pairs = sum(2 * group.rows * len(group.components) for group in spectrum.layout.groups)
    return numbers * (8 * 4 + spectrum.residual[0].element_size()) + 5 * 4 * pairs
