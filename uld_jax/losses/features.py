"""Distillation of hidden states and attention maps: the baselines that look inside the models.

Both need aligned positions. Models with different tokens have attention maps of different sizes,
so `attention_map` makes them of the aligned positions alone. A learned projection is a plain array
among the trained parameters; gradients reach it and the student, never the teacher.
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

__all__ = ["aligned_keys", "attention_loss", "attention_map", "hidden_state_loss", "layer_map"]

HIDDEN_KINDS = ("mse", "cosine")
ATTENTION_KINDS = ("mse", "kl")


def hidden_state_loss(
    student_hidden: ArrayLike,
    teacher_hidden: ArrayLike,
    projection: ArrayLike | None = None,
    *,
    kind: str = "mse",
) -> jax.Array:
    """The distance between the hidden states of each position, not reduced.

    With h = student · projection: "mse" is mean_e (h_e − teacher_e)², "cosine" is 1 − cos(h,
    teacher). Patient KD's squared distance of unit vectors is 2 (1 − cos), so twice "cosine".

    Args:
        student_hidden: [*b, D]; bf16, f16 and f32 are computed in f32, f64 in f64.
        teacher_hidden: [*b, E]. No gradient flows to it.
        projection: [D, E], learned, such as `jax.nn.initializers.lecun_normal()(key, (D, E))` to
            begin with; None where D = E.
        kind: "mse" or "cosine"; the cosine of a zero vector is 0.

    Returns:
        f32[*b] (f64 where an input is f64).

    Raises:
        ValueError: for an unknown kind, or shapes that do not match.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses.features import hidden_state_loss
        >>> student, teacher = jnp.array([1.0, 2.0]), jnp.array([2.0, 2.0, 4.0])
        >>> projection = jnp.array([[0.0, 2.0, 1.0], [1.0, 0.0, 0.0]])
        >>> float(hidden_state_loss(student, teacher, projection))
        3.0

    Reference:
        "mse" with a projection: Jiao et al., "TinyBERT", arXiv 1909.10351, section 3.1. "cosine":
        Sanh et al., "DistilBERT", arXiv 1910.01108, section 2. Patient KD: Sun et al., arXiv
        1908.09355, section 3.
    """
    _check_kind(kind, HIDDEN_KINDS)
    student, teacher = _in_float32(student_hidden, teacher_hidden)
    teacher = lax.stop_gradient(teacher)
    if projection is not None:
        matrix = jnp.asarray(projection, student.dtype)
        _check_shape("projection", matrix, (student.shape[-1], teacher.shape[-1]))
        student = student @ matrix
    hint = " (or a projection [D, E])" if projection is None else ""
    _check_shape("student_hidden", student, teacher.shape, hint)
    if kind == "mse":
        return optax.squared_error(student, teacher).mean(-1)
    return optax.cosine_distance(student, teacher, epsilon=1e-6)


def attention_loss(
    student_attention: ArrayLike,
    teacher_attention: ArrayLike,
    head_mixture: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    kind: str = "mse",
) -> jax.Array:
    """The distance between the attention maps of each query position, not reduced.

    Of a query and a pair of heads, "mse" is mean_k (student_k − teacher_k)² over the allowed keys
    k, "kl" is Σ_k teacher_k log(teacher_k / student_k); then the mean over the pairs of heads.

    Heads pair up by number where H = K. Where they differ, the mean student map is compared with
    the mean teacher map. With `head_mixture` each teacher head meets its own mixture of the student
    heads, with weights softmax(head_mixture) over H, so that rows stay probability vectors;
    all zeros weigh every head alike.

    Args:
        student_attention: [*b, H, T, T], query by key, H student heads; computed in f32 (f64 for
            f64). For "kl" probabilities; for "mse" these or, as in TinyBERT, unnormalised scores.
        teacher_attention: [*b, K, T, T], K teacher heads. No gradient flows to it.
        head_mixture: [H, K], learned; None for no mixture.
        mask: bool, broadcastable to [*b, T, T], True where the query may see the key (causal and
            not padding); None allows every key. What lies elsewhere, NaN included, counts for
            nothing, and a query that sees no key gives 0.
        kind: "mse" or "kl". For "kl" student probabilities are floored at the smallest normal
            float: an underflowed softmax makes the loss large, not infinite.

    Returns:
        f32[*b, T] (f64 where an input is f64).

    Raises:
        ValueError: for an unknown kind, or shapes that do not match.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses.features import attention_loss
        >>> student, teacher = jnp.full((1, 2, 2), 0.5), jnp.array([[[1.0, 0.0], [0.5, 0.5]]])
        >>> [round(float(x), 4) for x in attention_loss(student, teacher, kind="kl")]
        [0.6931, 0.0]

    Reference:
        "mse": Jiao et al., "TinyBERT", arXiv 1909.10351, section 3.1. "kl": Wang et al., "MiniLM",
        arXiv 2002.10957, section 3.1.
    """
    _check_kind(kind, ATTENTION_KINDS)
    student, teacher = _in_float32(student_attention, teacher_attention)
    rest = (*teacher.shape[:-3], student.shape[-3], *teacher.shape[-2:])
    _check_shape("student_attention", student, rest)
    allowed = jnp.broadcast_to(True if mask is None else mask, (*rest[:-3], *rest[-2:]))
    allowed = jnp.expand_dims(allowed, -3)
    # Before any arithmetic: the softmax of a row without keys is NaN.
    student, teacher = jnp.where(allowed, student, 0), jnp.where(allowed, teacher, 0)
    student, teacher = _paired_heads(student, lax.stop_gradient(teacher), head_mixture)
    if kind == "mse":
        gaps = optax.squared_error(student, teacher).sum(-1) / jnp.maximum(allowed.sum(-1), 1)
    else:
        floor = jnp.finfo(student.dtype).tiny
        gaps = optax.losses.kl_divergence(jnp.log(jnp.maximum(student, floor)), teacher)
    return gaps.mean(-2)


def aligned_keys(rows: ArrayLike, weights: ArrayLike) -> jax.Array:
    """Which aligned positions the query of each one may see: those up to it in its own text.

    Args:
        rows: int[*b, N], which text each position is of; a text's positions are in order.
        weights: [*b, N], 0 where the position is not aligned: such a one sees none and is not seen.

    Returns:
        bool[*b, N, N], query by key.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses.features import aligned_keys
        >>> aligned_keys(jnp.array([0, 0, 1]), jnp.ones(3)).astype(int).tolist()
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    rows, aligned = jnp.asarray(rows), jnp.asarray(weights) > 0
    same = rows[..., :, None] == rows[..., None, :]
    both = aligned[..., :, None] & aligned[..., None, :]
    return jnp.tril(same & both)


def attention_map(
    query: ArrayLike,
    key: ArrayLike,
    mask: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
) -> jax.Array:
    """A layer's attention among some of its tokens: what it gives to others, these share.

    map_hij = softmax over the allowed j of score_hij, score = softcap(scale · q_i · k_j) + bias_hij
    with softcap(x) = c · tanh(x / c). It is the layer's whole attention, divided by its sum over
    the allowed keys.

    Args:
        query: [*b, N, H, h], rotated if the layer rotates them; computed in f32 (f64 for f64).
        key: [*b, N, K, h], likewise; key head k serves the H / K query heads from k · H / K on.
        mask: bool[*b, N, N], True where the query may see the key; other scores count for nothing.
        bias: [*b, H, N, N], added to the scores (ALiBi, T5's table), or None.
        scale: of the products.
        softcap: c, 0 for none.

    Returns:
        f32[*b, H, N, N] (f64 where query is f64), whose rows add up to 1, or are 0 for a query that
        sees no key.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses.features import attention_map
        >>> query, key = jnp.ones((2, 1, 4)), jnp.ones((2, 1, 4))
        >>> attention_map(query, key, jnp.tril(jnp.ones((2, 2), bool)), scale=0.5).tolist()
        [[[1.0, 0.0], [0.5, 0.5]]]
    """
    query, key = _in_float32(query, key)
    groups = query.shape[-2] // key.shape[-2]
    key = jnp.repeat(key, groups, axis=-2)
    scores = scale * jnp.einsum("...ihd,...jhd->...hij", query, key)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores += jnp.asarray(bias, scores.dtype)
    allowed = jnp.expand_dims(jnp.asarray(mask), -3)
    # Of a row without keys the softmax over finite numbers is finite, and so is its gradient.
    scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
    return jnp.where(allowed, jax.nn.softmax(scores), 0)


def layer_map(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """Which teacher layer each student layer learns from: evenly spread, the last from the last.

    teacher layer of student layer i = ⌈(i + 1) · teacher_layers / student_layers⌉ − 1.

    Args:
        student_layers: number of the student's layers, embeddings not counted.
        teacher_layers: number of the teacher's.

    Returns:
        One index per student layer, both counted from 0.

    Raises:
        ValueError: where a number is below 1.

    Example:
        >>> from uld_jax.losses.features import layer_map
        >>> layer_map(4, 12)
        (2, 5, 8, 11)

    Reference:
        Jiao et al., "TinyBERT", arXiv 1909.10351: g(m) = 3m for 4 layers of 12, counted from 1.
    """
    if student_layers < 1 or teacher_layers < 1:
        got = f"{student_layers} and {teacher_layers}"
        raise ValueError(f"student_layers and teacher_layers: expected at least 1, got {got}")
    return tuple(-(-i * teacher_layers // student_layers) - 1 for i in range(1, student_layers + 1))


def _paired_heads(
    student_HTT: jax.Array, teacher_KTT: jax.Array, head_mixture: ArrayLike | None
) -> tuple[jax.Array, jax.Array]:
    """Both sides with the same number of heads."""
    heads = student_HTT.shape[-3], teacher_KTT.shape[-3]
    if head_mixture is not None:
        mixture_HK = jnp.asarray(head_mixture, student_HTT.dtype)
        _check_shape("head_mixture", mixture_HK, heads)
        weights_HK = jax.nn.softmax(mixture_HK, axis=0)
        return jnp.einsum("...hqk,hj->...jqk", student_HTT, weights_HK), teacher_KTT
    if heads[0] == heads[1]:
        return student_HTT, teacher_KTT
    return student_HTT.mean(-3, keepdims=True), teacher_KTT.mean(-3, keepdims=True)


def _in_float32(student: ArrayLike, teacher: ArrayLike) -> tuple[jax.Array, jax.Array]:
    student, teacher = jnp.asarray(student), jnp.asarray(teacher)
    dtype = jnp.promote_types(jnp.promote_types(student.dtype, teacher.dtype), jnp.float32)
    return student.astype(dtype), teacher.astype(dtype)


def _check_kind(kind: str, kinds: tuple[str, ...]) -> None:
    if kind not in kinds:
        raise ValueError(f"kind: unknown {kind!r}; expected one of {', '.join(map(repr, kinds))}")


def _check_shape(name: str, array: jax.Array, expected: tuple[int, ...], hint: str = "") -> None:
    if array.shape != expected:
        raise ValueError(f"{name}: expected shape {expected}{hint}, got {array.shape}")
