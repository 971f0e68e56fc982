# Sourced by the other scripts: makes and enters .venv, or with ULD_JAX_ACTIVE_ENV=1 uses the
# environment that is active, and installs uld_jax with the extras given as arguments.
# shellcheck shell=bash

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

if [ "${ULD_JAX_ACTIVE_ENV:-0}" = 1 ]; then
  PYTHON="$(command -v python3)"
else
  if [ ! -x .venv/bin/python ]; then
    for base in python3.13 python3.12 python3.11 python3; do
      if "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        break
      fi
    done
    "$base" -m venv .venv || {
      echo "error: no Python >= 3.11 with venv found; install one and run this again" >&2
      exit 2
    }
  fi
  PYTHON="$PWD/.venv/bin/python"
  export PATH="$PWD/.venv/bin:$PATH"
fi
export PYTHON

install() { # REQUIREMENT...
  "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@"
}

# XLA programs are kept between runs: the second start compiles nothing.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-${ULD_JAX_CACHE:-$HOME/.cache/uld_jax}/xla}"
