#!/usr/bin/env bash
# One worker's part of launch/tpu_pod.sh, which copies this file there and calls it by ssh:
#
#   worker.sh setup            installs Python (if there is none >= 3.11) and uld_jax[tpu]
#   worker.sh run COMMAND...   starts the command and follows it; ends with its exit status
#   worker.sh logs             follows its output, from the start
#   worker.sh stop             sends it SIGTERM, and waits until it has saved and ended
#
# The command does not hang on the connection: when that breaks it goes on, and the same `run`
# follows it again. It reads KEY=VALUE lines from ~/.config/uld_jax/secrets.env as its environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
secrets="$HOME/.config/uld_jax/secrets.env"
state="$PWD/.worker"

running() { # the supervisor holds the lock as long as it lives
  ! flock --nonblock "$state/lock" true
}

set_up() {
  local python
  for python in .venv/bin/python python3.13 python3.12 python3.11 python3; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      break
    fi
    python=""
  done
  if [ -z "$python" ]; then # Ubuntu 22.04, the TPU runtimes' system, has 3.10.
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --seed --python 3.12 .venv
  fi
  source launch/environment.sh
  install -e '.[tpu]'
}

read_secrets() {
  local line
  if [ -f "$secrets" ]; then
    while IFS= read -r line || [ -n "$line" ]; do
      case "$line" in
        "" | "#"*) ;;
        [A-Za-z_]*=*) export "${line?}" ;;
        *) echo "error: $secrets: expected lines KEY=VALUE and comments" >&2 && exit 2 ;;
      esac
    done <"$secrets"
  fi
}

supervise() { # COMMAND...: runs it, and leaves its exit status
  local status=0
  # A machine that shuts down signals everything: the status must still be written.
  trap : TERM
  bash launch/worker.sh recorded "$@" >>"$state/log" 2>&1 9>&- || status=$?
  echo "$status" >"$state/status.new"
  mv "$state/status.new" "$state/status"
}

follow() { # output until the command has ended, then its status
  tail --bytes="+$(cat "$state/first")" --sleep-interval=0.2 \
    --pid="$(cat "$state/supervisor")" --follow=descriptor "$state/log"
  if [ ! -f "$state/status" ]; then
    echo "error: $(hostname): the command was killed and left no exit status" >&2
    exit 1
  fi
  if [ -f "$state/stopped" ]; then # on purpose: nobody is to start it again
    exit 143
  fi
  exit "$(cat "$state/status")"
}

start() { # COMMAND...
  # The supervisor inherits the lock and keeps it while the command runs.
  exec 9>>"$state/lock"
  if ! flock --nonblock 9; then
    if [ "$(cat "$state/command")" != "$(printf '%q ' "$@")" ]; then
      echo "error: $(hostname) runs another command: $(cat "$state/command")" >&2
      exit 2
    fi
    exec 9>&-
    follow
  fi
  source launch/environment.sh
  read_secrets
  rm -f "$state/status" "$state/pid" "$state/stopped"
  touch "$state/log"
  echo $(($(wc -c <"$state/log") + 1)) >"$state/first"
  printf '%q ' "$@" >"$state/command"
  setsid bash launch/worker.sh supervise "$@" </dev/null >/dev/null 2>&1 &
  echo $! >"$state/supervisor"
  exec 9>&-
  follow
}

stop() {
  while running; do
    if [ -s "$state/pid" ]; then
      touch "$state/stopped"
      kill -TERM "$(cat "$state/pid")"
      flock "$state/lock" true
      echo "$(hostname): ended with status $(cat "$state/status")"
    fi
    sleep 0.2
  done
}

action="${1:-}"
case "$action" in
  setup | run | supervise | recorded | logs | stop) shift ;;
  *) echo "error: expected setup, run, logs or stop, not '$action'" >&2 && exit 2 ;;
esac
mkdir -p "$state"
case "$action" in
  setup) set_up ;;
  run) start "$@" ;;
  supervise) supervise "$@" ;;
  recorded) echo $$ >"$state/pid" && exec "$@" ;;
  logs) tail --bytes=+1 --follow=name --retry "$state/log" ;;
  stop) stop ;;
esac
