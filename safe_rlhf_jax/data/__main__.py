"""Command line: `python -m safe_rlhf_jax.data`, which is `inspect_data`."""

import sys

from safe_rlhf_jax.inspect_data import main

if __name__ == "__main__":
    sys.exit(main())
