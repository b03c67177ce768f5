"""Running out of memory ends in a message with what would fit; recomputing activations changes no number."""

from typing import Any

import numpy as np
import pytest
import torch

from lelora_env import memory
from lelora_env.adapter import LaneContext, LaneModel
from lelora_env.attach import recompute_activations
from lelora_env.bank import lane_bytes
from lelora_env.errors import LeLoRAError, MemoryLimitError, ModelError, NotReadyError
from lelora_env.memory import lanes_advice, training_advice
from tests.families import tiny_model
from tests.helpers import TokenTask, action_for, make_lanes, two_layer
from tests.test_grams import numbers_task

GIB = 2**30


def no_memory(*args: Any, **options: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.fixture
def a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card with 10 GiB free on which a pass takes 1 GiB and 2 GiB more for every row a lane."""
    asked: list[int] = []

    def extra(device: torch.device, run: Any) -> int:
        run()
        asked.append(1)
        return (1 + 2 * len(asked)) * GIB

    monkeypatch.setattr(memory, "free_bytes", lambda device: 10 * GIB)
    monkeypatch.setattr(memory, "extra_bytes", extra)


def tokens(**options: Any) -> Any:
    env = make_lanes(2, model=tiny_model("bert", num_labels=3), task=TokenTask(), rank_set=(0, 1), reward_size=8,
                     tune_size=0, batch_size=12, horizon=4, **options)
    env.reset(seed=0)
    return env


@pytest.mark.usefixtures("a_card")
def test_a_training_step_that_does_not_fit_says_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    env = tokens()
    before = env.get_state(0)
    step = env.tuner._step
    monkeypatch.setattr(env.tuner, "_step", no_memory)
    with pytest.raises(MemoryLimitError) as caught:
        env.step(action_for(env, 1, 0))
    text = str(caught.value)
    assert "2 lanes x 12 rows x 12 tokens" in text
    assert "10.0 GiB" in text
    assert "About 4 rows a lane fit" in text  # 1 + 2·4 = 9 GiB of 10; five rows would take 11
    assert "accumulate=3" in text
    assert "lanes" not in text.split("accumulate=3")[1]  # one lane of 12 rows needs as much as two of 6
    assert all(torch.equal(value, before[key]) for key, value in env.get_state(0).items())
    monkeypatch.setattr(env.tuner, "_step", step)
    env.tuner._train_step.clear()
    _, reward, *_ = env.step(action_for(env, 1, 0))
    assert np.isfinite(reward).all()


def test_not_even_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    env = tokens()
    monkeypatch.setattr(memory, "free_bytes", lambda device: GIB)
    monkeypatch.setattr(memory, "extra_bytes", no_memory)
    monkeypatch.setattr(env.tuner, "_step", no_memory)
    with pytest.raises(MemoryLimitError, match="Not even one row a lane fits: use fewer lanes"):
        env.step(action_for(env, 1, 0))


@pytest.mark.usefixtures("a_card")
def test_a_measurement_or_score_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    env = tokens()
    monkeypatch.setattr(env.tuner.passes, "_call", no_memory)
    with pytest.raises(MemoryLimitError, match="a forward pass of 2 lanes x 20 rows x 12 tokens does not fit"):
        env.evaluate("eval")
    with pytest.raises(MemoryLimitError, match="a forward pass of 2 lanes x 8 rows x 12 tokens does not fit"):
        env.reset(seed=1)


def test_more_lanes_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10 * 2**20)
    monkeypatch.setattr("lelora_env.vector_env.FineTuner", no_memory)
    with pytest.raises(MemoryLimitError, match=r"2 lanes need .* At most (\d+) of them fit") as caught:
        tokens(target_modules="query,value")
    # 4 matrices of 32x32 with 3 components (m = 32, rank 1 at three places): 3·64 numbers each, σ beside them, and
    # 24 bytes a number: value, gradient, two moments, value before the step, factor.
    assert "At most 1 of them fit" in str(caught.value)
    assert lanes_advice(100, 2**20, torch.device("cpu")).count("At most 10 of them fit") == 1


def test_the_size_of_a_lane() -> None:
    """24x16 and 8x24 with ranks up to 4: 12 components of 24 + 16 numbers and 8 of 8 + 24, with a σ each."""
    env = make_lanes(1, model=two_layer(), task=numbers_task(16, 8), rank_set=(0, 2, 4), target_modules=("0", "2"),
                     reward_size=8, tune_size=0, batch_size=4)
    env.reset(seed=0)
    numbers = 12 * (24 + 16 + 1) + 8 * (8 + 24 + 1)
    assert lane_bytes(env.tuner.base.spectrum) == numbers * 36 + 20 * 2 * (12 * 12 + 8 * 8)


@pytest.mark.usefixtures("a_card")
def test_an_env_step_that_breaks_off_half_way_must_be_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    env = tokens(steps_per_action=3)
    step, calls = env.tuner._step, []

    def second_fails(width: int) -> None:
        calls.append(1)
        no_memory() if len(calls) == 2 else step(width)

    monkeypatch.setattr(env.tuner, "_step", second_fails)
    with pytest.raises(MemoryLimitError, match="broke off half-way: reset the lanes"):
        env.step(action_for(env, 1, 0))
    with pytest.raises(NotReadyError, match="have finished"):
        env.step(action_for(env, 1, 0))
    env.reset(seed=0)
    infos = env.step(action_for(env, 1, 0))[4]
    assert infos["optimiser_steps"].tolist() == [3, 3]


@pytest.mark.usefixtures("a_card")
def test_advice_under_no_grad_and_for_a_partial_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_lanes(10, model=tiny_model("bert", num_labels=3), task=TokenTask(), rank_set=(0, 1), reward_size=8,
                     tune_size=0, batch_size=12, horizon=4)
    env.reset(seed=0)
    step = env.tuner._step
    monkeypatch.setattr(env.tuner, "_step", no_memory)
    with torch.no_grad(), pytest.raises(MemoryLimitError, match="About 4 rows a lane"):
        env.step(action_for(env, 1, 0))
    monkeypatch.setattr(env.tuner, "_step", step)
    monkeypatch.setattr(env.tuner.passes, "_call", no_memory)
    with pytest.raises(MemoryLimitError, match="a forward pass of 10 lanes x 8 rows"):
        env.reset(options={"reset_mask": np.arange(10) == 3})


def test_advice_never_recommends_what_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "rows_that_fit", lambda device, try_rows: 40)
    monkeypatch.setattr(memory, "free_bytes", lambda device: GIB)
    text = training_advice(4, 16, 4, 8, torch.device("cpu"), print)
    assert "4 lanes x 4 rows" in text
    assert "About 3 rows a lane fit" in text
    assert "accumulate=8" in text
    assert "at most 3 lanes" in text


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "opt"])
def test_recomputed_activations_give_the_same_bits(family: str) -> None:
    found = []
    for recomputed in (False, True):
        model = tiny_model(family, num_labels=3)
        model.config.pad_token_id = 1
        env = make_lanes(2, model=model, task=TokenTask(), rank_set=(0, 1, 2), reward_size=8, tune_size=0, batch_size=8,
                         accumulate=2, horizon=6, target_modules="all-linear", activation_checkpointing=recomputed)
        env.reset(seed=0)
        for _ in range(4):
            env.step(action_for(env, 2, 1))
        found.append(env.get_state(1))
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())
    assert found[0]["finetune.clock"].tolist() == [1, 0, 4]


def test_recomputing_needs_blocks_and_lanes_that_run_together() -> None:
    with pytest.raises(ModelError, match="made of blocks"):
        recompute_activations(LaneModel(two_layer(), LaneContext()))
    with pytest.raises(LeLoRAError, match="run one at a time"):
        make_lanes(2, model=tiny_model("deberta", num_labels=3, attention="eager"), task=TokenTask(), rank_set=(0, 1),
                   target_modules="all-linear", reward_size=8, tune_size=0, activation_checkpointing=True).reset(seed=0)
