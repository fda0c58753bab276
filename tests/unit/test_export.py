"""A float8 export, read back with nothing but the description of its formats."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torchao.float8 import Float8LinearConfig
from torchao.float8 import convert_to_float8_training as torchao_convert

import fp8dist
from fp8dist.config import RECIPES

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
    "I64": torch.int64,
}
RECIPE_NAMES = list(RECIPES)
N, K = 256, 128


def read(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    data, tensors, end = content[8 + length :], {}, 0
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        assert start == end  # no holes
        end = stop
        values = torch.frombuffer(bytearray(data[start:stop]), dtype=DTYPES[entry["dtype"]])
        tensors[name] = values.view(entry["shape"])
    assert end == len(data)
    return tensors


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, K)
        self.up, self.down = nn.Linear(K, N), nn.Linear(N, K, bias=False)
        self.output = nn.Linear(K, 32, bias=False)
        self.register_buffer("steps", torch.tensor(3))


def converted(recipe: str, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    model = Model().to(dtype)
    with torch.no_grad():  # rows of different sizes, one of zeros
        model.up.weight *= torch.logspace(-3, 2, N)[:, None]
        model.up.weight[5] = 0
    return fp8dist.convert_to_float8_training(
        model, config=recipe, module_filter_fn=fp8dist.float8_module_filter(recipe, ["output"])
    )


def dequantized(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """weight * weight_scale, the scale of a block repeated over it; by the layout's definition."""
    factors = torch.exp2(scale.double() - 127) if scale.dtype == torch.uint8 else scale.double()
    factors = factors.view(1, 1) if factors.dim() == 1 else factors
    rows, columns = (size // count for size, count in zip(weight.shape, factors.shape, strict=True))
    return weight.double() * factors.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


SCALES = {
    "tensorwise": (torch.float32, (1,)),
    "rowwise": (torch.float32, (N, 1)),
    "rowwise_with_gw_hp": (torch.float32, (N, 1)),
    "blockwise": (torch.float32, (N // 128, K // 128)),
    "mxfp8_rceil": (torch.uint8, (N, K // 32)),
    "mxfp8_rceil_wgrad_with_hp": (torch.uint8, (N, K // 32)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_what_is_written(recipe: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = converted(recipe, dtype)
    fp8dist.export_float8(model, tmp_path / "new" / "folder")
    tensors = read(tmp_path / "new" / "folder" / "model.safetensors")
    expected = dict(model.state_dict())
    assert tensors.keys() == expected.keys() | {"up.weight_scale", "down.weight_scale"}
    for name in ("embedding.weight", "up.bias", "output.weight", "steps"):
        assert tensors[name].dtype == expected[name].dtype
        assert tensors[name].equal(expected[name])
    scale = tensors["up.weight_scale"]
    assert (scale.dtype, scale.shape) == SCALES[recipe]
    assert tensors["up.weight"].dtype == torch.float8_e4m3fn
    error = dequantized(tensors["up.weight"], scale) - expected["up.weight"].double()
    # e4m3 rounds to one of 8 numbers per power of two, 1/16 of the element at most; below 2^-6 of
    # its scale to a multiple of 2^-9.
    exact = expected["up.weight"].double().abs()
    step = dequantized(torch.full((N, K), 2.0**-10), scale)
    assert (error.abs() <= torch.maximum(exact / 16, step) * 1.0001).all()
    assert tensors["up.weight"][5].float().eq(0).all()


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_the_package_that_everyone_reads_it_with_reads_it(recipe: str, tmp_path: Path) -> None:
    fp8dist.export_float8(converted(recipe), tmp_path)
    theirs, ours = (
        safetensors.torch.load_file(tmp_path / "model.safetensors"),
        read(tmp_path / "model.safetensors"),
    )
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        their = theirs[name]
        assert (their.dtype, their.shape) == (tensor.dtype, tensor.shape)
        # A number without dimensions has no view as bytes.
        their, tensor = (x.contiguous().view(-1).view(torch.uint8) for x in (their, tensor))
        assert their.equal(tensor), name


def quantization(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


WEIGHTS = {
    "tensorwise": {"strategy": "tensor"},
    "rowwise": {"strategy": "channel"},
    "blockwise": {"strategy": "block", "block_structure": [128, 128]},
    "mxfp8_rceil": {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
}


@pytest.mark.parametrize("recipe", WEIGHTS)
def test_config(recipe: str, tmp_path: Path) -> None:
    fp8dist.export_float8(converted(recipe), tmp_path)
    found = quantization(tmp_path)
    assert found["quant_method"] == "compressed-tensors"
    mx = recipe.startswith("mxfp8")
    assert found["format"] == ("mxfp8-quantized" if mx else "float-quantized")
    assert found["ignore"] == ["output"]
    (group,) = found["config_groups"].values()
    assert group["targets"] == ["Linear"]
    common = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    assert group["weights"] == {**common, **WEIGHTS[recipe]}
    assert group["input_activations"]["dynamic"] is True


def test_several_recipes_are_several_groups_that_name_their_layers(tmp_path: Path) -> None:
    model = Model()
    rules = [
        (lambda m, fqn: fqn == "up", "rowwise"),
        (lambda m, fqn: fqn == "down", "mxfp8"),
        (lambda m, fqn: fqn == "output", "rowwise_with_gw_hp"),  # weights as rowwise has them
    ]
    fp8dist.convert_to_float8_training(model, config=rules)
    fp8dist.export_float8(model, tmp_path)
    found = quantization(tmp_path)
    assert found["format"] == "mixed-precision"
    groups = found["config_groups"].values()
    assert [group["targets"] for group in groups] == [["up", "output"], ["down"]]
    assert [group["format"] for group in groups] == ["float-quantized", "mxfp8-quantized"]
    assert found["ignore"] == []


def test_a_config_that_is_there_is_kept(tmp_path: Path) -> None:
    before = {"architectures": ["LlamaForCausalLM"], "quantization_config": {"old": 1}}
    (tmp_path / "config.json").write_text(json.dumps(before))
    fp8dist.export_float8(converted("rowwise"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "old" not in config["quantization_config"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_config_that_is_none_is_refused_and_nothing_written(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="export_float8"):
        fp8dist.export_float8(converted("rowwise"), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == text


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="export_float8.*file"):
        fp8dist.export_float8(converted("rowwise"), tmp_path / "file")


def test_a_dtype_that_safetensors_lacks_leaves_what_was_there(tmp_path: Path) -> None:
    model = converted("rowwise")
    fp8dist.export_float8(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="phase is torch.complex64"):
        fp8dist.export_float8(model, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_model_without_float8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="convert_to_float8_training"):
        fp8dist.export_float8(nn.Linear(16, 16), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_replicated_is_written_by_its_own_names(
    tmp_path: Path, mesh: DeviceMesh
) -> None:
    model = converted("rowwise")
    fp8dist.export_float8(DistributedDataParallel(model), tmp_path / "replicated")
    fp8dist.export_float8(model, tmp_path / "alone")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "replicated" / file).read_bytes() == (
            tmp_path / "alone" / file
        ).read_bytes()


def test_layers_that_a_state_dict_has_by_another_name_are_refused(
    tmp_path: Path, mesh: DeviceMesh
) -> None:
    model = nn.Sequential(DistributedDataParallel(converted("rowwise")))
    message = r"no weight of 0\.module\.up, 0\.module\.down: export the model without what wraps"
    with pytest.raises(ValueError, match=message):
        fp8dist.export_float8(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_tensors_that_stay_torchao_s_are_named(tmp_path: Path) -> None:
    model = nn.ModuleDict({"large": nn.Linear(K, N), "odd": nn.Linear(K, 10)})
    torchao_convert(model, config=Float8LinearConfig(enable_fsdp_float8_all_gather=True))
    fp8dist.convert_to_float8_training(model)
    with pytest.raises(ValueError, match=r"odd\.weight is a WeightWithDynamicFloat8CastTensor"):
        fp8dist.export_float8(model, tmp_path)


class WithExtraState(Model):
    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 3}


def test_what_is_no_tensor_is_named(tmp_path: Path) -> None:
    model = fp8dist.convert_to_float8_training(WithExtraState())
    with pytest.raises(ValueError, match="_extra_state is a dict, which safetensors does not have"):
        fp8dist.export_float8(model, tmp_path)
