"""One training step: an update of a model, and at their intervals of the discriminators."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from contextlib import nullcontext
from functools import reduce
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from ..quantizers import NotFiniteError
from .adversarial import (
    discriminator_loss,
    generator_losses,
    gradient_penalty,
    winning_chance,
)
from .hardware import TrainingError, any_process, compile_options
from .optim import learning_rate, set_learning_rate
from .precision import Network, find_fault
from .state import ModelState, RunState
from .task import Task

PENALTY_EVERY = 4  # updates of the discriminators
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ModelStep(ABC):
    """What training steps of all kinds of models share.

    All random numbers are a function of the seed and the step. Create it only after the state is
    restored, because it synchronises the weights of all processes.

    Args:
        state: models, optimisers and counters, changed by each call.
        accelerator: processes and device.

    Attributes:
        model: the model of the state, which averages gradients over all processes.
    """

    def __init__(self, state: ModelState, accelerator: Accelerator) -> None:
        self.state: Any = state
        self.accelerator = accelerator
        self.recipe = state.recipe
        self.model = accelerator.prepare_model(state.model)
        self._bad_step = torch.tensor(-1, device=state.device)

    @abstractmethod
    def __call__(self, *batches: torch.Tensor) -> dict[str, torch.Tensor]:
        """One update on one or more batches, with averaged gradients.

        Returns:
            Scalars of this process: the loss terms, their weighted sum `loss`, gradient norms and
            statistics.

        Raises:
            TrainingError: the gradient is not finite (on a GPU, this is noticed when it is logged).
        """

    def learning_rate(self, step: int) -> float:
        """Learning rate of the model at a step; that of discriminators is proportional."""
        return learning_rate(step, self.recipe.train.steps, self.recipe.optim)

    def check_finite(self) -> None:
        """Check that all gradients so far were finite.

        All processes have the same gradients, so they stop together.

        Raises:
            TrainingError: a gradient was not finite.
        """
        bad = int(self._bad_step)
        if bad < 0 and any(s.is_enabled() and s.get_scale() < 1 for s in self.state.scalers):
            bad = self.state.step  # the scale kept falling
        if bad >= 0:
            raise self._not_finite(bad)

    def seed(self, batch: int) -> None:
        """Seed the random numbers of a batch, the same in all processes; each uses its own part."""
        seeds = np.random.SeedSequence([self.recipe.train.seed, batch]).generate_state(2)
        torch.manual_seed(int(seeds[0]) << 31 | int(seeds[1]) >> 1)

    def _update(
        self,
        optimizers: list[torch.optim.Optimizer],
        module: nn.Module,
        grad_clip: float,
        scaler: torch.amp.GradScaler,
    ) -> torch.Tensor:
        """Clip the gradient by its total norm, and update; returns the norm before clipping."""
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(module.parameters(), grad_clip)
        if not scaler.is_enabled():  # a scaler skips such steps, and expects some
            bad = (self._bad_step < 0) & ~torch.isfinite(norm)
            self._bad_step = torch.where(bad, self.state.step, self._bad_step)
            if self.state.device.type == "cpu":
                self.check_finite()
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        return norm

    def _not_finite(self, step: int) -> TrainingError:
        advice = "; train.precision=fp32 may help" if self.state.precision != "fp32" else ""
        return TrainingError(
            f"step {step}: loss or gradient is not finite; {self.state.last_good(step)}{advice}"
        )

    def _autocast(self) -> torch.autocast:
        precision = self.state.precision
        return torch.autocast(
            self.state.device.type,
            AUTOCAST.get(precision, torch.bfloat16),
            enabled=precision in AUTOCAST,
        )

    def _synchronised_last(self, index: int, number: int, module: nn.Module) -> Any:
        """Context of one of several batches: only the last one synchronises gradients."""
        return nullcontext() if index == number - 1 else self.accelerator.no_sync(module)


class TrainStep(ModelStep):
    """Updates codec and discriminators.

    Args:
        state: models, optimisers and counters, changed by each call.
        task: weights of the losses, and options of the forward pass.
        loss: maps target and output to the terms: scalars, unweighted.
        accelerator: processes and device.
    """

    def __init__(
        self, state: RunState, task: Task, loss: nn.Module, accelerator: Accelerator
    ) -> None:
        super().__init__(state, accelerator)
        self.task, self.loss = task, loss
        self.discriminators: nn.Module | None = None
        if state.discriminators is not None:
            self.discriminators = accelerator.prepare_model(state.discriminators)
        self._compile()

    def __call__(self, *batches: torch.Tensor) -> dict[str, torch.Tensor]:
        """One update on one or more batches, with averaged gradients.

        Returns:
            Scalars of this process: the unweighted loss terms, their weighted sum `loss`, gradient
            norms and statistics.

        Raises:
            TrainingError: the gradient is not finite (on a GPU, this is noticed when it is logged).
        """
        state, config = self.state, self.recipe.discriminator
        rate = self.learning_rate(state.step)
        set_learning_rate(state.optimizers, rate)
        since = state.step - config.start_step
        adversarial = state.discriminators is not None and since >= 0
        warm_up = adversarial and since < config.warmup_steps
        turn = adversarial and since % config.every == 0
        rows, pairs = [], []
        for i, batch in enumerate(batches):
            with self._synchronised_last(i, len(batches), self.model):
                self.seed(state.step * len(batches) + i)
                if adversarial:
                    state.discriminators.draw()
                try:
                    row, target, output = self.codec_pass(
                        batch, 1 / len(batches), adversarial=adversarial, learn=not warm_up
                    )
                except NotFiniteError:
                    raise self._not_finite(state.step) from None
            rows.append(row)
            pairs.append((target, output[: len(target)].detach()))
        terms = {name: _mean([row[name] for row in rows]) for name in rows[0]}
        if not warm_up:
            terms["grad_norm"] = self.update_codec()
        if turn:
            discriminator_rate = config.lr * rate / self.recipe.optim.lr
            set_learning_rate([state.discriminator_optimizer], discriminator_rate)
            terms |= self.update_discriminators(pairs)
        state.step += 1
        if not warm_up:
            state.update_average()
        return terms

    def codec_pass(
        self, batch: torch.Tensor, share: float = 1.0, *, adversarial: bool, learn: bool = True
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Forward and backward pass of the codec on a batch.

        Args:
            batch: (B, T) samples or (B, 3, H, W) images.
            share: factor of the gradient.
            adversarial: whether to include the losses of the discriminators.
            learn: whether to run the backward pass; not while the discriminators warm up.

        Returns:
            The loss terms, the target and the output.
        """
        state = self.state
        with torch.set_grad_enabled(learn):
            with self._autocast():
                output, quantized = self.model(batch, *self.task.forward_options)
            target = state.model.target(batch)
            terms = self.loss(target, output)
        if adversarial and learn:
            state.discriminators.requires_grad_(False)
            with self._autocast():
                with torch.no_grad():
                    real = state.discriminators(target)
                fake = state.discriminators(output[: len(target)])
            terms |= generator_losses(real, fake, self.recipe.discriminator.loss)
        weights, scaler = self.task.weights, state.scalers[0]
        total = sum(weights[name] * value for name, value in terms.items())
        own = self.recipe.loss.quantizer * quantized.loss
        if not learn:
            pass
        elif self.recipe.loss.balancer:
            gradient = state.balancer.gradient(
                terms,
                output,
                scaler.scale(output.new_ones(())),
                measure=state.step % self.recipe.loss.balancer_every == 0,
            )
            roots, gradients = [output], [gradient * share]
            if own.requires_grad:
                roots, gradients = [*roots, scaler.scale(own * share)], [*gradients, None]
            torch.autograd.backward(roots, gradients)
        else:
            scaler.scale((total + own) * share).backward()
        if not quantized.lazy:
            state.meter.add_tokens(quantized.tokens)
        terms = {"loss": total + own} | terms | {"quantizer": quantized.loss} | quantized.stats
        return {name: value.detach() for name, value in terms.items()}, target, output

    def update_codec(self) -> torch.Tensor:
        """Update the codec with its accumulated gradients; returns their norm."""
        state = self.state
        return self._update(
            state.optimizers, state.model, self.recipe.optim.grad_clip, state.scalers[0]
        )

    def update_discriminators(
        self, pairs: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Update the discriminators on batches of targets and outputs; returns terms and norm."""
        state, config = self.state, self.recipe.discriminator
        state.discriminators.requires_grad_(True)
        updates = (state.step - config.start_step) // config.every
        penalised = config.penalty > 0 and updates % PENALTY_EVERY == 0
        losses, chances, penalties = [], [], []
        for i, (target, output) in enumerate(pairs):
            with self._synchronised_last(i, len(pairs), self.discriminators):
                data = torch.cat([target, output])
                with self._autocast():
                    both = self.discriminators(data)
                halves = [[layer.chunk(2) for layer in layers] for layers in both]
                real, fake = ([[half[i] for half in layers] for layers in halves] for i in (0, 1))
                loss = discriminator_loss(real, fake, config.loss)
                losses.append(loss.detach())
                chances.append(winning_chance(real, fake))
                if penalised:
                    with self._autocast():
                        penalty = gradient_penalty(state.discriminators, data, both)
                    penalties.append(penalty.detach())
                    loss = loss + PENALTY_EVERY * config.penalty * penalty
                state.scalers[1].scale(loss / len(pairs)).backward()
        norm = self._update(
            [state.discriminator_optimizer],
            state.discriminators,
            config.grad_clip,
            state.scalers[1],
        )
        terms = {"discriminator": losses, "winning_chance": chances, "penalty": penalties}
        means = {name: _mean(values) for name, values in terms.items() if values}
        return means | {"discriminator_grad_norm": norm}

    def check_precision(self, shape: tuple[int, ...]) -> str | None:
        """Switch to float32 if half precision changes the output of a network.

        Args:
            shape: shape of a crop.

        Returns:
            The fault that was found; None if there is none.
        """
        state, precision = self.state, self.state.precision
        if precision not in AUTOCAST:
            return None
        compiled = self.recipe.train.compile
        fault = find_fault(self.networks(shape), AUTOCAST[precision], compiled=compiled)
        if compiled:
            torch.compiler.reset()  # so that the run compiles the same as one that resumes
        if not any_process(fault is not None, self.accelerator):
            return None
        state.precision = "fp32"
        self._compile()
        return f"in {precision} on this machine, {fault or 'another process found a fault'}"

    def networks(self, shape: tuple[int, ...]) -> list[Network]:
        """The networks, with batches of noise shaped like training batches.

        Args:
            shape: shape of a crop.
        """
        state, data = self.state, self.recipe.data
        size = data.batch_size if self.recipe.train.compile else min(data.batch_size, 4)
        generator = torch.Generator().manual_seed(self.recipe.train.seed)
        batch = torch.randn(size, *shape, generator=generator) / 4
        batch = batch.clamp(-1, 1).to(state.device)
        with torch.no_grad():
            latents = state.model.encoder.forward(batch)
        latents = torch.randn(latents.shape, generator=generator).to(state.device)
        networks = [
            Network("encoder", state.model.encoder, batch),
            Network("decoder", state.model.decoder, latents.requires_grad_()),
        ]
        if state.discriminators is not None:
            target = state.model.target(batch).clone().requires_grad_()
            networks.append(Network("discriminators", state.discriminators, target))
        return networks

    def _compile(self) -> None:
        """Have the networks compiled at their next use, if the recipe asks for it."""
        if not self.recipe.train.compile:
            return
        state = self.state
        options = compile_options(state.precision, state.device)
        for module in (state.model.encoder, state.model.decoder, state.discriminators):
            if module is not None:
                module.compile(options=options)


def _mean(values: list[torch.Tensor]) -> torch.Tensor:
    return reduce(operator.add, values) / len(values)
