#!/usr/bin/env bash
# Trains in N processes on this machine.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/local.sh [options] N -- ARGUMENTS

Runs python -m safe_rlhf_jax.train ARGUMENTS in N processes on this machine, which share one mesh.

  --devices D   devices per process, simulated on the CPU (default 1)
  --port P      of the coordinator (default: one that is free)
  --dry-run     print what would run, run nothing
  --help        this text

PYTHON is the interpreter (default python3). On SIGTERM or Ctrl-C every process saves and stops. The exit status is
that of the process that failed first, 143 where the run was interrupted and the same command continues it.

example: launch/local.sh 2 -- --config configs/quickstart.yaml workdir=runs/two
TEXT
}

fail() {
    echo "launch/local.sh: $1; see --help" >&2
    exit 2
}

devices=1 port='' dry_run=false count=''
while (($#)); do
    case $1 in
        --help) usage; exit 0 ;;
        --dry-run) dry_run=true ;;
        --devices) devices=${2:?"--devices needs a number"}; shift ;;
        --port) port=${2:?"--port needs a number"}; shift ;;
        --) shift; break ;;
        -*) fail "unknown option $1" ;;
        *) [[ -z $count ]] || fail "unexpected argument $1 (put -- before the arguments of the run)"; count=$1 ;;
    esac
    shift
done
[[ $count =~ ^[1-9][0-9]*$ ]] || fail "N, the number of processes, is '$count'"
(($#)) || fail 'the arguments of the run are missing'

python=${PYTHON:-python3}
if [[ -z $port ]]; then
    port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
fi

environment() { # of process $1
    echo JAX_PLATFORMS=cpu "XLA_FLAGS=--xla_force_host_platform_device_count=$devices" \
        "JAX_COORDINATOR_ADDRESS=localhost:$port" "JAX_NUM_PROCESSES=$count" "JAX_PROCESS_ID=$1"
}

processes=()
for ((i = 0; i < count; i++)); do
    read -ra variables <<<"$(environment "$i")"
    command=(env "${variables[@]}" "$python" -u -m safe_rlhf_jax.train "$@")
    if $dry_run; then
        printf '%q ' "${command[@]}"
        echo
    else
        "${command[@]}" > >(sed -u "s/^/[$i] /") 2>&1 &
        processes+=($!)
    fi
done
$dry_run && exit

stop() { # everything with signal $1
    kill "-$1" "${processes[@]}" 2>/dev/null || true
}
trap 'stop TERM' TERM INT
trap 'stop KILL' EXIT

# When one process fails, the others notice within a minute and stop by themselves; whatever does not is killed.
status=0 deadline=''
while ((${#processes[@]})); do
    sleep 0.2
    for i in "${!processes[@]}"; do
        kill -0 "${processes[i]}" 2>/dev/null && continue
        ended=0
        wait "${processes[i]}" || ended=$?
        unset "processes[$i]"
        if ((ended && !status)); then
            status=$ended deadline=$((SECONDS + 90))
        fi
    done
    [[ -z $deadline ]] || ((SECONDS < deadline)) || stop KILL
done
exit "$status"
