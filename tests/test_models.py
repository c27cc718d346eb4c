"""The VQ-VAE: shapes for sizes, tokens that decode to the reconstruction, saving and loading."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vqkernels._files import replace_file
from vqkernels.models import VQVAE, Decoder, Encoder, ResidualBlock, VQVAEConfig


def small(**changes: object) -> VQVAEConfig:
    values: dict[str, object] = {
        "base_channels": 8,
        "residual_channels": 6,
        "codes": 19,
        "dim": 5,
        "residual_blocks": 1,
    }
    return VQVAEConfig(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("downsample", [2, 4, 8, 16])
@pytest.mark.parametrize("size", [(32, 32), (48, 80)])
def test_sizes(downsample: int, size: tuple[int, int]) -> None:
    model = VQVAE(small(downsample=downsample)).eval()
    images = torch.rand(3, 3, *size)
    out = model(images)
    grid = (3, size[0] // downsample, size[1] // downsample)
    assert out.reconstruction.shape == images.shape
    assert out.quantizer.indices.shape == grid
    assert model.encoder(images).shape == (3, 5, *grid[1:])
    assert model.decode(model.encode(images)).shape == images.shape


def test_widths_double_up_to_the_cap() -> None:
    assert VQVAEConfig(base_channels=24, max_channels=80, downsample=16).channels == (24, 48, 80, 80)
    encoder = Encoder(small(base_channels=24, max_channels=80, downsample=16))
    assert [layer.out_channels for layer in encoder.down] == [24, 48, 80, 80]
    decoder = Decoder(small(base_channels=24, max_channels=80, downsample=16))
    assert [layer.out_channels for layer in decoder.up] == [80, 48, 24, 3]


def test_encode_then_decode_is_the_clamped_forward_pass() -> None:
    model = VQVAE(small(quantizer={"decay": 0.9, "init": "kmeans"}))
    images = torch.rand(2, 3, 32, 36)
    model(images)
    out = model.eval()(images)
    indices = model.encode(images)
    assert torch.equal(indices, out.quantizer.indices)
    torch.testing.assert_close(model.decode(indices), out.reconstruction.clamp(0, 1))
    assert len(indices.unique()) > 1


@pytest.mark.parametrize(
    "options", [{"heads": 2}, {"metric": "cosine"}, {"heads": 3, "decay": 0.8}, {"gradient": "rotation"}]
)
def test_quantizer_options_are_passed_through(options: dict[str, object]) -> None:
    model = VQVAE(small(quantizer=options | {"init": "kmeans"}))
    model(torch.rand(1, 3, 32, 32))
    model.eval()
    heads = int(options.get("heads", 1))  # type: ignore[call-overload]
    assert model.quantizer.heads == heads
    assert model.config.latent_channels == 5 * heads
    images = torch.rand(1, 3, 32, 32)
    indices = model.encode(images)
    assert indices.shape == ((1, 8, 8, heads) if heads > 1 else (1, 8, 8))
    assert len(indices.unique()) > 3
    torch.testing.assert_close(model.decode(indices), model(images).reconstruction.clamp(0, 1))


def test_encoding_in_training_mode_moves_nothing() -> None:
    model = VQVAE(small(quantizer={"decay": 0.5, "dead_code_ratio": 0.1}))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.encode(torch.rand(4, 3, 32, 32))
    assert model.training
    assert model.quantizer.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    model(torch.rand(4, 3, 32, 32))
    assert not torch.equal(before["quantizer.codebook"], model.quantizer.codebook)


def test_gradients_reach_every_parameter() -> None:
    model = VQVAE(small())
    images = torch.rand(2, 3, 32, 32)
    out = model(images)
    ((out.reconstruction - images).square().mean() + out.quantizer.loss).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_recomputed_activations_give_the_same_gradients() -> None:
    plain, recomputing = VQVAE(small()), VQVAE(small(checkpoint_activations=True))
    recomputing.load_state_dict(plain.state_dict())
    images = torch.rand(2, 3, 32, 32)
    for model in (plain, recomputing):
        out = model(images)
        ((out.reconstruction - images).square().mean() + out.quantizer.loss).backward()
    for (name, a), b in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_residual_block_adds_to_its_input() -> None:
    block = ResidualBlock(4, 3)
    x = torch.randn(1, 4, 5, 7)
    torch.nn.init.zeros_(block.project.weight)
    torch.nn.init.constant_(block.project.bias, 2.0)
    assert torch.equal(block(x), x + 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"downsample": 3}, "downsample is 3"),
        ({"codes": 0}, "codes is 0"),
        ({"dim": 2.5}, "dim is 2.5"),
        ({"base_channels": True}, "base_channels is True"),
        ({"residual_blocks": -1}, "residual_blocks is -1"),
        ({"quantizer": {"embedding_dim": 4}}, "use codes and dim"),
    ],
)
def test_config_refuses(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small(**changes)


def test_unknown_options_are_named() -> None:
    with pytest.raises(ValueError, match="no_such_option"):
        VQVAE(small(quantizer={"no_such_option": 1}))
    with pytest.raises(ValueError, match="'width'"):
        VQVAEConfig.from_dict({"width": 3})


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 30, 32), (1, 3, 32, 33)])
def test_images_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images has shape .* expected \(B, 3, H, W\) with H and W multiples of 4"):
        VQVAE(small())(torch.rand(shape))


def test_what_is_no_tensor() -> None:
    for what in ([1.0], None):
        with pytest.raises(
            TypeError, match=rf"images is a {type(what).__name__}; expected a torch.Tensor \(B, 3, H, W\)"
        ):
            VQVAE(small())(what)


def test_integer_images() -> None:
    with pytest.raises(TypeError, match=r"torch\.uint8"):
        VQVAE(small()).encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_save_and_load(tmp_path: Path) -> None:
    model = VQVAE(small(quantizer={"decay": 0.9, "init": "kmeans"}))
    images = torch.rand(2, 3, 32, 32)
    model(images)
    model.eval().save_pretrained(tmp_path / "new" / "folder")
    loaded = VQVAE.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == model.config
    assert not loaded.training
    assert torch.equal(loaded(images).reconstruction, model(images).reconstruction)
    # The codebook is in place: training on does not run k-means again.
    before = loaded.quantizer.codebook.clone()
    loaded.train()(images)
    assert (loaded.quantizer.codebook - before).abs().max() < 0.5 * before.abs().max()
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_loading_what_is_not_there_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        VQVAE.from_pretrained(tmp_path)
    VQVAE(small()).save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        VQVAE.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"codes": 20}))
    with pytest.raises(ValueError, match=r"quantizer\.codebook is \(19, 5\) float32, expected \(20, 5\) float32"):
        VQVAE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"residual_blocks": 2}))
    with pytest.raises(ValueError, match=r"missing: decoder\.residual\.1.* and 7 more"):
        VQVAE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model": "VQGAN"}))
    with pytest.raises(ValueError, match="holds a VQGAN, not a VQVAE"):
        VQVAE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"codes": 19')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        VQVAE.from_pretrained(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_importing_the_models_needs_torch_only() -> None:
    extras = {"safetensors", "accelerate", "PIL", "matplotlib"}
    code = f"import sys, vqkernels.models; print(sorted({extras} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
