"""Signals of tiny real teachers against dense float64 softmax, whatever the batches."""

import dataclasses
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from uld_jax import models
from uld_jax.data import Example, Side, SignalStore, SignalWriter
from uld_jax.errors import UserError
from uld_jax.models.reading import named_sharding
from uld_jax.sharding import make_mesh
from uld_jax.teacher import SignalOptions, teacher_texts, write_signals
from uld_jax.testing import tiny_gemma, tiny_model, tiny_t5

OPTIONS = SignalOptions(epsilon=0.02, cap=200, temperature=1.5, batch_size=3, chunk_size=4)
SETTINGS = {"epsilon": 0.02, "cap": 200, "shard_size": 4}
WORDS = ("the", "old", "mill", "stands", "by", "the", "river", "and", "grinds", "wheat", "for")


def examples(count):
    rng = np.random.default_rng(0)
    return [
        Example(f"q{i}", "qa", " ".join(rng.choice(WORDS, rng.integers(3, 30))), "What?", ("",), "")
        for i in range(count)
    ]


def answers(count):
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 8))) for _ in range(count)]
    return {f"q{i}": text for i, text in enumerate(texts)} | {"q5": "  "}


def side_of(m):
    start_id = getattr(m.config, "start_id", None)
    return Side(m.tokenizer, 200, append_eos=False, start_id=start_id)


def sharpen(m):
    """Hidden states of tiny random models are nearly equal at all positions: make them differ."""
    head = "embed" if m.config.tied else "head"
    param = getattr(m.model, head)
    param.set_value(param[...] * 20)
    return m


@pytest.fixture(scope="module", params=["gemma", "t5"])
def teacher(request):
    config = {"gemma": tiny_gemma(logit_softcap=9.0, kv_heads=2), "t5": tiny_t5()}[request.param]
    return sharpen(tiny_model(config, seed=2))


@pytest.fixture(scope="module")
def texts(teacher):
    found = teacher_texts(examples(11), answers(11), side_of(teacher), pool=(), seed=0)
    assert found[5] == "empty_answer"
    return found


def write(m, texts, directory, *, shards=None, options=OPTIONS, mesh=None):
    ids = [f"q{i}" for i in range(len(texts))]
    writer = SignalWriter(directory, {}, total=len(texts), **SETTINGS)
    return writer, write_signals(m, ids, texts, writer, options, shards=shards, mesh=mesh)


@functools.cache
def logits_of(graph):
    return jax.jit(lambda state, arrays: nnx.merge(graph, state)(**arrays)[0])


def dense(m, text, options=OPTIONS):
    """float64 probabilities at the answer's positions, [n, U]."""
    graph, state = nnx.split(m.model)
    arrays = {}
    for name, ids in (("tokens_BT", text.tokens), ("encoder_tokens", text.encoder)):
        if len(ids):  # all of one width, so that one program reads all
            segment_ids = name.replace("tokens_BT", "segment_ids").replace("tokens", "segment_ids")
            arrays[name] = np.zeros((1, 200), np.int32)
            arrays[segment_ids] = np.zeros((1, 200), np.int32)
            arrays[name][0, : len(ids)], arrays[segment_ids][0, : len(ids)] = ids, 1
    logits = np.asarray(logits_of(graph)(state, arrays), np.float64)
    logits = logits[text.answer - 1] / options.temperature
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def whole(teacher, texts, tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache") / "whole"
    writer, work = write(teacher, texts, directory)
    writer.finish()
    return directory, work


def contents(directory):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }


def test_every_signal_is_within_its_certified_error(teacher, texts, whole):
    directory, work = whole
    store = SignalStore(directory)
    assert len(store) == 10
    positions = 0
    for i, text in enumerate(texts):
        if isinstance(text, str):
            assert f"q{i}" not in store
            continue
        signal, probs = store[f"q{i}"], dense(teacher, text)
        assert len(signal) == len(text.answer)
        positions += len(signal)
        for n in range(len(signal)):
            ranked, kept = np.sort(probs[n])[::-1], signal.position(n)
            k = len(kept)
            assert signal.tail_mass[n] >= ranked[k:].sum() - 1e-6
            change = np.abs(kept - ranked[:k]).sum()
            assert change + signal.tail_mass[n] <= signal.error[n]
            assert k == OPTIONS.cap or signal.error[n] <= 0.0301
            # No more than needed is kept.
            assert k == 1 or ranked[k - 1 :].sum() > 0.02 - 1e-5
        np.testing.assert_allclose(
            signal.entropy, -(probs * np.log(probs)).sum(-1), atol=1e-3, rtol=1e-4
        )
    known = [text for text in texts if not isinstance(text, str)]
    assert (work.examples, work.positions) == (10, positions)
    assert work.tokens == sum(text.length for text in known)
    assert store.manifest["dropped"] == 1


def test_a_shard_is_the_same_whatever_was_done_before(teacher, texts, whole, tmp_path):
    for shard in (2, 0, 1):
        writer, _ = write(teacher, texts, tmp_path / "b", shards=[shard])
    assert writer.missing_shards() == []
    writer.finish()
    assert contents(tmp_path / "b") == contents(whole[0])


def test_a_mesh_of_eight_devices_gives_the_same_signals(teacher, texts, whole, tmp_path):
    mesh = make_mesh(2, 2, 2)
    graph, state = nnx.split(teacher.model)

    def put(param):
        axes = param.get_metadata("axes")
        return jax.device_put(param[...], named_sharding(mesh, axes, param.shape))

    spread = jax.tree.map(put, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    for (_, param), value in zip(nnx.to_flat_state(state), jax.tree.leaves(spread), strict=True):
        param.set_value(value)
    m = dataclasses.replace(teacher, model=nnx.merge(graph, state))
    writer, _ = write(m, texts, tmp_path / "mesh", mesh=mesh)
    writer.finish()
    store, expected = SignalStore(tmp_path / "mesh"), SignalStore(whole[0])
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            own, other = store[f"q{i}"], expected[f"q{i}"]
            assert len(own) == len(other)
            for n in range(len(own)):
                k = min(own.counts[n], other.counts[n])
                assert abs(int(own.counts[n]) - int(other.counts[n])) <= 1
                gap = np.abs(own.position(n)[:k] - other.position(n)[:k]).sum()
                assert gap <= 0.02
            np.testing.assert_allclose(own.entropy, other.entropy, atol=1e-3)


def test_ids_and_log_probs_of_the_likeliest(teacher, texts, tmp_path):
    writer, _ = write(teacher, texts, tmp_path, options=dataclasses.replace(OPTIONS, ids=3))
    writer.finish()
    signal, probs = SignalStore(tmp_path)["q0"], dense(teacher, texts[0])
    taken = np.take_along_axis(probs, signal.ids, 1)
    np.testing.assert_allclose(taken, np.sort(probs)[:, ::-1][:, :3], rtol=1e-4)
    np.testing.assert_allclose(signal.log_probs, np.log(taken), rtol=2e-3)


def test_a_shard_without_texts_is_written_too(teacher, texts, tmp_path):
    nothing = ["empty_answer"] * 4 + list(texts[4:])
    writer, work = write(teacher, nothing, tmp_path)
    manifest = writer.finish()
    assert manifest["shards"][0]["records"] == 0
    assert manifest["dropped"] == 5
    assert work.examples == 6


def test_probabilities_that_are_not_finite_name_the_example(texts, teacher, tmp_path):
    broken = dataclasses.replace(teacher, model=nnx.clone(teacher.model))
    for _, param in nnx.to_flat_state(models.parameters(broken.model)):
        param.set_value(param[...] * jnp.nan)
    with pytest.raises(UserError, match=r"example 'q\d': the teacher's probabilities are not fin"):
        write(broken, texts, tmp_path)
    assert not list(tmp_path.glob("signals-*"))
