"""documents.jsonl: any step's rows are found without reading the whole file, and those of the last attempt count."""

import json
import os
import random

import pytest

from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.training.reporting.step_documents import append_documents, documents_of_step


def rows_of(step, attempt, rng):
    return [
        {
            "step": step,
            "pack": piece // 3,
            "document": rng.randrange(10**6),
            "try": attempt,
            "file": "x" * rng.randrange(400),
        }
        for piece in range(rng.randrange(1, 30))
    ]


def without_begin(rows):
    return [{name: value for name, value in row.items() if name != "attempt"} for row in rows]


@pytest.mark.parametrize("seed", range(8))
def test_the_last_attempt_that_trained_a_step_counts(tmp_path, seed):
    """Let attempts end anywhere, even within a row, and start at any earlier step or at the next step."""
    rng, path, expected, end = random.Random(seed), tmp_path / "documents.jsonl", {}, 0
    for attempt in range(rng.randrange(1, 6)):
        begin = rng.randrange(end + 1)
        end = begin + rng.randrange(1, 60)
        for step in range(begin, end):
            rows = rows_of(step, attempt, rng)
            append_documents(path, rows)
            expected[step] = rows
        if rng.random() < 0.5:
            # imitate a kill during the write of a step's last row
            cut = rng.randrange(1, 60)
            os.truncate(path, path.stat().st_size - cut)
            expected[end - 1] = None
    for step, rows in expected.items():
        if rows is not None:
            assert without_begin(documents_of_step(path, step)) == rows, step


def test_a_long_file_is_not_read(tmp_path, monkeypatch):
    path, rng = tmp_path / "documents.jsonl", random.Random(0)
    with open(path, "w") as file:
        for step in range(20_000):
            for row in rows_of(step, 0, rng)[:6]:
                file.write(json.dumps(row | {"attempt": 0}) + "\n")
    sizes, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *rest: (part := pread(*rest), sizes.append(len(part)))[0])
    for step in (0, 1, 7_777, 19_999):
        sizes.clear()
        assert {row["step"] for row in documents_of_step(path, step)} == {step}
        # a binary search in 20 MB takes two or three reads of 4 KiB per halving
        assert sum(sizes) < 50 * 4096 < path.stat().st_size / 50
    sizes.clear()
    append_documents(path, rows_of(20_000, 0, rng))
    assert sum(sizes) < 3 * 4096


def test_a_file_that_is_being_written_is_read(tmp_path):
    path = tmp_path / "documents.jsonl"
    for step in range(5):
        append_documents(path, [{"step": step, "pack": 0}])
    with open(path, "a") as file:
        file.write('{"step": 5, "pa')
    assert documents_of_step(path, 4) == [{"step": 4, "pack": 0, "attempt": 0}]
    with pytest.raises(DistattnError, match=r"has no step 5, counted from 0; the last row is of step 4\."):
        documents_of_step(path, 5)


def test_missing_files_and_rows_and_invalid_rows_are_named(tmp_path):
    path = tmp_path / "documents.jsonl"
    with pytest.raises(DistattnError, match=r"documents.jsonl: cannot be read: No such file .* a run that has begun"):
        documents_of_step(path, 0)
    path.touch()
    with pytest.raises(DistattnError, match="has no step 0, counted from 0; there is no row yet"):
        documents_of_step(path, 0)
    for step in range(3):
        append_documents(path, [{"step": step, "pack": 0}])
    content = path.read_bytes()
    for wrong in (content.replace(b'"step": 1', b'"stop": 1'), content.replace(b'{"step": 1', b' "step": 1')):
        path.write_bytes(wrong)
        with pytest.raises(DamagedDataError, match="byte 37: not a row of a step's documents"):
            documents_of_step(path, 1)
    path.write_bytes(content.replace(b'2, "pack": 0, "attempt": 0', b'2, "pack": 0, "attempt": 99999'))
    with pytest.raises(DamagedDataError, match="its attempt begins after it"):
        documents_of_step(path, 1)
