"""Sections of a recipe: the values, contradictions and idle settings they refuse, and what each refusal says."""

import pytest

from bitdistill.config import Recipe
from bitdistill.errors import ConfigError
from bitdistill.recipe import DISTILL_PRESETS, build_recipe, to_dict


def build(*overrides: str, **document: object) -> Recipe:
    return build_recipe({"name": "test", **document}, overrides)


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
        ("task.max_validation_examples", -1),
        ("task.validation_share", 1.0),
        ("task.validation_share", float("nan")),
        ("task.max_new_tokens", 0),
        ("task.labels", ("only",)),
        ("task.columns", ("a", "b", "c")),
        ("task.kind", "regression"),
        ("base.tokens", 0),
        ("base.vocab_size", 259),
        ("base.num_hidden_layers", 0),
        ("base.num_key_value_heads", 3),
        ("base.learning_rate", 0.0),
        ("base.architecture", "gpt2"),
        ("base.max_position_embeddings", 0),
        ("base.eval_every", -1),
        ("pretrain.eval_sequences", 0),
        ("refine.norm_sites", "some"),
        ("refine.granularity", "row"),
        ("refine.block_size", 0),
        ("refine.dead_zone_bias", -1.0),
        ("refine.activation_bits", 2),
        ("refine.hadamard", "inputs"),
        ("refine.hadamard_block", 12),
        ("refine.hadamard_block", -8),
        ("refine.calibration_sequences", 0),
        ("refine.scale", "absmax"),
        ("refine.initialisation", "rtn"),
        ("refine.gptq_damping", -0.1),
        ("pretrain.tokens", 0),
        ("pretrain.learning_rate", -1.0),
        ("pretrain.learning_rate", float("nan")),
        ("pretrain.learning_rate", float("inf")),
        ("pretrain.warmup_ratio", 1.1),
        ("pretrain.quant_warmup_ratio", -0.1),
        ("pretrain.two_stage_drop", 0.0),
        ("pretrain.adam_beta2", 1.0),
        ("pretrain.freeze_codes_ratio", 1.0),
        ("sft.int4_activations_ratio", 1.1),
        ("base.hadamard_block", 3),
        ("sft.freeze_codes_lr", 0.0),
        ("sft.ema_decay", 1.0),
        ("pretrain.lambda_logits", -0.1),
        ("pretrain.temperature", 0.0),
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
        ("distill.teacher_cache", "logits"),
        ("distill.cache_top_k", 0),
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
        ({"distill": {"cache_top_k": 8}}, "distill.cache_top_k", 8, 'teacher_cache = "topk"'),
        ({"pretrain": {"temperature": 2}}, "pretrain.temperature", 2.0, "set lambda_logits"),
        (
            {"distill": {"teacher": "x", "teacher_method": "fp16_ct_sft"}},
            "distill.teacher_method",
            "fp16_ct_sft",
            "leave one of the two out",
        ),
        (
            {"distill": {"teacher_cache": "hidden", "cache_top_k": 8}},
            "distill.cache_top_k",
            8,
            'teacher_cache = "topk"',
        ),
        (
            {"distill": {"teacher_cache_dir": "x"}},
            "distill.teacher_cache_dir",
            "x",
            'teacher_cache = "hidden"',
        ),
        (
            {"distill": {"teacher_cache": "topk", "lambda_logits": 0}},
            "distill.teacher_cache",
            "topk",
            'teacher_cache = "hidden"',
        ),
        (
            {"distill": {"teacher_cache": "hidden", "lambda_logits": 0, "gamma_relation": 0}},
            "distill.teacher_cache",
            "hidden",
            "leave it out",
        ),
        (
            {"distill": {"preset": "authors", "teacher_cache": "hidden"}},
            "distill.teacher_cache",
            "hidden",
            'relation_mask = "padding"',
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
        ({"task": {"name": "sst2", "columns": ["a"]}}, "task.columns", ("a",), 'name = "jsonl"'),
        (
            {"task": {"name": "jsonl", "columns": ["a"], "template": "{a}"}},
            "task.columns",
            ("a",),
            "leave out task.template",
        ),
        (
            {"task": {"name": "jsonl", "kind": "generation", "columns": ["a"]}},
            "task.columns",
            ("a",),
            'kind = "classification"',
        ),
        ({"task": {"name": "jsonl", "columns": ["a"]}, "base": {}}, "task.columns", ("a",), "task.template"),
        ({"sft": {"quant_warmup_form": "soft"}}, "sft.quant_warmup_form", "soft", "set quant_warmup_ratio"),
        ({"sft": {"freeze_codes_lr": 0.3}}, "sft.freeze_codes_lr", 0.3, "set freeze_codes_ratio"),
        (
            {"distill": {"freeze_codes_ratio": 0.6, "quant_warmup_ratio": 0.5}},
            "distill.freeze_codes_ratio",
            0.6,
            "quant_warmup_ratio = 0.5 leaves fewer steps",
        ),
        ({"sft": {"two_stage_drop": 0.3}}, "sft.two_stage_drop", 0.3, 'schedule = "two_stage"'),
        (
            {"sft": {"ema_decay": 0.9, "freeze_codes_ratio": 0.1}},
            "sft.ema_decay",
            0.9,
            "leave one of the two out",
        ),
        ({"base": {"continue_from": "x", "hidden_size": 64}}, "base.hidden_size", 64, "leave it out"),
        ({"base": {"continue_from": "x", "ternary": True}}, "base.ternary", True, "architecture"),
        ({"base": {"continue_from": "x", "ternary": False}}, "base.ternary", False, "leave it out"),
        ({"base": {"ternary": True}}, "base.ternary", True, "bitdistill refine"),
        ({"base": {"tokenizer": "x", "vocab_size": 300}}, "base.vocab_size", 300, "has its own"),
        ({"base": {"eval_sequences": 9}}, "base.eval_sequences", 9, "set eval_every"),
        ({"refine": {"gptq_damping": 0.1}}, "refine.gptq_damping", 0.1, 'initialisation = "gptq"'),
        (
            {"refine": {"initialisation": "awq", "gptq_act_order": True}},
            "refine.gptq_act_order",
            True,
            'initialisation = "gptq"',
        ),
        (
            {"refine": {"initialisation": "gptq", "gptq_act_order": True, "granularity": "block"}},
            "refine.gptq_act_order",
            True,
            'granularity = "channel"',
        ),
        ({"refine": {"calibration_sequences": 8}}, "refine.calibration_sequences", 8, 'gain = "rms"'),
        (
            {"refine": {"activation_bits": 4}, "pretrain": {"int4_activations_ratio": 0.1}},
            "pretrain.int4_activations_ratio",
            0.1,
            "refine.activation_bits = 4",
        ),
        (
            {"pretrain": {"int4_activations_ratio": 0.1}, "distill": {"int4_activations_ratio": 0.2}},
            "distill.int4_activations_ratio",
            0.2,
            "stage 3 keeps",
        ),
        (
            {"base": {"architecture": "bitnet", "int4_activations_ratio": 0.1}},
            "base.int4_activations_ratio",
            0.1,
            'use "bitnet_v2"',
        ),
        ({"base": {"hadamard_block": 8}}, "base.hadamard_block", 8, 'architecture = "bitnet_v2"'),
        (
            {"base": {"architecture": "bitnet_v2", "ternary": False, "hadamard_block": 8}},
            "base.hadamard_block",
            8,
            "full-precision twin",
        ),
        ({"base": {"continue_from": "x", "hadamard_block": 8}}, "base.hadamard_block", 8, "leave it out"),
        (
            {"base": {"architecture": "bitnet_v2", "intermediate_size": 688, "hadamard_block": 64}},
            "base.hadamard_block",
            64,
            "intermediate_size = 688; use 16",
        ),
        ({"refine": {"hadamard_block": 8}}, "refine.hadamard_block", 8, 'hadamard = "outputs"'),
        ({"refine": {"hadamard_fold": False}}, "refine.hadamard_fold", False, 'hadamard = "outputs"'),
        (
            {"refine": {"hadamard": "outputs", "initialisation": "awq"}},
            "refine.initialisation",
            "awq",
            "use gptq or absmean",
        ),
        (
            {"base": {"architecture": "bitnet", "head_dim": 64}},
            "base.head_dim",
            64,
            "8 x 64 is not 256",
        ),
        (
            {"base": {"max_position_embeddings": 64}},
            "corpus.sequence_length",
            256,
            "base.max_position_embeddings = 64",
        ),
        (
            {"pretrain": {"schedule": "two_stage_cosine"}},
            "pretrain.two_stage_drop",
            0.5,
            "use less than 0.5",
        ),
        (
            {"pretrain": {"schedule": "two_stage", "warmup_ratio": 0.5}},
            "pretrain.warmup_ratio",
            0.5,
            "use less than 0.5",
        ),
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
        {"distill": {"preset": "authors", "gamma_relation": 0, "teacher_cache": "topk", "cache_top_k": 8}},
        {"distill": {"lambda_logits": 0, "teacher_cache": "hidden", "teacher_cache_dir": "x"}},
        {"task": {"name": "sst2", "data_dir": "x", "template": "{sentence} =", "labels": ["a", "b"]}},
        {"task": {"name": "jsonl", "label_column": "y", "train_file": "a", "eval_file": "b"}},
        {"task": {"name": "jsonl", "kind": "generation", "max_new_tokens": 3}},
        {"task": {"name": "jsonl", "kind": "summarisation", "document_column": "body", "max_new_tokens": 3}},
        {"task": {"name": "mnli_mismatched", "scoring": "generation"}},
        {"task": {"name": "cnndm", "max_new_tokens": 64}},
        {"sft": {"schedule": "two_stage", "two_stage_drop": 0.3}},
        {"sft": {"schedule": "two_stage_cosine", "two_stage_drop": 0.3}},
        {"base": {"architecture": "bitnet", "ternary": False}},
        {"base": {"architecture": "bitnet", "eval_every": 3, "eval_sequences": 9}},
        {"base": {"continue_from": "x", "eval_every": 3}},
        {"base": {"preset": "bitnet-2b4t", "tokenizer": "x"}},
        {"base": {"preset": "bitnet-1.5m", "schedule": "cosine"}},
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


def test_an_ablation_keeps_what_the_other_loss_needs_of_the_cache():
    from bitdistill.pipeline import Method

    cache = {"teacher_cache": "topk", "cache_top_k": 8, "teacher_cache_dir": "x"}
    recipe = build(distill={"teacher": "t", **cache})
    found = {}
    for switch in ("no_relation_kd", "no_logits_kd", "no_logits_kd+no_relation_kd"):
        _, ablated = Method(f"bitdistill:{switch}").fine_tune(recipe, None, None)
        found[switch] = tuple(getattr(ablated.distill, key) for key in cache)
    default = build().distill.cache_top_k
    assert found == {
        "no_relation_kd": ("topk", 8, "x"),
        "no_logits_kd": ("hidden", default, "x"),
        "no_logits_kd+no_relation_kd": ("none", default, ""),
    }


@pytest.mark.parametrize("section", ["model", "distill"])
def test_a_revision_of_no_model_is_refused(section):
    key = {"model": "revision", "distill": "teacher_revision"}[section]
    with pytest.raises(ConfigError, match=rf"^{section}\.{key} = 'v1': it is not used without"):
        build(**{section: {key: "v1"}})
