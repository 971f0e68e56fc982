"""Cross-entropy with label smoothing and z-loss, over whole or sharded vocabularies."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from uld_jax.losses.chunked import Chunks, chunked_head_loss
from uld_jax.losses.probabilities import log_normalizer, psum, scaled

__all__ = ["cross_entropy", "fused_cross_entropy"]


def cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    axis_name: str | None = None,
) -> jax.Array:
    """Cross-entropy of each position, not reduced.

    CE = Z − (1 − ε) · logit_target − ε · mean_v logit_v + z · Z², Z = log Σ_v exp(logit_v);
    the mean is over the entries that are not −inf.

    optax has the loss without z-loss, without masked entries and without sharded vocabularies.

    Args:
        logits: [*b, V], or this device's shard of it; bf16, f16 and f32 are computed in f32.
        targets: i32[*b], token ids in the whole vocabulary.
        label_smoothing: ε, in [0, 1). No gradient flows to it.
        z_loss: z, the weight of Z². No gradient flows to it.
        axis_name: the mapped axis that the vocabulary is sharded over, or None.

    Returns:
        f32[*b] (f64 for f64 logits); the same on every shard.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses.cross_entropy import cross_entropy
        >>> round(float(cross_entropy(jnp.zeros(4), jnp.array(2))), 4)
        1.3863

    Reference:
        z-loss: Chowdhery et al., "PaLM", arXiv 2204.02311, section 5. Label smoothing: Szegedy
        et al., arXiv 1512.00567, section 7.
    """
    logits = scaled(logits)
    share, weight = (jnp.asarray(x, logits.dtype) for x in (label_smoothing, z_loss))
    return _cross_entropy(axis_name, logits, jnp.asarray(targets), share, weight)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(
    axis_name: str | None, logits_V: jax.Array, targets: jax.Array, *options: jax.Array
) -> jax.Array:
    return _forward(axis_name, logits_V, targets, *options)[0]


def _forward(
    axis_name: str | None, logits_V: jax.Array, targets: jax.Array, *options: jax.Array
) -> tuple[jax.Array, jax.Array]:
    smoothing, z_weight = options
    width = logits_V.shape[-1]
    first = 0 if axis_name is None else lax.axis_index(axis_name) * width
    ids = first + lax.broadcasted_iota(targets.dtype, logits_V.shape, logits_V.ndim - 1)
    hit, known = ids == targets[..., None], logits_V > -jnp.inf

    normalizer = log_normalizer(logits_V, axis_name)
    known_count, target_logit, logit_sum = (
        psum(x.sum(-1, keepdims=True), axis_name)
        for x in (
            known.astype(logits_V.dtype),
            jnp.where(hit, logits_V, 0),
            jnp.where(known, logits_V, 0),
        )
    )
    loss = normalizer - (1 - smoothing) * target_logit - smoothing * logit_sum / known_count
    # In this order a weight of 0 stays 0 where the square is infinite.
    loss += z_weight * normalizer * normalizer
    grad = (1 + 2 * z_weight * normalizer) * jnp.exp(logits_V - normalizer)
    grad -= (1 - smoothing) * hit + smoothing * known / known_count
    return loss[..., 0], grad


def _backward(axis_name: str | None, grad: jax.Array, cotangent: jax.Array) -> tuple:
    del axis_name
    return cotangent[..., None] * grad, None, None, None


_cross_entropy.defvjp(_forward, _backward)


def fused_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    weights: jax.Array,
    softcap: float | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    chunk_size: int = 32,
    compute_dtype: DTypeLike | None = None,
) -> jax.Array:
    """The weighted sum of CE from hidden states, without [*b, N, V] ever in memory.

    What `fused_uld_cross_entropy` computes where there is no teacher.

    Args:
        hidden: [*b, N, D], the last hidden states.
        head: [V, D], the output embedding.
        targets: i32[*b, N], token ids in [0, V); any value where `weights` is 0.
        weights: f32[*b, N]; 0 leaves a position out.
        softcap: bound of the logits; None for no bound.
        label_smoothing: see `cross_entropy`.
        z_loss: see `cross_entropy`.
        chunk_size: positions of the N axis that are computed at a time.
        compute_dtype: type of the factors of the matrix products, which accumulate in f32 or wider;
            None takes what hidden states and head promote to.

    Returns:
        f32[], differentiable with respect to `hidden` and `head`.

    Raises:
        ValueError: for a chunk_size below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses.cross_entropy import fused_cross_entropy
        >>> loss = fused_cross_entropy(
        ...     jnp.zeros((3, 2)), jnp.zeros((4, 2)), jnp.array([0, 1, 2]), weights=jnp.ones(3) / 3)
        >>> round(float(loss), 4)
        1.3863
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    dtype = jnp.result_type(hidden, head) if compute_dtype is None else compute_dtype
    chunks = Chunks(_Weighted(softcap), min(chunk_size, targets.shape[-1]), jnp.dtype(dtype))
    positions = (jnp.where(weights != 0, targets, 0), weights)
    return chunked_head_loss(chunks, hidden, head, positions, (label_smoothing, z_loss))[0]


@dataclass(frozen=True)
class _Weighted:
    """[Σ weights · CE] of a chunk."""

    softcap: float | None

    def __call__(self, logits_CV: jax.Array, positions: tuple, constants: tuple) -> jax.Array:
        targets_C, weights_C = positions
        label_smoothing, z_loss = constants
        if self.softcap is not None:
            logits_CV = self.softcap * jnp.tanh(logits_CV / self.softcap)
        ce_C = cross_entropy(logits_CV, targets_C, label_smoothing=label_smoothing, z_loss=z_loss)
        # A position left out may hold anything: 0 · inf would bring it back.
        return jnp.where(weights_C != 0, weights_C * ce_C, 0).sum()[None]
