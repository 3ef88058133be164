"""Messages that carry several tensors: their number, and that all results stay right."""

import collections

import pytest
import torch
from cases import LENGTHS, layouts, masks
from meta_run import MetaBackend, layer_call
from oracle import assert_close, dense, random_inputs, run_all_ranks
from test_budgets import packed, plan_of

from distattn.ir.mask import Mask
from distattn.ir.plan import POLICIES, Payload
from distattn.parallel.make_plan import make_plan
from distattn.parallel.runtime.program import lower
from distattn.parallel.runtime.row_bundles import RowFormat
from distattn.parallel.runtime.transport import Packet


def test_tensors_of_rows_are_seen_in_their_own_dtypes():
    rows = RowFormat.of([(4, ((8, "bfloat16"), (None, "float32")))])
    message = torch.empty(3, rows.numbers, dtype=torch.bfloat16)
    o, lse = Packet(0, Payload.O, message, ((Payload.O, 80),), rows).tensors()
    assert (o.dtype, o.shape, lse.dtype, lse.shape) == (torch.bfloat16, (3, 32), torch.float32, (3, 4))
    o.fill_(1.0)
    # its low half is a NaN of bfloat16
    lse.copy_(torch.tensor(0x3F807FC1, dtype=torch.int32).view(torch.float32))
    assert not message.isfinite().all() and o.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("strategy", ["ulysses", "usp"])
def test_a_rank_sends_at_most_four_messages_to_each_peer_and_pass(strategy, policy, monkeypatch):
    sent = []
    send = MetaBackend.send
    monkeypatch.setattr(MetaBackend, "send", lambda self, x, peer, tag: (sent.append(peer), send(self, x, peer, tag)))
    for lengths in (packed(65536), [8192] * 8):
        sent.clear()
        # two segments of every peer's tokens, two steps with messages, two passes
        layer_call(plan_of(strategy, lengths, 64, 8, backward=policy), 1)
        assert len(set(sent)) == 7 and max(collections.Counter(sent).values()) <= 2 * 4


def test_both_ends_find_the_same_bundles():
    # uneven heads, one key/value head for several ranks, and a rank without tokens
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


def test_a_row_has_no_gaps_and_one_number_tensors_lie_last():
    row = RowFormat.of([(3, ((8, "bfloat16"), (None, "float32"))), (1, ((4, "float32"),))])
    (outputs, numbers), (gradients,) = row.tensors
    assert (outputs.first, gradients.first, numbers.first) == (0, 48 // 4, 64 // 4)
    assert (row.dtype, row.numbers) == ("bfloat16", 76 // 2)
    assert numbers.dtype == torch.float32 and numbers.width is None


def test_tensors_of_bundles_are_aligned_and_none_of_what_is_sent_is_padding():
    # heads of a rank: two, one with a number for each that fills no sixteen bytes, and four
    for heads in (8, 4, 16):
        shape = dict(heads=heads, kv_heads=4, head_dim=8, dtype="bfloat16", comm_dtype="bfloat16")
        plan = make_plan(masks()["documents"], layouts(LENGTHS, 4)["zigzag"], strategy="ulysses", **shape)
        bundled = set()
        for program in (lower(plan, rank, lambda mask: None) for rank in range(4)):
            for payload, message in (entry for step in (*program.forward, *program.backward) for entry in step.sends):
                assert sum(bytes for _, bytes in message.row_bytes) % 16 == 0
                bundled |= {payload} if message.bundle else set()
        assert {Payload.Q, Payload.KV, Payload.dKV} <= bundled
        assert (Payload.O in bundled) == (heads == 16) and (Payload.dO in bundled) == (heads > 4)


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
        # numbers of at most eight heads, summed over two hundred keys
        assert_close(run_all_ranks(plan, inputs), dense(mask, inputs), 1e-11 if dtype == "float64" else 2e-5)


def test_rows_that_are_packed_are_not_copied_to_the_arena_before():
    # one key/value head: its messages carry all heads, in rows with some query heads
    shape = dict(heads=8, kv_heads=1, head_dim=8, dtype="bfloat16", backward="refetch-home")
    plan = make_plan(Mask.documents(LENGTHS), layouts(LENGTHS, 4)["zigzag"], strategy="ulysses", **shape)
    for program in (lower(plan, rank, lambda mask: None) for rank in range(4)):
        (step,) = (step for step in program.forward if any(payload == Payload.KV for payload, _ in step.sends))
        assert all(message.bundle for _, message in step.sends) and [
            len(packed.parts) for packed in step.packed_sends
        ] == [2]
        # own rows are copied only to where other ranks' rows arrive, not for sending
        assert all(key.step == 0 for key, _ in step.own_copies)
