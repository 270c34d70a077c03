"""The trainer: any number of processes, adversarial or not, resumed exactly.

All randomness of a step is a function of the seed and the number of the step, or part of the
checkpoint, and the losses, noise and statistics of several processes are those of one process with
all of the batch. So a run that is interrupted anywhere and resumed gives the same weights as one
that was not, and two processes give what one gives with twice the batch, both up to rounding.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..config import ConfigError, parse_model
from ..media.files import atomic_output
from ..models import Autoencoder, build_model
from ..quantizers import VP, NotFiniteError
from ..recipe import AudioRecipe, Recipe
from ..usage import LARGEST, CodebookUsage
from .adversarial import (
    discriminator_loss,
    generator_losses,
    gradient_penalty,
    winning_chance,
)
from .balancer import Balancer
from .checkpoints import (
    CheckpointError,
    averaged_weights,
    brief,
    checkpoint_path,
    checkpoints,
    load_newest,
    load_weights,
    optimizer_tensors,
    prune,
    restore_optimizer,
    save_checkpoint,
)
from .hardware import (
    TrainingError,
    choose_precision,
    compile_options,
    deferred_interrupt,
    loader_workers,
    make_accelerator,
)
from .log import Clock, RunLog, cut_metrics, write_readme
from .optim import (
    build_discriminator_optimizer,
    build_optimizers,
    learning_rate,
    set_learning_rate,
)
from .precision import Network, find_fault
from .selection import Selection, evaluated
from .task import Task

LATENTS_PER_CODE = 64  # that a codebook is made of after training
STOP_SECONDS = 5.0  # that a run which is stopped waits for evaluations under way
FINAL_SECONDS = 1800.0  # that one which has ended does
LISTENING_ITERATIONS = 5  # of k-means, for a codebook that is only evaluated
PENALTY_EVERY = 4  # of the discriminators' updates
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """Trains one recipe in one run folder.

    The folder holds README.md and recipe.json, `checkpoints/` (model, averaged weights, optimisers,
    discriminators), `best.safetensors`, metrics.jsonl and TensorBoard events.

    Args:
        recipe: what to train.
        folder: the run; created. An existing run is resumed if its recipe trains the same model.
        init_from: model.safetensors to start from, for a new run.

    Raises:
        TrainingError, CheckpointError, DataError, EvaluationError, PerceptualError: what the recipe
            asks for is not there; it trains the decoder alone, and there are no weights for the
            rest.
    """

    def __init__(self, recipe: Recipe, folder: Path, *, init_from: Path | None = None) -> None:
        self.recipe = recipe
        self.folder = folder
        self.accelerator = make_accelerator(recipe)
        self.device = self.accelerator.device
        self.main = self.accelerator.is_main_process
        self.notes: list[str] = []  # for whoever starts the run
        found = self._find_checkpoint()
        self.precision = recipe.train.precision
        if self.precision == "auto" and found is not None:
            self.precision = str(found[1].get("precision"))
        self.precision = choose_precision(self.precision, self.accelerator)
        self.task = make_task(recipe)
        if recipe.eval.data is not None and self.main:
            self.task.held_out().find()  # before anything that takes long
        torch.manual_seed(recipe.train.seed)
        self.model = build_model(recipe.model).to(self.device).train()
        left: list[str] = []
        if init_from is not None and found is not None:
            self.notes.append(f"the run goes on: {init_from} is not used")
        elif init_from is not None:
            left = load_weights(self.model, init_from)
            if left:
                self.notes.append(
                    f"{init_from} has another quantizer: {', '.join(left)} begin as they were drawn"
                )
        self._decoder_only = recipe.train.decoder_only
        if self._decoder_only:
            if found is None and init_from is None:
                raise TrainingError("train.decoder_only needs weights to start from: --init-from")
            if left:
                raise TrainingError(f"train.decoder_only: {init_from} has another quantizer")
            if found is None and not self.model.quantizer.fitted:
                raise TrainingError(f"train.decoder_only: {init_from} has no codebook")
            for part in (self.model.encoder, self.model.quantizer):
                part.requires_grad_(False)
            self.model.quantizer.eval()
        self.average = {k: p.detach().clone() for k, p in self.model.named_parameters()}
        self.optimizers = build_optimizers(self.model, recipe.optim)
        self.discriminators: nn.Module | None = None
        self.discriminator_optimizer: torch.optim.Optimizer | None = None
        if recipe.adversarial:
            self.discriminators = self.task.discriminators().to(self.device).train()
            self.discriminator_optimizer = build_discriminator_optimizer(
                self.discriminators, recipe.discriminator
            )
        self.balancer = Balancer(self.task.weights, recipe.loss.balancer_decay)
        self.balancer.to(self.device)
        self.scalers = [
            torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
            for _ in range(2)
        ]
        with self.accelerator.local_main_process_first():  # which fetches what is missing
            self.loss = self.task.losses().to(self.device)
            self.data = self.task.crops(
                process=self.accelerator.process_index,
                processes=self.accelerator.num_processes,
                workers=loader_workers(recipe, self.accelerator),
            )
        self.step = 0
        self.seconds = 0.0
        self._bad_step = torch.tensor(-1, device=self.device)
        self._sums: dict[str, torch.Tensor] = {}  # of terms since they were logged
        self._counts: dict[str, int] = {}
        self._tokens: list[torch.Tensor] = []  # since then, of this process
        self._told = 0  # of files that cannot be read
        folder.mkdir(parents=True, exist_ok=True)
        if found is not None:
            self._resume(*found)
        self._agree_on_step()
        if self.main:
            cut_metrics(folder, self.step)
        self._needs_codebook = isinstance(self.model.quantizer, VP) and not self._decoder_only
        if self._needs_codebook and self.step < recipe.train.steps:
            self.model.quantizer.forget_codebook()  # of other weights
        self._wrapped = self.accelerator.prepare_model(self.model)
        self._wrapped_discriminators: nn.Module | None = None
        if self.discriminators is not None:
            self._wrapped_discriminators = self.accelerator.prepare_model(self.discriminators)
        self._compile()
        if found is None and recipe.train.precision == "auto":
            self._check_precision()

    def _find_checkpoint(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]] | None:
        """The newest checkpoint that is whole, if there are any."""
        if not checkpoints(self.folder):
            return None
        groups, state, damaged = load_newest(self.folder)
        self.notes += [f"{error}; the one before it is taken" for error in damaged]
        return groups, state

    def _compile(self) -> None:
        """Have the networks compiled at their next use, if the recipe says so."""
        if not self.recipe.train.compile:
            return
        options = compile_options(self.precision, self.device)
        for module in (self.model.encoder, self.model.decoder, self.discriminators):
            if module is not None:
                module.compile(options=options)

    def _check_precision(self) -> None:
        """Take float32 where a network gives something else in what "auto" has chosen."""
        if self.precision not in AUTOCAST:
            return
        compiled = self.recipe.train.compile
        fault = find_fault(self._networks(), AUTOCAST[self.precision], compiled=compiled)
        if compiled:
            torch.compiler.reset()  # compiled for the run as in one that is resumed
        if self._any(fault is not None):
            fault = fault or "another process has found a fault"
            self.notes.append(
                f"train.precision=auto takes fp32: in {self.precision} on this machine, {fault}"
            )
            self.precision = "fp32"
            self._compile()

    def _networks(self) -> list[Network]:
        """The networks with batches like those that they are trained on, of noise."""
        data = self.recipe.data
        size = data.batch_size if self.recipe.train.compile else min(data.batch_size, 4)
        generator = torch.Generator().manual_seed(self.recipe.train.seed)
        batch = torch.randn(size, *self.data.shape, generator=generator) / 4
        batch = batch.clamp(-1, 1).to(self.device)
        with torch.no_grad():
            latents = self.model.encoder.forward(batch)
        latents = torch.randn(latents.shape, generator=generator).to(self.device)
        networks = [
            Network("encoder", self.model.encoder, batch),
            Network("decoder", self.model.decoder, latents.requires_grad_()),
        ]
        if self.discriminators is not None:
            target = self.model.target(batch).clone().requires_grad_()
            networks.append(Network("discriminators", self.discriminators, target))
        return networks

    def learning_rate(self, step: int) -> float:
        """Of the codec at a step; the discriminators' is the same share of their peak."""
        return learning_rate(step, self.recipe.train.steps, self.recipe.optim)

    def train_step(self, *batches: torch.Tensor) -> dict[str, torch.Tensor]:
        """One update on one or more batches, their gradients averaged.

        Returns the loss terms, unweighted, their weighted sum `loss`, gradient norms and
        statistics; scalars of this process.

        Raises:
            TrainingError: the gradient is not finite (on a GPU this is noticed when it is logged).
        """
        rate, config = self.learning_rate(self.step), self.recipe.discriminator
        set_learning_rate(self.optimizers, rate)
        since = self.step - config.start_step
        adversarial = self.discriminators is not None and since >= 0
        warm_up = adversarial and since < config.warmup_steps
        turn = adversarial and since % config.every == 0
        rows, pairs = [], []
        for i, batch in enumerate(batches):
            with self._last(i, len(batches), self._wrapped):
                self._seed(self.step * len(batches) + i)
                if adversarial:
                    self.discriminators.draw()
                try:
                    row, target, output = self._codec_pass(
                        batch, adversarial, 1 / len(batches), learn=not warm_up
                    )
                except NotFiniteError:
                    raise self._not_finite(self.step) from None
            rows.append(row)
            pairs.append((target, output[: len(target)].detach()))
        terms = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        if not warm_up:
            terms["grad_norm"] = self._update(
                self.optimizers, self.model, self.recipe.optim.grad_clip, self.scalers[0]
            )
        if turn:
            discriminator_rate = config.lr * rate / self.recipe.optim.lr
            set_learning_rate([self.discriminator_optimizer], discriminator_rate)
            terms |= self._discriminator_update(pairs)
        self.step += 1
        if not warm_up:
            self._update_average()
        return terms

    def _codec_pass(
        self, batch: torch.Tensor, adversarial: bool, share: float, *, learn: bool
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Forward and backward of a batch: the terms, the target and the output.

        Args:
            batch: (B, T) samples or (B, 3, H, W) images.
            adversarial: whether the discriminators have their say.
            share: factor of the gradient.
            learn: no: forward alone, while the discriminators warm up.
        """
        with torch.set_grad_enabled(learn):
            with self._autocast():
                output, quantized = self._wrapped(batch, *self.task.forward_options)
            target = self.model.target(batch)
            terms = self.loss(target, output)
        if adversarial and learn:
            self.discriminators.requires_grad_(False)
            with self._autocast():
                with torch.no_grad():
                    real = self.discriminators(target)
                fake = self.discriminators(output[: len(target)])
            terms |= generator_losses(real, fake, self.recipe.discriminator.loss)
        weights, scaler = self.task.weights, self.scalers[0]
        total = sum(weights[name] * value for name, value in terms.items())
        own = self.recipe.loss.quantizer * quantized.loss
        if not learn:
            pass
        elif self.recipe.loss.balancer:
            gradient = self.balancer.gradient(
                terms,
                output,
                scaler.scale(output.new_ones(())),
                measure=self.step % self.recipe.loss.balancer_every == 0,
            )
            roots, gradients = [output], [gradient * share]
            if own.requires_grad:
                roots, gradients = [*roots, scaler.scale(own * share)], [*gradients, None]
            torch.autograd.backward(roots, gradients)
        else:
            scaler.scale((total + own) * share).backward()
        if self.main and not quantized.lazy and self.model.config.codebook_size <= LARGEST:
            self._tokens.append(quantized.tokens)
        terms = {"loss": total + own} | terms | {"quantizer": quantized.loss} | quantized.stats
        return {name: value.detach() for name, value in terms.items()}, target, output

    def _discriminator_update(
        self, pairs: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """One update of the discriminators on batches of targets and outputs."""
        self.discriminators.requires_grad_(True)
        config = self.recipe.discriminator
        updates = (self.step - config.start_step) // config.every
        penalised = config.penalty > 0 and updates % PENALTY_EVERY == 0
        losses, chances, penalties = [], [], []
        for i, (target, output) in enumerate(pairs):
            with self._last(i, len(pairs), self._wrapped_discriminators):
                data = torch.cat([target, output])
                with self._autocast():
                    both = self._wrapped_discriminators(data)
                halves = [[layer.chunk(2) for layer in layers] for layers in both]
                real, fake = ([[half[i] for half in layers] for layers in halves] for i in (0, 1))
                loss = discriminator_loss(real, fake, config.loss)
                losses.append(loss.detach())
                chances.append(winning_chance(real, fake))
                if penalised:
                    with self._autocast():
                        penalty = gradient_penalty(self.discriminators, data, both)
                    penalties.append(penalty.detach())
                    loss = loss + PENALTY_EVERY * config.penalty * penalty
                self.scalers[1].scale(loss / len(pairs)).backward()
        norm = self._update(
            [self.discriminator_optimizer],
            self.discriminators,
            self.recipe.discriminator.grad_clip,
            self.scalers[1],
        )
        terms = {"discriminator": losses, "winning_chance": chances, "penalty": penalties}
        means = {name: sum(values) / len(values) for name, values in terms.items() if values}
        return means | {"discriminator_grad_norm": norm}

    def _update(
        self,
        optimizers: list[torch.optim.Optimizer],
        module: nn.Module,
        grad_clip: float,
        scaler: torch.amp.GradScaler,
    ) -> torch.Tensor:
        """Clip the whole gradient, once, and step; the norm before clipping."""
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(module.parameters(), grad_clip)
        if not scaler.is_enabled():  # which skips such steps, and makes some on purpose
            bad = (self._bad_step < 0) & ~torch.isfinite(norm)
            self._bad_step = torch.where(bad, self.step, self._bad_step)
            if self.device.type == "cpu":
                self._check_finite()
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        return norm

    def _check_finite(self) -> None:
        """Stop if a gradient was not finite; all processes have the same and stop together."""
        bad = int(self._bad_step)
        if bad < 0 and any(s.is_enabled() and s.get_scale() < 1 for s in self.scalers):
            bad = self.step  # the scale fell and fell
        if bad >= 0:
            raise self._not_finite(bad)

    def _not_finite(self, step: int) -> TrainingError:
        last = checkpoint_path(self.folder, step)  # later ones are damaged
        found = [path for path in checkpoints(self.folder) if path <= last]
        kept = f"{found[-1]} is the last good one" if found else "there is no checkpoint yet"
        advice = "; train.precision=fp32 may help" if self.precision != "fp32" else ""
        return TrainingError(f"step {step}: loss or gradient is not finite; {kept}{advice}")

    def train(self) -> None:
        """Run to the last step; on Ctrl-C or SIGTERM finish the step, save and stop.

        Raises:
            KeyboardInterrupt: it was stopped, and has saved.
            TrainingError: it cannot go on.
        """
        train = self.recipe.train
        if not self._any(self._unfinished()):
            return
        with ExitStack() as stack:
            log = RunLog(self.folder, self.recipe, step=self.step, enabled=self.main)
            stack.callback(log.close)
            selection = self._start_selection(stack, log)
            self._describe(log)
            if train.trackers:
                self.accelerator.init_trackers("vpcodec", self.recipe.model_dump(mode="json"))
                stack.callback(self.accelerator.end_training)
            interrupted = stack.enter_context(deferred_interrupt())
            batches = self.data.batches(
                self.step * train.accumulate, train.steps * train.accumulate
            )
            if self.step < train.steps:
                stack.enter_context(closing(batches))
                if self._selection_is_due() and not evaluated(self.folder, self.step):
                    self._select(selection, log)  # it was lost when the run ended
            clock = Clock()
            while self.step < train.steps:
                with clock.training():
                    with clock.waiting():
                        samples = np.stack([next(batches) for _ in range(train.accumulate)])
                    terms = self.train_step(*self._to_device(samples))
                clock.numbers += samples.size * self.accelerator.num_processes
                self._add(terms)
                last = self.step == train.steps
                if self.step % train.log_every == 0 or last:
                    self._log(clock, log)
                if self.step % train.show_every == 0:
                    self._show(samples[0], log)
                self._calibrate(log)
                stop = self._any(interrupted())
                if not last and (stop or self.step % train.save_every == 0):
                    self.save()
                if not last and self._selection_is_due() and not stop:
                    self._select(selection, log)
                if selection is not None:
                    selection.report(self.step, self.seconds, STOP_SECONDS if stop else 0.0)
                if stop and not last:
                    raise KeyboardInterrupt
            self._finish(selection, log)

    def _selection_is_due(self) -> bool:
        return self.step > 0 and self.step % self.recipe.eval.every == 0

    def _unfinished(self) -> bool:
        if not self.main:
            return False
        lost = self.recipe.eval.data is not None and not evaluated(self.folder, self.step)
        return self.step < self.recipe.train.steps or not self.model.quantizer.fitted or lost

    def _finish(self, selection: Selection | None, log: RunLog) -> None:
        """The codebook of a VP quantizer, the last checkpoint, the last evaluation."""
        error = None
        if self.main and self._needs_codebook and not self.model.quantizer.fitted:
            model = self._averaged_copy()
            try:
                self._make_codebook(model, log)
                self.model.quantizer.codebook = model.quantizer.codebook
            except ValueError as found:  # too few latents that differ
                error = found
        self.save()
        if error is not None:
            raise TrainingError(f"no codebook: {error}; the weights are saved")
        if selection is not None:
            if not evaluated(self.folder, self.step):
                self._select(selection, log)
            selection.report(self.step, self.seconds, FINAL_SECONDS)
            if self._needs_codebook:
                model = copy.deepcopy(self.model).eval()
                selection.refine(self.step, model, lambda: self._make_codebook(model, log))
        self.accelerator.wait_for_everyone()

    def save(self) -> None:
        """Write the checkpoint; returns when it is there, in every process.

        Raises:
            TrainingError: a gradient was not finite, so there is nothing worth keeping.
        """
        self._check_finite()
        self._list_skipped()
        self._share_sums()
        if self.main:
            groups: dict[str, dict[str, Any]] = {
                "model": self.model.state_dict(),
                "average": self.average,
                "balancer": self.balancer.state_dict(),
                "log": self._sums,
            }
            if self._tokens:
                groups["tokens"] = {"all": torch.cat([t.flatten().cpu() for t in self._tokens])}
            for i, optimizer in enumerate(self.optimizers):
                groups[f"optimizer{i}"] = optimizer_tensors(optimizer)
            if self.discriminators is not None:
                groups["discriminators"] = self.discriminators.state_dict()
                groups["discriminator_optimizer"] = optimizer_tensors(self.discriminator_optimizer)
            state = {
                "step": self.step,
                "seconds": self.seconds,
                "precision": self.precision,
                "optimizer": self.recipe.optim.name,
                "decoder_only": self._decoder_only,
                "config": self.recipe.model.model_dump(mode="json"),
                "data": self.data.fingerprint,
                "batch": self._batch(),
                "log": self._counts,
                "scalers": [scaler.state_dict() for scaler in self.scalers],
            }
            save_checkpoint(checkpoint_path(self.folder, self.step), groups, state)
            prune(self.folder, self.recipe.train.keep, self.step)
        self.accelerator.wait_for_everyone()

    def _resume(self, groups: dict[str, dict[str, torch.Tensor]], state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        path = checkpoint_path(self.folder, int(state.get("step", 0)))
        try:
            if parse_model(state["config"]) != self.recipe.model:
                raise CheckpointError(f"{self.folder}: holds a run of another model configuration")
            if state["optimizer"] != self.recipe.optim.name:
                raise CheckpointError(f"{self.folder}: holds a run of another optimiser")
            if state.get("decoder_only", False) != self._decoder_only:
                raise CheckpointError(f"{self.folder}: holds a run with another train.decoder_only")
            self.model.load_state_dict(groups["model"])
            self.average = {k: groups["average"][k].to(self.device) for k in self.average}
            self.balancer.load_state_dict(groups["balancer"])
            for i, optimizer in enumerate(self.optimizers):
                restore_optimizer(optimizer, groups.get(f"optimizer{i}", {}))
            if self.discriminators is not None and "discriminators" in groups:
                self._resume_discriminators(groups)
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            self._sums = {k: v.to(self.device) for k, v in groups.get("log", {}).items()}
            self._counts = {name: int(state["log"][name]) for name in self._sums}
            self._tokens = list(groups.get("tokens", {}).values()) if self.main else []
            for scaler, saved in zip(self.scalers, state["scalers"]):
                if scaler.is_enabled() and saved:
                    scaler.load_state_dict(saved)
            if state["data"] != self.data.fingerprint:
                self.notes.append("the training data changed since the run was interrupted")
            if state["batch"] != self._batch():
                self.notes.append("batches are of another size than before: other crops will come")
        except (KeyError, TypeError, ConfigError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: the checkpoint is incomplete ({brief(error)})"
            ) from None

    def _resume_discriminators(self, groups: dict[str, dict[str, torch.Tensor]]) -> None:
        try:
            self.discriminators.load_state_dict(groups["discriminators"])
        except RuntimeError:
            raise CheckpointError(f"{self.folder}: holds a run with other discriminators") from None
        restore_optimizer(self.discriminator_optimizer, groups.get("discriminator_optimizer", {}))

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.recipe.optim.ema_decay, (1 + self.step) / (10 + self.step))
        current = [parameter.detach() for parameter in self.model.parameters()]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - decay)

    def average_state(self) -> dict[str, Any]:
        """State dict of the averaged model: parameters averaged, buffers those of now."""
        return averaged_weights({"model": self.model.state_dict(), "average": self.average})

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type,
            AUTOCAST.get(self.precision, torch.bfloat16),
            enabled=self.precision in AUTOCAST,
        )

    def _last(self, index: int, number: int, module: nn.Module) -> Any:
        """Processes share the gradients of the last of several batches alone."""
        return nullcontext() if index == number - 1 else self.accelerator.no_sync(module)

    def _seed(self, batch: int) -> None:
        """The random numbers of a batch: the same in all processes, which share them out."""
        seeds = np.random.SeedSequence([self.recipe.train.seed, batch]).generate_state(2)
        torch.manual_seed(int(seeds[0]) << 31 | int(seeds[1]) >> 1)

    def _any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.accelerator.num_processes == 1:
            return flag
        votes = torch.tensor(int(flag))  # on the CPU, so that no GPU is waited for
        torch.distributed.all_reduce(votes)
        return bool(votes)

    def _agree_on_step(self) -> None:
        """All processes go on from the same checkpoint."""
        if self.accelerator.num_processes > 1:
            steps = torch.tensor([self.step, -self.step])
            torch.distributed.all_reduce(steps, torch.distributed.ReduceOp.MIN)
            if int(steps[0]) != -int(steps[1]):
                raise TrainingError(f"{self.folder}: processes see different checkpoints in it")

    def _batch(self) -> list[int]:
        """What else than the seed decides which crops a step has."""
        processes = self.accelerator.num_processes
        return [self.recipe.data.batch_size, self.recipe.train.accumulate, processes]

    def _to_device(self, samples: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(samples)
        if self.device.type == "cuda":  # a copy from other memory would wait for the GPU
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _list_skipped(self) -> None:
        """Files that could not be read, in the run folder."""
        skipped, process = self.data.skipped, self.accelerator.process_index
        if len(skipped) > self._told:
            self._told = len(skipped)
            with atomic_output(
                self.folder / f"skipped{f'-{process}' if process else ''}.txt"
            ) as file:
                file.write("".join(f"{name}\n" for name in skipped).encode())

    def _describe(self, log: RunLog) -> None:
        """README.md, and on stderr what a person should know first."""
        sources = ", ".join(corpus.path for corpus in self.recipe.data.train) or "generated"
        data = f"{sources} ({self.data.summary})" if self.data.summary else sources
        parameters = {"codec": self.model, "discriminators": self.discriminators}
        if self.main:
            with atomic_output(self.folder / "recipe.json") as file:
                file.write(self.recipe.model_dump_json(indent=2).encode())
            write_readme(
                self.folder,
                self.recipe,
                parameters={k: _parameters(m) for k, m in parameters.items() if m is not None},
                data=data,
            )
        for note in self.notes:
            log.message(note)
        if self.data.skipped:
            log.message(
                f"left out {len(self.data.skipped)} files that cannot be read (skipped.txt); the "
                f"first: {self.data.skipped[0]}"
            )
        self._list_skipped()

    def _add(self, terms: dict[str, torch.Tensor]) -> None:
        """Remember terms for the log."""
        for name, value in terms.items():
            before = self._sums.get(name)
            self._sums[name] = value.float() if before is None else before + value.float()
            self._counts[name] = self._counts.get(name, 0) + 1

    def _share_sums(self) -> None:
        """Give all processes the mean of their sums."""
        if self._sums and self.accelerator.num_processes > 1:
            names = sorted(self._sums)
            values = torch.stack([self._sums[name] for name in names])
            self._sums = dict(zip(names, self.accelerator.reduce(values, "mean").unbind()))

    def _log(self, clock: Clock, log: RunLog) -> None:
        """A row of the means since the last one."""
        self._share_sums()
        names = sorted(self._sums)
        values = torch.stack([self._sums[name] / self._counts[name] for name in names]).tolist()
        self._sums.clear()
        self._counts.clear()
        self._check_finite()
        seconds, speed, wait_share = clock.lap()
        self.seconds += seconds
        row = dict(zip(names, values))
        name, size, unit = self.task.speed
        row |= {
            "lr": self.learning_rate(self.step - 1),
            name: speed / size,
            "wait_share": wait_share,
        }
        if self._tokens:
            usage = CodebookUsage(self.recipe.model.codebook_size)
            for tokens in self._tokens:
                usage.update(tokens)
            row |= {"perplexity": usage.perplexity, "cvu": usage.cvu}
            self._tokens.clear()
        log.row(self.step, self.seconds, row)
        self.accelerator.log(row, self.step)
        note = "  ".join(f"{term} {row[term]:.3f}" for term in ("loss", self.task.shown))
        if "discriminator" in row:
            note += f"  D {row['discriminator']:.3f}"
        log.progress(self.step, f"{note}  {row[name]:.3g} {unit}")

    def _show(self, batch: np.ndarray, log: RunLog) -> None:
        """First crop and its reconstruction by the averaged weights, really quantized."""
        if not self.main:
            return
        self._check_finite()
        model = self._averaged()
        if model is None:
            return
        crop = torch.from_numpy(batch[:1]).to(self.device)
        with torch.no_grad():
            output, _ = model(crop)
        self.task.show(log, self.step, "original", crop[0])
        self.task.show(log, self.step, "decoded", output[0])

    def _averaged_copy(self) -> Autoencoder:
        """A copy of the model with the averaged weights, in eval mode."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.average_state())
        return model.eval()

    def _averaged(self) -> Autoencoder | None:
        """The same with a codebook, of VP a quick one; None if there cannot be one yet."""
        model = self._averaged_copy()
        if not model.quantizer.fitted:
            if not isinstance(model.quantizer, VP):
                return None
            try:
                model.quantizer.fit(max_iterations=LISTENING_ITERATIONS)
            except ValueError:  # too few latents so far
                return None
        return model

    def _start_selection(self, stack: ExitStack, log: RunLog) -> Selection | None:
        if self.recipe.eval.data is None or not self.main:
            return None
        selection = Selection(
            self.recipe, self.folder, log, self.task.held_out(), publish=self.accelerator.log
        )
        stack.callback(selection.close)
        return selection

    def _select(self, selection: Selection | None, log: RunLog) -> None:
        """Have the averaged weights of this step evaluated."""
        if selection is None:
            return
        self._check_finite()
        model = self._averaged()
        if model is None:
            log.message(f"step {self.step}: no codebook to evaluate yet")
        else:
            selection.start(self.step, model, self.device)

    def _calibrate(self, log: RunLog) -> None:
        """Let a VP quantizer set its eta when it is time to: in one process, for all."""
        config = self.recipe.model.quantizer
        if not self._needs_codebook or not config.calibrate_every:
            return
        if self.step % config.calibrate_every:
            return
        quantizer = self.model.quantizer
        if self.main:
            try:
                with log.console.status("calibrating the perturbation"):
                    quantizer.calibrate(seed=self.step)
            except ValueError as error:
                log.message(f"step {self.step}: eta stays as it is: {error}")
        if self.accelerator.num_processes > 1:
            found = torch.tensor([float(quantizer.eta), quantizer.mh_steps], device=self.device)
            torch.distributed.broadcast(found, 0)
            quantizer.eta.fill_(found[0])
            quantizer.mh_steps = int(found[1])

    @torch.no_grad()
    def _make_codebook(self, model: Autoencoder, log: RunLog) -> None:
        """Make the codebook of a VP quantizer of the latents of training crops.

        Raises ValueError where there are too few that differ.
        """
        wanted = LATENTS_PER_CODE * model.quantizer.codebook_size
        number = -(-wanted // (self.data.tokens * self.recipe.data.batch_size))
        with (
            log.console.status(f"making the codebook of {wanted:,} latents"),
            closing(self.data.batches(0, number)) as batches,
        ):
            latents = [
                model.encoder(self._to_device(batch)).float().flatten(0, -2) for batch in batches
            ]
            data = torch.cat(latents)
            result = model.quantizer.fit(data, seed=self.recipe.train.seed)
        log.message(f"codebook of {len(data):,} latents: mean squared error {result.error:.4f}")


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def make_task(recipe: Recipe) -> Task:
    """What the training of a recipe's kind of model has of its own."""
    if isinstance(recipe, AudioRecipe):
        from .audio.task import AudioTask

        return AudioTask(recipe)
    from .image.task import ImageTask

    return ImageTask(recipe)
