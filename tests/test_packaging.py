"""The wheel and the editable install, beside Hugging Face's `kernels`, whose import name our folder
shares; and what checks the sources.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from test_floors import LAZY, ROOT

CHECK = """
import sys, kernels, transformers
from transformers.models.llama.modeling_llama import LlamaModel
import fastdllm, fastdllm_kernels
assert hasattr(kernels, "get_kernel"), f"import kernels gives {kernels.__path__}"
print(fastdllm.__file__, fastdllm_kernels.__file__)
"""


def python(code, cwd, **environment):
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "TRITON_INTERPRET")
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel, from a copy of the sources: a build leaves folders behind."""
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    for name in ("kernels", "fastdllm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        source,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("fastdllm-*.whl"))


def test_the_wheel_holds_both_packages_and_the_models(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assets = {
        f"fastdllm/assets/{name}"
        for name in ("demo.txt", "tiny-llada/model.safetensors", "tiny-dream/tokenizer.json")
    }
    assert (
        assets
        | {"fastdllm/decode.py", "fastdllm/families/dream.py", "fastdllm_kernels/attention.py"}
        <= names
    )
    assert not any(name.startswith(("kernels/", "tests/", "bench/")) for name in names)
    assert {"fastdllm/py.typed", "fastdllm_kernels/py.typed", "fastdllm/serve/page.html"} <= names


def test_the_wheel_works_beside_the_kernels_client(wheel, tmp_path):
    pytest.importorskip("kernels", reason="Hugging Face's kernels is in the test extra")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    paths = python(CHECK, tmp_path, PYTHONPATH=str(tmp_path / "site")).split()
    assert all(path.startswith(str(tmp_path)) for path in paths)


def test_from_the_repository_root_with_transformers_and_the_kernels_client():
    pytest.importorskip("kernels", reason="Hugging Face's kernels is in the test extra")
    paths = python(CHECK, ROOT).split()
    assert all(path.startswith(str(ROOT)) for path in paths)


ALONE = """
import sys
sys.modules.update(dict.fromkeys({unwanted!r}))
import fastdllm_kernels, triton
print(fastdllm_kernels.__file__)
{page}
assert not (canvas[:, :20] == MASK).any()
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The operators' own distribution, installed from a copy: a build leaves folders behind."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools 77 builds it")
    source, folder = tmp_path_factory.mktemp("kernels") / "kernels", tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "kernels", source, ignore=shutil.ignore_patterns("__pycache__", "build"))
    options = "--quiet --no-index --no-deps --no-build-isolation --target".split()
    command = [sys.executable, "-m", "pip", "install", *options, folder, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_operators_install_alone_and_run_their_page(site, tmp_path):
    unwanted = LAZY | {"fastdllm", "safetensors"}
    page = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    code = ALONE.format(unwanted=unwanted, page="".join(snippets[:2]))
    assert python(code, tmp_path, PYTHONPATH=str(site)).startswith(str(site))
    held = {path.name.split("-")[0] for path in site.iterdir()}
    assert held == {"fastdllm_kernels"}


def test_the_two_distributions_agree(site, wheel):
    """One version, the same files of the operators, the same torch and triton; no other library."""
    alone = importlib.metadata.Distribution.at(next(site.glob("*.dist-info")))
    assert {re.match(r"\w+", line)[0] for line in alone.requires} == {"torch", "triton"}
    with zipfile.ZipFile(wheel) as whole:
        (metadata,) = [name for name in whole.namelist() if name.endswith("/METADATA")]
        text = whole.read(metadata).decode()
        files = [name for name in whole.namelist() if name.startswith("fastdllm_kernels/")]
        assert all((site / name).read_bytes() == whole.read(name) for name in files)
    required = {line.lower() for line in re.findall(r"^Requires-Dist: (.+)$", text, re.MULTILINE)}
    assert {line.lower() for line in alone.requires} <= required
    assert f"\nVersion: {alone.version}\n" in text
    installed = {str(file) for file in alone.files if str(file).startswith("fastdllm_kernels/")}
    assert {name for name in installed if "__pycache__" not in name} == set(files)


def test_a_commit_is_checked_by_what_make_lint_runs():
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    linted = [line.replace("$(RUN)", ".venv/bin/python").strip() for line in recipe[1].splitlines()]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"entry: (.+)", hooks) == linted and len(linted) == 3


def test_of_kernels_alone_the_types_go_unchecked():
    """mypy cannot read what @triton.jit and @gluon.jit compile: those files, and no others."""
    settings = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"# Kernels are .*?module = \[(.*?)\]", settings, re.DOTALL)
    kernels = ROOT / "kernels" / "fastdllm_kernels"
    compiled = {
        f"fastdllm_kernels.{file.stem}"
        for file in kernels.glob("*.py")
        if re.search(r"^@(triton|gluon)\.jit", file.read_text(), re.MULTILINE)
    }
    assert set(re.findall(r'"(.+?)"', listed[1])) == compiled
