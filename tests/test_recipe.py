"""Recipes: what is read from TOML and overrides, and what every refusal says."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bitdistill.config import METHODS, Recipe, SftConfig
from bitdistill.errors import BitDistillError, ConfigError
from bitdistill.recipe import DISTILL_PRESETS, build_recipe, load_recipe, to_dict

FULL = """
name = "all sections"
output_dir = "out"
seed = 7

[base]
tokens = 1e6
num_attention_heads = 6
num_key_value_heads = 2

[corpus]
source = "text"
pretrain_share = 1

[task]
labels = ["no", "yes"]
max_length = 64

[refine]
norm_sites = "all"
activation_bits = 4
skip = ["model.layers.0.*"]

[pretrain]
learning_rate = 3e-4
schedule = "two_stage"

[sft]
epochs = 3

[distill]
preset = "authors"
gamma_relation = 10
relation_layers = [-1, 2]

[run]
methods = ["fp16_sft", "bitdistill:no_subln+no_distill"]
learning_rates = [1e-3, 1]
"""


def write(folder: Path, text: str, name: str = "recipe.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def build(*overrides: str, **document: object) -> Recipe:
    return build_recipe({"name": "test", **document}, overrides)


# --- TOML in ---


def test_a_recipe_says_only_what_differs_from_the_defaults(tmp_path):
    recipe = load_recipe(write(tmp_path, FULL))
    assert recipe.name == "all sections"
    assert recipe.seed == 7
    assert recipe.run_dir == Path("out/all sections")
    assert recipe.base is not None
    assert (recipe.base.num_attention_heads, recipe.base.head_dim) == (6, 32)
    assert recipe.task.labels == ("no", "yes")
    assert recipe.refine.skip == ("model.layers.0.*",)
    assert recipe.pretrain.learning_rate == 3e-4
    assert recipe.distill.relation_layers == (-1, 2)
    assert recipe.run.learning_rates == (1e-3, 1.0)
    assert recipe.model == Recipe(name="x").model


def test_an_empty_recipe_is_the_defaults_named_after_its_file(tmp_path):
    recipe = load_recipe(write(tmp_path, "", "my_task.toml"))
    assert recipe == Recipe(name="my_task")
    assert recipe.base is None
    assert recipe.run.methods == METHODS


def test_whole_numbers_take_the_type_of_their_field(tmp_path):
    recipe = load_recipe(write(tmp_path, FULL))
    for value, expected in (
        (recipe.base.tokens, 1_000_000),
        (recipe.sft.epochs, 3.0),
        (recipe.corpus.pretrain_share, 1.0),
        (recipe.distill.gamma_relation, 10.0),
        (recipe.run.learning_rates[1], 1.0),
    ):
        assert value == expected
        assert type(value) is type(expected)


def test_building_does_not_change_the_document_it_is_given():
    document = {"name": "x", "distill": {"preset": "paper"}, "sft": {"epochs": 1}}
    before = json.dumps(document)
    build_recipe(document, ["sft.epochs=9", "distill.temperature=2", "corpus.source=text"])
    assert json.dumps(document) == before


def test_every_repository_recipe_loads():
    recipes = sorted((Path(__file__).parents[1] / "recipes").rglob("*.toml"))
    assert recipes
    for path in recipes:
        assert load_recipe(path).name


# --- one recipe on top of others ---


def test_a_recipe_wins_over_what_it_extends_and_the_later_over_the_earlier(tmp_path):
    write(tmp_path, 'name = "far"\nseed = 3\n[sft]\nepochs = 9\nbatch_size = 2\n', "far.toml")
    write(tmp_path, 'extends = "far.toml"\n[sft]\nepochs = 7\n[task]\nname = "qnli"\n', "task.toml")
    write(tmp_path, '[model]\nsource = "some/model"\n[sft]\nlearning_rate = 1e-5\nepochs = 6\n', "model.toml")
    (tmp_path / "mine").mkdir()
    recipe = load_recipe(
        write(
            tmp_path / "mine",
            'extends = ["../task.toml", "../model.toml"]\n[sft]\nlearning_rate = 2e-5\n',
            "both.toml",
        ),
        ["sft.weight_decay=0"],
    )
    assert (recipe.name, recipe.seed) == ("both", 3)  # a name is not inherited
    assert recipe.model.source == "some/model"
    assert recipe.task.name == "qnli"
    assert recipe.sft == SftConfig(epochs=6, batch_size=2, learning_rate=2e-5, weight_decay=0.0)


def test_one_file_may_be_extended_twice_by_two_ways(tmp_path):
    write(tmp_path, "seed = 3\n", "far.toml")
    for name in ("a", "b"):
        write(tmp_path, 'extends = "far.toml"\n', f"{name}.toml")
    assert load_recipe(write(tmp_path, 'extends = ["a.toml", "b.toml"]\n')).seed == 3


def test_a_preset_and_a_key_of_it_may_come_from_two_files(tmp_path):
    write(tmp_path, '[distill]\npreset = "paper"\n', "paper.toml")
    recipe = load_recipe(write(tmp_path, 'extends = "paper.toml"\n[distill]\ngamma_relation = 1000\n'))
    assert (recipe.distill.lambda_logits, recipe.distill.gamma_relation) == (10.0, 1000.0)


# --- round trip and frozenness ---


def test_resolved_json_builds_the_same_recipe_again(tmp_path):
    for recipe in (load_recipe(write(tmp_path, FULL)), Recipe(name="defaults")):
        stored = json.loads(json.dumps(to_dict(recipe)))
        assert build_recipe(stored) == recipe


def test_resolved_json_holds_every_default():
    resolved = to_dict(Recipe(name="x"))
    assert resolved["sft"]["learning_rate"] == SftConfig().learning_rate
    for section in dataclasses.fields(Recipe):
        assert section.name in resolved


def test_configs_cannot_be_changed_after_they_were_checked():
    recipe = Recipe(name="x")
    for config in (recipe, *(v for v in vars(recipe).values() if dataclasses.is_dataclass(v))):
        field = dataclasses.fields(config)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field, getattr(config, field))


def test_configs_take_keywords_only():
    with pytest.raises(TypeError):
        SftConfig(1e-4)


# --- presets ---


def test_presets_set_the_published_values():
    paper, authors = (build(distill={"preset": name}).distill for name in ("paper", "authors"))
    assert (paper.lambda_logits, paper.gamma_relation, paper.temperature) == (10.0, 1e5, 5.0)
    assert (paper.relation_form, paper.relation_heads, paper.tau_squared) == ("scaled_dot", 0, False)
    assert (authors.relation_form, authors.relation_heads, authors.tau_squared) == ("cosine", 32, True)
    assert (authors.kd_tokens, authors.relation_mask) == ("all", "none")
    # The authors' code divides by its 32 heads once more, so gamma = 1e5 acts as 3125.
    assert authors.gamma_relation == 1e5 / 32


def test_the_default_preset_is_the_defaults_of_the_section():
    assert build(distill={"preset": "default"}) == build(distill={}) == build()


@pytest.mark.parametrize("preset", sorted(DISTILL_PRESETS))
def test_keys_beside_a_preset_win(preset):
    recipe = build("distill.temperature=3", distill={"preset": preset, "relation_heads": 8})
    assert (recipe.distill.relation_heads, recipe.distill.temperature) == (8, 3.0)


def test_a_preset_can_be_chosen_by_an_override():
    recipe = build("distill.preset=authors", distill={"preset": "paper", "lambda_logits": 2.0})
    assert recipe.distill.relation_form == "cosine"
    assert recipe.distill.lambda_logits == 2.0


def test_the_preset_of_2b4t_is_the_published_model():
    """Shape of microsoft/bitnet-b1.58-2B-4T: 2,412,820,480 parameters, head and embedding shared."""
    from transformers import BitNetConfig, BitNetForCausalLM

    base = build(base={"preset": "bitnet-2b4t"}).base
    # transformers' defaults are that model's, but for the length and the tied head of its config.json.
    published = BitNetConfig()
    keys = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    assert {key: getattr(base, key) for key in keys} == {key: getattr(published, key) for key in keys}
    assert (base.max_position_embeddings, base.tie_word_embeddings, base.head_dim) == (4096, True, 128)
    assert (base.architecture, base.ternary) == ("bitnet", True)
    assert (base.schedule, base.weight_decay_schedule, base.weight_decay) == (
        "two_stage_cosine",
        "cosine_then_zero",
        0.1,
    )
    shape = {key: getattr(base, key) for key in (*keys, "head_dim", "tie_word_embeddings")}
    with torch.device("meta"):
        model = BitNetForCausalLM(BitNetConfig(**shape))
    assert sum(p.numel() for p in model.parameters()) == 2_412_820_480


@pytest.mark.parametrize(
    ("preset", "millions", "peaks"),
    # Parameters outside the embedding: 4 h^2 of attention and 3 h f of the gated layer, times the layers.
    [
        ("bitnet-700m", 24 * (4 * 1536**2 + 3 * 1536 * 4096) / 1e6, (1.5e-3, 1e-3)),
        ("bitnet-1.3b", 24 * (4 * 2048**2 + 3 * 2048 * 5460) / 1e6, (1.2e-3, 8e-4)),
        ("bitnet-3b", 26 * (4 * 3200**2 + 3 * 3200 * 8640) / 1e6, (1.2e-3, 8e-4)),
        ("bitnet-5m", 5, (3e-3, 2e-3)),
        ("bitnet-1.5m", 1.5, (4e-3, 8e-3 / 3)),
    ],
)
def test_presets_of_native_models_have_the_size_and_the_rates_they_are_named_for(preset, millions, peaks):
    base = build(base={"preset": preset}).base
    attention = 2 * base.hidden_size * base.head_dim * (base.num_attention_heads + base.num_key_value_heads)
    layer = attention + 3 * base.hidden_size * base.intermediate_size
    assert base.num_hidden_layers * layer / 1e6 == pytest.approx(millions, rel=0.1)
    assert (base.learning_rate, base.learning_rate * base.two_stage_drop) == pytest.approx(peaks)
    assert (base.schedule, base.weight_decay, base.weight_decay_schedule) == (
        "two_stage",
        0.1,
        "half_then_zero",
    )


@pytest.mark.parametrize(
    ("preset", "shape", "peaks"),
    # BitNet v2, tables 8 and 9: width, feed-forward, heads, layers; learning rates of the two stages.
    [
        ("bitnet-v2-400m", (1024, 4096, 16, 24), (1.8e-3, 1.2e-3)),
        ("bitnet-v2-1.3b", (2048, 8192, 32, 18), (1.2e-3, 8e-4)),
        ("bitnet-v2-3b", (4096, 8192, 32, 20), (1.2e-3, 6.4e-4)),
        ("bitnet-v2-7b", (4096, 16384, 32, 24), (1e-3, 6e-4)),
    ],
)
def test_presets_of_bitnet_v2_are_the_papers(preset, shape, peaks):
    base = build(base={"preset": preset}).base
    keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    assert tuple(getattr(base, key) for key in keys) == shape
    assert base.num_attention_heads * base.head_dim == base.hidden_size
    assert base.num_key_value_heads == base.num_attention_heads
    assert (base.learning_rate, base.learning_rate * base.two_stage_drop) == pytest.approx(peaks)
    assert (base.architecture, base.ternary, base.int4_activations_ratio) == ("bitnet_v2", True, 0.05)
    assert (base.schedule, base.weight_decay, base.weight_decay_schedule) == (
        "two_stage",
        0.1,
        "half_then_zero",
    )
    assert (base.adam_beta2, base.max_position_embeddings) == (0.95, 2048)


@pytest.mark.parametrize(("preset", "millions"), [("bitnet-v2-1.5m", 1.5), ("bitnet-v2-5m", 5)])
def test_small_presets_of_bitnet_v2_have_the_size_they_are_named_for(preset, millions):
    base = build(base={"preset": preset}).base
    layer = 4 * base.hidden_size**2 + 3 * base.hidden_size * base.intermediate_size
    assert base.num_hidden_layers * layer / 1e6 == pytest.approx(millions, rel=0.1)
    assert build(base={"preset": preset, "ternary": False}).base.ternary is False


def test_keys_beside_a_preset_of_the_base_win_and_leave_nothing_unused():
    base = build("base.learning_rate=1", base={"preset": "bitnet-5m", "schedule": "cosine"}).base
    assert (base.learning_rate, base.schedule, base.two_stage_drop, base.hidden_size) == (
        1.0,
        "cosine",
        0.5,
        256,
    )
    assert build(base={"preset": "bitnet-5m", "tokenizer": "x"}).base.hidden_size == 256
    with pytest.raises(ConfigError, match=r"base.preset = 'bitnet': use one of bitnet-2b4t"):
        build(base={"preset": "bitnet"})


@pytest.mark.parametrize("preset", ["official", 3, ["paper"]])
def test_an_unknown_preset_is_refused_with_the_known_ones(preset):
    with pytest.raises(ConfigError) as refusal:
        build(distill={"preset": preset})
    assert f"distill.preset = {preset!r}" in str(refusal.value)
    for name in DISTILL_PRESETS:
        assert name in str(refusal.value)


# --- overrides ---


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("sft.epochs=3", "sft", "epochs", 3.0),
        ("sft.epochs = 0.5", "sft", "epochs", 0.5),
        ("pretrain.tokens=1e6", "pretrain", "tokens", 1_000_000),
        ("pretrain.tokens=2_000_000", "pretrain", "tokens", 2_000_000),
        ("sft.learning_rate=5e-5", "sft", "learning_rate", 5e-5),
        ("distill.tau_squared=true", "distill", "tau_squared", True),
        ("distill.relation_layers=[0, -1]", "distill", "relation_layers", (0, -1)),
        ("refine.norm_sites=all", "refine", "norm_sites", "all"),
        ('refine.norm_sites="all"', "refine", "norm_sites", "all"),
        ("refine.activation_bits=16", "refine", "activation_bits", 16),
        ("refine.activation_bits=4.0", "refine", "activation_bits", 4),
        ("task.labels=['no', 'yes']", "task", "labels", ("no", "yes")),
        ("model.source=Qwen/Qwen3-0.6B", "model", "source", "Qwen/Qwen3-0.6B"),
        ("task.template={sentence} =", "task", "template", "{sentence} ="),
        ("task.template=", "task", "template", ""),
        ("base.hidden_size=64", "base", "hidden_size", 64),
    ],
)
def test_overrides_are_read_with_the_type_of_their_field(override, section, key, value):
    actual = getattr(getattr(build(override), section), key)
    assert actual == value
    assert type(actual) is type(value)


def test_overrides_win_over_the_file_and_later_ones_over_earlier(tmp_path):
    path = write(tmp_path, FULL)
    recipe = load_recipe(path, ["seed=8", "sft.epochs=1", "sft.epochs=2", "output_dir=elsewhere"])
    assert (recipe.seed, recipe.sft.epochs, recipe.output_dir) == (8, 2.0, "elsewhere")
    assert recipe.task.labels == ("no", "yes")


def test_values_are_taken_as_they_are_and_overrides_win_over_them():
    values = {"name": 'Ann\'s "run" = 1', "seed": 4, "distill.teacher": "5", "sft.epochs": 2.0}
    recipe = build_recipe({"name": "x", "seed": 1}, ["sft.epochs=3"], values)
    assert (recipe.name, recipe.seed) == ('Ann\'s "run" = 1', 4)
    assert (recipe.distill.teacher, recipe.sft.epochs) == ("5", 3.0)
    with pytest.raises(ConfigError, match=r"^sft\.epoch: unknown key"):
        build_recipe({"name": "x"}, [], {"sft.epoch": 1})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sft.epochs", "--set sft.epochs: write section.key=value"),
        ("seed.x=1", "--set seed.x=1: seed is not a section"),
        ("sft.epoch=1", "sft.epoch: unknown key"),
        ("stage2.tokens=1", "stage2: unknown key"),
        ("a.b.c=1", "a.b: unknown key"),
        ("sft=1", "sft = 1: this is a section; write [sft] with keys below it"),
        ("sft.epochs=many", "sft.epochs = 'many': expected a value of type float"),
    ],
)
def test_overrides_that_make_no_sense_are_named(override, message):
    with pytest.raises(ConfigError) as refusal:
        build(override, seed=1)
    assert message in str(refusal.value)


# --- refusals ---


def test_errors_are_both_ours_and_the_standard_librarys():
    with pytest.raises(ValueError, match=r"sft\.epochs") as refusal:
        build("sft.epochs=-1")
    assert isinstance(refusal.value, BitDistillError)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot read the recipe .*check the path"):
        load_recipe(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        load_recipe(tmp_path)


def test_a_file_that_is_not_toml_is_named_with_the_place(tmp_path):
    with pytest.raises(ConfigError, match=r"broken\.toml: not valid TOML: .*line 2"):
        load_recipe(write(tmp_path, "seed = 1\nname = =\n", "broken.toml"))
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b'name = "\xff\xfe"')
    with pytest.raises(ConfigError, match=r"binary\.toml: not valid TOML"):
        load_recipe(binary)
