"""Compiled programs on disk: a run keeps them in its workdir, so that each is compiled once, restarts included."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from safe_rlhf_jax import storage

FOLDER = ".compiled"  # in the workdir, where no stage has this name; may be removed at any time
SECONDS = 0.1  # programs that compile faster are not kept; JAX's own default is 1


@contextlib.contextmanager
def kept_programs(workdir: storage.Place) -> Iterator[None]:
    """Keeps the programs that are compiled within the block in a workdir, and takes them from there.

    Where JAX has a cache already (`JAX_COMPILATION_CACHE_DIR`, `jax.config`), or is to have none
    (`JAX_ENABLE_COMPILATION_CACHE=false`), nothing is changed. Of several processes the first one writes, all read.
    """
    options: Any = jax.config
    if options.jax_compilation_cache_dir is not None or not options.jax_enable_compilation_cache:
        yield
        return
    settings: dict[str, Any] = {"jax_compilation_cache_dir": str(storage.absolute(workdir) / FOLDER)}
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        settings |= {"jax_persistent_cache_min_compile_time_secs": SECONDS}
    before = {name: getattr(options, name) for name in settings}
    configure(settings)
    try:
        yield
    finally:
        configure(before)


def configure(settings: Mapping[str, Any]) -> None:
    """Sets options of JAX, and lets its cache read them anew: it reads them once."""
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
