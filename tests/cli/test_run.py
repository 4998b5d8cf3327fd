"""Where results go, what is never overwritten, and what decides: flags, environment, recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run, files_under, small_tensors, write_checkpoint
from safetensors.numpy import load_file, save_file

from qcompress.artifact.reader import read_artifact

RECIPE = """
version: 1
seed: 5
rules:
  - {match: "fc.weight", keep: {}}
  - {match: "*.weight", rtn: {bits: 4}}
gates: {max_size: 1MB}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


def resolved(artifact: Path) -> dict[str, object]:
    """The recipe that an artifact's manifest holds."""
    return dict(read_artifact(artifact).files[0].manifest.recipe)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--bits", 2], "model-w2.safetensors"),
        (["--bits", 8, "--method", "rtn"], "model-w8.safetensors"),
        (["-r", "RECIPE"], "model-small.safetensors"),
        (["-r", "-"], "model-recipe.safetensors"),
        (["--bits", 2, "-o", "OTHER"], "other.name"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_the_output_lies_beside_the_input_and_the_report_beside_it(
    run: Run, checkpoint: Path, recipe: Path, arguments: list[object], name: str
) -> None:
    places = {"RECIPE": recipe, "OTHER": checkpoint.with_name("other.name")}
    output = checkpoint.with_name(name)
    before = files_under(checkpoint.parent)
    words = [places.get(str(argument), argument) for argument in arguments]
    ran = run("quantize", checkpoint, *words, "-q", stdin=RECIPE)
    assert (ran.code, ran.out) == (0, f"{output}\n")
    report = f"{name.removesuffix('.safetensors')}.report.json"
    after = files_under(checkpoint.parent)
    assert set(after) - set(before) == {name, report}
    assert {path: after[path] for path in before} == before
    assert json.loads(after[report])["size"]["artifact_bytes"] == len(after[name])


def test_a_folder_gives_a_folder_with_its_companions(run: Run, sharded: Path) -> None:
    ran = run("quantize", sharded, "--bits", 4, "-q")
    output = sharded.with_name("network-w4")
    assert (ran.code, ran.out) == (0, f"{output}\n")
    companions = {"config.json", "tokenizer.json"}
    weights = {name.replace("model", "model.qcompress", 1) for name in set(files_under(sharded)) - companions}
    assert set(files_under(output)) == weights | companions
    assert (output / "tokenizer.json").read_bytes() == (sharded / "tokenizer.json").read_bytes()
    config = json.loads((output / "config.json").read_text())
    index = "model.qcompress.safetensors.index.json"
    assert config.pop("quantization_config") == {"quant_method": "qcompress", "weights": index}
    assert config == json.loads((sharded / "config.json").read_text())
    report = json.loads(sharded.with_name("network-w4.report.json").read_text())
    shards = [*output.glob("*.safetensors"), output / "model.qcompress.safetensors.index.json"]
    assert report["size"]["artifact_bytes"] == sum(path.stat().st_size for path in shards)
    assert run("verify", output).code == 0


def test_a_folder_with_a_slash_and_the_folder_itself(run: Run, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("quantize", f"{sharded}/", "--bits", 4, "-q").out == f"{sharded}-w4\n"
    monkeypatch.chdir(sharded)
    assert run("quantize", ".", "--bits", 3, "-q").out == f"{sharded}-w3\n"


def test_a_dry_run_writes_nothing_and_tells_the_size_to_the_byte(run: Run, checkpoint: Path) -> None:
    before = files_under(checkpoint.parent)
    arguments = ["quantize", checkpoint, "--bits", 3, "--coding", "packed"]
    plan = json.loads(run(*arguments, "--dry-run", "--json", "-").out)
    assert files_under(checkpoint.parent) == before
    assert run(*arguments).code == 0
    assert plan["exact"] is True
    assert Path(plan["output"]).stat().st_size == plan["artifact_bytes"]
    stored = load_file(plan["output"])
    for tensor in plan["tensors"]:
        own = [data.nbytes for name, data in stored.items() if name.startswith((f"{tensor['name']}.qc.",))]
        assert tensor["bytes"] == (sum(own) or stored[tensor["name"]].nbytes)


@pytest.mark.parametrize("coding", ["auto", "zstd", "ans"])
def test_a_dry_run_bounds_what_entropy_coding_needs(run: Run, checkpoint: Path, coding: str) -> None:
    arguments = ["quantize", checkpoint, "--bits", 3, "--coding", coding]
    plan = json.loads(run(*arguments, "-n", "--json", "-").out)
    assert plan["exact"] is False
    assert run(*arguments).code == 0
    assert Path(plan["output"]).stat().st_size <= plan["artifact_bytes"]


def test_the_plan_says_what_happens_to_every_tensor_and_why(run: Run, checkpoint: Path, recipe: Path) -> None:
    ran = run("quantize", checkpoint, "-r", recipe, "--dry-run")
    assert ran.code == 0
    lines = {line.split()[0]: line for line in ran.out.splitlines() if line}
    assert set(small_tensors()) <= set(lines)
    assert "rtn" in lines["layer.weight"]
    assert "small.yaml:6: rules[1].rtn" in lines["layer.weight"]
    assert "kept" in lines["fc.weight"]
    assert "rules[0]" in lines["fc.weight"]
    assert "no rule matches" in lines["fc.bias"]


def test_an_existing_output_is_refused_and_kept(run: Run, checkpoint: Path) -> None:
    output = checkpoint.with_name("model-w2.safetensors")
    output.write_bytes(b"precious")
    ran = run("quantize", checkpoint, "--bits", 2)
    assert (ran.code, ran.out) == (3, "")
    assert ran.err == f"error: {output}: exists already; choose another -o, or replace it with --force\n"
    assert set(files_under(checkpoint.parent)) == {"model.safetensors", output.name}
    assert output.read_bytes() == b"precious"


def test_force_replaces_a_file_and_its_report(run: Run, checkpoint: Path) -> None:
    assert run("quantize", checkpoint, "--bits", 2).code == 0
    output = checkpoint.with_name("model-w2.safetensors")
    assert run("quantize", checkpoint, "--bits", 7, "-o", output, "--force").code == 0
    report = json.loads(output.with_name("model-w2.report.json").read_text())
    assert {layer["bits"] for layer in report["layers"]} == {7, None}
    assert run("verify", output).code == 0


def test_force_replaces_a_folder(run: Run, sharded: Path) -> None:
    assert run("quantize", sharded, "--bits", 2).code == 0
    output = sharded.with_name("network-w2")
    (output / "left.over").write_text("")
    assert run("quantize", sharded, "--bits", 3, "-o", output, "-f").code == 0
    assert not (output / "left.over").exists()
    assert run("verify", output).code == 0
    assert not list(sharded.parent.glob(".*partial"))


@pytest.mark.parametrize("link", ["same", "symbolic", "hard", "through a folder"])
def test_the_input_is_never_the_output(run: Run, checkpoint: Path, link: str) -> None:
    output = checkpoint.with_name("link.safetensors")
    if link == "same":
        output = checkpoint
    elif link == "symbolic":
        output.symlink_to(checkpoint)
    elif link == "hard":
        output.hardlink_to(checkpoint)
    else:
        folder = checkpoint.parent / "folder"
        folder.symlink_to(checkpoint.parent, target_is_directory=True)
        output = folder / checkpoint.name
    before = files_under(checkpoint.parent)
    ran = run("quantize", checkpoint, "--bits", 2, "-o", output, "--force")
    assert (ran.code, ran.out) == (3, "")
    assert "-o would replace the checkpoint" in ran.err
    assert files_under(checkpoint.parent) == before


def test_a_folder_is_never_replaced_by_what_it_holds(run: Run, sharded: Path) -> None:
    before = files_under(sharded)
    for output in (sharded, sharded / "model-00001-of-00002.safetensors"):
        ran = run("quantize", sharded, "--bits", 2, "-o", output, "-f")
        assert (ran.code, ran.out) == (3, "")
    assert files_under(sharded) == before


def test_flags_beat_the_environment_which_beats_the_recipe(
    run: Run, checkpoint: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seed(*flags: object) -> object:
        assert run("quantize", checkpoint, "-r", recipe, "-f", *flags).code == 0
        return resolved(checkpoint.with_name("model-small.safetensors")).get("seed", 0)

    assert seed() == 5
    monkeypatch.setenv("QCOMPRESS_SEED", "6")
    assert seed() == 6
    assert seed("--seed", 7) == 7
    assert seed("--seed", 0) == 0


def test_the_environment_names_the_coding(
    run: Run, checkpoint: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def codings(*flags: object) -> set[object]:
        ran = run("quantize", checkpoint, "-r", recipe, "-f", "--json", "-", *flags)
        return {layer["coding"] for layer in json.loads(ran.out)["layers"] if layer["method"] != "kept"}

    monkeypatch.setenv("QCOMPRESS_CODING", "zstd")
    assert codings() == {"zstd"}
    assert codings("--coding", "packed") == {"packed"}


def test_set_changes_one_value(run: Run, checkpoint: Path, recipe: Path) -> None:
    ran = run("quantize", checkpoint, "-r", recipe, "--set", "rules.1.rtn.bits=2", "--json", "-")
    layers = {layer["name"]: layer for layer in json.loads(ran.out)["layers"]}
    assert layers["layer.weight"]["bits"] == 2
    wrong = run("quantize", checkpoint, "-r", recipe, "--set", "rules.1.rtn.bist=2", "-f")
    assert wrong.code in (2, 3)
    assert "did you mean `bits`" in wrong.err


@pytest.mark.parametrize(
    "flags",
    [["--bits", 2], ["--method", "rtn"], ["--granularity", "tensor"], ["--group-size", 9], ["--symmetric"]],
    ids=lambda flags: str(flags[0]),
)
def test_a_recipe_and_flags_of_a_rule_are_refused(
    run: Run, checkpoint: Path, recipe: Path, flags: list[object]
) -> None:
    ran = run("quantize", checkpoint, "-r", recipe, *flags)
    assert (ran.code, ran.out, len(ran.error_lines)) == (2, "", 1)
    assert str(flags[0]) in ran.err
    assert "--set" in ran.err


def test_flags_and_the_same_recipe_give_the_same_bytes(run: Run, checkpoint: Path) -> None:
    recipe = 'version: 1\nrules: [{match: "*", squant: {bits: 3}}]'
    assert run("quantize", checkpoint, "--bits", 3).code == 0
    assert run("quantize", checkpoint, "-r", "-", stdin=recipe).code == 0
    folder = checkpoint.parent
    assert (folder / "model-w3.safetensors").read_bytes() == (folder / "model-recipe.safetensors").read_bytes()


def test_threads_do_not_change_the_bytes(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / f"{threads}.safetensors" for threads in (1, 4)]
    for threads, output in zip((1, 4), outputs, strict=True):
        assert run("quantize", checkpoint, "--bits", 3, "--threads", threads, "-o", output).code == 0
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


GATES = {
    "size passes": (["--max-size", "1MB"], 0),
    "size fails": (["--max-size", "1KB"], 4),
    "bits pass": (["--max-bpw", "3"], 0),
    "bits fail": (["--max-bpw", "1.5"], 4),
    "error passes": (["--min-sqnr", "5"], 0),
    "error fails": (["--min-sqnr", "60"], 4),
    "one of several fails": (["--max-size", "1MB", "--min-sqnr", "60"], 4),
}


@pytest.mark.parametrize(("flags", "code"), GATES.values(), ids=GATES)
def test_a_failed_gate_is_4_and_everything_is_written(run: Run, checkpoint: Path, flags: list[str], code: int) -> None:
    ran = run("quantize", checkpoint, "--bits", 2, *flags, "-q")
    output = checkpoint.with_name("model-w2.safetensors")
    assert (ran.code, ran.out) == (code, f"{output}\n")
    assert len(ran.error_lines) == ran.err.count("\n") == (code == 4)
    gates = json.loads(checkpoint.with_name("model-w2.report.json").read_text())["gates"]
    assert len(gates) == len(flags) // 2
    assert all(gate["passed"] for gate in gates) == (code == 0)
    assert run("verify", output).code == 0
    # The same limits hold for the stored figures.
    assert run("report", output, *flags, "-q").code == code


def test_gates_of_the_recipe_and_of_flags(run: Run, checkpoint: Path, recipe: Path) -> None:
    assert run("quantize", checkpoint, "-r", recipe, "--set", "gates.max_size=1KB").code == 4
    assert run("quantize", checkpoint, "-r", recipe, "-f", "--max-size", "1KB").code == 4
    assert run("quantize", checkpoint, "-r", recipe, "-f", "--set", "gates.max_size=1KB", "--max-size", "1MB").code == 0


@pytest.mark.parametrize("flag", ["--min-metric", "--max-drop"])
def test_a_gate_on_what_cannot_be_measured_is_3_before_anything_is_written(
    run: Run, checkpoint: Path, flag: str
) -> None:
    ran = run("quantize", checkpoint, "--bits", 2, flag, "top1=0.5")
    assert (ran.code, ran.out, len(ran.error_lines)) == (3, "", 1)
    assert "top1" in ran.err
    assert set(files_under(checkpoint.parent)) == {"model.safetensors"}


def test_memory_that_does_not_suffice_is_5(run: Run, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model.safetensors", small_tensors())
    ran = run("quantize", checkpoint, "--bits", 2, "--max-memory", "1KB")
    assert (ran.code, ran.out, len(ran.error_lines)) == (5, "", 1)
    assert "layer.weight" in ran.err
    assert set(files_under(tmp_path)) == {"model.safetensors"}
    assert run("quantize", checkpoint, "--bits", 2, "--max-memory", "1GB").code == 0


def test_bits_stand_for_rules_of_embeddings_and_heads(run: Run, tmp_path: Path) -> None:
    draw = np.random.default_rng(0).standard_normal
    shapes = {"embed.weight": (40, 16), "output.weight": (40, 16), "fc.weight": (8, 16)}
    tensors = {name: draw(shape, "f4") for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "lm.safetensors")
    for flags, expected in (
        (["--bits", "3"], {"@embedding": 8, "@head": 8, "*": 3}),
        (["--bits", "3", "--bits-embedding", "5"], {"@embedding": 5, "@head": 5, "*": 3}),
        (["--bits", "8"], {"*": 8}),
    ):
        out = tmp_path / "out.safetensors"
        assert run("quantize", tmp_path / "lm.safetensors", *flags, "-o", out, "-f").code == 0
        rules: Any = resolved(out)["rules"]
        pairs = [(rule["match"], rule["squant"]["bits"]) for rule in rules]
        lists = [(match if isinstance(match, list) else [match], bits) for match, bits in pairs]
        assert {match: bits for matches, bits in lists for match in matches} == expected
    ran = run("cluster", tmp_path / "lm.safetensors", "--bits", "4", "--dim", "2", "-n", "--json", "-")
    document = json.loads(ran.out)
    assert {one["name"]: one["bits"] for one in document["tensors"]} == {
        "embed.weight": 8,
        "fc.weight": 4,
        "output.weight": 8,
    }


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--bits", "3"], "--bits-embedding 6: the checkpoint has no embedding and no head; leave it out"),
        (["--bpw", "3"], "--bits-embedding 6 --bpw 3.0: the budget decides the bits; leave one of them out"),
        (["--method", "rd"], "--bits-embedding 6: no --bits is given beside it; add --bits N"),
    ],
)
def test_bits_of_embeddings_that_decide_nothing_are_refused(
    run: Run, tmp_path: Path, flags: list[str], line: str
) -> None:
    save_file({"fc.weight": np.ones((8, 16), "f4")}, tmp_path / "m.safetensors")
    found = run("quantize", tmp_path / "m.safetensors", *flags, "--bits-embedding", "6")
    assert (found.code, found.err.strip()) == (2, f"error: {line}")
