"""Memory of this machine that new processes can have."""

from __future__ import annotations

from pathlib import Path

# the value cgroup v1 has for "no limit" is 2^63 less a page
_NO_LIMIT = 1 << 60


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that new processes can have: the machine's, or what its cgroups leave. None where nothing tells (not Linux)."""
    left = _cgroup_bytes(root)
    try:
        for line in (root / "proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                left.append(int(line.split()[1]) * 1024)
    except OSError:
        pass
    return min(left, default=None)


def _cgroup_bytes(root: Path) -> list[int]:
    """Bytes left below each memory limit of this process's cgroup and of those above it."""
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, limit, used, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            limit, used, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # a container sees its own cgroup at the mount point, whatever the path says
        own = mount / path.strip("/")
        for folder in (own, *own.parents):
            found = _left_in(folder, limit, used, cache)
            if found is not None:
                left.append(found)
            if folder == mount:
                break
    return left


def _left_in(folder: Path, limit: str, used: str, cache: str) -> int | None:
    """Bytes below one limit; file pages that the kernel would give up at once do not count as used."""
    try:
        most = (folder / limit).read_text("ascii").strip()
        if most == "max" or int(most) >= _NO_LIMIT:
            return None
        stat = dict(line.split() for line in (folder / "memory.stat").read_text("ascii").splitlines())
        return max(int(most) - int((folder / used).read_text("ascii")) + int(stat.get(cache, 0)), 0)
    except (OSError, ValueError):
        return None
