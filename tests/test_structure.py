"""Budgets and imports: files and functions stay short, importing has no side effects."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "uld_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 400, 60


def _code_lines(function):
    """Lines of a function without its docstring: documentation is not to be kept short."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function):
        doc = function.body[0]
        lines -= doc.end_lineno - doc.lineno + 1
    return lines


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short_and_annotated(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef):
            continue
        assert _code_lines(node) <= MAX_FUNCTION, node.name
        if not node.name.startswith("_"):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [
                a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")
            ]
            assert not bare, f"{node.name}: {bare} have no type"
            assert node.returns is not None, f"{node.name} has no return type"


def _modules_after(statement):
    code = f"import sys; {statement}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    env = {**os.environ, "XLA_FLAGS": ""}
    run = [sys.executable, "-c", code]
    return set(
        subprocess.run(run, capture_output=True, text=True, check=True, env=env).stdout.split()
    )


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import uld_jax", {"jax", "flax", "numpy", "transformers"}),
        ("import uld_jax.data", {"jax", "flax", "tensorflow", "torch", "tensorflow_datasets"}),
        ("import uld_jax.losses", {"flax", "transformers", "ml_collections", "torch"}),
        ("import uld_jax.cli.main", {"jax", "flax", "torch"}),
        ("import uld_jax.cli.train", {"tensorflow", "tensorflow_datasets", "matplotlib"}),
    ],
)
def test_imports_bring_in_no_more_than_they_need(statement, absent):
    assert not _modules_after(statement) & absent


def test_importing_has_no_side_effects():
    code = """
import os
import flax, grain, jax, orbax.checkpoint, tensorboardX
import transformers.modeling_rope_utils
before = dict(os.environ)  # dependencies set some; we set none
import uld_jax.cli.train, uld_jax.cli.generate, uld_jax.cli.evaluate, uld_jax.cli.export
import uld_jax.testing
import jax
from jax._src import xla_bridge
assert dict(os.environ) == before, "the environment changed"
assert not xla_bridge._backends, "a device was initialised"
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
