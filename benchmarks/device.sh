#!/usr/bin/env bash
# Says what this machine's GPU makes of the project: benchmarks/device.py, after installing what is missing.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: benchmarks/device.sh [--wheels FOLDER] [options of benchmarks/device.py]

Needs a Python with JAX and pip, and no network. Runs the steps of benchmarks/device.py and writes what they find to
benchmarks/results/device_NAME.json, NAME being the device's.

  --wheels FOLDER  packages of `make wheels`; those that are missing here are installed into build/site, the JAX that is
                   found stays as it is (default: WHEELS; without it nothing is installed)
  --help           this text and the other options

PYTHON is the interpreter (default python3). COMMIT says which commit the files are of, where they are a copy without
git.

example: benchmarks/device.sh --wheels build/wheels --budget 480
TEXT
}

python=${PYTHON:-python3} wheels=${WHEELS:-} rest=()
while (($#)); do
    case $1 in
        --help) usage; rest+=(--help) ;;
        --wheels) wheels=${2:?"--wheels needs a folder"}; shift ;;
        *) rest+=("$1") ;;
    esac
    shift
done
[[ -z $wheels ]] || wheels=$(realpath "$wheels")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
site=$PWD/build/site

# pip says what is missing or too old beside what is installed; that alone goes into the folder.
install() { # each command says itself whether it failed: bash stops at none of them in a function that is tried
    local missing report=$site/report.json
    "$python" -c 'from importlib.metadata import version as v; print(f"jax=={v('\''jax'\'')}\njaxlib=={v('\''jaxlib'\'')}")' \
        >"$site/found.txt" || return
    "$python" -m pip install --dry-run --quiet --no-index --find-links "$wheels" --constraint "$site/found.txt" \
        --report "$report" --requirement "$wheels/requirements.txt" || return
    missing=$("$python" -c 'import json, sys
print(*(package["download_info"]["url"] for package in json.load(open(sys.argv[1]))["install"]))' "$report") || return
    read -ra missing <<<"$missing"
    ((${#missing[@]} == 0)) ||
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" "${missing[@]}"
}

if [[ -n $wheels ]]; then
    rm -rf "$site"
    mkdir -p "$site"
    install || echo "benchmarks/device.sh: packages could not be installed; going on with those that are here" >&2
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
exec "$python" -u -m benchmarks.device "${rest[@]}"
