"""The lm-eval harness (EleutherAI) on our models: ``bitdistill`` in torch, ``bitdistill-engine`` on the CPU.

    bitdistill lm-eval MODEL --tasks arc_easy,lambada_openai
    python -m bitdistill.harness --model bitdistill --model_args pretrained=MODEL --tasks arc_easy

The second is lm-eval's own command line after both models have been registered, which importing this module does.
Requests are tokenised and cut as lm-eval's own Hugging Face model does, so that its published numbers compare. The
engine's model needs no torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table

from .engine import Engine, EngineScorer
from .engine.engine import CacheChoice
from .errors import ConfigError, DataError
from .packed import is_packed

DEFAULT_NEW_TOKENS = 256
"""Longest answer where a task does not say: lm-eval's own default."""

Request = tuple[list[int], list[int]]


class JudgingScorer(Protocol):
    """What the harness needs of a model."""

    def scored(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """``log p(continuation | context)``, and whether greedy decoding would write the continuation."""
        ...

    def log_likelihoods(self, requests: Sequence[Request]) -> list[float]:
        """The first of the two."""
        ...

    def generate(
        self, prompts: Sequence[list[int]], max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[list[int]]:
        """Greedy answers; they may go on behind a stop text."""
        ...


class ScorerLM(TemplateLM):
    """The three kinds of requests for any scorer. Subclasses say how text becomes tokens."""

    scorer: JudgingScorer
    max_length: int
    """Tokens of the model's context."""

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        raise NotImplementedError

    @property
    def begin_token(self) -> str | None:
        """Text of the begin-of-text token."""
        raise NotImplementedError

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Ids of a text."""
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens left out."""
        raise NotImplementedError

    @property
    def prefix_token_id(self) -> int:
        """What a text without context follows: the begin-of-text token, or else the end-of-text token."""
        begin = self.begin_token
        return self.eot_token_id if begin is None else self.encode(begin, special=False)[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids; the tokenizer's own special tokens are added unless the text brings its begin-of-text token."""
        del kwargs
        if add_special_tokens is None:
            begin = self.begin_token
            add_special_tokens = not (begin and string.startswith(begin))
        return self.encode(string, special=add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del kwargs
        return self.scorer.scored([self._fitted(*request) for request in requests])

    def _fitted(self, texts: tuple[str, str], context: list[int], continuation: list[int]) -> Request:
        """The request without the beginning that the model's context has no room for."""
        if not continuation:
            raise DataError(f"the continuation of {texts!r} has no tokens of its own; check the task")
        if len(continuation) > self.max_length:
            raise DataError(
                f"a continuation of {len(continuation)} tokens does not fit the model's context of "
                f"{self.max_length}; check the task"
            )
        room = self.max_length + 1 - len(continuation)  # the last token is predicted, not read
        return context[-room:], continuation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's context."""
        del disable_tqdm
        windows, owners = [], []
        for index, request in enumerate(requests):
            tokens = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(make_disjoint_window, tokens):
                windows.append(window)
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, score in zip(owners, self.scorer.log_likelihoods(windows), strict=True):
            totals[index] += score
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, up to the first of the request's stop texts."""
        del disable_tqdm
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, request in enumerate(requests):
            options = normalize_gen_kwargs(request.args[1], DEFAULT_NEW_TOKENS)
            if options["do_sample"]:
                raise ConfigError(
                    f"generation options {request.args[1]!r} ask for sampling; answers here are greedy: "
                    "set do_sample: false in the task"
                )
            until = tuple(filter(None, handle_stop_sequences(options.get("until"), eos=None)))
            groups.setdefault((options["max_gen_toks"], until), []).append(index)
        answers = [""] * len(requests)
        for (new_tokens, until), indices in groups.items():
            room = self.max_length - new_tokens
            if room < 1:
                raise ConfigError(
                    f"{new_tokens} new tokens leave no room for a prompt in the model's context of "
                    f"{self.max_length}; set max_gen_toks in the task's generation_kwargs"
                )
            contexts = [self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in indices]
            found = self.scorer.generate([ids[-room:] for ids in contexts], new_tokens, until)
            for index, ids in zip(indices, found, strict=True):
                text = self.decode(ids)
                for stop in until:
                    text = text.split(stop)[0]
                answers[index] = text
        return answers


@register_model("bitdistill")
class TorchLM(ScorerLM):
    """A student or any other causal LM in torch."""

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        max_length: int | None = None,
        query_bits: int | None = None,
        kv_bits: int | None = None,
        **others: Any,
    ) -> None:
        """Load a checkpoint folder or hub model.

        Args:
            pretrained: folder or hub id.
            revision: hub revision.
            max_length: tokens of context to use; the model's own if not given.
            query_bits: of the queries, and ``kv_bits`` of the keys and values; the model's own if not given.
            others: what lm-eval's command line always gives (batch_size, device); batches are by tokens here and
                the device is the process's.
        """
        del others
        from .evaluate import StateBits, TorchScorer
        from .train.loading import load_model, load_tokenizer

        super().__init__()
        self.tokenizer = load_tokenizer(pretrained, revision)
        model = StateBits(query_bits, kv_bits).apply(load_model(pretrained, revision))
        self.scorer = TorchScorer(model, self.tokenizer)
        self.max_length = max_length or int(model.config.max_position_embeddings)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def begin_token(self) -> str | None:
        return self.tokenizer.bos_token

    def encode(self, text: str, *, special: bool) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=special, verbose=False))

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )


@register_model("bitdistill-engine")
class EngineLM(ScorerLM):
    """An exported model in the CPU engine."""

    def __init__(
        self,
        pretrained: str,
        threads: int | None = None,
        kv_cache: CacheChoice = "auto",
        max_length: int | None = None,
        **others: Any,
    ) -> None:
        """Load a folder that ``bitdistill export`` wrote; arguments as of ``Engine`` and ``TorchLM``.

        Raises:
            ConfigError: ``query_bits`` or ``kv_bits`` is given, which an exported model has for itself.
        """
        if others.get("query_bits") or others.get("kv_bits"):
            raise ConfigError("query_bits and kv_bits are of torch; give them with a checkpoint")
        super().__init__()
        self.engine = Engine(pretrained, threads=threads, kv_cache=kv_cache)
        self.scorer = EngineScorer(self.engine)
        self.max_length = min(max_length or self.engine.max_context, self.engine.max_context)

    @property
    def eot_token_id(self) -> int:
        end = self.engine.text.special_tokens().get("eos_token")
        found = self.engine.text.token_id(end) if end else None
        found = next(iter(self.engine.stop_tokens), None) if found is None else found
        if found is None:
            raise ConfigError(
                f"{self.engine.path}: the model names no end-of-text token, which lm-eval puts before a text "
                "without context; set eos_token in tokenizer_config.json"
            )
        return found

    @property
    def begin_token(self) -> str | None:
        return self.engine.text.special_tokens().get("bos_token")

    def encode(self, text: str, *, special: bool) -> list[int]:
        return self.engine.text.encode(text, special=special)

    def decode(self, ids: list[int]) -> str:
        return self.engine.text.decode(ids)

    @property
    def tokenizer_name(self) -> str:
        return str(self.engine.path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.engine.text.render(chat_history, add_generation_prompt=add_generation_prompt)


def run(
    source: str,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    kv_cache: CacheChoice = "auto",
    query_bits: int | None = None,
    kv_bits: int | None = None,
    chat: bool = False,
) -> tuple[dict[str, Any], str]:
    """Judge a checkpoint, or an exported model in the engine, on tasks of lm-eval: its results, and its table.

    Raises:
        ConfigError: a task is unknown.
        CheckpointError: the model is missing or damaged.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include_path) if include_path else None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"--tasks {', '.join(unknown)}: lm-eval has no such task; --include-path adds a folder"
        )
    packed = is_packed(Path(source))
    if kv_cache != "auto" and not packed:
        raise ConfigError("--kv-cache is of the engine; give it with an exported model")
    if packed and (query_bits or kv_bits):
        raise ConfigError("--query-bits and --kv-bits are of torch; give them with a checkpoint")
    if packed:
        model: ScorerLM = EngineLM(source, kv_cache=kv_cache)
    else:
        model = TorchLM(source, query_bits=query_bits, kv_bits=kv_bits)
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=chat,
        task_manager=manager,
        log_samples=False,
    )
    return {"source": source, "results": results["results"], "versions": results["versions"]}, make_table(
        results
    )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
