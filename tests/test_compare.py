"""Sweeps: the same runs whatever happens on the way, tables against numbers worked by hand, and one conclusion."""

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from typer.testing import CliRunner

import lelora_env  # noqa: F401  (registers the environment)
from lelora_env.cli import app
from lelora_env.compare import Method, Problem, RunStore, Sweep, load_sweep, run_sweep, summarise
from lelora_env.compare.analysis import bootstrap, interquartile_mean, probability_of_improvement
from lelora_env.compare.sweep import Run
from lelora_env.errors import LeLoRAError, UnknownNameError

SHORT = Problem(name="short", task="planted", options={"horizon": 6, "tune_size": 16})
RANDOM = Method(name="random", agent="random")
FIXED = Method(name="fixed", agent="fixed", agent_options={"rank": 4})


def sweep(*methods: Method, **options: Any) -> Sweep:
    options = {"problems": (SHORT,), "seeds": (0, 1, 2), **options}
    return Sweep(name="test", methods=methods or (RANDOM, FIXED), **options)


def plain(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what depends on the machine and on the company a run had."""
    own = ("key", "method", "problem", "seed", "status", "score", "score_before", "tune", "losses", "actions")
    return sorted(({name: record[name] for name in own} for record in records), key=lambda record: record["key"])


def test_who_finds_what_is_planted(tmp_path: Path) -> None:
    loaded, store = load_sweep("planted-small"), RunStore(tmp_path)
    run_sweep(loaded, store)
    summary = summarise(store.records(), loaded)
    scores = {row.method: row.score for row in summary.rows}
    assert all(score is not None for score in scores.values())
    oracle = scores.pop("oracle")
    assert oracle is not None
    assert oracle.low > 0.8
    assert all(score is not None and score.high < 0.5 for score in scores.values())  # nobody else finds it in one run
    beats = summary.improvement["oracle"]
    assert beats is not None
    assert (beats.value, beats.low) == (1.0, 1.0)
    assert {row.method: row.mean_rank for row in summary.rows}["largest rank, minor"] == 8.0
    assert summary.missing == 0


def test_a_sweep_that_was_stopped_goes_on_to_the_same_table(tmp_path: Path) -> None:
    whole, parts = RunStore(tmp_path / "whole"), RunStore(tmp_path / "parts")
    run_sweep(sweep(), whole)

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep(), parts, lanes=2, observer=stop)
    assert len(parts.records()) == 2
    seen: list[int] = []
    run_sweep(sweep(), parts, lanes=3, observer=seen.append)
    assert seen == [3, 1]  # what was there is not run again
    assert plain(parts.records()) == plain(whole.records())
    assert summarise(parts.records(), sweep()).lines() == summarise(whole.records(), sweep()).lines()


def test_a_line_that_was_cut_off_is_run_again(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    run_sweep(sweep(), store)
    before = plain(store.records())
    raw = store.path.read_bytes()
    store.path.write_bytes(raw[:-40])
    assert len(store.records()) == 5
    run_sweep(sweep(), store)
    assert plain(store.records()) == before


def test_a_record_is_enough_to_step_the_run_again(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    run_sweep(sweep(), store)
    record = store.records()[1]
    env = gym.make("LeLoRA-v0", task="planted", horizon=6, tune_size=16)
    _, info = env.reset(seed=record["seed"])
    losses = [info["L1"]] + [env.step(np.array(action))[4]["L1"] for action in record["actions"]]
    assert losses == record["losses"]
    assert env.unwrapped.evaluate("eval")["improvement"] == record["score"]  # type: ignore[attr-defined]
    assert record["about"]["versions"]["torch"]
    assert record["settings"]["horizon"] == 6


def test_methods_see_the_same_start_and_seeds_differ(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    problem = Problem(name="short", task="planted", options={"horizon": 2, "learning_rate": 1e-30})
    run_sweep(sweep(problems=(problem,)), store)
    losses = {(record["method"], record["seed"]): record["losses"][0] for record in store.records()}
    for seed in range(3):
        assert losses["random", seed] == losses["fixed", seed]
    seeds = {run.agent_seed for run in sweep().runs()}
    assert len(seeds) == 6


def test_a_crash_is_marked_and_ends_nothing_else(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    broken = Method(name="broken", agent="fixed", agent_options={"rank": 5})
    run_sweep(sweep(RANDOM, broken), store)
    states = {(record["method"], record["status"]) for record in store.records()}
    assert states == {("random", "finished"), ("broken", "crashed")}
    assert "rank must be one of" in store.records()[-1]["reason"]
    summary = summarise(store.records(), sweep(RANDOM, broken))
    assert [(row.runs, row.crashed, row.score is None) for row in summary.rows] == [(3, 0, False), (0, 3, True)]
    assert summary.improvement["broken"] is None
    assert summary.missing == 3
    assert "3 runs of the sweep are missing" in "\n".join(summary.lines())
    seen: list[int] = []
    run_sweep(sweep(RANDOM, broken), store, observer=seen.append)
    assert sum(seen) == 3  # crashed runs are tried again


def test_a_diverged_run_counts_as_untrained_and_leaves_the_others_alone(tmp_path: Path) -> None:
    calm = Problem(name="calm", task="planted", options={"horizon": 6, "max_grad_norm": None})
    wild = Problem(name="wild", task="planted", options={**calm.options, "learning_rate": 1e30})
    store = RunStore(tmp_path)
    both = sweep(FIXED, problems=(calm, wild), seeds=(0, 1))
    run_sweep(both, store)
    rows = {row.problem: row for row in summarise(store.records(), both).rows}
    assert (rows["calm"].diverged, rows["wild"].diverged) == (0, 2)
    untrained = [record["score_before"] for record in store.records() if record["problem"] == "wild"]
    assert rows["wild"].score is not None
    assert rows["wild"].score.value == pytest.approx(np.mean(untrained))
    assert [record["score"] for record in store.records() if record["problem"] == "wild"] == [None, None]


def test_a_lane_that_diverges_leaves_its_neighbours_and_its_record_alone(tmp_path: Path) -> None:
    """Rank 0 trains nothing and cannot diverge; the wild lanes end early. Alone or together: the same records."""
    wild = Problem(name="wild", task="planted", options={"horizon": 5, "max_grad_norm": None, "learning_rate": 1e9,
                                                         "rank_set": [0, 4]})
    calm = Method(name="calm", agent="fixed", agent_options={"rank": 0})
    stores = RunStore(tmp_path / "together"), RunStore(tmp_path / "alone")
    for store, lanes in zip(stores, (8, 1), strict=True):
        run_sweep(sweep(calm, FIXED, problems=(wild,)), store, lanes=lanes)
    assert plain(stores[0].records()) == plain(stores[1].records())
    states = {record["method"]: record for record in stores[0].records()}
    assert states["calm"]["status"] == "finished"
    assert len(states["calm"]["actions"]) == 5
    assert states["fixed"]["status"] == "diverged"
    assert 1 <= len(states["fixed"]["actions"]) == len(states["fixed"]["losses"]) - 1 < 5


def test_a_score_that_is_no_number_counts_as_untrained(tmp_path: Path) -> None:
    exploding = Problem(name="p", task="planted", options={"horizon": 1, "max_grad_norm": None, "learning_rate": 2e8,
                                                           "rank_set": [0, 4]})
    store = RunStore(tmp_path)
    one = sweep(FIXED, problems=(exploding,))
    run_sweep(one, store)
    [row] = summarise(store.records(), one).rows
    assert (row.runs, row.diverged) == (3, 3)
    assert row.score is not None
    assert row.score.value == pytest.approx(np.mean([record["score_before"] for record in store.records()]))


@pytest.mark.parametrize("lanes", [1, 32])
def test_one_seed_that_crashes_takes_no_other_with_it(
    lanes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agents import RandomAllocation

    bad = next(run.agent_seed for run in sweep(RANDOM).runs() if run.seed == 1)
    update = RandomAllocation.update

    def fail(agent: RandomAllocation, transition: Any) -> dict[str, float]:
        if agent.generator.initial_seed() == bad:
            raise RuntimeError("no")
        return update(agent, transition)

    monkeypatch.setattr(RandomAllocation, "update", fail)
    store = RunStore(tmp_path)
    run_sweep(sweep(RANDOM), store, lanes=lanes)
    assert {record["seed"]: record["status"] for record in store.records()} == {0: "finished", 1: "crashed",
                                                                               2: "finished"}


def test_a_crash_never_takes_the_place_of_a_result_and_odd_lines_are_not_counted(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.add([{"key": "a", "status": "finished", "score": 1.0}, {"key": "a", "status": "crashed"},
               {"key": "b", "status": "crashed"}, {"key": "b", "status": "finished", "score": 2.0}])
    with store.path.open("a") as file:
        file.write('3\n[]\n{}\n{"format": "1", "key": "c", "status": "finished"}\n\x00\n')
    assert {record["key"]: record["status"] for record in store.records()} == {"a": "finished", "b": "finished"}


def test_interquartile_mean_and_improvement_by_hand() -> None:
    assert interquartile_mean(np.array([100.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, -50.0])) == pytest.approx(3.5)
    ours, theirs = np.array([3.0, 1.0]), np.array([1.0, 2.0, 0.0])
    # 3 beats all three; 1 ties with 1, loses to 2, beats 0: (3 + 0.5 + 0 + 1) / 6.
    assert probability_of_improvement(ours, theirs) == pytest.approx(4.5 / 6)
    assert probability_of_improvement(theirs, ours) == pytest.approx(1.5 / 6)


def test_intervals_come_from_the_generator_alone_and_cover() -> None:
    scores = np.random.default_rng(3).normal(size=40)
    one, two = (bootstrap(scores, lambda x: x.mean(-1), np.random.default_rng(0)) for _ in range(2))
    assert one == two
    error = scores.std() / np.sqrt(len(scores))
    assert one.low == pytest.approx(scores.mean() - 1.96 * error, abs=0.15 * error)
    assert one.high == pytest.approx(scores.mean() + 1.96 * error, abs=0.15 * error)
    flat = bootstrap(np.full(5, 2.0), interquartile_mean, np.random.default_rng(0))
    assert (flat.value, flat.low, flat.high) == (2.0, 2.0, 2.0)


def test_keys_hold_all_that_decides_a_run() -> None:
    run = Run(FIXED, SHORT, 0, {})
    others = [Run(RANDOM, SHORT, 0, {}), Run(FIXED, SHORT, 1, {}), Run(FIXED, SHORT, 0, {"alpha": 0.5}),
              Run(Method(name="fixed", agent="fixed", agent_options={"rank": 2}), SHORT, 0, {}),
              Run(FIXED, Problem(name="short", task="planted", options={"horizon": 7}), 0, {})]
    assert len({run.key, *(other.key for other in others)}) == 6
    assert Run(FIXED, SHORT, 0, {}).key == run.key


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


SMALL = """
seeds = [4, 7]
[options]
horizon = 3
[[problems]]
name = "p"
task = "planted"
[[methods]]
name = "m"
agent = "random"
"""


@pytest.mark.parametrize(("text", "message"), [
    ("seeds = [", "is not a TOML file"),
    ("seeds = [0, 0]\n" + SMALL.partition("]")[2], "seeds must be integers"),
    ("seeds = [-1]\n" + SMALL.partition("]")[2], "seeds must be integers"),
    (SMALL + 'colour = "red"', "unknown entry of methods 'colour'"),
    (SMALL + "options = 3", "options must be a table"),
    (SMALL + "options = { horizon = 7 }", "horizon belongs to the problem"),
    (SMALL.replace("horizon = 3", "common_random_numbers = true"), "common_random_numbers cannot be an option"),
    (SMALL.replace('"m"', '"a|b"'), "printable text without"),
    (SMALL.replace('"m"', "3"), "printable text without"),
    ("seeds = true\n" + SMALL.partition("]")[2], "must be a list"),
    ("seeds = -3\n" + SMALL.partition("]")[2], "must be a list"),
    (SMALL.replace('task = "planted"', ""), "needs a task, or an instance"),
    (SMALL.replace('agent = "random"', ""), "lacks agent"),
    (SMALL + '[[methods]]\nname = "m"\nagent = "fixed"', "names that differ"),
    ('reference = "n"\n' + SMALL, "unknown reference method 'n'"),
    ("methods = 3\n", "methods must be a list"),
    ("methods = [3]\n", "must be a list of tables"),
    ("seeds = 1.5\n", "must be a list"),
])
def test_sweeps_that_cannot_be(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(LeLoRAError, match=message):
        load_sweep(write(tmp_path / "sweep.toml", text))


def test_files_and_presets_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(LeLoRAError, match="cannot read"):
        load_sweep(tmp_path / "none.toml")
    with pytest.raises(UnknownNameError, match="Did you mean 'planted-small'"):
        load_sweep("planted-smal")


def test_a_store_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text(json.dumps({"format": 99, "key": "k"}) + "\n")
    with pytest.raises(LeLoRAError, match="newer version"):
        RunStore(tmp_path).records()


def test_the_command(tmp_path: Path) -> None:
    path, out = write(tmp_path / "own.toml", SMALL), tmp_path / "out"
    planned = CliRunner().invoke(app, ["compare", str(path), "--out", str(out), "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert "own: 1 methods x 1 problems x 2 seeds = 2 runs, 2 to be made" in planned.output
    assert not out.exists()
    done = CliRunner().invoke(app, ["compare", str(path), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "2/2" in done.output
    table = (out / "table.md").read_text()
    assert table.strip() in done.output
    assert [record["seed"] for record in RunStore(out).records()] == [4, 7]
    again = CliRunner().invoke(app, ["compare", str(path), "--out", str(out)])
    assert "0 to be made" in again.output
    assert CliRunner().invoke(app, ["compare", "nothing", "--out", str(out)]).exit_code == 2
    unknown = ('agent = "rendom"', "Did you mean 'random'"), ('agent = "random"\noptions = { alpah = 1 }', "'alpah'")
    for wrong, said in unknown:
        told = CliRunner().invoke(app, ["compare", str(write(path, SMALL.replace('agent = "random"', wrong))), "--out",
                                        str(out), "--dry-run"])
        assert told.exit_code == 2
        assert said in told.output
    write(path, SMALL.replace('agent = "random"', 'agent = "fixed"\nagent_options = { rank = 5 }'))
    crashed = CliRunner().invoke(app, ["compare", str(path), "--out", str(out)])
    assert crashed.exit_code == 1
    assert "crashed: m: LeLoRAError: rank must be one of" in crashed.output
