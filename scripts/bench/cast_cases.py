"""What the recipes ask of the kernels, each ready to be called and to be checked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from harness import DEVICE, check_same_bytes

from fp8dist import kernels, numerics
from fp8dist.config import COLUMN, RECIPES, ROW, TENSOR, Block, Recipe, ScaleFormat
from fp8dist.numerics import AmaxPart, CastPart, PackPart, Scaled
from fp8dist.shard import scales_size

BLOCK_NAMES = {TENSOR: "tensor", ROW: "row", COLUMN: "column"}
DTYPE_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e5m2: "e5m2",
}


@dataclass(frozen=True)
class Work:
    """What a kernel does to a matrix, whichever recipe asks for it."""

    # amax, cast, by rows (amaxes, and a cast by those of rows), pack (amax and cast, each row's
    # scales after it), quantize (amax and cast; one orientation or both), rescale
    kind: str
    blocks: tuple[Block | None, ...]
    dtype: torch.dtype  # of the matrix
    float8_dtype: torch.dtype
    scale_format: ScaleFormat

    @property
    def name(self) -> str:
        blocks = ", ".join(
            BLOCK_NAMES.get(block) or f"{block[0]}x{block[1]}" for block in self.blocks if block
        )
        of, to = DTYPE_NAMES[self.dtype], DTYPE_NAMES[self.float8_dtype]
        moved = "" if self.is_transpose else " + shift"
        alone = ", transposed" if self.blocks[0] is None else ""
        which = alone if None in self.blocks else ", two orientations"
        return {
            "amax": f"amax ({blocks}) of {of}",
            "cast": f"cast ({blocks}) of {of} to {to}",
            "by rows": f"amax ({blocks}) and cast by rows of {of} to {to}",
            "pack": f"amax and cast ({blocks}) of {of} to {to} and scales",
            "quantize": f"amax and cast{which} ({blocks}) of {of} to {to}",
            "rescale": f"transpose{moved} ({blocks.replace(', ', ' to ')})",
        }[self.kind]

    @property
    def is_of_many(self) -> bool:
        """Whether it is done to all weights of a model at once."""
        return self.kind in ("amax", "by rows", "cast", "pack")

    @property
    def is_transpose(self) -> bool:
        return self.kind == "rescale" and self.blocks[0] == self.blocks[1]

    @property
    def reads_twice(self) -> bool:
        """Whether all of a column or the matrix must be read before it can be cast. (A row of up to
        `WIDEST_ROWS` is held until its amax is known.)
        """
        return self.kind == "quantize" and not {COLUMN, TENSOR}.isdisjoint(self.blocks)


def works_of(recipe: Recipe) -> list[tuple[Work, str]]:
    """What a recipe asks of the kernels, and of which operand."""
    works: list[tuple[Work, str]] = []
    mx = recipe.scale_format == "e8m0"
    weight_blocks = (recipe.weight, recipe.weight_for_grad_input)
    for dtype in (torch.float32, torch.bfloat16):
        common = (dtype, recipe.weight_dtype, recipe.scale_format)
        if mx:
            works.append((Work("pack", (recipe.weight,), *common), "weight"))
        else:
            blocks = tuple(dict.fromkeys(weight_blocks))
            if recipe.weight == ROW:
                works.append((Work("by rows", blocks, *common), "weight"))
            # Of weights with rows, those where rows are cut, or whose payloads are not kept.
            works.append((Work("amax", blocks, *common), "weight"))
            works.append((Work("cast", (recipe.weight,), *common), "weight"))
    inputs = (recipe.input, recipe.input_for_grad_weight)
    gradients = (recipe.grad_output, recipe.grad_output_for_grad_weight)
    casts = {"input": (inputs, recipe.input_dtype)}
    if None not in inputs:  # [Note: cast again in backward]
        casts["input (compiled)"] = ((recipe.input, None), recipe.input_dtype)
        casts["input (in backward)"] = ((None, recipe.input_for_grad_weight), recipe.input_dtype)
    casts["grad_output"] = (gradients, recipe.grad_output_dtype)
    for operand, (blocks, float8_dtype) in casts.items():
        work = Work("quantize", blocks, torch.bfloat16, float8_dtype, recipe.scale_format)
        works.append((work, operand))
    float8 = recipe.weight_dtype
    works.append((Work("rescale", weight_blocks, float8, float8, recipe.scale_format), "weight"))
    return works


def all_works(recipes: Sequence[str]) -> dict[Work, str]:
    """Everything that recipes ask for, each once, with the operands it is for."""
    found: dict[Work, dict[str, list[str]]] = {}
    for name in recipes:
        for work, operand in works_of(RECIPES[name]):
            found.setdefault(work, {}).setdefault(name, []).append(operand)
    return {
        work: "; ".join(f"{name}: {', '.join(operands)}" for name, operands in by_recipe.items())
        for work, by_recipe in found.items()
    }


class Case(NamedTuple):
    """Work on matrices of one shape: to be called, to be checked, and what it moves."""

    call: Callable[[], object]
    check: Callable[[], None]
    reads: int
    writes: int


def matrix(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Elements of many magnitudes, so that scales of rows, columns and blocks differ."""
    spread = torch.randn(rows, 1, device=DEVICE).exp() * torch.randn(columns, device=DEVICE).exp()
    return (0.02 * torch.randn(rows, columns, device=DEVICE) * spread).to(dtype)


def scale_of(x: torch.Tensor, block: Block, work: Work) -> torch.Tensor:
    amax = numerics.amax(x, block).float()
    return numerics.amax_to_scale(amax, work.float8_dtype, work.scale_format)


def amax_case(work: Work, matrices: Sequence[torch.Tensor]) -> Case:
    blocks = [block for block in work.blocks if block is not None]
    m, n = matrices[0].shape

    def part_of(x: torch.Tensor) -> AmaxPart:
        sizes = [scales_size((m, n), block) for block in blocks]
        part = AmaxPart(x, (0, 0), blocks, [torch.zeros(size, device=DEVICE) for size in sizes])
        if work.kind == "amax":
            return part
        out = torch.empty(x.shape, dtype=work.float8_dtype, device=DEVICE)
        return part._replace(out=out, scale_format=work.scale_format)

    def parts() -> list[AmaxPart]:
        return [part_of(x) for x in matrices]

    found = parts()
    fill = kernels.prepare_fill_amaxes(found)

    def check() -> None:
        expected = parts()
        fill()
        numerics.fill_amaxes(expected)
        for a, b in zip(found, expected, strict=True):
            check_all_bytes(a.amaxes, b.amaxes, "amaxes")
            if a.out is not None and b.out is not None:
                check_same_bytes(a.out, b.out, "float8 data")

    written = [amaxes for part in found for amaxes in part.amaxes]
    written += [part.out for part in found if part.out is not None]
    writes = sum(tensor.nbytes for tensor in written)
    reads = sum(x.nbytes for x in matrices)
    return Case(fill, check, reads, writes)


def cast_case(work: Work, matrices: Sequence[torch.Tensor]) -> Case:
    (block,) = work.blocks
    if block is None:
        raise AssertionError("a cast has a block")
    scales = [scale_of(x, block, work) for x in matrices]

    def parts() -> list[CastPart]:
        outs = [torch.empty(x.shape, dtype=work.float8_dtype, device=DEVICE) for x in matrices]
        of_matrices = zip(matrices, scales, outs, strict=True)
        return [CastPart(x, (0, 0), block, scale, out) for x, scale, out in of_matrices]

    reads = sum(tensor.nbytes for tensor in (*matrices, *scales))
    return case_into("cast_into", parts, reads)


def pack_case(work: Work, matrices: Sequence[torch.Tensor]) -> Case:
    (block,) = work.blocks
    if block is None:
        raise AssertionError("a cast has a block")
    columns = matrices[0].size(1)

    def parts() -> list[PackPart]:
        size = matrices[0].size(0), columns + columns // block[1]
        outs = [x.new_empty(size, dtype=torch.uint8) for x in matrices]
        of_matrices = zip(matrices, outs, strict=True)
        not_finite = torch.zeros(1, device=DEVICE)
        return [PackPart(x, block, work.float8_dtype, out, not_finite) for x, out in of_matrices]

    return case_into("pack_into", parts, sum(x.nbytes for x in matrices))


def case_into(
    function: str, parts: Callable[[], Sequence[CastPart] | Sequence[PackPart]], reads: int
) -> Case:
    """Of a function that writes what is in `out` of its parts."""
    found = parts()
    call = getattr(kernels, f"prepare_{function}")(found)

    def check() -> None:
        expected = parts()
        call()
        getattr(numerics, function)(expected)
        for a, b in zip(found, expected, strict=True):
            check_same_bytes(a.out, b.out, "float8 data")

    return Case(call, check, reads, sum(part.out.nbytes for part in found))


def quantize_case(work: Work, matrices: Sequence[torch.Tensor]) -> Case:
    (x,), (block, transposed_block) = matrices, work.blocks

    def quantized(implementation: Any) -> tuple[Scaled | None, Scaled | None]:
        return implementation.quantize_both(
            x, block, transposed_block, work.float8_dtype, work.scale_format
        )

    operands = [scaled for scaled in quantized(numerics) if scaled is not None]
    writes = sum(scaled.data.nbytes + scaled.scale.nbytes for scaled in operands)
    del operands  # several times as large as the matrix

    def check() -> None:
        results = (quantized(kernels), quantized(numerics))
        for name, a, b in zip(("operand", "transposed operand"), *results, strict=True):
            if a is not None and b is not None:
                check_all_bytes([a.data, a.scale], [b.data, b.scale], name)

    reads = x.nbytes * (2 if work.reads_twice else 1)
    return Case(lambda: quantized(kernels), check, reads, writes)


def rescale_case(work: Work, matrices: Sequence[torch.Tensor]) -> Case:
    first, second = work.blocks
    if first is None or second is None:
        raise AssertionError("a weight has a block for either matmul")
    w = matrices[0].float()
    scale = scale_of(w, first, work)
    # As `Float8Tensor` has it: with reciprocals of scales, where they are needed.
    inverse = None if work.scale_format == "e8m0" else scale.reciprocal()
    gathered = Scaled(numerics.cast(w, scale, work.float8_dtype), scale, first, inverse)
    known = not work.is_transpose and work.scale_format != "e8m0"
    new_scale = scale_of(w, second, work) if known else None

    def rescaled(implementation: Any) -> Scaled:
        return implementation.rescale_transposed(gathered, second, new_scale, work.scale_format)

    def check() -> None:
        found, expected = rescaled(kernels), rescaled(numerics)
        check_all_bytes(
            [found.data, found.scale], [expected.data, expected.scale], "transposed weight"
        )

    # A transpose leaves the scales alone.
    scales = 0 if work.is_transpose else scale.nbytes
    return Case(
        lambda: rescaled(kernels),
        check,
        gathered.data.nbytes + scales,
        gathered.data.nbytes,
    )


def check_all_bytes(
    found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], what: str
) -> None:
    for a, b in zip(found, expected, strict=True):
        check_same_bytes(a, b, what)


_CASES = {
    "amax": amax_case,
    "by rows": amax_case,
    "pack": pack_case,
    "cast": cast_case,
    "quantize": quantize_case,
    "rescale": rescale_case,
}


def case_of(work: Work, shape: tuple[int, int], count: int) -> Case:
    """Work on `count` matrices of a shape; more than one where `is_of_many` only."""
    dtype = torch.float32 if work.kind == "rescale" else work.dtype
    return _CASES[work.kind](work, [matrix(*shape, dtype) for _ in range(count)])
