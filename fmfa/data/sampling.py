"""Which rows form the batches of an epoch: drawn from (seed, epoch), cut over processes, resumable.

Every process draws the same global batches and takes its own contiguous slice, so the slices of all
ranks, in rank order, are the batch that one process would have seen.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np

from fmfa.errors import ConfigError


class EpochBatches(ABC):
    """A batch sampler whose batches depend on seed and epoch only; iterating yields lists of rows.

    `len` is the number of batches of the whole epoch, wherever it is started.
    """

    def __init__(self, seed: int, rank: int, world_size: int) -> None:
        """Process `rank` of `world_size`."""
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Iterate over this epoch, from its batch number `first_batch` on."""
        self.epoch, self.first_batch = epoch, first_batch
        self._batches: list[np.ndarray] | None = None

    def __len__(self) -> int:
        """Number of batches of the epoch."""
        return len(self._global_batches())

    def __iter__(self) -> Iterator[list[int]]:
        """This process's rows of each batch."""
        for batch in self._global_batches()[self.first_batch :]:
            share = len(batch) // self.world_size
            yield batch[self.rank * share : (self.rank + 1) * share].tolist()

    def _global_batches(self) -> list[np.ndarray]:
        if self._batches is None:
            self._batches = self._draw(np.random.default_rng([self.seed, self.epoch]))
        return self._batches

    @abstractmethod
    def _draw(self, generator: np.random.Generator) -> list[np.ndarray]:
        """The rows of each global batch of an epoch."""


class RandomBatches(EpochBatches):
    """Every row once an epoch, in random order.

    The last batch may be shorter. Over several processes up to `world_size` - 1 rows of it are left out,
    so that all have equally many.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Batches of `batch_size` rows (over all processes) out of `rows`.

        Args:
            rows: length of the table.
            batch_size: rows of a global batch.
            seed: of the order.
            rank, world_size: this process and their number.

        Raises:
            ConfigError: the batch cannot be cut into equal shares, or no full share can be filled.
        """
        if batch_size < 1 or batch_size % world_size:
            raise ConfigError(
                f"batch_size {batch_size} cannot be cut into equal shares for {world_size} processes; give a multiple"
            )
        if rows < world_size:
            raise ConfigError(
                f"{rows} rows do not fill one batch of {batch_size} over {world_size} processes; "
                "lower the batch size or give more data"
            )
        self.rows, self.batch_size = rows, batch_size
        super().__init__(seed, rank, world_size)

    def _draw(self, generator: np.random.Generator) -> list[np.ndarray]:
        order = generator.permutation(self.rows)[: self.rows // self.world_size * self.world_size]
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]


class IdentityBatches(EpochBatches):
    """P identities a batch with K rows each, the rows of an identity next to each other.

    As IVT samples: the rows of each identity are shuffled and cut into groups of K, the remainder left
    out; an identity with fewer than K rows gives one group of K draws with replacement. Batches take the
    next group of P different identities, drawn uniformly among those that have one left, until fewer
    than P have. So the number of batches can differ by epoch. Each process gets whole groups. Repeated draws
    of a row are the same sample, since augmentation derives from (seed, epoch, row).
    """

    def __init__(
        self,
        identities: Sequence[int],
        identities_per_batch: int,
        instances: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """P = `identities_per_batch` (over all processes), K = `instances`.

        Args:
            identities: identity of each row.
            identities_per_batch: P.
            instances: K.
            seed: of all draws.
            rank, world_size: this process and their number.

        Raises:
            ConfigError: P cannot be cut into equal shares or is below 1, or there are fewer than P identities.
        """
        self.identities_per_batch, self.instances = identities_per_batch, instances
        if identities_per_batch < 1 or identities_per_batch % world_size:
            raise ConfigError(
                f"{identities_per_batch} identities a batch cannot be shared by {world_size} processes; give a multiple"
            )
        order = np.argsort(identities, kind="stable")
        _, starts = np.unique(np.asarray(identities)[order], return_index=True)
        self._rows_by_identity = np.split(order, starts[1:])
        if len(starts) < identities_per_batch:
            raise ConfigError(
                f"{identities_per_batch} identities a batch, but the data has {len(starts)}; "
                "lower the batch size or give more data"
            )
        super().__init__(seed, rank, world_size)

    def _draw(self, generator: np.random.Generator) -> list[np.ndarray]:
        groups = [self._groups(rows, generator) for rows in self._rows_by_identity]
        left = np.array([len(cut) for cut in groups])
        batches = []
        while len(available := np.flatnonzero(left)) >= self.identities_per_batch:
            drawn = generator.choice(available, self.identities_per_batch, replace=False)
            left[drawn] -= 1
            batches.append(np.concatenate([groups[identity][left[identity]] for identity in drawn]))
        return batches

    def _groups(self, rows: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        if len(rows) < self.instances:
            return generator.choice(rows, (1, self.instances))
        count = len(rows) // self.instances
        return generator.permutation(rows)[: count * self.instances].reshape(count, self.instances)
