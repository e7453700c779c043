#!/usr/bin/env bash
# Runs vjepa_jax.main as N processes of this machine, joined over loopback.
#
#   launch/local_multiprocess.sh [--restarts=K] N -- ARGUMENTS OF vjepa_jax.main
#
# Each line of output begins with [i]. SIGTERM and SIGINT go to all processes. The exit
# code is the first bad one (76, "another process was lost", only where there is no
# other). After 75, 76, 137 and 143 all are started again, at most K times (default 0),
# unless this script was told to stop.
#
# Environment: PYTHON, the interpreter (python); JAX_PLATFORMS (cpu); CPU_DEVICES, the
# virtual devices of each process (1); GRACE_S, how long the others have to end after
# the first bad exit (90).
set -euo pipefail
export LC_ALL=C

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python}
GRACE_S=${GRACE_S:-90}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${CPU_DEVICES:-1}"
export PYTHONUNBUFFERED=1

usage() {
  echo "usage: ${0##*/} [--restarts=K] N -- ARGUMENTS OF vjepa_jax.main; $1" >&2
  exit 2
}

restarts=0
count=
while (($#)); do
  case $1 in
    --restarts=*) restarts=${1#*=} ;;
    --) break ;;
    *) count=$1 ;;
  esac
  shift
done
[[ ${1:-} == -- ]] || usage "'--' is missing before the arguments"
shift
[[ $count =~ ^[1-9][0-9]*$ ]] || usage "N is '$count', must be a whole number from 1"
[[ $restarts =~ ^[0-9]+$ ]] || usage "K is '$restarts', must be a whole number"

say() {
  echo "${0##*/}: $*" >&2
}

pids=()
stopped=

forward() {
  stopped=1
  local pid
  for pid in "${pids[@]}"; do
    kill -s "$1" "$pid" 2>/dev/null || true
  done
}
trap 'forward TERM' TERM
trap 'forward INT' INT

# Prefixes lines until the process closes its output, whatever signal comes.
label() {
  trap '' INT TERM
  sed -u "s/^/[$1] /"
}

start() {
  local port i
  port=$("$PYTHON" -c 'import socket
s = socket.socket()
s.bind(("", 0))
print(s.getsockname()[1])')
  pids=()
  # Jobs of their own: else they ignore SIGINT, or Ctrl-C reaches them twice.
  set -m
  for ((i = 0; i < count; i++)); do
    "$PYTHON" -m vjepa_jax.main --coordinator="localhost:$port" --processes="$count" \
      --process_id="$i" "$@" > >(label "$i") 2>&1 </dev/null &
    pids+=("$!")
  done
  set +m
}

# Waits for all; sets CODE.
finish() {
  local pid code deadline='' left
  CODE=0
  while ((${#pids[@]})); do
    left=()
    for pid in "${pids[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        left+=("$pid")
        continue
      fi
      code=0
      wait "$pid" 2>/dev/null || code=$?
      ((code == 0)) || deadline=${deadline:-$((SECONDS + GRACE_S))}
      if ((code && (CODE == 0 || CODE == 76))); then
        CODE=$code
      fi
    done
    pids=("${left[@]+"${left[@]}"}")
    if [[ -n $deadline ]] && ((SECONDS > deadline && ${#pids[@]})); then
      say "${#pids[@]} process(es) did not end within $GRACE_S s; killed"
      kill -KILL "${pids[@]}" 2>/dev/null || true
      deadline=$((SECONDS + GRACE_S))
    fi
    ((${#pids[@]} == 0)) || sleep 0.1
  done
}

for ((attempt = 0; ; attempt++)); do
  start "$@"
  finish
  case $CODE in
    75 | 76 | 137 | 143) ;;
    *) exit "$CODE" ;;
  esac
  if [[ -n $stopped ]] || ((attempt >= restarts)); then
    exit "$CODE"
  fi
  say "exit code $CODE; start $((attempt + 2)) of at most $((restarts + 1))"
  sleep 1
done
