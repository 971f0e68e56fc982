"""What a real llama-cpp-python server answered, through the real client."""

import json
from pathlib import Path

import numpy as np
import pytest

from uld_jax.errors import UserError
from uld_jax.teacher import (
    CompletionsClient,
    FetchOptions,
    ServedText,
    check_server,
    served_signals,
)


@pytest.fixture
def recorded(fake):
    """The recording, which the server on loopback now repeats."""
    path = Path(__file__).with_name("recorded_exchange.json")
    recording = json.loads(path.read_text())
    answers = [(each["request"], each["response"]) for each in recording["exchanges"]]
    fake.respond = lambda body: next(answer for request, answer in answers if request == body)
    return recording


def test_the_shift_is_found_and_the_values_are_our_own_models(fake, recorded, tmp_path):
    texts = [ServedText(**text) for text in recorded["texts"]]
    with CompletionsClient(fake.server(model="smollm2", top_k=4, retries=0)) as client:
        check = check_server(client, texts[:1])
        assert str(check).startswith("entries shifted by +1, corrected: 8 positions")
        options = FetchOptions(check.shift, end=True)
        signals = list(served_signals(client, texts, tmp_path, options))
    for text, found in zip(texts, signals, strict=True):
        own = np.exp(recorded["own"][text.id])
        # One more: the end of the text.
        assert found.probs_sorted.shape == (len(own) + 1, 4)
        assert np.abs(found.probs_sorted[:-1] - own).sum(-1).max() < 0.15
        np.testing.assert_allclose(found.probs_sorted.sum(-1) + found.tail_mass, 1, atol=1e-6)


def test_values_of_our_own_model_find_the_shift_too(fake, recorded):
    texts = [ServedText(**text) for text in recorded["texts"]]
    own = [np.asarray(recorded["own"][text.id]) for text in texts]
    with CompletionsClient(fake.server(model="smollm2", top_k=4, retries=0)) as client:
        assert check_server(client, texts, expected=own, tolerance=0.5).shift == 1
        # A tolerance below what 4-bit weights differ by refuses it.
        with pytest.raises(UserError, match=r"not those of the teacher.*at shift \+1"):
            check_server(client, texts, expected=own, tolerance=1e-5)
