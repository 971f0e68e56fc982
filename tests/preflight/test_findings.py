"""What each finding is about, from facts that have nothing else to say."""

import pytest

from uld_jax.preflight import (
    SampleFacts,
    TokenizerFacts,
    VocabularyFacts,
    likelihood_findings,
    pair_findings,
    sample_findings,
    side_findings,
    worst_first,
)

SOUND = TokenizerFacts(
    name="m",
    tokens=1000,
    beyond=0,
    logits=1000,
    bos="",
    eos="</s>",
    eos_id=2,
    model_eos_ids=(2,),
    model_eos=("</s>",),
    digits=10,
    spaces=6,
    split_characters=0.1,
    chat=False,
)
SHARED = VocabularyFacts(shared=800, student_share=0.8, teacher_share=0.8)
SAMPLES = SampleFacts(
    examples=100,
    left_out={},
    positions=500,
    positional_share=0.95,
    single_share=0.9,
    group_sizes={"1:1": 400},
    length_ratio=1.0,
    student_tokens=100,
    teacher_tokens=200,
    student_border=0.0,
    teacher_border=0.0,
)


def faults(findings):
    return {finding.fault: finding.level for finding in findings}


def test_a_sound_pair_has_nothing_to_say():
    assert side_findings("student", SOUND) == []
    assert pair_findings(SOUND, SOUND, SHARED) == []
    assert sample_findings("teacher", SAMPLES) == []
    assert likelihood_findings("teacher", 1.2) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"beyond": 3}, {"tokens_beyond": "error"}),
        ({"eos_id": -1}, {"no_eos": "error"}),
        ({"tokens": 990}, {"padded_vocabulary": "note"}),
        ({"tokens": 200}, {"few_tokens": "warning"}),
        ({"model_eos_ids": (7, 8), "model_eos": ("a", "b")}, {"other_eos": "warning"}),
        (
            {"tokens": 200, "model_eos_ids": (7,), "model_eos": ("a",)},
            {"few_tokens": "error", "other_eos": "error"},
        ),
    ],
)
def test_one_side(changes, expected):
    assert faults(side_findings("student", SOUND._replace(**changes))) == expected


def test_a_teacher_may_have_no_end():
    assert faults(side_findings("teacher", SOUND._replace(eos_id=-1))) == {"no_eos": "warning"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"bos": "<s>"}, "bos_on_one_side"),
        ({"digits": 1}, "digits"),
        ({"spaces": 3}, "white_space"),
        ({"split_characters": 0.9}, "split_characters"),
        ({"chat": True}, "chat_on_one_side"),
    ],
)
def test_what_differs_between_the_sides(changes, expected):
    other = SOUND._replace(**changes)
    for pair in ((SOUND, other), (other, SOUND)):
        assert faults(pair_findings(*pair, SHARED)) == {expected: "note"}


def test_vocabularies_without_common_tokens():
    apart = SHARED._replace(student_share=0.001)
    assert faults(pair_findings(SOUND, SOUND, apart)) == {"few_shared_tokens": "note"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"left_out": {"too_long_student": 2}}, {"too_long_student": "note"}),
        ({"left_out": {"too_long_teacher": 20}}, {"too_long_teacher": "warning"}),
        ({"left_out": {"empty_answer": 100}, "positions": 0}, {"empty_answer": "error"}),
        ({"positional_share": 0.5}, {"unequal_answers": "warning"}),
        ({"teacher_border": 0.5}, {"border": "warning"}),
    ],
)
def test_samples(changes, expected):
    assert faults(sample_findings("teacher", SAMPLES._replace(**changes))) == expected


def test_text_that_a_model_does_not_expect():
    assert faults(likelihood_findings("teacher", 4.5)) == {"foreign_text": "error"}


def test_errors_come_first():
    found = worst_first(
        [
            *pair_findings(SOUND, SOUND._replace(bos="<s>"), SHARED),
            *side_findings("student", SOUND._replace(eos_id=-1)),
        ]
    )
    assert [finding.level for finding in found] == ["error", "note"]
