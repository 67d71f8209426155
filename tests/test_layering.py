"""Who may import whom, by syntax tree: rodimus_kernels <- rodimus <- tests, benchmarks."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers.dynamic_module_utils import get_imports

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "kernels" / "rodimus_kernels"
MODEL = ROOT / "rodimus"
DECLARED = {"torch", "transformers", "safetensors", "numpy", "jinja2", "tyro", "tokenizers"}


class Import(NamedTuple):
    """One import: absolute module, the names taken from it, and whether it runs at import."""

    module: str
    names: tuple[str, ...]
    eager: bool
    line: int


def sources(folder: Path) -> list[Path]:
    """The Python files of a package, in a stable order."""
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def module_name(path: Path) -> str:
    """``rodimus.train.data`` for its file; a package's own name for its ``__init__.py``."""
    base = KERNELS.parent if path.is_relative_to(KERNELS) else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def absolute(path: Path, node: ast.ImportFrom) -> str:
    """The module that ``from ..x import y`` in the file means."""
    if node.level == 0:
        return node.module or ""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    package = package[: len(package) - (node.level - 1)]
    return ".".join([*package, *([node.module] if node.module else [])])


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file. One inside a function, a try or ``if TYPE_CHECKING`` is not eager."""

    def visit(node: ast.AST, eager: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, (), eager, child.lineno)
            elif isinstance(child, ast.ImportFrom):
                names = tuple(alias.name for alias in child.names)
                yield Import(absolute(path, child), names, eager, child.lineno)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.Try):
                yield from visit(child, False)
            else:
                yield from visit(child, eager and not _is_type_checking(child))

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), True)


def offences(folder: Path, allowed) -> list[str]:
    """``file:line module`` for each import that ``allowed(path, import)`` refuses."""
    return [
        f"{path.relative_to(ROOT)}:{found.line} imports {found.module}"
        for path in sources(folder)
        for found in imports(path)
        if not allowed(path, found)
    ]


def top(module: str) -> str:
    """The distribution-level name: ``torch`` of ``torch.nn.functional``."""
    return module.partition(".")[0]


def is_standard(module: str) -> bool:
    """True for the standard library."""
    return top(module) in sys.stdlib_module_names


def test_operators_import_torch_and_triton_only():
    def allowed(path, found):
        if is_standard(found.module) or top(found.module) in ("torch", "rodimus_kernels"):
            return True
        # a module that is only loaded on demand may need what it implements
        return top(found.module) == "triton" or not found.eager or with_numpy(path, found)

    def with_numpy(path, found):
        # Triton's interpreter is made of it
        return found.module == "numpy" and path.stem == "_triton_interpreter"

    assert not offences(KERNELS, allowed)
    never = ("transformers", "rodimus", "tests", "benchmarks", "numpy", "einops")
    used = lambda path, found: top(found.module) not in never or with_numpy(path, found)
    assert not offences(KERNELS, used)


def test_triton_is_imported_by_its_own_files_only():
    """Files are named after their backend; nothing else imports it, not even inside a function."""

    def allowed(path, found):
        return top(found.module) != "triton" or "triton" in path.stem

    assert not offences(KERNELS, allowed) and not offences(MODEL, allowed)


def test_reference_imports_torch_alone():
    for found in imports(KERNELS / "reference.py"):
        assert is_standard(found.module) or top(found.module) == "torch", found


def _is_implementation(stem: str) -> bool:
    return stem.startswith(("triton_", "native_", "eager", "sdpa", "flash", "flex"))


def implementations_in(found: Import) -> list[str]:
    """The files of implementations that an import reaches, by what they are named after."""
    names = [found.module, *(f"{found.module}.{name}" for name in found.names)]
    files = [KERNELS.parent / Path(*name.split(".")).with_suffix(".py") for name in names]
    return [file.stem for file in files if file.is_file() and _is_implementation(file.stem)]


def test_every_implementation_is_known_as_one():
    for path in sources(KERNELS):
        text = path.read_text(encoding="utf-8")
        for module in re.findall(r'"rodimus_kernels\.([\w.]+):\w+"', text):
            stem = module.rpartition(".")[2]
            assert stem in ("reference", path.stem) or _is_implementation(stem), module


def test_implementations_do_not_import_each_other():
    def allowed(path, found):
        # one implementation may be several files: triton_chunk, triton_chunk_kernels
        others = [name for name in implementations_in(found) if not name.startswith(path.stem)]
        return not _is_implementation(path.stem) or not others

    assert not offences(KERNELS, allowed)


def test_dispatch_loads_implementations_lazily():
    def allowed(path, found):
        dispatches = path.name in ("api.py", "__init__.py") and found.eager
        return not dispatches or not implementations_in(found)

    assert not offences(KERNELS, allowed)


def test_model_uses_public_operators_only():
    def allowed(path, found):
        if top(found.module) != "rodimus_kernels":
            return True
        public = found.module in ("rodimus_kernels", "rodimus_kernels.reference")
        return public and not any(name.startswith("_") for name in found.names)

    assert not offences(MODEL, allowed)


def test_model_does_not_import_training():
    def allowed(path, found):
        training = found.module.startswith("rodimus.train") or (
            found.module == "rodimus" and "train" in found.names
        )
        # evaluation reads the trainer's data formats
        inside = path.is_relative_to(MODEL / "train") or path.is_relative_to(MODEL / "evaluation")
        return not training or inside

    assert not offences(MODEL, allowed)


# modules that are about an optional dependency, imported by others where they are used
OPTIONAL = {"rodimus.quantization": "torchao"}


def test_only_declared_dependencies_are_imported_eagerly():
    def allowed(path, found):
        known = {"rodimus", "rodimus_kernels", *DECLARED, OPTIONAL.get(module_name(path))}
        named = {found.module, *(f"{found.module}.{name}" for name in found.names)}
        is_known = is_standard(found.module) or top(found.module) in known
        return not found.eager or (is_known and not named & OPTIONAL.keys())

    assert not offences(MODEL, allowed)


@pytest.mark.parametrize("folder", [KERNELS, MODEL], ids=lambda folder: folder.name)
def test_packages_import_neither_tests_nor_benchmarks(folder):
    assert not offences(
        folder, lambda path, found: top(found.module) not in ("tests", "benchmarks", "pytest")
    )


def test_command_line_starts_without_torch():
    heavy = ("torch", "transformers", "numpy", "safetensors", "rodimus_kernels")
    for name in ("cli", "options", "limits", "devices", "errors"):
        for found in imports(MODEL / f"{name}.py"):
            assert not (found.eager and top(found.module) in heavy), found


class TestRemoteCode:
    """An export is a copy of these files, so their imports must hold in a folder of their own."""

    FILES = ("configuration_rodimus.py", "modeling_rodimus.py")

    @pytest.mark.parametrize("name", FILES)
    def test_needs_torch_and_transformers_only(self, name):
        for found in imports(MODEL / name):
            sibling = found.module == "rodimus.configuration_rodimus"
            outside = top(found.module) in ("torch", "transformers") or sibling
            optional = not found.eager and top(found.module) in ("rodimus_kernels", "rodimus")
            assert is_standard(found.module) or outside or optional, found

    @pytest.mark.parametrize("name", FILES)
    def test_relative_imports_are_files_of_the_export(self, name):
        """transformers finds them by a regular expression, in comments and docstrings too."""
        text = (MODEL / name).read_text(encoding="utf-8")
        found = re.findall(r"^\s*from\s+\.(\S+)\s+import", text, re.MULTILINE)
        found += re.findall(r"^\s*import\s+\.(\S+)\s*$", text, re.MULTILINE)
        assert set(found) <= {"configuration_rodimus", "reference_rodimus"}

    def test_operators_come_from_one_guarded_import(self):
        tree = ast.parse((MODEL / "modeling_rodimus.py").read_text(encoding="utf-8"))
        guards = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Try) and "rodimus_kernels" in ast.unparse(node.body)
        ]
        assert len(guards) == 1
        missing, other_version = map(ast.unparse, guards[0].handlers)
        assert missing.startswith("except ModuleNotFoundError") and "reference_rodimus" in missing
        assert other_version.startswith("except ImportError")
        assert "reference_rodimus" not in other_version

    @pytest.mark.parametrize("name", FILES)
    def test_transformers_asks_for_no_more_than_it_has_itself(self, name):
        assert set(get_imports(MODEL / name)) <= {"torch", "transformers", *sys.stdlib_module_names}


def test_kernels_folder_is_not_a_package():
    """With an ``__init__.py`` it would hide HuggingFace's package ``kernels`` in a checkout."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_device_code_headers_know_no_torch():
    """``nvcc`` alone must be able to compile and inspect a kernel."""
    for header in ROOT.glob("csrc/**/*.cuh"):
        includes = re.findall(r"#include\s*[<\"]([^>\"]+)", header.read_text(encoding="utf-8"))
        assert not [name for name in includes if name.startswith(("torch", "ATen", "c10"))], header
