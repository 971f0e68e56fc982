"""A pool of rows that decode together: filled, advanced and refilled by three compiled programs."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from uld_jax.models.cache import pin, replace_rows, widen_prompts
from uld_jax.models.encoder_decoder import EncoderDecoder
from uld_jax.models.sampling import choose, log_probs_of
from uld_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiled programs are made for.

    Args:
        width: Tokens of the longest prompt, padded.
        new_tokens: At most this many tokens an answer, N.
        log_probs: Whether log-probabilities are recorded.
    """

    width: int
    new_tokens: int
    log_probs: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of the model, as data.

    Args:
        stop_ids: int32, the tokens that end a row.
        key: PRNG key.
        settings: Of `choose`, those in use.
    """

    stop_ids: jax.Array
    key: jax.Array
    settings: dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
    """Rows that decode together.

    Args:
        cache: What they have read.
        numbers_BW: uint32, of each row's prompt.
        token_B: int32, the token that each reads next.
        position_B: int32, where.
        count_B: int32, the tokens of its answer so far.
        done_B: Whether it has ended.
        out_BN: int32, the answers.
        log_probs_BN: f32, theirs, or None.
        seen_BV: bool, the tokens that the repetition penalty falls on, or None.
    """

    cache: Any
    numbers_BW: jax.Array
    token_B: jax.Array
    position_B: jax.Array
    count_B: jax.Array
    done_B: jax.Array
    out_BN: jax.Array
    log_probs_BN: jax.Array | None
    seen_BV: jax.Array | None


@functools.partial(jax.jit, static_argnames=("graph", "plan"))
def fill(
    graph: nnx.GraphDef[Any],
    params: nnx.State,
    request: Request,
    prompts_BP: jax.Array,
    lengths_B: jax.Array,
    numbers_BW: jax.Array,
    *,
    plan: Plan,
) -> Pool:
    """Reads prompts into a new pool, and chooses each answer's first token.

    Args:
        graph: The model's structure.
        params: Its state.
        request: What is asked of it.
        prompts_BP: int32 token ids, right-padded to at most `plan.width`.
        lengths_B: Tokens of each; 0 for a row that is done before it starts.
        numbers_BW: uint32, of the prompts: with the key and the step, they decide a sample.
        plan: What the program is made for.

    Returns:
        The pool.
    """
    model = nnx.merge(graph, params)
    prompts_BP, lengths_B = constrain(prompts_BP, "batch", None), constrain(lengths_B, "batch")
    # Room for the widest prompt in every pool: frequencies of rotary positions may depend on it.
    room = plan.new_tokens
    if not isinstance(model, EncoderDecoder):
        room += plan.width - prompts_BP.shape[1]
    last_BD, cache, position_B = model.start(prompts_BP, lengths_B, room)
    rows = len(lengths_B)
    pool = Pool(
        cache=widen_prompts(cache, plan.width),
        numbers_BW=numbers_BW,
        token_B=jnp.zeros(rows, jnp.int32),
        position_B=position_B,
        count_B=jnp.zeros(rows, jnp.int32),
        done_B=lengths_B == 0,
        out_BN=jnp.zeros((rows, plan.new_tokens), jnp.int32),
        log_probs_BN=jnp.zeros((rows, plan.new_tokens)) if plan.log_probs else None,
        seen_BV=None,
    )
    if "repetition_penalty" in request.settings:
        seen_BV = _seen(model, prompts_BP, lengths_B)
        pool = dataclasses.replace(pool, seen_BV=seen_BV)
    return _pin(_choose(pool, model.logits(last_BD), request, plan))


@functools.partial(jax.jit, static_argnames=("graph", "plan"), donate_argnames="pool")
def refill(
    graph: nnx.GraphDef[Any],
    params: nnx.State,
    request: Request,
    pool: Pool,
    rows_R: jax.Array,
    prompts_RP: jax.Array,
    lengths_R: jax.Array,
    numbers_RW: jax.Array,
    *,
    plan: Plan,
) -> Pool:
    """Reads prompts into rows that are done; the other rows do not notice.

    Args:
        graph: The model's structure.
        params: Its state.
        request: What is asked of it.
        pool: The pool; its arrays are used up.
        rows_R: int32, the rows; B for a prompt that is none.
        prompts_RP: As in `fill`.
        lengths_R: As in `fill`.
        numbers_RW: As in `fill`.
        plan: What the program is made for.

    Returns:
        The pool.
    """
    fresh = fill(graph, params, request, prompts_RP, lengths_R, numbers_RW, plan=plan)
    cache = replace_rows(pool.cache, fresh.cache, rows_R)
    others = (dataclasses.replace(each, cache=None) for each in (pool, fresh))
    merged = jax.tree.map(lambda old, new: old.at[rows_R].set(new, mode="drop"), *others)
    return _pin(dataclasses.replace(merged, cache=cache))


@functools.partial(jax.jit, static_argnames=("graph", "plan"), donate_argnames="pool")
def advance(
    graph: nnx.GraphDef[Any],
    params: nnx.State,
    request: Request,
    pool: Pool,
    ended_B: jax.Array,
    enough: jax.Array,
    steps: jax.Array,
    *,
    plan: Plan,
) -> Pool:
    """Decodes until enough rows are done, or for some steps.

    Args:
        graph: The model's structure.
        params: Its state.
        request: What is asked of it.
        pool: The pool; its arrays are used up.
        ended_B: bool, rows to end at once.
        enough: Rows, done before or now, at which to stop.
        steps: Tokens a row at which to stop.
        plan: What the program is made for.

    Returns:
        The pool.
    """
    model = nnx.merge(graph, params)
    read = model.read if isinstance(model, EncoderDecoder) else model.reader()

    def unfinished(carry: tuple[jax.Array, Pool]) -> jax.Array:
        step, pool = carry
        return (step < steps) & (jnp.sum(pool.done_B) < enough)

    def step(carry: tuple[jax.Array, Pool]) -> tuple[jax.Array, Pool]:
        step, pool = carry
        tokens_B1, positions_B1 = pool.token_B[:, None], pool.position_B[:, None]
        hidden_B1D, cache = read(tokens_B1, positions_B1, pool.cache)
        pool = dataclasses.replace(pool, cache=pin(cache), position_B=pool.position_B + 1)
        return step + 1, _choose(pool, model.logits(hidden_B1D[:, 0]), request, plan)

    pool = dataclasses.replace(pool, done_B=pool.done_B | ended_B)
    return _pin(jax.lax.while_loop(unfinished, step, (jnp.int32(0), pool))[1])


def _choose(pool: Pool, logits_BV: jax.Array, request: Request, plan: Plan) -> Pool:
    """Chooses and records each row's next token, and ends the rows whose last it is."""
    keys_B = None
    if "temperature" in request.settings:
        # A sample depends on nothing but the key, the prompt's numbers and the step.
        keys_B = jnp.broadcast_to(request.key, pool.count_B.shape)
        for number_B in (*pool.numbers_BW.T, pool.count_B):
            keys_B = jax.vmap(jax.random.fold_in)(keys_B, number_B)
    token_B = choose(logits_BV, keys_B, pool.seen_BV, **request.settings)
    going_B = ~pool.done_B & ~jnp.isin(token_B, request.stop_ids)
    slots = jnp.arange(plan.new_tokens)[None]
    here_BN = going_B[:, None] & (slots == pool.count_B[:, None])
    out_BN = jnp.where(here_BN, token_B[:, None], pool.out_BN)
    log_probs_BN, seen_BV = pool.log_probs_BN, pool.seen_BV
    if log_probs_BN is not None:
        log_probs_BN = jnp.where(here_BN, log_probs_of(logits_BV, token_B)[:, None], log_probs_BN)
    if seen_BV is not None:
        seen_BV |= token_B[:, None] == jnp.arange(seen_BV.shape[1])[None]
    count_B = pool.count_B + going_B
    return dataclasses.replace(
        pool,
        token_B=token_B,
        count_B=count_B,
        done_B=~going_B | (count_B == plan.new_tokens),
        out_BN=out_BN,
        log_probs_BN=log_probs_BN,
        seen_BV=seen_BV,
    )


def _seen(model: Any, prompts_BP: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """The tokens that the decoder has read, bool[B, V]."""
    rows, width = prompts_BP.shape
    if isinstance(model, EncoderDecoder):
        prompts_BP, width = jnp.full((rows, 1), model.config.start_id), 1
        lengths_B = jnp.ones_like(lengths_B)
    within_BP = jnp.arange(width)[None] < lengths_B[:, None]
    # Padding falls outside the vocabulary and is dropped.
    ids_BP = jnp.where(within_BP, prompts_BP, model.config.vocab_size)
    seen_BV = jnp.zeros((rows, model.config.vocab_size), bool)
    return seen_BV.at[jnp.arange(rows)[:, None], ids_BP].set(True, mode="drop")


def _pin(pool: Pool) -> Pool:
    """Lays the rows over the mesh's batch axes."""
    rows = jax.tree.map(
        lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)),
        dataclasses.replace(pool, cache=None),
    )
    return dataclasses.replace(rows, cache=pin(pool.cache))
