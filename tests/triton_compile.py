"""Compile every Triton kernel for a GPU that need not be there: `python tests/triton_compile.py 90` for an H100.

Prints a line for each; a kernel that its compiler refuses ends it with the compiler's message.
"""

import sys
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from mechint.kernels.gpu import triton_kernels

# What arguments are, by name; all others point to float32.
KINDS = dict.fromkeys(
    ("half_band", "scale", "bandwidth", "saturation", "keep1", "add1", "keep2", "add2", "eps"), "fp32"
)
KINDS |= dict.fromkeys(("M", "B", "D", "TOTAL"), "i32")
KINDS |= dict.fromkeys(("latents", "rows", "counts", "n_active", "go"), "*i32")
KINDS |= dict.fromkeys(("starts", "slots", "fire_counts"), "*i64")
KNOWN_SIZE = dict.fromkeys(("latents", "rows", "counts"), "*i64")  # lists that torch's sort made


def build(kernel: Any, warps: int, kinds: dict[str, str], **constants: Any) -> None:
    names = [parameter.name for parameter in kernel.params]
    signature = {name: (KINDS | kinds).get(name, "*fp32") for name in names} | dict.fromkeys(constants, "constexpr")
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    assert compile(source, target=target, options={"num_warps": warps}).asm["cubin"]
    print(kernel.__name__, constants)


def main() -> None:
    for jump in (False, True):
        build(triton_kernels.list_rows, 4, {}, JUMP=jump, BLOCK=1024)
        build(triton_kernels.list_latents, 4, {}, JUMP=jump, ROWS=32, LATENTS=32)
    for jump, dense in ((False, False), (False, True), (True, True)):
        for width, warps in ((512, 4), (8192, 8)):
            shape = {"JUMP": jump, "DENSE_SLOTS": dense, "ENTRIES": max(1, 4096 // width), "BLOCK_D": width}
            kinds = {} if dense else KNOWN_SIZE
            build(triton_kernels.reconstruct, warps, kinds, **shape)
            build(triton_kernels.latent_gradients, warps, kinds, STE_TO_INPUT=jump, **shape)
    for kinds in ({}, {"code": "*bf16", "d_pre": "*bf16"}):
        build(triton_kernels.relu_columns, 4, kinds, SHARE=256, ROWS=16, LATENTS=128)
        build(triton_kernels.mask_columns, 4, kinds, SHARE=256, ROWS=16, LATENTS=128)
    for unit in (False, True):
        build(triton_kernels.adam_rows, 8, {}, UNIT=unit, MIN_NORM=1e-12, BLOCK_D=4096)


if __name__ == "__main__":
    main()
