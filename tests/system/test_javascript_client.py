"""The client in JavaScript, which follows SPEC.md and shares no code with the rest."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tensorwire_server.workers.echo import echo_embedding
from tensorwire_server.workers.oracle import oracle_text

from .serving import expected

if TYPE_CHECKING:
    from collections.abc import Callable

    from .serving import RunningServer

PROTOCOL = Path(__file__).parents[2] / "protocol"
CLIENT = PROTOCOL / "examples" / "client.mjs"
VECTORS = PROTOCOL / "vectors"
NODE = shutil.which("node")
WITHIN_S = 60.0  # on a machine that is busy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NODE is None, reason="node is not installed"),
]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    assert NODE is not None
    command = [NODE, str(CLIENT), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S, check=False)


def answer(server: RunningServer, *words: str) -> list[Any]:
    """Return the JSON lines that one call prints."""
    done = run(server.address, *words)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def run_script(script: str, folder: Path, server: RunningServer) -> str:
    path = folder / "script.mjs"
    client, address = json.dumps(CLIENT.as_uri()), json.dumps(server.address)
    path.write_text(script.format(client=client, address=address))
    assert NODE is not None
    command = [NODE, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_agrees_with_every_vector() -> None:
    done = run("--vectors", str(VECTORS))
    assert done.returncode == 0, done.stderr[-4000:]
    frames = (VECTORS / "frames.jsonl").read_text().splitlines()
    good = sum('"ok": ' in line for line in frames)
    assert f"{good} good frames, {len(frames) - good} bad frames" in done.stdout
    assert "0 failed" in done.stdout


def test_a_vector_that_is_wrong_is_noticed(tmp_path: Path) -> None:
    for name in ("frames.jsonl", "scripts.jsonl"):
        shutil.copy(VECTORS / name, tmp_path)
    frames = (VECTORS / "frames.jsonl").read_text()
    wrong = frames.replace('"deadline_ms": 30000', '"deadline_ms": 30001')
    wrong = wrong.replace('"name": "BAD_TENSOR", "scope": "stream"', '"scope": "connection"', 1)
    (tmp_path / "frames.jsonl").write_text(wrong)
    done = run("--vectors", str(tmp_path))
    assert done.returncode == 1
    assert "2 failed" in done.stdout
    assert "FAILED req: everything" in done.stderr


def test_it_streams_what_the_oracle_says(server: RunningServer) -> None:
    prompt, seed, count = "Größe 🙂", 7, 40
    params = json.dumps({"max_new_tokens": count, "seed": seed})
    *deltas, last = answer(server, "generate", "oracle", prompt, params)
    tokens = [token for delta in deltas for token in delta["tokens"]]
    assert tokens == expected(prompt, seed, count)
    assert len(deltas) > 1
    assert "".join(delta["text"] for delta in deltas) == last["text"] == oracle_text(tokens)
    assert (last["finish"], last["count"]) == ("length", count)
    usage = {"prompt_tokens": len(prompt.encode()), "completion_tokens": count, "cached_tokens": 0}
    assert last["usage"] == usage


def test_a_long_prompt_travels_beside_the_meta(server: RunningServer) -> None:
    prompt = "é" * 2000
    params = json.dumps({"max_new_tokens": 5, "seed": 1, "wait": True})
    failed = run(server.address, "generate", "oracle", prompt + "é" * 100, params)
    assert "0x0205" in failed.stderr  # 4,200 tokens exceed the oracle's context
    *deltas, _ = answer(server, "generate", "oracle", prompt, params)
    assert [token for delta in deltas for token in delta["tokens"]] == expected(prompt, 1, 5)


def test_it_embeds_as_echo_does(server: RunningServer) -> None:
    texts = ["a", "Größe", "x" * 3000, "y" * 3000]
    vectors = answer(server, "embed", "echo", *texts)
    assert vectors == [echo_embedding(list(text.encode())).tolist() for text in texts]


def test_arrays_come_back_as_they_went(server: RunningServer) -> None:
    inputs = {
        "small": {"dtype": "F32", "shape": [2, 2], "data": [1.5, -2.0, 0.0, 4.0]},
        "large": {"dtype": "I32", "shape": [3, 400], "data": list(range(1200))},
        "wide": {"dtype": "F64", "shape": [500], "data": [i / 8 for i in range(500)]},
        "bytes": {"dtype": "U8", "shape": [0], "data": []},
        "text": "é",
    }
    (outputs,) = answer(server, "infer", "echo", json.dumps(inputs))
    assert outputs == inputs


def test_a_refusal_has_its_number(server: RunningServer) -> None:
    done = run(server.address, "generate", "nobody", "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert "0x0204" in done.stderr


def test_a_server_that_dies_is_no_end(serve: Callable[..., RunningServer]) -> None:
    server = serve("oracle:step_ms=5").ready()
    assert NODE is not None
    command = [NODE, str(CLIENT), server.address, "generate", "oracle", "a"]
    with subprocess.Popen(
        [*command, '{"max_new_tokens": 4000}'],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as client:
        assert client.stdout is not None
        assert json.loads(client.stdout.readline())["index"] == 0
        server.process.kill()
        rest, errors = client.communicate(timeout=WITHIN_S)
    assert client.returncode == 1
    assert "0x0100" in errors
    assert "finish" not in rest


EARLY = """
import {{ Client, WireError }} from {client};
const client = await Client.connect({address});
const generation = client.generate("oracle", "a", {{ max_new_tokens: 4000, seed: 1 }});
for await (const delta of generation) if (delta.index >= 3) break;
let code = 0;
const params = {{ max_new_tokens: 4000, seed: 1 }};
const late = client.generate("oracle", "a", params, {{ timeoutMs: 100 }});
try {{ for await (const _ of late); }} catch (error) {{ code = error.code; }}
const [vector] = await client.embed("echo", ["a"]);
client.close();
console.log(code, late.tokens.length > 0, vector.length);
"""


def test_a_reader_that_stops_and_a_deadline_stop_the_server(
    server: RunningServer, tmp_path: Path
) -> None:
    said = run_script(EARLY, tmp_path, server)
    assert said.split() == [str(0x0408), "true", "8"]


LARGE = """
import {{ Client }} from {client};
const client = await Client.connect({address});
const length = 3 * 2 ** 20 + 5;
const data = Array.from({{ length }}, (_, i) => i % 251);
const {{ x, y }} = await client.infer("echo", {{
  x: {{ dtype: "U8", shape: [length], data }},
  y: {{ dtype: "I32", shape: [2], data: [1, -2] }},
}});
client.close();
console.log(x.data.length === length, x.data.every((byte, i) => byte === data[i]), y.data.join());
"""

# The first two connections break off in the middle of a frame, as soon as the answer has begun.
BROKEN = """
import net from "node:net";
import {{ Client }} from {client};
const [host, port] = {address}.split(":");
let connections = 0;
const between = net.createServer((near) => {{
  const far = net.connect(Number(port), host);
  let left = ++connections > 2 ? Infinity : 1500;
  near.on("error", () => {{}}).on("close", () => far.destroy());
  far.on("error", () => {{}}).on("close", () => near.end());
  near.on("data", (bytes) => far.write(bytes));
  far.on("data", (bytes) => {{
    near.write(bytes.subarray(0, left));
    if ((left -= bytes.length) <= 0) far.destroy();
  }});
}}).listen(0, "127.0.0.1");
await new Promise((resolve) => between.once("listening", resolve));
const client = await Client.connect(`127.0.0.1:${{between.address().port}}`);
const generation = client.generate("oracle", "a", {{ max_new_tokens: 2000, seed: 1 }});
for await (const _ of generation);
client.close();
between.close();
const {{ tokens, text, end }} = generation;
console.log(JSON.stringify({{ connections, tokens, text, count: end.count }}));
"""


def test_a_large_array_goes_and_comes_in_parts(server: RunningServer, tmp_path: Path) -> None:
    assert run_script(LARGE, tmp_path, server).split() == ["true", "true", "1,-2"]


def test_an_answer_outlives_its_connections(server: RunningServer, tmp_path: Path) -> None:
    said = json.loads(run_script(BROKEN, tmp_path, server))
    assert said["connections"] == 3
    assert said["tokens"] == expected("a", 1, 2000)
    assert said["text"] == oracle_text(said["tokens"])
