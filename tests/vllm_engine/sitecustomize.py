"""Of vLLM's environment: lets PyPI's torchvision, built for CUDA, be imported beside torch's CPU build.

Its library does not load there, and its Python asks for two operators of that library by name.
"""

import sys
from importlib.abc import MetaPathFinder


class Before(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.library = library
            sys.modules["torch"].anydelta_torchvision = self  # the operators live as long as the library
        return None


sys.meta_path.insert(0, Before())
