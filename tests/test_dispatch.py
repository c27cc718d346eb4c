"""Which backend runs: argument before context before environment; explicit choices raise, automatic ones log."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vqkernels import dispatch, ops, use_backend

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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_tensors_get_the_same_answer() -> None:
    torch.manual_seed(0)
    x, codebook = torch.randn(2, 3, 63, 17), torch.randn(2, 257, 17)
    here, there = ops.nearest(x, codebook), ops.nearest(x.cuda(), codebook.cuda())
    assert there[0].is_cuda
    assert torch.equal(here[0], there[0].cpu())
    assert torch.equal(here[1], there[1].cpu())
