"""Pages for people: one HTML file each, which needs nothing else and no network."""

from __future__ import annotations

import json
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_TEMPLATES = Environment(loader=PackageLoader("distattn.pages"), undefined=StrictUndefined, autoescape=True)


def render_page(template: str, data: Any, **values: Any) -> str:
    """Fill a template of `pages/templates`. data: what the page's script draws, as JSON; values: what the template names."""
    # a script ends at the first "</", wherever it stands
    written = Markup(json.dumps(data, separators=(",", ":")).replace("</", "<\\/"))
    return _TEMPLATES.get_template(template).render(data=written, **values)
