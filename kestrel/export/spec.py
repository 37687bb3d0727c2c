"""Settings of the export stage (no heavy imports: the planner reads them)."""

from __future__ import annotations

from dataclasses import dataclass

from kestrel.settings import setting


@dataclass
class ExportSpec:
    """Stage 6."""

    weight_bits: int = setting(
        8, "bits of the exported codes of weights that were trained without quantisation", min=2, max=16
    )
    onnx: bool = setting(True, "write the network as ONNX and check it in onnxruntime")
