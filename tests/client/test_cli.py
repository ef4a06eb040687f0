"""The client's half of the command line, against the fake server."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tensorwire.cli.app import run

from .fake_server import FakeServer, cat_vectors, oracle_text, oracle_tokens

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Cli:
    """Run a command line; returns exit code, stdout and stderr."""
    monkeypatch.setenv("TENSORWIRE_ADDRESS", server.address)

    def call(*args: str, stdin: str | None = None) -> tuple[int, str, str]:
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = run(args)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


# -- text ------------------------------------------------------------------------------------------


def test_generate_prints_the_text_and_a_line_about_it(cli: Cli) -> None:
    code, out, err = cli("generate", "oracle", "hi", "-n", "5", "--seed", "2")
    assert (code, out) == (0, oracle_text(oracle_tokens("hi", 5, seed=2)) + "\n")
    assert err == "prompt 2 tokens, 5 tokens, finish length\n"


def test_generate_json_is_one_object(cli: Cli) -> None:
    code, out, err = cli("generate", "oracle", "hi", "--json")
    made = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert made["token_ids"] == oracle_tokens("hi")
    assert made["finish_reason"] == "length"
    assert made["usage"]["prompt_tokens"] == 2


def test_generate_sends_its_options(cli: Cli, server: FakeServer) -> None:
    cli(
        *("generate", "oracle", "-", "--temperature", "0", "--top-k", "5", "--top-p", "0.5"),
        *("--stop", "a", "--stop", "b", "--stop-id", "7", "--no-wait", "--priority", "3"),
        *("--timeout", "9"),
        stdin="from stdin\n",
    )
    request = server.requests[0]
    assert request.inputs == {"prompt": "from stdin"}
    assert request.params == {
        "temperature": 0.0,
        "top_k": 5,
        "top_p": 0.5,
        "stop": ["a", "b"],
        "stop_ids": [7],
        "wait": False,
    }
    assert request.priority == 3
    assert request.deadline_ms is not None
    assert 8000 < request.deadline_ms <= 9000


def test_chat_answers_one_message(cli: Cli, server: FakeServer) -> None:
    expected = oracle_tokens("system: brief\nuser: hi")
    code, out, _ = cli("chat", "oracle", "hi", "--system", "brief")
    assert (code, out) == (0, oracle_text(expected) + "\n")
    code, out, _ = cli("chat", "oracle", "--json", stdin="hi\n")
    assert json.loads(out)["token_ids"] == oracle_tokens("user: hi")


class Terminal(io.StringIO):
    """Standard input that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_chat_on_a_terminal_holds_a_conversation(
    cli: Cli, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("hi\n\nand then\n"))
    code, out, _ = cli("chat", "oracle", "-n", "2")
    assert code == 0
    assert [request.inputs["roles"] for request in server.requests] == [
        ["user"],
        ["user", "assistant", "user"],
    ]
    first = oracle_text(oracle_tokens("user: hi", 2))
    assert server.requests[1].inputs["texts"] == ["hi", first, "and then"]
    assert first in out


def test_tokenize_prints_ids(cli: Cli) -> None:
    assert cli("tokenize", "cat", "abc") == (0, "97 98 99\n", "")
    assert json.loads(cli("tokenize", "cat", "-", "--json", stdin="abc\n")[1]) == {
        "ids": [97, 98, 99],
        "count": 3,
    }


# -- arrays ----------------------------------------------------------------------------------------


def test_embed_prints_a_table_vectors_or_similarities(cli: Cli) -> None:
    code, out, _ = cli("embed", "cat", "one text", "another")
    assert code == 0
    assert "one text" in out
    assert "8.0000" in out  # its length
    said = json.loads(cli("embed", "cat", "-", "--json", stdin="one\ntwo\n")[1])
    assert said["shape"] == [2, 4]
    assert said["embeddings"] == cat_vectors(["one", "two"]).tolist()
    cosines = json.loads(cli("embed", "cat", "a", "b", "--similarity", "--json")[1])["similarity"]
    assert cosines[0][0] == pytest.approx(1)
    assert cosines[0][1] == pytest.approx(cosines[1][0])
    assert "1.000" in cli("embed", "cat", "a", "b", "--similarity")[1]


def test_infer_reads_and_writes_npy_files(cli: Cli, tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    np.save(tmp_path / "x.npy", array)
    code, out, _ = cli(
        *("infer", "cat", "--input", f"x={tmp_path / 'x.npy'}", "--input", "note=text:hi"),
        "--json",
    )
    assert code == 0
    assert json.loads(out) == {
        "x": {"dtype": "int16", "shape": [2, 3], "data": [[0, 1, 2], [3, 4, 5]]},
        "note": {"dtype": "text", "shape": [], "data": "hi"},
    }
    folder = tmp_path / "made" / "here"
    code, out, _ = cli("infer", "cat", "-i", f"x={tmp_path / 'x.npy'}", "-o", str(folder))
    assert (code, out) == (0, "x: int16 [2, 3]\n")
    np.testing.assert_array_equal(np.load(folder / "x.npy"), array)


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", ""])
def test_infer_writes_nowhere_but_into_the_folder(cli: Cli, tmp_path: Path, name: str) -> None:
    np.save(tmp_path / "x.npy", np.zeros(2))
    folder = tmp_path / "out"
    code, _, err = cli("infer", "cat", "-i", f"{name}={tmp_path / 'x.npy'}", "-o", str(folder))
    assert code == 2
    assert err.count("\n") == 1
    assert not folder.exists()


def test_infer_never_unpickles(cli: Cli, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([object()]), allow_pickle=True)
    code, _, err = cli("infer", "cat", "-i", f"x={tmp_path / 'x.npy'}")
    assert code == 2
    assert "not a .npy file of numbers" in err


# -- the server ------------------------------------------------------------------------------------


def test_models_health_and_stats(cli: Cli) -> None:
    code, out, _ = cli("models")
    assert code == 0
    assert "oracle" in out
    assert "generate, chat" in out
    code, out, _ = cli("health")
    assert (code, out.splitlines()[0].split()) == (0, ["status", "ready"])
    assert cli("stats")[1].splitlines()[0].split() == ["gateway.sessions", "1"]
    for name in ("models", "health", "stats"):
        code, out, _ = cli(name, "--json")
        assert isinstance(json.loads(out), dict)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        ("generate nope x", 1, "error: there is no model 'nope'"),
        ("generate busy x", 1, "error: the queue is full"),
        ("generate cut:2 x", 1, "error: the "),
        ("health --address 127.0.0.1:1", 1, "error: no server answers at 127.0.0.1:1"),
        ("health --address a:b:c", 2, "error: Invalid value: an address must be host:port"),
        ("generate oracle x --temprature 1", 2, "error: No such option: --temprature"),
        ("generate oracle x --seed y", 2, "error: Invalid value for '--seed'"),
        ("generate oracle", 2, "error: Missing argument 'PROMPT'"),
        ("generat oracle x", 2, "error: No such command 'generat'"),
        ("infer cat -i x", 2, "error: Invalid value: --input must be NAME=FILE.npy"),
        ("infer cat -i x=/no/such/file", 2, "error: Invalid value: cannot read '/no/such/file'"),
    ],
)
def test_each_error_is_one_sentence_and_a_code(
    cli: Cli, args: str, code: int, sentence: str
) -> None:
    got, _, err = cli(*args.split())
    assert got == code
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith(sentence)


def test_without_arguments_it_shows_help_as_wrong_usage(cli: Cli) -> None:
    code, out, _ = cli()
    assert code == 2
    assert "Usage: tensorwire" in out


def test_help_lists_the_servers_commands_without_loading_them(cli: Cli) -> None:
    code, out, _ = cli("--help")
    assert code == 0
    for name in ("generate", "chat", "embed", "infer", "tokenize", "models", "health", "stats"):
        assert f"  {name} " in out
    for name in ("serve", "worker"):
        assert f"  {name} " in out


def test_health_fails_where_the_server_is_not_ready(cli: Cli, server: FakeServer) -> None:
    server.status = "draining"
    code, out, _ = cli("health")
    assert code == 1
    assert "draining" in out


# -- processes -------------------------------------------------------------------------------------


def python(*args: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_ctrl_c_cancels_and_exits_130_without_a_traceback(server: FakeServer) -> None:
    process = python(*("-m", "tensorwire", "generate", "endless", "x", "--address", server.address))
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert server.wait_until(lambda: server.open_runs == 0)


def test_a_closed_pipe_ends_it_quietly(server: FakeServer) -> None:
    process = python(*("-m", "tensorwire", "generate", "endless", "x", "--address", server.address))
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.wait(30) == 1
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    assert server.wait_until(lambda: server.open_runs == 0)


WITHOUT = """
import sys
sys.modules[{!r}] = None
from tensorwire.cli import main
sys.argv = ["tensorwire", *{!r}]
main()
"""


@pytest.mark.parametrize(
    ("missing", "args", "sentence"),
    [
        ("typer", ["health"], "the command line needs typer and rich: pip install 'tensorwire["),
        ("tensorwire_server", ["serve", "x"], "`tensorwire serve` needs the server: pip install '"),
        ("tensorwire_server", ["worker"], "`tensorwire worker` needs the server: pip install 'ten"),
    ],
)
def test_what_is_not_installed_is_named_in_one_line(
    missing: str, args: list[str], sentence: str
) -> None:
    process = python("-c", WITHOUT.format(missing, args))
    out, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert out == ""
    assert err.startswith(f"error: {sentence}")
    assert err.count("\n") == 1


PLUGIN = """
import typer

def greet(name: str, loud: bool = False) -> None:
    "Greet."
    print("HELLO" if loud else "hello", name)
    if name == "nobody":
        raise typer.Exit(3)

tools = typer.Typer()

@tools.command()
def first() -> None:
    print("first")

@tools.command()
def second() -> None:
    print("second")

print("plugin was loaded")
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A folder with an installed distribution that brings two commands."""
    (tmp_path / "some_plugin.py").write_text(PLUGIN)
    info = tmp_path / "some_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[tensorwire.commands]\ngreet = some_plugin:greet\ntools = some_plugin:tools\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("args", "code", "output"),
    [
        (["greet", "Ada", "--loud"], 0, "plugin was loaded\nHELLO Ada\n"),
        (["greet", "nobody"], 3, "plugin was loaded\nhello nobody\n"),
        (["tools", "second"], 0, "plugin was loaded\nsecond\n"),
    ],
)
def test_other_packages_bring_commands_as_functions_or_typer_apps(
    plugin: Path, args: list[str], code: int, output: str
) -> None:
    process = python("-m", "tensorwire", *args, env={"PYTHONPATH": str(plugin)})
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, output), err


def test_a_plugins_command_is_listed_but_not_loaded_for_help(plugin: Path) -> None:
    process = python("-m", "tensorwire", "--help", env={"PYTHONPATH": str(plugin)})
    out, _ = process.communicate(timeout=30)
    assert "  greet" in out
    assert "plugin was loaded" not in out


def test_a_plugins_wrong_usage_is_one_sentence_too(plugin: Path) -> None:
    process = python("-m", "tensorwire", "greet", env={"PYTHONPATH": str(plugin)})
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert err.startswith("error: Missing argument")
    assert err.count("\n") == 1
