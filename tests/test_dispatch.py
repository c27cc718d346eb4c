"""Which backend runs: argument before context before environment; explicit choices raise, automatic ones log."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vqkernels import dispatch, ops, tuned, use_backend

X, CODEBOOK = torch.tensor([[[[1.0, 0.1], [0.2, 3.0]]]]), torch.eye(2)[None]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends that ran ``nearest``, in order; both can run everything."""
    names: list[str] = []

    def fake(backend: str) -> Any:
        def run(
            x: torch.Tensor, codebook: torch.Tensor, metric: str, precision: str
        ) -> tuple[torch.Tensor, torch.Tensor]:
            names.append(backend)
            return torch.zeros(x.shape[:-1], dtype=torch.int64), torch.zeros(x.shape[:-1])

        return SimpleNamespace(supports=lambda *args: None, run=run)

    modules = {backend: fake(backend) for backend in ("native", "reference")}
    monkeypatch.setattr(dispatch, "_module", lambda op, backend: modules[backend])
    everything = tuple(dispatch.Backend(name, lambda device: None) for name in modules)
    monkeypatch.setattr(dispatch, "BACKENDS", everything)
    monkeypatch.delenv("VQKERNELS_BACKEND", raising=False)
    return names


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make the native backend refuse ``nearest`` with a reason, and forget which fallbacks were logged."""
    dispatch._log_fallback.cache_clear()

    def apply(reason: str) -> None:
        original = dispatch._module
        module = SimpleNamespace(supports=lambda *args: reason, run=lambda *args: pytest.fail("ran"))
        monkeypatch.setattr(dispatch, "_module", lambda op, name: module if name == "native" else original(op, name))
        backends = (dispatch.Backend("native", lambda device: None), dispatch.BACKENDS[-1])
        monkeypatch.setattr(dispatch, "BACKENDS", backends)

    return apply


def test_narrowest_scope_wins(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ops.nearest(X, CODEBOOK)
    monkeypatch.setenv("VQKERNELS_BACKEND", "reference")
    ops.nearest(X, CODEBOOK)
    with use_backend("native"):
        ops.nearest(X, CODEBOOK)
        ops.nearest(X, CODEBOOK, backend="reference")
    ops.nearest(X, CODEBOOK)
    ops.nearest(X, CODEBOOK, backend="native")
    assert ran == ["native", "reference", "native", "reference", "reference", "native"]


def test_contexts_nest_and_auto_undoes_the_environment(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQKERNELS_BACKEND", "reference")
    with use_backend("native"):
        with use_backend("auto"):
            assert dispatch.requested() == "auto"
        assert dispatch.requested() == "native"
    assert dispatch.requested() == "reference"
    with pytest.raises(KeyError), use_backend("native"):
        raise KeyError
    assert dispatch.requested() == "reference"


def test_context_belongs_to_its_thread() -> None:
    seen: list[str] = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.requested()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_empty_environment_means_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQKERNELS_BACKEND", "")
    assert dispatch.requested() == "auto"


def test_unknown_names_are_errors_that_say_where(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"backend is 'cuda'; expected 'auto' or one of 'native', 'triton', 'ref"):
        ops.nearest(X, CODEBOOK, backend="cuda")
    with pytest.raises(ValueError, match=r"use_backend\(name\) is 'cuda'"), use_backend("cuda"):
        pytest.fail("entered")
    monkeypatch.setenv("VQKERNELS_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"VQKERNELS_BACKEND is 'cuda'"):
        ops.nearest(X, CODEBOOK)


@pytest.mark.parametrize("scope", ["argument", "context", "environment"])
def test_explicit_backend_that_cannot_run_raises_with_the_reason(
    scope: str, refuse: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse("only on Tuesdays")
    expected = r"nearest: backend 'native' cannot run this call: only on Tuesdays"
    if scope == "environment":
        monkeypatch.setenv("VQKERNELS_BACKEND", "native")
    context = use_backend("native") if scope == "context" else contextlib.nullcontext()
    with context, pytest.raises(dispatch.Unsupported, match=expected):
        ops.nearest(X, CODEBOOK, backend="native" if scope == "argument" else "auto")


def test_automatic_fallback_gives_the_answer_and_logs_once(
    refuse: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    refuse("only on Tuesdays")
    with caplog.at_level(logging.INFO, logger="vqkernels"):
        for _ in range(3):
            indices, score = ops.nearest(X, CODEBOOK)
    assert indices.tolist() == [[[0, 1]]]
    torch.testing.assert_close(score, torch.tensor([[[0.01, 4.04]]]))
    assert [r.getMessage() for r in caplog.records] == [
        "nearest on cpu uses the reference backend (native: only on Tuesdays)"
    ]


def test_first_choice_is_not_logged(ran: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="vqkernels"):
        ops.nearest(X, CODEBOOK)
    assert ran == ["native"]
    assert not caplog.records


def test_error_of_the_backend_itself_is_not_swallowed(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError("from the kernel")

    monkeypatch.setattr(dispatch._module("nearest", "native"), "run", broken)
    with pytest.raises(ZeroDivisionError, match="from the kernel"):
        ops.nearest(X, CODEBOOK)
    assert ran == []


def test_nothing_can_run_says_why_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = tuple(dispatch.Backend(name, lambda device: f"no {device} today") for name in ("native", "reference"))
    monkeypatch.setattr(dispatch, "BACKENDS", backends)
    with pytest.raises(dispatch.Unsupported, match=r"native: no cpu today; reference: no cpu today"):
        ops.nearest(X, CODEBOOK)


def test_missing_backend_file_means_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    extra = dispatch.Backend("triton9", lambda device: None)
    monkeypatch.setattr(dispatch, "BACKENDS", (extra, *dispatch.BACKENDS))
    assert dispatch.missing("nearest", extra, "cpu") == "no triton9 implementation of nearest"
    assert ops.nearest(X, CODEBOOK)[0].tolist() == [[[0, 1]]]


def test_explain_names_the_choice_and_every_reason(refuse: Callable[[str], None]) -> None:
    args = (X, CODEBOOK, "l2", "exact")
    assert dispatch.explain("nearest", args, "reference").splitlines()[0] == "nearest on cpu: reference"
    refuse("only on Tuesdays")
    assert dispatch.explain("nearest", args).splitlines() == [
        "nearest on cpu: reference",
        "  native     only on Tuesdays",
        "  reference  chosen",
    ]
    assert dispatch.explain("nearest", args, "native").splitlines() == [
        "nearest on cpu: nothing can run this call",
        "  native     only on Tuesdays",
        "  reference  not asked for (backend='native')",
    ]


def test_explain_says_what_the_backend_would_use(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch._module("nearest", "native"), "describe", lambda *args: "with care", raising=False)
    assert dispatch.explain("nearest", (X, CODEBOOK, "l2", "exact")).splitlines() == [
        "nearest on cpu: native",
        "  native     chosen: with care",
        "  reference  available",
    ]
    assert ran == []


def test_nothing_is_chosen_while_tracing(ran: list[str]) -> None:
    with FakeTensorMode() as mode:
        x, codebook = mode.from_tensor(X), mode.from_tensor(CODEBOOK)
        indices, score = torch.ops.vqkernels.nearest(x, codebook)
    assert (indices.shape, score.dtype) == (X.shape[:-1], torch.float32)
    assert ran == []

    def search(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.vqkernels.nearest(x, codebook)[0]
        return found

    program = torch.export.export(_Module(search), (X, CODEBOOK))
    assert ran == []
    # What was traced asks anew on every call, so a context around it still rules.
    program.module()(X, CODEBOOK)
    with use_backend("reference"):
        program.module()(X, CODEBOOK)
    assert ran == ["native", "reference"]


class _Module(torch.nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        return self.function(x, codebook)


GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(ran: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Calls are dispatched as if their tensors were on a GPU; the result writes its table of measured times."""
    reasons: dict[str, str | None] = {"native": None, "triton": None}
    everything = (
        dispatch.Backend("native", lambda device: None, lambda device: reasons["native"], by_table=True),
        dispatch.Backend("triton", lambda device: None, lambda device: reasons["triton"]),
        dispatch.Backend("reference", lambda device: None),
    )
    module = dispatch._module("nearest", "native")
    triton = SimpleNamespace(supports=lambda *args: None, run=lambda *args: ran.append("triton") or module.run(*args))
    original = dispatch._module
    monkeypatch.setattr(dispatch, "_module", lambda op, name: triton if name == "triton" else original(op, name))
    monkeypatch.setattr(dispatch, "BACKENDS", everything)
    monkeypatch.setattr(dispatch, "_place", lambda args: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Test 9")
    monkeypatch.setenv("VQKERNELS_TUNED", str(tmp_path))

    def measured(op: str = "nearest", held_back: dict[str, str] | None = None, **milliseconds: float) -> None:
        reasons.update({"native": None, "triton": None} | (held_back or {}))
        entry = {"case": "tiny", "rows": 2, "codes": 2, "dim": 2, "milliseconds": milliseconds}
        content = {"schema": tuned.SCHEMA, "device": "NVIDIA Test 9", "nearest": {}}
        content |= {"auto": {op: [entry]}} if milliseconds else {}
        (tmp_path / "nvidia-test-9.json").write_text(json.dumps(content))
        tuned.clear_cache()
        ran.clear()

    yield measured
    tuned.clear_cache()


def test_the_measured_table_orders_backends_on_a_gpu(gpu: Callable[..., None], ran: list[str]) -> None:
    gpu(native=0.5, triton=0.25)
    ops.nearest(X, CODEBOOK)
    assert ran[0] == "triton"
    gpu(native=0.125, triton=0.25)
    ops.nearest(X, CODEBOOK)
    assert ran == ["native"]
    ops.nearest(X, CODEBOOK, backend="reference")
    assert ran == ["native", "reference"]


def test_without_a_measurement_the_cuda_library_waits_and_triton_runs(gpu: Callable[..., None], ran: list[str]) -> None:
    for table in ({}, {"triton": 0.25}, {"op": "lookup", "native": 0.125, "triton": 0.25}):
        gpu(**table)
        ops.nearest(X, CODEBOOK)
        assert ran[0] == "triton", table
    gpu(held_back={"native": "not verified", "triton": "not verified"}, native=0.125, triton=0.25)
    ops.nearest(X, CODEBOOK)
    assert ran == ["reference"], "the fastest, but nothing says that it is right"


def test_explain_gives_the_times_and_what_holds_back(gpu: Callable[..., None]) -> None:
    args = (X, CODEBOOK, "l2", "exact")
    gpu(native=0.125, triton=0.25)
    why = "(measured at 2 rows x 2 codes x 2 dims (tiny): native 0.125 ms, triton 0.25 ms)"
    assert dispatch.explain("nearest", args).splitlines() == [
        "nearest on cuda: native",
        f"  native     chosen {why}",
        "  triton     available",
        "  reference  available",
    ]
    gpu(held_back={"native": "not those that were verified"}, native=0.125, triton=0.25)
    assert dispatch.explain("nearest", args).splitlines() == [
        "nearest on cuda: triton",
        "  native     available on request (backend='native'): not those that were verified",
        f"  triton     chosen {why}",
        "  reference  available",
    ]
    gpu()
    assert "(backend='native'): no measured table of this GPU names it" in dispatch.explain("nearest", args)
    gpu(native=0.125)
    # Asked for by name: the table has no say.
    assert "measured" not in dispatch.explain("nearest", args, "triton")


def test_sizes_of_every_op_are_read_from_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, tuple[int, ...]] = {}

    def choice(name: str, op: str, *sizes: int) -> None:
        seen[op] = sizes

    monkeypatch.setattr(tuned, "choice", choice)
    monkeypatch.setattr(tuned, "device_name", lambda device: "NVIDIA Test 9")
    z, codes, indices = torch.zeros(2, 3, 5, 7), torch.zeros(2, 11, 7), torch.zeros(2, 3, 5, dtype=torch.int64)
    given: dict[str, tuple[Any, ...]] = {
        "nearest": (z, codes, "l2", "exact"),
        "residual_nearest": (z, [codes], False),
        "lookup": (codes, indices, False, None),
        "codebook_sum": (z, indices, 11),
        "ema_update": (codes[..., 0], codes, codes, codes[..., 0], codes, 0.9, 1e-5, False),
        "quantize_grad": (z, z, codes, indices, torch.ones(()), "rotation", False),
        "quantize_output": (z, codes, indices, None, False, False),
        "soft_assign": (z[:, 0].repeat(1, 3, 1), codes, torch.ones(2, 15), True, 0.1),
        "soft_assign_grad": (z[:, 0].repeat(1, 3, 1), codes, torch.ones(2, 15), *[None] * 4, True, 0.1),
    }
    assert set(given) == set(dispatch.OPS) == set(dispatch._SIZES)
    for op, args in given.items():
        assert dispatch._measured(op, "auto", GPU, args) is None
        assert dispatch._measured(op, "native", GPU, args) is None
    assert seen == {op: (0 if op == "ema_update" else 30, 11, 7) for op in given}
    seen.clear()
    dispatch._measured("nearest", "native", GPU, given["nearest"])
    dispatch._measured("nearest", "auto", torch.device("cpu"), given["nearest"])
    assert seen == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_tensors_get_the_same_answer() -> None:
    torch.manual_seed(0)
    x, codebook = torch.randn(2, 3, 63, 17), torch.randn(2, 257, 17)
    here, there = ops.nearest(x, codebook), ops.nearest(x.cuda(), codebook.cuda())
    assert there[0].is_cuda
    assert torch.equal(here[0], there[0].cpu())
    assert torch.equal(here[1], there[1].cpu())
