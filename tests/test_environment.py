"""The environment's files agree with each other, with what is installed, and with what the package imports."""

import ast
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
NAME, EXTRA = PROJECT["name"], "test"
DIRECT = [Requirement(line) for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"][EXTRA]]]
RUNTIME = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
OPTIONAL = {"pillow_heif", "pymilvus"}  # the extras "heic" and "milvus"
INSTALL = ["--constraint constraints.txt", f"--editable .[{EXTRA}]"]  # what pip is given, everywhere
PIN = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==([0-9][0-9A-Za-z.]*)")  # no room for a +cpu
PACKAGE_HOSTS = r"(?:pypi|pythonhosted|anaconda|download\.pytorch|pypi\.nvidia)\.(?:org|com|io|python\.org)\b"
DOWNLOAD = r"[a-z+]+://[^\s\"'`<>)\]]*(?:/simple\b|\.whl|\.tar\.gz)"
ADDRESS = re.compile(f"{PACKAGE_HOSTS}|{DOWNLOAD}", re.IGNORECASE)


def pin_lines():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def pins():
    found = filter(None, map(PIN.fullmatch, pin_lines()))
    return {canonicalize_name(match[1]): Version(match[2]) for match in found}


def makefile():
    return (ROOT / "Makefile").read_text().replace("\\\n", " ")


# The files among each other


def test_constraints_hold_names_and_versions_only():
    odd = [line for line in pin_lines() if not PIN.fullmatch(line)]
    assert not odd, f"not of the form name==version: {odd}"


def test_nothing_is_pinned_twice():
    names = [canonicalize_name(line.split("==")[0]) for line in pin_lines()]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("requirement", DIRECT, ids=str)
def test_every_dependency_is_pinned_within_its_range(requirement):
    name = canonicalize_name(requirement.name)
    assert name in pins(), f"{requirement} has no pin in constraints.txt"
    assert pins()[name] in requirement.specifier
    assert not requirement.url


def test_no_dependency_is_declared_twice():
    names = [canonicalize_name(requirement.name) for requirement in DIRECT]
    assert sorted(names) == sorted(set(names))


def matching(torch, torchvision):
    """Releases come in pairs: torch 2.11 with torchvision 0.26, 2.12 with 0.27, and so on."""
    return torch.major == 2 and torchvision.major == 0 and torchvision.minor == torch.minor + 15


def test_torch_and_torchvision_are_a_pair():
    lowest = {r.name: Version(next(s.version for s in r.specifier if s.operator == ">=")) for r in DIRECT}
    assert matching(pins()["torch"], pins()["torchvision"])
    assert matching(lowest["torch"], lowest["torchvision"]), "the lowest versions are of different releases"
    assert lowest["torch"].release[:2] == (2, 11)
    assert not matching(Version("2.14.1"), Version("0.28.0"))


def test_conda_brings_python_and_pip_and_pip_the_rest():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = [line for line in dependencies if isinstance(line, str)]
    assert {re.split(r"[=<>! ]", line)[0] for line in conda} == {"python", "pip"}
    assert [line for line in dependencies if not isinstance(line, str)] == [{"pip": INSTALL}]


def test_make_installs_the_same_two_lines():
    calls = [shlex.split(line) for line in makefile().splitlines() if re.search(r"\bpip\S* install\b", line)]
    assert len(calls) == 1
    words = calls[0][calls[0].index("install") + 1 :]
    given = [" ".join(pair) for pair in pairwise(words) if pair[0] in ("--constraint", "--editable")]
    assert given == INSTALL
    others = set(words) - {word for line in INSTALL for word in line.split()}
    assert others == {"--disable-pip-version-check", "--progress-bar", "on"}


def test_the_environment_is_renewed_when_its_files_change():
    prerequisites = re.search(r"^\$\(READY\):(.*)$", makefile(), re.MULTILINE)[1].split()
    assert set(prerequisites) == {"pyproject.toml", "constraints.txt"}


def test_the_python_versions_agree():
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert platform.python_version() in allowed
    lowest = Version(next(s.version for s in allowed if s.operator == ">="))
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = next(line for line in dependencies if isinstance(line, str) and line.startswith("python"))
    assert Version(conda.split("=")[-1]) in allowed
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{lowest.major}{lowest.minor}"
    assert f"sys.version_info < ({lowest.major}, {lowest.minor})" in makefile()


def test_ci_runs_make_test_and_nothing_else():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [line.strip() for line in script.read_text().splitlines()]
    commands = [line for line in lines if line and not line.startswith("#")]
    assert commands == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "make test"]


# What is installed


def in_project_environment():
    """Whether this interpreter has the project installed from this very folder, as `make` and conda do."""
    texts = [found.read_text("direct_url.json") for found in importlib.metadata.distributions(name=NAME)]
    return any(json.loads(text)["url"] == ROOT.as_uri() for text in texts if text)


def required():
    """Name -> the requirements on it, for all that the project needs on this machine, directly or not."""
    found, seen, waiting = {}, set(), [(requirement, {""}) for requirement in DIRECT]
    while waiting:
        requirement, extras = waiting.pop()
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        name = canonicalize_name(requirement.name)
        found.setdefault(name, []).append(requirement)
        if (name, *sorted(requirement.extras)) not in seen:
            seen.add((name, *sorted(requirement.extras)))
            lines = importlib.metadata.requires(name) or []
            waiting += [(Requirement(line), {"", *requirement.extras}) for line in lines]
    return found


@pytest.fixture(scope="module")
def needed():
    if not in_project_environment():
        pytest.skip(f"{sys.prefix} is not the project's environment; `make test` runs in it")
    return required()


def test_what_is_installed_is_what_is_pinned(needed):
    installed = {name: Version(importlib.metadata.version(name)) for name in needed}
    unpinned = {name: str(version) for name, version in installed.items() if name not in pins()}
    assert not unpinned, f"needed, and not in constraints.txt: {unpinned}"
    # A CPU build of 2.14.1 calls itself 2.14.1+cpu; for pip it is 2.14.1.
    other = {n: (str(v), str(pins()[n])) for n, v in installed.items() if Version(v.public) != pins()[n]}
    assert not other, f"(installed, pinned) differ; `make` puts it right: {other}"


def test_the_pins_work_together(needed):
    broken = [str(r) for name, rs in needed.items() for r in rs if pins().get(name) and pins()[name] not in r.specifier]
    assert not broken


def test_no_pin_is_left_over(needed):
    if (sys.platform, platform.machine(), sys.version_info[:2]) != ("linux", "x86_64", (3, 11)):
        pytest.skip("the pins are of Python 3.11 on 64-bit Linux; elsewhere some are not needed")
    if Version(importlib.metadata.version("torch")).local:
        pytest.skip("this build of torch brings no CUDA packages")
    assert set(pins()) <= set(needed)


# What is imported, and what is committed


def imports(source):
    """Top-level names of the modules that a source imports absolutely, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_imports_are_found_wherever_they_stand():
    source = "import os.path as p, yaml\ndef f():\n    from PIL.Image import open\n    from . import x\n"
    assert set(imports(source)) == {"os", "yaml", "PIL"}


def test_every_import_of_the_package_is_declared():
    providers = importlib.metadata.packages_distributions()
    missing = {}
    for file in sorted((ROOT / NAME).rglob("*.py")):
        for module in set(imports(file.read_text())) - set(sys.stdlib_module_names) - {NAME, *OPTIONAL}:
            if not RUNTIME & {canonicalize_name(name) for name in providers.get(module, ())}:
                missing.setdefault(module, []).append(str(file.relative_to(ROOT)))
    assert not missing, f"imported, and no dependency in pyproject.toml brings it: {missing}"


def tracked():
    try:
        command = ["git", "-C", str(ROOT), "ls-files", "-z", "--full-name"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not in a git checkout: {error}")
    files = [ROOT / name for name in listed.split("\0") if name]
    if ROOT / "pyproject.toml" not in files:
        pytest.skip("the project is not the checkout that git finds here")
    return [file for file in files if file.is_file()]


def test_no_committed_file_says_where_packages_come_from():
    found = {}
    for file in tracked():
        if match := ADDRESS.search(file.read_bytes().decode("utf-8", "replace")):
            found[str(file.relative_to(ROOT))] = match[0]
    assert not found


@pytest.mark.parametrize(
    ("parts", "forbidden"),
    [
        (["https://", "pypi", ".org/project/torch"], True),
        (["files.python", "hosted.org"], True),
        (["https://download.", "pytorch", ".org/whl/cu130"], True),
        (["file:///opt/packages", "/simple"], True),
        (["https://example.com/", "simple/torch/"], True),
        (["http://example.com/torch-2.14.1-cp311.", "whl"], True),
        (["https://example.com/v1.tar", ".gz"], True),
        (["https://example.com/simplest"], False),
        (["https://pytorch.org/docs"], False),
        (["the file weights.tar.gz"], False),
    ],
)
def test_addresses_are_recognised(parts, forbidden):
    assert bool(ADDRESS.search("".join(parts))) == forbidden
