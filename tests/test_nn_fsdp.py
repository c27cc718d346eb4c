"""``fully_shard`` and FSDP 1 around the quantizers: what the plain model does, or an error where codes get lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard

from vqkernels.nn import MultiScaleVectorQuantizer, ResidualVectorQuantizer, SimVQ, VectorQuantizer

K, D = 12, 5
QUANTIZERS: dict[str, Callable[..., nn.Module]] = {
    "gradient": lambda: VectorQuantizer(K, D, channel_dim=-1),
    "averages": lambda: VectorQuantizer(K, D, channel_dim=-1, decay=0.8, init="kmeans", dead_code_ratio=0.5),
    "residual": lambda: ResidualVectorQuantizer(K, D, 3, channel_dim=-1, decay=0.8, dropout="batch"),
    "simvq": lambda: SimVQ(K, D, channel_dim=-1),
}
LOST: dict[str, dict[str, Any]] = {"k-means": {"init": "kmeans"}, "dead_code_ratio": {"dead_code_ratio": 0.5}}


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Model(nn.Module):
    """A linear encoder beside the quantizer."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.encoder, self.quantizer = nn.Linear(D, D), quantizer

    def forward(self, x: Tensor) -> Any:
        return self.quantizer(self.encoder(x))


def build(name: str, wrap: str = "", device: str = "cpu") -> nn.Module:
    torch.manual_seed(2)
    return wrapped(Model(QUANTIZERS[name]()).to(device), wrap)


def wrapped(model: nn.Module, how: str) -> nn.Module:
    if how == "fully_shard":
        fully_shard(model.quantizer)
        fully_shard(model)
    return FullyShardedDataParallel(model, device_id=torch.device("cpu")) if how == "FSDP" else model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, begin: int = 0) -> list[Tensor]:
    found = []
    for i in range(begin, begin + 2):
        out = model(torch.randn(20, D, generator=torch.Generator().manual_seed(i)))
        optimizer.zero_grad()
        (out.loss + out.quantized.square().mean()).backward()
        optimizer.step()
        found.append(out.indices)
    return found


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def state(model: nn.Module) -> dict[str, Tensor]:
    full = {k: getattr(v, "full_tensor", lambda v=v: v)() for k, v in model.state_dict().items()}
    return {k: v.detach().clone() for k, v in full.items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("wrap", ["fully_shard", "FSDP"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_sharded_equals_plain(name: str, wrap: str) -> None:
    plain, sharded = build(name), build(name, wrap)
    expected, found = train(plain, sgd(plain)), train(sharded, sgd(sharded))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert_same(state(plain), state(sharded))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_mixed_precision_of_parameters_trains_and_keeps_the_state_in_float32(name: str) -> None:
    model = build(name)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (model.quantizer, model):
        fully_shard(module, mp_policy=policy)
    before = state(model)
    assert all((indices >= -1).all() for indices in train(model, sgd(model)))
    for key, value in state(model).items():
        assert value.dtype == before[key].dtype
        assert not value.is_floating_point() or value.isfinite().all()
    assert any(not torch.equal(before[key], value) for key, value in state(model).items() if "quantizer" in key)


@pytest.mark.parametrize("wrap", ["fully_shard", "FSDP"])
@pytest.mark.parametrize("what", LOST)
def test_codes_that_the_shards_would_lose_are_an_error(what: str, wrap: str) -> None:
    model = wrapped(Model(VectorQuantizer(K, D, channel_dim=-1, **LOST[what])), wrap)
    with pytest.raises(RuntimeError, match=what + ".* FSDP shards"):
        model(torch.randn(20, D))
    model.eval()
    assert model(torch.randn(20, D)).indices.shape == (20,)


def test_kmeans_before_sharding_is_kept() -> None:
    model = Model(VectorQuantizer(K, D, channel_dim=-1, init="kmeans"))
    model.quantizer.initialize(torch.randn(40, D))
    codes = model.quantizer.codebook.detach().clone()
    fully_shard(model)
    model(torch.randn(20, D)).loss.backward()
    assert torch.equal(state(model)["quantizer.codebook"], codes)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_distributed_checkpoint_resumes_with_the_same_bits(name: str, tmp_path: Path) -> None:
    first = build(name, "fully_shard")
    optimizer = sgd(first)
    train(first, optimizer)
    weights, moments = get_state_dict(first, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=tmp_path)
    second = build(name, "fully_shard")
    train(second, other := sgd(second), 7)
    weights, moments = get_state_dict(second, other)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=tmp_path)
    set_state_dict(second, other, model_state_dict=weights, optim_state_dict=moments)
    assert_same(state(first), state(second))
    for a, b in zip(train(first, optimizer, 2), train(second, other, 2), strict=True):
        assert torch.equal(a, b)
    assert_same(state(first), state(second))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_reset_parameters_fills_what_was_made_on_meta(name: str) -> None:
    model = build(name, "fully_shard", "meta").to_empty(device="cpu")
    for buffer in model.buffers():  # what fresh memory may hold
        buffer.fill_(77 if buffer.dtype != torch.bool else True)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    fresh = state(build(name))
    for key, value in state(model).items():
        if "codebook" in key or "embed_avg" in key:
            assert value.abs().max() < 10
            assert value.std() > 0
        elif "quantizer" in key and not value.is_floating_point():
            assert torch.equal(value, fresh[key]), key
    train(model, sgd(model))


def test_scales_made_on_meta_are_filled_too() -> None:
    vq = MultiScaleVectorQuantizer(K, D, [1, 2], init="normal", device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*vq.parameters(), *vq.buffers()):
            tensor.fill_(77)
    vq.reset_parameters()
    assert 0.5 < float(vq.codebook.detach().std()) < 2
    assert not vq.code_counts.any()
