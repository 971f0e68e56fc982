"""A teacher on devices of its own gives, on the student's, what its whole logits say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from uld_jax.data.signal import ROUNDING
from uld_jax.losses import sorted_probabilities
from uld_jax.models import Decoder, parameters
from uld_jax.sharding import batch_shards, make_mesh, named_sharding, split_devices
from uld_jax.teacher import StreamedTeacher, StreamOptions
from uld_jax.testing import tiny_gemma, toy_batch

VOCAB = 96


def place(model, mesh):
    for _, param in nnx.to_flat_state(parameters(model)):
        axes = param.get_metadata("axes")
        param.set_value(jax.device_put(param[...], named_sharding(mesh, axes)))
    return model


def meshes(teacher, student):
    count = int(np.prod(teacher))
    rest, own = split_devices([count])
    rest = rest[: int(np.prod(student))]
    return (make_mesh(*teacher, devices=own), make_mesh(*student, devices=rest))


def decoder():
    return Decoder(tiny_gemma(kv_heads=2), rngs=nnx.Rngs(1))


def expected(model, teacher):
    """Sorted probabilities [M, G, N, U] from whole logits."""
    inputs = {k: v for k, v in teacher.items() if k not in ("uld_weight", "index", "tokens")}
    rows = []
    for m, index in enumerate(teacher["index"]):
        logits = model(teacher["tokens"][m], **{name: x[m] for name, x in inputs.items()})
        grouped = logits.reshape(len(index), -1, logits.shape[-1])
        rows.append(jnp.take_along_axis(grouped, index[..., None], axis=1))
    return sorted_probabilities(jnp.stack(rows))


@pytest.mark.parametrize(
    ("teacher", "student", "rows", "micro_batches", "batch_size"),
    [
        ((4, 1, 1), (4, 1, 1), 8, 1, 8),
        ((1, 1, 4), (4, 1, 1), 16, 2, 4),
        ((2, 2, 1), (2, 1, 2), 16, 2, 8),
        ((1, 2, 2), (1, 1, 1), 8, 2, 8),
        ((3, 1, 1), (2, 2, 1), 24, 1, 12),
    ],
    ids=str,
)
def test_signals_are_the_sorted_probabilities(teacher, student, rows, micro_batches, batch_size):
    mesh, student_mesh = meshes(teacher, student)
    model = decoder()
    groups = batch_shards(student_mesh)
    (arrays,) = toy_batch(rows=rows, groups=groups, micro_batches=micro_batches)["teachers"]
    right = expected(model, arrays)
    options = StreamOptions(depth=1, batch_size=batch_size, chunk_size=8)
    stream = StreamedTeacher(place(model, mesh), options, mesh=mesh, student_mesh=student_mesh)
    signal = stream.signal(arrays)
    assert signal.probs.shape == (micro_batches, groups, *arrays["index"].shape[2:], VOCAB)
    assert signal.probs.sharding.mesh == student_mesh
    shard = signal.probs.addressable_shards[-1]
    assert shard.data.shape[1] == 1
    np.testing.assert_allclose(signal.probs, right, atol=2e-6)
    np.testing.assert_allclose(signal.tail_mass, 0)
    np.testing.assert_allclose(signal.error, ROUNDING)
