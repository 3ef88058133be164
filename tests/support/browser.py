"""Runs a page in a headless browser if one is installed."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from waiting import LIMIT_SECONDS

_BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=5000",
)
_AROUND = """<script>
addEventListener("error", event => document.body.dataset.error = event.message);
{
  const said = {};
  SCRIPT
  said.cut = document.documentElement.scrollWidth > innerWidth;
  said.error = document.body.dataset.error || "";
  parent.postMessage(JSON.stringify(said), "*");
}
</script></body>"""
# a headless browser's window is at least 500 pixels wide; a frame can be narrower
_FRAME = """<!doctype html><body><script>addEventListener("message", event => document.body.dataset.said = event.data);</script>
<iframe src="page.html" style="border: 0; width: WIDTHpx; height: 900px"></iframe></body>"""
# finds text that a person could not read. said.unread: SVG text that overflows the drawing, is smaller than 10 pixels,
# or has a contrast below 4.5 (WCAG 2). said.wide: elements that need sideways scrolling. said.texts: number of texts
# checked
LEGIBLE = """
  const luminance = colour => {
    const parts = colour.match(/[\\d.]+/g).map(part => part / 255);
    const [r, g, b] = parts.map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const ground = luminance(getComputedStyle(document.body).backgroundColor);
  const contrast = colour => { const l = luminance(colour); return (Math.max(l, ground) + .05) / (Math.min(l, ground) + .05); };
  const texts = [...document.querySelectorAll("svg text")].filter(text => text.getBoundingClientRect().width);
  said.texts = texts.length;
  said.unread = texts.filter(text => {
    const box = text.getBoundingClientRect(), sheet = text.ownerSVGElement.getBoundingClientRect();
    const scale = sheet.width / text.ownerSVGElement.viewBox.baseVal.width, style = getComputedStyle(text);
    const outside = [sheet.left - box.left, box.right - sheet.right, sheet.top - box.top, box.bottom - sheet.bottom];
    return Math.max(...outside) > 1 || parseFloat(style.fontSize) * scale < 10 || contrast(style.fill) < 4.5;
  }).map(text => text.textContent);
  const parts = [...document.querySelectorAll(".scroll, pre, .track, figure")];
  said.wide = parts.filter(part => part.scrollWidth > part.clientWidth + 1).map(part => part.textContent.slice(0, 60));
"""
needs_browser = pytest.mark.skipif(_BROWSER is None, reason="there is no Chromium here")


def what_a_script_says(page: str, script: str, folder: Path, width: int, dark: bool = False) -> dict[str, Any]:
    """Return what `script` stores in `said` after the page has run, and whether the page overflows or raised an error.

    width: page width in pixels. dark: the device prefers dark pages.
    """
    (folder / "page.html").write_text(page.replace("</body>", _AROUND.replace("SCRIPT", script)))
    frame = folder / "frame.html"
    frame.write_text(_FRAME.replace("WIDTH", str(width)))
    options = [f"--user-data-dir={folder}/profile", f"--window-size={max(width, 500) + 20},950", "--dump-dom"]
    options.append(f"--blink-settings=preferredColorScheme={0 if dark else 1}")
    command = [_BROWSER, *_FLAGS, *options, frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert "data-said" in done.stdout, done.stdout[-500:] + done.stderr[-2000:]
    return json.loads(html.unescape(re.search(r'data-said="([^"]*)"', done.stdout)[1]))


def as_printed(page: str) -> str:
    """Return the page with its print styles applied on screen."""
    return page.replace("@media print", "@media all")
