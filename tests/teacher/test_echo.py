"""The answer's positions among the tokens of servers that tell them in different ways."""

import dataclasses
import math

import pytest

from uld_jax.teacher.choices import Choice, Fault
from uld_jax.teacher.echo import ServedText, largest, signal, text_positions

TEXT = ServedText("0", "Who? A", " cat é")


def echo(tokens, starts, count=None):
    """An echo whose entries have the position as their likeliest token."""
    top = [None, *({str(i): -0.1, "x": -3.0} for i in range(1, len(tokens)))]
    return Choice(tokens, [None, *[-0.1] * (len(tokens) - 1)], top, starts, "", count)


ECHOES = {
    "llama.cpp": echo(["Who", "?", " A", " cat", " ", "", ""], [0, 3, 4, 6, 10, 11, 11], 7),
    # The token that begins every text is told by vLLM, in its own characters.
    "vLLM": echo(["<s>", "Who", "?", " A c", "at é", "!"], [0, 3, 6, 7, 11, 15], 5),
    "begins with a hidden token": echo(["Who? A", " cat é", "!"], [0, 6, 12], 3),
    "no count, nothing added": echo(["Who", "? A ca", "t é"], [0, 3, 9]),
}


@pytest.mark.parametrize(
    ("name", "answer"),
    list(zip(ECHOES, [[3, 4, 5, 6], [3, 4], [1], [1, 2]], strict=True)),
)
def test_a_token_that_ends_in_the_answer_is_one_of_the_answer(name, answer):
    found = text_positions(ECHOES[name], TEXT)
    assert found.answer == answer
    assert found.hidden == (name == "begins with a hidden token")


def test_each_part_of_the_answers_first_character_is_one_of_the_answer():
    text = ServedText("0", TEXT.prompt + " cat ", "é")
    assert text_positions(ECHOES["llama.cpp"], text).answer == [5, 6]


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (echo(["Who", "?", " A", " cat"], [0, 3, 4, 6], 4), "4 tokens do not make up the given"),
        (echo(["?", " A", " cat", " é"], [0, 1, 3, 7], 5), "expected 5, got 4"),
        (echo(["Who", " A", " cat é"], [0, 4, 6], 4), "expected 4, got 3"),
        (echo(["Who", "?", " A", " dog", " é"], [0, 3, 4, 6, 10], 5), "do not make up"),
        (echo(["Who? A cat é", "!"], [0, 12], 5), "expected 5, got 1"),
        (echo(["Who? A cat é", "!"], [], 1), "expected 1, got 0"),
        (echo([], [], 0), "do not make up"),
        (echo(["Who? A cat é"], [-4], 1), "do not make up"),
    ],
)
def test_an_echo_of_another_text_is_refused(made, reason):
    if made.tokens == []:
        made.top_logprobs.clear()
    with pytest.raises(Fault, match=reason):
        text_positions(made, TEXT)


def test_special_tokens_may_have_no_text_but_must_not_be_skipped_where_entries_shift():
    text = ServedText("0", "<u>Who<e>\n<a>", "cat", unspelled=("<u>", "<a>", "<e>"))
    made = echo(["Who", "", "\n", "", "cat", "!"], [0, 3, 3, 4, 4, 7], 6)
    assert text_positions(made, text).answer == [4]
    assert signal(made, text, top_k=2, shift=0, end=False).probs_sorted.shape == (1, 2)
    with pytest.raises(Fault, match="expected 6, got 5"):
        signal(made, text, top_k=2, shift=1, end=False)
    more = dataclasses.replace(made, prompt_tokens=10)
    with pytest.raises(Fault, match="expected 10, got 5"):
        text_positions(more, text)


def test_an_answer_without_a_predicted_token_is_told():
    with pytest.raises(Fault, match="no token that could be predicted"):
        signal(echo(["Who"], [0], 1), ServedText("0", "", "Who"), top_k=2, shift=0, end=False)
    with pytest.raises(Fault, match="no log-probabilities at position 1 of 1"):
        signal(echo(["Who"], [0], 1), ServedText("0", "", "Who"), top_k=2, shift=0, end=True)


def test_what_may_be_lost_is_left_to_the_tail():
    a, b, c = (math.log(p) for p in (0.6, 0.2, 0.1))

    def kept(logprobs, token):
        return [round(p, 6) for p in largest(logprobs, token, 2)]

    assert kept({"a": a, "b": b, "c": c}, "c") == [0.6, 0.2]
    assert kept({"a": a, "c": c}, "a") == [0.6, 0.1]
    # Two without a text, of which one is told; then the text's own token besides.
    assert kept({"": a, "c": c}, "c") == [0.6]
    # The text's own token may have taken the place of one of the largest.
    assert kept({"a": a, "": c}, "") == [0.6]
    assert kept({"a": c}, "a") == []
    assert kept({"a": 0.00005}, "a") == [1.00005]
    assert kept({"a": -math.inf, "b": 0.0}, "b") == [1.0, 0.0]
