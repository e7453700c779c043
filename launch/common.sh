# What tpu_pod.sh and gpu.sh share; sourced by them, not run.
#
# They bring `remote WHO COMMAND` (runs a shell command on worker WHO or on all),
# `send FILE...` (into $FOLDER of all), `receive PATH TO` (from worker 0),
# `count_workers` (sets WORKERS), `pool_state` (READY, WAIT why, LOST why) and
# `pool_recover`. Everything on a worker is done by worker.sh.
# shellcheck shell=bash

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "bash $BASH_VERSION is too old, 4.4 is needed (macOS: brew install bash)" >&2
  exit 2
fi
set -euo pipefail
export LC_ALL=C
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$HERE")
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT

# Exit codes of a run that a new start may cure: a bucket out of reach, another host
# lost, stopped by SIGTERM after saving, killed; no devices, or never started.
readonly CURABLE=" 75 76 143 137 init idle "

say() {
  [[ ${DRY_RUN:-0} == 1 ]] || printf '%s: %s\n' "${0##*/}" "$*"
}

die() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit "${2:-1}"
}

# Quotes words so that any shell reads them back.
quote() {
  local word out=
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
      out+=" $word"
    else
      out+=" '${word//\'/\'\\\'\'}'"
    fi
  done
  printf %s "${out# }"
}

# Runs a command, or prints it under --dry_run.
act() {
  if [[ $DRY_RUN == 1 ]]; then
    quote "$@"
    echo
  else
    "$@" </dev/null
  fi
}

# --- options: flags before environment before file ---

# read_options PREFIX FILE: takes PREFIX_NAME=value lines for what is not set yet.
read_options() {
  local prefix=$1 file=$2 line name
  [[ -f $file ]] || return 0
  while IFS= read -r line || [[ -n $line ]]; do
    [[ -n $line && $line != \#* ]] || continue
    name=${line%%=*}
    [[ $name == "$prefix"_* && " ${OPTIONS[*]} " == *" $(lower "${name#*_}") "* ]] ||
      die "$file: '$name' is no option; known: $(known_variables "$prefix")" 2
    [[ -n ${!name+set} ]] || printf -v "$name" %s "${line#*=}"
  done <"$file"
}

known_variables() {
  local option
  for option in "${OPTIONS[@]}"; do
    printf '%s_%s ' "$1" "$(upper "$option")"
  done
}

lower() {
  tr '[:upper:]' '[:lower:]' <<<"$1"
}

upper() {
  tr '[:lower:]' '[:upper:]' <<<"$1"
}

# parse PREFIX ARGS...: sets variables from flags; what follows -- goes into ARGUMENTS.
parse() {
  local prefix=$1 flag name value
  shift
  ARGUMENTS=() ENVIRONMENT=() GIVEN=()
  while (($#)); do
    [[ $1 != -- ]] || {
      shift
      ARGUMENTS=("$@")
      break
    }
    [[ $1 != --help && $1 != -h ]] || usage "$VERB"
    [[ $1 == --* ]] || die "$VERB: '$1' is no flag; arguments of the run follow --" 2
    flag=${1%%=*} value=1
    [[ $1 != *=* ]] || value=${1#*=}
    name=${flag#--} name=${name//-/_}
    GIVEN+=("$1")
    if [[ $name == env ]]; then
      [[ $value == *=* ]] || die "--env=$value: must be --env=NAME=VALUE" 2
      ENVIRONMENT+=("--env=$value")
    elif [[ " ${OPTIONS[*]} " == *" $name "* ]]; then
      printf -v "${prefix}_$(upper "$name")" %s "$value"
    else
      die "$VERB: unknown flag $flag; known: ${OPTIONS[*]/#/--} --env" 2
    fi
    shift
  done
}

# positive NAME VALUE: refuses what is no whole number.
whole() {
  [[ $2 =~ ^[0-9]+$ ]] || die "--$1=$2: must be a whole number" 2
}

# --- code ---

# Names of the files that make up the code: tracked and new, not the ignored ones.
code_files() {
  if git -C "$ROOT" rev-parse --git-dir >/dev/null 2>&1; then
    (cd "$ROOT" && git -c core.quotepath=off ls-files -co --exclude-standard)
  else
    (cd "$ROOT" && find . -type f ! -path './.*/*' ! -path './runs/*' \
      ! -name '*.pyc' ! -path './*.egg-info/*' | sed 's,^\./,,')
  fi | (cd "$ROOT" && while IFS= read -r name; do
    [[ ! -f $name ]] || printf '%s\n' "$name"
  done) | sort
}

# Hashes of the files named on stdin; macOS has another name for it, not another form.
hash_files() {
  if command -v sha256sum >/dev/null; then
    xargs -0 sha256sum
  else
    xargs -0 shasum -a 256
  fi
}

# Sets HASH, and packs the code into $SCRATCH/code.tgz.
pack() {
  code_files >"$SCRATCH/.files"
  [[ -s $SCRATCH/.files ]] || die "no files of code under $ROOT"
  (cd "$ROOT" && tr '\n' '\0' <"$SCRATCH/.files" | hash_files) >"$SCRATCH/hashes"
  HASH=$(printf '%s\0' "$SCRATCH/hashes" | hash_files | cut -c1-16)
  COPYFILE_DISABLE=1 tar -czf "$SCRATCH/code.tgz" -C "$ROOT" -T "$SCRATCH/.files" \
    -C "$SCRATCH" .files
}

# --- workers ---

# on_all VERB ARGS...: a verb of worker.sh on every worker at once. Prints what they
# say, keeps it in $SAID, and names the workers that did not get through.
on_all() {
  local remedy=${REMEDY:-} failed
  SAID=$SCRATCH/said
  if [[ $DRY_RUN == 1 ]]; then
    remote all "bash $FOLDER/worker.sh $(quote "$@")"
    : >"$SAID"
    return
  fi
  remote all "bash $FOLDER/worker.sh $(quote "$@")" 2>"$SCRATCH/errors" |
    tee "$SAID" | show_lines || true
  failed=$(missing "$1")
  [[ -n $failed ]] || return 0
  [[ ${QUIET:-0} == 0 ]] || QUIET=0 show_lines <"$SAID" >&2 || true
  show_errors
  if grep -q "worker.sh: No such file" "$SAID" "$SCRATCH/errors"; then
    remedy="run setup first"
  fi
  die "$1 failed on worker $failed of $WORKERS; ${remedy:-see the lines above}"
}

# What gcloud or ssh said on stderr, without what it always says.
show_errors() {
  grep -vE 'Attempting to|Using ssh batch|SSH key found' "$SCRATCH/errors" >&2 || true
}

# Lines of workers, without those that only say that a verb went well.
show_lines() {
  if [[ ${QUIET:-0} == 1 ]]; then
    cat >/dev/null
  else
    grep --line-buffered -avE '^worker [0-9]+: ok [a-z]+$'
  fi
}

# missing VERB: numbers of the workers that did not say that it went well.
missing() {
  local worker found=()
  for ((worker = 0; worker < WORKERS; worker++)); do
    grep -aqx "worker $worker: ok $1" "$SAID" || found+=("$worker")
  done
  local joined="${found[*]}"
  printf %s "${joined// /, }"
}

# --- verbs that both scripts offer ---

do_sync() {
  pack
  count_workers
  remote all "mkdir -p $FOLDER" 2>"$SCRATCH/errors" || {
    show_errors
    die "cannot reach every worker; $REACH"
  }
  send "$HERE/worker.sh" "$SCRATCH/code.tgz"
  REMEDY="run sync again" on_all unpack "$HASH"
  say "code $HASH is on all $WORKERS workers"
}

do_setup() {
  do_sync
  REMEDY="see its lines above, then run setup again" on_all install "$PYTHON" "$INSTALL"
}

do_check() {
  pack
  count_workers
  REMEDY="see its lines above" on_all check "$HASH"
  REMEDY="see its lines above" on_all devices "$((CHIPS / WORKERS))" "$CHIPS" \
    "$CHECK_SECONDS" "${ENVIRONMENT[@]}" -- "${CLUSTER[@]}"
  say "$WORKERS workers, $CHIPS devices, code $HASH: all well"
}

do_start() {
  count_workers
  REMEDY="nothing was started" QUIET=1 on_all idle
  if ((${#ARGUMENTS[@]})); then
    check_arguments
    START=("${ENVIRONMENT[@]}" -- -m vjepa_jax.main "${ARGUMENTS[@]}" "${CLUSTER[@]}")
  fi
  start_all
}

# Starts START, or where that is empty what was started last.
start_all() {
  if ((${#START[@]})); then on_all start "${START[@]}"; else on_all again; fi
  say "started on $WORKERS workers"
}

# A folder of one worker's own disk cannot hold the checkpoints of all.
check_arguments() {
  local argument
  for argument in "${ARGUMENTS[@]}"; do
    case $argument in
      --workdir=gs://*) return ;;
      --workdir=/*)
        say "note: ${argument#--workdir=} must be a mount that all workers share"
        return
        ;;
      --workdir=*)
        ((WORKERS == 1)) || die "${argument}: each of $WORKERS workers would write its \
own; use --workdir=gs://BUCKET/FOLDER or the absolute path of a shared mount" 2
        say "note: $argument lies on the worker's disk and goes with the node; fetch it"
        return
        ;;
    esac
  done
  die "no --workdir among the arguments; add --workdir=gs://BUCKET/FOLDER" 2
}

do_run() {
  ((${#ARGUMENTS[@]})) || die "run: no arguments; for example: ${0##*/} run -- \
--config=configs/oct_multi.py --workdir=gs://BUCKET/FOLDER" 2
  do_start
  if ((RESTARTS > 0)); then
    keep_running
  else
    say "follow it: ${0##*/} logs; keep it alive: ${0##*/} babysit --restarts=10"
  fi
}

do_stop() {
  count_workers
  on_all stop "$GRACE"
}

do_status() {
  count_workers
  on_all status "$LINES_SHOWN"
}

do_logs() {
  local who=$1 command
  count_workers
  command="bash $FOLDER/worker.sh logs $LINES_SHOWN $FOLLOW"
  remote "$who" "$command" 2>"$SCRATCH/errors" | show_lines && return
  [[ ${PIPESTATUS[0]} == 0 ]] || {
    cat "$SCRATCH/errors" >&2
    die "logs failed on worker $who; $REACH"
  }
}

do_fetch() {
  local from=$1 to=$2
  count_workers
  if [[ -z $from && $DRY_RUN == 1 ]]; then
    remote 0 "bash $FOLDER/worker.sh workdir"
    from=WORKDIR
  elif [[ -z $from ]]; then
    SAID=$SCRATCH/said
    remote 0 "bash $FOLDER/worker.sh workdir" >"$SAID" 2>"$SCRATCH/errors" || {
      cat "$SAID" "$SCRATCH/errors" >&2
      die "fetch failed on worker 0; name the folder by --workdir="
    }
    from=$(sed -n 's/^worker 0: workdir //p' "$SAID")
  fi
  act mkdir -p "$to"
  if [[ $from == gs://* ]]; then
    act gcloud storage cp --recursive "$from" "$to" || die "cannot copy $from"
  else
    receive "$from" "$to" || die "cannot copy $from of worker 0 into $to; $REACH"
  fi
  say "$from is in $to"
}

# --- the restart loop ---

# verdict STATE...: what follows from the states of all workers (running, stopped,
# idle, init or an exit code): go_on, done, stopped, linger, restart or give_up,
# and the state that decided.
verdict() {
  local state running=0 curable="" bad=""
  for state in "$@"; do
    case $state in
      running) running=1 ;;
      stopped) echo "stopped stopped" && return ;;
      0) ;;
      *) if [[ $CURABLE == *" $state "* ]]; then curable=$state; else bad=$state; fi ;;
    esac
  done
  # One worker's own fault ends the others with codes that look curable.
  if [[ -n $bad ]]; then
    echo "give_up $bad"
  elif [[ -n $curable ]]; then
    if ((running)); then echo "linger $curable"; else echo "restart $curable"; fi
  elif ((running)); then
    if [[ " $* " == *" 0 "* ]]; then echo "linger 0"; else echo "go_on running"; fi
  else
    echo "done 0"
  fi
}

reason() {
  case $1 in
    init) echo "the devices or the cluster did not initialise" ;;
    75) echo "exit code 75, a bucket was out of reach" ;;
    76) echo "exit code 76, another host was lost" ;;
    137) echo "exit code 137, killed" ;;
    143) echo "exit code 143, stopped by SIGTERM and saved" ;;
    2) echo "exit code 2, a config or data that cannot run" ;;
    *) echo "exit code $1" ;;
  esac
}

# Sets STATES and STEP; fails where a worker does not answer.
read_states() {
  (QUIET=1 on_all state) >/dev/null 2>"$SCRATCH/trouble" || return 1
  mapfile -t STATES < <(sed -nE 's/^worker [0-9]+: state ([^ ]+) step .*/\1/p' \
    "$SCRATCH/said")
  STEP=$(sed -nE 's/^worker 0: state [^ ]+ step (.*)/\1/p' "$SCRATCH/said")
  [[ $STEP != - ]] || STEP="none yet"
}

# Watches a run and starts it again, at most RESTARTS times; ends with its exit code.
keep_running() {
  local decision word since=$SECONDS trouble=0 pool shown=
  TAKEN=0 PAUSE=$BACKOFF BEFORE="" STEP=""
  while :; do
    pool=$(pool_state)
    [[ -z ${UNMADE:-} ]] || pool="LOST $UNMADE"
    if [[ $pool == LOST* ]]; then
      begin_again "${pool#LOST }" lost
    elif [[ $pool == READY ]] && read_states; then
      trouble=0
      read -r decision word <<<"$(verdict "${STATES[@]}")"
      [[ $decision == linger ]] || since=$SECONDS
      case $decision in
        "done") say "done at step $STEP" && return ;;
        stopped) say "stopped by hand at step $STEP; not started again" && return ;;
        give_up) give_up "$word" ;;
        restart) begin_again "$(reason "$word")" alive ;;
        linger)
          [[ $shown == "$word" ]] || say "a worker has ended ($(reason "$word")); \
the others get $GRACE s to end too"
          shown=$word
          if ((SECONDS - since > GRACE)); then
            begin_again "$(reason "$word"), and others hung" alive
          fi
          ;;
      esac
    else
      trouble=$((trouble + 1))
      [[ $pool != READY ]] || pool=$(grep . "$SCRATCH/trouble" | tail -n 1 || true)
      say "no answer ($trouble of $PATIENCE): ${pool#WAIT }"
      ((trouble < PATIENCE)) || die "no answer for $PATIENCE times, the run may be \
alive; $REACH; then: ${0##*/} babysit"
    fi
    sleep "$POLL"
  done
}

give_up() {
  say "not started again: $(reason "$1"); last step $STEP"
  (on_all stop "$GRACE") || true
  (LINES_SHOWN=15 do_status) >&2 || true
  [[ $1 =~ ^[0-9]+$ ]] || exit 1
  exit "$1"
}

# begin_again WHY lost|alive: one bounded new start, the pool made anew where lost.
begin_again() {
  local why=$1 pool=$2
  if ((TAKEN >= RESTARTS)); then
    say "not started again: $why; all $RESTARTS restarts are used up; last step \
${STEP:-unknown}; the same command goes on from the last checkpoint"
    exit 75
  fi
  TAKEN=$((TAKEN + 1))
  # Progress since the last start says that the fault was passing.
  [[ ${STEP:-} == "$BEFORE" ]] || PAUSE=$BACKOFF
  BEFORE=${STEP:-}
  say "restart $TAKEN of $RESTARTS in $PAUSE s: $why; last step ${STEP:-unknown}"
  sleep "$PAUSE"
  PAUSE=$((PAUSE * 2 > 900 ? 900 : PAUSE * 2))
  if [[ $pool == lost ]]; then
    UNMADE="it could not be made anew"
    ! (pool_recover && count_workers && start_all) || UNMADE=
  else
    (QUIET=1 on_all stop "$GRACE" again && start_all) ||
      say "could not start; looking again"
  fi
}

# Joins a run that is alive, whose command a new node must be told, or begins one.
do_babysit() {
  local told
  ((RESTARTS > 0)) || RESTARTS=10
  count_workers
  if [[ $DRY_RUN == 1 ]]; then
    on_all state
    return
  fi
  if ((${#ARGUMENTS[@]})); then
    do_run
    return
  fi
  told=$(remote 0 "bash $FOLDER/worker.sh told" 2>/dev/null |
    sed -n 's/^worker 0: told //p') || true
  [[ -n $told ]] ||
    die "nothing was started on worker 0; ${0##*/} babysit -- ARGUMENTS" 2
  mapfile -d '' START < <(base64 -d <<<"$told")
  say "watching; at most $RESTARTS restarts"
  keep_running
}
