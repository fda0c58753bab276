"""Swap a model's linear layers for `Float8Linear`, and say what was left alone and why."""

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from fp8dist import config as configs
from fp8dist.config import HP_DTYPES, Float8Config
from fp8dist.linear import Float8Linear
from fp8dist.small_kn import Thresholds, thresholds_by_recipe
from fp8dist.tensors.sharded_weight import Float8ShardedWeight

logger = logging.getLogger("fp8dist")

ModuleFilter = Callable[[nn.Module, str], bool]
Rule = tuple[ModuleFilter, Float8Config]

AUTO_FILTER = "auto_filter_small_kn"


class float8_module_filter:  # noqa: N801 - called like a function, as torchao's filters are
    """A `module_filter_fn` that leaves out layers by name and by size.

    Args:
        recipe_name: the recipe that the layers will be converted to; torchao's enum does, too.
        filter_fqns: parts of fully qualified names; a layer whose name contains one stays in
            high precision. The entry "auto_filter_small_kn" leaves out layers that are too
            small to gain, as measured on this machine's GPU, or else on another
            (`fp8dist.small_kn`). All ranks must convert the same layers: where their GPUs differ,
            name the layers instead.

    A layer whose dimensions the hardware cannot multiply is left out as well.

    Raises:
        ValueError: unknown recipe, or "auto_filter_small_kn" with one that has no thresholds on
            this GPU: tensorwise and rowwise have some on every GPU, others where they were
            measured.
    """

    def __init__(self, recipe_name: str | Enum, filter_fqns: Sequence[str] = ()) -> None:
        if isinstance(filter_fqns, str) or not isinstance(filter_fqns, Iterable):
            kind = type(filter_fqns).__name__
            raise ValueError(f"filter_fqns is a list of names, got the {kind} {filter_fqns!r}")
        self.recipe = configs.recipe(recipe_name)
        self.filter_fqns = [fqn for fqn in filter_fqns if fqn != AUTO_FILTER]
        self.thresholds: Thresholds | None = None
        if AUTO_FILTER in filter_fqns:
            gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
            known = thresholds_by_recipe(gpu)
            if self.recipe.name not in known:
                raise ValueError(
                    f"{AUTO_FILTER} has no thresholds for recipe {recipe_name!r} on "
                    f"{gpu or 'a machine without a GPU'} (it has them for {', '.join(known)}): "
                    "name the layers to leave out in filter_fqns"
                )
            self.thresholds = known[self.recipe.name]

    def __call__(self, module: nn.Module, fqn: str) -> bool:
        return self.reason(module, fqn) is None

    def reason(self, module: nn.Module, fqn: str) -> str | None:
        """Why the layer stays in high precision, or None if it is to be converted."""
        if not isinstance(module, nn.Linear):
            return "not a linear layer"
        for part in self.filter_fqns:
            if part in fqn:
                return f"in filter_fqns ({part})"
        rows, columns = module.out_features, module.in_features
        multiple = self.recipe.dim_multiple
        if rows % multiple or columns % multiple:
            return f"dimensions not multiples of {multiple}"
        if self.thresholds is not None and self.thresholds.too_small(columns, rows):
            return f"too small to gain ({AUTO_FILTER})"
        return None

    def unmatched(self, fqns: Iterable[str]) -> list[str]:
        fqns = list(fqns)
        return [part for part in self.filter_fqns if not any(part in fqn for fqn in fqns)]


def convert_to_float8_training(
    module: nn.Module,
    *,
    config: Any = None,
    module_filter_fn: ModuleFilter | None = None,
) -> nn.Module:
    """Make the linear layers of a model compute and, under FSDP2, communicate in float8.

    Call it before `parallelize_module` and `fully_shard`, and before the optimizer is made: a
    layer stays the same module, with its hooks and attributes, but has a new weight parameter,
    with the attributes of the old one but not its hooks.

    Args:
        module: a model, or a single `nn.Linear`; changed in place. Layers that torchao has
            converted are taken over.
        config: a `Float8Config`, torchao's `Float8LinearConfig`, a recipe name, None for
            tensorwise, or a list of (filter, any of these) of which the first whose filter
            accepts a layer counts.
        module_filter_fn: (module, fully qualified name) -> whether to convert the layer; None
            stands for `float8_module_filter(recipe, [])`.

    Layers that torchao has converted, or this function before, keep the config they have, whatever
    `config` says; of the latter a warning tells if that is another.

    Returns:
        module.

    Raises:
        ValueError: a config that matches no recipe, a layer that is already sharded, a layer
            that the filter accepts but the hardware cannot multiply.
    """
    rules = _rules(config, module_filter_fn)
    linears = {fqn: m for fqn, m in module.named_modules() if isinstance(m, nn.Linear)}
    owners, read_elsewhere = parameter_owners(module), _read_by_encoders(module)
    converted: dict[str, list[str]] = defaultdict(list)
    left_alone: dict[str, list[str]] = defaultdict(list)
    before: dict[str, bool] = {}
    chosen: list[tuple[str, nn.Linear, Float8Config]] = []
    for fqn, linear in linears.items():
        float8_config, reason = _choose(rules, linear, fqn)
        if isinstance(linear, Float8Linear):
            before[fqn] = float8_config in (None, linear.config)
            continue
        reason = reason or _cannot_convert(linear, owners, read_elsewhere)
        if reason is not None or float8_config is None:
            left = "as torchao has converted them" if _is_torchao(linear) else "in high precision"
            left_alone[f"{left}, {reason or 'rejected by module_filter_fn'}"].append(fqn)
            continue
        _check_convertible(linear, fqn, float8_config)
        chosen.append((fqn, linear, float8_config))
    for fqn, linear, float8_config in chosen:
        Float8Linear.from_float(linear, float8_config, fqn, module)
        converted[float8_config.recipe_name].append(fqn)
    if chosen:
        patch_inductor()
    log_converted_before(before)
    _log(converted, left_alone, rules, list(linears))
    if not chosen and not before:
        logger.warning(
            "no linear layer was converted to float8: the model trains in high precision"
        )
    return module


def _rules(config: Any, module_filter_fn: ModuleFilter | None) -> list[Rule]:
    if isinstance(config, list | tuple):
        for pair in config:
            if not isinstance(pair, list | tuple) or len(pair) != 2 or not callable(pair[0]):
                raise ValueError(
                    f"config has {pair!r} in its list: each entry is (filter, config), the filter "
                    "a function of (module, fully qualified name)"
                )
        rules = [(filter_fn, as_config(one)) for filter_fn, one in config]
        if module_filter_fn is None:
            return rules
        outer = module_filter_fn
        return [(_both(outer, filter_fn), one) for filter_fn, one in rules]
    float8_config = as_config(config)
    if module_filter_fn is not None and not callable(module_filter_fn):
        raise ValueError(
            f"module_filter_fn is {module_filter_fn!r}: pass a function of (module, fully "
            "qualified name); float8_module_filter makes one of names"
        )
    filter_fn = module_filter_fn or float8_module_filter(float8_config.recipe_name)
    return [(filter_fn, float8_config)]


def _both(first: ModuleFilter, second: ModuleFilter) -> ModuleFilter:
    return lambda module, fqn: first(module, fqn) and second(module, fqn)


def as_config(config: Any) -> Float8Config:
    if config is None:
        return Float8Config()
    if isinstance(config, Float8Config):
        return config
    if isinstance(config, str | Enum):
        return Float8Config(recipe_name=config if isinstance(config, str) else config.value)
    if type(config).__name__ == "Float8LinearConfig":  # torchao's; see `_is_torchao`
        return configs.from_torchao(config)
    raise ValueError(
        f"config is a {type(config).__name__}: pass a Float8Config, a torchao Float8LinearConfig, "
        f"a recipe name ({', '.join(configs.RECIPES)}) or a list of (filter, config)"
    )


def _choose(
    rules: list[Rule], linear: nn.Linear, fqn: str
) -> tuple[Float8Config | None, str | None]:
    """The config of the first rule that accepts the layer, or why none does."""
    reason = None
    for filter_fn, float8_config in rules:
        if filter_fn(linear, fqn):
            if _is_torchao(linear):
                try:
                    return configs.from_torchao(linear.config), None
                except ValueError as error:
                    raise ValueError(f"{fqn}, converted by torchao: {error}") from None
            return float8_config, None
        if isinstance(filter_fn, float8_module_filter):
            reason = reason or filter_fn.reason(linear, fqn)
    return None, reason or "rejected by module_filter_fn"


def _is_torchao(linear: nn.Linear) -> bool:
    # By name: importing torchao is slow, and it is loaded if there is such a layer.
    return type(linear).__module__ == "torchao.float8.float8_linear"


def parameter_owners(module: nn.Module) -> Counter[int]:
    """How many modules hold each parameter, by the parameter's id."""
    return Counter(
        id(param) for submodule in module.modules() for param in submodule.parameters(recurse=False)
    )


def _read_by_encoders(module: nn.Module) -> set[int]:
    """The ids of layers whose weights `nn.TransformerEncoderLayer` takes past their forward, where
    no gradient is wanted.
    """
    layers = [each for each in module.modules() if isinstance(each, nn.TransformerEncoderLayer)]
    return {id(linear) for layer in layers for linear in (layer.linear1, layer.linear2)}


def of_own_class(weight: torch.Tensor) -> bool:
    """Whether a weight is of a class that decides what ops do, as quantized ones are."""
    if isinstance(weight, DTensor | FakeTensor | Float8ShardedWeight):
        return False
    return type(weight).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def _cannot_convert(
    linear: nn.Linear, owners: Counter[int], read_elsewhere: set[int]
) -> str | None:
    """Why a layer that the filter accepts is left alone all the same, or None."""
    weight = linear._parameters.get("weight")
    if weight is None:
        return "its weight is not a plain parameter"
    if isinstance(linear, NonDynamicallyQuantizableLinear):
        return "its weight is used without its forward (nn.MultiheadAttention)"
    if id(linear) in read_elsewhere:
        return "its weight is used without its forward (nn.TransformerEncoderLayer)"
    # A layer that FSDP2 has sharded has a class of FSDP2's, and is refused later.
    plain = _is_plain(type(linear)) or _is_torchao(linear) or isinstance(weight, DTensor)
    if not plain and not is_lazy(weight):
        return f"{type(linear).__name__} is a subclass of nn.Linear with methods of its own"
    if is_lazy(weight):
        return "its weight has no shape yet"
    if owners[id(weight)] > 1:
        return "its weight is tied to another layer's"
    if weight.dtype not in HP_DTYPES:
        return f"its weight is {weight.dtype}"
    if weight.layout != torch.strided:
        return f"its weight is {weight.layout}"
    if of_own_class(weight) and not _is_torchao(linear):
        return f"its weight is a {type(weight).__name__}"
    return None


def _is_plain(kind: type[nn.Linear]) -> bool:
    """Whether a class is nn.Linear, or one that only has another name."""
    added = {name for cls in kind.__mro__[: kind.__mro__.index(nn.Linear)] for name in vars(cls)}
    return added <= {"__module__", "__qualname__", "__doc__", *_SINCE_PYTHON_3_13}


_SINCE_PYTHON_3_13 = {"__firstlineno__", "__static_attributes__"}


def _check_convertible(linear: nn.Linear, fqn: str, float8_config: Float8Config) -> None:
    name = fqn or type(linear).__name__
    if isinstance(linear.weight, DTensor):
        raise ValueError(
            f"{name}: its weight is already a DTensor ({linear.weight.placements}): call "
            "convert_to_float8_training before parallelize_module and fully_shard"
        )
    multiple = float8_config.recipe.dim_multiple
    rows, columns = linear.out_features, linear.in_features
    # 16 is the hardware's; a larger multiple is the recipe's own block.
    emulates = multiple == 16 and float8_config.emulate
    if (rows % multiple or columns % multiple) and not emulates:
        remedy = ", or pass Float8Config(emulate=True)" if multiple == 16 else ""
        raise ValueError(
            f"{name}: its weight is {rows} x {columns}, and {float8_config.recipe_name} takes "
            f"multiples of {multiple}: let module_filter_fn return False for it "
            f"(float8_module_filter does){remedy}"
        )


def patch_inductor() -> None:
    """Work around triton-lang/triton#11111: compiled float8 stores that write garbage.

    torchao patches inductor for that when it converts a model; the same patch is applied here.
    """
    if not torch.cuda.is_available():
        return
    try:
        from torchao.float8._inductor_patch import _patch_inductor_min_max_codegen
    except ImportError:  # a torchao that no longer needs it
        return
    _patch_inductor_min_max_codegen()


def _log(
    converted: dict[str, list[str]],
    left_alone: dict[str, list[str]],
    rules: list[Rule],
    fqns: list[str],
) -> None:
    """One line per recipe and per reason."""
    for recipe_name, names in converted.items():
        logger.info(
            "float8 %s: %d of %d linear layers: %s",
            recipe_name,
            len(names),
            len(fqns),
            summary(names),
        )
    for reason, names in left_alone.items():
        logger.info("left %s: %s", reason, summary(names))
    for filter_fn, _ in rules:
        if isinstance(filter_fn, float8_module_filter) and (unmatched := filter_fn.unmatched(fqns)):
            logger.warning("filter_fqns that match no linear layer: %s", ", ".join(unmatched))


def log_converted_before(before: dict[str, bool]) -> None:
    """Of each, by its name, whether it has the config that was asked for now."""
    if same := [fqn for fqn, is_same in before.items() if is_same]:
        logger.info("in float8, converted before: %s", summary(same))
    if others := [fqn for fqn, is_same in before.items() if not is_same]:
        logger.warning(
            "in float8, converted before with another config, which they keep: %s: convert a model "
            "once, or name other layers",
            summary(others),
        )


def summary(fqns: list[str]) -> str:
    """Names with their indices folded: layers.*.attention.wq (32), output."""
    folded = Counter(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", fqn) or "(root)" for fqn in fqns)
    return ", ".join(name if n == 1 else f"{name} ({n})" for name, n in folded.items())
