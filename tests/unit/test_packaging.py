"""The two mapped folders resolve to sglang_jenga.* and hide nobody else's package."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAPPED = ("radix", "kernels")
SOURCES = ("sglang_jenga", *MAPPED, "pyproject.toml", "README.md", "LICENSE")
ENTRY_POINTS = {
    "sglang.srt.plugins": "sglang_jenga.plugin:load",
    "torch.backends": "sglang_jenga.cpu.sgl_kernel:install_if_needed",
    "console_scripts": "sglang_jenga.plan.cli:main",
}


def run_python(code: str, cwd: Path, **env: str) -> str:
    """Run `code` the way `python -m` does: the cwd is first on sys.path."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def module_files() -> set[str]:
    """Every module of the checkout by its path in a wheel."""
    found = {f"sglang_jenga/{name}/{p.name}" for name in MAPPED for p in (ROOT / name).glob("*.py")}
    for path in (ROOT / "sglang_jenga").rglob("*.py"):
        place = path.relative_to(ROOT)
        if place.parts[1] not in MAPPED:  # newer Pythons follow the links
            found.add(place.as_posix())
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built without a network, from a copy: setuptools leaves folders where it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source, copy = ROOT / name, folder / "source" / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, copy, symlinks=True, ignore=ignore)
        else:
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(source, copy)
    subprocess.run(
        # What pip asks of the backend, without pip.
        [sys.executable, "-c", f"from setuptools import build_meta as b; b.build_wheel({'..'!r})"],
        cwd=folder / "source",
        check=True,
        capture_output=True,
        timeout=120,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.parametrize("name", MAPPED)
def test_mapped_folder_is_not_a_regular_package(name: str):
    """An __init__.py here would make `import kernels` find us before Hugging Face."""
    assert not (ROOT / name / "__init__.py").exists()


@pytest.mark.parametrize("name", MAPPED)
def test_checkout_link_points_at_the_folder(name: str):
    assert (ROOT / "sglang_jenga" / name).resolve() == ROOT / name


def test_bare_kernels_is_hugging_faces():
    code = "import kernels; from kernels import get_kernel; print(kernels.__file__)"

    assert not run_python(code, ROOT).startswith(str(ROOT))


@pytest.mark.slow
def test_every_module_imports_by_its_package_name():
    names = [
        f"sglang_jenga.{name}.{path.stem}" for name in MAPPED for path in (ROOT / name).glob("*.py")
    ]
    assert names

    run_python(
        "import importlib\n" + "\n".join(f"importlib.import_module({n!r})" for n in names), ROOT
    )


def test_no_build_metadata_lies_in_the_checkout():
    """Python started here would take its entry points for the installed ones."""
    assert list(ROOT.glob("*.egg-info")) == []


def test_wheel_holds_every_module_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}

    assert names == module_files() | {"sglang_jenga/py.typed", "sglang_jenga/plan/catalogue.json"}


def test_the_pythons_named_are_those_that_tests_run_on():
    text = (ROOT / "pyproject.toml").read_text()
    named = set(re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text))
    workflows = "\n".join(p.read_text() for p in (ROOT / ".github" / "workflows").glob("*.yml"))
    run = set(re.findall(r'python-version: "(3\.\d+)"', workflows))
    (least,) = re.findall(r'requires-python = ">=(3\.\d+)"', text)

    assert named == run
    assert least == min(named, key=lambda version: int(version[2:]))


def test_every_folder_is_a_package_of_the_wheel():
    """The list is explicit; one left out would be missed by users only."""
    listed = re.findall(r'"(sglang_jenga[.\w]*)"', (ROOT / "pyproject.toml").read_text())
    folders = {path.parent for path in (ROOT / "sglang_jenga").glob("**/__init__.py")}
    packages = {".".join(path.relative_to(ROOT).parts) for path in folders}

    assert packages | {f"sglang_jenga.{name}" for name in MAPPED} <= set(listed)


def test_wheel_declares_the_entry_points(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        parser = configparser.ConfigParser()
        parser.read_string(archive.read(path).decode())

    found = {group: value for group in parser.sections() for value in parser[group].values()}
    assert found == ENTRY_POINTS


def test_wheel_imports_from_anywhere(wheel: Path, tmp_path: Path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import sglang_jenga, sglang_jenga.plan.planner, sglang_jenga.radix.tree as tree\n"
        "print(sglang_jenga.__file__, tree.__file__)"
    )

    places = run_python(code, Path("/"), PYTHONPATH=str(tmp_path)).split()

    assert all(place.startswith(str(tmp_path)) for place in places)


def test_installed_project_is_this_checkout_with_its_entry_points():
    """Seen from elsewhere, as the processes of a server do."""
    code = (
        "import importlib.metadata as m, sglang_jenga, sglang_jenga.radix.tree as tree\n"
        "from pathlib import Path\n"
        "print(Path(sglang_jenga.__file__).resolve().parent)\n"
        "print(Path(tree.__file__).resolve().parent)\n"
        "for group in ('sglang.srt.plugins', 'torch.backends', 'console_scripts'):\n"
        "    print(*(e.value for e in m.entry_points(group=group) if 'sglang_jenga' in e.value))"
    )

    lines = run_python(code, Path("/")).splitlines()

    assert lines == [str(ROOT / "sglang_jenga"), str(ROOT / "radix"), *ENTRY_POINTS.values()]
