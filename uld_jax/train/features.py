"""Hidden states and attention maps in the train step: what is kept of the models, and the losses.

Student and teacher have different tokens, so both are looked at where their answers are aligned.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uld_jax.config import LossConfig, RunConfig
from uld_jax.losses import (
    aligned_keys,
    attention_loss,
    attention_map,
    hidden_state_loss,
    layer_map,
)
from uld_jax.models import Decoder, DecoderConfig, EncoderDecoderConfig
from uld_jax.sharding import constrain
from uld_jax.train.positions import take_positions
from uld_jax.train.state import Projection

ModelConfig = DecoderConfig | EncoderDecoderConfig
# As `flax.linen.Dense` and TinyBERT's own layer begin: hidden states keep their size.
_init = jax.nn.initializers.lecun_normal(batch_axis=(0,))


class Seen(NamedTuple):
    """What one model makes of the aligned positions, in all of its layers.

    Attributes:
        config: Of the stack that has the layers.
        rows_GN: Which of its group's rows each position is of.
        tokens_GN: Which of the row's tokens it is.
        layers: "hidden" [L, G, N, D], and "query" [L, G, N, H, h] and "key" [L, G, N, K, h]; those
            that a loss needs.
        bias_GHNN: What is added to the scores of attention, or None.
    """

    config: DecoderConfig
    rows_GN: jax.Array
    tokens_GN: jax.Array
    layers: Mapping[str, jax.Array]
    bias_GHNN: jax.Array | None


def read_positions(
    model: Decoder, inputs: Mapping[str, jax.Array], index_GN: jax.Array, loss: LossConfig
) -> tuple[jax.Array, Seen | None]:
    """Has a model read a batch, and takes the answer positions out of it.

    Args:
        model: Student or teacher.
        inputs: Of its `hidden`.
        index_GN: Index into each group's R · T positions.
        loss: Says what else is needed.

    Returns:
        Final hidden states [G, N, D], and the layers' part where a loss looks at them.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> model = Decoder(tiny_config(), rngs=nnx.Rngs(0))
        >>> inputs, index_GN = {"tokens_BT": jnp.ones((2, 4), int)}, jnp.array([[1, 6, 7]])
        >>> _, seen = read_positions(model, inputs, index_GN, LossConfig(hidden_weight=1.0))
        >>> seen.layers["hidden"].shape, seen.rows_GN.tolist()
        ((2, 1, 3, 32), [[0, 1, 1]])
    """
    if not (loss.hidden_weight or loss.attention_weight):
        return take_positions(model.hidden(**inputs), index_GN), None

    def heads(x_BTHh: jax.Array) -> jax.Array:
        x_BTX = x_BTHh.reshape(*x_BTHh.shape[:2], -1)
        return take_positions(x_BTX, index_GN).reshape(*index_GN.shape, *x_BTHh.shape[2:])

    def watch(x_BTD: jax.Array, q_BTHh: jax.Array, k_BTKh: jax.Array) -> dict[str, jax.Array]:
        kept = {"hidden": take_positions(x_BTD, index_GN)} if loss.hidden_weight else {}
        if loss.attention_weight:
            kept |= {"query": heads(q_BTHh), "key": heads(k_BTKh)}
        return kept

    features = model.features(**inputs, watch=watch)
    length = inputs["tokens_BT"].shape[1]
    rows_GN, tokens_GN = index_GN // length, index_GN % length
    bias = features.bias_BHTS
    if bias is not None and loss.attention_weight:
        bias = _take_pairs(bias, rows_GN, tokens_GN)
    seen = Seen(_stack(model.config), rows_GN, tokens_GN, features.layers, bias)
    return take_positions(features.hidden_BTD, index_GN), seen


def _take_pairs(bias_BHTS: jax.Array, rows_GN: jax.Array, tokens_GN: jax.Array) -> jax.Array:
    """The bias of each pair of positions, [G, H, N, N]; of pairs from two rows, whatever."""

    def of_group(bias_RHTS: jax.Array, row_N: jax.Array, at_N: jax.Array) -> jax.Array:
        return bias_RHTS[row_N[:, None], :, at_N[:, None], at_N[None, :]]

    if len(bias_BHTS) == 1:
        by_group = jax.vmap(of_group, in_axes=(None, 0, 0))
        pairs_GNNH = by_group(bias_BHTS, jnp.zeros_like(rows_GN), tokens_GN)
    else:
        grouped = bias_BHTS.reshape(len(rows_GN), -1, *bias_BHTS.shape[1:])
        pairs_GNNH = jax.vmap(of_group)(grouped, rows_GN, tokens_GN)
    return constrain(jnp.moveaxis(pairs_GNNH, -1, 1), "batch", None, None, None)


def _stack(config: ModelConfig) -> DecoderConfig:
    return config.decoder if isinstance(config, EncoderDecoderConfig) else config


def layer_pairs(
    student: ModelConfig, teacher: ModelConfig, which: str
) -> tuple[np.ndarray, np.ndarray]:
    """The layers that are compared, counted from 0.

    Args:
        student: Its config.
        teacher: Its config.
        which: `loss.feature_layers`.

    Returns:
        int[P] layers of the student, and as many of the teacher.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> layer_pairs(tiny_config(), tiny_config(layers=6), "all")
        (array([0, 1]), array([2, 5]))
    """
    counts = _stack(student).layers, _stack(teacher).layers
    pairs = [*enumerate(layer_map(*counts))]
    own, others = zip(*(pairs if which == "all" else pairs[-1:]), strict=True)
    return np.array(own), np.array(others)


def with_projections(
    params: nnx.State,
    *,
    student: ModelConfig,
    teachers: Sequence[ModelConfig | None],
    config: RunConfig,
) -> nnx.State:
    """Adds what is trained beside the student: where hidden states are compared, a matrix [D, E].

    There is one for each pair of layers, also where the widths agree: nothing else says that two
    models mean the same by the same axis. They are in float32, and drawn from `train.seed`.

    Args:
        params: The student's that are trained.
        student: Its config.
        teachers: Each teacher's; any of them without hidden states is refused by the config.
        config: The run.

    Returns:
        The parameters, with "projections" [P, D, E] by the teacher's number.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> config = RunConfig(loss=LossConfig(hidden_weight=1.0))
        >>> models = {"student": tiny_config(), "teachers": [tiny_config(width=48)]}
        >>> params = with_projections(nnx.State({}), config=config, **models)
        >>> params["projections"]["0"].shape
        (1, 32, 48)

    Reference:
        Jiao et al., "TinyBERT", arXiv 1909.10351, section 3.1.
    """
    if not config.loss.hidden_weight:
        return params
    keys = jax.random.split(jax.random.key(config.train.seed), len(teachers))
    added = {}
    for number, (key, teacher) in enumerate(zip(keys, teachers, strict=True)):
        if teacher is None:
            raise ValueError("teachers: expected a model where loss.hidden_weight > 0, got None")
        count = len(layer_pairs(student, teacher, config.loss.feature_layers)[0])
        shape = (count, student.width, teacher.width)
        added[str(number)] = Projection(_init(key, shape, jnp.float32), axes=(None, "embed", None))
    return nnx.merge_state(params, nnx.State({"projections": added}))


def feature_losses(
    student: Seen | None,
    teachers: Sequence[Seen | None],
    projections: nnx.State,
    weights: Sequence[jax.Array],
    loss: LossConfig,
) -> dict[str, jax.Array]:
    """The weighted sums of both distances over aligned positions, the mean over pairs of layers.

    Args:
        student: Its layers at the aligned positions; None where no loss looks at them.
        teachers: Each teacher's, at the positions that are aligned with these.
        projections: From `with_projections`.
        weights: f32[G, N], of each teacher's positions, which `loss`'s weights multiply.
        loss: Weights, kinds and layers.

    Returns:
        "hidden" and "attention", scalars; those that have a weight.
    """
    if student is None:
        return {}
    sums: dict[str, Any] = {}
    for number, (teacher, weight_GN) in enumerate(zip(teachers, weights, strict=True)):
        if teacher is None:
            raise ValueError(
                f"teachers: expected a model that reads tokens, got signals of {number}"
            )
        pairs = layer_pairs(student.config, teacher.config, loss.feature_layers)
        if loss.hidden_weight:
            matrix_PDE: Any = projections["projections"][str(number)][...]
            found = _hidden(student, teacher, pairs, matrix_PDE, weight_GN, loss.hidden_kind)
            sums["hidden"] = sums.get("hidden", 0.0) + loss.hidden_weight * found
        if loss.attention_weight:
            found = _attention(student, teacher, pairs, weight_GN, loss.attention_kind)
            sums["attention"] = sums.get("attention", 0.0) + loss.attention_weight * found
    return sums


def _hidden(
    student: Seen,
    teacher: Seen,
    pairs: tuple[np.ndarray, np.ndarray],
    matrix_PDE: jax.Array,
    weight_GN: jax.Array,
    kind: str,
) -> jax.Array:
    def of_pair(own_GND: jax.Array, other_GNE: jax.Array, matrix_DE: jax.Array) -> jax.Array:
        return (weight_GN * hidden_state_loss(own_GND, other_GNE, matrix_DE, kind=kind)).sum()

    own_PGND, other_PGNE = student.layers["hidden"][pairs[0]], teacher.layers["hidden"][pairs[1]]
    return jax.vmap(of_pair)(own_PGND, other_PGNE, matrix_PDE).mean()


def _attention(
    student: Seen,
    teacher: Seen,
    pairs: tuple[np.ndarray, np.ndarray],
    weight_GN: jax.Array,
    kind: str,
) -> jax.Array:
    mask_GNN = aligned_keys(student.rows_GN, weight_GN)

    # A pair at a time, and its maps a second time in the backward pass: they are the large arrays.
    @jax.checkpoint
    def of_pair(total: jax.Array, layers: Any) -> tuple[jax.Array, None]:
        maps = [
            _map(s, layer, mask_GNN) for s, layer in zip((student, teacher), layers, strict=True)
        ]
        return total + (weight_GN * attention_loss(*maps, mask=mask_GNN, kind=kind)).sum(), None

    layers = [
        (
            seen.layers["query"][at],
            seen.layers["key"][at],
            np.array(seen.config.local_layers or (True,) * seen.config.layers)[at],
        )
        for seen, at in zip((student, teacher), pairs, strict=True)
    ]
    total, _ = jax.lax.scan(of_pair, jnp.zeros(()), layers)
    return total / len(pairs[0])


def _map(
    seen: Seen, layer: tuple[jax.Array, jax.Array, jax.Array], mask_GNN: jax.Array
) -> jax.Array:
    """One layer's attention among the aligned positions, of which a local one sees the near."""
    c, (q_GNHh, k_GNKh, is_local) = seen.config, layer
    if c.window:
        at_GN = seen.tokens_GN
        near_GNN = at_GN[:, :, None] - at_GN[:, None, :] < c.window
        mask_GNN = mask_GNN & (near_GNN | ~is_local)
    bias, softcap = seen.bias_GHNN, c.attention_softcap
    return attention_map(q_GNHh, k_GNKh, mask_GNN, bias, scale=c.query_scale, softcap=softcap)
