"""What a recipe lacks for its methods, quantizers, companions and gates, all of it at once."""

from __future__ import annotations

import pytest

from qcompress.recipe import parse_recipe, refuse_missing, refuse_untrainable

MODEL = "model: {factory: a:b}\n"
CALIBRATION = "data: {calibration: {npz: c.npz}}\n"
EVAL = "data: {eval: {npz: e.npz}}\n"
BOTH = "data: {calibration: {npz: c.npz}, eval: {npz: e.npz}}\n"
TASK = "task: classification\n"


def lacks(method: str, sections: str, **options: bool) -> list[str]:
    text = f"version: 1\n{sections}rules:\n  - {{match: '*', {method}}}\n"
    return [str(error) for error in refuse_missing(parse_recipe(text, "r.yaml"), **options)]


@pytest.mark.parametrize(
    ("method", "sections"),
    [
        ("rtn: {bits: 4}", ""),
        ("rtn: {bits: 4}", MODEL + EVAL + TASK),
        ("gptq: {bits: 4}", MODEL + CALIBRATION),
        ("dfq: {bits: 4}", MODEL),
        ("dfq: {bits: 4}", MODEL + "activations: {range: noise}\n"),
        ("pdquant: {bits: 4}", MODEL + BOTH + TASK + "gates: {max_drop: {top5: 0.1}}\n"),
        ("rtn: {bits: 2}", MODEL + CALIBRATION + "companions: [batch_norm]\n"),
    ],
)
def test_what_is_complete(method: str, sections: str) -> None:
    assert lacks(method, sections) == []


@pytest.mark.parametrize(
    ("method", "sections", "what"),
    [
        (
            "gptq: {bits: 4}",
            "",
            "gptq needs a live model; add `model` and `data.calibration`; or run with --statistics",
        ),
        ("pdquant: {bits: 4}", "", "pdquant needs a live model; add `model` and `data.calibration`"),
        ("dfq: {bits: 4}", "", "dfq needs a live model; add `model`"),
        ("adaround: {bits: 4}", MODEL + EVAL + TASK, "adaround needs calibration data"),
        ("dfq: {bits: 4, bias_correction: empirical}", MODEL, "bias_correction: empirical needs calibration data"),
        ("rtn: {bits: 4}", "activations: {bits: 8}\n", "they need a live model"),
        ("rtn: {bits: 4}", MODEL + "activations: {range: mse}\n", "range: mse needs calibration data"),
        ("rtn: {bits: 4}", MODEL + "companions: [batch_norm]\n", "they need data"),
        ("dfq: {bits: 4}", MODEL + CALIBRATION + "companions: [batch_norm]\n", "dfq folds them"),
        ("rtn: {bits: 4}", MODEL + TASK, "there is nothing to measure on"),
        ("rtn: {bits: 4}", MODEL + EVAL + TASK + "gates: {min_metric: {bleu: 1}}\n", "does not measure 'bleu'"),
    ],
)
def test_what_is_missing_is_said_with_its_mend(method: str, sections: str, what: str) -> None:
    errors = lacks(method, sections)
    assert len(errors) == 1 and what in errors[0] and errors[0].startswith(("r.yaml:", "gates."))


@pytest.mark.parametrize("task", ["reconstruction", "translation", "{factory: {factory: a:b}}", "classification"])
def test_only_classes_are_mixed_whatever_trains(task: str) -> None:
    data = "data: {train: {npz: t.npz, augment: [flip, cutmix]}, eval: {npz: e.npz}}\n"
    finetune = "finetune: {optimizer: {sgd: {lr: 0.1}}}\n"
    sections = f"{MODEL}{data}task: {task}\n{finetune}"
    what = "cutmix mixes images and their classes, and the task is"
    found = [lacks(method, sections) for method in ("lsq: {bits: 4}", "kmeans: {bits: 4, tune: {}}")]
    found.append([*map(str, refuse_untrainable(parse_recipe("version: 1\n" + sections, "r.yaml")))])
    for errors in found:
        assert (errors == []) == (task == "classification")
        assert all(error.startswith("r.yaml:3: data.train: " + what) for error in errors)


def test_statistics_stand_in_for_model_and_data() -> None:
    assert lacks("gptq: {bits: 4}", "", statistics=True) == []
    assert lacks("adaround: {bits: 4}", "", statistics=True) == []
    assert len(lacks("pdquant: {bits: 4}", "", statistics=True)) == 1
    assert "objective: sampled" in lacks("adaround: {bits: 4, objective: sampled}", "", statistics=True)[0]


def test_measuring_needs_model_data_and_task() -> None:
    assert lacks("rtn: {bits: 4}", MODEL + EVAL + TASK, measures=True) == []
    assert "names no model and no data.eval and no task" in lacks("rtn: {bits: 4}", "", measures=True)[0]
