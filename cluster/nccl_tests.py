"""Link speeds from the output of nccl-tests: its text table or its JSON (-J).

The factors in nccl-tests' doc/PERFORMANCE.md convert a size into the bytes that each rank's port carries, from which the bus
bandwidth follows. A link is fitted as time = latency + bytes / bandwidth. The JSON contains the environment of the user who ran
the test; only sizes, times and the number of ranks are read from it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distattn.cluster.spec import Link
from distattn.ir.errors import DistattnError

# bytes through each rank's port with n ranks, as a multiple of the size that nccl-tests prints
FACTORS = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "alltoall": lambda n: (n - 1) / n,
    "sendrecv": lambda n: 1.0,
}
_COMMAND = re.compile(r"(\w+?)_perf\b")


@dataclass(frozen=True)
class NcclTestRun:
    """One run of nccl-tests. rows: (size in bytes, microseconds) of each out-of-place measurement."""

    test: str
    ranks: int
    rows: tuple[tuple[int, float], ...]

    def link(self) -> Link:
        """Fit a link's latency and bandwidth to the measured times by least squares of relative errors."""
        size = np.array([row[0] for row in self.rows]) * FACTORS[self.test](self.ranks)
        micro = np.array([row[1] for row in self.rows])
        # relative errors, so that the noise of long messages does not determine the latency
        left = np.stack([np.ones(len(size)), size], 1) / micro[:, None]
        (latency, per_byte), *_ = np.linalg.lstsq(left, np.ones(len(size)), rcond=None)
        if per_byte <= 0:
            raise DistattnError(
                f"nccl-tests {self.test}: larger messages are not slower; measure more and larger sizes."
            )
        return Link(gbs=float(1e-3 / per_byte), latency_us=float(max(latency, 0.0)))


def read(path: str | Path, test: str | None = None) -> NcclTestRun:
    """Read nccl-tests' text or JSON output. test: overrides the test's name in it. Raise DistattnError for other content."""
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DistattnError(f"{path}: the nccl-tests output cannot be read: {error}.") from None
    try:
        name, ranks, rows = _parse_json(text) if text.lstrip().startswith("{") else _parse_text(text)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DistattnError(
            f"{path}: this is not the output of nccl-tests ({type(error).__name__}: {error})."
        ) from None
    name = test or name
    if name not in FACTORS:
        raise DistattnError(
            f"{path}: the test is {name or 'not named'}; distattn reads those named {', '.join(FACTORS)}."
        )
    rows = [row for row in rows if row[0] > 0 and row[1] > 0]
    if ranks < 2 or len(rows) < 2:
        raise DistattnError(
            f"{path}: it has {ranks} ranks and {len(rows)} rows of sizes and times; at least two of each are needed."
        )
    return NcclTestRun(name, ranks, tuple(rows))


def commands(ranks_on_node: int, nodes: int = 1) -> list[str]:
    """Return the commands that measure a cluster's links: inside a node, and between nodes if there are several."""
    sizes = "-b 8 -e 1G -f 4 -J nccl-{name}.json"
    inside = f"sendrecv_perf -g {ranks_on_node} {sizes.format(name='inside')}"
    if nodes == 1:
        return [inside]
    return [inside, f"srun --nodes={nodes} --ntasks-per-node=1 sendrecv_perf -g 1 {sizes.format(name='across')}"]


def _parse_text(text: str) -> tuple[str, int, list[tuple[int, float]]]:
    name, ranks, rows = "", 0, []
    # index of the time column in current tables; the header of an older table, which has one column fewer, corrects it
    time = 5
    for line in text.splitlines():
        columns = line.split()
        if line.startswith("#") and "size" in columns and "time" in columns:
            time = columns.index("time") - 1
        if not name and (matched := _COMMAND.search(line)):
            name = matched[1]
        if re.match(r"#\s+Rank\s+\d+", line):
            ranks += 1
        elif not line.startswith("#") and len(columns) > time + 1 and columns[0].isdecimal():
            size, micro, rate = int(columns[0]), float(columns[time]), float(columns[time + 1])
            # check the row: algbw is size / time, rounded to the printed digits
            if micro > 0 and abs(size / micro / 1e3 - rate) > 0.02 + 0.02 * rate:
                raise ValueError(f"time and algbw of size {size} do not agree")
            rows.append((size, micro))
    if not rows:
        raise ValueError("no row of sizes and times")
    return name, ranks, rows


def _parse_json(text: str) -> tuple[str, int, list[tuple[int, float]]]:
    content: dict[str, Any] = json.loads(text)
    arguments = content.get("args", [])
    command = " ".join(map(str, arguments)) if isinstance(arguments, list) else str(arguments)
    matched = _COMMAND.search(command)
    ranks = len(content["config"]["devices"])
    rows = [(int(row["size"]), float(row["out_of_place"]["time"])) for row in content["results"]]
    return matched[1] if matched else "", ranks, rows
