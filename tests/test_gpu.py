"""On a GPU: captured steps give the numbers of plain ones and of the CPU."""

import logging
from typing import Any

import numpy as np
import pytest
import torch

from tests.families import FAMILIES, tiny_model
from tests.helpers import TokenTask, make_lanes

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
    without_graph = {record.args[0] for record in caplog.records if "without a CUDA graph" in record.msg}  # type: ignore[index]
    assert bool(without_graph) == (family in NO_CAPTURE), without_graph


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
