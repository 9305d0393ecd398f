"""Recipes: what is read from TOML and overrides, and what every refusal says."""

import dataclasses
import json
from pathlib import Path

import pytest

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
    recipes = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))
    assert recipes
    for path in recipes:
        assert load_recipe(path).name


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


@pytest.mark.parametrize(
    ("document", "key", "suggestion"),
    [
        ({"sead": 1}, "sead: unknown key", "Did you mean seed?"),
        ({"refine": {"norm_site": "all"}}, "refine.norm_site: unknown key", "Did you mean norm_sites?"),
        (
            {"distill": {"gamma_relations": 1.0}},
            "distill.gamma_relations: unknown key",
            "Did you mean gamma_relation?",
        ),
        ({"base": {"layers_hidden": 2}}, "base.layers_hidden: unknown key", "num_hidden_layers"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(document, key, suggestion):
    with pytest.raises(ConfigError) as refusal:
        build(**document)
    assert key in str(refusal.value)
    assert suggestion in str(refusal.value)


def test_an_unknown_key_like_no_other_gets_the_list_but_no_guess():
    with pytest.raises(ConfigError, match=r"^zzz: unknown key; known here: .*corpus.*task") as refusal:
        build(zzz=1)
    assert "Did you mean" not in str(refusal.value)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"seed": "1"}, "seed = '1': expected a value of type int"),
        ({"seed": 1.5}, "seed = 1.5: expected a value of type int"),
        ({"seed": True}, "seed = True: expected a value of type int"),
        ({"sft": {"epochs": True}}, "sft.epochs = True: expected a value of type float"),
        ({"distill": {"tau_squared": 1}}, "distill.tau_squared = 1: expected a value of type bool"),
        ({"model": {"source": 3}}, "model.source = 3: expected a value of type str"),
        ({"model": {"revision": 3}}, "model.revision = 3: expected a value of type str"),
        ({"task": {"labels": "yes"}}, "task.labels = 'yes': write a list"),
        ({"task": {"labels": [1, 2]}}, "task.labels = 1: expected a value of type str"),
        ({"distill": {"relation_layers": -1}}, "distill.relation_layers = -1: write a list"),
        ({"refine": {"activation_bits": "8"}}, "refine.activation_bits = '8': use one of 4, 8, 16"),
        ({"base": 5}, "base = 5: this is a section; write [base]"),
        ({"corpus": "text"}, "corpus = 'text': this is a section; write [corpus]"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_the_right_one(document, message):
    with pytest.raises(ConfigError) as refusal:
        build(**document)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", " "),
        ("seed", -1),
        ("seed", 2**32),
        ("corpus.sequence_length", 4),
        ("corpus.pretrain_share", 0.0),
        ("corpus.pretrain_share", 1.5),
        ("corpus.max_documents", -1),
        ("task.max_length", 7),
        ("task.max_train_examples", -5),
        ("task.validation_share", 1.0),
        ("task.validation_share", float("nan")),
        ("task.max_new_tokens", 0),
        ("task.labels", ("only",)),
        ("task.kind", "regression"),
        ("base.tokens", 0),
        ("base.vocab_size", 259),
        ("base.num_hidden_layers", 0),
        ("base.num_key_value_heads", 3),
        ("base.learning_rate", 0.0),
        ("refine.norm_sites", "some"),
        ("refine.granularity", "row"),
        ("refine.block_size", 0),
        ("refine.activation_bits", 2),
        ("refine.calibration_sequences", 0),
        ("pretrain.tokens", 0),
        ("pretrain.learning_rate", -1.0),
        ("pretrain.learning_rate", float("nan")),
        ("pretrain.learning_rate", float("inf")),
        ("pretrain.warmup_ratio", 1.1),
        ("pretrain.quant_warmup_ratio", -0.1),
        ("pretrain.two_stage_drop", 0.0),
        ("pretrain.adam_beta2", 1.0),
        ("sft.epochs", 0.0),
        ("sft.epochs", float("inf")),
        ("sft.batch_size", 0),
        ("sft.gradient_accumulation_steps", 0),
        ("sft.weight_decay", -0.1),
        ("sft.max_grad_norm", -1.0),
        ("sft.save_every", 0),
        ("sft.log_every", 0),
        ("sft.schedule", "exponential"),
        ("sft.precision", "fp16"),
        ("distill.epochs", -1.0),
        ("distill.lambda_logits", -1.0),
        ("distill.gamma_relation", -1.0),
        ("distill.temperature", 0.0),
        ("distill.relation_temperature", 0.0),
        ("distill.relation_heads", -1),
        ("distill.relation_layers", ()),
        ("distill.teacher_layers", (1, 2)),
        ("distill.relation_form", "dot"),
        ("run.methods", ()),
        ("run.learning_rates", (1e-3, 0.0)),
    ],
)
def test_an_impossible_value_is_refused_with_its_key_and_value(key, value):
    section, _, field = key.rpartition(".")
    given = list(value) if isinstance(value, tuple) else value
    with pytest.raises(ConfigError) as refusal:
        build(**({section: {field: given}} if section else {field: given}))
    offender = 0.0 if key == "run.learning_rates" else value
    assert f"{key} = {offender!r}: " in str(refusal.value)


@pytest.mark.parametrize("method", ["bitnet", "bitdistill:no_teacher", "fp16_sft:no_subln", "bitdistill:no"])
def test_an_unknown_method_or_ablation_is_refused(method):
    with pytest.raises(ConfigError) as refusal:
        build(run={"methods": ["fp16_sft", method]})
    assert f"run.methods = {method!r}: " in str(refusal.value)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"refine": {"gain": "rms", "norm_sites": "none"}}, r"refine\.gain = 'rms': there is no norm"),
        ({"model": {"source": "m"}, "base": {}}, r"model\.source = 'm': .* not both"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(document, message):
    with pytest.raises(ConfigError, match=message):
        build(**document)


@pytest.mark.parametrize(
    ("document", "key", "value", "remedy"),
    [
        ({"distill": {"lambda_logits": 0, "temperature": 2}}, "distill.temperature", 2.0, "lambda_logits"),
        (
            {"distill": {"lambda_logits": 0, "tau_squared": True}},
            "distill.tau_squared",
            True,
            "lambda_logits",
        ),
        ({"distill": {"lambda_logits": 0, "kd_tokens": "all"}}, "distill.kd_tokens", "all", "lambda_logits"),
        (
            {"distill": {"gamma_relation": 0, "relation_form": "cosine"}},
            "distill.relation_form",
            "cosine",
            "gamma_relation",
        ),
        (
            {"distill": {"gamma_relation": 0, "relation_layers": [0]}},
            "distill.relation_layers",
            (0,),
            "gamma_relation",
        ),
        (
            {"distill": {"gamma_relation": 0, "teacher_layers": [3]}},
            "distill.teacher_layers",
            (3,),
            "gamma_relation",
        ),
        (
            {"distill": {"preset": "authors", "lambda_logits": 0, "tau_squared": True}},
            "distill.tau_squared",
            True,
            "lambda_logits",
        ),
        ({"task": {"name": "grammar", "data_dir": "x"}}, "task.data_dir", "x", 'name = "jsonl"'),
        ({"task": {"name": "sst2", "label_column": "y"}}, "task.label_column", "y", 'name = "jsonl"'),
        ({"task": {"name": "sst2", "eval_file": "a.jsonl"}}, "task.eval_file", "a.jsonl", 'name = "jsonl"'),
        ({"task": {"name": "jsonl", "max_new_tokens": 3}}, "task.max_new_tokens", 3, 'kind = "generation"'),
        (
            {"task": {"name": "jsonl", "kind": "generation", "labels": ["a", "b"]}},
            "task.labels",
            ("a", "b"),
            'kind = "classification"',
        ),
        (
            {"task": {"name": "cnndm", "scoring": "generation"}},
            "task.scoring",
            "generation",
            'kind = "classification"',
        ),
        (
            {"task": {"name": "jsonl", "document_column": "body"}},
            "task.document_column",
            "body",
            'kind = "summarisation"',
        ),
        ({"task": {"name": "cnndm", "document_column": "x"}}, "task.document_column", "x", 'name = "jsonl"'),
        ({"task": {"name": "qnli", "kind": "generation"}}, "task.kind", "generation", "leave it out"),
        ({"sft": {"two_stage_drop": 0.3}}, "sft.two_stage_drop", 0.3, 'schedule = "two_stage"'),
        ({"base": {"continue_from": "x", "hidden_size": 64}}, "base.hidden_size", 64, "leave it out"),
        (
            {"run": {"methods": ["bitdistill:no_distill+no_logits_kd"]}},
            "run.methods",
            "bitdistill:no_distill+no_logits_kd",
            "drop no_logits_kd",
        ),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(document, key, value, remedy):
    with pytest.raises(ConfigError) as refusal:
        build(**document)
    assert str(refusal.value).startswith(f"{key} = {value!r}: ")
    assert remedy in str(refusal.value)


@pytest.mark.parametrize(
    "document",
    [
        {"distill": {"lambda_logits": 0, "temperature": 5}},
        {"distill": {"preset": "authors", "lambda_logits": 0}},
        {"distill": {"preset": "authors", "gamma_relation": 0}},
        {"task": {"name": "sst2", "data_dir": "x", "template": "{sentence} =", "labels": ["a", "b"]}},
        {"task": {"name": "jsonl", "label_column": "y", "train_file": "a", "eval_file": "b"}},
        {"task": {"name": "jsonl", "kind": "generation", "max_new_tokens": 3}},
        {"task": {"name": "jsonl", "kind": "summarisation", "document_column": "body", "max_new_tokens": 3}},
        {"task": {"name": "mnli_mismatched", "scoring": "generation"}},
        {"task": {"name": "cnndm", "max_new_tokens": 64}},
        {"sft": {"schedule": "two_stage", "two_stage_drop": 0.3}},
        {"run": {"methods": ["bitdistill:no_logits_kd+no_relation_kd", "bitdistill:no_distill+no_subln"]}},
    ],
)
def test_settings_that_are_used_or_at_their_default_are_accepted(document):
    assert build_recipe(to_dict(build(**document))) == build(**document)


@pytest.mark.parametrize("preset", sorted(DISTILL_PRESETS))
@pytest.mark.parametrize(
    ("switch", "weight"), [("no_logits_kd", "lambda_logits"), ("no_relation_kd", "gamma_relation")]
)
def test_an_ablation_may_switch_off_a_loss_of_any_preset(preset, switch, weight):
    from bitdistill.pipeline import Method

    recipe = build(distill={"preset": preset, "teacher": "t"})
    _, ablated = Method(f"bitdistill:{switch}").fine_tune(recipe, None, None)
    kept, other = (
        getattr(r.distill, "gamma_relation" if "logits" in switch else "lambda_logits")
        for r in (ablated, recipe)
    )
    assert getattr(ablated.distill, weight) == 0
    assert kept == other


@pytest.mark.parametrize("section", ["model", "distill"])
def test_a_revision_of_no_model_is_refused(section):
    key = {"model": "revision", "distill": "teacher_revision"}[section]
    with pytest.raises(ConfigError, match=rf"^{section}\.{key} = 'v1': it is not used without"):
        build(**{section: {key: "v1"}})


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
