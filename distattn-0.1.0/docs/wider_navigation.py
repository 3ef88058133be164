"""A hook of mkdocs: the navigation stands beside the page in windows of 1,100 pixels, where the theme wants 1,220."""

from pathlib import Path
from typing import Any

# widths in the theme's files, and those that take their place
_WIDTHS = {"76.25em": "68.75em", "76.234375em": "68.734375em"}


def on_post_build(config: Any, **_: Any) -> None:
    """Change the width at which the built site shows its navigation. Raise RuntimeError where the theme has another one."""
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
