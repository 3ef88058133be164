"""The configurations that distattn ships, by name."""

from __future__ import annotations

from pathlib import Path

# linked here in a checkout, and copied here by a wheel
SHIPPED = Path(__file__).parents[2] / "configs"


def shipped_names() -> list[str]:
    """Return the names of the shipped configurations, sorted."""
    return sorted(file.stem for file in SHIPPED.glob("*.toml"))


def configuration_file(name: str | Path) -> Path:
    """Return the file that a command's CONFIG names: the file itself, or the shipped configuration of that name.

    A path that does not exist, such as configs/tiny.toml outside a checkout, is returned as it is.
    """
    path = Path(name)
    if not path.exists() and str(name) in shipped_names():
        return SHIPPED / f"{name}.toml"
    return path
