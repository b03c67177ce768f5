"""The command `lelora`: what a run leaves behind, and how bad input ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from lelora_env import cli
from lelora_env.cli import Progress, app, config_options, parse_settings, table
from lelora_env.errors import LeLoRAError, UnknownNameError
from lelora_env.records import RunRecord
from lelora_env.runs import RunFolder
from lelora_env.training import LaneResult

ROOT = Path(__file__).resolve().parent.parent


def lelora(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def train(out: Path, *arguments: object) -> RunRecord:
    result = lelora("train", "--task", "planted", "--out", out, *arguments)
    assert result.exit_code == 0, result.output
    return RunRecord(out)


def test_version_is_that_of_the_package() -> None:
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    result = lelora("--version")
    assert result.exit_code == 0
    assert result.output.strip() == f"lelora-env {version}"


def test_a_run_leaves_its_folder_and_a_table(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = lelora("train", "--task", "planted", "--out", out, "--steps", 4, "--seed", 5)
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in out.iterdir()) == [
        "adapter.json", "adapter.safetensors", "allocation.jsonl", "allocation.png", "config.json", "events",
        "learnt.json", "matrices.json", "metrics.jsonl", "policy.jsonl", "policy.safetensors", "result.json",
        "run.json"]
    record = RunRecord(out)
    assert record.status == "finished"
    assert [lane.name for lane in record.lanes] == ["reinforce", "fixed", "random"]
    assert all(lane.ranks.shape == (4, 24) for lane in record.lanes)
    assert record.config["horizon"] == 4
    assert record.config["seed"] == 5
    assert record.config["agent"] == "reinforce"
    rows = [line.split() for line in result.output.splitlines() if line.split()[:1] in (["reinforce"], ["fixed"])]
    saved = json.loads((out / "result.json").read_text())
    assert [float(row[2]) for row in rows] == [round(lane["eval_after"], 4) for lane in saved[:2]]
    assert "far too short to learn an allocation" in result.output
    assert str(out) in result.output


def test_the_control_is_an_ordinary_run_of_the_environment(tmp_path: Path) -> None:
    fixed = train(tmp_path / "run", "--steps", 5, "--seed", 3).lanes[1]
    env = gym.make("lelora_env:LeLoRA-v0", horizon=5, common_random_numbers=True)
    _, info = env.reset(seed=3)
    losses = [info["L1"]]
    base: Any = env.unwrapped
    action = np.tile([len(base.adapter_config.rank_set) - 1, 0], base.num_matrices)
    for _ in range(5):
        losses.append(env.step(action)[4]["L1"])
    np.testing.assert_allclose(fixed.series("L1")[1], losses, rtol=1e-4)
    saved = json.loads((tmp_path / "run" / "result.json").read_text())[1]
    assert saved["eval_after"] == pytest.approx(base.evaluate("eval")["improvement"], rel=1e-3)
    assert saved["eval_before"] < saved["eval_after"]
    assert saved["mean_rank"] == 8


def test_lanes_share_start_and_data(tmp_path: Path) -> None:
    lanes = train(tmp_path / "run", "--agent", "fixed", "--control", "fixed", "--steps", 4).lanes
    assert [lane.name for lane in lanes] == ["fixed", "fixed-1"]
    np.testing.assert_array_equal(lanes[0].series("train_loss")[1], lanes[1].series("train_loss")[1])


def test_same_seed_same_run_other_seed_other_run(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tmp_path / name, "--steps", 3, "--seed", seed)
    texts = [(tmp_path / name / "metrics.jsonl").read_text() for name in "abc"]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_every_lane_draws_on_its_own(tmp_path: Path) -> None:
    """Independent of a uniform draw among 4 ranks and 3 locations, choices agree in 1/4 and 1/3 of all cases."""
    lanes = train(tmp_path / "run", "--steps", 20, "--control", "random", "--control", "random").lanes
    for one, other in ((0, 1), (0, 2), (1, 2)):
        for name, chance in (("ranks", 1 / 4), ("locations", 1 / 3)):
            agreement = np.mean(getattr(lanes[one], name) == getattr(lanes[other], name))
            assert agreement == pytest.approx(chance, abs=0.1), (one, other, name)  # five sigma


def test_config_says_what_was_used(tmp_path: Path) -> None:
    config = train(tmp_path / "run", "--steps", 1, "--device", "cpu", "--control", "random",
                   "--learning-rate", 0.01).config
    assert (config["device"], config["dtype"], config["head_learning_rate"]) == ("cpu", "float32", 0.01)
    assert config["model"] == "built-in"
    assert len(set(config["agent_seeds"])) == 2


def result_row(tune: float) -> LaneResult:
    return LaneResult(lane="fixed", metric="accuracy", eval_before=0.125, eval_after=0.25, tune_after=tune,
                      loss_before=2.0, loss_after=1.0, mean_rank=8.0, trained_parameters=1000.0)


def test_the_table_has_a_tune_column_only_where_there_is_a_tune_split() -> None:
    with_tune, without = table([result_row(0.5)]), table([result_row(float("nan"))])
    assert with_tune[1].split() == ["fixed", "0.1250", "0.2500", "0.5000", "2.0000", "1.0000", "8.00", "1,000"]
    assert without[1].split() == ["fixed", "0.1250", "0.2500", "2.0000", "1.0000", "8.00", "1,000"]
    assert "tune after" in with_tune[0]
    assert "tune" not in without[0]


def test_a_data_file_is_a_task_and_its_options_reach_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lelora_env import training

    (tmp_path / "reviews.csv").write_text("text,label\n" + "".join(f"row {i},{i % 2}\n" for i in range(40)))
    seen = {}

    def only_the_task(settings: training.TrainSettings) -> None:
        from lelora_env.tasks import make_task

        seen["task"] = make_task(settings.task_spec)
        raise LeLoRAError("far enough")

    monkeypatch.setattr(training, "make_lanes", only_the_task)
    result = lelora("train", "--task", tmp_path / "reviews.csv", "--out", tmp_path / "run", "--model", "m",
                    "--task-set", "eval_rows=7", "--task-set", "text_columns=text")
    assert result.stderr == "lelora: error: far enough\n", result.output
    task: Any = seen["task"]
    assert (task.name, task.num_labels, task.eval_rows) == ("text", 2, 7)
    lelora("train", "--task", f"text:{tmp_path / 'reviews.csv'}", "--out", tmp_path / "run", "--model", "m")
    task = seen["task"]
    assert (task.num_labels, task.eval_rows) == (2, None)


def test_settings_reach_the_environment(tmp_path: Path) -> None:
    record = train(tmp_path / "run", "--steps", 2, "--rank-set", "0,4", "--set", "alpha=0.5",
                   "--set", "locations=minor", "--control", "none", "--agent-set", "learning_rate=0.01")
    assert record.config["rank_set"] == [0, 4]
    assert record.config["alpha"] == 0.5
    assert record.config["locations"] == ["minor"]
    assert record.config["agent_options"] == {"learning_rate": 0.01}
    assert [lane.name for lane in record.lanes] == ["reinforce"]
    assert set(np.unique(record.lanes[0].ranks)) <= {0, 4}


@pytest.mark.parametrize(("arguments", "message"), [
    (["--model", "no/such-model", "--task", "docstrings"], "no/such-model"),
    (["--task", "docstring"], "Did you mean 'docstrings'"),
    (["--agent", "reinforced"], "Did you mean 'reinforce'"),
    (["--control", "fixd"], "Did you mean 'fixed'"),
    (["--set", "alhpa=1"], "Did you mean 'alpha'"),
    (["--set", "alpha"], "key=value"),
    (["--set", "learning_rate=fast"], "learning_rate"),
    (["--set", "rank_set=0,x"], "rank_set"),
    (["--rank-set", "0,500"], "500"),
    (["--horizon", "0"], "horizon must be an integer of at least 1"),
    (["--seed", "-1"], "seed must be"),
    (["--target-modules", "qeury"], "qeury"),
    (["--agent-set", "learning_rte=1"], "Did you mean 'learning_rate'"),
    (["--agent-set", "learning_rate=abc"], "learning_rate of agent 'reinforce' must be a number (got 'abc')"),
    (["--agent-set", "hidden=64,x"], "hidden of agent 'reinforce' must be a list, each an integer (got [64, 'x'])"),
    (["--agent-set", "hidden=0"], "hidden must be a list of integers of at least 1 (got [0])"),
    (["--agent-set", "device=gpu9"], "device must be a torch device"),
    (["--agent-set", "preset=[1]"], "preset of agent 'reinforce' must be text (got [1])"),
    (["--agent-set", "seed=1"], "use --seed"),
    (["--agent", "fixed", "--agent-set", "location=[1]"], "location of agent 'fixed' must be"),
    (["--agent", "fixed", "--agent-set", "allocation=5"], "allocation of agent 'fixed' must be a list"),
    (["--agent", "ppo", "--agent-set", "learning_rate=abc"], "learning_rate of agent 'ppo' must be a number"),
    (["--agent", "ppo", "--agent-set", "policy=None"], "ppo cannot be made"),
    (["--task-set", "eval_rws=3"], "option of task 'planted'"),
    (["--task-set", "name=sst2"], "use --task"),
    (["--task", "reviws.csv", "--model", "minilm"], "no file or folder 'reviws.csv'"),
    (["--set", "learning_rate=abc"], "learning_rate must be a positive number (got 'abc')"),
])
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, arguments: list[str], message: str) -> None:
    task = [] if "--task" in arguments else ["--task", "planted"]
    result = lelora("train", "--out", tmp_path / "run", *task, *arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("lelora: error: ")
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_unknown_options_get_the_closest_name() -> None:
    result = lelora("train", "--hroizon", 3)
    assert result.exit_code == 2
    assert "--horizon" in result.stderr


@pytest.mark.parametrize("out", ["/proc/lelora", "used"])
def test_an_unusable_folder_is_refused_before_any_work(tmp_path: Path, out: str) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").write_text("x")
    start = time.monotonic()
    result = lelora("train", "--model", "no/such-model", "--out", tmp_path / out)
    assert result.exit_code == 2
    assert "--out" in result.stderr
    assert "no/such-model" not in result.stderr
    assert time.monotonic() - start < 5


def test_a_diverging_run_says_so(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = lelora("train", "--task", "planted", "--out", out, "--steps", 30, "--learning-rate", "1e30",
                    "--set", "max_grad_norm=1")
    assert result.exit_code == 2, result.output
    assert "diverged at env step" in result.stderr
    assert "Lower --learning-rate, or max_grad_norm, which is 1.\n" in result.stderr
    assert RunRecord(out).status == "failed"
    assert "diverged" in RunRecord(out).info["error"]
    result = lelora("train", "--task", "planted", "--out", tmp_path / "free", "--steps", 30, "--learning-rate", "1e30",
                    "--set", "max_grad_norm=none")
    assert "or set max_grad_norm.\n" in result.stderr


def test_an_interruption_while_the_folder_is_made_is_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json = RunFolder.write_json

    def interrupted(self: RunFolder, name: str, value: object) -> None:
        if name == "config.json":
            raise KeyboardInterrupt
        write_json(self, name, value)

    monkeypatch.setattr(RunFolder, "write_json", interrupted)
    result = lelora("train", "--task", "planted", "--steps", 2, "--out", tmp_path / "run")
    assert (result.exit_code, result.stderr) == (130, "lelora: interrupted\n")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (cli.Terminated(), 143)])
def test_an_interruption_outside_of_a_run_is_one_line(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int) -> None:
    def interrupted() -> None:
        raise error

    monkeypatch.setattr(cli, "app", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == code
    assert capsys.readouterr().err == "lelora: interrupted\n"


@pytest.mark.parametrize("kind", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupted_run_stays_readable(tmp_path: Path, kind: signal.Signals) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-c", "from lelora_env.cli import main; main()", "train", "--task", "planted",
               "--horizon", "100000", "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 90
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").stat().st_size < 5000:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(kind)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if kind == signal.SIGINT else 143)
    assert "interrupted" in errors
    assert "Traceback" not in errors
    record = RunRecord(out)
    assert record.status == "interrupted"
    assert len(record.lanes[0].ranks) >= 2
    assert (out / "allocation.png").stat().st_size > 10_000
    assert not (out / "result.json").exists()
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_settings_are_read_as_what_they_look_like() -> None:
    pairs = ["horizon=3", "alpha=1e-3", "common-random-numbers=True", "max_grad_norm=none", "spectrum=full",
             "rank_set=0,2", "locations=primary,0.25", "betas=[0.9, 0.95]", "target_modules=query,value"]
    assert parse_settings(pairs) == {
        "horizon": 3, "alpha": 1e-3, "common_random_numbers": True, "max_grad_norm": None, "spectrum": "full",
        "rank_set": [0, 2], "locations": ["primary", 0.25], "betas": [0.9, 0.95], "target_modules": "query,value"}
    assert parse_settings(["columns=none", "hidden=64"]) == {"columns": None, "hidden": [64]}


def test_options_of_their_own_win_over_settings() -> None:
    assert config_options(["horizon=3", "alpha=0"], {"horizon": 7, "device": None}) == {"horizon": 7, "alpha": 0}
    with pytest.raises(UnknownNameError, match="Did you mean 'horizon'"):
        config_options(["horizn=3"], {})
    with pytest.raises(LeLoRAError, match="alpha must be a number"):
        config_options(["alpha=[1"], {"horizon": 7})


def test_progress_is_plain_lines_when_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(50)
    for step in range(1, 51):
        progress(step, {"a": 1 / step})
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == [f"{step}/50" for step in range(5, 51, 5)]
    assert "a 0.020" in lines[-1]


class Recorder:
    """An agent that notes what it is given and always answers with one number."""

    def __init__(self, answer: int) -> None:
        self.answer = answer
        self.seen: list[Any] = []
        self.learnt: list[Any] = []

    def act(self, observation: Any) -> Any:
        self.seen.append(observation)
        return np.full((len(observation), 4), self.answer)

    def update(self, transition: Any) -> dict[str, float]:
        self.learnt.append(transition)
        return {"answer": float(self.answer)}

    def state_dict(self) -> dict[str, Any]:
        return {"answer": self.answer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.answer = state["answer"]


def test_agents_side_by_side_see_their_own_lane_only() -> None:
    from agents import Transition
    from lelora_env.training import SideBySide

    agents = [Recorder(i) for i in range(3)]
    both = SideBySide(agents)
    observation = np.arange(3 * 2 * 5).reshape(3, 2, 5)
    action = both.act(observation)
    np.testing.assert_array_equal(action, [[0] * 4, [1] * 4, [2] * 4])
    three = np.arange(3)
    scalars = both.update(Transition(observation, action, three * 1.0, three == 1, three == 2, {"L1": three * 10.0},
                                     observation + 100))
    assert scalars == {"0/answer": 0, "1/answer": 1, "2/answer": 2}
    for i, agent in enumerate(agents):
        np.testing.assert_array_equal(agent.seen[0], observation[[i]])
        own = agent.learnt[0]
        np.testing.assert_array_equal(own.next_observation, observation[[i]] + 100)
        assert (own.reward, own.info["L1"], own.terminated, own.truncated) == (i, 10 * i, i == 1, i == 2)
        np.testing.assert_array_equal(own.action, [[i] * 4])
    both.load_state_dict({"0": {"answer": 7}, "1": {"answer": 8}, "2": {"answer": 9}})
    assert both.state_dict()["1"] == {"answer": 8}


def test_cache_shows_prunes_and_empties(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lelora_env import cache

    monkeypatch.setenv("LELORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SMALLEST_WORK", 0.0)
    for seed in range(2):
        weights = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(seed))
        cache.decompose_once(weights, [0, 1], names=["layer.0.query", "layer.1.query"])
    shown = lelora("cache")
    assert shown.exit_code == 0
    assert "2 entries" in shown.output
    assert shown.output.count("2 x 8x12  layer.0.query, ...") == 2
    assert "removed 0 entries" in lelora("cache", "--keep-gb", "1").output
    for wrong in (("--keep-gb", "inf"), ("--keep-gb", "-1"), ("--clear", "--keep-gb", "1")):
        assert lelora("cache", *wrong).exit_code == 2
    assert "removed 2 entries" in lelora("cache", "--clear").output
    assert "0 entries" in lelora("cache").output
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setenv("LELORA_CACHE", "off")
    assert "the cache is off" in lelora("cache").output
    monkeypatch.setenv("LELORA_CACHE_GB", "many")
    refused = lelora("cache")
    assert refused.exit_code == 2
    assert "LELORA_CACHE_GB must be a number" in refused.output
