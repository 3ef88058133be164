"""Compiles the launches of a case for Hopper, in a separate process because the tests' process interprets Triton.

    python -m ptx.compile '["forward", "bfloat16", 64, 2, 1, false]'

prints a line of JSON with one compiled kernel per launch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from distattn.kernels.triton.launch import TritonLaunch

from .cases import HOPPER, Case, any_call

ROOT = Path(__file__).parents[4]


class Compiled(NamedTuple):
    """A compiled kernel and everything Triton's launcher needs to know about it."""

    ptx: str
    # bytes of shared memory
    shared: int
    # argument types, keyed by name; "constexpr" for arguments that are compiled in
    signature: dict[str, str]
    # metadata of the tensor maps, in order
    maps: list[dict[str, Any]]
    # properties of the arguments: the values compiled in, and the names of arguments that are multiples of 16
    constants: dict[str, Any]
    divisible: list[str]


def compiled(case: Case, triton: Path | None = None) -> list[Compiled]:
    """Return the compiled launches of a case. triton: a folder with a Triton version other than the environment's."""
    # lengths, masks and the grid are data, so one compilation serves all their values
    data = {name: Case._field_defaults[name] for name in ("tokens", "documents", "multiprocessors")}
    return _compiled(case._replace(**data), triton)


@cache
def _compiled(case: Case, triton: Path | None) -> list[Compiled]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "tests/support", "tests/support/gpus", "benchmarks"))
    if triton:
        paths = os.pathsep.join((str(triton), paths))
    command = [sys.executable, "-W", "ignore", "-m", "ptx.compile", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment | {"PYTHONPATH": paths})
    if done.returncode:
        raise RuntimeError(f"{case} does not compile:\n{done.stderr[-2000:]}")
    return [Compiled(*kernel) for kernel in json.loads(done.stdout)]


def main() -> None:
    """Compile the case given on the command line."""
    launches = any_call(Case(*json.loads(sys.argv[1]))).launches
    out = [_compile(launch) for launch in launches]
    sys.stdout.write(json.dumps(out))


def _compile(launch: TritonLaunch) -> Compiled:
    from compile_lint import compiled as compile_launch

    kernel = compile_launch(launch, HOPPER)
    source = kernel.src
    names = list(source.signature)
    constants = {names[place[0]]: value for place, value in source.constants.items()}
    divisible = [names[place[0]] for place, attributes in source.attrs.items() if ["tt.divisibility", 16] in attributes]
    maps = kernel.metadata.tensordesc_meta or []
    return Compiled(kernel.asm["ptx"], kernel.metadata.shared, source.signature, maps, constants, divisible)


if __name__ == "__main__":
    main()
