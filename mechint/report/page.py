"""The HTML file around the data: one style, one script, and a policy that lets nothing else in or out."""

import base64
import hashlib
import html
from collections.abc import Sequence
from importlib import resources
from typing import Any

from mechint.report.pack import json_for_script

STYLE = "report.css"
# In this order: each uses only what stands before it.
SCRIPTS = ("data.js", "dom.js", "plots.js", "overview.js", "latents.js", "compare.js", "app.js")

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src '{style_hash}'; script-src '{script_hash}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="mechint {version}">
<meta name="description" content="{description}">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<noscript><div class="noscript"><h1>{title}</h1><p>{description}</p>
<p>The rest of this page is drawn by its own script, which your browser does not run here.</p></div></noscript>
<div id="app"></div>
<script type="application/json" id="facts">{facts}</script>
{blobs}
<script>{script}</script>
</body>
</html>
"""


def asset(name: str) -> str:
    return (resources.files("mechint.report") / "assets" / name).read_text(encoding="utf-8")


def page(facts: dict[str, Any], blobs: Sequence[str | None], *, title: str, description: str, version: str) -> str:
    """The whole file.

    Args:
        facts: what the first screen needs; small, readable JSON.
        blobs: for each run its latents as `pack` made them, None where there are none.
    """
    style = asset(STYLE)
    script = '"use strict";\n' + "".join(f"\n// {name}\n{asset(name)}" for name in SCRIPTS)
    assert "</script" not in script.lower() and "</style" not in style.lower()
    return _PAGE.format(
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
        version=html.escape(version),
        description=html.escape(description),
        title=html.escape(title),
        style=style,
        script=script,
        facts=json_for_script(facts),
        blobs="\n".join(
            f'<script type="text/plain" id="latents-{index}">{blob}</script>'
            for index, blob in enumerate(blobs)
            if blob is not None
        ),
    )


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
