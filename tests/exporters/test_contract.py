"""What holds for every exporter, whatever its format: what it holds it holds to the bit, all else it refuses whole.

`MEMBERS` says of each how another tool reads its files and which grid forms they hold; the golden artifacts are of
every form, and the educational decoder says what they stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from artifact.educational_decoder import Dense, expand
from artifact.examples import damage, denses, make_artifact, rewrite, save
from artifact.golden_cases import GOLDEN
from safetensors.torch import load_file
from torch import Tensor

import qcompress.exporters
from qcompress.artifact.entry import FORMS, GRIDS
from qcompress.artifact.reader import Artifact, read_artifact
from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.errors import ArtifactError, OutputError, ResourceError
from qcompress.registry import EXPORTERS

Export = Callable[..., int]


@dataclass(frozen=True)
class Member:
    """What the contract cannot know of an exporter.

    read   the tensors of an exported file or folder as the consumer decodes them, tied names included
    holds  the grid forms that its files hold exactly
    """

    read: Callable[[Path], Mapping[str, Tensor]]
    holds: frozenset[str]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor by the safetensors library; a tied name that is not stored is in config.json or in the metadata."""
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        found |= load_file(file)
    return found | {name: found[twin] for name, twin in read_checkpoint(path).tied.items()}


ALL_FORMS = {*GRIDS, *FORMS} - {"affine"}
MEMBERS = {"safetensors": Member(read_safetensors, frozenset(ALL_FORMS))}

BUILT = {name: exporter for name, exporter in EXPORTERS.items() if exporter.target is not None}
ARTIFACTS = {path.stem: path for path in GOLDEN.glob("*.safetensors")} | {"folder": GOLDEN / "folder"}

each_exporter = pytest.mark.parametrize("name", sorted(BUILT))


def forms(artifact: Artifact) -> dict[str, str]:
    """Compressed tensor -> its form, of an affine one what places its grid."""
    entries = {name: entry for file in artifact.files for name, entry in file.manifest.tensors.items()}
    return {name: str(entry.grid) if entry.form == "affine" else entry.form for name, entry in entries.items()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_exporter_is_a_member_a_file_and_a_function() -> None:
    folder = Path(qcompress.exporters.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert set(MEMBERS) == set(BUILT), "give MEMBERS what the contract needs to know of each exporter"
    assert {(exporter.target or "").split(":")[0] for exporter in BUILT.values()} == {
        f"qcompress.exporters.{file}" for file in files
    }
    for name, exporter in EXPORTERS.items():
        assert exporter.name == name
        assert exporter.suffix.startswith(".")
    for exporter in BUILT.values():
        assert callable(exporter.load())


def test_the_artifacts_are_of_every_form_and_say_what_is_tied_and_kept() -> None:
    artifacts = [read_artifact(path) for path in ARTIFACTS.values()]
    assert {form for artifact in artifacts for form in forms(artifact).values()} == ALL_FORMS
    assert any(artifact.tied for artifact in artifacts)
    assert {info.dtype for artifact in artifacts for file in artifact.files for info in file.kept} >= {
        "BOOL", "F16", "F32", "F8_E4M3", "I64",
    }  # fmt: skip


def assert_holds_or_refuses(export: Export, member: Member, path: Path, folder: Path) -> None:
    """The export stands for what the artifact does, or is refused by a tensor's name before anything is written."""
    artifact = read_artifact(path)
    lacking = [name for name, form in forms(artifact).items() if form not in member.holds]
    if lacking:
        # Whoever touched the disk would fail for want of the folder.
        with pytest.raises(ArtifactError, match="|".join(map(repr, lacking))):
            export(artifact, folder / "missing" / "out", force=False)
        return
    output = folder / ("out" if path.is_dir() else "out.bin")
    n_bytes = export(artifact, output, force=False)
    assert n_bytes == sum(map(len, files_of(folder).values()))
    assert [one.name for one in folder.iterdir()] == [output.name]
    found, expected = denses(member.read(output)), expand(path)
    assert found.keys() == expected.keys()
    for name, dense in expected.items():
        assert found[name] == Dense(dense.dtype, dense.shape, dense.data), name
    before = files_of(folder)
    export(artifact, output, force=True)
    assert files_of(folder) == before, "equal inputs give equal bytes"


@each_exporter
@pytest.mark.parametrize("case", sorted(ARTIFACTS))
def test_what_is_held_is_held_to_the_bit_and_all_else_is_refused(name: str, case: str, tmp_path: Path) -> None:
    assert_holds_or_refuses(BUILT[name].load(), MEMBERS[name], ARTIFACTS[case], tmp_path)


def assert_respects_what_is_there(export: Export, folder: Path) -> None:
    """An existing output stays without force, and with it is replaced only by a whole one; the artifact never is."""
    path = make_artifact(folder)
    artifact, output = read_artifact(path), folder / "out.bin"
    output.write_bytes(b"the user's")
    before = files_of(folder)
    with pytest.raises(OutputError):
        export(artifact, output, force=False)
    with pytest.raises(OutputError):
        export(artifact, path, force=True)
    assert files_of(folder) == before
    export(artifact, output, force=True)
    assert files_of(folder).keys() == before.keys()
    assert output.read_bytes() != b"the user's"


@each_exporter
def test_an_existing_output_is_kept_without_force(name: str, tmp_path: Path) -> None:
    assert_respects_what_is_there(BUILT[name].load(), tmp_path)


def assert_all_or_nothing(export: Export, folder: Path) -> None:
    """An export that fails on its way leaves the folder as it was."""
    path = make_artifact(folder)
    damage(path, "w.qc.codes")
    (folder / "old.bin").write_bytes(b"the user's")
    before = sorted(folder.iterdir()), files_of(folder)
    for output, force in (("new.bin", False), ("old.bin", True)):
        with pytest.raises(ArtifactError, match="'w'"):
            export(read_artifact(path), folder / output, force=force)
        assert (sorted(folder.iterdir()), files_of(folder)) == before


@each_exporter
def test_a_failed_export_leaves_nothing(name: str, tmp_path: Path) -> None:
    assert_all_or_nothing(BUILT[name].load(), tmp_path)


@each_exporter
def test_bounds_of_outputs_are_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    path = rewrite(make_artifact(tmp_path), lambda _, manifest, __: manifest.update(caps={"relu": [1.0, 2.0]}))
    with pytest.raises(ArtifactError, match="1 modules"):
        BUILT[name].load()(read_artifact(path), tmp_path / "missing" / "out", force=False)


def dense(artifact: Artifact, output: Path, force: bool) -> None:
    BUILT["safetensors"].load()(artifact, output, force=force)


def lossy(artifact: Artifact, output: Path, *, force: bool) -> int:
    """Loses what float16 cannot hold."""
    dense(artifact, output, force)
    save(output, {name: value.half().to(value.dtype) for name, value in load_file(output).items()})
    return output.stat().st_size


def forgetful(artifact: Artifact, output: Path, *, force: bool) -> int:
    """Loses a tensor."""
    dense(artifact, output, force)
    save(output, {name: value for name, value in load_file(output).items() if name != "v"})
    return output.stat().st_size


def careless(artifact: Artifact, output: Path, *, force: bool) -> int:
    """Replaces whatever is there."""
    dense(artifact, output, True)
    return output.stat().st_size


def hasty(artifact: Artifact, output: Path, *, force: bool) -> int:
    """Writes before it knows that it can."""
    output.with_suffix(".started").touch()
    dense(artifact, output, force)
    return output.stat().st_size


def holds(export: Export, folder: Path) -> None:
    (folder / "exported").mkdir()
    assert_holds_or_refuses(export, MEMBERS["safetensors"], make_artifact(folder), folder / "exported")


def refuses(export: Export, folder: Path) -> None:
    few = Member(read_safetensors, MEMBERS["safetensors"].holds - {"zero-point"})
    assert_holds_or_refuses(export, few, make_artifact(folder), folder)


@pytest.mark.parametrize(
    ("export", "check", "error"),
    [
        (lossy, holds, AssertionError),
        (forgetful, holds, AssertionError),
        (hasty, holds, AssertionError),
        (careless, refuses, ResourceError),
        (careless, assert_respects_what_is_there, pytest.fail.Exception),
        (hasty, assert_respects_what_is_there, AssertionError),
        (hasty, assert_all_or_nothing, AssertionError),
    ],
)
def test_an_exporter_that_is_not_whole_fails(
    export: Export, check: Callable[[Export, Path], None], error: type[BaseException], tmp_path: Path
) -> None:
    with pytest.raises(error):
        check(export, tmp_path)


def test_a_new_exporter_without_a_member_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILT, "gguf", EXPORTERS["gguf"])
    with pytest.raises(AssertionError, match="give MEMBERS"):
        test_every_exporter_is_a_member_a_file_and_a_function()
