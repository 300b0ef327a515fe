"""A ComfyUI node that samples Diff2Flow models and LoRAs as they were trained; GPL-3.0, copied into `custom_nodes`."""

from .node import Diff2FlowSampling

NODE_CLASS_MAPPINGS = {"Diff2FlowSampling": Diff2FlowSampling}
NODE_DISPLAY_NAME_MAPPINGS = {"Diff2FlowSampling": "Diff2Flow sampling"}
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
