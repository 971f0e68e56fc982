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
from uld_jax.teacher.stream import _arrange, _plan
from uld_jax.testing import tiny_gemma, toy_batch
from uld_jax.types import TeacherTokens

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


def test_of_a_cut_signal_the_rest_is_its_tail_and_its_error():
    mesh, student_mesh = meshes((2, 1, 2), (2, 1, 1))
    model = decoder()
    (arrays,) = toy_batch(groups=2)["teachers"]
    right = expected(model, arrays)
    options = StreamOptions(depth=1, batch_size=4, top_k=10, chunk_size=8)
    stream = StreamedTeacher(place(model, mesh), options, mesh=mesh, student_mesh=student_mesh)
    signal = stream.signal(arrays)
    np.testing.assert_allclose(signal.probs, right[..., :10], atol=2e-6)
    np.testing.assert_allclose(signal.tail_mass, right[..., 10:].sum(-1), atol=2e-6)
    np.testing.assert_allclose(signal.error, signal.tail_mass + ROUNDING, rtol=1e-6)


def test_no_array_of_positions_by_vocabulary_is_made_or_moved():
    mesh, student_mesh = meshes((1, 1, 1), (2, 1, 1))
    (arrays,) = toy_batch(rows=24, groups=2)["teachers"]
    options = StreamOptions(depth=1, batch_size=8, top_k=10, chunk_size=8)
    stream = StreamedTeacher(place(decoder(), mesh), options, mesh=mesh, student_mesh=student_mesh)
    before = {id(x) for x in jax.live_arrays()}
    signal = stream.signal(arrays)
    made = [x for x in jax.live_arrays() if id(x) not in before]
    there = [x.shape for x in made if x.sharding.device_set & set(student_mesh.devices.flat)]
    assert signal.probs.shape in there
    assert all(VOCAB not in shape for shape in there)
    plan = _plan(arrays, 1, 8, 1)
    inputs, index = _arrange(TeacherTokens(**arrays), plan)
    with jax.set_mesh(mesh):
        text = stream._read.lower(stream._params, inputs, index, plan=plan).as_text()
    assert f"8x{VOCAB}xf32" in text  # a chunk: the search below would find it
    # Positions in all and of a group; tokens in all, of a pass, and of a row. None is the width.
    for size in ("96", "48", "480", "160", "20"):
        assert f"{size}x{VOCAB}xf32" not in text


def test_a_batch_that_does_not_divide_is_refused():
    mesh, student_mesh = meshes((4, 1, 1), (2, 1, 1))
    (arrays,) = toy_batch(groups=2)["teachers"]
    model = place(decoder(), mesh)
    for rows in (3, 2, 16):
        options = StreamOptions(depth=1, batch_size=rows)
        stream = StreamedTeacher(model, options, mesh=mesh, student_mesh=student_mesh)
        with pytest.raises(ValueError, match=f"the batch's 8 rows and a mu.* got {rows}"):
            stream.signal(arrays)
