"""BERTScore through a tiny random BERT, against its definition."""

import importlib.util

import numpy as np
import pytest
import torch
import transformers

from uld_jax.errors import UserError
from uld_jax.evaluation import bert_scores, require_bert_score

installed = importlib.util.find_spec("bert_score") is not None
needs_bert_score = pytest.mark.skipif(not installed, reason="bert-score is not installed")


def by_definition(directory, prediction, reference):
    """Greedy matching of token embeddings without [CLS] and [SEP] (Zhang et al., section 3)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModel.from_pretrained(directory).eval()
    vectors = []
    for text in (prediction, reference):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].numpy()
        vectors.append(states / np.linalg.norm(states, axis=-1, keepdims=True))
    similarity = vectors[0] @ vectors[1].T
    precision = similarity.max(axis=1)[1:-1].mean()
    recall = similarity.max(axis=0)[1:-1].mean()
    return 100 * 2 * precision * recall / (precision + recall)


@needs_bert_score
def test_it_is_the_definition_and_takes_the_best_reference(bert):
    predictions = ["the fox", "red dog", "", "same", "x"]
    references = [["a fox", "old red fox"], ["cat"], ["something"], ["same"], [" ", "y z"]]
    found = bert_scores(predictions, references, model=str(bert))
    pairs = zip(predictions, references, strict=True)
    expected = [
        max((by_definition(bert, p, r) for r in rs if r.strip()), default=0.0) if p else 0.0
        for p, rs in pairs
    ]
    assert found == pytest.approx(expected, abs=1e-3)
    assert found[2] == 0.0
    assert found[3] == pytest.approx(100, abs=1e-3)
    assert len({round(value, 3) for value in found}) == 5


@needs_bert_score
def test_a_model_that_does_not_open(tmp_path):
    with pytest.raises(UserError, match=r"--bertscore=.*empty: no model that opens"):
        bert_scores(["a"], [["a"]], model=str(tmp_path / "empty"))


def test_without_the_package_one_line_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for score in (require_bert_score, lambda: bert_scores(["a"], [["a"]])):
        with pytest.raises(UserError, match=r"pip install 'uld-jax\[bertscore\]'") as error:
            score()
        assert "\n" not in str(error.value)
