"""cluster from the command line: artifacts, reports, exports, learned representatives, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from safetensors.torch import load_file, save_file

import qcompress


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "conv.weight": torch.randn(16, 8, 3, 3, generator=generator) * 0.1,
        "conv.bias": torch.randn(16, generator=generator),
        "fc.weight": (torch.randn(12, 400, generator=generator) * 0.05).to(torch.bfloat16),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


RUNS: dict[str, list[str]] = {
    "scalar": ["--bits", "4"],
    "one bit": ["--bits", "1"],
    "vectors": ["--bits", "6", "--dim", "4"],
    "wide": ["--bits", "9", "--dim", "4"],
    "channel": ["--bits", "2", "--granularity", "channel"],
    "group": ["--bits", "3", "--group-size", "4"],
    "zstd": ["--bits", "4", "--coding", "zstd"],
    "ans": ["--bits", "4", "--coding", "ans"],
    "packed": ["--bits", "4", "--coding", "packed"],
}


@pytest.mark.parametrize("case", RUNS)
def test_artifacts_hold_export_and_report(run: Run, checkpoint: Path, tmp_path: Path, case: str) -> None:
    output, dense = tmp_path / "a.safetensors", tmp_path / "dense.safetensors"
    done = run("cluster", str(checkpoint), *RUNS[case], "-o", str(output), "--json", "-")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["size"]["artifact_bytes"] == output.stat().st_size
    assert run("verify", str(output)).code == 0
    assert run("export", str(output), "--to", "safetensors", "-o", str(dense)).code == 0
    loaded, exported, before = qcompress.load_state_dict(output), load_file(dense), load_file(checkpoint)
    for name, tensor in before.items():
        assert torch.equal(loaded[name], exported[name]) and loaded[name].dtype == tensor.dtype
    coded = {layer["name"]: layer for layer in report["layers"] if layer["bits"]}
    assert set(coded) == {"conv.weight", "fc.weight"}
    for name, layer in coded.items():
        assert layer["form"] == "codebook" and layer["method"] == "kmeans"
        error = (loaded[name].double() - before[name].double()).square().sum() / before[name].double().square().sum()
        # The report's is of the values before they take the weight's own 16 bits.
        assert layer["figures"]["relative_error"] == pytest.approx(float(error), rel=0.05)
        distinct = len(loaded[name].float().unique())
        if "--dim" not in RUNS[case] and case not in ("channel", "group"):
            assert distinct <= 2 ** layer["bits"] and layer["figures"]["levels_used"] >= distinct
    again = run("report", str(output), "--baseline", str(checkpoint), "--json", "-")
    assert again.code == 0, again.err
    for layer in json.loads(again.out)["layers"]:
        if layer["bits"]:
            assert layer["figures"]["relative_error"] == pytest.approx(
                coded[layer["name"]]["figures"]["relative_error"], rel=1e-4
            )
            assert layer["granularity"] == coded[layer["name"]]["granularity"]
            assert layer["form"] == "codebook"


def test_the_plan_knows_the_size_to_the_byte(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    words = ["cluster", str(checkpoint), "--bits", "5", "--coding", "packed", "-o", str(tmp_path / "a.safetensors")]
    plan = json.loads(run(*words, "--dry-run", "--json", "-").out)
    report = json.loads(run(*words, "--json", "-").out)
    assert plan["exact"] and plan["artifact_bytes"] == report["size"]["artifact_bytes"]


def test_no_more_entries_are_stored_than_values_differ(run: Run, tmp_path: Path) -> None:
    """Whatever the tensor's size, wherever its values are, and however many tables it has."""
    generator = torch.Generator().manual_seed(0)
    few = torch.tensor([0.5, -0.25, 2.0])[torch.randint(3, (16, 9000), generator=generator)]
    late = torch.zeros(16, 9000)
    late[-1, -2:] = torch.tensor([1.0, 2.0])
    rows = torch.zeros(4, 40)
    rows[2, :5] = torch.arange(5.0)
    tensors = {"few": few, "late": late, "rows": rows, "constant": torch.full((8, 8), 0.75)}
    save_file(tensors, tmp_path / "m.safetensors")
    recipe, output = tmp_path / "r.yaml", tmp_path / "a.safetensors"
    recipe.write_text(
        "version: 1\nrules:\n  - {match: rows, kmeans: {bits: 3, granularity: channel}}\n"
        "  - {match: '*', kmeans: {bits: 4}}\n"
    )
    done = run("cluster", str(tmp_path / "m.safetensors"), "-r", str(recipe), "-o", str(output), "--json", "-")
    assert done.code == 0, done.err
    layers = {layer["name"]: layer for layer in json.loads(done.out)["layers"]}
    shown = {
        name: [layer["figures"][key] for key in ("entries", "dead", "duplicates")] for name, layer in layers.items()
    }
    assert shown == {"few": [3, 0, 0], "late": [3, 0, 0], "constant": [1, 0, 0], "rows": [5, 12, 12]}
    assert layers["few"]["figures"]["levels"] == [-0.25, 0.5, 2.0]
    loaded = qcompress.load_state_dict(output)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    pairs = json.loads(
        run("cluster", str(tmp_path / "m.safetensors"), "--bits", "9", "--dim", "2", "--force", "--json", "-").out
    )
    found = {layer["name"]: layer["figures"]["entries"] for layer in pairs["layers"]}
    assert found["few"] == 9 and found["constant"] == 1 and found["late"] == 3


def test_names_of_outputs(run: Run, checkpoint: Path) -> None:
    assert run("cluster", str(checkpoint), "--bits", "4", "-q").out.strip().endswith("m-c4.safetensors")
    done = run("cluster", str(checkpoint), "--bits", "6", "--dim", "2", "-q")
    assert done.out.strip().endswith("m-c6d2.safetensors")


def test_16_bit_weights_are_clustered_to_the_optimum(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    """Against scikit-learn's best of many starts, which the optimum never loses to."""
    cluster = pytest.importorskip("sklearn.cluster")
    output = tmp_path / "a.safetensors"
    assert run("cluster", str(checkpoint), "--bits", "3", "-o", str(output), "-q").code == 0
    before = load_file(checkpoint)["fc.weight"].double()
    found = float((qcompress.load_state_dict(output)["fc.weight"].double() - before).square().sum())
    best = cluster.KMeans(8, n_init=20, random_state=0).fit(before.reshape(-1, 1).numpy()).inertia_
    # Entries are stored in half precision, and weights come back in bfloat16.
    assert found <= best * 1.01


def test_learned_representatives(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    learned = {
        "conv.weight.representatives": torch.tensor([-0.1, 0.0, 0.12]),
        "fc.weight.representatives": torch.tensor([-0.05, 0.05]),
        "conv.weight.alpha": torch.ones(1),
    }
    output = tmp_path / "a.safetensors"
    words = ["cluster", str(checkpoint), "--method", "learned", "-o", str(output), "--json", "-"]
    missing = run(*words)
    assert missing.code == 3 and "m.reg.safetensors: there are no learned representatives" in missing.err
    save_file(learned, tmp_path / "m.reg.safetensors")
    done = run(*words)
    assert done.code == 0, done.err
    bits = {layer["name"]: layer["bits"] for layer in json.loads(done.out)["layers"] if layer["bits"]}
    assert bits == {"conv.weight": 2, "fc.weight": 1}
    assert len(qcompress.load_state_dict(output)["conv.weight"].unique()) == 3
    save_file({"conv.weight.representatives": torch.zeros(16, 4)}, tmp_path / "other.safetensors")
    done = run(*words, "--force", "--representatives", str(tmp_path / "other.safetensors"))
    assert done.code == 3 and len(done.error_lines) == 2
    assert "no one codebook" in done.error_lines[0] and "none" not in done.out
    assert "no representatives were learned for it" in done.error_lines[1]


WRONG: dict[str, tuple[list[str], int, str]] = {
    "dim": (
        ["--bits", "4", "--dim", "8"],
        3,
        "dim 8 does not divide its 12 channels; use -r RECIPE with a rule of its own",
    ),
    "bits": (["--bits", "13"], 2, "must be between 1 and 12"),
    "method": (["--bits", "4", "--method", "rtn"], 2, "is a quantize method"),
    "training": (["--bits", "4", "--method", "dkm"], 3, "dkm trains a live model; add `model`, `data.train`"),
    "nothing": ([], 2, "no bit width or recipe is given"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line_and_leaves_nothing(run: Run, checkpoint: Path, case: str) -> None:
    more, code, error = WRONG[case]
    done = run("cluster", str(checkpoint), *more)
    assert done.code == code and error in done.err and "Traceback" not in done.err
    assert "change the rule" not in done.err, "there is no rule to change without a recipe"
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["m.safetensors"]


def test_a_codebook_that_does_not_pay_is_refused_with_the_arithmetic(
    run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("version: 1\nrules:\n  - {match: fc.weight, kmeans: {bits: 12, dim: 4, codebook: f32}}\n")
    done = run("cluster", str(checkpoint), "-r", str(recipe))
    assert done.code == 3
    assert (
        "1800 bytes of codes and 19200 of codebook (1 x 1200 entries of 4) are no less than the 9600 of now" in done.err
    )


def test_16_bit_weights_are_never_made_larger(run: Run, tmp_path: Path) -> None:
    """12 bits for 4096 values of bfloat16: less than float32 would take, more than they take."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for dtype, code in ((torch.float32, 0), (torch.bfloat16, 3)):
        save_file({"w": weight.to(dtype)}, tmp_path / "m.safetensors")
        done = run(
            "cluster", str(tmp_path / "m.safetensors"), "--bits", "12", "-f", "-o", str(tmp_path / "a.safetensors")
        )
        assert done.code == code, done.err
    assert "6144 bytes of codes and 8192 of codebook (1 x 4096 entries of 1) are no less than the 8192" in done.err


def test_nan_and_recipes_of_the_other_family(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    state: dict[str, Any] = load_file(checkpoint)
    state["conv.weight"][0, 0, 0, 0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    done = run("cluster", str(tmp_path / "nan.safetensors"), "--bits", "4")
    assert done.code == 3 and "1 of its 1152 values are NaN" in done.err
    done = run("cluster", str(tmp_path / "nan.safetensors"), "--bits", "4", "--skip-nonfinite", "-q")
    assert done.code == 0
    recipe = tmp_path / "r.yaml"
    recipe.write_text("version: 1\nrules:\n  - {match: '*', rtn: {bits: 4}}\n")
    done = run("cluster", str(checkpoint), "-r", str(recipe))
    assert done.code == 2 and "use `qcompress quantize`" in done.err


def test_equal_inputs_give_equal_bytes_whatever_the_threads(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    outputs = []
    for threads in ("1", "3"):
        output = tmp_path / f"{threads}.safetensors"
        words = ["cluster", str(checkpoint), "--bits", "6", "--dim", "2", "--threads", threads, "-q", "-o", str(output)]
        assert run(*words).code == 0
        outputs.append(output.read_bytes())
    assert outputs[0] == outputs[1]
