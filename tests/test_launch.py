"""The launchers, as far as a machine without a cluster can tell: what they would do, and what they refuse."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch"))
PROGRAMS = [*SCRIPTS, "render_gke.py"]
RUN = ["--config", "configs/quickstart.yaml", "title=My run"]
TPU = ["--name", "run1", "--project", "P", "--zone", "Z", "--type", "v5litepod-16", "--runtime", "R", "--dry-run"]
GKE = ["--name", "run1", "--image", "I", "--accelerator", "A", "--topology", "4x4", "--hosts", "4", "--claim", "C"]


def launch(program, *arguments, **environment):
    command = [sys.executable] if program.endswith(".py") else ["bash"]
    return subprocess.run(
        [*command, ROOT / "launch" / program, *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable} | environment,
    )  # fmt: skip


def dry(program, *arguments, **environment):
    process = launch(program, *arguments, **environment)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def test_scripts_pass_shellcheck():
    shellcheck = Path(sys.executable).with_name("shellcheck")  # of the extra `dev`
    process = subprocess.run([shellcheck, *SCRIPTS], cwd=ROOT / "launch", capture_output=True, text=True)
    assert process.returncode == 0, process.stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_short_and_ends_well(program):
    lines = dry(program, "--help")
    assert lines[0].startswith("usage: ")
    assert any("--dry-run" in line for line in lines)


@pytest.mark.parametrize("program", PROGRAMS)
def test_command_without_a_run_is_a_usage_error(program):
    arguments = {"tpu_vm.sh": TPU, "render_gke.py": GKE, "local.sh": ["2"]}.get(program, [])
    process = launch(program, *arguments)
    assert process.returncode == 2
    assert "ARGUMENTS" in process.stderr or "--help" in process.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "launch").iterdir()), ids=lambda path: path.name)
def test_no_project_bucket_zone_or_token_is_baked_in(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"gs://|gcr\.io|pkg\.dev|(us|europe|asia)-[a-z]+\d|hf_[A-Za-z]{8}|--project[= ][a-z]", text)


def test_local_processes_share_a_coordinator_and_differ_in_their_number():
    lines = dry("local.sh", "--dry-run", "--port", "1234", "--devices", "4", "3", "--", *RUN)
    assert len(lines) == 3
    for i, line in enumerate(lines):
        assert f"JAX_COORDINATOR_ADDRESS=localhost:1234 JAX_NUM_PROCESSES=3 JAX_PROCESS_ID={i} " in line
        assert "device_count=4 " in line
        assert line.rstrip().endswith("-m safe_rlhf_jax.train --config configs/quickstart.yaml title=My\\ run")


def test_local_processes_that_fail_give_their_status():
    process = launch("local.sh", "2", "--", "--config", "no/such.yaml")
    assert process.returncode == 1
    assert "[1] error: --config no/such.yaml: no such file" in process.stdout


def test_local_hands_termination_on(tmp_path):
    """The interpreter is a script that waits for SIGTERM and leaves with the status of a saved run."""
    python = tmp_path / "python"
    python.write_text("#!/bin/bash\ntrap 'exit 143' TERM\necho ready\nwhile :; do sleep 0.1; done\n")
    python.chmod(0o755)
    command = ["bash", ROOT / "launch" / "local.sh", "--port", "1", "2", "--", *RUN]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHON": str(python)}
    )
    assert {process.stdout.readline(), process.stdout.readline()} == {"[0] ready\n", "[1] ready\n"}
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143


def test_tpu_slice_is_created_installed_on_and_run_on_all_hosts_and_deleted_on_request():
    lines = dry("tpu_vm.sh", *TPU, "--spot", "--delete", "--setup", "mount it", "--", *RUN)
    assert lines[0].startswith("gcloud compute tpus queued-resources create run1 --project P --zone Z --node-id run1")
    assert "--accelerator-type v5litepod-16 --runtime-version R --spot" in lines[0]
    (setup,) = (i for i, line in enumerate(lines) if "mount\\ it" in line)
    (run,) = (i for i, line in enumerate(lines) if "safe_rlhf_jax.train" in line)
    assert setup < run
    assert "--worker all" in lines[setup]
    assert "--worker all" in lines[run]
    assert "143" in lines[-2]
    assert lines[-1].startswith("gcloud compute tpus queued-resources delete run1")
    assert not any("delete" in line for line in dry("tpu_vm.sh", *TPU, "--", *RUN)[:-1])


# Stands for a command of a cluster: writes down how it was called, and answers as the command would.
STUB = r"""#!/bin/bash
printf '%q ' "$(basename "$0")" "$@" >>"$CALLS"
echo >>"$CALLS"
case $* in
    *' create '*) touch "$CALLS.created" ;;
    *' describe '*) [[ ! -e $CALLS.created ]] || echo ACTIVE ;;
    *'cat ~/train.status'*) echo 0 ;;
    *safe_rlhf_jax.train*) [[ $0 != *srun ]] || exit 143 ;;
esac
"""


@pytest.mark.parametrize(
    ("program", "arguments", "unshown", "status"),
    [
        ("tpu_vm.sh", [*TPU[:-1], "--spot", "--delete", "--", *RUN], (" describe ", "--worker 0 ", ":environment "), 0),
        ("slurm.sbatch", RUN, ("scontrol requeue 7",), 143),
    ],
)
def test_what_a_dry_run_shows_is_what_a_run_calls(tmp_path, program, arguments, unshown, status):
    for name in ("gcloud", "git", "srun", "scontrol"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "SLURM_JOB_ID": "7"}
    process = launch(program, *arguments, **environment)
    assert process.returncode == status, process.stderr
    called = (tmp_path / "calls").read_text().splitlines()
    shown = [line for line in dry(program, "--dry-run", *arguments, SLURM_JOB_ID="7") if not line.startswith("#")]
    assert [line for line in called if not any(part in line for part in unshown)] == shown
    assert all(any(part in line for line in called) for part in unshown)


def test_values_of_the_environment_are_on_no_command_line():
    lines = dry("tpu_vm.sh", *TPU, "--environment", "HF_TOKEN", "--", *RUN, HF_TOKEN="secret-value")
    assert any("HF_TOKEN" in line for line in lines)
    assert "secret-value" not in "\n".join(lines)


def test_tpu_launcher_names_what_is_missing():
    process = launch("tpu_vm.sh", "--name", "run1", "--", *RUN, TPU_PROJECT="", TPU_ZONE="")
    assert process.returncode == 2
    assert "--project is missing" in process.stderr


def test_slurm_runs_one_process_per_gpu_and_goes_back_into_the_queue_when_interrupted():
    lines = dry("slurm.sbatch", "--dry-run", *RUN, SLURM_JOB_ID="7")
    assert lines[0].startswith("srun ")
    assert lines[0].rstrip().endswith("-m safe_rlhf_jax.train --config configs/quickstart.yaml title=My\\ run")
    assert lines[1] == "# on exit status 143: scontrol requeue 7"
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", (ROOT / "launch" / "slurm.sbatch").read_text(), re.M))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert "requeue" in options
    assert int(options["signal"].split("@")[1]) >= 300


def test_jobset_has_a_pod_per_host_and_time_to_save():
    lines = dry("render_gke.py", *GKE, "--slices", "2", "--", *RUN)
    jobset = yaml.safe_load("\n".join(lines))
    assert (jobset["kind"], jobset["metadata"]["name"]) == ("JobSet", "run1")
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert (job["replicas"], spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (2, 4, 4, 0)
    assert pod["terminationGracePeriodSeconds"] >= 300
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    assert container["resources"]["limits"]["google.com/tpu"] == 4
    assert container["command"][-1] == "safe_rlhf_jax.train"
    assert container["args"] == RUN
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert dry("render_gke.py", *GKE, "--slices", "2", "--apply", "--dry-run", "--", *RUN)[1:] == lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hosts", "3"], "does not divide the 16 chips"),
        (["--grace", "30"], "may need 300"),
        (["--name", "A_b"], "lower"),
    ],
)
def test_jobset_that_cannot_work_is_refused(arguments, message):
    process = launch("render_gke.py", *GKE, *arguments, "--", *RUN)
    assert process.returncode == 2
    assert message in process.stderr
