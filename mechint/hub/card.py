"""README.md of a bundle: front matter that the Hub accepts, and what a stranger needs to use what lies there.

A card is a function of what it is given, so that the same bundle has the same bytes each time.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mechint.hub.bundle import METADATA, README, StagedFile
from mechint.hub.license import front_matter_license
from mechint.hub.publish import format_size

LIBRARY = "mechint"
TAG = "mechanistic-interpretability"
# An id of the Hub: one name (the first models have no owner), or owner and name.
HUB_ID = re.compile(r"(?!builtin/)[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
MAX_CELL = 400


class Measure(NamedTuple):
    """One measured number: `key` is its name in our files, `text` what it is, `unit` what it counts in."""

    key: str
    value: float | int
    unit: str
    text: str


class Section(NamedTuple):
    """A part of a card: `body` is Markdown and is taken as it is; use `md` for what comes from elsewhere."""

    heading: str
    body: str


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        title, lead: plain text. The lead is the first paragraph.
        kind_tag: "sparse-autoencoder", "steering-vector" or "investigation".
        tags: further tags; the model's name usually.
        license: as the user said it.
        base_model, datasets: names; those that are no ids of the Hub stay out of the front matter.
        facts: label and value, for the table at the top; the licence follows by itself.
        measures: the metrics table and, where `measured_on` says on what, the evaluation results of the front matter.
        measured_on: `(id or name of the data set, what rows of it)`.
        usage: Python that runs as it stands once the bundle is published.
        after_usage: Markdown below it.
        sections: between metrics and provenance.
        figures: `(path in the repository, caption)`.
        provenance: label and value, in order.
    """

    title: str
    lead: str
    kind_tag: str
    license: str
    usage: str
    tags: tuple[str, ...] = ()
    base_model: str | None = None
    datasets: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    measures: tuple[Measure, ...] = ()
    measured_on: tuple[str, str] | None = None
    after_usage: str = ""
    sections: tuple[Section, ...] = ()
    figures: tuple[tuple[str, str], ...] = ()
    provenance: tuple[tuple[str, str], ...] = ()


def render_card(card: Card, files: Mapping[str, StagedFile]) -> str:
    """The text of README.md for a bundle whose staged files these are (README.md itself left out)."""
    parts = [f"# {md(card.title)}", md(card.lead)]
    facts = (*card.facts, ("Licence", card.license))
    parts.append(table(("", ""), ((name, md(value)) for name, value in facts)))
    parts += ["## How to use", f"```python\n{card.usage.strip()}\n```"]
    if card.after_usage:
        parts.append(card.after_usage.strip())
    if card.measures:
        parts += ["## Metrics", _metrics(card)]
    for section in card.sections:
        parts += [f"## {md(section.heading)}", section.body.strip()]
    shown = [(path, caption) for path, caption in card.figures if path in files]
    if shown:
        parts.append("## Figures")
        parts += [f"![{md(caption)}]({_link(path)})\n\n{md(caption)}." for path, caption in shown]
    if card.provenance:
        parts += ["## Provenance", table(("", ""), ((md(name), code(value)) for name, value in card.provenance))]
    parts += ["## Files", _files(files)]
    return f"---\n{front_matter(card)}\n---\n\n" + "\n\n".join(parts) + "\n"


def front_matter(card: Card) -> str:
    """The card's YAML, as huggingface_hub writes it."""
    from huggingface_hub import EvalResult, ModelCardData

    license = front_matter_license(card.license)
    tags = [TAG, card.kind_tag, *(tag for tag in map(_tag, card.tags) if tag)]
    results = None
    if card.measured_on is not None and card.measures:
        name, rows = card.measured_on
        results = [
            EvalResult(
                task_type="feature-extraction",
                task_name="Reconstruction of activations",
                dataset_type=name if is_hub_id(name) else _tag(name) or "unknown",
                dataset_name=name,
                dataset_split=rows,
                metric_type=measure.key,
                metric_name=measure.text,
                metric_value=measure.value,
            )
            for measure in card.measures
        ]
    data = ModelCardData(
        license=license["license"],
        license_name=license.get("license_name"),
        library_name=LIBRARY,
        tags=tags,
        base_model=card.base_model if is_hub_id(card.base_model) else None,
        datasets=[name for name in card.datasets if is_hub_id(name)] or None,
        model_name=card.title,
        eval_results=results,
    )
    if results is None:
        data.model_name = None  # of use to evaluation results only
    return data.to_yaml()


def is_hub_id(name: Any) -> bool:
    """Whether `name` can be the id of a model or data set on the Hub."""
    fits = isinstance(name, str) and HUB_ID.fullmatch(name) is not None and len(name) <= 96
    return fits and ".." not in name and "--" not in name


def measures_of(values: Mapping[str, Any], known: Iterable[tuple[str, str, str]]) -> tuple[Measure, ...]:
    """The numbers of `values` that are there and finite, in the order of `known`: `(key, unit, text)`."""
    return tuple(
        Measure(key, value, unit, text)
        for key, unit, text in known
        if isinstance(value := values.get(key), (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    )


# --- Markdown ---------------------------------------------------------------------------------------------------------


def md(value: object) -> str:
    """Text from elsewhere in one line of Markdown: nothing in it is a tag, a table's edge, a link or a heading."""
    text = " ".join(str(value).split())
    if len(text) > MAX_CELL:
        text = text[: MAX_CELL - 3] + "..."
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*~|\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", text)
    # what makes a heading, a list or a rule at the beginning of a line
    return re.sub(r"^(\d*)([#+=.)-])", r"\1\\\2", text)


def code(value: object) -> str:
    """Text from elsewhere as code in a table's cell."""
    text = " ".join(str(value).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return fence + pad + text.replace("|", "\\|") + pad + fence


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A Markdown table of cells that are Markdown already; columns `right` are set to the right."""
    rule = ["---:" if column in right else "---" for column in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in ([*header], rule, *map(list, rows)))


def _metrics(card: Card) -> str:
    rows = [(code(m.key), format_number(m.value), md(m.unit), md(m.text)) for m in card.measures]
    body = table(("Metric", "Value", "Unit", "What it is"), rows, right=(1,))
    if card.measured_on is None:
        return body
    name, split = card.measured_on
    return f"Measured on {md(split)} of {md(name)}.\n\n{body}"


def _files(files: Mapping[str, StagedFile]) -> str:
    names = sorted(name for name in files if name not in (README, METADATA))
    rows = [
        (f"[{code(name)}]({_link(name)})", format_size(files[name].size), code(files[name].sha256)) for name in names
    ]
    if not rows:
        return f"`{METADATA}` only."
    return (
        table(("File", "Size", "SHA-256"), rows, right=(1,))
        + f"\n\n`{METADATA}` holds the same hashes, and what is known of the bundle, for programs."
    )


def _link(path: str) -> str:
    from urllib.parse import quote

    return quote(path)


def _tag(name: object) -> str:
    """A tag of the Hub: without blanks, commas or slashes, at most 60 characters."""
    return re.sub(r"[^\w.+-]+", "-", str(name), flags=re.ASCII).strip("-")[:60]


def format_number(value: float | int) -> str:
    """Six digits; whole numbers whole."""
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:.6g}"
