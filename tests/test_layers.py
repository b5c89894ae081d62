"""The house's one-way imports, walked from the source, and the lightness of what must be light."""

import ast
import functools
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mechint"

# A file imports only from groups above its own. Groups on one line do not import one another.
GROUPS = [
    ["errors", "lazy", "locks", "streams"],
    ["provenance"],
    ["config"],
    ["huggingface"],
    ["builtin"],
    ["models"],
    ["sae"],
    ["formats"],
    ["sae.load"],
    ["kernels"],
    ["data"],
    ["runs"],
    ["inside"],
    ["eval"],
    ["train"],
    ["ablation", "analysis", "compare", "concepts", "steering"],
    ["report"],
    ["saelens"],
    ["hub"],
    ["server"],
    ["cli"],
]
RANK = {name: rank for rank, names in enumerate(GROUPS) for name in names}
# config needs errors and JSON files only; builtin's recipe is a command and writes files as commands do.
LIGHT = (
    "mechint",
    "mechint.errors",
    "mechint.config",
    "mechint.cli",
    "mechint.cli.train",
    "mechint.builtin.tales",
    "mechint.huggingface.registry",
)


# The class's own way to open and write files, `SAE.load`, and its names: the one arrow that runs back up.
DOOR = "sae.load"
DOORWAY = (PACKAGE / "sae" / "base.py", PACKAGE / "sae" / "__init__.py")


def group_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return DOOR if relative.as_posix() == "sae/load.py" else relative.parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[tuple[int, str]]:
    """`(line, group)` of every import of our own package, at any depth of the file."""
    return [
        (line, DOOR if f"{name}.".startswith(f"mechint.{DOOR}.") else name.split(".")[1])
        for line, name in names_imported(path)
    ]


def names_imported(path: Path) -> list[tuple[int, str]]:
    """`(line, full name)` of everything that a file takes from our own package, at any depth of the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides where it goes"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found += [(node.lineno, name) for name in names if name.startswith("mechint.")]
    return found


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or not path.name.startswith("__"))


def test_every_file_belongs_to_a_group():
    assert len(sources()) > 20
    unknown = {group_of(path) for path in sources()} - RANK.keys()
    assert not unknown, f"add {unknown} to GROUPS, in its place"


def test_imports_flow_one_way():
    wrong = []
    for path in sources():
        own = group_of(path)
        for line, other in imports_of(path):
            if other == "__version__" or other == own or (path in DOORWAY and other == DOOR):
                continue
            if other not in RANK or RANK[other] >= RANK[own]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_no_circle_of_files():
    """No two files need each other, whatever stands between them: imports inside functions count, and so does a
    package's `__init__`."""
    files = {str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): path for path in PACKAGE.rglob("*.py")}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    needs: dict[str, set[str]] = {}
    for name, path in files.items():
        taken = {full if full in files else full.rpartition(".")[0] for _, full in names_imported(path)}
        needs[name] = (taken & files.keys()) - {name, f"mechint.{DOOR}" if path in DOORWAY else ""}
    # files that need nothing which is left fall away, until only circles and what leads to them are there
    while free := [name for name, needed in needs.items() if not needed & needs.keys()]:
        for name in free:
            del needs[name]
    # and then those that nothing left needs
    while free := needs.keys() - set().union(*needs.values()):
        for name in free:
            del needs[name]
    circles = {name: sorted(needed & needs.keys()) for name, needed in needs.items()}
    assert not circles, "these files import one another: " + "; ".join(f"{a} -> {b}" for a, b in circles.items())


def test_only_one_file_imports_transformer_lens():
    files = []
    for path in [*PACKAGE.rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(module.split(".")[0] == "transformer_lens" for module in modules):
                files.append(str(path.relative_to(PACKAGE)))
    assert set(files) == {"models/bridge.py"}


def test_sae_package_knows_no_model_store_or_run():
    files = [path for path in (PACKAGE / "sae").glob("*.py") if group_of(path) == "sae"]
    others = {group for path in files for _, group in imports_of(path)}
    assert others <= {"sae", "errors", "lazy", "config", "provenance", DOOR}


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(module: str):
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'datasets', 'pandas'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_kernels_are_sealed():
    """Outside, only what a box of kernels gives is used; the boxes know each other not at all."""
    wrong = []
    for box in ("cpu", "gpu"):
        folder = PACKAGE / "kernels" / box
        inside = {f"mechint.kernels.{box}.{path.stem}" for path in folder.glob("*.py")}
        for path in PACKAGE.rglob("*.py"):
            if folder in path.parents:
                continue
            reached = [name for _, name in names_imported(path) if name.rpartition(".")[0] in inside or name in inside]
            wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in reached]
            if "kernels" in path.parts and path.parent.parent == folder.parent:  # the other box
                wrong += [f"{path.relative_to(ROOT)}: {n}" for _, n in names_imported(path) if f"kernels.{box}" in n]
    assert not wrong, "\n".join(wrong)


def test_no_path_hacks_and_no_postponed_annotations():
    # Built from parts so that this file does not find itself.
    forbidden = ["sys.path." + "insert", "sys.path." + "append", "from __future__ import " + "annotations"]
    folders = [PACKAGE, ROOT / "scripts", ROOT / "tests", ROOT / "benchmarks"]
    for path in [p for folder in folders for p in folder.rglob("*.py")] + [ROOT / "train.py", ROOT / "sae.py"]:
        text = path.read_text(encoding="utf-8")
        assert not [word for word in forbidden if word in text], path


def test_every_name_taken_from_the_package_is_there():
    """Packages that load lazily answer type checkers for any name, so a name that moved shows only here."""
    folders = [PACKAGE, *(ROOT / name for name in ("tests", "benchmarks", "examples", "scripts", "notebooks"))]
    missing = []
    for path in (path for folder in folders for path in sorted(folder.rglob("*.py"))):
        for line, name in names_imported(path):
            if not _resolves(name):
                missing.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert not missing, "\n".join(missing)


@functools.cache
def _resolves(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one; optional libraries may be missing."""
    module, _, attribute = name.rpartition(".")
    try:
        if importlib.util.find_spec(name) is not None:
            return True
    except ModuleNotFoundError:  # its parent is no package
        pass
    try:
        return hasattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        return not str(error.name).startswith("mechint")
