"""`embed` and `infer`: what makes arrays."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorwire.cli import options, output

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SHOWN_VALUES = 4
_SHOWN_TEXT = 40
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


def register(app: typer.Typer) -> None:
    """Add these commands."""
    for command in (embed, infer):
        app.command()(command)


def embed(
    model: options.Model,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help='"-": stdin, by line.')],
    similarity: Annotated[
        bool, typer.Option("--similarity", help="Print the cosine of each pair instead.")
    ] = False,
    timeout: options.Timeout = 300.0,
    no_wait: options.NoWait = False,
    address: options.Address = None,
    as_json: options.AsJson = False,
) -> None:
    """Print texts as vectors, or how alike they are."""
    listed = options.text_or_stdin("-").splitlines() if texts == ["-"] else texts
    with options.client(address, timeout) as client:
        vectors = client.embed(model, listed, **options.given(no_wait=no_wait))
    if similarity:
        _print_similarity(listed, vectors, as_json)
    elif as_json:
        output.print_json({"shape": list(vectors.shape), "embeddings": vectors.tolist()})
    else:
        size = vectors.shape[1]
        heads = [[f"{v:.4f}" for v in row[:_SHOWN_VALUES]] for row in vectors.tolist()]
        dots = [" …"] if size > _SHOWN_VALUES else [""]
        rows = [
            (_short(text), size, " ".join(head) + dots[0])
            for text, head in zip(listed, heads, strict=True)
        ]
        output.print_table(["text", "size", "vector"], rows)


def _print_similarity(texts: list[str], vectors: "NDArray[np.float32]", as_json: bool) -> None:
    import numpy as np

    norms = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    units = vectors / norms
    cosines = (units @ units.T).tolist()
    if as_json:
        output.print_json({"similarity": cosines})
        return
    columns = ["", "text", *(str(i + 1) for i in range(len(texts)))]
    rows = [
        (i + 1, _short(text), *(f"{c:z.3f}" for c in cosines[i])) for i, text in enumerate(texts)
    ]
    output.print_table(columns, rows)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_TEXT else line[: _SHOWN_TEXT - 1] + "…"


def infer(
    model: options.Model,
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input",
            "-i",
            metavar="NAME=FILE.npy",
            help="An input, or NAME=text:… for a text; may be repeated.",
        ),
    ],
    folder: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Save each output there as NAME.npy."),
    ] = None,
    timeout: options.Timeout = 300.0,
    no_wait: options.NoWait = False,
    address: options.Address = None,
    as_json: options.AsJson = False,
) -> None:
    """Run a model on arrays."""
    arrays = dict(_read_input(given) for given in inputs)
    with options.client(address, timeout) as client:
        outputs = client.infer(model, arrays, **options.given(no_wait=no_wait))
    if folder is not None:
        _save(outputs, folder)
    described = {name: _described(value) for name, value in outputs.items()}
    if as_json:
        output.print_json(described)
        return
    for name, facts in described.items():
        typer.echo(f"{name}: {facts['dtype']} {facts['shape']}")
        if folder is None:
            typer.echo(str(_numpy(outputs[name])))


def _read_input(given: str) -> tuple[str, Any]:
    import numpy as np

    name, equals, value = given.partition("=")
    if not (name and equals and value):
        raise typer.BadParameter(f"--input must be NAME=FILE.npy or NAME=text:…, not {given!r}")
    if value.startswith("text:"):
        return name, value.removeprefix("text:")
    try:
        return name, np.load(value, allow_pickle=False)
    except OSError as error:
        why = error.strerror or str(error)
        raise typer.BadParameter(f"cannot read {value!r}: {why}") from error
    except ValueError as error:
        raise typer.BadParameter(f"{value!r} is not a .npy file of numbers") from error


def _numpy(value: Any) -> Any:
    return getattr(value, "bits", value)


def _described(value: Any) -> dict[str, Any]:
    array = _numpy(value)
    if not hasattr(array, "tolist"):
        return {"dtype": "text", "shape": [], "data": value}
    dtype = value.dtype if isinstance(value.dtype, str) else value.dtype.name
    return {"dtype": dtype, "shape": list(array.shape), "data": array.tolist()}


def _save(outputs: dict[str, Any], folder: Path) -> None:
    import numpy as np

    # The server chose the names: none of them may lead out of the folder.
    wrong = next((name for name in outputs if not _FILE_NAME.fullmatch(name)), None)
    if wrong is not None:
        raise typer.BadParameter(f"the output {wrong!r} cannot be a file's name; use --json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in outputs.items():
            np.save(folder / f"{name}.npy", _numpy(value), allow_pickle=False)
    except OSError as error:
        raise typer.BadParameter(f"cannot write to {str(folder)!r}: {error.strerror}") from error
