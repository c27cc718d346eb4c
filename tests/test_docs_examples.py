"""The Python in README.md and docs/ runs as it stands there, on small tensors.

docs/quantizers.md and the pages about patching have tests of their own (test_docs_quantizers.py, patch/).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_models_published import published, random_state
from torch import distributed
from torch.nn import functional

import vqkernels
from vqkernels.models import build_model

ROOT = Path(__file__).resolve().parents[1]
# Pages, with the number of their examples.
PAGES = {"README.md": 4, "docs/distributed.md": 1, "docs/gpu.md": 1, "docs/models.md": 4, "docs/training.md": 1}
ELSEWHERE = {"docs/drop-in.md", "docs/drop-in-models.md", "docs/quantizers.md"}


def examples(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def run(page: str, number: int, names: dict[str, Any], **small: str) -> dict[str, Any]:
    """Run an example with some names given and some words replaced by smaller ones."""
    text = examples(page)[number]
    for word, other in small.items():
        assert word in text
        text = text.replace(word, other)
    exec(compile(text, f"{page}, example {number}", "exec"), names)
    return names


def test_no_example_is_forgotten() -> None:
    pages = [path for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")) if "```python" in path.read_text()]
    assert {path.relative_to(ROOT).as_posix() for path in pages} == PAGES.keys() | ELSEWHERE
    assert {page: len(examples(page)) for page in PAGES} == PAGES


# README.md


def test_before_and_after() -> None:
    z, codebook = torch.randn(2, 256, 4, 3, requires_grad=True), torch.randn(61, 256)
    vq = vqkernels.VectorQuantizer(61, 256)
    with torch.no_grad():
        vq.codebook.copy_(codebook)
    before: dict[str, Any] = {
        "torch": torch, "F": functional, "vqkernels": vqkernels, "z": z, "codebook": codebook, "vq": vq
    }  # fmt: skip
    after = dict(before)
    text, others = examples("README.md")[0].split("# after\n")
    exec(text, before)
    exec(others.replace("vqkernels.VectorQuantizer(16384, 256)", "vq"), after)
    assert torch.equal(after["indices"].flatten(), before["indices"])
    torch.testing.assert_close(after["q"], before["q"])
    torch.testing.assert_close(after["loss"], before["loss"])


def test_a_model_that_one_has() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MimiConfig(
        hidden_size=16, num_filters=4, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        intermediate_size=16, codebook_size=64, codebook_dim=8, vector_quantization_hidden_dimension=8,
        upsample_groups=16,
    )  # fmt: skip
    names = run("README.md", 1, {"config": config, "vqkernels": vqkernels})
    assert vqkernels.unpatch(names["model"])


def test_what_it_computes_is_what_it_is_equivalent_to() -> None:
    names: dict[str, Any] = {
        "vqkernels": vqkernels, "z_rows": torch.randn(63, 5, requires_grad=True), "codebook": torch.randn(17, 5),
    }  # fmt: skip
    out = run("README.md", 2, names)["out"]
    equivalent = run("README.md", 3, names)
    for name in ("indices", "commitment_loss", "codebook_loss", "loss", "quantized"):
        torch.testing.assert_close(getattr(out, name), equivalent[name], rtol=1e-5, atol=1e-6)


# docs/


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_codebook_over_several_processes() -> None:
    x, codebook = torch.randn(7, 64), torch.randn(2**6, 64)
    names = run("docs/distributed.md", 0, {"x": x, "codebook": codebook, "z": torch.randn(5, 64)}, **{"2**20": "2**6"})
    assert torch.equal(names["values"], codebook[torch.cdist(x.double(), codebook.double()).argmin(1)])
    assert names["out"].indices.shape == (5,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_captured_search() -> None:
    x, codebook = torch.randn(16, 256, device="cuda"), torch.randn(61, 256, device="cuda")
    names = run("docs/gpu.md", 0, {"torch": torch, "vqkernels": vqkernels, "x": x, "codebook": codebook})
    assert torch.equal(names["indices"], vqkernels.nearest(x, codebook)[0])


def test_a_model_is_built_saved_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("docs/models.md", 0, {"images": torch.rand(2, 3, 32, 32)}, **{"vqgan-f16": "tiny-vqgan"})
    assert names["restored"].shape == (2, 3, 32, 32)
    assert names["model"].encode_to_indices(names["images"])[0].shape == names["tokens"][0].shape


def test_published_checkpoints_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"ch": 32, "mult": [1, 2], "z": 8, "codes": 11, "dim": 4}
    torch.save({"state_dict": random_state(published("taming", **sizes))}, "last.ckpt")
    small = build_model("llamagen-vq16", channels=32, multipliers=(1, 2), z_channels=8, codes=11, dim=4)
    torch.save({"model": random_state(published("llamagen", **sizes))}, "vq_ds16_c2i.pt")
    names = run("docs/models.md", 1, {"torch": torch, "small": small}, **{'build_model("llamagen-vq16")': "small"})
    assert names["model"].config.codes == 11


def test_the_losses_of_a_step() -> None:
    model = build_model("tiny-vqgan")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names: dict[str, Any] = {"model": model, "images": torch.rand(2, 3, 48, 48), "step": 10_001}
    text = examples("docs/models.md")[2]
    made, used = text.split("output = model(images)")
    exec(made, names)
    names["generator_optimizer"] = torch.optim.Adam(model.parameters())
    names["critic_optimizer"] = torch.optim.Adam(names["critic"].parameters())
    exec("output = model(images)" + used, names)
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_tokens_are_packed() -> None:
    tokens = torch.randint(16384, (3, 5))
    assert torch.equal(run("docs/models.md", 3, {"tokens": tokens})["tokens"], tokens)


def test_a_trained_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build_model("tiny").save_pretrained("runs/demo/model")
    names = run("docs/training.md", 0, {"images": torch.rand(2, 3, 32, 48)})
    assert names["indices"].shape == (2, 8, 12)
    assert names["restored"].shape == (2, 3, 32, 48)
