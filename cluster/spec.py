"""A cluster in numbers: nodes, devices, links and kernel throughput, read from a TOML file.

`load("h200-8x8")` returns 8 nodes with 8 devices each of the shipped description `h200`. `load("mine.toml")` reads a file such
as `distattn calibrate` writes, and `load("mine.toml", 32)` uses only 32 of its devices. In a shipped file, every number has its
source next to it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from distattn.cluster.topology import Cluster
from distattn.ir.errors import DistattnError
from distattn.ir.intervals import Ints
from distattn.ir.limits import Check, Number, OneOf, SettingProblem, nested_problems
from distattn.ir.toml_records import TomlFile, parse_record, raise_problems

# pydantic and tomli_w are imported where files are read and written, because kernel checks must run with just torch and Triton
if TYPE_CHECKING:
    from pydantic import ConfigDict

Record = TypeVar("Record")
_STRICT: ConfigDict = {"extra": "forbid", "allow_inf_nan": False}
DIRECTIONS = ("forward", "backward")
_NAME = re.compile(r"(?P<kind>[a-z0-9_]+)-(?P<nodes>[1-9]\d*)x(?P<devices>[1-9]\d*)")

_POSITIVE = Number(gt=0)


def _tile_problem(sides: tuple[int, int]) -> str | None:
    return None if min(sides) > 0 else f"both sides must be above 0, not {list(sides)}."


@dataclass(frozen=True)
class Device:
    """One device, described by measured or published numbers."""

    __pydantic_config__ = _STRICT

    name: str
    memory_gb: Annotated[float, _POSITIVE]
    # dense bf16, from the manufacturer's data sheet
    peak_tflops: Annotated[float, _POSITIVE]
    # achieved by large matrix products
    gemm_tflops: Annotated[float, _POSITIVE]
    # 10^9 bytes copied per second
    copy_gbs: Annotated[float, _POSITIVE]
    # streaming multiprocessors, each of which runs one program of a kernel at a time
    num_sms: Annotated[int, _POSITIVE]
    # sides of the kernels' tiles (query rows, keys); kernels compute whole tiles
    tile: Annotated[tuple[int, int], Check(_tile_problem)]
    # microseconds from the end of a kernel to the start of the next kernel (launch_us), and per task of a launch (task_us)
    launch_us: Annotated[float, Number(ge=0)]
    task_us: Annotated[float, Number(ge=0)]
    # microseconds the host needs to issue one step
    host_us: Annotated[float, Number(ge=0)]


@dataclass(frozen=True)
class Link:
    """The link of each device, or the one link of a node if `shared`. gbs: 10^9 bytes per second in each direction."""

    __pydantic_config__ = _STRICT

    gbs: Annotated[float, _POSITIVE]
    latency_us: Annotated[float, Number(ge=0)]
    shared: bool = False


@dataclass(frozen=True)
class KernelThroughput:
    """The speed of a core-attention kernel on a full mask of queries x keys.

    A forward pass counts as 4 x cells x heads x head dim operations, a backward pass 10 x cells x heads x head dim.
    """

    __pydantic_config__ = _STRICT

    direction: Annotated[str, OneOf(DIRECTIONS)]
    head_dim: Annotated[int, _POSITIVE]
    queries: Annotated[int, _POSITIVE]
    keys: Annotated[int, _POSITIVE]
    tflops: Annotated[float, _POSITIVE]


@dataclass(frozen=True)
class ClusterSpec:
    """A cluster of `nodes` nodes with `devices` devices each, and its speeds. Rank r is on node r // devices."""

    __pydantic_config__ = _STRICT

    name: str
    nodes: Annotated[int, _POSITIVE]
    devices: Annotated[int, _POSITIVE]
    device: Device
    intra_node: Link
    inter_node: Link
    attention: tuple[KernelThroughput, ...]

    @property
    def topology(self) -> Cluster:
        """The node and device counts, which determine which ranks share a node."""
        return Cluster(self.nodes, self.devices)

    @property
    def ranks(self) -> int:
        return self.nodes * self.devices

    @property
    def node(self) -> Ints:
        """The node of each rank."""
        return self.topology.node

    def save(self, path: str | Path) -> None:
        """Write the TOML file that `load` reads back."""
        import tomli_w

        Path(path).write_text(tomli_w.dumps(asdict(self)), "utf-8")


# a Cluster says which ranks share a node; a ClusterSpec also says how fast devices and links are
AnyCluster = Cluster | ClusterSpec


def shipped_names() -> list[str]:
    """Return the names of the clusters shipped with distattn, without their sizes: "h200", not "h200-8x8"."""
    folder = resources.files("distattn.cluster") / "descriptions"
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def resolve_cluster(cluster: Any) -> AnyCluster | None:
    """Return a Cluster, a ClusterSpec or None unchanged; `load` a name or the path of a TOML file."""
    if cluster is None or isinstance(cluster, AnyCluster):
        return cluster
    if isinstance(cluster, str | Path):
        return load(cluster)
    raise DistattnError(
        f"cluster must be a Cluster(nodes, devices), a ClusterSpec, its name or its TOML file, not {cluster!r}."
    )


def load(name: str | Path, ranks: int | None = None) -> ClusterSpec:
    """Load a cluster by name (`h200-8x8`: nodes x devices) or by the path of its TOML file.

    ranks: use only this many devices, the same number on each node. Raise DistattnError if there is no such cluster, or if the
    file has invalid values.
    """
    matched = _NAME.fullmatch(str(name))
    if matched and matched["kind"] in shipped_names():
        cluster = _sized(_load_shipped(matched["kind"]), str(name), int(matched["nodes"]), int(matched["devices"]))
    elif Path(name).suffix == ".toml":
        file = TomlFile.read(name, "name the TOML file of a cluster")
        cluster = parse_record(ClusterSpec, file.content, file.place)
        raise_problems([*nested_problems(cluster)] or _table_problems(cluster), file.place)
    else:
        shipped = ", ".join(f"{kind}-NODESxDEVICES" for kind in shipped_names())
        raise DistattnError(f"there is no cluster {str(name)!r}; there are {shipped}, or the path of a .toml file.")
    return cluster if ranks is None else with_ranks(cluster, ranks)


@cache
def _load_shipped(kind: str) -> ClusterSpec:
    """Return a shipped cluster without checks: strategies must not need pydantic, so only tests check the shipped files."""
    content = tomllib.loads((resources.files("distattn.cluster") / "descriptions" / f"{kind}.toml").read_text("utf-8"))
    content["device"] = _record(Device, content["device"] | {"tile": tuple(content["device"]["tile"])})
    content |= {name: _record(Link, content[name]) for name in ("intra_node", "inter_node")}
    content["attention"] = tuple(_record(KernelThroughput, row) for row in content["attention"])
    return ClusterSpec(**content)


def _record(kind: type[Record], values: dict[str, Any]) -> Record:
    """Build the dataclass `kind` from `values`. Integers become floats in fields of type float."""
    types = kind.__annotations__
    return kind(**{name: float(value) if "float" in types[name] else value for name, value in values.items()})


def with_ranks(cluster: ClusterSpec, ranks: int) -> ClusterSpec:
    """Return the cluster reduced to one device per rank, with the same number of devices on each node."""
    if ranks > cluster.ranks:
        raise DistattnError(
            f"{ranks} ranks need more devices than {cluster.name} has: {cluster.nodes} nodes x {cluster.devices}."
        )
    nodes = -(-ranks // cluster.devices)
    if ranks % nodes:
        raise DistattnError(f"{ranks} ranks do not fill {nodes} nodes of {cluster.devices} devices evenly.")
    whole = (nodes, ranks // nodes) == (cluster.nodes, cluster.devices)
    kind = cluster.name.rpartition("-")[0] if _NAME.fullmatch(cluster.name) else cluster.name
    name = cluster.name if whole else f"{kind}-{nodes}x{ranks // nodes}"
    return _sized(cluster, name, nodes, ranks // nodes)


def _sized(cluster: ClusterSpec, name: str, nodes: int, devices: int) -> ClusterSpec:
    if nodes > cluster.nodes or devices > cluster.devices:
        raise DistattnError(
            f"cluster {name!r}: {cluster.name} has at most {cluster.nodes} nodes of {cluster.devices} devices."
        )
    return replace(cluster, name=name, nodes=nodes, devices=devices)


def _table_problems(cluster: ClusterSpec) -> Iterator[SettingProblem]:
    """Yield the problems of the table of kernel speeds as a whole, such as a missing direction."""
    for direction, head_dim in sorted({(row.direction, row.head_dim) for row in cluster.attention}):
        points = {
            (row.queries, row.keys)
            for row in cluster.attention
            if (row.direction, row.head_dim) == (direction, head_dim)
        }
        grid = len({q for q, _ in points}) * len({k for _, k in points})
        if len(points) != grid and not any(q == k for q, k in points):
            yield SettingProblem(
                "attention",
                f"{direction}, head dim {head_dim}: rows must be a full grid of queries and keys, or squares.",
            )
    for direction in DIRECTIONS:
        if not any(row.direction == direction for row in cluster.attention):
            yield SettingProblem("attention", f"there is no row of direction {direction}.")
