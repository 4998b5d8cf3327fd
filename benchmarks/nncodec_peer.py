"""One checkpoint through NNCodec and back, run by a Python that has it: `nncodec_peer.py CHECKPOINT QP CODED DENSE`.

Prints bytes, bits a weight of the whole file, and processor seconds as JSON in its last line. For comparison only.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file


def main() -> None:
    checkpoint, qp, coded, dense = sys.argv[1:]
    # Its torchvision asks for operators that a torch without them only has to name.
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    # It leaves files where it runs.
    os.chdir(Path(coded).parent)
    from nncodec.nn import decode, encode

    state = load_file(checkpoint)
    floats = {name: value.astype(np.float32) for name, value in state.items() if value.dtype.kind == "f" and value.ndim}
    started = time.process_time()
    stream = encode(dict(floats), args={"qp": int(qp), "use_dq": True, "verbose": False})
    seconds = time.process_time() - started
    Path(coded).write_bytes(bytes(stream))
    found = decode(stream)
    state |= {name: np.asarray(found[name], np.float32).reshape(value.shape) for name, value in floats.items()}
    save_file(state, dense)
    weights = sum(value.size for value in floats.values())
    print(json.dumps({"bytes": len(stream), "bpw": 8 * len(stream) / weights, "seconds": seconds}))


if __name__ == "__main__":
    main()
