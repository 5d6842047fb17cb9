"""Loading and saving by several processes, each with some of the devices of one mesh."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from safe_rlhf_jax.models import hf
from tests.helpers import make_lm, perturbed, tiny_config

ROOT = Path(__file__).parent.parent.parent

CODE = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.sharding import make_mesh
source, target, tied = sys.argv[3:]
mesh = make_mesh((2, 2, 2))
module, variables = hf.load(source, mesh=mesh)
assert not variables["params"]["decoder"]["embedding"].is_fully_addressable
hf.save(f"{target}/lm", module, variables, max_file_bytes=20_000)
module, variables = hf.load(source, "score", score_type="reward", mesh=mesh)
hf.save(f"{target}/reward", module, variables)
hf.save(f"{target}/untied", *hf.load(tied, mesh=mesh))
"""


@pytest.mark.slow
def test_two_processes_load_their_shards_and_save_one_folder(tmp_path):
    config = tiny_config(vocab_size=96, hidden_size=32, intermediate_size=64, num_heads=8, num_kv_heads=8, head_dim=8)
    module, variables = make_lm(config)
    source = hf.save(tmp_path / "source", module, perturbed(variables), max_file_bytes=20_000)
    tied = hf.save(tmp_path / "tied", module, perturbed(variables))  # a head of its own, whatever config.json says
    edited = json.loads((tied / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tied / "config.json").write_text(json.dumps(edited))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4"), "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, address, str(rank), str(source), str(tmp_path), str(tied)],
            env=os.environ | flags, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert ["it is used, untied" in output for output in outputs] == [True, False]
    assert (tmp_path / "untied" / hf.WEIGHTS).read_bytes() == (tied / hf.WEIGHTS).read_bytes()
    files = sorted(path.name for path in source.iterdir())
    assert sorted(path.name for path in (tmp_path / "lm").iterdir()) == files
    for file in files:
        assert (tmp_path / "lm" / file).read_bytes() == (source / file).read_bytes()
    alone = hf.load(source, "score", score_type="reward")[1]["params"]
    together = hf.load(tmp_path / "reward", "score")[1]["params"]
    np.testing.assert_array_equal(together["score_kernel"], alone["score_kernel"])
