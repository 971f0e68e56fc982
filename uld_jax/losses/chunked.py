"""A loss over hidden · headᵀ computed a chunk of positions at a time, gradients included.

The forward pass of a differentiated call computes the gradients too, chunk by chunk, so that logits
never outlive their chunk and the backward pass has nothing to recompute: it multiplies by the
cotangent.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from uld_jax.losses.probabilities import varying_axes, zeros_like

__all__ = ["Chunks", "chunked_head_loss", "product"]


@dataclass(frozen=True)
class Chunks:
    """What is computed for a chunk, and how large it is.

    Attributes:
        objective: (logits [*b, C, V], positions, constants) -> the parts whose sum is the loss,
            f32[k]. Hashable: it is a static argument of the compiled function.
        size: C.
        compute_dtype: type of the factors of the products with the head.
    """

    objective: Callable[[jax.Array, Any, Any], jax.Array]
    size: int
    compute_dtype: jnp.dtype


def chunked_head_loss(
    chunks: Chunks, hidden: jax.Array, head: jax.Array, positions: Any, constants: Any
) -> tuple[jax.Array, jax.Array]:
    """Sums an objective over all positions, `chunks.size` of them at a time.

    Under `jax.shard_map` (check_vma=True) each gradient is summed over the mesh axes along which
    its array is replicated. The axes *b stay whole inside a chunk, so a batch axis sharded over
    devices stays sharded.

    Args:
        chunks: the objective.
        hidden: [*b, N, D].
        head: [V, D]; inside shard_map possibly a shard of it.
        positions: a tree of arrays [*b, N, ...] that the objective sees a chunk of.
        constants: a tree that the objective sees whole.

    Returns:
        (total, parts): parts f32[k] summed over all positions, and their sum. Only the total is
        differentiable, and only with respect to `hidden` and `head`.

    Example:
        >>> import jax.numpy as jnp
        >>> chunks = Chunks(lambda logits, _, scale: scale * logits.sum()[None], 2, jnp.float32)
        >>> hidden, head = jnp.ones((3, 2)), jnp.ones((4, 2))
        >>> total, parts = chunked_head_loss(chunks, hidden, head, jnp.zeros(3), 0.5)
        >>> float(total), parts.tolist()
        (12.0, [12.0])
    """
    return _compiled(chunks, hidden, head, positions, constants)


@dataclass(frozen=True)
class _Grad:
    """A gradient, and the mesh axes that it is still to be summed over."""

    array: jax.Array
    sum_over: tuple[str, ...]

    @classmethod
    def of(cls, primal: jax.Array, grad: jax.Array) -> "_Grad":
        axes = varying_axes(jax.typeof(grad)) - varying_axes(jax.typeof(primal))
        return cls(grad.astype(primal.dtype), tuple(sorted(axes)))

    def times(self, cotangent: jax.Array) -> jax.Array:
        grad = (cotangent * self.array).astype(self.array.dtype)
        return lax.psum(grad, self.sum_over) if self.sum_over else grad


jax.tree_util.register_dataclass(_Grad, data_fields=["array"], meta_fields=["sum_over"])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(
    chunks: Chunks, hidden: jax.Array, head: jax.Array, positions: Any, constants: Any
) -> tuple[jax.Array, jax.Array]:
    parts, _ = _scan(chunks, hidden, head, positions, constants, differentiate=False)
    return parts.sum(), parts


def _forward(
    chunks: Chunks, hidden: jax.Array, head: jax.Array, positions: Any, constants: Any
) -> tuple[tuple[jax.Array, jax.Array], tuple[_Grad, _Grad]]:
    parts, (hidden_chunks, head_grad) = _scan(
        chunks, hidden, head, positions, constants, differentiate=True
    )
    hidden_grad = _unchunk(hidden_chunks, hidden.ndim - 2, hidden.shape[-2])
    return (parts.sum(), parts), (_Grad.of(hidden, hidden_grad), _Grad.of(head, head_grad))


def _backward(
    chunks: Chunks, grads: tuple[_Grad, _Grad], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None]:
    del chunks
    hidden_grad, head_grad = (grad.times(cotangents[0]) for grad in grads)
    return hidden_grad, head_grad, None, None


_loss.defvjp(_forward, _backward)
_compiled = jax.jit(_loss, static_argnums=0)


def _scan(
    chunks: Chunks,
    hidden: jax.Array,
    head: jax.Array,
    positions: Any,
    constants: Any,
    *,
    differentiate: bool,
) -> tuple[jax.Array, tuple]:
    """The parts and, if asked for, the gradients of the total: by chunk [n, *b, C, D], and [V, D].

    The product with the head is differentiated by hand, because the head's gradient is a sum over
    chunks that must be kept in f32 whatever the type of the factors.
    """
    head_VD = head.astype(chunks.compute_dtype)
    axis = hidden.ndim - 2

    def compute(chunk: tuple[jax.Array, Any]) -> tuple[tuple, jax.Array | None]:
        hidden_CD, here = chunk[0].astype(head_VD.dtype), chunk[1]
        logits_CV = product(hidden_CD, head_VD.T)
        if not differentiate:
            return (chunks.objective(logits_CV, here, constants), None), None

        def total(logits_CV: jax.Array) -> tuple[jax.Array, jax.Array]:
            own = chunks.objective(logits_CV, here, constants)
            return own.sum(), own

        grad_CV, own = jax.grad(total, has_aux=True)(logits_CV)
        grad_CV = grad_CV.astype(head_VD.dtype)
        # Of rows alone: with several axes to sum over XLA's CPU compiler transposes the factors.
        grad_RV, hidden_RD = (x.reshape(-1, x.shape[-1]) for x in (grad_CV, hidden_CD))
        head_grad = product(grad_RV, hidden_RD, ((0,), (0,)))
        return (own, head_grad), product(grad_CV, head_VD).astype(hidden.dtype)

    def step(total: tuple, chunk: tuple[jax.Array, Any]) -> tuple[tuple, jax.Array | None]:
        own, hidden_grad = compute(chunk)
        return jax.tree.map(jnp.add, total, own), hidden_grad

    xs = _chunk((hidden, positions), axis, chunks.size)
    first = jax.tree.map(lambda x: x[0], xs)
    if len(xs[0]) == 1:
        (parts, head_grad), hidden_grad = compute(first)
        hidden_grads = None if hidden_grad is None else hidden_grad[None]
    else:
        start = jax.tree.map(zeros_like, jax.eval_shape(lambda: compute(first)[0]))
        (parts, head_grad), hidden_grads = lax.scan(step, start, xs)
    return parts, (hidden_grads, head_grad)


def product(
    left: jax.Array,
    right: jax.Array,
    contract: tuple[tuple[int, ...], tuple[int, ...]] = ((-1,), (0,)),
) -> jax.Array:
    """A tensor product that accumulates in float32 or wider.

    Args:
        left: any array.
        right: any array.
        contract: the axes of each to sum over.

    Returns:
        f32 (f64 for f64 factors).

    Example:
        >>> import jax.numpy as jnp
        >>> product(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 2), jnp.bfloat16)).dtype
        dtype('float32')
    """
    dtype = jnp.promote_types(jnp.result_type(left, right), jnp.float32)
    return jnp.tensordot(left, right, contract, preferred_element_type=dtype)


def _chunk(tree: Any, axis: int, size: int) -> Any:
    """[*b, N, …] -> [n, *b, size, …] with n = ⌈N / size⌉; the padding is zero."""

    def split(x: jax.Array) -> jax.Array:
        count = max(1, math.ceil(x.shape[axis] / size))
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, count * size - x.shape[axis])
        shape = (*x.shape[:axis], count, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(x, widths).reshape(shape), axis, 0)

    return jax.tree.map(split, tree)


def _unchunk(chunks: jax.Array, axis: int, length: int) -> jax.Array:
    """The inverse of `_chunk`: [n, *b, C, D] -> [*b, N, D]."""
    x = jnp.moveaxis(chunks, 0, axis)
    x = x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], x.shape[-1])
    return lax.slice_in_dim(x, 0, length, axis=axis)
