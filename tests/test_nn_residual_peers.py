"""Residual quantizers against vector-quantize-pytorch, Mimi and the contract of DAC, from their checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqkernels.nn import (
    GroupedResidualVectorQuantizer,
    ResidualVectorQuantizer,
    SplitResidualVectorQuantizer,
)

K, D, Q = 16, 8, 3


def close(a: Tensor, b: Tensor, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rotation", [False, True])
def test_trains_as_vector_quantize_pytorch_does(rotation: bool, shared: bool) -> None:
    theirs_module = pytest.importorskip("vector_quantize_pytorch")
    theirs = theirs_module.ResidualVQ(
        dim=12, codebook_dim=D, num_quantizers=Q, codebook_size=K, decay=0.8, rotation_trick=rotation,
        shared_codebook=shared,
    )  # fmt: skip
    with torch.no_grad():
        for layer in theirs.layers[: 1 if shared else Q]:
            layer._codebook.embed.normal_()
            layer._codebook.embed_avg.copy_(layer._codebook.embed)
    ours = ResidualVectorQuantizer(
        K, D, Q, decay=0.8, estimator="per_level", gradient="rotation" if rotation else "straight_through",
        commitment_cost=1.0, input_dim=12, channel_dim=-1, shared_codebook=shared,
    )  # fmt: skip
    ours.load_state_dict(theirs.state_dict(), strict=False)
    # A shared codebook is averaged once per level there and once per step here, so that only the first step agrees.
    for _ in range(1 if shared else 3):
        x = torch.randn(2, 37, 12)
        results = []
        for module in (theirs, ours):
            z = x.clone().requires_grad_()
            out = module(z)
            loss = out[2].sum()
            module.zero_grad()
            (out[0].sin().sum() + loss).backward()
            weights = [p.grad for n, p in sorted(module.named_parameters()) if n.startswith("project")]
            results.append([out[1], out[0], loss, z.grad, *weights])
        assert torch.equal(results[0][0], results[1][0])
        for a, b in zip(results[0][1:], results[1][1:], strict=True):
            close(b, a, rtol=2e-5, atol=2e-5 * float(a.detach().abs().max()))
    for i in range(0 if shared else Q):
        for name, key in (("codebook", "embed"), ("embed_avg", "embed_avg"), ("cluster_size", "cluster_size")):
            close(getattr(ours.level(i), name), getattr(theirs.layers[i]._codebook, key)[0], rtol=1e-5, atol=1e-5)


def test_reads_grouped_checkpoints_of_vector_quantize_pytorch() -> None:
    theirs = pytest.importorskip("vector_quantize_pytorch").GroupedResidualVQ(
        dim=2 * D, groups=2, num_quantizers=Q, codebook_size=K
    )
    ours = GroupedResidualVectorQuantizer(K, D, Q, groups=2, decay=0.8, channel_dim=-1)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    x = torch.randn(3, 11, 2 * D)
    want, indices, _ = theirs.eval()(x)
    out = ours.eval()(x)
    assert torch.equal(out.indices, indices.permute(1, 2, 0, 3))
    close(out.quantized, want)
    close(ours.codes_to_output(out.indices), want)


def test_encodes_and_decodes_as_mimi_does() -> None:
    modeling = pytest.importorskip("transformers.models.mimi.modeling_mimi")
    config = modeling.MimiConfig(
        codebook_size=K, codebook_dim=D, vector_quantization_hidden_dimension=D, hidden_size=12, num_quantizers=5
    )
    theirs = modeling.MimiSplitResidualVectorQuantizer(config)
    with torch.no_grad():
        for name, buffer in theirs.named_buffers():
            if name.endswith("embed_sum"):
                buffer.normal_()
    ours = SplitResidualVectorQuantizer(K, D, 5, input_dim=12, decay=0.99).eval()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    x = torch.randn(2, 12, 33)
    for levels in (1, 3, 5):
        codes = theirs.encode(x, levels)
        out = ours(x, num_levels=levels)
        assert torch.equal(out.indices[..., :levels], codes.permute(1, 2, 0))
        assert (out.indices[..., levels:] == -1).all()
        decoded = theirs.decode(codes.transpose(0, 1))
        close(out.quantized, decoded)
        close(ours.codes_to_output(out.indices[..., :levels]), decoded)


class DacLevel(nn.Module):
    """Contract of descript-audio-codec's VectorQuantize, re-stated: cosine search, raw codes, projections."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Conv1d(D, 4, 1), nn.Conv1d(4, D, 1)
        self.codebook = nn.Embedding(K, 4)

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        z_e = self.in_proj(z)
        similarity = F.normalize(z_e, dim=1).transpose(1, 2) @ F.normalize(self.codebook.weight, dim=1).T
        indices = similarity.argmax(-1)
        z_q = self.codebook(indices).transpose(1, 2)
        losses = F.mse_loss(z_e, z_q.detach()), F.mse_loss(z_q, z_e.detach())
        return self.out_proj(z_e + (z_q - z_e).detach()), *losses, indices


def test_chained_levels_train_as_descript_audio_codec_does() -> None:
    theirs = nn.Module()
    theirs.quantizers = nn.ModuleList(DacLevel() for _ in range(Q))
    ours = ResidualVectorQuantizer(K, D, Q, level_dim=4, metric="cosine", normalize=False)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    z = torch.randn(2, D, 19, requires_grad=True)
    w = z.detach().clone().requires_grad_()
    residual, total, loss, indices = z, torch.zeros_like(z), torch.zeros(()), []
    for level in theirs.quantizers:
        out, commitment, codebook, index = level(residual)
        total, residual, loss = total + out, residual - out, loss + 0.25 * commitment + codebook
        indices.append(index)
    (total.sin().sum() + loss).backward()
    got = ours(w)
    (got.quantized.sin().sum() + got.loss).backward()
    assert torch.equal(got.indices, torch.stack(indices, -1))
    close(got.quantized, total)
    close(got.loss, loss)
    close(w.grad, z.grad, rtol=1e-5, atol=1e-5)
    for i, level in enumerate(theirs.quantizers):
        close(ours.level(i).codebook.grad, level.codebook.weight.grad, atol=1e-5)
        close(ours.level(i).project_in.weight.grad, level.in_proj.weight.grad[..., 0], rtol=1e-4, atol=1e-4)
        close(ours.level(i).project_out.bias.grad, level.out_proj.bias.grad, rtol=1e-4, atol=1e-4)


def test_reads_weight_normalised_convolutions() -> None:
    level = DacLevel()
    want = level.in_proj.weight.detach().clone()
    vq = ResidualVectorQuantizer(K, D, 1, level_dim=4)
    found = {f"quantizers.0.{k}": v for k, v in level.state_dict().items() if k != "in_proj.weight"}
    found |= {
        "quantizers.0.in_proj.weight_v": 3 * want,
        "quantizers.0.in_proj.weight_g": want.norm(dim=(1, 2), keepdim=True),
    }
    vq.load_state_dict(found, strict=False)
    close(vq.level(0).project_in.weight, want[..., 0])
