"""The client against a real llama-cpp-python server of the real SmolLM2: see CONTRIBUTING.md."""

import contextlib
import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from flax import nnx

from uld_jax import models
from uld_jax.data import encode
from uld_jax.data.prompts import Prompt
from uld_jax.losses import truncated_uld, uld
from uld_jax.teacher import (
    CompletionsClient,
    FetchOptions,
    ServedText,
    Server,
    check_server,
    served_signals,
)

pytestmark = [pytest.mark.served, pytest.mark.real_models]

PYTHON = os.environ.get("ULD_JAX_LLAMA_PYTHON", sys.executable)
RECORDING = Path(__file__).with_name("recorded_exchange.json")
K = 16
# By the server's weights: Σ|Δp| of the K largest, and |Δ| of likely tokens' log-probabilities. We
# dequantise 4 bits to float32, llama.cpp rounds what it multiplies them with to 8 bits. Measured:
# 0.094 and 0.29 with 4 bits, 0.0019 and 0.0047 with the same weights written out.
TOLERANCES = {"4 bits": (0.15, 0.5), "float32": (0.005, 0.02)}
QUESTIONS = [
    ("Oslo is the capital of Norway. Question: Where is Oslo? Answer:", " Norway"),
    ("The café Zoë opened in Malmö. Question: What opened? Answer:", " the café Zoë, in Malmö"),
    ("Water boils at 100 degrees. Question: When does water boil? Answer:", " at 100 degrees."),
    ("A keeper climbs ninety steps. Question: How many steps? Answer:", " ninety steps"),
]
TEXTS = [ServedText(f"q{i}", prompt, answer) for i, (prompt, answer) in enumerate(QUESTIONS)]


def await_server(process, url, log):
    while process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"{url}/models", timeout=5).close()
            return
        time.sleep(0.1)
    pytest.fail(log.read_text()[-2000:])


def write_in_float32(source, target):
    """The same model with its 4-bit weights written out, which leaves a server nothing to round."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = 0 if field.name == "general.file_type" else field.contents()
        kind, of = field.types[0], field.types[-1]
        is_list = kind == gguf.GGUFValueType.ARRAY
        writer.add_key_value(field.name, value, kind, sub_type=of if is_list else None)
    for tensor in reader.tensors:
        weights = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, weights.reshape([int(n) for n in tensor.shape[::-1]]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module", params=["4 bits", "float32"])
def weights(request):
    return request.param


@pytest.fixture(scope="module")
def url(smollm_gguf, tmp_path_factory, weights):
    found = subprocess.run([PYTHON, "-c", "import llama_cpp.server"], capture_output=True)
    if found.returncode:
        pytest.skip(f"{PYTHON} has no llama-cpp-python[server]: see CONTRIBUTING.md")
    directory = tmp_path_factory.mktemp("llama")
    model = smollm_gguf
    if weights == "float32":
        model = directory / "float32.gguf"
        write_in_float32(smollm_gguf, model)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [PYTHON, "-m", "llama_cpp.server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--n_ctx", "1024", "--logits_all", "true"]
    log = directory / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=directory, stdout=file, stderr=file)
    try:
        await_server(process, f"http://127.0.0.1:{port}/v1", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)
        (directory / "float32.gguf").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def own(smollm_gguf):
    """Our SmolLM2's logits [n, V] that predict the answer of each text."""
    loaded = models.load(smollm_gguf)
    graph, state = nnx.split(loaded.model)
    forward = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids))

    def logits(text):
        prompt = Prompt(text.prompt, "")
        both = encode(loaded.tokenizer, prompt, text.answer, append_eos=False, chat=False)
        padded = np.zeros((1, 48), np.int32)
        padded[0, : len(both.tokens)] = both.tokens
        return np.asarray(forward(state, padded))[0, both.answer - 1]

    return {text.id: logits(text) for text in TEXTS}


def log_softmax(logits):
    return np.asarray(jax.nn.log_softmax(logits))


def test_signals_are_those_of_our_own_model(url, weights, own, tmp_path):
    tolerance, log_tolerance = TOLERANCES[weights]
    with CompletionsClient(Server(url, "smollm2", top_k=K, retries=1, concurrency=2)) as client:
        check = check_server(client, TEXTS[:2])
        assert check.shift == 1, "llama-cpp-python has changed: see ServerCheck"
        # Both ways to check agree.
        expected = [-np.sort(-log_softmax(own[text.id]))[:, :4] for text in TEXTS]
        given = check_server(client, TEXTS, expected=expected, tolerance=log_tolerance)
        assert given.shift == check.shift
        failed = {}
        signals = list(
            served_signals(client, TEXTS, tmp_path, FetchOptions(check.shift), failed=failed)
        )
    assert not failed
    differences = []
    for text, found in zip(TEXTS, signals, strict=True):
        log_probs = log_softmax(own[text.id])
        assert found.probs_sorted.shape == (len(log_probs), K)
        assert (found.probs_sorted > 0).all()
        probs = -np.sort(-np.exp(log_probs))[:, :K]
        differences.append(np.abs(found.probs_sorted - probs).sum(-1))
        student = np.random.default_rng(0).normal(size=log_probs.shape).astype(np.float32)
        _, lower, upper = truncated_uld(student, found.probs_sorted, found.tail_mass)
        exact, slack = np.asarray(uld(student, own[text.id])), differences[-1] + 1e-5
        assert (lower <= exact + slack).all()
        assert (exact <= upper + slack).all()
    differences = np.concatenate(differences)
    print(f"{given}; Σ|Δp| max {differences.max():.4f} mean {differences.mean():.4f}")
    assert differences.max() < tolerance


def test_chat_prompts_are_not_shifted(url):
    special = ("<|im_start|>", "<|im_end|>")
    prompt = "<|im_start|>user\nWhere is Oslo?<|im_end|>\n<|im_start|>assistant\n"
    text = ServedText("chat", prompt, "In Norway.", unspelled=special)
    with CompletionsClient(Server(url, "smollm2", top_k=K, retries=1)) as client:
        # The server drops the first token, which is its own begin-of-text.
        assert check_server(client, [text]).shift == 0


@pytest.mark.skipif("ULD_JAX_RECORD" not in os.environ, reason="records only with ULD_JAX_RECORD")
def test_record_an_exchange(url, weights, own, tmp_path):
    if weights != "4 bits":
        pytest.skip("the recording is of the file as it is")
    texts, exchanges = TEXTS[:2], []
    server = Server(url, "smollm2", top_k=4, retries=0, concurrency=1)
    with CompletionsClient(server) as client:
        post = client._http.post

        def recording(address, content):
            response = post(address, content=content)
            exchanges.append({"request": json.loads(content), "response": response.json()})
            return response

        client._http.post = recording
        check = check_server(client, texts[:1])
        signals = served_signals(client, texts, tmp_path, FetchOptions(check.shift, end=True))
        assert len(list(signals)) == 2
    version = subprocess.run(
        [PYTHON, "-c", "import llama_cpp; print(llama_cpp.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    recording = {
        "note": (
            f"llama-cpp-python {version} serving SmolLM2-135M-Instruct.Q4_1.gguf, asked by "
            f"uld_jax {importlib.metadata.version('uld-jax')}; own: the largest log-probabilities "
            "of uld_jax's model of the same file at the answers' positions"
        ),
        "command": "ULD_JAX_RECORD=1 python -m pytest -m served tests/teacher, see CONTRIBUTING.md",
        "texts": [{"id": t.id, "prompt": t.prompt, "answer": t.answer} for t in texts],
        "own": {t.id: (-np.sort(-log_softmax(own[t.id])))[:, :4].round(4).tolist() for t in texts},
        "exchanges": exchanges,
    }
    RECORDING.write_text(json.dumps(recording, ensure_ascii=False, separators=(",", ":")) + "\n")
