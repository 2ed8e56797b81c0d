"""The wheel: what is in it, and that it imports from where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import attnlab


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of a clean copy of the source."""
    pytest.importorskip("build", reason='needs pip install "attnlab[dev]"')
    pytest.importorskip("hatchling", reason='needs pip install "attnlab[dev]"')
    root = Path(attnlab.__file__).resolve().parent.parent
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        root / "attnlab", source / "attnlab", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (root / name).exists():
            shutil.copy(root / name, source / name)
    (source / "README.md").touch()  # until it is written
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    run = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (found,) = out.glob("attnlab-*.whl")
    return found


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return set(file.namelist())


def test_wheel_holds_every_source_and_data_file(names):
    package = Path(attnlab.__file__).resolve().parent
    wanted = {
        "attnlab/" + path.relative_to(package).as_posix()
        for path in package.rglob("*")
        if path.is_file() and path.suffix in (".py", ".md", ".json", ".typed")
    }
    assert "attnlab/py.typed" in wanted and "attnlab/cli.py" in wanted
    assert wanted <= names, sorted(wanted - names)


def test_wheel_holds_nothing_else(names):
    extra = {n for n in names if not n.startswith("attnlab/") and ".dist-info/" not in n}
    assert not extra
    assert not {n for n in names if "__pycache__" in n}


def test_wheel_metadata(wheel, names):
    (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    with zipfile.ZipFile(wheel) as file:
        points = file.read(f"{info}/entry_points.txt").decode()
        metadata = file.read(f"{info}/METADATA").decode()
        license_text = file.read(f"{info}/licenses/LICENSE").decode()
    assert "attnlab = attnlab.cli:main" in points
    assert "License-Expression: Apache-2.0" in metadata
    assert "Apache License" in license_text and "END OF TERMS AND CONDITIONS" in license_text
    core = [l for l in metadata.splitlines() if l.startswith("Requires-Dist") and "extra" not in l]
    assert any("jax>=" in line for line in core) and not any("cuda" in line for line in core)


def test_wheel_imports_where_it_is_installed(wheel, tmp_path):
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(wheel)], check=True)
    code = (
        "import attnlab, pathlib, sys; "
        "assert pathlib.Path(attnlab.__file__).is_relative_to(sys.argv[1]), attnlab.__file__; "
        "print(attnlab.__version__, attnlab.GQAConfig(dim=8, num_heads=2).K); "
        "from attnlab.cli import main; sys.exit(main(['list', '--json']))"
    )
    env = os.environ | {"PYTHONPATH": str(target), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", code, str(target)],
        cwd=tmp_path, env=env, capture_output=True, text=True,
    )
    assert run.returncode == 0, run.stderr
    version, _, rest = run.stdout.partition(" ")
    assert version != "0+source" and rest.startswith("2\n")
    script = target / "bin" / "attnlab"
    assert script.exists()


def test_table_of_contents():
    init = Path(attnlab.__file__).read_text(encoding="utf-8")
    assert len(init.splitlines()) <= 80
    for name in attnlab.__all__:
        assert getattr(attnlab, name) is not None, name
    assert set(dir(attnlab)) == set(attnlab.__all__)
    with pytest.raises(AttributeError, match="GQB"):
        attnlab.GQB  # noqa: B018
