"""The concept table: what architectures learn of known concepts at the same sparsities, beside dictionaries that have
learned nothing.

    python benchmarks/concepts.py activations/tales_2600.pt --output table.md

The activations are from `builtin/tales`. Every member is `mechint train --preset mechint` with the same steps, width
and data, brought near each L0 by the flags below; all are scored on the same labels, the same two halves of the texts
and the same samples. "random" is an untrained dictionary of the same size and L0, "pca" both signs of the principal
directions. A member leaves its run and its scores under --folder: a stopped run of this script goes on where it was.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mechint.provenance import sha256_json, write_json, write_text

L0S = (16, 32, 64)
K_OF = {l0: ["--k", str(l0)] for l0 in L0S}
JUMP = ["--penalty", "quadratic", "--lam", "10", "--bandwidth", "0.5", "--init-threshold", "0.1"]
# What brings an architecture near an L0 at d_in 128, 1,024 latents, 1,500 steps of 1,024.
FLAGS: dict[str, dict[int, list[str]]] = {
    "standard": {16: ["--lam", "1.0"], 32: ["--lam", "0.6"], 64: ["--lam", "0.33"]},
    "topk": K_OF,
    "batchtopk": K_OF,
    "matryoshka_batchtopk": K_OF,
    "jumprelu": {l0: [*JUMP, "--target-l0", str(target)] for l0, target in ((16, 14), (32, 28), (64, 56))},
}
KS = (1, 5)
COLUMNS = {
    "fvu": "FVU", "coverage": "coverage", "n_found": "F1 ≥ .5", "best_auroc": "AUROC", "probe_1": "probe k=1",
    "probe_5": "k=5", "n_latents_for_concept": "latents a concept", "split_coverage": "F1 of them",
    "absorption": "absorbed", "n_absorption_pairs": "pairs", "mass_share": "mass", "top_share": "top rows",
}  # fmt: skip


def train_member(args: argparse.Namespace, architecture: str, l0: int, seed: int) -> Path:
    """The run directory of a member, trained if it is not there."""
    from mechint.cli.train import main

    run = args.folder / "runs" / f"{architecture}-{l0}-seed{seed}"
    if (run / "manifest.json").is_file():
        return run
    words = ["--activations-path", args.activations, "--architecture", architecture, "--preset", "mechint"]
    words += ["--steps", args.steps, "--batch-size", 1024, "--expansion", args.expansion, "--seed", seed]
    words += ["--runs-root", run.parent, "--run-name", run.name, *FLAGS[architecture][l0]]
    log = args.folder / "logs" / f"{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    if run.exists():  # of a training that was stopped
        run.rename(run.with_name(f"{run.name}-stopped-{time.time_ns()}"))
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        failed = main([str(word) for word in words])
    if failed:
        raise SystemExit(f"training failed: {log}")
    return run


def figures_of(summary: dict[str, Any]) -> dict[str, Any]:
    """The columns of the table from the summary of a dictionary."""
    return {
        "l0": summary["l0"],
        "coverage": summary["coverage"],
        "coverage_ci": summary["ci95"]["coverage"],
        "n_found": summary["n_found"],
        "best_auroc": summary["best_auroc"],
        **{f"probe_{k}": summary["probe_auroc"].get(str(k)) for k in KS},
        "n_latents_for_concept": summary["n_latents_for_concept"],
        "split_coverage": summary["split_coverage"],
        "absorption": summary["absorption"],
        "n_absorption_pairs": summary["n_absorption_pairs"] or None,
        "n_live": summary["n_live"],
        **{name: summary["monosemanticity"][name] for name in ("mass_share", "top_share")},
    }


def score_all(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    from mechint.concepts import dense_probes, label_tales, make_task, score_dictionary, token_f1
    from mechint.concepts.codes import pca_dictionary, random_dictionary
    from mechint.concepts.table import dictionary_summary
    from mechint.data import open_activations
    from mechint.models import load_model
    from mechint.sae import load_sae

    rows = open_activations(args.activations)
    task = make_task(label_tales(rows, load_model(rows.info["model_name"], device="cpu").tokenizer), seed=args.seed)
    kept = args.folder / f"scores-{sha256_json([rows.sha256, args.seed, args.steps, args.expansion])[:12]}"

    def scored(name: str, encode: Any, **more: Any) -> dict[str, Any]:
        path = kept / f"{name}.json"
        if not path.is_file():
            started = time.perf_counter()
            summary = dictionary_summary(score_dictionary(task, encode, ks=KS, **more))
            write_json(path, figures_of(summary) | {"seconds": time.perf_counter() - started})
            print(f"{name}: {path.read_text()}", flush=True)
        return json.loads(path.read_text())

    members = []
    for architecture in args.architectures:
        for l0 in L0S:
            for seed in args.seeds:
                run = train_member(args, architecture, l0, seed)
                sae = load_sae(run / "sae")
                found = scored(run.name, sae.encode, W_dec=sae.W_dec)
                fvu = json.loads((run / "summary.json").read_text())["fvu"]
                members.append({"name": architecture, "asked": l0, "seed": seed, "fvu": fvu, **found})
    d_sae = args.expansion * rows.d_in
    for l0 in L0S:
        encode = random_dictionary(task.moments.mean, d_sae, l0, args.seed)
        members.append({"name": "random", "asked": l0, "seed": None, "fvu": None, **scored(f"random-{l0}", encode)})
    members.append(
        {"name": "pca", "asked": None, "seed": None, "fvu": None, **scored("pca", pca_dictionary(task.moments))}
    )
    whole = {
        "concepts": len(task.concepts),
        "texts": len(np.unique(task.labelled.text_ids)),
        "tokens": len(task.labelled.indices),
        "token_coverage": float(token_f1(task).mean()),
        "dense": float(np.nanmean(dense_probes(task))),
    }
    return members, whole


def table(members: Sequence[dict[str, Any]], whole: dict[str, Any]) -> str:
    """Markdown: a line for each architecture and L0, means over seeds; the spread of seeds behind the coverage."""
    lines = [
        f"{whole['concepts']} concepts on {whole['tokens']:,} tokens of {whole['texts']:,} texts, latents and"
        " thresholds chosen on half of the texts and reported on the other.",
        "",
        "| dictionary | L0 | " + " | ".join(COLUMNS.values()) + " |",
        "| " + " | ".join(["---"] * (len(COLUMNS) + 2)) + " |",
    ]
    for name, asked in dict.fromkeys((each["name"], each["asked"]) for each in members):
        group = [each for each in members if (each["name"], each["asked"]) == (name, asked)]
        cells = [name, f"{np.mean([each['l0'] for each in group]):.1f}"]
        for column in COLUMNS:
            values = [each[column] for each in group if each[column] is not None]
            if not values:
                cells.append("")
            elif column in ("n_found", "n_absorption_pairs"):
                cells.append(f"{np.mean(values):.0f}")
            else:
                cells.append(f"{np.mean(values):.3f}")
            if column == "coverage" and len(group) > 1:
                cells[-1] += f" ({min(values):.3f} to {max(values):.3f})"
            elif column == "coverage":
                cells[-1] += " [{:.3f}, {:.3f}]".format(*group[0]["coverage_ci"])
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Ceilings: a probe on all of the activation has a mean AUROC of {whole['dense']:.3f}, a list of token ids a"
        f" mean F1 of {whole['token_coverage']:.3f}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("activations", type=Path, help="collected from builtin/tales")
    parser.add_argument("--output", type=Path, help="write the table here too")
    parser.add_argument("--folder", type=Path, default=Path("build/concepts"), help="runs and scores")
    parser.add_argument("--architectures", nargs="+", default=list(FLAGS), choices=list(FLAGS))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--expansion", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], help="of the trainings")
    parser.add_argument("--seed", type=int, default=0, help="of the split of the texts and the random dictionary")
    args = parser.parse_args()
    text = table(*score_all(args))
    print(text)
    if args.output is not None:
        write_text(args.output, text)


if __name__ == "__main__":
    main()
