"""The spectral family against torch alone, and what the notebooks leave out."""
import copy
import io

import pytest
import torch

from srl_pose.blocks.base import TransformBlock
from srl_pose.blocks.spectral import SpectralBlock
from srl_pose.blocks.cpu.fast import group_slices
from srl_pose.blocks.transforms import CosineBlock, OrthogonalBlock
from srl_pose.testing import naive_fft_block, randomize

FAMILY = {'fft': (SpectralBlock, {}), 'fft, upper': (SpectralBlock, {'edges': 'upper'}), 'fft, pytorch1': (SpectralBlock, {'edges': 'pytorch1'}),
          'fft, ortho': (SpectralBlock, {'norm': 'ortho'}), 'lo': (OrthogonalBlock, {'alpha': True}), 'dct': (CosineBlock, {})}
FORMS = [{}, {'spectral_relu': True}, {'bottleneck': True}, {'bottleneck': True, 'spectral_relu': True}]


@pytest.mark.parametrize('size', [(16, 12), (7, 9), (8, 5), (1, 6), (5, 1), (64, 48)])
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('fast', [False, True])
@pytest.mark.parametrize('edges, norm', [('average', 'backward'), ('upper', 'ortho'), ('pytorch1', 'backward')])
def test_output_and_gradients_match_composition(size, channels_last, fast, edges, norm):
    torch.manual_seed(0)
    block = SpectralBlock(16, edges=edges, norm=norm).double()
    block.fast = fast
    for p in block.parameters():
        torch.nn.init.normal_(p)
    batch = 8 if size == (64, 48) else 2  # the large case goes through in several slices
    assert len(group_slices((batch, 16, *size), 8)) == (2 if batch == 8 else 1)
    x = torch.randn(batch, 16, *size, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    wanted = [x, *block.parameters()]
    results = []
    for function in (block, lambda x: naive_fft_block(block, x)):
        y = function(x.requires_grad_())
        results.append([y, *torch.autograd.grad((y ** 3).sum(), wanted)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_alpha_learns_first_and_then_the_rest():
    torch.manual_seed(0)
    block, x = SpectralBlock(8), torch.randn(2, 8, 6, 5)
    step = torch.optim.SGD(block.parameters(), lr=1e-3)
    for expected in ({'alpha'}, {name for name, _ in block.named_parameters()}):
        step.zero_grad()
        (block(x) - x.roll(1, -1)).square().sum().backward()
        assert {name for name, p in block.named_parameters() if p.grad.abs().max() > 0} == expected
        step.step()


@pytest.mark.parametrize('arguments', [dict(channels=0), dict(channels=-8), dict(channels=4), dict(channels=20),
                                       dict(channels=9, groups=2), dict(channels=8, groups=0)])
def test_impossible_groups(arguments):
    with pytest.raises(ValueError, match='not a positive multiple'):
        SpectralBlock(**arguments)


def test_float32_is_as_exact_as_the_definition():
    torch.manual_seed(0)
    block, x = SpectralBlock(64), torch.randn(2, 64, 24, 18)
    for p in block.parameters():
        torch.nn.init.normal_(p)
    exact = copy.deepcopy(block).double()
    errors = []
    for forward in (SpectralBlock.forward, TransformBlock.forward):
        results = []
        for b, t in ((copy.deepcopy(block), x.clone()), (copy.deepcopy(exact), x.double())):
            y = forward(b, t.requires_grad_())
            results.append([y, *torch.autograd.grad(y.square().sum(), [t, b.conv_layer.weight, b.alpha])])
        errors.append([((a - e).abs().max() / e.abs().max()).item() for a, e in zip(*results, strict=True)])
    for ours, theirs in zip(*errors, strict=True):
        assert ours < max(2 * theirs, 1e-6)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('inside', [False, True])
def test_autocast_trains_like_float32(dtype, inside):
    torch.manual_seed(0)
    block, x = SpectralBlock(16), torch.randn(2, 16, 12, 9)
    torch.nn.init.ones_(block.alpha)
    gradients = []
    for enabled in (False, True):
        t = x.clone().requires_grad_()
        with torch.autocast('cpu', dtype=dtype, enabled=enabled):
            y = block(t)
            if inside:
                y.square().sum().backward()
        if not inside:
            y.square().sum().backward()
        assert y.dtype == t.grad.dtype == torch.float32
        gradients.append(t.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)  # the island of float32 covers backward too


@pytest.mark.parametrize('name', FAMILY)
@pytest.mark.parametrize('form', FORMS, ids=lambda form: '+'.join(form) or 'released')
def test_every_form_trains_copies_and_reloads(name, form):
    torch.manual_seed(0)
    family, more = FAMILY[name]
    block, x = family(32, size=(9, 6), **form, **more), torch.randn(3, 32, 9, 6)
    assert torch.equal(block(x), x)
    optimizer = torch.optim.Adam(block.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (block(x) - x.roll(1, -1)).square().mean().backward()
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for n, p in block.named_parameters() if n != 'conv_layer.bias')
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    other = family(32, size=(9, 6), **form, **more)
    other.load_state_dict(torch.load(file, weights_only=True))
    for twin in (other, copy.deepcopy(block)):
        assert torch.equal(twin.eval()(x), block.eval()(x))
    assert not any(t.is_complex() for t in block.state_dict().values())
    with torch.device('meta'):
        assert family(32, size=(9, 6), **form, **more)(torch.empty(1, 32, 9, 6)).shape == (1, 32, 9, 6)


@pytest.mark.parametrize('form', FORMS, ids=lambda form: '+'.join(form) or 'released')
@pytest.mark.parametrize('complex', [True, False])
def test_only_the_released_form_is_offered_to_a_fast_form(form, complex, monkeypatch):
    torch.manual_seed(0)
    block, x = randomize(SpectralBlock(32, size=(9, 6), **form).double()), torch.randn(2, 32, 9, 6, dtype=torch.float64)
    block.complex, layers = complex, []
    monkeypatch.setitem(SpectralBlock.fast_forms, 'cpu', lambda x, *given, **options: layers.append((*given, options)))
    assert torch.allclose(block(x), TransformBlock.forward(block, x), rtol=1e-12, atol=1e-12)
    assert layers == ([(block.alpha, block.conv_layer, block.bn, block.relu, dict(edges='average', norm='backward'))] if complex and 'bottleneck' not in form else [])


@pytest.mark.parametrize('name', FAMILY)
@pytest.mark.parametrize('form', FORMS, ids=lambda form: '+'.join(form) or 'released')
def test_names_in_checkpoints(name, form):
    family, more = FAMILY[name]
    layer = ['weight', 'bias']
    expected = ['alpha', *(f'conv_layer.{p}' for p in layer)]
    expected += [f'bn.{p}' for p in (*layer, 'running_mean', 'running_var', 'num_batches_tracked')]
    expected += [f'relu.{p}' for p in layer if 'spectral_relu' in form]
    expected += [f'conv_back.{p}' for p in layer if 'bottleneck' in form]
    expected += [f'relu_back.{p}' for p in layer if len(form) == 2]
    if name == 'lo':
        expected += [f'source_{m}.parametrizations.weight.{p}' for m in 'PQ' for p in ('original', '0.base')]
    assert list(family(32, size=(9, 6), **form, **more).state_dict()) == expected
    if name == 'lo':
        assert list(OrthogonalBlock(32, size=(9, 6)).state_dict())[0] == 'conv_layer.weight'  # no alpha, as released


def test_learned_transform_stays_orthogonal_and_moves():
    torch.manual_seed(0)
    block, x = OrthogonalBlock(8, size=(7, 5)), torch.randn(4, 8, 7, 5)
    before = block.source_P.weight.detach().clone()
    optimizer = torch.optim.AdamW(block.parameters(), lr=0.03, weight_decay=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        (block(x) - x.roll(1, -1)).square().mean().backward()
        optimizer.step()
    for matrix in (block.source_P.weight, block.source_Q.weight):
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)), atol=1e-5, rtol=0)
    assert (block.source_P.weight - before).abs().max() > 1e-2


@pytest.mark.parametrize('prefix', ['', 'deconv_layers.3.'])
def test_original_orthogonal_checkpoint(prefix):
    torch.manual_seed(0)
    block = torch.nn.Sequential(OrthogonalBlock(4, size=(5, 3))) if prefix else OrthogonalBlock(4, size=(5, 3))
    names = {n.replace('0.', prefix, 1) if prefix else n: t for n, t in block.state_dict().items() if 'source' not in n}
    state = names | {f'{prefix}source_P': torch.randn(5, 5), f'{prefix}source_Q': torch.randn(3, 3)}
    model = block
    if prefix:
        model = torch.nn.Module()
        model.deconv_layers = torch.nn.Sequential(*[torch.nn.Identity()] * 3, block[0])
    model.load_state_dict(state, strict=True)
    found = block[0] if prefix else block
    torch.testing.assert_close(found.source_P.weight, torch.linalg.qr(state[f'{prefix}source_P']).Q)
    with pytest.raises(RuntimeError, match='size mismatch for .*source_P'):
        model.load_state_dict(state | {f'{prefix}source_P': torch.eye(4)})


@pytest.mark.parametrize('build, message', [
    (lambda: OrthogonalBlock(8), 'size=None'), (lambda: CosineBlock(8, spectral_relu=True), 'size=None'),
    (lambda: SpectralBlock(8, spectral_relu=True), 'size=None'), (lambda: CosineBlock(7), 'not a positive multiple of 2'),
    (lambda: SpectralBlock(8, edges='lower'), "edges='lower' is unknown: choose from average, upper, pytorch1"),
    (lambda: SpectralBlock(8, norm='forward'), "norm='forward' is unknown: choose from backward, ortho"),
    (lambda: SpectralBlock(8, bottleneck=True), 'multiple of 32: with groups=8, each group of the bottleneck'),
    (lambda: OrthogonalBlock(8, size=(4, 5))(torch.zeros(1, 8, 5, 4)), 'x is 5x4 .*built for 4x5 only'),
    (lambda: CosineBlock(8)(torch.zeros(1, 8, 5, 4).long()), 'torch.int64'),
    (lambda: SpectralBlock(8)(torch.zeros(1, 8, 5, 4, dtype=torch.complex64)), 'torch.complex64')])
def test_bad_input(build, message):
    with pytest.raises(ValueError, match=message):
        build()
