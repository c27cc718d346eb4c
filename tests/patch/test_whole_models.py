"""Whole models of transformers and diffusers: codes, decoding, training, half precision, compilation, bookkeeping."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from pairs import close, pair, permuted, round_trip, run, same_buffers, tensors, wrong_rows
from torch import Tensor, nn
from torch.nn import functional
from whole_models import AUDIO, IMAGES, make

import vqkernels

LEVELS = {"EnCodec": 4, "Mimi": 5, "DAC": 4, "Chameleon": 1, "Janus": 1, "Emu3": 1, "diffusers VQModel": 1}
# Residual quantizers that search their levels in one op.
AROUND_LEVELS = {"EnCodec": 1, "Mimi": 2}


def encode(model: nn.Module, x: Tensor) -> Tensor:
    """The codes of an input."""
    m: Any = model
    kind = type(model).__name__
    if kind == "EncodecModel":
        return m.encode(x, bandwidth=7.2).audio_codes
    if kind in ("MimiModel", "DacModel"):
        return m.encode(x).audio_codes
    if kind == "VQModel":
        return m.quantize(m.encode(x).latents)[2][2].view(len(x), -1)
    if kind == "Emu3VQVAE":
        return torch.stack(m.encode(x, torch.tensor([x.shape[2:]] * len(x))).image_tokens)
    return m.encode(x).image_tokens.view(len(x), -1)


def decode(model: nn.Module, codes: Tensor) -> Tensor | None:
    """What the model makes of codes; None for Chameleon, whose model has no decoder."""
    m: Any = model
    kind = type(model).__name__
    if kind == "EncodecModel":
        return m.decode(codes, [None]).audio_values
    if kind == "MimiModel":
        return m.decode(codes).audio_values
    if kind == "DacModel":
        return m.decode(audio_codes=codes).audio_values
    if kind == "VQModel":
        z = m.quantize.get_codebook_entry(codes.reshape(-1), (len(codes), 8, 8, 4))
        return m.decode(z, force_not_quantize=True).sample
    return None if kind == "ChameleonVQVAE" else m.decode(codes)


def adapters_in(model: nn.Module) -> int:
    return sum(isinstance(m, vqkernels.recognisers.Adapter) for m in model.modules())


@pytest.fixture(params=[*AUDIO, *IMAGES])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_codes_and_decoding_equal_the_original(name: str) -> None:
    model, x = make(name)
    original, patched = pair(model)
    assert adapters_in(patched) == LEVELS[name] + AROUND_LEVELS.get(name, 0)
    with torch.no_grad():
        for values in (x, permuted(x, range(x.dim() - 1, -1, -1))):
            codes = encode(original, values)
            assert torch.equal(codes, encode(patched, values))
            assert len(codes.unique()) > 5, "a test that finds one code finds nothing"
        reconstruction = decode(original, codes)
        if reconstruction is not None:
            close(reconstruction, decode(patched, codes))
    round_trip(original, patched)
    vqkernels.unpatch(patched)
    assert [type(m) for m in patched.modules()] == [type(m) for m in original.modules()]


@pytest.mark.parametrize("kind", ["autocast", "bfloat16"])
def test_codes_in_half_precision_are_the_nearest(name: str, kind: str) -> None:
    model, x = make(name)
    if kind == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    original, patched = pair(model)
    seen = record(patched)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        expected, codes = encode(original, x), encode(patched, x)
    assert (codes.shape, codes.dtype) == (expected.shape, expected.dtype)
    assert len(seen) == LEVELS[name]
    for rows, book, indices, metric in seen:
        wrong_rows(indices, indices, rows, book, metric)
    print(f"{name}, {kind}: {int((codes != expected).sum())} of {codes.numel()} codes differ from the original's")


def record(model: nn.Module) -> list[tuple[Tensor, Tensor, Tensor, str]]:
    """What each adapter of a patched model is asked and answers, from now on: rows, codes, indices, metric."""
    seen: list[tuple[Tensor, Tensor, Tensor, str]] = []

    def watch(module: Any, method: str) -> None:
        inner = getattr(module, method)

        def recording(x: Tensor) -> Any:
            out = inner(x)
            if method == "quantize":
                seen.append((x.detach(), module.embed, out, "l2"))
            elif method == "decode_latents":
                seen.append((x.detach().transpose(1, 2), module.codebook.weight, out[1], "cosine"))
            else:
                dim = 2 if x.dim() == 5 else 1
                indices = out if x.dim() == 5 else out[2][2] if isinstance(out[2], tuple) else out[2]
                rows = x.detach().movedim(dim, -1)
                seen.append(
                    (
                        rows.to(torch.promote_types(x.dtype, module.embedding.weight.dtype)),
                        module.embedding.weight,
                        indices,
                        "l2",
                    )
                )
            return out

        setattr(module, method, recording)

    for module in list(model.modules()):
        if isinstance(module, vqkernels.recognisers.Adapter):
            watch(module, next(m for m in ("quantize", "decode_latents", "forward") if hasattr(type(module), m)))
    return seen


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["DAC", "Chameleon", "Janus", "diffusers VQModel"])
def test_losses_and_gradients_of_whole_models(name: str, training: bool) -> None:
    def call(m: Any, values: Tensor) -> Any:
        torch.manual_seed(1)  # DAC draws its quantizer dropout
        if name == "DAC":
            out = m(values)
            return [out.loss, out.audio_values, out.audio_codes]
        if name == "diffusers VQModel":
            return list(m(values, return_dict=False))
        out = m.encode(values)
        return [out.embedding_loss, out.quantized_last_hidden_state, out.image_tokens]

    model, x = make(name)
    original, patched = pair(model.train(training))
    (expected, expected_grads), (out, grads) = run(original, call, x, True), run(patched, call, x, True)
    for a, b in zip(tensors(expected), tensors(out), strict=True):
        close(a, b) if a.is_floating_point() else torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert sum(g is not None for g in grads) > 10
    # Of the largest gradient of the model: that of a bias before a normalisation is zero but for rounding.
    scale = max(float(g.abs().max()) for g in expected_grads if g is not None)
    for a, b in zip(expected_grads, grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("name", ["DAC", "Chameleon", "Janus", "diffusers VQModel"])
def test_five_steps_of_training_end_at_the_same_parameters(name: str) -> None:
    model, first = make(name)
    original, patched = pair(model.train())
    before = {k: v.clone() for k, v in original.state_dict().items()}
    losses: list[list[float]] = [[], []]
    for i, m in enumerate((original, patched)):
        torch.manual_seed(5)
        optimizer = torch.optim.SGD(m.parameters(), lr=0.01)
        for _ in range(5):
            x = torch.rand_like(first) * 2 - 1
            if name == "DAC":
                out = m(x)
                loss = out.loss.mean() + functional.mse_loss(
                    out.audio_values, x[..., : out.audio_values.shape[-1]].squeeze(1)
                )
            elif name == "diffusers VQModel":
                values, commitment = m(x, return_dict=False)
                loss = functional.mse_loss(values, x) + commitment
            else:
                loss = m.encode(x).embedding_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[i].append(loss.item())
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-5, atol=0)
    same_buffers(original, patched, least=1e-3)  # a bias before a normalisation moves by rounding only
    moved = [k for k, v in original.state_dict().items() if not torch.equal(v, before[k])]
    assert len(moved) > 10
    assert any("codebook" in k or "quantize.embedding" in k for k in moved)


def test_patched_models_can_be_copied_and_pickled(name: str) -> None:
    model, x = make(name)
    _, patched = pair(model)
    copies = [copy.deepcopy(patched)]
    if name != "EnCodec":  # its weight normalisation cannot be pickled, patched or not
        copies.append(pickle.loads(pickle.dumps(patched)))
    with torch.no_grad():
        expected = encode(patched, x)
        for other in copies:
            assert adapters_in(other) == adapters_in(patched)
            assert torch.equal(encode(other, x), expected)


@pytest.mark.slow
def test_patched_residual_quantizer_compiles_without_a_graph_break() -> None:
    model, _ = make("EnCodec")
    _, patched = pair(model)
    z = torch.randn(2, 16, 50)
    stack: Any = patched.quantizer
    expected = stack.encode(z, 1.8)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(stack.encode, fullgraph=True, backend="aot_eager")(z, 1.8), expected)


@pytest.mark.slow
def test_patched_image_quantizer_compiles_without_a_graph_break() -> None:
    model, _ = make("diffusers VQModel")
    original, patched = pair(model.quantize)
    z = torch.randn(2, 4, 8, 8)
    torch._dynamo.reset()
    expected, expected_grads = run(original, lambda m, v: m(v), z, True)
    out, grads = run(patched, torch.compile(lambda m, v: m(v), fullgraph=True, backend="aot_eager"), z, True)
    for a, b in zip([*tensors(expected[:2]), *expected_grads], [*tensors(out[:2]), *grads], strict=True):
        close(a, b)
    assert torch.equal(expected[2][2], out[2][2])
