"""Imports point downwards only, and `import qadapter` is light."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import qadapter

PACKAGE = Path(qadapter.__file__).parent
# From low to high; a module imports from its own layer and from those before it, wherever the import stands.
LAYERS = (
    ("errors", "functional", "devices", "detokenising", "program"),
    ("new_folders",),
    ("fused",),
    ("config",),
    ("objective", "plots", "plots_png", "builtin"),
    ("data", "modeling"),
    ("base_states",),
    ("training_log", "training_arguments", "training_batches", "training_metrics", "training_sharded"),
    ("generation", "run_settings", "run_folder", "inspection"),
    ("retention",),
    ("trainer",),
    ("evaluation", "export"),
    ("training", "quickstart"),
    ("serving", "playground"),
    ("cli",),
)
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
# The package itself, which hands names on without importing, and `python -m qadapter` stand above all layers.
TOP = ("__init__", "__main__")


def subject(path):
    """The part of the package that a file belongs to: its folder, or its own name at the top."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_subjects(tree):
    """(line, part of the package) of each import in a module, those inside functions and TYPE_CHECKING included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [
                f"{node.module}.{alias.name}" if node.module == "qadapter" else node.module for alias in node.names
            ]
        else:
            assert not isinstance(node, ast.ImportFrom), f"line {node.lineno}: imports name the whole path"
            continue
        yield from ((node.lineno, name.split(".")[1]) for name in names if name.startswith("qadapter."))


def upward_imports(name, source):
    """What a module of the part `name` may not import, as messages."""
    found = imported_subjects(ast.parse(source))
    allowed = {other for other in HEIGHT if HEIGHT[other] <= HEIGHT[name]} | {"__version__"}
    return [f"line {line}: {name} imports {other}" for line, other in found if other not in allowed]


FILES = sorted(path for path in PACKAGE.rglob("*.py") if subject(path) not in TOP)


def test_every_module_has_a_layer():
    assert {subject(path) for path in FILES} <= set(HEIGHT), "give the new module a place in LAYERS"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    assert upward_imports(subject(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import qadapter.training", ["line 1: data imports training"]),
        ("from qadapter.cli.data import parse", ["line 1: data imports cli"]),
        ("from qadapter import cli, errors", ["line 1: data imports cli"]),
        ("from qadapter import QAdapterTrainer", ["line 1: data imports QAdapterTrainer"]),
        ("def f():\n    from qadapter.serving import app", ["line 2: data imports serving"]),
        ("import torch\nfrom qadapter.errors import DataError\nfrom qadapter.modeling import x", []),
    ],
)
def test_upward_imports_are_found_wherever_they_stand(source, expected):
    assert upward_imports("data", source) == expected


def test_importing_the_package_imports_no_heavy_library():
    code = "import sys, qadapter; sys.exit(', '.join({'torch', 'transformers', 'datasets'} & set(sys.modules)) or 0)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_public_names_are_sorted_and_there():
    assert qadapter.__all__ == sorted(qadapter.__all__)
    assert [name for name in qadapter.__all__ if not hasattr(qadapter, name)] == []
    assert set(qadapter.__all__) < set(dir(qadapter))


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'qadapter' has no attribute 'QAdaptor'"):
        _ = qadapter.QAdaptor


def test_every_error_can_be_imported_from_the_top():
    names = {name for name in vars(import_module("qadapter.errors")) if name.endswith("Error")}
    assert names <= set(qadapter.__all__)
