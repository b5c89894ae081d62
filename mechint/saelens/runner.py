"""`SAETrainingRunner(cfg).run()`: train straight from the model into a run directory, and return the SAE."""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import torch

from mechint.config import SAETrainConfig
from mechint.data import open_activations
from mechint.data.batches import split_as
from mechint.errors import MechintError
from mechint.eval import evaluate_texts, texts_from_rows
from mechint.eval.reconstruction import measure_activity
from mechint.inside import open_inside
from mechint.models import load_model
from mechint.provenance import read_json
from mechint.runs import Run
from mechint.sae import SAE
from mechint.sae.base import usable
from mechint.saelens.config import LanguageModelSAERunnerConfig
from mechint.saelens.nested import LoggingConfig
from mechint.train import resume, train

# Texts that are read at most before they are read again: in effect all that there are.
MOST_TEXTS = 10**9
# Rows that say how often each latent fires.
SPARSITY_ROWS = 131_072


@final
class SAETrainingRunner:
    """A training, from a language model to an SAE.

    Attributes:
        run_dir: the run directory, when `run` has made it: every command of mechint takes it.
        notes: in words, what is done otherwise here than in SAELens; printed when the run begins.
    """

    def __init__(self, cfg: LanguageModelSAERunnerConfig):
        self.cfg = cfg
        self.run_dir: Path | None = None
        self.notes: tuple[str, ...] = cfg.notes
        if not cfg.dataset_path and not cfg.use_cached_activations and cfg.resume_from_checkpoint is None:
            raise MechintError(
                "dataset_path is empty: give a data set of the Hub, a local file, or builtin/tales which needs no"
                " network"
            )

    def run(self) -> SAE:
        """Train, straight from the model or on cached activations, and return the SAE with its sparsity.

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
            config = self._config(cfg)
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

    def _config(self, cfg: LanguageModelSAERunnerConfig) -> SAETrainConfig:
        """What to train: on a store, or straight from the model."""
        if cfg.use_cached_activations:
            if not cfg.cached_activations_path:
                raise MechintError("use_cached_activations needs cached_activations_path: a store made by mechint")
            path = Path(cfg.cached_activations_path)
            return cfg.train_config(path, open_activations(path).d_in)
        d_in = load_model(cfg.model_name, device="cpu", hook_name=cfg.hook_name).hook_width(cfg.hook_name)
        live = cfg.collect_config("unused", MOST_TEXTS).for_training()
        config = cfg.train_config("", d_in)
        return SAETrainConfig.from_dict({**config.to_dict(), "live": live, "buffer_rows": cfg.buffer_rows})

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
