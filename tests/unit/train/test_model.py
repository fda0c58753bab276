"""The model against formulas written another way."""

import math

import pytest
import torch
import torch.nn.functional as F

from fp8dist.config import RECIPES
from fp8dist.train.model import FLAVORS, Attention, Llama, ModelShape, RotaryEmbedding, model_shape

TINY = ModelShape(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=64)


def build(shape: ModelShape = TINY, seq_len: int = 16, seed: int = 0) -> Llama:
    with torch.device("meta"):
        model = Llama(shape, seq_len)
    model.to_empty(device="cpu")
    model.init_weights(seed)
    return model


def test_rope_is_multiplication_by_a_complex_number() -> None:
    head_dim, seq_len, theta = 8, 64, 500000.0
    rope = RotaryEmbedding(head_dim, seq_len, theta)
    x = torch.randn(2, seq_len, 3, head_dim)
    pairs = torch.view_as_complex(x.double().reshape(2, seq_len, 3, head_dim // 2, 2))
    rotated = torch.empty_like(pairs)
    for position in range(seq_len):
        for pair in range(head_dim // 2):
            angle = position / theta ** (2 * pair / head_dim)
            rotated[:, position, :, pair] = pairs[:, position, :, pair] * complex(
                math.cos(angle), math.sin(angle)
            )
    expected = torch.view_as_real(rotated).flatten(-2)
    # A table and products rounded to float32: a few units of 2^-24 of values up to 4 or so.
    torch.testing.assert_close(rope(x).double(), expected, atol=2e-6, rtol=0)


def test_rope_keeps_dtype_and_rounds_once() -> None:
    rope = RotaryEmbedding(8, 16, 10000.0)
    x = torch.randn(1, 16, 2, 8).bfloat16()
    assert rope(x).dtype == torch.bfloat16
    assert torch.equal(rope(x), rope(x.float()).bfloat16())


def test_shared_key_value_heads_equal_repeated_full_heads() -> None:
    shape = TINY
    rope = RotaryEmbedding(shape.dim // shape.n_heads, 16, shape.rope_theta)
    attention = Attention(shape, rope).double()
    x = torch.randn(2, 16, shape.dim, dtype=torch.float64)
    head_dim, group = shape.dim // shape.n_heads, shape.n_heads // shape.n_kv_heads

    def heads(linear: torch.nn.Linear) -> torch.Tensor:
        return F.linear(x, linear.weight).view(2, 16, -1, head_dim)

    query, key, value = rope(heads(attention.wq)), rope(heads(attention.wk)), heads(attention.wv)
    mixed = torch.zeros(2, 16, shape.n_heads, head_dim, dtype=torch.float64)
    for head in range(shape.n_heads):
        for position in range(16):
            seen = slice(0, position + 1)
            scores = torch.einsum(
                "bd,bsd->bs", query[:, position, head], key[:, seen, head // group]
            )
            weights = torch.softmax(scores / math.sqrt(head_dim), dim=-1)
            mixed[:, position, head] = torch.einsum(
                "bs,bsd->bd", weights, value[:, seen, head // group]
            )
    expected = F.linear(mixed.flatten(-2), attention.wo.weight)
    # Both in float64 but for the rotation, which both take from the float32 table.
    torch.testing.assert_close(attention(x), expected, atol=1e-10, rtol=0)


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model = build()
    tokens = torch.randint(TINY.vocab_size, (1, 16))
    changed = tokens.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % TINY.vocab_size
    before, after = model(tokens), model(changed)
    # The same arithmetic on the same numbers; kernels may split sequences differently.
    torch.testing.assert_close(before[:, :10], after[:, :10], atol=1e-6, rtol=0)
    assert not torch.allclose(before[:, 10:], after[:, 10:])


@pytest.mark.parametrize(
    ("flavor", "millions"),
    # As published in the Llama 3 and 3.1 model cards: 8.03, 70.6 and 405 billion.
    [("8B", 8030.3), ("70B", 70553.7), ("405B", 405853.4)],
)
def test_parameter_count(flavor: str, millions: float) -> None:
    with torch.device("meta"):
        model = Llama(FLAVORS[flavor], 16)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 1) == millions


def test_feed_forward_of_405b_is_what_its_multipliers_make() -> None:
    shape = FLAVORS["405B"]
    hidden = int(1.2 * int(2 * (4 * shape.dim) / 3))
    assert shape.hidden_dim == -(-hidden // 4096) * 4096 == 53248
    assert shape.dim // shape.n_heads == 128
    assert shape.rope_theta == 500000


def test_debugmodel_layers_can_all_be_float8_by_every_recipe() -> None:
    with torch.device("meta"):
        model = Llama(FLAVORS["debugmodel"], 16)
    shapes = [
        tuple(module.weight.shape)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    assert len(shapes) == 7 * FLAVORS["debugmodel"].n_layers + 1
    multiple = max(recipe.dim_multiple for recipe in RECIPES.values())
    assert all(rows % multiple == 0 and columns % multiple == 0 for rows, columns in shapes)


def test_names_are_those_of_published_checkpoints() -> None:
    names = {name.removesuffix(".weight") for name in build().state_dict()}
    block = [
        "attention.wq",
        "attention.wk",
        "attention.wv",
        "attention.wo",
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
        "attention_norm",
        "ffn_norm",
    ]
    blocks = {f"layers.{i}.{name}" for i in range(TINY.n_layers) for name in block}
    assert names == {"tok_embeddings", "norm", "output"} | blocks


def test_weights_depend_on_seed_and_name_only() -> None:
    first, again, other = build(seed=1), build(seed=1), build(seed=2)
    wider = build(ModelShape(**{**vars(TINY), "n_layers": 3}), seed=1)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
        if tensor.dim() == 2:
            assert not torch.equal(tensor, other.state_dict()[name]), name
    # Another layer changes no other layer's draw, only the scale of the residual branches.
    name = "layers.1.attention.wq.weight"
    assert torch.equal(first.state_dict()[name], wider.state_dict()[name])
    first_layer, second_layer = (
        first.state_dict()[f"layers.{i}.attention.wq.weight"] for i in "01"
    )
    assert not torch.equal(first_layer, second_layer)


def test_fresh_model_guesses_about_evenly() -> None:
    model = build(FLAVORS["debugmodel"])
    tokens = torch.randint(256, (4, 16))
    loss = F.cross_entropy(model(tokens).flatten(0, 1), torch.randint(256, (64,)))
    # Logits have a variance of 1 at first, which costs half a nat over log(256) = 5.55.
    assert 5.0 < loss.item() < 6.7


def test_recompute_changes_nothing() -> None:
    model = build()
    tokens = torch.randint(TINY.vocab_size, (2, 16))
    model(tokens).logsumexp(-1).sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    calls = []

    def recompute(function, x):
        calls.append(1)
        return torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)

    for block in model.layers:
        block.recompute = recompute
    model(tokens).logsumexp(-1).sum().backward()
    assert len(calls) == TINY.n_layers
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize(("tokens", "vocab"), [(0, 256), (256, 256), (257, 272), (1000, 1008)])
def test_vocabulary_grows_in_sixteens(tokens: int, vocab: int) -> None:
    assert model_shape("debugmodel", tokens).vocab_size == vocab


def test_flavor_with_another_number_of_layers() -> None:
    assert model_shape("8B:4").n_layers == 4
    assert model_shape("8B:4").dim == FLAVORS["8B"].dim


@pytest.mark.parametrize("flavor", ["7B", "8B:", "8B:0", "8B:x", ":4"])
def test_unknown_flavor_is_refused_with_those_there_are(flavor: str) -> None:
    with pytest.raises(ValueError, match=rf"'{flavor}'.*debugmodel, 8B, 70B, 405B.*8B:4"):
        model_shape(flavor)
