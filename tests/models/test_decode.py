"""Generation against a loop of full forwards; stopping, batching, sampling, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from uld_jax import models
from uld_jax.errors import UserError
from uld_jax.models.continuous import length_bucket
from uld_jax.models.decode import line_stop_ids
from uld_jax.testing import tiny_config, tiny_gemma, toy_tokenizer

NEVER = -1
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, 64, n).tolist() for n in (9, 1, 16, 5, 12, 3, 14)]


@pytest.fixture(scope="module")
def llama(lively):
    return lively(tiny_config())


@pytest.fixture(scope="module", params=[tiny_config, tiny_gemma])
def model(request, lively):
    return lively(request.param())


def answers(model, prompts=PROMPTS, **settings):
    return models.generate(
        model, prompts, **({"max_new_tokens": 8, "eos_id": NEVER, "batch_size": 4} | settings)
    )


def without_cache(model, prompts, new_tokens):
    """Greedy continuations, one full forward of all prompts a token."""
    graph, state = nnx.split(model)
    forward = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
    rows = [list(prompt) for prompt in prompts]
    for _ in range(new_tokens):
        tokens = np.zeros((len(rows), 24), np.int32)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = ids
        logits = forward(state, tokens)
        for row, ids in enumerate(rows):
            ids.append(int(logits[row, len(ids) - 1].argmax()))
    return [ids[-new_tokens:] for ids in rows]


def test_greedy_equals_full_forwards(model):
    expected = without_cache(model, PROMPTS, 8)
    assert len({tuple(ids) for ids in expected}) == len(PROMPTS)
    assert answers(model) == expected


def test_ragged_prompts_equal_each_prompt_alone(model):
    together = answers(model, batch_size=len(PROMPTS))
    assert together == [answers(model, [prompt])[0] for prompt in PROMPTS]


def test_the_window_matters(lively):
    # Otherwise the comparisons above would say nothing about it.
    narrow, wide = (answers(lively(tiny_gemma(window=window))) for window in (4, 64))
    assert all(a != b for a, b in zip(narrow, wide, strict=True))
    # The prompt of one token: its first four answers see four tokens at most.
    assert narrow[1][:4] == wide[1][:4]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 16])
def test_the_batch_size_changes_nothing(llama, batch_size):
    done = []
    found = answers(llama, batch_size=batch_size, progress=done.append)
    assert found == answers(llama)
    assert sum(done) == len(PROMPTS)
    assert len(done) == -(-len(PROMPTS) // batch_size)


def test_answers_come_in_the_order_given(llama):
    assert answers(llama, PROMPTS[::-1]) == answers(llama)[::-1]
    assert answers(llama, []) == []
    assert answers(llama, [np.array(prompt) for prompt in PROMPTS]) == answers(llama)


def test_a_stop_token_ends_its_row_only(llama):
    free = answers(llama)
    # A token that some rows write, not first, and others do not.
    stop = next(
        i for i in free[0][1:] if free[0][0] != i and 0 < sum(i in row for row in free[1:]) < 6
    )
    cut = [row[: row.index(stop)] if stop in row else row for row in free]
    assert len({len(row) for row in cut}) > 1
    assert answers(llama, eos_id=stop) == cut
    assert answers(llama, eos_id=np.int64(stop)) == cut


def test_any_of_several_stop_tokens(llama):
    free = answers(llama)
    stops = [free[0][3], free[2][2]]
    cut = [row[: min((row.index(i) for i in stops if i in row), default=len(row))] for row in free]
    assert cut[0] != free[0]
    assert cut[2] != free[2]
    assert answers(llama, eos_id=stops) == cut


def test_length_buckets():
    buckets = [length_bucket(n) for n in range(1, 5000)]
    assert all(bucket >= n for n, bucket in enumerate(buckets, 1))
    assert all(bucket <= max(16, 1.5 * n) for n, bucket in enumerate(buckets, 1))
    assert sorted(set(buckets))[:6] == [16, 24, 32, 48, 64, 96]
    assert len(set(buckets)) == 18


def test_sampling_follows_its_key(llama):
    settings = {"temperature": 1.0, "top_p": 0.9}
    first = answers(llama, key=jax.random.key(1), **settings)
    assert answers(llama, key=jax.random.key(1), **settings) == first
    assert answers(llama, key=jax.random.key(2), **settings) != first
    assert answers(llama, **settings) == answers(llama, key=jax.random.key(0), **settings)
    # Neither batches nor rows share their noise.
    same = answers(llama, [[7, 8]] * 8, key=jax.random.key(1), temperature=5.0)
    assert len({tuple(row) for row in same}) == 8


def test_a_tiny_nucleus_is_greedy(llama):
    greedy = answers(llama)
    assert answers(llama, temperature=1.0, top_p=1e-6, key=jax.random.key(3)) == greedy
    assert answers(llama, temperature=1e-4, key=jax.random.key(3)) == greedy


def first_token_frequencies(model, prompt, **settings):
    rows = answers(model, [prompt] * 8192, max_new_tokens=1, batch_size=8192, **settings)
    return np.bincount([row[0] for row in rows], minlength=64) / 8192


def test_sampled_frequencies_follow_the_softmax(llama):
    prompt = PROMPTS[0]
    logits = np.array(llama(jnp.array([prompt])), np.float64)[0, -1]

    def softmax(temperature):
        weights = np.exp((logits - logits.max()) / temperature)
        return weights / weights.sum()

    def distance(p, q):
        return np.abs(p - q).sum() / 2

    hot = first_token_frequencies(llama, prompt, temperature=2.0)
    assert distance(hot, softmax(2.0)) < 0.04
    assert distance(hot, softmax(1.5)) > 0.06

    p = softmax(2.0)
    order = np.argsort(-p)
    size = np.searchsorted(np.cumsum(p[order]), 0.5) + 1
    nucleus = np.zeros(64)
    nucleus[order[:size]] = p[order[:size]]
    assert 3 < size < 40
    cut = first_token_frequencies(llama, prompt, temperature=2.0, top_p=0.5)
    assert set(np.flatnonzero(cut)) == set(order[:size])
    assert distance(cut, nucleus / nucleus.sum()) < 0.04


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompts": [[3], [], [4], []]}, r"prompts \[1, 3\] have no tokens"),
        ({"prompts": [[3], [64]]}, r"prompts \[1\] .* outside 0 … 63; encode them with"),
        ({"prompts": [[3], np.array([5, -1])]}, r"prompts \[1\] .* outside 0 … 63"),
        ({"prompts": [[3], [4] * 2041]}, r"prompts \[1\] .* 2041 .* max_new_tokens 8 .* 2048"),
        ({"temperature": -0.1}, "temperature must be >= 0 and finite: got -0.1"),
        ({"top_k": -1}, "top_k must be"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"min_p": 2.0}, "min_p must be"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be"),
        ({"stop_strings": ["a", ""]}, r"stop_strings must not be empty texts: got \['a', ''\]"),
        ({"stop_strings": ["a"]}, "stop_strings need the tokenizer: pass tokenizer="),
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1: got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1: got 0"),
    ],
)
def test_bad_requests_are_refused_in_one_line(llama, settings, said):
    with pytest.raises(UserError, match=said) as caught:
        answers(llama, **settings)
    assert "\n" not in str(caught.value)


def test_the_last_position_can_be_used(lively):
    model = lively(tiny_config(max_positions=17))
    assert len(answers(model, [[5] * 9])[0]) == 8
    with pytest.raises(UserError, match="17 positions"):
        answers(model, [[5] * 10])


@pytest.fixture(scope="module")
def parrot(parrot_of):
    """A model of three chains of tokens, and the first of each."""
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens(["end.\n"])
    chains = (["a", "b", "c", "Ċ", "d"], ["1", "2", "</s>", "3"], ["5", "6", "end.\n", "7", "8"])
    first = tokenizer.convert_tokens_to_ids([chain[0] for chain in chains])
    return parrot_of(tokenizer, chains), first


def test_completions_end_with_the_line(parrot):
    m, (letter, one, five) = parrot
    prompts = [[letter], [one], [five]]
    ids = models.generate(m.model, prompts, max_new_tokens=4, eos_id=NEVER)
    assert [m.tokenizer.decode(row) for row in ids[:1]] == [
        "bc\nd" + m.tokenizer.decode(ids[0][4:])
    ]
    assert models.complete(m, prompts, max_new_tokens=4) == ["bc", "2", "6end."]
    assert models.complete(m, prompts[:1], max_new_tokens=1) == ["b"]
    # Stop strings come on top.
    stops = {"stop_strings": ["c", "end"]}
    assert models.complete(m, prompts, max_new_tokens=4, **stops) == ["b", "2", "6"]
    hot = models.Sampling(temperature=100.0)
    sampled = models.complete(m, prompts * 4, max_new_tokens=4, sampling=hot)
    assert len(set(sampled)) > 3


def test_line_stop_ids(parrot):
    m, _ = parrot
    vocabulary = m.tokenizer.get_vocab()
    assert line_stop_ids(m) == sorted([vocabulary["</s>"], vocabulary["Ċ"]])
    several = dataclasses.replace(m, config=dataclasses.replace(m.config, eos_id=(2, 77)))
    assert line_stop_ids(several) == sorted([2, 77, vocabulary["Ċ"]])


@pytest.mark.parametrize("quantized", [False, True])
def test_a_reader_reads_as_read_does(model, quantized):
    subject = nnx.merge(*nnx.split(model))
    if quantized:
        models.quantize(subject, "int8")
    _, cache, at_B = subject.start(jnp.array([[5, 6, 7]]), jnp.array([3]), 2)
    token = jnp.array([[9]])
    found, expected = (
        read(token, at_B[:, None], cache) for read in (subject.reader(), subject.read)
    )
    for own, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(own, wanted, rtol=1e-5, atol=1e-5)


def test_a_reader_cuts_the_layers_before_the_loop(llama):
    _, cache, at_B = llama.start(jnp.array([[5, 6, 7]]), jnp.array([3]), 2)

    def two_tokens(cache):
        read = llama.reader()
        return jax.lax.fori_loop(
            0, 2, lambda i, c: read(jnp.array([[9]]), at_B[:, None], c)[1], cache
        )

    (loop,) = [e for e in jax.make_jaxpr(two_tokens)(cache).eqns if e.primitive.name == "scan"]
    inside = {e.primitive.name for e in loop.params["jaxpr"].eqns}
    assert "scan" not in inside
