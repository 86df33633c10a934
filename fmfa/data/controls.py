"""Training data corrupted on purpose: a study that does not see the damage cannot see an improvement either."""

import numpy as np
import pandas as pd

from fmfa.errors import ConfigError

OF_THE_PICTURE = ("image", "identity", "label", "split", "record", "held_out")


def shuffle_pairs(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Give every picture's captions to pictures of other people, by one random permutation.

    What belongs to a caption (its tokens, phrases and attributes) moves with it; pictures keep their identity. A model
    trained on these pairs can learn nothing that holds, and must end no better than it started.

    Args:
        table: one row a caption, as `Dataset.split` gives it.
        seed: of the permutation.

    Raises:
        ConfigError: more than half of the captions belong to one identity.
    """
    identity = table["identity"].to_numpy()
    most = int(table["identity"].value_counts().max())
    if 2 * most > len(table):
        raise ConfigError(
            f"{most} of {len(table)} training captions belong to one identity; shuffled pairs need pictures of other "
            "people for all of them: train on more identities"
        )
    generator = np.random.default_rng(seed)
    source = generator.permutation(len(table))
    for row in np.flatnonzero(identity[source] == identity):
        if identity[source[row]] == identity[row]:
            fits = (identity[source] != identity[row]) & (identity != identity[source[row]])
            other = generator.choice(np.flatnonzero(fits))
            source[[row, other]] = source[[other, row]]
    moved = [column for column in table if column not in OF_THE_PICTURE]
    return table.assign(**{column: table[column].to_numpy()[source] for column in moved})
