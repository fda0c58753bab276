"""A weight's address is that of the tensor inside, and copying works as of wrappers."""

import copy
import pickle

import torch
import torch.nn as nn

from fp8dist.tensors import addresses
from fp8dist.tensors.sharded_weight import Float8ShardedWeight


def test_weights_have_the_addresses_of_what_they_wrap() -> None:
    inner = torch.randn(16, 16), torch.randn(16, 16)
    params = [nn.Parameter(Float8ShardedWeight(tensor)) for tensor in inner]
    assert [param.data_ptr() for param in params] == [tensor.data_ptr() for tensor in inner]


def test_copies_are_of_what_is_wrapped() -> None:
    param = nn.Parameter(Float8ShardedWeight(torch.randn(16, 16)))
    for other in (copy.deepcopy(param), pickle.loads(pickle.dumps(param))):
        assert isinstance(other, Float8ShardedWeight) and isinstance(other, nn.Parameter)
        assert torch.equal(other._tensor, param._tensor)
        assert other.data_ptr() == other._tensor.data_ptr() != param.data_ptr()


def test_addresses_are_shown_again_after_an_error() -> None:
    @addresses.without_address
    def fails() -> None:
        assert addresses.hidden()
        raise KeyError

    try:
        fails()
    except KeyError:
        assert not addresses.hidden()
