"""Configs that come with the package, by name."""

import pathlib

from safe_rlhf_jax.errors import ConfigError

FOLDER = pathlib.Path(__file__).parent.parent / "configs"


def config_file(path: str | pathlib.Path) -> pathlib.Path:
    """Returns a config file; a name without a suffix, such as "quickstart", is that of one that comes with the package.

    Raises:
        ConfigError: If there is none; lists those there are.
    """
    file = pathlib.Path(path)
    if not file.suffix and not file.is_file():
        file = FOLDER / f"{path}.yaml"
    if file.is_file():
        return file
    names = sorted(str(p.relative_to(FOLDER).with_suffix("")) for p in FOLDER.glob("**/*.yaml"))
    raise ConfigError(f"--config {path}: no such file; with the package come, by name: {', '.join(names)}")
