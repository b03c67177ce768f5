"""The stream of training batches: every row once an epoch, shapes that all lanes share, held-out rows never."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from lelora_env.batches import Batches, take_rows
from lelora_env.keys import Purpose, generator, hashed_uniform
from tests.families import tiny_model
from tests.helpers import TokenTask, action_for, make_lanes


def rows_of(lengths: list[int], width: int) -> dict[str, torch.Tensor]:
    mask = (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).long()
    return {"input_ids": torch.arange(1, len(lengths) + 1).unsqueeze(1) * mask, "attention_mask": mask,
            "labels": torch.arange(len(lengths))}


@pytest.mark.parametrize(("count", "batch"), [(103, 8), (64, 16), (5, 16), (16, 16), (1, 1)])
def test_every_row_exactly_once_an_epoch(count: int, batch: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 70, size=count).tolist()
    batches = Batches(rows_of(lengths, 70), batch, split_seed=0)
    for epoch in range(3):
        seen: Counter[int] = Counter()
        for step in range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch):
            width = batches.width(step)
            index = batches.indices(0, seed=4, episode=1, step=step)
            assert index.shape == (batch,)
            got = batches.gather(torch.from_numpy(index[None]), width)
            real = got.weight.bool()
            seen.update(got.rows["labels"][real].tolist())
            assert got.rows["input_ids"].shape == (batch, width)
            full = [lengths[i] for i in got.rows["labels"][real].tolist()]
            assert got.rows["attention_mask"][real].sum(1).tolist() == full, "a row was cut"
        assert seen == Counter(range(count))
    assert batches.per_epoch == -(-count // batch)


def test_shapes_are_shared_and_rows_are_not() -> None:
    lengths = np.random.default_rng(1).integers(1, 60, size=200).tolist()
    one, two = (Batches(rows_of(lengths, 60), 8, split_seed=3) for _ in range(2))
    steps = range(60)
    assert [one.width(s) for s in steps] == [two.width(s) for s in reversed(steps)][::-1]
    assert len({one.width(s) for s in steps}) > 1
    drawn = [np.stack([one.indices(0, seed, episode, s) for s in steps]) for seed, episode in ((1, 0), (2, 0), (1, 1))]
    assert not np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    again = np.stack([two.indices(5, 1, 0, s) for s in reversed(steps)])[::-1]
    assert np.array_equal(drawn[0], again), "the draw must depend on (seed, episode, step) alone"


def test_rows_that_are_no_sequences_are_never_cut() -> None:
    rows = {"x": torch.randn(6, 9), "y": torch.randn(6)}
    assert take_rows(rows, torch.tensor([2, 0]), 0)["x"].shape == (2, 9)
    assert Batches(rows, 4, 0).width(0) == 0


def test_only_sequences_are_cut_whatever_the_width_of_the_others() -> None:
    """T = 12 tokens, and columns of every kind that happen to hold 12 numbers a row."""
    mask = (torch.arange(12) < torch.tensor([[3], [5], [4], [5]])).long()
    sequences = {"input_ids": mask * 7, "attention_mask": mask, "token_type_ids": mask * 0, "labels": mask - 100,
                 "special_tokens_mask": mask.bool(), "inputs_embeds": torch.randn(4, 12, 2)}
    others = {"options": torch.arange(48).view(4, 12), "soft": torch.randn(4, 12), "gold": torch.arange(4),
              "pair_ids": torch.arange(48).view(4, 3, 4), "image": torch.randn(4, 12, 12)}
    index = torch.tensor([2, 0])
    taken = take_rows({**sequences, **others}, index, 5)
    for name, column in sequences.items():
        assert torch.equal(taken[name], column[index][:, :5]), name
    for name, column in others.items():
        assert torch.equal(taken[name], column[index]), name
    several = torch.eye(12)[:4]  # labels of a task with twelve labels at once, which are no sequence
    assert torch.equal(take_rows({**sequences, "labels": several}, index, 5)["labels"], several[index])


def test_an_environment_trains_on_labels_that_are_as_wide_as_its_rows() -> None:
    class SeveralLabels(TokenTask):
        num_labels = 16

        def _draw(self, rng: np.random.Generator, count: int) -> dict[str, torch.Tensor]:
            return {**super()._draw(rng, count), "labels": torch.from_numpy(rng.integers(0, 2, (count, 16))).float()}

        def loss(self, logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            cost = torch.nn.functional.binary_cross_entropy_with_logits
            return cost(logits, batch["labels"], reduction="none").sum(1), torch.full((len(logits),), 16.0)

    class Short(SeveralLabels):
        def _draw(self, rng: np.random.Generator, count: int) -> dict[str, torch.Tensor]:
            rows = super()._draw(rng, count)
            rows["attention_mask"][:, 7:] = 0  # batches are cut to 8 of 16 tokens
            return rows

    env = make_lanes(1, model=tiny_model("bert", num_labels=16), task=Short(length=16), batch_size=4, reward_size=8,
                     tune_size=0, rank_set=(0, 2))
    env.reset(seed=0)
    assert env.tuner.batches.width(0) == 8
    assert np.isfinite(env.step(action_for(env, 1, 0))[4]["L1"]).all()


def test_lanes_with_the_same_numbers_share_one_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws of an epoch are counted: one for all lanes with the same key, and none again while it is in use."""
    batches = Batches(rows_of([3] * 40, 8), 4, split_seed=0)
    draws: Counter[tuple[int, ...]] = Counter()
    draw, order = batches._draw_epoch, batches._draw_order

    def counted(*key: int) -> np.ndarray:
        draws[key] += 1
        return draw(*key) if len(key) == 3 else order(*key)

    monkeypatch.setattr(batches, "_draw_epoch", counted)
    monkeypatch.setattr(batches, "_draw_order", counted)
    for step in range(30):
        for lane in range(16):
            batches.indices(lane, seed=9, episode=0, step=step)
            batches.width(step)
    assert draws == {(9, 0, 0): 1, (9, 0, 1): 1, (9, 0, 2): 1, (0,): 1, (1,): 1, (2,): 1}
    draws.clear()
    for step in range(10):  # every lane at an epoch of its own
        for lane in range(16):
            batches.indices(lane, seed=lane, episode=1, step=step + 10 * (lane + 3))
            batches.width(step + 10 * (lane + 3))
    assert set(draws.values()) == {1}
    assert len(draws) == 32


def test_the_memory_of_draws_is_bounded() -> None:
    batches = Batches(rows_of([3] * 4, 8), 4, split_seed=0)
    for step in range(100):
        for lane in range(3):
            batches.indices(lane, seed=lane, episode=0, step=step)
    assert len(batches._drawn._draws) == len(batches._orders._draws) == 6


def test_no_held_out_row_is_ever_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Follow every row that reaches a training forward pass over two epochs; each row carries its own mark."""
    marks: dict[str, set[int]] = {}

    class Marked(TokenTask):
        def splits(self, tokenizer: Any, *, reward_size: int, tune_size: int, seed: int) -> Any:
            found = super().splits(tokenizer, reward_size=reward_size, tune_size=tune_size, seed=seed)
            start = 0
            for name in ("train", "reward", "tune", "eval"):
                rows = found[name]
                rows["mark"] = torch.arange(start, start + len(rows["labels"]))
                marks[name] = set(rows["mark"].tolist())
                start += len(rows["labels"])
            return found

    env = make_lanes(2, model=tiny_model("bert", num_labels=3), task=Marked(rows=30), batch_size=4, reward_size=6,
                     tune_size=5, rank_set=(0, 2), horizon=16)
    env.reset(seed=0)
    trained: Counter[int] = Counter()
    gather = env.tuner.batches.gather

    def spy(indices: torch.Tensor, width: int) -> Any:
        batch = gather(indices, width)
        trained.update(batch.rows["mark"][batch.weight.bool()].tolist())
        return batch

    monkeypatch.setattr(env.tuner.batches, "gather", spy)
    for _ in range(16):
        env.step(action_for(env, 1, 0))
    assert set(trained) == marks["train"]
    assert set(trained.values()) == {4}  # two lanes, two epochs
    for name in ("reward", "tune", "eval"):
        assert marks[name]
        assert not marks[name] & set(trained)


def test_a_small_last_batch_weighs_only_its_rows() -> None:
    """Five rows in batches of 4: the second batch's loss is that of one row."""
    batches = Batches(rows_of([3] * 5, 8), 4, split_seed=0)
    drawn = [torch.from_numpy(batches.indices(0, 0, 0, step)[None]) for step in range(2)]
    weights = sorted(batches.gather(index, 8).weight.sum().item() for index in drawn)
    assert weights == [1.0, 4.0]


def test_keys_tell_purposes_and_places_apart() -> None:
    draws = [generator(seed, purpose, *where).integers(2**40)
             for seed in (0, 1) for purpose in (Purpose.DATA, Purpose.HEAD) for where in ((0, 0), (0, 1), (1, 0))]
    assert len(set(draws)) == len(draws)
    assert generator(3, Purpose.DATA, 5).integers(2**40) == generator(3, Purpose.DATA, 5).integers(2**40)


def test_hashed_uniform_is_uniform_and_lane_local() -> None:
    keys = torch.tensor([5, 6, 7])
    place = torch.arange(20_000)
    values = hashed_uniform(keys, place)
    assert torch.equal(values[1], hashed_uniform(keys[1:2], place)[0])
    assert torch.equal(values[:, 100:], hashed_uniform(keys, place[100:]))
    counts = torch.histc(values[0], bins=20, min=0, max=1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 50  # χ² with 19 degrees of freedom, p ≈ 1e-4
    correlation = torch.corrcoef(values)
    assert (correlation - torch.eye(3)).abs().max() < 0.03
    assert values.min() >= 0
    assert values.max() < 1
