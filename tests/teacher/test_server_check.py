"""A server's echo is relied on only after it was found to mean what it should."""

import numpy as np
import pytest

from uld_jax.errors import UserError
from uld_jax.teacher import CompletionsClient, check_server
from uld_jax.teacher.server_check import SHIFTS


@pytest.mark.parametrize("shift", SHIFTS)
def test_finds_the_shift_by_a_continuation(fake, texts, shift):
    fake.shift = shift
    with CompletionsClient(fake.server()) as client:
        found = check_server(client, texts[:3])
    assert found.shift == shift
    assert found.positions >= 8
    assert found.difference < 1e-4
    assert ("corrected" in str(found)) == bool(shift)


@pytest.mark.parametrize("shift", SHIFTS)
def test_finds_the_shift_by_values_of_the_callers(fake, teacher, texts, shift):
    fake.shift = shift
    expected = []
    for text in texts[:2]:
        ids, prompt = (teacher.tokenizer(t).input_ids for t in (text.text, text.prompt))
        rows = teacher.log_probs(ids)[len(prompt) - 1 : len(ids) - 1]
        expected.append(-np.sort(-rows)[:, :4])
    with CompletionsClient(fake.server()) as client:
        assert check_server(client, texts[:2], expected=expected).shift == shift
        with pytest.raises(UserError, match="not those of the teacher"):
            check_server(client, texts[:2], expected=[e - 0.1 for e in expected])
        with pytest.raises(UserError, match="expected the same tokenizer"):
            check_server(client, texts[:2], expected=[e[1:] for e in expected])


def test_refuses_values_that_agree_at_no_shift(fake, texts):
    def garble(answer):
        for choice in answer["choices"]:
            entries = choice["logprobs"]["top_logprobs"]
            if entries[0] is None:
                choice["logprobs"]["top_logprobs"] = [None, *entries[:0:-1]]
        return answer

    fake.fault = lambda number, body: garble
    with (
        CompletionsClient(fake.server()) as client,
        pytest.raises(UserError, match=r"not those of its own continuation.*at shift -1"),
    ):
        check_server(client, texts[:3])


def test_refuses_what_cannot_be_told_apart(fake, texts):
    def flatten(answer):
        for choice in answer["choices"]:
            logprobs = choice["logprobs"]
            logprobs["top_logprobs"] = [
                {str(i): -2.5 for i in range(8)} for _ in logprobs["tokens"]
            ]
        return answer

    fake.fault = lambda number, body: flatten
    with (
        CompletionsClient(fake.server()) as client,
        pytest.raises(UserError, match="several shifts agree"),
    ):
        check_server(client, texts[:1])


def test_refuses_a_server_that_tells_fewer_than_asked_for(fake, texts):
    def cap(answer):
        for choice in answer["choices"]:
            logprobs = choice["logprobs"]
            logprobs["top_logprobs"] = [
                entry and dict(list(entry.items())[:5]) for entry in logprobs["top_logprobs"]
            ]
        return answer

    fake.fault = lambda number, body: cap
    with (
        CompletionsClient(fake.server()) as client,
        pytest.raises(UserError, match=r"expected 8 log-probabilities.*at most 5"),
    ):
        check_server(client, texts[:1])


@pytest.mark.parametrize(
    "change",
    [{"logprobs": None}, {"text": ""}],
    ids=["no logprobs", "no continuation"],
)
def test_refuses_a_server_without_what_is_needed(fake, texts, change):
    fake.fault = lambda number, body: (
        lambda answer: ({**answer, "choices": [answer["choices"][0] | change]})
    )
    with (
        CompletionsClient(fake.server(retries=0)) as client,
        pytest.raises(UserError, match=r"no logprobs|nothing to compare"),
    ):
        check_server(client, texts[:1])


def test_an_echo_that_is_ignored_is_told(fake, texts):
    respond = fake.compute
    fake.respond = lambda body: respond({**body, "echo": False})
    with (
        CompletionsClient(fake.server(retries=0)) as client,
        pytest.raises(UserError, match="wrong number of positions: expected"),
    ):
        check_server(client, texts[:1])
