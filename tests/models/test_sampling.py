"""Every way to choose a token against transformers' processors, and the frequencies of draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.generation import logits_process as theirs

from uld_jax import models
from uld_jax.errors import UserError
from uld_jax.models.sampling import choose, keep, least_kept, log_probs_of, penalise
from uld_jax.testing import toy_tokenizer

V = 97
RNG = np.random.default_rng(0)
SMOOTH = (RNG.normal(size=(24, V)) * RNG.uniform(0.1, 8, (24, 1))).astype(np.float32)
# Many equal logits, among them the largest.
TIED = np.round(SMOOTH / 2)
# Both zeros are as likely.
ZEROS = np.where(np.arange(V) % 2, -0.0, 0.0)[None].repeat(3, 0).astype(np.float32)
WIDE = np.exp(np.abs(SMOOTH) * 3) * np.sign(SMOOTH)
KINDS = {"smooth": SMOOTH, "tied": TIED, "zeros": ZEROS, "wide": WIDE}
keep_jit = jax.jit(keep)


@pytest.fixture(params=KINDS, ids=list(KINDS))
def scores(request):
    return KINDS[request.param]


def kept(scores, **settings):
    found = np.array(keep_jit(scores, **settings))
    np.testing.assert_array_equal(found[np.isfinite(found)], scores[np.isfinite(found)])
    return np.isfinite(found)


def kept_by(scores, *processors):
    found = torch.tensor(scores)
    for processor in processors:
        found = processor(None, found)
    return np.isfinite(found.numpy())


@pytest.mark.parametrize("top_k", [1, 2, 10, V - 1, V, V + 5])
def test_top_k(scores, top_k):
    expected = kept_by(scores, theirs.TopKLogitsWarper(top_k))
    np.testing.assert_array_equal(kept(scores, top_k=top_k), expected)


def with_ties(scores, kept):
    """Theirs keeps those of equally likely tokens that its unstable sort happens to put last."""
    least = np.where(kept, scores, np.inf).min(axis=-1, keepdims=True)
    return scores >= least


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p(scores, top_p):
    expected = kept_by(scores, theirs.TopPLogitsWarper(top_p))
    if scores is SMOOTH or scores is WIDE:
        np.testing.assert_array_equal(with_ties(scores, expected), expected)
    np.testing.assert_array_equal(kept(scores, top_p=top_p), with_ties(scores, expected))


@pytest.mark.parametrize("min_p", [1e-6, 0.05, 0.5, 0.97, 1.0])
def test_min_p(scores, min_p):
    expected = kept_by(scores, theirs.MinPLogitsWarper(min_p))
    np.testing.assert_array_equal(kept(scores, min_p=min_p), expected)


def test_all_three_in_their_order():
    settings = {"top_k": 20, "top_p": 0.8, "min_p": 0.1}
    order = theirs.TopKLogitsWarper(20), theirs.TopPLogitsWarper(0.8), theirs.MinPLogitsWarper(0.1)
    expected = kept_by(SMOOTH, *order)
    assert not np.array_equal(expected, kept_by(SMOOTH, order[1], order[0], order[2]))
    np.testing.assert_array_equal(kept(SMOOTH, **settings), expected)
    # With ties at the k-th token there are more than k, and the mass is that of all of them.
    tied = kept(TIED, **settings)
    np.testing.assert_array_equal(tied, with_ties(TIED, kept_by(TIED, *order)))


def test_the_threshold_equals_that_of_a_sort():
    probs = np.array(jax.nn.softmax(TIED * 3))
    for top_p in (0.2, 0.6, 0.95):
        expected = []
        for row in probs:
            values = np.unique(row)
            above = np.array([row[row > value].sum(dtype=np.float64) for value in values])
            expected.append(values[above < top_p].min())
        np.testing.assert_array_equal(least_kept(probs, probs, top_p), expected)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_repetition_penalty(penalty):
    ids = RNG.integers(0, V, (24, 30))
    seen = np.zeros((24, V), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    scores = np.where(RNG.random((24, V)) < 0.1, 0, SMOOTH).astype(np.float32)
    expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor(ids), torch.tensor(scores)
    )
    np.testing.assert_allclose(penalise(scores, seen, penalty), expected.numpy(), rtol=1e-6)


def frequencies(logits, **settings):
    draws = 20_000
    keys = jax.random.split(jax.random.key(1), draws)
    rows = jnp.broadcast_to(logits, (draws, len(logits)))
    return np.bincount(choose(rows, keys, **settings), minlength=len(logits)), draws


@pytest.mark.parametrize(
    ("settings", "warpers"),
    [
        ({}, []),
        ({"top_k": 3}, [theirs.TopKLogitsWarper(3)]),
        ({"top_p": 0.7}, [theirs.TopPLogitsWarper(0.7)]),
        ({"min_p": 0.3}, [theirs.MinPLogitsWarper(0.3)]),
    ],
)
@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_draws_follow_the_distribution(settings, warpers, temperature):
    logits = np.array([0.1, 2.0, -1.0, 1.2, 0.7, 1.9], np.float32)
    scores = torch.tensor(logits)[None] / temperature
    for warper in warpers:
        scores = warper(None, scores)
    expected = torch.softmax(scores, -1)[0].numpy()
    counts, draws = frequencies(logits, temperature=temperature, **settings)
    assert not counts[expected == 0].any()
    possible = expected > 0
    mean = draws * expected[possible]
    chi_square = ((counts[possible] - mean) ** 2 / mean).sum()
    # The 0.9999 quantile of chi-square with five degrees of freedom.
    assert chi_square < 25.7


def test_the_most_likely_token_needs_no_key():
    tokens = choose(jnp.array(SMOOTH), top_k=5, top_p=0.1)
    np.testing.assert_array_equal(tokens, SMOOTH.argmax(-1))
    # Nothing is computed that is not asked for.
    primitives = str(jax.make_jaxpr(choose)(SMOOTH))
    assert "argmax" in primitives
    assert not any(word in primitives for word in ("sort", "top_k", "exp", "random", "div"))


def test_nothing_sorts_the_vocabulary():
    def draw(logits, keys):
        return choose(logits, keys, temperature=0.7, top_k=9, top_p=0.9, min_p=0.1)

    keys = jax.random.split(jax.random.key(0), len(SMOOTH))
    primitives = str(jax.make_jaxpr(draw)(SMOOTH, keys))
    assert "bitcast" in primitives
    assert "sort" not in primitives
    assert "top_k" not in primitives


def test_log_probs():
    tokens = RNG.integers(0, V, 24)
    expected = torch.log_softmax(torch.tensor(SMOOTH), -1)[torch.arange(24), torch.tensor(tokens)]
    np.testing.assert_allclose(log_probs_of(SMOOTH, tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -0.1}, "temperature must be >= 0 and finite: got -0.1"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"top_k": -1}, "top_k must be a whole number >= 0: got -1"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"top_k": float("inf")}, "top_k must be a whole number"),
        ({"top_p": 0.0}, "top_p must be above 0 and <= 1: got 0.0"),
        ({"top_p": 1.1}, "top_p must be"),
        ({"min_p": -0.1}, "min_p must be >= 0 and <= 1: got -0.1"),
        ({"min_p": 1.5}, "min_p must be"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0 and finite: got 0.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be"),
    ],
)
def test_settings_out_of_range_are_named(settings, said):
    with pytest.raises(UserError, match=said) as caught:
        models.Sampling(**settings)
    assert "\n" not in str(caught.value)


def test_only_what_changes_something_is_in_use():
    assert models.Sampling().in_use() == {}
    assert models.Sampling(top_k=3, top_p=0.5, min_p=0.1).in_use() == {}
    assert models.Sampling(repetition_penalty=1.2).in_use() == {"repetition_penalty": 1.2}
    every = {"temperature": 0.5, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.2}
    assert models.Sampling(**every, top_k=3).in_use() == every | {"top_k": 3}


IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = transformers.LlamaConfig(
    **IDS,
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
    attn_implementation="eager",
)
T5 = transformers.T5Config(
    pad_token_id=0,
    eos_token_id=2,
    vocab_size=300,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    decoder_start_token_id=5,
    initializer_factor=3.0,
    attn_implementation="eager",
)


@pytest.mark.parametrize("config", [LLAMA, T5], ids=["llama", "t5"])
def test_greedy_with_repetition_penalty_equals_transformers(config, tmp_path):
    torch.manual_seed(0)
    kind = "Seq2SeqLM" if config is T5 else "CausalLM"
    theirs = getattr(transformers, f"AutoModelFor{kind}").from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    ours = models.load(tmp_path)
    # Of its own: with other prompts the answers may have no repetition to be penalised.
    random = np.random.default_rng(1)
    prompts = [random.integers(3, 64, n).tolist() for n in (9, 4, 12)]
    free = models.generate(ours.model, prompts, max_new_tokens=12, eos_id=-1)
    answers = models.generate(
        ours.model, prompts, max_new_tokens=12, eos_id=-1, repetition_penalty=1.7
    )
    assert all(a != b for a, b in zip(free, answers, strict=True))
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            longer = theirs.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=12,
                do_sample=False,
                repetition_penalty=1.7,
                eos_token_id=None,
            )
        assert answer == longer[0, -12:].tolist()
