"""Running out of device memory: an error that says for which lanes, rows and length, and what would fit."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from lelora_env.errors import MemoryLimitError

T = TypeVar("T")

GIB = 2**30


def within_memory(run: Callable[[], T], explain: Callable[[], str]) -> T:
    """Call `run`; where the device's memory does not suffice, let everything go and raise what `explain` says.

    Raises:
        MemoryLimitError: There is not enough memory. Nothing has been trained by the call that failed.
    """
    try:
        return run()
    except torch.OutOfMemoryError:
        pass  # leaving this block lets go of the tensors that the traceback holds
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise MemoryLimitError(explain())


def free_bytes(device: torch.device) -> int:
    """Memory that this process could still get on a CUDA device."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def extra_bytes(device: torch.device, run: Callable[[], object]) -> int:
    """The most memory that `run` needs on top of what is in use now."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def rows_that_fit(device: torch.device, try_rows: Callable[[int], object]) -> int:
    """How many rows a lane may have at once, from what one row and two rows need; 0 if not even one fits."""
    try:
        one, two = (extra_bytes(device, lambda rows=rows: try_rows(rows)) for rows in (1, 2))  # type: ignore[misc]
    except torch.OutOfMemoryError:
        return 0
    a_row = max(1, two - one)
    return max(0, (free_bytes(device) - one) // a_row + 1)


def training_advice(
    lanes: int, batch_size: int, accumulate: int, width: int, device: torch.device, try_rows: Callable[[int], object]
) -> str:
    """What to do about a training step that does not fit.

    Args:
        lanes: L.
        batch_size: Rows of an optimiser step and lane.
        accumulate: Parts that they come in.
        width: Tokens of a row; 0 for rows that are not sequences.
        device: Where it did not fit.
        try_rows: Runs a training step of so many rows a lane, without leaving a trace.
    """
    part = batch_size // accumulate
    fit = min(rows_that_fit(device, try_rows), part - 1)  # an estimate: what has just failed does not fit
    said = (f"out of memory on {device}: a training step of {_size(lanes, part, width)} does not fit in the "
            f"{free_bytes(device) / GIB:.1f} GiB that are free.")
    if fit < 1:
        return said + " Not even one row a lane fits: use fewer lanes, shorter rows, or activation_checkpointing=True."
    parts = next(n for n in range(1, batch_size + 1) if batch_size % n == 0 and batch_size // n <= fit)
    fewer = fit * lanes // part
    lanes_too = f"or at most {_count(fewer, 'lane')}, " if fewer else ""
    return (f"{said} About {_count(fit, 'row')} a lane fit at once: set accumulate={parts} (the same "
            f"batch in more parts), {lanes_too}or activation_checkpointing=True, or shorter rows.")


def forward_advice(lanes: int, rows: int, width: int, device: torch.device) -> str:
    """What to do about a pass over reward or evaluation rows that does not fit."""
    return (f"out of memory on {device}: a forward pass of {_size(lanes, rows, width)} does not fit in the "
            f"{free_bytes(device) / GIB:.1f} GiB that are free, or what is measured beside it does not. Use fewer "
            "lanes, shorter rows, a smaller rank_set, or a model in bf16.")


def lanes_advice(lanes: int, a_lane: int, device: torch.device) -> str:
    """What to do about trained numbers that do not fit.

    Args:
        lanes: L.
        a_lane: Bytes that each needs for its trained numbers, gradients and optimiser state.
        device: Where they did not fit.
    """
    free = free_bytes(device)
    fit = min(free // max(1, a_lane), lanes - 1)  # an estimate: what has just failed does not fit
    return (f"out of memory on {device}: {lanes} lanes need {lanes * a_lane / GIB:.2f} GiB for their trained numbers, "
            f"gradients and optimiser state, {free / GIB:.2f} GiB are free. At most {fit} of them fit,"
            " fewer once they train; a smaller rank_set or fewer target_modules make a lane smaller.")


def _size(lanes: int, rows: int, width: int) -> str:
    tokens = f" x {width} tokens" if width else ""
    return f"{_count(lanes, 'lane')} x {_count(rows, 'row')}{tokens}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
