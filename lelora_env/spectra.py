"""Singular value decomposition of many weight matrices of one shape, keeping only the wanted vectors.

Method: with A the taller of W and Wᵀ, (P, m) with P ≥ m, the eigenvectors V of the fp64 Gram matrix AᵀA are
A's right singular vectors, and ‖A v‖ its singular values. A Gram matrix squares the condition
number, so directions below 1e-5·σ1 come out mixed with one another: they are solved again inside
their own subspace, whose Gram matrix has a far smaller norm. QR then makes the left vectors
orthonormal, and for a rank-deficient matrix completes them outside its range.

Accuracy before the result is rounded to ``dtype`` (sizes up to a few thousand, any condition number):
singular values, and every entry of UᵀWV - S over the kept components, to about 1e-11·σ1; orthonormality of
U and of V to 1e-12. That is far below what fp32 storage keeps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lelora_env.errors import LeLoRAError, ModelError

_TAIL = 1e-5
"""Directions below this share of σ1 are solved again: the Gram error eps·σ1²/σ is then ≤ 1e-11·σ1."""

_DEFICIENT = 1e-7
"""A matrix with singular values below this share of σ1 gets its left vectors by a QR of the whole A·V."""

_SIGN_TIE = 1e-6
"""Entries of v whose magnitudes differ by less than this share count as equal when the sign is chosen."""

_CHUNK_ENTRIES = 2**23
"""Default limit on the entries of the matrices that are decomposed together (fp64: 64 MiB a copy)."""


@dataclass(frozen=True)
class Decomposition:
    """Singular values of M matrices of shape (O, I), and the vectors of K wanted components each.

    Attributes:
        singular_values: All of them, (M, m) with m = min(O, I), descending, never negative.
        U: Left vectors as rows, (M, K, O), orthonormal.
        V: Right vectors as rows, (M, K, I), orthonormal. Signs: the entry of largest magnitude of
            each v is positive, the first one if several tie.
        components: The component indices of the rows, (M, K), int64, as they were asked for.
    """

    singular_values: Tensor
    U: Tensor
    V: Tensor
    components: Tensor


def decompose(
    weights: Tensor | Sequence[Tensor],
    components: Tensor | Sequence[int] | Sequence[Sequence[int]],
    *,
    names: Sequence[str] | None = None,
    chunk: int | None = None,
    dtype: torch.dtype = torch.float32,
    on_done: Callable[[int], object] | None = None,
) -> Decomposition:
    """Decompose M matrices of one shape as W ≈ Σ_k σ_k u_k v_kᵀ.

    Args:
        weights: (M, O, I), or a sequence of M tensors (O, I), of any floating dtype, on one device.
        components: Wanted component indices, in [0, m) and distinct: (K,) for all matrices, or (M, K).
        names: Names of the matrices, for error messages.
        chunk: Matrices decomposed together; limits memory (about 6 fp64 copies of a chunk live at
            once). ``None`` chooses by size.
        dtype: Type of the result; the computation is always float64.
        on_done: Called after every chunk with its number of matrices.

    Returns:
        The decomposition, on the device of ``weights``.

    Raises:
        ModelError: A weight holds NaN or infinity, has no data, or the shapes differ.
        LeLoRAError: A component index is out of range or repeated.
    """
    matrices = [weight.detach() for weight in weights]
    labels = list(names) if names is not None else [f"number {i}" for i in range(len(matrices))]
    _check_matrices(matrices, labels)
    rows, columns = matrices[0].shape
    wanted = _check_components(components, len(matrices), min(rows, columns)).to(matrices[0].device)
    size = chunk if chunk is not None else max(1, _CHUNK_ENTRIES // max(1, rows * columns))
    with torch.no_grad():
        parts = []
        for i in range(0, len(matrices), max(1, size)):
            parts.append(_decompose_chunk(matrices[i:i + size], wanted[i:i + size], labels[i:i + size]))
            if on_done is not None:
                on_done(len(parts[-1][0]))
        sigma, left, right = (torch.cat(part).to(matrices[0].device, dtype) for part in zip(*parts, strict=True))
    return Decomposition(singular_values=sigma, U=left, V=right, components=wanted)


def _check_matrices(matrices: list[Tensor], labels: list[str]) -> None:
    if not matrices:
        raise ModelError("no matrix to decompose; target_modules must name at least one")
    for weight, label in zip(matrices, labels, strict=True):
        if weight.ndim != 2 or weight.shape != matrices[0].shape or 0 in weight.shape:
            raise ModelError(f"matrix {label} has shape {tuple(weight.shape)}; all matrices of one call must have one "
                             f"non-empty 2-D shape, here {tuple(matrices[0].shape)}")
        if weight.is_meta or not weight.is_floating_point():
            raise ModelError(f"matrix {label} has no floating-point data (device {weight.device}, {weight.dtype}); "
                             "load the model's weights first, without quantisation")


def _check_components(components: Tensor | Sequence[int] | Sequence[Sequence[int]], count: int, m: int) -> Tensor:
    wanted = torch.as_tensor(components, dtype=torch.int64)
    wanted = (wanted.expand(count, -1) if wanted.ndim == 1 else wanted).cpu()  # (M, K)
    if wanted.ndim != 2 or wanted.shape[0] != count:
        raise LeLoRAError(f"components must have shape (K,) or ({count}, K), got {tuple(wanted.shape)}")
    ordered = wanted.sort(dim=1).values
    if bool(((ordered < 0) | (ordered >= m)).any()) or bool((ordered.diff(dim=1) == 0).any()):
        raise LeLoRAError(f"components must be distinct indices in [0, {m}), got {wanted.tolist()[0]}")
    return wanted


def _decompose_chunk(matrices: list[Tensor], wanted: Tensor, labels: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    device = torch.device("cpu") if matrices[0].device.type == "mps" else matrices[0].device  # mps has no float64
    W = torch.stack([weight.to(device, torch.float64) for weight in matrices])  # (C, O, I)
    for label, finite in zip(labels, W.isfinite().all(dim=2).all(dim=1).tolist(), strict=True):
        if not finite:
            raise ModelError(f"matrix {label} holds NaN or infinity; repair or reload the model's weights")
    wide = W.shape[1] < W.shape[2]
    A = W.mT if wide else W  # (C, P, m)
    sigma, A_left, A_right = _tall_svd(A, wanted.to(device))
    left, right = (A_right, A_left) if wide else (A_left, A_right)
    signs = _signs(right)
    return sigma, left * signs, right * signs


def _tall_svd(A: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values (C, m), left rows (C, K, P) and right rows (C, K, m) of A (C, P, m), P ≥ m."""
    V = torch.linalg.eigh(A.mT @ A).eigenvectors.flip(-1)  # (C, m, m), descending
    B = A @ V  # (C, P, m): columns σ_k u_k
    sigma = B.norm(dim=-2)  # (C, m)
    for c in (sigma.amin(-1) <= _TAIL * sigma.amax(-1)).nonzero().flatten().tolist():
        _solve_tail(V[c], B[c], sigma[c])
    sigma, order = sigma.sort(dim=-1, descending=True, stable=True)
    index = order.gather(1, wanted.sort(dim=1).values)  # (C, K), strongest first
    left = _orthonormal(_columns(B, index))  # (C, P, K)
    for c in (sigma[:, -1] < _DEFICIENT * sigma[:, 0]).logical_or(sigma[:, 0] == 0).nonzero().flatten().tolist():
        left[c] = _orthonormal(B[c][:, order[c]])[:, wanted[c].sort().values]
    back = wanted.argsort(dim=1).argsort(dim=1)  # from strongest first to the order asked for
    return sigma, _columns(left, back).mT, _columns(_columns(V, index), back).mT


def _solve_tail(V: Tensor, B: Tensor, sigma: Tensor) -> None:
    """Separate, in place, the directions of one matrix below `_TAIL`·σ1 by the Gram matrix of their own block."""
    tail = (sigma <= _TAIL * sigma.amax()).nonzero().flatten()
    block = B[:, tail]  # (P, t)
    turn = torch.linalg.eigh(block.mT @ block).eigenvectors  # (t, t)
    V[:, tail] = V[:, tail] @ turn
    B[:, tail] = block @ turn
    sigma[tail] = B[:, tail].norm(dim=0)


def _orthonormal(B: Tensor) -> Tensor:
    """Orthonormal columns with the directions of B's (..., P, K), each made orthogonal to those before it.

    Householder QR: columns that are zero become an orthonormal completion.
    """
    Q, R = torch.linalg.qr(B)
    flip: Tensor = R.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) < 0
    return torch.where(flip, -Q, Q)


def _columns(X: Tensor, index: Tensor) -> Tensor:
    """Columns ``index`` (C, K) of X (C, R, N) as (C, R, K)."""
    return X.gather(2, index.unsqueeze(1).expand(-1, X.shape[1], -1))


def _signs(V: Tensor) -> Tensor:
    """±1 for each row of V (C, K, I), as (C, K, 1): makes its first entry of largest magnitude positive."""
    magnitude = V.abs()
    largest = magnitude >= (1 - _SIGN_TIE) * magnitude.amax(-1, keepdim=True)
    first = largest.to(torch.uint8).argmax(-1, keepdim=True)  # argmax returns the first of equals
    return torch.where(V.gather(-1, first) < 0, -1.0, 1.0).to(V.dtype)
