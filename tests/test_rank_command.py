"""`mechint rank` on a small real run: against plain removal in float64, and everything that a user can get wrong."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HOOK
from given_files import write_texts
from small_run import make_small_run

from mechint.ablation import RANKING_COLUMNS, attribute, causal, rank_latents, rank_run, spearman
from mechint.ablation.causal import Partial
from mechint.ablation.engines import NeoXEngine
from mechint.ablation.rank import ablate_texts
from mechint.cli.rank import main, reading
from mechint.config import CollectConfig, RankConfig, SAETrainConfig
from mechint.data import collect_activations, open_activations, split_indices
from mechint.errors import MechintError
from mechint.eval import Text, texts_from_rows
from mechint.models import load_model
from mechint.sae import load_sae
from mechint.train import train


@pytest.fixture(scope="module")
def place(tiny_neox_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Activations without BOS rows, and a finished run of 30 steps that held a quarter of 40 texts out."""
    folder = tmp_path_factory.mktemp("rank")
    sentence = "the cat sat on the mat and the dog ran far away from home again"
    words = sentence.split()
    lines = [" ".join(words[(i + 3 * j) % 15] for j in range(3 + i % 11)) for i in range(40)]
    (folder / "texts.txt").write_text("\n".join(lines) + "\n")
    collect_activations(
        CollectConfig(model=str(tiny_neox_dir), dataset=str(folder / "texts.txt"), output=folder / "store",
                      device="cpu"),
        progress=False,
    )  # fmt: skip
    train(
        SAETrainConfig(
            activations_path=str(folder / "store"), activation_dim=32, expansion=2, epochs=30, batch_size=64,
            warmup_steps=2, lambda_warmup_steps=2, l1_lambda=0.1, learning_rate=1e-2, val_fraction=0.25,
            runs_root=str(folder), run_name="run", device="cpu",
        ),
        progress=False,
    )  # fmt: skip
    return folder


@pytest.fixture
def run_dir(place: Path, tmp_path: Path) -> Path:
    """A run directory of the test's own."""
    shutil.copytree(place / "run", tmp_path / "run")
    (tmp_path / "store").symlink_to(place / "store")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def heldout(place: Path) -> list[Text]:
    activations = open_activations(place / "store")
    return texts_from_rows(activations, split_indices(activations, 0.25, 42)[1])


def flags(run_dir: Path, *more: object) -> list[str]:
    return [str(word) for word in ("--run-dir", run_dir, "--device", "cpu", *more)]


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def plain_effect(tiny_neox_dir: Path, sae, texts: list[Text], latent: int) -> tuple[float, float]:
    """Mean KL and mean change of cross-entropy when the latent is removed, in float64 by transformers and a hook."""
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(tiny_neox_dir, dtype=torch.float64)
    sae = sae.double()
    kl = ce = 0.0
    for text in texts:
        seen = torch.tensor(text.seen).double()

        def edit(module, args, out, seen=seen):
            f = sae.encode(out)[..., latent] * seen
            return out - f[..., None] * sae.W_dec[latent]

        tokens = torch.tensor([text.tokens])
        with torch.no_grad():
            log_p = hf(tokens).logits[0].log_softmax(-1)
            handle = hf.gpt_neox.layers[3].register_forward_hook(edit)
            log_q = hf(tokens).logits[0].log_softmax(-1)
            handle.remove()
        kl += float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        following = tokens[0, 1:, None]
        ce += float((log_p[:-1].gather(1, following) - log_q[:-1].gather(1, following)).mean())
    return kl / len(texts), ce / len(texts)


def test_command(run_dir, heldout, tiny_neox_dir, capsys):
    words = flags(run_dir, "--top", 5, "--control", 6, "--latents", "1,2", "--exact-texts", len(heldout))
    assert main(words) == 0
    said = capsys.readouterr()
    assert f"ranking_output: {run_dir / 'ranking.csv'}" in said.out
    assert f"over {len(heldout)} texts" in said.out and "How to read it:" in said.out
    rows = read(run_dir / "ranking.csv")
    assert list(rows[0]) == list(RANKING_COLUMNS)
    assert sorted(int(row["feature_idx"]) for row in rows) == list(range(64))
    assert [int(row["rank"]) for row in rows] == list(range(1, 65))
    scores = [float(row["attribution"]) for row in rows]
    assert scores == sorted(scores, reverse=True) and scores[0] > 0
    assert all(row["attribution"] == row["attribution_kl"] for row in rows)
    for row in rows:
        both = float(row["attribution_signed"]) + float(row["attribution_kl"])
        assert float(row["estimated_ce_change"]) == pytest.approx(both)
    assert [row["sample"] for row in rows[:5]] == ["top"] * 5
    by_latent = {int(row["feature_idx"]): row for row in rows}
    assert all(by_latent[latent]["sample"] in ("named", "top", "control") for latent in (1, 2))
    measured = [row for row in rows if row["sample"]]
    assert [bool(row["exact_kl"]) for row in rows] == [bool(row["sample"]) for row in rows]
    sae = load_sae(run_dir / "checkpoint.pt")
    for row in measured[:3] + measured[-2:]:
        kl, ce = plain_effect(tiny_neox_dir, sae, heldout, int(row["feature_idx"]))
        assert float(row["exact_kl"]) == pytest.approx(kl, abs=1e-6)
        assert float(row["exact_ce_change"]) == pytest.approx(ce, abs=1e-5)
    summary = json.loads((run_dir / "ranking.json").read_text())
    assert summary["n_texts"] == len(heldout) and summary["n_tokens"] == sum(len(t.tokens) for t in heldout)
    assert summary["n_exact_latents"] == len(measured)
    assert set(summary["spearman"]) == {"control", "top"}
    assert summary["settings"]["latents"] == "1,2" and summary["hook_name"] == HOOK
    assert not list(run_dir.glob("*.partial"))

    assert main(words) == 2
    assert "ranking.csv exists: give another --output, or --overwrite" in capsys.readouterr().err
    before = (run_dir / "ranking.csv").read_bytes()
    assert main([*words, "--overwrite"]) == 0
    assert (run_dir / "ranking.csv").read_bytes() == before, "the same settings give the same file"


def test_by_cross_entropy_and_texts_from_a_file(run_dir, tmp_path):
    texts = tmp_path / "mine.txt"
    texts.write_text("the cat sat on the mat\nthe dog ran far away\nhome\n")
    output = tmp_path / "mine.csv"
    rows = rank_run(
        RankConfig(
            run_dir=run_dir, output=output, eval_texts_path=texts, by="ce", draws=0, top=3, control=0, device="cpu"
        ),
        progress=False,
    ).rows
    assert rows[0]["attribution"] == rows[0]["attribution_ce"] > 0 and rows[0]["attribution_kl"] == 0
    summary = json.loads((tmp_path / "mine.json").read_text())
    assert summary["n_texts"] == 3 and summary["spearman"]["control"]["value"] is None
    assert "too few" in reading(summary)


def test_a_stopped_ranking_goes_on(run_dir, monkeypatch):
    config = RankConfig(run_dir=run_dir, output=run_dir / "a.csv", top=5, control=5, exact_texts=6, device="cpu")
    monkeypatch.setattr("mechint.ablation.rank.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("mechint.ablation.rank.MAX_TEXT_LATENTS", 10)  # a text a block
    whole = rank_run(config, progress=False).rows
    config = config.with_overrides(output=run_dir / "b.csv")
    opened, asked = [], []
    original, attribute = NeoXEngine.open, causal.attribute

    def open_then_stop(self, token_lists, seen=None):
        opened.append(len(token_lists))
        if len(opened) == 4:
            raise KeyboardInterrupt
        return original(self, token_lists, seen)

    monkeypatch.setattr(NeoXEngine, "open", open_then_stop)
    monkeypatch.setattr(causal, "attribute", lambda *a, **k: asked.append(1) or attribute(*a, **k))
    with pytest.raises(KeyboardInterrupt):
        rank_run(config, progress=False)
    partial = Partial(config.output, "")
    assert partial.attribution.exists() and partial.exact.exists() and not config.output.exists()
    n_asked = len(asked)
    assert n_asked == 2
    kept = partial.attribution.read_bytes(), partial.exact.read_bytes()

    assert rank_run(config, progress=False).rows == whole
    assert len(opened) == 4 + 3, "three of six texts were left"
    assert len(asked) == n_asked, "the estimates were not made again"
    assert not partial.attribution.exists() and not partial.exact.exists()

    # what was left under other settings is of no use
    other = config.with_overrides(output=run_dir / "c.csv", seed=1)
    for path, content in zip(
        (Partial(other.output, "").attribution, Partial(other.output, "").exact), kept, strict=True
    ):
        path.write_bytes(content)
    fresh = rank_run(other, progress=False).rows
    assert len(asked) == n_asked + 2 and fresh != whole
    # more latents to measure: the estimates are taken over, the removals are not
    named = config.with_overrides(output=run_dir / "e.csv", latents="0-20")
    clean = rank_run(named, progress=False).rows
    n_asked = len(asked)
    Partial(named.output, "").attribution.write_bytes(kept[0])
    Partial(named.output, "").exact.write_bytes(kept[1])
    assert rank_run(named.with_overrides(overwrite=True), progress=False).rows == clean
    assert len(asked) == n_asked
    # nor is a broken file
    broken = config.with_overrides(output=run_dir / "d.csv")
    Partial(broken.output, "").attribution.write_bytes(kept[0][:100])
    assert rank_run(broken, progress=False).rows == whole


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--latents", "3,64"], "latent 64 is out of range, the SAE has latents 0 to 63"),
        (["--latents", "x"], "'x' is not a latent's index"),
        (["--top", -1], "--top must be at least 0"),
        (["--exact-texts", 0], "--exact-texts must be at least 1"),
        (["--draws", 0], "ranking by KL needs --draws 1 at least"),
        (["--eval-texts-path", "nowhere.txt"], "nowhere.txt"),
        (["--output", "x.json"], "should be a .csv"),
        (["--processing", "centred"], "trained on raw activations"),
        (["--hook", "blocks.1.hook_resid_post"], "which hook is it?"),
        (["--bie", "kl"], "unknown flag --bie"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(run_dir, more, message, monkeypatch, capsys):
    def never(*args, **kwargs):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("mechint.inside.load_model", never)
    assert main(flags(run_dir, *more)) == 2
    assert message in capsys.readouterr().err
    assert not (run_dir / "ranking.csv").exists()


def test_fewer_texts_than_asked(run_dir, heldout, tmp_path, capsys):
    assert main(flags(run_dir, "--num-texts", 500)) == 2
    assert f"--num-texts 500, but the held-out part of {run_dir.parent / 'store'} has {len(heldout)}" in (
        capsys.readouterr().err
    )
    (tmp_path / "two.txt").write_text("the cat\nthe dog\n")
    assert main(flags(run_dir, "--eval-texts-path", tmp_path / "two.txt", "--num-texts", 3)) == 2
    assert "two.txt has 2: ask for 2 or fewer" in capsys.readouterr().err
    assert main(flags(run_dir, "--num-texts", 4, "--exact-texts", 6, "--top", 2, "--control", 2)) == 0
    assert "--exact-texts 6, but there are 4 texts: all of them are used" in capsys.readouterr().err


def test_given_texts_are_read_as_collect_reads_them(run_dir, tmp_path):
    texts = ["the cat sat on the mat", "the dog ran far away", "home again and again"]
    ranked = {}
    for kind in (".txt", ".csv", ".jsonl.zst"):
        given, output = write_texts(tmp_path, texts, kind), tmp_path / f"{kind}.csv"
        words = ["--eval-texts-path", given, "--output", output, "--top", 2, "--control", 2, "--num-texts", 3]
        assert main(flags(run_dir, *words)) == 0
        ranked[kind] = read(output)
    assert ranked[".txt"] == ranked[".csv"] == ranked[".jsonl.zst"]


def test_what_is_no_finished_run(run_dir, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(flags(tmp_path / "empty")) == 2
    assert "has no config.json: not a run directory" in capsys.readouterr().err
    (run_dir / "checkpoint.pt").unlink()
    assert main(flags(run_dir)) == 2
    assert f"its training is not finished; go on with `python scripts/train_sae.py --resume {run_dir}`" in (
        capsys.readouterr().err
    )
    assert main(["--device", "cpu"]) == 2
    assert "Provide --checkpoint or --run-dir" in capsys.readouterr().err


def test_an_sae_of_another_width_names_both(run_dir, tmp_path, capsys):
    from conftest import make_tiny_neox

    wide = make_tiny_neox(tmp_path / "wide", d_model=64)
    assert main(flags(run_dir, "--model", wide)) == 2
    assert f"the SAE has d_in 32, but {HOOK} of {wide} is 64 wide" in capsys.readouterr().err


def test_a_lone_checkpoint_needs_texts(run_dir, tmp_path, capsys):
    shutil.copytree(run_dir / "sae", tmp_path / "alone")
    assert main(["--checkpoint", str(tmp_path / "alone"), "--device", "cpu"]) == 2
    assert "give --eval-texts-path or --activations-path" in capsys.readouterr().err
    (tmp_path / "two.txt").write_text("the cat sat\nthe dog ran\n")
    assert main([*flags(run_dir)[2:], "--checkpoint", str(tmp_path / "alone"), "--eval-texts-path",
                 str(tmp_path / "two.txt"), "--top", "2", "--control", "2"]) == 0  # fmt: skip
    assert (tmp_path / "alone" / "ranking.csv").exists()


def test_control_is_drawn_from_the_others_that_fire(run_dir, heldout, tiny_neox_dir):
    sae, model = load_sae(run_dir / "checkpoint.pt"), load_model(str(tiny_neox_dir), device="cpu")
    with torch.no_grad():
        sae.b_enc[:10] = -1e6  # never fire
    arguments = {"draws": 1, "top": 4, "exact_texts": 3}
    rows, summary = rank_latents(sae, model, HOOK, heldout, control=1000, latents=[0, 1], **arguments)
    samples = {row["feature_idx"]: row["sample"] for row in rows}
    assert list(samples.values()).count("top") == 4
    assert samples[0] == samples[1] == "named" and all(samples[latent] == "" for latent in range(2, 10))
    assert next(row for row in rows if row["feature_idx"] == 0)["exact_kl"] == 0
    assert summary["n_silent"] >= 10
    assert summary["of_top_median"]["n_control"] == list(samples.values()).count("control") > 4
    drawn = [
        {row["feature_idx"] for row in rank_latents(sae, model, HOOK, heldout, control=5, seed=s, **arguments)[0]
         if row["sample"] == "control"}
        for s in (0, 0, 1)
    ]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 5
    rows, summary = rank_latents(sae, model, HOOK, heldout, control=0, draws=1, top=0, exact_texts=1)
    assert summary["n_exact_latents"] == 0 and all(row["exact_kl"] is None for row in rows)


@pytest.mark.slow
def test_the_ranking_agrees_with_real_removal_on_a_trained_model(tmp_path):
    """A real SAE on the built-in world: the estimate orders latents nearly as removing them does."""
    run = make_small_run(tmp_path)
    done = rank_run(
        RankConfig(run_dir=run.path, top=40, control=80, exact_texts=30, draws=8, device="cpu"), progress=False
    )
    same, control = done.summary["spearman_same_texts"]["control"], done.summary["spearman"]["control"]
    assert same["n"] > 50
    assert same["value"] > 0.8 and same["low"] > 0.6
    assert control["value"] > 0.6
    assert done.summary["spearman_ce"]["control"]["value"] > 0.5
    measured = [row for row in done.rows if row["sample"] == "top"]
    columns = {name: np.array([row[name] for row in measured]) for name in measured[0] if name != "sample"}
    first, second = (
        spearman(columns[name], columns["exact_ce_change"])["value"]
        for name in ("attribution_signed", "estimated_ce_change")
    )
    assert second > first + 0.1, "the second order is worth having where effects are large"
    kls = {name: [row["exact_kl"] for row in done.rows if row["sample"] == name] for name in ("top", "control")}
    assert torch.tensor(kls["top"]).median() > 3 * torch.tensor(kls["control"]).median()


def test_standard_errors_are_those_over_texts(run_dir, heldout, tiny_neox_dir):
    sae, model = load_sae(run_dir / "checkpoint.pt"), load_model(str(tiny_neox_dir), device="cpu")
    rows, _ = rank_latents(sae, model, HOOK, heldout, draws=2, top=3, control=0, exact_texts=len(heldout))
    kls = torch.stack([attribute(sae, model, HOOK, [text], draws=2).kl for text in heldout])
    for row in rows[:3]:
        latent = row["feature_idx"]
        assert row["attribution_kl"] == pytest.approx(float(kls[:, latent].mean()), rel=1e-3)
        assert row["attribution_kl_se"] == pytest.approx(float(kls[:, latent].std() / len(heldout) ** 0.5), rel=1e-3)
        exact = torch.stack([ablate_texts(sae, model, HOOK, [text], [latent]).mean_kl[0] for text in heldout])
        assert row["exact_kl"] == pytest.approx(float(exact.mean()), abs=1e-6)
        assert row["exact_kl_se"] == pytest.approx(float(exact.std() / len(heldout) ** 0.5), abs=1e-6)


@pytest.mark.parametrize(
    ("low", "top_low", "said"),
    [(0.8, 0.8, "tells strong latents from weak ones."), (0.8, 0.2, "weak ones; order the first ones by exact_kl"),
     (0.5, 0.2, "a rough guide"), (0.1, 0.2, "do not rely on the ranking here"), (None, None, "too few to say")],
)  # fmt: skip
def test_reading_says_what_the_interval_allows(low, top_low, said):
    def interval(value):
        return {"value": value, "low": value, "high": value, "n": 3}

    spearman = {"control": interval(low), "top": interval(top_low)}
    found = reading({"spearman": spearman, "of_top_median": {"n_control_above": None, "n_control": 0}})
    assert said in found and found.startswith("How to read it:")


def test_unfitting_settings_of_the_function(run_dir, heldout, tiny_neox_dir):
    sae, model = load_sae(run_dir / "checkpoint.pt"), load_model(str(tiny_neox_dir), device="cpu")
    with pytest.raises(MechintError, match="--draws 1 at least"):
        rank_latents(sae, model, HOOK, heldout, draws=0)
    with pytest.raises(MechintError, match="must not be negative"):
        rank_latents(sae, model, HOOK, heldout, top=-1)
