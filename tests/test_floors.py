"""The house rules that a machine can check: who may import whom, what works without what, and how
long things get.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "fastdllm_kernels": ROOT / "kernels" / "fastdllm_kernels",
    "fastdllm": ROOT / "fastdllm",
}
FLOORS = {
    "fastdllm_kernels": 0,
    "fastdllm.bare": 1,
    "fastdllm.config": 1,
    "fastdllm.folder": 1,
    "fastdllm.cache": 1,
    "fastdllm.attention": 2,
    "fastdllm.buffers": 2,
    "fastdllm.guard": 2,
    "fastdllm.replaced": 2,
    "fastdllm.model": 3,
    "fastdllm.families": 3,
    "fastdllm.checkpoint": 3,
    "fastdllm.parallel": 3,
    "fastdllm.quantize": 3,
    "fastdllm.arguments": 4,
    "fastdllm.schedule": 4,
    "fastdllm.forward": 4,
    "fastdllm.sampling": 4,
    "fastdllm.commit": 4,
    "fastdllm.decode": 4,
    "fastdllm.engine": 4,
    "fastdllm.warming": 4,
    "fastdllm.graph": 4,
    "fastdllm.patch": 4,
    "fastdllm.options": 5,
    "fastdllm.text": 5,
    "fastdllm.integrations": 5,
    "fastdllm.batch": 5,
    "fastdllm.chat": 5,
    "fastdllm.records": 5,
    "fastdllm.cli": 5,
    "fastdllm.parser": 5,
    "fastdllm.serve": 5,
    "fastdllm.display": 5,
    "fastdllm.__main__": 5,
    "fastdllm": 5,  # the package itself gathers the public names: only the top floor may lean on it
}
LAZY = {
    "fastapi",
    "huggingface_hub",
    "lm_eval",
    "prometheus_client",
    "ray",
    "rich",
    "sglang",
    "sse_starlette",
    "starlette",
    "tokenizers",
    "transformers",
    "uvicorn",
}
EVERYWHERE = {"torch", "safetensors", "fastdllm_kernels", "fastdllm"}
FUNCTION_LINES = 60


def module_files():
    """Dotted module name -> file, for every product file."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            if parts[-1] == "__init__":
                parts.pop()
            found[".".join(parts)] = file
    return found


FILES = module_files()
TREES = {module: ast.parse(file.read_text(), str(file)) for module, file in FILES.items()}


def imports(module):
    """(imported module or external top name, line, whether it runs when the module is imported) for
    every import.
    """
    is_package = FILES[module].name == "__init__.py"

    def visit(node, eager):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, eager
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if is_package else module.rpartition(".")[0]
                for _ in range(node.level - 1):
                    package = package.rpartition(".")[0]
                base = f"{package}.{base}".rstrip(".")
            submodules = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in FILES else base for name in submodules]
            for name in dict.fromkeys(names):
                yield name, node.lineno, eager
        else:
            type_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for child in ast.iter_child_nodes(node):
                yield from visit(child, eager and not type_only and not inside)

    yield from visit(TREES[module], True)


def floor(module):
    while module not in FLOORS:
        module, _, last = module.rpartition(".")
        assert module and module != "fastdllm", f"{last} stands on no floor: give it one here"
    return FLOORS[module]


def ours(name):
    return name.split(".")[0] in PACKAGES


def test_the_walk_sees_the_whole_product():
    assert {
        "fastdllm_kernels.rules",
        "fastdllm.model",
        "fastdllm.families.dream",
        "fastdllm.decode",
    } <= FILES.keys()
    seen = {name for name, _, _ in imports("fastdllm.model")}
    assert {
        "torch",
        "fastdllm_kernels",
        "fastdllm.cache",
        "fastdllm.config",
        "fastdllm.attention",
    } <= seen


@pytest.mark.parametrize("module", FILES)
def test_imports_only_go_down(module):
    for name, line, _ in imports(module):
        if ours(name) and name != module:
            assert floor(name) <= floor(module), (
                f"{FILES[module]}:{line} imports {name} from a floor above"
            )


def reached(module):
    """The files that a file imports, and those that they import, and so on."""
    found, waiting = set(), [module]
    while waiting:
        names = {name for name, _, _ in imports(waiting.pop()) if name in FILES}
        waiting += names - found
        found |= names
    return found


def circles():
    """The sets of files each of which leads back to itself, through imports inside functions as
    well.
    """
    reach = {module: reached(module) for module in FILES}
    inside = [module for module in FILES if module in reach[module]]
    return {
        frozenset(other for other in inside if other in reach[module] and module in reach[other])
        for module in inside
    }


def test_no_files_import_each_other():
    found = {" ".join(sorted(circle)) for circle in circles()}
    assert not found, "\n".join(sorted(found))


def test_the_walk_sees_a_circle_between_functions(monkeypatch):
    """select.py imports rules.py: an import of it inside a function of rules closes a circle."""
    lazy = ast.parse("def late():\n    from . import select\n")
    monkeypatch.setitem(TREES, "fastdllm_kernels.rules", lazy)
    seen = [circle for circle in circles() if "fastdllm_kernels.rules" in circle]
    assert seen and "fastdllm_kernels.select" in seen[0]


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("fastdllm_kernels")])
def test_the_kernels_need_torch_and_triton_alone(module):
    for name, line, _ in imports(module):
        top = name.split(".")[0]
        allowed = top in sys.stdlib_module_names or top in {"torch", "triton", "fastdllm_kernels"}
        assert allowed, f"{FILES[module]}:{line} imports {name}"


@pytest.mark.parametrize(
    "module", [name for name in FILES if not name.startswith("fastdllm_kernels")]
)
def test_what_not_everyone_has_is_imported_where_it_is_used(module):
    for name, line, eager in imports(module):
        top = name.split(".")[0]
        if top in sys.stdlib_module_names or top in EVERYWHERE:
            continue
        assert not eager, f"{FILES[module]}:{line} imports {name} before anybody asked for it"


def test_no_family_reaches_for_decoding_and_no_rule_for_a_model():
    for module in FILES:
        names = {name for name, _, _ in imports(module)}
        if module.startswith("fastdllm.families"):
            assert not {
                name
                for name in names
                if name.startswith(("fastdllm.decode", "fastdllm.checkpoint"))
            }
        if module == "fastdllm_kernels.rules":
            assert not {name for name in names if ours(name)}


def test_integrations_are_imported_by_nobody_but_the_command_line():
    for module in FILES:
        if module.startswith(("fastdllm.integrations", "fastdllm.cli")):
            continue
        for name, line, _ in imports(module):
            assert not name.startswith("fastdllm.integrations"), f"{FILES[module]}:{line}"


def test_the_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def functions():
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield module, node


def body(node):
    """The statements of a function or module without its docstring."""
    return (
        node.body[1:] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body
    )


def test_functions_stay_short():
    """A body's lines: a kernel's arguments, or a documented signature, are no code to follow."""
    long = []
    for module, node in functions():
        length = node.end_lineno - body(node)[0].lineno + 1
        if length > FUNCTION_LINES:
            long.append(
                f"{FILES[module].relative_to(ROOT)}:{node.lineno} {node.name}: {length} lines"
            )
    assert not long, "\n".join(long)


# What works without what: each in a process of its own, started in the repository root.


def run(code, *, path=(), **environment):
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TRITON_INTERPRET", "FASTDLLM_BACKEND")
    }
    if path or kept.get("PYTHONPATH"):
        kept["PYTHONPATH"] = os.pathsep.join(
            [*map(str, path), *filter(None, [kept.get("PYTHONPATH")])]
        )
    kept.update(HF_HUB_OFFLINE="1", **environment)
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=kept,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_product_imports_nothing_that_is_lazy():
    out = run(f"import sys, fastdllm, fastdllm.cli; print(sorted({LAZY!r} & set(sys.modules)))")
    assert out == "[]"


def test_importing_the_kernels_imports_neither_the_product_nor_a_library():
    out = run(
        "import sys, fastdllm_kernels\n"
        f"unwanted = {LAZY!r} | {{'fastdllm', 'safetensors'}}\n"
        "print(sorted(unwanted & set(sys.modules)))"
    )
    assert out == "[]"


def test_the_product_is_importable_where_no_lazy_library_exists():
    run(
        f"import sys; sys.modules.update(dict.fromkeys({LAZY!r}))\n"
        "import fastdllm, fastdllm_kernels"
    )


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import fastdllm, fastdllm_kernels as ops
q, kv = torch.randn(1, 4, 2, 64), torch.randn(1, 4, 1, 64)
cache = torch.randn(1, 16, 1, 64)
start, length = torch.tensor([[8], [16]], dtype=torch.int32)
out = ops.block_attention(q, kv, kv, cache, cache, start, length)
assert out.shape == q.shape and out.isfinite().all()
tokens = torch.full((1, 4), 9)
selection = ops.confidence_select(torch.randn(1, 4, 10), tokens, mask_id=9, rule=ops.Threshold(0.0))
assert selection.committed.all() and (tokens != 9).all()
x = torch.randn(3, 8)
assert ops.rms_norm(x, torch.ones(8), 1e-5).shape == x.shape and ops.swiglu(x).shape == (3, 4)
print("ran")
"""


def test_everything_imports_and_the_ops_run_on_a_cpu_without_triton():
    assert run(WITHOUT_TRITON) == "ran"


FROM_THE_ROOT = """
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
import fastdllm, fastdllm_kernels
config = LlamaConfig(
    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
)
LlamaForCausalLM(config)
"""


def test_transformers_and_the_product_run_side_by_side_from_the_root():
    pytest.importorskip("transformers")
    run(FROM_THE_ROOT)


def test_an_installed_package_named_kernels_is_not_shadowed(tmp_path):
    """Hugging Face's Kernel Hub client has that import name; a folder of ours has it too, and must
    lose.
    """
    pytest.importorskip("transformers")
    client = tmp_path / "kernels"
    client.mkdir()
    (client / "__init__.py").write_text("__version__ = '0.0.1'\nTHE_CLIENT = True\n")
    check = "import kernels\nassert kernels.THE_CLIENT, kernels.__path__\n"
    run(check + FROM_THE_ROOT + check, path=[tmp_path])
