"""The page of `distattn plan --html`, checked in a real browser if one is installed."""

import re

import pytest
from browser import LEGIBLE, as_printed, needs_browser, what_a_script_says

import distattn as da
from distattn.cluster import spec
from distattn.planning.compare_strategies import PlanRequest, compare_strategies
from distattn.planning.comparison_page import comparison_page, write_comparison_page
from distattn.training.config.plan_settings import PlanSettings


@pytest.fixture(scope="module")
def page():
    cluster = spec.load("h200-2x2", None)
    settings = PlanSettings(ranks=4, heads=2, kv_heads=2, head_dim=64, dtype="bfloat16")
    request = PlanRequest(((9000, 500, 7000),), settings)
    results = compare_strategies(request, ["ring", "ulysses", "usp"], cluster)
    assert isinstance(results["ulysses"], str)
    return comparison_page({**results, "<b>": "refused </script><script>"}, str(request))


def test_the_page_is_offline_lists_the_fastest_first_and_reports_refusals(page):
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page) and "http" not in page.replace("http-equiv", "")
    names = re.findall(r'<div class="bar(?: best)?"><b>(\w+)</b>', page)
    seconds = [sum(map(float, re.findall(r"</div>([\d.]+) ms", part))) for part in page.split('<div class="bar')[1:]]
    assert sorted(names) == ["ring", "usp"] and seconds == sorted(seconds)
    assert re.search(r"<b>ulysses</b> is refused: .*heads.*</p>", page)
    # markup in a name must be escaped
    assert "<b>&lt;b&gt;</b> is refused: refused &lt;/script&gt;" in page
    for word in ("kernels", "waiting", "idle", "balance", "across nodes", "buffers", "step"):
        assert f"<dt>{word}</dt>" in page


def test_a_page_that_cannot_be_written_gives_one_sentence(tmp_path):
    settings = PlanSettings(ranks=2, heads=2, kv_heads=2, head_dim=8, dtype="float32")
    results = compare_strategies(PlanRequest(((64,),), settings), ["ring"], spec.load("h200-1x2", None))
    with pytest.raises(da.DistattnError, match="cannot be written"):
        write_comparison_page(tmp_path / "none" / "x.html", results, "a call")


# a user's actions, and what the page shows after each
SCRIPT = """
  const canvas = document.querySelector("canvas"), box = canvas.getBoundingClientRect(), tip = canvas.nextElementSibling;
  const point = (x, y) => canvas.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + x, clientY: box.top + y}));
  const pixels = () => canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const ink = () => pixels().filter((x, i) => i % 4 === 3 && x).length;
  said.drawn = ink() > 500;
  point(60, 8); said.first = tip.textContent;
  canvas.previousElementSibling.querySelector("[data-zoom='0.5']").click(); point(60, 8); said.zoomed = tip.textContent;
  const first = canvas.previousElementSibling.querySelector("[data-first]");
  first.value = 3; first.dispatchEvent(new Event("input"));
  point(60, 8); said.ranks = tip.textContent;
  const tabs = document.querySelectorAll("[role=tab]"); tabs[1].click();
  said.panels = [...document.querySelectorAll("[role=tabpanel]")].map(panel => panel.hidden);
  tabs[1].dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
  said.back = [...document.querySelectorAll("[role=tabpanel]")].map(panel => panel.hidden);
  said.cut = document.documentElement.scrollWidth > innerWidth;
"""


@needs_browser
@pytest.mark.parametrize("width", [1200, 500])
def test_a_person_sees_points_zooms_and_chooses(page, tmp_path, width):
    shown = what_a_script_says(page, SCRIPT, tmp_path, width)
    assert shown["drawn"] and not shown["error"] and not shown["cut"], shown
    assert (
        re.match(r"rank 0, step \d+: begins at .*kernels .*tasks.*messages", shown["first"]) or "idle" in shown["first"]
    ), shown
    assert shown["zoomed"] != shown["first"] and shown["ranks"].startswith("rank 3,"), shown
    assert shown["panels"] == [True, False] and shown["back"] == [False, True], shown


@needs_browser
def test_score_matrices_are_legible_on_a_telephone_and_in_the_dark(page, tmp_path):
    facts = what_a_script_says(page, LEGIBLE, tmp_path, 420, dark=True)
    # three ticks per axis, the axis names, and the names of the bars
    assert facts["texts"] > 2 * 8 and not facts["unread"] and not facts["cut"] and not facts["error"], facts
    # narrow pages show table rows as lists
    assert not facts["wide"], facts


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(420, True), (1200, False)])
def test_a_timeline_is_vectors_as_wide_as_the_page_and_legible_in_the_dark(page, tmp_path, width, dark):
    settings = PlanSettings(ranks=4, heads=2, kv_heads=2, head_dim=64, dtype="bfloat16")
    timeline = PlanRequest(((9000, 500),), settings).timeline("ring", spec.load("h200-2x2", None))
    drawn = timeline.html()
    assert drawn.count("<svg") == 2 and "<img" not in drawn and "base64" not in drawn
    around = page[: page.index("<body>")] + f"<body>{drawn}</body></html>"
    facts = what_a_script_says(around, LEGIBLE, tmp_path, width, dark)
    # for each pass: four ranks, three times and the name of the axis
    assert facts["texts"] == 2 * (4 + 3 + 1) and not facts["unread"] and not facts["wide"] and not facts["cut"], facts


@needs_browser
def test_paper_shows_all_columns_and_lines(page, tmp_path):
    """Print on A4, whose long side has 1,047 pixels between the margins."""
    facts = what_a_script_says(as_printed(page), LEGIBLE, tmp_path, 1047)
    assert not facts["wide"] and not facts["unread"] and not facts["cut"], facts
