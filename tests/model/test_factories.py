"""What a recipe may name without consent is a network that a package lists; all else is code, and stays unimported."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qcompress.data.text import read_tokenizer
from qcompress.data.user_code import import_package, named_code
from qcompress.errors import DataError, ModelError, UsageError
from qcompress.model.build import build_model
from qcompress.model.factories import code_of, listed_network, refuse_arguments, without_network
from qcompress.recipe import parse_recipe
from qcompress.types.settings import ModelSettings

BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 20,
    "max_position_embeddings": 8,
}

LISTED: list[tuple[str, dict[str, Any]]] = [
    ("qcompress.demo:DigitsNet", {}),
    ("torchvision.models:resnet18", {"num_classes": 10}),
    ("torchvision.models:vgg11", {"init_weights": False}),
    ("torchvision.models.detection:fasterrcnn_mobilenet_v3_large_320_fpn", {}),
    ("torchvision.models.segmentation:lraspp_mobilenet_v3_large", {"num_classes": 3}),
    ("torchvision.models.quantization:resnet18", {}),
    ("timm:create_model", {"model_name": "resnet10t", "num_classes": 3, "drop_path_rate": 0.1}),
    ("timm:create_model", {"model_name": "resnet18.a1_in1k"}),
    ("timm.models:resnet10t", {}),
    ("transformers:BertModel", {**BERT, "use_cache": True, "id2label": {"0": "yes/no"}}),
    ("transformers.models.bert:BertForSequenceClassification", BERT),
    ("transformers:DetrForObjectDetection", {"encoder_layers": 1, "decoder_layers": 1}),
]

CODE: list[tuple[str, dict[str, Any]]] = [
    ("os:system", {"command": "touch MARK"}),
    ("subprocess:run", {"args": "touch MARK", "shell": True}),
    ("runpy:run_path", {"path_name": "MARK.py"}),
    ("shutil:rmtree", {"path": "FOLDER"}),
    ("pathlib:Path.touch", {"self": "MARK"}),
    ("builtins:open", {"file": "MARK", "mode": "w"}),
    ("builtins:exec", {}),
    ("importlib:import_module", {"name": "planted_by_the_test"}),
    ("planted_by_the_test:make", {}),
    ("planted_by_the_test.torchvision.models:resnet18", {}),
    ("torch:load", {"f": "MARK.pt", "weights_only": False}),
    ("torch.hub:load", {"repo_or_dir": "FOLDER", "model": "make", "source": "local"}),
    ("torch.nn:Linear", {"in_features": 3, "out_features": 2}),
    ("net.py:make", {}),
    ("torchvision.models.py:resnet18", {}),
    ("torchvision.models:ResNet", {}),
    ("torchvision.models:get_model", {"name": "resnet18"}),
    ("torchvision.models:list_models", {}),
    ("torchvision.models:resnet18.__call__", {}),
    ("torchvision.models:resnet.load_state_dict_from_url", {"url": "file:MARK"}),
    ("torchvision.models.resnet:torch.load", {"f": "MARK.pt"}),
    ("torchvision.datasets:CIFAR10", {"root": "FOLDER", "download": True}),
    ("torchvision:models.resnet18", {}),
    ("timm:create_model", {"model_name": "hf-hub:someone/something"}),
    ("timm:create_model", {"model_name": "local-dir:FOLDER"}),
    ("timm:create_model", {"model_name": "hf_hub:someone/something"}),
    ("timm:create_model", {"model_name": "no_such_network"}),
    ("timm:create_model", {}),
    ("timm.models:load_checkpoint", {"model": None, "checkpoint": "MARK.pt"}),
    ("timm.models:load_pretrained", {}),
    ("timm.data:create_dataset", {"name": "", "root": "FOLDER"}),
    ("transformers:AutoModel", {}),
    ("transformers:AutoModel.from_pretrained", {"pretrained_model_name_or_path": "FOLDER", "trust_remote_code": True}),
    ("transformers:BertModel.from_pretrained", {"pretrained_model_name_or_path": "FOLDER"}),
    ("transformers:PreTrainedModel", {}),
    ("transformers:pipeline", {"task": "text-generation", "trust_remote_code": True}),
    ("transformers:BertConfig", {}),
    ("transformers.dynamic_module_utils:get_class_from_dynamic_module", {}),
    ("qcompress.demo:run_demo", {"folder": "FOLDER"}),
    ("qcompress.demo:subprocess.run", {"args": "touch MARK", "shell": True}),
]


def settings(factory: str, args: dict[str, Any] | None = None) -> ModelSettings:
    return ModelSettings(factory=factory, args=args or {})


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the import path and below the feet, where whatever runs leaves a MARK."""
    mark = "open('MARK', 'w')\n\ndef make():\n    open('MARK', 'w')\n"
    for name in ("planted_by_the_test.py", "net.py", "MARK.py", "hubconf.py", "torchvision.models.py"):
        (tmp_path / name).write_text(mark)
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FOLDER" / "config.json").write_text("{}")
    (tmp_path / "MARK.pt").write_bytes(b"not a pickle")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("factory", "args"), LISTED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_listed_network_needs_no_consent_and_fetches_nothing(
    factory: str, args: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("weights are fetched")

    import_package("torchvision")
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", fetch)
    monkeypatch.setattr("torch.hub.download_url_to_file", fetch)
    monkeypatch.setattr("socket.socket.connect", fetch)
    with torch.device("meta"):
        module = build_model(settings(factory, args), Path(), allow_code=False)
    assert isinstance(module, nn.Module) and not module.training
    config = getattr(module, "config", None)
    assert not getattr(config, "use_pretrained_backbone", False)
    assert not getattr(getattr(config, "backbone_config", None), "use_pretrained_backbone", False)


def test_every_network_that_torchvision_lists_is_listed_by_its_own_module() -> None:
    models = import_package("torchvision.models")
    for name in models.list_models():
        builder = models.get_model_builder(name)
        assert listed_network(settings(f"{builder.__module__}:{builder.__name__}")) is not None, name


@pytest.mark.parametrize(("factory", "args"), CODE, ids=lambda value: value if isinstance(value, str) else "")
def test_all_else_is_code_that_is_neither_imported_nor_called(
    factory: str, args: dict[str, Any], planted: Path
) -> None:
    before = sorted(planted.rglob("*"))
    with pytest.raises(UsageError, match=r"^model\.factory: .* is code that would run; .*--allow-code") as caught:
        build_model(settings(factory, args), planted, allow_code=False)
    assert "\n" not in str(caught.value)
    assert sorted(planted.rglob("*")) == before
    assert "planted_by_the_test" not in sys.modules


def test_code_runs_with_consent(planted: Path) -> None:
    with pytest.raises(ModelError, match="gives a NoneType"):
        build_model(settings("net.py:make"), planted, allow_code=True)
    assert (planted / "MARK").exists()
    module = build_model(settings("torch.nn:Linear", {"in_features": 3, "out_features": 2}), planted, allow_code=True)
    assert isinstance(module, nn.Linear)


ARGUMENTS: list[tuple[str, dict[str, Any], str]] = [
    ("torchvision.models.segmentation:fcn_resnet50", {"weights_backbone": "DEFAULT"}, "weights_backbone"),
    ("torchvision.models:resnet18", {"pretrained_backbone": 1}, "pretrained_backbone"),
    ("timm:create_model", {"model_name": "resnet10t", "pretrained_cfg": {"file": "w.pt"}}, "pretrained_cfg"),
    (
        "timm:create_model",
        {"model_name": "resnet10t", "pretrained_cfg_overlay": {"url": "u"}},
        "pretrained_cfg_overlay",
    ),
    ("timm:create_model", {"model_name": "resnet10t", "cache_dir": "d"}, "cache_dir"),
    ("timm:create_model", {"model_name": "resnet10t", "hub_model": True}, "hub_model"),
    ("transformers:BertModel", {"auto_map": {"AutoModel": "code.Model"}}, "auto_map"),
    ("transformers:BertModel", {"trust_remote_code": True}, "trust_remote_code"),
    ("transformers:BertModel", {"name_or_path": "folder"}, "name_or_path"),
    ("transformers:BertModel", {"_name_or_path": "folder"}, "_name_or_path"),
    ("transformers:BertModel", {"attn_implementation": "someone/kernel"}, "attn_implementation"),
    ("transformers:DetrForObjectDetection", {"use_pretrained_backbone": True}, "use_pretrained_backbone"),
    ("transformers:DetrForObjectDetection", {"backbone": "someone/backbone"}, "backbone"),
    (
        "transformers:EncoderDecoderModel",
        {"encoder": {"model_type": "bert", "auto_map": {"AutoModel": "code.Model"}}, "decoder": {"model_type": "bert"}},
        "encoder.auto_map",
    ),
    ("transformers:BertModel", {"more": [{"file": "w.pt"}]}, "more.0.file"),
    ("transformers:TimmWrapperModel", {"architecture": "hf-hub:someone/something"}, "architecture"),
]


@pytest.mark.parametrize(("factory", "args", "path"), ARGUMENTS, ids=[path for _, _, path in ARGUMENTS])
def test_an_argument_that_names_a_place_needs_consent(factory: str, args: dict[str, Any], path: str) -> None:
    with pytest.raises(UsageError) as caught:
        build_model(settings(factory, args), Path(), allow_code=False)
    assert caught.value.where == f"model.args.{path}"
    assert "--allow-code" in caught.value.hint


def test_numbers_switches_and_labels_are_no_places() -> None:
    args: dict[str, Any] = {"drop_path_rate": 0.1, "use_cache": True, "init_weights": True, "pretrained": False}
    args |= {"weights": None, "patch_size": [4, 4], "hidden_act": "gelu"}
    args |= {"id2label": {"0": "a/b", "1": "file:c"}, "label2id": {"a/b": 0}}
    refuse_arguments(settings("a:b", args), "model")


def test_all_named_code_is_told_with_its_place() -> None:
    text = """\
version: 1
model: {factory: "torchvision.models:resnet18"}
data:
  calibration: {factory: a.py:one}
  eval: {factory: "b.c:two"}
  train: {factory: d.py:three}
task: {factory: {factory: e.py:four, metric: m}}
rules: [{match: "*", rtn: {bits: 4}}]
finetune: {optimizer: {sgd: {lr: 0.1}}, loss: f.py:five}
"""
    recipe = parse_recipe(text, "r.yaml")
    assert [(one.key, one.name) for one in named_code(recipe)] == [
        ("model.factory", "torchvision.models:resnet18"),
        ("data.calibration.factory", "a.py:one"),
        ("data.eval.factory", "b.c:two"),
        ("data.train.factory", "d.py:three"),
        ("task.factory", "e.py:four"),
        ("finetune.loss", "f.py:five"),
    ]
    found = code_of(recipe)
    assert [one.key for one in found] == [one.key for one in named_code(recipe)][1:]
    assert [one.where for one in found] == [
        "r.yaml:4: data.calibration.factory",
        "r.yaml:5: data.eval.factory",
        "r.yaml:6: data.train.factory",
        "r.yaml:7: task.factory",
        "r.yaml:9: finetune.loss",
    ]


def test_the_libraries_are_as_they_were_afterwards() -> None:
    constants = import_package("huggingface_hub.constants")
    before = constants.HF_HUB_OFFLINE
    with pytest.raises(ZeroDivisionError), without_network():
        assert constants.HF_HUB_OFFLINE is True
        raise ZeroDivisionError
    assert constants.HF_HUB_OFFLINE is before


def test_a_tokenizer_that_brings_code_is_refused_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Asked(io.StringIO):
        def readline(self, *_: object) -> str:
            raise AssertionError("the user is asked")

    monkeypatch.setattr(sys, "stdin", Asked())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    own = {"auto_map": {"AutoTokenizer": ["code.Own", None]}, "tokenizer_class": "Own"}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(own))
    (tmp_path / "tokenizer" / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "code.Config"}}))
    (tmp_path / "tokenizer" / "code.py").write_text("open('MARK', 'w')\n")
    with pytest.raises(DataError, match="is no tokenizer"):
        read_tokenizer(tmp_path / "tokenizer")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "MARK").exists()
