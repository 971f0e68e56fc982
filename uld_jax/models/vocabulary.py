"""Whether a tokenizer belongs to a model: every token needs a row of the embedding."""

import transformers

from uld_jax.errors import UserError


def tokens_beyond(
    tokenizer: transformers.PreTrainedTokenizerFast, vocab_size: int
) -> dict[str, int]:
    """The tokens that text or its ends can get and that have no row of the embedding.

    Other tokens added to a vocabulary may be beyond it: Gemma 3's for an image is, of which text
    models have no row.

    Args:
        tokenizer: The tokenizer.
        vocab_size: Rows.

    Returns:
        Token to id.

    Example:
        >>> from uld_jax.testing import toy_tokenizer
        >>> tokens_beyond(toy_tokenizer(), 10**6)
        {}
    """
    added = tokenizer.get_added_vocab()
    ends = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    return {
        token: number
        for token, number in tokenizer.get_vocab().items()
        if number >= vocab_size and (token not in added or token in ends)
    }


def check_tokenizer(
    tokenizer: transformers.PreTrainedTokenizerFast, vocab_size: int, where: str
) -> None:
    """Refuses a tokenizer of which a token that text can get has no row of the embedding.

    Args:
        tokenizer: The tokenizer.
        vocab_size: Rows.
        where: What both were loaded from.

    Raises:
        UserError: There is such a token.
    """
    beyond = tokens_beyond(tokenizer, vocab_size)
    if beyond:
        token, highest = max(beyond.items(), key=lambda item: item[1])
        raise UserError(
            f"{where}: {len(beyond)} tokens of its tokenizer have ids beyond its vocab_size "
            f"{vocab_size}, up to {highest} ({token!r}): take the tokenizer that belongs to the "
            "weights, or give them more rows with transformers' resize_token_embeddings"
        )
