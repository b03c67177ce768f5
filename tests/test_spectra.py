"""The decomposition against numpy's fp64 SVD and against matrices whose decomposition is known."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from lelora_env.errors import LeLoRAError, ModelError
from lelora_env.spectra import decompose

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
SHAPES = [(48, 48), (80, 32), (32, 80)]


def _orthonormal(rng: np.random.Generator, size: int, count: int) -> Array:
    return np.asarray(np.linalg.qr(rng.standard_normal((size, count)))[0], dtype=np.float64)


def _with_spectrum(shape: tuple[int, int], sigma: Array) -> Array:
    rng = np.random.default_rng(0)
    return np.asarray((_orthonormal(rng, shape[0], len(sigma)) * sigma) @ _orthonormal(rng, shape[1], len(sigma)).T)


def _windows(m: int, width: int = 5) -> list[int]:
    return sorted({*range(width), *range(m // 2, m // 2 + width), *range(m - width, m)})


SPECTRA: dict[str, Callable[[int], Array]] = {
    **{f"kappa 1e{k}": partial(np.logspace, 0, -k) for k in (2, 4, 5, 6, 8, 10, 12, 16)},
    "large scale": lambda m: 1e8 * np.logspace(0, -3, m),
    "small scale": lambda m: 1e-12 * np.logspace(0, -3, m),
    "rank 0": lambda m: np.zeros(m),
    "rank 1": lambda m: np.r_[2.0, np.zeros(m - 1)],
    "rank half": lambda m: np.r_[np.linspace(2, 1, m // 2), np.zeros(m - m // 2)],
    "rank half, graded": lambda m: np.r_[np.logspace(0, -5.5, m // 2), np.zeros(m - m // 2)],
    "repeated": lambda m: np.repeat([3.0, 2.0, 1.0, 1e-6], m // 4),
    "identity-like": lambda m: np.ones(m),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_numpy_svd(shape: tuple[int, int], spectrum: str) -> None:
    sigma = SPECTRA[spectrum](min(shape))
    weight = _with_spectrum(shape, sigma)
    scale = sigma[0] or 1.0
    kept = _windows(min(shape))
    result = decompose(torch.from_numpy(weight)[None], kept, dtype=torch.float64)
    left, right, found = result.U[0].numpy(), result.V[0].numpy(), result.singular_values[0].numpy()
    assert (left.shape, right.shape) == ((len(kept), shape[0]), (len(kept), shape[1]))
    assert (found >= 0).all()
    assert (np.diff(found) <= 0).all()
    np.testing.assert_allclose(found / scale, np.linalg.svd(weight, compute_uv=False) / scale, atol=2e-11, rtol=0)
    np.testing.assert_allclose(left @ left.T, np.eye(len(kept)), atol=1e-13)
    np.testing.assert_allclose(right @ right.T, np.eye(len(kept)), atol=1e-13)
    np.testing.assert_allclose(left @ weight @ right.T / scale, np.diag(found[kept]) / scale, atol=1e-10)
    np.testing.assert_allclose(weight @ right.T / scale, left.T * found[kept] / scale, atol=5e-9)  # W v = σ u
    np.testing.assert_allclose(weight.T @ left.T / scale, right.T * found[kept] / scale, atol=5e-9)  # Wᵀ u = σ v


@pytest.mark.parametrize("spectrum", ["kappa 1e6", "kappa 1e12", "rank 0", "rank 1", "rank half", "repeated"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_components_rebuild_the_matrix(shape: tuple[int, int], spectrum: str) -> None:
    sigma = SPECTRA[spectrum](min(shape))
    weight = _with_spectrum(shape, sigma)
    result = decompose(torch.from_numpy(weight)[None], range(min(shape)), dtype=torch.float64)
    left, right, found = result.U[0].numpy(), result.V[0].numpy(), result.singular_values[0].numpy()
    np.testing.assert_allclose((left.T * found) @ right, weight, atol=2e-11 * (sigma[0] or 1.0))
    np.testing.assert_allclose(left @ left.T, np.eye(min(shape)), atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_window_projectors_equal_numpy_for_separated_values(shape: tuple[int, int]) -> None:
    m = min(shape)
    weight = _with_spectrum(shape, np.linspace(3, 1, m))
    left_ref, _, right_ref = np.linalg.svd(weight, full_matrices=False)
    for window in (range(6), range(m // 2, m // 2 + 6), range(m - 6, m)):
        result = decompose(torch.from_numpy(weight)[None], window, dtype=torch.float64)
        left, right, rows = result.U[0].numpy(), result.V[0].numpy(), list(window)
        np.testing.assert_allclose(left.T @ left, left_ref[:, rows] @ left_ref[:, rows].T, atol=1e-11)
        np.testing.assert_allclose(right.T @ right, right_ref[rows].T @ right_ref[rows], atol=1e-11)


def test_repeated_values_span_the_right_subspace() -> None:
    weight = _with_spectrum((40, 24), np.repeat([3.0, 2.0, 1.0], 8))
    left_ref, _, right_ref = np.linalg.svd(weight, full_matrices=False)
    result = decompose(torch.from_numpy(weight)[None], range(8, 16), dtype=torch.float64)
    np.testing.assert_allclose(result.U[0].T @ result.U[0], left_ref[:, 8:16] @ left_ref[:, 8:16].T, atol=1e-12)
    np.testing.assert_allclose(result.V[0].T @ result.V[0], right_ref[8:16].T @ right_ref[8:16], atol=1e-12)


def test_null_vectors_stay_outside_the_range() -> None:
    weight = _with_spectrum((64, 40), np.r_[np.linspace(2, 1, 10), np.zeros(30)])
    result = decompose(torch.from_numpy(weight)[None], range(30, 40), dtype=torch.float64)
    np.testing.assert_allclose(result.U[0].numpy() @ weight, 0, atol=1e-13)
    np.testing.assert_allclose(weight @ result.V[0].numpy().T, 0, atol=1e-13)


def test_hand_worked_matrix_and_signs() -> None:
    weight = torch.tensor([[0.0, -2.0], [3.0, 0.0], [0.0, 0.0]])
    result = decompose([weight], [0, 1])
    assert result.singular_values.tolist() == [[3.0, 2.0]]
    torch.testing.assert_close(result.V[0], torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    torch.testing.assert_close(result.U[0], torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sign_rule_holds_and_ignores_the_sign_of_ties(shape: tuple[int, int]) -> None:
    weight = torch.from_numpy(_with_spectrum(shape, np.linspace(3, 1, min(shape))))
    right = decompose([weight, -weight], range(8)).V
    assert (right.gather(-1, right.abs().argmax(-1, keepdim=True)) > 0).all()
    tied = torch.tensor([[1.0, -1.0], [1.0, 1.0]]) / 2**0.5 @ torch.diag(torch.tensor([2.0, 1.0])) @ torch.tensor(
        [[-1.0, 1.0], [1.0, 1.0]]) / 2**0.5
    assert (decompose([tied], [0, 1]).V[0, :, 0] > 0).all()
    nearly = torch.tensor([[-1.0, 1.0 + 1e-9], [0.0, 0.0]], dtype=torch.float64)
    assert decompose([nearly], [0]).V[0, 0, 0] > 0


def test_result_depends_on_neither_chunk_nor_neighbours_nor_order() -> None:
    rng = np.random.default_rng(1)
    weights = torch.from_numpy(rng.standard_normal((5, 20, 12)))
    weights[1, :, 3] = weights[1, :, 2]
    weights[3] = 0
    whole = decompose(weights, [0, 5, 11], dtype=torch.float64)
    for chunk in (1, 2, 5, 9):
        part = decompose(list(weights), [0, 5, 11], chunk=chunk, dtype=torch.float64)
        torch.testing.assert_close(part.singular_values, whole.singular_values, atol=1e-13, rtol=0)
        torch.testing.assert_close(part.U[[0, 2, 4]], whole.U[[0, 2, 4]], atol=1e-11, rtol=0)
    shuffled = decompose(weights, [[11, 0, 5]] * 5, dtype=torch.float64)
    torch.testing.assert_close(shuffled.U, whole.U[:, [2, 0, 1]], atol=0, rtol=0)
    torch.testing.assert_close(shuffled.V, whole.V[:, [2, 0, 1]], atol=0, rtol=0)
    assert shuffled.components.tolist() == [[11, 0, 5]] * 5


def test_each_matrix_may_want_other_components() -> None:
    weights = torch.from_numpy(np.random.default_rng(2).standard_normal((2, 10, 6)))
    whole = decompose(weights, range(6), dtype=torch.float64)
    mixed = decompose(weights, torch.tensor([[0, 3], [5, 1]]), dtype=torch.float64)
    torch.testing.assert_close(mixed.V[0], whole.V[0, [0, 3]], atol=1e-12, rtol=0)
    torch.testing.assert_close(mixed.U[1], whole.U[1, [5, 1]], atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_input_types(dtype: torch.dtype) -> None:
    weight = torch.from_numpy(np.random.default_rng(3).standard_normal((30, 20))).to(dtype)
    before = weight.clone()
    result = decompose([torch.nn.Parameter(weight)], range(20))
    assert {result.U.dtype, result.V.dtype, result.singular_values.dtype} == {torch.float32}
    assert not result.U.requires_grad
    rebuilt = (result.U[0].T * result.singular_values[0]) @ result.V[0]
    torch.testing.assert_close(rebuilt, weight.float(), atol=5e-6, rtol=0)
    assert torch.equal(weight, before)


def test_no_component_wanted_still_gives_the_spectrum() -> None:
    result = decompose(torch.eye(4)[None] * 2, [])
    assert (result.U.shape, result.V.shape) == ((1, 0, 4), (1, 0, 4))
    torch.testing.assert_close(result.singular_values, torch.full((1, 4), 2.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weight_names_the_matrix(bad: float) -> None:
    weights = torch.ones(3, 4, 5)
    weights[1, 2, 3] = bad
    with pytest.raises(ModelError, match=r"matrix layer\.1\.query holds NaN or infinity"):
        decompose(weights, [0], names=["layer.0.query", "layer.1.query", "layer.2.query"], chunk=2)
    with pytest.raises(ModelError, match="matrix number 1 holds NaN or infinity"):
        decompose(weights, [0])


@pytest.mark.parametrize(("components", "message"), [
    ([4], r"distinct indices in \[0, 4\)"), ([-1], r"distinct indices in \[0, 4\)"),
    ([1, 1], "distinct indices"), ([[0], [1], [2]], r"shape \(K,\) or \(2, K\)"),
])
def test_bad_components(components: list[int], message: str) -> None:
    with pytest.raises(LeLoRAError, match=message):
        decompose(torch.ones(2, 4, 5), components)


@pytest.mark.parametrize(("weights", "message"), [
    ([torch.ones(2, 3), torch.ones(3, 2)], r"matrix number 1 has shape \(3, 2\)"), ([], "no matrix to decompose"),
    ([torch.ones(3)], "2-D shape"), ([torch.ones(0, 3)], "non-empty"), ([torch.ones(2, 2, device="meta")], "no float"),
    ([torch.ones(2, 2, dtype=torch.uint8)], "without quantisation"),
])
def test_bad_weights(weights: list[torch.Tensor], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        decompose(weights, [0])
