"""The compile lint: machine code of every Triton kernel against the committed budget. No GPU is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.full
ROOT = Path(__file__).parents[2]
BUDGETS = ROOT / "benchmarks" / "budgets"


def lint(arch: int, only: str = "", *how: str, **environment: str) -> subprocess.CompletedProcess:
    """In a process of its own: here Triton interprets."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "benchmarks" / "compile_lint.py", "--arch", str(arch), "--only", only, *how]
    return subprocess.run(command, capture_output=True, text=True, env=clean | {"PYTHONPATH": str(ROOT)} | environment)


@pytest.fixture(autouse=True, scope="module")
def budget():
    if not (BUDGETS / f"triton-{triton.__version__}.json").exists():
        pytest.skip(f"there is no budget for Triton {triton.__version__}")


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_no_kernel_is_worse_than_its_budget(arch):
    done = lint(arch)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_kernels_are_compiled_and_compared():
    done = lint(90, "bfloat16 128/128 (forward write|backward dkdv|gluon backward)$", "--all")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("registers") == 3 and "0 kernels are what" in done.stdout


# of torch 2.11, 2.12 and 2.13; .ci/run and `make tritons` put them there, the interpreter's own version stays the newest
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("version", ["3.6.0", "3.7.0", "3.7.1"])
def test_nor_with_the_tritons_that_gpu_machines_have(version, arch):
    older = ROOT / ".venv" / f"triton-{version}"
    if not older.exists():
        pytest.skip(f"Triton {version} is not beside the environment; `make tritons` puts it there")
    # what most models have; `python benchmarks/compile_lint.py` with that Triton on the path takes all
    done = lint(arch, "bfloat16 (64/64|128/128)", PYTHONPATH=f"{older}:{ROOT}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
