"""`SAETrainingRunner(cfg).run()`: collect, train into a run directory, and return the SAE."""

import contextlib
import importlib
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import torch

from mechint.config import CollectConfig
from mechint.data import open_activations
from mechint.data.batches import split_as
from mechint.data.collect import collect_activations
from mechint.data.text import open_texts
from mechint.data.tokens import read_texts
from mechint.errors import MechintError
from mechint.eval import evaluate_texts, texts_from_rows
from mechint.eval.reconstruction import measure_activity
from mechint.inside import open_inside
from mechint.models import load_model
from mechint.provenance import read_json, sha256_json
from mechint.runs import Run
from mechint.sae import SAE
from mechint.sae.base import usable
from mechint.saelens.config import LanguageModelSAERunnerConfig
from mechint.saelens.nested import LoggingConfig
from mechint.train import resume, train

# Texts whose length says how many are needed.
SAMPLE = 256
# Most bytes of activations that are collected unasked; more training tokens than these go over them again.
MOST_BYTES = 8 * 2**30
# Rows that say how often each latent fires.
SPARSITY_ROWS = 131_072


@final
class SAETrainingRunner:
    """A training, from a language model to an SAE.

    Attributes:
        run_dir: the run directory, when `run` has made it: every command of mechint takes it.
        notes: in words, what is done otherwise here than in SAELens; printed when the run begins.
    """

    def __init__(self, cfg: LanguageModelSAERunnerConfig, *, activations_root: str | Path = "activations"):
        self.cfg = cfg
        self.activations_root = Path(activations_root)
        self.run_dir: Path | None = None
        self.notes: tuple[str, ...] = cfg.notes
        if not cfg.dataset_path and not cfg.use_cached_activations and cfg.resume_from_checkpoint is None:
            raise MechintError(
                "dataset_path is empty: give a data set of the Hub, a local file, or builtin/tales which needs no"
                " network"
            )

    def run(self) -> SAE:
        """Collect (unless the same activations are there already), train, and return the SAE with its sparsity.

        Ctrl-C saves the state; `resume_from_checkpoint=<run directory>` goes on from it.

        Raises:
            MechintError: unknown model, hook or data set, settings that do not fit them, a device that this machine
                does not have, wandb asked for but not installed, a training that diverges.
            Stopped: Ctrl-C or SIGTERM.
        """
        cfg = self.cfg
        for device in (cfg.device, cfg.llm_device):
            if device is not None:
                usable(device)
        if cfg.log.log_to_wandb:
            try:  # known now, not after the collection
                importlib.import_module("wandb")
            except ImportError:
                raise MechintError(
                    "log_to_wandb needs a package that is not installed: pip install wandb; or leave it out, the same"
                    " rows are in metrics.csv of the run"
                ) from None
        if not cfg.verbose:
            # the lines of the training curve, which metrics.csv has as well
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                return self._run(cfg)
        for note in self.notes:
            print(f"note: {note}", file=sys.stderr)
        return self._run(cfg)

    def _run(self, cfg: LanguageModelSAERunnerConfig) -> SAE:
        if cfg.resume_from_checkpoint is not None:
            with _wandb_place(cfg.log):
                self.run_dir = resume(cfg.resume_from_checkpoint, progress=cfg.verbose).root
        else:
            path = self._activations()
            config = cfg.train_config(path, open_activations(path).d_in)
            with _wandb_place(cfg.log):
                self.run_dir = train(config, progress=cfg.verbose).root
        sae = self._sae(Run(self.run_dir))
        if cfg.output_path is not None:
            sae.save_model(cfg.output_path)
        return sae

    def metrics(self) -> dict[str, Any]:
        """What came out, on texts that were held out, under SAELens's names: `l0` and `l1` (sums over latents a token),
        `mse_loss` (a sum over d_in), `l1_loss` (`l1` times the coefficient; None where there is none),
        `ce_loss_score` (the share of the cross-entropy lost by zeroing the hook that the SAE keeps),
        `explained_variance`, `dead_features`. docs/metrics.md defines each.

        The cross-entropy is measured here, on `n_eval_batches` batches of texts; 0 leaves it out.
        """
        if self.run_dir is None:
            raise MechintError("nothing was trained yet: call run() first")
        run = Run(self.run_dir)
        summary, config = run.summary, run.config
        penalised = config.architecture in ("standard", "gated") and summary.get("l1") is not None
        return {
            "l0": summary.get("l0"),
            "mse_loss": summary.get("mse_per_token"),
            "l1": summary.get("l1"),
            "l1_loss": summary["l1"] * config.l1_lambda if penalised else None,
            "ce_loss_score": self._ce_loss_score(run) if self.cfg.n_eval_batches else None,
            "explained_variance": summary.get("explained_variance"),
            "dead_features": summary["dead_features"],
        }

    def _ce_loss_score(self, run: Run) -> float:
        activations = open_activations(run.activations_path())
        _, held_out = split_as(run.config, activations)
        texts = texts_from_rows(
            activations, held_out, max_texts=self.cfg.n_eval_batches * self.cfg.store_batch_size_prompts
        )
        inside = open_inside(run.path, device=self.cfg.llm_device or self.cfg.device)
        return evaluate_texts(inside, texts, n_resamples=0)["ce_recovered_zero"]

    def _activations(self) -> Path:
        """The store to train on."""
        cfg = self.cfg
        if cfg.use_cached_activations:
            if not cfg.cached_activations_path:
                raise MechintError("use_cached_activations needs cached_activations_path: a store made by mechint")
            return Path(cfg.cached_activations_path)
        model = load_model(cfg.model_name, device="cpu", hook_name=cfg.hook_name)
        max_chars = cfg.collect_config("x", 1).max_chars
        source = open_texts(cfg.dataset_path, max_chars=max_chars, seed=cfg.seed)
        try:
            documents = source.read(0, SAMPLE)
        finally:
            source.close()
        if not documents:
            raise MechintError(f"{cfg.dataset_path} has no text")
        sample = read_texts(model, documents, max_chars=max_chars, prepend_bos=cfg.prepend_bos).token_lists
        lengths = [len(row) + 1 for row in sample]
        d_in = model.hook_width(cfg.hook_name)
        cfg.latents(d_in)  # widths that do not fit are known before anything is collected
        most = MOST_BYTES // (4 * d_in)
        # a tenth more: what is held out for validation, and texts that are shorter than those at the beginning
        rows = min(math.ceil(cfg.training_tokens * 1.1), most)
        rows = max(rows, 2 * cfg.train_batch_size_tokens)
        config = cfg.collect_config("x", max(math.ceil(rows / (sum(lengths) / len(lengths))), 2))
        name = f"saelens-{sha256_json({k: v for k, v in config.to_dict().items() if k != 'output'})[:12]}"
        config = CollectConfig.from_dict({**config.to_dict(), "output": str(self.activations_root / name)})
        return collect_activations(config, progress=cfg.verbose)[0]

    def _sae(self, run: Run) -> SAE:
        sae = SAE.load_from_disk(run.path, device="cpu")
        activations = open_activations(run.activations_path())
        rows = torch.linspace(0, activations.n_rows - 1, min(SPARSITY_ROWS, activations.n_rows)).long()
        activity = measure_activity(sae, activations, rows)
        sae.sparsity = (activity.fire_counts.double() / activity.n_rows + 1e-10).log10().float()
        cfg = read_json(run.config_path)
        sae.cfg.metadata.update(
            {
                "model_name": cfg["model_name"],
                "dataset_path": self.cfg.dataset_path or cfg["dataset_name"],
                "context_size": self.cfg.context_size,
                "prepend_bos": self.cfg.prepend_bos,
                "model_from_pretrained_kwargs": {
                    "center_writing_weights": sae.cfg.metadata.get("processing") == "centred"
                },
            }
        )
        return sae.to(device=self.cfg.device or "cpu")


@contextlib.contextmanager
def _wandb_place(log: LoggingConfig) -> Iterator[None]:
    """Project and entity as wandb reads them from the environment, for one training."""
    given = {"WANDB_PROJECT": log.wandb_project, "WANDB_ENTITY": log.wandb_entity}
    before = {name: os.environ.get(name) for name in given}
    os.environ.update({name: value for name, value in given.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is not None:
                os.environ[name] = value
            else:
                os.environ.pop(name, None)


LanguageModelSAETrainingRunner = SAETrainingRunner
