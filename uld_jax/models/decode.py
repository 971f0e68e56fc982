"""Generation: continues prompts of any lengths in a pool of rows that are refilled as they end."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from uld_jax.errors import UserError
from uld_jax.models.config import DecoderConfig
from uld_jax.models.continuous import Batcher, Continuation, length_bucket
from uld_jax.models.decoder import Decoder
from uld_jax.models.encoder_decoder import EncoderDecoder
from uld_jax.models.encoder_decoder_config import EncoderDecoderConfig
from uld_jax.models.pool import Plan, Request
from uld_jax.models.sampling import Sampling
from uld_jax.models.stop_strings import StopStrings
from uld_jax.sharding import MESH_AXES, batch_shards, fold_sequence

if TYPE_CHECKING:
    from uld_jax.models.hf_io import LoadedModel

Prompts = Sequence[Sequence[int] | np.ndarray]


def continue_prompts(
    model: Decoder | EncoderDecoder,
    prompt_ids: Prompts,
    *,
    max_new_tokens: int,
    eos_id: int | Sequence[int],
    sampling: Sampling = Sampling(),  # noqa: B008 - it is frozen
    stop_strings: Sequence[str] = (),
    tokenizer: Any = None,
    log_probs: bool = False,
    key: jax.Array | None = None,
    numbers: np.ndarray | None = None,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
    found: Callable[[Mapping[int, Continuation]], None] | None = None,
) -> list[Continuation]:
    """Continues prompts of any lengths with a key-value cache, ended rows making room for others.

    A pool of rows decodes together. When a quarter of them have ended, the next prompts, shortest
    first, take their places while the others go on. Prompts are padded to a few bucket lengths, so
    the number of compiled programs does not grow with the number of lengths. Where the model's
    parameters lie on a mesh, so do the rows and the cache: rows over its batch axes, heads over
    its tensor axis.

    Args:
        model: The decoder or encoder-decoder.
        prompt_ids: Token ids, one sequence a prompt, none empty.
        max_new_tokens: At most this many new tokens a prompt.
        eos_id: The id, or ids, that end an answer; not part of it.
        sampling: How tokens are chosen.
        stop_strings: Texts that end an answer; they need the tokenizer.
        tokenizer: The model's Hugging Face tokenizer; with it, continuations have their text.
        log_probs: Whether they have log-probabilities.
        key: PRNG key for sampling; key 0 by default. A sample depends on it, on the prompt and on
            its place in prompt_ids, not on what else is in the pool.
        numbers: uint32 [prompts, any], which stand for the prompts' places there: what they
            are folded into the key for.
        batch_size: Rows of the pool; on a mesh rounded up to a multiple of its batch shards.
        progress: Called with the number of prompts done since the last call.
        found: Called with these continuations, by their prompts' places.

    Returns:
        One continuation a prompt, in the order given.

    Raises:
        UserError: Settings out of range; a prompt that is empty, that holds an id outside the
            vocabulary, or that with the new tokens is longer than the model's positions.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> model = Decoder(tiny_config(), rngs=nnx.Rngs(0))
        >>> found = continue_prompts(
        ...     model, [[1, 2], [3]], max_new_tokens=4, eos_id=-1, log_probs=True
        ... )
        >>> [(len(each.ids), each.log_probs.shape, each.stop) for each in found]
        [(4, (4,), 'length'), (4, (4,), 'length')]
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} must be >= 1: got {value}")
    stops = StopStrings(stop_strings, tokenizer)
    _check_prompts(model.config, prompt_ids, max_new_tokens)
    request = Request(
        jnp.array(np.atleast_1d(eos_id), jnp.int32),
        jax.random.key(0) if key is None else key,
        {name: jnp.float32(value) for name, value in sampling.in_use().items()},
    )
    plan = Plan(0, max_new_tokens, log_probs)
    mesh = _mesh_of(model)
    answers: dict[int, Continuation] = {}
    rows = min(batch_size, len(prompt_ids))
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        shards = 1 if mesh is None else batch_shards(mesh)
        for run in _runs([len(ids) for ids in prompt_ids], rows, max_new_tokens):
            width = length_bucket(len(prompt_ids[run[-1]]))
            width = min(width, model.config.max_positions - max_new_tokens)
            run_plan = dataclasses.replace(plan, width=width)
            batcher = Batcher(model, request, run_plan, rows=rows, shards=shards, stops=stops)
            for done in batcher.run(prompt_ids, run, numbers):
                answers |= done
                if found is not None:
                    found(done)
                if progress is not None:
                    progress(len(done))
    return [answers[i] for i in range(len(prompt_ids))]


def _mesh_of(model: nnx.Module) -> Mesh | None:
    """The mesh that the parameters lie on, if it is one of ours, all of it for rows and heads."""
    for leaf in jax.tree.leaves(nnx.state(model)):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == MESH_AXES:
            return fold_sequence(sharding.mesh) if isinstance(sharding.mesh, Mesh) else None
    return None


def _runs(lengths: Sequence[int], rows: int, new_tokens: int) -> list[list[int]]:
    """Prompts by length, in runs that share a pool.

    Each row of a pool has room for its longest prompt, which all steps pay for. So long prompts
    are set apart from much shorter ones, if these fill the pool often enough.
    """
    runs: list[list[int]] = []

    def room(i: int) -> int:
        return length_bucket(lengths[i]) + new_tokens

    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if runs and (len(runs[-1]) < 4 * rows or room(i) <= 2 * room(runs[-1][0])):
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def generate(
    model: Decoder | EncoderDecoder,
    prompt_ids: Prompts,
    *,
    max_new_tokens: int,
    eos_id: int | Sequence[int],
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop_strings: Sequence[str] = (),
    tokenizer: Any = None,
    key: jax.Array | None = None,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The ids of `continue_prompts`.

    Args:
        model: The decoder or encoder-decoder.
        prompt_ids: Token ids, one sequence a prompt, none empty.
        max_new_tokens: At most this many new tokens a prompt.
        eos_id: The id, or ids, that end an answer; not part of it.
        temperature: 0 for greedy, else the sampling temperature.
        top_k: See `Sampling`, as for the next three.
        top_p: Nucleus mass in (0, 1].
        min_p: Least probability, as a part of the largest.
        repetition_penalty: 1 for none.
        stop_strings: Texts that end an answer. Its ids end with the token that completes one;
            `continue_prompts` also has the text before it.
        tokenizer: The model's tokenizer, needed for stop strings.
        key: PRNG key for sampling; key 0 by default.
        batch_size: Rows computed together.
        progress: Called with the number of prompts done since the last call.

    Returns:
        The new token ids of each prompt, in the order given, without the stop token.

    Raises:
        UserError: As `continue_prompts`.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> model = Decoder(tiny_config(), rngs=nnx.Rngs(0))
        >>> [len(ids) for ids in generate(model, [[1, 2], [3]], max_new_tokens=4, eos_id=-1)]
        [4, 4]
    """
    found = continue_prompts(
        model,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty),
        stop_strings=stop_strings,
        tokenizer=tokenizer,
        key=key,
        batch_size=batch_size,
        progress=progress,
    )
    return [each.ids for each in found]


def _check_prompts(
    config: DecoderConfig | EncoderDecoderConfig, prompt_ids: Prompts, max_new_tokens: int
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


def end_ids(m: "LoadedModel") -> list[int]:
    """Every token that ends a text: the model's and the tokenizer's end of sequence.

    Args:
        m: The model and its tokenizer.

    Returns:
        Token ids, ascending.
    """
    ends = [i for i in (m.config.eos_id, m.tokenizer.eos_token_id) if i is not None]
    # Instruction-tuned models may name several.
    return sorted({int(i) for each in ends for i in np.atleast_1d(each)})


def line_stop_ids(m: "LoadedModel") -> list[int]:
    """Every token that ends a one-line answer: end of sequence, and line breaks.

    Args:
        m: The model and its tokenizer.

    Returns:
        Token ids, ascending.
    """
    texts = m.tokenizer.batch_decode([[i] for i in range(m.config.vocab_size)])
    breaks = {i for i, text in enumerate(texts) if "\n" in text and not text.strip()}
    return sorted(breaks.union(end_ids(m)))


def complete(
    m: "LoadedModel",
    prompt_ids: Prompts,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 - it is frozen
    stop_strings: Sequence[str] = (),
    key: jax.Array | None = None,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
    found: Callable[[Mapping[int, str]], None] | None = None,
) -> list[str]:
    """One-line continuations as text, greedy by default.

    Args:
        m: The model and its tokenizer.
        prompt_ids: Token ids, one sequence a prompt.
        max_new_tokens: At most this many tokens an answer.
        sampling: How tokens are chosen.
        stop_strings: Texts that end an answer, besides the end of the line; not part of it.
        key: PRNG key for sampling; key 0 by default.
        batch_size: Rows computed together.
        progress: Called with the number of prompts done since the last call.
        found: Called with their texts, by their prompts' places.

    Returns:
        One text a prompt, in the order given, special tokens left out.

    Raises:
        UserError: As `continue_prompts`.
    """

    def line(each: Continuation) -> str:
        # A token may hold text and a line break after it: such a one does not stop its row.
        return str(each.text).partition("\n")[0]

    def report(done: Mapping[int, Continuation]) -> None:
        if found is not None:
            found({i: line(each) for i, each in done.items()})

    every = continue_prompts(
        m.model,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        eos_id=line_stop_ids(m),
        sampling=sampling,
        stop_strings=stop_strings,
        tokenizer=m.tokenizer,
        key=key,
        batch_size=batch_size,
        progress=progress,
        found=report,
    )
    return [line(each) for each in every]
