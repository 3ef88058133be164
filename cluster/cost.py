"""The seconds that kernel launches, messages and copies take on a cluster. All other time models build on this one.

The speed of core attention comes from a table of measurements on full rectangles; other masks cost all tiles that they touch.
`distattn.parallel.tables.cost` is the same model in integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from distattn.cluster.spec import ClusterSpec
from distattn.ir.bands import Q0, Q1, areas, row_key_ranges
from distattn.ir.intervals import Ints

Numbers = np.ndarray
# floating-point operations per cell, divided by (head dim + value head dim): two matrix products forward, five backward
_FLOPS = {"forward": 2.0, "backward": 5.0}
# time to start and end a kernel program, expressed as a number of keys: FlashAttention 3 on an H100 reaches 558 TFLOP/s at 1,024
# keys and 701 at 32,768 (descriptions/h100.toml)
_PROGRAM_OVERHEAD_KEYS = 1024 * (701 / 558 - 1)
# speed of a recurrence's kernels, as a fraction of attention's speed on long sequences: Gated DeltaNet of flash-linear-attention
# takes 4.81 ms for 32K tokens and 64 heads of 128 x 128 on an H800 (its issue 691), where FlashAttention 3 reaches 701 TFLOP/s. A
# pass that computes only states takes 0.58 of that time. These are estimates from published numbers, not measured here
_RECURRENCE_SPEED, _STATE_PASS = 42.9 / 701, 0.58
# tokens in a chunk, within which a recurrence consists of matrix products
_CHUNK = 64
_MICRO, _GIGA, _TERA = 1e-6, 1e9, 1e12


def flops_per_cell(direction: str, head_dim: int, v_head_dim: int) -> float:
    """Return the floating-point operations per allowed cell and head."""
    return _FLOPS[direction] * (head_dim + v_head_dim)


def attention_speed(cluster: ClusterSpec, direction: str, head_dim: int, queries: Ints, keys: Ints) -> Numbers:
    """Return a kernel's operations per second on full rectangles of queries x keys, (M,).

    The table is interpolated linearly in log(queries) and log(keys); a table of squares only is interpolated at the shorter side.
    Below the table's first point the speed falls, because each row of tiles takes a fixed time (the prologue and epilogue of a
    program). A table with a single length does not show that time, so the overhead of FlashAttention 3 on an H100 is used
    instead. Kernels compute whole tiles, so smaller lengths are raised to the tile's shorter side.
    """
    queries, keys = (np.maximum(lengths, min(cluster.device.tile)) for lengths in (queries, keys))
    rows = [row for row in cluster.attention if row.direction == direction]
    nearest = min({row.head_dim for row in rows}, key=lambda dim: abs(np.log(dim / head_dim)))
    table = {(row.queries, row.keys): row.tflops * _TERA for row in rows if row.head_dim == nearest}
    q_points, k_points = (np.array(sorted({point[i] for point in table})) for i in (0, 1))
    shorter = np.minimum(queries, keys)
    if len(table) == len(q_points) * len(k_points):
        grid = np.array([[table[q, k] for k in k_points.tolist()] for q in q_points.tolist()])
        speed = _bilinear(grid, np.log(q_points), np.log(k_points), np.log(queries), np.log(keys))
        first = int(min(q_points[0], k_points[0]))
    else:
        squares = np.array(sorted(point[0] for point in table if point[0] == point[1]))
        speed = np.interp(np.log(shorter), np.log(squares), [table[n, n] for n in squares.tolist()])
        first = int(squares[0])
    best = max(table.values())
    if len(table) == 1:
        return speed / (1.0 + _PROGRAM_OVERHEAD_KEYS / np.maximum(shorter, 1))
    # below the table's first point, the extra time per operation grows in inverse proportion to the number of keys
    short = np.maximum(first / np.maximum(shorter, 1), 1.0)
    return 1.0 / (1.0 / best + (1.0 / speed - 1.0 / best) * short)


def recurrence_flops_per_token(direction: str, key_dim: int, v_head_dim: int) -> float:
    """Return a recurrence's floating-point operations per token and head: on the state, and within the chunk."""
    forward = 4.0 * key_dim * v_head_dim + 2.0 * _CHUNK * (key_dim + v_head_dim)
    return forward * _FLOPS[direction] / _FLOPS["forward"]


def recurrence_seconds(
    cluster: ClusterSpec, direction: str, key_dim: int, v_head_dim: int, tokens: Ints, heads: Ints, whole: np.ndarray
) -> Numbers:
    """Estimate the time of recurrence tasks in seconds, (M,). whole: False for tasks that only compute a state."""
    best = max(row.tflops for row in cluster.attention if row.direction == direction) * _TERA
    whole_flops = recurrence_flops_per_token(direction, key_dim, v_head_dim)
    # a pass that computes only states costs the same in both directions
    state_flops = recurrence_flops_per_token("forward", key_dim, v_head_dim) * _STATE_PASS
    return tokens * heads * np.where(whole, whole_flops, state_flops) / (best * _RECURRENCE_SPEED)


def expansion_seconds(
    cluster: ClusterSpec, direction: str, latent_dim: int, widths: int, tokens_x_heads: Ints, kept: bool = False
) -> Numbers:
    """Estimate the seconds, (M,), to expand latents to keys and values with `widths` elements per head.

    Matrix products run at attention's speed on long sequences. The forward pass has one product. The backward pass has two, for
    the gradients of latents and weights, and a third that expands the latents again unless keys and values are kept.
    """
    best = max(row.tflops for row in cluster.attention if row.direction == "forward") * _TERA
    products = 1 if direction == "forward" else 2 if kept else 3
    return tokens_x_heads * (2.0 * products * latent_dim * widths / best)


def overhead_keys(cluster: ClusterSpec, direction: str, head_dim: int) -> int:
    """Return the fixed cost of a kernel's row, expressed as a number of keys. This cost makes short documents slow.

    The model is speed(n) = best * n / (n + overhead); the result is the median of `overhead` over squares n x n.
    """
    lengths = np.array(sorted({min(row.queries, row.keys) for row in cluster.attention if row.direction == direction}))
    speed = attention_speed(cluster, direction, head_dim, lengths, lengths)
    if len(lengths) == 1:
        return round(_PROGRAM_OVERHEAD_KEYS)
    slower = speed < speed.max()
    return round(float(np.median((lengths * (speed.max() / speed - 1))[slower]))) if slower.any() else 0


def padded_cells(bands: Ints, tile_rows: int, extra_keys: Ints | int | Numbers) -> Any:
    """Return the number of cells per head that a kernel spends time on, for each tightened band (M, 10).

    Rows are rounded up to a multiple of `tile_rows`, and each row costs `extra_keys` more keys than it has. If extra_keys are
    integers, so are the results, and they are equal on every machine.
    """
    rows = np.maximum(bands[:, Q1] - bands[:, Q0], 0)
    padded_rows = -(-rows // tile_rows) * tile_rows
    keys, rest = np.divmod(areas(bands), np.maximum(rows, 1))
    return (keys + extra_keys) * padded_rows + rest * padded_rows // np.maximum(rows, 1)


def tiled_area(bands: Ints, tile: tuple[int, int]) -> tuple[Numbers, Numbers]:
    """Return the cells in the tiles that each tightened band touches, and the keys in its widest row of tiles, both (M,).

    Within a row of tiles, a slanted edge moves by the tile's height. So on average every row computes half that height of extra
    keys, plus the part of the last tile of keys that the row does not fill.
    """
    first_begin, first_end = row_key_ranges(bands, bands[:, Q0])
    last_begin, last_end = row_key_ranges(bands, bands[:, Q1] - 1)
    middle_begin, middle_end = row_key_ranges(bands, (bands[:, Q0] + bands[:, Q1]) // 2)
    widest = np.maximum.reduce([first_end - first_begin, middle_end - middle_begin, last_end - last_begin])
    slanted_edges = (first_begin != last_begin).astype(float) + (first_end != last_end)
    climb = (tile[0] - 1) / 2 + max(tile[1] - tile[0], 0) / 2
    ragged = np.where(slanted_edges == 0, -(-widest // tile[1]) * tile[1] - widest, slanted_edges * climb)
    return padded_cells(bands, tile[0], ragged), widest + ragged


def launch_seconds(
    cluster: ClusterSpec, cells: Numbers, widest: Numbers, heads: Ints, speed: Numbers, per_cell: float, group: Ints
) -> tuple[Ints, Numbers]:
    """Return the distinct launches in `group`, and the seconds that each takes.

    cells, widest: the results of `tiled_area` for each task. speed: each task's operations per second. group: the index of each
    task's launch. A launch runs at full speed, but takes at least as long as its longest program on one multiprocessor.
    """
    device = cluster.device
    launches, index = np.unique(group, return_inverse=True)
    seconds = np.bincount(index, cells * heads * per_cell / speed + device.task_us * _MICRO, len(launches))
    longest = np.zeros(len(launches))
    np.maximum.at(longest, index, widest * device.tile[0] * per_cell / speed * device.num_sms)
    return launches, np.maximum(seconds, longest) + device.launch_us * _MICRO


def copy_seconds(cluster: ClusterSpec, size: Numbers) -> Numbers:
    """Return the seconds that it takes to copy `size` bytes on a device."""
    return size / (cluster.device.copy_gbs * _GIGA)


def message_seconds(cluster: ClusterSpec, src: Ints, dst: Ints, size: Numbers) -> Numbers:
    """Return the seconds until each message arrives, (M,), assuming that all messages are sent at the same time.

    A device has one port per direction of each link (inside a node, between nodes), and its messages share the port. If a link is
    shared, all devices of a node share a port. A message arrives when the busier of its two ports has finished.
    """
    ranks, devices = cluster.ranks, cluster.devices
    out = np.zeros(len(src))
    crossing = src // devices != dst // devices
    for link, chosen in ((cluster.intra_node, ~crossing), (cluster.inter_node, crossing)):
        if not chosen.any():
            continue
        port = devices if link.shared else 1
        ends = src[chosen] // port, dst[chosen] // port
        loads = [np.bincount(end, size[chosen], -(-ranks // port)) for end in ends]
        if link.shared and link is cluster.intra_node:
            # both directions use the same memory
            loads = [loads[0], loads[0]]
        fullest = np.maximum(loads[0][ends[0]], loads[1][ends[1]])
        out[chosen] = fullest / (link.gbs * _GIGA) + link.latency_us * _MICRO
    return out


def _bilinear(grid: Numbers, xs: Numbers, ys: Numbers, x: Numbers, y: Numbers) -> Numbers:
    """Interpolate a grid bilinearly; points outside are clamped to its border."""
    places = []
    for points, value in ((xs, x), (ys, y)):
        value = np.clip(value, points[0], points[-1])
        low = np.clip(np.searchsorted(points, value, "right") - 1, 0, max(len(points) - 2, 0))
        high = np.minimum(low + 1, len(points) - 1)
        span = np.where(high > low, points[high] - points[low], 1.0)
        places.append((low, high, (value - points[low]) / span))
    (x0, x1, fx), (y0, y1, fy) = places
    below = grid[x0, y0] * (1 - fy) + grid[x0, y1] * fy
    return below * (1 - fx) + (grid[x1, y0] * (1 - fy) + grid[x1, y1] * fy) * fx
