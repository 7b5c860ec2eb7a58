"""vLLM's plug-in: its gated delta layers on CPUs run as `gated_delta_mixer_`. See docs/serving.md.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes. The environment
variable ANYDELTA_VLLM chooses what it does:

    unset or 1   the layers of Qwen3-Next, Qwen3.5, OLMo-Hybrid, Kimi-Linear and Ling 3, on CPUs
    cuda         on a GPU, the chunked rule of Qwen3-Next and Qwen3.5
    0            nothing
"""

from __future__ import annotations

import os

from ...core.late import late

layers = late("anydelta.integrations.vllm.layers")
gpu = late("anydelta.integrations.vllm.gpu")

VARIABLE = "ANYDELTA_VLLM"
_done = False


def register() -> None:
    """Replace the gated delta layers of this process's vLLM, once. An unsupported vLLM stays unchanged."""
    global _done
    if _done:
        return
    _done = True
    wanted = os.environ.get(VARIABLE, "1")
    if wanted == "0":
        return
    from vllm.logger import init_logger

    log = init_logger("vllm.plugins.anydelta")
    if wanted not in ("", "1", "cuda"):
        log.warning("anydelta: %s must be 0, 1 or cuda; got %r. Nothing is changed.", VARIABLE, wanted)
        return
    from vllm.platforms import current_platform

    try:
        if current_platform.is_cpu():
            names = layers.register()
        elif wanted == "cuda":
            names = gpu.register()
        else:
            return
    except (ImportError, AttributeError, LookupError) as error:
        log.warning("anydelta: this vLLM stays unchanged: %s", error)
        return
    log.info("anydelta: runs %s. %s=0 turns it off.", ", ".join(names), VARIABLE)
