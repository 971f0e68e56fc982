"""Fills a cache with a teacher's signals: what it says at each answer position of a data set."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uld_jax.data import Encoded, Signal, SignalWriter, truncate_signal
from uld_jax.errors import UserError
from uld_jax.models import (
    Decoder,
    DecoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    LoadedModel,
)
from uld_jax.sharding import BATCH_AXES, batch_shards, constrain
from uld_jax.teacher.signals import TopProbabilities, top_probabilities

Text = tuple[str, Encoded]


@dataclasses.dataclass(frozen=True)
class SignalOptions:
    """What is kept of each distribution, and how it is computed.

    Attributes:
        epsilon: Probabilities are left out up to this sum.
        cap: At most this many are kept a position.
        temperature: Divides the logits.
        ids: So many of the likeliest tokens are kept by id, with their log-probabilities.
        batch_size: Texts read together; on a mesh rounded up to a multiple of its batch shards.
        chunk_size: Positions a device whose logits exist at a time.
    """

    epsilon: float = 0.01
    cap: int = 16384
    temperature: float = 1.0
    ids: int = 0
    batch_size: int = 16
    chunk_size: int = 32


@dataclasses.dataclass
class Work:
    """What one call has done.

    Attributes:
        examples: Texts read.
        tokens: Of these texts.
        positions: Their answer positions.
        seconds: On the clock, compilation included.
    """

    examples: int = 0
    tokens: int = 0
    positions: int = 0
    seconds: float = 0.0


def write_signals(
    m: LoadedModel,
    ids: Sequence[str],
    texts: Sequence[Encoded | str],
    writer: SignalWriter,
    options: SignalOptions,
    *,
    mesh: Mesh | None = None,
    shards: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Work:
    """Writes missing shards of a cache; `writer.finish` is left to the caller.

    A shard follows from its own texts alone: whatever was done before, in this process or
    another, its bytes are the same.

    Args:
        m: The teacher.
        ids: Of the examples.
        texts: Of each example what the teacher reads, or why it is left out.
        writer: Of the cache.
        options: See there; epsilon and cap are the writer's.
        mesh: Where the teacher lies; None for one device.
        shards: Which shards to write; None for all that are missing.
        progress: Called with the number of examples since the last call.

    Returns:
        What this call did.

    Raises:
        UserError: The teacher's probabilities of a text are not finite.
    """
    start, work = time.perf_counter(), Work()
    plans: dict[int, list[Text]] = {}
    for shard in writer.missing_shards() if shards is None else shards:
        known = [(ids[i], texts[i]) for i in writer.examples_of(shard)]
        plans[shard] = [(id_, text) for id_, text in known if isinstance(text, Encoded)]
    reader = SignalReader(m.model, m.config, options, mesh)
    done: dict[str, Signal] = {}
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        for batch in _one_ahead(reader.start(plans)):
            signals = _signals(batch, options)
            done |= signals
            work.examples += len(batch.texts)
            work.tokens += sum(text.length for _, text in batch.texts)
            work.positions += sum(map(len, signals.values()))
            dropped = 0
            if batch.last:
                records = [(id_, done.pop(id_)) for id_, _ in plans[batch.shard]]
                dropped = len(writer.examples_of(batch.shard)) - len(records)
                writer.write_shard(batch.shard, records, dropped=dropped)
            if progress is not None:
                progress(len(batch.texts) + dropped)
    work.seconds = time.perf_counter() - start
    return work


class _Batch(NamedTuple):
    """Texts that are read together, and what the devices are computing of them."""

    shard: int
    texts: list[Text]
    last: bool  # of its shard
    group_rows: int
    top: TopProbabilities | None  # [G, N, …]; None where there is no text


def _one_ahead(batches: Iterable[_Batch]) -> Iterator[_Batch]:
    """Yields each after the next was started: host and devices work at the same time."""
    waiting = None
    for batch in batches:
        if waiting is not None:
            yield waiting
        waiting = batch
    if waiting is not None:
        yield waiting


class SignalReader:
    """A teacher, compiled for a few padded sizes: `hidden` reads texts, `top` gives probabilities.

    Args:
        model: The teacher; its parameters may be shapes, for those who only compile.
        config: Its own.
        options: What is kept.
        mesh: Where it lies; None for one device.
    """

    def __init__(
        self,
        model: Decoder | EncoderDecoder,
        config: DecoderConfig | EncoderDecoderConfig,
        options: SignalOptions,
        mesh: Mesh | None,
    ) -> None:
        graph, self._state = nnx.split(model)
        self._mesh, self._chunk_size = mesh, options.chunk_size
        self._groups = 1 if mesh is None else batch_shards(mesh)
        self.rows = _round_up(options.batch_size, self._groups)
        self._most = config.max_positions or 2**31

        def hidden(state: nnx.State, arrays: Mapping[str, jax.Array]) -> jax.Array:
            return nnx.merge(graph, state).hidden(**arrays)

        def top(state: nnx.State, hidden_BTE: jax.Array, index_GN: jax.Array) -> TopProbabilities:
            grouped = hidden_BTE.reshape(index_GN.shape[0], -1, hidden_BTE.shape[-1])
            taken_GNE = jnp.take_along_axis(grouped, index_GN[..., None], axis=1)
            return top_probabilities(
                constrain(taken_GNE, "batch", None, None),
                nnx.merge(graph, state).head_VD,
                k=options.cap,
                temperature=options.temperature,
                softcap=config.logit_softcap or None,
                chunk_size=options.chunk_size,
                ids=options.ids > 0,
            )

        self.hidden, self.top = jax.jit(hidden), jax.jit(top)

    def start(self, plans: Mapping[int, list[Text]]) -> Iterator[_Batch]:
        """Gives the devices a batch at a time; texts of like length share one."""
        for shard, texts in plans.items():
            ordered = sorted(texts, key=lambda text: text[1].length)
            cuts = range(0, max(len(ordered), 1), self.rows)
            for cut in cuts:
                batch = ordered[cut : cut + self.rows]
                top = self._read([text for _, text in batch]) if batch else None
                yield _Batch(shard, batch, cut == cuts[-1], self.rows // self._groups, top)

    def _read(self, texts: Sequence[Encoded]) -> TopProbabilities:
        rows = [text.tokens for text in texts]
        length = self.padded_length(max(map(len, rows)))
        arrays = _pad(rows, self.rows, length, names=("tokens_BT", "segment_ids"))
        prompts = [text.encoder for text in texts]
        if any(map(len, prompts)):
            names = ("encoder_tokens", "encoder_segment_ids")
            longest = max(map(len, prompts))
            arrays |= _pad(prompts, self.rows, self.padded_length(longest), names=names)
        arrays = {name: self._put(array) for name, array in arrays.items()}
        index_GN = self._put(self._index(texts, length))
        return self.top(self._state, self.hidden(self._state, arrays), index_GN)

    def padded_length(self, longest: int) -> int:
        """The longest row's length, rounded up by less than a quarter of it."""
        step = max(16, (1 << (longest - 1).bit_length()) // 8)
        return min(_round_up(longest, step), self._most)

    def _index(self, texts: Sequence[Encoded], length: int) -> np.ndarray:
        """int32 [G, N]: where in its group's rows each answer token is predicted."""
        size = self.rows // self._groups
        groups = []
        for start in range(0, self.rows, size):
            of_group = texts[start : start + size]
            places = [row * length + text.answer - 1 for row, text in enumerate(of_group)]
            groups.append(np.concatenate([np.zeros(0, np.int32), *places]))
        index = np.zeros((len(groups), _round_up(max(map(len, groups)), self._chunk_size)), "int32")
        for group, places in enumerate(groups):
            index[group, : len(places)] = places
        return index

    def _put(self, array: np.ndarray) -> jax.Array:
        if self._mesh is None:
            return jnp.asarray(array)
        return jax.device_put(array, NamedSharding(self._mesh, PartitionSpec(BATCH_AXES)))


def _signals(batch: _Batch, options: SignalOptions) -> dict[str, Signal]:
    """Fetches a batch's probabilities and cuts them into texts and to size."""
    if batch.top is None:
        return {}
    found: list[np.ndarray] = jax.device_get([x for x in batch.top if x is not None])
    signals = {}
    for start in range(0, len(batch.texts), batch.group_rows):
        group, at = start // batch.group_rows, 0
        for id_, text in batch.texts[start : start + batch.group_rows]:
            here = slice(at, at + len(text.answer))
            at += len(text.answer)
            probs_NK, tail_N, entropy_N = (x[group, here] for x in found[:3])
            if not (np.isfinite(probs_NK).all() and np.isfinite(tail_N + entropy_N).all()):
                raise UserError(
                    f"example {id_!r}: the teacher's probabilities are not finite; compute in "
                    "float32 (teacher.dtype), or leave the example out"
                )
            signal = truncate_signal(
                probs_NK, tail_N, entropy_N, epsilon=options.epsilon, cap=options.cap
            )
            if options.ids:
                signal = _with_ids(signal, found[3][group, here], probs_NK, options.ids)
            signals[id_] = signal
    return signals


def _with_ids(signal: Signal, ids_NK: np.ndarray, probs_NK: np.ndarray, count: int) -> Signal:
    with np.errstate(divide="ignore"):
        log_probs_NJ = np.log(probs_NK[:, :count])
    return dataclasses.replace(signal, ids=ids_NK[:, :count], log_probs=log_probs_NJ)


def _pad(
    texts: Sequence[np.ndarray], rows: int, length: int, *, names: tuple[str, str]
) -> dict[str, np.ndarray]:
    """Tokens and segments, 1 for text and 0 for padding, int32 [rows, length]."""
    tokens, segments = np.zeros((2, rows, length), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)], segments[row, : len(text)] = text, 1
    return dict(zip(names, (tokens, segments), strict=True))


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
