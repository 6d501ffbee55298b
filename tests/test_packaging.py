"""What is built and shipped: sdist and wheel, console commands, metadata, and the workflows that release them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import write_file

import quantloom

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = {path.stem: path for path in (ROOT / ".github" / "workflows").glob("*.yml")}
SCRIPTS = ("quantloom", "convert_to_quant", "convert-to-quant", "ctq")
FILES = ("__init__.py", "py.typed", "pyproject.toml", "README.md", "LICENSE")
FOLDERS = ("flow", "formats", "stages", "tests", "examples")


def done(*words: object, cwd: Path, **extra: str) -> str:
    """Output of a command that must succeed, in an environment that does not lead back to the checkout."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [str(word) for word in words], cwd=cwd, env={**clean, **extra}, capture_output=True, text=True, timeout=240
    )
    assert ran.returncode == 0, f"{words}:\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dist/`` with sdist and wheel, built from a copy of the sources; the wheel from the sdist, as always."""
    pytest.importorskip("build")
    copy = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    done(sys.executable, "-m", "build", "--no-isolation", cwd=copy)
    return copy / "dist"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    return next(dist.glob("*.whl"))


def test_the_packages_pass_twine_check(dist: Path) -> None:
    pytest.importorskip("twine")
    assert len(list(dist.iterdir())) == 2
    checked = done(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *dist.iterdir(), cwd=dist)
    assert checked.count("PASSED") == 2


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    own = {
        f"quantloom/{path.relative_to(ROOT).as_posix()}"
        for pattern in ("__init__.py", "py.typed", "flow/*.py", "stages/*.py", "stages/*.toml", "formats/*.py")
        for path in ROOT.glob(pattern)
    }
    described = {name for name in names if ".dist-info/" in name}
    assert names - described == own
    assert not any(part in name for name in names for part in ("test", "example", "benchmark", "conftest"))


def test_its_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        at = next(name for name in archive.namelist() if name.endswith("METADATA"))
        metadata = Parser().parsestr(archive.read(at).decode())
        licence = next(name for name in archive.namelist() if name.endswith("licenses/LICENSE"))
        assert archive.read(licence).decode() == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert metadata["Version"] == quantloom.__version__ == PROJECT["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    classifiers = metadata.get_all("Classifier") or []
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)} <= set(classifiers)
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_the_wheel_runs_where_nothing_else_of_ours_is(wheel: Path, tmp_path: Path) -> None:
    """Its commands, in an environment that has the dependencies of this one and of quantloom the wheel alone."""
    place = tmp_path / "environment"
    venv.create(place, with_pip=False, symlinks=os.name != "nt")
    scripts = place / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / Path(sys.executable).name
    if not python.exists():
        python = scripts / ("python.exe" if os.name == "nt" else "python")
    installed = Path(done(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    pip = (sys.executable, "-m", "pip", "--python", python)
    done(*pip, "install", "--no-deps", "--no-index", "--quiet", wheel, cwd=tmp_path)
    (installed / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    where = done(python, "-c", "import quantloom.flow.cli as cli; print(cli.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(installed)

    write_file(tmp_path / "tiny.safetensors")
    command = scripts / "quantloom"
    assert PROJECT["version"] in done(command, "--version", cwd=tmp_path)
    done(command, "convert", "tiny.safetensors", "small.safetensors", "--format", "mxfp8", cwd=tmp_path)
    done(command, "verify", "small.safetensors", "--against", "tiny.safetensors", cwd=tmp_path)
    for name in SCRIPTS[1:]:
        assert "--help-modes" in done(scripts / name, "--help", cwd=tmp_path)


def test_every_console_command_is_declared() -> None:
    assert tuple(PROJECT["scripts"]) == SCRIPTS
    try:
        assert version("quantloom") == PROJECT["version"]
    except PackageNotFoundError:
        pytest.skip("quantloom is on the path without being installed")


def test_the_table_of_requirements_says_what_the_package_asks_for() -> None:
    needed = {re.split(r"[>=]+", line)[0]: re.split(r"[>=]+", line)[1] for line in PROJECT["dependencies"]}
    python = PROJECT["requires-python"].removeprefix(">=")
    guide, readme = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/GUIDE.md", "README.md"))
    assert f"| Python | {python} |" in guide
    assert f"| torch | {needed['torch']}, " in guide
    assert f"| Python | {python} or later |" in readme
    assert f"| torch | {needed['torch']} or later" in readme
    for page in (guide, readme):
        assert "CUDA" in page
        assert {"12.8", "2.10", "13.0"} <= set(re.findall(r"\d+\.\d+", page))


def test_the_changelog_begins_with_this_version() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] in (PROJECT["version"], "Unreleased")
    assert PROJECT["version"] in headings


# Workflows


def load(name: str) -> Any:
    return yaml.safe_load(WORKFLOWS[name].read_text(encoding="utf-8"))


def test_the_matrix_of_tests() -> None:
    job = load("test")["jobs"]["test"]
    matrix = job["strategy"]["matrix"]
    assert matrix["os"] == ["ubuntu-latest", "windows-latest", "macos-latest"]
    declared = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert matrix["python"] == declared
    commands = [step.get("run", "") for step in job["steps"]]
    assert any("ruff check" in each for each in commands)
    assert any("mypy" in each for each in commands)
    assert any("pytest" in each for each in commands)


def test_the_release_goes_from_build_to_publish() -> None:
    jobs = load("release")["jobs"]
    assert set(jobs["build"]["outputs"]) == {"version", "changed"}
    uploaded = next(step for step in jobs["build"]["steps"] if "upload-artifact" in step.get("uses", ""))
    assert uploaded["with"]["name"] == "dist"
    for name, needed in (("release", {"test", "build"}), ("publish", {"build", "release"})):
        assert set(jobs[name]["needs"]) == needed
        assert jobs[name]["if"] == "needs.build.outputs.changed == 'true'"
        fetched = next(step for step in jobs[name]["steps"] if "download-artifact" in step.get("uses", ""))
        assert fetched["with"]["name"] == "dist"
    publish = jobs["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["steps"][-1]["uses"].startswith("pypa/gh-action-pypi-publish@")
    others = [job for name, job in jobs.items() if name != "publish"]
    assert not any("id-token" in job.get("permissions", {}) for job in others)
    assert "${{ secrets." not in WORKFLOWS["release"].read_text(encoding="utf-8")


@pytest.mark.skipif(os.name == "nt" or not (shutil.which("git") and shutil.which("bash")), reason="needs git and bash")
@pytest.mark.parametrize("tagged", ["", "v0.9.0", "v1.2.3"])
def test_a_version_without_a_tag_is_a_new_one(tmp_path: Path, tagged: str) -> None:
    """The step of the workflow itself, in a repository of its own."""
    steps = load("release")["jobs"]["build"]["steps"]
    script = next(step["run"] for step in steps if step.get("id") == "version")
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n', encoding="utf-8")
    who = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
    done("git", "init", "--quiet", ".", cwd=tmp_path)
    done("git", *who, "commit", "--quiet", "--allow-empty", "--message", "one", cwd=tmp_path)
    if tagged:
        done("git", "tag", tagged, cwd=tmp_path)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done("bash", "-e", "-c", script, cwd=tmp_path, GITHUB_OUTPUT=str(tmp_path / "out"), PATH=path)
    changed = "false" if tagged == "v1.2.3" else "true"
    assert (tmp_path / "out").read_text() == f"version=1.2.3\nchanged={changed}\n"


@pytest.mark.skipif(os.name == "nt" or not (shutil.which("bash") and shutil.which("awk")), reason="needs bash and awk")
def test_the_notes_of_a_release_are_its_part_of_the_changelog(tmp_path: Path) -> None:
    step = next(step for step in load("release")["jobs"]["release"]["steps"] if step.get("name") == "What is new")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 2.0.0\n\n- new\n\n## 1.0.0\n\n- old\n", encoding="utf-8")
    done("bash", "-e", "-c", step["run"], cwd=tmp_path, VERSION="2.0.0")
    assert (tmp_path / "notes.md").read_text().split() == ["-", "new"]
