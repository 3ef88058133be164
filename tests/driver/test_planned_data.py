"""Packs of a plan on real ranks: each rank reads only its own tokens, and damage on one rank ends all ranks with an
error that names it.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from planned_data import small_plan, write_corpus
from processes import run_on_ranks, run_survivors

import distattn as da
from distattn.data.files.corpus import Corpus
from distattn.data.loader import PackLoader
from distattn.data.packing.pack_plan import PackPlan
from distattn.ir.errors import DamagedDataError, LostRankError

# int32 tokens fill eight blocks of 16 KiB, each with its own digest
TOKENS = 32_768
STEPS = 6


@pytest.fixture
def folder(tmp_path):
    corpora = [write_corpus(tmp_path, "web", [[TOKENS] * STEPS])]
    small_plan(tmp_path, corpora, context=TOKENS, packs=1)
    return tmp_path


def opened(folder: Path):
    # open the files in each process, because an open file remembers which blocks have been checked
    return PackPlan.open(folder / "plan.packs"), [Corpus.open("web", [str(folder / "web-0")])]


def sharded(rank, folder, layout, digests):
    """Return (token ids, labels and positions of each step, bytes read)."""
    plan, corpora = opened(folder)
    if not digests:
        corpora = [Corpus.open("web", [str(folder / "web-0")], check_tokens=False)]
    with da.ContextParallel(strategy="ring", layout=layout) as cp:
        loader = PackLoader(plan, corpora, rank=cp.data_parallel_rank, size=cp.data_parallel_size)
        batches = [loader.batches(step) for step in range(plan.steps)]
        out = [
            torch.cat([local[name] for name in ("input_ids", "labels", "position_ids")])
            for (local,) in cp.steps(loader)
        ]
        return out, sum(batch.bytes_read for (batch,) in batches)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_ranks_read_their_own_tokens_and_together_all_tokens(folder, layout):
    plan, corpora = opened(folder)
    results = run_on_ranks(4, sharded, folder, layout, False)
    for step in range(STEPS):
        parts = torch.cat([out[step] for out, _ in results], 1)
        ids, labels, positions = parts[:, parts[2].argsort()]
        row = plan.step(step).packs[0].rows[0]
        wanted = torch.from_numpy(corpora[0].read(int(row["document"]), 0, TOKENS).astype(np.int64))
        assert torch.equal(ids, wanted) and torch.equal(positions, torch.arange(TOKENS))
        assert torch.equal(labels[:-1], wanted[1:]) and labels[-1] == -100
    # 4 bytes per token, plus one more token per segment for its last label, except at the document's end
    segments = 4 if layout == "contiguous" else 7
    assert sum(size for _, size in results) == 4 * STEPS * (TOKENS + segments - 1)


CONTEXT = 64


@pytest.fixture
def kept(tmp_path):
    """Write documents three times as long as the context, which are kept whole, among shorter documents."""
    corpora = [write_corpus(tmp_path, "web", [[3 * CONTEXT, 30, 20, 64, 11, 40, 9, 64, 2] * 3])]
    small_plan(tmp_path, corpora, context=CONTEXT, packs=6, rule={"long_documents": "keep"})
    return tmp_path


def kept_run(rank, folder, settings):
    """Return this rank's share and, for each of its steps and micro-batches, (tokens of each document, this rank's (id,
    label) pairs).
    """
    plan, corpora = opened(folder)
    out = []
    with da.ContextParallel(strategy="ring", layout="zigzag", **settings) as cp:
        loader = PackLoader(plan, corpora, rank=cp.data_parallel_rank, size=cp.data_parallel_size)
        packs = [[batch.lengths for batch in loader.batches(step)] for step in range(plan.steps)]
        for lengths, micro_batches in zip(packs, cp.steps(loader), strict=True):
            pairs = [
                torch.stack([micro_batch["input_ids"][0], micro_batch["labels"][0]], 1).tolist()
                for micro_batch in micro_batches
            ]
            # a share with fewer packs than the other takes part with empty batches
            assert all(pair == [0, -100] for of_micro_batch in pairs[len(lengths) :] for pair in of_micro_batch)
            out.append(list(zip(lengths, pairs, strict=False)))
    return cp.data_parallel_rank, out


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("ranks", "settings"),
    [(2, {}), (4, {}), (4, {"data": "per_rank", "context_parallel_size": 2})],
    ids=["2 ranks", "4 ranks", "2 shares of 2 ranks"],
)
def test_the_ranks_of_a_share_split_a_document_that_is_kept_whole(kept, ranks, settings):
    """Check that the ranks together have all tokens and labels, and each rank the same number of tokens."""
    plan, corpora = opened(kept)
    results = run_on_ranks(ranks, kept_run, kept, settings)
    whole = 0
    for share in {share for share, _ in results}:
        of_ranks = [out for number, out in results if number == share]
        loader = PackLoader(plan, corpora, rank=share, size=len({number for number, _ in results}))
        for step in range(plan.steps):
            for number, batch in enumerate(loader.batches(step)):
                ids, labels = batch.read_tensors(np.arange(batch.tokens))
                parts = [out[step][number] for out in of_ranks]
                assert {lengths for lengths, _ in parts} == {batch.lengths}
                pairs = [pair for _, own_pairs in parts for pair in own_pairs if pair != [0, -100]]
                assert sorted(pairs) == sorted(
                    pair for pair in torch.stack([ids, labels], 1).tolist() if pair != [0, -100]
                )
                if 3 * CONTEXT in batch.lengths:
                    whole += 1
                    assert (
                        len({len(own_pairs) for _, own_pairs in parts}) == 1
                        and len(parts[0][1]) <= 3 * CONTEXT / len(parts) + 2
                    )
                    # no label inside the document is lost
                    begin = sum(batch.lengths[: batch.lengths.index(3 * CONTEXT)])
                    assert torch.equal(labels[begin : begin + 3 * CONTEXT - 1], ids[begin + 1 : begin + 3 * CONTEXT])
    assert whole == 3


def trained(rank, folder):
    """Return the error that ends this rank's loop. If the data is damaged, write the step and the error to a file."""
    plan, corpora = opened(folder)
    steps = 0
    try:
        with da.ContextParallel(strategy="ring", layout="contiguous", timeout=20.0) as cp:
            for _ in cp.steps(PackLoader(plan, corpora, rank=0, size=1)):
                cp.mean_loss([torch.zeros(())])
                steps += 1
    except DamagedDataError as error:
        (folder / "said").write_text(f"{rank} in step {steps}: {error}")
    except LostRankError as error:
        return str(error)


def test_a_file_that_is_damaged_where_one_rank_reads_ends_all_ranks(folder):
    plan, _ = opened(folder)
    document = int(plan.step(3).packs[0].rows[0]["document"])
    # damage the last block, which only rank 3 reads
    place = 4 * (TOKENS * document + TOKENS - 5)
    with open(folder / "web-0.bin", "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    others = run_survivors(4, 3, trained, folder)
    message = (folder / "said").read_text()
    assert message.startswith("3 in step 3: ") and "web-0.bin" in message and "byte" in message
    assert all(error and "rank 3" in error for error in others.values()), others
