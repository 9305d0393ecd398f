"""From a pre-trained BERT to a student and to a classifier: which tensors go over, and how the rest is drawn."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_encoders import small_encoder, some_batch
from transformers import AutoModelForSequenceClassification

from bitdistill.data.tasks import Task
from bitdistill.errors import CheckpointError
from bitdistill.model import TernarySpec
from bitdistill.train.encoder import load_classifier, load_finished_classifier
from bitdistill.train.loading import load_model, load_tokenizer
from bitdistill.train.surgery import refine

TASK = Task("jsonl", "classification", (" bad", " good"), (), (), (), classes=("bad", "good"))
HEAD = {"classifier.weight", "classifier.bias"}
POOLER = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}


@pytest.fixture
def saved(wordpieces, tmp_path):
    """``saved(model)`` -> its folder, with the tokenizer."""

    def save(model, name="checkpoint"):
        model.save_pretrained(tmp_path / name)
        wordpieces.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def equal(model, folder, names) -> bool:
    there, here = load_file(folder / "model.safetensors"), model.state_dict()
    return all(torch.equal(here[name], there[name]) for name in names)


def test_the_student_of_a_pre_trained_bert_keeps_all_but_the_next_sentence_head(bert):
    model = load_model(bert)
    assert type(model).__name__ == "BertForMaskedLM"
    student, _ = refine(model, TernarySpec())
    assert type(student).__name__ == "BitBertForMaskedLM"
    names = load_file(bert / "model.safetensors").keys() - {
        "cls.seq_relationship.weight",
        "cls.seq_relationship.bias",
    }
    assert equal(student, bert, names)
    new = student.state_dict().keys() - names
    assert all(".norm.weight" in n or n.startswith("cls.predictions.decoder") for n in new)
    assert not any(p.requires_grad for p in student.bert.pooler.parameters())


def test_the_pooler_goes_through_a_masked_lm_to_the_classifier(bert, saved):
    folder = saved(refine(load_model(bert), TernarySpec())[0])
    classifier = load_classifier(saved(load_model(folder), "again"), None, TASK, seed=0)
    assert type(classifier).__name__ == "BitBertForSequenceClassification"
    assert equal(
        classifier, bert, classifier.state_dict().keys() & load_file(bert / "model.safetensors").keys()
    )
    assert equal(classifier, folder, [n for n in classifier.state_dict() if ".norm.weight" in n])
    assert all(p.requires_grad for p in classifier.parameters())
    assert not hasattr(classifier.config, "auto_map")


def test_every_method_starts_with_the_same_head(bert, saved):
    """Full precision and ternary; the seed decides, not the state of the global generator."""
    student = saved(refine(load_model(bert), TernarySpec())[0])
    first = load_classifier(bert, None, TASK, seed=3).state_dict()
    torch.manual_seed(77)
    second = load_classifier(student, None, TASK, seed=3).state_dict()
    other = load_classifier(bert, None, TASK, seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in HEAD | POOLER)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])
    assert first["classifier.weight"].std() == pytest.approx(0.2, rel=0.3)  # initializer_range
    assert not first["classifier.bias"].any()


def test_a_masked_lm_without_a_pooler_gets_one_from_the_seed(saved):
    folder = saved(small_encoder("BertForMaskedLM"))
    draws = [load_classifier(folder, None, TASK, seed=seed) for seed in (0, 0, 1)]
    weights = [model.bert.pooler.dense.weight for model in draws]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[0].detach().std() == pytest.approx(0.2, rel=0.1)
    assert equal(
        draws[0], folder, [n for n in load_file(folder / "model.safetensors") if n.startswith("bert.")]
    )


def test_a_head_is_kept_where_the_classes_are_the_tasks_and_drawn_anew_elsewhere(saved):
    def classifier(*names):
        return small_encoder("BertForSequenceClassification", id2label=dict(enumerate(names)))

    kept = saved(classifier("bad", "good"), "kept")
    model = load_classifier(kept, None, TASK, seed=0)
    assert equal(model, kept, model.state_dict())
    assert equal(load_finished_classifier(kept, None, TASK), kept, HEAD)
    for names in (("good", "bad"), ("LABEL_0", "LABEL_1"), ("no", "maybe", "yes")):
        folder = saved(classifier(*names), "-".join(names))
        model = load_classifier(folder, None, TASK, seed=0)
        assert model.config.id2label == {0: "bad", 1: "good"}
        assert model.classifier.weight.shape == (2, 32)
        assert not model.classifier.bias.any()
        assert equal(model, folder, POOLER)


def test_a_teacher_of_other_classes_is_refused(bert, llama, saved):
    generic = saved(small_encoder("BertForSequenceClassification"), "generic")
    assert load_finished_classifier(generic, None, TASK).config.id2label[0] == "LABEL_0"
    for names in (("good", "bad"), ("no", "maybe", "yes")):
        folder = saved(
            small_encoder("BertForSequenceClassification", id2label=dict(enumerate(names))), "-".join(names)
        )
        with pytest.raises(
            CheckpointError, match=f"its classes are {', '.join(names)} and the task's are bad, good"
        ):
            load_finished_classifier(folder, None, TASK)
    with pytest.raises(CheckpointError, match=r"an encoder without a classification head.*bitdistill sft"):
        load_finished_classifier(bert, None, TASK)
    with pytest.raises(CheckpointError, match="llama here is a decoder"):
        load_finished_classifier(llama, None, TASK)


def test_a_classifier_is_refined_as_one(saved):
    folder = saved(small_encoder("BertForSequenceClassification"))
    student, _ = refine(load_model(folder), TernarySpec())
    assert type(student).__name__ == "BitBertForSequenceClassification"
    assert equal(student, folder, load_file(folder / "model.safetensors"))


def test_an_encoder_alone_makes_a_classifier_but_no_masked_lm(saved):
    folder = saved(small_encoder("BertModel"))
    there = load_file(folder / "model.safetensors")
    model = load_classifier(folder, None, TASK, seed=0)
    assert all(torch.equal(model.bert.state_dict()[name], value) for name, value in there.items())
    with pytest.raises(CheckpointError, match="an encoder alone, without the head of BertForMaskedLM"):
        load_model(folder)


def test_a_damaged_encoder_makes_no_classifier(bert, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    lost = "bert.encoder.layer.1.output.dense.weight"
    save_file({k: v for k, v in tensors.items() if k != lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks {lost}"):
        load_classifier(folder, None, TASK, seed=0)
    tensors[lost][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="holds NaN"):
        load_classifier(folder, None, TASK, seed=0)


def test_the_saved_classifier_is_hugging_faces_own(bert, saved):
    """What a fine-tune leaves loads with plain transformers, to the same logits."""
    model = load_classifier(bert, None, TASK, seed=0).eval()
    folder = saved(model)
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    batch = {key: value for key, value in some_batch().items() if key != "labels"}
    assert torch.equal(plain(**batch).logits, model(**batch).logits)
    assert plain.config.id2label == {0: "bad", 1: "good"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_decoder": True}, "is_decoder = true.*use a bidirectional one"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
    ],
)
def test_a_bert_that_is_another_model_is_refused(saved, change, message):
    folder = saved(small_encoder("BertForMaskedLM", **change))
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_a_tokenizer_that_is_no_encoders_is_refused(bert, tokenizer, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    tokenizer.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="the tokenizer has no cls_token, sep_token, mask_token"):
        load_tokenizer(folder)
