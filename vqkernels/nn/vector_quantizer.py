"""``VectorQuantizer``: a codebook with its options, learned by gradient or by moving averages.

Called by users and by :mod:`vqkernels.models`; the arithmetic is in :mod:`vqkernels.functional` and in the ops.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vqkernels import _arguments as arguments
from vqkernels.functional import VQOutput, lookup_rows, quantize_rows
from vqkernels.nn._layout import Layout, check_channel_dim
from vqkernels.nn.affine import AffineCodes
from vqkernels.nn.assignment import soft_usage
from vqkernels.nn.codebook_init import INITS, random_codes_
from vqkernels.nn.learning import LearnedCodebook, in_backward
from vqkernels.nn.projections import project_pair
from vqkernels.nn.propagation import propagate
from vqkernels.nn.regularizers import orthogonality
from vqkernels.nn.sampling import sample_codes

__all__ = ["VectorQuantizer"]

_WEIGHTS = ("orthogonal_weight", "sample_entropy_weight", "batch_entropy_weight", "sample_temperature")
_TEMPERATURES = ("entropy_temperature", "softmax_temperature")
_GRADIENTS = ("straight_through", "rotation", "none", "softmax")


class VectorQuantizer(LearnedCodebook):
    """Replace every vector of a feature map by its nearest code, and learn the codes.

    With ``decay=None`` the codebook is a parameter, trained by the codebook loss (van den Oord et al. 2017, eq. 3).
    With a ``decay`` it is a buffer that follows the moving average of the vectors that chose it (appendix A.1), and
    ``loss`` holds the commitment term only. Search and losses run in float32 whatever autocast says.

    Args:
        num_embeddings: number of codes K.
        embedding_dim: dims D of a code.
        commitment_cost: weight beta of the commitment loss.
        decay: of the moving averages, in (0, 1); ``None`` for a codebook trained by gradient.
        metric: ``"l2"``, ``"cosine"`` or ``"dot"``.
        heads: independent codebooks; the input has ``heads * embedding_dim`` channels, head by head.
        gradient: ``"straight_through"``, ``"rotation"`` or ``"none"``, see :func:`vqkernels.vector_quantize`; or
            ``"softmax"`` (IBQ): the gradient of softmax(score / ``softmax_temperature``) over all codes, which moves
            every code in every step (:mod:`vqkernels.nn.propagation`).
        softmax_temperature: of that softmax.
        init: ``"uniform"`` U(-1/K, 1/K), ``"normal"`` N(0, 1), or ``"kmeans"``: k-means on the first training batch
            (until then the codes are the uniform ones). Under ``torch.compile`` call :meth:`initialize` before.
        dead_code_ratio: a code whose average usage is below this share of the mean usage is moved to a vector of the
            current batch; 0 for never.
        channel_dim: 1 for (B, C, ...), -1 for (..., C).
        normalize: compare by angle and output unit vectors, losses between unit vectors, as LlamaGen's ``l2_norm``
            and ``use_cosine_sim`` do. Default: ``metric == "cosine"``; ``False`` with ``"cosine"`` compares by angle
            but outputs the raw codes, as DAC does.
        eps: of the Laplace smoothing of the moving averages.
        usage_decay: of the average usage of a gradient codebook, for ``dead_code_ratio``.
        kmeans_iters: iterations of ``init="kmeans"``.
        seed: of ``init="kmeans"``.
        sync: sum statistics over all processes when ``torch.distributed`` runs: exactly one all-reduce per training
            step, on every rank, also with an empty batch.
        input_dim: channels of the input, if a linear layer is to take them to ``heads * embedding_dim`` and another one
            back; the losses compare what was projected.
        projection_bias: whether these layers have a bias.
        legacy: put ``commitment_cost`` on the codebook loss instead, ``loss = commitment_cost * codebook_loss +
            commitment_loss``, as taming-transformers and diffusers do unless told otherwise.
        affine: reparametrise the codes by the mean and spread of the batch (:mod:`vqkernels.nn.affine`).
        orthogonal_weight: of :func:`vqkernels.nn.orthogonality` of the codebook in ``loss``; gradient codebooks only.
        sample_entropy_weight, batch_entropy_weight: of the two :func:`vqkernels.nn.assignment_entropies` in ``loss``
            while training: the first is added (rows that are sure of their code), the second subtracted (all codes in
            use). LlamaGen's ``entropy_loss_ratio`` is both alike, with ``entropy_temperature=0.005``.
        entropy_temperature: of the softmax in them.
        sample_temperature: in training draw codes with probability softmax(score / temperature) instead of taking the
            nearest, where the score is minus the squared distance or the similarity; 0 for the nearest. Eager only.
        device: of the parameters and buffers.

    State (``state_dict``): ``codebook`` (K, D), or (H, K, D) with several heads; ``code_counts`` int64 (K,) or (H, K)
    since :meth:`reset_usage`; ``steps`` and ``initialized``; ``cluster_size`` (K,) with a decay or a dead-code ratio;
    ``embed_avg`` (K, D) with a decay; ``project_in.*`` and ``project_out.*`` with an ``input_dim``; ``affine.*`` with
    ``affine``. Checkpoints of other libraries load too (:mod:`vqkernels.nn.checkpoints`).

    Shape:
        input (B, C, ...) or (..., C), C = ``input_dim`` or ``heads * embedding_dim``; (N, C) either way. ``quantized``
        has the input's shape, dtype and memory layout; ``indices`` (B, ...), with a last dim of H if there are several
        heads.

    A vector with NaN or Inf is quantized as :func:`vqkernels.nearest` says and never enters a statistic. In eval mode
    and while frozen no buffer changes. ``.half()`` and ``.bfloat16()`` leave the codebook in float32.

    Example:
        >>> import torch, vqkernels
        >>> vq = vqkernels.VectorQuantizer(512, 64, decay=0.99)
        >>> out = vq(torch.randn(2, 64, 8, 8))
        >>> out.quantized.shape, out.indices.shape
        (torch.Size([2, 64, 8, 8]), torch.Size([2, 8, 8]))
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        commitment_cost: float = 0.25,
        decay: float | None = None,
        metric: str = "l2",
        heads: int = 1,
        gradient: str = "straight_through",
        init: str = "uniform",
        dead_code_ratio: float = 0.0,
        channel_dim: int = 1,
        normalize: bool | None = None,
        eps: float = 1e-5,
        usage_decay: float = 0.99,
        kmeans_iters: int = 10,
        seed: int = 0,
        sync: bool = True,
        input_dim: int | None = None,
        projection_bias: bool = True,
        legacy: bool = False,
        affine: bool = False,
        orthogonal_weight: float = 0.0,
        sample_entropy_weight: float = 0.0,
        batch_entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
        sample_temperature: float = 0.0,
        softmax_temperature: float = 1.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        arguments.check_count("num_embeddings", num_embeddings)
        arguments.check_count("embedding_dim", embedding_dim)
        arguments.check_count("heads", heads)
        arguments.check_number("commitment_cost", commitment_cost)
        arguments.check_number("dead_code_ratio", dead_code_ratio, high=1.0)
        self.orthogonal_weight, self.sample_temperature = orthogonal_weight, sample_temperature
        self.sample_entropy_weight, self.batch_entropy_weight = sample_entropy_weight, batch_entropy_weight
        self.entropy_temperature, self.softmax_temperature = entropy_temperature, softmax_temperature
        for name in (*_WEIGHTS, *_TEMPERATURES):
            arguments.check_number(name, getattr(self, name))
            if name in _TEMPERATURES and getattr(self, name) == 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a positive number")
        arguments.check_number("eps", eps)
        arguments.check_integer("kmeans_iters", kmeans_iters, 0)
        arguments.check_integer("seed", seed)
        for name, value in (("decay", 0.5 if decay is None else decay), ("usage_decay", usage_decay)):
            arguments.check_number(name, value)
            if not 0 < value < 1:
                raise ValueError(f"{name} is {value!r}; expected a number in (0, 1)")
        arguments.check_choice("metric", metric)
        arguments.check_choice("gradient", gradient, _GRADIENTS)
        arguments.check_choice("init", init, INITS)
        check_channel_dim(channel_dim)
        if decay is not None and (legacy or orthogonal_weight > 0):
            name, found = ("legacy", legacy) if legacy else ("orthogonal_weight", orthogonal_weight)
            raise ValueError(f"{name} is {found!r} and decay {decay!r}; expected decay=None: a trained codebook")
        if affine and (metric != "l2" or normalize):
            raise ValueError(f"affine is True with metric {metric!r}; expected 'l2' without normalize")
        self.num_embeddings, self.embedding_dim, self.heads = num_embeddings, embedding_dim, heads
        self.commitment_cost, self.decay, self.eps, self.usage_decay = commitment_cost, decay, eps, usage_decay
        self.metric, self.gradient, self.channel_dim = metric, gradient, channel_dim
        self._layout = Layout(heads, embedding_dim, channel_dim)
        self.normalize = metric == "cosine" if normalize is None else normalize
        self.init, self.kmeans_iters, self.seed, self.sync = init, kmeans_iters, seed, sync
        self.dead_code_ratio = dead_code_ratio
        self.input_dim, self.legacy = input_dim, legacy
        self._make_state(device)
        self.project_in, self.project_out = project_pair(
            input_dim, heads * embedding_dim, bias=projection_bias, channel_dim=channel_dim, device=device
        )
        self.affine = AffineCodes(heads, embedding_dim, sync=sync, device=device) if affine else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the codebook and the projections anew from torch's generator and forget all statistics."""
        random_codes_(self.codebook, self.init)
        for module in (self.project_in, self.project_out, self.affine):
            if module is not None:
                module.reset_parameters()
        with torch.no_grad():
            if self.decay is not None and self.normalize:
                self.codebook.copy_(F.normalize(self.codebook, dim=-1))
            self._set_statistics(None)
            self.code_counts.zero_()
            self.steps.zero_()
            self.initialized.fill_(self.init != "kmeans")
        self._waiting = self.init == "kmeans"

    def extra_repr(self) -> str:
        """The options that differ from the defaults."""
        words = [str(self.num_embeddings), str(self.embedding_dim)]
        defaults: dict[str, object] = {
            "decay": None,
            "metric": "l2",
            "heads": 1,
            "gradient": "straight_through",
            "init": "uniform",
        }
        defaults |= {"input_dim": None, "legacy": False} | dict.fromkeys(_WEIGHTS, 0.0)
        defaults |= {"dead_code_ratio": 0.0, "channel_dim": 1, "normalize": self.metric == "cosine"}
        words.append(f"commitment_cost={self.commitment_cost}")
        words += [f"{k}={getattr(self, k)!r}" for k, v in defaults.items() if getattr(self, k) != v]
        return ", ".join(words)

    # -- forward -------------------------------------------------------------------------------------------------------

    def forward(
        self,
        z: Tensor,
        mask: Tensor | None = None,
        *,
        lens: Tensor | None = None,
        weights: Tensor | None = None,
        code_weights: Tensor | None = None,
    ) -> VQOutput:
        """Quantize ``z``.

        Args:
            z: (B, C, ...) or (..., C), C = ``input_dim`` or heads * embedding_dim.
            mask: bool (B, ...), True for valid positions; the others get index -1 and zeros and count nowhere. A step
                without a valid position in any process changes no statistic.
            lens: integers (B,) instead of a mask: how many positions of (B, C, T) or (B, T, C) are valid.
            weights: (B, ...), how much each position counts in the moving averages; not a gradient's weight.
            code_weights: (K,) or (H, K), scales the step of each code's moving averages; 0 keeps a code where it is.

        Returns:
            :class:`vqkernels.VQOutput`; ``loss`` holds the regularisers too.

        Raises:
            ValueError, TypeError: shapes, dtype or device do not fit.
        """
        arguments.check_float_tensor("z", z)
        if lens is not None:
            mask = self._layout.lens_mask(lens, z, mask)
        if mask is not None and (self.project_in is not None or self.normalize):
            z = self._layout.blank(mask, z)
        inside = self._inside(z)
        rows, valid = self._rows(inside, mask)
        row_weights = None if weights is None else self._layout.weights(weights, inside, rows)
        steps = None if code_weights is None else self._code_weights(code_weights)
        learning = self.training and not self.frozen and not in_backward()
        if learning and self._waiting and (arguments.has_values(rows) or torch.compiler.is_compiling()):
            self._start(rows, valid)
        given, live = self._codes(learning)
        if self.affine is not None:
            if learning:
                self.affine.update(rows.detach(), valid, given.detach())
            given, live = self.affine(given), None
        codes, search = self._unit(given), None
        if self.normalize:
            # Cosine compares what was given: an angle does not depend on lengths, and rounded unit vectors would.
            search = (rows, given if live is None else live) if self.metric == "cosine" else None
            rows = F.normalize(rows if rows.dtype == torch.float64 else rows.float(), dim=-1)
        chosen = None
        if self.training and self.sample_temperature > 0:
            chosen = sample_codes(rows, codes, self.metric, self.sample_temperature)
        soft = self.gradient == "softmax"
        gradient = "none" if soft else self.gradient
        live = live if codes is given else None
        out = quantize_rows(
            rows, codes, metric=self.metric, gradient=gradient, mask=valid, search=search, live=live, chosen=chosen
        )
        if soft and torch.is_grad_enabled():
            values = propagate(rows, codes, out.indices, self.metric, self.softmax_temperature)
            out = out._replace(quantized=values.to(rows.dtype))
        if learning:
            with torch.no_grad():
                found = rows.detach() if self.affine is None else self.affine.inverse(rows.detach())
                counted = torch.where(self._finite(rows, out.score, chosen), out.indices, -1)
                self._learn(found, counted, row_weights, steps, masked=valid is not None)
        loss = self._loss(out.codebook_loss, out.commitment_loss)
        if self.orthogonal_weight > 0:
            loss = loss + self.orthogonal_weight * orthogonality(given)
        if self.training and (self.sample_entropy_weight > 0 or self.batch_entropy_weight > 0):
            sample, batch = soft_usage(rows, codes, self.metric, self.entropy_temperature, valid)
            loss = loss + self.sample_entropy_weight * sample - self.batch_entropy_weight * batch
        indices = self._layout.indices(out.indices, inside.shape)
        quantized = self._layout.output(out.quantized.to(inside.dtype), inside.shape)
        quantized = self._outside(self._layout.settle(quantized, indices), z, mask)
        return VQOutput(quantized, indices, loss, out.codebook_loss, out.commitment_loss)

    def _loss(self, codebook_loss: Tensor, commitment_loss: Tensor) -> Tensor:
        if self.decay is not None:
            return self.commitment_cost * commitment_loss
        if self.legacy:
            return torch.add(commitment_loss, codebook_loss, alpha=self.commitment_cost)
        return torch.add(codebook_loss, commitment_loss, alpha=self.commitment_cost)

    def _inside(self, z: Tensor) -> Tensor:
        """What is quantized: ``z``, or its projection in float32."""
        if self.project_in is None:
            return z
        inside: Tensor = self.project_in(z)
        return inside if inside.dtype == torch.float64 else inside.float()

    def _outside(self, quantized: Tensor, z: Tensor, mask: Tensor | None) -> Tensor:
        """The inverse of :meth:`_inside`; a bias must not leak into masked positions."""
        if self.project_out is None:
            return quantized
        out: Tensor = self.project_out(quantized).to(z.dtype)
        first = self.channel_dim == 1 and z.dim() > 2
        return out if mask is None else torch.where(mask.unsqueeze(1 if first else -1), out, 0.0)

    def codes_to_output(self, indices: Tensor) -> Tensor:
        """What :meth:`forward` outputs for these indices: float32, channels where the input has them.

        Args:
            indices: integers (B, ...), with a last dim of H if there are several heads; -1 gives zeros.

        Raises:
            ValueError, TypeError: shape or dtype do not fit.
        """
        positions, shape = self._layout.positions(indices)
        first = self.channel_dim == 1 and len(shape) > 2
        codes = self._as_codes(self.codebook)
        codes = self._unit(codes if self.affine is None else self.affine(codes))
        values = self._layout.output(lookup_rows(codes, positions, first), shape)
        if self.project_out is None:
            return values
        known = (indices >= 0) if self.heads == 1 else (indices >= 0).any(-1)
        return self._outside(values, values, known)

    def _rows(self, z: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``z`` as (H, B, S, D) and the mask as (H, B, S), checked."""
        self._layout.check(z, self.codebook)
        rows = self._layout.rows(z)
        return rows, None if mask is None else self._layout.mask(mask, z, rows)

    def _code_weights(self, code_weights: Tensor) -> Tensor:
        """Checked weights of codes as (H, K) float32."""
        arguments.check_float_tensor("code_weights", code_weights)
        each, all_heads = (self.num_embeddings,), (self.heads, self.num_embeddings)
        if tuple(code_weights.shape) not in (each, all_heads):
            raise ValueError(
                f"code_weights has shape {arguments.shape_of(code_weights)}; expected {each} or {all_heads}"
            )
        if code_weights.device != self.codebook.device:
            raise ValueError(
                f"code_weights is on {code_weights.device}, the codebook on {self.codebook.device}; expected one device"
            )
        if self._pooling:
            raise ValueError("code_weights is given inside accumulating(), which makes one update; expected None")
        return code_weights.detach().expand(all_heads).float()

    def _unit(self, codes: Tensor) -> Tensor:
        """The codes that are output; an EMA codebook holds unit vectors already."""
        return F.normalize(codes, dim=-1) if self.normalize and self.decay is None else codes

    def _finite(self, rows: Tensor, score: Tensor, chosen: Tensor | None) -> Tensor:
        """Rows that may enter a statistic; the search's score tells already, a drawn code does not."""
        if chosen is not None:
            return rows.isfinite().all(-1)
        # Not isfinite(), which is several kernels on a GPU; a distance has no sign.
        return (score if self.metric == "l2" else score.abs()) < torch.inf

    def initialize(self, z: Tensor, mask: Tensor | None = None) -> None:
        """k-means on ``z`` (as in :meth:`forward`), whatever ``init`` is; all processes must call.

        Raises:
            ValueError: there is no finite vector to start from.
        """
        rows, valid = self._rows(self._inside(z), mask)
        if not arguments.has_values(rows):
            raise ValueError("z is a meta or fake tensor; expected one with values for k-means")
        if not self._start(rows, valid):
            raise ValueError(f"z has shape {arguments.shape_of(z)} and no finite, valid vector; expected at least one")
