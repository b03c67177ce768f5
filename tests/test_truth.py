"""Numerical truth of the fine-tuning process, each fact against something from outside the code."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lelora_env.config import as_options, split_options
from lelora_env.export import merged_model, merged_weights
from lelora_env.reward import divergence_penalty, reward_parts
from tests.families import FAMILIES, tiny_model
from tests.helpers import TokenTask, action_for, dense_weights, make_lanes

PARAMETRISATIONS = ("usv", "sqrt", "unit")
SMALL = {"rank_set": (0, 1, 2, 4), "reward_size": 8, "tune_size": 0, "batch_size": 4, "horizon": 60}


@pytest.mark.parametrize("head", ["sequence-classification", "causal-lm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_step_zero_gives_the_original_logits(family: str, head: Any) -> None:
    decoder: dict[str, Any] = {"is_decoder": True} if head == "causal-lm" and family in ("bert", "roberta") else {}
    try:
        model = tiny_model(family, head, num_labels=3, **decoder).eval()
    except ValueError:
        pytest.skip(f"{family} has no {head} model")
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = 1
    task = TokenTask(head)
    env = make_lanes(2, model=model, task=task, target_modules="all-linear", parametrisation="unit", **SMALL)
    env.reset(seed=0)
    rows = task.splits(None, reward_size=6, tune_size=0, seed=3).reward
    inputs = {name: rows[name] for name in task.inputs}
    with torch.no_grad(), warnings.catch_warnings():
        expected = model(**inputs).logits.double()
        got = env.tuner.forward({k: v.repeat(2, 1) for k, v in inputs.items()}).double().view(2, *expected.shape)
    real = rows["attention_mask"].bool() if head == "causal-lm" else slice(None)
    for lane in range(2):
        error = (got[lane] - expected)[real].norm() / expected[real].norm()
        assert error <= 1e-5, f"{family}: {error}"
    env.step(action_for(env, 3, 0))
    with torch.no_grad():
        moved = env.tuner.forward({k: v.repeat(2, 1) for k, v in inputs.items()}).double().view(2, *expected.shape)
        again = model(**inputs).logits.double()
    assert (moved[0] - expected)[real].norm() > 1e-6
    assert torch.equal(again, expected), "the module that was handed in has been changed"


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
def test_full_mask_equals_adamw_on_delta(parametrisation: str, weight_decay: float) -> None:
    """20 steps with every component active against torch.optim.AdamW on δ, with autograd through a dense model."""
    env = make_lanes(1, parametrisation=parametrisation, weight_decay=weight_decay, horizon=20, max_grad_norm=None,
                     learning_rate=1e-3, adam_eps=1e-5)  # a larger ε keeps Adam from amplifying the last bits of ~0
    env.reset(seed=0)
    tuner = env.tuner
    start = {name: p.detach().clone() for name, p in tuner.bank.rows.items()}
    delta = {name: torch.nn.Parameter(torch.zeros_like(value)) for name, value in start.items()}
    optimiser = torch.optim.AdamW(delta.values(), lr=1e-3, weight_decay=weight_decay, eps=1e-5)
    everything = env.table.components.ge(0).unsqueeze(0)  # (1, M, K)
    for step in range(20):
        tuner.begin(everything, np.array([True]))
        tuner.train(1)
        optimiser.zero_grad()
        _reference_loss(env, {n: start[n] + d for n, d in delta.items()}, step).backward()
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * (20 - step) / 20
        optimiser.step()
    for name, parameter in tuner.bank.rows.items():
        change, expected = parameter.detach() - start[name], delta[name].detach()
        assert (change - expected).norm() / expected.norm() < 1e-3
        assert torch.allclose(parameter.detach(), start[name] + expected, atol=2e-5)


def _reference_loss(env, rows: dict[str, Tensor], step: int) -> Tensor:  # type: ignore[no-untyped-def]
    """The training loss of lane 0 from dense weights W = residual + Σ_k left_k right_kᵀ, by plain autograd."""
    tuner, spectrum = env.tuner, env.tuner.base.spectrum
    batch = tuner.batches.gather(torch.from_numpy(tuner.batches.indices(0, 0, 0, step)[None]), 0).rows
    weights: dict[int, Tensor] = {}
    for group, residual in zip(spectrum.layout.groups, spectrum.residual, strict=True):
        size = len(group.components)
        for i, matrix in enumerate(group.matrices):
            left = rows[str(group.out_features)][0, group.left + i * size : group.left + (i + 1) * size]
            right = rows[str(group.in_features)][0, group.right + i * size : group.right + (i + 1) * size]
            if "sigma" in rows:
                left = left * rows["sigma"][0, group.sigma + i * size : group.sigma + (i + 1) * size]
            weights[matrix] = residual[i] + spectrum.scale[matrix] * left.T @ right
    inputs = batch["x"].split([w.shape[1] for _, w in sorted(weights.items())], dim=1)
    output = torch.cat([x @ w.T for x, (_, w) in zip(inputs, sorted(weights.items()), strict=True)], dim=1)
    total: Tensor = ((output - batch["y"]) ** 2).sum(1) / batch["signal"]
    return total.mean()


@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
def test_masked_components_stay_bitwise_over_random_steps(parametrisation: str) -> None:
    env = make_lanes(2, parametrisation=parametrisation, weight_decay=0.1, horizon=50)
    env.reset(seed=1)
    rng = np.random.default_rng(0)
    tuner, slots = env.tuner, env.table.components.shape[1]
    for _ in range(50):
        before = {n: p.detach().clone() for n, p in tuner.bank.rows.items()}
        action = rng.integers(0, env.single_action_space.nvec, size=env.action_space.shape)
        env.step(action)
        pairs = action.reshape(2, -1, 2)
        for name, parameter in tuner.bank.rows.items():
            slot = tuner.base.spectrum.layout.row_slot[name].numpy()
            for lane in range(2):
                chosen = env.table.mask.numpy()[slot // slots, pairs[lane, slot // slots, 0],
                                                pairs[lane, slot // slots, 1], slot % slots]
                same = (parameter.detach()[lane] == before[name][lane]).all(1).numpy()
                assert same[~chosen].all()
                assert same[chosen].mean() < 0.05  # at the very end a step can be smaller than the last bit


def test_rank_zero_everywhere_changes_no_weight_but_the_clock_and_the_head() -> None:
    model = tiny_model("bert", "sequence-classification", num_labels=3)
    env = make_lanes(1, model=model, task=TokenTask(), learning_rate=0.01, **SMALL)
    env.reset(seed=0)
    weights = dense_weights(env, 0)
    head = env.tuner.bank.rows["head"].detach().clone()
    _, _, _, _, info = env.step(action_for(env, 0, 0))
    assert all(np.array_equal(a, b) for a, b in zip(weights, dense_weights(env, 0), strict=True))
    assert not torch.equal(head, env.tuner.bank.rows["head"])
    assert info["L2"][0] != 0
    assert info["optimiser_steps"][0] == 1
    assert info["trained_parameters"][0] == 0


def test_rank_zero_everywhere_without_a_head_has_no_l2() -> None:
    env = make_lanes(1)
    env.reset(seed=0)
    _, reward, _, _, info = env.step(action_for(env, 0, 2))
    assert info["L2"][0] == 0
    assert reward[0] == -info["L1"][0]


@pytest.mark.parametrize("steps", [1, 3])
def test_l2_equals_two_real_forwards(steps: int) -> None:
    """Against the loss of a dense model put together in NumPy, before and after the step, also after a fork."""
    env = make_lanes(1, steps_per_action=steps, horizon=6)
    env.reset(seed=0)
    for step in range(4):
        if step == 2:
            env = env.fork()
        before = _dense_loss(env)
        _, reward, _, _, info = env.step(action_for(env, 3, step % 3))
        after = _dense_loss(env)
        assert info["L1"][0] == pytest.approx(after, rel=1e-5)
        assert info["L2"][0] == pytest.approx(after - before, abs=2e-6)
        assert reward[0] == pytest.approx(-(after + 0.8 * (after - before)), rel=1e-5)
        assert info["optimiser_steps"][0] == steps * (step + 1)


def _dense_loss(env) -> float:  # type: ignore[no-untyped-def]
    rows = {k: v.double().numpy() for k, v in env.tuner.splits.reward.items()}
    weights = dense_weights(env, 0)
    at, outputs = 0, []
    for weight in weights:
        outputs.append(rows["x"][:, at : at + weight.shape[1]] @ weight.T)
        at += weight.shape[1]
    return float((((np.concatenate(outputs, 1) - rows["y"]) ** 2).sum(1) / rows["signal"]).mean())


@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
def test_observation_shows_norms_and_spectrum_of_the_current_weights(parametrisation: str) -> None:
    env = make_lanes(2, parametrisation=parametrisation, raw_observation=True, spectrum="full", horizon=30,
                     learning_rate=0.02)
    observation, _ = env.reset(seed=0)
    spectra = [np.linalg.svd(w, compute_uv=False) for w in dense_weights(env, 0)]
    for matrix, values in enumerate(spectra):
        assert np.allclose(observation[0, matrix, 3 : 3 + len(values)], values, rtol=1e-4, atol=1e-5)
    rng = np.random.default_rng(0)
    for _ in range(10):
        observation = env.step(rng.integers(0, env.single_action_space.nvec, size=env.action_space.shape))[0]
    for lane in range(2):
        for matrix, weight in enumerate(dense_weights(env, lane)):
            assert observation[lane, matrix, 2] == pytest.approx(np.linalg.norm(weight), rel=1e-4)
    moved = [abs(np.linalg.norm(w) - np.linalg.norm(s)) for w, s in zip(dense_weights(env, 0), spectra, strict=True)]
    assert max(moved) > 1e-3


@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
def test_reported_changes_equal_dense_differences(parametrisation: str) -> None:
    env = make_lanes(1, parametrisation=parametrisation, horizon=30)
    env.reset(seed=0)
    start = dense_weights(env, 0)
    for step in range(3):
        before = dense_weights(env, 0)
        info = env.step(np.tile([3, step % 3], (1, env.num_matrices)))[4]
        after = dense_weights(env, 0)
        name = env.adapter_config.location_names[step % 3]
        change = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(after, before, strict=True)))
        assert info[f"update_norm_{name}"][0] == pytest.approx(change, rel=1e-3)
        total = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(after, start, strict=True)))
        assert info["delta_norm"][0] == pytest.approx(total, rel=1e-3)


def test_reset_restores_the_start_bitwise() -> None:
    env = make_lanes(2, model=tiny_model("bert", "sequence-classification", num_labels=3), task=TokenTask(), **SMALL)
    first, info = env.reset(seed=7)
    start = env.get_state(1)
    for _ in range(3):
        env.step(action_for(env, 3, 1))
    second, again = env.reset(seed=7)
    assert np.array_equal(first, second)
    assert np.array_equal(info["L1"], again["L1"])
    for key, value in env.get_state(1).items():
        assert torch.equal(value, start[key]), key


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_merged_model_is_the_adapted_model(family: str) -> None:
    model = tiny_model(family, "sequence-classification", num_labels=3).eval()
    model.config.pad_token_id = 1
    task = TokenTask()
    env = make_lanes(2, model=model, task=task, target_modules="all-linear", learning_rate=0.01, **SMALL)
    env.reset(seed=0)
    for _ in range(5):
        env.step(action_for(env, 3, 0))
    rows = task.splits(None, reward_size=5, tune_size=0, seed=9).reward
    inputs = {name: rows[name] for name in task.inputs}
    with torch.no_grad():
        adapted = env.tuner.forward({k: v.repeat(2, 1) for k, v in inputs.items()}).view(2, 5, -1)
        for lane in range(2):
            merged = merged_model(env.tuner, lane)(**inputs).logits
            assert (merged - adapted[lane]).norm() / adapted[lane].norm() < 1e-5
        assert (adapted[0] - model(**inputs).logits).norm() > 1e-3
    assert set(merged_weights(env.tuner)) <= set(model.state_dict())


def test_accumulation_gives_the_same_steps() -> None:
    """Rows have 2 to 11 answer tokens, so the mean of four micro-batch means is another number than the mean."""
    results = []
    for parts in (1, 4):
        env = make_lanes(2, model=tiny_model("llama", "causal-lm"), task=TokenTask("causal-lm"), accumulate=parts,
                         max_grad_norm=0.5, learning_rate=0.01, adam_eps=1e-5, **SMALL)
        env.reset(seed=0)
        chosen = torch.from_numpy(np.stack([env.tuner.batches.indices(lane, lane, 0, 0) for lane in range(2)]))
        infos = [env.step(action_for(env, 3, 0))[4] for _ in range(5)]
        rows = {name: torch.stack([env.get_state(lane)[f"rows.{name}"] for lane in range(2)]).numpy()
                for name in env.tuner.bank.rows}
        results.append((infos, rows))
    labels = env.tuner.splits.train["labels"][chosen]  # (L, B, T)
    counts = (labels[..., 1:] != -100).sum(-1)
    assert all(len(set(lane)) > 2 for lane in counts.tolist()), "the answers must be of several lengths"
    for ours, theirs in zip(results[0][0], results[1][0], strict=True):
        for key in ("L1", "train_loss", "grad_norm"):
            assert np.allclose(ours[key], theirs[key], rtol=1e-5), key
    for name, bank_rows in results[0][1].items():
        assert np.allclose(bank_rows, results[1][1][name], rtol=0, atol=2e-5), name


def test_worked_example_of_equations_1_2_3() -> None:
    """W = diag(3, 1) over a zero row: components by hand, then Eq. 2 and 3 on one row by hand."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False))
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))

    class OneRow(TokenTask):
        head = "none"
        inputs: tuple[str, ...] = ("input",)

        def __init__(self) -> None:
            self.rows = 1

        def splits(self, tokenizer, *, reward_size, tune_size, seed):  # type: ignore[no-untyped-def]
            row = {"input": torch.tensor([[1.0, 2.0]]), "labels": torch.tensor([[3.0, 1.0, 0.0]])}
            return _one_row_splits(row)

        def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            return ((logits - batch["labels"]) ** 2).sum(1), torch.ones(len(logits))

    env = make_lanes(1, model=model, task=OneRow(), rank_set=(0, 1), locations=("primary", "minor"), target_modules="0",
                     learning_rate=0.1, warmup=0.0, reward_size=1, tune_size=0, batch_size=1, max_grad_norm=None,
                     parametrisation="usv", horizon=10)
    _, info = env.reset(seed=0)
    layer = env.tuner.lane_model.spectral[0]
    assert torch.allclose(layer.residual, torch.zeros(3, 2), atol=1e-6)  # both components are in the bank
    rows = {name: value.detach()[0] for name, value in env.tuner.bank.rows.items()}  # of 3 and of 2 numbers, and σ
    assert rows["sigma"][:, 0].tolist() == pytest.approx([3.0, 1.0])
    # Eq. 2 before the step: y = (3, 2, 0), target (3, 1, 0), squared error 1.
    assert info["L1"][0] == pytest.approx(1.0, abs=1e-5)
    # Choosing (r=1, minor) trains σ2 = 1, u2 = e2, v2 = e2 only. With error e = (0, 1, 0):
    # ∂/∂σ2 = 2·e·u2·(v2·x) = 4, ∂/∂u2 = 2·e·σ2·(v2·x) = (0, 4, 0), ∂/∂v2 = 2·σ2·(u2·e)·x = (2, 4).
    # Adam's first step moves each by 0.1 against the sign: σ2 = 0.9, u2 = (0, 0.9, 0), v2 = (-0.1, 0.9).
    _, reward, _, _, info = env.step(np.array([[1, 1]]))
    assert rows["sigma"][:, 0].tolist() == pytest.approx([3.0, 0.9], abs=1e-4)
    assert rows["3"][1].tolist() == pytest.approx([0.0, 0.9, 0.0], abs=1e-4)
    assert rows["2"][1].tolist() == pytest.approx([-0.1, 0.9], abs=1e-4)
    after = (0.9 * 0.9 * (-0.1 * 1 + 0.9 * 2) - 1) ** 2  # y2 = σ2·u2·(v2·x)
    assert info["L1"][0] == pytest.approx(after, abs=1e-4)
    assert info["L2"][0] == pytest.approx(after - 1.0, abs=1e-4)
    assert reward[0] == pytest.approx(-(after + 0.8 * (after - 1.0)), abs=1e-4)


def _one_row_splits(row: dict[str, Tensor]):  # type: ignore[no-untyped-def]
    from lelora_env import Splits

    empty = {k: v[:0] for k, v in row.items()}
    return Splits(row, row, empty, row)


def test_reward_parts_by_hand() -> None:
    parts = reward_parts(np.array([0.5]), np.array([0.7]), np.array([0.25]), alpha=0.8, rank_cost=2.0)
    assert parts["reward_l1"][0] == -0.5
    assert parts["reward_l2"][0] == pytest.approx(0.16)
    assert parts["reward_rank_cost"][0] == -0.5
    assert divergence_penalty(np.array([-3.0]), np.array([4]))[0] == -13.0


def test_options_survive_a_round_trip() -> None:
    adapter, env = split_options({"rank_set": [0, 2], "horizon": 7, "locations": ["primary", 0.25]})
    again = split_options(as_options(adapter, env))
    assert again == (adapter, env)
    assert adapter.location_names == ("primary", "at_0.25")
