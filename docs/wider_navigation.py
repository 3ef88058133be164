"""An mkdocs hook that shows the navigation next to the page from 1,100 pixels on; the theme requires 1,220."""

from pathlib import Path
from typing import Any

# widths in the theme's files, and their replacements
_WIDTHS = {"76.25em": "68.75em", "76.234375em": "68.734375em"}


def on_post_build(config: Any, **_: Any) -> None:
    """Change the width from which the built site shows its navigation. Raise RuntimeError if the theme uses other widths."""
    assets, seen_widths = Path(config["site_dir"], "assets"), set()
    for file in [*assets.rglob("*.css"), *assets.rglob("*.js")]:
        text = file.read_text("utf-8")
        seen_widths |= {theme_width for theme_width in _WIDTHS if theme_width in text}
        for theme_width, own_width in _WIDTHS.items():
            text = text.replace(theme_width, own_width)
        file.write_text(text, "utf-8")
    if seen_widths != set(_WIDTHS):
        raise RuntimeError(
            "docs/wider_navigation.py: the theme shows its navigation from another width on; put that into _WIDTHS."
        )
