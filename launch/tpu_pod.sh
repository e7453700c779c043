#!/usr/bin/env bash
# Brings a training run onto a Cloud TPU VM or pod slice, always onto all workers.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

OPTIONS=(
  name type zone project version queued spot reserved valid_until network subnetwork
  internal_ips service_account labels create_flag internal_ip iap folder python install
  chips check_seconds restarts backoff poll grace patience wait lines worker no_follow
  workdir to yes dry_run
)
VERBS="create setup sync check run start restart stop status logs babysit fetch delete"
REACH="is the node READY (status), and is your key in the agent \
(ssh-add ~/.ssh/google_compute_engine)?"

usage() {
  case $1 in
    create) show "makes the node, or says that it is there" <<'END' ;;
  --type=v4-32               accelerator type; v5litepod-16, v5p-32, v6e-16, ...
  --version=RUNTIME          image; by type: tpu-ubuntu2204-base (v4), v2-alpha-tpuv5,
                             v2-alpha-tpuv5-lite, v2-alpha-tpuv6e
  --queued [--valid_until=6h]  waits its turn as a queued resource
  --spot | --reserved        cheaper and pre-emptible; of your reservation
  --network= --subnetwork= --internal_ips --service_account= --labels=K=V
  --create_flag=FLAG         any other flag of gcloud's create
  --wait=86400               seconds until it gives up waiting
  tpu_pod.sh create --name=oct --zone=us-central2-b --type=v4-32 --queued --spot
END
    setup) show "sync, then a python environment on every worker" <<'END' ;;
  --python=3.11              version, fetched if absent, or path of an interpreter
  --install=SPEC             of pip install -e; default .[tpu,figures,tensorboard];
                             none: --python=PATH is used as it is (prebuilt images)
  tpu_pod.sh setup --name=oct --zone=us-central2-b
END
    sync) show "the local working tree onto every worker, compared by hash" <<'END' ;;
  What git ignores stays here. runs/ on the workers is kept.
  tpu_pod.sh sync --name=oct --zone=us-central2-b
END
    check) show "code, imports and number of chips on every worker" <<'END' ;;
  --chips=16                 devices of the whole pod; default by --type
  --check_seconds=300        until a worker that does not answer has failed
  tpu_pod.sh check --name=oct --zone=us-central2-b
END
    run) show "starts training on all workers, detached" <<'END' ;;
  --env=NAME=VALUE           for the run; may be repeated; {worker} is its number
  --restarts=K               stays and watches, as babysit
  tpu_pod.sh run --name=oct -- --config=configs/oct_multi.py \
    --workdir=gs://lab/oct --config.data.manifest=gs://lab/manifest.tsv
END
    start) show "the command of the last run again; it goes on" <<'END' ;;
  tpu_pod.sh start --name=oct
END
    restart) show "stop, then start" <<'END' ;;
  tpu_pod.sh sync --name=oct && tpu_pod.sh restart --name=oct
END
    stop) show "SIGTERM on all workers, so that they save; then SIGKILL" <<'END' ;;
  --grace=180                seconds for the saving
  tpu_pod.sh stop --name=oct
END
    status) show "node, process, exit code, last step and log lines" <<'END' ;;
  --lines=3
  tpu_pod.sh status --name=oct
END
    logs) show "follows the log until the run ends" <<'END' ;;
  --worker=0|all  --lines=20  --no_follow
  tpu_pod.sh logs --name=oct --worker=all
END
    babysit) show "watches a run, starts it again, a bounded number of times" <<'END' ;;
  After pre-emption the node is made anew, set up, and the same command started. Exit
  codes 75, 76, 137, 143 and devices that do not initialise are restarted, others not.
  --restarts=10  --backoff=30 (seconds, doubled each time)  --poll=60  --grace=180
  tpu_pod.sh babysit --name=oct --type=v4-32 --spot --queued --restarts=50
END
    fetch) show "the results of worker 0, or of the bucket" <<'END' ;;
  --workdir=FOLDER           default: that of the last run
  --to=FOLDER                default: runs
  tpu_pod.sh fetch --name=oct --to=results
END
    delete) show "the node, its queued resource, and all that is on it" <<'END' ;;
  --yes                      does not ask
  tpu_pod.sh delete --name=oct --yes
END
    *) overview ;;
  esac
  exit 0
}

show() {
  printf 'tpu_pod.sh %s: %s\n\n' "$VERB" "$1"
  cat
  printf '
Of every command: --name --zone --project --type --internal_ip --iap --folder
--dry_run (prints the gcloud commands). Each flag may be POD_FLAG in the environment
or in launch/pod.env (POD_NAME=oct).\n'
}

overview() {
  cat <<END
tpu_pod.sh COMMAND [FLAGS] [-- ARGUMENTS OF vjepa_jax.main]
commands: $VERBS
tpu_pod.sh COMMAND --help says more. From nothing to a run that outlives pre-emption:

  printf '%s\n' POD_NAME=oct POD_TYPE=v4-32 POD_ZONE=us-central2-b POD_SPOT=1 \\
    POD_QUEUED=1 >launch/pod.env
  launch/tpu_pod.sh create && launch/tpu_pod.sh setup && launch/tpu_pod.sh check
  launch/tpu_pod.sh run --restarts=50 -- --config=configs/oct_multi.py \\
    --workdir=gs://lab/oct --config.data.manifest=gs://lab/manifest.tsv
END
}

# --- options ---

take_options() {
  parse POD "$@"
  read_options POD "${POD_FILE:-$HERE/pod.env}"
  DRY_RUN=${POD_DRY_RUN:-0} FOLDER=${POD_FOLDER:-vjepa_jax}
  NAME=${POD_NAME:-} TYPE=${POD_TYPE:-v4-32}
  [[ $NAME =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
    die "--name='$NAME': name the node by small letters, digits and hyphens" 2
  [[ $FOLDER =~ ^[A-Za-z0-9_./-]+$ ]] || die "--folder=$FOLDER: no spaces or signs" 2
  [[ -n ${POD_ZONE:-} ]] || die "no --zone; v4 is in us-central2-b, for others see \
gcloud compute tpus locations list" 2
  WHERE=(--zone="$POD_ZONE")
  [[ -z ${POD_PROJECT:-} ]] || WHERE+=(--project="$POD_PROJECT")
  by_type
  PYTHON=${POD_PYTHON:-3.11} INSTALL=${POD_INSTALL:-.[tpu,figures,tensorboard]}
  RESTARTS=${POD_RESTARTS:-0} BACKOFF=${POD_BACKOFF:-30} POLL=${POD_POLL:-60}
  GRACE=${POD_GRACE:-180} PATIENCE=${POD_PATIENCE:-10} WAIT=${POD_WAIT:-86400}
  CHECK_SECONDS=${POD_CHECK_SECONDS:-300} LINES_SHOWN=${POD_LINES:-3}
  FOLLOW=$((1 - ${POD_NO_FOLLOW:-0}))
  START=() CLUSTER=()
  whole restarts "$RESTARTS"
  whole grace "$GRACE"
  whole wait "$WAIT"
  whole lines "$LINES_SHOWN"
  ways_in
}

# Sets the number of chips (jax devices; v2 and v3 have one a core), the runtime, and
# the hosts that a dry run reckons with.
by_type() {
  local family=${TYPE%-*} size=${TYPE##*-}
  [[ $TYPE == *-* && $size =~ ^[0-9]+$ ]] || die "--type=$TYPE: must be like v4-32" 2
  case $family in
    v2 | v3) CHIPS=$size RUNTIME=tpu-ubuntu2204-base ;;
    v4) CHIPS=$((size / 2)) RUNTIME=tpu-ubuntu2204-base ;;
    v5p) CHIPS=$((size / 2)) RUNTIME=v2-alpha-tpuv5 ;;
    v5litepod) CHIPS=$size RUNTIME=v2-alpha-tpuv5-lite ;;
    v6e) CHIPS=$size RUNTIME=v2-alpha-tpuv6e ;;
    *) die "--type=$TYPE: unknown family; v2, v3, v4, v5litepod, v5p, v6e" 2 ;;
  esac
  WORKERS=$(((CHIPS + 3) / 4))
  CHIPS=${POD_CHIPS:-$CHIPS}
  whole chips "$CHIPS"
  RUNTIME=${POD_VERSION:-$RUNTIME}
}

# IAP is only in gcloud's alpha commands.
ways_in() {
  VM=(gcloud compute tpus tpu-vm) QUEUE=(gcloud compute tpus queued-resources)
  REACHED=("${VM[@]}") TUNNEL=()
  if [[ ${POD_IAP:-0} == 1 ]]; then
    REACHED=(gcloud alpha compute tpus tpu-vm) TUNNEL=(--tunnel-through-iap)
  elif [[ ${POD_INTERNAL_IP:-0} == 1 ]]; then
    TUNNEL=(--internal-ip)
  fi
}

# --- what common.sh asks of a pool ---

remote() {
  act "${REACHED[@]}" ssh "$NAME" "${WHERE[@]}" "${TUNNEL[@]}" --worker="$1" \
    --command="env VJEPA_WORKERS=$WORKERS $2"
}

send() {
  act "${REACHED[@]}" scp "$@" "$NAME:$FOLDER/" "${WHERE[@]}" "${TUNNEL[@]}" \
    --worker=all >"$SCRATCH/scp" 2>&1 || {
    cat "$SCRATCH/scp" >&2
    die "cannot copy the code to every worker; $REACH"
  }
  [[ $DRY_RUN == 0 ]] || cat "$SCRATCH/scp"
}

receive() {
  act "${REACHED[@]}" scp "$NAME:$1" "$2" "${WHERE[@]}" "${TUNNEL[@]}" --worker=0 \
    --recurse
}

# Sets STATE (NONE where there is no node), KIND and WORKERS; fails where gcloud does.
describe() {
  local found
  if found=$("${VM[@]}" describe "$NAME" "${WHERE[@]}" \
    --format='value(state,acceleratorType.basename(),networkEndpoints.len())' \
    </dev/null 2>"$SCRATCH/describe"); then
    IFS=$'\t' read -r STATE KIND WORKERS <<<"$found"
  elif grep -qiE 'NOT_FOUND|not found' "$SCRATCH/describe"; then
    STATE=NONE
  else
    return 1
  fi
}

# Sets QUEUED to the state of the queued resource, NONE where there is none.
describe_queue() {
  if QUEUED=$("${QUEUE[@]}" describe "$NAME" "${WHERE[@]}" \
    --format='value(state.state)' </dev/null 2>"$SCRATCH/describe"); then
    return
  fi
  grep -qiE 'NOT_FOUND|not found' "$SCRATCH/describe" || return 1
  QUEUED=NONE
}

need_describe() {
  describe || {
    cat "$SCRATCH/describe" >&2
    die "gcloud cannot describe $NAME; are you logged in (gcloud auth login), and \
are --project and --zone right?"
  }
}

count_workers() {
  [[ $DRY_RUN == 0 ]] || return 0
  need_describe
  [[ $STATE != NONE ]] || die "there is no node $NAME in $POD_ZONE; run create first"
  [[ $STATE == READY ]] || die "node $NAME is $STATE, not READY; create waits for it, \
babysit makes it anew after pre-emption"
}

pool_state() {
  describe || {
    echo "WAIT gcloud: $(tail -n 1 "$SCRATCH/describe")"
    return
  }
  case $STATE in
    READY) echo READY ;;
    PREEMPTED | TERMINATED | STOPPED | STOPPING | DELETING | NONE)
      echo "LOST node $NAME is $STATE"
      ;;
    *) echo "WAIT node $NAME is $STATE" ;;
  esac
}

pool_recover() {
  local prepare
  for prepare in create setup; do
    bash "$HERE/tpu_pod.sh" "$prepare" "${GIVEN[@]}" || return 1
  done
  describe
}

# --- the node ---

do_create() {
  local deadline=$((SECONDS + WAIT))
  if [[ $DRY_RUN == 1 ]]; then
    ask_for_node
    return
  fi
  need_describe
  case $STATE in
    READY)
      [[ $KIND == "$TYPE" ]] || die "node $NAME is there, but as $KIND, not $TYPE; \
delete it, or use another --name" 2
      say "node $NAME is there: $KIND, $WORKERS workers"
      return
      ;;
    PREEMPTED | TERMINATED)
      say "node $NAME is $STATE; its remains are deleted"
      remove_node
      ;;
    STOPPED | STOPPING) die "node $NAME is $STATE; gcloud compute tpus tpu-vm start \
$NAME --zone=$POD_ZONE, or delete it" ;;
    NONE) clear_queue ;;
  esac
  [[ $STATE != NONE && $STATE != PREEMPTED && $STATE != TERMINATED ]] || ask_for_node
  wait_for_node "$deadline"
}

# A queued resource whose node is gone must go before its name can be used again.
clear_queue() {
  describe_queue || die "gcloud cannot describe the queued resource $NAME"
  case $QUEUED in
    NONE | ACCEPTED | CREATING | PROVISIONING | WAITING_FOR_RESOURCES) ;;
    *)
      say "queued resource $NAME is $QUEUED without a node; it is deleted"
      remove_queue
      QUEUED=NONE
      ;;
  esac
  [[ $QUEUED == NONE ]] || STATE=QUEUED
}

ask_for_node() {
  local network=() price=()
  [[ -z ${POD_NETWORK:-} ]] || network+=(--network="$POD_NETWORK")
  [[ -z ${POD_SUBNETWORK:-} ]] || network+=(--subnetwork="$POD_SUBNETWORK")
  [[ ${POD_INTERNAL_IPS:-0} == 0 ]] || network+=(--internal-ips)
  [[ -z ${POD_SERVICE_ACCOUNT:-} ]] ||
    network+=(--service-account="$POD_SERVICE_ACCOUNT")
  [[ -z ${POD_LABELS:-} ]] || network+=(--labels="$POD_LABELS")
  [[ -z ${POD_CREATE_FLAG:-} ]] || network+=("$POD_CREATE_FLAG")
  [[ ${POD_SPOT:-0} == 0 ]] || price+=(--spot)
  [[ ${POD_RESERVED:-0} == 0 ]] || price+=(--reserved)
  if [[ ${POD_QUEUED:-0} == 1 ]]; then
    [[ -z ${POD_VALID_UNTIL:-} ]] || price+=(--valid-until-duration="$POD_VALID_UNTIL")
    act "${QUEUE[@]}" create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" \
      --runtime-version="$RUNTIME" "${WHERE[@]}" "${price[@]}" "${network[@]}" ||
      die "the queued resource was refused; see gcloud's words above"
  else
    act "${VM[@]}" create "$NAME" --accelerator-type="$TYPE" --version="$RUNTIME" \
      "${WHERE[@]}" "${price[@]}" "${network[@]}" ||
      die "the node was refused; see gcloud's words above; --queued waits for capacity"
  fi
}

wait_for_node() {
  local deadline=$1 told="" now
  while :; do
    describe || die "gcloud cannot describe $NAME"
    case $STATE in
      READY) break ;;
      PREEMPTED | TERMINATED) die "node $NAME is $STATE before it was used" ;;
    esac
    now=$STATE
    if [[ ${POD_QUEUED:-0} == 1 && $STATE == NONE ]]; then
      describe_queue || die "gcloud cannot describe the queued resource $NAME"
      [[ $QUEUED != FAILED && $QUEUED != SUSPENDED && $QUEUED != NONE ]] ||
        die "queued resource $NAME is $QUEUED; gcloud compute tpus queued-resources \
describe $NAME --zone=$POD_ZONE says why; delete it, then create again"
      now="queued: $QUEUED"
    fi
    [[ $told == "$now" || $now == *ACTIVE ]] || say "waiting for node $NAME: $now"
    told=$now
    ((SECONDS < deadline)) || die "node $NAME is not READY after $WAIT s (--wait); \
the request stands, create goes on waiting"
    if ((${POLL%.*} < 15)); then sleep "$POLL"; else sleep 15; fi
  done
  say "node $NAME is READY: $KIND, $WORKERS workers"
}

remove_node() {
  describe_queue || QUEUED=NONE
  if [[ $QUEUED != NONE ]]; then
    remove_queue
  else
    act "${VM[@]}" delete "$NAME" "${WHERE[@]}" --quiet || die "cannot delete $NAME"
  fi
}

remove_queue() {
  act "${QUEUE[@]}" delete "$NAME" "${WHERE[@]}" --force --quiet ||
    die "cannot delete the queued resource $NAME"
}

do_delete() {
  local answer=
  if [[ ${POD_YES:-0} != 1 && $DRY_RUN == 0 ]]; then
    [[ -t 0 ]] || die "delete takes the node and all on its disks; add --yes" 2
    read -rp "Delete $NAME and all that is on it? Its name again: " answer
    [[ $answer == "$NAME" ]] || die "not deleted" 2
  fi
  if [[ $DRY_RUN == 1 ]]; then
    QUEUED=NONE
    [[ ${POD_QUEUED:-0} == 0 ]] || remove_queue
    [[ ${POD_QUEUED:-0} == 1 ]] || act "${VM[@]}" delete "$NAME" "${WHERE[@]}" --quiet
    return
  fi
  need_describe
  [[ $STATE == NONE ]] || remove_node
  describe_queue || QUEUED=NONE
  [[ $QUEUED == NONE ]] || remove_queue
  say "node $NAME is gone"
}

tell_status() {
  if [[ $DRY_RUN == 0 ]]; then
    need_describe
    if [[ $STATE == NONE ]]; then
      describe_queue || QUEUED=NONE
      say "there is no node $NAME; queued resource: $QUEUED"
      return
    fi
    say "node $NAME: $STATE, $KIND, $WORKERS workers"
    [[ $STATE == READY ]] || return 0
  fi
  do_status
}

main() {
  VERB=${1:-help}
  if [[ $VERB =~ ^(help|--help|-h)$ ]]; then
    overview
    return
  fi
  [[ " $VERBS " == *" $VERB "* ]] || die "'$VERB' is no command; $VERBS" 2
  shift
  take_options "$@"
  [[ $DRY_RUN == 1 ]] || command -v gcloud >/dev/null ||
    die "there is no gcloud; see https://cloud.google.com/sdk/docs/install" 2
  case $VERB in
    restart) do_stop && do_start ;;
    status) tell_status ;;
    logs)
      LINES_SHOWN=${POD_LINES:-20}
      do_logs "${POD_WORKER:-0}"
      ;;
    fetch) do_fetch "${POD_WORKDIR:-}" "${POD_TO:-runs}" ;;
    *) "do_$VERB" ;;
  esac
}

main "$@"
