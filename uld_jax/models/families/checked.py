"""Configs translated with nothing overlooked: a field that is not read must not matter."""

from collections.abc import Iterator, Mapping, Set
from typing import Any

import transformers

from uld_jax.errors import UserError
from uld_jax.models.families.base import Family

# Fields of config.json that change neither a parameter nor a logit, by what they are about.
_HARMLESS = {
    "the directory, and what wrote it": "_name_or_path architectures auto_map is_llama_config "
    "model_type tensors tokenizer_class transformers.js_config transformers_version unsloth_fixed "
    "unsloth_version",
    "training": "activation_dropout attention_dropout attn_pdrop classifier_dropout dropout "
    "dropout_rate embd_pdrop gradient_checkpointing hidden_dropout init_std initializer_factor "
    "initializer_range layerdrop resid_pdrop",
    "generation, and what a call returns": "cache_implementation output_attentions "
    "output_hidden_states output_past prefix return_dict task_specific_params "
    "tie_last_hidden_states unk_token_id use_cache",
    "heads other than a language model's": "finetuning_task id2label is_decoder label2id "
    "problem_type summary_activation summary_first_dropout summary_proj_to_labels summary_type "
    "summary_use_proj",
    "how the same is computed": "attention_softmax_in_fp32 bias_dropout_fusion "
    "chunk_size_feed_forward dtype masked_softmax_fusion pretraining_tp reorder_and_upcast_attn "
    "skip_bias_add slow_but_exact",
    "worked by transformers into layer_types, no_rope_layers and rope_parameters": ""
    "_sliding_window_pattern max_window_layers no_rope_layer_interval "
    "original_max_position_embeddings sliding_window_pattern use_sliding_window",
    "lengths that relative positions do not go by": "model_max_length n_ctx n_positions "
    "offset_alibi seq_length",
}
_IGNORED = frozenset(name for names in _HARMLESS.values() for name in names.split())
# Of fields that published configs have and no transformers class: the value that asks for nothing.
_NEUTRAL = {"full_attn_mod": 1, "interpolate_factor": 1}

_REMEDY = "use a model without that, or take out what does not change its logits"


class _Noted(Mapping[str, Any]):
    """A config that notes which of its fields are asked for."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields, self.read = fields, set[str]()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


def config_of_hf(family: Family, hf: Mapping[str, Any], where: str) -> Any:
    """Our config of a Hugging Face config all of whose fields count.

    Args:
        family: Whose translation it is.
        hf: The config as a dict, and the "tensors" there are.
        where: Named in the error.

    Returns:
        A DecoderConfig or EncoderDecoderConfig.

    Raises:
        UserError: Names every field that the family neither reads nor may ignore and that is not
            as the transformers class has it.

    Example:
        >>> from uld_jax.models.families import by_model_type
        >>> hf = transformers.LlamaConfig(num_hidden_layers=3, expert_count=8).to_dict()
        >>> config_of_hf(by_model_type("llama", "config.json"), hf, "config.json")
        Traceback (most recent call last):
        ...
        uld_jax.errors.UserError: config.json: model_type 'llama': unsupported: expert_count=8; ...
    """
    defaults = transformers.AutoConfig.for_model(family.model_type).to_dict()
    harmless = {
        name
        for name, value in hf.items()
        if value == (usual := defaults.get(name, _NEUTRAL.get(name))) or not (value or usual)
    }
    by_default, noted, config = _Noted(defaults), _Noted(hf), None
    family.config_from_hf(by_default)
    problems = []
    try:
        config = family.config_from_hf(noted)
    except UserError as error:
        problems.append(str(error))
    # A refused config may not have been read to its end, but the usual one was.
    known = noted.read | by_default.read | _IGNORED | harmless
    problems += _unread(f"model_type '{family.model_type}'", hf, known)
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}; {_REMEDY}")
    return config


def config_of_gguf(family: Family, meta: Mapping[str, Any], where: str) -> Any:
    """Our config of a GGUF file's metadata, all of whose fields of the architecture count.

    Args:
        family: Whose translation it is.
        meta: As `Family.config_from_gguf` takes it.
        where: Named in the error.

    Returns:
        A DecoderConfig.

    Raises:
        UserError: Names every field of the architecture that the family does not read.
        KeyError: A field that the architecture requires is missing.
    """
    name, noted = family.gguf_architecture, _Noted(meta)
    try:
        config = family.config_from_gguf(noted)
    except UserError as error:
        raise UserError(f"{where}: {error}; {_REMEDY}") from error
    harmless = {key for key, value in meta.items() if not key.startswith(f"{name}.") or not value}
    # The embedding has as many rows as the vocabulary.
    known = noted.read | harmless | {f"{name}.vocab_size"}
    for problem in _unread("GGUF metadata", meta, known):
        raise UserError(f"{where}: {problem}; {_REMEDY}")
    return config


def _unread(what: str, fields: Mapping[str, Any], known: Set[str]) -> list[str]:
    left = ", ".join(f"{name}={fields[name]!r}" for name in sorted(fields.keys() - known))
    return [f"{what}: unsupported: {left}"] if left else []
