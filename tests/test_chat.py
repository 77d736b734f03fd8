"""Chat templates: what they render to, what they may not do, and conversations."""

from __future__ import annotations

import json
import re
import time
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tiny_tokenizers import needs_real_files, real_file

from numbainfer.chat import Conversation, render
from numbainfer.errors import NumbaInferError
from numbainfer.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' -}}\n"
    "{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"},
    {"role": "user", "content": "Où?"},
]
DESCRIPTION = "a <b> & 'é'"
TOOL = {"type": "function", "function": {"name": "f", "description": DESCRIPTION, "parameters": {}}}


def with_template(source: str | None, **special: str) -> SimpleNamespace:
    return SimpleNamespace(chat_template=source, special_tokens=special)


def run(source: str, **variables: Any) -> str:
    return render(with_template(source), MESSAGES, **variables)


def test_chatml():
    conversation = Conversation("Be brief.")
    conversation.user("Hi")
    tokenizer = with_template(CHATML)
    opened = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert render(tokenizer, conversation.messages()) == opened + "<|im_start|>assistant\n"
    assert render(tokenizer, conversation.messages(), add_generation_prompt=False) == opened


def test_what_hugging_face_offers_templates():
    assert run("{{ tools is none }}{{ documents is none }}{{ nothing }}") == "TrueTrue"
    assert run("{{ tool | tojson }}", tool=DESCRIPTION) == "\"a <b> & 'é'\""
    assert run("{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"
    assert run("{{ strftime_now('%Y') }}") == datetime.now().strftime("%Y")
    assert run("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ loop.index }}{% endfor %}") == "123"
    assert run("{% generation %}kept{% endgeneration %}") == "kept"
    assert run("{{ messages[::-1][0].content }}{{ messages[1:] | length }}") == "Où?3"
    assert run("{{ 'a' ~ 1 ~ none ~ nothing }}{{ 'ab' * 2 }}{{ '%s-%03d' % ('x', 7) }}") == "a1Noneababx-007"
    assert run("{{ '{}:{:>4}'.format('a', 'b') }}{{ ['a', 'b'] | join(', ') }}") == "a:   ba, b"
    assert render(with_template("{{ bos_token }}!", bos_token="<s>"), MESSAGES) == "<s>!"


def test_loops_keep_their_variables():
    roles = "{% for role in messages | map(attribute='role') %}"
    source = roles + "{{ loop.length }}{{ loop.revindex }}{{ role }} {% endfor %}"
    assert run(source) == "44system 43user 42assistant 41user "
    tree = "{% for n in tree recursive %}{{ n.v }}{% if n.c %}({{ loop(n.c) }}){% endif %}{% endfor %}"
    assert run(tree, tree=[{"v": 1, "c": [{"v": 2}, {"v": 3}]}]) == "1(23)"


def test_without_a_template():
    with pytest.raises(NumbaInferError, match="--raw"):
        render(with_template(None), MESSAGES)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% if %}", "line 1"),
        ("{{ raise_exception('roles\n must alternate') }}", "roles must alternate"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ nothing.at.all }}", "nothing"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{% include 'x' %}", "loader"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "recursion"),
        ("x" * 200_000, "longer"),
    ],
)
def test_a_broken_template_gives_one_line(source, says):
    with pytest.raises(NumbaInferError, match=says) as raised:
        run(source)
    assert "\n" not in str(raised.value)


GROW = "{%% set ns = namespace(s=%s) %%}{%% for i in range(99) %%}{%% set ns.s = %s %%}{%% endfor %%}%s"
HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{% for i in range(1000000000) %}x{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set x %}{% for a in range(9999) %}{% for b in range(99999) %}ab{% endfor %}{% endfor %}{% endset %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ 10 ** (10 ** 10) }}",
    GROW % ("'a'", "ns.s ~ ns.s", ""),
    GROW % ("'a'", "ns.s + ns.s", ""),
    GROW % ("[1]", "[ns.s, ns.s]", "{{ ns.s }}"),
    GROW % ("[1]", "[ns.s, ns.s]", "{{ ns.s | tojson }}"),
    GROW % ("[1]", "[ns.s, ns.s]", "{{ '%s' | format(ns.s) }}"),
    GROW % ("[]", "ns.s + [('a' * 4000000)[1:]]", ""),
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ 'a'.ljust(1000000000) }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ ('a' * 1000000).replace('a', 'a' * 1000000) }}",
    "{{ ('a' * 1000000) | replace('a', 'a' * 1000000) }}",
    "{{ range(90000) | join('a' * 1000000) }}",
    "{{ ('\n' * 3000000) | indent(1000000) }}",
    "{{ ([range(90000)] * 90000) | map('list') | list | length }}",
    "{{ ([range(90000) | list] * 90000) | sum(start=[]) }}",
    "{{ lipsum(n=1000000) }}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_a_hostile_template_is_stopped(source):
    start = time.perf_counter()
    with pytest.raises(NumbaInferError) as raised:
        run(source)
    assert "\n" not in str(raised.value)
    assert time.perf_counter() - start < 30  # seconds; the bound inside is 5


def test_a_template_that_was_stopped_does_not_spoil_the_next_rendering():
    tokenizer = with_template("{% for i in range(n) %}{% for j in range(99999) %}{% endfor %}{% endfor %}ok")
    for n in (2, 99999, 2):
        if n == 2:
            assert render(tokenizer, MESSAGES, n=n) == "ok"
        else:
            with pytest.raises(NumbaInferError, match="more work"):
                render(tokenizer, MESSAGES, n=n)


def test_a_long_conversation_is_within_the_bounds():
    messages = [{"role": role, "content": "word " * 200} for _ in range(500) for role in ("user", "assistant")]
    assert len(render(with_template(CHATML), messages)) > 1_000_000


def test_conversation_turns():
    chat = Conversation()
    chat.user("a")
    chat.assistant("b")
    chat.user("c")
    assert [turn["content"] for turn in chat.messages()] == ["a", "b", "c"]
    with pytest.raises(NumbaInferError, match="user cannot follow user"):
        chat.user("d")
    assert chat.undo() == "c"
    assert chat.undo() == "a"
    assert chat.undo() is None
    assert chat.messages() == []
    with pytest.raises(NumbaInferError, match="start"):
        chat.assistant("first")
    chat.system = "S"
    chat.user("e")
    chat.clear()
    assert len(chat) == 0
    assert chat.messages() == [{"role": "system", "content": "S"}]


def hugging_face(source: str, **variables: object) -> str:
    """The environment that transformers documents for chat templates, without our bounds."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(source).render(variables)


@needs_real_files
@pytest.mark.parametrize("name", ["llama3", "llama3_1", "llama3_2", "qwen2_5", "qwen3"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tools": [TOOL]},
        {"enable_thinking": False},
        {"custom_tools": [TOOL], "tools_in_user_message": False},
    ],
    ids=["plain", "tools", "no-thinking", "custom-tools"],
)
def test_real_templates(name, options):
    tokenizer = Tokenizer.from_directory(real_file(f"tokenizers/{name}"))
    assert tokenizer.chat_template is not None
    for messages in (MESSAGES, MESSAGES[1:], MESSAGES[:2]):
        for opens in (True, False):
            text = render(tokenizer, messages, add_generation_prompt=opens, **options)
            variables = {"tools": None, "documents": None, **tokenizer.special_tokens, **options}
            variables |= {"messages": messages, "add_generation_prompt": opens}
            assert text == hugging_face(tokenizer.chat_template, **variables)
            ids = tokenizer.encode(text)
            if tokenizer.bos_id is not None:
                assert ids.count(tokenizer.bos_id) == 1
                assert ids[0] == tokenizer.bos_id


@needs_real_files
def test_real_prompts_by_hand():
    llama = Tokenizer.from_directory(real_file("tokenizers/llama3_2"))
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": " Hi "}]
    expected = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: DAY\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert re.sub(r"\d\d \w{3} \d{4}", "DAY", render(llama, turns)) == expected
    qwen = Tokenizer.from_directory(real_file("tokenizers/qwen3"))
    opened = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n"
    assert render(qwen, turns) == opened
    assert render(qwen, turns, enable_thinking=False) == opened + "<think>\n\n</think>\n\n"
