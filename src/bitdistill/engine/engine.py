"""``Engine``: a packed model on this CPU. Load, generate, stream, score."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from ..errors import EngineError
from .answer import Answer, Generation, Sampling, until_stop
from .batch import Batch
from .facts import packed_facts
from .loading import CacheForm, PackedModel
from .text import Message, TextCodec

Prompt = str | Sequence[int] | Sequence[Message]

CacheChoice = CacheForm | Literal["auto"]
CACHE_FORMS: tuple[CacheChoice, ...] = ("auto", "fp16", "int8", "int4", "int3", "fp32")


class Engine:
    """A packed model in memory and the threads that run it.

    One engine serves many Python threads (its calls run one at a time, with the GIL released), and many engines live
    in one process. Nothing here imports torch.
    """

    def __init__(
        self,
        path: str | Path,
        threads: int | None = None,
        kv_cache: CacheChoice = "auto",
        mmap: bool = False,
        screening: bool = False,
    ) -> None:
        """Load an exported model.

        Args:
            path: folder that ``bitdistill export`` wrote.
            threads: worker threads; None for one on each CPU that this process may use.
            kv_cache: how keys and values of attention are kept. ``auto`` is the form that the model was trained for,
                fp16 where it names none. ``int8`` (a scale for each key and each value of a head) takes half of fp16's
                memory, ``int4`` and ``int3`` (position 0 of a text at eight bits) a quarter and less; they cost
                accuracy on a model that was not trained for them. With ``fp32``, and a head in bf16 or f32, results
                differ from torch's by rounding alone.
            mmap: share the file's pages among processes instead of copying; the file must not change meanwhile.
            screening: greedy decoding reads an int8 copy of a bf16 or f32 head, half its size, and scores in full
                only the rows that a proven bound cannot rule out: the same tokens, faster. Batches read the whole head.

        Raises:
            CheckpointError: missing, damaged, or not for this version.
            EngineError: an impossible number of threads, another form of the cache, a head that cannot be screened,
                or a CPU without the kernels.
        """
        if kv_cache not in CACHE_FORMS:
            raise EngineError(f"kv_cache = {kv_cache!r}: use one of {', '.join(CACHE_FORMS)}")
        if threads is not None and (type(threads) is not int or not 1 <= threads <= 1024):
            raise EngineError(f"threads = {threads!r}: use 1 to 1024, or None for every CPU")
        started = time.perf_counter()
        packed = PackedModel.open(path)
        self.path = Path(path)
        self.kv_cache: CacheForm = packed.kv_form if kv_cache == "auto" else kv_cache
        self.text = TextCodec(self.path)
        self.stop_tokens = packed.stop_tokens()
        self.core = packed.load(threads=threads or 0, mmap=mmap, screened=screening)
        self.label_head: tuple[list[int], _core.LabelHead] | None = None
        self.load_s = time.perf_counter() - started
        self.vocab_size = int(packed.config["vocab_size"])
        self.max_context = int(packed.config["max_position_embeddings"])

    @property
    def info(self) -> dict[str, Any]:
        """What is loaded, where it runs, what it takes."""
        return packed_facts(self.path) | {
            "path": str(self.path),
            "isa": self.core.isa,
            "threads": self.core.threads,
            "kv_cache": self.kv_cache,
            "max_context": self.max_context,
            "memory": self.core.memory() | _core.memory_usage(),
            "decode_bytes": self.core.decode_bytes(kv=self.kv_cache),
            "load_s": self.load_s,
        }

    # --- text ---

    def generate(self, prompt: Prompt, **options: Any) -> Generation:
        """Continue a prompt; options as in ``stream``.

        Raises:
            EngineError: an empty prompt, more than fits the context, impossible sampling values.
        """
        return Conversation(self).generate(prompt, **options)

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """The text of ``generate`` piece by piece.

        Args:
            prompt: text, token ids, or messages ``[{"role": ..., "content": ...}]`` for the model's chat template.
            max_new_tokens: most tokens to write.
            temperature: 0 is greedy.
            top_k: only the k likeliest tokens (0: all); cuts before top_p.
            top_p: the fewest likeliest tokens that hold this share of the probability.
            seed: of the random numbers; the same seed gives the same text.
            stop: texts that end the answer; they are not part of it.

        Raises: as ``generate``, at the call.
        """
        return Conversation(self).stream(prompt, **options)

    def generate_batch(self, prompts: Sequence[Prompt], **options: Any) -> list[Generation]:
        """``generate`` for several prompts at once, faster than one after the other; options as in ``stream``.

        Each answer is the one that ``generate`` gives with the same options, to the last bit of its logits. Every
        sequence has its own cache.

        Raises: as ``generate``, before anything is read.
        """
        sampling = _sampling(options)
        ids = [self.prompt_of(prompt) for prompt in prompts]
        if not ids:
            return []
        sessions = [self.session() for _ in ids]
        return Batch(sessions, ids, sampling, self.text, self.stop_tokens).generate()

    def prompt_of(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt that leaves room for an answer.

        Raises:
            EngineError: it has no tokens, is of no known kind, or fills the context.
        """
        ids = self.tokens_of(prompt)
        if len(ids) >= self.max_context:
            raise EngineError(
                f"a prompt of {len(ids)} tokens leaves no room in the context of {self.max_context}; shorten it"
            )
        return ids

    def tokens_of(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt of any kind.

        Raises:
            EngineError: it has no tokens, or is of no known kind.
        """
        if isinstance(prompt, str):
            ids = self.text.encode(prompt)
        elif isinstance(prompt, np.ndarray) or all(isinstance(p, int | np.integer) for p in prompt):
            ids = [int(p) for p in prompt]  # type: ignore[arg-type]
        else:
            ids = self.text.chat(prompt)  # type: ignore[arg-type]
        if not ids:
            raise EngineError("the prompt is empty: a model needs at least one token to go on")
        return self.checked(ids)

    # --- numbers ---

    def logits(self, tokens: ArrayLike) -> NDArray[np.float32]:
        """Logits ``[T, V]`` after each of ``tokens``."""
        ids = np.asarray(tokens)
        if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise EngineError(
                f"tokens of shape {list(ids.shape)} and type {ids.dtype}: expected a list of ids"
            )
        self.checked(ids)
        return self.session().forward(ids.astype(np.int32), all_positions=True)

    def score(self, prompt: Prompt, continuations: Sequence[str | Sequence[int]]) -> list[float]:
        """``log p(continuation | prompt)`` of each continuation: the sum over its tokens, with no length normalisation.

        A continuation is tokenised apart from the prompt, so its tokens are the same whatever precedes them.
        """
        context = self.tokens_of(prompt)
        rows = [self.text.encode(c, special=False) if isinstance(c, str) else list(c) for c in continuations]
        return [float(s) for s in self.log_likelihoods(context, rows)]

    def classify(self, prompt: Prompt, labels: Sequence[str]) -> str:
        """The label with the highest score after the prompt; the first one on a tie."""
        return self.classify_batch([prompt], labels)[0]

    def classify_batch(self, prompts: Sequence[Prompt], labels: Sequence[str]) -> list[str]:
        """``classify`` for several prompts at once; short ones share passes over the weights."""
        if not labels:
            raise EngineError("no labels to choose from")
        ids = [self.text.encode(label, special=False) for label in labels]
        scores = self.label_scores([self.tokens_of(prompt) for prompt in prompts], ids)
        return [labels[row.index(max(row))] for row in scores]

    def label_scores(
        self, prompts: Sequence[list[int]], labels: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Of each prompt, a score of each label by which labels compare.

        Labels of one token each: their logits, for which only the labels' rows of the head and one layer's keys and
        values are needed (``_core.LabelHead``). Otherwise log-likelihoods, as ``score`` has them.
        """
        if any(len(label) != 1 for label in labels):
            return [self.log_likelihoods(prompt, [list(label) for label in labels]) for prompt in prompts]
        ids = [label[0] for label in labels]
        self.checked(ids)
        texts = [np.array(self.checked(prompt), np.int32) for prompt in prompts]
        held = self.label_head  # another thread may bring other labels meanwhile
        if held is None or held[0] != ids:
            held = self.label_head = ids, _core.LabelHead(self.core, ids, kv=self.kv_cache)
        found: list[list[float]] = held[1].logits(texts).tolist()
        return found

    def log_likelihoods(self, context: list[int], continuations: Sequence[list[int]]) -> list[float]:
        """``score`` on ids; the context is read once."""
        return [score for score, _ in self.scored(context, continuations, greedy=False)]

    def scored(
        self, context: list[int], continuations: Sequence[list[int]], *, greedy: bool = True
    ) -> list[tuple[float, bool]]:
        """``log_likelihoods``; with ``greedy`` also whether greedy decoding would write the continuation."""
        for ids in continuations:
            if not ids:
                raise EngineError("an empty continuation has no probability; give it at least one token")
            self.checked([*context, *ids[:-1]])
            self.checked(ids)
        session = self.session()
        after = session.forward(np.array(context, np.int32)).astype(np.float64)
        finite = after[np.isfinite(after)]
        total = finite.max() + math.log(np.exp(finite - finite.max()).sum())
        scores = []
        for ids in continuations:
            score = float(after[ids[0]] - total)
            if len(ids) > 1:
                session.truncate(len(context))
                score += float(session.score(np.array(ids, np.int32), 1).astype(np.float64).sum())
            is_greedy = greedy and ids[0] == after.argmax()
            if is_greedy and len(ids) > 1:
                session.truncate(len(context))
                is_greedy = _follows_greedily(session, np.array(ids, np.int32))
            scores.append((score, bool(is_greedy)))
        return scores

    def session(self) -> _core.Session:
        """A fresh sequence of the core."""
        return _core.Session(self.core, kv=self.kv_cache)

    def checked(self, ids: Any) -> Any:
        """``ids``, if the model can read them.

        Raises:
            EngineError: one is outside the vocabulary, or they exceed the context.
        """
        if len(ids) > self.max_context:
            raise EngineError(
                f"{len(ids)} tokens exceed the model's context of {self.max_context}; shorten the prompt"
            )
        low, high = min(ids, default=0), max(ids, default=0)
        if low < 0 or high >= self.vocab_size:
            raise EngineError(
                f"token {low if low < 0 else high} is outside the vocabulary of {self.vocab_size}; "
                "was the text tokenised for another model?"
            )
        return ids


def _follows_greedily(session: _core.Session, ids: NDArray[np.int32]) -> bool:
    """Whether every id after the first is the likeliest one; pieces keep the ``[len, V]`` logits small."""
    read, wanted = ids[:-1], ids[1:]
    for start in range(0, len(read), 32):
        piece = slice(start, start + 32)
        if (session.forward(read[piece], all_positions=True).argmax(axis=1) != wanted[piece]).any():
            return False
    return True


class Conversation:
    """A text that goes on: what two prompts share at their beginning is read once."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.session = engine.session()
        self.held: list[int] = []
        """Tokens in the session's cache."""
        self.last: Generation | None = None
        """The latest answer, complete or broken off."""

    def generate(self, prompt: Prompt, **options: Any) -> Generation:
        """See ``Engine.generate``."""
        for _ in self.stream(prompt, **options):
            pass
        assert self.last is not None
        return self.last

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """See ``Engine.stream``."""
        sampling = _sampling(options)
        started = time.perf_counter()
        ids = self.engine.prompt_of(prompt)
        self._read(ids)
        return self._write(Answer(len(ids), started, time.perf_counter()), sampling)

    def _read(self, ids: list[int]) -> None:
        shared = 0
        for ours, theirs in zip(self.held, ids[:-1], strict=False):  # at least one token is left to read
            if ours != theirs:
                break
            shared += 1
        self.session.truncate(shared)
        self.held = self.held[:shared]
        self.session.forward(np.array(ids[shared:], np.int32))
        self.held = list(ids)

    def _write(self, answer: Answer, sampling: Sampling) -> Iterator[str]:
        tokens: list[int] = []
        sampler = sampling.sampler()

        def arriving() -> Iterator[int]:
            while len(tokens) < sampling.max_new_tokens:
                found, reason = self.session.decode(sampler, 1, self.engine.stop_tokens)
                tokens.extend(found)
                self.held.extend(found)
                yield from found
                if reason != "length":
                    answer.reason = reason
                    return

        try:
            for piece in until_stop(self.engine.text.stream(arriving()), sampling.stops, answer):
                answer.text += piece
                yield piece
        finally:
            self.last = answer.finished(tokens)


def _sampling(options: dict[str, Any]) -> Sampling:
    known = [field.name for field in fields(Sampling)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"{unknown[0]!r} is no option of generation; there are {', '.join(known)}")
    return Sampling(**options)
