"""Configs in the package, by name."""

from safe_rlhf_jax import storage
from safe_rlhf_jax.errors import ConfigError

FOLDER = storage.path(__file__).parent.parent / "configs"


def config_file(path: storage.Place) -> storage.Path:
    """Returns a config file; a name without a suffix, such as "quickstart", is that of a config in the package.

    Raises:
        ConfigError: If there is none; lists the existing ones.
    """
    file = storage.path(path)
    if not file.suffix and not storage.is_file(file):
        file = FOLDER / f"{path}.yaml"
    if storage.is_file(file):
        return file
    names = sorted(str(p.relative_to(FOLDER).with_suffix("")) for p in storage.matching(FOLDER, "**/*.yaml"))
    raise ConfigError(f"--config {path}: no such file; with the package come, by name: {', '.join(names)}")
