"""The distance without a sort: O(V), with a certified error.

With N_q(t) = #{v : q_v > t}, and N_p likewise, the distance is the area between two counting
functions, d = ∫ |N_q(t) − N_p(t)| dt, and ∂d/∂q_v is the sign of D = N_q − N_p at t = q_v.

The axis of t is cut into buckets by the leading bits of a probability's bit pattern: `2**bits` of
them an octave, and one for all that lies under 2⁻⁴⁰. Counts by bucket give D at every edge. One
sign σ is chosen for a bucket, and the value is

    Σ_i σ_i ∫_i D dt = Σ_v σ(q_v) q_v − Σ_u σ(p_u) p_u + Σ_i e_i D_i (σ_{i−1} − σ_i)

with e_i the lower edge of bucket i and D_i the value of D there. That is exact wherever D keeps its
sign inside the bucket, whatever lies in it, and never more than d; what it can be short of d
follows from the counts. Counts over shards of a vocabulary just add up.

Where probabilities are large, few can share a bucket, so the same 32-bit word that counts them has
room for the sum of their places in the bucket; σ is then the sign of the integral itself.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from uld_jax.losses.probabilities import (
    by_row,
    check_leading_axes,
    psum,
    scaled,
    softmax,
)

__all__ = ["BUCKET_BITS", "level_set_distance", "level_set_uld"]

# Chosen from the measured curve in the README ("uld-jax bench level-set").
BUCKET_BITS = 7
_MAX_BITS = 14
_OCTAVES = 40
# At most 2¹¹ probabilities are above 2⁻¹¹: 12 bits count them, 20 bits add up 8-bit places.
_PLACED_OCTAVES, _COUNT_BITS, _PLACE_BITS = 11, 12, 8


def level_set_uld(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    student_temperature: ArrayLike = 1.0,
    teacher_temperature: ArrayLike = 1.0,
    bucket_bits: int = BUCKET_BITS,
) -> tuple[jax.Array, jax.Array]:
    """The distance of `uld` without a sort, and how far it can be from the exact one.

    d = ∫ |N_q(t) − N_p(t)| dt with N_q(t) = #{v : q_v > t}, over 2^bucket_bits buckets an octave;
    value ≤ d ≤ value + error_bound, up to the rounding of sums, which error_bound includes as
    4 ε log₂(V + U). ∂value/∂q_v is the sign of the bucket that q_v falls in, which is the exact
    sign(q_v − p↓_rank(v)) in every bucket where the sign does not change.

    Args:
        student_logits: [*b, V]; bf16, f16 and f32 are computed in f32, f64 in f64. An entry of
            −inf (a padded vocabulary) has probability 0.
        teacher_logits: [*b, U], likewise. No gradient flows to them.
        student_temperature: scalar divisor of the student's logits.
        teacher_temperature: scalar divisor of the teacher's logits.
        bucket_bits: log₂ of the buckets in an octave, 1 to 14: more is slower and more exact.

    Returns:
        (value, error_bound), each f32[*b] (f64 for f64 logits). No gradient flows from the bound.

    Raises:
        ValueError: for leading axes that differ, or bucket_bits out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses import level_set_uld
        >>> student, teacher = jnp.log(jnp.array([0.2, 0.7, 0.1])), jnp.log(jnp.array([0.6, 0.4]))
        >>> value, error_bound = level_set_uld(student, teacher)
        >>> round(float(value), 4), bool(error_bound < 1e-4)
        (0.4, True)

    Reference:
        Boizard et al., arXiv 2402.12030, section 3, for the distance; the area between the
        counting functions is the one-dimensional Wasserstein distance of the two multisets.
    """
    student_V = scaled(student_logits, student_temperature)
    teacher_U = lax.stop_gradient(scaled(teacher_logits, teacher_temperature))
    check_leading_axes(student_V, teacher_U)
    buckets = _buckets(bucket_bits, None)
    return _from_logits(buckets, student_V, teacher_U)


def level_set_distance(
    logits_V: jax.Array,
    probs_U: jax.Array,
    *,
    bucket_bits: int = BUCKET_BITS,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The same from logits already scaled to probabilities in any order, also over shards.

    Args:
        logits_V: f32[*b, V] or f64, scaled; the shard of it that this device holds if sharded.
        probs_U: [*b, U], summing to at most 1, in any order; or the shard of it.
        bucket_bits: log₂ of the buckets in an octave.
        axis_name: the mapped axis that both vocabularies are sharded over, or None.

    Returns:
        (value, error_bound), each [*b]; the same on every shard.

    Raises:
        ValueError: bucket_bits out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses.level_set import level_set_distance
        >>> round(float(level_set_distance(jnp.zeros(4), jnp.array([1.0]))[0]), 4)
        1.5
    """
    dtype = jnp.promote_types(logits_V.dtype, probs_U.dtype)
    buckets = _buckets(bucket_bits, axis_name)
    return _compiled(buckets, logits_V.astype(dtype), lax.stop_gradient(probs_U).astype(dtype))


@dataclass(frozen=True)
class _Buckets:
    """How the axis of probabilities is cut."""

    bits: int
    axis_name: str | None

    @property
    def count(self) -> int:
        return (_OCTAVES << self.bits) + 1

    @property
    def placed(self) -> int:
        """The first bucket whose members' places are added up."""
        return (_OCTAVES - _PLACED_OCTAVES) << self.bits

    def has_places(self) -> np.ndarray:
        return np.arange(self.count) >= self.placed

    def edges(self) -> np.ndarray:
        """The lower edge of each bucket and the upper edge of the last."""
        octave, step = np.divmod(np.arange(self.count + 1), 1 << self.bits)
        edges = np.ldexp(1 + step / (1 << self.bits), octave - _OCTAVES)
        # No probability lies above 1.
        edges[0], edges[-1] = 0, 1
        return edges

    def of(self, probs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The bucket of each probability, and the word that it adds there."""
        info = jnp.finfo(probs.dtype)
        pattern = lax.bitcast_convert_type(probs, jnp.dtype(f"int{info.bits}"))
        bias = (1 << (info.nexp - 1)) - 1
        bucket = (pattern >> (info.nmant - self.bits)) - ((bias - _OCTAVES) << self.bits)
        bucket = jnp.clip(bucket, 0, self.count - 1).astype(jnp.int32)
        place = pattern >> (info.nmant - self.bits - _PLACE_BITS)
        place = (place & ((1 << _PLACE_BITS) - 1)).astype(jnp.uint32)
        return bucket, jnp.where(bucket < self.placed, 0, place << _COUNT_BITS) + jnp.uint32(1)


def _buckets(bits: int, axis_name: str | None) -> _Buckets:
    if not 1 <= bits <= _MAX_BITS:
        raise ValueError(f"bucket_bits: expected 1 to {_MAX_BITS}, got {bits}")
    return _Buckets(bits, axis_name)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _distance(
    buckets: _Buckets, logits_V: jax.Array, probs_U: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _forward(buckets, logits_V, probs_U)[0]


def _forward(
    buckets: _Buckets, logits_V: jax.Array, probs_U: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Value and bound, and the value's gradient with respect to the logits."""
    total = partial(psum, axis_name=buckets.axis_name)
    q = softmax(logits_V, buckets.axis_name)
    words_q, words_p = (total(_histogram(buckets, probs)) for probs in (q, probs_U))
    choose = jnp.vectorize(partial(_signs, buckets, q.dtype), signature="(n),(n)->(n),(),()")
    signs, at_edges, bound = choose(words_q, words_p)
    weighted_V = q * _look_up(buckets, q, signs)
    student = total(weighted_V.sum(-1))
    teacher = total((probs_U * _look_up(buckets, probs_U, signs)).sum(-1))
    rounding = 4 * jnp.finfo(q.dtype).eps * np.log2(q.shape[-1] + probs_U.shape[-1] + 1)
    grad = weighted_V - q * student[..., None]
    return (jnp.maximum(student - teacher + at_edges, 0), bound + rounding), grad


def _backward(
    buckets: _Buckets, grad: jax.Array, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, None]:
    del buckets
    return cotangents[0][..., None] * grad, None


_distance.defvjp(_forward, _backward)
_compiled = jax.jit(_distance, static_argnums=0)


@partial(jax.jit, static_argnums=0)
def _from_logits(
    buckets: _Buckets, student_V: jax.Array, teacher_U: jax.Array
) -> tuple[jax.Array, jax.Array]:
    dtype = jnp.promote_types(student_V.dtype, teacher_U.dtype)
    return _distance(buckets, student_V.astype(dtype), jax.nn.softmax(teacher_U.astype(dtype)))


def _signs(
    buckets: _Buckets, dtype: jnp.dtype, words_q: jax.Array, words_p: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of one row: σ by bucket, the sum over the edges, and the bound."""
    edges = buckets.edges()
    lower, width = jnp.asarray(edges[:-1], dtype), jnp.asarray(np.diff(edges), dtype)
    count_q, area_q = _count_and_area(buckets, words_q, dtype)
    count_p, area_p = _count_and_area(buckets, words_p, dtype)
    at_lower = lax.cumsum(count_q - count_p, reverse=True)
    at_upper = at_lower - count_q + count_p
    # The sign of ∫ D dt over the bucket, in units of its width.
    signs = jnp.sign(at_upper.astype(dtype) + area_q - area_p)
    before = jnp.pad(signs[:-1], (1, 0))
    at_edges = (lower * at_lower.astype(dtype) * (before - signs)).sum()

    # Inside the bucket −below ≤ D ≤ above: how far D can reach on the other side of 0 than σ.
    above, below = count_q + at_upper, count_p - at_upper
    reach = jnp.where(
        signs > 0, 2 * below, jnp.where(signs < 0, 2 * above, abs(above) + abs(below))
    )
    reach = jnp.maximum(reach, 0).astype(dtype)
    # Where one meets one and all above is even, D keeps its sign: σ is right, or, where the places
    # are equal, the two differ by less than a place.
    duel = (count_q == 1) & (count_p == 1) & (at_upper == 0) & buckets.has_places()
    reach = jnp.where(duel, (signs == 0).astype(dtype) / (1 << _PLACE_BITS), reach)
    return signs, at_edges, (width * reach).sum()


def _count_and_area(
    buckets: _Buckets, words: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """How many lie in each bucket, and Σ (q − lower edge) / width, a half each where unknown."""
    placed = buckets.has_places()
    count = jnp.where(placed, words & ((1 << _COUNT_BITS) - 1), words).astype(jnp.int32)
    places = jnp.where(placed, words >> _COUNT_BITS, 0).astype(dtype) / (1 << _PLACE_BITS)
    middle = jnp.where(placed, 0.5 / (1 << _PLACE_BITS), 0.5).astype(dtype)
    return count, places + middle * count.astype(dtype)


def _histogram(buckets: _Buckets, probs_V: jax.Array) -> jax.Array:
    """The sum of words by bucket, [*b, V] -> u32[*b, buckets]."""

    def scatter(probs_V: jax.Array) -> jax.Array:
        bucket, word = buckets.of(probs_V)
        return jnp.zeros(buckets.count, jnp.uint32).at[bucket].add(word, mode="promise_in_bounds")

    return by_row("(v)->(n)", scatter, partial(_matmul_histogram, buckets))(probs_V)


def _look_up(buckets: _Buckets, probs_V: jax.Array, signs: jax.Array) -> jax.Array:
    """The sign of each probability's bucket, [*b, V]."""

    def gather(probs_V: jax.Array, signs: jax.Array) -> jax.Array:
        return signs.at[buckets.of(probs_V)[0]].get(mode="promise_in_bounds")

    return by_row("(v),(n)->(v)", gather, partial(_matmul_look_up, buckets))(probs_V, signs)


# A TPU scatters and gathers one element at a time, but multiplies one-hot matrices in its matrix
# unit: a bucket is 128 · high + low. The one-hot matrices are never stored: XLA makes them as the
# products read them, as long as all of V is one product with V last on both sides. By the estimate
# of the v5e compiler that takes 31 + 30 microseconds a row of 151,936 for the two functions below,
# against 537 + 161 in tiles of 4,096 (jax 0.10.2, libtpu 0.0.52).
_LANES = 128


def _matmul_histogram(buckets: _Buckets, probs_V: jax.Array) -> jax.Array:
    """counts[high, low] is a product of two one-hot matrices; places below 2⁸ are exact in bf16."""
    bucket, word = buckets.of(probs_V)
    highs = -(-buckets.count // _LANES)
    high, low = _one_hot(bucket // _LANES, highs), _one_hot(bucket % _LANES, _LANES)
    place = (word >> _COUNT_BITS).astype(jnp.int32).astype(jnp.bfloat16)
    low = low.astype(jnp.bfloat16)
    count = _contract(high.astype(jnp.bfloat16), low, over=1)
    places = _contract(jnp.where(high, place[None, :], 0), low, over=1)
    words = (places.astype(jnp.uint32) << _COUNT_BITS) + count.astype(jnp.uint32)
    return words.reshape(-1)[: buckets.count]


def _matmul_look_up(buckets: _Buckets, probs_V: jax.Array, signs: jax.Array) -> jax.Array:
    """table[high, low] holds four signs as 2 bits each, which is exact in bf16."""
    bucket = buckets.of(probs_V)[0]
    highs = -(-buckets.count // (4 * _LANES))
    fours = jnp.pad(signs + 1, (0, 4 * _LANES * highs - buckets.count)).reshape(highs, _LANES, 4)
    table = (fours * jnp.array([[[1.0, 4.0, 16.0, 64.0]]])).sum(-1).astype(jnp.bfloat16)
    high = _one_hot(bucket // (4 * _LANES), highs)
    low = _one_hot(bucket // 4 % _LANES, _LANES).astype(jnp.bfloat16)
    found = jnp.where(high, _contract(table, low, over=0), 0).sum(0).astype(jnp.int32)
    return (((found >> (2 * (bucket & 3))) & 3) - 1).astype(signs.dtype)


def _one_hot(index_V: jax.Array, count: int) -> jax.Array:
    return index_V[None, :] == lax.broadcasted_iota(jnp.int32, (count, 1), 0)


def _contract(left: jax.Array, right: jax.Array, *, over: int) -> jax.Array:
    axes = (((1,), (over,)), ((), ()))
    return lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)
