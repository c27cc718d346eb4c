"""The cache of packed codebooks never serves a stale one, whatever way the codebook was changed, and does serve."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from shapes import ISAS, search
from torch import Tensor

import vqkernels
from vqkernels import _cpu_nearest, _native
from vqkernels.ops.nearest import METRICS
from vqkernels.ops.nearest import native as nearest_native
from vqkernels.testing import assert_nearest, oracle_nearest

pytestmark = pytest.mark.skipif(not ISAS, reason="the native library is not available, and only it has a cache")

N, K, D = 63, 100, 9


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("VQKERNELS_CACHE_MB", raising=False)
    nearest_native.clear_cache()
    yield
    nearest_native.clear_cache()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The packed codebook of every search, in order."""
    packed, found = _cpu_nearest.packed, []

    def record(*args: object) -> Tensor:
        found.append(packed(*args))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr(_cpu_nearest, "packed", record)
    return found


def add_in_place(codes: Tensor) -> Tensor:
    return codes.add_(torch.randn_like(codes))


def swap_data(codes: Tensor) -> Tensor:
    codes.data = torch.randn_like(codes)
    return codes


def copy_into_data(codes: Tensor) -> Tensor:
    codes.data.copy_(torch.randn_like(codes))
    return codes


def optimiser_step(codes: Tensor) -> Tensor:
    parameter = torch.nn.Parameter(codes)
    assert parameter.data_ptr() == codes.data_ptr()
    parameter.grad = torch.randn_like(codes)
    torch.optim.SGD([parameter], lr=1.0).step()
    return parameter


def write_through_a_view(codes: Tensor) -> Tensor:
    with torch.no_grad():
        codes.view(-1)[: K // 2 * D] = 0.5 * torch.randn(K // 2 * D)
    return codes


def write_through_numpy(codes: Tensor) -> Tensor:
    codes.numpy()[::2] *= -1
    return codes


def write_behind_the_back_of_torch(codes: Tensor) -> Tensor:
    other = torch.randn_like(codes)
    ctypes.memmove(codes.data_ptr(), other.data_ptr(), codes.numel() * 4)
    return codes


def set_storage(codes: Tensor) -> Tensor:
    return codes.set_(torch.randn_like(codes))  # type: ignore[call-overload]


def swap_tensors(codes: Tensor) -> Tensor:
    torch.utils.swap_tensors(codes, torch.randn_like(codes))
    return codes


def reverse_in_place(codes: Tensor) -> Tensor:
    return codes.copy_(codes.flip(0).clone())


def reverse_dims_in_place(codes: Tensor) -> Tensor:
    return codes.copy_(codes.flip(1).clone())


def swap_two_codes(codes: Tensor) -> Tensor:
    best = int(oracle_nearest(X, codes)[0].mode().values)
    codes[[best, best - 1]] = codes[[best - 1, best]].clone()
    return codes


def negate(codes: Tensor) -> Tensor:
    return codes.neg_()


def free_and_reuse_the_address(codes: Tensor) -> Tensor:
    flat = codes.view(-1)
    address = flat.data_ptr()
    # What the allocator does when one codebook dies and another is born, without depending on the allocator.
    other = torch.randn_like(codes)
    memory = (ctypes.c_float * codes.numel()).from_address(address)
    ctypes.memmove(memory, other.data_ptr(), ctypes.sizeof(memory))
    reborn = torch.frombuffer(memory, dtype=torch.float32).view(K, D)
    assert reborn.data_ptr() == address
    KEPT.append(flat)
    return reborn


X = torch.randn(N, D, generator=torch.Generator().manual_seed(5))
KEPT: list[Tensor] = []
CHANGES: list[Callable[[Tensor], Tensor]] = [
    add_in_place,
    swap_data,
    copy_into_data,
    optimiser_step,
    write_through_a_view,
    write_through_numpy,
    write_behind_the_back_of_torch,
    set_storage,
    swap_tensors,
    reverse_in_place,
    reverse_dims_in_place,
    swap_two_codes,
    negate,
    free_and_reuse_the_address,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("metric", METRICS)
def test_a_changed_codebook_is_packed_again(isa: str, metric: str, change: Callable[[Tensor], Tensor]) -> None:
    codes = torch.randn(K, D)
    before = search(X, codes, metric)[0]
    codes = change(codes)
    index, score = search(X, codes, metric)
    assert not index.equal(before)
    assert_nearest(index, X, codes, metric, score)


def test_a_freed_codebook_does_not_answer_for_the_next_one_at_its_address() -> None:
    reused = 0
    codes = torch.randn(4096, 16)
    x = torch.randn(20, 16)
    for _ in range(10):
        address = codes.data_ptr()
        search(x, codes)
        del codes
        codes = torch.randn(4096, 16)
        reused += codes.data_ptr() == address
        index, score = search(x, codes)
        assert_nearest(index, x, codes, "l2", score)
    if not reused:  # free_and_reuse_the_address above does not depend on luck
        pytest.skip("this allocator gave every codebook an address of its own")


def test_an_unchanged_codebook_is_served_again(isa: str, served: list[Tensor]) -> None:
    codes = torch.randn(K, D)
    first = search(X, codes)
    search(X[:9], codes)
    search(X.double(), codes.requires_grad_())
    assert served[1] is served[0]
    assert served[2] is served[0]
    again = search(X, codes.detach())
    assert served[3] is served[0]
    assert again[0].equal(first[0])
    assert again[1].equal(first[1])


def test_a_codebook_that_is_not_contiguous_is_served_again(served: list[Tensor]) -> None:
    codes = torch.randn(D, K)
    search(X, codes.T)
    search(X, codes.T)
    assert served[1] is served[0]
    codes[0] += 1
    index, score = search(X, codes.T)
    assert served[2] is not served[0]
    assert_nearest(index, X, codes.T, "l2", score)


def test_two_codebooks_in_turns_are_both_kept(isa: str, served: list[Tensor]) -> None:
    codes = [torch.randn(K, D), torch.randn(K, D)]
    for i in range(6):
        index, score = search(X, codes[i % 2])
        assert_nearest(index, X, codes[i % 2], "l2", score)
    assert [packed is served[i % 2] for i, packed in enumerate(served)] == [True] * 6
    assert served[0] is not served[1]


def test_metrics_and_instruction_sets_have_entries_of_their_own(
    monkeypatch: pytest.MonkeyPatch, served: list[Tensor]
) -> None:
    codes = torch.randn(K, 12)
    x = torch.randn(N, 12)
    for _ in range(2):
        for isa in ISAS:
            monkeypatch.setenv("VQKERNELS_ISA", isa)
            for metric in METRICS:
                index, score = search(x, codes, metric)
                assert_nearest(index, x, codes, metric, score)
    count = len(ISAS) * len(METRICS)
    assert len({packed.data_ptr() for packed in served}) == count
    assert all(served[i] is served[i + count] for i in range(count))


def test_the_same_memory_seen_as_another_shape_or_dtype() -> None:
    memory = torch.randn(64 * 64)
    views = [
        memory.view(64, 64),
        memory.view(64, 64).T,
        memory.view(128, 32),
        memory.view(32, 128),
        memory[: 64 * 32].view(64, 32),
        memory.view(64, 64)[:, :32],
        memory.view(64, 64)[::2, :32],
        memory.clamp(-1, 1).view(torch.bfloat16).view(64, 128),
    ]
    for _ in range(2):
        for codes in views:
            x = torch.randn(20, codes.shape[1])
            index, score = search(x, codes)
            assert_nearest(index, x, codes, "l2", score)
    halves = torch.randn(64, 32).bfloat16()
    for codes in (halves, halves.view(torch.float16)):  # one address, one shape, two dtypes
        codes = codes.nan_to_num()
        x = torch.randn(20, 32)
        index, score = search(x, codes)
        assert_nearest(index, x, codes, "l2", score)


def test_no_budget_means_no_cache(monkeypatch: pytest.MonkeyPatch, served: list[Tensor]) -> None:
    monkeypatch.setenv("VQKERNELS_CACHE_MB", "0")
    codes = torch.randn(K, D)
    for _ in range(2):
        index, score = search(X, codes)
        assert_nearest(index, X, codes, "l2", score)
    assert served[0] is not served[1]
    assert not _cpu_nearest._cache


def test_the_budget_is_kept_and_the_oldest_leaves(monkeypatch: pytest.MonkeyPatch, served: list[Tensor]) -> None:
    monkeypatch.setenv("VQKERNELS_CACHE_MB", "1")
    codes = [torch.randn(2048, 32) for _ in range(10)]  # some 0.15 to 0.3 MB each when packed
    x = torch.randn(9, 32)
    for one in codes:
        search(x, one)
        kept = sum(packed.untyped_storage().nbytes() for _, packed in _cpu_nearest._cache.values())
        assert 2**17 < kept == _cpu_nearest._kept <= 2**20
    search(x, codes[-1])
    assert served[-1] is served[9]
    search(x, codes[0])
    assert served[-1] is not served[0]


def test_a_codebook_that_learns_has_one_entry() -> None:
    # Moving averages quantize with a copy of the codebook: packed by the copy's address, every step would be another.
    vq = vqkernels.VectorQuantizer(K, D, decay=0.9, dead_code_ratio=0.1)
    for _ in range(3):
        vq(X)
    assert len(_cpu_nearest._cache) == 1
    nearest_native.clear_cache()
    assert _cpu_nearest._kept == 0


def test_a_codebook_larger_than_the_budget_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQKERNELS_CACHE_MB", "0.01")
    codes, x = torch.randn(2048, 32), torch.randn(33, 32)
    index, score = search(x, codes)
    assert_nearest(index, x, codes, "l2", score)
    assert not _cpu_nearest._cache


def test_threads_with_codebooks_of_their_own() -> None:
    wrong: list[str] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randn(K, D, generator=generator)
        for _ in range(20):
            codes += 0.5 * torch.randn(K, D, generator=generator)
            try:
                index, score = search(X, codes)
                assert_nearest(index, X, codes, "l2", score)
            except AssertionError as e:
                wrong.append(str(e))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def fingerprint(codes: Tensor) -> tuple[int, int]:
    found = (ctypes.c_uint64 * 2)()
    described = _native.codes(codes if codes.dim() == 3 else codes[None])
    _native.check(_native.lib().vqk_cpu_nearest_fingerprint(ctypes.byref(described), found))
    return int(found[0]), int(found[1])


# 3001 x 17 floats: four pieces of 64 KB, the last one short and not a multiple of 64 bytes.
WORDS = 3001 * 17
PIECE = 2**16 // 4


@pytest.mark.parametrize("start", ["normal", "zero"])
@pytest.mark.parametrize(
    "word", [0, 1, 15, 16, 17, 31, 1000, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, WORDS - 17, WORDS - 2, WORDS - 1]
)
def test_one_changed_bit_anywhere_is_seen(start: str, word: int, served: list[Tensor]) -> None:
    codes = torch.randn(3001, 17) if start == "normal" else torch.zeros(3001, 17)
    bits = codes.view(-1).view(torch.int32)
    x = torch.randn(9, 17)  # too many rows for the search that packs nothing
    search(x, codes)
    seen = {fingerprint(codes)}
    for bit in range(32):
        mask = (1 << bit) - (1 << 32) * (bit == 31)
        bits[word] ^= mask
        seen.add(fingerprint(codes))
        if bit in (0, 22, 31):
            search(x, codes)
            assert served[-1] is not served[0]
        bits[word] ^= mask
    assert len(seen) == 33


def test_fingerprints_of_similar_codebooks_differ() -> None:
    codes = torch.zeros(40, 7)
    seen, count = set(), 0
    for first in range(0, 280, 3):
        for second in range(first, 280, 7):
            for value in (1.0, -1.0):
                changed = codes.clone().view(-1)
                changed[first] += value
                changed[second] -= 2 * value  # sums and differences that cancel
                seen.add(fingerprint(changed.view(40, 7)))
                count += 1
    assert len(seen) == count
    base = torch.randn(64, 16)
    swapped = {fingerprint(base)}
    for i in range(64):
        for j in range(i):
            other = base.clone()
            other[[i, j]] = other[[j, i]]
            swapped.add(fingerprint(other))
    assert len(swapped) == 1 + 64 * 63 // 2


def test_fingerprint_does_not_depend_on_threads_or_address() -> None:
    codes, before = torch.randn(5000, 33), torch.get_num_threads()
    found = set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.add(fingerprint(codes))
            shifted = torch.empty(codes.numel() + 1)[1:].view_as(codes)
            found.add(fingerprint(shifted.copy_(codes)))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1
