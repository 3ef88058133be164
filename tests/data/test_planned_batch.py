"""A planned batch has the token ids and labels of its documents, and reads only the requested tokens."""

import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planned_data import document_tokens, write_corpus, write_mask

from distattn.data.files.corpus import Corpus
from distattn.data.files.label_masks import LabelMasks
from distattn.data.packing.pack_plan import Pack
from distattn.data.packing.pack_windows import PIECE
from distattn.data.planned_batch import PlannedBatch
from distattn.data.reading_thread import ReadingThread
from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.ir.layout import Layout

LENGTHS = [[40, 1, 7, 3000], [25, 0, 12]]
# (document, start, length): whole documents, the first and last part of a document that is cut, and a single token
PIECES = [(0, 0, 40), (3, 0, 1000), (6, 0, 12), (3, 1000, 1200), (1, 0, 1), (3, 2200, 800), (4, 0, 25)]


def pack_of(pieces, corpus=0):
    ends = sum(LENGTHS, [])
    rows = [
        (document, start, length, corpus, 0, start + length == ends[document]) for document, start, length in pieces
    ]
    return Pack(np.array(rows, PIECE))


def expected(pieces, allowed=lambda document, tokens: np.ones(len(tokens), bool)):
    """Return the ids and labels of the whole token axis, by definition."""
    lengths, ids, labels = sum(LENGTHS, []), [], []
    for document, start, length in pieces:
        whole = document_tokens(document, lengths[document])
        following = np.append(np.where(allowed(document, whole), whole, -100)[1:], -100)
        ids.append(whole[start : start + length])
        labels.append(following[start : start + length])
    return np.concatenate(ids), np.concatenate(labels)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), "web", LENGTHS)


@settings(deadline=None)
@given(st.permutations(PIECES), st.data())
def test_any_positions_in_any_order_are_read_as_from_the_whole_axis(corpus, pieces, data):
    batch = PlannedBatch(pack_of(pieces), [corpus], "")
    ids, labels = expected(pieces)
    assert batch.tokens == len(ids) and batch.lengths == tuple(length for _, _, length in pieces)
    assert batch.valid_labels == (labels != -100).sum()
    some = st.lists(st.integers(0, batch.tokens - 1), max_size=60)
    strides = st.builds(range, st.integers(0, 99), st.just(batch.tokens), st.sampled_from([1, 2, 7, 1100]))
    tokens = np.array(list(data.draw(some | strides)), np.int64)
    pair = batch.read(tokens)
    assert pair[0].dtype == pair[1].dtype == np.int64
    np.testing.assert_array_equal(pair, (ids[tokens], labels[tokens]))


@pytest.mark.parametrize("layout", [Layout.zigzag, Layout.contiguous])
def test_ranks_read_their_own_tokens_and_one_more_for_each_run(corpus, layout):
    batch = PlannedBatch(pack_of(PIECES), [corpus], "")
    ids, labels = expected(PIECES)
    plan = layout(batch.lengths, 8)
    for rank in range(8):
        before, tokens = batch.bytes_read, plan.tokens(rank)
        np.testing.assert_array_equal(batch.read(tokens), (ids[tokens], labels[tokens]))
        # each of at most two chunks reads one extra token per piece in it
        runs = 2 * (1 + len(PIECES))
        assert 0 <= batch.bytes_read - before - 4 * len(tokens) <= 4 * runs
    assert batch.bytes_read <= 4 * (batch.tokens + 16 + len(PIECES))


def test_a_cut_keeps_the_label_of_its_last_token_and_a_document_has_none_at_its_end(corpus):
    batch = PlannedBatch(pack_of([(3, 0, 1000), (3, 2200, 800)]), [corpus], "")
    whole = document_tokens(3, 3000)
    _, labels = batch.read(np.array([999, 1799]))
    assert labels.tolist() == [whole[1000], -100]
    assert batch.valid_labels == 1000 + 799


def test_lengths_and_labels_are_known_without_any_file_of_the_corpus():
    batch = PlannedBatch(pack_of(PIECES), [], "", masks=[None])
    # tokens 999 and 2199 of document 3 have labels, because their successors are in the same document
    assert batch.valid_labels == sum(length for _, _, length in PIECES) - 5 and not batch.bytes_read


def test_a_token_with_mask_0_is_no_label_and_a_placeholder_neither(tmp_path):
    plain, rng = write_corpus(tmp_path, "web", LENGTHS), np.random.default_rng(1)
    masks = [rng.integers(0, 2, length) for length in LENGTHS[0]]
    spans = [[], [], [[0, 3], [6, 7]], [[5, 90], [90, 100], [999, 1003], [2900, 3000]]]
    write_mask(plain.files[0].prefix, "loss", masks)
    write_mask(plain.files[0].prefix, "spans", spans)
    # the second file has no spans
    corpus = Corpus.open("web", [file.prefix for file in plain.files])

    def allowed(document, tokens):
        out = np.ones(len(tokens), bool)
        if document < 4:
            out &= masks[document] != 0
            for start, end in spans[document]:
                out[start:end] = False
        return out

    pieces = [*PIECES, (2, 0, 7)]
    ids, labels = expected(pieces, allowed)
    batch = PlannedBatch(pack_of(pieces), [corpus], "")
    np.testing.assert_array_equal(batch.read(np.arange(batch.tokens)), (ids, labels))
    backwards = np.arange(batch.tokens)[::-3]
    np.testing.assert_array_equal(batch.read(backwards), (ids[backwards], labels[backwards]))
    assert batch.valid_labels == (labels != -100).sum()


@pytest.mark.parametrize(
    "kind, documents, message",
    [
        ("loss", [[1] * 39, [1] * 2, [1] * 7, [1] * 3000], "loss.idx: document 0 has masks of 39 tokens, but"),
        ("loss", [[1] * 40, [1], [1] * 7], "byte 26: has 3 documents, but .*web-0.idx 4"),
        (
            "loss",
            [[1] * 40, [1], [1] * 7, [1] * 2999],
            "byte 3,047: has masks of 3,047 tokens, but .*web-0.bin has 3,048",
        ),
        ("spans", [[1, 2, 3], [], [], []], r"spans.bin: byte 8: document 0 of 40 tokens has no such span"),
        ("spans", [[1, 2], [0, 2], [], []], r"spans.bin: byte 12: document 1 of 1 tokens has no such span"),
        ("spans", [[2, 2], [], [], []], r"spans.bin: byte 4: document 0"),
        ("spans", [[4, 6, 5, 7], [], [], []], r"spans.bin: byte 8: document 0"),
        ("spans", [[-1, 2], [], [], []], r"spans.bin: byte 0: document 0"),
    ],
)
def test_masks_that_do_not_fit_are_refused_naming_file_and_byte(tmp_path, kind, documents, message):
    corpus = write_corpus(tmp_path, "web", LENGTHS)
    write_mask(corpus.files[0].prefix, kind, documents)
    with pytest.raises(DamagedDataError, match=message):
        _ = PlannedBatch(pack_of([(0, 0, 40), (1, 0, 1), (3, 0, 9)]), [corpus], "").read(np.arange(45))


def test_half_a_mask_is_refused(tmp_path):
    corpus = write_corpus(tmp_path, "web", LENGTHS)
    (tmp_path / "web-1.loss.idx").write_bytes(b"")
    with pytest.raises(DamagedDataError, match="web-1.loss"):
        LabelMasks.open(corpus)


@pytest.mark.parametrize("tokens", [[-1], [3078], [0.5], [[1, 2]], [True]])
def test_positions_that_the_pack_does_not_have_are_refused(corpus, tokens):
    batch = PlannedBatch(pack_of(PIECES), [corpus], "")
    with pytest.raises(DistattnError, match="positions"):
        batch.read(np.array(tokens))


def test_a_plan_that_goes_beyond_a_document_and_an_id_beyond_the_vocabulary_are_refused(corpus):
    with pytest.raises(DistattnError, match="web-0.idx: document 1 has 1 tokens, not 0 to 3"):
        PlannedBatch(pack_of([(1, 0, 2)]), [corpus], "").read(np.arange(2))
    with pytest.raises(DamagedDataError, match=r"web-0.bin: byte [\d,]+: token id \d+ is not below 30,000"):
        PlannedBatch(pack_of(PIECES), [corpus], "", vocabulary=30_000).read(np.arange(2000))


@pytest.mark.parametrize("thread", [None, ReadingThread()], ids=["at once", "thread"])
def test_started_reads_are_returned_and_others_are_read(corpus, thread):
    batch = PlannedBatch(pack_of(PIECES), [corpus], "", thread=thread)
    ids, labels = expected(PIECES)
    mine, other = np.arange(5, 900), np.arange(900, 1300)
    batch.start_reading(mine)
    batch.start_reading(other)
    np.testing.assert_array_equal(batch.read(mine[::2]), (ids[mine[::2]], labels[mine[::2]]))
    for tokens in (other, mine, mine):
        pair = batch.read_tensors(tokens)
        assert all(
            isinstance(tensor, torch.Tensor) and tensor.is_pinned() == torch.cuda.is_available() for tensor in pair
        )
        np.testing.assert_array_equal(pair, (ids[tokens], labels[tokens]))


def test_queued_work_is_done_by_the_thread_that_needs_it():
    thread, release = ReadingThread(), threading.Event()
    slow = thread.start(release.wait)
    assert thread.start(lambda: 5).result() == 5
    release.set()
    assert slow.result()


def test_damage_that_the_thread_finds_is_raised_by_read(tmp_path):
    corpus = write_corpus(tmp_path, "web", LENGTHS)
    path = tmp_path / "web-0.bin"
    content = bytearray(path.read_bytes())
    content[500] ^= 4
    path.write_bytes(content)
    batch = PlannedBatch(pack_of(PIECES), [corpus], "", thread=ReadingThread())
    batch.start_reading(np.arange(10))
    with pytest.raises(DamagedDataError, match=r"web-0.bin: bytes 0 to 12,192 are not what was written"):
        batch.read(np.arange(10))


def test_a_reading_thread_ends_with_the_last_reference_even_while_work_waits():
    before = set(threading.enumerate())
    thread, release, done = ReadingThread(), threading.Event(), []
    thread.start(release.wait)
    thread.start(lambda: done.append(1))
    (running,) = set(threading.enumerate()) - before
    gone = weakref.ref(thread)
    del thread
    gc.collect()
    assert gone() is None
    release.set()
    running.join(60)
    assert not running.is_alive() and done == [1]
