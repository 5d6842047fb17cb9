#!/usr/bin/env bash
# What a machine with one GPU and a few minutes tells of this project: see --help and benchmarks/README.md.
# PYTHON is the interpreter (default python3); COMMIT says of which commit the files are, where they are a copy.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" -u -m benchmarks.device "$@"
