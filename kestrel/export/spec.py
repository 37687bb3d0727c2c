"""Settings of the export stage (no heavy imports: the planner reads them)."""

from __future__ import annotations

from dataclasses import dataclass

from kestrel.settings import setting


@dataclass
class ExportSpec:
    """Stage 6."""

    weight_bits: int = setting(
        8, "bits of the exported codes of weights that were trained without quantisation", min=1, max=16
    )
    onnx: bool = setting(True, "write the network as ONNX, float and QDQ, and check both in onnxruntime")
    c: bool = setting(True, "write the integer model as a C program and prove it bit-identical (needs gcc and make)")
    flash_limit: int | None = setting(
        None, "bytes of code and constants that the C program may take on a device; null = no limit", min=1
    )
    ram_limit: int | None = setting(
        None, "bytes of memory, stack included, that the C program may take on a device; null = no limit", min=1
    )
    vectors: int = setting(
        2, "clips whose every tensor is written as test vectors for hardware (0 = none)", min=0, max=16
    )
    mcu_straight: int | None = setting(
        None,
        "bytes of flash for straight-line code on a microcontroller without multiplier; null = what is left",
        min=0,
    )
    mcu_segments: int | None = setting(
        None, "parts of a clip after each of which it answers; null = 4, or what divides the frames", min=1
    )
