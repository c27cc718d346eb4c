"""Audio codebooks, original and patched: transformers' EnCodec family, Mimi and DAC, and the repositories' classes."""

from __future__ import annotations

import copy
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from pairs import LargestTensor, close, compare, pair, permuted, round_trip, same_buffers, wrong_rows
from restated import Descript, EncodecCodebook, EncodecLevels, MoshiCodebook
from torch import Tensor, nn
from torch.nn import functional

import vqkernels

K, D = 33, 6
FAMILY = {
    "encodec": "EncodecEuclideanCodebook",
    "higgs_audio_v2_tokenizer": "HiggsAudioV2TokenizerEuclideanCodebook",
    "mimi": "MimiEuclideanCodebook",
    "wavtokenizer": "WavTokenizerEuclideanCodebook",
    "xcodec": "XcodecEuclideanCodebook",
}


def transformers_class(model: str, name: str) -> Any:
    if model.startswith("higgs") and "torchaudio" not in sys.modules:
        # Its file imports torchaudio for resampling, which nothing here calls.
        sys.modules["torchaudio"] = ModuleType("torchaudio")
        sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)
        sys.modules["torchaudio"].functional = None
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    return getattr(module, name)


def family(model: str) -> nn.Module:
    module: nn.Module = transformers_class(model, FAMILY[model])(SimpleNamespace(codebook_size=K, codebook_dim=D))
    for name, buffer in module.named_buffers():
        if name in ("embed", "embed_sum"):
            buffer.normal_()
        if name == "cluster_usage":
            buffer.uniform_(0.5, 3)
    return module


@pytest.mark.parametrize("model", FAMILY)
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0)])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_encode_only_codebooks(model: str, order: tuple[int, ...], training: bool) -> None:
    original, patched = pair(family(model).train(training))
    x = permuted(torch.randn(3, 41, D), order)
    codes = original.encode(x)
    assert codes.shape == (3, 41)
    assert torch.equal(codes, patched.encode(x))
    assert torch.equal(codes.flatten(), patched.quantize(x.reshape(-1, D)))
    assert torch.equal(original.decode(codes), patched.decode(codes))
    wrong_rows(codes, patched.encode(x), x, original.embed)
    round_trip(original, patched)


@pytest.mark.parametrize("model", FAMILY)
@pytest.mark.parametrize("kind", ["autocast", "bfloat16"])
def test_encode_only_codebooks_in_bfloat16(model: str, kind: str) -> None:
    module = family(model)
    x = torch.randn(2000, D)
    if kind == "bfloat16":
        module, x = module.bfloat16(), x.bfloat16()
    original, patched = pair(module)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        missed = wrong_rows(original.quantize(x), patched.quantize(x), x, original.embed)
    print(f"{model}, {kind}: the original misses {missed} of {len(x)}")
    if model != "mimi":  # it searches in float32
        assert missed > 0


def test_looking_at_a_lazy_codebook_does_not_freeze_it() -> None:
    fresh = family("mimi")
    vqkernels.patch(fresh)
    state = {k: v.clone() for k, v in family("mimi").state_dict().items()}
    state["embed_sum"].mul_(3)
    fresh.load_state_dict(state)
    close(fresh.embed, state["embed_sum"] / state["cluster_usage"][:, None])
    moshi = MoshiCodebook(D, K)
    vqkernels.patch(moshi)
    assert moshi._embedding is None


def dac_level() -> nn.Module:
    config = SimpleNamespace(hidden_size=11, codebook_dim=D, codebook_size=K)
    return transformers_class("dac", "DacVectorQuantize")(config)


LEVELS = {"transformers DAC": dac_level, "re-stated descript": lambda: Descript(11, K, D)}


@pytest.mark.parametrize("make", LEVELS)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_dac_levels(make: str, training: bool, grad: bool) -> None:
    original, patched = pair(LEVELS[make]().train(training))
    for x in (torch.randn(3, 11, 29), permuted(torch.randn(3, 11, 29), (0, 2, 1))):
        compare(original, patched, lambda m, z: m(z), x, grad)
    latents = torch.randn(2, D, 7)
    (q, indices), (q2, indices2) = original.decode_latents(latents), patched.decode_latents(latents)
    close(q, q2)
    assert torch.equal(indices, indices2)
    round_trip(original, patched)


@pytest.mark.parametrize("make", LEVELS)
def test_dac_levels_in_bfloat16(make: str) -> None:
    original, patched = pair(LEVELS[make]().bfloat16())
    latents = torch.randn(5, D, 400).bfloat16()
    indices, found = original.decode_latents(latents)[1], patched.decode_latents(latents)[1]
    missed = wrong_rows(indices, found, latents.transpose(1, 2), original.codebook.weight, "cosine")
    print(f"{make}, bfloat16: the original misses {missed} of 2000")
    assert missed > 0


def test_offloaded_dac_falls_back_to_the_original() -> None:
    original, patched = pair(dac_level())
    calls: list[str] = []

    class Hook:
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
            calls.append("pre")

        def post_forward(self, module: nn.Module, output: Any) -> None:
            calls.append("post")

    patched.codebook._hf_hook = Hook()
    x = torch.randn(2, 11, 5)
    assert torch.equal(original(x)[3], patched(x)[3])
    assert calls == ["pre", "post"]


def levels(name: str) -> nn.Module:
    options: dict[str, Any] = {"dim": D, "codebook_size": K, "decay": 0.9}
    return {
        "plain": lambda: EncodecLevels(3, threshold_ema_dead_code=0, **options),
        "expiry": lambda: EncodecLevels(3, threshold_ema_dead_code=2, **options),
        "k-means": lambda: EncodecLevels(2, kmeans_init=True, kmeans_iters=4, **options),
        "k-means, few rows": lambda: EncodecLevels(1, kmeans_init=True, kmeans_iters=2, **options),
    }[name]()


@pytest.mark.parametrize("name", ["plain", "expiry", "k-means", "k-means, few rows"])
def test_encodec_training_equals_original(name: str) -> None:
    original, patched = pair(levels(name).train())
    for step in range(5):
        x = torch.randn(1, D, 20) if "few" in name else torch.randn(4, D, 51)
        for module in (original, patched):
            torch.manual_seed(step)
            module.result = compare_one(module, x)
        for a, b in zip(original.result, patched.result, strict=True):
            close(a, b) if a.is_floating_point() else torch.testing.assert_close(a, b, rtol=0, atol=0)
    same_buffers(original, patched)
    round_trip(original, patched)
    original.eval(), patched.eval()
    compare(original, patched, lambda m, z: m(z), torch.randn(2, D, 9), False)


def compare_one(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    quantized, indices, losses = module(x)
    (quantized.square().sum() + losses.sum()).backward()
    return [quantized, losses, x.grad, indices]


def test_encodec_keeps_ranks_in_step_as_its_library_does(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    library = ModuleType("encodec.quantization.core_vq")
    library.distrib = SimpleNamespace(broadcast_tensors=lambda buffers: sent.append(len(list(buffers))))
    monkeypatch.setitem(sys.modules, library.__name__, library)
    _, patched = pair(EncodecCodebook(D, K, kmeans_init=True).train())
    patched(torch.randn(90, D))
    assert sent == [4]
    assert bool(patched.inited)


def test_encodec_codebook_holds_no_matrix_of_rows_by_codes() -> None:
    _, patched = pair(EncodecCodebook(4, 512, kmeans_init=True, kmeans_iters=2).train())
    with LargestTensor() as watch:
        patched(torch.randn(3000, 4))
    assert watch.largest == 3000 * 4


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_moshi_codebook_equals_original(training: bool) -> None:
    original, patched = pair(MoshiCodebook(D, K).train(training))
    for _ in range(5):
        x = permuted(torch.randn(3, 17, D), (0, 2, 1))
        for a, b in zip(original(x)[:2], patched(x)[:2], strict=True):
            assert torch.equal(a, b)
        assert torch.equal(original.encode(x), patched.encode(x))
    same_buffers(original, patched)
    round_trip(original, patched)


@pytest.mark.parametrize("start", ["zeros", "repeated rows"])
@pytest.mark.parametrize(("codes", "dim", "rows"), [(33, 6, 21), (300, 64, 47)])
def test_of_equal_codes_the_lowest_index_is_named(start: str, codes: int, dim: int, rows: int) -> None:
    """Levels before their k-means start, or started from fewer rows than codes; cdist may round equal codes apart."""
    module = MoshiCodebook(dim, codes)
    x = torch.randn(rows, dim)
    module.embedding_sum.copy_(x[torch.randint(0, rows, (codes,))] if start != "zeros" else torch.zeros(codes, dim))
    original, patched = pair(module)
    theirs, ours = original._quantize(x), patched._quantize(x)
    same = (module.embedding[ours][:, None] == module.embedding).all(-1)
    assert torch.equal(ours, same.int().argmax(1))
    # The same values, whichever of them the original names.
    close(module.embedding[theirs], module.embedding[ours])


def test_a_level_that_waits_for_its_start_is_searched_exactly() -> None:
    """Moshi: zeros, and one code that moved by what little the level was given. Its cdist cannot tell them apart."""
    module = MoshiCodebook(D, K).train()
    module.embedding_sum.zero_()[0] = 1e-8
    original, patched = pair(module)
    x = torch.randn(200, D)
    assert wrong_rows(original._quantize(x), patched._quantize(x), x, module.embedding) > 50
    assert set(patched._quantize(x).unique().tolist()) == {0, 1}


def test_two_repositories_one_file_name() -> None:
    """EnCodec's and Moshi's codebooks share the name and the file name; attributes tell them apart."""
    model = nn.ModuleList([EncodecCodebook(D, K), MoshiCodebook(D, K)])
    report = vqkernels.patch(model, strict=True)
    assert [r.adapter for r in report.replaced] == ["EuclideanCodebook", "MoshiCodebook"]
    vqkernels.unpatch(model)
    assert [type(m) for m in model] == [EncodecCodebook, MoshiCodebook]


def test_a_copy_with_other_parameters_is_left_alone() -> None:
    class EuclideanCodebook(EncodecCodebook):
        def quantize(self, x: Tensor, temperature: float = 1.0) -> Tensor:
            return super().quantize(x * temperature)

    module = copy.deepcopy(EuclideanCodebook(D, K))
    report = vqkernels.patch(module)
    assert not report.replaced
    assert "quantize()" in report.skipped[0].reason


def test_zero_rows_and_zero_codes_have_defined_answers() -> None:
    _, patched = pair(dac_level())
    patched.codebook.weight.data[3] = 0
    latents = torch.zeros(1, D, 2)
    latents[0, :, 1] = patched.codebook.weight.data[5]
    assert patched.decode_latents(latents)[1].tolist() == [[0, 5]]
    assert functional.normalize(latents, dim=1)[0, :, 0].eq(0).all()


def test_gumbel_quantizers_of_speech_models_are_left_alone_with_the_reason() -> None:
    make = transformers_class("wavlm", "WavLMGumbelVectorQuantizer")
    sizes = {"num_codevector_groups": 2, "num_codevectors_per_group": 5, "codevector_dim": 6, "conv_dim": [4]}
    report = vqkernels.patch(make(SimpleNamespace(**sizes)), strict=True)
    assert not report.replaced
    assert "softmax" in report.skipped[0].reason
