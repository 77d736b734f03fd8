"""The documentation is true: its code runs, its links lead somewhere, the files and functions that it names exist.

Every fenced block of README and docs is taken. `python` blocks of a page run one after the other in one namespace; of
`sh` blocks (and those without a language) every line that starts with a command runs, in a directory where tiny models
bear the names that the docs use; replies end after a few tokens. What installs does not run here: SKIPPED lists it.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import pytest
from building import DATA
from command import STORIES, numbainfer, succeed, write_gguf

from numbainfer import cpu, random_weights
from numbainfer.cpu import compile

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Installing (.ci/run does that), other programs, and the benchmarks that take minutes.
SKIPPED = ("pip ", "pytest", "ruff ", "mypy ", "mkdocs ", "python benchmarks/", "python tests/", ".ci/run")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> Iterator[tuple[str, int, str]]:
    """(language, first line, code) of each fenced block."""
    language, start, lines = None, 0, list[str]()
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if (fence := re.match(r"^\s*```(\w*)", line)) is None:
            lines.append(line)
        elif language is None:
            language, start, lines = fence[1], number + 1, []
        else:
            yield language, start, "\n".join(lines)
            language = None
    assert language is None, f"{name_of(page)}: the block at line {start} does not end"


def commands(page: Path) -> list[tuple[int, str]]:
    """(line number, command) of each line of the page's shell blocks."""
    found = []
    for language, start, code in blocks(page):
        if language in ("", "sh"):
            for number, line in enumerate(code.splitlines(), start):
                text = re.sub(r"\s+#.*$", "", line).strip()
                if text and not text.startswith("#"):
                    found.append((number, text))
    return found


# --- a directory in which the docs' commands work ------------------------------------------------------------------


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models under the names of the docs, and a cache that holds the demo model."""
    folder = tmp_path_factory.mktemp("docs")
    succeed("convert", STORIES, folder / "Llama-3.2-1B")
    template = {"chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"}
    for name in ("Qwen2.5-0.5B-Instruct", "qwen"):
        shutil.copytree(folder / "Llama-3.2-1B", folder / name)
        (folder / name / "tokenizer_config.json").write_text(json.dumps(template))
    shutil.copytree(folder / "qwen", folder / "Qwen" / "Qwen2.5-0.5B-Instruct")  # what a path can be is no hub id
    write_gguf(folder / "model.gguf")
    shutil.copy(STORIES, folder / "stories15M.bin")
    shutil.copy(DATA / "tok512.bin", folder / "tokenizer.bin")
    shutil.copy(DATA / "story_text.txt", folder / "text.txt")
    (folder / "question.txt").write_text("What did Lily see?\n")
    cache = folder / ".cache" / "numbainfer"
    shutil.copytree(folder / "qwen", cache / "models" / "SmolLM2-135M-Instruct")
    compile.cache_directory().parent.mkdir(parents=True, exist_ok=True)
    (cache / "kernels").symlink_to(compile.cache_directory().parent)
    program = folder / ".bin" / "numbainfer"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m numbainfer "$@"\n')
    program.chmod(0o755)
    return folder


@pytest.fixture
def playground(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the working directory and the home."""
    folder = tmp_path / "playground"
    shutil.copytree(originals, folder, symlinks=True)
    monkeypatch.chdir(folder)
    for variable, value in (
        ("HOME", folder),
        ("XDG_CACHE_HOME", folder / ".cache"),
        ("PATH", f"{folder / '.bin'}{os.pathsep}{os.environ['PATH']}"),
        ("PYTHONPATH", str(ROOT)),
    ):
        monkeypatch.setenv(variable, str(value))
    shape = {"num_hidden_layers": 1, "vocab_size": 256, "hidden_size": 64, "intermediate_size": 64}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    tiny = {**random_weights.RANDOM["smollm2-135m"], **shape, **heads}
    for architecture in random_weights.RANDOM:  # real shapes take seconds each
        monkeypatch.setitem(random_weights.RANDOM, architecture, tiny)
    monkeypatch.setattr(cpu, "BandwidthProbe", partial(cpu.BandwidthProbe, nbytes=1 << 20))
    return folder


# --- code ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=name_of)
@pytest.mark.skipif(os.name != "posix", reason="the docs' shell lines are for POSIX shells")
def test_commands_run(page: Path, playground: Path) -> None:
    for _, line in commands(page):
        words = shlex.split(line)
        if words[:2] == ["numbainfer", "convert"] and "--force" not in words:
            shutil.rmtree(playground / words[3], ignore_errors=True)  # the page makes it itself
    for number, line in commands(page):
        where = f"{name_of(page)}:{number}: {line}"
        if line.startswith(SKIPPED):
            continue
        assert re.match(r"(numbainfer|echo|cat|mkdir|NO_COLOR=1) ", line), f"{where}: neither run nor listed as skipped"
        plain, _, target = line.partition(" > ")
        if line.startswith("numbainfer") and not re.search(r"[|>$]", re.sub(r"'[^']*'", "", plain)):
            words = shlex.split(plain)[1:]
            if words[0] == "run" and not {"-n", "--max-tokens"} & set(words):
                words += ["-n", "8"]
            result = numbainfer(*words)
            assert result.code == 0, f"{where}\n{result.err}"
            if target:
                Path(target.replace("~", str(playground))).write_text(result.out, encoding="utf-8")
        else:
            done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, timeout=120)
            assert done.returncode == 0, f"{where}\n{done.stderr}"


@pytest.mark.parametrize("page", [p for p in PAGES if any(b[0] == "python" for b in blocks(p))], ids=name_of)
def test_python_runs(page: Path, playground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "on_first_compile", None)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for language, start, code in blocks(page):
        if language == "python":
            if "numbainfer.gpu" in code:
                pytest.importorskip("numba_cuda", reason="the gpu extra is not installed")
            source = "\n" * (start - 1) + code  # so that a traceback names the page's lines
            exec(builtins.compile(source, name_of(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_have_a_language_that_is_checked(page: Path) -> None:
    for language, start, _ in blocks(page):
        assert language in ("", "sh", "python", "text", "json"), f"{name_of(page)}:{start}: {language}"


# --- names ---------------------------------------------------------------------------------------------------------


@cache
def names_in(path: Path) -> frozenset[str]:
    """Functions, classes, methods and module-level names of a Python file; methods as Class.method too."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
            annotated = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
            found |= {f"{node.name}.{target.id}" for target in annotated if isinstance(target, ast.Name)}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(found)


def prose(page: Path) -> list[tuple[int, str]]:
    """(line number, line) outside of fenced blocks."""
    inside, found = False, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if re.match(r"^\s*```", line):
            inside = not inside
        elif not inside:
            found.append((number, line))
    return found


FILE = re.compile(r"`((?:numbainfer|converters|tests|benchmarks|docs|examples|\.ci)/[\w./-]*\w)`")
# `file.py`: `one`, `other` (what the tour's "Where" lines say), each of which has to be in the file
NAMED = re.compile(r"`((?:numbainfer|converters|tests|benchmarks)/[\w/]+\.py)`: ((?:`[\w.]+`(?:, | and )?)+)")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_functions_exist(page: Path) -> None:
    for number, line in prose(page):
        for path in FILE.findall(line):
            assert (ROOT / path).exists(), f"{name_of(page)}:{number}: there is no {path}"
        for path, names in NAMED.findall(line):
            for name in re.findall(r"`([\w.]+)`", names):
                assert name in names_in(ROOT / path), f"{name_of(page)}:{number}: there is no {name} in {path}"


def test_every_chapter_of_the_tour_says_where_and_has_an_exercise() -> None:
    chapters = sorted((ROOT / "docs" / "tour").glob("[0-9]*.md"))
    assert len(chapters) == 15
    for chapter in chapters:
        text = chapter.read_text(encoding="utf-8")
        assert text.count("**Where:**") == 1, name_of(chapter)
        assert "\n## Exercise" in text, name_of(chapter)
        where = next(line for line in text.splitlines() if line.startswith("**Where:**"))
        assert NAMED.search(where), f"{name_of(chapter)} names no function"


# --- links ---------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What headings are linked by, as GitHub and mkdocs make it."""
    headings = [line.lstrip("#").strip() for _, line in prose(page) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for number, line in prose(page):
        for target in re.findall(r"\]\(([^)\s]+)\)", line):
            where = f"{name_of(page)}:{number}: {target}"
            if target.startswith(("https://", "http://")):
                assert re.fullmatch(r"https://[\w.-]+\.[a-z]+(/[\w./#?=&%-]*)?", target), where
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), where
            if anchor and file.name not in ("cli.md", "api.md"):  # these are generated: mkdocs checks them
                assert anchor in anchors(file), where


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(page.relative_to(ROOT / "docs")) in config, page
    for path in re.findall(r"[\w/-]+\.md", config):
        assert (ROOT / "docs" / path).exists(), path


def test_images_are_small_and_used() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for image in (ROOT / "docs" / "images").glob("*"):
        assert image.stat().st_size < 400_000, image
        assert f"images/{image.name}" in text, f"{image.name} is shown nowhere"
