"""What every class that ``patch`` knows must pass, original against patched: a test per promise, a case per class."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pairs import compare, pair, permuted, round_trip, run, same_buffers, tensors
from table import ROWS, Row, _call, batch, build, group_for, shrink
from torch import Tensor, nn

import vqkernels
from vqkernels import ops, recognisers
from vqkernels.recognisers import Adapter
from vqkernels.testing import oracle_nearest


@pytest.fixture(params=ROWS)
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    with group_for(request.param):
        yield str(request.param)


def seeded(row: Row) -> Any:
    """The call of a row, whose random draws are the same every time."""

    def call(module: nn.Module, x: Tensor) -> Any:
        torch.manual_seed(7)
        return row.call(module, x)

    return call


class Searches:
    """All searches of the ops while it is on: rows (N, D), codes, indices, metric."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[Tensor, Tensor, Tensor, str]] = []
        original = ops.nearest

        def recording(x: Tensor, codebook: Tensor, metric: str, *options: Any) -> Any:
            indices, score = original(x, codebook, metric, *options)
            for head in range(x.shape[0]):
                self.seen.append((x[head].flatten(0, 1), codebook[head].clone(), indices[head].flatten(), metric))
            return indices, score

        def through_levels(x: Tensor, codebooks: list[Tensor], *options: Any) -> Any:
            found = search(x, codebooks, *options)
            for codes, indices in zip(codebooks, found[0], strict=True):
                self.seen.append((x[0].flatten(0, 1), codes[0].clone(), indices[0].flatten(), "l2"))
                x = x - codes[0][indices[0]]
            return found

        search = ops.residual_nearest
        monkeypatch.setattr(ops, "nearest", recording)
        monkeypatch.setattr(ops, "residual_nearest", through_levels)

    def assert_exact(self) -> None:
        """They happened, and every index is that of the float64 oracle."""
        assert self.seen, "no search went through this package"
        for rows, codes, indices, metric in self.seen:
            assert torch.equal(indices, oracle_nearest(rows, codes, metric)[0])


def test_every_adapter_and_every_target_has_a_row() -> None:
    adapters: set[type[Adapter]] = set()
    classes: set[str] = set()
    for name in ROWS:
        module = build(name)
        classes |= {recognisers._adapter.class_path(type(m)) for m in module.modules()}
        vqkernels.patch(module, strict=True)
        for part in module.modules():
            if isinstance(part, Adapter):
                adapters.add(type(part)._vqkernels_key[0])
    known = {a for adapter in recognisers.adapters() for a in (adapter, *adapter.parts.values())}
    assert known == adapters
    exact = {t for adapter in known for t in adapter.targets if not t.startswith("*.")}
    assert exact <= classes
    assert {row.family for row in ROWS.values()} == set(recognisers.FAMILIES)
    assert [row.family for row in ROWS.values() if row.speaks] == list(recognisers.FAMILIES)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_results_losses_and_gradients(name: str, training: bool) -> None:
    x = batch(name)
    for values in (x, permuted(x, range(x.dim() - 1, -1, -1)), permuted(x, [0, *range(2, x.dim()), 1])):
        for grad in (False, True):
            original, patched = pair(build(name).train(training))
            compare(original, patched, seeded(ROWS[name]), values, grad)
            same_buffers(original, patched)


def test_parameters_and_buffers_after_five_steps(name: str) -> None:
    original, patched = pair(build(name).train())
    trained = [p for p in original.parameters() if p.requires_grad]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) if trained else None for m in (original, patched)]
    before = {k: v.clone() for k, v in original.state_dict().items()}
    for step in range(5):
        compare(original, patched, seeded(ROWS[name]), batch(name, step), True)
        for optimizer in optimizers:
            if optimizer is not None:
                optimizer.step()
    same_buffers(original, patched)
    moved = any(not torch.equal(v, before[k]) for k, v in original.state_dict().items())
    assert moved == ROWS[name].trains
    round_trip(original, patched)
    with torch.no_grad():
        compare(original.eval(), patched.eval(), seeded(ROWS[name]), batch(name, 9), False)


@pytest.mark.parametrize("kind", ["float32", "autocast"])
def test_indices_are_exact_where_the_original_errs(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = build(name).eval()
    shrink(module)
    original, patched = pair(module)
    x = 8 * torch.cat([batch(name, seed) for seed in range(4)])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        expected = seeded(ROWS[name])(original, x)
        searches = Searches(monkeypatch)
        out = seeded(ROWS[name])(patched, x)
    searches.assert_exact()
    integers = [[t for t in tensors(result) if not t.is_floating_point()] for result in (expected, out)]
    wrong = sum(int((a != b).sum()) for a, b in zip(*integers, strict=True))
    print(
        f"{name}, {kind}: {wrong} of {sum(t.numel() for t in integers[0])} indices of the original are not the nearest"
    )


def test_bf16_autocast_is_no_worse_than_the_original(name: str) -> None:
    row = ROWS[name]
    module = build(name).eval()
    reference = copy.deepcopy(module).double() if row.wide else copy.deepcopy(module)
    x = torch.cat([batch(name, seed) for seed in range(12)])  # one index more or less is no difference then
    exact, exact_grads = run(reference, seeded(row), x.double() if row.wide else x, True)
    original, patched = pair(module)
    found = []
    with torch.autocast("cpu", torch.bfloat16):
        for m in (original, patched):
            out, grads = run(m, seeded(row), x, True)
            found.append([*tensors(out), *(g for g in grads[:1] if g is not None)])
    exact_values = [*tensors(exact), *(g for g in exact_grads[:1] if g is not None)]
    for want, theirs, ours in zip(exact_values, *found, strict=True):
        assert (theirs.shape, theirs.dtype) == (ours.shape, ours.dtype)
        if want.numel():
            errors = [float((t.detach().double() - want.detach().double()).abs().mean()) for t in (theirs, ours)]
            assert errors[1] <= 1.05 * errors[0] + 1e-6 * float(want.detach().double().abs().mean()), errors


def test_another_number_of_channels_is_an_error_and_changes_nothing(name: str) -> None:
    row = ROWS[name]
    _, patched = pair(build(name).train())
    before = {k: v.clone() for k, v in patched.state_dict().items()}
    size = row.shape[row.channels]
    for channels in (size + 1, size - 1, 2 * size):
        shape = tuple(channels if i == row.channels else n for i, n in enumerate(row.shape))
        with pytest.raises((ValueError, RuntimeError, IndexError, AssertionError)):
            row.call(patched, torch.randn(shape))
    assert all(torch.equal(v, before[k]) for k, v in patched.state_dict().items())


@pytest.mark.usefixtures("repositories")
def test_copies_and_pickles_are_patched(name: str) -> None:
    _, patched = pair(build(name).eval())
    expected = tensors(seeded(ROWS[name])(patched, batch(name)))
    copies = [copy.deepcopy(patched)]
    if "descript" not in name:  # torch does not pickle parametrized modules, patched or not
        copies.append(pickle.loads(pickle.dumps(patched)))
    for other in copies:
        assert type(other) is type(patched)
        assert [type(m) for m in other.modules()] == [type(m) for m in patched.modules()]
        for a, b in zip(expected, tensors(seeded(ROWS[name])(other, batch(name))), strict=True):
            assert torch.equal(a, b)


def _quantizer(module: nn.Module) -> tuple[nn.Module, type[Adapter]]:
    """The first module that would be replaced, and its adapter."""
    twin = copy.deepcopy(module)
    vqkernels.patch(twin, strict=True)
    path = next(p for p, m in twin.named_modules() if isinstance(m, Adapter))
    return module.get_submodule(path), type(twin.get_submodule(path))._vqkernels_key[0]


def test_a_subclass_that_replaces_a_method_keeps_its_code(name: str) -> None:
    module = build(name)
    quantizer, adapter = _quantizer(module)
    original = type(quantizer)
    method = adapter.overrides[0]
    quantizer.__class__ = type("HalfKnown", (original,), {method: getattr(original, method)})
    classes = [type(m) for m in module.modules()]
    with pytest.raises(ValueError, match=rf"HalfKnown replaces {method}\(\)"):
        vqkernels.patch(module, strict=True)
    assert [type(m) for m in module.modules()] == classes
    report = vqkernels.patch(module)
    assert any(f"replaces {method}()" in s.reason for s in report.skipped)
    assert type(quantizer).__name__ == "HalfKnown"
    assert not isinstance(quantizer, Adapter)


def test_a_patched_module_is_reported_and_left_alone(name: str) -> None:
    _, patched = pair(build(name))
    classes = [type(m) for m in patched.modules()]
    report = vqkernels.patch(patched, strict=True)
    assert not report.replaced
    assert {s.reason for s in report.skipped} == {"already patched"}
    assert [type(m) for m in patched.modules()] == classes


def test_a_compiled_module_is_refused_untouched(name: str) -> None:
    module = build(name)
    classes = [type(m) for m in module.modules()]
    with pytest.raises(ValueError, match="Patch first, then compile"):
        vqkernels.patch(torch.compile(nn.Sequential(module)))
    assert [type(m) for m in module.modules()] == classes


def test_unpatched_is_the_original_again(name: str) -> None:
    original, patched = pair(build(name))
    assert vqkernels.unpatch(patched)
    assert [type(m) for m in patched.modules()] == [type(m) for m in original.modules()]
    results = [tensors(seeded(ROWS[name])(m, batch(name))) for m in (original, patched)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_patching_in_the_middle_of_training(name: str) -> None:
    """The optimizer that holds the parameters, its state and the hooks go on working."""
    original, twin = build(name).train(), build(name).train()
    calls: list[str] = []
    twin.register_forward_hook(lambda *_: calls.append("hook"))
    trained = any(p.requires_grad for p in original.parameters())
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) if trained else None for m in (original, twin)]
    for step in range(4):
        if step == 2:
            assert vqkernels.patch(twin, strict=True).replaced
        compare(original, twin, seeded(ROWS[name]), batch(name, step), True)
        for optimizer in optimizers:
            if optimizer is not None:
                optimizer.step()
    # Adam divides by the gradient's size: where that is rounding, so is the step.
    same_buffers(original, twin, least=0.1)
    assert len(calls) == (4 if ROWS[name].call is _call else 0)


def test_a_patched_module_moves_to_float64(name: str) -> None:
    row = ROWS[name]
    if not row.wide:
        pytest.skip("the original computes in float32")
    original, patched = pair(build(name).eval())
    compare(original.double(), patched.double(), seeded(row), batch(name).double(), True)
