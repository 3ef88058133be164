"""A page in a real browser, where there is one."""

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
  document.body.dataset.said = JSON.stringify(said);
}
</script></body>"""
needs_browser = pytest.mark.skipif(_BROWSER is None, reason="there is no Chromium here")


def what_a_script_says(page: str, script: str, folder: Path, width: int) -> dict[str, Any]:
    """What a script puts into `said` once the page has run, and whether the page is cut or had an error."""
    file = folder / "page.html"
    file.write_text(page.replace("</body>", _AROUND.replace("SCRIPT", script)))
    given = [f"--user-data-dir={folder}/profile", f"--window-size={width},900", "--dump-dom", file.as_uri()]
    done = subprocess.run([_BROWSER, *_FLAGS, *given], capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert "data-said" in done.stdout, done.stdout[-500:] + done.stderr[-2000:]
    return json.loads(html.unescape(re.search(r'data-said="([^"]*)"', done.stdout)[1]))
