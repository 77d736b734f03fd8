"""The examples run as they stand, on a tiny model."""

from __future__ import annotations

import ast
import io
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from command import STORIES, succeed

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "model"
    succeed("convert", STORIES, folder)
    template = {"chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"}
    (folder / "tokenizer_config.json").write_text(json.dumps(template))
    return folder


def run(name: str, *arguments: object, stdin: str = "") -> str:
    """What a script prints."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        patch.setattr(sys, "stdout", out)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return out.getvalue()


def test_generate(model: Path) -> None:
    told = run("generate.py", model, "Once upon a time", "Tom had")
    assert told.startswith("--- Once upon a time, there was")
    assert told.count("tokens, length)") == 2
    assert run("generate.py", model).count("---") == 4


def test_chat(model: Path) -> None:
    told = run("chat.py", model, "You are a story.", stdin="Once upon a time\nAnd then?\n")
    assert told.count("> ") == 3  # two turns, and the end
    assert len(told.splitlines()) >= 3


def test_own_sampler(model: Path) -> None:
    told = run("own_sampler.py", model, "Once upon a time")
    assert told.startswith("Once upon a time, there was")
    assert run("own_sampler.py", model, "Once upon a time") == told  # its seed is its own


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if not path.name.startswith(("_", "."))} == {
        "generate.py",
        "chat.py",
        "own_sampler.py",
        "inside_a_model.ipynb",
    }


def test_the_notebook(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cell after cell in one namespace; and what it shows was printed by a run without errors."""
    notebook = json.loads((EXAMPLES / "inside_a_model.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in cells]
    assert sources[0].startswith("MODEL = None")
    space: dict[str, Any] = {"MODEL": str(model)}
    for source in sources[1:]:
        exec(compile(ast.parse(source), "cell", "exec"), space)
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM: 5 layers, 64 wide, 512 tokens" in printed
    assert "8 call(s)" in printed
    for cell in cells[1:-1]:
        assert cell["outputs"]
        assert all(output["output_type"] == "stream" for output in cell["outputs"])
