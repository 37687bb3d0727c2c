"""Instructions per weight and bytes of the microcontroller's matrix kernels, on emulated RV32EC.

    python -m bench.bench_stream_kernels

Bell-shaped random weights (seed 0) unless `--graph DIR` names a folder of an exported integer model (integer/), whose own
matrices are then measured. Instructions are those that QEMU retires (minstret), of a whole product: tables, sums and call. Straight lines
add the biases, too; the table kernel adds to sums that hold them already. Bytes are
packed weights, or code; the table kernel itself is the same for all of them and stands in the last line.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kestrel.export.c_text import block, numbers
from kestrel.export.stream_pack import pack_matrix, straight_lines
from kestrel.lower.files import load
from kestrel.lower.narrow import narrow_form
from kestrel.lower.stream import stream_program
from kestrel.lower.stream_steps import product_rows
from kestrel.lower.tensor import Constant
from kestrel.store.markdown import table

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ((17, 63), (64, 24), (24, 64))
BIAS = 4000  # largest of random ones
STORAGES = ("int4", "odd4", "ternary", "odd2")
CC = ["riscv64-unknown-elf-gcc", "-march=rv32ec", "-mabi=ilp32e", "-Os", "-std=c99", "-ffunction-sections"]
LIBRARY = ["--specs=picolibc.specs", "--oslib=semihost", "--crt0=hosted", "-Wl,--gc-sections"] + [
    f"-Wl,--defsym=__{name}={value}"
    for name, value in (
        ("flash", "0x80000000"),
        ("flash_size", "0x200000"),
        ("ram", "0x80200000"),
        ("ram_size", "0x80000"),
    )
]
QEMU = (
    "qemu-system-riscv32 -machine virt -bios none -nographic -monitor none -serial none -semihosting-config "
    "enable=on,target=native -cpu rv32,i=off,e=on,h=off,m=off,a=off,f=off,d=off -icount shift=0 -kernel"
).split()
MAIN = """
static uint32_t now(void)
{
    uint32_t count;
    __asm__ volatile(".option push\\n.option arch, +zicsr\\ncsrr %0, minstret\\n.option pop" : "=r"(count));
    return count;
}

int main(void)
{
    static int32_t sums[256];
    static int16_t tables[64];
    static int8_t in[1024];
    uint32_t start, used;
    int i;
    for (i = 0; i < 1024; i++) {
        in[i] = (int8_t)(i * 37);
    }
    start = now();
    CALL;
    used = now() - start;
    printf("%lu\\n", (unsigned long)used);
    for (i = 0; i < OUTPUTS; i++) {
        printf("%ld\\n", (long)sums[i]);
    }
    return 0;
}
"""


def bell(rng: np.random.Generator, shape: tuple[int, int], storage: str) -> np.ndarray:
    """Normal weights that reach the ends of the storage at 2.5 deviations; of ternary ones half are 0."""
    low, high = Constant.range_of(storage)
    if storage == "ternary":
        return np.rint(rng.standard_normal(shape) * 0.74).clip(-1, 1).astype(np.int64)
    values = np.rint(rng.standard_normal(shape) * high / 2.5).astype(np.int64)
    return (values | 1).clip(low, high) if storage.startswith("odd") else values.clip(low, high)


def measure(weights: np.ndarray, storage: str, bias: np.ndarray | None, folder: Path) -> tuple[int, int, int]:
    """(instructions, bytes that are this matrix's own, bytes of the kernel) of one product; its sums are checked.

    Straight lines where there is a `bias`, else the table kernel.
    """
    outputs, inputs = weights.shape
    head = f'#include <stdio.h>\n#include "kestrel_stream.h"\n#define OUTPUTS {outputs}\n'
    if bias is not None:
        body = f"KESTREL_STREAM_STRAIGHT void product(const int8_t *in, int32_t *sums)\n{{\n{block(straight_lines(weights, bias))}}}\n"
        (folder / "product.c").write_text(f'#include "kestrel_stream.h"\n{body}')
        text = f"{head}void product(const int8_t *in, int32_t *sums);\n#define CALL (void)tables, product(in, sums)\n{MAIN}"
    else:
        packed = pack_matrix(weights, storage)
        (folder / "product.c").write_text('#include "kestrel_stream.h"\n')
        text = (
            f"{head}static const uint16_t words[] = {{\n{numbers(packed.words.reshape(-1).tolist())}}};\n"
            f"static const kestrel_stream_matrix matrix = {{words, 0, {inputs}, {outputs}, {packed.kind}, {int(packed.odd)}, 16}};\n"
            f"#define CALL kestrel_stream_product(&matrix, in, sums, tables)\n{MAIN}"
        )
    (folder / "main.c").write_text(text)
    runtime = ROOT / "runtime"
    sources = [folder / "main.c", folder / "product.c", runtime / "src" / "kestrel_stream.c"]
    command = [*CC, f"-I{runtime / 'include'}", *map(str, sources), *LIBRARY, "-o", str(folder / "run.elf")]
    subprocess.run(command, check=True)
    ran = subprocess.run([*QEMU, str(folder / "run.elf")], capture_output=True, text=True, check=True)
    found = [int(word) for word in (ran.stdout + ran.stderr).split()]
    given = (np.arange(inputs) * 37).astype(np.int8).astype(np.int64)
    if found[1:] != (weights @ given + (0 if bias is None else bias)).tolist():
        raise SystemExit(f"{storage}: sums differ")
    symbols = subprocess.run(
        ["riscv64-unknown-elf-nm", "-S", str(folder / "run.elf")], capture_output=True, text=True, check=True
    ).stdout
    sizes = {name: int(size, 16) for size, name in re.findall(r"^\S+ (\S+) \S (\S+)$", symbols, re.MULTILINE)}
    kernel = sizes.get("kestrel_stream_product", 0) + sum(
        sizes.get(name, 0)
        for name in (
            "make_tables",
            "add_entries",
            "add_digits",
            "digit_table",
            "fill_16",
            "pair_table",
            "power_table",
            "wide_tables",
        )
    )
    return found[0], sizes["product"] if bias is not None else 2 * packed.words.size, kernel


def matrices(graph: str | None) -> Iterator[tuple[str, np.ndarray, str, np.ndarray]]:
    """(name, weights, storage, bias)"""
    if graph is not None:
        yield from product_rows(stream_program(narrow_form(load(Path(graph)))))
        return
    rng = np.random.default_rng(0)
    for storage in STORAGES:
        for shape in SHAPES:
            yield (
                f"{shape[1]} -> {shape[0]}",
                bell(rng, shape, storage),
                storage,
                rng.integers(-BIAS, BIAS + 1, shape[0]),
            )


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", help="folder of an exported integer model")
    rows, kernel = [], 0
    with tempfile.TemporaryDirectory() as name:
        for title, weights, storage, bias in matrices(parser.parse_args().graph):
            cells: list[object] = [title, storage, weights.size, f"{100 * (weights == 0).mean():.0f} %"]
            for own_bias in (None, bias):
                used, size, own = measure(weights, storage, own_bias, Path(name))
                cells += [f"{used / weights.size:.2f}", size]
                kernel = max(kernel, own)
            rows.append(cells)
    head = ("inputs -> outputs", "storage", "weights", "zeros", "table kernel: instructions / weight", "bytes")
    print(table((*head, "straight line: instructions / weight", "bytes"), rows))
    print(f"\nThe table kernel takes {kernel} bytes of code.")


if __name__ == "__main__":
    main()
