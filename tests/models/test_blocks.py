import pytest
import torch
from open_clip.transformer import QuickGELU, Transformer

from fmfa.models.blocks import attend, run_blocks

WIDTH, HEADS, LENGTH = 16, 2, 7
KINDS = {
    "quick": {"act_layer": QuickGELU},
    "gelu": {},
    "layer scale": {"ls_init_value": 0.1},
    "custom": {"qk_norm": True},  # not the plain block: runs as open_clip has it
}


def masks(causal, hides):
    hidden = torch.zeros(3, LENGTH, LENGTH, dtype=torch.bool)
    if causal:
        hidden |= torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    valid = None
    if hides:
        valid = torch.arange(LENGTH) < torch.tensor([[3], [7], [5]])
        hidden |= ~valid[:, None]
    additive = torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, float("-inf"))
    return valid, additive.repeat_interleave(HEADS, dim=0) if causal or hides else None


@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_open_clips_with_their_gradients(kind, causal, hides):
    torch.manual_seed(0)
    transformer = Transformer(WIDTH, 2, HEADS, **KINDS[kind]).double()
    x = torch.randn(3, LENGTH, WIDTH, dtype=torch.float64)
    valid, additive = masks(causal, hides)
    expected = transformer(x, attn_mask=additive)
    positions = torch.tensor([[0, 2], [6, 1], [4, 4]])
    weight = torch.randn(3, 2, WIDTH, dtype=torch.float64)
    picked = torch.stack([row[place] for row, place in zip(expected, positions)])
    torch.testing.assert_close(run_blocks(transformer, x, causal=causal, valid=valid), expected)
    ours = run_blocks(transformer, x, causal=causal, valid=valid, positions=positions)
    torch.testing.assert_close(ours, picked)
    parameters = list(transformer.parameters())
    found = [torch.autograd.grad((out * weight).sum(), parameters) for out in (ours, picked)]
    torch.testing.assert_close(*found)


def test_cross_attention_is_torchs():
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
    x, memory = (torch.randn(3, n, WIDTH, dtype=torch.float64) for n in (LENGTH, 4))
    torch.testing.assert_close(attend(attention, x, memory), attention(x, memory, memory)[0])
