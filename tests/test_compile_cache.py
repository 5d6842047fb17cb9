"""Compiled programs in the workdir: compiled once, whoever else has a cache keeps it."""

import warnings

import jax
import jax.numpy as jnp
import pytest

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import stages, train
from safe_rlhf_jax.compile_cache import kept_programs
from tests.conftest import MINI

SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def no_cache(monkeypatch):
    """JAX without the cache of the tests, and without a minimum, for programs of a test's size."""
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def compiled_anew(program, number):
    """Calls a program that this process has forgotten; says how many programs were compiled, not read."""
    found = []
    listen = lambda event, **_: found.append(event)  # noqa: E731
    jax.monitoring.register_event_listener(listen)
    try:
        jax.clear_caches()
        assert int(program(number)) == 3
    finally:
        jax.monitoring.unregister_event_listener(listen)
    hits = found.count("/jax/compilation_cache/cache_hits")
    return found.count("/jax/compilation_cache/compile_requests_use_cache") - hits


def program(number):
    return jax.jit(lambda x: x + 1)(number)


def test_program_is_compiled_once_in_a_workdir_and_again_in_another(no_cache, tmp_path):
    two = jnp.int32(2)
    with kept_programs(tmp_path / "a"):
        assert compiled_anew(program, two) == 1
    assert list((tmp_path / "a" / ".compiled").iterdir())
    with kept_programs(tmp_path / "a"):
        assert compiled_anew(program, two) == 0
    with kept_programs(tmp_path / "b"):
        assert compiled_anew(program, two) == 1
    assert jax.config.jax_compilation_cache_dir is None, "what follows a run is not written into its workdir"


def test_cache_that_jax_has_is_kept(no_cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    with kept_programs(tmp_path / "run"):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")


def test_no_program_is_kept_where_jax_is_told_to_keep_none(no_cache, tmp_path):
    jax.config.update("jax_enable_compilation_cache", False)  # JAX_ENABLE_COMPILATION_CACHE=false
    try:
        with kept_programs(tmp_path):
            program(jnp.int32(2))
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert not list(tmp_path.iterdir())


def test_program_that_cannot_be_read_is_compiled_anew(no_cache, tmp_path):
    with kept_programs(tmp_path):
        compiled_anew(program, jnp.int32(2))
    for file in (tmp_path / ".compiled").glob("*-cache"):
        file.write_bytes(file.read_bytes()[:100])
    with kept_programs(tmp_path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert compiled_anew(program, jnp.int32(2)) == 1


def test_stages_of_a_run_share_the_cache_of_its_workdir(no_cache, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(stages, "check_run", lambda run: None)
    monkeypatch.setattr(stages, "run_stage", lambda *_: found.append(jax.config.jax_compilation_cache_dir))
    monkeypatch.setattr(train, "result_of", lambda *_: None)
    train.run_stages(cfg.load_config(MINI, [f"workdir={tmp_path}"]), "mini")
    assert set(found) == {str(tmp_path / ".compiled")}
