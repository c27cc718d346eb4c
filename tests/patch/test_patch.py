"""The core of ``patch`` on toy classes: who is replaced, who is not and why, and that nothing else notices."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from toys import Codebook, CodebookAdapter, Model, ToyAdapter, ToyQuantizer

import vqkernels
from vqkernels.recognisers import Adapter

ADAPTERS = [ToyAdapter]


def patched(model: nn.Module, **options: Any) -> vqkernels.PatchReport:
    return vqkernels.patch(model, adapters=ADAPTERS, **options)


def test_a_shared_module_is_replaced_once_and_its_part_with_it() -> None:
    model = Model()
    before, parameters = model.state_dict(), list(model.parameters())
    quantizer, x = model.quantizer, torch.randn(11, 3)
    expected = model(x)
    report = patched(model)
    assert [r.path for r in report.replaced] == ["quantizer", "sharing"]
    assert [(r.cls.rpartition(".")[2], r.adapter) for r in report.replaced] == [("ToyQuantizer", "ToyAdapter")] * 2
    assert report.skipped == ()
    assert model.quantizer is quantizer is model.again
    assert isinstance(quantizer, ToyQuantizer)
    assert isinstance(quantizer, ToyAdapter)
    assert isinstance(quantizer.codebook, CodebookAdapter)
    assert isinstance(quantizer.codebook, Codebook)
    assert type(quantizer).__name__ == "ToyQuantizer"
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(before) == list(model.state_dict())
    assert torch.equal(model(x), expected)


def test_unpatch_restores_the_classes() -> None:
    model = Model()
    patched(model)
    assert vqkernels.unpatch(model) == ["quantizer", "sharing"]
    assert [type(m) for m in (model.quantizer, model.sharing, model.quantizer.codebook)] == [
        ToyQuantizer,
        ToyQuantizer,
        Codebook,
    ]
    assert vqkernels.unpatch(model) == []


def test_the_model_itself_may_be_the_quantizer() -> None:
    vq = ToyQuantizer()
    assert [r.path for r in patched(vq).replaced] == [""]
    assert vqkernels.unpatch(vq) == [""]


def test_a_patched_model_is_reported_and_left_alone() -> None:
    model = Model()
    patched(model)
    cls = type(model.quantizer)
    report = patched(model, strict=True)
    assert [(s.path, s.reason) for s in report.skipped] == [
        ("quantizer", "already patched"),
        ("sharing", "already patched"),
    ]
    assert type(model.quantizer) is cls


def test_a_model_without_quantizer_says_so() -> None:
    report = vqkernels.patch(nn.Linear(2, 2), strict=True)
    assert str(report) == "vqkernels.patch: 0 replaced, 0 skipped; no quantizer found"


class Overrides(ToyQuantizer):
    def search(self, x: Any) -> Any:
        return super().search(x)


class Harmless(ToyQuantizer):
    def extra_repr(self) -> str:
        return "harmless"


def test_a_subclass_is_replaced_unless_it_overrides_what_the_adapter_relies_on() -> None:
    model = nn.ModuleList([Overrides(), Harmless()])
    report = patched(model)
    assert [r.path for r in report.replaced] == ["1"]
    assert isinstance(model[1], Harmless)
    assert [(s.path, s.reason) for s in report.skipped] == [("0", "Overrides replaces search() of ToyQuantizer")]
    assert type(model[0]) is Overrides


@pytest.mark.parametrize("place", ["module", "part"])
def test_a_method_replaced_on_the_instance_is_respected(place: str) -> None:
    vq = ToyQuantizer()
    target = vq if place == "module" else vq.codebook
    target.forward = lambda x: x  # type: ignore[method-assign, assignment]
    (skipped,) = patched(vq).skipped
    expected = "forward() was replaced on this instance"
    assert skipped.reason == (expected if place == "module" else f"codebook: {expected}")


def test_a_part_shared_with_a_skipped_module_keeps_both_as_they_are() -> None:
    model = nn.ModuleList([ToyQuantizer()])
    model.append(Overrides(model[0].codebook))  # type: ignore[arg-type]
    report = patched(model)
    assert report.replaced == ()
    assert {s.path: s.reason for s in report.skipped} == {
        "0": "shares a part with a module that is skipped",
        "1": "Overrides replaces search() of ToyQuantizer",
    }
    assert type(model[0]) is ToyQuantizer


def test_another_version_is_left_alone() -> None:
    class Newer(ToyAdapter):
        signatures: ClassVar = {"forward": ("x", "scale", "seed")}

    (skipped,) = vqkernels.patch(ToyQuantizer(), adapters=[Newer]).skipped
    assert skipped.reason == "ToyQuantizer.forward takes (x, scale); expected (x, scale, seed): another version?"


def test_strict_raises_before_anything_changes() -> None:
    model = nn.ModuleList([ToyQuantizer(), Overrides()])
    with pytest.raises(ValueError, match=r"nothing was changed.*\n.*\n.*\n1 .*Overrides replaces search"):
        patched(model, strict=True)
    assert type(model[0]) is ToyQuantizer


class MyVectorQuantizer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.codebook = Codebook()


def test_what_looks_like_a_quantizer_is_listed_once_and_strict_minds() -> None:
    model = nn.ModuleDict({"vq": MyVectorQuantizer(), "toy": ToyQuantizer()})
    report = patched(model)
    assert [(s.path, s.reason) for s in report.skipped] == [("vq", "no recogniser for this class")]
    with pytest.raises(ValueError, match="MyVectorQuantizer"):
        patched(model, strict=True)


def test_this_package_is_not_reported_as_unknown() -> None:
    assert vqkernels.patch(vqkernels.VectorQuantizer(4, 2)).skipped == ()


@pytest.mark.parametrize("how", ["wrapped", "in place", "around"])
def test_a_compiled_model_is_refused_untouched(how: str) -> None:
    model: Any = Model()
    if how == "wrapped":
        model = torch.compile(model)
    elif how == "in place":
        model.quantizer.compile()
    else:
        model = nn.ModuleList([nn.Linear(1, 1), torch.compile(model)])
    with pytest.raises(ValueError, match="Patch first, then compile"):
        patched(model)
    assert not any(isinstance(m, Adapter) for m in model.modules())


def test_a_compiled_neighbour_does_not_matter() -> None:
    model = Model()
    model.encoder.compile()
    assert len(patched(model).replaced) == 2


def test_an_assignment_that_fails_half_way_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stubborn(ToyQuantizer):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "__class__":
                raise TypeError("no")
            super().__setattr__(name, value)

    model = nn.ModuleList([ToyQuantizer(), Stubborn()])
    with pytest.raises(TypeError, match="no"):
        patched(model)
    assert [type(m) for m in model] == [ToyQuantizer, Stubborn]


def test_fixes_are_chosen_by_name() -> None:
    vq, x = ToyQuantizer(), torch.randn(5, 3)
    patched(vq, fix="scale")
    assert torch.equal(vq(x, 2.0)[0], vq.codebook.embed[vq(x)[1]])  # type: ignore[index]
    with pytest.raises(ValueError, match=r"fix is 'scael'; expected 'all' or any of .*'scale'"):
        patched(vq, fix=["scael"])


def test_arguments_are_checked() -> None:
    for function in (vqkernels.patch, vqkernels.unpatch):
        with pytest.raises(TypeError, match=r"model is a int; expected a torch.nn.Module"):
            function(3)  # type: ignore[operator]


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_patched_too(copier: str) -> None:
    model, x = Model(), torch.randn(9, 3)
    patched(model, fix="scale")
    if copier == "deepcopy":
        twin = copy.deepcopy(model)
    elif copier == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert type(twin.quantizer) is type(model.quantizer)
    assert twin.again is twin.quantizer
    assert torch.equal(twin(x), model(x))
    assert vqkernels.unpatch(twin) == ["quantizer", "sharing"]
    assert isinstance(model.quantizer, Adapter)


def test_hooks_still_fire() -> None:
    vq, seen = ToyQuantizer(), []
    vq.register_forward_hook(lambda *args: seen.append(1))
    patched(vq)
    vq(torch.randn(2, 3))
    assert seen == [1]


def test_the_report_is_a_table() -> None:
    model = nn.ModuleDict({"a": ToyQuantizer(), "b": Overrides()})
    lines = str(patched(model)).splitlines()
    assert lines[0] == "vqkernels.patch: 1 replaced, 1 skipped"
    assert [line.split()[0] for line in lines[1:]] == ["module", "a", "b"]
    assert lines[3].endswith("skipped     Overrides replaces search() of ToyQuantizer")
