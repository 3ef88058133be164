"""Losses by position and corpus match a loop over tokens, on any number of ranks and any layout."""

import pickle
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.distributed as dist
from planned_data import small_plan, write_corpus
from processes import run_on_ranks
from small import build

import distattn as da
from distattn.data.files.corpus import Corpus
from distattn.data.loader import PackLoader
from distattn.data.packing.pack_plan import PackPlan
from distattn.ir.layout import Layout
from distattn.training.reporting.loss_by_position import CorpusLoss, LossByPosition, token_losses


def by_hand(losses, labels, positions, corpora, first, last):
    kept = [
        loss
        for loss, label, position in zip(losses, labels, positions, strict=True)
        if label != -100 and first <= position <= last and np.isfinite(loss)
    ]
    return len(kept), sum(kept)


@pytest.mark.parametrize("context", [1, 2, 3, 8, 9, 100])
def test_buckets_are_powers_of_two_and_hold_every_token_once(context):
    generator = torch.Generator().manual_seed(context)
    losses = LossByPosition(context, ["a", "b"])
    seen = [[], [], [], []]
    for _ in range(3):
        count = 400
        columns = (
            torch.rand(count, generator=generator),
            torch.where(torch.rand(count, generator=generator) < 0.3, -100, 7),
            torch.randint(0, context, (count,), generator=generator),
            torch.randint(-1, 2, (count,), generator=generator),
        )
        losses.add(*(column[None] for column in columns))
        for kept, column in zip(seen, columns, strict=True):
            kept += column.tolist()
    table = losses.reduce()
    assert table.by_position[0].first == 0 and table.by_position[-1].last >= context - 1
    for before, after in zip(table.by_position, table.by_position[1:], strict=False):
        assert after.first == before.last + 1 and after.first & (after.first - 1) == 0
    for bucket in table.by_position:
        count, total = by_hand(*seen, bucket.first, bucket.last)
        assert bucket.tokens == count and (bucket.loss or 0) * count == pytest.approx(total)
    for number, corpus in enumerate(table.by_corpus):
        kept = [x for x, label, _, c in zip(*seen, strict=True) if label != -100 and c == number]
        assert corpus.tokens == len(kept) and corpus.loss == pytest.approx(sum(kept) / len(kept))
    count, total = by_hand(*seen, 0, context)
    assert table.tokens == count and table.loss == pytest.approx(total / count) and not table.not_finite
    losses.reset()
    assert losses.reduce().loss is None and losses.reduce().tokens == 0


def test_positions_beyond_the_context_and_nan_losses_are_reported():
    losses = LossByPosition(4)
    losses.add(torch.tensor([1.0, 2, float("nan"), float("inf")]), torch.zeros(4), torch.tensor([3, 900, 1, 0]))
    table = losses.reduce()
    assert table.by_position[-1].tokens == 2 and table.by_position[-1].loss == 1.5
    assert table.not_finite == 2 and table.tokens == 2 and table.by_corpus == ()


def test_without_corpus_numbers_tokens_count_by_position_only():
    losses = LossByPosition(4, ["a"])
    losses.add(torch.ones(3), torch.zeros(3), torch.arange(3))
    table = losses.reduce()
    assert table.tokens == 3 and table.by_corpus == (CorpusLoss("a", 0, None),)


def planned(folder):
    corpora = [write_corpus(folder, "a", [[30, 5, 61, 2, 18] * 3]), write_corpus(folder, "b", [[1, 44, 64, 90] * 4])]
    return small_plan(folder, corpora, packs=4), corpora


def test_local_batches_give_the_corpus_of_each_token(tmp_path):
    plan, corpora = planned(tmp_path)
    loader = PackLoader(plan, corpora, rank=0, size=1, corpus_ids=True)
    again = pickle.loads(pickle.dumps(loader))
    seen = set()
    for step in range(plan.steps):
        for batch, other, pack in zip(loader.batches(step), again.batches(step), plan.step(step).packs, strict=True):
            whole = np.repeat(pack.corpus.astype(np.int64), pack.lengths)
            for rank in range(3):
                layout = Layout.zigzag(batch.lengths, 3)
                part = batch.local_shard(layout, rank, pad_to=8)
                tokens = layout.tokens(rank)
                padding = part["input_ids"].shape[1] - len(tokens)
                assert part["corpus_ids"][0].tolist() == [*whole[tokens].tolist(), *[-1] * padding]
                assert torch.equal(other.local_shard(layout, rank, pad_to=8)["corpus_ids"], part["corpus_ids"])
                seen |= set(part["corpus_ids"][0].tolist())
    assert seen == {-1, 0, 1}
    (plain, *_) = PackLoader(plan, corpora, rank=0, size=1).batches(0)
    assert "corpus_ids" not in plain.local_shard(Layout.zigzag(plain.lengths, 2), 0)


def _on_ranks(rank, folder, layout):
    plan, corpora = planned_again(folder)
    model = build(torch.float64)
    # all token ids of the corpora are within this vocabulary
    model.resize_token_embeddings(50_000, mean_resizing=False)
    losses = LossByPosition(64, [source.name for source in plan.sources])
    with da.ContextParallel(strategy="ring", layout=layout, pad_to=8) as cp, torch.no_grad():
        loader = PackLoader(plan, corpora, rank=0, size=1, steps=2, corpus_ids=True)
        for micro_batches in cp.steps(loader):
            for local in micro_batches:
                losses.add_batch(token_losses(model, local), local)
        return asdict(losses.reduce(dist.group.WORLD))


def planned_again(folder):
    return PackPlan.open(folder / "plan.packs"), [Corpus.open(name, [str(folder / f"{name}-0")]) for name in ("a", "b")]


def test_the_table_is_the_same_on_any_number_of_ranks_and_layout(tmp_path):
    planned(tmp_path)
    (wanted,) = run_on_ranks(1, _on_ranks, tmp_path, "zigzag")
    assert wanted["tokens"] and all(corpus["tokens"] for corpus in wanted["by_corpus"])
    assert sum(corpus["tokens"] for corpus in wanted["by_corpus"]) == wanted["tokens"]
    for layout in ("zigzag", "document_zigzag"):
        for table in run_on_ranks(2, _on_ranks, tmp_path, layout):
            for kind in ("by_position", "by_corpus"):
                for got, right in zip(table[kind], wanted[kind], strict=True):
                    assert got["tokens"] == right["tokens"] and got["loss"] == pytest.approx(right["loss"], rel=1e-12)
