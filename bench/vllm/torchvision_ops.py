"""Lets torchvision be imported on a CPU build of torch: declares the operators it looks for.

Installed into `.venv-vllm` and imported at every start there. Nothing happens until torchvision is
asked for.
"""

import sys

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_keep = []


class _Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(operator + _SCHEMA)
            _keep.append(library)
        return None


sys.meta_path.insert(0, _Finder())
