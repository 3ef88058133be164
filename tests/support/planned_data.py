"""Small corpora in indexed files, and plans over them. A token's id depends on its document and its position in it."""

from pathlib import Path

import numpy as np

from distattn.data.files.corpus import Corpus
from distattn.data.files.indexed_file import IndexedFileWriter
from distattn.data.packing.make_pack_plan import make_pack_plan
from distattn.data.packing.pack_plan import PackPlan
from distattn.data.packing.pack_rule import PackRule


def document_tokens(document: int, length: int) -> np.ndarray:
    """Return the token ids of a document as an int32 array (length,)."""
    return ((document * 7919 + np.arange(length) * 13) % 50_000).astype(np.int32)


def write_corpus(folder: Path, name: str, lengths: list[list[int]], dtype: str = "int32") -> Corpus:
    """Write a corpus with one file per list of lengths. Documents are numbered across files."""
    prefixes, first = [], 0
    for number, of_file in enumerate(lengths):
        prefix = str(folder / f"{name}-{number}")
        with IndexedFileWriter(prefix, dtype) as writer:
            for document, length in enumerate(of_file, first):
                writer.add(document_tokens(document, length).astype(dtype))
        prefixes.append(prefix)
        first += len(of_file)
    return Corpus.open(name, prefixes)


def write_mask(prefix: str, kind: str, documents: list[np.ndarray]) -> None:
    """Write PREFIX.loss or PREFIX.spans."""
    with IndexedFileWriter(f"{prefix}.{kind}", "uint8" if kind == "loss" else "int32") as writer:
        for document in documents:
            writer.add(np.asarray(document, np.int64).reshape(-1))


def small_plan(folder: Path, corpora: list[Corpus], context: int = 64, packs: int = 16, **more) -> PackPlan:
    """Make a plan for one epoch, or for `steps` steps if given."""
    rule = PackRule(((0, context),), context * packs, **{"window": 64, **more.pop("rule", {})})
    if "steps" not in more:
        more["max_epochs"] = [1.0] * len(corpora)
    return make_pack_plan(folder / "plan.packs", corpora, seed=3, rule=rule, **more)
