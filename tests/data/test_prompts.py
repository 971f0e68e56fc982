import dataclasses

import pytest

from uld_jax.data.prompts import INSTRUCTION, chat_template, draw_shots, first_line, render
from uld_jax.data.records import Example
from uld_jax.errors import UserError

OSLO = Example("0", "qa", "Oslo is in Norway.", "Where is Oslo?", ("Norway", "in Norway"), "")
ROME = Example("1", "qa", "", "Where is Rome?", ("Italy",), "")
COMPLETION = Example("2", "completion", "", "def f(", ("x):",), "")


def written(messages):
    return "".join(f"[{m['role']}]{m['content']}" for m in messages) + "[assistant]"


def test_plain():
    prompt = render(OSLO, shots=[ROME])
    assert prompt.text == (
        f"{INSTRUCTION}\n\n"
        "Question: Where is Rome?\nAnswer: Italy\n\n"
        "Context: Oslo is in Norway.\nQuestion: Where is Oslo?\nAnswer:"
    )
    assert prompt.separator == " "


def test_a_shot_looks_like_the_item_with_its_first_answer():
    item = render(OSLO)
    shown = render(ROME, shots=[OSLO]).text
    assert shown.startswith(item.text + item.separator + OSLO.answers[0] + "\n\n")


def test_chat():
    prompt = render(OSLO, shots=[ROME], chat=written)
    assert prompt.text == (
        f"[user]{INSTRUCTION}\n\nQuestion: Where is Rome?[assistant]Italy"
        "[user]Context: Oslo is in Norway.\nQuestion: Where is Oslo?[assistant]"
    )
    assert prompt.separator == ""


def test_completion_is_the_prompt_itself():
    assert (render(COMPLETION).text, render(COMPLETION).separator) == ("def f(", "")
    assert render(COMPLETION, chat=written).text == "[user]def f([assistant]"
    with pytest.raises(UserError, match="'2': 1 shots for a completion record, expected 0"):
        render(COMPLETION, shots=[ROME])


def test_chat_template_of_a_tokenizer(byte_tokenizer, piece_tokenizer):
    assert chat_template(piece_tokenizer) is None
    text = render(OSLO, shots=[ROME], chat=chat_template(byte_tokenizer)).text
    assert text.startswith(f"<|user|>\n{INSTRUCTION}")
    assert text.count("<|end|>") == 3
    assert text.endswith("Where is Oslo?<|end|>\n<|assistant|>\n")


POOL = [Example(str(n), "qa", f"context {n // 2}", "q", ("a",), "") for n in range(12)]


def test_shots_are_the_same_for_all_but_those_among_them():
    stranger = dataclasses.replace(OSLO, id="x")
    common = draw_shots(POOL, stranger, 4, seed=5)
    assert common == draw_shots(POOL, dataclasses.replace(stranger, id="y"), 4, seed=5)
    assert common != draw_shots(POOL, stranger, 4, seed=6)
    more = draw_shots(POOL, stranger, 12, seed=5)
    assert more[:4] == common
    assert sorted(more, key=POOL.index) == POOL
    for item in POOL:
        shots = draw_shots(POOL, item, 4, seed=5)
        assert all(s.id != item.id and s.context != item.context for s in shots)
        kept = tuple(s for s in common if s.context != item.context)
        assert shots[: len(kept)] == kept
        assert len(set(shots)) == 4


def test_without_contexts_the_question_tells_items_apart():
    pool = [dataclasses.replace(ROME, id=str(n), question=f"q{n}") for n in range(3)]
    asked = dataclasses.replace(ROME, id="x", question="q1")
    for seed in range(5):
        assert {s.question for s in draw_shots(pool, asked, 2, seed)} == {"q0", "q2"}


def test_an_item_with_the_same_id_is_no_shot():
    asked = dataclasses.replace(OSLO, id="3")
    for seed in range(5):
        assert "3" not in {s.id for s in draw_shots(POOL, asked, 11, seed)}


def test_too_small_a_pool():
    with pytest.raises(UserError, match="'0': 12 shots wanted, but only 10 of the 12"):
        draw_shots(POOL, POOL[0], 12, seed=0)
    assert draw_shots([], POOL[0], 0, seed=0) == ()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Norway", "Norway"),
        ("\n  \n\tNorway \nQuestion: next", "Norway"),
        ("Norway\r\nRome", "Norway"),
        (" \n ", ""),
        ("", ""),
    ],
)
def test_first_line(text, answer):
    assert first_line(text) == answer
