"""`distattn configs`: list, show and copy the configurations that distattn ships."""

from __future__ import annotations

import difflib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from distattn.ir.errors import DistattnError
from distattn.training.config.shipped_configs import SHIPPED, shipped_names

_USAGE = """usage: distattn configs [list]
       distattn configs show NAME
       distattn configs copy NAME [FOLDER]

Lists, prints or copies a configuration that distattn ships. A copy is FOLDER/NAME.toml; FOLDER is . by default. The folder of
the model is copied, too, if the configuration names one: tiny names none, since its shape is in tiny.toml.

Every command that takes a CONFIG takes a NAME, too: distattn train tiny
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command. Return the exit code."""
    action, *rest = arguments or ["list"]
    if action in ("-h", "--help"):
        sys.stdout.write(_USAGE)
        return 0
    if action not in ("list", "show", "copy"):
        raise DistattnError(f"configs: there is no {action!r}; there are list, show and copy.")
    most = {"list": 0, "show": 1, "copy": 2}[action]
    if len(rest) > most or (action != "list" and not rest):
        raise DistattnError(f"configs {action}: wrong number of arguments, {len(rest)}; see distattn configs --help.")
    if action == "list":
        for name in shipped_names():
            sys.stdout.write(f"{name:24} {_first_sentence(_file(name))}\n")
    elif action == "show":
        sys.stdout.write(_file(rest[0]).read_text("utf-8"))
    else:
        _copy(_file(rest[0]), Path(rest[1] if len(rest) > 1 else "."))
    return 0


def _file(name: str) -> Path:
    """Return the file of a shipped configuration. For an unknown name, raise DistattnError that suggests a similar name."""
    if name not in shipped_names():
        near = difflib.get_close_matches(name, shipped_names(), 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(shipped_names())}."
        raise DistattnError(f"configs: distattn ships no {name!r}; {hint}")
    return SHIPPED / f"{name}.toml"


def _first_sentence(file: Path) -> str:
    """Return the first sentence of the comment at the top of a configuration file."""
    return file.read_text("utf-8").splitlines()[0].removeprefix("# ").partition(". ")[0].rstrip(".")


def _copy(file: Path, folder: Path) -> None:
    """Copy a configuration, and its model's config.json if it names one, to a folder without overwriting files."""
    target = folder / file.name
    # keep the relative paths, since model.path is relative to the run file
    models = [
        path
        for path in SHIPPED.glob("models/*/config.json")
        if f'"models/{path.parent.name}"' in file.read_text("utf-8")
    ]
    copies = [(file, target), *((path, folder / path.relative_to(SHIPPED)) for path in models)]
    for _, copy in copies:
        if copy.exists():
            raise DistattnError(f"configs copy: {copy} exists and is not overwritten; name another folder.")
    for source, copy in copies:
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
        sys.stdout.write(f"{copy}\n")
