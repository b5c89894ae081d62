"""The research path in small: `python -m unittest tests.test_pipeline`. Needs neither pytest nor a network."""

import contextlib
import csv
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import torch

from mechint import SAEloss, SAETrainConfig, SparseAutoEncoder
from mechint.data import (
    deterministic_split_indices,
    iter_activation_batches,
    load_activations_with_splits,
    random_batch_iterator,
    split_batch_iterator,
)
from mechint.eval import collect_feature_activity, evaluate_sae

ROOT = Path(__file__).resolve().parent.parent
D_IN = 16


def run_script(name: str, *flags: object, cwd: Path) -> subprocess.CompletedProcess:
    """A script as a user runs it, from a folder that is not the repository's."""
    command = [sys.executable, str(ROOT / name), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


class Model(unittest.TestCase):
    def test_shapes(self):
        sae = SparseAutoEncoder(d=4, m=12)
        x = torch.randn(5, 4)
        x_hat, f = sae(x)
        self.assertEqual((x_hat.shape, f.shape), ((5, 4), (5, 12)))
        self.assertEqual((sae.encoder(x).shape, sae.decoder(f).shape), ((5, 12), (5, 4)))
        self.assertTrue(bool((f >= 0).all()))
        shapes = {name: tuple(getattr(sae, name).shape) for name in ("b_pre", "b_enc", "W_enc", "W_dec")}
        self.assertEqual(shapes, {"b_pre": (4,), "b_enc": (12,), "W_enc": (4, 12), "W_dec": (12, 4)})
        self.assertEqual({name: tuple(value.shape) for name, value in sae.state_dict().items()}, shapes)
        loss = SAEloss(x_hat, x, f, lam=2.0)
        self.assertEqual(loss.shape, ())
        self.assertAlmostEqual(loss.item(), ((x_hat - x).square().mean() + 2.0 * f.mean()).item(), places=5)

    def test_renormalisation(self):
        sae = SparseAutoEncoder(d=4, m=12)
        with torch.no_grad():
            sae.W_dec.mul_(3)
        sae.renormalize_decoder()
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(12))

    def test_old_import_path(self):
        code = "import sae, mechint.sae as m\n"
        code += "print(sae.SparseAutoEncoder is m.SparseAutoEncoder, sae.SAEloss is m.SAEloss)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        self.assertEqual(done.stdout.strip(), "True True")

    def test_latents_that_cannot_fire_are_dead(self):
        sae = SparseAutoEncoder(d=4, m=12)
        with torch.no_grad():
            sae.b_enc.fill_(-100)
        acts = torch.randn(64, 4)
        active = collect_feature_activity(sae, acts, torch.device("cpu"), eval_batch_size=16)
        self.assertEqual((active.dtype, tuple(active.shape)), (torch.bool, (12,)))
        self.assertFalse(bool(active.any()))
        summary = evaluate_sae(sae, acts, active, 12, torch.device("cpu"), eval_batch_size=16)
        self.assertEqual((summary["dead_features"], summary["dead_fraction"], summary["val_l0"]), (12, 1.0, 0.0))


class Data(unittest.TestCase):
    def test_split_is_deterministic_disjoint_and_complete(self):
        train, val = deterministic_split_indices(1000, 0.05, 42)
        again = deterministic_split_indices(n=1000, val_fraction=0.05, seed=42)
        self.assertTrue(torch.equal(train, again[0]) and torch.equal(val, again[1]))
        self.assertEqual(len(val), 50)
        self.assertEqual(sorted([*train.tolist(), *val.tolist()]), list(range(1000)))
        self.assertFalse(torch.equal(val, deterministic_split_indices(1000, 0.05, 43)[1]))

    def test_random_batches(self):
        batch = next(random_batch_iterator(torch.randn(100, 4), 8, "cpu", seed=42))
        self.assertEqual((tuple(batch.shape), batch.device.type), ((8, 4), "cpu"))
        rows = torch.arange(100.0)[:, None].expand(100, 4)
        streams = [random_batch_iterator(rows, 8, torch.device("cpu"), seed=seed) for seed in (1, 1, 2)]
        for first, second, other in itertools.islice(zip(*streams, strict=True), 20):
            self.assertTrue(torch.equal(first, second))
            self.assertFalse(torch.equal(first, other))

    def test_batches_of_a_split(self):
        rows = torch.arange(100.0)[:, None].expand(100, 4)
        stream = split_batch_iterator(rows, torch.arange(50, 60), 8, "cpu", seed=1)
        seen = torch.cat(list(itertools.islice(stream, 30)))  # endless
        self.assertEqual(sorted(set(seen[:, 0].tolist())), list(range(50, 60)))
        sizes = [len(batch) for batch in iter_activation_batches(rows, torch.arange(30), 8, "cpu")]
        self.assertEqual(sizes, [8, 8, 8, 6])
        self.assertEqual(len(list(iter_activation_batches(rows, None, 8, "cpu"))), 13)

    def test_loading_with_splits_keeps_the_tensor_whole(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "acts.pt"
            rows = torch.randn(200, D_IN)
            torch.save(rows, path)
            for mmap in (True, False):
                activations, train, val = load_activations_with_splits(path, val_fraction=0.1, seed=7, mmap=mmap)
                self.assertTrue(torch.equal(activations, rows))
                self.assertEqual((len(train), len(val)), (180, 20))


class Commands(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.stack = contextlib.ExitStack()
        cls.folder = Path(cls.stack.enter_context(tempfile.TemporaryDirectory()))
        torch.manual_seed(0)
        directions = torch.nn.functional.normalize(torch.randn(40, D_IN), dim=1)
        torch.save((torch.rand(3000, 40) * (torch.rand(3000, 40) < 0.1)) @ directions, cls.folder / "acts.pt")
        cls.flags = [
            *("--activations-path", "acts.pt", "--activation-dim", D_IN, "--lam", 0.1, "--epochs", 60),
            *("--batch-size", 256, "--warmup-steps", 5, "--lambda-warmup-steps", 5, "--device", "cpu", "--lr", 0.01),
        ]
        for expansion in (2, 4):
            flags = [*cls.flags, "--expansion", expansion, "--run-name", f"{expansion}x"]
            done = run_script("scripts/train_sae.py", *flags, cwd=cls.folder)
            assert done.returncode == 0, done.stderr
            cls.stdout = done.stdout

    @classmethod
    def tearDownClass(cls):
        cls.stack.close()

    def test_train_then_eval(self):
        run = self.folder / "runs" / "4x"
        for name in ("config.json", "metrics.csv", "checkpoint.pt", "summary.json", "manifest.json"):
            self.assertTrue((run / name).is_file(), name)
        self.assertIn("\n---\nval_mse: ", self.stdout)
        done = run_script("scripts/eval_sae.py", "--run-dir", "runs/4x", "--output", "eval.json", cwd=self.folder)
        self.assertEqual(done.returncode, 0, done.stderr)
        evaluated, trained = (json.loads(p.read_text()) for p in (self.folder / "eval.json", run / "summary.json"))
        self.assertAlmostEqual(evaluated["val_mse"], trained["val_mse"], places=9)
        self.assertAlmostEqual(evaluated["val_l0"], trained["val_l0"], places=9)
        self.assertLess(evaluated["fvu"], 1.0)

    def test_compare(self):
        checkpoints = ["runs/2x/checkpoint.pt", "runs/4x/checkpoint.pt"]
        flags = ["--checkpoints", *checkpoints, "--activation-dim", D_IN, "--output", "c.csv"]
        done = run_script("scripts/compare_expansions.py", *flags, cwd=self.folder)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("comparison_output: c.csv", done.stdout)
        rows = list(csv.DictReader(io.StringIO((self.folder / "c.csv").read_text())))
        self.assertEqual([int(row["left_feature"]) for row in rows], list(range(2 * D_IN)))
        self.assertTrue(all(-1.0001 <= float(row["cosine_similarity"]) <= 1.0001 for row in rows))

    def test_compare_checkpoints_made_by_hand(self):
        paths = []
        for m in (12, 20):
            paths.append(f"m{m}.pt")
            torch.save(SparseAutoEncoder(d=4, m=m).state_dict(), self.folder / paths[-1])
        flags = ["--checkpoints", *paths, "--activation-dim", 4, "--output", "by_hand.csv"]
        done = run_script("scripts/compare_expansions.py", *flags, cwd=self.folder)
        self.assertEqual(done.returncode, 0, done.stderr)
        rows = list(csv.DictReader(io.StringIO((self.folder / "by_hand.csv").read_text())))
        self.assertEqual([int(row["left_feature"]) for row in rows], list(range(12)))

    def test_legacy_wrapper(self):
        done = run_script("train.py", *self.flags, "--expansion", 3, cwd=self.folder)
        self.assertEqual(done.returncode, 0, done.stderr)
        for name in ("saved_models/sae_model_3x.pt", "training_metrics/training_metrics_3x.csv"):
            self.assertTrue((self.folder / name).is_file(), name)
        summary = json.loads((self.folder / "training_metrics" / "summary_3x.json").read_text())
        self.assertEqual(summary["run_dir"], "legacy")
        flags = ["--checkpoint", "saved_models/sae_model_3x.pt", "--config", "config.json"]
        done = run_script("scripts/eval_sae.py", *flags, cwd=self.folder)
        self.assertEqual(done.returncode, 0, done.stderr)
        again = run_script("train.py", *self.flags, "--expansion", 3, cwd=self.folder)
        self.assertEqual(again.returncode, 2)
        self.assertIn("not overwritten", again.stderr)

    def test_config_is_what_it_was_in_json(self):
        written = json.loads((self.folder / "runs" / "2x" / "config.json").read_text())
        config = SAETrainConfig.from_dict(written)
        self.assertEqual((config.num_features, config.epochs, config.l1_lambda), (2 * D_IN, 60, 0.1))
        self.assertEqual(config.to_dict(), written)


if __name__ == "__main__":
    os.chdir(ROOT)
    unittest.main()
