"""Policy and allocation files: what goes in comes out, and what does not fit is refused before it does harm."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from agents import AgentSpec, FixedAllocation, PerMatrixPolicy, make_agent
from agents.files import final_allocation, load_allocation, load_policy, save_allocation, save_policy
from lelora_env.errors import LeLoRAError
from tests.toy_env import Array, ToyEnv, ToyVectorEnv

NETWORK: dict[str, Any] = {"hidden": (8,), "embedding": 3}


def _spec(**options: Any) -> AgentSpec:
    return AgentSpec.from_env(ToyEnv(**options))


def _changed(**options: Any) -> AgentSpec:
    """A toy whose spec differs in some fields."""
    from dataclasses import replace

    return replace(_spec(), **options)


def _saved(path: Path, spec: AgentSpec | None = None, **options: Any) -> PerMatrixPolicy:
    policy = PerMatrixPolicy(spec or _spec(), seed=4, **{**NETWORK, **options})
    save_policy(policy, spec or _spec(), path, {"agent": "test"})
    return policy


# --- policies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_as", ["embedding", "depth"])
def test_a_policy_comes_back_bit_for_bit(tmp_path: Path, layer_as: Any) -> None:
    path = tmp_path / "policy.safetensors"
    policy = _saved(path, layer_as=layer_as, columns=("sv_1", "progress"), head_scale=0.5)
    loaded = load_policy(path, _spec())
    assert loaded.settings == policy.settings
    observation = torch.as_tensor(ToyVectorEnv(3).reset()[0])
    for one, two in zip(policy(observation), loaded(observation), strict=True):
        assert torch.equal(one, two)
    assert [p.name for p in tmp_path.iterdir()] == ["policy.safetensors"]


def test_a_policy_by_depth_goes_to_a_deeper_model_and_one_by_number_does_not(tmp_path: Path) -> None:
    path, deep = tmp_path / "policy.safetensors", _spec(num_matrices=20)
    policy = _saved(path, layer_as="depth")
    loaded = load_policy(path, deep)
    short, long = ToyVectorEnv(1).reset()[0], ToyVectorEnv(1, num_matrices=20).reset()[0]
    last, same = torch.as_tensor(long[:, -1:]), torch.as_tensor(long[:, -1:].copy())
    same[..., 0] = float(short[0, -1, 0])  # the last layer of one is the last layer of the other
    assert torch.equal(loaded(last)[0], policy(same)[0])
    _saved(path, layer_as="embedding")
    with pytest.raises(LeLoRAError, match=r"knows layers by number, 3 of them; the model has 10.*layer_as='depth'"):
        load_policy(path, deep)
    _saved(path, layer_as="embedding", embedding=0)
    load_policy(path, deep)  # it knows nothing of layers


@pytest.mark.parametrize(("options", "message"), [
    ({"rank_set": (0, 1, 2, 4)}, r"rank_set = \[0, 2, 4, 8\], the environment has \[0, 1, 2, 4\]"),
    ({"locations": ("primary", "minor", "medium")}, "locations ="),
    ({"feature_names": ("layer", "type", "norm", "sv_0", "sv_1", "progress")}, "spectrum_points = 4"),
])
def test_other_choices_and_features_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    _saved(tmp_path / "p")
    with pytest.raises(LeLoRAError, match=message):
        load_policy(tmp_path / "p", _changed(**options))


def test_raw_and_scaled_observations_are_not_the_same(tmp_path: Path) -> None:
    from gymnasium import spaces

    _saved(tmp_path / "p")
    raw = spaces.Box(0, 1e6, (6, 8), dtype=np.float32)
    with pytest.raises(LeLoRAError, match="scaled = True, the environment has False"):
        load_policy(tmp_path / "p", _changed(observation_space=raw))


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    names = (*_spec().feature_names, "grad_norm")
    _saved(tmp_path / "p", _changed(feature_names=names), columns=("norm", "grad_norm"))
    with pytest.raises(LeLoRAError, match="unknown feature 'grad_norm'"):
        load_policy(tmp_path / "p", _spec())


def _rewrite(path: Path, change: Any) -> None:
    """The same file with another header."""
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["lelora_policy"])
        weights = {name: file.get_tensor(name) for name in file.keys()}
    change(header, weights)
    save_file(weights, path, {"lelora_policy": json.dumps(header)})


@pytest.mark.parametrize(("change", "message"), [
    (lambda h, w: h.update(format=2), "has policy format 2; this version reads 1"),
    (lambda h, w: h.pop("format"), "has policy format None"),
    (lambda h, w: h.pop("network"), "not whole: its header lacks network, embedding, .* in 'network'"),
    (lambda h, w: h["made_for"].pop("layers"), "not whole: its header lacks layers in 'made_for'"),
    (lambda h, w: w.pop("rank_head.weight"), "not whole: .*rank_head.weight"),
    (lambda h, w: w.update({"rank_head.bias": torch.zeros(9)}), "not whole: .*rank_head.bias"),
    (lambda h, w: w.update(more=torch.zeros(9)), "not whole: .*more"),
])
def test_newer_and_incomplete_files_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    _saved(tmp_path / "p")
    _rewrite(tmp_path / "p", change)
    with pytest.raises(LeLoRAError, match=message):
        load_policy(tmp_path / "p", _spec())


def test_foreign_truncated_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p"
    _saved(path)
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(LeLoRAError, match=re.escape(f"{path} is not a policy file, or damaged")):
            load_policy(path, _spec())
    path.write_text("rank_set = 4\n" * 20)
    with pytest.raises(LeLoRAError, match="not a policy file, or damaged"):
        load_policy(path, _spec())
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(LeLoRAError, match="a safetensors file, but not of a policy"):
        load_policy(path, _spec())
    with pytest.raises(LeLoRAError, match="there is no policy file"):
        load_policy(tmp_path / "none", _spec())
    with pytest.raises(LeLoRAError, match="not a policy file, or damaged"):
        load_policy(tmp_path, _spec())


def test_an_agent_starts_from_a_file_and_takes_its_network_from_it(tmp_path: Path) -> None:
    path, env = tmp_path / "p", ToyVectorEnv(2)
    policy = _saved(path)
    agent: Any = make_agent("reinforce", env, policy_file=str(path), learning_rate=0.1)
    assert agent.config.hidden == (8,)
    assert agent.config.learning_rate == 0.1
    assert agent.network is agent.policy
    for name, value in policy.state_dict().items():
        assert torch.equal(agent.policy.state_dict()[name], value)
    with pytest.raises(LeLoRAError, match="brings its own hidden: leave hidden out"):
        make_agent("reinforce", env, policy_file=str(path), hidden=(9,))
    other: Any = make_agent("reinforce", env, policy_file=path)
    other.load_state_dict(make_agent("reinforce", env, policy_file=path, seed=5).state_dict())


# --- allocations ----------------------------------------------------------------------------------------------------

ACTION = np.array([0, 0, 1, 2, 3, 1, 2, 0, 3, 2, 1, 1])


def _allocation(path: Path, **changes: Any) -> dict[str, Any]:
    save_allocation(_spec(), ACTION, path, {"found_by": "test"})
    held: dict[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps({**held, **changes}))
    return held


def test_an_allocation_comes_back_by_name_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    held = _allocation(path)
    assert held["trained_parameters"] == (0 + 2 + 8 + 4 + 8 + 2) * 65  # out + in + σ
    assert held["found_by"] == "test"
    assert held["matrices"][2] == {"name": "layers.1.query", "type": "query", "layer": 1, "rank": 8,
                                   "location": "medium"}
    expected = [(0, "primary"), (2, "minor"), (8, "medium"), (4, "primary"), (8, "minor"), (2, "medium")]
    assert load_allocation(path, _spec()) == expected
    _allocation(path, matrices=held["matrices"][::-1])
    assert load_allocation(path, _spec()) == expected
    for agent in (FixedAllocation(_spec(), allocation=path), make_agent("fixed", ToyEnv(), allocation=str(path))):
        np.testing.assert_array_equal(agent.act(np.zeros((2, 6, 8))), [ACTION, ACTION])


@pytest.mark.parametrize(("changes", "message"), [
    ({"format": 2, "matrices": "laid out otherwise"}, "has allocation format 2; this version reads 1"),
    ({"format": None}, "has allocation format None"),
    ({"matrices": None}, "not an allocation file, or damaged"),
    ({"matrices": [{"name": "layers.0.query"}]}, "not an allocation file, or damaged .KeyError: 'rank'"),
    ({"matrices": []}, "allots to 0 matrices, the environment has 6, among them 'layers.0.query'"),
])
def test_allocations_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    _allocation(tmp_path / "a", **changes)
    with pytest.raises(LeLoRAError, match=message):
        make_agent("fixed", ToyEnv(), allocation=str(tmp_path / "a"))


@pytest.mark.parametrize(("row", "message"), [
    ({"rank": 3}, "rank must be one of"), ({"rank": "8"}, "rank must be one of"), ({"rank": [8]}, "rank must be one"),
    ({"location": "major"}, "unknown location"), ({"location": None}, "location must be a name"),
    ({"name": "layers.9.query"}, "among them 'layers.0.query', which is not in the file"),
])
def test_rows_that_cannot_be_chosen_are_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    held = _allocation(tmp_path / "a")
    _allocation(tmp_path / "a", matrices=[{**held["matrices"][0], **row}, *held["matrices"][1:]])
    with pytest.raises(LeLoRAError, match=message):
        make_agent("fixed", ToyEnv(), allocation=str(tmp_path / "a"))


def test_allocations_for_other_models_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    _allocation(path)
    for count in (5, 7):
        with pytest.raises(LeLoRAError, match=f"allots to 6 matrices, the environment has {count}"):
            make_agent("fixed", ToyEnv(num_matrices=count), allocation=str(path))
    with pytest.raises(LeLoRAError, match="not legal for matrix 2"):
        make_agent("fixed", ToyEnv(small_matrices=3), allocation=str(path))
    whole = path.read_text()
    for text in (whole[: len(whole) // 2], "", "[1, 2]", "8", '"text"', "\x00\xff"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(LeLoRAError, match="not an allocation file, or damaged"):
            load_allocation(path, _spec())
    with pytest.raises(LeLoRAError, match="there is no allocation file"):
        load_allocation(tmp_path / "none", _spec())
    with pytest.raises(LeLoRAError, match="not an allocation file, or damaged"):
        load_allocation(tmp_path, _spec())
    with pytest.raises(LeLoRAError, match="not both"):
        make_agent("fixed", ToyEnv(), allocation=str(path), rank=2)


# --- writing --------------------------------------------------------------------------------------------------------


def _write(kind: str, path: Path) -> None:
    if kind == "policy":
        _saved(path)
    else:
        save_allocation(_spec(), ACTION, path)


@pytest.mark.parametrize("kind", ["policy", "allocation"])
def test_nothing_is_half_written(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LeLoRAError, match=r"cannot write .*Choose a folder that exists"):
        _write(kind, tmp_path / "missing" / "file")
    path = tmp_path / "file"
    path.write_text("as it was")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(LeLoRAError, match=r"cannot write .*: No space left on device"):
        _write(kind, path)
    assert path.read_text() == "as it was"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("kind", ["policy", "allocation"])
def test_a_limit_on_file_size_leaves_the_old_file(tmp_path: Path, kind: str) -> None:
    """A real short write, in a process of its own."""
    import subprocess
    import sys

    path = tmp_path / "file"
    path.write_text("as it was")
    program = f"""
import resource, signal
from pathlib import Path
from tests.test_agent_files import _write
from lelora_env.errors import LeLoRAError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
try:
    _write({kind!r}, Path({str(path)!r}))
except LeLoRAError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False,
                          cwd=Path(__file__).resolve().parent.parent)
    assert "refused: cannot write" in done.stdout, done.stderr
    assert path.read_text() == "as it was"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# --- one allocation out of an agent ---------------------------------------------------------------------------------


class Likely:
    """An agent with fixed probabilities."""

    def __init__(self, likely: Array) -> None:
        self.likely = likely

    def probabilities(self, observation: Array) -> Array:
        return np.repeat(self.likely[None], len(observation), axis=0)


def test_the_likeliest_allocation_and_the_likeliest_that_the_budget_allows() -> None:
    likely = np.full((2, 4, 3), 0.01)
    likely[0, 3, 1], likely[0, 2, 1] = 0.6, 0.3
    likely[1, 3, 2], likely[1, 0, 0] = 0.5, 0.4
    agent: Any = Likely(likely)
    spec, seen = _spec(num_matrices=2), np.zeros((3, 2, 8))
    assert final_allocation(agent, seen, spec).tolist() == [3, 1, 3, 2]
    assert final_allocation(agent, seen, spec, 1.0).tolist() == [3, 1, 3, 2]
    assert final_allocation(agent, seen, spec, 0.5).tolist() == [3, 1, 0, 0]  # 0.6·0.4 is above 0.3·0.01
    assert final_allocation(agent, seen, spec, 0.25).tolist() == [2, 1, 0, 0]


def test_an_agents_own_allocation_goes_first_and_one_without_either_is_refused() -> None:
    env: Any = ToyEnv()
    agent: Any = make_agent("additive", env)
    seen = np.zeros((1, 6, 8))
    np.testing.assert_array_equal(final_allocation(agent, seen, _spec()), agent.allocation())
    with pytest.raises(LeLoRAError, match="object has neither allocation"):
        final_allocation(object(), seen, _spec())  # type: ignore[arg-type]
