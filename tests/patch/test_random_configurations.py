"""Options of vector-quantize-pytorch drawn at random together: the same results, unless the original misses a code."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import vector_quantize_pytorch as library
from parity import assert_same_state, assert_same_step, pair, step
from torch import Tensor, nn
from vector_quantize_pytorch import vector_quantize_pytorch as module

SEEDS = range(24)
# option -> how often it is drawn, and its values
OPTIONS: dict[str, tuple[float, list[Any]]] = {
    "decay": (0.3, [0.5, 0.99]),
    "eps": (0.2, [1e-3, 1e-8]),
    "kmeans_init": (0.3, [True]),
    "kmeans_iters": (0.3, [1, 3]),
    "threshold_ema_dead_code": (0.3, [1, 2]),
    "use_cosine_sim": (0.25, [True]),
    "commitment_weight": (0.3, [0.0, 0.25]),
    "freeze_codebook": (0.1, [True]),
    "stochastic_sample_codes": (0.1, [True]),
    "ema_update": (0.15, [False]),
    "manual_ema_update": (0.1, [True]),
    "learnable_codebook": (0.2, [True]),
    "affine_param": (0.15, [True]),
    "orthogonal_reg_weight": (0.1, [0.5]),
    "codebook_diversity_loss_weight": (0.1, [0.1]),
    "commitment_use_cross_entropy_loss": (0.1, [True]),
    "route_gradients_to_input": (0.15, [False]),
    "return_zeros_for_masked_padding": (0.2, [False]),
}
ALONE = {
    "codebook_dim": (0.3, [2, 4]),
    "heads": (0.3, [2, 3]),
    "separate_codebook_per_head": (0.4, [True]),
    "rotation_trick": (0.5, [True, False]),
    "layernorm_after_project_in": (0.2, [True]),
    "accept_image_fmap": (0.2, [True]),
}
# With rotation a residual of zero is divided by its rounding.
LEVELS = {
    "codebook_dim": (0.3, [2, 4]),
    "shared_codebook": (0.3, [True]),
    "quantize_dropout": (0.4, [True]),
    "quant_grad_frac": (0.2, [0.3]),
    "beam_size": (0.15, [2]),
    "rotation_trick": (1.0, [False]),
}
SIM = {"rotation_trick": (0.5, [False]), "commitment_weight": (0.3, [0.5]), "frozen_codebook_dim": (0.4, [3])}
CALLS: dict[str, tuple[float, list[Any]]] = {"mask": (0.3, [True]), "freeze_codebook": (0.15, [True])}


class Misses:
    """How many rows the library's distances gave a code that is not the nearest in float64."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found = 0
        for name in ("cdist", "einsum"):
            monkeypatch.setattr(module, name, self._watch(getattr(module, name)))

    def _watch(self, function: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Tensor:
            out: Tensor = function(*args, **kwargs)
            cosine = args[0] == "h n d, h c d -> h n c" if isinstance(args[0], str) else None
            if cosine is not False:
                x, codes = (t.detach().double() for t in args[-2:])
                exact = x @ codes.mT if cosine else -torch.cdist(x, codes, compute_mode="donot_use_mm_for_euclid_dist")
                chosen = out if cosine else -out
                self.found += int((exact.argmax(-1) != chosen.detach().argmax(-1)).sum())
            return out

        return watched


def drawn(generator: random.Random, table: dict[str, tuple[float, list[Any]]]) -> dict[str, Any]:
    return {name: generator.choice(values) for name, (share, values) in table.items() if generator.random() < share}


def build(generator: random.Random) -> tuple[str, dict[str, Any]]:
    """A class and options that it takes."""
    while True:
        name = generator.choice(["VectorQuantize"] * 3 + ["ResidualVQ"] * 2 + ["GroupedResidualVQ", "SimVQ"])
        options = {"dim": generator.choice([4, 6]), "codebook_size": generator.choice([2, 16, 33])}
        options |= drawn(generator, SIM) if name == "SimVQ" else drawn(generator, OPTIONS)
        if name == "VectorQuantize":
            options |= drawn(generator, ALONE)
        elif name != "SimVQ":
            options |= drawn(generator, LEVELS) | {"num_quantizers": generator.choice([1, 3])}
            options |= {"groups": 2} if name == "GroupedResidualVQ" else {}
        options |= {"ema_update": False} if options.get("learnable_codebook") else {}
        try:
            getattr(library, name)(**options)
        except (AssertionError, TypeError):
            continue
        return name, options


@pytest.mark.parametrize("seed", SEEDS)
def test_three_training_steps_and_evaluation(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(seed)
    name, options = build(generator)
    call = {} if name == "SimVQ" else drawn(generator, CALLS)
    original, twin = pair(lambda: getattr(library, name)(**options))
    misses = Misses(monkeypatch)
    masked = call.pop("mask", False) and not (options.keys() & {"accept_image_fmap", "heads", "codebook_dim"})
    for i, training in enumerate((True, True, True, False)):
        for model in (original, twin):
            model.train(training)
        n = generator.choice([3, 17, 30])
        image = options.get("accept_image_fmap", False)
        shape = (2, options["dim"], 3, 5) if image else (2, n, options["dim"])
        x = torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + i)).requires_grad_(i != 1)
        if masked:
            call["mask"] = torch.arange(n) < torch.tensor([[n], [n // 2]])
        try:
            step(copy.deepcopy(original), x, i, call)
        except (RuntimeError, IndexError) as crash:  # options that upstream never ran together
            with pytest.raises(type(crash)):
                step(twin, x, i, call)
            return
        compare(original, twin, x, i, call, misses, f"{name} {options} {call}")
        if misses.found:
            return
        twin.load_state_dict(original.state_dict())  # rounding must not add up over the steps


def compare(
    original: nn.Module, twin: nn.Module, x: Tensor, seed: int, call: dict[str, Any], misses: Misses, what: str
) -> None:
    try:
        assert_same_step(original, twin, x, seed, call, 1e-4)
        assert_same_state(original, twin)
    except AssertionError as error:
        if not misses.found:
            raise AssertionError(f"{what}: {error}") from error
