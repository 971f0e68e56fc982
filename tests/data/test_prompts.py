import dataclasses
import json

import pytest

from uld_jax.data import fingerprint_prompts, prompts
from uld_jax.data.prompts import (
    INSTRUCTION,
    TASKS,
    chat_template,
    draw_shots,
    first_line,
    render,
    shot_pool,
)
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


TALK = Example("3", "qa", "A: Is it open?\nB: Yes.", "", ("B says that it is open.",), "")
WORDS = {
    "qa": ("Context", "Question", "Answer"),
    "qa_generative": ("Text", "Question", "Answer"),
    "qa_medical": ("Abstract", "Question", "Answer"),
    "summary_dialogue": ("Dialogue", "Question", "Summary"),
}


def test_the_tasks():
    assert TASKS.keys() == WORDS.keys()
    assert len({words.system for words in TASKS.values()}) == len(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_each_task_in_plain_text(task):
    context, question, answer = WORDS[task]
    titled = dataclasses.replace(OSLO, title="Cities_of_Norway")
    assert render(titled, shots=[TALK], task=task, titles=True).text == (
        f"{TASKS[task].system}\n\n"
        f"{context}: A: Is it open?\nB: Yes.\n{answer}: B says that it is open.\n\n"
        f"Title: Cities of Norway\n{context}: Oslo is in Norway.\n"
        f"{question}: Where is Oslo?\n{answer}:"
    )
    assert render(titled, task=task).text == render(OSLO, task=task).text
    assert render(TALK, task=task).text.endswith(f"B: Yes.\n{answer}:")


@pytest.mark.parametrize("task", TASKS)
def test_each_task_in_a_chat(task):
    context = WORDS[task][0]
    assert render(TALK, shots=[TALK], chat=written, task=task).text == (
        f"[user]{TASKS[task].system}\n\n{context}: A: Is it open?\nB: Yes."
        f"[assistant]B says that it is open.[user]{context}: A: Is it open?\nB: Yes.[assistant]"
    )


def test_a_chat_is_its_own_messages():
    said = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hi."), ("user", "And?")]
    messages = [{"role": role, "content": content} for role, content in said]
    example = Example("4", "chat", "", json.dumps(messages), ("So.",), "")
    assert render(example, chat=written).text == (
        "[system]Be brief.[user]Hi[assistant]Hi.[user]And?[assistant]"
    )
    plain = render(example)
    assert (
        plain.text == "System: Be brief.\n\nUser: Hi\n\nAssistant: Hi.\n\nUser: And?\n\nAssistant:"
    )
    assert plain.separator == " "
    with pytest.raises(UserError, match="'4': 1 shots for a chat record, expected 0"):
        render(example, shots=[ROME])


def test_fingerprints_follow_the_wording(byte_tokenizer, monkeypatch):
    def found():
        return {
            (task, titles, chat): fingerprint_prompts(
                byte_tokenizer, chat=chat, task=task, titles=titles
            )
            for task in TASKS
            for titles in (False, True)
            for chat in (False, True)
        }

    before = found()
    assert len(set(before.values())) == 4 * 2 * 2
    for field in ("system", "context", "answer"):
        words = dataclasses.replace(TASKS["qa_medical"], **{field: "Changed"})
        monkeypatch.setitem(prompts.TASKS, "qa_medical", words)
        after = found()
        # In a chat the answer has no name.
        same = {k for k in before if k[0] != "qa_medical" or (field == "answer" and k[2])}
        assert {k for k in before if before[k] == after[k]} == same
        monkeypatch.undo()


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


def test_nothing_that_is_evaluated_on_is_in_the_pool():
    held_out = [POOL[4], dataclasses.replace(ROME, id="y", question="q7")]
    bare = [dataclasses.replace(ROME, id=f"b{n}", question=f"q{n}") for n in range(6, 9)]
    pool = shot_pool([*POOL, *bare], held_out)
    assert pool == [*POOL[:4], *POOL[6:], bare[0], bare[2]]
    assert shot_pool(POOL, []) == POOL


def test_an_item_without_an_answer_is_no_shot():
    pool = [dataclasses.replace(item, answers=(" ",)) for item in POOL[:6]] + POOL[6:]
    shots = draw_shots(pool, OSLO, 6, seed=0)
    assert sorted(shots, key=POOL.index) == POOL[6:]


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
