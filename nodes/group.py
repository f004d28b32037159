"""Group Timesteps: clusters neighbouring timesteps whose activations are alike, and draws why."""

import dataclasses

from comfy_api.latest import io, ui

from ..quant_core.grouping import Linkage, group_model
from .plot import draw_grouping
from .schema import CalibrationType, schema


class GroupTimesteps(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DiTQuantGroupTimesteps",
            display_name="Group Timesteps",
            description="Splits the noise levels into groups that share quantization parameters.",
            search_aliases=["timestep groups", "htg", "clustering", "quantize"],
            inputs=[
                CalibrationType.Input("calibration", tooltip="From Calibrate DiT."),
                io.Int.Input(
                    "groups", default=0, min=0, max=64, tooltip="Number of groups; 0: as many as each preset needs."
                ),
                io.Combo.Input(
                    "linkage",
                    options=[linkage.value for linkage in Linkage],
                    default=Linkage.WARD.value,
                    tooltip="How the distance of two runs of timesteps is measured. The paper uses centroid.",
                ),
                io.Boolean.Input(
                    "interpolate",
                    default=False,
                    tooltip="Blend the shifts of neighbouring groups between their centres instead of switching.",
                ),
            ],
            outputs=[
                CalibrationType.Output(display_name="calibration"),
                io.Image.Output(display_name="plot"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(cls, calibration, groups, linkage, interpolate) -> io.NodeOutput:
        grouping = group_model(
            calibration.sigmas,
            calibration.layers,
            groups=groups or None,
            linkage=Linkage(linkage),
            flow=calibration.flow,
            interpolate=interpolate,
        )
        plot = draw_grouping(calibration, grouping)
        rest = grouping.tree.unexplained[len(grouping.groups) - 1]
        edges = ", ".join(f"{edge:.3f}" for edge in grouping.groups.edges) or "none"
        text = f"{len(grouping.groups)} groups, {100 * (1 - rest):.0f} % of the drift explained, edges at sigma {edges}"
        if grouping.automatic:
            text += "; a preset that needs fewer groups, or more, cuts the same tree elsewhere and reports it"
        result = dataclasses.replace(calibration, grouping=grouping)
        shown = ui.PreviewImage(plot, cls=cls).as_dict() | ui.PreviewText(text).as_dict()
        return io.NodeOutput(result, plot, text, ui=shown)
