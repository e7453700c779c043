#!/usr/bin/env bash
# The worker's side of tpu_pod.sh and gpu.sh, which copy it to each host and call it
# as `bash FOLDER/worker.sh VERB ...`. It stands beside code/, venv/ and runs/, asks
# nothing of the login shell, and marks every line with the worker's number; the last
# line of a verb that went well is "worker N: ok VERB".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export LC_ALL=C
# What a failed start of the TPU or of the cluster looks like in the log: no fault of
# the program, so it is worth a new start.
readonly INIT_FAILED='Unable to initialize backend .tpu|TPU initialization failed|'\
'Failed to get global TPU topology|The TPU is already in use|'\
'No (TPU|accelerator) (devices|chips) (were )?found|'\
'(open|opening).*/dev/(accel|vfio).*(busy|EBUSY)|'\
'DEADLINE_EXCEEDED.*(Barrier|coordination|RegisterTask)'

# The number of this worker: told by gpu.sh, else by name or metadata of a TPU VM.
number() {
  local url=http://metadata.google.internal/computeMetadata/v1/instance/attributes
  if [[ -n ${VJEPA_WORKER:-} ]]; then
    echo "$VJEPA_WORKER"
  elif [[ $(hostname) =~ -w-([0-9]+)$ ]]; then
    echo "${BASH_REMATCH[1]}"
  else
    curl -sf -m 5 -H "Metadata-Flavor: Google" "$url/agent-worker-number" || echo 0
  fi
}

fail() {
  echo "$1" >&2
  exit "${2:-1}"
}

# Hash of the files named in code/.files, as common.sh computes it on the other side.
code_hash() {
  (cd code && tr '\n' '\0' <.files | xargs -0 sha256sum | sha256sum | cut -c1-16)
}

# unpack HASH: puts code.tgz in the place of code/, if it is what was sent.
unpack() {
  local hash
  rm -rf code.new && mkdir code.new
  tar -xzf code.tgz -C code.new || fail "code.tgz is damaged; run sync again"
  mkdir -p runs && ln -sfn ../runs code.new/runs
  rm -rf code.old
  [[ ! -e code ]] || mv code code.old
  mv code.new code && rm -rf code.old
  hash=$(code_hash)
  [[ $hash == "$1" ]] || fail "code $hash, but $1 was sent; run sync again"
  echo "code $hash"
  if [[ -s installed && $(cut -d' ' -f1 installed) != "$(wants)" ]]; then
    echo "setup.py has changed since the installation; run setup"
  fi
}

wants() {
  sha256sum <code/setup.py | cut -c1-16
}

# install PYTHON WHAT: an environment with WHAT in it; WHAT none: PYTHON as it is.
install() {
  local python=$1 what=$2 uv
  if [[ $what == none ]]; then
    python=$(command -v "$python") || fail "$1: no such python; name one by --python="
    "$python" -c "import sys; sys.exit(sys.version_info < (3, 11))" ||
      fail "$python is older than 3.11; name another by --python="
    take_python "$python"
    echo "python $python as it is, nothing installed"
  else
    uv=$(find_uv)
    [[ -x venv/bin/python ]] || "$uv" venv --quiet --python "$python" venv
    (cd code && "$uv" pip install --quiet --python ../venv/bin/python -e "$what") ||
      fail "pip install -e '$what' failed; is there a way to pypi.org (--internal_ips)?"
    take_python "$PWD/venv/bin/python"
    echo "$(./python --version) with $what"
  fi
  echo "$(wants) $what" >installed
}

# No link: python finds its environment by the path that it is started under.
take_python() {
  printf '#!/bin/sh\nexec %q "$@"\n' "$1" >python
  chmod +x python
}

# uv fetches a python where the system's is too old (TPU images have 3.10), and needs
# no ensurepip, which Ubuntu's python lacks.
find_uv() {
  local found
  for found in "$(command -v uv || true)" "$HOME/.local/bin/uv"; do
    if [[ -x $found ]]; then
      echo "$found"
      return
    fi
  done
  python3 -m pip install --quiet --user uv >&2 ||
    curl -LsSf https://astral.sh/uv/install.sh | sh >&2 ||
    fail "cannot install uv; put it on this worker's PATH, or use --install=none"
  echo "$HOME/.local/bin/uv"
}

need_python() {
  [[ -x python ]] || fail "no python here; run setup first"
}

# check HASH: that the code is what was sent, and that it can be imported.
check() {
  local found
  need_python
  found=$(code_hash)
  [[ $1 == - || $1 == "$found" ]] ||
    fail "code is $found, yours is $1; run sync, and change nothing on the workers"
  (cd code && PYTHONPATH=$PWD ../python -c "import vjepa_jax.main") ||
    fail "python cannot import the library; see above, then run setup again"
}

# gpus COUNT: what the driver sees, which is none of python's business.
gpus() {
  local found
  command -v nvidia-smi >/dev/null || fail "no nvidia-smi; is the driver installed?"
  found=$(nvidia-smi --query-gpu=name --format=csv,noheader) ||
    fail "nvidia-smi failed: $found"
  sort <<<"$found" | uniq -c | sed 's/^ */driver: /'
  (($(wc -l <<<"$found") == $1)) ||
    fail "$(wc -l <<<"$found") GPUs, not $1; a fault of the driver, or of --gpus"
}

# devices LOCAL ALL SECONDS [--env=K=V ...] [-- FLAGS]: those of this worker and of all.
devices() {
  local flags=(--local="$1" --all="$2" --seconds="$3") limit=$(($3 + 60)) code=0
  shift 3
  take_environment "$@"
  cd code
  timeout "$limit" env PYTHONPATH="$PWD" "${environment[@]}" \
    ../python launch/devices.py "${flags[@]}" "${arguments[@]}" || code=$?
  [[ $code != 124 ]] || fail "no answer of the devices in $limit s; does another \
process hold them, or is a worker missing?"
  return "$code"
}

# Splits [--env=K=V ...] [-- ARGS] and fills in who this worker is.
take_environment() {
  environment=() arguments=()
  while (($#)); do
    case $1 in
      --env=*) environment+=("$(filled "${1#--env=}")") ;;
      --) shift && break ;;
    esac
    shift
  done
  local argument
  for argument in "$@"; do
    arguments+=("$(filled "$argument")")
  done
}

filled() {
  local text=${1//'{worker}'/$worker}
  printf %s "${text//'{workers}'/${VJEPA_WORKERS:-1}}"
}

# process PID: its state, group and time of birth; fails where there is none.
process() {
  local stat
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  read -ra stat <<<"${stat##*) }"
  [[ ${stat[0]} != Z ]] && echo "${stat[2]} ${stat[19]}"
}

# Sets pid and succeeds where the run is alive; a pid that another process got after a
# reboot does not count.
alive() {
  local known
  [[ -s run_pid ]] || return 1
  read -r pid known <run_pid
  [[ -n $known && $(process "$pid") == "$known" ]]
}

idle() {
  ! alive || fail "a run is alive (pid $pid); stop it, or use restart" 3
  need_python
}

# start [--env=K=V ...] -- ARGS: python ARGS in code/, detached.
start() {
  idle
  (umask 077 && printf '%s\0' "$@" >last_command)
  rm -f run_pid exit_code stopped
  take_environment "$@"
  echo "=== start $(date -u +%FT%TZ), code $(code_hash): ${arguments[*]}" >>train.log
  wc -c <train.log >begin
  setsid bash worker.sh supervise "$@" </dev/null >>train.log 2>&1 &
  local i
  for ((i = 0; i < 100; i++)); do
    [[ ! -s run_pid ]] || break
    sleep 0.1
  done
  [[ -s run_pid ]] || fail "did not start; see $PWD/train.log"
  echo "started, pid $(cut -d' ' -f1 run_pid), log $PWD/train.log"
}

# again: the command of the last start.
again() {
  [[ -s last_command ]] || fail "nothing was started here yet; use run"
  mapfile -d '' last <last_command
  start "${last[@]}"
}

# told: the last command, for whoever must start it on another machine.
told() {
  [[ -s last_command ]] || fail "nothing was started here yet"
  echo "told $(base64 -w0 <last_command)"
}

supervise() {
  local child code interrupted=1
  take_environment "$@"
  cd code
  env PYTHONUNBUFFERED=1 PYTHONPATH="$PWD" "${environment[@]}" \
    ../python "${arguments[@]}" &
  child=$!
  # A host that shuts down signals everybody: pass it on and wait for the saving.
  trap 'interrupted=1; kill -TERM "$child" 2>/dev/null || true' TERM
  echo "$child $(process "$child" || true)" >../run_pid.new &&
    mv ../run_pid.new ../run_pid
  while ((interrupted)); do
    interrupted=0 code=0
    wait "$child" || code=$?
  done
  echo "=== end $(date -u +%FT%TZ), exit code $code"
  echo "$code" >../exit_code
}

# state: one word or two for the restart loop, and the last step.
state() {
  local step code running=
  # In this order: what has ended has written its last step.
  ! alive || running=1
  step=$(last_step)
  if [[ $running ]]; then
    echo "state running step ${step:--}"
  elif [[ -e stopped ]]; then
    echo "state stopped step ${step:--}"
  elif [[ ! -s last_command ]]; then
    echo "state idle step -"
  else
    # Killed together with its supervisor: nobody was left to note a code.
    code=$(cat exit_code 2>/dev/null || echo 137)
    if [[ $code != 0 && $code != 2 ]] && this_log | grep -qE "$INIT_FAILED"; then
      code=init
    fi
    echo "state $code step ${step:--}"
  fi
}

this_log() {
  tail -c "+$(($(cat begin 2>/dev/null || echo 0) + 1))" train.log 2>/dev/null |
    tail -c 200000
}

last_step() {
  this_log | grep -aoE 'step [0-9]+/[0-9]+' | tail -n 1 | cut -d' ' -f2 || true
}

# status LINES: for people.
status() {
  local code what
  if alive; then
    what="running, pid $pid, since $(date -ur run_pid +%FT%TZ)"
  elif [[ ! -s last_command ]]; then
    what="nothing was started here"
  else
    code=$(cat exit_code 2>/dev/null || echo "137 (killed with its supervisor)")
    what="ended with $code"
    [[ ! -e stopped ]] || what+=", by stop"
  fi
  echo "$what; code $(code_hash 2>/dev/null || echo none); last step $(last_step)"
  this_log | tail -n "$1" | cut -c1-200 | sed 's/^/| /' || true
}

# stop SECONDS [again]: SIGTERM, so that it saves; SIGKILL after so long. With `again`
# a new start follows: should that fail, nobody takes it for stopped by hand.
stop() {
  [[ ${2:-} == again ]] || touch stopped
  if ! alive; then
    echo "nothing runs"
    return
  fi
  local group limit=$((SECONDS + $1))
  group=$(cut -d' ' -f2 run_pid)
  kill -TERM "$pid"
  while alive && ((SECONDS < limit)); do
    sleep 0.2
  done
  if alive; then
    kill -KILL -- "-$group"
    echo 137 >exit_code
    echo "killed after $1 s; what was not saved by then is lost"
    return
  fi
  local i
  for ((i = 0; i < 50; i++)); do
    [[ ! -s exit_code ]] || break
    sleep 0.1
  done
  echo "stopped with exit code $(cat exit_code 2>/dev/null || echo unknown)"
}

# logs LINES FOLLOW: the end of the log, and what follows until the run ends.
logs() {
  [[ -e train.log ]] || fail "no log yet; nothing was started here"
  if [[ $2 == 1 ]] && alive; then
    tail -n "$1" --pid="$pid" -f train.log
  else
    tail -n "$1" train.log
  fi
}

# workdir: what the last command was told, absolute where it is local.
workdir() {
  [[ -s last_command ]] || fail "nothing was started here yet; name one by --workdir="
  local argument found=
  mapfile -d '' last <last_command
  for argument in "${last[@]}"; do
    [[ $argument != --workdir=* ]] || found=${argument#--workdir=}
  done
  [[ -n $found ]] || fail "the last command had no --workdir; name it by --workdir="
  [[ $found == gs://* || $found == /* ]] || found=$PWD/code/$found
  echo "workdir $found"
}

main() {
  local verb=$1
  shift
  worker=$(number)
  if [[ $verb == supervise ]]; then
    supervise "$@"
    return
  fi
  set +e
  (
    set -e
    "$verb" "$@"
    echo "ok $verb"
  ) 2>&1 | sed -u "s/^/worker $worker: /"
  exit "${PIPESTATUS[0]}"
}

main "$@"
