"""Streams of other libraries are packed as they come, and can resume if their own state allows it."""

import copy
import io
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.batch.packed_batch import PackedBatch
from distattn.data.streaming.streams import StreamLoader
from distattn.ir.errors import DistattnError

SETTINGS = {"context": 64, "packs_per_step": 4, "window": 8}


def documents(count=400, seed=0, longest=200):
    """Return documents that can be identified by their first two ids. Some are longer than a pack, and some are empty."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.lognormal(2.5, 1.2, count).astype(int), longest)
    return [[number, 1000 + number, *rng.integers(0, 99, length)][:length] for number, length in enumerate(lengths)]


class Stateful:
    """A stream like a StatefulDataLoader or Hugging Face's IterableDataset: iterating advances its state."""

    def __init__(self, items):
        self.items_, self.position, self.read = items, 0, 0

    def __iter__(self):
        while self.position < len(self.items_):
            self.position += 1
            self.read += 1
            yield self.items_[self.position - 1]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class TellsLate(Stateful):
    """A stream like Hugging Face's datasets: a loaded state takes effect at the next iteration, and a finished stream
    starts over.
    """

    def load_state_dict(self, state):
        self.loaded = state["position"] % len(self.items_)

    def __iter__(self):
        self.position = getattr(self, "loaded", 0)
        return super().__iter__()


class Counted:
    """A stream like mosaicml-streaming's StreamingDataset: the reader counts the samples."""

    def __init__(self, items, replication=None):
        self.items_, self.begin, self.read, self.replication = items, 0, 0, replication

    def __iter__(self):
        for item in self.items_[self.begin :]:
            self.read += 1
            yield item

    def __len__(self):
        return len(self.items_)

    def __getitem__(self, number):
        raise AssertionError("a StreamingDataset has an order of its own")

    def state_dict(self, num_samples, from_beginning):
        return {"epoch": 0, "sample_in_epoch": num_samples + (0 if from_beginning else self.begin)}

    def load_state_dict(self, state):
        self.begin = state["sample_in_epoch"]


class Plain:
    """A stream that can only be iterated."""

    def __init__(self, items):
        self.items_ = items

    def __iter__(self):
        return iter(self.items_)


KINDS = {"list": list, "plain": Plain, "stateful": Stateful, "tells late": TellsLate, "counted": Counted}


def flat(steps):
    """Return the contents of steps in a comparable form."""
    return [
        [(batch["document_lengths"], batch["input_ids"].tolist(), batch["shift_labels"].tolist()) for batch in step]
        for step in steps
    ]


def pieces_of(steps):
    read = []
    for batch in itertools.chain.from_iterable(steps):
        read += torch.split(batch["input_ids"][0], batch["document_lengths"])
    return read


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 40), max_size=60),
    st.integers(1, 17),
    st.integers(1, 4),
    st.integers(1, 9),
    st.none() | st.integers(1, 3),
)
def test_every_token_is_in_one_pack_and_packs_keep_their_limits(lengths, context, packs, window, most):
    stream = [np.arange(length) + 50 * number for number, length in enumerate(lengths)]
    steps = list(StreamLoader(stream, context=context, packs_per_step=packs, window=window, max_documents=most))
    for batch in itertools.chain.from_iterable(steps):
        assert 0 < batch["input_ids"].shape[1] == sum(batch["document_lengths"]) <= context
        assert most is None or len(batch["document_lengths"]) <= most
        assert PackedBatch.of(batch).lengths == tuple(batch["document_lengths"])
    assert all(len(step) == packs for step in steps[:-1]) and all(0 < len(step) <= packs for step in steps[-1:])
    read = sorted(token for piece in pieces_of(steps) for token in piece.tolist())
    assert read == np.concatenate([[], *stream]).tolist()
    # only documents longer than a pack are cut
    assert len(pieces_of(steps)) == sum(-(-length // context) for length in lengths)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
def test_resuming_after_any_step_continues_as_if_uninterrupted(kind):
    make = lambda: KINDS[kind](documents())  # noqa: E731
    whole = flat(StreamLoader(make(), **SETTINGS))
    assert len(whole) > 20
    for done in range(len(whole) + 1):
        first = StreamLoader(make(), **SETTINGS)
        before = list(itertools.islice(first, done))
        state = io.BytesIO()
        torch.save(first.state_dict(), state)
        state.seek(0)
        second = StreamLoader(make(), **SETTINGS)
        second.load_state_dict(torch.load(state, weights_only=True))
        assert second.step == done
        # saving right after loading gives the same state
        assert str(second.state_dict()) == str(first.state_dict())
        assert flat(before) + flat(second) == whole


def test_resuming_reads_only_the_windows_documents_again_where_the_stream_has_a_state():
    first = StreamLoader(Stateful(documents()), **SETTINGS)
    for _ in range(20):
        next(first)
    stream = Stateful(documents())
    second = StreamLoader(stream, **SETTINGS)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    next(second)
    assert stream.read < 60


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_shares_together_have_the_same_packs_and_their_number_may_change(size):
    whole = flat(StreamLoader(documents(), **SETTINGS))
    ones = [StreamLoader(documents(), **SETTINGS, rank=rank, size=4) for rank in range(4)]
    seen = [sum(shares, []) for shares in zip(*(flat(itertools.islice(loader, 7)) for loader in ones), strict=True)]
    others = [StreamLoader(documents(), **SETTINGS, rank=rank, size=size) for rank in range(size)]
    for other in others:
        other.load_state_dict(ones[-1].state_dict())
    seen += [sum(shares, []) for shares in zip(*map(flat, others), strict=True)]
    assert [sorted(map(str, step)) for step in seen] == [sorted(map(str, step)) for step in whole]


def test_packs_are_filled_and_steps_are_not_sorted_by_length():
    stream = [
        np.zeros(length)
        for length in np.minimum(np.random.default_rng(4).lognormal(4.5, 1.3, 20_000).astype(int), 9000)
    ]
    stream = [document.astype(int) for document in stream]
    steps = list(StreamLoader(stream, context=4096, packs_per_step=8, window=64))[:-1]
    tokens = [batch["input_ids"].shape[1] for step in steps for batch in step]
    assert sum(tokens) / len(tokens) / 4096 > 0.99
    longest = [max(batch["document_lengths"]) for step in steps[:8] for batch in step]
    # a pack's longest document hardly correlates with the pack's position in the window
    assert abs(np.corrcoef(longest, np.arange(64))[0, 1]) < 0.5


@pytest.mark.parametrize(
    "wrap",
    [
        lambda ids: np.array(ids, np.uint16),
        lambda ids: torch.tensor(ids, dtype=torch.int64),
        lambda ids: {"input_ids": ids},
        lambda ids: {
            "input_ids": torch.tensor(ids, dtype=torch.int32),
            "attention_mask": torch.ones(len(ids))[: len(ids)].int(),
        },
        lambda ids: [ids],
        lambda ids: ({"input_ids": np.array(ids, np.int64)},),
        lambda ids: {"input_ids": [ids, []]},
        lambda ids: {
            "input_ids": torch.tensor([[0, 0, *ids]]),
            "attention_mask": torch.tensor([[0, 0] + [1] * len(ids)]),
        },
    ],
)
def test_documents_and_batches_of_any_shape_are_understood(wrap):
    items = [ids for ids in documents(60) if ids]
    assert flat(StreamLoader([wrap(ids) for ids in items], **SETTINGS)) == flat(StreamLoader(items, **SETTINGS))


def test_batches_are_as_their_documents_one_by_one():
    items = documents(64)
    batched = [items[first : first + 8] for first in range(0, 64, 8)]
    settings = {**SETTINGS, "window": 1000}
    assert flat(StreamLoader(Stateful(batched), **settings)) == flat(StreamLoader(items, **settings))


@pytest.mark.parametrize("masked", [False, True])
def test_a_label_is_the_next_token_of_the_document_also_where_it_is_cut_and_carried(masked):
    """Use consecutive token ids, so that each id identifies its label. Every third label is masked."""
    lengths = [min(len(ids), 150) for ids in documents(200)]
    sequences = [np.arange(1000 * number, 1000 * number + length) for number, length in enumerate(lengths)]
    ends = {int(ids[-1]) for ids in sequences if len(ids)}
    items = [{"input_ids": ids, "labels": np.where(ids % 3, ids, -100)} if masked else ids for ids in sequences]
    settings = {**SETTINGS, "context": 40, "window": 4}
    loader = StreamLoader(Stateful(items), **settings)
    first = list(itertools.islice(loader, 5))
    state = loader.state_dict()
    assert state["carried_lengths"]
    again = StreamLoader(Stateful(items), **settings)
    again.load_state_dict(state)
    rest = list(again)
    assert flat(loader) == flat(rest)
    pairs = [
        pair
        for batch in itertools.chain.from_iterable(first + rest)
        for pair in zip(batch["input_ids"][0].tolist(), batch["shift_labels"][0].tolist(), strict=True)
    ]
    assert len(pairs) == sum(lengths) and max(lengths) > 120
    for token, label in pairs:
        assert label == (-100 if token in ends or masked and (token + 1) % 3 == 0 else token + 1)


def test_text_is_tokenized():
    texts = [{"text": "abc"}, {"text": ""}, {"text": "de"}]
    ((batch,),) = StreamLoader(texts, **SETTINGS, field="text", tokenizer=lambda text: list(text.encode()))
    assert sorted(batch["input_ids"].flatten().tolist()) == [97, 98, 99, 100, 101]
    assert list(StreamLoader(["abc"], **SETTINGS, tokenizer=lambda text: [1, 2]))[0][0]["document_lengths"] == [2]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ([3, -1], "has the token id -1; ids are 0 to 2,147,483,647"),
        ([1 << 31], "has the token id 2147483648"),
        ([0.5, 1], r"has token ids that are float64 \(2,\); whole numbers"),
        ([True], r"has token ids that are bool"),
        ([1 << 70], "has token ids that are a list; whole numbers"),
        (None, "has token ids that are a NoneType"),
        ("text", "is text; give a tokenizer"),
        (b"bytes", "has token ids that are"),
        (np.zeros((2, 2, 2), int), r"has token ids that are int64 \(2, 2, 2\)"),
        ({"tokens": [1]}, "has no 'input_ids', but 'tokens'; name its field"),
        ({}, "has no 'input_ids', but nothing"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "has labels, unlike those before it"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "has 2 token ids and 1 of attention_mask"),
        ({"input_ids": [[1, 2], [3]], "labels": [[1]]}, "is of a batch with 2 rows and 1 of labels"),
    ],
)
def test_an_invalid_document_is_refused_by_its_number(wrong, message):
    # an empty document counts too
    stream = [[1, 2], [], [[3], [4, 5]], wrong]
    with pytest.raises(DistattnError, match=f"document 4 of the stream {message}"):
        list(StreamLoader(stream, **SETTINGS))


def test_wrong_labels_are_refused():
    with pytest.raises(DistattnError, match="document 1 of the stream has 2 token ids and 1 of labels"):
        list(StreamLoader([{"input_ids": [1], "labels": [1]}, {"input_ids": [1, 2], "labels": [1]}], **SETTINGS))
    with pytest.raises(DistattnError, match="document 0 of the stream has the label -7; labels are token ids, or -100"):
        list(StreamLoader([{"input_ids": [1], "labels": [-7]}], **SETTINGS))


@pytest.mark.parametrize(
    "more, message",
    [
        ({"context": 0}, "context is 0; it must be at least 1"),
        ({"max_documents": 0}, "max_documents is 0"),
        ({"rank": 4, "size": 4}, "rank 4 of 4 shares"),
        ({"size": 5}, "a step has 4 packs, too few for 5 shares"),
        ({"stream": {"input_ids": [1]}}, "a stream must be an iterable of documents, not a dict"),
        ({"stream": 3}, "a stream must be an iterable of documents, not a int"),
    ],
)
def test_impossible_arguments_are_refused(more, message):
    with pytest.raises(DistattnError, match=message):
        StreamLoader(**{"stream": [], **SETTINGS, **more})


def test_states_that_do_not_fit_are_refused():
    first = StreamLoader(Plain(documents()), **SETTINGS)
    for _ in range(9):
        next(first)
    state = first.state_dict()
    with pytest.raises(DistattnError, match="this loader has begun"):
        first.load_state_dict(state)
    with pytest.raises(DistattnError, match="context is 32, but the state is of a run with 64: the packs would differ"):
        StreamLoader(Plain([]), **{**SETTINGS, "context": 32}).load_state_dict(state)
    with pytest.raises(DistattnError, match="the state of a StreamLoader has stream, .*, not step, plan"):
        StreamLoader(Plain([]), **SETTINGS).load_state_dict({"step": 1, "plan": ""})
    shorter = StreamLoader(Plain(documents()[:5]), **SETTINGS)
    shorter.load_state_dict(state)
    with pytest.raises(
        DistattnError, match=r"the stream ended after 5 items, but the state is of one with \d+ or more"
    ):
        next(shorter)
    with pytest.raises(DistattnError, match=r"the state is of a stream with \d+ items or more; this one has 5"):
        StreamLoader(documents()[:5], **SETTINGS).load_state_dict(state)


def test_a_stream_that_deals_out_its_samples_itself_is_refused_unless_all_ranks_read_the_same(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(DistattnError, match="deals out its samples to 4 ranks by itself; .*replication=4"):
        StreamLoader(Counted(documents()), **SETTINGS)
    assert len(list(StreamLoader(Counted(documents(), replication=4), **SETTINGS, rank=3, size=4))) > 20


@pytest.mark.parametrize(
    "kind, sentence",
    [
        ("list", "Resuming is exact, and reads only the window's own documents again: the stream has items by number."),
        ("plain", "Resuming reads all earlier items again"),
        ("stateful", "Resuming is as exact as the stream's own state_dict"),
        ("counted", "repeats a few samples"),
    ],
)
def test_guarantees_that_a_stream_cannot_give_are_reported(kind, sentence):
    promises = StreamLoader(KINDS[kind](documents()), **SETTINGS, size=2).promises()
    assert any(sentence in promise for promise in promises) and all(promise.endswith(".") for promise in promises)
    assert "each of the 2 shares reads and packs the whole stream" in promises[0]
