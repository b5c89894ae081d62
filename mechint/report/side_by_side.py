"""Several runs in one report: which settings differ, and which latents they share."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mechint.compare import Matches, cosine_by_chance, match_directions
from mechint.report.facts import shown
from mechint.report.latents import Look
from mechint.report.style import share
from mechint.sae import SAE

BINS = 40


def compare_facts(
    all_facts: Sequence[dict[str, Any]], saes: Sequence[SAE], looks: Sequence[Look | None]
) -> dict[str, Any]:
    """What the first page of several runs needs; the matches of each latent are added to `looks`.

    Latents are matched between neighbours in the order given, both ways, where the runs read the same hook of the same
    model in the same width; otherwise their directions have nothing in common, and the page says so.
    """
    names = [facts["name"] for facts in all_facts]
    title = " against ".join(names) if len(names) == 2 else f"{len(names)} runs side by side"
    found: dict[str, Any] = {
        "title": title,
        "text": _text(all_facts),
        "settings": differing_settings(all_facts),
        "matches": [],
    }
    places = {(facts["model"], facts["hook"], sae.d_in) for facts, sae in zip(all_facts, saes, strict=True)}
    if len(places) > 1:
        found["no_matches"] = (
            "The runs read different activations ("
            + "; ".join(
                f"{facts['name']}: {facts['hook']} of {facts['model']}, {sae.d_in} wide"
                for facts, sae in zip(all_facts, saes, strict=True)
            )
            + "), so their directions cannot be matched."
        )
        return found
    for left in range(len(saes) - 1):
        for one, other in ((left, left + 1), (left + 1, left)):
            matches = match_directions(saes[one].W_dec.detach().cpu(), saes[other].W_dec.detach().cpu())
            chance = cosine_by_chance(saes[other].W_dec.detach().cpu())
            found["matches"].append({**_histogram(one, other, matches, all_facts), "chance": chance})
            if (shown := looks[one]) is not None:
                _add_twins(shown, other, matches)
    return found


def differing_settings(all_facts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The settings whose values are not the same in all runs: name and values, in the order of the runs."""
    names = dict.fromkeys(name for facts in all_facts for name in facts["all_settings"])
    rows = [{"name": name, "values": [facts["all_settings"].get(name, "") for facts in all_facts]} for name in names]
    return [row for row in rows if len(set(row["values"])) > 1 and row["name"] not in ("run_name", "runs_root")]


def _text(all_facts: Sequence[dict[str, Any]]) -> str:
    """Who is sparsest, who reconstructs best, who keeps the model's loss best, where the intervals let that be said."""
    found: dict[str, list[str]] = {}
    undecided = []
    for key, sign, words, what in (
        ("l0", 1, "is the sparsest (L0 {:.1f})", "L0"),
        ("fvu", 1, "leaves the least variance unexplained ({:.3f})", "the variance left unexplained"),
        ("ce_recovered_mean", -1, "keeps the model's loss best ({:.4f} recovered)", "the cross-entropy recovered"),
    ):
        values = {i: value for i, facts in enumerate(all_facts) if (value := shown(facts["quality"], key)) is not None}
        if len(values) < 2:
            continue
        best, second = sorted(values, key=lambda i: sign * values[i])[:2]
        if _overlap(all_facts[best], all_facts[second], key):
            undecided.append(what)
        else:
            found.setdefault(all_facts[best]["name"], []).append(words.format(values[best]))
    sentences = [f"{name} {' and '.join(parts)}." for name, parts in found.items()]
    if undecided:
        sentences.append(
            f"In {' and '.join(undecided)} the best two cannot be told apart: their 95 % intervals overlap."
        )
    return " ".join(sentences) if sentences else "Their own numbers have not been measured yet."


def _overlap(one: dict[str, Any], other: dict[str, Any], key: str) -> bool:
    """Whether the intervals of a metric overlap; False where one was not measured, unless the values are equal."""
    values = [shown(facts["quality"], key) for facts in (one, other)]
    mine, theirs = ((facts["quality"].get("ci95") or {}).get(key) for facts in (one, other))
    if mine is None or theirs is None or values != [one["quality"].get(key), other["quality"].get(key)]:
        return values[0] == values[1]
    return mine[0] <= theirs[1] and theirs[0] <= mine[1]


def _histogram(one: int, other: int, matches: Matches, all_facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    cosine, mutual = matches.cosine.numpy(), matches.mutual_nearest.numpy()
    low = min(0.0, float(np.floor(cosine.min() * 10) / 10))
    edges = np.linspace(low, 1.0, BINS + 1)
    counts = [np.histogram(np.clip(part, low, 1.0), edges)[0].tolist() for part in (cosine[mutual], cosine[~mutual])]
    text = (
        f"{share(int(mutual.sum()), len(mutual))} of the latents of {all_facts[one]['name']} have a mutual match,"
        f" {share(int((cosine > 0.9).sum()), len(cosine))} one with a cosine above 0.9"
    )
    return {
        "left": one,
        "right": other,
        "edges": edges.tolist(),
        "mutual": counts[0],
        "onesided": counts[1],
        "text": text,
    }


def _add_twins(shown: Look, other: int, matches: Matches) -> None:
    shown.header.setdefault("twins", []).append({"run": other})
    shown.arrays[f"twin_{other}"] = matches.right_feature.numpy().astype(np.uint32)
    shown.arrays[f"twin_cos_{other}"] = np.rint(matches.cosine.numpy() * 10_000).astype(np.int16)
    shown.arrays[f"twin_mutual_{other}"] = matches.mutual_nearest.numpy().astype(np.uint8)
