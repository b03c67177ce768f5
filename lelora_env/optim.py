"""AdamW over rows that can be masked, for many lanes at once, and its learning-rate schedule.

A parameter is a tensor (L, N, D): L lanes, N rows, D numbers a row. The row is the unit that is masked: a masked-out
row keeps its value, both moments and its step counter bit for bit. All arithmetic is lane by lane, without loops over
lanes or rows, without host synchronisation and on static buffers: a step can be captured as a CUDA graph.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lelora_env import fused
from lelora_env.errors import LeLoRAError


def linear_schedule(step: int | Tensor, total: int, warmup: float = 0.0) -> Tensor:
    """The factor of the learning rate: linear warm-up, then linear decay to 0.

    With w = ⌈warmup·total⌉ (at most total - 1) the factor of step t is min((t+1)/(w+1), (total-t)/(total-w)): never
    0 inside the run, 1 at t = w. That is ``get_linear_schedule_with_warmup(w + 1, total + 1)`` of transformers at
    index t + 1: its first step, which has rate 0, is left out.

    Args:
        step: Optimiser steps made *before* this one, from 0; an int or a tensor of any shape.
        total: Optimiser steps of the run, at least 1.
        warmup: Share of all steps with rising rate, in [0, 1).

    Returns:
        Factors in [0, 1], float32, of ``step``'s shape; 0 from ``total`` on.

    Raises:
        LeLoRAError: ``total`` or ``warmup`` out of range.
    """
    if total < 1 or not 0 <= warmup < 1:
        raise LeLoRAError(f"total must be at least 1 and warmup in [0, 1), got {total!r} and {warmup!r}")
    rising = min(math.ceil(warmup * total - 1e-9), total - 1)
    t = torch.as_tensor(step).to(torch.float32)
    return torch.minimum((t + 1) / (rising + 1), (total - t) / (total - rising)).clamp(0.0, 1.0)


def lane_grad_norm(
    gradients: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None, scale: Tensor | None = None
) -> Tensor:
    """Norm of each lane's gradient over its active rows in all parameters together.

    Args:
        gradients: Tensors (L, N, D); N and D may differ.
        masks: For each gradient the active rows, bool (L, N, 1), or ``None`` for all.
        scale: Factor of each lane's gradient, (L,), applied before the norm.

    Returns:
        Norms (L,). A lane with a non-finite gradient has a non-finite norm; the others do not feel it.
    """
    norms = []
    for gradient, mask in zip(gradients, masks or [None] * len(gradients), strict=True):
        rows = torch.linalg.vector_norm(gradient, dim=2, dtype=torch.promote_types(gradient.dtype, torch.float32))
        rows = rows if mask is None else torch.where(mask.squeeze(2), rows, 0.0)
        norms.append(torch.linalg.vector_norm(rows, dim=1).to(gradients[0].device))
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms, dim=1), dim=1)  # (L,), the same bits for any L
    return total if scale is None else total * scale.abs()


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) on θ - θ0, row by row, with lanes.

    With every row active it is ``torch.optim.AdamW`` on δ = θ - θ0: weight decay pulls towards the reference θ0. Bias
    correction counts each row's own steps. As a plain optimiser (`step` alone) it fits LR schedulers and Trainer.

    State of each parameter, allocated at construction and only written in place: ``exp_avg``, ``exp_avg_sq``
    (L, N, D), ``step`` (L, N, 1) float32, ``mask`` (L, N, 1) bool.

    Args:
        params: Parameters (L, N, D) or groups of them, all with the same L. A parameter of other than three
            dimensions is one lane with one row. Group option ``reference``: θ0, a tensor (N, D), (1, N, D) or
            (L, N, D) that shares no memory with the parameter, or a list with one for each parameter of the
            group; ``None`` (default) is 0. References are not part of `state_dict`.
        lr: Learning rate: a float, or a tensor of shape () or (L,) on the parameters' device, which
            the caller may write to in place between steps.
        betas: Decay of the two moments, each in [0, 1).
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay towards the reference.

    Raises:
        LeLoRAError: A setting out of range, or parameters, references or masks whose shapes do not fit.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "reference": None}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._allocate_factor()

    @property
    def lanes(self) -> int:
        """Number of lanes L."""
        return int(_rows(self.param_groups[0]["params"][0]).shape[0])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; checks it and allocates its state."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_settings(group, self.lanes)
        group["reference"] = _references(group["reference"], group["params"])
        for param in group["params"]:
            rows = _rows(param)
            if rows.shape[0] != self.lanes or not param.is_contiguous():
                raise LeLoRAError(f"parameters must be contiguous and have the same number of lanes (first dimension); "
                                  f"got shape {tuple(param.shape)}, stride {param.stride()} beside {self.lanes} lanes")
            counter = torch.zeros(*rows.shape[:2], 1, dtype=torch.float32, device=param.device)
            self.state[param] = {
                "step": counter,
                "exp_avg": torch.zeros_like(rows, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(rows, requires_grad=False),
                "mask": torch.ones_like(counter, dtype=torch.bool),
            }
        self._allocate_factor()

    def set_masks(self, masks: Sequence[Tensor | None] | None) -> None:
        """Choose the active rows until the next call.

        Args:
            masks: For each parameter (in the order of the groups) bool (L, N) or (L, N, 1); ``None`` is all rows.

        Raises:
            LeLoRAError: The number of masks, a shape or a dtype does not fit; no mask has changed then.
        """
        params = self._params()
        given = [None] * len(params) if masks is None else list(masks)
        if len(given) != len(params):
            raise LeLoRAError(f"expected {len(params)} masks, one for each parameter, got {len(given)}")
        for param, mask in zip(params, given, strict=True):
            expected = tuple(_rows(param).shape[:2])
            if mask is not None and (tuple(mask.shape) not in (expected, (*expected, 1)) or mask.dtype != torch.bool):
                raise LeLoRAError(f"a mask must be bool of shape {expected} or {(*expected, 1)}, got {mask.dtype} "
                                  f"of shape {tuple(mask.shape)}")
        for param, mask in zip(params, given, strict=True):
            buffer = self.state[param]["mask"]
            buffer.copy_(torch.ones_like(buffer) if mask is None else mask.view_as(buffer))

    @torch.no_grad()
    def clip_lanes(self, max_norm: float | None, scale: Tensor | None = None) -> Tensor:
        """Scale and clip each lane's gradient in the next `step`; the ``.grad`` tensors stay as they are.

        Args:
            max_norm: Largest norm of a lane's scaled gradient over its active rows; ``None`` only scales.
            scale: Factor of each lane's gradient, (L,), such as 1 / (rows in its loss). Default 1.

        Returns:
            Norms (L,) of the scaled gradients, before clipping.
        """
        params = [param for param in self._params() if param.grad is not None]
        if not params:
            return torch.zeros_like(self._factor)
        norms = lane_grad_norm([_rows(cast(Tensor, param.grad)) for param in params],
                               [self.state[param]["mask"] for param in params], scale)
        factor = torch.ones_like(norms) if scale is None else scale.expand_as(norms)
        if max_norm is not None:
            factor = factor * (max_norm / (norms + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        self._factor.copy_(factor)
        return norms

    @property
    def factor(self) -> Tensor:
        """Factor of each lane's gradient in the next `step`, (L,), as `clip_lanes` has set it."""
        return self._factor

    @torch.no_grad()
    def changes(self, factor: Tensor) -> list[Tensor]:
        """What the last `step` added to every active row, and would have added to the others had they been active.

        The first follows from the moments as they are; for the second, a row's own moments and counter go one step
        on with the present gradient. Nothing is changed.

        Args:
            factor: What `factor` was in that step, (L,).

        Returns:
            Δ of every parameter, (L, N, D).
        """
        found = []
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            rate = _per_lane(group["lr"])
            for param, reference in zip(group["params"], group["reference"], strict=True):
                theta, state = _rows(param), self.state[param]
                mask, first, second = state["mask"], state["exp_avg"], state["exp_avg_sq"]
                gradient = _rows(cast(Tensor, param.grad)) * factor.view(-1, 1, 1).to(theta.dtype)
                first = torch.where(mask, first, first.lerp(gradient, 1 - beta1))
                second = torch.where(mask, second, (second * beta2).addcmul_(gradient, gradient, value=1 - beta2))
                count = torch.where(mask, state["step"], state["step"] + 1).clamp_min(1)
                change = _change(first, second, count, rate, group)
                if group["weight_decay"]:
                    decay = rate * group["weight_decay"]
                    delta = theta if reference is None else theta - reference
                    change.add_(decay * torch.where(mask, (delta + change) / (1 - decay), delta))  # δ before the step
                found.append(change.neg_())
        return found

    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, masks: Sequence[Tensor | None] | None = None
    ) -> float | None:
        """One step on the active rows of every parameter that has a gradient; ``masks`` go to `set_masks` first.

        Returns:
            The loss that ``closure`` computed anew, or ``None`` without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if masks is not None:
            self.set_masks(masks)
        with torch.no_grad():
            for group in self.param_groups:
                for param, reference in zip(group["params"], group["reference"], strict=True):
                    if param.grad is not None:
                        self._update(param, reference, group)
            self._factor.fill_(1.0)
        return loss

    def _update(self, param: Tensor, reference: Tensor | None, group: dict[str, Any]) -> None:
        theta, state = _rows(param), self.state[param]
        rates, gradients = group["lr"], _rows(cast(Tensor, param.grad))
        if isinstance(rates, Tensor) and rates.ndim and fused.usable(theta, gradients, reference, rates, self._factor):
            fused.update(theta, gradients, state, reference, rates, self._factor, group)
            return
        beta1, beta2 = group["betas"]
        rate, mask, counter = _per_lane(group["lr"]), state["mask"], state["step"]
        factor = self._factor.view(-1, 1, 1).to(theta.device, theta.dtype)
        gradient = gradients * factor  # (L, N, D)
        first = state["exp_avg"].lerp(gradient, 1 - beta1)
        second = (state["exp_avg_sq"] * beta2).addcmul_(gradient, gradient, value=1 - beta2)
        count = counter + 1  # (L, N, 1)
        change = _change(first, second, count, rate, group)
        if group["weight_decay"]:
            delta = theta if reference is None else theta - reference
            change.add_(delta * (rate * group["weight_decay"]))
        torch.where(mask, theta - change, theta, out=theta)
        torch.where(mask, first, state["exp_avg"], out=state["exp_avg"])
        torch.where(mask, second, state["exp_avg_sq"], out=state["exp_avg_sq"])
        torch.where(mask, count, counter, out=counter)

    @torch.no_grad()
    def reset_lanes(self, lanes: Tensor | None = None) -> None:
        """Forget moments, step counters and masks of some lanes, as at construction.

        Args:
            lanes: Which ones, bool (L,); ``None`` for all. Parameters keep their values.
        """
        for param in self._params():
            state = self.state[param]
            chosen = torch.ones_like(state["mask"][:, :1]) if lanes is None else lanes.view(-1, 1, 1)
            for name in ("step", "exp_avg", "exp_avg_sq"):
                state[name].masked_fill_(chosen, 0)
            state["mask"].masked_fill_(chosen, True)

    def state_dict(self) -> dict[str, Any]:
        """As in torch: moments, step counters, masks and settings, without the references."""
        state = super().state_dict()
        for group in state["param_groups"]:
            group.pop("reference", None)
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but into the existing buffers; references stay those of this optimiser."""
        references = [group["reference"] for group in self.param_groups]
        rates = [group["lr"] for group in self.param_groups]
        buffers = {param: self.state[param] for param in self._params()}
        super().load_state_dict(state_dict)
        for group, reference, rate in zip(self.param_groups, references, rates, strict=True):
            group["reference"] = reference
            if isinstance(rate, Tensor):
                group["lr"] = rate.copy_(torch.as_tensor(group["lr"]))
        for param, old in buffers.items():
            for name, buffer in old.items():
                buffer.copy_(self.state[param][name])
            self.state[param] = old

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _allocate_factor(self) -> None:
        if "_factor" not in self.__dict__:
            param = self.param_groups[0]["params"][0]
            dtype = torch.promote_types(param.dtype, torch.float32)
            self._factor = torch.ones(self.lanes, dtype=dtype, device=param.device)


def _rows(tensor: Tensor) -> Tensor:
    """(L, N, D), as a view if contiguous; anything but three dimensions is one lane with one row."""
    return tensor.detach() if tensor.ndim == 3 else tensor.detach().reshape(1, 1, -1)


def _per_lane(value: float | Tensor) -> float | Tensor:
    """A float or 0-D tensor as it is, (L,) as (L, 1, 1)."""
    return value.view(-1, 1, 1) if isinstance(value, Tensor) and value.ndim == 1 else value


def _change(first: Tensor, second: Tensor, count: Tensor, rate: float | Tensor, group: dict[str, Any]) -> Tensor:
    """What Adam takes off, (L, N, D), weight decay apart; from both moments and the steps that they have seen."""
    correction1, correction2 = (_bias_correction(beta, count, first.dtype) for beta in group["betas"])
    denominator = second.sqrt().div_(correction2.sqrt().to(first.dtype)).add_(group["eps"])
    return (first / denominator).mul_((rate / correction1).to(first.dtype))


def _bias_correction(beta: float, count: Tensor, dtype: torch.dtype) -> Tensor:
    """1 - β^count without cancellation, for count ≥ 1, in ``dtype`` or float32 if that is wider."""
    wide = count.to(torch.promote_types(dtype, torch.float32))
    return torch.ones_like(wide) if beta == 0 else -torch.expm1(wide * math.log(beta))


def _check_settings(group: dict[str, Any], lanes: int) -> None:
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise LeLoRAError(f"betas must be in [0, 1), got {group['betas']!r}")
    for name in ("lr", "eps", "weight_decay"):
        if not isinstance(group[name], Tensor) and not group[name] >= 0:
            raise LeLoRAError(f"{name} must be at least 0, got {group[name]!r}")
    rate, device = group["lr"], group["params"][0].device
    if isinstance(rate, Tensor) and (rate.shape not in ((), (lanes,)) or rate.device != device):
        raise LeLoRAError(f"lr must be a float or a tensor of shape () or ({lanes},) on {device}, got shape "
                          f"{tuple(rate.shape)} on {rate.device}")


def _references(given: Tensor | Sequence[Tensor | None] | None, params: list[Tensor]) -> list[Tensor | None]:
    """θ0 of each parameter as (1, N, D) or (L, N, D), or ``None``."""
    references = [given] * len(params) if given is None or isinstance(given, Tensor) else list(given)
    if len(references) != len(params):
        raise LeLoRAError(f"expected {len(params)} references, one for each parameter, got {len(references)}")
    for reference, shape in zip(references, (tuple(param.shape) for param in params), strict=True):
        allowed = {shape} if len(shape) != 3 else {shape, shape[1:], (1, *shape[1:])}
        if reference is not None and tuple(reference.shape) not in allowed:
            raise LeLoRAError(f"a reference must have one of the shapes {allowed}, got {tuple(reference.shape)}")
    return [ref if ref is None else _rows(ref.unsqueeze(0) if ref.ndim + 1 == param.ndim == 3 else ref)
            for ref, param in zip(references, params, strict=True)]
