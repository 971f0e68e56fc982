import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from uld_jax.sharding import BATCH_AXES, make_mesh
from uld_jax.teacher.signals import top_probabilities

U, E = 50, 6


def reference(hidden, head, *, k, temperature=1.0, softcap=None, vocab=None):
    """The definition in float64: the whole softmax, sorted, equals by ascending id."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    logits = (logits / temperature)[..., :vocab]
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        probs = weights / weights.sum(-1, keepdims=True)
        entropy = -np.where(probs > 0, probs * np.log(probs), 0).sum(-1)
    order = np.argsort(-probs, axis=-1, kind="stable")
    ranked = np.take_along_axis(probs, order, -1)
    width = [(0, 0)] * (probs.ndim - 1) + [(0, max(0, k - probs.shape[-1]))]
    top = np.pad(ranked[..., :k], width)
    return top, ranked[..., k:].sum(-1), entropy, order[..., :k]


def arrays(*leading, scale=2.0, seed=0, rows=U):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(*leading, E)) * scale
    return hidden.astype(np.float32), rng.normal(size=(rows, E)).astype(np.float32)


def compare(hidden, head, *, rtol=2e-5, **options):
    top = jax.jit(functools.partial(top_probabilities, ids=True, **options))(hidden, head)
    options.pop("chunk_size", None)
    probs, tail, entropy, ids = reference(hidden, head, **options)
    np.testing.assert_allclose(top.probs, probs, rtol=rtol, atol=1e-30)
    np.testing.assert_allclose(top.tail_mass, tail, rtol=rtol, atol=1e-30)
    np.testing.assert_allclose(top.entropy, entropy, rtol=rtol, atol=1e-6)
    seen = probs[..., : ids.shape[-1]] > 1e-37  # those that are 0 in float32 are equals
    np.testing.assert_array_equal(np.where(seen, top.ids[..., : ids.shape[-1]], ids), ids)
    assert (np.diff(top.probs) <= 0).all()
    return top


@pytest.mark.parametrize(
    "options",
    [
        {"k": 7, "chunk_size": 4},
        {"k": 1, "chunk_size": 100},
        {"k": U, "chunk_size": 1},
        {"k": U + 5, "chunk_size": 3},
        {"k": 7, "temperature": 2.5},
        {"k": 7, "temperature": 0.3, "softcap": 4.0},
        {"k": 7, "vocab": 41},
        {"k": 45, "vocab": 41, "temperature": 1.5},
    ],
    ids=str,
)
def test_it_agrees_with_float64(options):
    compare(*arrays(2, 5), **options)


def test_a_small_tail_is_precise():
    hidden, head = np.ones((1, 1), np.float32), np.float32([[0], [-18], [-18.5], [-19], [-40]])
    top = compare(hidden, head, k=2, rtol=1e-5)
    assert 0 < float(top.tail_mass[0]) < 2e-8  # 1 - the sum of the others would be 0


def test_ties_are_counted_once():
    hidden = np.ones((1, 1), np.float32)
    head = np.log(np.float32([[0.05], [0.2], [0.2], [0.2], [0.2], [0.15]]))
    for k in range(1, 7):
        top = compare(hidden, head, k=k)
        assert float(top.probs.sum() + top.tail_mass[0]) == pytest.approx(1, abs=1e-6)
    all_equal = compare(hidden, np.zeros((64, 1), np.float32), k=5)
    assert all_equal.ids.tolist() == [[0, 1, 2, 3, 4]]


def test_tokens_of_no_probability():
    head = np.float32([[0.5], [-np.inf], [0.25], [-np.inf], [-200]])
    top = compare(np.ones((2, 1), np.float32), head, k=4)
    assert top.probs[:, 2:].tolist() == [[0, 0], [0, 0]]
    assert top.tail_mass.tolist() == [0, 0]
    nothing = top_probabilities(np.ones((1, 1), np.float32), head[1:2], k=1)
    assert np.isnan(nothing.probs).all()


def test_half_precision_is_multiplied_with_wide_sums():
    hidden, head = (jnp.asarray(x, jnp.bfloat16) for x in arrays(9))
    compare(hidden, head, k=9, chunk_size=4)
    # A head that is kept wide is not narrowed.
    compare(hidden, arrays(9)[1], k=9, chunk_size=4)


def test_ids_are_left_out_by_default():
    top = top_probabilities(*arrays(3), k=2)
    assert top.ids is None
    assert top.probs.shape == (3, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k: expected at least 1, got 0"),
        ({"k": 1, "chunk_size": 0}, "chunk_size: expected at least 1"),
        ({"k": 1, "vocab": 0}, "vocab: expected at least 1"),
        ({"k": 1, "vocab": 51}, "vocab: expected at most the 50 rows of the head, got 51"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        top_probabilities(*arrays(3), **options)


@pytest.mark.parametrize("shape", [(2, 1, 4), (2, 2, 2), (8, 1, 1), (1, 1, 8)], ids=str)
@pytest.mark.parametrize("k", [3, 20, 60])
def test_a_mesh_changes_nothing(shape, k):
    """50 rows are not divisible by 4 or 8: the last shard's padding is no token."""
    mesh = make_mesh(*shape)
    hidden, head = arrays(8, 5)
    head[11] = head[40]  # a tie between shards
    expected = top_probabilities(hidden, head, k=k, ids=True)
    put = [
        jax.device_put(hidden, NamedSharding(mesh, PartitionSpec(BATCH_AXES))),
        jax.device_put(head, NamedSharding(mesh, PartitionSpec())),
    ]
    with jax.set_mesh(mesh):
        compiled = jax.jit(functools.partial(top_probabilities, k=k, ids=True, chunk_size=2))
        found = compiled(*put)
    for field in ("probs", "tail_mass", "entropy"):
        own, other = getattr(found, field), getattr(expected, field)
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-8)
    np.testing.assert_array_equal(found.ids[..., :50], expected.ids[..., :50])


def test_no_device_sees_all_logits():
    """On a mesh only the K largest of each shard are exchanged."""
    mesh = make_mesh(2, 1, 4)
    hidden, head = arrays(2, 6, rows=4096)
    with jax.set_mesh(mesh):
        program = jax.jit(functools.partial(top_probabilities, k=3, chunk_size=2)).lower(
            jax.ShapeDtypeStruct(
                hidden.shape, "float32", sharding=NamedSharding(mesh, PartitionSpec(BATCH_AXES))
            ),
            jax.ShapeDtypeStruct(
                head.shape, "float32", sharding=NamedSharding(mesh, PartitionSpec("tensor"))
            ),
        )
    text = program.compile().as_text()
    assert "[2,1024]" in text
    gathered = {
        int(size)
        for line in text.splitlines()
        if "all-gather(" in line
        for size in re.findall(r"= \w+\[\d+,(\d+)\]", line)
    }
    assert gathered == {12}
    assert not re.search(r"\[(\d+,)*4096\]", text)
