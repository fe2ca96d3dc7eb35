"""Which matrices of a model are kept as integers, and making them so: when a model is converted or loaded."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig
from isthmus.model.ops.linear import Weight
from isthmus.model.ops.quantized import Bits, Quantized, quantize, shapes
from isthmus.model.ops.rounding import narrowed
from isthmus.model.transformer import Params, abstract_params, kept_dtype, stack_blocks, stacked, unstack_blocks
from isthmus.model.weights.packing import as_matrix, matrix_inputs, replace_matrices
from isthmus.model.weights.patterns import check_pattern

SCHEMES: dict[str, tuple[str, ...]] = {
    "none": (),
    "int8": (".*=int8",),
    "int6": ("embedding|head=int8", ".*=int6"),
    "int5": ("embedding|head=int8", ".*=int5"),
    "int4": ("embedding|head=int8", ".*attention/value/.*=int6", ".*=int4"),
}
"""Rules by a name of their own. Embedding, head and values matter most for what they take."""

_KINDS = ("int8", "int6", "int5", "int4")
_GROUP = 64
"""At most, unless a rule says otherwise: half of it where that leaves less of the last group empty"""
_PATTERN = 1 << 14
"""Characters of a rule's regular expression: one that names every layer is long"""
_SIZES = ("32", "64", "128", "256")

_PARTS = ("values", "scales")
"""What a matrix of integers is made of in a checkpoint"""


Path = tuple[str, ...]
"""Of a parameter, in the unstacked layout"""


class Format(NamedTuple):
    bits: Bits
    group: int
    """Inputs that share a scale"""
    rotated: bool = True
    """See Quantized"""
    scales: Literal["bfloat16", "float16"] = "bfloat16"
    fixed: bool = True
    """Whether the group is to be what it is, however many inputs there are"""

    @property
    def kind(self) -> str:
        """As a rule names it."""
        how = "" if self.rotated else ":half" if self.scales == "float16" else ":plain"
        return f"int{self.bits}:{self.group}{how}"

    def fitted(self, inputs: int) -> Format:
        """With a fixed group: this one, or half of it where it would fill up inputs by more than a thirtieth."""
        filled = self.fixed or -inputs % self.group * 30 <= inputs
        return self._replace(group=self.group if filled else self.group // 2, fixed=True)


def parse_rule(rule: str) -> tuple[re.Pattern[str], Format | None]:
    """Reads "REGEX=none", or "REGEX=int8", int6, int5 or int4. A group's size may follow, and "plain", which is not
    rotated, or "half", which isn't either and has float16 scales, as other programs' files do: "REGEX=int4:64",
    "REGEX=int8:32:plain". Raises ConfigError."""
    pattern, _, name = rule.rpartition("=")
    kind, *options = name.split(":")
    plain, half = options[1:] in (["plain"], ["half"]), options[1:] == ["half"]
    sizes = options[:1] if plain else options
    if not pattern and rule.partition(":")[0] in SCHEMES:
        raise ConfigError(f"quantize: {rule!r} stands alone; among rules, or with a group's size, write '.*={rule}'")
    if not pattern or kind not in (*_KINDS, "none") or len(sizes) > 1 or (options and kind == "none"):
        raise ConfigError(f"quantize: {rule!r} is neither {', '.join(_KINDS)} nor a rule: REGEX=none, or REGEX=KIND, "
                          "REGEX=KIND:GROUP or REGEX=KIND:GROUP:plain (or half), with one of these as its KIND; "
                          "GGUF's own kinds are --gguf's of isthmus convert")  # fmt: skip
    if sizes and sizes[0] not in _SIZES:
        raise ConfigError(f"quantize: {rule!r}: a group has {', '.join(_SIZES)} numbers")
    if (why := check_pattern(pattern, longest=_PATTERN)) is not None:
        raise ConfigError(f"quantize: {rule!r}: what is before the = {why}")
    compiled = re.compile(pattern)
    if kind == "none":
        return compiled, None
    bits = cast(Bits, int(kind.removeprefix("int")))
    group = int(sizes[0]) if sizes else _GROUP
    return compiled, Format(bits, group, not plain, "float16" if half else "bfloat16", bool(sizes))


def formats(config: ModelConfig, rules: Sequence[str]) -> dict[tuple[str, ...], Format]:
    """The format of each matrix that `rules` turn into integers, by its path in the unstacked layout. The first rule
    that matches a whole path, such as "blocks/0/mlp/up/kernel", decides. A router stays as it is: it is small, and
    chooses.

    Raises ConfigError for a rule that can't be read, or where none of them matches anything.
    """
    return {path: chosen for path, (_, chosen) in _decided(config, rules).items()}


def _decided(config: ModelConfig, rules: Sequence[str]) -> dict[Path, tuple[int, Format]]:
    """With the place of the rule that decides. Raises ConfigError."""
    parsed = [parse_rule(rule) for rule in rules]
    found, matched = {}, False
    for path, inputs in matrix_inputs(config).items():
        name = "/".join(path)
        index = next((i for i, (pattern, _) in enumerate(parsed) if pattern.fullmatch(name)), None)
        if index is None or "router" in path:
            continue
        matched = True
        if (chosen := parsed[index][1]) is not None:
            found[path] = index, chosen.fitted(inputs)
    if rules and not matched:
        raise ConfigError(f"quantize: no parameter's path matches {', '.join(rules)}; one is {name}")
    return found


def check_rules(config: ModelConfig, rules: Sequence[str]) -> None:
    """Raises ConfigError where one of somebody's own rules changes nothing, which is a typo in it or in the order."""
    names = ["/".join(path) for path in matrix_inputs(config) if "router" not in path]
    undecided = set(names)
    for rule in rules:
        pattern, _ = parse_rule(rule)
        found = {name for name in names if pattern.fullmatch(name)}
        if not found:
            raise ConfigError(f"quantize: {rule!r} matches no parameter's path; one is {names[-1]}")
        if not found & undecided:
            raise ConfigError(f"quantize: {rule!r} comes too late: rules before it decide all that it matches")
        undecided -= found


def spelt_out(config: ModelConfig, rules: Sequence[str]) -> tuple[str, ...]:
    """Rules that mean the same and name every group, as a folder keeps them: what goes without saying may become
    another one day. Raises ConfigError."""
    decided = _decided(config, rules)
    spelt: list[str] = []
    for index, rule in enumerate(rules):
        kinds = {path: chosen.kind for path, (decisive, chosen) in decided.items() if decisive == index}
        if len(set(kinds.values())) > 1:
            spelt += rules_for(kinds)
        else:
            spelt += [f"{rule.rpartition('=')[0]}={kind}" for kind in set(kinds.values())] or [rule]
    return tuple(spelt)


_LAYER = re.compile(r"blocks/(\d+)/(.*)")


def rules_for(kinds: Mapping[Path, str]) -> tuple[str, ...]:
    """Rules that give each of these matrices its kind, and no other matrix any."""
    layers: dict[tuple[str, str], list[str]] = {}
    for path, kind in kinds.items():
        match = _LAYER.fullmatch("/".join(path))
        rest, layer = (match[2], match[1]) if match else ("/".join(path), "")
        layers.setdefault((rest, kind), []).append(layer)
    patterns: dict[tuple[str, str], list[str]] = {}
    for (rest, kind), found in layers.items():
        patterns.setdefault(("|".join(found), kind), []).append(rest)
    return tuple(
        f"{f'blocks/({numbers})/' if numbers else ''}({'|'.join(rests)})={kind}"
        for (numbers, kind), rests in patterns.items()
    )


def quantize_params(
    config: ModelConfig, params: Params, rules: Sequence[str], tick: Callable[[int], None] = lambda size: None
) -> None:
    """Turns matrices into integers, in place and one at a time; what already is integers stays. params: unstacked;
    tick(bytes) after each."""
    quantized = quantizer(config, rules)

    def change(path: tuple[str, ...], weight: Weight, inputs: int) -> Weight:
        changed = quantized(path, weight)
        if changed is not weight and isinstance(changed, Quantized):
            tick(changed.values.nbytes)
        return changed

    replace_matrices(config, params, change)


def quantizer(config: ModelConfig, rules: Sequence[str]) -> Callable[[tuple[str, ...], Weight], Weight]:
    """What turns the parameter at a path of the unstacked layout into integers, if `rules` say so and it isn't yet."""
    wanted, inputs = formats(config, rules), matrix_inputs(config)

    def change(path: tuple[str, ...], weight: Weight) -> Weight:
        if path not in wanted or not isinstance(weight, jax.Array):
            return weight
        return jax.block_until_ready(_quantize(weight, path, inputs[path], wanted[path]))

    return change


def _quantize(weight: jax.Array, path: tuple[str, ...], inputs: int, wanted: Format) -> Quantized:
    return _as_integers(as_matrix(path, weight, inputs), wanted)


@partial(jax.jit, static_argnums=1)
def _as_integers(matrix: jax.Array, wanted: Format) -> Quantized:
    """One program for all matrices of a shape, wherever they belong."""
    return quantize(matrix, wanted.bits, wanted.group, rotated=wanted.rotated, scales=wanted.scales)


def weight_bytes(config: ModelConfig, rules: Sequence[str]) -> int:
    """Bytes of the parameters as serving keeps them, all devices together."""
    unstacked = abstract_params(_unstacked(config))
    wanted, inputs = formats(config, rules), matrix_inputs(config)
    total = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(unstacked)[0]:
        name, numbers = tuple(entry.key for entry in path), math.prod(leaf.shape)
        if (chosen := wanted.get(name)) is None:
            total += numbers * jnp.dtype(kept_dtype(path, config.dtype)).itemsize
        else:
            values, scales = shapes(
                chosen.bits, chosen.group, inputs[name], numbers // inputs[name], rotated=chosen.rotated
            )
            total += math.prod(values) + 2 * math.prod(scales)
    return total


def _unstacked(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, scan_layers=False)


# In a checkpoint, integers are two arrays in a dict of their own.


def to_arrays(params: Params) -> Params:
    """With a dict of arrays in the place of each matrix of integers."""

    def change(node: Any) -> Any:
        return dict(zip(_PARTS, (node.values, node.scales), strict=True)) if isinstance(node, Quantized) else node

    return cast(Params, jax.tree.map(change, params, is_leaf=lambda node: isinstance(node, Quantized)))


def from_arrays(config: ModelConfig, params: Params) -> Params:
    """The inverse of to_arrays: config.quantization says what the arrays are. params: unstacked."""
    wanted = formats(config, config.quantization)

    def change(path: tuple[str, ...], weight: Any, inputs: int) -> Weight:
        if path not in wanted:
            return cast(Weight, weight)
        values, scales = (weight[part] for part in _PARTS)
        chosen = wanted[path]
        return Quantized(values, scales, chosen.bits, inputs, chosen.group, chosen.rotated)

    replace_matrices(config, params, change)
    return params


def is_part(path: tuple[Any, ...]) -> bool:
    """Whether a tree path ends at an array of a matrix of integers."""
    return path[-1].key in _PARTS


def abstract_stored(config: ModelConfig, mesh: Mesh) -> Params:
    """Shapes, dtypes and shardings of a checkpoint of `config`, quantized as config.quantization says: integers are
    split along their outputs where the devices divide them."""
    plain = abstract_params(stacked(config), mesh)
    if not config.quantization:
        return plain

    def make(params: Params) -> Params:
        quantize_abstract(params)
        return to_arrays(stack_blocks(params))

    def quantize_abstract(params: Params) -> None:
        wanted = formats(config, config.quantization)

        def change(path: tuple[str, ...], weight: Weight, inputs: int) -> Weight:
            assert isinstance(weight, jax.Array)
            return _quantize(weight, path, inputs, wanted[path]) if path in wanted else weight

        replace_matrices(config, params, change)

    shapes = jax.eval_shape(lambda params: make(jax.tree.map(lambda x: x, params)), abstract_params(_unstacked(config)))
    tensors = mesh.shape["tp"]

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if is_part(path):
            split = "tp" if leaf.shape[-1] % tensors == 0 else None
            spec = PartitionSpec(*(None,) * (len(leaf.shape) - 1), split)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
        node: Any = plain
        for entry in path:
            node = node[entry.key]
        return cast(jax.ShapeDtypeStruct, node)

    return cast(Params, jax.tree_util.tree_map_with_path(place, shapes))


def restored(config: ModelConfig, params: Params, dtype: str | None) -> Params:
    """What serving reads of a quantized checkpoint as `abstract_stored` describes it: integers as they are, the rest in
    `dtype`, in the layout of `config`."""

    def cast_leaf(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf if is_part(path) else narrowed(leaf, kept_dtype(path, dtype))

    params = jax.tree_util.tree_map_with_path(cast_leaf, params)
    return from_arrays(config, unstack_blocks(params))
