"""The state of a run: everything that changes from step to step, saved in checkpoints."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..config import ConfigError, ModelConfig, parse_model
from ..models import build_model
from ..recipe import AnyRecipe, Recipe
from ..recipe.quantizers import parse_training
from .balancer import Balancer
from .checkpoints import (
    CheckpointError,
    averaged_weights,
    checkpoint_path,
    checkpoints,
    load_weights,
    one_line,
    optimizer_tensors,
    remove_old_checkpoints,
    restore_optimizer,
    save_checkpoint,
)
from .meter import Meter
from .optim import build_discriminator_optimizer, build_optimizers
from .task import Task


class ModelState(ABC):
    """What changes from step to step with all kinds of models, saved in checkpoints.

    Args:
        model: with its initial weights.
        recipe: recipe of the run.
        folder: the run folder.
        accelerator: processes and device.
        precision: fp32, bf16 or fp16; the networks are computed in it.
        counted: size of the codebook whose tokens the meter counts.

    Attributes:
        model: the model.
        average: its parameters averaged over the steps, by name.
        optimizers: optimisers of the model.
        scalers: gradient scalers of the model and of discriminators, for fp16.
        meter: statistics since the last row of the log.
        step: number of updates done.
        seconds: duration of these updates.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: AnyRecipe,
        folder: Path,
        accelerator: Accelerator,
        precision: str,
        *,
        counted: int,
    ) -> None:
        self.recipe: Any = recipe
        self.folder, self.precision = folder, precision
        self.device = accelerator.device
        self.model: Any = model.to(self.device).train()
        self.average = self._parameters()
        self.optimizers = build_optimizers(self.model, recipe.optim)
        self.scalers = [
            torch.amp.GradScaler(self.device.type, enabled=precision == "fp16") for _ in range(2)
        ]
        self.meter = Meter(counted, counting=accelerator.is_main_process)
        self.step = 0
        self.seconds = 0.0

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the averaged weights towards those of this step."""
        decay = min(self.recipe.optim.ema_decay, (1 + self.step) / (10 + self.step))
        current = [parameter.detach() for parameter in self.model.parameters()]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - decay)

    def averaged_model(self) -> Any:
        """A copy of the model in eval mode, with the averaged weights and the current buffers."""
        model = copy.deepcopy(self.model)
        groups = {"model": self.model.state_dict(), "average": self.average}
        model.load_state_dict(averaged_weights(groups))
        return model.eval()

    def last_good(self, step: int) -> str:
        """Which checkpoint remains if the run cannot continue after a step, for messages."""
        last = checkpoint_path(self.folder, step)  # later ones are damaged
        found = [path for path in checkpoints(self.folder) if path <= last]
        return f"{found[-1]} is the last good one" if found else "there is no checkpoint yet"

    def save(self, data: dict[str, Any]) -> None:
        """Write a checkpoint, and remove old ones.

        Args:
            data: JSON-serialisable facts about the source of batches, compared when the run
                resumes.
        """
        measured, counts = self.meter.stored()
        groups = {"model": self.model.state_dict(), "average": self.average, **measured}
        for i, optimizer in enumerate(self.optimizers):
            groups[f"optimizer{i}"] = optimizer_tensors(optimizer)
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "precision": self.precision,
            "optimizer": self.recipe.optim.name,
            "config": self.recipe.model.model_dump(mode="json"),
            **self._facts(),
            **data,
            **counts,
            "scalers": [scaler.state_dict() for scaler in self.scalers],
        }
        path = checkpoint_path(self.folder, self.step)
        save_checkpoint(path, groups | self._groups(), state)
        remove_old_checkpoints(self.folder, self.recipe.train.keep, self.step)

    def restore(
        self,
        groups: dict[str, dict[str, torch.Tensor]],
        state: dict[str, Any],
        data: dict[str, Any],
    ) -> list[str]:
        """Continue from a checkpoint.

        Args:
            groups, state: contents of the checkpoint.
            data: as for `save`.

        Returns:
            Names of the facts in `data` that have changed since.

        Raises:
            CheckpointError: the checkpoint is of another model, optimiser or discriminators, or
                incomplete.
        """
        path = checkpoint_path(self.folder, int(state.get("step", 0)))
        try:
            if _what_computes(self._config(state["config"])) != _what_computes(self.recipe.model):
                raise CheckpointError(f"{self.folder}: holds a run of another model configuration")
            if state["optimizer"] != self.recipe.optim.name:
                raise CheckpointError(f"{self.folder}: holds a run of another optimiser")
            self._check(state)
            self.model.load_state_dict(groups["model"])
            self.average = {k: groups["average"][k].to(self.device) for k in self.average}
            for i, optimizer in enumerate(self.optimizers):
                restore_optimizer(optimizer, groups.get(f"optimizer{i}", {}))
            self._restore(groups)
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            self.meter.restore(groups, state, self.device)
            for scaler, saved in zip(self.scalers, state["scalers"]):
                if scaler.is_enabled() and saved:
                    scaler.load_state_dict(saved)
            return [name for name, value in data.items() if state[name] != value]
        except (KeyError, TypeError, ConfigError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: the checkpoint is incomplete ({one_line(error)})"
            ) from None

    @abstractmethod
    def _config(self, data: dict[str, Any]) -> Any:
        """The configuration of a model from a checkpoint; ConfigError if a field is wrong."""

    @abstractmethod
    def _facts(self) -> dict[str, Any]:
        """What else the state of a checkpoint says."""

    def _groups(self) -> dict[str, dict[str, Any]]:
        """What other tensors a checkpoint holds."""
        return {}

    @abstractmethod
    def _check(self, state: dict[str, Any]) -> None:
        """Raise CheckpointError if `_facts` in the state of a checkpoint are others."""

    def _restore(self, groups: dict[str, dict[str, torch.Tensor]]) -> None:
        """Restore what `_groups` stored; KeyError if the checkpoint is incomplete."""
        return None

    def _parameters(self) -> dict[str, torch.Tensor]:
        """A copy of the model's parameters."""
        return {k: p.detach().clone() for k, p in self.model.named_parameters()}


class RunState(ModelState):
    """Models, optimisers and counters of a codec's run, initialised from the seed or a checkpoint.

    Args:
        recipe: recipe of the run. With `train.decoder_only`, everything but the decoder is frozen.
        folder: the run folder.
        task: makes the discriminators.
        accelerator: processes and device.
        precision: fp32, bf16 or fp16; the networks are computed in it.

    Attributes:
        model: the codec.
        discriminators, discriminator_optimizer: None if the recipe has no discriminators.
        balancer: averages of gradient norms.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, task: Task, accelerator: Accelerator, precision: str
    ) -> None:
        torch.manual_seed(recipe.train.seed)
        model = build_model(recipe.model, recipe.quantizer.options())
        if recipe.train.decoder_only:
            for part in (model.encoder, model.quantizer):
                part.requires_grad_(False)
        counted = recipe.model.codebook_size
        super().__init__(model, recipe, folder, accelerator, precision, counted=counted)
        if recipe.train.decoder_only:
            self.model.quantizer.eval()
        self.discriminators: nn.Module | None = None
        self.discriminator_optimizer: torch.optim.Optimizer | None = None
        if recipe.adversarial:
            self.discriminators = task.discriminators().to(self.device).train()
            self.discriminator_optimizer = build_discriminator_optimizer(
                self.discriminators, recipe.discriminator
            )
        self.balancer = Balancer(task.weights, recipe.loss.balancer_decay).to(self.device)

    def load_weights(self, path: Path) -> list[str]:
        """Start from the weights of a model.safetensors; see `checkpoints.load_weights`."""
        left = load_weights(self.model, path)
        self.average = self._parameters()
        return left

    def _config(self, data: dict[str, Any]) -> ModelConfig:
        return parse_model(data)

    def _facts(self) -> dict[str, Any]:
        return {
            "decoder_only": self.recipe.train.decoder_only,
            "quantizer": self.recipe.quantizer.model_dump(mode="json"),
        }

    def _groups(self) -> dict[str, dict[str, Any]]:
        groups: dict[str, dict[str, Any]] = {"balancer": self.balancer.state_dict()}
        if self.discriminators is not None:
            groups["discriminators"] = self.discriminators.state_dict()
            groups["discriminator_optimizer"] = optimizer_tensors(self.discriminator_optimizer)
        return groups

    def _check(self, state: dict[str, Any]) -> None:
        recipe, folder = self.recipe, self.folder
        if parse_training(state["config"], state.get("quantizer", {})) != recipe.quantizer:
            raise CheckpointError(
                f"{folder}: holds a run with other training options of the quantizer"
            )
        if state.get("decoder_only", False) != recipe.train.decoder_only:
            raise CheckpointError(f"{folder}: holds a run with another train.decoder_only")

    def _restore(self, groups: dict[str, dict[str, torch.Tensor]]) -> None:
        self.balancer.load_state_dict(groups["balancer"])
        if self.discriminators is None or "discriminators" not in groups:
            return
        try:
            self.discriminators.load_state_dict(groups["discriminators"])
        except RuntimeError:
            raise CheckpointError(f"{self.folder}: holds a run with other discriminators") from None
        restore_optimizer(self.discriminator_optimizer, groups.get("discriminator_optimizer", {}))


def _what_computes(config: Any) -> dict[str, Any]:
    """A configuration without the name and the descriptions, which may change."""
    found: dict[str, Any] = config.model_dump(exclude={"name", *config.descriptive})
    return found
