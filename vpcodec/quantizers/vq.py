"""Vector quantization with a learned codebook: a baseline, as strong as we can make it."""

from __future__ import annotations

import torch
import torch.distributed as dist

from .arguments import check_positive, check_share
from .base import Quantized, mean_square, processes
from .kmeans import kmeans
from .knn import SAME, TINY, cell_width, distinct
from .queue import QueueQuantizer

INIT_PER_CODE = 4  # latents per code for the first codebook
QUEUE_PER_CODE = 8
INIT_ITERATIONS = 20
MEMORY, LEAST_MEMORY = 32.0, 8.0  # latents per code that the averages remember
MEMORY_STEPS = 20.0  # most steps that the averages remember
UNUSED = 1e-6  # relative to the average use: codes used less stay in place


class VQ(QueueQuantizer):
    """Nearest of K codes that follow their latents by exponential averages (VQ-VAE-2).

    n_i <- g n_i + (1 - g) |Z_i|, m_i <- g m_i + (1 - g) sum Z_i, c_i = m_i / n_i, with Z_i the
    latents nearest to code i; straight-through gradient; loss commitment * mean (z - sg(c))^2.
    Without `decay`, g depends on the number of latents of a step: each code averages over 32
    latents, but over at most 20 steps if that leaves 8 latents, so that codes neither lag nor jump.

    Two things prevent collapse: the first codebook comes from k-means on the latents of the first
    steps (until there are 4 per code, latents pass unquantized), and a code whose n_i falls below
    `restart_below` times the average restarts at a random recent latent.

    We do not use vector-quantize-pytorch: it fits the first codebook to the first batch only (with
    duplicates if that has fewer latents than codes), restarts codes below an absolute count (2: at
    K = 16,384 that is every code in every step), holds several N x K matrices, and computes
    distances in bfloat16 under CPU autocast.

    Args:
        dim: D.
        codebook_size: K.
        decay: g; None: computed from the number of latents.
        commitment: weight of the loss.
        restart_below: fraction of the average use below which a code restarts; 0: never.
        push_size: latents that each process adds to the queue per step, once there is a codebook.
        seed: seed of the random numbers; None: drawn from torch's.
    """

    training_state = ("queue", "_extra_state", "counts", "sums")
    how_to_fit = "training makes it as soon as there are enough latents"

    def __init__(
        self,
        dim: int = 5,
        codebook_size: int = 1024,
        *,
        decay: float | None = None,
        commitment: float = 0.25,
        restart_below: float = 0.1,
        push_size: int = 256,
        seed: int | None = None,
    ) -> None:
        check_positive(dim=dim, codebook_size=codebook_size)
        check_share(decay=decay or 0.0, restart_below=restart_below)
        if not commitment >= 0:
            raise ValueError(f"commitment must not be negative, got {commitment}")
        queue_size = max(QUEUE_PER_CODE * codebook_size, 8192)
        super().__init__(dim, codebook_size, queue_size=queue_size, push_size=push_size, seed=seed)
        self.decay = decay
        self.commitment = commitment
        self.restart_below = restart_below
        self.register_buffer("counts", torch.zeros(0))
        self.register_buffer("sums", torch.zeros(0, dim))
        self.lazy_buffers |= {"counts": codebook_size, "sums": codebook_size}

    def forward(self, latents: torch.Tensor) -> Quantized:
        """(..., D) latents -> nearest codes; in training the codes then follow the latents."""
        with torch.autocast(latents.device.type, enabled=False):
            z = self.check_latents(latents)
            flat = z.detach().reshape(-1, self.dim)
            if self.training and not self.fitted:
                self._gather(flat)
                return Quantized(z, lambda: self.encode(z.detach()), z.new_zeros(()))
            tokens = self.encode(z)
            codes = self.tokens_to_latents(tokens)
            loss = self.commitment * mean_square(z - codes)
            if self.training:
                self.push(flat)
                self._follow(flat, tokens.reshape(-1))
                codes = z + (codes - z).detach()
            return Quantized(codes, tokens, loss)

    def _gather(self, latents: torch.Tensor) -> None:
        """Queue all latents; fit the first codebook once there are enough."""
        number = torch.tensor(len(latents), device=latents.device)
        if processes() > 1:
            dist.all_reduce(number, dist.ReduceOp.MIN)
        self.push(latents, number=int(number))
        if self.filled < INIT_PER_CODE * self.codebook_size:
            return
        try:
            found = kmeans(
                self.recent(), self.codebook_size, seed=self._seed, max_iterations=INIT_ITERATIONS
            )
        except ValueError:  # too few latents differ, as in silence
            return
        self.codebook = found.centroids

    @torch.no_grad()
    def _follow(self, latents: torch.Tensor, tokens: torch.Tensor) -> None:
        """Move the codes towards their (N, D) latents, and restart unused codes."""
        if len(self.counts) == 0:  # at the start, or loaded without training state
            self.counts = torch.ones_like(self.codebook[:, 0])
            self.sums = self.codebook.clone()
        counts = torch.zeros_like(self.counts)
        counts.index_add_(0, tokens, torch.ones_like(latents[:, 0]))
        sums = torch.zeros_like(self.sums).index_add_(0, tokens, latents)
        if processes() > 1:
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        # Counts are relative to the average use, so that 1 means the same at any batch size.
        average = counts.sum() / self.codebook_size
        if self.decay is None:
            forget = (average / LEAST_MEMORY).clamp(max=1 / MEMORY_STEPS)
            share = 1 - torch.exp(-torch.maximum(average / MEMORY, forget))
        else:
            share = torch.full_like(average, 1 - self.decay)
        average = average.clamp(min=TINY)
        self.counts.lerp_(counts / average, share)
        self.sums.lerp_(sums / average, share)
        means = self.sums / self.counts.clamp(min=TINY).unsqueeze(1)
        codes = torch.where(self.counts.unsqueeze(1) > UNUSED, means, self.codebook)
        if self.filled < self.codebook_size:  # loaded without its queue
            self.codebook = codes
            return
        generator = self.generator(latents.device, shared=True)
        order = torch.randperm(self.filled, device=latents.device, generator=generator)
        candidates = self.queue[order[: self.codebook_size]]
        same = SAME * cell_width(candidates, self.codebook_size)
        new = distinct(torch.cat([codes, candidates]), same)[self.codebook_size :]
        restart = (self.counts < self.restart_below) & new
        self.codebook = torch.where(restart.unsqueeze(1), candidates, codes)
        self.counts = torch.where(restart, torch.ones_like(self.counts), self.counts)
        self.sums = torch.where(restart.unsqueeze(1), candidates, self.sums)
