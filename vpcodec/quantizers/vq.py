"""Vector quantization with a learned codebook, as strong as we can make it: a baseline."""

from __future__ import annotations

import torch
import torch.distributed as dist

from .base import Quantized, check_positive, check_share, processes
from .kmeans import kmeans
from .queue import QueueQuantizer

INIT_PER_CODE = 4  # latents per code that the first codebook is made of
QUEUE_PER_CODE = 8
INIT_ITERATIONS = 20


class VQ(QueueQuantizer):
    """Nearest of K codes that follow their latents by exponential averages (VQ-VAE-2).

    n_i <- g n_i + (1 - g) |Z_i|, m_i <- g m_i + (1 - g) sum Z_i, c_i = m_i / n_i, with Z_i the
    latents nearest to code i; straight-through gradient; loss commitment * mean (z - sg(c))^2.

    What keeps it from collapsing: the first codebook comes from k-means on the latents of the first
    steps (until there are 4 per code they pass unquantized), and a code whose n_i falls below
    `restart_below` of the average restarts at a random recent latent.

    Our own: vector-quantize-pytorch makes its first codebook of the first batch alone (with
    duplicates where that has fewer latents than codes), restarts codes below an absolute count
    (2: at K = 16,384 that is every code at every step), holds several N x K matrices, and computes
    distances in bfloat16 under CPU autocast.

    Args:
        dim: D.
        codebook_size: K.
        decay: g.
        commitment: weight of the loss.
        restart_below: share of the average use below which a code restarts; 0: never.
        push_size: latents that the queue takes per step and process once there is a codebook.
        seed: of the random numbers; None draws it from torch's.
    """

    training_state = ("queue", "_extra_state", "counts", "sums")
    how_to_fit = "training makes it as soon as there are enough latents"

    def __init__(
        self,
        dim: int = 5,
        codebook_size: int = 1024,
        *,
        decay: float = 0.99,
        commitment: float = 0.25,
        restart_below: float = 0.1,
        push_size: int = 256,
        seed: int | None = None,
    ) -> None:
        check_positive(dim=dim, codebook_size=codebook_size)
        check_share(decay=decay, restart_below=restart_below)
        if commitment < 0:
            raise ValueError(f"commitment must not be negative, got {commitment}")
        queue_size = max(QUEUE_PER_CODE * codebook_size, 8192)
        super().__init__(dim, codebook_size, queue_size=queue_size, push_size=push_size, seed=seed)
        self.decay = decay
        self.commitment = commitment
        self.restart_below = restart_below
        self.register_buffer("counts", torch.zeros(0))
        self.register_buffer("sums", torch.zeros(0, dim))
        self.tables |= {"counts": codebook_size, "sums": codebook_size}

    def forward(self, latents: torch.Tensor) -> Quantized:
        """(..., D) latents -> nearest codes; in training the codes then follow the latents."""
        with torch.autocast(latents.device.type, enabled=False):
            z = self.check_latents(latents)
            flat = z.detach().reshape(-1, self.dim)
            if self.training and not self.fitted:
                self.push(flat, number=len(flat))
                if self.filled >= min(INIT_PER_CODE * self.codebook_size, self.queue_size):
                    self._start()
                return Quantized(z, lambda: self.encode(z.detach()), z.new_zeros(()))
            tokens = self.encode(z)
            codes = self.tokens_to_latents(tokens)
            loss = self.commitment * (z - codes).square().mean()
            if self.training:
                self.push(flat)
                self._follow(flat, tokens.reshape(-1))
                codes = z + (codes - z).detach()
            return Quantized(codes, tokens, loss)

    def _start(self) -> None:
        found = kmeans(
            self.recent(), self.codebook_size, seed=self._seed, max_iterations=INIT_ITERATIONS
        )
        self.codebook = found.centroids
        self.counts = torch.ones_like(found.centroids[:, 0])
        self.sums = found.centroids.clone()

    @torch.no_grad()
    def _follow(self, latents: torch.Tensor, tokens: torch.Tensor) -> None:
        counts = torch.zeros_like(self.counts).index_add_(0, tokens, torch.ones_like(latents[:, 0]))
        sums = torch.zeros_like(self.sums).index_add_(0, tokens, latents)
        if processes() > 1:
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        # in units of the average use, so that a fresh count of 1 means the same at any batch size
        average = counts.sum() / self.codebook_size
        self.counts.lerp_(counts / average, 1 - self.decay)
        self.sums.lerp_(sums / average, 1 - self.decay)
        codes = self.sums / self.counts.clamp(min=1e-6).unsqueeze(1)
        dead = self.counts < self.restart_below
        generator = self.generator(latents.device, shared=True)
        picked = torch.randint(
            self.filled, (self.codebook_size,), device=latents.device, generator=generator
        )
        codes = torch.where(dead.unsqueeze(1), self.queue[picked], codes)
        self.counts = torch.where(dead, torch.ones_like(self.counts), self.counts)
        self.sums = torch.where(dead.unsqueeze(1), codes, self.sums)
        self.codebook = codes
