"""What is published of an investigation: its writeup as `investigation.md`, and its artefacts under their own names."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mechint.errors import MechintError, nearest
from mechint.hub.bundle import METADATA, README, Bundle, StagedFile
from mechint.hub.card import Card, Section, render_card
from mechint.hub.license import INVESTIGATION_LICENSE
from mechint.hub.sae_bundle import plain_name

WRITEUP = "investigation.md"
WRITEUPS, PUBLICATIONS = "investigations", "publications"
SUFFIX = "_artifacts"
# Names at the root that are ours; an artefact that is called so goes into the folder artifacts/.
OURS = frozenset({README.lower(), METADATA.lower(), WRITEUP, ".gitattributes"})
MAX_DESCRIPTION = 200
_PICTURES = (".png", ".jpg", ".jpeg", ".svg", ".gif", ".webp")
MAX_PICTURES = 6


class Artefacts(NamedTuple):
    """Where an investigation's artefacts lie: `folder` is None if nowhere; `note` says in words what was found."""

    folder: Path | None
    note: str


def investigation_bundle(
    slug: str,
    *,
    docs: str | Path = "docs",
    artefacts: str | Path | None = None,
    license: str = INVESTIGATION_LICENSE,
) -> Bundle:
    """The bundle of `docs/investigations/SLUG.md` and its artefacts.

    Args:
        artefacts: their folder; found by the slug in `docs/publications` if not given.

    Raises:
        MechintError: no such writeup, an empty one, a folder that is not there, or artefacts that cannot be told apart
            or lead out of their folder.
    """
    docs = Path(docs)
    writeup = find_writeup(slug, docs)
    try:
        text = writeup.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MechintError(f"{writeup} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not text.strip():
        raise MechintError(f"{writeup} is empty: nothing to publish")
    folder = find_artefacts(slug, docs, artefacts).folder
    files: dict[str, Path | bytes] = {WRITEUP: writeup}
    if folder is not None:
        files |= staged_names(folder)
    title, description = title_of(text, slug), description_of(text, slug)
    return Bundle(
        kind="investigation",
        name=investigation_repo_name(slug),
        files=files,
        license=license,
        card=lambda repo_id, staged: investigation_card(slug, title, description, repo_id, staged, license),
        metadata={
            "slug": slug,
            "title": title,
            "description": description,
            "has_publication_artifacts": folder is not None,
        },
        check_files=(WRITEUP,),
        roots=(docs.resolve(),) if folder is None else (docs.resolve(), folder.resolve()),
    )


def slugs(docs: str | Path = "docs") -> list[str]:
    """The slugs of all writeups but the index."""
    found = (Path(docs) / WRITEUPS).glob("*.md")
    return sorted(path.stem for path in found if path.stem not in ("index", "README") and path.is_file())


def find_writeup(slug: str, docs: Path) -> Path:
    """`docs/investigations/SLUG.md`. Raises `MechintError` if there is none."""
    if slug != Path(slug).name or slug in ("", ".", ".."):
        raise MechintError(f"--slug {slug!r} should be the name of a file in {docs / WRITEUPS}, without .md")
    slug = slug.removesuffix(".md")
    path = docs / WRITEUPS / f"{slug}.md"
    if not path.is_file():
        there = slugs(docs)
        hint = nearest(slug, there) if there else f"{docs / WRITEUPS} has none: give --docs"
        raise MechintError(f"investigation not found: {path}; {hint}")
    return path


def find_artefacts(slug: str, docs: str | Path, given: str | Path | None = None) -> Artefacts:
    """The folder of a slug's artefacts: `given`; else publications/SLUG_artifacts; else publications/SLUG; else the one
    folder publications/PART_artifacts where the slug is PART_..., if no other slug begins so.

    Raises:
        MechintError: `given` is no folder.
    """
    if given is not None:
        if not Path(given).is_dir():
            raise MechintError(f"--artifact-root {given} is not a folder")
        return Artefacts(Path(given), f"artefacts: {given}")
    slug = slug.removesuffix(".md")
    root = Path(docs) / PUBLICATIONS
    for name in (slug + SUFFIX, slug):
        if (root / name).is_dir():
            return Artefacts(root / name, f"artefacts: {root / name}")
    near = [
        path
        for path in sorted(root.glob(f"*{SUFFIX}"))
        if path.is_dir() and slug.startswith(path.name.removesuffix(SUFFIX) + "_")
    ]
    own = [path for path in near if _is_only_slug(slug, path.name.removesuffix(SUFFIX), slugs(docs))]
    looked = f"no {root / (slug + SUFFIX)} and no {root / slug}"
    if len(near) == 1 and own:
        return Artefacts(own[0], f"artefacts: {own[0]} ({looked}; no other investigation begins so)")
    if near:
        names = ", ".join(map(str, near))
        return Artefacts(None, f"no artefacts: {looked}; {names} may be meant: give it as --artifact-root")
    return Artefacts(None, f"no artefacts: {looked}; give --artifact-root if they lie elsewhere")


def _is_only_slug(slug: str, part: str, others: list[str]) -> bool:
    return not any(other != slug and (other == part or other.startswith(part + "_")) for other in others)


def staged_names(folder: Path) -> dict[str, Path | bytes]:
    """Every file below `folder` under its path there; what would take a name of ours goes to `artifacts/`.

    Hidden files and folders stay at home.

    Raises:
        MechintError: a link that leads out of the folder, or two files that would get one name.
    """
    found: dict[str, Path | bytes] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if any(part.startswith(".") or part == "__pycache__" for part in inside.parts):
            continue
        if not path.resolve().is_relative_to(folder.resolve()):
            raise MechintError(f"{path} is a link that leads out of {folder}: put the file itself there")
        if not path.is_file():
            continue
        name = inside.as_posix()
        if name.lower() in OURS:
            name = f"artifacts/{name}"
        taken = next((other for other in found if other.lower() == name.lower()), None)
        if taken is not None:
            raise MechintError(f"{path} and {found[taken]} would both be {name}: rename one of them")
        found[name] = path
    return found


# --- what the text says -----------------------------------------------------------------------------------------------


def _prose(text: str) -> list[str]:
    """The lines of a Markdown text without its front matter and code blocks."""
    lines = text.replace("\r\n", "\n").lstrip("\ufeff").split("\n")
    if lines and lines[0].strip() == "---":
        end = next((i for i, line in enumerate(lines[1:], start=1) if line.strip() in ("---", "...")), None)
        lines = lines[end + 1 :] if end is not None else lines
    found, fence = [], None
    for line in lines:
        mark = re.match(r"\s{0,3}(`{3,}|~{3,})", line)
        if mark and (fence is None or line.strip().startswith(fence)):
            fence = mark[1][:3] if fence is None else None
        elif fence is None:
            found.append(line)
    return found


def title_of(text: str, slug: str) -> str:
    """The first `# ` heading, else the slug in words."""
    heading = next((line[2:].strip() for line in _prose(text) if line.startswith("# ") and line[2:].strip()), None)
    return heading or slug.replace("_", " ").replace("-", " ").strip().capitalize()


def description_of(text: str, slug: str) -> str:
    """The first line that is no heading, cut at 200 characters."""
    for line in _prose(text):
        plain = line.strip()
        if plain and not plain.startswith("#") and not re.fullmatch(r"[-=*_]{3,}", plain):
            if len(plain) <= MAX_DESCRIPTION:
                return plain
            cut = plain[: MAX_DESCRIPTION - 2]
            return (cut.rsplit(maxsplit=1)[0] if " " in cut else cut[:-1]) + "..."
    return f"Investigation: {title_of(text, slug)}"


def investigation_repo_name(slug: str) -> str:
    """`inv-sae-replication-crisis`."""
    return plain_name("inv-" + slug.removesuffix(".md").replace("_", "-"))


def investigation_card(
    slug: str, title: str, description: str, repo_id: str, staged: Mapping[str, StagedFile], license: str
) -> str:
    """README.md of an investigation's bundle."""
    artefacts = [name for name in sorted(staged) if name.lower() not in OURS]
    others = f"the writeup and {len(artefacts)} file{'s' * (len(artefacts) != 1)} that belong to it"
    pictures = [name for name in artefacts if name.lower().endswith(_PICTURES)][:MAX_PICTURES]
    usage = f"""from huggingface_hub import hf_hub_download

path = hf_hub_download("{repo_id}", "{WRITEUP}")
text = open(path, encoding="utf-8").read()
print(text[:500])"""
    after = (
        f'All of it: `huggingface_hub.snapshot_download("{repo_id}")`.'
        if artefacts
        else "There are no artefacts beside the writeup."
    )
    return render_card(
        Card(
            title=title,
            lead=description,
            kind_tag="investigation",
            tags=("research",),
            license=license,
            facts=(("Investigation", slug), ("Holds", others if artefacts else "the writeup")),
            usage=usage,
            after_usage=after,
            sections=(Section("Writeup", f"[`{WRITEUP}`]({WRITEUP})"),),
            figures=tuple((name, Path(name).stem.replace("_", " ")) for name in pictures),
        ),
        staged,
    )
