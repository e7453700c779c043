#!/usr/bin/env bash
# Brings a training run onto one or several GPU hosts, by ssh or through SLURM.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

OPTIONS=(
  hosts gpus port folder python install check_seconds restarts backoff poll grace
  patience lines worker no_follow workdir to nodes time partition account name
  sbatch_flag dry_run
)
VERBS="setup sync check run start restart stop status logs babysit fetch slurm"
REACH="does 'ssh -o BatchMode=yes HOST true' work for each of --hosts?"

usage() {
  case $1 in
    setup) show "the code and a python environment on every host" <<'END' ;;
  --python=3.11              version, fetched if absent, or path of an interpreter
  --install=SPEC             of pip install -e; default .[gpu,figures,tensorboard];
                             none: --python=PATH is used as it is
  gpu.sh setup --hosts=gpu1,gpu2
END
    sync) show "the local working tree onto every host, compared by hash" <<'END' ;;
  gpu.sh sync --hosts=gpu1,gpu2
END
    check) show "nvidia-smi, imports and number of GPUs on every host" <<'END' ;;
  --gpus=8                   of each host
  gpu.sh check --hosts=gpu1,gpu2 --gpus=8
END
    run | babysit) show "one process a host, with all its GPUs, detached" <<'END' ;;
  --env=NAME=VALUE           for the run; may be repeated; {worker} is the host's number
  --restarts=K               stays and starts it again after 75, 76, 137 and 143
  --port=8476                of the first host, at which the others find it
  --backoff=30 --poll=60 --grace=180
  gpu.sh run --hosts=gpu1,gpu2 --gpus=8 --restarts=10 -- \
    --config=configs/oct_multi.py --workdir=/nfs/runs/oct
END
    slurm) show "the same as a batch job, one task a GPU; sync is not needed" <<'END' ;;
  --nodes=1 --gpus=8         of each node
  --time=24:00:00 --partition= --account= --name=vjepa_jax --sbatch_flag=FLAG
  --python=PATH              of an environment that all nodes share; default python
  --restarts=K               new starts in the job; a job at its time limit saves, and
                             is queued again as often
  gpu.sh slurm --nodes=2 --gpus=8 --restarts=10 -- --config=configs/oct_multi.py \
    --workdir=/nfs/runs/oct
END
    start | restart | stop | status | logs | fetch) show "as tpu_pod.sh $1" <<END ;;
  gpu.sh $1 --hosts=gpu1,gpu2
END
    *) overview ;;
  esac
  exit 0
}

show() {
  printf 'gpu.sh %s: %s\n\n' "$VERB" "$1"
  cat
  printf '
Of every command: --hosts=HOST,HOST --folder --dry_run (prints the commands).
Each flag may be GPU_FLAG in the environment or in launch/gpu.env (GPU_HOSTS=a,b).\n'
}

overview() {
  cat <<END
gpu.sh COMMAND [FLAGS] [-- ARGUMENTS OF vjepa_jax.main]
commands: $VERBS
gpu.sh COMMAND --help says more. On plain hosts, from nothing to results:

  export GPU_HOSTS=gpu1,gpu2 GPU_GPUS=8
  launch/gpu.sh setup && launch/gpu.sh check
  launch/gpu.sh run --restarts=10 -- --config=configs/oct_multi.py \\
    --workdir=/nfs/runs/oct
END
}

take_options() {
  parse GPU "$@"
  read_options GPU "${GPU_FILE:-$HERE/gpu.env}"
  DRY_RUN=${GPU_DRY_RUN:-0} FOLDER=${GPU_FOLDER:-vjepa_jax}
  [[ $FOLDER =~ ^[A-Za-z0-9_./-]+$ ]] || die "--folder=$FOLDER: no spaces or signs" 2
  GPUS=${GPU_GPUS:-1} NODES=${GPU_NODES:-1} PORT=${GPU_PORT:-8476}
  PYTHON=${GPU_PYTHON:-3.11} INSTALL=${GPU_INSTALL:-.[gpu,figures,tensorboard]}
  RESTARTS=${GPU_RESTARTS:-0} BACKOFF=${GPU_BACKOFF:-30} POLL=${GPU_POLL:-60}
  GRACE=${GPU_GRACE:-180} PATIENCE=${GPU_PATIENCE:-10}
  CHECK_SECONDS=${GPU_CHECK_SECONDS:-300} LINES_SHOWN=${GPU_LINES:-3}
  FOLLOW=$((1 - ${GPU_NO_FOLLOW:-0}))
  START=() CLUSTER=()
  whole gpus "$GPUS"
  whole nodes "$NODES"
  whole port "$PORT"
  whole restarts "$RESTARTS"
  whole grace "$GRACE"
  [[ $VERB != slurm ]] || return 0
  take_hosts
}

take_hosts() {
  [[ ${GPU_HOSTS:-} =~ ^[A-Za-z0-9@._:-]+(,[A-Za-z0-9@._:-]+)*$ ]] ||
    die "--hosts='${GPU_HOSTS:-}': name hosts as HOST,HOST, or user@HOST" 2
  IFS=, read -ra HOSTS <<<"$GPU_HOSTS"
  WORKERS=${#HOSTS[@]} CHIPS=$((GPUS * ${#HOSTS[@]}))
  ((WORKERS == 1)) || CLUSTER=(
    --coordinator="${HOSTS[0]#*@}:$PORT" --processes="$WORKERS" "--process_id={worker}"
  )
}

# --- what common.sh asks of a pool ---

SSH=(ssh -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=30)

remote() {
  local worker waiting=() code=0
  for ((worker = 0; worker < WORKERS; worker++)); do
    [[ $1 == all || $1 == "$worker" ]] || continue
    if [[ $DRY_RUN == 1 ]]; then
      on_host "$worker" "$2"
      continue
    fi
    on_host "$worker" "$2" &
    waiting+=($!)
  done
  for worker in "${waiting[@]}"; do
    wait "$worker" || code=$?
  done
  return "$code"
}

on_host() {
  act "${SSH[@]}" "${HOSTS[$1]}" \
    "env VJEPA_WORKER=$1 VJEPA_WORKERS=$WORKERS $2" || {
    local code=$?
    [[ $code != 255 ]] || echo "worker $1 (${HOSTS[$1]}): ssh cannot reach it" >&2
    return "$code"
  }
}

send() {
  local host
  for host in "${HOSTS[@]}"; do
    act scp -q -o BatchMode=yes "$@" "$host:$FOLDER/" ||
      die "cannot copy to $host; $REACH"
  done
}

receive() {
  act scp -q -r -o BatchMode=yes "${HOSTS[0]}:$1" "$2"
}

count_workers() {
  :
}

# Hosts are never made anew here; one that is away makes the loop wait.
pool_state() {
  echo READY
}

pool_recover() {
  return 1
}

check_gpus() {
  local command="bash $FOLDER/worker.sh gpus $GPUS"
  [[ $DRY_RUN == 0 ]] || {
    remote all "$command"
    return
  }
  REMEDY="see its lines above" on_all gpus "$GPUS"
}

# --- SLURM ---

# Prints the batch script. One task a GPU, which is what jax expects of SLURM.
batch_script() {
  cat <<END
#!/usr/bin/env bash
#SBATCH --job-name=${GPU_NAME:-vjepa_jax}
#SBATCH --nodes=$NODES
#SBATCH --ntasks-per-node=$GPUS
#SBATCH --gpus-per-node=$GPUS
#SBATCH --time=${GPU_TIME:-24:00:00}
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@$GRACE
${GPU_PARTITION:+#SBATCH --partition=$GPU_PARTITION
}${GPU_ACCOUNT:+#SBATCH --account=$GPU_ACCOUNT
}${GPU_SBATCH_FLAG:+#SBATCH $GPU_SBATCH_FLAG
}
# The time is nearly up: all tasks save, the job is queued again.
leaving=0
leave() {
  leaving=1
  scancel --signal=TERM "\$SLURM_JOB_ID"
}
trap leave USR1

cd $(quote "$ROOT") || exit 2
taken=0
while :; do
  srun --kill-on-bad-exit=0 $(quote env "${RUN_ENVIRONMENT[@]}" \
    "$PYTHON" -m vjepa_jax.main "${ARGUMENTS[@]}") &
  step=\$! code=0
  wait "\$step" || code=\$?
  while kill -0 "\$step" 2>/dev/null; do
    code=0
    wait "\$step" || code=\$?
  done
  if ((leaving)); then
    queued=\${SLURM_RESTART_COUNT:-0}
    echo "gpu.sh: time is up, exit code \$code; \$queued of $RESTARTS queueings"
    ((queued >= $RESTARTS)) || scontrol requeue "\$SLURM_JOB_ID"
    exit "\$code"
  fi
  case \$code in
    75 | 76 | 137 | 143) ;;
    0) echo "gpu.sh: done" && exit 0 ;;
    *) echo "gpu.sh: not started again: exit code \$code" && exit "\$code" ;;
  esac
  if ((taken >= $RESTARTS)); then
    echo "gpu.sh: not started again: exit code \$code; all $RESTARTS restarts used up"
    exit "\$code"
  fi
  taken=\$((taken + 1))
  echo "gpu.sh: restart \$taken of $RESTARTS in $BACKOFF s: exit code \$code"
  sleep $BACKOFF
done
END
}

do_slurm() {
  ((${#ARGUMENTS[@]})) || die "slurm: no arguments; gpu.sh slurm --help" 2
  [[ $PYTHON != 3.11 ]] || PYTHON=python
  RUN_ENVIRONMENT=("${ENVIRONMENT[@]#--env=}")
  WORKERS=$NODES check_arguments
  batch_script >"$SCRATCH/job.sh"
  if [[ $DRY_RUN == 1 ]]; then
    cat "$SCRATCH/job.sh"
    return
  fi
  command -v sbatch >/dev/null || die "there is no sbatch; run this on a login node of \
the cluster, or use --dry_run to see the job" 2
  sbatch "$SCRATCH/job.sh" || die "sbatch refused the job; see its words above"
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
  case $VERB in
    check) check_gpus && do_check ;;
    restart) do_stop && do_start ;;
    logs)
      LINES_SHOWN=${GPU_LINES:-20}
      do_logs "${GPU_WORKER:-0}"
      ;;
    fetch) do_fetch "${GPU_WORKDIR:-}" "${GPU_TO:-runs}" ;;
    *) "do_$VERB" ;;
  esac
}

main "$@"
