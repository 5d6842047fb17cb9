#!/usr/bin/env python3
"""Fills in gke_jobset.yaml; needs nothing but Python.

    launch/render_gke.py --name run1 --image IMAGE --accelerator tpu-v5-lite-podslice --topology 4x4 --hosts 4 \\
        --claim CLAIM -- --config configs/quickstart.yaml workdir=/runs/run1 | kubectl apply -f -

Secrets do not pass through here: `kubectl create secret generic NAME-tokens --from-literal HF_TOKEN="$HF_TOKEN"` puts
them where the pods read them.
"""

import argparse
import json
import math
import re
import string
import subprocess
import sys
from pathlib import Path

TEMPLATE = Path(__file__).parent / "gke_jobset.yaml"
NAME = re.compile(r"[a-z]([a-z0-9-]{0,40}[a-z0-9])?")


def parse_arguments(arguments=None):
    """The command line; what stands after -- are the arguments of the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the JobSet: lower-case letters, digits and hyphens")
    parser.add_argument("--image", required=True, help="container image with this package and its extra `tpu`")
    parser.add_argument(
        "--accelerator", required=True, help="such as tpu-v5-lite-podslice, tpu-v6e-slice, tpu-v5p-slice"
    )
    parser.add_argument("--topology", required=True, help="chips of a slice, such as 4x4 or 2x2x4")
    parser.add_argument("--hosts", required=True, type=int, help="hosts of a slice")
    parser.add_argument("--claim", required=True, help="PersistentVolumeClaim (ReadWriteMany) mounted at /runs")
    parser.add_argument("--slices", type=int, default=1, help="default 1")
    parser.add_argument("--secret", help="Secret whose keys become variables, where it exists (default NAME-tokens)")
    parser.add_argument("--restarts", type=int, default=100, help="of all pods, after preemptions too (default 100)")
    parser.add_argument(
        "--grace", type=int, default=600, help="seconds from SIGTERM to SIGKILL, 300 or more (default 600)"
    )
    parser.add_argument("--apply", action="store_true", help="hand it to `kubectl apply` instead of printing it")
    parser.add_argument(
        "--dry-run", action="store_true", help="with --apply: print the command and the YAML, run nothing"
    )
    parser.add_argument("arguments", nargs="+", metavar="-- ARGUMENTS", help="of python -m safe_rlhf_jax.train")
    return parser, parser.parse_args(arguments)


def render(parser, options):
    """Returns the YAML; exits with a message about what does not fit."""
    if not NAME.fullmatch(options.name):
        parser.error(
            f"--name {options.name!r}: lower-case letters, digits and hyphens, at most 42, beginning with a letter"
        )
    if not re.fullmatch(r"\d+(x\d+){1,2}", options.topology):
        parser.error(f"--topology {options.topology!r}: sizes joined by x, such as 4x4 or 2x2x4")
    chips = math.prod(map(int, options.topology.split("x")))
    if options.hosts < 1 or chips % options.hosts:
        parser.error(f"--hosts {options.hosts} does not divide the {chips} chips of --topology {options.topology}")
    if options.grace < 300:
        parser.error(f"--grace {options.grace}: a checkpoint may need 300 seconds")
    plain = {key: getattr(options, key) for key in ("name", "slices", "hosts", "restarts", "grace", "topology")}
    quoted = {key: json.dumps(getattr(options, key)) for key in ("accelerator", "image", "claim")}
    values = (
        plain
        | quoted
        | {
            "chips": chips // options.hosts,
            "secret": json.dumps(options.secret or f"{options.name}-tokens"),
            "arguments": json.dumps(options.arguments),
        }
    )
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(values)


def main():
    """Prints or applies."""
    parser, options = parse_arguments()
    text = render(parser, options)
    command = ["kubectl", "apply", "-f", "-"]
    if options.apply and not options.dry_run:
        return subprocess.run(command, input=text, text=True).returncode
    if options.apply:
        print("# " + " ".join(command) + " <<EOF")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
