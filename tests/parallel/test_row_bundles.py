"""Messages that carry several tensors: their number, and that all results stay correct."""

import collections

import pytest
import torch
from cases import LENGTHS, layouts, masks
from meta_run import Layer, MetaBackend, layer_call
from oracle import assert_close, dense, random_inputs, run_all_ranks
from test_budgets import packed, plan_of

from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.plan import DTYPE_BYTES, POLICIES, Payload
from distattn.parallel.make_plan import make_plan
from distattn.parallel.runtime.communication.transport import Packet
from distattn.parallel.runtime.lowering.lower import lower
from distattn.parallel.runtime.lowering.row_bundles import RowFormat


def test_tensors_in_a_row_are_viewed_in_their_own_dtypes():
    rows = RowFormat.of([(4, ((8, "bfloat16"), (None, "float32")))])
    message = torch.empty(3, rows.numbers, dtype=torch.bfloat16)
    o, lse = Packet(0, Payload.O, message, ((Payload.O, 80),), rows).tensors()
    assert (o.dtype, o.shape, lse.dtype, lse.shape) == (torch.bfloat16, (3, 32), torch.float32, (3, 4))
    o.fill_(1.0)
    # the low half of this float32 is a NaN in bfloat16
    lse.copy_(torch.tensor(0x3F807FC1, dtype=torch.int32).view(torch.float32))
    assert not message.isfinite().all() and o.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("strategy", ["ulysses", "usp"])
def test_a_rank_sends_at_most_four_messages_to_each_peer_and_pass(strategy, policy, monkeypatch):
    for lengths in (packed(65536), [8192] * 8):
        # every peer's tokens are in two segments, and two steps have messages, which makes four messages
        for sent in sends_of_passes(plan_of(strategy, lengths, 64, 8, backward=policy), monkeypatch):
            assert len(set(sent)) in (0, 7) and max(collections.Counter(sent).values(), default=0) <= 4


def test_a_rank_sends_at_most_four_messages_around_a_ring(monkeypatch):
    for heads, kv_heads, ulysses in ((64, 8, 4), (8, 2, 2)):
        plan = plan_of("usp", [65536], heads, kv_heads, options=dict(ulysses=ulysses))
        forward, backward = sends_of_passes(plan, monkeypatch)
        assert max(forward.count(peer) for peer in range(8)) <= 4
        # dQ is sent in two steps, in the first of them together with dK and dV of other tokens
        group = [rank for rank in range(ulysses) if rank != 1]
        assert max(backward.count(peer) for peer in group) <= 4


def test_large_keys_and_values_travel_apart_from_queries(monkeypatch):
    # in a bundle with the queries, they would be kept as long as the queries, and be copied before they are passed on
    plan = plan_of("usp", [1 << 20], 64, 8, options=dict(ulysses=4))
    for sent in sends_of_passes(plan, monkeypatch):
        assert max(sent.count(peer) for peer in range(8)) == 6


def test_gradients_of_different_tokens_share_rows():
    mask, layout = Mask.causal(256), Layout.zigzag([256], 8)
    shape = dict(heads=8, kv_heads=4, head_dim=16, dtype="bfloat16")
    plan = make_plan(mask, layout, strategy="usp", options=dict(ulysses=4), **shape)
    pairs = set()
    for rank in range(8):
        for step in lower(plan, rank, lambda mask: None).backward:
            for numbers in step.joined_sends:
                messages = [step.sends[number] for number in numbers]
                if {payload for payload, _ in messages} == {Payload.dQ, Payload.dKV}:
                    rows = [message.view.slices[0].rows for _, message in messages]
                    assert rows[0] == rows[1] and len({message.bundle for _, message in messages}) == 1
                    pairs.add((rank, messages[0][1].peer))
    assert pairs
    inputs = random_inputs(256, 8, 4, 16)
    assert_close(run_all_ranks(plan, inputs), dense(mask, inputs, 16**-0.5), 2e-2)


@pytest.mark.parametrize(("lengths", "ranks", "backward"), [([200, 150, 100, 62], 6, None), ([512], 4, "keep")])
def test_peers_that_get_gradients_of_different_heads_share_no_rows(lengths, ranks, backward):
    mask, layout = Mask.documents(lengths), Layout.zigzag(lengths, ranks)
    shape = dict(heads=8, kv_heads=8, head_dim=16, dtype="float32", backward=backward)
    inputs = random_inputs(mask.n, 8, 8, 16)
    results = run_all_ranks(make_plan(mask, layout, strategy="cad", **shape), inputs)
    assert_close(results, dense(mask, inputs, 16**-0.5), 1e-5)


@pytest.mark.parametrize("strategy", ["ring", "double_ring"])
def test_rings_send_keys_and_values_or_their_gradients_as_one_message_a_step(strategy, monkeypatch):
    plan = plan_of(strategy, [65536], 64, 8)
    for direction, sent in zip(("forward", "backward"), sends_of_passes(plan, monkeypatch), strict=True):
        steps = getattr(lower(plan, 1, lambda mask: None), direction)
        pairs = [(number, payload, m.peer) for number, step in enumerate(steps) for payload, m in step.sends]
        assert len(sent) == len(pairs) == len(set(pairs)) <= 16


def sends_of_passes(plan, monkeypatch):
    """Return the peers to which rank 1 sends messages in the forward and in the backward pass."""
    sent, send = [], MetaBackend.send
    with monkeypatch.context() as patch:
        patch.setattr(MetaBackend, "send", lambda self, x, peer, tag: (sent.append(peer), send(self, x, peer, tag)))
        layer = Layer(plan, 1)
        outputs = layer.forward()
        count = len(sent)
        layer.backward(*outputs)
    return sent[:count], sent[count:]


def test_both_ends_find_the_same_bundles():
    # uneven heads, one KV head shared by several ranks, and a rank without tokens
    for heads, kv_heads, layout in ((6, 2, "zigzag"), (7, 1, "from_chunks"), (8, 4, "contiguous")):
        shape = dict(heads=heads, kv_heads=kv_heads, head_dim=8, dtype="bfloat16")
        plan = make_plan(masks()["documents"], layouts(LENGTHS, 4)[layout], strategy="ulysses", **shape)
        programs = [lower(plan, rank, lambda mask: None) for rank in range(4)]
        for direction in ("forward", "backward"):
            sent, received = collections.defaultdict(list), collections.defaultdict(list)
            for program in programs:
                for number, step in enumerate(getattr(program, direction)):
                    for bundles, messages, joined in (
                        (sent, step.sends, step.joined_sends),
                        (received, step.receives, step.joined_receives),
                    ):
                        for numbers in joined:
                            payloads = [(messages[i][0], messages[i][1].view.heads) for i in numbers]
                            peer, bundle = messages[numbers[0]][1].peer, messages[numbers[0]][1].bundle
                            ends = (program.rank, peer) if bundles is sent else (peer, program.rank)
                            bundles[number, *ends].append((payloads, bundle, messages[numbers[0]][1].segments))
            assert sent == received and sent


def test_a_row_has_no_gaps_and_ends_with_one_number_tensors_and_padding():
    row = RowFormat.of([(3, ((8, "bfloat16"), (None, "float32"))), (1, ((4, "float32"),))])
    (outputs, numbers), (gradients,) = row.tensors
    assert (outputs.first, gradients.first, numbers.first) == (0, 48 // 4, 64 // 4)
    # the tensors take 76 bytes
    assert (row.dtype, row.numbers) == ("bfloat16", 128 // 2)
    assert numbers.dtype == torch.float32 and numbers.width is None


@pytest.mark.parametrize("head_dim", [128, 64])
def test_rows_are_multiples_of_sixteen_numbers_with_little_padding(head_dim):
    # one, two, four and eight heads per rank. Rows with log-sum-exps or deltas need padding
    bundled = collections.defaultdict(set)
    for heads in (4, 8, 16, 32):
        shape = dict(heads=heads, kv_heads=4, head_dim=head_dim, dtype="bfloat16", comm_dtype="bfloat16")
        plan = make_plan(masks()["documents"], layouts(LENGTHS, 4)["zigzag"], strategy="ulysses", **shape)
        for program in (lower(plan, rank, lambda mask: None) for rank in range(4)):
            for step in (*program.forward, *program.backward):
                for payload, message in step.sends:
                    if message.bundle:
                        bundled[heads].add(payload)
                        row, sent = message.row_format, sum(bytes for _, bytes in message.row_bytes)
                        padding = row.numbers * DTYPE_BYTES[row.dtype] - sent
                        assert 0 <= padding <= sent / 8
                # log-sum-exps and deltas are read one value at a time, so only the other tensors must be aligned
                keys = keys_of_bundles(step) & step.places.keys()
                for place in (place for key in keys for place in step.places[key] if len(place.shape) == 3):
                    assert place.strides[0] % 16 == 0 and place.offset * place.dtype.itemsize % 16 == 0
    everything = {Payload.Q, Payload.KV, Payload.O, Payload.dO, Payload.dQ, Payload.dKV}
    assert bundled[8] == bundled[16] == bundled[32] == everything
    # with one head of dim 64, padding would add 28 bytes to the 132 of O, and 24 to the 136 of dO
    assert bundled[4] == (everything if head_dim == 128 else everything - {Payload.O, Payload.dO})


def keys_of_bundles(step):
    """Return the keys of a step's messages and buffers whose rows are shared by several payloads."""
    messages = [("send", step.sends), ("receive", step.receives)]
    return {(name, i) for name, some in messages for i, (_, message) in enumerate(some) if message.bundle} | {
        key for _, some in messages for _, message in some for key in message.bundle
    }


CASES = {
    "uneven heads": (6, 2, "float64"),
    "one key/value head": (4, 1, "float64"),
    "a key/value head of two ranks": (8, 2, "float64"),
    "single precision": (8, 4, "float32"),
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("strategy", ["ulysses", "usp"])
@pytest.mark.parametrize("case", CASES)
def test_results_equal_the_oracle_whatever_shares_a_row(case, strategy, policy):
    heads, kv_heads, dtype = CASES[case]
    # two Ulysses groups in a ring of two
    options = dict(ulysses=2) if strategy == "usp" else None
    for layout in ("zigzag", "from_chunks"):
        shape = dict(heads=heads, kv_heads=kv_heads, head_dim=8, backward=policy, dtype=dtype, options=options)
        mask = Mask.documents(LENGTHS)
        plan = make_plan(mask, layouts(LENGTHS, 4)[layout], strategy=strategy, **shape)
        inputs = random_inputs(sum(LENGTHS), heads, kv_heads, 8)
        # results are sums over at most eight heads and two hundred keys, so their rounding errors stay small
        assert_close(run_all_ranks(plan, inputs), dense(mask, inputs), 1e-11 if dtype == "float64" else 2e-5)


def test_rows_that_are_packed_are_not_copied_to_the_arena_before():
    # messages with the only KV head also contain some query heads in each row
    shape = dict(heads=8, kv_heads=1, head_dim=8, dtype="bfloat16", backward="refetch-home")
    plan = make_plan(Mask.documents(LENGTHS), layouts(LENGTHS, 4)["zigzag"], strategy="ulysses", **shape)
    for program in (lower(plan, rank, lambda mask: None) for rank in range(4)):
        (step,) = (step for step in program.forward if any(payload == Payload.KV for payload, _ in step.sends))
        assert all(message.bundle for _, message in step.sends) and [
            len(packed.parts) for packed in step.packed_sends
        ] == [2]
        # a rank copies its own rows only to where other ranks' rows arrive, never in order to send them
        assert all(key.step == 0 for key, _ in step.own_copies)


def test_row_sums_are_made_where_do_is_copied_unless_a_kernel_reads_it_in_place():
    is_copied = {}
    for strategy in ("ulysses", "usp", "ring", "allgather"):
        plan = plan_of(strategy, [8192] * 8, 64, 8)
        is_copied[strategy] = lower(plan, 1, lambda mask: None).sums_where_copied
        _, backward, _ = layer_call(plan, 1)
        assert ("row_products" in backward.launches) != is_copied[strategy]
        assert ("copy_rows_with_products" in backward.launches) == is_copied[strategy]
    assert is_copied == {"ulysses": True, "usp": True, "ring": False, "allgather": False}
