"""A plan's file returns what was planned in any order of steps, and a damaged file is refused."""

import hashlib
import json
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from test_best_fit import web_like

from distattn.data.packing import pack_plan_format, pack_plan_writer
from distattn.data.packing.blend import BlendSource, blend_documents
from distattn.data.packing.make_pack_plan import make_pack_plan
from distattn.data.packing.pack_plan import PackPlan
from distattn.data.packing.pack_plan_writer import PackPlanWriter
from distattn.data.packing.pack_rule import PackRule
from distattn.data.packing.pack_windows import PIECE, PackedWindow, plan_windows
from distattn.ir.errors import DamagedDataError, DistattnError


class Lengths:
    """A corpus with known lengths but no tokens."""

    def __init__(self, name, lengths, digest="d1"):
        self.name, self.digest = name, digest
        self.lengths = np.asarray(lengths, np.int32)


RULE = PackRule(context=((0, 4096),), tokens_per_step=8 * 4096, window=64)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    corpora = [Lengths("web", [0, 0, *web_like(3000)]), Lengths("books", web_like(200, seed=1) * 4)]
    path = tmp_path_factory.mktemp("plan") / "run.packs"
    return make_pack_plan(path, corpora, seed=7, rule=RULE, weights=[3.0, 1.0], max_epochs=[1.0, 2.0])


def all_rows(plan):
    return np.concatenate([plan.step(step).rows for step in range(plan.steps)])


def test_a_plan_read_back_is_what_was_planned(plan, tmp_path):
    windows = []

    class Recorded(PackPlanWriter):
        def add(self, window):
            windows.append(window)
            super().add(window)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distattn.data.packing.make_pack_plan.PackPlanWriter", Recorded)
        corpora = [Lengths("web", [0, 0, *web_like(3000)]), Lengths("books", web_like(200, seed=1) * 4)]
        again = make_pack_plan(
            tmp_path / "again", corpora, seed=7, rule=RULE, weights=[3.0, 1.0], max_epochs=[1.0, 2.0]
        )
    assert again.digest == plan.digest
    assert (tmp_path / "again").read_bytes() == Path(plan.path).read_bytes()
    packs = [pack for step in range(plan.steps) for pack in plan.step(step).packs]
    assert [len(plan.step(step).packs) for step in range(plan.steps)] == np.concatenate(
        [window.packs for window in windows]
    ).tolist()
    assert [len(pack.lengths) for pack in packs] == np.concatenate([window.pieces for window in windows]).tolist()
    rows = np.concatenate([window.rows for window in windows])
    assert np.array_equal(np.concatenate([pack.rows for pack in packs]), rows)
    for name in ("corpus", "document", "start", "epoch", "ends_document"):
        assert np.array_equal(np.concatenate([getattr(pack, name) for pack in packs]), rows[name])
    assert [length for pack in packs for length in pack.lengths] == rows["length"].tolist()
    assert all(type(length) is int for length in packs[0].lengths)
    assert (plan.packs, plan.pieces, plan.tokens) == (len(packs), len(rows), sum(pack.tokens for pack in packs))
    assert plan.step(3).tokens == sum(pack.tokens for pack in plan.step(3).packs)
    assert plan.rule == RULE
    assert plan.seed == 7
    assert plan.longest_wait == max(int(window.waited.max()) for window in windows)


def test_a_plan_says_what_it_reads_of_each_corpus(plan):
    rows = all_rows(plan)
    web, books = plan.sources
    assert (web.name, web.documents, web.empty_documents, web.max_epochs) == ("web", 3002, 2, 1.0)
    assert (books.weight, books.digest) == (1.0, "d1")
    for number, source in enumerate(plan.sources):
        mine = rows[rows["corpus"] == number]
        assert source.planned_tokens == mine["length"].sum()
        assert source.planned_documents == (mine["start"] == 0).sum()
        steps = [step for step in range(plan.steps) if (plan.step(step).rows["corpus"] == number).any()]
        assert source.last_step == steps[-1]
    assert (web.epochs, books.epochs) == (1.0, 2.0)


def test_a_document_kept_whole_replaces_several_packs(tmp_path):
    rule = PackRule(context=((0, 4096),), tokens_per_step=8 * 4096, window=64, long_documents="keep")
    lengths = np.minimum(web_like(3000), 8 * 4096)
    plan = make_pack_plan(tmp_path / "plan", [Lengths("web", lengths)], seed=7, rule=rule, max_epochs=[1.0])
    most = 0
    for step in map(plan.step, range(plan.steps)):
        assert sum(step.slots) <= 8
        for pack, slots in zip(step.packs, step.slots, strict=True):
            assert pack.tokens <= slots * 4096
            assert slots == 1 or pack.lengths[0] > (slots - 1) * 4096
            most = max(most, slots)
    assert most == 8
    assert plan.pieces == 3000


def test_a_plan_finds_the_steps_of_a_document(plan):
    step = plan.step(5)
    row = step.rows[np.argmax(step.rows["start"])]
    steps = plan.find(int(row["corpus"]), int(row["document"]))
    assert 5 in steps
    wanted = [
        number
        for number in range(plan.steps)
        for pack in plan.step(number).packs
        if ((pack.document == row["document"]) & (pack.corpus == row["corpus"])).any()
    ]
    assert steps == sorted(set(wanted))


def test_a_plan_of_fewer_steps_is_the_beginning_of_one_with_more(tmp_path):
    corpora = [Lengths("web", web_like(2000)), Lengths("books", web_like(100, seed=1))]
    short, long = (
        make_pack_plan(tmp_path / str(steps), corpora, seed=1, rule=RULE, weights=[1, 1], steps=steps)
        for steps in (21, 400)
    )
    assert (short.steps, long.steps) == (21, 400)
    for step in range(21):
        assert np.array_equal(short.step(step).rows, long.step(step).rows)
        assert np.array_equal(short.step(step).ends, long.step(step).ends)
    # the weights are equal, and the plan continues long after the smaller corpus has been read once
    web, books = long.sources
    assert abs(web.planned_tokens / long.tokens - 0.5) < 0.01
    assert books.epochs > 5


def test_the_plan_never_changes(tmp_path):
    lengths = [(number * 7919) % 5000 for number in range(400)]
    rule = PackRule(
        context=((0, 1024), (20, 4096)),
        tokens_per_step=8192,
        window=16,
        max_documents=6,
        max_cost=0.9,
        level=True,
    )
    corpora = [Lengths("a", lengths), Lengths("b", lengths[::-1][:50])]
    plan = make_pack_plan(tmp_path / "plan", corpora, seed=3, rule=rule, weights=[0.7, 0.3], max_epochs=[1.0, 2.5])
    assert plan.digest == GOLDEN_DIGEST
    # a digest of the packs' content, independent of the file format
    packs = hashlib.sha256()
    for step in map(plan.step, range(plan.steps)):
        packs.update(step.ends.astype("<i8").tobytes())
        for name in ("document", "start", "length", "corpus", "epoch"):
            packs.update(step.rows[name].tobytes())
    assert packs.hexdigest()[:32] == GOLDEN_PACKS


def test_open_and_step_read_a_few_bytes_of_a_large_plan(tmp_path, monkeypatch):
    # 200,000 steps, which take 30 MB of records and index
    window = PackedWindow(
        np.full(200_000, 2),
        np.full(400_000, 4),
        np.zeros(1_600_000, PIECE),
        np.zeros(1_600_000, np.int64),
    )
    with PackPlanWriter(tmp_path / "plan") as writer:
        writer.add(window)
        writer.finish(seed=0, rule=RULE, sources=[], longest_wait=0, ends_with_corpora=True)
    read = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: read.append(size) or pread(file, size, offset))
    with PackPlan.open(tmp_path / "plan") as plan:
        assert sum(read) < 2000
        read.clear()
        assert len(plan.step(123_456).packs) == 2
        # 12 bytes of counts, eight pieces, two offsets and a checksum
        assert sum(read) == 12 + 8 * 16 + 24
        plan.verify()


def test_blocks_are_digested_however_they_are_written(plan, tmp_path, monkeypatch):
    for module in (pack_plan_writer, pack_plan_format):
        monkeypatch.setattr(module, "BLOCK_BYTES", 1000)
    monkeypatch.setattr("distattn.data.packing.pack_plan.BLOCK_BYTES", 1000)
    small = make_pack_plan(tmp_path / "small", [Lengths("web", web_like(500))], seed=0, rule=RULE, max_epochs=[1])
    seen = []
    small.verify(lambda done, total: seen.append((done, total)))
    assert len(seen) > 8
    assert seen[-1][0] == seen[-1][1]
    content = bytearray(Path(small.path).read_bytes())
    content[64 + 3500] ^= 1
    (tmp_path / "small").write_bytes(content)
    with pytest.raises(DamagedDataError, match=r"1,000 bytes are not what was written \(byte 3,064\)"):
        PackPlan.open(small.path).verify()


def read_all(path, digest):
    plan = PackPlan.open(path, digest)
    for step in range(plan.steps):
        assert len(plan.step(step).packs)
    plan.verify()


def test_no_damage_is_silent(plan, tmp_path):
    """Try 1,000 faults: flipped bits, truncations, swapped blocks, zeroed pages and inserted bytes."""
    content = Path(plan.path).read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged"
    for fault in range(1000):
        damaged = bytearray(content)
        kind = fault % 5
        if kind == 0:
            # a hundred of these flips are in the first 64 bytes, which hold the offsets of all sections
            place = int(rng.integers(64 if fault < 500 else len(content)))
            damaged[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del damaged[int(rng.integers(len(content))) :]
        elif kind == 2:
            size = int(rng.choice([8, 16, 512]))
            first, second = (int(x) for x in rng.integers(0, len(content) - size, 2) // 8 * 8)
            damaged[first : first + size], damaged[second : second + size] = (
                content[second : second + size],
                content[first : first + size],
            )
        elif kind == 3:
            first = int(rng.integers(len(content) // 4096)) * 4096
            damaged[first : first + 4096] = bytes(len(damaged[first : first + 4096]))
        else:
            place = int(rng.integers(len(content)))
            damaged[place:place] = bytes(rng.integers(0, 256, int(rng.integers(1, 20)), np.uint8))
        if damaged == content:
            continue
        path.write_bytes(damaged)
        with pytest.raises(DamagedDataError, match=f"{path}: ") as raised:
            read_all(path, plan.digest)
        assert "\n" not in str(raised.value)


def test_a_damaged_step_is_found_when_it_is_read_and_others_are_not_harmed(plan, tmp_path):
    content = bytearray(Path(plan.path).read_bytes())
    with open(plan.path, "rb") as file:
        index = pack_plan_format.read_header(plan.path, file)[1]["index"]
    begin, end = np.frombuffer(content, "<u8", 2, offset=index + 4 * 8).tolist()
    for place in range(begin, end, 7):
        content[place] ^= 4
        (tmp_path / "plan").write_bytes(content)
        damaged = PackPlan.open(tmp_path / "plan", plan.digest)
        assert np.array_equal(damaged.step(3).rows, plan.step(3).rows)
        with pytest.raises(DamagedDataError, match=rf"step 4 is not what was written \(byte {begin:,}\)"):
            damaged.step(4)
        content[place] ^= 4


def test_a_step_in_another_ones_place_is_found(tmp_path):
    """Put a step's record in another step's place. Record, offsets and checksum match, except that the checksum
    includes the step's number.
    """
    window = next(
        plan_windows(RULE, blend_documents([BlendSource("a", 80, 8000, 1.0, 1.0)], [np.full(80, 100, np.int32)], 0), 0)
    )
    twice = PackedWindow(*(np.concatenate([column, column]) for column in window))
    with PackPlanWriter(tmp_path / "plan") as writer:
        writer.add(twice)
        writer.finish(seed=0, rule=RULE, sources=[], longest_wait=0, ends_with_corpora=True)
    content = bytearray((tmp_path / "plan").read_bytes())
    first, second = PackPlan.open(tmp_path / "plan").step(0), PackPlan.open(tmp_path / "plan").step(1)
    assert np.array_equal(first.rows, second.rows)
    with open(tmp_path / "plan", "rb") as file:
        index = pack_plan_format.read_header("plan", file)[1]["index"]
    checksums = index + 3 * 8
    assert content[checksums : checksums + 8] != content[checksums + 8 : checksums + 16]
    content[checksums : checksums + 8] = content[checksums + 8 : checksums + 16]
    (tmp_path / "plan").write_bytes(content)
    with pytest.raises(DamagedDataError, match="step 0 is not what was written"):
        PackPlan.open(tmp_path / "plan").step(0)


def test_a_plan_that_shrinks_while_it_is_open_is_refused(plan, tmp_path):
    path = tmp_path / "plan"
    path.write_bytes(Path(plan.path).read_bytes())
    opened = PackPlan.open(path)
    os.truncate(path, 5000)
    with pytest.raises(DamagedDataError, match="ends at byte"):
        opened.step(opened.steps - 1)


def test_files_that_are_no_plans_of_this_version_are_refused_by_name(plan, tmp_path):
    content = Path(plan.path).read_bytes()
    path = tmp_path / "file"
    header = content[:48]
    newer = header[:8] + (2).to_bytes(4, "little") + header[12:48] + bytes(8)
    newer += pack_plan_format.xxhash.xxh3_64_intdigest(newer).to_bytes(8, "little") + content[64:]
    for written, sentence in [
        (b"", "0 bytes are not a pack plan"),
        (b"PK" * 500, r"is not a pack plan \(byte 0\)"),
        (newer, "version 2, and this distattn reads version 1"),
    ]:
        path.write_bytes(written)
        with pytest.raises(DamagedDataError, match=f"{path}: .*{sentence}"):
            PackPlan.open(path)
    with pytest.raises(DistattnError, match="nothing: cannot be read: No such file"):
        PackPlan.open(tmp_path / "nothing")
    with pytest.raises(DistattnError, match=r"is another plan \(digest .*the one asked for \(abc\)"):
        PackPlan.open(plan.path, "abc")
    for step in (-1, plan.steps):
        with pytest.raises(DistattnError, match=f"there is no step {step}; the plan has steps 0 to {plan.steps - 1}"):
            plan.step(step)


def tokens_of_step(plan, step):
    return plan.step(step).tokens


def test_processes_of_a_loader_get_the_plan(plan):
    copy = pickle.loads(pickle.dumps(plan))
    assert (copy.digest, copy.step(2).tokens) == (plan.digest, plan.step(2).tokens)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(tokens_of_step, (plan, 2)) == plan.step(2).tokens


def test_nothing_is_left_of_a_plan_that_was_not_finished(tmp_path, monkeypatch):
    corpora = [Lengths("web", web_like(2000))]
    path = tmp_path / "plan"

    def kill(steps, tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_pack_plan(path, corpora, seed=1, rule=RULE, max_epochs=[1.0], progress=kill)
    assert os.listdir(tmp_path) == []

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DistattnError, match="plan: cannot be written: No space left on device"):
        make_pack_plan(path, corpora, seed=1, rule=RULE, max_epochs=[1.0])
    assert os.listdir(tmp_path) == []
    with pytest.raises(DistattnError, match="cannot be written: No such file or directory"):
        make_pack_plan(tmp_path / "no" / "plan", corpora, seed=1, rule=RULE, max_epochs=[1.0])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "steps: without them a plan ends when all corpora have ended, and web has no max_epochs"),
        ({"steps": 0}, "steps: 0 is too few"),
        ({"seed": -1}, "seed: -1 is out of range"),
        ({"steps": 100, "max_epochs": [1.0]}, r"all corpora end after \d steps, before 100"),
        ({"max_epochs": [1e-6]}, "all corpora end after 0 steps"),
        ({"weights": [1.0, 2.0]}, "weights: 2 for 1 corpora; give one for each of web"),
        ({"weights": [0.0]}, "corpus web: weight is 0.0"),
        ({"corpora": []}, "a blend of 0 corpora"),
        ({"corpora": [Lengths("web", [])]}, "corpus web: 0 documents"),
        ({"corpora": [Lengths("web", [0, 0])]}, "corpus web: all 2 documents are empty"),
        ({"corpora": [Lengths("web", [5, -3])]}, "corpus web: document 1 has -3 tokens"),
        ({"corpora": [Lengths("web", [1]), Lengths("web", [2])]}, "two are called web"),
        (
            {"corpora": [Lengths("web", [5, 40_000])], "rule": PackRule(((0, 4096),), 32_768, long_documents="keep")},
            "corpus web: document 1 has 40,000 tokens, and a document may have 0 to 32,768, a step's",
        ),
    ],
)
def test_an_impossible_plan_is_refused_by_name(arguments, sentence, tmp_path):
    corpora = arguments.pop("corpora", [Lengths("web", web_like(20))])
    with pytest.raises(DistattnError, match=sentence):
        make_pack_plan(tmp_path / "plan", corpora, **{"seed": 0, "rule": RULE} | arguments)
    assert os.listdir(tmp_path) == []


def test_the_header_is_json_that_others_can_read(plan):
    content = Path(plan.path).read_bytes()
    offset, size = np.frombuffer(content, "<u8", 2, offset=16).tolist()
    header = json.loads(content[offset : offset + size])
    assert header["rule"]["context"] == [[0, 4096]]
    assert [source["name"] for source in header["sources"]] == ["web", "books"]
    # the records follow the documented format too
    begin = int(np.frombuffer(content, "<u8", 1, offset=header["index"])[0])
    packs = int(np.frombuffer(content, "<u4", 1, offset=begin)[0])
    counts = np.frombuffer(content, "<u4", packs, offset=begin + 4)
    first = np.frombuffer(content, "<u4", 3, offset=begin + 4 + 4 * packs)
    row = plan.step(0).packs[0].rows[0]
    assert counts.tolist() == [len(pack.lengths) for pack in plan.step(0).packs]
    assert first.tolist() == [row["document"], row["start"], row["length"] + (row["ends_document"] << 31)]
    assert row["length"] < 1 << 31


def test_windows_do_not_depend_on_how_documents_come():
    lengths = [web_like(800).astype(np.int32), web_like(300, seed=1).astype(np.int32)]
    sources = [BlendSource(str(i), len(x), int(x.sum()), 1.0, 1.5) for i, x in enumerate(lengths)]
    rows = [
        np.concatenate([w.rows for w in plan_windows(RULE, blend_documents(sources, lengths, 0, block_documents=b), 0)])
        for b in (5, 77, None)
    ]
    assert rows[0].tobytes() == rows[1].tobytes() == rows[2].tobytes()


GOLDEN_DIGEST = "8d0a599b457edeae9668e5bb55e60e81"
GOLDEN_PACKS = "84703e0c7b1c6d6163616f0a63c0663d"
