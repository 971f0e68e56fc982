"""Fills a cache with the signals of a teacher that a server runs."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from uld_jax.data import Encoded, Signal, SignalWriter, truncate_signal
from uld_jax.files import AnyPath, remove_tree
from uld_jax.teacher.completions import CompletionsClient
from uld_jax.teacher.echo import ServedSignal, ServedText
from uld_jax.teacher.server import FetchOptions, served_signals
from uld_jax.teacher.server_check import check_server

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Hidden, so that the cache's directory counts as free; gone when every shard is written.
JOURNAL_DIRECTORY = ".served"
# Of the self-check: some prompts have no continuation that can be compared.
CHECKED = 8


def write_served_signals(
    client: CompletionsClient,
    ids: Sequence[str],
    texts: Sequence[Encoded | str],
    writer: SignalWriter,
    directory: AnyPath,
    *,
    tokenizer: "PreTrainedTokenizerFast",
    epsilon: float,
    cap: int,
    max_failed_fraction: float = 0.01,
    progress: Callable[[int], None] | None = None,
) -> tuple[str, dict[str, str]]:
    """Asks a server for what a cache lacks and writes its missing shards.

    What the server has answered is kept beside the shards, so that a run that was killed asks for
    the rest only. The server tells the likeliest tokens alone: a position's tail mass is what
    these lack to 1, and its entropy is that of the distribution with the tail as one token, which
    is less than the whole one's.

    Args:
        client: Of the server.
        ids: Of the examples.
        texts: Of each example what the teacher reads, or why it is left out.
        writer: Of the cache; `finish` is left to the caller.
        directory: Of the cache.
        tokenizer: The teacher's.
        epsilon: Probabilities are left out up to this sum.
        cap: At most this many are kept a position.
        max_failed_fraction: Most examples without an answer, as a part of all that are asked for.
        progress: Called from other threads with the number of examples since the last call.

    Returns:
        What the self-check found, for people, and why by id for each example without a signal.

    Raises:
        UserError: The server fails the self-check, refuses a request, or fails too often.
    """
    missing = writer.missing_shards()
    wanted = [i for shard in missing for i in writer.examples_of(shard)]
    served = [
        _served(ids[i], text, tokenizer) for i in wanted if isinstance(text := texts[i], Encoded)
    ]
    failed: dict[str, str] = {}
    if not served:
        checked, signals = "nothing to ask for", {}
    else:
        check = check_server(client, served[:CHECKED])
        checked = str(check)
        found = served_signals(
            client,
            served,
            directory / JOURNAL_DIRECTORY,
            FetchOptions(check.shift, max_failed_fraction=max_failed_fraction),
            progress=progress,
            failed=failed,
        )
        signals = {each.id: _signal(each, epsilon, cap) for each in found}
    for shard in missing:
        of_shard = writer.examples_of(shard)
        records = [(ids[i], signals[ids[i]]) for i in of_shard if ids[i] in signals]
        writer.write_shard(shard, records, dropped=len(of_shard) - len(records))
    if (directory / JOURNAL_DIRECTORY).is_dir():
        remove_tree(directory / JOURNAL_DIRECTORY)
    return checked, failed


def _served(id_: str, text: Encoded, tokenizer: "PreTrainedTokenizerFast") -> ServedText:
    """With the prompt in words too, for the self-check; servers add a leading token themselves."""
    prompt = text.tokens[: text.answer[0]].tolist()
    if prompt[0] == tokenizer.bos_token_id:
        prompt = prompt[1:]
    words = tokenizer.decode(prompt, clean_up_tokenization_spaces=False)
    return ServedText(id_, str(words), "", text, unspelled=tuple(tokenizer.all_special_tokens))


def _signal(served: ServedSignal, epsilon: float, cap: int) -> Signal:
    probs, tail = served.probs_sorted, served.tail_mass
    known = np.concatenate([probs, tail[:, None]], axis=1).astype(np.float64)
    entropy = -(known * np.log(np.where(known > 0, known, 1))).sum(1)
    return truncate_signal(probs, tail, entropy, epsilon=epsilon, cap=cap)
