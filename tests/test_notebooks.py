"""The notebooks run from the first cell to the last on a real run, and say what they should; their twins are equal."""

import base64
import os
import re
import shutil
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from small_run import make_small_run

from mechint.runs import Run, latest_run

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
NAMES = ("inspect-features", "ablation", "concepts", "tour")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_small_run(tmp_path_factory.mktemp("small_run"))


def execute(name: str, folder: Path, **parameters: object) -> nbformat.NotebookNode:
    """Run a copy of the notebook from `folder`, with some of its first code cell's settings changed."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for key, value in parameters.items():
        cell.source, count = re.subn(rf"(?m)^{key} = [^#\n]*", f"{key} = {value!r}  ", cell.source)
        assert count == 1, f"the first code cell does not set {key}"
    folder.mkdir(parents=True, exist_ok=True)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    # One thread, because tests run beside each other; Agg as in CI, which must not keep figures from being shown.
    client.execute(env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"})
    return notebook


def outputs(notebook: nbformat.NotebookNode, mime: str) -> list[str]:
    return [
        output.data[mime]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type in ("display_data", "execute_result") and mime in output.data
    ]


def check_outputs(notebook: nbformat.NotebookNode, *, n_figures: int) -> list[str]:
    """No error, no warning; `n_figures` PNGs that hold a picture. Returns the pieces of HTML."""
    printed = ""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error", output
            printed += output.text if output.get("name") == "stderr" else ""
    assert not re.search("warning|error", printed, re.IGNORECASE), printed
    figures = [base64.b64decode(text) for text in outputs(notebook, "image/png")]
    assert len(figures) == n_figures
    assert all(figure.startswith(PNG) and len(figure) > 10_000 for figure in figures)
    return outputs(notebook, "text/html")


def said(notebook: nbformat.NotebookNode) -> str:
    """What the cells printed."""
    return "".join(
        out.text for cell in notebook.cells for out in cell.get("outputs", []) if out.get("name") == "stdout"
    )


@pytest.mark.parametrize("name", NAMES)
def test_script_and_notebook_are_the_same(name: str):
    notebook = jupytext.read(NOTEBOOKS / f"{name}.ipynb")
    script = jupytext.read(NOTEBOOKS / f"{name}.py")
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in script.cells
    ], f"make them equal again with: jupytext --sync notebooks/{name}.py"
    assert notebook.metadata["jupytext"]["formats"] == "ipynb,py:percent"


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_are_kept_without_outputs(name: str):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) >= 5
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert "RUN = None" in code[0].source or "FOLDER = None" in code[0].source


@pytest.mark.slow
def test_inspect_features_finds_the_newest_run(small_run: Run, tmp_path: Path):
    # started two folders below the one that runs/ is in, as a user's own notebook may be
    shutil.copytree(small_run.path.parent.parent, tmp_path / "project")
    notebook = execute("inspect-features", tmp_path / "project" / "notebooks" / "mine")
    page = check_outputs(notebook, n_figures=2 + 6 + 2)
    contexts = [part for part in page if "font-weight:bold;text-decoration:underline" in part]
    assert len(contexts) == 6 * 2 + 6 + 2 * 3  # strongest and by strength; what fires on a text; the most alike pairs
    strengths = [float(value) for part in contexts for value in re.findall(r"rgba\(255,140,0,([\d.]+)\)", part)]
    assert max(strengths) == 1.0 and min(strengths) == 0.0
    assert "&lt;|endoftext|&gt;" in "".join(page) or "<|endoftext|>" not in "".join(page)
    text = said(notebook)
    assert "512 latents" in text and "latents have" in text


@pytest.mark.slow
@pytest.mark.parametrize("saved", [True, False])
def test_ablation_with_and_without_a_saved_ranking(small_run: Run, tmp_path: Path, saved: bool):
    from mechint.ablation import rank_run
    from mechint.config import RankConfig

    root = tmp_path / "project"
    shutil.copytree(small_run.path.parent.parent, root)
    run = Run(root / "runs" / "small")
    texts = (run.path / "eval_texts.txt").read_text().splitlines()
    if saved:
        rank_run(RankConfig(run_dir=run.path, top=8, control=8, exact_texts=3), progress=False)
    notebook = execute("ablation", tmp_path / "elsewhere", RUN=str(run.path), N_TEXTS=2, TEXTS=texts if saved else None)
    assert (run.path / "ranking.csv").is_file() == saved
    page = check_outputs(notebook, n_figures=1 + 3)
    assert sum("text-decoration:underline" in part for part in page) == 3
    tables = [part for part in page if ">next token<" in part]
    assert len(tables) == 3
    for table in tables:
        shares = [float(value) for value in re.findall(r"([\d.]+) %", table)]
        assert len(shares) >= 10 and 0 < sum(shares[::2]) <= 100.5 and 0 < sum(shares[1::2]) <= 100.5
        assert shares[::2] != shares[1::2], "removing a top latent changes no prediction"
    ways = [part for part in page if "from elsewhere" in part]
    values = [float(value) for value in re.findall(r">([\d.]+)<", ways[0])]
    assert len(values) == 3 * 4 and max(values) > 0.01
    text = said(notebook)
    assert text.count("as it is") == text.count("without ") == 3
    assert "together" in page[-1] and len(re.findall("<tr>", page[-1])) == 1 + 2


@pytest.mark.slow
@pytest.mark.parametrize("saved", [True, False])
def test_concepts_with_and_without_saved_scores(small_run: Run, tmp_path: Path, saved: bool):
    root = tmp_path / "project"
    shutil.copytree(small_run.path.parent.parent, root)
    run = Run(root / "runs" / "small")
    if saved:  # only what a quick run of the command leaves
        from mechint.concepts import score_concepts
        from mechint.config import ConceptsConfig

        score_concepts(ConceptsConfig(run_dir=run.path, max_texts=120, baselines=False, probes=False))
    notebook = execute("concepts", tmp_path / "elsewhere", RUN=str(run.path), MAX_TEXTS=120, CONCEPTS=["name", "nam"])
    page = check_outputs(notebook, n_figures=1)
    assert (run.path / "concepts.csv").is_file() == saved
    text = said(notebook)
    assert "nam was not scored; there are " in text and "512 latents tell a concept with F1 of 0.5" in text
    rows = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in page[0].split("<tr>")[1:]]
    mean_f1 = {row[0]: float(row[1]) for row in rows if row}
    if saved:
        assert set(mean_f1) == {"this SAE", "list of tokens"}
    else:
        assert mean_f1["this SAE"] > mean_f1["random"] + 0.1 > 0.1 and mean_f1["this SAE"] > mean_f1["pca"]
    (shown,) = [part for part in page if "<b>name</b>" in part]
    assert float(re.findall(r"F1 ([\d.]+)", shown)[0]) > 0.3  # 0.13 for saying yes to all
    assert any("font-weight:bold;text-decoration:underline" in part for part in page)


@pytest.mark.slow
def test_tour_ends_with_a_steered_model(tmp_path: Path):
    """Smaller than as shipped; what it says must hold all the same."""
    notebook = execute("tour", tmp_path / "here", FOLDER=str(tmp_path / "tour"), N_TALES=400, STEPS=300)
    page = check_outputs(notebook, n_figures=1)
    assert (tmp_path / "tour" / "runs" / "tour" / "ranking.csv").is_file()
    text = said(notebook)
    assert "The capital of France is ... Paris." in text
    correlation = re.search(r"rank correlation .*: (-?[\d.]+)", text)
    assert correlation is not None and float(correlation[1]) > 0.3
    assert len([part for part in page if "font-weight:bold;text-decoration:underline" in part]) == 4
    cells = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in page[-1].split("<tr>")[1:]]
    chances = {row[0]: [float(cell) for cell in row[1:]] for row in cells if row}  # women she, he, men she, he
    assert len(chances) == 6
    assert chances["none"][0] > 0.5 > 0.1 > chances["none"][2]
    for source in ("direction", "latent"):
        assert chances[f"{source}, +0.5"][2] > 0.4, "men do not become she"
        assert chances[f"{source}, -0.5"][1] > 0.4, "women do not become he"
    # beside one another, with the text that each edit makes
    assert "direction, +0.5" in text and "latent, -0.5" in text and "she went back to" in text


def test_latest_run_prefers_a_ranked_one_and_says_what_makes_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from mechint.errors import MechintError

    with pytest.raises(MechintError, match="no finished run in .*make pipeline"):
        latest_run(tmp_path / "runs")
    for age, name in enumerate(("ranked", "older", "newest", "unfinished")):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        if name != "unfinished":
            (folder / "manifest.json").write_text("{}")
            os.utime(folder / "manifest.json", (1000 + age, 1000 + age))
    assert latest_run(tmp_path / "runs").path.name == "newest"
    (tmp_path / "runs" / "ranked" / "ablation.csv").write_text("feature_idx,mean_kl\n")
    assert latest_run(tmp_path / "runs").path.name == "ranked"
    assert latest_run(tmp_path / "runs", prefer="eval.json").path.name == "newest"
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert latest_run().path == tmp_path / "runs" / "ranked"
