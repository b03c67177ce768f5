"""The run folder: readable at every moment, honest about how the run ended."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from lelora_env.errors import LeLoRAError
from lelora_env.matrices import MatrixInfo
from lelora_env.records import RunRecord
from lelora_env.runs import RunFolder, check_writable, default_folder, environment_facts, to_json

MATRICES = [
    MatrixInfo("layer.0.query", 0, "query", 16, 16, False, True),
    MatrixInfo("layer.0.value", 0, "value", 3, 16, False, True),
]
CONFIG = {"rank_set": (0, 2, 8), "locations": ("primary", 0.25), "model": "m", "task": "t"}


def folder_at(path: Path) -> RunFolder:
    return RunFolder(path, config=CONFIG, matrices=MATRICES, lanes=["agent", "fixed"], seed=3)


def write(folder: RunFolder, steps: int) -> None:
    for step in range(1, steps + 1):
        for lane in ("agent", "fixed"):
            folder.log_action(lane, step, np.array([2, 1, 2, 0]))
            folder.log_policy(lane, step, np.full((2, 3, 2), 1 / 6))
            folder.log(lane, step, {"L1": 1.0 / step, "reward": -1.0})


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    with folder_at(tmp_path / "run") as folder:
        folder.log("agent", 0, {"L1": 2.0})
        write(folder, 3)
    record = RunRecord(tmp_path / "run")
    assert record.status == "finished"
    assert record.info["seed"] == 3
    assert record.matrices == MATRICES
    assert record.config["locations"] == ["primary", 0.25]
    agent, fixed = record.lanes
    assert (agent.name, fixed.name) == ("agent", "fixed")
    # Rank index 2 means 8, which the 3 x 16 matrix cuts to 3.
    np.testing.assert_array_equal(agent.ranks, [[8, 3]] * 3)
    np.testing.assert_array_equal(agent.locations, [[1, 0]] * 3)
    steps, losses = agent.series("L1")
    np.testing.assert_array_equal(steps, [0, 1, 2, 3])
    np.testing.assert_allclose(losses, [2.0, 1.0, 0.5, 1 / 3])
    np.testing.assert_array_equal(agent.series("reward")[0], [1, 2, 3])
    np.testing.assert_array_equal(fixed.series("L1")[0], [1, 2, 3])


def test_probabilities_are_read_back_to_five_digits(tmp_path: Path) -> None:
    """Two matrices, three ranks, two locations: a line holds the locations of each rank side by side."""
    sure = np.zeros((2, 3, 2), dtype=np.float32)
    sure[0, 1, 0], sure[1, 2, 1] = 1, 1
    unsure = np.array([[[1 / 3, 0], [1 / 3, 0], [0, 1 / 3]], [[0.123456, 0.876544], [0, 0], [0, 0]]])
    with folder_at(tmp_path / "run") as folder:
        folder.log_policy("agent", 1, sure)
        folder.log_policy("agent", 5, unsure)
    lines = [json.loads(line) for line in (tmp_path / "run" / "policy.jsonl").read_text().splitlines()]
    assert lines == [
        {"lane": "agent", "env_step": 1, "probabilities": [[0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]]},
        {"lane": "agent", "env_step": 5, "probabilities": [[0.33333, 0, 0.33333, 0, 0, 0.33333],
                                                           [0.12346, 0.87654, 0, 0, 0, 0]]}]
    agent, fixed = RunRecord(tmp_path / "run").lanes
    steps, noted = agent.probabilities
    assert steps.tolist() == [1, 5]
    np.testing.assert_array_equal(noted[0], sure)
    np.testing.assert_allclose(noted[1], unsure, atol=5e-6)
    assert [part.shape for part in fixed.probabilities] == [(0,), (0, 2, 3, 2)]
    (tmp_path / "run" / "policy.jsonl").unlink()  # as older versions left it
    assert [part.shape for part in RunRecord(tmp_path / "run").lanes[0].probabilities] == [(0,), (0, 2, 3, 2)]


def test_ranks_are_those_that_were_trained(tmp_path: Path) -> None:
    with folder_at(tmp_path / "run") as folder:
        folder.log_action("agent", 1, np.array([2, 1, 2, 0]))
        folder.log_action("agent", 2, np.array([2, 1, 2, 0]), np.array([2, 0]))
    np.testing.assert_array_equal(RunRecord(tmp_path / "run").lanes[0].ranks, [[8, 3], [2, 0]])


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with folder_at(tmp_path / "run") as folder:
        write(folder, 4)
        folder.log("agent", 5, {"L1": float("nan")})
    events = EventAccumulator(str(tmp_path / "run" / "events" / "agent")).Reload()
    assert [(e.step, round(e.value, 5)) for e in events.Scalars("L1")] == [(1, 1.0), (2, 0.5), (3, 0.33333), (4, 0.25)]


def test_every_step_is_on_disk_at_once(tmp_path: Path) -> None:
    with folder_at(tmp_path / "run") as folder:
        write(folder, 2)
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["env_step"] for line in lines] == [1, 1, 2, 2]
        assert RunRecord(tmp_path / "run").status == "running"


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), "interrupted"), (OSError("disk full"), "failed")])
def test_the_folder_says_how_the_run_ended(tmp_path: Path, error: BaseException, status: str) -> None:
    def interrupted_run() -> None:
        with folder_at(tmp_path / "run") as folder:
            write(folder, 2)
            raise error

    with pytest.raises(type(error)):
        interrupted_run()
    record = RunRecord(tmp_path / "run")
    assert record.status == status
    assert len(record.lanes[0].ranks) == 2
    assert (record.info["error"] == "OSError: disk full") == (status == "failed")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_keeps_the_error_and_the_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What grows fails, whether it was open before or not; what is there can be written over."""
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def run_on_a_full_disk() -> None:
        with folder_at(tmp_path / "run") as folder:
            write(folder, 2)
            monkeypatch.setattr(Path, "write_bytes", no_space)
            monkeypatch.setattr(Path, "write_text", no_space)
            full = Path("/dev/full").open("w", encoding="utf-8")
            folder._streams["metrics.jsonl"].close()
            folder._streams["metrics.jsonl"] = full
            folder.log("agent", 3, {"L1": 1.0})

    with pytest.raises(LeLoRAError, match=r"cannot write .*metrics\.jsonl: No space left on device.*--out"):
        run_on_a_full_disk()
    monkeypatch.undo()
    record = RunRecord(tmp_path / "run")
    assert record.status == "failed"
    assert "metrics.jsonl: No space left" in record.info["error"]
    assert len(record.lanes[0].ranks) == 2


def test_a_long_error_fits_into_the_room_kept_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def run_on_a_full_disk() -> None:
        with folder_at(tmp_path / "run"):
            monkeypatch.setattr(Path, "write_bytes", no_space)
            raise ValueError("\x01" * 9000)

    with pytest.raises(ValueError, match="\x01"):
        run_on_a_full_disk()
    monkeypatch.undo()
    assert RunRecord(tmp_path / "run").info["error"] == "ValueError: " + "\x01" * 488


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_tensorboard_on_a_full_disk_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    monkeypatch.setattr(RecordWriter, "flush", lambda self: Path("/dev/full").write_text("x"))
    with folder_at(tmp_path / "run") as folder:
        write(folder, 2)
    assert RunRecord(tmp_path / "run").status == "finished"
    assert capsys.readouterr().err == ""


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    with folder_at(tmp_path / "run") as folder:
        write(folder, 2)
    for name in ("metrics.jsonl", "allocation.jsonl", "policy.jsonl"):
        path = tmp_path / "run" / name
        path.write_bytes(path.read_bytes()[:-7])
    fixed = RunRecord(tmp_path / "run").lanes[1]
    assert len(fixed.ranks) == 1
    assert len(fixed.metrics) == 1
    assert fixed.probabilities[0].tolist() == [1]


def test_sigkill_leaves_a_readable_folder(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from test_runs import folder_at, write
        with folder_at(Path(sys.argv[1])) as folder:
            write(folder, 5)
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "run"), here], cwd=Path(here).parent,
                          check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    record = RunRecord(tmp_path / "run")
    assert record.info["status"] == "running"
    assert record.status == "interrupted"  # its process is gone
    assert len(record.lanes[0].ranks) == 5
    path = tmp_path / "run" / "run.json"
    for change in ({"host": "elsewhere"}, {"pid": os.getpid()}):
        path.write_text(json.dumps({**record.info, **change}))
        assert RunRecord(tmp_path / "run").status == "running"
    assert not [p for p in (tmp_path / "run").iterdir() if p.suffix == ".tmp"]


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(LeLoRAError, match=r"is not empty, and a run never overwrites another.*--out"):
        check_writable(tmp_path)
    with pytest.raises(LeLoRAError, match="is a file"):
        check_writable(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LeLoRAError, match="cannot be written to"):
        check_writable(tmp_path / "file" / "run")
    with pytest.raises(LeLoRAError, match="cannot be written to"):
        check_writable(Path("/proc/lelora/run"))
    check_writable(tmp_path / "new" / "deep" / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(LeLoRAError, match="cannot be written to"):
            check_writable(tmp_path / "run")
    finally:
        tmp_path.chmod(0o755)


def test_damaged_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LeLoRAError, match=r"is not a run folder: it has no run\.json"):
        RunRecord(tmp_path)
    with folder_at(tmp_path / "run"):
        pass
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(LeLoRAError, match="damaged"):
        RunRecord(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text('{"format": 99}')
    with pytest.raises(LeLoRAError, match="format 99; this version reads 1"):
        RunRecord(tmp_path / "run")


def test_json_is_strict() -> None:
    text = to_json({"a": np.float32(0.5), "b": np.arange(2), "c": float("nan"), "d": (1, {2}), "e": Path("x")})
    assert json.loads(text) == {"a": 0.5, "b": [0, 1], "c": None, "d": [1, [2]], "e": "x"}
    assert "NaN" not in to_json([float("inf")])


def test_facts_name_what_one_needs_to_repeat_a_run() -> None:
    import torch

    facts = environment_facts()
    assert facts["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert {"gymnasium", "transformers", "python"} <= set(facts["versions"])
    assert facts["hardware"]["cpu_count"] == os.cpu_count()


def test_default_folders_are_new(tmp_path: Path) -> None:
    first = default_folder("text:a/b.csv", "ppo", tmp_path)
    assert first.parent == tmp_path
    assert first.name.endswith("_text-a-b.csv_ppo")
    first.mkdir()
    second = default_folder("text:a/b.csv", "ppo", tmp_path)
    assert not second.exists()
    assert second != first
