"""The spectral block against torch alone, and what the notebook leaves out."""
import pytest
import torch
import torch.nn.functional as F

from srl_pose.spectral import SpectralBlock


def composed(x: torch.Tensor, block: SpectralBlock) -> torch.Tensor:
    "One-to-one composition as in the original: rfft2, permute, convolution, BatchNorm, ReLU, permute, irfft2."
    b, c, h, w = x.shape
    z = torch.view_as_real(torch.fft.rfft2(x)).permute(0, 1, 4, 2, 3).reshape(b, 2 * c, h, -1)
    z = F.relu(block.bn(block.conv_layer(z)))
    z = torch.view_as_complex(z.view(b, c, 2, h, -1).permute(0, 1, 3, 4, 2).contiguous())
    return x + block.alpha * torch.fft.irfft2(z, s=(h, w))


@pytest.mark.parametrize('size', [(16, 12), (7, 9), (8, 5), (1, 6), (5, 1)])
@pytest.mark.parametrize('channels_last', [False, True])
def test_output_and_gradients_match_composition(size, channels_last):
    torch.manual_seed(0)
    block = SpectralBlock(16).double()
    for p in block.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(2, 16, *size, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    wanted = [x, *block.parameters()]
    results = []
    for function in (block, lambda x: composed(x, block)):
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
