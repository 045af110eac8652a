"""The image of jobs/container and the list of jobs/dependencies.md: that what they say is what setup.py says."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DEFINITION = ROOT / "jobs/container/rwkvmpi.def"
DEPENDENCIES = ROOT / "jobs/dependencies.md"
PYTHON_OF_DEBIAN = {"12": (3, 11), "13": (3, 13)}
DISTRIBUTIONS = {"zmq": "pyzmq", "tomli_w": "tomli-w", "pyrwkv_tokenizer": "pyrwkv-tokenizer"}  # by what is imported
ELSEWHERE = {"pyverbs"}  # from the system, and optional


def section(name: str) -> str:
    """A section of the definition, without its heading."""
    found = re.search(rf"^%{name}\n(.*?)(?=^%|\Z)", DEFINITION.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"no %{name}"
    return found[1]


def arguments() -> dict[str, str]:
    return dict(line.strip().split("=", 1) for line in section("arguments").splitlines() if line.strip())


@pytest.fixture(scope="module")
def of_setup() -> dict[str, Any]:
    """What setup.py gives to setup()."""
    given: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("setuptools.setup", lambda **keywords: given.update(keywords))
        runpy.run_path("setup.py")
    return given


def name_and_version(requirement: str) -> tuple[str, str]:
    found = re.fullmatch(r"([A-Za-z0-9_-]+)(.*)", requirement)
    assert found
    return found[1], found[2]


def packages() -> list[list[str]]:
    """The rows of the table of Python packages in jobs/dependencies.md: name, version, name in Spack, what for."""
    text = DEPENDENCIES.read_text().split("## Python packages\n")[1].split("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_definition_has_the_arguments_that_it_uses() -> None:
    used = set(re.findall(r"{{ *([a-z_]+) *}}", DEFINITION.read_text()))
    assert used == set(arguments())


def test_definition_installs_what_the_set_up_installs(of_setup: dict[str, Any]) -> None:
    pin = re.search(r"^TORCH=(torch==\S+)$", (ROOT / "scripts/_setup.sh").read_text(), re.MULTILINE)
    assert pin
    post = section("post")
    assert {torch.removesuffix("+cpu") for torch in re.findall(r"torch==[\w.+]+", post)} == {pin[1]}
    extras = re.search(r"pip install '\.\[(\w+)\]'", post)
    assert extras
    assert extras[1] in of_setup["extras_require"]
    debian = re.fullmatch(r"debian:(\d+)-slim", arguments()["base"])
    assert debian
    oldest = tuple(int(part) for part in of_setup["python_requires"].removeprefix(">=").split("."))
    assert PYTHON_OF_DEBIAN[debian[1]] >= oldest


def test_definition_copies_what_the_build_reads(of_setup: dict[str, Any]) -> None:
    copied = dict(line.split() for line in section("files").splitlines() if line.strip())
    assert copied == {name: f"/opt/source/{name}" for name in copied}
    assert all((ROOT / name).exists() for name in copied)
    read = [path for extension in of_setup["ext_modules"] for path in [*extension.sources, *extension.depends]]
    folders = {Path(path).parts[0] for path in read} | {package.split(".")[0] for package in of_setup["packages"]}
    assert {*folders, "setup.py", "pyproject.toml", "README.md"} <= set(copied)


def test_definition_sets_what_the_job_scripts_set() -> None:
    settings = re.search(r"env ((?:PMIX_\w+=\w+ ?)+)", (ROOT / "jobs/launch.sh").read_text())
    assert settings
    assert settings[1].strip() in section("environment")


@pytest.mark.parametrize("name", ["post", "environment", "runscript", "test"])
def test_scripts_of_the_definition_are_those_of_a_plain_shell(name: str) -> None:
    script = re.sub(r"{{.*?}}", "x", section(name))
    done = subprocess.run(["sh", "-n"], input=script, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_dependencies_are_those_of_setup(of_setup: dict[str, Any]) -> None:
    listed = {row[0]: row[1].strip("`") for row in packages()}
    assert listed == dict(map(name_and_version, of_setup["install_requires"]))
    text = DEPENDENCIES.read_text()
    for extra, named in of_setup["extras_require"].items():
        said = re.search(rf"^Extra `\[{extra}\]`: (.*)$", text, re.MULTILINE)
        assert said, extra
        for package in named:
            assert re.search(rf"(?<![\w-]){re.escape(package)}(?![\w-])", said[1]), f"[{extra}] has {package}"
    oldest = of_setup["python_requires"].removeprefix(">=")
    assert f"Python {oldest} or newer" in text


def test_dependencies_are_what_is_imported() -> None:
    imported = set()
    for path in (ROOT / "rwkvmpi").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                imported.add(node.module.split(".")[0])
    others = imported - set(sys.stdlib_module_names) - {"rwkvmpi"} - ELSEWHERE
    needed = {DISTRIBUTIONS.get(name, name) for name in others}
    listed = {row[0] for row in packages() if not row[3].startswith("tests")}
    assert needed == listed


def test_pinned_torch_is_named() -> None:
    pin = re.search(r"^TORCH=torch==(\S+)$", (ROOT / "scripts/_setup.sh").read_text(), re.MULTILINE)
    assert pin
    assert f"tested with {pin[1]}" in DEPENDENCIES.read_text()


@pytest.mark.thorough
def test_image_is_built_and_passes_its_own_test() -> None:
    done = subprocess.run([ROOT / "scripts/container_check.sh"], capture_output=True, text=True, check=False)
    if done.returncode == 126:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = done.stdout + done.stderr
    assert ", 0 wrong" in said
    assert "every checksum holds" in said
    assert (ROOT / "build/container/rwkvmpi.sif").stat().st_size > 1 << 28
