"""Which row goes into which split: pure and seeded, by content, before anything is tokenised."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lelora_env.errors import DataError
from lelora_env.tasks.hints import describe, set_option

_PURPOSE = {"split": 0, "eval": 1, "pool": 2}


@dataclass(frozen=True)
class RowPlan:
    """Row numbers of each split.

    Attributes:
        train: Rows of the training data to train on, ascending.
        reward: Rows of the training data for the reward batch.
        tune: Rows of the training data for the tune split.
        eval: Rows of the official held-out data, or of the training data if `held_out`.
        held_out: Whether `eval` was taken out of the training data.
        notes: What was left out, counted by reason.
    """

    train: np.ndarray
    reward: np.ndarray
    tune: np.ndarray
    eval: np.ndarray
    held_out: bool
    notes: dict[str, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> np.ndarray:
        """The row numbers of the split called `name`."""
        rows: np.ndarray = getattr(self, name)
        return rows

    def sources(self, eval_name: str = "validation", train_index: np.ndarray | None = None) -> dict[str, list[str]]:
        """Where each row comes from, e.g. ``"train:17"``; official held-out rows are ``"<eval_name>:3"``.

        Args:
            eval_name: The name of the official held-out data.
            train_index: The number of each row in the raw training data, if only a part was split.
        """
        found = {}
        for split in ("train", "reward", "tune", "eval"):
            official = split == "eval" and not self.held_out
            rows = self[split] if official or train_index is None else train_index[self[split]]
            found[split] = [f"{eval_name if official else 'train'}:{i}" for i in rows]
        return found


def generator(seed: int, purpose: str) -> np.random.Generator:
    """The random generator of one purpose of one split seed."""
    return np.random.default_rng(np.random.SeedSequence((abs(int(seed)), _PURPOSE[purpose])))


def content_key(*texts: object) -> str:
    """What makes two rows the same row: their texts, up to white space."""
    return "\x00".join(" ".join(str(text).split()) if text is not None else "" for text in texts)


def sample_pool(size: int, wanted: int, seed: int) -> np.ndarray:
    """At most `wanted` of `size` rows, ascending: work on a part of a data set too large to tokenise whole."""
    if wanted >= size:
        return np.arange(size)
    return np.sort(generator(seed, "pool").permutation(size)[:wanted])


def plan_rows(
    train_keys: Sequence[Hashable],
    eval_keys: Sequence[Hashable] | None,
    *,
    reward_size: int,
    tune_size: int,
    seed: int,
    train_rows: int | None = None,
    eval_rows: int | None = None,
    usable: np.ndarray | None = None,
    eval_usable: np.ndarray | None = None,
    left_out: Mapping[str, int] | None = None,
    eval_left_out: Mapping[str, int] | None = None,
) -> RowPlan:
    """Split rows into train / reward / tune / eval, disjoint by row *and* by content.

    Reward and tune rows are drawn from the training data by a seeded permutation, each content once.
    Training rows with the content of a reward, tune or eval row are dropped and counted: official
    data sets hold such rows (16 validation rows of CoLA and 6 of STS-B also stand in train).

    Args:
        train_keys: The content of each training row, N entries.
        eval_keys: The content of each official held-out row; ``None`` takes eval out of the
            training data too (first, so that other sizes do not move it): `eval_rows`, or a tenth.
        reward_size: Rows for the reward batch.
        tune_size: Rows for the tune split.
        seed: Seed of the permutation. The choice of `eval_rows` official rows does not depend on it.
        train_rows: At most so many training rows; ``None`` for all.
        eval_rows: At most so many eval rows; ``None`` for all.
        usable: (N,) bool, which training rows may be used at all; ``None`` for all.
        eval_usable: The same for the held-out rows.
        left_out: Why training rows are not usable, counted by reason; for messages.
        eval_left_out: The same for the held-out rows.

    Raises:
        DataError: Too few rows for the held-out splits and one training row.
    """
    sizes: dict[str, int | None] = {"reward_size": reward_size, "tune_size": tune_size}
    for name, value in {**sizes, "train_rows": train_rows, "eval_rows": eval_rows}.items():
        least = 0 if name == "tune_size" else 1
        if value is not None and value < least:
            hint = f"; give {set_option(name, 90)}, or leave it out for all" if name.endswith("_rows") else ""
            raise DataError(f"{name} must be at least {least} (got {value}){hint}")
    order = generator(seed, "split").permutation(len(train_keys))
    if usable is not None:
        order = order[usable[order]]
    held_out = eval_keys is None
    if eval_keys is None:
        sizes["eval_rows"] = eval_size = eval_rows or max(1, len(order) // 10)
        eval_index, blocked = np.zeros(0, np.int64), set[Hashable]()
    else:
        eval_size = 0
        eval_index = _official_eval(eval_keys, eval_rows, eval_usable, eval_left_out or {})
        blocked = set(eval_keys)
    in_eval = sum(train_keys[i] in blocked for i in order)
    taken, rest, repeats = _draw(order, train_keys, blocked, eval_size + reward_size + tune_size)
    if len(taken) < eval_size + reward_size + tune_size or not rest:
        given = None if eval_keys is not None else eval_rows
        raise DataError(_too_few(len(train_keys), len(taken) + len(rest), sizes, given, left_out or {}))
    first, reward, tune = np.split(np.array(taken), [eval_size, eval_size + reward_size])
    notes = {"train_row_in_eval": in_eval, "train_row_in_reward_or_tune": repeats}
    return RowPlan(
        train=np.sort(np.array(rest[:train_rows])), reward=reward, tune=tune,
        eval=first if held_out else eval_index, held_out=held_out,
        notes={reason: count for reason, count in notes.items() if count},
    )


def _official_eval(
    keys: Sequence[Hashable], limit: int | None, usable: np.ndarray | None, left_out: Mapping[str, int]
) -> np.ndarray:
    index = np.arange(len(keys))
    if usable is not None:
        index = index[usable]
    if not len(index):
        raise DataError(f"the held-out data have no usable row; expected at least one ({len(keys)} rows"
                        f"{_because(left_out)}). Correct them, or leave them away: a part of the training rows is then "
                        "held out")
    if limit is not None and limit < len(index):
        index = np.sort(generator(0, "eval").permutation(index)[:limit])
    return index


def _draw(
    order: np.ndarray, keys: Sequence[Hashable], blocked: set[Hashable], wanted: int
) -> tuple[list[int], list[int], int]:
    """The first `wanted` distinct contents of `order`, the rows that share no content with them, and how many did."""
    taken: dict[Hashable, int] = {}
    rest: list[int] = []
    repeats = 0
    for i in order.tolist():
        key = keys[i]
        if key in blocked:
            continue
        if key in taken:
            repeats += 1
        elif len(taken) < wanted:
            taken[key] = i
        else:
            rest.append(i)
    return list(taken.values()), rest, repeats


def _because(left_out: Mapping[str, int]) -> str:
    return f", {describe(left_out)}" if any(left_out.values()) else ""


def _too_few(
    total: int, usable: int, sizes: Mapping[str, int | None], given: int | None, left_out: Mapping[str, int]
) -> str:
    """The message for too few rows; `given` is the ``eval_rows`` asked for, if these are training rows."""
    held_out = "eval_rows" in sizes
    names = ["reward_size", "tune_size", *(["eval_rows"] if held_out else [])]
    needed = sum(sizes[name] or 0 for name in names) + 1
    parts = " + ".join(f"{name}={sizes[name]}" for name in names)
    advice = "Lower reward_size or tune_size"
    if given is not None:
        room = usable - needed + given
        advice += f" or eval_rows, as in {set_option('eval_rows', max(1, room))},"
    return (f"too few rows: {total} training rows{_because(left_out)}, {usable} of them distinct and usable, but "
            f"{needed} are needed ({parts} + at least 1 to train on). {advice} or give more rows")
