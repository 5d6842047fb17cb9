#!/usr/bin/env bash
# Trains on a Cloud TPU slice: one queued resource, one process per host.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/tpu_vm.sh [options] -- ARGUMENTS

Creates the queued resource NAME, or uses the one there is, waits until it is active, copies this repository to every
host, installs it, runs python -m safe_rlhf_jax.train ARGUMENTS on all hosts, and shows the log of the first one.
When the run exits with 143, or the slice is preempted, it starts again: a preempted slice is deleted and asked for anew.
The workdir must lie on a file system that all hosts mount; a run continues from its last checkpoint there.

  --name NAME            of the queued resource and of its TPU node (required)
  --project PROJECT      (required, or TPU_PROJECT)
  --zone ZONE            (required, or TPU_ZONE)
  --type TYPE            accelerator type, such as v5litepod-64 (required)
  --runtime VERSION      runtime version, such as v2-alpha-tpuv5-lite (required)
  --spot                 a spot slice, which may be preempted
  --setup COMMAND        runs on every host before the installation, such as a mount of the workdir's file system
  --environment NAMES    comma-separated variables that are handed on from this shell, such as HF_TOKEN,WANDB_API_KEY
  --attempts N           how often the run is started at most (default 10)
  --delete               delete the queued resource when the run has ended
  --dry-run              print what would run, run nothing
  --help                 this text

Needs gcloud, logged in. Values of --environment travel in a file, never on a command line.

example: launch/tpu_vm.sh --name run1 --project P --zone Z --type v5litepod-64 --runtime v2-alpha-tpuv5-lite --spot \
             --setup 'sudo mount FILER:/share /mnt/share' -- --config configs/quickstart.yaml workdir=/mnt/share/run1
TEXT
}

fail() {
    echo "launch/tpu_vm.sh: $1; see --help" >&2
    exit 2
}

name='' project=${TPU_PROJECT:-} zone=${TPU_ZONE:-} type='' runtime='' setup=true names='' attempts=10
spot=false delete=false dry_run=false
while (($#)); do
    case $1 in
        --help) usage; exit 0 ;;
        --spot) spot=true; shift; continue ;;
        --delete) delete=true; shift; continue ;;
        --dry-run) dry_run=true; shift; continue ;;
        --) shift; break ;;
    esac
    (($# > 1)) || fail "$1 needs a value"
    case $1 in
        --name) name=$2 ;;
        --project) project=$2 ;;
        --zone) zone=$2 ;;
        --type) type=$2 ;;
        --runtime) runtime=$2 ;;
        --setup) setup=$2 ;;
        --environment) names=$2 ;;
        --attempts) attempts=$2 ;;
        *) fail "unknown option $1 (put -- before the arguments of the run)" ;;
    esac
    shift 2
done
for option in name project zone type runtime; do
    [[ -n ${!option} ]] || fail "--$option is missing"
done
(($#)) || fail 'the arguments of the run are missing'
[[ $attempts =~ ^[1-9][0-9]*$ ]] || fail "--attempts is '$attempts'"

where=(--project "$project" --zone "$zone")
resource=(gcloud compute tpus queued-resources)
node=(gcloud compute tpus tpu-vm)
spot_flag=()
if $spot; then spot_flag=(--spot); fi

run() { # the command, or what it would be
    if $dry_run; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

state() { # of the queued resource: ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, … or nothing
    "${resource[@]}" describe "$name" "${where[@]}" --format 'value(state.state)' 2>/dev/null || true
}

delete_slice() {
    run "${resource[@]}" delete "$name" "${where[@]}" --force --quiet
}

acquire() { # an active slice
    local now
    now=''
    $dry_run || now=$(state)
    case $now in
        FAILED | SUSPENDING | SUSPENDED) delete_slice; now='' ;;
    esac
    if [[ -z $now ]]; then
        run "${resource[@]}" create "$name" "${where[@]}" --node-id "$name" --accelerator-type "$type" \
            --runtime-version "$runtime" "${spot_flag[@]}"
    fi
    if $dry_run; then
        echo "# wait until queued resource $name is ACTIVE"
        return
    fi
    until [[ $(state) == ACTIVE ]]; do
        case $(state) in
            FAILED | SUSPENDED) return 1 ;;
        esac
        echo "queued resource $name: $(state)"
        sleep 30
    done
}

on_hosts() { # command $1 on the hosts named by --worker $2
    run "${node[@]}" ssh "$name" "${where[@]}" --worker "$2" --command "$1"
}

install() {
    local archive=/tmp/safe_rlhf_jax.tgz
    run git archive --format tgz --output "$archive" HEAD
    run "${node[@]}" scp "$archive" "$name:$archive" "${where[@]}" --worker all
    on_hosts "$setup" all
    on_hosts "rm -rf ~/safe_rlhf_jax && mkdir ~/safe_rlhf_jax && tar xzf $archive -C ~/safe_rlhf_jax && \
cd ~/safe_rlhf_jax && make venv && .venv/bin/python -m pip --quiet install '.[tpu]'" all
}

hand_on_environment() { # in a file that only its owner reads, and that the run removes
    local variable file
    if $dry_run; then
        echo "# copy the values of '$names' to ~/environment on every host"
        return
    fi
    file=$(mktemp) # readable by its owner only
    for variable in ${names//,/ }; do
        printf 'export %s=%q\n' "$variable" "${!variable?"--environment names it, but it is not set"}" >>"$file"
    done
    "${node[@]}" scp "$file" "$name:environment" "${where[@]}" --worker all
    rm "$file"
}

train() { # returns the exit status of the run on the first host, 255 where the host is gone
    local arguments status
    printf -v arguments '%q ' "$@"
    # Every host logs to a file, the first one's is shown. JAX finds the other hosts by the metadata of the slice.
    on_hosts "cd ~/safe_rlhf_jax && source ~/environment; rm -f ~/environment ~/train.status; \
.venv/bin/python -u -m safe_rlhf_jax.train $arguments >~/train.log 2>&1 & run=\$!; \
[[ \$(hostname) != *-0 ]] || tail -n +1 -F --pid \$run ~/train.log; wait \$run; echo \$? >~/train.status" all || true
    $dry_run && return
    status=$(on_hosts 'cat ~/train.status' 0) || return 255
    return "$status"
}

for ((attempt = 1; attempt <= attempts; attempt++)); do
    status=255
    if acquire && install && hand_on_environment; then
        status=0
        train "$@" || status=$?
    fi
    if $dry_run; then
        echo "# on status 143, or when the slice was preempted: start again, $attempts times at most"
        break
    fi
    now=$(state)
    if ((status == 0)); then
        break
    elif ((status != 143)) && [[ $now == ACTIVE ]]; then
        echo "launch/tpu_vm.sh: the run failed with status $status" >&2
        break
    fi
    echo "launch/tpu_vm.sh: interrupted (status $status, slice ${now:-gone}), attempt $attempt of $attempts" >&2
    sleep 30
done
if $delete; then delete_slice; fi
exit "$status"
