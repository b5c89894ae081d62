"""The first screen in words: what the run is, its headline numbers with what they mean, and what to be careful about.

Sentences are made from numbers that are there; a number that was not measured has no sentence.
"""

from typing import Any

import numpy as np

from mechint.report.facts import number, shown
from mechint.report.style import share

DENSE = 0.1  # a latent that fires on more than this share of tokens is called dense


def story(facts: dict[str, Any], arrays: dict[str, np.ndarray] | None, n_rows: int) -> dict[str, Any]:
    """`title`, `text`, `tiles` ({value, label, meaning} each) and `caution` of a run.

    Args:
        facts: of `run_facts`.
        arrays: of `latents.look`; None where the activations are gone.
        n_rows: rows that the arrays were counted on.
    """
    q = facts["quality"]
    return {
        "title": f"{facts['d_sae']:,} latents in {where(facts['hook'])} of {facts['model'].rsplit('/', 1)[-1]}",
        "text": " ".join(_sentences(facts, q)),
        "tiles": [
            tile
            for tile in (_sparsity(facts, q), _variance(q), _loss(q), _firing(facts, q, arrays, n_rows))
            if tile is not None
        ]
        + [tile for tile in (_concepts(facts), _effects(arrays)) if tile is not None],
        "caution": " ".join(_cautions(facts, q, arrays)) or None,
    }


def where(hook: str) -> str:
    """The place of a hook in words: `blocks.3.hook_resid_post` is "the residual stream after layer 3"."""
    parts = hook.split(".")
    if len(parts) == 3 and parts[0] == "blocks" and parts[1].isdigit():
        known = {
            "hook_resid_post": "the residual stream after layer",
            "hook_resid_pre": "the residual stream before layer",
            "hook_resid_mid": "the middle of the residual stream of layer",
            "hook_mlp_out": "the MLP output of layer",
            "hook_attn_out": "the attention output of layer",
        }
        if parts[2] in known:
            return f"{known[parts[2]]} {parts[1]}"
    return hook


def _sentences(facts: dict[str, Any], q: dict[str, Any]) -> list[str]:
    article = "An" if facts["architecture"][:1] in "aeiou" else "A"
    found = [
        f"{article} {facts['architecture']} sparse autoencoder that writes the {facts['d_in']:,} numbers at"
        f" {facts['hook']} of {facts['model']} as a sum of a few of {facts['d_sae']:,} directions."
    ]
    n_train, n_val = number(q.get("n_train")), number(q.get("n_val"))
    if facts["steps"] is None:
        trained = f"Its files do not say how it was trained, only on what: {facts['dataset']}"
        n_train = n_val = None
    else:
        trained = f"It trained for {facts['steps']:,} steps of {facts['batch_size']:,} activations"
    if n_train:
        trained += f", drawn from {n_train:,.0f} of {facts['dataset']}"
    found.append(trained + (f"; {n_val:,.0f} were held out." if n_val else "."))
    clean, spliced, mean = (number(q.get(key)) for key in ("ce_clean", "ce_sae", "ce_mean"))
    if clean is not None and spliced is not None:
        text = (
            f"When the model reads the reconstruction in place of its own activation, its loss goes from {clean:.3f} to"
            f" {spliced:.3f} nats a token"
        )
        found.append(text + (f"; reading the mean activation instead, it would be {mean:.3f}." if mean else "."))
    return found


def _tile(value: str, label: str, meaning: str) -> dict[str, str]:
    return {"value": value, "label": label, "meaning": meaning}


def interval(q: dict[str, Any], key: str, write: Any) -> str:
    """` (95 % interval ...)` of a metric, empty if none was measured."""
    low, high = (q.get("ci95") or {}).get(key) or (None, None)
    return f" (95 % interval {write(low)} to {write(high)})" if low is not None and high is not None else ""


def _sparsity(facts: dict[str, Any], q: dict[str, Any]) -> dict[str, str] | None:
    if (l0 := number(q.get("l0"))) is None:
        return None
    ci = interval(q, "l0", lambda v: f"{v:.1f}")
    return _tile(
        f"{l0:.1f}",
        "latents describe a token",
        f"L0{ci}: {share(l0, facts['d_sae'])} of {facts['d_sae']:,} are active.",
    )


def _variance(q: dict[str, Any]) -> dict[str, str] | None:
    if (fvu := shown(q, "fvu")) is None:
        return None
    better = f"Its squared error is {share(1 - fvu, 1)} below that of the mean." if fvu < 1 else "Worse than the mean."
    where = f" on held-out activations{interval(q, 'fvu', lambda v: f'{100 * v:.1f}')}"
    if (typical := q.get("without_outliers")) is not None:
        n, limit, with_them = typical["n_outliers"], typical["norm_limit"], number(q.get("fvu"))
        where = f" on held-out activations without the {n:,} whose norm is above {limit:.3g}"
        better += "" if with_them is None else f" With them: {100 * with_them:.1f} %."
    return _tile(f"{100 * fvu:.1f} %", "of the variance is missed", f"FVU{where}. {better}")


def _loss(q: dict[str, Any]) -> dict[str, str] | None:
    recovered, clean, spliced = (number(q.get(key)) for key in ("ce_recovered_mean", "ce_clean", "ce_sae"))
    if recovered is None or clean is None or spliced is None:
        return None
    ci = interval(q, "ce_recovered_mean", lambda v: f"{100 * v:.2f}")
    return _tile(
        f"{100 * recovered:.1f} %" if recovered < 0.995 else f"{100 * recovered:.2f} %",
        "of the model\u2019s loss is kept",
        f"Cross-entropy recovered against mean ablation{ci}. The splice costs {spliced - clean:+.3f} nats a token.",
    )


def _firing(
    facts: dict[str, Any], q: dict[str, Any], arrays: dict[str, np.ndarray] | None, n_rows: int
) -> dict[str, str] | None:
    if arrays is not None:
        fires = arrays["fires"]
        dead, dense = int((fires == 0).sum()), int((fires > DENSE * n_rows).sum())
        text = f"Never active on {n_rows:,} tokens. {dense:,} are dense: active on over a tenth of them."
        return _tile(f"{dead:,}", f"of {len(fires):,} latents are dead", text)
    dead = number(q.get("dead_features"))
    if dead is None:
        return None
    return _tile(f"{dead:,.0f}", f"of {facts['d_sae']:,} latents are dead", "Never active on the training set.")


def _concepts(facts: dict[str, Any]) -> dict[str, str] | None:
    found = facts["concepts"]
    scores = [f1 for row in (found or {"rows": []})["rows"] if (f1 := number(row.get("f1"))) is not None]
    if not scores:
        return None
    against = []
    for key, words in (("random_f1", "a random dictionary"), ("token_f1", "a list of tokens a concept")):
        values = [value for row in found["rows"] if (value := number(row.get(key))) is not None]
        against += [f"{words} reaches {sum(values) / len(values):.2f}"] if values else []
    against = f" For comparison, {' and '.join(against)}." if against else ""
    return _tile(
        f"{sum(scores) / len(scores):.2f}",
        "mean F1 of the best latent",
        f"Over {len(scores)} known concepts; {sum(f1 >= 0.8 for f1 in scores)} reach 0.8.{against}",
    )


def _effects(arrays: dict[str, np.ndarray] | None) -> dict[str, str] | None:
    if arrays is None or not np.isfinite(arrays["effect"]).all():
        return None  # only a ranking of all latents says what share a few of them carry
    effect = np.sort(np.maximum(arrays["effect"], 0))[::-1]
    if not effect.sum() > 0:
        return None
    half = int(np.searchsorted(np.cumsum(effect), effect.sum() / 2)) + 1
    return _tile(
        f"{half:,}",
        "latents carry half of the effect",
        "Of the summed change in predictions (KL) when latents are removed one at a time.",
    )


def _cautions(facts: dict[str, Any], q: dict[str, Any], arrays: dict[str, np.ndarray] | None) -> list[str]:
    found = []
    if q.get("rows") == "heldout by row":
        found.append(
            "Held-out rows share their texts with training rows (split by row), so these numbers flatter the SAE."
        )
    if arrays is not None and (dead := float((arrays["fires"] == 0).mean())) > 0.2:
        found.append(f"{share(dead, 1)} of the latents are dead: they take part in nothing below.")
    fvu = shown(q, "fvu")
    if fvu is not None and fvu >= 0.5:
        found.append(
            "More than half of the variance is missed: what latents show here is a small part of the activation."
        )
    recovered = number(q.get("ce_recovered_mean"))
    if recovered is not None and recovered < 0.8:
        found.append("The model loses much with this SAE in place: its latents miss things that the model uses.")
    if not facts["evaluated"]:
        found.append("What the SAE costs the model has not been measured.")
    return found
