"""The non-local block: what the notebook leaves out."""
import pytest
import torch

from srl_pose.attention import NonLocalBlock


def test_permuting_positions_permutes_the_output():
    torch.manual_seed(0)
    block = NonLocalBlock(8).double()
    for p in block.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    order = torch.randperm(20)
    shuffled = x.flatten(2)[:, :, order].view_as(x)
    torch.testing.assert_close(block(shuffled).flatten(2), block(x).flatten(2)[:, :, order])


@pytest.mark.parametrize('channels', [0, 1, 9, -2])
def test_impossible_channels(channels):
    with pytest.raises(ValueError, match=f'channels={channels} '):
        NonLocalBlock(channels)


@pytest.mark.parametrize('x, message', [
    (torch.zeros(8, 5, 4), 'shape'), (torch.zeros(1, 6, 5, 4), '6 channels'),
    (torch.zeros(1, 8, 5, 4, dtype=torch.int32), 'int32')])
def test_wrong_input(x, message):
    with pytest.raises(ValueError, match=message):
        NonLocalBlock(8)(x)
