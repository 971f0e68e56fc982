"""What examples show of two tokenizers, against counts by hand."""

import pytest

from uld_jax.data import Example, Side
from uld_jax.preflight import align_text, draw, sample_facts, split_characters
from uld_jax.testing import toy_tokenizer


@pytest.fixture(scope="module")
def sides():
    return [
        Side(toy_tokenizer(kind=kind), 256, append_eos=eos)
        for kind, eos in (("byte_level", True), ("metaspace", False))
    ]


def example(number, answer):
    return Example(
        id=str(number),
        kind="qa",
        context=f"Mill {number} grinds wheat.",
        question="What does it grind?",
        answers=(answer,),
        title="",
    )


def facts(sides, answers):
    examples = [example(number, answer) for number, answer in enumerate(answers)]
    return sample_facts(examples, answers, *sides, pool=examples, seed=0)


def test_groups_and_lengths_are_those_of_the_tokens(sides):
    answers = ["the river", "wheat 12", "ü"]
    found = facts(sides, answers)
    aligned = [align_text(answer, *sides) for answer in answers]
    assert sum(found.group_sizes.values()) == sum(len(text.groups) for text in aligned)
    ones = sum(len(a) == len(b) == 1 for text in aligned for a, b in text.groups)
    tokens = sum(len(a) for text in aligned for a, _ in text.groups)
    assert found.single_share == pytest.approx(ones / tokens)
    assert (found.examples, found.left_out) == (3, {})
    # Without a pre-tokeniser the teacher's has a token of the colon, the blank and the answer.
    assert (found.student_border, found.teacher_border) == (0, 1)


def test_what_is_left_out_is_counted(sides):
    short = [Side(sides[0].tokenizer, 8, append_eos=True), sides[1]]
    assert facts(short, ["wheat"]).left_out == {"too_long_student": 1}
    assert facts(sides, ["wheat", " "]).left_out == {"empty_answer": 1}


def test_characters_of_several_tokens():
    byte_level = toy_tokenizer()
    assert split_characters(byte_level, "a東") == 0.5  # three bytes, of which no pair was merged
    assert split_characters(byte_level, "ab") == 0


def test_the_picture_has_both_sides(sides, tmp_path):
    draw(align_text("the river " * 12, *sides), tmp_path / "rows.png")
    assert (tmp_path / "rows.png").read_bytes()[:4] == b"\x89PNG"
