"""Loss masks and spans belong to a plan: spans are not cut, and masks changed since the plan was made are noticed."""

from pathlib import Path

import numpy as np
import pytest
from planned_data import small_plan, write_corpus, write_mask

from distattn.data.files.corpus import Corpus
from distattn.data.loader import PackLoader
from distattn.data.packing.pack_config import load_pack_config, make_configured_plan, open_configured_plan, open_corpora
from distattn.ir.errors import DistattnError

LENGTHS = [[30] * 60 + [500, 90], [45] * 30]


def opened(folder):
    return Corpus.open("web", [str(folder / f"web-{number}") for number in range(len(LENGTHS))])


def write_masks(folder, last=0):
    """Write loss masks for the first file, and spans for both files."""
    for number, lengths in enumerate(LENGTHS):
        spans = [[0, 9, 40, 70, 100, 160, 160, 170] if length > 90 else [3, 9] for length in lengths]
        write_mask(str(folder / f"web-{number}"), "spans", spans)
    write_mask(str(folder / "web-0"), "loss", [[1] * (length - 1) + [last] for length in LENGTHS[0]])


def remove_masks(folder):
    for file in [*folder.glob("*.loss.*"), *folder.glob("*.spans.*")]:
        file.unlink()


@pytest.fixture
def folder(tmp_path):
    write_corpus(tmp_path, "web", LENGTHS)
    return tmp_path


def test_spans_of_a_file_are_not_cut(folder):
    plain = small_plan(folder, [opened(folder)])
    cuts = [
        {int(row["start"]) for step in map(plan.step, range(plan.steps)) for row in step.rows if row["document"] == 60}
        for plan in (plain, (write_masks(folder), small_plan(folder, [opened(folder)]))[1])
    ]
    assert cuts[0] == set(range(0, 500, 64))
    assert {0, 40, 100, 160} < cuts[1]


def test_masks_are_part_of_a_plan_and_of_its_digests(folder):
    plain = PackLoader(small_plan(folder, [opened(folder)]), [opened(folder)], rank=0, size=1)
    assert plain.plan.sources[0].masks is None
    write_masks(folder)
    masked = PackLoader(small_plan(folder, [opened(folder)]), [opened(folder)], rank=0, size=1)
    assert masked.plan.sources[0].masks == opened(folder).masks.digest and masked.data_digest != plain.data_digest
    for before, after in zip(plain.batches(0), masked.batches(0), strict=True):
        assert before.digest != after.digest
    assert sum(batch.valid_labels for step in masked for batch in step) < sum(
        batch.valid_labels for step in plain for batch in step
    )


@pytest.mark.parametrize(
    "before, after, message",
    [
        (
            lambda folder: None,
            write_masks,
            "was made when it had no loss masks or spans; move them away, or",
        ),
        (write_masks, remove_masks, "was made with loss masks or spans, which are gone; bring them back"),
        (
            write_masks,
            lambda folder: (remove_masks(folder), write_masks(folder, last=1)),
            "was made with other loss masks or spans; bring those back, or make the plan anew",
        ),
    ],
)
def test_masks_that_changed_since_the_plan_was_made_are_refused(folder, before, after, message):
    before(folder)
    (folder / "packs.toml").write_text("""
plan = "plan.packs"
[rule]
context = [[0, 64]]
tokens_per_step = 1024
[[corpus]]
name = "web"
files = ["web-0", "web-1"]
max_epochs = 1.0
""")
    config = load_pack_config(folder / "packs.toml")
    plan = make_configured_plan(config, open_corpora(config))
    open_configured_plan(config, open_corpora(config))
    state = PackLoader(plan, [opened(folder)], rank=0, size=2).state_dict()
    after(folder)
    for open_plan in (
        lambda: PackLoader(plan, [opened(folder)], rank=0, size=2).load_state_dict(state),
        lambda: open_configured_plan(config, open_corpora(config)),
    ):
        with pytest.raises(DistattnError, match=rf"plan.packs: corpus web \(.*web-0, .*web-1\): {message}"):
            open_plan()


def test_a_changed_mask_is_noticed_without_reading_it(folder, monkeypatch):
    write_masks(folder)
    read = []
    monkeypatch.setattr(
        "distattn.data.files.indexed_file.root_digest",
        lambda file: read.append(file) or pytest.fail(f"{file} is read whole"),
    )
    assert opened(folder).masks.digest == opened(folder).masks.digest
    (Path(folder) / "web-0.loss.xxh3").unlink()
    with pytest.raises(pytest.fail.Exception, match="web-0.loss.idx is read whole"):
        _ = opened(folder).masks.digest
    assert len(read) == 1


def test_a_loader_that_was_made_before_keeps_the_masks_that_it_opened(folder):
    write_masks(folder)
    loader = PackLoader(small_plan(folder, [opened(folder)]), [opened(folder)], rank=0, size=1)
    labels = [batch.read(np.arange(batch.tokens))[1] for batch in loader.batches(1)]
    remove_masks(folder)
    for batch, before in zip(loader.batches(1), labels, strict=True):
        np.testing.assert_array_equal(batch.read(np.arange(batch.tokens))[1], before)
