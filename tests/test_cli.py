"""`run` and its chat as scripts rely on them: options, what goes to stdout, exit codes, the keys of the JSON."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from building import DATA
from command import (
    GREEDY,
    STORIES,
    Result,
    numbainfer,
    run,
    succeed,
    write_model,
    write_models,
)

from numbainfer import NumbaInferError, loading
from numbainfer.loading import context_size, names_a_model

LLAMA2C_RUNS = json.loads((DATA / "stories_greedy.json").read_text())["runs"]

STATISTICS = {
    "prompt_tokens": int,
    "cached_tokens": int,
    "prompt_seconds": float,
    "tokens": int,
    "decode_seconds": float,
    "time_to_first_token": float,
    "drafted_tokens": int,
    "accepted_tokens": int,
    "seed": int,
    "prompt_tokens_per_second": float,
    "decode_tokens_per_second": float,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each kind; not to be changed."""
    return write_models(tmp_path_factory.mktemp("models"))


# --- run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hf", "converted", "gguf", "bin"])
def test_run_takes_every_kind_of_model(kind: str, models: dict[str, Path]) -> None:
    result = succeed("run", models[kind], "abba", "-n", 8, *GREEDY)
    told = run(models[kind], "abba", "-n", 8)
    assert result.out == told["text"] + "\n"
    assert 0 < len(told["tokens"]) <= 8
    assert "tok/s" in result.err


def test_a_converted_model_says_what_its_source_says(models: dict[str, Path]) -> None:
    first, second = (run(models[kind], "abc", "-n", 20) for kind in ("hf", "converted"))
    assert first["tokens"] == second["tokens"]


@pytest.mark.parametrize("told", LLAMA2C_RUNS[:2], ids=["nothing", "prompt"])
def test_run_says_what_llama2c_says(told: dict[str, Any], tmp_path: Path) -> None:
    """From the .bin to the printed text, in float32; llama2.c prints the prompt too."""
    succeed("convert", STORIES, tmp_path / "out", "--dtype", "float32")
    prompt = told["prompt"] or "<s>"
    result = succeed("run", tmp_path / "out", prompt, "-n", 200, "--no-stats", *GREEDY)
    assert (told["prompt"] + result.out).strip() == told["text"].strip()


def test_json(models: dict[str, Path]) -> None:
    told = run(models["bin"], "Once upon a time", "-n", 12)
    assert list(told) == ["prompt_tokens", "tokens", "text", "finish_reason", "stats"]
    assert told["text"].startswith(", there was a")
    assert told["finish_reason"] == "length"
    assert {name: type(value) for name, value in told["stats"].items()} == STATISTICS
    assert told["stats"]["prompt_tokens"] == len(told["prompt_tokens"]) == 5
    assert told["stats"]["tokens"] == len(told["tokens"]) == 12
    assert told["stats"]["decode_tokens_per_second"] == pytest.approx(11 / told["stats"]["decode_seconds"], rel=0.01)


def test_eos_ends_a_reply(models: dict[str, Path], tmp_path: Path) -> None:
    tokens = run(models["hf"], "abc", "-n", 8)["tokens"]
    shutil.copytree(models["hf"], tmp_path / "model")
    last = next(token for token in tokens if token != tokens[0])
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [last]}))
    told = run(tmp_path / "model", "abc", "-n", 8)
    assert told["finish_reason"] == "stop"
    assert told["tokens"] == tokens[: tokens.index(last)]


def test_where_a_prompt_comes_from(models: dict[str, Path]) -> None:
    wanted = run(STORIES, "Tom had a", "-n", 5)
    for arguments in ([], ["-"]):
        told = run(STORIES, *arguments, "-n", 5, stdin=b"Tom had a\n")  # echo adds a line end
        assert told["prompt_tokens"] == wanted["prompt_tokens"]
        assert told["text"] == wanted["text"]
    twice = run(STORIES, "-", "-n", 5, stdin=b"Tom had a\n\n")
    assert twice["prompt_tokens"] != wanted["prompt_tokens"]
    assert run(STORIES, "Tom had a", "-n", 5, stdin=b"not read")["text"] == wanted["text"]


def test_without_a_model_the_demo_answers(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "demo_directory", lambda progress: models["chat"])
    long = "Why is the sky blue? " * 13  # longer than a file's name can be
    for arguments, stdin in (((long,), b""), ((), long.encode()), (("-",), long.encode())):
        told = succeed("run", *arguments, "-n", 1, "--json", stdin=stdin).json
        assert told["prompt_tokens"] == encode(f"[user]{long}>")


@pytest.mark.parametrize(
    ("text", "is_model"),
    [
        ("Once upon a time", False),
        ("Hello", False),
        ("What is 1/2 + 1/3?", False),
        ("x" * 300, False),
        ("x" * 5000, False),
        ("", False),
        ("-", False),
        ("two\nlines.gguf", False),
        ("an essay about model.gguf", False),
        ("model.gguf", True),
        ("./model", True),
        ("/models/qwen", True),
        ("~/qwen", True),
        ("Qwen/Qwen2.5-0.5B-Instruct", True),
        (str(STORIES), True),
        (str(DATA), True),
    ],
)
def test_names_a_model(text: str, is_model: bool) -> None:
    assert names_a_model(text) == is_model


def test_seed(models: dict[str, Path]) -> None:
    def text(*arguments: object) -> str:
        return run(STORIES, "Once upon", "-n", 40, "--temperature", 1, *arguments)["text"]

    assert text("--seed", 7) == text("--seed", 7)
    assert text("--seed", 7) != text("--seed", 8)
    drawn = run(STORIES, "Once upon", "-n", 40, "--temperature", 1)
    assert text("--seed", drawn["stats"]["seed"]) == drawn["text"]  # the statistics tell how to repeat it
    assert text("--seed", 2**64 - 1)


def test_every_sampling_option_counts() -> None:
    options = ("--temperature", 2, "--seed", 3, "-n", 60)
    told = run(STORIES, "Once upon", *options, "--top-k", 0, "--top-p", 1)
    free, first = told["text"], told["tokens"][0]
    for changed in (
        ("--top-k", 2),
        ("--top-p", 0.5),
        ("--min-p", 0.3),
        ("--typical-p", 0.2),
        ("--mirostat", 2),
        ("--repetition-penalty", 1.5),
        ("--frequency-penalty", 2),
        ("--presence-penalty", 2),
        ("--logit-bias", f"{first}=-inf"),
        ("--regex", "[a-z ]{200}"),
    ):
        assert run(STORIES, "Once upon", *options, "--top-k", 0, "--top-p", 1, *changed)["text"] != free
    greedy = run(STORIES, "Once upon", "-n", 60)["text"]
    assert run(STORIES, "Once upon", *options, "--top-k", 1)["text"] == greedy


def test_a_banned_token_is_not_said() -> None:
    first, *_ = run(STORIES, "Once upon", "-n", 3)["tokens"]
    assert first not in run(STORIES, "Once upon", "-n", 30, "--logit-bias", f"{first}=-inf")["tokens"]
    for wrong in ("x=1", "5", "5=", "5=nan", "-1=2"):
        refused = numbainfer("run", STORIES, "Once", "--logit-bias", wrong)
        assert (refused.code, "logit" in refused.error) == (2, True)
    assert "not in the model's vocabulary" in numbainfer("run", STORIES, "Once", "--logit-bias", "512=1").error


def test_log_probabilities() -> None:
    told = run(STORIES, "Once upon", "-n", 6, "--logprobs", 3)
    assert [one["token"] for one in told["logprobs"]] == told["tokens"]
    assert "".join(one["text"] for one in told["logprobs"]) == told["text"]
    for one in told["logprobs"]:
        assert one["top"][0] == {name: one[name] for name in ("token", "text", "logprob")}  # greedy
        assert 0 >= one["top"][0]["logprob"] >= one["top"][1]["logprob"] >= one["top"][2]["logprob"]
    assert all(one["top"] == [] for one in run(STORIES, "Once upon", "-n", 6, "--logprobs", 0)["logprobs"])
    assert numbainfer("run", STORIES, "Once", "--logprobs", 3).error.startswith("--logprobs goes with --json")


def test_speculation_says_the_same() -> None:
    text = "Tom had a red ball. Tom had a red ball. Tom had a red"
    plain, guessed = (run(STORIES, text, "-n", 60, *speculate) for speculate in ((), ("--speculate",)))
    assert plain["tokens"] == guessed["tokens"]
    assert plain["stats"]["drafted_tokens"] == 0
    assert 0 < guessed["stats"]["accepted_tokens"] <= guessed["stats"]["drafted_tokens"]


def test_a_draft_model_says_the_same(models: dict[str, Path]) -> None:
    plain, guessed = (run(STORIES, "Once upon", "-n", 60, *draft) for draft in ((), ("--draft", STORIES)))
    assert plain["tokens"] == guessed["tokens"]
    assert guessed["stats"]["accepted_tokens"] > 30
    assert "another vocabulary" in numbainfer("run", STORIES, "Once", "--draft", models["hf"]).error
    assert numbainfer("run", STORIES, "Once", "--draft", "nowhere.gguf").error.startswith("nowhere.gguf: no such")
    assert numbainfer("run", STORIES, "Once", "--draft", STORIES, "--speculate").code == 2


def test_replies_of_a_given_form(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 3}')
    (tmp_path / "grammar.lark").write_text('start: "a" | "b"\n')
    told = json.loads(run(STORIES, "Once", "--json-schema", schema)["text"])
    assert 2 <= len(told) <= 3
    assert set(told) <= {1, 2}
    assert json.loads(run(STORIES, "Once", "--json-schema", '{"const": "x"}')["text"]) == "x"
    assert run(STORIES, "Once", "--grammar", tmp_path / "grammar.lark")["text"] in ("a", "b")
    assert re.fullmatch("[bc]{4}", run(STORIES, "Once", "--regex", "[bc]{4}")["text"])
    for wrong, code in (
        (("--regex", "("), 1),
        (("--json-schema", "{"), 1),
        (("--json-schema", "nowhere.json"), 2),
        (("--grammar", "nowhere"), 2),
        (("--regex", "a", "--json-schema", "{}"), 2),
    ):
        refused = numbainfer("run", STORIES, "Once", *wrong)
        assert (refused.code, refused.error != "") == (code, True)


def test_max_tokens(models: dict[str, Path]) -> None:
    nothing = run(models["bin"], "Once", "-n", 0)
    assert (nothing["tokens"], nothing["text"], nothing["finish_reason"]) == ([], "", "length")
    assert succeed("run", models["bin"], "Once", "-n", 0).out == "\n"
    assert len(run(models["endless"], "abc")["tokens"]) == 512
    assert len(run(models["endless"], "abc", "-n", 513)["tokens"]) == 513


def test_ctx_size(models: dict[str, Path]) -> None:
    result = succeed("run", models["endless"], "abcde", "--ctx-size", 12, "--json", *GREEDY)
    assert len(result.json["prompt_tokens"]) == 5
    assert len(result.json["tokens"]) == 7
    assert result.json["finish_reason"] == "length"
    assert "the context of 12 tokens is full" in result.err
    exact = succeed("run", models["endless"], "abcde", "--ctx-size", 12, "-n", 7, *GREEDY)
    assert "full" not in exact.err
    assert len(run(models["hf"], "abc", "--ctx-size", 0, "-n", 1000)["tokens"]) == 253  # of its 256


def test_the_context_unless_told_otherwise(models: dict[str, Path]) -> None:
    for kind, size in (("endless", 4096), ("hf", 256)):
        weights = loading.open_model(models[kind]).weights
        assert context_size(weights, None) == size
        assert context_size(weights, 0) == weights.config.max_positions
        assert context_size(weights, 100) == 100
        with pytest.raises(NumbaInferError, match=r"--ctx-size 100001: .* at most"):
            context_size(weights, 100_001)


def test_threads_change_nothing() -> None:
    assert run(STORIES, "Once", "-n", 50, "-t", 1)["tokens"] == run(STORIES, "Once", "-n", 50)["tokens"]


def test_stop() -> None:
    free = run(STORIES, "Once upon a time", "-n", 60)["text"]
    word = "named"
    assert word in free[5:]
    told = run(STORIES, "Once upon a time", "-n", 60, "--stop", "never there", "--stop", word)
    assert told["text"] == free[: free.index(word)]
    assert told["finish_reason"] == "stop"
    assert len(told["tokens"]) < 60
    shown = succeed("run", STORIES, "Once upon a time", "-n", 60, "--stop", word, *GREEDY)
    assert shown.out == told["text"] + "\n"


def encode(text: str) -> list[int]:
    """What tiny_tokenizers.letters makes of a text: it has no token for a space."""
    return [ord(c) - 33 for c in text if c > " "]


def test_a_chat_template_is_applied(models: dict[str, Path]) -> None:
    assert run(models["chat"], "hi", "-n", 1)["prompt_tokens"] == encode("[user]hi>")
    assert run(models["chat"], "hi", "-n", 1, "--raw")["prompt_tokens"] == encode("hi")
    told = run(models["chat"], "hi", "-n", 1, "--system", "be brief")
    assert told["prompt_tokens"] == encode("[system]be brief[user]hi>")
    for arguments in ((models["chat"], "hi", "--raw"), (models["hf"], "hi")):
        result = numbainfer("run", *arguments, "--system", "be brief")
        assert result.error == "--system needs a chat model, and no --raw"
        assert result.code == 1


def test_a_reply_starts_without_a_space_and_a_continuation_with_it(tmp_path: Path) -> None:
    """A sentencepiece vocabulary's first word has one before it; only a chat's reply is a text of its own."""
    succeed("convert", STORIES, tmp_path / "model")
    settings = {"chat_template": "{{ messages[-1].content }}"}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    continued, replied = (run(tmp_path / "model", "Once upon", "-n", 9, *raw)["text"] for raw in (("--raw",), ()))
    assert continued.startswith(" a time")
    assert replied == continued[1:]


def test_a_models_own_defaults(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    greedy = run(model, "abc", "-n", 30)["text"]
    (model / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 1.5}))
    assert succeed("run", model, "abc", "-n", 30).out == greedy + "\n"
    (model / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 1, "temperature": None}))
    assert succeed("run", model, "abc", "-n", 30).out == greedy + "\n"
    assert succeed("run", model, "abc", "-n", 30, "--top-k", 50, "--temperature", 5).out != greedy + "\n"
    (model / "generation_config.json").write_text(json.dumps({"top_p": 7}))
    refused = numbainfer("run", model, "abc")
    assert refused.error.startswith("generation_config.json: top_p must be above 0 and at most 1")
    assert succeed("run", model, "abc", "-n", 1, "--top-p", 0.9)


def test_stdout_is_for_results(models: dict[str, Path]) -> None:
    quiet = succeed("run", models["bin"], "Once", "-n", 5, "--no-stats", *GREEDY)
    loud = succeed("run", models["bin"], "Once", "-n", 5, *GREEDY)
    assert quiet.out == loud.out
    assert "tok/s" not in quiet.err
    assert re.search(r"^\[prompt 2 tokens, .* tok/s \| reply 5 tokens, .* tok/s \| .*length\]$", loud.err, re.MULTILINE)
    assert succeed("info", models["gguf"]).err == ""


def test_text_that_the_terminal_lacks(models: dict[str, Path]) -> None:
    told = succeed("run", models["bin"], "Zoë", "-n", 0, "--json", encoding="ascii").json
    assert told["prompt_tokens"] == run(models["bin"], "Zoë", "-n", 0)["prompt_tokens"]
    result = numbainfer("run", "Zoë.gguf", "x", encoding="ascii")
    assert result.error == "Zo?.gguf: no such file or directory"


# --- several turns, through a pipe ----------------------------------------------------------------------------------


def chat(model: Path, lines: str, *arguments: object) -> Result:
    return succeed("run", model, "-i", *GREEDY, "-n", 4, *arguments, stdin=lines.encode())


def test_two_turns(models: dict[str, Path]) -> None:
    result = chat(models["chat"], "hi\n\nyou\n")
    first = run(models["chat"], "hi", "-n", 4)
    said = encode("[user]hi[assistant]" + first["text"].strip() + "[user]you>")
    second, speeds = result.out.splitlines(), re.findall(r"prompt (\d+) tokens(?:, (\d+) of them cached)?", result.err)
    assert second[0] == first["text"]
    assert len(second) == 2
    assert int(speeds[1][0]) == len(said)
    assert int(speeds[1][1]) >= len(encode("[user]hi"))  # the first turn was not computed again


def test_slash_commands(models: dict[str, Path]) -> None:
    once = chat(models["chat"], "hi\n")
    result = chat(models["chat"], "hi\n/reset\n/what is this\nhi\n/exit\nnever\n")
    assert result.out == once.out * 2
    assert "unknown command /what: /help lists them" in result.err
    assert re.findall(r"prompt (\d+) tokens", result.err) == [str(len(encode("[user]hi>")))] * 2


def test_a_prompt_may_come_before_the_chat(models: dict[str, Path]) -> None:
    assert succeed("run", models["chat"], "hi", "-i", *GREEDY, "-n", 4).out == chat(models["chat"], "hi\n").out


def test_a_chat_without_a_template_continues_lines(models: dict[str, Path]) -> None:
    result = chat(models["bin"], "Once upon\nTom had\n")
    assert "each message is continued as text" in result.err
    assert result.out.splitlines() == [run(models["bin"], text, "-n", 4)["text"] for text in ("Once upon", "Tom had")]


def test_an_error_in_a_turn_is_told_and_the_chat_goes_on(models: dict[str, Path]) -> None:
    result = chat(models["chat"], "a" * 50 + "\nhi\n", "--ctx-size", 20)
    assert "error: the prompt has 57 tokens and the context holds 20" in result.err
    assert result.out == chat(models["chat"], "hi\n").out
