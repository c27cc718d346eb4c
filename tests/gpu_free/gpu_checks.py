"""What every op of a GPU backend must do: agree, repeat itself, keep streams apart, be captured, take little memory.

tests/gpu runs these checks on a GPU. hosted_checks.py and interpreted_checks.py run them on CPU tensors with the same
kernels, where streams are nothing and a captured graph is a function that is called again: that proves the checks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from gpu_data import laid_out
from torch import Tensor, nn

import vqkernels
from vqkernels import dispatch, ops

__all__ = ["CHECKS", "STEPS", "WITHOUT_CUDA", "Place", "given", "run", "without_cuda"]

# On GPUs these have Triton's kernels and none of csrc/cuda.
WITHOUT_CUDA = {"soft_assign", "soft_assign_grad"}


def without_cuda(test: Any) -> bool:
    """Whether a pytest item is about one of them."""
    return hasattr(test, "callspec") and test.callspec.params.get("op") in WITHOUT_CUDA


# Same bits as the reference; the others add in another order, or in float32 where the reference has float64.
EXACT = {"nearest", "residual_nearest", "lookup", "codebook_sum"}
SEARCHES = {"nearest", "residual_nearest"}


class Place:
    """A device and a backend on it; on the CPU what a GPU has besides is stood in for."""

    def __init__(self, backend: str, device: str = "cpu") -> None:
        self.backend, self.device, self.cuda = backend, device, device != "cpu"

    def streams(self, number: int) -> list[AbstractContextManager[Any]]:
        """Contexts in which work goes to streams of its own."""
        if not self.cuda:
            return [contextlib.nullcontext() for _ in range(number)]
        self.wait()
        return [torch.cuda.stream(torch.cuda.Stream()) for _ in range(number)]

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.cuda:
            torch.cuda.synchronize()

    def captured(self, work: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
        """``work`` as a graph: what runs it again, and the tensors that it fills."""
        if not self.cuda:
            results = work()

            def again() -> None:
                for to, new in zip(results, work(), strict=True):
                    to.detach().copy_(new.detach())

            return again, results
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles kernels, asks the tensor cores, fills allocators
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = work()
        return graph.replay, results

    def peak(self, work: Callable[[], object]) -> int:
        """Bytes by which one call raises the allocator's peak; 0 where there is none."""
        work()
        if not self.cuda:
            return 0
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        self.wait()
        peak = torch.cuda.max_memory_allocated() - before
        del result
        return peak


def given(op: str, place: Place, seed: int = 0, sizes: tuple[int, ...] | None = None) -> list[Any]:
    """Arguments of one call without ``backend``; H, B, S, D and K. Odd seeds make channel-first rows."""
    # Three searches in one call: fewer rows, where every thread or program is executed on the host.
    h, b, s, d, k = sizes or ((2, 1, 5, 9, 37) if op == "residual_nearest" else (2, 3, 11, 20, 37))
    generator = torch.Generator().manual_seed(seed)
    layout = "channel_first" if seed % 2 else "rows"
    z, codes = torch.randn(h, b, s, d, generator=generator), torch.randn(h, k, d, generator=generator)
    indices = torch.randint(-1, k, (h, b, s), generator=generator)
    z[:, :, ::4] = torch.gather(codes, 1, indices.clamp(min=0).flatten(1)[..., None].expand(-1, -1, d)).view_as(z)[
        :, :, ::4
    ]
    z = laid_out(z, layout)
    counts = torch.randint(0, 9, (h, k), generator=generator).float()
    soft = [z[:, 0], codes, (indices[:, 0] >= 0) / s]
    says = [torch.randn(size, generator=generator) for size in ((h,), (h, k), (h, s, d), (h, k, d))]
    said = [t if seed % 3 != i // 2 else None for i, t in enumerate(says)]
    arguments: dict[str, list[Any]] = {
        "nearest": [z, codes, ("l2", "cosine", "dot")[seed % 3], "exact"],
        "residual_nearest": [z, [codes, codes[:, : k // 2 + 1] * 0.5, codes * 0.25], seed % 2 == 1],
        "lookup": [codes, indices, seed % 2 == 1, None],
        "codebook_sum": [z, indices, k],
        "ema_update": [counts + 1, codes + 1, codes.clone(), counts, codes * 2, 0.5, 1e-5, seed % 2 == 1],
        "quantize_grad": [torch.randn(h, b, s, d, generator=generator), z, codes, indices, torch.tensor(0.5),
                          ("straight_through", "rotation", "none")[seed % 3], seed % 2 == 1],
        "quantize_output": [z, codes, indices, torch.rand(h, b, s, generator=generator) if seed % 2 else None,
                            True, seed % 2 == 1],
        "soft_assign": [*soft, seed % 2 == 0, 8.0],
        "soft_assign_grad": [*soft, *said, seed % 2 == 0, 8.0],
    }  # fmt: skip

    def there(a: Any) -> Any:
        return [there(e) for e in a] if isinstance(a, list) else a.to(place.device) if isinstance(a, Tensor) else a

    moved: list[Any] = there(arguments[op])
    return moved


def tensors(arguments: Iterable[Any]) -> list[Tensor]:
    """Those among the arguments, those in lists included."""
    found = []
    for a in arguments:
        found += [a] if isinstance(a, Tensor) else tensors(a) if isinstance(a, list) else []
    return found


def run(op: str, arguments: list[Any], backend: str) -> list[Tensor]:
    """The results of one call; of an op that works in place, of copies."""
    if op == "ema_update":
        arguments = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    found = getattr(ops, op)(*arguments, backend)
    found = arguments[:3] if found is None else found
    return [found] if isinstance(found, Tensor) else list(found)


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """The same bits."""
    return all(a.dtype == b.dtype and a.cpu().equal(b.cpu()) for a, b in zip(found, expected, strict=True))


def check_results_are_the_references(place: Place, op: str) -> None:
    # Three of the search are enough where other tests are about it and cost more than here.
    for seed in range(6 if place.cuda or op not in SEARCHES else 3):
        arguments = given(op, place, seed)
        found = run(op, arguments, place.backend)
        expected = run(op, given(op, Place("reference"), seed), "reference")
        assert all(t.device.type == torch.device(place.device).type for t in found)
        if op in EXACT:
            assert same(found, expected), seed
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)


def check_two_runs_have_the_same_bits(place: Place, op: str) -> None:
    # More rows than a block or a chunk of sums has.
    arguments = given(op, place, 1, (1, 2, 350 if place.cuda or op not in SEARCHES else 30, 9, 5))
    first = run(op, arguments, place.backend)
    for _ in range(3 if place.cuda else 1):
        assert same(run(op, arguments, place.backend), first)


def check_streams_do_not_meet(place: Place, op: str) -> None:
    sizes = [(1, 1, 300 + i, 12 + i, 40) for i in range(4)] if place.cuda else [(1, 1, 30 + i, 5, 9) for i in range(2)]
    cases = [given(op, place, i, size) for i, size in enumerate(sizes)]
    expected = [run(op, arguments, place.backend) for arguments in cases]
    found = []
    for _ in range(5 if place.cuda else 1):
        for context, arguments in zip(place.streams(len(cases)), cases, strict=True):
            with context:
                found.append(run(op, arguments, place.backend))
    place.wait()
    for i, results in enumerate(found):
        assert same(results, expected[i % len(cases)])


def check_a_captured_call_follows_its_arguments(place: Place, op: str) -> None:
    static = given(op, place, 2)
    replay, results = place.captured(lambda: run(op, static, place.backend))
    # Of one kind with 2: the same metric, gradient and layout.
    for seed in (8, 14) if place.cuda else (8,):
        for to, new in zip(tensors(static), tensors(given(op, place, seed)), strict=True):
            to.copy_(new)
        replay()
        place.wait()
        assert same(results, run(op, static, place.backend)), seed


def check_memory_is_that_of_rows_and_codes(place: Place, op: str) -> None:
    n, k, d = (20000, 3000, 16) if place.cuda else (9, 7, 5)  # where there is no peak
    arguments = given(op, place, 0, (1, 1, n, d, k))
    results = run(op, arguments, place.backend)
    held = sum(t.numel() * t.element_size() for t in tensors([*results, *arguments]))
    peak = place.peak(lambda: run(op, arguments, place.backend))
    assert peak <= 16 * held + 2**21, f"{peak} bytes beside {held} given and returned; N x K floats are {4 * n * k}"


CHECKS = (
    check_results_are_the_references,
    check_two_runs_have_the_same_bits,
    check_streams_do_not_meet,
    check_a_captured_call_follows_its_arguments,
    check_memory_is_that_of_rows_and_codes,
)


class Model(nn.Module):
    """An encoder, a quantizer and a decoder."""

    def __init__(self, dim: int, codes: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, dim), nn.Linear(dim, 6)
        self.quantizer = vqkernels.VectorQuantizer(codes, dim, channel_dim=-1, **options)

    def forward(self, x: Tensor) -> Tensor:
        out = self.quantizer(self.encoder(x))
        loss: Tensor = (self.decoder(out.quantized) - x).square().mean() + out.loss
        return loss


# A codebook trained by its loss, moving averages, and the rotation trick.
STEPS: dict[str, dict[str, Any]] = {
    "loss": {},
    "averages": {"decay": 0.9},
    "rotation": {"decay": 0.9, "gradient": "rotation"},
}


def _trainer(place: Place, options: dict[str, Any], x: Tensor) -> tuple[Model, Callable[[], list[Tensor]]]:
    torch.manual_seed(7)
    model = Model(8, 16, options).to(place.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def step() -> list[Tensor]:
        optimizer.zero_grad(set_to_none=False)
        loss = model(x)
        loss.backward()
        optimizer.step()
        return [loss]

    return model, step


def check_a_captured_training_step_is_the_eager_one(place: Place, options: dict[str, Any]) -> None:
    """Forward, backward, optimiser and moving averages in one graph, replayed on new batches."""
    batches = torch.randn(3, 19, 6, generator=torch.Generator().manual_seed(1)).to(place.device)
    static = batches[0].clone()
    eager, step = _trainer(place, options, static)
    losses = []
    for batch in batches:
        static.copy_(batch)
        losses.append(step()[0].detach().clone())
    graphed, step = _trainer(place, options, static)
    start = {name: value.clone() for name, value in graphed.state_dict().items()}
    replay, (loss,) = place.captured(step)
    with torch.no_grad():
        for name, value in graphed.state_dict().items():  # what the warm-up has changed
            value.copy_(start[name])
    for batch, expected in zip(batches, losses, strict=True):
        static.copy_(batch)
        replay()
        place.wait()
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(graphed.state_dict(), eager.state_dict(), rtol=1e-6, atol=1e-7)


def check_training_follows_the_cpu(place: Place, options: dict[str, Any]) -> None:
    """The same losses and state as the reference on the CPU, and the same bits in a second run."""
    batches = torch.randn(2, 19, 6, generator=torch.Generator().manual_seed(2))
    states: list[dict[str, Tensor]] = []
    for where in (Place("reference"), place, place):
        x = batches[0].clone().to(where.device)
        model, step = _trainer(where, options, x)
        with vqkernels.use_backend("reference") if where is not place else contextlib.nullcontext():
            losses = [step()[0].detach().cpu().clone() for batch in batches if x.copy_(batch) is x]
        states.append({"losses": torch.stack(losses), **{k: v.cpu() for k, v in model.state_dict().items()}})
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-5)
    assert all(states[1][name].equal(states[2][name]) for name in states[1])


def check_a_training_step_takes_no_matrix(place: Place, options: dict[str, Any]) -> None:
    n, k, d = (65536, 16384, 8) if place.cuda else (9, 16, 8)
    torch.manual_seed(3)
    vq = vqkernels.VectorQuantizer(k, d, channel_dim=-1, **options).to(place.device)
    z = torch.randn(n, d, device=place.device, requires_grad=True)

    def step() -> Tensor:
        out = vq(z)
        (out.quantized.sum() + out.loss).backward()
        return out.loss.detach()

    peak = place.peak(step)
    assert peak < 200 * 2**20, f"{peak / 2**20:.0f} MiB; N x K floats are 4096"


assert set(dispatch.OPS) == {*EXACT, *WITHOUT_CUDA, "ema_update", "quantize_grad", "quantize_output"}
