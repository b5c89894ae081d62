"""Vector instructions for the sparse kernel's inner loops, written as LLVM code for numba.

Left to itself the compiler keeps the running sums of a gather in memory; these hold them in registers, which is what
decides the speed. Vectors have 16 float32 lanes: one AVX512 register, or what the processor has instead (LLVM splits
them). Products and sums may be fused; nothing is assumed about NaN or infinity.

Arguments named `*_at` are addresses in bytes. Nothing is checked here: the callers in `loops` own the bounds.
"""

from typing import no_type_check

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
BLOCK = 64  # floats that rows are padded to: four vectors
_BYTES = 4 * LANES
_F32, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_F32, LANES)
_FUSE = ("contract",)


@no_type_check
def _at(builder, address, offset, kind):
    if offset:
        address = builder.add(address, ir.Constant(_I64, offset))
    return builder.inttoptr(address, kind.as_pointer())


@no_type_check
def _load(builder, address, offset, kind, align):
    value = builder.load(_at(builder, address, offset, kind))
    value.align = align
    return value


@no_type_check
def _store(builder, value, address, offset, align=4, past_cache=None):
    store = builder.store(value, _at(builder, address, offset, value.type))
    store.align = align
    if past_cache is not None:
        store.set_metadata("nontemporal", past_cache)


@no_type_check
def _splat(builder, scalar):
    kind = ir.VectorType(scalar.type, LANES)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)


@no_type_check
def _fma(builder, a, b, c):
    return builder.fadd(builder.fmul(a, b, flags=_FUSE), c, flags=_FUSE)


@no_type_check
def _lane_sum(builder, vector):
    width = LANES
    while width > 1:
        half, kind = width // 2, ir.VectorType(_I32, width // 2)
        nothing = ir.Constant(ir.VectorType(_F32, width), ir.Undefined)
        low = builder.shuffle_vector(vector, nothing, ir.Constant(kind, list(range(half))))
        high = builder.shuffle_vector(vector, nothing, ir.Constant(kind, list(range(half, width))))
        vector, width = builder.fadd(low, high), half
    return builder.extract_element(vector, ir.Constant(_I32, 0))


@no_type_check
def _sum_of_rows(builder, starts, rows, entries_at, coefs, n, entry_bytes, coef_offset):
    """For each of the addresses `coefs`, its `starts` (vectors) + sum over entries of coef * row[index], held in
    registers throughout; a row is read once for all of them. `rows` is the address and the bytes of a row."""
    rows_at, row_bytes = rows
    start = [part for parts in starts for part in parts]
    n_vectors = len(start) // len(coefs)
    before = builder.block
    loop, done = builder.append_basic_block(), builder.append_basic_block()
    builder.cbranch(builder.icmp_signed(">", n, ir.Constant(_I64, 0)), loop, done)
    builder.position_at_end(loop)
    entry = builder.phi(_I64)
    entry.add_incoming(ir.Constant(_I64, 0), before)
    sums = [builder.phi(_VECTOR) for _ in start]
    offset = builder.mul(entry, ir.Constant(_I64, entry_bytes))
    index = builder.zext(_load(builder, builder.add(entries_at, offset), 0, _I32, 4), _I64)
    weights = [_splat(builder, _load(builder, builder.add(at, offset), coef_offset, _F32, 4)) for at in coefs]
    row_at = builder.add(rows_at, builder.mul(index, row_bytes))
    parts = [_load(builder, row_at, _BYTES * k, _VECTOR, 4) for k in range(n_vectors)]
    added = [_fma(builder, parts[k % n_vectors], weights[k // n_vectors], total) for k, total in enumerate(sums)]
    following = builder.add(entry, ir.Constant(_I64, 1))
    entry.add_incoming(following, loop)
    for k, part in enumerate(sums):
        part.add_incoming(start[k], before)
        part.add_incoming(added[k], loop)
    builder.cbranch(builder.icmp_signed("<", following, n), loop, done)
    builder.position_at_end(done)
    results = [builder.phi(_VECTOR) for _ in start]
    for k, result in enumerate(results):
        result.add_incoming(start[k], before)
        result.add_incoming(added[k], loop)
    return results


@no_type_check
def _make_add_rows(n_vectors, entry_bytes, coef_offset):
    """out[:16 n_vectors] += sum over entries of coef * row[index]."""

    @intrinsic
    def add_rows(typing_context, out_at, rows_at, row_bytes, entries_at, coefs_at, n):
        signature = types.void(*[types.int64] * 6)

        def generate(context, builder, signature, args):
            out_at, rows_at, row_bytes, entries_at, coefs_at, n = args
            start = [_load(builder, out_at, _BYTES * k, _VECTOR, 4) for k in range(n_vectors)]
            source = ((rows_at, row_bytes), entries_at, [coefs_at], n)
            for k, result in enumerate(_sum_of_rows(builder, [start], *source, entry_bytes, coef_offset)):
                _store(builder, result, out_at, _BYTES * k)
            return context.get_dummy_value()

        return signature, generate

    return add_rows


@no_type_check
def _make_add_rows_twice(n_vectors):
    """`add_rows` for two rows of sums with coefficients of their own, which read the added rows once."""

    @intrinsic
    def add_rows_twice(typing_context, out_at, other_at, rows_at, row_bytes, entries_at, coefs_at, others_at, n):
        signature = types.void(*[types.int64] * 8)

        def generate(context, builder, signature, args):
            out_at, other_at, rows_at, row_bytes, entries_at, coefs_at, others_at, n = args
            starts = [[_load(builder, at, _BYTES * k, _VECTOR, 4) for k in range(n_vectors)] for at in args[:2]]
            source = ((rows_at, row_bytes), entries_at, [coefs_at, others_at], n)
            for k, result in enumerate(_sum_of_rows(builder, starts, *source, 4, 0)):
                _store(builder, result, args[k // n_vectors], _BYTES * (k % n_vectors))
            return context.get_dummy_value()

        return signature, generate

    return add_rows_twice


@no_type_check
def _make_sum_rows(n_vectors, entry_bytes, coef_offset):
    """out[:16 n_vectors] = sum over entries of coef * row[index]. Returns the sum of the squares of what is stored."""

    @intrinsic
    def sum_rows(typing_context, out_at, rows_at, row_bytes, entries_at, coefs_at, n):
        signature = types.float32(*[types.int64] * 6)

        def generate(context, builder, signature, args):
            out_at, rows_at, row_bytes, entries_at, coefs_at, n = args
            squares = ir.Constant(_VECTOR, [0.0] * LANES)
            source = ((rows_at, row_bytes), entries_at, [coefs_at], n)
            results = _sum_of_rows(builder, [[squares] * n_vectors], *source, entry_bytes, coef_offset)
            for k, result in enumerate(results):
                _store(builder, result, out_at, _BYTES * k)
                squares = _fma(builder, result, result, squares)
            return _lane_sum(builder, squares)

        return signature, generate

    return sum_rows


@no_type_check
def _dots(builder, vectors_at, rows_at, row_bytes, indices_at, outs_at, n_blocks, n_rows):
    """outs[v][i] = <vectors[v], rows[index[i]]> over `n_blocks` blocks of 64 floats, for i < n_rows."""
    starts = []
    for i in range(n_rows):
        index = builder.zext(_load(builder, indices_at, 4 * i, _I32, 4), _I64)
        starts.append(builder.add(rows_at, builder.mul(index, row_bytes)))
    before = builder.block
    loop, done = builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    block = builder.phi(_I64)
    block.add_incoming(ir.Constant(_I64, 0), before)
    # one sum for each vector and row, in the same order for any number of them: a dot product must not depend on its
    # neighbours
    sums = [[builder.phi(_VECTOR) for _ in range(n_rows)] for _ in vectors_at]
    offset = builder.mul(block, ir.Constant(_I64, 4 * BLOCK))
    new = [list(row) for row in sums]
    for k in range(BLOCK // LANES):
        parts = [_load(builder, builder.add(at, offset), _BYTES * k, _VECTOR, 4) for at in vectors_at]
        for i in range(n_rows):
            weight = _load(builder, builder.add(starts[i], offset), _BYTES * k, _VECTOR, 4)
            for v, part in enumerate(parts):
                new[v][i] = _fma(builder, weight, part, new[v][i])
    following = builder.add(block, ir.Constant(_I64, 1))
    block.add_incoming(following, loop)
    for row, ends in zip(sums, new, strict=True):
        for total, end in zip(row, ends, strict=True):
            total.add_incoming(ir.Constant(_VECTOR, [0.0] * LANES), before)
            total.add_incoming(end, loop)
    builder.cbranch(builder.icmp_signed("<", following, n_blocks), loop, done)
    builder.position_at_end(done)
    for out_at, ends in zip(outs_at, new, strict=True):
        for i, end in enumerate(ends):
            _store(builder, _lane_sum(builder, end), out_at, 4 * i)


@no_type_check
def _make_dots(n_rows):
    @intrinsic
    def dots(typing_context, vector_at, rows_at, row_bytes, indices_at, out_at, n_blocks):
        def generate(context, builder, signature, args):
            vector_at, rows_at, row_bytes, indices_at, out_at, n_blocks = args
            _dots(builder, [vector_at], rows_at, row_bytes, indices_at, [out_at], n_blocks, n_rows)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return dots


@no_type_check
def _make_dots_twice(n_rows):
    @intrinsic
    def dots_twice(typing_context, vector_at, other_at, rows_at, row_bytes, indices_at, out_at, other_out_at, n_blocks):
        def generate(context, builder, signature, args):
            vector_at, other_at, rows_at, row_bytes, indices_at, out_at, other_out_at, n_blocks = args
            outs_at = [out_at, other_out_at]
            _dots(builder, [vector_at, other_at], rows_at, row_bytes, indices_at, outs_at, n_blocks, n_rows)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return dots_twice


@no_type_check
def _bfloat16_lanes(builder, address):
    bits = builder.zext(_load(builder, address, 0, ir.VectorType(_I16, LANES), 2), ir.VectorType(_I32, LANES))
    shift = ir.Constant(ir.VectorType(_I32, LANES), [16] * LANES)
    return builder.bitcast(builder.shl(bits, shift), _VECTOR)


@no_type_check
def _pack(context, builder, values, condition, address):
    """Store the lanes for which `condition` holds one behind the other; 64 bytes are written. Returns their number."""
    mask_kind = ir.VectorType(ir.IntType(1), LANES)
    if "+avx512f" in context.codegen().magic_tuple()[2]:
        # in a register: straight to memory it is microcode on some processors (Zen 4), ten times as slow
        kind = ir.FunctionType(values.type, [values.type, values.type, mask_kind])
        compress = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.mask.compress.v16i32")
        packed = builder.call(compress, [values, ir.Constant(values.type, ir.Undefined), condition])
        _store(builder, packed, address, 0)
    else:
        kind = ir.FunctionType(ir.VoidType(), [values.type, _I32.as_pointer(), mask_kind])
        store = cgutils.get_or_insert_function(builder.module, kind, "llvm.masked.compressstore.v16i32")
        builder.call(store, [values, builder.inttoptr(address, _I32.as_pointer()), condition])
    return builder.zext(builder.ctpop(builder.bitcast(condition, _I16)), _I64)


@no_type_check
def _make_pack_above(lanes):
    """Write `first + i` for the lanes i >= `skip` whose upper bound `v + relative |v| + bias + error * scale` is above
    `cut`, or NaN, one behind the other. 64 bytes are written; returns how many are good."""

    @intrinsic
    def pack_above(typing_context, values_at, biases_at, scales_at, relative, error, cut, first, skip, out_at):
        f32, i64 = types.float32, types.int64
        signature = i64(i64, i64, i64, f32, f32, f32, i64, i64, i64)

        def generate(context, builder, signature, args):
            values_at, biases_at, scales_at, relative, error, cut, first, skip, out_at = args
            value = lanes(builder, values_at)
            whole = ir.VectorType(_I32, LANES)
            size = builder.and_(builder.bitcast(value, whole), ir.Constant(whole, [0x7FFFFFFF] * LANES))
            bound = builder.fadd(value, _load(builder, biases_at, 0, _VECTOR, 4))
            bound = _fma(builder, builder.bitcast(size, _VECTOR), _splat(builder, relative), bound)
            bound = _fma(builder, _load(builder, scales_at, 0, _VECTOR, 4), _splat(builder, error), bound)
            lane = ir.Constant(whole, list(range(LANES)))
            above = builder.and_(
                builder.fcmp_unordered(">", bound, _splat(builder, cut)),
                builder.icmp_signed(">=", lane, _splat(builder, builder.trunc(skip, _I32))),
            )
            columns = builder.add(lane, _splat(builder, builder.trunc(first, _I32)))
            return _pack(context, builder, columns, above, out_at)

        return signature, generate

    return pack_above


@intrinsic
@no_type_check
def stream_64(typing_context, source_at, target_at):
    """Copy 64 floats past the cache; `target_at` is a multiple of 64 bytes. `settle` before others read them."""

    def generate(context, builder, signature, args):
        source_at, target_at = args
        hint = builder.module.add_metadata([ir.Constant(_I32, 1)])
        for k in range(BLOCK // LANES):
            _store(builder, _load(builder, source_at, _BYTES * k, _VECTOR, 4), target_at, _BYTES * k, 64, hint)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
@no_type_check
def settle(typing_context):
    """Stores past the cache are done before anything that comes after."""

    def generate(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
@no_type_check
def from_bfloat16(typing_context, bits):
    """The float32 of a bfloat16 given as uint16."""

    def generate(context, builder, signature, args):
        return builder.bitcast(builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16)), _F32)

    return types.float32(types.uint16), generate


@intrinsic
@no_type_check
def to_bfloat16(typing_context, value):
    """The nearest bfloat16 (ties to even) as uint16. Not for NaN."""

    def generate(context, builder, signature, args):
        bits = builder.bitcast(args[0], _I32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(_I32, 0x7FFF)))
        return builder.trunc(builder.lshr(rounded, ir.Constant(_I32, 16)), _I16)

    return types.uint16(types.float32), generate


@no_type_check
def _float32_lanes(builder, address):
    return _load(builder, address, 0, _VECTOR, 4)


# Entries as two arrays (index int32, coefficient float32), and as records (int32 row, float32, float32, unused).
add_rows_256 = _make_add_rows(16, 4, 0)
add_rows_64 = _make_add_rows(4, 4, 0)
add_rows_twice_128 = _make_add_rows_twice(8)
add_rows_twice_64 = _make_add_rows_twice(4)
sum_records_64 = _make_sum_rows(4, 16, 0)
dots_4 = _make_dots(4)
dots_1 = _make_dots(1)
dots_twice_4 = _make_dots_twice(4)
dots_twice_1 = _make_dots_twice(1)
pack_above_bfloat16 = _make_pack_above(_bfloat16_lanes)
pack_above_float32 = _make_pack_above(_float32_lanes)
