"""Two steps of attention on Hopper for which Gluon has no words, written in PTX. Both are for head_dim 64.

**Exponentials among multiplications.** Left alone, ptxas puts all multiplications of a tile before its exponentials,
whose unit is idle meanwhile. It moves instructions about within a basic block only, so blocks are made here: each has
CHUNK exponentials of a lane and the multiplications of the next CHUNK.

**Weights times values and times one.** A wgmma of D + 8 columns: next to the values it reads ones, from a tile of their
own. So the row sums come out of the same instruction and of the same rounded weights. As tensors have powers of two
as sizes, its accumulator is the left part of a [64, 2 * D] tensor. The rest of that is named nowhere, so it takes no
registers.

Each text is for all that a lane has of a tile, in the order of its registers, which wgmma decides.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from jv5kernels.kernels.hopper import block_barrier, left_and_right

# Both reach the texts as arguments of functions under jit: Triton's cache of kernels goes by what those name, not by
# plain numbers that a text reads.
CHUNK = gl.constexpr(8)  # exponentials of a lane in a block
SUM_COLUMNS = gl.constexpr(8)  # of ones: the fewest that a wgmma can have more


@gluon.constexpr_function
def exponentials_text(count, chunk):
    """Operands: `count` results, scores, scales, offsets, and as often one number, n > 0.

    A block begins where a jump back would land that is never taken. The event is there because ptxas drops a loop that
    does nothing.
    """
    text = f"{{ .reg .pred never; .reg .f32 c, x<{count}>;\nsetp.lt.s32 never, ${4 * count}, 1;\n"
    for i in range(-chunk, count):
        if i >= 0 and i % chunk == 0:
            text += f"BLOCK{i}: pmevent 0;\n@never bra BLOCK{i};\n"
        ahead = i + chunk
        if ahead < count:
            score, scale, offset = (f"${k * count + ahead}" for k in (1, 2, 3))
            text += f"neg.f32 c, {offset}; fma.rn.f32 x{ahead}, {score}, {scale}, c;\n"
        if i >= 0:
            text += f"ex2.approx.ftz.f32 ${i}, x{i};\n"
    return text + "}"


@gluon.constexpr_function
def exponentials_operands(count):
    return ",".join(["=&f"] * count + ["f"] * (3 * count) + ["r"] * count)


@gluon.jit
def spread_exponentials(b_s, scale, b_offset, n):
    """2^(score · scale - offset), [64, BN] fp32; n is any number above 0 that the compiler does not know."""
    COUNT: gl.constexpr = b_s.shape[0] * b_s.shape[1] // 128
    text: gl.constexpr = exponentials_text(COUNT, CHUNK)
    operands: gl.constexpr = exponentials_operands(COUNT)
    arguments = [b_s, scale, b_offset[:, None], n]
    return gl.inline_asm_elementwise(text, operands, arguments, gl.float32, False, COUNT)


@gluon.constexpr_function
def product_text(D, sum_columns):
    """Operands: D accumulators, twice, D / 2 registers with two weights, lower words of the descriptor (all the same).

    A descriptor names a tile of 16 keys: its address, the distance from its 64 columns to the next (here: to the ones),
    that from 8 keys to the next (1024 bytes), and the swizzle of 128 bytes. Addresses are in units of 16 bytes.
    """
    accumulator = ", ".join(f"${i}" for i in range((D + sum_columns) // 2))
    kind = f"m64n{D + sum_columns}k16.f32.bf16.bf16"
    text = "{ .reg .pred add; .reg .b64 tile;\nsetp.eq.u32 add, 0, 0;\n"
    text += f"mov.b64 tile, {{${2 * D + D // 2}, 0x40000040}};\nwgmma.fence.sync.aligned;\n"
    for k in range(2 * D // 16):
        weights = ", ".join(f"${2 * D + 4 * k + i}" for i in range(4))
        text += f"wgmma.mma_async.sync.aligned.{kind} {{{accumulator}}}, {{{weights}}}, tile, add, 1, 1, 1;\n"
        text += f"add.s64 tile, tile, {16 * 2 * D // 16};\n"
    return text + "wgmma.commit_group.sync.aligned; }"


@gluon.constexpr_function
def product_operands(D):
    tied = [str(i) for i in range(D)]
    return ",".join(["=f"] * D + tied + ["r"] * (D // 2) + ["r"] * D)


@gluon.jit
def issue_output_and_sums(b_p, stage, b_both, D: gl.constexpr, STAGES: gl.constexpr):
    """b_both + p · (v | 1), in flight: [64, D] of output and SUM_COLUMNS times the row sums in [64, 2 * D].

    Args:
        b_p: [64, 2 * D] bf16, in the layout of the scores.
        stage: of the ring that begins the shared memory: STAGES tiles of 2 * D keys, as many of values, one of ones.
    """
    TILE: gl.constexpr = 2 * D * D * 2 // 16  # in units of 16 bytes
    gl.static_assert(D == 64, "the swizzle of 128 bytes is a row of values")
    begin = gl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r", [], gl.int32, True, 1)
    lower = (begin >> 4) + (STAGES + stage) * TILE | (STAGES - stage) * TILE << 16
    text: gl.constexpr = product_text(D, SUM_COLUMNS)
    operands: gl.constexpr = product_operands(D)
    return gl.inline_asm_elementwise(text, operands, [b_both, b_p, lower], gl.float32, False, D)


@gluon.jit
def output_and_sums(b_both, D: gl.constexpr):
    """Takes the accumulator apart: [64, D], and [64] row sums."""
    b_out, b_sum = left_and_right(b_both)
    for _ in gl.static_range(3):
        b_sum, b_rest = left_and_right(b_sum)
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    gl.static_assert(b_sum.shape[1] == SUM_COLUMNS)
    return gl.convert_layout(b_out, o_layout, assert_trivial=True), gl.max(b_sum, 1)


@gluon.jit
def write_ones(kv_smem, last: gl.constexpr):
    """Fills the last tile with ones, and stops the program if they are not where the product reads them.

    Triton puts the largest buffer where shared memory begins; nothing else says so.
    """
    SHAPE: gl.constexpr = kv_smem.index(last).shape
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 1, 8], [1, 1, 4, 8], [1, 1, 4, 1], [3, 2, 1, 0])
    kv_smem.index(last).store(gl.full(SHAPE, 1.0, kv_smem.dtype, layout))
    fence_async_shared()
    block_barrier()
    BYTES: gl.constexpr = SHAPE[2] * SHAPE[3] * 2
    check: gl.constexpr = """{ .reg .pred wrong; .reg .b32 word, place;
        mov.u32 place, global_smem; add.u32 place, place, $1; ld.shared.b32 word, [place];
        setp.ne.u32 wrong, word, 0x3F803F80; @wrong trap; mov.u32 $0, word; }"""
    gl.inline_asm_elementwise(check, "=r,r,~{memory}", [last * BYTES], gl.int32, False, 1)
