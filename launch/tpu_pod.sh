#!/usr/bin/env bash
# Distils on a Cloud TPU slice, or on several: rents it, installs uld_jax, runs a uld-jax command on
# all workers, and gives it back. Needs gcloud, logged in.
#
#   bash launch/tpu_pod.sh create NAME --zone=ZONE --accelerator-type=v5litepod-16 [--spot]
#   bash launch/tpu_pod.sh setup  NAME --zone=ZONE [--secrets=FILE] [--ship=PATH ...]
#   bash launch/tpu_pod.sh run    NAME --zone=ZONE -- train --config=FILE.py --workdir=/mnt/...
#   bash launch/tpu_pod.sh logs   NAME --zone=ZONE       the output so far, and what follows
#   bash launch/tpu_pod.sh stop   NAME --zone=ZONE       save and end; `run` ends with 143
#   bash launch/tpu_pod.sh fetch  NAME --zone=ZONE --workdir=DIR --to=LOCAL_DIR
#   bash launch/tpu_pod.sh delete NAME --zone=ZONE
#
#   --project=ID            instead of gcloud's default
#   --num-slices=N          N slices joined by the data centre's network; give it to every command
#   --tpu-vm                create and delete a TPU VM directly, not through a queued resource
#   --version=VERSION       the TPU's software; known for v2 to v6e
#   --create-flag=FLAG      a flag for gcloud's create, e.g. --create-flag=--reserved; repeatable
#   --internal-ip           ssh inside the network
#   --secrets=FILE          KEY=VALUE lines, the command's environment (HF_TOKEN, WANDB_API_KEY);
#                           copied as a file that only you can read, never put on a command line
#   --ship=PATH             another file or directory of the repository; repeatable
#   --max-restarts=N        how often `run` starts again what was saved because of a signal: 100
#   --recreate              `run` also replaces slices that were pre-empted, by the flags of create
#                           and setup; needs a workdir elsewhere, as their disks are gone
#   --poll=SECONDS          between two looks at a queued resource: 30
#   --dry-run               print the commands, run none
#
# The command goes on when this script or its connection ends: the same `run` follows it again. More
# than one worker needs a workdir that all of them see (Filestore, a bucket mounted with gcsfuse).
# The exit status is the command's: 0 done, 2 bad input, 75 saved because of a signal and out of
# restarts.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

action="" name="" zone="" project="" accelerator="" version="" workdir="" destination="" secrets=""
slices=1 kind=queued-resources spot=0 recreate=0 most=100 poll=30
create_flags=() ship=() connection=() command=()

read_arguments() {
  while [ $# -gt 0 ]; do
    case "$1" in
      -h | --help) show_help "$0" ;;
      --) shift && command=("$@") && break ;;
      --zone=*) zone="${1#*=}" ;;
      --project=*) project="${1#*=}" ;;
      --accelerator-type=*) accelerator="${1#*=}" ;;
      --version=*) version="${1#*=}" ;;
      --num-slices=*) count --num-slices "${1#*=}" && slices="${1#*=}" ;;
      --tpu-vm) kind=tpu-vm ;;
      --spot) spot=1 ;;
      --create-flag=*) create_flags+=("${1#*=}") ;;
      --internal-ip) connection+=("$1") ;;
      --secrets=*) secrets="${1#*=}" ;;
      --ship=*) ship+=("${1#*=}") ;;
      --workdir=*) workdir="${1#*=}" ;;
      --to=*) destination="${1#*=}" ;;
      --max-restarts=*) count --max-restarts "${1#*=}" && most="${1#*=}" ;;
      --recreate) recreate=1 ;;
      --poll=*) count --poll "${1#*=}" && poll="${1#*=}" ;;
      --dry-run) dry_run=1 ;;
      *) read_word "$1" ;;
    esac
    shift
  done
}

check_arguments() {
  case "$action" in
    create | setup | run | logs | stop | fetch | delete) ;;
    *) fail "expected create, setup, run, logs, stop, fetch or delete, not '$action'" ;;
  esac
  required NAME "$name"
  required --zone=ZONE "$zone"
  [ "$slices" -ge 1 ] || fail "--num-slices=$slices: expected at least 1"
  [ "$slices" = 1 ] || [ "$kind" != tpu-vm ] || fail "--tpu-vm makes one slice, not $slices"
  if [ "$action" = create ] || [ "$recreate" = 1 ]; then
    required --accelerator-type=TYPE "$accelerator"
    find_version
  fi
  if [ "$action" = run ]; then
    check_command ${command[@]+"${command[@]}"}
  fi
  if [ "$recreate" = 1 ]; then
    case " ${command[*]-} " in
      *" --workdir=/"* | *" --workdir /"*) ;;
      *) fail "--recreate needs --workdir=/... on a mount: a slice's disks do not outlive it" ;;
    esac
  fi
  if [ "$action" = fetch ]; then
    required --workdir=DIR "$workdir"
    required --to=LOCAL_DIR "$destination"
  fi
  check_files "$secrets" ${ship[@]+"${ship[@]}"}
}

find_version() {
  if [ -z "$version" ]; then
    case "$accelerator" in
      v6e-*) version=v2-alpha-tpuv6e ;;
      v5p-*) version=v2-alpha-tpuv5 ;;
      v5litepod-*) version=v2-alpha-tpuv5-lite ;;
      v[234]-*) version=tpu-ubuntu2204-base ;;
      *) fail "--accelerator-type=$accelerator: not one whose software is known; give --version" ;;
    esac
  fi
}

tpus() { # KIND COMMAND NAME [ARGUMENT...]: gcloud compute tpus KIND COMMAND NAME ...
  run gcloud compute tpus "$@" --zone="$zone" ${project:+"--project=$project"}
}

nodes() { # the slices' names, as queued resources number them
  local number
  if [ "$slices" = 1 ]; then
    echo "$name"
  else
    for ((number = 0; number < slices; number++)); do
      echo "$name-$number"
    done
  fi
}

on_nodes() { # FUNCTION ARGUMENT...: calls it for every slice at once; the worst status
  # gcloud reports the first worker that failed. Its ssh for queued resources serves 64 workers at
  # a time, which would let the others wait for ever.
  local node pid one status=0 pids=()
  for node in $(nodes); do
    if [ "$dry_run" = 1 ]; then
      "$1" "$node" "${@:2}"
    else
      "$1" "$node" "${@:2}" &
      pids+=($!)
    fi
  done
  trap 'kill ${pids[@]+"${pids[@]}"} 2>/dev/null || true; exit 130' INT TERM
  for pid in ${pids[@]+"${pids[@]}"}; do
    one=0
    wait "$pid" || one=$?
    if [ "$status" = 0 ] || { [ "$status" = "$SAVED" ] && [ "$one" != 0 ]; }; then
      status="$one"
    fi
  done
  trap - INT TERM
  return "$status"
}

ssh_to() { # NODE WORKERS WORD...: the words are one command there
  tpus tpu-vm ssh "$1" --worker="$2" ${connection[@]+"${connection[@]}"} \
    --command="$(quoted "${@:3}")"
}

shell_on() { # NODE SCRIPT: on all workers
  tpus tpu-vm ssh "$1" --worker=all ${connection[@]+"${connection[@]}"} --command="$2"
}

copy_to() { # NODE FILE PLACE
  tpus tpu-vm scp "$2" "$1:$3" --worker=all ${connection[@]+"${connection[@]}"}
}

create() {
  local flags=(--accelerator-type="$accelerator")
  [ "$spot" = 0 ] || flags+=(--spot)
  flags+=(${create_flags[@]+"${create_flags[@]}"})
  if [ "$kind" = tpu-vm ]; then
    tpus tpu-vm create "$name" --version="$version" "${flags[@]}"
    return
  fi
  if [ "$slices" = 1 ]; then
    flags+=(--node-id="$name")
  else
    flags+=(--node-count="$slices" --node-prefix="$name")
  fi
  tpus queued-resources create "$name" --runtime-version="$version" "${flags[@]}" &&
    wait_until_active
}

state() {
  local field=state
  [ "$kind" = tpu-vm ] || field=state.state
  tpus "$kind" describe "$name" --format="value($field)"
}

wait_until_active() {
  local now
  while :; do
    now="$(state)" || return
    case "$now" in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        echo "error: $name is $now; delete it, and create it again" >&2
        return 1
        ;;
      gcloud*) echo "$now" && return ;; # --dry-run
    esac
    echo "$name: $now" >&2
    sleep "$poll"
  done
}

set_up() {
  local staging="${ULD_JAX_CACHE:-$HOME/.cache/uld_jax}/launch/$name"
  pack "$staging" ${ship[@]+"${ship[@]}"} &&
    on_nodes shell_on "install -d -m 700 .config/uld_jax && mkdir -p uld_jax" &&
    on_nodes copy_to "$staging/uld_jax.tar.gz" uld_jax.tar.gz || return
  if [ -n "$secrets" ]; then
    on_nodes copy_to "$secrets" .config/uld_jax/secrets.env || return
  fi
  # What an older version had and this one has not must not be imported.
  on_nodes shell_on "cd uld_jax && rm -rf uld_jax configs launch && tar -xzf ../uld_jax.tar.gz && \
bash launch/worker.sh setup"
}

run_once() { # on all workers; replaced slices count as a restart
  local status=0
  on_nodes ssh_to all bash uld_jax/launch/worker.sh run uld-jax "${command[@]}" || status=$?
  if [ "$status" = 0 ] || [ "$recreate" = 0 ] || [ "$dry_run" = 1 ]; then
    return "$status"
  fi
  case "$(state || true)" in
    ACTIVE | READY) return "$status" ;;
  esac
  echo "$name was pre-empted (status $status): another is created" >&2
  delete || true
  create && set_up && return "$SAVED"
}

fetch() {
  run mkdir -p "$destination"
  case "$workdir" in
    gs://*) run gcloud storage rsync --recursive "$workdir" "$destination" ;;
    *) fetch_from "$(nodes | sed -n 1p)" ;;
  esac
}

fetch_from() { # NODE: its first worker's disk, as a stream: names of any kind survive
  local place="$workdir" there here
  case "$place" in
    /*) ;;
    *) place="uld_jax/$place" ;;
  esac
  there=(ssh_to "$1" 0 tar -czf - -C "$place" .)
  here=(tar -xzf - -C "$destination")
  if [ "$dry_run" = 1 ]; then
    echo "$("${there[@]}") | $(quoted "${here[@]}")"
  else
    "${there[@]}" | "${here[@]}"
  fi
}

delete() {
  if [ "$kind" = tpu-vm ]; then
    tpus tpu-vm delete "$name" --quiet
  else
    tpus queued-resources delete "$name" --force --quiet
  fi
}

read_arguments "$@"
check_arguments
case "$action" in
  setup) set_up ;;
  run) while_saved "$most" run_once ;;
  logs) ssh_to "$(nodes | sed -n 1p)" 0 bash uld_jax/launch/worker.sh logs ;;
  stop) on_nodes ssh_to all bash uld_jax/launch/worker.sh stop ;;
  *) "$action" ;;
esac
