"""`upload_saes_to_huggingface`: SAEs into one repository of the Hub, each in a folder of its own, in one commit."""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mechint.errors import MechintError
from mechint.formats.saelens import CFG_FILE, SPARSITY_FILE, WEIGHTS_FILE
from mechint.huggingface.client import hub_api, hub_errors
from mechint.huggingface.fetch import is_inside
from mechint.sae.base import as_sae

# What is uploaded of an SAE's folder; whatever else lies there stays.
UPLOADED = (CFG_FILE, WEIGHTS_FILE, SPARSITY_FILE, "runner_cfg.json")


def upload_saes_to_huggingface(
    saes_dict: Mapping[str, Any] | None = None,
    hf_repo_id: str | None = None,
    hf_revision: str = "main",
    show_progress: bool = True,
    add_default_readme: bool = True,
    *,
    saes: Iterable[Any] | None = None,
    repo_id: str | None = None,
    token: str | None = None,
    private: bool = False,
) -> str:
    """Upload SAEs as SAELens lays them out, so that `SAE.from_pretrained(repo_id, sae_id)` opens them, there and here.

    Args:
        saes_dict: the id of each SAE (its folder in the repository), and the SAE, or the path of a folder or run.
        saes: SAEs without ids: each is called by its hook, and by its width too where two have one hook.
        repo_id: another name of `hf_repo_id`.
        token: of the Hub; the one that you are logged in with if not given. It is not kept.

    Returns:
        The address of the commit.

    Raises:
        MechintError: nothing to upload, a folder that holds no SAE, an id that leads out of the repository (all known
            before anything is sent), or what the Hub answered.
    """
    target = hf_repo_id or repo_id
    if not target:
        raise MechintError("give the repository: upload_saes_to_huggingface(..., repo_id='user/name')")
    named = dict(saes_dict or {}) | _named(saes or ())
    if not named:
        raise MechintError("no SAEs to upload: pass saes=[sae], or {'id': sae}")
    for name in named:
        if not is_inside(name):
            raise MechintError(f"SAE id {name!r} should be a path inside the repository, without '..' or a leading '/'")
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: _folder(sae, Path(temporary) / str(i)) for i, (name, sae) in enumerate(named.items())}
        api = hub_api(token)
        with hub_errors("uploading to", target, token):
            api.create_repo(target, private=private, exist_ok=True)
            if hf_revision != "main":
                api.create_branch(target, branch=hf_revision, exist_ok=True)
            operations = operations_for(api, target, folders, revision=hf_revision, add_readme=add_default_readme)
            what = next(iter(named)) if len(named) == 1 else f"{len(named)} SAEs"
            done = api.create_commit(target, operations, commit_message=f"Upload {what}", revision=hf_revision)
    if show_progress:
        import sys

        print(f"uploaded {', '.join(named)} to {target}", file=sys.stderr)
    return str(done.commit_url)


def operations_for(
    api: Any,
    repo_id: str,
    folders: Mapping[str, Path],
    *,
    names: Iterable[str] = UPLOADED,
    revision: str = "main",
    add_readme: bool = True,
    opened: Callable[[Path], Any] = Path,
) -> list[Any]:
    """What one commit has to add, so that each SAE's files lie in the folder of its id; errors are the client's own.

    Args:
        api: of the repository, which is there.
        folders: the folder of each SAE's files on this machine, under its id; "." is the root of the repository.
        names: of the files that are taken from each.
        add_readme: a README too, if the repository has none.
        opened: what the client reads a file from: its path, a file that is open, or its bytes.
    """
    from huggingface_hub import CommitOperationAdd

    places = {
        file if place == "." else f"{place}/{file}": folder / file
        for place, folder in folders.items()
        for file in names
        if (folder / file).is_file()
    }
    operations = [CommitOperationAdd(place, opened(file)) for place, file in places.items()]
    if add_readme and not api.file_exists(repo_id, "README.md", revision=revision):
        operations.append(CommitOperationAdd("README.md", readme(repo_id, folders).encode()))
    return operations


def readme(repo_id: str, names: Iterable[str]) -> str:
    """The README of a repository that had none."""
    names = list(names)
    listed = "\n".join(f"- `{name}`" for name in names)
    return f"""---
library_name: saelens
---

# Sparse autoencoders

{listed}

```python
from mechint import SAE  # or: from sae_lens import SAE

sae = SAE.from_pretrained("{repo_id}", "{names[0]}")
```
"""


def _named(saes: Iterable[Any]) -> dict[str, Any]:
    """SAEs by id: the hook, with the width where that alone is not enough, and then a number."""
    # an SAE can itself be iterated over
    listed = [as_sae(sae) for sae in ([saes] if hasattr(saes, "W_dec") else saes)]
    hooks = [str(sae.cfg.metadata.get("hook_name") or "sae") for sae in listed]
    found: dict[str, Any] = {}
    for sae, hook in zip(listed, hooks, strict=True):
        name = hook if hooks.count(hook) == 1 else f"{hook}/width_{sae.cfg.d_sae}"
        number = 2
        while name in found:
            name = f"{hook}/width_{sae.cfg.d_sae}_{number}"
            number += 1
        found[name] = sae
    return found


def _folder(sae: Any, made: Path) -> Path:
    """A folder that holds the SAE in SAELens's layout."""
    if not isinstance(sae, (str, Path)):
        as_sae(sae).save_model(made)
        return made
    for folder in (Path(sae), Path(sae) / "sae"):  # a run directory has it below
        if (folder / CFG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file():
            return folder
    raise MechintError(f"{sae} holds no {CFG_FILE} with {WEIGHTS_FILE}: not an SAE in SAELens's layout, and no run")
