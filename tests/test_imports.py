"""Modules of the package import from lower layers only, and files and functions stay short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lion8bit"

# Bottom to top; a name stands for the module or for all modules of the folder. A module imports from lower layers.
LAYERS = (
    ("layout", "files"),
    ("sharding",),
    ("reference",),
    ("quantization",),
    ("state",),
    ("device_scalars",),
    ("table",),
    ("backends.native_library",),
    ("backends.nvrtc", "backends.cpu", "backends.portable"),
    ("backends.cuda",),
    ("backends.select",),
    ("paging", "options"),
    ("loading",),
    ("lion", "checkpoints", "compiled", "inspection"),
    ("stepper",),
    ("optimizer",),
    ("release", "groups", "planner"),
    ("",),  # lion8bit/__init__.py, the public names
    ("integrations",),
    ("tools", "__main__"),
)
WITHIN = {("planner", "planner"), ("integrations", "integrations"), ("tools", "tools"), ("__main__", "tools")}
FREE = {"backends"}  # folders whose __init__.py holds nothing
LONGEST_FILE, LONGEST_FUNCTION = 500, 60
LONG_FUNCTIONS = {"reference.lion_step"}  # the definition of the step, in one piece


def modules(package: Path) -> dict[str, Path]:
    """The package's files by the module's name without the package's; its own __init__.py is ""."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, package: str, known: set[str]) -> set[str]:
    """Modules of the package that a file imports: also inside of functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports must be absolute"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [each if each.removeprefix(f"{package}.") in known else str(node.module) for each in submodules]
        else:
            continue
        found |= {name.removeprefix(package).lstrip(".") for name in names if f"{name}.".startswith(f"{package}.")}
    return found


def layer_of(module: str) -> tuple[int, str] | None:
    """The number of a module's layer and the name that stands for it there."""
    for number, names in enumerate(LAYERS):
        for name in names:
            if module == name or (name and module.startswith(f"{name}.")):
                return number, name
    return None


def circles(arrows: dict[str, set[str]]) -> Iterator[str]:
    """Each chain of imports that ends where it began, in words."""
    finished: set[str] = set()

    def follow(module: str, chain: list[str]) -> Iterator[str]:
        if module in chain:
            yield " -> ".join([*chain[chain.index(module) :], module])
        elif module not in finished:
            for other in sorted(arrows.get(module, ())):
                yield from follow(other, [*chain, module])
            finished.add(module)

    for module in sorted(arrows):
        yield from follow(module, [])


def wrong_imports(package: Path) -> list[str]:
    """What is wrong with the imports of a package, one sentence each."""
    files = modules(package)
    arrows = {name: imported(path, package.name, set(files)) - FREE for name, path in files.items()}
    faults = [f"circle: {circle}" for circle in circles(arrows)]
    for module, others in arrows.items():
        place = layer_of(module)
        if place is None:
            if module not in FREE:
                faults.append(f"{module} must be in LAYERS of tests/test_imports.py")
            continue
        for other in sorted(others):
            below = layer_of(other)
            if below is None:
                faults.append(f"{module} imports {other}, which must be in LAYERS of tests/test_imports.py")
            elif below[0] > place[0] or (below[0] == place[0] and (place[1], below[1]) not in WITHIN):
                faults.append(
                    f"{module or package.name} imports {other or package.name}, which is not in a lower layer"
                )
    return faults


def too_long(package: Path) -> list[str]:
    """Files and functions beyond the limits."""
    faults = []
    for module, path in modules(package).items():
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > LONGEST_FILE:
            faults.append(f"{path.name} must have at most {LONGEST_FILE} lines, got {len(text.splitlines())}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length, name = int(node.end_lineno or 0) - node.lineno + 1, f"{module}.{node.name}"
                if length > LONGEST_FUNCTION and name not in LONG_FUNCTIONS:
                    faults.append(f"{name} must have at most {LONGEST_FUNCTION} lines, got {length}")
    return faults


def test_modules_import_from_lower_layers_only() -> None:
    faults = wrong_imports(PACKAGE)
    assert not faults, "\n".join(faults)


def test_files_and_functions_are_short() -> None:
    faults = too_long(PACKAGE)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"table": "from lion8bit.layout import X", "layout": "import torch"}, []),
        (
            {
                "table": "import lion8bit.layout",
                "tools/cli": "from lion8bit.tools import demo",
                "tools/demo/__init__": "",
            },
            [],
        ),
        (
            {"layout": "def f():\n    from lion8bit import table"},
            ["layout imports table, which is not in a lower layer"],
        ),
        (
            {"layout": "if TYPE_CHECKING:\n    from lion8bit.optimizer import Lion8bit"},
            ["layout imports optimizer, which is not in a lower layer"],
        ),
        ({"table": "from lion8bit import Lion8bit"}, ["table imports lion8bit, which is not in a lower layer"]),
        ({"layout": "import lion8bit.files"}, ["layout imports files, which is not in a lower layer"]),
        (
            {"planner/one": "import lion8bit.planner.two", "planner/two": "from lion8bit.planner import one"},
            ["circle: planner.one -> planner.two -> planner.one"],
        ),
        ({"surprise": ""}, ["surprise must be in LAYERS of tests/test_imports.py"]),
    ],
    ids=["sound", "within", "upward", "type checking", "public face", "same layer", "circle", "unknown"],
)
def test_faults_are_found(sources: dict[str, str], expected: list[str], tmp_path: Path) -> None:
    package = tmp_path / "lion8bit"
    for name, text in {"__init__": "", **sources}.items():
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in ("layout", "files", "table", "optimizer"):
        (package / f"{name}.py").touch()
    for folder in {path.parent for path in package.rglob("*.py")}:
        (folder / "__init__.py").touch()
    assert wrong_imports(package) == expected


def test_long_files_and_functions_are_found(tmp_path: Path) -> None:
    package = tmp_path / "lion8bit"
    package.mkdir()
    (package / "long.py").write_text("def f():\n" + "    pass\n" * 60 + "x = 1\n" * 440)
    assert too_long(package) == [
        "long.py must have at most 500 lines, got 501",
        "long.f must have at most 60 lines, got 61",
    ]
