"""Tokens in the order of the batch; what is gathered again, once for all who ask."""

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from fp8dist.tensors import gathering
from fp8dist.tensors.gathering import Again, Cut, GatheredAgain, gather_tokens, in_order

B, S, K = 2, 6, 4


@pytest.mark.parametrize("dim", [0, 1])
def test_tokens_by_rank_are_put_in_the_order_of_the_batch(dim: int) -> None:
    x = torch.randn(B, S, K)
    arrived = torch.cat([part.reshape(-1, K) for part in x.chunk(2, dim)])
    assert torch.equal(in_order(arrived, (B, S), Cut(dim, 2, "")), x)


def test_tokens_that_did_not_arrive_have_no_such_order() -> None:
    with pytest.raises(AssertionError, match="did not arrive"):
        in_order(torch.randn(B * S, K), (B, S), None)


def test_one_rank_gathers_what_it_has(mesh: DeviceMesh) -> None:
    x = torch.randn(S, B, K).transpose(0, 1)
    for dim in (0, 1):
        assert torch.equal(gather_tokens(x, Cut(dim, 1, mesh.get_group().group_name)), x)


@pytest.fixture
def gathers(monkeypatch: pytest.MonkeyPatch) -> list[Cut]:
    """Those that were asked for."""
    found: list[Cut] = []

    def gather(part: torch.Tensor, cut: Cut) -> torch.Tensor:
        found.append(cut)
        return part.clone()

    monkeypatch.setattr(gathering, "gather_tokens", gather)
    return found


def test_layers_that_share_an_input_gather_it_again_once(gathers: list[Cut]) -> None:
    again, cut, part = Again(), Cut(1, 2, ""), torch.randn(B, S, K)
    users = [GatheredAgain(again, cut, torch.Size((B * S, K))) for _ in range(3)]
    found = [user(part) for user in users]
    assert all(torch.equal(one, part.reshape(B * S, K)) for one in found)
    assert len({one.data_ptr() for one in found}) == len(gathers) == 1
    assert again.gathered is None, "nothing waits for it any more"
    users[0](part)
    assert len(gathers) == 2, "a second backward gathers for itself"
    assert again.gathered is None


def test_a_layer_that_will_not_ask_is_not_waited_for(gathers: list[Cut]) -> None:
    again, cut, part = Again(), Cut(1, 2, ""), torch.randn(B, S, K)
    user, recomputed = (GatheredAgain(again, cut, part.shape) for _ in range(2))
    del recomputed
    user(part)
    assert again.gathered is None


def test_what_arrived_in_another_order_is_not_taken(gathers: list[Cut]) -> None:
    again, part = Again(), torch.randn(B, S, K)
    cuts = [Cut(1, 2, ""), Cut(0, 2, "")]
    users = [GatheredAgain(again, cut, part.shape) for cut in cuts]
    for user in users:
        user(part)
    assert gathers == cuts
