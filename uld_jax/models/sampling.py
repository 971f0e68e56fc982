"""From next-token logits to tokens: what may be drawn, and the draw; and log-probabilities."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from uld_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; what each setting does, and their order, is transformers'.

    The repetition penalty comes first, also when greedy; then the temperature, and of its softmax
    top-k, top-p and min-p keep a part.

    Args:
        temperature: 0 for the most likely token (the next three then change nothing), else what
            the logits are divided by.
        top_k: Keeps the k most likely tokens, and those as likely as the k-th; 0 keeps all.
        top_p: Keeps the most likely tokens up to this mass, and those as likely as the last of
            them; 1 keeps all.
        min_p: Keeps tokens at least this times as likely as the most likely one; 0 keeps all.
        repetition_penalty: Logits of tokens in the prompt or the answer are divided by this where
            positive, multiplied where negative. (Of an encoder-decoder's prompt, which is not
            what its decoder reads, they are left alone.)

    Raises:
        UserError: A setting out of its range.

    Example:
        >>> Sampling(temperature=0.7, top_p=0.9).in_use()
        {'temperature': 0.7, 'top_p': 0.9}
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        penalty = self.repetition_penalty
        for name, good, wanted in (
            ("temperature", 0 <= self.temperature < math.inf, ">= 0 and finite"),
            ("top_k", self.top_k >= 0 and self.top_k % 1 == 0, "a whole number >= 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and <= 1"),
            ("min_p", 0 <= self.min_p <= 1, ">= 0 and <= 1"),
            ("repetition_penalty", 0 < penalty < math.inf, "above 0 and finite"),
        ):
            if not good:
                raise UserError(f"{name} must be {wanted}: got {getattr(self, name)}")

    def in_use(self) -> dict[str, float]:
        """The arguments of `choose` that change something."""
        used: dict[str, float] = {}
        if self.repetition_penalty != 1:
            used["repetition_penalty"] = self.repetition_penalty
        if self.temperature > 0:
            used["temperature"] = self.temperature
            used |= {"top_k": self.top_k} if self.top_k else {}
            used |= {"top_p": self.top_p} if self.top_p < 1 else {}
            used |= {"min_p": self.min_p} if self.min_p > 0 else {}
        return used


def choose(
    logits_BV: jax.Array,
    keys_B: jax.Array | None = None,
    seen_BV: jax.Array | None = None,
    *,
    temperature: jax.typing.ArrayLike | None = None,
    top_k: jax.typing.ArrayLike | None = None,
    top_p: jax.typing.ArrayLike | None = None,
    min_p: jax.typing.ArrayLike | None = None,
    repetition_penalty: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """One token a row; what is None is not computed.

    Args:
        logits_BV: Next-token logits.
        keys_B: One PRNG key a row; needed with a temperature.
        seen_BV: bool, the tokens that the penalty falls on; needed with a repetition penalty.
        temperature: Above 0, or None for the most likely token.
        top_k: See `Sampling`.
        top_p: See `Sampling`.
        min_p: See `Sampling`.
        repetition_penalty: See `Sampling`.

    Returns:
        int32[B].

    Example:
        >>> logits = jnp.array([[9.0, 1.0, 0.0]])
        >>> choose(logits).tolist()
        [0]
        >>> keys = jax.random.split(jax.random.key(0), 1)
        >>> choose(logits, keys, temperature=1.0, top_p=0.5).tolist()
        [0]
    """
    if repetition_penalty is not None:
        assert seen_BV is not None
        logits_BV = penalise(logits_BV, seen_BV, repetition_penalty)
    if temperature is None:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    assert keys_B is not None
    kept_BV = keep(logits_BV / temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return jax.vmap(jax.random.categorical)(keys_B, kept_BV).astype(jnp.int32)


def penalise(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.typing.ArrayLike) -> jax.Array:
    """Logits with the seen tokens' made smaller (for a penalty above 1).

    Args:
        logits_BV: Next-token logits.
        seen_BV: bool.
        penalty: Above 0.

    Returns:
        [B, V].

    Example:
        >>> penalise(jnp.array([[4.0, -4.0, 3.0]]), jnp.array([[True, True, False]]), 2.0).tolist()
        [[2.0, -8.0, 3.0]]

    Reference:
        Keskar et al., arXiv 1909.05858, section 4.1.
    """
    penalised_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return jnp.where(seen_BV, penalised_BV, logits_BV)


def keep(
    scores_BV: jax.Array,
    *,
    top_k: jax.typing.ArrayLike | None = None,
    top_p: jax.typing.ArrayLike | None = None,
    min_p: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Scores with those that may not be drawn replaced by -inf.

    Args:
        scores_BV: Logits over the temperature.
        top_k: See `Sampling`; None for all.
        top_p: See `Sampling`; None for all.
        min_p: See `Sampling`; None for all.

    Returns:
        [B, V]; the most likely token is always kept.

    Example:
        >>> scores = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
        >>> jnp.isfinite(keep(scores, top_p=0.6)).tolist()
        [[True, True, False, False]]
        >>> jnp.isfinite(keep(scores, min_p=0.2)).tolist()
        [[True, True, True, False]]
    """
    if top_k is not None:
        least_B1 = least_kept(scores_BV, jnp.ones_like(scores_BV), top_k)[:, None]
        scores_BV = jnp.where(scores_BV >= least_B1, scores_BV, -jnp.inf)
    if top_p is not None:
        probs_BV = jax.nn.softmax(scores_BV, axis=-1)
        least_B1 = least_kept(probs_BV, probs_BV, top_p)[:, None]
        scores_BV = jnp.where(probs_BV >= least_B1, scores_BV, -jnp.inf)
    if min_p is not None:
        best_B1 = jnp.max(scores_BV, axis=-1, keepdims=True)
        scores_BV = jnp.where(scores_BV - best_B1 >= jnp.log(min_p), scores_BV, -jnp.inf)
    return scores_BV


def least_kept(
    values_BV: jax.Array, weights_BV: jax.Array, limit: jax.typing.ArrayLike
) -> jax.Array:
    """The smallest value v of each row with Σ {weight : value > v} < limit.

    With weights of 1 it is the limit-th largest value; with probabilities as values and weights,
    the least in the nucleus. It is found by bisection over the bit patterns of floats, whose order
    is that of the numbers: 32 sums, where a sort, or `jax.lax.top_k` on a CPU, of a large
    vocabulary takes many times as long.

    Args:
        values_BV: f32.
        weights_BV: f32, none negative.
        limit: Above 0.

    Returns:
        f32[B].

    Example:
        >>> probs = jnp.array([[0.125, 0.5, 0.25, 0.125]])
        >>> least_kept(probs, probs, 0.6).tolist(), least_kept(probs, jnp.ones((1, 4)), 3).tolist()
        ([0.25], [0.125])

    Reference:
        The nucleus: Holtzman et al., arXiv 1904.09751.
    """
    bits_BV = _ordered(jax.lax.bitcast_convert_type(values_BV, jnp.int32))

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = bounds
        # Their mean, without their sum, which may overflow.
        middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)
        above_B = jnp.sum(jnp.where(bits_BV > middle_B[:, None], weights_BV, 0), axis=-1)
        few_B = above_B < limit
        return jnp.where(few_B, low_B, middle_B + 1), jnp.where(few_B, middle_B, high_B)

    bounds = jnp.min(bits_BV, axis=-1), jnp.max(bits_BV, axis=-1)
    _, least_B = jax.lax.fori_loop(0, 32, halve, bounds)
    return jax.lax.bitcast_convert_type(_ordered(least_B), jnp.float32)


def _ordered(bits: jax.Array) -> jax.Array:
    """Bit patterns of floats as integers of the same order; its own inverse."""
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def log_probs_of(logits_BV: jax.Array, tokens_B: jax.Array) -> jax.Array:
    """Log-probabilities of tokens.

    Args:
        logits_BV: f32 logits.
        tokens_B: int32.

    Returns:
        f32[B].

    Example:
        >>> jnp.exp(log_probs_of(jnp.zeros((1, 4)), jnp.array([2]))).tolist()
        [0.25]
    """
    chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
