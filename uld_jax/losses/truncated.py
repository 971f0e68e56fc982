"""The distance to a teacher of which only the largest probabilities are known, with its bounds."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from uld_jax.losses.level_set import level_set_distance
from uld_jax.losses.probabilities import check_leading_axes, scaled
from uld_jax.losses.sorting import sort_distance
from uld_jax.losses.uld import resolve_method

__all__ = ["truncated_uld"]


def truncated_uld(
    student_logits: ArrayLike,
    teacher_probs_sorted: ArrayLike,
    teacher_tail_mass: ArrayLike,
    *,
    student_temperature: ArrayLike = 1.0,
    method: str = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The distance to the teacher's K largest probabilities and tail mass, and where d must lie.

    With r_p the teacher's mass past its K largest, r_q the student's past its own K largest, and
    A = Σ_{k ≤ K} |q↓_k − p↓_k|,

        A + |r_p − r_q| ≤ d ≤ A + r_p + r_q,

    because the dropped parts differ by at least the difference of their masses and at most by
    their sum; and d ≥ d̂ − r_p, d̂ = A + r_q being the distance to the teacher without its tail,
    because d is a metric. The value is A + max(r_p, r_q), the middle of the first interval. With
    nothing dropped (K = U, a tail mass of 0) the three are one number, the exact distance.

    Args:
        student_logits: [*b, V], any float type.
        teacher_probs_sorted: [*b, K], the teacher's largest probabilities, descending. A row of
            which fewer are known, or there are fewer, is padded with zeros, and has its own
            smaller K. No gradient flows to them.
        teacher_tail_mass: [*b], the sum of the teacher's other probabilities.
        student_temperature: scalar divisor of the student's logits.
        method: see `uld`. With "level_set" its error bound is part of the interval.

    Returns:
        (value, lower, upper), each f32[*b] (f64 where an input is f64); the bounds hold up to the
        rounding of sums, below 1e-6 in f32. Only the value is differentiable.

    Raises:
        ValueError: for an unknown method, leading axes that differ, or K = 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses import truncated_uld
        >>> student = jnp.log(jnp.array([0.5, 0.3, 0.1, 0.1]))
        >>> result = truncated_uld(student, jnp.array([0.7, 0.2]), jnp.array(0.1))
        >>> [round(float(x), 2) for x in result]
        [0.5, 0.4, 0.6]
    """
    student_V, teacher_K = scaled(student_logits, student_temperature), scaled(teacher_probs_sorted)
    check_leading_axes(student_V, teacher_K)
    tail_mass = lax.stop_gradient(scaled(teacher_tail_mass))
    if tail_mass.shape != teacher_K.shape[:-1]:
        raise ValueError(
            f"teacher_tail_mass: expected shape {teacher_K.shape[:-1]}, got {tail_mass.shape}"
        )
    if teacher_K.shape[-1] == 0:
        raise ValueError("teacher_probs_sorted: expected at least 1 probability, got 0")
    method = resolve_method(method, student_V.shape[-1], teacher_K.shape[-1])
    if method == "sort":
        without_tail, error_bound = sort_distance(student_V, teacher_K, of_logits=False), 0.0
    else:
        without_tail, error_bound = level_set_distance(student_V, teacher_K, of_logits=False)
    # Each row's own K: past it the tail mass lies, and not the zeros that pad a batch.
    counts = (teacher_K > 0).sum(-1)
    student_tail = _mass_past(jax.nn.softmax(student_V), counts, teacher_K.shape[-1])
    value = without_tail + jnp.where(tail_mass > student_tail, tail_mass - student_tail, 0)
    missing = jnp.abs(tail_mass - student_tail) - student_tail
    lower = jnp.maximum(without_tail + jnp.maximum(missing, -tail_mass), 0)
    upper = jnp.minimum(without_tail + error_bound + tail_mass, 2)
    return value, lax.stop_gradient(lower), lax.stop_gradient(upper)


def _mass_past(probs_V: jax.Array, counts: jax.Array, most: int) -> jax.Array:
    """The sum of all but the `counts` largest, at most `most`; its gradient needs no permutation.

    A row of all zeros has a count of 0.
    """
    vocab = probs_V.shape[-1]
    largest = lax.stop_gradient(lax.top_k(probs_V, min(most, vocab))[0])
    # The last of the row's own; a minimum, for a TPU looks up one element at a time.
    rank = lax.broadcasted_iota(jnp.int32, largest.shape, largest.ndim - 1)
    own = rank < jnp.maximum(counts, 1)[..., None]
    least = jnp.where(own, largest, jnp.inf).min(-1, keepdims=True)
    above, tied = probs_V > least, probs_V == least
    # Which of several tied at the border are among the largest is not decided: each is in part.
    dropped = above.sum(-1, keepdims=True) + tied.sum(-1, keepdims=True) - counts[..., None]
    share = jnp.maximum(dropped, 0) / tied.sum(-1, keepdims=True)
    past = (probs_V * jnp.where(above, 0, jnp.where(tied, share, 1))).sum(-1)
    return jnp.where(counts < vocab, past, 0)
