"""How far apart are two sets of feature vectors? Fréchet distance and KID, in float64.

Both take features in any order and in batches of any size, from one process or several, and give the same numbers.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from flextok.evaluation.reconstruction import mean_and_error
from flextok.seeding import mixed_seed


class FeatureMoments:
    """Count, mean `[D]` and scatter `[D, D]` (the sum of outer products of deviations), one batch after another.

    Batches and processes are merged by the update of Chan, Golub and LeVeque (1979), which subtracts no large sums.
    """

    def __init__(self) -> None:
        self.count = 0
        # Scalars until the first features tell D and the device.
        self.mean = self.scatter = torch.zeros((), dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Count `[B, D]` features of any float type in."""
        if len(features) == 0:
            return
        # mps has no float64.
        features = (features.cpu() if features.device.type == "mps" else features).double()
        self._make_room(features.shape[1], features.device)
        mean = features.mean(dim=0)
        centred = features - mean
        self.scatter.addmm_(centred.T, centred)
        self._move(len(features), mean)

    def merge(self, other: "FeatureMoments") -> None:
        """Count in what another one has seen."""
        if other.count:
            self._make_room(len(other.mean), other.mean.device)
            self.scatter += other.scatter
            self._move(other.count, other.mean)

    def of_all_processes(self, device: torch.device) -> "FeatureMoments":
        """What all processes have seen together; call it on every rank. Itself where there is only one.

        `device` is that of the features, for a process that has seen none.
        """
        from flextok.training.distributed import of_all_ranks

        known = [(count, dim) for count, dim in of_all_ranks((self.count, self.mean.numel())) if count]
        if not _is_distributed() or not known:
            return self
        self._make_room(known[0][1], device)
        together = FeatureMoments()
        together.count = sum(count for count, _ in known)
        together.mean = _summed(self.mean * self.count) / together.count
        delta = self.mean - together.mean
        together.scatter = _summed(self.scatter + self.count * torch.outer(delta, delta))
        return together

    def covariance(self) -> Tensor:
        """`[D, D]`, unbiased; needs two feature vectors."""
        return self.scatter / (self.count - 1)

    def _make_room(self, dim: int, device: torch.device) -> None:
        if self.mean.ndim == 0:
            self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
            self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def _move(self, count: int, mean: Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean
        self.scatter.addr_(delta, delta, alpha=self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """Squared Wasserstein-2 distance of normal distributions with means `[D]` and covariances `[D, D]`, in float64.

    `|mean_a - mean_b|² + tr(A) + tr(B) - 2 tr((AB)^½)`.
    """
    mean_a, covariance_a, mean_b, covariance_b = (x.cpu() for x in (mean_a, covariance_a, mean_b, covariance_b))
    # With A = PPᵀ and B = QQᵀ the last trace is the sum of the singular values of PᵀQ. Unlike a root of the matrix AB
    # this survives covariances of fewer images than features, and what rounding left of their zeros has no weight.
    overlap = torch.linalg.svdvals(_root(covariance_a).T @ _root(covariance_b)).sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * overlap
    return max(0.0, float(distance))


def _root(covariance: Tensor) -> Tensor:
    """`P` of `[D, rank]` with `P Pᵀ` the covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    significant = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, significant] * values[significant].sqrt()


class FeatureSample:
    """The features of at most `size` images: those whose keys come first in an order that `stream` decides.

    So the choice depends on the keys alone, and memory does not grow with the data set.
    """

    def __init__(self, size: int, *, stream: Sequence[int | str]) -> None:
        self._size = size
        self._stream = tuple(stream)
        self._rows: list[tuple[int, Tensor]] = []

    def add(self, features: Tensor, keys: Sequence[str]) -> None:
        """Take what is wanted of `[B, D]` features of the images with these keys."""
        places = [mixed_seed(*self._stream, key) for key in keys]
        self._rows += zip(places, features.detach().float().cpu().clone().unbind(), strict=True)
        if len(self._rows) > 2 * self._size:
            self._drop()

    def of_all_processes(self) -> Tensor:
        """Features `[n, D]` in their order, of all processes together; call it on every rank."""
        from flextok.training.distributed import of_all_ranks

        self._drop()
        if _is_distributed():
            places = [place for place, _ in self._rows]
            rows = torch.stack([row for _, row in self._rows]) if self._rows else torch.zeros(0, 0)
            of_ranks = of_all_ranks((places, rows))
            self._rows = [pair for places, rows in of_ranks for pair in zip(places, rows.unbind(), strict=True)]
            self._drop()
        return torch.stack([row for _, row in self._rows]) if self._rows else torch.zeros(0, 0)

    def _drop(self) -> None:
        self._rows.sort(key=lambda row: row[0])
        # Rows are views of their batch: what stays is copied, or all of the batch would stay.
        self._rows = [(place, row.clone()) for place, row in self._rows[: self._size]]


def kernel_distance(ours: Tensor, references: Tensor, *, subset_size: int) -> tuple[float, float | None]:
    """KID (arXiv 1801.01401) of features `[n, D]` and `[m, D]`, at least two each: mean over subsets, standard error.

    Subsets are blocks of `subset_size` rows that follow one another; fewer rows than one block are one smaller block,
    and one block alone has no standard error.
    """
    size = min(subset_size, len(ours), len(references))
    num_blocks = min(len(ours), len(references)) // size
    blocks = (slice(index * size, (index + 1) * size) for index in range(num_blocks))
    return mean_and_error([_squared_mmd(ours[block].double(), references[block].double()) for block in blocks])


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased estimate with the kernel `(x·y / D + 1)³`, for two samples of one size that are independent."""
    size, dim = x.shape
    among_x, among_y, across = (((a @ b.T) / dim + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = among_x.sum() - among_x.trace() + among_y.sum() - among_y.trace()
    return float(within / (size * (size - 1)) - 2 * across.mean())


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _summed(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor
