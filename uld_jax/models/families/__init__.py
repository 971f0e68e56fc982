"""The model families, each one file: two config translations and one weight table."""

from uld_jax.errors import UserError
from uld_jax.models.families.base import Family, Weight, hf_names
from uld_jax.models.families.gemma3 import GEMMA3
from uld_jax.models.families.llama import LLAMA

FAMILIES = (LLAMA, GEMMA3)


def by_model_type(model_type: str, where: str) -> Family:
    """The family of a Hugging Face `model_type`.

    Args:
        model_type: From config.json.
        where: Named in the error.

    Returns:
        The family.

    Raises:
        UserError: Not supported; lists what is.

    Example:
        >>> by_model_type("llama", "config.json").architecture
        'LlamaForCausalLM'
    """
    known = {family.model_type: family for family in FAMILIES}
    if model_type not in known:
        raise UserError(
            f"{where}: model_type '{model_type}' is not supported; supported: {sorted(known)}"
        )
    return known[model_type]


def by_gguf_architecture(architecture: str, where: str) -> Family:
    """The family of a GGUF file's `general.architecture`.

    Args:
        architecture: From the file's metadata.
        where: Named in the error.

    Returns:
        The family.

    Raises:
        UserError: Not supported; lists what is.

    Example:
        >>> by_gguf_architecture("gemma3", "x.gguf").model_type
        'gemma3_text'
    """
    known = {family.gguf_architecture: family for family in FAMILIES}
    if architecture not in known:
        raise UserError(
            f"{where}: GGUF architecture '{architecture}' is not supported; "
            f"supported: {sorted(known)}"
        )
    return known[architecture]


__all__ = ["FAMILIES", "Family", "Weight", "by_gguf_architecture", "by_model_type", "hf_names"]
