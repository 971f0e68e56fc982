"""Optimal transport between next-token distributions, for a cost of your choice between tokens.

Moving probability from " cat" to " cats" may cost less than to " of"; ULD counts them alike.

    OT(q, p) = min Σ_ij P_ij · c_ij   over P ≥ 0 with row sums q [V] and column sums p [U].

A cost is an array [V, U] or a `TokenCost`, which gives the costs between the few tokens that one
position needs, so that V × U costs never exist. K and L count those tokens, here and below. The
extra `ot` holds ott-jax (the solver) and rapidfuzz (edit distances), imported on first use.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from uld_jax.losses.probabilities import check_leading_axes, scaled

__all__ = ["LevenshteinCost", "TokenCost", "TransportLoss", "UniformCost"]
__all__ += ["embedding_cost", "levenshtein_cost", "transport_loss"]


class TokenCost(Protocol):
    """A cost between tokens, evaluated for a few of them; a pytree, so that it can enter jit."""

    @property
    def max_cost(self) -> ArrayLike:
        """Scalar; the cost of every pair of tokens, asked for or not, lies in [0, max_cost]."""
        ...

    def __call__(self, student_ids: jax.Array, teacher_ids: jax.Array) -> jax.Array:
        """The costs [K, L] between i32[K] and i32[L], each in descending order of probability."""
        ...


@jax.tree_util.register_static
@dataclass(frozen=True)
class UniformCost:
    """Every move costs 1, the r-th likeliest tokens of the two sides counting as the same token.

    c_ij = 1[i ≠ j] for ranks i and j. OT is then half the distance d of ULD (arXiv 2402.12030):

    - With c_ij = 1 for *all* pairs, Σ_ij P_ij · 1 = 1 whatever P, q and p: nothing to learn from.
      Some pairs of tokens must count as the same, between which moving costs nothing.
    - Identify token i with token i (the smaller vocabulary padded with tokens of probability 0).
      Then Σ_ij P_ij · 1[i ≠ j] = 1 − Σ_i P_ii. A P_ii of min(q_i, p_i) is possible for all i at
      once, and no more is, so OT = Σ_i (q_i + p_i) / 2 − min(q_i, p_i) = ½ Σ_i |q_i − p_i|.
    - The best identification is by rank. Let q_1 ≥ q_2 have the partners p_1 ≤ p_2. Exchange the
      partners: the differences q_1 − p_2 and q_2 − p_1 have the same sum as q_1 − p_1 and
      q_2 − p_2 and lie between them, so, |·| being convex, the sum of their sizes is no larger.
      Such exchanges end in sorted order: min_π Σ_v |q_π(v) − p_v| = Σ_v |q↓_v − p↓_v| = d, so
      d = 2 · OT for the one-to-one identification of the alphabets that makes OT least.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses import transport, uld
        >>> student, teacher = jnp.log(jnp.array([0.2, 0.7, 0.1])), jnp.log(jnp.array([0.5, 0.5]))
        >>> loss = transport.transport_loss(student, teacher, transport.UniformCost(), epsilon=0.01)
        >>> round(float(loss.value), 2), round(float(uld(student, teacher)), 2)
        (0.3, 0.6)
    """

    max_cost: float = field(default=1.0, init=False)

    def __call__(self, student_ids: jax.Array, teacher_ids: jax.Array) -> jax.Array:
        """1[i ≠ j] by rank; the ids themselves do not matter."""
        return 1 - jnp.eye(student_ids.size, teacher_ids.size)


def embedding_cost(
    student_embedding: ArrayLike, teacher_embedding: ArrayLike, projection: ArrayLike | None = None
) -> TokenCost:
    """Distances in the teacher's embedding space: c_ij = ‖student_i · projection − teacher_j‖₂.

    max_cost is the largest distance of a student row to the teacher's mean row plus the largest of
    a teacher row to it: by the triangle inequality no c_ij exceeds it.

    Args:
        student_embedding: [V, D].
        teacher_embedding: [U, E].
        projection: [D, E]; None where both embeddings share one space (D = E).

    Returns:
        The cost, in f32. `transport_loss` sends no gradient to it.

    Raises:
        ValueError: where the widths do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses import transport
        >>> cost = transport.embedding_cost(jnp.array([[0.0, 3.0]]), jnp.array([[4.0, 0.0]]))
        >>> float(cost(jnp.array([0]), jnp.array([0]))[0, 0])
        5.0
    """
    student, teacher = jnp.asarray(student_embedding), jnp.asarray(teacher_embedding)
    expected = (student.shape[-1], teacher.shape[-1])
    got = None if projection is None else np.shape(projection)
    if got != expected and not (got is None and expected[0] == expected[1]):
        raise ValueError(f"projection: expected [D, E] = {expected}, got {got}")
    student = student if projection is None else student.astype(jnp.float32) @ projection
    centre = teacher.mean(0, dtype=jnp.float32)[None]
    max_cost = _distances(student, centre).max() + _distances(teacher, centre).max()
    return _EmbeddingCost(student, teacher, max_cost)


def levenshtein_cost(student_tokens: Sequence[str], teacher_tokens: Sequence[str]) -> np.ndarray:
    """Edit distances (insert, delete, substitute) over the longer text's length, for all pairs.

    Args:
        student_tokens: V texts, the tokenizer's markers (`▁`, `Ġ`) undone: they would count.
        teacher_tokens: U texts, likewise.

    Returns:
        f32[V, U] in [0, 1], on the host. For V × U too large to store see `LevenshteinCost`.

    Raises:
        ImportError: without rapidfuzz.

    Example:
        >>> from uld_jax.losses import transport
        >>> transport.levenshtein_cost(["kitten"], ["sitten", "mitts", "dog", ""]) * 60
        array([[10., 30., 60., 60.]], dtype=float32)
    """
    try:
        from rapidfuzz import process
        from rapidfuzz.distance.Levenshtein import normalized_distance as distance
    except ImportError:
        raise ImportError("levenshtein needs rapidfuzz: pip install 'uld-jax[ot]'") from None
    return process.cdist(student_tokens, teacher_tokens, scorer=distance, dtype=np.float32)


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class LevenshteinCost:
    """`levenshtein_cost` of the tokens asked for, computed on the host while the step runs.

    By `jax.pure_callback`, from V and U texts; an id past the end of its list (a padded vocabulary)
    costs 1. Make it once: a new object compiles anew.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses import transport
        >>> cost = transport.LevenshteinCost(["a", " cat"], ["dog", "b", " cats"])
        >>> (cost(jnp.array([1, 0]), jnp.array([2, 7])) * 20).tolist()
        [[4.0, 20.0], [16.0, 20.0]]
    """

    student_tokens: list[str]
    teacher_tokens: list[str]

    max_cost: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        levenshtein_cost([], [])  # a missing extra shows here, not in the middle of a step

    def __call__(self, student_ids: jax.Array, teacher_ids: jax.Array) -> jax.Array:
        """The distances f32[K, L] between two lists of token ids."""
        shape = jax.ShapeDtypeStruct((student_ids.size, teacher_ids.size), jnp.float32)
        args = (student_ids, teacher_ids)
        return jax.pure_callback(self._on_host, shape, *args, vmap_method="broadcast_all")

    def _on_host(self, student_ids: ArrayLike, teacher_ids: ArrayLike) -> np.ndarray:
        rows, columns = np.asarray(student_ids), np.asarray(teacher_ids)
        cost = np.ones((*rows.shape, columns.shape[-1]), np.float32)
        for b in np.ndindex(rows.shape[:-1]):
            known_K = np.flatnonzero(rows[b] < len(self.student_tokens))
            known_L = np.flatnonzero(columns[b] < len(self.teacher_tokens))
            student = [self.student_tokens[i] for i in rows[b][known_K]]
            teacher = [self.teacher_tokens[j] for j in columns[b][known_L]]
            cost[b][np.ix_(known_K, known_L)] = levenshtein_cost(student, teacher)
        return cost


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TransportLoss:
    """Optimal transport of each position and what is certain about it; every field is [*b].

    Attributes:
        value: the loss, in [lower, upper]; the only differentiable field.
        lower: the exact cost between the full distributions is at least this.
        upper: the exact cost between the full distributions is at most this.
        student_mass: probability of the student's tokens that were kept.
        teacher_mass: probability of the teacher's tokens that were kept.
    """

    value: jax.Array
    lower: jax.Array
    upper: jax.Array
    student_mass: jax.Array
    teacher_mass: jax.Array


def transport_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    cost: TokenCost | ArrayLike,
    *,
    top_k: int = 64,
    epsilon: ArrayLike = 0.05,
    student_temperature: ArrayLike = 1.0,
    teacher_temperature: ArrayLike = 1.0,
    max_iterations: int = 500,
    threshold: ArrayLike = 1e-3,
) -> TransportLoss:
    """Optimal transport from softmax(s / T_s) to softmax(t / T_t), with certified bounds.

    **Truncation.** Each side keeps its top_k likeliest tokens; the others become one, "rest", of
    mass r_q (r_p). Adding up the rest rows and columns of a plan for the full problem gives one for
    this small problem, and any of its plans can be spread out again. So with all costs to or from
    a rest set to 0, or to M = max_cost, it bounds the full problem: OT_0 ≤ OT ≤ OT_M.

    **Regularisation.** Sinkhorn solves the small problem with M roughly. Its plan, mended so that
    its sums are q and p, gives upper = ⟨P, C⟩ ≥ OT_M. Its potentials, after f_i = min_j c_ij − g_j
    and g_j = min_i c_ij − f_i, satisfy f_i + g_j ≤ c_ij, so value = q·f + p·g ≤ OT_M. With the
    rests' potentials set to −max_j g_j and −max(max_i f_i, −max_j g_j), over kept tokens, they
    satisfy it with cost 0 too, which gives lower. This needs no convergence; up to f32 rounding

        lower ≤ value ≤ upper,   upper − lower ≤ M · (r_q + r_p) + (upper − value),

    where upper − value is the solver's error, of the order of epsilon · M.

    **Gradient.** OT_M is a maximum over potentials, so its derivative by q is f (envelope theorem;
    f's free constant cancels in the softmax). A rough f is still an (upper − value)-subgradient.

    Args:
        student_logits: [*b, V]; bf16, f16 and f32 are computed in f32, f64 in f64. An entry of
            −inf (a padded vocabulary) has probability 0.
        teacher_logits: [*b, U], likewise. No gradient flows to them.
        cost: [V, U], not negative, or a `TokenCost`. No gradient flows to it.
        top_k: tokens kept on each side, at most; where it covers a vocabulary its r is 0.
        epsilon: strength of the entropic regularisation as a fraction of max_cost.
        student_temperature: scalar divisor of the student's logits.
        teacher_temperature: scalar divisor of the teacher's logits.
        max_iterations: of Sinkhorn's, which stops here or at `threshold`.
        threshold: total misplaced probability, the sum of |column sum − p|.

    Returns:
        Value, bounds and masses, not reduced. Memory: O(top_k²) a position. (In `jax.shard_map` it
        needs check_vma=False: the solver of ott-jax does not pass that check.)

    Raises:
        ValueError: for sizes that do not match, or settings out of range.
        ImportError: without ott-jax.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses import transport
        >>> cost = jnp.array([[0.0, 1.0], [0.25, 1.0], [1.0, 0.0]])
        >>> student, teacher = jnp.log(jnp.array([0.2, 0.7, 0.1])), jnp.log(jnp.array([0.5, 0.5]))
        >>> loss = transport.transport_loss(student, teacher, cost, epsilon=0.01)
        >>> round(float(loss.value), 2), bool(loss.lower <= loss.value <= loss.upper)
        (0.47, True)

    Reference:
        Cuturi, NeurIPS 2013 (Sinkhorn); Altschuler et al., NeurIPS 2017, algorithm 2 (mending).
    """
    options = _Options(top_k, max_iterations, epsilon, threshold)
    for name, got in vars(options).items():
        if isinstance(got, float | int) and got <= 0:
            raise ValueError(f"{name}: expected more than 0, got {got}")
    _ott()  # outside jit, which would add to the message of a missing extra
    student, teacher = jnp.asarray(student_logits), jnp.asarray(teacher_logits)
    check_leading_axes(student, teacher)
    token_cost = _token_cost(cost, (student.shape[-1], teacher.shape[-1]))
    sides = (student, student_temperature), (teacher, teacher_temperature)
    return _transport(options, token_cost, *sides)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Options:
    top_k: int = field(metadata={"static": True})
    max_iterations: int = field(metadata={"static": True})
    epsilon: ArrayLike
    threshold: ArrayLike


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _MatrixCost:
    matrix: jax.Array
    max_cost: jax.Array

    def __call__(self, student_ids: jax.Array, teacher_ids: jax.Array) -> jax.Array:
        return self.matrix[student_ids[:, None], teacher_ids[None, :]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _EmbeddingCost:
    student: jax.Array
    teacher: jax.Array
    max_cost: jax.Array

    def __call__(self, student_ids: jax.Array, teacher_ids: jax.Array) -> jax.Array:
        return _distances(self.student[student_ids][:, None], self.teacher[teacher_ids][None, :])


def _token_cost(cost: TokenCost | ArrayLike, widths: tuple[int, int]) -> TokenCost:
    """A checked cost: indexing past the end of an array would silently take its last entry."""
    if isinstance(cost, _EmbeddingCost):
        rows = (len(cost.student), len(cost.teacher))
        if rows[0] < widths[0] or rows[1] < widths[1]:
            raise ValueError(f"cost: expected embeddings of {widths} tokens, got {rows}")
    if callable(cost):
        return cost
    matrix = jnp.asarray(cost)
    if matrix.shape != widths:
        raise ValueError(f"cost: expected the shape [V, U] = {widths}, got {matrix.shape}")
    return _MatrixCost(matrix, matrix.max())


@jax.jit
def _transport(options: _Options, cost: TokenCost, student: tuple, teacher: tuple) -> TransportLoss:
    teacher_probs = lax.stop_gradient(jax.nn.softmax(scaled(*teacher)))
    position = jnp.vectorize(partial(_position, options, cost), signature="(v),(u)->(),(),(),(),()")
    return TransportLoss(*position(jax.nn.softmax(scaled(*student)), teacher_probs))


def _position(options: _Options, cost: TokenCost, q_V: jax.Array, p_U: jax.Array) -> tuple:
    """The fields of `TransportLoss` for one position, with costs in units of max_cost inside."""
    top_q, student_ids = lax.top_k(q_V, min(options.top_k, q_V.size))
    top_p, teacher_ids = lax.top_k(p_U, min(options.top_k, p_U.size))
    q = lax.stop_gradient(_with_rest(top_q, whole=top_q.size == q_V.size))
    p = _with_rest(top_p, whole=top_p.size == p_U.size)
    max_cost = lax.stop_gradient(jnp.asarray(cost.max_cost, q.dtype))
    unit = jnp.where(max_cost > 0, max_cost, 1)
    cost_KL = lax.stop_gradient(cost(student_ids, teacher_ids)).astype(q.dtype) / unit
    cost_KL = jnp.pad(cost_KL, (0, 1), constant_values=1)  # what the text calls OT_M

    plan_KL, g = _sinkhorn(q, p, cost_KL, options)
    f = (cost_KL - g[None, :]).min(1)
    g = (cost_KL - f[:, None]).min(0)
    upper = (_mended(plan_KL, q, p) * cost_KL).sum()

    # Products are summed, not contracted: accelerators may round the factors of a contraction.
    max_f, max_g = f[:-1].max(), g[:-1].max()
    kept = (q * f)[:-1].sum() + (p * g)[:-1].sum()
    lower = kept - q[-1] * max_g - p[-1] * jnp.maximum(max_f, -max_g)
    # Σ q = 1 turns r_q into 1 − Σ top_q, so that the whole gradient flows through the kept tokens.
    value = (top_q * (f[:-1] - f[-1])).sum() + f[-1] + (p * g).sum()

    certain = lax.stop_gradient(value)  # between the bounds, up to rounding
    lower, upper = jnp.minimum(lower, certain), jnp.maximum(upper, certain)
    return value * max_cost, lower * max_cost, upper * max_cost, q[:-1].sum(), p[:-1].sum()


def _sinkhorn(q: jax.Array, p: jax.Array, cost_KL: jax.Array, options: _Options) -> tuple:
    """ott-jax's plan [K, L], whose sums are roughly q and p, and the teacher's potentials [L]."""
    geometry, linear = _ott()
    stop = {"max_iterations": options.max_iterations, "threshold": options.threshold}
    with jax.numpy_rank_promotion("allow"):  # ott relies on it, a caller may have forbidden it
        costs = geometry.Geometry(cost_matrix=cost_KL, epsilon=options.epsilon)
        solution = linear.solve(costs, a=q, b=p, **stop)
        return solution.matrix, solution.g


def _ott() -> tuple[ModuleType, ModuleType]:
    try:
        with warnings.catch_warnings():
            # ott 0.6 imports jaxopt for costs that are not used here; jaxopt says it is retired.
            warnings.filterwarnings("ignore", "JAXopt is no longer maintained", DeprecationWarning)
            from ott.geometry import geometry
            from ott.solvers import linear
    except ImportError:
        raise ImportError("transport needs ott-jax: pip install 'uld-jax[ot]'") from None
    return geometry, linear


def _mended(plan_KL: jax.Array, q: jax.Array, p: jax.Array) -> jax.Array:
    """A plan near `plan_KL` whose row sums are q and column sums p."""
    tiny = jnp.finfo(plan_KL.dtype).tiny
    plan_KL *= jnp.minimum(1, q / jnp.maximum(plan_KL.sum(1), tiny))[:, None]
    plan_KL *= jnp.minimum(1, p / jnp.maximum(plan_KL.sum(0), tiny))[None, :]
    missing_q = jnp.maximum(q - plan_KL.sum(1), 0)
    missing_p = jnp.maximum(p - plan_KL.sum(0), 0)
    return plan_KL + jnp.outer(missing_q, missing_p) / jnp.maximum(missing_q.sum(), tiny)


def _with_rest(top_K: jax.Array, *, whole: bool) -> jax.Array:
    rest = 0 * top_K[:1] if whole else jnp.maximum(1 - top_K.sum(keepdims=True), 0)
    return jnp.append(top_K, rest)


def _distances(one: jax.Array, other: jax.Array) -> jax.Array:
    """L2 in f32 over the last axis; XLA fuses it, so that [K, L, E] is not stored."""
    return jnp.linalg.norm(one.astype(jnp.float32) - other.astype(jnp.float32), axis=-1)
