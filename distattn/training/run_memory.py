"""Count the bytes that each rank of a run needs, from the model on the meta device and the attention plan of the first step."""

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
from distattn.ir.text_format import align_columns, with_common_unit
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
from distattn.parallel.runtime.communication.transport import SingleRankTransport
from distattn.parallel.runtime.lowering.lower import lower
from distattn.training.config.plan_settings import PlanSettings
from distattn.training.config.run_file import Config
from distattn.training.config.run_settings import configured_model, memory_settings
from distattn.training.run_data import vocabulary_size

_META = torch.device("meta")
# more layers than are ever in transit to or from the host at the same time
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
    """Count the memory that each rank of a plan needs in one step of the model. Ranks with equal needs share one result.

    make_model: a function that creates a transformers model with attention "distattn"; it is called on the meta device. shards:
    the number of ranks over which parameters are sharded, by default all ranks of the plan. master_weights: see `StateBytes.of`.
    state_on_host: True if parameters, gradients and moments are on the host except for the current layers, as with FSDP2's
    CPUOffloadPolicy. ranks: the ranks to count, by default all. extremes: count only the ranks with the fewest and the most
    tokens, and those whose attention keeps the most memory or has the highest peak.
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
        # counting needs neither the proof nor the kernels' own schedules. Assume kernels that finish rows: they need most memory
        program = lower(plan, rank, lambda cells: cells, finishes=("forward", "backward"))
        executable = Executable(program, ExecutionKey(rank, "reference", _META), SingleRankTransport())
        groups.setdefault((program.tokens, executable.kept_elements), []).append(executable)
    if empty := [item.key.rank for (tokens, _), group in groups.items() for item in group if not tokens]:
        # transformers models cannot run a step without tokens
        raise DistattnError(
            f"memory is only counted for ranks with tokens, and rank {min(empty)} has none of the {plan.call.mask.n:,} tokens "
            "of this step; use longer documents, or fewer ranks."
        )
    counted = _extremes(groups) if extremes else list(groups)
    memory: list[RankMemory] = []
    for tokens, kept in counted:
        executables = groups[tokens, kept]
        ranks = tuple(executable.key.rank for executable in executables)
        report_progress(f"{tokens:,} tokens ...")
        largest = max(executables, key=_peak)
        counts = _counts(make_model, largest, settings)
        memory.append(RankMemory(ranks, tokens, state, counts, counts.host + host))
    return memory


def memory_of_config(
    config: Config,
    packs: Sequence[Sequence[int]],
    report_progress: Callable[[str], None] = lambda line: None,
    *,
    plan: Plan | None = None,
    ranks: Sequence[int] | None = None,
    extremes: bool = False,
) -> list[RankMemory]:
    """Count the memory that each rank of a `distattn train` run needs. ranks, extremes: see `memory_of_run`.

    packs: the document lengths of a step, see `PlanSettings.plan`. plan: the plan of these packs, if it already exists. Raises
    DistattnError for a run whose memory cannot be counted.
    """
    if config.engine.name != "fsdp2":
        raise DistattnError(
            f"plan: --memory counts runs of engine fsdp2, not {config.engine.name}; set engine.name to compare."
        )
    vocabulary = config.model.vocab_size or vocabulary_size(config)
    # the context length only sets the number of positions, which take no memory
    context = max(max(map(sum, packs)), config.data.max_document_tokens)
    shape = configured_model(config, vocabulary, context)
    if huggingface.has_recurrence_or_convolution(shape):
        raise DistattnError(
            f"memory is only counted for models without recurrent layers and convolutions; {shape.model_type} has some."
        )
    if getattr(shape, "output_router_logits", False):
        raise DistattnError(
            "memory is counted without a router loss; set output_router_logits to false in the model's config.json to compare."
        )
    settings = PlanSettings.of_config(config)
    if hasattr(shape, "kv_lora_rank"):
        # in latent attention each key head also has a rotary part, and transformers' head_dim is the width of that part alone
        rotary = shape.qk_rope_head_dim
        # a plan made from the run file alone has different widths and cannot be used
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

    memory = memory_settings(config)
    if config.parallel.overlap and memory.activation_checkpointing == "full":
        # with overlapped micro-batches, the outputs of attention are kept
        memory = replace(memory, activation_checkpointing="save_attention")
    counted = memory_of_run(
        make_model,
        plan or settings.plan(*packs),
        memory,
        report_progress,
        shards=config.engine.shard_size or config.parallel.ranks,
        master_weights=config.model.dtype == "bfloat16",
        state_on_host=config.memory.state_on_host,
        ranks=ranks,
        extremes=extremes,
    )
    if not config.parallel.overlap:
        return counted
    return [replace(rank, counts=rank.counts.times(2), host=rank.host + rank.counts.host) for rank in counted]


def on_meta(make_model: Callable[[], Any]) -> Any:
    """Make a model on the meta device, where it takes no memory."""
    huggingface.register()
    with _META:
        return make_model()


def step_memory(watch: AllocationWatch, model: Any, executable: Executable, settings: MemorySettings) -> RankCounts:
    """Count the memory of one step of a new model on the watch's device, with the executable's number of tokens."""
    settings.apply(model, CountingOffload(watch))
    ids = torch.zeros(1, executable.program.tokens, dtype=torch.int64, device=watch.device)
    batch = dict(input_ids=ids, labels=ids, position_ids=ids, loss_scale=1.0)
    batch["context_parallel"] = PlannedAttention(executable)
    sections: dict[nn.Module, str] = {pytorch.output_layer_of(model): LOSS}
    for layer in model.get_decoder().layers:
        sections |= {layer.self_attn: ATTENTION, layer.mlp: FEED_FORWARD}
    return count_step(watch, model, sections, lambda: pytorch.local_loss(model, batch, loss=settings.loss))


def memory_table(counted: Sequence[RankMemory], ranks: int) -> list[str]:
    """Return a text table's lines: a row per group of ranks with equal needs. ranks: all ranks of the run, counted or not."""
    state = ("weights", *StateBytes._fields[1:])
    head = ["ranks", "tokens", *state, "saved", "arena", *SECTIONS, "total", "host"]
    rows = [
        [
            *(*memory.state, memory.counts.saved, memory.counts.arena),
            *(memory.counts.working[name] for name in SECTIONS),
            *(memory.total, memory.host),
        ]
        for memory in counted
    ]
    cells = iter(with_common_unit([float(number) for row in rows for number in row], "B"))
    numbers = [[next(cells) for _ in row] for row in rows]
    first = [[_rank_range(memory.ranks), f"{memory.tokens:,}"] for memory in counted]
    left = ranks - sum(len(memory.ranks) for memory in counted)
    table = align_columns([head, *(a + b for a, b in zip(first, numbers, strict=True))])
    return [
        "a step of one rank on its device: weights are computed, the rest is counted on meta tensors; host: in pinned memory",
        *table,
        "the total has only the largest of attention, feed-forward, loss and other, which never exist at the same time",
        *([f"{left} ranks have numbers of tokens between these, and were not counted"] if left else []),
    ]


def fit_line(counted: Sequence[RankMemory], cluster: ClusterSpec) -> str:
    """Return a sentence that says whether a run fits on the cluster's devices, and how much of their memory it needs."""
    device_bytes, most = cluster.device.memory_gb * 1e9, max(memory.total for memory in counted)
    needed, whole = with_common_unit([float(most), device_bytes], "B")
    verdict = "fits" if most <= device_bytes else "does not fit"
    return (
        f"{verdict}: the rank that needs most takes {needed} of the {whole} of a device of {cluster.name} "
        f"({most / device_bytes:.0%}), not counting CUDA, NCCL and unused blocks of the allocator"
    )


def memory_json(counted: Sequence[RankMemory], cluster: ClusterSpec | None = None) -> str:
    """Return the values of `memory_table` in bytes, as JSON. With a cluster, add its devices' memory and whether ranks fit."""
    device_bytes = None if cluster is None else round(cluster.device.memory_gb * 1e9)
    return json.dumps(
        [
            {
                "ranks": memory.ranks,
                "tokens": memory.tokens,
                **memory.state._asdict(),
                "saved": memory.counts.saved,
                "arena": memory.counts.arena,
                "working": memory.counts.working,
                "total": memory.total,
                "host": memory.host,
                **(
                    {}
                    if device_bytes is None
                    else {"device_memory": device_bytes, "fits": memory.total <= device_bytes}
                ),
            }
            for memory in counted
        ],
        indent=2,
    )


def _counts(make_model: Callable[[], Any], executable: Executable, settings: MemorySettings) -> RankCounts:
    """Count one step of the model. If all layers have the same shapes, count two models with few layers and extrapolate.

    The linear extrapolation is exact: each layer saves the same number of bytes, and computing a layer takes the same memory
    regardless of the number of layers.
    """
    model = on_meta(make_model)
    layers = model.get_decoder().layers
    further = len(layers) - _FEW_LAYERS
    if further < 2 or len({_shapes(layer) for layer in layers}) > 1:
        return step_memory(AllocationWatch(), model, executable, settings)
    counts = []
    for number, shortened in ((_FEW_LAYERS, model), (_FEW_LAYERS + 1, on_meta(make_model))):
        decoder = shortened.get_decoder()
        decoder.layers = decoder.layers[:number]
        counts.append(step_memory(AllocationWatch(), shortened, executable, settings))
    few, more = counts
    saved, host = (a + further * (b - a) for a, b in ((few.saved, more.saved), (few.host, more.host)))
    return RankCounts(saved, more.arena, more.working, host)


def _shapes(layer: nn.Module) -> tuple[object, ...]:
    return (type(layer), *((name, parameter.shape) for name, parameter in layer.named_parameters()))


def _extremes(groups: Mapping[tuple[int, int], Sequence[Executable]]) -> list[tuple[int, int]]:
    """Return the keys of the groups with the fewest tokens, the most tokens, the most kept elements, and the highest peak.

    groups: executables by (tokens, kept elements).
    """
    criteria: list[Callable[[tuple[int, int]], int]] = [
        lambda key: -key[0],
        lambda key: key[0],
        lambda key: key[1],
        lambda key: max(map(_peak, groups[key])),
    ]
    return sorted({max(groups, key=criterion) for criterion in criteria})


def _peak(executable: Executable) -> int:
    return max(memory.peak for memory in executable.memory().values())


def _rank_range(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return str(ranks[0])
    if ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]}-{ranks[-1]}"
    return f"{ranks[0]} and {len(ranks) - 1} more"
