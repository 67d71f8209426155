"""Triton compiles a kernel again for an integer that is 1 or a multiple of 16, unless told not to:
of lengths, which vary, one compilation is enough."""

import ast
from pathlib import Path

import pytest

import rodimus_kernels

LENGTHS = {"T", "S", "W", "R", "NT", "NC", "SEGMENT"}
COMPILED_IN = {
    # registers spill without, says benchmarks/aot.py
    "ddts_chunk_products_kernel": {"T"},
    "input_gate_bwd_kernel": {"T"},
    # one token has no loop; the sizes of a ring do not vary
    "ddts_recurrent_kernel": {"T"},
    "ring_attention_kernel": {"T", "W", "R"},
}


def kernels():
    for path in sorted(Path(rodimus_kernels.__file__).parent.rglob("triton*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                yield pytest.param(node, id=node.name)


@pytest.mark.parametrize("kernel", list(kernels()))
def test_one_compilation_serves_all_lengths(kernel):
    (decorator,) = kernel.decorator_list
    options = {x.arg: ast.literal_eval(x.value) for x in getattr(decorator, "keywords", ())}
    lengths = {x.arg for x in kernel.args.args if x.annotation is None} & LENGTHS
    given = set(options.get("do_not_specialize", ()))
    assert given == lengths - COMPILED_IN.get(kernel.name, set())
