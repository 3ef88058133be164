"""The memory of this machine that is available to new processes."""

from __future__ import annotations

from pathlib import Path

# cgroup v1 writes "no limit" as 2^63 minus a page
_NO_LIMIT = 1 << 60


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return the bytes available to new processes within the limits of the machine and of cgroups; None if not on Linux."""
    available = _cgroup_bytes(root)
    try:
        for line in (root / "proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                available.append(int(line.split()[1]) * 1024)
    except OSError:
        pass
    return min(available, default=None)


def _cgroup_bytes(root: Path) -> list[int]:
    """Return the bytes left below each memory limit of this process's cgroup and its parents."""
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        return []
    bytes_left = []
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
        cgroup = mount / path.strip("/")
        for folder in (cgroup, *cgroup.parents):
            folder_bytes = _bytes_left(folder, limit, used, cache)
            if folder_bytes is not None:
                bytes_left.append(folder_bytes)
            if folder == mount:
                break
    return bytes_left


def _bytes_left(folder: Path, limit: str, used: str, cache: str) -> int | None:
    """Return the bytes left below a cgroup's limit; None if it has no limit. Inactive file pages count as free (reclaimable)."""
    try:
        most = (folder / limit).read_text("ascii").strip()
        if most == "max" or int(most) >= _NO_LIMIT:
            return None
        stat = dict(line.split() for line in (folder / "memory.stat").read_text("ascii").splitlines())
        return max(int(most) - int((folder / used).read_text("ascii")) + int(stat.get(cache, 0)), 0)
    except (OSError, ValueError):
        return None
