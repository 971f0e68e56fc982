"""A teacher's largest probabilities from its hidden states, without its logits ever being whole."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from uld_jax.losses.chunked import product
from uld_jax.losses.probabilities import log_normalizer, psum, scaled
from uld_jax.sharding import BATCH_AXES, RULES

VOCAB_AXIS = str(RULES["vocab"])


class TopProbabilities(NamedTuple):
    """The head of a distribution, and what there is beside it.

    Attributes:
        probs: f32[*b, N, K], descending, zeros past the vocabulary.
        tail_mass: f32[*b, N], the mass of all other tokens.
        entropy: f32[*b, N] nats, of the whole distribution.
        ids: i32[*b, N, K], the tokens, equal probabilities by ascending id; or None. Of padding,
            whatever.
    """

    probs: jax.Array
    tail_mass: jax.Array
    entropy: jax.Array
    ids: jax.Array | None = None


def top_probabilities(
    hidden_NE: jax.Array,
    head_UE: jax.Array,
    *,
    k: int,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_size: int = 32,
    vocab: int | None = None,
    ids: bool = False,
) -> TopProbabilities:
    """The K largest of softmax(logits / T), `chunk_size` positions at a time.

    Where a mesh is set (`jax.set_mesh`), the first axis of the hidden states lies over its batch
    axes and the rows of the head over "tensor". Each device takes the K largest of its part of
    the vocabulary, and only these are exchanged.

    Args:
        hidden_NE: [*b, N, E], final hidden states.
        head_UE: [U, E].
        k: K, which may be more than U.
        temperature: Divides the logits.
        softcap: Bound of the logits; None for no bound.
        chunk_size: Positions of the N axis whose logits exist at a time.
        vocab: Rows of the head that are tokens, the others being padding; None for all of them.
        ids: Whether to say which tokens they are.

    Returns:
        The probabilities, the mass of the others (their sum, not 1 − a sum: it is precise where
        it is small), and the entropy.

    Raises:
        ValueError: k, chunk_size or vocab is out of range.

    Example:
        >>> hidden, head = jnp.ones((1, 1)), jnp.log(jnp.array([[0.25], [0.5], [0.125], [0.125]]))
        >>> top = top_probabilities(hidden, head, k=2, ids=True)
        >>> top.probs.round(3).tolist(), top.tail_mass.tolist(), top.ids.tolist()
        ([[0.5, 0.25]], [0.25], [[1, 0]])
    """
    rows = head_UE.shape[0]
    vocab = rows if vocab is None else vocab
    for name, value in (("k", k), ("chunk_size", chunk_size), ("vocab", vocab)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if vocab > rows:
        raise ValueError(f"vocab: expected at most the {rows} rows of the head, got {vocab}")
    top = _Top(k, temperature, softcap, vocab)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        found = _by_chunk(top, chunk_size, hidden_NE, head_UE)
    else:
        batch, by_token = PartitionSpec(BATCH_AXES), PartitionSpec(VOCAB_AXIS)
        found = jax.shard_map(
            partial(_by_chunk, dataclasses.replace(top, axis_name=VOCAB_AXIS), chunk_size),
            mesh=mesh,
            in_specs=(batch, by_token),
            out_specs=batch,
        )(hidden_NE, jnp.pad(head_UE, ((0, -rows % mesh.shape[VOCAB_AXIS]), (0, 0))))
    return found if ids else found._replace(ids=None)


def _by_chunk(
    top: "_Top", chunk_size: int, hidden_NE: jax.Array, head_UE: jax.Array
) -> TopProbabilities:
    """Over rows of all leading axes together: under a mesh they are this device's own."""
    rows_RE = hidden_NE.reshape(-1, hidden_NE.shape[-1])
    size = max(1, min(chunk_size, len(rows_RE)))
    padded_RE = jnp.pad(rows_RE, ((0, -len(rows_RE) % size), (0, 0)))
    found = lax.map(lambda x_CE: top(x_CE, head_UE), padded_RE.reshape(-1, size, rows_RE.shape[1]))

    def restore(x: jax.Array) -> jax.Array:
        x = x.reshape(-1, *x.shape[2:])[: len(rows_RE)]
        return x.reshape(*hidden_NE.shape[:-1], *x.shape[1:])

    return jax.tree.map(restore, found)


@dataclasses.dataclass(frozen=True)
class _Top:
    """The largest probabilities of a chunk; `axis_name` where its vocabulary is sharded."""

    k: int
    temperature: float
    softcap: float | None
    vocab: int
    axis_name: str | None = None

    def __call__(self, hidden_CE: jax.Array, head_UE: jax.Array) -> TopProbabilities:
        dtype = jnp.result_type(hidden_CE, head_UE)
        logits_CU = product(hidden_CE.astype(dtype), head_UE.astype(dtype).T)
        if self.softcap is not None:
            logits_CU = self.softcap * jnp.tanh(logits_CU / self.softcap)
        first = 0 if self.axis_name is None else lax.axis_index(self.axis_name) * len(head_UE)
        ids_U = first + jnp.arange(len(head_UE))
        logits_CU = jnp.where(ids_U < self.vocab, scaled(logits_CU, self.temperature), -jnp.inf)
        log_probs_CU = logits_CU - log_normalizer(logits_CU, self.axis_name)
        probs_CU = jnp.exp(log_probs_CU)
        # x · log x is 0 at 0.
        entropy_C = -jnp.where(probs_CU > 0, probs_CU * log_probs_CU, 0).sum(-1)
        probs_CK, ids_CK = self._largest(probs_CU, first)
        # Not the last of them: XLA would take a slice of a slice from the sort that top_k stands
        # for, and sort the whole vocabulary: 60 ms a row of 262,144 on a CPU, not 2 to 10.
        least_C = probs_CK.min(-1, keepdims=True)
        # What is less than the K-th largest, and of its equals all but those among the K.
        below_C = jnp.where(probs_CU < least_C, probs_CU, 0).sum(-1)
        equals_C = psum((probs_CU >= least_C).sum(-1), self.axis_name) - self.k
        tail_C = psum(below_C, self.axis_name) + jnp.maximum(equals_C, 0) * least_C[:, 0]
        return TopProbabilities(probs_CK, tail_C, psum(entropy_C, self.axis_name), ids_CK)

    def _largest(self, probs_CU: jax.Array, first: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        probs_CK, ids_CK = lax.top_k(probs_CU, min(self.k, probs_CU.shape[1]))
        ids_CK += first
        if self.axis_name is not None:
            # A stable choice among shards in the order of their tokens: ties by ascending id.
            gather = partial(
                lax.all_gather, axis_name=self.axis_name, axis=1, tiled=True, to="invarying"
            )
            every_CK, every_ids_CK = gather(probs_CK), gather(ids_CK)
            probs_CK, at_CK = lax.top_k(every_CK, min(self.k, every_CK.shape[1]))
            ids_CK = jnp.take_along_axis(every_ids_CK, at_CK, axis=1)
        padding = ((0, 0), (0, self.k - probs_CK.shape[1]))
        return jnp.pad(probs_CK, padding), jnp.pad(ids_CK, padding)
