"""Text in and out: chats against transformers, streamed characters, and templates that misbehave."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bitdistill.engine.text import TextCodec
from bitdistill.errors import EngineError

CHATML = (
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'system' and not loop.first %}{{ raise_exception('system first') }}{% endif %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if tools %}{{ tools | tojson }}{% endif %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}{{ eos_token }}"
)
LOOPS = (
    "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{% generation %}{{ m.content }}"
    "{% endgeneration %}|{% set ns = namespace(n=loop.index) %}{{ ns.n }}{% endfor %}"
)
CHATS = [
    [{"role": "user", "content": " what was the soup? "}],
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "é <b> 'x'"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "and the room?"},
    ],
]


@pytest.fixture
def save(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[[str | None], Path]:
    """The tokenizer in a folder, with a chat template."""

    def save(template: str | None) -> Path:
        tokenizer.save_pretrained(tmp_path)
        if template is not None:
            (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
        return tmp_path

    return save


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", [CHATML, LOOPS])
@pytest.mark.parametrize("prompt", [True, False])
def test_chats_are_rendered_as_transformers_does(
    save: Callable[..., Path], chat: list, template: str, prompt: bool
) -> None:
    folder = save(template)
    theirs = AutoTokenizer.from_pretrained(folder)
    values = {"tools": [{"name": "é&<"}]} if template is CHATML else {}
    expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt, **values)
    ours = TextCodec(folder)
    assert ours.render(chat, add_generation_prompt=prompt, **values) == expected
    assert (
        ours.chat(chat, add_generation_prompt=prompt, **values)
        == theirs(expected, add_special_tokens=False)["input_ids"]
    )


def test_a_template_inside_the_settings_is_found(save: Callable[..., Path]) -> None:
    folder = save(None)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for template in (
        "A{{ messages[0].content }}",
        [{"name": "default", "template": "A{{ messages[0].content }}"}],
    ):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
        assert TextCodec(folder).render([{"role": "user", "content": "b"}]) == "Ab"


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, CHATS[0], "no chat template"),
        (CHATML, [], "no messages"),
        (CHATML, [{"content": "x"}], "has no role"),
        (CHATML, ["x"], "has no role"),
        (CHATML, [*CHATS[0], {"role": "system", "content": "x"}], "refuses this chat: system first"),
        ("{% if %}", CHATS[0], "refuses this chat"),
        ("{{ messages.append(1) }}", CHATS[0], "refuses this chat"),
        ("{{ ''.__class__.__mro__ }}", CHATS[0], "refuses this chat"),
        ("{{ 1 / 'a' }}", CHATS[0], "fails on this chat"),
    ],
)
def test_chats_and_templates_that_are_refused(
    save: Callable[..., Path], template: str | None, messages: list, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        TextCodec(save(template)).render(messages)


@given(text=st.text(max_size=30))
def test_streamed_text_is_the_text_and_no_piece_breaks_a_character(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    """The byte-level tokenizer makes several tokens of most characters."""
    folder = tmp_path_factory.getbasetemp() / "stream"
    if not folder.exists():
        tokenizer.save_pretrained(folder)
    codec = TextCodec(folder)
    ids = codec.encode(text)
    pieces = list(codec.stream(ids))
    assert "".join(pieces) == codec.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
