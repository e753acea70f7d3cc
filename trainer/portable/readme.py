"""The page that goes along with a portable model."""

from __future__ import annotations

from trainer.portable.folder import PortableManifest
from trainer.portable.signature import PortTensor, Signature

_ONNX = """```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
recorded = dict(np.load("recorded.npz"))
expected = recorded.pop("expected")
(probability,) = session.run(None, recorded)
print(np.abs(probability - expected).max())
```"""
_PT2 = """```python
import json

import numpy as np
import torch

model = torch._inductor.aoti_load_package("model.pt2")
recorded = dict(np.load("recorded.npz"))
expected = recorded.pop("expected")
names = [each["name"] for each in json.load(open("signature.json"))["inputs"]]
probability = model(*(torch.from_numpy(recorded[name]) for name in names))
print(np.abs(probability.numpy() - expected).max())
```"""
_RUN = {
    "onnx": ("It needs numpy and onnxruntime, and nothing else:", _ONNX),
    "pt2": ("It needs torch of the version below, on a processor like that of the export:", _PT2),
}


def page(manifest: PortableManifest, signature: Signature, triton: str = "") -> str:
    """The page, in Markdown.

    Args:
        triton: name of the folder of the Triton repository that is written with it; empty: there is none.
    """
    how, code = _RUN[manifest.form]
    outside = [f"* {line}" for line in signature.outside]
    dense = (
        f"`{manifest.dense}` is stage two alone: what look-ups and search gave -> probabilities."
        if manifest.dense
        else f"There is no file of stage two alone: {manifest.no_dense}."
    )
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    aucs = [
        f"* AUC of {task}: {was:.6f} by the snapshot, {now:.6f} here"
        for task, (was, now) in manifest.aucs.items()
    ]
    return "\n".join(
        [
            "# A two-stage recommendation model",
            "",
            f"`{manifest.model}` is the whole scorer, search included: ids in, probabilities out. {how}",
            "",
            code,
            "",
            dense,
            *(["", f"A model repository for Triton was asked for with it: `{triton}`."] if triton else []),
            "",
            "## Inputs and outputs",
            "",
            "| name | type | axes | values | padding | what it is |",
            "|---|---|---|---|---|---|",
            *map(_row, (*signature.inputs, *signature.outputs)),
            "",
            "Axes of one name have one size, which may change from call to call. All inputs must be given.",
            "Values are not checked: an id outside of a table is an error, or reads another row.",
            *(["", "Made outside of the model:", "", *outside] if outside else []),
            "",
            "## What was compared",
            "",
            f"* Largest difference of a probability to the snapshot's: {manifest.worst:.3g}",
            *aucs,
            f"* Snapshot {signature.snapshot}, step {signature.step}",
            f"* {versions}",
            "",
        ]
    )


def _row(each: PortTensor) -> str:
    axes = ", ".join(
        str(axis.least) if axis.fixed else axis.name + (f" (to {axis.most:,})" if axis.most else "")
        for axis in each.axes
    )
    ends = ["" if end is None else f"{end:,}" for end in (each.least, each.most)]
    values = f"{ends[0]} to {ends[1]}" if all(ends) else f"{ends[0]} or more" if ends[0] else "any"
    cells = (f"`{each.name}`", each.dtype, axes, values, each.padding or "none", each.meaning)
    return f"| {' | '.join(cells)} |"
