"""`mechint rank`, `scripts/rank_features.py`: all latents by estimated effect, checked by real ablation."""

import signal
import sys
from collections.abc import Sequence
from typing import Any

from mechint.cli.flags import command, parse
from mechint.config import RankConfig

SHOWN = 10


@command
def main(argv: Sequence[str]) -> int:
    config = parse(RankConfig, argv, prog="rank_features.py")
    from mechint.ablation import rank_run

    # `kill`, a batch system's time limit: end as at Ctrl-C
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        done = rank_run(config, on_note=lambda note: print(f"note: {note}", file=sys.stderr))
    except KeyboardInterrupt:
        print("what is finished is kept: the same command goes on from there", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"ranking_output: {done.output}")
    for line in summary_lines(done.rows, done.summary):
        print(line)
    return 0


def summary_lines(rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> list[str]:
    """What is printed of a ranking: its first latents, the agreement with real ablation, and how to read that."""
    by_kl = summary["settings"]["by"] == "kl"
    lines = [
        f"ranked: {summary['n_latents']} latents over {summary['n_texts']} texts, {summary['n_tokens']:,} tokens"
        f" ({summary['n_silent']} never fire); {summary['n_exact_latents']} of them removed from"
        f" {summary['n_exact_texts']} texts",
        "",
        f"{'latent':>8}  {'estimated KL' if by_kl else 'estimated |CE|':>14}  {'exact KL':>10}  {'exact CE':>10}"
        f"  {'fires at':>8}",
    ]
    for row in rows[:SHOWN]:
        lines.append(
            f"{row['feature_idx']:>8}  {_number(row['attribution']):>14}  {_number(row['exact_kl']):>10}"
            f"  {_number(row['exact_ce_change'], sign=True):>10}  {row['n_active']:>8}"
        )
    lines += ["", "rank correlation of the estimate with the exact KL (95 % interval)"]
    for name, where in (("control", "all the way down"), ("top", "among the first")):
        lines.append(f"  {where + ' (' + name + ')':<28}{_interval(summary['spearman'][name])}")
    lines.append(f"  {'on the exact texts alone':<28}{_interval(summary['spearman_same_texts']['control'])}")
    return [*lines, reading(summary)]


def reading(summary: dict[str, Any]) -> str:
    """One sentence on how far the ranking may be trusted."""
    control, top = summary["spearman"]["control"], summary["spearman"]["top"]
    if control["value"] is None:
        return (
            f"How to read it: {control['n']} control latents were measured, too few to say what the ranking is worth:"
            " raise --control or --exact-texts."
        )
    if control["low"] >= 0.7:
        text = "the ranking tells strong latents from weak ones"
    elif control["low"] >= 0.4:
        text = "the ranking is a rough guide: it tells strong latents from weak ones, not neighbours from each other"
    else:
        text = "do not rely on the ranking here: take exact_kl, and measure more latents with --top and --control"
    if control["low"] >= 0.4 and (top["low"] is None or top["low"] < 0.7):
        text += "; order the first ones by exact_kl"
    above = summary["of_top_median"]["n_control_above"]
    if above is not None:
        n = summary["of_top_median"]["n_control"]
        text += f" ({above} of {n} control latents have a larger exact KL than the top's median)"
    return f"How to read it: {text}."


def _number(value: float | None, *, sign: bool = False) -> str:
    return "" if value is None else f"{value:+.3g}" if sign else f"{value:.3g}"


def _interval(found: dict[str, Any]) -> str:
    if found["value"] is None:
        return f"undefined ({found['n']} latents)"
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}], {found['n']} latents"
