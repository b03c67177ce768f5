"""Logged runs, the fit to them, and the environment made of it; the benchmark that logs them, end to end."""

import json
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode

import lelora_env
from agents import make_agent, run
from benchmarks import surrogate_runs
from lelora_env.config import AdapterConfig, EnvConfig, as_options
from lelora_env.errors import DataError, LeLoRAError, UnknownNameError
from lelora_env.logged import PACKAGED, AllocationRuns, Problem, load_allocations, write_allocations
from lelora_env.matrices import MatrixInfo
from lelora_env.surrogate import fit_loss, judge, less_round_mean, replicate_std, ridge
from lelora_env.synthetic import feature_rows

RANKS = (0, 2, 4)
MATRICES = tuple(MatrixInfo(name=f"{layer}.{kind}", layer=layer, type=kind, out_features=out, in_features=8,
                            transposed=False, bias=False)
                 for layer in range(3) for kind, out in (("query", 8), ("up", 24)))
ROUNDS, LANES = 12, 24


def problem(task: str = "made") -> Problem:
    adapter = AdapterConfig(rank_set=RANKS, parametrisation="unit")
    config = EnvConfig(horizon=1, steps_per_action=7, spectrum=4)
    rows = feature_rows(MATRICES, [np.arange(8, 0, -1.0)] * len(MATRICES), 4)
    names = ("layer", "type", "norm", "sv_0", "sv_1", "sv_2", "sv_3", "progress")
    return Problem(task, "all-linear", {**as_options(adapter, config), "metric": "accuracy"}, {"commit": "abc"},
                   MATRICES, names, rows)


def true_loss(action: list[int]) -> float:
    """Worth of an allocation, written out: up is worth more than query, and primary more than the other locations."""
    loss = 0.5
    for matrix, (rank, location) in zip(MATRICES, zip(action[::2], action[1::2], strict=True), strict=True):
        worth = {"query": 0.002, "up": 0.006}[matrix.type] * (1 + matrix.layer)
        loss -= worth * [1.0, 0.5, 0.2][location] * float(np.log2(RANKS[rank] + 1))
    return loss


def parameters(action: list[int]) -> int:
    return sum(RANKS[rank] * (m.out_features + m.in_features) for m, rank in zip(MATRICES, action[::2], strict=True))


def made_runs(noise: float = 0.002, shared: float = 0.05, worth: Any = true_loss, task: str = "made",
              seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    fixed = rng.integers(3, size=2 * len(MATRICES)).tolist()
    found = []
    for number in range(ROUNDS):
        offset = shared * rng.normal()
        for lane in range(LANES):
            action = fixed if lane == 0 else rng.integers(3, size=2 * len(MATRICES)).tolist()
            loss = worth(action) + offset + noise * rng.normal()
            found.append({"task": task, "placement": "all-linear", "round": number, "lane": lane, "seed": 100 + number,
                          "kind": "replicate" if lane == 0 else "uniform", "action": action, "loss_before": 0.7,
                          "loss": loss, "score": 1 - loss, "trained_parameters": parameters(action)})
    return found


def made(path: Path, **options: Any) -> AllocationRuns:
    write_allocations(path, made_runs(**options), [problem()])
    return load_allocations(path=path)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("logged") / "runs.parquet"
    write_allocations(path, made_runs() + made_runs(task="other"), [problem(), problem("other")])
    return path


# ---------------------------------------------------------------------- the file


def test_what_was_written_is_read(file: Path) -> None:
    runs, written = load_allocations("made", path=file), made_runs()
    assert len(runs) == len(written) == ROUNDS * LANES
    assert runs.action.dtype == np.int8
    assert runs.action.tolist() == [run["action"] for run in written]
    for name in ("round", "lane", "seed", "kind", "loss_before", "loss", "score", "trained_parameters"):
        assert getattr(runs, name).tolist() == [run[name] for run in written], name
    found = runs.problem
    assert found.matrices == MATRICES
    assert found.settings["steps_per_action"] == 7
    np.testing.assert_allclose(found.rows, problem().rows, atol=1e-6)
    assert len(load_allocations(path=file)) == 2 * len(runs)


def test_runs_of_several_lengths_are_kept_apart(tmp_path: Path) -> None:
    short = {**made_runs()[0], "placement": "query", "action": [1, 0]}
    part = Problem("made", "query", problem().settings, {}, MATRICES[:1], problem().feature_names, problem().rows[:1])
    write_allocations(tmp_path / "x.parquet", [*made_runs()[:3], short], [problem(), part])
    assert [len(a) for a in load_allocations(path=tmp_path / "x.parquet").action] == [12, 12, 12, 2]
    assert load_allocations(placement="query", path=tmp_path / "x.parquet").action.tolist() == [[1, 0]]


def test_errors_of_the_file(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown task of the logged runs 'mode'\. Did you mean 'made'"):
        load_allocations("mode", path=file)
    with pytest.raises(UnknownNameError, match="placement"):
        load_allocations("made", "query,value", path=file)
    with pytest.raises(DataError, match="several problems"):
        _ = load_allocations(path=file).problem
    with pytest.raises(DataError, match="there is no file"):
        load_allocations(path=tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("no Parquet")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        load_allocations(path=tmp_path / "text.parquet")
    with pytest.raises(DataError, match="without a problem"):
        write_allocations(tmp_path / "x.parquet", made_runs(), [problem("other")])


# ---------------------------------------------------------------------- the fit


def test_the_mean_of_each_round_is_taken_off() -> None:
    values, rounds = np.array([1.0, 5.0, 3.0, 10.0]), np.array([4, 9, 4, 9])
    assert less_round_mean(values, rounds).tolist() == [-1, -2.5, 1, 2.5]
    assert less_round_mean(np.stack([values, 2 * values], 1), rounds)[:, 1].tolist() == [-2, -5, 2, 5]


def test_ridge_equals_least_squares_with_rows_added() -> None:
    rng = np.random.default_rng(1)
    columns = rng.normal(size=(40, 3)) * [1, 5, 0.1]
    columns -= columns.mean(0)
    values = rng.normal(size=40)
    scale = columns.std(0)
    design = np.concatenate([columns / scale, 3 * np.eye(3)])
    expected = np.linalg.lstsq(design, np.concatenate([values, np.zeros(3)]), rcond=None)[0] / scale
    np.testing.assert_allclose(ridge(columns, values, 9.0), expected)


def test_the_fit_finds_what_the_data_were_made_of(tmp_path: Path) -> None:
    model = fit_loss(made(tmp_path / "x.parquet"))
    assert model.form.startswith("additive")
    assert model.judgements[model.form].r > 0.99
    assert model.judgements["total"].r < 0.9
    assert model.residual_std == pytest.approx(0.002, rel=0.15)
    assert model.replicate_std == pytest.approx(0.002, rel=0.6)  # 12 replicates
    assert model.round_std == pytest.approx(0.05, rel=0.5)
    assert model.loss_before == pytest.approx(0.7)
    actions = np.random.default_rng(5).integers(3, size=(200, 12))
    truth = np.array([true_loss(action.tolist()) for action in actions])
    predicted = model.predict(actions)
    assert np.std(predicted - truth - (predicted - truth).mean()) < 0.001
    assert abs((predicted - truth).mean()) < 0.05  # the rounds' own offsets


def test_where_only_the_total_counts_it_is_found(tmp_path: Path) -> None:
    model = fit_loss(made(tmp_path / "x.parquet", noise=0.01, seed=1,
                          worth=lambda action: 0.6 - 3e-4 * parameters(action)))
    assert model.form == "total"
    actions = np.random.default_rng(5).integers(3, size=(50, 12))
    expected = [-3e-4 * parameters(action.tolist()) for action in actions]
    assert np.corrcoef(model.predict(actions), expected)[0, 1] > 0.999


def test_noise_cannot_be_predicted(tmp_path: Path) -> None:
    model = fit_loss(made(tmp_path / "x.parquet", noise=0.01, worth=lambda action: 0.6, seed=1))
    assert max(judgement.r for judgement in model.judgements.values()) < 0.15
    assert model.residual_std == pytest.approx(0.01, rel=0.1)


def test_rounds_are_never_split_between_fit_and_judgement() -> None:
    rounds = np.repeat(np.arange(6), 5)
    columns = (rounds[:, None] == np.arange(6)).astype(float)  # says which round it is, and nothing else
    assert judge(columns, np.repeat(np.random.default_rng(0).normal(size=6), 5), rounds).r <= 0


def test_replicates_by_hand(tmp_path: Path) -> None:
    runs = made_runs()[:2] + made_runs()[LANES:LANES + 2]
    for one, loss in zip(runs, (0.5, 0.6, 0.4, 0.8), strict=True):
        one["loss"] = loss
    write_allocations(tmp_path / "x.parquet", runs, [problem()])
    read = load_allocations(path=tmp_path / "x.parquet")
    assert replicate_std(read, np.zeros(4)) == pytest.approx(0.3 / 2**0.5)  # -0.1 and -0.4
    assert replicate_std(read, np.array([0, 0.1, 0, 0.4])) == pytest.approx(0)


def test_a_fit_needs_rounds(tmp_path: Path) -> None:
    write_allocations(tmp_path / "x.parquet", made_runs()[:LANES], [problem()])
    with pytest.raises(DataError, match="at least two rounds"):
        fit_loss(load_allocations(path=tmp_path / "x.parquet"))


# ---------------------------------------------------------------------- the environment


def surrogate(file: Path, **options: Any) -> Any:
    return gym.make("LeLoRA-surrogate-v0", task="made", path=str(file), **options).unwrapped


def lanes_of(file: Path, lanes: int, **options: Any) -> Any:
    return gym.make_vec("LeLoRA-surrogate-v0", num_envs=lanes, vectorization_mode="vector_entry_point", task="made",
                        path=str(file), **options)


def test_one_step_is_one_run(file: Path) -> None:
    env = surrogate(file, noise=False, alpha=0.5)
    _, info = env.reset(seed=0)
    assert info["L1"] == pytest.approx(0.7)
    action = env.action_space.sample()
    _, reward, terminated, truncated, info = env.step(action)
    assert terminated
    assert not truncated
    loss = float(env.predict(action)[0])
    assert info["L1"] == pytest.approx(loss)
    assert reward == pytest.approx(-(loss + 0.5 * (loss - 0.7)))
    assert info["trained_parameters"] == parameters(action.tolist())
    assert info["optimiser_steps"] == 7


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_native_lanes_equal_gymnasiums_sync_vector_env_bitwise(file: Path, mode: AutoresetMode) -> None:
    options: dict[str, Any] = {"task": "made", "path": str(file)}
    native = gym.make_vec("LeLoRA-surrogate-v0", num_envs=3, vectorization_mode="vector_entry_point",
                          autoreset_mode=mode, **options)
    sync = gym.make_vec("LeLoRA-surrogate-v0", num_envs=3, vectorization_mode="sync",
                        vector_kwargs={"autoreset_mode": mode}, **options)
    assert native.observation_space == sync.observation_space
    assert data_equivalence(native.reset(seed=5), sync.reset(seed=5), exact=True)
    sync.action_space.seed(1)
    for step in range(6):
        if mode == AutoresetMode.DISABLED and step:
            mask = np.ones(3, dtype=bool)
            assert data_equivalence(native.reset(options={"reset_mask": mask}),
                                    sync.reset(options={"reset_mask": mask.copy()}), exact=True)
        actions = sync.action_space.sample()
        ours, theirs = native.step(actions), sync.step(actions)
        assert all(np.array_equal(mine, other) for mine, other in zip(ours[:4], theirs[:4], strict=True))
        assert data_equivalence(ours[4], theirs[4], exact=True), step


def test_both_checkers_pass_without_warnings(file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(surrogate(file))
    from stable_baselines3.common.env_checker import check_env as check_sb3

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        check_sb3(surrogate(file))
    assert all("unconventional shape" in str(w.message) for w in seen), [str(w.message) for w in seen]


def test_noise_is_as_large_as_in_the_data_and_shared_under_common_random_numbers(file: Path) -> None:
    for common, spread in ((True, 0.002), (False, 0.05)):
        env = lanes_of(file, 2000, common_random_numbers=common)
        env.reset(seed=3)
        actions = env.action_space.sample()
        noise = env.step(actions)[4]["L1"] - env.predict(actions)
        assert noise.std() == pytest.approx(spread, rel=0.4)


def test_the_same_allocation_under_common_random_numbers_comes_out_the_same(file: Path) -> None:
    env = lanes_of(file, 4, common_random_numbers=True)
    env.reset(seed=3)
    actions = np.ones((4, 12), dtype=np.int64)
    actions[1, 0], actions[3, 1] = 0, 0
    actions[2, :2] = 0, 2  # rank 0 in another place than lane 1's
    actions[1, 1] = 1
    losses = env.step(actions)[4]["L1"]
    assert losses[1] == losses[2]
    assert len({losses[0], losses[1], losses[3]}) == 3
    env.reset(seed=3)
    assert np.array_equal(env.step(actions[::-1].copy())[4]["L1"], losses[::-1])


def test_the_best_known_is_the_best_of_the_data(file: Path) -> None:
    runs = made_runs()
    means = [np.mean([run["loss"] for run in runs if run["round"] == number]) for number in range(ROUNDS)]
    best = min(runs, key=lambda run: run["loss"] - means[run["round"]])
    known = surrogate(file).best_known()
    assert known.action.tolist() == best["action"]
    assert known.trained_parameters == parameters(best["action"])
    assert known.loss == pytest.approx(best["loss"] - means[best["round"]] + np.mean(means))
    assert known.predicted_loss == pytest.approx(true_loss(best["action"]), abs=0.05)


def test_a_budget_is_kept(file: Path) -> None:
    env = surrogate(file, parameter_budget=0.25)
    env.reset(seed=0)
    *_, info = env.step(np.array([2, 0] * len(MATRICES)))
    assert 0 < info["trained_parameters"] <= 0.25 * parameters([2, 0] * len(MATRICES))


def test_an_agent_learns_in_it(file: Path) -> None:
    env = lanes_of(file, 16, common_random_numbers=True)
    history = run(env, make_agent("reinforce", env, seed=0), env_steps=30, seed=0)
    assert len(history.episodes) == 16 * 30


def test_errors_of_the_environment(file: Path) -> None:
    with pytest.raises(UnknownNameError, match="changes nothing here"):
        surrogate(file, horizon=3)
    with pytest.raises(LeLoRAError, match="noise must be True or False"):
        surrogate(file, noise=1)


# ---------------------------------------------------------------------- the benchmark


def log_runs(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[Path, dict[str, Any]]:
    out = folder / "small.parquet"
    surrogate_runs.main(["--tasks", "planted", "--placements", "query,value", "--runs", "8", "--lanes", "4", "--steps",
                         "5", "--reward-size", "16", "--out", str(out), *more])
    return out, json.loads(capsys.readouterr().out.splitlines()[-1])["results"]


def test_runs_are_logged_resumed_and_can_be_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, result = log_runs(tmp_path, capsys)
    assert result["runs_in_file"] == result["made"]["planted_query+value"]["runs"] == 8
    runs = load_allocations(path=out)
    assert runs.round.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert runs.kind.tolist() == ["replicate", "replicate", "uniform", "concentrated"] * 2
    assert np.array_equal(runs.action[:2], runs.action[4:6])
    assert not np.array_equal(runs.action[2:4], runs.action[6:8])
    assert len(set(runs.loss_before[:4])) == 1
    replayed: Any = gym.make("LeLoRA-v0", task="planted", target_modules="query,value", horizon=1, steps_per_action=5,
                             reward_size=16, common_random_numbers=True, learning_rate=5e-4,
                             **surrogate_runs.OPTIONS).unwrapped
    assert isinstance(replayed, lelora_env.LeLoRAEnv)
    replayed.reset(seed=int(runs.seed[6]))
    *_, info = replayed.step(runs.action[6].astype(np.int64))
    assert info["L1"] == pytest.approx(runs.loss[6], rel=1e-6)
    assert info["trained_parameters"] == runs.trained_parameters[6]
    (tmp_path / "small.parquet.parts" / "planted_query+value_001.jsonl").unlink()
    _, result = log_runs(tmp_path, capsys)
    assert result["made"]["planted_query+value"]["runs"] == 4
    assert load_allocations(path=out).loss.tolist() == runs.loss.tolist()
    env = gym.make("LeLoRA-surrogate-v0", task="planted", placement="query,value", path=str(out))
    assert env.observation_space.contains(env.reset(seed=0)[0])
    with pytest.raises(SystemExit, match="other settings"):
        log_runs(tmp_path, capsys, "--steps", "6", "--runs", "12")


def test_drawn_ranks_are_legal_and_their_total_varies() -> None:
    legal = np.ones((30, 4), dtype=bool)
    legal[5, 3] = False
    rng = np.random.default_rng(0)
    shares = {}
    for varied in (False, True):
        ranks = surrogate_runs.draw(rng, 400, legal, 3, varied).reshape(400, 30, 2)[..., 0]
        assert ranks[:, 5].max() == 2
        assert np.unique(ranks[:, 0]).tolist() == [0, 1, 2, 3]
        shares[varied] = (ranks == 0).mean(1)
    assert shares[False].std() < 0.1
    assert shares[True].std() == pytest.approx(12**-0.5, rel=0.15)  # a uniform probability


def test_concentrated_allocations_differ_in_where_not_in_how_much() -> None:
    env: Any = gym.make_vec("LeLoRA-v0", num_envs=1, vectorization_mode="vector_entry_point")
    actions = surrogate_runs.concentrate(np.random.default_rng(0), 300, env.unwrapped).reshape(300, -1, 2)
    ranks = np.array(env.unwrapped.adapter_config.rank_set)[actions[..., 0]]
    sizes = np.array([m.out_features + m.in_features for m in env.unwrapped.matrices])
    share = (ranks * sizes).sum(1) / (8 * sizes.sum())
    assert share.max() <= 0.4
    assert np.mean(share > 0.36) > 0.9
    assert 0.2 < (ranks > 0).mean(0).min() < (ranks > 0).mean(0).max() < 0.8  # no matrix is always in or always out
    assert 0.4 < np.mean((actions[..., 1] == actions[:, :1, 1]).all(1)) < 0.6


@pytest.mark.skipif(not PACKAGED.is_file(), reason="the data set has not been made yet")
def test_the_packaged_data_can_be_predicted() -> None:
    env: Any = gym.make("LeLoRA-surrogate-v0").unwrapped
    assert env.model.judgements[env.model.form].r > 0.5
    assert env.best_known().loss < env.model.loss_before
