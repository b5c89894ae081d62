"""`mechint COMMAND ...`: a table from the command's name to its module, imported only when asked for."""

import importlib
import os
import sys
from collections.abc import Sequence

# torch's threads wait for each other in a busy loop by default. Where other programs want the cores too (a shared
# machine, a cluster's node, CI) they then wait for a thread that is not running: training steps took 17 times as long
# on two cores under load (docs/log.md). Must be set before torch is imported; what the user has set stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# name -> (module with main(argv), one line of help, script that is the same command)
COMMANDS = {
    "pipeline": ("mechint.cli.pipeline", "the whole path on the built-in world, in minutes", None),
    "collect": ("mechint.cli.collect", "run a model over texts and keep its activations", "collect_activations.py"),
    "train": ("mechint.cli.train", "train a sparse autoencoder into runs/", "train_sae.py"),
    "plan": ("mechint.cli.plan", "memory, disk and time of a training before it starts", None),
    "sweep": ("mechint.cli.sweep", "train a grid of autoencoders side by side, and draw their frontier", "sweep.py"),
    "eval": ("mechint.cli.evaluate", "measure an SAE on held-out data", "eval_sae.py"),
    "ablate": ("mechint.cli.ablate", "rank latents by the effect of removing each", "batch_ablate.py"),
    "rank": ("mechint.cli.rank", "rank every latent in minutes, and check the ranking", "rank_features.py"),
    "compare": ("mechint.cli.compare", "match the latents of checkpoints", "compare_expansions.py"),
    "concepts": ("mechint.cli.concepts", "score latents against known concepts", "score_concepts.py"),
    "extract-steering": (
        "mechint.cli.extract",
        "a steering direction from prompts, a latent or a probe",
        "extract_steering.py",
    ),
    "steer": ("mechint.cli.steer", "continue prompts with and without a direction", "steer.py"),
    "report": ("mechint.cli.report", "one HTML page about a run, or about several", "make_report.py"),
    "export": ("mechint.cli.export", "write a run's SAE in another tool's format", "export_sae.py"),
    "convert": ("mechint.cli.convert", "an SAE of any format in any other, with a proof that nothing changed", None),
    "identify": ("mechint.cli.identify", "what an SAE's files are", None),
    "publish-sae": ("mechint.cli.publish_sae", "a run's SAE to the Hugging Face Hub, with its card and hashes", None),
    "publish-steering": ("mechint.cli.publish_steering", "a steering vector to the Hub", None),
    "publish-investigation": ("mechint.cli.publish_investigation", "a writeup and its artefacts to the Hub", None),
    "publish-all": ("mechint.cli.publish_all", "every run, vector and writeup, each to a repository of its own", None),
    "publish-sweep": ("mechint.cli.publish_sweep", "the Pareto frontier of a sweep as one repository", None),
    "list-saes": ("mechint.cli.list_saes", "the SAEs that registries name", None),
    "list-steering": ("mechint.cli.list_steering", "the steering vectors that registries name", None),
    "load-sae": ("mechint.cli.load_sae", "download an SAE by name or repository, check it, say what it is", None),
    "apply-steering": ("mechint.cli.apply_steering", "continue a prompt with and without a published vector", None),
    "pull": ("mechint.cli.pull", "a whole repository of the Hub as a folder, checked", None),
    "serve": ("mechint.cli.serve", "share SAEs: an HTTP API, a panel in the browser, and workers", None),
    "verify": ("mechint.cli.verify", "check a run's files against the hashes in its manifest", None),
}


def help_text() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text, _) in COMMANDS.items()]
    return "\n".join(
        ["usage: mechint COMMAND [flags]", "", *lines, "", "`mechint COMMAND --help` explains a command's flags."]
    )


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if argv[0] in ("-V", "--version"):
        from mechint import __version__

        print(f"mechint {__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        from mechint.errors import nearest

        print(f"error: unknown command {name!r}; {nearest(name, COMMANDS)}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[name][0]).main(rest)
