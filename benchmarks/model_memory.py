"""Memory and CPU seconds per rank of a model that is created in shards, starting on the meta device.

    python benchmarks/model_memory.py [--ranks 4] [--hidden 1024] [--layers 80] [--folder FOLDER]

The model is a narrow Llama with the proportions of Llama 3 70B. "initial" draws its weights. "exported" writes them as
a folder of safetensors (200 MB per file; rank 0 holds one file's tensors in addition to its shards). "loaded" reads
that folder into new shards. Memory is anonymous resident memory (allocated memory, without pages of mapped files, which
belong to the page cache): the increase over the start of the phase, sampled every millisecond. Every rank is a process
of its own on this machine, over gloo.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from process_guard import guard_processes
from torch.distributed.device_mesh import init_device_mesh

from distattn.adapters import pytorch
from distattn.models.build import llama_config, materialise, meta_model
from distattn.models.export import export_model
from distattn.models.safetensors_files import load_pretrained

FILE_BYTES = 200_000_000


def main() -> None:
    """Print a table of the most memory that any rank needed in each phase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    config = llama_config(
        num_layers=arguments.layers,
        hidden_size=arguments.hidden,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=arguments.hidden * 7 // 2,
        vocab_size=arguments.hidden * 501 // 32,
        max_position_embeddings=8192,
    )
    model = meta_model(config)
    whole = sum(parameter.numel() * 4 for parameter in model.parameters())
    largest = max(sum(p.numel() * 4 for p in module.parameters(recurse=False)) for module in model.modules())
    print_line(
        f"{whole / 4e6:,.0f}M parameters in float32: {whole / 1e6:,.0f} MB, the largest module {largest / 1e6:,.0f} MB"
    )
    share = whole / arguments.ranks
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        context = multiprocessing.get_context("spawn")
        for number, work in enumerate((_initial_and_exported, _loaded)):
            # use fresh processes: memory freed earlier would be reused and not show as an increase
            with context.Pool(arguments.ranks) as pool:
                given_to = [(work, rank, arguments.ranks, folder, number, config) for rank in range(arguments.ranks)]
                ranks_phases = pool.starmap(_rank, given_to, 1)
            for phase in ranks_phases[0]:
                most = max(rank[phase][0] for rank in ranks_phases)
                seconds = max(rank[phase][1] for rank in ranks_phases)
                beside = "" if phase == "exported" else f" = its share and {(most - share) / 1e6:,.0f} MB"
                print_line(f"{phase:9} {most / 1e6:8,.0f} MB at most on a rank{beside}; {seconds:.1f} s of CPU")


def print_line(line: str) -> None:
    """Print a line and flush stdout."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _rank(
    work: Callable[..., None], rank: int, ranks: int, folder: str, number: int, config: Any
) -> dict[str, tuple[int, float]]:
    """Run `work` as one rank. Return (peak increase of anonymous resident bytes, CPU seconds) of every phase."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{number}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    phases: dict[str, tuple[int, float]] = {}
    # warm up with a tiny model, so that imports and new threads do not count
    materialise(_sharded(llama_config(**_TINY), mesh), 1)
    work(phases, config, mesh, Path(folder, "model"))
    dist.barrier()
    dist.destroy_process_group()
    return phases


def _initial_and_exported(phases: dict[str, tuple[int, float]], config: Any, mesh: Any, folder: Path) -> None:
    with _measured(phases, "initial"):
        model = _sharded(config, mesh)
        materialise(model, 1)
    with _measured(phases, "exported"):
        export_model(model, folder, max_shard_bytes=FILE_BYTES)


def _loaded(phases: dict[str, tuple[int, float]], config: Any, mesh: Any, folder: Path) -> None:
    with _measured(phases, "loaded"):
        load_pretrained(_sharded(config, mesh), folder)


_TINY = dict(
    num_layers=1,
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    vocab_size=64,
    max_position_embeddings=64,
)


def _sharded(config: Any, mesh: Any) -> Any:
    model = meta_model(config)
    pytorch.shard_parameters(model, mesh)
    return model


@contextmanager
def _measured(phases: dict[str, tuple[int, float]], phase: str) -> Iterator[None]:
    before, began, most, stop = _anonymous_bytes(), time.process_time(), [0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.001):
            most[0] = max(most[0], _anonymous_bytes())

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    yield
    stop.set()
    watcher.join()
    phases[phase] = max(most[0], _anonymous_bytes()) - before, time.process_time() - began


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


if __name__ == "__main__":
    guard_processes()
    main()
