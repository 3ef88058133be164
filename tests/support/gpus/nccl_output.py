"""Output of both kinds of nccl-tests programs for a link with a known latency of 12 us and bandwidth of 350 GB/s."""

import json

from distattn.cluster import nccl_tests as nccl

SIZES = [2**k for k in range(10, 31, 2)]


def micro(size: int, factor: float, latency: float = 12.0, gbs: float = 350.0) -> float:
    return latency + size * factor / gbs / 1e3


def text(test: str, ranks: int) -> str:
    factor = nccl.FACTORS[test](ranks)
    lines = [f"# Collective test starting: {test}_perf", "# nThread 1 nGpus 8 minBytes 1024 maxBytes 1073741824"]
    lines += [
        f"#  Rank {i:2d} Group  0 Pid {1000 + i} on  node1 device {i:2d} [0000:1{i}:00] GPU" for i in range(ranks)
    ]
    lines += ["#", "#       size         count      type   redop    root     time   algbw   busbw #wrong     time", "#"]
    for size in SIZES:
        t = micro(size, factor)
        half = f"{t:9.2f} {size / t / 1e3:7.2f} {size * factor / t / 1e3:7.2f}      0"
        lines.append(f"{size:12d} {size // 2:12d}      half     sum      -1 {half} {half}")
    return "\n".join([*lines, "# Out of bounds values : 0 OK", "# Avg bus bandwidth    : 201.3 ", "#"])


def as_json(test: str, ranks: int) -> str:
    factor = nccl.FACTORS[test](ranks)
    rows = [
        {"size": size, "count": size // 2, "type": "half", "out_of_place": {"time": micro(size, factor)}}
        for size in SIZES
    ]
    devices = [{"rank": rank, "hostname": "node1"} for rank in range(ranks)]
    secret = {"env": ["TOKEN=secret"], "args": [f"./build/{test}_perf", "-J"]}
    return json.dumps(secret | {"config": {"devices": devices}, "results": rows})
