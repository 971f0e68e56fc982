"""Readings against transformers, which computes them in float64 and one text at a time."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import torch
import transformers

from uld_jax import models
from uld_jax.data import Encoded, Example, Pair, Side, pairs_or_reasons
from uld_jax.errors import UserError
from uld_jax.evaluation import bits_per_byte, read_answers
from uld_jax.sharding import make_mesh
from uld_jax.testing import tiny_config, tiny_model, tiny_t5

ANSWERS = ("the river", "a village bakery for café and wheat", "7", "ninety steps — each", "é")


@pytest.fixture(scope="module")
def decoder():
    return tiny_model(tiny_config(max_positions=256), seed=3)


def texts_of(m, answers=ANSWERS):
    start_id = m.config.start_id if isinstance(m.config, models.EncoderDecoderConfig) else None
    side = Side(m.tokenizer, 256, append_eos=False, start_id=start_id)
    examples = [
        Example(str(i), "qa", "The mill stands." * (1 + i % 3), "What is there?", (answer,), "")
        for i, answer in enumerate(answers)
    ]
    pairs = pairs_or_reasons(examples, answers, side, ())
    assert all(isinstance(pair, Pair) for pair in pairs)
    return [pair.student for pair in pairs]


def expected_readings(m, texts, directory, auto):
    models.save_pretrained(m, directory)
    theirs = auto.from_pretrained(directory).eval().double()
    for text in texts:
        ids = torch.from_numpy(text.tokens.astype(np.int64))[None]
        inputs = {"input_ids": ids}
        if len(text.encoder):
            encoder = torch.from_numpy(text.encoder.astype(np.int64))[None]
            inputs = {"input_ids": encoder, "decoder_input_ids": ids}
        with torch.no_grad():
            log_probs = theirs(**inputs).logits[0].log_softmax(-1).numpy()
        before = log_probs[text.answer - 1]
        targets = text.tokens[text.answer]
        nats = -before[np.arange(len(targets)), targets]
        yield nats, np.exp(before.max(-1)), before.argmax(-1) == targets


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_readings_are_those_of_transformers(family, decoder, tmp_path):
    seq2seq = family == "encoder_decoder"
    m = tiny_model(tiny_t5(), seed=3) if seq2seq else decoder
    auto = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    texts = texts_of(m)
    found = read_answers(m, texts, batch_size=2, chunk_size=6)
    for reading, expected in zip(
        found, expected_readings(m, texts, tmp_path / "m", auto), strict=True
    ):
        nats, confidence, correct = expected
        np.testing.assert_allclose(reading.nats, nats, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(reading.confidence, confidence, rtol=2e-5, atol=1e-6)
        np.testing.assert_array_equal(reading.correct, correct)
    for answer, text, reading in zip(ANSWERS, texts, found, strict=True):
        size = len(answer.encode())
        bits = bits_per_byte(float(reading.nats.sum()), size)
        assert bits == pytest.approx(reading.nats.sum() / size / math.log(2), rel=1e-6)
        assert len(reading.nats) == len(text.answer)


def test_neither_batches_nor_chunks_nor_the_mesh_change_a_reading(decoder):
    texts = texts_of(decoder)
    one = read_answers(decoder, texts, batch_size=5, chunk_size=1000)
    seen = {}
    mesh = make_mesh(2, 2, 2)
    on_mesh = tiny_model(tiny_config(max_positions=256), seed=3)
    others = [
        read_answers(decoder, texts, batch_size=1, chunk_size=1, found=seen.update),
        read_answers(on_mesh, texts, batch_size=3, mesh=mesh),
    ]
    assert sorted(seen) == list(range(len(texts)))
    for other in others:
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a.nats, b.nats, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(a.correct, b.correct)


def test_a_model_that_knows_the_answer_is_sure_and_right(decoder):
    # A head of zeros is as sure as the vocabulary is large, and needs log2 V bits a token.
    flat = tiny_model(tiny_config(max_positions=256, tied=False), seed=0)
    flat.model.head[...] = jax.numpy.zeros_like(flat.model.head[...])
    (text,) = texts_of(flat, ["river"])
    reading = read_answers(flat, [text], batch_size=1)[0]
    size = flat.config.vocab_size
    np.testing.assert_allclose(reading.nats, math.log(size), rtol=1e-6)
    np.testing.assert_allclose(reading.confidence, 1 / size, rtol=1e-6)
    assert not reading.correct.any()


def test_what_cannot_be_read(decoder):
    long = Encoded(np.ones(300, np.int32), np.array([299], np.int32))
    with pytest.raises(UserError, match="have 300 tokens, over the model's 256 positions"):
        read_answers(decoder, [long], batch_size=1)
    broken = tiny_model(tiny_config(max_positions=256), seed=3)
    broken.model.norm[...] = np.nan * broken.model.norm[...]
    with pytest.raises(UserError, match="not finite: compute in float32"):
        read_answers(dataclasses.replace(broken), texts_of(broken), batch_size=2)
