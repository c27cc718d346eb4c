"""Codebooks between layouts: every pair both ways, bit for bit, against hand-written keys and real modules."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import vqkernels
from vqkernels.convert import LAYOUTS, convert, convert_file, find_codebooks

K, D = 13, 5
CODES, SIZE = torch.randn(K, D), torch.rand(K) * 9
SIZE[3] = 0
# Layouts that hold moving averages beside the codes, and not sums over usage instead of them.
STATISTICS = {"vqkernels-ema", "vector-quantize-pytorch", "encodec", "encodec-transformers", "rosinality"}


def start(prefix: str = "") -> dict[str, Tensor]:
    """An EMA codebook whose averages, smoothed, do not divide out to the codes exactly."""
    return {
        f"{prefix}_codebook.inited": torch.ones(1),
        f"{prefix}_codebook.cluster_size": SIZE.clone(),
        f"{prefix}_codebook.embed": CODES.clone(),
        f"{prefix}_codebook.embed_avg": CODES * SIZE[:, None] * 1.0001,
    }


def codes_in(state: dict[str, Tensor], prefix: str = "") -> Tensor:
    """The codes, read through the layout that shows them plainly."""
    return convert(state, "taming", prefix=prefix)[f"{prefix}embedding.weight"]


@pytest.mark.parametrize(("first", "second"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_codes_survive_every_pair_of_layouts(first: str, second: str) -> None:
    one = convert(start(), first)
    two = convert(one, second)
    back = convert(two, first)
    for state in (one, two, back):
        assert torch.equal(codes_in(state), CODES)
        assert find_codebooks(state) == [""]
        assert all(tensor.is_contiguous() for tensor in state.values())
    assert {k: (v.shape, v.dtype) for k, v in back.items()} == {k: (v.shape, v.dtype) for k, v in one.items()}
    if first in STATISTICS and second in STATISTICS:
        assert all(torch.equal(back[k], v) for k, v in one.items())
    # A second trip changes nothing any more, sums over usage included.
    again = convert(convert(back, second), first)
    assert all(torch.equal(again[k], v) for k, v in back.items())


def test_keys_and_shapes_of_each_layout() -> None:
    shapes = {name: {k: tuple(v.shape) for k, v in convert(start(), name).items()} for name in LAYOUTS}
    assert shapes["taming"] == {"embedding.weight": (K, D)}
    assert shapes["dac"] == {"codebook.weight": (K, D)}
    assert shapes["rosinality"] == {"embed": (D, K), "cluster_size": (K,), "embed_avg": (D, K)}
    assert shapes["sonnet"] == {"embeddings": (D, K)}
    assert shapes["moshi"] == {
        "_codebook._initialized": (1,),
        "_codebook.cluster_usage": (K,),
        "_codebook.embedding_sum": (K, D),
    }


def real_modules() -> dict[str, Any]:
    lucidrains = pytest.importorskip("vector_quantize_pytorch")
    transformers = pytest.importorskip("transformers")
    encodec = pytest.importorskip("transformers.models.encodec.modeling_encodec")
    mimi = pytest.importorskip("transformers.models.mimi.modeling_mimi")
    dac = pytest.importorskip("transformers.models.dac.modeling_dac")
    vae = pytest.importorskip("diffusers.models.autoencoders.vae")
    assert transformers
    sizes = SimpleNamespace(codebook_size=K, codebook_dim=D, hidden_size=D)
    return {
        "vqkernels": vqkernels.VectorQuantizer(K, D),
        "vqkernels-ema": vqkernels.VectorQuantizer(K, D, decay=0.9),
        "vector-quantize-pytorch": lucidrains.VectorQuantize(dim=D, codebook_size=K),
        "encodec-transformers": encodec.EncodecVectorQuantization(sizes),
        "mimi-transformers": mimi.MimiVectorQuantization(sizes),
        "dac": dac.DacVectorQuantize(sizes),
        "taming": vae.VectorQuantizer(K, D, 0.25),
    }


def test_real_modules_load_what_was_converted_and_find_the_same_codes() -> None:
    x = torch.randn(100, D)
    expected, _ = vqkernels.nearest(x, CODES)
    for layout, module in real_modules().items():
        kept = {k: v for k, v in module.state_dict().items() if "proj" in k}
        module.load_state_dict({**convert(start(), layout), **kept}, strict=True)
        assert torch.equal(codes_in({k: v for k, v in module.state_dict().items() if "proj" not in k}), CODES)
        module.eval()
        if layout == "vector-quantize-pytorch":
            found = module(x)[1]
        elif layout.endswith("-transformers"):
            found = module.codebook.quantize(x)
        elif layout == "taming":
            found = module(x[:, :, None, None])[2][2]
        elif layout == "dac":
            continue  # it searches by angle
        else:
            found = module(x).indices
        assert torch.equal(found, expected), layout


def test_other_entries_of_a_model_stay_and_prefixes_are_renamed() -> None:
    model = {"encoder.weight": torch.ones(2), **start("quantizer.vq.layers.0."), **start("quantizer.vq.layers.1.")}
    out = convert(model, "encodec-transformers", rename=lambda p: p.replace(".vq.", "."))
    assert out["encoder.weight"] is model["encoder.weight"]
    assert sorted(k for k in out if k.endswith("embed")) == [
        "quantizer.layers.0.codebook.embed",
        "quantizer.layers.1.codebook.embed",
    ]
    assert len(out) == 9
    only = convert(model, "taming", prefix="quantizer.vq.layers.1.")
    assert find_codebooks(only) == ["quantizer.vq.layers.0.", "quantizer.vq.layers.1."]
    assert "quantizer.vq.layers.0._codebook.embed" in only


def test_heads_stay_where_there_is_room_for_them() -> None:
    heads = torch.randn(2, K, D)
    state = {
        "_codebook.initted": torch.tensor(False),
        "_codebook.cluster_size": torch.ones(2, K),
        "_codebook.embed_avg": heads.clone(),
        "_codebook.embed": heads,
    }
    ours = convert(state, "vqkernels-ema")
    assert torch.equal(ours["codebook"], heads)
    assert not ours["initialized"]
    back = convert(ours, "vector-quantize-pytorch")
    assert all(torch.equal(back[k], v) for k, v in state.items())
    with pytest.raises(ValueError, match=r"2 heads; layout 'taming'"):
        convert(state, "taming")


def test_normalised_codes_are_unit_vectors() -> None:
    out = convert(start(), "vqkernels-ema", normalize=True)
    torch.testing.assert_close(out["codebook"].norm(dim=-1), torch.ones(K))
    torch.testing.assert_close(out["embed_avg"], out["codebook"] * SIZE[:, None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_of_other_dtypes_survive(layout: str, dtype: torch.dtype) -> None:
    codes = torch.randn(K, D).to(dtype)
    out = codes_in(convert({"embedding.weight": codes}, layout))
    assert out.dtype == dtype
    assert torch.equal(out, codes)


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="to is 'vqgan'; expected one of 'vqkernels'"):
        convert(start(), "vqgan")
    with pytest.raises(ValueError, match="no codebook; expected a key"):
        convert({"encoder.weight": CODES}, "taming")
    with pytest.raises(ValueError, match=r"below prefix 'quantizer\.'"):
        convert(start(), "taming", prefix="quantizer.")
    with pytest.raises(ValueError, match="would be written over"):
        convert({**start("a."), **start("b.")}, "taming", rename=lambda _: "c.")
    with pytest.raises(ValueError, match=r"has shape \(5,\)"):
        convert({"embedding.weight": torch.ones(5)}, "dac")


@pytest.mark.parametrize(
    ("dtype", "size", "code"), [(torch.float16, 0.07, 1e-4), (torch.float32, 4.0, 3e38), (torch.float32, 0.0, 1e-40)]
)
@pytest.mark.parametrize("layout", ["moshi", "mimi-transformers"])
def test_codes_survive_sums_that_leave_the_range(layout: str, dtype: torch.dtype, size: float, code: float) -> None:
    codes = torch.tensor([[code, 0.3], [1.0, 2.0]]).to(dtype)
    state = {"codebook": codes, "cluster_size": torch.full((2,), size), "embed_avg": torch.ones(2, 2)}
    assert torch.equal(codes_in(convert(state, layout)), codes)


def test_prefixes_can_change_places_and_count_once() -> None:
    state = {"a.embedding.weight": CODES, "b.embedding.weight": CODES + 1}
    swapped = convert(state, "taming", rename={"a.": "b.", "b.": "a."}.__getitem__)
    assert swapped.keys() == state.keys()
    assert torch.equal(swapped["a.embedding.weight"], CODES + 1)
    assert convert(state, "dac", prefix=["a.", "a."]).keys() == {"a.codebook.weight", "b.embedding.weight"}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"q.codebook.embed_sum": CODES}, r"'q\.codebook\.cluster_usage' is missing"),
        ({"q.codebook.embed_sum": CODES, "q.codebook.cluster_usage": torch.ones(K + 1)}, "do not fit"),
        ({"q.embeddings": torch.ones(3)}, r"has shape \(3,\)"),
        ({"q.embed": torch.ones(())}, "do not fit"),
        ({**start("q."), "q._codebook.embed_avg": torch.ones(K, D + 1)}, r"embed_avg .* has shape \(13, 6\)"),
        ({**start("q."), "q._codebook.cluster_size": torch.ones(K + 1)}, r"cluster_size .* expected \(13,\)"),
        ({**start("q."), "q._codebook.inited": torch.ones(0)}, "initialized .* expected one value"),
        ({"q.codebook": CODES, "q.initialized": torch.ones(2)}, "initialized .* expected one value"),
    ],
)
def test_parts_that_are_missing_or_do_not_fit_are_named(state: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(state, "encodec")


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_a_damaged_file_is_named(ending: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    whole, cut = tmp_path / f"whole{ending}", tmp_path / f"cut{ending}"
    torch.save(start(), tmp_path / "in.pt")
    convert_file(tmp_path / "in.pt", whole, "taming")
    data = whole.read_bytes()
    for size in (0, 9, len(data) // 2, len(data) - 1):
        cut.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"cut\..* cannot be read"):
            convert_file(cut, tmp_path / "out.pt", "dac")
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_files_are_written_whole_or_not_at_all(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"state_dict": {**start("q."), "w": torch.ones(2)}}, tmp_path / "in.ckpt")
    target = tmp_path / f"out{ending}"
    convert_file(tmp_path / "in.ckpt", target, "vector-quantize-pytorch")
    convert_file(target, target, "taming")
    convert_file(target, tmp_path / "last.pt", "dac")
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert sorted(last) == ["q.codebook.weight", "w"]
    assert torch.equal(last["q.codebook.weight"], CODES)
    before = target.read_bytes()

    def broken(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        convert_file(tmp_path / "in.ckpt", target, "vqkernels")
    assert target.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["in.ckpt", target.name, "last.pt"])
    with pytest.raises(ValueError, match=r"ending of destination is '\.npz'"):
        convert_file(target, tmp_path / "out.npz", "dac")


def test_shared_tensors_are_written_as_safetensors(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    shared = torch.randn(K, D)
    torch.save({"a.embedding.weight": shared, "b.embedding.weight": shared}, tmp_path / "in.pt")
    convert_file(tmp_path / "in.pt", tmp_path / "out.safetensors", "dac")
    convert_file(tmp_path / "out.safetensors", tmp_path / "out.pt", "taming")
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True)["b.embedding.weight"], shared)
