"""Layout of TensorBoard's custom scalars: related curves in one chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

Charts = Mapping[str, Mapping[str, Sequence[str]]]
"""For each category, the charts by title, and for each chart regular expressions of its tags."""

STEP_CHARTS: Charts = {
    "optimizer": {"gradient norm": ["train/grad_norm"], "learning rate": ["train/lr"]},
    "speed": {
        "samples a second": ["throughput/samples_per_s"],
        "seconds a step by part": ["time/(?!straggler|slow_node).*"],
        "model FLOPs utilization": ["throughput/mfu"],
        "seconds that the slowest rank is behind": ["time/straggler_lag_s"],
        "seconds that the slowest node is behind": ["time/slow_node_lag_s"],
        "part of the time that waits for data": ["data/wait_fraction"],
    },
}
"""The same for all trainers."""


def layout_summary(charts: Charts) -> Summary:
    """The summary that makes TensorBoard show `charts`. It is not of a step."""
    layout = layout_pb2.Layout()
    for category, by_title in charts.items():
        group = layout.category.add(title=category)
        for title, tags in by_title.items():
            group.chart.add(title=title).multiline.tag.extend(tags)
    tensor = TensorProto(
        dtype=DT_STRING,
        string_val=[layout.SerializeToString()],
        tensor_shape=TensorShapeProto(),
    )
    value = Summary.Value(
        tag=metadata.CONFIG_SUMMARY_TAG,
        metadata=metadata.create_summary_metadata(),
        tensor=tensor,
    )
    return Summary(value=[value])
