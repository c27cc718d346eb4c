"""``patch(model)``: the quantizers of somebody else's model on this package's kernels; ``unpatch`` undoes it.

Called by users, reads :mod:`vqkernels.recognisers`. Only the class of an instance changes, to a subclass of its own
class: parameters, buffers, hooks, optimizers, references and ``isinstance`` checks don't notice.
"""

from __future__ import annotations

import copyreg
import re
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vqkernels import recognisers
from vqkernels.recognisers._adapter import Adapter, class_path

__all__ = ["PatchReport", "Replaced", "Skipped", "patch", "unpatch"]

# Classes that nobody here knows, but that a reader of the report would look for.
_LOOKS_LIKE_A_QUANTIZER = re.compile(
    r"VectorQuant|(Residual|Product|Codebook|EMA|Embedding|VQ).*Quanti|Codebook$|^R?VQ$"
)
_OURS = re.compile(r"vqkernels\.(nn|models)\.")


@dataclass(frozen=True)
class Replaced:
    """A module that runs on an adapter now.

    Attributes:
        path: its name in the model, "" for the model itself.
        cls: the class path of the original.
        adapter: name of the adapter.
        options: what the adapter says about this instance.
    """

    path: str
    cls: str
    adapter: str
    options: str


@dataclass(frozen=True)
class Skipped:
    """A module that looks like a quantizer and keeps its own code.

    Attributes:
        path: its name in the model, "" for the model itself.
        cls: its class path.
        reason: why.
        expected: there is nothing to gain here (already patched, no search inside), so ``strict`` does not mind.
    """

    path: str
    cls: str
    reason: str
    expected: bool = False


@dataclass(frozen=True)
class PatchReport:
    """What :func:`patch` did; prints as a table.

    Attributes:
        replaced: modules that were switched.
        skipped: quantizers, or what looks like one, that were not, with the reason.
    """

    replaced: tuple[Replaced, ...]
    skipped: tuple[Skipped, ...]

    def __str__(self) -> str:
        head = f"vqkernels.patch: {len(self.replaced)} replaced, {len(self.skipped)} skipped"
        if not self.replaced and not self.skipped:
            return f"{head}; no quantizer found"
        rows = [("module", "class", "adapter", "notes")]
        rows += [(r.path or "(model)", _short(r.cls), r.adapter, r.options) for r in self.replaced]
        rows += [(s.path or "(model)", _short(s.cls), "skipped", s.reason) for s in self.skipped]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows]
        return "\n".join([head, *(line.rstrip() for line in lines)])


def patch(
    model: nn.Module,
    *,
    strict: bool = False,
    fix: str | Iterable[str] = (),
    adapters: Sequence[type[Adapter]] = (),
) -> PatchReport:
    """Run the quantizers of ``model`` on vqkernels, in place; everything else of the model stays as it is.

    Each known quantizer keeps its forward signature, results, parameters, buffers, ``state_dict`` and training
    behaviour (docs/drop-in.md has the table of classes and options). What cannot be served is left alone and listed.
    All or nothing: every module is decided on before the first one changes. Patch before ``torch.compile``.

    Args:
        model: any module, also a quantizer itself.
        strict: raise if a quantizer, or what looks like one, would be skipped.
        fix: upstream bugs to mend, by name, or ``"all"``; by default results are the original's.
        adapters: recognisers of your own, asked before those of the package.

    Returns:
        :class:`PatchReport`.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``strict`` and something was skipped; a quantizer lies inside a compiled module; unknown ``fix``.

    Example:
        >>> import vqkernels
        >>> from vector_quantize_pytorch import VectorQuantize
        >>> vq = VectorQuantize(dim=8, codebook_size=16)
        >>> report = vqkernels.patch(vq)
        >>> [r.cls for r in report.replaced], isinstance(vq, VectorQuantize)
        (['vector_quantize_pytorch.vector_quantize_pytorch.VectorQuantize'], True)
        >>> vqkernels.unpatch(vq)
        ['']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    known = (*adapters, *recognisers.adapters())
    fixes = _checked_fixes(fix, known)
    chosen, skipped = _decide(model, known)
    _refuse_compiled(model, [path for path, _, _ in chosen])
    if strict and (bad := [s for s in skipped if not s.expected]):
        raise ValueError("strict: nothing was changed, because of\n" + str(PatchReport((), tuple(bad))))
    replaced = tuple(Replaced(p, class_path(type(m)), a.__name__, a.describe(m)) for p, m, a in chosen)
    _switch([pair for _, module, adapter in chosen for pair in _with_parts(module, adapter)], fixes)
    return PatchReport(replaced, tuple(skipped))


def unpatch(model: nn.Module) -> list[str]:
    """Give every patched module of ``model`` its own class back.

    Returns:
        The paths of the modules that had been replaced, as :func:`patch` reported them.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    patched = [(path, module) for path, module in model.named_modules() if isinstance(module, Adapter)]
    parts = {id(part) for _, module in patched for part in _parts(module, _generated(type(module)))}
    classes = [_without_adapter(type(module)) for _, module in patched]
    for (_, module), cls in zip(patched, classes, strict=True):
        module.__class__ = cls
    return [path for path, module in patched if id(module) not in parts]


def _decide(
    model: nn.Module, known: Sequence[type[Adapter]]
) -> tuple[list[tuple[str, nn.Module, type[Adapter]]], list[Skipped]]:
    """Which module gets which adapter, and who is left out; nothing changes here."""
    ignored = recognisers.ignored()
    chosen: list[tuple[str, nn.Module, type[Adapter]]] = []
    skipped: list[Skipped] = []
    kept: set[int] = set()  # parts of quantizers that keep their own code
    parts: set[int] = set()
    unknown: list[Skipped] = []
    for path, module in model.named_modules():
        cls = type(module)
        if isinstance(module, Adapter):
            parts.update(map(id, _parts(module, _generated(cls))))
            if id(module) not in parts:
                skipped.append(Skipped(path, class_path(cls), "already patched", True))
            continue
        matches = [adapter for adapter in known if adapter.target_of(cls) is not None]
        refusals = [adapter.refusal(module) for adapter in matches]
        if None in refusals:
            adapter = matches[refusals.index(None)]
            chosen.append((path, module, adapter))
            parts.update(map(id, _parts(module, adapter)))
        elif matches:
            # Classes of one name in two repositories: of the wrong one it is only "another version".
            reasons = sorted(map(str, refusals), key=lambda reason: reason.endswith("another version?"))
            skipped.append(Skipped(path, class_path(cls), reasons[0]))
            kept.update(id(part) for adapter in matches for part in _parts(module, adapter))
        elif reason := next((ignored[p] for base in cls.__mro__ if (p := class_path(base)) in ignored), None):
            skipped.append(Skipped(path, class_path(cls), reason, True))
        elif id(module) not in parts | kept and _looks_like_a_quantizer(cls):
            unknown.append(Skipped(path, class_path(cls), "no recogniser for this class"))
    for path, module, adapter in list(chosen):
        if any(id(part) in kept for part in _parts(module, adapter)):
            chosen.remove((path, module, adapter))
            skipped.append(Skipped(path, class_path(type(module)), "shares a part with a module that is skipped"))
    listed = [path for path, _, _ in chosen] + [s.path for s in skipped]
    for entry in unknown:
        # A container whose quantizers are listed, or the inside of one that is, needs no line of its own.
        if not any(_inside(entry.path, path) or _inside(path, entry.path) for path in listed):
            skipped.append(entry)
            listed.append(entry.path)
    return chosen, skipped


def _looks_like_a_quantizer(cls: type) -> bool:
    return bool(_LOOKS_LIKE_A_QUANTIZER.search(cls.__name__)) and not _OURS.match(class_path(cls))


def _inside(path: str, outer: str) -> bool:
    return outer == "" or path == outer or path.startswith(f"{outer}.")


def _parts(module: nn.Module, adapter: type[Adapter]) -> Iterator[nn.Module]:
    for name in adapter.parts:
        part = getattr(module, name, None)
        if isinstance(part, nn.Module):
            yield part


def _with_parts(module: nn.Module, adapter: type[Adapter]) -> Iterator[tuple[nn.Module, type[Adapter]]]:
    yield module, adapter
    for name, part_adapter in adapter.parts.items():
        yield from _with_parts(getattr(module, name), part_adapter)


def _refuse_compiled(model: nn.Module, paths: list[str]) -> None:
    """A compiled module has been traced, or will be, through code that patching would change under its feet."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    for outer, module in model.named_modules():
        wrapped = dynamo is not None and isinstance(module, dynamo.OptimizedModule)
        if wrapped or getattr(module, "_compiled_call_impl", None) is not None:
            inside = [path for path in paths if _inside(path, outer)]
            if inside:
                where = f"module {outer!r}" if outer else "the model"
                raise ValueError(
                    f"{where} is compiled and holds the quantizer {inside[0]!r}; nothing was changed. Patch first, "
                    "then compile"
                )


def _checked_fixes(fix: str | Iterable[str], known: Sequence[type[Adapter]]) -> frozenset[str]:
    available = {name for adapter in known for a in (adapter, *adapter.parts.values()) for name in a.available_fixes}
    names = frozenset(available if fix == "all" else [fix] if isinstance(fix, str) else fix)
    if wrong := sorted(names - available):
        raise ValueError(f"fix is {wrong[0]!r}; expected 'all' or any of {', '.join(map(repr, sorted(available)))}")
    return names


def _switch(pairs: list[tuple[nn.Module, type[Adapter]]], fixes: frozenset[str]) -> None:
    todo = {
        id(module): (module, generated_class(adapter, type(module), fixes & set(adapter.available_fixes)))
        for module, adapter in pairs
        if not isinstance(module, Adapter)
    }
    done: list[tuple[nn.Module, type]] = []
    try:
        for module, cls in todo.values():
            before = type(module)
            module.__class__ = cls
            done.append((module, before))
    except BaseException:
        for module, before in done:
            module.__class__ = before
        raise


_generated_classes: dict[tuple[type[Adapter], type, frozenset[str]], type[Adapter]] = {}


def generated_class(adapter: type[Adapter], original: type, fixes: frozenset[str]) -> type[Adapter]:
    """The class ``(adapter, original)``, made once; it has the original's name, so printed models look the same."""
    key = (adapter, original, fixes)
    if key not in _generated_classes:
        namespace = {
            "__doc__": original.__doc__,
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__reduce_ex__": _reduce,
            "fixes": fixes,
            "_vqkernels_key": key,
        }
        made = types.new_class(original.__name__, (adapter, original), exec_body=lambda body: body.update(namespace))
        _generated_classes[key] = made
    return _generated_classes[key]


def _generated(cls: type[Any]) -> type[Adapter]:
    """The generated class among ``cls`` and its bases (FSDP derives a class of its own from it)."""
    return next(base for base in cls.__mro__ if "_vqkernels_key" in vars(base))


def _without_adapter(cls: type) -> type:
    """``cls`` without the generated class: the original, or what FSDP made of it, on the original."""
    if "_vqkernels_key" in vars(cls):
        original: type = vars(cls)["_vqkernels_key"][1]
        return original
    if not issubclass(cls, Adapter):
        return cls
    bases = tuple(_without_adapter(base) for base in cls.__bases__)
    body = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return types.new_class(cls.__name__, bases, exec_body=lambda namespace: namespace.update(body))


def _reduce(self: Adapter, protocol: Any) -> Any:
    """Pickle and deepcopy as the original does, but name the class by what it was made from: it has no import path."""
    key = vars(type(self)).get("_vqkernels_key")
    reduced = super(_generated(type(self)), self).__reduce_ex__(max(int(protocol), 2))
    if key is None or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
        return reduced
    return (_rebuild, key, *reduced[2:])


def _rebuild(adapter: type[Adapter], original: type, fixes: frozenset[str]) -> Adapter:
    cls = generated_class(adapter, original, fixes)
    return cls.__new__(cls)


def _short(path: str) -> str:
    """``library.Class``."""
    return f"{path.partition('.')[0]}.{path.rpartition('.')[2]}"
