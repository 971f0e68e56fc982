"""Signals from a real server on loopback, whatever it does, against those of its own logits."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from email.utils import formatdate

import jax.numpy as jnp
import numpy as np
import pytest

from uld_jax.data import Encoded
from uld_jax.errors import UserError
from uld_jax.losses import truncated_uld, uld
from uld_jax.teacher import (
    CompletionsClient,
    FetchOptions,
    ServedText,
    check_server,
    served_signals,
)
from uld_jax.teacher.completions import _retry_after_s

K = 8


def fetch(fake, texts, directory, *, options=None, failed=None, **changes):
    with CompletionsClient(fake.server(**changes)) as client:
        return list(
            served_signals(client, texts, directory, options or FetchOptions(), failed=failed)
        )


def own_logits(teacher, text):
    """[n, V] logits that predict the answer's tokens, by the rule of `data.encode`."""
    encoding = teacher.tokenizer(text.text, return_offsets_mapping=True)
    ends = [end for _, end in encoding.offset_mapping]
    rows = [i - 1 for i, end in enumerate(ends) if i > 0 and end > len(text.prompt)]
    return teacher.logits(encoding.input_ids)[rows]


def check_values(teacher, texts, signals):
    assert [s.id for s in signals] == [t.id for t in texts]
    for text, found in zip(texts, signals, strict=True):
        logits = own_logits(teacher, text)
        probs = np.exp(logits - np.logaddexp.reduce(logits, -1, keepdims=True))
        expected = -np.sort(-probs)[:, :K]
        assert found.probs_sorted.dtype == found.tail_mass.dtype == np.float32
        known = found.probs_sorted > 0
        # Of parts of characters less is known; of the others all.
        assert known.mean() > 0.5
        assert known.all() or not text.answer.isascii()
        np.testing.assert_allclose(found.probs_sorted, expected * known, atol=1e-4)
        np.testing.assert_allclose(found.tail_mass, 1 - (expected * known).sum(-1), atol=1e-4)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("size", [1, 3])
def test_signals_are_those_of_the_servers_logits(fake, teacher, texts, tmp_path, shift, size):
    fake.shift = shift
    with CompletionsClient(fake.server(prompts_per_request=size)) as client:
        options = FetchOptions(shift=check_server(client, texts[:2]).shift)
        before = len(fake.requests)
        signals = list(served_signals(client, texts, tmp_path, options))
    check_values(teacher, texts, signals)
    assert len(fake.requests) - before == len(texts) / size


def test_bounds_contain_the_loss_of_the_full_logits(fake, teacher, texts, tmp_path):
    signals = fetch(fake, texts, tmp_path)
    probs = np.concatenate([found.probs_sorted for found in signals])
    tails = np.concatenate([found.tail_mass for found in signals])
    logits = np.concatenate([own_logits(teacher, text) for text in texts])
    noise = np.random.default_rng(0).normal(size=logits.shape)
    # Far from the teacher, and so near that the interval's lower end counts.
    for scale, kept in ((3.0, 0.0), (0.3, 1.0)):
        student = jnp.asarray(noise * scale + logits * kept, jnp.float32)
        _, lower, upper = truncated_uld(student, probs, tails)
        exact = np.asarray(uld(student, jnp.asarray(logits)))
        assert (np.asarray(lower) <= exact + 1e-5).all()
        assert (exact <= np.asarray(upper) + 1e-5).all()


def test_the_end_of_the_text_is_one_more_position(fake, teacher, texts, tmp_path):
    for shift in (0, 1):
        fake.shift = shift
        signals = fetch(
            fake, texts[:2], tmp_path / str(shift), options=FetchOptions(shift=shift, end=True)
        )
        for text, found in zip(texts, signals, strict=False):
            ids = teacher.tokenizer(text.text).input_ids
            last = -np.sort(-np.exp(teacher.log_probs(ids)[-1]))[:K]
            np.testing.assert_allclose(found.probs_sorted[-1], last, atol=1e-4)
            assert len(found.tail_mass) == len(own_logits(teacher, text)) + 1


def test_token_ids_are_sent_where_there_are_some(fake, teacher, texts, tmp_path):
    def encoded(text):
        encoding = teacher.tokenizer(text.text, return_offsets_mapping=True)
        ends = [end for _, end in encoding.offset_mapping]
        answer = [i for i, end in enumerate(ends) if i > 0 and end > len(text.prompt)]
        tokens = np.asarray(encoding.input_ids, np.int32)
        return Encoded(tokens, np.asarray(answer, np.int32))

    as_ids = [ServedText(t.id, t.prompt, t.answer, encoded(t)) for t in texts]
    with CompletionsClient(fake.server()) as client:
        assert check_server(client, as_ids[:2]).shift == 0
    check_values(teacher, texts, fetch(fake, as_ids, tmp_path))
    assert isinstance(fake.requests[-1]["prompt"][0], int)
    fake.fault = lambda number, body: lambda answer: answer | {"usage": {"prompt_tokens": 5}}
    failed = {}
    options = FetchOptions(max_failed_fraction=1)
    assert not fetch(fake, as_ids[:1], tmp_path / "2", options=options, failed=failed, retries=0)
    count = len(as_ids[0].encoded.tokens)
    assert failed == {"q0": f"wrong number of positions: expected {count}, got 5"}


def change_entries(change):
    """A fault in what the server says of each position."""

    def fault(answer):
        change(answer["choices"][0]["logprobs"])
        return answer

    return fault


def put(name, index, value):
    return change_entries(lambda logprobs: logprobs[name].__setitem__(index, value))


def too_many(logprobs):
    logprobs["top_logprobs"][-2] = {"a": -0.1, "b": -0.2}


FAULTS = {
    "429": ((429, b'{"error": {"message": "slow down"}}'), "429 Too Many Requests: slow down"),
    "500": ((500, b"<html>oops</html>"), "500 Internal Server Error: <html>oops"),
    "cut": ("cut", "RemoteProtocolError: peer closed connection"),
    "malformed JSON": ((200, b'{"choices": ['), "malformed answer: not JSON"),
    "not an object": ((200, b"[]"), "malformed answer: expected 1 choices, got none"),
    "bytes": ((200, b"\xff\xfe\x80"), "malformed answer: not JSON"),
    "one position less": (
        change_entries(lambda logprobs: logprobs["top_logprobs"].pop()),
        "wrong number of positions: expected",
    ),
    "two tokens less": (
        change_entries(
            lambda logprobs: [logprobs[name].__delitem__(slice(3, 5)) for name in logprobs]
        ),
        "wrong number of positions: expected",
    ),
    "another text": (put("tokens", 4, "zz"), "tokens do not make up the given text"),
    "NaN": (put("token_logprobs", 3, math.nan), r"token_logprobs\[3\] is nan"),
    "NaN at the top": (
        put("top_logprobs", 3, {"a": math.nan}),
        r"top_logprobs\[3\] is \{'a': nan\}",
    ),
    "positive": (put("top_logprobs", 3, {"a": 0.5}), r"top_logprobs\[3\] is \{'a': 0.5\}"),
    "missing": (put("top_logprobs", -2, None), "no log-probabilities at position"),
    "a sum above 1": (change_entries(too_many), "probabilities that sum to 1.72"),
}


@pytest.mark.parametrize(("fault", "reason"), FAULTS.values(), ids=FAULTS)
def test_a_fault_that_passes_costs_a_retry(fake, teacher, texts, tmp_path, fault, reason):
    fault = (*fault, {}) if isinstance(fault, tuple) else fault
    fake.fault = lambda number, body: fault if number in (1, 2, 3) else None
    check_values(teacher, texts, fetch(fake, texts, tmp_path, concurrency=1))
    assert len(fake.requests) == len(texts) + 3


@pytest.mark.parametrize(("fault", "reason"), FAULTS.values(), ids=FAULTS)
def test_a_fault_that_stays_is_recorded(fake, teacher, texts, tmp_path, fault, reason):
    fault = (*fault, {}) if isinstance(fault, tuple) else fault
    fake.fault = lambda number, body: fault if body["prompt"] == texts[1].text else None
    failed = {}
    options = FetchOptions(max_failed_fraction=0.2)
    signals = fetch(fake, texts, tmp_path, options=options, failed=failed)
    check_values(teacher, [texts[0], *texts[2:]], signals)
    assert list(failed) == ["q1"]
    assert re.search(reason, failed["q1"]), failed
    assert len(fake.requests) == len(texts) + 3
    lines = [json.loads(line) for line in (tmp_path / "served.jsonl").read_text().splitlines()]
    assert [line["failed"] for line in lines if "failed" in line] == [failed["q1"]]
    # Another run asks for it again, and for nothing else.
    fake.fault, before = None, len(fake.requests)
    check_values(teacher, texts, fetch(fake, texts, tmp_path, failed=failed))
    assert len(fake.requests) == before + 1
    assert not failed


def test_a_hang_ends_with_the_read_timeout(fake, teacher, texts, tmp_path):
    fake.fault = lambda number, body: "hang" if number == 0 else None
    start = time.monotonic()
    check_values(teacher, texts[:2], fetch(fake, texts[:2], tmp_path, read_timeout_s=0.3))
    assert 0.3 <= time.monotonic() - start < 15
    assert fake.hanging.is_set()
    assert len(fake.requests) == 3


def test_retry_after_is_honoured(fake, teacher, texts, tmp_path):
    later = (429, b"", {"Retry-After": "0.4"})
    fake.fault = lambda number, body: later if number == 0 else None
    start = time.monotonic()
    check_values(teacher, texts[:1], fetch(fake, texts[:1], tmp_path))
    assert time.monotonic() - start >= 0.4
    # One that asks for a day is not waited for.
    fake.fault = lambda number, body: (429, b"quota", {"Retry-After": "86400"})
    failed = {}
    options = FetchOptions(max_failed_fraction=1)
    assert not fetch(fake, texts[:1], tmp_path / "2", options=options, failed=failed)
    assert failed == {"q0": "429 Too Many Requests: quota"}


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("2", 2), ("", 0), ("soon", 0), ("-3", 0), ("nan", 0), ("Mon, 01 Jan 2001 00:00:00 -0000", 0)],
)
def test_retry_after_is_read(header, seconds):
    assert _retry_after_s(header) == seconds


def test_retry_after_is_read_as_a_date():
    assert 55 < _retry_after_s(formatdate(time.time() + 60, usegmt=True)) <= 60


def test_one_bad_text_does_not_fail_those_sent_with_it(fake, teacher, texts, tmp_path):
    bad = texts[1].text
    fake.fault = lambda number, body: (500, b"bad text", {}) if bad in body["prompt"] else None
    failed = {}
    signals = fetch(
        fake,
        texts,
        tmp_path,
        options=FetchOptions(max_failed_fraction=0.2),
        failed=failed,
        prompts_per_request=3,
    )
    check_values(teacher, [texts[0], *texts[2:]], signals)
    assert list(failed) == ["q1"]


def test_a_text_over_the_context_is_recorded_at_once(fake, texts, tmp_path):
    said = b'{"error": {"code": "context_length_exceeded", "message": "maximum context length 9"}}'
    long = texts[1].text
    fake.fault = lambda number, body: (400, said, {}) if body["prompt"] == long else None
    failed = {}
    fetch(fake, texts, tmp_path, options=FetchOptions(max_failed_fraction=0.2), failed=failed)
    assert failed == {"q1": "400 Bad Request: maximum context length 9"}
    assert len(fake.requests) == len(texts)


def test_too_many_failures_end_the_run_and_keep_the_rest(fake, teacher, texts, tmp_path):
    bad = {text.text for text in texts[1:4]}
    fake.fault = lambda number, body: (503, b"busy", {}) if body["prompt"] in bad else None
    options = FetchOptions(max_failed_fraction=0.4)
    with pytest.raises(UserError, match=r"no signal for 3 examples.*at most 2.*503.*busy"):
        fetch(fake, texts, tmp_path, options=options, concurrency=1)
    fake.fault, before = None, len(fake.requests)
    check_values(teacher, texts, fetch(fake, texts, tmp_path))
    assert len(fake.requests) == before + 5  # all but the first


@pytest.mark.parametrize("status", [400, 404, 422, 301])
def test_what_the_server_refuses_is_told_at_once(fake, texts, tmp_path, status):
    fake.fault = lambda number, body: (status, b'{"detail": "no\\n such thing"}', {})
    with pytest.raises(UserError, match=rf"answered {status} .*: no such thing"):
        fetch(fake, texts, tmp_path, concurrency=1)
    assert len(fake.requests) == 1


def test_a_wrong_key_is_told_without_the_key(fake, texts, tmp_path, monkeypatch, caplog):
    fake.key = "right"
    monkeypatch.setenv("MY_KEY", "wrong-secret")
    caplog.set_level("DEBUG")
    with pytest.raises(
        UserError, match=r"401 Unauthorized: Incorrect key.*variable MY_KEY"
    ) as info:
        fetch(fake, texts, tmp_path, api_key_env="MY_KEY")
    assert "wrong-secret" not in str(info.value) + caplog.text
    monkeypatch.setenv("MY_KEY", "right")
    assert len(fetch(fake, texts, tmp_path, api_key_env="MY_KEY")) == len(texts)
    with pytest.raises(UserError, match="expected a key: name the environment variable"):
        fetch(fake, texts, tmp_path / "2")


@pytest.mark.parametrize(("value", "said"), [("", "is empty"), ("a\nb", "characters that no key")])
def test_a_key_that_cannot_be_is_told(fake, monkeypatch, value, said):
    monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(UserError, match=f"variable MY_KEY.*{said}"):
        CompletionsClient(fake.server(api_key_env="MY_KEY"))


@pytest.mark.parametrize("url", ["", "localhost:80", "ftp://a/v1", "http://", "http://a:b:c/v1"])
def test_an_address_that_cannot_be_is_told(fake, url):
    with pytest.raises(UserError, match="server url: expected http://HOST:PORT/v1"):
        CompletionsClient(fake.server(url=url))
    with pytest.raises(UserError, match="expected none with a user or password"):
        CompletionsClient(fake.server(url="http://me:secret@host/v1"))


def test_a_refused_connection_is_told(fake, texts):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (
        CompletionsClient(fake.server(url=f"http://127.0.0.1:{port}/v1", retries=1)) as client,
        pytest.raises(UserError, match=rf"127.0.0.1:{port}/v1/completions: .*Connection refused"),
    ):
        check_server(client, texts[:1])


CLIENT = """
import sys
from pathlib import Path
from uld_jax.teacher import *

url, directory = sys.argv[1:]
texts = [ServedText(f"q{i}", "Question: numbers? Answer:", f" {i} 7 8") for i in range(9)]
server = Server(url, "tiny", top_k=8, concurrency=2, backoff_s=0.002)
with CompletionsClient(server) as client:
    for s in served_signals(client, texts, Path(directory), FetchOptions()):
        print(s.id, s.probs_sorted.tobytes().hex(), s.tail_mass.tobytes().hex())
"""


def test_a_killed_run_goes_on_with_what_is_missing(fake, tmp_path):
    def run(name, **options):
        command = [sys.executable, "-c", CLIENT, fake.url, str(tmp_path / name)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)

    undisturbed = run("whole")
    expected, _ = undisturbed.communicate(timeout=120)
    assert len(expected.splitlines()) == 9
    fake.requests.clear()
    fake.fault = lambda number, body: "hang" if number >= 5 else None
    killed = run("killed")
    assert fake.hanging.wait(120)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    journal = tmp_path / "killed" / "served.jsonl"
    whole = journal.read_text()
    lines = len(whole.splitlines()) - 1
    assert 4 <= lines <= 5
    journal.write_text(whole + whole.splitlines()[-1][:40])  # what a kill while writing leaves
    fake.requests.clear()
    fake.fault = None
    again = run("killed")
    found, _ = again.communicate(timeout=120)
    assert found == expected
    assert len(fake.requests) == 9 - lines
    text = journal.read_text()
    assert text.startswith(whole)
    ids = [json.loads(line)["id"] for line in text.splitlines()[1:]]
    assert sorted(ids) == [f"q{i}" for i in range(9)]


def test_a_journal_of_something_else_is_refused(fake, texts, tmp_path):
    fetch(fake, texts, tmp_path)
    with pytest.raises(UserError, match=r"holds signals of .*'top_k': 8.*expected .*'top_k': 4"):
        fetch(fake, texts, tmp_path, top_k=4)
    other = [ServedText("q0", texts[0].prompt, " Norway")]
    with pytest.raises(UserError, match="its signals for 'q0' are of another text"):
        fetch(fake, other, tmp_path)
    journal = tmp_path / "served.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([*lines[:2], "{}\n", *lines[2:]]))
    with pytest.raises(UserError, match=r"served.jsonl:3: not a line of a journal"):
        fetch(fake, texts, tmp_path)
    with pytest.raises(UserError, match="example id 'q0' is there twice"):
        fetch(fake, [texts[0], texts[0]], tmp_path)
    with pytest.raises(UserError, match="cannot write"):
        fetch(fake, texts, journal)
