"""The calls that trainers make: batches are sharded, and losses are equal on any number of ranks."""

from collections.abc import Sequence

import pytest
import torch
from imitated_nccl import by_rules
from one_process import loss_by_document
from processes import run_on_ranks, sum_gradients

import distattn as da
from distattn.adapters.pytorch import local_loss
from distattn.batch.packed_batch import IGNORE_INDEX
from distattn.ir.layout import LAYOUTS
from distattn.ops.executable import EXECUTABLES
from distattn.parallel.make_plan import STRATEGIES
from distattn.supervision.heartbeats import current_layer
from distattn.training.config.run_file import Config, ModelConfig
from distattn.training.config.run_settings import build_model, configured_model

pytestmark = pytest.mark.sampled(3)

IDS = torch.tensor([[1, 2, 3]])


def batch(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(0, 256, (1, sum(lengths)), generator=generator), "document_lengths": lengths}


def test_a_single_rank_gets_the_whole_axis_with_restarting_positions_and_shifted_labels():
    cp = da.ContextParallel(strategy="ring")
    local = cp.shard({"input_ids": torch.tensor([[5, 6, 7, 8]]), "document_lengths": [3, 1]})
    assert local["input_ids"].tolist() == [[5, 6, 7, 8]]
    assert local["position_ids"].tolist() == [[0, 1, 2, 0]]
    assert local["labels"].tolist() == [[6, 7, IGNORE_INDEX, IGNORE_INDEX]]
    assert local["loss_scale"] == 0.5


def test_rows_of_a_batch_are_documents_and_given_labels_count():
    cp = da.ContextParallel(strategy="ring")
    ids = torch.arange(6).reshape(2, 3)
    labels = torch.where(ids == 1, IGNORE_INDEX, ids)
    local = cp.shard({"input_ids": ids, "labels": labels})
    assert local["labels"].tolist() == [[IGNORE_INDEX, 2, IGNORE_INDEX, 4, 5, IGNORE_INDEX]]
    assert local["loss_scale"] == 1 / 3


def test_labels_that_are_already_shifted_stay_as_they_are():
    cp = da.ContextParallel(strategy="ring")
    ids, shifted = torch.tensor([[5, 6, 7]]), torch.tensor([[6, -100, 9]])
    local = cp.shard({"input_ids": ids, "shift_labels": shifted})
    assert torch.equal(local["labels"], shifted) and local["loss_scale"] == 0.5


def test_padding_is_left_out_and_packed_positions_say_the_documents():
    cp = da.ContextParallel(strategy="ring")
    ids = torch.arange(1, 9).reshape(2, 4)
    padding = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    local = cp.shard({"input_ids": ids, "attention_mask": padding})
    assert local["input_ids"].tolist() == [[2, 3, 4, 5, 6]]
    assert local["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert local["labels"].tolist() == [[3, 4, IGNORE_INDEX, 6, IGNORE_INDEX]]
    positions = torch.tensor([[0, 1, 2, 0], [0, 0, 1, 2]])
    local = cp.shard({"input_ids": ids, "position_ids": positions, "attention_mask": torch.ones(2, 4)})
    assert local["position_ids"].tolist() == [[0, 1, 2, 0, 0, 0, 1, 2]]
    assert local["context_parallel"].plan(1, 1, 8, 8, "float32").call.mask == da.Mask.documents([3, 1, 1, 3])


def test_padded_attention_returns_its_log_sum_exp():
    ids, generator = torch.arange(5)[None], torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(8, 2, 4, generator=generator) for _ in range(3))
    batches = [da.ContextParallel(strategy="ring", pad_to=size).shard({"input_ids": ids}) for size in (1, 8)]
    (o, lse), (padded_o, padded_lse) = (
        local["context_parallel"].attention(*(x[:rows] for x in (q, k, v)), return_lse=True)
        for local, rows in zip(batches, (5, 8), strict=True)
    )
    assert torch.equal(padded_o[:5], o) and not padded_o[5:].any()
    assert torch.equal(padded_lse[:, :5], lse) and padded_lse[:, 5:].isneginf().all()


def test_one_batch_computes_with_and_without_autocast():
    local = da.ContextParallel(strategy="ring").shard({"input_ids": torch.arange(5)[None]})["context_parallel"]
    q = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        wide = local.attention(q, q, q)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            narrow = local.attention(q, q, q.bfloat16())
        assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
        torch.testing.assert_close(narrow.float(), wide, rtol=3e-2, atol=3e-2)


def test_backward_messages_of_a_layer_without_a_number_are_not_those_of_another_layer():
    batch_of_rank = da.ContextParallel(strategy="ring").shard({"input_ids": torch.arange(5)[None]})["context_parallel"]
    x, layers = torch.randn(5, 2, 4, requires_grad=True), []
    x.register_hook(lambda grad: layers.append(current_layer()))
    y = batch_of_rank.recurrence(x, x, x, "linear_attention")
    batch_of_rank.attention(y, y, y, layer=7).sum().backward()
    assert layers == [None]


def test_micro_batches_of_a_step_share_a_scale():
    cp = da.ContextParallel(strategy="ring")
    first, second = cp.shard_step([batch([4, 2]), batch([3])])
    assert first["loss_scale"] == second["loss_scale"] == 1 / 6


def _other_tokens(rank: int) -> str:
    cp = da.ContextParallel(strategy="ring")
    with pytest.raises(da.DistattnError) as refusal:
        cp.shard(batch([9], seed=rank))
    return str(refusal.value)


def test_ranks_that_hold_other_tokens_are_refused():
    for refusal in run_on_ranks(2, _other_tokens):
        assert "rank 1 holds another batch than rank 0" in refusal


def test_layer_overrides_without_options_may_say_so():
    cp = da.ContextParallel(
        strategy="ring", layers={"window": {"strategy": "allgather", "options": {}, "layout": None}}
    )
    sharded = cp.shard(batch([6]))["context_parallel"]
    sharded.attention(*(torch.randn(6, 2, 8) for _ in range(3)), window=2)
    assert sharded.used


def _replicas(rank: int) -> tuple[float, float]:
    pairs = [torch.distributed.new_group([0, 1]), torch.distributed.new_group([2, 3])]
    world = torch.distributed.group.WORLD
    cp = da.ContextParallel(pairs[rank // 2], loss_group=world, strategy="ring")
    steps = [batch([9]), batch([3, 2])] if rank < 2 else [batch([2]), batch([1, 6])]
    return [float(part["loss_scale"]) for part in cp.shard_step(steps)]


def test_replicas_share_a_scale():
    assert run_on_ranks(4, _replicas) == [[pytest.approx(1 / 17)] * 2] * 4


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: da.ContextParallel(strategy="star"), "strategy 'star'"),
        (
            lambda: da.ContextParallel(strategy="ring", layout="spiral"),
            "layout 'spiral' does not exist; there are contiguous",
        ),
        (lambda: da.ContextParallel(strategy="ring").shard({"input_ids": torch.arange(4)}), "batch, tokens"),
        (
            lambda: da.ContextParallel(strategy="ring").shard(
                {"input_ids": torch.zeros(1, 4, dtype=torch.int64), "cu_seq_lens_q": torch.tensor([0, 4])}
            ),
            "leave return_flash_attn_kwargs out of the collator",
        ),
        (
            lambda: da.ContextParallel(strategy="ring").shard({"input_ids": torch.zeros(1, 4)}),
            "input_ids is float32; whole numbers are needed",
        ),
        (
            lambda: da.ContextParallel(strategy="ring").shard({"input_ids": torch.tensor([[1, -4]])}),
            "input_ids has -4; token ids count from 0",
        ),
        (
            lambda: da.ContextParallel(strategy="ring").shard(
                {"input_ids": torch.zeros(1, 4, dtype=torch.int64), "document_lengths": [3]}
            ),
            "add up to 3 tokens, input_ids has 4",
        ),
        (
            lambda: da.ContextParallel(strategy="ring").shard(
                {"input_ids": torch.zeros(1, 4), "document_lengths": [1.5, 2.5]}
            ),
            "whole numbers",
        ),
        (
            lambda: da.ContextParallel(strategy="ring").shard(
                {"input_ids": IDS, "attention_mask": torch.tensor([[1, 0, 1]])}
            ),
            "attention_mask of row 0 has holes",
        ),
        (
            lambda: da.ContextParallel(strategy="ring").shard(
                {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 0]]), "document_lengths": [3]}
            ),
            "document_lengths and an attention_mask with padding",
        ),
        (
            lambda: da.ContextParallel(strategy="ring").shard(
                {"input_ids": IDS, "position_ids": torch.zeros(3, 1, 3, dtype=torch.int64)}
            ),
            "multimodal RoPE",
        ),
        (
            lambda: da.ContextParallel(strategy="ring").shard({"input_ids": IDS, "position_ids": IDS}),
            "position_ids count 0, 1, 2",
        ),
        (
            lambda: da.ContextParallel(strategy="ring").shard({"input_ids": IDS, "token_type_ids": IDS}),
            "token_type_ids",
        ),
        (
            lambda: da.ContextParallel(strategy="ring").shard(
                {"input_ids": IDS, "attention_mask": torch.tensor([[1, 2, 2]])}
            ),
            "other values than 0",
        ),
        (
            lambda: da.ContextParallel(strategy="ring").shard({"input_ids": IDS, "attention_mask": torch.ones(3, 9)}),
            "attention_mask is .batch, tokens. like input_ids",
        ),
        (
            lambda: da.ContextParallel(strategy="ring").shard({"input_ids": IDS, "labels": IDS, "shift_labels": IDS}),
            "labels and shift_labels",
        ),
        (lambda: da.ContextParallel(strategy="ring").shard({"input_ids": [[1, 2]]}), "input_ids is a list; a tensor"),
        (lambda: da.ContextParallel(strategy="ring", layers={"full": "ring"}), "layers 'full' need a mapping"),
        (lambda: da.ContextParallel(strategy="ring", layers={True: {"strategy": "ring"}}), "not True"),
        (
            lambda: da.ContextParallel(
                strategy="ring", layers={0: {"strategy": "ring", "layout_options": {"block": 4}}}
            ),
            "layout_options without a layout",
        ),
        (lambda: da.ContextParallel(strategy="ring", layers={"windows": {}}), "window or full, not 'windows'"),
        (lambda: da.ContextParallel(strategy="ring", layers={3: {}}), "layers 3 need their own strategy"),
        (lambda: da.ContextParallel(strategy="ring", layers={3: {"stratgy": 1}}), "layers 3 have no 'stratgy'"),
        (lambda: da.ContextParallel(strategy="ring").shard({}), "batch has no input_ids"),
        (
            lambda: da.ContextParallel(strategy="ring").shard(None),
            "a batch is a mapping with input_ids, not a NoneType",
        ),
        (lambda: da.ContextParallel(strategy="ring").shard_step(batch([3])), "shard_step takes a list of batches"),
        (lambda: da.ContextParallel(layout="zigzag"), "a strategy is needed"),
        (
            lambda: da.ContextParallel(strategy="ring", inner="causal"),
            "there is no setting 'inner'; there are strategy",
        ),
        (lambda: da.ContextParallel(strategy="ring", data="both"), "data: there is no 'both'; there are replicated"),
        (lambda: da.ContextParallel(strategy="ring", context_parallel_size=2), "context_parallel_size belongs to data"),
        (lambda: da.ContextParallel(strategy="ring", verify_every=1.5), "verify_every is a whole number"),
        (lambda: da.ContextParallel(strategy="ring", kernel="bogus"), "kernel: there is no 'bogus'; there are auto"),
        (lambda: da.ContextParallel(strategy="ring", backward="bogus"), "policy 'bogus'"),
        (lambda: da.ContextParallel(strategy="ring", document_mask="bogus"), "document_mask is"),
        (
            lambda: da.ContextParallel(strategy="ring", layout_options={"min_chunk": 4}),
            "layout zigzag has no option 'min_chunk'",
        ),
    ],
)
def test_bad_batches_and_names_are_refused(make, sentence):
    with pytest.raises(da.DistattnError, match=sentence):
        make()


def test_one_of_several_processes_without_a_group_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(da.DistattnError, match="one of 2 processes .*call torch.distributed.init_process_group first"):
        da.ContextParallel(strategy="ring")


def test_a_batch_without_tokens_is_refused():
    with da.ContextParallel(strategy="ring") as cp, pytest.raises(da.DistattnError, match="has no tokens"):
        cp.shard({"input_ids": torch.zeros(1, 0, dtype=torch.int64)})


def test_equal_batches_share_a_plan():
    cp = da.ContextParallel(strategy="ring")
    shape = (4, 2, 8, 8, "float32")
    first, second, other = (cp.shard(batch(lengths))["context_parallel"] for lengths in ([4, 2], [4, 2], [3, 3]))
    assert first.plan(*shape) is second.plan(*shape) is not other.plan(*shape)


CONFIG = Config(
    model=ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        dtype="float64",
    )
)


def _gradients(rank: int, strategy: str, layouts: Sequence[str], lengths: list[int]):
    """Return the gradients for each layout. The same processes run all layouts, because starting them takes longer than
    computing.
    """
    gradients = []
    for layout in layouts:
        with da.ContextParallel(strategy=strategy, layout=layout) as cp:
            gradients.append(_gradients_of(cp, lengths))
    return gradients


def _gradients_of(cp: da.ContextParallel, lengths: list[int]):
    model = build_model(CONFIG, configured_model(CONFIG, 256, 4096), "distattn")
    local = cp.shard(batch(lengths))
    loss = local_loss(model, local)
    loss.backward()
    parameters = list(model.parameters())
    sum_gradients(model)
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    return total, [parameter.grad for parameter in parameters]


def _plain(lengths: list[int]):
    """Compute the loss and gradients in a single process with transformers' own attention, one document at a time."""
    model = build_model(CONFIG, configured_model(CONFIG, 256, 4096), "sdpa")
    loss = loss_by_document(lambda ids: model(ids, use_cache=False).logits[0], [batch(lengths)])
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.sampled(7)
@pytest.mark.parametrize("lengths", [[40, 1, 23, 9], [2]], ids=["pack", "fewer tokens than ranks"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rules", ["gloo", pytest.param("nccl", marks=pytest.mark.full)])
def test_loss_and_every_gradient_equal_plain_transformers(strategy, lengths, rules):
    loss, gradients = _plain(lengths)
    # half of the layouts run with gloo and half with NCCL's rules; the next strategy and the other pack swap the halves
    first = list(STRATEGIES).index(strategy) + (rules == "nccl") + (len(lengths) == 1)
    layouts = list(LAYOUTS)[first % 2 :: 2]
    for of_rank in run_on_ranks(4, by_rules(rules, _gradients), strategy, layouts, lengths):
        for layout, (got, got_gradients) in zip(layouts, of_rank, strict=True):
            # the model's norms compute in fp32, so the last bit may differ between shapes
            assert abs(got - loss) < 1e-9, layout
            for a, b in zip(got_gradients, gradients, strict=True):
                assert (a - b).abs().max() < 1e-8, layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_follows_the_batch(layout):
    cp = da.ContextParallel(strategy="ring", layout=layout, document_mask=(2, 0))
    for lengths in ([4, 2], [9], [1, 1, 5]):
        sharded = cp.shard(batch(lengths))["context_parallel"]
        assert sharded.plan(4, 2, 8, 8, "float32").call.mask == da.Mask.documents(lengths, (2, 0))


def test_programs_for_known_shapes_are_made_ahead():
    cp = da.ContextParallel(strategy="ring")

    def layer(lengths):
        sharded = cp.shard(batch(lengths))["context_parallel"]
        ahead = {shape: future.result() for shape, future in sharded._ahead.items()}
        q, k, v = (torch.randn(sum(lengths), heads, 8) for heads in (4, 2, 2))
        sharded.attention(q, k, v)
        (executable,) = sharded._executables.values()
        return ahead, executable

    assert layer([4, 2])[0] == {}
    ahead, executable = layer([3, 3])
    (planned,) = ahead.values()
    # the layer used the program that the thread had prepared
    assert executable.program is next(iter(EXECUTABLES._programs[planned.plan].values()))
