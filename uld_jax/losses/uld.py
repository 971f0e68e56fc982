"""The Universal Logit Distillation distance: its definition, and the ways to compute it.

``reference_uld`` is the definition and nothing else; every method must equal it:

- ``"sort"`` (sorting.py) sorts bit patterns with `jax.lax.sort`. Exact.
- ``"level_set"`` (level_set.py) counts instead. O(V), with a certified error around 1e-6.
- ``"auto"`` is the faster of the two: sort up to `SORT_UP_TO` tokens, level_set above.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from uld_jax.losses.level_set import level_set_distance
from uld_jax.losses.probabilities import check_leading_axes, fit, on_whole_rows, scaled
from uld_jax.losses.sorting import sort_distance, sorted_probabilities

__all__ = [
    "METHODS",
    "SORT_UP_TO",
    "check_method",
    "reference_uld",
    "resolve_method",
    "sorted_probabilities",
    "uld",
    "uld_to_sorted",
]

METHODS = ("auto", "sort", "level_set")
# Where the two cost the same on two CPU cores.
SORT_UP_TO = 2048


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
    student_V = scaled(student_logits, student_temperature)
    teacher_U = lax.stop_gradient(scaled(teacher_logits, teacher_temperature))
    check_leading_axes(student_V, teacher_U)
    width = max(student_V.shape[-1], teacher_U.shape[-1])
    q = fit(jnp.sort(jax.nn.softmax(student_V), descending=True), width)
    p = fit(jnp.sort(jax.nn.softmax(teacher_U), descending=True), width)
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
    ∂d/∂q_v = sign(q_v − p↓_rank(v)). Where several q_v are equal, "sort" gives each the mean of
    the signs at the first and the last rank that they share: the central difference in that one
    q_v. "level_set" gives all q_v of a bucket one sign.

    Args:
        student_logits: [*b, V]; bf16, f16 and f32 are computed in f32, f64 in f64. An entry of
            −inf (a padded vocabulary) has probability 0.
        teacher_logits: [*b, U], likewise. No gradient flows to them.
        student_temperature: scalar divisor of the student's logits.
        teacher_temperature: scalar divisor of the teacher's logits.
        method: "sort" is exact; "level_set" has no sort and returns the value of `level_set_uld`;
            "auto" is "sort" where neither vocabulary has more than 2,048 tokens, else "level_set".

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
    student_V = scaled(student_logits, student_temperature)
    teacher_U = scaled(teacher_logits, teacher_temperature)
    check_leading_axes(student_V, teacher_U)
    method = resolve_method(method, student_V.shape[-1], teacher_U.shape[-1])
    return _compiled(student_V, teacher_U, method)


def uld_to_sorted(
    student_logits: ArrayLike,
    teacher_probs_sorted: ArrayLike,
    *,
    student_temperature: ArrayLike = 1.0,
    method: str = "auto",
) -> jax.Array:
    """The distance to a teacher that is already reduced to its sorted probabilities.

    Args:
        student_logits: [*b, V], any float type.
        teacher_probs_sorted: [*b, U], descending, as `sorted_probabilities` returns them. Where
            they are only the largest of a teacher's, use `truncated_uld`.
        student_temperature: scalar divisor of the student's logits.
        method: see `uld`.

    Returns:
        f32[*b] (f64 where either input is f64), in [0, 2).

    Raises:
        ValueError: for an unknown method, or leading axes that differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses import uld_to_sorted
        >>> float(uld_to_sorted(jnp.zeros(4), jnp.array([1.0])))
        1.5
    """
    student_V, teacher_U = scaled(student_logits, student_temperature), scaled(teacher_probs_sorted)
    check_leading_axes(student_V, teacher_U)
    method = resolve_method(method, student_V.shape[-1], teacher_U.shape[-1])
    if method == "sort":
        return sort_distance(student_V, teacher_U, of_logits=False)
    return level_set_distance(student_V, teacher_U, of_logits=False)[0]


def distance(
    student_logits_V: jax.Array,
    teacher_logits_U: jax.Array,
    method: str,
    axis_name: str | None = None,
) -> jax.Array:
    """The distance from scaled logits, by a method already resolved, also over shards.

    Args:
        student_logits_V: [*b, V], scaled; the shard of it that this device holds if sharded.
        teacher_logits_U: [*b, U], scaled; or the shard of it. No gradient flows to them.
        method: "sort" or "level_set".
        axis_name: the mapped axis that both vocabularies are sharded over, or None.

    Returns:
        [*b]; the same on every shard.

    Example:
        >>> import jax.numpy as jnp
        >>> float(distance(jnp.zeros(4), jnp.array([0.0, -jnp.inf]), "sort"))
        1.5
    """
    if method == "level_set":
        logits = student_logits_V, teacher_logits_U
        return level_set_distance(*logits, of_logits=True, axis_name=axis_name)[0]

    by_sorting = partial(sort_distance, of_logits=True)
    if axis_name is None:
        return by_sorting(student_logits_V, teacher_logits_U)
    return on_whole_rows(by_sorting, axis_name)((student_logits_V, teacher_logits_U))


_compiled = jax.jit(distance, static_argnames=("method", "axis_name"))


def resolve_method(method: str, student_vocab: int, teacher_vocab: int) -> str:
    """The method that "auto" stands for; the same on every backend.

    Args:
        method: one of `METHODS`.
        student_vocab: V.
        teacher_vocab: U.

    Returns:
        "sort" or "level_set".

    Raises:
        ValueError: for an unknown method.

    Example:
        >>> resolve_method("auto", 49_152, 262_144), resolve_method("auto", 64, 96)
        ('level_set', 'sort')
    """
    check_method(method)
    if method != "auto":
        return method
    return "sort" if max(student_vocab, teacher_vocab) <= SORT_UP_TO else "level_set"


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
        ValueError: method: unknown 'quick'; expected one of 'auto', 'sort', 'level_set'
    """
    if method not in METHODS:
        expected = ", ".join(map(repr, METHODS))
        raise ValueError(f"method: unknown {method!r}; expected one of {expected}")
