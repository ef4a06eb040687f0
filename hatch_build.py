"""Compiles the modules named in pyproject.toml into C extensions, where a build asks for it.

    HATCH_BUILD_HOOKS_ENABLE=1 pip install .

Why, and what it costs: docs/decisions/0029-hot-modules-may-be-compiled.md. The sources stay in the
wheel beside the extensions: tracebacks and type checkers read them; Python prefers an extension.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# The library that holds the code of all modules; each module's own extension only points into it.
_GROUP = "tensorwire"


class CompileHotModules(BuildHookInterface[BuilderConfig]):
    """Adds the extensions to a wheel; editable installs stay as they are."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and have the wheel include what came of it and name its platform."""
        if version == "editable":
            return
        self._built = tempfile.TemporaryDirectory()
        sources = [self._source(name) for name in self.config["modules"]]
        # mypy reads the paths in its configuration from here.
        with contextlib.chdir(self.root):
            extensions = _compile(sources, Path(self._built.name))
        build_data["force_include"] |= {str(built): str(at) for at, built in extensions.items()}
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Forget the extensions, which are in the wheel now."""
        if version != "editable":
            self._built.cleanup()

    def _source(self, module: str) -> Path:
        package, *names = module.split(".")
        (folder,) = (
            Path(path) for path in self.build_config.packages if Path(path).name == package
        )
        return folder.joinpath(*names).with_suffix(".py")


def _compile(sources: list[Path], folder: Path) -> dict[Path, Path]:
    """Return the extensions, by their place in the wheel."""
    # Needed by this hook alone, and then only.
    from mypyc.build import mypycify
    from setuptools import Distribution

    extensions = mypycify(
        # As `make check` reads them: what is compiled is what was checked.
        ["--config-file=pyproject.toml", *map(str, sources)],
        opt_level="3",
        group_name=_GROUP,
        target_dir=str(folder / "c"),
    )
    command = Distribution({"ext_modules": extensions}).get_command_obj("build_ext")
    command.build_lib, command.build_temp = str(folder / "lib"), str(folder / "temp")
    command.ensure_finalized()
    command.run()
    return {built.relative_to(folder / "lib"): built for built in map(Path, command.get_outputs())}
