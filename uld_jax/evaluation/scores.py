"""Answer scores as the paper reports them: F1, precision, recall, exact match and ROUGE."""

import functools
import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
METRICS = ("f1", "precision", "recall", "em", *ROUGE_TYPES)

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]]
) -> dict[str, float]:
    """Average the scores of every prediction against its own references.

    Args:
        predictions: one answer an example.
        references: one text, or several equally good ones, an example.

    Returns:
        The mean of `per_example` for each of `METRICS`, in percent.

    Raises:
        ValueError: there are no examples, not as many references, or an example has none.

    Example:
        >>> scores = score(["The Broncos", "1969"], [["Denver Broncos", "Broncos"], "in 1970"])
        >>> scores["f1"], scores["em"], scores["rouge1"]
        (50.0, 50.0, 33.33333333333333)

    Reference:
        Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation
        Loss for LLMs", 2024, section 4 (https://arxiv.org/abs/2402.12030).
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"expected references for each of the {len(predictions)} predictions, "
            f"got {len(references)}"
        )
    if not predictions:
        raise ValueError("expected at least one prediction to score, got none")
    rows = [per_example(*pair) for pair in zip(predictions, references, strict=True)]
    return {name: math.fsum(row[name] for row in rows) / len(rows) for name in METRICS}


def per_example(prediction: str, references: str | Sequence[str]) -> dict[str, float]:
    """Score one prediction against the best of its references, for each metric on its own.

    F1, precision and recall compare the words that are left by `normalise`, with multiplicity:

        precision = common / words of the prediction    recall = common / words of the reference
        F1 = 2 precision recall / (precision + recall)

    All three are 0 where no word is in common, also where both sides have no words at all.
    Exact match compares the normalised texts. "yes" and "no" are words like any other. ROUGE has
    no stemmer; rougeLsum takes each line as a sentence.

    Args:
        prediction: the answer.
        references: one text, or several equally good ones.

    Returns:
        A value for each of `METRICS`, in percent.

    Raises:
        ValueError: there is no reference.

    Example:
        >>> row = per_example("a red fox", ["the fox", "red"])
        >>> row["precision"], row["recall"], row["em"]
        (50.0, 100.0, 0.0)

    Reference:
        Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", 2016,
        section 6.1; Lin, "ROUGE: a Package for Automatic Evaluation of Summaries", 2004.
    """
    # Every metric takes a maximum, to which a reference given twice adds nothing but time.
    texts = (references,) if isinstance(references, str) else tuple(dict.fromkeys(references))
    if not texts:
        raise ValueError(f"expected at least one reference, got none for {prediction!r}")
    answer = normalise(prediction)
    golds = [normalise(text) for text in texts]
    overlaps = [_overlap(answer.split(), gold.split()) for gold in golds]
    f1, precision, recall = (max(values) for values in zip(*overlaps, strict=True))
    best = _rouge_scorer().score_multi(texts, prediction)
    rouge = {name: 100.0 * best[name].fmeasure for name in ROUGE_TYPES}
    em = 100.0 * (answer in golds)
    return {"f1": f1, "precision": precision, "recall": recall, "em": em, **rouge}


def normalise(text: str) -> str:
    """Lower a text's case, then drop ASCII punctuation, English articles and spare white space.

    Args:
        text: any text.

    Returns:
        Words with one space between them.

    Example:
        >>> normalise(" The Broncos'  (Denver) ")
        'broncos denver'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def _overlap(answer: Sequence[str], gold: Sequence[str]) -> tuple[float, float, float]:
    """F1, precision and recall of two lists of words, in percent."""
    common = (Counter(answer) & Counter(gold)).total()
    if common == 0:
        return 0.0, 0.0, 0.0
    precision, recall = common / len(answer), common / len(gold)
    f1 = 2 * precision * recall / (precision + recall)
    return 100.0 * f1, 100.0 * precision, 100.0 * recall


@functools.cache
def _rouge_scorer() -> "RougeScorer":
    # Imported here: it brings all of nltk, which takes longer to load than the rest of the package.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(ROUGE_TYPES)
