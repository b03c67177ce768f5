"""On a GPU: captured steps give the numbers of plain ones and of the CPU."""

import contextlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents import Transition, make_agent, run
from lelora_env import fused
from lelora_env.errors import MemoryLimitError
from lelora_env.optim import MaskedAdamW
from tests.families import FAMILIES, tiny_model
from tests.helpers import TokenTask, assert_norms_are_exact, make_lanes

pytestmark = pytest.mark.gpu

NO_SDPA = ("deberta", "deberta-v2", "mpnet")
NO_CAPTURE = ("deberta-v2", "mpnet")
"""Their position biases synchronise with the host; they run plainly and say so."""

TINY: dict[str, Any] = {
    "rank_set": (0, 1, 2), "reward_size": 8, "tune_size": 0, "batch_size": 4, "parametrisation": "unit", "horizon": 8,
    "target_modules": "all-linear", "extra_features": ("grad_norm", "update_norm"), "adam_eps": 1e-5,
}


def rollout(family: str, device: str, attention: str = "sdpa", **more: Any) -> list[Any]:
    model = tiny_model(family, num_labels=3, attention=attention).to(device)
    model.config.pad_token_id = 1
    env = make_lanes(2, model=model, task=TokenTask(), **{**TINY, **more})
    rng = np.random.default_rng(0)
    result = [env.reset(seed=0)[0]]
    for _ in range(6):
        actions = rng.integers(0, env.single_action_space.nvec, env.action_space.shape)
        observation, reward, _, _, infos = env.step(actions)
        result += [observation, reward, infos["L1"], infos["train_loss"], infos["delta_norm"]]
    return result


def worst(one: list[Any], two: list[Any]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_equals_plain(family: str, caplog: pytest.LogCaptureFixture) -> None:
    attention = "eager" if family in NO_SDPA else "sdpa"
    with caplog.at_level(logging.WARNING):
        captured = rollout(family, "cuda", attention, cuda_graphs=True)
    plain = rollout(family, "cuda", attention, cuda_graphs=False)
    assert worst(captured, plain) < 1e-5
    warnings = [record.getMessage() for record in caplog.records if "without a CUDA graph" in record.msg]
    assert len(warnings) == (family in NO_CAPTURE), warnings  # one for the whole environment


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_gpu_equals_cpu(family: str) -> None:
    assert worst(rollout(family, "cuda"), rollout(family, "cpu")) < 1e-4


def test_dropout_masks_are_the_same_on_both() -> None:
    assert worst(rollout("bert", "cuda", dropout=0.1), rollout("bert", "cpu", dropout=0.1)) < 1e-4
    assert worst(rollout("bert", "cuda", dropout=0.1), rollout("bert", "cuda", dropout=0.0)) > 1e-4


def test_the_planted_run_on_a_gpu_is_reproducible_bit_for_bit() -> None:
    def losses() -> torch.Tensor:
        env = make_lanes(3, device="cuda", horizon=10)
        env.reset(seed=1)
        return torch.from_numpy(np.array([env.step(np.full((3, 48), 2))[4]["L1"] for _ in range(10)]))

    assert torch.equal(losses(), losses())


def test_a_bf16_model_keeps_an_fp32_bank() -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("bert", num_labels=3).to("cuda", dtype)
        env = make_lanes(2, model=model, task=TokenTask(), **TINY)
        env.reset(seed=0)
        found[dtype] = [env.step(np.tile([2, 0], (2, env.num_matrices)))[4]["L1"] for _ in range(6)]
        assert env.tuner.base.spectrum.residual[0].dtype == dtype
        assert all(rows.dtype == torch.float32 for rows in env.tuner.bank.rows.values())
    assert 0 < worst(found[torch.float32], found[torch.bfloat16]) < 5e-3


@pytest.mark.parametrize(("decay", "reference"), [(0.0, None), (0.1, "shared"), (0.1, "own"), (0.1, None)])
def test_the_fused_update_is_the_plain_one(decay: float, reference: str | None) -> None:
    """Every number of every row against the same optimiser in float64 on the CPU; masked rows bit for bit."""
    shape = (3, 5, 2500)
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(shape, generator=generator) for _ in range(9))
    masks = [torch.rand(shape[:2], generator=generator) < 0.5 for _ in gradients]
    anchor = {None: None, "shared": torch.randn(shape[1:], generator=generator),
              "own": torch.randn(shape, generator=generator)}[reference]
    found = []
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64)):
        param = torch.nn.Parameter(start.to(device, dtype).clone())
        rate = torch.tensor([1e-2, 3e-3, 0.0], device=device, dtype=dtype)
        origin = None if anchor is None else anchor.to(device, dtype)
        optimiser = MaskedAdamW([{"params": [param], "lr": rate, "reference": origin}], weight_decay=decay)
        for gradient, mask in zip(gradients, masks, strict=True):
            before = {**optimiser.state[param], "value": param.detach()}
            kept = {name: value.clone() for name, value in before.items()}
            param.grad = gradient.to(device, dtype)
            optimiser.set_masks([mask.to(device)])
            optimiser.clip_lanes(10.0)
            optimiser.step()
            for name, value in before.items():
                assert torch.equal(value[~mask], kept[name][~mask]) or name == "mask", name
        assert fused.usable(param.detach()) == (device == "cuda")
        found.append({name: value.double().cpu() for name, value in before.items()})
    for name, value in found[0].items():
        np.testing.assert_allclose(value.numpy(), found[1][name].numpy(), rtol=2e-5, atol=2e-6, err_msg=name)


def test_states_move_between_lanes_on_a_gpu() -> None:
    env = make_lanes(3, device="cuda", horizon=10)
    env.reset(seed=1)
    env.step(np.full((3, 48), 2))
    env.set_state(env.get_state(0))
    states = [env.get_state(lane) for lane in range(3)]
    assert all(torch.equal(states[0][key], states[2][key]) for key in states[0])
    infos = env.step(np.full((3, 48), 2))[4]
    assert infos["L1"][0] == infos["L1"][1] == infos["L1"][2]


def test_out_of_memory_names_what_would_fit() -> None:
    model = tiny_model("bert", num_labels=3).to("cuda")
    env = make_lanes(2, model=model, task=TokenTask(), **{**TINY, "batch_size": 40, "horizon": 3, "cuda_graphs": False})
    env.reset(seed=0)
    before = env.get_state(0)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    taken: list[torch.Tensor] = []
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**20) / total)
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                taken.append(torch.empty(2**18, device="cuda"))
        with pytest.raises(MemoryLimitError, match=r"2 lanes x 40 rows x \d+ tokens does not fit"):
            env.step(np.tile([2, 0], (2, env.num_matrices)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        taken.clear()
    assert all(torch.equal(value, before[key]) for key, value in env.get_state(0).items())


def test_decompositions_from_the_cache_have_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LELORA_CACHE", str(tmp_path))
    monkeypatch.setattr("lelora_env.cache.SMALLEST_WORK", 0.0)
    states = []
    for _ in range(2):
        env = make_lanes(1, device="cuda")
        env.reset(seed=0)
        states.append(env.get_state(0))
        monkeypatch.setattr("lelora_env.cache.decompose", None)  # what is there is read
    assert len(list(tmp_path.iterdir())) == 3
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_the_agents_graphs_learn_what_the_cpu_learns() -> None:
    """The same noise and rewards: recorded acting and learning follow the CPU's for a while, then round apart."""
    curves = []
    for device in ("cuda", "cpu"):
        env = make_lanes(2, device="cpu", horizon=30)
        agent = make_agent("reinforce", env, seed=0, device=device)
        curves.append([reward.tolist() for reward in run(env, agent, env_steps=12, seed=0).rewards])
        if device == "cuda":
            assert agent._choose.graph is not None  # type: ignore[attr-defined]
            assert agent._move.graph is not None  # type: ignore[attr-defined]
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)


def test_an_agents_state_continues_on_a_gpu() -> None:
    env = make_lanes(2, device="cpu", horizon=30)
    observation = env.reset(seed=0)[0]

    def go(agent: Any, steps: int) -> list[list[int]]:
        actions = []
        for step in range(steps):
            actions.append(agent.act(observation).tolist())
            agent.update(Transition(observation, np.array(actions[-1]), np.array([step, -step], dtype=float),
                                    np.zeros(2, bool), np.zeros(2, bool), {}, observation))
        return actions

    agent, other, cpu = (make_agent("reinforce", env, seed=seed, device=device)
                         for seed, device in ((0, "cuda"), (1, "cuda"), (2, "cpu")))
    go(agent, 3)
    state = agent.state_dict()
    go(other, 2)
    other.load_state_dict(state)
    assert go(other, 4) == go(agent, 4)
    cpu.load_state_dict(state)
    other.load_state_dict(cpu.state_dict())
    assert go(other, 1) == go(cpu, 1)


@pytest.mark.parametrize("parametrisation", ["usv", "sqrt", "unit"])
def test_norms_are_exact_for_a_bf16_model(parametrisation: str) -> None:
    model = tiny_model("bert", num_labels=3).to("cuda", torch.bfloat16)
    env = make_lanes(2, model=model, task=TokenTask(), **{**TINY, "parametrisation": parametrisation,
                                                         "raw_observation": True, "learning_rate": 0.05})
    assert_norms_are_exact(env)


def test_an_agent_without_graphs_does_the_same() -> None:
    curves = []
    for graphs in (True, False):
        env = make_lanes(2, device="cpu", horizon=30)
        agent = make_agent("reinforce", env, seed=0, device="cuda", cuda_graphs=graphs)
        curves.append([reward.tolist() for reward in run(env, agent, env_steps=12, seed=0).rewards])
        assert (agent._choose.graph is not None) == graphs  # type: ignore[attr-defined]
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-5)


def test_a_step_can_be_captured_after_memory_ran_out() -> None:
    model = tiny_model("bert", num_labels=3, attention="sdpa").to("cuda")
    env = make_lanes(2, model=model, task=TokenTask(), **TINY)
    env.reset(seed=0)
    step, env.tuner._step = env.tuner._step, _no_memory  # type: ignore[method-assign]
    with pytest.raises(MemoryLimitError):
        env.step(env.action_space.sample())
    env.tuner._step = step  # type: ignore[method-assign]
    env.tuner._train_step.clear()
    for _ in range(3):
        env.step(env.action_space.sample())
    assert all(captured.graph is not None for captured in env.tuner._train_step.values())


def _no_memory(width: int) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


BOTH = ("credit", "sensitivity")


def told(device: str, family: str = "bert", dtype: torch.dtype = torch.float32, **more: Any) -> list[Any]:
    """Observations, reward losses and component info of a few steps."""
    straight = more.pop("straight_into_a_step", False)
    model = tiny_model(family, num_labels=3, attention="eager" if family in NO_SDPA else "sdpa").to(device, dtype)
    model.config.pad_token_id = 1
    options = {**TINY, "component_info": BOTH, "adam_eps": 1e-4, **more}
    env = make_lanes(2, model=model, task=TokenTask(), **options)
    env.reset(seed=0)
    if straight:  # what is recorded first is then a step, whose training gradient recording must not disturb
        state = env.get_state(0)
        env = make_lanes(2, model=model, task=TokenTask(), **options)
        env.set_state(state)
    rng = np.random.default_rng(0)
    result = []
    for _ in range(3):
        actions = rng.integers(0, env.single_action_space.nvec, env.action_space.shape)
        observation, _, _, _, infos = env.step(actions)
        result += [observation, infos["L1"], *(infos[f"component_{name}"] for name in BOTH)]
    return result


def assert_alike(one: list[Any], two: list[Any], tolerance: float) -> None:
    for place, (a, b) in enumerate(zip(one, two, strict=True)):
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), place


@pytest.mark.parametrize("straight", [False, True])
@pytest.mark.parametrize("parametrisation", ["usv", "sqrt", "unit"])
def test_recorded_component_info_is_the_plain_one(parametrisation: str, straight: bool) -> None:
    options: dict[str, Any] = {"parametrisation": parametrisation, "weight_decay": 0.1,
                               "straight_into_a_step": straight}
    captured, plain = (told("cuda", cuda_graphs=graphs, **options) for graphs in (True, False))
    assert_alike(captured, plain, 1e-4)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "deberta-v2"])
def test_component_info_on_a_gpu_is_that_of_the_cpu(family: str) -> None:
    assert_alike(told("cuda", family), told("cpu", family), 1e-2)


def test_component_info_of_a_bf16_model_is_recorded() -> None:
    captured, plain = (told("cuda", dtype=torch.bfloat16, cuda_graphs=graphs) for graphs in (True, False))
    assert_alike(captured, plain, 1e-3)


@pytest.mark.parametrize("graphs", [True, False])
def test_asking_for_component_info_changes_no_loss_on_a_gpu(graphs: bool) -> None:
    one, two = (rollout("bert", "cuda", cuda_graphs=graphs, component_info=asked) for asked in ((), BOTH))
    assert worst(one, two) < 1e-5


def test_a_budget_holds_on_a_gpu() -> None:
    executed = []
    for device in ("cuda", "cpu"):
        env = make_lanes(3, device=device, horizon=5, parameter_budget=0.3)
        env.reset(seed=0)
        infos = [env.step(np.full((3, 48), 2))[4] for _ in range(3)]
        executed.append([info["executed_rank"].tolist() for info in infos])
        assert all((info["trained_fraction"] > 0).all() and (info["projected"] > 0).all() for info in infos)
    assert executed[0] == executed[1]
