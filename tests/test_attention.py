"""The attention blocks against one-to-one compositions, in half precision, and what the notebook leaves out."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from srl_pose.blocks.attention import CompactNonLocalBlock, CrissCrossAttention, CrissCrossBlock, DoubleAttentionBlock, criss_cross
from srl_pose.blocks.non_local import NonLocalBlock
from srl_pose.testing import randomize

BLOCKS = {'nl': NonLocalBlock, 'cgnl': CompactNonLocalBlock, 'a2': DoubleAttentionBlock, 'cc': CrissCrossBlock}
NORM = ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
NAMES = {  # of the original's checkpoints, in their order
    'nl': [f'{m}.{p}' for m in 'tpgz' for p in ('weight', 'bias')] + [f'bn.{p}' for p in NORM],
    'cgnl': ['t.weight', 'p.weight', 'g.weight', 'z.weight', 'gn.weight', 'gn.bias'],
    'a2': [f'{m}.{p}' for m in ('convA', 'convB', 'convV', 'conv_expand') for p in ('weight', 'bias')]
    + [f'bn.{p}' for p in NORM],
    'cc': ['conva.0.weight', *(f'conva.1.{p}' for p in NORM), 'cca.gamma',
           *(f'cca.{m}_conv.{p}' for m in ('query', 'key', 'value') for p in ('weight', 'bias')),
           'convb.0.weight', *(f'convb.1.{p}' for p in NORM)]}


def random_block(name: str, channels: int = 32, std: float = 0.2, **options) -> nn.Module:
    "A block with random parameters."
    torch.manual_seed(0)
    return randomize(BLOCKS[name](channels, **options), std=std)


def composed_nl(x, m):
    t, p, g = (conv(x).flatten(2) for conv in (m.t, m.p, m.g))
    y = torch.einsum('bij,bcj->bci', (torch.einsum('bci,bcj->bij', t, p) / t.shape[1] ** 0.5).softmax(2), g)
    return x + m.bn(m.z(y.view(*y.shape[:2], *x.shape[2:])))


def composed_cgnl(x, m):
    "Features of each order side by side, one group after the other."
    out = []
    for t, p, g in zip(*(conv(x).chunk(8, 1) for conv in (m.t, m.p, m.g))):
        scale = [math.sqrt(math.exp(-2e-4) * 2e-4 ** k / math.factorial(k)) for k in range(4)]
        t_features, p_features = (torch.stack([s * u.flatten(1) ** k for k, s in enumerate(scale)], 1) for u in (t, p))
        out.append(((p_features @ g.flatten(1)[:, :, None]).transpose(1, 2) @ t_features).view_as(t))
    return x + m.gn(m.z(torch.cat(out, 1)))


def composed_a2(x, m):
    a, b, v = (conv(x).flatten(2) for conv in (m.convA, m.convB, m.convV))
    y = torch.einsum('bcj,bkj,bki->bci', a, b.softmax(2), v.softmax(2))
    return x + m.bn(m.conv_expand(y.view(*y.shape[:2], *x.shape[2:])))


def composed_cc(x, m):
    "Dense attention in which everything outside the cross is masked."
    H, W = x.shape[2:]
    place = torch.arange(H * W)
    cross = (place // W == place[:, None] // W) | (place % W == place[:, None] % W)
    y = F.leaky_relu(m.conva[1](m.conva[0](x)))
    for attention in (m.cca, m.cca2 or m.cca):
        q, k, v = (conv(y).flatten(2) for conv in (attention.query_conv, attention.key_conv, attention.value_conv))
        share = torch.einsum('bci,bcj->bij', q, k).masked_fill(~cross, -math.inf).softmax(2)
        y = attention.gamma * torch.einsum('bij,bcj->bci', share, v).view_as(y) + y
    return x + F.leaky_relu(m.convb[1](m.convb[0](y)))


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('size', [(6, 5), (1, 7), (8, 1), (1, 1)])
@pytest.mark.parametrize('name, options', [('nl', {}), ('cgnl', {}), ('a2', {}), ('cc', {}), ('cc', {'shared': False})])
def test_output_and_gradients_match_composition(name, options, size, channels_last):
    block = random_block(name, **options).double()
    x = torch.randn(2, 32, *size, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    wanted, results = [x.requires_grad_(), *block.parameters()], []
    for function in (block, lambda x: globals()[f'composed_{name}'](x, block)):
        y = function(x)
        results.append([y, *torch.autograd.grad(y.pow(3).sum(), wanted)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8 * theirs.abs().max().clamp(min=1).item())


@pytest.mark.parametrize('name', BLOCKS)
def test_float32_agrees_with_float64(name):
    block, x = random_block(name, std=0.1).eval(), torch.randn(2, 32, 24, 18)
    with torch.no_grad():
        single, exact = block(x), block.double()(x.double())
    assert (single - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize('name', BLOCKS)
def test_names_are_the_originals(name):
    assert list(BLOCKS[name](32).state_dict()) == NAMES[name]


def test_two_attentions_add_names_only():
    names = list(CrissCrossBlock(32, shared=False).state_dict())
    assert [n for n in names if not n.startswith('cca2.')] == NAMES['cc']
    assert len(names) - len(NAMES['cc']) == len(CrissCrossAttention(8).state_dict())


@pytest.mark.parametrize('name, count', [('nl', 396_672), ('cgnl', 308_736), ('a2', 199_488), ('cc', 902_259)])
def test_identity_at_initialisation_with_the_published_parameters(name, count):
    block, x = BLOCKS[name](256, size=(4, 3)), torch.randn(2, 256, 4, 3)
    assert 3 * sum(p.numel() for p in block.parameters()) == count
    for training in (True, False):
        assert torch.equal(block.train(training)(x), x)
    last = block.convb[1] if name == 'cc' else block.gn if name == 'cgnl' else block.bn
    block(torch.randn(2, 256, 4, 3).requires_grad_()).pow(2).sum().backward()
    assert last.weight.grad.abs().max() > 0


def test_only_the_last_norm_of_criss_cross_starts_at_zero():
    block = CrissCrossBlock(32)
    assert block.conva[1].weight.eq(1).all() and block.convb[1].weight.eq(0).all() and block.cca.gamma.eq(0).all()
    assert 0.005 < block.conva[0].weight.std() < 0.02


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('inside', [False, True], ids=['float32 input', 'half input'])
@pytest.mark.parametrize('name', BLOCKS)
def test_autocast_trains_without_nan(name, dtype, inside):
    block = random_block(name, std=0.1)
    x = (30 * torch.randn(2, 32, 16, 12)).to(dtype if inside else torch.float32).requires_grad_()
    with torch.autocast('cpu', dtype=dtype):
        y = block(x)
    assert y.dtype == x.dtype
    y.float().square().mean().backward()
    assert all(torch.isfinite(t).all() for t in (y, x.grad, *(p.grad for p in block.parameters())))


@pytest.mark.parametrize('name', BLOCKS)
def test_a_block_in_bfloat16_throughout(name):
    block, x = random_block(name, std=0.1).eval(), torch.randn(1, 32, 9, 7)
    with torch.no_grad():
        exact = block(x)
        y = block.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() < 0.05 * exact.abs().max()


def test_large_scores_overflow_nothing():
    "Scores far beyond float16's 65504."
    q, k, v = (200 * torch.randn(1, 16, 5, 4) for _ in range(3))
    y = criss_cross(q.half(), k.half(), v.half())
    assert y.dtype == torch.float16 and torch.isfinite(y).all()
    block = random_block('nl', std=0.5).eval()
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.float16):
        assert block.t(100 * torch.ones(1, 32, 1, 1)).abs().max() > 256  # so that a square exceeds 65504
        assert torch.isfinite(block(100 * torch.randn(1, 32, 6, 5))).all()


@pytest.mark.parametrize('name', ['nl', 'cgnl', 'a2'])
def test_permuting_positions_permutes_the_output(name):
    block = random_block(name).double()
    x = torch.randn(2, 32, 5, 4, dtype=torch.float64)
    order = torch.randperm(20)
    shuffled = x.flatten(2)[:, :, order].view_as(x)
    torch.testing.assert_close(block(shuffled).flatten(2), block(x).flatten(2)[:, :, order])


def test_criss_cross_knows_rows_from_columns():
    "Transposing the map transposes the attention; any other shuffle of positions does not commute."
    q, k, v = torch.randn(3, 1, 8, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(criss_cross(q.mT, k.mT, v.mT).mT, criss_cross(q, k, v))
    order = torch.randperm(20)
    shuffled = [u.flatten(2)[:, :, order].view_as(u) for u in (q, k, v)]
    assert not torch.allclose(criss_cross(*shuffled).flatten(2), criss_cross(q, k, v).flatten(2)[:, :, order])


@pytest.mark.parametrize('name, numbers', [('nl', 32), ('cgnl', 32), ('a2', 32), ('cc', 40 + 30)])
def test_nothing_grows_with_the_square_of_positions(name, numbers):
    "What is saved for backward holds at most so many numbers for each of N = 1,200 positions (cc: H + W)."
    kept, block = [], random_block(name)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        block(torch.randn(1, 32, 40, 30))
    assert max(kept) <= 1200 * numbers


@pytest.mark.parametrize('name, multiple', [('nl', 2), ('cgnl', 16), ('a2', 4), ('cc', 32)])
@pytest.mark.parametrize('channels', [0, 1, -32, 33])
def test_impossible_channels(name, multiple, channels):
    with pytest.raises(ValueError, match=f'channels={channels} is not a positive multiple of {multiple}:'):
        BLOCKS[name](channels)


@pytest.mark.parametrize('name', BLOCKS)
@pytest.mark.parametrize('x, message', [
    (torch.zeros(32, 5, 4), 'shape'), (torch.zeros(1, 6, 5, 4), '6 channels'),
    (torch.zeros(1, 32, 5, 4, dtype=torch.int32), 'int32'), (torch.zeros(1, 32, 5, 4) + 0j, 'complex64')])
def test_wrong_input(name, x, message):
    with pytest.raises(ValueError, match=message):
        BLOCKS[name](32)(x)


@pytest.mark.parametrize('name', BLOCKS)
def test_unknown_options_are_errors(name):
    with pytest.raises(TypeError):
        BLOCKS[name](32, groups=4)
