"""README.md of a repository of several checkpoints, and the figure that shows how they were chosen."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mechint.hub.card import TAG, is_hub_id, md, table
from mechint.hub.frontier import Candidate, pareto
from mechint.hub.license import ACCEPTED, front_matter_license
from mechint.hub.multi import Repository

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("Run ID", "Layer", "L0", "NMSE", "Path")
# The most panels that stand side by side in the figure.
PANELS_WIDE = 3


def readme(repository: Repository, repo_id: str | None = None) -> str:
    """The text of README.md: front matter, links, the table of checkpoints, and how to load one."""
    spec = repository.spec
    repo_id = repo_id or spec.repo
    shown = repository.checkpoints[-1]
    parts = [f"# {md(spec.title or spec.name)}"]
    if spec.description:
        parts.append(md(spec.description))
    n, n_layers = len(repository.checkpoints), len(repository.chosen)
    parts.append(
        f"{n} checkpoint{'s' * (n != 1)} on {n_layers} layer{'s' * (n_layers != 1)}: of each layer the Pareto frontier"
        " of sparsity (L0) against error (NMSE), thinned to equal steps of log L0."
    )
    if repository.license.lower() not in ACCEPTED:
        parts.append(f"Licence: **{md(repository.license)}**.")
    if repository.links:
        parts.append("\n".join(f"- **{md(name)}:** {_address(link)}" for name, link in repository.links.items()))
    rows = [
        (
            md(c.candidate.run_id),
            str(c.candidate.layer),
            f"{c.candidate.l0:.1f}",
            error_text(c.candidate.nmse),
            f"`{c.path if repository.format == 'saev' else c.folder}`",
        )
        for c in repository.checkpoints
    ]
    parts += [
        "## Checkpoints",
        table(COLUMNS, rows, right=(1, 2, 3)),
        "L0 is the mean number of active latents; NMSE is the squared error over the variance of the activations (0 is"
        " perfect). `manifest.jsonl` holds the same with each file's SHA-256, size and activation, one line each.",
        "## How to use",
        *_usage(repo_id, shown.path, shown.folder, repository.format),
    ]
    return f"---\n{_front_matter(repository)}\n---\n\n" + "\n\n".join(parts) + "\n"


def error_text(nmse: float) -> str:
    """Three decimals, and for small values three digits: 0.042, 0.00518."""
    return f"{nmse:.3f}" if nmse >= 0.01 else f"{nmse:.3g}"


def _usage(repo_id: str, path: str, folder: str, format: str) -> Iterable[str]:
    everything = f'from huggingface_hub import snapshot_download\n\nfolder = snapshot_download("{repo_id}")'
    if format == "saev":
        yield "One checkpoint, with mechint:"
        yield _python(
            "from huggingface_hub import hf_hub_download\n\nfrom mechint import SAE\n\n"
            f'path = hf_hub_download("{repo_id}", "{path}")\nsae = SAE.load_from_disk(path)'
        )
        yield "The same file with [saev](https://github.com/OSU-NLP-Group/saev), whose format it is:"
        yield _python(
            "import saev.nn\nfrom huggingface_hub import hf_hub_download\n\n"
            f'path = hf_hub_download("{repo_id}", "{path}")\nsae = saev.nn.load(path)'
        )
        yield "Each file is one line of JSON, which its loader needs, and behind it what `torch.save` wrote."
    else:
        yield "One checkpoint, with mechint (or `from sae_lens import SAE`, which reads the same files):"
        yield _python(f'from mechint import SAE\n\nsae = SAE.from_pretrained("{repo_id}", "{folder}")')
    yield "Everything:"
    yield _python(everything)


def _python(code: str) -> str:
    return f"```python\n{code}\n```"


def _address(link: str) -> str:
    """A link as it is if it is plainly one, else as text."""
    plain = link.startswith(("https://", "http://", "mailto:")) and not set(link) & set(" <>()[]`\n\"'\\")
    return f"<{link}>" if plain else md(link)


def _front_matter(repository: Repository) -> str:
    from huggingface_hub import ModelCardData

    spec = repository.spec
    licence: dict[str, Any] = dict(front_matter_license(repository.license))
    return ModelCardData(
        **licence,
        library_name=repository.format,
        tags=[TAG, "sparse-autoencoder", *spec.tags],
        base_model=spec.base_model if is_hub_id(spec.base_model) else None,
        datasets=[name for name in spec.datasets if is_hub_id(name)] or None,
    ).to_yaml()


def selection_figure(
    candidates: Iterable[Candidate], chosen: Mapping[int, Sequence[Candidate]], *, title: str = ""
) -> "Figure":
    """L0 against NMSE, a panel a layer: every run that could be chosen, the frontier as a line, the chosen ringed."""
    from mechint.report.style import BLUE, GREY, ORANGE, dress, legend, new_figure, plain_log_ticks

    groups: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.layer, []).append(candidate)
    layers = sorted(groups)
    wide = min(PANELS_WIDE, len(layers))
    high = -(-len(layers) // wide)
    fig = new_figure(4.2 * wide + 0.6, 3.2 * high + 0.5)
    axes: list[Any] = [*fig.subplots(high, wide, squeeze=False).flat]
    for ax, layer in zip(axes, layers, strict=False):
        runs, frontier, picked = groups[layer], pareto(groups[layer]), chosen.get(layer, ())
        ax.plot([c.l0 for c in frontier], [c.nmse for c in frontier], color=BLUE, linewidth=1.6, label="frontier")
        ax.plot([c.l0 for c in runs], [c.nmse for c in runs], "o", color=GREY, markersize=4, label="runs")
        ax.plot(
            [c.l0 for c in picked], [c.nmse for c in picked], "o",
            color=ORANGE, markeredgecolor="black", markersize=8, label="chosen",
        )  # fmt: skip
        dress(ax, f"layer {layer}: {len(picked)} of {len(runs)} runs", "L0: active latents (log)", "NMSE")
        ax.set_xscale("log")
        low, top = min(c.l0 for c in runs), max(c.l0 for c in runs)
        plain_log_ticks(ax.xaxis, low, top)
        if low == top:  # one point: a log axis around it would have no number on it
            ax.set_xlim(low / 2, top * 2)
        if layer == layers[0]:
            legend(ax)
    for ax in axes[len(layers) :]:
        ax.set_visible(False)
    if title:
        fig.suptitle(title, fontsize=11, fontweight="bold", parse_math=False)
    return fig
