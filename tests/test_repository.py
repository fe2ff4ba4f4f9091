"""What is around the code agrees with it: versions, workflows, forms, and what is built."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import dop_compile
from dop_compile.zoo import published_policies

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()


def test_one_version() -> None:
    assert f"version: {dop_compile.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert dop_compile.__version__ in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_workflows_and_forms_are_read_and_ask_for_targets_that_exist(path: Path) -> None:
    assert yaml.safe_load(path.read_text())
    for target in re.findall(r"make ([a-z][a-z-]*)", path.read_text()):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target
    for targets in re.findall(r"target: \[(.*)\]", path.read_text()):
        for target in targets.split(", "):
            assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target


def test_other_documents_are_yaml() -> None:
    for name in (".pre-commit-config.yaml", "CITATION.cff", "mkdocs.yml"):
        assert yaml.safe_load((ROOT / name).read_text())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source distribution of the checkout, and a wheel made of it."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (source,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return source, wheel


def modules(names: list[str]) -> set[str]:
    return {name for name in names if name.startswith("dop_compile/") and name.endswith((".py", "py.typed"))}


def test_the_wheel_has_every_module(built: tuple[Path, Path]) -> None:
    found = modules(zipfile.ZipFile(built[1]).namelist())
    folders = [ROOT / "dop_compile", ROOT / "dop_compile" / "passes", ROOT / "dop_compile" / "search"]
    paths = {path for folder in folders for path in folder.rglob("*.py")}
    assert found == {path.relative_to(ROOT).as_posix() for path in paths} | {"dop_compile/py.typed"}


def test_the_wheel_has_the_published_policies(built: tuple[Path, Path]) -> None:
    found = {name for name in zipfile.ZipFile(built[1]).namelist() if name.endswith(".json")}
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dop_compile" / "zoo").rglob("*.json")}
    assert found == there
    assert len(there) == len(published_policies())


def test_the_source_distribution_is_complete(built: tuple[Path, Path]) -> None:
    """What the tests and the two commands need is in it."""
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False).stdout.split()
    left_out = {name for name in tracked if not name.startswith((".git", ".pre-commit"))} - names
    links = {"dop_compile/passes", "dop_compile/search"}
    assert left_out <= links


def test_what_is_built_is_one_package_elsewhere(built: tuple[Path, Path], tmp_path: Path) -> None:
    zipfile.ZipFile(built[1]).extractall(tmp_path)
    code = (
        "import importlib.util as u, dop_compile; from dop_compile import zoo; "
        "from dop_compile.passes import report; from dop_compile.search import axes; "
        "published = [dop_compile.Policy.published(p.name, p.budget) for p in zoo.published_policies()]; "
        "print(dop_compile.__file__, axes.__file__, report.__file__, u.find_spec('passes'), u.find_spec('search'), "
        "len(published), dop_compile.__version__)"
    )
    command = [
        sys.executable,
        "-E",
        "-S",
        "-c",
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, *{_site()!r}]; {code}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    *files, passes, search, published, version = done.stdout.split()
    assert all(file.startswith(str(tmp_path)) for file in files)
    assert (passes, search, version) == ("None", "None", dop_compile.__version__)
    assert int(published) == len(published_policies())


def _site() -> list[str]:
    return [path for path in sys.path if path.endswith("site-packages")]
