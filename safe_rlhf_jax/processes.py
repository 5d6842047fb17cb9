"""Several processes as one run: they join, agree, and stop together.

Every process runs the same program on its own devices; the first one writes. A single process is the case n = 1.
"""

import contextlib
import functools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from safe_rlhf_jax import log, storage
from safe_rlhf_jax.errors import UserError

COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
HEARTBEAT = 30  # seconds without a heartbeat after which a process counts as dead, and the others stop
JOINING = 300  # seconds to wait for the others at the start
SILENT = 10  # seconds after which a process reports that it waits, if it could not know of the others before
SLURM = ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")
# Clusters recognised by environment variables: all of the first, and the one with the number of processes.
CLUSTERS = {
    "SLURM": (tuple(f"SLURM_{name}" for name in SLURM), "SLURM_NTASKS"),
    "Open MPI": (("OMPI_MCA_orte_hnp_uri",), "OMPI_COMM_WORLD_SIZE"),
}


def start() -> None:
    """Joins the other processes of this run, if the environment defines any.

    Either all of `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` are set, or JAX recognises the
    cluster (TPU pod, GKE, SLURM, Open MPI); `JAX_NUM_PROCESSES=1` disables the detection. Must be called before any use
    of a device. A process that has joined, or is alone, may call it again.

    Raises:
        UserError: If some of the three variables are missing or invalid, or JAX has been used already.
    """
    if jax.distributed.is_initialized():
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from `loop.Preemption`
    named = {name: os.environ[name] for name in (COORDINATOR, COUNT, INDEX) if os.environ.get(name)}
    if named.get(COUNT) == "1":
        return
    if COUNT in named or INDEX in named:
        count, index = named.get(COUNT, ""), named.get(INDEX, "")
        if len(named) < 3 or not (count.isdigit() and index.isdigit() and int(index) < int(count)):
            raise UserError(
                f"processes: {named} in the environment; set {COORDINATOR}=HOST:PORT, {COUNT}=N and {INDEX}=0 … N − 1, "
                "or none of them"
            )
    reminder = threading.Timer(SILENT, say_waiting, ["the other processes of this run"])
    if COUNT not in named and (others := found_by_cluster()):
        say_waiting(others)
    else:
        reminder.start()
    try:
        jax.distributed.initialize(
            num_processes=int(named[COUNT]) if COUNT in named else None,
            process_id=int(named[INDEX]) if INDEX in named else None,
            initialization_timeout=JOINING,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except ValueError as error:
        if COORDINATOR in named or "coordinator_address" not in str(error):
            raise
        return  # no cluster: one process
    except RuntimeError as error:
        if "called before" not in str(error):
            raise
        if COUNT in named or found_by_cluster():
            raise UserError(
                "processes: JAX has been used in this process already; a run of several processes begins before that"
            ) from error
        return  # one process, which has used JAX before
    finally:
        reminder.cancel()
    if not is_main():
        log.hush()


def found_by_cluster() -> str | None:
    """Describes the number of other processes that a cluster reports; None if there are none."""
    for cluster, (needed, counter) in CLUSTERS.items():
        count = os.environ.get(counter, "")
        if count.isdigit() and int(count) > 1 and all(name in os.environ for name in needed):
            return f"{int(count) - 1} other processes, because {cluster} says that there are {count} ({counter})"
    return None


def say_waiting(others: str) -> None:
    """Reports the processes that this one waits for, and how to avoid the wait."""
    print(
        f"processes: waiting up to {JOINING} seconds for {others}. If this one was started alone, as in an interactive "
        f"session inside a job, set {COUNT}=1",
        file=sys.stderr,
        flush=True,
    )


def is_main() -> bool:
    """Says whether this is the process that writes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process arrives."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@functools.cache
def flag_program() -> tuple[Mesh, Callable[[jax.Array], jax.Array]]:
    """Returns a mesh of all devices, and the program that asks whether any of one flag per device is set."""
    mesh = Mesh(np.asarray(jax.devices()), ("all",))
    return mesh, jax.jit(lambda flags: flags.any(), out_shardings=NamedSharding(mesh, PartitionSpec()))


def any_process(flag: bool) -> jax.Array:
    """Returns bool[], true if any process passes true. All processes call it; the answer is not waited for."""
    mesh, any_of = flag_program()
    sharding = NamedSharding(mesh, PartitionSpec("all"))
    flags = jax.make_array_from_callback((jax.device_count(),), sharding, lambda _: np.full(1, flag))
    with jax.set_mesh(mesh):
        return any_of(flags)


def first_says(text: str) -> str:
    """Returns the ASCII text of the first process in all of them; it has the same length in each."""
    if jax.process_count() == 1:
        return text
    return bytes(multihost_utils.broadcast_one_to_all(np.frombuffer(text.encode(), np.uint8))).decode()


def of_first(work: Callable[[], np.ndarray], like: np.ndarray) -> np.ndarray:
    """Returns what the first process computes, in all of them; they call it together.

    Args:
        work: Called in the first process.
        like: An array of the result's shape and dtype.

    Raises:
        UserError: If `work` raises one; in the other processes without the reason.
    """
    if jax.process_count() == 1:
        return work()
    problem, found = None, like
    if is_main():
        try:
            found = work()
        except UserError as error:
            problem = error
    if any_process(problem is not None):
        raise problem or UserError("the first process has failed; it says why")
    return np.asarray(multihost_utils.broadcast_one_to_all(found))


def stop(status: int) -> int:
    """Returns the exit status of a failed run; with other processes, ends this one immediately.

    An orderly exit would first wait for the others, which wait for this one.
    """
    if jax.distributed.is_initialized():
        print(
            "This process stops, and with it the others. If the error above speaks of a lost connection, "
            "another process died first: see what that one says.",
            file=sys.stderr,
        )
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
    return status


@contextlib.contextmanager
def claimed(folder: storage.Place) -> Iterator[None]:
    """Locks a folder for this run: two runs must not write into one.

    The lock belongs to the process, not to the file: it ends with the process, however that ends.

    Raises:
        UserError: If a live run holds the folder, naming its process and host.
    """
    if not is_main():
        yield
        return
    holder = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(storage.locked(folder, holder))
        except BlockingIOError as error:
            raise UserError(
                f"workdir {folder} is in use by {error}. Wait for it to end, stop it, or set another workdir."
            ) from None
        yield
