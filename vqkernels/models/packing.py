"""Token streams of ceil(log2 K) bits per token, packed without gaps, and back.

Used by tokenising tools; the format depends on K and the number of tokens only.

Format: token i occupies the bits [i * b, (i + 1) * b) with b = ceil(log2 K), its lowest bit first; bit j of the stream
is bit j % 8 of byte j // 8; the last byte is filled up with zeros. K = 1 needs no bits at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vqkernels._arguments import check_count, check_indices

__all__ = ["bits_per_token", "pack_tokens", "packed_size", "unpack_tokens"]

# Tokens handled at once, a multiple of 8 so that every part but the last ends on a byte: 64 bits of work each.
PART = 1 << 16


def bits_per_token(codes: int) -> int:
    """ceil(log2 K).

    Example:
        >>> [bits_per_token(k) for k in (1, 2, 3, 1024, 16384, 262145)]
        [0, 1, 2, 10, 14, 19]
    """
    check_count("codes", codes)
    if codes > 2**63:
        raise ValueError(f"codes is {codes}; expected at most 2^63")
    return (codes - 1).bit_length()


def packed_size(tokens: int, codes: int) -> int:
    """Bytes of so many packed tokens."""
    return (tokens * bits_per_token(codes) + 7) // 8


def pack_tokens(indices: Tensor, codes: int) -> bytes:
    """Pack tokens.

    Args:
        indices: integers in [0, codes), any shape; they are taken in row-major order.
        codes: K.

    Returns:
        ``packed_size(indices.numel(), codes)`` bytes.

    Raises:
        ValueError: an index is out of range (also -1, "no code"), or ``codes`` is not positive.
        TypeError: ``indices`` are no integers.

    Example:
        >>> import torch
        >>> len(pack_tokens(torch.arange(256), 1024))
        320
    """
    check_indices(indices)
    bits = bits_per_token(codes)
    flat = indices.detach().reshape(-1).cpu().to(torch.int64)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= codes):
        raise ValueError(f"indices lie in [{int(flat.min())}, {int(flat.max())}]; expected [0, {codes})")
    parts = []
    for part in flat.split(PART) if bits else ():  # type: ignore[no-untyped-call]
        words = part.numpy().astype("<u8").view(np.uint8).reshape(-1, 8)
        used = np.unpackbits(words, axis=1, count=bits, bitorder="little")
        parts.append(np.packbits(used.reshape(-1), bitorder="little").tobytes())
    return b"".join(parts)


def unpack_tokens(data: bytes, codes: int, shape: Sequence[int]) -> Tensor:
    """The reverse of :func:`pack_tokens`.

    Args:
        data: what it returned.
        codes: the same K.
        shape: of the tokens.

    Returns:
        int64 tensor of ``shape``.

    Raises:
        ValueError: ``data`` has another length than ``shape`` and ``codes`` say, or holds a token beyond ``codes``.

    Example:
        >>> import torch
        >>> tokens = torch.tensor([[4, 0], [2, 1]])
        >>> unpack_tokens(pack_tokens(tokens, 5), 5, (2, 2)).tolist()
        [[4, 0], [2, 1]]
    """
    bits, total = bits_per_token(codes), math.prod(shape)
    if len(data) != (expected := packed_size(total, codes)):
        raise ValueError(f"data has {len(data)} bytes; expected {expected} for {total} tokens of {bits} bits")
    stored = np.frombuffer(data, dtype=np.uint8)
    out = np.zeros(total, dtype="<u8")
    for start in range(0, total, PART) if bits else ():
        count = min(PART, total - start)
        first = start * bits // 8
        part = stored[first : first + (count * bits + 7) // 8]
        used = np.unpackbits(part, count=count * bits, bitorder="little").reshape(count, bits)
        words = np.zeros((count, 8), dtype=np.uint8)
        packed = np.packbits(used, axis=1, bitorder="little")
        words[:, : packed.shape[1]] = packed
        out[start : start + count] = words.view("<u8").reshape(-1)
    tokens = torch.from_numpy(out.astype(np.int64))
    if total and int(tokens.max()) >= codes:
        raise ValueError(f"data holds the token {int(tokens.max())}; expected less than codes={codes}")
    return tokens.reshape(tuple(shape))
