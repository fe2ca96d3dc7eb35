"""Rules that say which matrices of a model are kept as integers, and the conversion of these matrices when a model is
converted or loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig
from isthmus.model.ops.linear import Weight
from isthmus.model.ops.quantized import Bits, Quantized, quantize, shapes
from isthmus.model.parameter import Spec
from isthmus.model.transformer import Params, abstract_params, parameter_specs
from isthmus.model.weights.layout import stack_params
from isthmus.model.weights.patterns import check_pattern

SCHEMES: dict[str, tuple[str, ...]] = {
    "none": (),
    "int8": (".*=int8",),
    "int6": ("embedding|head=int8", ".*=int6"),
    "int5": ("embedding|head=int8", ".*=int5"),
    "int4": ("embedding|head=int8", ".*attention/value/.*=int6", ".*=int4"),
}
"""Named lists of rules. The embedding, the head and the values get more bits, because bits improve the model most there
for the space that they take."""

_KINDS = ("int8", "int6", "int5", "int4")
_GROUP = 64
"""The size of a group where a rule gives none. Half of it is used where that leaves less of the last group empty."""
_PATTERN = 1 << 14
"""The most characters of a rule's regular expression. One that names every layer is long."""
_SIZES = ("32", "64", "128", "256")

_PARTS = ("values", "scales")
"""The arrays of a quantized matrix in a checkpoint."""


class Format(NamedTuple):
    """How a matrix is quantized."""

    bits: Bits
    group: int
    """The number of inputs that share a scale"""
    rotated: bool = True
    """Whether blocks of inputs are multiplied by a Hadamard matrix, as `Quantized` describes"""
    scales: Literal["bfloat16", "float16"] = "bfloat16"
    fixed: bool = True
    """Whether `group` is used as it is, whatever the number of inputs"""

    @property
    def kind(self) -> str:
        """The format as a rule spells it, such as "int4:64"."""
        how = "" if self.rotated else ":half" if self.scales == "float16" else ":plain"
        return f"int{self.bits}:{self.group}{how}"

    def fitted(self, inputs: int) -> Format:
        """Returns this format with its group fixed. The group is halved where whole groups would pad the inputs by more
        than a thirtieth."""
        filled = self.fixed or -inputs % self.group * 30 <= inputs
        return self._replace(group=self.group if filled else self.group // 2, fixed=True)


def parse_rule(rule: str) -> tuple[re.Pattern[str], Format | None]:
    """Parses the rule "REGEX=none" or "REGEX=KIND", where KIND is int8, int6, int5 or int4. The size of a group may
    follow, and after it "plain" or "half". "plain" is not rotated. "half" isn't either, and has float16 scales, as
    other programs' files do. Examples are "REGEX=int4:64" and "REGEX=int8:32:plain". Raises ConfigError."""
    pattern, _, name = rule.rpartition("=")
    kind, *options = name.split(":")
    plain, half = options[1:] in (["plain"], ["half"]), options[1:] == ["half"]
    sizes = options[:1] if plain else options
    if not pattern and rule.partition(":")[0] in SCHEMES:
        raise ConfigError(f"quantize: {rule!r} is no rule; among rules, or with a group's size, write '.*={rule}'")
    if not pattern or kind not in (*_KINDS, "none") or len(sizes) > 1 or (options and kind == "none"):
        raise ConfigError(f"quantize: {rule!r} is neither {', '.join(_KINDS)} nor a rule: REGEX=none, or REGEX=KIND, "
                          "REGEX=KIND:GROUP or REGEX=KIND:GROUP:plain (or half), with one of these as its KIND; "
                          "for GGUF's own kinds, use --gguf of isthmus convert")  # fmt: skip
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


def matrices(config: ModelConfig) -> dict[str, Spec]:
    """The parameters that can be quantized, by their paths in the unstacked layout."""
    return {path: spec for path, spec in parameter_specs(config).items() if spec.role.is_matrix}


def formats(config: ModelConfig, rules: Sequence[str]) -> dict[str, Format]:
    """The format of each matrix that `rules` quantize, by its path in the unstacked layout. The first rule that matches
    a whole path, such as "blocks/0/mlp/up/kernel", decides.

    Raises ConfigError for a rule that can't be read, or where no rule matches any matrix.
    """
    return {path: chosen for path, (_, chosen) in _decided(config, rules).items()}


def _decided(config: ModelConfig, rules: Sequence[str]) -> dict[str, tuple[int, Format]]:
    """For each matrix that is quantized, the index of the rule that decides, and the format. Raises ConfigError."""
    parsed = [parse_rule(rule) for rule in rules]
    found, matched = {}, False
    for path, spec in matrices(config).items():
        index = next((i for i, (pattern, _) in enumerate(parsed) if pattern.fullmatch(path)), None)
        if index is None:
            continue
        matched = True
        if (chosen := parsed[index][1]) is not None:
            found[path] = index, chosen.fitted(spec.inputs)
    if rules and not matched:
        raise ConfigError(f"quantize: no parameter's path matches {', '.join(rules)}; one is {path}")
    return found


def check_rules(config: ModelConfig, rules: Sequence[str]) -> None:
    """Raises ConfigError where one of a user's rules has no effect, which means a typo or a wrong order."""
    names = list(matrices(config))
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
    """Returns rules that mean the same and state the size of every group. Folders keep these, because the defaults may
    change in a later version. Raises ConfigError."""
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


def rules_for(kinds: Mapping[str, str]) -> tuple[str, ...]:
    """Returns rules that give each path in `kinds` its kind, and match no other matrix."""
    layers: dict[tuple[str, str], list[str]] = {}
    for path, kind in kinds.items():
        match = _LAYER.fullmatch(path)
        rest, layer = (match[2], match[1]) if match else (path, "")
        layers.setdefault((rest, kind), []).append(layer)
    patterns: dict[tuple[str, str], list[str]] = {}
    for (rest, kind), found in layers.items():
        patterns.setdefault(("|".join(found), kind), []).append(rest)
    return tuple(
        f"{f'blocks/({numbers})/' if numbers else ''}({'|'.join(rests)})={kind}"
        for (numbers, kind), rests in patterns.items()
    )


class Quantize:
    """A transform of `isthmus.model.weights.load` that quantizes matrices as they are loaded."""

    def __init__(self, config: ModelConfig, rules: Sequence[str]) -> None:
        """Raises ConfigError as `formats` does."""
        self._specs, self._formats = matrices(config), formats(config, rules)

    def __call__(self, path: str, weight: Weight) -> Weight:
        """Returns the parameter, quantized where the rules say so and it is a plain array. path: in the unstacked
        layout."""
        if path not in self._formats or not isinstance(weight, jax.Array):
            return weight
        return jax.block_until_ready(_quantize(self._specs[path], weight, self._formats[path]))


def quantize_params(
    config: ModelConfig, params: Params, rules: Sequence[str], on_progress: Callable[[int], None] = lambda size: None
) -> None:
    """Quantizes matrices in place, one at a time. Matrices that are already integers stay as they are. params: in the
    unstacked layout. on_progress is called after each matrix with the bytes of its integers."""
    quantize = Quantize(config, rules)
    for path, weight in params.items():
        changed = quantize(path, weight)
        if changed is not weight and isinstance(changed, Quantized):
            params[path] = changed
            on_progress(changed.values.nbytes)


def _quantize(spec: Spec, weight: jax.Array, wanted: Format) -> Quantized:
    return _as_integers(spec.as_matrix(weight), wanted)


@partial(jax.jit, static_argnums=1)
def _as_integers(matrix: jax.Array, wanted: Format) -> Quantized:
    """Compiled once for all matrices of the same shape and format."""
    return quantize(matrix, wanted.bits, wanted.group, rotated=wanted.rotated, scales=wanted.scales)


def weight_bytes(config: ModelConfig, dtype: str, rules: Sequence[str]) -> int:
    """The size in bytes of the parameters as serving keeps them in `dtype`, over all devices together."""
    wanted, total = formats(config, rules), 0
    for path, spec in parameter_specs(config).items():
        if (chosen := wanted.get(path)) is None:
            total += spec.size * jnp.dtype(spec.storage_dtype(dtype)).itemsize
        else:
            outputs = spec.size // spec.inputs
            values, scales = shapes(chosen.bits, chosen.group, spec.inputs, outputs, rotated=chosen.rotated)
            total += math.prod(values) + 2 * math.prod(scales)
    return total


# In a checkpoint, a quantized matrix is two arrays below its path.


def to_arrays(params: Params) -> Params:
    """Returns `params` with two arrays in place of each quantized matrix."""
    arrays: Params = {}
    for path, weight in params.items():
        if isinstance(weight, Quantized):
            arrays |= {f"{path}/{part}": getattr(weight, part) for part in _PARTS}
        else:
            arrays[path] = weight
    return arrays


def parts_of_integers(path: str) -> tuple[str, str] | None:
    """Splits the path of a checkpoint's array into the path of its quantized matrix and the name of its part. None for
    an array that is no such part."""
    matrix, _, part = path.rpartition("/")
    return (matrix, part) if part in _PARTS else None


def from_parts(spec: Spec, chosen: Format, parts: Mapping[str, jax.Array]) -> Quantized:
    """Puts together a matrix that `to_arrays` took apart."""
    values, scales = (parts[part] for part in _PARTS)
    return Quantized(values, scales, chosen.bits, spec.inputs, chosen.group, chosen.rotated)


def abstract_stored(config: ModelConfig, mesh: Mesh) -> Params:
    """The shapes, dtypes and shardings of a checkpoint of `config`, quantized as config.quantization says. Integers are
    split along their outputs where the number of outputs is a multiple of the size of the mesh's axis tp."""
    plain = abstract_params(config, mesh, stacked=True)
    if not config.quantization:
        return plain

    def stored(params: Params) -> Params:
        wanted, specs = formats(config, config.quantization), parameter_specs(config)
        integers = {path: _quantize(specs[path], params[path], chosen) for path, chosen in wanted.items()}
        return to_arrays(stack_params({**params, **integers}))

    def sharding(path: str, shape: tuple[int, ...]) -> Sharding:
        if parts_of_integers(path) is None:
            return plain[path].sharding
        split = "tp" if shape[-1] % mesh.shape["tp"] == 0 else None
        return NamedSharding(mesh, PartitionSpec(*(None,) * (len(shape) - 1), split))

    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(path, leaf.shape))
        for path, leaf in jax.eval_shape(stored, abstract_params(config)).items()
    }
