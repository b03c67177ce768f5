"""What a run says was learnt: tables worked out by hand, and probabilities noted without disturbing anybody."""

import json
import random
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents import AGENT_NAMES, Transition, make_agent, required_options
from lelora_env.learnt import entropy_curve, learnt, location_shares, mean_ranks, phases, update_norms
from lelora_env.matrices import MatrixInfo
from lelora_env.records import LaneTrace, RunRecord
from lelora_env.runs import RunFolder
from lelora_env.training import BUILT_IN, SideBySide, Training, TrainSettings, Watched

LOCATIONS = ("primary", "minor")
MATRICES = [MatrixInfo(f"layer.{layer}.{kind}", layer, kind, 16, 16, False, True)
            for layer, kind in ((0, "query"), (0, "up"), (1, "query"), (2, "query"), (2, "other"), (2, "other"))]


def trace_of(ranks: Any, places: Any, metrics: list[dict[str, Any]] | None = None, noted: Any = None) -> LaneTrace:
    return LaneTrace("agent", np.array(ranks), np.array(places), metrics or [], noted)


# Four env steps: phases of 1, 1 and 2. Rows are env steps, columns the matrices above.
RANKS = [[8, 0, 2, 0, 4, 8],
         [8, 4, 2, 0, 0, 0],
         [2, 4, 0, 0, 0, 0],
         [0, 8, 0, 0, 2, 6]]
PLACES = [[0, 1, 0, 1, 1, 0],
          [1, 0, 0, 1, 1, 1],
          [1, 0, 0, 1, 1, 1],
          [0, 1, 0, 1, 0, 1]]


def test_phases_are_thirds() -> None:
    assert phases(9) == {"early": slice(0, 3), "middle": slice(3, 6), "late": slice(6, 9), "run": slice(0, 9)}
    assert [part.stop - part.start for part in phases(100).values()] == [33, 33, 34, 100]
    assert [part.stop - part.start for part in phases(1).values()] == [0, 0, 1, 1]


def test_mean_ranks_by_hand() -> None:
    rows = [tuple(row.values()) for row in mean_ranks(trace_of(RANKS, PLACES), MATRICES)]
    assert rows == [(0, "query", 8, 8, 1, 4.5), (0, "up", 0, 4, 6, 4), (1, "query", 2, 2, 0, 1),
                    (2, "query", 0, 0, 0, 0), (2, "other", 6, 0, 2, 2.5)]
    assert list(mean_ranks(trace_of(RANKS, PLACES), MATRICES)[0]) == ["layer", "type", "early", "middle", "late", "run"]


def test_location_shares_by_hand() -> None:
    """Primary and minor components: step 1: 18 and 4; step 2: 6 and 8; steps 3 and 4: 6 and 16."""
    rows = location_shares(trace_of(RANKS, PLACES), MATRICES, LOCATIONS)
    shares = {(row["matrices"], row["phase"]): tuple(row["shares"][name] for name in LOCATIONS) for row in rows}
    groups = ["all", "layers front", "layers middle", "layers back", "query", "up", "other"]
    assert list(shares) == [(group, phase) for group in groups for phase in ("early", "middle", "late", "run")]
    assert shares["all", "early"] == pytest.approx((18 / 22, 4 / 22))
    assert shares["all", "middle"] == pytest.approx((6 / 14, 8 / 14))
    assert shares["all", "late"] == pytest.approx((6 / 22, 16 / 22))
    assert shares["all", "run"] == pytest.approx((30 / 58, 28 / 58))
    assert shares["layers front", "late"] == pytest.approx((4 / 14, 10 / 14))
    assert shares["layers middle", "run"] == (1, 0)
    assert shares["up", "middle"] == (1, 0)
    assert shares["other", "late"] == pytest.approx((2 / 8, 6 / 8))
    assert np.isnan(shares["up", "early"]).all(), "rank 0 has no location"
    assert np.isnan(shares["other", "middle"]).all()


def test_update_norms_by_hand() -> None:
    lines: list[dict[str, Any]] = [{"env_step": 0, "L1": 2.0}]
    lines += [{"env_step": i + 1, "update_norm_primary": float(value)} for i, value in enumerate((3, 0, 1, 4))]
    primary, minor = update_norms(trace_of(RANKS, PLACES, lines), LOCATIONS)
    assert primary == {"location": "primary", "early": 3, "middle": 0, "late": 2.5, "run": 2}
    assert minor["location"] == "minor"
    assert np.isnan([minor[phase] for phase in ("early", "middle", "late", "run")]).all()


def test_entropy_counts_rank_zero_once() -> None:
    """Ranks 0 and 4 at two locations: one sure matrix; one that is even between rank 0, 4 primary and 4 minor."""
    sure, even = [[0, 0], [0, 1]], [[1 / 6, 1 / 6], [1 / 3, 1 / 3]]
    half = [[0.5, 0], [0.5, 0]]
    noted = np.array([[sure, even], [half, half]])
    steps, nats = entropy_curve(trace_of([[0, 0]], [[0, 0]], noted=(np.array([1, 9]), noted)), (0, 4))
    assert steps.tolist() == [1, 9]
    np.testing.assert_allclose(nats, [np.log(3) / 2, np.log(2)])
    _, four = entropy_curve(trace_of([[0, 0]], [[0, 0]], noted=(np.array([1]), noted[:1])), (2, 4))
    np.testing.assert_allclose(four, [(np.log(3) * 2 / 3 + np.log(6) / 3) / 2])  # without a rank 0 each place counts


def test_entropy_is_of_what_sums_to_one_though_digits_are_cut() -> None:
    noted = np.full((1, 1, 3, 1), 0.33333)
    _, nats = entropy_curve(trace_of([[0]], [[0]], noted=(np.array([1]), noted)), (2, 4, 8))
    np.testing.assert_allclose(nats, [np.log(3)], rtol=1e-12)


def test_a_folder_gives_all_tables_and_they_are_plain_json(tmp_path: Path) -> None:
    config = {"rank_set": (0, 8), "locations": ("primary", 0.25), "model": "m", "task": "t"}
    with RunFolder(tmp_path / "run", config=config, matrices=MATRICES[:2], lanes=["agent", "fixed"], seed=0) as folder:
        folder.log_action("agent", 1, np.array([1, 1, 0, 0]))
        folder.log("agent", 1, {"update_norm_primary": 0.0, "update_norm_at_0.25": 0.5})
        folder.log_policy("agent", 1, np.array([[[0, 0], [0.5, 0.5]], [[0.25, 0.75], [0, 0]]]))
        folder.write_json("learnt.json", learnt(RunRecord(tmp_path / "run")))
    found = json.loads((tmp_path / "run" / "learnt.json").read_text())
    assert found["phases"] == {"late": [1, 1], "run": [1, 1]}
    agent, fixed = found["lanes"]["agent"], found["lanes"]["fixed"]
    assert agent["mean_rank"][0] == {"layer": 0, "type": "query", "early": None, "middle": None, "late": 8, "run": 8}
    assert agent["location_shares"][3] == {"matrices": "all", "phase": "run", "shares": {"primary": 0, "at_0.25": 1}}
    assert agent["update_norms"][1]["run"] == 0.5
    assert agent["entropy"] == {"env_step": [1], "nats": [pytest.approx(np.log(2) / 2)]}
    assert fixed["entropy"] == {"env_step": [], "nats": []}
    assert fixed["mean_rank"][0]["run"] is None


# --- while it runs --------------------------------------------------------------------------------------------------


class Counting:
    """Says how often it has learnt, and what it sees, as its probabilities: (1, M, 1, 1)."""

    def __init__(self) -> None:
        self.learnt = 0

    def act(self, observation: Any) -> Any:
        return np.full((len(observation), 4), self.learnt)

    def probabilities(self, observation: Any) -> Any:
        assert len(observation) == 1
        return observation[:, :, :1, None] + self.learnt

    def update(self, transition: Any) -> dict[str, float]:
        self.learnt += 1
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"learnt": self.learnt}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learnt = state["learnt"]


class Silent(Counting):
    probabilities = None  # type: ignore[assignment]


@pytest.mark.parametrize(("env_steps", "count"), [(1, 1), (2, 2), (99, 99), (100, 100), (101, 100), (1234, 100)])
def test_policies_are_noted_before_learning_for_each_lane_and_evenly_spread(env_steps: int, count: int) -> None:
    watched = Watched(SideBySide([Counting(), Silent(), Counting()]), env_steps)
    observation, none = np.arange(3.0)[:, None, None] * np.full((3, 2, 5), 1000.0), np.zeros(3, dtype=bool)
    noted = []
    for step in range(1, env_steps + 1):
        action = watched.act(observation)
        watched.update(Transition(observation, action, np.zeros(3), none, none, {}, observation))
        first, second, third = watched.probabilities
        assert second is None
        assert (first is None) == (third is None)
        if first is not None and third is not None:
            noted.append(step)
            assert first.shape == (2, 1, 1)
            assert np.unique(first).tolist() == [step - 1]
            assert np.unique(third).tolist() == [2000 + step - 1]
    assert len(noted) == count
    assert (noted[0], noted[-1]) == (1, env_steps)
    assert np.ptp(np.diff(noted)) <= 1 if count > 1 else noted == [1]


def global_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]  # noqa: NPY002


@pytest.mark.parametrize("name", AGENT_NAMES)
def test_asking_an_agent_for_its_probabilities_moves_nothing(name: str) -> None:
    env = gym.make("LeLoRA-v0", horizon=3, **required_options(name))
    asked, other = (make_agent(name, env, seed=4) for _ in range(2))
    observation = env.reset(seed=0)[0][None]
    for _ in range(2):
        before = global_states()
        noted = asked.probabilities(observation)  # type: ignore[attr-defined]
        assert global_states() == before
        assert noted.shape == (1, 24, 4, 3)
        np.testing.assert_allclose(noted.sum((2, 3)), 1, atol=1e-5)
        action = asked.act(observation)
        np.testing.assert_array_equal(action, other.act(observation))
        after, reward, terminated, truncated, info = env.step(action[0])
        batched = {key: np.asarray([value]) for key, value in info.items()}
        transition = Transition(observation, action, np.array([float(reward)]), np.array([terminated]),
                                np.array([truncated]), batched, after[None])
        for agent in (asked, other):
            agent.update(transition)
        observation = after[None]


def test_a_run_says_what_was_trained_under_a_hard_budget(tmp_path: Path) -> None:
    """The environment's own mean rank is the witness; the policies of fixed and random agents are known."""
    settings = TrainSettings(task="planted", model=BUILT_IN, out=tmp_path / "run", seed=2, controls=("random",),
                             agent="fixed", options={"horizon": 6, "parameter_budget": 0.25})
    Training(settings).run()
    record = RunRecord(tmp_path / "run")
    for trace in record.lanes:
        np.testing.assert_allclose(trace.ranks.mean(1), trace.series("mean_rank")[1])
        types, layers = ([getattr(m, part) for m in record.matrices] for part in ("type", "layer"))
        for name, own in (("rank/value", np.array(types) == "value"), ("rank/layer_5", np.array(layers) == 5)):
            np.testing.assert_allclose(trace.series(name)[1], trace.ranks[:, own].mean(1))
        shares = np.array([trace.series(f"location/{name}")[1] for name in ("primary", "medium", "minor")])
        np.testing.assert_allclose(shares.sum(0), 1)
    fixed, drawn = record.lanes
    lines = [json.loads(line) for line in (tmp_path / "run" / "allocation.jsonl").read_text().splitlines()]
    assert all(line["action"][::2] == [3] * 24 for line in lines if line["lane"] == "fixed"), "it asks for rank 8"
    assert fixed.ranks.mean() < 3, "and gets a quarter"
    assert fixed.series("location/primary")[1].tolist() == [1] * 6
    steps, noted = fixed.probabilities
    assert steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert (noted[:, :, 3, 0] == 1).all()
    np.testing.assert_allclose(drawn.probabilities[1], 1 / 12, atol=1e-5)
    tables = json.loads((tmp_path / "run" / "learnt.json").read_text())["lanes"]
    assert tables["fixed"]["entropy"]["nats"] == [0] * 6
    np.testing.assert_allclose(tables["random"]["entropy"]["nats"], np.log(4) + 0.75 * np.log(3), rtol=1e-4)


def test_the_noted_probabilities_are_those_that_the_agent_reports(tmp_path: Path) -> None:
    """REINFORCE reports the entropy of the policy that it is about to change: the same one, to what 5 digits allow."""
    settings = TrainSettings(task="planted", model=BUILT_IN, out=tmp_path / "run", controls=(), options={"horizon": 8},
                             agent_options={"learning_rate": 0.05})
    Training(settings).run()
    trace = RunRecord(tmp_path / "run").lanes[0]
    reported = trace.series("agent/entropy")[1]
    assert np.ptp(reported) > 0.01
    np.testing.assert_allclose(entropy_curve(trace, (0, 2, 4, 8))[1], reported, atol=1e-4)
