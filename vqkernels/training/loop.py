"""The training loop: accelerate for devices, precision and processes; everything else is a few lines of torch.

Called by :mod:`vqkernels.cli.train`; :func:`train` is the only entry.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from vqkernels.models import TokenModel, build_model
from vqkernels.training import checkpoint, data, metrics, start
from vqkernels.training.config import TrainConfig, TrainingError, require
from vqkernels.training.process import (
    Interrupt,
    leave_signals_to_the_main_process,
    make_accelerator,
    process_settings,
    seed_step,
)
from vqkernels.training.results import write_results
from vqkernels.training.run_folder import RunFolder
from vqkernels.training.steps import make_step
from vqkernels.training.training_images import open_training_images
from vqkernels.training.watch import warnings_of

__all__ = ["Interrupted", "train"]

EXTRAS = ("accelerate", "matplotlib", "PIL", "safetensors", "torchmetrics", "tqdm")
CROPS_PER_IMAGE = 24


class Interrupted(Exception):
    """Training stopped on request after saving a checkpoint; the message says how to go on."""


def train(
    config: TrainConfig | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train a model and write its run folder (docs/training.md lists the files).

    Args:
        config: what to train; default :class:`TrainConfig`, the demo.
        resume: go on from the checkpoint in ``config.output``; the result is that of an uninterrupted run.
        overwrite: replace a run that already lives in ``config.output``.
        say: receives the lines of text meant for the user (main process only).

    Returns:
        What was written to metrics.json.

    Raises:
        TrainingError: something the user can put right; nothing was written unless training had begun.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was saved.
    """
    config = config or TrainConfig()
    for name in EXTRAS:
        require(name)
    if config.tensorboard:
        require("tensorboard", "tensorboard")
    folder = RunFolder(config.output)
    if resume:
        folder.check_resume(config)
    else:
        folder.check_free(config, overwrite)
    with process_settings(config):
        run = _Run(config, folder, resume, say)
        with Interrupt() as interrupt:
            return run.train(interrupt)


class _StepBatches(torch.utils.data.Sampler[list[int]]):
    """Numbers of the crops of every step; a process takes its share of each micro-batch, whatever their number is."""

    def __init__(self, start: int, config: TrainConfig, rank: int, world: int) -> None:
        self.start, self.config, self.rank = start, config, rank
        self.part = config.batch_size // config.accumulate
        self.share = self.part // world

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.config.steps):
            first = step * self.config.batch_size + self.rank * self.share
            starts = range(first, first + self.config.batch_size, self.part)
            yield [number for start in starts for number in range(start, start + self.share)]


class _Run:
    """One run in one process: everything between the checks and the last file."""

    def __init__(self, config: TrainConfig, folder: RunFolder, resume: bool, say: Callable[[str], None]) -> None:
        self.config, self.folder = config, folder
        self.step, self.seconds = 0, 0.0
        self.history: dict[str, list[dict[str, Any]]] = {"train": [], "held_out": []}
        self.warnings: list[dict[str, Any]] = []
        self.accelerator = make_accelerator(config)
        self.main = self.accelerator.is_main_process
        self.say = say if self.main else lambda line: None
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        if config.batch_size % (self.world * config.accumulate):
            parts = f" times accumulate={config.accumulate}" if config.accumulate > 1 else ""
            raise TrainingError(
                f"batch_size is {config.batch_size}; expected a multiple of the {self.world} processes{parts}"
            )
        self.device: torch.device = self.accelerator.device
        part = config.batch_size // config.accumulate  # of which every process makes its share
        self.images = open_training_images(
            config.data, image_size=config.largest, resize=config.resize, held_out=config.held_out,
            column=config.column, split=config.split, streaming=config.streaming, seed=config.seed, batch_size=part,
            rank=self.rank, world=self.world,
        )  # fmt: skip
        self._report_images()
        seed_step(config.seed, 0)
        try:
            model: TokenModel = build_model(config.model).to(self.device)
        except (ValueError, TypeError) as e:
            raise TrainingError(str(e)) from e
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.init_from is not None and not (resume and folder.checkpoint.exists()):
            start.load_weights_of(config.init_from, self.model)
        self.stepper = make_step(config, self.model, self.accelerator)
        self.window = metrics.Window(self.model.streams, self.device, self.stepper.terms)
        scaler_state = self._restore() if resume else None
        self.stepper.prepare()
        if scaler_state and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(scaler_state)
        size = config.image_size
        self.eval_crops, self.eval_names = data.evaluation_crops(self.images.held_out, size, CROPS_PER_IMAGE)
        if self.main:
            self._open_folder(resume)
        self.accelerator.wait_for_everyone()

    def _open_folder(self, resume: bool) -> None:
        if resume:
            self.folder.sweep()
            self.folder.write_config(self.config)
        else:
            self.folder.start(self.config)

    def _report_images(self) -> None:
        images = self.images
        for name, reason in images.skipped[:20]:
            self.say(f"skipped {name}: {reason}")
        if len(images.skipped) > 20:
            self.say(f"skipped {len(images.skipped) - 20} more")
        what = "built-in photographs" if self.config.data is None else f"images in {self.config.data}"
        self.say(f"{what}: {len(images.train)} to train on, {len(images.held_out)} held out")

    # Checkpoints

    def _restore(self) -> dict[str, Any] | None:
        path = self.folder.checkpoint
        if not path.exists():
            self.say(f"no checkpoint in {self.folder.path} yet: starting at step 0")
            return None
        tensors, state = checkpoint.load_checkpoint(path)
        try:
            step, history, seconds = int(state["step"]), state["history"], float(state["seconds"])
            fingerprint, scaler = state["images"], state["scaler"]
            warnings = list(state.get("warnings", ()))
        except (KeyError, TypeError, ValueError, RuntimeError) as e:
            raise TrainingError(f"checkpoint {path} is damaged: {e!r}") from e
        self.stepper.restore(tensors, path, step)
        try:
            self.window.restore(tensors)
        except (KeyError, RuntimeError) as e:
            raise TrainingError(f"checkpoint {path} is damaged: {e!r}") from e
        if fingerprint != self._fingerprint():
            raise TrainingError(f"cannot resume {self.folder.path}: its images have changed since the checkpoint")
        if step > self.config.steps:
            raise TrainingError(f"steps is {self.config.steps}; the checkpoint {path} is already at step {step}")
        self.step, self.history, self.seconds, self.warnings = step, history, seconds, warnings
        if not self.main:  # the main process holds the sums of all
            self.window.take()
        self.say(f"resuming at step {step}")
        return scaler if isinstance(scaler, dict) else None

    def _fingerprint(self) -> list[str]:
        return [self.images.train.fingerprint(), self.images.held_out.fingerprint()]

    def _save(self) -> None:
        self.window.reduce(self.accelerator)
        self._stop_if(self.main and not bool(self.window.sums.isfinite().all()))
        if not self.main:
            return
        tensors = self.stepper.tensors() | self.window.tensors()
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "seconds": self._elapsed(),
            "config": self.config.to_dict(),
            "images": self._fingerprint(),
            "history": self.history,
            "warnings": self.warnings,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        checkpoint.save_checkpoint(self.folder.checkpoint, tensors, state)

    # The loop

    def train(self, interrupt: Interrupt) -> dict[str, Any]:
        config, tqdm = self.config, require("tqdm").tqdm
        self.began = time.perf_counter()
        loader = torch.utils.data.DataLoader(
            data.Crops(self.images.train, self._sides(), config.seed, config.shuffled_share),
            batch_sampler=_StepBatches(self.step, config, self.rank, self.world),
            num_workers=config.workers,
            worker_init_fn=leave_signals_to_the_main_process,
            pin_memory=self.device.type == "cuda",
        )
        progress = tqdm(
            total=config.steps, initial=self.step, disable=not self.main, unit="step", dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 15, desc="training",
        )  # fmt: skip
        with progress, self._tensorboard() as board:
            for batch in loader:
                self._step(batch)
                progress.update()
                self._after_step(interrupt, progress, board)
        return self._finish()

    def _sides(self) -> int | data.StepSides:
        config = self.config
        return data.StepSides(config.sizes, config.seed, config.batch_size) if config.sizes else config.image_size

    def _step(self, batch: Tensor) -> None:
        seed_step(self.config.seed, self.step + 1)
        images = metrics.to_unit(batch, self.device).contiguous(memory_format=torch.channels_last)
        terms, counts = self.stepper.run(images, self.step)
        self.step += 1
        self.window.add(terms, counts)

    def _after_step(self, interrupt: Interrupt, progress: Any, board: Any) -> None:
        config, last = self.config, self.step == self.config.steps
        if self.step % config.log_every == 0 or last:
            self._log(progress, board)
        evaluated = self.step % config.eval_every == 0 or last
        if evaluated and self.main:
            line = {"step": self.step, **metrics.evaluate(
                self.stepper.evaluated, self.eval_crops, self.eval_names, self.device, config.batch_size
            )}  # fmt: skip
            self.history["held_out"].append(line)
            self._write_board(board, "held_out", line)
            progress.write(
                f"step {self.step}: held-out PSNR {line['psnr']:.2f} dB, SSIM {line['ssim']:.3f}, "
                f"sharpness {line['sharpness']:.2f}, usage {line['usage']:.0%}, perplexity {line['perplexity']:.0f}",
                file=sys.stderr,
            )
        stopping = self._agree(interrupt.requested)
        # Before the checkpoint: whoever resumes from it must find the best model of the evaluations that it knows of.
        if evaluated and not last and self.main:
            self._write_results(finished=False)
        if self.step % config.checkpoint_every == 0 or last or stopping:
            self._save()
        self.accelerator.wait_for_everyone()
        if stopping and not last:
            raise Interrupted(
                f"stopped at step {self.step} of {config.steps}; go on with: "
                f"vqkernels train --output {self.folder.path} --resume"
            )

    def _agree(self, requested: bool) -> bool:
        """Whether to stop now; with several processes all find out at the same step."""
        if self.world > 1 and self.step % self.config.log_every:
            return False
        return self._any(requested)

    def _log(self, progress: Any, board: Any) -> None:
        self.window.reduce(self.accelerator)
        failed = False
        if self.main:
            line = {"step": self.step, **self.window.take()}
            failed = not math.isfinite(line["loss"])
            self.history["train"].append(line)
            for warning in warnings_of(self.history["train"], self.warnings):
                self.warnings.append(warning)
                progress.write(f"step {self.step}: warning: {warning['message']}", file=sys.stderr)
            self._write_board(board, "train", line)
            progress.set_postfix_str(
                f"recon {line['reconstruction']:.4f}, commit {line['commitment']:.4f}, "
                f"PSNR {line['psnr']:.1f} dB, usage {line['usage']:.0%}, perplexity {line['perplexity']:.0f}"
            )
        self._stop_if(failed)

    def _stop_if(self, failed: bool) -> None:
        """Raise in all processes if the main one has seen a loss that is not finite."""
        if self._any(failed):
            kept = (
                f"; the checkpoint {self.folder.checkpoint} is from before" if self.folder.checkpoint.exists() else ""
            )
            raise TrainingError(f"the loss is not finite at step {self.step}: try --lr below {self.config.lr}{kept}")

    def _any(self, here: bool) -> bool:
        if self.world == 1:
            return here
        return bool(self.accelerator.reduce(torch.tensor(float(here), device=self.device), "sum").item())

    # TensorBoard

    def _tensorboard(self) -> Any:
        if not (self.config.tensorboard and self.main):
            return nullcontext()
        writer = require("torch.utils.tensorboard", "tensorboard").SummaryWriter
        return writer(str(self.folder.tensorboard), purge_step=self.step + 1)

    @staticmethod
    def _write_board(board: Any, group: str, line: dict[str, Any]) -> None:
        if board is not None:
            for name, value in line.items():
                if name != "step" and isinstance(value, float):
                    board.add_scalar(f"{group}/{name}", value, line["step"])

    # Results

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self.began

    def _write_results(self, finished: bool) -> dict[str, Any]:
        return write_results(
            self.folder,
            self.config,
            self.stepper.evaluated,
            self.images,
            self.history,
            warnings=self.warnings,
            finished=finished,
            processes=self.world,
            seconds=self._elapsed(),
        )

    def _finish(self) -> dict[str, Any]:
        result: dict[str, Any] = {}
        if self.main:
            result = self._write_results(finished=True)
            last = result["final"]
            self.say(
                f"held-out: PSNR {last['psnr']:.2f} dB (pooled {last['psnr_pooled']:.2f}), SSIM {last['ssim']:.3f}, "
                f"sharpness {last['sharpness']:.2f}, codebook usage {last['usage']:.1%}, "
                f"perplexity {last['perplexity']:.0f} of {self.model.streams[0].codes}\n"
                f"{result['timing']['seconds']:.0f} s on {result['environment']['device']}, "
                f"backend {result['environment']['backend']}\n"
                f"wrote {self.folder.samples}, {self.folder.curves}, {self.folder.metrics}, {self.folder.model}"
            )
        self.accelerator.wait_for_everyone()
        return json.loads(json.dumps(result)) if result else result
