"""A Hugging Face model directory as a source of tensors: config.json and safetensors files."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import safetensors
import transformers
from huggingface_hub.errors import StrictDataclassError

from uld_jax.errors import UserError
from uld_jax.models.config import DecoderConfig
from uld_jax.models.families import Family, by_model_type, config_of_hf
from uld_jax.models.reading import Box

FLOATS = {"F64", "F32", "F16", "BF16"}
INDEX = "model.safetensors.index.json"


class _Stored(NamedTuple):
    """Where a tensor is: its file, its name there, its shape and type."""

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str


class SafetensorsSource:
    """A directory with config.json and one or more .safetensors files.

    Args:
        directory: The directory.

    Raises:
        UserError: A file is missing or broken, the files are not as their index says, or the
            architecture or a field of its config is not supported.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.family = _family(directory)
        # By its present name, for each tensor.
        self._stored = {
            self.family.tensor_name(stored.name): stored
            for stored in _stored_tensors(directory)
            if not stored.name.endswith(self.family.ignored or ("\0",))
        }
        self.shapes = {name: stored.shape for name, stored in self._stored.items()}
        self.config = _config(directory, self.family, {"tensors": self.shapes})
        odd = {n: stored.kind for n, stored in self._stored.items() if stored.kind not in FLOATS}
        if odd:
            name, kind = min(odd.items())
            raise UserError(
                f"{directory}: {len(odd)} tensors are of none of the types {sorted(FLOATS)} (the "
                f"first: {name}, {kind}); export the model unquantised"
            )

    def read(self, name: str, boxes: Sequence[Box]) -> list[np.ndarray]:
        """Parts of one tensor in its stored type; the rest is not read."""
        stored = self._stored[name]
        # Opened for each tensor, since the pages of a mapped file count as memory until it closes.
        with _open(stored.file) as file:
            tensor = file.get_slice(stored.name)
            return [tensor[tuple(slice(*bounds) for bounds in box)] for box in boxes]


def read_model_config(directory: Path) -> DecoderConfig:
    """What a directory's config.json says, where its weights are not to be looked at.

    Args:
        directory: With config.json.

    Returns:
        The config.

    Raises:
        UserError: As `SafetensorsSource`.
    """
    family = _family(directory)
    # transformers reads every T5 as tied until it sees the tensors.
    untied = _read_json(directory / "config.json").get("tie_word_embeddings") is False
    return _config(directory, family, {"tensors": ["lm_head.weight"]} if untied else {})


def _family(directory: Path) -> Family:
    config = _read_json(directory / "config.json")
    where = _where(directory, config)
    if config.get("quantization_config"):
        raise UserError(
            f"{where}: quantization_config {config['quantization_config']!r} is not supported; "
            "load the unquantised model, and quantise it with config.teacher.quantize"
        )
    return by_model_type(str(config.get("model_type")), where)


def _config(directory: Path, family: Family, more: dict[str, Any]) -> DecoderConfig:
    hf_config = _read_config(directory)
    where = _where(directory, _read_json(directory / "config.json"))
    return config_of_hf(family, hf_config | more, where)


def _where(directory: Path, config: Mapping[str, Any]) -> str:
    own_code = " (whose own code, for trust_remote_code, is never run)"
    return f"{directory / 'config.json'}{own_code if 'auto_map' in config else ''}"


def _stored_tensors(directory: Path) -> list[_Stored]:
    """What the files hold, headers only; where there is an index, as it says."""
    index = directory / INDEX
    weight_map = _read_weight_map(index) if index.is_file() else {}
    files = sorted(set(weight_map.values())) or ["model.safetensors"]
    tensors: list[_Stored] = []
    for path in (directory / name for name in files):
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                part = file.get_slice(name)
                tensors.append(_Stored(path, name, tuple(part.get_shape()), part.get_dtype()))
    found: dict[str, list[str]] = {}
    for stored in tensors:
        found.setdefault(stored.name, []).append(stored.file.name)
    wrong = [
        f"{name} is not in {file} but in {', '.join(found.get(name, ['no file']))}"
        for name, file in sorted(weight_map.items())
        if file not in found.get(name, ())
    ]
    if wrong:
        raise UserError(
            f"{index}: {len(wrong)} tensors are not where it says: {'; '.join(wrong)}; the index "
            "and the files are not of one export: fetch them all again"
        )
    return [t for t in tensors if weight_map.get(t.name, t.file.name) == t.file.name]


def _read_weight_map(index: Path) -> Mapping[str, str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(
            f"{index}: expected 'weight_map', each tensor's file, found {weight_map!r}; fetch it "
            "again"
        )
    for name, file in weight_map.items():
        plain = isinstance(file, str) and Path(file).name == file
        if not plain or not file.endswith(".safetensors"):
            raise UserError(
                f"{index}: {name} should be in a .safetensors file of this directory, not in "
                f"{file!r}; no others are read: put it here and name it in weight_map, or fetch "
                "the model again"
            )
    return weight_map


def _read_config(directory: Path) -> dict[str, Any]:
    """A Hugging Face config that transformers has checked."""
    try:
        # With False, code that comes with the model is neither run nor asked about.
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{directory / 'config.json'}: {reason}") from error
    return config.to_dict()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a Hugging Face model directory")
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _open(path: Path) -> Any:
    if not path.is_file():
        pickled = sorted(p.name for p in path.parent.glob("*.bin"))
        if not pickled:
            raise UserError(f"{path}: no such weights file; fetch the model again")
        refuse_pickles(path, pickled, str(path.parent), f"{path.parent}-safetensors")
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: not a complete safetensors file: {reason}; its {path.stat().st_size} bytes "
            "may be a download cut short: fetch it again"
        ) from error


def refuse_pickles(path: object, pickled: Sequence[str], source: str, target: str) -> NoReturn:
    """Says that there are pickled weights only, and how to convert them.

    Args:
        path: The weights file that is not there.
        pickled: The files that are.
        source: What transformers opens: a directory or a hub id.
        target: The directory that the command makes.

    Raises:
        UserError: Always.

    Example:
        >>> refuse_pickles("m/model.safetensors", ["pytorch_model.bin"], "m", "m-safetensors")
        Traceback (most recent call last):
        ...
        uld_jax.errors.UserError: m/model.safetensors: no such weights file, only ...
    """
    code = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        "d, o = sys.argv[1:]; M.from_pretrained(d).save_pretrained(o); "
        "T.from_pretrained(d).save_pretrained(o)"
    )
    command = shlex.join(["python", "-c", code, source, target])
    raise UserError(
        f"{path}: no such weights file, only {list(pickled)}, and pickle files are not read: they "
        f"may run code; where torch is installed, convert them: {command}"
    )
