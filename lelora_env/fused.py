"""One kernel for the whole masked AdamW update of a buffer, on CUDA where Triton is installed.

The same arithmetic as `MaskedAdamW` in plain torch, to the last bits that fused multiplications round differently. A
masked-out row costs one look at its mask, so a step costs what it trains and not what the bank holds.

Shapes: L lanes · N rows · D numbers a row.
"""

import functools
import logging
import math
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError:  # builds of torch without CUDA come without it
    triton = None

logger = logging.getLogger(__name__)

BLOCK = 1024


def usable(*tensors: Tensor | None) -> bool:
    """Whether `update` takes these tensors: fp32, contiguous, on CUDA, with a Triton that works at hand."""
    fit = all(t is None or (t.is_cuda and t.dtype == torch.float32 and t.is_contiguous()) for t in tensors)
    return triton is not None and fit and compiles()


@functools.cache
def compiles() -> bool:
    """Whether Triton can build the kernel here (it needs a C compiler); if not, a warning says why, once."""
    try:
        rows, counter, lane = (torch.zeros(*shape, device="cuda") for shape in ((1, 3, 8), (1, 3, 1), (1,)))
        state = {"exp_avg": rows.clone(), "exp_avg_sq": rows.clone(), "step": counter, "mask": counter.bool()}
        update(rows, rows, state, None, lane, lane, {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning("the optimiser runs without its fused kernel (slower): %s", reason)
        return False
    return True


def update(
    theta: Tensor, gradient: Tensor, state: dict[str, Tensor], reference: Tensor | None, rate: Tensor, factor: Tensor,
    group: dict[str, Any],
) -> None:
    """Update the active rows of one buffer in place; see `lelora_env.optim.MaskedAdamW`.

    Args:
        theta: Parameters (L, N, D).
        gradient: (L, N, D).
        state: ``exp_avg`` and ``exp_avg_sq`` (L, N, D), ``step`` and ``mask`` (L, N, 1).
        reference: θ0 of the weight decay, (1, N, D) or (L, N, D); ``None`` = 0.
        rate: Learning rates, (L,).
        factor: Factor of each lane's gradient, (L,).
        group: ``betas``, ``eps`` and ``weight_decay``.
    """
    lanes, rows, numbers = theta.shape
    beta1, beta2 = group["betas"]
    _update_kernel[(lanes * rows, triton.cdiv(numbers, BLOCK))](
        theta, gradient, state["exp_avg"], state["exp_avg_sq"], state["step"], state["mask"].view(torch.uint8),
        theta if reference is None else reference, rate, factor, rows, numbers,
        1 if reference is not None and len(reference) > 1 else 0,
        _log(beta1), _log(beta2), beta2, 1 - beta1, 1 - beta2, group["eps"], group["weight_decay"],
        HAS_REFERENCE=reference is not None, DECAYS=group["weight_decay"] != 0, BLOCK=BLOCK,
    )
    state["step"].add_(state["mask"])


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _update_kernel(  # type: ignore[no-untyped-def]
        theta, gradient, first, second, step, mask, reference, rate, factor, rows, numbers, reference_has_lanes,
        log_beta1, log_beta2, beta2, rest1, rest2, eps, decay,
        HAS_REFERENCE: tl.constexpr, DECAYS: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
    ):
        """A block of one row of one lane."""
        row = tl.program_id(0)
        if tl.load(mask + row) != 0:
            lane = row // rows
            column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            inside = column < numbers
            place = row.to(tl.int64) * numbers + column
            count = tl.load(step + row) + 1.0
            eta = tl.load(rate + lane)
            correction1 = -libdevice.expm1(count * log_beta1)
            correction2 = -libdevice.expm1(count * log_beta2)
            g = tl.load(gradient + place, mask=inside, other=0.0) * tl.load(factor + lane)
            m = tl.load(first + place, mask=inside, other=0.0)
            m = m + (g - m) * rest1
            v = tl.load(second + place, mask=inside, other=0.0) * beta2 + g * g * rest2
            x = tl.load(theta + place, mask=inside, other=0.0)
            change = m / (tl.sqrt(v) / tl.sqrt(correction2) + eps) * (eta / correction1)
            if DECAYS:
                delta = x
                if HAS_REFERENCE:
                    start = (row - lane * rows * (1 - reference_has_lanes)).to(tl.int64) * numbers
                    delta = x - tl.load(reference + start + column, mask=inside, other=0.0)
                change += delta * (eta * decay)
            tl.store(first + place, m, mask=inside)
            tl.store(second + place, v, mask=inside)
            tl.store(theta + place, x - change, mask=inside)
