"""Decompositions on disk: the same bits, whole entries, and a run that goes on whatever the disk does."""

import json
import logging
import multiprocessing
import os
import shutil
import stat
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lelora_env import cache
from lelora_env.cache import decompose_once, entries, entry_key, prune
from lelora_env.errors import LeLoRAError
from lelora_env.spectra import Decomposition
from tests.helpers import make_lanes

COMPONENTS = [0, 1, 10, 11, 22, 23]
NAMES = ["a", "b", "c"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LELORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SMALLEST_WORK", 0.0)
    return tmp_path / "cache"


def weights(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 24, 32, generator=torch.Generator().manual_seed(seed))


def made(seed: int = 0) -> Decomposition:
    return decompose_once(weights(seed), COMPONENTS, names=NAMES)


def same(one: Decomposition, two: Decomposition) -> bool:
    pairs = [(getattr(one, name), getattr(two, name)) for name in ("singular_values", "U", "V", "components")]
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def refuse(*args: object, **options: object) -> None:
    raise AssertionError("decomposed although it was cached")


def test_the_second_time_it_is_read_and_has_the_same_bits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = made()
    monkeypatch.setattr(cache, "decompose", refuse)
    done: list[int] = []
    assert same(decompose_once(weights(), COMPONENTS, names=NAMES, on_done=done.append), fresh)
    assert done == [3]
    assert [(e.matrices, e.shape) for e in entries(folder)] == [(("a", "b", "c"), (24, 32))]
    left, right, sigma = fresh.U.double(), fresh.V.double(), fresh.singular_values
    exact = np.linalg.svd(weights().double().numpy(), compute_uv=False)
    np.testing.assert_allclose(sigma.numpy(), exact, rtol=1e-12)
    np.testing.assert_allclose((left @ weights().double() @ right.mT).numpy(),
                               np.stack([np.diag(row[COMPONENTS]) for row in exact]), atol=1e-5)


def test_the_key_holds_all_that_decides_the_result() -> None:
    base = weights()
    nudged = base.clone()
    nudged[2, 23, 31] += 1e-6
    others = [entry_key(nudged, COMPONENTS), entry_key(base.double(), COMPONENTS), entry_key(base, COMPONENTS[:-1]),
              entry_key(base[:2], COMPONENTS), entry_key(base.reshape(3, 32, 24), COMPONENTS),
              entry_key(base.bfloat16(), COMPONENTS)]
    assert len({entry_key(base, COMPONENTS), *others}) == 7
    assert entry_key(base.clone(), tuple(COMPONENTS)) == entry_key(base, COMPONENTS)


def test_environments_with_and_without_cache_agree_bitwise(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for _ in range(2):
        env = make_lanes(1)
        env.reset(seed=0)
        states.append(env.get_state())
        assert len(entries(folder)) == 3  # one for each shape of matrix
    monkeypatch.setenv("LELORA_CACHE", "off")
    env = make_lanes(1)
    env.reset(seed=0)
    for other in states:
        assert all(torch.equal(value, other[key]) for key, value in env.get_state().items())


@pytest.mark.parametrize("harm", ["cut", "flip", "no about", "not json", "other form", "no data"])
def test_a_damaged_entry_is_made_anew(folder: Path, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    fresh = made()
    [entry] = entries(folder)
    data, about = entry.path / "spectrum.safetensors", entry.path / "entry.json"
    raw = bytearray(data.read_bytes())
    if harm == "cut":
        data.write_bytes(raw[: len(raw) // 2])
    elif harm == "flip":
        raw[-3] ^= 1
        data.write_bytes(raw)
    elif harm == "no about":
        about.unlink()
    elif harm == "not json":
        about.write_text("{")
    elif harm == "other form":
        about.write_text(json.dumps([1, 2]))
    else:
        data.unlink()
    with caplog.at_level(logging.WARNING):
        assert same(made(), fresh)
    assert "made anew" in caplog.text
    caplog.clear()
    assert same(made(), fresh)
    assert caplog.text == ""


def test_an_entry_of_another_version_is_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = made()
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    assert same(made(), fresh)
    assert len(entries(folder)) == 2


def test_a_disk_that_is_full_costs_the_entry_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with caplog.at_level(logging.WARNING):
        found = made()
    assert "No space left on device" in caplog.text
    assert list(folder.iterdir()) == []
    monkeypatch.setenv("LELORA_CACHE", "off")
    assert same(found, made())


def test_a_folder_that_cannot_be_made_costs_the_entry_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LELORA_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING):
        made()
    assert "is not kept in" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_costs_the_entry_only(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with caplog.at_level(logging.WARNING):
            made()
        assert "is not kept in" in caplog.text
    finally:
        folder.chmod(stat.S_IRWXU)


def _make(folder: str, start: float) -> list[float]:
    os.environ["LELORA_CACHE"] = folder
    cache.SMALLEST_WORK = 0.0
    time.sleep(max(0.0, start - time.time()))
    sums: list[float] = made().U.double().sum((1, 2)).tolist()
    return sums


def test_processes_that_build_the_same_entry_at_once_agree(folder: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = pool.starmap(_make, [(str(folder), time.time() + 6)] * 3)
    assert found[0] == found[1] == found[2]
    assert len(entries(folder)) == 1
    assert [path.name for path in folder.iterdir()] == [entries(folder)[0].path.name]


def test_an_entry_that_vanishes_while_it_is_read_is_made_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = made()
    read = Path.read_bytes

    def late(path: Path) -> bytes:
        prune(folder, 0)
        return read(path)

    monkeypatch.setattr("pathlib.Path.read_bytes", late)
    with caplog.at_level(logging.WARNING):
        assert same(made(), fresh)
    assert caplog.text == ""  # it is nobody's fault


def test_an_entry_under_another_ones_name_is_refused(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    fresh = made(0)
    made(1)
    one, other = (folder / entry_key(weights(seed), COMPONENTS) for seed in (0, 1))
    shutil.rmtree(one)
    shutil.copytree(other, one)
    with caplog.at_level(logging.WARNING):
        assert same(made(0), fresh)
    assert "made anew" in caplog.text


def test_the_groups_of_one_model_stay_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the limit: otherwise each would push out the one before, and nothing would ever be found."""
    monkeypatch.setenv("LELORA_CACHE_GB", "1e-7")
    for _ in range(2):
        env = make_lanes(1)
        env.reset(seed=0)
        assert len(entries(folder)) == 3
        monkeypatch.setattr(cache, "decompose", refuse)


@pytest.mark.parametrize("named", ["off", "OFF", "0", "none", "False", "~nobody-of-that-name/x"])
def test_off_and_folders_that_cannot_be(named: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LELORA_CACHE", named)
    monkeypatch.setenv("LELORA_CACHE_GB", "not read then")
    made()
    assert list(tmp_path.iterdir()) == []


def test_what_was_not_used_for_longest_goes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        made(seed)
    paths = [folder / entry_key(weights(seed), COMPONENTS) for seed in range(3)]
    for age, path in zip((30, 20, 10), paths, strict=True):
        os.utime(path / "entry.json", (time.time() - age,) * 2)
    made(0)  # read again: now the youngest
    size = entries(folder)[0].size
    monkeypatch.setenv("LELORA_CACHE_GB", str(2.5 * size / 1e9))
    made(3)
    left = {entry.path for entry in entries(folder)}
    assert left == {paths[0], folder / entry_key(weights(3), COMPONENTS)}


def test_leftovers_of_killed_processes_are_removed(folder: Path) -> None:
    made()
    [entry] = entries(folder)
    (entry.path / "entry.json").write_text("{")
    assert entries(folder)[0].matrices == ()  # listed, and pruned, all the same
    old, new = folder / ".unfinished-old", folder / ".unfinished-new"
    for path in (old, new):
        path.mkdir()
    os.utime(old, (time.time() - 2 * cache.ABANDONED_AFTER,) * 2)
    assert prune(folder, 10**9) == []
    assert not old.exists()
    assert new.exists()
    assert len(prune(folder, 0, everything=True)) == 1
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("limit", ["much", "-1", "nan", "inf"])
def test_a_limit_that_is_no_number_is_refused(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LELORA_CACHE_GB", limit)
    with pytest.raises(LeLoRAError, match="LELORA_CACHE_GB must be a number of gigabytes"):
        made()


def test_small_matrices_are_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("LELORA_CACHE", str(folder))
    env = make_lanes(1)
    env.reset(seed=0)
    assert not folder.exists()
