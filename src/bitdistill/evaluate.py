"""How good a model is at a task, and its perplexity, through one protocol that any model can offer.

Classification by label log-likelihood: the score of a label is the sum of the log-probabilities of its tokens after
the prompt, with no length normalisation, and the highest score wins (the first on a tie). Classification by
generation: the model writes greedily as many tokens as the longest label has, and its answer is the label that the
text begins with (the longest such label; none is a wrong answer). An encoder's classifier answers with its highest
logit.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn import functional as F
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)

from .data.corpus import PackedSequences
from .data.prompts import PromptEncoder
from .data.segments import SegmentSequences
from .data.tasks import Example
from .errors import CheckpointError, ConfigError
from .metrics import Evaluation, Score, judge_summaries
from .model import quantize_states
from .processes import process_state
from .train.encoder_objective import class_logits
from .train.loading import is_encoder

BATCH_TOKENS = 4096
"""Padded tokens of an evaluation batch."""

BATCH_LOGITS = 1 << 22
"""Logits that exist together."""


class StateBits(NamedTuple):
    """Bits of attention's queries, and of its keys and values, that a model is judged at; None leaves it its own."""

    query_bits: int | None = None
    kv_bits: int | None = None

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        """Quantise the model's states in place, which are not trained for it (BitNet v2, tables 2 and 3); returns it.

        Raises:
            ConfigError: no such bits, or the model has no causal attention.
        """
        if self == OWN_BITS:
            return model
        own = getattr(model.config, "ternary", {})
        query_bits, kv_bits = (
            own.get(key, 16) if bits is None else bits for key, bits in self._asdict().items()
        )
        try:
            quantize_states(model, query_bits, kv_bits)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return model


OWN_BITS = StateBits()
"""A model as it is."""


class Scorer(Protocol):
    """What evaluation needs of a model."""

    def label_scores(
        self, prompts: Sequence[list[int]], labels: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """``log p(label | prompt)`` of every label after every prompt, up to a number of each prompt's own."""
        ...

    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy continuation of every prompt, up to and without the end-of-text token."""
        ...


class TorchScorer:
    """A transformers causal LM as a ``Scorer``; evaluates in the model's own dtype.

    Raises:
        CheckpointError: the model is an encoder.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if is_encoder(model.config):
            raise CheckpointError(
                f"{model.config.model_type} is an encoder, which neither scores nor writes text; use a causal language "
                "model, or bitdistill eval for a classifier"
            )
        self.model = model.to(process_state().device).eval()
        self.tokenizer = tokenizer
        self.pad_id = tokenizer.pad_token_id
        self.end_id = tokenizer.eos_token_id

    def log_likelihoods(self, requests: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """``log p(continuation | context)`` for every ``(context ids, continuation ids)``."""
        return [score for score, _ in self.scored(requests)]

    def label_scores(
        self, prompts: Sequence[list[int]], labels: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """See ``Scorer``; log-likelihoods."""
        scores = self.log_likelihoods([(prompt, list(ids)) for prompt in prompts for ids in labels])
        return [scores[i : i + len(labels)] for i in range(0, len(scores), len(labels))]

    @torch.inference_mode()
    def scored(self, requests: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """``log p(continuation | context)``, and whether it is what greedy decoding would write.

        Requests that feed the model the same tokens share one pass.
        """
        inputs = {tuple(context + continuation[:-1]) for context, continuation in requests}
        by_input: dict[tuple[int, ...], list[int]] = {ids: [] for ids in inputs}
        for index, (context, continuation) in enumerate(requests):
            by_input[tuple(context + continuation[:-1])].append(index)
        scores = [(0.0, False)] * len(requests)
        for batch in _length_batches(sorted(by_input, key=lambda ids: (len(ids), ids))):
            hidden = self._hidden(batch)
            chosen: list[int] = []
            places: list[int] = []
            targets: list[int] = []
            for row, ids in enumerate(batch):
                for index in by_input[ids]:
                    context, continuation = requests[index]
                    first = row * hidden.shape[1] + len(context) - 1
                    chosen.append(index)
                    places += range(first, first + len(continuation))
                    targets += continuation
            lengths = [len(requests[index][1]) for index in chosen]
            found = self._token_scores(hidden.flatten(0, 1), places, targets)
            for index, log_probs, is_greedy in zip(chosen, *(f.split(lengths) for f in found), strict=True):
                scores[index] = float(log_probs.sum()), bool(is_greedy.all())
        return scores

    def _token_scores(
        self, hidden: torch.Tensor, places: list[int], targets: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each target behind its place in ``hidden`` ``[N, E]``, and whether none is more likely.

        A state that several targets follow goes through the head once.
        """
        head = self.model.get_output_embeddings()
        states, row_of = torch.tensor(places, device=hidden.device).unique(return_inverse=True)
        wanted = torch.tensor(targets, device=hidden.device)
        log_probs = hidden.new_zeros(len(targets), dtype=torch.float32)
        is_greedy = torch.zeros(len(targets), dtype=torch.bool, device=hidden.device)
        step = max(1, BATCH_LOGITS // head.weight.shape[0])
        for start in range(0, len(states), step):
            logits = head(hidden[states[start : start + step]]).float()
            is_here = (row_of >= start) & (row_of < start + step)
            rows, tokens = row_of[is_here] - start, wanted[is_here]
            log_probs[is_here] = logits[rows, tokens] - logits.logsumexp(dim=-1)[rows]
            is_greedy[is_here] = logits.argmax(dim=-1)[rows] == tokens
        return log_probs, is_greedy

    def _hidden(self, batch: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """Final hidden states ``[B, T, E]`` of right-padded sequences."""
        length = max(map(len, batch))
        input_ids = torch.full((len(batch), length), self.pad_id)
        mask = torch.zeros(len(batch), length, dtype=torch.int64)
        for row, ids in enumerate(batch):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        device = self.model.device
        return self.model.base_model(
            input_ids=input_ids.to(device), attention_mask=mask.to(device), use_cache=False
        ).last_hidden_state

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[list[int]], max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[list[int]]:
        """See ``Scorer``. Batches are left-padded. ``stop``: texts that end an answer; they may be part of it."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers: list[list[int]] = [[] for _ in prompts]
        for batch in _length_batches([tuple(prompts[i]) for i in order], indices=order):
            rows = [prompts[i] for i in batch]
            length = max(map(len, rows))
            input_ids = torch.tensor([[self.pad_id] * (length - len(r)) + r for r in rows])
            mask = torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows])
            output = self.model.generate(
                input_ids=input_ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=self.pad_id,
                eos_token_id=self.end_id,
                stopping_criteria=[_StopTexts(self.tokenizer, stop, length)] if stop else None,
            )
            for index, ids in zip(batch, output[:, length:].tolist(), strict=True):
                answers[index] = ids[: ids.index(self.end_id)] if self.end_id in ids else ids
        return answers

    @torch.inference_mode()
    def perplexity(self, sequences: PackedSequences) -> float:
        """``exp`` of the mean next-token cross-entropy over packed sequences."""
        count = len(sequences)
        total, tokens = 0.0, 0
        per_batch = max(1, BATCH_TOKENS // sequences.sequence_length)
        for start in range(0, count, per_batch):
            rows = [sequences[i]["input_ids"] for i in range(start, min(start + per_batch, count))]
            ids = torch.stack(rows).to(self.model.device)
            logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            total += float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
            tokens += ids[:, 1:].numel()
        return math.exp(total / tokens)


class _StopTexts(StoppingCriteria):
    """Ends every row of a batch whose new text holds one of ``stop``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], start: int) -> None:
        self.tokenizer, self.stop, self.start = tokenizer, stop, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Per row, whether it is done."""
        del scores, kwargs
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        return torch.tensor([any(s in text for s in self.stop) for text in texts], device=input_ids.device)


def _length_batches(sequences: Sequence[tuple[int, ...]], indices: Sequence[int] | None = None) -> list[list]:
    """Cut length-sorted sequences (or the indices that go with them) into batches of BATCH_TOKENS."""
    batches: list[list] = []
    batch: list = []
    for position, ids in enumerate(sequences):
        if batch and (len(batch) + 1) * max(1, len(ids)) > BATCH_TOKENS:
            batches.append(batch)
            batch = []
        batch.append(ids if indices is None else indices[position])
    if batch:
        batches.append(batch)
    return batches


def evaluate_classification(
    scorer: Scorer, encoder: PromptEncoder, examples: Sequence[Example], labels: Sequence[str]
) -> Evaluation:
    """Accuracy by label log-likelihood."""
    label_ids = [encoder.answer(label) for label in labels]
    prompts = encoder.prompts(examples, max(map(len, label_ids)))
    scores = scorer.label_scores(prompts, label_ids)
    correct = [row.index(max(row)) == e.label for row, e in zip(scores, examples, strict=True)]
    return Evaluation.of("accuracy", correct)


@torch.inference_mode()
def evaluate_classifier(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int
) -> Evaluation:
    """Accuracy of an encoder's classifier; in the model's own dtype."""
    model = model.to(process_state().device).eval()
    sequences = SegmentSequences(examples, tokenizer, max_length)
    collate = DataCollatorWithPadding(tokenizer)
    order = sorted(range(len(sequences)), key=sequences.lengths.__getitem__)
    correct = [False] * len(sequences)
    for indices in _length_batches([tuple(sequences[i]["input_ids"]) for i in order], indices=order):
        batch = collate([sequences[i] for i in indices]).to(model.device)
        found = class_logits(model, batch).argmax(dim=-1) == batch["labels"]
        for index, is_correct in zip(indices, found.tolist(), strict=True):
            correct[index] = is_correct
    return Evaluation.of("accuracy", correct)


def evaluate_classification_by_generation(
    scorer: Scorer, encoder: PromptEncoder, examples: Sequence[Example], labels: Sequence[str]
) -> Evaluation:
    """Accuracy of greedy answers, and the share of answers that are no label."""
    longest = max(len(encoder.answer(label)) for label in labels)
    found = [label_in(text, labels) for text in greedy_answers(scorer, encoder, examples, longest)]
    correct = [label == example.label for label, example in zip(found, examples, strict=True)]
    return Evaluation.of("accuracy", correct, {"no_label": Score.of([label is None for label in found])})


def label_in(text: str, labels: Sequence[str]) -> int | None:
    """Index of the longest label that a text begins with, as whole words; None if it begins with none."""
    text = text.strip()
    found = None
    for index, label in enumerate(map(str.strip, labels)):
        begins = text.startswith(label) and not text[len(label) : len(label) + 1].isalnum()
        if begins and (found is None or len(label) > len(labels[found].strip())):
            found = index
    return found


def evaluate_generation(
    scorer: Scorer, encoder: PromptEncoder, examples: Sequence[Example], max_new_tokens: int
) -> Evaluation:
    """Exact match of greedy answers, surrounding white space ignored."""
    texts = greedy_answers(scorer, encoder, examples, max_new_tokens)
    return Evaluation.of(
        "exact_match",
        [text.strip() == e.answer.strip() for text, e in zip(texts, examples, strict=True)],
    )


def evaluate_summaries(
    scorer: Scorer, encoder: PromptEncoder, examples: Sequence[Example], max_new_tokens: int
) -> Evaluation:
    """ROUGE and BLEU of greedy answers."""
    texts = greedy_answers(scorer, encoder, examples, max_new_tokens)
    return judge_summaries(texts, [e.answer for e in examples])


def greedy_answers(
    scorer: Scorer, encoder: PromptEncoder, examples: Sequence[Example], max_new_tokens: int
) -> list[str]:
    """What a model writes behind every prompt."""
    answers = scorer.generate(encoder.prompts(examples, max_new_tokens), max_new_tokens)
    return [encoder.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
