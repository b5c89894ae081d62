"""Labels over real activations, and `score_concepts` on a small real run of the built-in world."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mechint.builtin.tales import CONCEPTS, tale, token_labels
from mechint.cli.concepts import main
from mechint.concepts import label_stored, label_tales, label_texts, read_span_file, score_concepts, stored_texts
from mechint.config import CollectConfig, ConceptsConfig
from mechint.data import collect_activations
from mechint.data.store import open_activations
from mechint.errors import MechintError
from mechint.inside import Inside, open_inside
from mechint.runs import Run

from small_run import make_small_run  # isort: skip

N_LABELLED = 40  # texts of the user's own files


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_small_run(tmp_path_factory.mktemp("concepts"))


@pytest.fixture(scope="module")
def subject(run: Run) -> Inside:
    return open_inside(run.path, device="cpu")


@pytest.fixture(scope="module")
def tokenizer(subject: Inside):
    return subject.model.tokenizer


@pytest.fixture(scope="module")
def scored(run: Run):
    return score_concepts(ConceptsConfig(run_dir=run.path, device="cpu"))


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- labels -----------------------------------------------------------------------------------------------------------


def test_labels_of_stored_rows_are_the_generators_own(run: Run, tokenizer):
    """Against `token_labels`, the definition, which looks at every token and span one by one."""
    activations = open_activations(run.activations_path())
    labelled = label_tales(activations, tokenizer, max_texts=25)
    assert labelled.labels.any(axis=0).sum() > 60
    assert (np.unique(labelled.text_ids) == np.arange(25)).all()
    for number in range(25):
        told = tale(number, "train", 42)
        offsets = tokenizer([told.text[:512]], add_special_tokens=False, return_offsets_mapping=True).offset_mapping[0]
        wanted = token_labels(told, offsets)
        of_text = labelled.labels[labelled.text_ids == number]
        assert len(of_text) == len(offsets)
        for column, concept in enumerate(labelled.concepts):
            assert of_text[:, column].tolist() == wanted.get(concept, [False] * len(offsets)), concept


@pytest.mark.parametrize(
    "layout",
    [
        {"context_size": 20},
        {"context_size": 20, "keep_bos": True},
        {"context_size": 20, "bos_every_window": False},
        {"context_size": 20, "prepend_bos": False},
        {"pack": True, "context_size": 50},
        {"pack": True, "context_size": 50, "keep_bos": True},
        {"pack": True, "context_size": 50, "bos_every_window": False, "keep_bos": True},
        {"pack": True, "context_size": 50, "prepend_bos": False},
    ],
    ids=str,
)
def test_labels_do_not_depend_on_how_texts_are_laid_out(run: Run, tokenizer, layout: dict, tmp_path: Path):
    expected = label_tales(open_activations(run.activations_path()), tokenizer, max_texts=12)
    store = tmp_path / "store"
    config = CollectConfig(
        model="builtin/pythia-tiny", dataset="builtin/tales", hook="blocks.0.hook_resid_pre", num_texts=12,
        output=store, device="cpu", **layout,
    )  # fmt: skip
    collect_activations(config, progress=False)
    rows = open_activations(store)
    labelled = label_tales(rows, tokenizer)
    assert (labelled.text_ids == expected.text_ids).all() and (labelled.tokens == expected.tokens).all()
    assert (labelled.labels == expected.labels).all() and labelled.n_spans == expected.n_spans
    assert stored_texts(rows, tokenizer) == {number: tale(number, "train", 42).text[:512] for number in range(12)}


def test_rows_of_bos_are_left_out_and_the_rest_keep_their_places(run: Run, tokenizer):
    activations = open_activations(run.activations_path())
    labelled = label_tales(activations, tokenizer)
    assert (np.diff(labelled.indices) > 0).all()
    assert activations.tokens is not None
    assert (labelled.tokens == activations.tokens.numpy()[labelled.indices]).all()
    assert 0 not in labelled.tokens
    got = torch.cat(list(labelled.batches(labelled.text_ids == 7, 50)))
    assert torch.equal(got, activations.rows(torch.from_numpy(labelled.indices[labelled.text_ids == 7])))


def test_tales_that_are_told_differently_now_are_refused(run: Run, tokenizer):
    activations = open_activations(run.activations_path())
    activations.info = {**activations.info, "seed": 43}
    with pytest.raises(MechintError, match="not those of tale 0"):
        label_tales(activations, tokenizer)
    activations.info = {**activations.info, "dataset_name": "openwebtext"}
    with pytest.raises(MechintError, match="--labels FILE.csv"):
        label_tales(activations, tokenizer)


def write_labels(path: Path, by: str, concepts: tuple[str, ...], line_breaks: bool = False) -> Path:
    """The tales' own spans of some concepts as a user would write them down."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow([by, "start", "end", "concept", "parent"])
        for number in range(N_LABELLED):
            told = tale(number, "train", 42)
            text = told.text[:512]
            name = number if by == "text_id" else text
            out.writerow([name, "", "", "", ""])
            for span in told.spans:
                if span.concept in concepts and span.end <= len(text):
                    out.writerow([name, span.start, span.end, span.concept, CONCEPTS[span.concept].parent])
    return path


@pytest.mark.parametrize("by", ["text_id", "text"])
def test_a_users_labels_give_what_the_built_in_ones_give(run: Run, subject: Inside, tmp_path: Path, by: str):
    file = read_span_file(write_labels(tmp_path / "labels.csv", by, ("city", "capital", "country", "colour")))
    activations = open_activations(run.activations_path())
    built_in = label_tales(activations, subject.model.tokenizer, max_texts=N_LABELLED)
    mine = label_stored(activations, subject.model.tokenizer, file) if by == "text_id" else label_texts(subject, file)
    assert set(mine.concepts) == {"city", "capital", "country", "colour", "place"}
    for concept in ("city", "capital", "country", "colour"):
        ours = mine.labels[:, mine.concepts.index(concept)]
        assert ours.any()
        assert (ours == built_in.labels[:, built_in.concepts.index(concept)]).all()
    place = mine.labels[:, mine.concepts.index("place")]
    either = mine.labels[:, [mine.concepts.index("city"), mine.concepts.index("country")]].any(axis=1)
    assert (place == either).all()
    vectors = [torch.cat(list(each.batches(np.ones(len(each.indices), dtype=bool), 512))) for each in (mine, built_in)]
    assert torch.allclose(*vectors, atol=1e-3)


def test_text_that_is_tokenised_otherwise_when_read_again_keeps_its_places(run: Run, tokenizer, tmp_path: Path):
    """Stored tokens of a word in other pieces than the tokenizer's: the characters of each are found all the same."""
    pieces = [token for letter in "weekday" for token in tokenizer(letter, add_special_tokens=False).input_ids]
    words = tokenizer(" cat sat", add_special_tokens=False).input_ids
    ids = torch.tensor([*pieces, *words, *pieces])
    text = tokenizer.decode(ids)
    assert tokenizer(text, add_special_tokens=False).input_ids != ids.tolist()
    path = tmp_path / "odd.pt"
    torch.save(torch.randn(len(ids), 8), path)
    info = {**open_activations(run.activations_path()).info, "n_rows": len(ids), "d_in": 8, "shards": []}
    path.with_suffix(".json").write_text(json.dumps({"activation_path": str(path), "store": info}))
    columns = {
        "tokens": ids.int(),
        "text_ids": torch.zeros(len(ids), dtype=torch.int32),
        "positions": torch.arange(1, len(ids) + 1, dtype=torch.int32),
    }
    save_file(columns, path.with_suffix(".tokens.safetensors"))
    labels = tmp_path / "labels.csv"
    start = text.index("cat")
    labels.write_text(f"text_id,start,end,concept\n0,{start},{start + 3},animal\n0,4,7,day\n")
    labelled = label_stored(open_activations(path), tokenizer, read_span_file(labels))
    marked = [tokenizer.decode(ids[labelled.labels[:, column]]) for column in range(2)]
    assert marked == [" cat", "day"]


def test_a_tokenizer_that_does_not_say_its_characters_is_refused(run: Run):
    class Slow:
        is_fast = False

    with pytest.raises(MechintError, match="Slow does not say which characters"):
        label_tales(open_activations(run.activations_path()), Slow(), max_texts=2)


def test_stored_texts_are_the_tales(run: Run, tokenizer):
    texts = stored_texts(open_activations(run.activations_path()), tokenizer, 30)
    assert texts == {number: tale(number, "train", 42).text[:512] for number in range(30)}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("300,0,4,a", "labels text 300, but"),
        ("3,0,9999,a", "line 2: the span ends at character 9999, but text 3 has"),
        ("3,{blank},{after},a", "line 2: ' ' \\(a\\) matches no token"),
    ],
)
def test_labels_that_match_nothing_are_refused(run: Run, tokenizer, tmp_path: Path, line: str, said: str):
    blank = tale(3, "train", 42).text.index(" ")
    path = tmp_path / "labels.csv"
    path.write_text("text_id,start,end,concept\n" + line.format(blank=blank, after=blank + 1) + "\n")
    with pytest.raises(MechintError, match=said):
        label_stored(open_activations(run.activations_path()), tokenizer, read_span_file(path))


def test_spans_behind_what_the_model_reads_are_left_out_and_said(subject: Inside, tmp_path: Path):
    text = " ".join(tale(number, "heldout", 0).text for number in range(6))
    assert len(subject.tokenize([text])[0]) == subject.model.n_ctx
    path = tmp_path / "labels.csv"
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["text", "start", "end", "concept"])
        out.writerow([text, 0, 4, "early"])
        out.writerow([text, len(text) - 3, len(text), "late"])
    labelled = label_texts(subject, read_span_file(path))
    assert labelled.labels.sum(axis=0).tolist() == [1, 0]
    assert labelled.n_spans == [1, 0]
    assert "1 spans lie behind" in labelled.notes[0]


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_known_concepts_are_found_far_above_the_baselines(scored):
    summary = scored.summary
    assert summary["n_concepts"] > 50
    for name, other in summary["baselines"].items():
        assert summary["coverage"] > 1.3 * other["coverage"], name
    assert summary["ci95"]["coverage"][0] > summary["baselines"]["random"]["ci95"]["coverage"][1]
    of = {row["concept"]: row for row in scored.concepts}
    for concept in ("country", "number", "colour", "occupation", "animal"):
        assert of[concept]["f1"] > of[concept]["random_f1"] + 0.2, concept
        assert of[concept]["f1"] > 2 * of[concept]["always_f1"]
    assert summary["probe_auroc"]["1"] < summary["probe_auroc"]["5"] < summary["probe_auroc_dense"]
    assert summary["probe_auroc_dense"] > 0.97


@pytest.mark.slow
def test_the_numbers_of_a_row_are_those_of_its_latent(run: Run, subject: Inside, scored):
    """Encoded in full and counted row by row, without anything that the command uses to be fast."""
    activations = open_activations(run.activations_path())
    labelled = label_tales(activations, subject.model.tokenizer)
    _, report = labelled.halves(0)
    x = activations.rows(torch.from_numpy(labelled.indices[report]))
    with torch.inference_mode():
        acts = subject.sae.encode(x).numpy()
    from sklearn.metrics import f1_score, precision_score, roc_auc_score

    for row in scored.concepts[::9]:
        label = labelled.labels[report, labelled.concepts.index(row["concept"])]
        values = acts[:, row["best_latent"]]
        on = values >= row["threshold"]
        assert row["f1"] == pytest.approx(f1_score(label, on, zero_division=0), abs=2e-3)
        assert row["precision"] == pytest.approx(precision_score(label, on, zero_division=0), abs=2e-3)
        assert row["auroc"] == pytest.approx(roc_auc_score(label, values), abs=1e-3)
        if values.sum():
            assert row["mass_share"] == pytest.approx(values[label].sum() / values.sum(), abs=1e-3)
    for row in [row for row in scored.latents if row["concept"]][::40]:
        label = labelled.labels[report, labelled.concepts.index(row["concept"])]
        on = (acts[:, row["feature_idx"]] >= row["threshold"]) & (acts[:, row["feature_idx"]] > 0)
        assert row["f1"] == pytest.approx(f1_score(label, on, zero_division=0), abs=2e-3)


@pytest.mark.slow
def test_the_files_hold_what_was_returned(run: Run, scored):
    rows = rows_of(run.path / "concepts.csv")
    assert [row["concept"] for row in rows] == [row["concept"] for row in scored.concepts]
    assert [float(row["f1"]) for row in rows] == [row["f1"] for row in scored.concepts]
    assert [float(row["f1"]) for row in rows] == sorted((float(row["f1"]) for row in rows), reverse=True)
    latents = rows_of(run.path / "latent_concepts.csv")
    assert [int(row["feature_idx"]) for row in latents] == list(range(512))
    summary = json.loads((run.path / "concepts.json").read_text())
    assert summary["coverage"] == pytest.approx(np.mean([float(row["f1"]) for row in rows]), abs=1e-5)
    assert summary["settings"]["run_dir"] == str(run.path)
    assert summary["skipped"]["sentence"].startswith("on 100%")
    assert len(summary["checkpoint_sha256"]) == len(summary["activations_sha256"]) == 64


def test_existing_files_stay(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "concepts.json").write_text("{}")
    assert main(["--run-dir", str(run.path), "--output-dir", str(tmp_path)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["concepts.json"]
    assert (tmp_path / "concepts.json").read_text() == "{}"


def test_the_command_on_a_users_labels_prints_a_table(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    labels = write_labels(tmp_path / "labels.csv", "text", ("city", "country", "colour"))
    flags = ["--checkpoint", str(run.checkpoint_path), "--labels", str(labels), "--output-dir", str(tmp_path / "out")]
    assert main([*flags, "--min-tokens", "5", "--no-probes", "--no-baselines", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "coverage:" in out
    assert "concepts: 4 scored" in out
    rows = rows_of(tmp_path / "out" / "concepts.csv")
    assert {row["concept"] for row in rows} == {"city", "country", "colour", "place"}
    assert {row["parent"] for row in rows if row["concept"] != "colour"} == {"place", ""}
    assert all(row["random_f1"] == "" for row in rows)
    assert not (run.path / "out").exists()


def test_texts_to_label_are_written(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "texts.csv"
    flags = ["--run-dir", str(run.path), "--texts-output", str(path), "--max-texts", "5", "--device", "cpu"]
    assert main(flags) == 0
    assert "(5 texts)" in capsys.readouterr().out
    assert [row["text"] for row in rows_of(path)] == [tale(number, "train", 42).text[:512] for number in range(5)]
    assert main(flags) == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "Provide --checkpoint or --run-dir"),
        (["--run-dir", "{tmp}/none"], "run directory not found"),
        (["--checkpoint", "{tmp}/none.pt"], "checkpoint not found"),
        (["--checkpoint", "{loose}"], "give the activations with --activations-path"),
        (["--run-dir", "{unfinished}"], "training is not finished; go on with"),
        (["--run-dir", "{run}", "--labels", "{tmp}/none.csv"], "labels not found"),
        (["--run-dir", "{run}", "--activations-path", "{tmp}/none"], "activations not found"),
        (["--run-dir", "{run}", "--activations-path", "{narrow}"], "width 4"),
        (["--run-dir", "{run}", "--min-tokens", "99999"], "lower --min-tokens"),
        (["--run-dir", "{run}", "--max-texts", "1"], "--max-texts at least 2"),
    ],
)
def test_mistakes_are_told_in_one_line(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.json").write_bytes(run.config_path.read_bytes())
    loose = tmp_path / "loose.pt"
    loose.write_bytes(run.checkpoint_path.read_bytes())
    narrow = tmp_path / "narrow.pt"
    torch.save(torch.zeros(3, 4), narrow)
    info = open_activations(run.activations_path()).info
    store = {**info, "n_rows": 3, "d_in": 4, "shards": []}
    narrow.with_suffix(".json").write_text(json.dumps({"activation_path": str(narrow), "store": store}))
    columns = {name: torch.arange(3, dtype=torch.int32) for name in ("tokens", "text_ids", "positions")}
    save_file(columns, narrow.with_suffix(".tokens.safetensors"))
    places = {"tmp": tmp_path, "run": run.path, "unfinished": unfinished, "loose": loose, "narrow": narrow}
    written = [flag.format(**places) for flag in flags]
    assert main([*written, "--output-dir", str(tmp_path / "out"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
