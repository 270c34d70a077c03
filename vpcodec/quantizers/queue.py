"""A queue of recent latents, and random numbers that continue from a state dict."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist

from .arguments import check_positive
from .base import NoCodebookError, processes, rank
from .codebook import CodebookQuantizer


class QueueQuantizer(CodebookQuantizer):
    """A quantizer that keeps latents of earlier steps, and draws its own random numbers.

    The state dict holds the queue, the number of latents that ever entered it, and the state of the
    random numbers, so that a loaded quantizer continues exactly where the saved one stopped. The
    queue is empty until the first latents arrive. All processes of a group have the same queue,
    with the latents of all.

    Args:
        dim: D.
        codebook_size: K.
        queue_size: length of the queue; the oldest latents leave first.
        push_size: latents that each process adds per training step, drawn at random because those
            of one clip are similar.
        seed: seed of the random numbers; None: drawn from torch's.
    """

    training_state: tuple[str, ...] = ("queue", "_extra_state")
    how_to_fit = ""

    def __init__(
        self, dim: int, codebook_size: int, *, queue_size: int, push_size: int, seed: int | None
    ) -> None:
        super().__init__()
        check_positive(
            dim=dim, codebook_size=codebook_size, queue_size=queue_size, push_size=push_size
        )
        self.dim = dim
        self.codebook_size = codebook_size
        self.queue_size = queue_size
        self.push_size = push_size
        self._seed = int(torch.randint(2**62, ()) if seed is None else seed) % 2**62
        self._draws = 0
        self._pushed = 0
        self.lazy_buffers = {"queue": queue_size, "codebook": codebook_size}
        self.register_buffer("queue", torch.zeros(0, dim))
        self.register_buffer("codebook", torch.zeros(0, dim))

    def codes(self) -> torch.Tensor:
        if not self.fitted:
            raise NoCodebookError(f"{type(self).__name__} has no codebook yet: {self.how_to_fit}")
        return self.codebook

    @property
    def filled(self) -> int:
        """Latents in the queue."""
        return min(self._pushed, len(self.queue))

    @property
    def fitted(self) -> bool:
        """Whether there is a codebook."""
        return len(self.codebook) > 0

    def recent(self, number: int | None = None) -> torch.Tensor:
        """The newest `number` latents of the queue (None: all), (n, D) float32, oldest first."""
        number = self.filled if number is None else min(number, self.filled)
        end = self._pushed % self.queue_size if self._pushed else 0
        if number <= end:
            return self.queue[end - number : end]
        return torch.cat([self.queue[self.queue_size - (number - end) :], self.queue[:end]])

    @torch.no_grad()
    def push(self, latents: torch.Tensor, *, number: int | None = None) -> None:
        """Add some latents to the queue, drawn at random.

        Args:
            latents: (N, D) float32. If there are fewer than `number`, all are added; in a group,
                where every process must add the same number, some are drawn repeatedly.
            number: number of latents to add, the same in every process; None: `push_size`.

        Raises:
            ValueError: a process of a group has no latents.
        """
        number = min(self.push_size if number is None else number, self.queue_size)
        if processes() == 1:
            number = min(number, len(latents))
        elif len(latents) == 0:
            raise ValueError("a process of a group has no latents for the shared queue")
        if len(self.queue) == 0:
            self._pushed = 0
            self.queue = latents.new_zeros(self.queue_size, self.dim)
        if (
            processes() > 1 and self._pushed == 0
        ):  # without a given seed, each process has drawn its own
            seed = torch.tensor(self._seed, device=latents.device)
            dist.broadcast(seed, 0)
            self._seed = int(seed)
        generator = self.generator(latents.device)
        if number <= len(latents):
            order = torch.randperm(len(latents), device=latents.device, generator=generator)
            order = order[:number]
        else:
            order = torch.randint(
                len(latents), (number,), device=latents.device, generator=generator
            )
        new = latents[order].detach()
        if processes() > 1:
            parts = [torch.empty_like(new) for _ in range(processes())]
            dist.all_gather(parts, new)
            new = torch.stack(parts, 1).flatten(0, 1)[-self.queue_size :]
        at = torch.arange(self._pushed, self._pushed + len(new), device=new.device)
        self.queue[at % self.queue_size] = new
        self._pushed += len(new)

    def generator(self, device: torch.device, *, shared: bool = False) -> torch.Generator:
        """A new generator: a function of the seed, the process and the number of earlier calls.

        Args:
            device: device of the generator.
            shared: whether to use the same generator in every process of the group.
        """
        self._draws += 1
        key = f"{self._seed} {-1 if shared else rank()} {self._draws}".encode()
        mixed = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest())
        return torch.Generator(device).manual_seed(mixed)

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor([self._seed, self._draws, self._pushed])

    def set_extra_state(self, state: torch.Tensor) -> None:
        self._seed, self._draws, self._pushed = (int(value) for value in state)
