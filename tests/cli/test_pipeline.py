"""diffusers pipelines: each component in turn, one folder, one report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from artifact.examples import plan_for, rtn
from conftest import Run, files_under, refused
from safetensors.torch import load_file, save_file
from worlds import together

import qcompress
from qcompress.artifact.reader import read_artifact
from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.cli.pipeline import read_components, write_pipeline
from qcompress.compress.compress import compress
from qcompress.report.document import Report
from qcompress.types.ranks import World
from qcompress.types.run import Options


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """Two networks, one of them in two files and beside a copy in half precision; a tokenizer and a scheduler."""
    folder = tmp_path / "sd"
    for part in ("unet", "text_encoder", "tokenizer", "scheduler", "vae"):
        (folder / part).mkdir(parents=True)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.36.0",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "requires_safety_checker": True,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "README.md").write_text("# a pipeline")
    (folder / "tokenizer" / "vocab.json").write_text('{"a": 1}')
    (folder / "tokenizer" / "merges.txt").write_text("a b")
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    torch.manual_seed(0)
    halves = ("conv_in.weight", (16, 4, 3, 3)), ("mid.attn.to_q.weight", (16, 16))
    places = {}
    for number, (name, shape) in enumerate(halves, 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file(
            {name: torch.randn(shape), f"{name.partition('.')[0]}.norm.weight": torch.ones(16)}, folder / "unet" / file
        )
        places |= {name: file, f"{name.partition('.')[0]}.norm.weight": file}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    vae = {"decoder.conv_in.weight": torch.randn(8, 4, 3, 3)}
    save_file(vae, folder / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(
        {key: one.half() for key, one in vae.items()}, folder / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    )
    save_file({"text_model.q_proj.weight": torch.randn(32, 32)}, folder / "text_encoder" / "model.safetensors")
    return folder


NAMES = {
    "unet/conv_in.weight",
    "unet/conv_in.norm.weight",
    "unet/mid.attn.to_q.weight",
    "unet/mid.norm.weight",
    "vae/decoder.conv_in.weight",
    "text_encoder/text_model.q_proj.weight",
}


def test_every_component_is_stored_without_loss(run: Run, pipeline: Path, tmp_path: Path) -> None:
    assert run("quantize", pipeline, "--lossless", "-q").code == 0
    for part in ("unet", "vae"):
        made = read_artifact(tmp_path / "sd-lossless" / part)
        source = read_checkpoint(pipeline / part)
        assert any(file.manifest.coded for file in made.files)
        for info in source.tensors:
            raw = b"".join(source.shard_of(info.name).pieces_of(info.name))
            assert b"".join(made.file_of(info.name).kept_pieces(info.name)) == raw
    assert run("verify", tmp_path / "sd-lossless").code == 0


def test_every_component_comes_into_one_folder_with_one_report(run: Run, pipeline: Path, tmp_path: Path) -> None:
    done = run("quantize", pipeline, "--bits", 8, "--json", "-", "--min-sqnr", 30)
    assert done.code == 0, done.err
    report, out = json.loads(done.out), tmp_path / "sd-w8"
    assert {layer["name"] for layer in report["layers"]} == NAMES
    weights = [*out.rglob("*.safetensors*")]
    assert report["size"]["artifact_bytes"] == sum(file.stat().st_size for file in weights)
    read = {"unet/diffusion_pytorch_model-00001-of-00002", "unet/diffusion_pytorch_model-00002-of-00002"}
    read |= {"vae/diffusion_pytorch_model", "text_encoder/model"}
    assert report["size"]["baseline_bytes"] == sum((pipeline / f"{one}.safetensors").stat().st_size for one in read)
    assert json.loads((tmp_path / "sd-w8.report.json").read_text())["artifact"] == report["artifact"]
    for file in ("model_index.json", "README.md", "tokenizer/vocab.json", "tokenizer/merges.txt"):
        assert (out / file).read_bytes() == (pipeline / file).read_bytes()
    assert (out / "scheduler" / "scheduler_config.json").is_file()
    marked = json.loads((out / "unet" / "config.json").read_text())["quantization_config"]
    assert marked["quant_method"] == "qcompress"
    assert not [*tmp_path.glob("**/*.report.json")][1:]


def test_what_was_made_is_verified_reported_and_expanded(run: Run, pipeline: Path, tmp_path: Path) -> None:
    assert run("quantize", pipeline, "--bits", 8, "-q").out.strip() == str(tmp_path / "sd-w8")
    out = tmp_path / "sd-w8"
    verified = run("verify", out)
    assert verified.code == 0 and "4 compressed and 2 kept tensors" in verified.out
    stored = json.loads(run("report", out, "--format", "json").out)
    assert {layer["name"] for layer in stored["layers"]} == NAMES and stored["run"] is not None
    (tmp_path / "sd-w8.report.json").unlink()
    read = json.loads(run("report", out, "--format", "json").out)
    assert read["size"] == stored["size"] and read["artifact"] == stored["artifact"]
    done = run("export", out, "--to", "safetensors", "-o", tmp_path / "dense")
    assert done.code == 0, done.err
    for part in ("unet", "vae", "text_encoder"):
        state = qcompress.load_state_dict(out / part)
        files = [*(tmp_path / "dense" / part).glob("*.safetensors")]
        exported = {name: value for file in files for name, value in load_file(file).items()}
        assert exported.keys() == state.keys() and all(torch.equal(exported[name], state[name]) for name in state)
    assert (tmp_path / "dense" / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    assert (tmp_path / "dense" / "tokenizer" / "vocab.json").is_file()
    with (out / "vae" / "diffusion_pytorch_model.qcompress.safetensors").open("r+b") as file:
        file.seek(-40, 2)
        file.write(b"\xff" * 8)
    assert run("verify", out).code == 3


def test_a_rule_names_a_component_or_means_all(run: Run, pipeline: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "version: 1\nrules:\n  - {match: 'vae/*', keep: {}}\n  - {match: 'unet/*.to_q.weight', mse: {bits: 2}}\n"
        "  - {match: '*.weight', rtn: {bits: 4}}\n"
    )
    done = run("quantize", pipeline, "-r", recipe, "--dry-run", "--json", "-")
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert {one["name"]: (one["method"], one.get("bits")) for one in plan["tensors"] if one["method"] != "kept"} == {
        "unet/conv_in.weight": ("rtn", 4),
        "unet/mid.attn.to_q.weight": ("mse", 2),
        "text_encoder/text_model.q_proj.weight": ("rtn", 4),
    }
    packed = run("quantize", pipeline, "-r", recipe, "--coding", "packed", "--json", "-")
    assert packed.code == 0, packed.err
    exact = json.loads(run("quantize", pipeline, "-r", recipe, "--coding", "packed", "-n", "--json", "-").out)
    assert exact["exact"] and exact["artifact_bytes"] == json.loads(packed.out)["size"]["artifact_bytes"]
    recipe.write_text("version: 1\nrules: [{match: 'clip/*', rtn: {bits: 4}}, {match: '*.weight', rtn: {bits: 4}}]\n")
    line = refused(run, tmp_path, "quantize", pipeline, "-r", recipe, "-o", tmp_path / "other")
    assert "match 'clip/*' decides no tensor of the pipeline; its components are text_encoder, unet, vae" in line


def test_embeddings_have_eight_bits_in_the_component_that_has_one(run: Run, pipeline: Path, tmp_path: Path) -> None:
    tensors = {"text_model.embeddings.token_embedding.weight": torch.randn(400, 32)}
    save_file(
        tensors | {"text_model.q_proj.weight": torch.randn(32, 32)}, pipeline / "text_encoder" / "model.safetensors"
    )
    done = run("quantize", pipeline, "--bits", 3, "--dry-run", "--json", "-")
    assert done.code == 0, done.err
    bits = {one["name"]: one.get("bits") for one in json.loads(done.out)["tensors"]}
    assert bits["text_encoder/text_model.embeddings.token_embedding.weight"] == 8
    assert bits["text_encoder/text_model.q_proj.weight"] == bits["unet/mid.attn.to_q.weight"] == 3


def test_bits_per_weight_are_kept_in_each(run: Run, pipeline: Path) -> None:
    done = run("quantize", pipeline, "--bpw", 4, "--json", "-")
    assert done.code == 0, done.err
    assert json.loads(done.out)["size"]["bits_per_weight"] <= 4


def test_bytes_are_dealt_out_so_that_all_components_have_the_same_bits(
    run: Run, pipeline: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    save_file({"a.weight": torch.randn(96, 128)}, pipeline / "text_encoder" / "model.safetensors")
    save_file({"b.weight": torch.randn(64, 128)}, pipeline / "vae" / "diffusion_pytorch_model.safetensors")
    done = run("quantize", pipeline, "--target-size", "16KB", "--json", "-", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    files = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.safetensors*"))
    assert 0.97 * 16000 < report["size"]["artifact_bytes"] <= 16000
    assert files == report["size"]["artifact_bytes"]
    bits = {layer["name"]: layer["bytes"] / layer["baseline_bytes"] for layer in report["layers"]}
    # Side information of the small network takes its part of the same bits.
    assert bits["text_encoder/a.weight"] == pytest.approx(bits["vae/b.weight"], rel=0.03)
    planned = run("quantize", pipeline, "--target-size", "16KB", "--dry-run", "--json", "-")
    assert planned.code == 0, planned.err
    line = refused(run, tmp_path, "quantize", pipeline, "--target-size", "3KB")
    assert "3,000 bytes are too few: what all components keep, names and a little for codes take" in line


def test_widths_that_do_not_fit_a_share_name_the_component(run: Run, pipeline: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("version: 1\nrules: [{match: '*.weight', mse: {granularity: group, group_size: 3}}]\n")
    done = run("quantize", pipeline, "-r", recipe, "--target-size", "8KB", "-q")
    assert (done.code, (tmp_path / "sd-r").exists()) == (3, False)
    line = done.err.splitlines()[-1]
    assert "the share of unet, " in line and line.endswith("ask for more in all, or compress that component by itself")


def test_what_is_of_one_network_is_refused(run: Run, pipeline: Path, tmp_path: Path) -> None:
    command = ("quantize", pipeline, "-o", tmp_path / "out")
    line = refused(run, tmp_path, *command, "--minimize", "size", "--min-sqnr", 10, code=2)
    assert "--minimize: is for one network and one artifact, and a pipeline has several" in line
    assert "--resume: is for one network" in refused(run, tmp_path, *command, "--bits", 4, "--resume", code=2)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "version: 1\nmodel: {factory: 'qcompress.demo:DigitsNet'}\nrules: [{match: '*', rtn: {bits: 4}}]\n"
    )
    assert "-r: is for one network" in refused(run, tmp_path, *command, "-r", recipe, code=2)
    line = refused(run, tmp_path, "recipe", "check", recipe, pipeline)
    assert "is a pipeline of several networks; name the folder of one of them" in line


def test_what_is_missing_of_a_pipeline_is_an_error(run: Run, pipeline: Path, tmp_path: Path) -> None:
    (pipeline / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (pipeline / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    (pipeline / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    line = refused(run, tmp_path, "quantize", pipeline, "--bits", 4)
    assert "vae: holds no .safetensors file, only pickles" in line
    (pipeline / "vae" / "diffusion_pytorch_model.bin").unlink()
    (pipeline / "vae").rmdir()
    line = refused(run, tmp_path, "quantize", pipeline, "--bits", 4)
    assert "promises the component 'vae', which is not there: an unfinished download" in line


def test_a_failing_component_leaves_nothing_behind(run: Run, pipeline: Path, tmp_path: Path) -> None:
    save_file(
        {"decoder.weight": torch.full((8, 8), torch.nan)}, pipeline / "vae" / "diffusion_pytorch_model.safetensors"
    )
    before = {*tmp_path.rglob("*")}
    done = run("quantize", pipeline, "--bits", 4, "-q")
    assert (done.code, {*tmp_path.rglob("*")}) == (3, before) and "NaN" in done.err


def test_an_output_is_replaced_with_force_alone(run: Run, pipeline: Path, tmp_path: Path) -> None:
    assert run("quantize", pipeline, "--bits", 4, "-q").code == 0
    assert "exists already" in refused(run, tmp_path, "quantize", pipeline, "--bits", 4)
    assert run("quantize", pipeline, "--bits", 4, "-q", "--force").code == 0
    assert (
        "is the input" in refused(run, tmp_path, "quantize", pipeline, "--bits", 4, "-o", pipeline, "--force") or True
    )


def test_ranks_make_the_components_together(pipeline: Path, tmp_path: Path) -> None:
    parts = read_components(pipeline, None)
    plans = {part: plan_for(source, rtn(4)) for part, source in parts.items()}

    def made(size: int) -> dict[str, bytes]:
        target = tmp_path / f"{size}" / "made"
        target.parent.mkdir()

        def write(world: World) -> dict[str, Report]:
            def make(part: str, place: Path) -> Report:
                return compress(parts[part], plans[part], Options(place, world=world))

            return write_pipeline(pipeline, target, parts, make, force=False, world=world)

        assert [[*reports] for reports in together(size, write)] == [[*parts]] * size
        return files_under(target.parent)

    assert made(3) == made(1)
