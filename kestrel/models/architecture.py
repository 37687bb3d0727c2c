"""The family of networks that a ProxylessNAS search chooses from, one member of it, and exact counts of its layers.

A network is: convolution (1, 2), searchable inverted-bottleneck blocks (MBConv) in stages, 1x1 convolution, global mean,
linear. A block is written `7e2` (kernel 7, expansion 2) or `Z` (skipped: only its shortcut is left).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from kestrel.errors import KestrelError, UsageError
from kestrel.settings import build, dump_yaml, load_yaml, setting

FORMAT = "kestrel-architecture-1"
SKIP = "Z"
Pair = tuple[int, int]
Rule = Literal["exact", "floor"]
MOST_BLOCKS, MOST_CHANNELS = 64, 4096


def div8(value: float) -> int:
    """The nearest multiple of 8 (ties up), at least 8, one more where that is below 0.9 of `value`."""
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * value else rounded


@dataclass(frozen=True)
class Choice:
    """What a block is: an MBConv of this kernel size and expansion, or (expansion 0) nothing."""

    kernel: int
    expansion: int

    @classmethod
    def parse(cls, text: str, where: str) -> Choice:
        """Read `7e2` or `Z`. Raises UsageError with `where`."""
        if text == SKIP:
            return ZERO
        match = re.fullmatch(r"([1-9]\d?)e([1-9]\d?)", text)
        if match is None or int(match[1]) % 2 == 0:
            raise UsageError(f"{where}: expected an odd kernel and an expansion such as 7e2, or {SKIP}, not {text!r}")
        return cls(int(match[1]), int(match[2]))

    @property
    def skips(self) -> bool:
        """Whether the block is left out."""
        return self.expansion == 0

    def __str__(self) -> str:
        return SKIP if self.skips else f"{self.kernel}e{self.expansion}"


ZERO = Choice(0, 0)


@dataclass(frozen=True)
class Layer:
    """A convolution, or (size 1 x 1) the linear layer, with what it is applied to; named as in the network's modules."""

    name: str
    inputs: int
    outputs: int
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    groups: int = 1
    size: Pair = (1, 1)  # height and width of its input

    @property
    def weights(self) -> int:
        """Its weights."""
        return self.outputs * self.inputs // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def output_size(self) -> Pair:
        """Height and width of its result."""
        (h, kh, sh, ph), (w, kw, sw, pw) = zip(self.size, self.kernel, self.stride, self.padding, strict=True)
        return (h + 2 * ph - kh) // sh + 1, (w + 2 * pw - kw) // sw + 1

    def macs(self, rule: Rule = "exact") -> int:
        """Multiply-adds of one clip; rule `floor` takes input / stride rounded down for the output, as the original does."""
        if rule == "floor":
            return self.weights * (self.size[0] // self.stride[0]) * (self.size[1] // self.stride[1])
        height, width = self.output_size
        return self.weights * height * width


@dataclass(frozen=True)
class Place:
    """A searchable block: its channels and stride."""

    inputs: int
    outputs: int
    stride: int

    @property
    def shortcut(self) -> bool:
        """Whether its input can be added to its result, so that it may be skipped."""
        return self.stride == 1 and self.inputs == self.outputs

    def layers(self, choice: Choice, size: Pair, name: str = "") -> list[Layer]:
        """The convolutions of a choice for an input of `size`; none where it skips."""
        if choice.skips:
            return []
        middle, dot, k, s = self.inputs * choice.expansion, f"{name}." if name else "", choice.kernel, self.stride
        found = []
        if choice.expansion > 1:
            found.append(Layer(f"{dot}expand.conv", self.inputs, middle, size=size))
        wide = Layer(f"{dot}depthwise.conv", middle, middle, (k, k), (s, s), (k // 2, k // 2), middle, size)
        return [*found, wide, Layer(f"{dot}project.conv", middle, self.outputs, size=wide.output_size)]

    def name(self, index: int) -> str:
        """Name of the MBConv of block `index` in the network's modules."""
        return f"blocks.{index}.branch" if self.shortcut else f"blocks.{index}"


@dataclass
class Family:
    """What all networks of a search have in common; names of the original command line."""

    width_mult: float = setting(1.0, "width multiplier of all channels", min=0.05, max=8)
    width_stages: list[int] = setting([72], "channels of each stage of blocks, before the multiplier", min=1, max=1024)
    n_cell_stages: list[int] = setting([12], "blocks of each stage", min=1, max=MOST_BLOCKS)
    stride_stages: list[int] = setting([2], "stride of the first block of each stage", min=1, max=4)
    width_first: int = setting(72, "channels of the first convolution, before the multiplier", min=1, max=1024)
    width_mix: int = setting(144, "channels before the global mean, before the multiplier", min=1, max=2048)

    def check(self, where: str) -> None:
        """Raise UsageError, naming the setting, where the stages do not fit together."""
        stages = len(self.width_stages)
        if not stages:
            raise UsageError(f"{where}.width_stages: give the channels of at least one stage")
        for name in ("n_cell_stages", "stride_stages"):
            if len(getattr(self, name)) != stages:
                raise UsageError(f"{where}.{name}: {stages} stages (width_stages) need {stages} values")
        if sum(self.n_cell_stages) > MOST_BLOCKS:
            raise UsageError(f"{where}.n_cell_stages: {sum(self.n_cell_stages)} blocks, at most {MOST_BLOCKS}")
        for name in ("width_stages", "width_first", "width_mix"):
            value = getattr(self, name)
            widest = self.channels(max(value) if isinstance(value, list) else value)
            if widest > MOST_CHANNELS:
                raise UsageError(f"{where}.{name}: {widest} channels after the multiplier, at most {MOST_CHANNELS}")

    def channels(self, width: int) -> int:
        """Channels of a width under the multiplier."""
        return div8(width * self.width_mult)

    @property
    def first(self) -> int:
        """Channels of the first convolution."""
        return self.channels(self.width_first)

    @property
    def mix(self) -> int:
        """Channels before the global mean."""
        return self.channels(self.width_mix)

    def places(self) -> list[Place]:
        """The searchable blocks in order."""
        found, inputs = [], self.first
        for width, blocks, stride in zip(self.width_stages, self.n_cell_stages, self.stride_stages, strict=True):
            outputs = self.channels(width)
            for index in range(blocks):
                found.append(Place(inputs, outputs, stride if index == 0 else 1))
                inputs = outputs
        return found

    def first_layer(self, size: Pair) -> Layer:
        """The first convolution for features of `size` (coefficients, frames)."""
        return Layer("first_conv.conv", 1, self.first, (5, 11), (1, 2), (2, 5), size=size)

    def last_layers(self, size: Pair, classes: int) -> list[Layer]:
        """The 1x1 convolution and the linear layer behind the blocks, whose result has `size`."""
        inputs = self.places()[-1].outputs
        return [
            Layer("feature_mix.conv", inputs, self.mix, size=size),
            Layer("classifier", self.mix, classes),
        ]

    def sizes(self, size: Pair) -> list[Pair]:
        """Height and width of the input of each block and of the result of the last one."""
        found = [self.first_layer(size).output_size]
        for place in self.places():
            height, width = found[-1]
            found.append((-(-height // place.stride), -(-width // place.stride)))
        return found


@dataclass
class Architecture(Family):
    """One network of a family. `blocks` holds a text such as `7e2` or `Z` for each block."""

    blocks: list[str] = field(default_factory=list)

    def choices(self, where: str = "blocks") -> list[Choice]:
        """The blocks. Raises UsageError, naming the block, where one is unreadable or cannot be skipped."""
        places = self.places()
        if len(self.blocks) != len(places):
            raise UsageError(f"{where}: {len(self.blocks)} blocks, n_cell_stages has {len(places)}")
        found = []
        for index, (text, place) in enumerate(zip(self.blocks, places, strict=True)):
            choice = Choice.parse(text, f"{where}[{index}]")
            if choice.skips and not place.shortcut:
                reason = "its stride or channels leave it no shortcut"
                raise UsageError(f"{where}[{index}]: block {index + 1} cannot be skipped, {reason}")
            if choice.expansion * place.inputs > MOST_CHANNELS:
                raise UsageError(
                    f"{where}[{index}]: {choice.expansion * place.inputs} channels, at most {MOST_CHANNELS}"
                )
            found.append(choice)
        return found

    def layers(self, size: Pair, classes: int) -> list[Layer]:
        """All layers with weights for features of `size` (coefficients, frames)."""
        sizes = self.sizes(size)
        found = [self.first_layer(size)]
        for index, (place, choice) in enumerate(zip(self.places(), self.choices(), strict=True)):
            found += place.layers(choice, sizes[index], place.name(index))
        return found + self.last_layers(sizes[-1], classes)

    def macs(self, size: Pair, classes: int, rule: Rule = "exact") -> int:
        """Multiply-adds of one clip."""
        return sum(layer.macs(rule) for layer in self.layers(size, classes))

    def weights(self, size: Pair, classes: int) -> int:
        """Weights of convolutions and of the linear layer, each once; no biases, no normalisation."""
        return sum(layer.weights for layer in self.layers(size, classes))

    @property
    def text(self) -> str:
        """The blocks in one line."""
        return " ".join(self.blocks)


def parse_blocks(text: str) -> list[str]:
    """The blocks of one line such as `7e2 3e1 Z`."""
    return text.replace(",", " ").split()


def family_of(settings: Any) -> dict[str, Any]:
    """The values of the settings that make a family, by name."""
    return {each.name: getattr(settings, each.name) for each in fields(Family)}


# ------------------------------------------------------------------------------------------------------------------ files


def to_file(architecture: Architecture, remarks: Sequence[str] = ()) -> str:
    """The text of an architecture file (YAML); `remarks` become comments at its top."""
    return "".join(f"# {line}\n" for line in remarks) + dump_yaml(to_data(architecture) | {"blocks": architecture.text})


def to_data(architecture: Architecture) -> dict[str, Any]:
    """An architecture as plain data, as `from_data` reads it."""
    return {"format": FORMAT, **family_of(architecture), "blocks": list(architecture.blocks)}


def from_data(data: dict[str, Any], name: str) -> Architecture:
    """An architecture from plain data. Raises UsageError that names `name` and the field that is wrong or missing."""
    data = dict(data)
    found = data.pop("format", None)
    if found != FORMAT:
        raise UsageError(f"{name}: format: expected {FORMAT}, not {found!r}")
    if "blocks" not in data:
        raise UsageError(f"{name}: blocks: missing")
    if isinstance(data["blocks"], str):
        data["blocks"] = parse_blocks(data["blocks"])
    try:
        made: Architecture = build(Architecture, data)
        made.check("")
        made.choices("blocks")
    except UsageError as error:
        raise UsageError(f"{name}: {str(error).removeprefix('.')}") from None
    return made


def read_file(path: Path) -> Architecture:
    """Read an architecture file. Raises KestrelError where it cannot be read, UsageError naming a wrong field."""
    if not path.is_file():
        raise KestrelError(f"{path}: no such architecture file")
    if path.stat().st_size > 100_000:
        raise UsageError(f"{path}: larger than any architecture file")
    return from_data(load_yaml(path), path.name)
