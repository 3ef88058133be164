"""Bytes of a run at full size, rank by rank: its model on the meta device, its attention by the plan of its first step."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from distattn.adapters import huggingface, pytorch
from distattn.cluster.spec import ClusterSpec
from distattn.ir.errors import DistattnError
from distattn.ir.plan import Plan
from distattn.memory.accounting import (
    ATTENTION,
    FEED_FORWARD,
    LOSS,
    SECTIONS,
    AllocationWatch,
    CountingOffload,
    PlannedAttention,
    RankCounts,
    RankMemory,
    StateBytes,
    count_step,
)
from distattn.memory.settings import MemorySettings
from distattn.models.build import meta_model
from distattn.ops.executable import Executable, ExecutionKey
from distattn.parallel.analysis.columns import aligned, in_one_unit
from distattn.parallel.runtime.program import lower
from distattn.parallel.runtime.transport import SingleRankTransport
from distattn.training.config import Config
from distattn.training.plan_settings import PlanSettings
from distattn.training.run_data import vocabulary_size
from distattn.training.run_settings import configured_model, memory_settings

_META = torch.device("meta")
# more than are on their way to and from the host at once
_FEW_LAYERS = 4


def memory_of_run(
    make_model: Callable[[], Any],
    plan: Plan,
    settings: MemorySettings,
    report_progress: Callable[[str], None] = lambda line: None,
    *,
    shards: int | None = None,
    master_weights: bool = False,
    state_on_host: bool = False,
    ranks: Sequence[int] | None = None,
    extremes: bool = False,
) -> list[RankMemory]:
    """What every rank of a plan, or these of its ranks, need in a step of its model, ranks that need the same together.

    extremes: only ranks with the fewest and the most tokens, and those whose attention keeps, and needs at once, the most.

    make_model: makes a transformers model of attention "distattn"; it is called on the meta device. shards: ranks over which
    parameters are sharded, by default the plan's.
    master_weights: see `StateBytes.of`. state_on_host: parameters, gradients and moments are on the host but
    for the layers at work, as FSDP2's CPUOffloadPolicy has them.
    """
    model = on_meta(make_model)
    state = StateBytes.of(
        model, list(model.get_decoder().layers), shards or plan.call.ranks, master_weights=master_weights
    )
    host = 0
    if state_on_host:
        host = state.parameters + state.gradients + state.optimizer
        state = state._replace(parameters=0, gradients=0, optimizer=0)
    groups: dict[tuple[int, int], list[Executable]] = {}
    for rank in range(plan.call.ranks) if ranks is None else ranks:
        # the proof is not needed, nor what a kernel prepares
        program = lower(plan, rank, lambda cells: cells)
        executable = Executable(program, ExecutionKey(rank, "reference", _META), SingleRankTransport())
        groups.setdefault((program.tokens, executable.kept_elements), []).append(executable)
    if empty := [one.key.rank for (tokens, _), executables in groups.items() for one in executables if not tokens]:
        # transformers' models cannot compute a step of no tokens
        raise DistattnError(
            f"memory is counted for ranks with tokens, and rank {min(empty)} has none of the {plan.call.mask.n:,} tokens "
            "of this step; give longer documents, or fewer ranks."
        )
    counted = _extremes(groups) if extremes else list(groups)
    found: list[RankMemory] = []
    for tokens, kept in counted:
        executables = groups[tokens, kept]
        ranks = tuple(one.key.rank for one in executables)
        report_progress(f"{tokens:,} tokens ...")
        most = max(executables, key=_peak)
        counts = _counts(make_model, most, settings)
        found.append(RankMemory(ranks, tokens, state, counts, counts.host + host))
    return found


def memory_of_config(
    config: Config,
    packs: Sequence[Sequence[int]],
    report_progress: Callable[[str], None] = lambda line: None,
    *,
    plan: Plan | None = None,
    ranks: Sequence[int] | None = None,
    extremes: bool = False,
) -> list[RankMemory]:
    """What every rank needs of a run of `distattn train`, or these ranks of its attention plan; extremes: see `memory_of_run`.

    packs: lengths of the documents of a step, as `PlanSettings.plan`'s; plan: theirs, where it is made already. Raises
    DistattnError for a run that is not counted.
    """
    if config.engine.name != "fsdp2":
        raise DistattnError(
            f"plan: --memory counts runs of engine fsdp2, not {config.engine.name}; set engine.name to compare."
        )
    vocabulary = config.model.vocab_size or vocabulary_size(config)
    # positions need no memory
    context = max(max(map(sum, packs)), config.data.max_document_tokens)
    shape = configured_model(config, vocabulary, context)
    if huggingface.mixes_outside_attention(shape):
        raise DistattnError(
            f"memory is counted of models with attention only; {shape.model_type} has recurrent layers or convolutions, too."
        )
    if getattr(shape, "output_router_logits", False):
        raise DistattnError(
            "memory is counted without a router loss; set output_router_logits to false in the model's config.json to compare."
        )
    settings = PlanSettings.of_config(config)
    if hasattr(shape, "kv_lora_rank"):
        # latent attention, whose heads of keys have a rotary part; transformers' head_dim is that alone
        rotary = shape.qk_rope_head_dim
        # a plan by the run file alone has other widths
        plan = None
        widths = dict(kv_heads=settings.heads, head_dim=shape.qk_nope_head_dim + rotary, v_head_dim=shape.v_head_dim)
        settings = replace(
            settings, **widths, latents=(rotary, shape.kv_lora_rank) if config.parallel.latents else None
        )

    def make_model() -> Any:
        model = meta_model(shape, dtype=getattr(torch, config.model.dtype))
        if config.parallel.latents:
            huggingface.attend_by_latents(model)
        return model

    return memory_of_run(
        make_model,
        plan or settings.plan(*packs),
        memory_settings(config),
        report_progress,
        shards=config.engine.shard_size or config.parallel.ranks,
        master_weights=config.model.dtype == "bfloat16",
        state_on_host=config.memory.state_on_host,
        ranks=ranks,
        extremes=extremes,
    )


def on_meta(make_model: Callable[[], Any]) -> Any:
    """A model without memory."""
    huggingface.register()
    with _META:
        return make_model()


def step_memory(watch: AllocationWatch, model: Any, executable: Executable, settings: MemorySettings) -> RankCounts:
    """Count a step of a fresh model on the watch's device, with an executable's tokens."""
    settings.apply(model, CountingOffload(watch))
    ids = torch.zeros(1, executable.program.tokens, dtype=torch.int64, device=watch.device)
    batch = dict(input_ids=ids, labels=ids, position_ids=ids, loss_scale=1.0)
    batch["context_parallel"] = PlannedAttention(executable)
    parts: dict[nn.Module, str] = {pytorch.output_layer_of(model): LOSS}
    for layer in model.get_decoder().layers:
        parts |= {layer.self_attn: ATTENTION, layer.mlp: FEED_FORWARD}
    return count_step(watch, model, parts, lambda: pytorch.local_loss(model, batch, loss=settings.loss))


def memory_table(found: Sequence[RankMemory], ranks: int) -> list[str]:
    """Return the lines of a text table with one line for ranks that need the same. ranks: of the run, counted or not."""
    head = [
        "ranks",
        "tokens",
        "weights",
        "gradients",
        "optimizer",
        "gathered",
        "reduced",
        "saved",
        "arena",
        *SECTIONS,
        "total",
        "host",
    ]
    rows = [
        [
            *(*one.state, one.counts.saved, one.counts.arena),
            *(one.counts.working[name] for name in SECTIONS),
            *(one.total, one.host),
        ]
        for one in found
    ]
    cells = iter(in_one_unit([float(number) for row in rows for number in row], "B"))
    numbers = [[next(cells) for _ in row] for row in rows]
    first = [[_ranks(one.ranks), f"{one.tokens:,}"] for one in found]
    left = ranks - sum(len(one.ranks) for one in found)
    table = aligned([head, *(a + b for a, b in zip(first, numbers, strict=True))])
    return [
        "a step of one rank on its device: arithmetic for weights, counted on meta tensors for the rest; host: in pinned memory",
        *table,
        "of attention, feed-forward, loss and other only the largest counts: they are not there at once",
        *([f"{left} ranks have numbers of tokens between these, and were not counted"] if left else []),
    ]


def fit_line(found: Sequence[RankMemory], cluster: ClusterSpec) -> str:
    """Return the sentence that says of how much device memory a run needs how much, and whether it fits."""
    device_bytes, most = cluster.device.memory_gb * 1e9, max(one.total for one in found)
    needed, whole = in_one_unit([float(most), device_bytes], "B")
    verdict = "fits" if most <= device_bytes else "does not fit"
    return (
        f"{verdict}: the rank that needs most takes {needed} of the {whole} of a device of {cluster.name} "
        f"({most / device_bytes:.0%}), before what CUDA, NCCL and unused blocks of the allocator take"
    )


def memory_json(found: Sequence[RankMemory], cluster: ClusterSpec | None = None) -> str:
    """Return the same numbers, in bytes, with the memory of a device of the cluster where one is given."""
    device_bytes = None if cluster is None else round(cluster.device.memory_gb * 1e9)
    return json.dumps(
        [
            {
                "ranks": one.ranks,
                "tokens": one.tokens,
                **one.state._asdict(),
                "saved": one.counts.saved,
                "arena": one.counts.arena,
                "working": one.counts.working,
                "total": one.total,
                "host": one.host,
                **({} if device_bytes is None else {"device_memory": device_bytes, "fits": one.total <= device_bytes}),
            }
            for one in found
        ],
        indent=2,
    )


def _counts(make_model: Callable[[], Any], executable: Executable, settings: MemorySettings) -> RankCounts:
    """Count a step of the model; of one whose layers are all alike by two models of few layers, which a line goes through.

    Each layer saves as much as the others, and what one needs while it is computed does not depend on how many there are.
    """
    model = on_meta(make_model)
    layers = model.get_decoder().layers
    further = len(layers) - _FEW_LAYERS
    if further < 2 or len({_shapes(layer) for layer in layers}) > 1:
        return step_memory(AllocationWatch(), model, executable, settings)
    counts = []
    for number, one in ((_FEW_LAYERS, model), (_FEW_LAYERS + 1, on_meta(make_model))):
        decoder = one.get_decoder()
        decoder.layers = decoder.layers[:number]
        counts.append(step_memory(AllocationWatch(), one, executable, settings))
    few, more = counts
    saved, host = (a + further * (b - a) for a, b in ((few.saved, more.saved), (few.host, more.host)))
    return RankCounts(saved, more.arena, more.working, host)


def _shapes(layer: nn.Module) -> tuple[object, ...]:
    return (type(layer), *((name, one.shape) for name, one in layer.named_parameters()))


def _extremes(groups: Mapping[tuple[int, int], Sequence[Executable]]) -> list[tuple[int, int]]:
    """Of groups, by tokens and kept elements, those with the fewest and the most tokens, and that keep and need the most."""
    ways: list[Callable[[tuple[int, int]], int]] = [
        lambda key: -key[0],
        lambda key: key[0],
        lambda key: key[1],
        lambda key: max(map(_peak, groups[key])),
    ]
    return sorted({max(groups, key=way) for way in ways})


def _peak(executable: Executable) -> int:
    return max(one.peak for one in executable.memory().values())


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return str(ranks[0])
    if ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]}-{ranks[-1]}"
    return f"{ranks[0]} and {len(ranks) - 1} more"
