"""The report in a real browser, on a real run whose tokens, concepts and name are hostile.

Needs Chromium (`apt-get install chromium`) and the playwright package; MECHINT_REQUIRE_BROWSER=1 makes their absence a
failure, which is what CI sets.
"""

import csv
import json
import random
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from browser import chromium
from conftest import HOOK, make_tiny_neox

from mechint.config import CollectConfig, ReportConfig, SAETrainConfig
from mechint.report.html import Made, make_report
from mechint.report.pack import unpack

pytestmark = pytest.mark.slow

SCRIPT = "<script>window.hacked=1</script>"
BAD_NAME = "<img src=x onerror=window.hacked=2>"
HOSTILE = [
    SCRIPT,
    "</script><script>window.hacked=3</script>",
    "<!--",
    BAD_NAME,
    "\u202egnp",
    "\u05e9\u05dc",
    "&lt;b&gt;",
    "'\"",
]
N_LATENTS = 128
CONCEPTS = ((SCRIPT, "", 0.9), ("animal", BAD_NAME, 0.8), ("mat", "", 0.3))

# What is asked of the page.
LISTED = "[...document.querySelectorAll('#latent-table tbody th')].map(c => Number(c.textContent))"
TOKENS = "[...document.querySelector('.contexts .context').querySelectorAll('span:not(.cut)')]"
REASONS = "[...document.querySelectorAll('#latent-table tbody td:nth-child(2)')].map(c => c.textContent)"
CHARTS = "[...document.querySelectorAll('.plot svg')].map(s => [s.getAttribute('role'), s.getAttribute('aria-label')])"
FIRST_DOT = """(() => {
  const box = document.querySelector('.map circle').getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2];
})()"""
DOT_CLASSES = "new Set([...document.querySelectorAll('.map circle')].map(c => c.getAttribute('class'))).size"
ALL_PAGES = """(() => {
  let all = '';
  for (let i = 0; i < RUNS[0].latents.d_sae; i++) all += latentPage(RUNS[0], i, walk(RUNS[0], i)).textContent;
  return all;
})()"""
COLORS = """(selector) => {
  const style = getComputedStyle(document.querySelector(selector)), page = getComputedStyle(document.documentElement);
  return [selector.startsWith('svg') ? style.fill : style.color, page.backgroundColor];
}"""


class Reports(NamedTuple):
    run: Path
    made: Made
    compare: Path


@pytest.fixture(scope="module", name="reports")
def reports_fixture(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """Two runs of a model with hostile tokens, trained, ranked by hand-made tables, and reported."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mechint.data.collect import collect
    from mechint.train import train

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("report")
    folder = make_tiny_neox(root / "model")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.add_tokens(HOSTILE) == len(HOSTILE)
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rng = random.Random(0)
    words = ["the", "cat", "sat", "on", "the", "mat", "dog", *HOSTILE]
    texts = root / "texts.txt"
    texts.write_text("".join(" ".join(rng.choices(words, k=24)) + "\n" for _ in range(80)), encoding="utf-8")
    store = root / "activations" / "hostile"
    collect(
        CollectConfig(model=str(folder), dataset=str(texts), hook=HOOK, num_texts=80, output=store, device="cpu"),
        progress=False,
    )
    for name, expansion in ((BAD_NAME, 4), ("plain", 2)):
        train(
            SAETrainConfig(
                activations_path=str(store), activation_dim=32, expansion=expansion, epochs=60, batch_size=128,
                l1_lambda=2.0, learning_rate=3e-3, warmup_steps=5, lambda_warmup_steps=20, log_every=5,
                val_fraction=0.1, runs_root=str(root / "runs"), run_name=name, device="cpu",
            )
        )  # fmt: skip
    torch.set_num_threads(threads)
    run = root / "runs" / BAD_NAME
    write_tables(run)
    made = make_report(ReportConfig(runs=(run,), device="cpu"))
    compare = make_report(ReportConfig(runs=(run, root / "runs" / "plain"), output=root / "both.html", device="cpu"))
    return Reports(run, made, compare.path)


def write_tables(run: Path) -> None:
    """What evaluate, rank and concepts leave in a run, with text that wants to be markup."""
    tables = {
        "concepts.csv": [
            {"concept": name, "parent": parent, "n_tokens": 40, "best_latent": latent, "f1": f1, "precision": f1,
             "recall": 0.5, "auroc": 0.9, "random_f1": 0.2, "token_f1": 1.0}
            for latent, (name, parent, f1) in enumerate(CONCEPTS)
        ],
        "latent_concepts.csv": [
            {"feature_idx": i, "concept": [SCRIPT, "animal", "mat"][i % 3], "f1": round(0.9 - i / 200, 3)}
            for i in range(60)
        ],
        "ranking.csv": [
            {"feature_idx": i, "rank": i + 1, "attribution": 1 / (i + 1) ** 2,
             "exact_kl": 0.5 / (i + 1) if i < 40 else "", "sample": "top" if i < 20 else "control" if i < 40 else ""}
            for i in range(N_LATENTS)
        ],
    }  # fmt: skip
    for name, rows in tables.items():
        with open(run / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    (run / "concepts.json").write_text('{"coverage": 0.6}')
    spearman = {"control": {"value": 0.9, "low": 0.8, "high": 0.95, "n": 20}, "top": {"value": 0.8, "n": 20}}
    (run / "ranking.json").write_text(json.dumps({"spearman": spearman, "n_tokens": 900, "n_exact_latents": 40}))
    evaluated = {"l0": 9.5, "fvu": 0.2, "ce_clean": 3.0, "ce_sae": 3.1, "ce_zero": 6.0, "ce_mean": 5.0}
    evaluated |= {"ce_recovered_mean": 0.95, "n_val": 90, "rows": "heldout by text"}
    evaluated["ci95"] = {"l0": [9.0, 10.0]}
    evaluated["l0_histogram"] = {"edges": [0, 5, 10, 15], "counts": [3, 60, 27]}
    (run / "eval.json").write_text(json.dumps(evaluated))


@pytest.fixture(scope="module", name="browser")
def browser_fixture() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


class Watched:
    """A page in a context of its own, with everything it asked for or complained about."""

    def __init__(self, browser: Any, path: Path, *, width: int = 1280, scheme: str = "light", script: str = ""):
        self.context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        if script:
            self.context.add_init_script(script)
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.url = path.as_uri()
        self.open("")

    def open(self, place: str) -> None:
        self.page.goto("about:blank")
        self.page.goto(self.url + place)
        self.wait("document.documentElement.dataset.ready === 'yes'")

    def ask(self, code: str) -> Any:
        return self.page.evaluate(code)

    def text(self, selector: str = "#main") -> str:
        return self.page.inner_text(selector)

    def wait(self, code: str) -> None:
        """Until `code` is true. Not wait_for_function, which polls by eval, as the page's own policy forbids."""
        for _ in range(400):
            if self.page.evaluate(code):
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"never true: {code}")

    def wait_for_latent(self, latent: int | str) -> None:
        self.wait(f"document.getElementById('latent-title')?.firstChild.data === 'Latent {latent}'")

    def fits(self) -> bool:
        return self.ask("document.documentElement.scrollWidth <= window.innerWidth")

    def check(self) -> None:
        """Nothing was said on the console, nothing but the file was asked for, and no text of the data ran."""
        assert self.said == []
        assert [url for url in self.asked if not url.startswith((self.url, "about:", "data:"))] == []
        assert self.ask("window.hacked") is None
        assert self.ask("document.querySelectorAll('#app script, #app img, #app iframe, #app style').length") == 0
        self.context.close()


@pytest.fixture(name="watched")
def watched_fixture(browser: Any, reports: Reports) -> Iterator[Watched]:
    watched = Watched(browser, reports.made.path)
    yield watched
    watched.check()


def blob(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    found = re.search(r'id="latents-0">([^<]+)<', path.read_text(encoding="utf-8"))
    assert found is not None
    return unpack(found[1])


# --- the file --------------------------------------------------------------------------------------------------------


def test_the_file_and_the_figures_are_whole(reports: Reports):
    text = reports.made.path.read_text(encoding="utf-8")
    assert reports.made.n_bytes == len(text.encode("utf-8")) < 5_000_000
    assert SCRIPT not in text and BAD_NAME not in text
    names = {path.name for path in (reports.run / "figures").iterdir()}
    for name in ("training", "density", "l0", "decoder", "effects", "attribution", "map", "concepts"):
        assert {f"{name}.png", f"{name}.csv"} <= names
    assert set(reports.made.figures) == {reports.run / "figures" / name for name in names}
    with open(reports.run / "figures" / "attribution.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40 and rows[3] == {"latent": "3", "attribution": "0.0625", "mean_kl": "0.125", "sample": "top"}
    header, arrays = blob(reports.made.path)
    with open(reports.run / "figures" / "density.csv", encoding="utf-8") as file:
        assert [int(row["n_active"]) for row in csv.DictReader(file)] == arrays["fires"].tolist()
    assert set(HOSTILE[:4]) <= {word.strip() for word in header["vocab"]}


def test_a_smaller_limit_leaves_contexts_out_and_says_so(
    reports: Reports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = reports.made.n_bytes
    monkeypatch.setattr(ReportConfig, "__post_init__", lambda self: None)  # half a megabyte is the least it allows
    limit = (whole - 5000) / 1e6
    given = {"runs": (reports.run,), "figures": False, "device": "cpu"}
    made = make_report(ReportConfig(output=tmp_path / "small.html", max_megabytes=limit, **given))
    assert made.n_bytes <= 1e6 * limit
    before, after = (blob(path)[1]["ctx_value"] for path in (reports.made.path, made.path))
    assert 0 < len(after) < len(before)
    assert "To keep this file small" in blob(made.path)[0]["notes"][0]
    from mechint.errors import MechintError

    with pytest.raises(MechintError, match="--max-megabytes"):
        make_report(ReportConfig(output=tmp_path / "none.html", max_megabytes=0.01, **given))


def test_a_run_without_its_activations_still_has_a_report(reports: Reports, browser: Any, tmp_path: Path):
    copy = tmp_path / "runs" / "moved"
    shutil.copytree(reports.run, copy, ignore=shutil.ignore_patterns("report.html", "figures", "latents.*"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "activations_path": "gone.pt"}))
    made = make_report(ReportConfig(runs=(copy,), figures=False, device="cpu"))
    watched = Watched(browser, made.path)
    assert "latents are not shown" in watched.text("#missing")
    assert watched.page.locator("#latents, #map").count() == 0 and watched.page.locator("#quality table").count() == 1
    assert not watched.page.locator("#search").is_visible()
    watched.check()


# --- reading ---------------------------------------------------------------------------------------------------------


def test_the_first_screen_tells_the_story(watched: Watched):
    assert watched.page.title().startswith(BAD_NAME)
    assert f"{N_LATENTS} latents" in watched.text("h1")
    tiles = watched.text(".tiles")
    assert "20.0 %" in tiles and "95.0 %" in tiles and "9.0 to 10.0" in tiles
    sections = watched.ask("[...document.querySelectorAll('#main section')].map(s => s.id)")
    assert sections == [
        "examples", "effects", "concepts", "map", "latents", "firing", "quality", "training", "provenance",
    ]  # fmt: skip
    charts = watched.ask(CHARTS)
    assert len(charts) >= 6 and all(role == "img" and label for role, label in charts)
    assert "0.90 (95 % interval 0.80 to 0.95) among 20 latents" in watched.text("#effects")


def test_numbers_on_the_page_are_those_of_the_run(watched: Watched, reports: Reports):
    header, arrays = blob(reports.made.path)
    latent = int(arrays["max"].argmax())
    watched.open(f"#latent={latent}")
    stats = watched.text(".stats")
    assert f"{arrays['fires'][latent]:,} of {header['n_rows']:,} tokens" in stats
    first = int(arrays["ctx_first"][latent])
    n = int(arrays["ctx_len"][first])
    words = [header["vocab"][i] for i in arrays["stream"][arrays["ctx_start"][first] :][:n]]
    shown = watched.ask(f"{TOKENS}.map(s => s.textContent)")
    visible = [re.sub("\u202e", "\u2039U+202E\u203a", word) for word in words]
    assert [word.strip() for word in shown] == [word.strip() or "\u2423" for word in visible]
    here = watched.ask(f"{TOKENS}.find(s => s.className.includes('here')).textContent")
    assert here == shown[arrays["ctx_center"][first]]
    levels = arrays["ctx_levels"][arrays["ctx_level_at"][first] :][:n]
    lit = watched.ask(f"{TOKENS}.map(s => s.classList.contains('on'))")
    assert lit == (levels > 0).tolist()


def test_search_by_number_token_and_concept(watched: Watched, reports: Reports):
    page = watched.page
    page.keyboard.press("/")
    page.keyboard.type("animal")
    page.wait_for_selector("#latent-table")
    assert f"20 of {N_LATENTS} latents match" in watched.text("#latents")
    assert all("concept animal" in reason for reason in watched.ask(REASONS))
    assert not page.locator("#effects").is_visible()
    page.keyboard.press("Escape")
    assert page.input_value("#search") == "" and page.locator("#effects").is_visible()
    page.keyboard.press("/")
    page.keyboard.type("cat")
    header, arrays = blob(reports.made.path)
    cat = [i for i, word in enumerate(header["vocab"]) if word.strip() == "cat"]
    labels = arrays["label"].reshape(N_LATENTS, -1)
    firing = {
        latent
        for latent in range(N_LATENTS)
        for c in range(arrays["ctx_first"][latent], arrays["ctx_first"][latent + 1])
        if arrays["stream"][arrays["ctx_start"][c] + arrays["ctx_center"][c]] in cat
    } | {latent for latent in range(N_LATENTS) if set(labels[latent]) & set(cat)}
    found = dict(watched.ask("[...search(RUNS[0], 'cat').latents]"))
    assert firing == {latent for latent, why in found.items() if why == "fires on it"} and firing
    assert f"{len(found)} of {N_LATENTS} latents match" in watched.text("#latents")
    assert set(watched.ask(LISTED)) <= set(found)
    page.fill("#search", "#77")
    page.keyboard.press("Enter")
    page.wait_for_selector("article.latent")
    assert watched.text("h1").startswith("Latent 77") and page.input_value("#search") == ""
    page.keyboard.press("/")
    page.keyboard.type("no such thing")
    page.wait_for_selector("#latent-table")
    assert "Nothing found" in watched.text("#latents")


def test_sorting_by_every_column(watched: Watched, reports: Reports):
    _, arrays = blob(reports.made.path)
    keys = {"effect": "effect", "density": "fires", "max": "max", "attribution": "attribution", "concept": "concept_f1"}
    for name, array in keys.items():
        watched.page.select_option("#sort", name)
        shown = watched.ask(LISTED)
        values = [float(arrays[array][latent]) for latent in shown]
        measured = [value for value in values if value == value]
        assert measured == sorted(measured, reverse=True) and measured[0] == max(
            float(v) for v in arrays[array] if v == v
        )
        pressed = watched.ask("document.querySelector('#latent-table th[aria-sort]').getAttribute('aria-sort')")
        assert pressed == "descending"
    watched.page.click("#latent-table thead th:first-child button")
    assert watched.text("#latent-table tbody tr:first-child th") == "0"
    watched.page.click("#latents > div > button.quiet")
    assert watched.page.locator("#latent-table tbody tr").count() == N_LATENTS


def test_keys_walk_the_list_and_come_back(watched: Watched):
    page = watched.page
    order = watched.ask(LISTED)
    page.locator("#latent-table tbody tr:nth-child(9)").scroll_into_view_if_needed()
    page.evaluate("window.scrollBy(0, 300)")
    before = watched.ask("window.scrollY")
    page.evaluate("document.querySelector('#latent-table tbody tr:first-child a').click()")
    page.wait_for_selector("article.latent")
    assert watched.ask("document.activeElement.id") == "latent-title" and watched.ask("window.scrollY") == 0 < before
    for key, place in (("j", 1), ("ArrowRight", 2), ("k", 1), ("ArrowLeft", 0), ("k", N_LATENTS - 1)):
        page.keyboard.press(key)
        if place < len(order):
            watched.wait_for_latent(order[place])
    page.keyboard.press("Escape")
    page.wait_for_selector("#latent-table")
    assert page.locator("article.latent").count() == 0
    assert abs(watched.ask("window.scrollY") - before) < 3  # where the reader left the list
    # by Tab alone: the first stop leads past the bar
    watched.open("")
    page.keyboard.press("Tab")
    assert watched.text(":focus") == "to the content"
    assert watched.ask("getComputedStyle(document.activeElement).outlineStyle") != "none"


def test_links_lead_from_latent_to_latent(watched: Watched, reports: Reports):
    page = watched.page
    latent = int(blob(reports.made.path)[1]["fires"].argmax())
    watched.open(f"#latent={latent}")
    shown = watched.text()
    for heading in ("Where it fires most", "Output tokens", "Nearest decoder directions", "How strongly it fires"):
        assert heading in shown
    target = watched.text(".relatives li:first-child a >> nth=0")
    page.click(".relatives li:first-child a >> nth=0")
    watched.wait_for_latent(target)
    page.go_back()
    watched.wait_for_latent(latent)
    watched.open("#latent=99999")
    assert page.locator("article.latent").count() == 0 and page.locator("#latents").count() == 1


def test_the_map_opens_a_latent(watched: Watched):
    page = watched.page
    page.locator(".map").scroll_into_view_if_needed()
    box = watched.ask(FIRST_DOT)
    page.mouse.move(*box)
    read = int(re.findall(r"Latent (\d+)", watched.text(".readout"))[0])
    page.mouse.click(*box)
    watched.wait_for_latent(read)
    watched.open("")
    for color in ("density", "effect", "concept", "max"):
        page.select_option("#map-color", color)
        kinds = watched.ask(DOT_CLASSES)
        assert kinds >= 3


def test_dark_and_light(browser: Any, reports: Reports):
    for scheme, other in (("light", "dark"), ("dark", "light")):
        watched = Watched(browser, reports.made.path, scheme=scheme)
        ground = "getComputedStyle(document.documentElement).backgroundColor"
        before = watched.ask(ground)
        assert (sum(map(int, re.findall(r"\d+", before))) < 200) == (scheme == "dark")
        watched.page.click(f"button.theme:has-text('{other}')")
        after = watched.ask(ground)
        assert after != before
        watched.page.reload()
        watched.wait("document.documentElement?.dataset.ready === 'yes'")
        assert watched.ask(ground) == after  # remembered
        for selector in ("#main p.lead", ".tile .why", ".faint", "#main a", "svg text"):
            assert contrast(watched, selector) >= 4.5, (scheme, selector)
        watched.check()


def contrast(watched: Watched, selector: str) -> float:
    """WCAG contrast of an element's text against the page."""
    colors = [
        [int(n) / 255 for n in re.findall(r"\d+", color)[:3]] for color in watched.page.evaluate(COLORS, selector)
    ]
    light = [
        sum(
            w * (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4)
            for w, c in zip((0.2126, 0.7152, 0.0722), color, strict=True)
        )
        for color in colors
    ]
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_a_phone_needs_no_scrolling_sideways(browser: Any, reports: Reports):
    for path, places in ((reports.made.path, ("", "#latent=3")), (reports.compare, ("", "#run=0", "#run=1&latent=2"))):
        watched = Watched(browser, path, width=375)
        for place in places:
            watched.open(place)
            assert watched.fits(), place
        watched.check()


def test_hostile_text_is_shown_and_never_run(watched: Watched):
    watched.page.click("button:has-text('show 103 more')")
    shown = watched.ask("document.querySelector('#main').textContent")
    assert SCRIPT in shown and BAD_NAME in shown
    pages = watched.ask(ALL_PAGES)
    assert "\u202e" not in shown + pages and "\u2039U+202E\u203a" in pages
    assert all(word in pages for word in (SCRIPT, BAD_NAME, "<!--", "&lt;b&gt;"))


def test_old_browsers_inflate_by_themselves(browser: Any, reports: Reports, watched: Watched):
    old = Watched(browser, reports.made.path, script="delete window.DecompressionStream")
    assert old.ask("typeof DecompressionStream") == "undefined"
    assert old.text() == watched.text()
    old.check()


def test_numbers_are_written_for_people(watched: Watched):
    written = {
        "short(0)": "0", "short(0.012345)": "0.0123", "short(-2.5)": "\u22122.5", "short(1234.4)": "1,234",
        "short(9.97e-5)": "1.0\u00d710\u207b\u2074", "short(-4.23e-8)": "\u22124.2\u00d710\u207b\u2078",
        "short(NaN)": "\u2013", "short(3.1e7)": "3.1\u00d710\u2077", "percent(0)": "0 %", "percent(0.0536)": "5.4 %",
        "percent(0.39)": "39 %",
        "percent(0.0996)": "10 %", "percent4(0.99763)": "99.76 %", "whole(1234567)": "1,234,567",
        "visible('\\n')": "\u21b5", "visible(' ')": "\u2423", "visible(' a')": " a",
        "visible('\\u200f')": "\u2039U+200F\u203a",
    }  # fmt: skip
    assert {code: watched.ask(code) for code in written} == written
    ticks = {
        "niceTicks(0, 10, 4)": [0, 2.5, 5, 7.5, 10],
        "logTicks(0.5, 200, 6)": [1, 10, 100],
        "logTicks(15, 90, 6)": [20, 30, 50],
    }
    assert {code: watched.ask(code) for code in ticks} == ticks
    assert watched.ask("histogram([0, 1, 1.5, 2, 3, NaN, -1], [0, 1, 2, 3])") == [1, 2, 2]


@pytest.mark.parametrize(
    "level, strategy", [(0, 0), (6, 0), (9, zlib.Z_FIXED), (1, zlib.Z_HUFFMAN_ONLY), (9, zlib.Z_RLE)]
)
def test_every_kind_of_deflated_block_is_read(watched: Watched, level: int, strategy: int):
    rng = random.Random(1)
    data = bytes(rng.choices(range(256), k=30_000)) + b"the cat sat on the mat. " * 4000 + bytes(70_000)
    for piece in (data, b"", b"a"):
        packer = zlib.compressobj(level, zlib.DEFLATED, 15, 8, strategy)
        packed = packer.compress(piece) + packer.flush()
        code = "bytes => { const d = inflateHere(Uint8Array.from(bytes)); return [d.length, Array.from(d).join(',')]; }"
        length, text = watched.page.evaluate(code, list(packed))
        assert length == len(piece) and text == ",".join(map(str, piece))


def test_several_runs_side_by_side(browser: Any, reports: Reports):
    watched = Watched(browser, reports.compare)
    page = watched.page
    assert "against plain" in watched.text("h1")
    head = watched.text("#measured thead")
    assert "plain" in head and BAD_NAME in head
    assert "expansion" in watched.text("#settings")
    assert page.locator("#matches .plot svg").count() == 2
    page.click(".runs a:has-text('plain')")
    page.wait_for_selector("#latent-table")
    assert "64 latents" in watched.text("h1")
    page.click("#latent-table tbody tr:first-child a")
    page.wait_for_selector("article.latent")
    assert "In the other runs" in watched.text()
    page.click("section:has-text('In the other runs') a")
    watched.wait("document.title.endsWith('onerror=window.hacked=2>')")
    assert f"of {BAD_NAME}" in watched.text()
    watched.check()


def test_printing_leaves_the_controls_out(watched: Watched):
    watched.page.emulate_media(media="print")
    assert not watched.page.locator(".top").is_visible() and watched.page.locator("h1").is_visible()
    assert watched.ask("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    assert len(watched.page.pdf()) > 20_000
