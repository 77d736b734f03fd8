"""The Python API: one prompt, many, streams, conversations; from several threads, after errors, and closed."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import ENDLESS, STORIES, TEMPLATE, succeed, write_chat_model

import numbainfer
from numbainfer import LLM, Generation, NumbaInferError, SamplingParams

TEXTS = ["Once upon a time", "Tom had a red ball", "The dog", "Lily and Ben went to the park", "One day"]
GREEDY = SamplingParams(max_tokens=20)


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights in float32: int8 rounds differently in a batch."""
    folder = tmp_path_factory.mktemp("llm") / "stories"
    succeed("convert", STORIES, folder, "--dtype", "float32")
    return folder


@pytest.fixture
def llm(stories: Path) -> Iterator[LLM]:
    with LLM(stories, ctx_size=128, batch_size=3) as llm:
        yield llm


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("llm") / "chat", **ENDLESS)


def test_one_prompt(llm: LLM, stories: Path) -> None:
    generation = llm.generate("Once upon a time", GREEDY)
    told = succeed("run", stories, "Once upon a time", "-n", 20, "--temperature", 0, "--json").json
    assert isinstance(generation, Generation)
    assert generation.text == told["text"]
    assert generation.tokens == told["tokens"]
    assert generation.finish_reason == "length"
    assert llm.generate(llm.tokenize("Once upon a time"), GREEDY).text == generation.text
    assert llm.generate(np.array(generation.prompt), GREEDY).text == generation.text  # type: ignore[call-overload]


def test_many_prompts(llm: LLM) -> None:
    generations = llm.generate(TEXTS, GREEDY)
    assert [g.text for g in generations] == [llm.generate(text, GREEDY).text for text in TEXTS]
    each = [SamplingParams(max_tokens=n) for n in range(5)]
    assert [len(g.tokens) for g in llm.generate(TEXTS, each)] == list(range(5))
    assert [g.text for g in llm.generate([llm.tokenize(text) for text in TEXTS], GREEDY)] == [
        g.text for g in generations
    ]
    assert [g.text for g in llm.generate([TEXTS[0]], GREEDY)] == [generations[0].text]
    assert llm.generate([], GREEDY) == []
    with pytest.raises(NumbaInferError, match="2 parameters for 5 prompts"):
        llm.generate(TEXTS, each[:2])


def test_streams(llm: LLM) -> None:
    expected = llm.generate(TEXTS, GREEDY)
    streams = [llm.stream(text, GREEDY) for text in TEXTS[:2]]
    told = ["", ""]
    for first, second in zip(*streams, strict=False):  # in turn
        told[0] += first
        told[1] += second
    for i, stream in enumerate(streams):
        told[i] += "".join(stream)
        assert stream.generation.text == expected[i].text
    with llm.stream(TEXTS[0], GREEDY) as broken_off:
        next(broken_off)
    assert broken_off.generation.finish_reason == "cancelled"
    assert len(broken_off.generation.tokens) < 20
    never_begun = llm.stream(TEXTS[0], GREEDY)
    never_begun.close()
    assert never_begun.generation.finish_reason == "cancelled"
    # those that are broken off, closed or forgotten, give their places back
    for _ in range(10):
        next(llm.stream(TEXTS[0], GREEDY))
    gc.collect()
    assert [g.text for g in llm.generate(TEXTS, GREEDY)] == [g.text for g in expected]


def test_a_batch_beside_open_streams(llm: LLM) -> None:
    expected = llm.generate(TEXTS, GREEDY)
    streams = [llm.stream(text, GREEDY) for text in TEXTS[:3]]
    beginnings = [next(stream) for stream in streams[:2]]
    assert [g.text for g in llm.generate(TEXTS, GREEDY)] == [g.text for g in expected]  # with the one that is left
    beginnings.append(next(streams[2]))
    with pytest.raises(NumbaInferError, match="all sequences of the KV cache are in use"):
        llm.generate(TEXTS, GREEDY)
    for beginning, stream, whole in zip(beginnings, streams, expected, strict=False):
        assert beginning + "".join(stream) == whole.text


def test_conversations(chat_model: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    with LLM(chat_model, batch_size=2) as llm:
        reply = llm.chat(messages, GREEDY)
        assert reply.prompt == llm.tokenize("[user]hi>")
        assert reply.text == llm.generate("[user]hi>", GREEDY).text
        assert "".join(llm.stream(messages, GREEDY)) == reply.text
        messages += [{"role": "assistant", "content": reply.text}, {"role": "user", "content": "and"}]
        second = llm.chat(messages, GREEDY)
        assert second.prompt == llm.tokenize(f"[user]hi[assistant]{reply.text}[user]and>")
        assert second.statistics.cached_tokens >= len(llm.tokenize("[user]hi"))
        for wrong in (["hi"], [{"role": "user"}, "hi"]):
            with pytest.raises(NumbaInferError, match="messages are dictionaries"):
                llm.chat(wrong)  # type: ignore[arg-type]


def test_variables_for_the_template(tmp_path: Path) -> None:
    model = write_chat_model(tmp_path / "model", TEMPLATE + "{{ mood }}")
    with LLM(model, batch_size=1) as llm:
        assert llm.chat([{"role": "user", "content": "a"}], GREEDY, mood="gay").prompt == llm.tokenize("[user]a>gay")
        stream = llm.stream([{"role": "user", "content": "a"}], GREEDY, mood="sad")
        assert stream.generation.prompt == llm.tokenize("[user]a>sad")


def test_logits(llm: LLM) -> None:
    text = "Once upon a time"
    tokens = llm.tokenize(text)
    logits = llm.logits(text)
    assert logits.shape == (len(tokens), 512)
    assert logits.dtype == np.float32
    kept = logits.copy()
    generation = llm.generate(text, SamplingParams(max_tokens=1, logprobs=0))
    np.testing.assert_array_equal(logits, kept)  # they are the caller's own
    assert generation.tokens == [int(logits[-1].argmax())]
    with pytest.raises(NumbaInferError, match="not in the model's vocabulary"):
        llm.logits([1, 512])
    assert llm.detokenize(tokens) == text
    assert llm.tokenize(text, bos=False) == tokens[1:]


def test_a_loop_of_ones_own(llm: LLM) -> None:
    expected = llm.generate("Once upon a time", GREEDY).tokens
    logits, tokens = llm.engine.prefill(llm.tokenize("Once upon a time")), list[int]()
    for _ in range(20):
        tokens.append(int(logits[-1].argmax()))
        logits = llm.engine.decode(tokens[-1])
    assert tokens == expected


def test_parameters_that_are_not_given(tmp_path: Path) -> None:
    model = write_chat_model(tmp_path / "model")
    with LLM(model) as llm:
        assert llm.default_params() == SamplingParams(temperature=0.7, top_k=40, top_p=0.95)
        assert llm.default_params(top_k=3, max_tokens=9).top_k == 3
    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.3, "top_k": 5, "eos_token_id": None}))
    with LLM(model) as llm:
        assert llm.default_params() == SamplingParams(temperature=0.3, top_k=5, top_p=0.95)
        assert 0 < len(llm.generate("abc").tokens) <= 512
    (model / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.3}))
    with LLM(model) as llm:
        assert llm.default_params().temperature == 0


def test_from_several_threads(llm: LLM) -> None:
    """Batches, streams and logits at once: each gets what it would get alone."""
    expected = [g.text for g in llm.generate(TEXTS, GREEDY)]
    logits = llm.logits(TEXTS[0])
    failures: list[Any] = []
    ready = threading.Barrier(4)

    def work(number: int) -> None:
        try:
            ready.wait()
            for _ in range(3):
                if number == 0:
                    assert [g.text for g in llm.generate(TEXTS, GREEDY)] == expected
                elif number == 1:
                    np.testing.assert_array_equal(llm.logits(TEXTS[0]), logits)
                else:
                    assert "".join(llm.stream(TEXTS[number], GREEDY)) == expected[number]
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)


def test_errors_leave_it_usable(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate(TEXTS[0], GREEDY).text
    for prompt, problem in (
        ("", "not in the|is empty"),
        ("word " * 500, "the context holds 128"),
        ([5, 9999], "token 9999"),
    ):
        if prompt == "":  # BOS alone is a prompt
            prompt = []  # noqa: PLW2901
        with pytest.raises(NumbaInferError, match=problem):
            llm.generate([TEXTS[0], prompt], GREEDY)  # type: ignore[list-item]
    with pytest.raises(NumbaInferError, match="no chat template"):
        llm.chat([{"role": "user", "content": "hi"}])
    with pytest.raises(NumbaInferError, match="batch_size"):
        LLM("nowhere", batch_size=0)
    with pytest.raises(NumbaInferError, match="nowhere"):
        LLM("nowhere")
    with pytest.raises(NumbaInferError, match="unknown device"):
        LLM("nowhere", device="tpu")

    def broken(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.model, "step", broken)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(TEXTS, GREEDY)
    assert llm.generate(TEXTS[0], GREEDY).text == expected


def test_closing(stories: Path) -> None:
    with LLM(stories, ctx_size=128, batch_size=2) as llm:
        stream = llm.stream(TEXTS[0], GREEDY)
        next(stream)
        pool = llm.engine.model.ops.pool
    assert pool.statistics.reserved == 0
    llm.close()
    for use in (
        lambda: llm.generate("a"),
        lambda: llm.stream("a"),
        lambda: llm.logits("a"),
        lambda: llm.tokenize("a"),
        lambda: llm.engine,
        lambda: next(stream),
    ):
        with pytest.raises(NumbaInferError, match="this LLM is closed"):
            use()


def test_a_tokenizer_from_elsewhere(tmp_path: Path) -> None:
    bare = shutil.copy(STORIES, tmp_path / "bare.bin")
    with pytest.raises(NumbaInferError, match="tokenizer"):
        LLM(bare)
    with LLM(bare, tokenizer=STORIES.parent / "tok512.bin", ctx_size=64) as llm:
        assert llm.generate("Once upon a time", GREEDY).text.startswith(", there was")


def test_guesses(llm: LLM, stories: Path) -> None:
    text = "Tom had a red ball. Tom had a red ball. Tom had a"
    expected = llm.generate(text, GREEDY)
    for options in ({"speculate": True}, {"draft": stories}):
        with LLM(stories, ctx_size=128, batch_size=2, **options) as guessing:  # type: ignore[arg-type]
            told = guessing.generate(text, GREEDY)
            assert told.tokens == expected.tokens
            assert told.statistics.accepted_tokens > 5
            assert [g.text for g in guessing.generate(TEXTS, GREEDY)] == [g.text for g in llm.generate(TEXTS, GREEDY)]


def test_importing_is_light() -> None:
    program = "import sys, numbainfer; print({'numba', 'numpy', 'jinja2', 'tokenizers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert set(numbainfer.__all__) <= {*dir(numbainfer), *numbainfer._LAZY}
    with pytest.raises(AttributeError, match="no attribute 'Llm'"):
        numbainfer.Llm  # noqa: B018
