"""Real streams of torchdata, Hugging Face's datasets and mosaicml-streaming resume exactly. They are skipped if not
installed.
"""

import itertools

import numpy as np
import pytest
from test_stream_loader import SETTINGS, documents, flat, pieces_of

from distattn.data.streaming.streams import StreamLoader


def package(name, shown):
    # an installed package may still fail to import, such as mosaicml-streaming without a matching torchvision
    try:
        return pytest.importorskip(name, reason=f"{shown} is not installed", exc_type=ImportError)
    except RuntimeError as error:
        return pytest.skip(f"{shown} does not import: {error}")


def nonempty(count=200):
    return [{"input_ids": ids} for ids in documents(count) if ids]


def assert_resumes(make, every=3):
    """Assert that a loader of `make()` yields all tokens, and can resume exactly at every `every`-th step."""
    whole = list(StreamLoader(make(), **SETTINGS))
    assert len(whole) > 8
    for done in range(0, len(whole) + 1, every):
        first = StreamLoader(make(), **SETTINGS)
        before = list(itertools.islice(first, done))
        state = first.state_dict()
        second = StreamLoader(make(), **SETTINGS)
        second.load_state_dict(state)
        assert flat(before) + flat(second) == flat(whole)
    assert sum(map(len, pieces_of(whole))) == sum(len(document["input_ids"]) for document in nonempty())


@pytest.mark.parametrize("workers", [0, 2])
def test_torchdatas_stateful_loader(workers):
    loaders = package("torchdata.stateful_dataloader", "torchdata")

    def make():
        return loaders.StatefulDataLoader(nonempty(), batch_size=8, collate_fn=list, num_workers=workers)

    # worker processes take a while to start
    assert_resumes(make, every=9 if workers else 3)


@pytest.mark.parametrize("kind", ["by number", "iterable", "shards"])
def test_hugging_faces_datasets(kind):
    datasets = package("datasets", "datasets")
    whole = datasets.Dataset.from_list(nonempty())
    make = {
        "by number": lambda: whole,
        "iterable": whole.to_iterable_dataset,
        "shards": lambda: whole.to_iterable_dataset(3),
    }
    assert_resumes(make[kind])


def test_mosaicmls_streaming_dataset(tmp_path):
    streaming = package("streaming", "mosaicml-streaming")
    columns = {"input_ids": "ndarray:int32"}
    with streaming.MDSWriter(out=str(tmp_path), columns=columns, size_limit=4000) as writer:
        for document in nonempty():
            writer.write({"input_ids": np.array(document["input_ids"], np.int32)})

    def make():
        # otherwise the dataset would find the shared memory left behind by an earlier dataset of this process
        streaming.base.util.clean_stale_shared_memory()
        return streaming.StreamingDataset(local=str(tmp_path), batch_size=4, shuffle=True, shuffle_seed=3)

    assert_resumes(make)
