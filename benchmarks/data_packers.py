"""How full packs of whole documents are: our plan and torchtitan's two packers on the same documents.

    python benchmarks/data_packers.py [--documents 200000 20000] [--context 32768] [--rivals FOLDER]

The documents are those of `data_loading.py`, which also explains FOLDER. torchtitan's packer for chats fills a sequence
until a document does not fit, and drops documents longer than a sequence. Its packer for images and text searches a
buffer for all documents that fit and emits only almost full sequences, so its buffer of 100 grows. It gets long
documents cut beforehand, as in our plan, and is left out above --most-scanned documents, because its time is quadratic.
Both read the token ids, which our plan does not need.

"utilisation": tokens over capacity of all packs, including the last. "cuts": number of cuts through documents.
"dropped": share of the tokens.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import types
from typing import Any

import numpy as np
import torch
from data_contestants import Case, Contestant, Filled, Ours, import_rival
from data_loading import PeakMemory, in_a_process, print_line, write_corpus
from harness import Unsupported

from distattn.data.files.indexed_file import IndexedFile


def main() -> None:
    """Print one table for each number of documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[200_000, 20_000])
    parser.add_argument("--context", type=int, default=32_768)
    parser.add_argument("--packs", type=int, default=32, help="of a step")
    parser.add_argument("--most-scanned", type=int, default=20_000)
    parser.add_argument("--rivals", help="folder of packages that are not in the environment")
    arguments = parser.parse_args()
    for documents in arguments.documents:
        with tempfile.TemporaryDirectory() as folder:
            case = Case(os.path.join(folder, "corpus"), folder, arguments.context, arguments.packs, 1)
            tokens = write_corpus(case.corpus, documents)
            print_line(f"{documents:,} documents, {tokens:,} tokens, packs of {arguments.context:,}")
            print_line(
                f"{'':24s}{'seconds':>9s}{'CPU s':>9s}{'MB':>7s}{'utilisation':>13s}{'cuts':>7s}{'dropped':>10s}"
            )
            for packer in (Plan(), Greedy(), ScanAndPick(arguments.most_scanned)):
                row = in_a_process(measure, packer, case, arguments.rivals)
                if "left out" in row:
                    print_line(f"{packer.name:24s} left out: {row['left out']}")
                    continue
                print_line(
                    f"{packer.name:24s}{row['seconds']:9.2f}{row['CPU']:9.2f}{row['MB']:7.0f}{row['utilisation']:13.3%}"
                    f"{row['cuts']:7,d}{row['dropped']:10.3%}"
                )


def measure(packer: Contestant, case: Case) -> dict[str, Any]:
    """Pack all documents. Return the seconds, CPU seconds and peak memory, and how full the packs are."""
    peak, began, cpu = PeakMemory(), time.perf_counter(), time.process_time()
    packer.plan(case)
    row = {"seconds": time.perf_counter() - began, "CPU": time.process_time() - cpu, "MB": peak.megabytes()}
    return row | packer.filled(case)._asdict()


class Plan(Ours):
    """Our plan, written to a file."""

    name = "distattn plan"


class Greedy(Contestant):
    """torchtitan's ChatDataset. Each chat is a document's number, which the tokenizer turns into the document's ids."""

    name = "torchtitan, chats"

    def load(self) -> None:
        import_rival("datasets")
        import_rival("torchtitan.hf_datasets.text_datasets")

    def plan(self, case: Case) -> None:
        import datasets
        from torchtitan.hf_datasets.text_datasets import ChatDataset

        file = IndexedFile.open(case.corpus)

        def encode(text: str, add_bos: bool, add_eos: bool) -> list[int]:
            return file.read(int(text), 0, int(file.sequence_lengths[int(text)])).tolist() if text else []

        tokenizer = types.SimpleNamespace(
            eos_id=0,
            encode=encode,
            apply_chat_template=lambda messages, **_: "".join(message["content"] for message in messages),
        )
        rows = datasets.Dataset.from_dict({"number": list(range(file.documents))})
        question = {"role": "user", "content": ""}
        chats = ChatDataset(
            rows,
            tokenizer,
            lambda sample: [question, {"role": "assistant", "content": str(sample["number"])}],
            seq_len=case.context,
        )
        self._sequences = sum(1 for _ in chats)

    def filled(self, case: Case) -> Filled:
        # a document's last token is only a label
        lengths = IndexedFile.open(case.corpus).document_lengths - 1
        kept = lengths[lengths <= case.context].sum()
        return Filled(kept / (self._sequences * case.context), 0, 1 - kept / lengths.sum())


class ScanAndPick(Contestant):
    """torchtitan's MMSamplePacker."""

    name = "torchtitan, scan and pick"

    def __init__(self, most_documents: int) -> None:
        """Create a packer that is unsupported for more documents than `most_documents`."""
        self._most = most_documents

    def load(self) -> None:
        import_rival("torchtitan.hf_datasets.multimodal.utils.packing")

    def plan(self, case: Case) -> None:
        from torchtitan.hf_datasets.multimodal.utils.packing import MMSamplePacker

        if IndexedFile.open(case.corpus).documents > self._most:
            raise Unsupported(f"quadratic, {self._most:,} documents at most")
        packer = MMSamplePacker(case.context, batch_size=1)
        self._packs, self._tokens = 0, 0
        for length in _pieces(case).tolist():
            ids = torch.zeros(length, dtype=torch.int64)
            packer.add_sample({"input_ids": ids, "labels": ids, "positions": ids})
            self._take(packer)
        packer.flush()
        self._take(packer)

    def filled(self, case: Case) -> Filled:
        pieces = _pieces(case)
        assert self._tokens == pieces.sum(), "tokens are lost or repeated"
        documents = IndexedFile.open(case.corpus).documents
        return Filled(self._tokens / (self._packs * case.context), len(pieces) - documents)

    def _take(self, packer: Any) -> None:
        while packer.has_batch_ready():
            for pack in packer.get_next_batch():
                self._packs, self._tokens = self._packs + 1, self._tokens + len(pack["input_ids"])


def _pieces(case: Case) -> np.ndarray:
    """Return the lengths of the documents' pieces after cutting at the context length, int64 (pieces,)."""
    whole, rest = np.divmod(IndexedFile.open(case.corpus).document_lengths, case.context)
    pieces = np.stack([whole * 0 + case.context, rest], 1)
    return np.repeat(pieces.reshape(-1), np.stack([whole, rest > 0], 1).reshape(-1))


if __name__ == "__main__":
    sys.exit(main())
