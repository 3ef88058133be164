"""The page of a run, checked in a real browser if one is installed."""

import json
import re
import tomllib
from dataclasses import asdict

import pytest
from browser import LEGIBLE, as_printed, needs_browser, what_a_script_says

import distattn as da
from distattn.training.config import run_file as configuration
from distattn.training.reporting.report import write_report
from distattn.training.run_folder import RunFolder, StepMetrics

LOSSES = [5.5, 4.25, float("nan"), 3.125, 3.0]
CHECKED = {
    "passed": True,
    "loss": 1e-7,
    "grad_norm": 2e-6,
    "tolerance": 1e-4,
    "steps": [
        {"step": n, "loss": 5.5, "reference_loss": 5.5, "grad_norm": 2.0, "reference_grad_norm": 2.000001}
        for n in (1, 2)
    ],
}


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "<run>")
    run.folder.mkdir()
    steps = configuration.TrainConfig(steps=1_000_000)
    configuration.save(configuration.Config(train=steps), run.config_file)
    plan = da.make_plan(
        da.Mask.causal(64), da.Layout.zigzag([64], 2), strategy="ring", heads=2, kv_heads=2, head_dim=8, dtype="float32"
    )
    plan.save(run.plan_file)
    run.explanation_file.write_text(str(da.explain(plan)))
    for number, loss in enumerate(LOSSES):
        run.append(run.metrics_file, asdict(StepMetrics(number + 1, loss, 2.0 / (number + 1), 1000, 0.5)))
    return run


def page_of(run, checked, attempts=()):
    write_report(run, configuration.load(run.config_file), checked, attempts)
    # strip the column names that cells contain for narrow pages
    return re.sub(r' data-name="[^"]*"', "", run.report_file.read_text())


def test_the_page_is_offline_and_gives_the_runs_numbers(run):
    page = page_of(run, CHECKED)
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page) and "&lt;run&gt;" in page and "<run>" not in page
    for text in ("<b>3.000</b>", "from 5.500", "<b>2,000</b>", "2 steps agree with plain transformers", "5.0e-07"):
        assert text in page
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page)[1])
    assert data["steps"]["loss"] == [5.5, 4.25, None, 3.125, 3.0] and data["reference"]["loss"][:3] == [5.5, 5.5, None]
    without = page_of(run, None)
    assert "that did not finish" in without and "Compared with transformers" not in without
    assert "differ from plain transformers" in page_of(run, {**CHECKED, "passed": False})


# a user's actions, and the page's text after each
SCRIPT = """
  const canvas = document.querySelector("canvas"), box = canvas.getBoundingClientRect(), tip = canvas.nextElementSibling;
  const point = x => canvas.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + x, clientY: box.top + 90}));
  const ink = of => of.getContext("2d").getImageData(0, 0, of.width, of.height).data.filter((x, i) => i % 4 === 3 && x).length;
  said.drawn = ink(canvas) > 500;
  point(66); said.first = tip.textContent;
  point(box.width - 13); said.last = tip.textContent;
  canvas.previousElementSibling.querySelector("[data-zoom='0.5']").click(); point(66); said.zoomed = tip.textContent;
  const tabs = document.querySelectorAll("[role=tab]"); tabs[1].click();
  said.panels = [...document.querySelectorAll("[role=tabpanel]")].map(panel => panel.hidden);
  said.second = ink(document.querySelectorAll("canvas")[1]) > 500;
"""


@needs_browser
@pytest.mark.parametrize("width", [1200, 500])
def test_a_person_points_zooms_and_chooses(run, tmp_path, width):
    page_texts = what_a_script_says(page_of(run, CHECKED), SCRIPT, tmp_path, width)
    assert page_texts["drawn"] and page_texts["second"] and not page_texts["error"] and not page_texts["cut"], (
        page_texts
    )
    assert (
        page_texts["first"].startswith("step 1: loss 5.5000, gradient norm 2.000, tokens")
        or "step 1: loss 5.5000" in page_texts["first"]
    )
    assert "plain transformers 5.5000" in page_texts["first"] and page_texts["last"].startswith("step 5: loss 3.0000")
    assert page_texts["zoomed"].startswith("step 2:") and page_texts["panels"] == [True, False, True, True], page_texts


def month(run, steps=12_000):
    """Write a long run with everything a page can show: evaluations, losses by corpus, refused steps and a restart."""
    run.metrics_file.unlink()
    rows = []
    for number in range(1, steps + 1):
        skipped = "the loss is nan." if number == 7000 else ""
        loss = float("nan") if skipped else 9.0 if number == 5001 else 6 / number**0.1
        more = dict(
            learning_rate=1e-3 * (1 - number / steps), mfu=0.4, data_seconds=0.01, wait_seconds=0.05, skipped=skipped
        )
        rows.append(StepMetrics(number, loss, 1.0, 1000, 0.5, memory_resident=3 << 30, **more).as_dict())
    run.append(run.metrics_file, *rows)
    for step in (1000, 6000, 12_000):
        buckets = [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15)]
        by_position = [
            {"first": first, "last": last, "tokens": 10 * last, "loss": 5.0 - number - step / 12_000 if last else None}
            for number, (first, last) in enumerate(buckets)
        ]
        by_corpus = [{"name": "<web>", "tokens": 1234, "loss": 4.0 - step / 6000}]
        row = dict(
            step=step, loss=3.5 - step / 12_000, tokens=270, not_finite=0, by_position=by_position, by_corpus=by_corpus
        )
        run.append(run.losses_file, {"split": "evaluation", **row}, {"split": "training", **row, "by_corpus": []})
    run.append(run.events_file, {"step": 6500, "kind": "restart", "text": "resumed from <step-6400>"})


def test_a_long_run_shows_how_it_went(run):
    month(run)
    page = page_of(run, None)
    assert len(page) < 1_500_000
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page)[1])
    steps = data["steps"]["step"]
    assert len(steps) < 4100 and {1, 1000, 5001, 6000, 7000, 12_000} <= set(steps)
    assert data["steps"]["loss"][steps.index(5001)] == 9.0 and data["steps"]["loss"][steps.index(7000)] is None
    evaluated = {step: loss for step, loss in zip(steps, data["steps"]["evaluation"], strict=True) if loss is not None}
    assert evaluated == {1000: 3.5 - 1 / 12, 6000: 3.0, 12_000: 2.5}
    assert "memory_allocated" not in data["labels"] and data["labels"]["mfu"] == "MFU"
    for text in (
        "<b>40.0%</b>",
        "<b>10.0%</b>",
        "<b>3.00 GiB</b>",
        "from 3.417",
        "&lt;web&gt;</td><td>Held-out documents</td><td>3.8333</td><td>2.0000</td><td>1,234",
        "resumed from &lt;step-6400&gt;",
        "7,000</td><td>not applied</td><td>the loss is nan.",
        "8 to 15: 0.0000, 150 tokens",
    ):
        assert text in page, text
    assert page.count('<svg class="chart"') == 2 and "step 1,000" in page and "step 6,000" not in page


def test_kills_restarts_and_both_numbers_of_ranks_are_shown(run):
    # the second start follows a kill. The third uses more ranks, which are killed before they save
    for step, ranks, before in ((2, 2, 4), (2, 2, 4), (3, 3, 2), (3, 2, 2)):
        facts = {"ranks": ranks, "saved_on": before}
        run.append(run.events_file, {"step": step, "kind": "resumed", "text": "Resumed from <step>.", **facts})
    why = "rank 1 was killed by SIGKILL: <forward>"
    attempts = [
        {"attempt": 1, "began": 0.0, "ended": 61.0, "exit_code": 137, "why": why},
        {"attempt": 2, "exit_code": None, "why": "ended with its launcher"},
        {"attempt": 3, "began": 90.0, "ended": 95.0, "exit_code": 0, "why": "ended well"},
    ]
    page = page_of(run, None, attempts)
    assert "A run of distattn train on 4 ranks, from step 3 on 2: strategy" in page
    assert "1970-01-01 00:00:00 UTC</td><td>61 s</td><td>rank 1 was killed by SIGKILL: &lt;forward&gt;</td>" in page
    assert "<td>2</td><td>-</td><td>-</td><td>ended with its launcher</td>" in page
    assert '<span class="soft">restarts</span><b>2</b>' in page
    # a run that started once and ended without an error shows no attempts
    assert ">Attempts<" not in page_of(run, None, attempts[2:]) and ">Attempts<" not in page_of(run, None)
    assert ">Attempts<" in page_of(run, None, attempts[:1])


def test_only_starts_after_a_failure_are_restarts(run):
    good, asked = {"exit_code": 0, "why": "ended well"}, {"exit_code": 75, "why": "stopped, asked by a person"}
    stopped = {"exit_code": 143, "why": "stopped by SIGTERM", "stopped": True}
    killed = {"exit_code": 143, "why": "rank 1 was killed by SIGTERM"}

    def tiles(*rows):
        page = page_of(run, None, [{"attempt": 1 + at, **row} for at, row in enumerate(rows)])
        return dict(re.findall(r'<span class="soft">(restarts|resumes)</span><b>(\d+)</b>', page))

    assert tiles(good) == {} and tiles(good, good, good) == {"resumes": "2"}
    assert tiles(killed, good) == {"restarts": "1"}
    assert tiles(asked, stopped, killed, good) == {"restarts": "1", "resumes": "2"}


MONTH_SCRIPT = """
  const names = data => [...document.querySelectorAll("[role=tab]")].map(tab => tab.textContent);
  said.tabs = names();
  const inked = [];
  document.querySelectorAll("[role=tab]").forEach((tab, at) => {
    tab.click(); const canvas = document.querySelectorAll("canvas")[at], box = canvas.getBoundingClientRect();
    const image = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    inked.push(image.filter((x, i) => i % 4 === 3 && x).length > 500);
    canvas.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width - 13, clientY: box.top + 90}));
  });
  said.inked = inked; said.tip = document.querySelectorAll("canvas")[4].nextElementSibling.textContent;
  const dot = document.querySelector("svg.chart circle.newest"), box = dot.getBoundingClientRect();
  said.dot = [box.width > 2, dot.textContent, getComputedStyle(dot).fill !== "none"];
"""


@needs_browser
@pytest.mark.parametrize("width", [1200, 500])
def test_every_curve_of_a_long_run_is_drawn(run, tmp_path, width):
    month(run)
    page_texts = what_a_script_says(page_of(run, None), MONTH_SCRIPT, tmp_path, width)
    assert not page_texts["error"] and not page_texts["cut"], page_texts
    assert page_texts["tabs"][4:] == [
        "evaluation loss",
        "learning rate",
        "MFU",
        "waiting for data",
        "waiting for ranks",
        "memory of the process",
    ]
    assert page_texts["inked"] == [True] * len(page_texts["tabs"])
    assert (
        page_texts["tip"].startswith("step 12000: loss")
        and "evaluation loss 2.5000" in page_texts["tip"]
        and "MFU 40.0 %" in page_texts["tip"]
    )
    assert page_texts["dot"][0] and page_texts["dot"][1].startswith("step 12,000, 1: 3.0000") and page_texts["dot"][2]


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(420, True), (1200, False)])
def test_charts_and_score_matrices_are_legible_and_nothing_runs_over_the_edge(run, tmp_path, width, dark):
    month(run)
    page_of(run, CHECKED)
    facts = what_a_script_says(run.report_file.read_text(), LEGIBLE, tmp_path, width, dark)
    assert facts["texts"] > 2 * 8 + 2 * 10 and not facts["unread"] and not facts["cut"] and not facts["error"], facts
    assert not facts["wide"], facts


def test_the_configuration_is_what_differs_from_the_defaults_and_folded_all_keys(run):
    page = page_of(run, CHECKED)
    changed = re.search(r'<pre class="columns">(.*?)</pre>', page, re.DOTALL)[1]
    assert tomllib.loads(changed) == {"train": {"steps": 1_000_000}}
    assert '<details class="screen-only"><summary>All keys</summary>' in page


@needs_browser
def test_paper_shows_all_columns_and_lines(run, tmp_path):
    month(run)
    facts = what_a_script_says(as_printed(page_of(run, CHECKED)), LEGIBLE, tmp_path, 1047)
    assert not facts["wide"] and not facts["unread"] and not facts["cut"], facts
