"""Known bugs of the originals: reproduced, or mended by name (``fix=``), or mended where the original crashes.

One test per line of the table in docs/drop-in.md that other tests don't cover.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import LargestTensor, close, compare, pair, same_structure
from restated import EncodecCodebook, Taming2
from restated_tokenizers import Ibq, RepositorySimVQ, RepositorySimVQ1D, Var
from table import group_for
from test_codebooks import family
from vector_quantize_pytorch import VectorQuantize

import vqkernels
from vqkernels import recognisers

K, D = 29, 4
DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "drop-in.md").read_text()


def test_every_fix_is_in_the_document() -> None:
    table = DOCUMENT.partition("## Known bugs upstream")[2].partition("\n## ")[0]
    offered = {name for adapter in recognisers.adapters() for name in adapter.available_fixes}
    assert offered == set(re.findall(r'fix="([^"]+)"', table))


def encodec_steps(*, fix: tuple[str, ...]) -> tuple[Any, Any, torch.Tensor]:
    """A codebook of which a corner is used, after one training step: original, patched, the batch."""
    module = EncodecCodebook(D, K, decay=0.5, threshold_ema_dead_code=2).train()
    module.embed.normal_(std=8.0)
    module.embed_avg.copy_(module.embed)
    module.cluster_size.fill_(3.0)
    original, patched = pair(module, fix=fix)
    x = torch.randn(200, D)
    for m in (original, patched):
        torch.manual_seed(1)
        m(x)
    return original, patched, x


def test_encodec_expires_no_code_unless_asked() -> None:
    original, patched, x = encodec_steps(fix=())
    dead = original.cluster_size < 2
    assert dead.sum() > 10
    close(original.embed, patched.embed)
    assert not (patched.embed[dead, None] == x).all(-1).any()
    original, patched, x = encodec_steps(fix=("encodec-expiry",))
    dead = original.cluster_size < 2
    assert (patched.embed[dead, None] == x).all(-1).any(1).all()
    assert torch.equal(patched.cluster_size[dead], torch.full_like(patched.cluster_size[dead], 2.0))
    close(patched.embed_avg[dead], 2.0 * patched.embed[dead])
    close(original.cluster_size[~dead], patched.cluster_size[~dead])
    usage = [len(m(torch.randn(200, D))[1].unique()) for m in (original, patched)]
    assert usage[1] > 2 * usage[0]


def test_simvq_entries_are_the_frozen_codes_unless_asked() -> None:
    module = RepositorySimVQ(K, D)
    original, patched = pair(module)
    (quantized, _, indices), _ = patched(torch.randn(2, D, 3, 5))
    entries = [m.get_codebook_entry(indices, (2, 3, 5, D)) for m in (original, patched)]
    assert torch.equal(*entries)
    assert not torch.allclose(entries[1], quantized)
    _, mended = pair(module, fix="simvq-entry")
    close(quantized, mended.get_codebook_entry(indices, (2, 3, 5, D)))
    close(mended.embedding_proj(mended.embedding.weight)[indices], mended.get_codebook_entry(indices, None))


def test_simvq_1d_gives_index_rows_where_the_original_raises() -> None:
    original, patched = pair(RepositorySimVQ1D(K, D, sane_index_shape=True))
    z = torch.randn(2, D, 7)
    with pytest.raises((RuntimeError, IndexError)):
        original(z)
    assert patched(z)[0][2].shape == (2, 7)


@pytest.mark.parametrize("by_angle", [False, True])
def test_var_trains_without_a_process_group(by_angle: bool) -> None:
    module = Var(K, D, by_angle, (1, 2, 3, 5)).train()
    module.embedding.weight.data.normal_()
    original, patched = pair(module)
    f = torch.randn(2, D, 5, 5)
    with pytest.raises(ValueError, match="process group"):
        original(f)
    alone = [patched(f, ret_usages=True) for _ in range(3)]
    with group_for("re-stated VAR"):
        together = [original(f, ret_usages=True) for _ in range(3)]
    for a, b in zip(together, alone, strict=True):
        same_structure(a, b)
        close(a[0], b[0])
        close(a[2], b[2])
    close(original.ema_vocab_hit_SV, patched.ema_vocab_hit_SV)
    assert original.record_hit == patched.record_hit == 12


def test_var_encodes_to_indices_and_to_maps_at_any_sizes() -> None:
    module = Var(K, D, False, (1, 2, 5)).eval()
    module.embedding.weight.data.normal_()
    original, patched = pair(module)
    f = torch.randn(2, D, 5, 5)
    for sizes, g in ((None, f), ((1, (2, 3), (4, 6)), torch.randn(2, D, 4, 6))):
        for to_fhat in (False, True):
            compare(original, patched, lambda m, x, s=sizes, t=to_fhat: m.f_to_idxBl_or_fhat(x, t, s), g, False)
    one_scale = Var(K, D, False, (5,))
    vqkernels.patch(one_scale)  # the original divides by zero
    assert one_scale(f)[0].shape == f.shape
    with pytest.raises(ValueError, match="expected the last scale, 5 x 5"):
        patched(torch.randn(2, D, 5, 4))


def test_ibq_holds_no_matrix_of_rows_by_codes() -> None:
    original, patched = pair(Ibq(K, D, 0.25, 0.5))
    seen = []
    for module in (original, patched):
        with LargestTensor() as watch:
            q, losses, _ = module(torch.randn(2, D, 40, 40).requires_grad_())
            (q.sum() + losses[0] + losses[3]).backward()
        seen.append(watch.largest)
    assert seen[0] >= 3200 * K > 3200 * D >= seen[1]


def test_ibq_with_a_remap_keeps_its_code() -> None:
    module = Ibq(K, D)
    module.remap = "used.npy"
    (skipped,) = vqkernels.patch(module).skipped
    assert skipped.reason == "remap is set, which takes codes out of the softmax"


def test_taming_codes_of_indices_where_the_original_has_no_such_method() -> None:
    original, patched = pair(Taming2(K, D, 0.25))
    assert not hasattr(original, "embed_code")
    indices = torch.randint(0, K, (2, 3, 5))
    assert torch.equal(patched.embed_code(indices), original.embedding(indices).movedim(-1, 1))


def test_lucidrains_starts_k_means_in_eval_too() -> None:
    original, patched = pair(VectorQuantize(dim=D, codebook_size=5, kmeans_init=True).eval())
    x = torch.randn(2, 20, D)
    for module in (original, patched):
        torch.manual_seed(0)
        module(x)
        assert module._codebook.initted
    close(original._codebook.embed, patched._codebook.embed)


@pytest.mark.parametrize("options", [{"heads": 2, "codebook_dim": 2}, {"codebook_dim": 3}], ids=str)
def test_lucidrains_masks_fail_with_the_same_error(options: dict[str, Any]) -> None:
    messages = []
    for module in pair(VectorQuantize(dim=D, codebook_size=5, **options)):
        with pytest.raises(RuntimeError) as error:
            module(torch.randn(2, 7, D), mask=torch.ones(2, 7).bool())
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_lucidrains_masks_of_a_channel_first_input() -> None:
    """They raised in version 1.31; in 1.32 they work, and do here."""
    mask = torch.arange(7) < torch.tensor([[3], [7]])
    original, patched = pair(VectorQuantize(dim=D, codebook_size=5, channel_last=False))
    compare(original, patched, lambda m, x: m(x, mask=mask), torch.randn(2, D, 7), True)


def test_lucidrains_decides_about_processes_when_it_is_made() -> None:
    """Whatever the constructor found is what the statistics are summed with."""
    _, patched = pair(VectorQuantize(dim=D, codebook_size=5))
    calls: list[int] = []
    patched._codebook.all_reduce_fn = lambda t: calls.append(t.numel())
    patched.train()(torch.randn(2, 7, D))
    assert calls == [5, 5 * D]


def test_mimi_keeps_the_codes_of_before_a_checkpoint() -> None:
    original, patched = pair(family("mimi"))
    state = {k: 3 * v if k == "embed_sum" else v.clone() for k, v in original.state_dict().items()}
    x = torch.randn(40, 6)
    for module in (original, patched):
        module.quantize(x)
        module.load_state_dict(state)
    close(original.embed, patched.embed)
    assert torch.equal(original.quantize(x), patched.quantize(x))
