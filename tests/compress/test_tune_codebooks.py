"""Codebooks that are trained: entries alone by tuning, weights and entries by differentiable k-means."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from colours import anchored, write_colours, write_learned
from conftest import Run
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qcompress
from qcompress.artifact.reader import read_artifact
from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.clustering.dkm import share_at
from qcompress.coding.grids import TORCH_DTYPES, centroid_values, decode
from qcompress.compress.evaluate import measure_task, open_live
from qcompress.compress.tune_codebooks import CodebookTuner, _Entries, _entries, _scale_gradient
from qcompress.data.batches import Batch
from qcompress.data.measurement import Measurement
from qcompress.methods.dkm import SoftShared
from qcompress.model.live import make_live_model
from qcompress.recipe import parse_recipe
from qcompress.registry import DkmConfig, KmeansConfig, Tune
from qcompress.types.encoded import Codebook, Fitted
from qcompress.types.plan import CodebookSpec, Decision, Plan, TensorInfo
from qcompress.types.run import ModelRun

NET = """
from torch import nn
import torch.nn.functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 3)
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(F.relu(self.up(F.relu(self.norm(self.conv(x))))).mean((2, 3)))

def net():
    return Net()
"""

RECIPE = """
version: 1
model: {factory: net.py:net}
data:
  train: {npz: data.npz, batch_size: 16}
  eval: {npz: data.npz}
  normalize: {mean: [0.5], std: [0.25]}
task: classification
rules:
  - {match: "*.weight", kmeans: OPTIONS}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tune")
    (found / "net.py").write_text(NET)
    write_learned(found, write_colours(found), 80)
    return found


def clustered(run: Run, folder: Path, output: Path, options: str, *more: str) -> dict[str, Any]:
    (folder / "cluster.yaml").write_text(RECIPE.replace("OPTIONS", options))
    return cluster(run, folder, "cluster.yaml", output, *more)


def cluster(run: Run, folder: Path, recipe: str, output: Path, *more: str) -> dict[str, Any]:
    words = ["cluster", str(folder / "m.safetensors"), "-r", str(folder / recipe), "--allow-code", "-o", str(output)]
    done = run(*words, "--json", "-", *more)
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


@pytest.mark.parametrize("options", ["bits: 2", "bits: 4, dim: 2", "bits: 2, group_size: 2, codebook: int8"])
def test_codes_stay_and_accuracy_comes_back(run: Run, folder: Path, tmp_path: Path, options: str) -> None:
    plain, tuned = tmp_path / "plain.safetensors", tmp_path / "tuned.safetensors"
    before = clustered(run, folder, plain, f"{{{options}}}")["accuracy"][0]
    after = clustered(run, folder, tuned, f"{{{options}, tune: {{epochs: 6, learning_rate: 0.01}}}}")["accuracy"][0]
    assert after["untuned"] == pytest.approx(before["artifact"]) and before["untuned"] is None
    assert after["artifact"] >= before["artifact"]
    assert after["kmeans"] == after["untuned"] and after["untuned_ratio"] == pytest.approx(1)
    assert after["kmeans_ratio"] == pytest.approx(after["artifact"] / after["kmeans"], rel=1e-4)
    assert before["kmeans"] is before["kmeans_ratio"] is None
    old, new = (read_artifact(path).files[0] for path in (plain, tuned))
    moved = False
    for name in old.manifest.tensors:
        one, other = old.read_encoded(name), new.read_encoded(name)
        assert isinstance(one, Codebook) and isinstance(other, Codebook)
        assert torch.equal(one.codes, other.codes) and one.centroids.shape == other.centroids.shape
        moved = moved or not torch.equal(decode(one), decode(other))
    assert moved
    source, loaded = load_file(folder / "m.safetensors"), qcompress.load_state_dict(tuned)
    for name in set(source) - set(old.manifest.tensors):
        assert torch.equal(source[name], loaded[name]), name


@pytest.mark.parametrize("gradient", ["sum", "rms", "mean"])
@pytest.mark.parametrize("dim", [1, 2])
def test_an_entrys_gradient_is_that_of_its_weights(gradient: str, dim: int) -> None:
    """By autograd through indexing, one vector at a time; divided by the number of its codes or its root."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 3, (4, 5), generator=generator, dtype=torch.uint8)
    centroids = torch.randn(2, 4, dim, generator=generator)
    encoded = Codebook(codes, 2, centroids, 0, (4 * dim, 5))
    entries = _Entries(encoded, torch.device("cpu"))
    _scale_gradient(entries.values, entries.counts, gradient, keep_zero=False)
    slope = torch.randn(4 * dim, 5, generator=generator)
    weight = entries(torch.empty(0))
    assert torch.equal(weight.detach(), decode(encoded))
    (weight * slope).sum().backward()
    wanted, counts = torch.zeros(2, 4, dim), torch.zeros(2, 4)
    for row in range(4):
        for column in range(5):
            place = (row // 2, int(codes[row, column]))
            wanted[place] += slope[row * dim : (row + 1) * dim, column]
            counts[place] += 1
    power = {"sum": 0.0, "rms": 0.5, "mean": 1.0}[gradient]
    wanted /= counts.clamp_min(1).unsqueeze(2) ** power
    assert entries.values.grad is not None
    torch.testing.assert_close(entries.values.grad.view(2, 4, dim), wanted)


def test_an_exact_zero_stays_one() -> None:
    encoded = Codebook(
        torch.tensor([[0, 1, 2]], dtype=torch.uint8), 2, torch.tensor([[[-1.0], [0.0], [2.0]]]), 0, (1, 3)
    )
    entries = _Entries(encoded, torch.device("cpu"))
    _scale_gradient(entries.values, entries.counts, "rms", keep_zero=True)
    entries(torch.empty(0)).sum().backward()
    assert entries.values.grad is not None
    assert entries.values.grad.flatten().tolist() == [1.0, 0.0, 1.0]


def test_tuning_moves_entries_but_neither_codes_nor_an_exact_zero_nor_other_tensors(folder: Path) -> None:
    recipe = parse_recipe(anchored(RECIPE.replace("OPTIONS", "{bits: 2}"), folder), "r.yaml")
    model_run = ModelRun(recipe, torch.device("cpu"), allow_code=True)
    config = KmeansConfig(bits=2, zero=True, tune=Tune(epochs=2, learning_rate=0.01))
    decision = Decision(TensorInfo("fc.weight", (4, 4), "F32"), "kmeans", config, "test")
    plan = Plan(recipe, (decision,))
    live = open_live(read_checkpoint(folder / "m.safetensors"), plan, model_run)
    # Each entry meets every input once, also where some are always zero.
    codes = (torch.arange(4).unsqueeze(1) + torch.arange(4)).remainder(4).to(torch.uint8)
    before = Codebook(codes, 2, torch.tensor([[[-1.0], [0.0], [0.5], [2.0]]]), 0, (4, 4))
    live.put({"fc.weight": before})
    others = {name: value.clone() for name, value in live.quantized.state_dict().items() if name != "fc.weight"}
    tuner = CodebookTuner(plan, model_run)
    after = tuner(live, Fitted({"fc.weight": before})).encoded["fc.weight"]
    assert isinstance(after, Codebook)
    assert torch.equal(after.codes, codes) and after.bits == 2
    old, new = (centroid_values(one).flatten() for one in (before, after))
    assert new[1] == 0 and all(new[index] != old[index] for index in (0, 2, 3))
    assert torch.equal(live.quantized.get_parameter("fc.weight"), decode(after))
    assert all(torch.equal(live.quantized.state_dict()[name], value) for name, value in others.items())
    assert [one.metric for one in tuner.untuned] == ["top1"]


def test_without_codebooks_to_tune_nothing_is_trained(folder: Path) -> None:
    recipe = parse_recipe(anchored(RECIPE.replace("OPTIONS", "{bits: 2}"), folder), "r.yaml")
    model_run = ModelRun(recipe, torch.device("cpu"), allow_code=True)
    decision = Decision(TensorInfo("fc.weight", (4, 4), "F32"), "kmeans", KmeansConfig(bits=2), "test")
    plan = Plan(recipe, (decision,))
    live = open_live(read_checkpoint(folder / "m.safetensors"), plan, model_run)
    tuner, fitted = CodebookTuner(plan, model_run), Fitted({})
    assert tuner(live, fitted) is fitted and tuner.untuned == ()


def test_what_tuning_needs_is_asked_for(run: Run, folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text('version: 1\nrules:\n  - {match: "*.weight", kmeans: {bits: 4, tune: {}}}\n')
    done = run("cluster", str(folder / "m.safetensors"), "-r", str(recipe))
    assert done.code == 3 and "add `model`, `data.train`, `task`" in done.err
    text = RECIPE.replace("OPTIONS", "{bits: 4, tune: {}}") + "  - {match: x, kmeans: {bits: 2, tune: {epochs: 9}}}\n"
    recipe.write_text(anchored(text, folder))
    done = run("cluster", str(folder / "m.safetensors"), "-r", str(recipe), "--allow-code")
    assert done.code == 3 and "tune in different ways" in done.err
    recipe.write_text("version: 1\nrules:\n  - {match: a, kmeans: {bits: 4, tune: {epochs: 0}}}\n")
    assert run("recipe", "check", str(recipe)).code == 3


def test_defaults() -> None:
    assert KmeansConfig(bits=4, tune=Tune()).tune == Tune(epochs=3, learning_rate=1e-4, gradient="rms")


DKM = """
finetune:
  epochs: 3
  optimizer: {sgd: {lr: 0.02, momentum: 0.9}}
  schedule: cosine
"""


def with_dkm(run: Run, folder: Path, output: Path, options: str, *more: str) -> dict[str, Any]:
    (folder / "dkm.yaml").write_text(RECIPE.replace("kmeans: OPTIONS", f"dkm: {{{options}}}") + DKM)
    return cluster(run, folder, "dkm.yaml", output, *more)


@pytest.mark.parametrize(
    "options",
    [
        "bits: 1",
        "bits: 2, metric: plain",
        "bits: 2, levels: bf16",
        "bits: 4, dim: 2",
        "bits: 2, group_size: 2, codebook: int8",
        "bits: 2, temperature: 0.001, iterations: 1",
    ],
)
def test_differentiable_kmeans_ends_in_an_ordinary_artifact(
    run: Run, folder: Path, tmp_path: Path, options: str
) -> None:
    output = tmp_path / "a.safetensors"
    report = with_dkm(run, folder, output, options)
    assert run("verify", str(output)).code == 0
    measured = run("eval", str(output), "-r", str(folder / "dkm.yaml"), "--allow-code", "--json", "-")
    values = {one["metric"]: one["value"] for one in json.loads(measured.out)["metrics"]}
    assert values["top1"] == pytest.approx(report["accuracy"][0]["artifact"], abs=1e-6)
    file = read_artifact(output).files[0]
    loaded = qcompress.load_state_dict(output)
    for name, entry in file.manifest.tensors.items():
        encoded = file.read_encoded(name)
        assert isinstance(encoded, Codebook)
        vectors = loaded[name].numel() // entry.dim
        tables, entries, _ = encoded.centroids.shape
        assert len(encoded.codes.flatten()) == vectors and int(encoded.codes.max()) < entries
        if tables == entry.dim == 1:
            assert len(loaded[name].unique()) <= 2**entry.bits
    # Training moves what it does not cluster, and the manifest says which tensors.
    source = load_file(folder / "m.safetensors")
    kept = {name for name in source if name not in file.manifest.tensors and source[name].is_floating_point()}
    assert {name for name in kept if not torch.equal(source[name], loaded[name])} == set(file.manifest.adjusted)
    assert "norm.running_mean" in file.manifest.adjusted


def test_differentiable_kmeans_is_held_against_kmeans_alone(run: Run, folder: Path, tmp_path: Path) -> None:
    trained = with_dkm(run, folder, tmp_path / "a.safetensors", "bits: 1")["accuracy"][0]
    plain = clustered(run, folder, tmp_path / "b.safetensors", "{bits: 1}")["accuracy"][0]
    assert trained["kmeans"] == pytest.approx(plain["artifact"]) and trained["untuned"] is None
    assert trained["kmeans_ratio"] == pytest.approx(trained["artifact"] / plain["artifact"], rel=1e-4)


def test_statistics_weigh_codebooks_with_and_without_a_live_model(run: Run, folder: Path, tmp_path: Path) -> None:
    saved, live, alone = tmp_path / "s.safetensors", tmp_path / "live.safetensors", tmp_path / "alone.safetensors"
    recipe = RECIPE.replace('"*.weight", kmeans: OPTIONS', '"[cf]*.weight", kmeans: {bits: 2}')
    data = "data:\n  calibration: {npz: data.npz, samples: 64}\n"
    (folder / "weighed.yaml").write_text(recipe.replace("data:\n", data))
    words = ["cluster", str(folder / "m.safetensors"), "-r", str(folder / "weighed.yaml"), "--allow-code", "-q"]
    assert run(*words, "-o", str(tmp_path / "plain.safetensors"), "--save-statistics", str(saved)).code == 0
    done = run(*words, "-o", str(live), "--statistics", str(saved))
    assert done.code == 0, done.err
    (tmp_path / "r.yaml").write_text('version: 1\nrules:\n  - {match: "[cf]*.weight", kmeans: {bits: 2}}\n')
    words = ["cluster", str(folder / "m.safetensors"), "-r", str(tmp_path / "r.yaml"), "-q"]
    assert run(*words, "-o", str(alone), "--statistics", str(saved)).code == 0
    plain, one, other = (qcompress.load_state_dict(path) for path in (tmp_path / "plain.safetensors", live, alone))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(plain["conv.weight"], one["conv.weight"])


def test_what_tuning_is_held_against_is_weighed_by_statistics_too(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network that `kmeans` is measured on has the weights of the same recipe without tuning."""
    saved, output = tmp_path / "s.safetensors", tmp_path / "a.safetensors"
    text = (
        RECIPE.replace("data:\n", "data:\n  calibration: {npz: data.npz, samples: 64}\n") + "activations: {bits: 8}\n"
    )
    recipe = folder / "held.yaml"
    words = ["cluster", str(folder / "m.safetensors"), "-r", str(recipe), "--allow-code", "--force", "-o", str(output)]
    recipe.write_text(text.replace("OPTIONS", "{bits: 2}"))
    assert run(*words, "--save-statistics", str(saved)).code == 0
    assert run(*words, "--statistics", str(saved)).code == 0
    plain = qcompress.load_state_dict(output)
    measured: list[dict[str, Tensor]] = []

    def measure(module: nn.Module, setting: ModelRun, what: str) -> Sequence[Measurement]:
        if what == "k-means":
            measured.append(module.state_dict())
        return measure_task(module, setting, what)

    monkeypatch.setattr("qcompress.compress.tune_codebooks.measure_task", measure)
    recipe.write_text(text.replace("OPTIONS", "{bits: 2, tune: {epochs: 1}}"))
    done = run(*words, "--statistics", str(saved))
    assert done.code == 0, done.err
    assert len(measured) == 1
    assert all(torch.equal(measured[0][name], value) for name, value in plain.items())


def test_a_shared_codebook_is_tuned_as_one(run: Run, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    report = clustered(run, folder, output, "{bits: 3, share: model, tune: {epochs: 3, learning_rate: 0.01}}")
    assert report["accuracy"][0]["artifact"] >= report["accuracy"][0]["untuned"]
    file = read_artifact(output).files[0]
    codebooks = [file.read_encoded(name) for name in file.manifest.tensors]
    assert all(isinstance(one, Codebook) and torch.equal(one.centroids, codebooks[0].centroids) for one in codebooks)
    assert len([name for name in file.container.by_name if name.endswith(".qc.codebook")]) == 1


def test_a_shared_entrys_gradient_is_that_of_all_its_weights() -> None:
    centroids = torch.tensor([[[-1.0], [2.0]]])
    first = _Entries(
        Codebook(torch.tensor([[0, 1, 1]], dtype=torch.uint8), 1, centroids, 0, (1, 3)), torch.device("cpu")
    )
    other = _Entries(
        Codebook(torch.tensor([[0, 0, 1]], dtype=torch.uint8), 1, centroids, 0, (1, 3)),
        torch.device("cpu"),
        first.values,
    )
    _scale_gradient(first.values, first.counts + other.counts, "mean", keep_zero=False)
    weights = torch.cat([first(torch.empty(0)), other(torch.empty(0))])
    (weights * torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])).sum().backward()
    assert first.values.grad is not None
    assert first.values.grad.flatten().tolist() == pytest.approx([(1 + 4 + 5) / 3, (2 + 3 + 6) / 3])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(x))
        return found


def test_tied_copies_are_tuned_with_the_weight_that_they_copy() -> None:
    """Both places take the entries while they are trained, both gradients count, and the tie is there afterwards."""
    torch.manual_seed(0)
    config = KmeansConfig(bits=1, tune=Tune(gradient="sum"))
    decision = Decision(TensorInfo("first.weight", (6, 6), "F32"), "kmeans", config, "test")
    x = torch.randn(8, 6)
    live = make_live_model(Tied(), [decision], [], Batch((x,)), device=torch.device("cpu"))
    codes = torch.randint(0, 2, (6, 6), dtype=torch.uint8)
    encoded = Codebook(codes, 1, torch.tensor([[[-0.5], [0.75]]]), 0, (6, 6))
    with _entries(live, [decision], Fitted({"first.weight": encoded})) as entries:
        live.quantized(x).square().sum().backward()
        values = entries["first.weight"][1].values
        by_hand = torch.tensor([-0.5, 0.75], requires_grad=True)
        weight = by_hand[codes.long()]
        (x @ weight.T @ weight.T).square().sum().backward()
        assert values.grad is not None and by_hand.grad is not None
        torch.testing.assert_close(values.grad.flatten(), by_hand.grad)
    module: Any = live.quantized
    assert module.second.weight is module.first.weight and set(module.state_dict()) == {"first.weight", "second.weight"}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(x))
        return found


def test_entries_that_layers_share_are_divided_by_the_codes_of_all_of_them() -> None:
    config = KmeansConfig(bits=1, share="model", tune=Tune(gradient="mean"))
    shapes = {"first.weight": (6, 6), "second.weight": (3, 6)}
    own = [
        Decision(TensorInfo(name, shape, "F32"), "kmeans", config, "test", codebook=CodebookSpec(shared="model"))
        for name, shape in shapes.items()
    ]
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    live = make_live_model(Pair(), own, [], Batch((x,)), device=torch.device("cpu"))
    table = torch.tensor([[[-0.5], [0.75]]])
    codes = {name: torch.eye(6, dtype=torch.uint8)[: shape[0]] for name, shape in shapes.items()}
    fitted = Fitted({name: Codebook(codes[name], 1, table, 0, shape) for name, shape in shapes.items()})
    with _entries(live, own, fitted) as entries:
        live.quantized(x).square().sum().backward()
        values = entries["first.weight"][1].values
        assert entries["second.weight"][1].values is values
        by_hand = table.flatten().requires_grad_(True)
        first, second = (by_hand[codes[name].long()] for name in shapes)
        (x @ first.T @ second.T).square().sum().backward()
        assert values.grad is not None and by_hand.grad is not None
        # Nine ones on the diagonals; 54 - 9 zeros.
        torch.testing.assert_close(values.grad.flatten(), by_hand.grad / torch.tensor([45.0, 9.0]))


def test_the_temperature_falls_from_the_first_step_to_the_last(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float]] = []

    def watched(progress: float, start: float, end: float) -> float:
        seen.append((progress, share_at(progress, start, end)))
        return seen[-1][1]

    monkeypatch.setattr("qcompress.methods.dkm.share_at", watched)
    with_dkm(run, folder, tmp_path / "a.safetensors", "bits: 2, temperature_share: [0.4, 0.1]")
    places = sorted({place for place, _ in seen})
    assert [place for place, _ in seen] == sorted(place for place, _ in seen)
    # 192 samples by 16, three epochs.
    assert places == pytest.approx([step / 36 for step in range(36)])
    assert seen[0][1] == 0.4 and 0.1 < seen[-1][1] < 0.11
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    decision = Decision(TensorInfo("w", (6, 10), "F32"), "dkm", DkmConfig(bits=2), "")
    gaps = []
    for progress in (0.0, 1.0):
        shared = SoftShared(weight, decision, torch.Generator().manual_seed(0))
        shared.progress = progress
        soft = shared.train()(weight)
        gaps.append(float((soft - shared.eval()(weight)).abs().mean()))
    assert gaps[1] < gaps[0] / 5


def test_a_temperature_that_merges_all_centroids_is_held(run: Run, folder: Path, tmp_path: Path) -> None:
    report = with_dkm(run, folder, tmp_path / "a.safetensors", "bits: 2, temperature: 1000.0")
    held = [line for line in report["warnings"] if "held below where its centroids merge" in line]
    assert len(held) == 3
    assert len(qcompress.load_state_dict(tmp_path / "a.safetensors")["fc.weight"].unique()) > 1
    assert not any("held" in line for line in with_dkm(run, folder, tmp_path / "b.safetensors", "bits: 2")["warnings"])


@pytest.mark.slow
def test_equal_seeds_give_equal_bytes(run: Run, folder: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors")]
    for output, seed in zip(outputs, ("1", "1", "2"), strict=True):
        with_dkm(run, folder, output, "bits: 2", "--seed", seed)
    data = [output.read_bytes() for output in outputs]
    assert data[0] == data[1] != data[2]


def test_statistics_are_looked_at_before_training_and_said_to_be_of_no_use(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    output, saved = tmp_path / "a.safetensors", tmp_path / "s.safetensors"
    save_file({"other": torch.zeros(2)}, saved)
    said = with_dkm(run, folder, output, "bits: 2", "--statistics", str(saved))["warnings"]
    assert said == ["dkm draws on no statistics: unweighed"]
    words = ["cluster", str(folder / "m.safetensors"), "-r", str(folder / "dkm.yaml"), "--allow-code", "--force"]
    done = run(*words, "-o", str(output), "--statistics", str(tmp_path / "none.safetensors"))
    assert done.code == 3 and "none.safetensors: no such file" in done.err and "epoch" not in done.err


def test_what_differentiable_kmeans_needs_is_asked_for(run: Run, folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text('version: 1\nrules:\n  - {match: "*.weight", dkm: {bits: 2}}\n')
    done = run("cluster", str(folder / "m.safetensors"), "-r", str(recipe))
    assert done.code == 3 and "add `model`, `data.train`, `task`, `finetune`" in done.err
    with pytest.raises(ValueError, match="for scalars"):
        DkmConfig(bits=2, dim=2, levels="bf16")


def test_soft_weights_near_no_temperature_are_the_nearest_entries() -> None:
    info = TensorInfo("w", (6, 10), "F32")
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    config = DkmConfig(bits=2, temperature=1e-6, iterations=1)
    shared = SoftShared(weight, Decision(info, "dkm", config, ""), torch.Generator().manual_seed(0))
    first = shared.centroids.clone()
    shared.train()
    soft = shared(weight.clone().requires_grad_(True))
    assert len((soft.detach() * 1e4).round().unique()) == 4
    # One step of Lloyd's from an optimum stays there.
    torch.testing.assert_close(shared.centroids, first, atol=1e-4, rtol=0)
    shared.eval()
    torch.testing.assert_close(shared(weight), soft.detach(), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "options",
    [{"bits": 3}, {"bits": 3, "codebook": "int8"}, {"bits": 4, "dim": 2}, {"bits": 1, "granularity": "channel"}],
)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_what_is_measured_while_training_is_what_is_stored(options: dict[str, Any], dtype: str) -> None:
    """In eval mode a weight is, to the last bit, what its codes and entries will give, in the checkpoint's dtype."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(8, 30, generator=generator) * 0.07
    weight = weight.bfloat16().float() if dtype == "BF16" else weight
    decision = Decision(TensorInfo("w", (8, 30), dtype), "dkm", DkmConfig(**options), "")
    shared = SoftShared(weight, decision, generator)
    shared.train()
    shared(weight)
    shared.eval()
    assert torch.equal(shared(weight), decode(shared.encode(weight)).to(TORCH_DTYPES[dtype]).float())
