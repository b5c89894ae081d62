"""Licences and cards: front matter that the Hub accepts, text from elsewhere that stays text."""

import hashlib
import math
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from loopback_card import card_errors
from loopback_hub import LoopbackHub

from mechint.errors import MechintError
from mechint.hub.bundle import StagedFile
from mechint.hub.card import Card, Measure, Section, front_matter, is_hub_id, md, measures_of, render_card
from mechint.hub.license import ACCEPTED, front_matter_license

FILES = {"a.json": StagedFile("0" * 64, 407), "figures/x y.png": StagedFile("1" * 64, 3277)}
CARD = Card(
    title="sae-run51-gpt2-medium",
    lead="A top-k SAE.",
    kind_tag="sparse-autoencoder",
    license="research-only",
    usage='print("user/repo")',
    tags=("gpt2-medium",),
    base_model="openai-community/gpt2-medium",
    datasets=("Skylion007/openwebtext", "builtin/tales", "/home/me/texts.txt"),
    facts=(("Model", "gpt2-medium"),),
    measures=(
        Measure("l0", 31.25, "latents a token", "active latents"),
        Measure("fvu", 0.125, "fraction", "missed variance"),
    ),
    measured_on=("Skylion007/openwebtext", "held-out texts"),
    sections=(Section("Training", "Ten steps."),),
    figures=(("figures/x y.png", "A figure"), ("figures/none.png", "Not there")),
    provenance=(("commit", "abc"), ("versions", "torch 2 | numpy `2`")),
)


def data_of(card: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert found is not None
    return yaml.safe_load(found[1])


@pytest.mark.parametrize(
    ("said", "license", "name"),
    [
        ("MIT", "mit", None),
        (" mit ", "mit", None),
        ("Apache-2.0", "apache-2.0", None),
        ("CC-BY-4.0", "cc-by-4.0", None),
        ("Apache 2.0", "apache-2.0", None),
        ("GPL-3.0-or-later", "gpl-3.0", None),
        ("llama3.1", "llama3.1", None),
        ("other", "other", None),
        ("research-only", "other", "research-only"),
        ("My Own Licence, v2", "other", "My-Own-Licence-v2"),
        ("???", "other", "unnamed"),
        ("", "unknown", None),
        (None, "unknown", None),
    ],
)
def test_licences_as_the_hub_accepts_them(said: str | None, license: str, name: str | None):
    found = front_matter_license(said)
    assert found == {"license": license} | ({"license_name": name} if name else {})
    assert found["license"] in ACCEPTED


@pytest.mark.parametrize("text", ["Permission is hereby\ngranted", "x" * 300])
def test_a_licences_text_is_not_its_name(text: str):
    with pytest.raises(MechintError, match="--license should be a licence's name"):
        front_matter_license(text)


def test_front_matter_and_its_evaluation_results():
    card = render_card(CARD, FILES)
    assert card_errors(card, "model") == ([], [])
    data = data_of(card)
    assert (data["license"], data["license_name"], data["library_name"]) == ("other", "research-only", "mechint")
    assert data["tags"] == ["mechanistic-interpretability", "sparse-autoencoder", "gpt2-medium"]
    assert data["base_model"] == "openai-community/gpt2-medium" and data["datasets"] == ["Skylion007/openwebtext"]
    (entry,) = data["model-index"]
    (result,) = entry["results"]
    assert entry["name"] == CARD.title and result["dataset"]["type"] == "Skylion007/openwebtext"
    assert [(m["type"], m["value"]) for m in result["metrics"]] == [("l0", 31.25), ("fvu", 0.125)]


def test_what_is_no_id_of_the_hub_stays_out():
    data = data_of(render_card(replace(CARD, base_model="builtin/pythia-tiny", datasets=("builtin/tales",)), FILES))
    assert "base_model" not in data and "datasets" not in data
    local = replace(CARD, measured_on=("builtin/tales", "held-out texts"))
    assert data_of(render_card(local, FILES))["model-index"][0]["results"][0]["dataset"] == {
        "name": "builtin/tales",
        "type": "builtin-tales",
        "split": "held-out texts",
    }
    assert "model-index" not in data_of(render_card(replace(CARD, measures=()), FILES))
    for name in ("gpt2", "EleutherAI/pythia-70m", "a/b.c_d-e"):
        assert is_hub_id(name)
    for name in ("builtin/x", "/a/b", "a/b/c", "../b", "a/", "", "a b/c", "a--b/c", "a/..b", None, 3):
        assert not is_hub_id(name)


def test_the_body_shows_metrics_figures_provenance_and_files():
    card = render_card(CARD, FILES)
    for line in (
        "# sae-run51-gpt2-medium",
        "| Licence | research-only |",
        '```python\nprint("user/repo")\n```',
        "Measured on held-out texts of Skylion007/openwebtext.",
        "| `l0` | 31.25 | latents a token | active latents |",
        "![A figure](figures/x%20y.png)",
        "| versions | ``` torch 2 \\| numpy `2` ``` |".replace("```", "``"),
        f"| [`a.json`](a.json) | 407 B | `{'0' * 64}` |",
        f"| [`figures/x y.png`](figures/x%20y.png) | 3.2 KB | `{'1' * 64}` |",
    ):
        assert line in card
    assert "Not there" not in card
    assert render_card(CARD, dict(reversed(FILES.items()))) == card  # in whatever order the files come


def test_only_numbers_that_exist_are_measures():
    known = [("a", "", "A"), ("b", "", "B"), ("c", "", "C"), ("d", "", "D"), ("e", "", "E"), ("f", "", "F")]
    values = {"f": 2, "a": 1.5, "b": math.nan, "c": math.inf, "d": "1", "e": True}
    assert [(m.key, m.value) for m in measures_of(values, known)] == [("a", 1.5), ("f", 2)]


HOSTILE = "<script>alert(1)</script> | `x` [a](javascript:x) ![b](http://c) *d* _e_\n# f\n---\nlicense: mit\n\"'{"


def test_text_from_elsewhere_stays_text():
    """What a stranger's spec or writeup holds makes no tag, link, heading, cell or front matter of its own."""
    import mistune

    hostile = replace(
        CARD,
        title=HOSTILE,
        lead=HOSTILE,
        license="MIT",
        tags=(HOSTILE,),
        facts=((HOSTILE[:10], HOSTILE),),
        measures=(Measure("l0", 1.0, HOSTILE, HOSTILE),),
        measured_on=(HOSTILE, HOSTILE),
        provenance=(("commit", HOSTILE),),
        figures=(("figures/x y.png", HOSTILE),),
    )
    hostile = replace(hostile, facts=(("Model", HOSTILE),))
    card = render_card(hostile, FILES)
    assert card_errors(card, "model") == ([], []) and data_of(card)["license"] == "mit"
    body = card.split("\n---\n", 1)[1]
    html = str(mistune.create_markdown(escape=False, plugins=["table"])(body))
    assert "<script" not in html and "javascript:" not in re.sub(r"<code>.*?</code>", "", html).replace(
        "](javascript:x)", ""
    )
    assert len(re.findall("<h1", html)) == 1
    assert {len(row.split("</td>")) - 1 for row in re.findall(r"<tr>\s*(<td.*?)</tr>", html, re.DOTALL)} == {2, 3, 4}
    assert 'href="javascript' not in html and 'src="http' not in html


@given(st.text(max_size=60) | st.text(alphabet="ab 1.)(_*`~#-+>|<[]!&;\\:/='\"\n{}$@h", max_size=30))
def test_markdown_shows_the_text_that_it_was_given(text: str):
    """In the middle of a line, and as a paragraph of its own."""
    import html as html_module

    import mistune

    render = mistune.create_markdown(escape=False, plugins=["table", "strikethrough"])
    plain = " ".join(text.split())
    for line, expected in ((f"x {md(text)} x", f"x {plain} x"), (md(text), plain)):
        shown = re.sub(r"^<p>|</p>\s*$", "", str(render(line)))
        assert "<" not in shown and " ".join(html_module.unescape(shown).split()) == " ".join(expected.split())


def test_a_card_is_the_same_bytes_each_time():
    code = "from test_hub_card import CARD, FILES; from mechint.hub.card import render_card; import hashlib;"
    code += "print(hashlib.sha256(render_card(CARD, FILES).encode()).hexdigest())"
    expected = hashlib.sha256(render_card(CARD, FILES).encode()).hexdigest()
    here = Path(__file__).parent
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": f"{here}:{here.parent}", "PATH": "/usr/bin:/bin"}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == expected, done.stderr[-2000:]


def test_the_hubs_validator_takes_the_card(tmp_path: Path):
    """The real client posts it to /api/validate-yaml, as it does before each commit."""
    good, bad = render_card(CARD, FILES), render_card(CARD, FILES).replace("license: other", "license: [")
    for name, text in (("good.md", good), ("bad.md", bad)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    script = """
    import sys
    from huggingface_hub import ModelCard
    for name in ("good.md", "bad.md"):
        try:
            ModelCard(open(name, encoding="utf-8").read()).validate()
            print(name, "taken")
        except Exception as error:
            print(name, "refused", type(error).__name__)
    """
    with LoopbackHub(tmp_path / "hub") as hub:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            env=hub.env(tmp_path / "home"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout.splitlines()[0] == "good.md taken", done.stderr[-2000:]
        assert done.stdout.splitlines()[1].startswith("bad.md refused")
        assert hub.seen("POST", "validate-yaml")


def test_the_client_reads_the_card_back():
    from huggingface_hub import ModelCard

    data: Any = ModelCard(render_card(CARD, FILES)).data
    assert data.to_dict() == data_of(f"---\n{front_matter(CARD)}\n---\n")
    results = data.eval_results
    assert results is not None and [result.metric_type for result in results] == ["l0", "fvu"]
