"""The wheel without extras: msgpack and numpy beside it, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .serving import expected

if TYPE_CHECKING:
    from .serving import RunningServer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
_PIP_S = 60.0


def _run(*words: object, cwd: Path, within_s: float = _PIP_S) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TENSORWIRE_"))}
    ran = subprocess.run(
        list(map(str, words)), cwd=cwd, env=kept, capture_output=True, text=True, timeout=within_s
    )
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The distribution, built with what is installed here: nothing is downloaded."""
    out = tmp_path_factory.mktemp("wheel")
    words = ("-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT)
    _run(sys.executable, *words, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def thin_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the base install only, as pinned."""
    folder = tmp_path_factory.mktemp("thin") / "env"
    _run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    pins = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.startswith(("msgpack==", "numpy=="))
    ]
    assert len(pins) == 2
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    _run(*pip, "install", "-q", "--no-deps", wheel, *pins, cwd=folder.parent)
    return python


def test_the_wheel_holds_the_three_packages_and_their_type_markers(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    version = wheel.name.split("-")[1]
    packages = {"tensorwire", "tensorwire_protocol", "tensorwire_server"}
    assert tops == packages | {f"tensorwire-{version}.dist-info"}
    assert {f"{package}/py.typed" for package in packages} <= set(names)
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]


def test_the_base_install_needs_msgpack_and_numpy_only(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    needs = [
        line.removeprefix("Requires-Dist: ")
        for line in archive.read(metadata).decode().splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]
    assert sorted(need.split(">")[0] for need in needs) == ["msgpack", "numpy"]


def test_the_base_install_talks_to_a_server_without_torch(
    thin_python: Path, server: RunningServer, tmp_path: Path
) -> None:
    code = f"""
import asyncio, sys
import tensorwire
with tensorwire.Client({server.address!r}) as client:
    made = client.generate("oracle", "thin", seed=1, max_new_tokens=5)
    assert client.infer("echo", {{"x": [1, 2]}})["x"].tolist() == [1, 2]
async def main():
    async with tensorwire.AsyncClient({server.address!r}) as client:
        return await client.generate("oracle", "thin", seed=1, max_new_tokens=5)
assert asyncio.run(main()).token_ids == made.token_ids
assert not {{"torch", "transformers", "msgspec", "uvloop", "typer"}} & set(sys.modules)
print(made.token_ids)
"""
    answer = _run(thin_python, "-c", code, cwd=tmp_path)
    assert answer.strip() == str(expected("thin", 1, 5))


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_without_its_extra_a_command_says_in_one_line_what_to_install(
    thin_python: Path, tmp_path: Path, command: str
) -> None:
    ran = subprocess.run(
        [thin_python, "-m", "tensorwire", command],
        cwd=tmp_path, capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: ")
    assert "pip install" in line
    assert "tensorwire[" in line
