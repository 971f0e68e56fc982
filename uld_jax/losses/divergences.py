"""Divergences between a student and a teacher of the same tokenizer: the baselines of ULD.

p is the teacher's distribution and q the student's, p = softmax(t / T_t), q = softmax(s / T_s). All
functions share these rules:

- Logits are compared id by id. Where one vocabulary is padded further than the other (151,936 rows
  against 152,064), both are cut to the smaller width before the softmax: the surplus rows belong
  to no token. Nothing here can see whether equal ids mean equal tokens.
- 0 · log 0 = 0, so an entry of −inf (a masked vocabulary) on either side gives no NaN. Where KL is
  +inf, the infinite terms count as constants: the gradient is that of the other terms.
- A row may be +inf, so leave rows out with `jnp.where`, not by a weight of 0.
- There is no factor T² inside. With both temperatures T the gradient of a KL shrinks as 1/T²:
  multiply by T² to keep its weight against a cross-entropy (Hinton et al., arXiv 1503.02531,
  section 2).
- No gradient flows to the teacher.
"""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from uld_jax.losses.probabilities import check_leading_axes, scaled

__all__ = [
    "DIVERGENCES",
    "check_divergence",
    "jensen_shannon_divergence",
    "kl_divergence",
    "reverse_kl_divergence",
    "skewed_kl_divergence",
    "skewed_reverse_kl_divergence",
    "total_variation_distance",
]


def kl_divergence(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    student_temperature: ArrayLike = 1.0,
    teacher_temperature: ArrayLike = 1.0,
) -> jax.Array:
    """The forward KL divergence of each position: the student must cover the teacher.

    KL(p ‖ q) = Σ_v p_v (log p_v − log q_v); +inf where the teacher has mass and the student none.

    Args:
        student_logits: [*b, V]; bf16, f16 and f32 are computed in f32, f64 in f64.
        teacher_logits: [*b, U], likewise; the wider side is cut to the other's width.
        student_temperature: scalar divisor of the student's logits.
        teacher_temperature: scalar divisor of the teacher's logits.

    Returns:
        f32[*b] (f64 for f64 logits), not reduced, at least 0 up to rounding.

    Raises:
        ValueError: where the leading axes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses.divergences import kl_divergence
        >>> student, teacher = jnp.zeros(2), jnp.array([0.0, -jnp.inf])
        >>> round(float(kl_divergence(student, teacher)), 4)
        0.6931
        >>> float(kl_divergence(teacher, student))
        inf

    Reference:
        Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2.
    """
    log_q, log_p = _log_probabilities(
        student_logits, teacher_logits, student_temperature, teacher_temperature
    )
    return _kl(log_p, log_q)


def reverse_kl_divergence(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    student_temperature: ArrayLike = 1.0,
    teacher_temperature: ArrayLike = 1.0,
) -> jax.Array:
    """The reverse KL divergence of each position: the student must stay where the teacher is.

    KL(q ‖ p) = Σ_v q_v (log q_v − log p_v); +inf where the student has mass and the teacher none.

    Args:
        student_logits: [*b, V], see `kl_divergence`.
        teacher_logits: [*b, U].
        student_temperature: scalar divisor of the student's logits.
        teacher_temperature: scalar divisor of the teacher's logits.

    Returns:
        f32[*b] (f64 for f64 logits), not reduced, at least 0 up to rounding.

    Raises:
        ValueError: where the leading axes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses.divergences import reverse_kl_divergence
        >>> student, teacher = jnp.array([0.0, -jnp.inf]), jnp.zeros(2)
        >>> round(float(reverse_kl_divergence(student, teacher)), 4)
        0.6931

    Reference:
        Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", arXiv 2306.08543,
        section 2, there over sequences, here at each position.
    """
    log_q, log_p = _log_probabilities(
        student_logits, teacher_logits, student_temperature, teacher_temperature
    )
    return _kl(log_q, log_p)


def skewed_kl_divergence(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    alpha: ArrayLike = 0.1,
    student_temperature: ArrayLike = 1.0,
    teacher_temperature: ArrayLike = 1.0,
) -> jax.Array:
    """DistiLLM's skew KL divergence of each position: forward KL that cannot be infinite.

    KL(p ‖ αp + (1−α)q), at most −log α. α → 0 is `kl_divergence`.

    Args:
        student_logits: [*b, V], see `kl_divergence`.
        teacher_logits: [*b, U].
        alpha: scalar α, the teacher's share of the mixture, 0 < α < 1.
        student_temperature: scalar divisor of the student's logits.
        teacher_temperature: scalar divisor of the teacher's logits.

    Returns:
        f32[*b] (f64 for f64 logits), not reduced, in [0, −log α] up to rounding.

    Raises:
        ValueError: where the leading axes differ, or alpha is outside (0, 1).

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses.divergences import skewed_kl_divergence
        >>> student, teacher = jnp.array([-jnp.inf, 0.0]), jnp.array([0.0, -jnp.inf])
        >>> round(float(skewed_kl_divergence(student, teacher, alpha=0.5)), 4)
        0.6931

    Reference:
        Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", arXiv
        2402.03898, section 3.1.
    """
    _check_share("alpha", alpha)
    log_q, log_p = _log_probabilities(
        student_logits, teacher_logits, student_temperature, teacher_temperature
    )
    return _kl(log_p, _log_mixture(log_p, log_q, alpha))


def skewed_reverse_kl_divergence(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    alpha: ArrayLike = 0.1,
    student_temperature: ArrayLike = 1.0,
    teacher_temperature: ArrayLike = 1.0,
) -> jax.Array:
    """DistiLLM's skew reverse KL divergence of each position: reverse KL that is never infinite.

    KL(q ‖ (1−α)p + αq), at most −log α. α → 0 is `reverse_kl_divergence`. As in the paper the
    gradient flows through both places of q.

    Args:
        student_logits: [*b, V], see `kl_divergence`.
        teacher_logits: [*b, U].
        alpha: scalar α, the student's share of the mixture, 0 < α < 1.
        student_temperature: scalar divisor of the student's logits.
        teacher_temperature: scalar divisor of the teacher's logits.

    Returns:
        f32[*b] (f64 for f64 logits), not reduced, in [0, −log α] up to rounding.

    Raises:
        ValueError: where the leading axes differ, or alpha is outside (0, 1).

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses.divergences import skewed_reverse_kl_divergence
        >>> student, teacher = jnp.array([-jnp.inf, 0.0]), jnp.array([0.0, -jnp.inf])
        >>> round(float(skewed_reverse_kl_divergence(student, teacher, alpha=0.5)), 4)
        0.6931

    Reference:
        Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", arXiv
        2402.03898, section 3.1.
    """
    _check_share("alpha", alpha)
    log_q, log_p = _log_probabilities(
        student_logits, teacher_logits, student_temperature, teacher_temperature
    )
    return _kl(log_q, _log_mixture(log_q, log_p, alpha))


def jensen_shannon_divergence(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    beta: ArrayLike = 0.5,
    student_temperature: ArrayLike = 1.0,
    teacher_temperature: ArrayLike = 1.0,
) -> jax.Array:
    """GKD's generalised Jensen–Shannon divergence of each position; β = ½ is the symmetric one.

    β KL(p ‖ m) + (1−β) KL(q ‖ m), m = βp + (1−β)q. It vanishes as β → 0 or 1, where JSD / β → KL(p
    ‖ q) and JSD / (1−β) → KL(q ‖ p). TRL jumps to these two KL divergences at exactly 0 and 1; here
    both ends are refused, because `kl_divergence` and `reverse_kl_divergence` have their own names.

    Args:
        student_logits: [*b, V], see `kl_divergence`.
        teacher_logits: [*b, U].
        beta: scalar β, the teacher's share of the mixture, 0 < β < 1.
        student_temperature: scalar divisor of the student's logits.
        teacher_temperature: scalar divisor of the teacher's logits.

    Returns:
        f32[*b] (f64 for f64 logits), not reduced, in [0, ln 2] up to rounding.

    Raises:
        ValueError: where the leading axes differ, or beta is outside (0, 1).

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses.divergences import jensen_shannon_divergence
        >>> student, teacher = jnp.array([-jnp.inf, 0.0]), jnp.array([0.0, -jnp.inf])
        >>> round(float(jensen_shannon_divergence(student, teacher)), 4)
        0.6931

    Reference:
        Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated
        Mistakes" (GKD), arXiv 2306.13649, section 2.
    """
    _check_share("beta", beta)
    log_q, log_p = _log_probabilities(
        student_logits, teacher_logits, student_temperature, teacher_temperature
    )
    log_m = _log_mixture(log_p, log_q, beta)
    share = jnp.asarray(beta, log_m.dtype)
    return share * _kl(log_p, log_m) + (1 - share) * _kl(log_q, log_m)


def total_variation_distance(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    student_temperature: ArrayLike = 1.0,
    teacher_temperature: ArrayLike = 1.0,
) -> jax.Array:
    """The total variation distance of each position.

    ½ Σ_v |q_v − p_v|. The ULD, which is free to match any id with any other, is at most twice it.

    Args:
        student_logits: [*b, V], see `kl_divergence`.
        teacher_logits: [*b, U].
        student_temperature: scalar divisor of the student's logits.
        teacher_temperature: scalar divisor of the teacher's logits.

    Returns:
        f32[*b] (f64 for f64 logits), not reduced, in [0, 1] up to rounding.

    Raises:
        ValueError: where the leading axes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses.divergences import total_variation_distance
        >>> float(total_variation_distance(jnp.zeros(4), jnp.array([0.0, 0.0, -jnp.inf, -jnp.inf])))
        0.5

    Reference:
        Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation", arXiv
        2307.15190.
    """
    log_q, log_p = _log_probabilities(
        student_logits, teacher_logits, student_temperature, teacher_temperature
    )
    return jnp.abs(jnp.exp(log_q) - jnp.exp(log_p)).sum(-1) / 2


def check_divergence(name: str, options: Mapping[str, ArrayLike] | None = None) -> None:
    """Refuse a name that is not in `DIVERGENCES`, and options that it does not have.

    Args:
        name: the name to check.
        options: its arguments besides logits and temperatures.

    Raises:
        ValueError: naming the valid ones.

    Example:
        >>> from uld_jax.losses.divergences import check_divergence
        >>> check_divergence("jsd", {"beta": 0.3})
        >>> check_divergence("kl_div")
        Traceback (most recent call last):
        ...
        ValueError: divergence: unknown 'kl_div'; expected one of 'kl', 'reverse_kl', 'skewed_kl', \
'skewed_reverse_kl', 'jsd', 'tvd'
    """
    if name not in DIVERGENCES:
        expected = ", ".join(map(repr, DIVERGENCES))
        raise ValueError(f"divergence: unknown {name!r}; expected one of {expected}")
    known = inspect.signature(DIVERGENCES[name]).parameters.keys() & {"alpha", "beta"}
    for option, value in (options or {}).items():
        if option not in known:
            expected = ", ".join(map(repr, sorted(known))) or "none"
            raise ValueError(f"option of {name!r}: unknown {option!r}; expected {expected}")
        _check_share(option, value)


DIVERGENCES: Mapping[str, Callable[..., jax.Array]] = MappingProxyType(
    {
        "kl": kl_divergence,
        "reverse_kl": reverse_kl_divergence,
        "skewed_kl": skewed_kl_divergence,
        "skewed_reverse_kl": skewed_reverse_kl_divergence,
        "jsd": jensen_shannon_divergence,
        "tvd": total_variation_distance,
    }
)


# optax.losses.kl_divergence and its variant with log-targets give 0 · inf = NaN on masked entries.
def _kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """Σ p (log p − log q) over the last axis."""
    p = jnp.exp(log_p)
    # A probability that underflows is no mass. NaN is not absent.
    absent = p < jnp.finfo(p.dtype).tiny
    log_ratio = jnp.where(absent, 0, log_p) - jnp.where(absent, 0, log_q)
    infinite = jnp.isposinf(log_ratio)
    return jnp.where(infinite, jnp.inf, p * jnp.where(infinite, 0, log_ratio)).sum(-1)


def _log_mixture(log_one: jax.Array, log_other: jax.Array, share: ArrayLike) -> jax.Array:
    """log(share · one + (1 − share) · other)."""
    share = jnp.asarray(share, log_one.dtype)
    # The derivative of logaddexp(−inf, −inf) is NaN.
    absent = jnp.isneginf(log_one) & jnp.isneginf(log_other)
    one = jnp.where(absent, 0, log_one) + jnp.log(share)
    other = jnp.where(absent, 0, log_other) + jnp.log1p(-share)
    return jnp.where(absent, -jnp.inf, jnp.logaddexp(one, other))


def _log_probabilities(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    student_temperature: ArrayLike,
    teacher_temperature: ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """The logarithms of q and p over the ids that both have; no gradient to the latter."""
    student_V, teacher_U = jnp.asarray(student_logits), jnp.asarray(teacher_logits)
    check_leading_axes(student_V, teacher_U)
    width = min(student_V.shape[-1], teacher_U.shape[-1])

    log_q = jax.nn.log_softmax(scaled(student_V[..., :width], student_temperature))
    log_p = jax.nn.log_softmax(scaled(teacher_U[..., :width], teacher_temperature))
    return log_q, lax.stop_gradient(log_p)


def _check_share(name: str, share: ArrayLike) -> None:
    if isinstance(share, int | float) and not 0 < share < 1:
        raise ValueError(f"{name}: expected a number between 0 and 1, both excluded, got {share}")
