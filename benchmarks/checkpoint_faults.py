"""Damaged checkpoints, and ranks killed while saving: is the damage noticed, and which files are left?

    python benchmarks/checkpoint_faults.py [--count 10000] [--kills 200] [--seed 0] [--folder FOLDER]

Injections: the newer of two checkpoints is damaged, in a different way each time, and the newest good checkpoint is
loaded. "passed over": the older one loads bitwise equal, and one warning names a damaged file. "harmless": the newer
one loads bitwise equal (for example, after an added blank in the manifest). "silent": anything else. For comparison,
plain torch.distributed.checkpoint (DCP) loads the same damaged folder.

Kills: two ranks train and save at every step without a pause. One of them is killed with SIGKILL at a random moment,
and the other must exit with an error by itself. Then the newest good checkpoint must be at least as new as before the
kill, all ranks must load it bitwise equal, and nothing of the interrupted save may be left.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from process_guard import guard_processes

from distattn.checkpoints.checkpoint_folder import list_checkpoints, newest_good
from distattn.checkpoints.checkpoints import Checkpoints
from distattn.checkpoints.retention import KeepRule
from distattn.checkpoints.verdicts import VERDICT_FILE
from distattn.ir.errors import LostRankError

PAGE = 4096
OLDER, NEWER = "step-00000100", "step-00000200"
# maximum time in seconds until a rank notices that the other has exited
NOTICE_SECONDS = 60.0


def state_of(step: int, ranks: int = 2) -> dict[str, Any]:
    """Return a state that depends only on its step: model tensors, which DCP divides among ranks, optimizer tensors and
    plain values."""
    generator = torch.Generator().manual_seed(step)
    model = {f"layer {n}": torch.rand(64, 48 + n, generator=generator) for n in range(4 * ranks)}
    moments = {f"layer {n}": torch.rand(4096, generator=generator) for n in range(4 * ranks)}
    return {
        "model": model,
        "optimizer": {"exp_avg": moments, "lr": 1.0 / (1 + step)},
        "step": step,
        "name": f"at {step}",
    }


def empty_state(ranks: int = 2) -> dict[str, Any]:
    """Return a state of the same structure with different values (NaN in tensors)."""
    state = state_of(0, ranks)
    for tensors in (state["model"], state["optimizer"]["exp_avg"]):
        for tensor in tensors.values():
            tensor.fill_(float("nan"))
    return state | {"step": -1, "name": ""}


def equal(left: Any, right: Any) -> bool:
    """Return whether two states are bitwise equal."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    return bool(left == right)


def no_warning(line: str) -> None:
    """Assert that a warning only says that a save waited for the previous save, as on a slow disk."""
    assert " waited " in line, line


# ---- damage


class Injection(NamedTuple):
    """Damage to the newer checkpoint. files: the damaged files, one of which a warning must name."""

    kind: str
    files: tuple[str, ...]


def flip(folder: Path, rng: random.Random) -> tuple[str, ...]:
    """Change one bit of one file."""
    file = rng.choice(_files(folder))
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return (file.name,)


def flip_data(folder: Path, rng: random.Random) -> tuple[str, ...]:
    """Change one bit of a tensor file."""
    file = rng.choice(_data_files(folder))
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return (file.name,)


def zero_page(folder: Path, rng: random.Random) -> tuple[str, ...]:
    """Replace a page of a tensor file with zeros."""
    file = rng.choice(_data_files(folder))
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content)) // PAGE * PAGE
    size = min(PAGE, len(content) - start)
    content[start : start + size] = bytes(size)
    file.write_bytes(content)
    return (file.name,)


def overwrite(folder: Path, rng: random.Random) -> tuple[str, ...]:
    """Overwrite some bytes of a file."""
    file = rng.choice(_files(folder))
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content))
    size = min(rng.randrange(1, 2 * PAGE), len(content) - start)
    content[start : start + size] = rng.randbytes(size)
    file.write_bytes(content)
    return (file.name,)


def truncate(folder: Path, rng: random.Random) -> tuple[str, ...]:
    """Truncate a file, possibly to zero bytes."""
    file = rng.choice(_files(folder))
    os.truncate(file, rng.randrange(file.stat().st_size))
    return (file.name,)


def extend(folder: Path, rng: random.Random) -> tuple[str, ...]:
    """Append bytes to a tensor file."""
    file = rng.choice(_data_files(folder))
    with open(file, "ab") as opened:
        opened.write(rng.randbytes(rng.randrange(1, PAGE)))
    return (file.name,)


def delete(folder: Path, rng: random.Random) -> tuple[str, ...]:
    """Delete a file."""
    file = rng.choice(_files(folder))
    file.unlink()
    return (file.name,)


def swap_ranks(folder: Path, rng: random.Random) -> tuple[str, ...]:
    """Swap two tensor files, which may belong to different ranks."""
    first, other = rng.sample(_data_files(folder), 2)
    content = first.read_bytes()
    first.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return first.name, other.name


def swap_checkpoints(folder: Path, rng: random.Random) -> tuple[str, ...]:
    """Replace a file with the older checkpoint's file of the same name."""
    file = rng.choice([*_data_files(folder), folder / ".metadata"])
    # if both checkpoints have identical DCP metadata, this damages nothing
    before = file.read_bytes()
    file.write_bytes((folder.parent / OLDER / file.name).read_bytes())
    return () if file.read_bytes() == before else (file.name,)


def stale_manifest(folder: Path, rng: random.Random) -> tuple[str, ...]:
    """Replace the manifest with the older checkpoint's, either unchanged or with a different step."""
    text = (folder.parent / OLDER / "manifest.json").read_text()
    if rng.random() < 0.5:
        text = text.replace('"step": 100', '"step": 200')
    (folder / "manifest.json").write_text(text)
    return ("manifest.json",)


def other_folder(folder: Path, rng: random.Random) -> tuple[str, ...]:
    """Replace all files with the older checkpoint's."""
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / OLDER, folder)
    return ("manifest.json",)


def edit_manifest(folder: Path, rng: random.Random) -> tuple[str, ...]:
    """Change a character of the manifest, or delete or repeat a line."""
    file = folder / "manifest.json"
    lines = file.read_text().splitlines(keepends=True)
    place = rng.randrange(len(lines))
    change = rng.randrange(3)
    if change == 0:
        at = rng.randrange(len(lines[place]))
        lines[place] = lines[place][:at] + rng.choice('0123456789abcdef ",{}') + lines[place][at + 1 :]
    elif change == 1:
        del lines[place]
    else:
        lines.insert(place, lines[place])
    file.write_text("".join(lines))
    return ("manifest.json",)


DAMAGES: dict[str, Callable[[Path, random.Random], tuple[str, ...]]] = {
    "flipped bit": flip,
    "flipped bit of a tensor file": flip_data,
    "zeroed page": zero_page,
    "overwritten bytes": overwrite,
    "truncated": truncate,
    "extended": extend,
    "deleted": delete,
    "swapped between ranks": swap_ranks,
    "swapped between checkpoints": swap_checkpoints,
    "stale manifest": stale_manifest,
    "edited manifest": edit_manifest,
    "folder of another step": other_folder,
}


def _files(folder: Path) -> list[Path]:
    # leave out verdicts, which are only advice and have no digest
    return sorted(file for file in folder.iterdir() if file.name != VERDICT_FILE)


def _data_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.distcp"))


# ---- injections


def save_pair(rank: int, folder: str) -> None:
    """Save the two checkpoints on every rank of the default group."""
    how: dict[str, Any] = {"group": dist.group.WORLD, "facts": {"config": "c"}, "keep": KeepRule()}
    saver = Checkpoints(Path(folder), warn=no_warning, **how)
    saver.save(100, state_of(100))
    saver.save(200, state_of(200))
    saver.close()


class Injector:
    """A loader of damaged copies of a pair of checkpoints.

    counts: the outcomes for each kind of damage. plain: the same for plain DCP. silent: a line for each injection that
    went unnoticed.
    """

    def __init__(self, pair: Path, folder: Path, seed: int):
        self.pair, self.folder, self.rng = pair, folder, random.Random(seed)
        self.counts: dict[str, Counter[str]] = {kind: Counter() for kind in DAMAGES}
        self.plain: dict[str, Counter[str]] = {kind: Counter() for kind in DAMAGES}
        self.silent: list[str] = []
        self._warned: list[str] = []
        shutil.copytree(pair / OLDER, folder / OLDER)
        how: dict[str, Any] = {"group": None, "facts": {}, "keep": KeepRule()}
        self._checkpoints = Checkpoints(folder, warn=self._warned.append, **how)
        self._wanted = {100: state_of(100), 200: state_of(200)}

    def inject(self, kind: str, beside_dcp: bool = True) -> None:
        """Damage the newer checkpoint, load, and count the outcome in `counts` and plain DCP's outcome in `plain`."""
        newer = self.folder / NEWER
        shutil.rmtree(newer, ignore_errors=True)
        shutil.copytree(self.pair / NEWER, newer)
        files = DAMAGES[kind](newer, self.rng)
        self.counts[kind][self._outcome(kind, files)] += 1
        if beside_dcp:
            self.plain[kind][self._plain_outcome(newer)] += 1

    def close(self) -> None:
        """Stop the loader's thread."""
        self._checkpoints.close()

    def _outcome(self, kind: str, files: tuple[str, ...]) -> str:
        self._warned.clear()
        state = empty_state()
        loaded = self._checkpoints.load_newest(state)
        if loaded is not None and equal(state, self._wanted[loaded.step]):
            if loaded.step == 200 and not self._warned:
                return "harmless"
            if loaded.step == 100 and len(self._warned) == 1 and any(file in self._warned[0] for file in files):
                return "passed over"
        self.silent.append(f"{kind} of {files}: {loaded}, {self._warned}")
        return "silent"

    def _plain_outcome(self, newer: Path) -> str:
        state = empty_state()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.load(state, checkpoint_id=newer, no_dist=True)
        except (Exception, dcp.CheckpointException):
            return "raised"
        return "harmless" if equal(state, self._wanted[200]) else "silent"


def run_injections(count: int, seed: int, folder: Path) -> Injector:
    """Inject damage `count` times, cycling through all kinds."""
    # DCP logs a traceback for every error
    logging.disable(logging.WARNING)
    (folder / "pair").mkdir(parents=True)
    (folder / "damaged").mkdir()
    _forked(2, save_pair, str(folder / "pair"))
    injector = Injector(folder / "pair", folder / "damaged", seed)
    kinds = list(DAMAGES)
    began = time.monotonic()
    for number in range(count):
        injector.inject(kinds[number % len(kinds)])
        if (number + 1) % 1000 == 0:
            sys.stderr.write(f"{number + 1} of {count} injections, {time.monotonic() - began:.0f} s\n")
    injector.close()
    return injector


# ---- kills


def train_and_save(rank: int, folder: str, checked: Any) -> None:
    """Resume, check the loaded state, and save at every step until a rank is killed. Then end the process with exit code 7."""
    warned: list[str] = []
    how: dict[str, Any] = {"group": dist.group.WORLD, "facts": {"config": "c"}, "keep": KeepRule(last=2)}
    saver = Checkpoints(Path(folder), warn=warned.append, **how)
    state = empty_state()
    loaded = saver.load_newest(state, required={"config": "c"})
    step = 0
    if loaded is not None:
        step = loaded.step
        assert equal(state, state_of(step)), f"step {step} loads other tensors than were saved"
    # check only on rank 0, which removes leftovers: other ranks may finish loading before it has removed them
    leftovers = [name for name in os.listdir(folder) if "." in name] if rank == 0 and Path(folder).exists() else []
    assert not leftovers, leftovers
    assert not warned, warned
    checked.put((rank, step))
    try:
        while True:
            step += 1
            saver.save(step, state_of(step))
    except LostRankError:
        os._exit(7)


class KillResult(NamedTuple):
    """The results of all kills.

    steps: the last saved step. amid_save: the number of kills that left a partial checkpoint. notice: the maximum time in
    seconds until a survivor noticed the kill and exited.
    """

    kills: int
    steps: int
    amid_save: int
    notice: float


def run_kills(kills: int, seed: int, folder: Path, ranks: int = 2, most_seconds: float = 0.5) -> KillResult:
    """Repeat `kills` times: start ranks, kill a random rank at a random time once all have resumed, check what is left."""
    rng = random.Random(seed)
    context = multiprocessing.get_context("fork")
    port, checked = context.SimpleQueue(), context.SimpleQueue()
    holder = context.Process(target=hold_store, args=(port,))
    holder.start()
    number = port.get()
    before, amid, notice = 0, 0, 0.0
    try:
        for kill in range(kills):
            rank_arguments = (ranks, number, kill, train_and_save, (str(folder), checked))
            processes = [context.Process(target=_rank, args=(rank, *rank_arguments)) for rank in range(ranks)]
            for process in processes:
                process.start()
            for _ in processes:
                _, resumed = _get(checked, processes)
                assert resumed >= before, f"resumed at step {resumed}, but step {before} was saved"
            time.sleep(rng.uniform(0, most_seconds))
            victim = rng.randrange(ranks)
            before = max((checkpoint.step for checkpoint in list_checkpoints(folder)), default=0)
            processes[victim].kill()
            killed = time.monotonic()
            for rank, process in enumerate(processes):
                process.join(NOTICE_SECONDS)
                wanted = -signal.SIGKILL if rank == victim else 7
                assert process.exitcode == wanted, f"kill {kill}: rank {rank} ended with {process.exitcode}"
            notice = max(notice, time.monotonic() - killed)
            amid += any("." in name for name in os.listdir(folder)) if folder.exists() else False
            if before:
                newest = newest_good(folder)
                assert newest is not None and int(newest.name[5:]) >= before, (
                    f"kill {kill}: {newest} is left of {before}"
                )
            if (kill + 1) % 20 == 0:
                sys.stderr.write(f"{kill + 1} of {kills} kills, step {before}\n")
    finally:
        holder.kill()
    return KillResult(kills, before, amid, notice)


def _get(queue: Any, processes: list[Any]) -> Any:
    ends = time.monotonic() + NOTICE_SECONDS
    while queue.empty():
        codes = [process.exitcode for process in processes]
        if any(codes) or time.monotonic() > ends:
            for process in processes:
                process.kill()
            raise AssertionError(f"ranks ended with {codes} before they had resumed")
        time.sleep(0.002)
    return queue.get()


def hold_store(port: Any) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port.put(store.port)
    signal.pause()


def _rank(
    rank: int, ranks: int, port: int, attempt: int, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    # print the stack of a rank that hangs
    faulthandler.dump_traceback_later(NOTICE_SECONDS - 5, exit=False)
    store = dist.PrefixStore(f"attempt {attempt}", dist.TCPStore("127.0.0.1", port, is_master=False))
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=store)
    work(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def _forked(ranks: int, work: Callable[..., None], *arguments: Any) -> None:
    context = multiprocessing.get_context("fork")
    port = context.SimpleQueue()
    holder = context.Process(target=hold_store, args=(port,))
    holder.start()
    number = port.get()
    processes = [context.Process(target=_rank, args=(rank, ranks, number, 0, work, arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    holder.kill()
    assert not any(process.exitcode for process in processes), [process.exitcode for process in processes]


def main() -> int:
    """Run the kills and the injections and print the results. Return exit code 1 if any of the damage went unnoticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="an empty folder to work in; by default a temporary one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        silent: list[str] = []
        if arguments.kills:
            results = run_kills(arguments.kills, arguments.seed, folder / "killed")
            sys.stdout.write(
                f"{results.kills} kills of a random rank of 2, up to step {results.steps}; "
                f"{results.amid_save} left a part of a save.\n"
                "A good checkpoint was left each time, and the parts were removed; the other rank noticed and ended after "
                f"{results.notice:.2f} s at most.\n"
            )
        if arguments.count:
            injector = run_injections(arguments.count, arguments.seed, folder)
            silent = injector.silent
            _print(injector)
    return 1 if silent else 0


def _print(injector: Injector) -> None:
    columns = ("passed over", "harmless", "silent"), ("raised", "harmless", "silent")
    sys.stdout.write(f"{'':30s}{'ours':>12s}{'':24s}{'plain DCP':>12s}\n")
    sys.stdout.write(f"{'':30s}" + "".join(f"{name:>12s}" for part in columns for name in part) + "\n")
    sums = Counter[str](), Counter[str]()
    for kind in DAMAGES:
        ours_and_plain = injector.counts[kind], injector.plain[kind]
        for total, counts in zip(sums, ours_and_plain, strict=True):
            total.update(counts)
        _print_row(kind, ours_and_plain, columns)
    _print_row("all", sums, columns)
    for line in injector.silent[:20]:
        sys.stdout.write(line + "\n")


def _print_row(
    name: str, ours_and_plain: tuple[Counter[str], Counter[str]], columns: tuple[tuple[str, ...], ...]
) -> None:
    cells = [f"{counts[column]:12,}" for counts, part in zip(ours_and_plain, columns, strict=True) for column in part]
    sys.stdout.write(f"{name:30s}{''.join(cells)}\n")


if __name__ == "__main__":
    guard_processes()
    sys.exit(main())
