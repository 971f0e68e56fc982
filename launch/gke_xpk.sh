#!/usr/bin/env bash
# Distils on a GKE cluster of TPUs, through xpk (pip install xpk). Needs gcloud, logged in, kubectl,
# and docker or crane, with which xpk builds the image.
#
#   bash launch/gke_xpk.sh create-cluster  --cluster=C --zone=ZONE --tpu-type=v5litepod-16 [--spot]
#   bash launch/gke_xpk.sh run NAME        --cluster=C --zone=ZONE --tpu-type=v5litepod-16 \
#                                          -- train --config=FILE.py --workdir=/mnt/...
#   bash launch/gke_xpk.sh logs NAME       --cluster=C --zone=ZONE     the first worker's
#   bash launch/gke_xpk.sh wait NAME       --cluster=C --zone=ZONE     until it has ended
#   bash launch/gke_xpk.sh fetch           --workdir=gs://... --to=LOCAL_DIR
#   bash launch/gke_xpk.sh delete NAME     --cluster=C --zone=ZONE
#   bash launch/gke_xpk.sh delete-cluster  --cluster=C --zone=ZONE
#
#   --project=ID            instead of gcloud's default
#   --num-slices=N          N slices joined by the data centre's network
#   --docker-image=IMAGE    has uld-jax installed already; else one is built from the repository
#   --base-docker-image=I   on which that one is built: python:3.12
#   --ship=PATH             another file or directory of the repository; repeatable
#   --secrets=FILE          KEY=VALUE lines, the command's environment (HF_TOKEN, WANDB_API_KEY); xpk
#                           reads the file, and writes them into the workload's manifest
#   --xpk-flag=FLAG         a flag for create-cluster and run, e.g. --xpk-flag=--priority=high
#   --max-restarts=N        how often Kubernetes starts again what saved because of a signal, or
#                           whose machine is gone: 100
#   --grace=SECONDS         between SIGTERM and SIGKILL: 120; a spot machine has less
#   --dry-run               print the commands, run none
#
# The workdir must outlive a pod: on a volume of the cluster (--xpk-flag=--storage=NAME).
# Of uld-jax's exit statuses only 75 (saved because of a signal) is started again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

action="" name="" cluster="" zone="" project="" tpu_type="" image="" base=python:3.12 secrets=""
workdir="" destination="" slices=1 spot=0 most=100 grace=120
xpk_flags=() ship=() command=()

read_arguments() {
  while [ $# -gt 0 ]; do
    case "$1" in
      -h | --help) show_help "$0" ;;
      --) shift && command=("$@") && break ;;
      --cluster=*) cluster="${1#*=}" ;;
      --zone=*) zone="${1#*=}" ;;
      --project=*) project="${1#*=}" ;;
      --tpu-type=*) tpu_type="${1#*=}" ;;
      --num-slices=*) count --num-slices "${1#*=}" && slices="${1#*=}" ;;
      --spot) spot=1 ;;
      --docker-image=*) image="${1#*=}" ;;
      --base-docker-image=*) base="${1#*=}" ;;
      --ship=*) ship+=("${1#*=}") ;;
      --secrets=*) secrets="${1#*=}" ;;
      --xpk-flag=*) xpk_flags+=("${1#*=}") ;;
      --max-restarts=*) count --max-restarts "${1#*=}" && most="${1#*=}" ;;
      --grace=*) count --grace "${1#*=}" && grace="${1#*=}" ;;
      --workdir=*) workdir="${1#*=}" ;;
      --to=*) destination="${1#*=}" ;;
      --dry-run) dry_run=1 ;;
      *) read_word "$1" ;;
    esac
    shift
  done
}

check_arguments() {
  case "$action" in
    fetch)
      required --workdir=gs://... "$workdir"
      required --to=LOCAL_DIR "$destination"
      return
      ;;
    create-cluster | delete-cluster) ;;
    run | logs | wait | delete) required NAME "$name" ;;
    *)
      fail "expected create-cluster, run, logs, wait, fetch, delete or delete-cluster, not '$action'"
      ;;
  esac
  required --cluster=NAME "$cluster"
  required --zone=ZONE "$zone"
  case "$action" in
    create-cluster | run) required --tpu-type=TYPE "$tpu_type" ;;
  esac
  if [ "$action" = run ]; then
    check_command ${command[@]+"${command[@]}"}
  fi
  check_files "$secrets" ${ship[@]+"${ship[@]}"}
}

xpk_here() { # COMMAND...: with the cluster's place
  run xpk "$@" --cluster="$cluster" --zone="$zone" ${project:+"--project=$project"}
}

create_cluster() {
  local capacity=--on-demand
  [ "$spot" = 0 ] || capacity=--spot
  xpk_here cluster create --tpu-type="$tpu_type" --num-slices="$slices" "$capacity" \
    ${xpk_flags[@]+"${xpk_flags[@]}"}
}

run_workload() {
  local words source staging="${ULD_JAX_CACHE:-$HOME/.cache/uld_jax}/launch/$name"
  # xpk signals its command's shell: exec, so that this is uld-jax.
  words="exec $(quoted uld-jax "${command[@]}")"
  if [ -n "$image" ]; then
    source=(--docker-image="$image")
  else
    pack "$staging" ${ship[@]+"${ship[@]}"}
    run rm -rf "$staging/image"
    run mkdir -p "$staging/image"
    run tar -xzf "$staging/uld_jax.tar.gz" -C "$staging/image"
    source=(--base-docker-image="$base" --script-dir="$staging/image")
    words="pip install --quiet --root-user-action=ignore '.[tpu]' && $words"
  fi
  xpk_here workload create --workload="$name" --tpu-type="$tpu_type" --num-slices="$slices" \
    "${source[@]}" ${secrets:+"--env-file=$secrets"} --max-restarts="$most" \
    --restart-on-exit-codes="$SAVED" --termination-grace-period-seconds="$grace" \
    ${xpk_flags[@]+"${xpk_flags[@]}"} --command="$words"
}

logs() {
  local first="batch.kubernetes.io/job-completion-index=0,jobset.sigs.k8s.io/job-index=0"
  # A zone's region is what precedes its last part.
  run gcloud container clusters get-credentials "$cluster" --region="${zone%-*}" \
    ${project:+"--project=$project"}
  run kubectl logs --follow --tail=-1 --selector="xpk.google.com/workload=$name,$first"
}

fetch() {
  run mkdir -p "$destination"
  run gcloud storage rsync --recursive "$workdir" "$destination"
}

read_arguments "$@"
check_arguments
case "$action" in
  create-cluster) create_cluster ;;
  run) run_workload ;;
  logs) logs ;;
  wait) xpk_here workload list --wait-for-job-completion="$name" ;;
  fetch) fetch ;;
  delete) xpk_here workload delete --workload="$name" --force ;;
  delete-cluster) xpk_here cluster delete --force ;;
esac
