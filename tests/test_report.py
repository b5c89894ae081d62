"""The report's data: what is read from a run, what is said of it, and that the page carries it unchanged."""

import base64
import hashlib
import json
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mechint.analysis import GatherSettings, Latents, contexts, gather
from mechint.cli.flags import parse
from mechint.cli.report import main
from mechint.config import ConceptsConfig, EvalConfig, RankConfig, ReportConfig, SAETrainConfig
from mechint.data.store import Activations
from mechint.errors import MechintError
from mechint.models import load_model
from mechint.report import facts as run_files
from mechint.report.html import examples
from mechint.report.latents import NONE, Look, contexts_of, labels, look, spelled
from mechint.report.pack import json_for_script, pack, unpack
from mechint.report.page import page
from mechint.report.side_by_side import compare_facts, differing_settings
from mechint.report.story import story, where
from mechint.runs import Run
from mechint.sae import StandardSAE

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!--",
    "\u202egnp.exe",
    "a\u2028b",
    "\ud800",
]


# --- data inside a page ----------------------------------------------------------------------------------------------


def test_packed_data_comes_back():
    arrays = {
        "a": np.arange(7, dtype=np.uint8),
        "b": np.array([1.5, np.nan, -2e-30], np.float32),
        "c": np.array([[1, -2], [3, 32767]], np.int16),
        "d": np.array([NONE, 0], np.uint32),
        "e": np.zeros(0, np.uint16),
    }
    header, found = unpack(pack({"name": "\u00e4 <b>", "x": 1}, arrays))
    assert header == {"name": "\u00e4 <b>", "x": 1}
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array.reshape(-1))
        assert found[name].dtype == array.dtype
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", pack({"t": HOSTILE[:4]}, arrays))


def test_json_cannot_end_its_script():
    text = json_for_script({"words": HOSTILE, "nan": float("nan"), "deep": [{"inf": float("inf")}], "n": 1.5})
    assert not set(text) & set("<>&\u2028\u2029")
    text.encode("utf-8")
    assert json.loads(text) == {"words": HOSTILE, "nan": None, "deep": [{"inf": None}], "n": 1.5}


class Scripts(HTMLParser):
    """The text of each script and style of a page, and all attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[dict[str, Any], str]] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.inside: dict[str, Any] | None = None

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.inside = {"tag": tag, **dict(attrs)} if tag in ("script", "style") else None

    def handle_data(self, data: str) -> None:
        if self.inside is not None:
            self.found.append((self.inside, data))
            self.inside = None


def test_the_page_allows_its_own_script_and_nothing_else():
    text = page({"x": HOSTILE[:4]}, [None, "AAAA"], title="<b>", description='"quoted" & <i>', version="1")
    parser = Scripts()
    parser.feed(text)
    (policy,) = [value for _, name, value in parser.attributes if name == "content" and "default-src" in str(value)]
    style, facts, blob, script = parser.found
    assert style[0]["tag"] == "style" and facts[0]["id"] == "facts" and blob[0]["id"] == "latents-1"
    for (_, body), name in ((style, "style-src"), (script, "script-src")):
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in str(policy)
    assert "default-src 'none'" in str(policy) and "unsafe" not in str(policy) and "http" not in str(policy)
    assert json.loads(facts[1]) == {"x": HOSTILE[:4]}
    assert "<title>&lt;b&gt;</title>" in text
    # nothing is fetched: no address but the empty icon, and none of the namespaces is loaded
    assert [value for _, name, value in parser.attributes if name in ("src", "href")] == ["data:,"]
    assert set(re.findall(r"https?://[^\"'\s]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in text and "eval(" not in text and "document.write" not in text


# --- latents ---------------------------------------------------------------------------------------------------------


def make_activations(folder: Path, lengths: tuple[int, ...] = (9, 3, 14, 1, 6), d_in: int = 8) -> Activations:
    generator = torch.Generator().manual_seed(0)
    n = sum(lengths)
    columns = {
        "tokens": torch.randint(3, 20, (n,), generator=generator),
        "text_ids": torch.tensor([10 * i for i, length in enumerate(lengths) for _ in range(length)]),
        "positions": torch.tensor([p + 1 for length in lengths for p in range(length)]),
    }
    save_file(columns, folder / "columns.safetensors")
    return Activations(
        folder / "x.pt", {}, [torch.randn(n, d_in, generator=generator)], [folder / "columns.safetensors"]
    )


def make_sae(d_sae: int = 12, d_in: int = 8, *, dead: tuple[int, ...] = ()) -> StandardSAE:
    sae = StandardSAE(d_in, d_sae, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for latent in dead:
            sae.b_enc[latent] = -100.0
    return sae


SMALL = GatherSettings(k=4, n_sample=10, n_strata=2, n_examples=2, n_partners=3)


def test_contexts_hold_tokens_and_values_of_their_rows(tmp_path: Path):
    activations, sae = make_activations(tmp_path), make_sae(dead=(5,))
    gathered = gather(sae, activations, SMALL)
    arrays, stream, breaks = contexts_of(sae, gathered, activations, n_top=3, n_quantile=2, window=4)
    values = sae.encode(activations.tensor()).detach().numpy()
    first = arrays["ctx_first"]
    assert first[0] == 0 and first[-1] == len(arrays["ctx_value"]) and first[5] == first[6]
    starts = {0: 0, 10: 9, 20: 12, 30: 26, 40: 27}
    ends = {0: 9, 10: 12, 20: 26, 30: 27, 40: 33}
    shown = 0
    for latent in range(12):
        rows = []
        for c in range(first[latent], first[latent + 1]):
            text, at, n = int(arrays["ctx_text"][c]), int(arrays["ctx_start"][c]), int(arrays["ctx_len"][c])
            row = starts[text] + int(arrays["ctx_position"][c]) - 1
            (expected,) = contexts(activations, [row], window=4)
            assert stream[at : at + n].tolist() == expected.tokens and arrays["ctx_center"][c] == expected.center
            levels = arrays["ctx_levels"][arrays["ctx_level_at"][c] : arrays["ctx_level_at"][c] + n]
            np.testing.assert_allclose(
                levels * (values[:, latent].max() / 255),
                values[expected.rows, latent],
                atol=values[:, latent].max() / 255,
            )
            assert (levels > 0).tolist() == (values[expected.rows, latent] > 0).tolist()
            assert arrays["ctx_value"][c] == pytest.approx(values[row, latent], rel=1e-5)
            cut = (expected.rows[0] > starts[text]) + 2 * (expected.rows[-1] + 1 < ends[text])
            assert arrays["ctx_cut"][c] == cut
            rows.append(row)
            shown += 1
        assert len(set(rows)) == len(rows), "a row is shown once a latent"
        strata = arrays["ctx_stratum"][first[latent] : first[latent + 1]].tolist()
        assert strata == sorted(strata)
        top = [values[row, latent] for row, s in zip(rows, strata, strict=True) if s == 0]
        assert top == sorted(top, reverse=True) and len(top) == min(3, int((values[:, latent] > 0).sum()))
        high, low = (
            [values[r, latent] for r, s in zip(rows, strata, strict=True) if s == stratum] for stratum in (1, 2)
        )
        assert not high or not low or min(high) >= max(low)
    assert shown > 40
    # the stream is the texts' own tokens, and goes on where theirs do
    assert breaks[0] == 0 and set(arrays["ctx_start"][arrays["ctx_cut"] % 2 == 0].tolist()) <= set(breaks.tolist())
    assert activations.tokens is not None
    text = activations.tokens.tolist()
    for part in np.split(stream, breaks[1:]):
        assert any(text[i : i + len(part)] == part.tolist() for i in range(33))


def look_at(sae: StandardSAE, gathered: Latents, activations: Activations, **more: Any) -> Look:
    given = {"effects": {}, "concepts": {}, **more}
    return look(sae, gathered, activations, None, **given)


def test_look_keeps_what_was_measured_and_leaves_gaps(tmp_path: Path):
    activations, sae = make_activations(tmp_path), make_sae(dead=(5,))
    gathered = gather(sae, activations, SMALL)
    effects = {"effect": {0: 0.5, 3: 0.0, 99: 7.0}, "exact": {0: 0.5}, "attribution": {0: 0.25}, "control": {0: 1.0}}
    shown = look_at(sae, gathered, activations, effects=effects, concepts={1: ("city", 0.75), 2: ("animal", 0.5)})
    arrays, header = shown.arrays, shown.header
    values = sae.encode(activations.tensor()).detach()
    assert arrays["fires"].tolist() == (values > 0).sum(dim=0).tolist() and arrays["fires"][5] == 0
    assert arrays["effect"][:4].tolist() == pytest.approx([0.5, np.nan, np.nan, 0.0], nan_ok=True)
    assert np.isnan(arrays["effect"][4:]).all() and arrays["control"].tolist() == [1] + [0] * 11
    assert [header["concepts"][i] if i >= 0 else None for i in arrays["concept"][:4]] == [None, "city", "animal", None]
    edges, counts = arrays["hist_edges"], arrays["hist"].reshape(12, -1)
    assert len(edges) == counts.shape[1] + 1 == header["hist_bins"] + 1
    for latent in range(12):
        np.testing.assert_array_equal(counts[latent], np.histogram(values[:, latent][values[:, latent] > 0], edges)[0])
    unit = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-2)
    width = header["neighbours_width"]
    assert arrays["neighbours"].reshape(12, width)[:, 0].tolist() == cosine.argmax(dim=1).tolist()
    np.testing.assert_allclose(arrays["neighbour_cos"].reshape(12, width)[:, 0] / 1e4, cosine.amax(dim=1), atol=1e-4)
    assert arrays["map"].dtype == np.int16 and abs(int(arrays["map"].max())) <= 32767
    assert header["logit_width"] == 0 and not shown.notes


def test_labels_are_the_commonest_firing_tokens(tmp_path: Path):
    activations, sae = make_activations(tmp_path), make_sae(dead=(5,))
    gathered = gather(sae, activations, SMALL)
    stored = np.array([7] * 33)
    assert labels(gathered, stored)[0].tolist() == [7, NONE, NONE, NONE]
    assert labels(gathered, stored)[5].tolist() == [NONE] * 4
    placed, words = spelled({"label": labels(gathered, stored), "stream": np.array([3, 7, 3])}, None)
    assert words == ["#3", "#7"] and placed["stream"].tolist() == [0, 1, 0] and placed["label"][0, 0] == 1
    assert placed["label"][5, 0] == NONE


def test_the_stream_is_spelled_as_text(tmp_path: Path):
    """Characters that several tokens share are whole there; a token by itself keeps its space."""
    model = load_model("builtin/pythia-tiny", device="cpu")
    parts = [model.token_lists([text])[0] for text in ("In Paris, \u5317\u4eac", "\u4eac the")]
    cut = parts[1][1:]  # a window that begins inside a character
    label = np.array([[model.token_lists([" Paris"])[0][0], NONE]], np.uint32)
    placed, words = spelled({"label": label, "stream": np.array(parts[0] + cut)}, model, np.array([0, len(parts[0])]))
    shown = [words[place] for place in placed["stream"]]
    assert "".join(shown[: len(parts[0])]) == "In Paris, \u5317\u4eac"
    assert "".join(shown[len(parts[0]) :]).lstrip("\ufffd") == " the"
    assert words[placed["label"][0, 0]] == " Paris" and placed["label"][0, 1] == NONE
    assert len(set(words)) == len(words)


def test_examples_say_by_which_rule_they_are_there(tmp_path: Path):
    activations, sae = make_activations(tmp_path), make_sae(dead=(5,))
    gathered = gather(sae, activations, SMALL)
    effects = {"effect": {i: 0.1 * i for i in range(12)}}
    found = examples(look_at(sae, gathered, activations, effects=effects))
    assert [one["latent"] for one in found[:2]] == [11, 10] and "largest effect" in found[0]["why"]
    assert "second largest" in found[1]["why"]
    assert len(found) == 6 == len({one["latent"] for one in found}) and 5 not in {one["latent"] for one in found}


def test_activations_without_tokens_give_a_note(tmp_path: Path):
    bare = Activations(tmp_path / "bare.pt", {}, [torch.randn(30, 8)], [])
    sae = make_sae()
    shown = look_at(sae, gather(sae, bare, SMALL), bare)
    assert (shown.tokens["label"] == NONE).all() and "stored without their tokens" in shown.notes[0]
    assert shown.header["has_tokens"] is False
    assert not any("on one token" in one["why"] for one in examples(shown))  # nobody knows


# --- a run's files ---------------------------------------------------------------------------------------------------


def make_run(folder: Path, *, steps: int = 20, done: bool = True, **settings: Any) -> Path:
    """The files of a run, as training leaves them, without weights."""
    folder.mkdir(parents=True)
    config = SAETrainConfig(activations_path="nowhere.pt", activation_dim=8, expansion=2, epochs=steps, **settings)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    lines = ["step,loss,mse,l1,l0,dead_features,lr,lam"] + [f"{i},1.0,0.5,0.1,0.25,0,0.001,3" for i in range(steps)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    if done:
        summary = {"l0": 4.0, "fvu": 0.25, "num_features": 16, "n_train": 900, "n_val": 100, "dead_features": 2}
        manifest = {"manifest_version": 1, "summary": summary, "git_commit": "abc", "inputs": {}, "outputs": {}}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_runs_that_cannot_be_reported_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    empty, plain = tmp_path / "empty", tmp_path / "plain"
    for folder in (empty, plain):
        folder.mkdir()
    (plain / "notes.txt").write_text("x")
    unfinished = make_run(tmp_path / "unfinished", steps=20, done=False)
    for path, words in (
        (empty, "is empty"),
        (plain, "not a run directory"),
        (tmp_path / "none", "not found"),
        (unfinished, r"not finished \(step 19 of 20\).*--resume"),
    ):
        assert main([str(path)]) == 2
        said = capsys.readouterr().err
        assert re.search(words, said) and said.count("\n") == 1, said
    assert main([]) == 2 and "runs" in capsys.readouterr().err.lower()


def test_outputs_that_exist_are_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture):
    run = make_run(tmp_path / "run")
    (run / "report.html").write_text("mine")
    assert main([str(run)]) == 2 and "--overwrite" in capsys.readouterr().err
    (run / "report.html").unlink()
    (run / "figures").mkdir()
    assert main([str(run)]) == 2 and "--no-figures" in capsys.readouterr().err
    assert main([str(run), "--output", str(tmp_path / "x.txt")]) == 2 and ".html" in capsys.readouterr().err
    assert main([str(run), str(run)]) == 2 and "--output" in capsys.readouterr().err
    with pytest.raises(MechintError, match="window"):
        ReportConfig(runs=(run,), window=0)


def test_facts_name_what_is_missing_and_what_makes_it(tmp_path: Path):
    run = Run(make_run(tmp_path / "a run", l1_lambda=0.5, warmup_steps=7))
    facts = run_files.run_facts(run)
    assert (facts["d_sae"], facts["steps"], facts["evaluated"]) == (16, 20, False)
    commands = {shlex.split(item["command"])[1]: shlex.split(item["command"])[2:] for item in facts["missing"]}
    configs = {"eval": EvalConfig, "concepts": ConceptsConfig, "rank": RankConfig}
    assert set(commands) == set(configs)
    for name, argv in commands.items():  # what the page tells to type can be typed
        config = parse(configs[name], argv, prog=name)
        assert Path(config.sae or "") == run.path
    changed = {row["name"]: (row["value"], row["default"]) for row in facts["settings"]}
    assert changed["l1_lambda"] == ("0.5", "3") and changed["warmup_steps"][0] == "7"
    assert "activations_path" not in changed and "seed" not in changed
    assert facts["curves"]["l0_count"] == [4.0] * 20 and facts["curves"]["step"] == list(range(20))
    assert "fvu" not in facts["curves"]  # a column that the file lacks


def test_long_curves_are_thinned_and_keep_their_last_point(tmp_path: Path):
    curves = run_files.run_facts(Run(make_run(tmp_path / "run", steps=1999)))["curves"]["step"]
    assert len(curves) <= 401 and curves[0] == 0 and curves[-1] == 1998


def test_tables_are_read_as_they_are_written(tmp_path: Path):
    run = Run(make_run(tmp_path / "run"))
    path = run.path
    concepts = "concept,parent,f1,best_latent,n_tokens\nnan,,0.2,3,10\ncity,place,0.9,4,20\n"
    (path / "concepts.csv").write_text(concepts)
    (path / "concepts.json").write_text('{"coverage": 0.55, "notes": []}')
    (path / "latent_concepts.csv").write_text("feature_idx,concept,f1\n4,city,0.9\n5,,\n")
    (path / "ranking.csv").write_text(
        "feature_idx,rank,attribution,exact_kl,sample\n3,1,0.5,0.25,top\n4,2,0.1,,\n9,3,0.01,0.002,control\n"
    )
    both = {"control": {"value": 0.86, "low": 0.7, "high": 0.93, "n": 60}, "top": {"value": 0.4, "n": 50}}
    (path / "ranking.json").write_text(json.dumps({"spearman": both, "n_tokens": 1000, "n_exact_latents": 2}))
    facts = run_files.run_facts(run)
    assert [row["concept"] for row in facts["concepts"]["rows"]] == ["city", "nan"]
    assert facts["concepts"]["summary"] == {"coverage": 0.55}
    assert run_files.latent_concepts(run) == {4: ("city", 0.9)}
    text = facts["ranking"]["correlation_text"]
    assert (
        "0.86 (95 % interval 0.70 to 0.93) among 60 latents drawn at random" in text
        and "0.40 among the first 50" in text
    )
    assert "orders the first ones badly" in facts["ranking"]["reading"]
    effects = run_files.latent_effects(run)
    assert effects["exact"] == effects["effect"] == {3: 0.25, 9: 0.002} and effects["control"] == {9: 1.0}
    assert effects["attribution"] == {3: 0.5, 4: 0.1, 9: 0.01}
    (path / "ablation.csv").write_text("feature_idx,mean_kl\n" + "".join(f"{i},{i / 10}\n" for i in range(16)))
    effects = run_files.latent_effects(run)
    assert len(effects["effect"]) == 16 and effects["exact"] == {3: 0.25, 9: 0.002}
    (path / "ranking.csv").write_text("feature_idx,attribution\nx,1\n")
    with pytest.raises(MechintError, match="feature_idx.*'x'"):
        run_files.latent_effects(run)


# --- words -----------------------------------------------------------------------------------------------------------


def make_facts(**quality: Any) -> dict[str, Any]:
    return {
        "name": "a", "architecture": "topk", "d_in": 8, "d_sae": 16, "hook": "blocks.3.hook_resid_post",
        "model": "org/m", "steps": 10, "batch_size": 4, "dataset": "data", "concepts": None, "evaluated": True,
        "quality": quality,
    }  # fmt: skip


def test_the_story_says_what_the_numbers_say():
    quality = {"l0": 4.0, "fvu": 0.25, "ce_clean": 1.0, "ce_sae": 1.5, "ce_mean": 5.0, "ce_recovered_mean": 0.875}
    facts = make_facts(**quality, ci95={"fvu": [0.2, 0.3]}, n_train=900, n_val=100)
    told = story(facts, None, 0)
    assert told["title"] == "16 latents in the residual stream after layer 3 of m"
    assert "from 1.000 to 1.500 nats" in told["text"] and "it would be 5.000" in told["text"]
    tiles = {tile["label"]: tile for tile in told["tiles"]}
    assert tiles["of the variance is missed"]["value"] == "25.0 %"
    assert "20.0 to 30.0" in tiles["of the variance is missed"]["meaning"]
    assert "75 % below that of the mean" in tiles["of the variance is missed"]["meaning"]
    assert tiles["latents describe a token"]["meaning"] == "L0: 25 % of 16 are active."
    assert tiles["of the model\u2019s loss is kept"]["value"] == "87.5 %"
    assert told["caution"] is None
    assert where("blocks.3.attn.hook_z") == "blocks.3.attn.hook_z"


def test_outliers_do_not_make_the_headline():
    """A run whose FVU is that of a few rows of extreme norm, against one that is worse on all others."""
    typical = {"fvu": 0.137, "n_outliers": 15, "norm_limit": 1633.2}
    facts = make_facts(l0=38.0, fvu=10.23, ci95={"fvu": [9.0, 11.0]}, without_outliers=typical)
    told = story(facts, None, 0)
    (tile,) = (tile for tile in told["tiles"] if tile["label"] == "of the variance is missed")
    assert tile["value"] == "13.7 %" and "More than half" not in (told["caution"] or "")
    assert "without the 15 whose norm is above 1.63e+03" in tile["meaning"] and "With them: 1023.0 %" in tile["meaning"]
    worse = make_facts(l0=32.0, fvu=0.151, ci95={"fvu": [0.1, 20.0]}, without_outliers={**typical, "fvu": 0.145})
    all_facts = [{**one, "name": name, "all_settings": {}} for name, one in (("topk", worse), ("standard", facts))]
    text = compare_facts(all_facts, [make_sae(6), make_sae(9)], [None, None])["text"]
    assert text == "topk is the sparsest (L0 32.0). standard leaves the least variance unexplained (0.137)."


def test_the_story_warns_where_it_must():
    facts = make_facts(fvu=0.6, rows="heldout by row", ce_recovered_mean=0.5)
    arrays = {"fires": np.array([0, 0, 5, 5], np.uint32), "effect": np.array([4.0, 3.0, 2.0, 1.0], np.float32)}
    told = story(facts, arrays, 10)
    for words in ("split by row", "50 % of the latents are dead", "More than half of the variance", "loses much"):
        assert words in told["caution"]
    tiles = {tile["label"]: tile["value"] for tile in told["tiles"]}
    assert tiles["of 4 latents are dead"] == "2"
    assert tiles["latents carry half of the effect"] == "2"  # 4 of 10 is less than half, 4 + 3 is more
    worse = story(make_facts(fvu=1.2), None, 0)["tiles"][0]["meaning"]
    assert "Worse than the mean" in worse
    assert story({**make_facts(), "evaluated": False}, None, 0)["caution"].endswith("has not been measured.")


# --- several runs ----------------------------------------------------------------------------------------------------


def test_several_runs_tell_what_differs_and_match_their_latents(tmp_path: Path):
    activations = make_activations(tmp_path)
    left, right = make_sae(6), make_sae(9)
    with torch.no_grad():
        right.W_dec[4] = left.W_dec[2]
    looks = [look_at(sae, gather(sae, activations, SMALL), activations) for sae in (left, right)]
    all_facts = [
        {**make_facts(l0=l0, fvu=fvu), "name": name, "all_settings": {"lam": lam, "seed": "1", "run_name": name}}
        for name, l0, fvu, lam in (("a", 4.0, 0.3, "1"), ("b", 6.0, 0.2, "2"))
    ]
    found = compare_facts(all_facts, [left, right], looks)
    assert found["settings"] == [{"name": "lam", "values": ["1", "2"]}] == differing_settings(all_facts)
    assert found["text"] == "a is the sparsest (L0 4.0). b leaves the least variance unexplained (0.200)."
    for facts, interval in zip(all_facts, ([0.25, 0.35], [0.15, 0.26]), strict=True):
        facts["quality"]["ci95"] = {"fvu": interval}
    text = compare_facts(all_facts, [left, right], [None, None])["text"]
    assert text.startswith("a is the sparsest (L0 4.0). In the variance left unexplained the best two cannot be told")
    assert [(m["left"], m["right"]) for m in found["matches"]] == [(0, 1), (1, 0)]
    assert sum(found["matches"][0]["mutual"]) + sum(found["matches"][0]["onesided"]) == 6
    assert looks[0].arrays["twin_1"][2] == 4 and looks[0].arrays["twin_cos_1"][2] == 10_000
    assert looks[1].arrays["twin_0"][4] == 2 and looks[1].arrays["twin_mutual_0"][4] == 1
    other = {**all_facts[1], "hook": "blocks.4.hook_resid_post"}
    apart = compare_facts([all_facts[0], other], [left, right], [None, None])
    assert apart["matches"] == [] and "blocks.4" in apart["no_matches"]


# --- weight ----------------------------------------------------------------------------------------------------------


def test_help_needs_none_of_the_heavy_packages():
    code = (
        "import sys\nfrom mechint.cli.report import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'matplotlib', 'sklearn', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]") and "--overwrite" in done.stdout
