"""Text <-> tokens, by the tokenizers library and the model's own files; chats by their jinja2 template."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, EngineError
from ..packed import read_json_object

Message = Mapping[str, Any]

_REPLACEMENT = "�"
"""What a decoder writes for bytes that are not (yet) a character."""


class TextCodec:
    """The tokenizer of a model folder."""

    def __init__(self, folder: Path) -> None:
        """Read ``tokenizer.json``, ``tokenizer_config.json`` and the chat template.

        Raises:
            CheckpointError: there is no tokenizer.json, or a file is damaged.
        """
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{folder}: no tokenizer.json there; copy the model's tokenizer into the folder"
            )
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for a damaged file
            raise CheckpointError(
                f"{path}: the tokenizer does not load ({error}); fetch the model again"
            ) from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        settings = folder / "tokenizer_config.json"
        self.settings = read_json_object(settings) if settings.is_file() else {}
        self._template = _find_template(folder, self.settings)
        self._render: Callable[..., str] | None = None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids; ``special`` adds what the tokenizer puts around a text (a begin-of-text token)."""
        return list(self.tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text; special tokens are left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Pieces of text as tokens arrive; together they are the text. A character comes whole or not at all."""
        ids: list[int] = []
        start = known = 0  # ids[start:known] is the context that text was last taken up to
        for token in tokens:
            ids.append(token)
            before, now = self.decode(ids[start:known]), self.decode(ids[start:])
            if len(now) > len(before) and not now.endswith(_REPLACEMENT):
                yield now[len(before) :]
                start, known = known, len(ids)
        if known < len(ids):
            rest = self.decode(ids[start:])[len(self.decode(ids[start:known])) :]
            if rest:
                yield rest

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **values: Any
    ) -> list[int]:
        """Ids of a chat, rendered by the model's template; ``values`` reach the template by name.

        Raises:
            EngineError: there is no template, a message has no role, or the template refuses the chat.
        """
        return self.encode(
            self.render(messages, add_generation_prompt=add_generation_prompt, **values), special=False
        )

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **values: Any
    ) -> str:
        """The text of a chat. Raises as ``chat``."""
        if self._template is None:
            raise EngineError(
                "this model has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
                "give a plain prompt"
            )
        if not messages:
            raise EngineError(
                "no messages: a chat needs at least one, such as {'role': 'user', 'content': '...'}"
            )
        for message in messages:
            if not isinstance(message, Mapping) or "role" not in message:
                raise EngineError(
                    f"message {message!r} has no role; expected {{'role': ..., 'content': ...}}"
                )
        import jinja2

        try:
            if self._render is None:
                self._render = _compile(self._template)
            return self._render(
                messages=[dict(m) for m in messages],
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens(),
                **values,
            )
        except jinja2.TemplateError as error:
            raise EngineError(f"the model's chat template refuses this chat: {error}") from error
        except (
            TypeError,
            ValueError,
            KeyError,
            OverflowError,
        ) as error:  # a template runs on what it was given
            raise EngineError(f"the model's chat template fails on this chat: {error}") from error

    def special_tokens(self) -> dict[str, str]:
        """Text of the special tokens by role, such as ``eos_token``."""
        found = {}
        for key, value in self.settings.items():
            if key.endswith("_token") and value is not None:
                content = value.get("content") if isinstance(value, dict) else value
                if isinstance(content, str):
                    found[key] = content
        return found

    def token_id(self, token: str) -> int | None:
        """Id of a token by its text."""
        found = self.tokenizer.token_to_id(token)
        return None if found is None else int(found)


def _find_template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot read it ({error}); fetch the model again") from error
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _compile(template: str) -> Callable[..., str]:
    """The template as transformers runs it. It comes with the model, so it runs in jinja2's sandbox."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """``{% generation %}``: marks assistant text for training; here it is just its body."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        # jinja2's own escapes for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template).render
