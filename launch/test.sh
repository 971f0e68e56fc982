#!/usr/bin/env bash
# Installs the extras test, plan and ot and runs everything a change must pass: formatting, lint,
# types, layers, tests and the documentation's examples.
#
#   bash launch/test.sh            the suite (under 40 minutes on 2 cores)
#   bash launch/test.sh --slow     with the tests marked slow
#   bash launch/test.sh ARG ...    further arguments go to pytest, e.g. tests/losses -k fused
#
# ULD_JAX_ACTIVE_ENV=1 uses the active Python environment instead of making .venv.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

install -e '.[test,plan,ot]'
bash launch/fetch_models.sh || echo "without the two models, the tests that need them are skipped"

marker="not slow and not served"
if [ "${1:-}" = --slow ]; then
  marker="not served"
  shift
fi
ruff check .
ruff format --check .
pyright --pythonpath "$PYTHON"
lint-imports
# Two processes: compiling for tiny models keeps one core busy each.
python -m pytest -n 2 -m "$marker" "$@"
