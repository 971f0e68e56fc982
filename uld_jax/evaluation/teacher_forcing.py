"""What a model says of given answers: how likely each of their tokens is, and whether it is first.

The answers are read, not written, so any two models can be asked about the same ones.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uld_jax.data import Encoded
from uld_jax.errors import UserError
from uld_jax.models import LoadedModel
from uld_jax.processes import fetch
from uld_jax.sharding import BATCH_AXES, batch_shards


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """An answer as a model reads it, token by token.

    Attributes:
        nats: float32 [n], −log of each token's probability after the prompt and those before it.
        confidence: float32 [n], the largest probability of any token there.
        correct: bool [n], whether that is the answer's token.
    """

    nats: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray


def read_answers(
    m: LoadedModel,
    texts: Sequence[Encoded],
    *,
    batch_size: int,
    chunk_size: int = 32,
    mesh: Mesh | None = None,
    found: Callable[[Mapping[int, Reading]], None] | None = None,
) -> list[Reading]:
    """Has a model read prompts and their answers.

    Args:
        m: The model.
        texts: Prompts and answers in its tokens, each answer with at least one.
        batch_size: Texts read together; it changes no reading.
        chunk_size: Positions whose logits exist at a time.
        mesh: Where the model lies; None for one device.
        found: Called with readings by place in `texts`, as they are made.

    Returns:
        A reading a text.

    Raises:
        UserError: A text is longer than the model's positions, or its probabilities are not
            finite.

    Example:
        >>> from uld_jax.testing import tiny_model
        >>> text = Encoded(np.array([5, 6, 7], np.int32), np.array([2], np.int32))
        >>> read_answers(tiny_model(), [text], batch_size=1)[0].nats.shape
        (1,)
    """
    reader = _Reader(m, batch_size, chunk_size, mesh)
    done: dict[int, Reading] = {}
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        for batch in reader.read(texts):
            done |= batch
            if found is not None:
                found(batch)
    return [done[i] for i in range(len(texts))]


def bits_per_byte(nats: float, size: int) -> float:
    """How many bits a model needs for a byte of text: −log p / (bytes · ln 2).

    Args:
        nats: −log p of the text.
        size: Its bytes in UTF-8.

    Returns:
        Bits per byte, which models of any tokenizers can be compared by.

    Example:
        >>> bits_per_byte(8 * math.log(2), 4)
        2.0

    Reference:
        Gao et al., "The Pile", 2020, section 3.1 (https://arxiv.org/abs/2101.00027).
    """
    return nats / (size * math.log(2))


class _Reader:
    """The model, compiled for a few padded sizes."""

    def __init__(self, m: LoadedModel, batch_size: int, chunk_size: int, mesh: Mesh | None) -> None:
        graph, self._state = nnx.split(m.model)
        shards = 1 if mesh is None else batch_shards(mesh)
        self._rows, self._mesh = _round_up(batch_size, shards), mesh
        self._chunk = max(1, chunk_size // self._rows)
        self._most = m.config.max_positions or 2**31

        def read(state: nnx.State, arrays: Mapping[str, jax.Array], *places: jax.Array) -> Any:
            model = nnx.merge(graph, state)
            return _token_scores(model, model.hidden(**arrays), *places, chunk=self._chunk)

        self._read = jax.jit(read)

    def read(self, texts: Sequence[Encoded]) -> Iterator[dict[int, Reading]]:
        """Reads a batch at a time; texts of like length share one."""
        order = sorted(range(len(texts)), key=lambda i: texts[i].length)
        for start in range(0, len(order), self._rows):
            batch = order[start : start + self._rows]
            nats_BN, confidence_BN, correct_BN = self._scores([texts[i] for i in batch])
            readings = {}
            for row, i in enumerate(batch):
                own = slice(0, len(texts[i].answer))
                readings[i] = Reading(
                    nats_BN[row, own], confidence_BN[row, own], correct_BN[row, own]
                )
                if not np.isfinite(readings[i].nats).all():
                    raise UserError(
                        "the probabilities of an answer are not finite: compute in float32 "
                        "(--config.student.dtype, --config.teacher.dtype)"
                    )
            yield readings

    def _scores(self, texts: Sequence[Encoded]) -> Sequence[np.ndarray]:
        arrays = self._padded([text.tokens for text in texts], "tokens_BT", "segment_ids")
        prompts = [text.encoder for text in texts]
        if any(map(len, prompts)):
            arrays |= self._padded(prompts, "encoder_tokens", "encoder_segment_ids")
        width = _round_up(max(len(text.answer) for text in texts), _round_up(16, self._chunk))
        index_BN, targets_BN = np.zeros((2, self._rows, width), np.int32)
        for row, text in enumerate(texts):
            # A token is predicted where the one before it is read.
            index_BN[row, : len(text.answer)] = text.answer - 1
            targets_BN[row, : len(text.answer)] = text.tokens[text.answer]
        put = {name: self._put(array) for name, array in arrays.items()}
        return fetch(self._read(self._state, put, self._put(index_BN), self._put(targets_BN)))

    def _padded(self, rows: Sequence[np.ndarray], *names: str) -> dict[str, np.ndarray]:
        """Tokens and segments, 1 for text and 0 for padding, to a length that others share."""
        longest = max(map(len, rows))
        if longest > self._most:
            raise UserError(
                f"a prompt and its answer have {longest} tokens, over the model's {self._most} "
                "positions: set max_length lower"
            )
        step = max(16, (1 << (longest - 1).bit_length()) // 8)
        length = min(_round_up(longest, step), self._most)
        tokens, segments = np.zeros((2, self._rows, length), np.int32)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
        return dict(zip(names, (tokens, segments), strict=True))

    def _put(self, array: np.ndarray) -> jax.Array:
        if self._mesh is None:
            return jnp.asarray(array)
        return jax.device_put(array, NamedSharding(self._mesh, PartitionSpec(BATCH_AXES)))


def _token_scores(
    model: Any,
    hidden_BTD: jax.Array,
    index_BN: jax.Array,
    targets_BN: jax.Array,
    *,
    chunk: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """−log p of the targets, the largest p, and whether it is theirs, `chunk` columns at a time."""
    rows, width = index_BN.shape
    taken_BND = jnp.take_along_axis(hidden_BTD, index_BN[..., None], axis=1)

    def columns(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(rows, width // chunk, chunk, *x.shape[2:]), 1, 0)

    def score(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        hidden_BCD, targets_BC = part
        log_probs_BCV = jax.nn.log_softmax(model.logits(hidden_BCD).astype(jnp.float32))
        of_target_BC = jnp.take_along_axis(log_probs_BCV, targets_BC[..., None], axis=-1)[..., 0]
        first_BC = jnp.argmax(log_probs_BCV, axis=-1)
        return -of_target_BC, jnp.exp(log_probs_BCV.max(axis=-1)), first_BC == targets_BC

    found = lax.map(score, (columns(taken_BND), columns(targets_BN)))
    nats, confidence, correct = (jnp.moveaxis(x, 0, 1).reshape(rows, width) for x in found)
    return nats, confidence, correct


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
