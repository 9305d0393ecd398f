"""A small BERT of every class, and the tokenizer that it reads with."""

import torch
import transformers
from transformers import BertConfig, BertTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bitdistill.model import STUDENT_CLASSES

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = 80


def wordpiece(texts: list[str]) -> PreTrainedTokenizerBase:
    """BERT's tokenizer with the words of ``texts``, and letters for all others; VOCABULARY entries."""
    words = sorted({word for text in texts for word in text.split()})
    letters = [f"{mark}{chr(code)}" for mark in ("", "##") for code in range(ord("a"), ord("z") + 1)]
    vocabulary = dict.fromkeys([*SPECIAL, *words, *letters])
    vocabulary |= dict.fromkeys(f"[unused{i}]" for i in range(VOCABULARY - len(vocabulary)))
    assert len(vocabulary) == VOCABULARY
    return BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)})


def small_encoder(name: str = "BertForMaskedLM", **changes: object) -> PreTrainedModel:
    """A random full-precision BERT of one class, the same at every call; gains and biases are not neutral."""
    geometry = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    torch.manual_seed(1)
    model = getattr(transformers, name)(BertConfig(**geometry | changes)).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("LayerNorm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif path.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


def small_encoder_student(name: str, ternary: dict | None = None) -> PreTrainedModel:
    """The student with the weights of ``small_encoder`` and SubLN gains that are not neutral."""
    dense = small_encoder(name)
    config_class, *classes = STUDENT_CLASSES["bert"]
    (model_class,) = (cls for cls in classes if cls.__name__ == f"Bit{name}")
    fields = dense.config.to_dict()
    fields.pop("model_type")
    student = model_class(config_class(ternary=ternary or {}, **fields)).eval()
    report = student.load_state_dict(dense.state_dict(), strict=False)
    assert all(".norm.weight" in path for path in report.missing_keys)
    with torch.no_grad():
        for path in report.missing_keys:
            student.get_parameter(path).uniform_(0.5, 1.5)
    return student


def some_batch() -> dict[str, torch.Tensor]:
    """Four examples of four lengths, padded on the right, the second of two segments."""
    lengths = (11, 7, 4, 9)
    input_ids = torch.zeros(4, 11, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    token_type_ids = torch.zeros_like(input_ids)
    generator = torch.Generator().manual_seed(5)
    for row, length in enumerate(lengths):
        input_ids[row, :length] = torch.randint(len(SPECIAL), VOCABULARY, (length,), generator=generator)
        attention_mask[row, :length] = 1
    token_type_ids[1, 4:7] = 1
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "token_type_ids": token_type_ids,
        "labels": torch.tensor([0, 1, 1, 0]),
    }
