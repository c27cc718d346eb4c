"""Triton's interpreter, quicker: what it works out anew for every call of a function is kept. A plugin of pytest.

Tensors in tests are small, so that most of its time is what surrounds NumPy: in each call of a function in a kernel it
replaces all builtins of ``triton.language``, and each result gets a type, a shape and a name of its own. Answers are
the same. Loaded by test_triton_interpreter.py; the files interpreted_*.py pass without it.
"""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace
from typing import Any

from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


@functools.cache
def builtins(of: Any) -> tuple[str, ...]:
    """Names of a module's or class' builtins, as they are before the first launch replaces them."""
    return tuple(name for name, member in inspect.getmembers(of) if core.is_builtin(member))


def getmembers(of: Any) -> list[tuple[str, Any]]:
    """The builtins among the members, all that the interpreter wants."""
    return [(name, getattr(of, name)) for name in builtins(of)]


interpreter.inspect = SimpleNamespace(**vars(inspect) | {"getmembers": getmembers})

find, known = interpreter._get_np_dtype, {}


def np_dtype(of: Any) -> Any:
    """NumPy's dtype for a type of Triton's."""
    if of.name not in known:
        known[of.name] = find(of)
    return known[of.name]


interpreter._get_np_dtype = np_dtype

patch = interpreter._patch_lang
patched: set[str] = set()  # modules whose functions have what they call replaced, in this launch


def patch_lang(fn: Any) -> Any:
    """Replace the builtins that a kernel calls, or a function in it: once per launch and module."""
    module = fn.__globals__["__name__"]
    if module in patched:
        return None  # only the launch itself asks for a scope, to restore it
    scope = patch(fn)
    patched.add(module)
    restore = scope.restore

    def restore_all() -> None:
        patched.clear()
        restore()

    scope.restore = restore_all
    return scope


interpreter._patch_lang = patch_lang

block_init, tensor_init = core.block_type.__init__, core.tensor.__init__
of_types: dict[tuple[int, ...], tuple[Any, int]] = {}  # shape and number of elements, by the sizes
of_tensors: dict[tuple[int, ...], tuple[Any, Any]] = {}


def init_block(self: Any, element_ty: Any, shape: Any) -> None:
    """A type whose shape is checked when it is seen for the first time."""
    sizes = tuple([s.value if type(s) is core.constexpr else s for s in shape])
    if sizes not in of_types:
        block_init(self, element_ty, shape)
        of_types[sizes] = self.shape, self.numel
    self.element_ty = element_ty
    self.shape, self.numel = of_types[sizes]
    self.name = f"<{self.shape}, {element_ty}>"


def init_tensor(self: Any, handle: Any, type: Any) -> None:
    """A tensor that has the shape of others of its shape."""
    sizes = tuple(type.shape) if isinstance(type, core.block_type) else ()
    if sizes not in of_tensors:
        tensor_init(self, handle, type)
        of_tensors[sizes] = self.shape, self.numel
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = of_tensors[sizes]


core.block_type.__init__, core.tensor.__init__ = init_block, init_tensor

broadcast = TritonSemantic.broadcast_impl_value


def broadcast_value(self: Any, lhs: Any, rhs: Any) -> Any:
    """Nothing to do for two tensors of one shape."""
    left, right = lhs.type, rhs.type
    if isinstance(left, core.block_type) and isinstance(right, core.block_type) and left.shape is right.shape:
        return lhs, rhs
    return broadcast(self, lhs, rhs)


TritonSemantic.broadcast_impl_value = broadcast_value
sanitize = TritonSemantic.binary_op_sanitize_overflow_impl


def sanitize_overflow(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
    """Without debugging Triton works out whether integers overflow, and does not look at it."""
    if self.builder.options.debug:
        sanitize(self, lhs, rhs, binary_op)


TritonSemantic.binary_op_sanitize_overflow_impl = sanitize_overflow
