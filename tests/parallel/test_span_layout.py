"""Spans of recurrent layers move to contiguous slices where that is faster, and rows move as the layouts say."""

import numpy as np
import torch

from distattn.batch.local_batch import LocalBatch
from distattn.batch.planner import BatchKey, Planner
from distattn.batch.recurrent_span import recurrent_span
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.parallel.attention_config import AttentionConfig
from distattn.parallel.runtime.communication.relaid_rows import RowMoves

TOKENS = 8192 * 8


def batch_of(layout: Layout, **settings) -> LocalBatch:
    config = AttentionConfig(strategy="ring", **settings)
    lay_out = lambda lengths: (Mask.documents(lengths), layout)  # noqa: E731
    return LocalBatch(Planner(config, None, lay_out), BatchKey((TOKENS,)), 0, False)


def test_many_segments_and_layers_pay_for_a_relayout_and_few_do_not():
    shape = dict(width=2048, heads=32, kv_heads=16, head_dim=128)
    many, few = Layout.block_cyclic((TOKENS,), 8, block=1024), Layout.zigzag((TOKENS,), 8)
    for layout, layers, relaid in ((many, 1, False), (many, 6, True), (few, 6, False)):
        batch = batch_of(layout, cluster="h100-1x8")
        span = recurrent_span(batch, "gated_delta_rule", layers=layers, **shape)
        assert span.is_relaid == relaid and (span.batch is batch) != relaid
    # without known speeds, rows stay in place
    span = recurrent_span(batch_of(many), "gated_delta_rule", layers=6, **shape)
    assert not span.is_relaid and span.enter(x := torch.ones(3, 2)) is x
    # a rank without tokens may be a server, so no rows are moved to it
    blocks = [(at, at + 1024) for at in range(0, TOKENS, 1024)]
    idle = Layout.from_chunks((TOKENS,), [*(blocks[rank::7] for rank in range(7)), []])
    assert not recurrent_span(batch_of(idle, cluster="h100-1x8"), "gated_delta_rule", layers=6, **shape).is_relaid


def test_every_row_goes_to_its_new_owner_and_back():
    lengths = (5, 40, 1, 30)
    here, there = Layout.zigzag(lengths, 4), Layout.from_chunks(lengths, [[(50, 76)], [], [(0, 20)], [(20, 50)]])
    moves = [RowMoves.of(here, there, rank) for rank in range(4)]
    for rank, row_moves in enumerate(moves):
        received = np.full(row_moves.rows, -1)
        for peer, rows in row_moves.receives.items():
            received[rows.numpy()] = here.tokens(peer)[moves[peer].sends[rank].numpy()]
        assert received.tolist() == there.tokens(rank).tolist()
        assert row_moves.reversed().reversed() == row_moves and row_moves.reversed().rows == len(here.tokens(rank))
