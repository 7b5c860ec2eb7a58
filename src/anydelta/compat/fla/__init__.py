"""flash-linear-attention on anydelta: the same names, arguments and conventions, for torch tensors on any device.

    from anydelta.compat.fla import chunk_kda       # instead of: from fla.ops.kda import chunk_kda

    import anydelta.compat.fla
    anydelta.compat.fla.install()                   # from now on `import fla` works, if fla is not installed
    model = AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)
    anydelta.compat.fla.uninstall()

- ops: the functions of `fla.ops`, listed at its top
- gate, norm, convolution, index, simple_gla: other names that the code of released checkpoints imports
- offered: the modules `fla` and `causal_conv1d`, which are made of these
"""

from . import ops
from .offered import OFFERED, install, uninstall
from .ops import *  # noqa: F403

__all__ = ["OFFERED", "install", "uninstall"]
__all__ += ops.__all__
