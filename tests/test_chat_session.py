"""Chats: what the model is given from turn to turn, the slash commands, reasoning."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from command import ENDLESS, GREEDY, Result, numbainfer, succeed, write_chat_model
from tiny_tokenizers import byte_level

from numbainfer.chat import Conversation, render
from numbainfer.chat_session import Session
from numbainfer.errors import NumbaInferError
from numbainfer.generation import Generation
from numbainfer.reasoning import ReasoningSplitter
from numbainfer.sampling import SamplingParams
from numbainfer.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)


class Scripted:
    """An engine that says what it is told to, token for token."""

    def __init__(self, ctx_size: int) -> None:
        files = {"tokenizer.json": byte_level("qwen2").to_str().encode()}
        files["tokenizer_config.json"] = json.dumps({"chat_template": TEMPLATE}).encode()
        self.tokenizer = Tokenizer.from_files(files)
        self.ctx_size = ctx_size
        self.next: list[int] = []

    def generate(self, prompt: list[int], params: SamplingParams, *, continues: bool) -> tuple[Generation, Any]:
        assert not continues
        text = self.tokenizer.decode(self.next)
        generation = Generation(prompt, list(self.next), text, "stop")
        return generation, iter([text])


def scripted(ctx_size: int = 1000, **options: Any) -> tuple[Session, Scripted]:
    engine = Scripted(ctx_size)
    loaded: Any = SimpleNamespace(engine=engine, params=SamplingParams)
    usual = {"raw": False, "system": None, "max_tokens": 50, "stop": (), "sampling": {}}
    return Session(loaded, **{**usual, **options}), engine


def turn(session: Session, engine: Scripted, text: str, reply: list[int]) -> list[int]:
    """One turn; the tokens that the model was given."""
    engine.next = reply
    tokens = session.prompt_tokens(text)
    session.conversation.assistant(session.stream(tokens, echo=False).text)
    return tokens


def test_what_was_generated_stays_as_the_tokens_that_it_was() -> None:
    """A model may say "there" letter by letter, which no tokenizer would."""
    session, engine = scripted(system="S")
    tokenizer = engine.tokenizer
    letters = [token for c in "there" for token in tokenizer.encode(c)]
    assert tokenizer.encode("there") != letters
    first = turn(session, engine, "a", letters)
    second = turn(session, engine, "b", letters)
    assert second[: len(first) + 5] == first + letters
    assert tokenizer.decode(second, skip_special=False) == render(tokenizer, session.conversation.messages()[:-1])
    third = session.prompt_tokens("c")
    assert third[: len(second) + 5] == second + letters
    # another past, or a reply that is not as it was: all from the text
    session.conversation.undo()
    session.conversation.system = "T"
    changed = session.prompt_tokens("c")
    assert changed == tokenizer.encode(render(tokenizer, session.conversation.messages()))


def test_replies_that_end_inside_a_character_or_a_stop_text() -> None:
    session, engine = scripted()
    tokenizer = engine.tokenizer
    half = tokenizer.encode("€")[:1]  # the first of three bytes
    assert tokenizer.decode(half) == "\ufffd"
    first = turn(session, engine, "a", half)
    assert session.prompt_tokens("b")[: len(first) + 1] == first + half
    session, engine = scripted()
    engine.next = tokenizer.encode("there")
    tokens = session.prompt_tokens("a")
    engine.generate = lambda prompt, params, **_: (Generation(prompt, engine.next, "the", "stop"), iter(()))  # type: ignore[assignment]
    session.conversation.assistant(session.stream(tokens, echo=False).text)
    text = render(tokenizer, [*session.conversation.messages(), {"role": "user", "content": "b"}])
    assert session.prompt_tokens("b") == tokenizer.encode(text)


def test_the_oldest_turns_are_dropped_when_the_context_is_full() -> None:
    session, engine = scripted(ctx_size=240, system="Be kind.")
    reply = engine.tokenizer.encode("word " * 6)
    sizes, dropped = [], []
    for number in range(30):
        sizes.append(len(turn(session, engine, f"question {number}", reply)))
        dropped.append(session.dropped)
        assert session.conversation.messages()[0] == {"role": "system", "content": "Be kind."}
        assert session.conversation.messages()[-2]["content"] == f"question {number}"
    assert max(sizes) <= 240 - 50  # room for the reply
    assert dropped[-1] > 10
    changes = sum(a != b for a, b in itertools.pairwise(dropped))
    assert changes <= 15  # two turns at a time, so that every second one goes on where the last one ended
    # one message that is too long alone: nothing to drop, and the engine says so
    session.conversation.clear()
    assert len(session.prompt_tokens("long " * 300)) > 240
    assert len(session.conversation) == 1


def test_variables_for_the_template() -> None:
    session, engine = scripted(template={"enable_thinking": False})
    assert engine.tokenizer.decode(session.prompt_tokens("a"), skip_special=False).endswith("<think></think>")


def test_taking_over_a_conversation() -> None:
    chat = Conversation("old")
    chat.user("a")
    good = [{"role": r, "content": r} for r in ("system", "user", "assistant", "user", "assistant")]
    chat.replace(good)
    assert chat.messages() == good
    chat.replace(good[1:3])
    assert chat.system is None
    before = chat.messages()
    for bad in (
        good[2:],  # begins with the assistant
        [good[1], good[1]],
        [good[1], good[0]],
        [good[0], good[0]],
        [{"role": "user"}],
        [{"role": "user", "content": 5}],
        [{"role": "tool", "content": "x"}],
        ["text"],
    ):
        with pytest.raises(NumbaInferError):
            chat.replace(bad)  # type: ignore[arg-type]
        assert chat.messages() == before
    chat.user("more")
    assert chat.drop_oldest()
    assert [m["content"] for m in chat.messages()] == ["more"]
    assert not chat.drop_oldest()


@pytest.mark.parametrize(
    ("prompt", "text", "reasoning"),
    [
        ("", "<think>hm</think>yes", "<think>hm</think>"),
        ("", "\n<think>\nhm\n</think>\n\nyes", "\n<think>\nhm\n</think>"),
        ("...<think>\n", "hm</think>yes", "hm</think>"),
        ("...<think>\n", "hm < </thinking", "hm < </thinking"),
        ("", "<think>never ends </thin", "<think>never ends </thin"),
        ("", "<thin", ""),
        ("", "yes <think>no</think>", ""),
        ("", "<think></think><think>a</think>", "<think></think>"),
        ("", "", ""),
        ("", "<b>", ""),
    ],
)
def test_reasoning(prompt: str, text: str, reasoning: str) -> None:
    """However the text is cut into pieces."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        splitter = ReasoningSplitter(prompt)
        cuts = [0, *sorted(rng.integers(0, len(text) + 1, rng.integers(0, 9))), len(text)]
        parts = [part for a, b in itertools.pairwise(cuts) for part in splitter.push(text[a:b])]
        parts += splitter.flush()
        assert "".join(piece for piece, _ in parts) == text
        assert "".join(piece for piece, inside in parts if inside) == reasoning
        assert all(piece for piece, _ in parts)


# --- the commands, through a pipe -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("chat") / "model", **ENDLESS)


def chat(model: Path, lines: str, *arguments: object) -> Result:
    return succeed("run", model, "-i", "-n", 4, "--no-stats", *arguments, stdin=lines.encode())


def test_undo_and_retry(model: Path) -> None:
    said = chat(model, "a\nb\n", *GREEDY).out.splitlines()
    undone = chat(model, "a\nsomething else\n/undo\nb\n", *GREEDY)
    assert undone.out.splitlines()[::2] == said
    assert "taken back: something else" in undone.err
    again = chat(model, "a\nb\n/retry\n", *GREEDY)
    assert again.out.splitlines() == [*said, said[1]]
    assert "at temperature 0 every reply is the same" in again.err
    hot = chat(model, "a\n/retry\n/retry\n", "--temperature", 5, "--seed", 1, "--top-k", 0).out.splitlines()
    assert len(set(hot)) == 3
    assert chat(model, "/undo\n/retry\na\n", *GREEDY).out.splitlines() == said[:1]


def test_system(model: Path) -> None:
    given = chat(model, "a\n", *GREEDY, "--system", "be brief")
    told = chat(model, "/system be brief\na\n/system\n", *GREEDY)
    assert told.out == given.out
    assert told.err.count("system message: be brief") == 2
    assert chat(model, "/system -\na\n", *GREEDY, "--system", "x").out == chat(model, "a\n", *GREEDY).out


def test_save_and_load(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a chat.json"
    whole = chat(model, "a\nb\nc\n", *GREEDY).out.splitlines()
    saved = chat(model, f"a\nb\n/save {path}\n", *GREEDY)
    assert f"{path}: 4 messages" in saved.err
    messages = json.loads(path.read_text())
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert messages[0]["content"] == "a"
    assert [path] == list(tmp_path.iterdir())
    loaded = chat(model, f"x\n/load {path}\nc\n", *GREEDY)
    assert loaded.out.splitlines()[1:] == whole[2:]
    path.write_text('{"no": "list"}')
    for wrong, problem in (
        (f"/load {path}", "is not a conversation"),
        ("/load", "needs the name of a file"),
        ("/save", "needs the name of a file"),
        (f"/load {tmp_path}/missing", "cannot read"),
        (f"/save {tmp_path}/no/where", "cannot write"),
    ):
        result = chat(model, f"a\n{wrong}\nb\n", *GREEDY)
        assert problem in result.err
        assert result.out.splitlines() == whole[:2]


def test_stats(model: Path) -> None:
    result = chat(model, "/stats\nab\n/stats\n/stats on\nc\n/stats off\nd\n", *GREEDY)
    assert "the context holds 0 of 4096 tokens (0%); 0 messages" in result.err
    prompt = len("[user]ab>")
    assert f"the context holds {prompt + 4} of 4096 tokens (0%); 2 messages" in result.err
    assert result.err.count("[prompt ") == 2


def test_messages_of_several_lines(model: Path) -> None:
    quoted = chat(model, '"""a\nb\n\nc"""\n/stats\n"""d"""\n', *GREEDY)
    assert len(quoted.out.splitlines()) == 2
    assert f"[prompt {len('[user]abc>')} tokens" in quoted.err
    unfinished = chat(model, '"""a\nb', *GREEDY)
    assert len(unfinished.out.splitlines()) == 1


def test_help_and_the_end(model: Path) -> None:
    result = chat(model, "/help\n/exit\nnever\n", *GREEDY)
    assert result.out == ""
    for command in ("/reset", "/system", "/undo", "/retry", "/stats", "/save", "/load", "/exit"):
        assert f"  {command}" in result.err
    raw = chat(model, "/save x\n/system x\n/undo\na\n/retry\n", "--raw", *GREEDY)
    assert raw.err.count("needs a chat model, and no --raw") == 3
    first, second = raw.out.splitlines()
    assert first == second


def test_a_full_context(model: Path) -> None:
    lines = "".join(f"message{i}\n" for i in range(9))
    result = chat(model, lines, *GREEDY, "--ctx-size", 80)
    assert re.search(r"the context is full: the oldest [23] turns are forgotten", result.err)
    assert len(result.out.splitlines()) == 9
    assert "error" not in result.err
    long = numbainfer("run", model, "-i", *GREEDY, "--ctx-size", 80, stdin=b"x" * 100 + b"\nhi\n")
    assert "error: the prompt has 107 tokens and the context holds 80" in long.err
    assert len(long.out.splitlines()) == 1
