"""Small real tokenizers of the two common kinds."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "Answer each question in a few words, taken from its context where there is one.",
    "Context: The ferry from Oslo to Kiel sails at 14:00 and carries 2,700 people.",
    "Question: Where does the ferry sail from? Answer: Oslo",
    "Question: How many people does it carry? Answer: 2,700 people",
    "The café on the quay opened in 1994; its owner, Zoë, bakes naïve crêpes.",
]

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def _train(tokenizer, special_tokens, **options):
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special_tokens, show_progress=False, **options
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A byte-level BPE as GPT-2's: Ġ words, no BOS, trimmed offsets, a chat template."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train(
        tokenizer,
        ["<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _piece_tokenizer(template):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    _train(tokenizer, ["<unk>", "<s>", "</s>"])
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    state["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    state["pre_tokenizer"] = None
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    specials = [("<s>", 1), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=specials
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="session")
def piece_tokenizer():
    """A SentencePiece-like BPE as Llama 2's: ▁ words, byte fallback, BOS before every text."""
    return _piece_tokenizer("<s> $A")


@pytest.fixture(scope="session")
def eos_tokenizer():
    """The same, but it ends every text with EOS by itself, as T5's does."""
    return _piece_tokenizer("$A </s>")


@pytest.fixture(params=["byte_tokenizer", "piece_tokenizer", "eos_tokenizer"])
def tokenizer(request):
    """Each of the above in turn."""
    return request.getfixturevalue(request.param)


def _unigram(byte_fallback):
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    spaces = normalizers.Replace(tokenizers.Regex(" {2,}"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), spaces])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    trainer = trainers.UnigramTrainer(
        vocab_size=300 + len(bytes_),
        special_tokens=["<pad>", "</s>", "<unk>", *bytes_],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    state = json.loads(tokenizer.to_str())
    state["model"]["byte_fallback"] = byte_fallback
    # The byte tokens are for what has no other: text that looks like one is not one.
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    steps = [decoders.ByteFallback()] if byte_fallback else []
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@pytest.fixture(scope="session")
def unigram_tokenizer():
    """A Unigram model as T5's: NFKC, one space for many, unknown characters are <unk>."""
    return _unigram(byte_fallback=False)


@pytest.fixture(scope="session")
def unigram_bytes_tokenizer():
    """The same as mT5's: unknown characters become byte tokens."""
    return _unigram(byte_fallback=True)


@pytest.fixture(scope="session")
def word_tokenizer():
    """An uncased WordPiece as BERT's: no white space, lower case, accents dropped."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[SEP]")
