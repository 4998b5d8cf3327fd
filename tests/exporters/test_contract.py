"""What holds for every exporter, whatever its format: what it holds it holds to the bit, all else it refuses whole.

`MEMBERS` says of each how another tool reads its files and which grid forms they hold; the golden artifacts are of
every form, and the educational decoder says what they stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from artifact.educational_decoder import Dense, expand
from artifact.examples import damage, denses, make_artifact, rewrite, save
from artifact.golden_cases import GOLDEN
from safetensors.torch import load_file

import qcompress.exporters
from exporters.members import MEMBERS, Member, read_safetensors
from qcompress.artifact.entry import FORMS, GRIDS
from qcompress.artifact.reader import Artifact, read_artifact
from qcompress.coding.grids import TORCH_DTYPES
from qcompress.compress.export import export, plan_export
from qcompress.errors import ArtifactError, OutputError, QcompressError
from qcompress.registry import EXPORTERS
from qcompress.types.export import ExportPlan

Verb = Callable[..., ExportPlan]
"""Writes an artifact to a path, with `force` or without."""

ALL_FORMS = {*GRIDS, *FORMS} - {"affine"}
BUILT = {name: exporter for name, exporter in EXPORTERS.items() if exporter.target is not None}
ARTIFACTS = {path.stem: path for path in GOLDEN.glob("*.safetensors")} | {"folder": GOLDEN / "folder"}

each_exporter = pytest.mark.parametrize("name", sorted(BUILT))


def verb_of(name: str) -> Verb:
    return partial(export, to=name)


def forms(artifact: Artifact) -> dict[str, str]:
    """Compressed tensor -> its form, of an affine one what places its grid."""
    entries = {name: entry for file in artifact.files for name, entry in file.manifest.tensors.items()}
    return {name: str(entry.grid) if entry.form == "affine" else entry.form for name, entry in entries.items()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_exporter_is_a_member_a_file_and_a_function() -> None:
    folder = Path(qcompress.exporters.__file__).parent
    files = {path.stem for path in folder.glob("*.py")}
    assert set(MEMBERS) == set(BUILT), "give MEMBERS what the contract needs to know of each exporter"
    for name, exporter in EXPORTERS.items():
        assert exporter.name == name
        assert exporter.suffix.startswith(".")
    for exporter in BUILT.values():
        assert (exporter.target or "").split(":")[0].removeprefix("qcompress.exporters.") in files
        assert callable(exporter.load())


def test_the_artifacts_are_of_every_form_and_say_what_is_tied_and_kept() -> None:
    artifacts = [read_artifact(path) for path in ARTIFACTS.values()]
    assert {form for artifact in artifacts for form in forms(artifact).values()} == ALL_FORMS
    assert any(artifact.tied for artifact in artifacts)
    assert {info.dtype for artifact in artifacts for file in artifact.files for info in file.kept} >= {
        "BOOL", "F16", "F32", "F8_E4M3", "I64",
    }  # fmt: skip


def assert_refuses(verb: Verb, path: Path, folder: Path, match: str) -> None:
    """It is refused before anything is written: whoever touched the disk would fail for want of the folder."""
    with pytest.raises(ArtifactError, match=match):
        verb(read_artifact(path), folder / "missing" / "out", force=False)


def assert_holds(verb: Verb, member: Member, path: Path, folder: Path) -> None:
    """The export stands for what the artifact does, in as many bytes as were promised, and always in the same."""
    artifact = read_artifact(path)
    output = folder / ("out" if member.writes_folder(path) else "out.bin")
    plan = verb(artifact, output, force=False)
    assert plan.n_bytes == sum(map(len, files_of(folder).values()))
    if plan.folder:
        assert plan.sizes == {name: len(data) for name, data in files_of(output).items()}
    assert [one.name for one in folder.iterdir()] == [output.name]
    read, expected = dict(member.read(output)), expand(path)
    # What the consumer ties by itself may be left out.
    read |= {name: read[twin] for name, twin in artifact.tied.items() if name not in read and name in expected}
    assert read.keys() == expected.keys()
    for name, dense in expected.items():
        found = denses({name: read[name]})[name]
        assert found == dense or (not member.signs and differ_in_signs_of_zeros(found, dense)), name
    before = files_of(folder)
    verb(artifact, output, force=True)
    assert files_of(folder) == before, "equal inputs give equal bytes"


def differ_in_signs_of_zeros(one: Dense, other: Dense) -> bool:
    """Whether all values of two float tensors are equal."""
    values = [torch.frombuffer(bytearray(each.data), dtype=TORCH_DTYPES[each.dtype]) for each in (one, other)]
    return one[:2] == other[:2] and torch.equal(*values)


def assert_holds_or_refuses(verb: Verb, member: Member, path: Path, folder: Path) -> None:
    lacking = [name for name, form in forms(read_artifact(path)).items() if form not in member.holds]
    if member.refuses(path):
        assert_refuses(verb, path, folder, member.refuses(path))
    elif lacking:
        assert_refuses(verb, path, folder, "|".join(lacking))
    else:
        assert_holds(verb, member, path, folder)


@each_exporter
@pytest.mark.parametrize("case", sorted(ARTIFACTS))
def test_what_is_held_is_held_to_the_bit_and_all_else_is_refused(name: str, case: str, tmp_path: Path) -> None:
    assert_holds_or_refuses(verb_of(name), MEMBERS[name], ARTIFACTS[case], tmp_path)


@pytest.mark.parametrize(("name", "case"), [(name, case) for name in sorted(BUILT) for case in MEMBERS[name].cases])
def test_cases_of_its_own_are_held_to_the_bit(name: str, case: str, tmp_path: Path) -> None:
    (tmp_path / "exported").mkdir()
    path = MEMBERS[name].cases[case](tmp_path)
    before = files_of(tmp_path)
    plan = plan_export(read_artifact(path), name)
    assert files_of(tmp_path) == before, "a plan writes nothing"
    assert_holds(verb_of(name), MEMBERS[name], path, tmp_path / "exported")
    assert plan.sizes == plan_export(read_artifact(path), name).sizes


def assert_respects_what_is_there(verb: Verb, member: Member, folder: Path) -> None:
    """An existing output stays without force, and with it is replaced only by a whole one; the artifact never is."""
    path = member.make(folder)
    artifact, output = read_artifact(path), folder / "out.bin"
    if member.writes_folder(path):
        output.mkdir()
    there = output / "old.safetensors" if member.writes_folder(path) else output
    there.write_bytes(b"the user's")
    before = files_of(folder)
    with pytest.raises(OutputError):
        verb(artifact, output, force=False)
    with pytest.raises(OutputError):
        verb(artifact, path, force=True)
    assert files_of(folder) == before
    verb(artifact, output, force=True)
    assert there not in folder.rglob("*") or there.read_bytes() != b"the user's"
    assert {one.name for one in folder.iterdir()} == {Path(name).parts[0] for name in before}


@each_exporter
def test_an_existing_output_is_kept_without_force(name: str, tmp_path: Path) -> None:
    assert_respects_what_is_there(verb_of(name), MEMBERS[name], tmp_path)


def assert_all_or_nothing(verb: Verb, member: Member, folder: Path) -> None:
    """An export that fails on its way leaves the folder as it was."""
    path = member.make(folder)
    name = next(iter(forms(read_artifact(path))))
    file = next(iter(read_artifact(path).files)).path
    damage(file, f"{name}.qc.codes")
    (folder / "old.safetensors").write_bytes(b"the user's")
    before = sorted(folder.iterdir()), files_of(folder)
    for output in ("new.bin", "old.safetensors"):
        with pytest.raises(QcompressError):
            verb(read_artifact(path), folder / output, force=output == "old.safetensors")
        assert (sorted(folder.iterdir()), files_of(folder)) == before
    with pytest.raises(ArtifactError, match=name):
        verb(read_artifact(path), folder / "new.bin", force=False)


@each_exporter
def test_a_failed_export_leaves_nothing(name: str, tmp_path: Path) -> None:
    assert_all_or_nothing(verb_of(name), MEMBERS[name], tmp_path)


@each_exporter
def test_bounds_of_outputs_are_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    path = rewrite(make_artifact(tmp_path), lambda _, manifest, __: manifest.update(caps={"relu": [1.0, 2.0]}))
    assert_refuses(verb_of(name), path, tmp_path, "1 modules|folder")


def dense(artifact: Artifact, output: Path, force: bool) -> ExportPlan:
    return export(artifact, output, force=force)


def lossy(artifact: Artifact, output: Path, *, force: bool) -> ExportPlan:
    """Loses what float16 cannot hold."""
    plan = dense(artifact, output, force)
    save(output, {name: value.half().to(value.dtype) for name, value in load_file(output).items()})
    return plan


def forgetful(artifact: Artifact, output: Path, *, force: bool) -> ExportPlan:
    """Loses a tensor."""
    plan = dense(artifact, output, force)
    save(output, {name: value for name, value in load_file(output).items() if name != "v"})
    return plan


def careless(artifact: Artifact, output: Path, *, force: bool) -> ExportPlan:
    """Replaces whatever is there."""
    return dense(artifact, output, True)


def hasty(artifact: Artifact, output: Path, *, force: bool) -> ExportPlan:
    """Writes before it knows that it can."""
    output.with_suffix(".started").touch()
    return dense(artifact, output, force)


def holds(verb: Verb, folder: Path) -> None:
    (folder / "exported").mkdir()
    assert_holds_or_refuses(verb, MEMBERS["safetensors"], make_artifact(folder), folder / "exported")


def refuses(verb: Verb, folder: Path) -> None:
    few = Member(read_safetensors, MEMBERS["safetensors"].holds - {"zero-point"})
    assert_holds_or_refuses(verb, few, make_artifact(folder), folder)


def respects(verb: Verb, folder: Path) -> None:
    assert_respects_what_is_there(verb, MEMBERS["safetensors"], folder)


def all_or_nothing(verb: Verb, folder: Path) -> None:
    assert_all_or_nothing(verb, MEMBERS["safetensors"], folder)


@pytest.mark.parametrize(
    ("verb", "check", "error"),
    [
        (lossy, holds, AssertionError),
        (forgetful, holds, AssertionError),
        (hasty, holds, AssertionError),
        (careless, refuses, QcompressError),
        (careless, respects, pytest.fail.Exception),
        (hasty, respects, AssertionError),
        (hasty, all_or_nothing, AssertionError),
    ],
)
def test_an_exporter_that_is_not_whole_fails(
    verb: Verb, check: Callable[[Verb, Path], None], error: type[BaseException], tmp_path: Path
) -> None:
    with pytest.raises(error):
        check(verb, tmp_path)


def test_a_new_exporter_without_a_member_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILT, "onnx", EXPORTERS["onnx"])
    with pytest.raises(AssertionError, match="give MEMBERS"):
        test_every_exporter_is_a_member_a_file_and_a_function()
