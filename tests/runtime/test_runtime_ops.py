"""Every kernel against the integer oracle, through the generator and the compiler, tensor by tensor."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import graph_kit
import kernels_kit
import numpy as np
import pytest
from cc_kit import needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st

from kestrel.export.c_check import extremes, logits_of, run_program, trace
from kestrel.export.c_files import RUNTIME, write_c
from kestrel.export.c_model import generate
from kestrel.export.c_pack import pack_rows
from kestrel.lower.graph import IntegerGraph
from kestrel.lower.tensor import masked_bytes

pytestmark = needs_compiler
ISAS = ("portable", "avx2", "avx512")  # what the processor lacks falls back to less
SANITISED = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"


def compare(graph: IntegerGraph, folder: Path, flags: str) -> None:
    """Every tensor of the C model equals the oracle's, with every instruction set."""
    model = generate(graph)
    write_c(model, folder)
    codes = extremes(graph)
    expected: dict[str, np.ndarray] = {}
    graph.run(codes, trace=expected)
    for isa in ISAS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KESTREL_ISA", isa)
            actual = trace(model, graph, codes, kernels_kit.toolchain(flags), folder)
        missing = {name for name, _, _ in graph.all_tensors()} - set(actual) - {"class"}
        inputs = set(graph.inputs) | {name for op in graph.ops if hasattr(op, "body") for name in op.body.inputs}
        assert missing <= inputs, "a tensor was not traced"
        mismatch = graph.first_mismatch(expected, actual)
        assert mismatch is None, f"{isa}: {mismatch}"


@pytest.mark.parametrize("seed", range(4))
def test_random_graphs_of_all_ops_equal_the_oracle(seed: int, tmp_path: Path) -> None:
    compare(graph_kit.random_graph(seed, rounds=3), tmp_path, SANITISED if seed % 2 else "-O2")


@pytest.mark.parametrize("flags", ["-O3", "-O2"])
def test_every_storage_of_weights_equals_the_oracle(flags: str, tmp_path: Path) -> None:
    compare(graph_kit.all_storages(3), tmp_path, flags)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rounding", ["FE_UPWARD", "FE_TOWARDZERO"])
def test_the_rounding_of_the_processor_changes_nothing(rounding: str, isa: str, tmp_path: Path) -> None:
    """Vector kernels rescale in floating point; a program may have changed how that rounds."""
    source, made = tmp_path / "rounding.c", tmp_path / "rounding.o"
    source.write_text(
        f"#include <fenv.h>\n__attribute__((constructor)) static void set(void) {{ fesetround({rounding}); }}\n"
    )
    subprocess.run(["gcc", "-c", "-o", made, source], check=True)
    kernels = kernels_kit.toolchain("-O2")
    graph = graph_kit.wide_graph(7)
    write_c(generate(graph), tmp_path / "c")
    *others, libraries = kernels.variables
    program = replace(kernels, variables=(*others, f"{libraries} {made} -lm")).build(tmp_path / "c", "model")
    codes = extremes(graph)
    np.testing.assert_array_equal(run_program(program, codes, kernels=isa), logits_of(graph, codes))


@pytest.mark.parametrize("seed", range(2))
def test_sizes_around_those_of_vectors_equal_the_oracle(seed: int, tmp_path: Path) -> None:
    compare(graph_kit.wide_graph(seed), tmp_path, SANITISED if seed else "-O2")


@pytest.mark.parametrize("seed", range(3))
def test_products_of_changes_equal_the_oracle(seed: int, tmp_path: Path) -> None:
    """All storages of columns; among the inputs are some without changes, and some where everything changes."""
    compare(graph_kit.sparse_graph(seed), tmp_path, SANITISED if seed else "-O3")


def test_the_instruction_set_can_be_lowered(tmp_path: Path) -> None:
    """KESTREL_ISA chooses among the tables; what this processor lacks is never chosen."""
    folder = RUNTIME / "src"
    (tmp_path / "main.c").write_text(
        """#include <stdio.h>
#include "kestrel_isa.h"
#define SHOW(isa, text) \
    static void isa(const kestrel_copy_op *op, void *y, const void *x) { (void)op; (void)y; (void)x; puts(text); } \
    const kestrel_kernels kestrel_kernels_##isa = {.copy = isa};
SHOW(portable, "portable")
#ifdef KESTREL_X86
SHOW(avx2, "avx2")
SHOW(avx512, "avx512")
#endif
#ifdef KESTREL_NEON
SHOW(neon, "neon")
#endif
int main(void) { kestrel_copy(0, 0, 0); return 0; }
"""
    )
    command = ["gcc", "-DKESTREL_SIMD", f"-I{RUNTIME / 'include'}", "-o", tmp_path / "choice", tmp_path / "main.c"]
    subprocess.run([*command, folder / "kestrel_isa.c"], check=True)
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    best = "avx512" if {"avx512_vnni", "avx512vl"} <= flags else "avx2" if "avx2" in flags else None
    lower = {"portable": "portable", "avx2": "avx2" if "avx2" in flags else "portable", "avx512": best}
    for asked, expected in {**lower, "": best}.items():
        done = subprocess.run(
            [tmp_path / "choice"], env={"KESTREL_ISA": asked}, capture_output=True, text=True, check=True
        )
        assert expected is None or done.stdout.strip() == expected


@pytest.mark.skipif(shutil.which("arm-none-eabi-gcc") is None, reason="needs gcc-arm-none-eabi picolibc-arm-none-eabi")
def test_kernels_for_neon_compile(tmp_path: Path) -> None:
    machine = ["-mcpu=cortex-a7", "-mfpu=neon-vfpv4", "-mfloat-abi=hard", "--specs=picolibc.specs"]
    command = ["arm-none-eabi-gcc", *machine, "-std=c99", "-O2", "-Wall", "-Wextra", "-Werror", "-DKESTREL_SIMD"]
    target = tmp_path / "neon.o"
    source = RUNTIME / "src" / "kestrel_neon.c"
    subprocess.run([*command, f"-I{RUNTIME / 'include'}", "-c", source, "-o", target], check=True)
    symbols = subprocess.run(["nm", target], capture_output=True, text=True, check=True).stdout
    assert "kestrel_kernels_neon" in symbols and "kestrel_matmul_neon" in symbols


@pytest.mark.skipif(
    shutil.which("arm-none-eabi-gcc") is None or shutil.which("qemu-system-arm") is None,
    reason="needs gcc-arm-none-eabi picolibc-arm-none-eabi qemu-system-arm",
)
@pytest.mark.parametrize(
    "make", [graph_kit.wide_graph, graph_kit.sparse_graph, lambda seed: graph_kit.random_graph(seed, rounds=2)]
)
def test_kernels_for_neon_equal_the_oracle_on_an_emulated_cortex_a(make, tmp_path: Path) -> None:
    graph = make(5)
    write_c(generate(graph), tmp_path)
    codes = extremes(graph)[::4]
    wanted = graph.run(codes)[graph.outputs[0]].reshape(len(codes), -1)
    rows = ",".join("{" + ",".join(map(str, clip.reshape(-1).tolist())) + "}" for clip in codes)
    (tmp_path / "bare.c").write_text(
        f"""#include <stdio.h>
#include "model.h"
static const int16_t clips[{len(codes)}][KESTREL_MODEL_FEATURES] = {{{rows}}};
static int32_t logits[KESTREL_MODEL_LOGITS];
int main(void) {{
    for (int clip = 0; clip < {len(codes)}; clip++) {{
        kestrel_model_run(clips[clip], logits);
        for (int i = 0; i < KESTREL_MODEL_LOGITS; i++) {{
            printf("%ld ", (long)logits[i]);
        }}
    }}
    return 0;
}}
"""
    )
    memory = {"flash": 0x40000000, "flash_size": 0x800000, "ram": 0x41000000, "ram_size": 0x800000}
    subprocess.run(
        ["arm-none-eabi-gcc", "-mcpu=cortex-a15", "-mfpu=neon-vfpv4", "-mfloat-abi=hard", "-marm", "-std=c99", "-O2",
         "--specs=picolibc.specs", "--oslib=semihost", "--crt0=hosted", "-DKESTREL_SIMD",
         *(f"-Wl,--defsym=__{name}={value:#x}" for name, value in memory.items()), "-o", "bare.elf", "bare.c", "model.c",
         "kestrel_ops.c", "kestrel_isa.c", "kestrel_neon.c"],
        cwd=tmp_path, check=True,
    )  # fmt: skip
    machine = ["qemu-system-arm", "-M", "virt", "-cpu", "cortex-a15", "-m", "128", "-nic", "none", "-nographic"]
    options = ["-monitor", "none", "-serial", "none", "-semihosting-config", "enable=on,target=native"]
    command = [*machine, *options, "-kernel", "bare.elf"]
    done = subprocess.run(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True, timeout=60
    )
    found = np.array(done.stdout.split(), np.int64).reshape(wanted.shape)
    np.testing.assert_array_equal(found, wanted)


def test_logits_come_clip_by_clip(tmp_path: Path) -> None:
    """What one clip leaves behind does not reach the next one."""
    graph = graph_kit.random_graph(11)
    write_c(generate(graph), tmp_path)
    codes = extremes(graph)
    program = kernels_kit.toolchain("-O2").build(tmp_path, "model")
    together = run_program(program, codes)
    np.testing.assert_array_equal(together[::-1], run_program(program, codes[::-1]))
    np.testing.assert_array_equal(together, graph.run(codes)["logits"])


@given(st.integers(0, 2**32 - 1), st.sampled_from(graph_kit.STORAGES), st.integers(1, 4), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_packed_rows_hold_their_values(seed: int, storage: str, rows: int, length: int) -> None:
    values = graph_kit.constant(np.random.default_rng(seed), (rows, length), storage).values
    packed = pack_rows(values, storage)
    np.testing.assert_array_equal(_unpacked(packed, length)[:rows], values)
    if packed.kind == "KESTREL_TERNARY":
        assert packed.row_bytes == -(-length // 5)


def _unpacked(packed, length: int) -> np.ndarray:
    """Written from kestrel.h, value by value."""
    if packed.kind == "KESTREL_DIRECT":
        return packed.array.astype(np.int64)
    if packed.kind.startswith("KESTREL_MASKED"):
        return _unmasked(packed, length)
    bits = {"KESTREL_POWER": 4, "KESTREL_INT4": 4, "KESTREL_INT2": 2, "KESTREL_BINARY": 1}.get(
        packed.kind, packed.field_bits
    )
    found = []
    for row in packed.array:
        if packed.kind == "KESTREL_TERNARY":
            digits = [(int(byte) * 3 ** (k + 1) // 256) % 3 - 1 for byte in row for k in range(5)]
            found.append(digits[:length])
            continue
        if packed.kind == "KESTREL_SPARSE":
            bitmap = int.from_bytes(row[: packed.bitmap_bytes].tobytes(), "little")
            rest = int.from_bytes(row[packed.bitmap_bytes :].tobytes(), "little")
            values = []
            for i in range(length):
                field = 0
                if bitmap >> i & 1:
                    field, rest = rest & (1 << bits) - 1, rest >> bits
                values.append(field - (1 << bits) * (field >> bits - 1))
            found.append(values)
            continue
        number = int.from_bytes(row.tobytes(), "little")
        fields = [number >> bits * i & (1 << bits) - 1 for i in range(length)]
        if packed.kind == "KESTREL_POWER":
            found.append([(-1) ** (field >> 3) * 2 ** (field & 7) for field in fields])
            continue
        if packed.kind == "KESTREL_BINARY":
            found.append([1 - 2 * field for field in fields])
            continue
        signed = [field - (1 << bits) if field >> bits - 1 else field for field in fields]
        found.append([2 * k + 1 for k in signed] if packed.kind == "KESTREL_ODD" else signed)
    return np.array(found)


def _unmasked(packed, length: int) -> np.ndarray:
    data, bits = packed.array.reshape(-1)[packed.start :].tobytes(), packed.field_bits
    bitmap, fields = data[: packed.bitmap_bytes], int.from_bytes(data[packed.bitmap_bytes :], "little")
    set_ = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")
    found = []
    for used in set_[: len(set_) // length * length]:
        field = fields & (1 << bits) - 1 if used else 0
        fields >>= bits * int(used)
        value = field - (1 << bits) * (field >> bits - 1)
        found.append(2 * value + 1 if used and packed.kind.endswith("ODD") else value)
    return np.array(found).reshape(-1, length)


@pytest.mark.parametrize("storage", ["masked8", "masked3", "maskedodd4", "maskedodd2"])
def test_rows_of_a_masked_matrix_are_counted_from_every_sixteenth(storage: str) -> None:
    values = graph_kit.constant(np.random.default_rng(1), (53, 37), storage).values
    packed = pack_rows(values, storage)
    before = [int(np.count_nonzero(values[:row])) for row in (16, 32, 48)]
    data = packed.array.reshape(-1)
    assert [int.from_bytes(data[packed.start - 2 * k :][:2].tobytes(), "little") for k in (1, 2, 3)] == before
    assert data.size == masked_bytes(values, packed.field_bits)


def test_kernels_use_neither_heap_nor_floating_point(tmp_path: Path) -> None:
    target = tmp_path / "ops.o"
    command = ["gcc", "-std=c99", "-O2", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{RUNTIME / 'include'}"]
    subprocess.run([*command, "-c", str(RUNTIME / "src" / "kestrel_ops.c"), "-o", str(target)], check=True)
    symbols = subprocess.run(["nm", "-u", str(target)], capture_output=True, text=True, check=True).stdout.split()
    used = {name for name in symbols if name != "U"}
    assert used <= {"memcpy", "memset", "__stack_chk_fail", "_GLOBAL_OFFSET_TABLE_"}, used
    source = (RUNTIME / "src" / "kestrel_ops.c").read_text()
    assert not any(word in source.replace("floating", "") for word in ("float ", "double ", "malloc"))
