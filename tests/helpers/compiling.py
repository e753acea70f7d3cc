"""Triton's kernels compiled for architectures that are not at hand."""

from __future__ import annotations

from typing import Any

# Types of the kernels' tensors by name; all other arguments are int32.
_TYPES = {
    "*i64": ("index", "lengths", "first", "kept_column", "order"),
    "*i32": ("some_column",),
    "*u8": ("mask", "kept_mask"),
    "*fp32": ("query", "key", "bias", "some_score", "part", "rows", "weight", "out"),
}


def compiled(kernel: Any, constants: dict[str, Any], warps: int, capability: int) -> Any:
    """A kernel for an architecture, as if all tensors lay at multiples of 16 bytes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    tensors = {name: of for of, group in _TYPES.items() for name in group if name in names}
    types = {name: "constexpr" if name in constants else tensors.get(name, "i32") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in tensors}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=places, attrs=aligned)
    return compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
