"""Compare the facts of a run's ranks before the first step. The results are sentences that name host, rank and remedy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from distattn.ir.errors import named_ranks
from distattn.ir.text_format import readable_bytes
from distattn.preflight.facts import RankFacts

Key = TypeVar("Key")
# the maximum number of hosts that a sentence names
_MOST_HOSTS = 4
# a step that needs more than this share of a device's free memory leaves little for kernels, NCCL and the allocator
_CLOSE = 0.9


def named_places(ranks: Iterable[RankFacts]) -> str:
    """Name ranks with their hosts, such as "rank 3 on node-b"."""
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(rank.host, []).append(rank.rank)
    places = [f"{named_ranks(numbers)} on {host}" for host, numbers in by_host.items()]
    more = len(places) - _MOST_HOSTS
    return ", ".join(places[:_MOST_HOSTS]) + (f", and ranks on {more} more hosts" if more > 0 else "")


def code_problems(hosts: Sequence[str], digests: Sequence[str]) -> list[str]:
    """Return a sentence for each host on which the code differs from that of most ranks. hosts, digests: indexed by rank."""
    common = Counter(digests).most_common(1)[0][0]
    others: dict[str, list[int]] = {}
    for rank, (host, digest) in enumerate(zip(hosts, digests, strict=True)):
        if digest != common:
            others.setdefault(host, []).append(rank)
    return [
        f"{named_ranks(ranks)} on {host}: the code of distattn differs (digest {digests[ranks[0]]}) from that on most ranks "
        f"({common}); install the same revision on all hosts, or one copy that all hosts see."
        for host, ranks in others.items()
    ]


def problems_of(facts: Sequence[RankFacts]) -> list[str]:
    """Return the problems that would make a run fail, or train something other than what was asked for. facts: one per rank."""
    return [
        *(f"{named_places([rank])}: {rank.failure}" for rank in facts if rank.failure),
        *_config_problems(facts),
        *_version_problems(facts),
        *_digest_problems([rank for rank in facts if not rank.failure]),
        *_disk_shortages([rank for rank in facts if not rank.goes_on]),
        *_device_memory_problems(facts),
        *_host_memory_problems(facts),
    ]


def warnings_of(facts: Sequence[RankFacts]) -> list[str]:
    """Return warnings about unusual facts with which a run can start, including a full disk if the run has already done steps."""
    warnings = list(_disk_shortages([rank for rank in facts if rank.goes_on]))
    warnings += [
        f"{places} has the device {there}, most ranks {common}; the slowest device sets the pace."
        for places, there, common in _differing(facts, lambda rank: rank.device.name)
    ]
    warnings += [
        f"{named_places(ranks)}: {advice}; until then a slower kernel computes them (triton_chunked or chunked)."
        for advice, ranks in _grouped(facts, lambda rank: rank.advice).items()
        if advice
    ]
    for rank_facts in facts:
        forecast, free = rank_facts.forecast, rank_facts.device.free
        if forecast is not None and forecast.whole_step and free and _CLOSE * free < forecast.device <= free:
            need, have = readable_bytes(forecast.device), readable_bytes(free)
            warnings.append(
                f"{named_places([rank_facts])}: a step needs {need} of {have} that are free on the device; "
                "kernels, NCCL and the allocator need memory, too (docs/memory.md)."
            )
    return warnings


def _config_problems(facts: Sequence[RankFacts]) -> Iterator[str]:
    for key in facts[0].config:
        for places, there, common in _differing(facts, lambda rank, key=key: repr(rank.config[key])):  # type: ignore[misc]
            yield (
                f"{places}: {key} is {there}, on most ranks {common}; put the run folder on a file system that all hosts share."
            )


def _version_problems(facts: Sequence[RankFacts]) -> Iterator[str]:
    for name in dict.fromkeys(name for rank in facts for name in rank.versions):
        differing = _differing(facts, lambda rank, name=name: rank.versions.get(name, "missing"))  # type: ignore[misc]
        for places, there, common in differing:
            yield f"{places}: {name} is {there}, on most ranks {common}; install the same version on all hosts."


def _digest_problems(facts: Sequence[RankFacts]) -> Iterator[str]:
    for name in dict.fromkeys(name for rank in facts for name in rank.digests):
        differing = _differing(facts, lambda rank, name=name: rank.digests.get(name, "missing"))  # type: ignore[misc]
        for places, there, common in differing:
            yield (
                f"{places}: the {name} differs (digest {there}) from that on most ranks ({common}); let all hosts read the same "
                "files (data.path, model.path and the run folder)."
            )


def _disk_shortages(facts: Sequence[RankFacts]) -> Iterator[str]:
    for (need, free), ranks in _grouped(facts, lambda rank: (rank.disk_needed, rank.disk_free)).items():
        if need > free:
            yield (
                f"{named_places(ranks)}: the disk of the run folder has {readable_bytes(free)} free, its checkpoints need "
                f"{readable_bytes(need)}; make room, or lower checkpoint.keep_last."
            )


def _device_memory_problems(facts: Sequence[RankFacts]) -> Iterator[str]:
    for rank in facts:
        if rank.forecast is not None and rank.device.free is not None and rank.forecast.device > rank.device.free:
            subject = "a step needs" if rank.forecast.whole_step else "model and optimizer alone need"
            need, have = readable_bytes(rank.forecast.device), readable_bytes(rank.device.free)
            yield (
                f"{named_places([rank])}: {subject} {need}, and {have} are free on the device; "
                "end other processes that use it (nvidia-smi lists them), or see distattn plan --memory."
            )


def _host_memory_problems(facts: Sequence[RankFacts]) -> Iterator[str]:
    for ranks in _grouped(facts, lambda rank: rank.place).values():
        need = sum(rank.forecast.host for rank in ranks if rank.forecast is not None)
        free = min((rank.host_free for rank in ranks if rank.host_free is not None), default=None)
        if free is not None and need > free:
            yield (
                f"{named_places(ranks)}: model and optimizer need {readable_bytes(need)} of the host's memory, of which "
                f"{readable_bytes(free)} are free; use fewer ranks on a host, or a smaller model."
            )


def _grouped(facts: Sequence[RankFacts], key: Callable[[RankFacts], Key]) -> dict[Key, list[RankFacts]]:
    groups: dict[Key, list[RankFacts]] = {}
    for rank in facts:
        groups.setdefault(key(rank), []).append(rank)
    return groups


def _differing(facts: Sequence[RankFacts], value: Callable[[RankFacts], str]) -> Iterator[tuple[str, str, str]]:
    """Yield (named ranks, their value, the common value) for each value that differs from the most frequent value.

    In a tie, the value that the lowest rank has counts as common.
    """
    groups = _grouped(facts, value)
    if len(groups) > 1:
        common = max(groups, key=lambda group: len(groups[group]))
        for there, ranks in groups.items():
            if there != common:
                yield named_places(ranks), there, common
