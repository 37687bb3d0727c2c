"""The networks of bench_c_runtime.py in TensorFlow Lite Micro's interpreter; started by it in a Python that has both.

    python bench/tflm_peer.py convert <name> <file.tflite>  # needs tensorflow-cpu; int8 all along
    python bench/tflm_peer.py run <file.tflite> <seconds>   # needs tflite-micro; prints microseconds per inference

A process for each, as both libraries in one disturb each other, and a converter that crashes takes only its network along.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np

FRAMES, WIDTH, CLASSES, CLIPS = 49, 10, 12, 32


def _ds_cnn(tf, channels: int = 64, blocks: int = 4):
    layers = tf.keras.layers
    start = tf.keras.Input((FRAMES, WIDTH, 1), batch_size=1)
    x = layers.Conv2D(channels, (10, 4), (2, 2))(layers.ZeroPadding2D(((4, 4), (1, 1)))(start))
    x = layers.ReLU()(layers.BatchNormalization()(x))
    for _ in range(blocks):
        x = layers.ReLU()(layers.BatchNormalization()(layers.DepthwiseConv2D(3, padding="same")(x)))
        x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(channels, 1)(x)))
    return tf.keras.Model(start, layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(x)))


def _lstm(tf, hidden: int):
    start = tf.keras.Input((FRAMES, WIDTH), batch_size=1)
    return tf.keras.Model(start, tf.keras.layers.Dense(CLASSES)(tf.keras.layers.LSTM(hidden)(start)))


def convert(name: str, path: Path) -> None:
    """Write network `name` with random weights."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"], os.environ["CUDA_VISIBLE_DEVICES"] = "3", ""
    import tensorflow as tf

    net = _ds_cnn(tf) if name == "ds-cnn" else _lstm(tf, int(name.removeprefix("lstm-")))
    rng = np.random.default_rng(0)
    clips = (rng.normal(size=(CLIPS, *net.inputs[0].shape)).cumsum(2) * 0.3).astype(np.float32)
    converter = tf.lite.TFLiteConverter.from_keras_model(net)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([clip] for clip in clips)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    path.write_bytes(converter.convert())


def run(path: Path, seconds: float) -> None:
    """Print the median time of an inference."""
    from tflite_micro.python.tflite_micro import runtime

    interpreter = runtime.Interpreter.from_file(str(path))
    interpreter.set_input(np.zeros(interpreter.get_input_details(0)["shape"], np.int8), 0)
    times: list[float] = []
    interpreter.invoke()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        interpreter.invoke()
        times.append(time.perf_counter() - start)
    print(1e6 * float(np.median(times)))


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(sys.argv[2], Path(sys.argv[3]))
    else:
        run(Path(sys.argv[2]), float(sys.argv[3]))
