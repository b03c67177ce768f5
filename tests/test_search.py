"""`lelora search` and what comes of it, and policies that go from one `lelora train` to the next; built-in model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from agents.files import load_allocation
from agents.spec import AgentSpec
from lelora_env.cli import app
from lelora_env.errors import LeLoRAError
from lelora_env.records import RunRecord
from lelora_env.search import SearchSettings, search
from tests.helpers import make_lanes

SMALL = ("--task", "planted", "--rounds", 3, "--lanes", 4, "--steps", 4)


def lelora(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def _settings(out: Path, **options: Any) -> SearchSettings:
    return SearchSettings(**{"model": "built-in", "task": "planted", "rounds": 3, "lanes": 4, "steps": 4, "out": out,
                             **options})


def _rounds(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def test_a_search_from_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "found"
    result = lelora("search", *SMALL, "--out", out, "--budget", 0.4, "--seed", 3)
    assert result.exit_code == 0, result.output
    assert "round 3/3: mean loss" in result.output
    assert "the search cost 12 runs (48 optimiser steps" in result.output
    assert sorted(p.name for p in out.iterdir()) == ["allocation.json", "rounds.jsonl"]
    rounds, held = _rounds(out), json.loads((out / "allocation.json").read_text())
    assert [line["round"] for line in rounds] == [1, 2, 3]
    assert all(np.shape(line["losses"]) == (4,) and np.shape(line["actions"]) == (4, 48) for line in rounds)
    cost = {name: held["search"][name] for name in ("runs", "optimiser_steps", "rounds", "lanes", "steps", "seed")}
    assert cost == {"runs": 12, "optimiser_steps": 48, "rounds": 3, "lanes": 4, "steps": 4, "seed": 3}
    assert held["search"]["first_round_loss"] == pytest.approx(np.mean(rounds[0]["losses"]))
    assert held["search"]["last_round_loss"] == pytest.approx(np.mean(rounds[2]["losses"]))
    assert 0 < held["search"]["seconds"] < 120
    assert held["budget"] == held["options"]["parameter_budget"] == 0.4
    assert f"{held['trained_parameters']:,} trained parameters" in result.output

    run = tmp_path / "run"
    trained = lelora("train", "--task", "planted", "--agent", "fixed", "--agent-set",
                     f"allocation={out / 'allocation.json'}", "--target-modules", "all-linear", "--control", "none",
                     "--horizon", 2, "--set", "parametrisation=unit", "--out", run)
    assert trained.exit_code == 0, trained.output
    row = json.loads((run / "result.json").read_text())[0]
    assert row["trained_parameters"] == held["trained_parameters"]
    ranks = [matrix["rank"] for matrix in held["matrices"]]
    np.testing.assert_array_equal(RunRecord(run).lanes[0].ranks, [ranks, ranks])


@pytest.mark.parametrize("agent", ["additive", "bandit", "reinforce", "random", "credit"])
def test_no_run_and_no_outcome_is_above_the_budget(tmp_path: Path, agent: str) -> None:
    """Of ranks that the environment had to lower, the file says which were trained."""
    result = search(_settings(tmp_path / "found", agent=agent, budget=0.3, rounds=2))
    held = json.loads(result.path.read_text())
    env = make_lanes(1, target_modules="all-linear", rank_set=(0, 2, 4, 8), parametrisation="unit")
    sizes = np.array([m.out_features + m.in_features for m in env.matrices])
    limit = 0.3 * 8 * sizes.sum()
    for line in _rounds(tmp_path / "found"):
        assert (np.array(line["ranks"]) @ sizes).max() <= limit
    ranks = np.array([matrix["rank"] for matrix in held["matrices"]])
    assert result.trained_parameters == held["trained_parameters"] == ranks @ sizes <= limit
    assert len(load_allocation(result.path, AgentSpec.from_env(env))) == 24
    assert result.losses.shape == (2, 4)
    assert (result.runs, result.optimiser_steps) == (8, 32)


def test_the_losses_are_those_of_whole_runs_with_the_rounds_allocations(tmp_path: Path) -> None:
    """Round 1 again by hand: one env step of 4 optimiser steps from the same seed."""
    result = search(_settings(tmp_path / "found", rounds=1, seed=5))
    env = make_lanes(4, target_modules="all-linear", rank_set=(0, 2, 4, 8), parametrisation="unit", reward_size=1024,
                     learning_rate=1e-3, tune_size=0, horizon=1, steps_per_action=4, common_random_numbers=True)
    env.reset(seed=5)
    infos = env.step(np.array(_rounds(tmp_path / "found")[0]["actions"]))[4]
    np.testing.assert_allclose(infos["L1"], result.losses[0], rtol=1e-5)


def test_the_same_seed_finds_the_same(tmp_path: Path) -> None:
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        search(_settings(tmp_path / name, seed=seed))
        lines = _rounds(tmp_path / name)
        texts.append([json.dumps(line) for line in lines] + [json.loads((tmp_path / name / "allocation.json")
                                                                         .read_text())["matrices"]])
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_a_search_finds_what_is_planted(tmp_path: Path) -> None:
    """A few hundred short runs: most of the budget goes where something is planted."""
    result = search(_settings(tmp_path / "found", rounds=8, lanes=24, steps=10, options={"learning_rate": 1e-2}))
    env = make_lanes(1, target_modules="all-linear", rank_set=(0, 2, 4, 8))
    task: Any = env.task
    planted = {m.name: (c.rank, c.location) for m, c in zip(env.matrices, task.best_allocation(), strict=True)}
    rows = json.loads(result.path.read_text())["matrices"]
    spent = sum(row["rank"] for row in rows)
    well = sum(row["rank"] for row in rows if planted[row["name"]] == (8, row["location"]))
    assert well > 0.6 * spent
    assert result.losses[-1].mean() < result.losses[0].mean()


@pytest.mark.parametrize(("arguments", "message"), [
    (("--agent", "addtive"), "Did you mean 'additive'"),
    (("--agent-set", "prior=-1"), "prior must be above 0"),
    (("--agent-set", "budget=0.9"), "use --budget"),
    (("--budget", 0), "budget must be in"),
    (("--budget", "nan"), "budget must be in"),
    (("--seed", -1), "seed must be an integer of at least 0"),
    (("--set", "horizon=3"), "use --steps and --budget"),
    (("--set", "parameter_budget=0.3"), "use --steps and --budget"),
    (("--set", "hoizon=3"), "unknown setting"),
    (("--set", "rank_set=2,4", "--budget", 0.2), "least that can train"),
    (("--set", "reward_size=0"), "reward_size"),
    (("--task", "plantd"), "unknown task"),
])
def test_bad_options_are_refused_before_anything_runs(tmp_path: Path, arguments: tuple[object, ...], message: str,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it ran")

    monkeypatch.setattr("agents.run", never)
    out = tmp_path / "found"
    result = lelora("search", *SMALL, "--model", "built-in", "--out", out, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not out.exists()


@pytest.mark.parametrize("options", [{"rounds": 0}, {"lanes": 0}, {"steps": -1}])
def test_counts_below_one_are_refused(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(LeLoRAError, match=f"{next(iter(options))} must be at least 1"):
        _settings(tmp_path, **options)


def test_an_old_search_is_never_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "found"
    search(_settings(out, rounds=1))
    with pytest.raises(LeLoRAError, match="not empty"):
        search(_settings(out))


def test_runs_that_diverge_are_said_to(tmp_path: Path) -> None:
    options = {"learning_rate": 1e30, "rank_set": (0, 8)}
    result = search(_settings(tmp_path / "found", agent="random", rounds=1, options=options))
    assert np.isnan(result.losses).any()
    held = json.loads(result.path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert held["search"]["first_round_loss"] is None
    assert _rounds(tmp_path / "found")[0]["losses"].count(None) == int(np.isnan(result.losses).sum())


# --- lelora train --policy ------------------------------------------------------------------------------------------


def test_a_policy_goes_from_one_run_to_the_next_also_to_a_deeper_model(tmp_path: Path) -> None:
    first = lelora("train", "--task", "planted", "--horizon", 3, "--out", tmp_path / "one")
    assert first.exit_code == 0, first.output
    policy = tmp_path / "one" / "policy.safetensors"
    second = lelora("train", "--task", "planted", "--task-set", "layers=9", "--horizon", 3, "--policy", policy,
                    "--out", tmp_path / "two", "--control", "fixed")
    assert second.exit_code == 0, second.output
    assert RunRecord(tmp_path / "two").config["agent_options"] == {"policy_file": str(policy)}
    assert len(RunRecord(tmp_path / "two").lanes[0].ranks[0]) == 36
    third = lelora("train", "--task", "planted", "--horizon", 3, "--policy", tmp_path / "two" / "policy.safetensors",
                   "--out", tmp_path / "three")
    assert third.exit_code == 0, third.output


@pytest.mark.parametrize(("arguments", "message"), [
    (("--policy", "none.safetensors"), "there is no policy file none.safetensors"),
    (("--policy", __file__), "is not a policy file, or damaged"),
    (("--policy", __file__, "--agent", "fixed"), "--policy goes with the agents reinforce, ppo, a2c; 'fixed' has no"),
    (("--agent", "fixed", "--agent-set", "allocation=none.json"), "there is no allocation file none.json"),
])
def test_wrong_files_are_one_line_and_leave_nothing(tmp_path: Path, arguments: tuple[object, ...],
                                                    message: str) -> None:
    out = tmp_path / "run"
    result = lelora("train", "--task", "planted", "--horizon", 3, "--out", out, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not out.exists()


def test_a_policy_for_other_ranks_is_refused(tmp_path: Path) -> None:
    lelora("train", "--task", "planted", "--horizon", 1, "--control", "none", "--out", tmp_path / "one")
    result = lelora("train", "--task", "planted", "--horizon", 1, "--rank-set", "0,2,8", "--out", tmp_path / "two",
                    "--policy", tmp_path / "one" / "policy.safetensors")
    assert result.exit_code == 2
    assert "rank_set = [0, 2, 4, 8], the environment has [0, 2, 8]" in result.output


def test_an_interrupted_search_leaves_what_it_has_learnt(tmp_path: Path) -> None:
    def stop(number: int, loss: float) -> None:
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(_settings(tmp_path / "cut", rounds=9), stop)
    held = json.loads((tmp_path / "cut" / "allocation.json").read_text())
    assert held["interrupted"] is True
    assert held["search"]["runs"] == 8  # two rounds of four
    assert len(_rounds(tmp_path / "cut")) == 2
    whole = search(_settings(tmp_path / "whole", rounds=2))
    assert json.loads(whole.path.read_text())["interrupted"] is False
    assert held["matrices"] == json.loads(whole.path.read_text())["matrices"]


def test_the_hint_trains_as_the_search_did(tmp_path: Path) -> None:
    result = search(_settings(tmp_path / "found", options={"parametrisation": "sqrt", "learning_rate": 0.004}))
    out = tmp_path / "run"
    trained = lelora("train", *result.train_with.split(), "--out", out, "--steps", 2, "--control", "none")
    assert trained.exit_code == 0, trained.output
    config = RunRecord(out).config
    assert (config["parametrisation"], config["learning_rate"]) == ("sqrt", 0.004)
    assert RunRecord(out).lanes[0].ranks[0].tolist() == [
        row["rank"] for row in json.loads(result.path.read_text())["matrices"]]
