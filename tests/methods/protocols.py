"""Every method and exporter is held against its Protocol here, by mypy --strict; the registry's casts rest on this."""

from __future__ import annotations

from qcompress.artifact.reader import Artifact
from qcompress.exporters import compressed_tensors, gguf, mlx, safetensors
from qcompress.methods import (
    adaround,
    dfq,
    dkm,
    gptq,
    hqq,
    kmeans,
    learned,
    lsq,
    mse,
    pact,
    pdquant,
    rd,
    rtn,
    squant,
)
from qcompress.model.live import LiveModel
from qcompress.registry import (
    AdaroundConfig,
    DfqConfig,
    DkmConfig,
    Encode,
    Export,
    Fit,
    GptqConfig,
    HqqConfig,
    KmeansConfig,
    LearnedConfig,
    LsqConfig,
    MseConfig,
    PactConfig,
    PdquantConfig,
    RdConfig,
    RtnConfig,
    SquantConfig,
)

encode_rtn: Encode[RtnConfig] = rtn.encode
encode_mse: Encode[MseConfig] = mse.encode
encode_squant: Encode[SquantConfig] = squant.encode
encode_hqq: Encode[HqqConfig] = hqq.encode
encode_adaround: Encode[AdaroundConfig] = adaround.encode
encode_gptq: Encode[GptqConfig] = gptq.encode
encode_rd: Encode[RdConfig] = rd.encode
encode_kmeans: Encode[KmeansConfig] = kmeans.encode
encode_learned: Encode[LearnedConfig] = learned.encode

fit_dfq: Fit[LiveModel, DfqConfig] = dfq.fit
fit_adaround: Fit[LiveModel, AdaroundConfig] = adaround.fit
fit_gptq: Fit[LiveModel, GptqConfig] = gptq.fit
fit_pdquant: Fit[LiveModel, PdquantConfig] = pdquant.fit
fit_rd: Fit[LiveModel, RdConfig] = rd.fit
fit_lsq: Fit[LiveModel, LsqConfig] = lsq.fit
fit_pact: Fit[LiveModel, PactConfig] = pact.fit
fit_dkm: Fit[LiveModel, DkmConfig] = dkm.fit

export_safetensors: Export[Artifact] = safetensors.export
export_compressed_tensors: Export[Artifact] = compressed_tensors.export
export_gguf: Export[Artifact] = gguf.export
export_mlx: Export[Artifact] = mlx.export
