"""Public NSA kernels that are installed or checked out, called on the same inputs as ours. None of their code is here.

An adapter is a function of selection.Inputs that yields (name, variant, call, copies), as selection.measure() takes
them. Each does the same work as `fused`: N query rows at the end of a context, H heads on one K and V, n whole blocks a
row. What cannot do that is in OTHER_WORK, with the reason.
"""

import importlib.metadata
import importlib.util

OTHER_WORK = {
    "Flash-Sparse-Attention": "its queries and keys are one sequence of equal length",
    "cuDNN frontend, NSA.SelectionAttention": "its queries and keys are one sequence of equal length (cum_seqlen)",
    "SGLang": "its NSA backend is DeepSeek's sparse attention of V3.2, which selects tokens, not blocks",
}


def flash_nsa(inputs):
    """flash_nsa.inference, github.com/mdy666/Scalable-Flash-Native-Sparse-Attention: prefill over a paged cache."""
    import torch
    from flash_nsa.inference.select_attn import slc_attn_prefill

    point, rows = inputs.point, len(inputs.q)
    page, context, n, l_sel = 256, point["run.context"], point["kernels.blocks"], point["nsa.l_sel"]
    if context % page:
        raise ValueError(f"run.context = {context} is not a multiple of its page of {page}")

    def integers(values):
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    pages = integers([list(range(context // page))])
    starts, lengths = integers([0, rows]), integers([context])
    chosen = inputs.blocks.int().unsqueeze(0).contiguous()  # [KV heads, rows, n]

    def call(copy):
        k, v = (x.view(-1, page, 1, x.shape[-1]) for x in inputs.kv[copy])
        return slc_attn_prefill(inputs.q, k, v, chosen, starts, rows, pages, lengths, l_sel, n)[0]

    yield "flash_nsa", "slc_attn_prefill", call, len(inputs.kv)


def fla(inputs):
    """fla.ops.nsa, github.com/fla-org/flash-linear-attention: the forward of selection; 16 heads a group and more."""
    from fla.ops.nsa.parallel import parallel_nsa_fwd

    point, heads = inputs.point, inputs.point["kernels.heads"]
    if heads < 16 or heads & (heads - 1):
        raise ValueError(f"kernels.heads = {heads}: it takes 16, 32, ... heads a group")
    chosen = inputs.blocks[None, :, None, :].contiguous()  # [1, rows, KV heads, n]
    scale = inputs.q.shape[-1] ** -0.5

    def call(copy):
        k, v = (x[None, :, None, :] for x in inputs.kv[copy])
        return parallel_nsa_fwd(inputs.q[None], k, v, chosen, point["kernels.blocks"], point["nsa.l_sel"], scale)[0][0]

    yield "fla", "parallel_nsa_fwd", call, len(inputs.kv)


ADAPTERS = {"flash_nsa": (flash_nsa, "flash_nsa", "flash-nsa"), "fla": (fla, "fla", "fla-core")}


def available():
    """({name: adapter} of those whose package is there, {name: why not} of the others, names with versions)."""
    found, absent, versions = {}, {}, []
    for name, (adapter, package, distribution) in ADAPTERS.items():
        if importlib.util.find_spec(package) is None:
            absent[name] = f"no Python package {package}: install it, or give its checkout with --path"
            continue
        found[name] = adapter
        try:
            versions.append(f"{name} {importlib.metadata.version(distribution)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} (a checkout)")
    return found, absent, versions


def implementations(inputs, adapters):
    """What all adapters yield for the shape; says which one does not take it."""
    for name, adapter in adapters.items():
        try:
            yield from adapter(inputs)
        except Exception as reason:  # of the package, which may not import, or not take the shape
            print(f"  {name} is left out: {(str(reason) or repr(reason)).splitlines()[0]}", flush=True)
