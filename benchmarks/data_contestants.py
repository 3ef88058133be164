"""The contestants of `data_loading.py`: our pack plan, and the loaders of Megatron, torchtitan, mosaicml-streaming and litdata.

All read the same documents as sequences of the same length, in the loading process itself, without workers. Rivals get
their best conditions: their own format on the local disk, and token ids instead of text. The two that pack only when
data is written get sequences concatenated and cut beforehand.
"""

from __future__ import annotations

import functools
import importlib.machinery
import itertools
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import Unsupported

from distattn.data.files.corpus import Corpus
from distattn.data.files.indexed_file import IndexedFile
from distattn.data.loader import PackLoader
from distattn.data.packing.make_pack_plan import make_pack_plan
from distattn.data.packing.pack_plan import PackPlan
from distattn.data.packing.pack_rule import PackRule
from distattn.data.planned_batch import PlannedBatch
from distattn.ir.layout import Layout

SEED = 1
TOKEN = np.uint16
END_OF_DOCUMENT = 0
VOCABULARY = 65_000


class Case(NamedTuple):
    """A setting: the prefix of the indexed file, the folder for the contestants' files, and the sizes.

    A step has `packs` packs of `context` tokens, each shared by `cp` ranks.
    """

    corpus: str
    folder: str
    context: int
    packs: int
    cp: int

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)


class Filled(NamedTuple):
    """How full sequences are: tokens over capacity, the number of cuts through documents, and the fraction of tokens
    left out."""

    utilisation: float
    cuts: int
    dropped: float = 0.0


class Contestant:
    """A loader: its preparation before a run, and the sequences that it yields from any step on."""

    name = ""
    planned = True

    def load(self) -> None:
        """Import the loader's packages. Raise Unsupported with the reason if that fails."""

    def convert(self, case: Case) -> None:
        """Write the documents in the loader's own format, unless it reads the indexed file."""

    def plan(self, case: Case) -> None:
        """Create the plan or index that the loader needs once before a run."""

    def filled(self, case: Case) -> Filled:
        """Return how full the sequences are."""
        return concatenated(case)

    def sequences(self, case: Case, state: Any = None) -> Iterator[np.ndarray]:
        """Yield the token ids of each sequence, int64 (T,), from the start or from a saved state."""
        raise NotImplementedError

    def state(self, case: Case, step: int) -> Any:
        """Return the state before a step. By default, read all sequences before it and return `saved()`."""
        for _ in itertools.islice(self.sequences(case), step * case.packs):
            pass
        return self.saved()

    def saved(self) -> Any:
        """Return the state after the sequences read so far."""
        raise NotImplementedError


class Ours(Contestant):
    """Our loader, which yields one rank's part of each pack, zigzag over cp ranks."""

    name = "distattn, a rank's part"
    _plan = "plan.packs"

    def plan(self, case: Case) -> None:
        rule = PackRule(context=((0, case.context),), tokens_per_step=case.packs * case.context)
        make_pack_plan(case.path(self._plan), [self._corpus(case)], seed=SEED, rule=rule, max_epochs=[1.0])

    def filled(self, case: Case) -> Filled:
        plan, corpus = PackPlan.open(case.path(self._plan)), self._corpus(case)
        assert plan.tokens == corpus.tokens, "tokens are lost or repeated"
        room = sum(len(plan.step(step).ends) for step in range(plan.steps)) * case.context
        return Filled(plan.tokens / room, plan.pieces - corpus.documents)

    def sequences(self, case: Case, state: Any = None) -> Iterator[np.ndarray]:
        loader = PackLoader(case.path(self._plan), [self._corpus(case)], rank=0, size=1)
        if state:
            loader.load_state_dict(state)
        for batch in itertools.chain.from_iterable(loader):
            yield batch.local_shard(self._layout(case, batch), 0)["input_ids"][0].numpy()

    def state(self, case: Case, step: int) -> Any:
        return {"step": step, "plan": PackPlan.open(case.path(self._plan)).digest}

    def _layout(self, case: Case, batch: PlannedBatch) -> Layout:
        return Layout.zigzag(batch.lengths, case.cp)

    def _corpus(self, case: Case) -> Corpus:
        return Corpus.open("documents", [case.corpus])


class OursUnchecked(Ours):
    """Our loader without token digests: only the requested bytes are read, and nothing is checked."""

    name = "distattn, no digests"
    _plan = "unchecked.packs"

    def convert(self, case: Case) -> None:
        for suffix in (".bin", ".idx"):
            os.symlink(case.corpus + suffix, case.path("unchecked" + suffix))

    def _corpus(self, case: Case) -> Corpus:
        return Corpus.open("documents", [case.path("unchecked")])


class OursWhole(Ours):
    """Our loader with entire packs, as the other loaders yield them."""

    name = "distattn, whole packs"
    _plan = "whole.packs"

    def _layout(self, case: Case, batch: PlannedBatch) -> Layout:
        return Layout.zigzag(batch.lengths, 1)


class Megatron(Contestant):
    """GPTDataset of megatron-core: shuffled documents are concatenated and cut into shuffled samples. State: a sample count."""

    name = "Megatron GPTDataset"

    def load(self) -> None:
        import_rival("megatron.core.datasets.gpt_dataset")
        import_rival("megatron.core.datasets.blended_megatron_dataset_builder")

    def plan(self, case: Case) -> None:
        self._dataset(case)

    def filled(self, case: Case) -> Filled:
        dataset = self._dataset(case)
        used = (len(dataset.sample_index) - 1) * case.context
        tokens = IndexedFile.open(case.corpus).tokens
        return Filled(1.0, int((dataset.sample_index[:, 1] > 0).sum()), max(0.0, 1 - used / tokens))

    def sequences(self, case: Case, state: Any = None) -> Iterator[np.ndarray]:
        dataset = self._dataset(case)
        for sample in range(state or 0, len(dataset)):
            yield dataset[sample]["tokens"].numpy()

    def state(self, case: Case, step: int) -> Any:
        return step * case.packs

    def _dataset(self, case: Case) -> Any:
        gpt = sys.modules["megatron.core.datasets.gpt_dataset"]
        builder = sys.modules["megatron.core.datasets.blended_megatron_dataset_builder"]
        tokenizer = types.SimpleNamespace(
            vocab_size=VOCABULARY, eod=END_OF_DOCUMENT, pad=-1, unique_identifiers={"class": "ids"}
        )
        config = gpt.GPTDatasetConfig(
            random_seed=SEED,
            sequence_length=case.context,
            blend=([case.corpus], None),
            split="1,0,0",
            path_to_cache=case.path("megatron"),
            tokenizer=tokenizer,
            # positions restart where documents start
            reset_position_ids=True,
            reset_attention_mask=False,
            eod_mask_loss=True,
            create_attention_mask=False,
        )
        built = builder.BlendedMegatronDatasetBuilder(gpt.GPTDataset, [None] * 3, lambda: True, config).build()
        return built[0]


class Torchtitan(Contestant):
    """torchtitan's HuggingFaceTextDataset and loader: documents in order, concatenated and cut. State: buffers and a count."""

    name = "torchtitan text dataset"
    planned = False

    def load(self) -> None:
        import_rival("datasets")
        import_rival("torchtitan.hf_datasets.text_datasets")

    def convert(self, case: Case) -> None:
        import datasets
        import pyarrow as arrow

        ends = np.cumsum([0, *IndexedFile.open(case.corpus).document_lengths])
        texts = arrow.ListArray.from_arrays(arrow.array(ends, arrow.int32()), arrow.array(_tokens(case)))
        dataset = datasets.Dataset(datasets.table.InMemoryTable(arrow.table({"text": texts})))
        dataset.save_to_disk(case.path("hf"))

    def sequences(self, case: Case, state: Any = None) -> Iterator[np.ndarray]:
        import datasets
        from torchtitan.hf_datasets import DatasetConfig, text_datasets

        text_datasets.DATASETS["ids"] = DatasetConfig(
            path=case.path("hf"),
            loader=lambda path: datasets.load_from_disk(path).with_format("numpy"),
            sample_processor=lambda sample: sample["text"],
        )
        # no tokenizer is needed, because the documents already are token ids
        tokenizer = types.SimpleNamespace(encode=lambda ids, add_bos, add_eos: ids.tolist())
        config = text_datasets.HuggingFaceTextDataLoader.Config(dataset="ids", infinite=False)
        self._loader = text_datasets.HuggingFaceTextDataLoader(
            config, dp_world_size=1, dp_rank=0, tokenizer=tokenizer, seq_len=case.context, local_batch_size=1
        )
        if state:
            self._loader.load_state_dict(state)
        for inputs, _ in self._loader:
            yield inputs["input"][0].numpy()

    def saved(self) -> Any:
        return self._loader.state_dict()


class Streaming(Contestant):
    """StreamingDataset of mosaicml-streaming, with sequences cut when the data was written. State: a sample count."""

    name = "mosaicml-streaming"
    planned = False

    def load(self) -> None:
        # replace torchvision, which only runs with the torch it was built for: only streaming's image classes need it
        for name in (
            "torchvision",
            "torchvision.datasets",
            "torchvision.transforms",
            "torchvision.transforms.functional",
        ):
            stand_in = types.ModuleType(name)
            stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None)
            sys.modules[name] = stand_in
        sys.modules["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]
        sys.modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]
        import_rival("streaming")

    def convert(self, case: Case) -> None:
        from streaming import MDSWriter

        with MDSWriter(out=case.path("mds"), columns={"tokens": "ndarray:uint16"}) as writer:
            for tokens in cut_sequences(case):
                writer.write({"tokens": tokens})

    def sequences(self, case: Case, state: Any = None) -> Iterator[np.ndarray]:
        from streaming import StreamingDataLoader, StreamingDataset

        dataset = StreamingDataset(local=case.path("mds"), shuffle=True, shuffle_seed=SEED, batch_size=1)
        self._loader = StreamingDataLoader(dataset, batch_size=1, collate_fn=_stacked)
        if state:
            self._loader.load_state_dict(state)
        for batch in self._loader:
            yield batch["tokens"][0].numpy()

    def saved(self) -> Any:
        return self._loader.state_dict()


class Litdata(Contestant):
    """litdata's StreamingDataset with its TokensLoader: shuffled blocks of tokens. State: a sample count."""

    name = "litdata"
    planned = False

    def load(self) -> None:
        import_rival("litdata")

    def convert(self, case: Case) -> None:
        import litdata

        documents = IndexedFile.open(case.corpus).documents
        litdata.optimize(
            fn=functools.partial(_documents, case.corpus),
            inputs=list(range(0, documents, _PART_DOCUMENTS)),
            output_dir=case.path("litdata"),
            # litdata's documentation requires complete blocks
            chunk_size=case.context * max(1, (1 << 25) // case.context),
            item_loader=litdata.TokensLoader(block_size=case.context),
            num_workers=1,
            verbose=False,
        )

    def sequences(self, case: Case, state: Any = None) -> Iterator[np.ndarray]:
        import litdata

        loader = litdata.TokensLoader(block_size=case.context)
        dataset = litdata.StreamingDataset(case.path("litdata"), item_loader=loader, shuffle=True, drop_last=True)
        self._loader = litdata.StreamingDataLoader(dataset, batch_size=1, num_workers=0)
        if state:
            self._loader.load_state_dict(state)
        for batch in self._loader:
            yield batch[0].to(torch.int64).numpy()

    def saved(self) -> Any:
        return self._loader.state_dict()


CONTESTANTS: dict[str, Contestant] = {
    contestant.name: contestant
    for contestant in (Ours(), OursUnchecked(), OursWhole(), Megatron(), Torchtitan(), Streaming(), Litdata())
}
_PART_DOCUMENTS = 1000


def concatenated(case: Case) -> Filled:
    """Return how full sequences are if documents are concatenated and cut: all sequences are full, and the remainder is
    dropped."""
    ends = np.cumsum(IndexedFile.open(case.corpus).document_lengths)
    count = int(ends[-1]) // case.context
    borders = np.arange(1, count + 1) * case.context
    return Filled(1.0, int((~np.isin(borders, ends)).sum()), 1 - count * case.context / int(ends[-1]))


def cut_sequences(case: Case) -> Iterator[np.ndarray]:
    """Yield the sequences of `concatenated`, uint16 (context,), from the file, in which documents are stored end to end."""
    tokens = _tokens(case)
    for first in range(0, len(tokens) - case.context + 1, case.context):
        yield np.array(tokens[first : first + case.context])


def import_rival(name: str) -> None:
    """Import a module. Raise Unsupported with the reason if that fails."""
    try:
        __import__(name)
    except Exception as error:
        raise Unsupported(f"{Path(name).name} cannot be imported: {type(error).__name__}: {error}") from None


def _tokens(case: Case) -> np.ndarray:
    return np.memmap(f"{case.corpus}.bin", TOKEN, "r")


def _stacked(samples: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    return {"tokens": torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))}


def _documents(corpus: str, first: int) -> Iterator[torch.Tensor]:
    file = IndexedFile.open(corpus)
    for document in range(first, min(first + _PART_DOCUMENTS, file.documents)):
        yield torch.from_numpy(file.read(document, 0, int(file.sequence_lengths[document])))
