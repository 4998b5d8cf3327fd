"""protocols.py, which mypy checks, holds every method and every exporter of the registry, and them alone."""

from __future__ import annotations

import inspect

from methods import protocols

from qcompress.registry import EXPORTERS, METHODS

ANNOTATIONS = inspect.get_annotations(protocols)


def named(prefix: str) -> dict[str, str]:
    """Name of a method or exporter -> the Protocol that it is held against."""
    start = f"{prefix}_"
    return {name.removeprefix(start): kind for name, kind in ANNOTATIONS.items() if name.startswith(start)}


def test_every_method_that_encodes_is_held_against_encode_of_its_config() -> None:
    encoding = {name: method for name, method in METHODS.items() if method.encodes}
    assert named("encode") == {name: f"Encode[{method.config.__name__}]" for name, method in encoding.items()}
    for name, method in encoding.items():
        assert vars(protocols)[f"encode_{name}"] is method.load_encode()


def test_every_method_that_fits_is_held_against_fit_of_its_config() -> None:
    fitting = {name: method for name, method in METHODS.items() if method.fits}
    assert named("fit") == {name: f"Fit[LiveModel, {method.config.__name__}]" for name, method in fitting.items()}
    for name, method in fitting.items():
        assert vars(protocols)[f"fit_{name}"] is method.load_fit()


def test_every_exporter_that_is_built_is_held_against_export() -> None:
    built = {name: exporter for name, exporter in EXPORTERS.items() if exporter.target}
    assert named("export") == dict.fromkeys((name.replace("-", "_") for name in built), "Export[Artifact]")
    for name, exporter in built.items():
        assert vars(protocols)[f"export_{name.replace('-', '_')}"] is exporter.load()
