"""Render HTML pages. Each is a single file that works offline."""

from __future__ import annotations

import json
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_TEMPLATES = Environment(loader=PackageLoader("distattn.pages"), undefined=StrictUndefined, autoescape=True)


def render_page(template: str, data: Any, **values: Any) -> str:
    """Fill a template of `pages/templates`. data: passed to the page's script as JSON. values: the template's variables."""
    # escape "</": the browser would end the script there
    written = Markup(json.dumps(data, separators=(",", ":")).replace("</", "<\\/"))
    return _TEMPLATES.get_template(template).render(data=written, **values)
