"""What is written: the parent's names and companions, whole or not at all."""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import models_zoo
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensorwire_server.compress.parent import load_parent
from tensorwire_server.compress.quantize import quantize_model
from tensorwire_server.compress.recipe import Quantization
from tensorwire_server.compress.saving import (
    OutputError,
    check_place,
    output_folder,
    write_model,
    writing,
)
from tensorwire_server.engine.errors import ModelLoadError
from tensorwire_server.engine.quantized import PARTS

from .demo_text import DEMO
from .interrupting import InterruptAt


def names_in(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("quantization", [None, Quantization(bits=8)], ids=["pruned", "int8"])
def test_the_file_holds_the_names_of_the_parent_and_a_tied_head_is_stored_once(
    tmp_path: Path, quantization: Quantization | None
) -> None:
    parent = load_parent(str(DEMO))
    weights = quantize_model(parent.model, quantization).weights if quantization else {}
    write_model(parent, weights, quantization, tmp_path)
    kept = names_in(DEMO) - {f"{name}.weight" for name in weights}
    assert names_in(tmp_path) == kept | {f"{name}.{part}" for name in weights for part in PARTS}
    if not weights:
        sizes = [(folder / "model.safetensors").stat().st_size for folder in (DEMO, tmp_path)]
        assert sizes[0] == sizes[1]


# --- The folder.


def fill(out: Path) -> None:
    with output_folder(out) as folder, writing(out):
        (folder / "a").mkdir()
        (folder / "a" / "b").write_text("b")


class Undone(Exception):
    """A block of a test does not end well."""


def give_up(out: Path, error: type[BaseException]) -> None:
    with output_folder(out) as folder:
        (folder / "file").touch()
        raise error


def interrupted(out: Path, interrupt: InterruptAt) -> bool:
    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        fill(out)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_interrupt_at_any_line_leaves_all_or_nothing(tmp_path: Path) -> None:
    out, whole, line = tmp_path / "out", 0, 0
    while True:
        line += 1
        interrupt = InterruptAt(line, "compress/saving.py", "compress/interrupts.py")
        caught = interrupted(out, interrupt)
        if interrupt.left > 0:
            break  # there are no more lines
        assert caught, line
        assert [path.name for path in tmp_path.iterdir()] in ([], ["out"]), line
        if out.exists():
            assert (out / "a" / "b").read_text() == "b"
            whole += 1
            shutil.rmtree(out)
    assert line - whole > 40
    assert whole  # once it has its name, it is whole


def test_a_second_interrupt_does_not_keep_the_first_from_tidying_up(tmp_path: Path) -> None:
    for line in (1, 10, 20):
        interrupt = InterruptAt(line, "/shutil.py")
        sys.settrace(interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                give_up(tmp_path / "out", KeyboardInterrupt)
        finally:
            sys.settrace(None)
        assert interrupt.left <= 0, "nothing was interrupted"
        assert list(tmp_path.iterdir()) == []


def test_what_was_killed_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    names = (".ke*.12.partial", ".kept.12.partial", ".ke*.mine")
    for name in names:
        (tmp_path / name).mkdir()
    with output_folder(tmp_path / "ke*") as first:
        (first / "file").touch()
        with pytest.raises(Undone):
            give_up(tmp_path / "ke*", Undone)
        assert (first / "file").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".ke*.mine",
        ".kept.12.partial",
        "ke*",
    ]


def test_many_at_once_do_not_take_each_others_folders(tmp_path: Path) -> None:
    def work(_: int) -> None:
        for _ in range(30):
            with suppress(Undone):
                give_up(tmp_path / "out", Undone)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_is_not_of_the_disk_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConnectionRefusedError):
        give_up(tmp_path / "out", ConnectionRefusedError)


def test_places_where_no_folder_can_be_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for out, said in {
        "file": "is there already",
        "link": "is there already",
        "dangling": "is there already",
        "file/below": "'.*file' is no folder",
        "file/far/below": "'.*file' is no folder",
        "n" * 300: "File name too long",
    }.items():
        with pytest.raises(OutputError, match=said):
            check_place(tmp_path / out)
    check_place(tmp_path / "empty")
    check_place(tmp_path / "new" / "folder")


# --- The parent.


def broken_copy(to: Path, **changes: Any) -> Path:
    shutil.copytree(models_zoo.tiny_model("llama"), to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | changes))
    return to


def test_a_folder_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    cut = broken_copy(tmp_path / "cut")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    unknown = broken_copy(tmp_path / "unknown", model_type="never-heard-of")
    endless = broken_copy(tmp_path / "endless")
    tensors = load_file(endless / "model.safetensors")
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[name][3, 5] = float("nan")
    save_file(tensors, endless / "model.safetensors", metadata={"format": "pt"})
    for folder, said in {cut: "cannot compress", unknown: "cannot compress", endless: name}.items():
        with pytest.raises(ModelLoadError, match=said) as caught:
            load_parent(str(folder))
        assert "\n" not in str(caught.value)


def test_companions_are_what_a_model_needs_and_no_file_of_this_machine(tmp_path: Path) -> None:
    folder = broken_copy(tmp_path / "model")
    for name in ("LICENSE", "README.md", "pytorch_model.bin", ".hidden.json", "notes.py"):
        (folder / name).touch()
    (folder / "inner").mkdir()
    (folder / "inner" / "vocabulary.txt").touch()
    (folder / "alias.txt").symlink_to("inner/vocabulary.txt")
    found = {str(name) for name in load_parent(str(folder)).companions}
    assert {"LICENSE", "inner/vocabulary.txt", "alias.txt", "tokenizer.json"} <= found
    assert not found & {"README.md", "pytorch_model.bin", ".hidden.json", "notes.py"}
    assert not any(name.endswith(".safetensors") for name in found)
    (tmp_path / "secret").write_text("secret")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelLoadError, match=r"its notes\.txt is a link that leads out"):
        load_parent(str(folder))


def test_links_within_the_cache_of_the_hub_are_followed(tmp_path: Path) -> None:
    files = broken_copy(tmp_path / "hub" / "blobs")
    snapshot = tmp_path / "hub" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for file in files.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert Path("tokenizer.json") in load_parent(str(snapshot)).companions
