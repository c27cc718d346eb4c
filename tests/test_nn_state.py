"""State of a VectorQuantizer: its own and foreign checkpoints, bad options and input, memory of a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantizers import OPTIONS, D, K, batch, same_state, state
from torch import Tensor

import vqkernels
from vqkernels import VectorQuantizer


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_state_dict_round_trip(options: dict[str, Any]) -> None:
    vq = VectorQuantizer(K, D, **options)
    vq(batch(vq, 30))
    other = VectorQuantizer(K, D, **options)
    result = other.load_state_dict(vq.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert same_state(state(vq), state(other))
    z = batch(vq, 30)
    assert torch.equal(vq(z).indices, other(z).indices)
    assert same_state(state(vq), state(other))


def test_state_dict_names_are_stable() -> None:
    assert list(VectorQuantizer(K, D).state_dict()) == ["codebook", "code_counts", "steps", "initialized"]
    ema = VectorQuantizer(K, D, decay=0.9, heads=2).state_dict()
    assert {k: tuple(v.shape) for k, v in ema.items()} == {
        "codebook": (2, K, D),
        "code_counts": (2, K),
        "cluster_size": (2, K),
        "embed_avg": (2, K, D),
        "steps": (),
        "initialized": (),
    }


CODES, SIZE = torch.randn(K, D), torch.rand(K) + 1
AVERAGE = CODES * SIZE[:, None]
LAYOUTS: dict[str, dict[str, Tensor]] = {
    "taming": {"embedding.weight": CODES},
    "llamagen": {"embedding.weight": CODES, "codebook_used": torch.zeros(65536)},
    "dac": {"codebook.weight": CODES},
    "tutorial": {"embeddings.weight": CODES},
    "notebook": {"_embedding.weight": CODES},
    "notebook, moving average": {"_embedding.weight": CODES, "_ema_cluster_size": SIZE, "_ema_w": AVERAGE},
    "lucidrains": {
        "_codebook.initted": torch.tensor(True),
        "_codebook.cluster_size": SIZE[None],
        "_codebook.embed_avg": AVERAGE[None],
        "_codebook.embed": CODES[None],
    },
    "lucidrains before 1.27": {
        "_codebook.initted": torch.tensor([1.0]),
        "_codebook.cluster_size": SIZE[None],
        "_codebook.embed_avg": AVERAGE[None],
        "_codebook.embed": CODES[None],
    },
    "encodec": {
        "_codebook.inited": torch.tensor([1.0]),
        "_codebook.cluster_size": SIZE,
        "_codebook.embed_avg": AVERAGE,
        "_codebook.embed": CODES,
    },
    "transformers encodec": {
        "codebook.inited": torch.tensor([1.0]),
        "codebook.cluster_size": SIZE,
        "codebook.embed_avg": AVERAGE,
        "codebook.embed": CODES,
    },
    "rosinality": {"embed": CODES.T, "cluster_size": SIZE, "embed_avg": AVERAGE.T},
    "mimi": {"codebook.initialized": torch.ones(1), "codebook.cluster_usage": SIZE, "codebook.embed_sum": AVERAGE},
    "moshi": {
        "_codebook._initialized": torch.ones(1),
        "_codebook.cluster_usage": SIZE,
        "_codebook.embedding_sum": AVERAGE,
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("decay", [None, 0.9])
def test_foreign_checkpoints_load(layout: str, decay: float | None) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), VectorQuantizer(K, D, decay=decay, init="kmeans"))
    foreign = {f"1.{k}": v.clone() for k, v in LAYOUTS[layout].items()}
    given = dict(foreign)
    model.load_state_dict(model[0].state_dict(prefix="0.") | foreign)
    assert foreign.keys() == given.keys()
    vq = model[1]
    torch.testing.assert_close(vq.codebook, CODES, rtol=1e-6, atol=1e-7)
    assert vq.initialized
    if decay is not None:
        size = SIZE if len(foreign) > 2 else torch.ones(K)
        torch.testing.assert_close(vq.cluster_size, size)
        torch.testing.assert_close(vq.embed_avg, CODES * size[:, None], rtol=1e-5, atol=1e-6)
    z = torch.randn(20, D)
    assert torch.equal(vq(z).indices, vqkernels.nearest(z, CODES)[0])


@pytest.mark.parametrize("layout", ["own", "taming", "lucidrains", "rosinality"])
def test_a_checkpoint_of_other_sizes_loads_nothing(layout: str) -> None:
    vq = VectorQuantizer(K, D, decay=0.9)
    wide = VectorQuantizer(K, D + 1, decay=0.9).state_dict()
    states = {
        "own": wide,
        "taming": {"embedding.weight": wide["codebook"]},
        "lucidrains": {"_codebook.embed": wide["codebook"][None], "_codebook.cluster_size": SIZE[None]},
        "rosinality": {"embed": wide["codebook"].T, "cluster_size": SIZE, "embed_avg": wide["embed_avg"].T},
    }
    before = state(vq)
    with pytest.raises(RuntimeError, match=r"codebook: the checkpoint has \(16, 9\), this quantizer has \(16, 8\)"):
        vq.load_state_dict(states[layout])
    assert same_state(before, state(vq))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        vq.load_state_dict(LAYOUTS["taming"] | {"project_in.weight": CODES})


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no codes": ({"num_embeddings": 0}, ValueError, "num_embeddings is 0"),
    "half a dim": ({"embedding_dim": 1.5}, TypeError, "embedding_dim is 1.5"),
    "heads": ({"heads": 0}, ValueError, "heads is 0"),
    "decay": ({"decay": 1.0}, ValueError, "decay is 1.0"),
    "beta": ({"commitment_cost": -1}, ValueError, "commitment_cost is -1"),
    "metric": ({"metric": "l1"}, ValueError, "metric is 'l1'"),
    "gradient": ({"gradient": "ste"}, ValueError, "gradient is 'ste'"),
    "init": ({"init": "zeros"}, ValueError, "init is 'zeros'; expected one of 'uniform', 'normal', 'kmeans'"),
    "ratio": ({"dead_code_ratio": 2.0}, ValueError, "dead_code_ratio is 2.0"),
    "channel_dim": ({"channel_dim": 2}, ValueError, "channel_dim is 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_named(case: str) -> None:
    options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        VectorQuantizer(**({"num_embeddings": K, "embedding_dim": D} | options))


def test_bad_input_is_named() -> None:
    vq = VectorQuantizer(K, D, heads=2)
    with pytest.raises(ValueError, match=r"z has shape \(2, 8, 3\); expected \(B, 16, \.\.\.\) \(2 heads of 8 dims\)"):
        vq(torch.randn(2, 8, 3))
    with pytest.raises(ValueError, match="expected one device"):
        vq(torch.randn(2, 16, 3, device="meta"))
    with pytest.raises(TypeError, match=r"z has dtype torch\.int64"):
        vq(torch.zeros(2, 16, 3).long())
    with pytest.raises(ValueError, match=r"mask has shape \(2, 4\); expected \(2, 3\)"):
        vq(torch.randn(2, 16, 3), mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"indices has shape \(2, 3\); expected \(\.\.\., 2\)"):
        vq.codes_to_output(torch.zeros(2, 3).long())
    with pytest.raises(TypeError, match="indices has dtype"):
        vq.codes_to_output(torch.zeros(2, 3, 2))


def test_repr_names_what_is_not_default() -> None:
    assert repr(VectorQuantizer(512, 64)) == "VectorQuantizer(512, 64, commitment_cost=0.25)"
    text = repr(VectorQuantizer(512, 64, decay=0.99, metric="cosine", heads=2))
    assert text == "VectorQuantizer(512, 64, commitment_cost=0.25, decay=0.99, metric='cosine', heads=2)"
