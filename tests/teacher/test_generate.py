"""Answers of a tiny teacher: what decides a sample, where it ends, what does not count."""

import dataclasses

import pytest
from flax import nnx

from uld_jax.data import Answer, Example, Side, draw_shots, encode_prompts, first_line
from uld_jax.models import Sampling, continue_prompts, end_ids, line_stop_ids
from uld_jax.teacher import Answerer, Recipe, generate_answers
from uld_jax.testing import tiny_config, tiny_model

EXAMPLES = [
    Example(f"q{n}", "qa", f"Mill {n} grinds.", f"What does mill {n} do?", (f"it {n}",), "")
    for n in range(12)
]
HOT = Recipe(max_new_tokens=12, batch_size=6, sampling=Sampling(1.0), samples=2, stop="none")


@pytest.fixture(scope="module")
def teacher():
    """A model whose answers depend on their prompts, with so many ends that some are short."""
    m = tiny_model(tiny_config(tied=False), seed=2)
    for _, param in nnx.to_flat_state(nnx.state(m.model)):
        if "norm" not in param.get_metadata("axes"):
            param.set_value(param[...] * 12)
    return dataclasses.replace(
        m, config=dataclasses.replace(m.config, eos_id=(2, *range(280, 300)))
    )


@pytest.fixture(scope="module")
def answers(teacher):
    """Two hot answers to each question, with their ends."""
    return ask(teacher, EXAMPLES, HOT)


def side_of(teacher, **changes):
    return Side(teacher.tokenizer, **({"max_length": 200, "append_eos": False} | changes))


def ask(teacher, examples, recipe, side=None, pool=EXAMPLES):
    side = side or side_of(teacher)
    return Answerer(teacher, side, recipe, pool=pool, seed=0).answer(examples)


def test_a_sample_depends_on_seed_id_and_number_alone(teacher, answers):
    assert len({answer.text for answer in answers}) > 20
    for batch_size in (5,):
        again = ask(teacher, EXAMPLES, dataclasses.replace(HOT, batch_size=batch_size))
        assert again == answers
    assert ask(teacher, EXAMPLES[7:4:-1], HOT) == [answers[i] for i in (14, 15, 12, 13, 10, 11)]
    three = ask(teacher, EXAMPLES[:3], dataclasses.replace(HOT, samples=3))
    assert [*three[:2], *three[3:5], *three[6:8]] == answers[:6]
    renamed = [dataclasses.replace(e, id=f"r{e.id}") for e in EXAMPLES]
    for other in (
        ask(teacher, renamed, HOT),
        ask(teacher, EXAMPLES, dataclasses.replace(HOT, seed=1)),
    ):
        assert sum(a == b for a, b in zip(other, answers, strict=True)) < 4


def test_numbers_of_samples_draw_apart(answers):
    assert sum(a == b for a, b in zip(answers[::2], answers[1::2], strict=True)) < 3


def test_first_line_is_the_first_line_of_all(teacher):
    # So hot that every token, a line break too, is as likely.
    hot = dataclasses.replace(HOT, sampling=Sampling(1e4), samples=16)
    whole = ask(teacher, EXAMPLES, hot)
    lines = ask(teacher, EXAMPLES, dataclasses.replace(hot, stop="first_line"))
    assert sum("\n" in answer.text for answer in whole) > 1
    for full, line in zip(whole, lines, strict=True):
        assert line.text == first_line(full.text.partition("\n")[0])
        if "\n" in full.text:
            assert (line.cut, line.tokens < full.tokens) == (False, True)
    assert {answer.dropped for answer in lines} <= {"", "empty_answer"}


def test_stop_strings_end_an_answer_before_themselves(teacher, answers):
    texts = [answer.text for answer in answers]
    at = next(i for i, text in enumerate(texts) if len(text) > 6)
    stop = texts[at][4:6]
    rule = dataclasses.replace(HOT, stop="strings", stop_strings=(stop,))
    found = ask(teacher, EXAMPLES, rule)
    assert found[at].text == texts[at][: texts[at].index(stop)].strip()
    assert (found[at].cut, found[at].tokens < answers[at].tokens) == (False, True)
    kept = [i for i, text in enumerate(texts) if stop not in text]
    assert kept
    assert [found[i] for i in kept] == [answers[i] for i in kept]


def test_only_a_question_is_stripped(teacher):
    prompts = [
        dataclasses.replace(e, kind="completion", context="", question=f"The mill {n}")
        for n, e in enumerate(EXAMPLES)
    ]
    found = ask(teacher, prompts, HOT)
    assert any(answer.text != answer.text.strip() for answer in found)
    as_questions = ask(teacher, EXAMPLES, dataclasses.replace(HOT, samples=8))
    assert all(answer.text == answer.text.strip() for answer in as_questions)


def test_what_does_not_count(teacher):
    prompts = encode_prompts(EXAMPLES, side_of(teacher))
    longest = max(map(len, prompts))
    long = dataclasses.replace(EXAMPLES[0], id="long", context="mill " * 300)
    empty = dataclasses.replace(EXAMPLES[0], id="empty", kind="completion", question="")
    assert ask(teacher, [empty], HOT)[0] == Answer("", 0, dropped="empty_prompt")
    assert ask(teacher, [long], HOT)[0] == Answer("", 0, dropped="long_prompt")
    # Room for one token, and answers of more.
    tight = side_of(teacher, max_length=longest + 1)
    found = ask(teacher, EXAMPLES, HOT, tight)
    for ids, *both in zip(prompts, found[::2], found[1::2], strict=True):
        for answer in both:
            over = len(ids) + answer.tokens > longest + 1
            assert answer.dropped in ("empty_answer", "long_answer" if over else "")
    assert any(answer.dropped == "long_answer" for answer in found)
    assert any(not answer.dropped for answer in found)
    none = side_of(teacher, max_length=min(map(len, prompts)))
    assert {a.dropped for a in ask(teacher, EXAMPLES, HOT, none)} == {"long_prompt"}
    # Beyond the model's own positions there is no answer either.
    short = dataclasses.replace(
        teacher, config=dataclasses.replace(teacher.config, max_positions=20)
    )
    assert {a.dropped for a in ask(short, EXAMPLES, HOT)} == {"long_prompt"}


def test_cut_answers_are_kept_or_not(teacher, answers):
    cut = [answer.cut for answer in answers]
    assert 0 < sum(cut) < len(cut)
    assert len({answer.tokens for answer in answers}) > 4
    assert all(answer.tokens == 12 for answer in answers if answer.cut)
    found = ask(teacher, EXAMPLES, dataclasses.replace(HOT, keep_cut=False))
    expected = [a.cut and a.dropped != "empty_answer" for a in answers]
    assert [answer.dropped == "cut_answer" for answer in found] == expected


def test_shots_are_drawn_from_the_pool(teacher):
    pool = [dataclasses.replace(e, id=f"p{e.id}", context=f"Pool {e.id}.") for e in EXAMPLES]
    side = side_of(teacher, shots=1, max_length=400)
    answerer = Answerer(teacher, side, HOT, pool=pool, seed=5)
    shot = draw_shots(pool, EXAMPLES[0], 1, 5)
    shown = encode_prompts(EXAMPLES[:1], side, pool=shot)
    assert (shown[0] == encode_prompts(EXAMPLES[:1], side, pool=pool, seed=5)[0]).all()
    alone = Answerer(teacher, side, HOT, pool=shot, seed=0)
    assert answerer.answer(EXAMPLES[:1]) == alone.answer(EXAMPLES[:1])
    assert answerer.answer(EXAMPLES[:1]) != ask(teacher, EXAMPLES[:1], HOT, side)


def test_greedy_answers_by_id(teacher):
    side = side_of(teacher)
    long = dataclasses.replace(EXAMPLES[0], id="long", context="mill " * 300)
    settings = {"pool": EXAMPLES, "seed": 0, "max_new_tokens": 4, "batch_size": 6}
    done = []
    found = generate_answers(teacher, [*EXAMPLES, long], side, **settings, progress=done.append)
    expected = continue_prompts(
        teacher.model,
        encode_prompts(EXAMPLES, side),
        max_new_tokens=4,
        eos_id=line_stop_ids(teacher),
        tokenizer=teacher.tokenizer,
        batch_size=6,
    )
    assert found == {
        e.id: first_line(each.text) for e, each in zip(EXAMPLES, expected, strict=True)
    }
    assert sum(done) == 13


def test_ends_of_a_text(teacher):
    assert end_ids(tiny_model()) == [2]
    several = dataclasses.replace(
        teacher, config=dataclasses.replace(teacher.config, eos_id=(7, 3))
    )
    assert end_ids(several) == [2, 3, 7]
    assert set(end_ids(several)) < set(line_stop_ids(several))


def test_another_rule_is_refused():
    with pytest.raises(ValueError, match=r"stop: expected one of .*, got 'line'"):
        dataclasses.replace(HOT, stop="line")
