# Sourced by the launchers, which run on Linux and macOS (bash 3.2): one-line errors, commands
# printed or run, and running again what was saved because of a signal.
# shellcheck shell=bash

# uld-jax: "I was told to stop and have saved everything; run me again" (EX_TEMPFAIL).
readonly SAVED=75
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly ROOT
dry_run="${ULD_JAX_DRY_RUN:-0}"

fail() { # MESSAGE
  echo "error: $1" >&2
  exit 2
}

show_help() { # SCRIPT: its header comment
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$1"
  exit 0
}

quoted() { # WORD...: one line that a POSIX shell reads as these words
  local word line="" quote="'" escaped="'\\''"
  for word in "$@"; do
    case "$word" in
      *$'\n'*) fail "$(printf %q "$word"): an argument with a line break cannot be passed on" ;;
      "" | *[!A-Za-z0-9_./:=@%+,-]*) line+=" '${word//$quote/$escaped}'" ;;
      *) line+=" $word" ;;
    esac
  done
  printf '%s\n' "${line# }"
}

run() { # COMMAND...: runs it, or with --dry-run prints it
  if [ "$dry_run" = 1 ]; then
    quoted "$@"
  else
    "$@"
  fi
}

pack() { # DIRECTORY [PATH...]: DIRECTORY/uld_jax.tar.gz, what a machine needs of the repository
  run mkdir -p "$1" &&
    run env COPYFILE_DISABLE=1 tar -czf "$1/uld_jax.tar.gz" -C "$ROOT" --exclude=__pycache__ \
      LICENSE README.md configs launch pyproject.toml uld_jax "${@:2}"
}

read_word() { # WORD: sets $action, then $name
  case "$1" in
    -*) fail "unknown flag $1 (flags are written --name=value); --help lists them" ;;
  esac
  if [ -z "$action" ]; then
    action="$1"
  elif [ -z "$name" ]; then
    name="$1"
  else
    fail "unexpected argument $1: what follows -- goes to uld-jax"
  fi
}

required() { # FLAG VALUE: dies unless what $action needs is there
  [ -n "$2" ] || fail "$action needs $1; --help shows how"
}

check_files() { # SECRETS [PATH...]: a file of them or "", and what is shipped
  local path
  [ -z "$1" ] || [ -f "$1" ] || fail "--secrets=$1: no such file"
  for path in "${@:2}"; do
    [ -e "$ROOT/$path" ] || fail "--ship=$path: not in the repository, $ROOT"
  done
}

check_command() { # [WORD...]: what follows --, for uld-jax
  local word
  [ $# -gt 0 ] || fail "run needs a uld-jax command after --; --help shows how"
  quoted "$@" >/dev/null
  for word in "$@"; do
    [ "$word" != --dry-run ] || fail "--dry-run goes before --: what follows is uld-jax's"
  done
}

count() { # FLAG VALUE: dies unless the value is a whole number
  case "$2" in
    "" | *[!0-9]*) fail "$1=$2: expected a whole number" ;;
  esac
}

while_saved() { # MOST COMMAND...: runs it again, at most MOST times, while it ends with SAVED
  local most="$1" restarts=0 status
  shift
  while :; do
    status=0
    "$@" || status=$?
    if [ "$status" != "$SAVED" ]; then
      return "$status"
    fi
    if [ "$restarts" -ge "$most" ]; then
      echo "saved, and restarted $most times already: the same command goes on from here" >&2
      return "$SAVED"
    fi
    restarts=$((restarts + 1))
    echo "saved because of a signal: restart $restarts of at most $most" >&2
  done
}
