"""The Universal Logit Distillation distance: the definition, and the exact fast path by sorting.

``reference_uld`` is the definition and nothing else. ``uld`` computes the same value with two
savings:

- Probabilities are never negative, so their bit patterns, read as integers, have the same order.
  An unstable sort of a single integer array is 4 times as fast on a CPU as a float sort and drags
  no index array along on a TPU.
- The derivative with respect to a probability is a sign that depends only on the probability's
  rank, so the backward pass needs ranks, not a differentiated sort.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

__all__ = ["check_method", "reference_uld", "sorted_probabilities", "uld", "uld_to_sorted"]

METHODS = ("auto", "sort")


def reference_uld(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    student_temperature: ArrayLike = 1.0,
    teacher_temperature: ArrayLike = 1.0,
) -> jax.Array:
    """The distance straight from its definition; slow, and what every faster path must equal.

    d = Σ_v |sort↓(softmax(s / T_s))_v − sort↓(softmax(t / T_t))_v|, the shorter side zero-padded.

    Args:
        student_logits: [*b, V], any float type.
        teacher_logits: [*b, U], any float type. No gradient flows to them.
        student_temperature: scalar divisor of the student's logits.
        teacher_temperature: scalar divisor of the teacher's logits.

    Returns:
        f32[*b] (f64 for f64 logits), in [0, 2).

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses import reference_uld
        >>> student, teacher = jnp.log(jnp.array([0.2, 0.7, 0.1])), jnp.log(jnp.array([0.5, 0.5]))
        >>> round(float(reference_uld(student, teacher)), 4)
        0.6

    Reference:
        Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation
        Loss for LLMs", arXiv 2402.12030, section 3.
    """
    student_V = _scaled(student_logits, student_temperature)
    teacher_U = lax.stop_gradient(_scaled(teacher_logits, teacher_temperature))
    _check_leading_axes(student_V, teacher_U)
    width = max(student_V.shape[-1], teacher_U.shape[-1])
    q = _fit(jnp.sort(jax.nn.softmax(student_V), descending=True), width)
    p = _fit(jnp.sort(jax.nn.softmax(teacher_U), descending=True), width)
    return jnp.abs(q - p).sum(-1)


def uld(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    student_temperature: ArrayLike = 1.0,
    teacher_temperature: ArrayLike = 1.0,
    method: str = "auto",
) -> jax.Array:
    """The Universal Logit Distillation distance of each position, compiled, not reduced.

    d = Σ_v |sort↓(softmax(s / T_s))_v − sort↓(softmax(t / T_t))_v|, the shorter side zero-padded;
    ∂d/∂q_v = sign(q_v − p↓_rank(v)). Where several q_v are equal each gets the mean of the signs
    at the first and the last rank that they share: the central difference in that one q_v.

    Args:
        student_logits: [*b, V]; bf16, f16 and f32 are computed in f32, f64 in f64. An entry of
            −inf (a padded vocabulary) has probability 0.
        teacher_logits: [*b, U], likewise. No gradient flows to them.
        student_temperature: scalar divisor of the student's logits.
        teacher_temperature: scalar divisor of the teacher's logits.
        method: "sort" is exact; "auto" is "sort" for now.

    Returns:
        f32[*b] (f64 for f64 logits), in [0, 2).

    Raises:
        ValueError: for an unknown method, or leading axes that differ.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from uld_jax.losses import uld
        >>> student, teacher = jnp.log(jnp.array([0.2, 0.7, 0.1])), jnp.log(jnp.array([0.5, 0.5]))
        >>> round(float(uld(student, teacher)), 4)
        0.6
        >>> [round(float(g), 4) for g in jax.grad(uld)(student, teacher)]
        [-0.32, 0.28, 0.04]

    Reference:
        Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation
        Loss for LLMs", arXiv 2402.12030, section 3.
    """
    check_method(method)
    return _uld_by_sorting(student_logits, teacher_logits, student_temperature, teacher_temperature)


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
    probs_U = jax.nn.softmax(lax.stop_gradient(_scaled(logits, temperature)))
    return _probabilities(_sort(_descending_keys(probs_U)))


def uld_to_sorted(
    student_logits: ArrayLike,
    teacher_probs_sorted: ArrayLike,
    *,
    student_temperature: ArrayLike = 1.0,
) -> jax.Array:
    """The distance to a teacher that is already reduced to its sorted probabilities.

    Args:
        student_logits: [*b, V], any float type.
        teacher_probs_sorted: [*b, U], descending, as `sorted_probabilities` returns them.
        student_temperature: scalar divisor of the student's logits.

    Returns:
        f32[*b] (f64 where either input is f64), in [0, 2).

    Raises:
        ValueError: where the leading axes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses.uld import uld_to_sorted
        >>> float(uld_to_sorted(jnp.zeros(4), jnp.array([1.0])))
        1.5
    """
    student_V = _scaled(student_logits, student_temperature)
    teacher_U = lax.stop_gradient(jnp.asarray(teacher_probs_sorted))
    _check_leading_axes(student_V, teacher_U)
    dtype = jnp.promote_types(student_V.dtype, teacher_U.dtype)
    return _distance(student_V.astype(dtype), teacher_U.astype(dtype))


def check_method(method: str) -> None:
    """Refuse a name that is not a way to compute the distance.

    Args:
        method: the name to check.

    Raises:
        ValueError: naming the valid methods.

    Example:
        >>> from uld_jax.losses.uld import check_method
        >>> check_method("quick")
        Traceback (most recent call last):
        ...
        ValueError: method: unknown 'quick'; expected one of 'auto', 'sort'
    """
    if method not in METHODS:
        expected = ", ".join(map(repr, METHODS))
        raise ValueError(f"method: unknown {method!r}; expected one of {expected}")


@jax.jit
def _uld_by_sorting(
    student_logits: ArrayLike, teacher_logits: ArrayLike, student_temp: ArrayLike, temp: ArrayLike
) -> jax.Array:
    probs_sorted = sorted_probabilities(teacher_logits, temp)
    return uld_to_sorted(student_logits, probs_sorted, student_temperature=student_temp)


@jax.custom_vjp
def _distance(logits_V: jax.Array, probs_sorted_U: jax.Array) -> jax.Array:
    """The distance from logits that are already scaled; both arrays of one type, f32 or f64."""
    width = logits_V.shape[-1]
    q = _probabilities(_sort(_descending_keys(jax.nn.softmax(logits_V))))
    return _total_gap(q - _fit(probs_sorted_U, width), probs_sorted_U)


def _distance_fwd(logits_V: jax.Array, probs_sorted_U: jax.Array) -> tuple[jax.Array, jax.Array]:
    q = jax.nn.softmax(logits_V)
    match = jnp.vectorize(_gaps_and_signs, signature="(v),(v)->(v),(v)")
    gaps, signs = match(q, _fit(probs_sorted_U, logits_V.shape[-1]))
    # The softmax Jacobian is applied here, so that one [*b, V] array is kept and not two.
    grad = q * (signs - (q * signs).sum(-1, keepdims=True))
    return _total_gap(gaps, probs_sorted_U), grad


def _distance_bwd(grad: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, None]:
    return cotangent[..., None] * grad, None


_distance.defvjp(_distance_fwd, _distance_bwd)


def _total_gap(gaps_V: jax.Array, probs_sorted_U: jax.Array) -> jax.Array:
    """Past the student's vocabulary the teacher only meets zeros: its tail mass is the gap."""
    return jnp.abs(gaps_V).sum(-1) + probs_sorted_U[..., gaps_V.shape[-1] :].sum(-1)


# Milliseconds a row for value and gradient given the sorted teacher, best of interleaved runs on
# two CPU cores (jax 0.10.2), V = 49,152 / 262,144:
#   int sort, two binary searches (chosen)       3.8 / 28    (value alone 2.4 / 14)
#   (key, index) sort, scatter of the signs      9.1 / 55
#   (key, index) sort, sort of index and sign   11.2 / 69
#   jnp.sort and its autodiff                   11.0 / 69
# Key and index packed into one int64 (2.5 / 15) would win, but needs 64-bit types, which are off by
# default. Sorting U = 262,144 teacher probabilities adds 14 (jnp.sort: 57).
# A TPU gathers slowly: for v5e, XLA's cost model gives the search 100 times the memory traffic of
# the two sorts (3.7 GB against 38 MB for 8 rows of 49,152), hence one way for each.
def _gaps_and_signs(q_V: jax.Array, p_sorted_V: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of one row: q↓ − p↓ in sorted order, and the derivative by each q in q's own order."""
    return lax.platform_dependent(q_V, p_sorted_V, tpu=_match_by_sorts, default=_match_by_search)


def _match_by_search(q_V: jax.Array, p_sorted_V: jax.Array) -> tuple[jax.Array, jax.Array]:
    keys = _descending_keys(q_V)
    keys_sorted = _sort(keys)
    gaps = _probabilities(keys_sorted) - p_sorted_V
    signs = jnp.sign(gaps)
    first = jnp.searchsorted(keys_sorted, keys, side="left")
    last = jnp.searchsorted(keys_sorted, keys, side="right") - 1
    return gaps, (signs[first] + signs[last]) / 2


def _match_by_sorts(q_V: jax.Array, p_sorted_V: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same without gather or scatter; packs index and sign in 31 bits, so V < 2^28."""
    keys = _descending_keys(q_V)
    ranks = lax.iota(jnp.int32, keys.size)
    keys_sorted, index = lax.sort((keys, ranks), is_stable=False, num_keys=1)
    gaps = _probabilities(keys_sorted) - p_sorted_V
    rank_and_sign = ranks * 4 + jnp.sign(gaps).astype(jnp.int32) + 1
    ends = jnp.append(keys_sorted[1:] != keys_sorted[:-1], True)
    starts = jnp.roll(ends, 1)
    # Within a run of equal keys, carry the sign at its start forward and that at its end backward.
    first = lax.cummax(jnp.where(starts, rank_and_sign, 0)) & 3
    int_max = jnp.iinfo(jnp.int32).max
    last = lax.cummin(jnp.where(ends, rank_and_sign, int_max), reverse=True) & 3
    signs = (_sort(index * 8 + first + last) & 7) - 2
    return gaps, signs.astype(gaps.dtype) / 2


def _descending_keys(probs: jax.Array) -> jax.Array:
    """Integers that ascend where the non-negative floats descend."""
    return -lax.bitcast_convert_type(probs, jnp.dtype(f"int{8 * probs.dtype.itemsize}"))


def _probabilities(keys: jax.Array) -> jax.Array:
    """The inverse of `_descending_keys`."""
    return lax.bitcast_convert_type(-keys, jnp.dtype(f"float{8 * keys.dtype.itemsize}"))


def _sort(keys: jax.Array) -> jax.Array:
    return lax.sort(keys, is_stable=False)


def _fit(probs_sorted: jax.Array, width: int) -> jax.Array:
    """Cut or zero-pad the last axis to `width`."""
    cut = probs_sorted[..., :width]
    return jnp.pad(cut, [(0, 0)] * (cut.ndim - 1) + [(0, width - cut.shape[-1])])


def _scaled(logits: ArrayLike, temperature: ArrayLike) -> jax.Array:
    logits = jnp.asarray(logits)
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    return logits.astype(dtype) / jnp.asarray(temperature, dtype)


def _check_leading_axes(student: jax.Array, teacher: jax.Array) -> None:
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student and teacher: expected the same axes before the vocabulary, "
            f"got {student.shape} and {teacher.shape}"
        )
