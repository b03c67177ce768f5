"""Credit and sensitivity of components, against plain autograd, an AdamW of our own, and finite differences."""

import math
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from sklearn.metrics import roc_auc_score
from stable_baselines3.common.env_checker import check_env as check_sb3
from torch import Tensor, nn

from agents import Transition, make_agent, run
from agents.sb3_vec_env import SB3VecEnv
from lelora_env import EnvConfig, LeLoRAEnv, LeLoRAError, LeLoRAVectorEnv
from lelora_env.allocation import component_range
from lelora_env.config import NAMED_LOCATIONS
from lelora_env.errors import MemoryLimitError
from lelora_env.infos import add
from lelora_env.tasks.planted import PlantedTask
from tests.families import tiny_model
from tests.helpers import TokenTask, action_for, make_lanes
from tests.test_env import VectorTask

BOTH = ("credit", "sensitivity")
BETAS, EPS, RATE = (0.9, 0.999), 1e-5, 2e-3  # a larger ε keeps Adam from amplifying the last bits of ~0
SMALL: dict[str, Any] = {"rank_set": (0, 1, 2, 4), "reward_size": 8, "tune_size": 0, "batch_size": 4, "horizon": 20}


def planted(lanes: int = 1, **options: Any) -> LeLoRAVectorEnv:
    options = {"horizon": 10, "learning_rate": RATE, "adam_eps": EPS, "component_info": BOTH, **options}
    env = make_lanes(lanes, task=PlantedTask(layers=2, rows=64), **options)
    env.reset(seed=0)
    return env


class Reference:
    """Lane 0 in float64 as a list of (left (K, O), right (K, I), σ) per matrix, with AdamW written out."""

    def __init__(self, env: LeLoRAVectorEnv) -> None:
        self.env, self.spectrum = env, env.tuner.base.spectrum
        self.kinds = ("left", "right", "sigma") if self.spectrum.parametrisation == "usv" else ("left", "right")
        self.start = self.rows()
        self.moments = {key: (torch.zeros_like(v), torch.zeros_like(v), torch.zeros(len(v), 1))
                        for key, v in self.start.items()}

    def rows(self) -> dict[tuple[int, str], Tensor]:
        """The current rows by (matrix, kind), (K, D)."""
        bank, found = self.env.tuner.bank.rows, {}
        for group in self.spectrum.layout.groups:
            size = len(group.components)
            places = {"left": (str(group.out_features), group.left), "right": (str(group.in_features), group.right),
                      "sigma": ("sigma", group.sigma)}
            for i, matrix in enumerate(group.matrices):
                for kind in self.kinds:
                    name, first = places[kind]
                    rows = bank[name].detach()[0, first + i * size : first + (i + 1) * size]
                    found[matrix, kind] = rows.double().clone()
        return found

    def gradients(self, rows: dict[tuple[int, str], Tensor], batch: dict[str, Tensor]) -> dict[tuple[int, str], Tensor]:
        """Of the mean loss on a batch, through W = residual + leftᵀ·right, by autograd."""
        leaves = {key: value.clone().requires_grad_() for key, value in rows.items()}
        weights = {}
        for group, residual in zip(self.spectrum.layout.groups, self.spectrum.residual, strict=True):
            for i, m in enumerate(group.matrices):
                gain = leaves[m, "sigma"] if "sigma" in self.kinds else self.spectrum.scale[m].double()
                weights[m] = residual[i].double() + (leaves[m, "left"] * gain).T @ leaves[m, "right"]
        ordered = [w for _, w in sorted(weights.items())]
        inputs = batch["x"].double().split([w.shape[1] for w in ordered], dim=1)
        output = torch.cat([x @ w.T for x, w in zip(inputs, ordered, strict=True)], dim=1)
        loss = (((output - batch["y"].double()) ** 2).sum(1) / batch["signal"].double()).mean()
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    def step(self, chosen: Tensor, step: int, rate: float, decay: float, clip: float | None) -> tuple[Tensor, Tensor]:
        """Take an env step with one optimiser step; returns the credit and sensitivity that it must have, (M, K)."""
        env, before = self.env, self.rows()
        order = env.tuner.batches.indices(0, 0, 0, step)
        assert (order >= 0).all()
        gradient = self.gradients(before, {k: v[torch.from_numpy(order)] for k, v in env.tuner.splits.train.items()})
        norm = math.sqrt(sum(float(g[chosen[m]].square().sum()) for (m, _), g in gradient.items()))
        factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        delta = {}
        for key, g in gradient.items():
            first, second, count = self.moments[key]
            m1 = BETAS[0] * first + (1 - BETAS[0]) * factor * g
            m2 = BETAS[1] * second + (1 - BETAS[1]) * (factor * g) ** 2
            step_of = (m1 / (1 - BETAS[0] ** (count + 1))) / ((m2 / (1 - BETAS[1] ** (count + 1))).sqrt() + EPS)
            delta[key] = -rate * step_of - rate * decay * (before[key] - self.start[key])
            on = chosen[key[0]].unsqueeze(1)
            new = zip((m1, m2, count + 1), self.moments[key], strict=True)
            self.moments[key] = tuple(torch.where(on, a, b) for a, b in new)  # type: ignore[assignment]
        after = {key: value + torch.where(chosen[key[0]].unsqueeze(1), delta[key], 0) for key, value in before.items()}
        reward = self.gradients(after, env.tuner.splits.reward)
        credit, sensitivity = torch.zeros(2, *chosen.shape, dtype=torch.float64)
        for key in delta:
            credit[key[0]] -= (reward[key] * delta[key]).sum(1)
            sensitivity[key[0]] += (gradient[key] * after[key]).abs().sum(1)
        return credit, sensitivity


@pytest.mark.parametrize(("parametrisation", "decay", "clip"), [
    ("usv", 0.0, None), ("usv", 50.0, 0.05), ("sqrt", 50.0, None), ("unit", 0.0, 0.05), ("unit", 50.0, None)])
def test_both_equal_plain_autograd_and_adamw_written_out(
    parametrisation: str, decay: float, clip: float | None
) -> None:
    env = planted(parametrisation=parametrisation, weight_decay=decay, max_grad_norm=clip)
    reference, rng = Reference(env), np.random.default_rng(0)
    matrix = np.arange(env.num_matrices)
    for step in range(4):
        action = rng.integers(0, env.single_action_space.nvec, env.action_space.shape)
        chosen = env.table.mask[matrix, action[0, ::2], action[0, 1::2]]
        expected = reference.step(chosen, step, RATE * (10 - step) / 10, decay, clip)
        infos = env.step(action)[4]
        for name, value in zip(BOTH, expected, strict=True):
            got = infos[f"component_{name}"]
            assert got.dtype == np.float32
            assert got.shape == (1, *env.table.components.shape)
            assert np.abs(got[0] - value.numpy()).max() < 1e-3 * float(value.abs().max()), (step, name)


def test_credit_is_the_slope_of_the_reward_loss_along_the_change() -> None:
    """Two lanes in one state: what lane 0 says that a component would do is what it does in lane 1."""
    env = planted(2, common_random_numbers=True, max_grad_norm=None, weight_decay=0.3)
    env.step(action_for(env, 2, 0))  # moments that are not empty
    action = action_for(env, 3, 0)
    action[0, ::2] = 0
    before = {name: rows.detach()[1].clone() for name, rows in env.tuner.bank.rows.items()}
    credit = env.step(action)[4]["component_credit"]
    change = {name: rows.detach()[1] - before[name] for name, rows in env.tuner.bank.rows.items()}
    slots = env.tuner.base.spectrum.layout.row_slot
    largest = np.argsort(-np.abs(np.where(env.table.mask[:, 3, 0].numpy(), credit[0], 0)).flatten())[:4]
    for lane in (0, 1):
        for slot in largest:
            losses = []
            for size in (1.0, -1.0):
                kept = {name: rows.detach()[lane].clone() for name, rows in env.tuner.bank.rows.items()}
                with torch.no_grad():
                    for name, rows in env.tuner.bank.rows.items():
                        rows[lane] += size * torch.where((slots[name] == slot).unsqueeze(1), change[name], 0)
                    losses.append(float(env.tuner.reward_loss()[lane]))
                    for name, rows in env.tuner.bank.rows.items():
                        rows[lane].copy_(kept[name])
            slope = -(losses[0] - losses[1]) / 2
            assert credit[lane].flatten()[slot] == pytest.approx(slope, rel=0.02), (lane, slot)


@pytest.mark.parametrize("parametrisation", ["usv", "sqrt", "unit"])
def test_credits_of_what_was_chosen_sum_to_the_fall_of_the_loss(parametrisation: str) -> None:
    env = make_lanes(2, learning_rate=1e-4, horizon=20, component_info="credit", parametrisation=parametrisation)
    env.reset(seed=0)
    matrix = torch.arange(env.num_matrices)
    rng = np.random.default_rng(0)
    sums, falls = [], []
    for _ in range(4):
        action = rng.integers(0, env.single_action_space.nvec, env.action_space.shape)
        infos = env.step(action)[4]
        for lane in range(2):
            chosen = env.table.mask[matrix, action[lane, ::2], action[lane, 1::2]].numpy()
            sums.append(infos["component_credit"][lane][chosen].sum())
            falls.append(-infos["L2"][lane])
    assert np.abs(falls).max() > 1e-5
    np.testing.assert_allclose(sums, falls, atol=0.03 * np.abs(falls).max())


def rollout(model: Any, **options: Any) -> list[np.ndarray]:
    if model is not None:
        kind, family = model
        dtype = getattr(torch, options.get("dtype", "float32"))
        options |= {"model": tiny_model(family, kind, num_labels=3).to(dtype), "task": TokenTask(kind)}
        options["model"].config.pad_token_id = 1
    env = make_lanes(2, extra_features=("grad_norm", "update_norm"), **{"horizon": 20, **options})
    result = [env.reset(seed=0)[0]]
    rng = np.random.default_rng(0)
    for _ in range(4):
        action = rng.integers(0, env.single_action_space.nvec, env.action_space.shape)
        observation, reward, _, _, infos = env.step(action)
        if env.env_config.component_info:
            for name in env.env_config.component_info:
                assert np.isfinite(infos[f"component_{name}"]).all()
                assert (infos[f"component_{name}"] != 0).any((1, 2)).all()
        result += [observation, reward, *(infos[key] for key in ("L1", "L2", "train_loss", "grad_norm", "delta_norm"))]
    return [*result, *(value.numpy() for value in env.get_state(1).values())]


@pytest.mark.parametrize(("model", "options"), [
    (None, {}),
    (None, {"parametrisation": "usv", "steps_per_action": 3, "accumulate": 2}),
    (("sequence-classification", "bert"), {**SMALL, "dropout": 0.1, "accumulate": 2}),
    (("sequence-classification", "bert"), {**SMALL, "activation_checkpointing": True}),
    (("sequence-classification", "bert"), {**SMALL, "dtype": "bfloat16"}),
    (("sequence-classification", "deberta-v2"), SMALL),  # one lane at a time
    (("causal-lm", "llama"), {**SMALL, "parametrisation": "unit"}),
])
@pytest.mark.parametrize("asked", [BOTH, ("sensitivity",)])
def test_asking_changes_nothing_else_bit_for_bit(model: Any, options: dict[str, Any], asked: tuple[str, ...]) -> None:
    plain, told = rollout(model, **options), rollout(model, component_info=asked, **options)
    assert all(np.array_equal(a, b) for a, b in zip(plain, told, strict=True))


@pytest.mark.parametrize("chosen", ["nothing", "at random"])
def test_planted_components_that_were_not_chosen_stand_out(chosen: str) -> None:
    task = PlantedTask()
    env = make_lanes(1, task=task, horizon=20, component_info="credit")
    env.reset(seed=0)
    needed = np.zeros(env.table.components.shape, dtype=bool)
    for matrix, (choice, info) in enumerate(zip(task.choices, env.matrices, strict=True)):
        dimension = min(info.out_features, info.in_features)
        window = component_range(dimension, choice.rank, NAMED_LOCATIONS[choice.location])
        needed[matrix] = np.isin(env.table.components[matrix].numpy(), list(window))
    rng, areas = np.random.default_rng(0), []
    for _ in range(6):
        action = rng.integers(0, env.single_action_space.nvec, env.action_space.shape) * (chosen == "at random")
        action[:, ::2] = np.minimum(action[:, ::2], 1)
        infos = env.step(action)[4]
        left = ~env.table.mask[torch.arange(24), action[0, ::2], action[0, 1::2]].numpy()
        areas.append(roc_auc_score(needed[left], infos["component_credit"][0][left]))
    assert np.mean(areas) >= 0.9, areas


def test_a_lane_of_a_looped_model_has_the_credit_that_it_has_alone() -> None:
    found = []
    for lanes, seed in ((2, 3), (1, 4)):
        env = make_lanes(lanes, model=tiny_model("deberta-v2", num_labels=3), task=TokenTask(), component_info=BOTH,
                         adam_eps=EPS, learning_rate=1e-2, **SMALL)
        env.reset(seed=seed)
        assert env.tuner.passes.looped == (lanes == 2)
        found.append(env.step(action_for(env, 3, 0))[4])
    for name in BOTH:
        many, alone = found[0][f"component_{name}"][1], found[1][f"component_{name}"][0]
        assert np.abs(many - alone).max() < 1e-3 * np.abs(alone).max()


def test_a_bf16_model_gives_nearly_the_credit_of_an_fp32_one() -> None:
    found = []
    for dtype in ("float32", "bfloat16"):
        model = tiny_model("bert", num_labels=3).to(getattr(torch, dtype))
        env = make_lanes(2, model=model, task=TokenTask(), component_info=BOTH, adam_eps=1e-3, learning_rate=1e-2,
                         **SMALL)
        env.reset(seed=0)
        found.append(env.step(action_for(env, 3, 0))[4])
    for name in BOTH:
        one, two = (infos[f"component_{name}"].flatten() for infos in found)
        assert np.corrcoef(one, two)[0, 1] > 0.99, name


@pytest.mark.parametrize("kind", ["sequence-classification", "causal-lm"])
def test_portions_of_reward_rows_give_the_same(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for tokens in (2**12, 1):
        monkeypatch.setattr("lelora_env.scoring.GRADIENT_TOKENS", tokens)
        env = make_lanes(2, model=tiny_model("llama", kind, num_labels=3), task=TokenTask(kind), component_info=BOTH,
                         **{**SMALL, "reward_size": 11, "adam_eps": EPS, "learning_rate": 1e-2})
        env.source.config.pad_token_id = 1
        env.reset(seed=0)
        assert env.tuner.scorer.rows_with_gradients(4) == (4 if tokens == 1 else 64)
        found.append(env.step(action_for(env, 3, 0))[4])
    one, two = found
    np.testing.assert_allclose(one["L1"], two["L1"], rtol=1e-6)
    whole, portions = one["component_credit"], two["component_credit"]
    assert np.abs(whole - portions).max() < 1e-4 * np.abs(whole).max()


def test_unused_slots_and_lanes_that_did_not_run_are_zero() -> None:
    model = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16), nn.Linear(16, 8))
    env = make_lanes(2, model=model, task=VectorTask(), target_modules="all-linear", rank_set=(0, 4, 8), reward_size=4,
                     tune_size=0, horizon=2, component_info=BOTH, autoreset_mode="NextStep", max_episode_steps=2)
    env.reset(seed=0)
    unused = env.table.components.numpy() < 0
    assert unused.any()
    infos = env.step(action_for(env, 2, 0))[4]
    env.reset(options={"reset_mask": np.array([True, False])})  # so that lane 1 ends first
    assert all((infos[f"component_{name}"][:, unused] == 0).all() for name in BOTH)
    assert all((infos[f"component_{name}"][:, ~unused] != 0).all() for name in BOTH)
    env.step(action_for(env, 2, 0))
    infos = env.step(action_for(env, 2, 0))[4]
    for name in BOTH:
        assert infos[f"_component_{name}"].tolist() == [True, False]
        assert (infos[f"component_{name}"][1] == 0).all()
        assert (infos[f"component_{name}"][0] != 0).any()


def test_a_step_that_diverges_says_nothing() -> None:
    env = make_lanes(1, model=nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)), task=VectorTask(),
                     target_modules="all-linear", rank_set=(0, 2), reward_size=4, tune_size=0, learning_rate=1e25,
                     max_grad_norm=None, component_info=BOTH)
    env.reset(seed=0)
    for _ in range(10):
        _, _, terminated, _, infos = env.step(action_for(env, 1, 0))
        if terminated[0]:
            break
    assert infos["diverged"][0]
    assert not infos["component_credit"].any()
    assert not infos["component_sensitivity"].any()


def test_the_single_environment_gives_arrays_of_its_own_and_both_checkers_pass() -> None:
    env = gym.make("LeLoRA-v0", horizon=4, component_info="credit, sensitivity")
    env.reset(seed=0)
    infos = [env.step(env.action_space.sample())[4] for _ in range(2)]
    table = env.get_wrapper_attr("table")
    for name in BOTH:
        arrays = [info[f"component_{name}"] for info in infos]
        assert [a.shape for a in arrays] == [tuple(table.components.shape)] * 2
        assert not np.shares_memory(*arrays)
        assert not np.array_equal(*arrays)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(LeLoRAEnv(horizon=4, component_info=BOTH), skip_render_check=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_sb3(LeLoRAEnv(horizon=4, component_info=BOTH))


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_the_agents_loop_and_sb3_hand_it_on(mode: str) -> None:
    options: dict[str, Any] = {"horizon": 2, "component_info": BOTH, "parameter_budget": 0.5}
    env = make_lanes(2, autoreset_mode=mode, **options)
    shape = tuple(env.table.components.shape)
    seen: list[dict[str, Any]] = []

    def watch(transition: Transition, scalars: dict[str, float], step: int) -> None:
        seen.append(dict(transition.info))

    run(env, make_agent("random", env, seed=0), env_steps=5, seed=0, on_step=watch)
    assert [info["component_credit"].shape for info in seen] == [(2, *shape)] * 5
    assert [info["executed_rank"].shape for info in seen] == [(2, 24)] * 5
    assert all((info["component_credit"] != 0).any((1, 2)).all() for info in seen)
    if mode != "SameStep":
        return
    adapter = SB3VecEnv(make_lanes(2, autoreset_mode=mode, **options))
    adapter.reset()
    for _ in range(3):
        _, _, _, infos = adapter.step(np.full((2, 48), 1))
        assert [info["component_credit"].shape for info in infos] == [shape] * 2
        assert all(info["component_credit"].any() and type(info["projected"]) is int for info in infos)


@pytest.mark.parametrize(("value", "message"), [
    ("credits", "unknown component info 'credits'.*Did you mean 'credit'"),
    (("credit", "credit"), "component_info must be without repeats"),
    (3, "component_info must be a list of names"),
])
def test_bad_names_are_refused(value: Any, message: str) -> None:
    with pytest.raises(LeLoRAError, match=message):
        EnvConfig(component_info=value)


def test_names_take_one_plain_form_and_may_stand_beside_an_instance() -> None:
    assert EnvConfig(component_info="sensitivity, credit").component_info == ("sensitivity", "credit")  # type: ignore[arg-type]
    assert LeLoRAEnv(instance="planted-free/train-0", component_info="credit").env_config.component_info == ("credit",)


def test_a_measurement_that_runs_out_of_memory_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, named in ((BOTH, True), (("sensitivity",), False)):
        env = planted(component_info=asked)

        def no_memory(*_: Any) -> Any:
            raise torch.OutOfMemoryError("no memory")

        monkeypatch.setattr("lelora_env.memory.free_bytes", lambda device: 2**30)
        monkeypatch.setattr(env.tuner.bank, "exact_factors", no_memory)
        monkeypatch.setattr(env._measure.grams, "begin", lambda: None)
        with pytest.raises(MemoryLimitError) as caught:
            env.step(action_for(env, 1, 0))
        assert ("Without component_info='credit' it needs less." in str(caught.value)) == named


def test_infos_of_any_shape_are_blanked_where_their_mask_is_off() -> None:
    infos: dict[str, Any] = {}
    values = np.arange(1, 13, dtype=np.float32).reshape(2, 3, 2)
    add(infos, "x", values, np.array([False, True]))
    assert infos["x"].dtype == np.float32
    assert infos["x"].tolist() == [[[0, 0]] * 3, values[1].tolist()]
    assert infos["_x"].tolist() == [False, True]


def test_forks_and_replays_say_the_same() -> None:
    env = planted(2)
    env.step(action_for(env, 2, 0))
    twin = env.fork()
    one, two = (each.step(action_for(env, 1, 1))[4] for each in (env, twin))
    assert all(np.array_equal(one[f"component_{name}"], two[f"component_{name}"]) for name in BOTH)
