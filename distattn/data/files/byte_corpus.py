"""Text whose bytes are the tokens, as a corpus of indexed files."""

from __future__ import annotations

import numpy as np

from distattn.data.files.corpus import Corpus
from distattn.data.files.indexed_file import IndexedFileWriter
from distattn.data.files.text import TextCorpus, check_text, read_tokens


def byte_corpus(text: TextCorpus, prefix: str, name: str = "text") -> Corpus:
    """Write the documents of text files into PREFIX.bin and PREFIX.idx, and open them.

    Raise DamagedDataError if a file is not text.
    """
    check_text(text)
    with IndexedFileWriter(prefix, np.uint8) as writer:
        for document in text.documents:
            writer.add(read_tokens(document))
    return Corpus.open(name, [prefix])
