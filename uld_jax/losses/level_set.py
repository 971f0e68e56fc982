"""The distance without a sort: O(V), with a certified error.

With N_q(t) = #{v : q_v > t}, and N_p likewise, the distance is the area between two counting
functions, d = ∫ |N_q(t) − N_p(t)| dt, and ∂d/∂q_v is the sign of D = N_q − N_p at t = q_v.

The axis of t is cut into buckets by the leading bits of a probability's bit pattern: `2**bits` of
them an octave, and one for all under 2⁻⁴⁰. Every bucket i of width w_i counts its members and
adds up their places in it, a_i = Σ (q − lower edge) / w_i, from the bits that follow. Then

    ∫_i D dt = w_i · (D at the upper edge + a_i of the student − a_i of the teacher),

and the value is the sum of the sizes of these integrals. That is exact wherever D keeps its sign
inside the bucket, whatever lies in it, and less than d elsewhere; by how much at most follows from
the counts. Counts and places over shards of a vocabulary just add up.
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
# A 64-bit word holds a count, up to 2²⁰, above a sum of places.
_SUM_BITS, _MAX_PLACE_BITS = 44, 24


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
    |d − value| ≤ error_bound, which includes 4 ε log₂(V + U) for the rounding of sums. The value
    falls short of d only where N_q − N_p changes its sign inside a bucket. ∂value/∂q_v is the sign
    of the bucket that q_v falls in, elsewhere the exact sign(q_v − p↓_rank(v)).

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
    return level_set_distance(student_V, teacher_U, of_logits=True, bucket_bits=bucket_bits)


def level_set_distance(
    student_V: jax.Array,
    teacher_U: jax.Array,
    *,
    of_logits: bool,
    bucket_bits: int = BUCKET_BITS,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The same from scaled logits, or from a teacher's probabilities, also over shards.

    Args:
        student_V: f32[*b, V] or f64, scaled logits; this device's shard of them if sharded.
        teacher_U: [*b, U], scaled logits, or probabilities in any order that sum to at most 1; or
            the shard of them. No gradient flows to them.
        of_logits: whether the teacher's are logits.
        bucket_bits: log₂ of the buckets in an octave.
        axis_name: the mapped axis that both vocabularies are sharded over, or None.

    Returns:
        (value, error_bound), each [*b]; the same on every shard.

    Raises:
        ValueError: bucket_bits out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses.level_set import level_set_distance
        >>> value, _ = level_set_distance(jnp.zeros(4), jnp.array([1.0]), of_logits=False)
        >>> round(float(value), 4)
        1.5
    """
    if not 1 <= bucket_bits <= _MAX_BITS:
        raise ValueError(f"bucket_bits: expected 1 to {_MAX_BITS}, got {bucket_bits}")
    dtype = jnp.promote_types(student_V.dtype, teacher_U.dtype)
    options = _Options(_Buckets(bucket_bits), axis_name, of_logits)
    return _compiled(options, student_V.astype(dtype), lax.stop_gradient(teacher_U).astype(dtype))


@dataclass(frozen=True)
class _Buckets:
    """How the axis of probabilities is cut."""

    bits: int

    @property
    def count(self) -> int:
        return (_OCTAVES << self.bits) + 1

    def edges(self) -> np.ndarray:
        """The lower edge of each bucket and the upper edge of the last."""
        octave, step = np.divmod(np.arange(self.count + 1), 1 << self.bits)
        edges = np.ldexp(1 + step / (1 << self.bits), octave - _OCTAVES)
        # No probability lies above 1.
        edges[0], edges[-1] = 0, 1
        return edges

    def place_bits(self, dtype: jnp.dtype) -> int:
        """All that the bucket leaves of a float32; the leading ones of a float64."""
        return min(jnp.finfo(dtype).nmant - self.bits, _MAX_PLACE_BITS)

    def half_a_place(self, dtype: jnp.dtype) -> float:
        """In bucket widths. Members count as in the middle: one on a lower edge has a sign too."""
        return 0.5 / (1 << self.place_bits(dtype))

    def of(self, probs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The bucket of each probability, and its place there."""
        info, place_bits = jnp.finfo(probs.dtype), self.place_bits(probs.dtype)
        pattern = lax.bitcast_convert_type(probs, jnp.dtype(f"int{info.bits}"))
        bias = (1 << (info.nexp - 1)) - 1
        bucket = (pattern >> (info.nmant - self.bits)) - ((bias - _OCTAVES) << self.bits)
        place = (pattern >> (info.nmant - self.bits - place_bits)) & ((1 << place_bits) - 1)
        return jnp.clip(bucket, 0, self.count - 1).astype(jnp.int32), place.astype(jnp.int32)


@dataclass(frozen=True)
class _Options:
    buckets: _Buckets
    axis_name: str | None
    of_logits: bool


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _distance(
    options: _Options, student_V: jax.Array, teacher_U: jax.Array
) -> tuple[jax.Array, jax.Array]:
    value, bound, _ = _rows(options, student_V, teacher_U, differentiate=False)
    return value, bound


def _forward(
    options: _Options, student_V: jax.Array, teacher_U: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    value, bound, grad = _rows(options, student_V, teacher_U, differentiate=True)
    return (value, bound), grad


def _backward(
    options: _Options, grad: jax.Array, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, None]:
    del options
    return cotangents[0][..., None] * grad, None


_distance.defvjp(_forward, _backward)
_compiled = jax.jit(_distance, static_argnums=0)


def _rows(
    options: _Options, student_V: jax.Array, teacher_U: jax.Array, *, differentiate: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    compute = partial(_value_bound_and_grad, options, differentiate=differentiate)
    if options.axis_name is not None:
        # Sums over shards are taken for all rows at once.
        return compute(student_V, teacher_U)
    return by_row("(v),(u)->(),(),(w)", compute)(student_V, teacher_U)


def _value_bound_and_grad(
    options: _Options, student_V: jax.Array, teacher_U: jax.Array, *, differentiate: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Value, bound, and the value's gradient by the logits (of width 0 if not asked for)."""
    buckets, axis_name = options.buckets, options.axis_name
    q = softmax(student_V, axis_name)
    p = softmax(teacher_U, axis_name) if options.of_logits else teacher_U
    counts = (psum(_histogram(buckets, probs), axis_name) for probs in (q, p))
    choose = jnp.vectorize(
        partial(_integrate, buckets, q.dtype), signature="(n,k),(n,k)->(n),(),(),()"
    )
    signs, mean, value, bound = choose(*counts)
    rounding = 4 * jnp.finfo(q.dtype).eps * np.log2(q.shape[-1] + p.shape[-1] + 1)
    grad = q * _look_up(buckets, q, signs, mean) if differentiate else q[..., :0]
    # Counts know nothing of NaN, which a softmax spreads over its row.
    value += psum(0 * (q[..., :1].sum(-1) + p[..., :1].sum(-1)), axis_name)
    return value, bound + rounding, grad


def _integrate(
    buckets: _Buckets, dtype: jnp.dtype, counts_q: jax.Array, counts_p: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of one row: the sign of each bucket, their mean under q, the value and its bound."""
    edges = buckets.edges()
    lower, width = jnp.asarray(edges[:-1], dtype), jnp.asarray(np.diff(edges), dtype)
    count_q, count_p = (counts[:, 0].astype(jnp.int32) for counts in (counts_q, counts_p))
    area_q, area_p = counts_q[:, 1], counts_p[:, 1]
    at_upper = lax.cumsum(count_q - count_p, reverse=True) - count_q + count_p
    # ∫ D dt over the bucket, in units of its width.
    integrals = at_upper.astype(dtype) + area_q - area_p
    signs = jnp.sign(integrals)
    mean = (signs * (lower * count_q.astype(dtype) + width * area_q)).sum()

    # Inside the bucket −below ≤ D ≤ above. What |∫ D| lacks of ∫ |D| is twice the part of the other
    # sign, which is the smaller part.
    above, below = count_q + at_upper, count_p - at_upper
    reach = 2 * jnp.maximum(jnp.minimum(above, below), 0)
    # Where one meets one and all above is even, D keeps its sign. (The first bucket has no places.)
    first = np.arange(buckets.count) == 0
    duel = (count_q == 1) & (count_p == 1) & (at_upper == 0) & ~first
    reach = jnp.where(duel, 0, reach).astype(dtype)
    # In float32 half a place is half a unit in the last place, which the rounding allows for.
    half_a_place = buckets.half_a_place(dtype) if dtype == jnp.float64 else 0
    unsure = np.where(first, 1, half_a_place)
    reach += (count_q + count_p).astype(dtype) * jnp.asarray(unsure, dtype)
    return signs, mean, (width * abs(integrals)).sum(), (width * reach).sum()


def _histogram(buckets: _Buckets, probs_V: jax.Array) -> jax.Array:
    """Members of each bucket and Σ (q − lower edge) / width, [*b, V] -> [*b, buckets, 2]."""

    def scatter(probs_V: jax.Array) -> jax.Array:
        bucket, place = buckets.of(probs_V)
        one = jnp.full_like(place, 1 << (_SUM_BITS - 32))
        empty = jnp.zeros((buckets.count, 2), jnp.int32)
        # Both in one 64-bit scatter cost as much as one of either. No 64-bit integer gets out, see
        # `sorting._sort_packed`.
        with jax.enable_x64(True):
            words = lax.bitcast_convert_type(jnp.stack([place, one], -1), jnp.int64)
            sums = lax.bitcast_convert_type(empty, jnp.int64)
            sums = sums.at[bucket].add(words, mode="promise_in_bounds")
            halves = lax.bitcast_convert_type(sums, jnp.uint32)
        count, carried = halves[:, 1] >> (_SUM_BITS - 32), halves[:, 1] % (1 << (_SUM_BITS - 32))
        places = carried.astype(probs_V.dtype) * 2.0**32 + halves[:, 0].astype(probs_V.dtype)
        return _with_area(buckets, count.astype(probs_V.dtype), places)

    return by_row("(v)->(n,k)", scatter, partial(_matmul_histogram, buckets))(probs_V)


def _with_area(buckets: _Buckets, count: jax.Array, places: jax.Array) -> jax.Array:
    middle = buckets.half_a_place(count.dtype)
    area = places / (1 << buckets.place_bits(count.dtype)) + middle * count
    return jnp.stack([count, area], -1)


def _look_up(buckets: _Buckets, probs_V: jax.Array, signs: jax.Array, mean: jax.Array) -> jax.Array:
    """The sign of each probability's bucket less the mean, [*b, V]."""

    def gather(probs_V: jax.Array, signs: jax.Array, mean: jax.Array) -> jax.Array:
        # The mean is taken off in the small table: after the gather XLA fuses it with the mean's
        # own sum, and on a CPU that cost as much as all the rest of the loss (jax 0.10.2).
        return (signs - mean).at[buckets.of(probs_V)[0]].get(mode="promise_in_bounds")

    def on_tpu(probs_V: jax.Array, signs: jax.Array, mean: jax.Array) -> jax.Array:
        return _matmul_look_up(buckets, probs_V, signs) - mean

    return by_row("(v),(n),()->(v)", gather, on_tpu)(probs_V, signs, mean)


# A TPU scatters and gathers one element at a time, but multiplies one-hot matrices in its matrix
# unit: a bucket is 128 · high + low. The one-hot matrices are never stored: XLA makes them as the
# products read them, as long as all of V is one product with V last on both sides. By the estimate
# of the v5e compiler two such products over 151,936 take 31 microseconds and a look-up 30, against
# 537 and 161 in tiles of 4,096, which are stored (jax 0.10.2, libtpu 0.0.52).
_LANES = 128


def _matmul_histogram(buckets: _Buckets, probs_V: jax.Array) -> jax.Array:
    """sums[high, low] is a product of one-hot matrices; a byte at a time is exact in bf16."""
    bucket, place = buckets.of(probs_V)
    highs = -(-buckets.count // _LANES)
    high, low = _one_hot(bucket // _LANES, highs), _one_hot(bucket % _LANES, _LANES)

    def sum_of(values_V: jax.Array) -> jax.Array:
        left = jnp.where(high, values_V.astype(jnp.bfloat16)[None, :], 0)
        sums = _contract(left, low.astype(jnp.bfloat16), over=1)
        return sums.reshape(-1)[: buckets.count].astype(probs_V.dtype)

    places = jnp.zeros(buckets.count, probs_V.dtype)
    for shift in range(0, buckets.place_bits(probs_V.dtype), 8):
        places += 2.0**shift * sum_of((place >> shift) & 255)
    return _with_area(buckets, sum_of(jnp.ones_like(place)), places)


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
