"""Recipes: every published model has one, nothing in them is misread, and the model decides what it fixes."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import TINY_FEATURES, TINY_MODEL
from memory_cases import CONTEXT, PREFIX_MEMORY
from mt3_export.recipes import IN_PLACE, cache_lengths, plan_engines, read_recipe, recipe_for, shipped_recipes
from mt3_export.yourmt3_models import MODELS
from mt3_runtime.bundle import Bundle
from mt3_runtime.errors import BundleError, OptionError
from mt3_runtime.graphs import graph_specs
from mt3_runtime.manifest import FORMAT, VERSION, FileRecord, GraphFile, Manifest, Origin
from mt3_runtime.specs import FeatureSpec, ModelSpec, VocabularySpec

GOOD = """
lengths = [256]
fp32 = ["encoder"]
[match]
family = "mt3"
[profiles.one]
encoder = { segments = [1, 2, 4] }
cross_kv = { rows = [1, 2, 4] }
decode_step = { rows = [1, 2, 4] }
"""


def manifest_of(model: ModelSpec, features: FeatureSpec = TINY_FEATURES) -> Manifest:
    """A manifest of any model, whose files nobody opens."""
    specs = graph_specs(model, features)
    forms = [(name, precision) for name in specs for precision in ("fp32", "fp16")]
    graphs = tuple(GraphFile(name, "tensorrt", p, f"{name}.{p}.onnx", f"weights.{p}.bin") for name, p in forms)
    files = {name: FileRecord(1, "a" * 64) for entry in graphs for name in (entry.file, entry.weights)}
    origin = Origin("random:0", None, "fp32", "test", {}, "")
    return Manifest(FORMAT, VERSION, model, features, VocabularySpec(), tuple(specs.values()), graphs, files, origin)


def published() -> dict[str, Manifest]:
    """A manifest for every model there is, by the recipe that it must get."""
    mt3 = replace(TINY_MODEL, max_length=1024)
    found = {
        "mt3": manifest_of(mt3),
        "mr-mt3": manifest_of(replace(mt3, memory=CONTEXT)),
        "mr-mt3-v1": manifest_of(replace(mt3, memory=replace(PREFIX_MEMORY, length=64))),
    }
    for name, constants in MODELS.items():
        spectrum = constants.frontend == "yourmt3_spectrum"
        model = replace(
            mt3,
            family="yourmt3",
            name=name,
            channels=constants.channels,
            max_length=constants.max_length,
            vocab_size=596,
        )
        features = FeatureSpec(
            constants.frontend,
            mel_norm=False,
            hop_length=constants.hop_length,
            bins=1024 if spectrum else 512,
            segment_samples=32_767,
        )
        found[name] = manifest_of(model, features)
    return found


@pytest.fixture
def write(tmp_path):
    def make(text: str):
        (tmp_path / "own.toml").write_text(text)
        return tmp_path / "own.toml"

    return make


def test_every_model_has_its_recipe_and_every_recipe_a_model():
    chosen = {name: recipe_for(manifest).name for name, manifest in published().items()}
    assert chosen.pop("yptf-moe-multi-ps") == "yptf-moe-multi"
    assert chosen == {name: name for name in chosen}
    assert {path.stem for path in shipped_recipes()} == set(chosen)


def test_no_model_could_get_either_of_two():
    for name, manifest in published().items():
        fitting = [recipe for recipe in map(read_recipe, shipped_recipes()) if recipe.fits(manifest)]
        most = max(len(recipe.match) for recipe in fitting)
        assert sum(len(recipe.match) == most for recipe in fitting) == 1, name


def test_a_renamed_moe_model_gets_the_recipe_of_its_shapes():
    manifest = published()["yptf-moe-multi"]
    assert recipe_for(replace(manifest, model=replace(manifest.model, name="mine"))).name == "yptf-multi"


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("mt3", (256, 512, 1024)),
        ("mr-mt3", (256, 512, 1024)),
        ("mr-mt3-v1", (256, 512, 1088)),  # 64 vectors stand before the tokens
        ("ymt3plus", (256, 512, 1024)),
        ("yptf-multi", (256,)),
        ("yptf-moe-multi-ps", (256,)),
    ],
)
def test_cache_lengths_end_with_the_longest_row(name, lengths):
    manifest = published()[name]
    assert cache_lengths(recipe_for(manifest), manifest) == lengths


def plans_of(manifest: Manifest, recipe, profile: str = "latency", precision: str = "fp16"):
    return plan_engines(Bundle(None, manifest, "0" * 64), recipe, precision, profile)


@pytest.mark.parametrize("profile", ["latency", "throughput"])
def test_every_recipe_sizes_every_axis_of_every_graph(profile):
    for name, manifest in published().items():
        plans = plans_of(manifest, recipe_for(manifest), profile)
        assert [plan.spec.name for plan in plans if plan.spec.name != IN_PLACE] == [
            spec.name for spec in manifest.contracts if spec.name != IN_PLACE
        ]
        for plan in plans:
            named = {size for tensor in plan.spec.inputs for size in tensor.shape if isinstance(size, str)}
            assert set(plan.axes) == named, name
            assert all(low <= best <= high for low, best, high in plan.axes.values())


def test_rows_of_throughput_are_those_of_the_largest_bucket():
    for manifest in published().values():
        for plan in plans_of(manifest, recipe_for(manifest), "throughput"):
            assert plan.axes.get("rows", (1, 1, 128))[2] == 128


def test_the_tokens_of_a_memory_are_as_many_as_its_model_allows():
    manifest = published()["mr-mt3"]
    (plan,) = [plan for plan in plans_of(manifest, recipe_for(manifest)) if plan.spec.name == "memory"]
    assert plan.axes["written"] == (32, 256, 1024)


def test_a_graph_may_compute_in_fp32(write):
    recipe = read_recipe(write(GOOD))
    plans = plans_of(published()["mt3"], recipe, "one")
    assert [(plan.spec.name, plan.precision, plan.file.precision) for plan in plans] == [
        ("encoder", "fp16", "fp32"),
        ("cross_kv", "fp16", "fp16"),
        ("decode_step", "fp16", "fp16"),
        ("decode_step", "fp16", "fp16"),
    ]
    assert [plan.axes["length"] for plan in plans[2:]] == [(256,) * 3, (1024,) * 3]


CHANGES = {
    "unknown key": ("lengths = [256]", "lenghts = [256]"),
    "unknown key 'rows'": ("[match]", "[match]\nrows = 'x'"),
    "unknown key 'decoder'": ("decode_step =", "decoder ="),
    "unknown key 'row'": ("decode_step = { rows", "decode_step = { row"),
    "family is 'mt4'": ('family = "mt3"', 'family = "mt4"'),
    "has no family": ('family = "mt3"', 'memory = "none"'),
    "smallest, the best and the largest": ("[1, 2, 4] }\ncross", "[4, 2, 1] }\ncross"),
    "one may be alone": ("[1, 2, 4] }\ncross", "[2, 2, 4] }\ncross"),
    "whole numbers": ("[1, 2, 4] }\ncross", "[1, 2, 4.5] }\ncross"),
    "is not a list": ("[1, 2, 4] }\ncross", "3 }\ncross"),
    "do not rise": ("lengths = [256]", "lengths = [512, 256]"),
    "updated in place": ('fp32 = ["encoder"]', 'fp32 = ["decode_step"]'),
    "is not TOML": ("[match]", "[match"),
    "there are no profiles": (GOOD[GOOD.index("[profiles.one]") :], "[profiles]"),
}


@pytest.mark.parametrize("problem", CHANGES)
def test_recipes_are_read_strictly(write, problem):
    assert GOOD.count(CHANGES[problem][0]) == 1
    with pytest.raises(OptionError, match=problem) as caught:
        read_recipe(write(GOOD.replace(*CHANGES[problem])))
    assert str(caught.value).isprintable()


def test_a_recipe_must_be_for_the_model(write, tmp_path):
    with pytest.raises(OptionError, match="is not for"):
        recipe_for(published()["ymt3plus"], write(GOOD))
    with pytest.raises(OptionError, match="cannot read"):
        recipe_for(published()["mt3"], tmp_path / "none.toml")


def test_a_recipe_must_say_something_of_every_graph(write):
    with pytest.raises(BundleError, match="says nothing of graph memory"):
        plans_of(published()["mr-mt3"], read_recipe(write(GOOD)), "one")
    with pytest.raises(BundleError, match="gives encoder other axes"):
        plans_of(published()["mt3"], read_recipe(write(GOOD.replace("segments", "rows"))), "one")
    with pytest.raises(OptionError, match="has no profile 'two': use one of one"):
        plans_of(published()["mt3"], read_recipe(write(GOOD)), "two")


def test_the_wheel_gets_every_recipe():
    project = Path(__file__).parent.parent
    build = tomllib.loads((project / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    wanted = {
        f"engines/{path.name}": f"mt3_export/recipe_files/{path.name}" for path in (project / "engines").glob("*.toml")
    }
    assert build["force-include"] == wanted
