"""Companions: each layer's mean error is gone afterwards, and batch norms give what they gave."""

from __future__ import annotations

import pytest
import torch
from model.networks import Mlp, Residual, Separable, Untraceable, live
from torch import nn

from qcompress.calibration.activations import measure_statistics
from qcompress.calibration.corrections import run_companions
from qcompress.checkpoint.side_files import read_statistics, refuse_misfit, save_statistics
from qcompress.errors import DataError
from qcompress.model.live import LiveModel, put_tensors


def rounded(kind: type[nn.Module], blocks: tuple[str, ...] = ()) -> LiveModel:
    """A network whose quantized copy has coarse weights."""
    found = live(kind, blocks=blocks)
    for name in found.layers:
        weight = found.module.get_submodule(name).weight
        step = float(weight.abs().max()) / 2
        put_tensors(found.quantized, {f"{name}.weight": (weight / step).round() * step})
    return found


def channel_means(found: LiveModel, module: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of a module's output by channel over the calibration data."""
    seen: list[torch.Tensor] = []
    handle = module.get_submodule(name).register_forward_hook(lambda *args: seen.append(args[2].clone()))
    with torch.no_grad():
        for batch in found.calibration:
            module(*batch.args)
    handle.remove()
    rows = torch.cat([y.movedim(1, -1).flatten(0, -2) for y in seen]).double()
    return rows.mean(0), rows.var(0, correction=0)


@pytest.mark.parametrize(
    ("kind", "after"),
    [(Residual, "stem_bn bn1 bn2 fc"), (Separable, "bn dw_bn pw_bn fc"), (Mlp, "layers.0 layers.2 layers.4")],
)
def test_bias_correction_leaves_no_mean_error(kind: type[nn.Module], after: str) -> None:
    found = rounded(kind)
    corrected = run_companions(found, ["bias_correction"])
    assert corrected.notes == ()
    for name in after.split():
        clean, noisy = (channel_means(found, module, name)[0] for module in (found.module, found.quantized))
        torch.testing.assert_close(noisy, clean, rtol=1e-4, atol=1e-4)
    for name, value in corrected.tensors.items():
        torch.testing.assert_close(value, found.quantized.state_dict()[name])
        assert name.endswith(("bias", "running_mean"))


@pytest.mark.parametrize(("kind", "norms"), [(Residual, "stem_bn bn1 bn2"), (Separable, "bn dw_bn pw_bn")])
def test_matched_batch_norms_give_the_mean_and_variance_that_they_gave(kind: type[nn.Module], norms: str) -> None:
    found = rounded(kind)
    run_companions(found, ["batch_norm"])
    for name in norms.split():
        for clean, noisy in zip(
            *(channel_means(found, module, name) for module in (found.module, found.quantized)), strict=True
        ):
            torch.testing.assert_close(noisy, clean, rtol=2e-3, atol=1e-3)


def test_without_error_nothing_changes() -> None:
    found = live(Residual)
    corrected = run_companions(found, ["bias_correction", "batch_norm"])
    for name, value in corrected.tensors.items():
        torch.testing.assert_close(value, found.module.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_blocks_are_corrected_too_and_what_has_no_home_is_named() -> None:
    found = rounded(Untraceable, ("blocks.*",))
    assert run_companions(found, ["bias_correction"]).notes == ()
    clean, noisy = (channel_means(found, module, "head")[0] for module in (found.module, found.quantized))
    torch.testing.assert_close(noisy, clean, rtol=1e-4, atol=1e-4)

    bare = live(Mlp)
    for module in (bare.module, bare.quantized):
        module.layers[2].register_parameter("bias", None)
    assert run_companions(bare, ["bias_correction"]).notes == (
        "layers.2: no bias and no batch norm to hold its correction",
    )


def test_statistics_are_read_back_and_held_against_the_weights(tmp_path) -> None:  # type: ignore[no-untyped-def]
    found = live(Separable)
    save_statistics(measure_statistics(found), tmp_path / "s.safetensors")
    statistics = read_statistics(tmp_path / "s.safetensors")
    gram = statistics.gram("dw.weight")
    assert gram.hessian.shape == (6, 9, 9) and gram.cross is None
    torch.testing.assert_close(gram.hessian, gram.hessian.transpose(1, 2))
    refuse_misfit(gram, (6, 1, 3, 3), "dw")
    with pytest.raises(DataError, match=r"6 groups of 9 columns.*\[6, 1, 5, 5\]"):
        refuse_misfit(gram, (6, 1, 5, 5), "dw")
    with pytest.raises(DataError, match="have no float32 tensor other"):
        statistics.gram("other")
