"""Megatron-core on CPU ranks, with our layouts and its own, compared to Megatron's own attention in a single process."""

import threading
from functools import partial

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import small  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron_models import (  # noqa: E402
    build,
    config_of,
    context_parallel,
    schedule,
    sequence_parallel_spec,
    start,
    wrapped,
)
from processes import run_on_ranks  # noqa: E402

import distattn as da  # noqa: E402
from distattn.adapters import megatron  # noqa: E402
from distattn.adapters.megatron_experts import check_experts  # noqa: E402
from distattn.batch.packed_batch import IGNORE_INDEX  # noqa: E402

pytestmark = pytest.mark.sampled(6)


def _stock(rank: int, micro_batches: int, replicas: int, changes: dict):
    """Compute the loss and gradients in a single process with Megatron's own attention, one document at a time."""
    start()
    model = build(config_of(), get_gpt_layer_local_spec(normalization="RMSNorm"), **changes)
    total, valid = torch.zeros(()), 0
    for replica in range(replicas):
        for batch in small.step(replica, micro_batches):
            lengths = batch["document_lengths"]
            for ids, labels in zip(
                batch["input_ids"].split(lengths, 1), batch["labels"].split(lengths, 1), strict=True
            ):
                causal = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
                logits = model(ids, torch.arange(ids.shape[1])[None], causal)[0, :-1]
                total = total + F.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORE_INDEX, reduction="sum")
                valid += int((labels[0, 1:] != IGNORE_INDEX).sum())
    loss = total / valid
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


def _gradients(
    rank: int, cp: int, distributed_optimizer: bool, per_token: bool, micro_batches: int, changes: dict, shared=False
):
    start(cp=cp)
    config = config_of(cp=cp, calculate_per_token_loss=per_token)
    model = megatron.use_batch_positions(build(config, **changes))
    chunk = wrapped(config, model, distributed_optimizer)
    chunks = megatron.ProbeTarget([chunk], micro_batches)
    ours = context_parallel(shared)
    factor = ours.loss_scale(chunks)
    chunk.zero_grad_buffer()
    parts = ours.shard_step(small.step(parallel_state.get_data_parallel_rank(), micro_batches))
    if shared:
        assert small.shared_between_blocks(parts, cp, "float32")
    reports = schedule(chunk, config, parts)
    loss, tokens = (sum(report[name] for report in reports).double() for name in ("loss_sum", "tokens"))
    for number in (loss, tokens):
        dist.all_reduce(number)
    return factor, loss / tokens, [chunks._gathered_gradient(parameter).clone() for parameter in model.parameters()]


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("distributed_optimizer", [False, True])
@pytest.mark.parametrize(("cp", "shared"), [(2, False), (4, False), (2, True)], ids=["2", "4", "2, shared"])
def test_gradients_match_megatrons_own_attention(cp, shared, distributed_optimizer, per_token, micro_batches):
    changes = {"share_embeddings_and_output_weights": cp == 4}
    ((loss, wanted),) = run_on_ranks(1, _stock, micro_batches, 4 // cp, changes)
    arguments = cp, distributed_optimizer, per_token, micro_batches, changes, shared
    for factor, got_loss, gradients in run_on_ranks(4, _gradients, *arguments):
        assert factor == (1 if per_token else 4 // cp * micro_batches)
        assert abs(got_loss - loss) < 1e-5
        assert abs(small.norm_ratio(gradients, wanted) - 1) < 1e-4


def zigzag(tokens: torch.Tensor, lengths: list[int], rank: int, ranks: int) -> torch.Tensor:
    """Return a rank's part of rows (B, S) as Megatron's loaders provide it, with each row or document split separately."""
    parts = []
    for document in tokens.split(lengths, 1):
        chunks = document.chunk(2 * ranks, 1)
        parts += [chunks[rank], chunks[2 * ranks - 1 - rank]] if ranks > 1 else [document]
    return torch.cat(parts, 1)


def _own_batches(rank: int, cp: int, kind: str, changes: dict, spec_kind: str = "ours"):
    """Return the loss and gradients of a batch sharded by Megatron's own loaders, both summed over ranks by hand."""
    start(cp=cp)
    config = config_of(cp=cp, **changes)
    stock = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = build(config, stock if spec_kind == "stock" else None)
    for name, parameter in model.named_parameters():
        if "softmax_offset" in name:
            torch.nn.init.uniform_(parameter, generator=torch.Generator().manual_seed(3))
    ids = torch.randint(0, 64, (1 if kind == "thd" else 2, 48), generator=torch.Generator().manual_seed(1))
    lengths = [8, 32, 8] if kind == "thd" else [48]
    packed = None
    if kind == "thd":
        ends = torch.tensor([0, 8, 40, 48], dtype=torch.int32)
        packed = PackedSeqParams("thd", ends, ends, max_seqlen_q=32, max_seqlen_kv=32)
    if kind == "own group":
        packed = PackedSeqParams("sbhd", local_cp_size=cp, cp_group=parallel_state.get_context_parallel_group())
        packed.max_seqlen_q = packed.max_seqlen_kv = 48
    mask = None
    if spec_kind == "stock":
        mask = torch.ones(1, 1, 48, 48, dtype=torch.bool).triu(1)
        if changes.get("window_size"):
            mask |= torch.ones(48, 48, dtype=torch.bool).tril(-changes["window_size"][0] - 1)
    mine = partial(zigzag, lengths=lengths, rank=parallel_state.get_context_parallel_rank(), ranks=cp)
    losses = model(mine(ids), None, mask, labels=mine(ids.roll(-1, 1)), packed_seq_params=packed)
    losses.sum().backward()
    total = losses.detach().sum()
    dist.all_reduce(total)
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    return total, [parameter.grad for parameter in model.parameters()]


def _alone(rank: int):
    """Return the output for a batch that this rank has alone, since its packed_seq_params name a group of one rank."""
    start(cp=2)
    alone = [dist.new_group([other]) for other in range(2)][rank]
    packed = PackedSeqParams("sbhd", max_seqlen_q=20, max_seqlen_kv=20, local_cp_size=1, cp_group=alone)
    ids = torch.randint(0, 64, (1, 20), generator=torch.Generator().manual_seed(1))
    return build(config_of(cp=2))(ids, None, None, packed_seq_params=packed).detach()


def _whole(rank: int):
    start()
    ids = torch.randint(0, 64, (1, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).triu(1)
    return build(config_of(), get_gpt_layer_local_spec(normalization="RMSNorm"))(ids, None, mask).detach()


def test_a_batch_may_have_a_group_of_its_own():
    (wanted,) = run_on_ranks(1, _whole)
    for got in run_on_ranks(2, _alone):
        assert (got - wanted).abs().max() < 1e-5


def _closed(rank: int) -> tuple[int, set[str], str]:
    """Run rows of many lengths and close the model. Return the number of batches it had cached, the threads that
    remain, and the error of a call after closing.
    """
    start(cp=2)
    model = build(config_of(cp=2))
    for rows in range(1, 71):
        model(torch.zeros(rows, 2, dtype=torch.int64), None, None, labels=torch.zeros(rows, 2, dtype=torch.int64))
    (batches,) = {module.batches for module in model.modules() if isinstance(module, megatron.CoreAttention)}
    remembered = len(batches._rows)
    for _ in range(2):
        megatron.close(model)
    threads = {thread.name for thread in threading.enumerate() if thread.name.startswith("distattn")}
    with pytest.raises(da.DistattnError) as error:
        model(torch.zeros(1, 2, dtype=torch.int64), None, None)
    return remembered, threads, str(error.value)


@pytest.mark.full
def test_closing_ends_threads_and_many_lengths_fill_no_memory():
    for result in run_on_ranks(2, _closed):
        assert result == (64, set(), "this core attention has been closed.")


def same(got, wanted) -> None:
    for loss, gradients in got:
        assert abs(loss / wanted[0] - 1) < 1e-5
        assert abs(small.norm_ratio(gradients, wanted[1]) - 1) < 1e-4


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("kind", ["sbhd", "own group", "window"])
def test_rows_in_megatrons_own_order_match_its_own_attention(kind, cp):
    changes = {"window_size": (6, 0)} if kind == "window" else {}
    (wanted,) = run_on_ranks(1, _own_batches, 1, "sbhd", changes, "stock")
    same(run_on_ranks(cp, _own_batches, cp, kind, changes), wanted)


@pytest.mark.parametrize("changes", [{}, {"softmax_type": "off-by-one"}, {"softmax_type": "learnable"}], ids=str)
@pytest.mark.parametrize("cp", [2, 4])
def test_packs_and_sinks_do_not_depend_on_the_number_of_ranks(cp, changes):
    for kind in ("thd", "sbhd"):
        (wanted,) = run_on_ranks(1, _own_batches, 1, kind, changes)
        same(run_on_ranks(cp, _own_batches, cp, kind, changes), wanted)


def test_a_pack_is_its_documents_one_by_one():
    (packed,) = run_on_ranks(1, _own_batches, 1, "thd", {})
    (alone,) = run_on_ranks(1, _one_by_one)
    same([packed], alone)


def _one_by_one(rank: int):
    start()
    model = build(config_of(), get_gpt_layer_local_spec(normalization="RMSNorm"))
    ids = torch.randint(0, 64, (1, 48), generator=torch.Generator().manual_seed(1))
    total = torch.zeros(())
    for ids_, labels in zip(ids.split([8, 32, 8], 1), ids.roll(-1, 1).split([8, 32, 8], 1), strict=True):
        mask = torch.ones(1, 1, ids_.shape[1], ids_.shape[1], dtype=torch.bool).triu(1)
        total = total + model(ids_, None, mask, labels=labels).sum()
    total.backward()
    return total.detach(), [parameter.grad for parameter in model.parameters()]


def _parallel(rank: int, tp: int, pp: int, cp: int, changes: dict):
    """Return (loss factor, losses of an evaluation-only and a training step, squared gradient norm)."""
    start(tp, pp, cp)

    def seeded(weight):
        # use the same weights on every stage and tensor-parallel rank
        torch.nn.init.normal_(weight, std=0.2, generator=torch.Generator().manual_seed(weight.numel()))

    config = config_of(
        tp, pp, cp, calculate_per_token_loss=True, init_method=seeded, output_layer_init_method=seeded, **changes
    )
    model = megatron.use_batch_positions(build(config, sequence_parallel_spec() if config.sequence_parallel else None))
    chunk = wrapped(config, model, distributed_optimizer=False)
    ours = context_parallel(pad_to=tp)
    factor = ours.loss_scale(megatron.ProbeTarget([chunk]))
    parts = ours.shard_step(small.step(0, 2))
    losses = []
    for forward_only in (True, False):
        reports = schedule(chunk, config, parts, forward_only)
        sums = torch.zeros(2, dtype=torch.float64)
        for report in reports:
            sums += torch.stack([report["loss_sum"].double(), report["tokens"].double()])
        dist.all_reduce(sums)
        losses.append(float(sums[0] / sums[1]))
    norm = sum(
        float(p.main_grad.double().square().sum())
        for p in model.parameters()
        if getattr(p, "tensor_model_parallel", False) or not rank % tp
    )
    squares = torch.tensor(norm, dtype=torch.float64)
    dist.all_reduce(squares)
    return factor, losses, float(squares / cp)


@pytest.mark.parametrize(
    ("tp", "pp", "cp", "changes"),
    [(2, 1, 2, {}), (2, 1, 2, {"sequence_parallel": True}), (1, 2, 2, {}), (2, 1, 1, {}), (1, 1, 4, {})],
    ids=["tp2 cp2", "tp2 cp2 sequence parallel", "pp2 cp2", "tp2", "cp4"],
)
def test_tensor_and_pipeline_parallelism_change_nothing(tp, pp, cp, changes):
    ((_, wanted, squares),) = run_on_ranks(1, _parallel, 1, 1, 1, {})
    for factor, losses, got in run_on_ranks(tp * pp * cp, _parallel, tp, pp, cp, changes):
        assert factor == 1
        assert losses == pytest.approx(wanted, rel=1e-5)
        assert got == pytest.approx(squares, rel=2e-4)


def _shared(rank: int, tp: int, pp: int, per_token: bool, distributed_optimizer: bool, replicas: list[int]):
    """Return the loss and squared gradient norm of a step in which data-parallel ranks share attention."""
    start(tp, pp)

    def seeded(weight):
        torch.nn.init.normal_(weight, std=0.2, generator=torch.Generator().manual_seed(weight.numel()))

    config = config_of(tp, pp, calculate_per_token_loss=per_token, init_method=seeded, output_layer_init_method=seeded)
    model = megatron.use_batch_positions(build(config))
    chunk = wrapped(config, model, distributed_optimizer)
    ours = context_parallel(shared=len(replicas) == 1)
    replica_ = parallel_state.get_data_parallel_rank() if len(replicas) == 1 else None
    batches = [batch for replica in (replicas if replica_ is None else [replica_]) for batch in small.step(replica, 2)]
    chunks = megatron.ProbeTarget([chunk], len(batches))
    ours.loss_scale(chunks)
    chunk.zero_grad_buffer()
    parts = ours.shard_step(batches)
    if replica_ is not None:
        assert small.shared_between_blocks(parts, 1, "float32", tp)
    sums = torch.zeros(2, dtype=torch.float64)
    for report in schedule(chunk, config, parts):
        sums += torch.stack([report["loss_sum"].double(), report["tokens"].double()])
    dist.all_reduce(sums)
    squares = torch.zeros((), dtype=torch.float64)
    for parameter in model.parameters():
        if getattr(parameter, "tensor_model_parallel", False) or not rank % tp:
            squares += chunks._gathered_gradient(parameter).double().square().sum()
        elif distributed_optimizer:
            chunks._gathered_gradient(parameter)
    dist.all_reduce(squares)
    return float(sums[0] / sums[1]), float(squares) / parallel_state.get_data_parallel_world_size()


@pytest.mark.parametrize("distributed_optimizer", [False, True])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)], ids=["dp2 tp2", "dp2 pp2"])
def test_replicas_share_attention_with_tensor_and_pipeline_parallelism(tp, pp, per_token, distributed_optimizer):
    ((loss, squares),) = run_on_ranks(1, _shared, 1, 1, per_token, False, [0, 1])
    for got_loss, got in run_on_ranks(4, _shared, tp, pp, per_token, distributed_optimizer, [0]):
        assert got_loss == pytest.approx(loss, rel=1e-5)
        assert got == pytest.approx(squares, rel=2e-4)


def _with_servers(rank: int) -> list[str]:
    start()
    if rank == 2:
        return [str(da.serve())]
    config = config_of(calculate_per_token_loss=True)
    model = megatron.use_batch_positions(build(config))
    with da.ContextParallel(servers=1, **small.CAD) as ours:
        refusals = []
        batch = ours.shard(small.micro_batch([9, 30]))
        for ask in (
            lambda: megatron.forward_step(iter([batch]), model, config),
            lambda: ours.loss_scale(megatron.ProbeTarget([model])),
        ):
            with pytest.raises(da.DistattnError) as refusal:
                ask()
            refusals.append(str(refusal.value))
        return refusals


def test_ranks_that_only_serve_are_refused():
    *refusals, _ = run_on_ranks(3, _with_servers)
    assert all(
        "Megatron trains on all ranks, so no rank can only serve" in refusal
        for of_rank in refusals
        for refusal in of_rank
    )
    assert [len(of_rank) for of_rank in refusals] == [2, 2]


def _untouched(rank: int, distributed_optimizer: bool) -> bool:
    start(cp=2)
    config = config_of(cp=2)
    model = megatron.use_batch_positions(build(config))
    chunk = wrapped(config, model, distributed_optimizer)
    ours = context_parallel()
    settings = OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=distributed_optimizer)
    optimizer = get_megatron_optimizer(settings, [chunk], use_gloo_process_groups=False)
    for _ in range(2):
        chunk.zero_grad_buffer()
        schedule(chunk, config, ours.shard_step(small.step(0, 2)))
        optimizer.step()
    chunk.zero_grad_buffer()
    schedule(chunk, config, ours.shard_step(small.step(0, 2)))

    def state() -> list[torch.Tensor]:
        # the gradients have been reduced but not applied yet
        moments = [
            x for state_ in optimizer.chained_optimizers for s in state_.optimizer.state.values() for x in s.values()
        ]
        buffers = [buffer.grad_data for buffer in chunk.buffers]
        return [x.detach().clone() for x in (*model.parameters(), *buffers, *moments) if isinstance(x, torch.Tensor)]

    before, numbers = state(), torch.get_rng_state()
    ours.loss_scale(megatron.ProbeTarget([chunk], 2))
    assert len(before) > 2 * len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(state(), before, strict=True))
    return torch.equal(torch.get_rng_state(), numbers)


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_the_probe_leaves_everything_bit_identical(distributed_optimizer):
    assert run_on_ranks(2, _untouched, distributed_optimizer) == [True, True]


def _refused(rank: int) -> list[str]:
    start(cp=2)
    config = config_of(cp=2)
    refusals = []

    def ask(sentence, call):
        with pytest.raises(da.DistattnError, match=sentence):
            call()
        refusals.append(sentence)

    ask("attention dropout 0.1", lambda: build(config_of(cp=2, attention_dropout=0.1)))
    ask("qk_clip", lambda: build(config_of(cp=2, qk_clip=True)))
    ask("sees 3 tokens ahead", lambda: build(config_of(cp=2, window_size=(4, 3))))
    ask(
        "multimodal RoPE",
        lambda: megatron.use_batch_positions(
            build(config_of(cp=2, mrope_section=[1, 1, 2]), position_embedding_type="mrope")
        ),
    )
    ask("loaders take no layout", lambda: megatron.replace_core_attention(get_gpt_layer_local_spec(), layout="zigzag"))
    ask("strategy 'star'", lambda: megatron.replace_core_attention(get_gpt_layer_local_spec(), strategy="star"))
    ask("support only Megatron's own order", lambda: megatron.ProbeTarget([build(config)]))
    experts = config_of(cp=2, num_moe_experts=2)
    crowded = config_of(cp=2, num_moe_experts=2, moe_expert_capacity_factor=1.0)
    ask("moe_expert_capacity_factor", lambda: check_experts(torch.nn.Module(), crowded))
    ask("has not replaced", lambda: check_experts(torch.nn.ModuleList([_stock_router(experts)]), experts))
    model = build(config)
    core = model.decoder.layers[0].self_attention.core_attention
    q, k = torch.zeros(6, 1, 4, 8), torch.zeros(6, 1, 2, 8)
    ask("multiple of 4", lambda: core(q[:5], k[:5], k[:5], None))
    ask("an attention mask", lambda: core(q, k, k, torch.ones(1)))
    ask("an attention bias", lambda: core(q, k, k, None, attention_bias=q))
    ask("6 keys for 1 queries", lambda: core(q[:1], k, k, None))
    ask("without a cp_group", lambda: core(q, k, k, None, packed_seq_params=PackedSeqParams("sbhd", local_cp_size=1)))
    ask("IdentityOp, which is neither a core attention", lambda: megatron.replace_core_attention(_without_attention()))
    uneven = {"input_ids": torch.zeros(1, 5), "labels": torch.zeros(1, 5)}
    config.tensor_model_parallel_size, config.sequence_parallel = 2, True
    ask("pad_to=2", lambda: megatron.check_shard(uneven, config))
    config.sequence_parallel, config.pipeline_model_parallel_size, config.variable_seq_lengths = False, 2, False
    ask("variable_seq_lengths=True", lambda: megatron.check_shard(uneven, config))
    return refusals


def _direct(rank: int, kind: str):
    """Return the outputs of a layer with sinks, and the same outputs by definition: a sink adds a key without a value
    to every softmax.
    """
    start()
    config = config_of(softmax_type=kind)
    core = build(config).decoder.layers[0].self_attention.core_attention
    q, k, v = (torch.randn(7, 1, heads, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    sink = torch.zeros(4)
    if kind == "learnable":
        sink = torch.nn.init.uniform_(core.softmax_offset, generator=torch.Generator().manual_seed(3)).detach()
    scores = torch.einsum("qhd,khd->hqk", q[:, 0], k[:, 0].repeat_interleave(2, 1)) * 8**-0.5
    scores = scores.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -torch.inf)
    weights = torch.cat([scores, sink[:, None, None].expand(-1, 7, 1)], -1).softmax(-1)[..., :7]
    wanted = torch.einsum("hqk,khd->qhd", weights, v[:, 0].repeat_interleave(2, 1))
    return core(q, k, v, None).view(7, 4, 8).detach(), wanted


@pytest.mark.parametrize("kind", ["off-by-one", "learnable"])
def test_sinks_are_what_they_are_defined_to_be(kind):
    ((got, wanted),) = run_on_ranks(1, _direct, kind)
    assert (got - wanted).abs().max() < 1e-5


def _stock_router(config):
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.router import TopKRouter

    return TopKRouter(config, ProcessGroupCollection.use_mpu_process_groups())


def _without_attention():
    from megatron.core.transformer.identity_op import IdentityOp

    spec = get_gpt_layer_local_spec()
    spec.submodules.self_attention = IdentityOp
    return spec


def test_models_that_would_be_wrong_are_refused_by_name():
    for refusals in run_on_ranks(2, _refused):
        assert len(refusals) == 17
