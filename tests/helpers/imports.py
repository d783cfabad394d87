"""Which files of a package import which: python -m tests.helpers.imports [PACKAGE_FOLDER] prints a summary."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from tests.helpers.runs import REPOSITORY


def imports_of(path: Path, root: Path, *, later: bool = True) -> set[str]:
    """Return the modules that a file imports; with `later` also those inside functions and for type checkers alone.

    `from a import b` counts as a and as a.b. `root` is the folder that holds the top package.
    """
    found = set()
    package = path.relative_to(root).parent.parts
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if later else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {name} | {f"{name}.{alias.name}" for alias in node.names}
    return found


def loaded_by(path: Path, root: Path) -> set[str]:
    """Return the modules, of other packages too, that are imported when a file is; `root` holds this package."""
    found: set[str] = set()
    waiting = [path]
    while waiting:
        for name in imports_of(waiting.pop(), root, later=False) - found:
            found.add(name)
            file = root / name.replace(".", "/")
            waiting += [part for part in (file.with_suffix(".py"), file / "__init__.py") if part.is_file()]
    return found


def module_graph(folder: Path) -> dict[str, set[str]]:
    """Return, for each module of a package, by its dotted name, the modules of that package that it imports."""
    root = folder.parent
    names = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: (imports_of(path, root) & names.keys()) - {name, folder.name} for name, path in names.items()}


def unit(module: str) -> str:
    """Return the flat module or the subpackage of a package that a module is, or is in."""
    return ".".join(module.split(".")[:2])


def unit_graph(modules: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the imports between flat modules and subpackages."""
    graph: dict[str, set[str]] = {}
    for name, imported in modules.items():
        graph.setdefault(unit(name), set()).update({unit(other) for other in imported} - {unit(name)})
    return graph


def levels(graph: dict[str, set[str]]) -> int:
    """Return the number of levels, the length of the longest chain of imports. Raises CycleError where they loop."""
    level: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        level[name] = 1 + max((level[other] for other in graph[name]), default=0)
    return max(level.values())


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY / "src/abn_exp"
    modules = module_graph(folder.resolve())
    for what, graph in (("files", modules), ("units", unit_graph(modules))):
        graph.pop(folder.resolve().name, None)
        print(f"{what}: {len(graph)}, imports {sum(map(len, graph.values()))}, levels {levels(graph)}")


if __name__ == "__main__":
    main()
