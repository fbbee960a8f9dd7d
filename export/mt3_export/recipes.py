"""Recipes: for each kind of model, the sizes that its engines are built for.

What a model fixes (frames, heads, the longest row) comes from its manifest; a recipe says how many segments and rows at
once, which lengths of the cache besides the longest, and which graphs compute in fp32 in an engine of any precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mt3_export.toml_file import Place, read_toml
from mt3_runtime.errors import BundleError, OptionError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mt3_runtime.bundle import Bundle
    from mt3_runtime.engine_key import Axis
    from mt3_runtime.graphs import GraphSpec, Precision
    from mt3_runtime.manifest import GraphFile, Manifest

Sizes = tuple[int, int, int]  # smallest, best, largest
GRAPHS = ("features", "encoder", "memory", "cross_kv", "prefix", "decode_step")
IN_PLACE = "decode_step"  # its caches are updated where they are, so no cast can stand between
LARGEST = 1 << 16
CHOICES: Mapping[str, tuple[str, ...]] = {
    "family": ("mt3", "yourmt3"),
    "memory": ("none", "context", "prefix"),
    "frontend": ("ddsp", "torchaudio", "yourmt3_mel", "yourmt3_spectrum"),
    "channels": ("one", "many"),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """`match` says for which models; `profiles` gives the sizes of each axis, by profile and graph."""

    name: str
    match: Mapping[str, str]
    lengths: tuple[int, ...]
    fp32: tuple[str, ...]
    profiles: Mapping[str, Mapping[str, Mapping[Axis, Sizes]]]

    def fits(self, manifest: Manifest) -> bool:
        """Whether it is for this model."""
        model = manifest.model
        facts = {
            "family": model.family,
            "memory": model.memory.injection if model.memory else "none",
            "frontend": manifest.features.frontend,
            "channels": "one" if model.channels == 1 else "many",
        }
        named = model.name.startswith(self.match.get("name", ""))
        return named and all(facts[key] == value for key, value in self.match.items() if key != "name")


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """One engine to build: a graph of a bundle, and the size of every axis that is not fixed.

    `precision` is that of its inputs and outputs; the graph inside may be the fp32 one.
    """

    spec: GraphSpec
    file: GraphFile
    precision: Precision
    profile: str
    axes: dict[Axis, Sizes]


def plan_engines(bundle: Bundle, recipe: Recipe, precision: Precision, profile: str) -> list[EnginePlan]:
    """Every engine of a bundle, in the order of the data flow; `decode_step` once for every cache length.

    Raises:
        OptionError: the recipe has no such profile.
        BundleError: the bundle lacks a graph in this precision, or the recipe one of the bundle's graphs.
    """
    if profile not in recipe.profiles:
        raise OptionError(f"recipe {recipe.name} has no profile {profile!r}: use one of {', '.join(recipe.profiles)}")
    graphs = recipe.profiles[profile]
    plans = []
    for spec in graph_specs_of(bundle):
        if spec.name not in graphs:
            raise BundleError(f"recipe {recipe.name} says nothing of graph {spec.name}: give a --recipe that does")
        computed: Precision = "fp32" if spec.name in recipe.fp32 else precision
        file = bundle.graph(spec.name, "tensorrt", computed)
        plans += [
            EnginePlan(spec, file, precision, profile, axes)
            for axes in _all_axes(spec, graphs[spec.name], recipe, bundle.manifest)
        ]
    return plans


def graph_specs_of(bundle: Bundle) -> list[GraphSpec]:
    """Contracts of the graphs that the bundle holds for TensorRT."""
    held = {entry.graph for entry in bundle.manifest.graphs if entry.lowering == "tensorrt"}
    return [spec for spec in bundle.manifest.contracts if spec.name in held]


def cache_lengths(recipe: Recipe, manifest: Manifest) -> tuple[int, ...]:
    """Cache lengths in positions: those of the recipe that are shorter than the longest row, and that row's."""
    longest = manifest.model.positions
    return (*(length for length in recipe.lengths if length < longest), longest)


def _all_axes(
    spec: GraphSpec, given: Mapping[Axis, Sizes], recipe: Recipe, manifest: Manifest
) -> list[dict[Axis, Sizes]]:
    named = {size for tensor in spec.inputs for size in tensor.shape if isinstance(size, str)}
    if set(given) != named - {"length"}:
        wanted = ", ".join(sorted(named - {"length"}))
        raise BundleError(f"recipe {recipe.name} gives {spec.name} other axes than {wanted}: give a --recipe that does")
    axes = dict(given)
    memory = manifest.model.memory
    if "written" in axes and memory:
        typical = min(max(axes["written"][1], memory.length), memory.span)
        axes["written"] = (memory.length, typical, memory.span)
    if "length" not in named:
        return [axes]
    return [{**axes, "length": (length, length, length)} for length in cache_lengths(recipe, manifest)]


def recipe_for(manifest: Manifest, file: Path | None = None) -> Recipe:
    """The recipe of a model: that in `file`, or else the one that comes with the project and says most of it.

    Raises:
        OptionError: there is none, or it is not a recipe for this model.
    """
    if file:
        recipe = read_recipe(file)
        if not recipe.fits(manifest):
            raise OptionError(f"recipe {file} is not for {manifest.model.name}: check its [match], or leave it out")
        return recipe
    fitting = [recipe for recipe in map(read_recipe, shipped_recipes()) if recipe.fits(manifest)]
    if not fitting:
        raise OptionError(f"no recipe is for {manifest.model.name}: write one and give it as --recipe")
    return max(fitting, key=lambda recipe: len(recipe.match))


def shipped_recipes() -> list[Path]:
    """Files of the recipes that come with the project: inside an installed wheel, or in the clone."""
    package = Path(__file__).resolve().parent
    for folder in (package / "recipe_files", package.parent.parent / "engines"):
        if found := sorted(folder.glob("*.toml")):
            return found
    raise OptionError("this installation lacks its recipes: reinstall mt3-runtime, or give --recipe")


def read_recipe(file: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        OptionError: it cannot be read, or holds anything but what a recipe holds.
    """
    data = read_toml(file, "recipe")
    where = _Place(f"recipe {file.name}")
    keys = where.table(data, required=("match", "profiles"), optional=("lengths", "fp32"))
    fp32 = tuple(where.choice(name, GRAPHS, "fp32") for name in where.listed(keys.get("fp32", []), "fp32"))
    where.expect(IN_PLACE not in fp32, f"fp32 names {IN_PLACE}, whose caches are updated in place", "leave it out")
    lengths = tuple(where.size(length, "lengths") for length in where.listed(keys.get("lengths", []), "lengths"))
    where.expect(list(lengths) == sorted(set(lengths)), "lengths do not rise", "sort them")
    profiles = where.table(keys["profiles"], named="profiles")
    where.expect(bool(profiles), "there are no profiles", "write one")
    return Recipe(
        file.stem, _match(keys["match"], where), lengths, fp32, {n: _profile(p, where, n) for n, p in profiles.items()}
    )


def _match(data: Any, where: _Place) -> dict[str, str]:
    table = where.table(data, required=("family",), optional=("name", *CHOICES), named="match")
    where.expect(all(isinstance(value, str) for value in table.values()), "match has more than texts", "quote them")
    return {key: value if key == "name" else where.choice(value, CHOICES[key], key) for key, value in table.items()}


def _profile(data: Any, where: _Place, name: str) -> dict[str, dict[Axis, Sizes]]:
    graphs = where.table(data, optional=GRAPHS, named=f"profiles.{name}")
    profile: dict[str, dict[Axis, Sizes]] = {}
    for graph, axes in graphs.items():
        place = f"profiles.{name}.{graph}"
        table = where.table(axes, optional=("segments", "rows", "written"), named=place)
        named: tuple[Axis, ...] = ("segments", "rows", "written")
        profile[graph] = {axis: where.sizes(table[axis], f"{place}.{axis}", axis) for axis in named if axis in table}
    return profile


class _Place(Place):
    """Checks sizes too."""

    __slots__ = ()

    def size(self, value: Any, named: str) -> int:
        whole = type(value) is int and 0 < value <= LARGEST
        self.expect(whole, f"{named} has {value!r:.80}", f"use whole numbers up to {LARGEST}")
        return int(value)

    def sizes(self, value: Any, named: str, axis: str) -> Sizes:
        if axis == "written":  # its bounds are the model's
            typical = self.size(value, named)
            return typical, typical, typical
        numbers = [self.size(number, named) for number in self.listed(value, named)]
        rising = len(numbers) == 3 and numbers == sorted(numbers)
        self.expect(rising, f"{named} is {value!r:.80}", "give the smallest, the best and the largest size")
        self.expect(numbers[0] == 1, f"{named} begins with {numbers[0]}, and one may be alone", "begin with 1")
        return numbers[0], numbers[1], numbers[2]
