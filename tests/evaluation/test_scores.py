import functools
import json

import pytest

from uld_jax.evaluation import METRICS, normalise, per_example, score
from uld_jax.evaluation.scores import ROUGE_TYPES

SETS = {
    "bloomz-560m_squad_Llama-2-7b-chat-hf_d0_2400__0shots.jsonl": 10570,
    "opt-350m_FairytaleQA_Llama-2-7b-chat-hf_d1.5_2432__0shots.jsonl": 1007,
    "pythia-410m-deduped_dialogsum_Llama-2-7b-chat-hf_d1.5_3584__0shots.jsonl": 500,
}


@functools.cache
def _read(folder, name):
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    answers = [row["answers"] for row in rows]
    references = [answer["text"] if isinstance(answer, dict) else answer for answer in answers]
    expected = json.loads((folder / "expected.json").read_text())[name]
    return [row["prediction_text"] for row in rows], references, expected


@pytest.mark.parametrize("name", SETS)
def test_scores_of_a_published_prediction_file(shared, name):
    predictions, references, expected = _read(shared / "reference_sets", name)
    assert len(predictions) == SETS[name]
    found = score(predictions, references)
    assert found.keys() == set(METRICS)
    tolerance = expected["suggested_abs_tolerance"]
    for metric in METRICS:
        near = tolerance["rouge*" if metric in ROUGE_TYPES else "f1,precision,recall,em,squad"]
        assert found[metric] == pytest.approx(expected["published"][metric], abs=near, rel=0)
        assert found[metric] == pytest.approx(expected["recomputed"][metric], abs=1e-9, rel=0)


@pytest.mark.parametrize("name", SETS)
def test_first_examples_of_a_published_prediction_file(shared, name):
    predictions, references, expected = _read(shared / "reference_sets", name)
    rows = expected["first_50_per_example"]
    assert len(rows) == 50
    for prediction, texts, row in zip(predictions, references, rows, strict=False):
        percent = {metric: 100 * value for metric, value in row.items()}
        assert per_example(prediction, texts) == pytest.approx(percent, abs=1e-9)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Broncos'\n(Denver)\t", "broncos denver"),
        ("An apple, a theme; another A", "apple theme another"),
        ("U.S.A. well-known", "usa wellknown"),
        ("“The” café – no. 5", "“ ” café – no 5"),
        ("the an a .", ""),
        (" \n", ""),
    ],
)
def test_normalise(text, normal):
    assert normalise(text) == normal


@pytest.mark.parametrize(
    ("prediction", "reference", "f1", "em", "rouge1"),
    [
        ("", "yes", 0, 0, 0),
        (" \n", "yes", 0, 0, 0),
        ("yes", "", 0, 0, 0),
        ("the", ".", 0, 100, 0),  # neither has a word left: no overlap, yet equal
        ("", "", 0, 100, 0),
        ("Yes.", "yes", 100, 100, 100),
        ("no", "no known solution", 50, 0, 50),
        ("x x y", "x y y", 200 / 3, 0, 200 / 3),
        ("a fox", "fox", 100, 100, 200 / 3),  # ROUGE keeps the article
        ("running", "run", 0, 0, 0),  # no stemmer
    ],
)
def test_edge_cases(prediction, reference, f1, em, rouge1):
    row = per_example(prediction, reference)
    assert (row["f1"], row["em"], row["rouge1"]) == pytest.approx((f1, em, rouge1))


def test_each_metric_takes_its_own_best_reference():
    row = per_example("one two three", ["one", "one two four five six seven eight", "x"])
    assert row["precision"] == pytest.approx(200 / 3)
    assert row["recall"] == 100
    assert row["f1"] == 50
    assert row["em"] == 0
    assert row["rouge2"] == pytest.approx(25)


def test_rouge_lsum_takes_lines_as_sentences_and_rouge_l_does_not():
    row = per_example("c d\na b", "a b\nc d")
    assert (row["rougeL"], row["rougeLsum"]) == (50, 100)


def test_one_text_equals_a_list_of_one_and_order_does_not_matter():
    one = score(["red fox", "7"], ["fox", "8"])
    assert one == score(["red fox", "7"], [["fox"], ["8", "8"]])
    texts = ["red", "fox", "red dog"]
    assert per_example("red fox", texts) == per_example("red fox", texts[::-1])


def test_score_refuses_lists_that_do_not_fit():
    with pytest.raises(ValueError, match="at least one prediction to score, got none"):
        score([], [])
    with pytest.raises(ValueError, match="each of the 1 predictions, got 2"):
        score(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="at least one reference, got none for 'b'"):
        score(["a", "b"], ["a", []])
