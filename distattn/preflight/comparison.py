"""What is wrong with a run before its first step, by what its ranks say: sentences that name host, rank and remedy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from distattn.ir.errors import named_ranks
from distattn.parallel.analysis.columns import readable_bytes
from distattn.preflight.facts import RankFacts

Key = TypeVar("Key")
# hosts that a sentence names, at most
_MOST_HOSTS = 4
# a step that needs more of a device's free memory leaves little to kernels, NCCL and the allocator
_CLOSE = 0.9


def named_places(ranks: Iterable[RankFacts]) -> str:
    """Ranks in words, by their hosts, such as "rank 3 on node-b"."""
    by_host: dict[str, list[int]] = {}
    for one in ranks:
        by_host.setdefault(one.host, []).append(one.rank)
    words = [f"{named_ranks(numbers)} on {host}" for host, numbers in by_host.items()]
    more = len(words) - _MOST_HOSTS
    return ", ".join(words[:_MOST_HOSTS]) + (f", and ranks on {more} more hosts" if more > 0 else "")


def code_problems(hosts: Sequence[str], digests: Sequence[str]) -> list[str]:
    """Ranks that run other code than most. hosts, digests: by rank."""
    common = Counter(digests).most_common(1)[0][0]
    others: dict[str, list[int]] = {}
    for rank, (host, digest) in enumerate(zip(hosts, digests, strict=True)):
        if digest != common:
            others.setdefault(host, []).append(rank)
    return [
        f"{named_ranks(ranks)} on {host}: the code of distattn is another (digest {digests[ranks[0]]}) than on most ranks "
        f"({common}); install one revision on all hosts, or one that all hosts see."
        for host, ranks in others.items()
    ]


def problems_of(facts: Sequence[RankFacts]) -> list[str]:
    """What makes a run fail, or another run than was asked for. facts: by rank."""
    return [
        *(f"{named_places([one])}: {one.failure}" for one in facts if one.failure),
        *_config_problems(facts),
        *_version_problems(facts),
        *_digest_problems([one for one in facts if not one.failure]),
        *_disk_shortages([one for one in facts if not one.goes_on]),
        *_device_memory_problems(facts),
        *_host_memory_problems(facts),
    ]


def warnings_of(facts: Sequence[RankFacts]) -> list[str]:
    """Return warnings: what is unusual but lets a run go on. A full disk is one for a run that has steps, which it bears."""
    warnings = list(_disk_shortages([one for one in facts if one.goes_on]))
    warnings += [
        f"{who} has the device {there}, most ranks {common}; the slowest device sets the pace."
        for who, there, common in _differing(facts, lambda one: one.device.name)
    ]
    warnings += [
        f"{named_places(ranks)}: {advice}; until then a slower kernel computes them (triton_chunked or chunked)."
        for advice, ranks in _grouped(facts, lambda one: one.advice).items()
        if advice
    ]
    for rank_facts in facts:
        forecast, free = rank_facts.forecast, rank_facts.device.free
        if forecast is not None and forecast.whole_step and free and _CLOSE * free < forecast.device <= free:
            need, have = readable_bytes(forecast.device), readable_bytes(free)
            warnings.append(
                f"{named_places([rank_facts])}: a step needs {need} of {have} that are free on the device; "
                "kernels, NCCL and the allocator need some, too (docs/memory.md)."
            )
    return warnings


def _config_problems(facts: Sequence[RankFacts]) -> Iterator[str]:
    for key in facts[0].config:
        for who, there, common in _differing(facts, lambda one, key=key: repr(one.config[key])):  # type: ignore[misc]
            yield (
                f"{who}: {key} is {there}, on most ranks {common}; let all hosts see one run folder, on a file system they share."
            )


def _version_problems(facts: Sequence[RankFacts]) -> Iterator[str]:
    for name in dict.fromkeys(name for one in facts for name in one.versions):
        found = _differing(facts, lambda one, name=name: one.versions.get(name, "missing"))  # type: ignore[misc]
        for who, there, common in found:
            yield f"{who}: {name} is {there}, on most ranks {common}; install the same on all hosts."


def _digest_problems(facts: Sequence[RankFacts]) -> Iterator[str]:
    for name in dict.fromkeys(name for one in facts for name in one.digests):
        found = _differing(facts, lambda one, name=name: one.digests.get(name, "missing"))  # type: ignore[misc]
        for who, there, common in found:
            yield (
                f"{who}: the {name} is another (digest {there}) than on most ranks ({common}); let all hosts read the same files "
                "(data.path, model.path and the run folder)."
            )


def _disk_shortages(facts: Sequence[RankFacts]) -> Iterator[str]:
    for (need, free), ranks in _grouped(facts, lambda one: (one.disk_needed, one.disk_free)).items():
        if need > free:
            yield (
                f"{named_places(ranks)}: {readable_bytes(free)} are free where the run folder is, its checkpoints need "
                f"{readable_bytes(need)}; make room, or lower checkpoint.keep_last."
            )


def _device_memory_problems(facts: Sequence[RankFacts]) -> Iterator[str]:
    for one in facts:
        if one.forecast is not None and one.device.free is not None and one.forecast.device > one.device.free:
            what = "a step needs" if one.forecast.whole_step else "model and optimizer alone need"
            need, have = readable_bytes(one.forecast.device), readable_bytes(one.device.free)
            yield (
                f"{named_places([one])}: {what} {need}, and {have} are free on the device; "
                "end what else uses it (nvidia-smi shows it), or see distattn plan --memory."
            )


def _host_memory_problems(facts: Sequence[RankFacts]) -> Iterator[str]:
    for ranks in _grouped(facts, lambda one: one.place).values():
        need = sum(one.forecast.host for one in ranks if one.forecast is not None)
        free = min((one.host_free for one in ranks if one.host_free is not None), default=None)
        if free is not None and need > free:
            yield (
                f"{named_places(ranks)}: model and optimizer need {readable_bytes(need)} of the host's memory, "
                f"{readable_bytes(free)} of it are free; take fewer ranks on a host, or a smaller model."
            )


def _grouped(facts: Sequence[RankFacts], key: Callable[[RankFacts], Key]) -> dict[Key, list[RankFacts]]:
    found: dict[Key, list[RankFacts]] = {}
    for one in facts:
        found.setdefault(key(one), []).append(one)
    return found


def _differing(facts: Sequence[RankFacts], value: Callable[[RankFacts], str]) -> Iterator[tuple[str, str, str]]:
    """Ranks whose value is not that of most, or of rank 0 where values are equally frequent: who, theirs, the common one."""
    groups = _grouped(facts, value)
    if len(groups) > 1:
        common = max(groups, key=lambda one: len(groups[one]))
        for there, ranks in groups.items():
            if there != common:
                yield named_places(ranks), there, common
