"""A completions server on loopback that computes real log-probabilities, and can misbehave."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from uld_jax.teacher import ServedText, Server
from uld_jax.testing import tiny_config, tiny_model

LENGTH = 256


class Teacher:
    """A tiny model, its tokens as bytes, and its log-probabilities."""

    def __init__(self):
        # Sharp enough that the likeliest tokens of two positions differ by more than rounding.
        self.loaded = tiny_model(tiny_config(tied=False), seed=3)
        self.tokenizer = self.loaded.tokenizer
        graph, state = nnx.split(self.loaded.model)
        self._forward = jax.jit(lambda ids: nnx.merge(graph, state)(ids) * 40.0)
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        byte_of = {chr(byte): byte for byte in printable}
        byte_of |= {chr(256 + i): byte for i, byte in enumerate(others)}
        self.bytes = [
            b"" if token in self.tokenizer.all_special_tokens else bytes(map(byte_of.get, token))
            for token in self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        ]
        # Parts of characters and special tokens share one text, "": unlikely, as in real models.
        self._bias = np.array([0.0 if self.name(i) else -30.0 for i in range(len(self.bytes))])
        self.lock = threading.Lock()

    def logits(self, ids):
        """[T, V] float32."""
        padded = np.zeros((1, LENGTH), np.int32)
        padded[0, : len(ids)] = ids
        with self.lock:
            return np.asarray(self._forward(padded))[0, : len(ids)] + self._bias

    def log_probs(self, ids):
        return np.asarray(jax.nn.log_softmax(jnp.asarray(self.logits(ids))))

    def name(self, token):
        return self.bytes[token].decode(errors="ignore")

    def top(self, logprobs, own, count):
        """As llama-cpp-python makes it: by text, with the text's own token besides."""
        order = np.argsort(-logprobs, stable=True)[:count]
        return {self.name(i): float(logprobs[i]) for i in [*order, own]}

    def complete(self, body, shift):
        prompt, count = body["prompt"], body["logprobs"]
        ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt).input_ids
        given = len(ids)
        ids = list(ids)
        for _ in range(body["max_tokens"]):
            ids.append(int(self.log_probs(ids)[-1].argmax()))
        scores = self.log_probs(ids)
        if body["echo"]:
            # Shifted, the prediction after the last token of the prompt is the last.
            indices = range(given) if shift > 0 else range(len(ids))
            rows = [i - 1 + shift for i in indices]
        else:
            indices, rows = range(given, len(ids)), range(given - 1, len(ids) - 1)
        pairs = [(max(row, 0), ids[i]) for i, row in zip(indices, rows, strict=True)]
        entries = [self.top(scores[row], token, count) for row, token in pairs]
        own = [float(scores[row][token]) for row, token in pairs]
        if body["echo"]:
            entries[0] = own[0] = None
        starts = [
            len(b"".join(self.bytes[t] for t in ids[:i]).decode(errors="ignore")) for i in indices
        ]
        first = 0 if body["echo"] else given
        return {
            "text": b"".join(self.bytes[i] for i in ids[first:]).decode(errors="ignore"),
            "logprobs": {
                "tokens": [self.name(ids[i]) for i in indices],
                "token_logprobs": own,
                "top_logprobs": entries,
                "text_offset": starts,
            },
        }, given


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        fake = self.server.fake
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(raw)
        with fake.lock:
            number = len(fake.requests)
            fake.requests.append(body)
        if fake.key and self.headers["Authorization"] != f"Bearer {fake.key}":
            said = {"error": {"message": f"Incorrect key: {self.headers['Authorization']}"}}
            self.answer(401, json.dumps(said).encode())
            return
        fault = fake.fault(number, body) if fake.fault else None
        if isinstance(fault, tuple):  # status, body, headers
            self.answer(*fault)
            return
        if fault == "hang":
            fake.hanging.set()
            fake.release.wait()
            self.close_connection = True
            return
        answer = fake.respond(body)
        if callable(fault):
            answer = fault(answer)
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        if fault == "cut":
            self.answer(200, content[: len(content) // 2], {"Content-Length": str(len(content))})
            self.close_connection = True
            return
        self.answer(200, content)

    def answer(self, status, content, headers=None):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


class Fake:
    """The server: `fault(number, body)` decides what is wrong with the answer of each request."""

    def __init__(self, teacher):
        self.teacher, self.shift, self.key, self.fault = teacher, 0, "", None
        self.requests, self.lock = [], threading.Lock()
        self.hanging, self.release = threading.Event(), threading.Event()
        self.respond = self.compute
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = False  # so that closing waits for them
        self.http.fake = self
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def compute(self, body):
        prompts = body["prompt"]
        if isinstance(prompts, str) or isinstance(prompts[0], int):
            prompts = [prompts]
        found = [self.teacher.complete({**body, "prompt": p}, self.shift) for p in prompts]
        choices = [{**choice, "index": i} for i, (choice, _) in enumerate(found)]
        given = sum(count for _, count in found)
        # A protocol without an order: `index` says which choice is whose.
        return {"choices": choices[::-1], "usage": {"prompt_tokens": given}}

    def server(self, **changes):
        """Settings that lose no time."""
        defaults = {"top_k": 8, "retries": 3, "backoff_s": 0.002, "read_timeout_s": 30.0}
        return Server(**({"url": self.url, "model": "tiny"} | defaults | changes))

    def close(self):
        self.release.set()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture(scope="session")
def teacher():
    return Teacher()


@pytest.fixture
def fake(teacher):
    server = Fake(teacher)
    yield server
    server.close()


@pytest.fixture(scope="session")
def texts():
    """Answers that begin in a token, a part of a character, and in the middle of a word."""
    made = [
        ("Question: who climbs the steps? Answer:", " the lighthouse keeper"),
        ("Context: numbers 0 1 2 3. Answer:", " 4 5 6"),
        ("The old café in the village is", "été naïve 日本"),
        ("The mill stands by the ri", "ver and grinds wheat"),
        ("A keeper", " lights the lamp."),
        ("Question: numbers? Answer:", " 7 8"),
    ]
    return [ServedText(f"q{i}", prompt, answer) for i, (prompt, answer) in enumerate(made)]
