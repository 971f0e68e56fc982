"""The two real models against transformers in float32: log-probabilities and greedy answers."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from uld_jax import models
from uld_jax.models.families import by_model_type

pytestmark = pytest.mark.real_models

PROMPTS = 5
TOP = 16
NEW_TOKENS = 20
# Float32 sums in another order, through 18 and 30 layers.
TOLERANCE = 5e-4


@pytest.fixture(scope="module")
def texts(shared):
    """The five shortest SQuAD questions with short contexts, as a model would be asked them."""
    with gzip.open(shared / "data" / "squad" / "dev-v1.1.json.gz", "rt", encoding="utf-8") as file:
        articles = json.load(file)["data"]
    paragraphs = [min(a["paragraphs"], key=lambda p: len(p["context"])) for a in articles]
    paragraphs.sort(key=lambda p: len(p["context"]))
    return [
        f"Context: {p['context']}\nQuestion: {p['qas'][0]['question']}\nAnswer:"
        for p in paragraphs[:PROMPTS]
    ]


def from_transformers(path):
    """What transformers makes of a GGUF file.

    `from_pretrained(gguf_file=...)` calls the same two steps, but asks for accelerate first.
    """
    config = load_gguf_checkpoint(path)["config"]
    config = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    assert model.lm_head.weight is model.get_input_embeddings().weight
    return model.eval()


def largest_difference(ours, theirs, ids):
    """Of log-probabilities, over transformers' top tokens at every position of every prompt."""
    graph, state = nnx.split(ours.model)
    log_probs = jax.jit(lambda state, tokens: jax.nn.log_softmax(nnx.merge(graph, state)(tokens)))
    # Padded to one length, for one compilation; what follows a token does not change it.
    tokens = np.zeros((len(ids), max(map(len, ids))), np.int32)
    worst = 0.0
    for row, padded in zip(ids, tokens, strict=True):
        padded[: len(row)] = row
        with torch.no_grad():
            top = theirs(torch.tensor([row])).logits[0].log_softmax(-1).topk(TOP)
        found = np.asarray(log_probs(state, jnp.array(padded[None])))[0, : len(row)]
        found = np.take_along_axis(found, top.indices.numpy(), axis=1)
        worst = max(worst, float(np.abs(found - top.values.numpy()).max()))
    return worst


def greedy(theirs, ids):
    """Transformers' answers, end-of-sequence tokens taken as any other."""
    theirs.generation_config.eos_token_id = None
    out = []
    for row in ids:
        tokens = torch.tensor([row])
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        longer = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
        out.append(longer[0, len(row) :].tolist())
    return out


@pytest.mark.parametrize("name", ["gemma_gguf", "smollm_gguf"])
def test_equals_transformers(name, request, texts):
    path = request.getfixturevalue(name)
    ours, theirs = models.load(path), from_transformers(path)
    family = by_model_type(ours.config.family, name)
    assert ours.config == family.config_from_hf(theirs.config.to_dict())
    ids = [ours.tokenizer(text).input_ids for text in texts]
    worst = largest_difference(ours, theirs, ids)
    print(f"{name}: largest difference of log-probabilities {worst:.1e}")
    assert worst <= TOLERANCE
    settings = {"max_new_tokens": NEW_TOKENS, "eos_id": -1, "batch_size": len(ids)}
    answers = models.generate(ours.model, ids, **settings)
    assert [len(answer) for answer in answers] == [NEW_TOKENS] * len(ids)
    assert answers == greedy(theirs, ids)
