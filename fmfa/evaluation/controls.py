"""An evaluation spoilt on purpose, which must end at chance."""

from dataclasses import replace

import torch

from fmfa.evaluation import Evaluation


def shuffle_captions(evaluation: Evaluation, seed: int = 0) -> Evaluation:
    """The same evaluation with the captions dealt out anew among the queries, without encoding anything again.

    A query keeps its identity and gets a random caption, once in a while one of its own identity: only so is R@1
    expected to be that of a random ranking. (With captions of other identities alone a perfect system would have 0.) At
    deeper ranks a good system stands below a random ranking, because pictures of one person follow each other.

    Args:
        evaluation: of a split.
        seed: of the permutation.

    Returns:
        An evaluation whose R@1 is at chance but for the luck of the permutation; where it is above, the answer has
        another way to the system than the caption.
    """
    order = torch.randperm(len(evaluation.rows), generator=torch.Generator().manual_seed(seed))
    captions = evaluation.rows["caption"].to_numpy()[order.numpy()]
    return replace(
        evaluation,
        rows=evaluation.rows.assign(caption=captions),
        text_features=evaluation.text_features[order],
    )
