"""What watches the loop: numbers by hand, events as they are read back, a bar on terminals only."""

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents import AgentSpec, Transition, make_agent, run
from agents.observers import AllocationScalars, ProgressBar, TensorBoard, observers
from lelora_env.errors import LeLoRAError
from lelora_env.matrices import MatrixInfo
from tests.toy_env import ToyEnv, ToyVectorEnv

MATRICES = (
    MatrixInfo("layer.0.query", 0, "query", 16, 16, False, True),
    MatrixInfo("layer.0.value", 0, "value", 3, 16, False, True),
    MatrixInfo("layer.2.query", 2, "query", 16, 16, False, True),
)


def spec_of(matrices: tuple[MatrixInfo, ...]) -> AgentSpec:
    """Ranks 0, 2, 4, 8 at primary, medium, minor."""
    return replace(AgentSpec.from_env(ToyEnv(num_matrices=3)), matrices=matrices)


def transition(actions: Sequence[Sequence[int]], reward: Sequence[float] | None = None, **info: Any) -> Transition:
    action, none = np.array(actions), np.zeros(len(actions), dtype=bool)
    observation = np.zeros((len(action), 3, 8), dtype=np.float32)
    rewards = np.zeros(len(action)) if reward is None else np.array(reward)
    return Transition(observation, action, rewards, none, none, {k: np.array(v) for k, v in info.items()}, observation)


ACTIONS = [[3, 0, 3, 2, 1, 0], [0, 0, 0, 1, 0, 2]]
"""Lane 0: 8 primary, 8 (cut to 3) minor, 2 primary. Lane 1: nothing, wherever."""


def scalars(events: Path) -> dict[str, dict[int, float]]:
    """TensorBoard's scalars by tag and step."""
    found = EventAccumulator(str(events)).Reload()
    return {tag: {e.step: e.value for e in found.Scalars(tag)} for tag in found.Tags()["scalars"]}


def test_an_allocation_as_scalars() -> None:
    found = AllocationScalars(spec_of(MATRICES))(transition(ACTIONS))
    assert {name: values.tolist() for name, values in found.items() if "location" not in name} == {
        "mean_rank": [13 / 3, 0], "rank/query": [5, 0], "rank/value": [3, 0], "rank/layer_0": [5.5, 0],
        "rank/layer_2": [2, 0]}
    shares = np.array([found[f"location/{name}"] for name in ("primary", "medium", "minor")])
    np.testing.assert_allclose(shares[:, 0], [10 / 13, 0, 3 / 13])
    assert np.isnan(shares[:, 1]).all(), "nothing trains, so nothing lies anywhere"


def test_executed_ranks_count_instead_of_the_chosen_ones() -> None:
    found = AllocationScalars(spec_of(MATRICES))(transition(ACTIONS, executed_rank=[[4, 0, 2], [0, 0, 0]]))
    assert found["mean_rank"].tolist() == [2, 0]
    assert found["rank/value"].tolist() == [0, 0]
    assert found["location/primary"][0] == 1
    assert found["location/minor"][0] == 0


def test_an_environment_that_names_no_matrices_has_no_groups() -> None:
    found = AllocationScalars(spec_of(()))(transition(ACTIONS))
    assert sorted(found) == ["location/medium", "location/minor", "location/primary", "mean_rank"]
    assert found["mean_rank"].tolist() == [6, 0]  # without shapes nothing is cut


def test_tensorboard_shows_means_over_lanes_and_leaves_out_what_is_not_finite(tmp_path: Path) -> None:
    with TensorBoard(tmp_path, ToyVectorEnv(2, num_matrices=3)) as board:
        board(transition(ACTIONS, [-1, -2], L1=[0.5, 1.5]), {"entropy": 0.25, "loss": math.nan}, 1)
        board(transition(ACTIONS[1:] * 2, [math.inf, -4]), {"entropy": 0.125}, 2)
    found = scalars(tmp_path)
    assert found["reward"] == {1: -1.5, 2: -4}
    assert found["L1"] == {1: 1}
    assert found["agent/entropy"] == {1: 0.25, 2: 0.125}
    assert found["mean_rank"] == {1: 3, 2: 0}
    assert found["location/minor"] == {1: pytest.approx(8 / 18)}
    assert "agent/loss" not in found


def test_run_writes_events_and_calls_the_callers_observer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env = gym.make("LeLoRA-v0", horizon=3)
    seen: list[tuple[Transition, dict[str, float], int]] = []
    history = run(env, make_agent("reinforce", env, seed=0), episodes=1, seed=0, progress=True, tensorboard=tmp_path,
                  on_step=lambda *arguments: seen.append(arguments))
    found = scalars(tmp_path)
    for tag, values in {"reward": history.rewards, "L1": [t.info["L1"] for t, _, _ in seen],
                        "mean_rank": [t.info["mean_rank"] for t, _, _ in seen],
                        "agent/entropy": [np.array([s["entropy"]]) for _, s, _ in seen]}.items():
        assert found[tag] == {i + 1: pytest.approx(float(value[0]), rel=1e-6) for i, value in enumerate(values)}, tag
    assert {"rank/query", "rank/down", "rank/layer_0", "location/primary"} <= set(found)
    assert [n for _, _, n in seen] == [1, 2, 3]
    assert capsys.readouterr().err == "", "no bar where there is no terminal"


def test_watching_changes_nothing(tmp_path: Path) -> None:
    rewards = []
    for folder in (None, str(tmp_path)):
        env = ToyVectorEnv(2)
        history = run(env, make_agent("reinforce", env, seed=1), env_steps=12, seed=0, progress=folder is not None,
                      tensorboard=folder)
        rewards.append(history.rewards)
    np.testing.assert_array_equal(rewards[0], rewards[1])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("episodes", "env_steps", "total"), [(2, None, 6), (None, 4, 4), (2, 5, 5)])
def test_on_a_terminal_the_bar_counts_to_the_end(monkeypatch: pytest.MonkeyPatch, episodes: int | None,
                                                 env_steps: int | None, total: int) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    env = ToyVectorEnv(2, horizons=3)
    agent = make_agent("random", env, seed=0)
    history = run(env, agent, episodes=episodes, env_steps=env_steps, seed=0, progress=True)
    last = terminal.getvalue().rstrip().split("\r")[-1]
    assert f" {total}/{total} " in last
    mean = float(history.rewards[-1].mean())
    assert f"reward={mean:.4g}, L1={1 - mean:.4g}" in last  # the toy's loss is 1 - reward


def test_a_bar_without_an_end_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", Terminal())
    bar = ProgressBar()
    for step in (1, 2, 5):
        bar(transition(ACTIONS), {}, step)
    assert bar._bar.n == 5
    bar.close()


def test_observers_are_closed_when_a_step_fails(tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    env = ToyVectorEnv(2)
    with pytest.raises(KeyboardInterrupt):
        run(env, make_agent("random", env, seed=0), env_steps=3, tensorboard=tmp_path, on_step=fail)
    assert list(scalars(tmp_path)["reward"]) == [1]


def test_without_observers_nothing_is_called() -> None:
    with observers(ToyEnv()) as observe:
        observe(transition(ACTIONS), {}, 1)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LeLoRAError, match=r"cannot be written to .*file/events: .*Give a folder"):
        run(ToyEnv(), make_agent("random", ToyEnv()), env_steps=1, tensorboard=tmp_path / "file" / "events")


def test_other_environments_have_no_allocation_to_show(tmp_path: Path) -> None:
    with pytest.raises(LeLoRAError, match="not a LeLoRA environment"):
        TensorBoard(tmp_path, gym.make("CartPole-v1"))
