"""The distance by `jax.lax.sort`: exact, and the ranks that its derivative needs.

Two savings over the definition:

- Probabilities are never negative, so their bit patterns, read as integers, have the same order.
  An unstable sort of a single integer array is 4 times as fast on a CPU as a float sort and drags
  no index array along on a TPU.
- The derivative with respect to a probability is a sign that depends only on the probability's
  rank, so the backward pass needs ranks, not a differentiated sort.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from uld_jax.losses.probabilities import by_row, check_leading_axes, fit, scaled

__all__ = ["sort_distance", "sorted_l1", "sorted_probabilities"]


def sorted_probabilities(logits: ArrayLike, temperature: ArrayLike = 1.0) -> jax.Array:
    """Softmax probabilities in descending order: all that the distance needs of a teacher.

    sort↓(softmax(logits / T)). No gradient flows back to the logits.

    Args:
        logits: [*b, U], any float type.
        temperature: scalar divisor of the logits.

    Returns:
        f32[*b, U] (f64 for f64 logits), descending along the last axis.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses import sorted_probabilities
        >>> [round(float(p), 2) for p in sorted_probabilities(jnp.log(jnp.array([1.0, 3.0])))]
        [0.75, 0.25]
    """
    probs_U = jax.nn.softmax(lax.stop_gradient(scaled(logits, temperature)))
    return _probabilities(_sort(_descending_keys(probs_U)))


def sort_distance(logits_V: jax.Array, teacher_U: jax.Array, *, of_logits: bool) -> jax.Array:
    """The distance from scaled logits.

    Args:
        logits_V: f32[*b, V] or f64.
        teacher_U: [*b, U], scaled logits, or probabilities sorted in descending order. No gradient
            flows to them.
        of_logits: whether the teacher's are logits.

    Returns:
        [*b].

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses.sorting import sort_distance
        >>> float(sort_distance(jnp.zeros(4), jnp.array([1.0]), of_logits=False))
        1.5
    """
    dtype = jnp.promote_types(logits_V.dtype, teacher_U.dtype)
    return _compiled(of_logits, logits_V.astype(dtype), lax.stop_gradient(teacher_U).astype(dtype))


# Both sides of a row in one body: a CPU sorts the student's on one core and the teacher's on the
# other, and runs of ties are looked at only in rows that have them.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _distance(of_logits: bool, logits_V: jax.Array, teacher_U: jax.Array) -> jax.Array:
    def value(logits_V: jax.Array, teacher_U: jax.Array) -> jax.Array:
        p = sorted_probabilities(teacher_U) if of_logits else teacher_U
        q = _probabilities(_sort(_descending_keys(jax.nn.softmax(logits_V))))
        return _total_gap(q - fit(p, q.shape[-1]), p)

    return by_row("(v),(u)->()", value)(logits_V, teacher_U)


def _distance_fwd(
    of_logits: bool, logits_V: jax.Array, teacher_U: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def value_and_grad(logits_V: jax.Array, teacher_U: jax.Array) -> tuple[jax.Array, jax.Array]:
        p = sorted_probabilities(teacher_U) if of_logits else teacher_U
        q = jax.nn.softmax(logits_V)
        gaps, signs = _gaps_and_signs(q, fit(p, q.shape[-1]))
        # The softmax Jacobian is applied here, so that one [*b, V] array is kept and not two.
        return _total_gap(gaps, p), q * (signs - (q * signs).sum(-1, keepdims=True))

    return by_row("(v),(u)->(),(v)", value_and_grad)(logits_V, teacher_U)


def _distance_bwd(of_logits: bool, grad: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, None]:
    del of_logits
    return cotangent[..., None] * grad, None


_distance.defvjp(_distance_fwd, _distance_bwd)
_compiled = jax.jit(_distance, static_argnums=0)


def sorted_l1(student_probs: jax.Array, teacher_probs: jax.Array) -> jax.Array:
    """The L1 distance of two vectors of any mass, both sorted, not reduced.

    d = Σ_v |sort↓(q)_v − sort↓(p)_v|, the shorter side zero-padded.

    Args:
        student_probs: [*b, V], not negative.
        teacher_probs: [*b, U], not negative. No gradient flows to them.

    Returns:
        f32[*b] (f64 where either input is f64).

    Raises:
        ValueError: where the leading axes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses import sorted_l1
        >>> float(sorted_l1(jnp.array([0.0, 0.5]), jnp.array([0.25])))
        0.25
    """
    check_leading_axes(student_probs, teacher_probs)
    dtype = jnp.promote_types(jnp.result_type(student_probs, teacher_probs), jnp.float32)
    p_U = lax.stop_gradient(jnp.asarray(teacher_probs, dtype))
    return _l1(jnp.asarray(student_probs, dtype), _probabilities(_sort(_descending_keys(p_U))))


@jax.custom_vjp
def _l1(probs_V: jax.Array, probs_sorted_U: jax.Array) -> jax.Array:
    q = _probabilities(_sort(_descending_keys(probs_V)))
    return _total_gap(q - fit(probs_sorted_U, probs_V.shape[-1]), probs_sorted_U)


def _l1_fwd(probs_V: jax.Array, probs_sorted_U: jax.Array) -> tuple[jax.Array, jax.Array]:
    gaps, signs = _gaps_and_signs(probs_V, fit(probs_sorted_U, probs_V.shape[-1]))
    return _total_gap(gaps, probs_sorted_U), signs


# The residual is multiplied by the cotangent, whichever variable it is the derivative by.
_l1.defvjp(_l1_fwd, partial(_distance_bwd, False))


def _total_gap(gaps_V: jax.Array, probs_sorted_U: jax.Array) -> jax.Array:
    """Past the student's vocabulary the teacher only meets zeros: its tail mass is the gap."""
    return jnp.abs(gaps_V).sum(-1) + probs_sorted_U[..., gaps_V.shape[-1] :].sum(-1)


# For the sorts of both sides and the signs of a row of 151,936 (two cores, jax 0.10.2): 17.6 ms of
# CPU time with key and index packed into one 64-bit integer; 25 ms on the clock, with both cores,
# with the keys alone and two binary searches. A TPU has no 64-bit integers and scatters slowly: it
# sorts the signs back.
def _gaps_and_signs(q_V: jax.Array, p_sorted_V: jax.Array) -> tuple[jax.Array, jax.Array]:
    """q↓ − p↓ in sorted order, and the derivative by each q in q's own order."""
    if q_V.dtype == jnp.float64:
        return _match_by_sorts(q_V, p_sorted_V)
    return lax.platform_dependent(
        q_V, p_sorted_V, tpu=_match_by_sorts, default=_match_by_packed_sort
    )


def _match_by_packed_sort(q_V: jax.Array, p_sorted_V: jax.Array) -> tuple[jax.Array, jax.Array]:
    keys = _descending_keys(q_V)
    index, keys_sorted = _sort_packed(_ranks(keys), keys)
    gaps = _probabilities(keys_sorted) - p_sorted_V
    signs = jnp.sign(gaps)
    # The scans of a run of ties cost a quarter of a sort, and only matter where signs differ in it.
    differ = (keys_sorted[..., 1:] == keys_sorted[..., :-1]) & (signs[..., 1:] != signs[..., :-1])
    signs = lax.cond(differ.any(), _mean_over_ties, lambda _, signs: signs, keys_sorted, signs)

    def put_back(index: jax.Array, signs: jax.Array) -> jax.Array:
        at = jnp.zeros_like(signs).at[index]
        return at.set(signs, unique_indices=True, mode="promise_in_bounds")

    return gaps, by_row("(v),(v)->(v)", put_back)(index, signs)


def _sort_packed(index: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sorts by key, then by index: both as one 64-bit integer, key in the upper half.

    JAX makes no 64-bit arrays unless told to; here none gets out, nor any 64-bit constant that a
    later transformation would cut to 32 bits.
    """
    with jax.enable_x64(True):
        packed = lax.bitcast_convert_type(jnp.stack([index, keys], -1), jnp.int64)
        unpacked = lax.bitcast_convert_type(_sort(packed), jnp.int32)
    return unpacked[..., 0], unpacked[..., 1]


def _match_by_sorts(q_V: jax.Array, p_sorted_V: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same without gather or scatter; packs index and sign in 31 bits, so V < 2^28."""
    keys = _descending_keys(q_V)
    keys_sorted, index = lax.sort((keys, _ranks(keys)), is_stable=False, num_keys=1)
    gaps = _probabilities(keys_sorted) - p_sorted_V
    signs = _mean_over_ties(keys_sorted, jnp.sign(gaps))
    packed = index * 8 + (2 * signs).astype(jnp.int32) + 2
    signs = (_sort(packed) & 7) - 2
    return gaps, signs.astype(gaps.dtype) / 2


def _mean_over_ties(keys_sorted_V: jax.Array, signs_V: jax.Array) -> jax.Array:
    """Of each run of equal keys, the mean of the first sign and the last."""
    axis = keys_sorted_V.ndim - 1
    rank_and_sign = _ranks(keys_sorted_V) * 4 + signs_V.astype(jnp.int32) + 1
    one = jnp.ones_like(keys_sorted_V[..., :1], bool)
    ends = jnp.append(keys_sorted_V[..., 1:] != keys_sorted_V[..., :-1], one, axis=axis)
    starts = jnp.roll(ends, 1, axis)
    # Carry the sign at the start of a run forward and that at its end backward.
    first = lax.cummax(jnp.where(starts, rank_and_sign, 0), axis) & 3
    int_max = jnp.iinfo(jnp.int32).max
    last = lax.cummin(jnp.where(ends, rank_and_sign, int_max), axis, reverse=True) & 3
    return (first + last - 2).astype(signs_V.dtype) / 2


def _ranks(keys_V: jax.Array) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, keys_V.shape, keys_V.ndim - 1)


def _descending_keys(probs: jax.Array) -> jax.Array:
    """Integers that ascend where the non-negative floats descend."""
    # -0 would come first.
    return -lax.bitcast_convert_type(jnp.abs(probs), jnp.dtype(f"int{8 * probs.dtype.itemsize}"))


def _probabilities(keys: jax.Array) -> jax.Array:
    """The inverse of `_descending_keys`."""
    return lax.bitcast_convert_type(-keys, jnp.dtype(f"float{8 * keys.dtype.itemsize}"))


def _sort(keys: jax.Array) -> jax.Array:
    return lax.sort(keys, is_stable=False)
