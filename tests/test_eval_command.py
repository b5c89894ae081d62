"""`eval_sae.py` on a small real model: against computations done here with nothing but transformers and torch."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import HOOK
from given_files import write_texts

from mechint.cli.evaluate import main
from mechint.config import CollectConfig, SAETrainConfig
from mechint.data import collect_activations, open_activations, split_indices
from mechint.eval import print_eval_summary, texts_from_rows
from mechint.provenance import read_json, write_json
from mechint.sae import StandardSAE, load_sae, save_checkpoint
from mechint.train import train

OLD_KEYS = {
    *("checkpoint_path", "dead_features", "dead_fraction", "git_commit", "num_features", "num_params"),
    *("total_seconds", "training_seconds", "val_l0", "val_mse"),
}
LANGUAGE_KEYS = {
    *("ce_clean", "ce_sae", "ce_zero", "ce_mean", "ce_recovered_zero", "ce_recovered_mean", "kl_clean_sae"),
    *("n_texts_ce", "n_predicted", "model_name"),
}


@pytest.fixture(scope="module")
def place(tiny_neox_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, activations at HOOK (BOS prepended, its rows left out) and a finished run of 30 steps."""
    folder = tmp_path_factory.mktemp("eval")
    sentence = "the cat sat on the mat and the dog ran far away from home again"
    words = sentence.split()
    lines = [" ".join(words[(i + 3 * j) % 15] for j in range(3 + i % 11)) for i in range(40)]
    (folder / "texts.txt").write_text("\n".join(lines) + "\n")
    store = folder / "store"
    collect_activations(
        CollectConfig(model=str(tiny_neox_dir), dataset=str(folder / "texts.txt"), output=store, device="cpu"),
        progress=False,
    )
    train_run(folder, store, "run")
    return folder


def train_run(folder: Path, store: Path, name: str, **changes: object) -> Path:
    config = SAETrainConfig(
        activations_path=str(store), activation_dim=32, expansion=2, epochs=30, batch_size=64, warmup_steps=2,
        lambda_warmup_steps=2, l1_lambda=0.1, learning_rate=1e-2, val_fraction=0.25, eval_batch_size=7,
        runs_root=str(folder), run_name=name, device="cpu", **changes,
    )  # fmt: skip
    return train(config, progress=False).root


def run_eval(*flags: object) -> dict:
    """Run the command with --output into a fresh file and return the JSON."""
    output = Path(str(flags[0])).parent / f"eval-{len(list(Path(str(flags[0])).parent.glob('eval-*')))}.json"
    words = [str(flag) for flag in flags[1:]]
    assert main([*words, "--device", "cpu", "--output", str(output)]) == 0
    return json.loads(output.read_text())


def last_error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and not any("Traceback" in line for line in lines)
    return lines[-1]


def test_everything_against_plain_transformers(place: Path, tiny_neox_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = run_eval(place / "x", "--run-dir", place / "run", "--batch-size", 3)
    assert found.keys() >= OLD_KEYS | LANGUAGE_KEYS and found["notes"] == []
    assert found["training_seconds"] == found["total_seconds"] == 0.0
    assert (found["num_features"], found["num_params"]) == (64, 32 + 64 + 2 * 32 * 64)

    # The model and the SAE from their files, the texts from the text file: nothing of mechint in between.
    model = AutoModelForCausalLM.from_pretrained(tiny_neox_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_neox_dir)
    weights = torch.load(place / "run" / "checkpoint.pt", weights_only=True)
    lines = (place / "texts.txt").read_text().splitlines()
    held_out = torch.randperm(40, generator=torch.Generator().manual_seed(42))[:10].tolist()

    def ids(line: str) -> torch.Tensor:
        return torch.tensor([[0, *tokenizer(line).input_ids]])

    def sae(x: torch.Tensor) -> torch.Tensor:
        f = torch.relu((x - weights["b_pre"]) @ weights["W_enc"] + weights["b_enc"])
        return f @ weights["W_dec"] + weights["b_pre"]

    def residual(line: str) -> torch.Tensor:
        with torch.no_grad():
            return model(ids(line), output_hidden_states=True).hidden_states[4][0, 1:]

    train_rows = torch.cat([residual(line) for i, line in enumerate(lines) if i not in held_out])
    val_rows = torch.cat([residual(lines[i]) for i in held_out])
    mean = train_rows.mean(dim=0)
    assert (found["n_train"], found["n_val"]) == (len(train_rows), len(val_rows))
    assert found["val_mse"] == pytest.approx(float((val_rows - sae(val_rows)).square().mean()), rel=1e-4)
    fvu = (val_rows - sae(val_rows)).square().sum() / (val_rows - val_rows.mean(dim=0)).square().sum()
    assert found["fvu"] == pytest.approx(float(fvu), rel=1e-4)
    f = torch.relu((train_rows - weights["b_pre"]) @ weights["W_enc"] + weights["b_enc"])
    assert found["dead_features"] == int((f == 0).all(dim=0).sum())

    edits = {"clean": lambda x: x, "sae": sae, "zero": torch.zeros_like, "mean": lambda x: mean.expand_as(x)}
    nll, kl, n_predicted = dict.fromkeys(edits, 0.0), 0.0, 0
    for i in held_out:
        tokens, log_probs = ids(lines[i]), {}
        for name, edit in edits.items():

            def replace(module, args, output, edit=edit):  # noqa: ANN001, ANN202
                value = output[0] if isinstance(output, tuple) else output
                edited = torch.cat([value[:, :1], edit(value[:, 1:])], dim=1)  # the BOS row was not collected
                return (edited, *output[1:]) if isinstance(output, tuple) else edited

            handle = model.gpt_neox.layers[3].register_forward_hook(replace)
            with torch.no_grad():
                log_probs[name] = model(tokens).logits[0, :-1].double().log_softmax(dim=-1)
            handle.remove()
            nll[name] -= float(log_probs[name].gather(1, tokens[0, 1:, None]).sum())
        kl += float((log_probs["clean"].exp() * (log_probs["clean"] - log_probs["sae"])).sum())
        n_predicted += tokens.shape[1] - 1
    assert (found["n_texts_ce"], found["n_predicted"]) == (10, n_predicted)
    for name, total in nll.items():
        assert found[f"ce_{name}"] == pytest.approx(total / n_predicted, rel=1e-4), name
    assert found["kl_clean_sae"] == pytest.approx(kl / n_predicted, rel=1e-3)
    for baseline in ("zero", "mean"):
        recovered = (nll[baseline] - nll["sae"]) / (nll[baseline] - nll["clean"])
        if nll[baseline] > nll["clean"]:
            assert found[f"ce_recovered_{baseline}"] == pytest.approx(recovered, abs=1e-3)
        else:
            assert found[f"ce_recovered_{baseline}"] is None


def test_the_summary_of_the_run_says_the_same(place: Path) -> None:
    summary = read_json(place / "run" / "summary.json")
    found = run_eval(place / "x", "--run-dir", place / "run", "--max-eval-texts", 0)
    assert not LANGUAGE_KEYS & found.keys() and "--max-eval-texts 0" in found["notes"][0]
    for key in ("val_mse", "val_l0", "l0", "fvu", "n_val", "num_features", "num_params"):
        assert found[key] == pytest.approx(summary[key], rel=1e-9), key


def test_checkpoint_config_and_sae_folder_name_the_same_thing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = place / "run"
    expected = run_eval(place / "x", "--run-dir", run)
    ways = (
        ["--checkpoint", run / "checkpoint.pt"],
        ["--checkpoint", run / "checkpoint.pt", "--config", run / "config.json"],
        ["--checkpoint", run / "sae"],
        ["--checkpoint", run],
        ["--run-dir", run, "--checkpoint", "nowhere.pt"],
    )
    for way in ways:
        found = run_eval(place / "x", *way)
        assert {**found, "checkpoint_path": ""} == {**expected, "checkpoint_path": ""}
        named = run / "sae" if way[1] == run / "sae" else run / "checkpoint.pt"
        assert found["checkpoint_path"] == str(named)
    assert capsys.readouterr().out.count("\n---\nval_mse: ") == len(ways) + 1


def test_intervals_histograms_and_special_tokens(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_eval(place / "x", "--run-dir", place / "run", "--seed", 3)
    printed = capsys.readouterr().out
    # Every measured number but the counts has its interval around it.
    measured = {key for key in found if key.startswith(("ce_", "kl_")) and found[key] is not None}
    measured |= {"l0", "l1", "mse_per_dim", "mse_per_token", "fvu", "explained_variance", "explained_variance_legacy"}
    measured |= {"cosine", "l2_ratio", "relative_reconstruction_bias"}
    assert measured >= {"ce_clean", "kl_clean_sae", "kl_clean_zero", "kl_score_mean"}
    for key in measured - {"ce_recovered_zero", "ce_recovered_mean"}:
        low, high = found["ci95"][key]
        assert low < found[key] < high, key
    assert found["ci95"] == run_eval(place / "x", "--run-dir", place / "run", "--seed", 3)["ci95"]
    assert found["ci95"] != run_eval(place / "x", "--run-dir", place / "run", "--seed", 4)["ci95"]
    assert run_eval(place / "x", "--run-dir", place / "run", "--resamples", 0)["ci95"] == {}
    # The one special token here is the BOS that the SAE never saw: without it the rows are the stored ones.
    without, with_special = found["without_special"], found["with_special"]
    assert without["n_val"] == found["n_val"] and with_special["n_val"] == found["n_val"] + found["n_texts_ce"]
    for key in ("mse_per_token", "fvu", "l0", "cosine"):
        assert without[key] == pytest.approx(found[key], rel=1e-4), key
    assert with_special["ce_sae"] == found["ce_sae"] and without["n_predicted"] < found["n_predicted"]
    # The prediction at BOS, which the SAE leaves alone, dilutes the KL by one position a text.
    n_without = found["n_predicted"] - found["n_texts_ce"]
    assert without["kl_clean_sae"] * n_without == pytest.approx(found["kl_clean_sae"] * found["n_predicted"], rel=1e-6)
    windows = found["windows"]
    assert windows["dead_features"]["n_rows"] == found["n_train"] == found["density_histogram"]["n_rows"]
    assert windows["n_dead_val"]["n_rows"] == found["n_val"] == sum(found["l0_histogram"]["counts"])
    assert sum(found["density_histogram"]["counts"]) == found["alive_features"] == 64 - found["dead_features"]
    # Nested values are in the JSON; what is printed is one number a line, and the file that holds the rest.
    assert "relative_reconstruction_bias: " in printed and "kl_score_zero: " in printed
    assert "ci95" not in printed and "{" not in printed and "eval_output: " in printed


def test_the_run_keeps_its_evaluation(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train_run(place, place / "store", "keeps")
    words = ["--run-dir", str(run), "--max-eval-texts", "0", "--device", "cpu"]
    assert main(words) == 0
    output = run / "eval.json"
    first = output.read_text()
    assert f"eval_output: {output}" in capsys.readouterr().out and json.loads(first)["l0"] > 0
    # Again: printed, and what lies there is left alone until --overwrite says otherwise.
    output.write_text("mine")
    assert main(words) == 0
    captured = capsys.readouterr()
    assert "val_mse: " in captured.out and "--overwrite" in captured.err and output.read_text() == "mine"
    assert main([*words, "--overwrite"]) == 0
    assert json.loads(output.read_text()) == json.loads(first)
    # A checkpoint alone has no place of its own.
    output.unlink()
    assert main(["--checkpoint", str(run / "checkpoint.pt"), "--max-eval-texts", "0", "--device", "cpu"]) == 0
    assert not output.exists()


def test_fewer_texts_than_asked_for_is_noted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_eval(place / "x", "--run-dir", place / "run", "--max-eval-texts", 50)
    assert found["notes"] == ["50 texts were asked for, but there are only 10 to read"] and found["n_texts_ce"] == 10
    assert "note: 50 texts were asked for" in capsys.readouterr().err
    assert run_eval(place / "x", "--run-dir", place / "run", "--max-eval-texts", 10)["notes"] == []


def test_texts_from_the_store_are_the_texts(place: Path) -> None:
    activations = open_activations(place / "store")
    _, val = split_indices(activations, 0.25, 42, by="text")
    texts = texts_from_rows(activations, val)
    assert len(texts) == 10 and all(text.tokens[0] == 0 and text.seen[0] is False for text in texts)
    assert sum(len(text.tokens) - 1 for text in texts) == len(val)
    assert texts_from_rows(activations, val, max_texts=3) == texts[:3]
    assert len(texts_from_rows(activations)) == 40


def test_kept_bos_rows_are_spliced_too(place: Path, tiny_neox_dir: Path) -> None:
    store = place / "store-bos"
    config = CollectConfig(
        model=str(tiny_neox_dir), dataset=str(place / "texts.txt"), output=store, preset="mech-int", device="cpu",
        processing="centred", keep_bos=True,
    )  # fmt: skip
    collect_activations(config, progress=False)
    run = train_run(place, store, "bos", preset="mech-int", split_by="row", batch_order="torch")
    texts = texts_from_rows(open_activations(store))
    assert all(all(text.seen) and text.tokens[0] == 0 for text in texts)
    found = run_eval(place / "x", "--run-dir", run)
    assert found["rows"] == "heldout by row" and found.keys() >= LANGUAGE_KEYS
    # The two ways to the same texts: from the stored tokens, and from the file.
    from_store = run_eval(place / "x", "--run-dir", run, "--rows", "all")
    from_file = run_eval(place / "x", "--run-dir", run, "--rows", "all", "--eval-texts-path", place / "texts.txt")
    for key in LANGUAGE_KEYS - {"model_name"}:
        assert from_store[key] == pytest.approx(from_file[key], rel=1e-6), key


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".json.gz", ".parquet", "folder", "ids", "field"])
def test_given_texts_are_read_as_collect_reads_them(
    place: Path, tiny_neox_dir: Path, kind: str, tmp_path: Path
) -> None:
    """The raw lines of a .jsonl, which are no such text, would give another cross-entropy."""
    from transformers import AutoTokenizer

    texts = (place / "texts.txt").read_text().splitlines()[:12]
    more: list[object] = []
    if kind == "folder":
        given = tmp_path / "texts"
        given.mkdir()
        for number, text in enumerate(texts):
            (given / f"{number:02}.txt").write_text(text)
    elif kind == "ids":
        given, tokenizer = tmp_path / "ids.jsonl", AutoTokenizer.from_pretrained(tiny_neox_dir)
        given.write_text("".join(json.dumps({"input_ids": tokenizer(text).input_ids}) + "\n" for text in texts))
        more = ["--text-field", "input_ids"]
    elif kind == "field":
        given = tmp_path / "nested.jsonl"
        given.write_text("".join(json.dumps({"meta": {"body": text}}) + "\n" for text in texts))
        more = ["--text-field", "meta.body"]
    else:
        given = write_texts(tmp_path, texts, kind)
    flags = ["--run-dir", place / "run", "--max-eval-texts", 12, "--resamples", 0]
    lines = run_eval(place / "x", *flags, "--eval-texts-path", place / "texts.txt")
    found = run_eval(place / "x", *flags, "--eval-texts-path", given, *more)
    assert found["n_texts_ce"] == 12
    for key in LANGUAGE_KEYS:
        assert found[key] == lines[key], key


def test_a_given_text_is_not_cut(place: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("the cat sat on the mat and the dog ran far away from home " * 40 + "\nthe\n")
    flags = ["--run-dir", place / "run", "--resamples", 0, "--eval-texts-path", tmp_path / "long.txt"]
    found = run_eval(place / "x", *flags)
    (note,) = [note for note in found["notes"] if "windows" in note]
    assert note == "1 of 2 texts longer than 128 tokens: split into windows, each after BOS, nothing left out"
    # every token but each window's BOS is predicted
    n_tokens = found["n_predicted"]
    assert found["n_texts_ce"] > 2 and n_tokens > 3 * 128
    again = run_eval(place / "x", *flags, "--max-eval-texts", 1)
    assert n_tokens - again["n_predicted"] == 1


def test_an_old_checkpoint_without_any_record(place: Path, tiny_neox_dir: Path) -> None:
    """saved_models/*.pt of any width beside a bare .pt: the original's default split, and a hint for the rest."""
    rows = torch.randn(101, 32, generator=torch.Generator().manual_seed(1))
    torch.save(rows, place / "old.pt")
    sae = StandardSAE(32, 37, generator=torch.Generator().manual_seed(2))
    save_checkpoint(sae, place / "saved_models" / "sae_model_odd.pt")
    flags = ["--checkpoint", place / "saved_models" / "sae_model_odd.pt", "--activations-path", place / "old.pt"]
    found = run_eval(place / "x", *flags)
    permutation = torch.randperm(101, generator=torch.Generator().manual_seed(42))
    val = rows[permutation[:5]]
    assert found["num_features"] == 37 and found["n_val"] == 5 and found["n_train"] == 96
    assert found["val_mse"] == pytest.approx(float((val - sae.run(val)[0].detach()).square().mean()), rel=1e-5)
    notes = " ".join(found["notes"])
    assert "--eval-texts-path" in notes and "centred" in notes and "config.json" in notes
    assert not LANGUAGE_KEYS & found.keys()
    found = run_eval(
        place / "x", *flags, "--eval-texts-path", place / "texts.txt", "--model", tiny_neox_dir, "--max-eval-texts", 5
    )
    assert found["n_texts_ce"] == 5 and found.keys() >= LANGUAGE_KEYS


def test_a_model_that_cannot_be_reached_leaves_its_metrics_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train_run(place, place / "store", "unreachable")
    cfg = read_json(run / "sae" / "cfg.json")
    cfg["metadata"] |= {"model_name": "nobody/no-such-model", "model_source": "nobody/no-such-model"}
    write_json(run / "sae" / "cfg.json", cfg)
    found = run_eval(place / "x", "--run-dir", run)
    assert not LANGUAGE_KEYS & found.keys() and found["fvu"] > 0
    captured = capsys.readouterr()
    assert "note: cross-entropy left out" in captured.err and "--model" in captured.err
    # Asked for by name it is an error.
    assert main(["--run-dir", str(run), "--model", "nobody/no-such-model"]) == 2
    assert "nobody/no-such-model" in last_error(capsys)


def test_output_is_not_overwritten_unless_asked(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = place / "mine.json"
    output.write_text("mine")
    flags = ["--run-dir", str(place / "run"), "--max-eval-texts", "0", "--output", str(output)]
    assert main(flags) == 2
    assert "--overwrite" in last_error(capsys) and output.read_text() == "mine"
    assert main([*flags, "--overwrite"]) == 0
    assert "val_mse" in read_json(output)


def wrong_metadata(place: Path, name: str, **changes: object) -> Path:
    """A copy of the run's SAE folder that says something else about its activations."""
    folder = place / name
    folder.mkdir(exist_ok=True)
    cfg = read_json(place / "run" / "sae" / "cfg.json")
    cfg["metadata"] |= changes
    write_json(folder / "cfg.json", cfg)
    (folder / "sae_weights.safetensors").write_bytes((place / "run" / "sae" / "sae_weights.safetensors").read_bytes())
    return folder


def test_what_does_not_belong_together_is_refused_with_both_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, store = str(place / "run" / "config.json"), str(place / "store")
    for changes, words in (
        ({"hook_name": "blocks.2.hook_resid_post"}, ["blocks.2.hook_resid_post", HOOK]),
        ({"processing": "centred"}, ["'centred'", "'raw'"]),
        ({"prepend_bos": False}, ["prepend_bos", "False", "True"]),
    ):
        folder = wrong_metadata(place, "wrong", **changes)
        assert main(["--checkpoint", str(folder), "--config", config]) == 2
        error = last_error(capsys)
        assert all(word in error for word in [*words, str(folder), store]), error

    save_checkpoint(StandardSAE(16, 32), tmp_path / "narrow.pt")
    assert main(["--checkpoint", str(tmp_path / "narrow.pt"), "--activations-path", store]) == 2
    error = last_error(capsys)
    assert "width 32" in error and "d_in 16" in error

    # A hook that the model does not have: the hook and the model are named.
    deep = wrong_metadata(place, "deep", hook_name="blocks.9.hook_resid_post")
    rows = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    torch.save(rows, tmp_path / "bare.pt")
    texts = ["--eval-texts-path", str(place / "texts.txt"), "--activations-path", str(tmp_path / "bare.pt")]
    assert main(["--checkpoint", str(deep), "--rows", "all", *texts]) == 2
    error = last_error(capsys)
    assert "blocks.9.hook_resid_post" in error and "6 layers" in error

    from conftest import make_tiny_neox

    other = make_tiny_neox(tmp_path / "other", d_model=16)
    assert main(["--run-dir", str(place / "run"), "--model", str(other)]) == 2
    error = last_error(capsys)
    assert "16 wide" in error and "d_in 32" in error


def test_a_checkpoint_without_a_record_takes_that_of_the_activations_its_config_names(place: Path) -> None:
    bare = place / "moved" / "sae_model_2x.pt"
    bare.parent.mkdir()
    bare.write_bytes((place / "run" / "checkpoint.pt").read_bytes())
    expected = run_eval(place / "x", "--run-dir", place / "run")
    found = run_eval(place / "x", "--checkpoint", bare, "--config", place / "run" / "config.json")
    assert {**found, "checkpoint_path": ""} == {**expected, "checkpoint_path": ""}


def test_without_that_config_the_assumed_setting_contradicts_the_activations(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sae.pt").write_bytes((place / "run" / "checkpoint.pt").read_bytes())
    assert main(["--checkpoint", str(tmp_path / "sae.pt"), "--activations-path", str(place / "store")]) == 2
    error = last_error(capsys)
    assert "assumed" in error and "--config" in error


def test_bad_input(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(place / "run")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 cut")
    rows = open_activations(place / "store").tensor().clone()
    rows[9, 3] = float("inf")
    torch.save(rows, tmp_path / "inf.pt")
    (tmp_path / "typo.json").write_text(json.dumps({**SAETrainConfig().to_dict(), "expanson": 8}))
    nothing_held_out = dataclasses.replace(
        SAETrainConfig.from_dict(read_json(place / "run" / "config.json")), val_fraction=0.0
    )
    write_json(tmp_path / "none.json", nothing_held_out.to_dict())
    for flags, words in (
        ([], ["Provide --checkpoint or --run-dir"]),
        (["--run-dir", "runs/no-such-run"], ["runs/no-such-run", "not found"]),
        (["--checkpoint", "no-such.pt"], ["no-such.pt", "not found"]),
        (["--checkpoint", tmp_path / "cut.pt", "--activations-path", place / "store"], ["cut.pt", "truncated"]),
        (["--checkpoint", tmp_path / "inf.pt", "--activations-path", place / "store"], ["inf.pt", "state dict"]),
        (["--run-dir", run, "--activations-path", "no-such-store"], ["no-such-store"]),
        (["--run-dir", run, "--activations-path", tmp_path / "cut.pt"], ["cut.pt", "truncated"]),
        (["--run-dir", run, "--activations-path", tmp_path / "inf.pt"], ["which text"]),
        (["--run-dir", run, "--activations-path", tmp_path / "inf.pt", "--rows", "all"], ["row 9 ", "inf.pt", "Inf"]),
        (["--run-dir", run, "--eval-texts-path", tmp_path / "empty.txt"], ["empty.txt"]),
        (["--checkpoint", place / "run" / "checkpoint.pt", "--config", tmp_path / "typo.json"], ["expanson"]),
        (["--checkpoint", place / "run" / "checkpoint.pt", "--config", tmp_path / "none.json"], ["--rows all"]),
        (["--run-dir", run, "--device", "tpu9"], ["tpu9"]),
        (["--run-dir", run, "--batch-size", "0"], ["--batch-size"]),
        (["--run-dir", run, "--resamples", "-1"], ["--resamples"]),
        (["--run-dir", run, "--output", place], ["exists"]),
    ):  # fmt: skip
        assert main([str(flag) for flag in flags]) == 2, flags
        error = last_error(capsys)
        assert all(word in error for word in words), error


def test_load_and_evaluate_from_python(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The library path of the first version: tensors, indices, a dict, and the printed block."""
    from mechint.data import load_activations_with_splits
    from mechint.eval import collect_feature_activity, evaluate_sae

    activations, train_indices, val_indices = load_activations_with_splits(place / "store", 0.1, 7)
    sae = load_sae(place / "run")
    active = collect_feature_activity(sae, activations, "cpu", 10, train_indices)
    metrics = evaluate_sae(sae, activations, active, sae.d_sae, "cpu", 10, val_indices=val_indices)
    x = activations[val_indices]
    assert metrics["val_l0"] == pytest.approx(float((sae.encode(x) > 0).float().mean()))
    assert metrics["dead_features"] == int((~active).sum())
    print_eval_summary(metrics)
    assert capsys.readouterr().out.startswith("\n---\nval_mse: ")
