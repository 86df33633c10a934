"""Several processes (gloo) against one process on the joint batch."""

import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from fmfa.models.clip import ClipRetriever
from fmfa.models.distributed import gather, largest, total, world_size
from fmfa.models.objectives import Objectives

CONTEXT, VOCABULARY = 9, 30
EVERYTHING = {"itc": 1, "cmpm": 1, "sdm": 1, "asdm": 1, "id": 1, "irr": 1, "efa": 1, "irr_depth": 1}
ORACLES = {"efa_oracle": True, "grounding": 1}


def model():
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": VOCABULARY,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    }
    return ClipRetriever(config, Objectives(**EVERYTHING, **ORACLES, efa_chunk=2), identities=4).double()


def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(6, CONTEXT, dtype=torch.int64)
    for row, words in enumerate([2, 1, 3, 6, 4, 5]):  # the ranks' longest captions differ
        ids[row, 0], ids[row, words + 1] = 28, 29
        ids[row, 1 : words + 1] = torch.randint(1, 27, (words,), generator=generator)
    masked, labels = ids.clone(), torch.zeros_like(ids)
    for row, count in enumerate([1, 1, 2, 3, 1, 4]):  # so do their numbers of masked positions
        masked[row, 1 : 1 + count], labels[row, 1 : 1 + count] = 27, ids[row, 1 : 1 + count]
    images = torch.randn(6, 3, 16, 16, generator=generator, dtype=torch.float64)
    parts = torch.full_like(ids, -1)
    parts[0, 1], parts[2:, 1], parts[3:, 2] = 0, 1, 2  # the ranks' numbers of phrase tokens differ too
    return {
        "images": images,
        "part_maps": torch.randint(-1, 3, (6, 16, 16), generator=generator, dtype=torch.int8),
        "token_parts": parts,
        "caption_ids": ids,
        "masked_ids": masked,
        "masked_labels": labels,
        "labels": torch.tensor([0, 1, 0, 2, 3, 1]),
    }


def step(retriever, data):
    output = retriever(data)
    sum(output.losses.values()).backward()
    return {name: loss.detach() for name, loss in output.losses.items()}


SPLITS = ((3, 3), (2, 4))


def run_rank(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {
        "gathered": gather(torch.full((rank + 1, 2), float(rank))),
        "largest": largest(torch.tensor(rank)),
    }
    for sizes in SPLITS:
        start = sum(sizes[:rank])
        retriever = DistributedDataParallel(model())
        losses = step(retriever, {name: t[start : start + sizes[rank]] for name, t in batch().items()})
        results[sizes] = (
            {name: total(loss) / world_size() for name, loss in losses.items()},
            {n: p.grad for n, p in retriever.module.named_parameters() if p.grad is not None},
        )
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_equal_one_on_the_joint_batch(tmp_path):
    multiprocessing.spawn(run_rank, (str(tmp_path),), nprocs=2)
    single = model()
    expected_losses = step(single, batch())
    expected = {n: p.grad for n, p in single.named_parameters() if p.grad is not None}
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt")
        for sizes in SPLITS:  # equal batches, and unequal ones
            losses, gradients = results[sizes]
            for name, loss in expected_losses.items():
                torch.testing.assert_close(losses[name], loss, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(gradients, expected, rtol=1e-8, atol=1e-10)
        assert results["gathered"].tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
        assert results["largest"].item() == 1


def test_one_process_changes_nothing():
    tensor = torch.ones(3, requires_grad=True)
    assert world_size() == 1
    assert gather(tensor) is tensor
    assert not total(tensor).requires_grad
    assert not largest(tensor).requires_grad
