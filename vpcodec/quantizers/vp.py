"""Vector perturbation (VP-VAE paper, section 3.2): training without a codebook."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist

from ..progress import Progress
from .arguments import check_positive
from .base import Calibration, Quantized, moment_loss, processes, rank
from .kmeans import KMeans, kmeans
from .knn import SAME, TINY, cell_width, distinct, kth_distances, nearest
from .queue import QueueQuantizer

QUEUE_PER_CODE = 16  # latents per code in the default queue
SMALLEST_QUEUE = 1 << 16
CALIBRATION_TOKENS = 1 << 14
CALIBRATION_ITERATIONS = 15  # of k-means; more hardly lower its error
CALIBRATION_TOLERANCE = 0.005  # of the logarithm of the ratio of noise to error
LEAST_PER_CODE = 4  # latents in each half of the data
LARGEST_ETA = 3.0  # beyond this most proposals are rejected, and another step perturbs more
MOST_STEPS = 8


class VP(QueueQuantizer):
    """Perturbs latents as a codebook of K codes would; the codebook is fitted afterwards.

    With D_m(z) the distance from z to its m-th nearest of the recent latents S, a token proposes
    z' = z + u, with u uniform in the ball of radius R(z) = eta D_M(z), M = |S| / K (eq. 3). It
    accepts with probability min{1, [D_k(z) D_M(z) / (D_k(z') D_M(z'))]^D} (eq. 8), and never if the
    way back is longer than R(z') (eq. 7): a Metropolis-Hastings step that leaves the density
    D_k(z)^-D unchanged. Otherwise z stays. The perturbation is detached, so gradients pass. The
    loss pulls the mean and variance of the latents to 0 and 1 (eq. 11).

    Both distances are estimated from the newest `search_size` latents S' of the queue, so the cost
    does not grow with K. With j = max(k, M') and M' = M |S'| / |S|, D_M is estimated as
    D_j(z) (M' / j)^(1/D) on S', and D_k as D_k on S'. Latents of S' that coincide (digital silence)
    count once, so that their noise also has the size of their cell. With `search_size=None` the
    whole queue is searched.

    Only `fit` makes the codebook; eval needs it.

    Args:
        dim: D, 3 to 5 in the paper.
        codebook_size: K.
        eta: radius of the proposals relative to D_M. The paper's 1 gives about half the power of
            the error of a codebook, because about half of the proposals are rejected; 1.5 is about
            right for Gaussian, mixed and speech latents, and `calibrate` makes it exact.
        mh_steps: fewest Metropolis-Hastings steps per token; `calibrate` may raise them.
        neighbors: k of the density estimate.
        search_size: |S'|, the number of newest latents to search; None: the whole queue.
        queue_size: |S|; None: 16 K, at least 65,536.
        push_size: latents that each process adds to the queue per step.
        metropolis: False accepts all proposals (an ablation of the paper).
        seed: seed of the random numbers; None: drawn from torch's.

    Raises:
        ValueError: a size or number is not positive.
    """

    fit_after_training = True
    training_state = ("queue", "_extra_state", "eta")
    how_to_fit = "call fit() after training"

    def __init__(
        self,
        dim: int = 5,
        codebook_size: int = 16_384,
        *,
        eta: float = 1.5,
        mh_steps: int = 1,
        neighbors: int = 8,
        search_size: int | None = 8192,
        queue_size: int | None = None,
        push_size: int = 256,
        metropolis: bool = True,
        seed: int | None = None,
    ) -> None:
        check_positive(dim=dim, codebook_size=codebook_size)
        if queue_size is None:
            queue_size = max(QUEUE_PER_CODE * codebook_size, SMALLEST_QUEUE)
        super().__init__(dim, codebook_size, queue_size=queue_size, push_size=push_size, seed=seed)
        check_positive(mh_steps=mh_steps, neighbors=neighbors)
        if search_size is not None:
            check_positive(search_size=search_size)
        if not (eta > 0 and math.isfinite(eta)):
            raise ValueError(f"eta must be positive, got {eta}")
        self.least_steps = self.mh_steps = mh_steps
        self.neighbors = neighbors
        self.search_size = search_size
        self.metropolis = metropolis
        self.register_buffer("eta", torch.tensor(float(eta)))

    def forward(self, latents: torch.Tensor) -> Quantized:
        """(..., D) latents -> perturbed latents (training) or nearest codes (eval)."""
        with torch.autocast(latents.device.type, enabled=False):
            z = self.check_latents(latents)
            loss = moment_loss(z, 1.0, shared=self.training)
            if not self.training:
                tokens = self.encode(z)
                return Quantized(self.tokens_to_latents(tokens), tokens, loss)
            fixed = z.detach()
            perturbed, stats = self.perturb(fixed)
            return Quantized(z + (perturbed - fixed), lambda: self.encode(fixed), loss, stats)

    @torch.no_grad()
    def perturb(self, latents: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Perturb latents, and add some of them to the queue.

        The very first latents are searched among themselves, later ones among earlier ones.

        Args:
            latents: (..., D) float32.

        Returns:
            (..., D) perturbed latents, and the scalars `accepted` (share of the proposals) and
            `noise` (mean squared length of the perturbation).
        """
        flat = latents.reshape(-1, self.dim)
        if len(flat) == 0 and processes() == 1:
            return latents, {}
        first = self.filled == 0
        if first:
            self.push(flat)
        walk = Walk(self, self.recent(self.search_size))
        perturbed, accepted = walk.run(flat, self.eta, self.generator(flat.device))
        if not first:
            self.push(flat)
        noise = (perturbed - flat).square().sum(1).mean()
        return perturbed.reshape(latents.shape), {"accepted": accepted, "noise": noise}

    def fit(
        self,
        latents: torch.Tensor | Iterable[torch.Tensor] | None = None,
        *,
        seed: int = 0,
        max_iterations: int = 100,
        progress: Progress | None = None,
    ) -> KMeans:
        """Fit the codebook by k-means.

        Args:
            latents: (..., D) latents, or an iterable of batches, such as the latents of a training
                set; None: those in the queue. Processes of a group must pass the same latents
                (their queues are equal); nothing is exchanged.
            seed: the same seed and latents give the same codebook.
            max_iterations: most passes over the latents in memory.
            progress: as for `kmeans`.

        Returns:
            The result of `kmeans`.

        Raises:
            ValueError: the latents have another width, are not finite, or too few of them differ.
        """
        data = self.recent() if latents is None else latents
        if isinstance(data, torch.Tensor):
            data = self.check_latents(data).reshape(-1, self.dim)
        result = kmeans(
            data, self.codebook_size, seed=seed, max_iterations=max_iterations, progress=progress
        )
        if result.centroids.shape[1] != self.dim:
            raise ValueError(
                f"expected latents of {self.dim} dimensions, got {result.centroids.shape[1]}"
            )
        self.codebook = result.centroids.to(self.codebook.device)
        return result

    def forget_codebook(self) -> None:
        """Drop the codebook, as when training continues."""
        self.codebook = self.codebook[:0]

    @torch.no_grad()
    def calibrate(
        self,
        latents: torch.Tensor | None = None,
        *,
        error: float | None = None,
        seed: int = 0,
    ) -> Calibration | None:
        """Set eta so that the perturbation is as strong as the error of a codebook of K codes.

        The strength is the mean squared length over all tokens, including those whose proposal was
        rejected. If no eta up to 3 is enough, as for latents on a curve, which most proposals
        leave, the number of steps is raised. In a group, the first process measures for all.

        Args:
            latents: (..., D) latents to measure on; None: those in the queue.
            error: mean squared error of a codebook of K codes on them, if known (`fit` returns it);
                None: it is estimated by k-means, without changing the codebook.
            seed: seed of k-means and of the measurement.

        Returns:
            What was set; None in processes other than the first.

        Raises:
            ValueError: there are too few latents, or 8 steps do not reach the error.
        """
        found, failure = None, None
        if rank() == 0:
            try:
                found = self._strength(latents, error, seed)
                self.eta.fill_(found.eta)
                self.mh_steps = found.mh_steps
            except ValueError as reason:
                failure = reason
        if processes() > 1:
            values = torch.tensor([float(self.eta), self.mh_steps], device=self.eta.device)
            dist.broadcast(values, 0)
            self.eta.fill_(values[0])
            self.mh_steps = int(values[1])
        if failure is not None:
            raise failure
        return found

    def _strength(
        self, latents: torch.Tensor | None, error: float | None, seed: int
    ) -> Calibration:
        """The calibration for `calibrate` to set."""
        data = self.recent() if latents is None else self.check_latents(latents)
        data = data.reshape(-1, self.dim)
        if len(data) < 2:
            raise ValueError(f"{len(data)} latents are too few to calibrate with")
        pick = torch.Generator().manual_seed(seed)
        data = data[torch.randperm(len(data), generator=pick).to(data.device)]
        if error is None:
            error = _codebook_error(data, self.codebook_size, seed)
        searched = min(self.search_size or len(data), len(data) // 2)
        walk, rest = Walk(self, data[:searched]), data[searched:][:CALIBRATION_TOKENS]
        for walk.steps in range(self.least_steps, max(self.least_steps, MOST_STEPS) + 1):
            found = _match(walk, rest, error, seed)
            if found is not None:
                return found
        raise ValueError(
            f"even with mh_steps={walk.steps}, the perturbation is weaker than the error of a "
            f"codebook, {error:.4g}"
        )

    def get_extra_state(self) -> torch.Tensor:
        return torch.cat([super().get_extra_state(), torch.tensor([self.mh_steps])])

    def set_extra_state(self, state: torch.Tensor) -> None:
        super().set_extra_state(state[:-1])
        self.mh_steps = int(state[-1])


def _match(walk: Walk, latents: torch.Tensor, error: float, seed: int) -> Calibration | None:
    """The eta at which a walk perturbs by `error`; None if even LARGEST_ETA is too small."""

    def noise(eta: float) -> float:
        generator = torch.Generator(latents.device).manual_seed(seed)
        perturbed, _ = walk.run(latents, torch.tensor(eta).to(latents), generator)
        return (perturbed - latents).square().sum(1).mean().item()

    eta = 1.0
    for _ in range(30):
        found = noise(eta)
        if abs(math.log(max(found, TINY) / max(error, TINY))) < CALIBRATION_TOLERANCE:
            return Calibration(eta, walk.steps, found, error)
        if found < error and eta == LARGEST_ETA:
            return None
        # The noise grows about as eta^1.5, because fewer of the longer proposals are accepted.
        eta *= min(max((error / max(found, TINY)) ** (1 / 1.5), 0.25), 4.0)
        eta = min(eta, LARGEST_ETA)
    return None


def _codebook_error(latents: torch.Tensor, codebook_size: int, seed: int) -> float:
    """Mean squared error of a codebook fitted to very many latents, to about 5 %.

    A codebook fitted to few latents has too low an error on those, and too high an error on others.
    For Gaussian, uniform and speech latents, 4 to 256 per code, a third of the former plus two
    thirds of the latter is closest to their common limit.
    """
    if len(latents) < 2 * LEAST_PER_CODE * codebook_size:
        raise ValueError(
            f"{len(latents)} latents are too few to estimate the error of {codebook_size} codes; "
            f"{2 * LEAST_PER_CODE} per code are enough"
        )
    fitted, held_out = latents.chunk(2)
    found = kmeans(fitted, codebook_size, seed=seed, max_iterations=CALIBRATION_ITERATIONS)
    codes = found.centroids[nearest(held_out, found.centroids)]
    return found.error / 3 + (held_out - codes).square().sum(1).mean().item() * 2 / 3


class Walk:
    """Metropolis-Hastings steps of a `VP` among the points S'.

    The names are those of the VP-VAE paper, section 3.2: z, its neighbour distances D_k(z) and
    D_M(z), and the proposal z' = z + u with |u| at most R(z) = eta D_M(z).

    Args:
        quantizer: has the settings: D, K, k, steps per token, whether proposals can be rejected.
        points: (|S'|, D) float32, the latents to search.
    """

    def __init__(self, quantizer: VP, points: torch.Tensor) -> None:
        self.dim = quantizer.dim
        self.steps = quantizer.mh_steps
        self.metropolis = quantizer.metropolis
        self.points = points
        self.counted = distinct(points, SAME * cell_width(points, quantizer.codebook_size))
        wanted = max(quantizer.neighbors, round(len(points) / quantizer.codebook_size))
        j = min(wanted, len(points))
        self.orders = (min(quantizer.neighbors, j), j)
        m_subset = self.counted.sum() / quantizer.codebook_size  # M'
        self.d_m_scale = (m_subset / j) ** (1 / self.dim)

    def run(
        self, latents: torch.Tensor, eta: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Perturb latents.

        Args:
            latents: (N, D) float32.
            eta: scalar radius factor.
            generator: source of the random numbers, on the device of the latents.

        Returns:
            (N, D) perturbed latents, and the share of accepted proposals.
        """
        shape, device = latents.shape, latents.device
        z, d_k, d_m = latents, *self.distances(latents)
        accept_rate = torch.zeros((), device=device)
        for _ in range(self.steps):
            direction = torch.randn(shape, device=device, generator=generator)
            radius = torch.rand(shape[0], device=device, generator=generator)
            log_u = torch.rand(shape[0], device=device, generator=generator).log()
            radius = eta * d_m * radius ** (1 / self.dim)  # uniform in the ball of radius R(z)
            step = torch.nn.functional.normalize(direction, dim=1) * radius.unsqueeze(1)
            proposal = z + step
            proposal_d_k, proposal_d_m = self.distances(proposal)
            if self.metropolis:
                log_ratio = (d_k * d_m).log() - (proposal_d_k * proposal_d_m).log()
                reversible = radius <= eta * proposal_d_m  # eq. 7
                accepted = (log_u < self.dim * log_ratio) & reversible
            else:
                accepted = proposal.isfinite().all(1)
            z = torch.where(accepted.unsqueeze(1), proposal, z)
            d_k = torch.where(accepted, proposal_d_k, d_k)
            d_m = torch.where(accepted, proposal_d_m, d_m)
            accept_rate += accepted.float().mean() / self.steps
        return z, accept_rate

    def distances(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """D_k and the estimate of D_M of (N, D) latents, both (N,) float32 and above 0."""
        d_k, d_j = kth_distances(latents, self.points, self.orders, counted=self.counted)
        return d_k.clamp(min=TINY), d_j.clamp(min=TINY) * self.d_m_scale
