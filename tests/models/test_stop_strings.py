"""Answers that a text ends: spanning tokens, inside of one, between looks, in special tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from uld_jax import models
from uld_jax.models.continuous import LOOK_EVERY, Batcher
from uld_jax.models.pool import Plan, Request
from uld_jax.models.stop_strings import StopStrings
from uld_jax.testing import toy_tokenizer

ALPHABET = [chr(ord("a") + i) for i in range(26)]
CHAINS = (
    ALPHABET,
    ["1", "Ġlighthouse", "2", "Ã", "©", "3", "</s>", "4"],
)
NEVER = -1


@pytest.fixture(scope="module")
def parrot(parrot_of):
    return parrot_of(toy_tokenizer(), CHAINS)


def answer(parrot, first, *stops, new_tokens=24, eos=NEVER, **settings):
    """Tokens, what ended them, and the text."""
    found = models.continue_prompts(
        parrot.model,
        [[parrot.tokenizer.convert_tokens_to_ids(first)]],
        max_new_tokens=new_tokens,
        eos_id=eos,
        stop_strings=stops,
        tokenizer=parrot.tokenizer,
        **settings,
    )[0]
    return parrot.tokenizer.convert_ids_to_tokens(found.ids), found.stop, found.text


@pytest.mark.parametrize(
    ("first", "stops", "tokens", "text"),
    [
        ("a", ["d"], "bcd", "bc"),
        ("a", ["b"], "b", ""),
        ("a", ["cde"], "bcde", "b"),
        ("a", ["zz", "fg", "de", "ef"], "bcde", "bc"),
        # Both are complete with the same token: the answer ends before the earlier one.
        ("a", ["e", "de"], "bcde", "bc"),
        ("1", ["house"], ["Ġlighthouse"], " light"),
        ("1", ["se2"], ["Ġlighthouse", "2"], " lighthou"),
        ("1", ["é"], ["Ġlighthouse", "2", "Ã", "©"], " lighthouse2"),
        ("1", ["3</s>"], ["Ġlighthouse", "2", "Ã", "©", "3", "</s>"], " lighthouse2é"),
        ("1", ["4"], ["Ġlighthouse", "2", "Ã", "©", "3", "</s>", "4"], " lighthouse2é3"),
    ],
)
def test_an_answer_ends_before_the_first(parrot, first, stops, tokens, text):
    assert answer(parrot, first, *stops) == (list(tokens), "stop_string", text)


@pytest.mark.parametrize("last", range(LOOK_EVERY - 3, LOOK_EVERY + 4))
def test_it_may_lie_across_two_looks(parrot, last):
    letters = ALPHABET[1 : last + 1]
    stop = "".join(letters[-3:])
    assert answer(parrot, "a", stop) == (letters, "stop_string", "".join(letters[:-3]))


def test_what_ends_an_answer_first_is_named(parrot):
    eos = parrot.tokenizer.convert_tokens_to_ids("f")
    assert answer(parrot, "a", "g", eos=eos) == (list("bcde"), "eos", "bcde")
    assert answer(parrot, "a", "ef", eos=eos) == (list("bcde"), "eos", "bcde")
    assert answer(parrot, "a", "de", eos=eos) == (list("bcde"), "stop_string", "bc")
    assert answer(parrot, "a", "de", new_tokens=4) == (list("bcde"), "stop_string", "bc")
    assert answer(parrot, "a", "ef", new_tokens=4) == (list("bcde"), "length", "bcde")
    assert answer(parrot, "a", new_tokens=4) == (list("bcde"), "length", "bcde")


def test_special_tokens_are_no_text(parrot):
    # Four tokens behind "é", the third of them special.
    assert answer(parrot, "Ã", new_tokens=4)[0][:3] == ["©", "3", "</s>"]
    assert answer(parrot, "2", new_tokens=5)[2] == "é34"


def test_other_rows_go_on_and_places_are_filled(parrot):
    # From each letter on; those behind "p" never meet the stop string.
    prompts = [[parrot.tokenizer.convert_tokens_to_ids(letter)] for letter in ALPHABET[:20]]
    settings = {"eos_id": parrot.tokenizer.convert_tokens_to_ids("z"), "max_new_tokens": 24}
    found = models.continue_prompts(
        parrot.model,
        prompts,
        **settings,
        stop_strings="pq",
        tokenizer=parrot.tokenizer,
        batch_size=4,
        log_probs=True,
    )
    for i, each in enumerate(found):
        rest = "".join(ALPHABET[i + 1 :])
        stop = "pq" in rest
        assert each.stop == ("stop_string" if stop else "eos")
        assert each.text == (rest.partition("pq")[0] if stop else rest[:-1])
        assert len(each.log_probs) == len(each.ids) == len(each.text) + 2 * stop
    ids = models.generate(
        parrot.model, prompts, **settings, stop_strings=["pq"], tokenizer=parrot.tokenizer
    )
    assert ids == [each.ids for each in found]


def test_a_row_stops_early(parrot):
    a, one, z = parrot.tokenizer.convert_tokens_to_ids(["a", "1", "z"])
    request = Request(jnp.array([z]), jax.random.key(0), {})
    stops = StopStrings(["house"], parrot.tokenizer)
    batcher = Batcher(parrot.model, request, Plan(16, 200), rows=2, shards=1, stops=stops)
    found = {i: each for done in batcher.run([[one], [a]], [0, 1]) for i, each in done.items()}
    assert [len(found[i].ids) for i in (0, 1)] == [1, 24]
    # Its row rests while the other goes on.
    assert batcher._pool.count_B.tolist() == [LOOK_EVERY + 1, 24]


@pytest.mark.parametrize("where", [3, 10, 21])
def test_ids_equal_those_of_transformers(where, tmp_path):
    torch.manual_seed(1)
    tokenizer = toy_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ours = models.load(tmp_path)
    prompt = tokenizer("The old mill").input_ids
    settings = {"max_new_tokens": 24, "eos_id": NEVER, "tokenizer": tokenizer}
    free = models.continue_prompts(ours.model, [prompt], **settings)[0]
    stop = next(
        free.text[i : i + 3]
        for i in range(where, len(free.text))
        if free.text[i : i + 3].isascii() and free.text[i : i + 3].isprintable()
    )
    found = models.continue_prompts(ours.model, [prompt], **settings, stop_strings=[stop])[0]
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            stop_strings=[stop],
            tokenizer=tokenizer,
        )
    assert found.stop == "stop_string"
    assert found.ids == expected[0, len(prompt) :].tolist()
    assert found.text == free.text.partition(stop)[0]
    assert np.array_equal(found.ids, free.ids[: len(found.ids)])
