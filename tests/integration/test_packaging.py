"""Wheel and sdist hold what they should and nothing else: the files of the packages, and of the project."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import hypersd_bench

ROOT = Path(hypersd_bench.__file__).resolve().parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
PACKAGES = ("hypersd_bench", "metrics", "distill", "user_study", "reports")
BESIDE = ("tests", "benchmarks", "docs", "specs")
FILES = ("Makefile", "requirements.lock", "CHANGELOG.md", "CONTRIBUTING.md", "README.md", "LICENSE", "pyproject.toml")
ADDED = {"PKG-INFO", ".gitignore"}  # by the builder
pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="what is tracked is known in a clone alone")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True)
    return folder


def kept(*paths: str) -> set[str]:
    """The files below paths that git knows or would take."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in done.stdout.split("\0") if name and (ROOT / name).exists()}


def test_the_wheel_holds_the_packages(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        said = archive.read(metadata).decode()
    assert names == kept(*PACKAGES)
    assert f"Version: {VERSION}\n" in said
    assert wheel.stat().st_size < 60 * 2**20


def test_the_sdist_holds_the_project(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names - ADDED == kept(*PACKAGES, *BESIDE, *FILES)
