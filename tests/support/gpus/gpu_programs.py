"""Runs the programs of `make bench-gpu` and `make check-cluster` without a GPU, with torch and Triton as the only
packages.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
_TORCH_ALONE = Path(__file__).parent / "torch_alone"


def run_program(*command: str, ranks: int = 0) -> subprocess.CompletedProcess:
    """Run one program with Triton's interpreter, on `ranks` torchrun ranks, or without torchrun if `ranks` is 0."""
    pytest.importorskip("triton", reason="Triton is not installed")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)) if ranks else ()
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (_TORCH_ALONE, ROOT)))}
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} | paths
    return subprocess.run(
        [sys.executable, *launcher, *command], capture_output=True, text=True, env=environment, cwd=ROOT
    )
