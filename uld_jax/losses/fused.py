"""Cross-entropy and ULD from hidden states, a chunk of positions at a time.

Logits are never held for more than one chunk. The forward pass of a differentiated call computes
the gradients too, chunk by chunk, so that the backward pass has nothing to recompute: it multiplies
them by the cotangent.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import DTypeLike

from uld_jax.losses.uld import check_method, sorted_probabilities, uld_to_sorted

__all__ = ["FusedLoss", "fused_uld_cross_entropy"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FusedLoss:
    """Weighted sums over all positions, each a scalar.

    Attributes:
        total: cross_entropy + uld; the only differentiable field.
        cross_entropy: Σ ce_weights · CE, for the log: no gradient.
        uld: Σ uld_weights · ULD, for the log: no gradient.
    """

    total: jax.Array
    cross_entropy: jax.Array
    uld: jax.Array


def fused_uld_cross_entropy(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    targets: jax.Array,
    *,
    ce_weights: jax.Array,
    uld_weights: jax.Array,
    student_temperature: float | jax.Array = 1.0,
    teacher_temperature: float | jax.Array = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    method: str = "auto",
    chunk_size: int = 32,
    compute_dtype: DTypeLike | None = None,
) -> FusedLoss:
    """Weighted sums of CE and ULD, with neither [*b, N, V] nor [*b, N, U] ever in memory.

    logits = cap(hidden · headᵀ), cap(x) = softcap · tanh(x / softcap);
    total = Σ_n ce_weights_n · CE(student_n, targets_n) + uld_weights_n · d(student_n, teacher_n).

    The weights carry λ and the normalisers. Only `total` is differentiable, and only with respect
    to `student_hidden` and `student_head`. Extra memory: O(|b| · chunk_size · (V + U)) and, where
    differentiated, the head's gradient in f32; it does not grow with N. The axes *b stay whole
    inside a chunk, so a batch axis sharded over devices stays sharded. jax.shard_map needs
    check_vma=False around it.

    Args:
        student_hidden: [*b, N, D], the student's last hidden states.
        student_head: [V, D], the student's output embedding.
        teacher_hidden: [*b, N, E], aligned with the student's, position by position.
        teacher_head: [U, E].
        targets: i32[*b, N], token ids in [0, V); any value where `ce_weights` is 0.
        ce_weights: f32[*b, N]; 0 leaves a position out.
        uld_weights: f32[*b, N]; 0 leaves a position out.
        student_temperature: divisor of the student's logits in the distance (not in the CE).
        teacher_temperature: divisor of the teacher's logits.
        student_softcap: bound of the student's logits; None for no bound.
        teacher_softcap: bound of the teacher's logits; None for no bound.
        method: how to compute the distance, see `uld`.
        chunk_size: positions of the N axis that are computed at a time.
        compute_dtype: type of the factors of the matrix products, which accumulate in f32 or wider;
            None takes what hidden states and head promote to.

    Returns:
        The total and its two parts.

    Raises:
        ValueError: for an unknown method, shapes that do not match, or a chunk_size below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses import fused_uld_cross_entropy
        >>> hidden, ones = jnp.zeros((3, 2)), jnp.ones(3)
        >>> loss = fused_uld_cross_entropy(
        ...     hidden, jnp.zeros((4, 2)), hidden, jnp.zeros((8, 2)), jnp.array([0, 1, 2]),
        ...     ce_weights=ones / 3, uld_weights=1.5 * ones / 3)
        >>> round(float(loss.cross_entropy), 4), float(loss.uld), round(float(loss.total), 4)
        (1.3863, 1.5, 2.8863)
    """
    check_method(method)
    leading = targets.shape
    _check_shape("student_hidden", student_hidden, (*leading, student_head.shape[-1]))
    _check_shape("teacher_hidden", teacher_hidden, (*leading, teacher_head.shape[-1]))
    _check_shape("ce_weights", ce_weights, leading)
    _check_shape("uld_weights", uld_weights, leading)
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")

    static = _Static(
        chunk_size=max(1, min(chunk_size, leading[-1])),
        student=_Head(student_softcap, _dtype(compute_dtype, student_hidden, student_head)),
        teacher=_Head(teacher_softcap, _dtype(compute_dtype, teacher_hidden, teacher_head)),
    )
    positions = _Positions(
        teacher_hidden, jnp.where(ce_weights != 0, targets, 0), ce_weights, uld_weights
    )
    frozen = (positions, teacher_head, student_temperature, teacher_temperature)
    total, cross_entropy, uld = _compiled(static, student_hidden, student_head, frozen)
    return FusedLoss(total, lax.stop_gradient(cross_entropy), lax.stop_gradient(uld))


class _Head(NamedTuple):
    """How logits are made of hidden states."""

    softcap: float | None
    compute_dtype: jnp.dtype


class _Static(NamedTuple):
    chunk_size: int
    student: _Head
    teacher: _Head


class _Positions(NamedTuple):
    """What varies along N besides the student's hidden states."""

    teacher_hidden: jax.Array
    targets: jax.Array
    ce_weights: jax.Array
    uld_weights: jax.Array


_Frozen = tuple[_Positions, jax.Array, float | jax.Array, float | jax.Array]
_Losses = tuple[jax.Array, jax.Array, jax.Array]
_Grads = tuple[jax.Array, jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(static: _Static, hidden: jax.Array, head: jax.Array, frozen: _Frozen) -> _Losses:
    losses, _ = _scan_chunks(static, hidden, head, frozen, differentiate=False)
    return losses


def _fused_fwd(
    static: _Static, hidden: jax.Array, head: jax.Array, frozen: _Frozen
) -> tuple[_Losses, _Grads]:
    losses, (hidden_grads, head_grad) = _scan_chunks(
        static, hidden, head, frozen, differentiate=True
    )
    axis = frozen[0].targets.ndim - 1
    return losses, (_unchunk(hidden_grads, axis, hidden.shape[axis]), head_grad.astype(head.dtype))


def _fused_bwd(
    static: _Static, grads: _Grads, cotangents: _Losses
) -> tuple[jax.Array, jax.Array, None]:
    hidden_grad, head_grad = ((cotangents[0] * g).astype(g.dtype) for g in grads)
    return hidden_grad, head_grad, None


_fused.defvjp(_fused_fwd, _fused_bwd)
_compiled = jax.jit(_fused, static_argnums=0)


def _scan_chunks(
    static: _Static, hidden: jax.Array, head: jax.Array, frozen: _Frozen, *, differentiate: bool
) -> tuple[_Losses, tuple]:
    """The losses and, if asked for, the gradients of the total: by chunk [n, *b, C, D], and [V, D].

    The product with the head is differentiated by hand, because the head's gradient is a sum over
    chunks that must be kept in f32 whatever the type of the factors.
    """
    positions, teacher_head, student_temp, teacher_temp = frozen
    head_VD = head.astype(static.student.compute_dtype)
    head_UE = teacher_head.astype(static.teacher.compute_dtype)
    losses = partial(_weighted_sums, softcap=static.student.softcap, temperature=student_temp)

    def step(carry: tuple, chunk: tuple[jax.Array, _Positions]) -> tuple[tuple, jax.Array | None]:
        sums, head_grad = carry
        hidden_CD, here = chunk[0].astype(head_VD.dtype), chunk[1]
        teacher_CU = _product(here.teacher_hidden.astype(head_UE.dtype), head_UE.T)
        probs_CU = sorted_probabilities(_capped(teacher_CU, static.teacher.softcap), teacher_temp)
        logits_CV = _product(hidden_CD, head_VD.T)
        if not differentiate:
            return (sums + losses(logits_CV, probs_CU, here)[1], None), None
        grad_CV, parts = jax.grad(losses, has_aux=True)(logits_CV, probs_CU, here)
        grad_CV = grad_CV.astype(head_VD.dtype)
        over = tuple(range(grad_CV.ndim - 1))
        head_grad += _product(grad_CV, hidden_CD, (over, over))
        return (sums + parts, head_grad), _product(grad_CV, head_VD).astype(hidden.dtype)

    dtype = _accumulator(head_VD.dtype)
    start = jnp.zeros(2, dtype), jnp.zeros(head.shape, dtype) if differentiate else None
    chunks = _chunk((hidden, positions), positions.targets.ndim - 1, static.chunk_size)
    (sums, head_grad), hidden_grads = lax.scan(step, start, chunks)
    return (sums.sum(), sums[0], sums[1]), (hidden_grads, head_grad)


def _weighted_sums(
    logits_CV: jax.Array,
    probs_sorted_CU: jax.Array,
    positions: _Positions,
    *,
    softcap: float | None,
    temperature: float | jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The total of one chunk, and [cross-entropy, distance]; the logits are not yet capped."""
    logits_CV = _capped(logits_CV, softcap)
    ce_C = optax.softmax_cross_entropy_with_integer_labels(logits_CV, positions.targets)
    uld_C = uld_to_sorted(logits_CV, probs_sorted_CU, student_temperature=temperature)
    ce_sum, uld_sum = (positions.ce_weights * ce_C).sum(), (positions.uld_weights * uld_C).sum()
    parts = jnp.stack([ce_sum, uld_sum]).astype(logits_CV.dtype)
    return parts.sum(), parts


def _product(
    left: jax.Array,
    right: jax.Array,
    contract: tuple[tuple[int, ...], tuple[int, ...]] = ((-1,), (0,)),
) -> jax.Array:
    dtype = _accumulator(jnp.result_type(left, right))
    return jnp.tensordot(left, right, contract, preferred_element_type=dtype)


def _accumulator(dtype: DTypeLike) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _capped(logits: jax.Array, softcap: float | None) -> jax.Array:
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _chunk(tree: tuple, axis: int, size: int) -> tuple:
    """[*b, N, …] -> [n, *b, size, …] with n = ⌈N / size⌉; the padding is zero, its weights too."""

    def split(x: jax.Array) -> jax.Array:
        count = math.ceil(x.shape[axis] / size)
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, count * size - x.shape[axis])
        shape = (*x.shape[:axis], count, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(x, widths).reshape(shape), axis, 0)

    return jax.tree.map(split, tree)


def _unchunk(chunks: jax.Array, axis: int, length: int) -> jax.Array:
    """The inverse of `_chunk`: [n, *b, C, D] -> [*b, N, D]."""
    x = jnp.moveaxis(chunks, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, x.shape[-1])
    return lax.slice_in_dim(x, 0, length, axis=axis)


def _dtype(requested: DTypeLike | None, hidden: jax.Array, head: jax.Array) -> jnp.dtype:
    return jnp.dtype(jnp.result_type(hidden, head) if requested is None else requested)


def _check_shape(name: str, array: jax.Array, expected: tuple[int, ...]) -> None:
    if array.shape != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {array.shape}")
