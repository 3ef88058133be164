"""A hook of mkdocs: the navigation stands beside the page in windows of 1,100 pixels, where the theme wants 1,220."""

from pathlib import Path
from typing import Any

# what the theme's files say, and what they say afterwards
_WIDTHS = {"76.25em": "68.75em", "76.234375em": "68.734375em"}


def on_post_build(config: Any, **_: Any) -> None:
    """Change the width at which the built site shows its navigation. Raise RuntimeError where the theme has another one."""
    assets, found = Path(config["site_dir"], "assets"), set()
    for file in [*assets.rglob("*.css"), *assets.rglob("*.js")]:
        text = file.read_text("utf-8")
        found |= {theirs for theirs in _WIDTHS if theirs in text}
        for theirs, ours in _WIDTHS.items():
            text = text.replace(theirs, ours)
        file.write_text(text, "utf-8")
    if found != set(_WIDTHS):
        raise RuntimeError(
            "docs/wider_navigation.py: the theme shows its navigation from another width on; look for it."
        )
