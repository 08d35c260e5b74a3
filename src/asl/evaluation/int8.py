"""An ONNX model in eight bits, weights and activations: onnxruntime's static quantisation."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor


def quantized(content: bytes, calibration: Iterable[Tensor]) -> bytes:
    """The ONNX file `content` in int8, its metadata with it.

    The head stays in float32: scores of 256 values would tie, and images with equal scores have no
    order. The range of every activation is the largest that the model has shown on the
    `calibration`, an iterable of batches of its input. Each channel of a convolution's weights has
    a range of its own: those of depthwise convolutions are far apart.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(calibration)

        def get_next(self) -> dict[str, object] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    before = onnx.load_from_string(content)
    with TemporaryDirectory() as folder, _quiet():
        prepared, result = Path(folder, "prepared.onnx"), Path(folder, "int8.onnx")
        quant_pre_process(before, prepared)
        quantize_static(
            prepared,
            result,
            Reader(),
            per_channel=True,
            # As x86 multiplies: bytes without a sign by those with one.
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_heads(onnx.load(prepared).graph),
        )
        after = onnx.load(result)
    props = {entry.key: entry.value for entry in (*after.metadata_props, *before.metadata_props)}
    onnx.helper.set_model_props(after, props)
    small: bytes = after.SerializeToString()
    return small


def _heads(graph: Any) -> list[str]:
    """The nodes that make scores: from the end of the graph back to the last products."""
    makers = {name: node for node in graph.node for name in node.output}
    heads, open_ends = set[str](), [output.name for output in graph.output]
    while open_ends:
        node = makers.get(open_ends.pop())  # None for weights
        if node is None or node.name in heads:
            continue
        heads.add(node.name)
        if node.op_type not in ("Gemm", "MatMul", "Conv"):
            open_ends += node.input
    return sorted(heads)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes that onnxruntime's quantisation writes to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
