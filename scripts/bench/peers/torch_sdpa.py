"""torch's SDPA over the selected blocks: packed before, and gathered first. Needs torch with CUDA.

The gather copies whole blocks, which on an H200 takes 14 to 160 us on the M4 shapes; token by token it takes 160 to
1270.
"""

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

# Name: the backend, and whether the heads of a row are heads of grouped-query attention. Else they are queries of one
# head. On an H200 cuDNN takes 12 to 36 us the first way where it takes 17 to 39 the second; flash as long.
BACKENDS = {"cudnn_gqa": (SDPBackend.CUDNN_ATTENTION, True), "cudnn": (SDPBackend.CUDNN_ATTENTION, False),
            "flash": (SDPBackend.FLASH_ATTENTION, False), "efficient": (SDPBackend.EFFICIENT_ATTENTION, False),
            "math": (SDPBackend.MATH, False)}


def sdpa(name, q, k, v):
    """[rows, H, D]: the heads of a row share its K and V, so that nothing is read twice."""
    backend, gqa = BACKENDS[name]
    heads = 2 if gqa else 1
    with sdpa_kernel(backend), torch.no_grad():
        return functional.scaled_dot_product_attention(
            q.unsqueeze(heads), k.unsqueeze(1), v.unsqueeze(1), enable_gqa=gqa
        ).squeeze(heads)


def implementations(inputs):
    """(name, variant, call, copies): each backend with the gather, and over what is packed already."""
    for name, (backend, _) in BACKENDS.items():
        yield (f"torch_{name}_sdpa", f"index_select, {backend.name}",
               lambda copy, name=name: sdpa(name, inputs.q, *inputs.gathered(copy)), len(inputs.kv))
        yield (f"torch_{name}_sdpa_packed", backend.name,
               lambda copy, name=name: sdpa(name, inputs.q, *inputs.packed[copy]), len(inputs.packed))


def fast_implementations(inputs):
    """Those without torch's own arithmetic, which takes milliseconds."""
    return [candidate for candidate in implementations(inputs) if "math" not in candidate[0]]


def program():
    cudnn = torch.backends.cudnn.version() or 0
    return f"torch {torch.__version__}, cuDNN {cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}"
