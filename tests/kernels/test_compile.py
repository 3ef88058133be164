"""The compile lint: the machine code of every Triton kernel stays within the committed budget. No GPU is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
BUDGETS = BENCHMARKS / "budgets"


def lint(arch: int, only: str = "", *how: str, **environment: str) -> subprocess.CompletedProcess:
    """Run the lint in a separate process, since this process interprets Triton."""
    return run([BENCHMARKS / "compile_lint.py", "--arch", str(arch), "--only", only, *how], **environment)


def run(arguments, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = {"PYTHONPATH": f"{ROOT}:{BENCHMARKS}"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=clean | paths | environment)


@pytest.fixture(autouse=True, scope="module")
def budget():
    if not (BUDGETS / f"triton-{triton.__version__}.json").exists():
        pytest.skip(f"there is no budget for Triton {triton.__version__}")


def test_what_layer_calls_of_a_ring_launch_has_a_budget():
    done = lint(90, "launched", "--names", "--production", "ring")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    # forward, backward and glue kernels
    assert int(done.stdout.split()[0]) > 100, done.stdout


LAUNCHES_ANOTHER = """
import sys
import compile_lint
compile_lint.variants = lambda arch: []
compile_lint.launched = lambda *given: [("sm_90 launched another kernel", None, "its digest")]
sys.argv = ["lint", "--arch", "90", "--names", "--production"]
sys.exit(compile_lint.main())
"""


def test_a_launch_without_a_budget_is_refused():
    done = run(["-c", LAUNCHES_ANOTHER])
    assert done.returncode == 1 and "sm_90 launched another kernel: has no budget" in done.stdout, done.stderr


@pytest.mark.full
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_no_kernel_is_worse_than_its_budget(arch):
    done = lint(arch, "", "--production")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.full
def test_kernels_are_compiled_and_compared():
    done = lint(90, "bfloat16 128/128 (forward write|backward dkdv|gluon backward)$", "--all")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("registers") == 3 and "0 kernels are what" in done.stdout


@pytest.mark.full
def test_launches_are_compiled_and_compared():
    done = lint(80, "launched glue rows_kernel 64 float32 (add )?ROWS", "--all", "--production", "ring")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("registers") == 2 and "0 kernels are what" in done.stdout


# the Triton versions of torch 2.11, 2.12 and 2.13. .ci/run and `make tritons` install them next to the environment,
# which keeps the newest version
@pytest.mark.full
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("version", ["3.6.0", "3.7.0", "3.7.1"])
def test_no_kernel_is_worse_than_its_budget_with_older_tritons(version, arch):
    older = ROOT / ".venv" / f"triton-{version}"
    if not older.exists():
        pytest.skip(f"Triton {version} is not installed next to the environment; run `make tritons`")
    # only the shapes that most models have; `make lint-kernels` covers all shapes
    paths = f"{older}:{ROOT}:{BENCHMARKS}"
    done = lint(arch, "bfloat16 (64/64|128/128)|launched", "--production", "ring", PYTHONPATH=paths)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
