"""The configurations that distattn ships, by name."""

from __future__ import annotations

from pathlib import Path

# a symbolic link in a checkout, and a copy in a wheel
SHIPPED = Path(__file__).parents[2] / "configs"


def shipped_names() -> list[str]:
    """Return the sorted names of the shipped configurations."""
    return sorted(file.stem for file in SHIPPED.glob("*.toml"))


def configuration_file(name: str | Path) -> Path:
    """Return the file that a command's CONFIG argument names: an existing file, or else a shipped configuration.

    Any other path, such as configs/tiny.toml outside a checkout, is returned unchanged.
    """
    path = Path(name)
    if not path.exists() and str(name) in shipped_names():
        return SHIPPED / f"{name}.toml"
    return path
