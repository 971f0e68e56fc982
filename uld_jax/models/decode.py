"""Batched generation: prefill the prompts, then one token at a time until every row has ended."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uld_jax.errors import UserError
from uld_jax.models.config import DecoderConfig
from uld_jax.models.decoder import Decoder

if TYPE_CHECKING:
    from uld_jax.models.hf_io import LoadedModel


def sample(
    logits_BV: jax.Array, key: jax.Array, temperature: jax.Array, top_p: jax.Array
) -> jax.Array:
    """Draws one token a row from softmax(logits / temperature), cut to the nucleus of mass top_p.

    Args:
        logits_BV: Next-token logits.
        key: PRNG key.
        temperature: Above 0.
        top_p: The smallest set of tokens with at least this mass is kept; 1 keeps all.

    Returns:
        int32[B].

    Example:
        >>> logits = jnp.array([[9.0, 1.0, 0.0]])
        >>> sample(logits, jax.random.key(0), jnp.array(1.0), jnp.array(0.5)).tolist()
        [0]
    """
    scaled_BV = logits_BV / temperature
    sorted_BV = jnp.sort(jax.nn.softmax(scaled_BV, axis=-1), axis=-1, descending=True)
    before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
    # The least probability inside the nucleus; the first token is always in.
    least_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, 1.0), axis=-1, keepdims=True)
    kept_BV = jnp.where(jax.nn.softmax(scaled_BV, axis=-1) >= least_B1, scaled_BV, -jnp.inf)
    return jax.random.categorical(key, kept_BV, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("graph", "max_new_tokens", "greedy"))
def _generate(
    graph: nnx.GraphDef[Decoder],
    params: nnx.State,
    prompts_BP: jax.Array,
    lengths_B: jax.Array,
    stop_ids: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    *,
    max_new_tokens: int,
    greedy: bool,
) -> tuple[jax.Array, jax.Array]:
    """Tokens [B, max_new_tokens] and how many of them each row wrote before its stop token."""
    model = nnx.merge(graph, params)
    rows = len(lengths_B)
    last_BD, cache, next_B = model.start(prompts_BP, lengths_B, max_new_tokens)

    def choose(hidden_BD: jax.Array, step: jax.Array) -> jax.Array:
        logits_BV = model.logits(hidden_BD)
        if greedy:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return sample(logits_BV, jax.random.fold_in(key, step), temperature, top_p)

    def unfinished(carry: Any) -> jax.Array:
        step, *_, done_B = carry
        return (step < max_new_tokens) & ~jnp.all(done_B)

    def advance(carry: Any) -> Any:
        step, token_B, cache, out_BN, count_B, done_B = carry
        done_B |= jnp.isin(token_B, stop_ids)
        out_BN = out_BN.at[:, step].set(jnp.where(done_B, 0, token_B))
        count_B += ~done_B
        hidden_B1D, cache = model.read(token_B[:, None], (next_B + step)[:, None], cache)
        return step + 1, choose(hidden_B1D[:, 0], step + 1), cache, out_BN, count_B, done_B

    start = jnp.zeros((), jnp.int32)
    carry = (
        start,
        choose(last_BD, start),
        cache,
        jnp.zeros((rows, max_new_tokens), jnp.int32),
        jnp.zeros(rows, jnp.int32),
        lengths_B == 0,
    )
    _, _, _, out_BN, count_B, _ = jax.lax.while_loop(unfinished, advance, carry)
    return out_BN, count_B


def length_bucket(length: int, smallest: int = 16) -> int:
    """The padded prompt length: 16, 24, 32, 48, 64, 96, …, so that few programs are compiled.

    Example:
        >>> [length_bucket(n) for n in (1, 17, 25, 100)]
        [16, 24, 32, 128]
    """
    bucket = smallest
    while bucket < length:
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket * 4 // 3
    return bucket


def generate(
    model: Decoder,
    prompt_ids: Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int,
    eos_id: int | Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Continues prompts of any lengths, batch by batch, with a key-value cache.

    Prompts are sorted by length and padded to a few bucket lengths, so the number of compiled
    programs does not grow with the number of lengths. A row ends at its stop token, a batch when
    all its rows have ended.

    Args:
        model: The decoder.
        prompt_ids: Token ids, one sequence a prompt, none empty.
        max_new_tokens: At most this many new tokens a prompt.
        eos_id: The id, or ids, that end an answer; not part of it.
        temperature: 0 for greedy, else the sampling temperature.
        top_p: Nucleus mass in (0, 1].
        key: PRNG key for sampling; key 0 by default.
        batch_size: Rows computed together.
        progress: Called with the number of prompts done since the last call.

    Returns:
        The new token ids of each prompt, in the order given, without the stop token.

    Raises:
        UserError: Settings out of range; a prompt that is empty, that holds an id outside the
            vocabulary, or that with the new tokens is longer than the model's positions.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> model = Decoder(tiny_config(), rngs=nnx.Rngs(0))
        >>> [len(ids) for ids in generate(model, [[1, 2], [3]], max_new_tokens=4, eos_id=-1)]
        [4, 4]
    """
    _check_settings(max_new_tokens, batch_size, temperature, top_p)
    _check_prompts(model.config, prompt_ids, max_new_tokens)
    graph, params = nnx.split(model)
    stop_ids = jnp.array(np.atleast_1d(eos_id), jnp.int32)
    key = jax.random.key(0) if key is None else key
    order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    answers: list[list[int]] = [[] for _ in prompt_ids]
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = length_bucket(max(len(prompt_ids[i]) for i in rows))
        # Rows that fill up a last batch have length 0: done before they start.
        prompts_BP = np.zeros((min(batch_size, len(order)), width), np.int32)
        lengths_B = np.zeros(len(prompts_BP), np.int32)
        for row, i in enumerate(rows):
            lengths_B[row] = len(prompt_ids[i])
            prompts_BP[row, : lengths_B[row]] = prompt_ids[i]
        out_BN, count_B = jax.device_get(
            _generate(
                graph,
                params,
                prompts_BP,
                lengths_B,
                stop_ids,
                jax.random.fold_in(key, start),
                jnp.float32(temperature or 1.0),
                jnp.float32(top_p),
                max_new_tokens=max_new_tokens,
                greedy=temperature == 0,
            )
        )
        for row, i in enumerate(rows):
            answers[i] = out_BN[row, : count_B[row]].tolist()
        if progress is not None:
            progress(len(rows))
    return answers


def _check_settings(max_new_tokens: int, batch_size: int, temperature: float, top_p: float) -> None:
    if not (0 <= temperature < float("inf") and 0 < top_p <= 1):
        raise UserError(
            f"temperature must be >= 0 and 0 < top_p <= 1: got {temperature} and {top_p}"
        )
    if max_new_tokens < 1 or batch_size < 1:
        raise UserError(
            f"max_new_tokens and batch_size must be >= 1: got {max_new_tokens} and {batch_size}"
        )


def _check_prompts(
    config: DecoderConfig, prompt_ids: Sequence[Sequence[int] | np.ndarray], max_new_tokens: int
) -> None:
    empty = [i for i, ids in enumerate(prompt_ids) if len(ids) == 0]
    if empty:
        raise UserError(f"prompts {empty[:5]} have no tokens; a prompt needs at least one")
    foreign = [
        i for i, ids in enumerate(prompt_ids) if min(ids) < 0 or max(ids) >= config.vocab_size
    ]
    if foreign:
        raise UserError(
            f"prompts {foreign[:5]} have token ids outside 0 … {config.vocab_size - 1}; "
            "encode them with this model's own tokenizer"
        )
    room = config.max_positions - max_new_tokens
    long = [i for i, ids in enumerate(prompt_ids) if len(ids) > room]
    if long:
        raise UserError(
            f"prompts {long[:5]} have up to {max(len(prompt_ids[i]) for i in long)} tokens, which "
            f"with max_new_tokens {max_new_tokens} exceed the model's {config.max_positions} "
            "positions; shorten the prompts or ask for fewer new tokens"
        )


def line_stop_ids(m: "LoadedModel") -> list[int]:
    """Every token that ends a one-line answer: end of sequence, and line breaks.

    Args:
        m: The model and its tokenizer.

    Returns:
        Token ids, ascending.
    """
    texts = m.tokenizer.batch_decode([[i] for i in range(m.config.vocab_size)])
    breaks = {i for i, text in enumerate(texts) if "\n" in text and not text.strip()}
    ends = [i for i in (m.config.eos_id, m.tokenizer.eos_token_id) if i is not None]
    # Instruction-tuned models may name several.
    return sorted(breaks.union(*(np.atleast_1d(i).tolist() for i in ends)))


def complete(
    m: "LoadedModel",
    prompt_ids: Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Greedy one-line continuations as text.

    Args:
        m: The model and its tokenizer.
        prompt_ids: Token ids, one sequence a prompt.
        max_new_tokens: At most this many tokens an answer.
        batch_size: Rows computed together.
        progress: Called with the number of prompts done since the last call.

    Returns:
        One text a prompt, in the order given, special tokens left out.

    Raises:
        UserError: As `generate`.
    """
    ids = generate(
        m.model,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        eos_id=line_stop_ids(m),
        batch_size=batch_size,
        progress=progress,
    )
    texts = m.tokenizer.batch_decode(ids, skip_special_tokens=True)
    # A token may hold text and a line break after it: such a one does not stop its row.
    return [text.partition("\n")[0] for text in texts]
