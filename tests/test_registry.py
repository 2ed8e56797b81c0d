"""The house rules: every variant is complete, and modules import only what stands below them."""

from __future__ import annotations

import ast
import pathlib
import re

import cases
import pytest

from attnlab.core.registry import VARIANTS

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "attnlab"
FILES = sorted(PACKAGE.rglob("*.py"))
# Lower imports nothing that is higher; packages of one level may import each other.
LEVELS = {
    "core": 0,
    "ops": 1,
    "parallel": 2,
    "layers": 3,
    "data": 3,
    "models": 4,
    "tasks": 5,
    "train": 5,
    "infer": 5,
    "convert": 5,
    "analysis": 5,
    "compare": 6,
    "testing": 1,
    "commands": 7,
    "cli": 8,
    "__main__": 9,
}
COLLECTIVES = {
    "psum", "pmean", "pmax", "pmin", "ppermute", "pshuffle", "psum_scatter", "all_gather",
    "all_to_all", "axis_index",
}


def imports(path: pathlib.Path) -> set[str]:
    """Every module that a file imports, anywhere in it, under type-checking blocks too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = node.module or ""
            if node.level:
                base = path.relative_to(ROOT).with_suffix("").parts
                package = ".".join((*base[: len(base) - node.level], *filter(None, [package])))
            found |= {package} | {f"{package}.{alias.name}" for alias in node.names}
    return found


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def level(module: str) -> int | None:
    """The level of an attnlab module, None for anything else and for the table of contents."""
    parts = module.split(".")
    return LEVELS.get(parts[1]) if parts[0] == "attnlab" and len(parts) > 1 else None


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_is_complete(name: str):
    row = VARIANTS[name]
    assert name in cases.CASES, f"add an entry for {name} to tests/cases.py"
    case = cases.CASES[name]
    assert case.configs and case.oracle and case.bad
    assert re.search(r"arXiv \d{4}\.\d{4,5}", row.paper), f"{name} names no arXiv paper"
    assert row.summary and len(row.summary) <= 100
    readme = ROOT / "README.md"
    assert readme.exists(), "README.md is missing"
    table = re.search("<!-- variants -->(.*)<!-- /variants -->", readme.read_text(), re.DOTALL)
    assert table, "README.md has no table between <!-- variants --> and <!-- /variants -->"
    assert re.search(rf"^\|\W*{name}\W", table[1], re.MULTILINE), f"no README row for {name}"


@pytest.mark.parametrize("name", VARIANTS)
def test_layer_file(name: str):
    path = ROOT / (VARIANTS[name].path.partition(":")[0].replace(".", "/") + ".py")
    text = path.read_text()
    assert len(text.splitlines()) <= 300, f"{name_of(path)} is longer than 300 lines"
    docstring = ast.get_docstring(ast.parse(text)) or ""
    for part in ("Sources:", "Cache:", "Parallel forms:", "arXiv"):
        assert part in docstring, f"the docstring of {name_of(path)} lacks {part}"
    for number in re.findall(r"\d{4}\.\d{4,5}", VARIANTS[name].paper):
        assert number in docstring, f"{name_of(path)} does not cite {number}"


def test_no_case_without_a_variant():
    assert set(cases.CASES) == set(VARIANTS)


def test_files_are_short():
    long = {
        name_of(p): n
        for p in [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
        if (n := len(p.read_text().splitlines())) > 700
    }
    assert not long, f"over 700 lines: {long}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path: pathlib.Path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    found = imports(path)
    for other in found:
        top = other.split(".")[0]
        assert top not in ("experiments", "tests", "conftest"), f"imports {other}"
    if module == "attnlab.__init__":
        return
    own = level(module)
    assert own is not None, f"give {module} a level in tests/test_registry.py"
    for other in found:
        assert (level(other) or 0) <= own, f"{module} imports {other}, which stands above it"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("ops/*/*.py")), ids=name_of)
def test_ops_stay_apart(path: pathlib.Path):
    """Implementations of an op do not import each other, and no op knows flax."""
    found = imports(path)
    assert not any(name.split(".")[0] == "flax" for name in found), "ops are plain JAX"
    package = f"attnlab.ops.{path.parent.name}"
    own = implementation(path)
    for sibling in path.parent.glob("*.py"):
        other = implementation(sibling)
        if own and other and own != other:
            assert f"{package}.{sibling.stem}" not in found, f"{path.stem} imports {sibling.stem}"


def implementation(path: pathlib.Path) -> str | None:
    """The implementation a file of an op belongs to, by its name; None: shared by them."""
    words = {"reference", "xla", "gpu", "tpu", "triton", "vendor"} & set(path.stem.split("_"))
    return words.pop() if words else None


@pytest.mark.parametrize(
    "path", [p for p in FILES if "parallel" not in p.parts], ids=name_of
)
def test_collectives_live_in_parallel(path: pathlib.Path):
    for node in ast.walk(ast.parse(path.read_text())):
        name = node.attr if isinstance(node, ast.Attribute) else None
        if name == "axis_index" and implementation(path) == "gpu":
            continue  # of a kernel's grid
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jax"):
            name = next((a.name for a in node.names if a.name in COLLECTIVES), None)
        assert name not in COLLECTIVES, f"{name_of(path)}:{node.lineno} uses {name}"
