"""A plan's steps are dealt out to any number of ranks in an order that never changes, and the state is one integer."""

import gc
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from planned_data import small_plan, write_corpus

import distattn
from distattn.data.files.corpus import Corpus
from distattn.data.loader import PackLoader
from distattn.data.pack_dataset import PackDataset
from distattn.data.packing.pack_plan import PackPlan, StepPacks
from distattn.data.packing.pack_windows import PIECE
from distattn.data.packing.shares import deal_packs
from distattn.ir.errors import DamagedDataError, DistattnError

PACKS = 16
SCRIPT = Path(__file__).parents[1] / "support" / "launching" / "loading_process.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(5)
    lengths = [(rng.lognormal(3, 1, count).astype(int) + 1).tolist() for count in (300, 900)]
    corpora = [
        write_corpus(folder, name, [documents]) for name, documents in zip(("web", "books"), lengths, strict=True)
    ]
    small_plan(folder, corpora, packs=PACKS, steps=25)
    return folder


@pytest.fixture(scope="module")
def corpora(folder):
    return [Corpus.open(name, [str(folder / f"{name}-0")]) for name in ("books", "web")]


@pytest.fixture(scope="module")
def plan(folder):
    return PackPlan.open(folder / "plan.packs")


def shares_of(plan, corpora, size, **more):
    return [PackLoader(plan, corpora, rank=rank, size=size, **more) for rank in range(size)]


def digests(step_of_shares):
    return Counter(batch.digest for share in step_of_shares for batch in share)


@pytest.fixture(scope="module")
def reference(plan, corpora):
    """Return, for each step, a dict from each batch's digest to the sums of its ids and labels."""
    steps = []
    for batches, *others in zip(*shares_of(plan, corpora, 1, ahead=0), strict=True):
        assert not others
        sums = {batch.digest: tuple(map(int, map(np.sum, batch.read(np.arange(batch.tokens))))) for batch in batches}
        assert len(sums) == PACKS
        steps.append(sums)
    assert len(steps) == plan.steps
    return steps


@pytest.mark.parametrize("size", range(1, 17))
def test_all_shares_of_a_step_together_have_the_same_whatever_their_number(plan, corpora, reference, size):
    steps = list(zip(*shares_of(plan, corpora, size, ahead=size % 4), strict=True))
    assert [set(digests(step)) for step in steps] == [set(sums) for sums in reference]
    for number, step in enumerate(steps):
        counts = [len(share) for share in step]
        assert sum(counts) == PACKS and max(counts) - min(counts) <= 1
        order = [batch.digest for batch in PackLoader(plan, corpora, rank=0, size=1).batches(number)]
        assert all(sorted(share, key=lambda batch: order.index(batch.digest)) == share for share in step)


@pytest.mark.parametrize("seed", range(8))
def test_the_number_of_shares_and_what_is_read_ahead_may_change_in_mid_run(plan, corpora, reference, seed):
    chance, state, seen = random.Random(seed), {"step": 0, "plan": plan.digest}, []
    while len(seen) < plan.steps:
        loaders = shares_of(plan, corpora, chance.randint(1, 16), ahead=chance.randint(0, 3))
        for loader in loaders:
            loader.load_state_dict(state)
        for _, step in zip(range(chance.randint(1, 9)), zip(*loaders, strict=True), strict=False):
            assert {loader.step for loader in loaders} == {len(seen) + 1}
            seen.append(set(digests(step)))
        state = loaders[0].state_dict()
        assert state == {"step": len(seen), "plan": plan.digest}
    assert seen == [set(sums) for sums in reference]


@pytest.mark.full
def test_a_run_that_is_killed_and_resumed_with_other_shares_reads_what_an_unbroken_one_does(
    folder, reference, tmp_path
):
    chance = random.Random(11)
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    environment = {**os.environ, "PYTHONPATH": str(Path(distattn.__file__).parents[1])}
    for batches in (61, 90, 100, 1000):
        arguments = [tmp_path, chance.randint(1, PACKS), chance.randint(0, 3), batches]
        command = [sys.executable, SCRIPT, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == (0 if batches == 1000 else -signal.SIGKILL), done.stderr
    seen = [{} for _ in reference]
    for line in (tmp_path / "journal").read_text().splitlines():
        step, digest, ids, labels = line.split()
        # a step that was interrupted is read again and must be identical
        assert seen[int(step)].setdefault(digest, (int(ids), int(labels))) == (int(ids), int(labels))
    assert seen == reference


def test_every_share_knows_the_lengths_of_all_shares_of_all_steps(plan, corpora):
    loaders = shares_of(plan, corpora, 5)
    told = [loaders[3].lengths(step) for step in range(plan.steps)]
    for step, shares in enumerate(zip(*loaders, strict=True)):
        assert told[step] == [[batch.lengths for batch in share] for share in shares]
        assert sum(sum(lengths) for share in told[step] for lengths in share) == plan.step(step).tokens
        assert digests(loaders[0].shares(step)) == digests(shares)


def test_iterating_yields_the_batches_that_were_prepared(plan, corpora):
    loader = PackLoader(plan, corpora, rank=1, size=4, ahead=1)
    prepared = loader.batches(3)
    for batch in prepared:
        batch.start_reading(np.arange(0, batch.tokens, 2))
    steps = list(loader)
    assert all(batch is other for batch, other in zip(steps[3], prepared, strict=True))
    assert sum(batch.bytes_read for batch in steps[4]) == 0


def test_labels_of_all_steps_are_counted_without_reading_tokens(plan, corpora):
    for batches in PackLoader(plan, corpora, rank=0, size=1, steps=3):
        counted = [batch.valid_labels for batch in batches]
        assert not any(batch.bytes_read for batch in batches)
        assert counted == [int((batch.read(np.arange(batch.tokens))[1] != -100).sum()) for batch in batches]


def step_of(slots, context=10):
    rows = np.zeros(len(slots), PIECE)
    rows["length"] = [context * count - 1 for count in slots]
    return StepPacks(0, context, rows, np.arange(1, len(slots) + 1))


def test_a_pack_that_replaces_several_counts_as_several():
    assert deal_packs(step_of([1, 1, 1, 1, 1]), 2) == [[0, 2, 4], [1, 3]]
    assert deal_packs(step_of([1, 4, 1, 1, 1]), 2) == [[1], [0, 2, 3, 4]]
    assert deal_packs(step_of([1, 2, 3, 1, 1]), 3) == [[2], [1, 4], [0, 3]]
    assert all(deal_packs(step_of([8, 1, 1]), 3))


def test_documents_that_are_kept_whole_are_dealt_out_whole(tmp_path):
    lengths = [200, 90, 350, *[20] * 400]
    corpus = write_corpus(tmp_path, "web", [lengths])
    plan = small_plan(tmp_path, [corpus], rule={"long_documents": "keep"})
    loaders = shares_of(plan, [corpus], 3, steps=plan.steps - 1)
    seen = Counter(
        length for step in zip(*loaders, strict=True) for share in step for batch in share for length in batch.lengths
    )
    assert seen[200] == seen[90] == seen[350] == 1


@pytest.mark.parametrize(
    "more, message",
    [
        ({"rank": 2, "size": 2}, "rank 2 of 2 shares"),
        (
            {"rank": 0, "size": 17},
            "step 0 has 16 packs, too few for 17 shares; end before step 0 .steps., use at most 16 shares",
        ),
        ({"size": 5, "even": True}, "16 packs of step 0 cannot be dealt out evenly to 5 shares"),
        ({"start_step": 26}, "start_step 26: .*plan.packs has 25 steps"),
        ({"start_step": 20, "steps": 6}, "steps: 6 from step 20 on, but .* has 25 steps"),
        ({"ahead": -1}, "ahead is -1"),
    ],
)
def test_requests_outside_the_plan_are_refused(plan, corpora, more, message):
    with pytest.raises(DistattnError, match=message):
        PackLoader(plan, corpora, **{"rank": 0, "size": 2, **more})


def test_a_last_step_with_too_few_packs_is_refused_before_the_first_and_may_be_left_out(tmp_path):
    corpus = write_corpus(tmp_path, "web", [[60] * 34])
    plan = small_plan(tmp_path, [corpus])
    assert [len(plan.step(step).packs) for step in range(plan.steps)] == [16, 16, 2]
    assert plan.full_steps == 2
    with pytest.raises(
        DistattnError,
        match=r"step 2 has 2 packs, too few for 3 shares; leave out step 2, the plan's last and not a full one "
        r"\(drop_last=True\), use at most 2 shares",
    ):
        PackLoader(plan, [corpus], rank=0, size=3)
    with pytest.raises(DistattnError, match="too few for 4 shares"):
        PackLoader(plan, [corpus], rank=0, size=4, even=True)
    with pytest.raises(DistattnError, match=r"start_step 3: .* has 2 full steps"):
        PackLoader(plan, [corpus], rank=0, size=4, drop_last=True, start_step=3)
    with pytest.raises(DistattnError, match=r"steps: 3 from step 0 on, but .* has 2 full steps"):
        PackLoader(plan, [corpus], rank=0, size=4, drop_last=True, steps=3)
    assert len(list(PackLoader(plan, [corpus], rank=0, size=4, even=True, steps=2))) == 2
    assert len(list(PackLoader(plan, [corpus], rank=0, size=2, even=True))) == 3
    # drop_last keeps the same two steps for any number of ranks
    for size in (1, 2, 3, 16):
        assert PackLoader(plan, [corpus], rank=0, size=size, drop_last=True).end == 2


def test_leaving_out_the_last_step_leaves_out_no_full_one(tmp_path):
    full = small_plan(tmp_path, [write_corpus(tmp_path, "web", [[60] * 32])])
    assert full.full_steps == full.steps == 2
    assert PackLoader(full, [Corpus.open("web", [str(tmp_path / "web-0")])], rank=0, size=4, drop_last=True).end == 2
    little = small_plan(tmp_path, [corpus := write_corpus(tmp_path, "few", [[60] * 3])])
    assert (little.steps, little.full_steps) == (1, 0)
    with pytest.raises(DistattnError, match="has one step, which is not full, and drop_last leaves it out"):
        PackLoader(little, [corpus], rank=0, size=1, drop_last=True)
    # a document that replaces several packs fills a step by itself
    kept = small_plan(tmp_path, [write_corpus(tmp_path, "long", [[16 * 64]])], rule={"long_documents": "keep"})
    assert (kept.steps, kept.full_steps, len(kept.step(0).packs)) == (1, 1, 1)


def test_other_corpora_than_the_plans_are_refused_and_their_order_does_not_matter(folder, plan, corpora, tmp_path):
    books, web = corpora
    batches_0, batches_1 = (
        PackLoader(plan, order, rank=0, size=1).batches(0)[0] for order in ([books, web], [web, books])
    )
    np.testing.assert_array_equal(batches_0.read(np.arange(40)), batches_1.read(np.arange(40)))
    with pytest.raises(DistattnError, match="was made of the corpora web, books; give these, not web"):
        PackLoader(plan, [web], rank=0, size=1)
    changed = write_corpus(tmp_path, "web", [[5, 6]])
    with pytest.raises(DistattnError, match=r"another corpus web \(digest \w+\) than that of .*web-0"):
        PackLoader(plan, [changed, books], rank=0, size=1)


@pytest.mark.parametrize(
    "state, message",
    [
        (
            {"step": 0, "plan": "feed"},
            r"plan.packs: is another plan \(digest \w+\) than the one the state is of \(feed\)",
        ),
        ({"step": 26}, "a loader's state has step and plan, not step"),
        ({"step": 26, "plan": None}, "the state's next step is 26, but this loader ends after step 25"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(plan, corpora, state, message):
    loader = PackLoader(plan, corpora, rank=0, size=1)
    if state.get("plan", "") is None:
        state["plan"] = plan.digest
    with pytest.raises(DistattnError, match=message):
        loader.load_state_dict(state)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_a_damaged_step_is_refused_when_it_comes_and_the_steps_before_it_are_read(folder, corpora, tmp_path, ahead):
    content = bytearray((folder / "plan.packs").read_bytes())
    content[len(content) // 3] ^= 1
    (tmp_path / "plan.packs").write_bytes(content)
    loader = PackLoader(tmp_path / "plan.packs", corpora, rank=0, size=4, ahead=ahead)
    with pytest.raises(
        DamagedDataError, match=r"plan.packs: step \d+ is not what was written \(byte [\d,]+\)"
    ) as caught:
        for _ in loader:
            pass
    assert f"step {loader.step} " in str(caught.value) and loader.step > 0


def test_a_loader_that_is_dropped_ends_its_thread(plan, corpora):
    before = set(threading.enumerate())
    loader = PackLoader(plan, corpora, rank=0, size=4)
    batches = next(iter(loader))
    for batch in batches:
        batch.start_reading(np.arange(batch.tokens))
    (mine,) = set(threading.enumerate()) - before
    assert mine.daemon
    del loader, batch, batches
    gc.collect()
    mine.join(60)
    assert not mine.is_alive()


def test_a_process_can_end_while_its_loader_is_working(folder):
    code = f"""
import threading, numpy as np
from distattn.data.files.corpus import Corpus
from distattn.data.loader import PackLoader
from distattn.data.pack_dataset import PackDataset
corpora = [Corpus.open(name, [r"{folder}/" + name + "-0"]) for name in ("web", "books")]
loader = PackLoader(r"{folder / "plan.packs"}", corpora, rank=0, size=1, ahead=3)
loader._thread.start(threading.Event().wait)
for batch in next(iter(loader)):
    batch.start_reading(np.arange(batch.tokens))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(distattn.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and not done.stderr


def test_a_forked_process_reads_what_was_begun_before(plan, corpora):
    loader = PackLoader(plan, corpora, rank=0, size=1)
    release = threading.Event()
    loader._thread.start(release.wait)
    (batch, *_) = loader.batches(0)
    batch.start_reading(np.arange(batch.tokens))
    child = os.fork()
    if not child:
        ids, _ = batch.read(np.arange(batch.tokens))
        batch.start_reading(np.arange(7))
        os._exit(0 if len(ids) == batch.tokens and len(batch.read(np.arange(7))[0]) == 7 else 1)
    assert os.waitpid(child, 0)[1] == 0
    release.set()


def test_a_loader_and_a_dataset_go_to_other_processes(plan, corpora, reference):
    loader = PackLoader(plan, corpora, rank=1, size=4, start_step=3, steps=5)
    next(iter(loader))
    other = pickle.loads(pickle.dumps(loader))
    assert (other.rank, other.size, other.step, other.end) == (1, 4, 4, 8) and other.data_digest == loader.data_digest
    assert [[batch.digest for batch in step] for step in other] == [[batch.digest for batch in step] for step in loader]
    dataset = pickle.loads(pickle.dumps(PackDataset(plan, corpora, steps=2)))
    assert len(dataset) == 2 * PACKS
    sums = [
        (int(row["input_ids"].sum()), int(row["shift_labels"].sum()))
        for row in map(dataset.__getitem__, range(len(dataset)))
    ]
    assert sorted(sums) == sorted(row_sums for step in reference[:2] for row_sums in step.values())
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_what_a_loader_says_of_a_step_is_what_its_batches_have(plan, corpora):
    loaders = shares_of(plan, corpora, 3)
    for step in (0, 7):
        for loader in loaders:
            for share, facts in zip(loaders, loader.facts(step), strict=True):
                batches = share.batches(step)
                assert [(batch.lengths, batch.digest) for batch in facts] == [
                    (batch.lengths, batch.digest) for batch in batches
                ]
                labels = [int((batch.read(np.arange(batch.tokens))[1] >= 0).sum()) for batch in batches]
                assert [fact.valid_labels for fact in facts] == labels
