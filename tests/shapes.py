"""The shapes in the signatures are checked while tests run: `check_shapes("mechint")` before anything imports it.

jaxtyping's own import hook wraps every function, and every closure each time its function runs, which made up half of
the time of the tests, and rewrites the sources of kernels that compilers read. This one wraps the functions and
dataclasses whose signatures name a shape, and leaves everything else as it is.
"""

import ast
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

CHECK = ast.parse("__import__('jaxtyping').jaxtyped(typechecker=__import__('beartype').beartype)", mode="eval").body


def check_shapes(package: str) -> None:
    """Wrap what `package` imports from now on."""
    assert package not in sys.modules, f"{package} is imported already, its shapes would go unchecked"
    sys.meta_path.insert(0, _Finder(package))


class _Finder(MetaPathFinder):
    def __init__(self, package: str):
        self.package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != self.package:
            return None
        for finder in sys.meta_path:  # an editable install has a finder of its own
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if type(spec.loader) is SourceFileLoader:
                    spec.loader = _Loader(spec.loader.name, spec.loader.path)
                return spec
        return None


class _Loader(SourceFileLoader):
    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> CodeType:
        if b"jaxtyping" not in bytes(data):
            return super().source_to_code(data, path, _optimize=_optimize)
        tree = wrap(ast.parse(bytes(data), str(path)))
        return compile(tree, path, "exec", dont_inherit=True, optimize=_optimize)

    def get_code(self, fullname: str) -> CodeType | None:
        """Always from the source: what Python has cached is the code without checks."""
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def wrap(tree: ast.Module) -> ast.Module:
    """The module with the check on each function, method and dataclass at its top whose annotations name a shape."""
    imports = (node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "jaxtyping")
    kinds = {alias.asname or alias.name for node in imports for alias in node.names}

    def names_shape(*annotations: ast.expr | None) -> bool:
        nodes = (node for annotation in annotations if annotation is not None for node in ast.walk(annotation))
        return any(isinstance(node, ast.Name) and node.id in kinds for node in nodes)

    def visit(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                fields = [field.annotation for field in node.body if isinstance(field, ast.AnnAssign)]
                if node.decorator_list and names_shape(*fields):
                    node.decorator_list.insert(0, CHECK)  # around the __init__ that @dataclass makes
                visit(node.body)
            elif isinstance(node, ast.FunctionDef):
                given = node.args
                every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
                if names_shape(node.returns, *(one.annotation for one in every if one is not None)):
                    node.decorator_list.append(CHECK)

    visit(tree.body)
    return ast.fix_missing_locations(tree)
