"""A Hugging Face model directory as a source of tensors: config.json and safetensors files."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import transformers
from huggingface_hub.errors import StrictDataclassError

from uld_jax.errors import UserError
from uld_jax.models.families import by_model_type

FLOATS = {"F64", "F32", "F16", "BF16"}


class SafetensorsSource:
    """A directory with config.json and one or more .safetensors files.

    Args:
        directory: The directory.

    Raises:
        UserError: A file is missing or broken, or the architecture is not supported.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        config = _read_json(directory / "config.json")
        where = str(directory / "config.json")
        if "auto_map" in config:
            where += " (whose own code, for trust_remote_code, is never run)"
        if config.get("quantization_config"):
            raise UserError(
                f"{where}: quantization_config {config['quantization_config']!r} is not supported; "
                "load the unquantised model, and quantise it with config.teacher.quantize"
            )
        self.family = by_model_type(str(config.get("model_type")), where)
        hf_config = _read_config(directory)
        index = directory / "model.safetensors.index.json"
        names = {"model.safetensors"}
        if index.is_file():
            names = set(_read_json(index).get("weight_map", {}).values())
        files = [_open(directory / name) for name in sorted(names)]
        # By the present name of each tensor, the file and the name that it has there.
        self._stored = {
            self.family.tensor_name(name): (file, name)
            for file in files
            for name in file.keys()  # noqa: SIM118 (safe_open is no mapping)
            if not name.endswith(self.family.ignored or ("\0",))
        }
        slices = {name: file.get_slice(old) for name, (file, old) in self._stored.items()}
        self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        self.config = self.family.config_from_hf(hf_config | {"tensors": self.shapes})
        odd = {
            name: kind for name, part in slices.items() if (kind := part.get_dtype()) not in FLOATS
        }
        if odd:
            name, kind = min(odd.items())
            raise UserError(
                f"{directory}: {len(odd)} tensors are of none of the types {sorted(FLOATS)} (the "
                f"first: {name}, {kind}); export the model unquantised"
            )

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored type."""
        file, stored = self._stored[name]
        return file.get_tensor(stored)


def _read_config(directory: Path) -> dict[str, Any]:
    """A Hugging Face config that transformers has checked."""
    try:
        return transformers.AutoConfig.from_pretrained(directory).to_dict()
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{directory / 'config.json'}: {reason}") from error


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
        raise UserError(
            f"{path}: no such weights file, only {pickled}, and pickle files are not read: they "
            f"may run code; where torch is installed, convert them: {_convert(path.parent)}"
        )
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a complete safetensors file: {error}") from error


def _convert(directory: Path) -> str:
    code = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        "d, o = sys.argv[1:]; M.from_pretrained(d).save_pretrained(o); "
        "T.from_pretrained(d).save_pretrained(o)"
    )
    target = directory.with_name(f"{directory.name}-safetensors")
    return shlex.join(["python", "-c", f"import sys; {code}", str(directory), str(target)])
