"""Where nothing can be captured, a captured function is simply called."""

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lelora_env.capture import Captured, SharedPool
from tests.helpers import action_for, make_lanes


@contextlib.contextmanager
def nothing() -> Iterator[None]:
    yield


def test_disabled_capture_calls_the_function_every_time() -> None:
    calls = []
    captured = Captured("thing", lambda: calls.append(1), False, nothing)
    captured()
    captured()
    assert len(calls) == 2
    assert captured.graph is None


def test_a_failed_capture_says_why_once_and_goes_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoGraph:
        def __init__(self) -> None:
            raise RuntimeError("this operation synchronises\nand more")

    monkeypatch.setattr("torch.cuda.CUDAGraph", NoGraph)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    captured = Captured("thing", lambda: torch.ones(2), True, nothing)
    assert [captured().tolist() for _ in range(3)] == [[1.0, 1.0]] * 3
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["the thing runs without a CUDA graph (slower, same numbers): this operation synchronises"]


@pytest.mark.parametrize("stop", [False, True])
def test_a_rehearsed_step_leaves_no_trace(stop: bool) -> None:
    """Also when it breaks off: masks must come back, or nothing would ever train again."""
    env = make_lanes(2, extra_features=("grad_norm",))
    env.reset(seed=0)
    env.step(action_for(env, 3, 0))
    before = [env.get_state(lane) for lane in range(2)]
    losses = env.tuner.losses.clone()
    with contextlib.suppress(RuntimeError), env.tuner._rehearsal():
        env.tuner._step(0)
        if stop:
            raise RuntimeError
    for lane in range(2):
        assert all(torch.equal(value, before[lane][key]) for key, value in env.get_state(lane).items())
    assert torch.equal(env.tuner.losses, losses)
    first = env.get_state(0)["rows.32"]
    env.step(action_for(env, 3, 0))
    assert not np.array_equal(first.numpy(), env.get_state(0)["rows.32"].numpy())


def test_functions_that_share_a_pool_warn_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoGraph:
        def __init__(self) -> None:
            raise RuntimeError("no")

    handles = iter(range(10))
    monkeypatch.setattr("torch.cuda.CUDAGraph", NoGraph)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: next(handles))
    pool = SharedPool()  # handle 0
    for name in ("first", "second"):
        Captured(name, lambda: 1, True, nothing, pool)()
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "the first runs without a CUDA graph (slower, same numbers): no"]
    assert pool.handle == 2  # a recording that broke off has left the others unusable
