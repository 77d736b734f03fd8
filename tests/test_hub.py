"""Hub ids, against a server on this machine that speaks the hub's protocol."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from command import numbainfer, succeed, write_gguf, write_model
from huggingface_hub import constants

from numbainfer import NumbaInferError, loading
from numbainfer.converters.hub import HubId, fetch, needed_files

RESOLVE = "/{repo_id}/resolve/{revision}/{filename}"
COMMITS = {"main": "a" * 40, "v2": "b" * 40}


class Hub(ThreadingHTTPServer):
    """Serves the repositories under `root`: OWNER/NAME/BRANCH/files. `requests`: (method, path, headers)."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.requests: list[tuple[str, str, Message]] = []
        self.cut_after: int | None = None  # bytes after which the next download breaks off
        self.token: str | None = None  # wanted from everybody
        self.url = f"http://127.0.0.1:{self.server_port}"

    def downloads(self) -> list[str]:
        """The files that were sent, by name."""
        return [
            path.split("/resolve/")[1].split("/", 1)[1]
            for method, path, _ in self.requests
            if method == "GET" and "/resolve/" in path
        ]


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None: ...

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append((self.command, path, self.headers))
        if self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.refuse(403, "GatedRepo")
        elif path.startswith("/api/models/"):
            repository, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            self.listing(repository, revision or "main")
        else:
            repository, _, rest = path[1:].partition("/resolve/")
            revision, _, name = rest.partition("/")
            self.file(repository, revision, name)

    def branch(self, repository: str, revision: str) -> Path | None:
        if not (self.server.root / repository).is_dir():
            self.refuse(404, "RepoNotFound")
            return None
        name = {commit: name for name, commit in COMMITS.items()}.get(revision, revision)
        if not (self.server.root / repository / name).is_dir():
            self.refuse(404, "RevisionNotFound")
            return None
        return self.server.root / repository / name

    def listing(self, repository: str, revision: str) -> None:
        directory = self.branch(repository, revision)
        if directory is None:
            return
        found = [p for p in sorted(directory.rglob("*")) if p.is_file()]
        siblings = [{"rfilename": p.relative_to(directory).as_posix(), "size": p.stat().st_size} for p in found]
        body = json.dumps({"id": repository, "sha": COMMITS[directory.name], "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def file(self, repository: str, revision: str, name: str) -> None:
        directory = self.branch(repository, revision)
        if directory is None:
            return
        if not (directory / name).is_file():
            self.refuse(404, "EntryNotFound")
            return
        data = (directory / name).read_bytes()
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{directory.name}-{name.replace("/", "-")}-{len(data)}"')
        self.send_header("X-Repo-Commit", COMMITS[directory.name])
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = None
        if self.server.cut_after is not None and self.server.cut_after < len(data):
            cut, self.server.cut_after = self.server.cut_after, None
        self.wfile.write(data[start : None if cut is None else start + cut])
        if cut is not None:
            self.close_connection = True
            self.connection.close()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with nothing on it; huggingface_hub and numbainfer look there and keep their files in tmp_path."""
    server = Hub(tmp_path / "hub")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + RESOLVE)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(loading, "cache_directory", lambda: tmp_path / "cache")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def publish(hub: Hub, repository: str = "org/Model", branch: str = "main") -> Path:
    """A model with files beside it that nobody needs."""
    directory = hub.root / repository / branch
    write_model(directory)
    (directory / "README.md").write_text("A model.")
    (directory / "pytorch_model.bin").write_bytes(b"the same once more")
    (directory / "onnx").mkdir()
    (directory / "onnx" / "model.onnx").write_bytes(b"x" * 1000)
    return directory


def test_run_downloads_converts_and_keeps(hub: Hub) -> None:
    directory = publish(hub)
    options = ("abc", "-n", 4, "--temperature", 0, "--json")
    expected = succeed("run", directory, *options).json["tokens"]
    first = succeed("run", "org/Model", *options)
    assert first.json["tokens"] == expected
    assert "downloading org/Model" in first.err
    assert "converting" in first.err
    assert sorted(hub.downloads()) == ["config.json", "model.safetensors", "tokenizer.json"]

    again = succeed("run", "org/Model", *options)
    assert again.json["tokens"] == expected
    assert "converting" not in again.err
    assert len(hub.downloads()) == 3  # asked for again, but not sent
    converted = [path.name for path in (loading.cache_directory() / "hub").iterdir()]
    assert converted == [f"org--Model-{'a' * 12}-int8-64"]
    assert (
        json.loads(succeed("bench", "org/Model", "-p", 4, "-n", 0, "-r", 1, "-o", "json").out)[0]["model"]
        == "org/Model"
    )


def test_a_new_commit_is_converted_anew_and_revisions_can_be_named(hub: Hub) -> None:
    publish(hub)
    write_model(hub.root / "org/Model/v2", name="qwen2_int8")
    for name, architecture in (("org/Model", "LlamaForCausalLM"), ("org/Model@v2", "Qwen2ForCausalLM")):
        assert loading.open_model(name, require_tokenizer=False).weights.config.architecture == architecture
    by_commit = loading.open_model(f"org/Model@{'b' * 40}", require_tokenizer=False)
    assert by_commit.weights.config.architecture == "Qwen2ForCausalLM"
    assert len(list((loading.cache_directory() / "hub").iterdir())) == 2
    assert "has no revision v3" in numbainfer("run", "org/Model@v3", "x").error


def test_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "was not downloaded before and HF_HUB_OFFLINE is set" in numbainfer("run", "org/Model", "x").error
    assert not hub.requests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    succeed("run", "org/Model", "abc", "-n", 1)
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    succeed("run", "org/Model", "abc", "-n", 1)
    assert len(hub.requests) == asked


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """One clear line; and a model that is here already runs."""
    publish(hub)
    succeed("run", "org/Model", "abc", "-n", 1)
    nowhere = "http://127.0.0.1:1"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + RESOLVE)
    succeed("run", "org/Model", "abc", "-n", 1)
    error = numbainfer("run", "org/Other", "x").error
    assert "org/Other: no such file or directory, and as a hub id it was not downloaded before" in error
    assert "check the network, or download it elsewhere and give its directory" in error


def test_a_download_that_breaks_off_goes_on(hub: Hub) -> None:
    directory = publish(hub)
    (directory / "model.safetensors").write_bytes(os.urandom(25_000_000))  # the library keeps 10 MB at a time
    hub.cut_after = 15_000_000
    lines: list[tuple[str, int, int | None]] = []
    for _ in range(2):  # the library may try again by itself, or leave it to the user
        try:
            snapshot = fetch(HubId("org/Model"), lambda *line: lines.append(line))
        except NumbaInferError as error:
            assert "run it again, which goes on where this stopped" in str(error)  # noqa: PT017
    for name in ("config.json", "model.safetensors"):
        assert (snapshot.path / name).read_bytes() == (directory / name).read_bytes()
    assert any("Range" in headers for method, _, headers in hub.requests if method == "GET")
    description, done, total = lines[-1]
    assert (description, done) == ("downloading org/Model", total)


def test_tokens_and_gated_models(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(hub)
    hub.token = "hf_secret"
    error = numbainfer("run", "org/Model", "x").error
    assert "org/Model is gated: accept its terms at" in error
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    succeed("run", "org/Model", "abc", "-n", 1)


def test_ggufs(hub: Hub) -> None:
    directory = hub.root / "org/Model-GGUF/main"
    directory.mkdir(parents=True)
    write_gguf(directory / "model-q8_0.gguf")
    (directory / "README.md").write_text("x")
    options = ("abc", "-n", 2, "--temperature", 0, "--json")
    expected = succeed("run", directory / "model-q8_0.gguf", *options).json
    assert succeed("run", "org/Model-GGUF", *options).json["tokens"] == expected["tokens"]
    shutil.copy(directory / "model-q8_0.gguf", directory / "model-q4_0.gguf")
    error = numbainfer("run", "org/Model-GGUF", "x").error
    assert "has 2 GGUF files; name one, as org/Model-GGUF/model-q4_0.gguf" in error
    assert succeed("run", "org/Model-GGUF/model-q4_0.gguf", *options).json["tokens"] == expected["tokens"]
    assert "has no file model-q5_0.gguf" in numbainfer("run", "org/Model-GGUF/model-q5_0.gguf", "x").error


def test_convert_takes_hub_ids(hub: Hub, tmp_path: Path) -> None:
    publish(hub)
    succeed("convert", "org/Model", tmp_path / "out", "--dtype", "float16")
    assert "float16" in succeed("info", tmp_path / "out").out


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("org/None", "no such file or directory, and no such model on the hub"),
        ("org/Empty", "has no weights that numbainfer reads"),
    ],
)
def test_what_is_not_there(hub: Hub, name: str, problem: str) -> None:
    (hub.root / "org/Empty/main").mkdir(parents=True)
    assert problem in numbainfer("run", name, "x").error


def test_paths_come_first(hub: Hub) -> None:
    """Nobody asks the network about a path."""
    (hub.root / "model").mkdir(parents=True)
    for name in ("hub/none", "./none/x", "/none/x", "none", "none/model.gguf"):
        assert "no such file or directory" in numbainfer("run", name, "x").error
    assert not hub.requests


def test_the_environment_is_huggingface_hubs(hub: Hub, tmp_path: Path) -> None:
    """HF_ENDPOINT and HF_HOME, as a user sets them, in a process of its own."""
    publish(hub)
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_mine"}
    arguments = [sys.executable, "-m", "numbainfer", "convert", "org/Model", str(tmp_path / "out")]
    root = Path(loading.__file__).parents[1]
    result = subprocess.run(
        arguments, env=environment, cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "home" / "hub" / "models--org--Model").is_dir()
    asked = [headers for _, path, headers in hub.requests if "/org/Model" in path]
    assert {headers.get("Authorization") for headers in asked} == {"Bearer hf_mine"}


SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


@pytest.mark.parametrize(
    ("names", "needed"),
    [
        (
            ["config.json", "model.safetensors", "model.fp16.safetensors", "a.gguf"],
            ["config.json", "model.safetensors"],
        ),
        (
            [
                "config.json",
                *SHARDS,
                "model.safetensors.index.json",
                "consolidated.safetensors",
                "original/params.json",
            ],
            ["config.json", "model.safetensors.index.json", *SHARDS],
        ),
        (["config.json", "pytorch_model.bin", "tf_model.h5"], ["config.json", "pytorch_model.bin"]),
        (
            ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "x.md"],
            ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"],
        ),
    ],
)
def test_only_the_files_that_are_needed(names: list[str], needed: list[str]) -> None:
    assert needed_files(HubId("org/Model"), names) == needed


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", ("Qwen/Qwen2.5-0.5B-Instruct", None, None)),
        ("Qwen/Qwen3-0.6B@refs/pr/1", ("Qwen/Qwen3-0.6B", None, "refs/pr/1")),
        ("org/M-GGUF/q8/m.gguf@main", ("org/M-GGUF", "q8/m.gguf", "main")),
        ("models/m.gguf", None),
        ("org/../m", None),
        ("one", None),
        ("/org/m", None),
        ("org/m@", None),
        ("a b/c", None),
    ],
)
def test_parse(text: str, parsed: Any) -> None:
    hub_id = HubId.parse(text)
    assert (hub_id and (hub_id.repository, hub_id.file, hub_id.revision)) == parsed
    assert hub_id is None or str(hub_id) == text
