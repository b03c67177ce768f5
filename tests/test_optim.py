"""MaskedAdamW against torch.optim.AdamW and against a loop-written float64 twin; the schedule against transformers."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lelora_env import fused
from lelora_env.errors import LeLoRAError
from lelora_env.optim import MaskedAdamW, lane_grad_norm, linear_schedule

SHAPES = [(3, 5, 4), (3, 2, 7)]  # two parameters of three lanes


def _random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _params(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(_random(shape, i, dtype)) for i, shape in enumerate(SHAPES)]


def _set_gradients(params: list[nn.Parameter], step: int) -> None:
    for i, param in enumerate(params):
        param.grad = _random(tuple(param.shape), 1000 * (i + 1) + step, param.dtype)


def _random_masks(step: int, density: float = 0.5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.rand(shape[:2], generator=generator) < density for shape in SHAPES]


class Twin:
    """The same optimiser written as loops over lanes and rows of numpy float64 arrays."""

    def __init__(self, params: list[nn.Parameter], references: list[Tensor], decay: float) -> None:
        self.theta = [p.detach().double().numpy().copy() for p in params]
        self.reference = [r.double().numpy() for r in references]
        self.first = [np.zeros_like(t) for t in self.theta]
        self.second = [np.zeros_like(t) for t in self.theta]
        self.steps = [np.zeros(t.shape[:2], dtype=int) for t in self.theta]
        self.decay = decay

    def step(self, grads: list[Tensor], masks: list[Tensor], rates: list[float], scale: list[float],
             max_norm: float) -> list[float]:
        norms = []
        for lane, rate in enumerate(rates):
            rows = [(p, n) for p, mask in enumerate(masks) for n in range(mask.shape[1]) if mask[lane, n]]
            scaled = {(p, n): grads[p][lane, n].double().numpy() * scale[lane] for p, n in rows}
            norms.append(sum(float((g**2).sum()) for g in scaled.values()) ** 0.5)
            for (p, n), gradient in scaled.items():
                self._row(p, lane, n, gradient * min(1.0, max_norm / (norms[-1] + 1e-6)), rate)
        return norms

    def _row(self, p: int, lane: int, n: int, gradient: np.ndarray[Any, Any], rate: float) -> None:
        at = (lane, n)
        self.steps[p][at] += 1
        t = self.steps[p][at]
        self.first[p][at] = 0.9 * self.first[p][at] + 0.1 * gradient
        self.second[p][at] = 0.999 * self.second[p][at] + 0.001 * gradient**2
        mean, square = self.first[p][at] / (1 - 0.9**t), self.second[p][at] / (1 - 0.999**t)
        delta = self.theta[p][at] - self.reference[p][n]
        self.theta[p][at] -= rate * self.decay * delta + rate * mean / (np.sqrt(square) + 1e-8)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_all_active_equals_adamw_on_delta(decay: float, dtype: torch.dtype, tolerance: float) -> None:
    params = _params(dtype)
    references = [param.detach()[0].clone() for param in params]
    deltas = [nn.Parameter(param.detach() - ref) for param, ref in zip(params, references, strict=True)]
    ours = MaskedAdamW([{"params": params, "reference": references}], lr=0.05, weight_decay=decay, betas=(0.8, 0.99))
    theirs = torch.optim.AdamW(deltas, lr=0.05, weight_decay=decay, betas=(0.8, 0.99))
    for step in range(20):
        _set_gradients(params, step)
        _set_gradients(deltas, step)
        ours.step()
        theirs.step()
    for param, ref, delta in zip(params, references, deltas, strict=True):
        torch.testing.assert_close(param - ref, delta, atol=tolerance, rtol=0)
        assert delta.abs().max() > 0.1


@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (1, 3, 4), (2, 3, 4, 5)])
def test_plain_parameters_train_as_under_adamw(shape: tuple[int, ...]) -> None:
    ours, theirs = (nn.Parameter(_random(shape, 0)) for _ in range(2))
    optimisers = [MaskedAdamW([ours], lr=0.1, weight_decay=0.1), torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.1)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimiser, lambda t: 1 / (1 + t)) for optimiser in optimisers]
    for _ in range(10):
        for param, optimiser, schedule in zip((ours, theirs), optimisers, schedules, strict=True):
            optimiser.zero_grad()
            torch.autograd.backward((param.sin() * param).sum())
            optimiser.step()
            schedule.step()
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_random_masks_against_the_slow_twin_and_bitwise(decay: float) -> None:
    params = _params()
    params[0].data[0, 0, 0] = -0.0
    references = [_random(shape[1:], 70 + i) for i, shape in enumerate(SHAPES)]
    rates, scale = [0.1, 0.01, 0.2], [1.0, 0.25, 3.0]
    optimiser = MaskedAdamW([{"params": params, "reference": references}], lr=torch.tensor(rates, dtype=torch.float64),
                            weight_decay=decay)
    twin = Twin(params, references, decay)
    for step in range(50):
        _set_gradients(params, step)
        masks = _random_masks(step, density=[0.5, 0.1, 0.0][step % 3])
        before = [_everything(optimiser, param) for param in params]
        optimiser.set_masks([m if step % 2 else m.unsqueeze(-1) for m in masks])
        norms = optimiser.clip_lanes(2.0, torch.tensor(scale, dtype=torch.float64))
        optimiser.step()
        expected = twin.step([p.grad for p in params if p.grad is not None], masks, rates, scale, 2.0)
        np.testing.assert_allclose(norms.numpy(), expected, rtol=1e-12)
        for param, mask, old in zip(params, masks, before, strict=True):
            for was, now in zip(old, _everything(optimiser, param), strict=True):
                assert torch.equal(was[~mask].view(torch.int64), now[~mask].view(torch.int64))
    for p, param in enumerate(params):
        np.testing.assert_allclose(param.detach().numpy(), twin.theta[p], atol=1e-11)
        np.testing.assert_allclose(optimiser.state[param]["exp_avg"].numpy(), twin.first[p], atol=1e-12)
        np.testing.assert_array_equal(optimiser.state[param]["step"].squeeze(-1).numpy(), twin.steps[p])


def _everything(optimiser: MaskedAdamW, param: nn.Parameter) -> list[Tensor]:
    state = optimiser.state[param]
    return [param.detach().clone(), state["exp_avg"].clone(), state["exp_avg_sq"].clone(), state["step"].double()]


def test_masked_rows_keep_even_nan_and_ignore_their_gradient() -> None:
    param = nn.Parameter(torch.tensor([[[float("nan")], [1.0], [7.0]]]))
    param.grad = torch.tensor([[[float("inf")], [2.0], [float("nan")]]])
    optimiser = MaskedAdamW([param], lr=0.5, weight_decay=0.1)
    optimiser.set_masks([torch.tensor([[False, True, False]])])
    assert optimiser.clip_lanes(None).tolist() == [2.0]
    optimiser.step()
    assert param[0, 0].isnan()
    assert param[0, 2] == 7
    assert optimiser.state[param]["exp_avg"][0, 0] == 0
    assert param[0, 1].item() == pytest.approx(1 - 0.5 * 0.1 - 0.5)


def test_bias_correction_counts_each_rows_own_steps() -> None:
    param = nn.Parameter(torch.zeros(1, 2, 1))
    optimiser = MaskedAdamW([param], lr=0.1)
    late = torch.tensor([[True, False]])
    for _ in range(9):
        param.grad = torch.full_like(param, 3.0)
        optimiser.step(masks=[late])
    param.grad = torch.full_like(param, -5.0)
    optimiser.step(masks=[~late])
    assert param[0, 1].item() == pytest.approx(0.1, rel=1e-6)  # a row's first step is lr·sign, whenever it comes
    assert optimiser.state[param]["step"].flatten().tolist() == [9.0, 1.0]


def test_masks_hold_until_changed_and_none_means_all() -> None:
    params = _params()
    optimiser = MaskedAdamW(params)
    optimiser.set_masks([torch.zeros(3, 5, dtype=torch.bool), None])
    for step in range(3):
        _set_gradients(params, step)
        optimiser.step()
    assert [optimiser.state[p]["step"].sum().item() for p in params] == [0, 18]
    optimiser.set_masks(None)
    optimiser.step()
    assert [optimiser.state[p]["step"].sum().item() for p in params] == [15, 24]


def test_per_lane_rates_and_clipping_equal_lanes_alone() -> None:
    rates = torch.tensor([1e-3, 1e-1, 0.0], dtype=torch.float64)
    params = _params()
    optimiser = MaskedAdamW([{"params": params[:1]}, {"params": params[1:]}], lr=rates)
    alone = [[nn.Parameter(param.detach()[lane].clone()) for param in params] for lane in range(3)]
    singles = [torch.optim.AdamW(alone[lane], lr=rates[lane].item(), weight_decay=0.0) for lane in range(3)]
    for step in range(5):
        _set_gradients(params, step)
        params[0].grad = torch.einsum("lnd,l->lnd", params[0].grad, torch.tensor([1.0, 10.0, 0.01]).double())
        norms = optimiser.clip_lanes(3.0)
        for lane in range(3):
            for part, param in zip(alone[lane], params, strict=True):
                assert param.grad is not None
                part.grad = param.grad[lane].clone()
            expected = nn.utils.clip_grad_norm_(alone[lane], 3.0)
            assert norms[lane].item() == pytest.approx(expected.item(), rel=1e-12)
            singles[lane].step()
        optimiser.step()
    for lane in range(3):
        for part, param in zip(alone[lane], params, strict=True):
            torch.testing.assert_close(param[lane], part, atol=1e-12, rtol=0)
    torch.testing.assert_close(params[0][2], _params()[0][2], atol=0, rtol=0)  # rate 0


def test_clipping_acts_on_one_step_and_leaves_gradients_alone() -> None:
    params = _params()
    optimiser = MaskedAdamW(params)
    _set_gradients(params, 0)
    grads = [param.grad.clone() for param in params if param.grad is not None]
    optimiser.clip_lanes(1e-3, torch.full((3,), 2.0).double())
    optimiser.step()
    assert optimiser.state[params[0]]["exp_avg"].norm() < 1e-3
    optimiser.step()
    assert optimiser.state[params[0]]["exp_avg"].norm() > 0.1
    for param, grad in zip(params, grads, strict=True):
        assert param.grad is not None
        assert torch.equal(param.grad, grad)
    torch.testing.assert_close(
        lane_grad_norm(grads, scale=torch.tensor([1.0, 2.0, -3.0]).double()),
        torch.stack([torch.cat([g[i].flatten() for g in grads]).norm() * s for i, s in enumerate((1, 2, 3))]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
def test_a_diverged_lane_does_not_touch_the_others(bad: float) -> None:
    results = []
    for value in (0.5, bad):
        params = _params(torch.float32)
        optimiser = MaskedAdamW(params, lr=torch.tensor([0.1, 0.2, 0.3]), weight_decay=0.1)
        for step in range(5):
            _set_gradients(params, step)
            assert params[0].grad is not None
            params[0].grad[1, 2, :] = value
            norms = optimiser.clip_lanes(1.0)
            optimiser.step()
        results.append((norms, params, optimiser))
    (norms, params, optimiser), (bad_norms, bad_params, bad_optimiser) = results
    assert not torch.isfinite(bad_norms[1])
    for lane in (0, 2):
        assert bad_norms[lane] == norms[lane]
        for good, other in zip(params, bad_params, strict=True):
            assert torch.equal(good[lane], other[lane])
            second, other_second = optimiser.state[good]["exp_avg_sq"], bad_optimiser.state[other]["exp_avg_sq"]
            assert torch.equal(second[lane], other_second[lane])


def test_state_dict_continues_bitwise_into_the_same_buffers(tmp_path: Any) -> None:
    def advance(optimiser: MaskedAdamW, params: list[nn.Parameter], steps: range) -> None:
        for step in steps:
            _set_gradients(params, step)
            optimiser.step(masks=_random_masks(step) if step != 7 else None)

    def build() -> tuple[MaskedAdamW, list[nn.Parameter]]:
        params = _params(torch.float32)
        reference = [param.detach()[0].clone() for param in params]
        return MaskedAdamW([{"params": params, "reference": reference, "lr": torch.full((3,), 0.1)}],
                           weight_decay=0.1), params

    straight, straight_params = build()
    advance(straight, straight_params, range(7))
    torch.save({"optimiser": straight.state_dict(), "params": straight_params}, tmp_path / "state.pt")
    advance(straight, straight_params, range(7, 12))
    resumed, params = build()
    buffers = [value.data_ptr() for param in params for value in resumed.state[param].values()]
    resumed.param_groups[0]["lr"].fill_(9.0)
    saved = torch.load(tmp_path / "state.pt", weights_only=False)
    assert "reference" not in saved["optimiser"]["param_groups"][0]
    resumed.load_state_dict(saved["optimiser"])
    for param, value in zip(params, saved["params"], strict=True):
        param.data.copy_(value)
    advance(resumed, params, range(7, 12))  # step 7 uses the masks of step 6, which the state brought along
    for param, other in zip(params, straight_params, strict=True):
        assert torch.equal(param, other)
        for name, value in straight.state[other].items():
            assert torch.equal(resumed.state[param][name], value)
            assert resumed.state[param][name].dtype == value.dtype
    assert buffers == [value.data_ptr() for param in params for value in resumed.state[param].values()]


def test_deepcopy_is_independent() -> None:
    params = _params()
    optimiser = MaskedAdamW(params)
    other = copy.deepcopy(optimiser)
    _set_gradients(params, 0)
    optimiser.step()
    copied = other.param_groups[0]["params"]
    assert all(other.state[param]["step"].sum() == 0 for param in copied)
    _set_gradients(copied, 0)
    other.clip_lanes(None)
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(params, copied, strict=True))


def test_reset_lanes_forgets_only_those() -> None:
    params = _params()
    optimiser = MaskedAdamW(params)
    _set_gradients(params, 0)
    optimiser.step(masks=_random_masks(1, density=0.8))
    before = [_everything(optimiser, param) for param in params]
    optimiser.reset_lanes(torch.tensor([False, True, False]))
    for param, (value, first, *_) in zip(params, before, strict=True):
        state = optimiser.state[param]
        assert torch.equal(param, value)
        assert torch.equal(state["exp_avg"][[0, 2]], first[[0, 2]])
        assert not state["exp_avg"][1].any()
        assert not state["exp_avg_sq"][1].any()
        assert not state["step"][1].any()
        assert state["mask"][1].all()
    optimiser.reset_lanes()
    assert not any(optimiser.state[param]["step"].any() for param in params)


def test_parameters_without_gradient_and_closure() -> None:
    params = _params()
    start = [param.detach().clone() for param in params]
    optimiser = MaskedAdamW(params, weight_decay=0.5)
    assert optimiser.clip_lanes(1.0).tolist() == [0, 0, 0]

    def closure() -> float:
        optimiser.zero_grad()
        loss = (params[0] ** 2).sum()
        torch.autograd.backward(loss)
        return loss.item()

    assert optimiser.step(closure) == pytest.approx((start[0] ** 2).sum().item())
    assert not torch.equal(params[0], start[0])
    assert torch.equal(params[1], start[1])


@pytest.mark.parametrize(("total", "warmup", "rising"), [
    (10, 0.0, 0), (10, 0.3, 3), (100, 0.06, 6), (7, 0.5, 4), (100, 0.07, 7)])
def test_schedule_is_that_of_transformers_without_its_idle_step(total: int, warmup: float, rising: int) -> None:
    from transformers import get_linear_schedule_with_warmup

    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_linear_schedule_with_warmup(reference, rising + 1, total + 1)
    expected = []
    for _ in range(total):
        reference.step()
        schedule.step()
        expected.append(schedule.get_last_lr()[0])
    factors = linear_schedule(torch.arange(total), total, warmup)
    np.testing.assert_allclose(factors.numpy(), expected, rtol=1e-6)
    assert (factors > 0).all()
    assert factors.argmax() == rising
    assert factors.max() == 1
    assert linear_schedule(total, total, warmup) == 0
    assert linear_schedule(total + 5, total, warmup) == 0


def test_schedule_without_warmup_is_that_of_transformers_unshifted() -> None:
    assert linear_schedule(torch.arange(4), 4).tolist() == [1.0, 0.75, 0.5, 0.25]
    assert linear_schedule(0, 1, 0.9).item() == 1.0
    assert linear_schedule(torch.tensor([[0, 1], [2, 3]]), 4, 0.5).tolist() == [
        pytest.approx([1 / 3, 2 / 3]), [1.0, 0.5]]


@pytest.mark.parametrize(("options", "message"), [
    ({"lr": -1.0}, "lr must be at least 0"), ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\)"),
    ({"eps": float("nan")}, "eps must be"), ({"weight_decay": -0.1}, "weight_decay must be"),
    ({"lr": torch.ones(2)}, r"lr must be a float or a tensor of shape \(\) or \(3,\)"),
])
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LeLoRAError, match=message):
        MaskedAdamW(_params(), **options)


def test_bad_shapes_change_nothing() -> None:
    params = _params()
    with pytest.raises(LeLoRAError, match="same number of lanes"):
        MaskedAdamW([params[0], nn.Parameter(torch.zeros(2, 5, 4))])
    with pytest.raises(LeLoRAError, match="a reference must have one of the shapes"):
        MaskedAdamW([{"params": params[:1], "reference": torch.zeros(4, 5)}])
    with pytest.raises(LeLoRAError, match="expected 2 references"):
        MaskedAdamW([{"params": params, "reference": [None]}])
    optimiser = MaskedAdamW(params)
    off = torch.zeros(3, 5, dtype=torch.bool)
    for masks, message in (([None], "expected 2 masks"), ([off, off], "must be bool of shape"),
                           ([off.float(), None], "must be bool")):
        with pytest.raises(LeLoRAError, match=message):
            optimiser.set_masks(masks)
    assert all(optimiser.state[param]["mask"].all() for param in params)
    with pytest.raises(LeLoRAError, match="total must be at least 1"):
        linear_schedule(0, 0)


def test_a_triton_that_cannot_compile_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*args: Any) -> None:
        raise RuntimeError("Failed to find C compiler\nand more")

    zeros = torch.zeros
    monkeypatch.setattr(fused, "update", no_compiler)
    monkeypatch.setattr("torch.zeros", lambda *shape, device: zeros(*shape))
    fused.compiles.cache_clear()
    try:
        assert [fused.compiles() for _ in range(3)] == [False] * 3
    finally:
        fused.compiles.cache_clear()
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["the optimiser runs without its fused kernel (slower): Failed to find C compiler"]
