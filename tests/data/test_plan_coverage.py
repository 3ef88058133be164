"""A plan that reads a document twice, partially or not at all is detected, and a correct plan is accepted."""

import numpy as np
import pytest
from hypothesis import given, settings
from test_best_fit import web_like
from test_pack_plan import Lengths
from test_pack_windows import CORPORA, rules

from distattn.data.packing import plan_coverage
from distattn.data.packing.make_pack_plan import make_pack_plan
from distattn.data.packing.pack_plan_writer import PackPlanWriter
from distattn.data.packing.pack_rule import PackRule
from distattn.data.packing.pack_windows import PackedWindow
from distattn.data.packing.plan_coverage import CorpusCoverage, check_coverage
from distattn.ir.errors import DamagedDataError

RULE = PackRule(((0, 256),), 8 * 256, window=16)


def corpora():
    return [Lengths("web", [0, *(web_like(400) // 20), 0]), Lengths("books", web_like(30, seed=1) // 5 + 600)]


@pytest.fixture(params=[50, 1 << 20], ids=["in parts", "at once"])
def part_rows(request, monkeypatch):
    monkeypatch.setattr(plan_coverage, "_PART_ROWS", request.param)


@pytest.fixture
def plan(tmp_path, part_rows):
    return make_pack_plan(tmp_path / "plan", corpora(), seed=5, rule=RULE, weights=[1.0, 1.0], max_epochs=[1.0, 2.5])


def rewritten(plan, path, change):
    """Rewrite the plan with the pieces that `change` returns.

    change: a function of the pieces of all steps, PIECE (N,), and the step of each piece, (N,).
    """
    steps = list(map(plan.step, range(plan.steps)))
    rows, step_of = change(
        np.concatenate([step.rows for step in steps]),
        np.repeat(np.arange(plan.steps), [len(step.rows) for step in steps]),
    )
    counts = np.bincount(step_of, minlength=plan.steps)
    sources = [
        type(source)(
            **{**vars(source), "planned_tokens": int(rows["length"][rows["corpus"] == number].sum(dtype=np.int64))}
        )
        for number, source in enumerate(plan.sources)
    ]
    with PackPlanWriter(path) as writer:
        # write one pack per step, since the check does not look at packs
        writer.add(PackedWindow(np.ones_like(counts), counts, rows, np.zeros(len(rows), np.int64)))
        writer.finish(
            seed=plan.seed,
            rule=plan.rule,
            sources=sources,
            longest_wait=0,
            ends_with_corpora=plan.ends_with_corpora,
        )
    return type(plan).open(path)


def test_a_correct_plan_is_accepted_in_any_order_of_its_pieces(plan, tmp_path):
    seen = []
    wanted = [CorpusCoverage("web", 1, 0), CorpusCoverage("books", 2, 15)]
    assert check_coverage(plan, corpora(), lambda done, total: seen.append((done, total))) == wanted
    assert seen[-1] == (plan.steps, plan.steps)

    def shuffled(rows, step_of):
        return rows[np.random.default_rng(0).permutation(len(rows))], step_of

    assert check_coverage(rewritten(plan, tmp_path / "other", shuffled), corpora()) == wanted


@settings(max_examples=40)
@given(CORPORA, rules())
def test_planned_coverage_is_correct_for_any_rule(tmp_path_factory, lengths, rule):
    if rule.long_documents == "keep":
        lengths = [np.minimum(corpus_lengths, rule.tokens_per_step) for corpus_lengths in lengths]
    corpora_ = [Lengths(str(number), corpus_lengths) for number, corpus_lengths in enumerate(lengths)]
    path = tmp_path_factory.mktemp("plan") / "plan"
    whole = make_pack_plan(path, corpora_, seed=1, rule=rule, max_epochs=[2.0] * len(corpora_))
    assert [reading.epochs for reading in check_coverage(whole, corpora_)] == [2] * len(corpora_)
    if whole.steps > 1:
        short = make_pack_plan(
            path, corpora_, seed=1, rule=rule, max_epochs=[2.0] * len(corpora_), steps=whole.steps - 1
        )
        check_coverage(short, corpora_)


def first_cut(rows):
    """Return the index of the first row in epoch 1 whose piece contains neither end of its document."""
    return int(np.flatnonzero((rows["start"] > 0) & ~rows["ends_document"] & (rows["epoch"] == 1))[0])


def twice(rows, step_of):
    return np.append(rows, rows[10:11]), np.append(step_of, step_of[-1])


def part_twice(rows, step_of):
    at = first_cut(rows)
    return np.insert(rows, at, rows[at]), np.insert(step_of, at, step_of[at])


def overlapping(rows, step_of):
    at = first_cut(rows)
    rows["start"][at] -= 1
    rows["length"][at] += 1
    return rows, step_of


def shorter(rows, step_of):
    rows["length"][first_cut(rows)] -= 1
    return rows, step_of


def without(rows, at, step_of):
    return np.delete(rows, at), np.delete(step_of, at)


def beyond(rows, step_of):
    rows["length"][rows["ends_document"].argmax()] += 1
    return rows, step_of


def no_end(rows, step_of):
    rows["ends_document"][7] ^= True
    return rows, step_of


def unknown(rows, step_of):
    rows["document"][3] = 5000
    return rows, step_of


def other_corpus(rows, step_of):
    rows["corpus"][3] = 2
    return rows, step_of


def in_the_last_epoch(rows, step_of):
    return without(rows, int(((rows["epoch"] == 2) & rows["ends_document"]).argmax()), step_of)


@pytest.mark.parametrize(
    "change, message",
    [
        (twice, r"document \d+ of corpus \w+ is read twice in epoch 0 \(steps"),
        (part_twice, r"of corpus books is read twice in epoch 1 \(steps"),
        (overlapping, r"of corpus books is read twice in epoch 1 \(steps"),
        (shorter, r"of corpus books is not read to its end in epoch 1 \(steps"),
        (
            lambda rows, step_of: without(rows, first_cut(rows), step_of),
            r"of corpus books is not read to its end in epoch 1",
        ),
        (
            lambda rows, step_of: without(rows, rows["corpus"].argmin(), step_of),
            r"of corpus web is not read to its end in epoch 0",
        ),
        (in_the_last_epoch, r"of corpus books is not read to its end in epoch 2"),
        (beyond, r"of corpus \w+ has [\d,]+ tokens, but a piece of it is [\d,]+ to [\d,]+ in epoch"),
        (no_end, r"of corpus \w+ has [\d,]+ tokens, but a piece of it is"),
        (unknown, r"document 5,000 of corpus \w+ is read, but does not exist in epoch"),
        (other_corpus, r"has pieces of corpus 2, which does not exist"),
    ],
)
def test_wrong_coverage_is_named(plan, tmp_path, change, message):
    with pytest.raises(DamagedDataError, match=f"wrong: .*{message}"):
        check_coverage(rewritten(plan, tmp_path / "wrong", change), corpora())


def test_a_plan_of_some_steps_may_lack_what_still_waits_and_nothing_else(tmp_path, part_rows):
    plan = make_pack_plan(tmp_path / "plan", corpora(), seed=5, rule=RULE, weights=[1.0, 1.0], steps=400)
    web, books = check_coverage(plan, corpora())
    assert (web.epochs, books.epochs) == (int(plan.sources[0].epochs), int(plan.sources[1].epochs))
    assert 0 < web.documents < 400 and books.epochs > 10

    def gone(epoch):
        return lambda rows, step_of: without(
            rows, int(((rows["epoch"] == epoch) & (rows["corpus"] == 1)).argmax()), step_of
        )

    with pytest.raises(DamagedDataError, match="of corpus books is not read to its end in epoch 3"):
        check_coverage(rewritten(plan, tmp_path / "wrong", gone(3)), corpora())
    # if the plan ends shortly after the next epoch has started, the missing document could still have followed
    begun = next(step for step in range(400) if (plan.step(step).rows[["corpus", "epoch"]].tolist().count((1, 8))))
    short = make_pack_plan(tmp_path / "short", corpora(), seed=5, rule=RULE, weights=[1.0, 1.0], steps=begun + 10)
    assert check_coverage(rewritten(short, tmp_path / "cut", gone(7)), corpora())[1].epochs == 7


def test_a_header_that_says_something_else_is_found(plan, tmp_path, monkeypatch):
    wrong = [type(source)(**{**vars(source), "planned_tokens": source.planned_tokens + 1}) for source in plan.sources]
    monkeypatch.setattr(plan, "sources", tuple(wrong))
    with pytest.raises(DamagedDataError, match=r"tokens of corpus web, but its header says"):
        check_coverage(plan, corpora())
