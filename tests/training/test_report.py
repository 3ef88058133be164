"""The page of a run, in a real browser where there is one."""

import json
import re
from dataclasses import asdict

import pytest
from browser import needs_browser, what_a_script_says

import distattn as da
from distattn.training import config as configuration
from distattn.training.report import write_report
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
    configuration.save(configuration.Config(), run.config_file)
    plan = da.make_plan(
        da.Mask.causal(64), da.Layout.zigzag([64], 2), strategy="ring", heads=2, kv_heads=2, head_dim=8, dtype="float32"
    )
    plan.save(run.plan_file)
    run.explanation_file.write_text(str(da.explain(plan)))
    for number, loss in enumerate(LOSSES):
        run.append(run.metrics_file, asdict(StepMetrics(number + 1, loss, 2.0 / (number + 1), 1000, 0.5)))
    return run


def page_of(run, checked):
    write_report(run, configuration.load(run.config_file), checked)
    return run.report_file.read_text()


def test_it_is_offline_and_says_the_run_in_numbers(run):
    page = page_of(run, CHECKED)
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page) and "&lt;run&gt;" in page and "<run>" not in page
    for said in ("<b>3.000</b>", "from 5.500", "<b>2,000</b>", "2 steps agree with plain transformers", "5.0e-07"):
        assert said in page
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page)[1])
    assert data["steps"]["loss"] == [5.5, 4.25, None, 3.125, 3.0] and data["reference"]["loss"][:3] == [5.5, 5.5, None]
    without = page_of(run, None)
    assert "were not repeated in plain transformers" in without and "Beside transformers" not in without
    assert "differ from plain transformers" in page_of(run, {**CHECKED, "passed": False})


# what a person does, and what the page says then
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
    said = what_a_script_says(page_of(run, CHECKED), SCRIPT, tmp_path, width)
    assert said["drawn"] and said["second"] and not said["error"] and not said["cut"], said
    assert (
        said["first"].startswith("step 1: loss 5.5000, gradient norm 2.000, tokens")
        or "step 1: loss 5.5000" in said["first"]
    )
    assert "plain transformers 5.5000" in said["first"] and said["last"].startswith("step 5: loss 3.0000")
    assert said["zoomed"].startswith("step 2:") and said["panels"] == [True, False, True, True], said
