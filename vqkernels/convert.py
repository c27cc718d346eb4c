"""Codebooks between the layouts of checkpoints: taming, DAC, EnCodec, Mimi, vector-quantize-pytorch, ours and others.

Called by users; :mod:`vqkernels.nn.checkpoints` knows the names to read. Codes come out bit for bit as they went in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from vqkernels._arguments import check_choice, shape_of
from vqkernels._files import replacing
from vqkernels.nn.checkpoints import translate

__all__ = ["LAYOUTS", "convert", "convert_file", "find_codebooks"]


class _Codebook(NamedTuple):
    """One quantizer's state, whatever it was called: (K, D) or (H, K, D), (K,) or (H, K), as the codes, 0-d bool."""

    codes: Tensor
    size: Tensor
    average: Tensor
    initialized: Tensor

    def one_head(self, layout: str) -> _Codebook:
        """Without a head dimension."""
        if self.codes.dim() == 2:
            return self
        if self.codes.shape[0] != 1:
            raise ValueError(
                f"the codebook has shape {shape_of(self.codes)}, so {self.codes.shape[0]} heads; layout {layout!r} has "
                "no heads. Convert them one by one, or to 'vector-quantize-pytorch' or 'vqkernels'"
            )
        return _Codebook(self.codes[0], self.size[0], self.average[0], self.initialized)


def _ours(book: _Codebook) -> dict[str, Tensor]:
    book = book.one_head("vqkernels") if book.codes.shape[0] == 1 and book.codes.dim() == 3 else book
    counters = {
        "code_counts": torch.zeros(book.codes.shape[:-1], dtype=torch.int64),
        "steps": torch.zeros((), dtype=torch.int64),
    }
    return {"codebook": book.codes, **counters, "initialized": book.initialized}


def _ours_ema(book: _Codebook) -> dict[str, Tensor]:
    ours = _ours(book)
    shape = ours["codebook"].shape
    return {**ours, "cluster_size": book.size.reshape(shape[:-1]), "embed_avg": book.average.reshape(shape)}


def _weight(key: str) -> Callable[[_Codebook], dict[str, Tensor]]:
    return lambda book: {key: book.codes}


def _with_heads(book: _Codebook) -> dict[str, Tensor]:
    codes, size, average = book.codes, book.size, book.average
    if codes.dim() == 2:
        codes, size, average = codes[None], size[None], average[None]
    return {
        "_codebook.initted": book.initialized,
        "_codebook.cluster_size": size,
        "_codebook.embed_avg": average,
        "_codebook.embed": codes,
    }


def _encodec(prefix: str) -> Callable[[_Codebook], dict[str, Tensor]]:
    def write(book: _Codebook) -> dict[str, Tensor]:
        return {
            f"{prefix}inited": book.initialized.reshape(1).float(),
            f"{prefix}cluster_size": book.size,
            f"{prefix}embed": book.codes,
            f"{prefix}embed_avg": book.average,
        }

    return write


def _sums(prefix: str, total: str, flag: str) -> Callable[[_Codebook], dict[str, Tensor]]:
    """Codes that are stored as sums over usage."""

    def write(book: _Codebook) -> dict[str, Tensor]:
        usage, sums = _dividing(book)
        return {
            f"{prefix}{flag}": book.initialized.reshape(1).float(),
            f"{prefix}cluster_usage": usage,
            f"{prefix}{total}": sums,
        }

    return write


def _dividing(book: _Codebook) -> tuple[Tensor, Tensor]:
    """Usage and sums whose quotient is the codes, to the last bit.

    The averages at hand if they are that (they are if they came from such a layout). Elsewhere the usage is rounded
    to a power of two, by which numbers multiply and divide without rounding, or is 1 where that leaves the range of
    the dtype.
    """
    usage = book.size.to(book.codes.dtype)
    exact = (book.average / usage.clamp(min=1e-5).unsqueeze(-1) == book.codes).all(-1)
    rounded = torch.exp2(usage.float().clamp(min=2**-16).log2().round()).to(usage.dtype)
    kept = (book.codes * rounded.unsqueeze(-1) / rounded.unsqueeze(-1) == book.codes).all(-1)
    usage = torch.where(exact, usage, torch.where(kept, rounded, 1.0))
    return usage, torch.where(exact.unsqueeze(-1), book.average.to(usage.dtype), book.codes * usage.unsqueeze(-1))


def _transposed(book: _Codebook) -> dict[str, Tensor]:
    return {"embed": book.codes.t(), "cluster_size": book.size, "embed_avg": book.average.t()}


# Name -> what it writes below the quantizer's prefix, and whether it has heads.
_WRITERS: dict[str, tuple[Callable[[_Codebook], dict[str, Tensor]], bool]] = {
    "vqkernels": (_ours, True),
    "vqkernels-ema": (_ours_ema, True),
    "vector-quantize-pytorch": (_with_heads, True),
    "taming": (_weight("embedding.weight"), False),
    "dac": (_weight("codebook.weight"), False),
    "encodec": (_encodec("_codebook."), False),
    "encodec-transformers": (_encodec("codebook."), False),
    "moshi": (_sums("_codebook.", "embedding_sum", "_initialized"), False),
    "mimi-transformers": (_sums("codebook.", "embed_sum", "initialized"), False),
    "rosinality": (_transposed, False),
    "sonnet": (lambda book: {"embeddings": book.codes.t()}, False),
}
LAYOUTS = tuple(_WRITERS)
# Where the codes are, the longest name first: the rest of the key is the quantizer's prefix.
_ANCHORS = (
    "_codebook.embedding_sum",
    "_codebook.embed",
    "codebook.embed_sum",
    "codebook.weight",
    "codebook.embed",
    "embedding.weight",
    "embedding_sum",
    "embeddings",
    "embed_sum",
    "codebook",
    "embed",
)
_OURS = ("codebook", "code_counts", "cluster_size", "embed_avg", "steps", "initialized")


def find_codebooks(state_dict: Mapping[str, Any]) -> list[str]:
    """The prefixes, ``""`` or ending in a dot, below which a layout of :data:`LAYOUTS` was found.

    An ``nn.Embedding`` that is called ``embedding`` looks like taming's codebook whatever it is for: pass the prefixes
    that you mean to :func:`convert`.

    Example:
        >>> import torch
        >>> from vqkernels.convert import find_codebooks
        >>> find_codebooks({"encoder.weight": torch.ones(2), "quantize.embedding.weight": torch.ones(4, 2)})
        ['quantize.']
    """
    found: dict[str, None] = {}
    for key in state_dict:
        for anchor in _ANCHORS:
            if key == anchor or key.endswith(f".{anchor}"):
                found.setdefault(key[: len(key) - len(anchor)])
                break
    return list(found)


def convert(
    state_dict: Mapping[str, Tensor],
    to: str,
    *,
    prefix: str | Iterable[str] | None = None,
    rename: Callable[[str], str] | None = None,
    normalize: bool = False,
) -> dict[str, Tensor]:
    """A ``state_dict`` with its codebooks in another layout; the other entries stay as they are.

    ======================== ================================================================== =================
    ``to``                   keys below the quantizer's prefix                                  codes
    ======================== ================================================================== =================
    vqkernels                codebook, code_counts, steps, initialized                          (K, D), (H, K, D)
    vqkernels-ema            the same with cluster_size, embed_avg                              (K, D), (H, K, D)
    vector-quantize-pytorch  _codebook. embed, cluster_size, embed_avg, initted                 (H, K, D)
    taming                   embedding.weight (also diffusers, LlamaGen, Chameleon, Janus, VAR) (K, D)
    dac                      codebook.weight (also transformers' DAC)                           (K, D)
    encodec                  _codebook. embed, cluster_size, embed_avg, inited                  (K, D)
    encodec-transformers     codebook. embed, cluster_size, embed_avg, inited                   (K, D)
    moshi                    _codebook. embedding_sum, cluster_usage, _initialized              sums (K, D)
    mimi-transformers        codebook. embed_sum, cluster_usage, initialized                    sums (K, D)
    rosinality               embed, cluster_size, embed_avg                                     (D, K)
    sonnet                   embeddings                                                         (D, K)
    ======================== ================================================================== =================

    Codes are kept to the last bit. Moving averages go along where the layout has them; where the source has none,
    each code starts with a cluster of size 1 at its own place. The layouts of sums over usage store what divides out
    to the very code, with the usage rounded to a power of two where that takes it.

    Args:
        state_dict: of a quantizer or of a whole model; any layout of the table, which is found by its keys.
        to: a name of the table.
        prefix: of the quantizers to convert, e.g. ``"quantize."``; all of :func:`find_codebooks` by default.
        rename: from a quantizer's old prefix to its new one.
        normalize: make unit vectors of the codes, for models that search between unit vectors.

    Returns:
        A new dict; entries that did not change are the same tensors.

    Raises:
        ValueError: ``to`` is unknown, no codebook was found, a part of one is missing or does not fit its codes, or
            heads don't fit the layout.

    Example:
        >>> import torch, vqkernels
        >>> state = vqkernels.convert({"quantize.embedding.weight": torch.eye(3)}, "vector-quantize-pytorch")
        >>> {name: tuple(tensor.shape) for name, tensor in state.items()}  # doctest: +NORMALIZE_WHITESPACE
        {'quantize._codebook.initted': (), 'quantize._codebook.cluster_size': (1, 3),
         'quantize._codebook.embed_avg': (1, 3, 3), 'quantize._codebook.embed': (1, 3, 3)}
    """
    check_choice("to", to, LAYOUTS)
    prefixes = find_codebooks(state_dict) if prefix is None else [prefix] if isinstance(prefix, str) else prefix
    prefixes = list(dict.fromkeys(prefixes))
    if not prefixes:
        raise ValueError(f"the state_dict holds no codebook; expected a key that ends in one of {', '.join(_ANCHORS)}")
    write, heads = _WRITERS[to]
    out = dict(state_dict)
    books: dict[str, _Codebook] = {}
    for old in prefixes:
        books[old], keys = _read(state_dict, old)
        for key in keys:  # all of them before the first is written, so that prefixes can change places
            out.pop(old + key, None)
    for old, book in books.items():
        if normalize:
            codes = functional.normalize(book.codes, dim=-1)
            book = book._replace(codes=codes, average=codes * book.size.unsqueeze(-1))
        new = old if rename is None else rename(old)
        written = write(book if heads else book.one_head(to))
        if clash := [key for key in written if new + key in out]:
            raise ValueError(f"{new + clash[0]!r} would be written over; expected rename to keep prefixes apart")
        out |= {new + key: tensor.contiguous() for key, tensor in written.items()}
    return out


def _read(state_dict: Mapping[str, Tensor], prefix: str) -> tuple[_Codebook, list[str]]:
    """The codebook below a prefix and the keys, without it, that it came from."""
    own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    if "codebook" in own:
        found, keys = {k: own[k] for k in _OURS if k in own}, [k for k in _OURS if k in own]
    elif "embeddings" in own:
        codes = own["embeddings"]
        found, keys = {"codebook": codes.transpose(-1, -2) if codes.dim() > 1 else codes}, ["embeddings"]
    elif (translated := _translated(own, prefix)) is not None:
        found, keys = translated
    else:
        raise ValueError(f"there is no codebook below prefix {prefix!r}; found {find_codebooks(state_dict)}")
    codes = found["codebook"]
    if codes.dim() not in (2, 3):
        raise ValueError(f"the codebook below {prefix!r} has shape {shape_of(codes)}; expected (K, D) or (H, K, D)")
    expected = {"cluster_size": codes.shape[:-1], "embed_avg": codes.shape}
    for name in expected.keys() & found.keys():
        if found[name].shape != expected[name]:
            raise ValueError(
                f"{name} below {prefix!r} has shape {shape_of(found[name])}; expected {tuple(expected[name])}, to fit "
                f"codes of shape {shape_of(codes)}"
            )
    size = found.get("cluster_size")
    if size is None:
        size = torch.ones(codes.shape[:-1], dtype=codes.dtype, device=codes.device)
    average = found.get("embed_avg")
    if average is None:
        average = codes * size.unsqueeze(-1)
    flag = found.get("initialized")
    if flag is not None and flag.numel() != 1:
        raise ValueError(f"initialized below {prefix!r} has shape {shape_of(flag)}; expected one value")
    return _Codebook(codes, size, average, torch.tensor(True) if flag is None else flag.bool().reshape(())), keys


def _translated(own: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], list[str]] | None:
    try:
        return translate(own)
    except KeyError as e:
        raise ValueError(f"{prefix + str(e.args[0])!r} is missing; expected it beside the codes") from e
    except (IndexError, RuntimeError) as e:
        raise ValueError(f"the codebook below {prefix!r} has parts whose shapes do not fit: {e}") from e


def convert_file(source: str | os.PathLike[str], destination: str | os.PathLike[str], to: str, **options: Any) -> None:
    """:func:`convert` from a file to a file; the new file is there whole or not at all.

    A destination that is there already keeps its permissions; of a link, the file that it leads to is replaced.

    Args:
        source: ``.safetensors``, or what ``torch.load(..., weights_only=True)`` reads: a state_dict, or a dict with one
            under ``"state_dict"``.
        destination: ``.safetensors``, ``.pt``, ``.pth``, ``.ckpt`` or ``.bin``; may be ``source``.
        to, **options: as for :func:`convert`.

    Raises:
        ValueError: the ending of ``destination`` is none of these, ``source`` is damaged or holds more than tensors, or
            as for :func:`convert`.
        OSError: ``source`` cannot be read, or ``destination`` cannot be written.
        ImportError: a ``.safetensors`` file without the ``safetensors`` package.
    """
    source, destination = Path(source), Path(destination)
    check_choice("the ending of destination", destination.suffix, (".safetensors", ".pt", ".pth", ".ckpt", ".bin"))
    try:
        state, metadata = _load(source)
    except (ImportError, OSError, ValueError):
        raise
    except Exception as e:  # safetensors' own type, UnpicklingError, EOFError, KeyError, ...: whatever damage leads to
        raise ValueError(f"{source} cannot be read, it is damaged or holds more than tensors: {e!r}") from e
    converted = convert(state, to, **options)
    with replacing(destination) as temporary:
        try:
            if destination.suffix == ".safetensors":
                _safetensors().save_file(_unshared(converted), temporary, metadata={"format": "pt", **metadata})
            else:
                with open(temporary, "wb") as file:  # by its name, torch would write that into the file
                    torch.save(converted, file)
        except (ImportError, OSError):
            raise
        except Exception as e:  # safetensors' own type, or a RuntimeError of torch about positions in the file
            raise OSError(f"{destination} cannot be written, is the disk full? ({e})") from e


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix == ".safetensors":
        _safetensors()
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{path.name} is no state_dict; expected a dict of tensors, or one under 'state_dict'")
    return loaded, {}


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as e:
        raise ImportError("a .safetensors file needs the safetensors package: pip install safetensors") from e
    return safetensors.torch


def _unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor with memory of its own, which the format asks for."""
    seen: set[int] = set()
    out = {}
    for key, tensor in state.items():
        pointer = tensor.untyped_storage().data_ptr()
        out[key] = tensor.contiguous().clone() if pointer in seen else tensor.contiguous()
        seen.add(pointer)
    return out
