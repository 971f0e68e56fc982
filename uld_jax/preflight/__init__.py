"""What will go wrong with a teacher and a student, found before the first step."""

from uld_jax.preflight.findings import (
    Finding,
    likelihood_findings,
    pair_findings,
    sample_findings,
    side_findings,
    worst_first,
)
from uld_jax.preflight.report import Report, draw, markdown, to_json
from uld_jax.preflight.samples import AlignedText, SampleFacts, align_text, sample_facts
from uld_jax.preflight.tokenizers import (
    TokenizerFacts,
    VocabularyFacts,
    split_characters,
    tokenizer_facts,
    vocabulary_facts,
)

__all__ = [
    "AlignedText",
    "Finding",
    "Report",
    "SampleFacts",
    "TokenizerFacts",
    "VocabularyFacts",
    "align_text",
    "draw",
    "likelihood_findings",
    "markdown",
    "pair_findings",
    "sample_facts",
    "sample_findings",
    "side_findings",
    "split_characters",
    "to_json",
    "tokenizer_facts",
    "vocabulary_facts",
    "worst_first",
]
